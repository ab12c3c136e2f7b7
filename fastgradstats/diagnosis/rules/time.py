"Rules about time: gradients that fade from one time step to the one before."
from __future__ import annotations

import re

import numpy as np

from ..fixes import advise
from ..._text import num
from ..evidence import lasting, run, trailing
from ..finding import Finding, rule, severity, stuck

FEW = 5                           # calls of a module below which they are no time


def steps(rec):
    "(module, its calls in order) of what ran FEW times or more in one forward pass, the calls kept apart (per_call)."
    if not (rec.meta.get('config') or {}).get('per_call'): return
    table = next((rec.layers[p] for p in ('grad_output', 'activation') if p in rec.layers), None)
    calls = {}
    for l in table.layer if table is not None else ():
        m = re.fullmatch(r'(.*):(\d+)', l)
        if m: calls.setdefault(m[1], []).append((int(m[2]), l))
    for name, found in calls.items():
        if len(found) >= FEW: yield name, [l for _, l in sorted(found)]

def in_time(rec): return any(True for _ in steps(rec))


@rule(needs=[('grad_output', 'norm')], where=in_time,
      source='Bengio 1994, Pascanu 2013 (arXiv 1211.5063): |dh_T/dh_t| is a product of T - t Jacobians. Limit: as '
             'vanishing, over at least half of the time')
def vanishing_through_time(rec, limit=1e-3, least=.5):
    "The gradient fades on its way back through time: what came early cannot be learned from."
    r = run(rec)
    for name, calls in steps(rec):
        v = trailing(r.get('grad_output', 'norm', calls), few=3)                       # (row, time)
        with np.errstate(divide='ignore', invalid='ignore'): share = v / v[:, -1:]
        far  = np.cumprod((share >= limit)[:, ::-1], axis=1).sum(1)                    # steps back that it reaches
        hits = lasting((far < least * len(calls)) & (v[:, -1] > 0) & r.judged, 3)
        if not hits: continue
        (a, _), (_, b) = hits[0], hits[-1]
        lasts = b >= len(r) - 2
        reach = int(far[b])
        per   = share[b, -reach - 1] ** (1 / reach) if share[b, -reach - 1] > 0 else 0.
        fix   = {'init': 'orthogonal'}
        yield Finding('vanishing_through_time', calls[0], (r.began(a), int(r.iter[b])), float(share[b, 0]), limit,
                      severity(stuck(r), lasts),
                      f"on its way back through the {len(calls)} calls of {name} the gradient falls below {limit:g} of "
                      f"itself after {reach} (a factor {num(per)} a step); at the first call it is {num(share[b, 0])} "
                      f"of that at the last",
                      advise(fix, "a gated cell (LSTM with a forget bias of 1, GRU)"), fix,
                      tuple(calls[:len(calls) - reach]))
