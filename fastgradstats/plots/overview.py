"Pictures of a Record: functions that draw on a matplotlib Axes and return it."
from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.ticker import PercentFormatter

from ..diagnosis.report import diagnose
from .axes import (DEPTH, NETS, NONFINITE, NOT_MEASURED, PALETTE, as_groups, as_key, check_record, colour_bar,
                      draw_heat, fit, heading, iter_axis, label, layer_ticks, log_axis, mark_epochs, names_at,
                      nanmedian, new_ax, one_layer, pick_layers, read, read_iters, say, say_nothing,
                      smoothed, subject, tidy, unit, wants_log, weight_layers)
from ..record.summary import facts
from .small_gradients import plot_small_gradients

__all__ = ['plot_overview', 'plot_heat', 'plot_lines', 'plot_color_dim', 'plot_dead_chart', 'plot_grad_flow',
           'plot_small_gradients']

LEAKY  = ("Dead: the unit's output never varied over the window. "
          "A leaky unit is never dead in this sense, by construction.")
ASIDE  = dict(frameon=False, fontsize=8, title_fontsize=8, loc='upper left', bbox_to_anchor=(1.005, 1), borderaxespad=0)
REMARK = dict(loc='right', fontsize=8, color='.4')
DASHES = ('-', '--', ':', '-.')


def plot_heat(
    rec,                          # Record
    key=('grad', 'norm'),         # (probe, statistic); not a histogram
    *,
    layers=None,                  # name, glob, index or a list of these; all by default
    log=None,                     # logarithmic colours; by default where the values span more than a factor of 20
    ax=None,
):                                # the Axes
    "Every layer (y, in network order) at every iteration (x): the colour is the statistic."
    key = as_key(key)
    read(rec, key)
    idx = pick_layers(rec, key[0], layers)
    ax  = new_ax(ax, 10, np.clip(.19 * len(idx) + 1.3, 2.6, 12))
    draw_heat(ax, rec, key, idx, log=log)
    iter_axis(ax, rec)
    ax.set_ylabel('layer')
    ax.set_title(heading(rec, key, idx), loc='left', fontsize=10)
    return ax


def plot_lines(
    rec,                          # Record, or {name: Record or list of the Records of several seeds}
    key=('grad', 'norm'),         # (probe, statistic), or a column of `rec.iters` such as 'loss'
    *,
    layers=None,                  # name, glob, index or a list; all, or of several records the second weight layer
    smooth=None,                  # iterations of a centred rolling median
    log=None,                     # logarithmic y; by default where the values span more than a factor of 20
    ax=None,
):                                # the Axes
    "A statistic over the iterations: one line a layer, or one colour a record (thin: a seed; bold: their median)."
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
        x, v = _x(rec, key), v[:, idx]
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

def _x(rec, key):
    "Where in time each line of rec[key] stands: its iteration, or its window's last."
    return (rec.windows[key].last_iter if key in rec.windows else rec.iters.iter).to_numpy()

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
    if not np.isfinite(v).any(): _empty(ax, rec)
    if smooth and smooth > 1: ax.set_title(f'rolling median of {smooth} measured iterations', **REMARK)
    mark_epochs(ax, rec)
    iter_axis(ax, rec)
    tidy(ax)

def _empty(ax, rec):
    say_nothing(ax, rec)
    ax.set_yticks([])

def _lines_of_many(recs, key, layers, smooth, log, ax):
    groups = as_groups(recs, 'plot_lines')
    first  = next(iter(groups.values()))[0]
    ax, everything, place = new_ax(ax, 9), [], ''
    for (name, seeds), c in zip(groups.items(), NETS * len(groups)):
        got = []
        for r in seeds:
            if isinstance(key, str): x, y = r.iters.iter.to_numpy(), read_iters(r, key)
            else:
                x, y  = _x(r, key), read(r, key)
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


