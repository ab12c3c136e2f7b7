"Rules about units: dead ones, and bounded activation functions at their bounds."
from __future__ import annotations

import numpy as np

from ..fixes import found, signal, slower, weights
from ..._text import pct
from ..evidence import run
from ..series import WINDOW
from ..finding import Unreadable, medians, rule, severity, spike, told
from ..thresholds import DEAD, DEAD_JUMP, WHOLE


def _place(r, f, by):
    """Units stuck at a bound, to the last bit, are saturated; no step has done what was there before the first one;
    half of the units silent is an effect of signals that fade, unless they are dead of themselves."""
    if any(f.layer in g.layers for g in by.get('saturated', ())): return 'after', 'saturated'
    if r.silent_at_first(f.layer):                                   return 'before', 'step_too_large'
    if {'vanishing', 'starved'} & {*by} and not _dies_at_once(r, f): return 'after', 'starved'

def _dies_at_once(r, f):
    "Whether the units are dead of themselves: nearly all, or far more than in the activation before."
    dead = np.nan_to_num(r.rec['activation', 'frac_dead'][-1])
    k    = list(r.rec.layers['activation'].layer).index(f.layer)
    return f.value >= WHOLE or dead[k] - (dead[k - 1] if k else 0) >= DEAD_JUMP


@rule(cause='units are dead',
      explains=('vanishing', 'starved', 'not_learning'),
      place=_place,
      needs=[('activation', 'frac_dead')],
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
    yield found(r, 'dead_units', layer=names[k], layers=tuple(names[hit]),
                iters=(big[0] if big else since, int(wins.last_iter.iloc[-1])), value=share, limit=limit,
                severity=severity(r, ended=not now, sign=share < WHOLE, row=at), fix=fix,
                also=[] if born else ["warm-up"],
                evidence=f"{pct(share)} of the units of {r.called([names[k]])} do not vary over any example ({how})"
                         + (f"; also in {r.called(names[hit][1:])}" if hit.sum() > 1 else '')
                         + ('' if now else '; they came back'))


@rule(cause='activations are saturated',
      explains=('dead_units', 'vanishing', 'starved', 'not_learning'),
      needs=[[('activation', 'frac_saturated'), ('activation', 'hist')]],
      source='torchmortem: |x| > .95 for over 50 %; Karpathy: |tanh| > .97')
def saturated(rec, limit=.5):
    "Bounded activation functions sit at their bounds, where their slope is zero."
    r    = run(rec)
    acts = rec.layers['activation']
    exact = ('activation', 'frac_saturated') in rec
    v     = r.get('activation', 'frac_saturated') if exact else _by_hist(rec, acts.type)
    if not np.isfinite(v).any(): return
    start, end = (np.nan_to_num(medians(x)) for x in (v[:WINDOW], v[-WINDOW:]))
    hit = end > limit
    if not hit.any(): return
    k     = int(hit.argmax())
    early = start[k] > limit
    anew  = signal(r) if r.off_scale else {}
    fix   = {**anew, 'init': 'xavier', **_unscaled(r)} if early else {'norm': 'batch'}
    yield found(r, 'saturated', layer=acts.layer[k], layers=tuple(acts.layer[hit]),
                iters=(int(r.iter[0 if early else -1]), int(r.iter[-1])), value=float(end[k]), limit=limit,
                severity=severity(r, sign=not early), fix=fix,
                evidence=f"{'' if exact else 'about '}{pct(end[k])} of {r.called([acts.layer[k]])} lies within "
                         f"3 % of "
                         f"its bounds{'' if exact else ', by its histogram, mean and std'}"
                         f"{' from the start' if early else f', {pct(start[k])} at the start'}"
                         + (f"; also {r.called(acts.layer[hit].iloc[1:])}" if hit.sum() > 1 else ''))

def _unscaled(r, large=3.):
    "The fix for inputs that are far from a standard deviation of 1, where that was recorded."
    s = medians(r.get('input', 'std')) if ('input', 'std') in r.rec else np.zeros(1)
    return {'input': 'normalize'} if (s > large).any() else {}

LOWEST = dict(Tanh=-1., Hardtanh=-1., Sigmoid=0., Hardsigmoid=0.)                 # of each; the highest is 1

def _by_hist(rec, types):
    """Share of each bounded activation within 3 % of its bounds, where it was not counted.  # (window, layer)
    The bins tell what lies beyond .875 (of a sigmoid, also below 2^-6, which is near enough). How near to the bound
    that is, the mean of (x - lowest)(highest - x) tells, which mean and std give exactly and of which the other bins
    take their part. The distance to the bound falls exponentially with what goes into a tanh or a sigmoid; that taken
    to be spread exponentially beyond the edge, so that the mean comes out right, gives the share within 3 %: in trained
    nets within .05 of the counted one."""
    known = [t in LOWEST for t in types]
    if 'Softsign' in {*types} or any(known) and not {('activation', 'mean'), ('activation', 'std')} <= {*rec.keys()}:
        raise Unreadable("how near to its bounds an activation is cannot be read from histogram, mean and std here; "
                         "'frac_saturated' of 'activation' counts it")
    h     = rec['activation', 'hist'].astype(float)
    a, b  = rec.bins.edges[:-1], rec.bins.edges[1:]
    share = h[:, :, 1:388] / h.sum(2, keepdims=True)                               # (window, layer, bin)
    out   = np.full(h.shape[:2], np.nan)
    spans = rec.windows['activation', 'hist'].to_numpy()
    rows  = [slice(*np.searchsorted(rec.iters.iter, (first, last + 1))) for first, last in spans]
    for k in np.flatnonzero(known):
        low   = LOWEST[types[k]]
        gap   = lambda x, xx: -low + (1 + low) * x - xx                            # of the means of x and of x squared
        mean, std = (rec['activation', s][:, k].astype(float) for s in ('mean', 'std'))
        all_  = np.array([np.nanmean(gap(mean, mean ** 2 + std ** 2)[i]) for i in rows])
        each  = gap((a + b) / 2, (a * a + a * b + b * b) / 3)
        high  = (a >= .875) | (b <= -.875)
        shut  = b <= 2. ** -6 if low == 0 else np.zeros(len(a), bool)
        near  = share[:, k, high].sum(1)
        edge, limit = (gap(x, x * x) for x in (.875, 1 - .015 * (1 - low)))
        with np.errstate(divide='ignore', invalid='ignore'):
            rest = np.clip((all_ - share[:, k][:, ~high] @ each[~high]) / near / edge, 0, 1)
            beyond = np.where(near > 0, near * (limit / edge) ** (rest / (1 - rest)), 0)
        out[:, k] = share[:, k, shut].sum(1) + beyond
    return out
