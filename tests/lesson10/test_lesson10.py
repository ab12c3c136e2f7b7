import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback, CancelFitException
from rich.console import Console
from torch import nn

import fastgradstats.lesson10.experiment as lesson10
from fastgradstats import GeneralRelu, Record
from fastgradstats.lesson10.data import digits
from fastgradstats.lesson10.experiment import NETS, conv_net, init_kaiming, kaiming_generalrelu, learner, report, run

D, K  = 'default-relu', 'kaiming-generalrelu'
CONVS = [f'conv{i}.weight' for i in range(1, 5)]


# --- the nets --------------------------------------------------------------------------------------------------------
class CourseRelu(nn.Module):                                   # as fastai's course v3 has it, in place
    def __init__(self, leak=None, sub=None, maxv=None):
        super().__init__()
        self.leak, self.sub, self.maxv = leak, sub, maxv
    def forward(self, x):
        x = F.leaky_relu(x, self.leak) if self.leak is not None else F.relu(x)
        if self.sub is not None:  x.sub_(self.sub)
        if self.maxv is not None: x.clamp_max_(self.maxv)
        return x

@pytest.mark.parametrize('args', [(), (.1,), (.1, .4, 6.), (.2, None, 1.), (0., 0., 0.)])
def test_general_relu_is_the_courses_forward_and_backward(args):
    torch.manual_seed(0)
    x = (8 * torch.randn(1000)).requires_grad_()
    y = x.detach().clone().requires_grad_()
    a, b = GeneralRelu(*args)(x), CourseRelu(*args)(y)
    a.square().sum().backward(); b.square().sum().backward()
    assert torch.equal(a, b) and torch.equal(x.grad, y.grad)

@pytest.mark.parametrize('sub, maxv', [(.4, None), (None, 1.), (.4, 6.)])
def test_general_relu_works_without_a_leak_where_the_courses_raises(sub, maxv):
    "relu's backward needs the output that sub_ and clamp_max_ overwrite."
    x = (8 * torch.randn(1000)).requires_grad_()
    y = GeneralRelu(None, sub, maxv)(x)
    y.sum().backward()
    lo, hi = -(sub or 0.), maxv if maxv is not None else np.inf
    assert torch.allclose(y, (x.clamp_min(0) + lo).clamp_max(hi)) and torch.equal(x.grad, ((x > 0) & (x + lo <= hi)).float())
    with pytest.raises(RuntimeError, match='inplace'): CourseRelu(None, sub, maxv)(x).sum().backward()

def test_general_relu_changes_nothing_in_place():
    x = torch.randn(10); before = x.clone()
    GeneralRelu(.1, .4, 6.)(x)
    assert torch.equal(x, before)
    h = torch.randn(10, requires_grad=True).exp()              # exp's backward needs its own output
    GeneralRelu(None, .4, 6.)(h).sum().backward()
    assert 'leak=0.1' in repr(GeneralRelu(.1, .4, 6.))

def test_the_net():
    m = conv_net()
    assert [n for n, _ in m.named_parameters()] == [f'{l}.{p}' for l in ('conv1', 'conv2', 'conv3', 'conv4', 'head') for p in ('weight', 'bias')]
    assert [tuple(p.shape) for p in m.parameters() if p.ndim > 1] == [(8, 1, 5, 5), (16, 8, 3, 3), (32, 16, 3, 3), (32, 32, 3, 3), (10, 32)]
    x, sizes = torch.randn(2, 1, 28, 28), []
    for layer in m:
        x = layer(x)
        if isinstance(layer, nn.Conv2d): sizes.append(x.shape[-1])
    assert sizes == [14, 7, 4, 2] and x.shape == (2, 10)

