"""The file of a record: one Parquet file that pandas, DuckDB, Polars and Spark read as it stands.

A line per row, probe and layer that was measured, a column per statistic, histograms and unit states as list columns,
loss and lr repeated; and a line with probe 'row' for every row. What was not measured is NULL, a NaN that was measured
is NaN. The rest (layers, windows, epochs, bins, meta) is JSON in the metadata of the schema.
"""
from __future__ import annotations

import json
import os
from pathlib import Path
from threading import get_ident
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

FORMAT     = 1
OUTPUTS    = ('activation', 'grad_output')                    # read at a site: a module's output
PARAMETERS = ('grad', 'grad_used', 'weight', 'update')        # read at a parameter
ENDS       = ('input', 'output')                              # read at the model
PROBES     = OUTPUTS + PARAMETERS + ENDS
ITER_COLS  = dict(iter='int64', fit='int64', epoch='int64', bs='int64', loss='float64', loss_constant='float64',
                  lr='float64', mom='float64', grad_norm='float64', clip_factor='float64', stepped='bool',
                  measured='bool', n_accum='int64', elapsed='float64')
DEAD_UNITS = ('activation', 'frac_dead')              # the key whose windows are those of the units
# state of one unit over one window, as stored; what the life table makes of a sequence of them is `Record.units`
ALIVE, DEAD, NONFINITE, UNSEEN = 0, 1, 2, -1


class Bins(NamedTuple):
    "The bins of every histogram of a record: bin `i` in 1..387 spans `edges[i-1]` to `edges[i]`; the others are named."
    edges: np.ndarray                 # (388,), ascending, symmetric about 0
    labels: dict                      # bin index -> name of a special bin


def write(rec, path):
    "Write the record whole, beside what may be there, then rename: a file is never half a record. Returns the path."
    path   = Path(path)
    table  = _table(rec)
    part   = path.with_name(f'{path.name}.{os.getpid()}-{get_ident()}.part')         # others may write the same record
    try:
        pq.write_table(table, part, compression='zstd', write_page_checksum=True)
        part.replace(path)
    except OSError as e:
        part.unlink(missing_ok=True)
        why = os.strerror(e.errno) if e.errno else e
        raise OSError(f"cannot write the record to {path}: {why}. Choose a folder that exists and may be "
                      f"written") from e
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return path

def _table(rec):
    "The lines of the file, as an Arrow table."
    n, parts = len(rec._iters), list(rec._parts(list(rec._values)))
    rows     = np.concatenate([np.arange(n), *(r for _, r, _, _ in parts)])
    starts   = n + np.cumsum([0, *(len(r) for _, r, _, _ in parts)])
    place    = {p: slice(a, a + len(r)) for a, (p, r, _, _) in zip(starts, parts)}
    names    = list(dict.fromkeys(['row', *rec._layers]))
    probe    = np.zeros(len(rows), np.int32)
    layer    = np.zeros(len(rows), np.int32)
    labels   = {'': 0}
    for p, r, c, _ in parts:
        probe[place[p]] = names.index(p)
        code = np.array([labels.setdefault(name, len(labels)) for name in rec._layers[p].layer], np.int32)
        layer[place[p]] = code[c]
    base = {}
    for c in ITER_COLS:
        v = rec._iters[c].to_numpy()[rows]
        if c == 'lr' and ('update', 'lr') in rec._values:         # the layer's own on the lines of `update`
            v[place['update']] = next(out['lr'] for p, _, _, out in parts if p == 'update')
        gone = np.isnan(v) if c in ('loss_constant', 'lr', 'mom', 'clip_factor') else \
               np.isnan(v) & ~rec._iters.measured.to_numpy()[rows] if c == 'grad_norm' else None
        base[c] = pa.array(v, mask=gone)
    base['probe'] = pa.DictionaryArray.from_arrays(probe, pa.array(names, pa.string()))
    base['layer'] = pa.DictionaryArray.from_arrays(layer, pa.array(list(labels), pa.string()))
    for s in dict.fromkeys(s for _, s in rec._values):
        if s == 'lr': continue
        found = {p: out[s] for p, _, _, out in parts if s in out}
        if rec._is_hist(s):
            has = np.zeros(len(rows), bool)
            for p, (ok, _) in found.items(): has[place[p]] = ok
            base[s] = _lists(has, np.concatenate([v for _, v in found.values()]), pa.float32())
        else:
            v, gone = np.full(len(rows), np.nan, np.float32), np.ones(len(rows), bool)
            for p, col in found.items(): v[place[p]] = col
            for p in found:
                at       = place[p]                                    # between the ends of windows: NULL
                gone[at] = np.isnan(v[at]) if (p, s) in rec._windows else False
            base[s] = pa.array(v, mask=gone)
    if rec._units:
        state = [None] * len(rows)
        p, r, c, _ = next(q for q in parts if q[0] == 'activation')
        ends = pd.Index(rec._windows[DEAD_UNITS].last_iter).get_indexer(rec._iters.iter)[r]
        name = rec._layers[p].layer.to_numpy()
        for i in np.nonzero(ends >= 0)[0]:
            if name[c[i]] in rec._units: state[place[p].start + i] = rec._units[name[c[i]]][ends[i]]
        base['unit_state'] = pa.array(state, pa.list_(pa.int8()))
    head  = dict(format=FORMAT, keys=[list(k) for k in rec._values], meta=rec._meta,
                 layers={p: _columns(d) for p, d in rec._layers.items()},
                 windows=[[*k, _columns(d)] for k, d in rec._windows.items()],
                 hists={s: v.shape[2] for (_, s), v in rec._values.items() if v.ndim == 3},
                 units={k: v.shape[1] for k, v in rec._units.items()}, epochs=_columns(rec._epochs),
                 bins=None if rec._bins is None else dict(edges=rec._bins.edges.tolist(), labels=rec._bins.labels))
    return pa.table(base).replace_schema_metadata(
        {b'fastgradstats': json.dumps(plain(head), allow_nan=False).encode()})


