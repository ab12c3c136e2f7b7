"What is advised: for the layers that are at fault, at a rate that is usual; and how it is applied."
import numpy as np
import pytest
import torch
from fastai.optimizer import Adam
from torch import nn

from sick import make
from fastgradstats import LayerStatsCallback, watch
from fastgradstats.diagnosis.fixes import advise, faster, signal
from fastgradstats.diagnosis.evidence import run
from fastgradstats.callbacks.apply_fix import apply_fix


def recorded(model, lr=1e-9, **kw):
    "The evidence of a short fit that leaves a model as it begins."
    learn = make(depth=2, lr=lr)
    learn.model = model
    learn.fit(1, cbs=LayerStatsCallback(verbose=False))
    rec = learn.layer_stats
    return rec, run(rec)

def changed(what=None, how=lambda m: None):
    m = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 2))
    for n in what or (): how(m[n])
    return m

@torch.no_grad()
def louder(m): m.weight.mul_(40)
def silent(m): nn.init.zeros_(m.weight)
def sunk(m):   nn.init.constant_(m.bias, -10.)

@pytest.mark.parametrize('how', [louder, silent, sunk])
def test_the_layers_that_start_off_scale_are_known_and_drawn_anew_alone(how):
    assert recorded(changed())[1].off_scale == {} == recorded(changed((0, 2, 4, 6), how))[1].off_scale      # none, or all of them
    rec, r = recorded(changed((4,), how))
    layer, size = r.off_scale['4']
    truth = float(changed_weight(rec)) * np.sqrt(30)
    assert list(r.off_scale) == ['4'] and layer == '4.weight' and np.isclose(size, truth, rtol=1e-4)
    fix   = signal(r)
    assert fix == {'init': 'kaiming', 'layers': ('4',), 'norm': 'batch'}
    assert 'of layer 4 alone' in advise(fix) and 'layers 4 and 6 alone' in advise({**fix, 'layers': ('4', '6')})
    learn = make(depth=2)
    learn.model = changed((4,), how)
    was   = {n: p.clone() for n, p in learn.model.named_parameters()}
    assert apply_fix(learn, {k: v for k, v in fix.items() if k != 'norm'}) == ['init', 'layers']
    now   = dict(learn.model.named_parameters())
    assert {n for n in was if not torch.equal(was[n], now[n])} <= {'4.weight', '4.bias'}
    assert .1 < now['4.weight'].std() < .5 and not now['4.bias'].any()

def changed_weight(rec):
    "The rms of the third weight, in float64."
    k = list(rec.layers['weight'].layer).index('4.weight')
    return rec['weight', 'norm'][0, k].astype(float) / 30

@pytest.mark.parametrize('net', [nn.LSTM(20, 64, batch_first=True), nn.Conv2d(3, 8, 3), nn.MultiheadAttention(32, 4), nn.ConvTranspose2d(8, 4, 2),
                                 nn.TransformerEncoderLayer(32, 4), nn.GRU(1, 64)])
def test_pytorchs_own_starts_are_on_scale(net):
    x   = {nn.LSTM: (2, 5, 20), nn.Conv2d: (2, 3, 8, 8), nn.ConvTranspose2d: (2, 8, 5, 5), nn.GRU: (2, 5, 1)}.get(type(net), (2, 5, 32))
    opt = torch.optim.SGD(net.parameters(), .01)
    xs  = (torch.randn(x),) * (3 if isinstance(net, nn.MultiheadAttention) else 1)
    with watch(net, opt) as w:
        y    = net(*xs)
        loss = (y[0] if isinstance(y, tuple) else y).square().mean()
        w.loss(loss); loss.backward(); opt.step()
    assert run(w.record).off_scale == {} and ('weight', 'norm') in w.record

@pytest.mark.parametrize('lr,factor', [(1e-5, 1000.), (2e-6, 1000.)])
def test_adams_rate_is_weighed_as_much_as_its_steps(lr, factor):
    "Small embeddings make the median step large: 100 times would be advised by it alone."
    torch.manual_seed(0)
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embs, self.head = nn.ModuleList([nn.Embedding(8, 8) for _ in range(3)]), nn.Linear(24, 2)
            for e in self.embs: nn.init.normal_(e.weight, std=.003)
        def forward(self, x): return self.head(torch.cat([e(x[:, i].long().abs() % 8) for i, e in enumerate(self.embs)], 1))
    learn = make(depth=2, lr=lr)
    learn.model, learn.opt_func = Net(), Adam
    learn.fit(2, cbs=LayerStatsCallback(verbose=False))
    r = run(learn.layer_stats)
    assert r.adaptive and faster(r, np.nanmedian(r.median_ratio)) == {'lr': factor}
