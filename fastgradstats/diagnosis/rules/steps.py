"Rules about the optimizer's step: too large, too small, missing, of gradients that are kept."
from __future__ import annotations

import numpy as np

from ..fixes import faster, found, slower
from ..._text import num
from ..evidence import run
from ..series import WINDOW
from ..finding import ELASTICITY, LOSS, RATIO, factors, medians, need, rule, severity, stuck, told
from ..thresholds import ADAM_LR, SETTLE, STARVED

OPTIMIZER = {'optimizer': 'all parameters'}


@rule(cause='a step was too large',
      explains=('exploding', 'non_finite', 'unstable', 'saturated', 'dead_units', 'starved', 'not_learning'),
      needs=[LOSS, RATIO],
      source='a step as large as the layer itself: every such run with learning rate 5 and more, 1 of 187 live '
             'windows. SM warns at 10, torchmortem at .1, which healthy first steps exceed')
def step_too_large(rec, limit=1., worse=1.2):
    """A step changed a layer by as much as its own norm, and harm followed: a larger loss, what had been learned was
    gone, or nothing has been learned since."""
    r = run(rec)
    need(r, 3)
    if not r.layers: return
    v    = r.get('update', 'ratio', r.layers)
    v    = np.where(np.isinf(r.get('update', 'norm', r.layers)), np.inf, v)
    big  = np.where(r.grown, np.nan_to_num(v, posinf=np.inf), 0)          # a layer near zero must step far
    hits = np.flatnonzero(big.max(1) > limit)
    for i in hits:
        harm, before, after = _harm(r, i, worse, whole=np.median(big[i]) > limit)
        if not harm: continue
        k    = int(big[i].argmax())
        yield found(r, 'step_too_large', layer=r.layers[k], layers=(r.layers[k],),
                    iters=(int(r.iter[i]), int(r.iter[hits[-1]])), value=float(big[i, k]), limit=limit,
                    severity=severity(r, ended=_recovered(r, hits[-1], before), row=i),
                    fix=slower(r, i), also=["warm-up"],
                    evidence=f"{told((r.iter[i], r.layers[k], big[i, k]))}; loss {num(before)} before, "
                             f"{num(after) if np.isfinite(after) else 'not finite'} after{harm.rstrip()}"
                             f"{f'; {len(hits)} such steps' if len(hits) > 1 else ''}")
        return

def _harm(r, i, worse, whole):
    """(What followed a large step, as a clause, ' ' where the losses say it; the loss before it, and after). `whole`:
    it changed the whole net."""
    mean  = lambda v: float(np.mean(v)) if len(v) and np.isfinite(v).all() else np.nan
    prior = r.loss[max(i - 5, 0):i + 1]
    before, next_ = mean(prior[np.isfinite(prior)]), r.loss[i + 1:i + 11]
    after = float(np.median(next_)) if np.isfinite(next_).all() else np.nan
    if not len(next_): return '', before, after
    if not np.isfinite(next_).all() or after > worse * before: return ' ', before, after
    had, has = mean(r.saved[max(i - 5, 0):i + 1]), mean(r.saved[i + 1:i + 11])
    if had > r.worth[-1] and has < had / 2: return f"; of the gain of {num(had)} {num(has)} was left", before, after
    if stuck(r) and (whole or max(next_[:3]) > worse * before):
        return ", and nothing has been learned since", before, after
    return '', before, after

def _recovered(r, row, before, share=.2):
    "Whether it was a matter of the first tenth and much has been learned since: the loss is far below that before it."
    end = medians(r.loss[-WINDOW:, None])[0]
    return row < max(len(r) / 10, SETTLE) and r.learned_much(share) and end < (1 - share) * before


@rule(cause='the steps are too small',
      explains=('not_learning',),
      needs=[LOSS, RATIO],
      source='torchmortem: update ratio below 1e-5; cs231n: 1e-3 is usual. Limit: zoo. Against starved: the loss '
             'a step removes is elasticity x ratio, and the one further below its limit comes first')
