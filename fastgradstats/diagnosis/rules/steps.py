"Rules about the optimizer's step: too large, too small, missing, of gradients that are kept."
from __future__ import annotations

import numpy as np

from ..fixes import faster, found, slower
from ..._text import num
from ..evidence import WINDOW, run
from ..finding import ELASTICITY, LOSS, RATIO, factors, medians, named, need, root_numel, rule, stuck, told
from ..thresholds import ADAM_LR, SETTLE, STARVED

OPTIMIZER = {'optimizer': 'all parameters'}


@rule(cause='a step was too large',
      explains=('exploding', 'non_finite', 'unstable', 'saturated', 'dead_units', 'starved', 'not_learning'),
      needs=[LOSS, RATIO],
      source='a step as large as the layer itself: every such run with learning rate 5 and more, 1 of 187 live '
             'windows. SM warns at 10, torchmortem at .1, which healthy first steps exceed')
def step_too_large(rec, limit=1., worse=1.2):
    "A step changed a layer by as much as its own norm, and the loss was the worse for it."
    r = run(rec)
    need(r, 3)
    if not r.layers: return
    v    = r.get('update', 'ratio', r.layers)
    v    = np.where(np.isinf(r.get('update', 'norm', r.layers)), np.inf, v)
    w    = r.get('weight', 'norm', r.layers)
    rms  = w / root_numel(r) if 'grad' in rec.layers else w
    late = rms < .1 * np.nanmedian(rms, axis=1, keepdims=True)      # a layer that starts at or near zero must step far
    big  = np.where(late, 0, np.nan_to_num(v, posinf=np.inf))
    top  = big.max(1)
    hits = np.flatnonzero(top > limit)
    lost = len(hits) > 0 and stuck(r)
    for i in hits:
        before, after = r.loss[max(i - 5, 0):i + 1], r.loss[i + 1:i + 11]
        before = np.nanmedian(before) if np.isfinite(before).any() else np.nan
        jumped = lost and after[:3].max(initial=0) > worse * before    # for a moment, then never learned
        if not len(after) or np.isfinite(after).all() and np.median(after) <= worse * before and not jumped: continue
        k    = int(big[i].argmax())
        fix  = slower(r, i)
        end  = after[:3].max() if jumped else np.nanmedian(after) if np.isfinite(after).any() else np.nan
        yield found('step_too_large', layer=r.layers[k], layers=(r.layers[k],),
                    iters=(int(r.iter[i]), int(r.iter[hits[-1]])), value=float(big[i, k]), limit=limit,
                    severity='critical' if lost else 'info' if _recovered(r, hits[-1], before) else 'warning', fix=fix,
                    also=["warm-up"],
                    evidence=f"{told((r.iter[i], r.layers[k], big[i, k]))}; loss {num(before)} before, "
                             f"{num(end) if np.isfinite(end) else 'not finite'} after"
                             f"{' for a moment, and nothing has been learned since' if jumped else ''}"
                             f"{f'; {len(hits)} such steps' if len(hits) > 1 else ''}")
        return

def _recovered(r, row, before, share=.2):
    "Whether it was a matter of the first tenth and much has been learned since: the loss is far below that before it."
    end = medians(r.loss[-WINDOW:, None])[0]
    c   = abs(r.best_constant) if np.isfinite(r.best_constant) else abs(before)
    return row < max(len(r) / 10, SETTLE) and r.gain_over_constant[-1] > share * c and end < (1 - share) * before


@rule(cause='the steps are too small',
      explains=('not_learning',),
      needs=[LOSS, RATIO],
      source='torchmortem: update ratio below 1e-5; cs231n: 1e-3 is usual. Limit: zoo. Against starved: the loss '
             'a step removes is elasticity x ratio, and the one further below its limit comes first')
