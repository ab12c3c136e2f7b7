"The placebo: the number, that it changes nothing, and that the record says where it cannot be measured."
import copy
import os
import pickle
import subprocess
import sys
import warnings
from types import SimpleNamespace
from pathlib import Path

import distributed
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from fastai.callback.core import Callback
from fastai.callback.fp16 import AMPMode
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.optimizer import SGD, Adam, Lookahead, OptimWrapper, RAdam
from torch.func import functional_call, vjp
from torch.utils.checkpoint import checkpoint

from fastgradstats import (ActivationHistCallback, DiagnosisCallback, GradStatsCallback, LayerStatsCallback, Record,
                           statistic, watch)
from fastgradstats.lesson10 import data
from fastgradstats.lesson10 import nets as lesson10
from fastgradstats.measure import placebo as ours
from fastgradstats.measure.optimizer_info import describe
from fastgradstats.measure.placebo import EVERY, SIZE, shuffled
from fastgradstats.record.select import weights
from fastgradstats.measure.watcher import Watcher
from modes import EVERY as PROBES
from modes import CpuPrecision, waits
from reference import MODELS, Recurrent, hooks_on, learner, mlp, same_states, seed, states

KEY = 'grad', 'placebo'

def conv():
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 6, 3, stride=2),
                         nn.ReLU(), nn.Flatten(), nn.Linear(54, 3))

class Lstm(Recurrent):
    def __init__(self): super().__init__(); self.drop = nn.Identity()

NETS = dict(mlp=(mlp, (6,)), conv=(conv, (1, 8, 8)), lstm=(Lstm, (5, 3)))

def measured(rec):
    "Whether the placebo was measured.  # (row,)"
    return ~np.isnan(rec[KEY]).all(1)

def train(kind, cbs, fit=lambda learn: learn.fit(2), **kwargs):
    "The Learner, its weights and the random states after a fit, and what was warned of."
    learn = learner(kind, cbs, **kwargs)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        fit(learn)
    return learn, [v.clone() for v in learn.model.state_dict().values()], states(), [str(w.message) for w in told]

def same(a, b): return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


# --- the number ------------------------------------------------------------------------------------------------------
class Own(Callback):
    "An independent reading, in float64 on a copy of the model: by `torch.func.vjp`, or example by example."
    order, run_valid = 9, False
    def __init__(self, every, by='vjp'):
        super().__init__()
        self.ow_every, self.ow_by, self.ow_i, self.ow_rows = every, by, -1, {}
        self.ow_rng = torch.Generator().manual_seed(0)
    def after_loss(self):
        self.ow_i += 1
        if self.ow_i % self.ow_every: return
        y, n    = self.learn.yb[0], len(self.learn.yb[0])
        model   = copy.deepcopy(self.learn.model).double()
        params  = dict(model.named_parameters())
        answer  = lambda ps: functional_call(copy.deepcopy(model), ps, (self.learn.xb[0].double(),))
        pred, f = vjp(answer, params)
        v       = (pred.detach().softmax(1) - F.one_hot(y, pred.shape[1])) / n        # of the mean cross-entropy
        u       = v[torch.randperm(n, generator=self.ow_rng)]
        u       = u - u.mean(0)
        if self.ow_by == 'vjp': js = f(u)[0]
        else:
            js = {k: torch.zeros_like(p) for k, p in params.items()}
            for i in range(n):
                out = model(self.learn.xb[0][i:i + 1].double())[0]
                for k, g in zip(js, torch.autograd.grad(out @ u[i], list(params.values()))): js[k] += g
        self.ow_rows[self.ow_i] = {k: float(js[k].norm() * p.norm() / u.norm()) for k, p in params.items()}

@pytest.mark.parametrize('kind, by', [('mlp', 'vjp'), ('mlp', 'loop'), ('conv', 'vjp'), ('lstm', 'vjp')])
def test_it_equals_an_independent_reading_in_float64(kind, by):
    own   = Own(3, by)
    learn = train(NETS[kind], [own, GradStatsCallback(placebo=3)])[0]
    rec   = learn.layer_stats
    got, names, shapes = rec[KEY], rec.layers['grad'].layer, rec.layers['grad']['shape']
    assert got.shape == rec['grad', 'norm'].shape == (10, len(names)) and own.ow_i == 9
    assert np.nonzero(measured(rec))[0].tolist() == [0, 3, 6, 9] == list(own.ow_rows)
    some = 0
    for k, want in own.ow_rows.items():
        for j, (n, s) in enumerate(zip(names, shapes)):
            if 'x' in s: np.testing.assert_allclose(got[k, j], want[n], rtol=1e-4); some += 1
            else:        assert np.isnan(got[k, j]), n
    assert some == 4 * len(weights(rec))

