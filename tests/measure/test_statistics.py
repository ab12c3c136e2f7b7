"""Statistics: every one against a naive float64 reading of its definition, both ways of reading, merges, samples, units."""
import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fastgradstats.measure import reductions, statistics
from fastgradstats.measure.readers.cpu import AT_ONCE, Cpu, CpuReductions
from fastgradstats.measure.readers.reference import Reductions, Reference
from fastgradstats.measure.reductions import SAMPLE, Wanted, stride_of
from fastgradstats.record.bins import BIN_EDGES, BIN_LABELS, N_BINS
from fastgradstats.measure.statistics import STATISTICS, Statistic, resolve, statistic

FOUND   = {s.name: s for s in vars(statistics).values() if isinstance(s, Statistic)}
WAYS    = [CpuReductions, Reductions]                     # every reader's way with one tensor
UNITS   = [s for s in FOUND.values() if s.kind == 'unit']
MERGED  = [s for s in FOUND.values() if s.merge]
WITH    = dict(unit_dim=1, bounds=(-1., 1.), eps=1e-3)
quick   = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


# --- the definitions, read naively -----------------------------------------------------------------------------------
def values_of(x):
    "Float64 NumPy values of any tensor, in its logical order."
    x = x.detach()
    if x.layout != torch.strided: x = x.to_dense()
    if x.is_complex(): x = x.resolve_conj().abs()
    return np.array(x.resolve_neg().as_subclass(torch.Tensor).double().tolist(), np.float64).reshape(tuple(x.shape))

def bin_of(v):
    "The bin of one number by the definition: an octave and its quarter, of both signs, and six special bins."
    if math.isnan(v): return 389
    if math.isinf(v): return 388 if v > 0 else 0
    if abs(v) < 2. ** -32: return 194
    if abs(v) >= 2. ** 16: return 387 if v > 0 else 1
    m, e = math.frexp(abs(v))                                             # |v| = m 2^e, .5 <= m < 1
    k    = 4 * (e - 1 + 32) + int((2 * m - 1) * 4)
    return 195 + k if v > 0 else 193 - k

