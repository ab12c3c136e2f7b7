"""The Record: what was measured while a network trained. Frozen, columnar, read without torch or fastai.

A row is one attempt at an optimizer step. `rec[probe, statistic]` is an array `(row, layer)`; a statistic that is
kept by windows (`hist`, `frac_dead`, `frac_dormant`) is `(window, layer, ...)`, its windows in `rec.windows[key]`.
"""
from __future__ import annotations

from difflib import get_close_matches
from os import PathLike

import numpy as np
import pandas as pd

from . import parquet as storing
from .parquet import ALIVE, DEAD, DEAD_UNITS, ITER_COLS, NONFINITE, PROBES, UNSEEN, Bins, plain      # noqa: F401

MAX_WINDOWS = 1024                # a histogram key keeps 512 to 1024 windows however long the run is
RESERVED    = {*ITER_COLS, 'gain', 'row', 'probe', 'layer', 'unit_state'}   # not free as a statistic's name
NOT_ASKED   = {('update', 'lr'), ('grad', 'placebo')}       # recorded, but not by their names
DERIVED     = {('grad', 'rms'):        "norm / sqrt(numel)",
               ('grad', 'per_loss'):   "norm / |loss|",
               ('grad', 'elasticity'): "|g| |w| / |loss|",
               ('update', 'ratio'):    "|update| / |weight|"}


