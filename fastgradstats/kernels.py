"""What the CPU reads in one pass over the memory, in loops that Numba compiles.

torch and NumPy go over a tensor once for each statistic, and reading memory is what a statistic of a large activation
costs: sum, squares and extremes together take 0.2 ns an element here, apart 0.9. A NaN or an overflow is not handled here
but shows in the sums, which are then not finite; the caller takes the careful way.
"""
import numpy as np
from numba import njit

LOOSE = {'nnan', 'nsz', 'reassoc', 'contract'}      # lets the loops use vector registers; see above for NaN
ABS   = np.int32(0x7fffffff)                        # the magnitude bits of a float32
INF   = np.int32(0x7f800000)


def compiled(**options):
    "njit, kept on disk between runs where there is a folder to keep it in."
    def wrap(f):
        try: return njit(cache=True, nogil=True, **options)(f)
        except RuntimeError: return njit(nogil=True, **options)(f)
    return wrap


@compiled(fastmath=LOOSE)
def moments(x, lo, hi):                             # x: (row, column); lo, hi: (column,), written
    "Sum and sum of squares of all; least and greatest of each column."
    total = squares = 0.
    for c in range(x.shape[1]): lo[c] = hi[c] = x[0, c]
    for r in range(x.shape[0]):
        s = q = x.dtype.type(0)
        for c in range(x.shape[1]):
            v     = x[r, c]
            s    += v
            q    += v * v
            lo[c] = min(lo[c], v)
            hi[c] = max(hi[c], v)
        total   += s
        squares += q
    return total, squares


@compiled()
def tally(bits, near, bin_of_pattern, hist):        # bits: (n,) int32 of float32; hist: (bin,), written
    """Counts by the top 11 bits, in four tables in turn, since many zeros in a row would wait for one another; and how many
    are zero, how many have magnitude bits below `near`, how many are not finite."""
    raw = np.zeros((4, 2048), np.int32)
    n   = len(bits) // 4 * 4
    for i in range(0, n, 4):
        raw[0, (bits[i    ] >> 21) + 1024] += 1
        raw[1, (bits[i + 1] >> 21) + 1024] += 1
        raw[2, (bits[i + 2] >> 21) + 1024] += 1
        raw[3, (bits[i + 3] >> 21) + 1024] += 1
    for i in range(n, len(bits)): raw[0, (bits[i] >> 21) + 1024] += 1
    hist[:] = 0
    for i in range(2048): hist[bin_of_pattern[i]] += raw[0, i] + raw[1, i] + raw[2, i] + raw[3, i]
    zeros = small = bad = np.int32(0)
    for i in range(len(bits)):
        m      = bits[i] & ABS
        zeros += m < 1
        small += m < near
        bad   += m >= INF
    return zeros, small, bad
