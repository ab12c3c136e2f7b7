"""Watching a model train: hooks, rows, windows. No framework: fastai's callbacks and the plain-loop `watch` drive it.

A host calls, for each training batch: `begin` (opens a row, or the next micro-batch of the open row), `end_forward`,
`loss`, `backward_begins`, `backward_done`, then for an optimizer step `grads` (the true gradient), `before_update` (the
consumed one, the weights) and `after_update`; or `skipped`; nothing where it only accumulates. Rows are committed when
the next one begins, so that nothing that happens after the step can lose one. Hooks do nothing between batches.
"""
from __future__ import annotations

import math
import time
import weakref
from functools import wraps
from numbers import Real
from typing import Any

import torch

from .record_builder import MIN_WINDOW, Part, RecordBuilder, Row
from .module_hooks import BACKWARD, FORWARD, OFF, Hooks, timed
from .placebo import Placebo
from .plan import DEFAULTS, SETTINGS, Plan, check_names
from .readers import Reference
from .probes import PROBES, tensors, unwrap
from .parameter_reader import Steps


class Watcher(Hooks, Steps):
    "Records one model: attach, drive it batch by batch, detach, read `record()`; attach again for the next epoch."
    def __init__(self, plan, *, host=None):
        self.plan, self.host = plan, host
        self.mode     = OFF
        self.row      = self.part = None
        self.touched  = set()                     # parameters that received a gradient in this micro-batch
        self.window   = set()                     # and in this row
        self.log      = RecordBuilder(plan)
        self.handles, self.param_handles = [], []
        self.kept_on = None                       # a compiled model (weakly) that keeps its hooks from epoch to epoch
        self.model, self.opt = None, None
        self.all, self.params, self.flags = [], [], []   # (number, parameter): all, those trained; all requires_grad
        self.fired, self.targets = set(), []
        self.spare, self.lazy    = None, False    # sites read until the first ones are known; parameters to come
        # sites: without a graph in this forward pass (a reentrant checkpoint), not told apart when run again, whose
        # gradient was asked for, for which it came
        self.blind, self.doubtful, self.asked, self.answered = set(), set(), set(), set()
        self.spent = self.of = 0.
        self.timing = False
        self._since = None
        self.reader = Reference()                 # that of the model, once there is one
        self.dose   = Placebo(plan.placebo) if plan.placebo else None

    # --- one batch ---------------------------------------------------------------------------------------------------

    @timed
    def begin(self, i, *, bs=0, fit=0, epoch=0, left=None, t=math.nan):
        """A training batch begins: number `i` over the model's life. `left`: batches left in the epoch, with this one.
        Returns whether it is measured."""
        if self.part is not None and self.touched: self.backward_done()   # cancelled after its backward pass
        self.part = None
        if self.row is not None and (self.row.done or not self.row.parts): self.commit()
        if self.row is not None and all(p.grad is None for p in self.window): self.skipped(); self.commit()
        if self.row is None:
            self.row = Row(self.plan.due(self.log.rows, i), None)
            self.window.clear()
        elif self.row.read: self.row.forget()                     # the step was put off after its gradients were read
        self.touched.clear()
        self.row.about = fit, epoch, t
        self.part      = Part(bs, i)
        self.scale     = None
        self.last_mark, self.calls = ('', -1), {}
        self.blind.clear(); self.doubtful.clear()
        if self.spare: self.spare.part = Part(bs, i)
        every          = self.plan.every if isinstance(self.plan.every, int) else 1
        rows           = self.log.now_rows + 1
        self.dormancy  = (rows == self.plan.window if self.plan.window else
                          left is not None and left <= every and rows >= MIN_WINDOW)
        self.mode      = FORWARD if self.row.measured else OFF
        return self.row.measured

    def end_forward(self):
        if self.lazy: self._attach_params()                   # lazy modules have made their parameters now
        if self.spare and self.mode == FORWARD: self._choose()
        self.mode = OFF

    def _choose(self):
        "The first forward pass has shown whether any of the sites is a nonlinearity; if none, the spare ones are read."
        spare, self.spare = self.spare, None
        self.log.spare_won = not self.log.sites and bool(spare.sites)
        if not self.log.spare_won: return
        self.targets = spare.targets
        self.log.sites, self.log.site_list = spare.sites, spare.site_list
        for k in ('sig', 'flat', 'hists', 'units'): getattr(self.part, k).extend(getattr(spare.part, k))

    def suspend(self):
        "Stop looking (a validation inside a training batch); returns what `resume` wants."
        mode, self.mode = self.mode, OFF
        return mode

    def resume(self, mode): self.mode = mode

    @timed
    def capture_end(self, probe, x):
        "The model's input or output."
        if self.part is None or not self.row.measured or probe not in self.plan.stats: return
        for path, t in tensors(x):
            if not t.is_floating_point(): self._unreal(f'{probe}{path}', t); continue
            names = self.log.ends[probe]
            if path not in [n for n, *_ in names]: names.append((path, str(t.dtype).replace('torch.', '')))
            self._capture(self.part, probe, [n for n, _ in names].index(path), t)

    @timed
    def loss(self, loss, constant=None):
        "The batch's loss, and a function that gives the loss of answering with the batch's mean output."
        if self.part is None: return
        self.part.loss = self.reader.number(loss)
        if constant is not None and self.row.measured: self.part.constant = self.reader.number(constant())

    @timed
    def placebo(self, model, pred, loss):
        "Of the first micro-batch of a row, with a graph that has not been run backwards."
        self.dose(self, model, pred, loss)

    def rates(self, lrs, mom=math.nan):
        "The learning rates of the parameter groups and the momentum, as the next step uses them."
        if self.row is not None: self.row.lrs, self.row.mom = lrs, mom

    def backward_begins(self, scale=None):
        "`scale`: what the loss is multiplied by under mixed precision, a number or a 0-dim tensor; None for nothing."
        if self.log.processes:                                                 # the loss is the mean of all processes'
            scale = (1. if scale is None else scale) * self.log.processes.n
        self.scale, self.last_mark = scale, (None, -1)
        if self.flags != [p.requires_grad for _, p in self.all]: self._attach_params()       # unfrozen in the middle
        if self.part is not None and self.row.measured and 'grad_output' in self.plan.stats: self.mode = BACKWARD

    @timed
    def backward_done(self):
        "The backward pass has run: the micro-batch belongs to the row."
        self.mode = OFF
        if self.part is None: return
        if self.doubtful: self._forget('grad_output', self.doubtful)
        self.row.parts.append(self.part)
        self.part = None
        self.window |= self.touched
        self.touched.clear()

    # --- rows --------------------------------------------------------------------------------------------------------

    @timed
    def commit(self):
        "Close the open row, if a backward pass of it has run."
        row, self.row, self.part, self.mode = self.row, None, None, OFF
        if row is not None and row.parts: self.log.add(row)

    def end_epoch(self, normal=True, last=False):
        "The epoch's training has ended; `normal`: neither cancelled nor failed; `last`: of the fit."
        if last: self.commit()
        self._commit_done()
        self.log.end_epoch()
        if self.log.processes and normal: self.fired |= self.log.processes.merge(self.log, self.fired)
        silent = [n for n, _ in self.targets if n not in self.fired] if self.log.measured else []
        for n in silent: self.log.ignore(n, 'its forward was never called as a module')
        if self.asked - self.answered:
            names = self.log.site_names()
            for k in self.asked - self.answered:
                self.log.ignore(f'{names[k]} (grad_output)', 'no gradient came back through its output')
        self.log.tell_ignored()

    def end_fit(self):
        "The fit has ended: an unfinished accumulation is a row that was not stepped."
        self.commit()
        if self.log.rows and not self.log.measured:
            every = self.plan.describe()['every']
            self.log.tell('nothing measured', f"nothing was measured: every={every} was true at none of the "
                                              f"{self.log.rows} iterations, which are numbered from 0")

    def _commit_done(self):
        if self.part is not None and self.touched: self.backward_done()
        if self.row is not None and (self.row.done or not self.row.parts): self.commit()

    def record(self):
        "All rows up to now, as a Record."
        self._commit_done()
        return self.log.record(self.cost())

    def cost(self):
        of = self.of + (time.perf_counter() - self._since if self._since is not None else 0.)
        return dict(seconds=round(self.spent, 4), of=round(of, 4),
                    percent=round(100 * self.spent / (of - self.spent), 2) if of > self.spent else None)


