"instrument(): what trains in a process is recorded, as `watch` and the callbacks do, and not changed."
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastgradstats import LayerStatsCallback, instrument, statistic, watch
from reference import learner


@pytest.fixture
def on():
    ins = instrument()
    yield ins
    ins.off()
    from torch.nn.modules import module
    from torch.optim import optimizer
    assert not (module._global_forward_hooks or module._global_forward_pre_hooks or optimizer._global_optimizer_pre_hooks)
    assert type(vars(torch.Tensor)['backward']).__name__ == 'function'

def batches(n=30, seed=5):
    g = torch.Generator().manual_seed(seed)
    return list(zip(torch.randn(n, 10, 4, generator=g), torch.randint(0, 3, (n, 10), generator=g)))

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

class OwnCall(nn.Module):
    "A model that is called, but not as torch's modules are."
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(net())
    def __call__(self, x):
        for l in self.layers: x = l(x)
        return x

class OwnOptimizer:
    def __init__(self, params, lr): self.params, self.lr = list(params), lr
    def step(self):
        with torch.no_grad():
            for p in self.params: p -= self.lr * p.grad
    def zero_grad(self):
        for p in self.params: p.grad.data.zero_()

def by_hand(params, lr=.1):
    for p in params:
        p.data -= lr * p.grad
        p.grad = None

def truth(model, lr=.1):
    "A plain reading of the loop that steps by hand: losses, norms of gradients and of updates.  # (row,), (row, parameter)"
    ps, rows = list(model.parameters()), []
    for x, y in batches():
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        rows.append((loss.item(), [p.grad.double().norm().item() for p in ps], [lr * g for g in map(_norm, ps)]))
        by_hand(ps, lr)
    return [np.array(v) for v in zip(*rows)]

def _norm(p): return p.grad.double().norm().item()

def same(rec, loss, grads, updates):
    assert len(rec) == len(loss) and rec.iters.stepped.all()
    np.testing.assert_allclose(rec.iters.loss, loss, rtol=1e-6)
    np.testing.assert_allclose(rec['grad', 'norm'], grads, rtol=1e-5)
    np.testing.assert_allclose(rec['update', 'norm'], updates, rtol=1e-4, atol=1e-8)

def equal(a, b, but=()):
    "Two records hold the same numbers, to the bit."
    for c in a.iters:
        if c not in ('elapsed', *but): np.testing.assert_array_equal(a.iters[c], b.iters[c], err_msg=c)
    assert set(a.keys()) == set(b.keys())
    for k in a.keys(): np.testing.assert_array_equal(a[k], b[k], err_msg=str(k))


# --- loops -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('kind', ['sgd', 'adam', 'clipped', 'accumulated', 'eval mode'])
def test_the_same_numbers_as_watch(kind):
    def train(model, told=lambda loss, y: None):
        opt = torch.optim.Adam(model.parameters(), .01) if kind == 'adam' else torch.optim.SGD(model.parameters(), .1)
        model.train(kind != 'eval mode')
        for k, (x, y) in enumerate(batches()):
            loss = F.cross_entropy(model(x), y)
            told(loss, y)
            loss.backward()
            if kind == 'clipped': nn.utils.clip_grad_norm_(model.parameters(), .1)
            if kind == 'accumulated' and k % 3 < 2: continue
            opt.step()
            opt.zero_grad()
            with torch.no_grad(): model(x)
        return opt
    model = net()
    opt   = []
    with watch(model, None, loss_func=nn.CrossEntropyLoss()) as w: opt.append(train(model, lambda l, y: w.loss(l, None, y)))
    weights = [p.clone() for p in model.parameters()]
    ins     = instrument()
    try:
        model = net()
        train(model)
        run, = ins.runs
        assert run.name == 'model' and run.loop == 'torch' and run.kind == 'training' and run.model is model
        assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters()))
    finally: ins.off()
    equal(run.record, w.record, but=('loss_constant', 'gain'))
    np.testing.assert_allclose(run.record.iters.loss_constant, w.record.iters.loss_constant, rtol=1e-6)
    assert run.record.meta['not_observed'] == w.record.meta['not_observed'] == {}