def test_init_kaiming_touches_convolutions_alone():
    torch.manual_seed(0); plain = conv_net()
    torch.manual_seed(0); m = conv_net(); init_kaiming(m, .1)
    assert torch.equal(plain.head.weight, m.head.weight) and torch.equal(plain.head.bias, m.head.bias)
    for c in (m.conv2, m.conv3, m.conv4):
        assert (c.bias == 0).all()
        want = (2 / (1.01 * c.in_channels * 9)) ** .5
        assert float(c.weight.std()) == pytest.approx(want, rel=.1)
    assert isinstance(kaiming_generalrelu().act3, GeneralRelu) and isinstance(NETS[D]().act3, nn.ReLU)

def test_a_learner_depends_on_its_seed_alone():
    d = digits()
    def weights(net, seed):
        learn = learner(net, d, seed)
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
        return torch.cat([p.detach().flatten() for p in learn.model.parameters()])
    a = weights(K, 0); torch.rand(7)
    assert torch.equal(a, weights(K, 0)) and not torch.equal(a, weights(K, 1))

class Once(Callback):
    def after_batch(self): raise CancelFitException('one batch')

def test_plain_sgd():
    "A step takes lr times the gradient from every weight, and nothing else."
    learn = learner(D, digits(), 0)
    x, y  = next(iter(learn.dls.train))
    learn = learner(D, digits(), 0)                            # the same first batch
    before = [p.detach().clone() for p in learn.model.parameters()]
    nn.CrossEntropyLoss()(learn.model(x), y).backward()
    grads = [p.grad.clone() for p in learn.model.parameters()]
    learn.model.zero_grad()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=Once())
    for b, g, p in zip(before, grads, learn.model.parameters()): assert torch.allclose(p, b - .9 * g, atol=1e-6)


# --- the experiment in small: REFERENCE's bounds ----------------------------------------------------------------------
@pytest.fixture(scope='module')
def small(tmp_path_factory):
    out, text = tmp_path_factory.mktemp('lesson10'), io.StringIO()
    done = run(seeds=2, iters=196, out=out, console=Console(file=text, width=100))
    return done, text.getvalue(), out

def rows(rec, probe, stat, layers):
    return rec[probe, stat][:, [list(rec.layers[probe].layer).index(l) for l in layers]].astype(float)

def test_smaller_sooner_no_at_the_start(small):
    for d, k in zip(*(small[0].records[n] for n in (D, K))):
        ratio = np.exp(np.log(rows(k, 'grad', 'norm', CONVS)[:10] / rows(d, 'grad', 'norm', CONVS)[:10]).mean(0))
        assert (ratio >= 3).all() and np.median(ratio) >= 10
    assert small[0].comparison.cells('first', 'norm').says == 'no'

def test_smaller_later_yes(small):
    r, m = [], []
    for d, k in zip(*(small[0].records[n] for n in (D, K))):
        r.append(np.median(rows(k, 'grad', 'norm', CONVS)[-20:], 0) / np.median(rows(d, 'grad', 'norm', CONVS)[-20:], 0))
        m.append(np.median(abs(rows(k, 'grad', 'mean', CONVS)[-20:]), 0) / np.median(abs(rows(d, 'grad', 'mean', CONVS)[-20:]), 0))
    assert np.max(r) <= .8 and np.median(r) <= .3 and np.median(m) <= .5

def test_per_unit_of_loss_reversed(small):
    r = [rows(k, 'grad', 'per_loss', CONVS).mean(0) / rows(d, 'grad', 'per_loss', CONVS).mean(0)
         for d, k in zip(*(small[0].records[n] for n in (D, K)))]
    assert np.min(r) > 1 and np.median(r) >= 2         # over five seeds at least 3.5: test_all_bounds_over_five_seeds

def test_elasticity_separates(small):
    for d, k in zip(*(small[0].records[n] for n in (D, K))):
        e = {n: np.median(np.median(rows(rec, 'grad', 'elasticity', [*CONVS, 'head.weight'])[:10], 1)) for n, rec in ((D, d), (K, k))}
        assert e[D] <= .05 and e[K] >= .3 and e[K] / e[D] >= 15
        assert np.median(np.median(rows(k, 'grad', 'elasticity', [*CONVS, 'head.weight'])[-20:], 1)) >= 2
    c = small[0].comparison
    assert c.state(D, 'first') == 'starved' and c.state(K, 'last') == 'converged'

