"""Rules: small functions of a Record that yield Findings. Each says what it needs, where its thresholds come from.

One more rule is one function:

    @rule(needs=[('grad', 'norm')], source='my own nets')
    def too_quiet(rec, limit=1e-9):
        "The gradients of every layer are tiny."
        r = run(rec)
        ...
        yield Finding('too_quiet', 'fc1.weight', (0, 10), value, limit, 'warning', evidence, advice)

    diagnose(rec, rules=[*ALL, too_quiet])

Sources: SM, Amazon SageMaker Debugger's built-in rules; AT, AutoTrainer (ICSE 2021) with its repository; DD, DeepDiagnosis (ICSE
2022) with its repository; torchmortem and torchdiag, their sources; UMLAUT (CHI 2021); zoo, benchmarks/zoo.py, tuned half.
"""
from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .answering import num, pct
from .evidence import FEWEST, WINDOW, lasting, run, trailing
from .thresholds import SETTLE, STARVED

SEVERITIES = ('info', 'warning', 'critical')


class Finding(NamedTuple):
    "What is wrong, where, since when, on what evidence, what to try."
    rule:     str
    layer:    str                 # the first layer concerned; '' for the whole network
    iters:    tuple               # first and last iteration at which it was seen
    value:    float               # what was measured ...
    limit:    float               # ... against this
    severity: str                 # 'info': it ended by itself or training went on in spite of it; 'warning'; 'critical'
    evidence: str                 # in numbers
    advice:   str                 # what to try
    fix:      dict = {}           # the same for a machine: {'lr': .1} multiplies, {'init': 'kaiming'}, {'clip': 1.}, ...
    layers:   tuple = ()          # all layers concerned, in forward order

class Unreadable(Exception):
    "A rule cannot judge this record although what it needs was recorded; the message says why. It is listed as skipped."

def rule(*, needs, source):
    "Make a function of a record a rule: `needs` are (probe, statistic) pairs, or lists of pairs of which one is enough."
    def mark(f):
        f.needs, f.source = tuple(needs), source
        return f
    return mark

LOSS, CONSTANT = ('iters', 'loss'), ('iters', 'loss_constant')
E, UPDATE      = ('grad', 'elasticity'), ('update', 'ratio')


def _severity(bad, r, lasts):
    "Of a finding that did harm or not, and that lasts to the end or not."
    return 'info' if not bad else 'critical' if lasts else 'warning'

def _stuck(r):
    "Whether nothing has been learned at the end: blind, or no loss left to learn from."
    b = r.blind
    return bool(b[-FEWEST:].all()) or not np.isfinite(r.loss[-1]) if len(b) else False

def _names(layers, most=3):
    return ', '.join(layers[:most]) + (f" and {len(layers) - most} more" if len(layers) > most else '')

def _spike(r, row, back=10, limit=.3):
    "The largest relative step of a layer in the rows up to `row`: (iteration, layer, ratio), if it is above `limit`."
    if UPDATE not in r.rec or not r.layers: return None
    v = np.nan_to_num(r.get('update', 'ratio', r.layers)[max(row - back, 0):row + 1], posinf=np.finfo(float).max)
    if not v.size or v.max() < limit: return None
    i, k = np.unravel_index(v.argmax(), v.shape)
    return int(r.iter[max(row - back, 0) + i]), r.layers[k], float(v[i, k])