def test_steps_that_the_loop_takes_itself(on):
    want  = truth(net())
    model = net()
    for x, y in batches():
        F.cross_entropy(model(x), y).backward()
        by_hand(model.parameters())
    rec = on.runs[-1].record                                            # the first one is that of the plain reading
    same(rec, *want)
    assert len(on.runs) == 2 and on.runs[-1].loop == 'own' and rec.layers['activation'].layer.tolist() == ['1']
    assert rec.meta['parameters'] == dict(frozen=[], not_in_optimizer=[], without_gradient=[])
    assert 'not seen' in rec.meta['grad_is']

@pytest.mark.parametrize('make', ['own', 'fastai'])
def test_optimizers_that_are_not_torchs(make):
    want  = truth(net())
    model = net()
    if make == 'own': opt = OwnOptimizer(model.parameters(), .1)
    else:
        from fastai.optimizer import SGD
        opt = SGD(list(model.parameters()), lr=.1)
    with watch(model, opt) as w:
        for x, y in batches():
            w.loss(F.cross_entropy(model(x), y)).backward()
            opt.step()
            opt.zero_grad()
    same(w.record, *want)
    assert (w.record.iters.lr == .1).all() and 'step' not in vars(opt) and 'zero_grad' not in vars(opt)

def test_a_model_that_is_not_called_as_a_module(on):
    plain = net()
    want  = []
    for x, y in batches(): want.append(plain[:2](x).mean().item()); F.cross_entropy(plain(x), y).backward(); by_hand(plain.parameters())
    n, model = len(on.runs), OwnCall()
    for x, y in batches():
        F.cross_entropy(model(x), y).backward()
        by_hand(model.parameters())
    run, = on.runs[n:]
    assert run.model is model and run.record.layers['activation'].layer.tolist() == ['layers.1']
    np.testing.assert_allclose(run.record['activation', 'mean'][:, 0], want, rtol=1e-5)
    assert np.isfinite(run.record.iters.loss).all() and 'output' in run.record.meta['not_observed']

def test_tensors_of_no_module(on):
    torch.manual_seed(0)
    weights, bias = torch.randn(4, 3).requires_grad_(), torch.zeros(3).requires_grad_()
    want = []
    for x, y in batches():
        loss = F.cross_entropy(x @ weights + bias, y)
        loss.backward()
        want.append((loss.item(), weights.grad.norm().item(), bias.grad.norm().item()))
        for p in (weights, bias):
            p.data -= .1 * p.grad
            p.grad.zero_()
    run, = on.runs
    rec  = run.record
    assert rec.layers['grad'].layer.tolist() == ['weights', 'bias'] and rec.meta['not_observed'] == {}
    np.testing.assert_allclose(np.column_stack([rec.iters.loss, rec['grad', 'norm']]), want, rtol=1e-5)

def test_two_models_are_two_runs_with_their_own_steps_and_losses(on):
    torch.manual_seed(1)
    gen, critic = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 4)), nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    og, oc = torch.optim.SGD(gen.parameters(), .1), torch.optim.SGD(critic.parameters(), .1)
    losses = []
    for x, _ in batches():
        oc.zero_grad()
        fake = gen(torch.randn(10, 2))
        lc   = critic(fake.detach()).sigmoid().mean() - critic(x).sigmoid().mean()
        lc.backward()
        oc.step()
        og.zero_grad()
        lg = -critic(fake).sigmoid().mean()
        lg.backward()
        og.step()
        losses.append((lg.item(), lc.item()))
    runs = {r.name: r.record for r in on.runs}
    assert set(runs) == {'gen', 'critic'} and {len(r) for r in runs.values()} == {30}
    np.testing.assert_allclose(runs['gen'].iters.loss,    [g for g, _ in losses], rtol=1e-6)
    np.testing.assert_allclose(runs['critic'].iters.loss, [c for _, c in losses], rtol=1e-6)

def test_another_optimizer_is_another_fit_of_the_run(on):
    model = net()
    def fit(opt):
        for x, y in batches():
            F.cross_entropy(model(x), y).backward()
            opt.step()
            opt.zero_grad()
    fit(torch.optim.SGD(model.parameters(), .1))
    fit(torch.optim.Adam(model.parameters(), .01))
    it = on.runs[0].record.iters
    assert len(on.runs) == 1 and it.fit.tolist() == [0] * 30 + [1] * 30 and it.lr.tolist() == [.1] * 30 + [.01] * 30
    assert np.isfinite(it.loss).all() and it.stepped.all()

