"Rules: silent on a healthy record, they name the planted fault, where and since when, and are skipped without what they need."
import numpy as np
import pytest
from planted import BINS, FAULTS, PerCall, Planted

from fastgradstats import Record, diagnose
from fastgradstats.diagnosis.finding import LOSS
from fastgradstats.rules import ALL, SEVERITIES, Finding, rule

RULES = {f.__name__: f for f in ALL}

def plain(name, **kw):
    p = (PerCall if name == 'vanishing_through_time' else Planted)(**kw)
    return p.validate(p.iters['loss'][19::20] + .05) if name == 'memorising' else p

def test_every_rule_has_a_planted_fault_a_source_and_needs():
    assert set(FAULTS) == set(RULES)
    for f in ALL: assert (f.needs or f.where) and f.source and f.__doc__

@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('name', RULES)
def test_silent_on_a_healthy_record(name, seed): assert not list(RULES[name](plain(name, seed=seed).record()))

@pytest.mark.parametrize('name', RULES)
def test_names_the_planted_fault(name):
    plan, layer, since = FAULTS[name]()
    rec   = plan.record()
    found = list(RULES[name](rec))
    assert found, f"{name} found nothing"
    f = found[0]
    assert isinstance(f, Finding) and f.rule == name and f.severity in SEVERITIES and f.severity != 'info'
    assert f.layer == layer
    assert since is None or f.iters[0] == since
    assert f.evidence and f.advice and isinstance(f.fix, dict)
    if f.layers: assert layer in f.layers

@pytest.mark.parametrize('name', RULES)
def test_the_planted_fault_is_found_first_by_diagnose(name):
    rec = FAULTS[name]()[0].record()
    rep = diagnose(rec)
    assert rep.findings[0].rule == name, [f.rule for f in rep.findings]
    assert not rep.ok

@pytest.mark.parametrize('name', RULES)
def test_skipped_and_said_how_to_record_without_what_it_needs(name):
    f = RULES[name]
    for need in f.needs:
        keys = need if isinstance(need, list) else [need]
        if keys[0][0] == 'iters':
            p = plain(name); p.iters[keys[0][1]] = np.nan
        else:
            gone = set(keys)
            if ('grad', 'elasticity') in keys: gone |= {('grad', 'norm')}
            if ('update', 'ratio') in keys:    gone |= {('update', 'norm')}
            p = plain(name); p.without = gone
        rep = diagnose(p.record())
        assert name not in rep.checked
        s = next(s for s in rep.skipped if s.rule == name)
        assert s.why and (keys[0][0] == 'iters' or 'LayerStatsCallback(' in s.how)

@pytest.mark.parametrize('key', list(Planted().v))
def test_removing_one_statistic_never_leaves_its_rules_checked(key):
    p = Planted(); p.without = {key}
    rep = diagnose(p.record())
    needs = {n for f in ALL for n in f.needs if not isinstance(n, list)}
    if key in needs: assert rep.skipped

def test_a_rule_says_how_it_is_called_as_a_cause_and_stands_before_what_it_explains():
    place = {f.__name__: k for k, f in enumerate(ALL)}
    for f in ALL:
        assert f.cause and set(f.explains) < set(place), f.__name__
        assert all(place[f.__name__] < place[g] for g in f.explains), f.__name__
    assert [f.__name__ for f in ALL if not f.explains] == ['memorising', 'not_learning']                # the outcome

def test_a_rule_of_ones_own_is_told_as_a_cause():
    from fastgradstats.diagnosis.rules import by_cause
    @rule(needs=[LOSS], source='a test', cause='my labels are wrong', explains=('starved', 'not_learning'))
    def labels(rec): yield Finding('labels', 'target', (0, 9), 1., 0., 'critical', 'they are', 'other labels')
    rep = diagnose(Planted().starve().record(), rules=[labels, *ALL])
    assert rep.verdict.startswith('My labels are wrong (target) from the start; with it: the network is starved of gradient')
    assert rep.findings[-1].advice == 'what is advised for labels, its cause'
    order = [f.__name__ for f in by_cause([*ALL, labels])]
    assert order.index('labels') < order.index('starved') and [n for n in order if n not in ('labels', 'memorising')] == [n for n in RULES if n != 'memorising']

