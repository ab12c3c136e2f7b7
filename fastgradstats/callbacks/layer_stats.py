"""The fastai callbacks: a thin coat over `measure.watcher.Watcher`.

One callback has one order, but two gradients are wanted: at order 10.5 `before_step` reads the true gradient, between
MixedPrecision (10), which has unscaled it, and GradientClip (11). What the optimizer consumes, and the weights before
and after, are read around `Learner._step`, after every `before_step` of any order.
"""
from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Sequence
from types import EllipsisType
from typing import Any

from fastai.callback.core import Callback

from ..diagnosis.report import diagnose
from ..measure.baseline_loss import BaselineLoss
from ..measure.plan import DEFAULTS, Plan, check_names, switch
from ..measure.probes import batch_size
from ..measure.watcher import Watcher
from ..plots import plot_overview
from ..record.summary import facts
from . import learner_patches
from .learner_patches import LIVES, Life, rates

learner_patches.do()


def _tell(learn):
    "Print the facts of the record and the verdict."
    rec = learn.layer_stats
    print(facts(rec), diagnose(rec).verdict, sep='\n')


OF_A_FIT = 'watcher', 'fit', 'epoch', 'start', 'baseline', 'new', 'cut', 'paused'

class _Live:
    "The part of a callback that is neither copied nor pickled."
    def __init__(self):
        self.watcher  = None                              # attached now, or None
        self.last     = None                              # the last one attached
        self.fitting  = False                             # within Learner.fit
        self.cut      = False                             # the epoch's training was cancelled
        self.nested   = False                             # within a validation, get_preds, summary within the fit
        self.mixed    = ''                                # which of these, or 'a fit', has reset fastai's counts
        self.new      = False                             # a fit has begun and has not trained yet
        self.i        = 0
        self.life     = None
        self.start    = 0.
        self.paused   = None
        self.baseline = None
        self.fit      = self.epoch = 0
        self.validated = 0                                # validations since the epoch's training
        self.outer    = []                                # of the fits within which this one runs


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
        budget:   float | None = None,  # measure only as many rows as take this share of the training time, such as .05
        verbose:  bool = True,          # print what was found when a fit ends
        **unknown: Any,                 # there are no others: names the one that was meant
    ):
        super().__init__()
        check_names(type(self).__name__, unknown, _arguments(type(self)))
        given  = dict(grad=grad, activation=activation, grad_output=grad_output, grad_used=grad_used, weight=weight,
                      update=update, input=input, output=output)
        probes = {p: self._default_probes.get(p) if v is ... else v for p, v in given.items()}
        self.layer_plan    = Plan(modules=modules, every=every, sample=sample, window=window, per_call=per_call,
                                  unit_dim=unit_dim, placebo=placebo, budget=budget, **probes)
        self.layer_verbose = switch('verbose', verbose) and type(self) is LayerStatsCallback
        self._live         = _Live()

    def _init_state(self):
        super()._init_state()
        self._live = _Live()

    def __call__(self, event_name):
        w = self._live.watcher
        return super().__call__(event_name) if w is None else w.clock.run(super().__call__, event_name)

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
        life = LIVES.get(self.learn)
        w    = life and life.of.get(self)
        if w is not None and w.builder.elsewhere:
            raise ValueError('the record is kept by process 0; this is another process')
        if w is None or not w.builder.rows and w.row is None:
            raise ValueError(f"{type(self).__name__} has recorded nothing yet: call learn.fit first")
        return w.record()

    # --- the loop ----------------------------------------------------------------------------------------------------
    def before_fit(self):
        live = self._live
        if live.fitting: live.nested, live.mixed = True, live.mixed or 'a validation'         # or get_preds, summary
        same = [cb for cb in self.learn.cbs if type(cb) is type(self)]
        if len(same) > 1: raise ValueError(f"{len(same)} {type(self).__name__} on one Learner: give the statistics to "
                                           f"one of them and remove the others with learn.remove_cb")

    def _fit_begins(self, learn):
        if self.learn is not learn: self.learn = learn                # it has been given to another learner meanwhile
        live = self._live
        if live.fitting: live.outer.append({n: vars(live)[n] for n in OF_A_FIT})        # a fit within a fit
        self._leave()
        live.fitting, live.nested, live.mixed, live.new, live.epoch = True, False, '', True, 0

    def _fit_ends(self):
        live = self._live
        self._leave()
        if live.last is not None: live.last.end_fit()
        live.fitting = live.nested = False
        if not live.outer: return
        vars(live).update(live.outer.pop(), fitting=True, mixed='a fit', i=live.life.iter if live.life else live.i)
        if live.watcher: live.watcher.attach(self.learn.model, self.learn.opt)

    def before_train(self):
        live = self._live
        if hasattr(self.learn, 'lr_finder'): return                   # a search for a learning rate is not training
        life = LIVES.setdefault(self.learn, Life())
        w    = life.of.get(self)
        if w is None:
            w = life.of[self] = Watcher(self.layer_plan)
            w.builder.meta['grad_is'] = 'the true gradient: unscaled, before clipping'
            life.watchers.append(w)
        if live.new or live.baseline is None:
            w.end_fit()
            live.fit, live.new, live.start = life.new_fit(), False, time.perf_counter()
            live.baseline = BaselineLoss(w)
            w.builder.meta['planned'] = life.iter + self.learn.n_epoch * len(self.learn.dls.train)
        live.i, live.life, live.cut = life.iter, life, False
        w.attach(self.learn.model, self.learn.opt)
        live.watcher = live.last = w

    # `self.learn.x`, not `self.x`: what the callback lacks is looked for in the learner and then in the model
    def before_batch(self):
        live = self._live
        w    = live.watcher
        if w is None: return
        learn = self.learn
        if learn.model is not w.outer: w.attach(learn.model, learn.opt)                 # it has been replaced
        if live.mixed != 'a fit': live.mixed = ''         # the Recorder's losses go on
        w.begin(live.i, bs=batch_size(*learn.yb or learn.xb), fit=live.fit, epoch=live.epoch,
                left=learn.n_iter - learn.iter, t=time.perf_counter() - live.start)
        live.i += 1
        live.life.iter = live.i
        w.capture_end('input', learn.xb[0] if len(learn.xb) == 1 else learn.xb)

    def after_pred(self):
        w = self._live.watcher
        if w is None: return
        w.capture_end('output', self.learn.pred)
        w.end_forward(self.learn.pred)

    def after_loss(self):
        live, learn = self._live, self.learn
        if live.watcher is None or not len(learn.yb): return
        live.watcher.loss(learn.loss, lambda: live.baseline.both(learn.loss_func, learn.pred, learn.yb))
        if live.watcher.dose: live.watcher.placebo(learn.model, learn.pred, learn.loss_grad)

    def before_backward(self):
        w = self._live.watcher
        if w is None: return
        scaler = self.learn.__dict__.get('scaler')
        w.rates(*rates(self.learn.opt))                              # the schedulers have set them in before_batch
        w.begin_backward(scaler._scale if scaler is not None and scaler.is_enabled() else None)

    def after_backward(self):
        if self._live.watcher: self._live.watcher.end_backward()
    def before_step(self):
        if self._live.watcher: self._live.watcher.grads()
    def after_cancel_step(self):
        if self._live.watcher: self._live.watcher.skipped()

    def before_validate(self):
        if self._live.watcher: self._live.paused = self._live.watcher.suspend()
    def after_validate(self):
        self._live.validated += not self._live.nested
        if self._live.watcher and self._live.paused is not None: self._live.watcher.resume(self._live.paused)
        self._live.paused = None

    def after_cancel_train(self): self._live.cut = True

    def after_train(self):
        w = self._live.watcher
        if w is None: return
        self._live.validated = 0
        w.end_epoch(normal=not self._live.cut, last=self._live.epoch == self.learn.n_epoch - 1)
        self._leave(keep=True)

    def before_epoch(self):
        live = self._live
        if not live.fitting or live.nested: return
        if not live.mixed: live.epoch = self.learn.epoch
        live.mixed = ''

    def after_epoch(self):
        live = self._live
        if not live.fitting or live.nested: return
        if not live.new and live.baseline is not None: self._take_epoch()
        live.epoch += 1

    def after_fit(self):
        live = self._live
        if live.fitting: live.nested = False; return                  # of a validation inside the fit
        if live.new or live.baseline is None: return                 # nothing was trained: validate, get_preds, summary
        live.baseline = None
        if self.layer_verbose and live.last.builder.rows and not live.last.builder.elsewhere: _tell(self.learn)

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
        vals  = list(log[1:])[-len(names):]                # a validation inside the training has added to its front
        if live.mixed or live.validated > 1:
            live.last.builder.ignore('losses and metrics of some epochs',
                                     f"{live.mixed or 'get_preds'} ran within, which has reset fastai's own")
            vals = [math.nan] * len(names)
        if vals: live.last.builder.epochs.append(dict(
            fit=live.fit, epoch=live.epoch, **dict(zip(names[-len(vals):] if live.cut else names, map(_number, vals)))))

    # --- pictures of what was recorded -------------------------------------------------------------------------------
    def plot(self, **kwargs):
        "Every layer over every iteration."
        return plot_overview(self.record, **kwargs)


def _number(v):
    try: return float(v)
    except (TypeError, ValueError): return math.nan