def plot_color_dim(
    rec,                          # Record
    layer=None,                   # name, glob of one layer, or index (-2: last but one); the last (weight) by default
    *,
    probe='activation',           # whose `hist`
    linear=None,                  # (lo, hi): 40 equal bins between them, as in the course; else signed logarithmic
    ax=None,
):                                # the Axes
    "The colourful dimension: the histogram of one layer over time, colour = log of the share of elements in a bin."
    key  = (probe, 'hist')
    hist = check_record(rec)[key]
    i    = one_layer(rec, probe, (weight_layers(rec, probe) or [-1])[-1] if layer is None else layer)
    if i not in weight_layers(rec, probe):
        raise ValueError(f"of {names_at(rec, probe, [i])[0]} no histogram is kept, it has one dimension; give one of "
                         f"{', '.join(names_at(rec, probe, weight_layers(rec, probe)))}")
    hist = hist[:, i].astype(float)                                                       # (window, bin)
    wins = rec.windows[key]
    n    = hist.sum(1, keepdims=True)
    with np.errstate(invalid='ignore'): share = hist / np.where(n > 0, n, np.nan)
    bad  = share[:, [0, 388, 389]].sum(1)
    y, cells, ticks = (_log_rows(share, rec.bins.edges) if linear is None else
                       _linear_rows(share, rec.bins.edges, linear))
    ax    = new_ax(ax, 10, 4.2)
    edges = np.append(wins.first_iter, wins.last_iter.iloc[-1:] + 1) - .5
    if not len(cells): cells, edges = np.full((1, len(y) - 1), np.nan), np.array([-.5, .5])
    ax.set_facecolor(NOT_MEASURED)
    lost = bad > .999                                                # no finite element: not black, which is none
    cells[lost[:len(cells)]] = np.nan
    top   = np.nanmax(cells, initial=0.) or 1.
    drawn = np.where(cells == 0, 1e-12, cells)                       # nothing there: the darkest colour
    mesh  = ax.pcolormesh(edges, y, np.ma.masked_invalid(drawn.T), cmap='magma', rasterized=True,
                          norm=LogNorm(min(1e-4, top / 10), top, clip=True))
    ax.set_xlim(edges[0], edges[-1])
    if ticks is not None:
        ax.set_yticks(*ticks, fontsize=8)
        ax.tick_params(axis='y', length=0)
    for k in np.flatnonzero(lost): ax.axvspan(edges[k], edges[k + 1], color=NONFINITE, lw=0, gid='lost')
    if not np.isfinite(cells).any() and not lost.any(): say_nothing(ax, rec)
    cb = colour_bar(ax, mesh, 3.5, pad=.01, fraction=.05, extend='min')
    bin_ = 'per quarter octave\n(zero, and the smallest: per row)' if linear is None else 'in one of 40 bins'
    cb.set_label(f"share of the layer's elements {bin_}\nlog colour, black: none [{unit(rec, key)}]", fontsize=8)
    if (bad > 0).any():
        mid = wins.first_iter.to_numpy(float)[bad > 0]
        text = f'NaN or infinite: {len(mid)} windows, up to {np.nanmax(bad):.1%} of the elements'
        ax.plot(mid, np.full(len(mid), 1.), 'v', transform=ax.get_xaxis_transform(), color=NONFINITE, ms=6,
                clip_on=False, gid='nonfinite', label=text)
        ax.legend(loc='lower right', bbox_to_anchor=(1, 1.01), frameon=False, fontsize=8, borderaxespad=0)
    mark_epochs(ax, rec, color='w')
    iter_axis(ax, rec)
    ax.set_ylabel(f"{subject(rec, probe, [i])} value [{rec.meta.get('units', {}).get('mean') or 'as recorded'}]")
    zero  = share[:, 194][~np.isnan(share[:, 194])]
    title = f"Values of the {subject(rec, probe, [i])} {names_at(rec, probe, [i])[0]}"
    if len(zero) and not (bad > 0).any(): title += f": exact zeros {zero[0]:.0%} at first, {zero[-1]:.0%} at last"
    ax.set_title(title, loc='left', fontsize=10)
    for side in ax.spines.values(): side.set_visible(False)
    return ax