def test_exact_zeros_and_activations(small):
    for d, k in zip(*(small[0].records[n] for n in (D, K))):
        assert rows(k, 'grad', 'frac_zero', CONVS).max() == 0 and rows(d, 'grad', 'frac_zero', ['conv4.weight']).mean() >= .1
        assert d['activation', 'std'][0, 3] <= .06 and k['activation', 'std'][0, 3] >= .3

def test_the_median_gradient_is_the_worse_nets_smaller_one(small):
    "More than half of its weight gradients are zeros or next to it."
    r = [rows(k, 'grad', 'abs_median', CONVS[2:]).mean(0) / rows(d, 'grad', 'abs_median', CONVS[2:]).mean(0)
         for d, k in zip(*(small[0].records[n] for n in (D, K)))]
    assert np.min(r) >= 1.3 and np.median(r) >= 4

def test_near_zero_activations(small):
    for d, k in zip(*(small[0].records[n] for n in (D, K))):
        assert (d['activation', 'frac_near_zero'][:, 1:].mean(0) >= .5).all() and (k['activation', 'frac_near_zero'].mean(0) <= .08).all()

@pytest.mark.slow
def test_all_bounds_over_five_seeds(tmp_path, monkeypatch):
    """Where a bound is for each seed, four of five must keep it: in seed 4 the default net is down to a loss
    of .06 at the end, and the two nets' gradients are level in conv1 (.99) and, per unit of loss, in conv4 (.96)."""
    monkeypatch.setattr(lesson10, 'draw', lambda result, out: [])
    done  = run(seeds=5, iters=196, out=tmp_path, console=Console(file=io.StringIO()))
    pairs = list(zip(*(done.records[n] for n in (D, K))))
    four  = lambda held: np.sum(held) >= 4
    last  = lambda rec, stat: np.median(abs(rows(rec, 'grad', stat, CONVS)[-20:]), 0)
    e     = lambda rec, at: np.median(np.median(rows(rec, 'grad', 'elasticity', [*CONVS, 'head.weight'])[at], 1))
    a = np.array([np.exp(np.log(rows(k, 'grad', 'norm', CONVS)[:10] / rows(d, 'grad', 'norm', CONVS)[:10]).mean(0)) for d, k in pairs])
    assert (a >= 3).all() and np.median(a) >= 10
    b = np.array([last(k, 'norm') / last(d, 'norm') for d, k in pairs])
    assert four((b <= .8).all(1)) and np.median(b) <= .3
    m = np.array([last(k, 'mean') / last(d, 'mean') for d, k in pairs])
    assert four(np.median(m, 1) <= .5)
    c = np.array([rows(k, 'grad', 'per_loss', CONVS).mean(0) / rows(d, 'grad', 'per_loss', CONVS).mean(0) for d, k in pairs])
    assert four((c > 1).all(1)) and np.median(c) >= 3.5
    r = np.array([rows(k, 'grad', 'abs_median', CONVS[2:]).mean(0) / rows(d, 'grad', 'abs_median', CONVS[2:]).mean(0) for d, k in pairs])
    assert (r >= 1.3).all() and np.median(r) >= 4
    for d, k in pairs:
        first = slice(0, 10)
        assert e(d, first) <= .05 and e(k, first) >= .3 and e(k, first) / e(d, first) >= 15 and e(k, slice(-20, None)) >= 2
        assert rows(k, 'grad', 'frac_zero', CONVS).max() == 0 and rows(d, 'grad', 'frac_zero', CONVS[3:]).mean() >= .1
        assert (d['activation', 'frac_near_zero'][:, 1:].mean(0) >= .5).all() and (k['activation', 'frac_near_zero'].mean(0) <= .08).all()
        assert k.epochs.accuracy.iloc[-1] >= .93 and d['activation', 'std'][0, 3] <= .06 and k['activation', 'std'][0, 3] >= .3
    assert four([d.iters.loss[20] >= 2 for d, _ in pairs])
    c = done.comparison
    assert c.state(D, 'first') == 'starved' and c.state(K, 'last') == 'converged'