@pytest.mark.parametrize('start, factor, n, kind', [(1e-6, 1.3, 60, 'search'), (1e-2, 1.1, 48, 'search'), (.1, .9, 48, 'training'),
                                                    (.1, 1., 48, 'training'), (1e-3, 1.3, 12, 'training')])
def test_a_search_for_a_rate_is_named_as_one(on, start, factor, n, kind):
    model = net()
    opt   = torch.optim.SGD(model.parameters(), start)
    for x, y in batches(n):
        F.cross_entropy(model(x), y).backward()
        opt.step()
        opt.zero_grad()
        opt.param_groups[0]['lr'] *= factor
    assert on.runs[0].kind == kind


@pytest.mark.parametrize('how', ['scaled', 'divided', 'closure'])
def test_what_is_done_to_a_loss_and_closures(on, how):
    model = net()
    opt   = torch.optim.SGD(model.parameters(), .1)
    amp   = torch.amp.GradScaler('cpu', init_scale=64., enabled=how == 'scaled')
    want  = []
    for x, y in batches():
        def closure():
            opt.zero_grad()
            out  = model(x)
            loss = F.cross_entropy(out, y) / (4 if how == 'divided' else 1)
            mean = F.cross_entropy(out.detach().mean(0, keepdim=True).expand_as(out), y) / (4 if how == 'divided' else 1)
            amp.scale(loss).backward()
            want.append((loss.item(), mean.item()))
            return loss
        if how == 'closure': opt.step(closure)
        else:
            closure()
            amp.step(opt)
            amp.update()
    run, = on.runs
    late = how == 'closure'                                             # its first step was under way before it was seen
    np.testing.assert_allclose(run.record.iters[['loss', 'loss_constant']], want[late:], rtol=1e-5)
    assert run.loop == 'torch' and ('the first step' in run.record.meta['not_observed']) == late


# --- what is no run --------------------------------------------------------------------------------------------------
def test_what_is_not_trained_is_no_run(on):
    teacher, model = net(), net()
    opt = torch.optim.SGD(model.parameters(), .1)
    for x, _ in batches():
        with torch.no_grad(): model(x)
        F.mse_loss(model(x), teacher(x).detach() + 1).backward()
        opt.step()
        opt.zero_grad()
    net()(batches()[0][0]).sum().backward()                              # a look at gradients
    assert [r.name for r in on.runs] == ['model'] and [r.name for r in on.loops.open if r.idle] == []

def test_what_is_watched_already_is_left_alone(on):
    model = net()
    with watch(model, None) as w:
        for x, y in batches():
            w.loss(F.cross_entropy(model(x), y)).backward()
            by_hand(model.parameters())
    assert len(w.record) == 30 and on.runs == []


# --- fastai ----------------------------------------------------------------------------------------------------------
def test_learners_are_recorded_as_by_the_callback(on, tmp_path):
    bare = learner('mlp', [LayerStatsCallback(verbose=False)])
    bare.fit_one_cycle(2)
    assert len(on.runs) == 1 and on.runs[0].record is bare.layer_stats   # the callback that is there stays the only one
    learn = learner('mlp', [])
    learn.lr_find(show_plot=False, num_it=5)
    torch.manual_seed(0)
    learn = learner('mlp', [])
    learn.fit_one_cycle(2)
    run = on.runs[-1]
    equal(run.record, bare.layer_stats)
    assert run.name == 'learn' and run.loop == 'fastai' and not any(hasattr(c, 'layer_plan') for c in learn.cbs)
    learn.fit(1)
    assert len(on.runs) == 2 and run.record.iters.fit.nunique() == 2
    learn.export(tmp_path / 'exported.pkl')
    code = ("import sys; sys.modules['fastgradstats'] = None; sys.path[:0] = sys.argv[2:]\n"
            "from fastai.learner import load_learner; print(type(load_learner(sys.argv[1]).model).__name__)")
    said = subprocess.run([sys.executable, '-c', code, str(tmp_path / 'exported.pkl'), *sys.path], capture_output=True, text=True)
    assert said.stdout.split() == ['Sequential'], said.stderr

