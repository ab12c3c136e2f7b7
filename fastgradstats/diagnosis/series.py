"""What is computed of numbers in rows: rolling medians and means, deviations, slopes, stretches where a mask is."""
from __future__ import annotations

import warnings

import numpy as np
import pandas as pd

from .thresholds import SETTLE

WINDOW  = 20                      # rows a judgement is the median of; the prototype's windows were 10 to 20
FEWEST  = 10                      # rows below which nothing is judged


def median_layer(v):
    "Median over the layers that have a value; NaN where none has.  # (row, layer) -> (row,)"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', RuntimeWarning)
        return np.nanmedian(v, axis=1) if v.shape[1] else np.full(len(v), np.nan)

def trailing(v, n=WINDOW, few=FEWEST, skip=SETTLE):
    """The last `n` values at every row, as pandas has them; infinite ones are none, nor are the first `skip` rows where
    there are others.  # v (row,) or (row, layer)"""
    v = np.array(v, float)
    v[np.isinf(v)] = np.nan
    if len(v) > skip + few: v[:skip] = np.nan
    return pd.DataFrame(v).rolling(n, min_periods=min(few, n))

def rolling_median(v, *about, **more):
    "Their median, see `trailing`.  # as v"
    return trailing(v, *about, **more).median().to_numpy().reshape(np.shape(v))

def rolling_mean(v, *about, **more):
    "Their mean, see `trailing`.  # as v"
    return trailing(v, *about, **more).mean().to_numpy().reshape(np.shape(v))

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
