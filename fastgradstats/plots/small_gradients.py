"The picture of the question: is a small gradient small because the loss is, or because nothing gets through?"
from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from .._text import digits, thousands
from ..diagnosis.outcome import outcome
from ..diagnosis.thresholds import CONVERGED_E, STARVED
from ..record.record import Record
from ..record.select import as_groups, names_at, nanmedian, nothing, one_layer
from .axes import NETS, Places, RoundLog, fit, log_axis, new_ax, smoothed, tidy
from .labels import subject, unit

SMOOTH    = 9                     # points of the rolling median, of short runs a fifth of all
ROUND     = 5                     # points of the geometric mean after it
LABELLED  = (0, 10, 50, 100, 200)
EQUAL     = 1.02                  # two gradients are equal within this factor


def plot_small_gradients(
    recs: Record | dict,          # {name: Record or list of the Records of several seeds}, or one Record
    *,
    layer: str | int | None = None,     # name, glob of one layer or index; the second weight layer by default
    mark: bool = True,            # mark two points of equal gradient, one starved, one converged, where there are such
    ax: Axes | None = None,
) -> Axes:                        # the Axes
    """|g| of one layer's weights against the loss, which falls to the right: a path a net, dotted: equal elasticity. At
    the same height, on the left a gradient is small because nothing gets through, on the right because the loss is.

    Raises:
        KeyError: 'norm' of 'grad' and of 'weight' were not both recorded.
        ValueError: no layer matches, or no iteration has a positive loss and a finite gradient.

    Example:
        plot_small_gradients({'default': rec0, 'kaiming': [rec1, rec2]}, layer=1)
    """
    groups = as_groups(recs, 'plot_small_gradients')
    paths  = {name: [_path(r, layer, name) for r in seeds] for name, seeds in groups.items()}
    mids   = {name: _middle(p) for name, p in paths.items()}
    first  = next(iter(groups.values()))[0]
    where  = names_at(first, 'grad', [one_layer(first, 'grad', layer)])[0]
    kind   = subject(first, 'grad', [one_layer(first, 'grad', layer)])
    ax     = new_ax(ax, 8.6, 6)
    colors = dict(zip(mids, NETS * len(mids)))
    for name, p in paths.items():
        if len(p) > 1:
            for q in p: ax.plot(q['loss'], q['g'], color=colors[name], lw=.6, alpha=.3, zorder=2)
        ax.plot(mids[name]['loss'], mids[name]['g'], color=colors[name], lw=2, zorder=4, label=name or None, gid='path')
    log_axis(ax.xaxis); log_axis(ax.yaxis)
    _limits(ax, mids, paths)
    ax.set_xlabel(f"loss, falling to the right [{unit(first, 'loss')}]")
    ax.set_ylabel(fit(ax, f"|g|: L2 norm of the {kind} of {where} [{unit(first, ('grad', 'norm'))}]", 10))
    tidy(ax)
    pair = _pair(mids) if mark else None
    w    = float(np.nanmedian(np.concatenate([q['w'] for p in paths.values() for q in p])))
    note = fit(ax, _note(paths, pair, w), 7.5, 'x', 1.08)
    ax.text(0, 1.012, note, transform=ax.transAxes, fontsize=7.5, color='.35', va='bottom', gid='note')
    title = f"The same small {kind}: starved, or converged" if pair else f"The {kind} of {where} against the loss"
    ax.set_title(fit(ax, title, 12, 'x'), loc='left', fontsize=12, fontweight='bold',
                 pad=10 + 10.5 * (note.count('\n') + 1))
    _annotate(ax, mids, paths, pair, colors, w)
    return ax

def _note(paths, pair, w):
    "How to read it, in small print."
    seeds = max(map(len, paths.values()))
    calm  = max(q['calm'] for p in paths.values() for q in p)
    how   = [f"smoothed over {calm} measured iterations" if calm > 1 else '',
             f"thin: a seed, bold: the median of {seeds}" if seeds > 1 else '']
    size  = digits(w, 3) if np.isfinite(w) else 'not known'
    size += "; at the circles each net's own" * bool(pair)
    return (f"Dotted: equal elasticity E = |g||w|/loss, the % the loss moves when these weights move 1 % (at the "
            f"median |w| = {size}). "
            + f"Paths: {'; '.join(h for h in how if h)}. " * any(how) + "Dots: iterations.")

