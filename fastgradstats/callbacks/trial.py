"""Trying advice out: a finding's `fix` applied to a fresh Learner, trained beside one without it."""
from __future__ import annotations

import copy

import numpy as np
import torch
from fastai.callback.core import Callback, CancelFitException, TrainEvalCallback
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner, Recorder
from fastai.torch_core import no_random

from .._text import join, num
from ..diagnosis.report import Report
from .apply_fix import apply_fix

ITERS = 50                        # iterations that both train
HELPS = .02                       # advice that lowers the loss by less than this share is withdrawn
CLOSE = .2                        # a norm this close to the recorded one is as it was drawn; likewise a loss
OWN   = (TrainEvalCallback, Recorder, ProgressCallback)      # callbacks that every Learner has


class _Stop(Callback):
    order = 90
    def __init__(self, n): self.n, self.losses = n, []
    def after_batch(self):
        if not self.training: return
        self.losses.append(float(self.learn.loss.detach()))
        if self.learn.train_iter >= self.n or not np.isfinite(self.losses[-1]): raise CancelFitException

class _Replay(Callback):
    """The rates that a Learner was trained with, whatever was given to `fit`: the learning rate and momentum recorded
    at every iteration, the ratios of its groups, their weight decay. A fix that changes `learn.lr` scales them."""
    order = 70
    def __init__(self, learn, base):
        it, self.base = learn.layer_stats.iters, _highest(base)
        self.rates, self.moms = it.lr.ffill().to_numpy(), it.mom.ffill().to_numpy()
        self.was = [dict(h) for h in learn.opt.hypers] if learn.opt else []
    def before_batch(self):
        if not self.training: return
        i      = min(self.learn.train_iter, len(self.rates) - 1)
        lr     = self.rates[i] * _highest(self.learn.lr) / self.base
        groups = self.was if len(self.was) == len(self.opt.hypers) else [{}] * len(self.opt.hypers)
        last   = groups[-1].get('lr')
        for h, g in zip(self.opt.hypers, groups):
            if np.isfinite(lr): h['lr'] = float(lr) * (g['lr'] / last if last else 1.)
            if 'mom' in h and np.isfinite(self.moms[i]): h['mom'] = float(self.moms[i])
            if 'wd' in h and 'wd' in g: h['wd'] = g['wd']

def _highest(lr): return lr.stop if isinstance(lr, slice) else lr