def _linear_rows(share, edges, linear, n=40):
    "The log bins poured into `n` equal ones, each in proportion to the overlap."
    if not (isinstance(linear, (tuple, list)) and len(linear) == 2 and
            all(isinstance(v, (int, float, np.number)) for v in linear) and -np.inf < linear[0] < linear[1] < np.inf):
        raise ValueError(f"linear={linear!r}; give (lo, hi) with lo < hi, for example (0, 10)")
    y    = np.linspace(*linear, n + 1)
    e    = np.array(edges, float)
    e[0], e[-1] = 2 * e[1], 2 * e[-2]
    both = np.minimum(e[1:, None], y[None, 1:]) - np.maximum(e[:-1, None], y[None, :-1])      # (log bin, linear bin)
    over = np.clip(both, 0, None) / np.diff(e)[:, None]
    z    = np.zeros(n)                                               # zeros belong to one bin
    if linear[0] <= 0 <= linear[1]: z[min(np.searchsorted(y, 0., side='right') - 1, n - 1)] = 1
    over[193] = z
    return y, share[:, 1:388] @ over, None

def _log_rows(share, edges, decades=4):
    """Rows of a symmetric logarithmic picture: bins within 10^-`decades` of the largest magnitude one by one, as
    the share per quarter octave (bins are not equally wide); all smaller ones of a sign in one row; exact zeros in one
    thick row. Returns row edges, cells (window, row), ticks."""
    e     = np.asarray(edges, float)
    some  = np.nonzero(np.nan_to_num(share).max(0, initial=0.) > 1e-5)[0]
    up    = max([i - 194 for i in some if 194 < i < 388], default=0)   # outermost bin of a sign, counted from 0
    down  = max([194 - i for i in some if 0 < i < 194], default=0)
    reach = max(up, down) or 20
    inner = max(1, reach - round(decades * np.log2(10) * 4))              # bins nearer to zero than this are one row
    high  = lambda k: 4 * np.log2(e[194 + k] / e[193 + k]) if k < 193 else 1.   # height of a bin, in quarter octaves
    thick = .05 * (4 * np.log2(10) * decades) * (1 + (min(up, down) > 0))
    parts = [([194], thick, 1.)]
    for last, sign in ((up, 1), (down, -1)):
        if not last: continue
        more  = [([194 + sign * k for k in range(1, min(inner, last) + 1)], .7 * thick, 1.)]
        more += [([194 + sign * k], high(k), high(k)) for k in range(inner + 1, last + 1)]
        parts = parts + more if sign > 0 else more[::-1] + parts
    y     = np.concatenate([[0.], np.cumsum([h for _, h, _ in parts])])
    y    -= y[[b for b, _, _ in parts].index([194])] + thick / 2          # zero is at zero
    cells = np.stack([share[:, b].sum(1) / per for b, _, per in parts], axis=1)
    at, names = [0.], ['0']
    low   = e[194 + inner]
    for last, sign in ((up, 1), (down, -1)):
        if last <= inner: continue
        base, minus = 1.2 * thick, '−' * (sign < 0)
        if sign > 0:
            at.append(.85 * thick)
            names.append(f'under {low:.1g}')
        for d in range(int(np.ceil(np.log10(low))), int(np.floor(np.log10(e[194 + last]))) + 1):
            up_by = 4 * np.log2(10. ** d / low)
            if up_by > 3: at.append(sign * (base + up_by)); names.append(f'{minus}{10. ** d:g}')
    return y, cells, (at, names)


