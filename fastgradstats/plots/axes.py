"What the plots share: colours, scales, ticks, epochs, free places for text."
from __future__ import annotations

from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import ListedColormap, LogNorm, SymLogNorm
from matplotlib.ticker import FuncFormatter, Locator, MaxNLocator, NullFormatter

from ..record.select import nothing

PALETTE      = sns.color_palette('colorblind')
NETS         = [PALETTE[3], PALETTE[0], PALETTE[2], PALETTE[1], *PALETTE[4:]]    # vermilion against blue first
NOT_MEASURED = '#d9d9d9'
ZERO         = '#000000'
NONFINITE    = PALETTE[3]         # vermilion: not in viridis
DEPTH        = ListedColormap(plt.get_cmap('viridis')(np.linspace(.04, .86, 256)), name='depth')    # no pale end: lines
HEAT         = ListedColormap(plt.get_cmap('viridis')(np.linspace(.06, 1, 256)), name='heat')     # black: exact zeros
ROUND        = [1, 2, 5, 10]      # steps between ticks
ASIDE  = dict(frameon=False, fontsize=8, title_fontsize=8, loc='upper left', bbox_to_anchor=(1.005, 1), borderaxespad=0)
REMARK = dict(loc='right', fontsize=8, color='.4')


def new_ax(ax, width=9., height=4.5):
    if ax is None: return plt.subplots(figsize=(width, height), layout='constrained')[1]
    if isinstance(ax, plt.Axes): return ax
    raise TypeError(f"ax is one matplotlib Axes; got {type(ax).__name__}. Give ax=axs[0] of "
                    f"fig, axs = plt.subplots(2), or leave it out for a figure of its own")

def tidy(ax): sns.despine(ax=ax)

def fit(ax, text, size, axis='y', share=1.):
    "`text` in as many lines as the Axes' height (or width) needs; a unit that does not fit goes to a line of its own."
    box  = ax.get_window_extent()
    room = max(12, int((box.height if axis == 'y' else box.width) * 72 / ax.figure.dpi * share / (.54 * size)))
    if len(text) <= room: return text
    name, bracket, rest = text.partition(' [')
    return '\n'.join(fill(t, room) for t in ([name, '[' + rest] if bracket else [text]))

def say_nothing(ax, rec, ticks=True):
    "Write that nothing was measured over the iterations of the record."
    ax.text(.5, .5, nothing(rec), transform=ax.transAxes, ha='center', va='center', color='.4')
    it = rec.iters.iter
    if len(it): ax.set_xlim(it.iloc[0] - .5, it.iloc[-1] + .5)
    if not ticks: ax.set_yticks([])

def say(ax, text):
    "A panel that could not be drawn says why."
    ax.text(.5, .5, text, transform=ax.transAxes, ha='center', va='center', fontsize=9, color='.4', wrap=True)
    ax.set_yticks([])
    tidy(ax)

# --- time ------------------------------------------------------------------------------------------------------------
def when(rec, key):
    "Where in time each line of rec[key] stands: its iteration, or its window's last."
    return (rec.windows[key].last_iter if key in rec.windows else rec.iters.iter).to_numpy()

def smoothed(y, n):
    "Centred rolling median over `n` values."
    if n is None or n == 1 and n is not True: return np.asarray(y, float)
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1:
        raise ValueError(f"smooth={n!r}; give a whole number of iterations, 1 or more")
    return pd.Series(np.asarray(y, float)).rolling(int(n), center=True, min_periods=1).median().to_numpy()

