"""Two nets (or more) side by side, from their records: a table, a figure, and a verdict computed from the numbers.

    compare({'default': [rec0, rec1], 'kaiming': [rec2, rec3]})      # the n-th records of both saw the same batches

The verdict asks the question of the Lesson 10 thread: is the better net's gradient smaller, and sooner? Every yes, no
and number in it is counted; nothing of it is known in advance. Gradients here are those of the *weights* (parameters
with two or more dimensions), never of biases or of outputs: they answer the question differently.
"""
from __future__ import annotations

from functools import cached_property
from typing import Mapping, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .._text import acc, cell, num, pct
from ..diagnosis.outcome import outcome
from ..diagnosis.thresholds import SETTLE
from ..plots.side_by_side import side_by_side
from ..record.record import Record
from ..record.schema import RESERVED
from ..record.select import columns, count, lost_loss, nonfinite, weights
from .narrative import answer
from .phases import ALL_UNITS, MEDIAN, epoch_names, moments, phase_values, window_spans

FIRST, LAST = 10, 20              # iterations of the two phases that are compared
PHASES      = 'first', 'last', 'whole'


class Cells(NamedTuple):
    "The better net's value over the other's, for every pair of layer and seed, and in how many of them it is smaller."
    ratio: pd.Series              # index (seed, layer)
    smaller: int
    larger: int
    n: int

    @property
    def says(self):
        if not self.n:                       return 'not measured'
        if self.smaller == self.n:           return 'yes'
        if self.larger  == self.n:           return 'no'
        if self.smaller >= .8 * self.n:      return 'mostly yes'
        if self.larger  >= .8 * self.n:      return 'mostly no'
        return 'undecided'


def compare(
    runs: Mapping,                # {name: Record, or a list of Records of several seeds}; n-th with n-th: same batches
    first: int = FIRST,           # the first phase: so many iterations
    last: int = LAST,             # the last phase: so many iterations
    upto: int | None = None,      # compare only so many iterations (when a run was interrupted)
    layer: str | None = None,     # the layer whose gradient norm is shown; default: the second one with weights
) -> Comparison:
    """Compare nets by their records. The result has `.table`, `.verdict` and `.plot()`.

    Raises:
        TypeError: `runs` is no mapping of names to Records.
        ValueError: a record without iterations, phases of less than one, or a layer that not all have.

    Example:
        compare({'default': [rec0, rec1], 'kaiming': [rec2, rec3]}).plot()
    """
    return Comparison(runs, first, last, upto, layer)


