"""Hooks: what happens where a module of the watched model runs, and where a gradient comes back to its output."""
from __future__ import annotations

import math
import time
import weakref
from functools import wraps

import torch

from .record_builder import Part
from .optimizer_info import describe
from .readers import choose
from .probes import (OUTPUTS, PARAMETERS, bounds_of, is_compiled, is_leaf, may_be_nonlinear, named, named_params,
                     only_reshapes, sites_of, tensors, unit_axis, unwrap)
from .distributed import Processes
from .reductions import base, plain

OFF, FORWARD, BACKWARD = 0, 1, 2


class _Hook:
    "A module or tensor hook: a weak reference to the watcher and a fixed place; inert when copied or pickled."
    __slots__ = ('watcher', 'act', 'place')
    def __init__(self, watcher, act, place): self.watcher, self.act, self.place = weakref.ref(watcher), act, place
    def __call__(self, *args):
        w = self.watcher and self.watcher()
        if w is not None and w.mode: getattr(w, self.act)(self.place, *args)
    def __deepcopy__(self, memo): return _inert()
    def __reduce__(self): return _inert, ()

def _inert():
    h = _Hook.__new__(_Hook)
    h.watcher, h.act, h.place = None, '', None
    return h

def timed(f):
    "Add the time that a method takes to `spent`; take the hooks off if it fails."
    @wraps(f)
    def call(self, *args, **kwargs):
        if self.timing: return f(self, *args, **kwargs)
        t = time.perf_counter()
        self.timing = True
        try: return f(self, *args, **kwargs)
        except Exception:
            self.detach()
            raise
        finally:
            self.timing = False
            self.spent += time.perf_counter() - t
    return call


class _Spare:
    "The sites that are read if no nonlinearity is found, and what was captured at them in the first forward pass."
    def __init__(self, targets): self.targets, self.sites, self.site_list, self.part = targets, {}, [], Part()


