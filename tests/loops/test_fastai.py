"""What may happen to a Learner in the middle of a fit: its model and layers replaced, another fit within. Each row's gradients
are those that a callback reads just before the step."""
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from fastai.callback.core import Callback, CancelFitException
from fastai.optimizer import OptimWrapper

from fastgradstats import ActivationHistCallback, GradStatsCallback, LayerStatsCallback
from modes import Hooked
from plain import norm
from reference import hooks_on, learner

class Reads(Callback):
    "The norms of all gradients of the model that is stepped, by shape too, as names may stay."
    order, run_valid = 10.6, False
    def __init__(self): self.rd = []
    def before_step(self): self.rd.append({n: norm(p.grad) for n, p in self.learn.model.named_parameters() if p.grad is not None})

def check(learn, reads):
    rec = learn.layer_stats
    assert len(rec) == len(reads.rd) and rec.iters.stepped.all() and rec.iters.iter.tolist() == list(range(len(rec)))
    np.testing.assert_allclose(rec.iters.grad_norm, [np.sqrt(sum(v ** 2 for v in r.values())) for r in reads.rd], rtol=1e-5)
    got, names = rec['grad', 'norm'], list(rec.layers['grad'].layer)
    for k, row in enumerate(reads.rd):
        have = {n.split(':')[0]: got[k, j] for j, n in enumerate(names) if np.isfinite(got[k, j])}
        assert have.keys() == row.keys()
        for n in row: np.testing.assert_allclose(have[n], row[n], rtol=1e-5)
    assert not hooks_on(learn.model)
    return rec

def widened(learn):
    learn.model[2] = nn.Linear(learn.model[2].in_features, 11)
    learn.model[4] = nn.Linear(11, 3)
    learn.create_opt()

def other_model(learn):
    learn.model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))
    learn.create_opt()

@pytest.mark.parametrize('change', [widened, other_model])
@pytest.mark.parametrize('when', ['between fits', 'within a fit'])
def test_layers_and_models_replaced(change, when):
    reads = Reads()
    cbs   = [Hooked('before_batch', change, at=2, order=-5)] if when == 'within a fit' else []
    learn = learner('mlp', [reads, LayerStatsCallback(verbose=False), *cbs])
    learn.fit(1)
    if when == 'between fits': change(learn)
    learn.fit(1)
    rec = check(learn, reads)
    assert any(':1' in n for n in rec.layers['grad'].layer) and np.isfinite(rec['update', 'norm'][-1]).sum() == len(reads.rd[-1])

@pytest.mark.parametrize('event', ['after_batch', 'after_epoch'])
def test_a_fit_within_a_fit(event):
    reads, done = Reads(), []
    class Nested(Callback):
        order = 90
        def _now(self):
            if not done and (event == 'after_epoch' or self.learn.training and self.learn.train_iter == 2):
                done.append(1)
                kept = {n: getattr(self.learn, n) for n in ('epoch', 'n_epoch', 'iter', 'n_iter', 'train_iter', 'dl', 'opt')}
                self.learn.fit(1, reset_opt=False)
                for n, v in kept.items(): setattr(self.learn, n, v)
                self.learn.model.train()
    setattr(Nested, event, Nested._now)
    learn = learner('mlp', [reads, LayerStatsCallback(verbose=False), Nested()])
    learn.fit(2)
    rec = check(learn, reads)
    fits = rec.iters.fit.tolist()
    n = fits.index(1)
    assert set(fits) == {0, 1} and fits[n:n + 5] == [1] * 5 and set(fits[n + 5:]) == {0}
    assert rec.iters.epoch.tolist()[-5:] == [1] * 5

