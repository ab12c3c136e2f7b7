"Rules about the start: initialisation, input, output."
from __future__ import annotations

import numpy as np

from .advising import advise
from .answering import num
from .evidence import FEWEST, run
from .findings import LOSS, Finding, medians, named, root_numel, rule, stuck
from .thresholds import SETTLE

SCALE = {'init': 'kaiming', 'norm': 'batch'}


@rule(needs=[[('activation', 'std'), ('weight', 'norm')]],
      source='Glorot & Bengio 2010, He 2015: scale kept from layer to layer; a default-initialised ReLU net loses a '
             'factor 2.4 a layer. Limits: zoo')
def bad_init(rec, limit=10., each=1.6):
    "Values shrink or grow from layer to layer in the first iterations, forward or backward; or weights are all zero."
    r = run(rec)
    if not len(r): return
    worked = not stuck(r) and len(r) >= SETTLE + FEWEST         # before that it is a forecast
    harm   = 'info' if worked else 'critical' if stuck(r) else 'warning'
    span   = int(r.iter[0]), int(r.iter[min(2, len(r) - 1)])
    zero   = _zero_weights(r)
    if len(zero) >= 2 and (not worked or _no_gradient(r, zero)):
        yield Finding('bad_init', zero[0], span, 0., 0., harm,
                      f"{named(zero)} start at exactly zero, so no gradient passes them",
                      advise({'init': 'kaiming'}), {'init': 'kaiming'}, zero)
        return
    grown = _outgrown(r)
    if grown > 3 * limit:
        yield Finding('bad_init', '', span, grown, 3 * limit, harm,
                      f"before the first step the standard deviation of the outputs is {num(grown)} times that of the "
                      f"inputs, where an initialisation that keeps scale has about 1", advise(SCALE), SCALE)
        return
    if ('activation', 'std') not in rec: return
    acts = rec.layers['activation']
    s    = r.get('activation', 'std')[0]                        # before the first step
    ok   = np.isfinite(s) & (s > 0)
    if ok.sum() < 3: return
    y    = np.log(s[ok])
    b    = np.polyfit(np.arange(len(y)), y, 1)[0]
    total, per = float(np.exp(y[-1] - y[0])), float(np.exp(b))
    sat  = acts.type.isin(['Tanh', 'Sigmoid']).all() and per >= 1 / each         # bounded: scale cannot grow
    if not (max(total, 1 / total) > limit and max(per, 1 / per) > each) or sat: return
    names = tuple(acts.layer[ok])
    word  = 'shrinks' if per < 1 else 'grows'
    yield Finding('bad_init', names[-1], span, per, each if per > 1 else 1 / each, harm,
                  f"the std of the activations {word} by a factor {num(max(per, 1 / per))} a layer, from "
                  f"{num(np.exp(y[0]))} in {names[0]} to {num(np.exp(y[-1]))} in {names[-1]}, in the first iterations"
                  f"{_backward(r)}" + ("; training went on in spite of it" if worked else ''),
                  advise(SCALE), SCALE, names)

def _zero_weights(r):
    if ('weight', 'norm') not in r.rec or not r.layers: return ()
    return tuple(np.array(r.layers)[r.get('weight', 'norm', r.layers)[0] == 0])

def _outgrown(r):
    "Standard deviation of the first outputs over that of the inputs (1 where those are no numbers); 0: not recorded."
    if ('output', 'std') not in r.rec: return 0.
    out = np.nanmax(r.get('output', 'std')[0], initial=0)
    inp = np.nanmax(r.get('input', 'std')[0], initial=0) if ('input', 'std') in r.rec else 0.
    return float(out / inp) if inp > 0 else float(out)

def _no_gradient(r, layers):
    "Whether these layers had no gradient in the first iterations."
    if ('grad', 'norm') not in r.rec: return True
    return not np.nan_to_num(r.get('grad', 'norm', layers)[:3]).any()

def _backward(r):
    if ('grad', 'norm') not in r.rec or len(r.layers) < 3: return ''
    g = r.get('grad', 'norm', r.layers)[0] / root_numel(r)
    g = g[np.isfinite(g) & (g > 0)]
    return (f"; gradients (rms of an element) from {num(g[0])} in the first to {num(g[-1])} in the last"
            if len(g) > 2 else '')


@rule(needs=[('input', 'std'), ('input', 'mean')],
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
    yield Finding('input_scale', name, (int(r.iter[0]), int(r.iter[-1])), float(s[k]),
                  large if s[k] > small else small, 'critical' if stuck(r) else 'warning',
                  f"the input has mean {num(m[k])} and standard deviation {num(s[k])}; initialisation and learning "
                  f"rates are made for 0 and 1",
                  advise({'input': 'normalize'}), {'input': 'normalize'}, (name,))


@rule(needs=[LOSS, ('output', 'mean'), ('output', 'min'), ('output', 'max')],
      source='UMLAUT has the mistake from the code; here from the numbers: outputs of sum 1 and a first loss of '
             'ln(classes)')
def double_softmax(rec):
    "The model ends in a softmax, and the loss takes another."
    r = run(rec)
    if not r.layers or len(r) < 3: return
    m, lo, hi = (r.get('output', s)[:, 0] for s in ('mean', 'min', 'max'))
    n   = 1 / np.nanmedian(m) if np.nanmedian(m) > 0 else np.nan
    if not (np.isfinite(n) and n < 1e6): return
    n   = round(n)
    one = np.nanmax(np.abs(m * n - 1)) < 1e-3
    if not (one and n >= 2 and np.nanmin(lo) >= 0 and np.nanmax(hi) <= 1 + 1e-6): return
    if not abs(r.first_loss / np.log(n) - 1) < .1 or np.nanmin(r.loss) < np.log(n) - 1: return
    floor = np.log(1 + (n - 1) / np.e)
    yield Finding('double_softmax', '', (int(r.iter[0]), int(r.iter[-1])), float(np.nanmin(r.loss)), floor,
                  'critical' if stuck(r) else 'warning',
                  f"the outputs lie in 0 to 1 and sum to 1 over {n} classes, and the first loss is ln {n}: through a "
                  f"second softmax the loss cannot fall below {num(floor)}",
                  advise({'remove': 'softmax'}), {'remove': 'softmax'})