# --- values ----------------------------------------------------------------------------------------------------------
@rule(needs=[LOSS], source='SM ExplodingTensor, AT explode: any NaN or Inf')
def non_finite(rec):
    "NaN or infinite values: where first, and what spiked before."
    r     = run(rec)
    found = []                    # (row, order, where, layer): within a row the forward pass comes first
    steps = r.stepped & (np.isfinite(r.loss).cumsum() > 0)
    bad   = np.isinf(r.loss) | np.isnan(r.loss) & steps
    if bad.any(): found.append((int(bad.argmax()), 2, 'the loss', ''))
    for order, probe in ((0, 'input'), (1, 'activation'), (3, 'grad')):
        for stat in ('frac_nonfinite', 'norm', 'max', 'min', 'abs_max'):
            if (probe, stat) not in rec.keys() or (probe, stat) in rec.windows: continue
            v    = r.get(probe, stat)
            hit  = v > 0 if stat == 'frac_nonfinite' else np.isinf(v)
            if stat != 'frac_nonfinite' and stat != 'norm': hit |= np.isnan(v) & np.isfinite(r.get(probe, stat)).any(0) & bad[:, None]
            if hit.any():
                row  = int(hit.any(1).argmax())
                ks   = np.flatnonzero(hit[row])
                k    = ks[0] if order < 3 else ks[-1]           # where it is born: first forward, last on the way back
                what = {'input': 'the input', 'activation': 'the activation of', 'grad': 'the gradient of'}[probe]
                found.append((row, order, what, rec.layers[probe].layer[k]))
    if not found: return
    row, order, what, layer = min(found, key=lambda f: f[:2])
    where = what if order == 0 or not layer else f'{what} {layer}'
    spike = _spike(r, row)
    told  = (f"; before it, at iteration {spike[0]}, a step changed {spike[1]} by {num(spike[2])} times its own norm" if spike
             else f"; the loss before it was {num(r.loss[row - 1])}" if row else "; it was there from the start")
    advice = ("look at the data: the input itself holds them" if order == 0 else
              "a tenth of the learning rate, or clip the gradient's norm" if spike or row else
              "check the loss function for log(0) or a division by 0, and the initialisation")
    yield Finding('non_finite', layer, (int(r.iter[row]), int(r.iter[-1])), 1., 0., 'critical',
                  f"first in {where}, {'going forward' if order < 3 else 'on the way back'}, at iteration {r.iter[row]}{told}",
                  advice, {'input': 'normalize'} if order == 0 else {'lr': .1, 'clip': 1.}, (layer,) if layer else ())


@rule(needs=[LOSS, ('grad', 'norm')], source='loss: AT has 1e3 and a ratio of layers of 70; here growth against the run itself. '
                                             'Factors: zoo')
def exploding(rec, grown=30., worse=3.):
    "Gradients grow far beyond where they began, and the loss with them."
    r = run(rec)
    if not r.layers or len(r) < 3: return
    with np.errstate(over='ignore', invalid='ignore'): g = np.sqrt(np.nansum(r.get('grad', 'norm', r.layers) ** 2, axis=1))
    base = np.nanmedian(g[:3])
    ref  = np.nanmin([r.first_loss, r.best_constant]) if np.isfinite(r.best_constant) else r.first_loss
    if not base > 0: return
    with np.errstate(invalid='ignore', over='ignore'):
        bad = (g > grown * base) & ((r.loss > worse * ref) | ~np.isfinite(r.loss)) & (np.arange(len(r)) > 0)
    if not bad.any(): return
    row  = int(bad.argmax())
    last = int(np.flatnonzero(bad)[-1])
    if bad.sum() < 3 and np.isfinite(r.loss[last:]).all(): return       # a single bad batch
    lays = r.get('grad', 'norm', r.layers)
    with np.errstate(divide='ignore', invalid='ignore'): up = lays[row] / np.nanmedian(lays[:3], axis=0)
    up   = np.where(np.isfinite(up), up, 0)
    worst = r.layers[int(up.argmax())]
    yield Finding('exploding', worst, (int(r.iter[row]), int(r.iter[last])), float(g[row] / base), grown,
                  _severity(True, r, _stuck(r)), f"the gradient's norm at iteration {r.iter[row]} is {num(g[row] / base)} times that of "
                  f"the first three, the loss {num(r.loss[row])} against {num(r.first_loss)} at the start; most in {worst} "
                  f"({num(up.max())} times)", "a tenth of the learning rate, or clip the gradient's norm", {'lr': .1, 'clip': 1.},
                  tuple(l for l, u in zip(r.layers, up) if u > grown))


# --- small gradients -------------------------------------------------------------------------------------------------
@rule(needs=[LOSS, E], source='limit: 343 windows, thresholds.py; that gain must be near zero and elasticity not rising: the zoo\'s healthy '
                              'runs with an offset, a zero head, label smoothing')
