"""A zoo of training runs: twins that differ by one line, sick and healthy, and healthy runs that fool naive rules.

    python benchmarks/zoo.py --out DIR [--seeds 5] [--half tuned|unseen|both] [--only mlp_*]    # record
    python benchmarks/zoo.py --out DIR --mend                       # is the guilty layer guilty? mend it alone
    python benchmarks/zoo.py --out DIR --report [--markdown FILE]   # judge what was recorded

`tuned` (zoo_cases/tuned*.py): the rules' thresholds were set on these. `unseen` (zoo_cases/unseen.py): others, not
looked at while thresholds were set. A pair is named after what differs; `truth` are the rules that name it rightly.
"""
from __future__ import annotations

import argparse
import math
import sys
import time
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.progress import ProgressCallback  # noqa: F401  (gives Learner its no_bar)
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.torch_core import set_seed
from torch import nn
from torch.utils.data import TensorDataset
from zoo_cases import CASES

from fastgradstats import LayerStatsCallback, Record
from fastgradstats.lesson10.data import TensorDL
from fastgradstats.diagnosis.evidence import run
from fastgradstats.measure.plan import DEFAULTS

PROBES = dict(weight=['norm', 'std'], activation=[*DEFAULTS['activation'], 'frac_saturated'])
HALVES = ('tuned', 'unseen')
SICK, MENDED = .6, .9             # of the healthy twin's gain: a sick run has less, a mended one so much


# --- training --------------------------------------------------------------------------------------------------------
def learner(kit, seed):
    "The Learner of a kit and the epochs to train it."
    (x, y), (xv, yv) = kit.data
    train = TensorDL(TensorDataset(x, y), kit.bs, seed, shuffle=True, drop_last=True)
    valid = TensorDL(TensorDataset(xv, yv), 400)
    out   = set() if kit.hidden is None else {id(p) for p in kit.hidden.parameters()}
    split = {} if not out else dict(splitter=lambda m: [[p for p in m.parameters() if id(p) not in out]])
    moms  = (.9 if 'Adam' in str(kit.opt) else 0.,) * 3
    dls   = DataLoaders(train, valid, device='cpu')
    learn = Learner(dls, kit.model, loss_func=kit.loss or nn.CrossEntropyLoss(), opt_func=kit.opt, lr=kit.lr, wd=kit.wd,
                    moms=moms, cbs=list(kit.cbs), metrics=[] if y.is_floating_point() else [accuracy], **split)
    return learn, math.ceil(kit.iters / len(train))

def accuracy(pred, y): return (pred.argmax(1) == y).float().mean()

def kit(name, sick, seed):
    set_seed(seed)
    return CASES[name].make(sick)

class Stop(Callback):
    order = 90
    def __init__(self, n): self.n = n
    def after_batch(self):
        if self.training and self.learn.train_iter >= self.n: raise CancelFitException

class Losses(Callback):
    def before_fit(self): self.losses = []
    def after_loss(self):
        if self.training: self.losses.append(float(self.learn.loss.detach()))

def train(k, seed, *cbs):
    "Train a kit with some callbacks."
    learn, epochs = learner(k, seed)
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, cbs=[*cbs, *([Stop(k.iters)] if k.bs < 20 else [])])
    return learn

def record(name, sick, seed, **settings):
    "Train a case and return its Record."
    return train(kit(name, sick, seed), seed, LayerStatsCallback(verbose=False, **{**PROBES, **settings})).layer_stats

def runs(only='*', half='both'):
    "(name, sick) of every run."
    for c in CASES.values():
        if not fnmatchcase(c.name, only) or half not in ('both', c.half): continue
        yield from ((c.name, s) for s in ((True, False) if c.truth else (False,)))

def path(out, name, sick, seed): return Path(out) / f"{name}-{'sick' if sick else 'healthy'}-{seed}.parquet"


