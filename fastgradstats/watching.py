"""Watching a model train: hooks, rows, windows. No framework: fastai's callbacks and the plain-loop `watch` drive it.

A host calls, for each training batch: `begin` (opens a row, or the next micro-batch of the open row), `end_forward`,
`loss`, `backward_begins`, `backward_done`, then for an optimizer step `grads` (the true gradient), `before_update` (the
consumed one, the weights) and `after_update`; or `skipped`; nothing where it only accumulates. Rows are committed when
the next one begins, so that nothing that happens after the step can lose one. Hooks do nothing unless a batch is under way.
"""
from __future__ import annotations

import math
import random
import time
import weakref
from contextlib import contextmanager
from functools import wraps

import numpy as np
import torch

from . import kernels
from .gathering import MIN_WINDOW, Gathering, Part, Row
from .planning import DEFAULTS, Plan
from .processes import Processes
from .probes import (OUTPUTS, PARAMETERS, bounds_of, is_compiled, is_leaf, may_be_nonlinear, named, only_reshapes, params_of,
                     sites_of, tensors, unit_axis, unwrap)
from .views import SMALL, View, plain, read_small, small_ones, together, warm_up

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

def _timed(f):
    "Add the time that a method takes to `spent`; take the hooks off if it fails."
    @wraps(f)
    def timed(self, *args, **kwargs):
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
    return timed


