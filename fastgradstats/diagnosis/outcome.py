"""What becomes of the network at every row: one Outcome, which diagnose, compare and the pictures read.

    outcome(rec).state            # 'learning'
    outcome(rec).at(rec.iters.iter < 10)
"""
from __future__ import annotations

import numpy as np
import pandas as pd

from .._text import num, pct
from .evidence import run
from .series import WINDOW, rolling_mean, rolling_median, slope
from .thresholds import AWAKE, BLOCKED, CONVERGED, DEAD, PASSES, STARVED

VERDICTS = ('healthy', 'converged', 'starved', 'waking', 'dead', 'saturated', 'exploding', 'frozen', 'cannot tell')
COLUMNS  = ['layer', 'probe', 'verdict', 'for', 'against']
FLAT    = .02                     # a loss that changes by less than this share of what was learned in a window is flat
FAR     = .33                     # gradient below this share of its own peak
LEARNED = .2                      # gain as a share of the best constant answer's loss that is high, or
CLEAR   = 20                      # so many deviations of it from batch to batch
FALLEN  = .1                      # share of the gain, or of itself, by which a loss has fallen that is called so
CERTAIN = 3                       # ... and so many batch-to-batch deviations: of two medians 5 standard errors


class Outcome:
    """The state of the network at every measured row, as the rows before it show: 'starved' (nothing is learned, and
    the weights can hardly move the loss), 'waking' (nothing yet, but elasticity rises), 'learning' (it knows more than
    a constant answer, or its loss falls), 'converged' (it has learned much in this record, the loss is flat or hardly
    any is left, and the gradients are far below their peak), 'not finite' (the loss), 'cannot tell'."""
    def __init__(self, r):
        self.r, self.states = r, _not_finite_rows(r, _states(r))        # (measured row,)

    @property
    def state(self):
        "At the end."
        return self.states[-1] if len(self.states) else 'cannot tell'

    @property
    def by_row(self):
        """At every row of the record the last one known; rows before the first that can be judged have that one's,
        which looks back to them.  # (row,)"""
        r, out = self.r, self.states.copy()
        if not len(r): return np.full(len(r.all), 'cannot tell', object)
        if r.judged.any(): out = _not_finite_rows(r, np.where(r.judged, out, out[np.argmax(r.judged)]))
        return out[np.maximum(np.searchsorted(r.rows, np.arange(len(r.all)), 'right') - 1, 0)]

    def at(self, rows):
        "In a stretch of the record's rows (a mask, or row numbers): the state at its end."
        some = self.by_row[rows]
        return some[-1] if len(some) else 'cannot tell'

    @property
    def fell(self):
        "Whether the loss has fallen since the first rows."
        return bool(_fallen(self.r)[-1])

    @property
    def sentence(self):
        r    = self.r
        gain, error = r.gain_over_constant[-1], r.gain_error[-1]
        nums = f"loss {num(r.first_loss)} -> {num(rolling_mean(r.loss)[-1])}"
        if len(r.valid): nums += f", validation loss {num(r.valid[0])} -> {num(r.valid[-1])}"
        if np.isfinite(gain): nums += f", gain over a constant answer {num(gain)} ± {num(error)}"
        still = "It answers better than a constant, but the loss has not fallen"
        if self.state == 'cannot tell' and self.fell and r.floored and np.isfinite(gain):
            return f"The loss fell, so far by no more than a constant answer would save ({nums})"
        return {'converged':   f"Converged: the gradients are small because little is left to learn ({nums})",
                'learning':    f"{'It learns' if self.fell else still} ({nums})",
                'starved':     "No fault has lasted yet, but in the last iterations hardly any gradient arrives "
                               f"({nums})",
                'waking':      f"It has begun to move ({nums}, elasticity rising)",
                'not finite':  f"The loss is not finite ({nums})",
                'cannot tell': f"No fault was found, but whether it learns cannot be told ({nums})"}[self.state]


def outcome(rec):
    "The Outcome of a Record."
    return Outcome(run(rec))

