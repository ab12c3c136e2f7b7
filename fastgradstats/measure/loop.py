"""`watch`: any PyTorch loop. A row is one call of the optimizer's step, whatever came before.

What is sure is what the optimizer is about to step and what it has stepped, so that is read there: every `.grad` that
is there at that moment, however it came. What the model's forward and backward passes showed meanwhile is kept, pass by
pass, and joins the row if their gradients were part of it; a pass whose gradients were taken away again (`zero_grad`),
or that had none, lends it nothing.
"""
from __future__ import annotations

import math
import time
import weakref
from collections import deque
from numbers import Real
from typing import Any

import torch

from .baseline_loss import BaselineLoss
from .module_hooks import OFF, Hook, in_transform, why_no_hooks
from .plan import DEFAULTS, SETTINGS, Plan, check_names
from .probes import PROBES, tensors
from .rows import Part, Row
from .watcher import Watcher

WAITING = 256                     # forward passes without a backward pass that are kept: a look at the model runs many


class Listeners:
    "Calls functions before a method of an object, until the last of them is removed; in any order."
    @classmethod
    def add(cls, obj, name, around):
        "Have `around(original)` called in place of a method. Returns what `remove`s it."
        mine = obj.__dict__.get(name)
        if not isinstance(mine, cls): mine = cls(obj, name)
        mine.around.append(around)
        return _Removal(mine, around)

    def __init__(self, obj, name):
        self.had, self.old = obj.__dict__.get(name), getattr(obj, name)
        self.obj, self.name, self.around = weakref.ref(obj), name, []
        obj.__dict__[name] = self

    def __call__(self, *args, **kwargs):
        call = lambda: self.old(*args, **kwargs)
        for f in self.around: call = (lambda f, inner: lambda: f(inner, *args, **kwargs))(f, call)
        return call()

    def remove(self, around):
        self.around = [f for f in self.around if f is not around]
        obj = self.obj()
        if self.around or obj is None or obj.__dict__.get(self.name) is not self: return
        if self.had is None: del obj.__dict__[self.name]
        else:                obj.__dict__[self.name] = self.had

class _Removal:
    def __init__(self, listeners, around): self.listeners, self.around = listeners, around
    def remove(self): self.listeners.remove(self.around)


