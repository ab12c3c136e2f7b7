"""What the rules read from a record: rolling medians, what was learned, when a state began and ended.

Everything is indexed by the *measured* rows, `(row,)` or `(row, layer)`; layers are weights of two or more dimensions.
"""
from __future__ import annotations

import warnings
from functools import cached_property

import numpy as np
import pandas as pd

from ..record.record import Record
from ..record.select import columns, dims, weights
from .thresholds import (ADAM_LR, ADAPTIVE_STEP, AWAKE, BLOCKED, PASSES, SETTLE, SMALL_STEP, STARVED, STARVED_GAIN,
                         USUAL_STEP)

WINDOW  = 20                      # rows a judgement is the median of; the prototype's windows were 10 to 20
FEWEST  = 10                      # rows below which nothing is judged
HORIZON = 100                     # a forecast further ahead than this many rows is no forecast
NOISE   = 5                       # what is learned is near zero within so many batch-to-batch deviations of the loss
ADAPTIVE = 'adam', 'rms', 'lamb', 'lars', 'lion', 'adagrad', 'adadelta', 'adafactor', 'ranger'
HAZY    = .25                     # standard error of a cosine above which it is not known
SURE    = 4.                      # t statistic of a slope
DENSE   = 'Linear|Conv|RNN|LSTM|GRU|MultiheadAttention|NonDynamicallyQuantizableLinear'
FAINT, LOUD, FAR_BIAS = .02, 8., 3.                # healthy nets of the zoo .07 to 3, biases to 1; its faults from 12


