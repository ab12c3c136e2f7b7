"check_init: what it foresees, and that nothing is touched. DiagnosisCallback: warns once, ends the fit, keeps the last iterations."
import copy
import pickle
import random
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
import fastai.callback.schedule  # noqa: F401  (gives Learner its fit_one_cycle)
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from torch import nn
from torch.utils.data import TensorDataset

from reference import learner
from sick import make
from fastgradstats import DiagnosisCallback, LayerStatsCallback, check_init


LAYERLESS = pd.DataFrame(columns=['layer', 'probe', 'verdict', 'for', 'against'])

def test_good_weights():
    c = check_init(make())
    assert c.ok and abs(c.forward) < .25 and 'No trouble foreseen' in repr(c)

@pytest.mark.parametrize('kind,sign', [(dict(std=.05), -1), (dict(gain=3.), 1)])
def test_wrong_scale_is_foreseen_and_its_gains_mend_it(kind, sign):
    learn = make(**kind)
    c = check_init(learn)
    assert c.findings[0].rule == 'bad_init' and {f.rule for f in c.findings} <= {'bad_init', 'vanishing', 'exploding'} and np.sign(c.forward) == sign and abs(c.forward) > .5
    linears = [m for m in learn.model if isinstance(m, nn.Linear)]
    for m, g in zip(linears, c.table.factor): m.weight.data *= g
    again = check_init(learn)
    assert again.ok and np.allclose(again.table['std'], 1, atol=.05)

def test_a_slope_is_the_factor_of_a_layer():
    a, b = check_init(make()), check_init(make(gain=3.))
    assert abs(b.forward - a.forward - np.log(3)) < 1e-3
    back = [np.log(c.table.grad_std[0] / c.table.grad_std[3]) for c in (a, b)]
    assert abs(back[1] - back[0] - 3 * np.log(3)) < .3                           # three layers on the way back, dropout drawn anew

def test_inputs_off_scale_are_foreseen(): assert 'input_scale' in [f.rule for f in check_init(make(scale=100.)).findings]

def test_nothing_is_touched():
    learn = make()
    learn.create_opt()
    set_seed(3)
    state  = copy.deepcopy(learn.model.state_dict())
    before = torch.get_rng_state(), random.getstate(), pickle.dumps(np.random.get_state()), learn.dls.train.rng.getstate(), len(learn.cbs)
    opt    = pickle.dumps(learn.opt.state_dict())
    check_init(learn)
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate() and before[2] == pickle.dumps(np.random.get_state())
    assert before[3] == learn.dls.train.rng.getstate() and before[4] == len(learn.cbs) and opt == pickle.dumps(learn.opt.state_dict())
    assert all(torch.equal(v, state[k]) for k, v in learn.model.state_dict().items()) and all(p.grad is None for p in learn.model.parameters())
    assert not any(m._forward_hooks for m in learn.model.modules()) and learn.layer_stats is None

# --- DiagnosisCallback -----------------------------------------------------------------------------------------------
def test_a_healthy_fit_is_silent_and_whole():
    learn = make()
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        learn.fit(6, cbs=DiagnosisCallback())
    assert len(learn.layer_stats) == 48

def test_a_fit_that_diverges_is_ended_with_one_warning_each():
    learn = make(lr=1e6)
    cb = DiagnosisCallback()
    with pytest.warns(UserWarning) as seen: learn.fit(10, cbs=[cb])
    said = [str(w.message) for w in seen if 'iteration' in str(w.message)]
    assert any('The fit is ended' in s for s in said) and len({s.split(': ')[1].split(' ')[0] for s in said}) == len(said)
    assert len(learn.layer_stats) < 80

