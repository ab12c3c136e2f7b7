"Runs side by side: small multiples, a colour a net."
from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from ..diagnosis.thresholds import STARVED
from ..record.schema import DEAD_UNITS
from ..record.select import columns, count, weights
from .axes import NETS, log_axis, log_number

SMOOTH, MANY = 9, 40              # a bold curve of more points than MANY is a rolling median of SMOOTH


def side_by_side(
    runs,                         # {name: [Records of its seeds]}
    layer,                        # the weight of which gradient and update are drawn, or None
    deepest,                      # the last hidden weight, of which the median is drawn, or None
    upto=None,                    # draw only so many iterations
    shaded=(),                    # arrays of iterations behind which the panels are grey
):                                # the figure
    "Loss, accuracy, gradients, steps, activations of several nets: thin lines the seeds, bold their smoothed median."
    fig, axs = plt.subplots(2, 4, figsize=(16, 7.4), layout='constrained', sharex=True)
    colors   = dict(zip(runs, NETS * len(runs)))
    calm     = [_panel(ax, title, _drawn(runs, read, upto), scale, colors)
                for ax, (title, read, scale) in zip(axs.flat, _panels(runs, layer, deepest))]
    _mark_starved(axs.flat[3])
    for ax in axs[1]: ax.set_xlabel('iteration')
    for n in shaded:
        for ax in axs.flat: ax.axvspan(n[0] - .4, n[-1] + .4, color='.92', lw=0, zorder=0)
    handles = [plt.Line2D([], [], color=c, lw=2.4) for c in colors.values()]
    seeds   = max(len(r) for r in runs.values())
    fig.legend(handles, [f'{n} ({len(r)} seed{"s" * (len(r) != 1)})' for n, r in runs.items()], ncols=len(colors),
               loc='outside upper left', frameon=False, fontsize=11)
    words = ['thin: a seed; bold: their median' if seeds > 1 else 'bold' if any(calm) else '',
             f'smoothed over {SMOOTH} points where there are more than {MANY}' if any(calm) else '']
    note  = ', '.join(w for w in words if w)
    note  = '; '.join(w for w in (note, 'grey: the first and last iterations, compared in the table') if w)
    fig.text(.995, .99, note, ha='right', va='top', fontsize=9, color='.35')
    return fig

def _panels(runs, layer, deepest):
    "(title, what is read of a record, kind of scale) of each panel."
    act = _deep_activation(runs)
    of  = f', {act}' if act else ''
    one, end = (l or 'no layer in common' for l in (layer, deepest))
    put = lambda probe, stat, at=None: lambda r: _line(r, probe, stat, at)
    return [("loss",                                             put('iters', 'loss'),                 'log'),
            ("validation accuracy",                              _accuracy_line,                       'linear'),
            (f"|g|, L2 norm, {one}",                             put('grad', 'norm', layer),           'log'),
            ("elasticity |g| |w| / loss, median of the weights", put('grad', 'elasticity'),            'log'),
            (f"update ratio |update| / |weight|, {one}",         put('update', 'ratio', layer),        'log'),
            (f"median of |g|, {end}",                            put('grad', 'abs_median', deepest),   'zero'),
            (f"exact zeros in the activations{of}",              put('activation', 'frac_zero', act),  'share'),
            (f"dead units by windows{of}",                       lambda r: _dead_line(r, act),         'share')]

def _drawn(runs, read, upto):
    "{name: [what `read` makes of the records that have it]}."
    lines = {n: [s for r in recs if (s := read(r)) is not None and s.notna().any()] for n, recs in runs.items()}
    return lines if upto is None else {n: [s[s.index < upto] for s in ss] for n, ss in lines.items()}

