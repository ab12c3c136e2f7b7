"Rules about small gradients: starved, vanishing through depth, underflow in half precision."
from __future__ import annotations

import numpy as np

from ..fixes import found, scale_up, signal
from ..._text import num, pct
from ..evidence import dims, run
from ..series import FEWEST, lasting, rolling_median
from ..finding import ELASTICITY, LOSS, Unreadable, factors, need, root_numel, rule, severity, stuck
from ..thresholds import BLOCKED, PASSES, SETTLE, STARVED


@rule(cause='the network is starved of gradient',
      explains=('step_too_small', 'not_learning'),
      ended='it was starved until iteration {}',
      needs=[LOSS, ELASTICITY],
      source="limit: 343 windows, thresholds.py; that gain must be near zero and elasticity not rising: the zoo's "
             "healthy runs with an offset, a zero head, label smoothing")
def starved(rec, limit=STARVED, sure=40):
    "Nothing gets through: the weights can hardly move the loss, nothing is learned, and that does not change."
    r = run(rec)
    if not r.layers: raise Unreadable("the record has no weights with two or more dimensions")
    if not r.positive and not np.isfinite(r.median_placebo).any():
        raise Unreadable("elasticity divides by the loss, which is not positive throughout; "
                         "LayerStatsCallback(placebo=True) tells without it")
    need(r, SETTLE + FEWEST)
    e    = rolling_median(r.median_elasticity)
    hits = lasting(r.starving & (e < limit) if r.positive and limit != STARVED else r.starving, 3)
    if not hits: return
    (a, _), (_, b) = hits[0], hits[-1]
    lasts = b >= len(r) - 2
    low   = rolling_median(r.elasticity) if r.positive else r.placebo
    limit = limit if r.positive else BLOCKED
    e     = e if r.positive else r.median_placebo
    worst = np.nanargmin(np.where(np.isfinite(low[b]), low[b], np.inf))
    lays  = tuple(l for l, v in zip(r.layers, low[b]) if v < limit)
    what  = (f"one percent of change in the median layer moves the loss by {num(e[b])} % at most (elasticity; starved "
             f"below {limit:g})" if r.positive else "the loss is not positive, so elasticity says nothing")
    fix   = signal(r)
    end   = f"to the end (iteration {r.iter[-1]})" if lasts else f"until iteration {r.iter[b]}, then it ended by itself"
    g     = r.gain_over_constant[b]
    gain  = f"gain over the best constant answer {num(g)} of a loss of {num(r.best_constant)}"
    few   = len(r) < sure                                                # many a healthy net has not moved before that
    yield found(r, 'starved', layer=r.layers[worst], layers=lays, iters=(r.began(a), int(r.iter[b])),
                value=float(np.nanmin(e[a:b + 1])), limit=limit,
                severity='warning' if few and stuck(r) else severity(r, ended=not lasts, sign=True), fix=fix,
                also=[] if 'activation' in fix else ["an activation function that leaks"],
                evidence=f"from iteration {r.began(a)} {end}: {what}, {gain}; lowest in {r.layers[worst]} "
                         f"({num(low[b, worst])}){_placebo(r, b)}{factors(r, b)}"
                         + (f"; {len(r)} iterations are few to judge by, it may still wake" if few else ''))

def _placebo(r, row):
    p = r.median_placebo[row]
    if not np.isfinite(p): return ''
    says = "is blocked" if p <= BLOCKED else "passes" if p >= PASSES else "cannot be told to pass"
    return (f"; a signal without meaning {says} (placebo of the median layer {num(p)}; blocked below {BLOCKED:g}, live "
            f"above {PASSES:g})")


@rule(cause='the gradient vanishes on its way back',
      explains=('starved', 'not_learning'),
      needs=[LOSS, ('grad', 'norm')],
      source='He 2015: std .01 over 10 layers shrinks the gradient by 1.7e4; AT has 1e-3 first/last for the norm; here '
             'rms, to leave width out, steadily down, and only where nothing is learned. Limit: AT')
def vanishing(rec, limit=1e-3, steady=.7):
    "The gradient shrinks from layer to layer on its way back, and nothing is learned."
    r = run(rec)
    if len(r.layers) < 3: return
    v = rolling_median(r.get('grad', 'norm', r.layers) / root_numel(r), few=3)
    with np.errstate(divide='ignore', invalid='ignore'):
        y    = np.where(v > 0, np.log(v), np.nan)
        drop = np.exp(y[:, 0] - np.nanmax(y, axis=1, initial=-np.inf, where=np.isfinite(y)))
        up   = np.mean(np.diff(y, axis=1) > 0, axis=1)
        bad  = (drop < limit) & (up >= steady) & r.no_gain & r.judged
    hits = lasting(bad, 3)
    if not hits: return
    (a, _), (_, b) = hits[0], hits[-1]
    lasts = b >= len(r) - 2
    top   = np.nanmax(y[b])
    per   = np.exp((y[b, 0] - top) / max(int(np.nanargmax(y[b])), 1))
    fix   = signal(r)
    half  = tuple(r.layers[:max(1, int(np.sum(y[b] < top + np.log(limit) / 2)))])
    yield found(r, 'vanishing', layer=r.layers[0], layers=half, iters=(r.began(a), int(r.iter[b])),
                value=float(drop[b]), limit=limit, severity=severity(r, ended=not lasts, sign=True), fix=fix,
                also=["shortcuts between the layers"],
                evidence=f"the gradient of {r.layers[0]} is {num(drop[b])} times the largest (rms of an element), a "
                         f"factor {num(per)} a layer")


