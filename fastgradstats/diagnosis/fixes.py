"""What to try: a `fix` for machines and the same in words, chosen from what was recorded.

A factor on the learning rate is a power of ten that brings the median layer's update ratio to what healthy runs take.
Which initialisation goes with which net was tried on the zoo's tuned half, every pair with every one.
"""
from __future__ import annotations

import math

import numpy as np

from .._text import join, num
from .series import median_layer
from .finding import Finding
from .thresholds import ADAM_LR, LARGE_STEP, SETTLE

SYMMETRIC = '^(?:Tanh|Softsign|Hardtanh)'
JUMP  = 10.                       # a learning rate of so many times the one before is the schedule's doing
WORDS = dict(
    lr         = lambda f, rate=np.nan: (f"a learning rate {num(f)} times as large" if not np.isfinite(rate) else
                                         f"a learning rate of {num(rate * f)} instead of {num(rate)}")
                                        + " (lr_find shows it)",
    lr_cap     = lambda v: f"a learning rate of {num(v)} at most",
    clip       = lambda v: f"clipping the gradient's norm at {num(v)}",
    init       = lambda v: {'kaiming': "Kaiming initialisation with biases of zero (or LSUV)",
                            'xavier':  "Xavier initialisation with biases of zero (or LSUV)",
                            'orthogonal': "orthogonal recurrent weights"}[v],
    norm       = lambda v: "normalisation between the layers (batch norm; in recurrent nets, transformers layer norm)",
    activation = lambda v: {'tanh': "an activation function whose slope reaches 1 (tanh, ReLU)",
                            'leaky_relu': "an activation function that leaks"}[v],
    input      = lambda v: "normalised inputs (fastai: Normalize.from_stats, tabular's Normalize)",
    remove     = lambda v: f"the model without its {v}: cross-entropy takes the logits",
    optimizer  = lambda v: "an optimizer that is given all parameters (or requires_grad_(False) where that is meant)",
    zero_grad  = lambda v: "opt.zero_grad() before each backward pass",
    loss_scale = lambda v: f"a loss scaled by {v:g} (MixedPrecision does it), or bfloat16")


def advise(fix, *more, rate=np.nan):
    "A fix in words, every key of it, and what else may be tried; `rate`: the learning rate that was used."
    names = fix.get('layers', ())
    only  = f" of layer{'s' * (len(names) > 1)} {join(names)} alone (others start at a usual scale)" if names else ''
    words = [WORDS[k](v, *[rate] * (k == 'lr')) + only * (k == 'init') for k, v in fix.items() if k != 'layers']
    return '; or '.join([*([join(words)] if fix else []), *more])

def found(r, rule, *, iters, value, limit, severity, evidence, layer='', layers=(), fix={}, also=()):
    "A Finding whose advice is its fix in words, or what else may be tried."
    first, words = (advise(fix, *more, rate=r.top_rate) for more in ([] if fix else also[:1], also))
    return Finding(rule, layer, iters, value, limit, severity, evidence, words, fix, layers, first)

def _share(r, probe, pattern):
    "The share of a probe's layers of which the type matches; a gate or two among others is no more than that."
    types = r.rec.layers[probe].type.astype(str) if probe in r.rec.layers else ()
    return types.str.contains(pattern).mean() if len(types) else 0.

def _sigmoids(r): return _share(r, 'activation', '^Sigmoid') > .5
def _normed(r):   return _share(r, 'grad', 'Norm') > 0

def weights(r):
    """The fix for initial weights: Kaiming for ReLU, Xavier where a norm or another activation function keeps the
    scale; for the layers alone that are off scale, where the others are not."""
    bounded = _sigmoids(r) or _share(r, 'activation', SYMMETRIC) > .5
    only    = {'layers': tuple(r.off_scale)} if r.off_scale else {}
    return {'init': 'xavier' if _normed(r) or bounded else 'kaiming', **only}

def signal(r):
    """The fix for a signal that fades or grows from layer to layer: layers off scale anew where the others are not, and
    norms; tanh for sigmoids, whose slope is .25 at most; else weights anew and a norm, where there is none, behind
    which Xavier's smaller weights learn faster."""
    if r.off_scale:  return {**weights(r), 'norm': 'batch'}
    if _sigmoids(r): return {'activation': 'tanh', 'init': 'xavier'}
    if _normed(r):   return weights(r)
    return {'init': 'kaiming' if _share(r, 'grad', '^(?:RNN|LSTM|GRU)') > 0 else 'xavier', 'norm': 'batch'}

def power_of_ten(x): return float(10. ** round(math.log10(x)))

def _to_usual(r, rows, ratio):
    """The factor on the learning rate that takes steps of such an update ratio, in those rows, to usual ones. Adam
    moves an element by about the learning rate whatever the net, so that there the rate itself is weighed as much as
    the ratio, and embeddings, of any scale and seldom moved, have no say."""
    lr = np.nanmax(r.lr[rows])
    if not r.adaptive or not lr > 0: return power_of_ten(r.usual_step / ratio)
    dense = ~np.array([str(t).startswith('Embedding') for t in r.rec.layers['grad'].type.iloc[r.cols]])
    ratio = np.nanmedian(median_layer(np.where(r.update_ratio > 0, r.update_ratio, np.nan)[rows][:, dense]))
    f     = ADAM_LR / lr
    return power_of_ten(math.sqrt(f * r.usual_step / ratio) if ratio > 0 else f)

def faster(r, ratio):
    "The fix for steps that are too small, by the median update ratio."
    return {'lr': float(np.clip(_to_usual(r, slice(SETTLE, None), ratio), 10., 1e4))}

def slower(r, row):
    """The fix for a step that was too large at `row`: an end to the schedule's jump, a clip where the steps before were
    usual ones, else a smaller learning rate."""
    row   = min(row, len(r) - 1)
    lr    = r.lr[:row][np.isfinite(r.lr[:row])]
    jump  = len(lr) and np.nanmax(r.lr[row - min(row, 3):row + 1]) / np.median(lr) >= JUMP
    if jump: return {'lr_cap': float(f'{np.median(lr):.2g}')}
    u     = np.nan_to_num(r.median_ratio[:row + 1])
    large = np.nanmax([LARGE_STEP, *(2 * r.equilibrium_ratio[:1])])              # AdamW may settle above it
    norms = r.all.grad_norm.to_numpy(float)[r.rows][:row]
    norms = norms[np.isfinite(norms) & (norms > 0)]
    usual = np.median(u[:-1][u[:-1] > 0]) <= large
    if len(u) > 5 and len(norms) and usual: return {'clip': float(f'{np.median(norms):.1g}')}
    over  = np.flatnonzero(u > large)[:1]                              # the first that was too large: others follow
    if not len(over): return {'lr': .1, 'clip': 1.}
    return {'lr': float(np.clip(_to_usual(r, over, u[over[0]]), 1e-6, .1))}

def scale_up(loss):
    "The fix for underflow: the power of two that brings the loss to about one."
    return {'loss_scale': float(2. ** max(round(-math.log2(loss)), 10))}
