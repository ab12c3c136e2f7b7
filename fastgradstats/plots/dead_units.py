"Dead units of every layer, by windows."
from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from ..record.record import Record
from ..record.schema import DEAD_UNITS
from ..record.select import names_at, pick_layers, read
from .axes import NONFINITE, colour_bar, fit, iter_axis, new_ax
from .heat import draw_heat
from .labels import label

LEAKY = ("Dead: the unit's output never varied over the window. "
         "A leaky unit is never dead in this sense, by construction.")


def plot_dead_chart(
    rec: Record,                  # with ('activation', 'frac_dead')
    *,
    layers: str | int | list | None = None,   # name, glob, index or a list of these
    ax: Axes | None = None,
) -> Axes:                        # the Axes
    """Share of dead units of every layer over the windows and, where recorded, how many were born dead, died, revived.

    Raises:
        KeyError: 'frac_dead' was not recorded.
        ValueError: no layer matches `layers`.

    Example:
        plot_dead_chart(rec, layers=[0, -1])
    """
    read(rec, DEAD_UNITS)
    idx = pick_layers(rec, 'activation', layers)
    ax  = new_ax(ax, 10, np.clip(.24 * len(idx) + 1.9, 2.8, 12))
    mesh = draw_heat(ax, rec, DEAD_UNITS, idx, log=False, bar=False)
    units = rec.units
    if len(units): _count_states(ax, units, names_at(rec, 'activation', idx))
    cb = colour_bar(ax, mesh, ax.get_window_extent().height / ax.figure.dpi, pad=.02, fraction=.04, aspect=20)
    cb.set_label(fit(ax, label(rec, DEAD_UNITS), 9), fontsize=9)
    cb.ax.yaxis.set_major_formatter(PercentFormatter(1))
    if not np.isfinite(mesh.get_array()).any(): cb.set_ticks([])
    iter_axis(ax, rec)
    ax.set_xlabel(f'{ax.get_xlabel()}\n{LEAKY}')
    ax.xaxis.label.set_fontsize(8.5)
    ax.set_ylabel('layer')
    ax.set_title('Dead units, by window', loc='left', fontsize=10, pad=22 if len(units) else None)
    return ax

def _count_states(ax, units, names):
    "Beside each layer of the chart how many of its units were in which state in the last window."
    size  = ax.get_yticklabels()[0].get_fontsize() if names else 8
    last  = units[units.window == units.groupby('layer').window.transform('max')]
    count = last.groupby(['layer', 'state']).size().unstack(fill_value=0)
    heads = ['units', 'born dead', 'died', 'revived'] + ['non-finite'] * ('non-finite' in count)
    for j, h in enumerate(heads):
        x = 1.035 + .068 * j
        ax.text(x, 1.015, h.replace(' ', '\n').replace('-', '-\n'), transform=ax.transAxes, ha='center', va='bottom',
                fontsize=8, color='.3')
        for i, n in enumerate(names):
            if n not in count.index: continue
            k    = int(count.loc[n].sum() if h == 'units' else count.loc[n].get(h, 0))
            look = dict(color='.3' if h == 'units' else '.7')
            if k and h != 'units': look = dict(color=NONFINITE, fontweight='bold')
            ax.text(x, i, str(k), transform=ax.get_yaxis_transform(), ha='center', va='center', fontsize=size, gid=h,
                    **look)
    ax.text(1.035 + .034 * (len(heads) - 1), -.03, 'state in the last window', transform=ax.transAxes, ha='center',
            va='top', fontsize=7.5, color='.3')
