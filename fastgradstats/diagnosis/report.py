"""`diagnose`: the rules' findings in order of cause, a verdict for every layer, and one sentence for the network."""
from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from .._text import join, layer, num, plain
from .evidence import Judged, run
from .series import FEWEST
from ..record.record import DERIVED, Record, to_record
from .rules import ALL, Finding, Unreadable
from .outcome import VERDICTS, Outcome, layer_verdicts                                           # noqa: F401
from .ranking import Ranking
from .thresholds import SETTLE


class Skipped(NamedTuple):
    "A rule that could not judge, why, and what to record."
    rule: str
    why:  str
    how:  str

class Report:
    """What `diagnose` found: `verdict`, `findings`, `checked`, `skipped`, `layers`.

    Example:
        report: Report = diagnose(rec)
        report.verdict, report.ok, report.critical
        [f.rule for f in report.findings]
    """
    def __init__(self,
        story: str,                   # the verdict without its advice
        findings: list[Finding],      # in the order of cause
        checked: list[str],           # the rules that could judge
        skipped: list[Skipped],       # those that could not, why, and what to record
        layers: pd.DataFrame,         # the verdict on every layer
        trials: dict | None = None,   # before and after each fix, from verify=True
    ):
        self.story, self.findings, self.layers = story, findings, layers
        self.checked, self.skipped = checked, skipped
        self.trials = trials

    @property
    def verdict(self):
        "One sentence: what is wrong and what to try first, or how it is doing."
        advice = next((f.first or f.advice for f in self.findings if f.severity != 'info'), '')
        return self.story + (f" First try: {advice}." if advice else '')

    @property
    def critical(self): return any(f.severity == 'critical' for f in self.findings)
    @property
    def ok(self):
        "Whether nothing of severity warning or worse was found."
        return all(f.severity == 'info' for f in self.findings)

    def _tried(self, f): return (self.trials or {}).get(f.rule, '')

    def __repr__(self):
        out = [self.verdict]
        for k, f in enumerate(self.findings, 1):
            a, b = f.iters
            span = f"iterations {a} to {b}" if a != b else f"iteration {a}"
            out.append(f"\n{k}. {f.rule} ({f.severity}){f' in {layer(f.layer)}' if f.layer else ''}, {span}\n"
                       f"   {_sentence(f.evidence)}")
            if f.severity != 'info' and f.advice: out.append(f"   Try: {f.advice}.")
            if self._tried(f): out.append(f"   Tried: {self._tried(f)}")
        if len(self.layers):
            by   = self.layers.groupby('verdict', sort=False).layer.apply(list)
            some = lambda ls: ', '.join(ls[:6]) + (f' and {len(ls) - 6} more' if len(ls) > 6 else '')
            out.append('\nLayers: ' + '; '.join(f"{v}: {some(ls)}" for v, ls in by.items()))
        out.append(f"\nChecked: {', '.join(self.checked) or 'nothing'}.")
        for s in self.skipped: out.append(f"Skipped: {s.rule}, {s.why}." + (f" {s.how}" if s.how else ''))
        return '\n'.join(out)

    def _repr_html_(self):
        table = self.layers.to_html(index=False, na_rep='–', float_format=num) if len(self.layers) else ''
        rows  = ''.join(map(self._row, self.findings))
        found = (f"<table><tr><th>finding</th><th>where, iterations</th><th>evidence</th></tr>{rows}</table>"
                 if rows else '')
        skip  = ''.join(f"<li>{escape(s.rule)}: {escape(s.why)}. {escape(s.how)}</li>" for s in self.skipped)
        return (f"<p><b>{escape(self.verdict)}</b></p>{found}<details><summary>layers</summary>{table}</details>"
                f"<p>Checked: {', '.join(self.checked) or 'nothing'}.</p>"
                + (f"<p>Skipped:</p><ul>{skip}</ul>" if skip else ''))

    def _row(self, f):
        color = dict(info='#555', warning='#a60', critical='#b00')[f.severity]
        says  = [escape(_sentence(f.evidence))]
        if f.severity != 'info' and f.advice: says.append(f"<i>Try:</i> {escape(f.advice)}.")
        if self._tried(f):                    says.append(f"<i>Tried:</i> {escape(self._tried(f))}")
        return (f"<tr><td style='color:{color};vertical-align:top'><b>{escape(f.rule)}</b><br>{f.severity}</td>"
                f"<td style='vertical-align:top'>{escape(layer(f.layer))}<br>{f.iters[0]}–{f.iters[1]}</td>"
                f"<td style='text-align:left'>{'<br>'.join(says)}</td></tr>")

    def json(self):
        "Everything as plain lists and dicts; numbers that are not finite are None."
        tried = {} if self.trials is None else dict(trials=self.trials)
        return plain(dict(verdict=self.verdict, critical=self.critical, findings=[f._asdict() for f in self.findings],
                           checked=list(self.checked), skipped=[s._asdict() for s in self.skipped],
                           layers=self.layers.to_dict('records'), **tried))

