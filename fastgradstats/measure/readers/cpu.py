"""Reading on the CPU: a large tensor in one compiled pass over the memory (kernels.py), all small ones in one call.

What these loops do not take (another type or device, NaN, numbers whose squares leave a float32) is the reference's.
"""
from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch

from . import kernels
from .reference import Reductions, Reference, as_float32, in_memory, lazy
from ...record.bins import N_BINS
from ..reductions import BIN_OF_PATTERN, NEAR_ZERO, SAMPLE, Found, base, stride_of

PLAIN     = (torch.Tensor, torch.nn.Parameter)
SMALL     = 16384        # tensors of up to so many elements are read many in one call
NEAR_BITS = np.float32(NEAR_ZERO).view(np.int32)
AT_ONCE   = ('n', 'sum', 'm2_root', 'norm', 'min', 'max', 'abs_sum', 'n_zero', 'n_near_zero', 'n_nonfinite', 'median',
             'abs_median')                                  # what `kernels.small` and `kernels.whole` write
MEDIANS   = {'median', 'abs_median'}
SAMPLED   = {'abs_sum', 'n_zero', 'n_near_zero', 'n_nonfinite', *MEDIANS}
UNIT_ENDS = ('unit_min', 'unit_max')
NOTHING   = None, None, None


class CpuReductions(Reductions):
    "Sum, squares and extremes in one pass, which also takes the sample; its counts and medians in another."
    @lazy
    def careful(self): return Reductions(self.x.double(), None, self.unit_dim)

    @lazy
    def _pass(self):
        """(sum, sum of squares, least, greatest, those of each column, columns as (repeat, unit, rest)), or None: take
        the careful way."""
        x, rest, units = self._rows() if self.n else (None, None, None)
        if x is None: return None
        lo, hi = np.empty((2, x.shape[1]), x.dtype)
        sample = np.empty(self.n_sampled if self.sampled and self.stride > 1 else 0, x.dtype)
        total, squares, least, greatest = kernels.moments(x, rest, lo, hi, sample, self.stride)
        if len(sample): self.__dict__['sample'] = sample
        if not (math.isfinite(total) and squares < kernels.HUGE): return None   # NaN, Inf, or squares beyond a float32
        if squares < kernels.TINY and (least or greatest): return None          # squares too small for one
        return total, squares, float(least), float(greatest), lo, hi, units

    def _rows(self):
        """x as NumPy (row, column) without a copy, rows short enough to stay in the cache, and what is left; how its
        columns are units."""
        x, d = self.x, self.unit_dim
        if d is None:
            x    = self.flat.numpy()
            r, c = _rows_of(x.shape, None)[0]
            return x[:r * c].reshape(r, c), x[r * c:], None
        x, d = in_memory(x, d)
        if not x.is_contiguous(): return None, None, None
        rows, units = _rows_of(x.shape, d % x.dim())
        x = x.numpy().reshape(rows)
        return x, x[0, :0], units

    @lazy
    def sum(self):  return self._pass[0] if self._pass else float(self.careful.sum)
    @lazy
    def norm(self): return math.sqrt(self._pass[1]) if self._pass else float(self.careful.norm)
    @lazy
    def m2_root(self):
        "From the squares and the sum where the mean is no larger than 10 std: their difference then keeps 1e-5."
        if self._pass:
            squares, of_mean = self._pass[1], self._pass[0] ** 2 / self.n
            if of_mean <= 100 * (squares - of_mean): return math.sqrt(squares - of_mean)
        return float(self.careful.m2_root)
    @lazy
    def _extremes(self):
        if self._pass: return self._pass[2:4]
        return float(self.careful.min), float(self.careful.max)

    @lazy
    def sample(self):     return Reductions.sample.f(self).numpy()
    @lazy
    def _tally(self):
        "(counts of the bins, of the patterns, zeros, near zeros, non-finite) of the sample."
        hist, patterns, s = np.empty(N_BINS), np.zeros((4, 2048), np.int32), self.sample
        if s.dtype != np.float32: s = as_float32(torch.from_numpy(s)).numpy()
        return hist, patterns, *kernels.tally(s.view(np.int32), NEAR_BITS, BIN_OF_PATTERN, patterns, hist)
    def count(self, mask): return np.count_nonzero(mask) * self.scale
    @lazy
    def n_zero(self):      return self._tally[2] * self.scale
    @lazy
    def n_near_zero(self): return self._tally[3] * self.scale
    @lazy
    def n_nonfinite(self): return self._tally[4] * self.scale
    @lazy
    def hist(self):        return self._tally[0] * self.scale                                # (N_BINS,)
    @lazy
    def abs_sum(self):
        with np.errstate(over='ignore'):
            s = self.abs_sample.sum()
            return float(s if math.isfinite(s) else self.abs_sample.sum(dtype=np.float64)) * self.scale

    @lazy
    def _medians(self):
        if not self.n or math.isnan(self.max): return math.nan, math.nan
        s = self.sample
        if s.dtype == np.float32:
            bits = kernels.middle_of(s.view(np.int32), self._tally[1], np.empty(len(s), np.int32))
            return np.array(bits, np.int32).view(np.float32).tolist()
        k = (len(s) - 1) // 2
        return float(np.partition(s, k)[k]), float(np.partition(abs(s), k)[k])
    @lazy
    def median(self):     return self._medians[0]
    @lazy
    def abs_median(self): return self._medians[1]

    @lazy
    def unit_extremes(self):
        if self.unit_dim is not None and self._pass:
            *_, lo, hi, units = self._pass
            out = np.empty((2, units[1]), lo.dtype)
            kernels.of_units(lo.reshape(units), hi.reshape(units), out)
            return tuple(out)
        return tuple(t.numpy() for t in Reductions.unit_extremes.f(self))                    # (unit,), (unit,)