# --- guilt by intervention -------------------------------------------------------------------------------------------
def gain(losses, constant):
    "Best constant answer's loss minus the loss at the end."
    end = np.median(losses[-20:])
    return constant - end if np.isfinite(end) else -np.inf

def mended(name, seed, module):
    """The losses of the sick run in which one module is as the healthy twin's, all else as it was. Twins differ in the
    guilty module alone, so any other one is taken from the healthy twin of another seed: a healthy draw."""
    sick, healthy = kit(name, True, seed), kit(name, False, seed if module == CASES[name].guilty else seed + 1000)
    sick.model.set_submodule(module, healthy.model.get_submodule(module))
    log = Losses()
    train(sick, seed, log)
    return log.losses

def modules(model): return [n for n, m in model.named_modules() if n and any(True for _ in m.parameters(recurse=False))]

def mend(out, name, seed, others):
    "Shares of the healthy twin's gain: the sick run's, and with one module mended; `others` too."
    twin, was = (run(Record.load(path(out, name, s, seed))) for s in (False, True))
    c    = twin.best_constant
    full = gain(twin.loss, c)
    mine = CASES[name].guilty
    todo = modules(kit(name, True, seed).model) if others else []
    yield dict(case=name, seed=seed, mended='', share=gain(was.loss, c) / full)
    for m in [mine, *(m for m in todo if m != mine)]:
        yield dict(case=name, seed=seed, mended=m, share=gain(mended(name, seed, m), c) / full)

def guilt(out):
    "Per case: the shares of the sick run, of the mended one, the best of the other layers; and if the layer is guilty."
    f = Path(out) / 'mend.csv'
    if not f.exists(): return pd.DataFrame(columns=['guilty', 'sick', 'mended', 'other', 'proven'])
    v = pd.read_csv(f, keep_default_na=False, dtype={'mended': str})
    rows = {}
    for name, d in v.groupby('case', sort=False):
        if name not in CASES: continue
        g     = CASES[name].guilty
        other = d[~d.mended.isin(['', g])]
        sick, mine = (d[d.mended == m].share.median() for m in ('', g))
        best  = other.share.max()
        rows[name] = dict(guilty=g, sick=sick, mended=mine, other=best,
                          proven=bool(sick < SICK and mine >= MENDED and not best >= MENDED))
    return pd.DataFrame.from_dict(rows, orient='index')


# --- the command -----------------------------------------------------------------------------------------------------
def write(a):
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

def intervene(a):
    f = Path(a.out) / 'mend.csv'
    v = [] if not f.exists() else pd.read_csv(f, keep_default_na=False, dtype={'mended': str}).to_dict('records')
    done = {(r['case'], r['seed']) for r in v}
    for seed in range(a.first, a.first + a.seeds):
        for name in dict.fromkeys(n for n, _ in runs(a.only, a.half) if CASES[n].guilty):
            if (name, seed) in done: continue
            v += mend(a.out, name, seed, others=seed == a.first)
            pd.DataFrame(v).to_csv(f, index=False)
    with pd.option_context('display.width', 200): print(guilt(a.out).round(2).to_string())

def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--out', default='zoo-out')
    ap.add_argument('--seeds', type=int, default=5)
    ap.add_argument('--first', type=int, default=0)
    ap.add_argument('--only', default='*')
    ap.add_argument('--half', default='both', choices=[*HALVES, 'both'])
    ap.add_argument('--mend', action='store_true', help='is the guilty layer guilty? first seed: or another one?')
    ap.add_argument('--report', action='store_true')
    ap.add_argument('--markdown', help="with --report: write the tables into this file, behind its preface")
    a = ap.parse_args()
    torch.set_num_threads(1)
    Path(a.out).mkdir(parents=True, exist_ok=True)
    if a.report:
        from zoo_report import report
        return report(a)
    return intervene(a) if a.mend else write(a)

if __name__ == '__main__': sys.exit(main())
