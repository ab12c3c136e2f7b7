"""The fastai callbacks: a thin coat over `watching.Watcher`.

One callback has one order, but two gradients are wanted: at order 10.5 `before_step` reads the true gradient, between
MixedPrecision (10), which has unscaled it, and GradientClip (11). What the optimizer consumes, and the weights before
and after, are read around `Learner._step`, after every `before_step` of any order.
"""
from __future__ import annotations

import inspect
import math
import time
import weakref
from collections.abc import Callable, Sequence
from types import EllipsisType
from typing import Any

import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.callback.training import GradientClip
from fastai.learner import Learner
from fastai.torch_core import find_bs

from ..measure.baseline_loss import BaselineLoss
from ..diagnosis.report import diagnose
from ..plots import plot_color_dim, plot_dead_chart, plot_grad_flow, plot_heat, plot_lines, plot_overview
from ..record.bins import linear_bins
from ..record.select import pick_layers
from ..record.summary import facts
from ..diagnosis.rules import ALL
from ..measure.plan import DEFAULTS, Plan, check_names, switch
from ..measure.watcher import Watcher


class _Life:
    """What was recorded of one Learner, over all its fits and callbacks. Not kept on the Learner: it would be exported
    with it."""
    def __init__(self):
        self.iter, self.fit, self.fit_start = 0, -1, 0
        self.watchers = []                                # in order of appearance
        self.of       = weakref.WeakKeyDictionary()       # callback -> its Watcher
        self.cache    = None
    def new_fit(self):
        "The number of the fit that begins; the first callback to ask counts it."
        if self.fit < 0 or self.iter > self.fit_start: self.fit, self.fit_start = self.fit + 1, self.iter
        return self.fit
    def record(self):
        recs = [w.record() for w in self.watchers if (w.log.rows or w.row is not None) and not w.log.elsewhere]
        if not recs: return None
        if self.cache and len(self.cache[0]) == len(recs) and all(a is b for a, b in zip(self.cache[0], recs)):
            return self.cache[1]
        rec = recs[0].join(*recs[1:]) if len(recs) > 1 else recs[0]
        self.cache = recs, rec
        return rec

_LIVES = weakref.WeakKeyDictionary()                      # Learner -> _Life

def _ours(learn): return [cb for cb in learn.cbs if isinstance(cb, LayerStatsCallback)]

def _layer_stats(self):
    "What the callbacks of fastgradstats recorded of this Learner, in all its fits; None if nothing."
    if self not in _LIVES: return None
    return _LIVES[self].record()

def _around(name):
    "Wrap a method of Learner once; nothing is set on an instance, so nothing is left behind or exported."
    old = getattr(Learner, name)
    if getattr(old, 'fastgradstats', False): return
    def _do_fit(self):
        for cb in _ours(self): cb._fit_begins(self)
        try: return old(self)
        finally:
            for cb in _ours(self): cb._fit_ends()             # also after Ctrl-C, an exception, a cancel
    def _step(self):
        live = [cb.__dict__['_live'].watcher for cb in _ours(self) if cb.__dict__['_live'].watcher]
        if live:
            sure = not any(cb.order > LayerStatsCallback.order and hasattr(type(cb), 'before_step')
                           and type(cb) is not GradientClip for cb in self.cbs)
        for w in live:
            w.rates(*_rates(self.opt))
            w.before_update(sure)
        out = old(self)
        for w in live: w.after_update()
        return out
    def _do_epoch_train(self):
        try: return old(self)
        finally:
            for cb in _ours(self): cb._leave(keep=True)   # also after Ctrl-C, an exception, a cancel
    new = dict(_do_fit=_do_fit, _step=_step, _do_epoch_train=_do_epoch_train)[name]
    new.fastgradstats, new.__doc__ = True, old.__doc__
    setattr(Learner, name, new)

def _rates(opt):
    "The learning rate of every parameter group, and the last one's momentum."
    hypers = opt.hypers
    return [h['lr'] for h in hypers], hypers[-1].get('mom', math.nan)

_around('_do_fit')
_around('_step')
_around('_do_epoch_train')
Learner.layer_stats = property(_layer_stats)

def _diagnose(self, rules=ALL, *, verify=False):
    """The Report of this Learner's record; `verify`: try the advice on a copy, for 50 iterations, and show before and
    after."""
    report = diagnose(self.layer_stats, rules)
    if not verify: return report
    from .trial import verify as try_out
    return try_out(self, report)
Learner.diagnose = _diagnose

def _tell(learn):
    "Print the facts of the record and the verdict."
    rec = learn.layer_stats
    print(facts(rec), diagnose(rec).verdict, sep='\n')