def lower_median(a): return float(np.sort(a.ravel())[(a.size - 1) // 2]) if a.size and not np.isnan(a).any() else math.nan
def per_unit(a, d):  return np.moveaxis(a, d, 0).reshape(a.shape[d], a.size // (a.shape[d] or 1))
def share(mask, a):  return float(mask.sum() / a.size) if a.size else math.nan

def std_of(a):
    if not a.size or not np.isfinite(a).all(): return math.nan
    big = np.abs(a).max() or 1.
    return float(np.std(a / big) * big)
def norm_of(a):
    if np.isnan(a).any(): return math.nan
    if np.isinf(a).any(): return math.inf
    big = np.abs(a).max() if a.size else 0.
    return float(np.sqrt(((a / big) ** 2).sum()) * big) if big else 0.

def dead_of(a, d):
    if not a.shape[d]: return math.nan
    if not a.size: return math.nan
    return float(np.mean([bool(np.isfinite(u).all() and (u == u[0]).all()) for u in per_unit(a, d)]))
def dormant_of(a, d):
    if not a.size: return math.nan
    m = np.abs(per_unit(a, d)).mean(1)
    return float(np.mean(m <= .025 * m.mean())) if len(m) and np.isfinite(m.mean()) else math.nan

def hist_of(a):
    out = np.zeros(390)
    for v in a.ravel().tolist(): out[bin_of(v)] += 1
    return out

REFERENCE = dict(
    mean           = lambda a, **k: float(a.sum() / a.size) if a.size else math.nan,
    std            = lambda a, **k: std_of(a),
    norm           = lambda a, **k: norm_of(a),
    min            = lambda a, **k: float(a.min()) if a.size else math.nan,
    max            = lambda a, **k: float(a.max()) if a.size else math.nan,
    abs_max        = lambda a, **k: float(np.abs(a).max()) if a.size else math.nan,
    abs_mean       = lambda a, **k: float(np.abs(a).mean()) if a.size else math.nan,
    median         = lambda a, **k: lower_median(a),
    abs_median     = lambda a, **k: lower_median(np.abs(a)),
    frac_zero      = lambda a, **k: share(a == 0, a),
    frac_near_zero = lambda a, **k: share(np.abs(a) < .05, a),
    frac_nonfinite = lambda a, **k: share(~np.isfinite(a), a),
    frac_saturated = lambda a, bounds, **k: share((a < bounds[0] + .015 * (bounds[1] - bounds[0]))
                                                  | (a > bounds[1] - .015 * (bounds[1] - bounds[0])), a),
    frac_below_eps = lambda a, eps, **k: share(np.abs(a) < eps, a),
    frac_underflow_fp16 = lambda a, **k: share((a != 0) & (a.astype(np.float16) == 0) | np.isinf(a.astype(np.float16)), a),
    hist           = lambda a, **k: hist_of(a),
    frac_dead      = lambda a, unit_dim, **k: dead_of(a, unit_dim),
    frac_dormant   = lambda a, unit_dim, **k: dormant_of(a, unit_dim),
)
LOOSE = dict(std=1e-4, abs_mean=1e-5)                     # relative; all other numbers within 1e-6

@pytest.fixture(autouse=True)
def no_noise():
    "A warning of NumPy's or torch's out of a statistic would be printed in the middle of somebody's training."
    with warnings.catch_warnings(), np.errstate(over='warn', invalid='warn', divide='warn'):
        warnings.simplefilter('error')
        warnings.filterwarnings('ignore', 'Sparse CSR')
        yield

def quietly(f, *a, **k):
    with np.errstate(all='ignore'): return f(*a, **k)

def check(s, x, by, a=None, **kw):
    kw = {**WITH, **kw}
    agrees(s, x, s(x, by=by, **kw), a, **kw)

def agrees(s, x, got, a=None, **kw):
    "What was read of a tensor is what the float64 reading says."
    a    = values_of(x) if a is None else a
    want = quietly(REFERENCE[s.name], a, **{**WITH, **kw})
    if s.signed and x.is_complex():
        assert np.isnan(got).all()
        return
    if s.kind == 'hist':
        np.testing.assert_array_equal(got, want)
        return
    tol  = LOOSE.get(s.name, 1e-6)
    near = quietly(np.mean, np.abs(a[np.isfinite(a)])) if np.isfinite(a).any() else 0.
    slack = 2e-7 * near if s.name in ('mean', 'std') else 1e-12 if s.unit.startswith('share') else 0.
    if s.name == 'mean' and not np.isfinite(a).all():     # of +Inf and -Inf together NaN, else what IEEE says
        np.testing.assert_equal(float(got), want)
        return
    assert got == pytest.approx(want, rel=tol, abs=slack, nan_ok=True), f'{s.name}: {got} is not {want}'


# --- tensors ---------------------------------------------------------------------------------------------------------
def randn(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
def put(x, **at):
    x = x.clone()
    for k, v in at.items(): x.view(-1)[int(k[1:])] = v
    return x
class TensorOfOnesOwn(torch.Tensor): pass

TENSORS = dict(
    normal          = lambda: randn(16, 8, 6, 5),
    relu            = lambda: randn(16, 8, 6, 5).relu(),
    relu_dead_units = lambda: put(randn(16, 8, 6, 5).relu()) * torch.tensor([0, 1, 1, 0, 1, 1, 1, 1e-4]).view(1, 8, 1, 1),
    uniform         = lambda: torch.rand(32, 10, generator=torch.Generator().manual_seed(1)),
    tanh            = lambda: (3 * randn(32, 10)).tanh(),
    constant        = lambda: torch.full((33, 7, 3), .1),
    ones            = lambda: torch.ones(64, 128),
    zeros           = lambda: torch.zeros(4, 5),
    negative_zeros  = lambda: -torch.zeros(4, 5),
    mixed_zeros     = lambda: torch.tensor([[0., -0., 1.], [-1., -0., 0.]]),
    huge            = lambda: randn(16, 8) * 1e30,
    hugest          = lambda: torch.full((64, 32), 3e38),
    huge_both_signs = lambda: torch.tensor([[3.4e38, -3.4e38, 3.4e38], [3.4e38, 3.3e38, -1.]]),
    tiny            = lambda: randn(16, 8) * 1e-30,
    denormal        = lambda: randn(16, 8) * 1e-41,
    least_denormal  = lambda: torch.full((3, 4), 1.4e-45),
    wide            = lambda: randn(64, 8) * torch.logspace(-40, 36, 8),
    offset_10       = lambda: randn(64, 256) + 10,
    offset_100      = lambda: randn(64, 256) + 100,
    offset_1000     = lambda: randn(64, 256) + 1000,
    offset_tiny     = lambda: randn(64, 256) * 1e-33 + 1e-30,
    thresholds      = lambda: torch.tensor([[.05, -.05, .97, -.97], [.001, -.001, 2 ** -25, 65520.]]),
    channels_last   = lambda: randn(6, 8, 5, 4).to(memory_format=torch.channels_last),
    channels_last_3d= lambda: randn(3, 4, 5, 4, 2).to(memory_format=torch.channels_last_3d),
    permuted        = lambda: randn(6, 8, 5, 4).permute(2, 1, 0, 3),
    transposed      = lambda: randn(30, 20).t(),
    strided         = lambda: randn(12, 16, 5)[::2, ::3],
    expanded        = lambda: randn(6, 1, 5).expand(6, 7, 5),
    all_expanded    = lambda: torch.tensor(3.).expand(4, 5),
    odd_length      = lambda: randn(1025, 3),
    long_rows       = lambda: randn(3, 7, 2100),
    float16         = lambda: randn(16, 8).half(),
    bfloat16        = lambda: randn(16, 8).bfloat16(),
    float64         = lambda: randn(16, 8).double(),
    float64_wide    = lambda: torch.tensor([[1e300, -1e300, 1e-300], [1., -1e-300, 0.]], dtype=torch.float64),
    float64_least   = lambda: torch.full((3, 4), 5e-324, dtype=torch.float64),
    float64_most    = lambda: torch.tensor([[1.7e308, 1e300], [-1e308, 0]], dtype=torch.float64),
    integers        = lambda: torch.arange(-6, 6).view(3, 4),
    booleans        = lambda: torch.arange(-6, 6).view(3, 4) > 0,
    complex         = lambda: torch.complex(randn(16, 8), randn(16, 8, seed=1)),
    conjugate_imag  = lambda: torch.complex(randn(16, 8), randn(16, 8, seed=1)).conj().imag,
    sparse          = lambda: torch.sparse_coo_tensor([[0, 2, 2], [1, 0, 0]], [3., 4., 5.], (3, 4), check_invariants=True),
    sparse_csr      = lambda: torch.tensor([[0, 1., 0], [2., 0, -3.]]).to_sparse_csr(),
    subclass        = lambda: randn(16, 8).as_subclass(TensorOfOnesOwn),
    requires_grad   = lambda: randn(16, 8).requires_grad_() * 2,
    one_nan         = lambda: put(randn(8, 5), _17=math.nan),
    first_nan       = lambda: put(randn(8, 5), _0=math.nan),
    plus_inf        = lambda: put(randn(8, 5), _17=math.inf),
    minus_inf       = lambda: put(randn(8, 5), _39=-math.inf),
    both_inf        = lambda: put(randn(8, 5), _3=math.inf, _39=-math.inf),
    inf_and_nan     = lambda: put(randn(8, 5), _3=math.inf, _39=-math.nan),
    all_nan         = lambda: torch.full((4, 3), math.nan),
    all_inf         = lambda: torch.full((4, 3), math.inf),
    huge_and_nan    = lambda: put(torch.full((4, 3), 3e38), _5=math.nan),
    empty           = lambda: torch.zeros(0, 4),
    empty_units     = lambda: torch.zeros(4, 0),
    one_element     = lambda: torch.tensor([[-.25]]),
    batch_of_one    = lambda: randn(1, 8, 3, 3),
    middle_size     = lambda: randn(40, 40, 40),
)

def test_every_statistic_has_a_reference():
    assert FOUND.keys() == REFERENCE.keys() and FOUND == STATISTICS
    assert all(s.doc and (s.f or s.reads) for s in FOUND.values())

@pytest.mark.parametrize('by', WAYS)
@pytest.mark.parametrize('kind', TENSORS)
def test_value(kind, by):
    x = TENSORS[kind]()
    a = values_of(x)
    for s in FOUND.values(): check(s, x, by, a)

@pytest.mark.parametrize('kind', TENSORS)
def test_value_by_last_axis_and_without_units(kind):
    x = TENSORS[kind]()
    a = values_of(x)
    for s in FOUND.values(): check(s, x, CpuReductions, a, unit_dim=-1)
    for s in FOUND.values():
        if s.kind != 'unit': check(s, x, Reductions, a, unit_dim=None)

@pytest.mark.parametrize('by', WAYS)
def test_scalars_and_vectors(by):
    for x in (torch.tensor(-2.5), torch.tensor([1., -2.]), torch.zeros(0), torch.tensor([0.]), randn(999)):
        for s in FOUND.values():
            if s.kind != 'unit': check(s, x, by, unit_dim=None)

def test_one_reading_serves_all_statistics_in_any_order():
    "What statistics share must not depend on who asked first."
    for kind in TENSORS:
        x = TENSORS[kind]()
        for order in (list(FOUND.values()), list(FOUND.values())[::-1]):
            for by in WAYS:
                v = by(x, **WITH)
                for s in order:
                    one, shared = s.f(by(x, **WITH)), s.f(v)
                    for p, q in zip(one, shared): np.testing.assert_allclose(q, p, rtol=1e-6, atol=2e-6, equal_nan=True)

READERS  = [Cpu, Reference]
EVERYTHING = Wanted(list(FOUND.values()))

def finish(wanted, found, s):
    "The value of a statistic, of what a reader found of a tensor."
    if s.kind == 'hist': return np.asarray(found.hist, float)
    return s.finish(*(np.asarray(float(found.numbers[at])) for at in wanted.offsets()[s.name]))

@pytest.mark.parametrize('reader', READERS)
@pytest.mark.parametrize('kind', TENSORS)
def test_every_reader_reads_every_statistic_of_one_tensor(kind, reader):
    x, r = TENSORS[kind](), reader()
    for _ in range(2):                                       # what is kept from the first does not show in the second
        found = r.read(x, EVERYTHING, units=UNITS, **WITH)
        if found is None: assert not x.numel(); return
        for s in FOUND.values():
            if s.kind != 'unit' and not (s.signed and x.is_complex()): agrees(s, x, finish(EVERYTHING, found, s))
        assert [s for s, _ in found.units] == UNITS
        for s, p in found.units: agrees(s, x, finished(s, p))

IN_ONE_CALL = Wanted([s for s in FOUND.values() if set(s.reads) <= set(AT_ONCE) or s.kind == 'hist'])

@pytest.mark.parametrize('unit_dim', [1, -1, None])
@pytest.mark.parametrize('reader', READERS)
def test_every_reader_reads_the_statistics_of_one_tensor_in_one_call(reader, unit_dim):
    r, units = reader(), [FOUND['frac_dead']]
    for x in [make() for make in TENSORS.values()] + [randn(n, 2) for n in (1, 255, 511, 512, 513, 70_000)]:
        found = r.read(x, IN_ONE_CALL, units=units, unit_dim=unit_dim, sample=None)
        if found is None: assert not x.numel(); continue
        for s in FOUND.values():
            if s.kind == 'unit' or not set(s.reads) <= {*AT_ONCE, 'hist'} or s.signed and x.is_complex(): continue
            agrees(s, x, finish(IN_ONE_CALL, found, s))
        assert [s for s, _ in found.units] == (units if unit_dim is not None else [])
        for s, p in found.units: agrees(s, x, finished(s, p), unit_dim=unit_dim)

@pytest.mark.parametrize('unit_dim', [1, -1, None])
def test_what_is_read_in_one_call(unit_dim, monkeypatch):
    monkeypatch.setattr(Reference, 'read', lambda *a, **k: None)
    read  = lambda x, **k: Cpu().read(x, IN_ONE_CALL, units=[FOUND['frac_dead']], unit_dim=unit_dim, **k) is not None
    kinds = {kind for kind, make in TENSORS.items() if read(make())}
    assert {'normal', 'relu', 'zeros', 'odd_length', 'subclass', 'requires_grad', 'batch_of_one', 'channels_last', 'permuted',
            'transposed'} <= kinds
    assert not {'one_nan', 'plus_inf', 'float16', 'sparse', 'empty', 'offset_1000', 'denormal', 'hugest', 'complex'} & kinds
    assert ('strided' in kinds) == ('expanded' in kinds) == (unit_dim is None)

@pytest.mark.parametrize('read', ['n_zero', 'abs_sum', 'median', 'abs_median'])
def test_a_statistic_that_does_not_say_that_it_is_sampled_is_read_all_the_same(read):
    x, wanted = randn(300, 400).relu() - .1, Wanted([Statistic('own', '', reads=(read,))])
    (by_parameter,), _ = Cpu().read_all([x], wanted)
    for found in (Cpu().read(x, wanted), by_parameter):
        assert found.numbers[1] == pytest.approx(float(getattr(Reductions(x), read)), rel=1e-5)

def test_tensors_without_memory_of_their_own_are_left_to_the_reference():
    zero = torch._efficientzerotensor((3, 4))
    _, found = Cpu().at_once([zero, torch.zeros(0, 3), torch.empty(3, 4, device='meta')], IN_ONE_CALL, SAMPLE)
    assert not found

@pytest.mark.parametrize('wanted', [Wanted(list(FOUND.values())), IN_ONE_CALL,
                                    Wanted([FOUND['norm']])], ids=['everything', 'what is batched', 'norm'])
@pytest.mark.parametrize('reader', READERS)
def test_every_reader_reads_every_statistic_of_all_parameters_together(reader, wanted):
    xs = [make() for make in TENSORS.values()] + [randn(n) for n in (1, 2, 16_383, 16_384, 16_385)] + [torch.tensor(3.), torch.tensor(1j)]
    r  = reader()
    for _ in range(2):
        found, norms = r.read_all(xs, wanted, sample=SAMPLE, eps=[WITH['eps']] * len(xs))
        assert len(found) == len(norms) == len(xs)
        for x, f, norm in zip(xs, found, norms):
            agrees(FOUND['norm'], x, float(norm))
            if f is None: assert not x.numel(); continue
            assert wanted.hists == [] or (f.hist is None) == (x.dim() < 2 or x.is_complex())
            for s in [*wanted.scalars, *(wanted.hists if f.hist is not None else [])]:
                if s.name == 'frac_saturated': assert math.isnan(finish(wanted, f, s)); continue        # of activations
                if not (s.signed and x.is_complex()): agrees(s, x, finish(wanted, f, s))
    assert r.read_all([], wanted) == ([], [])

def test_small_tensors_are_read_in_one_call():
    xs    = [make() for make in TENSORS.values()]
    _, in_one_call = Cpu().at_once(xs, EVERYTHING, SAMPLE)
    kinds = {list(TENSORS)[k] for k in in_one_call}
    assert {'normal', 'relu', 'zeros', 'tiny', 'permuted', 'denormal'} <= kinds
    assert not {'one_nan', 'plus_inf', 'float16', 'sparse', 'empty', 'offset_1000'} & kinds

@pytest.mark.parametrize('more', ['frac_underflow_fp16', statistic(lambda x: (x ** 4).mean(), name='fourth')], ids=['built in', 'own'])
def test_one_statistic_more_leaves_the_others_in_one_call(more, monkeypatch):
    "What is known is read of all parameters together; of each alone only the one more."
    asked = []
    class Listening(CpuReductions):
        def __getattribute__(self, name):
            if name in AT_ONCE and name not in ('n',): asked.append(name)
            return super().__getattribute__(name)
    monkeypatch.setattr('fastgradstats.measure.readers.cpu.CpuReductions', Listening)
    xs     = [randn(10, 3, seed=k) for k in range(10)]
    wanted = Wanted([*map(resolve, ('mean', 'std', 'norm', 'abs_median', 'frac_zero', 'hist')), resolve(more)])
    found, _ = Cpu().read_all(xs, wanted)
    assert not asked
    for x, f in zip(xs, found):
        for s in wanted.scalars: assert finish(wanted, f, s) == pytest.approx(s(x), rel=1e-5), s.name

floats = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True)
@quick
@given(st.lists(floats, min_size=1, max_size=40), st.sampled_from(WAYS), st.integers(1, 3))
def test_any_floats(xs, by, columns):
    xs = xs[:max(1, len(xs) // columns) * columns]
    if len(xs) % columns: columns = 1
    x  = torch.tensor(xs, dtype=torch.float32).view(-1, columns)
    a  = values_of(x)
    for s in FOUND.values(): check(s, x, by, a)

@quick
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=60), st.sampled_from([torch.float32, torch.float16, torch.float64]))
def test_many_equal_values(xs, dtype):
    x = torch.tensor(xs).to(dtype).view(-1, 1)
    for s in FOUND.values(): check(s, x, CpuReductions), check(s, x, Reductions)


# --- precision of large tensors --------------------------------------------------------------------------------------
@pytest.mark.parametrize('by', WAYS)
def test_norm_of_twelve_million(by):
    x = torch.rand(12_000_000, generator=torch.Generator().manual_seed(0))
    a = x.double()
    want = float((a * a).sum().sqrt())
    assert FOUND['norm'](x, by=by) == pytest.approx(want, rel=1e-6)
    assert FOUND['norm'](x.view(3, 400, 100, 100), by=by, unit_dim=1) == pytest.approx(want, rel=1e-6)
    assert FOUND['mean'](x, by=by) == pytest.approx(float(a.mean()), rel=1e-6)
    assert FOUND['std'](x, by=by)  == pytest.approx(float(a.std(correction=0)), rel=1e-5)

@pytest.mark.parametrize('by', WAYS)
@pytest.mark.parametrize('shape,unit_dim', [((2, 64, 128, 128), 1), ((2_000_000, 1), -1), ((1, 3_000_000), -1), ((1_000_000,), None),
                                            ((1, 4, 700_000), 1)])
@pytest.mark.parametrize('offset', [0, 3, 9.9, 1000])
def test_moments_of_long_rows(shape, unit_dim, offset, by):
    "Float32 accumulators that run over millions drift; |mean| = 10 std is where one pass is still believed."
    x = randn(*shape) + offset
    a = x.double()
    kw = dict(by=by, unit_dim=unit_dim, sample=SAMPLE)
    assert FOUND['norm'](x, **kw) == pytest.approx(float((a * a).sum().sqrt()), rel=1e-6)
    assert FOUND['mean'](x, **kw) == pytest.approx(float(a.mean()), rel=1e-6, abs=1e-6)
    assert FOUND['std'](x, **kw)  == pytest.approx(float(a.std(correction=0)), rel=1e-4)

@pytest.mark.parametrize('by', WAYS)
@pytest.mark.parametrize('ratio', [1, 5, 9, 11, 30, 100, 300, 1000])
@pytest.mark.parametrize('scale', [1e-25, 1e-3, 1., 1e25])
def test_std_far_from_zero(ratio, scale, by):
    x = ((randn(70_000) + ratio) * scale).view(7, 100, 100)
    assert FOUND['std'](x, by=by, unit_dim=1) == pytest.approx(float(x.double().std(correction=0)), rel=1e-4)
    assert FOUND['std'](x, by=by)             == pytest.approx(float(x.double().std(correction=0)), rel=1e-4)

@pytest.mark.parametrize('by', WAYS)
@pytest.mark.parametrize('value', [.1, 1., -7.3, 1e20, 1e-20])
def test_a_constant_does_not_vary(value, by):
    for n in (5, 1000, 100_000):
        x = torch.full((n,), value)
        assert FOUND['std'](x, by=by) <= 1e-7 * abs(value)
        assert FOUND['norm'](x, by=by) == pytest.approx(abs(float(x[0])) * math.sqrt(n), rel=1e-6)


# --- the histogram ---------------------------------------------------------------------------------------------------
def edge_values():
    e = np.array([Fraction(2) ** o * (4 + k) / 4 for o in range(-32, 16) for k in range(4)] + [2 ** 16], float)
    f = e.astype(np.float32)
    assert (f == e).all()
    out = np.concatenate([f, np.nextafter(f, np.float32(0)), np.nextafter(f, np.float32(np.inf))])
    return np.concatenate([out, -out, np.float32([0., -0., np.inf, -np.inf, np.nan, 1e-45, -1e-45, 3.4028235e38, -3.4028235e38])])

@pytest.mark.parametrize('by', WAYS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_exact_bin_edges(by, dtype):
    vs = edge_values()
    h  = FOUND['hist']
    np.testing.assert_array_equal(h(torch.from_numpy(vs).to(dtype), by=by), hist_of(vs))
    for v in vs[::7]:
        got = h(torch.tensor([v], dtype=dtype), by=by)
        assert got.sum() == 1 and got.argmax() == bin_of(float(v)), v

def test_edges_and_labels_say_what_falls_in():
    assert len(BIN_EDGES) == N_BINS - 2 == 388 and (np.diff(BIN_EDGES) > 0).all()
    np.testing.assert_array_equal(BIN_EDGES, -BIN_EDGES[::-1])
    for v in edge_values():
        b = bin_of(float(v))
        assert reductions.BIN_OF_PATTERN[(np.float32(v).view(np.int32) >> 21) + 1024] == b
        if b in BIN_LABELS:
            name = BIN_LABELS[b]
            assert {'-inf': v == -np.inf, '+inf': v == np.inf, 'nan': np.isnan(v), 'zero': abs(v) < 2. ** -32,
                    '> 65536': 65536 <= v < np.inf, '< -65536': -np.inf < v <= -65536}[name]
        else: assert BIN_EDGES[b - 1] <= v <= BIN_EDGES[b]
    assert {i for i in range(N_BINS) if i in BIN_LABELS} == {0, 1, 194, 387, 388, 389}

@pytest.mark.parametrize('by', WAYS)
@pytest.mark.parametrize('n', [1, 65_536, 65_537, 1_000_003])
def test_counts_sum_to_n(n, by):
    x = randn(n)
    for sample in (SAMPLE, None, 1000): assert FOUND['hist'](x, by=by, sample=sample).sum() == pytest.approx(n, rel=1e-6)

def test_counts_of_more_than_float32_can_count():
    assert FOUND['hist'](torch.zeros(1).expand(2 ** 24 + 3), by=Reductions, sample=None)[194] == 2 ** 24 + 3


# --- merging ---------------------------------------------------------------------------------------------------------
def arrays(p): return tuple(np.asarray(v, float) for v in p)
def finished(s, p): return s.finish(*(np.asarray(v, float) for v in p)) if s.kind == 'unit' else s.finish(*arrays(p))
def merged(s, p, q): return s.merge(p, q) if s.kind == 'unit' else s.merge(arrays(p), arrays(q))
def partial(s, x, by): return s.f(by(x, sample=None, **WITH))

def same(s, got, want, near=1.):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * near if s.name in ('mean', 'std') else 0, err_msg=s.name)

PAIRS = dict(
    alike        = lambda: (randn(5, 4, 3), randn(7, 4, 3, seed=1)),
    relu         = lambda: (randn(5, 4, 3).relu(), randn(1, 4, 3, seed=1).relu()),
    unlike       = lambda: (randn(5, 4, 3) * 100 + 1000, randn(7, 4, 3, seed=1) * .01),
    huge         = lambda: (randn(5, 4, 3) * 1e30, randn(7, 4, 3, seed=1)),
    hugest       = lambda: (torch.full((2, 4), 3e38), torch.full((3, 4), -3e38)),
    tiny         = lambda: (randn(5, 4, 3) * 1e-30, randn(7, 4, 3, seed=1) * 1e-41),
    nan          = lambda: (put(randn(5, 4), _3=math.nan), randn(2, 4)),
    inf          = lambda: (put(randn(5, 4), _3=math.inf), put(randn(2, 4), _0=-math.inf)),
    all_nan      = lambda: (torch.full((2, 4), math.nan), randn(3, 4)),
    constants    = lambda: (torch.ones(2, 4), torch.ones(3, 4)),
    two_constants= lambda: (torch.ones(2, 4), 2 * torch.ones(3, 4)),
    empty_right  = lambda: (randn(5, 4), torch.zeros(0, 4)),
    empty_left   = lambda: (torch.zeros(0, 4), randn(5, 4)),
    empty_both   = lambda: (torch.zeros(0, 4), torch.zeros(0, 4)),
    empty_nan    = lambda: (torch.zeros(0, 4), torch.full((2, 4), math.nan)),
    large        = lambda: (randn(100, 4, 300), randn(50, 4, 300, seed=1)),
    float64_huge = lambda: (randn(5, 4).double() * 1e200, randn(3, 4, seed=1).double() * 1e200),
)
@pytest.mark.parametrize('by', WAYS)
@pytest.mark.parametrize('pair', PAIRS)
@pytest.mark.parametrize('s', MERGED, ids=lambda s: s.name)
def test_merge_law(s, pair, by):
    a, b = PAIRS[pair]()
    both = torch.cat([a, b])
    near = float(both[torch.isfinite(both)].double().abs().mean()) if both.numel() else 0.
    near = 0. if math.isnan(near) else near
    want = finished(s, partial(s, both, by))
    same(s, finished(s, merged(s, partial(s, a, by), partial(s, b, by))), want, near)
    same(s, finished(s, merged(s, partial(s, b, by), partial(s, a, by))), want, near)

@pytest.mark.parametrize('s', MERGED, ids=lambda s: s.name)
def test_merge_is_associative(s):
    parts = [partial(s, x, CpuReductions) for x in (randn(5, 4) + 3, torch.zeros(0, 4), randn(2, 4) * 100, torch.full((1, 4), 7.))]
    a, b, c, d = parts if s.kind == 'unit' else map(arrays, parts)
    left  = s.merge(s.merge(s.merge(a, b), c), d)
    right = s.merge(a, s.merge(b, s.merge(c, d)))
    same(s, finished(s, left), finished(s, right))

@quick
@given(st.lists(st.lists(st.floats(-1e6, 1e6, width=32), max_size=5), min_size=2, max_size=5))
def test_merge_law_of_any_split(parts):
    parts = [torch.tensor(p, dtype=torch.float32).view(-1, 1) for p in parts]
    both  = torch.cat(parts)
    near  = float(both.double().abs().max()) if len(both) else 0.
    for s in MERGED:
        p = partial(s, parts[0], CpuReductions)
        for q in parts[1:]: p = merged(s, p, partial(s, q, CpuReductions))
        same(s, finished(s, p), finished(s, partial(s, both, CpuReductions)), near)

def test_merge_takes_arrays_of_rows_and_layers():
    "Rows and layers are merged all at once, one element each."
    xs = [[randn(3, 4, seed=10 * i + j) for j in range(3)] for i in range(4)]
    for s in MERGED:
        if s.kind != 'scalar': continue
        grid = lambda k: tuple(np.array([[arrays(partial(s, xs[i][j], CpuReductions))[w] for j in range(3)] for i in k])
                               for w in range(len(partial(s, xs[0][0], CpuReductions))))
        out  = s.finish(*s.merge(grid([0, 1]), grid([2, 3])))
        assert out.shape == (2, 3)
        for i in range(2):
            for j in range(3): same(s, out[i, j], s(torch.cat([xs[i][j], xs[i + 2][j]]), **WITH))


# --- sampling --------------------------------------------------------------------------------------------------------
@quick
@given(st.lists(st.sampled_from([1, 2, 3, 5, 7, 9, 10, 16, 27, 30, 64, 77, 100, 128, 210, 224, 512, 1000, 2310]), min_size=1, max_size=5),
       st.sampled_from([1, 7, 1000, SAMPLE]))
def test_stride(shape, sample):
    n, s = math.prod(shape), stride_of(tuple(shape), sample)
    if n <= sample: assert s == 1
    else:
        assert s >= n / sample and -(-n // s) <= sample
        assert all(math.gcd(s, d) == 1 for d in shape)
        assert s <= -(-n // sample) + 60                                  # not far more than asked for
    assert stride_of(tuple(shape), None) == 1

def hot_position():
    x = torch.zeros(512, 512, 3, 3)
    x[..., 1, 1] = randn(512, 512)
    return x
def channel_scale(): return randn(32, 64, 30, 30) * torch.logspace(-3, 1, 64).view(1, 64, 1, 1)
def first_differ():
    x = randn(300, 1000)
    x[:50] *= 100
    return x
def hot_column():
    x = torch.zeros(64, 16, 32, 32)
    x[..., 0] = 1 + randn(64, 16, 32)
    return x
LAYOUTS = dict(hot_position=hot_position, hot_position_last=lambda: hot_position().to(memory_format=torch.channels_last),
               channel_scale=channel_scale, first_differ=first_differ, hot_column=hot_column,
               transposed=lambda: first_differ().t(), alternating=lambda: torch.arange(2. ** 18).remainder(2).view(512, 512),
               wide_linear=lambda: randn(10, 100_000) * torch.arange(1., 11).view(10, 1))

@pytest.mark.parametrize('by', WAYS)
@pytest.mark.parametrize('layout', LAYOUTS)
def test_sample_is_close_on_adversarial_layouts(layout, by):
    x = LAYOUTS[layout]()
    assert x.numel() > SAMPLE
    for name in ('abs_mean', 'frac_zero', 'frac_near_zero'):
        s = FOUND[name]
        got, want = float(s(x, by=by)), float(s(x, by=by, sample=None))
        assert got == pytest.approx(want, rel=.03, abs=.003), name
        assert s(x, by=CpuReductions) == pytest.approx(s(x, by=Reductions), rel=1e-5), 'the two ways read the same sample'
    for name in ('norm', 'mean', 'min', 'max', 'std', 'abs_max'):         # moments are of everything
        assert FOUND[name](x, by=by) == pytest.approx(float(FOUND[name](x, by=by, sample=None)), rel=1e-6, abs=1e-9)
    a, b = FOUND['hist'](x, by=by), FOUND['hist'](x, by=by, sample=None)
    assert a.sum() == pytest.approx(x.numel(), rel=1e-6) and np.abs(np.cumsum(a - b)).max() < .02 * x.numel()

def test_sample_without_moments_reads_the_same():
    "The sample taken in the pass over the moments is the one taken alone."
    for make in LAYOUTS.values():
        x = make()
        for kw in (dict(), dict(unit_dim=1), dict(unit_dim=-1)):
            a, b = CpuReductions(x, **kw), CpuReductions(x, **kw)
            a.norm
            np.testing.assert_array_equal(np.sort(a.sample), np.sort(b.sample))
            assert len(b.sample) == b.n_sampled <= SAMPLE

@pytest.mark.parametrize('kw', [dict(), dict(unit_dim=1), dict(unit_dim=-1)], ids=str)
def test_one_call_reads_the_sample_that_all_read(kw):
    "To the last bit, but for the sum of magnitudes, which NumPy adds in another order."
    for x in [make() for make in LAYOUTS.values()] + [randn(70_000, 3), randn(48, 7, 30, 31).to(memory_format=torch.channels_last)]:
        found = Cpu().read(x, IN_ONE_CALL, units=[FOUND['frac_dead']], **kw)
        r     = CpuReductions(x, **kw)
        for name, v in zip(IN_ONE_CALL.names, found.numbers):
            assert v == pytest.approx(float(getattr(r, name)), rel=1e-6 if name == 'abs_sum' else 0), name
        np.testing.assert_array_equal(found.hist, r.hist)
        for _, ends in found.units: np.testing.assert_array_equal(ends, r.unit_extremes)
        (by_parameter,), _ = Cpu().read_all([x], IN_ONE_CALL)
        if not kw: assert by_parameter.numbers == found.numbers

def test_nan_outside_the_sample():
    "Moments and the medians, which would be wrong, say NaN; shares are of the sample."
    x = randn(200_000)
    k = next(i for i in range(200_000) if i % stride_of((200_000,), SAMPLE))
    x[k] = math.nan
    for by in WAYS:
        for name in ('mean', 'std', 'norm', 'min', 'max', 'abs_max', 'median', 'abs_median'):
            assert math.isnan(FOUND[name](x, by=by)), name
        assert FOUND['frac_nonfinite'](x, by=by) == 0
        assert FOUND['frac_nonfinite'](x, by=by, sample=None) == pytest.approx(1 / 200_000)


# --- units -----------------------------------------------------------------------------------------------------------
def test_dead_units():
    dead = FOUND['frac_dead']
    x = randn(32, 4, 5, 5).relu()
    x[:, 0] = 0
    assert dead(x, unit_dim=1) == .25
    x[:, 1] = 3.                                   # a constant positive unit is dead too
    assert dead(x, unit_dim=1) == .5
    x[31, 0, 4, 4] = 1e-40                         # one element that varies is life
    assert dead(x, unit_dim=1) == .25
    x[3, 1, 2, 2] = math.nan                       # non-finite is neither
    assert dead(x, unit_dim=1) == 0
    assert statistics.unit_states(*(np.asarray(t) for t in dead.f(CpuReductions(x, unit_dim=1)))).tolist() == [0, 2, 0, 0]
    for e in (x.to(memory_format=torch.channels_last), x.permute(0, 1, 3, 2)):
        assert statistics.unit_states(*(np.asarray(t) for t in dead.f(CpuReductions(e, unit_dim=1)))).tolist() == [0, 2, 0, 0]
    assert dead(-torch.zeros(3, 2), unit_dim=1) == dead(torch.tensor([[0.], [-0.]]), unit_dim=1) == 1
    assert dead(torch.full((3, 2), math.inf), unit_dim=1) == 0

def test_a_unit_alive_in_one_example_of_many():
    x = torch.zeros(512, 8, 4, 4)
    x[500, 3, 2, 1] = 1.
    for by in WAYS: assert FOUND['frac_dead'](x, unit_dim=1, by=by) == 7 / 8
    assert FOUND['frac_dead'](x.permute(0, 2, 3, 1), unit_dim=-1) == 7 / 8
    x[100:, 3] = 1.                                # the floor is reached in the first examples only
    x[:100, 3] = 0.
    assert FOUND['frac_dead'](x, unit_dim=1) == 7 / 8

def test_dead_over_a_window_is_dead_in_all_its_batches():
    dead = FOUND['frac_dead']
    a, b = torch.tensor([[0., 1., 0.], [0., 2., 0.]]), torch.tensor([[0., 1., 5.], [0., 1., 5.]])
    p, q = (dead.f(CpuReductions(x, unit_dim=1)) for x in (a, b))
    assert finished(dead, p) == pytest.approx(2 / 3) and finished(dead, q) == 1
    assert finished(dead, dead.merge(p, q)) == pytest.approx(1 / 3)       # the third is constant twice, at two values

def test_unit_partials_do_not_hold_on_to_the_activation():
    "Partials live for a window; the activation they were read from, or memory of it, must not."
    for s in UNITS:
        for x in (randn(6, 4), randn(6, 4, 3, 3), randn(6, 4).t(), randn(1, 4)):
            was  = s.f(CpuReductions(x, unit_dim=1))
            kept = [np.asarray(t).copy() for t in was]
            x.fill_(77.)
            for t, k in zip(was, kept): assert np.array_equal(np.asarray(t), k), f'{s.name} keeps memory of the activation'

@pytest.mark.parametrize('shape', [(6, 4), (6, 4, 3), (6, 4, 3, 2), (5, 3, 3, 2, 2), (1, 7), (7, 1), (256, 8), (250, 3)])
@pytest.mark.parametrize('by', WAYS)
def test_every_unit_axis(shape, by):
    x = randn(*shape).relu()
    x[:, 0] = 0
    for d in range(-len(shape), len(shape)):
        for s in UNITS: check(s, x, by, unit_dim=d)
        lo, hi = by(x, unit_dim=d).unit_extremes
        np.testing.assert_array_equal(lo, per_unit(x.numpy(), d).min(1))
        np.testing.assert_array_equal(hi, per_unit(x.numpy(), d).max(1))


# --- single statistics -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize('by', WAYS)
def test_underflow_is_what_half_does(by):
    near = np.float32([2. ** -25, 2. ** -24, 2. ** -26, 65504, 65519.99, 65520, 65519.996, 6e-8, 0, 1, 1e-45, np.inf])
    vs   = np.concatenate([near, np.nextafter(near, np.float32(0)), np.nextafter(near, np.float32(np.inf))])
    for v in [*vs, *-vs]:
        x = torch.tensor([v])
        half = x.half()
        want = bool((half == 0) & (x != 0)) or bool(torch.isinf(half))
        assert FOUND['frac_underflow_fp16'](x, by=by) == want, v

def test_saturated_needs_bounds_and_eps_an_optimizer():
    assert math.isnan(FOUND['frac_saturated'](randn(5))) and math.isnan(FOUND['frac_below_eps'](randn(5)))
    x = torch.tensor([.01, .02, .5, .98, .99])
    assert FOUND['frac_saturated'](x, bounds=(0., 1.)) == pytest.approx(.4)
    x = torch.tensor([-.98, -.96, 0., .96, .98, math.nan])
    assert FOUND['frac_saturated'](x, bounds=(-1., 1.)) == pytest.approx(2 / 6)
    assert FOUND['frac_saturated'](torch.tensor([0., .05, 6., 5.95]), bounds=(0., 6.)) == 1
    assert FOUND['frac_below_eps'](torch.tensor([1e-9, -1e-9, 1e-7, 0.]), eps=1e-8) == .75


# --- the device way waits for nothing ----------------------------------------------------------------------------------
class Watchful(TorchDispatchMode):
    "Refuses every operation that would wait for a device, or that needs its data to know a shape."
    BAD = ('_local_scalar_dense', 'bincount', 'nonzero', 'masked_select', 'unique', 'is_nonzero', 'equal.default', 'median')
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        assert not any(b in name for b in self.BAD), f'{name} waits for the device'
        if 'index' in name:
            for a in args:
                for i in (a if isinstance(a, (list, tuple)) else [a])[:9]:
                    assert not (isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8)), f'{name} by a mask'
        if '_to_copy' in name: assert (kwargs or {}).get('device') in (None, torch.device('cpu')), f'{name} leaves the device'
        return func(*args, **(kwargs or {}))

@pytest.mark.parametrize('kind', ['normal', 'relu', 'channels_last', 'permuted', 'float16', 'float64', 'one_nan', 'denormal',
                                  'middle_size', 'requires_grad', 'subclass', 'complex'])
def test_the_device_way_does_not_wait(kind, monkeypatch):
    x = TENSORS[kind]()
    Reductions(x, **WITH).hist                     # tables of constants are on the device from now on
    for name in ('numpy', 'item', 'tolist', '__float__', '__bool__', '__int__', '__index__', 'cpu', '__array__'):
        monkeypatch.setattr(torch.Tensor, name, lambda self, *a, name=name, **k: pytest.fail(f'{name} waits for the device'))
    for s in FOUND.values():
        v = Reductions(x, **WITH)
        with Watchful(): p = s.f(v)
        for t in p: assert isinstance(t, (torch.Tensor, int, float))
        with Watchful():
            if s.kind == 'unit': s.merge(p, p)

def test_the_device_way_on_a_device_without_data():
    "A meta tensor has no values: whatever looked at one would raise."
    for shape in ((16, 8, 6, 5), (300, 500)):
        for s in FOUND.values():
            for t in s.f(Reductions(torch.empty(shape, device='meta'), **WITH)):
                if isinstance(t, torch.Tensor): assert t.device.type == 'meta', s.name

def test_the_two_ways_agree_on_a_sampled_tensor():
    x = randn(64, 32, 20, 20).relu() - .1
    for s in FOUND.values():
        np.testing.assert_allclose(s(x, by=CpuReductions, **WITH), s(x, by=Reductions, **WITH), rtol=2e-6, err_msg=s.name)

def test_deterministic_algorithms_do_not_forbid():
    was = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(True)
        for x in (randn(16, 8, 3, 3), randn(64, 32, 20, 20)):
            for s in FOUND.values():
                for by in WAYS: s(x, by=by, **WITH)
    finally: torch.use_deterministic_algorithms(was)

def test_nothing_is_changed_and_no_graph_is_made():
    x = randn(70_000, 2).requires_grad_()
    y = x * 1
    keep, version, state = y.detach().clone(), y._version, torch.get_rng_state()
    for s in FOUND.values():
        for by in WAYS:
            for t in s.f(by(y, **WITH)): assert not getattr(t, 'requires_grad', False)
    assert torch.equal(y, keep) and y._version == version and torch.equal(torch.get_rng_state(), state)


# --- a user's statistics ---------------------------------------------------------------------------------------------
def test_a_statistic_of_ones_own():
    @statistic(unit='ratio')
    def kurtosis(x):
        "Fourth standardised moment."
        z = (x - x.mean()) / x.std(correction=0)
        return (z ** 4).mean()
    assert isinstance(kurtosis, Statistic) and kurtosis.name == 'kurtosis' and kurtosis.unit == 'ratio'
    assert kurtosis.doc == 'Fourth standardised moment.' and kurtosis.merge is None
    assert kurtosis(randn(100_000)) == pytest.approx(3, abs=.1)
    x = TENSORS['requires_grad']().half()
    seen = []
    statistic(lambda x: seen.append(x) or 0., name='look')(x)
    assert seen[0].dtype == torch.float32 and not seen[0].requires_grad and type(seen[0]) is torch.Tensor

def test_a_statistic_of_ones_own_with_a_merge():
    s = statistic(lambda x: ((x > 1).sum(), x.numel()), name='above_one', finish=lambda k, n: k / n,
                  merge=lambda a, b: (a[0] + b[0], a[1] + b[1]))
    a, b = randn(5, 4), randn(9, 4)
    assert finished(s, merged(s, s.f(CpuReductions(a)), s.f(CpuReductions(b)))) == pytest.approx(s(torch.cat([a, b])))

def test_numbers_of_every_kind_are_taken():
    for out in (1, 2., True, np.float32(3), torch.tensor(4), torch.tensor([5.]), torch.tensor(6., dtype=torch.bfloat16)):
        assert float(np.asarray(statistic(lambda x: out, name='f')(randn(3))).item()) == float(out)

@pytest.mark.parametrize('out', [None, 'high', torch.zeros(3), [1., 2.], {'a': 1}, 1j, torch.tensor(1j)], ids=str)
def test_bad_results_are_named(out):
    s = statistic(lambda x: out, name='odd')
    with pytest.raises((TypeError, ValueError), match='odd.*(number|finish)'): s(randn(4, 3))

def test_names():
    with pytest.raises(ValueError, match="name='my_statistic'"): statistic(lambda x: 0.)
    with pytest.raises(TypeError, match='got 3'): statistic(3)
    class Callable:
        def __call__(self, x): return x.mean()
    with pytest.raises(ValueError, match="name='my_statistic'"): statistic(Callable())
    assert statistic(Callable(), name='own')(torch.ones(3)) == 1
    import functools
    with pytest.raises(ValueError, match="name='my_statistic'"): statistic(functools.partial(torch.sum, dim=None))

def test_resolve():
    assert resolve('norm') is FOUND['norm'] and resolve(FOUND['std']) is FOUND['std']
    assert resolve(torch.var).name == 'var'
    with pytest.raises(ValueError, match=r"'nrom' is not a statistic \(grad\).*norm"): resolve('nrom', 'grad')
    with pytest.raises(TypeError, match='got 3 for grad'): resolve(3, 'grad')

def test_a_statistic_can_be_read_without_a_unit_axis_only_by_an_error_that_teaches():
    for s in UNITS:
        with pytest.raises(ValueError, match='unit_dim'): s(randn(3, 4))
