"The end of a notebook: a table of all its runs, what failed, and runs of the same layers compared."
from __future__ import annotations

from html import escape

import numpy as np

from .._text import num
from ..comparison.comparison import compare
from ..diagnosis.outcome import outcome
from ..diagnosis.report import diagnose
from ..record.select import weight_layers, weights
from . import changes
from .section import COLOR, ELASTICITY, STD, worst
from .source import OURS

FIRST  = 3                        # rows over which the elasticity at the start is read
COLUMNS = ('cell', 'trained', 'what changed', 'steps', 'loss', 'activation std at the first step<br>first / last layer',
           f'elasticity<br>of the first {FIRST} steps', 'what it says')


def cell(runs, failures=(), lacking=0, shims=()):
    "The index, as a code cell with its table as output."
    from nbformat.v4 import new_code_cell, new_output
    html = ['<h3>fastgradstats · every run of this notebook</h3>',
            _table(runs) if runs else '<p>Nothing was trained.</p>', _compared(runs), _failed(failures, lacking)]
    if shims: html.append(f"<p>Helped over by: {escape(', '.join(shims))}.</p>")
    text = f"{len(runs)} run{'s' * (len(runs) != 1)} recorded"
    return new_code_cell('# added by `fastgradstats run`: every run of this notebook', metadata=dict(tags=[OURS]),
                         outputs=[new_output('display_data', {'text/html': ''.join(html), 'text/plain': text})])

def _table(runs):
    rows, before = [], None
    for run in runs:
        report = None if run.search else diagnose(run.record)
        color  = '#f2f2f2' if run.search else {'critical': '#fdd', 'warning': '#fff3d6'}.get(worst(report))
        style  = f" style='background:{color};color:#000'" if color else ''
        rows.append(f"<tr{style}>{''.join(f'<td>{escape(c)}</td>' for c in _row(run, report, before))}</tr>")
        if not run.search: before = run
    head = ''.join(f'<th>{c}</th>' for c in COLUMNS)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"

def _row(run, report, before):
    "The texts of a line of the table."
    rec  = run.record
    what = ('a search for a learning rate' if report is None else changes.model(rec) if before is None else
            '; '.join(changes.changed(rec, before.record)) or 'nothing that is recorded')
    std  = changes.first(rec, STD)
    e    = rec[ELASTICITY][:FIRST, weight_layers(rec, 'grad')] if ELASTICITY in rec else np.array([])
    loss = rec.iters.loss
    return (run.cell, run.name, what, f'{len(rec):,}', f"{num(loss.iloc[0])} → {num(loss.iloc[-1])}",
            f"{num(std[0])} / {num(std[-1])}" if len(std) else '–',
            num(np.nanmedian(e)) if np.isfinite(e).any() else '–',
            'not judged' if report is None else _says(rec, report))

def _says(rec, report):
    "The rules that found something, or else how it is doing, in few words."
    rules = [f.rule for f in report.findings if f.severity != 'info']
    story = report.story if report.story.startswith('Too few') else outcome(rec).sentence
    return ', '.join(rules) or story.split(' (')[0]

def _compared(runs):
    "What compare says of the runs that have the same layers."
    groups = {}
    for run in runs:
        if not run.search and weights(run.record): groups.setdefault(tuple(weights(run.record)), []).append(run)
    out = []
    for some in groups.values():
        if len(some) < 2: continue
        names = [r.cell if [s.cell for s in some].count(r.cell) == 1 else f"{r.cell} {r.name} ({k})"
                 for k, r in enumerate(some)]
        c = compare({n: r.record for n, r in zip(names, some)})
        out.append(f"<details><summary>{escape(', '.join(names))} compared</summary><pre>{escape(repr(c))}</pre>"
                   f"</details>")
    return ''.join(out)

def _failed(failures, lacking):
    if not failures: return ''
    items = ''.join(f"<li>{escape(f.cell)}: {escape(f.says)}</li>" for f in failures)
    more  = f"<p>{lacking} more lacked a name that these would have made.</p>" if lacking else ''
    return f"<p style='color:{COLOR['critical']}'>Cells that failed:</p><ul>{items}</ul>{more}"
