"diagnose: converged against starved, first cause, layers, what is skipped, how it reads."
import json
import subprocess
import sys

import numpy as np
import pytest
from planted import FAULTS, Planted

from fastgradstats import diagnose
from fastgradstats.diagnosis.report import VERDICTS


def verdicts(rep, probe='grad'):
    d = rep.layers
    return set(d[d.probe == probe].verdict)

def converged(floor=.02, offset=0., small=1e-3):
    p, t = Planted(300), np.arange(300)
    rng  = np.random.default_rng(1)
    p.iters['loss'] = offset + (floor + (2.3 - floor) * np.exp(-t / 20)) * np.exp(rng.normal(0, .01, 300))
    p.iters['loss_constant'] = np.full(300, 2.3 + offset)
    p.v['grad', 'norm'] = np.clip(np.exp(-t / 20), small, None)[:, None] * np.ones(4)
    return p

def test_healthy():
    rep = diagnose(Planted().record())
    assert rep.ok and not rep.findings and verdicts(rep) == {'healthy'} and 'learns' in rep.verdict

@pytest.mark.parametrize('floor,offset', [(.02, 0.), (.55, 0.), (.02, 100.), (1.6, 0.)])
def test_small_gradients_of_a_converged_net_are_no_alarm(floor, offset):
    "Also at a floor (label smoothing, noise) and with a constant added to the loss, where elasticity is far below the threshold."
    rec = converged(floor, offset).record()
    rep = diagnose(rec)
    assert rep.ok, rep
    assert verdicts(rep) == {'converged'}
    if floor > .5 or offset: assert np.nanmedian(rec['grad', 'elasticity'][-20:]) < .08

def test_the_same_small_gradients_of_a_starved_net_are():
    p = Planted(300).starve()
    p.v['grad', 'norm'] = np.full((300, 4), 1e-3)
    rep = diagnose(p.record())
    assert rep.findings[0].rule == 'starved' and rep.critical and verdicts(rep) == {'starved'}

def test_starvation_that_ended_by_itself_is_info():
    p = Planted(160)
    t = np.arange(160)
    p.iters['loss'] = np.where(t < 60, 2.3 + .005 * np.sin(t), .3 + 2 * np.exp(-(t - 60) / 15))
    p.v['grad', 'norm'] = np.where(t < 60, 2e-4, .2)[:, None] * np.ones(4)
    rep = diagnose(p.record())
    f = next(f for f in rep.findings if f.rule == 'starved')
    assert f.severity == 'info' and 55 <= f.iters[1] <= 75 and rep.ok and 'starved until' in rep.verdict

def test_waking_with_a_forecast():
    p = Planted(60).starve()
    t = np.arange(60)
    p.v['grad', 'norm'] = (.001 * np.exp(t / 20))[:, None] * np.ones(4)          # E = 5 g / 2.3 passes .5 at 20 ln 230 = 108.8
    rep = diagnose(p.record())
    assert 'starved' not in {f.rule for f in rep.findings if f.severity != 'info'}
    assert verdicts(rep) == {'waking'} and 'elasticity rising' in rep.verdict
    when = int(rep.layers['for'].iloc[0].split('iteration ')[1])
    assert abs(when - 108.8) < 5

def test_the_first_five_iterations_never_decide():
    p = Planted(); p.v['grad', 'norm'][:5] = 1e-9; p.iters['loss'][:5] = 2.3
    assert diagnose(p.record()).ok

def test_a_low_layer_of_a_net_that_learns_cannot_be_told():
    p = Planted(); p.v['grad', 'norm'][:, 0] = 1e-4
    rep = diagnose(p.record())
    d = rep.layers.set_index('layer')
    assert rep.ok and d.verdict['0.weight'] == 'cannot tell' and d.against['0.weight'] and d.verdict['2.weight'] == 'healthy'

def test_losses_that_are_not_positive_are_said():
    p = Planted(); p.iters['loss'] = p.iters['loss'] - 2.
    rep = diagnose(p.record())
    assert 'not positive' in next(s for s in rep.skipped if s.rule == 'starved').why

def test_frozen_and_dead_layers():
    p = Planted(); p.v['grad', 'norm'][:, 0] = np.nan; p.v['grad', 'norm'][:, 1] = 0
    d = diagnose(p.record()).layers.set_index('layer').verdict
    assert d['0.weight'] == 'frozen' and d['1.weight'] == 'dead' and d['2.weight'] == 'healthy'

def test_a_chain_is_one_story_with_its_first_link_named():
    p, *_ = FAULTS['step_too_large']()
    p.iters['loss'][31:] = 2.3
    p.iters['loss'][31:41] = 30.
    p.v['activation', 'frac_dead'][2:] = 1.
    p.v['grad', 'norm'][35:] = 0
    rep = diagnose(p.record())
    rules = [f.rule for f in rep.findings]
    assert rules[0] == 'step_too_large' and rules.index('dead_units') < rules.index('starved') < rules.index('not_learning')
    assert rep.verdict.startswith('A step was too large (3.weight) from iteration 30; with it: ') and 'units are dead' in rep.verdict

