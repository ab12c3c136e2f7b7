"Rules on real training runs: a quick part of the zoo's tuned half by default, that half whole under -m slow."

import pytest

import zoo

from fastgradstats import diagnose

QUICK = ['mlp_deep_sigmoid', 'mlp_zero_init', 'mlp_softmax_twice', 'mlp_no_zero_grad', 'tab_lr_100x', 'tab_unscaled',
         'mlp_fp16_underflow', 'mlp_head_not_stepped']
FOOLERS = ['mlp_clipped', 'cnn_plus_100']

def judged(name, sick, seed=0):
    "Is the first finding a right one, or of a healthy run none? And the Report."
    rep = diagnose(zoo.record(name, sick, seed))
    bad = [f for f in rep.findings if f.severity != 'info']
    return bool(bad) and bad[0].rule in zoo.CASES[name].truth if sick else not bad, rep

@pytest.mark.trains
@pytest.mark.parametrize('name', QUICK)
def test_the_fault_is_named_first(name):
    right, rep = judged(name, True)
    assert right, rep

@pytest.mark.trains
@pytest.mark.parametrize('name', [QUICK[0], *FOOLERS])
def test_healthy_runs_raise_no_alarm(name):
    right, rep = judged(name, False)
    assert right, rep

@pytest.mark.parametrize('half', zoo.HALVES)
def test_each_half_is_large_enough(half):
    cases = [c for c in zoo.CASES.values() if c.half == half]
    pairs = [c for c in cases if c.truth]
    assert len(pairs) >= 20 and len(cases) - len(pairs) >= 10 and sum(bool(c.guilty) for c in pairs) >= 8

def test_the_halves_share_no_architecture():
    tuned, unseen = ({c.arch for c in zoo.CASES.values() if c.half == h} for h in zoo.HALVES)
    assert len(unseen) >= 8 and not tuned & unseen

@pytest.mark.parametrize('name', [c.name for c in zoo.CASES.values() if c.guilty])
def test_twins_differ_in_the_guilty_module_alone(name):
    guilty, twins = zoo.CASES[name].guilty, [zoo.kit(name, s, 0) for s in (True, False)]
    a, b = ({n for n in zoo.modules(k.model) if n != guilty} for k in twins)
    site = zoo.CASES[name].site
    assert a == b and guilty in zoo.modules(twins[0].model) and (not site or twins[0].model.get_submodule(site))
    for n in a:
        p, q = (dict(k.model.get_submodule(n).named_parameters(recurse=False)) for k in twins)
        assert all((p[i] == q[i]).all() for i in p), n

MISSED = {('high_zero_init', True)}                                    # in three seeds of five (benchmarks/zoo.md)

@pytest.mark.slow
@pytest.mark.parametrize('name,sick', [
    pytest.param(*run, marks=pytest.mark.xfail(reason='missed in most seeds') if run in MISSED else ())
    for run in zoo.runs(half='tuned')])
def test_the_tuned_half(name, sick):
    "In four of five seeds: one run near a threshold may go either way with the rounding."
    assert sum(judged(name, sick, seed)[0] for seed in range(5)) >= 4
