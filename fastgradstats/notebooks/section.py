"One run, as it is shown below the cell that trained it: what it was, the verdict, a picture, the findings, the layers."
from __future__ import annotations

import base64
import io
from html import escape

import numpy as np
import pandas as pd

from .._text import num, pct
from ..diagnosis.report import diagnose
from ..record.select import nanmedian, weight_layers, weights
from . import changes
from .source import OURS

SHORT = 8                         # rows up to which a run is shown as two lines
GOOD  = .5, 2.                    # of an activation's std: where it should be at the start
COLOR = dict(critical='#b00020', warning='#a06000', info='#333333')

ELASTICITY, RATIO, NORM = ('grad', 'elasticity'), ('update', 'ratio'), ('grad', 'norm')
STD, DEAD               = ('activation', 'std'), ('activation', 'frac_dead')
STRIPS = dict(step_too_large=(ELASTICITY, RATIO), exploding=(NORM, RATIO), non_finite=(NORM, RATIO),
              unstable=(NORM, RATIO), step_too_small=(ELASTICITY, RATIO), not_stepped=(NORM, RATIO),
              not_zeroed=(NORM, RATIO),
              starved=(ELASTICITY, NORM), vanishing=(NORM, ELASTICITY), no_gradient=(NORM, RATIO),
              dead_units=(DEAD, ELASTICITY), saturated=(STD, NORM), bad_init=(STD, NORM))


def cell(run, before=None):
    "The section of a run: a code cell that loads its record, with what is shown as its outputs."
    from nbformat.v4 import new_code_cell, new_output
    report = diagnose(run.record)
    text   = _text(run, report, before)
    show   = [new_output('display_data', {'text/html': text, 'text/plain': f"{_head(run)}\n{said(run, report)}"})]
    if len(run.record) and not run.search:
        show.append(new_output('display_data', {'image/png': picture(run, report, before),
                                                'text/plain': f"the picture of {run.cell}"}))
    lines  = [f"# added by `fastgradstats run`: what {run.cell} trained",
              f"from fastgradstats import Record; rec = Record.load({run.file!r})"]
    return new_code_cell('\n'.join(lines), outputs=show, metadata=dict(tags=[OURS]))

def note(text):
    from nbformat.v4 import new_markdown_cell
    return new_markdown_cell(f"*fastgradstats: {text}*", metadata=dict(tags=[OURS]))

def line(run):
    "The run in a line of the terminal."
    return f"{run.name}, {changes.steps(run.record)}: {said(run, diagnose(run.record))}"

def said(run, report):
    from ..plots.overview import verdict
    return 'A search for a learning rate, which is not judged.' if run.search else verdict(run.record, report)

def worst(report):
    "The severity of the worst finding."
    seen = [f.severity for f in report.findings]
    return next((s for s in ('critical', 'warning') if s in seen), 'info')


# --- words -----------------------------------------------------------------------------------------------------------
def _head(run): return f"fastgradstats · {run.cell} trained {run.name}"

def _text(run, report, before):
    rec, cost = run.record, (run.record.meta.get('cost') or {}).get('percent')
    every = rec.iters.measured.mean() if len(rec) else 1
    about = [changes.model(rec), changes.optimizer(rec), changes.steps(rec),
             f"{'every step' if every == 1 else pct(every) + ' of the steps'} recorded"
             + (f", at {num(cost)} % of the training time" if cost is not None else '')]
    parts = [f"<h3>fastgradstats · {escape(run.cell)} trained <code>{escape(run.name)}</code></h3>",
             f"<p style='color:#666'>{escape(' · '.join(about))}</p>",
             f"<p style='color:{COLOR[worst(report) if not run.search else 'info']}'><b>"
             f"{escape(said(run, report))}</b></p>"]
    if not run.search:
        parts += [_findings(report), _against(run, before), _layers(rec, report)]
    return ''.join([*parts, f"<p style='color:#666'>Its record: <code>{escape(run.file)}</code></p>"])

def _findings(report):
    "A line a finding, none where the verdict is all."
    items = [f"<li><b>{escape(f.rule)}</b> ({f.severity}{', ' + escape(f.layer) if f.layer else ''}, from iteration "
             f"{f.iters[0]}): {escape(f.evidence)}</li>" for f in report.findings]
    return f"<ul>{''.join(items)}</ul>" if items else ''

def _against(run, before):
    if before is None: return ''
    what = changes.changed(run.record, before.record)
    what = '; '.join(what) or 'nothing that is recorded changed'
    return f"<p>Against {escape(before.cell)}, the run before it: {escape(what)}.</p>"

def _layers(rec, report):
    "Every weight and every activation, at the first and at the last measured row."
    tables = [t for t in (_weights(rec, report), _activations(rec, report)) if t is not None]
    html   = ''.join(t.to_html(index=False, border=0, escape=True) for t in tables)
    unseen = {**rec.meta.get('not_hooked', {}), **rec.meta.get('not_observed', {})}
    html  += ''.join(f"<p>Not observed: {escape(n)}, {escape(str(why))}.</p>" for n, why in unseen.items())
    return f"<details><summary>layers</summary>{html}</details>" if html else ''

