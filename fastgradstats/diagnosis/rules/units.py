"Rules about units: dead ones, and bounded activation functions at their bounds."
from __future__ import annotations

import numpy as np

from ..fixes import advise, signal, slower, weights
from ..._text import pct
from ..evidence import WINDOW, run
from ..finding import Finding, Unreadable, medians, named, rule, spike, stuck, thrives, told
from ..thresholds import DEAD, DEAD_JUMP, WHOLE


@rule(needs=[('activation', 'frac_dead')],
      source='torchdiag: over 20 % of the units warns, over 50 % is critical; SM DeadRelu flags over 50 %. Only over '
             'half, as healthy small ReLU nets lose a fifth (zoo)')
def dead_units(rec, limit=DEAD):
    "Units whose output did not vary over a whole window, whatever the input."
    r    = run(rec)
    v    = rec['activation', 'frac_dead']
    wins = rec.windows['activation', 'frac_dead']
    if not len(v): raise Unreadable("no window of iterations is complete yet")
    names = rec.layers['activation'].layer.to_numpy()
    end   = np.nan_to_num(v[-1])
    peak  = np.nanmax(np.nan_to_num(v), axis=0)
    if not (peak > limit).any(): return
    now   = (end > limit).any()
    hit   = end > limit if now else peak > limit
    k     = int(hit.argmax())
    w     = int((np.nan_to_num(v[:, k]) > limit).argmax())
    born  = w == 0
    since = int(wins.first_iter[w])
    share = float(end[k] if now else peak[k])
    big, at = None, 0
    if not born:
        upto = int(np.searchsorted(r.iter, wins.last_iter[w], 'right')) - 1
        big  = spike(r, upto, back=int(upto - np.searchsorted(r.iter, wins.first_iter[w - 1])) + 1)
        at   = int(np.searchsorted(r.iter, big[0])) if big else upto
    how   = ("before the first step already" if r.silent_at_first(names[k]) else
             "born dead, or dead within the first window" if born else
             f"died in iterations {wins.first_iter[w]} to {wins.last_iter[w]}"
             + (f", after {told(big)}" if big else ''))
    fix   = {**weights(r), 'activation': 'leaky_relu'} if born else slower(r, at)
    fine  = not now or thrives(r) and share <= DEAD_JUMP or thrives(r, .5) and share < WHOLE
    yield Finding('dead_units', names[k], (big[0] if big else since, int(wins.last_iter.iloc[-1])), share, limit,
                  'info' if fine else 'critical' if stuck(r) else 'warning',
                  f"{pct(share)} of the units of {names[k]} do not vary over any example ({how})"
                  + (f"; also in {named(list(names[hit])[1:])}" if hit.sum() > 1 else '')
                  + ('' if now else '; they came back'),
                  advise(fix, *([] if born else ["warm-up"])), fix, tuple(names[hit]))


@rule(needs=[[('activation', 'frac_saturated'), ('activation', 'hist')]],
      source='torchmortem: |x| > .95 for over 50 %; Karpathy: |tanh| > .97')
def saturated(rec, limit=.5):
    "Bounded activation functions sit at their bounds, where their slope is zero."
    r    = run(rec)
    acts = rec.layers['activation']
    if ('activation', 'frac_saturated') in rec: v = r.get('activation', 'frac_saturated')
    else:                                       v = _saturation_of_hist(rec, acts)
    if not np.isfinite(v).any(): return
    start, end = (np.nan_to_num(medians(x)) for x in (v[:WINDOW], v[-WINDOW:]))
    hit = end > limit
    if not hit.any(): return
    k     = int(hit.argmax())
    early = start[k] > limit
    fine  = thrives(r) and (end[k] < WHOLE or hit.mean() < .5)                     # a gate or two may be shut
    anew  = signal(r) if r.off_scale else {}
    fix   = {**anew, 'init': 'xavier', **_unscaled(r)} if early else {'norm': 'batch'}
    yield Finding('saturated', acts.layer[k], (int(r.iter[0 if early else -1]), int(r.iter[-1])), float(end[k]), limit,
                  'critical' if stuck(r) else 'info' if not early or fine else 'warning',
                  f"{pct(end[k])} of {acts.layer[k]} ({acts.type[k]}) lies within 3 % of its bounds"
                  f"{' from the start' if early else f', {pct(start[k])} at the start'}"
                  + (f"; also {named(list(acts.layer[hit])[1:])}" if hit.sum() > 1 else ''),
                  advise(fix), fix, tuple(acts.layer[hit]))

def _unscaled(r, large=3.):
    "The fix for inputs that are far from a standard deviation of 1, where that was recorded."
    s = medians(r.get('input', 'std')) if ('input', 'std') in r.rec else np.zeros(1)
    return {'input': 'normalize'} if (s > large).any() else {}

def _saturation_of_hist(rec, acts):
    "Share of each bounded activation beyond .875 of its bound, the nearest edges of the bins.  # (window, layer)"
    h, edges = rec['activation', 'hist'].astype(float), rec.bins.edges
    out = np.full(h.shape[:2], np.nan)
    for k, t in enumerate(acts.type):
        if t in ('Tanh', 'Softsign', 'Hardtanh'): bins = (edges[:-1] >= .875) | (edges[1:] <= -.875)
        elif t in ('Sigmoid', 'Hardsigmoid'):     bins = (edges[:-1] >= .875) | (edges[1:] <= 2. ** -6)
        else: continue
        with np.errstate(invalid='ignore', divide='ignore'):
            out[:, k] = h[:, k, 1:388][:, bins].sum(1) / h[:, k].sum(1)
    return out
