"A statistic over the iterations, of one record or of several."
from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize

from ..record.record import Record
from ..record.select import (as_groups, as_key, check_record, names_at, nanmedian, one_layer, pick_layers, read,
                             read_iters)
from .axes import (ASIDE, DEPTH, NETS, PALETTE, REMARK, fit, iter_axis, log_axis, mark_epochs, new_ax, say_nothing,
                   smoothed, tidy, wants_log, when)
from .labels import heading, label

DASHES = ('-', '--', ':', '-.')


def plot_lines(
    rec: Record | dict,           # Record, or {name: Record or list of the Records of several seeds}
    key: tuple | str = ('grad', 'norm'),      # (probe, statistic), or a column of `rec.iters` such as 'loss'
    *,
    layers: str | int | list | None = None,   # name, glob, index or a list; all, or the second weight of several
    smooth: int | None = None,    # iterations of a centred rolling median
    log: bool | None = None,      # logarithmic y; by default where the values span more than a factor of 20
    ax: Axes | None = None,
) -> Axes:                        # the Axes
    """A statistic over the iterations: one line a layer, or one colour a record (thin: a seed; bold: their median).

    Raises:
        KeyError: `key` was not recorded, or is no column of `rec.iters`.
        ValueError: no layer matches, or several do where one can be drawn.

    Example:
        plot_lines({'default': rec0, 'kaiming': [rec1, rec2]}, ('update', 'ratio'), smooth=9)
    """
    key = as_key(key)
    smoothed([0.], smooth)
    if isinstance(key, str) and layers is not None:
        raise ValueError(f"{key!r} is of no layer; leave layers={layers!r} out, or give a key such as ('grad', 'norm')")
    if isinstance(rec, dict): return _lines_of_many(rec, key, layers, smooth, log, ax)
    check_record(rec, 'a Record or {name: Record}')
    if isinstance(key, str):
        idx, x, v = [0], rec.iters.iter.to_numpy(), read_iters(rec, key)[:, None]
    else:
        v    = read(rec, key)
        idx  = pick_layers(rec, key[0], layers)
        x, v = when(rec, key), v[:, idx]
    ax    = new_ax(ax, 10)
    names = [key] if isinstance(key, str) else names_at(rec, key[0], idx)
    looks = [dict(color=PALETTE[0])] if isinstance(key, str) else _looks(rec, key[0], idx)
    for i, (name, look) in enumerate(zip(names, looks or [dict(color=c) for c in DEPTH(np.linspace(0, 1, len(idx)))])):
        keep = ~np.isnan(v[:, i])
        ax.plot(x[keep], smoothed(v[keep, i], smooth), lw=1.3 if looks else .8, label=name,
                marker='o' if keep.sum() == 1 else None, ms=4, **look)
    if wants_log(v, log): log_axis(ax.yaxis)
    if not isinstance(key, str): _name_lines(ax, names, looks)
    _finish_lines(ax, rec, key, idx, smooth, v)
    ax.set_title(heading(rec, key, idx), loc='left', fontsize=10)
    return ax

def _looks(rec, probe, idx):
    "A colour a module, a dash for each of its tensors; None where there are too many to tell apart."
    d      = rec.layers[probe].iloc[idx]
    owners = (d.module if 'module' in d else d.layer).tolist()
    colors = dict(zip(dict.fromkeys(owners), PALETTE))
    nth    = [owners[:i].count(o) for i, o in enumerate(owners)]
    if len(owners) > 14 or len(colors) < len(set(owners)) or max(nth, default=0) >= len(DASHES): return None
    return [dict(color=colors[o], ls=DASHES[k]) for o, k in zip(owners, nth)]

def _name_lines(ax, names, looks):
    "A legend for a few layers, a colour bar in network order for many."
    if looks is not None:
        ax.legend(title='layer', **ASIDE)
        return
    order = plt.cm.ScalarMappable(Normalize(0, len(names) - 1), DEPTH)
    cb    = ax.figure.colorbar(order, ax=ax, pad=.01, fraction=.04, aspect=30)
    at    = np.unique(np.linspace(0, len(names) - 1, 12).round().astype(int))
    cb.set_ticks(at, labels=[names[i] for i in at], fontsize=7)
    cb.ax.invert_yaxis()
    cb.ax.set_title(f'{len(names)} layers', fontsize=8, loc='left')
    cb.outline.set_visible(False)

def _finish_lines(ax, rec, key, idx, smooth, v):
    ax.set_ylabel(fit(ax, label(rec, key, idx), 10))
    if not np.isfinite(v).any(): say_nothing(ax, rec, ticks=False)
    if smooth and smooth > 1: ax.set_title(f'rolling median of {smooth} measured iterations', **REMARK)
    mark_epochs(ax, rec)
    iter_axis(ax, rec)
    tidy(ax)

def _lines_of_many(recs, key, layers, smooth, log, ax):
    groups = as_groups(recs, 'plot_lines')
    first  = next(iter(groups.values()))[0]
    ax, everything, place = new_ax(ax, 9), [], ''
    for (name, seeds), c in zip(groups.items(), NETS * len(groups)):
        got = []
        for r in seeds:
            if isinstance(key, str): x, y = r.iters.iter.to_numpy(), read_iters(r, key)
            else:
                x, y  = when(r, key), read(r, key)
                i     = one_layer(r, key[0], layers)
                y     = y[:, i]
                place = names_at(r, key[0], [i])[0]
            keep = ~np.isnan(y)
            got.append((x[keep], smoothed(y[keep], smooth)))
        many = len(got) > 1
        look = dict(lw=.7, alpha=.4) if many else dict(lw=1.8, label=name)
        for x, y in got: ax.plot(x, y, color=c, **look)
        if many: ax.plot(*_median_line(got), color=c, lw=2.2, label=f'{name} (median of {len(got)})')
        everything += [y for _, y in got]
    v   = np.concatenate(everything)
    idx = None if isinstance(key, str) else [one_layer(first, key[0], layers)]
    if wants_log(v, log): log_axis(ax.yaxis)
    ax.legend(frameon=False)
    _finish_lines(ax, first, key, idx, smooth, v)
    ax.set_title(heading(first, key, idx) + f', {place}' * bool(place), loc='left', fontsize=10)
    return ax

def _median_line(lines):
    "Median over lines (x, y) at the x that any of them has."
    x = np.unique(np.concatenate([x for x, _ in lines]))
    y = np.full((len(lines), len(x)), np.nan)
    for row, (a, b) in zip(y, lines): row[np.searchsorted(x, a)] = b
    return x, nanmedian(y)