@pytest.mark.parametrize('cbs', [[LayerStatsCallback], [GradStatsCallback, ActivationHistCallback]])
@pytest.mark.parametrize('order', [-40, 90])
@pytest.mark.parametrize('event', ['before_epoch', 'after_train', 'after_epoch'])
@pytest.mark.parametrize('what', ['a fit', 'a validation', 'a fit that is cancelled'])
def test_epochs_are_numbered_by_their_own_fit(what, event, order, cbs):
    "Whatever runs within, and wherever it leaves `learn.epoch`."
    rows, where, losses, ran = [], [], {}, []                                    # where: [fit, epoch], the innermost last
    class Told(Callback):
        order, run_valid = -99, False
        def before_train(self): where[-1][1] += 1
        def before_step(self): rows.append(tuple(where[-1]))
        def after_train(self): losses[tuple(where[-1])] = [float(self.learn.recorder.smooth_loss.value)]
    class Valid(Callback):
        order = 49                                                      # before the Recorder's own
        def after_validate(self):
            if len(losses.get(tuple(where[-1]), ())) == 1: losses[tuple(where[-1])].append(float(self.learn.recorder.loss.value))
    class Cancels(Callback):
        def before_epoch(self):
            if where[-1][1] == 0: raise CancelFitException
    class Nested(Callback):
        busy = False
        def _now(self):
            if self.busy or where[0][0] != 'outer' or ran and 'validation' not in what: return
            self.busy = True
            ran.append(1)
            if what == 'a validation': self.learn.validate()
            else:
                where.append(['inner', -1])
                self.learn.fit(2, reset_opt=False, cbs=[Cancels()] if 'cancelled' in what else [])
                where.pop()
            self.busy = False
    Nested.order = order
    setattr(Nested, event, Nested._now)
    learn = learner('mlp', [*[cb(**dict(verbose=False) if cb is LayerStatsCallback else {}) for cb in cbs], Told(), Valid(), Nested()])
    for k in range(2): where[:] = [['outer' if k == 0 else 'last', -1]]; learn.fit(3 if k == 0 else 1)
    fits = list(dict.fromkeys(f for f, _ in rows))
    rec  = learn.layer_stats
    assert [*zip(rec.iters.fit, rec.iters.epoch)] == [(fits.index(f), e) for f, e in rows]
    assert {*zip(rec.epochs.fit, rec.epochs.epoch)} == {(fits.index(f), e) for f, e in rows}
    assert len(rec.epochs) == len({*rows})
    known = [losses.get((fits[f], e)) for f, e in zip(rec.epochs.fit, rec.epochs.epoch)]
    got   = rec.epochs[['train_loss', 'valid_loss']].to_numpy()
    late  = np.isnan(got).all(1)                                        # the Recorder has forgotten these
    np.testing.assert_allclose(got[~late], np.array([k for k, l in zip(known, late) if not l]), rtol=1e-5)
    assert late.sum() <= len(ran) and late.any() == ('losses and metrics of some epochs' in rec.meta['not_observed'])
    if (event, order) in [('before_epoch', -40), ('after_epoch', 90)]: assert not late.any()

class Several(tuple):
    "What a loss function may answer in fastai: it is cloned, and run backwards."
    def clone(self): return Several(t.clone() for t in self)
    def backward(self): self[0].backward()

@pytest.mark.parametrize('order', [None, -5, 20])
def test_a_loss_function_that_answers_several(order):
    "Made one by a callback before ours, after ours, or never: it trains as without us, and what is not known is named."
    class First(Callback):
        def after_loss(self): self.learn.loss_grad, self.learn.loss = self.learn.loss_grad[0], self.learn.loss[0]
    First.order = order
    ends, losses = [], []
    class Reads(Callback):
        order, run_valid = 99, False
        def after_loss(self): losses.append(float(self.learn.loss if torch.is_tensor(self.learn.loss) else self.learn.loss[0]))
    for ours in (False, True):
        losses.clear()
        f     = lambda p, y: Several((nn.functional.cross_entropy(p, y), p.detach().mean()))
        learn = learner('mlp', [*([First()] if order else []), Reads(), *([LayerStatsCallback(verbose=False)] if ours else [])], loss_func=f)
        if order is None: learn.remove_cbs([cb for cb in learn.cbs if type(cb).__name__ == 'Recorder'])       # it cannot have it either
        learn.fit(1)
        ends.append([p.detach().clone() for p in learn.model.parameters()])
    rec = learn.layer_stats
    assert all(torch.equal(a, b) for a, b in zip(*ends)) and np.isfinite(rec.iters.grad_norm).all() and len(rec) == 5
    if order == -5: np.testing.assert_allclose(rec.iters.loss, losses, rtol=1e-6)
    else:           assert rec.iters.loss.isna().all()
    assert ('loss' in rec.meta['not_observed']) == (order != -5) and 'loss_constant' in rec.meta['not_observed']

@pytest.mark.parametrize('clips', [True, False])
def test_step_hooks_of_torch_within_a_fit(clips):
    "What they make of the gradients is not known; the true ones are, and the updates."
    norms, moved = [], []
    def clip(opt, args, kwargs):
        norms.append(float(nn.utils.clip_grad_norm_([p for g in opt.param_groups for p in g['params']], .05)))
        moved.append([p.detach().clone() for g in opt.param_groups for p in g['params']])
    def moves(opt, args, kwargs): moved[-1] = [norm(p.detach() - q) for p, q in zip([p for g in opt.param_groups for p in g['params']], moved[-1])]
    learn = learner('mlp', LayerStatsCallback(verbose=False, grad_used=['norm']), opt_func=partial(OptimWrapper, opt=torch.optim.SGD))
    learn.create_opt()
    if clips: learn.opt.opt.register_step_pre_hook(clip); learn.opt.opt.register_step_post_hook(moves)
    learn.fit(1)
    rec = learn.layer_stats
    assert rec.iters.clip_factor.isna().all() == clips == ('grad_used, clip_factor' in rec.meta['not_observed'])
    if not clips: np.testing.assert_allclose(rec.iters.clip_factor, 1); return
    assert np.isnan(rec['grad_used', 'norm']).all()
    np.testing.assert_allclose(rec.iters.grad_norm, norms, rtol=1e-5)
    np.testing.assert_allclose(rec['update', 'norm'], moved, rtol=1e-4)