def test_the_flight_recorder_keeps_the_last_iterations_and_wakes_the_rest():
    class Break(LayerStatsCallback.__mro__[1]):
        order = 5
        def before_batch(self):
            if self.training and self.learn.train_iter == 30: self.learn.xb = (self.xb[0] * float('nan'),)
    learn = make()
    cb = DiagnosisCallback(stop_on=(), every=10, keep=15)
    with pytest.warns(UserWarning, match='non_finite'): learn.fit(6, cbs=[cb, Break()])
    it = learn.layer_stats.iters
    assert len(it) == 48 and len(cb.flight) == 15 and cb.flight.iter.tolist() == list(range(33, 48))
    assert it.measured[:30].sum() == 3 and it.measured[31:45].all()
    assert cb.flight.n_nonfinite.gt(0).all()

class Break(LayerStatsCallback.__mro__[1]):
    order = 5
    def __init__(self, at): self.at = at
    def before_batch(self):
        if self.training and self.learn.train_iter == self.at: self.learn.xb = (self.xb[0] * float('nan'),)

def test_what_the_watcher_has_read_is_not_computed_again(monkeypatch):
    monkeypatch.setattr(torch, '_foreach_norm', lambda *a: pytest.fail('the norms are known already'))
    cb = DiagnosisCallback()
    learn = make()
    learn.fit(2, cbs=cb)
    assert np.allclose(cb.flight.grad_norm, learn.layer_stats.iters.grad_norm) and not cb.flight.n_nonfinite.any()

def test_on_a_device_numbers_are_read_now_and_then_only(monkeypatch):
    "And what is broken in between is seen all the same."
    read = []
    cb, learn = DiagnosisCallback(check=20, stop_on=()), make()
    monkeypatch.setattr(cb, '_waits', lambda: True)
    monkeypatch.setattr(cb, '_spike', lambda: read.append(cb._live.i))
    learn.fit(6, cbs=cb)
    assert read == [20, 40]
    cb, learn = DiagnosisCallback(check=20, every=10), make(n=2048)
    monkeypatch.setattr(cb, '_waits', lambda: True)
    with pytest.warns(UserWarning, match='non_finite.*The fit is ended'): learn.fit(1, cbs=[cb, Break(23)])
    assert len(learn.layer_stats) <= 41

def test_arguments_are_checked():
    with pytest.raises(ValueError, match='not a rule'): DiagnosisCallback(stop_on='explosion')
    with pytest.raises(ValueError, match='keep'):       DiagnosisCallback(keep=0)

# --- advice tried ------------------------------------------------------------------------------------------------------
def test_advice_is_tried_on_fresh_learners_and_withdrawn_if_it_does_not_help():
    from fastgradstats.diagnosis.report import Report
    from fastgradstats.callbacks.trial import verify
    learn = make(std=.01, depth=8)
    learn.fit(6, cbs=LayerStatsCallback(verbose=False))
    weights = copy.deepcopy(learn.model.state_dict())
    report  = learn.diagnose()
    assert report.findings[0].rule in ('bad_init', 'vanishing', 'starved')
    tried   = verify(learn, report, lambda: make(std=.01, depth=8))
    assert 'without' in tried.trials[report.findings[0].rule] and 'withdrawn' not in repr(tried) and tried.findings[0].fix
    bad     = report.findings[0]._replace(fix={'lr': 1e9})
    tried   = verify(learn, Report(report.story, [bad], [], [], report.layers), lambda: make(std=.01, depth=8))
    assert 'withdrawn' in repr(tried) and not tried.findings[0].fix and 'First try' not in tried.verdict
    assert all(torch.equal(v, weights[k]) for k, v in learn.model.state_dict().items())
    from fastgradstats import diagnose
    assert diagnose(learn, verify=True).trials

# --- fixes applied -----------------------------------------------------------------------------------------------------
def test_there_is_a_way_to_apply_every_key():
    from fastgradstats.diagnosis.fixes import WORDS
    from fastgradstats.callbacks.apply_fix import APPLY
    assert set(APPLY) == set(WORDS)

