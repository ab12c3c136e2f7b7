"""Does the advice work? The first finding's `fix` is applied to the sick run, from the start; random advice beside it.

    python benchmarks/zoo_advice.py --out /tmp/zoo --half tuned [--seed 0] [--only 'mlp_*'] [--no-random]

Works: the run then reaches 90 % of its healthy twin's gain (best constant answer's loss minus the loss, last 20 rows).
"""
import argparse
import random
from fnmatch import fnmatchcase

import numpy as np
from fastai.torch_core import set_seed
from zoo import CASES, kit, learner, path

from fastgradstats import Record, diagnose
from fastgradstats.diagnosis.evidence import run
from fastgradstats.callbacks.trial import apply_fix, final_gain

FIXES = [{'lr': .1, 'clip': 1.}, {'lr': .01}, {'lr': 100.}, {'init': 'kaiming'}, {'init': 'xavier'},
         {'input': 'normalize'},
         {'remove': 'softmax'}, {'zero_grad': True}, {'optimizer': 'all parameters'}, {'activation': 'tanh'},
         {'activation': 'leaky_relu'}, {'loss_scale': 2. ** 17}, {'norm': 'batch'},
         {'init': 'kaiming', 'norm': 'batch'}]

def share(name, seed, fix, twin):
    "Share of the twin's gain that the sick run reaches with `fix`."
    k = kit(name, True, seed)
    l, _ = learner(k, seed)
    set_seed(seed)
    try:
        apply_fix(l, fix)
        end = final_gain(l, k.iters, seed)[1]
    except (RuntimeError, ValueError, IndexError) as e: print(f"  {name}: {e}"); return 0.
    r = run(twin)
    c = r.best_constant
    return (c - end) / (c - np.median(r.loss[-20:]))

def main():
    ap = argparse.ArgumentParser()
    ap.add_argument('--out', default='zoo-out')
    ap.add_argument('--half', default='both')
    ap.add_argument('--seed', type=int, default=0)
    ap.add_argument('--only', default='*')
    ap.add_argument('--no-random', action='store_true')
    a = ap.parse_args()
    rng, ours, dice = random.Random(a.seed), [], []
    for c in CASES.values():
        if not c.truth or a.half not in ('both', c.half): continue
        if not any(fnmatchcase(c.name, p) for p in a.only.split(',')): continue
        sick, twin = path(a.out, c.name, True, a.seed), path(a.out, c.name, False, a.seed)
        if not (sick.exists() and twin.exists()): continue
        bad  = [f for f in diagnose(Record.load(sick)).findings if f.severity != 'info' and f.fix]
        twin = Record.load(twin)
        s    = share(c.name, a.seed, bad[0].fix, twin) if bad else 0.
        ours.append(s >= .9)
        line = f"{c.name:<26} {bad[0].rule if bad else '-':<16} {str(bad[0].fix) if bad else '':<66} {s:6.2f}"
        if not a.no_random:
            d = share(c.name, a.seed, rng.choice(FIXES), twin)
            dice.append(d >= .9)
            line += f"   random {d:6.2f}"
        print(line, flush=True)
    print(f"works: {sum(ours)}/{len(ours)}" + (f"; random advice: {sum(dice)}/{len(dice)}" if dice else ''))

if __name__ == '__main__': main()
