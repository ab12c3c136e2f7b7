"What a run is made of: a setup of calls, from which a kit of values is made afresh for every run."
from __future__ import annotations

from typing import NamedTuple

from fastai.optimizer import SGD
from torch import nn


class Setup(NamedTuple):
    "Calls alone: nothing is drawn or built before `build`."
    net:    object                # f(**args) -> model
    data:   object                # f() -> (x, y), (x valid, y valid)
    lr:     float  = .1
    opt:    object = SGD
    loss:   object = None         # f() -> loss function; None is cross-entropy
    cbs:    tuple  = ()           # f() -> callback
    bs:     int    = 100
    iters:  int    = 120
    wd:     float  = 0.
    init:   object = None         # f(model): its first weights, where they are not the net's own
    edits:  tuple  = ()           # f(model), in turn, after init
    wrap:   object = None         # f(model) -> model, last
    hidden: object = None         # f(model) -> the modules whose parameters the optimizer does not get
    args:   dict   = {}

    def but(self, **changes):
        "This setup with changes; what is no field is an argument of the net."
        ours = {k: v for k, v in changes.items() if k in self._fields}
        return self._replace(args={**self.args, **{k: v for k, v in changes.items() if k not in ours}}, **ours)

    def build(self):
        "A Kit: the net is drawn first, then its init, then the edits."
        model = self.net(**self.args)
        for change in (self.init, *self.edits):
            if change: change(model)
        hidden = self.hidden and nn.ModuleList(self.hidden(model))
        loss   = self.loss() if self.loss else nn.CrossEntropyLoss()
        if self.wrap: model = self.wrap(model)
        cbs    = [c() for c in self.cbs]
        return Kit(model, self.data(), self.lr, self.opt, loss, cbs, self.bs, self.iters, self.wd, hidden)

class Kit(NamedTuple):
    "What a run is made of."
    model:  object
    data:   tuple                 # (x, y), (x valid, y valid)
    lr:     float
    opt:    object
    loss:   object
    cbs:    list
    bs:     int
    iters:  int
    wd:     float
    hidden: object                # a module whose parameters the optimizer does not get, or None
