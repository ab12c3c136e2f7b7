"""A row is one call of the optimizer's step, whatever came before it: closures, gradients set by hand, mixed precision, two
optimizers, accumulation. Each against a plain reading."""
import copy
import math
import pickle

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

def test_another_optimizer_steps_first_and_rarely():
    "Its parameters' updates are not this optimizer's, in no row; nor is what is stepped by both measured but around the step at hand."
    m = mlp(); a, b = SGD(m[0].parameters(), .1), SGD([*m[2].parameters(), m[0].bias], .1); p = Plain(m)
    with watch(m, a) as w:
        for k, (x, y) in enumerate(batches(60)):
            F.cross_entropy(m(x), y).backward()
            if k > 55: b.step()
            p.step(a); m.zero_grad()
    same(w.record, p, but=('2.weight', '2.bias'))
    assert np.isnan(layer(w.record, 'update', '2.weight')).all() and '2.weight (update)' in w.record.meta['not_observed']
    np.testing.assert_allclose(layer(w.record, 'grad', '2.weight'), [r['grad']['2.weight'] for r in p.rows], rtol=1e-5)

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

@pytest.mark.parametrize('told', [False, True])
@pytest.mark.parametrize('fused', [False, True])
def test_a_scaler_is_found_and_what_it_has_multiplied_is_divided(told, fused):
    "Also where the scale changes, the model is called again before the backward pass, and gradients are read before they are unscaled."
    m = mlp(); o = torch.optim.Adam(m.parameters(), .01, fused=fused); seen, want = [], []
    s = torch.amp.GradScaler('cpu', init_scale=1024., growth_interval=2)
    h = m[1].register_forward_hook(lambda mod, a, out: out.register_hook(lambda g: seen.append(float(g.norm()))) and None)
    with watch(m, o, grad_output=['norm'], **dict(scaler=s) if told else {}) as w:
        for k, (x, y) in enumerate(batches(6)):
            out  = s.scale(F.cross_entropy(m(x), y) * (math.inf if k == 2 else 1))
            if k == 1: m(x)
            out.backward()
            want.append(float(m[0].weight.grad.norm()) / s.get_scale())
            seen[-1] /= s.get_scale()
            if k == 4: w.grads(); s.unscale_(o); nn.utils.clip_grad_norm_(m.parameters(), .1)
            s.step(o); s.update(); o.zero_grad()
    h.remove()
    it = w.record.iters
    assert it.stepped.tolist() == [True, True, False, True, True, True] and (it.bs == 8).all()
    ok = it.stepped.to_numpy()
    np.testing.assert_allclose(layer(w.record, 'grad', '0.weight')[ok], np.array(want)[ok], rtol=1e-5)
    np.testing.assert_allclose(w.record['grad_output', 'norm'][ok, 0], np.array(seen)[ok], rtol=1e-5)
    np.testing.assert_allclose(it.clip_factor[ok], [.1 / it.grad_norm[4] if k == 4 else 1 for k in (0, 1, 3, 4, 5)], rtol=1e-4)
    assert not np.isfinite(it.grad_norm[2]) and (layer(w.record, 'update', '0.weight')[2] == 0)
    assert not any('Listeners' in repr(type(v)) for c in (type(s), s) for v in vars(c).values()) and not hooks(m, o)

def test_another_models_scaler_changes_nothing():
    m, g = mlp(), nn.Linear(4, 6); o, og = SGD(m.parameters(), .1), SGD(g.parameters(), .1); p = Plain(m); seen = []
    s = torch.amp.GradScaler('cpu', init_scale=1024.)
    with watch(m, o, grad_output=['norm']) as w:
        h = m[1].register_forward_hook(lambda mod, a, out: out.register_hook(lambda g: seen.append(float(g.norm()))) and None)
        for k, (x, y) in enumerate(batches()):
            loss = F.cross_entropy(m(x), y)
            s.scale(g(torch.randn(8, 4)).square().mean() * (math.inf if k == 1 else 1)).backward()
            s.step(og); s.update(); og.zero_grad()
            loss.backward()
            p.step(o); o.zero_grad()
        h.remove()
    same(w.record, p)
    np.testing.assert_allclose(w.record['grad_output', 'norm'][:, 0], seen, rtol=1e-5)

