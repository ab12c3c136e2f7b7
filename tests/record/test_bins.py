"The bins of histograms: rebinned to equal ones as NumPy counts the elements themselves."
import numpy as np
import pytest

from fastgradstats.record.bins import BIN_EDGES, N_BINS, POS_BIG, ZERO, linear_bins


def counted(x):
    "The stored histogram of finite elements, by comparison with the edges.  # (390,)"
    big  = np.float32(2 ** 16)
    hist = np.zeros(N_BINS)
    hist[ZERO]    = (np.abs(x) < 2. ** -32).sum()
    hist[POS_BIG] = (x >= big).sum()
    hist[1]       = (x <= -big).sum()
    for i in range(2, POS_BIG):
        a, b = BIN_EDGES[i - 1], BIN_EDGES[i]
        if i != ZERO: hist[i] = ((x >= a) & (x < b) if a > 0 else (x > a) & (x <= b)).sum()
    assert hist.sum() == len(x)
    return hist

@pytest.mark.parametrize('low, high', [(0, 10), (-7, 2), (-1, 0), (0, .01)])
def test_equal_bins_hold_what_numpy_counts_to_within_a_bin(low, high):
    x    = np.random.default_rng(0).normal(0, 3, 20_000).astype(np.float32)
    x[:5000] = 0
    got, y   = linear_bins(counted(x), BIN_EDGES, low, high)
    want, at = np.histogram(x, 40, (low, high))
    np.testing.assert_allclose(y, at)
    wide     = np.diff(BIN_EDGES)[np.searchsorted(BIN_EDGES, np.abs([low, high]).max()) - 1]
    slack    = max(1, wide / (y[1] - y[0])) * len(x) * .01
    assert np.abs(np.cumsum(got) - np.cumsum(want)).max() < slack
    zero = np.histogram([0.], 40, (low, high))[0].argmax()
    assert got[zero] >= 5000                                                  # also where zero is the end of the range

def test_a_tail_beyond_the_bins_is_drawn_near_where_it_begins():
    x    = np.random.default_rng(0).pareto(3, 20_000).astype(np.float32) * 40_000
    got  = linear_bins(counted(x), BIN_EDGES, 0, 2. ** 17)[0]
    want = np.histogram(x, 40, (0, 2. ** 17))[0]
    assert abs(got[20:].sum() / (x >= 2 ** 16).sum() - 1) < 1e-6              # poured over all of float32 it would be lost
    assert abs(got[20:].sum() - want[20:].sum()) < .3 * want[20:].sum()

def test_counts_of_many_windows_are_rebinned_at_once():
    rng  = np.random.default_rng(0)
    many = rng.integers(0, 9, (3, 2, N_BINS)).astype(float)
    got, y = linear_bins(many, BIN_EDGES, -2, 3, n=7)
    assert got.shape == (3, 2, 7) and len(y) == 8
    np.testing.assert_allclose(got[1, 1], linear_bins(many[1, 1], BIN_EDGES, -2, 3, n=7)[0])