def starved(rec, limit=STARVED):
    "Small gradients because nothing gets through: the weights can hardly move the loss, nothing is learned, and it does not change."
    r = run(rec)
    if not r.layers: raise Unreadable("the record has no weights with two or more dimensions")
    if not r.positive: raise Unreadable("elasticity divides by the loss, which is not positive throughout; look at gain and its trend")
    if len(r) < SETTLE + FEWEST: raise Unreadable(f"{len(r)} measured iterations are too few: {SETTLE + FEWEST} are needed")
    e    = trailing(r.median_elasticity)
    hits = lasting(r.starving if limit == STARVED else r.starving & (e < limit), 3)
    if not hits: return
    (a, _), (_, b) = hits[0], hits[-1]
    lasts = b >= len(r) - 2
    wakes = r.waking()[0][-1]
    low   = trailing(r.elasticity)
    worst = np.nanargmin(np.where(np.isfinite(low[b]), low[b], np.inf))
    lays  = tuple(l for l, v in zip(r.layers, low[b]) if v < limit)
    end   = f"to the end (iteration {r.iter[-1]})" if lasts else f"until iteration {r.iter[b]}, then it ended by itself"
    g     = r.learned[b]
    gain  = (f"gain over the best constant answer {num(max(g, 0))} of a loss of {num(r.best_constant)}" if np.isfinite(r.best_constant) else
             "the loss has not fallen by a tenth (gain was not measured, so this is less sure)")
    yield Finding('starved', r.layers[worst], (r.began(a), int(r.iter[b])), float(np.nanmin(e[a:b + 1])), limit,
                  'info' if not lasts and (wakes or not _stuck(r)) else _severity(True, r, lasts),
                  f"from iteration {r.began(a)} {end}: one percent of change in the median layer moves the loss by {num(e[b])} % at most "
                  f"(elasticity; starved below {limit:g}), {gain}; lowest in {r.layers[worst]} ({num(low[b, worst])})",
                  "Kaiming or LSUV initialisation, normalisation between the layers, an activation function that leaks",
                  {'init': 'kaiming', 'norm': 'batch'}, lays)


@rule(needs=[LOSS, ('grad', 'norm')], source='He 2015: std .01 over 10 layers shrinks the gradient by 1.7e4; AT has 1e-3 first/last for the '
                                             'norm; here rms, to leave width out, steadily down, and only where nothing is learned. Limit: AT')
def vanishing(rec, limit=1e-3, steady=.7):
    "The gradient shrinks from layer to layer on its way back, and nothing is learned."
    r = run(rec)
    if len(r.layers) < 3: return
    v   = r.get('grad', 'norm', r.layers) / np.sqrt(r.rec.layers['grad'].numel.to_numpy(float)[r.cols])
    v   = trailing(v, few=3)
    with np.errstate(divide='ignore', invalid='ignore'):
        y    = np.where(v > 0, np.log(v), np.nan)
        drop = np.exp(y[:, 0] - np.nanmax(y, axis=1, initial=-np.inf, where=np.isfinite(y)))
        up   = np.mean(np.diff(y, axis=1) > 0, axis=1)
        bad  = (drop < limit) & (up >= steady) & r.blind & r.judged
    hits = lasting(bad, 3)
    if not hits: return
    (a, _), (_, b) = hits[0], hits[-1]
    lasts = b >= len(r) - 2
    per   = np.exp((y[b, 0] - np.nanmax(y[b])) / max(int(np.nanargmax(y[b])), 1))
    half  = tuple(r.layers[:max(1, int(np.sum(y[b] < np.nanmax(y[b]) + np.log(limit) / 2)))])
    yield Finding('vanishing', r.layers[0], (r.began(a), int(r.iter[b])), float(drop[b]), limit,
                  'info' if not lasts and not _stuck(r) else _severity(True, r, lasts),
                  f"the gradient of {r.layers[0]} is {num(drop[b])} times the largest (rms of an element), a factor {num(per)} a layer",
                  "an activation function that does not saturate, Kaiming initialisation, normalisation or shortcuts between the layers",
                  {'norm': 'batch', 'activation': 'relu', 'init': 'kaiming'}, half)


@rule(needs=[('grad', 'hist'), ('grad', 'frac_zero')], source='half precision has no magnitude below 2^-24 (subnormal); shares: zoo')
def fp16_underflow(rec, limit=.5, edge=2. ** -24):
    "Gradients in half precision fall below its smallest number and become zero."
    r = run(rec)
    if rec.bins is None or not r.layers: return
    zero = r.get('grad', 'frac_zero', r.layers)
    h    = rec['grad', 'hist'][:, r.cols][:, :, :].astype(float) if len(rec['grad', 'hist']) else np.zeros((0, len(r.layers), 390))
    if not len(h) or np.isnan(h[..., 0]).all(): return
    h    = np.nansum(h, axis=0)                                                         # (layer, bin), over all windows
    size = np.full(h.shape[1], np.inf)
    size[1:388] = np.maximum(np.abs(rec.bins.edges[:-1]), np.abs(rec.bins.edges[1:]))   # larger end of each bin
    half = any('float16' == str(t) for p in ('output', 'input') if p in rec.layers for t in rec.layers[p].type)
    named = {i for i in rec.bins.labels}
    ok   = np.array([i not in named for i in range(h.shape[1])])
    tiny = h[:, ok & (size <= edge)].sum(1)
    near = h[:, ok & (size > edge) & (size <= edge * 64)].sum(1)
    z    = np.array([np.nanmedian(c[np.isfinite(c)]) if np.isfinite(c).any() else np.nan for c in zero.T])
    with np.errstate(invalid='ignore'): hit = (z > limit) & (z < .9999) & (near > .05 * h.sum(1) * (1 - z)) & (near > 20) & (tiny < .01 * near)
    if not hit.any() or not (half or hit.mean() >= .25): return
    k = int(np.flatnonzero(hit)[0])
    yield Finding('fp16_underflow', r.layers[k], (int(r.iter[0]), int(r.iter[-1])), float(z[k]), limit, _severity(True, r, _stuck(r)),
                  f"{pct(z[k])} of the gradient of {r.layers[k]} is exactly zero, many are just above 6e-8, the smallest number of half "
                  f"precision, and hardly any below it", "scale the loss (MixedPrecision does) or train in bfloat16",
                  {'loss_scale': 1024.}, tuple(np.array(r.layers)[hit]))