class Loop(nn.Module):
    "A cell that runs several times."
    def __init__(self): super().__init__(); self.inp, self.rec, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)
    def forward(self, x):
        h = x.new_zeros(len(x), 8)
        for _ in range(3): h = torch.tanh(self.inp(x[:, :4]) + self.rec(h))
        return self.head(h)

def normed(model, x):
    from fastgradstats.callbacks.apply_fix import apply_fix
    ds = list(zip(x, torch.zeros(len(x)).long()))
    learn = Learner(DataLoaders(DataLoader(ds, bs=4), DataLoader(ds, bs=4), device='cpu'), model, loss_func=nn.CrossEntropyLoss())
    names = set(model.state_dict())
    done  = apply_fix(learn, {'norm': 'batch'})
    assert names <= set(model.state_dict())
    return done, {n: type(m.norm).__name__ for n, m in model.named_modules() if 'norm' in m._modules}

def test_norms_are_put_behind_hidden_layers_that_have_none():
    x = torch.randn(16, 20)
    assert normed(nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), x) == (
        ['norm'], {'0': 'BatchNorm1d', '2': 'BatchNorm1d'})
    assert normed(Loop(), x) == (['norm'], {'inp': 'LayerNorm', 'rec': 'LayerNorm'})
    conv = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2))
    assert normed(conv, torch.randn(16, 1, 8, 8)) == (['norm'], {'0': 'BatchNorm2d'})
    assert normed(nn.Sequential(nn.Linear(20, 2)), x) == ([], {})
    assert normed(nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.Flatten(), nn.Linear(40, 2)), torch.randint(0, 9, (16, 5)))[1] == {'1': 'LayerNorm'}

def test_a_normed_copy_trains():
    from fastgradstats.callbacks.trial import apply_fix, final_gain
    learn = make(depth=4)
    apply_fix(learn, {'init': 'kaiming', 'norm': 'batch', 'activation': 'leaky_relu'})
    first, last = final_gain(learn, 40)
    assert last < .8 * first and learn.model[0].norm.weight.grad is not None

@pytest.mark.parametrize('scale', [2. ** 17, 1.])
def test_a_scaled_loss_trains_like_the_plain_one(scale):
    from fastgradstats.callbacks.trial import apply_fix, final_gain
    learn = make(depth=3)
    if scale > 1: apply_fix(learn, {'loss_scale': scale})
    assert abs(final_gain(learn, 16)[1] - final_gain(make(depth=3), 16)[1]) < 1e-4

def test_the_learning_rate_is_held():
    from fastgradstats.callbacks.trial import apply_fix
    learn = make(lr=1.)
    apply_fix(learn, {'lr_cap': .01})
    learn.fit(1, cbs=LayerStatsCallback(verbose=False))
    assert np.allclose(learn.layer_stats['update', 'lr'], .01)

def test_where_adamw_settles_is_read_from_a_real_record():
    from fastai.optimizer import Adam
    from fastgradstats.diagnosis.evidence import run
    learn = make(lr=1e-3)
    learn.opt_func, learn.wd = Adam, .05                        # fastai's Adam shrinks the weights themselves
    learn.fit(1, cbs=LayerStatsCallback(verbose=False))
    r = run(learn.layer_stats)
    assert r.adaptive and np.allclose(r.equilibrium_ratio, np.sqrt(2 * 1e-3 * .05))

# --- through time ------------------------------------------------------------------------------------------------------
class Cells(nn.Module):
    "A vanilla cell run for 100 steps; it answers after the last."
    def __init__(self, std=None):
        super().__init__()
        self.cell, self.head = nn.RNNCell(1, 16), nn.Linear(16, 2)
        nn.init.zeros_(self.cell.bias_ih); nn.init.zeros_(self.cell.bias_hh)
        nn.init.normal_(self.cell.weight_ih, std=.05)
        nn.init.normal_(self.cell.weight_hh, std=std) if std else nn.init.orthogonal_(self.cell.weight_hh)
    def forward(self, x):
        h = x.new_zeros(len(x), 16)
        for t in range(100): h = self.cell(x[:, t:t + 1], h)
        return self.head(h)

