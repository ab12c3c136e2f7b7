"""Which forward and backward passes lend a row their activations and output gradients."""
import copy
import io
import pickle
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

from fastgradstats import GeneralRelu, watch
from fastgradstats.measure.loop import WAITING
from plain import Plain, batches, hooks, mlp, same

SGD = torch.optim.SGD

def std(*xs): return float(torch.cat([x.detach().reshape(-1) for x in xs]).double().std(correction=0))

def test_two_passes_before_one_backward():
    m = mlp(); o = SGD(m.parameters(), .1); p = Plain(m); want = []
    with watch(m, o) as w:
        for x, _ in batches():
            want.append(std(m[1](m[0](x)), m[1](m[0](x * 9))))
            (m(x) - m(x * 9)).pow(2).mean().backward()
            p.before(); o.step(); p.after(); o.zero_grad()
    same(w.record, p)
    assert (w.record.iters.bs == 16).all()
    np.testing.assert_allclose(w.record['activation', 'std'][:, 0], want, rtol=1e-5)

def test_autograd_grad_beside_the_real_pass_lends_nothing():
    "A gradient penalty: the output gradient is that of the real backward pass."
    def train(record):
        m = mlp(); o = SGD(m.parameters(), .1); seen = []
        h = m[1].register_forward_hook(lambda mod, a, out: out.register_hook(lambda g: seen.append(float(g.norm()))) and None)
        with watch(m, o, grad_output=['norm']) as w:
            for x, y in batches():
                x = x.clone().requires_grad_()
                out = m(x)
                torch.autograd.grad(out.sum(), x, retain_graph=True)
                F.cross_entropy(out, y).backward()
                o.step(); o.zero_grad()
        h.remove()
        return w.record, seen[1::2]                                       # every second: of the real pass
    rec, want = train(True)
    np.testing.assert_allclose(rec['grad_output', 'norm'][:, 0], want, rtol=1e-5)

def test_double_backward():
    m = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)); o = SGD(m.parameters(), .1); p = Plain(m)
    with watch(m, o, grad_output=['norm']) as w:
        for x, y in batches():
            x = x.clone().requires_grad_()
            out = m(x)
            g, = torch.autograd.grad(out.sum(), x, create_graph=True)
            (F.cross_entropy(out, y) + g.pow(2).sum()).backward()
            p.before(); o.step(); p.after(); o.zero_grad()
    same(w.record, p)
    assert np.isfinite(w.record['grad_output', 'norm']).all()

def test_passes_that_lead_to_no_step():
    "Monte Carlo dropout, a look with gradients on: no rows, nothing lent."
    m = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(.5), nn.Linear(8, 3)); o = SGD(m.parameters(), .1); p = Plain(m)
    with watch(m, o) as w:
        for x, y in batches():
            for _ in range(20): m(x * 100)
            F.cross_entropy(m(x), y).backward()
            p.before(); o.step(); p.after(); o.zero_grad()
    same(w.record, p)
    assert (w.record.iters.bs == 8).all() and w.record['input', 'std'].max() < 10

def test_an_axis_that_changes_its_length_is_trained_and_its_units_named():
    class Attend(nn.Module):
        def __init__(self): super().__init__(); self.l, self.s = nn.Linear(1, 1), nn.Softmax(-1)
        def forward(self, x): return self.s(self.l(x).squeeze(-1))
    m = Attend(); o = SGD(m.parameters(), .1)
    with watch(m, o) as w:
        for n in (5, 6, 7): m(torch.randn(2, n, 1)).max().backward(); o.step(); o.zero_grad()
    assert len(w.record) == 3 and np.isfinite(w.record['activation', 'std']).all()
    assert any('units' in n for n in w.record.meta['not_observed'])

class Answer:
    def __init__(self, logits): self.logits = logits

