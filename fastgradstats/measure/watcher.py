"""The watcher: records one model while it trains. No framework: fastai's callbacks and the loop of `watch` tell it what
happens, and it reads through its parts, each of which can be used alone:

    hooks       module_hooks: activations and output gradients
    parameters  parameter_reader: gradients, weights, updates
    reader      readers: how a tensor becomes numbers
    builder     record_builder: rows, and the Record they make
"""
from __future__ import annotations

import math
import weakref

from .clock import DEAR, ROWS, Budget, Clock, timed
from .distributed import Processes
from .module_hooks import OFF, ModuleHooks
from .optimizer_info import describe
from .parameter_reader import ParameterReader
from .placebo import Placebo
from .probes import Layout, dropouts, in_eval_mode, tensors, unwrap
from .readers import Reference, choose
from .record_builder import FLUSH, MIN_WINDOW, RecordBuilder
from .rows import Part, Row


class Watcher:
    """Records one model: attach, tell it what happens batch by batch, detach, `record()`; attach again for an epoch.

    The events of a micro-batch are `begin`, `end_forward`, `loss`, `begin_backward`, `end_backward`; those of a step
    `grads` (the true gradient), `before_update` (the consumed one, the weights) and `after_update`, or `skipped`;
    neither, where gradients are accumulated. What comes at the wrong time is passed over: a training loop may be
    cancelled anywhere. A row is added when the next begins, so that nothing that happens after a step can lose it.
    """
    attached = weakref.WeakSet()                  # all that record now

    def __init__(self, plan, *, host=None, by_step=False):
        self.plan, self.host = plan, host
        self.by_step    = by_step                 # rows are steps: a gradient counts however it came
        self.clock      = Clock(self.detach)
        self.budget     = Budget(plan.budget, self.clock) if plan.budget else None
        self.builder    = RecordBuilder(plan)
        self.reader     = Reference()             # that of the model, once there is one
        self.hooks      = ModuleHooks(self)
        self.parameters = ParameterReader(self)
        self.dose       = Placebo(plan.placebo) if plan.placebo else None
        self.row        = None                    # the open one
        self.part       = None                    # of the micro-batch under way
        self.model = self.outer = self.opt = None
        self.layout     = None                    # which modules and parameters the model consists of

    # --- on and off --------------------------------------------------------------------------------------------------

    def attach(self, model, opt=None):
        "Register the hooks; the model may have changed since the last time (unfrozen, wrapped, compiled)."
        again = self.hooks.kept_on is not None and self.hooks.kept_on() is unwrap(model)
        self.detach(keep=again)
        self.builder.share_with(Processes.of(model))
        if self.builder.processes: self.builder.processes.begin()
        self.model, self.outer, self.opt = unwrap(model), model, opt
        self.layout = Layout(self.model)
        self.hooks.attach(model)
        self.parameters.attach(self.model, opt)
        self.builder.meta.setdefault('model', type(self.model).__name__)
        if opt is not None: self.take_optimizer(opt)
        self.reader = choose(self.model, self.host)
        self.clock.start()
        Watcher.attached.add(self)

    def take_optimizer(self, opt):
        "The optimizer is known only now."
        self.opt = opt
        self.parameters.set_optimizer(opt)
        self.builder.meta['optimizer'] = describe(opt)

    def detach(self, keep=False):
        "Take the hooks off; `keep`: it goes on soon, see ModuleHooks."
        Watcher.attached.discard(self)
        self.hooks.detach(keep)
        self.parameters.detach()
        if self.model is not None and self.builder.processes: self.builder.processes.end()
        self.model = self.outer = self.opt = self.layout = None
        self.clock.stop()
        self.reader.forget()

    def follow(self):
        "Modules or parameters may have been replaced, added, or set free since the last batch: what is new is hooked."
        ps = self.parameters
        if ps.flags != [p.requires_grad for _, p in ps.all]: ps.attach(self.model, self.opt)     # unfrozen, or frozen
        if ps.groups_changed(): ps.set_optimizer(self.opt)
        modules, params = self.layout.now()
        if modules == self.layout.modules and params == self.layout.params: return
        if any(not p.is_leaf for p in self.model.parameters()): return     # lent for one pass (functional_call)
        if modules != self.layout.modules:
            self.hooks.detach()
            self.hooks.attach(self.outer)
        self.parameters.attach(self.model, self.opt)
        self.layout = Layout(self.model)

    # --- a micro-batch -----------------------------------------------------------------------------------------------

    @timed
    def begin(self, i, *, bs=0, fit=0, epoch=0, left=None, t=math.nan):
        """A training batch begins: number `i` over the model's life. `left`: batches left in the epoch, with this one.
        Returns whether it is measured."""
        if self.part is not None and self.parameters.tasks: self.end_backward()   # cancelled after its backward pass
        self.part = None
        if self.row is not None and (self.row.done or not self.row.parts): self.commit()
        if self.row is not None and self.parameters.all_gone(): self.skipped(); self.commit()
        if self.row is None:
            self.row = Row(self.due(i), None)
            self.parameters.forget()
        elif self.row.read: self.row.forget()                     # the step was put off after its gradients were read
        self.row.about = fit, epoch, t
        self.follow()
        every = self.plan.every if isinstance(self.plan.every, int) else 1
        rows  = self.builder.now_rows + 1
        self.part = self.open_pass(i, bs, self.row.measured, rows == self.plan.window if self.plan.window else
                                   left is not None and left <= every and rows >= MIN_WINDOW)
        self.parameters.tasks.clear()
        return self.row.measured

    def due(self, i):
        "Whether the row that begins with batch `i` is measured."
        row = self.builder.rows
        return self.plan.due(row, i) and (self.budget is None or self.budget.due(row))

    def open_pass(self, i, bs, measured, dormancy):
        "A forward pass begins; what it shows is captured in the Part that is returned."
        part = Part(bs, i)
        self.hooks.open(part, measured, dormancy)
        return part

    def end_forward(self, output=None):
        "The model has answered; `output`: what."
        if self.parameters.lazy: self.parameters.attach(self.model, self.opt)   # lazy modules have made theirs now
        self.hooks.end_forward(output)
        if self.hooks.part is not None and self.builder.rows % FLUSH == 0:
            self.hooks.part.modes = in_eval_mode(self.model), dropouts(self.model)

    def suspend(self):
        "Stop looking (a validation inside a training batch); returns what `resume` wants."
        mode, self.hooks.mode = self.hooks.mode, OFF
        return mode

    def resume(self, mode): self.hooks.mode = mode

    @timed
    def capture_end(self, probe, x, part=None):
        "The model's input or output."
        part = part or (self.part if self.row is not None and self.row.measured else None)
        if part is None or probe not in self.plan.stats: return
        for path, t in tensors(x):
            if not t.is_floating_point(): self.hooks.unreal(f'{probe}{path}', t); continue
            names = self.builder.ends[probe]
            if path not in [n for n, *_ in names]: names.append((path, str(t.dtype).replace('torch.', '')))
            self.capture(part, probe, [n for n, _ in names].index(path), t)

    @timed
    def loss(self, loss, baseline=None):
        "The batch's loss; `baseline` as of `tell_loss`."
        if self.part is None: return
        self.tell_loss(self.part, loss, baseline if self.row.measured else None)

    def tell_loss(self, part, loss, baseline=None):
        "`baseline`: () -> the losses of the batch's mean answer and of the best of the batches before."
        part.loss = self._number('loss', loss)
        if baseline is None: return
        part.constant, part.prior = (self._number(n, v) for n, v in zip(('loss_constant', 'loss_prior'), baseline()))

    def _number(self, name, x):
        try: return self.reader.number(x)
        except (TypeError, ValueError):
            self.builder.ignore(name, f"it is no tensor but {type(x).__name__}")
            return math.nan

    @timed
    def placebo(self, model, pred, loss):
        "Of the first micro-batch of a row, with a graph that has not been run backwards."
        self.dose(self, model, pred, loss)

    def rates(self, lrs, mom=math.nan):
        "The learning rates of the parameter groups and the momentum, as the next step uses them."
        if self.row is not None: self.row.lrs, self.row.mom = lrs, mom

    def begin_backward(self, scale=None):
        "`scale`: what the loss is multiplied by under mixed precision, a number or a 0-dim tensor; None for nothing."
        if self.builder.processes:                                             # the loss is the mean of all processes'
            scale = (1. if scale is None else scale) * self.builder.processes.n
        ps = self.parameters
        if ps.flags != [p.requires_grad for _, p in ps.all]: ps.attach(self.model, self.opt)   # unfrozen midway
        if self.row is not None and not self.row.parts: self.row.kept = ps.were_kept()
        if self.part is None or not self.row.measured: self.hooks.scale = scale
        else:                                          self.hooks.begin_backward(scale)

    @timed
    def end_backward(self):
        "The backward pass has run: the micro-batch belongs to the row."
        if self.part is None: self.hooks.mode = OFF; return
        part, self.part, self.hooks.mode = self.part, None, OFF
        part.open = False
        self.hooks.settle(part, self.parameters.tasks)
        self.row.parts.append(part)

    # --- a step ------------------------------------------------------------------------------------------------------

    def grads(self, exact=False):
        "The true gradient can be read: after unscaling, before clipping."
        if self.row is not None and self.row.parts and not self.row.read: self.parameters.gradients(self.row, exact)

    def before_update(self, sure=True):
        "The optimizer is about to step. `sure`: see ParameterReader.used; None: what it consumes is not known."
        now = self.row is not None and not self.row.read
        self.grads()
        if self.row is None or not self.row.read: return
        if sure is not None: self.parameters.used(self.row, now, sure)
        else: self.builder.ignore('grad_used, clip_factor', 'step hooks of torch may still change the gradients')
        self.parameters.weights(self.row)

    def after_update(self):
        if self.row is not None and self.row.read: self.parameters.updates(self.row)

    def skipped(self):
        "The step was not taken (an overflow under mixed precision): its gradients are a row, its update is 0."
        if self.row is None or self.row.done: return
        self.grads(exact=True)
        self.parameters.no_updates(self.row)

    def may_be_touched(self, p):
        "Whether a parameter has a gradient that no hook has seen come: by hand, or from another process' batch."
        if not (self.by_step or self.builder.processes): return False
        return bool((p.grad._values() if p.grad.is_sparse else p.grad).any())

    # --- rows --------------------------------------------------------------------------------------------------------

    @timed
    def commit(self):
        "Close the open row, if a backward pass of it has run."
        row, self.row, self.part, self.hooks.mode = self.row, None, None, OFF
        if row is not None and row.parts: self.builder.add(row)

    def end_epoch(self, normal=True, last=False):
        "The epoch's training has ended; `normal`: neither cancelled nor failed; `last`: of the fit."
        if last: self.commit()
        self._commit_done()
        b = self.builder
        b.end_epoch()
        if b.processes and normal: self.hooks.fired |= b.processes.merge(b, self.hooks.fired)
        if b.measured: self.hooks.silent()
        b.tell_ignored()

    def end_fit(self):
        "The fit has ended: an unfinished accumulation is a row that was not stepped."
        self.commit()
        if self.builder.rows and not self.builder.measured:
            every = self.plan.describe()['every']
            self.builder.tell('nothing measured', f"nothing was measured: every={every} was true at none of the "
                                                  f"{self.builder.rows} iterations, which are numbered from 0")
        self._tell_cost()

    def _tell_cost(self):
        "Say what recording has cost if that is more than was allowed, or much."
        if self.builder.rows < ROWS: return
        if self.budget is not None and self.budget.taken() > 1.25 * self.budget.share:
            self.builder.tell('cost', f"recording has taken {self.budget.taken():.0%} of the training time, not "
                                      f"{self.budget.share:.0%}: rows that are not measured take some too, and every "
                                      f"{ROWS}th is measured in any case")
        elif self.budget is None and (percent := self.clock.cost()['percent'] or 0) > DEAR:
            self.builder.tell('cost', f"recording has taken {percent:.0f} % of the training time: with budget=.05 as "
                                      f"many rows are measured as 5 % allow, with every=10 every tenth")

    def _commit_done(self):
        if self.part is not None and self.parameters.tasks: self.end_backward()
        if self.row is not None and (self.row.done or not self.row.parts): self.commit()

    def record(self):
        "All rows up to now, as a Record."
        self._commit_done()
        return self.builder.record(self.clock.cost())

    # --- reading -----------------------------------------------------------------------------------------------------

    def read(self, probe, layer, t, **about):
        "What is wanted of a tensor at a place."
        try: return self.reader.read(t, self.plan.wanted[probe], sample=self.plan.sample, **about)
        except Exception as e: raise self.builder.failure(e, probe, layer, t) from e.__cause__ or e

    def capture(self, part, probe, layer, t, **about):
        part.add(probe, layer, self.read(probe, layer, t, **about), self.plan.wanted[probe])