def test_learning(small):
    for d, k in zip(*(small[0].records[n] for n in (D, K))):
        assert k.epochs.accuracy.iloc[-1] >= .93 and d.iters.loss[20] >= 2 and np.isfinite(d.iters.loss).all()
        assert len(k) == 196 and (k.iters.lr == .9).all() and (k.iters.bs == 512).all()

def test_gain_says_who_has_learned(small):
    for d, k in zip(*(small[0].records[n] for n in (D, K))):
        assert d.iters.gain[:10].median() < .02 and k.iters.gain[-20:].median() > 1.5

def test_both_nets_saw_the_same_batches(small):
    for d, k in zip(*(small[0].records[n] for n in (D, K))):
        assert np.array_equal(d['input', 'mean'], k['input', 'mean']) and np.array_equal(d['input', 'std'], k['input', 'std'])
        assert len(np.unique(d['input', 'mean'])) > 150

def test_what_was_printed_and_written(small):
    done, text, out = small
    flat = ' '.join(text.split())
    assert done.comparison.verdict in flat
    for part in ('Are vanishing gradients a sign of good training? Not by themselves', 'What this does not show', 'small_gradients.png',
                 'Iterations 0–9: no', f'{K} ends the better net', 'over 2 seeds', '2 seeds are few'):
        assert part in flat, part
    want = [f'{n}-seed{s}.parquet' for n in NETS for s in range(2)] + ['small_gradients.png', 'comparison.png', 'comparison.csv'] + \
           [f'overview-{n}.png' for n in NETS]
    assert sorted(p.name for p in out.iterdir()) == sorted(want) == sorted(p.name for p in done.files)
    assert Record.load(out / f'{K}-seed1.parquet')['grad', 'norm'].tolist() == done.records[K][1]['grad', 'norm'].tolist()


# --- stopped early ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('whole, partial, says, gone', [
    ((1, 0), (K, 0), 'compared over these 196 iterations', 'not in the table'),
    ((2, 1), (K, 1), 'That run is saved, but not in the table', 'compared over'),
    ((0, 0), (D, 0), 'nothing to compare it with', 'compared over'),
    ((1, 1), None,   'first iteration of a run', 'nothing was recorded'),
    ((0, 0), None,   'nothing was recorded yet', 'Where to look'),
])
def test_report_of_an_interrupted_run(small, monkeypatch, tmp_path, whole, partial, says, gone):
    monkeypatch.setattr(lesson10, 'draw', lambda result, out: [])
    recs    = small[0].records
    records = {n: recs[n][:w] for n, w in zip((D, K), whole)}
    if partial: partial = *partial, recs[partial[0]][partial[1]]
    text = io.StringIO()
    done = report(records, partial, ['x'] * (sum(whole) + bool(partial)), tmp_path, Console(file=text, width=100), interrupted=True)
    flat = ' '.join(text.getvalue().split())
    assert says in flat and gone not in flat and done.interrupted, flat


@pytest.mark.parametrize('kw, says', [
    (dict(seeds=0), '--seeds must be at least 1'), (dict(iters=0), '--iters'), (dict(every=0), '--every'), (dict(bs=0), '--bs'),
    (dict(lr=-1), '--lr must be a positive number'), (dict(lr=float('nan')), '--lr'), (dict(bs=5000), 'exceeds the 4,000 training images'),
    (dict(data='nope'), 'neither')])
def test_bad_arguments(tmp_path, kw, says):
    with pytest.raises(ValueError, match=says): run(**{**dict(out=tmp_path, console=Console(file=io.StringIO())), **kw})