class OwnScaler:
    "Not made of torch's: a fixed scale."
    def get_scale(self): return 128.
    def is_enabled(self): return True
    def scale(self, loss): return loss * 128
    def unscale_(self, opt): torch._foreach_div_([p.grad for g in opt.param_groups for p in g['params']], 128.)
    def step(self, opt):
        self.unscale_(opt)
        if all(p.grad.isfinite().all() for g in opt.param_groups for p in g['params']): opt.step()

def test_a_scaler_of_ones_own_is_told():
    m = mlp(); o = SGD(m.parameters(), .1); s = OwnScaler(); want, back = [], []
    h = m[1].register_forward_hook(lambda mod, a, out: out.register_hook(lambda g: back.append(float(g.norm()) / 128)) and None)
    with watch(m, o, scaler=s, grad_output=['norm']) as w:
        for k, (x, y) in enumerate(batches()):
            s.scale(F.cross_entropy(m(x), y) * (math.inf if k == 1 else 1)).backward()
            want.append(float(m[0].weight.grad.norm()) / 128)
            if k == 2: w.grads()
            s.step(o); o.zero_grad()
    h.remove()
    ok = w.record.iters.stepped.to_numpy()
    assert ok.tolist() == [True, False, True, True] and 'scale' in vars(OwnScaler) and OwnScaler.step.__class__.__name__ == 'function'
    np.testing.assert_allclose(layer(w.record, 'grad', '0.weight')[ok], np.array(want)[ok], rtol=1e-5)
    np.testing.assert_allclose(w.record['grad_output', 'norm'][ok, 0], np.array(back)[ok], rtol=1e-5)
    np.testing.assert_allclose(w.record.iters.clip_factor[ok], 1, rtol=1e-5)

@pytest.mark.parametrize('read', ['at the step', 'before', 'before both'])
def test_unscaled_by_hand(read):
    "The scaler's own `unscale_` is never called; the gradient is that of the loss."
    m = mlp(); o = SGD(m.parameters(), .1); p = Plain(m); s = torch.amp.GradScaler('cpu', init_scale=1024.)
    with watch(m, o, grad_output=['norm']) as w:
        for x, y in batches():
            s.scale(F.cross_entropy(m(x), y)).backward()
            if read == 'before both': w.grads()
            for q in m.parameters(): q.grad.div_(s.get_scale())
            if read == 'before': w.grads()
            p.step(o); o.zero_grad()
    same(w.record, p)
    np.testing.assert_allclose(w.record.iters.clip_factor, 1)

def test_one_scaler_for_two_optimizers():
    "Where one optimizer steps, the other's gradients may be multiplied still."
    m = mlp(); a, b = (SGD(m[k].parameters(), .1) for k in (0, 2)); s = torch.amp.GradScaler('cpu', init_scale=1024.); want = []
    with watch(m, a) as wa, watch(m, b) as wb:
        for k, (x, y) in enumerate(batches(5)):
            s.scale(F.cross_entropy(m(x), y)).backward()
            want.append([float(m[j].weight.grad.norm()) / s.get_scale() for j in (0, 2)])
            if k == 1: s.unscale_(b)
            if k == 2: m[2].weight.grad.fill_(math.inf)
            s.step(a); s.step(b); s.update(); m.zero_grad()
    assert wa.record.iters.stepped.all() and wb.record.iters.stepped.tolist() == [True, True, False, True, True]
    for w in (wa, wb):
        got = np.stack([layer(w.record, 'grad', n) for n in ('0.weight', '2.weight')], 1)
        np.testing.assert_allclose(np.delete(got, 2, 0), np.delete(want, 2, 0), rtol=1e-5)
        assert not np.isfinite(got[2, 1]) and np.isclose(got[2, 0], want[2][0])

