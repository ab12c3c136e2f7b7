"Rules about the start: initialisation, input, output."
from __future__ import annotations

import numpy as np
import pandas as pd

from ..fixes import found, signal, weights
from ..._text import num
from ..evidence import LOUD, run
from ..series import FEWEST
from ..finding import LOSS, medians, need, root_numel, rule, severity, stuck
from ..thresholds import DEAD_JUMP, SETTLE

def _place(r, f, by):
    "Weights that are too large are known before the first step; what fades makes no step too large."
    if f.limit == LOUD: return 'before', 'not_zeroed'
    if 0 < f.value < 1 and {'step_too_large', 'exploding'} & {*by}: return 'after', 'non_finite'


@rule(cause='the initialisation is off scale',
      explains=('step_too_large', 'exploding', 'non_finite', 'unstable', 'saturated', 'dead_units', 'vanishing',
                'starved', 'not_learning'),
      place=_place,
      needs=[[('activation', 'std'), ('weight', 'norm')]],
      source='Glorot & Bengio 2010, He 2015: scale kept from layer to layer; a default-initialised ReLU net loses a '
             'factor 2.4 a layer. Limits: zoo')
def bad_init(rec, limit=10., each=1.6):
    "Values shrink or grow from layer to layer in the first iterations, forward or backward; or weights are all zero."
    r = run(rec)
    if not len(r): return
    worked = not stuck(r) and len(r) >= SETTLE + FEWEST         # before that it is a forecast
    past   = worked and not _costly(r) and bool(r.learned[r.end])
    span   = int(r.iter[0]), int(r.iter[min(2, len(r) - 1)])
    zero   = _zero_weights(r)
    if zero and _no_gradient(r, zero) and (len(zero) >= 2 or not worked):
        stays = not r.get('weight', 'norm', zero)[-1].all()
        fix   = signal(r) if r.off_scale else weights(r)
        yield found(r, 'bad_init', layer=zero[0], layers=zero, iters=span, value=0., limit=0., fix=fix,
                    severity=severity(r, ended=past, least='warning' if stays else 'info'),
                    evidence=f"{r.called(zero)} start{'s' * (len(zero) == 1)} at exactly zero, so no gradient passes")
        return
    names, y = _scales(r)
    if len(y) < 3: return
    k    = _outlier(np.diff(y), limit)
    loud = [(l, q) for l, q in r.off_scale.values() if q > LOUD]
    far  = _trend(r, names, y, limit, each)
    if not (far or _outgrown(r) > 3 * limit or loud or k is not None and not worked): return
    what = (_loudest(r, loud) if loud else _one_step(r, names, np.diff(y), k, limit) if k is not None else
            far or _outputs(r, names, y, 3 * limit))
    if worked: what['evidence'] += "; training went on in spite of it" + (
        ", most of the time with a larger loss than a constant answer has" if _costly(r) else '')
    yield found(r, 'bad_init', iters=span, severity=severity(r, ended=past), fix=signal(r), **what)

def _loudest(r, loud):
    "Weights that are far too large."
    l, q = max(loud, key=lambda lq: lq[1])
    return dict(layer=l, layers=tuple(l for l, _ in loud), value=q, limit=LOUD,
                evidence=f"before the first step the rms of {l} is {num(q)} / sqrt(fan in), where an initialisation "
                         f"that keeps scale has about 1{_backward(r)}")

def _one_step(r, names, d, k, limit):
    "One layer that changes the scale as no other does."
    f = float(np.exp(d[k]))
    return dict(layer=names[k + 1], layers=(names[k + 1],), value=f, limit=limit if f > 1 else 1 / limit,
                evidence=f"before the first step {r.called([names[k + 1]])} {'multiplies' if f > 1 else 'divides'} the "
                         f"standard deviation by {num(max(f, 1 / f))}, where the median layer changes it by a factor "
                         f"{num(np.exp(np.median(d)))}{_backward(r)}")

