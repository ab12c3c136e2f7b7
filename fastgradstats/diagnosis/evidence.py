"""What the rules read from a record: rolling medians, what was learned, when a state began and ended.

Everything is indexed by the *measured* rows, `(row,)` or `(row, layer)`; layers are weights of two or more dimensions.
"""
from __future__ import annotations

from functools import cached_property

import numpy as np
import pandas as pd

from .._text import layer
from ..record.record import Record
from ..record.select import columns, dims, weights
from .series import FEWEST, WINDOW, deviation, median_layer, rolling_mean, rolling_median, slope, trailing
from .thresholds import (ADAM_LR, ADAPTIVE_STEP, AWAKE, BLOCKED, PASSES, SETTLE, SMALL_STEP, STARVED, STARVED_GAIN,
                         USUAL_STEP)

HORIZON = 100                     # a forecast further ahead than this many rows is no forecast
NOISE   = 5                       # what is learned is near zero within so many deviations of it from batch to batch
CERTAIN = 3.                      # standard errors by which what is said of a mean must hold
FAIR    = .5                      # share of the planned fit before which nothing learned yet is no harm
HELD    = .2                      # share of it saved on the validation set that is no difference of the two sets
MUCH    = .5                      # share of the best constant answer's loss saved that is much
GROWN   = .1                      # of the median layer's rms; a layer below it has still to grow
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
        self.kept     = at.grad_kept.to_numpy(float)
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
    def prior(self):
        """The loss of each batch when all are given the best constant answer. Records that lack it: that of the batch's
        own mean answer, less what its level is above the lowest that it had (of 9 batches), as far outputs make it too
        high.  # (row,)"""
        p = self.rec.iters.loss_prior.to_numpy(float)[self.rows]
        if np.isfinite(p).any(): return p
        level = pd.Series(rolling_mean(self.constant, 9, few=3)).bfill().to_numpy()
        return self.constant - (level - np.nanmin(level, initial=np.inf)) if np.isfinite(level).any() else p

    @cached_property
    def saved(self):
        "What each batch's loss is below that of the best constant answer.  # (row,)"
        return np.where(np.isfinite(self.loss), self.prior - self.loss, np.nan)

    @cached_property
    def best_constant(self):
        "The mean loss of the best constant answer over the last batches; NaN where it was not measured."
        c = self.prior[np.isfinite(self.prior)][-max(WINDOW, self.n // 3):]
        return float(np.mean(c)) if len(c) else np.nan

    @cached_property
    def gain_over_constant(self):
        "What has been learned from the input: the mean of `saved` in a trailing window, all rows in it.  # (row,)"
        return rolling_mean(self.saved, skip=0)

    @cached_property
    def noise(self):
        "Deviation of `saved` from batch to batch in a trailing window; of the loss where that is not known.  # (row,)"
        return deviation(self.saved if np.isfinite(self.saved).any() else self.loss)

    @cached_property
    def gain_error(self):
        "Standard error of `gain_over_constant`.  # (row,)"
        win = trailing(self.saved, skip=0)
        return (win.std() / np.sqrt(win.count())).to_numpy()[:, 0]

    @cached_property
    def worth(self):
        """A gain below which it is as good as none: a share of the constant answer's loss, or, where a constant added
        to the loss makes that large, the noise from batch to batch.  # (row,)"""
        c = abs(self.best_constant)
        return np.fmin(STARVED_GAIN * c, np.fmax(NOISE * self.noise, .005 * c))

    @cached_property
    def no_gain(self):
        """Where the gain is as good as none, by its mean or, as a net that wakes does so within a few rows, its median,
        and nothing is certainly learned.  # (row,) bool"""
        with np.errstate(invalid='ignore'):
            return (np.fmin(self.gain_over_constant, rolling_median(self.saved, skip=0)) < self.worth) & ~self.learned

    @cached_property
    def not_learned(self):
        "Where nothing has been learned from the input, certainly; not where the gain was not measured.  # (row,) bool"
        with np.errstate(invalid='ignore'):
            return self.gain_over_constant + CERTAIN * self.gain_error < self.worth

    @cached_property
    def learned(self):
        "Where something has been learned from the input, certainly.  # (row,) bool"
        with np.errstate(invalid='ignore'):
            return (self.gain_over_constant - CERTAIN * self.gain_error > 0) & ~self.not_learned

    def learned_much(self, share=MUCH):
        "Whether much has been learned at the end, on the batches or, where there is one, on the validation set."
        if not self.n or not np.isfinite(self.best_constant): return False
        return bool(np.fmax(self.gain_over_constant[self.end], self.valid_gain) > share * abs(self.best_constant))

    @cached_property
    def falls(self):
        """Whether the loss still falls in the last two thirds of the rows: from the middle to the last third by more
        than its noise, and by a hundredth of what it is; against the best constant answer where that was measured, as
        some batches are harder than others."""
        v = self.loss if not np.isfinite(self.saved).any() else -self.saved
        k = (self.end + 1) // 3
        if k < FEWEST: return False
        mid, last = (x[np.isfinite(x)] for x in (v[k:2 * k], v[2 * k:self.end + 1]))
        if len(mid) < FEWEST or len(last) < FEWEST: return False
        fell  = mid.mean() - last.mean()
        error = np.hypot(mid.std() / np.sqrt(len(mid)), last.std() / np.sqrt(len(last)))
        return bool(fell > SURE * error and fell > .01 * abs(np.nanmean(self.loss[k:self.end + 1])))

    @cached_property
    def lost(self):
        """Where the loss was not finite. One that was told and then is NaN may just not have been told: it was not
        finite if the gradient was not either.  # (row,) bool"""
        norm = self.all.grad_norm.to_numpy(float)[self.rows]
        nan  = np.isnan(self.loss) & self.stepped
        if np.isfinite(norm).any(): return np.isinf(self.loss) | nan & ~np.isfinite(norm)
        key  = 'grad', 'frac_nonfinite'
        bad  = (self.get(*key) > 0).any(1) if key in self.rec else np.isfinite(self.loss).cumsum() > 0
        return np.isinf(self.loss) | nan & bad

    @cached_property
    def end(self):
        "The last row that tells what has been learned: the last one, or that before the loss was not finite."
        first = int(self.lost.argmax()) if self.lost.any() and self.lost[-1] else self.n
        return max(first - 1, 0)

    @cached_property
    def valid(self):
        "The validation loss after every epoch.  # (epoch,)"
        d = self.rec.epochs
        return d.valid_loss.dropna().to_numpy(float) if 'valid_loss' in d else np.array([])

    @cached_property
    def valid_gain(self):
        "What the last validation loss is below that of the best constant answer; NaN where there is none."
        return self.best_constant - self.valid[-1] if len(self.valid) and not self.lost[-1] else np.nan

    @cached_property
    def holds(self):
        """Whether something is known of the validation set: its loss is below that of a constant answer, and has come
        down, or is far below, as a constant answer may cost less there than on the batches."""
        c = abs(self.best_constant)
        if not self.valid_gain > STARVED_GAIN * c: return False
        return bool(self.valid_gain > HELD * c or self.valid[0] - self.valid[-1] > STARVED_GAIN / 2 * c)

    @cached_property
    def progress(self):
        "The share of the planned fit that is done; 1 where the plan is not known."
        plan = self.rec.meta.get('planned')
        return min((self.iter[-1] + 1) / plan, 1.) if self.n and plan else 1.

    @cached_property
    def harm(self):
        """What became of the outcome, before the loss was not finite: 'measured' (nothing has been learned, certainly,
        in a fair share of the planned fit, and the loss does not fall any more; or it was never finite for long),
        'none' (much has been learned), 'unknown'."""
        if not self.n: return 'unknown'
        if self.lost[-1] and self.end < SETTLE + FEWEST: return 'measured'
        if self.learned_much(): return 'none' if self.floored else 'unknown'
        none = self.not_learned[self.end]
        done = self.progress >= FAIR or self.lost[-1]
        falls = self.falls and not (len(self.valid) > 1 and self.valid[-1] >= self.valid[0])   # by heart
        return 'measured' if none and done and not falls and not self.holds else 'unknown'

    @cached_property
    def floored(self):
        "Whether the loss is one that has a floor, as far as can be seen: it was never below zero."
        return self.has_loss and bool(np.nanmin(self.loss) >= 0)

    @cached_property
    def top_rate(self):
        "The largest learning rate; NaN where none is known."
        return float(np.nanmax(self.lr)) if np.isfinite(self.lr).any() else np.nan

    @cached_property
    def at_rate(self):
        "Where the learning rate is at least half its maximum; everywhere where it is not known.  # (row,) bool"
        return ~(self.lr < self.top_rate / 2)

    def called(self, layers, most=3):
        "Layers as people see them, the first few: a number alone is no name, and of an activation the kind is told."
        acts  = self.rec.layers.get('activation')
        kinds = {} if acts is None else dict(zip(acts.layer, acts.type))
        names = [layer(l) + (f' ({kinds[l]})' if l in kinds else '') for l in layers]
        return ', '.join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else '')

    @cached_property
    def full(self):
        "The last row at which the learning rate was at least half its maximum."
        rows = np.flatnonzero(self.at_rate[:self.end + 1])
        return int(rows[-1]) if len(rows) else self.end

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
    def grown(self):
        "Where a layer is not at or near zero beside the others, as a head may start: ratios to that mean nothing."
        if ('weight', 'norm') not in self.rec: return np.ones((self.n, len(self.layers)), bool)
        numel = self.rec.layers['grad'].numel.to_numpy(float)[self.cols] if 'numel' in self.rec.layers['grad'] else 1.
        rms   = self.get('weight', 'norm', self.layers) / np.sqrt(numel)
        return ~(rms < GROWN * median_layer(rms)[:, None])                                  # (row, layer) bool

    @cached_property
    def median_elasticity(self):
        "Of the median layer that has a gradient at all.  # (row,)"
        return median_layer(np.where(self.grown, self.elasticity, np.nan))

    @cached_property
    def update_ratio(self):
        "(row, layer) of the weights; NaN where no step was taken."
        if ('update', 'ratio') not in self.rec: return np.full((self.n, len(self.layers)), np.nan)
        return np.where(self.stepped[:, None], self.get('update', 'ratio', self.layers), np.nan)

    @cached_property
    def median_ratio(self):
        "Of the median layer that moves at all.  # (row,)"
        u = self.update_ratio
        with np.errstate(invalid='ignore'): return median_layer(np.where((u > 0) & self.grown, u, np.nan))

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

    def failing(self, row=None):
        """Which factor of a step fails at `row`, by default the last with a fair learning rate: 'elasticity', 'update
        ratio', 'direction'; '' where it cannot be told."""
        row  = self.full if row is None else row
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
        return self.adaptive and 0 < self.top_rate <= ADAM_LR / 50

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
            if not self.positive: return (p <= BLOCKED) & self.no_gain & self.judged
            stays = self.no_gain & ~self.rising()[0] & self.judged & ~self.stopped
            return (e < STARVED) & ~(p >= PASSES) & stays & ~self.step_fails

    @cached_property
    def stopped(self):
        "Where the schedule has taken the learning rate away: it is below a hundredth of its maximum.  # (row,) bool"
        return self.lr < .01 * self.top_rate

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
