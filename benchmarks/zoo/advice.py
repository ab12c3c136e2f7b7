"""Does the advice work? The first finding's `fix` is applied to the sick run, from the start; random advice beside it.

Works: the run then reaches 90 % of its healthy twin's gain (best constant answer's loss minus the loss, last 20 rows).
"""
from __future__ import annotations

import random

import numpy as np
from fastai.torch_core import set_seed

from fastgradstats import Record, diagnose
from fastgradstats.callbacks.apply_fix import apply_fix
from fastgradstats.callbacks.trial import final_gain

from .judge import alarms, by_default, evidence
from .training import kit, learner, path, runs

FIXES = [{'lr': .1, 'clip': 1.}, {'lr': .01}, {'lr': 100.}, {'init': 'kaiming'}, {'init': 'xavier'},
         {'input': 'normalize'},
         {'remove': 'softmax'}, {'zero_grad': True}, {'optimizer': 'all parameters'}, {'activation': 'tanh'},
         {'activation': 'leaky_relu'}, {'loss_scale': 2. ** 17}, {'norm': 'batch'},
         {'init': 'kaiming', 'norm': 'batch'}]

def follow(learn, fix):
    "Change the Learner as the fix says; a softmax within the zoo's own nets is taken out as their author would."
    if fix.get('remove') == 'softmax' and hasattr(learn.model, 'softmax'): learn.model.softmax = False
    apply_fix(learn, fix)

def share(name, seed, fix, twin):
    "Share of the twin's gain that the sick run reaches with `fix`."
    k = kit(name, True, seed)
    l, _ = learner(k, seed)
    set_seed(seed)
    try:
        follow(l, fix)
        end = final_gain(l, k.iters, seed)[1]
    except (RuntimeError, ValueError, IndexError) as e: print(f"  {name}: {e}"); return 0.
    c = twin.best_constant
    return (c - end) / (c - np.median(twin.loss[-20:]))

def try_advice(a):
    "Our first fix, and a random one, on every sick run of the first seed."
    rng, ours, dice = random.Random(a.first), [], []
    for name in (n for n, sick in runs(a.only, a.half) if sick):
        sick, twin = (path(a.out, name, s, a.first) for s in (True, False))
        if not (sick.exists() and twin.exists()): continue
        fix  = next(((f.rule, f.fix) for f in alarms(diagnose(by_default(Record.load(sick)))) if f.fix), None)
        twin = evidence(Record.load(twin))
        ours.append(share(name, a.first, fix[1], twin) if fix else 0.)
        line = f"{name:<26} {fix[0] if fix else '-':<16} {str(fix[1]) if fix else '':<66} {ours[-1]:6.2f}"
        if not a.no_random:
            dice.append(share(name, a.first, rng.choice(FIXES), twin))
            line += f"   random {dice[-1]:6.2f}"
        print(line, flush=True)
    works = lambda shares: f"{sum(s >= .9 for s in shares)}/{len(shares)}"
    print(f"works: {works(ours)}" + (f"; random advice: {works(dice)}" if dice else ''))