class Comparison:
    """What `compare` returns: `.table` (DataFrame), `.verdict` (text), `.plot()` (figure); shown, a short table and the
    verdict.

    Example:
        c = Comparison({'default': rec0, 'kaiming': rec1})          # what compare gives
        c.verdict                                         # the answer, in one paragraph
        c.table.query("statistic == 'norm'")              # medians, least and most over the seeds
    """

    def __init__(self, runs: Mapping, first: int = FIRST, last: int = LAST, upto: int | None = None,
                 layer: str | None = None):
        if not isinstance(runs, Mapping) or not runs:
            raise TypeError(f"compare takes a mapping {{name: Record or list of Records}}, for example compare({{'a': "
                            f"rec_a, 'b': [rec_b0, rec_b1]}}); got {type(runs).__name__}{'' if runs else ', empty'}")
        wrong = [n for n, r in runs.items() if not isinstance(r, (Record, list, tuple))]
        if wrong: raise TypeError(f"{wrong[0]!r}: expected a Record or a list of Records, got "
                                  f"{type(runs[wrong[0]]).__name__}; a Learner's is learn.layer_stats, a file's "
                                  f"Record.load(path)")
        self.runs = {str(name): [r] if isinstance(r, Record) else list(r) for name, r in runs.items()}
        for name, recs in self.runs.items():
            wrong = [type(r).__name__ for r in recs if not isinstance(r, Record)]
            if wrong:
                raise TypeError(f"{name!r}: expected Records, got {wrong[0]}; read a file with Record.load(path)")
            if not recs: raise ValueError(f"{name!r} has no records")
            if any(len(r) == 0 for r in recs): raise ValueError(f"a record of {name!r} has no iterations")
        for what, n in dict(first=first, last=last, upto=1 if upto is None else upto).items():
            if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1:
                raise ValueError(f"{what} must be a whole number of at least 1 iteration, got {n!r}")
        self.first, self.last, self.upto = first, last, upto
        common       = self._common_layers()
        self.layers  = common
        self.layer   = layer or (common[1] if len(common) > 1 else common[0] if common else None)
        self.deepest = (common[-2] if len(common) > 2 else self.layer)        # the last hidden layer with weights
        if layer is not None and layer not in common:
            raise ValueError(f"layer {layer!r} is not a weight recorded in every net; those are: "
                             f"{', '.join(common) or 'none'}")
        parts = []
        for name, recs in self.runs.items():
            for seed, rec in enumerate(recs):
                parts.append(phase_values(rec, self._phases(rec)).assign(model=name, seed=seed))
        self.values = pd.concat(parts, ignore_index=True)                     # tidy, one line per value and seed
        self._index = self.values.set_index(['model', 'phase', 'probe', 'statistic', 'layer',
                                             'seed']).value.sort_index()

    def _common_layers(self):
        recs = [r for rs in self.runs.values() for r in rs]
        rest = [set(weights(r)) for r in recs[1:]]
        return [l for l in weights(recs[0]) if all(l in s for s in rest)]

    def _phases(self, rec):
        "phase -> boolean array over the record's rows."
        n     = count(rec)
        here  = n < (np.inf if self.upto is None else self.upto)
        total = int(n[here].max()) + 1
        first = n < (self.first if total > self.first else max(total // 2, 1))
        last  = here & (n >= total - self.last) & ~first
        if not last.any(): last = n == total - 1
        return dict(first=first, last=last, whole=here)

    def span(self, phase: str) -> str:
        "The iterations of a phase, as text: '0–9', or 'last 20' where runs are of different lengths."
        if phase not in PHASES: raise KeyError(f"there is no phase {phase!r}; give one of {', '.join(PHASES)}")
        out = set()
        for rec in (r for rs in self.runs.values() for r in rs):
            n = count(rec)[self._phases(rec)[phase]]
            out.add((n[0], n[-1]))
        if len(out) == 1: return '{}–{}'.format(*out.pop())
        size = sorted({b - a + 1 for a, b in out})
        return f"{phase} {' to '.join(str(n) for n in size[::max(len(size) - 1, 1)])}"

    # --- numbers -----------------------------------------------------------------------------------------------------
    @cached_property
    def table(self) -> pd.DataFrame:
        """DataFrame: model, phase, probe, statistic, layer; median, min and max over the seeds, and how many seeds have
        it. A seed's value in the phases 'first' and 'last' is the median over their iterations, in 'whole' the mean
        over all. Statistics of windows take the first and the last window; validation numbers those of the first and
        last epoch."""
        keys = ['model', 'phase', 'probe', 'statistic', 'layer']
        good = self.values.assign(value=self.values.value.where(np.isfinite(self.values.value)))
        out  = good.groupby(keys, sort=False).value.agg(['median', 'min', 'max', 'count']).reset_index()
        return out.rename(columns={'count': 'seeds'})

    def value(self, model: str, phase: str, probe: str, statistic: str, layer: str = '') -> np.ndarray:
        "Array with one number a seed; empty where it was not measured."
        try: return self._index.loc[(model, phase, probe, statistic, layer)].to_numpy()
        except KeyError: return np.array([])

    def middle(self, *key: str) -> float:
        "The median of `value` over the seeds in which it is finite; NaN where there is none."
        v = self.value(*key)
        v = v[np.isfinite(v)]
        return float(np.median(v)) if len(v) else np.nan

    @cached_property
    def nonfinite(self) -> dict:
        "{(name, seed): first iteration with a loss or weight gradient that is NaN or infinite}; an untold loss is not"
        out = {}
        for name, recs in self.runs.items():
            for seed, rec in enumerate(recs):
                bad = lost_loss(rec)
                if ('grad', 'frac_nonfinite') in rec: bad = bad | nonfinite(rec, ('grad', 'frac_nonfinite')).any(1)
                if bad.any(): out[name, seed] = int(count(rec)[bad.argmax()])
        return out

    @cached_property
    def dead(self) -> dict:
        "{(name, seed): first iteration} of the runs that end with the gradient of every hidden weight exactly zero."
        out = {}
        for name, recs in self.runs.items():
            for seed, rec in enumerate(recs):
                some = weights(rec)
                if not some or ('grad', 'norm') not in rec: continue
                g    = rec['grad', 'norm'][:, columns(rec, 'grad', some[:-1] or some)]
                seen = self._phases(rec)['whole'] & ~np.isnan(g).all(axis=1)
                live = np.nonzero((g[seen] != 0).any(axis=1))[0]
                n    = count(rec)[seen]
                if len(n) and (not len(live) or live[-1] < len(n) - 1):
                    out[name, seed] = int(n[live[-1] + 1 if len(live) else 0])
        return out

    @cached_property
    def unranked(self):
        "Names of the nets of which neither a loss nor an accuracy is known."
        out = [n for n, recs in self.runs.items() if not any(r.iters.loss.notna().any() for r in recs)]
        sick = {n for n, _ in self.nonfinite}
        return [n for n in out if n not in sick and not np.isfinite(self.middle(n, 'last', 'epochs', 'accuracy'))]

    @cached_property
    def order(self) -> tuple[str, str]:
        """(worse, better) of the names: by final accuracy where it was measured of all, else by final loss (medians
        over seeds)."""
        good = {n: self.middle(n, 'last', 'epochs', 'accuracy') for n in self.runs}
        told = np.isfinite(list(good.values())).all()
        def rank(name):
            loss = self.middle(name, 'last', 'iters', 'loss')
            sick = sum(n == name for n, _ in self.nonfinite) / len(self.runs[name])
            return (sick > .5, -good[name] if told else 0., loss if np.isfinite(loss) else np.inf)
        names = sorted(self.runs, key=rank)
        return names[-1], names[0]

    def cells(self, phase, statistic, probe='grad'):
        """`Cells` of the better net against the worse, over the layers with weights and the seeds that both have; in
        the last phase without the seeds in which one has died."""
        worse, better = self.order
        ratio = {}
        for layer in self.layers:
            a, b = (self.value(n, phase, probe, statistic, layer) for n in (worse, better))
            size = [self.value(n, phase, probe, 'abs_mean', layer) for n in (worse, better)]
            for seed, (x, y) in enumerate(zip(a, b)):
                if not (np.isfinite(x) and np.isfinite(y)) or (x == 0 and y == 0): continue
                if phase == 'last' and ((worse, seed) in self.dead or (better, seed) in self.dead): continue
                # below rounding error of the elements it is no signal: rows of a softmax's gradient sum to 0 by algebra
                if statistic == '|mean|' and all(len(s) and v < 1e-5 * s[seed] for v, s in zip((x, y), size)): continue
                ratio[seed, layer] = y / x if x else np.inf
        ratio = pd.Series(ratio, dtype=float)
        return Cells(ratio, int((ratio < 1).sum()), int((ratio > 1).sum()), len(ratio))

    def crossover(self, statistic='norm', stay=20, smooth=9):
        """A number a seed: the iteration from which on the better net's statistic (smoothed, median of the layers)
        stays below the worse one's for `stay` iterations; infinite where it never does."""
        worse, better = self.order
        out = []
        for a, b in zip(self.runs[worse], self.runs[better]):
            if ('grad', statistic) not in a or ('grad', statistic) not in b: continue
            layers = [l for l in weights(a) if l in weights(b)]
            series = [pd.DataFrame(r['grad', statistic][:, columns(r, 'grad', layers)], index=count(r)) for r in (a, b)]
            with np.errstate(all='ignore'): gap = np.log(series[1] / series[0]).median(axis=1).dropna()
            if self.upto is not None: gap = gap[gap.index < self.upto]
            below = gap.rolling(smooth, center=True, min_periods=1).median() < 0
            n     = below.index.to_numpy()
            ok    = [i for i in range(len(n)) if n[-1] - n[i] >= stay - 1
                     and below.to_numpy()[(n >= n[i]) & (n < n[i] + stay)].all()]
            out.append(float(n[ok[0]]) if ok else np.inf)
        return np.array(out)

    @cached_property
    def outcomes(self): return {name: [outcome(r) for r in recs] for name, recs in self.runs.items()}

    def state(self, name, phase):
        """What most seeds are at the end of the phase, as diagnose has it ('starved', 'converged', 'learning' ...), or
        'dead', 'non-finite', 'not measured'; 'cannot tell' where the seeds do not agree."""
        e, loss = self.middle(name, phase, 'grad', 'elasticity', MEDIAN), self.middle(name, phase, 'iters', 'loss')
        if not np.isfinite(loss): return 'non-finite' if any(n == name for n, _ in self.nonfinite) else 'not measured'
        if phase == 'last' and sum(n == name for n, _ in self.dead) > len(self.runs[name]) / 2: return 'dead'
        if not np.isfinite(e): return 'not measured'
        states = [o.at(self._phases(r)[phase]) for o, r in zip(self.outcomes[name], self.runs[name])]
        most   = max(states, key=states.count)
        return most if states.count(most) > len(states) / 2 else 'cannot tell'

    def twins(self):
        """Two moments, early in the worse net and late in the better, with the most equal gradient norm of `layer`: a
        dict name -> (seed, iteration, norm, loss, elasticity, gain), or None if no two are within a quarter."""
        worse, better = self.order
        best = None
        for seed, (a, b) in enumerate(zip(self.runs[worse], self.runs[better])):
            x, y = (moments(r, self.layer, self._phases(r)[p]) for r, p in ((a, 'first'), (b, 'last')))
            if x is None or y is None or x.empty or y.empty: continue
            if (x.iter >= SETTLE).any(): x = x[x.iter >= SETTLE]
            gap  = np.abs(np.log(x.norm.to_numpy()[:, None] / y.norm.to_numpy()[None]))
            i, j = np.unravel_index(gap.argmin(), gap.shape)
            if best is None or gap[i, j] < best[0]: best = gap[i, j], seed, x.iloc[i], y.iloc[j]
        if best is None or best[0] > np.log(1.25): return None
        _, seed, x, y = best
        return {worse: (seed, *x), better: (seed, *y)}

    @cached_property
    def verdict(self) -> str:
        "The answer in one paragraph, every clause of it decided by the numbers (see narrative.py)."
        return answer(self)

    def summary(self):
        "Rows (quantity, when, {name: text}) of the short table: median [min, max] over the seeds."
        layer, deep = self.layer or '', self.deepest or ''
        iters  = {p: self.span(p) for p in ('first', 'last')}
        rows   = [(f"|g| of {layer}",                             'grad', 'norm', layer, num, iters),
                  ("loss",                                        'iters', 'loss', '', num, iters),
                  ("gain: loss saved by looking at the input", 'iters', 'gain', '', num, iters),
                  ("elasticity, median of the weights", 'grad', 'elasticity', MEDIAN, num, iters),
                  (f"exact zeros in the {deep} gradient", 'grad', 'frac_zero', deep, pct, iters),
                  ("zero activations, median of the layers", 'activation', 'frac_zero', MEDIAN, pct, iters),
                  ("dead units, of all, over a window",
                   'activation', 'frac_dead', ALL_UNITS, pct, self._ends(window_spans)),
                  ("validation accuracy after an epoch", 'epochs', 'accuracy', '', acc, self._ends(epoch_names))]
        out = []
        for title, probe, stat, at, fmt, when in rows:
            have = {n: {p: self._seen(n, self.value(n, p, probe, stat, at)) for p in ('first', 'last')}
                    for n in self.runs}
            if not any(np.isfinite(v).any() for d in have.values() for v in d.values()): continue
            for i, phase in enumerate(('first', 'last') if when['first'] != when['last'] else ('last',)):
                out.append((title if i == 0 else '', when[phase], {n: cell(d[phase], fmt) for n, d in have.items()}))
        return out

    def _seen(self, name, v):
        "A number a seed without the seeds in which it was not measured."
        return v[[np.isfinite(x) or (name, seed) in self.nonfinite for seed, x in enumerate(v)]]

    def _ends(self, name):
        "Names of the first and the last window, or epoch; just 'first' and 'last' where the records differ."
        ends = [name(r, self._phases(r)) for rs in self.runs.values() for r in rs]
        return {p: ends[0][i] if len({e[i] for e in ends}) == 1 else p for i, p in enumerate(('first', 'last'))}

    def __repr__(self):
        rows  = self.summary()
        names = list(self.runs)
        wide  = [max(len(r[0]) for r in rows), max(len(r[1]) for r in rows)]
        cols  = {n: max(len(n), *(len(r[2][n]) for r in rows)) for n in names}
        seeds = max(len(r) for r in self.runs.values())
        lines = [f"Comparison of {', '.join(names)}: median [min, max] over {seeds} seed{'s' * (seeds != 1)}",
                 f"{'':<{wide[0]}}  {'iters':<{wide[1]}}  " + '  '.join(f'{n:<{w}}' for n, w in cols.items())]
        lines += [f"{q:<{wide[0]}}  {it:<{wide[1]}}  " + '  '.join(f'{v[n]:<{w}}' for n, w in cols.items())
                  for q, it, v in rows]
        return '\n'.join(l.rstrip() for l in lines) + '\n\n' + self.verdict

    def plot(self) -> Figure:
        """Side by side: small multiples, a colour per net, the seeds as thin lines and their smoothed median bold. The
        figure."""
        rec = next(iter(self.runs.values()))[0]
        return side_by_side(self.runs, self.layer, self.deepest, self.upto,
                            [count(rec)[self._phases(rec)[phase]] for phase in ('first', 'last')])

    # --- everything, for other programs ------------------------------------------------------------------------------
    def frame(self, most: int = 300_000) -> pd.DataFrame:
        """Tidy DataFrame of all that was recorded but the histograms: model, seed, iter, loss, gain, probe, layer, a
        column per statistic. Beyond `most` lines only every 2nd, 3rd ... iteration is kept; the lines of windows always
        are."""
        if most < 1: raise ValueError(f"most is a number of lines, 1 or more; got {most}")
        parts = []
        for name, recs in self.runs.items():
            for seed, rec in enumerate(recs):
                keys  = [k for k in rec.keys() if rec[k].ndim == 2 and k[1] not in RESERVED]
                if not keys: continue
                f     = rec.frame(*keys)
                stats = list(dict.fromkeys(s for _, s in keys))
                whole = [s for p, s in keys if (p, s) in rec.windows]
                parts.append(f[['iter', 'epoch', 'loss', 'gain', 'probe', 'layer', *stats]].assign(
                    model=name, seed=seed, _window=f[whole].notna().any(axis=1)))
        if not parts: raise ValueError(f"no statistic of layers was recorded of {' and '.join(self.runs)}")
        out   = pd.concat(parts, ignore_index=True)
        every = -(-len(out) // most)
        if every > 1: out = out[(out.iter % every == 0) | out._window]
        head  = ['model', 'seed', 'iter', 'epoch', 'loss', 'gain', 'probe', 'layer']
        return out[head + [c for c in out if c not in head and c != '_window']].reset_index(drop=True)

    def to_csv(self, path: str):
        "Write `frame()` as CSV; a statistic that does not belong to the line's probe is empty. Returns the path."
        import pyarrow as pa
        import pyarrow.csv
        try: pa.csv.write_csv(pa.Table.from_pandas(self.frame(), preserve_index=False), str(path))
        except OSError as e: raise OSError(f"cannot write {path}: {e.strerror or e}") from e
        return path
