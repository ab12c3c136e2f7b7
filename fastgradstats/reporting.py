"What a record says in words. Reads a Record only: neither torch nor fastai is needed."
from __future__ import annotations

import numpy as np

from .reading import weights

FIRST, LAST = 10, 20             # rows compared: the first of the record against the last


def facts(rec):
    "Three lines: what was recorded and at what cost; loss, gain, lowest elasticity; dead and non-finite."
    return '\n'.join([_recorded(rec), _learning(rec), _damage(rec)])

def median_over(values, rows):
    "Median over some rows, NaN where nothing was measured, without NumPy's warning.  # (layer,)"
    v = np.asarray(values)[rows]
    return np.array([np.median(c[~np.isnan(c)]) if (~np.isnan(c)).any() else np.nan for c in v.T])

def _recorded(rec):
    n     = max((len(d) for p, d in rec.layers.items() if p in ('grad', 'activation')), default=0)
    it    = rec.iters
    cost  = rec.meta.get('cost') or {}
    price = f" at a cost of {cost['percent']:.1f} % of the training time" if cost.get('percent') is not None else ''
    fits  = it.fit.nunique()
    sizes = [f"{len(rec.layers[p])} {what}" for p, what in (('grad', 'parameters'), ('activation', 'activations'))
             if p in rec.layers]
    return (f"recorded {' and '.join(sizes) or f'{n} layers'} over {int(it.measured.sum()):,} of {len(it):,} iterations"
            f"{f' in {fits} fits' if fits > 1 else ''}{price}")

def _learning(rec):
    it   = rec.iters
    out  = []
    def ends(v):
        v = v.to_numpy()
        v = v[~np.isnan(v)]
        return (np.median(v[:FIRST]), np.median(v[-LAST:])) if len(v) else None
    for name in ('loss', 'gain'):
        e = ends(it[name])
        out.append(f"{name} {e[0]:.3g} -> {e[1]:.3g}" if e else f"{name} not measured")
    if ('grad', 'elasticity') in rec:
        rows = np.flatnonzero(it.measured.to_numpy())
        e    = rec['grad', 'elasticity']
        name = rec.layers['grad'].layer.to_numpy()
        w    = np.isin(name, weights(rec))
        def lowest(rows):
            m = median_over(e, rows)
            m = np.where(w, m, np.nan)
            if np.isnan(m).all(): return 'not measured'
            k = int(np.nanargmin(m))
            return f"{m[k]:.2g} ({name[k]})"
        out.append(f"lowest elasticity {lowest(rows[:FIRST])} -> {lowest(rows[-LAST:])}")
    return '; '.join(out) + f' (medians of the first {FIRST} and the last {LAST} iterations)'

def _damage(rec):
    out = []
    if ('activation', 'frac_dead') in rec:
        v, win = rec['activation', 'frac_dead'], rec.windows['activation', 'frac_dead']
        names  = rec.layers['activation'].layer.to_numpy()
        if len(v) and np.nan_to_num(v[-1]).max(initial=0) > 0:
            k     = int(np.nanargmax(v[-1]))
            dead  = np.nan_to_num(v[:, k]) > 0
            start = len(dead) - int(np.argmin(dead[::-1])) if not dead.all() else 0
            out.append(f"dead units: up to {v[-1, k]:.0%} ({names[k]}), "
                       f"some since iteration {win.first_iter.iloc[start]}")
        else: out.append('no dead units' if len(v) else 'dead units not measured')
    bad = first_nonfinite(rec)
    out.append(f"non-finite values since iteration {bad[0]} ({bad[1]})" if bad else 'no non-finite values')
    return '; '.join(out)

def first_nonfinite(rec):
    "(iteration, where) of the first non-finite loss, gradient or activation that was recorded, or None."
    it    = rec.iters
    found = []
    row   = np.flatnonzero(~np.isfinite(it.loss)) if it.loss.notna().any() else []
    if len(row): found.append((int(it.iter[row[0]]), 'the loss'))
    for probe in ('activation', 'grad'):
        for stat in ('frac_nonfinite', 'norm', 'max', 'abs_max'):
            if (probe, stat) not in rec.keys(): continue
            v   = rec[probe, stat]
            bad = v > 0 if stat == 'frac_nonfinite' else np.isinf(v)
            r   = np.flatnonzero(bad.any(1))
            if len(r):
                k = int(np.argmax(bad[r[0]]))
                found.append((int(it.iter[r[0]]), f"{probe} of {rec.layers[probe].layer[k]}"))
    return min(found, key=lambda f: f[0]) if found else None