class _Instead:
    "Puts a method in the place of an object's own until it is removed, as the handle of a hook would."
    def __init__(self, obj, name, f):
        self.obj, self.name, self.old = obj, name, obj.__dict__.get(name)
        setattr(obj, name, f)
    def remove(self):
        if self.old is None: self.obj.__dict__.pop(self.name, None)
        else:                setattr(self.obj, self.name, self.old)


class Watch:
    "What `watch` gives: `record`, and for loops that clip or scale: `grads()`; `loss(l)` for the loss."
    def __init__(self, model, opt, plan, scaler=None):
        self.watcher, self.model, self.opt, self.scaler = Watcher(plan), model, opt, scaler
        self.i, self.ran = -1, False                       # the batch, and whether its backward pass has begun
        self.pred = None                                   # what the model answered, until `loss` has seen it
        self.start = None                                  # when it began
        self.watcher.log.meta['grad_is'] = 'as the step consumes it'

    @property
    def record(self):
        self._begun()
        return self.watcher.record()

    def _begun(self):
        if self.start is None: raise ValueError('nothing is watched yet: put the loop into `with watch(...) as w:`')

    def loss(self, loss):
        "Tell the batch's loss (elasticity and gain need it); returns it, so that `w.loss(l).backward()` works."
        self._begun()
        if not isinstance(loss, (torch.Tensor, Real)):
            raise TypeError(f"w.loss takes the loss of the batch, a tensor; got {loss!r}")
        self.watcher.loss(loss)
        pred, self.pred = self.pred, None
        if pred is not None: self.watcher.placebo(self.model, pred, loss)
        return loss

    def grads(self):
        "Read the true gradient now: after unscaling, before clipping."
        self._begun()
        self._backward()
        self.watcher.log.meta['grad_is'] = 'the true gradient, read at w.grads()'
        self.watcher.grads()

    def notice(self): self.ran = True

    def _backward(self):
        if self.watcher.part is not None and self.ran: self.watcher.backward_done()

    def __enter__(self):
        w = self.watcher
        w.attach(self.model, self.opt)
        if not {id(p) for p in self.model.parameters()} & {id(p) for g in self.opt.param_groups for p in g['params']}:
            w.log.tell('optimizer', "none of the optimizer's parameters is the model's: its steps do not change it")
        root, me = unwrap(self.model), weakref.ref(self)
        def before(m, args, kwargs):
            if not (m.training and torch.is_grad_enabled()): return
            self._backward()
            self.ran, self.pred = False, None
            self.i  += 1
            xs = [t for _, t in tensors((args, kwargs))]
            w.begin(self.i, bs=len(xs[0]) if xs and xs[0].dim() else 0, t=time.perf_counter() - self.start)
            w.capture_end('input', args if len(args) != 1 else args[0])
        def after(m, args, out):
            if not (m.training and torch.is_grad_enabled()) or w.part is None: return
            w.capture_end('output', out)
            if w.dose: self.pred = out
            w.end_forward()
            rates()
            for _, t in tensors(out):
                if t.requires_grad: t.register_hook(lambda g: me().notice() if me() else None)
            w.backward_begins(self.scaler.get_scale() if self.scaler is not None and self.scaler.is_enabled() else None)
        def rates():
            groups = self.opt.param_groups
            mom = groups[-1].get('momentum', groups[-1].get('betas', (math.nan,))[0])
            w.rates([float(g['lr']) for g in groups], mom)
        def stepping(opt, *a):
            self._backward()
            rates()
            w.before_update(sure=False)
        def stepped(opt, *a): w.after_update()
        zero_grad = self.opt.zero_grad
        @wraps(zero_grad)
        def zeroing(*args, **kwargs):
            self._backward()
            w.zeroed()
            return zero_grad(*args, **kwargs)
        self.start = time.perf_counter()
        w.handles += [root.register_forward_pre_hook(before, with_kwargs=True), root.register_forward_hook(after),
                      self.opt.register_step_pre_hook(stepping), self.opt.register_step_post_hook(stepped),
                      _Instead(self.opt, 'zero_grad', zeroing)]
        return self

    def __exit__(self, kind, *error):
        w = self.watcher
        try:
            self._backward()
            self.pred = None
            w.end_epoch(normal=kind is None, last=True)
            w.end_fit()
            if not w.log.rows and kind is None:
                w.log.tell('nothing recorded', "nothing was recorded: within `with watch(...)` the model was not "
                                               "called in training mode (model.train()), or no backward pass followed")
        finally: w.detach()