def _panel(ax, title, lines, scale, colors):
    "One panel; whether any of its curves was smoothed."
    ax.set_title(title, fontsize=10, loc='left')
    ax.spines[['top', 'right']].set_visible(False)
    if not any(lines.values()):
        ax.text(.5, .5, 'not measured', ha='center', va='center', transform=ax.transAxes, color='.5')
        ax.set_yticks([])
        return False
    none = [n for n, ss in lines.items() if not ss]
    if none: ax.text(.01, .01, f"not measured of {', '.join(none)}", transform=ax.transAxes, fontsize=8, color='.3')
    floor = _floor(lines) if scale == 'zero' else None    # a log scale with a place for exact zeros
    calm  = [_curves(ax, [s.clip(lower=floor) for s in ss], colors[name]) for name, ss in lines.items() if ss]
    if scale in ('log', 'zero'): log_axis(ax.yaxis)
    if floor is not None:
        ax.set_ylim(floor / 1.6)
        ax.yaxis.set_major_formatter(
            lambda v, i: '0' if abs(v / floor - 1) < 1e-6 else '' if v < floor * 5 else log_number(v))
        ax.axhline(floor, color='.8', lw=.8, zorder=0)
    if scale == 'share':
        ax.set_ylim(-.02, 1.02)
        ax.yaxis.set_major_formatter(lambda v, i: f'{100 * v:.0f} %')
    return any(calm)

def _floor(lines):
    "Where exact zeros are drawn: a power of ten below all but the smallest numbers."
    pos = np.concatenate([s[(s > 0) & np.isfinite(s)].to_numpy() for ss in lines.values() for s in ss])
    return 10 ** (np.floor(np.log10(np.quantile(pos, .02))) - 1) if len(pos) else 1e-9

def _curves(ax, seeds, color):
    "The curves of the seeds, thin, and their median; whether it was smoothed."
    for s in seeds: ax.plot(s.index, s, color=color, lw=.7, alpha=.45)
    both = pd.concat(seeds, axis=1)
    mid  = both[both.notna().sum(axis=1) * 2 > len(seeds) - 1].median(axis=1)
    step = np.median(np.diff(mid.index)) if len(mid) > 1 else 1
    calm = len(mid) > MANY and step <= 2
    if calm: mid = mid.rolling(SMOOTH, center=True, min_periods=1).median()
    ax.plot(mid.index, mid, color=color, lw=2.2, marker='o' if len(mid) == 1 else '')
    return calm

def _mark_starved(ax):
    if not ax.lines: return                               # not measured
    ax.axhline(STARVED, color='.3', lw=.9, ls=':')
    ax.text(.99, STARVED, f' starved below {STARVED:g}', transform=ax.get_yaxis_transform(), ha='right', va='bottom',
            fontsize=8, color='.3')

def _deep_activation(runs):
    "The activation layer nearest to the output that every net has, else None."
    names = [list(r.layers['activation'].layer) if 'activation' in r.layers else [] for rs in runs.values() for r in rs]
    both  = [l for l in names[0] if all(l in o for o in names)]
    return both[-1] if both else None


# --- lines over iterations -------------------------------------------------------------------------------------------
def _line(rec, probe, stat, layer=None):
    "A line over iterations: of one layer, or of the median of the layers with weights."
    if probe == 'iters': return pd.Series(rec.iters[stat].to_numpy(), count(rec))
    if (probe, stat) not in rec: return None
    names = [layer] if layer is not None else weights(rec, probe)
    cols  = columns(rec, probe, names)
    if (cols < 0).any() or not len(cols): return None
    return pd.DataFrame(rec[probe, stat][:, cols], index=count(rec)).median(axis=1).dropna()

def _dead_line(rec, layer):
    key = DEAD_UNITS
    if key not in rec or layer not in list(rec.layers['activation'].layer): return None
    w = rec.windows[key] - rec.iters.iter.iloc[0]
    return pd.Series(rec[key][:, columns(rec, 'activation', [layer])[0]],
                     ((w.first_iter + w.last_iter) / 2).to_numpy()).dropna()

def _accuracy_line(rec):
    ep = rec.epochs
    if 'accuracy' not in ep: return None
    ends = rec.iters.groupby(['fit', 'epoch']).iter.max() - rec.iters.iter.iloc[0]
    keys = pd.MultiIndex.from_frame(ep[['fit', 'epoch']]) if 'fit' in ep else [(0, e) for e in ep.epoch]
    return pd.Series(pd.to_numeric(ep.accuracy, errors='coerce').to_numpy(float), ends.reindex(keys).to_numpy())
