"""True numbers in every way that people train. Each test trains a small Learner in one mode, or several at once, and compares
the record with an independent reading of the same run (`reference.Spy`)."""
import numpy as np
import pytest
import torch
from torch import nn
from fastai.callback.core import (Callback, CancelBackwardException, CancelBatchException, CancelEpochException,
                                  CancelFitException, CancelStepException, CancelTrainException)
from fastai.callback.fp16 import AMPMode
from fastai.callback.mixup import MixUp
from fastai.callback.tracker import TerminateOnNaNCallback
from fastai.callback.training import GradientAccumulation, GradientClip, ShortEpochCallback
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import Adam, OptimWrapper, RMSProp, SGD

from fastgradstats import GradStatsCallback, LayerStatsCallback
from modes import Blow, CpuPrecision
from reference import REFERENCE, Spy, check, hooks_on, learner, mlp, seed

NAMES = list(REFERENCE)
WHOLE = [s for s in NAMES if 'median' not in s]                         # what can be merged

class Raise(Callback):
    "Raises at one event of the `at`-th training batch (or at its `at`-th firing)."
    def __init__(self, event, error, at=3, order=0):
        super().__init__()
        self.ra_event, self.ra_error, self.ra_at, self.ra_n, self.order = event, error, at, -1, order
    def __call__(self, event):
        if event == self.ra_event and (event in ('before_train', 'after_train', 'before_epoch', 'after_epoch')
                                       or self.learn.training):
            self.ra_n += 1
            if self.ra_n == self.ra_at: raise self.ra_error

def recorded(cbs=(), kind='mlp', *, n=40, bs=8, fit=lambda learn: learn.fit_one_cycle(2), sites=None, stats=None, **kwargs):
    "Train with a Spy and everything measured; the record, the Spy's rows, and the Learner."
    sites = sites or {'mlp': ['1', '3'], 'cnn': ['2', '5']}.get(kind, [])
    spy   = Spy(sites)
    stats = {**dict(grad=NAMES, grad_used=NAMES, weight=NAMES, update=NAMES, activation=WHOLE, grad_output=WHOLE), **(stats or {})}
    learn = learner(kind, [spy, *cbs, LayerStatsCallback(verbose=False, **stats)], n=n, bs=bs, **kwargs)
    fit(learn)
    spy.after_fit()                                                     # after an error or a Ctrl-C
    assert not hooks_on(learn.model)
    return learn.layer_stats, spy.spy_rows, learn


# --- mixed precision -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('kind', ['mlp', 'cnn'])
@pytest.mark.parametrize('mode', ['fp16', 'bf16'])
def test_mixed_precision_gradients_are_unscaled(mode, kind):
    cb = CpuPrecision(AMPMode.FP16, init_scale=2. ** 13, growth_interval=3) if mode == 'fp16' else CpuPrecision(AMPMode.BF16)
    rec, rows, _ = recorded([cb], kind)
    check(rec, rows)
    assert rec.iters.stepped.all() and rec.iters.grad_norm.max() < 10
    assert (rec['grad_output', 'norm'] < 1).all()                       # neither is the gradient of an output scaled

def test_mixed_precision_skipped_step_is_a_row_with_its_non_finite_gradients():
    cbs = lambda: [CpuPrecision(AMPMode.FP16, init_scale=2. ** 10), Blow(2, 6)]
    rec, rows, _ = recorded(cbs(), fit=lambda learn: learn.fit(2))
    check(rec, rows)
    assert rec.iters.stepped.tolist() == [i not in (2, 6) for i in range(10)]
    for k in (2, 6):
        for j, n in enumerate(rec.layers['grad'].layer):
            assert rec['grad', 'frac_nonfinite'][k, j] == np.float32((~np.isfinite(rows[k]['grad'][n])).mean()) > 0
        assert (rec['update', 'norm'][k] == 0).all() and np.isfinite(rec['weight', 'norm'][k]).all()
        assert np.isnan(rec['grad_used', 'norm'][k]).all()

def test_mixed_precision_natural_overflow():
    "A loss scale too large for float16: the first steps are skipped, then the scale has come down."
    rec, rows, _ = recorded([CpuPrecision(AMPMode.FP16, init_scale=2. ** 26)], fit=lambda learn: learn.fit(3))
    check(rec, rows)
    stepped = rec.iters.stepped.tolist()
    assert not any(stepped[:4]) and any(stepped[4:])