class Fails(SGD):
    "Its step raises when it is `broken`, after it has moved the first parameter."
    broken = False
    def step(self, closure=None):
        if closure is not None: closure()
        if self.broken:
            with torch.no_grad(): self.param_groups[0]['params'][0].add_(.01)
            self.broken = False
            raise ArithmeticError
        return super().step()

@pytest.mark.parametrize('how', ['at once', 'while it is handled', 'with a closure'])
def test_a_step_that_raised_is_tried_again(how):
    m = mlp(); o = Fails(m.parameters(), .1); p = Plain(m); x, y = batches()[0]
    closure = (lambda: F.cross_entropy(m(x), y).backward()) if how == 'with a closure' else None
    def again():
        if closure: o.zero_grad(); closure(); p.before(); o.zero_grad(); o.step(closure); p.after()
        else:       p.step(o)
    with watch(m, o, grad_used=['norm']) as w:
        for k, (x, y) in enumerate(batches()):
            if not closure: F.cross_entropy(m(x), y).backward()
            o.broken = k in (0, 2)
            if o.broken:
                try: o.step(closure)
                except ArithmeticError:
                    if how == 'while it is handled': again()
                if how != 'while it is handled': again()
            else: again()
            o.zero_grad()
    same(w.record, p)
    np.testing.assert_allclose(w.record.iters.clip_factor, 1)
    np.testing.assert_allclose(w.record['grad_used', 'norm'], w.record['grad', 'norm'])

def test_what_was_read_before_a_step_that_raised_holds_for_the_next():
    m = mlp(); o = Fails(m.parameters(), .1); true = []
    with watch(m, o, grad_used=['norm'], weight=['norm']) as w:
        for x, y in batches():
            F.cross_entropy(m(x), y).backward()
            w.grads()
            true.append(float(nn.utils.clip_grad_norm_(m.parameters(), .05)))
            o.broken = True
            with pytest.raises(ArithmeticError): o.step()
            before = float(m[0].weight.detach().norm())
            o.step(); o.zero_grad()
    np.testing.assert_allclose(w.record.iters.grad_norm, true, rtol=1e-5)
    np.testing.assert_allclose(w.record.iters.clip_factor, .05 / np.array(true), rtol=1e-4)
    np.testing.assert_allclose(layer(w.record, 'weight', '0.weight')[-1], before, rtol=1e-6)

class Branches(nn.Module):
    def __init__(self): super().__init__(); torch.manual_seed(0); self.a, self.b, self.head = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 3)
    def forward(self, x, which): return self.head(torch.relu(getattr(self, which)(x)))

@pytest.mark.parametrize('opt', [lambda ps: SGD(ps, .1, momentum=.9), lambda ps: SGD(ps, .1, weight_decay=.1), lambda ps: torch.optim.Adam(ps, .01)])
def test_a_layer_that_momentum_or_decay_moves_without_a_gradient(opt):
    m = Branches(); o = opt(m.parameters()); p = Plain(m); used = []
    with watch(m, o) as w:
        for k, (x, y) in enumerate(batches(6)):
            used.append('ab'[k % 3 == 2])
            F.cross_entropy(m(x, used[-1]), y).backward()
            p.step(o); o.zero_grad(set_to_none=False)
    rec, names = w.record, list(w.record.layers['update'].layer)
    for j, n in enumerate(names):
        idle = np.array([n[0] in 'ab' and n[0] != u for u in used])
        there = np.array([not math.isnan(r['grad'][n]) for r in p.rows])
        np.testing.assert_allclose(rec['update', 'norm'][there, j], [r['update'][n] for r in np.array(p.rows)[there]], rtol=1e-5, atol=1e-12)
        np.testing.assert_allclose(rec['weight', 'norm'][there, j], [r['weight'][n] for r in np.array(p.rows)[there]], rtol=1e-5)
        np.testing.assert_allclose(rec['grad', 'norm'][~idle, j], [r['grad'][n] for r in np.array(p.rows)[~idle]], rtol=1e-5)
        assert np.isnan(rec['grad', 'norm'][idle, j]).all() and np.isnan(rec['update', 'norm'][~there, j]).all()
        assert (f'{n} (grad)' in rec.meta['not_observed']) == (idle & there).any()
    assert (rec['update', 'norm'][4, names.index('b.weight')] > 0)