class Watch:
    """What `watch` gives: `record`; `loss(l)` tells the loss; `grads()` reads the gradients, for loops that clip.

    Raises:
        ValueError: `record`, `loss` or `grads` before the `with`.
        TypeError: `loss` is given something else than a number or a tensor.
    """
    mode = True                                   # its hooks are always awake
    def __init__(self, model, opt, plan, scaler=None, loss_func=None):
        self.watcher, self.model, self.opt, self.scaler = Watcher(plan, by_step=True), model, opt, scaler
        self.builder  = self.watcher.builder
        self.passes   = deque()                   # Parts that no step has used yet
        self.row      = None                      # of the step at hand, once its gradients have been read
        self.i        = 0                         # the number of the next row's first pass
        self.stepping = 0                         # how deep in calls of step, which may call one another
        self.closure  = None                      # what is known of a step with a closure: its _Closure
        self.unscale = self.found = None          # of an optimizer that unscales by itself
        self.versions = {}                        # of parameters that the optimizer does not have, after its last step
        self.pred     = None                      # what the model answered, until `loss` has seen it
        self.start    = None                      # when it began
        self.depth    = 0                         # how deep in calls of the model, which may call itself
        self.handles  = []
        self.baseline, self.loss_func = BaselineLoss(self.builder), loss_func
        self.builder.meta['grad_is'] = 'as the step consumes it'

    @property
    def record(self):
        "What was recorded up to now."
        self._begun()
        return self.builder.record(self.watcher.clock.cost())

    def _begun(self):
        if self.start is None: raise ValueError('nothing is watched yet: put the loop into `with watch(...) as w:`')

    def loss(self, loss, pred=None, target=None):
        """Tell the batch's loss (elasticity needs it); returns it, so that `w.loss(l).backward()` works. With the
        model's answer and the target, and `watch(..., loss_func=)`, the gain is measured too."""
        self._begun()
        if not isinstance(loss, (torch.Tensor, Real)):
            raise TypeError(f"w.loss takes the loss of the batch, a tensor; got {loss!r}")
        part = next((p for p in reversed(self.passes) if p.open and p.loss is None), None)
        if part is None: return loss
        measured = self.watcher.plan.due(self.builder.rows, self.i)
        baseline = None
        if measured and self.loss_func is not None and target is not None:
            answer   = self.pred if pred is None else pred
            baseline = lambda: self.baseline.both(self.loss_func, answer, (target,))
        self.watcher.tell_loss(part, loss, baseline)
        pred, self.pred = self.pred, None
        if pred is not None and self.watcher.dose: self._placebo(pred, loss, part)
        return loss

    def _placebo(self, pred, loss, part):
        w = self.watcher
        if any(p.tasks for p in self.passes if p is not part): return             # not the first pass of the row
        w.row, w.part = self._new_row(), part
        w.placebo(self.model, pred, loss)
        part.placebo, w.row, w.part = w.row.placebo, None, None

    def grads(self):
        "Read the true gradient now: after unscaling, before clipping."
        self._begun()
        self.builder.meta['grad_is'] = 'the true gradient, read at w.grads()'
        if self.row is None and any(p.grad is not None for _, p in self.watcher.parameters.trained): self._read()

    # --- on and off --------------------------------------------------------------------------------------------------

    def __enter__(self):
        if self.handles: raise ValueError('this watch is already open: leave it first, or make another with watch(...)')
        try: self._enter()
        except BaseException:
            self._leave()
            raise
        return self

    def _enter(self):
        w, opts = self.watcher, _optimizers(self.opt)
        w.attach(self.model, opts[-1])
        ours = {id(p) for g in self.opt.param_groups for p in g['params']}
        if not {id(p) for p in self.model.parameters()} & ours:
            self.builder.tell('optimizer', "none of the optimizer's parameters is the model's: its steps do not change "
                                           "it")
        self.start    = time.perf_counter()
        if not why_no_hooks(self.model) or type(self.model).__name__ == 'OptimizedModule':
            self.handles.append(self.model.register_forward_pre_hook(Hook(self, '_before'), with_kwargs=True))
            self.handles.append(self.model.register_forward_hook(Hook(self, '_after'), always_call=True))
        for o in opts:
            self.handles.append(o.register_step_pre_hook(self._before_step))
            self.handles.append(o.register_step_post_hook(self._after_step))
        for o in {id(o): o for o in (self.opt, *opts)}.values():
            self.handles.append(Listeners.add(o, 'zero_grad', self._zero_grad))
        if self.scaler is not None: self.handles.append(Listeners.add(self.scaler, 'step', self._scaler_step))

    def __exit__(self, kind, *error):
        w = self.watcher
        try:
            w.end_epoch(normal=kind is None, last=True)
            w.end_fit()
            if not self.builder.rows and kind is None:
                self.builder.tell('nothing recorded', "nothing was recorded: within `with watch(...)` the optimizer "
                                                      "took no step; see that the loop steps the one that was given, "
                                                      "and that the model is called in training mode (model.train())")
        finally: self._leave()

    def _leave(self):
        for h in self.handles: h.remove()
        self.handles, self.pred, self.depth = [], None, 0
        self.passes.clear()
        self.watcher.detach()

    # --- forward and backward passes ---------------------------------------------------------------------------------

    def _before(self, place, m, args, kwargs):
        if not (m.training and torch.is_grad_enabled()) or in_transform(): return
        w = self.watcher
        self.depth += 1
        if self.depth > 1: return                 # a model that calls itself
        if self.stepping and not (self.closure and self.closure.running):                # a step that raised is over
            self.stepping, self.closure, self.row = 0, None, None
        if self._zeroed_by_hand(): self._drop()
        w.follow()
        i    = self.i + sum(bool(p.tasks) for p in self.passes)
        xs   = [t for _, t in tensors((args, kwargs))]
        part = w.open_pass(i, len(xs[0]) if xs and xs[0].dim() else 0, w.plan.due(self.builder.rows, self.i),
                           w.plan.window and self.builder.now_rows + 1 == w.plan.window)
        self.passes.append(part)
        while sum(not p.tasks for p in self.passes) > WAITING:
            old = next(p for p in self.passes if not p.tasks)
            old.open = False
            self.passes.remove(old)
        if w.hooks.mode:
            x = (*args, kwargs) if kwargs else args
            w.capture_end('input', x[0] if len(x) == 1 else x, part)

    def _after(self, place, m, args, out):
        w = self.watcher
        if not torch.is_grad_enabled() or not m.training or in_transform(): return
        self.depth -= 1
        if self.depth or w.hooks.part is None: return
        if out is None:                           # it has raised
            if w.hooks.part in self.passes: self.passes.remove(w.hooks.part)
            w.hooks.part.open, w.hooks.mode = False, OFF
            return
        part, measured = w.hooks.part, w.hooks.mode != OFF
        if measured: w.capture_end('output', out, part)
        w.end_forward(out)
        asked = [t.register_hook(Hook(self, '_came_back', part)) for _, t in tensors(out)
                 if t.requires_grad and not t.is_leaf]
        if not asked:
            part.tasks = None                     # it cannot be seen when it runs backwards: when any does
            if not any(True for _ in tensors(out)):
                self.builder.ignore('output', f"the model's answer is no tensor, nor holds any: {type(out).__name__}")
        if w.dose or self.loss_func: self.pred = out
        scaler = self.scaler
        w.hooks.begin_backward(scaler.get_scale() if scaler is not None and scaler.is_enabled() else None)
        if not measured: w.hooks.mode = OFF

    def _came_back(self, part, g):
        "A backward pass has reached the model's answer."
        task = torch._C._current_graph_task_id()
        if task in part.tasks: return
        if not part.open and part not in self.passes:
            self.builder.ignore('some passes', f'more than {WAITING} ran before their backward pass, or it ran twice')
        if not self.stepping: self.row = None     # what was read before is no longer what there is
        if task not in self.watcher.parameters.tasks and self._zeroed_by_hand(): self._drop()
        if not any(p.tasks for p in self.passes) and not self.watcher.parameters.tasks:
            part.kept = self.watcher.parameters.were_kept()
        part.tasks.add(task)

    def _zeroed_by_hand(self):
        ps = self.watcher.parameters
        return bool(ps.tasks) and ps.were_zeroed()

    def _ran(self, part):
        "Whether the gradients that the parameters hold came through this pass."
        tasks = self.watcher.parameters.tasks
        if part.tasks is None or self.watcher.hooks.blind: return bool(tasks) and part.tasks != set()
        return bool(part.tasks & tasks)

    def _drop(self):
        "The gradients have been taken away: the passes that they came from belong to no step of this optimizer."
        for p in [p for p in self.passes if self._ran(p)]:
            p.open = False
            self.passes.remove(p)
        if not self.stepping: self.row = None
        self.watcher.parameters.forget()

    def _zero_grad(self, zero, *args, **kwargs):
        if self.watcher.parameters.tasks: self._drop()
        return zero()

    # --- a step ------------------------------------------------------------------------------------------------------

    def _new_row(self):
        row = Row(self.watcher.plan.due(self.builder.rows, self.i), (0, 0, time.perf_counter() - self.start))
        return row

    def _rates(self, row):
        "The learning rates with which the step is taken."
        groups  = self.opt.param_groups
        row.lrs = [float(g['lr']) if 'lr' in g else math.nan for g in groups]
        row.mom = groups[-1].get('momentum', groups[-1].get('betas', (math.nan,))[0])

    def _read(self, exact=False, scale=None):
        "The gradients as they are now."
        self.row = self._new_row()
        self.watcher.parameters.gradients(self.row, exact, scale)

    def _before_step(self, opt, args, kwargs):
        self.stepping += 1
        if self.stepping > 1: return              # an optimizer within another
        ps, task = self.watcher.parameters, torch._C._current_graph_task_id()
        closure  = args[1] if len(args) > 1 else kwargs.get('closure')           # args[0] is the optimizer
        self.unscale, self.found = getattr(opt, 'grad_scale', None), getattr(opt, 'found_inf', None)
        self._who_else_steps()
        if task != -1: ps.tasks.add(task)         # stepped within the backward pass
        if not callable(closure):
            now = self.row is None
            if now: self._read(scale=self.unscale)
            self._rates(self.row)
            ps.used(self.row, now, sure=False, scale=self.unscale)
            ps.weights(self.row)
            return
        self.closure = _Closure(self, closure)
        if len(args) > 1: return (args[0], self.closure, *args[2:]), kwargs
        return args, {**kwargs, 'closure': self.closure}

    def _after_step(self, opt, args, kwargs):
        self.stepping -= 1
        if self.stepping: return
        row, ps, closure = self.row, self.watcher.parameters, self.closure
        if closure is not None: row, self.closure = closure.row_before(), None
        if row is None: return
        if self.found is not None and bool(self.found): ps.no_updates(row)
        else:                                           ps.updates(row)
        if closure is not None: closure.join(row)
        self._finish(row)

    def _who_else_steps(self):
        "Parameters that this optimizer does not have but that have moved since its last step."
        ps = self.watcher.parameters
        for i, p in ps.trained:
            if i not in ps.group and self.versions.get(i, p._version) != p._version: self.builder.stepped_elsewhere(i)

    def _scaler_step(self, step, opt, *args, **kwargs):
        "A scaler steps the optimizer, or skips the step."
        if opt is not self.opt: return step()
        rows = self.builder.rows
        out  = step()
        if self.builder.rows == rows and self.watcher.parameters.tasks:
            self._read(exact=True)
            self._rates(self.row)
            self.watcher.parameters.no_updates(self.row)
            self._finish(self.row)
        return out

    def _finish(self, row):
        "The row is whole: the passes that led to it, and what was read at the parameters."
        ps, hooks = self.watcher.parameters, self.watcher.hooks
        used = [p for p in self.passes if self._ran(p)]
        if not ps.tasks and not used:             # gradients set by hand: what ran since is what they came from
            used = [p for p in self.passes if p.tasks or p.tasks is None]
        if not used and row.measured:
            self.builder.ignore('activations, input, output', 'no forward pass of the model, called as a module, was '
                                                              'seen to lead to a step')
        for p in used:
            p.open = False
            hooks.settle(p, ps.tasks)
            row.placebo = row.placebo or p.placebo
            self.passes.remove(p)
        row.parts = used or [Part(0, self.i)]
        row.kept  = next((p.kept for p in row.parts if not math.isnan(p.kept)), math.nan)
        for k, p in enumerate(row.parts): p.last = self.i + k
        self.i += len(row.parts)
        if len(row.parts) > 1: row.n_accum = max(1, len(ps.tasks))        # several passes may share a backward pass
        self.row = None
        ps.forget()
        self.versions = {i: p._version for i, p in ps.trained if i not in ps.group}
        hooks.mode = OFF if hooks.part is None or not hooks.part.open else hooks.mode
        self.builder.add(row)