def test_advice_is_the_fix_in_words():
    from fastgradstats.diagnosis.fixes import advise, found
    from fastgradstats.diagnosis.evidence import run
    r = run(Planted().record())
    f = found(r, 'mine', iters=(0, 1), value=1., limit=0., severity='info', evidence='seen', fix={'lr': .1}, also=['tea'])
    assert f.advice == advise({'lr': .1}, 'tea', rate=r.lr.max()) and f.fix == {'lr': .1}
    assert f.advice == 'a learning rate of 0.010 instead of 0.10 (lr_find shows it); or tea'
    assert advise({'lr': .1}) == 'a learning rate 0.10 times as large (lr_find shows it)'               # none was recorded

def test_a_rule_of_ones_own():
    @rule(needs=[('grad', 'norm')], source='a test')
    def loud(rec, limit=.1):
        "The gradient is loud."
        if rec['grad', 'norm'].max() > limit: yield Finding('loud', '0.weight', (0, 1), 1., limit, 'warning', 'loud', 'be quiet')
    rep = diagnose(Planted().record(), rules=[*ALL, loud])
    assert [f.rule for f in rep.findings] == ['loud'] and 'loud' in rep.checked

def test_a_rule_of_ones_own_has_the_evidence_of_the_record_that_it_is_given():
    from fastgradstats.rules import run
    seen = []
    @rule(needs=[LOSS], source='a test')
    def mine(rec, limit=1.):
        "It looks."
        seen.append((run(rec), run(rec).rec, rec, rec['grad', 'norm']))
        return []
    rec = Planted().record()
    diagnose(rec, rules=[mine, mine])
    (a, of, got, g), (b, *_) = seen
    assert a is b and of is rec and isinstance(got, Record) and got == rec and g is rec['grad', 'norm']
    list(mine(rec))
    assert seen[-1][0] is not a and seen[-1][1] is rec and run(a) is a

def test_threads_do_not_see_each_others_records():
    import sys
    from concurrent.futures import ThreadPoolExecutor
    from fastgradstats.rules import run
    recs = [Planted(40, seed=k).record() for k in range(8)]
    was  = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool: wrong = sum(pool.map(lambda rec: sum(run(rec).rec is not rec for _ in range(300)), recs))
    finally: sys.setswitchinterval(was)
    assert not wrong

def test_thresholds_are_keywords():
    rec = FAULTS['dead_units']()[0].record()
    assert not list(RULES['dead_units'](rec, limit=.99))

# --- which factor fails ----------------------------------------------------------------------------------------------
def first(p): return diagnose(p.record()).findings[0]

@pytest.mark.parametrize('e,u,name', [(.06, 5e-6, 'step_too_small'), (.06, 1e-3, 'starved'), (.002, 1e-6, 'starved'), (3., 5e-6, 'step_too_small')])
def test_a_step_too_small_and_a_starved_net_are_told_apart(e, u, name):
    "By what a larger step would do: at an elasticity of .06 it would learn, at .002 not."
    p = Planted().starve()
    p.v['grad', 'norm'][:]   = e * 2.3 / 5
    p.v['update', 'norm'][:] = u * 5
    assert first(p).rule == name

def gone(loss):
    p = Planted().starve()
    for k in ('norm', 'mean'): p.v['grad', k][:] = 0
    p.v['grad', 'frac_zero'][:] = 1
    p.v['grad', 'hist'][:] = 0; p.v['grad', 'hist'][:, :, 194] = 100
    p.iters['loss'] = loss * p.iters['loss']; p.iters['loss_constant'] = loss * p.iters['loss_constant']
    return p

