"""The long format: a line per row, probe and layer at which anything was measured, a column per statistic.

Read by people as `Record.frame`, written to disk by parquet.py; a window's value stands on its last row.
"""
from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd


class Lines(NamedTuple):
    "All arrays but those of the columns are of one number a line."
    row:     np.ndarray               # number of the record's row
    probe:   np.ndarray               # code: a place in `probes`
    layer:   np.ndarray               # code: a place in `layers`
    probes:  list                     # the first is that of lines of no probe
    layers:  list                     # the first is '', of no layer
    columns: dict                     # statistic -> which lines have it (line,) bool, their values (has.sum(), ...)

    def column(self, stat):
        "A scalar statistic, NaN where a line has none.  # (line,)"
        has, values = self.columns[stat]
        out      = np.full(len(has), np.nan, np.float32)
        out[has] = values
        return out


def lines(rec, keys):
    "The Lines of the (probe, statistic) pairs `keys`, probe by probe, row by row."
    probes = list(dict.fromkeys(['row', *rec._layers]))
    layers = {'': 0}
    parts  = []
    for probe in dict.fromkeys(p for p, _ in keys):
        row, col, found = _measured(rec, probe, [k for k in keys if k[0] == probe])
        code = np.array([layers.setdefault(name, len(layers)) for name in rec._layers[probe].layer], np.int32)
        parts.append((np.full(len(row), probes.index(probe), np.int32), row, code[col], found))
    join    = lambda arrays, dtype: np.concatenate([np.zeros(0, dtype), *arrays])
    columns = {}
    for s in dict.fromkeys(s for _, s in keys):
        has        = join([f[s][0] if s in f else np.zeros(len(r), bool) for _, r, _, f in parts], bool)
        columns[s] = has, np.concatenate([f[s][1] for *_, f in parts if s in f])
    return Lines(join([r for _, r, _, _ in parts], int), join([p for p, *_ in parts], np.int32),
                 join([c for _, _, c, _ in parts], np.int32), probes, list(layers), columns)

def _measured(rec, probe, keys):
    "(row, column of the layer) at which any of `keys` was measured; {statistic: (which of them have it, its values)}."
    pos  = pd.Index(rec._iters.iter)
    seen = np.zeros((len(pos), len(rec._layers[probe])), bool)
    grid = {}
    for k in keys:
        v   = rec[k]
        at  = np.arange(len(pos))                                      # row -> row of v, or -1
        if k in rec._windows:
            ends     = pos.get_indexer(rec._windows[k].last_iter)
            at       = np.full(len(pos), -1)
            at[ends] = np.arange(len(ends))
        has = ~np.isnan(v if v.ndim == 2 else v[..., 0])
        seen[at >= 0] |= has[at[at >= 0]]
        grid[k[1]] = v, has, at, k in rec._windows
    row, col = np.nonzero(seen)
    out = {}
    for s, (v, has, at, windowed) in grid.items():
        i  = at[row]
        ok = i >= 0
        if windowed or v.ndim > 2: ok[ok] = has[i[ok], col[ok]]        # else a NaN beside what was measured is a value
        out[s] = ok, v[i[ok], col[ok]]
    return row, col, out