def watch(
    model: torch.nn.Module,             # the model, as the loop calls it
    opt: torch.optim.Optimizer,         # the optimizer whose steps are the rows
    *,
    window: int | None = 50,            # rows of a window of the life table: a plain loop has no epochs
    scaler: Any = None,                 # the loop's GradScaler: `grad_output` is divided by its scale
    **settings: Any,                    # the probes and settings of LayerStatsCallback, but for `verbose`
) -> Watch:
    """Record a plain PyTorch loop: `with watch(model, opt) as w: ...`, then `w.record`.

    Raises:
        TypeError: the model is no Module, the optimizer none of torch's, or a setting is not known.
        ValueError: a setting is out of its range.

    Example:
        with watch(model, opt, every=2) as w:
            for x, y in batches:
                w.loss(loss_func(model(x), y)).backward()
                opt.step()
                opt.zero_grad()
        w.record['grad', 'norm']
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"watch takes the model, an nn.Module, then the optimizer; got {type(model).__name__} first")
    if not hasattr(opt, 'register_step_pre_hook'):
        raise TypeError(f"watch needs a torch.optim optimizer; got {type(opt).__name__}. "
                        f"In fastai use LayerStatsCallback()")
    if scaler is not None and (isinstance(scaler, type) or not hasattr(scaler, 'get_scale')):
        raise TypeError(f"scaler is the loop's torch.amp.GradScaler; got {scaler!r}")
    check_names('watch', settings, (*PROBES, *SETTINGS, 'scaler'))
    return Watch(model, opt, Plan(window=window, **{**DEFAULTS, **settings}), scaler)