def _states(r):
    "(measured row,) object, what is not finite not looked at."
    out = np.full(len(r), 'cannot tell', object)
    if not r.has_loss: return out
    e, gain, noise = rolling_median(r.median_elasticity), r.gain_over_constant, r.noise
    level = rolling_mean(r.loss)
    long  = min(2 * WINDOW, max(WINDOW, len(r) // 3))
    s, _  = slope(r.loss, long)
    with np.errstate(invalid='ignore', over='ignore'):
        g    = rolling_median(r.total_norm)
        peak = pd.Series(g).cummax().to_numpy()
        high = (gain > LEARNED * abs(r.best_constant)) | (gain > CLEAR * noise)
        flat = np.abs(s * long) < np.maximum(FLAT * gain, noise)
        left = r.positive & (level < CONVERGED * np.fmin(r.first_loss, r.best_constant))
        live = r.learned & r.judged & r.floored
        fell = _fallen(r) & (_fall(r) > CERTAIN * noise)
        done = live & fell & (high & flat | left) & (g < FAR * peak)
        out[live] = 'learning'
        out[_held(done & (len(r.valid) == 0 or r.valid_gain > 0), r.at_rate)] = 'converged'
        out[r.starving] = 'starved'
        out[r.rising()[0] & r.no_gain & r.judged & (e < AWAKE)] = 'waking'
    return out

def _held(mask, known):
    "A mask that is read where it is `known`, and stays as it was elsewhere.  # (row,) bool"
    return pd.Series(np.where(known, mask, np.nan)).ffill().fillna(0).to_numpy(bool)

def _not_finite_rows(r, states): return np.where(r.lost, 'not finite', states)

def _fall(r): return r.first_loss - rolling_mean(r.loss)

def _fallen(r):
    "Where the loss is clearly lower than in the first rows, by a share of itself or of what is known.  # (row,) bool"
    with np.errstate(invalid='ignore'):
        return _fall(r) > FALLEN * np.clip(np.fmin(r.gain_over_constant, abs(r.first_loss)), 0, None)


# --- layers ----------------------------------------------------------------------------------------------------------
def layer_verdicts(outcome, findings):
    "DataFrame layer, probe, verdict, for, against: every weight with two or more dimensions and every activation."
    r = outcome.r
    if not len(r): return pd.DataFrame([], columns=COLUMNS)
    by = {}
    for f in findings:
        past = f.rule == 'exploding' and f.iters[1] < r.iter[-min(WINDOW, len(r))]              # not so at the end
        if f.severity == 'info' or past: continue
        for l in f.layers or ((f.layer,) if f.layer else ()): by.setdefault(l, {})[f.rule] = f
    out  = [(l, 'grad', *v) for l, v in _of_weights(r, outcome.state, by)]
    out += [(l, 'activation', *v) for l, v in _of_activations(r, outcome.state, by)]
    return pd.DataFrame(out, columns=COLUMNS)

def _of_weights(r, state, by):
    "(layer, (verdict, for, against)) of every weight."
    rec = r.rec
    if not r.layers: return
    if ('grad', 'norm') not in rec:
        for l in r.layers: yield l, ('cannot tell', '', "the norm of its gradient was not recorded")
        return
    g   = r.get('grad', 'norm', r.layers)
    e   = r.elasticity if ('grad', 'elasticity') in rec and r.positive else np.full(g.shape, np.nan)
    u   = r.get('update', 'ratio', r.layers) if ('update', 'ratio') in rec else np.full(g.shape, np.nan)
    low = rolling_median(e)[-1]
    p   = r.placebo[-1]
    bad = _not_finite(r, 'grad', g, r.layers)
    for k, l in enumerate(r.layers):
        if bad[k] is not None: yield l, ('exploding', f"its gradient is not finite since iteration {bad[k]}", '')
        else: yield l, _of_weight(r, state, by.get(l, {}), g[:, k], e[:, k], u[:, k], low[k], p[k])

def _not_finite(r, probe, v, layers):
    """Iteration from which to the end a layer has no finite value, because values or the loss are not finite; None
    where it has.  # v (row, layer) -> [(layer,)]"""
    cause = ~np.isfinite(r.loss)[:, None] & r.has_loss | np.isinf(v)
    if (probe, 'frac_nonfinite') in r.rec: cause = cause | (r.get(probe, 'frac_nonfinite', layers) > 0)
    out   = []
    for gone in (~np.isfinite(v) & cause).T:
        k = len(gone) - int(np.argmin(gone[::-1])) if not gone.all() else 0
        out.append(int(r.iter[k]) if k < len(gone) else None)
    return out

def _of_weight(r, state, by, g, e, u, low, placebo):
    "Of one weight: its gradient's norm, elasticity, update ratio, all (row,); elasticity and placebo at the end."
    gain  = r.gain_over_constant[-1]
    tail  = g[-WINDOW:]
    seen  = tail[np.isfinite(tail)]
    peak  = np.nanmax(g) if np.isfinite(g).any() else np.nan
    share = f"gradient at {pct(np.median(seen) / peak)} of its own peak" if len(seen) and peak > 0 else ''
    nums  = f"elasticity {num(low)}, gain {num(gain)}" + (f", placebo {num(placebo)}" if np.isfinite(placebo) else '')
    thin  = placebo <= BLOCKED if not r.positive else low < STARVED and not placebo >= PASSES
    wild  = next((f for n, f in by.items() if n in ('exploding', 'non_finite')), None)
    if wild or np.isinf(tail).any(): return 'exploding', wild.evidence if wild else 'its gradient is infinite', ''
    if 'not_stepped' in by: return 'frozen', 'it receives a gradient but is never stepped', share
    if not len(seen):       return 'frozen', 'it received no gradient', ''
    if len(seen) >= 3 and not seen.any():
        return 'dead', f"its gradient is exactly zero in the last {len(seen)} iterations", f"gain {num(gain)}"
    if state == 'starved' and thin: return 'starved', nums, share
    if state == 'waking':
        wakes, when = r.rising(np.where(e > 0, e, np.nan))
        told = f"; forecast to pass {AWAKE:g} at iteration {when[-1]:.0f}" if wakes[-1] else ''
        return 'waking', f"{nums}, rising{told}", ''
    if state == 'converged':
        return 'converged', f"loss flat, {share}, gain {num(gain)}", f"elasticity {num(low)}" if low < STARVED else ''
    if state == 'learning':
        says = f"the network learns (gain {num(gain)})"
        if not np.isfinite(low) and not placebo >= PASSES: return 'cannot tell', says, 'elasticity was not measured'
        if thin: return 'cannot tell', says, f"elasticity of this layer {num(low)}"
        step = np.nanmedian(u[-WINDOW:]) if np.isfinite(u[-WINDOW:]).any() else np.nan
        return 'healthy', f"{nums}, update ratio {num(step)}", ''
    return 'cannot tell', nums, ''

def _of_activations(r, state, by):
    "(layer, (verdict, for, against)) of every activation."
    rec = r.rec
    if 'activation' not in rec.layers: return
    key   = 'activation', 'frac_dead'
    names = rec.layers['activation'].layer
    dead  = rec[key][-1] if key in rec and len(rec[key]) else np.full(len(names), np.nan)
    std   = ('activation', 'std') in rec
    bad   = _not_finite(r, 'activation', r.get('activation', 'std'), None) if std else [None] * len(names)
    for l, d, since in zip(names, dead.astype(float), bad):
        fs = by.get(l, {})
        if 'non_finite' in fs:            yield l, ('exploding', fs['non_finite'].evidence, '')
        elif since is not None:           yield l, ('exploding', f"it is not finite since iteration {since}", '')
        elif 'saturated' in fs:           yield l, ('saturated', fs['saturated'].evidence, '')
        elif np.isfinite(d) and d > DEAD: yield l, ('dead', f"{pct(d)} of its units are dead",
                                                    f"gain {num(r.gain_over_constant[-1])}")
        elif not np.isfinite(d):          yield l, ('cannot tell', '', "dead units were not measured")
        elif state not in ('learning', 'converged'):
            yield l, ('cannot tell', '', f"{pct(d)} of its units are dead")
        else:                             yield l, ('healthy', f"{pct(1 - d)} of its units vary", '')
