"""The Plan: what is measured, where and how often."""
from __future__ import annotations

import numbers

from .placebo import EVERY
from .probes import OUTPUTS, PROBES, check_modules, takes
from ..record.schema import RESERVED
from .statistics import STATISTICS, meant, resolve
from .reductions import SAMPLE, Wanted

DEFAULTS = dict(
    grad       = ['mean', 'std', 'abs_mean', 'abs_max', 'norm', 'median', 'abs_median', 'frac_zero', 'frac_nonfinite',
                  'hist'],
    activation = ['mean', 'std', 'min', 'max', 'frac_zero', 'frac_near_zero', 'frac_nonfinite', 'hist', 'frac_dead',
                  'frac_dormant'],
    grad_output=None, grad_used=None, weight=['norm'], update=['norm'],
    input      = ['mean', 'std', 'min', 'max'],
    output     = ['mean', 'std', 'min', 'max'])
SETTINGS = ('modules', 'every', 'sample', 'window', 'per_call', 'unit_dim', 'placebo', 'budget')


def check_names(whose, given, allowed):
    "Raise for the first of the names `given` that is not `allowed`, with the nearest that is."
    for name in given:
        if name in allowed: continue
        hint = (f" It is a statistic, given where it is measured: activation=[{name!r}]." if name in STATISTICS else
                meant(name, allowed))
        raise TypeError(f"{name!r} is not an argument of {whose}.{hint} There are {', '.join(allowed)}")

def is_whole(v): return isinstance(v, numbers.Integral) and not isinstance(v, bool)

def whole(name, v, low, or_else=''):
    "The setting `v`, if it is a whole number of `low` or more."
    if is_whole(v) and v >= low: return int(v)
    raise ValueError(f"{name} is a whole number of {low} or more{or_else}; got {v!r}")

def switch(name, v):
    "The setting `v`, if it is True or False."
    if v in (True, False): return bool(v)
    raise ValueError(f"{name} is True or False; got {v!r}")


def _share(name, v):
    "The setting `v`, if it is a share."
    if isinstance(v, numbers.Real) and not isinstance(v, bool) and 0 < v <= 1: return float(v)
    raise ValueError(f"{name} is a share of the training time, above 0 and up to 1 (.05 for 5 %), or None; got {v!r}")


def _statistics(probe, given):
    "The Statistics of a probe that were given, checked."
    if isinstance(given, bool):
        raise TypeError(f"{probe} is a list of statistics, None for none, or left out for the default; got {given}")
    if isinstance(given, str) or callable(given) or not isinstance(given, (list, tuple)): given = [given]
    found = [resolve(s, probe) for s in given]
    for s in found:
        if s.name in RESERVED:  raise ValueError(f"a statistic cannot be called {s.name!r}: a column of the record is. "
                                                 f"Give another name: statistic(f, name=...)")
        if s.name == 'placebo': raise ValueError("'placebo' is not measured as other statistics are: give "
                                                 "placebo=True, and another name to one of your own")
        if s.kind == 'unit' and probe != 'activation':
            raise ValueError(f"{s.name!r} is measured per unit and belongs to activation=[...], not to {probe}")
        if sum(s.name == o.name for o in found) > 1: raise ValueError(f"{s.name!r} is given twice for {probe}")
    return found

class Plan:
    "What is measured, where and how often: the checked arguments of a callback or of `watch`."
    def __init__(self, *, modules=None, every=1, sample=SAMPLE, window=None, per_call=False, unit_dim=None,
                 placebo=False, budget=None, **probes):
        check_names('a Plan', probes, (*PROBES, *SETTINGS))
        found      = {p: _statistics(p, probes[p]) for p in PROBES if probes.get(p) is not None}
        self.stats = {p: ss for p, ss in found.items() if ss}
        if not self.stats:
            raise ValueError(f"nothing to measure: give statistics for at least one of {', '.join(PROBES)}")
        self._check_places(modules, unit_dim)
        if not isinstance(placebo, numbers.Integral) or placebo < 0:
            raise ValueError(f"placebo is True (every {EVERY} measured rows), False, or a whole number of measured "
                             f"rows; got {placebo!r}")
        if placebo and 'grad' not in self.stats:
            raise ValueError("placebo is recorded beside the statistics of `grad`: give grad=['norm'] or others")
        self.placebo = EVERY if placebo is True else int(placebo)
        self.modules, self.unit_dim = modules, unit_dim if unit_dim is None else int(unit_dim)
        self.budget   = budget if budget is None else _share('budget', budget)
        self.every    = every if takes(every, 1) else whole('every', every, 1, ', or a function f(iteration) -> bool')
        self.sample   = sample if sample is None else whole('sample', sample, 100, ', or None')
        self.window   = window if window is None else whole('window', window, 1, ', or None')
        self.per_call = switch('per_call', per_call)
        self.wanted   = {p: Wanted(ss) for p, ss in self.stats.items()}
        self.units    = [s for s in self.stats.get('activation', []) if s.kind == 'unit']
        self.always   = [s for s in self.units if s.name != 'frac_dormant']     # that one at the end of a window alone

    def _check_places(self, modules, unit_dim):
        check_modules(modules)
        if modules is not None and not any(p in self.stats for p in OUTPUTS):
            raise ValueError(f"modules chooses where {' and '.join(OUTPUTS)} are read, and neither is: leave modules "
                             f"out, or give activation=['mean', 'std']. Parameters are recorded all")
        if not (unit_dim is None or is_whole(unit_dim)):
            raise ValueError(f"unit_dim is the number of an axis, or None; got {unit_dim!r}")

    def __reduce__(self):
        "Pickled and copied as its arguments, the package's own statistics by name: an exported Learner stays small."
        own = {p: [s.name if STATISTICS.get(s.name) is s else s for s in ss] for p, ss in self.stats.items()}
        return _plan, ({**{s: getattr(self, s) for s in SETTINGS}, **own},)

    def due(self, row, i): return bool(self.every(i)) if callable(self.every) else row % self.every == 0

    def describe(self):
        every = self.every if isinstance(self.every, int) else getattr(self.every, '__name__', 'a function')
        return dict(stats={p: [s.name for s in ss] for p, ss in self.stats.items()}, every=every, sample=self.sample,
                    window=self.window, per_call=self.per_call, unit_dim=self.unit_dim, placebo=self.placebo,
                    budget=self.budget,
                    modules=None if self.modules is None else str(self.modules))

def _only_n(view): return view.n,

def _plan(settings): return Plan(**settings)
