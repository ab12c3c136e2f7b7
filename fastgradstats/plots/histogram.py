"The colourful dimension: the histogram of one layer in time."
from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm

from ..record.bins import N_MAG, NEG_INF, NOT_FINITE, POS_INF, ZERO, linear_bins
from ..record.record import Record
from ..record.select import check_record, names_at, one_layer, weight_layers
from .axes import NONFINITE, NOT_MEASURED, colour_bar, iter_axis, mark_epochs, new_ax, say_nothing
from .labels import subject, unit


def plot_color_dim(
    rec: Record,
    layer: str | int | None = None,     # name, glob of one, or index (-2: last but one); by default the last (weight)
    *,
    probe: str = 'activation',    # whose `hist`
    linear: tuple | None = None,  # (lo, hi): 40 equal bins between them, as in the course; else signed logarithmic
    ax: Axes | None = None,
) -> Axes:                        # the Axes
    """The colourful dimension: the histogram of one layer over time, colour = log of the share of elements in a bin.

    Raises:
        KeyError: 'hist' was not recorded at `probe`.
        ValueError: no layer matches, several do, or it has one dimension, of which no histogram is kept.

    Example:
        plot_color_dim(rec, -2, linear=(0, 10))                        # as in the course
    """
    share, i   = _shares(rec, probe, layer)                                               # (window, bin)
    wins       = rec.windows[probe, 'hist']
    bad        = share[:, NOT_FINITE].sum(1)
    lost       = bad > .999                                          # no finite element: not black, which is none
    y, cells, ticks = _log_rows(share, rec.bins.edges) if linear is None else _linear_rows(share, rec.bins, linear)
    ax         = new_ax(ax, 10, 4.2)
    edges      = np.append(wins.first_iter, wins.last_iter.iloc[-1:] + 1) - .5
    if not len(cells): cells, edges = np.full((1, len(y) - 1), np.nan), np.array([-.5, .5])
    cells[lost[:len(cells)]] = np.nan
    mesh = _draw_cells(ax, edges, y, cells)
    if ticks is not None:
        ax.set_yticks(*ticks, fontsize=8)
        ax.tick_params(axis='y', length=0)
    for k in np.flatnonzero(lost): ax.axvspan(edges[k], edges[k + 1], color=NONFINITE, lw=0, gid='lost')
    if not np.isfinite(cells).any() and not lost.any(): say_nothing(ax, rec)
    cb   = colour_bar(ax, mesh, 3.5, pad=.01, fraction=.05, extend='min')
    bin_ = 'per quarter octave\n(zero, and the smallest: per row)' if linear is None else 'in one of 40 bins'
    cb.set_label(f"share of the layer's elements {bin_}\nlog colour, black: none [{unit(rec, (probe, 'hist'))}]",
                 fontsize=8)
    if (bad > 0).any(): _mark_nonfinite(ax, wins.first_iter.to_numpy(float), bad)
    mark_epochs(ax, rec, color='w')
    iter_axis(ax, rec)
    ax.set_ylabel(f"{subject(rec, probe, [i])} value [{rec.meta.get('units', {}).get('mean') or 'as recorded'}]")
    zero  = share[:, ZERO][~np.isnan(share[:, ZERO])]
    title = f"Values of the {subject(rec, probe, [i])} {names_at(rec, probe, [i])[0]}"
    if len(zero) and not (bad > 0).any(): title += f": exact zeros {zero[0]:.0%} at first, {zero[-1]:.0%} at last"
    ax.set_title(title, loc='left', fontsize=10)
    for side in ax.spines.values(): side.set_visible(False)
    return ax

def _shares(rec, probe, layer):
    "Of one layer: the share of its elements in each bin (window, bin), NaN where nothing was counted; its position."
    hist = check_record(rec)[probe, 'hist']
    some = weight_layers(rec, probe)
    i    = one_layer(rec, probe, (some or [-1])[-1] if layer is None else layer)
    if i not in some:
        raise ValueError(f"of {names_at(rec, probe, [i])[0]} no histogram is kept, it has one dimension; give one of "
                         f"{', '.join(names_at(rec, probe, some))}")
    hist = hist[:, i].astype(float)
    n    = hist.sum(1, keepdims=True)
    with np.errstate(invalid='ignore'): return hist / np.where(n > 0, n, np.nan), i

