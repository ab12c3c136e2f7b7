"What the plots share: layers and columns asked for, names and units of numbers, colours, epochs, free places for text."
from __future__ import annotations

from fnmatch import fnmatchcase
from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import ListedColormap, LogNorm, Normalize, SymLogNorm
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, Locator, MaxNLocator, NullFormatter

from ..record.select import nothing
from ..record.record import DEAD_UNITS, Record

COLUMNS      = 1000               # what a picture can show side by side
PALETTE      = sns.color_palette('colorblind')
NETS         = [PALETTE[3], PALETTE[0], PALETTE[2], PALETTE[1], *PALETTE[4:]]    # vermilion against blue first
NOT_MEASURED = '#d9d9d9'
ZERO         = '#000000'
NONFINITE    = PALETTE[3]         # vermilion: not in viridis
DEPTH        = ListedColormap(plt.get_cmap('viridis')(np.linspace(.04, .86, 256)), name='depth')    # no pale end: lines
HEAT         = ListedColormap(plt.get_cmap('viridis')(np.linspace(.06, 1, 256)), name='heat')     # black: exact zeros
NEAR_ZERO    = .05
ROUND        = [1, 2, 5, 10]      # steps between ticks

PROBES = dict(activation='activation', grad_output='output gradient', grad='gradient', grad_used='used gradient',
              weight='parameter', update='update', input='model input', output='model output')
STATS  = dict(norm='L2 norm', std='standard deviation', frac_zero='share of exact zeros',
              frac_near_zero=f'share with |x| < {NEAR_ZERO}', frac_nonfinite='share of non-finite values',
              frac_dead='share of dead units', frac_dormant='share of dormant units',
              frac_saturated='share of saturated elements', abs_mean='mean magnitude', abs_median='median magnitude',
              abs_max='largest magnitude', rms='root mean square', elasticity='elasticity E = |g||w|/loss',
              per_loss='L2 norm / |loss|', ratio='update ratio |update|/|weight|', hist='share', lr='learning rate')
LOSS, PER_WEIGHT = 'as the loss function', 'loss per unit of weight'
UNITS  = dict(elasticity='% of loss per % of weight', ratio='ratio', per_loss='per unit of weight', loss=LOSS,
              loss_constant=LOSS, gain=LOSS, lr='per step', elapsed='s', bs='examples', hist='share of elements')
OF     = dict(grad=PER_WEIGHT, grad_used=PER_WEIGHT, grad_output='loss per unit of output',
              activation='as the activation', weight='as the weight', update='as the weight',
              input='as the input', output='as the output')


# --- what was asked for -----------------------------------------------------------------------------------------------
def check_record(rec, what='a Record'):
    if rec is None: raise TypeError(f"expected {what}, got None, the layer_stats of a Learner that has recorded "
                                    f"nothing; fit it with cbs=LayerStatsCallback()")
    if not isinstance(rec, Record):
        raise TypeError(f"expected {what}, got {type(rec).__name__}; give learn.layer_stats or Record.load(path)")
    return rec

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

def weight_layers(rec, probe):
    "Positions of the tensors with two or more dimensions; all where shapes are unknown or are not a parameter's."
    d = rec.layers[probe]
    if probe not in ('grad', 'grad_used', 'weight', 'update') or 'shape' not in d: return list(range(len(d)))
    return [i for i, s in enumerate(d['shape'].astype(str)) if 'x' in s] or list(range(len(d)))

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

def names_at(rec, probe, idx): return rec.layers[probe].layer.iloc[list(idx)].tolist()

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

# --- columns of time -------------------------------------------------------------------------------------------------
def nonfinite_at(rec, key, v):
    "Where what was read held NaN or infinities (as far as the record knows): bool, as `v`."
    bad, here, grads = np.isinf(v), (key[0], 'frac_nonfinite'), ('grad', 'frac_nonfinite')
    if key == DEAD_UNITS: return bad | _lost_layers(rec, v)
    if key in rec.windows: return bad
    if here in rec.keys(): bad = bad | (rec[here] > 0)
    elif grads in rec.keys() and key[0] in ('grad_used', 'weight', 'update'):
        at  = pd.Index(rec.layers['grad'].layer).get_indexer(rec.layers[key[0]].layer)
        bad = bad | np.isnan(v) & (at >= 0) & (rec[grads][:, at] > 0)
    it = rec.iters
    if key[1] in ('elasticity', 'per_loss') and it.loss.notna().any():
        bad = bad | np.isnan(v) & (it.measured & ~np.isfinite(it.loss)).to_numpy()[:, None]
    return bad

def _lost_layers(rec, v):
    "Where no unit of a layer was finite over a window.  # (window, layer)"
    units = rec.units
    if not len(units): return np.zeros(v.shape, bool)
    lost = (units.state == 'non-finite').groupby([units.window, units.layer]).all().unstack(fill_value=False)
    return lost.reindex(index=range(len(v)), columns=rec.layers['activation'].layer, fill_value=False).to_numpy()

