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
from fastgradstats.lesson10.experiment import learner, report, run
from fastgradstats.lesson10.nets import NETS, conv_net, init_kaiming, kaiming_generalrelu

D, K  = 'default-relu', 'kaiming-generalrelu'
CONVS = [f'conv{i}.weight' for i in range(1, 5)]

pytestmark = pytest.mark.trains


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
    assert torch.allclose(y, (x.clamp_min(0) + lo).clamp_max(hi))
    assert torch.equal(x.grad, ((x > 0) & (x + lo <= hi)).float())
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
    layers = 'conv1', 'conv2', 'conv3', 'conv4', 'head'
    assert [n for n, _ in m.named_parameters()] == [f'{l}.{p}' for l in layers for p in ('weight', 'bias')]
    assert [tuple(p.shape) for p in m.parameters() if p.ndim > 1] == [(8, 1, 5, 5), (16, 8, 3, 3), (32, 16, 3, 3),
                                                                      (32, 32, 3, 3), (10, 32)]
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


# --- the experiment in small -----------------------------------------------------------------------------------------
# At this learning rate the default net is chaotic: when it leaves its plateau, and whether it comes back to it, depends
# on how a processor adds up. So a bound is on the first iterations, on the other net, or on what follows from what
# happened. Beside each stands what was seen over ten seeds; with -m slow medians over five.
@pytest.fixture(scope='module', params=[2, pytest.param(5, marks=pytest.mark.slow)], ids=lambda n: f'{n}seeds')
def small(request, tmp_path_factory):
    out, text = tmp_path_factory.mktemp('lesson10'), io.StringIO()
    done = run(seeds=request.param, iters=196, out=out, console=Console(file=text, width=100))
    return done, text.getvalue(), out

WEIGHTS     = [*CONVS, 'head.weight']
FIRST, LAST = slice(0, 10), slice(-20, None)

def rows(rec, probe, stat, layers=CONVS):
    return abs(rec[probe, stat][:, [list(rec.layers[probe].layer).index(l) for l in layers]].astype(float))

def pairs(small): return list(zip(*(small[0].records[n] for n in (D, K))))

def ratio(d, k, stat, at, layers=CONVS, middle=np.median):
    "The good net's gradients over the default net's, a number a layer."
    return middle(rows(k, 'grad', stat, layers)[at], 0) / middle(rows(d, 'grad', stat, layers)[at], 0)

def learning(small):
    """The pairs in which the default net has left its plateau (loss 2.3), but has not come as far as the other (.015 to
    .035): seven of ten."""
    some = [(d, k) for d, k in pairs(small) if .1 < d.iters.loss[-20:].median() < 1.8]
    assert some or len(pairs(small)) < 5
    return some

def test_smaller_sooner_no_at_the_start(small):
    r = [ratio(d, k, 'norm', FIRST) for d, k in pairs(small)]
    assert np.min(r) >= 3 and np.median(r) >= 6                                    # 6.9 to 62
    c = small[0].comparison.cells('first', 'norm')
    assert c.says == 'no' and c.larger == c.n == 5 * len(r)

def test_smaller_later_if_the_other_has_left_its_plateau(small):
    for d, k in pairs(small):
        first, last = (np.median(rows(k, 'grad', 'norm')[at], 0) for at in (FIRST, LAST))
        assert (last <= .5 * first).all()                                          # .08 to .26
    for stat in ('norm', 'mean'):
        r = [np.median(ratio(d, k, stat, LAST)) for d, k in learning(small)]
        assert all(x < 1 for x in r), (stat, r)                                    # .09 to .31
        if len(r) >= 3: assert np.median(r) < .6, (stat, r)

def test_what_is_said_of_the_end_is_what_happened(small):
    "Whatever that is: counted here, layer by layer and seed by seed."
    c     = small[0].comparison
    gone  = {seed for _, seed in [*c.dead, *c.nonfinite]}
    seeds = [p for s, p in enumerate(pairs(small)) if s not in gone]
    r     = np.array([ratio(d, k, 'norm', LAST, WEIGHTS) for d, k in seeds]).ravel()
    cells = c.cells('last', 'norm')
    assert (cells.smaller, cells.larger, cells.n) == ((r < 1).sum(), (r > 1).sum(), len(r))
    if len(r): assert (cells.says == 'yes') == (r < 1).all() and (cells.says == 'no') == (r > 1).all()
    if len(r): assert f'{cells.smaller} of {len(r)}' in ' '.join(small[1].split())

def test_per_unit_of_loss_reversed(small):
    assert np.min([ratio(d, k, 'per_loss', FIRST) for d, k in pairs(small)]) >= 3  # 9 to 88
    r = [np.median(ratio(d, k, 'per_loss', slice(None), middle=np.mean)) for d, k in learning(small)]
    assert all(x > 1 for x in r), r                                                # 2.7 to 17
    if len(r) >= 3: assert np.median(r) > 1.5

