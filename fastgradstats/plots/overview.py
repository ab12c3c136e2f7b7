"One figure for the first five minutes: every layer at every iteration, under the loss."
from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np

from ..diagnosis.report import diagnose
from ..record.record import Record
from ..record.select import check_record, names_at, weight_layers
from ..record.summary import facts
from .axes import PALETTE, iter_axis, layer_ticks, log_axis, mark_epochs, say, tidy, wants_log
from .heat import draw_heat
from .labels import label


def plot_overview(
    rec: Record,
    *,
    title: str | None = None,     # a sentence above all; by default the verdict of `diagnose`, or else the facts
    save: str | None = None,      # path of an image to write
) -> np.ndarray:                  # array of six Axes
    """One figure for the first five minutes: every layer at every iteration, under the loss.

    Raises:
        TypeError: it is no Record. What was not recorded is said in its panel.

    Example:
        plot_overview(learn.layer_stats, save='run.png')
    """
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
    loss_panel(axs[0], rec)
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
    fig.suptitle(verdict(rec, diagnose(rec)) if title is None else title, fontsize=11, x=.01, ha='left', wrap=True)
    fig.draw_without_rendering()                                     # now it is known how much room the names have
    for ax, key, idx in zip(axs[1:], found, rows):
        if key: layer_ticks(ax, names_at(rec, key[0], idx))
    if save is not None: fig.savefig(save, dpi=150)
    return axs

def loss_panel(ax, rec):
    "The loss, and what answering without looking at the input would cost."
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

def verdict(rec, report):
    "The verdict on the record; the facts where too little was measured for one."
    return report.verdict if report.findings or len(rec) > 20 and report.checked else _facts(rec)

def _facts(rec):
    "What happened, in a sentence or two: only numbers of the record."
    text = '; '.join(facts(rec).split('\n')[bool(rec.iters.measured.any()):])
    return text[:1].upper() + text[1:] + '.'
