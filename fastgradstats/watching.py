"""Watching a model train: hooks, rows, windows. No framework: fastai's callbacks and the plain-loop `watch` drive it.

A host calls, for each training batch: `begin` (opens a row, or the next micro-batch of the open row), `end_forward`,
`loss`, `backward_begins`, `backward_done`, then for an optimizer step `grads` (the true gradient), `before_update` (the
consumed one, the weights) and `after_update`; or `skipped`; nothing where it only accumulates. Rows are committed when
the next one begins, so that nothing that happens after the step can lose one. Hooks do nothing unless a batch is under way.
"""
from __future__ import annotations

import math
import platform
import time
import warnings
import weakref
from contextlib import contextmanager

import numpy as np
import pandas as pd
import torch

from . import __version__
from .probes import (ENDS, OUTPUTS, PARAMETERS, PROBES, bounds_of, check_modules, is_compiled, is_leaf, named, params_of,
                     sites_of, tensors, unit_axis, unwrap)
from .record import MAX_WINDOWS, RESERVED, UNSEEN, Bins, Record, coarsen
from .stats import BIN_EDGES, BIN_LABELS, N_BINS, SAMPLE, View, resolve, unit_states

FLUSH      = 50                   # rows between two copies from the device to the host
MIN_WINDOW = 20                   # rows a window of the life table has at least: single batches overstate death 3 to 5 times
OFF, FORWARD, BACKWARD = 0, 1, 2

DEFAULTS = dict(
    grad       = ['mean', 'std', 'abs_mean', 'abs_max', 'norm', 'median', 'abs_median', 'frac_zero', 'frac_nonfinite', 'hist'],
    activation = ['mean', 'std', 'min', 'max', 'frac_zero', 'frac_near_zero', 'frac_nonfinite', 'hist', 'frac_dead',
                  'frac_dormant'],
    grad_output=None, grad_used=None, weight=['norm'], update=['norm'],
    input      = ['mean', 'std', 'min', 'max'],
    output     = ['mean', 'std', 'min', 'max'])


class Plan:
    "What is measured, where and how often: the checked arguments of a callback or of `watch`."
    def __init__(self, *, modules=None, every=1, sample=SAMPLE, window=None, per_call=False, unit_dim=None, **probes):
        wrong = [p for p in probes if p not in PROBES]
        if wrong: raise TypeError(f"{wrong[0]!r} is not an argument; there are the probes {', '.join(PROBES)}, and modules, "
                                  f"every, sample, window, per_call, unit_dim")
        self.stats = {}
        for probe in PROBES:
            specs = probes.get(probe)
            if specs is None: continue
            if isinstance(specs, str) or callable(specs): specs = [specs]
            found = [resolve(s, probe) for s in specs]
            for s in found:
                if s.name in RESERVED: raise ValueError(f"a statistic cannot be called {s.name!r}: a column of the record is. "
                                                        f"Give another name: statistic(f, name=...)")
                if s.kind == 'unit' and probe != 'activation':
                    raise ValueError(f"{s.name!r} is measured per unit and belongs to activation=[...], not to {probe}")
                if sum(s.name == o.name for o in found) > 1: raise ValueError(f"{s.name!r} is given twice for {probe}")
            if found: self.stats[probe] = found
        if not self.stats: raise ValueError(f"nothing to measure: give statistics for at least one of {', '.join(PROBES)}")
        check_modules(modules)
        if not callable(every) and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise ValueError(f"every is a whole number of 1 or more, or a function f(iteration) -> bool; got {every!r}")
        for name, v, low in (('sample', sample, 100), ('window', window, 1)):
            if v is not None and (isinstance(v, bool) or not isinstance(v, int) or v < low):
                raise ValueError(f"{name} is a whole number of {low} or more, or None; got {v!r}")
        if unit_dim is not None and not isinstance(unit_dim, int): raise ValueError(f"unit_dim is an axis; got {unit_dim!r}")
        self.modules, self.every, self.sample, self.window = modules, every, sample, window
        self.per_call, self.unit_dim = per_call, unit_dim
        self.scalars = {p: [s for s in ss if s.kind == 'scalar'] for p, ss in self.stats.items()}
        self.hists   = {p: [s for s in ss if s.kind == 'hist'] for p, ss in self.stats.items()}
        self.units   = [s for s in self.stats.get('activation', []) if s.kind == 'unit']
        self.custom  = any(s.own for ss in self.stats.values() for s in ss)

    def due(self, row, i): return bool(self.every(i)) if callable(self.every) else row % self.every == 0

    def describe(self):
        every = self.every if isinstance(self.every, int) else getattr(self.every, '__name__', 'a function')
        return dict(stats={p: [s.name for s in ss] for p, ss in self.stats.items()}, every=every, sample=self.sample,
                    window=self.window, per_call=self.per_call, unit_dim=self.unit_dim,
                    modules=None if self.modules is None else str(self.modules))


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


