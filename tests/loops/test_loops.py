"""Every kind of loop against the truth with every probe on, the weights bit-identical to those of the same loop without us; and
loops of random order: forwards, backwards, zero_grads, clips, steps, accumulation, exceptions."""
import copy
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from hypothesis import HealthCheck, given, settings, strategies as st

from fastgradstats import watch
from reference import hooks_on
from plain import Plain, batch, mlp, same

ALL = dict(grad=['norm', 'mean', 'hist'], grad_used=['norm'], weight=['norm'], update=['norm'], grad_output=['norm', 'mean'],
           activation=['mean', 'norm', 'frac_dead', 'hist'], input=['mean'], output=['mean'], sample=None)

def loss_of(m): x, y = batch(); return F.cross_entropy(m(x), y)

def plain(m, o, t, w):
    for _ in range(4): o.zero_grad(); loss_of(m).backward(); t.step(o)
def zero_last(m, o, t, w):
    for _ in range(4): loss_of(m).backward(); t.step(o); o.zero_grad(set_to_none=False)
def never_zeroed(m, o, t, w):
    for _ in range(4): loss_of(m).backward(); t.step(o)
def accumulated(m, o, t, w):
    for _ in range(4):
        for _ in range(3): (loss_of(m) / 3).backward()
        t.step(o); o.zero_grad()
def two_steps(m, o, t, w):
    for _ in range(2): loss_of(m).backward(); t.step(o); t.step(o); o.zero_grad()
def clipped(m, o, t, w):
    for _ in range(4): loss_of(m).backward(); nn.utils.clip_grad_norm_(m.parameters(), .1); t.step(o); o.zero_grad()
def closure(m, o, t, w):
    def c(): o.zero_grad(); l = loss_of(m); l.backward(); t.gradients(); return l
    for _ in range(4): t.before(); o.step(c); t.after()
def by_hand(m, o, t, w):
    for _ in range(4):
        for p, g in zip(m.parameters(), torch.autograd.grad(loss_of(m), list(m.parameters()))): p.grad = g
        t.step(o)
def in_a_loop_of_inner_steps(m, o, t, w):
    for _ in range(3):
        for _ in range(2): m(batch()[0])
        with torch.no_grad(): m(batch()[0])
        m.eval(); m(batch()[0]); m.train()
        loss_of(m).backward(); t.step(o); o.zero_grad()
def two_losses(m, o, t, w):
    for _ in range(3):
        a, b = loss_of(m), loss_of(m)
        a.backward(); b.backward(); t.step(o); o.zero_grad()
def penalty(m, o, t, w):
    for _ in range(3):
        x = batch()[0].requires_grad_(); out = m(x)
        (out.mean() + torch.autograd.grad(out.sum(), x, create_graph=True)[0].norm()).backward(); t.step(o); o.zero_grad()
def some_frozen(m, o, t, w):
    for k in range(4): m[0].requires_grad_(k % 2 == 0); loss_of(m).backward(); t.step(o); o.zero_grad()

def some_frozen_zeroed_in_place(m, o, t, w):
    for k in range(4): m[0].requires_grad_(k % 2 == 0); loss_of(m).backward(); t.step(o); o.zero_grad(set_to_none=False)
def averaged(m, o, t, w):
    mean, copied = torch.optim.swa_utils.AveragedModel(m), copy.deepcopy(m)
    for _ in range(4): loss_of(m).backward(); t.step(o); o.zero_grad(); mean.update_parameters(m); loss_of(mean); loss_of(copied).backward()
def evaluated_between(m, o, t, w):
    for _ in range(4):
        loss = loss_of(m)
        with torch.inference_mode(): m.eval(); m(batch()[0]); m.train(); m(batch()[0])
        m.eval(); loss_of(m); m.train()
        loss.backward(); t.step(o); o.zero_grad()
def adversarial(m, o, t, w):
    for _ in range(4):
        x, y = batch(); x.requires_grad_(); F.cross_entropy(m(x), y).backward(); o.zero_grad()
        F.cross_entropy(m((x + .1 * x.grad.sign()).detach()), y).backward(); t.step(o); o.zero_grad()
def projected(m, o, t, w):
    for _ in range(4):
        out, y = m(batch()[0]), batch()[1]; gs = []
        for loss in (F.cross_entropy(out, y), out.square().mean()):
            o.zero_grad(); loss.backward(retain_graph=True); gs.append([p.grad.clone() for p in m.parameters()])
        o.zero_grad()
        for p, a, b in zip(m.parameters(), *gs): p.grad = a + b
        t.step(o); o.zero_grad()
def run_back_again(m, o, t, w):
    for _ in range(4): loss = loss_of(m); loss.backward(retain_graph=True); o.zero_grad(); (2 * loss).backward(); t.step(o); o.zero_grad()
def run_back_twice(m, o, t, w):
    for _ in range(4): loss = loss_of(m); loss.backward(retain_graph=True); loss.backward(); t.step(o); o.zero_grad()
def left_over(m, o, t, w):
    for _ in range(2):
        for k in range(5):
            (loss_of(m) / 2).backward()
            if k % 2 or k == 4: t.step(o); o.zero_grad()
def fails_before_the_step(m, o, t, w):
    for k in range(5):
        try:
            loss_of(m).backward()
            if k in (1, 3): raise ValueError
            t.step(o)
        except ValueError: pass
        o.zero_grad()
