"Every layer at every iteration, a statistic as colour."
from __future__ import annotations

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm, Normalize, SymLogNorm
from matplotlib.patches import Patch

from ..record.record import Record
from ..record.schema import DEAD_UNITS
from ..record.select import as_key, columns, lost_loss, names_at, nanmedian, nonfinite, pick_layers, read
from .axes import (HEAT, NONFINITE, NOT_MEASURED, ZERO, colour_bar, fit, iter_axis, layer_ticks, mark_epochs, new_ax,
                   say_nothing, wants_log)
from .labels import heading, label

CELLS = 1000                      # what a picture can show side by side


def plot_heat(
    rec: Record,
    key: tuple = ('grad', 'norm'),    # (probe, statistic); not a histogram
    *,
    layers: str | int | list | None = None,   # name, glob, index or a list of these; all by default
    log: bool | None = None,      # logarithmic colours; by default where the values span more than a factor of 20
    ax: Axes | None = None,
) -> Axes:                        # the Axes
    """Every layer (y, in network order) at every iteration (x): the colour is the statistic.

    Raises:
        KeyError: `key` was not recorded; it says what was, and how to record it.
        ValueError: no layer matches `layers`, or `key` is a histogram.

    Example:
        plot_heat(rec, ('grad', 'elasticity'), layers='*weight')
    """
    key = as_key(key)
    read(rec, key)
    idx = pick_layers(rec, key[0], layers)
    ax  = new_ax(ax, 10, np.clip(.19 * len(idx) + 1.3, 2.6, 12))
    draw_heat(ax, rec, key, idx, log=log)
    iter_axis(ax, rec)
    ax.set_ylabel('layer')
    ax.set_title(heading(rec, key, idx), loc='left', fontsize=10)
    return ax


# --- what is drawn of it ---------------------------------------------------------------------------------------------
def draw_heat(ax, rec, key, idx, *, log=None, bar=True, name=True):
    "Layer x iteration cells of `key`, with colour bar, marks for what is not a number, epochs. Returns the mesh."
    v   = read(rec, key)
    bad = nonfinite_at(rec, key, v)
    edges, cells, bad, group = time_cells(rec, key, v[:, idx], bad[:, idx])
    norm, cmap, extend       = colours(cells[~bad], log, key[1].startswith('frac_'))
    y    = np.arange(len(idx) + 1) - .5
    if group > 1: ax.set_title(f'a column: median of {group}', loc='right', fontsize=8, color='.4')
    mesh = ax.pcolormesh(edges, y, np.ma.masked_invalid(cells.T), norm=norm, cmap=cmap, rasterized=True)
    code = np.select([bad.T, np.isnan(cells.T), (cells.T == 0) & isinstance(norm, LogNorm)], [2., 0., 1.], np.nan)
    ax.pcolormesh(edges, y, np.ma.masked_invalid(code), norm=Normalize(0, 2), rasterized=True,
                  cmap=ListedColormap([NOT_MEASURED, ZERO, NONFINITE]))
    shown = [Patch(color=c, label=t) for i, (c, t) in enumerate([(NOT_MEASURED, 'not measured'), (ZERO, 'exactly 0'),
                                                                 (NONFINITE, 'non-finite')]) if (code == i).any()]
    if shown: ax.legend(handles=shown, loc='lower right', bbox_to_anchor=(1, 1), ncols=3, frameon=False, fontsize=8,
                        handlelength=1, handleheight=1, borderaxespad=.2, columnspacing=1)
    ax.set_ylim(max(len(idx), 1) - .5, -.5)
    ax.set_xlim(edges[0], edges[-1])
    layer_ticks(ax, names_at(rec, key[0], idx))
    mark_epochs(ax, rec, color='w' if cmap is HEAT else '.3')
    for side in ax.spines.values(): side.set_visible(False)
    known = np.isfinite(cells).any()
    if not known and not (code == 2).any(): say_nothing(ax, rec)
    if bar and (known or name):
        tall = ax.get_window_extent().height / ax.figure.dpi                          # inches
        cb   = colour_bar(ax, mesh, tall, extend=extend, pad=.01, fraction=.05, aspect=np.clip(7 * tall, 10, 60))
        if name: cb.set_label(fit(ax, label(rec, key, idx), 9), fontsize=9)
        if not known: cb.set_ticks([])
    return mesh