def read(path, make):
    "What `make` makes of the arguments of the Record that `write` wrote."
    path = Path(path)
    if not path.exists(): raise FileNotFoundError(f"there is no record at {path}; give the path of a file that "
                                                  f"Record.save wrote")
    if path.is_dir(): raise ValueError(f"{path} is a folder; give one of the record files in it")
    broken = (f"{path} cannot be read as a record: it is damaged or not a Parquet file ({{}}). Record it again or "
              f"restore it from a copy")
    try: table = pq.read_table(path, page_checksum_verification=True)
    except PermissionError as e:
        raise PermissionError(f"{path} may not be read; change its permissions or give another") from e
    except (pa.ArrowException, OSError) as e:
        raise ValueError(broken.format((str(e).splitlines() or ['unreadable'])[0])) from e
    head = (table.schema.metadata or {}).get(b'fastgradstats')
    if head is None: raise ValueError(f"{path} is a Parquet file, but not a record: Record.save did not write it")
    try: head = dict(json.loads(head))
    except (ValueError, TypeError) as e: raise ValueError(broken.format('its header is no JSON')) from e
    if head.get('format', 0) > FORMAT: raise ValueError(f"{path} has format {head['format']}; this version reads up to "
                                                 f"{FORMAT}. Upgrade with pip install -U fastgradstats")
    try: return make(*_arguments(table, head))
    except (KeyError, IndexError, TypeError, ValueError, pa.ArrowException) as e:
        raise ValueError(broken.format(f"its header and its columns disagree: {' '.join(str(e).split())}")) from e

def _arguments(table, head):
    layers  = {p: _frame(d) for p, d in head['layers'].items()}
    windows = {(p, s): _frame(d) for p, s, d in head['windows']}
    bins    = head['bins'] and Bins(np.array(head['bins']['edges']),
                                    {int(k): v for k, v in head['bins']['labels'].items()})
    probe   = table['probe'].cast(pa.string()).to_numpy()
    layer   = table['layer'].cast(pa.string()).to_numpy()
    own     = probe == 'row'
    iters   = pd.DataFrame({c: table[c].to_numpy()[own] for c in ITER_COLS})
    pos     = pd.Index(iters.iter)
    places  = {}
    for p in layers:
        here      = np.nonzero(probe == p)[0]
        places[p] = here, table['iter'].to_numpy()[here], pd.Index(layers[p].layer).get_indexer(layer[here])
    hists   = {s: _unlisted(table[s], n) for s, n in head['hists'].items()}
    values, units = {}, {}
    for p, s in head['keys']:
        here, its, cols = places[p]
        ends = pd.Index(windows[p, s].last_iter) if (p, s) in windows else pos
        rows = ends.get_indexer(its)
        keep = rows >= 0
        if s in hists:
            at, counts = hists[s]
            at   = at[here]
            keep = at >= 0
            v    = np.full((len(ends), len(layers[p]), counts.shape[1]), np.nan, np.float32)
            v[rows[keep], cols[keep]] = counts[at[keep]]
        else:
            v = np.full((len(ends), len(layers[p])), np.nan, np.float32)
            v[rows[keep], cols[keep]] = table[s].to_numpy()[here][keep]
        values[p, s] = v
    if head['units']:
        ends  = pd.Index(windows[DEAD_UNITS].last_iter)
        units = {name: np.full((len(ends), n), UNSEEN, np.int8) for name, n in head['units'].items()}
        here  = places['activation'][0]
        for i, w in zip(here, ends.get_indexer(table['iter'].to_numpy()[here])):
            if w >= 0 and layer[i] in units and table['unit_state'][int(i)].is_valid:
                units[layer[i]][w] = table['unit_state'][int(i)].values.to_numpy()
    return iters, values, layers, windows, units, _frame(head['epochs']), bins, head['meta']


def _lists(has, rows, dtype):
    "A list column: the next of `rows` where `has`, else NULL."
    step    = np.where(has, rows.shape[1], 0)
    offsets = np.concatenate([[0], np.cumsum(step)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(rows.ravel(), dtype), mask=pa.array(~has))

def _unlisted(col, n):
    "Of a list column: the number of each line's list, or -1, and the lists.  # (line,), (list, n)"
    has  = col.is_valid().to_numpy()
    flat = [c.flatten().to_numpy(zero_copy_only=False) for c in col.chunks]
    return np.where(has, np.cumsum(has) - 1, -1), np.concatenate([np.zeros(0, np.float32), *flat]).reshape(-1, n)

def _columns(d):
    "A DataFrame as JSON: columns, non-finite numbers by their names."
    name = lambda v: repr(float(v)) if isinstance(v, (float, np.floating)) and not np.isfinite(v) else v
    return {str(c): [name(v) for v in d[c].tolist()] for c in d.columns}

def _frame(d):
    value = lambda v: float(v) if v in ('nan', 'inf', '-inf') else v
    return pd.DataFrame({c: [value(v) for v in col] for c, col in d.items()})

def plain(o):
    "`o` as strict JSON: NumPy scalars to Python's, non-finite floats to null."
    if isinstance(o, dict):          return {str(k): plain(v) for k, v in o.items()}
    if isinstance(o, (list, tuple)): return [plain(v) for v in o]
    if isinstance(o, np.ndarray):    return plain(o.tolist())
    if isinstance(o, np.generic):    return plain(o.item())
    if isinstance(o, float) and not np.isfinite(o): return None
    return o