def _path(rec, layer, name):
    "iter, loss, |g|, |w| of one record, smoothed, and its state; only where loss and gradient are positive."
    e    = rec['grad', 'elasticity']                                 # says what to record if norms are missing
    i    = one_layer(rec, 'grad', layer)
    it   = rec.iters
    g    = rec['grad', 'norm'][:, i].astype(float)
    with np.errstate(divide='ignore', invalid='ignore'): w = e[:, i] * np.abs(it.loss.to_numpy()) / g
    if not it.measured.any(): raise ValueError(f"of {name or 'the record'} {nothing(rec)}")
    ok   = (np.isfinite(it.loss) & (it.loss > 0)).to_numpy() & np.isfinite(g) & (g > 0)
    if not ok.any():
        todo = (f"choose another layer of {', '.join(rec.layers['grad'].layer)}, or plot_lines(rec, ('grad', 'norm'))"
                if np.isfinite(it.loss).any() else "its loss is not known: give it to watch, or record with a Learner")
        raise ValueError(f"{name or 'the record'} has no iteration with a positive loss and a non-zero, finite "
                         f"gradient of {names_at(rec, 'grad', [i])[0]}; {todo}")
    it   = it[ok]
    is_  = outcome(rec).by_row[ok]
    calm = min(SMOOTH, max(len(it) // 5, 1))
    return dict(iter=it.iter.to_numpy(), loss=_calm(it.loss, calm), g=_calm(g[ok], calm), w=_calm(w[ok], calm),
                calm=calm, **{s: (is_ == s).astype(float) for s in ('starved', 'converged')})

def _calm(y, n):
    "Rolling median, then a short rolling geometric mean against the stairs it leaves."
    with np.errstate(divide='ignore'): y = np.log(smoothed(y, n))
    return np.exp(pd.Series(y).rolling(min(ROUND, n), center=True, min_periods=1).mean().to_numpy())

def _middle(paths):
    "The median path over the seeds."
    x   = np.unique(np.concatenate([p['iter'] for p in paths]))
    out = dict(iter=x)
    for k in ('loss', 'g', 'w', 'starved', 'converged'):
        v = np.full((len(paths), len(x)), np.nan)
        for row, p in zip(v, paths): row[np.searchsorted(x, p['iter'])] = p[k]
        out[k] = nanmedian(v)
    out['E'] = out['g'] * out['w'] / out['loss']
    return out

def _limits(ax, mids, paths):
    "A frame of equal margins round the bold paths; thin ones may leave it."
    for axis, k in ('x', 'loss'), ('y', 'g'):
        v = np.log10(np.concatenate([m[k] for m in mids.values()]))
        lo, hi = v.min(), v.max()
        gap = max(.1 * (hi - lo), .15)
        lim = 10 ** (lo - gap * (1 + .8 * (axis == 'y'))), 10 ** (hi + gap)          # below: room for words at circles
        ax.set_xlim(lim[::-1]) if axis == 'x' else ax.set_ylim(lim)

def _pair(mids):
    """The starved and the converged point of equal |g| and most different elasticity, where most seeds are so by their
    outcome; None if there is no such pair."""
    low, high = [], []
    for name, m in mids.items():
        low  += [(name, i) for i in np.nonzero((m['E'] < STARVED) & (m['starved'] > .5))[0]]
        high += [(name, i) for i in np.nonzero((m['E'] >= CONVERGED_E) & (m['converged'] > .5))[0]]
    best = None
    for a in low:
        for b in high:
            p, q = mids[a[0]], mids[b[0]]
            if abs(np.log(p['g'][a[1]] / q['g'][b[1]])) > np.log(EQUAL): continue
            gap = q['E'][b[1]] / p['E'][a[1]]
            if best is None or gap > best[0]: best = gap, a, b, p['E'][a[1]], q['E'][b[1]], p['g'][a[1]]
    return best

def _annotate(ax, mids, paths, pair, colors, w):
    "Dots, marks, names and lines of equal elasticity; each text where it covers least."
    dense = [_dense(m) for m in mids.values()]
    thin  = [np.column_stack([q['loss'], q['g']])[::4] for p in paths.values() if len(p) > 1 for q in p]
    put   = Places(ax, np.concatenate(dense + thin))
    sides = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (1, -1), (0, -1), (-1, -1)]
    ring  = [(sx * r, sy * r) for r in (5, 9, 15) for sx, sy in sides]
    dots  = {}
    for name, m in mids.items():
        last  = m['iter'][-1]
        want  = [i for i in LABELLED if m['iter'][0] <= i < last - .1 * (last - m['iter'][0])] + [last]
        near = dict.fromkeys(int(np.abs(m['iter'] - i).argmin()) for i in want)
        dots[name] = [(int(m['iter'][k]), m['loss'][k], m['g'][k]) for k in near]
        xy = np.array([d[1:] for d in dots[name]])
        ax.plot(*xy.T, 'o', color=colors[name], ms=6, mec='w', mew=.8, zorder=6, gid='dots')
        put.block(xy, 4)
    if pair:
        _, a, b, lo, hi, g = pair
        p, q = [(mids[n]['loss'][i], mids[n]['g'][i]) for n, i in (a, b)]
        ax.plot([p[0], q[0]], [np.sqrt(p[1] * q[1])] * 2, color='.25', lw=.9, zorder=3, gid='same')
        for (n, i), (x, y) in zip((a, b), (p, q)):
            ax.plot(x, y, 'o', ms=13, mfc='none', mec=colors[n], mew=2, zorder=7, gid='mark')
        put.block([p, q], 8)
        line = np.geomspace(p[0], q[0], 60)
        right = [(10, 12), (10, -12), (10, 20), (10, -20), (-10, -12)]
        left  = [(-10, -12), (0, -12), (-10, 12), (-10, -20), (0, 14)]
        for (n, _), at, word, e, off in ((a, p, 'starved', lo, right), (b, q, 'converged', hi, left)):
            put.put(f"{word}\nE = {thousands(e)}", at, off, color=colors[n], fontsize=11, fontweight='bold', zorder=8,
                    linespacing=1.1, gid=word, bbox=dict(fc='w', ec='none', alpha=.8, pad=1))
        put.put(f'same |g|, E differs {thousands(hi / lo)} times', np.column_stack([line, np.full(60, p[1])])[15:45],
                [(0, 2), (0, -2)], color='.25', fontsize=8.5, zorder=8, gid='equal')
    for name, m in mids.items():
        if name: put.put(name, np.column_stack([m['loss'], m['g']])[::max(1, len(m['iter']) // 60)],
                         [(s * r, t * r) for r in (8, 14, 22) for s, t in [(1, 1), (0, 1), (-1, 1), *sides]],
                         color=colors[name], fontsize=11, fontweight='bold', zorder=8, gid='name')
    for name, found in dots.items():
        for i, x, y in found:
            put.put(str(i), (x, y), ring, weight=2., color=colors[name], fontsize=8.5, zorder=8, gid='iter')
    _elasticity_lines(ax, put, w)

def _dense(m, n=8):
    "The path with points between its points, so that text is kept off its lines too."
    k = np.linspace(0, len(m['iter']) - 1, n * len(m['iter']))
    f = lambda v: np.exp(np.interp(k, np.arange(len(v)), np.log(v)))
    return np.column_stack([f(m['loss']), f(m['g'])])

def _elasticity_lines(ax, put, w):
    "Dotted lines of equal E = |g||w|/loss at |w| = `w`, labelled inside the axes."
    if not (np.isfinite(w) and w > 0): return
    (x0, x1), (y0, y1) = ax.get_xlim(), ax.get_ylim()                # x0 > x1: the loss falls to the right
    x = np.geomspace(x0, x1, 200)
    for e in RoundLog(5).tick_values(y0 * w / x0, y1 * w / x1):
        y    = e * x / w
        seen = (y > y0) & (y < y1)
        if seen.sum() < 20: continue
        ax.plot(x[seen], y[seen], ':', color='.6', lw=.9, zorder=1, gid='elasticity')
        xs, ys = x[seen], y[seen]
        a, b   = ax.transData.transform([(xs[0], ys[0]), (xs[-1], ys[-1])])
        n      = len(xs)
        order  = sorted(range(n // 12, n - n // 12), key=lambda i: min(abs(i - .88 * n), abs(i - .12 * n)))
        turn   = np.degrees(np.arctan2(b[1] - a[1], b[0] - a[0]))
        put.put(f'E = {e:g}', np.column_stack([xs, ys])[order], [(0, 0)], weight=5., color='.45', fontsize=8,
                zorder=1.5, rotation=turn, gid='E', bbox=dict(fc='w', ec='none', pad=.6))
