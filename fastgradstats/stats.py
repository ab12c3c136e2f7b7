"""Statistics: reductions of one tensor, with how two partial results merge.

Every statistic is a monoid: `f` reduces a `View` of a tensor to a partial result, `merge` joins two partial results,
`finish` reads the value. What `f` returns lives where the tensor lives (numbers on the CPU, 0-dim tensors on a device);
`merge` and `finish` see float64 NumPy arrays of any shape, one element a layer or a row, except in a unit statistic
(`kind='unit'`), whose partials are tensors of one value a unit, merged on the device over a window.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Callable

import numpy as np
import torch

SAMPLE    = 65536        # tensors with more elements are sampled for what is not a moment; see `stride_of`
NEAR_ZERO = 0.05         # |x| below this is near zero: fastai's ActivationStats takes x <= 0.05, without the absolute value
DORMANT   = 0.025        # tau of Sokar et al. 2023, arXiv 2302.12902
CHUNK     = 8192         # elements that a float32 sum of squares may run over: 12 million at once are wrong by 5e-4


# --- histogram bins: the top bits of a float32 ----------------------------------------------------------------------
# sign, exponent and two mantissa bits of a float32 are its bin: 4 bins an octave, magnitudes 2^-32 to 2^16 of both signs
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
_MAGNITUDES    = np.concatenate([2.0 ** (o + np.log2(1 + np.arange(4) / 4)) for o in range(*OCTAVES)] + [[2.0 ** OCTAVES[1]]])
_BIGGEST       = float(np.finfo(np.float32).max)
BIN_EDGES      = np.concatenate([[-_BIGGEST], -_MAGNITUDES[::-1], _MAGNITUDES, [_BIGGEST]])          # (388,)
BIN_LABELS     = {NEG_INF: '-inf', NEG_BIG: '< -65536', ZERO: 'zero', POS_BIG: '> 65536', POS_INF: '+inf', NAN: 'nan'}

# The same bins as ranks in a sorted sample: bin i is what lies between keys i-1 and i. Positive bins hold their lower edge
# and negative ones the edge nearer to 0, as the bit patterns do, so a negative key is the next float above its edge. After
# the keys of the bins: for each threshold t of SMALL the two ends of |x| < t.
SMALL    = (5e-324, NEAR_ZERO, float(np.nextafter(np.float32(2.0 ** -25), np.float32(1))))
_AT      = {t: N_BINS - 1 + 2 * k for k, t in enumerate(SMALL)}
_AT_ZERO = _AT[5e-324] + 1                                  # the rank of the first element that is not negative, less zeros
_INF_KEY, _NAN_KEY = N_BINS - 3, N_BINS - 2

def _keys(dtype):
    up    = lambda v: np.nextafter(np.asarray(v, dtype), dtype(np.inf))
    small = [k for t in SMALL for k in ((up(0.), dtype(0.)) if t == 5e-324 else (dtype(t), up(-t)))]
    return np.concatenate([[dtype(-_BIGGEST)], up(-_MAGNITUDES[::-1]), _MAGNITUDES.astype(dtype), [dtype(np.inf), dtype(np.nan)],
                           small]).astype(dtype)

_KEYS = {np.dtype(d).char: _keys(d) for d in (np.float32, np.float64)}


# --- reading a tensor ------------------------------------------------------------------------------------------------
@lru_cache(maxsize=None)
def stride_of(shape, sample):
    """The fixed stride at which a tensor of this shape is sampled: at least n / sample and coprime to every dimension, so
    that it visits every position of a kernel, every channel and every example alike. 1 means everything is read."""
    n = math.prod(shape)
    if sample is None or n <= sample: return 1
    s = -(-n // sample)
    while any(math.gcd(s, d) > 1 for d in shape if d > 1): s += 1
    return s

def plain(x):
    "`x` as a detached plain real tensor of at least float32; complex numbers by their magnitude."
    x = x.detach()
    if type(x) is not torch.Tensor: x = x.as_subclass(torch.Tensor)
    if x.is_sparse: x = x.coalesce().to_dense()
    if x.is_complex(): x = x.abs()
    return x if x.dtype in (torch.float32, torch.float64) else x.float()

def flat(x):
    "The elements of `x` in memory order.  # (n,), a view wherever x is dense"
    if x.is_contiguous(): return x.view(-1)
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last): return x.permute(0, 2, 3, 1).reshape(-1)
    if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d): return x.permute(0, 2, 3, 4, 1).reshape(-1)
    return x.reshape(-1)

def _norm(x):
    "2-norm of a flat tensor, the squares summed by chunks: one float32 accumulator over millions drifts by 1e-4 and more."
    n = x.numel()
    if n <= CHUNK: return torch.linalg.vector_norm(x)
    k = n // CHUNK
    r = torch.linalg.vector_norm(x[:k * CHUNK].view(k, CHUNK), dim=1)
    if k * CHUNK < n: r = torch.cat([r, torch.linalg.vector_norm(x[k * CHUNK:]).view(1)])
    return torch.linalg.vector_norm(r)


class View:
    """One tensor and the reductions of it that statistics share, each computed once.

    On the CPU every reduction is a number at once (a look at memory, no copy). On a device it is a 0-dim tensor that
    stays there; nothing waits for it. `host` chooses between the two ways.
    """
    def __init__(self, x, sample=SAMPLE, unit_dim=None, bounds=None, eps=None, host=None, ranked=False, floor=None):
        self.raw      = x
        self.x        = plain(x)
        self.n        = self.x.numel()
        self.unit_dim = unit_dim
        self.bounds   = bounds                     # of the activation function, for frac_saturated
        self.eps      = eps                        # of the optimizer, for frac_below_eps
        self.floor    = floor                      # no element can be less: 0 after a ReLU
        self.host     = self.x.device.type == 'cpu' if host is None else host
        self.stride   = stride_of(tuple(self.x.shape), sample)
        self.whole    = ranked and self.host and self.stride == 1 and self.n > 0      # all is read off the sorted elements

    def read(self, t): return float(t.numpy()) if self.host else t

    @cached_property
    def flat(self): return flat(self.x)

    @cached_property
    def sum(self):
        if not self.n: return 0.
        if self.whole:
            s = float(self.sorted.sum())
            return s if math.isfinite(s) else float(self.sorted.sum(dtype=np.float64))
        if not self.host: return self.flat.sum(dtype=None if self.x.device.type == 'mps' else torch.float64)
        s = self.read(self.flat.sum())
        return s if math.isfinite(s) else self.read(self.flat.sum(dtype=torch.float64))   # float32 may overflow at 3e38

    @cached_property
    def norm(self):
        "2-norm, right from the smallest to the largest float: squares of 1e-23 or 1e20 do not fit a float32."
        return self._safe_norm(self.flat) if self.n else 0.

    def _safe_norm(self, x, most=None):
        if self.host:
            if self.whole and x is self.flat: r = math.sqrt(abs(np.dot(self.sorted, self.sorted)))
            else:                             r = self.read(_norm(x))
            if 1e-15 < r < 1e15: return r
            lo, hi = (float(t.numpy()) for t in torch.aminmax(x))
            m = max(-lo, hi)
            if not (math.isfinite(m) and m > 0): return abs(r) if m == 0 else (math.nan if math.isnan(m) else math.inf)
            e = math.frexp(m)[1]
            return math.ldexp(self.read(_norm(x.double() * 2.0 ** -e)), e)
        lo, hi = torch.aminmax(x)
        m = torch.maximum(-lo, hi)
        e = torch.frexp(torch.where((m > 0) & torch.isfinite(m), m, torch.ones_like(m))).exponent
        return torch.ldexp(_norm(torch.ldexp(x, -e)), e)

    @cached_property
    def m2_root(self):
        """||x - mean||. From the norm and the mean where the mean is no larger than 10 std (the difference of the two then
        keeps 1e-5), else, and always on a device, in a second pass over x - mean."""
        if not self.n: return 0.
        if self.host:
            a, b = self.norm, self.sum / math.sqrt(self.n)
            d    = a * a - b * b if a < 1e150 else math.nan
            if 1e-15 < a < 1e15 and d > 0 and b * b <= 100 * d: return math.sqrt(d)
            if not math.isfinite(a): return math.nan
        return self._safe_norm(self.flat - self.sum / self.n if self.host else
                               self.flat - (self.sum / self.n).to(self.x.dtype))

    @cached_property
    def _extremes(self):
        if not self.n: return math.nan, math.nan
        if self.whole:
            lo, hi = float(self.sorted[0]), float(self.sorted[-1])
            return (hi, hi) if math.isnan(hi) else (lo, hi)
        if self.unit_dim is not None and 'unit_extremes' in self.__dict__:
            lo, hi = self.unit_extremes
            return self.read(lo.amin()), self.read(hi.amax())
        lo, hi = torch.aminmax(self.flat)
        return self.read(lo), self.read(hi)
    @property
    def min(self): return self._extremes[0]
    @property
    def max(self): return self._extremes[1]

    # The sample. On the CPU it is sorted once and all else is read off the ranks: NumPy sorts 65,536 floats in 0.1 to 0.3 ms,
    # where torch needs 1 ms for a median alone and counting into bins stalls on the many zeros after a ReLU.
    @cached_property
    def n_sampled(self): return -(-self.n // self.stride)
    @property
    def scale(self): return self.n / self.n_sampled if self.n else 0.      # elements that one sampled element stands for
    @cached_property
    def sample(self): return self.flat if self.stride == 1 else self.flat[::self.stride].contiguous()
    @cached_property
    def sorted(self): return np.sort(self.sample.numpy())                  # NaN last
    @cached_property
    def ranks(self): return np.searchsorted(self.sorted, _KEYS[self.sorted.dtype.char])

    def count_below(self, t):
        "How many elements have |x| < t."
        if not self.host: return (self.sample.abs() < t).sum() * self.scale
        if t in _AT: return int(self.ranks[_AT[t]] - self.ranks[_AT[t] + 1]) * self.scale
        t = self.sorted.dtype.type(t)
        return int(np.searchsorted(self.sorted, t) - np.searchsorted(self.sorted, -t, 'right')) * self.scale
    def count_outside(self, lo, hi):
        "How many elements have x < lo or x > hi; a NaN is neither."
        if not self.host: return ((self.sample < lo) | (self.sample > hi)).sum() * self.scale
        s = self.sorted
        return int(np.searchsorted(s, s.dtype.type(lo)) + self.ranks[_NAN_KEY]
                   - np.searchsorted(s, s.dtype.type(hi), 'right')) * self.scale
    @cached_property
    def count_nonfinite(self):
        if not self.host: return (~torch.isfinite(self.sample)).sum() * self.scale
        return int(self.n_sampled - self.ranks[_INF_KEY] + self.ranks[0]) * self.scale

    @cached_property
    def abs_sum(self):
        "Sum of magnitudes, scaled from the sample to the whole."
        if not self.n: return 0.
        if not self.host: return self.sample.abs().sum(dtype=torch.float64) * self.scale
        k = self.ranks[_AT_ZERO]
        return float(self.sorted[k:].sum() - self.sorted[:k].sum()) * self.scale

    def kth(self, magnitude=False):
        "Lower median of the sample, or of its magnitudes; NaN where the tensor has one."
        if not self.n: return math.nan
        k = (self.n_sampled - 1) // 2
        if not self.host:
            s = self.sample.abs() if magnitude else self.sample
            return s.sort().values[k] + torch.where(torch.isnan(self.max), self.max, torch.zeros_like(self.max))
        if math.isnan(self.max): return math.nan
        s = self.sorted
        if not magnitude: return float(s[k])
        z = self.ranks[_AT_ZERO]                                           # s[:z] are negative
        return float(_kth_of_two(-s[:z][::-1], s[z:], k))

    @cached_property
    def hist(self):
        "Counts over the N_BINS fixed bins, scaled to the whole tensor.  # (N_BINS,)"
        if self.host:
            r = np.empty(N_BINS + 1)
            r[0], r[1:-1], r[-1] = 0, self.ranks[:N_BINS - 1], self.n_sampled
            return (r[1:] - r[:-1]) * self.scale
        s   = self.sample.float()
        raw = ((s.view(torch.int32) >> 21) + 1024).long()
        raw = torch.zeros(2048, device=s.device).scatter_add_(0, raw, torch.ones_like(s))
        return torch.zeros(N_BINS, device=s.device).index_add_(0, _bin_of_pattern_on(s.device), raw) * self.scale

    # per unit (a channel or feature): the axis unit_dim
    @cached_property
    def by_unit(self):
        "x with its units last and all else flattened, where that needs no copy; otherwise None."
        x, d = self.x, self.unit_dim % self.x.dim()
        if d == x.dim() - 1: return x.reshape(-1, x.shape[-1])
        y = x.movedim(d, -1)
        return y.reshape(-1, y.shape[-1]) if y.is_contiguous() else None
    def over_units(self, f):
        "f (amin or amax) over everything but the units; over the examples first, which is 8 times quicker than at once."
        if self.by_unit is not None: return f(self.by_unit, 0)
        x, d = self.x, self.unit_dim % self.x.dim()
        if d: x, d = f(x, 0), d - 1
        rest = tuple(i for i in range(x.dim()) if i != d)
        return f(x, rest) if rest else x
    @cached_property
    def unit_extremes(self):
        "The least and the greatest value of each unit; the identities of min and max where there is no element."
        if not self.n: return self._no_units(math.inf), self._no_units(-math.inf)
        hi = self.over_units(torch.amax)
        if self.floor is not None and self.host and self.unit_dim % self.x.dim() > 0:
            head = View(self.x[:64], None, self.unit_dim)       # a unit that has reached the floor here has no lower value
            lo   = head.over_units(torch.amin)
            if bool((lo == self.floor).numpy().all()): return torch.where(torch.isnan(hi), hi, lo), hi
        return self.over_units(torch.amin), hi                                                   # (unit,), (unit,)
    def _no_units(self, value): return self.x.new_full((self.x.shape[self.unit_dim],), value)
    @cached_property
    def unit_abs_sum(self):
        if not self.n: return self._no_units(0.)
        return self.over_units(lambda x, dim: torch.linalg.vector_norm(x, 1, dim=dim))           # (unit,)


@lru_cache(maxsize=None)
def _bin_of_pattern_on(device): return torch.from_numpy(BIN_OF_PATTERN).to(device)

def _kth_of_two(a, b, k):
    "The k-th smallest (from 0) of two sorted arrays together."
    lo, hi = max(0, k + 1 - len(b)), min(k + 1, len(a))
    while lo < hi:
        i = (lo + hi) // 2
        if a[i] < b[k - i]: lo = i + 1
        else:               hi = i
    j = k + 1 - lo
    return max(([a[lo - 1]] if lo else []) + ([b[j - 1]] if j else []))


# --- what a statistic is ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Statistic:
    "A reduction of one tensor to a number (or a histogram), with how two partial results merge."
    name:   str
    unit:   str
    f:      Callable = field(repr=False)                      # View -> tuple, the partial result
    merge:  Callable = field(repr=False, default=None)        # (partial, partial) -> partial; None: cannot be merged
    finish: Callable = field(repr=False, default=lambda v: v) # (*partial) -> value
    kind:   str      = 'scalar'                               # scalar, hist, or unit (kept per unit, read by windows)
    doc:    str      = field(repr=False, default='')
    own:    bool     = field(repr=False, default=False)       # a user's: it gets the tensor, not the View
    ranked: bool     = field(repr=False, default=False)       # read off the sorted sample

    def __call__(self, x, **kw):
        "The value of one tensor, as a NumPy number or array."
        p = self.f(View(x, **kw))
        if self.kind == 'unit': return self.finish(*(t.cpu().numpy().astype(float) for t in p))
        return self.finish(*(np.asarray(v.cpu() if isinstance(v, torch.Tensor) else v, dtype=float) for v in p))


def statistic(f=None, *, unit='', name=None, merge=None, finish=None):
    """Make a statistic of a function of one tensor, for use beside the built-in names.

    `f(x)`: x a float tensor of any shape -> a 0-dim tensor or a number; with `merge`, a tuple of them. Without `merge` the
    value of an activation is NaN wherever several tensors make one row (a module called twice, accumulated batches).
    """
    if f is None: return lambda f: statistic(f, unit=unit, name=name, merge=merge, finish=finish)
    if not callable(f): raise TypeError(f"a statistic is made of a function f(x) of a tensor; got {f!r}")
    name = name or f.__name__
    if not name.isidentifier(): raise ValueError(f"a statistic needs a name that is an identifier; got {name!r}. "
                                                 f"Give one: statistic(f, name='my_statistic')")
    def partial(v):
        out = f(v.x)
        return tuple(out) if isinstance(out, (tuple, list)) else (out,)
    return Statistic(name, unit, partial, merge, finish or (lambda v: v), doc=f.__doc__ or '', own=True)


def _ratio(a, n):
    with np.errstate(divide='ignore', invalid='ignore'): return np.where(np.asarray(n) > 0, np.divide(a, n), np.nan)

def _add(a, b):  return tuple(x + y for x, y in zip(a, b))
def _hyp(a, b):  return tuple(np.hypot(x, y) for x, y in zip(a, b))

def _std_merge(a, b):                              # Chan, Golub and LeVeque 1979
    (na, sa, ra), (nb, sb, rb) = a, b
    n = na + nb
    d = _ratio(sa, na) - _ratio(sb, nb)
    d = np.where((np.asarray(na) > 0) & (np.asarray(nb) > 0), d, 0.)
    return n, sa + sb, np.sqrt(ra ** 2 + rb ** 2 + d ** 2 * na * nb / np.where(n > 0, n, 1))

def _share(name, doc, count):
    return Statistic(name, 'share of elements', lambda v: (count(v), v.n), _add, _ratio, doc=doc, ranked=True)

def _saturated(v):
    if v.bounds is None: return math.nan
    lo, hi = v.bounds
    edge   = .015 * (hi - lo)                      # 3 % of the half range: |tanh| > .97, a sigmoid outside .015 to .985
    return v.count_outside(lo + edge, hi - edge)

def _underflow(v):
    return v.count_below(SMALL[2]) - v.count_below(SMALL[0]) + v.count_outside(-65519.996, 65519.996)

def _extreme(f):
    "min or max that lets NaN through, except the NaN of a tensor without elements."
    def merge(a, b):
        (x, n), (y, m) = a, b
        return np.where(np.asarray(n) == 0, y, np.where(np.asarray(m) == 0, x, f(x, y))), n + m
    return merge

def unit_states(lo, hi):
    "0 alive, 1 dead (the unit's output did not vary at all), 2 non-finite.  # (unit,) int8"
    return np.where(~(np.isfinite(lo) & np.isfinite(hi)), 2, np.where(lo == hi, 1, 0)).astype(np.int8)

def _dormant(s, n):
    "Share of units whose mean |h| is at most DORMANT times the layer's mean of it."
    with np.errstate(invalid='ignore', divide='ignore'): mean = s / n
    if not len(mean) or not np.isfinite(mean.mean()): return math.nan
    return float(np.mean(mean <= DORMANT * mean.mean()))


mean     = Statistic('mean', '', lambda v: (v.sum, v.n), _add, _ratio, doc='Mean of all elements, with sign.')
std      = Statistic('std', '', lambda v: (v.n, v.sum, v.m2_root), _std_merge,
                     lambda n, s, r: _ratio(r, np.sqrt(n)), doc='Population standard deviation.')
norm     = Statistic('norm', '', lambda v: (v.norm,), _hyp, doc='2-norm (Frobenius).')
min_     = Statistic('min', '', lambda v: (v.min, v.n), _extreme(np.minimum), lambda v, n: v, doc='Smallest element.')
max_     = Statistic('max', '', lambda v: (v.max, v.n), _extreme(np.maximum), lambda v, n: v, doc='Largest element.')
abs_max  = Statistic('abs_max', '', lambda v: (v.min, v.max, v.n),
                     lambda a, b: (_extreme(np.minimum)((a[0], a[2]), (b[0], b[2]))[0],
                                   *_extreme(np.maximum)((a[1], a[2]), (b[1], b[2]))),
                     lambda lo, hi, n: np.maximum(np.abs(lo), np.abs(hi)), doc='Largest magnitude.')
abs_mean   = Statistic('abs_mean', '', lambda v: (v.abs_sum, v.n), _add, _ratio, doc='Mean magnitude (sampled).', ranked=True)
median     = Statistic('median', '', lambda v: (v.kth(),), doc='Lower median, with sign (sampled).', ranked=True)
abs_median = Statistic('abs_median', '', lambda v: (v.kth(True),), doc='Lower median of the magnitudes (sampled).', ranked=True)
frac_zero      = _share('frac_zero', 'Share of exact zeros (sampled).', lambda v: v.count_below(SMALL[0]))
frac_near_zero = _share('frac_near_zero', f'Share of |x| < {NEAR_ZERO} (sampled).', lambda v: v.count_below(NEAR_ZERO))
frac_nonfinite = _share('frac_nonfinite', 'Share of NaN and Inf (sampled).', lambda v: v.count_nonfinite)
frac_underflow_fp16 = _share('frac_underflow_fp16', 'Share that float16 would round to zero (0 < |x| <= 2^-25) or overflow '
                             '(|x| >= 65520) (sampled).', _underflow)
frac_below_eps = _share('frac_below_eps', "Share of |x| below the optimizer's eps, which then rules the update; NaN for an "
                        'optimizer without second moments (sampled).',
                        lambda v: math.nan if v.eps is None else v.count_below(v.eps))
frac_saturated = _share('frac_saturated', 'Share within 3 % of the bounds of a bounded activation function; NaN for others '
                        '(sampled).', _saturated)
hist     = Statistic('hist', 'elements', lambda v: (v.hist,), _add, kind='hist',
                     doc='Counts over the fixed signed logarithmic bins (sampled, scaled to the whole).')
frac_dead    = Statistic('frac_dead', 'share of units', lambda v: v.unit_extremes,
                         lambda a, b: (torch.minimum(a[0], b[0]), torch.maximum(a[1], b[1])),
                         lambda lo, hi: float(np.mean(unit_states(lo, hi) == 1)) if len(lo) else math.nan, kind='unit',
                         doc='Share of the units whose output did not vary over any example and position of the window.')
frac_dormant = Statistic('frac_dormant', 'share of units',
                         lambda v: (v.unit_abs_sum, torch.full_like(v.unit_abs_sum, v.n / max(v.unit_abs_sum.numel(), 1))),
                         _add, _dormant, kind='unit',
                         doc=f"Share of units with mean |h| <= {DORMANT} of the layer's (Sokar 2023); last batch of a window.")

STATISTICS = {s.name: s for s in list(globals().values()) if isinstance(s, Statistic)}

def resolve(spec, probe=''):
    "The Statistic that a name, a Statistic or a function stands for."
    if isinstance(spec, Statistic): return spec
    if isinstance(spec, str):
        if spec in STATISTICS: return STATISTICS[spec]
        raise ValueError(f"{spec!r} is not a statistic{f' ({probe})' if probe else ''}; there are {', '.join(STATISTICS)}. "
                         f"Give one of these, or a function of a tensor")
    if callable(spec): return statistic(spec)
    raise TypeError(f"a statistic is a name, a Statistic or a function of a tensor; got {spec!r}{f' for {probe}' if probe else ''}")
