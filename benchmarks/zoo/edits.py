"Changes of a net that has its first weights, and callbacks that change its training: each a call for a Setup."
from __future__ import annotations

from fnmatch import fnmatchcase
from functools import partial

from fastai.callback.schedule import ParamScheduler, SchedCos, combine_scheds
from fastai.callback.training import GradientClip
from fastai.optimizer import SGD, Adam
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from .init import Lora


def picked(model, what):
    "Name -> module of those whose name matches a pattern, or of a type."
    match = lambda n, m, w: fnmatchcase(n, w) if isinstance(w, str) else isinstance(m, w)
    found = {n: m for n, m in model.named_modules() if n and any(match(n, m, w) for w in what)}
    assert found, what
    return found

def each(f):
    "f(module, *args) -> a maker of edits that do it to every module picked."
    return lambda *what, **args: lambda model: [f(m, **args) for m in picked(model, what).values()]

zeros    = each(lambda m: nn.init.zeros_(m.weight))
redrawn  = each(lambda m, std: nn.init.normal_(m.weight, std=std))
biased   = each(lambda m, by: nn.init.constant_(m.bias, by))
times    = each(lambda m, by, of='weight': getattr(m, of).data.mul_(by))
normed   = each(weight_norm)

def frozen(n): return lambda model: [m.requires_grad_(False) for m in [*model.children()][:n]]

def lora(*what):
    return lambda model: [model.set_submodule(n, Lora(m)) for n, m in picked(model, what).items()]

def recurrent(gain):   return lambda model: nn.init.orthogonal_(model.rnn.weight_hh_l0, gain)
def forget_gate(bias): return lambda model: nn.init.constant_(model.rnn.bias_ih_l0[32:64], bias)
def spare(model):      model.spare = nn.Linear(48, 48)        # a layer that is never asked

def clip(norm):      return partial(GradientClip, norm)
def scheduled(rate): return lambda: ParamScheduler({'lr': rate})
def cosine(lr):      return scheduled(SchedCos(lr, 1e-6))
def warm_up(lr):     return scheduled(combine_scheds([.4, .6], [SchedCos(lr / 100, lr), SchedCos(lr, lr)]))

AdamW    = partial(Adam, decouple_wd=True)
Momentum = partial(SGD, mom=.9)