# --- units -----------------------------------------------------------------------------------------------------------
@rule(needs=[('activation', 'frac_dead')], source='torchdiag: over 20 % of the units warns, over 50 % is critical; SM DeadRelu flags over 50 %. '
                                                  'Only over half, as healthy small ReLU nets lose a fifth (zoo)')
def dead_units(rec, limit=.5):
    "Units whose output did not vary over a whole window, whatever the input."
    r    = run(rec)
    v    = rec['activation', 'frac_dead']
    wins = rec.windows['activation', 'frac_dead']
    if not len(v): return
    names = rec.layers['activation'].layer.to_numpy()
    end  = np.nan_to_num(v[-1])
    peak = np.nanmax(np.nan_to_num(v), axis=0)
    if not (peak > limit).any(): return
    now  = (end > limit).any()
    hit  = end > limit if now else peak > limit
    k    = int(hit.argmax())
    w    = int((np.nan_to_num(v[:, k]) > limit).argmax())
    since = int(wins.first_iter[w])
    share = float(end[k] if now else peak[k])
    spike = None
    if w > 0:
        upto  = int(np.searchsorted(r.iter, wins.last_iter[w], 'right')) - 1
        spike = _spike(r, upto, back=int(upto - np.searchsorted(r.iter, wins.first_iter[w - 1])) + 1)
    born = w == 0
    how  = ("born dead, or dead within the first window" if born else
            f"died in iterations {wins.first_iter[w]} to {wins.last_iter[w]}" +
            (f", after the step at iteration {spike[0]} changed {spike[1]} by {num(spike[2])} times its norm" if spike else ''))
    bad  = _stuck(r) or share > .8
    yield Finding('dead_units', names[k], (spike[0] if spike else since, int(wins.last_iter.iloc[-1])), share, limit,
                  'info' if not now else 'critical' if bad and _stuck(r) else 'warning',
                  f"{pct(share)} of the units of {names[k]} do not vary over any example ({how})"
                  + (f"; also in {_names(list(names[hit])[1:])}" if hit.sum() > 1 else '') + ('' if now else '; they came back'),
                  "a smaller learning rate at first (warm-up), clipping" if not born else
                  "biases of zero and Kaiming initialisation, an activation function that leaks",
                  {'lr': .1, 'clip': 1.} if not born else {'init': 'kaiming', 'activation': 'leaky_relu'}, tuple(names[hit]))


@rule(needs=[[('activation', 'frac_saturated'), ('activation', 'hist')]], source='torchmortem: |x| > .95 for over 50 %; Karpathy: |tanh| > .97')
def saturated(rec, limit=.5):
    "Bounded activation functions sit at their bounds, where their slope is zero."
    r    = run(rec)
    acts = rec.layers['activation']
    if ('activation', 'frac_saturated') in rec: v = r.get('activation', 'frac_saturated')
    else:                                       v = _saturation_of_hist(rec, acts)
    if not np.isfinite(v).any(): return
    start, end = (np.nan_to_num(_median(x)) for x in (v[:WINDOW], v[-WINDOW:]))
    hit = end > limit
    if not hit.any(): return
    k   = int(hit.argmax())
    early = start[k] > limit
    yield Finding('saturated', acts.layer[k], (int(r.iter[0 if early else -1]), int(r.iter[-1])), float(end[k]), limit,
                  'critical' if _stuck(r) else 'warning' if early else 'info',
                  f"{pct(end[k])} of {acts.layer[k]} ({acts.type[k]}) lies within 3 % of its bounds"
                  f"{' from the start' if early else f', {pct(start[k])} at the start'}"
                  + (f"; also {_names(list(acts.layer[hit])[1:])}" if hit.sum() > 1 else ''),
                  "smaller initial weights (Xavier), normalised inputs, normalisation before the activation",
                  {'init': 'xavier', 'input': 'normalize', 'norm': 'batch'}, tuple(acts.layer[hit]))