def test_how_it_reads():
    for name, fault in FAULTS.items():
        rep  = diagnose(fault()[0].record())
        text = repr(rep)
        assert rep.verdict in text and name in text and 'Try: ' in text and 'nan' not in text.lower().replace('nan or', ''), text
        html = rep._repr_html_()
        assert html.count('<table') == html.count('</table>') and name in html
        back = json.loads(json.dumps(rep.json(), allow_nan=False))
        assert back['findings'][0]['rule'] == name and set(back) == {'verdict', 'critical', 'findings', 'checked', 'skipped', 'layers'}
        assert set(rep.layers.verdict) <= set(VERDICTS)

@pytest.mark.parametrize('n', [0, 1, 3, 12])
def test_short_records(n):
    rep = diagnose(Planted(20).record()) if n > 19 else diagnose(_cut(n))
    assert rep.verdict and not rep.critical and 'healthy' not in set(rep.layers.verdict)

def _cut(n, plan=None):
    from fastgradstats import Record
    r = (plan or Planted(20)).record()
    keys = [k for k in r.keys() if k not in r.windows]
    return Record(r.iters.iloc[:n], {k: r[k][:n] for k in keys}, r.layers)

def test_measured_only_now_and_then():
    from fastgradstats import Record
    p = Planted(400).starve()
    r = p.record()
    seen = np.arange(400) % 5 == 0
    rec = Record(r.iters.assign(measured=seen), {k: r[k] if k in r.windows else np.where(seen[:, None], r[k], np.nan) for k in r.keys()}, r.layers, r.windows,
                 None, None, r.bins)
    assert diagnose(rec).findings[0].rule == 'starved'

def test_reads_without_torch_and_fastai():
    code = ("import sys; from fastgradstats import Record, diagnose, Finding, Report\n"
            "bad = {'torch', 'fastai', 'matplotlib'} & set(sys.modules); assert not bad, bad")
    subprocess.run([sys.executable, '-c', code], check=True)

def test_errors_teach():
    with pytest.raises(ValueError, match='verify=True'): diagnose(Planted().record(), verify=True)
    with pytest.raises(TypeError, match=r"got str; read the file first: diagnose\(Record.load\('run.parquet'\)\)"): diagnose('run.parquet')
    with pytest.raises(TypeError, match='got DataFrame'): diagnose(Planted().record().iters)
    with pytest.raises(ValueError, match='fit it with cbs=LayerStatsCallback'): diagnose(None)

@pytest.mark.parametrize('n,short', [(12, {'starved', 'not_learning', 'step_too_small', 'unstable'}), (30, {'not_learning'}), (40, set()),
                                     (1, {'starved', 'not_learning', 'step_too_small', 'unstable', 'exploding', 'step_too_large'})])
def test_what_a_short_record_cannot_tell_is_skipped_not_checked(n, short):
    rep = diagnose(_cut(n, Planted(40)))
    why = {s.rule: s.why for s in rep.skipped}
    assert {k for k, w in why.items() if 'too few' in w} >= short and not short & set(rep.checked)
    assert not {'not_learning', 'starved', 'unstable'} - short & set(why) & {k for k, w in why.items() if 'too few' in w}
    if n == 1: assert why['starved'].startswith('1 measured iteration is too few')

@pytest.mark.parametrize('n,severity', [(20, 'warning'), (60, 'critical')])
def test_a_starved_start_of_a_short_record_is_a_warning(n, severity):
    f = next(f for f in diagnose(Planted(n).starve().record()).findings if f.rule == 'starved')
    assert f.severity == severity and ('few to judge by' in f.evidence) == (severity == 'warning')

def test_layers_of_a_run_that_is_not_finite_are_not_called_frozen():
    p = Planted(60)
    for key in (('grad', 'norm'), ('update', 'norm'), ('activation', 'std')): p.v[key][30:] = np.nan
    p.iters['loss'][30:] = np.nan
    rep = diagnose(p.record())
    assert verdicts(rep) == {'exploding'} == verdicts(rep, 'activation')
    assert rep.layers['for'].str.contains('not finite since iteration 30').any()

@pytest.mark.parametrize('fault,status', [('starved', 1), (None, 0)])
def test_the_command_line(tmp_path, capsys, fault, status):
    from fastgradstats.cli import main
    path = (FAULTS[fault]()[0] if fault else Planted()).record().save(tmp_path / 'r.parquet')
    with pytest.raises(SystemExit) as e: main(['diagnose', str(path)])
    assert e.value.code == status and diagnose(Planted().record() if not fault else FAULTS[fault]()[0].record()).verdict in capsys.readouterr().out
    with pytest.raises(SystemExit) as e: main(['diagnose', str(path), '--json'])
    assert e.value.code == status and json.loads(capsys.readouterr().out)['critical'] == bool(status)

