"One run judged: what we and the others say of it, by what is recorded by default."
from __future__ import annotations

import numpy as np
import pandas as pd

from fastgradstats import Record, diagnose
from fastgradstats.diagnosis.evidence import run as evidence

from .cases import CASES
from .others import OTHERS
from .training import path, runs

EXTRA   = {('activation', 'frac_saturated'), ('weight', 'std')}
SLICES  = (20, 30, 40, 60, 80, 120)
STARVES = {'starved', 'vanishing', 'bad_init'}         # faults of which starvation is the effect


def upto(rec, n):
    "The first n rows of a record."
    it   = rec.iters
    last = it.iter.iloc[min(n, len(it)) - 1]
    wins = {k: w[w.last_iter <= last] for k, w in rec.windows.items()}
    vals = {k: rec[k][:len(wins[k])] if k in wins else rec[k][:n] for k in rec.keys()}
    return Record(it.iloc[:n], vals, rec.layers, wins, None, rec.epochs, rec.bins, rec.meta)

def by_default(rec):
    "A record without what earlier ones of the zoo had beside the defaults."
    make, (iters, values, *rest) = rec.__reduce__()
    return make(iters, {k: v for k, v in values.items() if k not in EXTRA}, *rest)

def alarms(report): return [f for f in report.findings if f.severity != 'info']

def detected(rec, truth):
    "Rows after which a right rule is named first."
    for n in SLICES:
        if n >= len(rec): return None
        early = alarms(diagnose(upto(rec, n)))
        if early and early[0].rule in truth: return n

def module(rec, layer):
    "The module of a parameter or of an activation."
    for d in rec.layers.values():
        hit = d.module[d.layer == layer]
        if len(hit): return hit.iloc[0]
    return layer

def verdict(name, sick, rec):
    "What we and the others say of one run; `best`: the fault's own name is first, `right`: an accepted one is."
    rec    = by_default(rec)
    c, rep = CASES[name], diagnose(rec)
    bad    = alarms(rep)
    first  = bad[0].rule if bad else ''
    layer  = module(rec, bad[0].layer) if bad else ''
    right  = sick and first in c.truth
    r      = evidence(rec)
    return dict(case=name, sick=sick, alarm=bool(bad), first=first, best=sick and first == c.best, right=right,
                gain=r.best_constant - np.median(r.loss[-20:]),
                when=detected(rec, c.truth) if right else None,
                layer=layer, guilty=c.guilty if sick else '', at_fault=bool(layer) and layer in (c.guilty, c.site),
                converged=rep.verdict.startswith('Converged'), starved=any(f.rule == 'starved' for f in bad),
                starves=sick and bool(STARVES & set(c.truth)), **{t: bool(f(r)) for t, f in OTHERS.items()})

def judged(out, seeds, half, only='*'):
    "A row for every recorded run of a half."
    rows = []
    for name, sick in runs(only, half):
        for seed in range(seeds):
            p = path(out, name, sick, seed)
            if p.exists(): rows.append(dict(seed=seed, **verdict(name, sick, Record.load(p))))
    return pd.DataFrame(rows)