class Record:
    "What was measured. `rec['grad', 'norm']` is an array (row, layer); NaN means not measured."
    __slots__ = ('_iters', '_epochs', '_layers', '_values', '_windows', '_units', '_bins', '_meta', '__weakref__')

    def __init__(self,
        iters,                        # DataFrame, one line a row, with the columns of ITER_COLS
        values,                       # {(probe, statistic): array (row, layer) or (window, layer, ...)}
        layers,                       # {probe: DataFrame with at least `layer`}, in order of first use
        windows=None,                 # {(probe, statistic): DataFrame first_iter, last_iter}; the keys kept by windows
        units=None,                   # {layer: int8 array (window, unit)} of ALIVE, DEAD, NONFINITE, UNSEEN
        epochs=None,                  # DataFrame: validation loss and metrics, one line an epoch
        bins=None,                    # Bins of the histograms
        meta=None,                    # versions, configuration, model, cost, what was not hooked and why
    ):
        put     = object.__setattr__
        iters   = pd.DataFrame(iters)
        missing = [c for c in ITER_COLS if c not in iters]
        if missing: raise ValueError(f"a record's iters need the columns {', '.join(missing)}")
        iters   = iters[list(ITER_COLS)].astype(ITER_COLS).reset_index(drop=True)
        frozen  = {}
        windows = {k: pd.DataFrame(d)[['first_iter', 'last_iter']].astype('int64').reset_index(drop=True)
                   for k, d in (windows or {}).items()}
        for key, v in values.items():
            if key[0] not in layers:
                raise ValueError(f"{key} is of the probe {key[0]!r}, which has no table of layers; there are "
                                 f"{', '.join(layers) or 'none'}")
            if key[1] in RESERVED and key != ('update', 'lr'):
                raise ValueError(f"a statistic cannot be called {key[1]!r}: a column of the record is. "
                                 f"Give it another name")
            if key in windows and not windows[key].last_iter.isin(iters.iter).all():
                raise ValueError(f"a window of {key} ends at an iteration that has no row")
            v = np.array(v, dtype=np.float32)
            n = len(windows[key]) if key in windows else len(iters)
            if v.shape[:2] != (n, len(layers[key[0]])):
                raise ValueError(f"{key} has shape {v.shape}; expected ({n}, {len(layers[key[0]])}, ...)")
            v.flags.writeable = False
            frozen[key] = v
        put(self, '_iters',   iters)
        put(self, '_values',  frozen)
        put(self, '_layers',  {p: pd.DataFrame(d).reset_index(drop=True) for p, d in layers.items()})
        put(self, '_windows', windows)
        put(self, '_units',   {k: np.array(v, np.int8) for k, v in (units or {}).items()})
        put(self, '_epochs',  pd.DataFrame() if epochs is None else pd.DataFrame(epochs).reset_index(drop=True))
        put(self, '_bins',    bins)
        put(self, '_meta',    plain(meta or {}))
        for layer, v in self._units.items():
            if v.ndim != 2 or len(v) != len(windows.get(DEAD_UNITS, ())):
                raise ValueError(f"the units of {layer} have shape {v.shape}; expected (window, unit), the windows "
                                 f"those of {DEAD_UNITS}")
            v.flags.writeable = False

    def __setattr__(self, name, value): raise AttributeError(f"a Record is frozen: {name} cannot be set")
    def __reduce__(self):
        return Record, (self._iters, self._values, self._layers, self._windows, self._units, self._epochs, self._bins,
                        self._meta)

    # --- what a reader asks for -------------------------------------------------------------------------------------
    @property
    def iters(self):
        "DataFrame, one line a row: iter, fit, epoch, bs, loss, loss_constant, gain, lr, ... (see ITER_COLS)."
        d = self._iters.copy()
        d.insert(d.columns.get_loc('loss_constant') + 1, 'gain', d.loss_constant - d.loss)
        return d
    @property
    def epochs(self):  return self._epochs.copy()
    @property
    def layers(self):  return {p: d.copy() for p, d in self._layers.items()}
    @property
    def windows(self): return {k: d.copy() for k, d in self._windows.items()}
    @property
    def bins(self):    return self._bins
    @property
    def meta(self):    return plain(self._meta)

    def keys(self):
        "The recorded (probe, statistic) pairs, without the derived ones."
        return list(self._values)

    def __len__(self): return len(self._iters)
    def __contains__(self, key):
        try: self[key]
        except (KeyError, TypeError): return False
        return True

    def __getitem__(self, key):
        "The array of `(probe, statistic)`: (row, layer), or (window, layer, ...) where `windows` has the key."
        if isinstance(key, list): key = tuple(key)
        if not (isinstance(key, tuple) and all(isinstance(k, str) for k in key)): raise KeyError(self._why_not(key))
        if key in self._values: return self._values[key]
        if key in DERIVED:      return self._derive(key)
        raise KeyError(self._why_not(key))

    def __getattr__(self, name):
        more = f": read rec.iters[{name!r}]" if name in (*ITER_COLS, 'gain') else (
               f": read {self._at(name)}" if name in PROBES else '')
        raise AttributeError(f"a Record has no attribute {name!r}{more}")

    def _at(self, probe):
        "How the statistics of a probe are read."
        here = [s for p, s in self._values if p == probe]
        return f"rec[{probe!r}, statistic]; recorded there: {', '.join(here) or 'nothing'}"

    def _derive(self, key):
        def get(probe, stat):
            if (probe, stat) not in self._values:
                raise KeyError(f"{key[1]!r} of {key[0]!r} is {DERIVED[key]} and needs {stat!r} at {probe!r}, which was "
                               f"not recorded. Add it with {to_record(self, {probe: [stat]})}")
            return self._values[probe, stat]
        loss = np.abs(self._iters.loss.to_numpy())[:, None]
        with np.errstate(divide='ignore', invalid='ignore', over='ignore'):
            if key[1] == 'rms':
                return get('grad', 'norm') / np.sqrt(self._layers['grad'].numel.to_numpy(float)).astype(np.float32)
            if key[1] == 'per_loss':
                v = get('grad', 'norm').astype(float) / loss
            elif key[1] == 'elasticity':
                v = get('grad', 'norm').astype(float) * self._aligned(get('weight', 'norm'), 'weight', 'grad') / loss
            else:
                w = self._aligned(get('weight', 'norm'), 'weight', 'update')
                v = np.where(w == 0, np.nan, get('update', 'norm') / w)
            return v.astype(np.float32)

    def _aligned(self, v, probe, to):
        "The columns of `v` (of `probe`) in the order of the layers of `to`; NaN where `probe` has no such layer."
        have, want = self._layers[probe].layer, self._layers[to].layer
        if len(have) == len(want) and (have == want).all(): return v
        idx = pd.Index(have).get_indexer(want)
        return np.where(idx >= 0, v[:, idx], np.nan)

    def _why_not(self, key):
        probes = list(dict.fromkeys(p for p, _ in self._values))
        if not (isinstance(key, tuple) and len(key) == 2 and all(isinstance(k, str) for k in key)):
            text = f"a record is read as rec[probe, statistic], for example rec['grad', 'norm']; got {key!r}"
            if not isinstance(key, (str, tuple)): return text
            if isinstance(key, str) and key in self.iters: return f"{text}. Read that as rec.iters[{key!r}]"
            if key in probes: return f"{text}. Read that as {self._at(key)}"
            if len(key) == 3 and key[:2] in self.keys():
                return f"{text}. Its columns are the layers of rec.layers[{key[0]!r}]; rec.frame() has them by name"
            return text
        probe, stat = key
        here   = [s for p, s in self._values if p == probe]
        if probe not in probes:
            ours = f"recorded probes: {', '.join(probes) or 'none'}"
            if probe in PROBES:
                return f"{probe!r} was not recorded; {ours}. Add it with {to_record(self, {probe: [stat]})}"
            known = {*self._values, *DERIVED}
            at    = sorted((p for p, d in self._layers.items() if (d.layer == probe).any()),
                           key=lambda p: (p, stat) not in known)
            if at: return (f"{probe!r} is a layer, not a probe; {ours}. Read it as a column of "
                           f"rec[{at[0]!r}, {stat!r}], in the order of rec.layers[{at[0]!r}].layer")
            if (stat, probe) in known: return f"{probe!r} is no probe; {ours}. Did you mean rec[{stat!r}, {probe!r}]?"
            near = [f". Did you mean rec[{p!r}, {stat!r}]?" for p in get_close_matches(str(probe), probes, 1)]
            return f"{probe!r} is no probe; {ours}{''.join(near)}"
        if stat == 'placebo': return "the placebo was not measured. Add it with LayerStatsCallback(placebo=True)"
        more = [s for p, s in DERIVED if p == probe and (p, s) in self]
        near = get_close_matches(str(stat), here + more, 1)
        return (f"{stat!r} was not recorded at {probe!r}; recorded there: {', '.join(here)}. "
                + (f"Did you mean rec[{probe!r}, {near[0]!r}]? If not, add" if near else "Add")
                + f" it with {to_record(self, {probe: [stat]})}")

    @property
    def units(self):
        """Life table, one line per window, layer and unit. `state` is alive, born dead (dead in every window so far),
        died (alive before, dead now), revived (dead before, alive now) or non-finite; `since` is the first iteration of
        the window at which the unit became what it is."""
        wins  = self._windows.get(DEAD_UNITS)
        names = np.array(['alive', 'born dead', 'died', 'revived', 'non-finite'])
        parts = []
        for layer, s in self._units.items():
            n, u    = s.shape
            first   = wins.first_iter.to_numpy()
            since   = np.zeros((n, u), np.int64)
            code    = np.zeros((n, u), np.int8)
            lived   = np.zeros(u, bool)
            ever    = np.zeros(u, bool)       # ever dead
            last    = np.full(u, UNSEEN, np.int8)
            started = np.zeros(u, np.int64)
            for w in range(n):
                seen    = s[w] != UNSEEN
                started = np.where(seen & (s[w] != last), first[w], started)
                since[w] = started
                lived  |= s[w] == ALIVE
                code[w] = np.select([s[w] == NONFINITE, (s[w] == DEAD) & lived, s[w] == DEAD, ever], [4, 2, 1, 3], 0)
                ever   |= s[w] == DEAD
                last    = np.where(seen, s[w], last)
            w, k = np.nonzero(s != UNSEEN)
            parts.append(pd.DataFrame(dict(window=w, layer=layer, unit=k, state=names[code[w, k]], since=since[w, k])))
        none = dict(window='int64', layer='str', unit='int64', state='str', since='int64')
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame({c: [] for c in none}).astype(none)

    def frame(self, *keys):
        """Tidy DataFrame, one line per row, probe and layer that was measured, one column per statistic; loss, lr and
        the other columns of `iters` repeated. A window's value stands on the window's last row. `keys`: (probe,
        statistic) pairs, derived ones too, or a probe's name for all of its; without them all but the histograms."""
        flat = [k for k in self._values if self._values[k].ndim == 2]
        want = []
        for k in keys:
            some = [f for f in flat if f[0] == k] if isinstance(k, str) else [tuple(k) if isinstance(k, list) else k]
            if not some:
                pair = tuple(keys[:2]) in self
                raise KeyError(f"{k!r} is no probe; give pairs: rec.frame({tuple(keys[:2])!r})" if pair else
                               self._why_not((k, 'norm')))
            want += some
        want = list(dict.fromkeys(want)) if keys else flat
        for k in want:
            if self[k].ndim != 2: raise ValueError(f"{k} is a histogram per window and has no place in a tidy frame; "
                                                   f"read it as rec{list(k)}, its windows as rec.windows[{k}]")
        parts = list(self._parts(want))
        rows  = np.concatenate([np.zeros(0, int), *(r for _, r, _, _ in parts)])
        join  = lambda f, dtype: np.concatenate([np.zeros(0, dtype), *map(f, parts)])
        lines = dict(probe=join(lambda p: np.full(len(p[1]), p[0], object), object),
                     layer=join(lambda p: self._layers[p[0]].layer.to_numpy(object)[p[2]], object))
        for s in dict.fromkeys(s for _, s in want):
            lines[s] = join(lambda p: p[3].get(s, np.full(len(p[1]), np.nan)), np.float32)
        iters = self.iters.iloc[rows].reset_index(drop=True)
        if 'lr' in lines:                                              # on lines of `update` the layer's own
            iters['lr'] = np.where(lines['probe'] == 'update', lines.pop('lr'), iters.lr)
        lines = pd.DataFrame(lines).astype(dict(probe='str', layer='str'))
        return pd.concat([iters, lines], axis=1)

    def _parts(self, keys):
        """For each probe: its name, the rows and columns at which something was measured, {statistic: values there};
        of a histogram (which of them have one, their counts)."""
        pos = pd.Index(self._iters.iter)
        for probe in dict.fromkeys(p for p, _ in keys):
            seen, grid = np.zeros((len(pos), len(self._layers[probe])), bool), {}
            for k in keys:
                if k[0] != probe: continue
                v  = self[k]
                at = np.arange(len(pos))                               # row -> row of v, or -1
                if k in self._windows:
                    ends = pos.get_indexer(self._windows[k].last_iter)
                    at   = np.full(len(pos), -1)
                    at[ends] = np.arange(len(ends))
                has = ~np.isnan(v if v.ndim == 2 else v[..., 0])
                seen[at >= 0] |= has[at[at >= 0]]
                grid[k[1]] = v, has, at
            r, c = np.nonzero(seen)
            out  = {}
            for s, (v, has, at) in grid.items():
                i  = at[r]
                ok = i >= 0
                if v.ndim == 3:
                    ok[ok] = has[i[ok], c[ok]]
                    out[s] = ok, v[i[ok], c[ok]]
                else:
                    out[s] = np.full(len(r), np.nan, np.float32)
                    out[s][ok] = v[i[ok], c[ok]]
            yield probe, r, c, out

    def _is_hist(self, stat): return any(v.ndim == 3 for (_, s), v in self._values.items() if s == stat)

    def __eq__(self, other):
        if not isinstance(other, Record): return NotImplemented
        return (self._iters.equals(other._iters) and list(self._values) == list(other._values)
                and all(np.array_equal(v, other._values[k], equal_nan=True) for k, v in self._values.items())
                and self._layers.keys() == other._layers.keys()
                and all(d.astype(str).equals(other._layers[p].astype(str)) for p, d in self._layers.items())
                and self._windows.keys() == other._windows.keys()
                and all(d.equals(other._windows[k]) for k, d in self._windows.items())
                and self._units.keys() == other._units.keys()
                and all(np.array_equal(v, other._units[k]) for k, v in self._units.items())
                and self._epochs.astype(str).equals(other._epochs.astype(str)))
    __hash__ = None

    # --- joining -----------------------------------------------------------------------------------------------------
    def join(self, *others):
        """One record of all: the rows are united by `iter`, the layers by name, the windows by their last iteration.
        Where two records measured the same value the first one's stands, as it does where windows of a layer overlap.
        Neighbouring histogram windows are merged until no more than 1,024 are left."""
        recs  = [self, *others]
        wrong = [type(r).__name__ for r in recs if not isinstance(r, Record)]
        if wrong: raise TypeError(f"join takes Records; got {wrong[0]}. Read a file with Record.load(path)")
        iters = pd.concat([r._iters for r in recs]).groupby('iter', sort=True)
        first = iters.first()
        for c in ('measured', 'stepped'): first[c] = iters[c].any()
        first = first.reset_index()
        pos   = pd.Index(first.iter)
        layers, values, windows, units = {}, {}, {}, {}
        for r in recs:
            for p, d in r._layers.items():
                layers[p] = d if p not in layers else pd.concat([layers[p], d]).drop_duplicates('layer')
        layers = {p: d.reset_index(drop=True) for p, d in layers.items()}
        col    = {p: pd.Index(d.layer) for p, d in layers.items()}
        for key in dict.fromkeys(k for r in recs for k in r._values):
            have = [r for r in recs if key in r._values]
            cols = [col[key[0]].get_indexer(r._layers[key[0]].layer) for r in have]
            if key in have[0]._windows:
                wins         = pd.concat([r._windows[key] for r in have])
                windows[key] = wins.groupby('last_iter').first_iter.min().reset_index()[['first_iter', 'last_iter']]
                ends         = pd.Index(windows[key].last_iter)
                rows         = [ends.get_indexer(r._windows[key].last_iter) for r in have]
            else:
                rows = [pos.get_indexer(r._iters.iter) for r in have]
            n   = len(windows[key]) if key in windows else len(pos)
            out = np.full((n, len(col[key[0]]), *have[0]._values[key].shape[2:]), np.nan, np.float32)
            if key == DEAD_UNITS: units = _no_units(have, n)
            for k, (r, i, j) in enumerate(zip(have, rows, cols)):
                v    = r._values[key]
                free = np.isnan(out[np.ix_(i, j)]).all(tuple(range(2, v.ndim)))              # (row or window, layer)
                if k and key in windows: free &= ~_overlapping(r._windows[key], windows[key], out, i, j)
                here = out[np.ix_(i, j)]
                out[np.ix_(i, j)] = np.where(free.reshape(*free.shape, *[1] * (v.ndim - 2)), v, here)
                if key == DEAD_UNITS:
                    names = r._layers['activation'].layer
                    for name, s in r._units.items():
                        ok = free[:, names[names == name].index[0]]
                        units[name][i[ok], :s.shape[1]] = s[ok]
            if out.ndim == 3: out, windows[key] = coarsen(out, windows[key])
            values[key] = out
        epochs = [r._epochs for r in recs if len(r._epochs)]
        epochs = pd.concat(epochs).drop_duplicates(['fit', 'epoch']).sort_values(['fit', 'epoch']) if epochs else None
        bins   = next((r._bins for r in recs if r._bins is not None), None)
        meta   = dict(self._meta)
        for r in others:
            for k, v in r._meta.items():
                if isinstance(v, dict) and isinstance(meta.get(k, {}), dict): meta[k] = {**v, **meta.get(k, {})}
                else:                                                         meta.setdefault(k, v)
        return Record(first, values, layers, windows, units, epochs, bins, meta)

    # --- files -------------------------------------------------------------------------------------------------------
    def save(self, path):
        "Write one self-describing Parquet file, which pandas and DuckDB read too (see storing.py). Returns the path."
        return storing.write(self, _path(path))

    @classmethod
    def load(cls, path):
        "Read the record that `save` wrote."
        return storing.read(_path(path), cls)

    # --- what a person sees ------------------------------------------------------------------------------------------
    def __repr__(self):
        it, meta = self._iters, self._meta
        fits  = it.fit.nunique()
        lines = [f"Record: {len(it):,} rows ({int(it.measured.sum()):,} measured) in {fits} fit{'s' * (fits != 1)}, "
                 f"{meta.get('model', 'a model')}"]
        by    = {}
        for p, s in self._values: by.setdefault(p, []).append(s)
        if by:
            wide = max(map(len, by))
            lines.append(f"  {'probe':<{wide}}  layers  statistics")
            lines += [f"  {p:<{wide}}  {len(self._layers[p]):>6}  {', '.join(ss)}" for p, ss in by.items()]
        if len(it) and it.loss.isna().all(): lines.append("  loss not known")
        elif len(it): lines.append(f"  loss {_num(it.loss.iloc[0])} at iteration {it.iter.iloc[0]}, "
                                   f"{_num(it.loss.iloc[-1])} at iteration {it.iter.iloc[-1]}")
        why = {}
        for name, reason in meta.get('not_hooked', {}).items(): why.setdefault(reason, []).append(name)
        for reason, names in why.items():
            lines.append(f"  not observed: {', '.join(names[:6])}{', ...' * (len(names) > 6)} ({reason})")
        cost = meta.get('cost')
        if cost and cost.get('percent') is not None:
            lines.append(f"  cost: {cost['percent']:.1f} % of the training time ({cost['seconds']:.2f} s "
                         f"of {cost['of']:.2f} s)")
        return '\n'.join(lines)