@pytest.mark.parametrize('std', [.1, None])
def test_the_gradient_through_100_steps_of_a_cell(std):
    set_seed(0)
    x  = torch.randn(128, 100)
    ds = list(zip(x, (x[:, 0] > 0).long()))
    learn = Learner(DataLoaders(DataLoader(ds, bs=32), DataLoader(ds, bs=32), device='cpu'), Cells(std), loss_func=nn.CrossEntropyLoss(), lr=.05, opt_func=SGD)
    with learn.no_logging(): learn.fit(12, cbs=LayerStatsCallback(verbose=False, per_call=True, grad_output=['norm'], activation=['std']))
    rep = learn.diagnose()
    assert 'vanishing_through_time' in rep.checked
    found = [f for f in rep.findings if f.rule == 'vanishing_through_time']
    if std is None: assert not found, found
    else:
        f = found[0]
        assert f.layer == 'cell:0' and f.value < 1e-20 and 50 < len(f.layers) < 100 and f.fix == {'init': 'orthogonal'}
        assert f.severity == 'critical'                                    # the first number decides, and nothing is learned

# --- the guilty layer --------------------------------------------------------------------------------------------------
def one_bad(kind, k):
    "Ten layers, one of them spoilt; returns the first finding's module and those that are guilty."
    learn = make(depth=10, lr=.05)
    m = learn.model[2 * k]
    if kind == 'weak': m.weight.data *= .001
    if kind == 'zero': nn.init.zeros_(m.weight)
    if kind == 'dead': nn.init.constant_(m.bias, -20.)
    if kind == 'big':
        m.weight.data *= 100.
        learn.model[20] = nn.Identity()                          # a norm would mend it
    if kind == 'frozen': learn.splitter = lambda model: [[p for p in model.parameters() if p is not m.weight]]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit(6, cbs=LayerStatsCallback(verbose=False))
    bad = [f for f in learn.diagnose().findings if f.severity != 'info']
    return (bad[0].layer.replace('.weight', '') if bad else None), (str(2 * k), str(2 * k + 1))

def test_the_first_finding_names_the_guilty_layer():
    runs = {(kind, k): one_bad(kind, k) for kind in ('weak', 'zero', 'dead', 'big', 'frozen') for k in (1, 5, 8)}
    seen = {r: v for r, v in runs.items() if v[0] is not None}           # what did no harm is no fault
    wrong = {r: v for r, v in seen.items() if v[0] not in v[1]}
    assert len(seen) >= 10 and len(wrong) <= .15 * len(seen), wrong

# --- how a trial begins ------------------------------------------------------------------------------------------------
def fitted(spoil=lambda m: None, **kw):
    learn = make(depth=4, **kw)
    spoil(learn.model)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit(6, cbs=LayerStatsCallback(verbose=False))
    return learn

def test_a_trial_begins_at_the_scale_of_the_run():
    "An initialisation of one's own is not what modules draw: the copy has the recorded norms, or the text says which it has not."
    from fastgradstats.callbacks.trial import fresh
    learn = fitted(std=.01)
    copied, how = fresh(learn, learn.layer_stats)
    rec = learn.layer_stats
    was = dict(zip(rec.layers['weight'].layer, rec['weight', 'norm'][0]))
    assert 'scaled to the norms recorded' in how
    told = how.split('not as they were: ')[1] if 'not as they were' in how else ''
    for n, p in copied.model.named_parameters():
        same = abs(float(p.norm()) - was[n]) <= .2 * float(p.norm()) + 1e-6
        assert same or n in told or 'others' in told, n

