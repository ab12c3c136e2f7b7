"""Reading in plain torch, on any device and of any type: the definition of every reduction.

What is found stays where the tensor is, as 0-dim tensors; nothing waits for a device. Another reader is a subclass that
gives the same numbers in another way.
"""
from __future__ import annotations

import math
from contextlib import contextmanager
from functools import lru_cache

import torch

from ...record.bins import BIGGEST, N_BINS
from ..reductions import (BIN_OF_PATTERN, NEAR_ZERO, SAMPLE, Found, base, least_from, plain,
                          stride_of)
from ..rng import unchanged_random_state

CHUNK = 1024          # elements that a float32 sum of squares may run over: 8,192 are wrong by 7e-6, 12 million by 5e-4


class lazy:
    "A property that is computed once; functools' own takes a lock each time, until Python 3.12."
    def __init__(self, f): self.f, self.__doc__ = f, f.__doc__
    def __set_name__(self, owner, name): self.name = name
    def __get__(self, obj, owner=None):
        if obj is None: return self
        value = obj.__dict__[self.name] = self.f(obj)
        return value


class Reductions:
    "One tensor and the reductions of it that statistics share, each computed once."
    def __init__(self, x, sample=SAMPLE, unit_dim=None, bounds=None, eps=None, sampled=True):
        self.x        = plain(x)
        self.n        = self.x.numel()
        self.unit_dim = unit_dim
        self.bounds   = bounds                     # of the activation function, for frac_saturated
        self.eps      = eps                        # of the optimizer, for frac_below_eps
        self.stride   = stride_of(tuple(self.x.shape), sample)
        self.sampled  = sampled                    # whether the sample is wanted too

    @lazy
    def flat(self):
        "The elements of x in memory order.  # (n,), a view wherever x is dense"
        return in_memory(self.x)[0].reshape(-1)

    # moments: always of everything
    @lazy
    def sum(self): return self.flat.sum(dtype=_wide_type(self.x)) if self.n else 0.
    @lazy
    def norm(self):
        "2-norm, right from the smallest to the largest float: squares of 1e-23 or 1e20 do not fit a float32."
        return self._safe_norm() if self.n else 0.
    @lazy
    def m2_root(self):
        "||x - mean||, in a second pass over x - mean: the difference of two sums loses it where the mean is large."
        return self._safe_norm(centred=True) if self.n else 0.

    def _safe_norm(self, centred=False):
        "||x||, or ||x - mean||, in numbers near 1 so that no square leaves the range of its type."
        lo, hi = torch.aminmax(self.flat)
        m  = torch.maximum(-lo, hi)
        ok = (m > 0) & torch.isfinite(m)
        e  = torch.frexp(torch.where(ok, m, torch.ones_like(m))).exponent
        y  = _ldexp(self.flat, -e)
        if centred:
            for _ in range(2): y = y - (y.sum(dtype=_wide_type(y)) / self.n).to(y.dtype)    # twice: a mean is rounded
        return _ldexp(_wide(_norm(y)), e)

    @lazy
    def _extremes(self):
        if not self.n: return math.nan, math.nan
        lo, hi = self.unit_extremes if 'unit_extremes' in self.__dict__ and self.unit_dim is not None else \
                 (self.flat, self.flat)
        return lo.amin(), hi.amax()
    @lazy
    def min(self): return self._extremes[0]
    @lazy
    def max(self): return self._extremes[1]

    # the sample: every stride-th element
    @lazy
    def n_sampled(self): return -(-self.n // self.stride)
    @property
    def scale(self): return self.n / self.n_sampled if self.n else 0.     # elements that one sampled element stands for
    @lazy
    def sample(self): return self.flat if self.stride == 1 else self.flat[::self.stride].contiguous()
    @lazy
    def abs_sample(self): return abs(self.sample)

    def count(self, mask):
        "How many elements of the tensor the mask over its sample stands for."
        return mask.sum(dtype=_wide_type(mask)) * self.scale
    @lazy
    def n_zero(self):      return self.count(self.sample == 0)
    @lazy
    def n_near_zero(self): return self.count(self.abs_sample < NEAR_ZERO)
    @lazy
    def n_nonfinite(self): return self.count(~torch.isfinite(self.sample))
    @lazy
    def n_underflow_fp16(self):
        a = self.abs_sample
        return self.count((a > 0) & (a <= 2.0 ** -25) | (a >= 65520.))
    @lazy
    def n_below_eps(self):
        if self.eps is None: return math.nan
        return self.count(self.abs_sample < least_from(self.eps, self.x.dtype))
    @lazy
    def n_saturated(self):
        if self.bounds is None: return math.nan
        lo, hi = self.bounds
        edge   = .015 * (hi - lo)                  # 3 % of the half range: |tanh| > .97, a sigmoid outside .015 to .985
        low, high = (least_from(t, self.x.dtype) for t in (lo + edge, edge - hi))
        return self.count((self.sample < low) | (-self.sample < high))
    @lazy
    def abs_sum(self):
        "Sum of magnitudes, scaled from the sample to the whole."
        return _wide(self.abs_sample).sum() * self.scale if self.n else 0.

    @lazy
    def median(self):     return self._kth(self.sample)
    @lazy
    def abs_median(self): return self._kth(self.abs_sample)
    def _kth(self, s):
        "Lower median of the sample or of its magnitudes; NaN where the tensor has one."
        if not self.n: return math.nan
        return (s.sort().values[(self.n_sampled - 1) // 2]
                + torch.where(torch.isnan(self.max), self.max, torch.zeros_like(self.max)))

    @lazy
    def hist(self):
        "Counts over the N_BINS fixed bins, scaled to the whole tensor.  # (N_BINS,)"
        s   = as_float32(self.sample)
        raw = ((s.view(torch.int32) >> 21) + 1024).long()
        one = _wide(torch.ones((), device=s.device))         # a float32 counts no further than 16 million
        raw = one.new_zeros(2048).scatter_add_(0, raw, one.expand(len(raw)))
        return one.new_zeros(N_BINS).index_add_(0, _bin_of_pattern_on(s.device), raw) * self.scale

    # per unit (a channel or feature): the axis unit_dim
    @property
    def unit_axis(self):
        if self.unit_dim is None: raise ValueError("a statistic of units needs unit_dim, the axis of the units: 1 "
                                                   "after a convolution, -1 after a Linear")
        return self.unit_dim % self.x.dim()
    @lazy
    def by_unit(self):
        "x with its units last and all else flattened, where that needs no copy; otherwise None."
        y = self.x.movedim(self.unit_axis, -1)
        return y.reshape(-1, y.shape[-1]) if y.is_contiguous() else None
    def over_units(self, f):
        """f (amin or amax) over everything but the units; over the examples first, which is 8 times quicker than at
        once."""
        if self.by_unit is not None: return f(self.by_unit, 0)
        x, d = self.x, self.unit_axis
        if d: x, d = f(x, 0), d - 1
        rest = tuple(i for i in range(x.dim()) if i != d)
        return f(x, rest) if rest else x
    def _no_units(self, value): return self.x.new_full((self.x.shape[self.unit_axis],), value)
    @lazy
    def unit_extremes(self):
        "The least and the greatest value of each unit; the identities of min and max where there is no element."
        if self.unit_dim is None or not self.n: return self._no_units(math.inf), self._no_units(-math.inf)
        return self.over_units(torch.amin), self.over_units(torch.amax)                           # (unit,), (unit,)
    @lazy
    def unit_min(self): return self.unit_extremes[0]
    @lazy
    def unit_max(self): return self.unit_extremes[1]
    @lazy
    def unit_abs_sum(self):
        if not self.n: return self._no_units(0.)
        return self.over_units(lambda x, dim: torch.linalg.vector_norm(x, 1, dim=dim, dtype=_wide_type(x)))   # (unit,)


class Reference:
    "A reader: what the statistics want of one tensor, or of all parameters together, and what a step changes."
    reductions = Reductions
    def __init__(self): self.kept = {}            # number of a parameter -> its copy from before the step

    def of(self, x, **about): return self.reductions(x, **about)

    def number(self, x):
        "One number, the mean of several: a float where it can be had at once, else a 0-dim tensor on its device."
        if type(x) in (float, int): return x
        if not isinstance(x, torch.Tensor): return float(x)
        x = base(x).detach()
        return x.reshape(()) if x.numel() == 1 else x.float().mean()

    def class_counts(self, y, n):
        "How often each of n classes is in the targets; others, as torch's ignore_index, are left out.  # (n,)"
        y     = y.reshape(-1)
        known = (y >= 0) & (y < n)
        kind  = torch.float64 if y.device.type != 'mps' else torch.float32
        zeros = torch.zeros(n, dtype=kind, device=y.device)
        return zeros.index_add_(0, torch.where(known, y, 0).long(), known.to(kind))

    def cross_entropy(self, pred, y, axis):
        "Of the mean answer: its log-softmax once, not once an example. `pred`: plain; y: int64, without the axis."
        logp  = torch.log_softmax(pred.mean(0, keepdim=True, dtype=_wide_type(pred) or torch.float32), axis)
        known = y != -100                                                  # torch's ignore_index
        each  = logp.expand_as(pred).gather(axis, torch.where(known, y, 0).unsqueeze(axis)).squeeze(axis)
        return -(each * known).sum() / known.sum()

    # --- one tensor --------------------------------------------------------------------------------------------------
    def read(self, x, wanted, *, units=(), **about):
        "What is wanted of a tensor, and the statistics `units` of its units; None if it has no elements."
        r = self.of(x, sampled=wanted.sampled, **about)
        if not r.n: return None
        units   = [(s, s.f(r)) for s in units] if r.unit_dim is not None else ()
        if not wanted.functions: numbers = self._numbers(r, wanted)
        else:
            with _aside(r.x.device): numbers = self._numbers(r, wanted)
        return Found(numbers, r.hist if wanted.hists else None, units)

    def _numbers(self, r, wanted, have={}):
        "The reductions wanted, but for those that one has, and what functions give, a user's mostly."
        found = [have[a] if a in have else self.number(getattr(r, a)) for a in wanted.names]
        for s in wanted.functions:
            try:
                out = s.f(r)
                if len(out) != wanted.widths.setdefault(s.name, len(out)):
                    raise ValueError(f"it gave {len(out)} numbers, and {wanted.widths[s.name]} before")
                found += map(self.number, out)
            except Exception as e: raise Failed(s.name) from e
        return found

    # --- all parameters ----------------------------------------------------------------------------------------------
    def read_all(self, xs, wanted=None, *, sample=SAMPLE, eps=(), known=()):
        """Of the parameters' tensors together: what is wanted of each, None where that has no elements, and all their
        norms. `wanted`: None for the norms alone; `eps`: of each one's optimizer; `known`: {place: norm} of those that
        are known already."""
        if wanted is None or wanted.only_norm:
            norms = self.norms(xs, dict(known))
            return [Found((x.numel(), v)) if x.numel() else None for x, v in zip(xs, norms)], norms
        if not wanted.functions: return self._read_all(xs, wanted, sample, eps)
        with _aside(xs[0].device if len(xs) else torch.device('cpu')): return self._read_all(xs, wanted, sample, eps)

    def _read_all(self, xs, wanted, sample, eps):
        names, batch = self.at_once(xs, wanted, sample)
        all_read     = names == wanted.names and not wanted.functions
        found, norms = [], []
        for k, x in enumerate(xs):
            numbers, norm, hist = batch.get(k, ((), None, None))
            if k not in batch or not all_read:
                r = self.of(x, sample=sample, eps=eps[k] if len(eps) else None, sampled=wanted.sampled)
                try: numbers = self._numbers(r, wanted, dict(zip(names, numbers)))
                except Exception as e: raise Failed(getattr(e, 'name', None), k) from e.__cause__ or e
                if k not in batch: norm, hist = r.norm, r.hist if wanted.hists and r.n else None
            found.append(Found(numbers, hist if x.dim() > 1 and not x.is_complex() else None) if x.numel() else None)
            norms.append(norm)
        return found, norms

    def at_once(self, xs, wanted, sample):
        """What can be read of many tensors in one call: the names read of them, in the order of `wanted.names`, and
        {place: (numbers, norm, histogram)}."""
        return (), {}

    def norms(self, xs, known):
        "The 2-norm of every tensor; `known`: {place: norm} of those that are known already."
        return [known[k] if k in known else self.of(x, sample=None, sampled=False).norm for k, x in enumerate(xs)]

    # --- what a step changes -----------------------------------------------------------------------------------------
    def keep(self, keys, ps, wanted):
        """Copy the parameters that are about to change. `wanted`: what will be of the change. Returns norms of the
        parameters that came by the way, {place: norm}."""
        old = [self._slot(key, p) for key, p in zip(keys, ps)]
        with torch.no_grad():
            if old: torch._foreach_copy_(old, list(ps))
        return {}

    def _slot(self, key, p):
        "Where the copy of a parameter stands."
        old = self.kept.get(key)
        if old is None or (old.shape, old.stride(), old.device, old.dtype) != (p.shape, p.stride(), p.device, p.dtype):
            old = self.kept[key] = torch.empty_like(p, requires_grad=False).zero_()
        return old

    def changes(self, keys, ps, wanted):
        "New minus old of the parameters that were kept, and its norms where they came by the way, {place: norm}."
        with torch.no_grad(): return [self._change(key, p) for key, p in zip(keys, ps)], {}

    def _change(self, key, p):
        old = self.kept[key]
        return p.float() - old.float() if p.dtype.itemsize < 4 else torch.sub(p, old, out=old)      # halves would round

    def forget(self): self.kept = {}


class Failed(Exception):
    "A statistic could not be read: its name, if it is known, and the place of the tensor among many."
    def __init__(self, name=None, k=None):
        super().__init__(name, k)
        self.name, self.k = name, k


@contextmanager
def _aside(device):
    "What a user's function does to random states, gradients and autocast has no effect."
    with unchanged_random_state(device), torch.no_grad(), torch.autocast(device.type, enabled=False): yield

def in_memory(x, d=None):
    "`x` with its axes in the order of the memory, contiguous wherever it is dense, and where its axis `d` is then."
    if x.is_contiguous(): return x, d
    order = sorted(range(x.dim()), key=lambda a: -x.stride(a))
    return x.permute(order), d if d is None else order.index(d % x.dim())

def _norm(x):
    """2-norm of a flat tensor, the squares summed by chunks: one float32 accumulator over millions drifts by 1e-4 and
    more."""
    n = x.numel()
    if n <= CHUNK: return torch.linalg.vector_norm(x)
    k = n // CHUNK
    r = torch.linalg.vector_norm(x[:k * CHUNK].view(k, CHUNK), dim=1)
    if k * CHUNK < n: r = torch.cat([r, torch.linalg.vector_norm(x[k * CHUNK:]).view(1)])
    return torch.linalg.vector_norm(_wide(r))

def _wide_type(x): return None if x.device.type == 'mps' else torch.float64
def _wide(x):
    "As float64, where the device has it."
    return x if x.device.type == 'mps' else x.double()

def _ldexp(x, e):
    "x 2^e by two steps: 2^e itself need not be a number of its type."
    return torch.ldexp(torch.ldexp(x, e // 2), e - e // 2)

@lru_cache(maxsize=None)
def _bin_of_pattern_on(device): return torch.from_numpy(BIN_OF_PATTERN).to(device)

def as_float32(s):
    "A float64 tensor as float32 that stays non-zero and finite where it was."
    if s.dtype == torch.float32: return s
    t = s.float()
    t = torch.where((t == 0) & (s != 0), torch.copysign(torch.full_like(t, 2. ** -149), t), t)
    return torch.where(torch.isinf(t) & torch.isfinite(s), torch.copysign(torch.full_like(t, BIGGEST), t), t)