def test_shuffled():
    v = torch.randn(7, 3, 4, generator=torch.Generator().manual_seed(0)) * 1e-30 + 1e-30
    u = shuffled(v, torch.arange(6, -1, -1))
    w = (v.double() - v.double().mean(0)).flip(0)
    torch.testing.assert_close(u.double(), w * SIZE / w.norm(), rtol=1e-5, atol=1e-5)
    assert u.mean(0).abs().max() < 1e-5 and abs(float(u.norm()) - SIZE) < 1e-4
    assert shuffled(torch.ones(4, 2), torch.arange(4)).isnan().all()                # nothing is left: not measured

def values(model, x, y, n=1, scale=1., times=20):
    "Readings of one batch, each with its own shuffle.  # (reading, weight)"
    class Part: last = 0
    class Row:  measured, parts, about = True, [], (0, 0, 0.)
    class Log:
        ignored = {}
        def ignore(self, name, why): raise AssertionError(why)
    class Host:
        row, part, builder = Row(), Part(), Log()
        hooks, parameters  = SimpleNamespace(scale=None), SimpleNamespace(all=list(enumerate(model.parameters())))
        def suspend(self): return 0
        def resume(self, mode): pass
    dose, host, out = ours.Placebo(1), Host(), []
    for _ in range(times):
        pred = model(x.repeat(n, *[1] * (x.dim() - 1)))
        dose(host, model, pred, F.cross_entropy(pred, y.repeat(n)) * scale)
        out.append(host.row.placebo[1].numpy())
    return np.array(out)

@pytest.mark.parametrize('net', lesson10.NETS)
def test_neither_the_losss_scale_nor_the_batch_size_matters(net):
    seed()
    model, d = lesson10.NETS[net](), data.load('digits')
    x, y = d.x_train[::40], d.y_train[::40]
    once = values(model, x, y)
    for scale in (1000., 1e-20, 1e20): np.testing.assert_allclose(values(model, x, y, scale=scale, times=2), once[:2], rtol=1e-4)
    np.testing.assert_allclose(values(model, x, y, 2).mean(0), once.mean(0), rtol=.12)
    np.testing.assert_allclose(values(model, x[::4], y[::4], times=40).mean(0), once.mean(0), rtol=.25)

def deep_sigmoid():
    return nn.Sequential(nn.Flatten(), *[l for k in range(7) for l in (nn.Linear(784 if not k else 32, 32), nn.Sigmoid())],
                         nn.Linear(32, 10))

def test_it_tells_what_is_starved_from_what_is_live():
    "The thresholds of the trial that it comes from: starved at most .33, live at least about 5; here the median layer."
    d = data.load('digits')
    x, y = d.x_train[::8], d.y_train[::8]
    median = lambda model: np.median(values(model, x, y, times=3), axis=1)
    for s in range(2):
        seed(s)
        assert (median(lesson10.default_relu()) < .33).all()
        assert (median(lesson10.kaiming_generalrelu()) > 3.5).all()
        assert (median(deep_sigmoid()) < 1e-3).all()

@pytest.mark.parametrize('smoothing', [0., .1])
def test_a_converged_net_is_live_also_where_the_loss_has_a_floor(smoothing):
    seed()
    d = data.load('digits')
    x, y  = d.x_train[::40].flatten(1), d.y_train[::40]
    model = nn.Sequential(nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))
    opt   = torch.optim.Adam(model.parameters(), lr=1e-2)
    with watch(model, opt, placebo=50, grad='norm', activation=None, update=None) as w:
        for i in range(201):
            w.loss(F.cross_entropy(model(x), y, label_smoothing=smoothing)).backward()
            opt.step(); opt.zero_grad()
    rec  = w.record
    cols = [list(rec.layers['grad'].layer).index(n) for n in weights(rec)]
    assert (model(x).argmax(1) == y).all() and np.nonzero(measured(rec))[0].tolist() == [0, 50, 100, 150, 200]
    assert (rec[KEY][measured(rec)][:, cols] > 2).all()
    if smoothing: assert np.median(rec['grad', 'elasticity'][-20:][:, cols]) < .15         # alone it would mislead

def test_sparse_gradients_are_read_as_dense_ones():
    def net(sparse):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.emb, self.head = nn.Embedding(20, 4, sparse=sparse), nn.Linear(4, 3)
            def forward(self, x): return self.head(self.emb(x).mean(1))
        return Net()
    got = []
    for sparse in (True, False):
        seed()
        model = net(sparse)
        got.append(values(model, torch.randint(20, (16, 5)), torch.randint(3, (16,)), times=2))
    np.testing.assert_allclose(*got, rtol=1e-5)

def test_answers_of_several_dimensions_are_shuffled_over_the_first():
    class Each(nn.Module):
        def forward(self, p, y): return F.cross_entropy(p.flatten(0, 1), y[:, None].expand(-1, p.shape[1]).flatten())
    model = lambda: nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))
    rec   = train((model, (5, 3)), GradStatsCallback(placebo=1), loss_func=Each())[0].layer_stats
    assert measured(rec).all() and np.isfinite(rec[KEY][:, [0, 2]]).all()