def test_what_a_trial_cannot_begin_with_is_named():
    from fastgradstats.callbacks.trial import fresh
    learn = fitted(lambda m: nn.init.constant_(m[2].bias, -20.))
    assert '2.bias' in fresh(learn, learn.layer_stats)[1]
    assert 'were not recorded' in fresh(learn)[1]
    learn = fitted()
    learn.model.own = nn.Parameter(torch.ones(2))
    assert 'own' in fresh(learn, learn.layer_stats)[1]

def test_a_trial_tells_what_was_applied_and_how_it_began():
    from fastgradstats.diagnosis.report import Report
    from fastgradstats.callbacks.trial import verify
    learn  = fitted(std=.01)
    report = learn.diagnose()
    f      = report.findings[0]._replace(fix={'init': 'kaiming', 'remove': 'dropout'}, severity='critical')
    says   = verify(learn, Report(report.story, [f], [], [], report.layers)).trials[f.rule]
    assert says.startswith('init (not remove, which cannot be tried): ') and 'scaled to the norms recorded' in says
    assert 'both as `make` gives them' in verify(learn, report, lambda: make(std=.01, depth=4)).trials[report.findings[0].rule]

def test_what_was_tried_is_in_the_json_and_the_verdict_keeps_the_advice_that_stands():
    from fastgradstats.diagnosis.report import Report
    from fastgradstats.rules import Finding
    from fastgradstats.callbacks.trial import _with
    first, other = (Finding(n, '', (0, 1), 1., 0., 'critical', n, f'mend {n}', {'lr': .1}) for n in ('first', 'other'))
    report = Report('A tale. First try: telling it.', [first, other], [], [], LAYERLESS)
    assert report.verdict == 'A tale. First try: telling it. First try: mend first.' and 'trials' not in report.json()
    for gone, left in ((first, 'A tale. First try: telling it.'), (other, report.verdict)):
        tried = _with(report, {gone.rule: 'it did not help'}, gone)
        assert tried.json()['trials'] == {gone.rule: 'it did not help'} and tried.verdict == left

def test_a_softmax_is_removed_where_it_is_a_module():
    from fastgradstats.callbacks.apply_fix import apply_fix
    learn = make(depth=1)
    assert apply_fix(learn, {'remove': 'softmax'}) == []
    learn.model.softmax = True                                           # an attribute of somebody's own is not ours to change
    assert apply_fix(learn, {'remove': 'softmax'}) == [] and learn.model.softmax is True
    del learn.model.softmax
    learn.model.add_module('last', nn.Softmax(1))
    assert apply_fix(learn, {'remove': 'softmax'}) == ['remove'] and isinstance(learn.model.last, nn.Identity)

def test_a_learner_without_a_fault_has_no_trial():
    from fastgradstats.callbacks.trial import verify
    learn  = fitted()
    report = learn.diagnose()
    assert report.ok and verify(learn, report).trials == {}

def tried(learn, **kw):
    from fastgradstats.diagnosis.report import Report
    from fastgradstats.rules import Finding
    from fastgradstats.callbacks.trial import verify
    f = Finding('planted', '', (kw.pop('since', 0), 20), 1., 0., 'critical', 'planted', 'planted', kw.pop('fix'))
    return verify(learn, Report('Planted.', [f], [], [], None), **kw)

