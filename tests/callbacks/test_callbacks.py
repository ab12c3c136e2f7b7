"What the callbacks promise: training is not changed, nothing is left behind, one record over a Learner's whole life."
import copy
import json
import pickle
import random
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.training import GradientAccumulation
import fastai.callback.hook  # noqa: F401  (gives Learner its summary)
from fastai.learner import load_learner
from fastai.losses import CrossEntropyLossFlat

from fastgradstats import (ActivationHistCallback, DeadUnitCallback, DiagnosisCallback, GradStatsCallback, LayerStatsCallback,
                           Record, diagnose, statistic, watch)
from fastgradstats.measure.plan import DEFAULTS, Plan
from fastgradstats.measure.probes import PROBES
from fastgradstats.measure.watcher import Watcher
from modes import EVERY, Hooked, waits
from reference import (MODELS, REFERENCE, Spy, check, cnn, hooks_on, learner, mlp, same_states, seed, states)

ALL   = [LayerStatsCallback, GradStatsCallback, ActivationHistCallback, DeadUnitCallback]
# --- training is not changed -----------------------------------------------------------------------------------------
def _trained(kind, cbs, fit):
    learn = learner(kind, cbs)
    fit(learn)
    return [v.clone() for v in learn.model.state_dict().values()], states()

@pytest.mark.parametrize('kind', MODELS)
def test_weights_and_random_states_are_bit_identical(kind):
    fit = lambda learn: (learn.fit_one_cycle(2), learn.validate(), learn.fit(1))
    bare, after = _trained(kind, None, fit)
    for cbs in ([LayerStatsCallback(verbose=False, **EVERY)], [c(verbose=False) for c in ALL]):
        seen, then = _trained(kind, cbs, fit)
        assert all(torch.equal(a, b) for a, b in zip(bare, seen))
        assert same_states(after, then)

def test_a_statistic_that_draws_random_numbers_does_not_change_training():
    def noisy(x):
        return x.mean() + torch.rand(()) + random.random() + np.random.rand()
    bare, after = _trained('cnn', None, lambda learn: learn.fit(2))
    seen, then  = _trained('cnn', GradStatsCallback(grad=['norm', noisy]), lambda learn: learn.fit(2))
    assert all(torch.equal(a, b) for a, b in zip(bare, seen)) and same_states(after, then)

class NoisyLoss(nn.Module):
    def forward(self, pred, y): return nn.functional.cross_entropy(pred + .1 * torch.randn_like(pred), y)

class BufferLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer('seen', torch.zeros(()), persistent=False)
    def forward(self, pred, y):
        self.seen += 1
        return nn.functional.cross_entropy(pred, y) * (1 + self.seen / 10)

class CountingLoss:
    def __init__(self): self.n, self.past = 0, []
    def __call__(self, pred, y):
        self.n += 1
        self.past.append(self.n)
        return nn.functional.cross_entropy(pred, y) * (1 + len(self.past) / 10)

class PythonNoiseLoss(nn.Module):
    def forward(self, pred, y): return nn.functional.cross_entropy(pred, y) * (1 + random.random())

@pytest.mark.parametrize('loss', [NoisyLoss, BufferLoss, CountingLoss, PythonNoiseLoss])
def test_a_loss_with_state_or_random_numbers_does_not_change_training(loss):
    def train(cbs):
        learn = learner('cnn', cbs, loss_func=loss())
        learn.fit(2)
        return learn, [v.clone() for v in learn.model.state_dict().values()], states()
    _, bare, after    = train(None)
    learn, seen, then = train(LayerStatsCallback(verbose=False))
    assert all(torch.equal(a, b) for a, b in zip(bare, seen)) and same_states(after, then)
    measured = learn.layer_stats.iters.loss_constant.notna()
    if loss is NoisyLoss: assert measured.all()
    else:                 assert not measured.any() and 'loss_constant' in learn.layer_stats.meta['not_hooked']


# --- the numbers -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('kind', ['mlp', 'cnn'])
def test_every_statistic_of_a_fit_equals_an_independent_reading(kind):
    sites = {'mlp': ['1', '3'], 'cnn': ['2', '5']}[kind]
    names = [s for s in REFERENCE]
    whole = [s for s in names if s not in ('median', 'abs_median')]
    spy   = Spy(sites)
    learn = learner(kind, [spy, LayerStatsCallback(grad=names, grad_used=names, weight=names, update=names, activation=whole,
                                                   grad_output=whole, verbose=False)])
    learn.fit_one_cycle(2)
    assert check(learn.layer_stats, spy.spy_rows) > 1000

def test_a_relu6_rests_at_zero_and_saturates_at_six():
    def saturated(bias):
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU6(), nn.Linear(8, 3))
        nn.init.constant_(model[0].bias, bias)
        with watch(model, torch.optim.SGD(model.parameters(), 1e-3), activation=['frac_saturated']) as w:
            for _ in range(8): w.loss(model(torch.rand(16, 4)).square().mean()).backward(); w.opt.step(); w.opt.zero_grad()
        return w.record['activation', 'frac_saturated'], [f.rule for f in diagnose(w.record).findings]
    rests, nothing  = saturated(-9.)
    at_six, finding = saturated(9.)
    assert (rests == 0).all() and 'saturated' not in nothing and (at_six == 1).all() and 'saturated' in finding

def test_loss_constant_and_gain_equal_an_own_computation():
    class Own(Callback):
        run_valid = False
        def before_fit(self): self.learn.own = []
        def after_loss(self):
            mean = self.learn.pred.detach().double().mean(0, keepdim=True).expand(len(self.learn.pred), -1)
            self.learn.own.append(float(nn.functional.cross_entropy(mean, self.learn.yb[0])))
    learn = learner('mlp', [Own(), LayerStatsCallback(verbose=False)], loss_func=CrossEntropyLossFlat())
    learn.fit(2)
    it = learn.layer_stats.iters
    np.testing.assert_allclose(it.loss_constant, learn.own, rtol=1e-5)
    np.testing.assert_allclose(it.gain, it.loss_constant - it.loss)