@pytest.mark.parametrize('how', ['keyword', 'object', 'forward'])
def test_models_called_and_answering_otherwise(how):
    class Model(nn.Module):
        def __init__(self): super().__init__(); self.net = mlp()
        def forward(self, x): return Answer(self.net(x)) if how == 'object' else self.net(x)
    m = Model(); o = SGD(m.parameters(), .1); p = Plain(m)
    with watch(m, o) as w:
        for x, y in batches():
            out = m(x=x) if how == 'keyword' else m(x).logits if how == 'object' else m.forward(x)
            F.cross_entropy(out, y).backward()
            p.before(); o.step(); p.after(); o.zero_grad()
    same(w.record, p)
    if how == 'forward': assert any('no forward pass' in why for why in w.record.meta['not_observed'].values())
    else:
        assert (w.record.iters.bs == 8).all() and np.isfinite(w.record['activation', 'std']).all()
        assert np.isfinite(w.record['input', 'std']).all()
    if how == 'object': assert 'output' in w.record.meta['not_observed']

def test_copies_are_free_and_saving_works():
    m = mlp(); o = SGD(m.parameters(), .1); p = Plain(m)
    with watch(m, o) as w:
        c = copy.deepcopy(m)
        torch.save(m, io.BytesIO()); pickle.loads(pickle.dumps(m))(torch.randn(2, 6)); copy.deepcopy(o)
        oc = SGD(c.parameters(), .1)
        for x, y in batches():
            F.cross_entropy(m(x), y).backward(); p.before(); o.step(); p.after(); o.zero_grad()
            F.cross_entropy(c(x), y).backward(); oc.step(); oc.zero_grad()
    same(w.record, p)

def test_transforms_of_torch_func():
    m = mlp(); o = SGD(m.parameters(), .1); p = Plain(m); x, y = batches()[0]
    with watch(m, o) as w:
        per = torch.func.vmap(lambda a: torch.func.functional_call(m, dict(m.named_parameters()), (a[None],))[0])(x)
        torch.func.grad(lambda q: torch.func.functional_call(m, q, (x,)).sum())(dict(m.named_parameters()))
        assert per.shape == (8, 3)
        F.cross_entropy(m(x), y).backward(); p.before(); o.step(); p.after()
    same(w.record, p)
    assert w.record.iters.bs.tolist() == [8]

def test_a_scripted_model_trains_and_is_named():
    m = torch.jit.script(mlp()); o = SGD(m.parameters(), .1); p = Plain(m)
    with watch(m, o) as w:
        for x, y in batches(): F.cross_entropy(m(x), y).backward(); p.before(); o.step(); p.after(); o.zero_grad()
    same(w.record, p)
    assert any('scripted' in why for why in w.record.meta['not_observed'].values())

@pytest.mark.parametrize('fullgraph', [False, True])
def test_a_compiled_model_is_compiled_once_or_twice(fullgraph):
    from torch._dynamo.testing import CompileCounter
    torch._dynamo.reset()
    counter = CompileCounter()
    m = mlp(); c = torch.compile(m, backend=counter, fullgraph=fullgraph); o = SGD(m.parameters(), .1); p = Plain(m)
    other_counter = CompileCounter()
    other = torch.compile(lambda x: x.sin() + 1, backend=other_counter)
    other(torch.ones(3))
    with watch(c, o) as w:
        for x, y in batches(8):
            F.cross_entropy(c(x), y).backward(); p.before(); o.step(); p.after(); o.zero_grad()
            other(torch.ones(3))
    same(w.record, p)
    assert counter.frame_count <= 8 and other_counter.frame_count == 1
    if fullgraph: assert any('fullgraph' in why for why in w.record.meta['not_observed'].values())
    else:         assert np.isfinite(w.record['activation', 'std']).all()

def test_watches_closed_first_in_first_out_leave_nothing():
    m = mlp(); o = SGD(m.parameters(), .1); zero = o.zero_grad
    a, b = watch(m, o), watch(m, o)
    a.__enter__(); b.__enter__()
    x, y = batches()[0]
    F.cross_entropy(m(x), y).backward(); o.step(); o.zero_grad()
    a.__exit__(None, None, None)
    F.cross_entropy(m(x), y).backward(); o.step(); o.zero_grad()
    b.__exit__(None, None, None)
    assert len(a.record) == 1 and len(b.record) == 2 and o.zero_grad == zero and not hooks(m, o)

