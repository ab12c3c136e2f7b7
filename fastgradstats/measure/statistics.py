"""Statistics: reductions of one tensor, with how two partial results merge.

Every statistic is a monoid: `f` reduces a tensor, given as its `Reductions`, to a partial result, `merge` joins two of
them, `finish` reads the value. What `f` returns lives where the tensor lives (numbers on the CPU, 0-dim tensors on a
device); `merge` and `finish` see float64 NumPy arrays of any shape, one element a layer or a row, except in a unit
statistic (`kind='unit'`), whose partials are of one value a unit, merged on the device over a window.
"""
from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Callable

import numpy as np
import torch

from ..record.bins import N_BINS
from .reductions import NEAR_ZERO
from .readers.reference import Reductions

DORMANT = 0.025                   # tau of Sokar et al. 2023, arXiv 2302.12902


@dataclass(frozen=True)
class Statistic:
    """A reduction of one tensor to a number (or a histogram), with how two partial results merge. Called on a tensor it
    gives its value; `statistic` makes one.

    Example:
        size = Statistic('size', 'elements', f=lambda r: (float(r.n),))
        size(torch.ones(2, 3))
    """
    name:   str
    unit:   str
    f:      Callable = field(repr=False, default=None)        # Reductions -> tuple, the partial result
    merge:  Callable = field(repr=False, default=None)        # (partial, partial) -> partial; None: cannot be merged
    finish: Callable = field(repr=False, default=lambda v: v) # (*partial) -> value
    kind:   str      = 'scalar'                               # scalar, hist, or unit (kept per unit, read by windows)
    doc:    str      = field(repr=False, default='')
    own:    bool     = field(repr=False, default=False)       # a user's: made of a function of the tensor
    sampled: bool    = field(repr=False, default=False)       # of a sample where the tensor is large
    reads:  tuple    = field(repr=False, default=())      # the names of Reductions that `f` gives, if it does no more
    signed: bool     = field(repr=False, default=False)       # NaN of complex numbers, of which magnitudes are read

    def __post_init__(self):
        if self.f is None: object.__setattr__(self, 'f', lambda r: tuple(getattr(r, a) for a in self.reads))

    def __call__(self, x, by=Reductions, **kw):
        "The value of one tensor, as a NumPy number or array; `by`: what reads it."
        p = self.f(by(x, **kw))
        if self.signed and x.is_complex(): return np.full(N_BINS, np.nan) if self.kind == 'hist' else np.float64(np.nan)
        read = lambda v: v.detach().cpu().double().numpy() if isinstance(v, torch.Tensor) else np.asarray(v, float)
        return self.finish(*(read(v) if self.kind != 'scalar' else read(v).reshape(()) for v in p))


def statistic(
    f: Callable | None = None,           # f(x): x a float tensor of any shape (magnitudes of
                                         # complex numbers) -> a 0-dim tensor or a number; with
                                         # `merge`, a tuple of them
    *,
    unit: str = '',                      # written into the record and on the axes of plots
    name: str | None = None,             # by default the function's
    merge: Callable | None = None,       # (partial, partial) -> partial, of float64 arrays
    finish: Callable | None = None,      # (*partial) -> value
) -> Statistic:                          # or, without `f`, a decorator
    """Make a statistic of a function of one tensor, for use beside the built-in names.

    Without `merge` the value of an activation is NaN wherever several tensors make one row (a module called twice,
    accumulated batches).

    Raises:
        TypeError: `f` is no function.
        ValueError: it has no name that an attribute could have; when it is called, it gives other than one number.

    Example:
        @statistic(unit='ratio')
        def peak(x): return x.abs().max() / x.abs().mean()
        learn.fit(1, cbs=LayerStatsCallback(grad=['norm', peak]))
    """
    if f is None: return lambda f: statistic(f, unit=unit, name=name, merge=merge, finish=finish)
    if not callable(f): raise TypeError(f"a statistic is made of a function f(x) of a tensor; got {f!r}")
    name = name or getattr(f, '__name__', type(f).__name__ + '()')
    if not name.isidentifier(): raise ValueError(f"{name!r} is no name for a statistic. If it is a function of a "
                                                 f"tensor, give it one: statistic(f, name='my_statistic')")
    def partial(r):
        out = f(r.x)
        out = tuple(out) if isinstance(out, (tuple, list)) else (out,)
        for o in out:
            if not (isinstance(o, torch.Tensor) and o.numel() == 1 and not o.is_complex()
                    or isinstance(o, (numbers.Real, np.bool_)) or isinstance(o, np.ndarray) and o.size == 1
                    and o.dtype.kind in 'bfiu'):
                got = f'a tensor of shape {tuple(o.shape)} and {o.dtype}' if hasattr(o, 'shape') else repr(o)
                raise ValueError(f"the statistic {name!r} must give one number a tensor; got {got}")
        if len(out) > 1 and finish is None:
            raise ValueError(f"the statistic {name!r} gives {len(out)} numbers; say with finish= how they become one")
        return out
    return Statistic(name, unit, partial, merge, finish or (lambda v: v), doc=f.__doc__ or '', own=True)