def test_gradients_that_are_all_gone_in_half_precision():
    "A loss of 2e-5 over 64 x 64 outputs is 5e-9 each: half precision has nothing so small. Not so a loss of 2."
    assert first(gone(1e-5)).rule == 'fp16_underflow' and first(gone(1.)).rule == 'starved'
    p = gone(1e-5); p.v['output', 'min'][:] = p.v['output', 'max'][:] = .5                  # one answer to all: no gradient
    assert first(p).rule == 'starved'

@pytest.mark.parametrize('learns', [False, True])
def test_a_step_that_killed_the_net_is_named_though_the_loss_came_back_at_once(learns):
    p = Planted() if learns else Planted().starve(slice(4, None))
    p.v['update', 'norm'][3, 3] = 1.4 * 5
    p.iters['loss'][3] = 2.3; p.iters['loss'][4] = 5.8
    found = {f.rule: f for f in diagnose(p.record()).findings}
    assert ('step_too_large' in found) != learns
    if not learns: assert 'nothing has been learned since' in found['step_too_large'].evidence

@pytest.mark.parametrize('dead,loss,severity', [(.6, 1.3, 'info'), (.9, 1.3, 'info'), (.97, 1.3, 'warning'), (.97, .3, 'info')])
def test_dead_units_are_a_warning_only_where_a_layer_is_dead_and_not_much_is_learned(dead, loss, severity):
    p = Planted(); p.v['activation', 'frac_dead'][2:, 1] = dead
    p.iters['loss'] = p.iters['loss'] + loss - .3
    f = first(p)
    assert f.rule == 'dead_units' and f.severity == severity

def test_saturation_of_a_net_that_learns_well_is_no_fault():
    p = Planted(); p.act = 'Tanh'; p.v['activation', 'frac_saturated'][:, 2] = .8
    assert first(p).rule == 'saturated' and diagnose(p.record()).ok
    p.iters['loss'] = p.iters['loss'] + 1.2
    assert not diagnose(p.record()).ok                                   # it was so from the start, and little is learned

def test_units_stuck_at_a_bound_are_saturated_not_dead():
    p = Planted().starve(); p.act = 'Tanh'
    p.v['activation', 'frac_saturated'][:, 2] = 1.; p.v['activation', 'frac_dead'][:, 2] = 1.; p.v['activation', 'std'][:, 2] = 0.
    assert first(p).rule == 'saturated'
    del p.v['activation', 'frac_saturated']
    assert first(p).rule == 'dead_units'

@pytest.fixture(scope='module')
def bounded():
    "f(act, gain, at=None): a small net of bounded activations trained under the default plan, and its counted shares; `at`: all of them are there, lr 0."
    import torch
    from torch import nn
    from fastgradstats import watch
    from fastgradstats.measure.plan import DEFAULTS
    def run(act, gain=1., at=None, without=()):
        torch.manual_seed(0)
        x     = torch.randn(128, 12) if at is None else torch.full((128, 12), float(np.arctanh(at))) * torch.randn(128, 12).sign()
        y     = (x[:, :2].sum(1) > 0).long()
        model = nn.Sequential(nn.Linear(12, 12), act(), nn.Linear(12, 12), act(), nn.Linear(12, 2))[slice(0, 5) if at is None else slice(1, 5, 3)]
        for m in model:
            if isinstance(m, nn.Linear): m.weight.data *= gain
        opt   = torch.optim.SGD(model.parameters(), .5 if at is None else 0.)
        with watch(model, opt, activation=[s for s in [*DEFAULTS['activation'], 'frac_saturated'] if s not in without]) as w:
            for _ in range(60):
                k = torch.randint(0, 128, (64,))
                w.loss(nn.functional.cross_entropy(model(x[k]), y[k])).backward()
                opt.step(); opt.zero_grad()
        r    = w.record
        keep = {k: r[k] for k in r.keys() if k[1] != 'frac_saturated'}
        return Record(r.iters, keep, r.layers, r.windows, None, None, r.bins, r.meta), r['activation', 'frac_saturated'][-20:]
    return run