class Watcher:
    "Records one model: attach, drive it batch by batch, detach, read `record()`; attach again for the next epoch or fit."
    def __init__(self, plan, *, host=None):
        self.plan, self.host = plan, host
        self.mode     = OFF
        self.row      = self.part = None
        self.touched  = set()                     # parameters that received a gradient in this micro-batch
        self.window   = set()                     # and in this row
        self.log      = Gathering(plan)
        self.handles, self.param_handles = [], []
        self.kept_on = None                       # a compiled model (weakly) that keeps its hooks from epoch to epoch
        self.model, self.opt = None, None
        self.all, self.params, self.flags = [], [], []            # (number, parameter): all, those trained; requires_grad of all
        self.fired, self.targets = set(), []
        self.spare, self.lazy    = None, False    # sites read beside the first ones until these are known; parameters to come
        # sites: without a graph in this forward pass (a reentrant checkpoint), not told apart when run again, whose gradient
        # was asked for, for which it came
        self.blind, self.doubtful, self.asked, self.answered = set(), set(), set(), set()
        self.spent = self.of = 0.
        self.timing = False
        self._since = None
        self._old   = {}
        self._few   = []

    # --- hooks -------------------------------------------------------------------------------------------------------
    def attach(self, model, opt=None):
        "Register the hooks; the model may have changed since the last time (unfrozen, wrapped, compiled)."
        again = self.kept_on is not None and self.kept_on() is unwrap(model)
        self.detach(keep=again)
        self.log.share_with(Processes.of(model))
        if not again: self._attach_modules(unwrap(model), is_compiled(model))
        self.model, self.opt = unwrap(model), opt
        self._attach_params()
        self.log.meta.setdefault('model', type(self.model).__name__)
        if self.host is not False: warm_up()
        self._since = time.perf_counter()

    def _attach_modules(self, model, compiled):
        guard = (lambda h: h)
        if compiled:                              # hooks added after a call was compiled without them would never fire
            torch._dynamo.reset()
            guard, self.kept_on = torch.compiler.disable, weakref.ref(model)
        self.targets, spare = sites_of(model, self.plan.modules) if any(p in self.plan.stats for p in OUTPUTS) else ([], [])
        if self.log.spare_won is not None: self.targets, spare = spare if self.log.spare_won and spare else self.targets, []
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
                hook(m, act, (n, unit_axis(m) if m._parameters else None, bounds_of(m), may_be_nonlinear(m) and not sure))

    def _attach_params(self):
        "Note which parameters are trained, and have each say when it received a gradient."
        for h in self.param_handles: h.remove()
        self.all, self.params, self.param_handles, self.lazy = [], [], [], False
        for name, owner, m, p in params_of(self.model, self.plan.modules):
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
        """Take the hooks off. `keep`: it goes on soon; those in a compiled model stay then, and do nothing, since what is compiled
        without them meanwhile would never call them."""
        if not (keep and self.kept_on):
            for h in self.handles: h.remove()
            self.handles, self.kept_on = [], None
        for h in self.param_handles: h.remove()
        self.param_handles, self.all, self.flags = [], [], []
        self.model, self.opt, self.params, self.mode = None, None, [], OFF
        if self._since is not None: self.of += time.perf_counter() - self._since
        self._since, self._old = None, {}

    # --- one batch ---------------------------------------------------------------------------------------------------
    @_timed
    def begin(self, i, *, bs=0, fit=0, epoch=0, left=None, t=math.nan):
        """A training batch begins: number `i` over the model's life. `left`: batches left in the epoch, this one included.
        Returns whether it is measured."""
        if self.part is not None and self.touched: self.backward_done()      # someone cancelled the batch after its backward
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

    @_timed
    def capture_end(self, probe, x):
        "The model's input or output."
        if self.part is None or not self.row.measured or probe not in self.plan.stats: return
        for path, t in tensors(x):
            if not t.is_floating_point(): self._unreal(f'{probe}{path}', t); continue
            names = self.log.ends[probe]
            if path not in [n for n, *_ in names]: names.append((path, str(t.dtype).replace('torch.', '')))
            self._capture(self.part, probe, [n for n, _ in names].index(path),
                          View(t, self.plan.sample, host=self.host, sampled=self.plan.sampled[probe]))

    @_timed
    def loss(self, loss, constant=None):
        "The batch's loss, and a function that gives the loss of answering with the batch's mean output."
        if self.part is None: return
        self.part.loss = self._scalar(loss)
        if constant is not None and self.row.measured: self.part.constant = self._scalar(constant())

    def rates(self, lrs, mom=math.nan):
        "The learning rates of the parameter groups and the momentum, as the next step uses them."
        if self.row is not None: self.row.lrs, self.row.mom = lrs, mom

    def backward_begins(self, scale=None):
        "`scale`: what the loss is multiplied by under mixed precision, a number or a 0-dim tensor; None for nothing."
        if self.log.processes: scale = (1. if scale is None else scale) * self.log.processes.n       # the loss is all processes' mean
        self.scale, self.last_mark = scale, (None, -1)
        if self.flags != [p.requires_grad for _, p in self.all]: self._attach_params()       # unfrozen in the middle
        if self.part is not None and self.row.measured and 'grad_output' in self.plan.stats: self.mode = BACKWARD

    @_timed
    def backward_done(self):
        "The backward pass has run: the micro-batch belongs to the row."
        self.mode = OFF
        if self.part is None: return
        if self.doubtful: self._forget('grad_output', self.doubtful)
        self.row.parts.append(self.part)
        self.part = None
        self.window |= self.touched
        self.touched.clear()

    @_timed
    def grads(self, exact=False):
        "Read the true gradient: after unscaling, before clipping. `exact`: count non-finite elements without sampling."
        if self.row is None or not self.row.parts or self.row.read: return
        self.row.read = True
        if not self.row.measured: return
        self.window |= self.touched
        self.got = [(i, p) for i, p in self.params if p.grad is not None and
                    (p in self.window or self.log.processes and bool(p.grad.any()))]      # or another process' batch used it
        norms    = self._capture_params('grad', [p.grad for _, p in self.got], None if exact else self.plan.sample)
        self.row.grad_norm = _total(norms)
        self.seen_grads = [(id(p.grad), p.grad._version) for _, p in self.got]

    @_timed
    def before_update(self, sure=True):
        """The optimizer is about to step: the gradient it consumes, and the weights. `sure`: whoever changed a gradient since
        `grads` did it in a way that its version counter shows (`p.grad.data` would not)."""
        now = self.row is not None and not self.row.read
        self.grads()
        if self.row is None or not self.row.read or not self.row.measured: return
        same = now or sure and self.seen_grads == [(id(p.grad), p.grad._version) for _, p in self.got]
        if not same or 'grad_used' in self.plan.stats:
            norms = self._capture_params('grad_used', [p.grad for _, p in self.got])
        if self.got: self.row.clip = 1. if same else _divide(_total(norms), self.row.grad_norm)
        norms = self._keep() if 'update' in self.plan.stats and self.got else {}
        if 'weight' in self.plan.stats: self._capture_params('weight', [p for _, p in self.got], norms=norms)

    @_timed
    def after_update(self):
        if self.row is None or not self.row.read: return
        self.row.stepped = self.row.done = True
        if not self.row.measured or 'update' not in self.plan.stats: return
        lrs = self.row.lrs or ()
        self.row.layer_lrs = {i: lrs[self.group[i]] for i, _ in self.got if self.group.get(i, len(lrs)) < len(lrs)}
        norms, diff = {}, {}
        with torch.no_grad():
            if self._few:
                now, ends = together([self.got[k][1] for k in self._few])
                found     = np.empty(len(ends))
                kernels.distances(now, self._kept, ends, found)
                norms     = dict(zip(self._few, found.tolist()))
            for k, (i, p) in enumerate(self.got):
                if k in norms: continue
                if p.dtype.itemsize < 4: diff[i] = p.float() - self._old[i].float()      # in half precision it would be rounded
                elif 'update' in self.plan.only_norm and self._in_one_pass(p):
                    norms[k] = math.sqrt(kernels.advance(_array(p), _array(self._old[i])))
                else: diff[i] = torch.sub(p, self._old[i], out=self._old[i])
        self._capture_params('update', [diff.get(i, p) for i, p in self.got], norms=norms)

    def _keep(self):
        """One copy of the parameters about to change. The small ones are copied one behind the other; a large one mostly is
        there already, as it was after the last step. Returns the norms found on the way, by their place in `got`."""
        fast, norms, rest = self.host is not False and 'update' in self.plan.only_norm, {}, []
        self._few = small_ones([p for _, p in self.got]) if fast else []
        if self._few:
            self._kept, ends = together([self.got[k][1] for k in self._few])
            found = np.empty(len(ends))
            kernels.norms(self._kept, ends, found)
            norms = dict(zip(self._few, found.tolist()))
        for k, (i, p) in enumerate(self.got):
            if k in norms: continue
            if i not in self._old or self._old[i].shape != p.shape or self._old[i].device != p.device:
                self._old[i] = torch.empty_like(p, requires_grad=False).zero_()
            if fast and self._in_one_pass(p): norms[k] = math.sqrt(kernels.synchronise(_array(p), _array(self._old[i])))
            else: rest.append((i, p))
        with torch.no_grad():
            if rest: torch._foreach_copy_([self._old[i] for i, _ in rest], [p for _, p in rest])
        return norms

    def _in_one_pass(self, p):
        return p.numel() > SMALL and p.device.type == 'cpu' and p.dtype == torch.float32 and p.is_contiguous()

    @_timed
    def skipped(self):
        "The step was not taken (an overflow under mixed precision): its gradients are a row, its update is 0."
        if self.row is None or self.row.done: return
        self.grads(exact=True)
        self.row.done = True
        if not self.row.read or not self.row.measured: return
        if 'weight' in self.plan.stats: self._capture_params('weight', [p for _, p in self.got])
        if 'update' in self.plan.stats: self._capture_params('update', [torch.zeros(1).expand(p.shape) for _, p in self.got])

    def zeroed(self):
        "The gradients are about to be zeroed; if the open row has not been stepped, its step was skipped."
        row, part, mode = self.row, self.part, self.mode
        if row is None or not row.parts or row.done: return
        self.skipped()
        if part is None: return
        self.commit()                                        # the forward pass under way belongs to the next row
        self.row, self.part, self.mode = Row(row.measured and self.plan.due(self.log.rows, part.last), row.about), part, mode
        self.window.clear()

    # --- reading tensors ---------------------------------------------------------------------------------------------
    @_timed
    def began(self, name, module, args):
        "A module that has parameters and modules of its own begins."
        if name not in self.log.order: self.log.order[name] = len(self.log.order)

    @_timed
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

    @_timed
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
            if 'activation' in self.plan.stats:
                dim = self.plan.unit_dim if self.plan.unit_dim is not None else axis
                dim = dim if t.dim() >= 2 and -t.dim() <= dim < t.dim() else -1
                v   = View(t, self.plan.sample, dim if t.dim() > 1 and self.plan.units else None, bounds, host=self.host)
                if v.unit_dim is not None and v.n: self._capture_units(site, v)
                self._capture(self.part, 'activation', site, v)
            if   t.requires_grad:               self._ask(t, site, bounds)
            elif not torch.is_grad_enabled():   self.blind.add(site)

    def _saw_again(self, place, output):
        """A checkpoint runs a module again in the backward pass. If it is a reentrant one, only this run has a gradient; the
        place is the one that the module had after the same layer, or the only one that ran without a graph."""
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
                self.log.ignore(f'{name}{path} (grad_output)', 'a checkpoint runs it again and does not tell which of its calls '
                                                               'that is')

    def _forget(self, probe, sites):
        "Drop what the micro-batch has captured at a probe of these sites."
        part, at = self.part, 0
        sig, flat = [], []
        for p, k in part.sig:
            n = self.log._offsets(p)[None]
            if p != probe or k not in sites: sig.append((p, k)); flat += part.flat[at:at + n]
            at += n
        part.sig, part.flat = sig, flat
        part.hists = [h for h in part.hists if h[0] != probe or h[2] not in sites]

    def _ask(self, t, site, bounds):
        "Have the gradient with respect to `t` read when it comes."
        if 'grad_output' not in self.plan.stats: return
        if self.spare is None: self.asked.add(site)
        t.register_hook(_Hook(self, 'saw_grad', (site, bounds, self.log.sites)))

    @_timed
    def saw_grad(self, place, g):
        site, bounds, sites = place
        if self.part is None or g is None or self.mode != BACKWARD or sites is not self.log.sites: return
        self.last_mark = None, -1                                            # what a checkpoint runs next is another part
        self.answered.add(site)
        g = plain(g)
        if self.scale is not None: g = g / self.scale
        self._capture(self.part, 'grad_output', site, View(g, self.plan.sample, None, bounds, host=self.host))

    def _unreal(self, name, t):
        "Complex and integer values are not measured, but named."
        self.log.ignore(name, f'its values are {t.dtype}'.replace('torch.', ''))

    def _capture_params(self, probe, ts, sample=..., norms=()):
        """Read one tensor of every parameter that received a gradient; returns their norms, numbers or 0-dim tensors.
        `norms`: those that are known already, by their place in `got`."""
        stats, own = self.plan.stats.get(probe), self.row.own
        if stats is None or probe in self.plan.only_norm:
            norms = self._norms(ts, norms)
            if stats:
                for (i, p), n in zip(self.got, norms):
                    if p.numel(): own.sig.append((probe, i)); own.flat += (p.numel(), n)
            return norms
        sample = self.plan.sample if sample is ... else sample
        done   = {}
        if self.host is not False and self.plan.small[probe] and (sample is None or sample >= SMALL):
            which, numbers, norms, hists = read_small(ts, ['n', *self.plan.reads[probe]])
            for k, found, norm, hist in zip(which, numbers, norms, hists):
                i, p    = self.got[k]
                done[k] = norm
                own.sig.append((probe, i))
                own.flat += found
                if p.dim() > 1:
                    for s in self.plan.hists[probe]: own.hists.append((probe, s.name, i, hist))
        for k, (t, (i, p)) in enumerate(zip(ts, self.got)):
            if k in done: continue
            v = View(t, sample, eps=self.eps.get(i), host=self.host)
            self._capture(own, probe, i, v, hist=p.dim() > 1)
            done[k] = v.norm
        return [done[k] for k in range(len(ts))]

    def _norms(self, ts, known=()):
        "The 2-norm of every tensor; on the CPU those of the small ones in one call."
        out = dict(known)
        few = small_ones(ts) if len(out) < len(ts) and self.host is not False else []
        if few:
            x, ends = together([ts[k] for k in few])
            found   = np.empty(len(ends))
            kernels.norms(x, ends, found)
            out.update(zip(few, found.tolist()))
        return [out[k] if k in out else View(t, None, host=self.host, sampled=False).norm for k, t in enumerate(ts)]

    def _capture(self, part, probe, layer, view, hist=True):
        if not view.n: return
        s, at = None, len(part.flat)
        try:
            part.flat.extend(self.plan.get[probe](view))
            for s in self.plan.scalars[probe]:
                if s.reads: continue
                own = self._own(s, view)
                if len(own) != self.log.widths.setdefault(s.name, len(own)):
                    raise ValueError(f"it gave {len(own)} numbers, and {self.log.widths[s.name]} before")
                part.flat.extend(own)
            if hist:
                for s in self.plan.hists[probe]: part.hists.append((probe, s.name, layer, s.f(view)[0]))
            part.sig.append((probe, layer))
        except Exception as e:
            del part.flat[at:]
            name = self.log.layer_name(probe, layer)
            raise RuntimeError(f"{f'the statistic {s.name!r}' if s else 'a built-in statistic'} failed on {name!r} ({probe}, shape {tuple(view.x.shape)}): "
                               f"{type(e).__name__}: {e}. Training was stopped and all hooks removed") from e

    def _own(self, s, view):
        "A user's statistic: outside autocast, its random numbers its own, its result 0-dim."
        x = view.x
        kept = random.getstate(), np.random.get_state()
        try:
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False), \
                 torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
                out = s.f(view)
        finally:
            random.setstate(kept[0])
            np.random.set_state(kept[1])
        for v in out:
            if isinstance(v, torch.Tensor) and v.numel() != 1:
                raise ValueError(f"a statistic gives one number a tensor; got a tensor of shape {tuple(v.shape)}")
        return [self._scalar(v) for v in out]

    def _capture_units(self, site, v):
        for s in self.plan.units:
            if s.name == 'frac_dormant' and not self.dormancy: continue
            self.part.units.append(((s.name, site), s, s.f(v)))

    def _scalar(self, x):
        if not isinstance(x, torch.Tensor): return float(x)
        x = x.detach()
        if x.numel() != 1: x = x.float().mean()
        x = x.as_subclass(torch.Tensor).reshape(())
        return float(x.float().numpy() if x.dtype in (torch.bfloat16, torch.float16) else x.numpy()) if x.device.type == 'cpu' \
               and self.host is not False else x

    # --- rows --------------------------------------------------------------------------------------------------------
    @_timed
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
        silent = [n for n, _ in self.targets if n not in self.fired]
        for n in silent: self.log.ignore(n, 'its forward was never called as a module')
        if self.asked - self.answered:
            names = self.log.site_names()
            for k in self.asked - self.answered:
                self.log.ignore(f'{names[k]} (grad_output)', 'no gradient came back through its output')
        self.log.tell_ignored()

    def end_fit(self):
        "The fit has ended: an unfinished accumulation is a row that was not stepped."
        self.commit()

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