def _ratio(a, n):
    with np.errstate(divide='ignore', invalid='ignore'): return np.where(np.asarray(n) > 0, np.divide(a, n), np.nan)

def _add(a, b):
    with np.errstate(invalid='ignore', over='ignore'):
        return tuple(x + y for x, y in zip(a, b))      # Inf and -Inf are NaN
def _hyp(a, b):  return tuple(np.hypot(x, y) for x, y in zip(a, b))

def _std_merge(a, b):                              # Chan, Golub and LeVeque 1979
    (na, sa, ra), (nb, sb, rb) = a, b
    n = na + nb
    with np.errstate(invalid='ignore', over='ignore'):
        d = _ratio(sa, na) - _ratio(sb, nb)
        d = np.where((np.asarray(na) > 0) & (np.asarray(nb) > 0), d, 0.)
        r = np.hypot(np.hypot(ra, rb), d * np.sqrt(na * nb / np.where(n > 0, n, 1)))
        return n, sa + sb, np.where(np.isfinite(ra + rb + d), r, np.nan)            # hypot(inf, nan) is inf

def _share(name, count, doc):
    return Statistic(name, 'share of elements', None, _add, _ratio, reads=(count, 'n'), doc=doc, sampled=True)

def _extreme(f):
    "min or max that lets NaN through, except the NaN of a tensor without elements."
    def merge(a, b):
        (x, n), (y, m) = a, b
        return np.where(np.asarray(n) == 0, y, np.where(np.asarray(m) == 0, x, f(x, y))), n + m
    return merge

def _minimum(a, b): return (torch if isinstance(a, torch.Tensor) else np).minimum(a, b)
def _maximum(a, b): return (torch if isinstance(a, torch.Tensor) else np).maximum(a, b)

def unit_states(lo, hi):
    "0 alive, 1 dead (the unit's output did not vary at all), 2 non-finite.  # (unit,) int8"
    return np.where(~(np.isfinite(lo) & np.isfinite(hi)), 2, np.where(lo == hi, 1, 0)).astype(np.int8)

def _dead(lo, hi):
    return float(np.mean(unit_states(lo, hi) == 1)) if len(lo) and not (lo > hi).any() else math.nan  # lo > hi: none

def _dormant(s, n):
    "Share of units whose mean |h| is at most DORMANT times the layer's mean of it."
    with np.errstate(invalid='ignore', divide='ignore'): mean = s / n
    if not len(mean) or not np.isfinite(mean.mean()): return math.nan
    return float(np.mean(mean <= DORMANT * mean.mean()))


mean       = Statistic('mean', '', None, _add, _ratio, reads=('sum', 'n'), signed=True,
                       doc='Mean of all elements, with sign.')
std        = Statistic('std', '', None, _std_merge, lambda n, s, r: _ratio(r, np.sqrt(n)),
                       reads=('n', 'sum', 'm2_root'), signed=True,
                       doc='Population standard deviation.')