@pytest.mark.parametrize('act', ['Tanh', 'Sigmoid', 'Hardtanh', 'Hardsigmoid'])
@pytest.mark.parametrize('gain', [1, 3, 10, 40])
def test_saturation_that_was_not_counted_is_read_from_histogram_and_moments(bounded, act, gain):
    from torch import nn
    from fastgradstats.diagnosis.rules.units import _by_hist
    rec, counted = bounded(getattr(nn, act), gain)
    read = np.median(_by_hist(rec, rec.layers['activation'].type)[-20:], axis=0)
    assert np.abs(read - np.median(counted, axis=0)).max() < .05
    found = [f for f in RULES['saturated'](rec)]
    if np.median(counted, axis=0).max() < .45: assert not found
    if np.median(counted, axis=0).max() > .55: assert 'about' in found[0].evidence and 'by its histogram, mean and std' in found[0].evidence

@pytest.mark.parametrize('at,seen', [(.88, False), (.9, False), (.93, False), (.99, True), (.999, True)])
def test_a_tanh_at_nine_tenths_is_not_saturated(bounded, at, seen):
    "All of it lies in the last bin before 1, which begins at .875."
    from torch import nn
    rec, counted = bounded(nn.Tanh, at=at)
    assert bool(list(RULES['saturated'](rec))) == seen == bool(np.median(counted) > .5)

def test_saturation_that_cannot_be_read_is_skipped(bounded):
    from torch import nn
    rec, _ = bounded(nn.Tanh, 10, without=('mean',))
    assert "'frac_saturated' of 'activation' counts it" in next(s.why for s in diagnose(rec).skipped if s.rule == 'saturated')

def test_a_loss_below_zero_does_not_explode_by_falling():
    p = Planted()
    p.iters['loss'] = p.iters['loss'] - 3.; p.iters['loss_constant'] = np.full(p.n, -1.2)
    p.v['grad', 'norm'][40:60] = 50.
    assert 'exploding' not in [f.rule for f in diagnose(p.record()).findings]
    p.iters['loss'][40:60] = 5.
    assert 'exploding' in [f.rule for f in diagnose(p.record()).findings]

def test_what_fades_makes_no_step_too_large():
    p, *_ = FAULTS['step_too_large']()
    p.v['activation', 'std'] *= .01
    p.iters['loss'] = np.where(np.arange(p.n) > 30, 9., p.iters['loss'])
    rules = [f.rule for f in diagnose(p.record()).findings if f.severity != 'info']
    assert rules[0] == 'step_too_large' and 'bad_init' in rules

def test_a_small_step_of_adam_is_three_times_as_large():
    def planted(name):
        p = Planted().starve(by=1.); p.v['grad', 'norm'][:] = .3; p.v['update', 'norm'][:] = 2e-4 * 5
        r = p.record()
        return Record(r.iters, {k: r[k] for k in r.keys()}, r.layers, r.windows, None, None, r.bins, {'optimizer': {'name': name}})
    assert diagnose(planted('Adam')).findings[0].rule == 'step_too_small'
    assert 'step_too_small' not in [f.rule for f in diagnose(planted('SGD')).findings]

# --- advice ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('name', RULES)
def test_every_key_of_a_fix_is_in_the_advice(name):
    from fastgradstats.diagnosis.fixes import WORDS
    for f in RULES[name](FAULTS[name]()[0].record()):
        assert set(f.fix) <= set(WORDS)
        rate = Planted().record().iters.lr.max()
        for k, v in f.fix.items(): assert WORDS[k](v, *[rate] * (k == 'lr')) in f.advice

@pytest.mark.parametrize('ratio,factor', [(5e-6, 1000.), (9e-5, 100.), (1e-12, 1e4)])
def test_the_factor_on_a_small_learning_rate_brings_the_usual_ratio(ratio, factor):
    p = Planted().starve()
    p.v['grad', 'norm'][:] = 1.; p.v['update', 'norm'][:] = 5 * ratio
    assert first(p).fix == {'lr': factor}