def _saturation_of_hist(rec, acts):
    "Share of each bounded activation beyond .875 of its bound, the nearest edges of the bins.  # (window, layer)"
    h, edges = rec['activation', 'hist'].astype(float), rec.bins.edges
    out = np.full(h.shape[:2], np.nan)
    for k, t in enumerate(acts.type):
        if t in ('Tanh', 'Softsign', 'Hardtanh'): bins = (edges[:-1] >= .875) | (edges[1:] <= -.875)
        elif t in ('Sigmoid', 'Hardsigmoid'):     bins = (edges[:-1] >= .875) | (edges[1:] <= 2. ** -6)
        else: continue
        with np.errstate(invalid='ignore', divide='ignore'): out[:, k] = h[:, k, 1:388][:, bins].sum(1) / h[:, k].sum(1)
    return out

def _median(v): return np.array([np.median(c[np.isfinite(c)]) if np.isfinite(c).any() else np.nan for c in v.T])


# --- the step --------------------------------------------------------------------------------------------------------
@rule(needs=[LOSS, UPDATE], source='a step as large as the layer itself: every such run with learning rate 5 and more, 1 of 187 live windows. '
                                   'SM warns at 10, torchmortem at .1, which healthy first steps exceed')
def step_too_large(rec, limit=1., worse=1.2):
    "A step changed a layer by as much as its own norm, and the loss was the worse for it."
    r = run(rec)
    if not r.layers or len(r) < 3: return
    v     = r.get('update', 'ratio', r.layers)
    e     = r.get('update', 'norm', r.layers)
    v     = np.where(np.isinf(e), np.inf, v)
    w     = r.get('weight', 'norm', r.layers)
    rms   = w / np.sqrt(rec.layers['grad'].numel.to_numpy(float)[r.cols]) if 'grad' in rec.layers else w
    late  = rms < .1 * np.nanmedian(rms, axis=1, keepdims=True)      # a layer that starts at or near zero must step far
    big   = np.where(late, 0, np.nan_to_num(v, posinf=np.inf))
    top   = big.max(1)
    for i in np.flatnonzero(top > limit):
        before = np.nanmedian(r.loss[max(i - 5, 0):i + 1]) if np.isfinite(r.loss[max(i - 5, 0):i + 1]).any() else np.nan
        after  = r.loss[i + 1:i + 11]
        if not len(after): continue
        hurt   = ~np.isfinite(after).all() or np.median(after) > worse * before
        if not hurt: continue
        k    = int(big[i].argmax())
        n    = int((top > limit).sum())
        a    = np.nanmedian(after) if np.isfinite(after).any() else np.nan
        yield Finding('step_too_large', r.layers[k], (int(r.iter[i]), int(r.iter[np.flatnonzero(top > limit)[-1]])), float(big[i, k]), limit,
                      'critical' if _stuck(r) else 'warning',
                      f"the step at iteration {r.iter[i]} changed {r.layers[k]} by {num(big[i, k])} times its own norm; loss {num(before)} before, "
                      + (f"{num(a)}" if np.isfinite(a) else 'not finite') + f" after{f'; {n} such steps' if n > 1 else ''}",
                      "a tenth of the learning rate, warm-up, or clipping", {'lr': .1, 'clip': 1.}, (r.layers[k],))
        return


@rule(needs=[LOSS, UPDATE], source='torchmortem: update ratio below 1e-5; cs231n: 1e-3 is usual. Limit: zoo')
def step_too_small(rec, limit=1e-4, fall=.1, decay=None):
    "The weights hardly move although the gradient could move the loss."
    r = run(rec)
    if len(r) < SETTLE + WINDOW or not r.layers: return
    v  = r.get('update', 'ratio', r.layers)
    m  = np.nanmedian(np.where(r.stepped[:, None], v, np.nan)[SETTLE:], axis=0) if np.isfinite(v).any() else np.full(len(r.layers), np.nan)
    if not np.isfinite(m).any() or not (m > 0).any(): return
    med = float(np.nanmedian(m[m > 0]))
    e   = np.nanmedian(r.median_elasticity[SETTLE:]) if E in rec and r.positive else np.nan
    end = _median(r.loss[-WINDOW:, None])[0]
    if not np.isfinite(end) or med >= limit: return
    if (r.first_loss - end) > fall * abs(r.first_loss) and not _stuck(r): return   # it learns
    if np.isfinite(e) and e < STARVED: return                                      # a larger step would not help: starved
    w  = r.get('weight', 'norm', r.layers)
    if np.nanmedian(w[-1] / np.maximum(w[0], 1e-12)) > 3: return                   # small beside weights that have been blown up
    yield Finding('step_too_small', '', (int(r.iter[SETTLE]), int(r.iter[-1])), med, limit, 'critical' if _stuck(r) else 'warning',
                  f"a step changes the median layer by {num(med)} of its norm (usual: about 1e-3) and the loss has gone from "
                  f"{num(r.first_loss)} to {num(end)}" + (f", although elasticity ({num(e)}) says that it could fall" if np.isfinite(e) else ''),
                  "a learning rate ten to a thousand times as large; lr_find shows it", {'lr': 100.}, ())