norm       = Statistic('norm', '', None, _hyp, reads=('norm',), doc='2-norm (Frobenius).')
min_       = Statistic('min', '', None, _extreme(np.minimum), lambda v, n: v, reads=('min', 'n'), signed=True,
                       doc='Smallest element.')
max_       = Statistic('max', '', None, _extreme(np.maximum), lambda v, n: v, reads=('max', 'n'), signed=True,
                       doc='Largest element.')
abs_max    = Statistic('abs_max', '', None,
                       lambda a, b: (_extreme(np.minimum)((a[0], a[2]), (b[0], b[2]))[0],
                                     *_extreme(np.maximum)((a[1], a[2]), (b[1], b[2]))),
                       lambda lo, hi, n: np.maximum(np.abs(lo), np.abs(hi)), reads=('min', 'max', 'n'),
                       doc='Largest magnitude.')
abs_mean   = Statistic('abs_mean', '', None, _add, _ratio, reads=('abs_sum', 'n'), sampled=True,
                       doc='Mean magnitude (sampled).')
median     = Statistic('median', '', reads=('median',), sampled=True, signed=True,
                       doc='Lower median, with sign (sampled).')
abs_median = Statistic('abs_median', '', reads=('abs_median',), sampled=True,
                       doc='Lower median of the magnitudes (sampled).')
frac_zero           = _share('frac_zero', 'n_zero', 'Share of exact zeros (sampled).')
frac_near_zero      = _share('frac_near_zero', 'n_near_zero', f'Share of |x| < {NEAR_ZERO} (sampled).')
frac_nonfinite      = _share('frac_nonfinite', 'n_nonfinite', 'Share of NaN and Inf (sampled).')
frac_underflow_fp16 = _share('frac_underflow_fp16', 'n_underflow_fp16', 'Share that float16 would round to zero '
                             '(0 < |x| <= 2^-25) or overflow (|x| >= 65520) (sampled).')
frac_below_eps      = _share('frac_below_eps', 'n_below_eps',
                             "Share of |x| below the optimizer's eps, which then rules the "
                             'update; NaN for an optimizer without second moments (sampled).')
frac_saturated      = _share('frac_saturated', 'n_saturated', 'Share within 3 % of the bounds of a bounded activation '
                             'function, of a ReLU6 near 6 alone; NaN for others (sampled).')
hist       = Statistic('hist', 'elements', None, _add, kind='hist', sampled=True, reads=('hist',), signed=True,
                       doc='Counts over the fixed signed logarithmic bins (sampled, scaled to the whole).')
frac_dead    = Statistic('frac_dead', 'share of units', None,
                         lambda a, b: (_minimum(a[0], b[0]), _maximum(a[1], b[1])),
                         _dead, kind='unit', reads=('unit_min', 'unit_max'),
                         doc='Share of the units whose output did not vary over any example and position of the '
                             'window.')
frac_dormant = Statistic('frac_dormant', 'share of units',
                         lambda r: (r.unit_abs_sum,
                                    torch.full_like(r.unit_abs_sum, r.n / max(r.unit_abs_sum.numel(), 1))),
                         _add, _dormant, kind='unit',
                         doc=f"Share of units with mean |h| <= {DORMANT} of the layer's (Sokar 2023); last batch of a "
                             f"window.")

STATISTICS = {s.name: s for s in list(globals().values()) if isinstance(s, Statistic)}

def meant(name, among):
    "Asks for the nearest name, if one is near."
    near = get_close_matches(name, among, 1)
    return f" Did you mean {near[0]!r}?" if near else ''

def resolve(spec, probe=''):
    "The Statistic that a name, a Statistic or a function stands for."
    if isinstance(spec, Statistic): return spec
    if isinstance(spec, str):
        if spec in STATISTICS: return STATISTICS[spec]
        raise ValueError(f"{spec!r} is not a statistic{f' ({probe})' if probe else ''}.{meant(spec, STATISTICS)} "
                         f"There are {', '.join(STATISTICS)}. Give one of these, or a function of a tensor")
    if callable(spec): return statistic(spec)
    raise TypeError(f"a statistic is a name, a Statistic or a function of a tensor; got "
                    f"{spec!r}{f' for {probe}' if probe else ''}")