@pytest.mark.parametrize('make', [lambda ps: torch.optim.Adafactor(ps, .01), lambda ps: torch.optim.Rprop(ps), lambda ps: torch.optim.NAdam(ps, foreach=True),
                                  lambda ps: torch.optim.Muon([q for q in ps if q.dim() == 2], .01)])
def test_other_optimizers_of_torch(make):
    m = mlp(); o = make(list(m.parameters())); p = Plain(m)
    with watch(m, o) as w:
        for x, y in batches(): F.cross_entropy(m(x), y).backward(); p.step(o); o.zero_grad()
    same(w.record, p)

@pytest.mark.parametrize('when', ['before the loop', 'after the forward pass', 'in the middle'])
def test_a_step_hook_registered_later_that_clips(when):
    m = mlp(); o = SGD(m.parameters(), .1); used = []
    def clip(opt, args, kwargs):
        nn.utils.clip_grad_norm_(m.parameters(), .05)
        used.append(math.sqrt(sum(float(q.grad.norm()) ** 2 for q in m.parameters())))
    with watch(m, o, grad_used=['norm'], window=2) as w:
        for k, (x, y) in enumerate(batches(5)):
            if k == 0 and when == 'before the loop': o.register_step_pre_hook(clip)
            loss = F.cross_entropy(m(x), y)
            if k == 0 and when == 'after the forward pass': o.register_step_pre_hook(clip)
            loss.backward()
            w.grads() if k > 2 else None
            o.step(); o.zero_grad()
            if k == 0 and when == 'in the middle': o.register_step_pre_hook(clip); used.append(math.nan)
    it, first = w.record.iters, 1 if when != 'before the loop' else 0
    np.testing.assert_allclose(it.grad_norm[first:3], used[first:3], rtol=1e-5)
    np.testing.assert_allclose((it.grad_norm * it.clip_factor)[first:], used[first:], rtol=1e-5)
    np.testing.assert_allclose(np.sqrt((w.record['grad_used', 'norm'] ** 2).sum(1))[first:], used[first:], rtol=1e-5)
    assert (it.clip_factor[3:] < .9).all() and (layer(w.record, 'update', '0.weight') > 0).all()
    named = any('clip_factor' in n for n in w.record.meta['not_observed'])
    assert named == (when == 'after the forward pass') == bool(np.isnan(it.grad_norm[0]) and np.isnan(it.clip_factor[0]))

def test_a_step_hook_that_runs_the_model():
    "Sharpness-aware by a hook: what the step consumes is the gradient of the second pass."
    m = mlp(); o = SGD(m.parameters(), .1); ps = list(m.parameters()); want, now = [], []
    def ascend(opt, args, kwargs):
        e = [.05 * q.grad for q in ps]
        with torch.no_grad(): torch._foreach_add_(ps, e)
        o.zero_grad()
        F.cross_entropy(m(now[0]), now[1]).backward()
        with torch.no_grad(): torch._foreach_sub_(ps, e)
        want.append(float(ps[0].grad.norm()))
    with watch(m, o) as w:
        for k, now in enumerate(batches()):
            F.cross_entropy(m(now[0]), now[1]).backward()
            if k == 0: o.register_step_pre_hook(ascend)
            o.step(); o.zero_grad()
    got = layer(w.record, 'grad', '0.weight')
    np.testing.assert_allclose(got[1:], want[1:], rtol=1e-5)
    assert np.isnan(got[0]) and any('clip_factor' in n for n in w.record.meta['not_observed']) and w.record.iters.stepped.all()