def test_loss_constant_is_nan_and_named_where_it_cannot_be_measured():
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.body = mlp()
        def forward(self, x): return self.body(x), x
    learn = learner(((lambda: Two()), (6,)), LayerStatsCallback(verbose=False),
                    loss_func=lambda p, y: nn.functional.cross_entropy(p[0], y))
    with pytest.warns(UserWarning, match='loss_constant'): learn.fit(1)
    assert learn.layer_stats.iters.loss_constant.isna().all()
    assert 'loss_constant' in learn.layer_stats.meta['not_hooked']


# --- where and how they are given ------------------------------------------------------------------------------------
@pytest.mark.parametrize('give', ['learner', 'fit', 'class', 'class in fit', 'add_cb', 'list'])
def test_given_as_every_fastai_callback(give):
    cls   = LayerStatsCallback
    learn = learner('mlp', dict(learner=cls(verbose=False), list=[cls(verbose=False), GradStatsCallback])
                    .get(give, cls if give == 'class' else None))
    if give == 'add_cb': learn.add_cb(cls())
    learn.fit(1, cbs={'fit': cls(verbose=False), 'class in fit': cls}.get(give))
    assert len(learn.layer_stats) == 5 and learn.layer_stats['grad', 'norm'].shape == (5, 6)
    learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, cls)])
    assert len(learn.layer_stats) == 5                                # it outlives the callbacks
    assert not hooks_on(learn.model)

def test_layer_stats_is_none_before_anything_was_recorded():
    learn = learner('mlp')
    assert learn.layer_stats is None
    learn.add_cb(LayerStatsCallback())
    assert learn.layer_stats is None
    with pytest.raises(ValueError, match='nothing yet: call learn.fit'): learn.layer_stats_callback.record

def test_a_detached_callback_says_where_the_record_is():
    cb = LayerStatsCallback(verbose=False)
    learner('mlp').fit(1, cbs=cb)
    with pytest.raises(ValueError, match='learn.layer_stats, which outlives it'): cb.record

def test_two_of_a_class_are_refused():
    learn = learner('mlp', [GradStatsCallback(), GradStatsCallback()])
    with pytest.raises(ValueError, match='2 GradStatsCallback on one Learner'): learn.fit(1)
    learn = learner('mlp', GradStatsCallback())
    with pytest.raises(ValueError, match='2 GradStatsCallback on one Learner'): learn.fit(1, cbs=GradStatsCallback())
    assert not hooks_on(learn.model)
    learn.fit(1)
    assert len(learn.layer_stats) == 5

def test_parts_and_the_umbrella_join_into_one_record():
    learn = learner('mlp', [GradStatsCallback(grad=['norm', 'mean']), ActivationHistCallback(),
                            DeadUnitCallback(), LayerStatsCallback(grad=['norm', 'max'], verbose=False)])
    learn.fit(2)
    rec = learn.layer_stats
    assert isinstance(rec, Record) and len(rec) == 10 and rec.iters.iter.tolist() == list(range(10))
    assert {('grad', 'mean'), ('grad', 'max'), ('activation', 'hist'), ('activation', 'frac_dead'), ('input', 'mean')} <= set(rec.keys())
    alone = learner('mlp', LayerStatsCallback(grad=['norm', 'mean', 'max'], verbose=False))
    alone.fit(2)
    for key in alone.layer_stats.keys(): np.testing.assert_array_equal(rec[key], alone.layer_stats[key], str(key))

def test_numbers_of_fits_and_iterations_run_over_the_learners_life():
    learn = learner('mlp', LayerStatsCallback(verbose=False))
    learn.fit(2); learn.fit_one_cycle(1); learn.fine_tune(1); learn.fit(1, cbs=GradStatsCallback)
    it = learn.layer_stats.iters
    assert it.iter.tolist() == list(range(len(it))) and len(it) == 30
    assert it.groupby('fit').size().tolist() == [10, 5, 5, 5, 5]
    assert it.epoch.tolist() == [0] * 5 + [1] * 5 + [0] * 20
    assert list(learn.layer_stats.epochs[['fit', 'epoch']].itertuples(index=False, name=None)) == [
        (0, 0), (0, 1), (1, 0), (2, 0), (3, 0), (4, 0)]

def test_a_callback_given_to_every_fit_makes_one_record():
    learn = learner('mlp')
    cb    = GradStatsCallback()
    learn.fit(1, cbs=cb); learn.fit(1, cbs=cb); learn.fit(1, cbs=GradStatsCallback)
    assert learn.layer_stats.iters.fit.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert np.isfinite(learn.layer_stats['grad', 'norm']).all()

def test_validation_losses_and_metrics_of_every_epoch():
    acc   = lambda p, y: (p.argmax(1) == y).float().mean()
    acc.__name__ = 'hits'
    learn = learner('mlp', LayerStatsCallback(verbose=False), metrics=acc)
    want  = []
    learn.logger = lambda row: want.append(list(row))
    learn.fit(3)
    want = [r for r in want if not isinstance(r[0], str)]
    ep   = learn.layer_stats.epochs
    assert list(ep.columns) == ['fit', 'epoch', 'train_loss', 'valid_loss', 'hits']
    np.testing.assert_allclose(ep[['train_loss', 'valid_loss', 'hits']], [r[1:4] for r in want])