# --- when ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('given, every, want', [(True, 1, [0, 25, 50]), (25, 1, [0, 25, 50]), (7, 1, list(range(0, 60, 7))),
                                                (4, 3, list(range(0, 60, 12))), (10, lambda i: i > 20, [21, 31, 41, 51])])
def test_every_how_many_measured_rows(given, every, want):
    rec = train('mlp', GradStatsCallback(placebo=given, every=every), lambda learn: (learn.fit(6), learn.fit(6)))[0].layer_stats
    assert np.nonzero(measured(rec))[0].tolist() == want
    assert rec.meta['config']['placebo'] == (EVERY if given is True else given)

def test_off_by_default_and_at_no_cost(monkeypatch):
    def never(*args, **kwargs): raise AssertionError('it is off')
    monkeypatch.setattr(ours.Placebo, '__call__', never)
    monkeypatch.setattr(torch.autograd, 'grad', never)
    for cb in (LayerStatsCallback(verbose=False), GradStatsCallback(placebo=False)):
        rec = train('mlp', cb)[0].layer_stats
        assert KEY not in rec and rec.meta['config']['placebo'] == 0
        with pytest.raises(KeyError, match=r'LayerStatsCallback\(placebo=True\)'): rec[KEY]
    assert Watcher(cb.layer_plan).dose is None

@pytest.mark.parametrize('wrong', [-1, 2.5, 'yes', None, [25]])
def test_wrong_arguments(wrong):
    with pytest.raises(ValueError, match='placebo is True'): LayerStatsCallback(placebo=wrong)
    with pytest.raises(ValueError, match='placebo is True'):
        with watch(mlp(), torch.optim.SGD(mlp().parameters(), lr=.1), placebo=wrong): pass

def test_it_needs_the_probe_and_the_name():
    with pytest.raises(ValueError, match='beside the statistics of `grad`'): ActivationHistCallback(placebo=True)
    with pytest.raises(ValueError, match='another name'): GradStatsCallback(grad=statistic(torch.mean, name='placebo'))
    assert DiagnosisCallback(placebo=True).layer_plan.placebo == EVERY

def test_it_is_copied_and_pickled_with_the_plan():
    plan = pickle.loads(pickle.dumps(GradStatsCallback(placebo=7).layer_plan))
    assert plan.placebo == 7 and copy.deepcopy(plan).placebo == 7


# --- training is not changed -----------------------------------------------------------------------------------------
@pytest.mark.parametrize('kind', MODELS)
def test_weights_random_states_and_everything_else_recorded_are_identical(kind):
    "The MLP, a CNN with dropout and batch norm, an LSTM with dropout, a transformer; our own hooks count nothing twice."
    fit = lambda learn: (learn.fit_one_cycle(2), learn.validate(), learn.fit(1))
    _, bare, after, _        = train(kind, None, fit)
    a, without, _, _         = train(kind, LayerStatsCallback(verbose=False, **PROBES), fit)
    b, with_it, then, told   = train(kind, LayerStatsCallback(verbose=False, placebo=1, **PROBES), fit)
    assert same(bare, with_it) and same_states(after, then) and not hooks_on(b.model)
    a, b = a.layer_stats, b.layer_stats
    assert measured(b).all() and 'placebo' not in b.meta['not_hooked']
    assert set(b.keys()) == {*a.keys(), KEY}
    for k in a.keys(): assert np.array_equal(a[k], b[k], equal_nan=True), k
    for c in a.iters.columns.drop('elapsed'): assert a.iters[c].equals(b.iters[c]), c
    assert a.units.equals(b.units)

def test_gradients_of_parameters_are_left_alone():
    seen = []
    grads = lambda learn: [None if p.grad is None else p.grad.clone() for p in learn.model.parameters()]
    class Before(Callback):
        order = 10
        def after_loss(self): seen.append(grads(self.learn))
    class After(Callback):
        order = 11
        def after_loss(self): seen.append(grads(self.learn))
    class Half(Callback):                                        # some gradients are there, others are None
        def before_batch(self):
            for p in list(self.learn.model.parameters())[::2]: p.grad = torch.full_like(p, 3.)
    train('mlp', [Half(), Before(), After(), GradStatsCallback(placebo=1)])
    for a, b in zip(seen[::2], seen[1::2]):
        assert all((x is None) == (y is None) and (x is None or torch.equal(x, y)) for x, y in zip(a, b))
    assert any(x is None for x in seen[0]) and any(x is not None for x in seen[0])

def test_between_flushes_nothing_waits_for_the_device(monkeypatch):
    without, _   = waits(monkeypatch, GradStatsCallback())
    with_, learn = waits(monkeypatch, GradStatsCallback(placebo=1))
    assert with_ == without and measured(learn.layer_stats).all()