def final_gain(learn, iters=ITERS, seed=0, replay=None):
    "Train a Learner; the loss it began and ended with (median of the last 10). Random numbers stay as they are."
    stop = _Stop(iters)
    with no_random(seed), learn.no_bar(), learn.no_logging():
        learn.fit(-(-iters // len(learn.dls.train)), lr=learn.lr, cbs=[stop, *([replay] if replay else [])])
    end = np.median(stop.losses[-10:]) if np.isfinite(stop.losses).all() else np.inf
    return float(np.median(stop.losses[:3])), float(end)

def fresh(learn, rec=None):
    """A copy of a Learner as it was before training, as far as that is known: (Learner, how it begins). Callbacks never
    keep the first weights. Parameters are drawn anew by their modules, then scaled to the norms that `rec` has of them
    before the first step, so that an initialisation of one's own keeps its scale. What cannot be had so is named:
    vectors of another norm (a bias of -10 has a sign that a norm has not), modules that cannot draw anew, weights that
    came from elsewhere. The Learner's callbacks are copied, but for ours."""
    model = copy.deepcopy(learn.model)
    for m in model.modules():
        if hasattr(m, 'reset_parameters'): m.reset_parameters()
    how   = _scale(learn, model, rec)
    cbs   = [copy.deepcopy(cb) for cb in learn.cbs if not isinstance(cb, OWN) and not hasattr(cb, 'layer_plan')]
    new   = Learner(learn.dls, model, loss_func=copy.deepcopy(learn.loss_func), opt_func=learn.opt_func, lr=learn.lr,
                    splitter=learn.splitter, wd=learn.wd, moms=learn.moms, cbs=cbs)
    return new, how

@torch.no_grad()
def _scale(learn, model, rec):
    "Give every parameter the norm that was recorded before the first step; say what that makes of them."
    drawn = {f'{n}.{k}'.lstrip('.') for n, m in model.named_modules() if hasattr(m, 'reset_parameters')
             for k, _ in m.named_parameters()}
    if rec is None or ('weight', 'norm') not in rec or not len(rec) or not rec.iters.measured.iloc[0]:
        return "weights drawn anew by their modules; those of the run's start were not recorded"
    was   = dict(zip(rec.layers['weight'].layer, rec['weight', 'norm'][0].astype(float)))
    other = []
    for n, p in model.named_parameters():
        norm, now = was.get(n, np.nan), float(p.norm())
        if n not in drawn: other.append(n); continue                          # trained, and nobody can draw it anew
        if not np.isfinite(norm) or abs(norm - now) <= CLOSE * now: continue
        if p.dim() > 1 and now > 0: p.mul_(norm / now)
        else: other.append(n)
    told = "weights drawn anew by their modules and scaled to the norms recorded at the start"
    return told + (f"; not as they were: {', '.join(other[:3])}{' and others' * (len(other) > 3)}" if other else '')


def verify(
    learn,                        # the Learner that was diagnosed
    report,                       # its Report
    make=None,                    # f() -> a Learner as before training; None: a copy, see `fresh`
    iters=ITERS,
):                                # a Report with `trials`
    """Try the first finding's fix: two Learners, with and without it, for `iters` iterations (fewer where fewer were
    recorded) at the rates that were recorded. Advice that does not lower the loss by HELPS is withdrawn, but not where
    the one without it shows no fault: then the trial says nothing. What was applied, and how both began, is told."""
    first = next((f for f in report.findings if f.severity != 'info' and f.fix), None)
    if first is None: return _with(report, {})
    loss  = learn.layer_stats.iters.loss.to_numpy()[:iters]
    if first.iters[0] >= iters:
        return _with(report, {first.rule: f"not tried: it begins at iteration {first.iters[0]}, a trial has {iters}"})
    told, helped = _try(learn, first, make, len(loss), np.median(loss[-10:]) if np.isfinite(loss).all() else np.inf)
    return _with(report, {first.rule: told}, None if helped else first)

def _try(learn, f, make, n, recorded):
    "(What a trial showed, whether the advice stands)."
    def begin():
        with no_random(0): return (make(), "both as `make` gives them") if make else fresh(learn, learn.layer_stats)
    old, how = begin()
    new, _   = begin()
    rates    = [_Replay(learn, x.lr) for x in (old, new)]
    done = apply_fix(new, f.fix)
    if not done: return "this advice cannot be tried automatically", True
    was  = final_gain(old, n, replay=rates[0])[1]
    try: now = final_gain(new, n, replay=rates[1])[1]
    except Exception as e: return f"it does not run with {', '.join(done)}: {type(e).__name__}: {e}", True
    left = [k for k in f.fix if k not in done]
    left = f" (not {join(left)}, which cannot be tried)" if left else ''
    told = (f"{', '.join(done)}{left}: loss after {n} iterations {num(was)} without, {num(now)} with it "
            f"({num(recorded)} in the run); {how}")
    if was < recorded - CLOSE * abs(recorded):
        return f"{told}; the fault did not come back without it, so this says nothing about the advice", True
    if now < was - HELPS * abs(was) if np.isfinite(was) else np.isfinite(now): return f"{told}; it helped", True
    return f"{told}; it did not help, so it is withdrawn", False

def _with(report, trials, withdrawn=None):
    "A report with its trials, and without the advice that did not help."
    findings = [f._replace(advice='', first='', fix={}) if f is withdrawn else f for f in report.findings]
    return Report(report.story, findings, report.checked, report.skipped, report.layers, trials)
