"""    python benchmarks/zoo.py --out DIR [--seeds 5] [--half tuned|unseen|both] [--only mlp_*]    # record
    python benchmarks/zoo.py --out DIR --mend                       # is the guilty layer guilty? mend it alone
    python benchmarks/zoo.py --out DIR --report [--markdown FILE]   # judge what was recorded
    python benchmarks/zoo.py --out DIR --advice [--no-random]       # does the advice work?
"""
from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from . import HALVES, __doc__ as what
from .advice import try_advice
from .mending import intervene
from .report import publish
from .training import path, record, runs


def write(a):
    "Record what was not recorded yet."
    for seed in range(a.first, a.first + a.seeds):
        for name, sick in runs(a.only, a.half):
            to = path(a.out, name, sick, seed)
            if to.exists(): continue
            t = time.time()
            rec = record(name, sick, seed)
            rec.save(to)
            l, c = rec.iters.loss, rec.iters.loss_constant.iloc[-10:].median()
            print(f"{to.name:<48} {time.time() - t:5.1f} s", end='  ')
            print(f"loss {l.iloc[0]:9.4g} -> {l.iloc[-10:].median():9.4g}  constant {c:.4g}", flush=True)

def arguments(what, use, out, seeds):
    "The arguments that recording and judging have in common."
    ap = argparse.ArgumentParser(description=what, epilog=use, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--out', default=out)
    ap.add_argument('--seeds', type=int, default=seeds)
    ap.add_argument('--first', type=int, default=0, help='the first seed')
    ap.add_argument('--only', default='*', help='patterns of names, with commas between them')
    ap.add_argument('--report', action='store_true')
    ap.add_argument('--markdown', help="with --report: write the tables into this file, behind its preface")
    return ap

def main():
    ap = arguments(what, __doc__, 'zoo-out', 5)
    ap.add_argument('--half', default='both', choices=[*HALVES, 'both'])
    ap.add_argument('--mend', action='store_true', help='is the guilty layer guilty? first seed: or another one?')
    ap.add_argument('--advice', action='store_true', help="the first finding's fix on the sick run, of the first seed")
    ap.add_argument('--no-random', action='store_true', help='with --advice: no random fixes beside it')
    a = ap.parse_args()
    torch.set_num_threads(1)
    Path(a.out).mkdir(parents=True, exist_ok=True)
    return publish(a) if a.report else intervene(a) if a.mend else try_advice(a) if a.advice else write(a)
