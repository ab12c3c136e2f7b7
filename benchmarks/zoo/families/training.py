"How a family trains: with fastai and DiagnosisCallback, or by hand under `watch`; what it then is: a Run."
from __future__ import annotations

import re
import warnings
from typing import NamedTuple

import torch
from fastai.callback.progress import ProgressCallback  # noqa: F401  (gives Learner its no_bar)
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import Adam
from torch import nn
from torch.utils.data import TensorDataset

from fastgradstats import DiagnosisCallback, watch
from fastgradstats.lesson10.data import TensorDL


class Run(NamedTuple):
    record: object
    score:  dict                  # how well it went, by name
    said:   list | None = None    # warnings while it trained: iteration, rule, text; None where none could be

class Case(NamedTuple):
    name: str
    make: object                  # f() -> Run
    best: str | None = None       # the rule that names the fault; '' where none covers it; None: a healthy run
    also: tuple = ()              # further names that are right

    sick     = property(lambda self: self.best is not None)
    truth    = property(lambda self: tuple(filter(None, (self.best, *self.also))))
    declared = property(lambda self: 'healthy' if not self.sick else ', '.join((self.best or 'no rule', *self.also)))

CASES = {}

def add(name, *rest):
    assert name not in CASES, name
    CASES[name] = Case(name, *rest)

def family(make):
    "A healthy family: a function whose defaults train well."
    add(make.__name__, make)
    return make

def dense(*sizes, act=nn.ReLU):
    "Linear layers with `act` between them."
    return nn.Sequential(*[m for a, b in zip(sizes, sizes[1:]) for m in (nn.Linear(a, b), act())][:-1])

def some(n, *tensors):
    "The same n random rows of each."
    k = torch.randint(len(tensors[0]), (n,))
    return [t[k] for t in tensors]

def told(heard):
    "The warnings of DiagnosisCallback among those heard."
    texts = [str(h.message) for h in heard if str(h.message).startswith('iteration ')]
    found = [re.match(r'iteration (\d+): (\w+) \(', t) for t in texts]
    assert all(found), texts                                       # a warning of another form must not go uncounted
    return [dict(iter=int(m[1]), rule=m[2], text=t) for m, t in zip(found, texts)]

def fit(x, y, model, loss, epochs, lr, *, bs=64, opt=Adam, how='fit', shuffle=True, metrics=(), cbs=(), **settings):
    "A Run of a Learner; the last fifth of the data is held out."
    n, seed = len(x) * 4 // 5, int(torch.randint(2 ** 30, ()))
    train = TensorDL(TensorDataset(x[:n], y[:n]), bs, seed, shuffle=shuffle, drop_last=True)
    valid = TensorDL(TensorDataset(x[n:], y[n:]), 4096)
    learn = Learner(DataLoaders(train, valid, device='cpu'), model, loss_func=loss, opt_func=opt, lr=lr,
                    metrics=list(metrics), cbs=list(cbs), **settings)
    with warnings.catch_warnings(record=True) as heard, learn.no_bar(), learn.no_logging():
        warnings.simplefilter('always')
        getattr(learn, how)(epochs, lr, cbs=DiagnosisCallback())
    last = learn.recorder.values[-1] if learn.recorder.values else []
    return Run(learn.layer_stats, dict(zip(learn.recorder.metric_names[1:], last)), told(heard))

def loop(model, opt, n, batch, *, loss_func=None, tell=True, zero=True, after=None):
    "The Record of n steps by hand; `batch(i)` is a loss, or one with the answer and the target."
    with watch(model, opt, loss_func=loss_func) as w:
        for i in range(n):
            loss, *rest = out if isinstance(out := batch(i), tuple) else (out,)
            if zero: opt.zero_grad()
            if tell: w.loss(loss, *rest)
            loss.backward()
            opt.step()
            if after: after(i)
    return w.record

def by_hand(net, x, y, loss, opt, lr, n=300, **settings):
    "The Record of a loop over random batches, told the answers and targets."
    def batch(i):
        a, b = some(64, x, y)
        p    = net(a)
        return loss(p, b), p, b
    return loop(net, opt(net.parameters(), lr), n, batch, loss_func=loss, **settings)