def test_enter_that_fails_leaves_nothing(monkeypatch):
    m = mlp(); o = SGD(m.parameters(), .1)
    monkeypatch.setattr(o, 'register_step_post_hook', lambda f: 1 / 0)
    with pytest.raises(ZeroDivisionError): watch(m, o).__enter__()
    assert not hooks(m) and not o._optimizer_step_pre_hooks and 'zero_grad' not in vars(o)

def test_a_layer_replaced_widened_and_added_in_the_middle():
    m = mlp(); o = SGD(m.parameters(), .1); p = Plain(m); 
    with watch(m, o) as w:
        for k, (x, y) in enumerate(batches(6)):
            if k == 2:
                m[2] = nn.Linear(8, 5); o.add_param_group(dict(params=m[2].parameters(), lr=.05))
            if k == 4:
                m.insert(2, nn.Tanh())
            F.cross_entropy(m(x), y).backward()
            p.before(); o.step(); p.after(); o.zero_grad()
    rec, names = w.record, list(w.record.layers['grad'].layer)
    assert {'2.weight', '2.weight:1', '3.weight'} <= set(names) and rec.iters.stepped.all()
    at = lambda n: rec['grad', 'norm'][:, names.index(n)]
    got = [r['grad'] for r in p.rows]
    np.testing.assert_allclose(at('2.weight')[:2], [r['2.weight'] for r in got[:2]], rtol=1e-5)
    np.testing.assert_allclose(at('2.weight:1')[2:4], [r['2.weight'] for r in got[2:4]], rtol=1e-5)
    np.testing.assert_allclose(at('3.weight')[4:], [r['3.weight'] for r in got[4:]], rtol=1e-5)
    assert np.isnan(at('2.weight')[2:]).all() and np.isnan(at('3.weight')[:4]).all() and np.isfinite(rec.iters.lr).all()
    np.testing.assert_allclose(rec.iters.grad_norm, [np.sqrt(sum(v ** 2 for v in r.values())) for r in got], rtol=1e-5)

def test_activation_functions_beside_modules_are_named():
    class Beside(nn.Module):
        def __init__(self): super().__init__(); self.net = mlp()
        def forward(self, x): return torch.tanh(F.relu(self.net(x)) + 1)
    for model, names in ((Beside(), {'relu', 'tanh'}), (mlp(), set()), (nn.Sequential(nn.Linear(6, 4), nn.GELU(), nn.Linear(4, 3), nn.ReLU6()), set()),
                         (nn.Sequential(nn.Linear(6, 4), GeneralRelu(.1, .4, 6.), nn.Linear(4, 3)), set())):
        o = SGD(model.parameters(), .1)
        with watch(model, o) as w:
            for x, y in batches(): F.cross_entropy(model(x), y).backward(); o.step(); o.zero_grad()
        assert {n.split(' (')[0] for n in w.record.meta['not_hooked']} == names

def test_many_passes_before_one_backward():
    m = mlp(); o = SGD(m.parameters(), .1)
    with watch(m, o) as w:
        for _ in range(2):
            sum(m(torch.randn(1, 6)).sum() for _ in range(40)).backward()
            o.step(); o.zero_grad()
    assert w.record.iters.bs.tolist() == [40, 40]

def test_a_parameter_that_is_answered_keeps_no_hook():
    class Uncertain(nn.Module):
        def __init__(self): super().__init__(); self.net, self.log_var = mlp(), nn.Parameter(torch.zeros(3))
        def forward(self, x): return self.net(x), self.log_var
    m = Uncertain(); o = SGD(m.parameters(), .1); p = Plain(m)
    with watch(m, o, grad_output=['norm']) as w:
        for x, y in batches():
            out, v = m(x)
            (F.cross_entropy(out, y) + v.sum()).backward(); p.before(); o.step(); p.after(); o.zero_grad()
    same(w.record, p)
    assert not m.log_var._backward_hooks

