"Judgement of saved runs: what the diagnosis says of each beside what was declared; Markdown."
from __future__ import annotations

import json

import pandas as pd

from fastgradstats import Record, diagnose

from ..report import ratio, table


def judged(case, seed, file):
    "What was said of one run when it had ended, and while it trained (`kept`: the rules of then that are named still)."
    saved = json.loads(file.with_suffix('.json').read_text())
    rep   = diagnose(Record.load(file))
    named = [f.rule for f in rep.findings if f.severity != 'info']
    first = named[0] if named else ''
    live  = [s['rule'] for s in saved['said'] or []]
    return dict(run=f'{case.name} {seed}', sick=case.sick, covered=bool(case.best), declared=case.declared,
                first=first, alarm=bool(named), best=case.sick and first == case.best, right=first in case.truth,
                unsure='cannot be told' in rep.verdict, live=live, kept=[r in named for r in live],
                asked=saved['said'] is not None, verdict=' '.join(rep.verdict.split()), score=saved['score'])

def figures(d):
    "(what, how many of how many)"
    well, sick   = d[~d.sick], d[d.sick]
    known, other = sick[sick.covered], sick[~sick.covered]
    withdrawn    = lambda d: ratio(~pd.Series([k for ks in d.kept for k in ks], dtype=bool))
    return [('healthy runs: false alarm', ratio(well.alarm)),
            ('healthy Learners: warned of while they trained', ratio(well[well.asked].live.map(len) > 0)),
            ('warnings while training that the final report withdraws', withdrawn(d)),
            ('those of healthy runs', withdrawn(well)),
            ('faults that a rule covers: best name first', ratio(known.best)),
            ('an accepted name first', ratio(known.right)),
            ('no alarm', ratio(~known.alarm)),
            ('faults that no rule covers: silent, or an accepted name first', ratio(~other.alarm | other.right)),
            ('of the silent, told that it cannot be told', ratio(other.unsure[~other.alarm]))]

def report(runs):
    "The Markdown of those (case, seed, file) that are there."
    d = pd.DataFrame([judged(*r) for r in runs if r[2].exists()])
    if not len(d): return 'no run was saved there'
    said = lambda r: ', '.join(name + ('' if kept else ' (withdrawn)') for name, kept in zip(r.live, r.kept))
    rows = [(r.run, r.declared, r['first'] or '-', said(r) or '-', r.verdict, r.score) for _, r in d.iterrows()]
    return '\n'.join([*table(['', 'runs'], figures(d)),
                      *table(['run', 'declared', 'named first', 'while it trained', 'verdict', 'score'], rows)])