def _span(v):
    "First → last finite value of every column, as text.  # (row, layer)"
    out = []
    for c in v.T:
        c = c[~np.isnan(c)]
        out.append(f"{num(c[0])} → {num(c[-1])}" if len(c) else '–')
    return out

def _weights(rec, report):
    names = weights(rec)
    if not names or NORM not in rec: return None
    at    = weight_layers(rec, 'grad')
    d     = pd.DataFrame(dict(weight=names, gradient=_span(rec[NORM][:, at])))
    if ELASTICITY in rec: d['elasticity'] = _span(rec[ELASTICITY][:, at])
    if RATIO in rec: d['step / weight'] = [num(x) for x in nanmedian(rec[RATIO][:, weight_layers(rec, 'update')])] \
        if rec.layers['update'].layer.iloc[weight_layers(rec, 'update')].tolist() == names else '–'
    return d.assign(verdict=_verdicts(report, 'grad', names))

def _activations(rec, report):
    if STD not in rec or not rec[STD].size: return None
    names = rec.layers['activation'].layer.tolist()
    d     = pd.DataFrame(dict(activation=names, std=_span(rec[STD])))
    if ('activation', 'mean') in rec: d.insert(1, 'mean', _span(rec['activation', 'mean']))
    if DEAD in rec and len(rec[DEAD]): d['dead'] = [pct(x) for x in rec[DEAD][-1]]
    return d.assign(verdict=_verdicts(report, 'activation', names))

def _verdicts(report, probe, names):
    by = report.layers[report.layers.probe == probe].set_index('layer').verdict.to_dict() if len(report.layers) else {}
    return [by.get(n, '') for n in names]


# --- the picture -----------------------------------------------------------------------------------------------------
def picture(run, report, before=None):
    "The figure of a run, as base64 of a PNG."
    import matplotlib
    import matplotlib.pyplot as plt
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, 'backend': matplotlib.get_backend()}):
        fig = _short(run.record) if len(run.record) <= SHORT else _long(run, report, before)
        out = io.BytesIO()
        fig.savefig(out, format='png', dpi=80)
        plt.close(fig)
    return base64.b64encode(out.getvalue()).decode()

def _short(rec):
    "Loss and elasticity."
    import matplotlib.pyplot as plt
    from ..plots.lines import plot_lines
    from ..plots.overview import loss_panel
    fig, axs = plt.subplots(1, 2, figsize=(11, 2.6), layout='constrained')
    loss_panel(axs[0], rec)
    if ELASTICITY in rec: plot_lines(rec, ELASTICITY, layers=weights(rec) or None, ax=axs[1])
    return fig

def _long(run, report, before):
    "Loss and the activations' std, and below two strips that the finding chooses."
    import matplotlib.pyplot as plt
    from ..plots.axes import iter_axis
    from ..plots.heat import draw_heat
    from ..plots.labels import label
    rec    = run.record
    main   = next((f for f in report.findings if f.severity != 'info'), None)
    strips = [k for k in STRIPS.get(main.rule if main else '', (ELASTICITY, RATIO)) if k in rec and rec[k].size]
    rows   = [weight_layers(rec, k[0]) for k in strips]
    tall   = [2.4, *(np.clip(.15 * len(r) + .6, 1., 3.) for r in rows)]
    fig    = plt.figure(figsize=(11, sum(tall) + .6), layout='constrained')
    grid   = fig.add_gridspec(len(tall), 2, height_ratios=tall)
    tops   = fig.add_subplot(grid[0, 0]), fig.add_subplot(grid[0, 1])
    _loss(tops[0], run, before, main)
    _std(tops[1], rec)
    for ax in tops: ax.set_xlim(rec.iters.iter.iloc[0] - .5, rec.iters.iter.iloc[-1] + .5)
    for k, (key, idx) in enumerate(zip(strips, rows), 1):
        ax = fig.add_subplot(grid[k, :])
        draw_heat(ax, rec, key, idx, name=False, log=False if key[1].startswith('frac_') else None)
        ax.set_title(label(rec, key, idx), loc='left', fontsize=9)
        if main: ax.axvline(main.iters[0], color=COLOR['critical'], lw=1)
        if k == len(strips): iter_axis(ax, rec)
    return fig

def _loss(ax, run, before, main):
    from ..plots.overview import loss_panel
    loss_panel(ax, run.record)
    it = run.record.iters
    if before is not None and np.isfinite(before.record.iters.loss).any():
        old = before.record.iters
        low, high = ax.get_ylim()
        ax.plot(old.iter - old.iter.iloc[0] + it.iter.iloc[0], old.loss, color='.6', lw=1, zorder=0, label=before.cell)
        ax.set_ylim(min(low, np.nanmin(old.loss)), high)
        ax.legend(frameon=False, fontsize=8, loc='lower left', bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0)
    if main: ax.axvline(main.iters[0], color=COLOR['critical'], lw=1)

def _std(ax, rec):
    from ..plots.axes import say
    from ..plots.lines import plot_lines
    if STD not in rec or not rec[STD].size: say(ax, "the activations' std was not recorded"); return
    plot_lines(rec, STD, ax=ax, log=True)
    ax.axhspan(*GOOD, color='.9', zorder=0)
    ax.set_title(f'std of each activation (grey: {GOOD[0]} to {GOOD[1]:g})', loc='left', fontsize=9)
    ax.set_ylabel('')