@rule(needs=[('grad', 'norm'), ('update', 'norm')], source='SM UnchangedTensor: no change over 3 steps; here with a gradient, over 10 and the whole fit')
def not_stepped(rec, few=10):
    "A parameter receives a gradient but is never changed: the optimizer does not have it."
    r = run(rec)
    lays = r.layers
    if not lays: return
    g, u = r.get('grad', 'norm', lays), r.get('update', 'norm', lays)
    w    = r.get('weight', 'norm', lays) if ('weight', 'norm') in rec else np.ones_like(g)
    seen = r.stepped[:, None] & (g * r.lr[:, None] > 1e-6 * w) & np.isfinite(u)        # below it, a step is lost in rounding
    hit  = (seen.sum(0) >= few) & ~((u > 0) & seen).any(0)
    if not hit.any() or (hit.all() and not _stuck(r)): return
    names = tuple(np.array(lays)[hit])
    yield Finding('not_stepped', names[0], (int(r.iter[0]), int(r.iter[-1])), 0., 0., 'critical',
                  f"{_names(names)}: a gradient in {int(seen[:, hit].sum(0).min())} steps, and not one changed it",
                  "give these parameters to the optimizer, or freeze them with requires_grad_(False) to save their gradient",
                  {'optimizer': 'all parameters'}, names)


@rule(needs=[LOSS, ('grad', 'mean')], source='von Neumann ratio of successive differences to variance, of ranks: 2 for independent batches. Healthy runs of the '
                                         'zoo 1.6 to 1.9, kept gradients .01 to .04')
def not_zeroed(rec, limit=.3, noisy=1.5):
    "Gradients are kept from step to step: zero_grad is forgotten."
    r = run(rec)
    if len(r) < SETTLE + WINDOW or not r.layers: return
    m    = r.get('grad', 'mean', r.layers)[SETTLE:]
    m    = np.where(r.stepped[SETTLE:, None], m, np.nan)
    loss = r.loss[SETTLE:]
    loss = loss[np.isfinite(loss)]
    if len(loss) < WINDOW: return
    with np.errstate(divide='ignore', invalid='ignore', over='ignore'):
        rough = np.mean(np.diff(loss, 2) ** 2) / np.mean(np.diff(loss) ** 2)            # about 3 where batches differ, 0 for full batches
        ratio = np.array([_von_neumann(c) for c in m.T])
    known = np.isfinite(ratio)
    hit   = known & (ratio < limit)
    if not hit.any() or hit.sum() < .5 * known.sum() or not rough > noisy: return
    names = tuple(np.array(r.layers)[hit])
    yield Finding('not_zeroed', names[0], (int(r.iter[0]), int(r.iter[-1])), float(np.median(ratio[hit])), limit, 'critical' if _stuck(r) else 'warning',
                  f"the gradient of {_names(names)} hardly changes from one batch to the next (successive differences over variance "
                  f"{num(np.median(ratio[hit]))}, 2 for independent batches) while the loss does: each step has all earlier gradients in it",
                  "opt.zero_grad() before each backward pass (or is this accumulation, with a step after every batch?)", {'zero_grad': True}, names)

def _von_neumann(x):
    x = x[np.isfinite(x)]
    x = x[np.concatenate([[True], x[1:] != x[:-1]])] if len(x) else x                  # a dead layer's gradient stands still
    if len(x) < WINDOW: return np.nan
    x = x.argsort().argsort().astype(float)                  # ranks: a few large ones at the start are no trend
    return np.mean(np.diff(x) ** 2) / np.var(x)