class _Closure:
    "A closure given to a step: the gradient is that of its last evaluation, the weights those before the first."
    def __init__(self, watch, closure):
        self.watch, self.closure, self.running, self.evaluations = watch, closure, False, 0
        ps = watch.watcher.parameters
        ps.got   = [(i, p) for i, p in ps.trained if i in ps.group]
        self.row = watch._new_row()
        watch._rates(self.row)
        ps.weights(self.row)
        self.kept = ps.got

    def __call__(self, *args, **kwargs):
        w = self.watch
        if self.evaluations: w._drop()
        w.row, self.running = None, True
        try: out = self.closure(*args, **kwargs)
        finally: self.running = False
        self.evaluations += 1
        now = w.row is None                       # else `w.grads()` has read it before it was clipped
        if now: w._read()
        w.watcher.parameters.used(w.row, now, sure=False)
        return out

    def row_before(self):
        "The row with the weights before the step, if the closure was called."
        self.watch.watcher.parameters.got = self.kept
        self.row.read = True
        return self.row if self.evaluations else None

    def join(self, row):
        "Give the row the gradient of the last evaluation."
        last = self.watch.row
        row.own.sig   += last.own.sig
        row.own.flat  += last.own.flat
        row.own.hists += last.own.hists
        row.grad_norm, row.clip = last.grad_norm, last.clip
        if self.evaluations > 1:
            meta = self.watch.builder.meta
            meta['evaluations'] = max(self.evaluations, meta.get('evaluations', 0))


