"""Numbers and lists in words. Imports nothing of ours."""
from __future__ import annotations

import re

import numpy as np


def num(x):
    "Two digits, no exponent between 0.0001 and 9999."
    if np.isnan(x): return '–'
    if np.isinf(x): return 'infinite'
    if x == 0:      return '0'
    if abs(x) >= 9999.5 or abs(x) < 9.5e-5: return f'{x:.1e}'.replace('e-0', 'e-').replace('e+0', 'e')
    return f'{x:.0f}' if abs(x) >= 9.95 else f'{x:#.2g}'

def digits(x, n):  return f'{x:.{n}g}'
def thousands(x):  return f"{float(f'{x:.2g}'):,.15g}"                                 # two digits, 1,200
def pct(x): return '–' if not np.isfinite(x) else f'{100 * x:.0f} %'
def acc(x): return '–' if not np.isfinite(x) else f'{x:.3f}'

def cell(v, fmt):
    "Median [min, max] of the finite values over the seeds, and how many are not."
    lost = int((~np.isfinite(v)).sum())
    v    = v[np.isfinite(v)]
    if not len(v): return 'non-finite' if lost else '–'
    low, mid, high = fmt(v.min()), fmt(np.median(v)), fmt(v.max())
    return mid + (f' [{low}, {high}]' if low != high else '') + (f' ({lost} non-finite)' if lost else '')

def spread(r):
    low, high = num(r.min()), num(r.max())
    return low if low == high else f'{low} to {high}'

def between(v):      return f'{v.min():.0f}' if v.min() == v.max() else f'{v.min():.0f} to {v.max():.0f}'
def of(k, n, what):
    return f"{'the one' if n == 1 else 'every' if k == n else f'{k} of {n}'} {what}{'s' if k != n else ''}"
def layer(name):     return f'layer {name}' if re.fullmatch(r'[\d.:]+', name) else name
def join(words):     return words[0] if len(words) == 1 else ', '.join(words[:-1]) + ' and ' + words[-1]

def pairs(k):
    "In how many pairs of layer and seed."
    n, word = (k.larger, 'larger') if k.larger >= k.smaller else (k.smaller, 'smaller')
    return f"{word} in {'all' if n == k.n else f'{n} of'} {k.n} pairs of layer and seed"


def plain(o):
    "`o` as strict JSON: NumPy scalars to Python's, non-finite floats to null."
    if isinstance(o, dict):          return {str(k): plain(v) for k, v in o.items()}
    if isinstance(o, (list, tuple)): return [plain(v) for v in o]
    if isinstance(o, np.ndarray):    return plain(o.tolist())
    if isinstance(o, np.generic):    return plain(o.item())
    if isinstance(o, float) and not np.isfinite(o): return None
    return o