@pytest.mark.parametrize('how', ['fit', 'one cycle', 'slice'])
def test_a_trial_trains_at_the_rates_that_were_recorded(how):
    "Whatever the Learner's own learning rate is: the one given to fit was too large, and a hundredth of it mends that."
    learn = make(depth=4, lr=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        run = LayerStatsCallback(verbose=False)
        if how == 'fit':       learn.fit(8, lr=50., cbs=run)
        if how == 'one cycle': learn.fit_one_cycle(8, lr_max=50., div=2, cbs=run)
        if how == 'slice':     learn.fit(8, lr=slice(1., 50.), cbs=run)
    t = tried(learn, fix={'lr': 1e-3})
    assert 'it helped' in t.trials['planted'], t.trials
    assert t.findings[0].fix and learn.lr == 1e-3

def test_a_replay_has_the_recorded_rates_of_every_group_and_scales_with_the_fix():
    from fastgradstats.callbacks.apply_fix import apply_fix
    from fastgradstats.callbacks.trial import _Replay, final_gain, fresh
    learn = make(depth=2, lr=.05)
    learn.splitter = lambda m: [list(m[:2].parameters()), list(m[2:].parameters())]
    learn.fit_one_cycle(2, lr_max=slice(.01, .1), wd=.03, cbs=LayerStatsCallback(verbose=False))
    new, _ = fresh(learn, learn.layer_stats)
    replay = _Replay(learn, new.lr)
    apply_fix(new, {'lr': .1})
    new.add_cb(LayerStatsCallback(verbose=False))
    final_gain(new, 16, replay=replay)
    was, now = learn.layer_stats, new.layer_stats
    assert np.allclose(now['update', 'lr'], .1 * was['update', 'lr'], rtol=1e-5) and now['update', 'lr'].std(1).min() > 0
    assert np.allclose(now.iters.mom, was.iters.mom) and new.opt.hypers[0]['wd'] == .03

@pytest.mark.parametrize('lr', [1e-6, 3.])                                # that lowers the loss less, and more
def test_a_trial_that_does_not_repeat_the_fault_says_nothing_about_the_advice(lr):
    learn = fitted(lambda m: [nn.init.constant_(l.bias, -20.) for l in m if isinstance(l, nn.Linear)])
    t = tried(learn, fix={'lr': lr})
    assert 'it helped' not in t.trials['planted'] and 'did not come back' in t.trials['planted'] and t.findings[0].fix and 'First try' in t.verdict

def test_a_fault_that_begins_after_the_trial_is_not_tried():
    t = tried(fitted(), fix={'lr': .1}, since=60)
    assert t.trials['planted'].startswith('not tried: it begins at iteration 60') and t.findings[0].fix

def test_a_trial_leaves_learner_and_random_numbers_as_they_are():
    learn = fitted(std=.01)
    state, weights = torch.get_rng_state(), copy.deepcopy(learn.model.state_dict())
    tried(learn, fix={'lr': .1})
    assert torch.equal(state, torch.get_rng_state()) and all(torch.equal(v, weights[k]) for k, v in learn.model.state_dict().items())

class Codes(nn.Module):
    "Its first column holds categories."
    def __init__(self):
        super().__init__()
        self.emb, self.body = nn.Embedding(4, 3), nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    def forward(self, x): return self.body(torch.cat([self.emb(x[:, 0].long()), x[:, 1:]], 1))

def test_advice_that_does_not_run_is_told_and_nothing_raised():
    from fastgradstats.rules import Finding
    from fastgradstats.diagnosis.report import Report
    from fastgradstats.callbacks.trial import verify
    g = torch.Generator().manual_seed(0)
    x = torch.cat([torch.arange(64)[:, None] % 4, torch.randn(64, 2, generator=g).round()], 1)      # whole numbers all over
    learn = Learner(DataLoaders.from_dsets(TensorDataset(x, torch.arange(64) % 3), TensorDataset(x, torch.arange(64) % 3), bs=16, device='cpu'),
                    Codes(), loss_func=nn.CrossEntropyLoss(), lr=.1)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, cbs=LayerStatsCallback(verbose=False))
    f     = Finding('input_scale', 'input', (0, 7), 50., 10., 'critical', 'planted', 'normalise the input', {'input': 'normalize'})
    tried = verify(learn, Report('Planted.', [f], [], [], None))
    assert tried.trials['input_scale'].startswith('it does not run with input: IndexError') and tried.findings[0].advice

