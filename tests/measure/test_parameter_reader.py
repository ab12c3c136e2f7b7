"Parameters around a step: what their gradients, weights and updates are, against plain torch."
import numpy as np
import pytest
import torch
from torch import nn

from fastgradstats import watch


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