def test_a_model_that_calls_itself():
    class Tree(nn.Module):
        def __init__(self): super().__init__(); self.l, self.act = nn.Linear(6, 6), nn.ReLU()
        def forward(self, x, depth=2): return self.act(self.l(self(x, depth - 1) if depth else x))
    m = Tree(); o = SGD(m.parameters(), .1); p = Plain(m); want = []
    with watch(m, o) as w:
        for x, _ in batches():
            hs = [x]
            for _ in range(3): hs.append(torch.relu(m.l(hs[-1])).detach())
            want.append(float(torch.cat(hs[1:]).mean()))
            m(x).square().mean().backward(); p.before(); o.step(); p.after(); o.zero_grad()
    same(w.record, p)
    np.testing.assert_allclose(w.record['activation', 'mean'][:, 0], want, rtol=1e-5)
    assert (w.record.iters.bs == 8).all()

def test_a_watch_is_entered_once():
    m = mlp(); o = SGD(m.parameters(), .1); w = watch(m, o)
    with w:
        with pytest.raises(ValueError, match='already open'): w.__enter__()
        x, y = batches()[0]
        F.cross_entropy(m(x), y).backward(); o.step()
    assert len(w.record) == 1 and not hooks(m, o)

def test_a_forward_pass_that_raises_ends_nothing():
    m = mlp(); o = SGD(m.parameters(), .1); p = Plain(m)
    with watch(m, o, grad_output=['norm']) as w:
        for k, (x, y) in enumerate(batches()):
            if k == 1:
                with pytest.raises(RuntimeError): m(x[:, :3])
            F.cross_entropy(m(x), y).backward(); p.before(); o.step(); p.after(); o.zero_grad()
    same(w.record, p)
    assert (w.record.iters.bs == 8).all() and np.isfinite(w.record['grad_output', 'norm']).all()
    assert not w.record.meta['not_observed']

def test_gradients_by_hand_from_passes_whose_own_were_taken_away():
    m = mlp(); o = SGD(m.parameters(), .1); p = Plain(m); want, losses = [], []
    with watch(m, o) as w:
        for x, y in batches():
            total = [torch.zeros_like(q) for q in m.parameters()]
            for x2 in (x, x * 2):
                o.zero_grad(); losses.append(w.loss(F.cross_entropy(m(x2), y))); losses[-1].backward()
                total = [a + q.grad for a, q in zip(total, m.parameters())]
            want.append(std(m[1](m[0](x)), m[1](m[0](x * 2))))
            o.zero_grad()
            for q, g in zip(m.parameters(), total): q.grad = g
            p.step(o); o.zero_grad()
    same(w.record, p)
    assert (w.record.iters.bs == 16).all() and not w.record.meta['not_observed']
    np.testing.assert_allclose(w.record['activation', 'std'][:, 0], want, rtol=1e-5)
    np.testing.assert_allclose(w.record.iters.loss, np.reshape([float(l.detach()) for l in losses], (-1, 2)).mean(1), rtol=1e-6)

@pytest.mark.parametrize('how', ['in eval mode', 'by .forward'])
def test_the_loss_is_that_of_its_own_row(how):
    "Also where no pass is seen: then it is not known, rather than that of the row before."
    m = mlp(); o = SGD(m.parameters(), .1); want = []
    if how == 'in eval mode': m.eval()
    with watch(m, o) as w:
        for x, y in batches():
            loss = w.loss(F.cross_entropy(m.forward(x) if how == 'by .forward' else m(x), y)); loss.backward()
            o.step(); o.zero_grad(); want.append(float(loss.detach()))
    if how == 'by .forward': assert w.record.iters.loss.isna().all() and any('no forward pass' in v for v in w.record.meta['not_observed'].values())
    else: np.testing.assert_allclose(w.record.iters.loss, want, rtol=1e-6)

