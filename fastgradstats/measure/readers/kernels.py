"""What the CPU reads in one pass over the memory, in loops that Numba compiles.

torch and NumPy go over a tensor once for each statistic, and reading memory is what a statistic of a large activation
costs: sum, squares and extremes together take 0.2 ns an element here, apart 0.9. A NaN or an overflow is not handled
here but shows in the sums, which are then not finite; the caller takes the careful way.
"""
import numpy as np
from numba import carray, njit

from .instructions import floats_at, greater, lesser

LOOSE = {'nnan', 'nsz', 'reassoc', 'contract'}      # lets the loops use vector registers; see above for NaN
ABS   = np.int32(0x7fffffff)                        # the magnitude bits of a float32
INF   = np.int32(0x7f800000)
SHIFT = np.int32(21)                                # the pattern of a float32: its bits from here on
LOW   = np.int32(0x001fffff)                        # and those below
FEW   = 512                                         # elements below which tables of counts are not worth their making
TINY, HUGE = 1e-30, 1e37                            # sums of squares between them fit a float32, as do the squares
BLOCK = 1024                                        # elements that one float32 sum runs over: more drift


def compiled(**options):
    "njit, kept on disk between runs where there is a folder to keep it in."
    def wrap(f):
        try: return njit(cache=True, nogil=True, **options)(f)
        except RuntimeError: return njit(nogil=True, **options)(f)
    return wrap


@compiled(fastmath=LOOSE)
def of_row(x, lo, hi):                              # x, lo, hi: (column,); lo, hi: updated
    "Sum and sum of squares of a row; the least and the greatest of each column up to it."
    total = squares = 0.
    for start in range(0, len(x), BLOCK):
        row, a, b = x[start:start + BLOCK], lo[start:start + BLOCK], hi[start:start + BLOCK]
        s = q = x.dtype.type(0)
        for c in range(len(row)):                   # from 0: a loop from elsewhere is not vectorised (may be negative)
            v    = row[c]
            s   += v
            q   += v * v
            a[c] = lesser(a[c], v)
            b[c] = greater(b[c], v)
        total   += s
        squares += q
    return total, squares