class _Part:
    "What was captured in one micro-batch, or at the parameters: numbers or 0-dim tensors, in the order of `sig`."
    __slots__ = ('sig', 'flat', 'hists', 'units', 'loss', 'constant', 'bs', 'last')
    def __init__(self, bs=0, last=0):
        self.sig, self.flat, self.hists, self.units = [], [], [], []      # sig: (probe, layer)
        self.loss = self.constant = math.nan
        self.bs, self.last = bs, last


class _Row:
    def __init__(self, measured, about):
        self.measured, self.about   = measured, about
        self.parts, self.own        = [], _Part()
        self.read = self.stepped = self.done = False
        self.grad_norm = self.clip  = math.nan
        self.lrs = None


class _Windows:
    "Histograms by windows: one a row up to MAX_WINDOWS, then neighbours are merged and the window doubles."
    def __init__(self): self.sums, self.first, self.last, self.width, self.open = [], [], [], 1, 0
    def add(self, i, counts):                                             # counts: (layer, bin), NaN where not measured
        if self.open and self.open < self.width:
            a, b = _pad(self.sums[-1], counts)
            self.sums[-1] = np.where(np.isnan(a), b, np.where(np.isnan(b), a, a + b))
            self.last[-1] = i
            self.open    += 1
            return
        if len(self.sums) == MAX_WINDOWS:
            most = max(len(s) for s in self.sums)
            h, w = coarsen(np.stack([_grow(s, most) for s in self.sums]),
                           pd.DataFrame(dict(first_iter=self.first, last_iter=self.last)), MAX_WINDOWS // 2)
            self.sums, self.first, self.last = list(h), w.first_iter.tolist(), w.last_iter.tolist()
            self.width *= 2
        self.sums.append(counts); self.first.append(i); self.last.append(i)
        self.open = 1

def _grow(a, n): return a if len(a) >= n else np.concatenate([a, np.full((n - len(a), *a.shape[1:]), np.nan, a.dtype)])
def _pad(a, b):
    n = max(len(a), len(b))
    return _grow(a, n), _grow(b, n)


class Watcher:
    "Records one model: attach, drive it batch by batch, detach, read `record()`; attach again for the next epoch or fit."
    def __init__(self, plan, *, host=None):
        self.plan, self.host = plan, host
        self.mode     = OFF
        self.row      = self.part = None
        self.touched  = set()
        self.pending  = []
        self.chunks   = []                        # [(DataFrame of iters, {key: (row, layer)})]
        self.windows  = {(p, s.name): _Windows() for p, ss in plan.hists.items() for s in ss}
        self.handles, self.model, self.params = [], None, []
        self.sites, self.site_list = {}, []       # key -> number; [dict about the site]
        self.ends     = {p: [] for p in ENDS}     # names of the model's inputs and outputs
        self.param_at, self.param_list = {}, []   # qualified name -> number; [dict about the parameter]
        self.order    = {}                        # module name -> number, in order of first use
        self.now, self.now_rows, self.now_iters = {}, 0, None      # the open window of the life table
        self.closed   = []                        # [(first, last, {(statistic, site): partial})], on the device until flushed
        self.rows     = 0
        self.epochs   = []
        self.meta     = {}
        self.fired, self.targets, self.told = set(), [], set()
        self.ignored  = {}                        # name -> why it is not observed
        self.spent = self.of = 0.
        self._since = None
        self._old, self._cache = {}, None

    # --- hooks -------------------------------------------------------------------------------------------------------
    def attach(self, model, opt=None):
        "Register the hooks; the model may have changed since the last time (unfrozen, wrapped, compiled)."
        self.detach()
        compiled   = is_compiled(model)
        self.model = model = unwrap(model)
        guard      = (lambda h: h)
        if compiled:                              # hooks added after the first compiled call would never fire
            torch._dynamo.reset()
            guard = torch.compiler.disable
        self.targets = sites_of(model, self.plan.modules) if any(p in self.plan.stats for p in OUTPUTS) else []
        owners = [(n, m) for n, m in [('', model), *named(model)] if m._parameters]
        hook   = lambda m, act, place: self.handles.append(m.register_forward_hook(guard(_Hook(self, act, place))))
        if self.targets or any(p in self.plan.stats for p in PARAMETERS):
            for n, m in owners: hook(m, 'passed', (n, unit_axis(m), is_leaf(m)))
        for k, (n, m) in enumerate(self.targets):
            own = unit_axis(m) if m._parameters else None
            hook(m, 'saw', (n, own, bounds_of(m)))
        self.touched, self.params = set(), []
        for name, owner, m, p in params_of(model, self.plan.modules):
            if isinstance(p, torch.nn.parameter.UninitializedParameter): continue
            if name not in self.param_at:
                self.param_at[name] = len(self.param_list)
                self.param_list.append(dict(layer=name, module=owner, type=type(m).__name__, numel=p.numel(),
                                            shape='x'.join(map(str, p.shape)), ndim=p.dim()))
            if p.requires_grad:
                self.params.append((self.param_at[name], p))
                self.handles.append(p.register_post_accumulate_grad_hook(self.touched.add))
        self.set_optimizer(opt)
        self.meta.setdefault('model', type(model).__name__)
        self._since = time.perf_counter()

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

    def detach(self):
        for h in self.handles: h.remove()
        self.handles, self.model, self.params, self.mode = [], None, [], OFF
        if self._since is not None: self.of += time.perf_counter() - self._since
        self._since, self._old = None, {}

    @contextmanager
    def _timed(self):
        t = time.perf_counter()
        try: yield
        except Exception:
            self.detach()
            raise
        finally: self.spent += time.perf_counter() - t

    # --- one batch ---------------------------------------------------------------------------------------------------
    def begin(self, i, *, bs=0, fit=0, epoch=0, lrs=None, mom=math.nan, left=None, t=math.nan):
        """A training batch begins: number `i` over the model's life. `left`: batches left in the epoch, this one included.
        Returns whether it is measured."""
        self.part = None
        if self.row is not None and (self.row.done or not self.row.parts): self.commit()
        if self.row is not None and self.row.read: self.skipped(); self.commit()
        if self.row is None:
            self.row = _Row(self.plan.due(self.rows, i), None)
            self.touched.clear()
        self.row.about = (fit, epoch, lrs[-1] if lrs else math.nan, mom, t)
        self.row.lrs   = lrs
        self.part      = _Part(bs, i)
        self.scale     = None
        self.last_mark, self.calls = ('', -1), {}
        every          = self.plan.every if isinstance(self.plan.every, int) else 1
        rows           = self.now_rows + 1
        self.dormancy  = (rows == self.plan.window if self.plan.window else
                          left is not None and left <= every and rows >= MIN_WINDOW)
        self.mode      = FORWARD if self.row.measured else OFF
        return self.row.measured

    def end_forward(self): self.mode = OFF

    def suspend(self):
        "Stop looking (a validation inside a training batch); returns what `resume` wants."
        mode, self.mode = self.mode, OFF
        return mode
    def resume(self, mode): self.mode = mode

    def capture_end(self, probe, x):
        "The model's input or output."
        if self.part is None or not self.row.measured or probe not in self.plan.stats: return
        with self._timed():
            for path, t in tensors(x):
                if not self._real(f'{probe}{path}', t): continue
                names = self.ends[probe]
                if path not in [n for n, *_ in names]: names.append((path, str(t.dtype).replace('torch.', '')))
                self._capture(self.part, probe, [n for n, _ in names].index(path), View(t, self.plan.sample, host=self.host))

    def loss(self, loss, constant=None):
        "The batch's loss, and a function that gives the loss of answering with the batch's mean output."
        if self.part is None: return
        with self._timed():
            self.part.loss = self._scalar(loss)
            if constant is not None and self.row.measured: self.part.constant = self._scalar(constant())

    def backward_begins(self, scale=None):
        "`scale`: what the loss is multiplied by under mixed precision, a number or a 0-dim tensor; None for nothing."
        self.scale = scale
        if self.part is not None and self.row.measured and 'grad_output' in self.plan.stats: self.mode = BACKWARD

    def backward_done(self):
        "The backward pass has run: the micro-batch belongs to the row."
        self.mode = OFF
        if self.part is None: return
        self.row.parts.append(self.part)
        self.part = None

    def grads(self, exact=False):
        "Read the true gradient: after unscaling, before clipping. `exact`: count non-finite elements without sampling."
        if self.row is None or not self.row.parts or self.row.read: return
        self.row.read = True
        if not self.row.measured: return
        with self._timed():
            self.got = [(i, p) for i, p in self.params if p in self.touched and p.grad is not None]
            views    = self._views('grad', [p.grad for _, p in self.got], None if exact else self.plan.sample)
            self.row.grad_norm = self._total(views)
            self._capture_params('grad', views)
            self.seen_grads = [(id(p.grad), p.grad._version) for _, p in self.got]

    def before_update(self):
        "The optimizer is about to step: the gradient it consumes, and the weights."
        self.grads()
        if self.row is None or not self.row.read or not self.row.measured: return
        with self._timed():
            now   = [(id(p.grad), p.grad._version) for _, p in self.got]
            same  = now == self.seen_grads
            stats = 'grad_used' in self.plan.stats
            if not same or stats:
                views = self._views('grad_used', [p.grad for _, p in self.got])
                if stats: self._capture_params('grad_used', views)
            self.row.clip = 1. if same else _divide(self._total(views), self.row.grad_norm)
            if 'weight' in self.plan.stats: self._capture_params('weight', self._views('weight', [p for _, p in self.got]))
            if 'update' in self.plan.stats: self._keep()

    def after_update(self):
        if self.row is None or not self.row.read: return
        self.row.stepped = self.row.done = True
        if not self.row.measured or 'update' not in self.plan.stats: return
        with self._timed():
            diffs = []
            for i, p in self.got: diffs.append(torch.sub(p.detach(), self._old[i], out=self._old[i]))
            self._capture_params('update', self._views('update', diffs))

    def _keep(self):
        "One copy of the parameters about to change, in memory that is kept for the next row."
        for i, p in self.got:
            if i not in self._old or self._old[i].shape != p.shape or self._old[i].device != p.device:
                self._old[i] = torch.empty_like(p, requires_grad=False)
        with torch.no_grad(): torch._foreach_copy_([self._old[i] for i, _ in self.got], [p.detach() for _, p in self.got])

    def skipped(self):
        "The step was not taken (an overflow under mixed precision): its gradients are a row, its update is 0."
        if self.row is None or self.row.done: return
        self.grads(exact=True)
        self.row.done = True
        if not self.row.read or not self.row.measured: return
        with self._timed():
            if 'weight' in self.plan.stats: self._capture_params('weight', self._views('weight', [p for _, p in self.got]))
            if 'update' in self.plan.stats:
                self._capture_params('update', [View(torch.zeros(1).expand(p.shape)) for _, p in self.got])

    # --- reading tensors ---------------------------------------------------------------------------------------------
    def passed(self, place, module, args, output):
        "Any module with parameters has run: it names the sites that follow and their unit axis."
        name, axis, leaf = place
        if name not in self.order: self.order[name] = len(self.order)
        if leaf: self.last_mark = name, axis

    def saw(self, place, module, args, output):
        "A module whose output is read has run."
        name, axis, bounds = place
        self.fired.add(name)
        if self.mode == FORWARD and name in self.ignored: self.ignored.pop(name)
        if self.plan.per_call:  after = self.calls[name] = self.calls.get(name, -1) + 1
        else:                   after = self.last_mark[0] if axis is None else None
        if axis is None: axis = self.last_mark[1]
        for path, t in tensors(output):
            if not self._real(name + path, t): continue
            site = self.sites.get((name, path, after))
            if site is None:
                if not module._parameters and is_leaf(module) and _reshapes(args, t):
                    continue                                    # a Flatten of one's own is no nonlinearity
                site = self.sites[name, path, after] = len(self.site_list)
                self.site_list.append(dict(name=name, path=path, type=type(module).__name__, after=after,
                                           shape='x'.join(map(str, t.shape[1:])), numel=math.prod(t.shape[1:])))
            if self.mode == FORWARD and 'activation' in self.plan.stats:
                with self._timed():
                    dim = self.plan.unit_dim if self.plan.unit_dim is not None else axis
                    dim = dim if t.dim() >= 2 and -t.dim() <= dim < t.dim() else -1
                    v   = View(t, self.plan.sample, dim if t.dim() > 1 and self.plan.units else None, bounds, host=self.host)
                    if v.unit_dim is not None and v.n: self._capture_units(site, v)
                    self._capture(self.part, 'activation', site, v)
            if 'grad_output' in self.plan.stats and t.requires_grad: t.register_hook(_Hook(self, 'saw_grad', (site, bounds)))

    def saw_grad(self, place, g):
        if self.part is None or g is None: return
        with self._timed():
            if self.scale is not None: g = g.detach().float() / self.scale
            self._capture(self.part, 'grad_output', place[0], View(g, self.plan.sample, None, place[1], host=self.host))

    def _real(self, name, t):
        "Whether `t` can be measured; complex and integer outputs are named once."
        if t.is_floating_point(): return True
        self.ignored.setdefault(name, f'its values are {t.dtype}'.replace('torch.', ''))
        return False

    def _views(self, probe, ts, sample=-1):
        sample = self.plan.sample if sample == -1 else sample
        views  = [View(t, sample, host=self.host) for t in ts]
        for v, (i, _) in zip(views, self.got): v.eps = self.eps.get(i)
        small  = [v for v in views if 0 < v.n <= 8192 and v.host]
        if small:                                                # the norms of all the small ones in one call
            for v, r in zip(small, torch._foreach_norm([v.flat for v in small])):
                r = float(r.numpy())
                if 1e-15 < r < 1e15: v.__dict__['norm'] = r
        return views

    def _capture_params(self, probe, views):
        for (i, p), v in zip(self.got, views):
            if probe in self.plan.stats: self._capture(self.row.own, probe, i, v, hist=p.dim() > 1)

    def _total(self, views):
        norms = [v.norm for v in views]
        if not norms: return math.nan
        if all(isinstance(n, float) for n in norms): return math.hypot(*norms)
        dev = next(n.device for n in norms if isinstance(n, torch.Tensor))
        return torch.linalg.vector_norm(torch.stack([torch.as_tensor(n, device=dev).double() for n in norms]))

    def _capture(self, part, probe, layer, view, hist=True):
        if not view.n: return
        try:
            part.sig.append((probe, layer))
            for s in self.plan.scalars[probe]: part.flat.extend(self._own(s, view) if s.own else s.f(view))
            if hist:
                for s in self.plan.hists[probe]: part.hists.append((probe, s.name, layer, s.f(view)[0]))
        except Exception as e:
            name = self._layer_name(probe, layer)
            raise RuntimeError(f"the statistic {s.name!r} failed on {name!r} ({probe}, shape {tuple(view.x.shape)}): "
                               f"{type(e).__name__}: {e}. Training was stopped and all hooks removed") from e

    def _own(self, s, view):
        "A user's statistic: outside autocast, its random numbers its own, its result 0-dim."
        x = view.x
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False), \
             torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            out = s.f(view)
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
    def commit(self):
        "Close the open row, if a backward pass of it has run."
        row, self.row, self.part, self.mode = self.row, None, None, OFF
        if row is None or not row.parts: return
        with self._timed():
            self.rows += 1
            i = row.parts[-1].last
            if row.measured and self.plan.units: self._add_units(row, i)
            self._pack(row)
            self.pending.append(row)
            if len(self.pending) >= FLUSH: self.flush()

    def end_epoch(self):
        "The epoch's training has ended: the life table may close a window."
        self._finish_done()
        if self.plan.window is None and self.now_rows >= MIN_WINDOW: self._close()

    def end_fit(self):
        "The fit has ended: an unfinished accumulation is a row that was not stepped."
        self._finish_done()
        if self.row is not None: self.commit()

    def _finish_done(self):
        if self.row is not None and (self.row.done or not self.row.parts): self.commit()

    def _add_units(self, row, i):
        for part in row.parts:
            for key, s, p in part.units:
                self.now[key] = p if key not in self.now else s.merge(self.now[key], p)
        self.now_rows += 1
        self.now_iters = (self.now_iters[0] if self.now_iters else i, i)
        if self.plan.window and self.now_rows >= self.plan.window: self._close()

    def _close(self):
        self.closed.append((*self.now_iters, self.now_rows, self.now))
        self.now, self.now_rows, self.now_iters = {}, 0, None

    def _pack(self, row):
        "All the 0-dim tensors of a row become one vector; their places are remembered."
        row.sig  = tuple(k for part in [*row.parts, row.own] for k in part.sig)
        row.flat = [row.grad_norm, row.clip, *[p.loss for p in row.parts], *[p.constant for p in row.parts]]
        for part in [*row.parts, row.own]: row.flat += part.flat
        row.at   = [k for k, v in enumerate(row.flat) if isinstance(v, torch.Tensor)]
        if row.at:
            dev     = row.flat[row.at[0]].device
            row.vec = torch.stack([row.flat[k].to(dev, torch.float64 if dev.type != 'mps' else torch.float32)
                                   for k in row.at])
            for k in row.at: row.flat[k] = math.nan

    def flush(self):
        "Bring what is pending to the host and reduce it: the only place that waits for a device."
        rows, self.pending = self.pending, []
        if not rows: return
        with self._timed():
            on_dev = [r for r in rows if r.at]
            if on_dev:
                for n in {len(r.at) for r in on_dev}:
                    same = [r for r in on_dev if len(r.at) == n]
                    for r, vals in zip(same, torch.stack([r.vec for r in same]).cpu().numpy()):
                        r.vec = None
                        for k, v in zip(r.at, vals): r.flat[k] = float(v)
            self._reduce(rows)

    def _reduce(self, rows):
        n      = len(rows)
        sizes  = {p: self._n_layers(p) for p in self.plan.stats}
        values = {(p, s.name): np.full((n, sizes[p]), np.nan, np.float32) for p, ss in self.plan.scalars.items() for s in ss}
        iters  = {c: [] for c in ('iter', 'fit', 'epoch', 'bs', 'loss', 'loss_constant', 'lr', 'mom', 'grad_norm', 'clip_factor',
                                  'stepped', 'measured', 'n_accum', 'elapsed')}
        groups = {}
        for k, r in enumerate(rows):
            groups.setdefault((r.sig, len(r.parts)), []).append(k)
            bs   = np.array([p.bs for p in r.parts], float)
            m    = len(r.parts)
            w    = bs / bs.sum() if bs.sum() > 0 else np.full(m, 1 / m)
            fit, epoch, lr, mom, t = r.about
            line = (r.parts[-1].last, fit, epoch, int(bs.sum()), float(np.dot(w, r.flat[2:2 + m])),
                    float(np.dot(w, r.flat[2 + m:2 + 2 * m])), lr, mom, r.flat[0], r.flat[1] if r.stepped else math.nan,
                    r.stepped, r.measured, m, t)
            for c, v in zip(iters, line): iters[c].append(v)
        for (sig, m), which in groups.items():
            table = np.array([rows[k].flat[2 + 2 * m:] for k in which], dtype=float)            # (row, number)
            self._reduce_group(sig, table, np.array(which), values)
        self._reduce_hists(rows)
        lrs = np.full((n, sizes.get('update', 0)), np.nan, np.float32)
        for k, r in enumerate(rows):
            if r.lrs and r.measured and 'update' in self.plan.stats:
                for p, i in r.sig:
                    if p == 'update' and i in self.group: lrs[k, i] = r.lrs[min(self.group[i], len(r.lrs) - 1)]
        if 'update' in self.plan.stats: values['update', 'lr'] = lrs
        self.chunks.append((pd.DataFrame(iters), values))

    def _reduce_group(self, sig, table, which, values):
        "Merge and finish every statistic of rows that captured the same places in the same order."
        at, places = 0, {}                                       # (probe, layer) -> offsets of its captures
        widths     = {p: [] for p in self.plan.scalars}
        for p, ss in self.plan.scalars.items(): widths[p] = [self._width(s) for s in ss]
        for p, layer in sig:
            places.setdefault(p, {}).setdefault(layer, []).append(at)
            at += sum(widths[p])
        for p, layers in places.items():
            cols = list(layers)
            skip = 0
            for s, width in zip(self.plan.scalars[p], widths[p]):
                most = max(len(v) for v in layers.values())
                cur  = None
                for o in range(most):
                    sub = [j for j, c in enumerate(cols) if len(layers[c]) > o]
                    off = np.array([layers[cols[j]][o] for j in sub]) + skip
                    new = [table[:, off + k] for k in range(width)]                               # each (row, layer)
                    if cur is None: cur = [v.copy() for v in new]
                    elif s.merge is None:
                        for c in cur: c[:, sub] = np.nan
                        self._tell_once(f'merge {s.name}', f"{s.name!r} ({p}) has no merge and is NaN where several tensors "
                                        f"make one row: {', '.join(self._layer_name(p, cols[j]) for j in sub[:6])}")
                    else:
                        for c, v in zip(cur, s.merge(tuple(c[:, sub] for c in cur), tuple(new))): c[:, sub] = v
                with np.errstate(all='ignore'):
                    values[p, s.name][np.ix_(which, cols)] = np.asarray(s.finish(*cur), float)
                skip += width

    def _width(self, s):
        "How many numbers the partial result of a statistic has."
        if not hasattr(self, '_widths'): self._widths = {}
        if s.name not in self._widths:
            x = torch.ones(2, 2)
            self._widths[s.name] = len(s.f(View(x)))
        return self._widths[s.name]

    def _reduce_hists(self, rows):
        if not self.windows: return
        for r in rows:
            sums = {}
            for part in [*r.parts, r.own]:
                for p, s, layer, counts in part.hists:
                    if isinstance(counts, torch.Tensor): counts = counts.cpu().numpy()
                    k = sums.setdefault((p, s), {})
                    k[layer] = counts if layer not in k else k[layer] + counts
            for key, by in sums.items():
                out = np.full((self._n_layers(key[0]), N_BINS), np.nan, np.float32)
                for layer, c in by.items(): out[layer] = c
                self.windows[key].add(r.parts[-1].last, out)

    # --- names -------------------------------------------------------------------------------------------------------
    def _n_layers(self, probe):
        if probe in OUTPUTS: return len(self.site_list)
        return len(self.param_list) if probe in PARAMETERS else len(self.ends[probe])

    def site_names(self):
        many  = {}
        for s in self.site_list: many.setdefault(s['name'] + s['path'], []).append(s)
        names = []
        for s in self.site_list:
            same = many[s['name'] + s['path']]
            names.append((s['name'] or 'model') + s['path'] + (f':{same.index(s)}' if len(same) > 1 else ''))
        return names

    def _layer_name(self, probe, i):
        if probe in OUTPUTS: return self.site_names()[i]
        return self.param_list[i]['layer'] if probe in PARAMETERS else probe + self.ends[probe][i][0]

    def _tell_once(self, key, text):
        if key in self.told: return
        self.told.add(key)
        warnings.warn(f"fastgradstats: {text}", stacklevel=2)

    def check_fired(self):
        "Name, once, the modules that were to be read and did not run: their forward is never called, or nothing of it is seen."
        silent = [n for n, _ in self.targets if n not in self.fired and n not in self.ignored]
        for n in silent: self.ignored[n] = 'its forward was never called as a module'
        news = {n: why for n, why in self.ignored.items() if n not in self.told}
        if news:
            self.told |= set(news)
            why = {}
            for n, w in news.items(): why.setdefault(w, []).append(n)
            self._tell_once(f'not observed {sorted(news)}', 'not observed: ' + '; '.join(
                f"{', '.join(ns[:8])}{', ...' if len(ns) > 8 else ''} ({w})" for w, ns in why.items()))

    # --- the record --------------------------------------------------------------------------------------------------
    def record(self):
        "All rows up to now, as a Record."
        self._finish_done()
        self.flush()
        stamp = (self.rows, len(self.epochs), len(self.closed), self.spent)
        if self._cache and self._cache[0] == stamp: return self._cache[1]
        rec = self._build()
        self._cache = stamp, rec
        return rec

    def _build(self):
        iters  = [d for d, _ in self.chunks]
        iters  = pd.concat(iters, ignore_index=True) if iters else _no_rows()
        orders = {p: self._order(p) for p in self.plan.stats}
        values, windows, units = {}, {}, {}
        for p, ss in self.plan.stats.items():
            for s in ss:
                if s.kind != 'scalar': continue
                values[p, s.name] = self._stack([v[p, s.name] for _, v in self.chunks], orders[p])
            if p == 'update': values['update', 'lr'] = self._stack([v['update', 'lr'] for _, v in self.chunks], orders[p])
        for key, w in self.windows.items():
            n = self._n_layers(key[0])
            h = np.stack([_grow(s, n) for s in w.sums]) if w.sums else np.zeros((0, n, N_BINS), np.float32)
            values[key]  = h[:, orders[key[0]]]
            windows[key] = pd.DataFrame(dict(first_iter=w.first, last_iter=w.last), dtype='int64')
        if self.plan.units: self._build_units(values, windows, units, orders['activation'])
        epochs = pd.DataFrame(self.epochs)
        return Record(iters, values, {p: self._table(p).iloc[orders[p]].reset_index(drop=True) for p in self.plan.stats},
                      windows, units, epochs, Bins(BIN_EDGES, BIN_LABELS), self._meta())

    def _stack(self, arrays, order):
        if not arrays: return np.zeros((0, len(order)), np.float32)
        n   = len(order)
        out = np.full((sum(len(a) for a in arrays), n), np.nan, np.float32)
        at  = 0
        for a in arrays:
            out[at:at + len(a), :a.shape[1]] = a
            at += len(a)
        return out[:, order]

    def _build_units(self, values, windows, units, order):
        wins = list(self.closed)
        if self.now_rows:
            if self.now_rows >= MIN_WINDOW or not wins: wins.append((*self.now_iters, self.now_rows, self.now))
            else:                                                # a short tail overstates death: it joins the last window
                first, _, n, by = wins[-1]
                merged = dict(by)
                for s in self.plan.units:
                    for k, p in self.now.items():
                        if k[0] == s.name: merged[k] = s.merge(merged[k], p) if k in merged else p
                wins[-1] = (first, self.now_iters[1], n + self.now_rows, merged)
        names = self.site_names()
        table = pd.DataFrame(dict(first_iter=[w[0] for w in wins], last_iter=[w[1] for w in wins]), dtype='int64')
        for s in self.plan.units:
            out = np.full((len(wins), len(order)), np.nan, np.float32)
            for k, (*_, by) in enumerate(wins):
                for j, site in enumerate(order):
                    p = by.get((s.name, site))
                    if p is None: continue
                    p = [t.detach().cpu().double().numpy() for t in p]
                    out[k, j] = s.finish(*p)
                    if s.name != 'frac_dead': continue
                    state = unit_states(*p)
                    have  = units.setdefault(names[site], np.full((len(wins), len(state)), UNSEEN, np.int8))
                    if have.shape[1] == len(state): have[k] = state
            values['activation', s.name]  = out
            windows['activation', s.name] = table

    def _order(self, probe):
        if probe not in PARAMETERS: return list(range(self._n_layers(probe)))
        place, last = [], -1.
        for i, p in enumerate(self.param_list):
            last = self.order.get(p['module'], last)             # what never ran as a module stays by its neighbour
            place.append((last, i))
        return [i for _, i in sorted(place)]

    def _table(self, probe):
        if probe in PARAMETERS:
            return pd.DataFrame([{k: p[k] for k in ('layer', 'module', 'type', 'shape', 'numel')} for p in self.param_list],
                                columns=['layer', 'module', 'type', 'shape', 'numel'])
        if probe in OUTPUTS:
            return pd.DataFrame([dict(layer=n, module=s['name'], type=s['type'], shape=s['shape'], numel=s['numel'])
                                 for n, s in zip(self.site_names(), self.site_list)],
                                columns=['layer', 'module', 'type', 'shape', 'numel'])
        return pd.DataFrame([dict(layer=probe + path, module='', type=dtype) for path, dtype in self.ends[probe]],
                            columns=['layer', 'module', 'type'])

    def cost(self):
        of = self.of + (time.perf_counter() - self._since if self._since is not None else 0.)
        return dict(seconds=round(self.spent, 4), of=round(of, 4),
                    percent=round(100 * self.spent / (of - self.spent), 2) if of > self.spent else None)

    def _meta(self):
        return {**self.meta, 'config': self.plan.describe(), 'cost': self.cost(), 'not_hooked': dict(self.ignored),
                'units': {s.name: s.unit for ss in self.plan.stats.values() for s in ss},
                'versions': dict(fastgradstats=__version__, torch=torch.__version__, python=platform.python_version())}


