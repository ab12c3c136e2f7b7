"""Views: reading a tensor. The reductions that statistics share, each computed once, and the bins of every histogram.

On the CPU a large tensor is read in one compiled pass and small ones many in one call (kernels.py); on a device every
reduction is a torch operation whose result stays there.
"""
from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch

from .readers import kernels

SAMPLE    = 65536        # tensors with more elements are sampled for what is not a moment; see `stride_of`
NEAR_ZERO = 0.05         # |x| below this is near zero: fastai's ActivationStats takes x <= 0.05, without the | |
NEAR_BITS = np.float32(NEAR_ZERO).view(np.int32)
CHUNK     = 1024      # elements that a float32 sum of squares may run over: 8,192 are wrong by 7e-6, 12 million by 5e-4


# --- histogram bins: the top bits of a float32 ----------------------------------------------------------------------
# sign, exponent and two mantissa bits of a float32 are its bin: 4 an octave, magnitudes 2^-32 to 2^16 of both signs
OCTAVES = (-32, 16)
N_MAG   = 4 * (OCTAVES[1] - OCTAVES[0])                     # 192 bins a sign
N_BINS  = 2 * N_MAG + 6                                     # and -inf, < -2^16, zero, > 2^16, +inf, nan
NEG_INF, NEG_BIG, ZERO, POS_BIG, POS_INF, NAN = 0, 1, N_MAG + 2, 2 * N_MAG + 3, 2 * N_MAG + 4, 2 * N_MAG + 5

def _bin_of_pattern():
    "The bin of each of the 2,048 raw patterns `(x.view(int32) >> 21) + 1024`, in value order.  # (2048,)"
    raw  = np.arange(2048)
    neg  = raw < 1024                                       # an arithmetic shift: negative floats are negative ints
    mag  = np.where(neg, raw, raw - 1024)                   # exponent and two mantissa bits, 0..1023
    low  = (OCTAVES[0] + 127) * 4
    k    = mag - low                                        # 0..191 within the range
    out  = np.where(neg, NEG_BIG + N_MAG - k, ZERO + 1 + k)
    out  = np.where(k < 0, ZERO, out)
    out  = np.where(k >= N_MAG, np.where(neg, NEG_BIG, POS_BIG), out)
    out  = np.where(mag == 1020, np.where(neg, NEG_INF, POS_INF), out)
    return np.where(mag > 1020, NAN, out)

BIN_OF_PATTERN = _bin_of_pattern()
_MAGNITUDES    = np.concatenate([np.ldexp(1 + np.arange(4) / 4, o) for o in range(*OCTAVES)] + [[2.0 ** OCTAVES[1]]])
_BIGGEST       = float(np.finfo(np.float32).max)
BIN_EDGES      = np.concatenate([[-_BIGGEST], -_MAGNITUDES[::-1], _MAGNITUDES, [_BIGGEST]])          # (388,)
BIN_LABELS     = {NEG_INF: '-inf', NEG_BIG: '< -65536', ZERO: 'zero', POS_BIG: '> 65536', POS_INF: '+inf', NAN: 'nan'}

# --- reading a tensor ------------------------------------------------------------------------------------------------
@lru_cache(maxsize=None)
def stride_of(shape, sample):
    """The fixed stride at which a tensor of this shape is sampled: at least n / sample and coprime to every dimension,
    so that it visits every position of a kernel, every channel and every example alike. 1 means everything is read."""
    n = math.prod(shape)
    if sample is None or n <= sample: return 1
    s = -(-n // sample)
    while any(math.gcd(s, d) > 1 for d in shape if d > 1): s += 1
    return s

def plain(x):
    "`x` as a detached plain real tensor of at least float32; complex numbers by their magnitude."
    x = x.detach()
    if type(x) is not torch.Tensor: x = x.as_subclass(torch.Tensor)
    if x.layout != torch.strided: x = x.to_dense()
    if x.is_complex(): x = x.resolve_conj().abs()
    if x.is_neg():     x = x.resolve_neg()                  # the imaginary part of a conjugate
    return x if x.dtype in (torch.float32, torch.float64) else x.float()

def flat(x):
    "The elements of `x` in memory order.  # (n,), a view wherever x is dense"
    if x.is_contiguous(): return x.view(-1)
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last): return x.permute(0, 2, 3, 1).reshape(-1)
    if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
        return x.permute(0, 2, 3, 4, 1).reshape(-1)
    return x.reshape(-1)