# --- the start -------------------------------------------------------------------------------------------------------
@rule(needs=[[('activation', 'std'), ('weight', 'norm')]], source='Glorot & Bengio 2010, He 2015: scale kept from layer to layer; a default-initialised '
                                                                'ReLU net loses a factor 2.4 a layer. Limits: zoo')
def bad_init(rec, limit=10., each=1.6, loss=3.):
    "Values shrink or grow from layer to layer in the first iterations, forward or backward; or weights are all zero."
    r = run(rec)
    if not len(r): return
    worked = not _stuck(r) and len(r) >= SETTLE + FEWEST        # before that it is a forecast
    harm   = 'info' if worked else 'critical' if _stuck(r) else 'warning'
    if ('weight', 'norm') in rec and r.layers:
        zero = r.get('weight', 'norm', r.layers)[0] == 0
        if zero.sum() >= 2:
            g0   = r.get('grad', 'norm', r.layers)[:3] if ('grad', 'norm') in rec else np.zeros((1, len(zero)))
            hurt = not (np.nan_to_num(g0).max(0) > 0)[zero].any()
            names = tuple(np.array(r.layers)[zero])
            if hurt or not worked:
                yield Finding('bad_init', names[0], (int(r.iter[0]), int(r.iter[min(2, len(r) - 1)])), 0., 0., harm,
                              f"{_names(names)} start at exactly zero, so no gradient passes them",
                              "random initial weights: Kaiming", {'init': 'kaiming'}, names)
                return
    if ('activation', 'std') not in rec: return
    acts = rec.layers['activation']
    s    = r.get('activation', 'std')[0]                        # before the first step
    ok   = np.isfinite(s) & (s > 0)
    if ok.sum() < 3: return
    y    = np.log(s[ok])
    x    = np.arange(len(y))
    b    = np.polyfit(x, y, 1)[0]
    total, per = float(np.exp(y[-1] - y[0])), float(np.exp(b))
    sat  = acts.type.isin(['Tanh', 'Sigmoid']).all() and per >= 1 / each         # bounded: scale cannot grow
    far  = max(total, 1 / total) > limit and max(per, 1 / per) > each and not sat
    if not far: return
    names = tuple(acts.layer[ok])
    back  = ''
    if ('grad', 'norm') in rec and len(r.layers) > 2:
        g = r.get('grad', 'norm', r.layers)[0] / np.sqrt(rec.layers['grad'].numel.to_numpy(float)[r.cols])
        g = g[np.isfinite(g) & (g > 0)]
        if len(g) > 2: back = f"; gradients (rms of an element) from {num(g[0])} in the first to {num(g[-1])} in the last"
    word = 'shrinks' if per < 1 else 'grows'
    yield Finding('bad_init', names[-1], (int(r.iter[0]), int(r.iter[min(2, len(r) - 1)])), per, each if per > 1 else 1 / each,
                  harm,
                  f"the std of the activations {word} by a factor {num(per if per > 1 else 1 / per)} a layer, from {num(np.exp(y[0]))} in {names[0]} "
                  f"to {num(np.exp(y[-1]))} in {names[-1]}, in the first iterations{back}" + ("; training went on in spite of it" if worked else ''),
                  "Kaiming initialisation (LSUV mends it from one batch), or normalisation between the layers",
                  {'init': 'kaiming', 'norm': 'batch'}, names)


@rule(needs=[('input', 'std'), ('input', 'mean')], source='UMLAUT warns outside -1 to 1, which standardised inputs exceed. Limits: zoo')
def input_scale(rec, large=10., small=.01):
    "The input is far from mean 0 and standard deviation 1."
    r = run(rec)
    m, s = _median(r.get('input', 'mean')), _median(r.get('input', 'std'))
    hit = (s > large) | (np.abs(m) > large) | (s < small)
    hit &= np.isfinite(s)
    if not hit.any(): return
    k = int(hit.argmax())
    first = rec.layers['grad'].type.iloc[0] if 'grad' in rec.layers and len(rec.layers['grad']) else ''
    if 'BatchNorm' in str(first): return                                           # it is normalised at once
    lr_small = not _stuck(r)
    yield Finding('input_scale', rec.layers['input'].layer[k], (int(r.iter[0]), int(r.iter[-1])), float(s[k]), large if s[k] > small else small,
                  'warning' if lr_small else 'critical',
                  f"the input has mean {num(m[k])} and standard deviation {num(s[k])}; initialisation and learning rates are made for 0 and 1",
                  "normalise the input (fastai: Normalize.from_stats, tabular's Normalize)", {'input': 'normalize'}, (rec.layers['input'].layer[k],))


