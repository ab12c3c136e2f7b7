"What is asked of a record: layers by name, glob or index, the weights among them, medians, what was not finite."
from __future__ import annotations

import re
from fnmatch import fnmatchcase

import numpy as np
import pandas as pd

from .record import Record
from .schema import PARAMETERS


# --- rows ------------------------------------------------------------------------------------------------------------
def count(rec):
    "The rows' iterations, counted from the record's first."
    it = rec.iters.iter.to_numpy()
    return it - it[0]

def nothing(rec):
    "That nothing was measured, and why if the record tells."
    due = rec.iters.measured.any() or not len(rec)
    return 'nothing was measured' + ('' if due else f": none of the {len(rec):,} iterations was due, see `every`")

def lost_loss(rec):
    "Rows whose loss is NaN or infinite; none where no loss was told at all.  # (row,) bool"
    loss = rec.iters.loss
    return (~np.isfinite(loss) & loss.notna().any()).to_numpy()

def nonfinite(rec, key):
    "Where a recorded statistic says that what it read was not finite.  # bool, as rec[key]"
    return rec[key] > 0 if key[1] == 'frac_nonfinite' else np.isinf(rec[key])

def nanmedian(v, axis=0):
    "Median without the NaNs; NaN where there is nothing else, and no warning."
    v = np.sort(np.moveaxis(v, axis, -1))                                # NaN last
    if not v.shape[-1]: return np.full(v.shape[:-1], np.nan)
    n = np.maximum(v.shape[-1] - np.isnan(v).sum(-1, keepdims=True), 1)
    a, b = (np.take_along_axis(v, k, -1)[..., 0] for k in ((n - 1) // 2, n // 2))
    return np.where(a == b, a, a / 2 + b / 2)                            # infinities: equal, or not of one sign



# --- layers ----------------------------------------------------------------------------------------------------------
def dims(shape): return [int(n) for n in re.findall(r'\d+', str(shape))]

def weights(rec, probe='grad'):
    "The parameters with two or more dimensions, in forward order."
    d = rec.layers.get(probe)
    if d is None: return []
    if 'shape' not in d: return list(d.layer)
    return [l for l, s in zip(d.layer, d['shape']) if len(dims(s)) >= 2]

def columns(rec, probe, layers): return pd.Index(rec.layers[probe].layer).get_indexer(layers)

def weight_layers(rec, probe):
    "Positions of the weights at `probe`; of all its layers where it is no parameter's, or where none is a weight."
    some = columns(rec, probe, weights(rec, probe)).tolist() if probe in PARAMETERS else []
    return some or list(range(len(rec.layers[probe])))

def names_at(rec, probe, idx): return rec.layers[probe].layer.iloc[list(idx)].tolist()

def pick_layers(rec, probe, layers=None):
    "Positions of `layers` (a glob, a name, an index, or a list of these) among those of `probe`, in network order."
    names = rec.layers[probe].layer.tolist()
    if layers is None: return list(range(len(names)))
    if not names: raise ValueError(f"at {probe!r} {nothing(rec)}")
    where = f"the layers at {probe!r} are {', '.join(names) or 'none'}"
    if not isinstance(layers, (str, int, np.integer)) and hasattr(layers, '__len__') and not len(layers):
        raise ValueError(f"layers={layers!r} is empty; {where}. Give names, globs or indices, or None for all")
    found = set()
    for ask in layers if isinstance(layers, (list, tuple, set, np.ndarray, pd.Series, pd.Index)) else [layers]:
        if isinstance(ask, (int, np.integer)) and not isinstance(ask, bool):
            if not -len(names) <= ask < len(names):
                raise IndexError(f"there is no layer {ask}; give {-len(names)} to {len(names) - 1}: {where}")
            found.add(int(ask) % len(names))
        elif isinstance(ask, str):
            here = ([i for i, n in enumerate(names) if n == ask] or
                    [i for i, n in enumerate(names) if fnmatchcase(n, ask)])
            if not here: raise ValueError(f"no layer matches {ask!r}; {where}. Give a name, a glob or an index")
            found.update(here)
        else: raise TypeError(f"a layer is a name, a glob or an index, got {ask!r}; {where}")
    return sorted(found)

def usual_layer(rec, probe):
    "The layer shown when only one can be: the second weight layer (or the first, where there is but one)."
    idx = weight_layers(rec, probe)
    if not idx: raise ValueError(f"at {probe!r} {nothing(rec)}")
    return idx[min(1, len(idx) - 1)]

def one_layer(rec, probe, layer):
    idx = [usual_layer(rec, probe)] if layer is None else pick_layers(rec, probe, layer)
    if len(idx) > 1: raise ValueError(f"{layer!r} matches {len(idx)} layers at {probe!r} and one can be drawn; "
                                      f"give one of {', '.join(names_at(rec, probe, idx))}")
    return idx[0]


# --- what was given --------------------------------------------------------------------------------------------------
def check_record(rec, what='a Record'):
    if rec is None: raise TypeError(f"expected {what}, got None, the layer_stats of a Learner that has recorded "
                                    f"nothing; fit it with cbs=LayerStatsCallback()")
    if not isinstance(rec, Record):
        raise TypeError(f"expected {what}, got {type(rec).__name__}; give learn.layer_stats or Record.load(path)")
    return rec

def as_groups(recs, what):
    "`{name: [records]}` of a record, or of a dict of records or of lists of records (several seeds)."
    if isinstance(recs, Record): return {'': [recs]}
    if not isinstance(recs, dict): raise TypeError(
        f"{what} takes a Record or a dict {{name: Record or list of Records}}, got {type(recs).__name__}")
    out = {str(k): list(v) if isinstance(v, (list, tuple)) else [v] for k, v in recs.items()}
    if not out: raise ValueError(f"{what} got an empty dict; give {{name: record}}")
    for k, v in out.items():
        if not v: raise ValueError(f"{what}: {k!r} has no record; give a Record or a list of the records of its seeds")
        for r in v: check_record(r, f"a Record or a list of Records for {k!r}")
    return out

def as_key(key): return tuple(key) if isinstance(key, list) else key

def read(rec, key):
    "The array (row or window, layer) of `key`."
    if isinstance(key, str) and key in check_record(rec).iters:
        raise ValueError(f"{key!r} is no statistic of layers; draw it with plot_lines(rec, {key!r})")
    v = check_record(rec)[key]
    if v.ndim != 2: raise ValueError(f"{key} is a histogram per window; draw it with plot_color_dim(rec, layer)")
    return v

def read_iters(rec, column):
    "A column of `rec.iters`, as float."
    if column not in rec.iters:
        raise KeyError(f"{column!r} is not a column of rec.iters; its columns are {', '.join(rec.iters)}. "
                       f"A statistic of layers is asked for as (probe, statistic), for example ('grad', 'norm')")
    return rec.iters[column].to_numpy(float)