def time_cells(rec, key, v, bad):
    """Cells of a heat map: edges (cell + 1,), values and non-finite flags (cell, layer), rows a cell. A cell reaches to
    the next measured iteration; a gap of more than three usual ones is shown as not measured."""
    it = rec.iters
    if key in rec.windows:
        w = rec.windows[key]
        start, stop = w.first_iter.to_numpy(float), w.last_iter.to_numpy(float) + 1
    else:
        keep  = ~np.isnan(v).all(1) | (it.measured.to_numpy() & ~np.isfinite(it.loss.to_numpy())) | bad.any(1)
        if not keep.any(): keep[:] = True
        start = it.iter.to_numpy(float)[keep]
        v, bad, stop = v[keep], bad[keep], start + 1
    if not len(start):
        start, stop, v, bad = np.zeros(1), np.ones(1), np.full((1, v.shape[1]), np.nan), np.zeros((1, v.shape[1]), bool)
    usual = np.median(np.diff(start)) if len(start) > 1 else 1
    group = -(-len(start) // CELLS)
    if group > 1:
        cuts = np.arange(0, len(start), group)
        lack = len(cuts) * group - len(v)
        v    = nanmedian(np.pad(v, ((0, lack), (0, 0)), constant_values=np.nan).reshape(len(cuts), group, -1), axis=1)
        bad  = np.logical_or.reduceat(bad, cuts)
        stop = stop[np.minimum(cuts + group, len(start)) - 1]
        start, usual = start[cuts], usual * group
    edges, rows = _with_gaps(start, stop, usual)
    return edges, np.where(rows[:, None] < 0, np.nan, v[rows]), (rows[:, None] >= 0) & bad[rows], group

def _with_gaps(start, stop, usual):
    "Edges of the cells, and the row each shows; -1 where a gap is too long for the cell before it to fill."
    edges, rows = [], []
    for i, s in enumerate(start):
        edges.append(s); rows.append(i)
        after = start[i + 1] if i + 1 < len(start) else None
        if after is not None and after - s > 3 * usual and after > stop[i]:
            edges.append(max(s + usual, stop[i])); rows.append(-1)
    return np.array([*edges, max(stop[-1], edges[-1] + 1)]) - .5, np.array(rows)

def nonfinite_at(rec, key, v):
    "Where what was read held NaN or infinities (as far as the record knows): bool, as `v`."
    bad, here, grads = np.isinf(v), (key[0], 'frac_nonfinite'), ('grad', 'frac_nonfinite')
    if key == DEAD_UNITS: return bad | _lost_layers(rec, v)
    if key in rec.windows: return bad
    if here in rec.keys(): bad = bad | nonfinite(rec, here)
    elif grads in rec.keys() and key[0] in ('grad_used', 'weight', 'update'):
        at  = columns(rec, 'grad', rec.layers[key[0]].layer)
        bad = bad | np.isnan(v) & (at >= 0) & nonfinite(rec, grads)[:, at]
    if key[1] in ('elasticity', 'per_loss'):
        bad = bad | np.isnan(v) & (lost_loss(rec) & rec.iters.measured.to_numpy())[:, None]
    return bad

def _lost_layers(rec, v):
    "Where no unit of a layer was finite over a window.  # (window, layer)"
    units = rec.units
    if not len(units): return np.zeros(v.shape, bool)
    lost = (units.state == 'non-finite').groupby([units.window, units.layer]).all().unstack(fill_value=False)
    return lost.reindex(index=range(len(v)), columns=rec.layers['activation'].layer, fill_value=False).to_numpy()

def colours(v, log, share=False):
    "Norm, colour map and which ends of the colour bar are open, for the values `v`."
    f = v[np.isfinite(v)]
    if not len(f): return Normalize(0, 1), HEAT, 'neither'
    if f.min() < 0:
        top = np.quantile(np.abs(f), .98) or np.abs(f).max() or 1.
        cut = 'both' if np.abs(f).max() > top else 'neither'
        lin = np.quantile(np.abs(f), .25) or top / 1e3
        norm = SymLogNorm(min(lin, top / 10), vmin=-top, vmax=top) if log else Normalize(-top, top)
        return norm, sns.color_palette('vlag', as_cmap=True), cut
    p = f[f > 0]
    if wants_log(v, log) and len(p):
        lo, hi = np.quantile(p, .01), p.max()
        if lo >= hi: lo, hi = hi / 3, hi * 3
        return LogNorm(lo, hi), HEAT, 'min' if p.min() < lo else 'neither'
    if share: return Normalize(0, max(.05, f.max())), HEAT, 'neither'
    lo, hi = f.min(), f.max()
    return Normalize(lo, hi if hi > lo else lo + (abs(lo) or 1)), HEAT, 'neither'
