"""Any PyTorch loop. A row is one call of the optimizer's step, whatever came before.

What is sure is what the optimizer is about to step and what it has stepped, so that is read there: every `.grad` that
is there at that moment, however it came. What the model's forward and backward passes showed meanwhile is kept, pass by
pass, and joins the row if their gradients were part of it; a pass whose gradients were taken away again (`zero_grad`),
or that had none, lends it nothing.
"""
from __future__ import annotations

import math
import sys
import time
from collections import deque
from numbers import Real

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .baseline_loss import BaselineLoss
from .closure import Closure
from .listeners import STEP, Listeners, running
from .module_hooks import OFF, Hook, in_transform, why_no_hooks
from .optimizer_info import hypers, stepping
from .own_steps import OwnSteps
from .probes import batch_size, tensors
from .rows import Part, Row
from .scalers import Scalers
from .watcher import Watcher

GRAD_IS = 'as the step consumes it'
WAITING = 256                     # forward passes without a backward pass that are kept: a look at the model runs many


class Watch:
    """What `watch` gives: `record`; `loss(l)` tells the loss; `grads()` reads the gradients, for loops that clip.

    Raises:
        ValueError: `record`, `loss` or `grads` before the `with`.
        TypeError: `loss` is given something else than a number or a tensor.
    """
    mode, forgive = True, None                    # its hooks are always awake; see ModuleHooks
    def __init__(self, model, opt, plan, scaler=None, loss_func=None):
        self.watcher, self.model, self.opt, self.scaler = Watcher(plan, by_step=True), model, opt, scaler
        self.builder  = self.watcher.builder
        self.passes   = deque()                   # Parts that no step has used yet
        self.dropped  = deque(maxlen=WAITING)     # those whose gradients have been taken away since the last step
        self.row      = None                      # of the next step, once its gradients have been read
        self.taken    = None                      # of the step under way
        self.last     = None                      # of the last step, as long as its loss may still be told
        self.kept     = {}                        # backward pass -> whether the last step's gradients were there then
        self.i        = 0                         # the number of the next row's first pass
        self.fit      = 0                         # of the row
        self.steps    = []                        # the frames of the calls of step under way: one may call another
        self.closure  = None                      # what is known of a step with a closure: its Closure
        self.unscale = self.found = None          # of an optimizer that divides by the scale itself
        self.versions = {}                        # of parameters that the optimizer does not have, after its last step
        self.pred     = None                      # what the model answered, until `loss` has seen it
        self.start    = None                      # when it began
        self.depth    = 0                         # how deep in calls of the model, which may call itself
        self.trains   = False                     # whether a call in training mode has been seen
        self.opts     = {}                        # the optimizer and those within it, by identity
        self.handles, self.before = [], {}        # before: of each optimizer, the handle of our hook before its step
        self.own      = None                      # of steps that no optimizer of torch's takes: its OwnSteps
        self.baseline, self.loss_func = BaselineLoss(self.watcher), loss_func
        self.builder.meta['grad_is'] = GRAD_IS

    @property
    def record(self):
        "What was recorded up to now."
        self._begun()
        if self.own: self.own.look()
        self._add()
        return self.builder.record(self.watcher.clock.cost())

    def _begun(self):
        if self.start is None: raise ValueError('nothing is watched yet: put the loop into `with watch(...) as w:`')

    def safely(self, f, *args):
        "What a hook of ours would do, outside of one."
        try: return f(*args)
        except Exception as e:
            if self.forgive is None: raise
            self.forgive(e)

    def loss(self, loss, pred=None, target=None):
        """Tell the batch's loss (elasticity needs it); returns it, so that `w.loss(l).backward()` works. It is that of
        the newest pass that has none, but for those that only torch.autograd.grad has run back; right after a step, of
        those that led to it. With the model's answer and the target, and `watch(..., loss_func=)`, the gain is
        measured too."""
        self._begun()
        if not isinstance(loss, (torch.Tensor, Real)):
            raise TypeError(f"w.loss takes the loss of the batch, a tensor or a number; got {type(loss).__name__}. "
                            f"Give it the one that is run backwards: `loss, more = ...; w.loss(loss)`")
        done = [p for p in self.last.parts if p.tasks != set()] if self.last is not None else []
        wait = [p for p in reversed([*self.dropped, *self.passes, *done]) if p.loss is None]
        part = next((p for p in wait if p in done or not p.tasks or self._ran(p)), wait[0] if wait else None)
        if part is None: return loss
        measured = self.last.measured if part in done else self.watcher.due(self.i)
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
        if not part.open: return self.builder.ignore('placebo', 'the loss was told after the step')
        if any(p.tasks for p in self.passes if p is not part): return             # not the first pass of the row
        w.row, w.part = self._new_row(), part
        w.placebo(self.model, pred, loss)
        part.placebo, w.row, w.part = w.row.placebo, None, None

    def grads(self):
        "Read the true gradient now: after unscaling, before clipping."
        self._begun()
        self.builder.meta['grad_is'] = 'the true gradient, read at w.grads()'
        if self.row is None and any(p.grad is not None for _, p in self.watcher.parameters.all):
            self.row = self._read()

    # --- on and off --------------------------------------------------------------------------------------------------

    def __enter__(self):
        if self.handles: raise ValueError('this watch is already open: leave it first, or make another with watch(...)')
        try: self._enter()
        except BaseException:
            self._leave()
            raise
        return self

    def _enter(self):
        w = self.watcher
        w.attach(self.model, self.opt)
        self.start    = time.perf_counter()
        if not why_no_hooks(self.model) or type(self.model).__name__ == 'OptimizedModule':
            self.handles.append(self.model.register_forward_pre_hook(Hook(self, '_before'), with_kwargs=True))
            self.handles.append(self.model.register_forward_hook(Hook(self, '_after'), always_call=True))
        if isinstance(self.opt, torch.optim.Optimizer) or hasattr(self.opt, 'register_step_pre_hook'): self._listen()
        else:
            self.own      = OwnSteps(self, self.opt)
            self.handles += self.own.handles
        self.handles.append(register_optimizer_step_pre_hook(Hook(self, '_before_any_step')))
        self.scalers  = Scalers(self.scaler, w, self._scaler_step)
        self.handles += self.scalers.handles

    def _listen(self):
        "Have the optimizer say when it steps, and those that it wraps."
        opts = [o for o in stepping(self.opt) if o not in self.before]
        news = {id(o): o for o in (self.opt, *opts)}
        ours      = {id(p) for g in self.opt.param_groups for p in g['params']}
        if opts and opts[-1] is not self.opt: self.watcher.take_optimizer(opts[-1])
        if not {id(p) for p in self.model.parameters()} & ours:
            self.builder.tell('optimizer', "none of the optimizer's parameters is the model's: its steps do not change "
                                           "it")
        for o in opts:
            self.before[o] = o.register_step_pre_hook(Hook(self, '_before_step'))
            self.handles.append(self.before[o])
            self.handles.append(o.register_step_post_hook(Hook(self, '_after_step')))
        for o in news.values(): self.handles.append(Listeners.add(o, 'zero_grad', self._zero_grad))
        self.opts.update(news)

    def _adopt(self, opt):
        "An optimizer of torch's takes the steps, and none was given, or another: it is the one."
        for h in self.own.handles if self.own else (): h.remove()
        self.opt, self.own, self.row = opt, None, None
        self.builder.meta['grad_is'] = GRAD_IS
        self.watcher.take_optimizer(opt)
        self._listen()

    def __exit__(self, kind, *error):
        w = self.watcher
        try:
            if self.own: self.own.look()
            self._add()
            w.end_epoch(normal=kind is None, last=True)
            w.end_fit()
            if not self.builder.rows and kind is None:
                self.builder.tell('nothing recorded', "nothing was recorded: within `with watch(...)` the optimizer "
                                                      "took no step; see that the loop steps the one that was given, "
                                                      "and that the model is called in training mode (model.train())")
        finally: self._leave()

    def _leave(self):
        for h in self.handles: h.remove()
        self.handles, self.before, self.steps, self.pred, self.depth, self.own = [], {}, [], None, 0, None
        self.passes.clear(); self.dropped.clear()
        self.watcher.detach()

    # --- forward and backward passes ---------------------------------------------------------------------------------

    def _may_train(self, m):
        "Whether a call of the model may lead to a step: not in eval mode where others have been in training mode."
        return torch.is_grad_enabled() and (m.training or not self.trains) and not in_transform()

    def _before(self, place, m, args, kwargs):
        if not self._may_train(m): return
        w = self.watcher
        self.trains = self.trains or m.training
        self.depth += 1
        if self.depth > 1: return                 # a model that calls itself
        if self.own: self.own.look()
        self._add()
        self._be_last()
        if self._zeroed_by_hand(): self._drop()
        w.follow()
        i    = self.i + sum(bool(p.tasks) for p in self.passes)
        part = w.open_pass(i, batch_size(*args, *kwargs.values()), w.due(self.i),
                           w.plan.window and self.builder.now_rows + 1 == w.plan.window)
        self.passes.append(part)
        if len(self.passes) > WAITING:            # of those that gave the parameters no gradient the oldest goes
            old = next(p for p in self.passes if not self._ran(p))
            old.open = False
            self.passes.remove(old)
        if w.hooks.mode:
            x = (*args, kwargs) if kwargs else args
            w.capture_end('input', x[0] if len(x) == 1 else x, part)

    def _after(self, place, m, args, out):
        w = self.watcher
        if not self._may_train(m): return
        self.depth -= 1
        if self.depth or w.hooks.part is None: return
        if out is None:                           # it has raised
            if w.hooks.part in self.passes: self.passes.remove(w.hooks.part)
            w.hooks.part.open, w.hooks.mode = False, OFF
            return
        self._answered(out)

    def _answered(self, out):
        "The forward pass is over."
        w = self.watcher
        part, measured = w.hooks.part, w.hooks.mode != OFF
        if measured: w.capture_end('output', out, part)
        w.end_forward(out)
        asked = [t.register_hook(Hook(self, '_came_back', part)) for _, t in tensors(out)
                 if t.requires_grad and not t.is_leaf]
        if not asked:
            part.tasks = None                     # it cannot be seen when it runs backwards: when any does
            if out is not None and not any(True for _ in tensors(out)):
                self.builder.ignore('output', f"the model's answer is no tensor, nor holds any: {type(out).__name__}")
        if w.dose or self.loss_func: self.pred = out
        self.scalers.ended()                      # the last backward pass, if it has raised
        w.hooks.begin_backward(w.hooks.scale)
        if not measured: w.hooks.mode = OFF

    def _came_back(self, part, g):
        "A backward pass has reached the model's answer."
        task = torch._C._current_graph_task_id()
        if task in part.tasks: return
        if part in self.dropped:                  # run backwards again
            self.dropped.remove(part)
            self.passes.append(part)
        if not part.open and part not in self.passes:
            self.builder.ignore('some passes', f'more than {WAITING} ran before their backward pass, or it ran twice')
        if not self.stepping: self.row = None     # what was read before is no longer what there is
        if task not in self.watcher.parameters.tasks and self._zeroed_by_hand(): self._drop()
        self.kept.setdefault(task, self.watcher.parameters.were_kept())
        part.tasks.add(task)

    def _zeroed_by_hand(self):
        ps = self.watcher.parameters
        return bool(ps.tasks) and ps.were_zeroed()

    def _ran(self, part):
        "Whether the gradients that the parameters hold came through this pass."
        tasks = self.watcher.parameters.tasks
        if self.watcher.parameters.in_parts: return part.tasks != set()
        if part.tasks is None or self.watcher.hooks.blind: return bool(tasks) and part.tasks != set()
        return bool(part.tasks & tasks)

    def _drop(self):
        "The gradients have been taken away: the passes that they came from lend nothing, unless no others do."
        for p in [p for p in self.passes if self._ran(p)]:
            self.passes.remove(p)
            self.dropped.append(p)
        if not self.stepping: self.row = None
        self.watcher.parameters.forget()

    def _zero_grad(self, zero, *args, **kwargs):
        if self.watcher.parameters.tasks or self.watcher.parameters.in_parts: self._drop()
        return zero()

    # --- a step ------------------------------------------------------------------------------------------------------

    @property
    def stepping(self):
        "Whether a step is under way; one that has raised is over."
        if self.steps: self.steps = [f for f in self.steps if f in running()]
        return bool(self.steps)

    def _new_row(self):
        self._add()
        return Row(self.watcher.due(self.i), (self.fit, 0, time.perf_counter() - self.start))

    def _scale(self, i, p):
        "What a gradient is still multiplied by. In a step: by nothing, unless the optimizer is one that divides."
        ps = self.watcher.parameters
        return self.unscale if self.steps and i in ps.group else ps.still_scaled(p)

    def _rates(self, row):
        "The learning rates with which the step is taken."
        groups  = hypers(self.opt)
        row.lrs = [float(g['lr']) if 'lr' in g else math.nan for g in groups]
        row.mom = groups[-1].get('momentum', groups[-1].get('mom', groups[-1].get('betas', (math.nan,))[0]))

    def _read(self, exact=False):
        "A row of the gradients as they are now."
        row = self._new_row()
        ps = self.watcher.parameters
        ps.gradients(row, exact, self._scale if ps.scaled or self.unscale is not None else None)
        return row

    def _later_hooks(self, opt):
        "What runs between our hook and the step, and may change what it consumes: hooks that are no watch's."
        hooks, mine = opt._optimizer_step_pre_hooks, self.before[opt].id
        if mine not in hooks or next(reversed(hooks)) == mine: return []
        ids = list(hooks)
        return [k for k in ids[ids.index(mine) + 1:] if not isinstance(hooks[k], Hook)]

    def _be_last(self):
        "Have our hook run after those that were registered since, unless they are being run."
        late = [o for o in self.before if self._later_hooks(o)]
        if not late or any(f.f_code is STEP for f in running()): return
        for o in late: o._optimizer_step_pre_hooks.move_to_end(self.before[o].id)

    def _before_step(self, place, opt, args, kwargs):
        nested = self.stepping
        self.steps.append(sys._getframe(2))       # torch's own around the step
        if nested: return                         # an optimizer within another
        ps, task = self.watcher.parameters, torch._C._current_graph_task_id()
        closure  = args[1] if len(args) > 1 else kwargs.get('closure')           # args[0] is the optimizer
        self.unscale, self.found = getattr(opt, 'grad_scale', None), getattr(opt, 'found_inf', None)
        self.closure = None
        self._who_else_steps()
        if task != -1: ps.tasks.add(task)         # stepped within the backward pass
        if not callable(closure):
            now = self.row is None
            self.taken = row = self._read() if now else self.row.again()
            self._rates(row)
            if self._later_hooks(opt): self._cannot_know(row, now)
            else:                      ps.used(row, now, sure=False, scale=self._scale)
            ps.weights(row)
            return
        self.closure = Closure(self, closure)
        if len(args) > 1: return (args[0], self.closure, *args[2:]), kwargs
        return args, {**kwargs, 'closure': self.closure}

    def _cannot_know(self, row, now):
        "A hook was registered since the forward pass: what it makes of the gradients is not seen in this row."
        if now: row.forget(); row.read = True
        self.builder.ignore(f"{'grad, ' if now else ''}grad_used, clip_factor", 'in some rows a step hook, registered '
                            'after the forward pass, could still change the gradients')

    def _after_step(self, place, opt, args, kwargs):
        frame = sys._getframe(2)
        if frame not in self.steps: return
        del self.steps[self.steps.index(frame):]
        if self.stepping: return
        row, ps, closure = self.taken, self.watcher.parameters, self.closure
        if closure is not None: row = closure.row if closure.evaluations else None
        if row is None: return
        if self.found is not None and bool(self.found): ps.no_updates(row)
        else:                                           ps.updates(row)
        if closure is not None: closure.join(row)
        self._finish(row)
        self._be_last()

    def _who_else_steps(self):
        "Parameters that this optimizer does not have but that have moved since its last step."
        ps = self.watcher.parameters
        for i, p in ps.trained:
            if i not in ps.group and self.versions.get(i, p._version) != p._version: self.builder.stepped_elsewhere(i)

    def _before_any_step(self, place, opt, args, kwargs):
        "Of any optimizer; one that is not watched may have been put in the place of this one."
        if id(opt) in self.opts or self.stepping: return
        theirs = {id(p) for g in opt.param_groups for p in g['params']}
        ps     = self.watcher.parameters
        if self.opt is None and any(id(p) in theirs for _, p in ps.trained): return self._adopt(opt)
        if any(id(p) in theirs for i, p in ps.all if i in ps.group):
            self.builder.ignore('some steps', f"another optimizer ({type(opt).__name__}) has taken them, with "
                                              f"parameters of the watched one: watch it as well")

    def _scaler_step(self, step, scaler, opt, *args, **kwargs):
        "A scaler steps the optimizer, or skips the step."
        if id(opt) not in self.opts or not scaler.is_enabled(): return step()
        last, out = self.last, step()
        if self.last is last:
            row = self.row or self._read(exact=True)
            self._rates(row)
            self.watcher.parameters.no_updates(row)
            self._finish(row)
        return out

    def _finish(self, row):
        "The row is whole: the passes that led to it, and what was read at the parameters."
        ps, hooks = self.watcher.parameters, self.watcher.hooks
        used = [p for p in self.passes if self._ran(p)]
        for ran in (self.passes, self.dropped):   # gradients set by hand: what ran since is what they came from
            if not ps.tasks and not used: used = [p for p in ran if p.tasks or p.tasks is None]
        if not used and row.measured:
            self.builder.ignore('activations, input, output', 'no forward pass of the model, called as a module, was '
                                                              'seen to lead to a step')
        for p in used:
            p.open = False
            hooks.settle(p, ps.tasks)
            row.placebo = row.placebo or p.placebo
            if p in self.passes: self.passes.remove(p)
        for p in self.dropped: p.open = False
        self.dropped.clear()
        row.parts = used or [Part(0, self.i)]
        row.kept  = self.kept.get(min(ps.tasks, default=None), math.nan)            # as the first of them began
        self.kept.clear()
        for k, p in enumerate(row.parts): p.last = self.i + k
        self.i += len(row.parts)
        if len(row.parts) > 1: row.n_accum = max(1, len(ps.tasks))        # several passes may share a backward pass
        self.row = self.taken = self.closure = self.unscale = None
        ps.forget()
        self.versions = {i: p._version for i, p in ps.trained if i not in ps.group}
        hooks.mode = OFF if hooks.part is None or not hooks.part.open else hooks.mode
        self._add()
        self.last = row

    def _add(self):
        "The last step's row is whole: its loss has been told, or will not be."
        row, self.last = self.last, None
        if row is not None: self.builder.add(row)