def test_every_as_a_number_and_as_a_function():
    for every, want in ((3, [0, 3, 6, 9]), (lambda i: i in (1, 2, 8), [1, 2, 8]), (100, [0])):
        spy   = Spy(['1', '3'])
        learn = learner('mlp', [spy, LayerStatsCallback(every=every, grad_output=['norm'], verbose=False)])
        learn.fit(2)
        rec = learn.layer_stats
        assert np.flatnonzero(rec.iters.measured).tolist() == want and rec.iters.loss.notna().all()
        check(rec, spy.spy_rows)

def test_modules_by_glob_class_list_and_predicate():
    def layers(probe='activation', **kw):
        learn = learner('cnn', LayerStatsCallback(verbose=False, **kw))
        learn.fit(1)
        return learn.layer_stats.layers[probe].layer.tolist()
    assert layers() == ['2', '5']
    assert layers(modules='[23]') == ['2'] and layers(modules='4') == ['4']
    assert layers(modules=nn.Conv2d) == ['0', '4']
    assert layers(modules=[nn.Conv2d, nn.BatchNorm2d]) == ['0', '1', '4']
    assert layers(modules=lambda n, m: n in ('5', '7')) == ['5', '7']
    learn = learner('cnn')
    learn.fit(1, cbs=ActivationHistCallback(modules=[learn.model[4], learn.model[5]]))
    assert learn.layer_stats.layers['activation'].layer.tolist() == ['4', '5']

def test_a_unit_dim_that_an_output_has_not_is_told_once_and_its_own_axis_is_read():
    def fit(kind, unit_dim):
        learn = learner(kind, LayerStatsCallback(unit_dim=unit_dim, verbose=False))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter('always')
            learn.fit(5)
        return learn.layer_stats, [str(w.message) for w in told if 'unit_dim' in str(w.message)]
    (own, nothing), (wrong, told) = fit('cnn', None), fit('cnn', 9)
    assert not nothing and len(told) == 2 and 'unit_dim=9 is not an axis of 2, whose output has 4; its units are read on axis 1' in told[0]
    assert own.units.equals(wrong.units) and len(own.units.unit.unique()) == 6
    assert fit('mlp', -1)[1] == [] and len(fit('mlp', 2)[1]) == 2

@pytest.mark.parametrize('modules', ['[23]', nn.ReLU, nn.Linear])
def test_modules_chooses_where_activations_are_read_and_no_parameters(modules):
    def fit(**kw):
        learn = learner('cnn', [GradientAccumulation(16), LayerStatsCallback(verbose=False, **kw)])
        learn.fit(1)
        return learn.layer_stats
    all_, some = fit(), fit(modules=modules)
    assert len(some) == 3 and some.layers['grad'].equals(all_.layers['grad'])
    np.testing.assert_array_equal(some.iters.grad_norm, all_.iters.grad_norm)
    np.testing.assert_array_equal(some['grad', 'norm'], all_['grad', 'norm'])

@pytest.mark.parametrize('wrong, match', [('body.*', "matches no layer of this Sequential; its layers are 0, 1"),
                                          (nn.LSTM, 'matches no layer'), ((lambda n, m: False), 'matches no layer')])
def test_modules_that_match_nothing_are_named(wrong, match):
    learn = learner('mlp', LayerStatsCallback(modules=wrong))
    with pytest.raises(ValueError, match=match): learn.fit(1)
    assert not hooks_on(learn.model)

@pytest.mark.parametrize('kw, error, match', [
    (dict(grad=['nrm']), ValueError, "'nrm' is not a statistic"), (dict(every=0), ValueError, 'every is a whole number'),
    (dict(every='often'), ValueError, 'every is'), (dict(every=True), ValueError, 'every is'),
    (dict(every=1.5), ValueError, 'every is'), (dict(sample=1), ValueError, 'sample is'),
    (dict(window=0), ValueError, 'window is'), (dict(modules=3), TypeError, 'modules is a glob'),
    (dict(modules=[]), TypeError, 'modules is a glob'), (dict(grad=[3]), TypeError, 'a statistic is a name'),
    (dict(grad=3), TypeError, 'statistic'), (dict(grad=['norm', 'norm']), ValueError, 'given twice'),
    (dict(grad=['frac_dead']), ValueError, 'belongs to activation'), (dict(unit_dim='a'), ValueError, 'unit_dim is'),
    ({p: None for p in PROBES}, ValueError, 'nothing to measure'), (dict(grads=['norm']), TypeError, 'grads'),
    (dict(grads=['norm']), TypeError, "'grads' is not an argument of LayerStatsCallback. Did you mean 'grad'[?] There are grad, "),
    (dict(norm=True), TypeError, r"It is a statistic, given where it is measured: activation=\['norm'\]. There are"),
    (dict(with_hist=True), TypeError, "'with_hist' is not an argument of LayerStatsCallback. There are"),
    (dict(verbose=3), ValueError, 'verbose is True or False; got 3'), (dict(per_call='yes'), ValueError, 'per_call is True or'),
    (dict(unit_dim=True), ValueError, 'unit_dim is'), (dict(every=lambda: True), ValueError, 'every is'),
    (dict(modules=lambda m: True), TypeError, 'modules is a glob'), (dict(grad=False), TypeError, 'grad is a list of statistics, None'),
    (dict(modules='*', activation=None), ValueError, 'modules chooses where activation and grad_output are read')])
def test_bad_arguments_raise_before_an_epoch_is_spent(kw, error, match):
    with pytest.raises(error, match=match): LayerStatsCallback(**kw)
    with pytest.raises(TypeError if 'verbose' in kw else error): watch(mlp(), torch.optim.SGD(mlp().parameters()), **kw)