class Evidence:
    "A record as the rules read it; arrays are computed once."
    def __init__(self, rec):
        self.rec  = rec
        it        = rec.iters
        self.all  = it
        self.rows = np.flatnonzero(it.measured.to_numpy())
        at        = it.iloc[self.rows]
        self.iter, self.loss = at.iter.to_numpy(), at.loss.to_numpy(float)
        self.constant = at.loss_constant.to_numpy(float)
        self.stepped  = at.stepped.to_numpy()
        self.lr       = at.lr.to_numpy(float)
        self.n        = len(self.rows)
        self.layers   = weights(rec)
        self.cols     = columns(rec, 'grad', self.layers) if self.layers else np.array([], int)

    def __len__(self): return self.n

    def get(self, probe, stat, layers=None):
        "(row, layer) of the measured rows; NaN columns for layers that the probe has not."
        v = self.rec[probe, stat][self.rows].astype(float)
        if layers is None: return v
        c = columns(self.rec, probe, layers)
        return np.where(c >= 0, v[:, c], np.nan) if len(c) else v[:, :0]

    def silent_at_first(self, layer):
        "Whether an activation was one number before the first step already."
        if ('activation', 'std') not in self.rec or not self.n: return False
        k = list(self.rec.layers['activation'].layer).index(layer)
        return self.get('activation', 'std')[0, k] == 0

    @cached_property
    def off_scale(self):
        """{module: (its weight, rms of that x sqrt(fan in))} of those whose weights or bias start far from what any
        usual initialisation gives: less than a fiftieth or more than 8 (PyTorch's own gives .58, Xavier about 1,
        Kaiming 1.4), a bias beyond an rms of 3; {} where it is not known, or where it is more than half of them."""
        d = self.rec.layers.get('weight')
        if d is None or ('weight', 'norm') not in self.rec or not self.n or not {'shape', 'type', 'module'} <= {*d}:
            return {}
        rms  = self.rec['weight', 'norm'][self.rows[0]] / np.sqrt(d.numel.to_numpy(float))
        each = [dims(s) for s in d['shape']]
        at   = lambda test: {m for m, hit in zip(d.module, test) if hit}
        mine = d.type.astype(str).str.match(DENSE).to_numpy()
        wide = np.array([len(s) > 1 for s in each])
        with np.errstate(divide='ignore', invalid='ignore'):
            size = rms * np.sqrt([np.prod(s[1:]) for s in each])
            odd  = np.where(wide, (size < FAINT) | (size > LOUD), rms > FAR_BIAS) & mine & np.isfinite(rms)
        first = {m: (l, float(q)) for m, l, q, w in zip(d.module[::-1], d.layer[::-1], size[::-1], wide[::-1]) if w}
        off   = at(odd)
        out   = {m: first[m] for m in dict.fromkeys(d.module) if m in off and m in first}
        return out if len(out) <= len(at(mine & wide)) / 2 else {}

    # --- the loss ----------------------------------------------------------------------------------------------------
    @cached_property
    def has_loss(self): return bool(np.isfinite(self.loss).any())
    @cached_property
    def positive(self): return self.has_loss and bool(np.nanmin(self.loss) > 0)

    @cached_property
    def first_loss(self):
        v = self.loss[np.isfinite(self.loss)][:SETTLE]
        return float(np.median(v)) if len(v) else np.nan

    @cached_property
    def best_constant(self):
        "The lowest loss (median of 9 batches) that a constant answer had: large outputs make the plain one too high."
        with np.errstate(invalid='ignore'):
            c = rolling_median(np.where(np.isfinite(self.constant), self.constant, np.nan), 9, few=3)
        return float(np.nanmin(c)) if np.isfinite(c).any() else np.nan

    @cached_property
    def gain_over_constant(self):
        "Best constant answer's loss minus the loss, median of a trailing window.  # (row,)"
        return self.best_constant - rolling_median(self.loss)

    @cached_property
    def noise(self):
        "Batch-to-batch deviation of the loss in a trailing window.  # (row,)"
        return deviation(self.loss)

    @cached_property
    def not_learned(self):
        """Where nothing has been learned from the input: the gain is near zero, both as a share of the constant
        answer's loss and against the noise of the loss, so that a constant added to the loss does not look like it;
        nor is it better, batch by batch, than its own mean answer, which tells where batches differ much.
        Where the gain was not measured: the loss has not fallen by a tenth.  # (row,) bool"""
        with np.errstate(invalid='ignore'):
            if not np.isfinite(self.best_constant): return rolling_median(self.loss) >= .9 * self.first_loss
            c = abs(self.best_constant)
            paired = self.constant - self.loss
            worth  = np.maximum(STARVED_GAIN * c, NOISE * deviation(paired))
            fair   = rolling_median(self.constant) < 2 * c                           # else its mean answer is a bad one
            better = (rolling_median(paired) > worth) & fair
            gain   = self.gain_over_constant
            return (gain < STARVED_GAIN * c) & (gain < np.maximum(NOISE * self.noise, .005 * c)) & ~better

    @cached_property
    def falling(self):
        "Where the loss falls clearly over the trailing window.  # (row,) bool"
        s, t = slope(self.loss, WINDOW)
        with np.errstate(invalid='ignore'): return (t < -SURE)

    # --- the placebo -------------------------------------------------------------------------------------------------
    @cached_property
    def placebo(self):
        "The last placebo measured up to each row: how far a signal without meaning moves the answers.  # (row, layer)"
        if ('grad', 'placebo') not in self.rec or not self.layers: return np.full((self.n, len(self.layers)), np.nan)
        return pd.DataFrame(self.get('grad', 'placebo', self.layers)).ffill().to_numpy()

    @cached_property
    def median_placebo(self):
        "Of the median layer.  # (row,)"
        return median_layer(self.placebo)

    @cached_property
    def total_norm(self):
        "Norm of the weights' gradients together, NaN where it was not recorded.  # (row,)"
        if not self.layers or ('grad', 'norm') not in self.rec: return np.full(self.n, np.nan)
        with np.errstate(over='ignore', invalid='ignore'):
            return np.sqrt(np.nansum(self.get('grad', 'norm', self.layers) ** 2, axis=1))

    # --- elasticity --------------------------------------------------------------------------------------------------
    @cached_property
    def elasticity(self):
        "(row, layer) of the weights."
        if ('grad', 'elasticity') not in self.rec: return np.full((self.n, len(self.layers)), np.nan)
        return self.get('grad', 'elasticity', self.layers)

    @cached_property
    def median_elasticity(self):
        "Of the median layer that has a gradient at all.  # (row,)"
        return median_layer(self.elasticity)

    @cached_property
    def update_ratio(self):
        "(row, layer) of the weights; NaN where no step was taken."
        if ('update', 'ratio') not in self.rec: return np.full((self.n, len(self.layers)), np.nan)
        return np.where(self.stepped[:, None], self.get('update', 'ratio', self.layers), np.nan)

    @cached_property
    def median_ratio(self):
        "Of the median layer that moves at all.  # (row,)"
        u = self.update_ratio
        with np.errstate(invalid='ignore'): return median_layer(np.where(u > 0, u, np.nan))

    @cached_property
    def direction(self):
        """The share of the loss that a step removed, in the trailing window, over what elasticity and update ratio
        allow (the sum over the layers of their product): the cosine between the update and the way down, as the
        outcome has it. 1: straight down; 0: at random, or too far; negative: up. NaN where a factor was not measured,
        and where the noise of the loss hides it (a standard error above HAZY).  # (row,)"""
        with np.errstate(divide='ignore', invalid='ignore'):
            allowed = rolling_median(np.nansum(self.elasticity * self.update_ratio, axis=1)) * rolling_median(self.loss)
            fell, t = slope(self.loss, WINDOW)
            known   = (allowed > 0) & (np.abs(fell / t) < HAZY * allowed)
            return np.where(known, np.clip(-fell / allowed, -1, 1), np.nan)

    def failing(self, row=-1):
        "Which factor of a step fails at `row`: 'elasticity', 'update ratio', 'direction'; '' where it cannot be told."
        e, u = rolling_median(self.median_elasticity)[row], rolling_median(self.median_ratio)[row]
        if np.isfinite(u) and (self.step_fails[row] or u < self.small_step and not e < STARVED): return 'update ratio'
        if e < STARVED and not self.median_placebo[row] >= PASSES: return 'elasticity'
        return 'direction' if np.isfinite(e) and np.isfinite(u) else ''

    @cached_property
    def equilibrium_ratio(self):
        """The update ratio that a normalised layer settles at, sqrt(2 lr wd), where the optimizer shrinks the weights
        themselves (AdamW) and the record's meta tells it: {'optimizer': {'wd': .01, 'decoupled': True}}; of groups that
        differ the largest. NaN elsewhere.  # (row,)
        Source: Kosson et al. 2023, arXiv 2305.17212, rotational equilibrium; reached after about 1 / (lr wd) steps."""
        opt    = self.rec.meta.get('optimizer')
        listed = lambda v: v if isinstance(v, list) else [v]
        opt    = opt if isinstance(opt, dict) else {}
        wds    = [w for w in listed(opt.get('wd')) if isinstance(w, (int, float)) and w > 0]
        if not wds or True not in listed(opt.get('decoupled')): return np.full(self.n, np.nan)
        return np.sqrt(2 * self.lr * max(wds))

    @cached_property
    def adaptive(self):
        """Whether the optimizer divides by the gradient's size, as Adam does: by its name, if the record's meta has it,
        else by the first step, in which SGD's |update| / |gradient| is the learning rate (times the clip factor) in
        every layer and Adam's differs from layer to layer (by 4 and more in the zoo) and from that."""
        opt  = self.rec.meta.get('optimizer')
        name = str(opt.get('name', '')).lower() if isinstance(opt, dict) else ''
        if any(n in name for n in ADAPTIVE): return True
        keys = ('update', 'norm'), ('grad', 'norm')
        if 'sgd' in name or not self.n or any(k not in self.rec for k in keys) or len(self.layers) < 2: return False
        u, g = (self.get(*k, self.layers)[0] for k in keys)
        seen = (u > 0) & (g > 0) & np.isfinite(u) & np.isfinite(g)
        if not seen.any(): return False
        q    = u[seen] / g[seen]
        clip = np.nan_to_num(self.all.clip_factor.to_numpy(float)[self.rows[0]], nan=1.)
        with np.errstate(divide='ignore', invalid='ignore'): off = abs(np.log(np.median(q) / (self.lr[0] * clip)))
        return bool(q.max() / q.min() > 3 and off > np.log(3))

    @cached_property
    def step_fails(self):
        """Where a larger step would learn. The share of the loss that a step removes is at most the sum over the layers
        of elasticity x update ratio: the ratio is further below its limit than elasticity is below its own, and at a
        usual ratio a tenth of the loss would be gone within the horizon. Also where Adam crawls, which moves no element
        far whatever the ratio is.  # (row,) bool"""
        u, e = rolling_median(self.median_ratio) / self.small_step, rolling_median(self.median_elasticity) / STARVED
        with np.errstate(divide='ignore', invalid='ignore'):
            far = rolling_median(np.nansum(self.elasticity, axis=1)) * USUAL_STEP * HORIZON >= .1
        return (u < np.minimum(e, 1)) & far | self.crawls

    @cached_property
    def crawls(self):
        "Whether Adam's rate is a fiftieth of its usual one, or less, in the whole run."
        return self.adaptive and bool(0 < np.nanmax(self.lr, initial=0) <= ADAM_LR / 50)

    @cached_property
    def usual_step(self):
        "The median update ratio of healthy runs at first."
        return ADAPTIVE_STEP if self.adaptive else USUAL_STEP

    @cached_property
    def small_step(self):
        "The median update ratio below which a step hardly moves: further up where usual ones are larger."
        return SMALL_STEP * self.usual_step / USUAL_STEP

    def rising(self, e=None):
        "Where elasticity will pass AWAKE within the horizon, and the iteration forecast.  # (row,) bool, (row,)"
        e = self.median_elasticity if e is None else e
        with np.errstate(divide='ignore', invalid='ignore'):
            y      = np.where(e > 0, np.log(e), np.nan)
            s, t   = slope(y, WINDOW)
            ahead  = np.clip((np.log(AWAKE) - rolling_median(y)) / s - WINDOW / 2, 0, None)
            rising = (s > 0) & (t > SURE) & (ahead < HORIZON)
        step = np.median(np.diff(self.iter)) if self.n > 1 else 1
        return rising, self.iter + np.where(rising, ahead, np.nan) * step

    @cached_property
    def starving(self):
        """Where the median layer's elasticity is low, nothing is learned, it does not rise, and it is not rather the
        step that is too small. A placebo that passes outweighs a low elasticity (a floor of the loss, an offset), and
        one that is blocked stands for it where the loss is not positive.  # (row,) bool"""
        e, p = rolling_median(self.median_elasticity), self.median_placebo
        with np.errstate(invalid='ignore'):
            if not self.positive: return (p <= BLOCKED) & self.not_learned & self.judged
            stays = self.not_learned & ~self.rising()[0] & self.judged
            return (e < STARVED) & ~(p >= PASSES) & stays & ~self.step_fails

    @cached_property
    def judged(self):
        "Rows with enough rows behind them, the first ones (SETTLE) never counted.  # (row,) bool"
        return np.arange(self.n) >= SETTLE + FEWEST - 1

    def began(self, row):
        "Iteration at which a state that a trailing window showed at `row` began."
        return int(self.iter[max(row - WINDOW + 1, 0 if row < SETTLE + WINDOW else SETTLE)])