def test_the_fix_init_gives_norms_their_start_back():
    from fastgradstats.callbacks.apply_fix import apply_fix
    learn = make(depth=2)
    bn    = learn.model[4]
    with torch.no_grad(): bn.bias.fill_(-10.), bn.weight.fill_(3.)
    assert apply_fix(learn, {'init': 'kaiming'}) == ['init']
    assert not bn.bias.any() and (bn.weight == 1).all()

def test_check_init_takes_a_learner():
    with pytest.raises(TypeError, match='takes a fastai Learner.*got Linear'): check_init(nn.Linear(2, 2))

@pytest.mark.parametrize('act,seen', [(nn.Sigmoid, True), (nn.Tanh, False)])
def test_gradients_that_will_fade_are_foreseen(act, seen):
    "Six sigmoid layers keep the scale going forward; on the way back each takes a factor of a sixth or so."
    learn = make(depth=6)
    for k, m in enumerate(learn.model):
        if isinstance(m, nn.ReLU): learn.model[k] = act()
        if isinstance(m, nn.Linear): nn.init.xavier_normal_(m.weight)
    c = check_init(learn)
    found = {f.rule: f for f in c.findings}
    assert ('vanishing' in found) == seen == ('No trouble' not in repr(c)), repr(c)
    if seen:
        g = c.table.grad_std.to_numpy()
        assert np.isclose(found['vanishing'].value, g[0] / g[-1]) and found['vanishing'].fix == {'activation': 'tanh', 'init': 'xavier'}

def test_zero_branches_that_get_a_gradient_are_no_fault():
    "As LoRA's: what begins at zero beside another way learns from the first step on."
    class Branch(nn.Module):
        def __init__(self): super().__init__(); self.lin, self.b = nn.Linear(20, 20), nn.Linear(20, 20, bias=False); nn.init.zeros_(self.b.weight)
        def forward(self, x): return self.lin(x) + self.b(x)
    learn = make(depth=3)
    for k in (0, 2, 4): learn.model[k] = Branch()
    assert not [f for f in check_init(learn).findings if 'zero' in f.evidence]
    for k in (0, 2, 4): nn.init.zeros_(learn.model[k].lin.weight)
    assert [f for f in check_init(learn).findings if 'exactly zero' in f.evidence]

def test_what_indices_feed_is_not_judged_by_their_scale():
    "Categories up to 400 go into an embedding: the first layer does not shrink anything."
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.emb, self.body = nn.Embedding(400, 8), nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
        def forward(self, x): return self.body(torch.cat([self.emb(x[:, 0].long()), x[:, 1:]], 1))
    set_seed(0)
    x  = torch.cat([torch.randint(0, 400, (128, 1)).float(), torch.randn(128, 2)], 1)
    ds = list(zip(x, (x[:, 1] > 0).long()))
    assert not [f for f in check_init(Learner(DataLoaders(DataLoader(ds, bs=32), DataLoader(ds, bs=32), device='cpu'), Net(), loss_func=nn.CrossEntropyLoss())).findings
                if f.rule == 'bad_init']

def test_inputs_are_standardised_but_for_categories():
    from fastgradstats.callbacks.apply_fix import _Standardise
    def through(x):
        cb = _Standardise(); cb.learn = type('L', (), dict(xb=(x,)))()
        cb.before_batch()
        return cb.learn.xb[0]
    g = torch.Generator().manual_seed(0)
    x = torch.cat([torch.arange(64)[:, None] % 4, 50 + 9 * torch.randn(64, 2, generator=g)], 1)
    y = through(x)
    assert torch.equal(y[:, 0], x[:, 0]) and y[:, 1:].mean(0).abs().max() < 1e-5 and torch.allclose(y[:, 1:].std(0), torch.ones(2))
    words = torch.randint(0, 9, (64, 5), generator=g)
    assert torch.equal(through(words), words)                                      # indices have no scale
    pixels = torch.randint(0, 256, (64, 20), generator=g).float()
    assert torch.allclose(through(pixels).std(0), torch.ones(20), atol=1e-5)
    maps = torch.randint(0, 256, (8, 3, 5, 5), generator=g).float()
    assert torch.allclose(through(maps).std((0, 2, 3)), torch.ones(3), atol=1e-5)

