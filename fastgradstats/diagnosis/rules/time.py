"Rules about time: gradients that fade from one time step to the one before."
from __future__ import annotations

import re

import numpy as np

from ..fixes import found
from ..._text import num
from ..evidence import run
from ..series import lasting, rolling_median
from ..finding import rule, severity

FEW = 5                           # calls of a module below which they are no time


def steps(rec):
    "(module, its calls in order) of what ran FEW times or more in one forward pass, the calls kept apart (per_call)."
    if not (rec.meta.get('config') or {}).get('per_call'): return
    table = next((rec.layers[p] for p in ('grad_output', 'activation') if p in rec.layers), None)
    calls = {}
    for l in table.layer if table is not None else ():
        m = re.fullmatch(r'(.*):(\d+)', l)
        if m: calls.setdefault(m[1], []).append((int(m[2]), l))
    for name, ran in calls.items():
        if len(ran) >= FEW: yield name, [l for _, l in sorted(ran)]

def in_time(rec): return any(True for _ in steps(rec))


@rule(cause='the gradient vanishes on its way back through time',
      explains=('vanishing', 'not_learning'),
      needs=[('grad_output', 'norm')], where=in_time,
      source='Bengio 1994, Pascanu 2013 (arXiv 1211.5063): |dh_T/dh_t| is a product of T - t Jacobians. Limit: as '
             'vanishing, over at least half of the time')
def vanishing_through_time(rec, limit=1e-3, least=.5):
    "The gradient fades on its way back through time: what came early cannot be learned from."
    r = run(rec)
    for name, calls in steps(rec):
        v = rolling_median(r.get('grad_output', 'norm', calls), few=3)                       # (row, time)
        with np.errstate(divide='ignore', invalid='ignore'): share = v / v[:, -1:]
        far  = np.cumprod((share >= limit)[:, ::-1], axis=1).sum(1)                    # steps back that it reaches
        hits = lasting((far < least * len(calls)) & (v[:, -1] > 0) & r.judged, 3)
        if not hits: continue
        (a, _), (_, b) = hits[0], hits[-1]
        lasts = b >= len(r) - 2
        reach = int(far[b])
        per   = share[b, -reach - 1] ** (1 / reach) if share[b, -reach - 1] > 0 else 0.
        fix   = {'init': 'orthogonal'}
        yield found(r, 'vanishing_through_time', layer=calls[0], layers=tuple(calls[:len(calls) - reach]),
                    iters=(r.began(a), int(r.iter[b])), value=float(share[b, 0]), limit=limit,
                    severity=severity(r, ended=not lasts, sign=True), fix=fix,
                    also=["a gated cell (LSTM with a forget bias of 1, GRU)"],
                    evidence=f"on its way back through the {len(calls)} calls of {name} the gradient falls below "
                             f"{limit:g} of "
                             f"itself after {reach} (a factor {num(per)} a step); at the first call it is "
                             f"{num(share[b, 0])} "
                             f"of that at the last")