@lru_cache(maxsize=1024)
def _rows_of(shape, d):
    """How a contiguous tensor with its units on axis d, None for no units, is read by rows: (row, column), and its
    columns as (repeat, unit, rest); short rows are read several at once."""
    n = math.prod(shape)
    if d is None: return (max(n // 1024, 1), min(n, 1024)), (0, 0, 0)
    wide = math.prod(shape[d:])
    k    = 1
    while k * wide < 256 and n // wide % (2 * k) == 0: k *= 2
    return (n // (k * wide), k * wide), (k, shape[d], wide // shape[d])

@lru_cache(maxsize=1024)
def _form(shape, d, sample, sampled):
    "How `kernels.whole` reads a contiguous tensor that has elements."
    (rows, columns), units = _rows_of(shape, d)
    n, stride = math.prod(shape), stride_of(shape, sample)
    return np.array([n, rows, columns, stride, -(-n // stride) if sampled else 0, *units])


class Cpu(Reference):
    "The reader of models on the CPU; what lies elsewhere is read as by the reference."
    def __init__(self):
        super().__init__()
        self.small      = []                      # places of the small parameters that were kept,
        self.kept_small = None                    # and these, lined up

    def of(self, x, **about): return (CpuReductions if x.is_cpu else Reductions)(x, **about)

    def number(self, x):
        x = super().number(x)
        if type(x) in (float, int) or not x.is_cpu: return x
        return x.numpy().item() if x.dtype is torch.float32 else float(x)

    def class_counts(self, y, n):
        if not y.is_cpu: return super().class_counts(y, n)
        y = y.reshape(-1).numpy()
        return np.bincount(y[(y >= 0) & (y < n)], minlength=n).astype(float)

    def cross_entropy(self, pred, y, axis):
        "Where examples and places lie in order, read in compiled loops."
        x, d   = in_memory(pred, axis)
        places = [s for k, s in enumerate(pred.stride()) if k != axis]
        plain  = readable(x) and x.is_contiguous() and y.is_cpu and y.is_contiguous()
        if plain and d and places == sorted(places)[::-1]:
            scores = np.empty((math.prod(x.shape[1:d]), x.shape[d], math.prod(x.shape[d + 1:])))
            kernels.mean_of_first(x.data_ptr(), len(x), scores)
            loss   = kernels.cross_entropy(scores, np.exp(scores), y.numpy().reshape(len(x), len(scores), -1))
            if math.isfinite(loss): return loss
        return super().cross_entropy(pred, y, axis)

    def read(self, x, wanted, *, units=(), sample=SAMPLE, unit_dim=None, **about):
        "In one call, if that gives all and the tensor is plain."
        names, columns, _ = _at_once(wanted.names)
        if names == wanted.names and not wanted.functions and all(s.reads == UNIT_ENDS for s in units):
            out, hist, ends = _whole(x, wanted, sample, unit_dim)
            if out is not None:
                return Found(out[columns].tolist(), hist if wanted.hists else None,
                             [(s, ends) for s in units] if unit_dim is not None else ())
        return super().read(x, wanted, units=units, sample=sample, unit_dim=unit_dim, **about)

    def at_once(self, xs, wanted, sample):
        "Many small ones in one call, each large one in one; what needs more care is left out."
        names, columns, _ = _at_once(wanted.names)
        small = small_ones(xs) if sample is None or sample >= SMALL else []
        found = _many([xs[k] for k in small], columns, wanted)
        found = {k: f for k, f in zip(small, found) if f is not None}
        for k in set(range(len(xs))).difference(small):
            out, hist, _ = _whole(xs[k], wanted, sample)
            if out is not None: found[k] = out[columns].tolist(), float(out[3]), hist if wanted.hists else None
        return names, found

    def norms(self, xs, known):
        rest  = [k for k in range(len(xs)) if k not in known]
        small = [rest[j] for j in small_ones([xs[k] for k in rest])]
        if small: known.update(zip(small, _norms(*_line_up([xs[k] for k in small]))))
        return super().norms(xs, known)

    def keep(self, keys, ps, wanted):
        "A large one mostly is there already, as it was after the last step: it is compared, which gives its norm."
        norms, self.small = {}, small_ones(ps) if wanted.only_norm else []
        if self.small:
            self.kept_small, ends = _line_up([ps[k] for k in self.small])
            norms = dict(zip(self.small, _norms(self.kept_small, ends)))
        for k, p in enumerate(ps):
            if wanted.only_norm and _in_one_pass(p):
                norms[k] = math.sqrt(kernels.synchronise(_array(p), _array(self._slot(keys[k], p))))
        rest = [k for k in range(len(ps)) if k not in norms]
        if rest: super().keep([keys[k] for k in rest], [ps[k] for k in rest], wanted)
        return norms

    def changes(self, keys, ps, wanted):
        norms, out = {}, list(ps)
        if self.small:
            x, ends = _line_up([ps[k] for k in self.small])
            found   = np.empty(len(ends))
            kernels.distances(x, self.kept_small, ends, found)
            norms   = dict(zip(self.small, found.tolist()))
        with torch.no_grad():
            for k, p in enumerate(ps):
                if k in norms: continue
                if wanted.only_norm and _in_one_pass(p):
                    norms[k] = math.sqrt(kernels.advance(_array(p), _array(self.kept[keys[k]])))
                else: out[k] = self._change(keys[k], p)
        return out, norms


def _whole(x, wanted, sample, d=None):
    """(numbers of AT_ONCE, histogram, extremes of units) of one tensor of float32, read in one call; (None, ...) if it
    is another or needs more care."""
    x = base(x)
    if not (readable(x) and x.numel()): return NOTHING
    if not x.is_contiguous():
        x, d = in_memory(x.detach(), d)
        if d is None: x = x.contiguous()
        if not x.is_contiguous(): return NOTHING
    *_, asked = _at_once(wanted.names)
    form      = _form(x.shape, d and d % x.dim(), sample, bool(wanted.hists or asked & SAMPLED))
    out, hist, units = np.empty(len(AT_ONCE)), np.empty(N_BINS), np.empty((2, form[6]), np.float32)
    fine = kernels.whole(x.data_ptr(), form, NEAR_BITS, BIN_OF_PATTERN, bool(asked & MEDIANS), out, hist, units)
    return (out, hist, units) if fine else NOTHING

def _many(xs, columns, wanted):
    "(numbers, norm, histogram) of each of the `small_ones`, read in one call; None for what needs more care."
    if not xs: return []
    x, ends    = _line_up(xs)
    out, hists = np.empty((len(xs), len(AT_ONCE))), np.empty((len(xs), N_BINS))
    kernels.small(x, ends, np.array([x.dim() > 1 for x in xs]), NEAR_BITS, BIN_OF_PATTERN, out, hists)
    read = zip(out[:, columns].tolist(), out[:, 3].tolist(), hists, out[:, 0].tolist())
    return [(numbers, norm, hist if wanted.hists else None) if n > 0 else None for numbers, norm, hist, n in read]

def _line_up(xs):
    "The elements of `small_ones`, one tensor behind the other, and where each ends.  # (n,), (tensor,)"
    ends = _ends(tuple([x.numel() for x in xs]))
    out  = np.empty(ends[-1], np.float32)
    xs   = [x if x.is_contiguous() else x.detach().contiguous() for x in xs]
    kernels.line_up(np.array([x.data_ptr() for x in xs]), ends, out)
    return out, ends

@lru_cache(maxsize=1024)
def _ends(sizes): return np.cumsum(sizes)

def _norms(x, ends):
    found = np.empty(len(ends))
    kernels.norms(x, ends, found)
    return found.tolist()

@lru_cache(maxsize=None)
def _at_once(names):
    "Those of the names that are read at once, where their numbers stand, and the same names as a set."
    names = tuple(a for a in names if a in AT_ONCE)
    return names, np.array([AT_ONCE.index(a) for a in names], int), frozenset(names)

def readable(x):
    "Whether compiled loops can read a plain tensor where it lies."
    return x.dtype is torch.float32 and x.is_cpu and x.layout is torch.strided and not x.is_neg() and x.data_ptr() != 0

def small_ones(xs):
    "Which of the tensors can be read many in one call: small ones of float32 on the CPU."
    return [k for k, x in enumerate(xs) if type(x) in PLAIN and 0 < x.numel() <= SMALL and readable(x)]

def _in_one_pass(p): return p.numel() > SMALL and p.is_cpu and p.dtype is torch.float32 and p.is_contiguous()
def _array(p): return p.detach().view(-1).numpy()


@lru_cache(maxsize=None)
def warm_up():
    "Compile, or load from disk, what the first batch would otherwise wait for."
    x = torch.arange(6.).reshape(2, 3)
    r = CpuReductions(x, unit_dim=1)
    r.unit_extremes, r.hist, r.median
    CpuReductions(x).norm
    kernels.whole(x.data_ptr(), _form(x.shape, 1, None, True), NEAR_BITS, BIN_OF_PATTERN, True, np.empty(len(AT_ONCE)),
                  np.empty(N_BINS), np.empty((2, 3), np.float32))
    x, ends = _line_up([x])
    out     = np.empty((1, len(AT_ONCE)))
    kernels.small(x, ends, np.array([True]), NEAR_BITS, BIN_OF_PATTERN, out, np.empty((1, N_BINS)))
    kernels.synchronise(x, x.copy()), kernels.advance(x, x.copy())
    Cpu().cross_entropy(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), 1)
    kernels.norms(x, ends, np.empty(1)), kernels.distances(x, x, ends, np.empty(1))
