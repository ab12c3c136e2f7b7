"""Module hooks: what happens where a module of the watched model runs, and where a gradient comes back to its output.

Forward hooks and tensor hooks only: torch's module backward hooks refuse in-place activations. They read into the Part
of the forward pass that they belong to, and do nothing between the passes of a batch.
"""
from __future__ import annotations

import inspect
import weakref

import torch

from .clock import timed
from .probes import (OUTPUTS, PARAMETERS, bounds_of, functions_in, is_compiled, is_leaf, may_be_nonlinear, named,
                     nodes_within, only_reshapes, sites_of, tensors, unit_axis, unwrap)
from .reductions import base, plain
from .rows import Part

OFF, FORWARD, BACKWARD = 0, 1, 2


class Hook:
    "A hook: a weak reference to its owner and a fixed place; inert when copied or pickled."
    __slots__ = ('owner', 'act', 'place', 'always')
    def __init__(self, owner, act, place=None, always=False):
        self.owner, self.act, self.place, self.always = weakref.ref(owner), act, place, always
    def __call__(self, *args):
        o = self.owner and self.owner()
        if o is None or not (o.mode or self.always): return
        try: return getattr(o, self.act)(self.place, *args)
        except Exception as e:
            if o.forgive is None: raise
            o.forgive(e)
    def __deepcopy__(self, memo): return _inert()
    def __reduce__(self): return _inert, ()

def _inert():
    h = Hook.__new__(Hook)
    h.owner, h.act, h.place, h.always = None, '', None, False
    return h

def in_transform():
    "Whether a transform of torch.func is at work: its tensors have no values of their own."
    return torch._C._functorch.peek_interpreter_stack() is not None


class _Spare:
    "The sites that are read if no nonlinearity is found, and what was captured at them in the first forward pass."
    def __init__(self, targets): self.targets, self.sites, self.site_list, self.part = targets, {}, [], Part()


