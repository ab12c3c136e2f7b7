"""A row is one call of the optimizer's step, whatever came before it: closures, gradients set by hand, mixed precision, two
optimizers, accumulation. Each against a plain reading."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastgradstats import diagnose, watch
from plain import Plain, batches, hooks, mlp, same

SGD = torch.optim.SGD
KINDS = dict(sgd=lambda ps: SGD(ps, .1, momentum=.9), adam=lambda ps: torch.optim.Adam(ps, .01),
             lbfgs=lambda ps: torch.optim.LBFGS(ps, .1, max_iter=4))

def layer(rec, probe, name, stat='norm'): return rec[probe, stat][:, list(rec.layers[probe].layer).index(name)]


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('by_name', [False, True])
def test_closures(kind, by_name):
    m = mlp(); o = KINDS[kind](m.parameters()); p = Plain(m); calls = []
    with watch(m, o) as w:
        for x, y in batches():
            def closure():
                calls.append(0)
                o.zero_grad()
                loss = w.loss(F.cross_entropy(m(x), y))
                loss.backward()
                p.gradients()
                return loss
            p.before()
            o.step(closure=closure) if by_name else o.step(closure)
            p.after()
    same(w.record, p)
    assert (w.record.iters.bs == 8).all() and np.isfinite(w.record.iters.loss).all()
    assert np.isfinite(w.record['activation', 'std']).all()
    assert w.record.meta.get('evaluations', 1) == (len(calls) // 4 if kind == 'lbfgs' else 1)
    assert not hooks(m, o)

def test_clipped_within_a_closure_after_grads():
    m = mlp(); o = SGD(m.parameters(), .1); true = []
    with watch(m, o, grad_used=['norm']) as w:
        for x, y in batches():
            def closure():
                o.zero_grad()
                loss = F.cross_entropy(m(x), y)
                loss.backward()
                w.grads()
                true.append(float(nn.utils.clip_grad_norm_(m.parameters(), .05)))
                return loss
            o.step(closure)
    np.testing.assert_allclose(w.record.iters.grad_norm, true, rtol=1e-5)
    np.testing.assert_allclose(w.record.iters.clip_factor, .05 / np.array(true), rtol=1e-4)

def test_gradients_set_by_hand():
    m = mlp(); o = SGD(m.parameters(), .1); p = Plain(m)
    with watch(m, o) as w:
        for x, y in batches():
            gs = torch.autograd.grad(w.loss(F.cross_entropy(m(x), y)), list(m.parameters()))
            for q, g in zip(m.parameters(), gs): q.grad = g
            p.before(); o.step(); p.after()
            o.zero_grad()
    same(w.record, p)
    assert np.isfinite(w.record['activation', 'std']).all() and (w.record.iters.bs == 8).all()

@pytest.mark.parametrize('fused', [False, True])
def test_mixed_precision_with_a_skipped_step(fused):
    m = mlp(); o = torch.optim.Adam(m.parameters(), .01, fused=fused)
    s = torch.amp.GradScaler('cpu', init_scale=1024.); want = []
    with watch(m, o, scaler=s) as w:
        for k, (x, y) in enumerate(batches()):
            loss = F.cross_entropy(m(x), y) * (math.inf if k == 2 else 1)
            s.scale(loss).backward()
            want.append(float(m[0].weight.grad.norm()) / s.get_scale())
            s.step(o); s.update(); o.zero_grad()
    assert w.record.iters.stepped.tolist() == [True, True, False, True]
    np.testing.assert_allclose(layer(w.record, 'grad', '0.weight')[[0, 1, 3]], np.array(want)[[0, 1, 3]], rtol=1e-5)
    assert not np.isfinite(w.record.iters.grad_norm[2]) and layer(w.record, 'update', '0.weight')[2] == 0
    assert 'step' not in vars(s) and not hooks(m, o)

def test_a_discriminator_sees_the_generators_passes():
    d, g = mlp(), nn.Linear(4, 6); od, og = SGD(d.parameters(), .1), SGD(g.parameters(), .1); p = Plain(d)
    with watch(d, od, grad_output=['norm']) as w:
        for x, y in batches(6):
            od.zero_grad()
            loss = F.cross_entropy(d(x), y) + F.cross_entropy(d(g(torch.randn(8, 4)).detach()), y)
            w.loss(loss).backward()
            p.before(); od.step(); p.after()
            og.zero_grad()
            (-F.cross_entropy(d(g(torch.randn(8, 4))), y)).backward()
            og.step()
    same(w.record, p)
    assert (w.record.iters.bs == 16).all() and np.isfinite(w.record.iters.loss).all() and not diagnose(w.record).findings

@pytest.mark.parametrize('how', ['model', 'in place', 'by hand'])
def test_zeroed_by_other_means_than_the_optimizer(how):
    m = mlp(); o = SGD(m.parameters(), .1); p = Plain(m)
    def zero():
        if how == 'model': m.zero_grad()
        if how == 'in place': m.zero_grad(set_to_none=False)
        if how == 'by hand':
            for q in m.parameters(): q.grad = None
    with watch(m, o) as w:
        for x, y in batches():
            F.cross_entropy(m(x * 9), y).backward()                      # another's business
            zero()
            F.cross_entropy(m(x), y).backward()
            p.before(); o.step(); p.after()
            zero()
    same(w.record, p)
    assert (w.record.iters.bs == 8).all()

def test_two_optimizers_on_one_model():
    m = mlp(); a, b = (SGD(m[k].parameters(), .1) for k in (0, 2)); p = Plain(m)
    with watch(m, a) as wa, watch(m, b) as wb:
        for x, y in batches(30):
            wb.loss(wa.loss(F.cross_entropy(m(x), y))).backward()
            p.before(); a.step(); p.after()
            b.step(); m.zero_grad()
    for w, mine, other in ((wa, '0.weight', '2.weight'), (wb, '2.weight', '0.weight')):
        assert not [f for f in diagnose(w.record).findings if f.rule == 'not_stepped']
        assert (layer(w.record, 'update', mine) > 0).all() and np.isnan(layer(w.record, 'update', other)).all()
        assert f'{other} (update)' in w.record.meta['not_observed']
    np.testing.assert_allclose(layer(wa.record, 'grad', '0.weight'), [r['grad']['0.weight'] for r in p.rows], rtol=1e-5)

def test_a_layer_that_nobody_steps_is_still_named():
    m = mlp(); o = SGD(m[0].parameters(), .1)
    with watch(m, o) as w:
        for x, y in batches(30): w.loss(F.cross_entropy(m(x), y)).backward(); o.step(); m.zero_grad()
    assert [f.layer for f in diagnose(w.record).findings if f.rule == 'not_stepped']

def test_accumulation_and_a_window_that_is_not_stepped():
    m = mlp(); o = SGD(m.parameters(), .1); p = Plain(m)
    with watch(m, o) as w:
        for k, (x, y) in enumerate(batches(7)):
            w.loss(F.cross_entropy(m(x), y)).backward()
            if k % 3 == 2: p.before(); o.step(); p.after(); o.zero_grad()
    same(w.record, p)
    assert w.record.iters.n_accum.tolist() == [3, 3] and w.record.iters.iter.tolist() == [2, 5]

def test_a_step_within_the_backward_pass():
    m = mlp(); q = {p: SGD([p], .1) for p in m.parameters()}; want = []
    def stepped(p):
        if p is m[0].weight: want.append(float(p.grad.norm()))
        q[p].step(); q[p].zero_grad()
    for p in q: p.register_post_accumulate_grad_hook(stepped)
    with watch(m, q[m[0].weight]) as w:
        for x, y in batches(): F.cross_entropy(m(x), y).backward()
    np.testing.assert_allclose(layer(w.record, 'grad', '0.weight'), want, rtol=1e-5)
    assert w.record.iters.stepped.all() and (layer(w.record, 'update', '0.weight') > 0).all()

def test_an_optimizer_around_another():
    class Twice(torch.optim.Optimizer):                                   # a first step up, then the real one, as SAM does
        def __init__(self, ps, base): super().__init__(ps, dict(lr=.1)); self.base = base(self.param_groups, lr=.1)
        def first(self):
            for g in self.param_groups:
                for p in g['params']: self.state[p]['e'] = p.grad.clone() * .05; p.data += self.state[p]['e']
            self.zero_grad()
        def second(self):
            for g in self.param_groups:
                for p in g['params']: p.data -= self.state[p]['e']
            self.base.step(); self.zero_grad()
    m = mlp(); o = Twice(m.parameters(), SGD); want = []
    with watch(m, o) as w:
        for x, y in batches():
            F.cross_entropy(m(x), y).backward(); o.first()
            F.cross_entropy(m(x), y).backward(); want.append(float(m[0].weight.grad.norm())); o.second()
    np.testing.assert_allclose(layer(w.record, 'grad', '0.weight'), want, rtol=1e-5)
    assert (w.record.iters.bs == 8).all() and w.record.iters.stepped.all()

def test_a_step_that_raises_ends_nothing():
    m = mlp(); o = SGD(m.parameters(), .1); p = Plain(m)
    with watch(m, o) as w:
        for k, (x, y) in enumerate(batches()):
            o.zero_grad(); F.cross_entropy(m(x), y).backward()
            if k == 1:
                with pytest.raises(ZeroDivisionError): o.step(lambda: 1 / 0)
                continue
            p.before(); o.step(); p.after()
    same(w.record, p)

def test_gain_in_a_plain_loop():
    m = mlp(); o = SGD(m.parameters(), .1); want = []
    with watch(m, o, loss_func=F.cross_entropy) as w:
        for x, y in batches():
            out  = m(x)
            loss = F.cross_entropy(out, y)
            want.append(float(F.cross_entropy(out.detach().mean(0, keepdim=True).expand_as(out), y)))
            w.loss(loss, out, y).backward(); o.step(); o.zero_grad()
    np.testing.assert_allclose(w.record.iters.loss_constant, want, rtol=1e-5)

def test_gradients_read_too_early_or_twice():
    m = mlp(); o = SGD(m.parameters(), .1); p = Plain(m)
    with watch(m, o) as w:
        w.grads()                                                        # nothing is there yet
        for x, y in batches():
            o.zero_grad()
            for _ in range(2):
                F.cross_entropy(m(x), y).backward()
                w.grads(); w.grads()
            p.before(); o.step(); p.after()
    same(w.record, p)

def test_the_row_after_a_step_that_raised_is_its_own():
    class Fails(SGD):
        broken = False
        def step(self, closure=None):
            if self.broken: raise ArithmeticError
            return super().step(closure)
    m = mlp(); o = Fails(m.parameters(), .1); p = Plain(m)
    with watch(m, o) as w:
        for k, (x, y) in enumerate(batches()):
            F.cross_entropy(m(x * (1 + 99 * (k == 1))), y).backward()
            o.broken = k == 1
            if o.broken:
                with pytest.raises(ArithmeticError): o.step()
            else: p.before(); o.step(); p.after()
            o.zero_grad()
    same(w.record, p)
    np.testing.assert_allclose(w.record.iters.clip_factor, 1)

def test_the_rate_is_that_of_the_step():
    m = mlp(); o = SGD(m.parameters(), .1)
    with watch(m, o) as w:
        for k, (x, y) in enumerate(batches()):
            F.cross_entropy(m(x), y).backward(); w.grads()
            o.param_groups[0]['lr'] = .01 * (k + 1)
            o.step(); o.zero_grad()
    np.testing.assert_allclose(w.record.iters.lr, [.01, .02, .03, .04])

ZEROING = dict(none      = (lambda o, m: o.zero_grad(),                                                0.),
               zeros     = (lambda o, m: o.zero_grad(set_to_none=False),                               0.),
               data      = (lambda o, m: [p.grad.data.zero_() for p in m.parameters() if p.grad is not None], 0.),
               model     = (lambda o, m: m.zero_grad(),                                                0.),
               forgotten = (lambda o, m: None,                                                         1.))

@pytest.mark.parametrize('when', ['before', 'after', 'between'])
@pytest.mark.parametrize('how', ZEROING)
def test_whether_gradients_are_kept_is_seen(how, when):
    "By whatever means they are zeroed, and wherever in the loop."
    zero, kept = ZEROING[how]
    m = mlp(); o = SGD(m.parameters(), .1)
    with watch(m, o) as w:
        for x, y in batches():
            if when == 'before': zero(o, m)
            loss = F.cross_entropy(m(x), y)
            if when == 'between': zero(o, m)
            loss.backward(); o.step()
            if when == 'after': zero(o, m)
    seen = w.record.iters.grad_kept
    assert np.isnan(seen[0]) and (seen[1:] == kept).all()

def test_accumulated_gradients_are_not_kept_ones():
    m = mlp(); o = SGD(m.parameters(), .1)
    with watch(m, o) as w:
        for k, (x, y) in enumerate(batches() * 3):
            F.cross_entropy(m(x), y).backward()
            if k % 3 == 2: o.step(); o.zero_grad()
    assert (w.record.iters.n_accum == 3).all() and (w.record.iters.grad_kept[1:] == 0).all()

def test_what_is_never_trained_is_named():
    m = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(.3), nn.Linear(8, 3))
    m.spare, m.head = nn.Linear(2, 2), nn.Linear(2, 2)
    m.head.requires_grad_(False)
    m[1].eval()
    o = SGD([*m[4].parameters(), *m.spare.parameters()], .1)
    with watch(m, o, loss_func=F.cross_entropy) as w:
        for x, y in batches():
            out = x
            for k in range(5): out = m[k](out)
            F.cross_entropy(out, y).backward(); o.step(); o.zero_grad()
    meta = w.record.meta
    assert meta['parameters'] == dict(frozen=['head.weight', 'head.bias'], without_gradient=['spare.weight', 'spare.bias'],
                                      not_in_optimizer=['0.weight', '0.bias', '1.weight', '1.bias'])
    m = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(.3), nn.Linear(8, 3))
    m[1].eval(); o = SGD(m.parameters(), .1)
    with watch(m, o) as w:
        for x, y in batches(): F.cross_entropy(m(x), y).backward(); o.step(); o.zero_grad()
    assert w.record.meta['eval_mode'] == {'1': 0} and w.record.meta['dropout'] == {'3': .3}
    assert w.record.meta['parameters'] == dict(frozen=[], not_in_optimizer=[], without_gradient=[])
