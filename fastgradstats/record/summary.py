"What a record says in words. Reads a Record only: neither torch nor fastai is needed."
from __future__ import annotations

import numpy as np

from .._text import digits
from .select import lost_loss, nanmedian, nonfinite, nothing, weights

FIRST, LAST = 10, 20             # measured rows compared, none twice: the first of the record against the last


def facts(rec):
    "Three lines: what was recorded and at what cost; loss, gain, lowest elasticity; dead and non-finite."
    return '\n'.join([_recorded(rec), _learning(rec), _damage(rec)])

def _recorded(rec):
    n     = max((len(d) for p, d in rec.layers.items() if p in ('grad', 'activation')), default=0)
    it    = rec.iters
    if not it.measured.any(): return nothing(rec)
    cost  = rec.meta.get('cost') or {}
    price = f" at a cost of {cost['percent']:.1f} % of the training time" if cost.get('percent') is not None else ''
    fits  = it.fit.nunique()
    sizes = [f"{len(rec.layers[p])} {what}" for p, what in (('grad', 'parameters'), ('activation', 'activations'))
             if p in rec.layers]
    return (f"recorded {' and '.join(sizes) or f'{n} layers'} over {int(it.measured.sum()):,} of {len(it):,} iterations"
            f"{f' in {fits} fits' if fits > 1 else ''}{price}")

def _learning(rec):
    it, lost = rec.iters, _lost(rec)
    first, last, which = _compared(rec, lost)
    def change(read):
        "What `read` says of the first rows -> of the last."
        said = [read(rows) for rows in (first, last) if len(rows)]
        if lost < len(it) and set(said) != {'not measured'}: said.append('not finite')
        return 'not measured' if set(said) <= {'not measured'} else ' -> '.join(said)
    def median(v):
        def read(rows):
            ok = v[rows][np.isfinite(v[rows])]
            return digits(np.median(ok), 3) if len(ok) else 'not measured'
        return read
    out = [f"{name} {change(median(it[name].to_numpy()))}" for name in ('loss', 'gain')]
    if lost < len(it): out[0] += f" since iteration {it.iter[lost]}"
    if ('grad', 'elasticity') in rec:
        e    = rec['grad', 'elasticity']
        name = rec.layers['grad'].layer.to_numpy()
        w    = np.isin(name, weights(rec))
        def lowest(rows):
            m = np.where(w, nanmedian(e[rows]), np.nan)
            if np.isnan(m).all(): return 'not measured'
            k = int(np.nanargmin(m))
            return f"{digits(m[k], 2)} ({name[k]})"
        out.append(f"lowest elasticity {change(lowest)}")
    return '; '.join(out) + which * any(not t.endswith('not measured') for t in out)

def _compared(rec, lost):
    "The first and the last measured rows before the row `lost`, no row in both, and which they are, in words."
    it    = rec.iters
    rows  = np.flatnonzero(it.measured if it.measured.any() else it.iter >= 0)
    some  = 'measured ' * (len(rows) < len(it))
    rows  = rows[rows < lost]
    first = rows[:FIRST if lost < len(it) else min(FIRST, max(len(rows) // 3, 1))]
    last  = rows[:0] if lost < len(it) else rows[len(first):][-LAST:]
    both  = [*first, *last]
    bad   = int(lost_loss(rec)[both].sum())
    if not both: return first, last, ''
    which = f"medians of the first {len(first)}" + f" and the last {len(last)}" * bool(len(last))
    which = f"{which}{f' of {len(rows)}' * (len(last) > 0 and len(both) == len(rows))} {some}iterations"
    if len(both) == 1: which = f"{some}iteration {it.iter[both[0]]}"
    return first, last, f" ({which}{f', without {bad} whose loss was not finite' * bool(bad)})"

def _lost(rec):
    "The row from which on the loss is not finite to the end; the number of rows where it is, or was not measured."
    it   = rec.iters
    good = np.flatnonzero(np.isfinite(it.loss))
    if len(good): return int(good[-1]) + 1
    bad  = first_nonfinite(rec)                       # no loss at all: not told, or not finite from the beginning
    return 0 if bad and bad[0] == it.iter[0] else len(it)

def _damage(rec):
    bad  = first_nonfinite(rec)
    seen = rec.iters.loss.notna().any() or any(stat == 'frac_nonfinite' for _, stat in rec.keys())
    return _dead(rec, bad) + '; ' + (f"non-finite values, first at iteration {bad[0]} ({bad[1]})" if bad else
                                     'no non-finite values' if seen else 'non-finite values not measured')

def _dead(rec, bad):
    "The dead units of the last window; of a unit that was not finite (where anything is `bad`) it cannot be told."
    if ('activation', 'frac_dead') not in rec: return 'dead units not measured'
    v, win = rec['activation', 'frac_dead'], rec.windows['activation', 'frac_dead']
    names  = rec.layers['activation'].layer.to_numpy()
    if not len(v) or np.isnan(v[-1]).all(): return 'dead units not measured'
    last   = rec.units.query('window == window.max()').state if bad else []
    lost   = list(last).count('non-finite')
    if lost and lost == len(last): return "dead units: cannot be told, no unit's output is finite in the last window"
    if np.nan_to_num(v[-1]).max(initial=0) > 0:
        k     = int(np.nanargmax(v[-1]))
        dead  = np.nan_to_num(v[:, k]) > 0
        start = len(dead) - int(np.argmin(dead[::-1])) if not dead.all() else 0
        text  = f"dead units: up to {v[-1, k]:.0%} ({names[k]}), some since iteration {win.first_iter.iloc[start]}"
    else: text = 'no dead units'
    return text + f" (of {lost} of {len(last)} units it cannot be told: non-finite)" * bool(lost)

def first_nonfinite(rec):
    "(iteration, where) of the first non-finite loss, gradient or activation that was recorded, or None."
    it    = rec.iters
    found = []
    row   = np.flatnonzero(lost_loss(rec))
    if len(row): found.append((int(it.iter[row[0]]), 'the loss'))
    for probe in ('activation', 'grad'):
        for stat in ('frac_nonfinite', 'norm', 'max', 'abs_max'):
            if (probe, stat) not in rec.keys(): continue
            bad = nonfinite(rec, (probe, stat))
            r   = np.flatnonzero(bad.any(1))
            if len(r):
                k = int(np.argmax(bad[r[0]]))
                found.append((int(it.iter[r[0]]), f"{probe} of {rec.layers[probe].layer[k]}"))
    return min(found, key=lambda f: f[0]) if found else None
