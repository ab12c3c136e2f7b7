"Training a case: its kit, its Learner, its Record."
from __future__ import annotations

import math
from fnmatch import fnmatchcase
from pathlib import Path

from fastai.callback.core import Callback, CancelFitException
from fastai.callback.progress import ProgressCallback  # noqa: F401  (gives Learner its no_bar)
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.torch_core import set_seed
from torch.utils.data import TensorDataset

from fastgradstats import LayerStatsCallback
from fastgradstats.lesson10.data import TensorDL

from .cases import CASES


def kit(name, sick, seed):
    set_seed(seed)
    return CASES[name].make(sick)

def accuracy(pred, y): return (pred.argmax(1) == y).float().mean()

def learner(kit, seed):
    "The Learner of a kit and the epochs to train it."
    (x, y), (xv, yv) = kit.data
    train = TensorDL(TensorDataset(x, y), kit.bs, seed, shuffle=True, drop_last=True)
    valid = TensorDL(TensorDataset(xv, yv), 400)
    out   = set() if kit.hidden is None else {id(p) for p in kit.hidden.parameters()}
    split = {} if not out else dict(splitter=lambda m: [[p for p in m.parameters() if id(p) not in out]])
    moms  = (.9 if 'Adam' in str(kit.opt) else 0.,) * 3
    learn = Learner(DataLoaders(train, valid, device='cpu'), kit.model, loss_func=kit.loss, opt_func=kit.opt, lr=kit.lr,
                    wd=kit.wd, moms=moms, cbs=kit.cbs, metrics=[] if y.is_floating_point() else [accuracy], **split)
    return learn, math.ceil(kit.iters / len(train))

class Stop(Callback):
    order = 90
    def __init__(self, n): self.n = n
    def after_batch(self):
        if self.training and self.learn.train_iter >= self.n: raise CancelFitException

def train(k, seed, *cbs):
    "Train a kit with some callbacks."
    learn, epochs = learner(k, seed)
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, cbs=[*cbs, *([Stop(k.iters)] if k.bs < 20 else [])])
    return learn

def record(name, sick, seed, **settings):
    "Train a case and return its Record: what is recorded by default, unless `settings` say otherwise."
    return train(kit(name, sick, seed), seed, LayerStatsCallback(verbose=False, **settings)).layer_stats

def chosen(name, only): return any(fnmatchcase(name, p) for p in only.split(','))

def runs(only='*', half='both'):
    "(name, sick) of every run."
    for c in CASES.values():
        if not chosen(c.name, only) or half not in ('both', c.half): continue
        yield from ((c.name, s) for s in ((True, False) if c.truth else (False,)))

def path(out, name, sick, seed): return Path(out) / f"{name}-{'sick' if sick else 'healthy'}-{seed}.parquet"