def test_an_optimizer_put_in_the_place_of_the_watched_one_is_named():
    m = mlp(); o = SGD(m.parameters(), .1); p = Plain(m)
    with watch(m, o) as w:
        for k, (x, y) in enumerate(batches(6)):
            if k == 3: o2 = torch.optim.Adam(m.parameters(), .01)
            F.cross_entropy(m(x), y).backward()
            if k < 3: p.step(o)
            else:     o2.step()
            o.zero_grad()
    same(w.record, p)
    assert 'Adam' in w.record.meta['not_observed']['some steps']
    assert not _global_optimizer_pre_hooks

def test_a_loss_told_after_a_pass_of_a_gradient_penalty_is_the_rows():
    m = mlp(); o = SGD(m.parameters(), .01); want = []
    with watch(m, o) as w:
        for x, _ in batches():
            o.zero_grad()
            loss = m(x).mean()
            x    = x.clone().requires_grad_()
            loss = loss + torch.autograd.grad(m(x).sum(), x, create_graph=True)[0].norm()
            want.append(float(loss))
            w.loss(loss).backward(); o.step()
    np.testing.assert_allclose(w.record.iters.loss, want, rtol=1e-6)

def test_a_loss_told_of_a_pass_that_leads_to_no_step_is_no_rows():
    m = mlp(); o = SGD(m.parameters(), .01)
    with watch(m, o) as w:
        for x, _ in batches():
            a, b = m(x).mean(), m(2 * x).mean()
            w.loss(b)                                                    # which is never run backwards
            o.zero_grad(); a.backward(); o.step()
    assert w.record.iters.loss.isna().all()

def test_passes_beside_the_real_ones_are_not_kept_for_ever():
    "Of a gradient penalty one remains each step that has given the parameters nothing."
    m = nn.Linear(2, 1); o = SGD(m.parameters(), .01)
    with watch(m, o, activation=None, window=None) as w:
        for k in range(WAITING + 40):
            x    = torch.randn(4, 2, requires_grad=True)
            loss = m(torch.randn(4, 2)).mean() + torch.autograd.grad(m(x).sum(), x, create_graph=True)[0].norm()
            w.loss(loss).backward(); o.step(); o.zero_grad()
        assert len(w.passes) <= WAITING
    assert w.record.iters.loss.notna().all() and (w.record.iters.iter == np.arange(WAITING + 40)).all()

def test_gradients_zeroed_between_an_inner_and_the_real_backward_pass_are_not_kept():
    m = mlp(); o = SGD(m.parameters(), .1)
    with watch(m, o) as w:
        for x, y in batches():
            inner = torch.autograd.grad(F.cross_entropy(m(x), y), list(m.parameters()), create_graph=True)
            fast  = {n: q - .1 * g for (n, q), g in zip(m.named_parameters(), inner)}
            loss  = F.cross_entropy(torch.func.functional_call(m, fast, x), y)
            o.zero_grad(); loss.backward(); o.step()
    assert (w.record.iters.grad_kept[1:] == 0).all()

def test_weights_lent_for_one_pass_are_no_parameters():
    "MAML: an inner step by functional_call, whose weights are other tensors for one pass."
    def train(watched):
        m = mlp(); o = torch.optim.SGD(m.parameters(), .1); p = Plain(m)
        with watch(m, o) if watched else nullcontext() as w:
            for x, y in batches():
                o.zero_grad()
                inner = torch.autograd.grad(F.cross_entropy(m(x), y), list(m.parameters()), create_graph=True)
                fast  = {n: q - .1 * g for (n, q), g in zip(m.named_parameters(), inner)}
                F.cross_entropy(torch.func.functional_call(m, fast, x), y).backward()
                p.before(); o.step(); p.after()
        if watched: same(w.record, p)
        return [q.detach().clone() for q in m.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(train(False), train(True)))
