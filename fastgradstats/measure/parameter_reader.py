"""Steps: what a Watcher reads of the parameters, around a step of the optimizer."""
from __future__ import annotations

import math

import numpy as np
import torch

from .readers import kernels
from .record_builder import Row
from .module_hooks import timed
from .readers.cpu import SMALL, small_ones
from .reductions import View


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
        self.row.grad_norm = _total(norms)
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
        norms = self._keep() if 'update' in self.plan.stats and self.got else {}
        if 'weight' in self.plan.stats: self._capture_params('weight', [p for _, p in self.got], norms=norms)

    @timed
    def after_update(self):
        if self.row is None or not self.row.read: return
        self.row.stepped = self.row.done = True
        if not self.row.measured or 'update' not in self.plan.stats: return
        lrs = self.row.lrs or ()
        self.row.layer_lrs = {i: lrs[self.group[i]] for i, _ in self.got if self.group.get(i, len(lrs)) < len(lrs)}
        norms, diff = {}, {}
        with torch.no_grad():
            if self._few:
                now, ends = self.places.line_up([self.got[k][1] for k in self._few])
                found     = np.empty(len(ends))
                kernels.distances(now, self._kept, ends, found)
                norms     = dict(zip(self._few, found.tolist()))
            for k, (i, p) in enumerate(self.got):
                if k in norms: continue
                if p.dtype.itemsize < 4: diff[i] = p.float() - self._old[i].float()   # not rounded
                elif 'update' in self.plan.only_norm and self._in_one_pass(p):
                    norms[k] = math.sqrt(kernels.advance(_array(p), _array(self._old[i])))
                else: diff[i] = torch.sub(p, self._old[i], out=self._old[i])
        self._capture_params('update', [diff.get(i, p) for i, p in self.got], norms=norms)

    def _keep(self):
        """One copy of the parameters about to change. The small ones are copied one behind the other; a large one
        mostly is there already, as it was after the last step. Returns the norms found, by their place in `got`."""
        fast, norms, rest = self.host is not False and 'update' in self.plan.only_norm, {}, []
        self._few = small_ones([p for _, p in self.got]) if fast else []
        if self._few:
            self._kept, ends = self.places.line_up([self.got[k][1] for k in self._few], 'kept')
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
        if self.host is not False and probe in self.plan.small and (sample is None or sample >= SMALL):
            which, numbers, norms, hists = self.places.read_small(ts, self.plan.names[probe])
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
        rest = [k for k in range(len(ts)) if k not in out]
        few = [rest[j] for j in small_ones([ts[k] for k in rest])] if self.host is not False else []
        if few:
            x, ends = self.places.line_up([ts[k] for k in few])
            found   = np.empty(len(ends))
            kernels.norms(x, ends, found)
            out.update(zip(few, found.tolist()))
        return [out[k] if k in out else View(t, None, host=self.host, sampled=False).norm for k, t in enumerate(ts)]


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