def _optimizers(opt):
    "The optimizer and those that it wraps and steps (accelerate's, Lightning's, SAM's); the last one does the step."
    found = [opt]
    while True:
        inner = next((v for v in vars(found[-1]).values() if isinstance(v, torch.optim.Optimizer) and
                      not any(v is o for o in found)), None)
        if inner is None: break
        found.append(inner)
    return [o for o in found if hasattr(o, '_optimizer_step_pre_hooks')]


def watch(
    model: torch.nn.Module,            # the model, as the loop calls it
    opt: torch.optim.Optimizer,        # the torch.optim optimizer whose steps are the rows
    *,
    window: int | None = 50,           # rows of a window of the life table: a plain loop has no epochs
    scaler: Any = None,                # the loop's GradScaler: `grad_output` is divided by its scale
    loss_func: Any = None,             # the loss function: with `w.loss(loss, pred, target)` the gain is measured
    **settings: Any,                   # the probes and settings of LayerStatsCallback, but for `verbose`
) -> Watch:
    """Record a plain PyTorch loop: `with watch(model, opt) as w: ...`, then `w.record`. A row is one call of the
    optimizer's step.

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
    if not isinstance(opt, torch.optim.Optimizer) and not hasattr(opt, 'register_step_pre_hook'):
        raise TypeError(f"watch needs a torch.optim optimizer; got {type(opt).__name__}. "
                        f"In fastai use LayerStatsCallback()")
    if scaler is not None and (isinstance(scaler, type) or not hasattr(scaler, 'get_scale')):
        raise TypeError(f"scaler is the loop's torch.amp.GradScaler; got {scaler!r}")
    check_names('watch', settings, (*PROBES, *SETTINGS, 'scaler', 'loss_func'))
    return Watch(model, opt, Plan(window=window, **{**DEFAULTS, **settings}), scaler, loss_func)
