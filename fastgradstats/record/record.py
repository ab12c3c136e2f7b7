"""The Record: what was measured while a network trained. Frozen, columnar, read without torch or fastai.

A row is one attempt at an optimizer step. `rec[probe, statistic]` is an array `(row, layer)`; a statistic that is
kept by windows (`hist`, `frac_dead`, `frac_dormant`) is `(window, layer, ...)`, its windows in `rec.windows[key]`.
"""
from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from os import PathLike

import numpy as np
import pandas as pd

from .._text import digits, plain
from . import parquet
from .bins import Bins
from .join import joined
from .long import lines
from .schema import (ADDED_COLS, ALIVE, DEAD, DEAD_UNITS, DERIVED, ITER_COLS, LAYER_LR, NONFINITE, NOT_ASKED, PROBES,
                     RESERVED, UNSEEN)


class Record:
    """What was measured. `rec['grad', 'norm']` is an array (row, layer); NaN means not measured.

    Example:
        rec = learn.layer_stats                           # or Record.load('run.parquet')
        rec['grad', 'norm'][-1]                           # of every parameter, at the last iteration
        rec.frame(('grad', 'norm'), ('update', 'ratio'))  # tidy, a line per row, probe and layer
    """
    __slots__ = ('_iters', '_epochs', '_layers', '_values', '_windows', '_units', '_bins', '_meta', '__weakref__')

    def __init__(self,
        iters: pd.DataFrame,          # DataFrame, one line a row, with the columns of ITER_COLS
        values: Mapping,              # {(probe, statistic): array (row, layer) or (window, layer, ...)}
        layers: Mapping,              # {probe: DataFrame with at least `layer`}, in order of first use
        windows: Mapping | None = None,  # {(probe, statistic): DataFrame first_iter, last_iter} of keys kept by windows
        units: Mapping | None = None,     # {layer: int8 array (window, unit)} of ALIVE, DEAD, NONFINITE, UNSEEN
        epochs: pd.DataFrame | None = None,   # DataFrame: validation loss and metrics, one line an epoch
        bins: Bins | None = None,     # Bins of the histograms
        meta: dict | None = None,     # versions, configuration, model, cost, what was not hooked and why
    ):
        put     = object.__setattr__
        iters   = pd.DataFrame(iters)
        iters   = iters.assign(**{c: np.nan for c in ADDED_COLS if c not in iters})
        missing = [c for c in ITER_COLS if c not in iters]
        if missing: raise ValueError(f"a record's iters need the columns {', '.join(missing)}")
        windows = {k: pd.DataFrame(d)[['first_iter', 'last_iter']].astype('int64').reset_index(drop=True)
                   for k, d in (windows or {}).items()}
        put(self, '_iters',   iters[list(ITER_COLS)].astype(ITER_COLS).reset_index(drop=True))
        put(self, '_layers',  {p: pd.DataFrame(d).reset_index(drop=True) for p, d in layers.items()})
        put(self, '_windows', windows)
        put(self, '_values',  {k: self._checked(k, v) for k, v in values.items()})
        put(self, '_units',   {k: self._checked_units(k, v) for k, v in (units or {}).items()})
        put(self, '_epochs',  pd.DataFrame() if epochs is None else pd.DataFrame(epochs).reset_index(drop=True))
        put(self, '_bins',    bins)
        put(self, '_meta',    plain(meta or {}))

    def _checked(self, key, v):
        "A read-only copy of the array `v` of `key`, which fits the rows (or windows) and layers."
        if key[0] not in self._layers:
            raise ValueError(f"{key} is of the probe {key[0]!r}, which has no table of layers; there are "
                             f"{', '.join(self._layers) or 'none'}")
        if key[1] in RESERVED and key != LAYER_LR:
            raise ValueError(f"a statistic cannot be called {key[1]!r}: a column of the record is. Give it another "
                             f"name")
        wins = self._windows.get(key)
        if wins is not None and not wins.last_iter.isin(self._iters.iter).all():
            raise ValueError(f"a window of {key} ends at an iteration that has no row")
        v    = np.array(v, dtype=np.float32)
        want = len(self._iters if wins is None else wins), len(self._layers[key[0]])
        if v.shape[:2] != want: raise ValueError(f"{key} has shape {v.shape}; expected ({want[0]}, {want[1]}, ...)")
        v.flags.writeable = False
        return v

    def _checked_units(self, layer, v):
        v = np.array(v, np.int8)
        if v.ndim != 2 or len(v) != len(self._windows.get(DEAD_UNITS, ())):
            raise ValueError(f"the units of {layer} have shape {v.shape}; expected (window, unit), the windows those "
                             f"of {DEAD_UNITS}")
        v.flags.writeable = False
        return v

    def __setattr__(self, name, value): raise AttributeError(f"a Record is frozen: {name} cannot be set")
    def __reduce__(self):
        return Record, (self._iters, self._values, self._layers, self._windows, self._units, self._epochs, self._bins,
                        self._meta)

    # --- what a reader asks for -------------------------------------------------------------------------------------
    @property
    def iters(self) -> pd.DataFrame:
        "DataFrame, one line a row: iter, fit, epoch, bs, loss, loss_constant, gain, lr, ... (see ITER_COLS)."
        d = self._iters.copy()
        d.insert(d.columns.get_loc('loss_constant') + 1, 'gain', d.loss_constant - d.loss)
        return d
    @property
    def epochs(self) -> pd.DataFrame:
        "Validation loss and metrics, one line an epoch."
        return self._epochs.copy()
    @property
    def layers(self) -> dict[str, pd.DataFrame]:
        "Probe -> DataFrame layer, module, type, shape, numel, in order of first use."
        return {p: d.copy() for p, d in self._layers.items()}
    @property
    def windows(self) -> dict[tuple, pd.DataFrame]:
        "(probe, statistic) -> DataFrame first_iter, last_iter, of what is kept by windows."
        return {k: d.copy() for k, d in self._windows.items()}
    @property
    def bins(self) -> Bins | None:
        "Edges and names of the bins of every histogram."
        return self._bins
    @property
    def meta(self) -> dict:
        "Versions, configuration, model, measured cost, what was not observed and why."
        return plain(self._meta)

    def keys(self) -> list[tuple[str, str]]:
        "The recorded (probe, statistic) pairs, without the derived ones."
        return list(self._values)

    def __len__(self): return len(self._iters)
    def __contains__(self, key):
        try: self[key]
        except (KeyError, TypeError): return False
        return True

    def __getitem__(self, key: tuple[str, str]) -> np.ndarray:
        """The array of `(probe, statistic)`: (row, layer), or (window, layer, ...) where `windows` has the key.

        Raises:
            KeyError: it was not recorded; says what was, and how to record it.
        """
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
        words, needs, of = DERIVED[key]
        for probe, stat in needs:
            if (probe, stat) not in self._values:
                raise KeyError(f"{key[1]!r} of {key[0]!r} is {words} and needs {stat!r} at {probe!r}, which was not "
                               f"recorded. Add it with {to_record(self, {probe: [stat]})}")
        given = [self._aligned(self._values[k], k[0], key[0]) for k in needs]
        with np.errstate(divide='ignore', invalid='ignore', over='ignore'):
            return of(self._iters, self._layers[key[0]], *given).astype(np.float32)

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
    def units(self) -> pd.DataFrame:
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

    def frame(self, *keys: tuple | str) -> pd.DataFrame:
        """Tidy DataFrame, one line per row, probe and layer that was measured, one column per statistic; loss, lr and
        the other columns of `iters` repeated. A window's value stands on the window's last row. `keys`: (probe,
        statistic) pairs, derived ones too, or a probe's name for all of its; without them all but the histograms.

        Raises:
            KeyError: a key was not recorded.
            ValueError: a key is a histogram.

        Example:
            rec.frame('grad', ('update', 'ratio'))            # all statistics of the gradients, and the ratio
        """
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
        long  = lines(self, want)
        iters = self.iters.iloc[long.row].reset_index(drop=True)
        whole = lambda s: all((p, s) in want for p, _ in want)          # else double: some lines have none
        cols  = {s: long.column(s).astype(np.float32 if whole(s) else float) for s in long.columns}
        own   = long.columns.get(LAYER_LR[1])                          # on lines of `update` the layer's own
        if own: iters.loc[own[0], 'lr'] = cols.pop(LAYER_LR[1])[own[0]]
        name  = lambda codes, names: pd.Series(np.array(names, object)[codes], dtype='str')
        return pd.concat([iters, pd.DataFrame(dict(probe=name(long.probe, long.probes),
                                                   layer=name(long.layer, long.layers), **cols))], axis=1)

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
    def join(self, *others: Record) -> Record:
        """One record of all: the rows are united by `iter`, the layers by name, the windows by their last iteration.
        Where two records measured the same value the first one's stands, as it does where windows of a layer overlap.
        Neighbouring histogram windows are merged until no more than 1,024 are left.

        Raises:
            TypeError: one of `others` is no Record.

        Example:
            Record.load('monday.parquet').join(Record.load('tuesday.parquet'))
        """
        recs  = [self, *others]
        wrong = [type(r).__name__ for r in recs if not isinstance(r, Record)]
        if wrong: raise TypeError(f"join takes Records; got {wrong[0]}. Read a file with Record.load(path)")
        return Record(*joined(recs))

    # --- files -------------------------------------------------------------------------------------------------------
    def save(self, path: str | PathLike):
        """Write one self-describing Parquet file, which pandas and DuckDB read too (see parquet.py). Returns the path.

        Raises:
            OSError: the file cannot be written.
            TypeError: `path` is no path.

        Example:
            rec.save('run.parquet')
        """
        return parquet.write(self, _path(path))

    @classmethod
    def load(cls, path: str | PathLike) -> Record:
        """Read the record that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, no record, or of a newer version.

        Example:
            Record.load('run.parquet')['grad', 'norm']
        """
        return parquet.read(_path(path), cls)

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
        elif len(it): lines.append(f"  loss {digits(it.loss.iloc[0], 4)} at iteration {it.iter.iloc[0]}, "
                                   f"{digits(it.loss.iloc[-1], 4)} at iteration {it.iter.iloc[-1]}")
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

def _path(path):
    if not isinstance(path, (str, PathLike)):
        raise TypeError(f"a record is saved to and loaded from a path, for example 'run.parquet'; "
                        f"got {type(path).__name__}")
    return path
