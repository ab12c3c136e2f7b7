"Several records as one: rows united by iteration, layers by name, windows by their last iteration."
from __future__ import annotations

import numpy as np
import pandas as pd

from .schema import DEAD_UNITS, UNSEEN

MAX_WINDOWS = 1024                # a histogram key keeps 512 to 1024 windows however long the run is


def joined(recs):
    "The arguments of the Record that is all of `recs`; where two measured the same value the first one's stands."
    iters  = _iters(recs)
    layers = {}
    for r in recs:
        for p, d in r._layers.items():
            layers[p] = d if p not in layers else pd.concat([layers[p], d]).drop_duplicates('layer')
    layers = {p: d.reset_index(drop=True) for p, d in layers.items()}
    values, windows, units = {}, {}, {}
    for key in dict.fromkeys(k for r in recs for k in r._values):
        have = [r for r in recs if key in r._values]
        if key in have[0]._windows:
            wins = pd.concat([r._windows[key] for r in have]).groupby('last_iter').first_iter.min().reset_index()
            windows[key] = wins[['first_iter', 'last_iter']]
        out = _values(key, have, pd.Index(iters.iter), pd.Index(layers[key[0]].layer), windows.get(key), units)
        if out.ndim == 3: out, windows[key] = coarsen(out, windows[key])
        values[key] = out
    epochs = [r._epochs for r in recs if len(r._epochs)]
    epochs = pd.concat(epochs).drop_duplicates(['fit', 'epoch']).sort_values(['fit', 'epoch']) if epochs else None
    bins   = next((r._bins for r in recs if r._bins is not None), None)
    return iters, values, layers, windows, units, epochs, bins, _meta(recs)

def _iters(recs):
    by  = pd.concat([r._iters for r in recs]).groupby('iter', sort=True)
    out = by.first()
    for c in ('measured', 'stepped'): out[c] = by[c].any()
    return out.reset_index()

def _values(key, recs, iters, layers, wins, units):
    "The array of `key`, of records that all have it; with DEAD_UNITS come the states of the units, put into `units`."
    ends = iters if wins is None else pd.Index(wins.last_iter)
    out  = np.full((len(ends), len(layers), *recs[0]._values[key].shape[2:]), np.nan, np.float32)
    if key == DEAD_UNITS: units |= _no_units(recs, len(ends))
    for n, r in enumerate(recs):
        v    = r._values[key]
        i    = ends.get_indexer(r._iters.iter if wins is None else r._windows[key].last_iter)
        j    = layers.get_indexer(r._layers[key[0]].layer)
        here = out[np.ix_(i, j)]
        free = np.isnan(here).all(tuple(range(2, v.ndim)))                           # (row or window, layer)
        if n and wins is not None: free &= ~_overlapping(r._windows[key], wins, out, i, j)
        out[np.ix_(i, j)] = np.where(free.reshape(*free.shape, *[1] * (v.ndim - 2)), v, here)
        if key != DEAD_UNITS: continue
        names = r._layers['activation'].layer
        for name, s in r._units.items():
            ok = free[:, names[names == name].index[0]]
            units[name][i[ok], :s.shape[1]] = s[ok]
    return out

def _meta(recs):
    "The first record's, filled up by the others'; dicts one level deep."
    meta = dict(recs[0]._meta)
    for r in recs[1:]:
        for k, v in r._meta.items():
            if isinstance(v, dict) and isinstance(meta.get(k, {}), dict): meta[k] = {**v, **meta.get(k, {})}
            else:                                                         meta.setdefault(k, v)
    return meta

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
