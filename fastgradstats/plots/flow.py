"A statistic along the network, at a few moments."
from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from ..record.record import Record
from ..record.select import names_at, nanmedian, read, weight_layers
from .axes import ASIDE, DEPTH, REMARK, fit, layer_ticks, log_axis, new_ax, say_nothing, tidy, when
from .labels import heading, label


def plot_grad_flow(
    rec: Record,
    *,
    iters: list | None = None,    # where ten measured iterations begin; by default the first, two between, the last
    stat: str = 'norm',           # statistic of `probe`
    probe: str = 'grad',          # where
    ax: Axes | None = None,
) -> Axes:                        # the Axes
    """A statistic along the network (x: layers in order) at a few moments, each the median over about ten iterations.

    Raises:
        KeyError: the statistic was not recorded at `probe`.
        ValueError: `iters` are not in the record.

    Example:
        plot_grad_flow(rec, iters=[0, 10], stat='abs_mean')
    """
    key  = (probe, stat)
    v    = read(rec, key)
    idx  = weight_layers(rec, probe)
    x    = when(rec, key)
    rows = np.nonzero(~np.isnan(v).all(1))[0]
    span = int(np.clip(len(rows) // 4, 1, 10)) if iters is None else 10              # of a moment: no two overlap
    if iters is None: starts = np.unique(np.linspace(0, max(len(rows) - span, 0), 4).astype(int)) if len(rows) else []
    else:             starts = _starts(iters, x[rows], key)
    long = max(map(len, names_at(rec, probe, idx)), default=0) if len(idx) > 12 else 0       # names that stand upright
    ax   = new_ax(ax, float(np.clip(.2 * len(idx) + 5, 7, 15)), 4.2 + .075 * long)
    drawn = []
    for s, c in zip(starts, DEPTH(np.linspace(0, 1, max(len(starts), 2)))):
        r = rows[s:s + span]
        drawn.append(nanmedian(v[np.ix_(r, idx)]))
        _draw_moment(ax, drawn[-1], c, f'{x[r[0]]} to {x[r[-1]]}' if len(r) > 1 else f'{x[r[0]]}')
    flat = np.concatenate(drawn) if drawn else np.array([np.nan])
    if np.isfinite(flat).any() and np.nanmin(flat) >= 0 and (flat > 0).any(): log_axis(ax.yaxis)
    if not np.isfinite(flat).any(): say_nothing(ax, rec, ticks=False)
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

def _draw_moment(ax, y, color, name):
    "A line along the layers; exact zeros have no place on a log scale and are marked below."
    ax.plot(np.arange(len(y)), np.where(y == 0, np.nan, y), 'o-', color=color, ms=4, lw=1.5, label=name)
    z = np.nonzero(y == 0)[0]
    if len(z): ax.plot(z, np.full(len(z), .015), 'v', color=color, ms=6, transform=ax.get_xaxis_transform(), gid='zero')

def _starts(iters, measured, key):
    "Which of the measured iterations each moment of `iters` begins at."
    iters = list(iters) if isinstance(iters, (list, tuple, range, np.ndarray)) else [iters]
    wrong = [i for i in iters if isinstance(i, bool) or not isinstance(i, (int, np.integer))]
    if wrong or not iters: raise ValueError(f"iters={wrong[0] if wrong else iters!r}; give the iterations at which to "
                                            f"look, whole numbers such as [0, 100]")
    wrong = [i for i in iters if not len(measured) or not measured[0] <= i <= measured[-1]]
    if wrong: raise ValueError(f"iterations {wrong} are not in the record; measured at {key} were "
                               f"{f'{measured[0]} to {measured[-1]}' if len(measured) else 'none'}")
    return [int(np.searchsorted(measured, i)) for i in iters]