def _trend(r, names, y, limit, each):
    "Activations that shrink or grow by `each` a layer and by `limit` in all; None where they do not."
    acts = r.rec.layers.get('activation', pd.DataFrame(dict(layer=[], type=[])))
    mid  = np.isin(names, acts.layer)
    if mid.sum() < 3: return
    total = float(np.exp(y[mid][-1] - y[mid][0]))
    per   = float(np.exp(np.polyfit(np.arange(mid.sum()), y[mid], 1)[0]))
    bound = acts.type.isin(['Tanh', 'Sigmoid']).all() and per >= 1 / each                        # scale cannot grow
    if max(total, 1 / total) <= limit or max(per, 1 / per) <= each or bound: return
    word  = 'shrinks' if per < 1 else 'grows'
    sites = tuple(np.array(names)[mid])
    return dict(layer=sites[-1], layers=sites, value=per, limit=each if per > 1 else 1 / each,
                evidence=f"the std of the activations {word} by a factor {num(max(per, 1 / per))} a layer, from "
                         f"{num(np.exp(y[mid][0]))} in {r.called(sites[:1])} to {num(np.exp(y[mid][-1]))} in "
                         f"{r.called(sites[-1:])}, in the first iterations{_backward(r)}")

def _outputs(r, names, y, limit):
    "Outputs that are far larger than the inputs."
    d    = np.diff(y)
    k    = int(d.argmax())
    most = (names[k + 1],) if d[k] > .5 * (y[-1] - y[0]) else ()                   # more than half of it in one layer
    return dict(layer=''.join(most), layers=most, value=_outgrown(r), limit=limit,
                evidence=f"before the first step the standard deviation of the outputs is {num(_outgrown(r))} times "
                         f"that of the inputs, where an initialisation that keeps scale has about 1"
                         f"{f', most of it by {r.called(most)}' if most else ''}")

def _scales(r):
    """Names and ln std, before the first step, of the input, the activations and the output (under the name of the
    last weight), as far as recorded; up to the first activation whose units are dead, which cuts what follows off."""
    rec, out = r.rec, []
    first = r.get('activation', 'std')[0, :1] if ('activation', 'std') in rec else np.array([])
    if ('input', 'std') in rec: out.append(('input', float(np.clip([*first, 1.][0], *_input_std(r)))))
    whole = True
    if ('activation', 'std') in rec:
        dead = ('activation', 'frac_dead')
        some = dead in rec and len(rec[dead])
        dead = np.nan_to_num(rec[dead][0]) if some else np.zeros(len(rec.layers['activation']))
        for l, s, q in zip(rec.layers['activation'].layer, r.get('activation', 'std')[0], dead):
            whole = s > 0 and q < DEAD_JUMP or not np.isfinite(s)
            if not whole: break
            if np.isfinite(s): out.append((l, s))
    if whole and r.layers and ('output', 'std') in rec:
        out.append((r.layers[-1], np.nanmax(r.get('output', 'std')[0], initial=0)))
    out = [(l, np.log(s)) for l, s in out if s > 0 and np.isfinite(s)]
    return [l for l, _ in out], np.array([s for _, s in out])

def _outlier(d, limit):
    """Which step of ln std is off the median one by `limit`, and twice as far as any other but one that takes it back
    later on (a norm); None if none is."""
    if len(d) < 3: return None
    off = d - np.median(d)
    far = np.flatnonzero(np.abs(off) > np.abs(off).max() / 2)
    k   = far[0]
    own = np.abs(off[k]) > np.log(limit) and (off[far[1:]] * off[k] < 0).all()
    return int(k) if own else None

def _zero_weights(r):
    if ('weight', 'norm') not in r.rec or not r.layers: return ()
    return tuple(np.array(r.layers)[r.get('weight', 'norm', r.layers)[0] == 0])

def _costly(r, clear=1.05):
    """Whether learning was undoing the start: most of the run had clearly a larger loss than the best constant answer,
    or a quarter of it, and three times as large at first."""
    if not np.isfinite(r.best_constant) or not r.positive: return False
    with np.errstate(invalid='ignore'): above = np.mean(r.loss > clear * r.best_constant)
    return bool(above > .5 or above > .25 and r.first_loss > 3 * r.best_constant)

def _outgrown(r):
    "Standard deviation of the first outputs over that of the inputs (1 where those are no numbers); 0: not recorded."
    if ('output', 'std') not in r.rec: return 0.
    out = np.nanmax(r.get('output', 'std')[0], initial=0)
    inp = _input_std(r)[1]
    return float(out / inp) if inp > 0 else float(out)