def test_arguments_of_the_presets_are_checked_in_their_own_name():
    for cls in (GradStatsCallback, ActivationHistCallback, DeadUnitCallback):
        with pytest.raises(TypeError, match=f"'sampel' is not an argument of {cls.__name__}. Did you mean 'sample'"): cls(sampel=1)
    with pytest.raises(TypeError, match="of DiagnosisCallback. Did you mean 'stop_on'"): DiagnosisCallback(stop=1)
    for kw, match in ((dict(stop_on=len), 'is not a rule'), (dict(rules='starved'), 'rules is a list of rules'),
                      (dict(rules=['starved']), 'rules is a list of rules'), (dict(check=0), 'check is a whole number'),
                      (dict(every=lambda i: True), 'every is a whole number')):
        with pytest.raises((TypeError, ValueError), match=match): DiagnosisCallback(**kw)

def test_whole_numbers_of_numpy_are_taken():
    cb = LayerStatsCallback(every=np.int64(2), window=np.int32(3), sample=np.int64(500), unit_dim=np.int64(1), per_call=np.bool_(False))
    assert json.dumps(cb.layer_plan.describe()) and cb.layer_plan.due(2, 0) and not cb.layer_plan.due(3, 0)
    assert cb.layer_plan.describe() == LayerStatsCallback(every=2, window=3, sample=500, unit_dim=1).layer_plan.describe()

def test_nothing_measured_is_told_and_no_layer_is_blamed():
    def told(every):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter('always')
            learn = learner('mlp')
            learn.fit(2, cbs=LayerStatsCallback(every=every, verbose=False)); learn.fit(1)
        return [str(w.message) for w in found if 'fastgradstats' in str(w.message)], learn.layer_stats
    def never(i): return i > 99
    texts, rec = told(never)
    assert texts == ['fastgradstats: nothing was measured: every=never was true at none of the 10 iterations, which are numbered from 0']
    assert len(rec) == 10 and not rec.meta['not_hooked']
    assert told(lambda i: i == 9)[0] == []

class Bare(nn.Module):
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.randn(6, 3))
    def forward(self, x): return x @ self.w

def test_a_model_without_layers_inside():
    fit = lambda **kw: learner(((lambda: Bare()), (6,)), LayerStatsCallback(verbose=False, **kw)).fit(1)
    with pytest.raises(ValueError, match=r"modules='\*' matches nothing: this Bare has no layers inside"): fit(modules='*')
    fit()


# --- what adds nothing -----------------------------------------------------------------------------------------------
def test_lr_find_validate_get_preds_and_summary_add_nothing():
    import matplotlib; matplotlib.use('Agg')
    learn = learner('mlp', LayerStatsCallback(verbose=False))
    learn.fit(1)
    before = learn.layer_stats
    learn.lr_find(num_it=8, show_plot=False)
    learn.validate(); learn.get_preds(); learn.get_preds(ds_idx=0, with_loss=True); learn.summary()
    assert learn.layer_stats == before and not hooks_on(learn.model)
    learn.fit(1)
    assert learn.layer_stats.iters.fit.tolist() == [0] * 5 + [1] * 5
    assert learn.layer_stats.iters.iter.tolist() == list(range(10))

def test_show_results_and_predict_add_nothing():
    import matplotlib; matplotlib.use('Agg')
    from fastai.vision.all import CategoryBlock, DataBlock, ImageBlock, PILImageBW, RandomSplitter
    seed()
    arrays = [np.random.randint(0, 255, (8, 8), dtype=np.uint8) for _ in range(24)]
    block  = DataBlock((ImageBlock(cls=PILImageBW), CategoryBlock), get_x=lambda i: PILImageBW.create(arrays[i]),
                       get_y=lambda i: 'abc'[i % 3], splitter=RandomSplitter(.3, seed=1))
    dls    = block.dataloaders(list(range(24)), bs=4, num_workers=0, device='cpu')
    learn  = learner(model=cnn(), dls=dls, cbs=LayerStatsCallback(verbose=False), loss_func=CrossEntropyLossFlat())
    learn.fit(1)
    before = learn.layer_stats
    learn.show_results(max_n=2); learn.predict(PILImageBW.create(arrays[0])); learn.tta(n=2)
    assert learn.layer_stats == before and len(before) == 4 and not hooks_on(learn.model)

@pytest.mark.parametrize('event', ['before_fit', 'before_epoch', 'before_train', 'after_batch', 'after_step', 'after_train',
                                   'after_epoch', 'before_validate'])
@pytest.mark.parametrize('act', ['validate', 'get_preds'])
def test_a_validation_inside_a_fit_neither_adds_nor_loses_rows(event, act):
    busy = []
    def nested(learn):
        if busy: return
        busy.append(1)
        try: learn.validate() if act == 'validate' else learn.get_preds()
        finally: learn.model.train(); busy.clear()
        learn.dl = learn.dls.train
    class Nest(Callback):
        order = 80
        def __call__(self, name):
            if name == event and not busy and (name != 'after_batch' and name != 'after_step' or self.learn.model.training):
                kept = {k: self.learn.__dict__.get(k) for k in ('dl', 'xb', 'yb', 'iter', 'n_iter', 'pred', 'loss', 'loss_grad', 'training')}
                nested(self.learn)
                self.learn.__dict__.update(kept)
    bare = learner('mlp', Nest())
    bare.fit(2)
    cb    = LayerStatsCallback(verbose=False)
    learn = learner('mlp', [Nest(), cb])
    learn.fit(2)
    assert all(torch.equal(a, b) for a, b in zip(bare.model.parameters(), learn.model.parameters()))
    rec = learn.layer_stats
    assert rec.iters.iter.tolist() == list(range(10)) and rec.iters.fit.eq(0).all() and rec.iters.stepped.all()
    for key in rec.keys():
        if key not in rec.windows: assert np.isfinite(rec[key]).all(), key
    assert len(rec.windows['activation', 'hist']) == 10
    assert rec.epochs.epoch.tolist() == [0, 1] and not hooks_on(learn.model)


