"""The bins of every histogram: signed and logarithmic, the same for every tensor, layer, run and machine.

Sign, exponent and two mantissa bits of a float32 are its bin: 4 an octave, magnitudes 2^-32 to 2^16 of both signs, one
bin for zero and everything smaller, one each for what is larger, infinite, or NaN; stored in the order of value.
"""
from __future__ import annotations

from typing import NamedTuple

import numpy as np

OCTAVES = (-32, 16)
N_MAG   = 4 * (OCTAVES[1] - OCTAVES[0])                     # 192 bins a sign
N_BINS  = 2 * N_MAG + 6                                     # and -inf, < -2^16, zero, > 2^16, +inf, nan
NEG_INF, NEG_BIG, ZERO, POS_BIG, POS_INF, NAN = 0, 1, N_MAG + 2, 2 * N_MAG + 3, 2 * N_MAG + 4, 2 * N_MAG + 5
FINITE      = slice(NEG_BIG, POS_INF)                       # 1..387: bin `i` spans edges[i - 1] to edges[i]
NOT_FINITE  = [NEG_INF, POS_INF, NAN]
BIGGEST     = float(np.finfo(np.float32).max)
_MAGNITUDES = np.concatenate([np.ldexp(1 + np.arange(4) / 4, o) for o in range(*OCTAVES)] + [[2.0 ** OCTAVES[1]]])
BIN_EDGES   = np.concatenate([[-BIGGEST], -_MAGNITUDES[::-1], _MAGNITUDES, [BIGGEST]])          # (388,)
BIN_LABELS  = {NEG_INF: '-inf', NEG_BIG: '< -65536', ZERO: 'zero', POS_BIG: '> 65536', POS_INF: '+inf', NAN: 'nan'}


class Bins(NamedTuple):
    "The bins of every histogram of a record: bin `i` in 1..387 spans `edges[i-1]` to `edges[i]`; the others are named."
    edges: np.ndarray                 # (388,), ascending, symmetric about 0
    labels: dict                      # bin index -> name of a special bin


def linear_bins(hist, edges, low, high, n=40):
    """Histograms over `n` equal bins from `low` to `high`: each logarithmic bin poured in by its overlap. Zero is a
    point, in the bin that begins at it (as NumPy counts, the last bin holds `high` too); of what is beyond 2^16 it is
    only known that it is: taken as within an octave, most of a falling tail.  # (..., bin) -> (..., n), (n + 1,)"""
    y = np.linspace(low, high, n + 1)
    e = np.array(edges, float)
    e[0], e[-1] = 2 * e[1], 2 * e[-2]
    both = np.minimum(e[1:, None], y[None, 1:]) - np.maximum(e[:-1, None], y[None, :-1])      # (log bin, linear bin)
    over = np.clip(both, 0, None) / np.diff(e)[:, None]
    over[ZERO - 1] = 0
    if low <= 0 <= high: over[ZERO - 1, min(np.searchsorted(y, 0., side='right') - 1, n - 1)] = 1
    return hist[..., FINITE] @ over, y