SCRIPT = """
import random, sys
if sys.argv[1] == 'on':
    from fastgradstats import instrument
    instrument()
random.seed(1)
from fastai.vision.all import *
set_seed(3)
model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(.2), nn.ReLU(), nn.Linear(8, 3))
opt   = torch.optim.Adam(model.parameters())
for _ in range(10):
    F.cross_entropy(model(torch.randn(6, 4)), torch.randint(0, 3, (6,))).backward(); opt.step(); opt.zero_grad()
x, y  = torch.randn(60, 4), torch.randint(0, 3, (60,))
ds    = list(zip(x, y))
learn = Learner(DataLoaders.from_dsets(ds, ds, bs=8, device='cpu'), model, loss_func=CrossEntropyLossFlat())
with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2)
print([p.double().sum().item() for p in model.parameters()], random.random(), np.random.rand(), torch.rand(1).item())
"""

def test_training_and_random_numbers_are_those_without_it():
    said = [subprocess.run([sys.executable, '-W', 'ignore', '-c', SCRIPT, how], capture_output=True, text=True) for how in ('off', 'on')]
    assert said[0].stdout and said[0].stdout == said[1].stdout, said[1].stderr


# --- what goes wrong -------------------------------------------------------------------------------------------------
@statistic(unit='1')
def broken(x): raise ZeroDivisionError('of ours')

@pytest.mark.parametrize('where', ['activation', 'grad'])
def test_nothing_of_ours_is_raised_in_the_program(where):
    ins = instrument(**{where: [broken]})
    try:
        model, n = net(), 0
        opt = torch.optim.SGD(model.parameters(), .1)
        with pytest.warns(UserWarning, match='a run is not recorded: .*of ours'):
            for x, y in batches():
                F.cross_entropy(model(x), y).backward()
                opt.step()
                opt.zero_grad()
                n += 1
        assert n == 30
    finally: ins.off()

def test_a_program_that_is_interrupted_within_a_model_is_recorded_afterwards(on):
    class Interrupted(nn.Module):
        def forward(self, x): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): nn.Sequential(nn.Linear(4, 4), Interrupted())(torch.zeros(1, 4))
    model = net()
    opt   = torch.optim.SGD(model.parameters(), .1)
    for x, y in batches():
        F.cross_entropy(model(x), y).backward()
        opt.step()
        opt.zero_grad()
    assert 28 <= len(on.runs[0].record) <= 30

def test_a_backward_pass_that_fails_is_named(on):
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): return x.clone()
        @staticmethod
        def backward(ctx, g): raise RuntimeError('no way back')
    model = net()
    opt   = torch.optim.SGD(model.parameters(), .1)
    for k, (x, y) in enumerate(batches()):
        out = model(x)
        if k == 5:
            with pytest.raises(RuntimeError, match='no way back'): F.cross_entropy(Fails.apply(out), y).backward()
            continue
        F.cross_entropy(out, y).backward()
        opt.step()
        opt.zero_grad()
    rec = on.runs[0].record
    assert len(rec) == 29 and 'no way back' in rec.meta['not_observed']['some gradients'] and np.isfinite(rec.iters.loss).all()

def test_once_is_enough_and_wrong_settings_are_named(on, tmp_path):
    assert instrument() is on
    with pytest.raises(TypeError, match="'evry' is not an argument of instrument"): instrument(evry=3)
    with pytest.raises(ValueError, match='every is a whole number of 1 or more'): instrument(every=0)

def test_records_are_saved_as_runs_end(tmp_path):
    ins = instrument(out=tmp_path / 'runs')
    model = net()
    for x, y in batches():
        F.cross_entropy(model(x), y).backward()
        by_hand(model.parameters())
    ins.off()
    from fastgradstats import Record
    assert [f.name for f in (tmp_path / 'runs').iterdir()] == ['00-model.parquet']
    assert len(Record.load(ins.runs[0].file)) == 30

def test_a_folder_that_cannot_be_written_costs_no_more_than_a_warning(tmp_path):
    (tmp_path / 'file').write_text('no folder')
    ins   = instrument(out=tmp_path / 'file')
    model = net()
    for x, y in batches():
        F.cross_entropy(model(x), y).backward()
        by_hand(model.parameters())
    with pytest.warns(UserWarning, match='a run is not saved'): ins.off()
    assert len(ins.runs[0].record) == 30
