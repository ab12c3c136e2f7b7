"""What the CPU reads in one pass over the memory, in loops that Numba compiles.

torch and NumPy go over a tensor once for each statistic, and reading memory is what a statistic of a large activation
costs: sum, squares and extremes together take 0.2 ns an element here, apart 0.9. A NaN or an overflow is not handled
here but shows in the sums, which are then not finite; the caller takes the careful way.
"""
import numpy as np
from numba import njit

LOOSE = {'nnan', 'nsz', 'reassoc', 'contract'}      # lets the loops use vector registers; see above for NaN
ABS   = np.int32(0x7fffffff)                        # the magnitude bits of a float32
INF   = np.int32(0x7f800000)
BLOCK = 1024                                        # elements that one float32 sum runs over: more drift


def compiled(**options):
    "njit, kept on disk between runs where there is a folder to keep it in."
    def wrap(f):
        try: return njit(cache=True, nogil=True, **options)(f)
        except RuntimeError: return njit(nogil=True, **options)(f)
    return wrap


@compiled(fastmath=LOOSE)
def moments(x, lo, hi, sample, stride):     # x: (row, column); lo, hi: (column,), sample: (n,), all written
    """Sum and sum of squares of all; least and greatest of each column; and, as long as a row is in the cache, every
    stride-th element in the order of the rows, until `sample` is full."""
    total = squares = 0.
    taken = 0
    for c in range(x.shape[1]): lo[c] = hi[c] = x[0, c]
    for r in range(x.shape[0]):
        for start in range(0, x.shape[1], BLOCK):
            row, a, b = x[r, start:start + BLOCK], lo[start:start + BLOCK], hi[start:start + BLOCK]
            s = q = x.dtype.type(0)
            for c in range(len(row)):               # from 0: a loop from elsewhere is not vectorised (may be negative)
                v    = row[c]
                s   += v
                q   += v * v
                a[c] = min(a[c], v)
                b[c] = max(b[c], v)
            total   += s
            squares += q
        stop = min(((r + 1) * x.shape[1] - 1) // stride + 1, len(sample))
        for k in range(taken, stop): sample[k] = x[r, k * stride - r * x.shape[1]]
        taken = max(taken, stop)
    return total, squares


@compiled()
def tally(bits, near, bin_of_pattern, hist):        # bits: (n,) int32 of float32; hist: (bin,), written
    """Counts by the top 11 bits, in four tables in turn, since many zeros in a row would wait for one another; and how
    many are zero, how many have magnitude bits below `near`, how many are not finite."""
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


@compiled()
def site(x, stride, sample, near, bin_of_pattern, hist, lo, hi):
    """All that is read of an activation. x: (row, column), its columns (repeat, unit, rest) by the shapes of `lo` and
    `hi` (repeat, unit, rest), which are written as scratch, their first (0, :, 0) being the extremes of the units;
    hist: (bin,), sample: (n,) or empty where all is read, both written. Returns sum, squares, least, greatest and what
    `tally` returns."""
    total, squares = moments(x, lo.reshape(-1), hi.reshape(-1), sample, stride)
    bits = x.reshape(-1).view(np.int32) if stride == 1 else sample.view(np.int32)
    zeros, close, bad = tally(bits, near, bin_of_pattern, hist)
    least, greatest = lo[0, 0, 0], hi[0, 0, 0]
    for u in range(lo.shape[1]):
        a, b = lo[0, u, 0], hi[0, u, 0]
        for k in range(lo.shape[0]):
            for i in range(lo.shape[2]): a, b = min(a, lo[k, u, i]), max(b, hi[k, u, i])
        lo[0, u, 0], hi[0, u, 0] = a, b
        least, greatest = min(least, a), max(greatest, b)
    return total, squares, least, greatest, zeros, close, bad


@compiled()
def select(keys, k):                                # keys: (n,) uint32
    "The k-th smallest (from 0), by three passes of counting."
    known = np.uint32(0)
    for step in range(3):
        shift, above, width = (21, 0, 2048) if step == 0 else (10, 21, 2048) if step == 1 else (0, 10, 1024)
        counts = np.zeros(width, np.int32)
        if step == 0:
            for i in range(len(keys)): counts[keys[i] >> shift] += 1
        else:
            for i in range(len(keys)):
                if keys[i] >> above == known: counts[(keys[i] >> shift) & (width - 1)] += 1
        j = 0
        while k >= counts[j]:
            k -= counts[j]
            j += 1
        known = np.uint32(known * width + j)
    return known


@compiled(fastmath=LOOSE)
def small(x, ends, wide, near, bin_of_pattern, out, middle, hist):
    """All statistics of many small tensors that lie one behind the other in `x`, tensor `t` up to `ends[t]`.

    out: (tensor, 10), written: number, sum, ||x - mean||, norm, least, greatest, sum of magnitudes, zeros, near zeros,
    non-finite; middle: (tensor, 2), written: the bits of the lower median and of that of the magnitudes; hist:
    (tensor, bin), written where `wide[t]`. A tensor that needs more care than this has a number of -1.
    """
    start = 0
    bits  = x.view(np.int32)
    for t in range(len(ends)):
        part    = x[start:ends[t]]
        marks   = bits[start:ends[t]]
        n       = len(part)
        total   = squares = mags = 0.
        lo = hi = part[0]
        for i in range(n):
            v        = np.float64(part[i])
            total   += v
            squares += v * v
            mags    += abs(v)
            lo       = min(lo, part[i])
            hi       = max(hi, part[i])
        zeros   = close = bad = np.int32(0)
        signed  = np.empty(n, np.uint32)            # in the order of the floats
        plain   = np.empty(n, np.uint32)            # in the order of the magnitudes
        for i in range(n):
            m      = marks[i] & ABS
            zeros += m < 1
            close += m < near
            bad   += m >= INF
            plain[i]  = np.uint32(m)
            signed[i] = np.uint32(m) + np.uint32(0x80000000) if marks[i] >= 0 else np.uint32(0x7fffffff) - np.uint32(m)
        k = (n - 1) // 2
        if n <= 64:
            signed.sort()
            plain.sort()
            a, b = signed[k], plain[k]
        else: a, b = select(signed, k), select(plain, k)
        middle[t, 0] = np.int64(a) - 0x80000000 if a >= 0x80000000 else -np.int64(a) - 1
        middle[t, 1] = np.int64(b)
        of_mean = total * total / n
        careful = bad > 0 or squares - of_mean < of_mean / 100 or squares == 0 and (lo != 0 or hi != 0)
        out[t, 0], out[t, 1] = -1 if careful else n, total
        out[t, 2], out[t, 3] = np.sqrt(max(squares - of_mean, 0.)), np.sqrt(squares)
        out[t, 4], out[t, 5], out[t, 6], out[t, 7], out[t, 8], out[t, 9] = lo, hi, mags, zeros, close, bad
        if wide[t]: tally(marks, near, bin_of_pattern, hist[t])
        start = ends[t]


@compiled(fastmath={'nsz', 'reassoc', 'contract'})
def norms(x, ends, out):                            # out: (tensor,), written
    "Norms of many small tensors that lie one behind the other in `x`."
    start = 0
    for t in range(len(ends)):
        part  = x[start:ends[t]]
        total = 0.
        for i in range(len(part)): total += np.float64(part[i]) * np.float64(part[i])
        out[t] = np.sqrt(total)
        start  = ends[t]


@compiled(fastmath={'nsz', 'reassoc', 'contract'})
def distances(x, y, ends, out):                     # out: (tensor,), written
    "Norms of x - y of many small tensors that lie one behind the other."
    start = 0
    for t in range(len(ends)):
        a, b  = x[start:ends[t]], y[start:ends[t]]
        total = 0.
        for i in range(len(a)):
            d      = np.float64(a[i]) - np.float64(b[i])
            total += d * d
        out[t] = np.sqrt(total)
        start  = ends[t]


@compiled(fastmath={'nsz', 'reassoc', 'contract'})
def synchronise(new, old):                          # both (n,); old is written where it differs
    "Sum of squares of `new`; `old` is made equal to it, which it mostly is already."
    total = 0.
    for start in range(0, len(new), BLOCK):
        a, b  = new[start:start + BLOCK], old[start:start + BLOCK]
        other = False
        for i in range(len(a)):
            v      = np.float64(a[i])
            total += v * v
            other |= a[i] != b[i]
        if other: b[:] = a
    return total


@compiled(fastmath={'nsz', 'reassoc', 'contract'})
def advance(new, old):                              # both (n,); old is written
    "Sum of squares of new - old; `old` becomes `new`."
    total = 0.
    for i in range(len(new)):
        d      = np.float64(new[i]) - np.float64(old[i])
        total += d * d
        old[i] = new[i]
    return total
