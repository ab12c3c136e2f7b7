"""Steps: what a Watcher reads of the parameters, around a step of the optimizer."""
from __future__ import annotations

import math

import torch

from .record_builder import Row
from .module_hooks import timed
from .readers import Failed


class Steps:
    "The parameters' side of a Watcher: gradients as they are and as they are used, weights, updates."
    @timed
    def grads(self, exact=False):
        "Read the true gradient: after unscaling, before clipping. `exact`: count non-finite elements without sampling."
        if self.row is None or not self.row.parts or self.row.read: return
        self.row.read = True
        if not self.row.measured: return
        self.window |= self.touched
        self.got = [(i, p) for i, p in self.params if p.grad is not None and
                    (p in self.window or self.log.processes and bool(p.grad.any()))]   # another process' batch used it
        norms    = self._capture_params('grad', [p.grad for _, p in self.got], None if exact else self.plan.sample)
        self.row.norms, self.row.grad_norm = norms, _total(norms)
        self.seen_grads = [(id(p.grad), p.grad._version) for _, p in self.got]

    @timed
    def before_update(self, sure=True):
        """The optimizer is about to step: the gradient it consumes, and the weights. `sure`: who changed one since
        `grads` did it in a way that its version counter shows (`p.grad.data` would not)."""
        now = self.row is not None and not self.row.read
        self.grads()
        if self.row is None or not self.row.read or not self.row.measured: return
        same = now or sure and self.seen_grads == [(id(p.grad), p.grad._version) for _, p in self.got]
        if not same or 'grad_used' in self.plan.stats:
            norms = self._capture_params('grad_used', [p.grad for _, p in self.got])
        if self.got: self.row.clip = 1. if same else _divide(_total(norms), self.row.grad_norm)
        norms = self.reader.keep(*zip(*self.got), self.plan.wanted['update']) if 'update' in self.plan.stats and \
                self.got else {}
        if 'weight' in self.plan.stats: self._capture_params('weight', [p for _, p in self.got], known=norms)

    @timed
    def after_update(self):
        if self.row is None or not self.row.read: return
        self.row.stepped = self.row.done = True
        if not self.row.measured or 'update' not in self.plan.stats: return
        lrs = self.row.lrs or ()
        self.row.layer_lrs = {i: lrs[self.group[i]] for i, _ in self.got if self.group.get(i, len(lrs)) < len(lrs)}
        diffs, norms = self.reader.changes(*zip(*self.got), self.plan.wanted['update']) if self.got else ([], {})
        self._capture_params('update', diffs, known=norms)

    @timed
    def skipped(self):
        "The step was not taken (an overflow under mixed precision): its gradients are a row, its update is 0."
        if self.row is None or self.row.done: return
        self.grads(exact=True)
        self.row.done = True
        if not self.row.read or not self.row.measured: return
        if 'weight' in self.plan.stats: self._capture_params('weight', [p for _, p in self.got])
        if 'update' in self.plan.stats:
            self._capture_params('update', [torch.zeros(1).expand(p.shape) for _, p in self.got])

    def zeroed(self):
        "The gradients are about to be zeroed; if the open row has not been stepped, its step was skipped."
        row, part, mode = self.row, self.part, self.mode
        if row is None or not row.parts or row.done: return
        self.skipped()
        if part is None: return
        self.commit()                                        # the forward pass under way belongs to the next row
        self.row  = Row(row.measured and self.plan.due(self.log.rows, part.last), row.about)
        self.part, self.mode = part, mode
        self.window.clear()

    def _capture_params(self, probe, xs, sample=..., known=()):
        """Read one tensor of every parameter that received a gradient; returns their norms, numbers or 0-dim tensors.
        `known`: those that are known already, by their place in `got`."""
        wanted, own = self.plan.wanted.get(probe), self.row.own
        for i, p in self.got:
            if p.is_complex(): self.log.take_magnitudes(i, p)
        try: found, norms = self.reader.read_all(xs, wanted, sample=self.plan.sample if sample is ... else sample,
                                                 eps=[self.eps.get(i) for i, _ in self.got], known=known)
        except Failed as e: raise self.log.failure(e, probe, self.got[e.k][0], xs[e.k]) from e.__cause__
        if wanted:
            for (i, _), f in zip(self.got, found): own.add(probe, i, f, wanted)
        return norms


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