def step_too_small(rec, limit=None, fall=.1):
    "The weights hardly move although the gradient could move the loss."
    r = run(rec)
    need(r, SETTLE + WINDOW)
    if not r.layers: return
    v = r.get('update', 'ratio', r.layers)
    m = medians(np.where(r.stepped[:, None], v, np.nan)[SETTLE:])
    if not np.isfinite(m).any() or not (m > 0).any(): return
    med = float(np.nanmedian(m[m > 0]))
    e   = np.nanmedian(r.median_elasticity[SETTLE:]) if ELASTICITY in rec and r.positive else np.nan
    end = medians(r.loss[-WINDOW:, None])[0]
    rest  = np.nanmedian(r.equilibrium_ratio[SETTLE:]) if np.isfinite(r.equilibrium_ratio).any() else np.nan
    limit = limit or r.small_step
    limit = min(limit, rest / 3) if np.isfinite(rest) else limit                   # at rest there: no fault of the step
    if not np.isfinite(end) or med >= limit and not (r.crawls and stuck(r)): return
    adam  = f", at a rate of {num(np.nanmax(r.lr))} (Adam's usual: {ADAM_LR / 5:g} to {ADAM_LR * 2:g})"
    rate  = adam if r.crawls else ''
    usual = f"with this weight decay it settles near {num(rest)}" if np.isfinite(rest) else "usual: about 1e-3"
    if (r.first_loss - end) > fall * abs(r.first_loss) and not stuck(r): return    # it learns
    if e < STARVED and (r.rising()[0][-1] or not r.step_fails[-1]): return         # it moves, or larger is no help
    w = r.get('weight', 'norm', r.layers)
    if np.nanmedian(w[-1] / np.maximum(w[0], 1e-12)) > 3: return                   # small beside blown-up weights
    fix = faster(r, med)
    yield found('step_too_small', iters=(int(r.iter[SETTLE]), int(r.iter[-1])), value=med, limit=limit,
                severity='critical' if stuck(r) else 'warning', fix=fix,
                evidence=f"a step changes the median layer by {num(med)} of its norm ({usual}){rate} and the loss has "
                         f"gone from {num(r.first_loss)} to {num(end)}"
                         + (f", although elasticity ({num(e)}) says that it could fall" if np.isfinite(e) else '')
                         + factors(r))


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
    if not hit.any() or (hit.all() and not stuck(r)): return
    names = tuple(np.array(lays)[hit])
    steps = int(seen[:, hit].sum(0).min())
    yield found('not_stepped', layer=names[0], layers=names, iters=(int(r.iter[0]), int(r.iter[-1])), value=0.,
                limit=0., severity='critical', fix=OPTIMIZER,
                evidence=f"{named(names)}: a gradient in {steps} steps, and not one changed it")


@rule(cause='gradients are kept from step to step',
      explains=('step_too_large', 'exploding', 'non_finite', 'unstable', 'not_learning'),
      needs=[LOSS, ('grad', 'mean')],
      source='von Neumann ratio of successive differences to variance, of ranks: 2 for independent batches. Healthy '
             'runs of the zoo .9 to 2, kept gradients .01 to .23')
def not_zeroed(rec, limit=.3, noisy=1.5):
    "Gradients are kept from step to step: zero_grad is forgotten."
    r = run(rec)
    need(r, SETTLE + WINDOW)
    if not r.layers: return
    m    = np.where(r.stepped[SETTLE:, None], r.get('grad', 'mean', r.layers)[SETTLE:], np.nan)
    loss = r.loss[SETTLE:]
    loss = loss[np.isfinite(loss)]
    if len(loss) < WINDOW: return
    with np.errstate(divide='ignore', invalid='ignore', over='ignore'):
        rough = np.mean(np.diff(loss, 2) ** 2) / np.mean(np.diff(loss) ** 2)       # about 3; 0 for full batches
        ratio = np.array([_von_neumann(c) for c in m.T])
    known = np.isfinite(ratio)
    hit   = known & (ratio < limit)
    if not hit.any() or hit.sum() < .5 * known.sum() or not rough > noisy or _shrinks(r): return
    names = tuple(np.array(r.layers)[hit])
    value = float(np.median(ratio[hit]))
    yield found('not_zeroed', layer=names[0], layers=names, iters=(int(r.iter[0]), int(r.iter[-1])), value=value,
                limit=limit, severity='critical' if stuck(r) else 'warning', fix={'zero_grad': True},
                also=["where this is accumulation, a step after the last batch only"],
                evidence=f"the gradient of {named(names)} hardly changes from one batch to the next (successive "
                         f"differences "
                         f"over variance {num(value)}, 2 for independent batches) while the loss does: each step has "
                         f"all "
                         f"earlier gradients in it")

def _shrinks(r, most=1.5):
    "Whether the gradient ends no larger than it began, as a sum of gradients would: 3 times and more (zoo)."
    return bool(np.median(r.total_norm[-WINDOW:]) < most * np.median(r.total_norm[:3]))

def _von_neumann(x):
    x = x[np.isfinite(x)]
    x = x[np.concatenate([[True], x[1:] != x[:-1]])] if len(x) else x          # a dead layer's stands still
    if len(x) < WINDOW: return np.nan
    x = x.argsort().argsort().astype(float)                  # ranks: a few large ones at the start are no trend
    return np.mean(np.diff(x) ** 2) / np.var(x)