# --- nothing is left behind ------------------------------------------------------------------------------------------
def _boom(error):
    def f(learn): raise error
    return f

@pytest.mark.parametrize('how', ['Learner', 'fit'])
@pytest.mark.parametrize('error', [RuntimeError('broken'), KeyboardInterrupt(), CancelFitException()])
@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_backward', 'before_step', 'after_step', 'after_batch'])
def test_no_hook_is_left_after_an_error_ctrl_c_or_a_cancel(how, error, event):
    cbs   = [LayerStatsCallback(verbose=False, **EVERY), GradStatsCallback()]
    learn = learner('mlp', [Hooked(event, _boom(error), order=20)] + (cbs if how == 'Learner' else []))
    try: learn.fit(2, cbs=cbs if how == 'fit' else None)
    except (RuntimeError, KeyboardInterrupt): pass
    assert not hooks_on(learn.model)
    rec  = learn.layer_stats
    done = rec.iters[rec.iters.stepped]
    assert done.iter.tolist() == list(range(4 if event in ('after_step', 'after_batch') else 3))
    first = learn.layer_stats
    assert first == learn.layer_stats
    learn.fit(1, cbs=cbs if how == 'fit' else None)                   # usable again, the same objects
    rec = learn.layer_stats
    assert rec.iters.fit.tolist()[-5:] == [1] * 5 and rec.iters.stepped.tolist()[-5:] == [True] * 5
    assert rec.iters.iter.is_unique and len(rec) == len(first) + 5
    assert not hooks_on(learn.model)

def test_a_second_learner_takes_the_callback_over():
    cb   = LayerStatsCallback(verbose=False)
    a, b = learner('mlp', cb), learner('cnn', cb)
    b.fit(1); a.fit(1); b.fit(1)
    assert len(a.layer_stats) == 5 and len(b.layer_stats) == 10
    assert a.layer_stats.layers['grad'].layer.tolist()[0] == '0.weight' and len(a.layer_stats.layers['grad']) == 6
    assert len(b.layer_stats.layers['grad']) == 8
    assert not hooks_on(a.model) and not hooks_on(b.model)

def test_the_learner_is_freed_with_its_record():
    import gc, weakref
    learn = learner('mlp', LayerStatsCallback(verbose=False, **EVERY))
    learn.fit(1); learn.layer_stats
    gone = weakref.ref(learn), weakref.ref(learn.model)
    del learn
    gc.collect()
    assert gone[0]() is None and gone[1]() is None

def test_no_activation_is_kept_alive():
    import gc
    def alive():
        gc.collect()
        held = [o for o in gc.get_objects() if isinstance(o, torch.Tensor) and not torch.nn.parameter.is_lazy(o)]
        return sum(o.shape in ((8, 10), (8, 8)) for o in held)
    learn = learner('mlp', LayerStatsCallback(verbose=False, **EVERY))
    learn.fit(1)
    n = alive()
    learn.fit(8)
    assert alive() <= n + 2

@pytest.mark.parametrize('kind', ['mlp', 'cnn'])
def test_export_carries_neither_record_nor_hook_and_the_copy_records_for_itself(tmp_path, kind):
    def grown(cbs):
        learn = learner(kind, cbs)
        learn.path = tmp_path
        sizes = []
        for _ in range(2):
            learn.export('learn.pkl')
            sizes.append((tmp_path / 'learn.pkl').stat().st_size)
            learn.fit(1)
        return learn, sizes[1] - sizes[0], sizes[1]
    learn, more, size = grown([LayerStatsCallback(verbose=False, **EVERY), GradStatsCallback(), DeadUnitCallback()])
    _, bare_more, bare_size = grown(None)
    assert more - bare_more < 200 and size - bare_size < 4000
    learn.export('learn.pkl')
    back = load_learner(tmp_path / 'learn.pkl')
    assert back.layer_stats is None and not hooks_on(back.model)
    back.dls = learner(kind).dls
    back.create_opt(); back.fit(1)
    assert len(back.layer_stats) == 5 and len(learn.layer_stats) == 10

@pytest.mark.parametrize('how', ['deepcopy', 'pickle'])
def test_a_copy_of_a_learner_trains_and_records_for_itself(how):
    learn = learner('mlp', [LayerStatsCallback(verbose=False, every=2, modules='[13]', **EVERY), DeadUnitCallback()])
    learn.fit(1)
    first = learn.layer_stats
    other = copy.deepcopy(learn) if how == 'deepcopy' else pickle.loads(pickle.dumps(learn))
    assert other.layer_stats is None and not hooks_on(other.model)
    other.fit(1); other.fit(1)
    assert learn.layer_stats == first and len(other.layer_stats) == 10
    learn.fit(1)
    assert len(learn.layer_stats) == 10 and len(other.layer_stats) == 10
    assert not hooks_on(other.model) and not hooks_on(learn.model)

def test_copies_and_pickles_made_in_the_middle_of_a_fit_are_inert(tmp_path):
    kept = []
    def copying(learn):
        kept.append(copy.deepcopy(learn.model))
        kept.append(pickle.loads(pickle.dumps(learn.model)))
        torch.save(learn.model, tmp_path / 'm.pt')
        kept.append(torch.load(tmp_path / 'm.pt', weights_only=False))
        learn.save(tmp_path / 'saved')
    learn = learner('mlp', [LayerStatsCallback(verbose=False, **EVERY), Hooked('after_backward', copying)])
    learn.fit(1)
    rows = len(learn.layer_stats)
    for m in kept: m(torch.randn(4, 6)).sum().backward()
    assert len(learn.layer_stats) == rows == 5
    learn.load(tmp_path / 'saved')
    learn.fit(1)
    assert len(learn.layer_stats) == 10

