"Parameters around a step: what their gradients, weights and updates are, against plain torch."
import numpy as np
import pytest
import torch
from torch import nn

from fastgradstats import watch
from fastgradstats.measure import readers
from fastgradstats.measure.plan import Plan
from fastgradstats.measure.watcher import Watcher


def stepped(model, x, probes=('grad', 'weight', 'update'), steps=3, lr=.1, **settings):
    """Train a model by plain SGD under `watch`: the Record, and what torch says of each step, {probe: {name: [array]}},
    complex numbers as they are."""
    opt   = torch.optim.SGD(model.parameters(), lr=lr)
    named = dict(model.named_parameters())
    want  = {p: {n: [] for n in named} for p in probes}
    np64  = lambda t: t.detach().resolve_conj().clone().to(torch.complex128 if t.is_complex() else torch.float64).numpy()
    with watch(model, opt, **settings) as w:
        for _ in range(steps):
            opt.zero_grad()
            out = model(x)
            (out.abs() if out.is_complex() else out).float().square().mean().backward()
            old = {n: np64(p) for n, p in named.items()}
            for n, p in named.items():
                if 'grad' in probes:   want['grad'][n].append(np64(p.grad))
                if 'weight' in probes: want['weight'][n].append(old[n])
            opt.step()
            for n, p in named.items():
                if 'update' in probes: want['update'][n].append(np64(p) - old[n])
    return w.record, want

def norms(rec, want, rtol=1e-4):
    "Every norm that was recorded is that of torch."
    for probe, by in want.items():
        for n, xs in by.items():
            got = rec[probe, 'norm'][:, list(rec.layers[probe].layer).index(n)]
            np.testing.assert_allclose(got, [np.linalg.norm(np.ravel(x)) for x in xs], rtol=rtol, err_msg=f'{probe} of {n}')

def two_convs(): return nn.Sequential(nn.Conv2d(3, 48, 3), nn.Conv2d(48, 48, 3))

@pytest.mark.parametrize('settings', [{}, dict(update=['norm', 'std'])], ids=['norm', 'more'])
@pytest.mark.parametrize('kind', ['channels_last', 'half float64', 'float64', 'bfloat16'])
def test_updates_beside_a_parameter_of_another_kind(kind, settings):
    "What is known of some of the parameters is not read anew of the others' new weights."
    torch.manual_seed(0)
    m, x = two_convs(), torch.randn(2, 3, 8, 8)
    if kind == 'channels_last': m = m.to(memory_format=torch.channels_last)
    if kind == 'float64':       m, x = m.double(), x.double()
    if kind == 'bfloat16':      m, x = m.bfloat16(), x.bfloat16()
    if kind == 'half float64':  m = nn.Sequential(m[0], Cast(torch.float64), m[1].double())
    norms(*stepped(m, x, **settings))