class ModuleHooks:
    "Puts hooks on a model, takes them off, and reads what they are shown."
    forgive = None                                # what is called if reading fails, in place of raising
    def __init__(self, watcher):
        self.watcher, self.plan, self.builder, self.clock = watcher, watcher.plan, watcher.builder, watcher.clock
        self.mode    = OFF
        self.part    = None                       # of the forward pass under way
        self.handles = []
        self.kept_on = None                       # a compiled model (weakly) that keeps its hooks from epoch to epoch
        self.targets, self.fired = [], set()      # [(name, module)] whose output is read, and who has run
        self.spare   = None                       # sites read until the first ones are known
        self.scale   = None                       # what the loss is multiplied by
        self.last_mark, self.calls = ('', -1), {}
        self.dormancy = False                     # whether dormant units are read in this pass
        self.nodes    = set() if self.plan.modules is None else None   # of autograd, left by modules; None: it is over
        # sites: without a graph in this forward pass (a reentrant checkpoint), not told apart when run again, whose
        # gradient was asked for, for which it came
        self.blind, self.doubtful, self.asked, self.answered = set(), set(), set(), set()

    # --- on and off --------------------------------------------------------------------------------------------------

    def attach(self, outer):
        "Put them on the model, which may stand within others, unless a compiled one has kept them."
        model = unwrap(outer)
        if self.kept_on is not None and self.kept_on() is model: return
        self.detach()
        why = why_no_hooks(outer)
        if why: return self.builder.ignore('activations', why)
        guard = (lambda h: h)
        if is_compiled(outer):                    # hooks added after a call was compiled without them would never fire
            forget_compiled(outer)
            guard, self.kept_on = torch.compiler.disable, weakref.ref(model)
        self._attach_to_modules(model, guard, self.kept_on is not None)

    def _attach_to_modules(self, model, guard, compiled):
        wanted = any(p in self.plan.stats for p in OUTPUTS)
        self.targets, spare = sites_of(model, self.plan.modules) if wanted else ([], [])
        if self.builder.spare_won is not None:
            self.targets, spare = spare if self.builder.spare_won and spare else self.targets, []
        self.spare = _Spare(spare) if spare else None
        owners = [(n, m) for n, m in [('', model), *named(model)] if m._parameters]
        hook   = lambda m, act, place: self.handles.append(m.register_forward_hook(guard(Hook(self, act, place))))
        if self.targets or not compiled and any(p in self.plan.stats for p in PARAMETERS):
            for n, m in owners:
                hook(m, 'passed', (n, unit_axis(m), is_leaf(m)))
                if not is_leaf(m): self.handles.append(m.register_forward_pre_hook(guard(Hook(self, 'began', n))))
        sure = self.plan.modules is not None and not isinstance(self.plan.modules, str)
        for act, targets in (('saw', self.targets), ('saw_spare', spare)):
            for n, m in targets:
                axis = unit_axis(m) if m._parameters else None
                hook(m, act, (n, axis, bounds_of(m), may_be_nonlinear(m) and not sure))

    def detach(self, keep=False):
        """Take the hooks off. `keep`: it goes on soon; those in a compiled model stay, and do nothing: what is compiled
        without them meanwhile would never call them."""
        self.mode, self.part = OFF, None
        if keep and self.kept_on: return
        for h in self.handles: h.remove()
        self.handles, self.kept_on = [], None

    # --- a forward and a backward pass -------------------------------------------------------------------------------

    def open(self, part, measured, dormancy):
        "A forward pass begins, which is captured in `part`."
        self.part, self.dormancy  = part, dormancy
        self.scale                = None
        self.last_mark, self.calls = ('', -1), {}
        self.blind.clear(); self.doubtful.clear()
        if self.spare: self.spare.part = Part(part.bs, part.last)
        self.mode = FORWARD if measured else OFF

    def end_forward(self, output=None):
        "`output`: what the model answered; the first time, activation functions that are no modules are named."
        if self.spare and self.mode == FORWARD: self._choose()
        if self.nodes is not None and self.mode == FORWARD:
            for name in functions_in(output, self.nodes) if self.targets else ():
                self.builder.ignore(f'{name} (a function)', 'it was called as a function, not as a module')
            self.nodes = None
        self.mode = OFF

    def _choose(self):
        "The first forward pass has shown whether any of the sites is a nonlinearity; if none, the spare ones are read."
        spare, self.spare = self.spare, None
        self.builder.spare_won = not self.builder.sites and bool(spare.sites)
        if not self.builder.spare_won: return
        self.targets = spare.targets
        self.builder.sites, self.builder.site_list = spare.sites, spare.site_list
        for k in ('sig', 'flat', 'hists', 'units'): getattr(self.part, k).extend(getattr(spare.part, k))
        spare.part.came = self.part.came          # what still comes back to it is the part's

    def begin_backward(self, scale):
        self.scale, self.last_mark = scale, (None, -1)
        if self.part is not None and 'grad_output' in self.plan.stats: self.mode = BACKWARD

    def settle(self, part, tasks):
        """Take into a part the output gradients that came by the backward passes `tasks`, which gave the parameters
        theirs; those of others (torch.autograd.grad beside them) lend it nothing."""
        came, part.came = part.came, []
        real = tasks if tasks and not self.blind else {t for t, *_ in came}    # a checkpoint has tasks of its own
        if not tasks and len(real) > 1 and came and not self.blind:
            self.builder.ignore('grad_output', 'several backward passes ran, and none of them left a gradient')
            real = ()
        for task, site, found in came:
            if task in real and site not in self.doubtful:
                part.add('grad_output', site, found, self.plan.wanted['grad_output'])

    # --- what the hooks do -------------------------------------------------------------------------------------------

    @timed
    def began(self, name, module, args):
        "A module that has parameters and modules of its own begins."
        if name not in self.builder.order: self.builder.order[name] = len(self.builder.order)

    @timed
    def passed(self, place, module, args, output):
        "Any module with parameters has run: it names the sites that follow and their unit axis."
        name, axis, leaf = place
        if name not in self.builder.order: self.builder.order[name] = len(self.builder.order)
        if not leaf: return
        self.last_mark = name, axis
        if self.mode == BACKWARD and self.blind:                             # run again by a checkpoint
            for _, t in tensors(output):
                if t.requires_grad: t.register_hook(Hook(self, 'part_ends'))

    def part_ends(self, place, g):
        "The gradient of what a checkpoint ran again is under way: what it runs next is another part of the model."
        self.last_mark = None, -1

    def saw_spare(self, place, *args):
        "A module that is read in place of the nonlinearities if there are none."
        b, spare = self.builder, self.spare
        if spare is None: return self.saw(place, *args) if b.spare_won else None
        kept = b.sites, b.site_list, self.part
        b.sites, b.site_list, self.part = spare.sites, spare.site_list, spare.part
        try: self.saw(place, *args)
        finally: b.sites, b.site_list, self.part = kept

    @timed
    def saw(self, place, module, args, output):
        "A module whose output is read has run."
        name, axis, bounds, unsure = place
        if in_transform(): return self.builder.ignore(name, 'it ran within a transform of torch.func')
        if self.mode == BACKWARD: return self._saw_again(place, output)
        self.fired.add(name)
        if self.builder.ignored: self.builder.ignored.pop(name, None)
        if self.plan.per_call:  after = self.calls[name] = self.calls.get(name, -1) + 1
        else:                   after = self.last_mark[0] if axis is None else None
        if axis is None: axis = self.last_mark[1]
        for path, t in tensors(output):
            if not t.is_floating_point(): self.unreal(name + path, t); continue
            if self.nodes is not None: self.nodes |= nodes_within(args, t)
            site = self.builder.sites.get((name, path, after))
            if site is None:
                if unsure and self._is_none(args, t, output): continue
                site = self.builder.add_site((name, path, after), type(module).__name__, t.shape[1:])
            if 'activation' in self.plan.stats: self._read_site((name, path, after), site, base(t), axis, bounds)
            if   t.requires_grad and not t.is_leaf: self._ask(t, site, bounds)
            elif not torch.is_grad_enabled():   self.blind.add(site)

    def _is_none(self, args, t, output):
        """Whether a module that may be a nonlinearity is none, by its first call: a Flatten of one's own; what prepares
        the input, before any layer; what comes to nothing that depends on its input's values, such as anchors."""
        if only_reshapes(args, output): return True
        if t.requires_grad or not torch.is_grad_enabled(): return False
        return not self.last_mark[0] or any(x.requires_grad for _, x in tensors(args))

    def _read_site(self, key, site, t, axis, bounds):
        plan, units = self.plan, ()
        dim = self._unit_dim(key, t, axis) if plan.units and t.dim() > 1 else None
        if dim is not None and self.builder.same_units(site, t.shape[dim]):
            units = plan.units if self.dormancy else plan.always
        elif dim is not None:
            dim = None
            self.builder.ignore(f'{key[0]}{key[1]} (units)', 'the number of its units changes from batch to batch')
        self.watcher.capture(self.part, 'activation', site, t, unit_dim=dim, bounds=bounds, units=units)

    def _unit_dim(self, key, t, axis):
        "The axis of the units: the one that was given where `t` has it, else that of the layer before."
        given = self.plan.unit_dim
        if given is None: return axis
        if -t.dim() <= given < t.dim(): return given
        self.builder.tell(f'unit_dim {key}', f"unit_dim={given} is not an axis of {key[0] or 'model'}{key[1]}, whose "
                                             f"output has {t.dim()}; its units are read on axis {axis}")
        return axis

    def _saw_again(self, place, output):
        """A checkpoint runs a module again in the backward pass. If it is reentrant, only this run has a gradient;
        the place is the one that the module had after the same layer, or the only one that ran without a graph."""
        name, axis, bounds, _ = place
        for path, t in tensors(output):
            if not (self.blind and t.is_floating_point() and t.requires_grad): continue
            sites = self.builder.sites
            could = [s for (n, p, _), s in sites.items() if n == name and p == path and s in self.blind]
            known = None if self.plan.per_call or axis is None and self.last_mark[0] is None else \
                    sites.get((name, path, self.last_mark[0] if axis is None else None))
            if   known in could:  self._ask(t, known, bounds)
            elif len(could) == 1: self._ask(t, could[0], bounds)
            elif could:
                self.doubtful.update(could)
                self.builder.ignore(f'{name}{path} (grad_output)',
                                    'a checkpoint runs it again and does not tell which of its calls that is')

    def _ask(self, t, site, bounds):
        "Have the gradient with respect to `t` read when it comes."
        if 'grad_output' not in self.plan.stats: return
        if self.spare is None: self.asked.add(site)
        t.register_hook(Hook(self, 'saw_grad', (site, bounds, self.builder.sites, self.part)))

    @timed
    def saw_grad(self, place, g):
        site, bounds, sites, part = place
        if g is None or self.mode != BACKWARD or not part.open or sites is not self.builder.sites: return
        self.last_mark = None, -1                                        # what a checkpoint runs next is another part
        self.answered.add(site)
        g = plain(g)
        if self.scale is not None: g = g / self.scale
        part.came.append((torch._C._current_graph_task_id(), site,
                          self.watcher.read('grad_output', site, g, bounds=bounds)))

    def unreal(self, name, t):
        "Complex and integer values are not measured, but named."
        self.builder.ignore(name, f'its values are {t.dtype}'.replace('torch.', ''))

    def silent(self):
        "Name what never ran as a module, and outputs to which no gradient came back."
        for n, _ in self.targets:
            if n not in self.fired: self.builder.ignore(n, 'its forward was never called as a module')
        if not self.asked - self.answered: return
        names = self.builder.site_names()
        for k in self.asked - self.answered:
            self.builder.ignore(f'{names[k]} (grad_output)', 'no gradient came back through its output')


def why_no_hooks(model):
    "Why the modules of a model cannot be hooked; None if they can."
    for m in model.modules():
        if isinstance(m, torch.jit.ScriptModule): return 'a part of the model is scripted and calls no hooks of Python'
        if _breaks_nowhere(m):
            return 'the model is compiled with fullgraph=True, which no hook may break'

def _breaks_nowhere(m):
    "Whether a module is compiled with fullgraph=True, as a wrapper or in place."
    cells = getattr(getattr(m, '_compiled_call_impl', None), '__closure__', None) or ()
    return any(getattr(c, 'fullgraph', False) for c in (getattr(m, 'dynamo_ctx', None),
                                                        *(cell.cell_contents for cell in cells)))

def forget_compiled(model):
    "Have compiled modules compiled anew at their next call, with the hooks they have by then."
    for m in model.modules():
        made = getattr(m, '_compiled_call_impl', None) or (m.forward if type(m).__name__ == 'OptimizedModule' else None)
        for f in (made, getattr(made, '_torchdynamo_orig_callable', None), type(unwrap(m)).forward if made else None):
            code = getattr(inspect.unwrap(f), '__code__', None) if f is not None else None
            if code is not None: torch._dynamo.eval_frame.remove_from_cache(code)