def test_save_and_load_work_with_the_callbacks(tmp_path):
    learn = learner('mlp', LayerStatsCallback(verbose=False))
    learn.fit(1); learn.save(tmp_path / 'm'); learn.fit(1); learn.load(tmp_path / 'm'); learn.fit(1)
    assert learn.layer_stats.iters.fit.tolist() == [0] * 5 + [1] * 5 + [2] * 5

def test_nothing_warns_of_shadowing():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        learn = learner('mlp', [c(verbose=False) for c in ALL])
        learn.fit(2); learn.fit(1); learn.validate()
    assert not [w for w in seen if 'shadowing' in str(w.message) or 'fastgradstats' in str(w.message)]

def test_star_import_shadows_nothing_of_fastai():
    code = """
from fastai.vision.all import *
before = dict(globals())
from fastgradstats import *
import fastgradstats
changed = [n for n in before if n != 'before' and globals()[n] is not before[n]]
assert not changed, changed
assert set(globals()) - set(before) - {'before', 'fastgradstats', 'changed'} == set(fastgradstats.__all__)
import fastgradstats.callbacks.layer_stats
from fastgradstats import *
assert callable(watch) and callable(compare) and callable(statistic)
assert fastgradstats.watch is watch
"""
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code], check=True)


# --- what is printed and drawn ---------------------------------------------------------------------------------------
def test_four_lines_are_printed_when_a_fit_ends(capsys):
    learn = learner('mlp', LayerStatsCallback())
    learn.fit(1)
    out = capsys.readouterr().out.strip().split('\n')
    assert len(out) == 4 and out[3] == learn.diagnose().verdict
    assert out[0].startswith('recorded 6 parameters and 2 activations over 5 of 5 iterations')
    assert out[1].startswith('loss ') and 'gain' in out[1] and 'lowest elasticity' in out[1]
    assert 'dead units' in out[2] and 'non-finite' in out[2]
    learn.validate(); learn.get_preds(); learn.lr_find(num_it=8, show_plot=False)
    assert 'recorded' not in capsys.readouterr().out
    learn.fit(1)
    assert 'in 2 fits' in capsys.readouterr().out

def test_verbose_false_and_the_parts_are_silent(capsys):
    learner('mlp', [LayerStatsCallback(verbose=False)] + [c() for c in ALL[1:]]).fit(1)
    assert capsys.readouterr().out.strip() == ''

def test_the_callbacks_answer_as_fastai_names_them():
    import matplotlib; matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    learn = learner('cnn', [c(verbose=False) for c in ALL])
    learn.fit(3)
    hist = learn.activation_hist
    learn.layer_stats_callback.plot(); learn.grad_stats.plot(); learn.grad_stats.plot_flow(); learn.dead_unit.plot()
    hist.plot(); hist.color_dim(-2); hist.dead_chart(); hist.plot_layer_stats(-2)
    plt.close('all')
    mean, std, near = hist.layer_stats(-2)
    np.testing.assert_allclose(mean, learn.layer_stats['activation', 'mean'][:, -2], rtol=1e-6)
    assert len(mean) == len(std) == len(near) == 15 and hist.hist(-2).shape == (40, 15)
    with pytest.raises(IndexError, match='there is no layer 2; give -2 to 1'): hist.hist(2)

def test_fastbooks_calls_give_what_activation_stats_gives():
    from fastai.callback.hook import ActivationStats
    learn = learner('mlp', ActivationHistCallback())
    learn.add_cb(ActivationStats(with_hist=True, modules=[learn.model[1], learn.model[3]]))
    learn.fit(2)
    for idx in (-2, -1):
        want = learn.activation_stats.layer_stats(idx)
        got  = learn.activation_hist.layer_stats(idx)
        np.testing.assert_allclose(got[0], np.array(want[0], float), atol=1e-5)
        np.testing.assert_allclose(got[1], np.array(want[1], float), rtol=.01)           # theirs divides by n - 1
        theirs, ours = learn.activation_stats.hist(idx), learn.activation_hist.hist(idx)
        assert theirs.shape == ours.shape
        assert abs(float(np.expm1(theirs.numpy()).sum()) - float(np.expm1(ours.numpy()).sum())) < .05 * 10 * 80


# --- statistics of one's own -----------------------------------------------------------------------------------------
def test_a_statistic_of_ones_own_is_recorded():
    @statistic(unit='ratio')
    def kurtosis(x): return ((x - x.mean()) ** 4).mean() / x.var(unbiased=False) ** 2
    spy   = Spy(['1', '3'])
    learn = learner('mlp', [spy, LayerStatsCallback(grad=['norm', kurtosis], activation=[kurtosis], verbose=False)])
    learn.fit(1)
    for k, r in enumerate(spy.spy_rows):
        for probe in ('grad', 'activation'):
            for j, n in enumerate(learn.layer_stats.layers[probe].layer):
                x = r[probe][n]
                np.testing.assert_allclose(learn.layer_stats[probe, 'kurtosis'][k, j],
                                           ((x - x.mean()) ** 4).mean() / x.var() ** 2, rtol=1e-3)

