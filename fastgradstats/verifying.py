"""Trying advice out: a finding's `fix` applied to a fresh Learner, trained beside one without it."""
from __future__ import annotations

import copy

import numpy as np
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.training import GradientClip
from fastai.learner import Learner
from fastai.torch_core import set_seed
from torch import nn

from .answering import num
from .diagnosing import Report

ITERS = 50                        # iterations that both train


class _Stop(Callback):
    order = 90
    def __init__(self, n): self.n, self.losses = n, []
    def after_batch(self):
        if not self.training: return
        self.losses.append(float(self.learn.loss.detach()))
        if self.learn.train_iter >= self.n or not np.isfinite(self.losses[-1]): raise CancelFitException

class _Standardise(Callback):
    "Shift and scale every input by the mean and std of the first batch."
    order = 5
    def before_batch(self):
        x = self.xb[0]
        if not hasattr(self, 'stats'):
            dims = [0] if x.dim() == 2 else [0, *range(2, x.dim())] if x.dim() > 3 else list(range(x.dim()))
            self.stats = x.mean(dims, keepdim=True), x.std(dims, keepdim=True).clamp_min(1e-6)
        self.learn.xb = ((x - self.stats[0]) / self.stats[1], *self.xb[1:])

class _Zero(Callback):
    "Zero the gradients before every backward pass."
    order = -50
    def before_backward(self):
        for p in self.learn.model.parameters(): p.grad = None

def _init(model, how):
    for m in model.modules():
        if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd)):
            if not m.weight.requires_grad: continue
            if how == 'xavier': nn.init.xavier_normal_(m.weight)
            else:               nn.init.kaiming_normal_(m.weight, nonlinearity='relu')
            if m.bias is not None: nn.init.zeros_(m.bias)
        elif isinstance(m, (nn.RNNBase, nn.RNNCellBase)):
            for n, p in m.named_parameters():
                if p.dim() < 2: nn.init.zeros_(p)
                elif '_hh' in n: [nn.init.orthogonal_(c) for c in p.data.chunk(p.shape[0] // p.shape[1])]
                else: nn.init.xavier_uniform_(p)
                forget = p.dim() < 2 and isinstance(m, (nn.LSTM, nn.LSTMCell)) and 'ih' in n
                if forget: p.data[len(p) // 4:len(p) // 2] = 1.
        elif isinstance(m, nn.Embedding): nn.init.normal_(m.weight, std=.1)
        elif isinstance(m, nn.MultiheadAttention) and m.in_proj_weight is not None:
            nn.init.xavier_uniform_(m.in_proj_weight)

def _swap(model, old, make):
    for m in list(model.modules()):
        for n, c in list(m.named_children()):
            if isinstance(c, old): setattr(m, n, make())

def apply_fix(learn, fix):
    "Change a Learner that has not trained yet as `fix` says; returns the keys that were applied."
    done = []
    for key, v in fix.items():
        if   key == 'lr':                              learn.lr = learn.lr * v
        elif key == 'clip':                            learn.add_cb(GradientClip(v))
        elif key == 'init':                            _init(learn.model, v)
        elif key == 'input' and v == 'normalize':      learn.add_cb(_Standardise())
        elif key == 'remove' and v == 'softmax':
            _swap(learn.model, nn.Softmax, nn.Identity)
            if 'softmax' in learn.model.__dict__: learn.model.softmax = False
        elif key == 'activation' and v == 'relu':      _swap(learn.model, (nn.Sigmoid, nn.Tanh), nn.ReLU)
        elif key == 'activation' and v == 'leaky_relu': _swap(learn.model, nn.ReLU, lambda: nn.LeakyReLU(.1))
        elif key == 'optimizer':
            learn.splitter, learn.opt = (lambda m: [[p for p in m.parameters() if p.requires_grad]]), None
        elif key == 'zero_grad':                       learn.add_cb(_Zero())
        elif key == 'loss_scale':
            if not any(p.dtype == torch.float16 for p in learn.model.parameters()): continue
            learn.model.float()
            full = lambda m, args: tuple(x.float() if x.is_floating_point() else x for x in args)
            learn.model.register_forward_pre_hook(full)
        else: continue
        done.append(key)
    return done

def final_gain(learn, iters=ITERS, seed=0):
    "Train a Learner and give the loss it began and ended with (median of the last 10)."
    stop = _Stop(iters)
    set_seed(seed)
    with learn.no_bar(), learn.no_logging(): learn.fit(-(-iters // len(learn.dls.train)), lr=learn.lr, cbs=stop)
    end = np.median(stop.losses[-10:]) if np.isfinite(stop.losses).all() else np.inf
    return float(np.median(stop.losses[:3])), float(end)

def fresh(learn):
    "A copy of a Learner with parameters made anew, as their modules make them; without the callbacks of ours."
    model = copy.deepcopy(learn.model)
    for m in model.modules():
        if hasattr(m, 'reset_parameters'): m.reset_parameters()
    return Learner(learn.dls, model, loss_func=copy.deepcopy(learn.loss_func), opt_func=learn.opt_func, lr=learn.lr,
                   splitter=learn.splitter, wd=learn.wd, moms=learn.moms)

def verify(
    learn,                        # the Learner that was diagnosed
    report,                       # its Report
    make=None,                    # f() -> a Learner as before training; None: a copy whose modules reset themselves
    iters=ITERS,
):                                # a Report with `trials`
    """Try the first finding's fix: two fresh Learners, with and without it, for `iters` iterations. Advice that
    does not help is withdrawn."""
    make    = make or (lambda: fresh(learn))
    trials, findings = {}, list(report.findings)
    first   = next((i for i, f in enumerate(findings) if f.severity != 'info' and f.fix), None)
    if first is not None:
        f = findings[first]
        set_seed(0); was = final_gain(make(), iters)
        set_seed(0); new = make()
        done = apply_fix(new, f.fix)
        if not done: trials[f.rule] = "this advice cannot be tried automatically"
        else:
            now = final_gain(new, iters)
            helped = now[1] < was[1] if np.isfinite(was[1]) else np.isfinite(now[1])
            trials[f.rule] = (f"{', '.join(done)}: loss after {iters} iterations {num(was[1])} without, {num(now[1])} "
                              f"with it"
                              + ('' if helped else "; it did not help, so it is withdrawn"))
            if not helped: findings[first] = f._replace(advice='', fix={})
    verdict = report.verdict if first is None or findings[first].advice else report.verdict.split(' First try:')[0]
    return Report(verdict, findings, report.checked, report.skipped, report.layers, trials)
