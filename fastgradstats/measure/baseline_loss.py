"The loss of a batch when every example is given the same answer: what answering without looking at the input costs."
from __future__ import annotations

import collections
import copy
import math
import random

import numpy as np
import torch

from .reductions import base
from .rng import unchanged_random_state


class BaselineLoss:
    """The loss of a batch when every example is answered with the batch's mean output. It must not change training: a
    loss that draws random numbers or that changes a buffer is found out at its first use."""
    def __init__(self, builder):
        self.builder, self.off = builder, False
        self.draws      = None                    # whether it draws random numbers of torch's, once it is known
        self.class_axis = None                    # of the answers, if the loss is what `_cross_entropy` computes

    def _give_up(self, why):
        self.off = True
        self.builder.ignore('loss_constant', why)
        return math.nan

    def __call__(self, loss_func, pred, yb):
        if self.off: return math.nan
        if not isinstance(pred, torch.Tensor) or not pred.is_floating_point() or pred.dim() == 0:
            return self._give_up(f"the model's answer is no float tensor but {type(pred).__name__}")
        if len(pred) < 2: return math.nan                             # the mean of one answer is that answer
        if self.draws is None: self.class_axis = _class_axis(loss_func)
        try:
            with torch.no_grad(): return self._read(loss_func, pred, yb)
        except Exception as e: return self._give_up(f"the loss function refused it: {type(e).__name__}: {e}")

    def _read(self, loss_func, pred, yb):
        quick = None if self.class_axis is None else _cross_entropy(pred, yb, self.class_axis)
        if quick is not None: return quick
        mean = pred.detach().mean(0, keepdim=True).expand_as(pred).contiguous()
        if self.draws is None: return self._first(loss_func, mean, yb)
        if not self.draws:     return loss_func(mean, *yb)
        with unchanged_random_state(pred.device): return loss_func(mean, *yb)

    def _first(self, loss_func, mean, yb):
        kept = _state_of(loss_func)
        why  = None
        with unchanged_random_state(mean.device):
            before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]
            try: out = loss_func(mean, *yb)
            finally: changed = _put_back(kept)
            if random.getstate() != before[1] or not np.array_equal(np.random.get_state()[1], before[2]):
                why = "the loss function draws random numbers of Python's or NumPy's"
            self.draws = mean.is_cuda or not torch.equal(before[0], torch.get_rng_state())
        if changed: why = 'the loss function changes its own buffers or attributes'
        return self._give_up(why) if why else out

def _class_axis(loss_func):
    """The axis of the classes where it is the mean cross-entropy without weights, smoothing or hooks, torch's own or
    fastai's around it; else None."""
    axis = 1
    if type(loss_func).__name__ == 'CrossEntropyLossFlat':
        if loss_func.floatify or not loss_func.is_2d: return None
        axis, loss_func = loss_func.axis, loss_func.func
    if loss_func is torch.nn.functional.cross_entropy: return axis
    if type(loss_func) is not torch.nn.CrossEntropyLoss: return None
    plain = (loss_func.weight is None and loss_func.reduction == 'mean' and not loss_func.label_smoothing
             and loss_func.ignore_index == -100 and not loss_func._forward_hooks and not loss_func._forward_pre_hooks)
    return axis if plain else None

def _cross_entropy(pred, yb, axis):
    "The cross-entropy of the mean answer: its log-softmax once, not once an example. None where it is not so simple."
    if len(yb) != 1 or not isinstance(yb[0], torch.Tensor) or not -pred.dim() <= axis < pred.dim(): return None
    pred, y, axis = base(pred).detach(), base(yb[0]), axis % pred.dim()
    if not axis or y.dtype != torch.int64 or y.shape != pred.shape[:axis] + pred.shape[axis + 1:]: return None
    wide  = torch.float32 if pred.device.type == 'mps' else torch.float64
    logp  = torch.log_softmax(pred.mean(0, keepdim=True, dtype=wide), axis).expand_as(pred)
    known = y != -100                                                      # torch's ignore_index
    each  = logp.gather(axis, torch.where(known, y, 0).unsqueeze(axis)).squeeze(axis)
    return -(each * known).sum() / known.sum()

def _state_of(loss_func):
    "The tensors, numbers and plain containers that a loss function keeps, with copies of them."
    parts = [loss_func, getattr(loss_func, 'func', None), getattr(loss_func, '__self__', None),
             getattr(loss_func, 'crit', None)]
    parts = [m for o in parts for m in (o.modules() if isinstance(o, torch.nn.Module) else [o])]
    found = []
    for o in parts:
        if not hasattr(o, '__dict__') or isinstance(o, type): continue
        for d in [vars(o), *(vars(o).get(k) or {} for k in ('_buffers', '_parameters'))]:
            for k, v in d.items():
                if isinstance(v, torch.Tensor): found.append((d, k, v, v.detach().clone()))
                elif isinstance(v, (int, float, complex, str)) or v is None: found.append((d, k, v, v))
                elif (isinstance(v, (list, set, collections.deque)) and k not in ('_buffers', '_parameters')
                      and not k.startswith('_')):
                    found.append((d, k, v, copy.copy(v)))
    return found

def _put_back(kept):
    "Undo what an evaluation changed; returns whether it changed anything."
    changed = False
    for d, k, v, old in kept:
        now = d.get(k)
        if isinstance(v, torch.Tensor):
            if now is v and (v.shape == old.shape and torch.equal(v.detach(), old)
                             or v.is_floating_point() and torch.equal(v.nan_to_num(), old.nan_to_num())): continue
            with torch.no_grad(): v.copy_(old)
        elif now is v and (v is old or len(v) == len(old)): continue
        elif v is not old: v.clear(); (v.update if isinstance(v, set) else v.extend)(old)
        d[k], changed = v, True
    return changed