@pytest.mark.parametrize('probe', ['activation', 'grad', 'grad_output', 'update', 'input'])
def test_a_statistic_that_raises_stops_training_by_name_and_leaves_no_hook(probe):
    def fragile(x): raise ZeroDivisionError('no good')
    learn = learner('mlp', [GradStatsCallback(), LayerStatsCallback(verbose=False, **{probe: [fragile]})])
    with pytest.raises(RuntimeError, match=rf"'fragile' failed on .*{probe}.*shape \(.*no good.*all hooks removed"): learn.fit(1)
    assert not hooks_on(learn.model)
    learn.remove_cbs([learn.layer_stats_callback])
    learn.fit(1)
    assert learn.layer_stats.iters.fit.value_counts().max() == 5 and learn.layer_stats.iters.tail(5).stepped.all()


# --- nothing waits for the device ------------------------------------------------------------------------------------
def test_between_flushes_nothing_waits_for_the_device(monkeypatch):
    bare, _     = waits(monkeypatch, None)
    ours, learn = waits(monkeypatch, LayerStatsCallback(verbose=False, grad_output=DEFAULTS['grad'][:5] + ['hist'],
                                                        grad_used=['norm']))
    assert bare and not ours - bare and len(learn.layer_stats) == 20

def test_the_device_way_of_reading_gives_the_same_numbers(monkeypatch):
    monkeypatch.setattr('fastgradstats.callbacks.layer_stats.Watcher', lambda plan: Watcher(plan, host=False))
    names = [s for s in REFERENCE]
    whole = [s for s in names if 'median' not in s]
    spy   = Spy(['2', '5'])
    learn = learner('cnn', [spy, LayerStatsCallback(grad=names, grad_used=names, weight=names, update=names, activation=whole,
                                                    grad_output=whole, verbose=False)])
    learn.fit_one_cycle(2)
    check(learn.layer_stats, spy.spy_rows)


# --- the plain loop --------------------------------------------------------------------------------------------------
def _loop(step, *, n=8, setup=lambda m: None, opt=None, **kwargs):
    "A plain loop under `watch`; `step(i, model, opt, w)` trains one batch. Returns the record and the model."
    seed()
    model = mlp()
    setup(model)
    opt = (opt or (lambda ps: torch.optim.SGD(ps, lr=.1)))(model.parameters())
    with watch(model, opt, **kwargs) as w:
        for i in range(n): step(i, model, opt, w)
    assert not hooks_on(model) and 'zero_grad' not in opt.__dict__
    return w.record, model

def _batch(bs=8): return torch.randn(bs, 6), torch.randint(3, (bs,))

def _norms(model): return [np.nan if p.grad is None else float(p.grad.double().norm()) for p in model.parameters()]

def test_watch_a_plain_loop():
    want, losses = [], []
    def step(i, model, opt, w):
        x, y = _batch()
        loss = w.loss(nn.functional.cross_entropy(model(x), y))
        opt.zero_grad(); loss.backward(); opt.step()
        want.append(_norms(model)); losses.append(float(loss.detach()))
        model.eval(); model(x); model.train()                          # not recorded
        with torch.no_grad(): model(x)
    rec, _ = _loop(step)
    np.testing.assert_allclose(rec['grad', 'norm'], want, rtol=1e-5)
    np.testing.assert_allclose(rec.iters.loss, losses, rtol=1e-6)
    assert len(rec) == 8 and rec.iters.stepped.all() and rec.iters.lr.eq(.1).all() and 'consumes' in rec.meta['grad_is']

def test_watch_with_clipping():
    true, used = [], []
    def step(i, model, opt, w):
        x, y = _batch()
        nn.functional.cross_entropy(model(x), y).backward()
        w.grads()
        true.append(_norms(model))
        for p in model.parameters(): p.grad.data.mul_(.5)
        nn.utils.clip_grad_norm_(model.parameters(), .1)
        used.append(_norms(model))
        opt.step(); opt.zero_grad()
    rec, _ = _loop(step, grad_used=['norm'])
    np.testing.assert_allclose(rec['grad', 'norm'], true, rtol=1e-5)
    np.testing.assert_allclose(rec['grad_used', 'norm'], used, rtol=1e-5)
    total = lambda v: np.sqrt((np.array(v) ** 2).sum(1))
    np.testing.assert_allclose(rec.iters.clip_factor, total(used) / total(true), rtol=1e-5)
    assert 'w.grads()' in rec.meta['grad_is']

@pytest.mark.parametrize('early', [True, False])
def test_watch_with_accumulation(early):
    want = []
    def step(i, model, opt, w):
        x, y = _batch(4 + i % 2)
        (nn.functional.cross_entropy(model(x), y) / 3).backward()
        if i % 3 == 2:
            want.append(_norms(model))
            if early: opt.step(); opt.zero_grad()
            else:     opt.step(); model.zero_grad()
    rec, _ = _loop(step, n=11)
    assert rec.iters.n_accum.tolist() == [3, 3, 3] and rec.iters.stepped.all()           # no step followed the last two
    np.testing.assert_allclose(rec['grad', 'norm'], want, rtol=1e-5)
    assert rec.iters.bs.tolist() == [13, 14, 13]

