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

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from .._text import plain
from .bins import Bins
from .long import lines
from .schema import DEAD_UNITS, ITER_COLS, LAYER_LR, UNSEEN

FORMAT = 1


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
    "The lines of the file, a 'row' line for every row first, as an Arrow table."
    n    = len(rec._iters)
    long = lines(rec, list(rec._values))
    rows = np.concatenate([np.arange(n), long.row])
    lead = lambda v, dtype: np.concatenate([np.zeros(n, dtype), v])
    base = {c: _iter_column(rec, c, rows, long) for c in ITER_COLS}
    base['probe'] = pa.DictionaryArray.from_arrays(lead(long.probe, np.int32), pa.array(long.probes, pa.string()))
    base['layer'] = pa.DictionaryArray.from_arrays(lead(long.layer, np.int32), pa.array(long.layers, pa.string()))
    for s, (has, values) in long.columns.items():
        if s == LAYER_LR[1]: continue
        base[s] = (pa.array(lead(long.column(s), np.float32), mask=~lead(has, bool)) if values.ndim == 1 else
                   _lists(lead(has, bool), values, pa.float32()))
    if rec._units: base['unit_state'] = pa.array([None] * n + _states(rec, long), pa.list_(pa.int8()))
    return pa.table(base).replace_schema_metadata(
        {b'fastgradstats': json.dumps(plain(_head(rec)), allow_nan=False).encode()})

def _iter_column(rec, name, rows, long):
    "A column of `iters` on every line; on those of `update` the learning rate is the layer's own."
    v = rec._iters[name].to_numpy()[rows]
    if name == LAYER_LR[1] and LAYER_LR in rec._values:
        has, values = long.columns[name]
        v[len(v) - len(has):][has] = values
    gone = np.isnan(v) if name in ('loss_constant', 'lr', 'mom', 'clip_factor') else \
           np.isnan(v) & ~rec._iters.measured.to_numpy()[rows] if name == 'grad_norm' else None
    return pa.array(v, mask=gone)

def _states(rec, long):
    "The states of a layer's units on its line of each window's last row, else None.  # [(unit,)]"
    ends  = pd.Index(rec._windows[DEAD_UNITS].last_iter).get_indexer(rec._iters.iter)[long.row]
    here  = (long.probe == long.probes.index(DEAD_UNITS[0])) & (ends >= 0)
    units = [rec._units.get(name) for name in long.layers]
    return [units[k][w] if ok and units[k] is not None else None for ok, k, w in zip(here, long.layer, ends)]

def _head(rec):
    return dict(format=FORMAT, keys=[list(k) for k in rec._values], meta=rec._meta,
                layers={p: _columns(d) for p, d in rec._layers.items()},
                windows=[[*k, _columns(d)] for k, d in rec._windows.items()],
                hists={s: v.shape[2] for (_, s), v in rec._values.items() if v.ndim == 3},
                units={k: v.shape[1] for k, v in rec._units.items()}, epochs=_columns(rec._epochs),
                bins=None if rec._bins is None else dict(edges=rec._bins.edges.tolist(), labels=rec._bins.labels))


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
    "What makes the Record again."
    layers  = {p: _frame(d) for p, d in head['layers'].items()}
    windows = {(p, s): _frame(d) for p, s, d in head['windows']}
    bins    = head['bins'] and Bins(np.array(head['bins']['edges']),
                                    {int(k): v for k, v in head['bins']['labels'].items()})
    probe   = table['probe'].cast(pa.string()).to_numpy()
    layer   = table['layer'].cast(pa.string()).to_numpy()
    iters   = pd.DataFrame({c: table[c].to_numpy()[probe == 'row'] for c in ITER_COLS if c in table.column_names})
    pos     = pd.Index(iters.iter)
    places  = {}
    for p in layers:
        here      = np.nonzero(probe == p)[0]
        places[p] = here, table['iter'].to_numpy()[here], pd.Index(layers[p].layer).get_indexer(layer[here])
    hists, values = {s: _unlisted(table[s], n) for s, n in head['hists'].items()}, {}
    for p, s in head['keys']:
        here, its, cols = places[p]
        ends = pd.Index(windows[p, s].last_iter) if (p, s) in windows else pos
        at, found  = hists[s] if s in hists else (np.arange(len(table)), table[s].to_numpy())
        rows, at   = ends.get_indexer(its), at[here]
        keep       = (rows >= 0) & (at >= 0)
        v          = np.full((len(ends), len(layers[p]), *found.shape[1:]), np.nan, np.float32)
        v[rows[keep], cols[keep]] = found[at[keep]]
        values[p, s] = v
    units = _units(table, head, pd.Index(windows[DEAD_UNITS].last_iter), layer, places) if head['units'] else {}
    return iters, values, layers, windows, units, _frame(head['epochs']), bins, head['meta']

def _units(table, head, ends, layer, places):
    "{layer: states (window, unit)}; unseen where there is no line."
    out         = {name: np.full((len(ends), n), UNSEEN, np.int8) for name, n in head['units'].items()}
    here, its, _ = places[DEAD_UNITS[0]]
    for i, w in zip(here, ends.get_indexer(its)):
        if w >= 0 and layer[i] in out and table['unit_state'][int(i)].is_valid:
            out[layer[i]][w] = table['unit_state'][int(i)].values.to_numpy()
    return out


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