def _norm(x):
    """2-norm of a flat tensor, the squares summed by chunks: one float32 accumulator over millions drifts by 1e-4 and
    more."""
    n = x.numel()
    if n <= CHUNK: return torch.linalg.vector_norm(x)
    k = n // CHUNK
    r = torch.linalg.vector_norm(x[:k * CHUNK].view(k, CHUNK), dim=1)
    if k * CHUNK < n: r = torch.cat([r, torch.linalg.vector_norm(x[k * CHUNK:]).view(1)])
    return torch.linalg.vector_norm(_wide(r))

def _wide(x):
    "As float64, where the device has it."
    return x if x.device.type == 'mps' else x.double()

def _ldexp(x, e):
    "x 2^e by two steps: 2^e itself need not be a number of its type."
    return torch.ldexp(torch.ldexp(x, e // 2), e - e // 2)

@lru_cache(maxsize=256)
def _least(t, dtype):
    "The least number of the type that is not below t: with it x < t is exact, though t is not a number of the type."
    if dtype in (torch.float64, np.float64): return float(t)
    with np.errstate(over='ignore'): r = np.float32(t)
    return float(r if float(r) >= t else np.nextafter(r, np.float32(np.inf)))


class lazy:
    "A property that is computed once; functools' own takes a lock each time, until Python 3.12."
    def __init__(self, f): self.f, self.__doc__ = f, f.__doc__
    def __set_name__(self, owner, name): self.name = name
    def __get__(self, obj, owner=None):
        if obj is None: return self
        value = obj.__dict__[self.name] = self.f(obj)
        return value


def rows_of(shape, d):
    """How a contiguous tensor with its units on axis d, the second or the last, is read by rows: (row, column), and its
    columns as (repeat, unit, rest); short rows are read several at once."""
    n, U = math.prod(shape), shape[d]
    wide = n // shape[0] if d == 1 else U
    k    = 1
    while k * wide < 256 and n // wide % (2 * k) == 0: k *= 2
    return (n // (k * wide), k * wide), (k, U, wide // U)

class View:
    """One tensor and the reductions of it that statistics share, each computed once.

    On the CPU every reduction is a number at once (a look at memory, no copy). On a device it is a 0-dim tensor that
    stays there; nothing waits for it. `host` chooses between the two ways.
    """
    def __init__(self, x, sample=SAMPLE, unit_dim=None, bounds=None, eps=None, host=None, sampled=True):
        self.x        = plain(x)
        self.n        = self.x.numel()
        self.unit_dim = unit_dim
        self.bounds   = bounds                     # of the activation function, for frac_saturated
        self.eps      = eps                        # of the optimizer, for frac_below_eps
        self.host     = self.x.device.type == 'cpu' if host is None else host
        self.stride   = stride_of(tuple(self.x.shape), sample)
        self.sampled  = sampled                    # the sample is wanted: take it in the pass over the moments

    def read(self, t): return float(t.numpy()) if self.host else t

    @lazy
    def flat(self): return flat(self.x)

    # Moments: always of everything. On the CPU one pass reads the sum, the squares and the extremes.
    @lazy
    def _pass(self):
        """(sum, sum of squares, least and greatest of each column, columns as (row, unit, rest)), or None: take the
        careful way."""
        if not self.host or not self.n: return None
        x, units = self._rows()
        if x is None: return None
        lo, hi = np.empty((2, x.shape[1]), x.dtype)
        rest   = self.flat.numpy()[x.size:]
        sample = np.empty(self.n_sampled if self.sampled and self.stride > 1 and not len(rest) else 0, x.dtype)
        total, squares = kernels.moments(x, lo, hi, sample, self.stride)
        if len(sample): self.__dict__['sample'] = sample
        if len(rest):
            few = np.empty((2, len(rest)), x.dtype)
            t, q = kernels.moments(rest[None], *few, sample, 1)
            total, squares, lo[0], hi[0] = total + t, squares + q, min(lo[0], few[0].min()), max(hi[0], few[1].max())
        if not (math.isfinite(total) and squares < kernels.HUGE): return None   # NaN, Inf, or squares beyond a float32
        if squares < kernels.TINY and (lo.min() or hi.max()): return None       # squares too small for one
        return total, squares, lo, hi, units

    def _rows(self):
        "x as NumPy (row, column) without a copy, rows short enough to stay in the cache; how its columns are units."
        if self.unit_dim is None:
            x = self.flat.numpy()
            k = self.n // 1024
            return (x[:k * 1024].reshape(k, 1024) if k else x[None]), None
        x, d = self.x, self.unit_dim % self.x.dim()
        if not (x.is_contiguous() and d in (1, x.dim() - 1)): x, d = self.by_unit, 1
        if x is None or not x.is_contiguous(): return None, None
        rows, units = rows_of(tuple(x.shape), d)
        return x.numpy().reshape(rows), units

    @lazy
    def sum(self):
        if not self.n: return 0.
        if not self.host: return self.flat.sum(dtype=None if self.x.device.type == 'mps' else torch.float64)
        return self._pass[0] if self._pass else self.read(self.flat.sum(dtype=torch.float64))

    @lazy
    def norm(self):
        "2-norm, right from the smallest to the largest float: squares of 1e-23 or 1e20 do not fit a float32."
        if self._pass: return math.sqrt(self._pass[1])
        return self._safe_norm(self.flat) if self.n else 0.

    def _safe_norm(self, x, centred=False):
        "||x||, or ||x - mean||, in numbers near 1 so that no square leaves the range of its type."
        lo, hi = torch.aminmax(x)
        m = torch.maximum(-lo, hi)
        if self.host and not 0 < float(m.numpy()) < math.inf:
            return math.nan if centred and m else abs(float(m.numpy()))
        ok = (m > 0) & torch.isfinite(m)
        e  = torch.frexp(torch.where(ok, m, torch.ones_like(m))).exponent
        y  = _ldexp(x.double() if self.host else x, -e)
        if centred:
            for _ in range(2): y = y - (y.sum(dtype=_wide(m).dtype) / self.n).to(y.dtype)
        return self.read(_ldexp(_wide(_norm(y)), e))

    @lazy
    def m2_root(self):
        """||x - mean||. From the squares and the sum where the mean is no larger than 10 std (the difference of the two
        then keeps 1e-5), else, and always on a device, in a second pass over x - mean."""
        if not self.n: return 0.
        if self._pass:
            squares, of_mean = self._pass[1], self._pass[0] ** 2 / self.n
            if of_mean <= 100 * (squares - of_mean): return math.sqrt(squares - of_mean)
            d = self.flat.numpy().astype(float)
            for _ in range(2): d -= d.mean()                 # twice: a mean that is rounded leaves a rest
            return math.sqrt((d * d).sum())
        return self._safe_norm(self.flat, centred=True)

    @lazy
    def _extremes(self):
        if not self.n: return math.nan, math.nan
        if self._pass: return float(self._pass[2].min()), float(self._pass[3].max())
        if self.unit_dim is not None and 'unit_extremes' in self.__dict__: lo, hi = self.unit_extremes
        else:                                                              lo, hi = self.flat, self.flat
        if isinstance(lo, np.ndarray): return float(lo.min()), float(hi.max())
        return self.read(lo.amin()), self.read(hi.amax())
    @lazy
    def min(self): return self._extremes[0]
    @lazy
    def max(self): return self._extremes[1]

    # The sample: every stride-th element.
    @lazy
    def n_sampled(self): return -(-self.n // self.stride)
    @property
    def scale(self): return self.n / self.n_sampled if self.n else 0.     # elements that one sampled element stands for
    @lazy
    def sample(self):
        "A NumPy array on the CPU, a tensor on a device.  # (n_sampled,)"
        s = self.flat if self.stride == 1 else self.flat[::self.stride].contiguous()
        return s.numpy() if self.host else s
    @lazy
    def abs_sample(self): return abs(self.sample)
    @lazy
    def _tally(self):
        "(counts of the bins, zeros, near zeros, non-finite) of the sample."
        hist, s = np.empty(N_BINS), self.sample
        if s.dtype != np.float32: s = _to_float32(torch.from_numpy(s)).numpy()
        return hist, *kernels.tally(s.view(np.int32), NEAR_BITS, BIN_OF_PATTERN, hist)

    def count(self, mask):
        "How many elements of the tensor the mask over its sample stands for."
        return (np.count_nonzero(mask) if self.host else mask.sum()) * self.scale
    def below(self, x, t): return x < _least(t, x.dtype if isinstance(x, torch.Tensor) else x.dtype.type)
    @lazy
    def n_zero(self): return self._tally[1] * self.scale if self.host else self.count(self.sample == 0)
    @lazy
    def n_near_zero(self): return self._tally[2] * self.scale if self.host else self.count(self.abs_sample < NEAR_ZERO)
    @lazy
    def n_nonfinite(self): return self._tally[3] * self.scale if self.host else self.count(~torch.isfinite(self.sample))
    @lazy
    def n_underflow_fp16(self):
        a = self.abs_sample
        return self.count((a > 0) & (a <= 2.0 ** -25) | (a >= 65520.))
    @lazy
    def n_below_eps(self): return math.nan if self.eps is None else self.count(self.below(self.abs_sample, self.eps))
    @lazy
    def n_saturated(self):
        if self.bounds is None: return math.nan
        lo, hi = self.bounds
        edge   = .015 * (hi - lo)                  # 3 % of the half range: |tanh| > .97, a sigmoid outside .015 to .985
        return self.count(self.below(self.sample, lo + edge) | self.below(-self.sample, edge - hi))
    @lazy
    def abs_sum(self):
        "Sum of magnitudes, scaled from the sample to the whole."
        if not self.n: return 0.
        if not self.host: return _wide(self.abs_sample).sum() * self.scale
        with np.errstate(over='ignore'):
            s = self.abs_sample.sum()
            return float(s if math.isfinite(s) else self.abs_sample.sum(dtype=np.float64)) * self.scale

    @lazy
    def median(self):     return self._kth(self.sample)
    @lazy
    def abs_median(self): return self._kth(self.abs_sample)
    def _kth(self, s):
        "Lower median of the sample or of its magnitudes; NaN where the tensor has one."
        if not self.n: return math.nan
        k = (self.n_sampled - 1) // 2
        if self.host: return math.nan if math.isnan(self.max) else float(np.partition(s, k)[k])
        return s.sort().values[k] + torch.where(torch.isnan(self.max), self.max, torch.zeros_like(self.max))

    @lazy
    def hist(self):
        "Counts over the N_BINS fixed bins, scaled to the whole tensor.  # (N_BINS,)"
        if self.host: return self._tally[0] * self.scale
        s   = _to_float32(self.sample)
        raw = ((s.view(torch.int32) >> 21) + 1024).long()
        one = _wide(torch.ones((), device=s.device))         # a float32 counts no further than 16 million
        raw = one.new_zeros(2048).scatter_add_(0, raw, one.expand(len(raw)))
        return one.new_zeros(N_BINS).index_add_(0, _bin_of_pattern_on(s.device), raw) * self.scale

    # per unit (a channel or feature): the axis unit_dim
    @lazy
    def by_unit(self):
        "x with its units last and all else flattened, where that needs no copy; otherwise None."
        y = self.x.movedim(self._unit_axis, -1)
        return y.reshape(-1, y.shape[-1]) if y.is_contiguous() else None
    @property
    def _unit_axis(self):
        if self.unit_dim is None: raise ValueError("a statistic of units needs unit_dim, the axis of the units: 1 "
                                                   "after a convolution, -1 after a Linear")
        return self.unit_dim % self.x.dim()
    def over_units(self, f):
        """f (amin or amax) over everything but the units; over the examples first, which is 8 times quicker than at
        once."""
        if self.by_unit is not None: return f(self.by_unit, 0)
        x, d = self.x, self._unit_axis
        if d: x, d = f(x, 0), d - 1
        rest = tuple(i for i in range(x.dim()) if i != d)
        return f(x, rest) if rest else x
    @lazy
    def unit_extremes(self):
        "The least and the greatest value of each unit; the identities of min and max where there is no element."
        if self.unit_dim is None or not self.n: return self._no_units(math.inf), self._no_units(-math.inf)
        if self._pass:
            *_, lo, hi, units = self._pass
            return lo.reshape(units).min(axis=(0, 2)), hi.reshape(units).max(axis=(0, 2))
        lo, hi = self.over_units(torch.amin), self.over_units(torch.amax)                        # (unit,), (unit,)
        return (lo.numpy(), hi.numpy()) if self.host else (lo, hi)
    def _no_units(self, value):
        v = self.x.new_full((self.x.shape[self._unit_axis],), value)
        return v.numpy() if self.host else v
    @lazy
    def unit_abs_sum(self):
        if not self.n: return torch.as_tensor(self._no_units(0.))
        wide = None if self.x.device.type == 'mps' else torch.float64
        return self.over_units(lambda x, dim: torch.linalg.vector_norm(x, 1, dim=dim, dtype=wide))         # (unit,)


@lru_cache(maxsize=None)
def _bin_of_pattern_on(device): return torch.from_numpy(BIN_OF_PATTERN).to(device)

def _to_float32(s):
    "A float64 tensor as float32 that stays non-zero and finite where it was."
    if s.dtype == torch.float32: return s
    t = s.float()
    t = torch.where((t == 0) & (s != 0), torch.copysign(torch.full_like(t, 2. ** -149), t), t)
    return torch.where(torch.isinf(t) & torch.isfinite(s), torch.copysign(torch.full_like(t, _BIGGEST), t), t)