def test_what_to_do_about_a_large_step_depends_on_what_was_before():
    big = lambda: FAULTS['step_too_large']()[0]
    p = big(); p.iters['lr'] = np.where(np.arange(100) == 30, 30., .1)
    assert first(p).fix == {'lr_cap': .1}                                # the schedule
    p = big(); p.iters['grad_norm'] = np.full(100, .43)
    assert first(p).fix == {'clip': .4}                                  # usual steps before it
    p = big(); p.v['update', 'norm'][:31] = 20.; p.iters['loss'][:31] = 2.3
    assert first(p).iters[0] == 0 and first(p).fix == {'lr': .001}       # too large from the first on

def test_adam_is_known_by_its_first_steps():
    from fastgradstats.diagnosis.evidence import run
    p = Planted()
    assert not run(p.record()).adaptive
    p.v['update', 'norm'][:] = .01
    p.v['grad', 'norm'][:]  *= np.array([1., 3., 9., 27.])
    assert run(p.record()).adaptive

def factor(p, rule):
    f = next(f for f in diagnose(p.record()).findings if f.rule == rule)
    return f.evidence.split('three factors')[1] if 'three factors' in f.evidence else ''

def test_the_factor_that_fails_is_named():
    p = Planted().starve()
    assert factor(p, 'starved').endswith('elasticity fails')
    p = FAULTS['step_too_small']()[0]
    assert factor(p, 'step_too_small').endswith('the update ratio fails')
    p = FAULTS['not_learning']()[0]                                      # elasticity .4, ratio .004, and it stays where it is
    assert factor(p, 'not_learning').endswith('the direction fails') and 'labels' in diagnose(p.record()).findings[0].advice

def test_the_direction_is_the_share_of_what_the_other_factors_allow():
    from fastgradstats.diagnosis.evidence import run
    p, t = Planted(layers=1), np.arange(100)
    p.iters['loss'] = 2.3 * np.exp(-.002 * t)
    p.v['grad', 'norm']   = .8 * p.iters['loss'][:, None] / 5             # elasticity .8
    p.v['update', 'norm'] = np.full((100, 1), .005 * 5)                   # x ratio .005 = .004, and .002 is removed
    r = run(p.record())
    assert abs(r.direction[-1] - .5) < .02
    p.iters['loss'] = p.iters['loss'] + np.random.default_rng(0).normal(0, .2, 100)
    assert np.isnan(run(p.record()).direction[-1])                       # the noise hides it

# --- AdamW -----------------------------------------------------------------------------------------------------------
class Told(Planted):
    "With what the record may say of the optimizer."
    optimizer = None
    def record(self):
        from fastgradstats import Record
        r = super().record()
        return Record(r.iters, {k: r[k] for k in r.keys()}, r.layers, r.windows, None, None, r.bins, {'optimizer': self.optimizer})

def adamw(lr, ratio, **optimizer):
    p = Told().starve()
    p.iters['lr'] = lr
    p.v['grad', 'norm'][:], p.v['update', 'norm'][:] = 1., 5 * ratio
    p.optimizer = optimizer or None
    return [f for f in diagnose(p.record()).findings if f.rule == 'step_too_small']

def test_a_small_step_is_judged_against_where_adamw_settles():
    "sqrt(2 lr wd): at lr 1e-7 and wd .01 4.5e-5, which is at rest and no fault; at lr 1e-3 .0045, of which 4.5e-5 is far below."
    assert adamw(1e-7, 4.5e-5) and adamw(1e-7, 4.5e-5, wd=.01, decoupled=False) and adamw(1e-7, 4.5e-5, wd=0., decoupled=True)
    assert not adamw(1e-7, 4.5e-5, wd=.01, decoupled=True)
    found = adamw(1e-3, 4.5e-5, wd=.01, decoupled=True)
    assert found and 'settles near 0.0045' in found[0].evidence
    assert adamw(1e-7, 1e-6, wd=.01, decoupled=True)