@pytest.mark.parametrize('zeroed', [True, False])
def test_the_loss_told_after_the_step(zeroed):
    m = mlp(); o = SGD(m.parameters(), .1); want, gain = [], []
    with watch(m, o, loss_func=F.cross_entropy, placebo=1) as w:
        for k, (x, y) in enumerate(batches(5)):
            out  = m(x); loss = F.cross_entropy(out, y)
            if k == 3: w.loss(loss)
            loss.backward(); o.step()
            if zeroed: o.zero_grad()
            want.append(float(loss.detach())); gain.append(float(F.cross_entropy(out.detach().mean(0, keepdim=True).expand_as(out), y)))
            assert w.loss(loss, out, y) is loss
            if k == 4: w.loss(loss * 2)                                   # told twice: the first counts
            assert len(w.record) == k + 1 if k == 1 else True
    np.testing.assert_allclose(w.record.iters.loss, want, rtol=1e-6)
    assert 'after the step' in w.record.meta['not_observed']['placebo']
    np.testing.assert_allclose(np.delete(w.record.iters.loss_constant.to_numpy(), 3), np.delete(gain, 3), rtol=1e-5)

def test_the_loss_after_the_step_is_not_that_of_a_look():
    m = mlp(); o = SGD(m.parameters(), .1); want = []
    with watch(m, o) as w:
        for x, y in batches():
            m(x)
            loss = F.cross_entropy(m(x), y); loss.backward(); o.step(); o.zero_grad()
            w.loss(loss); want.append(float(loss.detach()))
    np.testing.assert_allclose(w.record.iters.loss, want, rtol=1e-6)

def test_what_is_no_loss_says_what_to_do():
    m = mlp(); o = SGD(m.parameters(), .1); x, y = batches()[0]
    with watch(m, o) as w:
        loss = F.cross_entropy(m(x), y)
        with pytest.raises(TypeError, match=r'the one that is run backwards'): w.loss((loss, dict(more=loss)))
        w.loss(loss).backward(); o.step()
    np.testing.assert_allclose(w.record.iters.loss, float(loss.detach()), rtol=1e-6)

def test_copies_of_what_is_watched_are_free():
    class Whole(SGD):
        def __getstate__(self): return vars(self).copy()                  # torch's own leaves its attributes behind
        def __setstate__(self, state): self.__dict__.update(state)
    globals()['Whole'] = Whole; Whole.__qualname__ = 'Whole'
    m = mlp(); o = Whole(m.parameters(), .1); s = torch.amp.GradScaler('cpu', init_scale=4.); p = Plain(m)
    with watch(m, o, scaler=s) as w:
        for make in (copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))):
            m2, o2, s2 = make((m, o, s))
            x, y = batches()[0]
            s2.scale(F.cross_entropy(m2(x), y)).backward(); s2.step(o2); s2.update(); o2.zero_grad()
            assert all(q.grad is None for q in m2.parameters()) and torch.is_tensor(m2[0].weight)
        for x, y in batches():
            s.scale(F.cross_entropy(m(x), y)).backward(); s.unscale_(o); p.before(); s.step(o); p.after(); s.update(); o.zero_grad()
    same(w.record, p)

def test_evaluation_mode_is_named_only_where_something_acts_by_it():
    m = mlp().eval(); o = SGD(m.parameters(), .1)                        # linear layers and a ReLU: all the same to them
    with watch(m, o) as w:
        for x, y in batches(): F.cross_entropy(m(x), y).backward(); o.step(); o.zero_grad()
    assert w.record.meta['eval_mode'] == {}

def test_a_pass_in_eval_mode_that_leads_to_no_step_is_not_training_in_it():
    "An attack is made in evaluation mode, the step is not."
    m = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(.3), nn.Linear(8, 3)); o = SGD(m.parameters(), .1)
    with watch(m, o) as w:
        for x, y in batches():
            x = x.clone().requires_grad_()
            m.eval(); g, = torch.autograd.grad(F.cross_entropy(m(x), y), x); m.train()
            F.cross_entropy(m((x + .1 * g.sign()).detach()), y).backward(); o.step(); o.zero_grad()
    assert w.record.meta['eval_mode'] == {}