def plot_dead_chart(
    rec,                          # Record with ('activation', 'frac_dead')
    *,
    layers=None,                  # name, glob, index or a list of these
    ax=None,
):                                # the Axes
    "Share of dead units of every layer over the windows and, where recorded, how many were born dead, died, revived."
    key = ('activation', 'frac_dead')
    read(rec, key)
    idx = pick_layers(rec, 'activation', layers)
    ax  = new_ax(ax, 10, np.clip(.24 * len(idx) + 1.9, 2.8, 12))
    mesh = draw_heat(ax, rec, key, idx, log=False, bar=False)
    units, names = rec.units, names_at(rec, 'activation', idx)
    size = ax.get_yticklabels()[0].get_fontsize() if len(idx) else 8
    if len(units):
        last  = units[units.window == units.groupby('layer').window.transform('max')]
        count = last.groupby(['layer', 'state']).size().unstack(fill_value=0)
        heads = ['units', 'born dead', 'died', 'revived'] + ['non-finite'] * ('non-finite' in count)
        for j, h in enumerate(heads):
            x = 1.035 + .068 * j
            ax.text(x, 1.015, h.replace(' ', '\n').replace('-', '-\n'), transform=ax.transAxes, ha='center',
                    va='bottom', fontsize=8, color='.3')
            for i, n in enumerate(names):
                if n not in count.index: continue
                k = int(count.loc[n].sum() if h == 'units' else count.loc[n].get(h, 0))
                look = dict(color='.3' if h == 'units' else '.7')
                if k and h != 'units': look = dict(color=NONFINITE, fontweight='bold')
                ax.text(x, i, str(k), transform=ax.get_yaxis_transform(), ha='center', va='center', fontsize=size,
                        gid=h, **look)
        ax.text(1.035 + .034 * (len(heads) - 1), -.03, 'state in the last window', transform=ax.transAxes, ha='center',
                va='top', fontsize=7.5, color='.3')
    cb = colour_bar(ax, mesh, ax.get_window_extent().height / ax.figure.dpi, pad=.02, fraction=.04, aspect=20)
    cb.set_label(fit(ax, label(rec, key), 9), fontsize=9)
    cb.ax.yaxis.set_major_formatter(PercentFormatter(1))
    if not np.isfinite(mesh.get_array()).any(): cb.set_ticks([])
    iter_axis(ax, rec)
    ax.set_xlabel(f'{ax.get_xlabel()}\n{LEAKY}')
    ax.xaxis.label.set_fontsize(8.5)
    ax.set_ylabel('layer')
    ax.set_title('Dead units, by window', loc='left', fontsize=10, pad=22 if len(units) else None)
    return ax