class Cast(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype
    def forward(self, x): return x.to(self.dtype)

class Spectral(nn.Module):
    "A Fourier layer: complex weights beside real ones."
    def __init__(self):
        super().__init__()
        self.lin  = nn.Linear(6, 8)
        self.freq = nn.Parameter(torch.randn(5, 4, dtype=torch.complex64))
        self.bias = nn.Parameter(torch.randn(4, dtype=torch.complex64))
    def forward(self, x): return torch.fft.rfft(self.lin(x)) @ self.freq + self.bias

SIGNED    = ['mean', 'std', 'min', 'max', 'median']
MAGNITUDE = dict(abs_mean=lambda z: np.abs(z).mean(), abs_max=lambda z: np.abs(z).max(), frac_zero=lambda z: (z == 0).mean(),
                 norm=lambda z: np.sqrt((np.abs(z) ** 2).sum()))

def test_of_complex_parameters_magnitudes_are_read_and_what_has_a_sign_is_named():
    torch.manual_seed(0)
    more = [*SIGNED, *MAGNITUDE, 'hist']
    with pytest.warns(UserWarning, match='complex64'):
        rec, want = stepped(Spectral(), torch.randn(7, 6), grad=more, weight=more, update=more)
    norms(rec, want)
    for probe, by in want.items():
        for n, zs in by.items():
            j = list(rec.layers[probe].layer).index(n)
            for s, f in MAGNITUDE.items(): np.testing.assert_allclose(rec[probe, s][:, j], [f(z) for z in zs], rtol=1e-4, err_msg=s)
            real = np.isfinite(zs[0].real).all() and not np.iscomplexobj(zs[0])
            for s in SIGNED: assert np.isnan(rec[probe, s][:, j]).all() != real, (s, n)
            assert np.isnan(rec[probe, 'hist'][:, j]).all() != (n == 'lin.weight'), n
    assert {'freq', 'bias', 'output'} == {k.split()[0] for k, why in rec.meta['not_hooked'].items() if 'complex64' in why}

class Odd(nn.Module):
    "A parameter without elements, and two without dimensions, of two types."
    def __init__(self):
        super().__init__()
        self.lin   = nn.Linear(6, 4)
        self.none  = nn.Parameter(torch.zeros(0, 4))
        self.scale = nn.Parameter(torch.tensor(2.))
        self.shift = nn.Parameter(torch.tensor(.5, dtype=torch.float64))
    def forward(self, x): return self.scale * self.lin(x) + self.shift + self.none.sum()

@pytest.mark.parametrize('more', [[], ['mean', 'std', 'median', 'abs_median', 'frac_underflow_fp16', 'hist']], ids=['norm', 'more'])
def test_parameters_without_elements_or_dimensions(more):
    torch.manual_seed(0)
    rec, want = stepped(Odd(), torch.randn(7, 6), grad=['norm', *more], weight=['norm', *more], update=['norm', *more])
    none = list(rec.layers['grad'].layer).index('none')
    for probe in want:
        want[probe].pop('none')
        assert all(np.isnan(rec[probe, s][:, none]).all() for s in ['norm', *more] if s != 'hist')
    norms(rec, want)
    total = [np.sqrt(sum((g[k] ** 2).sum() for g in want['grad'].values())) for k in range(3)]
    np.testing.assert_allclose(rec.iters.grad_norm, total, rtol=1e-5)
    if more: np.testing.assert_allclose(rec['grad', 'mean'][:, list(rec.layers['grad'].layer).index('shift')], np.ravel(want['grad']['shift']), rtol=1e-5)

@pytest.mark.parametrize('host', [None, False], ids=['cpu', 'reference'])
def test_a_parameter_that_changes_its_layout_while_it_is_watched(host, monkeypatch):
    m = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3))
    real = readers.choose
    monkeypatch.setattr('fastgradstats.measure.watcher.choose', lambda model, h: real(model, host))
    opt, want = torch.optim.SGD(m.parameters(), .1), []
    with watch(m, opt) as w:
        for i in range(4):
            if i == 2: m.to(memory_format=torch.channels_last)
            opt.zero_grad()
            m(torch.randn(2, 3, 8, 8)).square().mean().backward()
            old = m[1].weight.detach().double().clone()
            opt.step()
            want.append(float((m[1].weight.double() - old).norm()))
    np.testing.assert_allclose(w.record['update', 'norm'][:, 2], want, rtol=1e-4)

def test_nothing_is_compiled_for_a_model_on_a_device(monkeypatch):
    "Nine seconds that a model on a GPU need not wait for: the compiled loops read the CPU's tensors alone."
    monkeypatch.setattr('fastgradstats.measure.readers.warm_up', lambda: pytest.fail('compiled'))
    assert type(readers.choose(nn.Linear(2, 2, device='meta'))) is readers.Reference
    Watcher(Plan(grad='norm')).attach(nn.Linear(2, 2, device='meta'))
    with pytest.raises(pytest.fail.Exception, match='compiled'): Watcher(Plan(grad='norm')).attach(nn.Linear(2, 2))