class _Live:
    "The part of a callback that is neither copied nor pickled."
    def __init__(self):
        self.watcher  = None                              # attached now, or None
        self.last     = None                              # the last one attached
        self.fitting  = False                             # within Learner.fit
        self.cut      = False                             # the epoch's training was cancelled
        self.nested   = False                             # within a validation, get_preds, summary within the fit
        self.new      = False                             # a fit has begun and has not trained yet
        self.i        = 0
        self.life     = None
        self.start    = 0.
        self.paused   = None
        self.constant = None
        self.fit      = self.epoch = 0


def _arguments(cls):
    "The names of the arguments of a callback, those of the classes it is made of too."
    inits = [inspect.signature(c.__init__) for c in cls.__mro__
             if '__init__' in vars(c) and issubclass(c, LayerStatsCallback)]
    return list(dict.fromkeys(n for s in inits for n, p in s.parameters.items()
                              if n != 'self' and p.kind is not p.VAR_KEYWORD))


Stats = str | Callable | Sequence | None | EllipsisType       # names, Statistics or functions; None: off; ...: default

class LayerStatsCallback(Callback):
    """Record every layer's gradients, activations, weights, updates and dead units while the Learner trains.

    Raises:
        TypeError: an argument that there is not, or of another type; the nearest is named.
        ValueError: a statistic that there is not, one given twice, or a setting out of its range; when a fit begins,
            two callbacks of one class on one Learner.

    Example:
        learn.fit(1, cbs=LayerStatsCallback(grad=['norm'], grad_output=['norm'], every=10))
        learn.layer_stats['grad', 'norm']
    """
    order, run_valid = 10.5, False
    _stateattrs      = ('_live',)
    _default_probes  = DEFAULTS

    def __init__(self,
        grad:        Stats = ...,   # statistics of parameters' gradients: names, Statistics, functions; None: off
        activation:  Stats = ...,   # of modules' outputs
        grad_output: Stats = ...,   # of the gradients with respect to modules' outputs (default off)
        grad_used:   Stats = ...,   # of the gradients as the optimizer consumes them (default off)
        weight:      Stats = ...,   # of the parameters before the step
        update:      Stats = ...,   # of what the step changed; keeps one copy of the trainable parameters
        input:       Stats = ...,   # of the model's input
        output:      Stats = ...,   # of the model's output
        *,
        modules:  Any = None,           # where activation and grad_output are read: a glob on layer names, module
                                        # class(es), a list of modules, or f(name, module) -> bool; by default at the
                                        # nonlinearities
        every:    int | Callable = 1,   # measure every n-th row, or where f(iteration) is true
        sample:   int | None = 65536,   # larger tensors are sampled for shares, medians and histograms; None: all
        window:   int | None = None,    # rows a window of the life table has; None: an epoch, at least 20
        per_call: bool = False,         # keep the calls of one module apart: on an RNNCell the call is the time step
        unit_dim: int | None = None,    # the axis of the units, where the layer before does not tell
        placebo:  bool | int = False,   # measure rec['grad', 'placebo'] every 25th measured row, or every so many
        verbose:  bool = True,          # print what was found when a fit ends
        **unknown: Any,                 # there are no others: names the one that was meant
    ):
        super().__init__()
        check_names(type(self).__name__, unknown, _arguments(type(self)))
        given  = dict(grad=grad, activation=activation, grad_output=grad_output, grad_used=grad_used, weight=weight,
                      update=update, input=input, output=output)
        probes = {p: self._default_probes.get(p) if v is ... else v for p, v in given.items()}
        self.layer_plan    = Plan(modules=modules, every=every, sample=sample, window=window, per_call=per_call,
                                  unit_dim=unit_dim, placebo=placebo, **probes)
        self.layer_verbose = switch('verbose', verbose) and type(self) is LayerStatsCallback
        self._live         = _Live()

    def _init_state(self):
        super()._init_state()
        self._live = _Live()

    def __setattr__(self, name, value):
        if name == 'learn' and value is None: self._leave()           # remove_cb, also after an exception in fit(cbs=)
        super().__setattr__(name, value)

    @property
    def name(self):
        n = super().name
        return 'layer_stats_callback' if n == 'layer_stats' else n    # learn.layer_stats is the record

    @property
    def record(self):
        "What this callback recorded of its learner."
        if self.learn is None: raise ValueError(f"{type(self).__name__} is not attached to a Learner: read "
                                                    f"learn.layer_stats, which outlives it")
        life = _LIVES.get(self.learn)
        w    = life and life.of.get(self)
        if w is not None and w.log.elsewhere:
            raise ValueError('the record is kept by process 0; this is another process')
        if w is None or not w.log.rows and w.row is None:
            raise ValueError(f"{type(self).__name__} has recorded nothing yet: call learn.fit first")
        return w.record()

    # --- the loop ----------------------------------------------------------------------------------------------------
    def before_fit(self):
        if self._live.fitting: self._live.nested = True               # a validation or get_preds inside the fit
        same = [cb for cb in self.learn.cbs if type(cb) is type(self)]
        if len(same) > 1: raise ValueError(f"{len(same)} {type(self).__name__} on one Learner: give the statistics to "
                                           f"one of them and remove the others with learn.remove_cb")

    def _fit_begins(self, learn):
        if self.learn is not learn: self.learn = learn                # it has been given to another learner meanwhile
        self._leave()
        self._live.fitting, self._live.nested, self._live.new = True, False, True

    def _fit_ends(self):
        live = self._live
        self._leave()
        if live.last is not None: live.last.end_fit()
        live.fitting = live.nested = False

    def before_train(self):
        live = self._live
        if hasattr(self.learn, 'lr_finder'): return                   # a search for a learning rate is not training
        life = _LIVES.setdefault(self.learn, _Life())
        w    = life.of.get(self)
        if w is None:
            w = life.of[self] = Watcher(self.layer_plan)
            w.log.meta['grad_is'] = 'the true gradient: unscaled, before clipping'
            life.watchers.append(w)
        if live.new or live.constant is None:
            w.end_fit()
            live.fit, live.new, live.start = life.new_fit(), False, time.perf_counter()
            live.constant = BaselineLoss(w.log)
        live.i, live.life, live.cut = life.iter, life, False
        w.attach(self.learn.model, self.learn.opt)
        live.watcher = live.last = w

    # `self.learn.x`, not `self.x`: what the callback lacks is looked for in the learner and then in the model
    def before_batch(self):
        live = self._live
        w    = live.watcher
        if w is None: return
        learn = self.learn
        w.begin(live.i, bs=find_bs(learn.yb if len(learn.yb) else learn.xb) or 0, fit=live.fit, epoch=live.epoch,
                left=learn.n_iter - learn.iter, t=time.perf_counter() - live.start)
        live.i += 1
        live.life.iter = live.i
        w.capture_end('input', learn.xb[0] if len(learn.xb) == 1 else learn.xb)

    def after_pred(self):
        w = self._live.watcher
        if w is None: return
        w.capture_end('output', self.learn.pred)
        w.end_forward()

    def after_loss(self):
        live, learn = self._live, self.learn
        if live.watcher is None or not len(learn.yb): return
        live.watcher.loss(learn.loss, lambda: live.constant(learn.loss_func, learn.pred, learn.yb))
        if live.watcher.dose: live.watcher.placebo(learn.model, learn.pred, learn.loss_grad)

    def before_backward(self):
        w = self._live.watcher
        if w is None: return
        scaler = self.learn.__dict__.get('scaler')
        w.rates(*_rates(self.learn.opt))                              # the schedulers have set them in before_batch
        w.backward_begins(scaler._scale if scaler is not None and scaler.is_enabled() else None)

    def after_backward(self):
        if self._live.watcher: self._live.watcher.backward_done()
    def before_step(self):
        if self._live.watcher: self._live.watcher.grads()
    def after_cancel_step(self):
        if self._live.watcher: self._live.watcher.skipped()

    def before_validate(self):
        if self._live.watcher: self._live.paused = self._live.watcher.suspend()
    def after_validate(self):
        if self._live.watcher and self._live.paused is not None: self._live.watcher.resume(self._live.paused)
        self._live.paused = None

    def after_cancel_train(self): self._live.cut = True

    def after_train(self):
        w = self._live.watcher
        if w is None: return
        w.end_epoch(normal=not self._live.cut, last=self._live.epoch == self.learn.n_epoch - 1)
        self._leave(keep=True)

    def before_epoch(self):
        live = self._live
        if live.fitting and not live.nested: live.epoch = self.learn.epoch         # a nested validation sets it to 0

    def after_epoch(self):
        live = self._live
        if live.fitting and not live.nested and not live.new and live.constant is not None: self._take_epoch()

    def after_fit(self):
        live = self._live
        if live.fitting: live.nested = False; return                  # of a validation inside the fit
        if live.new or live.constant is None: return                 # nothing was trained: validate, get_preds, summary
        live.constant = None
        if self.layer_verbose and live.last.log.rows and not live.last.log.elsewhere: _tell(self.learn)

    def _leave(self, keep=False):
        "Take the hooks off, `keep`: until the next epoch; what was recorded stays."
        live = self.__dict__.get('_live')
        w    = live and (live.watcher or live.last)
        if w: w.detach(keep)
        if live: live.watcher = None

    def _take_epoch(self):
        "Take the losses and metrics of the epoch that ends from fastai's Recorder, which has not logged them yet."
        live = self._live
        rec  = getattr(self.learn, 'recorder', None)
        log  = rec.__dict__.get('log') if rec is not None else None
        if not log: return
        names = [n for n in rec.metric_names[1:] if n != 'time']
        vals  = list(log[1:])[-len(names):]                       # a validation inside the epoch has added to its front
        if vals: live.last.log.epochs.append(dict(fit=live.fit, epoch=live.epoch,
                                                  **{n: _number(v) for n, v in zip(names, vals)}))

    # --- pictures of what was recorded -------------------------------------------------------------------------------
    def plot(self, **kwargs):
        "Every layer over every iteration."
        return plot_overview(self.record, **kwargs)


