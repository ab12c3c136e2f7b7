"One Outcome: what diagnose, compare and the picture say of a record is the same."
import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
import pytest
from planted import FAULTS, Planted

from fastgradstats import Record, compare, diagnose, plot_small_gradients
from fastgradstats.diagnosis.evidence import run
from fastgradstats.diagnosis.outcome import outcome

def planted(loss, constant=2.3, g=.2, n=120, noise=.01, seed=0):
    p   = Planted(n)
    rng = np.random.default_rng(seed)
    p.iters['loss']          = np.broadcast_to(loss, n) * np.exp(noise * rng.normal(size=n))
    p.iters['loss_constant'] = np.full(n, constant)
    p.v['grad', 'norm']      = np.broadcast_to(g, n)[:, None] * np.ones(p.layers)
    return p.record()

T    = np.arange(120)
FALL = lambda to, tau=12: to + (2.3 - to) * np.exp(-T / tau)
NETS = dict(
    learning  = planted(FALL(.3, 40)),
    converged = planted(FALL(.02), g=np.clip(np.exp(-T / 12), .02, None)),
    floor     = planted(FALL(.8), g=np.clip(np.exp(-T / 12), .02, None)),              # .8 is a third of its first loss
    starved   = planted(2.3, g=2e-4, noise=.002),
    ends_low  = planted(FALL(.02), g=np.clip(np.exp(-T / 12), 1e-4, None)),            # an elasticity as a starved net's
    woke      = planted(np.where(T < 60, 2.3, .2 + 2.1 * np.exp(-np.clip(T - 60, 0, None) / 10.)), g=np.where(T < 60, 2e-4, .3), noise=.002),
    resumed   = planted(.02, g=np.linspace(.02, .004, 120)),                           # was trained before: nothing falls
    aside     = planted(2.3, constant=4., g=np.linspace(.2, .04, 120)),                # better than a constant, never changed
    waking    = planted(2.3, g=.001 * np.exp(T / 35), noise=.002))
SAID = dict(converged='Converged: ', starved='tarved of gradient', waking='begun to move', learning='t learns (')

@pytest.mark.parametrize('name', NETS)
def test_diagnose_compare_and_the_picture_agree(name):
    rec  = NETS[name]
    ends = outcome(rec)
    rep  = diagnose(rec)
    two  = compare({'this': rec, 'other': NETS['learning']})
    assert two.state('this', 'last') == ends.state
    for s, says in SAID.items(): assert (says in rep.verdict) == (s == ends.state) or s == 'learning' and not ends.fell, (ends.state, rep.verdict)
    layers = set(rep.layers[rep.layers.probe == 'grad'].verdict)
    assert layers == {dict(learning='healthy').get(ends.state, ends.state)}
    ax = plot_small_gradients({'this': rec, 'other': NETS['starved'], 'third': NETS['converged']})
    for mark in ax.findobj(lambda a: a.get_gid() in ('starved', 'converged')):
        of = [n for n, l in zip(('this', 'other', 'third'), [l for l in ax.lines if l.get_gid() == 'path']) if l.get_color() == mark.get_color()][0]
        assert mark.get_gid() in set(outcome(dict(this=rec, other=NETS['starved'], third=NETS['converged'])[of]).by_row)
    plt.close('all')

def test_the_states_are_those_that_were_planted():
    ends = {n: outcome(r).state for n, r in NETS.items()}
    assert ends == dict(learning='learning', converged='converged', floor='converged', starved='starved', ends_low='converged', woke='learning',
                        resumed='learning', aside='learning', waking='waking')

@pytest.mark.parametrize('name', ['resumed', 'aside'])
def test_what_has_not_changed_has_not_converged(name):
    verdict = diagnose(NETS[name]).verdict
    assert 'onverged' not in verdict and 'It learns' not in verdict and 'the loss has not fallen' in verdict

@pytest.mark.parametrize('seed', range(20))
def test_converged_is_never_said_of_an_unchanged_loss(seed):
    "Whatever the gradient does, the constant answer costs, and the noise is."
    rng = np.random.default_rng(seed)
    rec = planted(rng.choice([.01, .5, 2.3]), rng.choice([2.3, 4., 100.]), np.geomspace(1., rng.choice([.3, .01, 1e-4]), 120), noise=rng.choice([.001, .01, .1]), seed=seed)
    assert 'converged' not in set(outcome(rec).states) and 'Converged' not in diagnose(rec).verdict

def test_in_time():
    o = outcome(NETS['woke'])
    assert o.at(T < 10) == o.at(slice(0, 3)) == o.at(T == 40) == 'starved' and o.at(T >= 100) == o.state == 'learning'
    assert len(o.by_row) == 120 and set(o.states[:14]) == {'cannot tell'}

def test_not_finite_and_too_short():
    assert outcome(FAULTS['non_finite']()[0].record()).state == 'not finite'
    assert outcome(FAULTS['non_finite']()[0].record()).at(T[:100] < 50) == 'learning'
    p = Planted(20); p.iters['loss'] = np.full(20, np.nan)
    assert outcome(p.record()).state == 'cannot tell' == outcome(p.record()).at([0])

def test_values_that_were_never_finite_are_not_a_loss_untold():
    p = FAULTS['non_finite']()[0]
    p.iters['loss'] = np.full(p.n, np.nan); p.v['grad', 'frac_nonfinite'][:] = 1.
    rep = diagnose(p.record())
    assert rep.critical and rep.verdict.startswith('Values are not finite')
    untold = Planted(); untold.iters['loss'] = np.full(untold.n, np.nan); untold.iters['grad_norm'] = 1.
    rec = untold.record()
    assert diagnose(rec).ok and 'cannot be told' in diagnose(rec).verdict

def test_nothing_is_critical_without_evidence():
    "Every fault of which the outcome was not measured: never critical, unless values are not finite."
    for name, fault in FAULTS.items():
        p = fault()[0]
        p.iters['loss_constant'] = p.iters['loss_prior'] = np.full(p.n, np.nan)
        if name in ('non_finite', 'not_zeroed'): continue
        assert not diagnose(p.record()).critical, name

def test_before_a_fair_share_of_the_fit_nothing_learned_is_no_harm():
    p = FAULTS['starved']()[0]
    assert diagnose(p.record()).critical
    p.meta['planned'] = 10 * p.n
    assert diagnose(p.record()).ok

def test_what_holds_on_the_validation_set_is_learned():
    "Dropout keeps the loss of the batches above that of a constant answer."
    p = Planted().stay()
    assert diagnose(p.record()).critical
    assert not diagnose(p.validate([2.2, 1.9, 1.5, 1.2, 1.]).record()).critical

def test_converged_is_read_where_the_learning_rate_is_fair():
    rec = lambda lr: planted_at(lr)
    def planted_at(lr):
        r = NETS['converged']
        return Record(r.iters.assign(lr=lr), {k: r[k] for k in r.keys()}, r.layers, r.windows)
    assert outcome(rec(.1)).state == 'converged'
    assert outcome(rec(np.where(T < 20, .1, 1e-4))).state == 'learning'

@pytest.mark.parametrize('offset', [0., 100., -5.])
def test_what_is_learned_does_not_depend_on_a_constant_added_to_the_loss(offset):
    p = Planted(); r = run(p.record())
    q = Planted(); q.iters['loss'] = q.iters['loss'] + offset; q.iters['loss_constant'] = q.iters['loss_constant'] + offset
    s = run(q.record())
    np.testing.assert_allclose(r.gain_over_constant, s.gain_over_constant, atol=1e-9)
    assert not s.not_learned[-1] and s.learned[-1]