def _draw_cells(ax, edges, y, cells):
    top   = np.nanmax(cells, initial=0.) or 1.
    drawn = np.where(cells == 0, 1e-12, cells)                       # nothing there: the darkest colour
    ax.set_facecolor(NOT_MEASURED)
    ax.set_xlim(edges[0], edges[-1])
    return ax.pcolormesh(edges, y, np.ma.masked_invalid(drawn.T), cmap='magma', rasterized=True,
                         norm=LogNorm(min(1e-4, top / 10), top, clip=True))

def _mark_nonfinite(ax, first, bad):
    "Marks on top of the windows of which a share `bad` of the elements was not finite, and how many there are."
    x    = first[bad > 0]
    text = f'NaN or infinite: {len(x)} windows, up to {np.nanmax(bad):.1%} of the elements'
    ax.plot(x, np.full(len(x), 1.), 'v', transform=ax.get_xaxis_transform(), color=NONFINITE, ms=6, clip_on=False,
            gid='nonfinite', label=text)
    ax.legend(loc='lower right', bbox_to_anchor=(1, 1.01), frameon=False, fontsize=8, borderaxespad=0)

def _linear_rows(share, bins, linear):
    if not (isinstance(linear, (tuple, list)) and len(linear) == 2 and
            all(isinstance(v, (int, float, np.number)) for v in linear) and -np.inf < linear[0] < linear[1] < np.inf):
        raise ValueError(f"linear={linear!r}; give (lo, hi) with lo < hi, for example (0, 10)")
    cells, y = linear_bins(share, bins.edges, *linear)
    return y, cells, None

def _log_rows(share, edges, decades=4):
    """Rows of a symmetric logarithmic picture: bins within 10^-`decades` of the largest magnitude one by one, as
    the share per quarter octave (bins are not equally wide); all smaller ones of a sign in one row; exact zeros in one
    thick row. Returns row edges, cells (window, row), ticks."""
    e     = np.asarray(edges, float)
    some  = np.nonzero(np.nan_to_num(share).max(0, initial=0.) > 1e-5)[0]
    up    = max([i - ZERO for i in some if ZERO < i < POS_INF], default=0)   # outermost bin of a sign, counted from 0
    down  = max([ZERO - i for i in some if NEG_INF < i < ZERO], default=0)
    reach = max(up, down) or 20
    inner = max(1, reach - round(decades * np.log2(10) * 4))              # bins nearer to zero than this are one row
    high  = lambda k: 4 * np.log2(e[ZERO + k] / e[ZERO + k - 1]) if k <= N_MAG else 1.     # in quarter octaves
    thick = .05 * (4 * np.log2(10) * decades) * (1 + (min(up, down) > 0))
    parts = [([ZERO], thick, 1.)]
    for last, sign in ((up, 1), (down, -1)):
        if not last: continue
        more  = [([ZERO + sign * k for k in range(1, min(inner, last) + 1)], .7 * thick, 1.)]
        more += [([ZERO + sign * k], high(k), high(k)) for k in range(inner + 1, last + 1)]
        parts = parts + more if sign > 0 else more[::-1] + parts
    y     = np.concatenate([[0.], np.cumsum([h for _, h, _ in parts])])
    y    -= y[[b for b, _, _ in parts].index([ZERO])] + thick / 2          # zero is at zero
    cells = np.stack([share[:, b].sum(1) / per for b, _, per in parts], axis=1)
    at, names = [0.], ['0']
    low   = e[ZERO + inner]
    for last, sign in ((up, 1), (down, -1)):
        if last <= inner: continue
        base, minus = 1.2 * thick, '−' * (sign < 0)
        if sign > 0:
            at.append(.85 * thick)
            names.append(f'under {low:.1g}')
        for d in range(int(np.ceil(np.log10(low))), int(np.floor(np.log10(e[ZERO + last]))) + 1):
            up_by = 4 * np.log2(10. ** d / low)
            if up_by > 3: at.append(sign * (base + up_by)); names.append(f'{minus}{10. ** d:g}')
    return y, cells, (at, names)
