"""The loss of a batch when every example is given the same answer: what answering without looking at the input costs.
That answer is the batch's own mean output (`loss_constant`), or the best one of the batches before (`loss_prior`)."""
from __future__ import annotations

import collections
import copy
import math
import random

import numpy as np
import torch

from .reductions import base
from .rng import unchanged_random_state


TRIED  = 50                       # batches in which every kind of prior is asked; then the one that cost least
MEMORY = .9                       # of the running mean outputs


class BaselineLoss:
    """The loss of a batch when every example is answered with the batch's mean output. It must not change training: a
    loss that draws random numbers or that changes a buffer is found out at its first use."""
    def __init__(self, watcher):
        self.watcher, self.off = watcher, False
        self.draws      = None                    # whether it draws random numbers of torch's, once it is known
        self.asks, self.class_axis = None, None   # the loss function; the answers' axis of classes, see `_class_axis`
        self.counts     = None                    # of the classes, in the batches before
        self.means      = {}                      # ('outputs' or 'targets', shape) -> (mean, batches)
        self.costs, self.batches = {}, 0          # kind of prior -> (its mean loss, batches); how many there were

    def _give_up(self, why):
        self.off = True
        self.watcher.builder.ignore('loss_constant', why)
        return math.nan

    def __call__(self, loss_func, pred, yb):
        if self.off: return math.nan
        if loss_func is not self.asks: self.asks, self.class_axis = loss_func, _class_axis(loss_func)
        if not isinstance(pred, torch.Tensor) or not pred.is_floating_point() or pred.dim() == 0:
            return self._give_up(f"the model's answer is no float tensor but {type(pred).__name__}")
        if len(pred) < 2: return math.nan                             # the mean of one answer is that answer
        try:
            with torch.no_grad(): return self._read(loss_func, pred, yb)
        except Exception as e: return self._give_up(f"the loss function refused it: {type(e).__name__}: {e}")

    def _read(self, loss_func, pred, yb):
        quick = None if self.class_axis is None else self._cross_entropy(pred, yb, self.class_axis)
        if quick is not None: return quick
        return self._asked(loss_func, pred.detach().mean(0, keepdim=True).expand_as(pred).contiguous(), yb)

    def _asked(self, loss_func, answer, yb):
        if self.draws is None: return self._first(loss_func, answer, yb)
        if not self.draws:     return loss_func(answer, *yb)
        with unchanged_random_state(answer.device): return loss_func(answer, *yb)

    def both(self, loss_func, pred, yb):
        "The loss of the batch's mean answer, and of the best one of the batches before."
        return self(loss_func, pred, yb), self.prior(loss_func, pred, yb)

    # --- the best answer of the batches before -----------------------------------------------------------------------

    def prior(self, loss_func, pred, yb):
        """The loss of a batch when every example is given one answer, chosen by the batches before this one: log
        frequencies of the classes; the mean target, its logarithm or its logit; the running mean output. Whichever
        has cost least. It is never fitted to the batch that it is asked about, so few examples do not flatter it."""
        if self.off or not isinstance(pred, torch.Tensor) or not pred.is_floating_point() or not pred.dim():
            return math.nan
        pred, y = base(pred).detach(), _target(yb)
        with torch.no_grad():
            axis  = _axis_of_classes(pred, y) if self.class_axis is None else self.class_axis % pred.dim()
            exact = self.class_axis is not None and _axis_of_classes(pred, y, axis) == axis
            seen  = None if axis is None or y is None else self.watcher.reader.class_counts(y, pred.shape[axis])
            try:
                if exact: return -(seen * self._logp(seen)).sum() / seen.sum()
                return self._cheapest(loss_func, pred, yb, None if seen is None else self._logp(seen), axis)
            finally: self._learn(pred, y, seen)

    def _logp(self, like):
        "Of the classes in the batches before, each counted once more; `like`: counts of as many classes."
        c   = self.counts if self.counts is not None and len(self.counts) == len(like) else 0 * like
        log = np.log if isinstance(c, np.ndarray) else torch.log
        return log((c + 1) / (c.sum() + len(like)))

    def _cheapest(self, loss_func, pred, yb, logp, axis):
        "Of the priors of every kind, that which has cost least until now."
        answers = self._answers(pred, logp, axis)
        losses  = {}
        for kind in [k for k in answers if self.batches < TRIED or k in self.costs]:
            try: losses[kind] = self._asked(loss_func, answers[kind].to(pred.dtype).expand_as(pred).contiguous(), yb)
            except Exception: self.costs.pop(kind, None)
        losses = {k: base(v).detach().mean() for k, v in losses.items() if isinstance(v, torch.Tensor)}
        if not losses: return math.nan
        worst, self.batches = torch.finfo(pred.dtype).max, self.batches + 1
        for k, v in losses.items():
            mean, n = self.costs.get(k, (0., 0))
            self.costs[k] = mean + (v.nan_to_num(worst, worst) - mean) / (n + 1), n + 1
        kinds = list(losses)
        best  = torch.stack([self.costs[k][0] for k in kinds]).argmin()
        if self.batches == TRIED and pred.is_cpu: self.costs = {kinds[best]: self.costs[kinds[best]]}
        return torch.stack([losses[k] for k in kinds])[best]

    def _answers(self, pred, logp, axis):
        "{kind of prior: one example's answer}"
        mean = self.means.get(('outputs', pred.shape[1:]))
        out  = dict(output=pred.mean(0, keepdim=True) if mean is None else mean[0])
        if axis is not None:
            shape = 1, *[-1 if k == axis else 1 for k in range(1, pred.dim())]
            out['frequencies'] = torch.as_tensor(logp).view(shape)
        t = self.means.get(('targets', pred.shape[1:]))
        if t is not None:
            out.update(target=t[0], log=t[0].clamp(min=1e-6).log(), logit=t[0].clamp(1e-6, 1 - 1e-6).logit())
        return out

    def _learn(self, pred, y, seen):
        "Take this batch among those that priors are chosen by."
        if seen is not None:
            self.counts = seen if self.counts is None or len(self.counts) != len(seen) else self.counts + seen
            if self.class_axis is not None: return
        self._mean('outputs', pred, MEMORY)
        if y is not None and seen is None and y.numel() == pred.numel(): self._mean('targets', y.reshape(pred.shape), 1)

    def _mean(self, what, x, memory):
        "A running mean over batches, of all alike (memory=1), or of late ones above all."
        key, x  = (what, x.shape[1:]), x.to(torch.float32).mean(0, keepdim=True)
        old, n  = self.means.get(key, (x, 0))
        share   = max(1 / (n + 1), 1 - memory)
        self.means[key] = old + share * (x - old), n + 1

    def _cross_entropy(self, pred, yb, axis):
        "The cross-entropy of the mean answer; None where it is not so simple."
        y, axis = _target(yb), axis % pred.dim()
        if y is None or y.dtype != torch.int64 or _axis_of_classes(pred, y, axis) != axis: return None
        return self.watcher.reader.cross_entropy(base(pred).detach(), y, axis)

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

def _target(yb):
    "The targets, where they are one tensor of numbers."
    y = yb[0] if len(yb) == 1 and isinstance(yb[0], torch.Tensor) else None
    return None if y is None or y.is_complex() else base(y).detach()

def _axis_of_classes(pred, y, only=None):
    "The axis of `pred` that integer targets lack, as those of classes do; None where there is none such."
    if y is None or y.dtype not in (torch.int64, torch.int32, torch.uint8) or y.dim() != pred.dim() - 1: return
    axes = (1, pred.dim() - 1) if only is None else (only,)
    return next((k for k in axes if 0 < k < pred.dim() and y.shape == pred.shape[:k] + pred.shape[k + 1:]), None)

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