# --- through time ----------------------------------------------------------------------------------------------------
def test_half_precision_that_lets_only_the_last_layer_through():
    "Every gradient but the head's is exactly zero, and what the head gets is just above the smallest number."
    def gone(edge):
        p = Planted().starve()
        p.v['grad', 'frac_zero'][:, :-1] = 1.
        h = p.v['grad', 'hist']; h[:] = 0.; h[:, :-1, 194] = 1000.
        size = np.maximum(np.abs(BINS.edges[:-1]), np.abs(BINS.edges[1:]))
        h[:, -1, 1 + int(np.abs(np.log2(size) - np.log2(edge)).argmin())] = 1000.
        return diagnose(p.record()).findings[0]
    found = gone(2. ** -22)
    assert found.rule == 'fp16_underflow' and len(found.layers) == Planted().layers - 1 and 'just above 6e-8' in found.evidence
    assert gone(2. ** -10).rule != 'fp16_underflow'

def test_a_net_that_died_is_no_underflow():
    "Gradients of a few first iterations, however small, and exact zeros ever after."
    p = Planted().starve()
    p.v['grad', 'frac_zero'][5:] = 1.
    h = p.v['grad', 'hist']; h[:] = 0.; h[:, :, 194] = 1000.
    h[0, :, 194 + 40] = 100.
    assert 'fp16_underflow' not in [f.rule for f in diagnose(p.record()).findings]

def test_a_rule_that_a_record_is_not_about_is_neither_checked_nor_skipped():
    rep = diagnose(Planted().record())
    assert 'vanishing_through_time' not in rep.checked and not rep.skipped
    assert 'vanishing_through_time' in diagnose(PerCall().record()).checked
    p = PerCall(); p.without = {('grad_output', 'norm')}
    assert 'vanishing_through_time' in [s.rule for s in diagnose(p.record()).skipped]

def test_a_start_that_was_undone_at_a_price_is_a_warning():
    def found(loss):
        p = Planted()
        p.v['activation', 'std'][:, 1:] *= 200.
        p.iters['loss'] = loss
        return [f for f in diagnose(p.record()).findings if f.rule == 'bad_init']
    t = np.arange(100)
    soon, late = (np.where(t < n, 40. - t * 30 / n, 1.5 + .01 * np.sin(t)) for n in (20, 70))
    assert [f.severity for f in found(soon)] == ['info'] and [f.severity for f in found(late)] == ['warning']
    assert 'larger loss than a constant answer' in found(late)[0].evidence

# --- what is past, and what the batch is to blame for ----------------------------------------------------------------
def severity(p, rule): return next((f.severity for f in diagnose(p.record()).findings if f.rule == rule), None)

@pytest.mark.parametrize('at,expected', [(40, 'info'), (84, 'warning')])
def test_a_loss_that_spiked_and_came_back_is_no_alarm_once_much_is_learned(at, expected):
    p = Planted()
    p.iters['loss'][at:at + 12:4] = 9.
    assert severity(p, 'unstable') == expected
    p.v['grad', 'norm'][at:at + 12:4] *= 500.
    assert severity(p, 'exploding') == expected

def test_hard_batches_are_no_unstable_loss():
    p = Planted().starve()
    rows = [30, 45, 60, 75]
    p.iters['loss'][rows] = 9.
    assert severity(p, 'unstable') == 'critical'
    p.iters['loss_constant'] = np.array(p.iters['loss_constant']); p.iters['loss_constant'][rows] = 9.
    assert severity(p, 'unstable') is None

def test_a_loss_near_zero_explodes_by_what_it_had_come_down():
    p = Planted()
    p.iters['loss'] = p.iters['loss'] - 2.1; p.iters['loss_constant'] = np.full(p.n, .2)
    p.v['grad', 'norm'][40:45] = 50.
    p.iters['loss'][40:45] = 1.                                          # five times the first loss, half of what was gained
    assert severity(p, 'exploding') is None
    p.iters['loss'][40:45] = 9.
    assert severity(p, 'exploding') is not None