def _input_std(r):
    """Of the inputs before the first step, (least, most). Indices have no scale: where embeddings take some, what goes
    in lies between the embeddings' own and that of the other inputs, which counts as 1 at most."""
    if ('input', 'std') not in r.rec: return 0., 0.
    std = r.get('input', 'std')[0]
    emb = r.rec.layers['weight'][lambda d: d.type.str.startswith('Embedding')] if ('weight', 'norm') in r.rec else ()
    if not len(emb): return (float(np.nanmax(std, initial=0)),) * 2
    rms = r.get('weight', 'norm', list(emb.layer))[0] / np.sqrt(emb.numel.to_numpy(float))
    both = [np.nanmax(rms), *np.minimum(std, 1)]
    return float(np.nanmin(both)), float(np.nanmax(both))

def _no_gradient(r, layers):
    "Whether most of these layers had no gradient at first."
    if ('grad', 'norm') not in r.rec: return True
    return np.mean(np.nan_to_num(r.get('grad', 'norm', layers)[0]) > 0) <= .5

def _backward(r):
    if ('grad', 'norm') not in r.rec or len(r.layers) < 3: return ''
    g = r.get('grad', 'norm', r.layers)[0] / root_numel(r)
    g = g[np.isfinite(g) & (g > 0)]
    return (f"; gradients (rms of an element) from {num(g[0])} in the first to {num(g[-1])} in the last"
            if len(g) > 2 else '')


@rule(cause='the input is off scale',
      explains=('bad_init', 'step_too_large', 'exploding', 'non_finite', 'unstable', 'saturated', 'dead_units',
                'not_learning'),
      needs=[('input', 'std'), ('input', 'mean')],
      source='UMLAUT warns outside -1 to 1, which standardised inputs exceed. Limits: zoo')
def input_scale(rec, large=10., small=.01):
    "The input is far from mean 0 and standard deviation 1."
    r = run(rec)
    m, s = medians(r.get('input', 'mean')), medians(r.get('input', 'std'))
    hit  = ((s > large) | (np.abs(m) > large) | (s < small)) & np.isfinite(s)
    if not hit.any(): return
    k     = int(hit.argmax())
    first = rec.layers['grad'].type.iloc[0] if 'grad' in rec.layers and len(rec.layers['grad']) else ''
    if 'BatchNorm' in str(first): return                                           # it is normalised at once
    name  = rec.layers['input'].layer[k]
    yield found(r, 'input_scale', layer=name, layers=(name,), iters=(int(r.iter[0]), int(r.iter[-1])),
                value=float(s[k]), limit=large if s[k] > small else small,
                severity=severity(r, sign=bool(r.learned[r.end])), fix={'input': 'normalize'},
                evidence=f"the input has mean {num(m[k])} and standard deviation {num(s[k])}; initialisation and "
                         f"learning rates are made for 0 and 1")


@rule(cause='softmax is taken twice',
      explains=('starved', 'not_learning'),
      needs=[LOSS, ('output', 'mean'), ('output', 'min'), ('output', 'max')],
      source='UMLAUT has the mistake from the code; here from the numbers: outputs of sum 1 and a first loss of '
             'ln(classes)')
def double_softmax(rec):
    "The model ends in a softmax, and the loss takes another."
    r = run(rec)
    need(r, 3)
    if not r.layers: return
    m, lo, hi = (r.get('output', s)[:, 0] for s in ('mean', 'min', 'max'))
    n   = 1 / np.nanmedian(m) if np.nanmedian(m) > 0 else np.nan
    if not (np.isfinite(n) and n < 1e6): return
    n   = round(n)
    one = np.nanmax(np.abs(m * n - 1)) < 1e-3
    if not (one and n >= 2 and np.nanmin(lo) >= 0 and np.nanmax(hi) <= 1 + 1e-6): return
    if not abs(r.first_loss / np.log(n) - 1) < .2 or np.nanmin(r.loss) < np.log(n) - 1: return
    floor = np.log(1 + (n - 1) / np.e)
    yield found(r, 'double_softmax', iters=(int(r.iter[0]), int(r.iter[-1])), value=float(np.nanmin(r.loss)),
                limit=floor, severity=severity(r), fix={'remove': 'softmax'},
                evidence=f"the outputs lie in 0 to 1 and sum to 1 over {n} classes, and the first loss is ln {n}: "
                         f"through a second softmax the loss cannot fall below {num(floor)}")