@rule(cause='gradients underflow in half precision',
      explains=('vanishing', 'starved', 'not_learning'),
      needs=[('grad', 'hist'), ('grad', 'frac_zero')],
      source='half precision has no magnitude below 2^-24 (subnormal); shares: zoo. All zero: |dL/dz| of one output is '
             'of the size of loss / outputs')
def fp16_underflow(rec, limit=.5, edge=2. ** -24):
    "Gradients in half precision fall below its smallest number and become zero."
    r = run(rec)
    if not r.layers: return
    zero = r.get('grad', 'frac_zero', r.layers)
    h    = rec['grad', 'hist']
    if not len(h): raise Unreadable("no window of iterations is complete yet")
    h    = h[:, r.cols].astype(float)
    if np.isnan(h[..., 0]).all(): return
    ok    = np.array([i not in rec.bins.labels for i in range(h.shape[2])])
    lives = np.nansum(h[..., ok], axis=(1, 2)) > 0                                   # windows in which not all is zero
    h     = np.nansum(h, axis=0)                                                     # (layer, bin), over all windows
    size = np.full(h.shape[1], np.inf)
    size[1:388] = np.maximum(np.abs(rec.bins.edges[:-1]), np.abs(rec.bins.edges[1:]))   # larger end of each bin
    half = any('float16' == str(t) for p in ('output', 'input') if p in rec.layers for t in rec.layers[p].type)
    tiny = h[:, ok & (size <= edge)].sum(1)
    near = h[:, ok & (size > edge) & (size <= edge * 64)].sum(1)
    z    = np.array([np.nanmedian(c[np.isfinite(c)]) if np.isfinite(c).any() else np.nan for c in zero.T])
    with np.errstate(invalid='ignore'):
        hit = (z > limit) & (z < .9999) & (near > .05 * h.sum(1) * (1 - z)) & (near > 20) & (tiny < .01 * near)
    left = h[:, ok].sum()                                                              # what is not zero, at the edge
    edgy = left < (1 - limit) * h.sum() and near.sum() > max(.9 * left, 20) and tiny.sum() < .01 * left
    if not hit.any() and edgy and lives[lives.argmin():].any():                        # not a net that has died
        k = z > limit
        yield _underflow(r, k if k.any() else ~k, float(np.nanmax(z)), limit, f"{pct(1 - left / h.sum())} of all "
                         f"gradients are exactly zero, and what is left is just above 6e-8, the smallest number of "
                         f"half precision")
        return
    if not hit.any() and _all_gone(r, zero, edge):
        yield _underflow(r, np.ones(len(z), bool), 1., limit, f"every gradient is exactly zero although the outputs "
                         f"differ and the loss is {num(r.first_loss)}: its share per output is less than 6e-8, the "
                         f"smallest number of half precision")
        return
    if not hit.any() or not (half or hit.mean() >= .25): return
    k = int(np.flatnonzero(hit)[0])
    yield _underflow(r, hit, float(z[k]), limit, f"{pct(z[k])} of the gradient of {r.layers[k]} is exactly zero, many "
                     f"are just above 6e-8, the smallest number of half precision, and hardly any below it")

def _all_gone(r, zero, edge):
    """Whether every gradient is zero in every row although it cannot be: the net knows nothing, its outputs differ, and
    what the loss is of one output is less than half precision holds."""
    keys = [('output', 'min'), ('output', 'max')]
    if any(k not in r.rec for k in keys) or not r.positive or not stuck(r): return False
    if not (zero[np.isfinite(zero)] == 1).all(): return False
    low, high = (r.get(*k) for k in keys)
    shape     = dims(r.rec.layers['grad']['shape'].iloc[r.cols[-1]]) if 'shape' in r.rec.layers['grad'] else [1]
    outputs   = r.all.bs.to_numpy(float)[r.rows].max() * shape[0]                    # at least: positions are not known
    return bool((high > low).any() and r.first_loss / outputs < edge)

def _underflow(r, hit, value, limit, evidence):
    fix = scale_up(r.first_loss) if r.positive else {'loss_scale': 65536.}
    return found(r, 'fp16_underflow', layer=r.layers[int(hit.argmax())], layers=tuple(np.array(r.layers)[hit]),
                 iters=(int(r.iter[0]), int(r.iter[-1])), value=value, limit=limit, severity=severity(r), fix=fix,
                 evidence=evidence)