@pytest.mark.parametrize('act,norm,fix', [(nn.Sigmoid, False, {'activation': 'tanh', 'init': 'xavier'}), (nn.ReLU, True, {'init': 'xavier'}),
                                          (nn.ReLU, False, {'init': 'xavier', 'norm': 'batch'})])
def test_the_fix_for_a_signal_that_fades_is_the_nets_own(act, norm, fix):
    from fastgradstats.diagnosis.fixes import signal
    from fastgradstats.diagnosis.evidence import run
    learn = make(depth=2)
    learn.model = nn.Sequential(nn.Linear(20, 20), *([nn.BatchNorm1d(20)] if norm else []), act(), nn.Linear(20, 2))
    learn.fit(1, cbs=LayerStatsCallback(verbose=False))
    assert signal(run(learn.layer_stats)) == fix

def test_a_gate_among_other_activations_is_no_sigmoid_net():
    "As a squeeze-and-excite net has: its gates are not to be swapped for tanh."
    from fastgradstats.diagnosis.fixes import signal, weights
    from fastgradstats.diagnosis.evidence import run
    class Gated(nn.Module):
        def __init__(self): super().__init__(); self.lin, self.gate, self.act = nn.Linear(20, 20), nn.Sigmoid(), nn.ReLU()
        def forward(self, x): h = self.lin(x); return self.act(h * self.gate(h))
    learn = make(depth=2)
    learn.model = nn.Sequential(Gated(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 2))
    learn.fit(1, cbs=LayerStatsCallback(verbose=False))
    r = run(learn.layer_stats)
    assert signal(r) == {'init': 'xavier', 'norm': 'batch'} and weights(r) == {'init': 'kaiming'}

@pytest.mark.parametrize('inputs', ['indices', 'both'])
def test_small_embeddings_are_no_fault_of_the_first_layer(inputs):
    "As fastai draws them, .01: what goes in has their scale, or lies between theirs and that of the other inputs."
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb = nn.Embedding(40, 8); nn.init.normal_(self.emb.weight, std=.01)
            n = 8 if inputs == 'indices' else 10
            self.body = nn.Sequential(nn.Linear(n, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
            for m in self.body:
                if isinstance(m, nn.Linear): nn.init.kaiming_normal_(m.weight); nn.init.zeros_(m.bias)
        def forward(self, i, x=None): return self.body(torch.cat([self.emb(i)] + ([x] if inputs == 'both' else []), 1))
    set_seed(0)
    i  = torch.randint(0, 40, (128,))
    ds = list(zip(i, i % 2)) if inputs == 'indices' else list(zip(i, torch.randn(128, 2), i % 2))
    dls = DataLoaders(DataLoader(ds, bs=32), DataLoader(ds, bs=32), device='cpu')
    dls.n_inp = 1 if inputs == 'indices' else 2
    c = check_init(Learner(dls, Net(), loss_func=nn.CrossEntropyLoss()))
    assert not [f for f in c.findings if f.rule == 'bad_init'], repr(c)

def test_a_dead_layer_and_a_loss_that_is_no_number_are_trouble():
    learn = learner('mlp')
    with torch.no_grad(): learn.model[2].bias.fill_(-50)
    found = check_init(learn)
    assert not found.ok and 'dead_units' in {f.rule for f in found.findings} and 'No trouble' not in str(found)
    learn = learner('mlp')
    learn.loss_func = lambda pred, y: torch.nn.functional.cross_entropy(pred, y) * float('nan')
    found = check_init(learn)
    assert found.findings[0].rule == 'non_finite' and 'look at the targets' in str(found) and 'Kaiming' not in str(found)
