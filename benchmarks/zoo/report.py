"""The zoo judged: our rules beside those of other tools on the same recordings; tables in Markdown.

The best name of a fault is the first of its case's truth: what the injector (faults.py) did, or what the case declares.
*Best name first* counts only that one; *an accepted name first* counts what may come of the fault as well."""
from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from .cases import CASES
from .judge import SLICES, STARVES, judged
from .mending import guilt
from .others import OTHERS


def pc(a, b):  return f"{a}/{b}" + (f" ({100 * a / b:.0f} %)" if b else '')
def ratio(v):  return pc(int(v.sum()), len(v))

def row(*cells): return '| ' + ' | '.join(str(c) for c in cells) + ' |'
def table(head, rows): return [row(*head), '|' + '---|' * len(head), *(row(*r) for r in rows), '']

def listed(d, what):
    "`case: what (seeds)` of some runs."
    said, out = d[what].replace('', 'nothing'), []
    for (c, w), g in d.groupby(['case', said], sort=False):
        seeds = 'all seeds' if len(g) > 4 else 'seed ' + ', '.join(map(str, g.seed))
        out.append(f"{c}: {w} ({seeds})")
    return '; '.join(out) or 'none'

def beside(d):
    "Alarms of all tools."
    sick, well = d[d.sick], d[~d.sick]
    head = ['rules', 'sick runs: best name first', 'an accepted name first', 'alarm', 'healthy runs: false alarm']
    ours = 'fastgradstats', *(ratio(v) for v in (sick.best, sick.right, sick.alarm, well.alarm))
    return table(head, [ours, *((t, '-', '-', ratio(sick[t]), ratio(well[t])) for t in OTHERS)])

def cell(g):
    "How often a rule was named first for a fault, and how often wrongly."
    wrong = int((~g.right & (g.sick | g.alarm)).sum())
    if not len(g): return ''
    return f"{len(g)}" if not wrong else f"**{wrong} wrong**" if wrong == len(g) else f"{len(g)} (**{wrong} wrong**)"

def confusion(d):
    "Faults, by the best name, against the rule named first; a cell counts as wrong what is not in its case's truth."
    fault = [CASES[n].best if s else 'healthy' for n, s in zip(d.case, d.sick)]
    d     = d.assign(fault=fault, said=d['first'].replace('', 'nothing'))
    known = [t for c in CASES.values() for t in c.truth] + sorted(set(d.said) - {'nothing'}) + ['nothing']
    rules = [r for r in dict.fromkeys(known) if (d.said == r).any()]
    rows  = [(f, *(cell(g[g.said == r]) for r in rules)) for f, g in d.groupby('fault', sort=False)]
    return table(['fault', *rules], rows)

def strict(d):
    "Converged against starved: starved is right where it is an effect of the fault, converged where nothing is wrong."
    star, conv = d[d.starved], d[d.converged]
    head  = star[star['first'] == 'starved']
    wrong = [star[~star.starves.astype(bool)].assign(called='starved'), conv[conv.sick].assign(called='converged')]
    count = lambda s: pc(int(s.starves.sum()) + int((~conv.sick).sum()), len(s) + len(conv))
    kinds = ', '.join(sorted(STARVES))
    twin  = d[~d.sick].set_index(['case', 'seed']).gain
    of    = twin.reindex(pd.MultiIndex.from_frame(star[['case', 'seed']])).to_numpy()
    poor  = star[star.sick & ~(star.gain >= .5 * of)]
    both  = pc(len(poor) + int((~conv.sick).sum()), len(star) + len(conv))
    return [f"Starved against converged, by the outcome: right {both}. A run called starved must end with less than "
            "half of its twin's gain; one called converged must be healthy.", '',
            f"By the cause: right {count(star)}; *starved* only where named first {count(head)}. A run called "
            f"starved must have a fault of {kinds}, though dead units, steps too large or a wrong input starve a net "
            "as well; one called converged must be healthy.", '',
            f"Called so for another cause: {listed(pd.concat(wrong), 'called')}.", '']

def number(v): return '-' if v != v else f"{v:.2f}" if abs(v) < 100 else '< -100' if v < 0 else '> 100'

def layers(d, g):
    "The layer of the first finding against the guilty one, where mending has proven it."
    d = d[d.guilty != '']
    g = g[g.index.isin(d.case)]
    if not len(d): return []
    if not len(g): said = "which layer is guilty was not proven: run `--mend`"
    else:
        d    = d[d.case.isin(g.index[g.proven])]
        said = (f"proven by mending for {ratio(g.proven)} pairs: with its values of the healthy twin the run "
                "reaches at least 90 % of the twin's gain, with another draw of any other layer it does not")
    named = lambda n: ratio(d[d.case == n].at_fault) if g.proven[n] else 'not proven'
    rows  = [(n, r.guilty, *map(number, (r.sick, r.mended, r.other)), named(n)) for n, r in g.iterrows()]
    head  = ['pair', 'guilty', "share of the twin's gain: sick", 'mended', 'another layer redrawn, the best', 'named']
    right = f"{ratio(d.at_fault)}; under the right name: {ratio(d.at_fault & d.right)}"
    return [f"The first finding's layer is the guilty one, or the activation right behind it: {right} ({said}).", '',
            f"Wrong layers: {listed(d[~d.at_fault], 'layer')}.", '', *(table(head, rows) if rows else [])]

def detection(sick):
    when = sick.when.dropna()
    if not len(when): return []
    early = pc(int((when <= 40).sum()), int(sick.right.sum()))
    return [f"First detection (looked for at rows {', '.join(map(str, SLICES))}): median {when.median():.0f}; "
            f"within 40 rows {early} of those rightly named.", '']

def tables(out, seeds, half, only='*'):
    "The Markdown of a half."
    d = judged(out, seeds, half, only)
    if not len(d): return ''
    sick, well = d[d.sick.astype(bool)], d[~d.sick.astype(bool)]
    pairs = sick.case.nunique()
    size  = f"{pairs} pairs, {well.case.nunique() - pairs} healthy foolers, {d.seed.nunique()} seeds: {len(d)} runs."
    other = sick[sick.right & ~sick.best]
    return '\n'.join([f"## {half} half", '', size, '', *beside(d), *confusion(d), *strict(d), *layers(d, guilt(out)),
                      *detection(sick), f"Not by the best name, but accepted: {listed(other, 'first')}.", '',
                      f"Misses: {listed(sick[~sick.right], 'first')}.", '',
                      f"False alarms: {listed(well[well.alarm], 'first')}.", ''])

def publish(a):
    "Print the tables, or write them into a file."
    for h in ('tuned', 'unseen') if a.half == 'both' else (a.half,):
        t = tables(a.out, a.seeds, h, a.only)
        if not t: continue
        print(t, flush=True)
        if a.markdown: put(a.markdown, h, t)

def put(file, half, text):
    "Write a half's tables into a file, between the comments that name the half."
    s, marks = Path(file).read_text(), (f"<!-- {half} -->", f"<!-- end of {half} -->")
    new = '\n'.join([marks[0], text, marks[1]])
    if marks[0] in s: s = re.sub(re.escape(marks[0]) + '.*?' + re.escape(marks[1]), lambda _: new, s, flags=re.S)
    else: s += '\n' + new + '\n'
    Path(file).write_text(s)