def step_too_small(rec, limit=None, fall=.1):
    "The weights hardly move although the gradient could move the loss; or the schedule has stopped them."
    r = run(rec)
    need(r, SETTLE + WINDOW)
    if not r.layers: return
    end = medians(r.loss[-WINDOW:, None])[0]
    if not np.isfinite(end): return
    stopped = list(_stopped(r, end))
    if stopped: yield from stopped; return
    med  = float(np.nanmedian(r.median_ratio[SETTLE:])) if np.isfinite(r.median_ratio[SETTLE:]).any() else np.nan
    rest = np.nanmedian(r.equilibrium_ratio[SETTLE:]) if np.isfinite(r.equilibrium_ratio).any() else np.nan
    limit = limit or r.small_step
    limit = min(limit, rest / 3) if np.isfinite(rest) else limit                   # at rest there: no fault of the step
    if not med < limit and not (r.crawls and stuck(r)): return
    if (r.first_loss - end) > fall * abs(r.first_loss) and not stuck(r): return    # it learns
    e = np.nanmedian(r.median_elasticity[SETTLE:]) if ELASTICITY in rec and r.positive else np.nan
    if e < STARVED and (r.rising()[0][-1] or not r.step_fails[-1]): return         # it moves, or larger is no help
    w = r.get('weight', 'norm', r.layers)
    if np.nanmedian(w[-1] / np.maximum(w[0], 1e-12)) > 3: return                   # small beside blown-up weights
    adam  = f", at a rate of {num(np.nanmax(r.lr))} (Adam's usual: {ADAM_LR / 5:g} to {ADAM_LR * 2:g})"
    usual = f"with this weight decay it settles near {num(rest)}" if np.isfinite(rest) else "usual: about 1e-3"
    slow  = r.falls or r.learned[r.end] or not stuck(r)                            # it gets there, or it is not known
    yield found(r, 'step_too_small', iters=(int(r.iter[SETTLE]), int(r.iter[-1])), value=med, limit=limit,
                severity=severity(r, sign=slow), fix=faster(r, med),
                evidence=f"a step changes the median layer by {num(med)} of its norm ({usual})"
                         f"{adam if r.crawls else ''} and the loss has gone from {num(r.first_loss)} to {num(end)}"
                         + (f", although elasticity ({num(e)}) says that it could fall" if np.isfinite(e) else '')
                         + factors(r))

def _stopped(r, end):
    "The schedule took the learning rate away in the first half of the run, before much was learned."
    row = int(r.stopped.argmax())
    if not r.stopped[row:].all() or not r.stopped.any() or not SETTLE < row < len(r) / 2 or not stuck(r): return
    low, top = np.nanmax(r.lr[row:]), np.nanmax(r.lr)
    yield found(r, 'step_too_small', iters=(int(r.iter[row]), int(r.iter[-1])), value=float(low / top), limit=.01,
                severity=severity(r), also=["a schedule over the whole fit: one that is told of epochs is not stepped "
                                            "after every batch"],
                evidence=f"the learning rate has gone from {num(top)} to {num(low)} by iteration {r.iter[row]} of "
                         f"{r.iter[-1] + 1}, with the loss at {num(r.loss[row])}; it ends at {num(end)}")


@rule(cause='some weights are never stepped',
      explains=('starved', 'not_learning'),
      needs=[('grad', 'norm'), ('update', 'norm')],
      source='SM UnchangedTensor: no change over 3 steps; here with a gradient, over 10 and the whole fit')
def not_stepped(rec, few=10):
    "A parameter receives a gradient but is never changed: the optimizer does not have it."
    r = run(rec)
    lays = r.layers
    need(r, few)
    if not lays: return
    g, u = r.get('grad', 'norm', lays), r.get('update', 'norm', lays)
    w    = r.get('weight', 'norm', lays) if ('weight', 'norm') in rec else np.ones_like(g)
    seen = r.stepped[:, None] & (g * r.lr[:, None] > 1e-6 * w) & np.isfinite(u)    # below it a step is lost in rounding
    hit  = (seen.sum(0) >= few) & ~((u > 0) & seen).any(0)
    if not hit.any(): return
    names = tuple(np.array(lays)[hit])
    steps = int(seen[:, hit].sum(0).min())
    yield found(r, 'not_stepped', layer=names[0], layers=names, iters=(int(r.iter[0]), int(r.iter[-1])), value=0.,
                limit=0., severity=severity(r), fix=OPTIMIZER,
                evidence=f"{r.called(names)}: a gradient in {steps} steps, and not one changed it")


@rule(cause='gradients are kept from step to step',
      explains=('step_too_large', 'exploding', 'non_finite', 'unstable', 'not_learning'),
      needs=[('iters', 'grad_kept')],
      source='observed: whether the gradients of the step before were there when the backward pass added to them')
def not_zeroed(rec, share=.5, few=3):
    "Gradients are kept from step to step: zero_grad is forgotten."
    r   = run(rec)
    hit = np.flatnonzero(r.kept == 1)
    if len(hit) < few or len(hit) < share * np.isfinite(r.kept).sum(): return
    g = r.all.grad_norm.to_numpy(float)[r.rows]
    yield found(r, 'not_zeroed', iters=(int(r.iter[hit[0]]), int(r.iter[hit[-1]])), value=float(np.nanmean(r.kept)),
                limit=0., severity=severity(r, least='warning'), fix={'zero_grad': True},
                also=["where this is accumulation, a step after the last batch only"],
                evidence=f"in {len(hit)} of {np.isfinite(r.kept).sum()} steps the gradients of the step before were "
                         f"still there when the backward pass added to them; the gradient's norm was {num(g[0])} at "
                         f"the start, {num(np.nanmedian(g[-WINDOW:]))} at the end")