@rule(needs=[LOSS, ('output', 'mean'), ('output', 'min'), ('output', 'max')], source='UMLAUT has the mistake from the code; here from the numbers: outputs of '
                                                                                 'sum 1 and a first loss of ln(classes)')
def double_softmax(rec):
    "The model ends in a softmax, and the loss takes another."
    r = run(rec)
    if not r.layers or len(r) < 3: return
    m, lo, hi = (r.get('output', s)[:, 0] for s in ('mean', 'min', 'max'))
    n   = 1 / np.nanmedian(m) if np.nanmedian(m) > 0 else np.nan
    one = np.nanmax(np.abs(m * round(n) - 1)) < 1e-3 if np.isfinite(n) and n < 1e6 else False
    if not (one and round(n) >= 2 and np.nanmin(lo) >= 0 and np.nanmax(hi) <= 1 + 1e-6): return
    if not abs(r.first_loss / np.log(round(n)) - 1) < .1 or np.nanmin(r.loss) < np.log(round(n)) - 1: return
    floor = np.log(1 + (round(n) - 1) / np.e)
    yield Finding('double_softmax', '', (int(r.iter[0]), int(r.iter[-1])), float(np.nanmin(r.loss)), floor, 'critical' if _stuck(r) else 'warning',
                  f"the outputs lie in 0 to 1 and sum to 1 over {round(n)} classes, and the first loss is ln {round(n)}: through a second softmax "
                  f"the loss cannot fall below {num(floor)}", "give cross-entropy the logits: take the model's softmax away", {'remove': 'softmax'})


# --- the outcome -----------------------------------------------------------------------------------------------------
@rule(needs=[LOSS], source='SM LossNotDecreasing: .1 % over 10 steps. Here: not a twentieth of the constant answer\'s loss after 40 rows, thresholds.py')
def not_learning(rec, few=40):
    "Nothing has been learned from the input at the end."
    r = run(rec)
    if len(r) < few or not r.has_loss or not np.isfinite(r.loss[-1]): return
    if not r.blind[-WINDOW:].all() or r.falling[-1] or r.waking()[0][-1]: return
    b   = r.blind
    a   = len(b) - int(np.argmin(b[::-1])) if not b.all() else 0
    g   = r.learned[-1]
    was = f"gain over the best constant answer {num(max(g, 0))} at the end" if np.isfinite(g) else "gain was not measured"
    yield Finding('not_learning', '', (int(r.iter[a]), int(r.iter[-1])), float(g), .05 * abs(r.best_constant), 'critical',
                  f"loss {num(r.first_loss)} at the start, {num(trailing(r.loss)[-1])} at the end; {was}",
                  "see what stands before this; if nothing does: the labels, the data, the learning rate", {})


@rule(needs=[LOSS], source='Lightning SpikeDetection: twice the mean of the last 10; here also above the first loss, and several')
def unstable(rec, times=2., few=3):
    "The loss spikes again and again above where it began."
    r = run(rec)
    if len(r) < SETTLE + WINDOW or not r.positive: return
    base = trailing(r.loss, 10, few=5)
    ref  = max(r.first_loss, r.best_constant) if np.isfinite(r.best_constant) else r.first_loss
    prev = np.concatenate([[np.nan], base[:-1]])
    with np.errstate(invalid='ignore'): hit = (r.loss > times * prev) & (r.loss > 1.5 * ref)
    above = np.nan_to_num(r.loss[SETTLE:]) > times * ref
    if hit.sum() < few and above.mean() < .25: return
    rows  = np.flatnonzero(hit) if hit.sum() >= few else np.flatnonzero(above) + SETTLE
    spike = _spike(r, int(rows[0]))
    yield Finding('unstable', '', (int(r.iter[rows[0]]), int(r.iter[rows[-1]])), float(np.nanmax(r.loss)), times * ref, 'critical' if _stuck(r) else 'warning',
                  f"the loss began at {num(r.first_loss)}, reached {num(np.nanmax(r.loss))} and was above {times:g} times its start in {pct(above.mean())} of the "
                  f"iterations" + (f"; the step at iteration {spike[0]} changed {spike[1]} by {num(spike[2])} times its norm" if spike else ''),
                  "a smaller learning rate or clipping; check that the gradients are zeroed before each step", {'lr': .1, 'clip': 1.})


# in the order of cause: what stands first explains what follows
ALL = (input_scale, double_softmax, not_stepped, not_zeroed, bad_init, fp16_underflow, step_too_large, exploding, non_finite, unstable, saturated,
       dead_units, vanishing, starved, step_too_small, not_learning)