def _no_rows():
    from .record import ITER_COLS
    return pd.DataFrame({c: pd.Series(dtype=t) for c, t in ITER_COLS.items()})

def _divide(a, b):
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor): return a / b
    return a / b if b else math.nan

def _reshapes(args, out):
    "Whether a module only gives its input another shape."
    x = next((t for _, t in tensors(args)), None)
    return x is not None and x.shape != out.shape


class Watch:
    "What `watch` gives: `record`, and for loops that clip or scale: `grads()`; `loss(l)` for the loss."
    def __init__(self, model, opt, plan):
        self.watcher, self.model, self.opt = Watcher(plan), model, opt
        self.i = -1
        self.watcher.meta['grad_is'] = 'as the step consumes it'

    @property
    def record(self): return self.watcher.record()

    def loss(self, loss):
        "Tell the batch's loss (elasticity and gain need it); returns it, so that `w.loss(l).backward()` works."
        self.watcher.loss(loss)
        return loss

    def grads(self):
        "Read the true gradient now: after unscaling, before clipping."
        self._backward()
        self.watcher.meta['grad_is'] = 'the true gradient, read at w.grads()'
        self.watcher.grads()

    def _backward(self):
        if self.watcher.part is not None and self.watcher.touched: self.watcher.backward_done()

    def _enter(self):
        w = self.watcher
        w.attach(self.model, self.opt)
        root = unwrap(self.model)
        def before(m, args, kwargs):
            if not (m.training and torch.is_grad_enabled()): return
            self._backward()
            self.i += 1
            xs = [t for _, t in tensors((args, kwargs))]
            w.begin(self.i, bs=len(xs[0]) if xs and xs[0].dim() else 0, lrs=[g['lr'] for g in self.opt.param_groups],
                    mom=self.opt.param_groups[-1].get('momentum', math.nan), t=time.perf_counter() - self.start)
            w.capture_end('input', args if len(args) != 1 else args[0])
        def after(m, args, out):
            if not (m.training and torch.is_grad_enabled()) or w.part is None: return
            w.capture_end('output', out)
            w.end_forward()
            w.backward_begins()
            if w.rows == 1: w.check_fired()
        def stepping(opt, *a):
            self._backward()
            w.before_update()
        def stepped(opt, *a): w.after_update()
        self.start = time.perf_counter()
        w.handles += [root.register_forward_pre_hook(before, with_kwargs=True), root.register_forward_hook(after),
                      self.opt.register_step_pre_hook(stepping), self.opt.register_step_post_hook(stepped)]


@contextmanager
def watch(
    model,                # the model, as the loop calls it
    opt,                  # the torch.optim optimizer whose steps are the rows
    *,
    window=50,            # rows of a window of the life table: a plain loop has no epochs
    **settings,           # the probes and settings of LayerStatsCallback
):
    "Record a plain PyTorch loop: `with watch(model, opt) as w: ...`, then `w.record`."
    if not hasattr(opt, 'register_step_pre_hook'):
        raise TypeError(f"watch needs a torch.optim optimizer; got {type(opt).__name__}. In fastai use LayerStatsCallback()")
    w = Watch(model, opt, Plan(window=window, **{**DEFAULTS, **settings}))
    w._enter()
    try: yield w
    finally:
        w._backward()
        w.watcher.end_fit()
        w.watcher.detach()