def test_mixed_precision_non_finite_counts_of_large_layers_are_exact():
    "A skipped step counts every element, where a sample might miss the one that overflowed."
    wide = lambda: nn.Sequential(nn.Linear(6, 30), nn.ReLU(), nn.Linear(30, 3))
    class Poison(Callback):
        order = 9
        def before_step(self):
            if self.learn.train_iter == 2: self.learn.model[0].weight.grad[7, 1] = np.inf
    spy   = Spy(['1'])
    learn = learner((wide, (6,)), [spy, CpuPrecision(AMPMode.FP16, init_scale=16.), Poison(),
                                   GradStatsCallback(grad=['frac_nonfinite', 'norm'], sample=100)])
    learn.fit(1)
    rec = learn.layer_stats
    k   = rec.iters.stepped.tolist().index(False)
    assert np.isclose(rec['grad', 'frac_nonfinite'][k, 0], 1 / 180) and (rec['grad', 'frac_nonfinite'][k, 1:] == 0).all()

def test_share_of_gradients_that_float16_would_lose():
    class Shrink(nn.Module):
        def forward(self, p, y): return nn.functional.cross_entropy(p, y) * 3e-6
    rec, rows, _ = recorded(loss_func=Shrink())
    check(rec, rows)
    share = rec['grad', 'frac_underflow_fp16']
    assert 0 < share.mean() < 1


