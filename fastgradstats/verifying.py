"""Trying advice out: a finding's `fix` applied to a fresh Learner, trained beside one without it."""
from __future__ import annotations

import copy

import numpy as np
from fastai.callback.core import Callback, CancelFitException
from fastai.learner import Learner
from fastai.torch_core import set_seed

from .answering import num
from .diagnosing import Report
from .mending import apply_fix

ITERS = 50                        # iterations that both train


class _Stop(Callback):
    order = 90
    def __init__(self, n): self.n, self.losses = n, []
    def after_batch(self):
        if not self.training: return
        self.losses.append(float(self.learn.loss.detach()))
        if self.learn.train_iter >= self.n or not np.isfinite(self.losses[-1]): raise CancelFitException

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
