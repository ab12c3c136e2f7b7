"""The Record: what was measured while a network trained. Frozen, columnar, read without torch or fastai.

A row is one attempt at an optimizer step. `rec[probe, statistic]` is an array `(row, layer)`; a statistic that is
kept by windows (`hist`, `frac_dead`, `frac_dormant`) is `(window, layer, ...)`, its windows in `rec.windows[key]`.
"""
from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

FORMAT      = 1
MAX_WINDOWS = 1024                # a histogram key keeps 512 to 1024 windows however long the run is
ITER_COLS   = dict(iter='int64', fit='int64', epoch='int64', bs='int64', loss='float64', loss_constant='float64',
                   lr='float64', mom='float64', grad_norm='float64', clip_factor='float64', stepped='bool',
                   measured='bool', n_accum='int64', elapsed='float64')
RESERVED    = {*ITER_COLS, 'gain', 'row', 'probe', 'layer', 'unit_state'}   # not free as a statistic's name
DERIVED     = {('grad', 'rms'):        "norm / sqrt(numel)",
               ('grad', 'per_loss'):   "norm / |loss|",
               ('grad', 'elasticity'): "|g| |w| / |loss|",
               ('update', 'ratio'):    "|update| / |weight|"}
# state of one unit over one window, as stored; what the life table makes of a sequence of them is `Record.units`
ALIVE, DEAD, NONFINITE, UNSEEN = 0, 1, 2, -1