def to_record(rec, wanted):
    "What to paste to record the statistics `wanted`, {probe: [names]}, beside those that `rec` has at these probes."
    have  = {p: [s for q, s in rec.keys() if q == p and (q, s) not in NOT_ASKED] for p in wanted}
    given = [f"{p}={list(dict.fromkeys([*have[p], *ss]))!r}" for p, ss in wanted.items()]
    return f"LayerStatsCallback({', '.join(given)})"

def coarsen(hist, windows, most=MAX_WINDOWS):
    "Merge neighbouring histogram windows pairwise until `most` or fewer are left. hist: (window, layer, bin)."
    while len(hist) > most:
        odd  = len(hist) % 2
        even = len(hist) - odd
        pair = hist[:even].reshape(-1, 2, *hist.shape[1:])
        both = np.where(np.isnan(pair).all(1), np.nan, np.nansum(pair, axis=1, dtype=np.float64)).astype(np.float32)
        wins = pd.DataFrame(dict(first_iter=windows.first_iter.to_numpy()[:even].reshape(-1, 2).min(1),
                                 last_iter =windows.last_iter.to_numpy()[:even].reshape(-1, 2).max(1)))
        hist    = np.concatenate([both, hist[even:]])
        windows = pd.concat([wins, windows.iloc[even:]], ignore_index=True)
    return hist, windows

def _overlapping(mine, wins, out, i, j):
    "Where a window of `mine` overlaps another one that already has a value of the same layer.  # (window, layer)"
    has  = ~np.isnan(out).all(tuple(range(2, out.ndim)))[:, j]                          # (window of wins, layer)
    hit  = np.zeros((len(mine), len(j)), bool)
    f, l = wins.first_iter.to_numpy(), wins.last_iter.to_numpy()
    for k, (a, b) in enumerate(zip(mine.first_iter, mine.last_iter)):
        hit[k] = has[(f <= b) & (l >= a) & (l != b)].any(0)
    return hit

def _no_units(recs, n):
    width = {}
    for r in recs:
        for name, s in r._units.items(): width[name] = max(width.get(name, 0), s.shape[1])
    return {name: np.full((n, w), UNSEEN, np.int8) for name, w in width.items()}


def _path(path):
    if not isinstance(path, (str, PathLike)):
        raise TypeError(f"a record is saved to and loaded from a path, for example 'run.parquet'; "
                        f"got {type(path).__name__}")
    return path

def _num(x): return f'{x:.4g}'