# --- accumulation and clipping ---------------------------------------------------------------------------------------
@pytest.mark.parametrize('n_acc, bs', [(16, 8), (24, 8), (20, 8), (7, 8), (16, 5)])
def test_accumulation_one_row_a_step(n_acc, bs):
    "The batch size need not divide n_acc; windows run over the end of an epoch; the last may be unfinished."
    rec, rows, _ = recorded([GradientAccumulation(n_acc)], bs=bs, fit=lambda learn: learn.fit(3))
    check(rec, rows)
    assert rec.iters.n_accum.sum() == 3 * -(-40 // bs)

def test_accumulation_unfinished_window_is_a_row_and_its_gradient_goes_on():
    rec, rows, _ = recorded([GradientAccumulation(24)], fit=lambda learn: (learn.fit(1), learn.fit(1)))
    check(rec, rows)
    assert rec.iters.stepped.tolist() == [True, False, True, False] and rec.iters.n_accum.tolist() == [3, 2, 3, 2]
    assert np.isnan(rec['grad', 'norm'][[1, 3]]).all() and np.isfinite(rec['activation', 'mean'][[1, 3]]).all()

def test_accumulation_of_a_branch_used_in_one_micro_batch_only():
    class Branching(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b, self.n = nn.Linear(6, 3), nn.Linear(6, 3), 0
        def forward(self, x):
            if self.training: self.n += 1
            return self.b(x) if self.training and self.n % 4 == 1 else self.a(x)
    rec, rows, _ = recorded([GradientAccumulation(16)], (Branching, (6,)), sites=['a', 'b'], fit=lambda learn: learn.fit(4))
    check(rec, rows)
    used = np.isfinite(rec['grad', 'norm'])
    b    = rec.layers['grad'].layer.tolist().index('b.weight')
    assert used[:, b].any() and not used[:, b].all()                    # a stale zero is not a vanished gradient

def test_accumulation_with_every_second_row():
    spy   = Spy(['1', '3'])
    learn = learner('mlp', [spy, GradientAccumulation(16), LayerStatsCallback(every=2, grad_output=WHOLE, verbose=False)])
    learn.fit(4)
    check(learn.layer_stats, spy.spy_rows)
    assert learn.layer_stats.iters.measured.tolist() == [True, False] * 5

def test_clipping_factor_true_and_used_gradient():
    rec, rows, _ = recorded([GradientClip(.2)], 'cnn')
    check(rec, rows)
    assert (rec.iters.clip_factor < 1).any()
    used = np.sqrt((rec['grad_used', 'norm'].astype(float) ** 2).sum(1))
    np.testing.assert_allclose(used, rec.iters.grad_norm * rec.iters.clip_factor, rtol=1e-4)

@pytest.mark.parametrize('order', [11, 12, 100])
def test_a_late_callback_that_changes_gradients_is_seen(order):
    class Halve(Callback):
        def before_step(self):
            for p in self.learn.model.parameters(): p.grad.data.mul_(.5)
    Halve.order = order
    rec, rows, _ = recorded([Halve()])
    check(rec, rows)
    np.testing.assert_allclose(rec.iters.clip_factor, .5, rtol=1e-5)

def test_clipping_and_accumulation():
    rec, rows, _ = recorded([GradientClip(.1), GradientAccumulation(16)], fit=lambda learn: learn.fit(4))
    check(rec, rows)
    assert (rec.iters.clip_factor < 1).all() and len(rec) == 10

def test_mixed_precision_clipping_and_accumulation_with_a_skipped_step():
    rec, rows, _ = recorded([CpuPrecision(AMPMode.FP16, init_scale=2. ** 12), GradientClip(.1), GradientAccumulation(16), Blow(5)],
                            'cnn', fit=lambda learn: learn.fit(4))
    check(rec, rows)
    assert rec.iters.stepped.tolist() == [i != 2 for i in range(10)] and (rec.iters.n_accum == 2).all()
    assert (rec['grad', 'frac_nonfinite'][2] > 0).any()


# --- a learner's whole life ------------------------------------------------------------------------------------------
class Split(nn.Sequential): pass

def _split(model): return [list(model[0].parameters()), list(model[2].parameters()), list(model[4].parameters())]

def test_fine_tune_frozen_layers_are_nan_then_measured():
    rec, rows, learn = recorded(fit=lambda learn: learn.fine_tune(2), splitter=_split)
    check(rec, rows)
    frozen = rec.iters.fit.to_numpy() == 0
    names  = rec.layers['grad'].layer.tolist()
    head   = [n.startswith('4') for n in names]
    for key in (('grad', 'norm'), ('update', 'norm'), ('weight', 'norm'), ('update', 'lr'), ('grad', 'frac_zero')):
        assert np.isnan(rec[key][frozen][:, ~np.array(head)]).all() and np.isfinite(rec[key][frozen][:, head]).all()
        assert np.isfinite(rec[key][~frozen]).all()

def test_freeze_to_unfreeze_and_freeze_again():
    def life(learn):
        learn.fit(1); learn.freeze_to(1); learn.fit(1); learn.freeze(); learn.fit(1); learn.unfreeze(); learn.fit(1)
    rec, rows, _ = recorded(fit=life, splitter=_split)
    check(rec, rows)
    assert np.isfinite(rec['grad', 'norm']).reshape(4, 5, 6).all(1).sum(1).tolist() == [6, 4, 2, 6]

def test_discriminative_learning_rates_and_schedules():
    seen = []
    class Rates(Callback):
        run_valid = False
        def before_step(self): seen.append(([h['lr'] for h in self.learn.opt.hypers], self.learn.opt.hypers[-1]['mom']))
    rec, rows, _ = recorded([Rates()], fit=lambda learn: learn.fit_one_cycle(2, lr_max=slice(1e-3, 1e-1)), splitter=_split)
    check(rec, rows)
    group = [int(n[0]) // 2 for n in rec.layers['update'].layer]
    np.testing.assert_allclose(rec['update', 'lr'], [[lrs[g] for g in group] for lrs, _ in seen], rtol=1e-6)
    np.testing.assert_allclose(rec.iters.lr,  [lrs[-1] for lrs, _ in seen])
    np.testing.assert_allclose(rec.iters.mom, [mom for _, mom in seen])
    assert rec.frame(('update', 'lr')).lr.nunique() > 20

def test_stale_zero_gradients_of_an_unused_branch_are_nan():
    class Half(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b, self.n = nn.Linear(6, 3), nn.Linear(6, 3), 0
        def forward(self, x):
            self.n += self.training
            return self.a(x) if self.n > 5 else self.a(x) + self.b(x)
    rec, rows, _ = recorded(kind=(Half, (6,)), sites=['a', 'b'])
    check(rec, rows)
    b = rec.layers['grad'].layer.tolist().index('b.weight')
    assert np.isfinite(rec['grad', 'norm'][:5, b]).all() and np.isnan(rec['grad', 'norm'][5:, b]).all()
    assert (rec['update', 'norm'][5:, b] > 0).all() and 'b.weight (grad)' in rec.meta['not_observed']      # momentum goes on

def test_unfrozen_in_the_middle_of_an_epoch():
    class Thaw(Callback):
        def before_batch(self):
            if self.learn.train_iter == 2: self.learn.unfreeze()
    rec, rows, _ = recorded([Thaw()], fit=lambda learn: (learn.freeze(), learn.fit(2)), splitter=_split)
    check(rec, rows)
    assert np.isfinite(rec['grad', 'norm'][:, 0]).tolist() == [False] * 2 + [True] * 8

def test_short_epochs():
    rec, rows, _ = recorded([ShortEpochCallback(.5)], fit=lambda learn: learn.fit(3))
    check(rec, rows)
    assert rec.iters.groupby('epoch').size().tolist() == [4, 4, 4] and rec.iters.stepped.all()

def test_start_epoch():
    rec, rows, _ = recorded(fit=lambda learn: (learn.fit(3, start_epoch=1), learn.fit(2, start_epoch=1)))
    check(rec, rows)
    assert rec.iters.groupby(['fit', 'epoch']).size().index.tolist() == [(0, 1), (0, 2), (1, 1)]
    assert rec.epochs[['fit', 'epoch']].to_numpy().tolist() == [[0, 1], [0, 2], [1, 1]]

def test_mixup():
    rec, rows, _ = recorded([MixUp(.4)], loss_func=CrossEntropyLossFlat())
    check(rec, rows)
    assert rec.iters.loss_constant.notna().all()


# --- Adam's epsilon --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('name, opt, eps', [
    ('fastai Adam', Adam, 1e-5), ('fastai Adam, own eps', lambda ps, lr: Adam(ps, lr, eps=1e-2), 1e-2),
    ('fastai RMSProp', lambda ps, lr: RMSProp(ps, lr, sqr_mom=.99), 1e-8),
    ('torch Adam', lambda ps, lr: OptimWrapper(ps, torch.optim.Adam, eps=1e-3), 1e-3),
    ('torch AdamW', lambda ps, lr: OptimWrapper(ps, torch.optim.AdamW), 1e-8),
    ('fastai SGD', SGD, None), ('torch SGD', lambda ps, lr: OptimWrapper(ps, torch.optim.SGD), None)])
def test_share_of_gradients_below_the_optimizers_eps(name, opt, eps):
    rec, rows, _ = recorded(opt_func=opt, stats=dict(grad=['frac_below_eps', 'norm'], grad_used=['frac_below_eps']))
    check(rec, rows)
    for probe in ('grad', 'grad_used'):
        got = rec[probe, 'frac_below_eps']
        if eps is None: assert np.isnan(got).all(); continue
        want = [[(np.abs(r[probe][n]) < eps).mean() for n in rec.layers[probe].layer] for r in rows]
        np.testing.assert_allclose(got, want, atol=1e-6)
    if eps == 1e-2: assert 0 < rec['grad', 'frac_below_eps'].mean() < 1


# --- interrupted -----------------------------------------------------------------------------------------------------
CANCELS = [CancelBatchException, CancelBackwardException, CancelStepException, CancelTrainException, CancelEpochException,
           CancelFitException]
EVENTS  = ['before_batch', 'after_pred', 'after_loss', 'before_backward', 'after_backward', 'before_step', 'after_step',
           'after_batch']

def _try(learn, *args):
    try: learn.fit(*args)
    except (RuntimeError, KeyboardInterrupt, ValueError, CancelStepException, CancelBackwardException, CancelBatchException): pass

@pytest.mark.parametrize('order', [-50, 8, 20])
@pytest.mark.parametrize('error', CANCELS)
def test_cancelled_by_another_callback_at_every_event(error, order):
    "Steps that were taken are rows with true numbers; nothing is counted twice; the Learner goes on."
    for event in EVENTS:
        cb = Raise(event, error(), order=order)
        rec, rows, learn = recorded([cb], fit=lambda learn: (_try(learn, 2), _try(learn, 1)), stats=dict(grad_output=['norm']))
        got, want = rec.iters[rec.iters.stepped], [r for r in rows if r['stepped']]
        assert len(got) == len(want), event
        at = [k for k, s in enumerate(rec.iters.stepped) if s]
        for k, r in zip(at, want):
            np.testing.assert_allclose(rec.iters.bs[k] * rec.iters.loss[k], r['bs'] * r['loss'], rtol=1e-5, err_msg=event)
            for j, n in enumerate(rec.layers['grad'].layer):
                for probe in ('grad', 'update', 'weight'):
                    have = r['grad_used'].get(n) if probe == 'grad' else r[probe].get(n)
                    v    = rec[probe, 'norm'][k, j]
                    if have is None: assert np.isnan(v), (event, n, probe)
                    else: np.testing.assert_allclose(v, np.linalg.norm(have.ravel()), rtol=1e-4, atol=1e-12, err_msg=f'{event} {n} {probe}')
        assert rec.iters.iter.is_unique and rec.iters.iter.is_monotonic_increasing
        assert rec.iters.fit.iloc[-1] == 1 and rec.iters.stepped.iloc[-1]

@pytest.mark.parametrize('event', ['before_epoch', 'before_train', 'after_train', 'after_epoch'])
@pytest.mark.parametrize('error', [CancelTrainException, CancelEpochException, CancelFitException])
def test_cancelled_between_epochs(event, error):
    def life(learn):
        try: learn.fit(3)
        except (CancelTrainException, CancelEpochException): pass        # raised where fastai does not expect it
        learn.fit(1)
    rec, rows, _ = recorded([Raise(event, error(), at=1, order=20)], fit=life)
    check(rec, rows)
    assert rec.iters.stepped.all() and rec.iters.fit.iloc[-1] == 1

def test_terminate_on_nan_keeps_the_row_of_the_nan():
    class NaNLoss(Callback):
        order, run_valid = -99, False
        def after_loss(self):
            if self.learn.train_iter == 3 and self.learn.epoch == 0:
                self.learn.loss_grad = self.learn.loss_grad * np.nan
                self.learn.loss = self.learn.loss * np.nan
    rec, rows, learn = recorded([NaNLoss(), TerminateOnNaNCallback()], fit=lambda learn: learn.fit(2))
    assert len(rec) == 4 and np.isnan(rec.iters.loss.iloc[-1])
    assert (rec['grad', 'frac_nonfinite'][-1] > 0).all() and (rec['grad', 'frac_nonfinite'][:-1] == 0).all()
    check(rec, rows)

class Breaking(nn.Module):
    def __init__(self, error): super().__init__(); self.body, self.error, self.n = mlp(), error, 0
    def forward(self, x):
        h = self.body[:2](x)
        self.n += self.training
        if self.n == 4: raise self.error
        return self.body[2:](h)

class BreakingLoss:
    def __init__(self, error): self.n, self.error = 0, error
    def __call__(self, p, y):
        self.n += torch.is_grad_enabled()
        if self.n == 4: raise self.error
        return nn.functional.cross_entropy(p, y)

@pytest.mark.parametrize('error', [RuntimeError('broken'), KeyboardInterrupt()], ids=['error', 'ctrl_c'])
@pytest.mark.parametrize('where', ['model', 'loss', 'callback'])
def test_interrupted_in_the_middle_of_a_batch(where, error):
    "The record goes up to the last completed iteration; the same callbacks record the next fit and another Learner."
    cbs  = [Raise('before_backward', error, order=20)] if where == 'callback' else []
    make = (lambda: Breaking(error)) if where == 'model' else mlp
    loss = BreakingLoss(error) if where == 'loss' else nn.CrossEntropyLoss()
    cb   = LayerStatsCallback(verbose=False, grad=NAMES)
    seed()
    learn = learner((make, (6,)), [*cbs, cb], loss_func=loss)
    with pytest.raises(type(error)): learn.fit(2)
    assert not hooks_on(learn.model)
    first = learn.layer_stats
    assert first.iters.iter.tolist() == [0, 1, 2] and first.iters.stepped.all()
    spy = Spy([])
    learn.add_cb(spy)
    learn.fit(1)
    rec = learn.layer_stats
    assert rec.iters.fit.tolist() == [0] * 3 + [1] * 5 and rec.iters.stepped.all() and not hooks_on(learn.model)
    for r, k in zip(spy.spy_rows, range(3, 8)):
        for j, n in enumerate(rec.layers['grad'].layer):
            np.testing.assert_allclose(rec['grad', 'norm'][k, j], np.linalg.norm(r['grad'][n].ravel()), rtol=1e-4)
    other = learner('cnn', cb)
    other.fit(1)
    assert len(other.layer_stats) == 5 and len(learn.layer_stats) == 8

def test_interrupted_while_accumulating():
    rec, rows, _ = recorded([GradientAccumulation(24), Raise('after_pred', KeyboardInterrupt(), at=4, order=20)],
                            fit=lambda learn: (_try(learn, 2), learn.fit(3)))
    assert rec.iters.stepped.tolist() == [True, False, True, True, True, True, True]
    assert rec.iters.n_accum.tolist()[:2] == [3, 1]

def test_interrupted_before_the_first_step_records_nothing_and_goes_on():
    rec, rows, _ = recorded([Raise('after_pred', RuntimeError('x'), at=0)], fit=lambda learn: (_try(learn, 1), learn.fit(1)))
    assert len(rec) == 5 and rec.iters.fit.nunique() == 1