class Bins(NamedTuple):
    "The bins of every histogram of a record: bin `i` in 1..387 spans `edges[i-1]` to `edges[i]`; the others are named."
    edges: np.ndarray                 # (388,), ascending, symmetric about 0
    labels: dict                      # bin index -> name of a special bin


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
        windows = dict(windows or {})
        frozen  = {}
        for key, v in values.items():
            v = np.array(v, dtype=np.float32)
            n = len(windows[key]) if key in windows else len(iters)
            if v.shape[:2] != (n, len(layers[key[0]])):
                raise ValueError(f"{key} has shape {v.shape}; expected ({n}, {len(layers[key[0]])}, ...)")
            v.flags.writeable = False
            frozen[key] = v
        put(self, '_iters',   iters)
        put(self, '_values',  frozen)
        put(self, '_layers',  {p: pd.DataFrame(d).reset_index(drop=True) for p, d in layers.items()})
        put(self, '_windows', {k: pd.DataFrame(d).reset_index(drop=True) for k, d in windows.items()})
        put(self, '_units',   {k: np.asarray(v, np.int8) for k, v in (units or {}).items()})
        put(self, '_epochs',  pd.DataFrame() if epochs is None else pd.DataFrame(epochs).reset_index(drop=True))
        put(self, '_bins',    bins)
        put(self, '_meta',    dict(meta or {}))

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
    def meta(self):    return json.loads(json.dumps(self._meta))

    def keys(self):
        "The recorded (probe, statistic) pairs, without the derived ones."
        return list(self._values)

    def __len__(self): return len(self._iters)
    def __contains__(self, key):
        try: self[key]
        except KeyError: return False
        return True

    def __getitem__(self, key):
        "The array of `(probe, statistic)`: (row, layer), or (window, layer, ...) where `windows` has the key."
        if key in self._values: return self._values[key]
        if key in DERIVED:      return self._derive(key)
        raise KeyError(self._why_not(key))

    def _derive(self, key):
        def get(probe, stat):
            if (probe, stat) not in self._values:
                raise KeyError(f"{key[1]!r} of {key[0]!r} is {DERIVED[key]} and needs {stat!r} at {probe!r}, which was not "
                               f"recorded. Add it with LayerStatsCallback({probe}=[..., {stat!r}])")
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
            return np.where(np.isinf(v), np.nan, v).astype(np.float32) if key[1] == 'ratio' else v.astype(np.float32)

    def _aligned(self, v, probe, to):
        "The columns of `v` (of `probe`) in the order of the layers of `to`; NaN where `probe` has no such layer."
        have, want = self._layers[probe].layer, self._layers[to].layer
        if len(have) == len(want) and (have == want).all(): return v
        idx = pd.Index(have).get_indexer(want)
        return np.where(idx >= 0, v[:, idx], np.nan)

    def _why_not(self, key):
        if not (isinstance(key, tuple) and len(key) == 2):
            return f"a record is read as rec[probe, statistic], for example rec['grad', 'norm']; got {key!r}"
        probe, stat = key
        probes = list(dict.fromkeys(p for p, _ in self._values))
        if probe not in probes:
            return (f"{probe!r} was not recorded; recorded probes: {', '.join(probes) or 'none'}. "
                    f"Add it with LayerStatsCallback({probe}=[{stat!r}])")
        here = [s for p, s in self._values if p == probe]
        return (f"{stat!r} was not recorded at {probe!r}; recorded there: {', '.join(here)}. "
                f"Add it with LayerStatsCallback({probe}=[..., {stat!r}])")

    @property
    def units(self):
        """Life table, one line per window, layer and unit. `state` is alive, born dead (dead in every window so far),
        died (alive before, dead now), revived (dead before, alive now) or non-finite; `since` is the first iteration of
        the window at which the unit became what it is."""
        wins  = self._windows.get(('activation', 'frac_dead'))
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
        if not parts: return pd.DataFrame(dict(window=[], layer=[], unit=[], state=[], since=[]))
        return pd.concat(parts, ignore_index=True)

    def frame(self, *keys):
        """Tidy DataFrame, one line per row, probe and layer that was measured, one column per statistic; loss, lr and the
        other columns of `iters` repeated. A window's value stands on the window's last row. Without `keys`: everything but
        the histograms."""
        keys = list(keys) or [k for k in self._values if self._values[k].ndim == 2]
        for k in keys:
            if self[k].ndim != 2: raise ValueError(f"{k} is a histogram per window and has no place in a tidy frame; "
                                                   f"read it as rec{list(k)}, its windows as rec.windows[{k}]")
        lines = pd.DataFrame(self._lines(keys, hist=False))
        rows  = lines.pop('row').to_numpy()
        iters = self.iters.iloc[rows].reset_index(drop=True)
        if 'lr' in lines: iters['lr'] = np.where(lines.probe == 'update', lines.pop('lr'), iters.lr)     # the layer's own
        return pd.concat([iters, lines], axis=1)

    def _lines(self, keys, hist):
        "Columns row, probe, layer and a column per statistic, of every (row, layer) at which something was measured."
        pos   = pd.Index(self._iters.iter)
        stats = list(dict.fromkeys(s for _, s in keys))
        out   = {c: [] for c in ['row', 'probe', 'layer', *stats]}
        if hist: out['unit_state'] = []
        for probe in dict.fromkeys(p for p, _ in keys):
            grid = {}
            for k in keys:
                if k[0] != probe: continue
                v, names = self[k], self._layers[probe].layer.to_numpy()
                if k in self._windows:
                    full = np.full((len(pos), *v.shape[1:]), np.nan, np.float32)
                    full[pos.get_indexer(self._windows[k].last_iter)] = v
                    v = full
                grid[k[1]] = v
            seen = np.zeros((len(pos), len(self._layers[probe])), bool)
            for v in grid.values(): seen |= ~np.isnan(v if v.ndim == 2 else v[..., 0])
            r, c = np.nonzero(seen)
            out['row'].append(r)
            out['probe'].append(np.full(len(r), probe, object))
            out['layer'].append(names[c].astype(object))
            for s in stats:
                if s not in grid: col = None
                else:             col = grid[s][r, c]
                if hist and self._is_hist(s):
                    out[s].append([None] * len(r) if col is None else [None if np.isnan(h[0]) else h for h in col])
                else:
                    out[s].append(np.full(len(r), np.nan, np.float32) if col is None else col)
            if hist:
                states = [None] * len(r)
                if probe == 'activation' and self._units:
                    win = {row: w for w, row in
                           enumerate(pos.get_indexer(self._windows['activation', 'frac_dead'].last_iter))}
                    for i, (a, b) in enumerate(zip(r, names[c])):
                        if a in win and b in self._units: states[i] = self._units[b][win[a]]
                out['unit_state'].append(states)
        join = lambda v: v[0] if len(v) == 1 else sum(v, []) if isinstance(v[0], list) else np.concatenate(v)
        return {c: join(v) if v else [] for c, v in out.items()}

    def _is_hist(self, stat): return any(v.ndim == 3 for (_, s), v in self._values.items() if s == stat)

    def __eq__(self, other):
        if not isinstance(other, Record): return NotImplemented
        return (self._iters.equals(other._iters) and list(self._values) == list(other._values)
                and all(np.array_equal(v, other._values[k], equal_nan=True) for k, v in self._values.items())
                and self._layers.keys() == other._layers.keys()
                and all(d.astype(str).equals(other._layers[p].astype(str)) for p, d in self._layers.items())
                and self._windows.keys() == other._windows.keys()
                and all((d.to_numpy() == other._windows[k].to_numpy()).all() for k, d in self._windows.items())
                and self._units.keys() == other._units.keys()
                and all(np.array_equal(v, other._units[k]) for k, v in self._units.items()))
    __hash__ = None

    # --- joining -----------------------------------------------------------------------------------------------------
    def join(self, *others):
        """One record of all: the rows are united by `iter`, the layers by name. Where two records measured the same value
        the first one's stands. Neighbouring histogram windows are merged until no more than 1,024 are left."""
        recs  = [self, *others]
        iters = pd.concat([r._iters for r in recs]).groupby('iter', sort=True)
        first = iters.first()
        for c in ('measured', 'stepped'): first[c] = iters[c].any()
        first = first.reset_index()
        pos   = pd.Index(first.iter)
        layers, values, windows = {}, {}, {}
        for r in recs:
            for p, d in r._layers.items():
                layers[p] = d if p not in layers else pd.concat([layers[p], d]).drop_duplicates('layer')
        layers = {p: d.reset_index(drop=True) for p, d in layers.items()}
        col    = {p: pd.Index(d.layer) for p, d in layers.items()}
        for key in dict.fromkeys(k for r in recs for k in r._values):
            have = [r for r in recs if key in r._values]
            cols = [col[key[0]].get_indexer(r._layers[key[0]].layer) for r in have]
            if key in have[0]._windows:
                wins = pd.concat([r._windows[key] for r in have]).drop_duplicates().sort_values(['first_iter', 'last_iter'])
                widx = pd.MultiIndex.from_frame(wins)
                rows = [widx.get_indexer(pd.MultiIndex.from_frame(r._windows[key])) for r in have]
                windows[key] = wins.reset_index(drop=True)
            else:
                rows = [pos.get_indexer(r._iters.iter) for r in have]
            n   = len(windows[key]) if key in windows else len(pos)
            out = np.full((n, len(col[key[0]]), *have[0]._values[key].shape[2:]), np.nan, np.float32)
            for r, i, j in zip(have, rows, cols):
                here = out[np.ix_(i, j)]
                out[np.ix_(i, j)] = np.where(np.isnan(here), r._values[key], here)
            if out.ndim == 3: out, windows[key] = coarsen(out, windows[key])
            values[key] = out
        units = {}
        uwin  = windows.get(('activation', 'frac_dead'))
        for r in recs:
            for layer, s in r._units.items():
                if layer not in units: units[layer] = np.full((len(uwin), s.shape[1]), UNSEEN, np.int8)
                idx = pd.MultiIndex.from_frame(uwin).get_indexer(pd.MultiIndex.from_frame(
                    r._windows['activation', 'frac_dead']))
                here = units[layer][idx]
                units[layer][idx] = np.where(here == UNSEEN, s, here)
        epochs = [r._epochs for r in recs if len(r._epochs)]
        epochs = pd.concat(epochs).drop_duplicates(['fit', 'epoch']).sort_values(['fit', 'epoch']) if epochs else None
        bins   = next((r._bins for r in recs if r._bins is not None), None)
        meta   = dict(self._meta)
        for r in others:
            for k, v in r._meta.items():
                if isinstance(v, dict): meta[k] = {**v, **meta.get(k, {})}
                else:                   meta.setdefault(k, v)
        return Record(first, values, layers, windows, units, epochs, bins, meta)

    # --- files -------------------------------------------------------------------------------------------------------
    def save(self, path):
        """Write one self-describing Parquet file: a line per row, probe and layer, a column per statistic, `hist` and
        `unit_state` list columns, loss and lr repeated, the rest as JSON in the schema's metadata. Returns the path."""
        path  = Path(path)
        lines = self._lines(list(self._values), hist=True)
        n     = len(self._iters)
        cols  = {'probe': pa.array(['row'] * n + list(lines['probe']), pa.dictionary(pa.int32(), pa.string())),
                 'layer': pa.array([''] * n + list(lines['layer']), pa.dictionary(pa.int32(), pa.string()))}
        rows  = np.concatenate([np.arange(n), np.asarray(lines['row'], int)])
        base  = {c: pa.array(self._iters[c].to_numpy()[rows]) for c in ITER_COLS}
        stats = {}
        for s, v in lines.items():
            if s in ('row', 'probe', 'layer'): continue
            if s == 'unit_state': stats[s] = pa.array([None] * n + v, pa.list_(pa.int8()))
            elif self._is_hist(s): stats[s] = pa.array([None] * n + v, pa.list_(pa.float32()))
            elif s == 'lr':                       # of a layer on the lines of `update`, of the row elsewhere
                own       = np.concatenate([np.full(n, 'row'), lines['probe']]) == 'update'
                stats[s]  = pa.array(np.where(own, np.concatenate([np.zeros(n), v]), self._iters.lr.to_numpy()[rows]))
            else: stats[s] = pa.array(np.concatenate([np.full(n, np.nan, np.float32), v]))
        head  = dict(format=FORMAT, keys=[list(k) for k in self._values], meta=self._meta,
                     layers={p: d.to_dict('list') for p, d in self._layers.items()},
                     windows=[[*k, d.to_dict('list')] for k, d in self._windows.items()],
                     hists=[s for s in dict.fromkeys(s for _, s in self._values) if self._is_hist(s)],
                     units=list(self._units), epochs=self._epochs.to_dict('list'),
                     bins=None if self._bins is None else dict(edges=self._bins.edges.tolist(), labels=self._bins.labels))
        table = pa.table({**base, **cols, **stats})
        table = table.replace_schema_metadata({b'fastgradstats': json.dumps(_plain(head), allow_nan=False).encode()})
        part  = path.with_name(path.name + '.part')
        try:
            pq.write_table(table, part, compression='zstd')
            part.replace(path)
        except OSError as e:
            part.unlink(missing_ok=True)
            raise OSError(f"cannot write the record to {path}: {e.strerror or e}. Choose a folder that exists and may be "
                          f"written") from e
        return path

    @classmethod
    def load(cls, path):
        "Read the record that `save` wrote."
        path = Path(path)
        if not path.exists(): raise FileNotFoundError(f"there is no record at {path}; give the path of a file that "
                                                      f"Record.save wrote")
        if path.is_dir(): raise ValueError(f"{path} is a folder; give one of the record files in it")
        try: table = pq.read_table(path)
        except (pa.ArrowInvalid, pa.ArrowException, OSError) as e:
            raise ValueError(f"{path} cannot be read as a record: it is damaged or not a Parquet file "
                             f"({str(e).splitlines()[0]}). Record it again or restore it from a copy") from e
        head = (table.schema.metadata or {}).get(b'fastgradstats')
        if head is None: raise ValueError(f"{path} is a Parquet file, but not a record: Record.save did not write it")
        head = json.loads(head)
        if head['format'] > FORMAT: raise ValueError(f"{path} has format {head['format']}; this version reads up to "
                                                     f"{FORMAT}. Upgrade with pip install -U fastgradstats")
        layers  = {p: pd.DataFrame(d) for p, d in head['layers'].items()}
        windows = {(p, s): pd.DataFrame(d) for p, s, d in head['windows']}
        bins    = head['bins'] and Bins(np.array(head['bins']['edges']),
                                        {int(k): v for k, v in head['bins']['labels'].items()})
        probe   = np.asarray(table['probe'].combine_chunks().dictionary_decode().to_pylist(), object)
        layer   = np.asarray(table['layer'].combine_chunks().dictionary_decode().to_pylist(), object)
        own     = probe == 'row'
        iters   = pd.DataFrame({c: table[c].to_numpy()[own] for c in ITER_COLS})
        row     = pd.Index(iters.iter).get_indexer(table['iter'].to_numpy())
        values, units = {}, {}
        for p, s in head['keys']:
            here = np.nonzero(probe == p)[0]
            cols = pd.Index(layers[p].layer).get_indexer(layer[here])
            rows, n = row[here], len(iters)
            if (p, s) in windows:
                wins = pd.Index(windows[p, s].last_iter)
                n    = len(wins)
                rows = wins.get_indexer(iters.iter.to_numpy()[rows])
            if s in head['hists']:
                col  = table[s].take(here).to_pylist()
                keep = [i for i, v in enumerate(col) if v is not None]
                out  = np.full((n, len(layers[p]), len(col[keep[0]]) if keep else len(bins.edges) + 2), np.nan, np.float32)
                for i in keep: out[rows[i], cols[i]] = col[i]
            else:
                out  = np.full((n, len(layers[p])), np.nan, np.float32)
                keep = rows >= 0
                out[rows[keep], cols[keep]] = table[s].to_numpy()[here][keep]
            values[p, s] = out
        if head['units']:
            wins = pd.Index(windows['activation', 'frac_dead'].last_iter)
            at   = {name: [] for name in head['units']}
            for i, v in enumerate(table['unit_state'].to_pylist()):
                if v is not None: at[layer[i]].append((wins.get_loc(iters.iter[row[i]]), v))
            for name, found in at.items():
                units[name] = np.full((len(wins), max(len(v) for _, v in found)), UNSEEN, np.int8)
                for w, v in found: units[name][w, :len(v)] = v
        return cls(iters, values, layers, windows, units, pd.DataFrame(head['epochs']), bins, head['meta'])

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
        if len(it): lines.append(f"  loss {_num(it.loss.iloc[0])} at iteration {it.iter.iloc[0]}, {_num(it.loss.iloc[-1])} at "
                                 f"iteration {it.iter.iloc[-1]}")
        why = {}
        for name, reason in meta.get('not_hooked', {}).items(): why.setdefault(reason, []).append(name)
        for reason, names in why.items():
            lines.append(f"  not observed: {', '.join(names[:6])}{', ...' * (len(names) > 6)} ({reason})")
        cost = meta.get('cost')
        if cost and cost.get('percent') is not None:
            lines.append(f"  cost: {cost['percent']:.1f} % of the training time ({cost['seconds']:.2f} s of {cost['of']:.2f} s)")
        return '\n'.join(lines)