class Hooks:
    "The hooks of a Watcher: putting them on, taking them off, and reading what they are shown."
    def attach(self, model, opt=None):
        "Register the hooks; the model may have changed since the last time (unfrozen, wrapped, compiled)."
        again = self.kept_on is not None and self.kept_on() is unwrap(model)
        self.detach(keep=again)
        self.log.share_with(Processes.of(model))
        if not again: self._attach_modules(unwrap(model), is_compiled(model))
        self.model, self.opt = unwrap(model), opt
        self._attach_params()
        self.log.meta.setdefault('model', type(self.model).__name__)
        if opt is not None: self.log.meta['optimizer'] = describe(opt)
        self.reader = choose(self.model, self.host)
        self._since = time.perf_counter()

    def _attach_modules(self, model, compiled):
        guard = (lambda h: h)
        if compiled:                              # hooks added after a call was compiled without them would never fire
            torch._dynamo.reset()
            guard, self.kept_on = torch.compiler.disable, weakref.ref(model)
        wanted = any(p in self.plan.stats for p in OUTPUTS)
        self.targets, spare = sites_of(model, self.plan.modules) if wanted else ([], [])
        if self.log.spare_won is not None:
            self.targets, spare = spare if self.log.spare_won and spare else self.targets, []
        self.spare = _Spare(spare) if spare else None
        owners = [(n, m) for n, m in [('', model), *named(model)] if m._parameters]
        hook   = lambda m, act, place: self.handles.append(m.register_forward_hook(guard(_Hook(self, act, place))))
        if self.targets or not compiled and any(p in self.plan.stats for p in PARAMETERS):
            for n, m in owners:
                hook(m, 'passed', (n, unit_axis(m), is_leaf(m)))
                if not is_leaf(m): self.handles.append(m.register_forward_pre_hook(guard(_Hook(self, 'began', n))))
        sure = self.plan.modules is not None and not isinstance(self.plan.modules, str)
        for act, targets in (('saw', self.targets), ('saw_spare', spare)):
            for n, m in targets:
                axis = unit_axis(m) if m._parameters else None
                hook(m, act, (n, axis, bounds_of(m), may_be_nonlinear(m) and not sure))

    def _attach_params(self):
        "Note which parameters are trained, and have each say when it received a gradient."
        for h in self.param_handles: h.remove()
        self.all, self.params, self.param_handles, self.lazy = [], [], [], False
        for name, owner, m, p in named_params(self.model):
            if isinstance(p, torch.nn.parameter.UninitializedParameter): self.lazy = True; continue
            if name not in self.log.param_at:
                self.log.param_at[name] = len(self.log.param_list)
                self.log.param_list.append(dict(layer=name, module=owner, type=type(m).__name__, numel=p.numel(),
                                            shape='x'.join(map(str, p.shape)), ndim=p.dim()))
            self.all.append((self.log.param_at[name], p))
            if p.requires_grad:
                self.params.append((self.log.param_at[name], p))
                self.param_handles.append(p.register_post_accumulate_grad_hook(self.touched.add))
        self.flags = [p.requires_grad for _, p in self.all]
        self.set_optimizer(self.opt)

    def set_optimizer(self, opt):
        "Which parameter group each parameter is in, and the eps of an optimizer that keeps a second moment."
        self.group, self.eps = {}, {}
        if opt is None: return
        groups = ([(ps, h, 'sqr_mom' in h) for ps, h in zip(opt.param_lists, opt.hypers)] if hasattr(opt, 'param_lists')
                  else [(g['params'], g, True) for g in opt.param_groups])
        where  = {id(p): i for i, (ps, _, _) in enumerate(groups) for p in ps}
        for i, p in self.params:
            if id(p) not in where: continue
            self.group[i] = where[id(p)]
            _, h, second  = groups[where[id(p)]]
            if second and h.get('eps') is not None: self.eps[i] = float(h['eps'])

    def detach(self, keep=False):
        """Take the hooks off. `keep`: it goes on soon; those in a compiled model stay, and do nothing: what is compiled
        without them meanwhile would never call them."""
        if not (keep and self.kept_on):
            for h in self.handles: h.remove()
            self.handles, self.kept_on = [], None
        for h in self.param_handles: h.remove()
        self.param_handles, self.all, self.flags = [], [], []
        self.model, self.opt, self.params, self.mode = None, None, [], OFF
        if self._since is not None: self.of += time.perf_counter() - self._since
        self._since = None
        self.reader.forget()

    @timed
    def began(self, name, module, args):
        "A module that has parameters and modules of its own begins."
        if name not in self.log.order: self.log.order[name] = len(self.log.order)

    @timed
    def passed(self, place, module, args, output):
        "Any module with parameters has run: it names the sites that follow and their unit axis."
        name, axis, leaf = place
        if name not in self.log.order: self.log.order[name] = len(self.log.order)
        if not leaf: return
        self.last_mark = name, axis
        if self.mode == BACKWARD and self.blind:                             # run again by a checkpoint
            for _, t in tensors(output):
                if t.requires_grad: t.register_hook(_Hook(self, 'part_ends', None))

    def part_ends(self, place, g):
        "The gradient of what a checkpoint ran again is under way: what it runs next is another part of the model."
        self.last_mark = None, -1

    def saw_spare(self, place, *args):
        "A module that is read in place of the nonlinearities if there are none."
        log, spare = self.log, self.spare
        if spare is None: return self.saw(place, *args) if log.spare_won else None
        kept = log.sites, log.site_list, self.part
        log.sites, log.site_list, self.part = spare.sites, spare.site_list, spare.part
        try: self.saw(place, *args)
        finally: log.sites, log.site_list, self.part = kept

    @timed
    def saw(self, place, module, args, output):
        "A module whose output is read has run."
        name, axis, bounds, unsure = place
        if self.mode == BACKWARD: return self._saw_again(place, output)
        self.fired.add(name)
        if self.log.ignored: self.log.ignored.pop(name, None)
        if self.plan.per_call:  after = self.calls[name] = self.calls.get(name, -1) + 1
        else:                   after = self.last_mark[0] if axis is None else None
        if axis is None: axis = self.last_mark[1]
        for path, t in tensors(output):
            if not t.is_floating_point(): self._unreal(name + path, t); continue
            site = self.log.sites.get((name, path, after))
            if site is None:
                if unsure and only_reshapes(args, output): continue          # a Flatten of one's own is no nonlinearity
                site = self.log.sites[name, path, after] = len(self.log.site_list)
                self.log.site_list.append(dict(name=name, path=path, type=type(module).__name__, after=after,
                                           shape='x'.join(map(str, t.shape[1:])), numel=math.prod(t.shape[1:])))
            if 'activation' in self.plan.stats: self._read_site((name, path, after), site, base(t), axis, bounds)
            if   t.requires_grad:               self._ask(t, site, bounds)
            elif not torch.is_grad_enabled():   self.blind.add(site)

    def _read_site(self, key, site, t, axis, bounds):
        plan = self.plan
        dim  = self._unit_dim(key, t, axis) if plan.units and t.dim() > 1 else None
        self._capture(self.part, 'activation', site, t, unit_dim=dim, bounds=bounds,
                      units=plan.units if self.dormancy else plan.always)

    def _unit_dim(self, key, t, axis):
        "The axis of the units: the one that was given where `t` has it, else that of the layer before."
        given = self.plan.unit_dim
        if given is None: return axis
        if -t.dim() <= given < t.dim(): return given
        self.log.tell(f'unit_dim {key}', f"unit_dim={given} is not an axis of {key[0] or 'model'}{key[1]}, whose "
                                         f"output has {t.dim()}; its units are read on axis {axis}")
        return axis

    def _saw_again(self, place, output):
        """A checkpoint runs a module again in the backward pass. If it is reentrant, only this run has a gradient;
        the place is the one that the module had after the same layer, or the only one that ran without a graph."""
        name, axis, bounds, _ = place
        for path, t in tensors(output):
            if not (self.blind and t.is_floating_point() and t.requires_grad): continue
            could = [s for (n, p, _), s in self.log.sites.items() if n == name and p == path and s in self.blind]
            known = None if self.plan.per_call or axis is None and self.last_mark[0] is None else \
                    self.log.sites.get((name, path, self.last_mark[0] if axis is None else None))
            if   known in could:  self._ask(t, known, bounds)
            elif len(could) == 1: self._ask(t, could[0], bounds)
            elif could:
                self.doubtful.update(could)
                self.log.ignore(f'{name}{path} (grad_output)',
                                'a checkpoint runs it again and does not tell which of its calls that is')

    def _forget(self, probe, sites):
        "Drop what the micro-batch has captured at a probe of these sites."
        part, at = self.part, 0
        sig, flat = [], []
        for p, k in part.sig:
            n = self.plan.wanted[p].size
            if p != probe or k not in sites: sig.append((p, k)); flat += part.flat[at:at + n]
            at += n
        part.sig, part.flat = sig, flat
        part.hists = [h for h in part.hists if h[0] != probe or h[2] not in sites]

    def _ask(self, t, site, bounds):
        "Have the gradient with respect to `t` read when it comes."
        if 'grad_output' not in self.plan.stats: return
        if self.spare is None: self.asked.add(site)
        t.register_hook(_Hook(self, 'saw_grad', (site, bounds, self.log.sites)))

    @timed
    def saw_grad(self, place, g):
        site, bounds, sites = place
        if self.part is None or g is None or self.mode != BACKWARD or sites is not self.log.sites: return
        self.last_mark = None, -1                                        # what a checkpoint runs next is another part
        self.answered.add(site)
        g = plain(g)
        if self.scale is not None: g = g / self.scale
        self._capture(self.part, 'grad_output', site, g, bounds=bounds)

    def _unreal(self, name, t):
        "Complex and integer values are not measured, but named."
        self.log.ignore(name, f'its values are {t.dtype}'.replace('torch.', ''))

    def _capture(self, part, probe, layer, t, **about):
        "Read a tensor at a place."
        wanted = self.plan.wanted[probe]
        try: found = self.reader.read(t, wanted, sample=self.plan.sample, **about)
        except Exception as e: raise self.log.failure(e, probe, layer, t) from e.__cause__ or e
        part.add(probe, layer, found, wanted)