def parts_of_the_parameters(m, o, t, w):
    for k in range(4): loss_of(m).backward(inputs=list(m[2 * (k % 2)].parameters())); t.step(o); o.zero_grad()
def loaded_again(m, o, t, w):
    for k in range(5):
        if k == 2: kept = copy.deepcopy((m.state_dict(), o.state_dict()))
        if k == 4: m.load_state_dict(kept[0]); o.load_state_dict(kept[1])
        loss_of(m).backward(); t.step(o); o.zero_grad()
def in_eval_mode(m, o, t, w):
    m.eval()
    for _ in range(4): loss_of(m).backward(); t.step(o); o.zero_grad()
def clipped_by_a_hook(m, o, t, w):
    loss_of(m).backward(); o.zero_grad(); h = o.register_step_pre_hook(lambda *_: [p.grad.mul_(.5) for p in m.parameters()] and None)
    for _ in range(4): loss_of(m).backward(); halved(m, o, t)
    h.remove()
def halved(m, o, t):
    t.before(); t.grad = {n: .5 * g for n, g in t.grad.items()}; o.step(); t.after(); o.zero_grad()

LOOPS = [some_frozen_zeroed_in_place, averaged, evaluated_between, adversarial, projected, run_back_again, run_back_twice, left_over,
         fails_before_the_step, parts_of_the_parameters, loaded_again, in_eval_mode, clipped_by_a_hook, plain, zero_last, never_zeroed, accumulated, two_steps, clipped, closure, by_hand, in_a_loop_of_inner_steps, two_losses,
         penalty, some_frozen]
OPTS  = dict(sgd=lambda ps: torch.optim.SGD(ps, .1, momentum=.9), adam=lambda ps: torch.optim.Adam(ps, .01),
             fused=lambda ps: torch.optim.AdamW(ps, .01, fused=True))

@pytest.mark.parametrize('opt', OPTS)
@pytest.mark.parametrize('loop', LOOPS, ids=lambda f: f.__name__)
def test_every_loop_is_recorded_truly_and_not_changed(loop, opt):
    ends = []
    for watched in (True, False):
        m = mlp(); o = OPTS[opt](m.parameters()); t = Plain(m)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            with watch(m, o, **ALL) if watched else nullcontext() as w: loop(m, o, t, w)
        ends.append([p.detach().clone() for p in m.parameters()] + [torch.get_rng_state()])
        if watched:
            stale = {n for r in t.rows for n, g in r['grad'].items() if g == 0}     # zeros that nothing has brought
            same(w.record, t, but=stale, rtol=2e-5)
            seen = w.record.iters.bs.to_numpy()[::2 if loop is two_steps else 1]    # every second step has no pass of its own
            assert (seen % 8 == 0).all() and (seen > 0).all()
        assert not hooks_on(m)
    assert all(torch.equal(a, b) for a, b in zip(*ends))


MOVES = ['forward', 'two', 'backward', 'backward', 'step', 'step', 'zero', 'none', 'clip', 'hand', 'idle', 'grad', 'fails', 'raises', 'told', 'eval']

@settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sampled_from(MOVES), min_size=4, max_size=40), st.sampled_from(sorted(OPTS)))
def test_loops_of_random_order(moves, opt):
    m = mlp(); o = OPTS[opt](m.parameters()); t = Plain(m); losses = []; ps = list(m.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with watch(m, o, **ALL) as w:
            for move in moves:
                if   move == 'forward':              losses.append(loss_of(m))
                elif move == 'two':                  losses.append(loss_of(m) + loss_of(m))
                elif move == 'backward' and losses:  losses.pop().backward()
                elif move == 'step':
                    if any(p.grad is not None for p in ps): t.step(o)
                    losses.clear()                              # their graphs are of other weights
                elif move == 'zero':                 o.zero_grad()
                elif move == 'none':                 m.zero_grad()
                elif move == 'clip':                 nn.utils.clip_grad_norm_(ps, .1)
                elif move == 'hand':
                    for p in ps: p.grad = torch.randn_like(p)
                elif move == 'idle':                 m(batch()[0])
                elif move == 'grad' and losses:      torch.autograd.grad(losses[-1], ps, retain_graph=True)
                elif move == 'told' and losses:      w.loss(losses[-1])
                elif move == 'eval':                 m.eval(); m(batch()[0]); m.train()
                elif move == 'raises':
                    h = o.register_step_pre_hook(lambda *_: 1 / 0)
                    with pytest.raises(ZeroDivisionError): o.step()
                    h.remove()
                elif move == 'fails':
                    try: m(torch.randn(2, 5))
                    except RuntimeError: pass
    rec = w.record
    assert rec.iters.stepped.tolist() == [True] * len(t.rows)
    for probe in ('grad', 'update'):
        for j, layer in enumerate(rec.layers[probe].layer):
            for k, row in enumerate(t.rows):
                got, want = rec[probe, 'norm'][k, j], row[probe][layer]
                none = np.isnan(row['grad'][layer]) or probe == 'grad' and want == 0
                assert np.isnan(got) and none or np.isclose(got, want, rtol=2e-5, atol=1e-9), (probe, layer, k)
    assert not hooks_on(m) and 'zero_grad' not in vars(o)