def coarsen(hist, windows, most=MAX_WINDOWS):
    "Merge neighbouring histogram windows pairwise until `most` or fewer are left. hist: (window, layer, bin)."
    while len(hist) > most:
        odd  = len(hist) % 2
        pair = hist[:len(hist) - odd].reshape(-1, 2, *hist.shape[1:])
        both = np.where(np.isnan(pair).all(1), np.nan, np.nansum(pair, axis=1, dtype=np.float64)).astype(np.float32)
        wins = pd.DataFrame(dict(first_iter=windows.first_iter.to_numpy()[0:len(hist) - odd:2],
                                 last_iter =windows.last_iter.to_numpy()[1:len(hist) - odd:2]))
        hist    = np.concatenate([both, hist[len(hist) - odd:]])
        windows = pd.concat([wins, windows.iloc[len(windows) - odd:]], ignore_index=True)
    return hist, windows


def _num(x): return f'{x:.4g}'

def _plain(o):
    "`o` as strict JSON: NumPy scalars to Python's, non-finite floats to null."
    if isinstance(o, dict):          return {str(k): _plain(v) for k, v in o.items()}
    if isinstance(o, (list, tuple)): return [_plain(v) for v in o]
    if isinstance(o, np.ndarray):    return _plain(o.tolist())
    if isinstance(o, np.generic):    return _plain(o.item())
    if isinstance(o, float) and not np.isfinite(o): return None
    return o
