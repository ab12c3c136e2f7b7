"""`check_init`: what the initialisation will do, from one batch forward and backward, before anything is trained."""
from __future__ import annotations

import copy
import random
import warnings
from typing import Any

import numpy as np
import pandas as pd
import torch
from fastai.learner import Learner

from ..diagnosis.fixes import found, signal
from .._text import num
from ..diagnosis.report import diagnose
from ..diagnosis.evidence import run
from ..diagnosis.finding import rule
from ..diagnosis.rules import bad_init, dead_units, input_scale, non_finite, saturated
from ..diagnosis.thresholds import WHOLE
from ..measure.rng import unchanged_random_state
from ..measure.plain_loop import watch

@rule(needs=[('grad_output', 'std')],
      source="limit: AutoTrainer's for the gradient's norm; zoo: default-initialised sigmoid and 20-layer nets 4e-4 "
             "and less, healthy ones .0048 to 15")
def fading(rec, limit=1e-3):
    "The gradient shrinks or grows from layer to layer on its way back."
    r, (names, b) = run(rec), _backward(rec)
    seen     = np.isfinite(b) & (b > 0)
    if seen.sum() < 3: return
    at    = np.flatnonzero(seen)
    total = float(b[at[0]] / b[at[-1]])
    if limit <= total <= 1 / limit: return
    per  = total ** (1 / (at[-1] - at[0]))
    fade = total < 1
    fix  = signal(r)
    yield found(r, 'vanishing' if fade else 'exploding', layer=names[at[0]], layers=tuple(names), iters=(0, 0),
                value=total, limit=limit if fade else 1 / limit, severity='warning', fix=fix,
                evidence=f"on its way back from {r.called([names[at[-1]]])} to {r.called([names[at[0]]])} the gradient "
                         f"{'shrinks to' if fade else 'grows to'} {num(total)} of itself (std of an element), a factor "
                         f"{num(per)} a layer")

@rule(needs=[('activation', 'frac_dead')], source='dead_units: all units of a layer, where half is a matter of taste')
def silent(rec):
    "No unit of an activation varies from example to example: nothing gets through."
    yield from (f for f in dead_units(rec) if f.value >= WHOLE)

RULES = (input_scale, non_finite, silent, bad_init, fading, saturated)


class InitCheck:
    "What `check_init` found: `.table`, `.forward`, `.backward` (slope of ln std per layer), `.findings`, `.factors`."
    def __init__(self, table, forward, backward, findings, loss, record):
        self.table, self.findings, self.loss, self.record = table, findings, loss, record
        self.forward, self.backward = forward, backward
        self.factors = dict(zip(table.layer, table.factor))

    @property
    def ok(self): return not self.findings

    def __repr__(self):
        def say(s):
            if np.isnan(s): return 'pass too few layers for a trend'
            return f"{'keep' if abs(s) < .1 else 'shrink' if s < 0 else 'grow'} (a factor {num(np.exp(s))} a layer)"
        head = (f"First loss {num(self.loss)}. Going forward activations {say(self.forward)}; "
                f"on the way back gradients {say(-self.backward)}.")
        out  = [head, self.table.to_string(index=False, float_format=num)]
        for f in self.findings: out.append(f"{f.rule}: {f.evidence}. Try: {f.advice}.")
        if self.findings and any(f.rule == 'bad_init' for f in self.findings):
            out.append("`factor`: multiply the weights before each activation by it, first to last, and the "
                       "activations keep their scale.")
        return '\n'.join(out if self.findings else [*out, "No trouble foreseen."])


def check_init(
    learn: Learner,               # a fastai Learner that has not trained yet
    modules: Any = None,          # as LayerStatsCallback
) -> InitCheck:
    """One batch forward and backward on a copy: no step is taken; model, optimizer and random state are as before.

    Raises:
        TypeError: `learn` is no Learner.

    Example:
        check_init(learn)
        check_init(learn).ok
    """
    if not (hasattr(learn, 'dls') and hasattr(learn, 'loss_func')):
        raise TypeError(f"check_init takes a fastai Learner, which has the model, its data and its loss; got "
                        f"{type(learn).__name__}. Give Learner(dls, model, loss_func)")
    dl  = learn.dls.train
    own = [r for r in [getattr(dl, 'rng', None)] if isinstance(r, random.Random)]
    with unchanged_random_state(rngs=own):
        model, loss_func = copy.deepcopy(learn.model).train(), copy.deepcopy(learn.loss_func)
        batch = next(iter(dl))
        for rng in own: dl.rng = rng                                   # iterating has put another in its place
        n_inp = getattr(learn.dls, 'n_inp', 1)
        xb, yb = tuple(batch[:n_inp]), tuple(batch[n_inp:])
        where = next((p.device for p in model.parameters()), torch.device('cpu'))
        xb, yb = [tuple(t.to(where) if hasattr(t, 'to') else t for t in b) for b in (xb, yb)]
        opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad] or [torch.zeros(1)], lr=0.)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            with watch(model, opt, modules=modules, grad_output=['std']) as w:
                loss = loss_func(model(*xb), *yb)
                w.loss(loss).backward()
                opt.step()
        rec = w.record
    return _read(rec, float(loss.detach()))

def _read(rec, loss):
    acts, b = _backward(rec)
    s       = rec['activation', 'std'][0].astype(float) if len(acts) else np.array([])
    with np.errstate(divide='ignore', invalid='ignore'):
        scale = np.concatenate([[1.], s[:-1]]) / s if len(s) else s
        table = pd.DataFrame(dict(layer=acts, std=s, grad_std=b, factor=np.where(np.isfinite(scale), scale, np.nan)))
    return InitCheck(table, _slope(s), _slope(b), list(diagnose(rec, RULES).findings), loss, rec)

def _backward(rec):
    "The activations and the std of the gradient that reaches each; NaN where none does.  # [layer], (layer,)"
    acts = list(rec.layers['activation'].layer) if 'activation' in rec.layers else []
    if ('grad_output', 'std') not in rec or not acts: return acts, np.full(len(acts), np.nan)
    at = pd.Index(rec.layers['grad_output'].layer).get_indexer(acts)
    return acts, np.where(at >= 0, rec['grad_output', 'std'][0].astype(float)[at], np.nan)

def _slope(v):
    ok = np.isfinite(v) & (v > 0)
    return float(np.polyfit(np.flatnonzero(ok), np.log(v[ok]), 1)[0]) if ok.sum() >= 3 else np.nan