class Judged(Record):
    "A record that carries its evidence: what `diagnose` gives to the rules, so that each array is computed once."
    __slots__ = ('evidence',)
    def __init__(self, rec):
        for name in {*Record.__slots__} - {'__weakref__'}: object.__setattr__(self, name, getattr(rec, name))
        object.__setattr__(self, 'evidence', Evidence(rec))

def run(rec):
    "The Evidence of a record, that of `diagnose` where it is at work."
    return rec if isinstance(rec, Evidence) else rec.evidence if isinstance(rec, Judged) else Evidence(rec)


def median_layer(v):
    "Median over the layers that have a value; NaN where none has.  # (row, layer) -> (row,)"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', RuntimeWarning)
        return np.nanmedian(v, axis=1) if v.shape[1] else np.full(len(v), np.nan)

def rolling_median(v, n=WINDOW, few=FEWEST):
    "Median of the last `n` values at every row, the first SETTLE rows left out where there are others.  # as v"
    v = np.asarray(v, float)
    v = np.where(np.isinf(v), np.nan, v)
    if len(v) > SETTLE + few: v = np.concatenate([np.full((SETTLE, *v.shape[1:]), np.nan), v[SETTLE:]])
    return pd.DataFrame(v).rolling(n, min_periods=min(few, n)).median().to_numpy().reshape(v.shape)

