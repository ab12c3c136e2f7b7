"What state the network is in at every row, and every layer at the end."
from __future__ import annotations

import numpy as np
import pandas as pd

from .._text import num, pct
from .evidence import FEWEST, WINDOW, run, slope, trailing
from .thresholds import AWAKE, BLOCKED, DEAD, PASSES, SETTLE, STARVED

VERDICTS = ('healthy', 'converged', 'starved', 'waking', 'dead', 'saturated', 'exploding', 'frozen', 'cannot tell')
FLAT     = .02                    # a loss that changes by less than this share of what was learned in a window is flat
FAR      = .33                    # gradient below this share of its own peak
LEARNED  = .2                     # gain as a share of the best constant answer's loss that is high, or
CLEAR    = 20                     # so many batch-to-batch deviations of the loss
COLUMNS  = ['layer', 'probe', 'verdict', 'for', 'against']


def network_state(r):
    "converged, learning, waking, starved or cannot tell, at every measured row.  # (row,) object"
    e, learned, noise = trailing(r.median_elasticity), r.learned, r.noise
    long  = min(2 * WINDOW, max(WINDOW, len(r) // 3))
    s, _  = slope(r.loss, long)
    with np.errstate(invalid='ignore', over='ignore'):
        g    = trailing(r.total_norm)
        peak = pd.Series(g).cummax().to_numpy()
        high = (learned > LEARNED * abs(r.best_constant)) | (learned > CLEAR * noise)
        flat = np.abs(s * long) < np.maximum(FLAT * learned, noise)
        out  = np.full(len(r), 'cannot tell', object)
        live = ~r.blind & (np.isfinite(learned) | np.isfinite(e)) & r.judged
        if not np.isfinite(r.best_constant): live &= r.falling | (trailing(r.loss) < .5 * r.first_loss)
        out[live] = 'learning'
        out[r.blind & r.falling & r.judged & ~(e < STARVED)] = 'learning'
        out[live & high & flat & (g < FAR * peak)] = 'converged'
        out[r.starving] = 'starved'
        wake = r.waking()[0] & r.blind & r.judged & (e < AWAKE)
        out[wake] = 'waking'
    return out


def layer_verdicts(rec, findings):
    "DataFrame layer, probe, verdict, for, against: every weight with two or more dimensions and every activation."
    r = run(rec)
    if not len(r): return pd.DataFrame([], columns=COLUMNS)
    by = {}
    for f in findings:
        past = f.rule == 'exploding' and f.iters[1] < r.iter[-min(WINDOW, len(r))]              # not so at the end
        if f.severity == 'info' or past: continue
        for l in f.layers or ((f.layer,) if f.layer else ()): by.setdefault(l, {})[f.rule] = f
    state = network_state(r)[-1] if r.has_loss and len(r) >= SETTLE + FEWEST else 'cannot tell'
    out   = [(l, 'grad', *v) for l, v in _of_weights(r, state, by)]
    out  += [(l, 'activation', *v) for l, v in _of_activations(r, state, by)]
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
    low = trailing(e)[-1]
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
    gain  = r.learned[-1]
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
        wakes, when = r.waking(np.where(e > 0, e, np.nan))
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
                                                    f"gain {num(r.learned[-1])}")
        elif not np.isfinite(d):          yield l, ('cannot tell', '', "dead units were not measured")
        elif state not in ('learning', 'converged'):
            yield l, ('cannot tell', '', f"{pct(d)} of its units are dead")
        else:                             yield l, ('healthy', f"{pct(1 - d)} of its units vary", '')
