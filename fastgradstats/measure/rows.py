"""Rows as they are captured: what one forward pass shows, what is read around a step, histograms by windows."""
from __future__ import annotations

import math
from copy import copy

import numpy as np
import pandas as pd

from ..record.join import MAX_WINDOWS, coarsen


TOLD = 'loss', 'constant', 'prior'       # of every micro-batch; in the numbers of a row they follow norm and clip


class Part:
    "What was captured in one micro-batch, or at the parameters: numbers or 0-dim tensors, in the order of `sig`."
    __slots__ = ('sig', 'flat', 'hists', 'units', 'came', 'loss', 'constant', 'prior', 'bs', 'last', 'n', 'open',
                 'tasks', 'placebo', 'modes')
    def __init__(self, bs=0, last=0):
        self.sig, self.flat, self.hists, self.units = [], [], [], []      # sig: (probe, layer)
        self.came  = []                           # output gradients [(backward pass, site, what was found)]
        self.loss  = self.constant = self.prior = None   # None: not told, which is not the same as not a number
        self.bs, self.last, self.n = bs, last, 0                          # n: of numbers, once they are the row's
        self.open  = True                         # whether gradients may still come back to it
        self.tasks = set()                        # the backward passes that came back to the model's answer
        self.placebo = self.modes = None          # modes: what is in evaluation mode, dropout; None: not looked at
    def add(self, probe, layer, found, wanted):
        "What was found of one tensor, if it had elements."
        if found is None: return
        self.sig.append((probe, layer))
        self.flat += found.numbers
        if found.hist is not None: self.hists += [(probe, s.name, layer, found.hist) for s in wanted.hists]
        self.units += [((s.name, layer), s, partial) for s, partial in found.units]


class Row:
    def __init__(self, measured, about):
        self.measured, self.about   = measured, about
        self.parts, self.own        = [], Part()
        self.read = self.stepped = self.done = False
        self.grad_norm = self.clip  = math.nan
        self.norms = None                                          # of every gradient, once they are read
        self.n_accum = 0                                           # backward passes; 0: one a part
        self.lrs = self.layer_lrs   = self.placebo = None          # placebo: (numbers of parameters, values)
        self.mom = math.nan
        self.kept = math.nan                      # whether gradients of the step before were there at the first pass
    def again(self):
        "A row that has what this one has read, for a step that may have to be tried again."
        new = copy(self)
        new.own = Part()
        for k in ('sig', 'flat', 'hists', 'units'): getattr(new.own, k).extend(getattr(self.own, k))
        return new
    def forget(self):
        "Drop what was read at the parameters."
        self.own, self.read, self.grad_norm, self.clip = Part(), False, math.nan, math.nan


class Windows:
    "Histograms by windows: one a row up to MAX_WINDOWS, then neighbours are merged and the window doubles."
    def __init__(self): self.sums, self.first, self.last, self.width, self.open = [], [], [], 1, 0
    def add(self, i, counts):                                             # counts: (layer, bin), NaN where not measured
        if self.open and self.open < self.width:
            a, b = pad(self.sums[-1], counts)
            self.sums[-1] = np.where(np.isnan(a), b, np.where(np.isnan(b), a, a + b))
            self.last[-1] = i
            self.open    += 1
            return
        if len(self.sums) == MAX_WINDOWS:
            most = max(len(s) for s in self.sums)
            h, w = coarsen(np.stack([grow(s, most) for s in self.sums]),
                           pd.DataFrame(dict(first_iter=self.first, last_iter=self.last)), MAX_WINDOWS // 2)
            self.sums, self.first, self.last = list(h), w.first_iter.tolist(), w.last_iter.tolist()
            self.width *= 2
        self.sums.append(counts); self.first.append(i); self.last.append(i)
        self.open = 1

def grow(a, n): return a if len(a) >= n else np.concatenate([a, np.full((n - len(a), *a.shape[1:]), np.nan, a.dtype)])
def pad(a, b):
    n = max(len(a), len(b))
    return grow(a, n), grow(b, n)