def columns(rec, key, v, bad):
    """Cells of a heat map: edges (column + 1,), values and non-finite flags (column, layer), rows a column. A cell
    reaches to the next measured iteration; a gap of more than three usual ones is shown as not measured."""
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
    group = -(-len(start) // COLUMNS)
    if group > 1:
        cuts = np.arange(0, len(start), group)
        v    = np.stack([nanmedian(v[c:c + group]) for c in cuts])
        bad  = np.stack([bad[c:c + group].any(0) for c in cuts])
        stop = stop[np.minimum(cuts + group, len(start)) - 1]
        start, usual = start[cuts], usual * group
    edges, rows = [], []
    for i, s in enumerate(start):
        edges.append(s); rows.append(i)
        after = start[i + 1] if i + 1 < len(start) else None
        if after is not None and after - s > 3 * usual and after > stop[i]:
            edges.append(max(s + usual, stop[i])); rows.append(-1)
    edges = np.array([*edges, max(stop[-1], edges[-1] + 1)]) - .5
    rows  = np.array(rows)
    return edges, np.where(rows[:, None] < 0, np.nan, v[rows]), (rows[:, None] >= 0) & bad[rows], group

def nanmedian(v, axis=0):
    "Median without the NaNs; NaN where there is nothing else, and no warning."
    none = np.isnan(v).all(axis)
    out  = np.nanmedian(np.where(np.expand_dims(none, axis), 0., v), axis)
    return np.where(none, np.nan, out)

def smoothed(y, n):
    "Centred rolling median over `n` values."
    if n is None or n == 1 and n is not True: return np.asarray(y, float)
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1:
        raise ValueError(f"smooth={n!r}; give a whole number of iterations, 1 or more")
    return pd.Series(np.asarray(y, float)).rolling(int(n), center=True, min_periods=1).median().to_numpy()

# --- words ------------------------------------------------------------------------------------------------------------
def unit(rec, key):
    stat = key if isinstance(key, str) else key[1]
    got  = rec.meta.get('units', {}).get(stat)
    if got: return got
    if stat in UNITS:            return UNITS[stat]
    if stat.startswith('frac_'): return 'share, 0 to 1'
    return 'value' if isinstance(key, str) else OF.get(key[0], 'value')

def subject(rec, probe, idx=None):
    "Whose number it is; which gradient is always said."
    if probe not in ('grad', 'grad_used', 'weight', 'update'): return PROBES.get(probe, probe)
    names = names_at(rec, probe, pick_layers(rec, probe) if idx is None else idx)
    kind  = ('weight' if names and all(n.endswith('weight') for n in names) else
             'bias'   if names and all(n.endswith('bias') for n in names)   else 'parameter')
    after = dict(grad=' gradient', grad_used=' gradient as used', weight='', update=' update')
    return kind + after[probe]

def label(rec, key, idx=None):
    "What is drawn, and its unit."
    if isinstance(key, str): name = key.replace('_', ' ')
    else:
        name = STATS.get(key[1], key[1].replace('_', ' '))
        whose = subject(rec, key[0], idx)
        if key[1] == 'elasticity': name += f' ({whose})'
        elif key[1] == 'lr': name += f' of the {whose.split()[0]}'
        elif key[1] not in ('ratio', 'frac_dead', 'frac_dormant'): name += f' of the {whose}'
    return f"{name} [{unit(rec, key)}]"

def heading(rec, key, idx=None):
    "What is drawn, as a title."
    text = label(rec, key, idx).split(' [')[0]
    return text[:1].upper() + text[1:]

def num(v): return f'{v:.3g}' if np.isfinite(v) else 'not known'

# --- scales, axes -----------------------------------------------------------------------------------------------------
def wants_log(v, log):
    "Whether to draw on a log scale: as asked, else where positive values span more than a factor of 20."
    if log is not None: return bool(log)
    v = v[np.isfinite(v)]
    p = v[v > 0]
    return bool(len(p) > 1 and v.min() >= 0 and np.quantile(p, .98) > 20 * np.quantile(p, .02))

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

def new_ax(ax, width=9., height=4.5):
    if ax is None: return plt.subplots(figsize=(width, height), layout='constrained')[1]
    if isinstance(ax, plt.Axes): return ax
    raise TypeError(f"ax is one matplotlib Axes; got {type(ax).__name__}. Give ax=axs[0] of "
                    f"fig, axs = plt.subplots(2), or leave it out for a figure of its own")

def fit(ax, text, size, axis='y', share=1.):
    "`text` in as many lines as the Axes' height (or width) needs; a unit that does not fit goes to a line of its own."
    box  = ax.get_window_extent()
    room = max(12, int((box.height if axis == 'y' else box.width) * 72 / ax.figure.dpi * share / (.54 * size)))
    if len(text) <= room: return text
    name, bracket, rest = text.partition(' [')
    return '\n'.join(fill(t, room) for t in ([name, '[' + rest] if bracket else [text]))

def tidy(ax): sns.despine(ax=ax)

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

def draw_heat(ax, rec, key, idx, *, log=None, bar=True, name=True):
    "Layer x iteration cells of `key`, with colour bar, marks for what is not a number, epochs. Returns the mesh."
    v   = read(rec, key)
    bad = nonfinite_at(rec, key, v)
    edges, cells, bad, group = columns(rec, key, v[:, idx], bad[:, idx])
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

def say_nothing(ax, rec):
    "Write that nothing was measured over the iterations of the record."
    ax.text(.5, .5, nothing(rec), transform=ax.transAxes, ha='center', va='center', color='.4')
    it = rec.iters.iter
    if len(it): ax.set_xlim(it.iloc[0] - .5, it.iloc[-1] + .5)

def say(ax, text):
    "A panel that could not be drawn says why."
    ax.text(.5, .5, text, transform=ax.transAxes, ha='center', va='center', fontsize=9, color='.4', wrap=True)
    ax.set_yticks([])
    tidy(ax)


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
