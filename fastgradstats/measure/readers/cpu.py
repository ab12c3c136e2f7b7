"""What the CPU reads in one call, batch after batch: the output of a module, and all the small parameters together.

A View asks for one reduction after another, which is right for any tensor; most are contiguous float32 of the same
shape each time, and for these scratch and order are made once.
"""
from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from . import kernels
from ..reductions import BIN_OF_PATTERN, N_BINS, NEAR_BITS, View, rows_of, stride_of

PLAIN       = (torch.Tensor, torch.nn.Parameter)
SMALL       = 16384      # tensors of up to so many elements are read many in one call
MOMENTS     = ('n', 'sum', 'm2_root', 'norm', 'min', 'max')
SITE_READS  = (*MOMENTS, 'n_zero', 'n_near_zero', 'n_nonfinite')
SMALL_READS = (*MOMENTS, 'abs_sum', 'n_zero', 'n_near_zero', 'n_nonfinite', 'median', 'abs_median')


def base(t):
    "A tensor of any subclass as a plain one; its own operations take twenty times as long."
    if type(t) is torch.Tensor: return t
    with torch._C.DisableTorchFunctionSubclass(): return t.as_subclass(torch.Tensor)


class Place:
    "A place at which contiguous float32 tensors of one shape are read, each in one call; everything else is a View's."
    __slots__ = ('shape', 'dim', 'n', 'rows', 'stride', 'sample', 'lo', 'hi', 'out', 'n_units', 'picked')
    def __init__(self, shape, dim, sample, names, hist):
        self.shape, self.dim, self.n = shape, dim, shape.numel()
        self.out    = np.empty(len(SITE_READS))
        self.picked = np.array([SITE_READS.index(a) for a in names])
        if not hist: self.lo, self.hi = np.empty((2, 1024), np.float32); return
        (self.rows, _), units = rows_of(shape, 1 if dim is None else dim % len(shape))
        self.lo, self.hi = np.empty((2, *units), np.float32)
        self.n_units = units[1]
        self.stride  = stride_of(tuple(shape), sample)
        self.sample  = np.empty(self.lo.size, np.float32)

    def _numbers(self): return self.out[self.picked].tolist()

    def moments(self, t):
        "The numbers asked for; None if they need more care."
        return self._numbers() if kernels.whole(t.data_ptr(), self.n, self.lo, self.hi, self.out) else None

    def site(self, t):
        "The numbers asked for, the histogram (bin,), the extremes of each unit (2, unit); None if they need more care."
        hist, units = np.empty(N_BINS), np.empty((2, self.n_units), np.float32)
        fine = kernels.site(t.data_ptr(), self.rows, self.stride, self.sample, NEAR_BITS, BIN_OF_PATTERN, hist,
                            self.lo, self.hi, units, self.out)
        return (self._numbers(), hist, units) if fine else None


class Places:
    "The places of one watcher, and the scratch of its parameters; made anew where shapes change."
    def __init__(self): self.by_key, self.by_sizes = {}, {}

    def find(self, key, t, dim, sample, names, hist=False):
        "The Place that reads tensors like the plain tensor `t`, or None."
        if not (t.dtype is torch.float32 and t.is_cpu and t.layout is torch.strided and t.is_contiguous()): return None
        known = self.by_key.get(key)
        if known is not None and known.shape == t.shape and known.dim == dim: return known
        if not t.numel() or t.is_neg(): return None
        if hist and (t.dim() < 2 or dim is not None and dim % t.dim() not in (1, t.dim() - 1)): return None
        known = self.by_key[key] = Place(t.shape, dim, sample, names, hist)
        return known

    def line_up(self, tensors, use=''):
        """The elements of `small_ones`, one tensor behind the other, in scratch that is kept for each `use`, and where
        each ends.  # (n,), (tensor,)"""
        sizes = tuple([t.numel() for t in tensors])
        if (sizes, use) not in self.by_sizes:
            if len(self.by_sizes) > 16: self.by_sizes.clear()
            self.by_sizes[sizes, use] = np.empty(sum(sizes), np.float32), np.cumsum(sizes)
        x, ends = self.by_sizes[sizes, use]
        tensors = [t if t.is_contiguous() else t.detach().contiguous() for t in tensors]
        kernels.line_up(np.array([t.data_ptr() for t in tensors]), ends, x)
        return x, ends

    def read_small(self, tensors, names):
        """Read all the small ones of `tensors` in one call. Returns which were read; their numbers, (tensor, name),
        names among SMALL_READS; their norms; their histograms, (tensor, bin), of those with two or more dimensions.
        What is not finite, or has a mean beyond 10 std, is left to a View."""
        few = small_ones(tensors)
        if not few: return [], [], [], []
        x, ends = self.line_up([tensors[k] for k in few])
        wide    = np.array([tensors[k].dim() > 1 for k in few])
        out, hists = np.empty((len(few), len(SMALL_READS))), np.empty((len(few), N_BINS))
        if not kernels.small(x, ends, wide, NEAR_BITS, BIN_OF_PATTERN, out, hists):
            kept = np.flatnonzero(out[:, 0] > 0)
            few, out, hists = [few[k] for k in kept], out[kept], hists[kept]
        return few, out[:, _columns(names)].tolist(), out[:, 3].tolist(), hists


@lru_cache(maxsize=None)
def _columns(names): return np.array([SMALL_READS.index(a) for a in names])

def small_ones(tensors):
    "Which of the tensors can be read many in one call: small ones of float32 on the CPU."
    return [k for k, t in enumerate(tensors) if type(t) in PLAIN and t.dtype is torch.float32 and t.is_cpu
            and t.layout is torch.strided and 0 < t.numel() <= SMALL and not t.is_neg()]


@lru_cache(maxsize=None)
def warm_up():
    "Compile, or load from disk, what the first batch would otherwise wait for."
    places, t = Places(), torch.arange(6.).reshape(2, 3)
    places.read_small([t, t[0]], SMALL_READS)
    Place(t.shape, 1, None, MOMENTS, True).site(t), Place(t.shape, None, None, MOMENTS, False).moments(t)
    View(t)._pass
    v = View(t, unit_dim=1)
    v.unit_extremes, v.hist, v.median
    x, ends = places.line_up([t])
    kernels.synchronise(x, x.copy()), kernels.advance(x, x.copy())
    kernels.norms(x, ends, np.empty(1)), kernels.distances(x, x, ends, np.empty(1))
    kernels.cross_entropy_of_mean(x[None], np.zeros(1, np.int64))