class Blocks(nn.Module):
    "A part under a checkpoint that keeps no random state, with batch norm and dropout."
    def __init__(self, reentrant=False):
        super().__init__()
        self.up, self.body = nn.Linear(6, 8), nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(.3))
        self.head, self.reentrant, self.ran = nn.Linear(8, 3), reentrant, 0
    def forward(self, x):
        return self.head(checkpoint(self.body, self.up(x), use_reentrant=self.reentrant, preserve_rng_state=False))

def test_a_checkpoint_that_runs_again_keeps_random_states_and_buffers():
    _, bare, after, _       = train((Blocks, (6,)), None)
    learn, seen, then, told = train((Blocks, (6,)), LayerStatsCallback(verbose=False, placebo=1, **PROBES))
    assert same(bare, seen) and same_states(after, then)
    assert measured(learn.layer_stats).all()


# --- hooks of the user's ---------------------------------------------------------------------------------------------
def test_hooks_of_parameters_and_of_the_answer_do_not_see_it():
    def run(cbs):
        calls = []
        class Hooks(Callback):
            def before_fit(self):
                for p in self.learn.model.parameters(): p.register_hook(lambda g: calls.append(1) or g * .9)
                ps = list(self.learn.model.parameters())
                torch.autograd.graph.register_multi_grad_hook(ps, lambda gs: calls.append(10))
                ps[0].register_post_accumulate_grad_hook(lambda p: calls.append(100))
            def after_pred(self):
                if not self.learn.training: return
                self.learn.pred.register_hook(lambda g: calls.append(1000))
                self.learn.pred.retain_grad()
            def after_loss(self):
                if self.learn.training: self.learn.loss_grad.register_hook(lambda g: calls.append(10000))
            def after_backward(self): calls.append(self.learn.pred.grad.abs().sum().item())
        _, seen, *_ = train('mlp', [Hooks(), *cbs])
        return calls, seen
    (calls, bare), (then, seen) = run([]), run([GradStatsCallback(placebo=1)])
    assert calls == then and len(calls) == 10 * (6 + 1 + 1 + 1 + 1 + 1) and same(bare, seen)

@pytest.mark.parametrize('how', ['full', 'pre', 'global'])
def test_backward_hooks_of_modules_are_not_called_for_it(how):
    def run(cbs):
        calls, handles = [], []
        class Hooks(Callback):
            def before_fit(self):
                m = self.learn.model[2]
                handles.append(m.register_full_backward_hook(lambda *a: calls.append(1)) if how == 'full' else
                               m.register_full_backward_pre_hook(lambda *a: calls.append(1)) if how == 'pre' else
                               nn.modules.module.register_module_full_backward_hook(lambda *a: calls.append(1)))
            def after_fit(self): handles[0].remove()
        learn, *_, told = train('mlp', [Hooks(), *cbs])
        return calls, learn, told
    (calls, _, _), (then, learn, told) = run([]), run([GradStatsCallback(placebo=1)])
    assert calls == then and calls
    assert_refused(learn.layer_stats, told, 'modules have backward hooks')

def test_a_hook_on_a_tensor_within_the_model_sees_it_as_documented():
    calls = []
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.body, self.head = nn.Linear(6, 4), nn.Linear(4, 3)
        def forward(self, x):
            h = self.body(x)
            if h.requires_grad: h.register_hook(lambda g: calls.append(1))
            return self.head(h)
    train((Net, (6,)), GradStatsCallback(placebo=5))
    assert len(calls) == 10 + 2 and 'cannot be seen' in ours.__doc__


# --- where it cannot be done -----------------------------------------------------------------------------------------
def assert_refused(rec, told, why):
    "Nothing measured, named once in the record, in its repr and in a warning."
    assert not measured(rec).any() and why in rec.meta['not_hooked']['placebo'], rec.meta['not_hooked']
    assert why in repr(rec) and sum('placebo' in t for t in told) == 1, told
    assert rec['grad', 'norm'].shape == rec[KEY].shape and np.isfinite(rec['grad', 'norm']).any(1).all()

class Two(nn.Module):
    def __init__(self): super().__init__(); self.body = mlp()
    def forward(self, x): return self.body(x), x

class Negative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return -x
    @staticmethod
    def backward(ctx, g): return -g

class Custom(Two):
    def forward(self, x): return Negative.apply(self.body(x))

class Compiled(Two):
    def __init__(self): super().__init__(); self.body = torch.compile(self.body, backend='aot_eager')
    def forward(self, x): return self.body(x)

class PartCompiled(Two):
    def __init__(self): super().__init__(); self.f = torch.compile(lambda x: x * 2., backend='aot_eager')
    def forward(self, x): return self.f(self.body(x))