def test_elasticity_separates(small):
    for d, k in pairs(small):
        e = lambda rec, at: np.median(np.median(rows(rec, 'grad', 'elasticity', WEIGHTS)[at], 1))
        assert e(d, FIRST) <= .06 and e(k, FIRST) >= .25                           # .007 to .028, .57 to 1.3
        assert e(k, FIRST) >= 15 * e(d, FIRST)                                     # 38 to 138
        assert e(k, LAST) >= 2                                                     # 9 to 13
    c = small[0].comparison
    assert c.state(D, 'first') == 'starved' and c.state(K, 'last') == 'converged'

def test_exact_zeros_and_activations(small):
    for d, k in pairs(small):
        assert rows(k, 'grad', 'frac_zero').max() == 0
        assert rows(d, 'grad', 'frac_zero')[:, 3].mean() >= .05                    # .30 to .72
        assert d['activation', 'std'][0, 3] <= .06 and k['activation', 'std'][0, 3] >= .3      # .042, .38

def test_the_median_gradient_is_the_worse_nets_smaller_one(small):
    "Where more than half of a layer's gradient is exactly zero its median is zero, which the leaky net's never is."
    for d, k in pairs(small):
        zero, median = rows(d, 'grad', 'frac_zero'), rows(d, 'grad', 'abs_median')
        assert (median[zero > .501] == 0).all() and (median[zero < .499] > 0).all()
        assert rows(k, 'grad', 'abs_median').min() > 0
        assert ratio(d, k, 'abs_median', FIRST)[2:].min() >= 5                     # 17 to 129
    if len(pairs(small)) >= 5:
        r = [ratio(d, k, 'abs_median', slice(None), middle=np.mean)[2:] for d, k in pairs(small)]
        assert np.median(r) >= 4                                                   # 2.2 to 60

def test_near_zero_activations(small):
    for d, k in pairs(small):
        assert d['activation', 'frac_near_zero'][:, 1:].mean() >= .5               # .77 to .89
        assert k['activation', 'frac_near_zero'].mean(0).max() <= .15              # .03 to .06

def test_learning(small):
    for d, k in pairs(small):
        assert k.epochs.accuracy.max() >= .93 and k.iters.loss[LAST].median() < .2             # .955, .015 to .035
        assert d.iters.loss[FIRST].median() >= 2.2 and k.iters.loss[10:20].median() <= 1.8     # 2.29, .6 to 1.1
        assert len(k) == len(d) == 196 and (k.iters.lr == .9).all() and (k.iters.bs == 512).all()

def test_gain_says_who_has_learned(small):
    for d, k in pairs(small):
        assert d.iters.gain[FIRST].median() < .05 and k.iters.gain[LAST].median() > 1.5        # .001 to .011, 2.4

def test_both_nets_saw_the_same_batches(small):
    for d, k in pairs(small):
        for key in (('input', 'mean'), ('input', 'std')): assert np.array_equal(d[key], k[key])
        assert len(np.unique(d['input', 'mean'])) > 150

def test_what_was_printed_and_written(small):
    done, text, out = small
    flat, seeds = ' '.join(text.split()), len(pairs(small))
    assert done.comparison.verdict in flat
    for part in ('Are vanishing gradients a sign of good training? Not by themselves', 'What this does not show',
                 'small_gradients.png', 'Iterations 0–9: no', f'{K} ends', f'over {seeds} seeds'):
        assert part in flat, part
    assert ('seeds are few' in flat) == (seeds < 5)
    want = [*(f'{n}-seed{s}.parquet' for n in NETS for s in range(seeds)), *(f'overview-{n}.png' for n in NETS),
            'small_gradients.png', 'comparison.png', 'comparison.csv']
    assert sorted(p.name for p in out.iterdir()) == sorted(want) == sorted(p.name for p in done.files)
    assert np.array_equal(Record.load(out / f'{K}-seed1.parquet')['grad', 'norm'], done.records[K][1]['grad', 'norm'])


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
    files = ['x'] * (sum(whole) + bool(partial))
    done  = report(records, partial, files, tmp_path, Console(file=text, width=100), interrupted=True)
    flat = ' '.join(text.getvalue().split())
    assert says in flat and gone not in flat and done.interrupted, flat


@pytest.mark.parametrize('kw, says', [
    (dict(seeds=0), '--seeds must be at least 1'), (dict(iters=0), '--iters'), (dict(every=0), '--every'),
    (dict(bs=0), '--bs'), (dict(lr=-1), '--lr must be a positive number'), (dict(lr=float('nan')), '--lr'),
    (dict(bs=5000), 'exceeds the 4,000 training images'), (dict(data='nope'), 'neither')])
def test_bad_arguments(tmp_path, kw, says):
    with pytest.raises(ValueError, match=says): run(**{**dict(out=tmp_path, console=Console(file=io.StringIO())), **kw})