def deviation(v):
    "From one row to the next, in a trailing window, as a standard deviation.  # (row,)"
    return 1.4826 / np.sqrt(2) * rolling_median(np.abs(np.diff(v, prepend=np.nan)))

def slope(v, n=WINDOW):
    "Least-squares slope per row over the last `n` rows and its t statistic.  # (row,), (row,)"
    v   = np.where(np.isinf(v), np.nan, np.asarray(v, float))
    s   = np.full(len(v), np.nan)
    t   = s.copy()
    if len(v) < n: return s, t
    x   = np.arange(n) - (n - 1) / 2
    win = np.lib.stride_tricks.sliding_window_view(v, n)
    m   = win.mean(1, keepdims=True)
    b   = (win * x).sum(1) / (x ** 2).sum()
    rss = ((win - m - b[:, None] * x) ** 2).sum(1)
    with np.errstate(divide='ignore', invalid='ignore'):
        t[n - 1:] = b / np.sqrt(rss / (n - 2) / (x ** 2).sum() + 1e-24)
    s[n - 1:] = b
    return s, t

def spans(mask):
    "[(first, last)] of the stretches where a mask is true."
    m = np.concatenate([[False], np.asarray(mask, bool), [False]]).astype(int)
    d = np.diff(m)
    return list(zip(np.flatnonzero(d == 1), np.flatnonzero(d == -1) - 1))

def lasting(mask, n):
    "The spans of at least `n` rows."
    return [(a, b) for a, b in spans(mask) if b - a + 1 >= n]
