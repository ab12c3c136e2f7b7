"""The parameter reader: what is read of the parameters around a step of the optimizer: gradients as they are and as
they are used, weights, updates."""
from __future__ import annotations

import math
from numbers import Real

import torch

from .clock import timed
from .distributed import shared_out
from .optimizer_info import hypers, parameters
from .probes import named_params
from .readers import Failed


class ParameterReader:
    """The parameters of a model: which are trained, which received a gradient, and their readings, which go into a row.

    `touched` are those that received one since the last step; what a parameter holds that is not touched may be a stale
    zero, which is no gradient."""
    def __init__(self, watcher):
        self.watcher, self.plan, self.builder, self.clock = watcher, watcher.plan, watcher.builder, watcher.clock
        self.all, self.trained, self.flags = [], [], []      # (number, parameter): all, trained; requires_grad
        self.handles = []
        self.touched = set()                      # parameters that received a gradient since the last step
        self.tasks   = set()                      # and the backward passes that gave it, by autograd's number
        self.scale, self.scaled = None, {}        # by what a scaler multiplies what comes; parameter -> (that, _mark)
        self.last    = None                       # (parameter, its gradient's identity, its version) of the last such
        self.got     = []                         # (number, parameter) of those whose gradient is read in the open row
        self.kept    = []                         # of those whose weights are read, and kept for the update
        self.opt     = None
        self.group, self.eps = {}, {}             # number -> parameter group; the eps of an optimizer that has one
        self.sizes   = None                       # of the parameter groups
        self.lazy    = False                      # parameters are still to come
        self.in_parts = False                     # this process holds a part of each: none is read
        self.seen    = None                       # identities and versions of the gradients as they were read
        self.stepped = []                         # [(parameter, mark of its gradient)] after the last step

    # --- on and off --------------------------------------------------------------------------------------------------

    def attach(self, model, opt):
        "Note which parameters are trained, and have each say when it received a gradient."
        self._find(model)
        self.flags = [p.requires_grad for _, p in self.all]
        self.set_optimizer(opt)

    def _find(self, model):
        "The parameters that can be read, each with a hook."
        self.detach()
        self.lazy = False
        self.in_parts = self.in_parts or shared_out(model)
        if self.in_parts: return self.builder.ignore('grad, weight, update', (
            'the parameters are shared out over processes (FSDP), of which each holds a part: on one, or under '
            'DistributedDataParallel, they are read. Activations and losses are those of this process'))
        for name, owner, m, p in named_params(model):
            if isinstance(p, torch.nn.parameter.UninitializedParameter): self.lazy = True; continue
            k = self.builder.add_parameter(name, owner, type(m).__name__, p)
            self.all.append((k, p))
            if p.requires_grad:
                self.trained.append((k, p))
                self.builder.trained.add(k)
                self.handles.append(p.register_post_accumulate_grad_hook(self.accumulated))

    def set_optimizer(self, opt):
        "Which parameter group each parameter is in, and the eps of an optimizer that keeps a second moment."
        self.opt, self.group, self.eps, self.sizes = opt, {}, {}, _sizes(opt)
        if opt is None: return
        groups = [(ps, h, 'sqr_mom' in h or not hasattr(opt, 'hypers')) for ps, h in zip(parameters(opt), hypers(opt))]
        where  = {id(p): i for i, (ps, _, _) in enumerate(groups) for p in ps}
        for i, p in self.all:
            if id(p) not in where: continue
            self.group[i] = where[id(p)]
            self.builder.optimized.add(i)
            _, h, second  = groups[where[id(p)]]
            if second and isinstance(h.get('eps'), (Real, torch.Tensor)): self.eps[i] = float(h['eps'])

    def groups_changed(self): return self.sizes != _sizes(self.opt)

    def detach(self):
        for h in self.handles: h.remove()
        self.handles, self.all, self.trained, self.flags, self.got, self.stepped = [], [], [], [], [], []

    # --- since the last step -----------------------------------------------------------------------------------------

    @timed
    def accumulated(self, p):
        "A parameter has received a gradient from the backward pass that is under way."
        self.touched.add(p)
        self.tasks.add(torch._C._current_graph_task_id())
        g = p.grad
        self.last = p, id(g), g._version if g is not None and not g.is_sparse else 0
        if self.scale is not None: self.scaled[p] = self.scale, _mark(g)
        elif self.scaled:          self.scaled.pop(p, None)

    def still_scaled(self, p):
        "By what a scaler has multiplied a parameter's gradient, if nobody has changed it since."
        scale, mark = self.scaled.get(p, (None, None))
        return scale if mark == _mark(p.grad) else None

    def forget(self):
        "What was received belongs to a step that is over, or to none."
        self.touched.clear()
        self.tasks.clear()
        self.last = None

    def were_zeroed(self):
        "Whether gradients that were received since the last step have been taken away again, by whatever means."
        if self.last is None: return False
        p, was, version = self.last
        g = p.grad
        if g is None: return True
        if id(g) == was and (g.is_sparse or g._version == version): return False
        return not bool(g.any()) if not g.is_sparse else False

    def were_kept(self):
        "Whether the gradients of the last step are still there, to be added to: 1., 0., or NaN where none is known."
        held = [p.grad for p, was in self.stepped if p.grad is not None and _mark(p.grad) == was]
        if not self.stepped: return math.nan
        return float(any(bool((g._values() if g.is_sparse else g).any()) for g in held[:1]))     # .data zeroed unseen

    def all_gone(self): return not self.in_parts and all(p.grad is None for p in self.touched)

    # --- around a step -----------------------------------------------------------------------------------------------

    @timed
    def gradients(self, row, exact=False, scale=None):
        """Read the true gradient: after unscaling, before clipping. `exact`: count non-finite elements without
        sampling; `scale(i, p)`: what it is still multiplied by, or None."""
        row.read = True
        if not row.measured: return
        have     = [(i, p) for i, p in self.all if p.grad is not None]
        self.got = [(i, p) for i, p in have if p in self.touched or self.watcher.may_be_touched(p)]
        for i, p in have if len(have) > len(self.got) else ():
            if p.requires_grad and all(p is not q for _, q in self.got): self.builder.no_gradient(i)
        self.builder.received.update(i for i, _ in self.got)
        gs    = self._gradients(scale)
        norms = self._capture(row, 'grad', gs, self.got, None if exact else self.plan.sample)
        row.norms, row.grad_norm = norms, _total(norms)
        self.seen = [(id(p.grad), p.grad._version) for _, p in self.got]

    def _gradients(self, scale):
        if scale is None: return [p.grad for _, p in self.got]
        return [p.grad if s is None else p.grad / s for i, p in self.got for s in [scale(i, p)]]

    @timed
    def used(self, row, now, sure=True, scale=None):
        """The gradient that the optimizer consumes. `now`: it is what was just read; `sure`: who changed one since did
        it in a way that its version counter shows (`p.grad.data` would not)."""
        if not row.measured: return
        same = now or sure and self.seen == [(id(p.grad), p.grad._version) for _, p in self.got]
        if not same or 'grad_used' in self.plan.stats:
            norms = self._capture(row, 'grad_used', self._gradients(scale), self.got)
        if self.got: row.clip = 1. if same else _divide(_total(norms), row.grad_norm)

    @timed
    def weights(self, row, which=None):
        """The weights before the step, of all that it may move: also where nothing came to a gradient that is zero, as
        momentum and decay go on. What is kept of them is what the update is measured from."""
        if not row.measured: return
        self.kept = which or [(i, p) for i, p in self.all if p.grad is not None]
        norms = self.reader.keep(*zip(*self.kept), self.plan.wanted['update']) if 'update' in self.plan.stats and \
                self.kept else {}
        if 'weight' in self.plan.stats: self._capture(row, 'weight', [p for _, p in self.kept], self.kept, known=norms)

    @timed
    def updates(self, row):
        "What the step has changed."
        row.stepped = row.done = True
        self.stepped = [(p, _mark(p.grad)) for i, p in self.got
                        if p.grad is not None and (i in self.group or not self.group)]
        if not row.measured or 'update' not in self.plan.stats: return
        lrs = row.lrs or ()
        row.layer_lrs = {i: lrs[self.group[i]] for i, _ in self.kept if self.group.get(i, len(lrs)) < len(lrs)}
        diffs, norms = self.reader.changes(*zip(*self.kept), self.plan.wanted['update']) if self.kept else ([], {})
        self._capture(row, 'update', diffs, self.kept, known=norms)

    @timed
    def no_updates(self, row):
        "The step was not taken: the weights are as they were."
        row.done = True
        if not row.read or not row.measured: return
        if 'weight' in self.plan.stats: self._capture(row, 'weight', [p for _, p in self.got], self.got)
        if 'update' in self.plan.stats:
            self._capture(row, 'update', [torch.zeros(1).expand(p.shape) for _, p in self.got], self.got)

    @property
    def reader(self): return self.watcher.reader

    def _capture(self, row, probe, xs, places, sample=..., known=()):
        """Read one tensor of every parameter in `places`; returns their norms, numbers or 0-dim tensors. `known`: those
        that are known already, by their place there."""
        wanted, own = self.plan.wanted.get(probe), row.own
        for i, p in places:
            if p.is_complex(): self.builder.take_magnitudes(i, p)
        try: found, norms = self.reader.read_all(xs, wanted, sample=self.plan.sample if sample is ... else sample,
                                                 eps=[self.eps.get(i) for i, _ in places], known=known)
        except Failed as e: raise self.builder.failure(e, probe, places[e.k][0], xs[e.k]) from e.__cause__
        if wanted:
            for (i, _), f in zip(places, found): own.add(probe, i, f, wanted)
        return norms


def _mark(g):
    "What changes when a gradient is replaced, or changed in place."
    return id(g), g._version if g is not None and not g.is_sparse else 0

def _sizes(opt):
    "How many parameters each group has."
    return None if opt is None else [len(ps) for ps in parameters(opt)]

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
