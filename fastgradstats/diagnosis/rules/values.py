"Rules about values: not finite, exploding, spiking."
from __future__ import annotations

import numpy as np

from ..fixes import found, slower, weights
from ..._text import num, pct
from ..evidence import NOISE, run
from ..series import WINDOW, deviation, rolling_median
from ..finding import LOSS, Unreadable, need, past, rule, severity, spike, told
from ..thresholds import SETTLE

PLACES = {'input': (0, 'the input'), 'activation': (1, 'the activation of'), 'grad': (3, 'the gradient of')}


@rule(cause='values are not finite',
      explains=('not_learning',),
      needs=[LOSS], source='SM ExplodingTensor, AT explode: any NaN or Inf')
def non_finite(rec):
    "NaN or infinite values: where first, and what spiked before."
    r     = run(rec)
    bad   = r.lost
    seen  = [*_nonfinite(r, bad), *([(int(bad.argmax()), 2, 'the loss', '')] if bad.any() else [])]
    if not seen: return
    row, order, what, layer = min(seen, key=lambda f: f[:2])                # within a row the forward pass comes first
    where = what if order == 0 or not layer else f'{what} {r.called([layer])}'
    big   = spike(r, row)
    since = (f"; before it, {told(big)}" if big else
             f"; the loss before it was {num(r.loss[row - 1])}" if row else "; it was there from the start")
    also  = {0: ["look at the data: the input itself holds them"],
             2: ["a look at the targets, and at the loss function for log(0) or a division by 0"]}
    also  = [] if big and order else also.get(order, [])
    fix   = {} if also else slower(r, row) if big or row else weights(r)
    yield found(r, 'non_finite', layer=layer, layers=(layer,) if layer else (),
                iters=(int(r.iter[row]), int(r.iter[-1])), value=1., limit=0., fix=fix, also=also,
                severity='critical' if bad[-1] else 'warning' if bad.any() else 'info',
                evidence=f"first in {where}, {'going forward' if order < 3 else 'on the way back'}, "
                         f"at iteration {r.iter[row]}{since}")

def _nonfinite(r, bad):
    "(row, order, where, layer) at which each probe shows it first."
    for probe, (order, what) in PLACES.items():
        for stat in ('frac_nonfinite', 'norm', 'max', 'min', 'abs_max'):
            if (probe, stat) not in r.rec.keys() or (probe, stat) in r.rec.windows: continue
            v    = r.get(probe, stat)
            hit  = v > 0 if stat == 'frac_nonfinite' else np.isinf(v)
            if stat not in ('frac_nonfinite', 'norm'): hit |= np.isnan(v) & np.isfinite(v).any(0) & bad[:, None]
            if not hit.any(): continue
            row  = int(hit.any(1).argmax())
            ks   = np.flatnonzero(hit[row])
            k    = ks[0] if order < 3 else ks[-1]           # where it is born: first forward, last on the way back
            yield row, order, what, r.rec.layers[probe].layer[k]


@rule(cause='the gradient explodes',
      explains=('non_finite', 'unstable', 'saturated', 'dead_units', 'not_learning'),
      needs=[LOSS, ('grad', 'norm')],
      source='loss: AT has 1e3 and a ratio of layers of 70; here growth against the run itself. Factors: zoo')
def exploding(rec, grown=30., worse=3.):
    "Gradients grow far beyond where they began, and the loss with them."
    r = run(rec)
    need(r, 3)
    if not r.layers: return
    lays, g = r.get('grad', 'norm', r.layers), r.total_norm
    base = np.nanmedian(g[:3])
    ref  = np.nanmin([r.first_loss, r.best_constant]) if np.isfinite(r.best_constant) else r.first_loss
    if not base > 0: return
    with np.errstate(invalid='ignore', over='ignore'):
        span = np.nanmax([abs(ref), *(ref - rolling_median(r.loss))])    # of a loss near zero: how far it has come
        high = ref + (worse - 1) * span
        bad  = (g > grown * base) & ((r.loss > high) | ~np.isfinite(r.loss)) & (np.arange(len(r)) > 0)
    if not bad.any(): return
    row  = int(bad.argmax())
    last = int(np.flatnonzero(bad)[-1])
    if bad.sum() < 3 and np.isfinite(r.loss[last:]).all(): return       # a single bad batch
    with np.errstate(divide='ignore', invalid='ignore'): up = lays[row] / np.nanmedian(lays[:3], axis=0)
    up    = np.where(np.isfinite(up), up, 0)
    worst = r.layers[int(up.argmax())]
    fix   = slower(r, row)
    yield found(r, 'exploding', layer=worst, layers=tuple(l for l, u in zip(r.layers, up) if u > grown),
                iters=(int(r.iter[row]), int(r.iter[last])), value=float(g[row] / base), limit=grown,
                severity=severity(r, ended=past(r, last), row=row), fix=fix,
                evidence=f"the gradient's norm at iteration {r.iter[row]} is {num(g[row] / base)} times that of the "
                         f"first three, the loss {num(r.loss[row])} against {num(r.first_loss)} at the start; most in "
                         f"{worst} ({num(up.max())} times)")


@rule(cause='the loss is unstable',
      explains=('not_learning',),
      needs=[LOSS],
      source='Lightning SpikeDetection: twice the mean of the last 10; here also above the first loss, and several')
def unstable(rec, times=2., few=3):
    "The loss spikes again and again above where it began."
    r = run(rec)
    need(r, SETTLE + WINDOW)
    if not r.positive: raise Unreadable("the loss is not positive throughout")
    base  = rolling_median(r.loss, 10, few=5)
    ref   = max(r.first_loss, r.best_constant) if np.isfinite(r.best_constant) else r.first_loss
    late  = lambda v: np.concatenate([[np.nan], v[:-1]])
    with np.errstate(invalid='ignore'):
        batch = r.constant > times * late(rolling_median(r.constant, 10, few=5))     # it is the batch that is hard
        usual = NOISE * late(deviation(r.loss))                                       # from batch to batch
        hit   = (r.loss > times * late(base)) & (r.loss > 1.5 * ref) & ~batch & ~(r.loss < late(base) + usual)
    above = np.nan_to_num(r.loss[SETTLE:]) > times * ref
    if hit.sum() < few and above.mean() < .25: return
    rows  = np.flatnonzero(hit) if hit.sum() >= few else np.flatnonzero(above) + SETTLE
    big   = spike(r, int(rows[0]))
    fix   = slower(r, int(rows[0]))
    yield found(r, 'unstable', iters=(int(r.iter[rows[0]]), int(r.iter[rows[-1]])), value=float(np.nanmax(r.loss)),
                limit=times * ref, severity=severity(r, ended=past(r, rows[-1]), row=rows[0],
                                  sign=bool(r.learned[r.end]) or not np.isfinite(r.best_constant)),
                fix=fix, also=["a check that the gradients are zeroed before each step"],
                evidence=f"the loss began at {num(r.first_loss)}, reached {num(np.nanmax(r.loss))} and was above "
                         f"{times:g} times its start in {pct(above.mean())} of the iterations"
                         + (f"; {told(big)}" if big else ''))
