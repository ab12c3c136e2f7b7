"""Plain loops: torch's global hooks show which module is called outermost while gradients are on. From its first call
on a Listening watch records it; what is not trained is let go."""
from __future__ import annotations

import warnings
import weakref
from functools import partial

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..measure.listeners import Listeners, running, stepping
from ..measure.listening import Listening, leaves_of
from ..measure.module_hooks import OFF, in_transform
from ..measure.plan import DEFAULTS, Plan
from ..measure.probes import ENDS, OUTPUTS
from ..measure.watcher import Watcher
from .names import owner, tensor_names, variable
from .runs import LEAST, Run

IDLE = 20                         # calls without a step after which a module is no model that is trained
CALL = torch.nn.Module._call_impl.__code__


class Leaves(torch.nn.Module):
    "Tensors that a loop trains without a module, as a model."
    def __init__(self, tensors):
        super().__init__()
        self._parameters.update(tensors)          # they are no nn.Parameter, which torch would ask for


class LoopRun(Run):
    "A run of a plain loop."
    def __init__(self, name, model, watch):
        self.watch, self.calls = watch, 0
        super().__init__(name, model, lambda: ('own' if watch.own else 'torch', watch.opt),
                         lambda: watch.record if watch.builder.rows or watch.last else None)

    @property
    def idle(self):
        "Whether it has been called often, and never trained."
        return (self.calls > IDLE and self.watch.opt is None and not self.watch.builder.rows and self.watch.last is None
                and not self.watch.watcher.parameters.tasks)

    def holds(self, module): return any(m is module for m in self.watch.model.modules())

    def close(self):
        "It is over; returns whether it was one."
        watch, self.watch = self.watch, None
        about = self.loop, self.optimizer         # leaving the watch forgets it
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', message='.*nothing was recorded')
            watch.__exit__(None)
        self._about = lambda: about
        self.keep()
        return self.record is not None and len(self.record) >= LEAST


class Loops:
    "`begin(run)` is called as a run begins, `end(run)` as it ends; `busy()`: whether another records now."
    def __init__(self, settings, begin, end, failed, busy):
        self.settings, self.begin, self.end, self.failed, self.busy = settings, begin, end, failed, busy
        self.depth = 0                            # of calls of modules
        self.open  = []                           # LoopRuns that record
        self.of    = weakref.WeakKeyDictionary()  # module -> its open run, or that of the model it is a layer of
        self.idle  = weakref.WeakSet()            # modules that have no parameters, or were not trained
        self.handles = [register_module_forward_pre_hook(self._begins),
                        register_module_forward_hook(self._ends, always_call=True),
                        register_optimizer_step_pre_hook(self._steps),
                        Listeners.add(torch.Tensor, 'backward', self._backward)]

    def remove(self):
        for h in self.handles: h.remove()
        self.handles = []
        self.close_all()

    def close_all(self):
        for run in [*self.open]: self._close(run)

    def _close(self, run):
        self.open.remove(run)
        for m in [m for m, r in self.of.items() if r is run]: del self.of[m]
        try: self.end(run, run.close())
        except Exception as e:
            self.failed(e)
            self.end(run, False)

    # --- events ------------------------------------------------------------------------------------------------------

    def _begins(self, module, args):
        depth = self.depth
        self.depth = depth + 1
        if depth or not torch.is_grad_enabled() or module in self.idle or self.busy(): return
        if torch.compiler.is_compiling() or in_transform(): return
        try: self._outermost(module, args)
        except Exception as e: self.failed(e)

    def _ends(self, module, args, out):
        if self.depth: self.depth -= 1

    def _steps(self, opt, args, kwargs):
        "What an optimizer steps is trained, whatever was thought of it."
        if not len(self.idle): return
        theirs = {id(p) for g in opt.param_groups for p in g['params']}
        for m in [m for m in self.idle if any(id(p) in theirs for p in m.parameters())]: self.idle.discard(m)

    def _backward(self, backward, loss, *args, **kwargs):
        if self.depth and not any(f.f_code is CALL for f in running()): self.depth = 0      # Ctrl-C in a forward pass
        try:
            if not self.depth: self._let_go()
            run = self._leaves(loss) if not self.depth and not self.busy() else None
        except Exception as e:
            self.failed(e)
            run = None
        if run is None: return backward()
        watch = run.watch                         # which has begun to listen too late for this call
        return watch.own._backward(partial(watch._around_backward, backward, loss), loss)

    # --- runs --------------------------------------------------------------------------------------------------------

    def _outermost(self, module, args):
        run = self.of.get(module)
        self._let_go(run)
        run = run or self._found(module)
        if run is None: return
        run.seen()
        watch = run.watch
        if module is not watch.model: watch.layer_begins(module, args)
        elif not run.calls:           watch._before(None, module, args, {})        # the hook of its own comes too late
        run.calls += 1
        if run.idle: watch.mode, watch.watcher.hooks.mode = False, OFF

    def _let_go(self, current=None):
        "Close the runs of what is called and not trained, but not the `current` one, whose model is being called."
        for run in [r for r in self.open if r.idle and r is not current]:
            self.idle.add(run.watch.model)
            self._close(run)

    def _found(self, module):
        "The run that begins with the first call of a module; None if there is nothing to train, or it is recorded."
        if not any(p.requires_grad for p in module.parameters()):
            if next(module.parameters(), None) is None: self.idle.add(module)
            return None
        model = owner(module) or module
        inner = {id(m) for m in model.modules()}
        if any(w.model is not None and (id(w.model) in inner or any(m is model for m in w.model.modules()))
               for w in [*Watcher.attached] if all(r.watch.watcher is not w for r in self.open)): return None
        if any(r.holds(model) and r.watch.model is not model for r in self.open): return None
        for r in [r for r in self.open if id(r.watch.model) in inner]: self._close(r)
        run = self._start(model, variable(model) or type(model).__name__)
        for m in ([model] if model is module else model.modules()): self.of[m] = run
        return run

    def _start(self, model, name, without=None):
        plan  = Plan(**{**DEFAULTS, 'window': 50, **self.settings, **(without or {})})
        watch = Listening(model, plan, called=without is None)
        watch.__enter__()
        opt = stepping()                          # whose closure calls the model: its first step is under way
        if opt is not None and watch.adopts(opt):
            watch.builder.ignore('the first step', 'it was under way when recording began')
        run = LoopRun(name, model, watch)
        watch.forgive = watch.watcher.hooks.forgive = lambda e: self._give_up(run, e)
        self.open.append(run)
        self.begin(run)
        return run

    def _give_up(self, run, e):
        self.failed(e)
        if run in self.open: self._close(run)

    def _leaves(self, loss):
        "The run of tensors of no known model that a backward pass reaches, as it begins: they are trained as they are."
        known = {id(p) for w in Watcher.attached if w.model is not None for p in w.model.parameters()}
        found = [t for t in leaves_of(loss) if not isinstance(t, torch.nn.Parameter)]
        if not found or any(id(t) in known for t in found): return None
        model = Leaves(tensor_names(found))
        return self._start(model, ', '.join(model._parameters), dict.fromkeys(OUTPUTS + ENDS))
