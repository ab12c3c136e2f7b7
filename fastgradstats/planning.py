"""The Plan: what is measured, where and how often."""
from __future__ import annotations

from operator import attrgetter

from .placebo import EVERY
from .prepared import MOMENTS, SITE_READS, SMALL_READS
from .probes import ENDS, OUTPUTS, PROBES, check_modules
from .record import RESERVED
from .stats import STATISTICS, resolve
from .views import SAMPLE

DEFAULTS = dict(
    grad       = ['mean', 'std', 'abs_mean', 'abs_max', 'norm', 'median', 'abs_median', 'frac_zero', 'frac_nonfinite',
                  'hist'],
    activation = ['mean', 'std', 'min', 'max', 'frac_zero', 'frac_near_zero', 'frac_nonfinite', 'hist', 'frac_dead',
                  'frac_dormant'],
    grad_output=None, grad_used=None, weight=['norm'], update=['norm'],
    input      = ['mean', 'std', 'min', 'max'],
    output     = ['mean', 'std', 'min', 'max'])


class Plan:
    "What is measured, where and how often: the checked arguments of a callback or of `watch`."
    def __init__(self, *, modules=None, every=1, sample=SAMPLE, window=None, per_call=False, unit_dim=None,
                 placebo=False, **probes):
        wrong = [p for p in probes if p not in PROBES]
        if wrong: raise TypeError(f"{wrong[0]!r} is not an argument; there are the probes {', '.join(PROBES)}, and "
                                  f"modules, every, sample, window, per_call, unit_dim, placebo")
        self.stats = {}
        for probe in PROBES:
            specs = probes.get(probe)
            if specs is None: continue
            if isinstance(specs, str) or callable(specs) or not isinstance(specs, (list, tuple)): specs = [specs]
            found = [resolve(s, probe) for s in specs]
            for s in found:
                if s.name in RESERVED: raise ValueError(f"a statistic cannot be called {s.name!r}: a column of the "
                                                        f"record is. Give another name: statistic(f, name=...)")
                if s.name == 'placebo': raise ValueError("'placebo' is not measured as other statistics are: give "
                                                         "placebo=True, and another name to one of your own")
                if s.kind == 'unit' and probe != 'activation':
                    raise ValueError(f"{s.name!r} is measured per unit and belongs to activation=[...], not to {probe}")
                if sum(s.name == o.name for o in found) > 1: raise ValueError(f"{s.name!r} is given twice for {probe}")
            if found: self.stats[probe] = found
        if not self.stats:
            raise ValueError(f"nothing to measure: give statistics for at least one of {', '.join(PROBES)}")
        check_modules(modules)
        if modules is not None and not any(p in self.stats for p in OUTPUTS):
            raise ValueError(f"modules chooses where {' and '.join(OUTPUTS)} are read, and neither is: leave modules "
                             f"out, or give activation=['mean', 'std']. Parameters are recorded all")
        if not callable(every) and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise ValueError(f"every is a whole number of 1 or more, or a function f(iteration) -> bool; got {every!r}")
        for name, v, low in (('sample', sample, 100), ('window', window, 1)):
            if v is not None and (isinstance(v, bool) or not isinstance(v, int) or v < low):
                raise ValueError(f"{name} is a whole number of {low} or more, or None; got {v!r}")
        if unit_dim is not None and not isinstance(unit_dim, int):
            raise ValueError(f"unit_dim is an axis; got {unit_dim!r}")
        if not isinstance(placebo, int) or placebo < 0:
            raise ValueError(f"placebo is True (every {EVERY} measured rows), False, or a whole number of measured "
                             f"rows; got {placebo!r}")
        if placebo and 'grad' not in self.stats:
            raise ValueError("placebo is recorded beside the statistics of `grad`: give grad=['norm'] or others")
        self.placebo = EVERY if placebo is True else int(placebo)
        self.modules, self.every, self.sample, self.window = modules, every, sample, window
        self.per_call, self.unit_dim = per_call, unit_dim
        self.scalars = {p: [s for s in ss if s.kind == 'scalar'] for p, ss in self.stats.items()}
        self.hists   = {p: [s for s in ss if s.kind == 'hist'] for p, ss in self.stats.items()}
        self.units   = [s for s in self.stats.get('activation', []) if s.kind == 'unit']
        self.sampled = {p: any(s.sampled or s.own for s in ss) for p, ss in self.stats.items()}
        self.always  = [s for s in self.units if s.name != 'frac_dormant']      # that one at the end of a window alone
        self.own     = {p: [s for s in ss if not s.reads] for p, ss in self.scalars.items()}
        self.names   = {p: tuple(dict.fromkeys(('n', *(a for s in ss for a in s.reads))))     # what is read of a View
                        for p, ss in self.scalars.items()}
        self.get     = {p: attrgetter(*a) if len(a) > 1 else _only_n for p, a in self.names.items()}   # gives a tuple
        plain = lambda p, known: set(self.names[p]) <= set(known) and not self.own[p]
        self.small   = {p for p in self.stats if plain(p, SMALL_READS)}
        self.at_once = {p for p, ss in self.stats.items() if all(STATISTICS.get(s.name) is s for s in ss) and
                        (p in ENDS and plain(p, MOMENTS) and not self.hists[p] or
                         p == 'activation' and plain(p, SITE_READS))}
        self.only_norm = {p for p, ss in self.stats.items() if [s.name for s in ss] == ['norm'] and not ss[0].own}

    def __reduce__(self):
        "Pickled and copied as its arguments, the package's own statistics by name: an exported Learner stays small."
        own = {p: [s.name if STATISTICS.get(s.name) is s else s for s in ss] for p, ss in self.stats.items()}
        return _plan, (dict(modules=self.modules, every=self.every, sample=self.sample, window=self.window,
                            per_call=self.per_call, unit_dim=self.unit_dim, placebo=self.placebo, **own),)

    def due(self, row, i): return bool(self.every(i)) if callable(self.every) else row % self.every == 0

    def describe(self):
        every = self.every if isinstance(self.every, int) else getattr(self.every, '__name__', 'a function')
        return dict(stats={p: [s.name for s in ss] for p, ss in self.stats.items()}, every=every, sample=self.sample,
                    window=self.window, per_call=self.per_call, unit_dim=self.unit_dim, placebo=self.placebo,
                    modules=None if self.modules is None else str(self.modules))

def _only_n(view): return view.n,

def _plan(settings): return Plan(**settings)