class GradStatsCallback(LayerStatsCallback):
    """Record the gradients of every parameter, and how large the step is.

    Example:
        learn.add_cb(GradStatsCallback())
        learn.fit(1)
        learn.grad_stats.plot('median')
    """
    _default_probes = {p: DEFAULTS[p] for p in ('grad', 'weight', 'update')}
    def plot(self, stat='norm', **kwargs):
        "A statistic of the parameters' gradients over the iterations, a line a layer."
        return plot_lines(self.record, ('grad', stat), **kwargs)
    def plot_flow(self, **kwargs):
        "The gradients' norm from the first layer to the last, early and late in training."
        return plot_grad_flow(self.record, **kwargs)


class ActivationHistCallback(LayerStatsCallback):
    """Record histograms and moments of every activation; answers fastbook's calls to `learn.activation_stats`.

    Example:
        learn.add_cb(ActivationHistCallback())
        learn.fit(1)
        learn.activation_hist.color_dim(-2)
    """
    _default_probes = {'activation': [s for s in DEFAULTS['activation'] if s not in ('frac_dead', 'frac_dormant')]}

    def _column(self, idx):
        return pick_layers(self.record, 'activation', idx)[0]
    def layer_stats(self, idx):
        "Mean, std and share near zero of activation `idx` over the measured iterations.  # three (iter,)"
        k = self._column(idx)
        return [v[~np.isnan(v)]
                for v in (self.record['activation', s][:, k] for s in ('mean', 'std', 'frac_near_zero'))]
    def hist(self, idx, bins=40, low=0., high=10.):
        """log1p counts of activation `idx` in equal bins, in time, as fastai's ActivationStats gives them.  # (bin,
        window)"""
        rec    = self.record
        counts = np.nan_to_num(rec['activation', 'hist'][:, self._column(idx)])
        return torch.from_numpy(np.log1p(linear_bins(counts, rec.bins.edges, low, high, bins)[0]).T.astype(np.float32))
    def plot_layer_stats(self, idx):
        "Mean, std and share near zero of activation `idx`, side by side."
        import matplotlib.pyplot as plt
        name   = self.record.layers['activation'].layer[self._column(idx)]
        _, axs = plt.subplots(1, 3, figsize=(12, 3), layout='constrained')
        for ax, stat in zip(axs, ('mean', 'std', 'frac_near_zero')):
            plot_lines(self.record, ('activation', stat), layers=[name], ax=ax)
        return axs
    def color_dim(self, idx=-1, **kwargs):
        "The colorful dimension: the histogram of activation `idx` in time."
        return plot_color_dim(self.record, idx, **kwargs)
    def dead_chart(self, **kwargs):
        "The share of each activation that is near zero in time (dead units are DeadUnitCallback's)."
        return plot_heat(self.record, ('activation', 'frac_near_zero'), **kwargs)
    def plot(self, idx=-1, **kwargs): return self.color_dim(idx, **kwargs)


class DeadUnitCallback(LayerStatsCallback):
    """Record which units are dead: those whose output did not vary at all over a window.

    Example:
        learn.fit(1, cbs=DeadUnitCallback(window=20))
        learn.layer_stats.units
    """
    _default_probes = {'activation': ['frac_dead', 'frac_dormant']}
    def plot(self, **kwargs):
        "The share of dead units of every activation over the windows."
        return plot_dead_chart(self.record, **kwargs)


def _number(v):
    try: return float(v)
    except (TypeError, ValueError): return math.nan