class Detached(Two):
    def forward(self, x): return self.body(x).detach()

class Vector(nn.Module):
    def __init__(self): super().__init__(); self.w, self.b = nn.Parameter(torch.ones(6)), nn.Parameter(torch.zeros(3))
    def forward(self, x): return (x * self.w)[:, :3] + self.b

ce = nn.CrossEntropyLoss()
REFUSED = {'answer is no float tensor but tuple': (Two, lambda p, y: ce(p[0], y)),
           'Negative is an autograd function': (Custom, ce),
           'a reentrant checkpoint': (lambda: Blocks(True), ce),
           'the model is compiled': (Compiled, ce),
           'a part of the model is compiled': (PartCompiled, ce),
           'no weight of two or more dimensions': (Vector, ce)}

@pytest.mark.parametrize('why', REFUSED)
def test_where_it_cannot_be_done_the_record_says_so_and_training_goes_on(why):
    model, loss = REFUSED[why]
    net = model
    if 'tuple' in why:
        def net():
            torch.manual_seed(0)
            return model()
    fit = lambda learn: learn.fit(2)
    make = lambda cbs: train((net, (6,)), cbs, fit, loss_func=lambda p, y: loss(p, y))
    _, bare, after, _       = make(None)
    learn, seen, then, told = make(GradStatsCallback(placebo=1))
    assert same(bare, seen) and same_states(after, then)
    assert_refused(learn.layer_stats, told, why)

def loop(step, model=None, n=6, **kwargs):
    "A plain loop; its record, what was warned of, and the weights."
    seed()
    model = model or mlp()
    opt   = torch.optim.SGD(model.parameters(), lr=.1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        with watch(model, opt, **{**dict(placebo=2), **kwargs}) as w:
            for i in range(n): step(w, model, opt, torch.randn(8, 6), torch.randint(3, (8,)))
    return w.record, [str(t.message) for t in told], [p.detach().clone() for p in model.parameters()]

def freed(w, model, opt, x, y):
    loss = ce(model(x), y)
    loss.backward()
    w.loss(loss)
    opt.step(); opt.zero_grad()

def in_place(w, model, opt, x, y):
    pred = model(x)
    e    = pred.exp()
    loss = e.sum()
    e.mul_(2)                                     # what exp has saved
    w.loss(loss)
    ce(pred, y).backward()
    opt.step(); opt.zero_grad()

def apart(w, model, opt, x, y):
    pred = model(x)
    w.loss(sum((p ** 2).sum() for p in model.parameters()))
    ce(pred, y).backward()
    opt.step(); opt.zero_grad()

def detached(w, model, opt, x, y):
    with torch.no_grad(): first = model[0](x)
    pred = model(x)
    w.loss(float(ce(pred, y)) + 0 * first.sum())
    ce(pred, y).backward()
    opt.step(); opt.zero_grad()

@pytest.mark.parametrize('step, why', [(freed, 'second time'), (in_place, 'inplace operation'), (apart, 'does not depend'),
                                       (detached, 'the loss needs no gradient')])
def test_in_a_plain_loop_too(step, why):
    rec, told, seen = loop(step)
    assert_refused(rec, told, why)
    assert same(seen, loop(step, placebo=False)[2])

def test_an_answer_that_needs_no_gradient():
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.body = nn.Linear(6, 3)
        def forward(self, x): return self.body(x).detach()
    def step(w, model, opt, x, y):
        w.loss(ce(model(x), y) + (model.body.weight ** 2).sum()).backward()
        opt.step(); opt.zero_grad()
    rec, told, _ = loop(step, Net())
    assert 'needs no gradient' in rec.meta['not_hooked']['placebo'] and not measured(rec).any()

def test_an_error_in_the_second_pass_ends_nothing(monkeypatch):
    def out_of_memory(*args, **kwargs): raise torch.OutOfMemoryError('CUDA out of memory.\nmore')
    monkeypatch.setattr(torch.autograd, 'grad', out_of_memory)
    bare = train('cnn', None)[1]
    learn, seen, _, told = train('cnn', GradStatsCallback(placebo=1))
    assert same(bare, seen)
    assert_refused(learn.layer_stats, told, 'OutOfMemoryError: CUDA out of memory.')

def test_an_error_leaves_hooks_buffers_and_random_states_as_they_were():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.norm, self.head, self.ran = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3), 0
        def part(self, x):
            self.ran += 1
            x = self.norm(x)
            torch.rand(3); np.random.rand()
            if self.ran % 3 == 2: raise ValueError('not again')                     # the placebo's run of every batch
            return F.dropout(x, .5)
        def forward(self, x): return self.head(checkpoint(self.part, self.up(x), use_reentrant=False))
    hits = []
    class Hooks(Callback):
        def before_fit(self): self.learn.model.up.weight.register_hook(lambda g: hits.append(1))
    learn, *_ = train((Broken, (6,)), [Hooks(), GradStatsCallback(placebo=1, every=1)], lambda learn: learn.fit(1), n=8)
    assert 'not again' in learn.layer_stats.meta['not_hooked']['placebo'] and len(hits) == 1
    assert int(learn.model.norm.num_batches_tracked) == 2                           # forward and the true backward pass

