"""Faults: each changes one line of a setup and has one truth, the rule that says what is wrong with that line.

`also` are names of what comes of it: accepted in second place, never the best name."""
from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from fastai.callback.core import Callback
from fastai.torch_core import Module
from torch import nn

from .edits import biased, picked, times, zeros
from .init import normal


class Fault(NamedTuple):
    truth:  str
    also:   tuple
    change: object                # f(setup) -> setup
    guilty: str = ''              # the one module in which the fault sits, '' where it is in more

BURSTS = 'exploding', 'non_finite', 'unstable'
BIG    = 'exploding', 'step_too_large', 'non_finite'
FADES  = 'starved', 'vanishing'

def but(**changes): return lambda s: s.but(**changes)
def edit(f):        return lambda s: s.but(edits=[*s.edits, f])
def cb(make):       return lambda s: s.but(cbs=[*s.cbs, make])
def one(what):
    "The guilty module, where exactly one is named."
    return what[0] if len(what) == 1 and isinstance(what[0], str) and not set(what[0]) & set('*?[') else ''


# --- the first weights -----------------------------------------------------------------------------------------------
def small_init(std):       return Fault('bad_init', FADES, but(init=partial(normal, std=std)))
def zero_init():           return Fault('bad_init', (), but(init=partial(normal, std=0.)))
def no_init():             return Fault('starved', ('vanishing', 'bad_init'), but(init=None))
def big_init(gain):        return Fault('bad_init', BIG, partial(_gain, gain))
def saturating_init(gain): return Fault('saturated', ('bad_init',), partial(_gain, gain))
def _gain(gain, s):        return s.but(init=partial(getattr(s.init, 'func', s.init), gain=gain))

def zero(*what):             return Fault('bad_init', (), edit(zeros(*what)), one(what))
def big(*what, by, **of):    return Fault('bad_init', BIG, edit(times(*what, by=by, **of)), one(what))
def big_head(*what, by):     return Fault('bad_init', BIG[:2], edit(times(*what, by=by)), one(what))
def dead(*what, bias=-10.):  return Fault('dead_units', (), edit(biased(*what, by=bias)), one(what))
def shut(*what, bias=10.):   return Fault('saturated', ('bad_init',), edit(biased(*what, by=bias)), one(what))


# --- the net's shape -------------------------------------------------------------------------------------------------
def fading(**net):      return Fault('vanishing', ('starved', 'bad_init'), but(**net))
def forgetting(change): return Fault('vanishing_through_time', ('bad_init',), change)
def too_long(**net):    return Fault('exploding', ('bad_init', 'step_too_large', *BURSTS[1:]), but(**net))

def softmax_twice():    return Fault('double_softmax', (), but(wrap=_with_softmax))
def _with_softmax(model):
    "Within the net where it has a place for one, else behind it."
    if not hasattr(model, 'softmax'): return nn.Sequential(model, nn.Softmax(1))
    model.softmax = True
    return model

class InHalf(Module):
    "A model in half precision, its answer in float32."
    def __init__(self, model): self.model = model.half()
    def forward(self, x): return self.model(x.half() if x.is_floating_point() else x).float()

def half_precision():   return Fault('fp16_underflow', (), but(wrap=InHalf))


# --- the loop --------------------------------------------------------------------------------------------------------
class KeepGrads(Callback):
    "The forgotten zero_grad."
    def before_fit(self): self.learn.opt.zero_grad = lambda: None

class Spike(Callback):
    "One step with a learning rate `times` as large."
    order = 70
    def __init__(self, at, times): self.at, self.times = at, times
    def before_batch(self):
        if not self.training: return
        if self.learn.train_iter == self.at:
            self.was = self.opt.hypers[-1]['lr']
            self.opt.set_hyper('lr', self.was * self.times)
        if self.learn.train_iter == self.at + 1: self.opt.set_hyper('lr', self.was)

def large_steps(lr):        return Fault('step_too_large', BURSTS, but(lr=lr))
def small_steps(lr):        return Fault('step_too_small', (), but(lr=lr))
def one_large_step(at, by): return Fault('step_too_large', ('dead_units', *BURSTS[:2]), cb(partial(Spike, at, by)))
def gradients_kept():       return Fault('not_zeroed', (), cb(KeepGrads))

def not_stepped(*what):
    return Fault('not_stepped', ('step_too_small',), but(hidden=lambda m: picked(m, what).values()), one(what))
def body_not_stepped(n):
    "The optimizer does not get the model's first n children."
    return Fault('not_stepped', ('step_too_small',), but(hidden=lambda m: [*m.children()][:n]))


# --- the data --------------------------------------------------------------------------------------------------------
def unscaled(f):
    "Every input goes through f."
    return Fault('input_scale', (), lambda s: s.but(data=lambda: tuple((f(x), y) for x, y in s.data())))

def raw(x):         return (x - x.min()) / (x.max() - x.min()) * 255
def off_centre(x):  return 300 + 100 * x
def loud(x):        return 500 + 100 * x
def millimetres(x): return 3000 + 1000 * x
def coarse(x):      return x * x.new_tensor([1.] + [1000.] * 6)                   # a category stays as it is
def counts(x):      return torch.cat([x[:, :-4], 2000 + 1000 * x[:, -4:]], 1)     # the categories stay
def units(x):       return x * torch.logspace(0, 4, x.shape[1])                   # each column has its own, to 10,000
