"One record in numbers: a value per phase, probe, statistic and layer."
from __future__ import annotations

import warnings

import numpy as np
import pandas as pd

from ..record.schema import DEAD_UNITS, DERIVED, PARAMETERS
from ..record.select import columns, count, weights

MEDIAN    = 'median layer'        # in the tables: the median over the weights (or activations) of all layers
ALL_UNITS = 'all units'


def phase_values(rec, phases):
    "DataFrame phase, probe, statistic, layer, value of one record."
    out, keys, it = [], [*rec.keys(), *(k for k in DERIVED if k in rec)], rec.iters
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', RuntimeWarning)           # medians of nothing are NaN, which says it
        for probe, stat in keys:
            v = rec[probe, stat]
            if v.ndim != 2: continue
            names = list(rec.layers[probe].layer)
            some  = weights(rec, probe) if probe in PARAMETERS else names
            if (probe, stat) in rec.windows:
                for phase, x in _by_window(rec, probe, stat, v, phases).items():
                    out += [(phase, probe, stat, l, y) for l, y in zip(names, x)]
                    out.append((phase, probe, stat, MEDIAN, np.nanmedian(x)))
                    if (probe, stat) == DEAD_UNITS:
                        out.append((phase, probe, stat, ALL_UNITS, _dead_share(rec, phase, phases)))
                continue
            wide = [(names, stat, v)]
            if stat in ('mean', 'median') and probe in ('grad', 'grad_used', 'grad_output'):
                wide.append((names, f'|{stat}|', np.abs(v)))
            for names_, stat_, v_ in list(wide):
                if some: wide.append(([MEDIAN], stat_, np.nanmedian(v_[:, columns(rec, probe, some)], axis=1)[:, None]))
            for names_, stat_, v_ in wide:
                for phase, rows in phases.items():
                    x = _over(it, v_, rows, phase)
                    out += [(phase, probe, stat_, l, y) for l, y in zip(names_, x)]
        for stat in ('loss', 'loss_constant', 'gain', 'grad_norm'):
            for phase, rows in phases.items():
                out.append((phase, 'iters', stat, '', _over(it, it[[stat]].to_numpy(float), rows, phase)[0]))
        ep = rec.epochs
        for stat in ep.columns.difference(['fit', 'epoch', 'iter', 'time'], sort=False):
            col = pd.to_numeric(ep[stat], errors='coerce').to_numpy(float)
            if 'iter' in ep: col = col[np.asarray(ep.iter - it.iter.iloc[0] <= count(rec)[phases['whole']].max())]
            if len(col): out += [('first', 'epochs', stat, '', col[0]), ('last', 'epochs', stat, '', col[-1])]
    return pd.DataFrame(out, columns=['phase', 'probe', 'statistic', 'layer', 'value'])

def _over(it, v, rows, phase):
    """A phase's value of each column of `v`: the mean of the whole, else the median; the nearest measured row where
    none of its rows was measured; NaN where its loss was not finite at any time, so that no such run hides in a
    median."""
    loss = np.isfinite(it.loss.to_numpy())
    if loss.any() and not loss[rows].all(): return np.full(v.shape[1], np.nan)
    at = np.nonzero(it.measured.to_numpy())[0]
    if len(at) and not rows[at].any(): rows = [at[0] if phase == 'first' else at[-1]]
    return np.nanmean(v[rows], axis=0, dtype=float) if phase == 'whole' else np.nanmedian(v[rows].astype(float), axis=0)

def _inside(rec, key, phases):
    "Numbers of the windows of `key` that end within the iterations compared."
    ends = rec.windows[key].last_iter.to_numpy() - rec.iters.iter.iloc[0]
    return np.nonzero(ends <= count(rec)[phases['whole']].max())[0]

def window_spans(rec, phases):
    w  = _inside(rec, DEAD_UNITS, phases) if DEAD_UNITS in rec.windows else ()
    if not len(w): return 'first', 'last'
    at = (rec.windows[DEAD_UNITS] - rec.iters.iter.iloc[0]).iloc[[w[0], w[-1]]]
    return tuple(f'{a}–{b}' for a, b in zip(at.first_iter, at.last_iter))

def epoch_names(rec, phases):
    n = len(rec.epochs)
    return ('epoch 1', f'epoch {n}') if n else ('first', 'last')

def _by_window(rec, probe, stat, v, phases):
    w = _inside(rec, (probe, stat), phases)
    if not len(w): return {}
    return dict(first=v[w[0]], last=v[w[-1]], whole=np.nanmean(v[w], axis=0))

def _dead_share(rec, phase, phases):
    "Share of all units of the net that are dead in the phase's window."
    w, units = _inside(rec, DEAD_UNITS, phases), rec.units
    if not len(w) or not len(units): return np.nan
    dead = units.assign(dead=units.state.isin(['born dead', 'died'])).groupby('window').dead.mean()
    dead = dead[dead.index.isin(w)]
    return float(dict(first=dead.iloc[0], last=dead.iloc[-1], whole=dead.mean())[phase]) if len(dead) else np.nan

def moments(rec, layer, rows):
    "DataFrame iter, norm, loss, elasticity, gain of the rows at which the layer's gradient is positive and finite."
    if ('grad', 'elasticity') not in rec or layer not in list(rec.layers['grad'].layer): return None
    c, it = columns(rec, 'grad', [layer])[0], rec.iters
    d = pd.DataFrame(dict(iter=count(rec), norm=rec['grad', 'norm'][:, c].astype(float), loss=it.loss,
                          elasticity=rec['grad', 'elasticity'][:, c].astype(float), gain=it.gain))[rows]
    return d[np.isfinite(d.norm) & (d.norm > 0)]