def test_a_batch_of_one_example_is_not_measured_but_the_next_is():
    rec = train('mlp', GradStatsCallback(placebo=1), bs=1, n=4)[0].layer_stats
    assert 'one example' in rec.meta['not_hooked']['placebo'] and not measured(rec).any()
    class Shrink(Callback):
        order = -50
        def before_batch(self):
            if self.learn.iter == 0: self.learn.xb, self.learn.yb = (self.learn.xb[0][:1],), (self.learn.yb[0][:1],)
    rec = train('mlp', [Shrink(), GradStatsCallback(placebo=1)])[0].layer_stats
    assert measured(rec).tolist() == [False, True, True, True, True] * 2 and 'placebo' not in rec.meta['not_hooked']

def test_a_loss_that_is_not_finite_is_not_measured():
    class Blow(Callback):
        run_valid = False
        def after_loss(self):
            if self.learn.iter == 1: self.learn.loss_grad = self.learn.loss_grad * np.inf
    rec = train('mlp', [Blow(), GradStatsCallback(placebo=1)], lambda learn: learn.fit(1))[0].layer_stats
    assert measured(rec)[:2].tolist() == [True, False]

def test_what_was_refused_is_tried_again_in_the_next_epoch():
    class Hooks(Callback):
        def before_epoch(self):
            if self.learn.epoch == 0: self.hk_handle = self.learn.model[0].register_full_backward_hook(lambda *a: None)
            else: self.hk_handle.remove()
    rec = train('mlp', [Hooks(), GradStatsCallback(placebo=1)])[0].layer_stats
    assert measured(rec).tolist() == [False] * 5 + [True] * 5 and 'placebo' not in rec.meta['not_hooked']

def test_functions_that_wait_for_other_processes():
    from torch.nn.modules._functions import SyncBatchNorm
    class Gather: __module__ = 'torch.distributed.nn.functional'
    assert 'waits for other processes' in ours._not_twice(SyncBatchNorm)
    assert 'waits for other processes' in ours._not_twice(Gather)


# --- in every way that people train ----------------------------------------------------------------------------------
def first(cbs, kind='cnn', **kwargs):
    "What the first row's placebo is."
    learn, _, _, told = train(kind, [*cbs, GradStatsCallback(placebo=1)], **kwargs)
    assert measured(learn.layer_stats).all() and not told, told
    return learn.layer_stats[KEY]

def test_mixed_precision_and_its_loss_scale():
    want = first([])[0]
    amp  = [first([CpuPrecision(AMPMode.FP16, init_scale=2. ** k)])[0] for k in (3, 14)]
    np.testing.assert_array_equal(*amp)
    np.testing.assert_allclose(amp[0], want, rtol=.05)
    np.testing.assert_allclose(first([CpuPrecision(AMPMode.BF16)])[0], want, rtol=.1)

@pytest.mark.parametrize('inside', [True, False])
def test_mixed_precision_in_a_plain_loop(inside):
    def run(half, scale):
        scaler = torch.amp.GradScaler('cpu', init_scale=scale, enabled=half)
        def step(w, model, opt, x, y):
            with torch.autocast('cpu', dtype=torch.float16, enabled=half):
                loss = ce(model(x), y)
                if inside: w.loss(loss)
            if not inside: w.loss(loss)
            scaler.scale(loss).backward()
            scaler.step(opt); scaler.update(); opt.zero_grad()
        return loop(step, scaler=scaler)
    (want, _, _), (a, told, _), (b, _, _) = run(False, 1.), run(True, 2.), run(True, 4096.)
    assert np.nonzero(measured(a))[0].tolist() == [0, 2, 4] and not told
    np.testing.assert_allclose(a[KEY][0], b[KEY][0], rtol=.02)
    np.testing.assert_allclose(a[KEY][0], want[KEY][0], rtol=.02)

def test_accumulation_reads_the_first_micro_batch():
    want  = first([])
    learn = train('cnn', [GradientAccumulation(16), GradStatsCallback(placebo=1)])[0]
    rec   = learn.layer_stats
    assert rec.iters.n_accum.max() == 2 and measured(rec).all()
    np.testing.assert_array_equal(rec[KEY][0], want[0])
    second = first([], fit=lambda learn: learn.fit(1))[1]
    assert not np.allclose(rec[KEY][0], second, rtol=1e-3, equal_nan=True)
    bare = train('cnn', GradientAccumulation(16))[1]
    assert same(bare, list(learn.model.state_dict().values()))