def mark_epochs(ax, rec, color='.35', most=12):
    "Thin vertical lines where an epoch begins (not every one where there are many), stronger ones at a new fit."
    it = rec.iters
    if len(it) < 2: return
    new_fit = it.fit.diff().fillna(0).to_numpy() != 0
    new     = (it.epoch.diff().fillna(0).to_numpy() != 0) | new_fit
    at      = np.nonzero(new)[0]
    few     = set(at[::-(-len(at) // most) or 1]) if len(at) else set()
    for i in at:
        x = it.iter.iloc[i] - .5
        if new_fit[i]:  ax.axvline(x, color=color, lw=1.4, zorder=3, gid='fit')
        elif i in few:  ax.axvline(x, color=color, lw=.6, ls=(0, (2, 3)), zorder=3, gid='epoch')

def iter_axis(ax, rec):
    it   = rec.iters
    what = ['thin lines: epochs'] * (it.epoch.nunique() > 1) + ['thick: a new fit'] * (it.fit.nunique() > 1)
    ax.set_xlabel('iteration' + f"  ({', '.join(what)})" * bool(what))
    ax.xaxis.set_major_locator(MaxNLocator('auto', integer=True))

# --- scales ----------------------------------------------------------------------------------------------------------
def wants_log(v, log):
    "Whether to draw on a log scale: as asked, else where positive values span more than a factor of 20."
    if log is not None: return bool(log)
    v = v[np.isfinite(v)]
    p = v[v > 0]
    return bool(len(p) > 1 and v.min() >= 0 and np.quantile(p, .98) > 20 * np.quantile(p, .02))

class RoundLog(Locator):
    "Ticks of a log scale: powers of ten; where few are in sight also 2 and 5, or else evenly spaced round numbers."
    def __init__(self, most=8): self.most = most
    def __call__(self): return self.tick_values(*self.axis.get_view_interval())
    def tick_values(self, a, b):
        lo, hi = sorted((a, b))
        if not 0 < lo < hi: return []
        tens = 10. ** np.arange(np.ceil(np.log10(lo) - 1e-9), np.floor(np.log10(hi) + 1e-9) + 1)
        more = np.concatenate([[d, 2 * d, 5 * d] for d in [10. ** np.floor(np.log10(lo)), *tens]])
        more = np.unique(more[(more >= lo) & (more <= hi)])
        if len(tens) > 2 or len(tens) == 2 and len(more) > self.most: return tens[::-(-len(tens) // self.most)]
        if len(more) > 2: return more[::-(-len(more) // self.most)]
        even = MaxNLocator(self.most, steps=ROUND).tick_values(lo, hi)
        return even[(even >= lo) & (even <= hi * (1 + 1e-9)) & (even > 0)]

def log_number(v, _=None):
    "A tick of a log scale in words: plain from 0.001 to 10,000."
    e = np.log10(v) if v > 0 else 0.
    if -3.5 < e < 4.5: return f'{v:g}'
    return f'$10^{{{e:.0f}}}$' if abs(e - round(e)) < 1e-6 else f'{v:.0e}'

def log_axis(axis, most=8):
    "A logarithmic axis (an XAxis or YAxis) with ticks that can be read also where it spans less than a power of ten."
    getattr(axis.axes, f'set_{axis.axis_name}scale')('log')
    axis.set_major_locator(RoundLog(most))
    axis.set_major_formatter(FuncFormatter(log_number))
    axis.set_minor_formatter(NullFormatter())

def colour_bar(ax, mesh, tall, **kwargs):
    "A colour bar `tall` inches high with as many ticks as have room."
    cb   = ax.figure.colorbar(mesh, ax=ax, extendfrac=min(.05, .08 / tall), **kwargs)
    most = int(np.clip(tall / .25, 2, 8))
    if isinstance(mesh.norm, LogNorm):
        cb.ax.yaxis.set_major_locator(RoundLog(most))
        cb.ax.yaxis.set_major_formatter(FuncFormatter(log_number))
        cb.ax.minorticks_off()
    elif isinstance(mesh.norm, SymLogNorm):
        up = RoundLog(max(2, most // 2)).tick_values(2 * mesh.norm.linthresh, mesh.norm.vmax)
        cb.set_ticks([*-np.array(up[::-1]), 0, *up], labels=[*('−' + log_number(v) for v in up[::-1]), '0',
                                                            *map(log_number, up)])
        cb.ax.minorticks_off()
    else: cb.ax.yaxis.set_major_locator(MaxNLocator(most, steps=ROUND))
    cb.ax.tick_params(labelsize=8)
    cb.outline.set_visible(False)
    return cb

def layer_ticks(ax, names, axis='y', size=None):
    "Layer names at 0, 1, 2 ...; every second, third ... and the last where there is no room for all."
    box    = ax.get_window_extent()
    room   = (box.height if axis == 'y' else box.width) * 72 / ax.figure.dpi
    size   = size or float(np.clip(room / max(len(names), 1) * .8, 7.5, 10))
    step   = max(1, int(np.ceil(len(names) * size * 1.15 / room)))
    at     = list(range(0, len(names), step))
    if at: at[-1] = len(names) - 1                                   # the last one is always named
    turn   = ({} if axis == 'y' else dict(rotation=90) if len(names) > 12 else
              dict(rotation=30, ha='right', rotation_mode='anchor'))
    getattr(ax, f'set_{axis}ticks')(at, [names[i] for i in at], fontsize=size, **turn)
    ax.tick_params(axis=axis, length=2)


class Places:
    "Free places for text on an Axes: of several candidates the one that covers least of what is drawn."
    def __init__(self, ax, points):
        ax.figure.draw_without_rendering()
        self.ax, self.taken = ax, []
        self.points   = ax.transData.transform(points) if len(points) else np.zeros((0, 2))
        self.renderer = ax.figure.canvas.get_renderer()

    def put(self, text, at, offsets, weight=1., **kw):
        "Write `text` beside a data point of `at` (n, 2), moved by one of `offsets` (points); None if none is free."
        frame = self.ax.get_window_extent()
        size  = self.ax.text(0, 0, text, transform=None, **kw)
        box   = size.get_window_extent(self.renderer)
        size.remove()
        dx, dy = box.width / 2 + 2, box.height / 2 + 2
        best  = None
        for k, p in enumerate(np.atleast_2d(at)):
            px = self.ax.transData.transform(p)
            for j, (ox, oy) in enumerate(offsets):
                scale  = self.ax.figure.dpi / 72
                cx, cy = px[0] + ox * scale + np.sign(ox) * dx, px[1] + oy * scale + np.sign(oy) * dy
                if not (frame.x0 <= cx - dx and cx + dx <= frame.x1): continue
                if not (frame.y0 <= cy - dy and cy + dy <= frame.y1): continue
                if any(abs(cx - a) < dx + c and abs(cy - b) < dy + d for a, b, c, d in self.taken): continue
                near = (np.abs(self.points[:, 0] - cx) < dx) & (np.abs(self.points[:, 1] - cy) < dy)
                cost = near.sum() * weight + .01 * j + .001 * k
                if best is None or cost < best[0]: best = cost, cx, cy
        if best is None: return None
        _, cx, cy = best
        self.taken.append((cx, cy, dx, dy))
        x, y = self.ax.transData.inverted().transform((cx, cy))
        return self.ax.text(x, y, text, ha='center', va='center', **kw)

    def block(self, at, points=5):
        "Keep text off the data points `at`."
        r = points * self.ax.figure.dpi / 72
        self.taken += [(x, y, r, r) for x, y in self.ax.transData.transform(np.atleast_2d(at))]