def plot_grad_flow(
    rec,                          # Record
    *,
    iters=None,                   # where ten measured iterations begin; by default the first, two in between, the last
    stat='norm',                  # statistic of `probe`
    probe='grad',                 # where
    ax=None,
):                                # the Axes
    "A statistic along the network (x: layers in order) at a few moments, each the median over about ten iterations."
    key  = (probe, stat)
    v    = read(rec, key)
    idx  = weight_layers(rec, probe)
    x    = _x(rec, key)
    rows = np.nonzero(~np.isnan(v).all(1))[0]
    span = int(np.clip(len(rows) // 4, 1, 10)) if iters is None else 10              # of a moment: no two overlap
    if iters is None:
        starts = np.unique(np.linspace(0, max(len(rows) - span, 0), 4).astype(int)) if len(rows) else []
    else:
        iters = list(iters) if isinstance(iters, (list, tuple, range, np.ndarray)) else [iters]
        wrong = [i for i in iters if isinstance(i, bool) or not isinstance(i, (int, np.integer))]
        if wrong or not iters: raise ValueError(f"iters={wrong[0] if wrong else iters!r}; give the iterations at which "
                                                f"to look, whole numbers such as [0, 100]")
        wrong = [i for i in iters if not len(rows) or not x[rows[0]] <= i <= x[rows[-1]]]
        if wrong: raise ValueError(f"iterations {wrong} are not in the record; measured at {key} were "
                                   f"{f'{x[rows[0]]} to {x[rows[-1]]}' if len(rows) else 'none'}")
        starts = [int(np.searchsorted(x[rows], i)) for i in iters]
    long = max(map(len, names_at(rec, probe, idx)), default=0) if len(idx) > 12 else 0       # names that stand upright
    ax   = new_ax(ax, float(np.clip(.2 * len(idx) + 5, 7, 15)), 4.2 + .075 * long)
    pos = np.arange(len(idx))
    drawn = []
    for s, c in zip(starts, DEPTH(np.linspace(0, 1, max(len(starts), 2)))):
        r = rows[s:s + span]
        y = nanmedian(v[np.ix_(r, idx)])
        name = f'{x[r[0]]} to {x[r[-1]]}' if len(r) > 1 else f'{x[r[0]]}'
        ax.plot(pos, np.where(y == 0, np.nan, y), 'o-', color=c, ms=4, lw=1.5, label=name)
        z = np.nonzero(y == 0)[0]
        if len(z): ax.plot(z, np.full(len(z), .015), 'v', color=c, ms=6, transform=ax.get_xaxis_transform(), gid='zero')
        drawn.append(y)
    flat = np.concatenate(drawn) if drawn else np.array([np.nan])
    if np.isfinite(flat).any() and np.nanmin(flat) >= 0 and (flat > 0).any(): log_axis(ax.yaxis)
    if not np.isfinite(flat).any(): _empty(ax, rec)
    ax.set_xlim(-.5, len(idx) - .5)
    layer_ticks(ax, names_at(rec, probe, idx), axis='x')
    ax.set_xlabel('layer, input to output')
    ax.set_ylabel(fit(ax, label(rec, key, idx), 10))
    ax.grid(axis='y', color='.9', lw=.6)
    if drawn: ax.legend(title='iterations', **ASIDE)
    many = f"median over {span} measured iterations" if span > 1 else 'single measured iterations'
    if drawn: ax.set_title(many + '; ▼ exactly 0' * bool((flat == 0).any()), **REMARK)
    ax.set_title(heading(rec, key, idx), loc='left', fontsize=10)
    tidy(ax)
    return ax


def plot_overview(
    rec,                          # Record
    *,
    title=None,                   # a sentence above all; by default the verdict of `diagnose`, or else the facts
    save=None,                    # path of an image to write
):                                # array of six Axes
    "One figure for the first five minutes: every layer at every iteration, under the loss."
    check_record(rec)
    panels = [('weight gradient', [('grad', 'norm')]),
              ('elasticity',      [('grad', 'elasticity')]),
              ('update ratio',    [('update', 'ratio')]),
              ('activations',     [('activation', 'std'), ('activation', 'frac_near_zero'), ('activation', 'mean')]),
              ('dead units',      [('activation', 'frac_dead')])]
    found  = [next((k for k in keys if k in rec), None) for _, keys in panels]
    rows   = [weight_layers(rec, k[0]) if k else [] for k in found]
    tall   = [1.7] + [np.clip(.15 * len(r) + .6, 1., 3.) if k else .5 for r, k in zip(rows, found)]
    fig, axs = plt.subplots(len(tall), 1, sharex=True, figsize=(11, sum(tall) + 1.2), layout='constrained',
                            height_ratios=tall)
    _loss_panel(axs[0], rec)
    for ax, (name, keys), key, idx in zip(axs[1:], panels, found, rows):
        if key is None:
            say(ax, f"{name}: {' or '.join(f'{s!r} at {p!r}' for p, s in keys)} was not recorded")
            continue
        draw_heat(ax, rec, key, idx, name=False, log=False if key[1].startswith('frac_') else None)
        ax.set_title(label(rec, key, idx), loc='left', fontsize=9)
    it = rec.iters.iter
    if len(it): axs[0].set_xlim(it.iloc[0] - .5, it.iloc[-1] + .5)
    iter_axis(axs[-1], rec)
    for ax in axs[:-1]: ax.tick_params(axis='x', labelbottom=False)
    fig.suptitle(_verdict(rec) if title is None else title, fontsize=11, x=.01, ha='left', wrap=True)
    fig.draw_without_rendering()                                     # now it is known how much room the names have
    for ax, key, idx in zip(axs[1:], found, rows):
        if key: layer_ticks(ax, names_at(rec, key[0], idx))
    if save is not None: fig.savefig(save, dpi=150)
    return axs

def _loss_panel(ax, rec):
    it = rec.iters
    if not np.isfinite(it.loss).any(): say(ax, 'the loss is not known'); return
    ax.plot(it.iter, it.loss, color=PALETTE[0], lw=1.2, label='loss')
    if np.isfinite(it.loss_constant).any():
        ax.plot(it.iter, it.loss_constant, color=PALETTE[1], lw=1.2, ls='--',
                label='loss of a constant answer (batch-mean output)')
    if wants_log(it.loss.to_numpy(), None): log_axis(ax.yaxis, 5)
    ax.set_ylabel(label(rec, 'loss').replace(' [', '\n['), fontsize=8)
    ax.legend(frameon=False, fontsize=8, loc='lower left', bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0)
    mark_epochs(ax, rec)
    tidy(ax)

def _verdict(rec):
    "The verdict on the record; the facts where too little was measured for one."
    report = diagnose(rec)
    return report.verdict if report.findings or len(rec) > 20 and report.checked else _facts(rec)

def _facts(rec):
    "What happened, in a sentence or two: only numbers of the record."
    text = '; '.join(facts(rec).split('\n')[bool(rec.iters.measured.any()):])
    return text[:1].upper() + text[1:] + '.'