@pytest.mark.parametrize('zero', ['end', 'between', 'model', 'in_place'])
@pytest.mark.parametrize('unscale', [False, True])
def test_watch_with_a_gradscaler_and_a_skipped_step(zero, unscale):
    scaler = torch.amp.GradScaler('cpu', init_scale=2. ** 12)
    want   = []
    def step(i, model, opt, w):
        x, y = _batch()
        with torch.autocast('cpu', dtype=torch.bfloat16): out = model(x)
        out = out.float()
        if zero == 'between': opt.zero_grad()
        loss = w.loss(nn.functional.cross_entropy(out, y)) * (np.inf if i == 3 else 1)
        scaler.scale(loss).backward()
        if unscale: scaler.unscale_(opt); w.grads()
        scaler.step(opt); scaler.update()
        want.append(_norms(model))
        if zero == 'end':      opt.zero_grad()
        if zero == 'model':    model.zero_grad()
        if zero == 'in_place': opt.zero_grad(set_to_none=False)
    rec, _ = _loop(step, scaler=scaler, grad_output=['norm'])
    assert rec.iters.stepped.tolist() == [i != 3 for i in range(8)] and rec.iters.n_accum.eq(1).all()
    ok = [i for i in range(8) if i != 3]
    np.testing.assert_allclose(rec['grad', 'norm'][ok], np.array(want)[ok], rtol=1e-4)
    assert rec['grad_output', 'norm'][ok].max() < 1
    if unscale or zero != 'model': assert (rec['grad', 'frac_nonfinite'][3] > 0).all() and (rec['update', 'norm'][3] == 0).all()

def test_watch_with_frozen_and_unfrozen_parameters():
    def freeze(model): model[0].requires_grad_(False)
    def step(i, model, opt, w):
        if i == 4: model[0].requires_grad_(True)
        x, y = _batch()
        nn.functional.cross_entropy(model(x), y).backward()
        opt.step(); opt.zero_grad()
    rec, _ = _loop(step, setup=freeze)
    assert np.isnan(rec['grad', 'norm'][:4, :2]).all() and np.isfinite(rec['grad', 'norm'][4:]).all()
    assert np.isfinite(rec['grad', 'norm'][:, 2:]).all()

def test_watch_refuses_what_is_no_optimizer():
    with pytest.raises(TypeError, match='watch needs an optimizer, an object with a `step`'):
        with watch(mlp(), mlp().parameters()): pass
    with pytest.raises(TypeError, match='is not an argument'):
        with watch(mlp(), torch.optim.SGD(mlp().parameters()), grads=['norm']): pass
    for kw, match in ((dict(verbose=False), "'verbose' is not an argument of watch"), (dict(scaler=True), 'scaler is the loop')):
        with pytest.raises(TypeError, match=match): watch(mlp(), torch.optim.SGD(mlp().parameters()), **kw)

def test_watch_used_wrongly_is_told():
    model = mlp()
    opt   = torch.optim.SGD(model.parameters(), lr=.1)
    for first in (opt, learner('mlp'), model.parameters()):
        with pytest.raises(TypeError, match='watch takes the model, an nn.Module, then the optimizer'): watch(first, opt)
    w = watch(model, opt)
    for use in (lambda: w.loss(torch.ones(())), lambda: w.record, w.grads):
        with pytest.raises(ValueError, match='put the loop into .with watch'): use()
    with pytest.warns(UserWarning, match='nothing was recorded.*model.train'):
        with w:
            with pytest.raises(TypeError, match='got None'): w.loss(None)
            model.eval()(torch.randn(8, 6))
    with pytest.warns(UserWarning, match="none of the optimizer's parameters is the model's"):
        with watch(mlp(), opt) as v: v.loss(v.model(torch.randn(8, 6)).sum()).backward()
    assert not hooks_on(model) and not w.record.meta['not_hooked']

def test_watch_leaves_a_zero_grad_of_ones_own_and_another_watch_in_place():
    model = mlp()
    opt   = torch.optim.SGD(model.parameters(), lr=.1)
    opt.zero_grad = own = lambda set_to_none=True: type(opt).zero_grad(opt, set_to_none)
    with watch(model, opt):
        assert opt.zero_grad is not own
        with watch(model, opt): pass
        assert opt.zero_grad is not own
    assert opt.zero_grad is own

def test_watch_takes_its_hooks_off_after_an_error():
    def step(i, model, opt, w):
        x, y = _batch()
        nn.functional.cross_entropy(model(x), y).backward()
        if i == 3: raise KeyboardInterrupt
        opt.step(); opt.zero_grad()
    seed()
    model = mlp()
    opt   = torch.optim.SGD(model.parameters(), lr=.1)
    with pytest.raises(KeyboardInterrupt):
        with watch(model, opt) as w:
            for i in range(8): step(i, model, opt, w)
    assert not hooks_on(model) and 'zero_grad' not in opt.__dict__
    assert w.record.iters.stepped.tolist() == [True] * 3

def test_what_is_changed_of_the_learner_is_listed_and_taken_back():
    from fastai.learner import Learner
    from fastgradstats.callbacks import learner_patches
    changed = ['_do_fit', '_step', '_do_epoch_train', 'layer_stats', 'diagnose']
    assert list(learner_patches._old) == changed and all(n in learner_patches.__doc__ for n in changed)
    try:
        learner_patches.undo()
        assert not any(getattr(v, '__module__', '').startswith('fastgradstats') for v in vars(Learner).values())
        learn = learner('mlp')
        learn.fit(1)
        assert not hasattr(Learner, 'layer_stats')
    finally: learner_patches.do()
    learn.fit(1, cbs=LayerStatsCallback(verbose=False))
    assert len(learn.layer_stats) == 5 and learn.layer_stats.iters.stepped.all()
    was = vars(Learner)['_step']
    learner_patches.do()                                                 # twice is once
    assert vars(Learner)['_step'] is was

def test_nothing_is_read_twice_of_a_tensor():
    plan = Plan(**{**DEFAULTS, 'grad_used': ['norm', 'abs_mean', 'median']})
    assert all(w.names[0] == 'n' and len(set(w.names)) == len(w.names) for w in plan.wanted.values())

def test_a_plan_pickles_as_its_arguments():
    p = pickle.loads(pickle.dumps(Plan(every=3, modules='*', **DEFAULTS)))
    assert p.describe() == Plan(every=3, modules='*', **DEFAULTS).describe()