@compiled(fastmath=LOOSE)
def moments(x, rest, lo, hi, sample, stride):
    """Sum and sum of squares, least and greatest of all. x: (row, column), rest: what follows, less than a row; lo, hi:
    (column,), written, the extremes of each; sample: (n,), written while a row is in the cache, every stride-th."""
    total = squares = 0.
    taken = at = 0                                  # at: where in the row the next one of the sample stands
    for c in range(x.shape[1]): lo[c] = hi[c] = x[0, c]
    for r in range(x.shape[0] + 1):
        row      = x[r] if r < x.shape[0] else rest
        s, q     = of_row(row, lo, hi)
        total   += s
        squares += q
        part     = sample[taken:taken + (len(row) - at + stride - 1) // stride]
        for k in range(len(part)): part[k] = row[at + k * stride]
        taken   += len(part)
        at      += len(part) * stride - len(row)
    least, greatest = lo[0], hi[0]
    for c in range(x.shape[1]): least, greatest = lesser(least, lo[c]), greater(greatest, hi[c])
    return total, squares, least, greatest


@compiled(fastmath=LOOSE)
def of_units(lo, hi, out):                          # lo, hi: (repeat, unit, rest), of columns; out: (2, unit), written
    "The extremes of units from those of columns."
    for u in range(lo.shape[1]):
        a, b = lo[0, u, 0], hi[0, u, 0]
        for k in range(lo.shape[0]):
            for i in range(lo.shape[2]): a, b = lesser(a, lo[k, u, i]), greater(b, hi[k, u, i])
        out[0, u], out[1, u] = a, b


@compiled()
def count_patterns(bits, raw):                      # bits: (n,) int32 of float32; raw: (4, 2048) int32, added to
    "Counts by the top 11 bits, in four tables in turn, since many zeros in a row would wait for one another."
    n = len(bits) // 4 * 4
    for i in range(0, n, 4):
        raw[0, (bits[i    ] >> 21) + 1024] += 1
        raw[1, (bits[i + 1] >> 21) + 1024] += 1
        raw[2, (bits[i + 2] >> 21) + 1024] += 1
        raw[3, (bits[i + 3] >> 21) + 1024] += 1
    for i in range(n, len(bits)): raw[0, (bits[i] >> 21) + 1024] += 1


@compiled()
def add_up(raw):
    "The four tables of counts in the first."
    for i in range(2048): raw[0, i] += raw[1, i] + raw[2, i] + raw[3, i]


@compiled()
def put_in_bins(raw, scale, bin_of_pattern, hist):  # hist: (bin,), written
    for k in range(len(hist)): hist[k] = 0
    for i in range(2048):
        if raw[0, i]: hist[bin_of_pattern[i]] += raw[0, i] * scale


@compiled()
def rare(bits, near):                               # bits: (n,) int32 of float32
    "How many are zero, how many have magnitude bits below `near`, how many are not finite."
    zeros = small = bad = 0
    for start in range(0, len(bits), BLOCK):        # counts of int32 take half the registers that those of int64 take
        part = bits[start:start + BLOCK]
        z = s = b = np.int32(0)
        for i in range(len(part)):
            m = part[i] & ABS
            z = np.int32(z + (m < 1))
            s = np.int32(s + (m < near))
            b = np.int32(b + (m >= INF))
        zeros, small, bad = zeros + z, small + s, bad + b
    return zeros, small, bad


@compiled()
def tally(bits, near, bin_of_pattern, raw, hist):   # bits: (n,) int32 of float32; raw: (4, 2048), zero; hist: (bin,)
    "Counts by patterns, in the first row of `raw`, and over the bins; and what is `rare`."
    count_patterns(bits, raw)
    add_up(raw)
    put_in_bins(raw, 1., bin_of_pattern, hist)
    return rare(bits, near)


@compiled()
def finished(n, total, squares, least, greatest, out):      # out: (6,), written
    """n, sum, ||x - mean||, norm, least, greatest of n elements; False if they need more care: NaN, Inf, a mean beyond
    10 std, squares that are too small for their type."""
    of_mean = total * total / n
    out[0], out[1], out[2], out[3] = n, total, np.sqrt(max(squares - of_mean, 0.)), np.sqrt(squares)
    out[4], out[5] = least, greatest
    if not (np.isfinite(total) and squares < np.inf): return False
    if squares <= 0 and (least != 0 or greatest != 0): return False
    return of_mean <= 100 * (squares - of_mean) or squares == 0


@compiled()
def select(keys, k):                                # keys: (n,), reordered
    "The k-th smallest (from 0): Hoare's quickselect, the middle one as pivot."
    lo, hi = 0, len(keys) - 1
    while lo < hi:
        pivot, i, j = keys[(lo + hi) // 2], lo, hi
        while i <= j:
            while keys[i] < pivot: i += 1
            while keys[j] > pivot: j -= 1
            if i <= j:
                keys[i], keys[j] = keys[j], keys[i]
                i, j = i + 1, j - 1
        if   k <= j: hi = j
        elif k >= i: lo = i
        else: break
    return keys[k]


@compiled()
def of_pattern(bits, mask, top, keys):              # bits: (n,) int32; keys: (n,), written
    "The lower 21 bits of those whose bits under `mask` begin with `top`; returns how many there are."
    n = 0
    for i in range(len(bits)):
        if (bits[i] & mask) >> SHIFT == top:
            keys[n] = bits[i] & LOW
            n      += 1
    return n


@compiled()
def kth(keys, k, counts):                           # keys: (n,) of 21 bits; counts: (2048,) scratch
    "The k-th smallest (from 0): its upper 11 bits by counts of all, its lower 10 by counts of those that share them."
    if len(keys) <= FEW // 8: return select(keys, k)
    zeros = 0
    for i in range(len(keys)): zeros += keys[i] == 0
    if k < zeros: return np.int32(0)                # many equal ones would wait for one another
    counts[:] = 0
    for i in range(len(keys)): counts[keys[i] >> 10] += 1
    top = low = np.int32(0)
    while k >= counts[top]:
        k   -= counts[top]
        top += 1
    counts[:] = 0
    for i in range(len(keys)):
        if keys[i] >> 10 == top: counts[keys[i] & 1023] += 1
    while k >= counts[low]:
        k   -= counts[low]
        low += 1
    return np.int32(top << 10 | low)


@compiled()
def middle_of(bits, raw, keys):                     # bits: (n,) int32; raw: of `add_up`; keys: (n,) scratch
    """The bits of the lower median, and of that of the magnitudes: the counts say which pattern holds it, so only the
    numbers of that pattern are looked at. NaN has no place here."""
    k, j = (len(bits) - 1) // 2, 1023               # upwards: patterns 1023 to 0 are the negative numbers, then 1024 on
    while k >= raw[0, j]:
        k -= raw[0, j]
        j  = j - 1 if 0 < j < 1024 else 1024 if j == 0 else j + 1
    n      = of_pattern(bits, np.int32(~0), np.int32(j - 1024), keys)
    signed = np.int32((j - 1024) << 21) | kth(keys[:n], k if j >= 1024 else n - 1 - k, raw[1])
    k, j   = (len(bits) - 1) // 2, 0
    while k >= raw[0, j] + raw[0, j + 1024]:
        k -= raw[0, j] + raw[0, j + 1024]
        j += 1
    n = of_pattern(bits, ABS, np.int32(j), keys)
    return signed, np.int32(j << 21) | kth(keys[:n], k, raw[1])


@compiled()
def middle_of_few(bits, keys):                      # bits: (n,) int32; keys: (n,) scratch
    "The same of a handful."
    n, k = len(bits), (len(bits) - 1) // 2
    for i in range(n): keys[i] = bits[i] ^ ((bits[i] >> np.int32(31)) & ABS)            # in the order of the floats
    a = select(keys[:n], k)
    a = np.int64(a ^ ((a >> np.int32(31)) & ABS))
    for i in range(n): keys[i] = bits[i] & ABS
    return a, np.int64(select(keys[:n], k))


@compiled(fastmath=LOOSE)
def sums(x):                                        # x: (n,) float32
    "Sum, sum of squares and of magnitudes, in float64."
    total = squares = mags = 0.
    for i in range(len(x)):
        v        = np.float64(x[i])
        total   += v
        squares += v * v
        mags    += abs(v)
    return total, squares, mags


@compiled(fastmath=LOOSE)
def magnitudes(x):                                  # x: (n,) float32
    "Sum of magnitudes."
    total = 0.
    for start in range(0, len(x), BLOCK):
        part, s = x[start:start + BLOCK], np.float32(0)
        for i in range(len(part)): s += abs(part[i])
        total += s
    return total


@compiled()
def extremes(bits):                                 # bits: (n,) int32 of float32
    "The bits of the least and the greatest: as integers, which vector registers compare, in the order of the floats."
    lo, hi = ABS, ~ABS
    for i in range(len(bits)):
        k  = bits[i] ^ ((bits[i] >> np.int32(31)) & ABS)
        lo = min(lo, k)
        hi = max(hi, k)
    return lo ^ ((lo >> np.int32(31)) & ABS), hi ^ ((hi >> np.int32(31)) & ABS)


@compiled()
def small(x, ends, wide, near, bin_of_pattern, out, hist):
    """All statistics of many small tensors that lie one behind the other in `x`, tensor `t` up to `ends[t]`.

    Written: out (tensor, 12): what `finished` gives, then sum of magnitudes, zeros, near zeros, non-finite, the lower
    median and that of the magnitudes; hist (tensor, bin), where `wide[t]`. A tensor that needs more care than this has
    a number of -1; returns whether none does.
    """
    start  = 0
    bits   = x.view(np.int32)
    raw    = np.empty((4, 2048), np.int32)
    keys   = np.empty(len(x) + 1, np.int32)
    floats = keys.view(np.float32)
    all_fine = True
    for t in range(len(ends)):
        marks = bits[start:ends[t]]
        total, squares, mags = sums(x[start:ends[t]])
        keys[0], keys[1]     = extremes(marks)
        fine = finished(len(marks), total, squares, floats[0], floats[1], out[t])
        out[t, 6] = mags
        out[t, 7], out[t, 8], out[t, 9] = rare(marks, near)
        if not fine or out[t, 9] > 0:
            out[t, 0], all_fine = -1, False
        elif len(marks) <= FEW:
            keys[0], keys[1]     = middle_of_few(marks, keys)
            out[t, 10], out[t, 11] = floats[0], floats[1]
            if wide[t]:
                for i in range(hist.shape[1]): hist[t, i] = 0
                for i in range(len(marks)): hist[t, bin_of_pattern[(marks[i] >> 21) + 1024]] += 1
        else:
            for i in range(2048): raw[0, i] = raw[1, i] = raw[2, i] = raw[3, i] = 0
            count_patterns(marks, raw)
            add_up(raw)
            keys[0], keys[1]     = middle_of(marks, raw, keys)
            out[t, 10], out[t, 11] = floats[0], floats[1]
            if wide[t]: put_in_bins(raw, 1., bin_of_pattern, hist[t])
        start = ends[t]
    return all_fine


@compiled()
def whole(address, form, near, bin_of_pattern, medians, out, hist, units):
    """All statistics of one tensor of float32. form: how it is read: (elements, rows, columns, stride, elements of the
    sample or 0 for none, repeat, units, rest), its columns being (repeat, units, rest).

    Written: out (12,), as by `small`; hist (bin,); units (2, unit), the extremes of each. Returns False if the moments
    need more care; where it returns True, nothing is not finite.
    """
    n, rows, columns, stride, taken = form[0], form[1], form[2], form[3], form[4]
    x      = carray(floats_at(address), (n,))
    ends   = np.empty((2, columns), np.float32)
    sample = np.empty(taken if stride > 1 else 0, np.float32)
    total, squares, least, greatest = moments(x[:rows * columns].reshape(rows, columns), x[rows * columns:],
                                              ends[0], ends[1], sample, stride)
    if not (np.isfinite(total) and squares < HUGE): return False                # as CpuReductions sees it
    if squares < TINY and (least != 0 or greatest != 0): return False
    if not finished(n, total, squares, least, greatest, out): return False
    if form[6]:
        lo, hi = ends[0].reshape(form[5], form[6], form[7]), ends[1].reshape(form[5], form[6], form[7])
        of_units(lo, hi, units)
    if not taken: return True
    if stride == 1: sample = x
    bits, scale = sample.view(np.int32), n / taken
    raw         = np.zeros((4, 2048), np.int32)
    out[6]      = magnitudes(sample) * scale
    out[7], out[8], out[9] = tally(bits, near, bin_of_pattern, raw, hist)
    out[7] *= scale
    out[8] *= scale
    for k in range(len(hist)): hist[k] *= scale
    if medians:
        keys       = np.empty(taken + 2, np.int32)
        keys[taken], keys[taken + 1] = middle_of(bits, raw, keys)
        floats     = keys[taken:].view(np.float32)
        out[10], out[11] = floats[0], floats[1]
    return True


@compiled(fastmath=LOOSE)
def mean_of_first(address, n, out):                 # out: (before, class, after) float64, written
    "The mean over the first axis of (n, before, class, after) float32, less the greatest of all classes."
    x, flat = carray(floats_at(address), (n, out.size)), out.reshape(-1)
    flat[:] = 0
    for start in range(0, len(flat), BLOCK):        # which stays in the cache
        part = flat[start:start + BLOCK]
        for i in range(n):
            row = x[i, start:start + BLOCK]
            for k in range(len(part)): part[k] += row[k]
        for k in range(len(part)): part[k] /= n
    for a in range(out.shape[0]):
        for b in range(out.shape[2]):
            top = out[a, 0, b]
            for c in range(out.shape[1]): top = max(top, out[a, c, b])
            for c in range(out.shape[1]): out[a, c, b] -= top


@compiled(fastmath={'reassoc', 'contract'})
def cross_entropy(scores, exps, y):                 # (before, class, after) both; y: (example, before, after)
    "The mean cross-entropy of the classes `y`; NaN if there are none, or if one is no class. exps: of the scores."
    sums = np.empty((len(exps), exps.shape[2]))
    for a in range(len(exps)):
        for b in range(exps.shape[2]):
            s = 0.
            for c in range(exps.shape[1]): s += exps[a, c, b]
            sums[a, b] = np.log(s)
    total, known = 0., 0
    for i in range(y.shape[0]):
        for a in range(y.shape[1]):
            for b in range(y.shape[2]):
                c = y[i, a, b]
                if c == -100: continue              # torch's ignore_index
                if not 0 <= c < scores.shape[1]: return np.nan
                total += sums[a, b] - scores[a, c, b]
                known += 1
    return total / known if known else np.nan


@compiled()
def line_up(addresses, ends, x):                    # addresses: (tensor,) int64; x: (n,), written
    "Copy many tensors of float32, one behind the other, tensor `t` up to `ends[t]`."
    start = 0
    for t in range(len(ends)):
        part = carray(floats_at(addresses[t]), (ends[t] - start,))
        for i in range(len(part)): x[start + i] = part[i]
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
        if other:
            for i in range(len(a)): b[i] = a[i]
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