def test_batches_that_differ_much_do_not_hide_what_is_learned():
    "The loss of every batch is .2 below that of the constant answer, which goes up and down by a half and more."
    from fastgradstats.diagnosis.evidence import run
    p = Planted()
    c = np.random.default_rng(0).choice([.7, 1., 1.6], p.n)
    p.iters['loss_constant'] = c; p.iters['loss'] = c.copy()
    assert run(p.record()).not_learned[-1]
    p.iters['loss'] = c - .2
    assert not run(p.record()).not_learned[-1]

def test_an_input_off_scale_is_no_alarm_where_much_is_learned():
    p = Planted(); p.v['input', 'std'][:] = 40.
    assert severity(p, 'input_scale') == 'info'
    p.iters['loss'] = p.iters['loss'] + 2.2                              # of a net that learned nothing yet it is one
    assert severity(p, 'input_scale') == 'warning'

def test_weights_off_scale_are_named_before_gradients_that_seem_to_be_kept():
    p = FAULTS['not_zeroed']()[0].starve(by=1.)
    p.iters['loss'] = 2.3 + .01 * np.random.default_rng(0).normal(size=p.n)
    assert first(p).rule == 'not_zeroed'
    p.v['weight', 'norm'][:, 1] = 64 * 8 * 3.                             # 24 / sqrt(fan in)
    f = first(p)
    assert (f.rule, f.layer) == ('bad_init', '1.weight') and np.isclose(f.value, 24 * 8)
    assert f.fix['layers'] == ('1',) and f.fix['init'] == 'kaiming'

def test_adam_at_a_fiftieth_of_its_usual_rate_crawls_however_large_its_steps_are():
    def planted(lr):
        p = Planted().starve(by=1e-3); p.v['update', 'norm'][:] = .005 * 5; p.iters['lr'] = lr
        r = p.record()
        return Record(r.iters, {k: r[k] for k in r.keys()}, r.layers, r.windows, None, None, r.bins, {'optimizer': {'name': 'Adam'}})
    assert diagnose(planted(5e-5)).findings[0].rule == 'step_too_small' and diagnose(planted(5e-5)).findings[0].fix == {'lr': 10.}
    assert "Adam's usual: 0.001 to 0.01" in diagnose(planted(5e-5)).findings[0].evidence
    for lr in (1e-3, np.nan): assert diagnose(planted(lr)).findings[0].rule == 'starved'      # usual, or not known

def test_half_precision_that_lets_a_few_elements_of_every_layer_through():
    p = Planted().starve()
    p.v['grad', 'frac_zero'][:] = 1.
    h = p.v['grad', 'hist']; h[:] = 0.; h[:, :, 194] = 1000.
    size = np.maximum(np.abs(BINS.edges[:-1]), np.abs(BINS.edges[1:]))
    h[3, :, 1 + int(np.abs(np.log2(size) - np.log2(2. ** -22)).argmin())] = 9.
    f = diagnose(p.record()).findings[0]
    assert f.rule == 'fp16_underflow' and len(f.layers) == Planted().layers

def test_gradients_that_grow_smoothly_are_no_kept_ones_and_kept_ones_are_a_fact():
    p = Planted().stay(); p.v['grad', 'mean'] = np.cumsum(np.cumsum(p.v['grad', 'mean'], axis=0), axis=0); p.v['grad', 'norm'] *= np.linspace(1, 50, p.n)[:, None]
    assert severity(p, 'not_zeroed') is None
    p.iters['grad_kept'] = np.where(np.arange(p.n), 1., np.nan)
    assert severity(p, 'not_zeroed') == 'critical'
    assert severity(FAULTS['not_zeroed']()[0], 'not_zeroed') == 'critical'

def test_a_net_that_has_lost_what_it_knew_is_not_said_to_learn():
    said = {k: diagnose(Planted().starve(slice(k, None)).record()) for k in range(40, 86, 5)}
    for k, rep in said.items(): assert 'earns (' not in rep.verdict and ('starved' in [f.rule for f in rep.findings]) == (k <= 80), (k, rep.verdict)