def test_accumulation_in_a_plain_loop():
    n = [0]
    def step(w, model, opt, x, y):
        w.loss(ce(model(x), y)).backward()
        n[0] += 1
        if n[0] % 3 == 0: opt.step(); opt.zero_grad()
    rec, told, seen = loop(step, n=12)
    assert rec.iters.n_accum.tolist() == [3] * 4 and np.nonzero(measured(rec))[0].tolist() == [0, 2] and not told
    n[0] = 0
    assert same(seen, loop(step, n=12, placebo=False)[2])

def test_clipping_does_not_matter():
    np.testing.assert_array_equal(first([GradientClip(1e-3)])[0], first([])[0])

def test_frozen_layers_are_nan_and_measured_when_unfrozen():
    split = lambda m: [list(m[:4].parameters()), list(m[4:].parameters())]
    rec   = train('mlp', GradStatsCallback(placebo=1), lambda learn: (learn.freeze(), learn.fit(1), learn.unfreeze(),
                                                                       learn.fit(1)), splitter=split)[0].layer_stats
    got   = dict(zip(rec.layers['grad'].layer, np.isfinite(rec[KEY]).T.tolist()))
    assert got['4.weight'] == [True] * 10 and got['0.weight'] == [False] * 5 + [True] * 5 and not any(got['4.bias'])

def test_a_branch_that_is_not_used_is_nan():
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.body, self.side = mlp(), nn.Linear(6, 3)
        def forward(self, x): return self.body(x)
    rec = train((Net, (6,)), GradStatsCallback(placebo=1))[0].layer_stats
    j   = list(rec.layers['grad'].layer).index('side.weight')
    assert measured(rec).all() and np.isnan(rec[KEY][:, j]).all()

def test_a_plain_loop():
    def step(w, model, opt, x, y):
        w.loss(ce(model(x), y)).backward()
        opt.step(); opt.zero_grad()
    rec, told, seen = loop(step, n=7, grad_output=['norm', 'hist'])
    also, _, bare   = loop(step, n=7, grad_output=['norm', 'hist'], placebo=False)
    assert np.nonzero(measured(rec))[0].tolist() == [0, 2, 4, 6] and not told and same(seen, bare)
    for k in also.keys(): assert np.array_equal(also[k], rec[k], equal_nan=True), k

def test_a_plain_loop_keeps_no_answer_alive():
    kept = []
    def step(w, model, opt, x, y):
        pred = model(x)
        kept.append(w)
        ce(pred, y).backward()                                       # `w.loss` is never called
        opt.step(); opt.zero_grad()
    rec, *_ = loop(step)
    assert kept[0].pred is None and not measured(rec).any()

def test_one_process_of_ddp_exchanges_its_gradients_once(tmp_path):
    "The reducer is not triggered: as many exchanges, in the backward pass only, and the same weights."
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel as DDP
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/meet', rank=0, world_size=1)
    try:
        def run(placebo, **kwargs):
            seed()
            model, calls = DDP(mlp(), **kwargs), []
            def exchange(state, bucket):
                calls.append('exchange')
                done = torch.futures.Future()
                done.set_result(bucket.buffer())
                return done
            model.register_comm_hook(None, exchange)
            opt = torch.optim.SGD(model.parameters(), lr=.1)
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter('always')
                with watch(model, opt, placebo=placebo) as w:
                    for _ in range(4):
                        loss = w.loss(ce(model(torch.randn(8, 6)), torch.randint(3, (8,))))
                        calls.append('backward')
                        loss.backward()
                        opt.step(); opt.zero_grad()
            return w.record, calls, [p.detach().clone() for p in model.parameters()], [str(t.message) for t in told]
        for kwargs in ({}, dict(find_unused_parameters=True), dict(gradient_as_bucket_view=True), dict(static_graph=True)):
            _, calls, bare, _      = run(False, **kwargs)
            rec, then, seen, told  = run(1, **kwargs)
            assert calls == then and same(bare, seen) and calls[:2] == ['backward', 'exchange'], kwargs
            if 'static_graph' in kwargs: assert_refused(rec, [t for t in told if 'placebo' in t], 'static_graph')
            else: assert measured(rec).all()
    finally: dist.destroy_process_group()

def test_two_processes(tmp_path):
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore', 'CUDA_VISIBLE_DEVICES': ''}
    subprocess.run([sys.executable, str(Path(distributed.__file__)), str(tmp_path), 'plain', 'placebo'], env=env,
                   timeout=200, check=True, capture_output=True)
    saw  = {n: pickle.loads((tmp_path/f'{n}.0.pkl').read_bytes()) for n in ('plain', 'placebo')}
    recs = {n: Record.load(tmp_path/f'{n}.parquet') for n in saw}
    assert saw['placebo']['error'] is None
    for k, v in saw['plain']['weights'].items(): assert np.array_equal(saw['placebo']['weights'][k], v), k
    for k in recs['plain'].keys(): assert np.array_equal(recs['plain'][k], recs['placebo'][k], equal_nan=True), k
    rows = np.nonzero(measured(recs['placebo']))[0]
    assert rows.tolist() == list(range(0, len(recs['placebo']), 2))


