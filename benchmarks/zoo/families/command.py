"""    python benchmarks/families.py --out DIR [--seeds 3] [--only gan*]       # train and save
    python benchmarks/families.py --out DIR --report [--markdown FILE]      # judge what was saved
"""
from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from fastai.torch_core import set_seed

from . import __doc__ as what, healthy, sick  # noqa: F401  (they fill CASES)
from ..command import arguments
from ..report import put
from ..training import chosen
from .judge import report
from .training import CASES


def path(out, name, seed): return Path(out) / f'{name}-{seed}.parquet'

def write(a):
    "Train what was not saved yet: the record, and beside it how well it went and what was said meanwhile."
    for seed in range(a.first, a.first + a.seeds):
        for c in CASES.values():
            to = path(a.out, c.name, seed)
            if not chosen(c.name, a.only) or to.with_suffix('.json').exists(): continue
            set_seed(seed)
            t, run = time.process_time(), c.make()
            run.record.save(to)
            score = {k: round(float(v), 4) for k, v in run.score.items()}
            to.with_suffix('.json').write_text(json.dumps(dict(score=score, said=run.said)))
            l = run.record.iters.loss
            print(f'{to.name:<44} {time.process_time() - t:5.1f} s {len(l):4} rows  loss {l.iloc[0]:9.4g} -> '
                  f'{l.iloc[-10:].median():9.4g}  {score}', flush=True)

def main():
    a = arguments(what, __doc__, 'families-out', 3).parse_args()
    torch.set_num_threads(1)
    Path(a.out).mkdir(parents=True, exist_ok=True)
    if not a.report: return write(a)
    text = report([(c, s, path(a.out, c.name, s)) for c in CASES.values() for s in range(a.first, a.first + a.seeds)])
    print(text)
    if a.markdown: put(a.markdown, 'families', text)