def _array(p): return p.detach().view(-1).numpy()

def _total(norms):
    "The norm of all from the norms of each."
    if not norms: return math.nan
    if all(isinstance(n, float) for n in norms):
        return math.nan if any(map(math.isnan, norms)) else math.hypot(*norms)             # hypot(inf, nan) is inf
    dev = next(n.device for n in norms if isinstance(n, torch.Tensor))
    return torch.linalg.vector_norm(torch.stack([torch.as_tensor(n, dtype=torch.float64, device=dev) for n in norms]))

def _divide(a, b):
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor): return a / b
    return a / b if b else math.nan


class _Spare:
    "The sites that are read if no nonlinearity is found, and what was captured at them in the first forward pass."
    def __init__(self, targets): self.targets, self.sites, self.site_list, self.part = targets, {}, [], Part()


class _Unset:
    "Takes `zero_grad` off an optimizer again, as the handle of a hook would."
    def __init__(self, opt): self.opt = opt
    def remove(self): self.opt.__dict__.pop('zero_grad', None)


class Watch:
    "What `watch` gives: `record`, and for loops that clip or scale: `grads()`; `loss(l)` for the loss."
    def __init__(self, model, opt, plan, scaler=None):
        self.watcher, self.model, self.opt, self.scaler = Watcher(plan), model, opt, scaler
        self.i, self.ran = -1, False                       # the batch, and whether its backward pass has begun
        self.watcher.log.meta['grad_is'] = 'as the step consumes it'

    @property
    def record(self): return self.watcher.record()

    def loss(self, loss):
        "Tell the batch's loss (elasticity and gain need it); returns it, so that `w.loss(l).backward()` works."
        self.watcher.loss(loss)
        return loss

    def grads(self):
        "Read the true gradient now: after unscaling, before clipping."
        self._backward()
        self.watcher.log.meta['grad_is'] = 'the true gradient, read at w.grads()'
        self.watcher.grads()

    def notice(self): self.ran = True

    def _backward(self):
        if self.watcher.part is not None and self.ran: self.watcher.backward_done()

    def _enter(self):
        w = self.watcher
        w.attach(self.model, self.opt)
        root, me = unwrap(self.model), weakref.ref(self)
        def before(m, args, kwargs):
            if not (m.training and torch.is_grad_enabled()): return
            self._backward()
            self.ran = False
            self.i  += 1
            xs = [t for _, t in tensors((args, kwargs))]
            w.begin(self.i, bs=len(xs[0]) if xs and xs[0].dim() else 0, t=time.perf_counter() - self.start)
            w.capture_end('input', args if len(args) != 1 else args[0])
        def after(m, args, out):
            if not (m.training and torch.is_grad_enabled()) or w.part is None: return
            w.capture_end('output', out)
            w.end_forward()
            rates()
            for _, t in tensors(out):
                if t.requires_grad: t.register_hook(lambda g: me().notice() if me() else None)
            w.backward_begins(self.scaler.get_scale() if self.scaler is not None and self.scaler.is_enabled() else None)
        def rates():
            groups = self.opt.param_groups
            w.rates([float(g['lr']) for g in groups], groups[-1].get('momentum', groups[-1].get('betas', (math.nan,))[0]))
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
        self.opt.zero_grad = zeroing
        w.handles += [root.register_forward_pre_hook(before, with_kwargs=True), root.register_forward_hook(after),
                      self.opt.register_step_pre_hook(stepping), self.opt.register_step_post_hook(stepped), _Unset(self.opt)]


@contextmanager
def watch(
    model,                # the model, as the loop calls it
    opt,                  # the torch.optim optimizer whose steps are the rows
    *,
    window=50,            # rows of a window of the life table: a plain loop has no epochs
    scaler=None,          # the loop's GradScaler: `grad_output` is divided by its scale
    **settings,           # the probes and settings of LayerStatsCallback
):
    "Record a plain PyTorch loop: `with watch(model, opt) as w: ...`, then `w.record`."
    if not hasattr(opt, 'register_step_pre_hook'):
        raise TypeError(f"watch needs a torch.optim optimizer; got {type(opt).__name__}. In fastai use LayerStatsCallback()")
    w = Watch(model, opt, Plan(window=window, **{**DEFAULTS, **settings}), scaler)
    w._enter()
    ended = False
    try:
        yield w
        ended = True
    finally:
        w._backward()
        w.watcher.end_epoch(normal=ended, last=True)
        w.watcher.end_fit()
        w.watcher.detach()