# --- the record ------------------------------------------------------------------------------------------------------
def test_saved_loaded_joined_framed_and_shown(tmp_path):
    learn = train('mlp', [GradStatsCallback(placebo=4), ActivationHistCallback()], lambda learn: learn.fit(3))[0]
    rec   = learn.layer_stats                                        # joined of two callbacks
    rows  = [0, 4, 8, 12]
    assert np.nonzero(measured(rec))[0].tolist() == rows
    back  = Record.load(rec.save(tmp_path/'run.parquet'))
    assert back == rec and np.array_equal(back[KEY], rec[KEY], equal_nan=True) and back.meta == rec.meta
    f = rec.frame(KEY)
    assert sorted(set(f.iter)) == rows and sorted(set(f.layer)) == ['0.weight', '2.weight', '4.weight'] and len(f) == 12
    assert np.isfinite(f.placebo).all() and (f.probe == 'grad').all()
    whole = rec.frame()
    assert whole.placebo.notna().sum() == 12 and whole.norm.notna().sum() > 12
    assert 'placebo' in repr(rec) and rec.meta['units']['placebo']
    assert KEY in rec and KEY in rec.keys() and not rec[KEY].flags.writeable

def test_join_of_records_with_and_without():
    a = train('mlp', GradStatsCallback(placebo=1), lambda learn: learn.fit(1))[0].layer_stats
    b = train('mlp', GradStatsCallback(), lambda learn: learn.fit(2))[0].layer_stats
    for rec in (a.join(b), b.join(a)):
        assert measured(rec).tolist() == [True] * 5 + [False] * 5
        np.testing.assert_array_equal(rec[KEY][:5], a[KEY])

def test_a_long_run_is_flushed_in_between():
    rec = train('mlp', GradStatsCallback(placebo=True), lambda learn: learn.fit(31))[0].layer_stats
    assert np.nonzero(measured(rec))[0].tolist() == list(range(0, 155, 25))


# --- the optimizer ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('opt, want', [
    (Adam,                                  dict(name='Adam', wd=.01, decoupled=True, eps=1e-5)),
    (lambda p, lr: Adam(p, lr, decouple_wd=False, wd=.1, eps=1e-3), dict(name='Adam', wd=.1, decoupled=False, eps=1e-3)),
    (lambda p, lr: SGD(p, lr, mom=.9),      dict(name='SGD', wd=0., decoupled=True, eps=None)),
    (lambda p, lr: Lookahead(RAdam(p, lr)), dict(name='Lookahead(RAdam)', wd=0., decoupled=True, eps=1e-5)),
    (lambda p, lr: OptimWrapper(p, torch.optim.AdamW, lr=lr), dict(name='AdamW', wd=.01, decoupled=True, eps=1e-8)),
    (lambda p, lr: OptimWrapper(p, torch.optim.Adam, lr=lr, weight_decay=.2),
                                            dict(name='Adam', wd=.2, decoupled=False, eps=1e-8)),
])
def test_the_optimizer_is_in_the_record(opt, want):
    rec = train('mlp', GradStatsCallback, opt_func=opt)[0].layer_stats
    assert rec.meta['optimizer'] == want

def test_the_weight_decay_of_a_fit_is_the_one_recorded():
    rec = train('mlp', GradStatsCallback, lambda learn: learn.fit(1, wd=.3), opt_func=Adam)[0].layer_stats
    assert rec.meta['optimizer']['wd'] == .3

def test_torch_optimizers_and_groups_that_differ():
    a, b = mlp(), mlp()
    groups = [dict(params=a.parameters(), weight_decay=.1), dict(params=b.parameters(), weight_decay=0.)]
    assert describe(torch.optim.AdamW(groups, eps=1e-6)) == dict(name='AdamW', wd=[.1, 0.], decoupled=True, eps=1e-6)
    assert describe(torch.optim.SGD(a.parameters(), lr=.1)) == dict(name='SGD', wd=0., decoupled=False, eps=None)
    assert describe(torch.optim.NAdam(a.parameters(), decoupled_weight_decay=True))['decoupled'] is True
    class Lion(torch.optim.SGD): pass
    Lion.__module__ = 'lion'
    assert describe(Lion(a.parameters(), lr=.1, weight_decay=.1)) == dict(name='Lion', wd=.1, decoupled=None, eps=None)
    def step(w, model, opt, x, y):
        w.loss(ce(model(x), y)).backward()
        opt.step(); opt.zero_grad()
    assert loop(step)[0].meta['optimizer'] == dict(name='SGD', wd=0., decoupled=False, eps=None)