def test_an_outcome_has_advice_of_its_own_only_where_no_cause_was_found():
    p = Planted().starve(by=1.)
    rng = np.random.default_rng(0)
    p.v['grad', 'norm'][:] = 1.; p.iters['loss'] = 2.3 + .02 * rng.normal(size=p.n)
    alone = diagnose(p.record())
    assert [f.rule for f in alone.findings] == ['not_learning'] and 'a look at the data' in alone.findings[0].advice and '?' not in alone.verdict
    caused = next(f for f in diagnose(Planted().starve().record()).findings if f.rule == 'not_learning')
    assert caused.advice == 'what is advised for starved, its cause'

# --- the placebo -----------------------------------------------------------------------------------------------------
def witness(p, value):
    "Every 25th row measures what a signal without meaning does."
    v = np.full((p.n, p.layers), np.nan)
    v[::25] = value
    p.v['grad', 'placebo'] = v
    return p

def test_a_placebo_that_passes_outweighs_a_low_elasticity():
    "The gradient is as small as a starved net's and nothing is learned, but the weights can move the answers."
    rep = diagnose(witness(Planted(100).starve(), 8.).record())
    assert 'starved' not in {f.rule for f in rep.findings} and 'starved' not in verdicts(rep)

def test_a_placebo_that_is_blocked_is_in_the_evidence():
    f = diagnose(witness(Planted(100).starve(), .01).record()).findings[0]
    assert f.rule == 'starved' and 'a signal without meaning is blocked (placebo of the median layer 0.010' in f.evidence

def test_between_the_limits_elasticity_decides():
    assert diagnose(witness(Planted(100).starve(), .7).record()).findings[0].rule == 'starved'
    assert diagnose(witness(Planted(100), .7).record()).ok

def test_the_placebo_tells_where_the_loss_is_not_positive():
    def negative(value):
        p = Planted(100).starve()
        p.iters['loss'], p.iters['loss_constant'] = p.iters['loss'] - 3, np.asarray(p.iters['loss_constant']) - 3
        return diagnose((witness(p, value) if value else p).record())
    blocked, passes, none = negative(.01), negative(8.), negative(None)
    assert blocked.findings[0].rule == 'starved' and 'elasticity says nothing' in blocked.findings[0].evidence
    assert 'starved' in passes.checked and not any(f.rule == 'starved' for f in passes.findings)
    assert 'placebo=True' in next(s for s in none.skipped if s.rule == 'starved').why

def test_a_low_layer_that_the_placebo_reaches_is_healthy_in_a_net_that_learns():
    p = Planted(); p.v['grad', 'norm'][:, 0] = 1e-4
    assert diagnose(witness(p, 8.).record()).layers.set_index('layer').verdict['0.weight'] == 'healthy'
    assert diagnose(witness(p, .01).record()).layers.set_index('layer').verdict['0.weight'] == 'cannot tell'

# --- nothing measured in half is called healthy ----------------------------------------------------------------------
def whole(path):
    "The quick training of a healthy net with everything that rules need, as a record of real numbers."
    import torch
    from fastgradstats import watch
    from torch import nn
    torch.manual_seed(0)
    x     = torch.randn(256, 12)
    y     = (x[:, :2].sum(1) > 0).long()
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 2))
    opt   = torch.optim.SGD(model.parameters(), .1)
    with watch(model, opt, window=20, activation=['mean', 'std', 'frac_dead', 'frac_saturated', 'frac_nonfinite', 'hist'],
               grad_output=['norm']) as w:
        for i in range(120):
            k = torch.randint(0, 256, (64,))
            w.loss(nn.functional.cross_entropy(model(x[k]), y[k])).backward()
            opt.step(); opt.zero_grad()
    return w.record.save(path / 'whole.parquet')

@pytest.fixture(scope='module')
def real(tmp_path_factory):
    from fastgradstats import Record
    rec = Record.load(whole(tmp_path_factory.mktemp('whole')))
    c   = 2.3 if np.isnan(rec.iters.loss_constant).all() else rec.iters.loss_constant            # a plain loop has none
    return Record(rec.iters.assign(loss_constant=c if not np.isscalar(c) else np.full(len(rec), .69)),
                  {k: rec[k] for k in rec.keys()}, rec.layers, rec.windows, None, None, rec.bins, rec.meta)

