"The loss of a batch when every example is given the same answer: what answering without looking at the input costs."
from __future__ import annotations

import collections
import copy
import math
import random

import numpy as np
import torch

from .readers import kernels
from .readers.cpu import base


class ConstantAnswer:
    """The loss of a batch when every example is answered with the batch's mean output. It must not change training: a
    loss that draws random numbers or that changes a buffer is found out at its first use."""
    def __init__(self, watcher):
        self.watcher, self.off, self.guard = watcher, False, None
        self.plain = None                         # the loss function, if it is what `_cross_entropy` computes

    def _give_up(self, why):
        self.off = True
        self.watcher.log.ignore('loss_constant', why)
        return math.nan

    def __call__(self, loss_func, pred, yb):
        if self.off: return math.nan
        if not isinstance(pred, torch.Tensor) or not pred.is_floating_point() or pred.dim() == 0:
            return self._give_up(f"the model's answer is no float tensor but {type(pred).__name__}")
        if len(pred) < 2: return math.nan                             # the mean of one answer is that answer
        if self.plain is loss_func and (quick := _cross_entropy(pred, yb)) is not None: return quick
        mean = pred.detach().mean(0, keepdim=True).expand_as(pred).contiguous()
        if self.guard is None: return self._first(loss_func, mean, yb)
        try:
            with torch.no_grad():
                if not self.guard: return loss_func(mean, *yb)
                with torch.random.fork_rng(devices=_cuda(pred)): return loss_func(mean, *yb)
        except Exception as e: return self._give_up(f"the loss function refused it: {type(e).__name__}: {e}")

    def _first(self, loss_func, mean, yb):
        kept   = _state_of(loss_func)
        before = torch.get_rng_state()
        others = random.getstate(), np.random.get_state()
        why    = None
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=_cuda(mean)):
                out   = loss_func(mean, *yb)
                drawn = not torch.equal(before, torch.get_rng_state())
        except Exception as e: why = f"the loss function refused it: {type(e).__name__}: {e}"
        if random.getstate() != others[0] or not np.array_equal(np.random.get_state()[1], others[1][1]):
            why = "the loss function draws random numbers of Python's or NumPy's"
        random.setstate(others[0])
        np.random.set_state(others[1])
        if _put_back(kept): why = 'the loss function changes its own buffers or attributes'
        if why: return self._give_up(why)
        self.guard = drawn or mean.is_cuda
        self.plain = loss_func if self.watcher.host is not False and _is_cross_entropy(loss_func) else None
        return out

def _is_cross_entropy(loss_func):
    "Whether it is the mean cross-entropy without weights, smoothing or hooks: torch's own, or fastai's around it."
    if type(loss_func).__name__ == 'CrossEntropyLossFlat':
        if loss_func.floatify or loss_func.axis not in (1, -1): return False
        loss_func = loss_func.func
    if loss_func is torch.nn.functional.cross_entropy: return True
    return (type(loss_func) is torch.nn.CrossEntropyLoss and loss_func.weight is None and loss_func.reduction == 'mean'
            and not loss_func.label_smoothing and loss_func.ignore_index < 0
            and not loss_func._forward_hooks and not loss_func._forward_pre_hooks)

def _cross_entropy(pred, yb):
    "The cross-entropy of the mean answer in one pass over the answers, or None where it is not as simple as that."
    if len(yb) != 1 or not isinstance(yb[0], torch.Tensor): return None
    pred, y = base(pred), base(yb[0])
    if not (pred.dtype is torch.float32 and y.dtype is torch.int64 and pred.dim() == 2 and y.dim() == 1 and pred.is_cpu
            and y.is_cpu and len(y) == len(pred) and pred.is_contiguous() and y.is_contiguous()): return None
    loss = kernels.cross_entropy_of_mean(pred.detach().numpy(), y.numpy())
    return None if math.isnan(loss) else loss

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

def _cuda(t): return [t.device] if t.is_cuda else []
