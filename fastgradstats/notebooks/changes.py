"What a run is made of, read from its record, and what is not as in the run before it."
from __future__ import annotations

from collections import Counter

import numpy as np

from .._text import num
from ..record.select import columns, weights

ALIKE = .1                        # a share by which norms may differ that are the same but for the random numbers


def model(rec):
    "The model in words: 'Sequential: 5 Conv2d, 4 ReLU, 30,154 weights'."
    parts = [f"{n} {kind}" for kind, n in _kinds(rec).items()] + [f"{_size(rec):,} weights"] * bool(_size(rec))
    return f"{rec.meta.get('model', 'a model')}: {', '.join(parts)}"

def optimizer(rec, told=''):
    "The optimizer in words, its settings as they were at the highest rate."
    it, o = rec.iters, rec.meta.get('optimizer') or {}
    parts = [o.get('name') or told or 'no optimizer that is known']
    lr    = it.lr[np.isfinite(it.lr)]
    if len(lr): parts.append(f"lr {lr.max():.4g}" if lr.min() == lr.max() else f"lr {lr.min():.2g} to {lr.max():.4g}")
    mom = it.mom[np.isfinite(it.mom) & (it.mom != 0)]
    if len(mom): parts.append(f"momentum {mom.max():.3g}")
    if o.get('wd') and not isinstance(o['wd'], list): parts.append(f"weight decay {o['wd']:.3g}")
    return ', '.join(parts)

def steps(rec):
    it    = rec.iters
    sizes = sorted(set(it.bs[it.bs > 0]))
    of    = f" of {int(it.bs.median()):,}" if sizes else ''
    return f"{len(it):,} step{'s' * (len(it) != 1)}{of}"


def changed(rec, before):
    "What is not as in the run before, in words, the most telling first; [] where nothing that was recorded is."
    names = [str(r.meta.get('model', 'a model')) for r in (before, rec)]
    out   = [' → '.join(names)] * (names[0] != names[1]) + _layers(rec, before)
    for what, f in (('', lambda r: optimizer(r)), ('batches of ', lambda r: str(int(r.iters.bs.median())))):
        a, b = f(before), f(rec)
        if a != b: out.append(f"{what}{a} → {b}")
    out += _input(rec, before)
    if _shapes(rec) == _shapes(before): out += _start(rec, before)
    if len(rec) != len(before): out.append(f"{len(before):,} → {len(rec):,} steps")
    return out

def _kinds(rec):
    "How many layers of each type, in order of first use."
    out = Counter()
    for probe in ('grad', 'activation'):
        d = rec.layers.get(probe)
        if d is not None and 'type' in d: out.update(d.drop_duplicates('module' if 'module' in d else 'layer').type)
    return out

def _layers(rec, before):
    a, b = _kinds(before), _kinds(rec)
    if a != b:
        less, more = a - b, b - a
        tell = lambda c: ', '.join(f"{n} {k}" for k, n in c.items())
        return [f"{tell(less)} → {tell(more)}" if less and more else f"+ {tell(more)}" if more else f"– {tell(less)}"]
    return [f"{_size(before):,} → {_size(rec):,} weights"] if _shapes(rec) != _shapes(before) else []

def _shapes(rec): return list(rec.layers['grad']['shape']) if 'grad' in rec.layers else []
def _size(rec):   return rec.layers['grad'].numel.sum() if 'grad' in rec.layers else 0

def first(rec, key, layers=None):
    "The first measured value of a statistic, of every layer.  # (layer,)"
    if key not in rec or not rec[key].size: return np.array([])
    v = rec[key] if layers is None else rec[key][:, columns(rec, key[0], layers)]
    seen = np.isfinite(v).any(1)
    return v[seen.argmax()].astype(float) if seen.any() else np.array([])

def _input(rec, before):
    a, b = (first(r, ('input', 'std')) for r in (before, rec))
    if not len(a) or not len(b) or abs(b[0] - a[0]) <= ALIKE * abs(a[0]): return []
    return [f"the input's std {num(a[0])} → {num(b[0])}"]

def _start(rec, before):
    "Of two nets of the same layers: whether they start from the same weights."
    a, b = (first(r, ('weight', 'norm'), weights(r)) for r in (before, rec))
    if not len(a) or len(a) != len(b) or not (a > 0).all(): return []
    if np.allclose(a, b, rtol=1e-6): return ['the same first weights']
    ratio = b / a
    if np.abs(ratio - 1).max() < ALIKE: return []
    span  = f"{num(ratio.min())} to {num(ratio.max())}" if ratio.max() > (1 + ALIKE) * ratio.min() else num(ratio.max())
    return [f"first weights {span} times as large"]