def _sentence(s): return s[:1].upper() + s[1:] + '.'

def diagnose(
    rec: Record | Any,                    # a Record, or a Learner (its layer_stats)
    rules: Sequence[Callable] = ALL,      # functions of a Record that yield Findings
    *,
    verify: bool = False,                 # try a Learner's first fix on a copy for 50 iterations, show before and after
) -> Report:
    """What is wrong, where, since when, on what evidence, what to do. What was not measured is skipped, never healthy.

    Raises:
        TypeError: `rec` is neither a Record nor a Learner.
        ValueError: the Learner has recorded nothing; `verify` without a Learner.

    Example:
        diagnose(learn.layer_stats)
        diagnose(learn, verify=True)
    """
    if hasattr(rec, 'layer_stats'):
        if verify: return rec.diagnose(rules=rules, verify=True)                   # training: the callbacks' side
        rec = rec.layer_stats
    if rec is None: raise ValueError("this Learner has recorded nothing: fit it with cbs=LayerStatsCallback()")
    if not isinstance(rec, Record):
        load = f"; read the file first: diagnose(Record.load({str(rec)!r}))" if isinstance(rec, (str, Path)) else ''
        raise TypeError(f"diagnose takes a Record or a Learner that has one, got {type(rec).__name__}{load}")
    if verify: raise ValueError("verify=True trains a copy: give diagnose the Learner, not its record")
    with warnings.catch_warnings(), np.errstate(all='ignore'):     # what is not measured or not finite is expected here
        warnings.simplefilter('ignore', RuntimeWarning)
        return _judge(rec, rules)

def _judge(rec, rules):
    rec = Judged(rec)
    r   = rec.evidence
    findings, checked, skipped = [], [], []
    def skip(f, why, how=''): skipped.append(Skipped(f.__name__, why, how))
    for f in rules:
        if getattr(f, 'where', None) and not f.where(rec): continue
        lacks = missing(rec, f)
        if lacks: skip(f, f"{join([_said(k) for k in lacks])} not recorded", _how(rec, lacks)); continue
        if not len(r): skip(f, "no iteration was measured"); continue
        try: found = list(f(rec))
        except Unreadable as e: skip(f, str(e)); continue
        findings += found
        checked.append(f.__name__)
    ranking  = Ranking(rules, ALL)
    findings = ranking.sorted(r, findings)
    ends     = Outcome(r)
    story    = _story(ranking, ends, findings, checked, skipped)
    return Report(story, findings, checked, skipped, layer_verdicts(ends, findings))


# --- what a rule needs -----------------------------------------------------------------------------------------------
def missing(rec, rule):
    "The (probe, statistic) pairs that a rule needs and the record has not, or never measured."
    out = []
    for need in getattr(rule, 'needs', ()):
        options = need if isinstance(need, list) else [need]
        if not any(_has(rec, k) for k in options): out.append(options[0])
    return out

def _has(rec, key):
    probe, stat = key
    if probe == 'iters':
        v = rec.iters[stat].to_numpy(float)
        return bool(np.isfinite(v).any() or stat == 'loss' and run(rec).lost.any())
    return key in rec and rec[key].size > 0

def _said(key): return f"the {key[1].replace('_', ' ')}" if key[0] == 'iters' else f"{key[1]!r} of {key[0]!r}"

def _how(rec, keys):
    "How to record them."
    made_of = {('grad', 'elasticity'): [('grad', 'norm'), ('weight', 'norm')],
               ('update', 'ratio'):    [('update', 'norm'), ('weight', 'norm')]}
    want, out = {}, []
    for key in keys:
        if key[0] == 'iters': continue
        for probe, stat in made_of[key] if key in DERIVED and key in made_of else [key]:
            want.setdefault(probe, []).append(stat)
    if want: out.append(f"Record with {to_record(rec, want)}.")
    if any(p == 'iters' for p, _ in keys): out.append("In a plain loop give the loss to watch: w.loss(loss).")
    return ' '.join(out)


# --- the verdict -----------------------------------------------------------------------------------------------------
def _story(ranking, outcome, findings, checked, skipped):
    if any(f.severity != 'info' for f in findings): return ranking.story(findings)
    if not checked: return "Nothing could be checked."
    n = len(outcome.states)
    if n < SETTLE + FEWEST: \
        return f"Too few measured iterations to judge ({n}); no rule that could be checked found a fault."
    text = outcome.sentence
    learns = outcome.state in ('learning', 'converged')
    if findings: text += "; " + join([ranking.past(f, learns) for f in findings[:2]])
    if skipped:  text += f"; {len(skipped)} rule{'s' if len(skipped) > 1 else ''} could not be checked"
    return text + '.'