def less(rec, *gone):
    "A record without these keys; ('iters', column): the column was not measured."
    from fastgradstats import Record
    iters = rec.iters.assign(**{s: np.nan for p, s in gone if p == 'iters'})
    return Record(iters, {k: rec[k] for k in rec.keys() if k not in gone}, rec.layers,
                  {k: w for k, w in rec.windows.items() if k not in gone}, None, None, rec.bins, rec.meta)

def rests_on(need, rec):
    "The recorded keys that a need is made of."
    made = {('grad', 'elasticity'): {('grad', 'norm'), ('weight', 'norm'), ('iters', 'loss')},
            ('update', 'ratio'):    {('update', 'norm'), ('weight', 'norm')}}
    return made.get(need, {need})

def test_the_whole_record_is_checked_by_all_rules_and_healthy(real):
    from fastgradstats.rules import ALL
    rep = diagnose(real)
    assert rep.ok and not rep.skipped and len(rep.checked) == len([f for f in ALL if not f.where or f.where(real)])
    assert verdicts(rep) == {'healthy'} and verdicts(rep, 'activation') == {'healthy'}

KEYS = [('grad', s) for s in ('mean', 'norm', 'frac_zero', 'hist')] + [('weight', 'norm'), ('update', 'norm')] + [
    ('activation', s) for s in ('std', 'frac_dead', 'frac_saturated', 'hist')] + [
    ('input', 'mean'), ('input', 'std'), ('output', 'mean'), ('output', 'min'), ('output', 'max'), ('iters', 'loss')]

@pytest.mark.parametrize('key', KEYS)
def test_without_one_statistic_the_rules_that_need_it_are_skipped(real, key):
    from fastgradstats.rules import ALL
    assert key[0] == 'iters' or key in real.keys()
    rep   = diagnose(less(real, key))
    needy = {f.__name__ for f in ALL if (not f.where or f.where(real)) for n in f.needs if not isinstance(n, list) and key in rests_on(n, real)}
    how   = {s.rule: s.how for s in rep.skipped}
    assert needy == set(how) and not needy & set(rep.checked)
    said  = 'w.loss' if key[0] == 'iters' else repr(key[1])
    assert all(said in h and (key[0] == 'iters' or key[0] in h) for h in how.values())
    d = rep.layers
    if key in (('grad', 'norm'), ('weight', 'norm'), ('iters', 'loss')):                 # what a weight's health is
        assert not set(d[d.probe == 'grad'].verdict) & {'healthy', 'converged'}
    if key in (('activation', 'frac_dead'), ('iters', 'loss')):                          # what an activation's health is
        assert not set(d[d.probe == 'activation'].verdict) & {'healthy', 'converged'}

def test_where_one_of_two_is_enough_both_must_be_gone(real):
    for gone, name in (((('activation', 'frac_saturated'), ('activation', 'hist')), 'saturated'),
                       ((('activation', 'std'), ('weight', 'norm')), 'bad_init')):
        rep = diagnose(less(real, *gone))
        assert name in [s.rule for s in rep.skipped] and name not in rep.checked

@pytest.mark.parametrize('key', [('grad', 'norm'), ('iters', 'loss')])
def test_converged_rests_on_the_gradient_and_on_the_loss(key):
    rec = converged().record()
    assert verdicts(diagnose(rec)) == {'converged'} and 'converged' not in verdicts(diagnose(less(rec, key)))

def test_converged_without_the_constant_answer_is_a_loss_of_which_little_is_left():
    rec = less(converged().record(), ('iters', 'loss_constant'))
    assert rec.iters.loss.iloc[-1] < .1 * rec.iters.loss.iloc[0] and verdicts(diagnose(rec)) == {'converged'}

def test_without_the_constant_answer_it_is_said(real):
    rep = diagnose(less(real, ('iters', 'loss_constant')))
    assert 'gain' not in rep.verdict and 'whether it learns cannot be told' in rep.verdict
    assert [(s.rule, 'was not measured' in s.why) for s in rep.skipped] == [('not_learning', True)]

@pytest.mark.parametrize('name', FAULTS)
def test_a_verdict_is_short_and_says_one_thing_to_try(name):
    rep = diagnose(FAULTS[name]()[0].record())
    assert len(rep.story.split()) <= 25, rep.story
    first = next(f for f in rep.findings if f.severity != 'info')
    assert rep.verdict == f"{rep.story} First try: {first.first}." and first.advice.startswith(first.first)

def test_layers_are_called_as_people_see_them():
    p = FAULTS['saturated']()[0]
    rec = p.record()
    make, (iters, values, layers, *rest) = rec.__reduce__()
    layers['activation'] = layers['activation'].assign(layer=[str(k) for k in range(len(layers['activation']))])
    rep = diagnose(make(iters, values, layers, *rest))
    assert '(layer 2)' in rep.verdict and 'of layer 2 (Tanh) lies within' in rep.findings[0].evidence and 'in layer 2,' in str(rep)
