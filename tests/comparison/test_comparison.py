import subprocess
import sys

import matplotlib
import numpy as np
import pandas as pd
import pytest

from fastgradstats.comparison.comparison import Comparison, compare
from fastgradstats.record.record import Record
from fastgradstats.record.schema import ALIVE, DEAD

matplotlib.use('Agg')
PARAMS = {'conv1.weight': '8x1x5x5', 'conv1.bias': '8', 'conv2.weight': '16x8x3x3', 'conv2.bias': '16',
          'conv3.weight': '32x16x3x3', 'conv3.bias': '32', 'head.weight': '10x32', 'head.bias': '10'}
ACTS   = ['act1', 'act2', 'act3']
N      = 60


def record(loss, norm, zeros=0., median=1., n=N, seed=0, dead=0, accuracy=(.1, .9), const=2.3, bad_from=None, per=10, every=1,
           died_from=None, flat=0):
    "A record of n iterations; `loss` and `norm` run geometrically from the first to the second number."
    rng   = np.random.default_rng(seed)
    curve = lambda a, b: np.geomspace(a, b, n) * np.exp(.02 * rng.standard_normal(n))
    it    = np.arange(n)
    loss  = curve(*loss) if not flat else np.r_[np.full(flat, loss[0] - .002), np.geomspace(*loss, n - flat)]
    g     = curve(*norm)[:, None] * np.exp(.02 * rng.standard_normal((n, len(PARAMS))))
    if died_from is not None: g[died_from:] = 0
    if bad_from  is not None: loss[bad_from:], g[bad_from:] = np.nan, np.nan
    sign = np.where(rng.random(g.shape) < .5, -1, 1)
    values = {('grad', 'norm'): g, ('grad', 'mean'): .001 * sign * g, ('grad', 'abs_max'): .2 * g, ('grad', 'abs_mean'): .01 * g,
              ('grad', 'median'): .0005 * sign * g * median, ('grad', 'abs_median'): .005 * g * median,
              ('grad', 'frac_zero'): np.full(g.shape, zeros), ('weight', 'norm'): np.full(g.shape, 5.), ('update', 'norm'): .9 * g,
              ('activation', 'frac_zero'): np.full((n, 3), .5)}
    for k, v in values.items(): values[k] = np.where((it % every == 0)[:, None], v, np.nan)
    ends    = np.arange(per - 1, n, per)
    windows = pd.DataFrame(dict(first_iter=ends - per + 1, last_iter=ends))
    values['activation', 'frac_dead'] = np.full((len(ends), 3), dead / 8)
    units  = {a: np.where(np.arange(8) < dead, DEAD, ALIVE)[None].repeat(len(ends), 0) for a in ACTS}
    params = pd.DataFrame(dict(layer=list(PARAMS), shape=list(PARAMS.values()), numel=1))
    acts   = pd.DataFrame(dict(layer=ACTS, shape='8x4x4', numel=128))
    iters  = pd.DataFrame(dict(iter=it, fit=0, epoch=it // per, bs=8, loss=loss, loss_constant=const, lr=.1, mom=0., grad_norm=1.,
                               clip_factor=1., stepped=True, measured=it % every == 0, n_accum=1, elapsed=it * .01))
    epochs = pd.DataFrame(dict(fit=0, epoch=np.arange(n // per), valid_loss=1., accuracy=np.linspace(*accuracy, n // per)))
    return Record(iters, values, dict(grad=params, weight=params, update=params, activation=acts), {('activation', 'frac_dead'): windows},
                  units, epochs)

def poor(seed=0, **kw): return record(**{**dict(loss=(2.3, .9), norm=(.01, .5), zeros=.6, median=1e-6, seed=seed, dead=2, accuracy=(.1, .8), flat=15 if kw.get('n', N) > 30 else 0), **kw})
def good(seed=0, **kw): return record(**{**dict(loss=(2., .01), norm=(.4, .011), seed=seed, accuracy=(.5, .96)), **kw})

def both(**kw): return compare({'poor': [poor(s) for s in range(3)], 'good': [good(s) for s in range(3)]}, **kw)


def test_table_holds_the_recorded_numbers():
    c   = both()
    t   = c.table.set_index(['model', 'phase', 'probe', 'statistic', 'layer'])
    per = [np.median(r['grad', 'norm'][:10, 2].astype(float)) for r in c.runs['poor']]
    row = t.loc[('poor', 'first', 'grad', 'norm', 'conv2.weight')]
    assert row[['median', 'min', 'max']].tolist() == pytest.approx([np.median(per), min(per), max(per)])
    assert row.seeds == 3
    per = [np.median(r.iters.loss[-20:]) for r in c.runs['good']]
    assert t.loc[('good', 'last', 'iters', 'loss', '')]['median'] == pytest.approx(np.median(per))
    per = [np.median(np.median(r['grad', 'elasticity'][-20:, ::2], axis=1)) for r in c.runs['good']]   # ::2 the weights, no biases
    assert t.loc[('good', 'last', 'grad', 'elasticity', 'median layer')]['median'] == pytest.approx(np.median(per), rel=1e-5)
    per = [r['grad', 'per_loss'][:, 4].mean() for r in c.runs['poor']]
    assert t.loc[('poor', 'whole', 'grad', 'per_loss', 'conv3.weight')]['median'] == pytest.approx(np.median(per), rel=1e-5)
    assert t.loc[('poor', 'last', 'activation', 'frac_dead', 'all units')]['median'] == pytest.approx(2 / 8)
    assert t.loc[('good', 'last', 'epochs', 'accuracy', '')]['median'] == pytest.approx(.96)
    signed = [np.median(np.abs(r['grad', 'mean'][:10, 0])) for r in c.runs['poor']]
    assert t.loc[('poor', 'first', 'grad', '|mean|', 'conv1.weight')]['median'] == pytest.approx(np.median(signed), rel=1e-5)

def test_the_verdict_says_what_the_reference_says():
    v = both().verdict
    for part in ('Not by themselves', 'good ends the better net: accuracy 0.960 against 0.800', 'Iterations 0–9: no', 'larger in all 12',
                 'Iterations 40–59: yes for the norm (smaller in 12 of 12', 'no for the median (0 of 12)', 'up to 60 %',
                 'the order is reversed', 'An equal |g| of conv2.weight', 'poor begins starved', 'good ends converged'):
        assert part in v, (part, v)

def test_a_phase_that_is_not_there_is_a_sentence():
    c = both()
    with pytest.raises(KeyError, match="no phase 'middle'; give one of first, last, whole"): c.span('middle')
    assert c.span('first') == '0–9' and c.span('whole') == '0–59'

def test_swapped_records_swap_the_answer():
    c = both()
    s = compare({'poor': c.runs['good'], 'good': c.runs['poor']})
    assert s.order == ('good', 'poor') and c.order == ('poor', 'good')
    swapped = c.verdict.replace('good ', '<> ').replace("good's", "<>'s").replace('poor ', 'good ').replace("poor's", "good's")
    assert s.verdict == swapped.replace('<> ', 'poor ').replace("<>'s", "poor's")

@pytest.mark.parametrize('change, part, gone', [
    (dict(norm=(.001, .0001)),             'Iterations 0–9: yes, the norm of its weight gradients is', 'Iterations 0–9: no'),
    (dict(norm=(.4, 2.)),                  'no for the norm (smaller in 0 of 12 pairs', 'yes for the norm'),
    (dict(norm=(.001, .0001)),             'the order stays', 'reversed'),
    (dict(norm=(.4, 2.)),                  'At no time is |g| of conv2.weight early in poor as small as late in good', 'An equal |g|'),
    (dict(loss=(2., .5)),                  'Convergence is not seen: good ends learning', 'converged'),
    (dict(median=1e-9),                    'the median (12 of 12)', 'no for the median'),
])
def test_each_clause_follows_the_numbers_of_the_better_net(change, part, gone):
    v = compare({'poor': [poor(s) for s in range(3)], 'good': [good(s, **change) for s in range(3)]}).verdict
    assert part in v and gone not in v, v

@pytest.mark.parametrize('change, part, gone', [
    (dict(norm=(.1, .5)),                           'Starvation is not seen: poor begins in a state that cannot be told', 'starved,'),
    (dict(zeros=0.),                                'no for the median', 'Exact zeros'),
    (dict(loss=(2.3, .001)),                        'Which net is better these seeds do not settle', 'ends the better net'),
    (dict(norm=(.1, .5), loss=(2.3, .001), accuracy=(.1, .99)), 'poor ends the better net', 'good ends the better net'),
])
def test_each_clause_follows_the_numbers_of_the_worse_net(change, part, gone):
    v = compare({'poor': [poor(s, **change) for s in range(3)], 'good': [good(s) for s in range(3)]}).verdict
    assert part in v and gone not in v, v

def test_seeds_that_disagree_are_counted():
    v = compare({'poor': [poor(s) for s in range(4)], 'good': [good(0), good(1), good(2, norm=(.001, .01)), good(3, norm=(.001, .01))]}).verdict
    assert 'Iterations 0–9: undecided' in v and '8 of 16 pairs' in v
    v = compare({'poor': [poor(s) for s in range(5)], 'good': [*(good(s) for s in range(4)), good(4, norm=(.001, .01))]}).verdict
    assert 'Iterations 0–9: mostly no' in v and 'larger in 16 of 20 pairs' in v

def test_nothing_learned_and_nothing_starved_leaves_the_question_open():
    c = compare({'a': record((2.3, 2.2), (1., 1.)), 'b': record((2.3, 2.1), (1., 1.))})
    assert 'do not tell' in c.verdict and 'stays open' in c.verdict

def test_non_finite_runs_are_reported_and_not_hidden():
    c = compare({'poor': [poor(0), poor(1, bad_from=33), poor(2)], 'good': [good(s) for s in range(3)]})
    assert c.nonfinite == {('poor', 1): 33}
    assert 'poor seed 1 from iteration 33' in c.verdict
    assert '(1 non-finite)' in repr(c)
    row = c.table.query("model=='poor' and phase=='last' and statistic=='norm' and layer=='conv2.weight'").iloc[0]
    assert row.seeds == 2 and np.isfinite(row['median'])
    c = compare({'poor': [poor(0), poor(1, bad_from=57), poor(2)], 'good': [good(s) for s in range(3)]})
    assert '(1 non-finite)' in repr(c) and c.cells('last', 'norm').n == 8    # also where most of the last iterations are finite
    c = compare({'poor': [poor(s, bad_from=5) for s in range(2)], 'good': [good(s) for s in range(2)]})
    assert c.order == ('poor', 'good') and 'non-finite' in repr(c) and 'do not tell' in c.verdict and 'cannot be compared' in c.verdict
    c.plot()

def test_a_net_that_died_is_named_and_not_called_better_for_its_zero_gradients():
    c = compare({'poor': [poor(0), poor(1, died_from=45, loss=(2.3, 2.3)), poor(2)], 'good': [good(s) for s in range(3)]})
    assert c.dead == {('poor', 1): 45}
    assert c.cells('last', 'norm').n == 8 and 'smaller in 8 of 8' in c.verdict
    assert 'poor seed 1 died at iteration 45' in c.verdict

def told_nothing(r):
    "As a plain loop that never called `w.loss`."
    return Record(r.iters.assign(loss=np.nan, loss_constant=np.nan), {k: r[k] for k in r.keys()}, r.layers, r.windows)

def never_due(r):
    "As with an `every` that never came."
    v = {k: np.full_like(r[k], np.nan) for k in r.keys() if k not in r.windows}
    return Record(r.iters.assign(measured=False, loss_constant=np.nan), v, r.layers)

def test_a_loss_that_was_not_told_is_not_non_finite():
    c = compare({'poor': told_nothing(poor()), 'good': told_nothing(good())})
    assert c.nonfinite == {} and c.state('poor', 'first') == c.state('good', 'last') == 'not measured'
    assert 'of poor and good neither loss nor accuracy is known' in c.verdict and 'w.loss(loss)' in c.verdict
    assert 'on-finite' not in repr(c) and 'ends the better net' not in c.verdict
    assert 'loss not known' in repr(told_nothing(poor())) and 'nan' not in repr(told_nothing(poor()))
    half = compare({'poor': poor(), 'good': told_nothing(good())})
    assert 'of good neither' in half.verdict and 'on-finite' not in repr(half)
    assert half.order == ('good', 'poor')                                    # an accuracy that one alone has ranks nobody

def test_a_net_that_was_never_finite_is_told_by_its_gradients():
    r = poor(bad_from=0)
    r = Record(r.iters, {**{k: r[k] for k in r.keys()}, ('grad', 'frac_nonfinite'): np.ones((N, len(PARAMS)))}, r.layers, r.windows)
    c = compare({'poor': r, 'good': good()})
    assert c.nonfinite == {('poor', 0): 0} and c.state('poor', 'first') == 'non-finite' and c.order == ('poor', 'good')

def test_nets_of_which_nothing_was_measured_are_named():
    c = compare({'poor': poor(), 'good': never_due(good())})
    assert 'Of good nothing was measured but loss and accuracy: no iteration was due, see `every`' in c.verdict
    assert 'elasticity was not measured of good' in c.verdict and 'At no time' not in c.verdict
    assert 'non-finite' not in repr(c)
    assert any(t.get_text() == 'not measured of good' for a in c.plot().axes for t in a.texts)
    same = compare({'a': never_due(good()), 'b': never_due(good())})
    assert 'Both end with the same' in same.verdict and 'Of a and b nothing' in same.verdict
    assert [t.get_text() for t in same.plot().axes[2].texts] == ['not measured']

@pytest.mark.parametrize('n, seeds, words', [(30, 1, 'grey'), (30, 2, 'thin: a seed; bold: their median; grey'),
    (60, 1, 'bold, smoothed over 9 points where there are more than 40; grey'),
    (60, 2, 'thin: a seed; bold: their median, smoothed over 9 points where there are more than 40; grey')])
def test_the_figure_says_whether_it_is_smoothed(n, seeds, words):
    c   = compare({'poor': [poor(s, n=n) for s in range(seeds)], 'good': [good(s, n=n) for s in range(seeds)]})
    fig = c.plot()
    assert fig.texts[0].get_text().startswith(words)
    bold = [l.get_ydata() for l in fig.axes[0].lines if l.get_linewidth() > 2][1]
    raw  = np.median([r.iters.loss for r in c.runs['good']], axis=0)
    assert np.allclose(bold, raw) == (n == 30)

def test_one_window_of_dead_units_is_drawn_as_a_point():
    ax = compare({'poor': poor(0, n=10), 'good': good(0, n=10)}).plot().axes[-1]
    assert 'dead units' in ax.get_title(loc='left')
    assert [(len(l.get_xdata()), l.get_marker()) for l in ax.lines if l.get_linewidth() > 2] == [(1, 'o'), (1, 'o')]

def test_only_weights_count_not_biases():
    a, b = poor(0), good(0)
    v    = {k: np.array(b[k]) for k in b.keys()}
    v['grad', 'norm'][:, 1::2] = 1e-9                                        # only biases
    other = Record(b.iters, v, b.layers, b.windows, None, b.epochs)
    assert compare({'a': a, 'b': other}).cells('first', 'norm').n == 4
    assert compare({'a': a, 'b': other}).cells('first', 'norm').says == 'no'

def test_rounding_noise_of_a_mean_is_no_signal():
    def quiet(r):
        v = {k: np.array(r[k]) for k in r.keys()}
        v['grad', 'mean'][:, 6] = 1e-8 * v['grad', 'norm'][:, 6]             # head.weight: sums to zero by algebra
        return Record(r.iters, v, r.layers, r.windows, None, r.epochs)
    c = compare({'a': quiet(poor(0)), 'b': quiet(good(0))})
    assert c.cells('last', '|mean|').n == 3 and c.cells('last', 'norm').n == 4

def test_crossover_is_where_the_norms_cross():
    c = compare({'a': record((2.3, .9), (.1, .1), n=200), 'b': record((2., .01), (1., .01), n=200)})
    assert c.crossover() == pytest.approx([100], abs=6)
    assert np.isinf(compare({'a': record((2.3, .9), (.1, .1)), 'b': record((2., .01), (1., 1.))}).crossover()[0])

def test_upto_and_sparse_and_short_records():
    c = both(upto=30)
    assert c.span('last') == '10–29'
    got = c.table.query("model=='good' and phase=='last' and statistic=='loss'")['median'].iloc[0]
    assert got == pytest.approx(np.median([np.median(r.iters.loss[10:30]) for r in c.runs['good']]))
    c = compare({'a': poor(0, every=40), 'b': good(0, every=40)})
    row = c.table.query("model=='b' and phase=='last' and statistic=='norm' and layer=='conv2.weight'")['median'].iloc[0]
    assert row == pytest.approx(c.runs['b'][0]['grad', 'norm'][40, 2])
    for n in (1, 2, 5): repr(compare({'a': poor(0, n=n, per=1), 'b': good(0, n=n, per=1)}))

def test_records_of_grads_only_and_of_one_net():
    r    = good(0)
    only = Record(r.iters, {('grad', 'norm'): r['grad', 'norm']}, dict(grad=r.layers['grad']))
    c    = compare({'a': only, 'b': only})
    assert 'not measured' in c.verdict
    c.plot(); repr(c)
    assert 'nothing to compare' in compare({'a': r}).verdict
    bare = Record(r.iters, {}, {})
    repr(compare({'a': bare, 'b': bare})); compare({'a': bare, 'b': bare}).plot()

@pytest.mark.parametrize('runs, error, says', [
    ({}, TypeError, 'mapping'), ([1], TypeError, 'mapping'), ({'a': []}, ValueError, "'a' has no records"), ({'a': ['x']}, TypeError, 'Record.load'),
    ({'a': 'run.parquet'}, TypeError, 'got str; .*Record.load'), ({'a': None}, TypeError, 'got NoneType; .*learn.layer_stats'),
    ({'a': {0: 1}}, TypeError, 'got dict')])
def test_bad_runs(runs, error, says):
    with pytest.raises(error, match=says): compare(runs)

def test_bad_options():
    with pytest.raises(ValueError, match='conv1.weight'): compare({'a': good(0)}, layer='nope')
    for first in (0, 2.5, 'a', True):
        with pytest.raises(ValueError, match='first must be a whole number of at least 1'): compare({'a': good(0)}, first=first)
    with pytest.raises(ValueError, match='1 or more; got 0'): compare({'a': good(0)}).frame(most=0)
    bare = Record(good(0).iters, {}, {})
    with pytest.raises(ValueError, match='no statistic of layers was recorded of a and b'): compare({'a': bare, 'b': bare}).frame()

def test_runs_of_different_lengths_are_named_by_what_is_compared():
    c = compare({'poor': poor(0, n=9, per=3), 'good': good(0)})
    assert c.span('first') == 'first 4 to 10' and c.span('last') == 'last 5 to 20'
    assert 'The first 4 to 10 iterations: no' in c.verdict and 'The last 5 to 20 iterations: ' in c.verdict

def test_nets_without_a_layer_in_common():
    b = good(0)
    other = Record(b.iters, {('grad', 'norm'): b['grad', 'norm']}, dict(grad=b.layers['grad'].assign(layer='x.' + b.layers['grad'].layer)))
    c = compare({'a': poor(0), 'b': other})
    assert 'no weight has the same name in every net' in c.verdict
    titles = [ax.get_title(loc='left') for ax in c.plot().axes]
    assert '|g|, L2 norm, no layer in common' in titles and not any('None' in t for t in titles)

def test_plot_draws_the_recorded_numbers_and_leaves_the_records_equal():
    c      = both()
    before = [Record(r.iters, {k: r[k] for k in r.keys()}, r.layers, r.windows, None, r.epochs)['grad', 'norm'].copy() for r in c.runs['good']]
    fig    = c.plot()
    ax     = next(a for a in fig.axes if a.get_title(loc='left').startswith('|g|'))
    lines  = [l.get_ydata() for l in ax.lines]
    for r in [*c.runs['poor'], *c.runs['good']]:
        assert any(len(y) == N and np.allclose(y, r['grad', 'norm'][:, 2]) for y in lines)
    assert len(fig.axes) == 8 and all(np.array_equal(b, r['grad', 'norm']) for b, r in zip(before, c.runs['good']))
    assert not any('not measured' in t.get_text() for a in fig.axes for t in a.texts)

def test_frame_and_csv_hold_everything(tmp_path):
    c = both()
    f = pd.read_csv(c.to_csv(tmp_path / 'c.csv'))
    assert set(f.model) == {'poor', 'good'} and set(f.seed) == {0, 1, 2} and set(f.iter) == set(range(N))
    got = f.query("model=='good' and seed==1 and probe=='grad' and layer=='conv2.weight'").norm
    assert np.allclose(got, c.runs['good'][1]['grad', 'norm'][:, 2], rtol=1e-6)
    assert {'loss', 'gain', 'frac_dead', 'abs_median'} <= set(f)
    thin = c.frame(most=2000)
    assert len(thin) < 2300 and set(thin.iter[thin.norm.notna()]) < set(range(N))
    assert len(thin.frac_dead.dropna()) == len(f.frac_dead.dropna())
    with pytest.raises(OSError, match='cannot write'): c.to_csv(tmp_path / 'no' / 'c.csv')

def test_repr_is_a_table_and_the_verdict():
    c     = both()
    lines = repr(c).split('\n')
    assert 'over 3 seeds' in lines[0] and c.verdict in repr(c) and isinstance(c, Comparison)
    assert max(map(len, lines[:lines.index('')])) < 130

def test_comparing_imports_neither_torch_nor_fastai():
    code = ("import sys; from fastgradstats import compare, Comparison, Record\n"
            "assert not {'torch', 'fastai'} & set(sys.modules), 'heavy'")
    subprocess.run([sys.executable, '-c', code], check=True)
