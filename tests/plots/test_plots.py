"Plots: the drawn data are the recorded numbers, labels name statistic and unit, the record is left alone."
import pickle
import warnings

import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import QuadMesh

import fastgradstats
from fastgradstats import plots
from fastgradstats.plots import *
from fastgradstats.record.bins import Bins
from fastgradstats.record.record import Record

_POS  = np.array([2. ** e * (1 + m / 4) for e in range(-32, 16) for m in range(4)] + [2. ** 16])
EDGES = np.concatenate([[-3.4e38], -_POS[::-1], _POS, [3.4e38]])
BINS  = Bins(EDGES, {0: '-inf', 194: 'zero', 388: '+inf', 389: 'nan'})


def make(n=60, layers=4, every=1, seed=0, epochs=3, loss=None, g=None, units=True, first=0, **over):
    "A plausible record: `layers` weights with a bias each, half as many activations."
    rng   = np.random.default_rng(seed)
    it    = np.arange(first, first + n)
    loss  = 2.3 * np.exp(-np.arange(n) / max(n / 4, 1)) if loss is None else np.broadcast_to(np.asarray(loss, float), n)
    seen  = np.arange(n) % every == 0
    names = [f'{i}.{k}' for i in range(layers) for k in ('weight', 'bias')]
    par   = pd.DataFrame(dict(layer=names, module=[s.split('.')[0] for s in names], type='Conv2d',
                              shape=['8x4x3x3', '8'] * layers, numel=[288, 8] * layers))
    sites = [f'{i}.act' for i in range(layers)]
    acts  = pd.DataFrame(dict(layer=sites, module=sites, type='ReLU', shape='16x8', numel=128))
    put   = lambda v: np.where(seen[:, None], v, np.nan)
    base  = .1 * np.exp(rng.normal(0, .3, (n, 2 * layers)))
    if g is not None: base = np.broadcast_to(np.asarray(g, float)[:, None], base.shape)
    vals  = {('grad', 'norm'): put(base), ('grad', 'mean'): put(rng.normal(0, 1e-3, (n, 2 * layers))),
             ('weight', 'norm'): put(np.full((n, 2 * layers), 2.)), ('update', 'norm'): put(base * .1),
             ('activation', 'std'): put(np.abs(rng.normal(1, .1, (n, layers)))),
             ('activation', 'frac_zero'): put(rng.uniform(.3, .7, (n, layers)))}
    size  = max(1, n // 3)
    wins  = pd.DataFrame(dict(first_iter=it[::size], last_iter=[it[min(a + size, n) - 1] for a in range(0, n, size)]))
    state = rng.integers(0, 2, (layers, len(wins), 8)).astype(np.int8)
    vals['activation', 'frac_dead'] = state.mean(2).T
    hist  = np.zeros((int(seen.sum()), layers, 390))
    hist[:, :, 194] = 500
    hist[:, :, 180 + 194 - 60:180 + 194 - 40] = rng.integers(0, 50, (len(hist), layers, 20))
    vals['activation', 'hist'] = hist
    rows  = it[seen]
    iters = pd.DataFrame(dict(iter=it, fit=over.get('fit', 0), epoch=np.arange(n) * epochs // n, bs=16, loss=loss,
                              loss_constant=np.where(np.isnan(loss), np.nan, 2.3), lr=.1, mom=.9, grad_norm=1.,
                              clip_factor=1., stepped=True, measured=seen, n_accum=1, elapsed=it * .1))
    vals.update(over.get('values', {}))
    return Record(iters, vals, dict(grad=par, weight=par, update=par, activation=acts),
                  {('activation', 'frac_dead'): wins,
                   ('activation', 'hist'): pd.DataFrame(dict(first_iter=rows, last_iter=rows))},
                  {f'{i}.act': s for i, s in enumerate(state)} if units else None, None, BINS, over.get('meta', {}))

def starved_and_converged(seed=0, n=300):
    "Two nets: one stays at the first loss with a small gradient before it learns; one learns at once."
    t    = np.arange(n)
    late = np.clip(t - 100, 0, None)
    slow = make(n, loss=2.3 * np.exp(-late / 60), g=.01 * np.exp(np.clip(t, 0, 100) / 60 - late / 100), seed=seed)
    d    = slow.iters.assign(loss_constant=2.3)
    slow = Record(d, {k: slow[k] for k in slow.keys()}, slow.layers, slow.windows, None, None, BINS)
    fast = make(n, loss=2.3 * np.exp(-t / 45), g=.3 * np.exp(-t / 90), seed=seed)
    return slow, fast

RECORDS = dict(plain=make, one_row=lambda: make(1), layers62=lambda: make(40, 62), every5=lambda: make(50, every=5),
               no_loss=lambda: make(20, loss=np.nan), late=lambda: make(30, first=100),
               all_nan=lambda: make(30, values={('grad', 'norm'): np.full((30, 8), np.nan)}))
DRAW = dict(heat=plot_heat, heat_mean=lambda r, ax: plot_heat(r, ('grad', 'mean'), ax=ax), lines=plot_lines,
            heat_window=lambda r, ax: plot_heat(r, ('activation', 'frac_dead'), ax=ax),
            elasticity=lambda r, ax: plot_heat(r, ('grad', 'elasticity'), ax=ax),
            loss=lambda r, ax: plot_lines(r, 'loss', ax=ax), color_dim=plot_color_dim,
            linear=lambda r, ax: plot_color_dim(r, 0, linear=(-1, 10), ax=ax), dead=plot_dead_chart,
            flow=plot_grad_flow)

@pytest.fixture(autouse=True)
def close():
    yield
    plt.close('all')

def meshes(ax): return [c for c in ax.collections if isinstance(c, QuadMesh)]
def texts(ax):
    titles = [ax.get_title(loc=s) for s in ('left', 'center', 'right')]
    return ' '.join([ax.get_xlabel(), ax.get_ylabel(), *titles, *[t.get_text() for t in ax.texts]])
def bars(fig):  return ' '.join(a.get_ylabel() for a in fig.axes).replace('\n', ' ')
def same(a, b): np.testing.assert_allclose(np.ma.filled(a, np.nan), b, rtol=1e-6)


@pytest.mark.parametrize('draw', DRAW)
@pytest.mark.parametrize('kind', RECORDS)
@pytest.mark.filterwarnings('error')
def test_every_plot_of_every_record(draw, kind):
    rec  = RECORDS[kind]()
    copy = pickle.loads(pickle.dumps(rec))
    ax   = plt.subplots()[1]
    assert DRAW[draw](rec, ax=ax) is ax
    ax.figure.canvas.draw()
    assert rec == copy
    assert ax.get_xlabel() and ax.get_ylabel()
    assert '[' in ' '.join([ax.get_ylabel(), bars(ax.figure)])                 # a unit

def test_public_names():
    assert sorted(plots.__all__) == sorted(n for n in fastgradstats.__all__ if n.startswith('plot_'))

# --- heat ------------------------------------------------------------------------------------------------------------
def test_heat_draws_the_record():
    rec  = make()
    ax   = plot_heat(rec)
    same(meshes(ax)[0].get_array(), rec['grad', 'norm'].T)
    assert [t.get_text() for t in ax.get_yticklabels()] == rec.layers['grad'].layer.tolist()
    assert ax.get_ylim()[0] > ax.get_ylim()[1]                                 # first layer on top
    assert 'parameter gradient' in bars(ax.figure) and '[loss per unit of weight]' in bars(ax.figure)
    assert len([l for l in ax.lines if l.get_gid() == 'epoch']) == 2

def test_fits_are_set_apart():
    ax = plot_heat(make(fit=np.repeat([0, 1], 30), epochs=1))
    assert [l.get_xdata()[0] for l in ax.lines if l.get_gid() == 'fit'] == [29.5]
    assert 'new fit' in ax.get_xlabel()

def test_heat_of_some_layers():
    rec = make()
    ax  = plot_heat(rec, layers='*weight')
    same(meshes(ax)[0].get_array(), rec['grad', 'norm'][:, ::2].T)
    assert 'weight gradient' in bars(ax.figure)
    same(meshes(plot_heat(rec, layers=[-1, '0.weight']))[0].get_array(), rec['grad', 'norm'][:, [0, 7]].T)

def test_heat_of_windows_spans_them():
    rec = make()
    ax  = plot_heat(rec, ('activation', 'frac_dead'))
    same(meshes(ax)[0].get_array(), rec['activation', 'frac_dead'].T)
    assert meshes(ax)[0].get_coordinates()[0, :, 0].tolist() == [-.5, 19.5, 39.5, 59.5]

def test_heat_unmeasured_iterations_belong_to_the_last_measured_one():
    rec = make(50, every=5)
    same(meshes(plot_heat(rec))[0].get_array(), rec['grad', 'norm'][::5].T)

def test_heat_shows_a_long_gap_as_not_measured():
    rec = make(100)
    v   = np.array(rec['grad', 'norm']); v[20:80] = np.nan
    ax  = plot_heat(make(100, values={('grad', 'norm'): v}))
    assert np.isnan(np.ma.filled(meshes(ax)[0].get_array(), np.nan)).all(0).sum() == 1

def test_heat_of_a_long_run_takes_medians():
    rec = make(3000)
    got = np.ma.filled(meshes(plot_heat(rec))[0].get_array(), np.nan)
    assert got.shape == (8, 1000)
    same(got[:, 0], np.median(rec['grad', 'norm'][:3], axis=0))

def test_heat_tells_nan_zero_and_nonfinite_apart():
    v = np.geomspace(.001, 10, 30 * 8).reshape(30, 8)
    v[3:, 2], v[5, 0], v[7, 1], v[8, 3] = np.nan, 0, np.inf, np.nan
    bad = np.zeros((30, 8)); bad[8, 3] = .5
    ax  = plot_heat(make(30, values={('grad', 'norm'): v, ('grad', 'frac_nonfinite'): bad}))
    code = np.ma.filled(meshes(ax)[1].get_array(), -1)
    assert code[2, 4] == 0 and code[0, 5] == 1 and code[1, 7] == 2 and code[3, 8] == 2 and code[0, 0] == -1
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ['not measured', 'exactly 0', 'non-finite']

def test_units_come_from_the_record():
    assert '[furlong]' in bars(plot_heat(make(meta=dict(units=dict(norm='furlong')))).figure)

def test_many_layers_have_readable_names():
    rec = make(40, 62)
    for size in (4, 12):
        ax = plt.subplots(figsize=(6, size))[1]
        plot_heat(rec, ax=ax)
        ax.figure.canvas.draw()
        boxes = [t.get_window_extent() for t in ax.get_yticklabels()]
        assert all(not a.overlaps(b) for a, b in zip(boxes, boxes[1:]))

# --- lines -----------------------------------------------------------------------------------------------------------
def test_lines_draw_the_record():
    rec = make()
    ax  = plot_lines(rec, ('grad', 'elasticity'), layers='*weight')
    for i, line in enumerate([l for l in ax.lines if l.get_gid() is None]):
        np.testing.assert_allclose(line.get_ydata(), rec['grad', 'elasticity'][:, 2 * i], rtol=1e-6)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == [f'{i}.weight' for i in range(4)]
    assert plot_lines(rec, 'loss').lines[0].get_ydata().tolist() == rec.iters.loss.tolist()

def test_lines_of_windows_and_smoothing():
    rec = make()
    assert plot_lines(rec, ('activation', 'frac_dead')).lines[0].get_xdata().tolist() == [19, 39, 59]
    y = plot_lines(rec, layers=0, smooth=5).lines[0].get_ydata()
    assert y[10] == pytest.approx(np.median(rec['grad', 'norm'][8:13, 0]))

def test_lines_of_many_layers_use_a_colour_bar():
    ax = plot_lines(make(40, 62))
    assert ax.get_legend() is None and len(ax.figure.axes) == 2

def test_lines_of_several_records():
    recs = {'a': [make(seed=1), make(seed=2), make(seed=3)], 'b': make(seed=4)}
    ax   = plot_lines(recs, ('grad', 'norm'))
    bold = [l for l in ax.lines if l.get_label().startswith('a (median')][0]
    want = np.median([r['grad', 'norm'][:, 2] for r in recs['a']], axis=0)
    np.testing.assert_allclose(bold.get_ydata(), want, rtol=1e-6)
    assert '1.weight' in texts(ax) and 'weight gradient' in ax.get_ylabel()
    assert plot_lines(recs, 'loss')
    with pytest.raises(ValueError, match='one can be drawn'): plot_lines(recs, ('grad', 'norm'), layers='*weight')

def test_lines_are_told_apart_by_colour_and_dash():
    ax    = plot_lines(make(layers=7))                                         # 14 lines: 7 modules, weight and bias
    looks = {(l.get_color(), l.get_linestyle()) for l in ax.lines if l.get_gid() is None}
    assert len(looks) == 14 and len({c for c, _ in looks}) == 7
    assert len(ax.get_legend().get_texts()) == 14
    assert ax.get_title(loc='left') == 'L2 norm of the parameter gradient'
    assert plot_lines(make(layers=8)).get_legend() is None                     # more than can be told apart: in order
    assert plot_lines(make(), 'loss').get_title(loc='left') == 'Loss'

# --- ticks -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('lo, hi, most, want', [
    (.3, 250., 8, [1, 10, 100]), (1e-9, 1e9, 4, [1e-9, 1e-4, 10., 1e6]), (.9, 1.4, 8, [.9, 1., 1.1, 1.2, 1.3, 1.4]),
    (.2, 3.4, 3, [.2, 1.]), (.18, .4, 8, [.2, .25, .3, .35, .4]), (3., 3., 8, []), (-1., 5., 8, [])])
def test_ticks_of_a_log_scale(lo, hi, most, want):
    from fastgradstats.plots.axes import RoundLog, log_number
    got = RoundLog(most).tick_values(hi, lo)
    np.testing.assert_allclose(got, want)
    assert [log_number(v) for v in (.001, 5e-4, 1., 1e4, 1e-5)] == ['0.001', '0.0005', '1', '10000', '$10^{-5}$']

@pytest.mark.parametrize('span', [1.3, 3., 20., 1e3, 1e9])
@pytest.mark.parametrize('tall', [.8, 3.])
def test_ticks_of_colour_bars_do_not_overlap(span, tall):
    v   = np.exp(np.random.default_rng(0).uniform(0, np.log(span), (60, 8)))
    ax  = plt.subplots(figsize=(9, tall + 1), layout='constrained')[1]
    plot_heat(make(values={('grad', 'norm'): v}), log=True, ax=ax)
    ax.figure.canvas.draw()
    bar   = ax.figure.axes[1]
    lo, hi = sorted(bar.get_ylim())
    boxes = [t.get_window_extent() for v, t in zip(bar.get_yticks(), bar.get_yticklabels()) if lo <= v <= hi and t.get_text()]
    assert 1 <= len(boxes) and not any(a.overlaps(b) for a, b in zip(boxes, boxes[1:]))
    assert not [t for t in bar.get_yticklabels(minor=True) if t.get_text()]

def test_ticks_of_a_signed_logarithmic_colour_bar_do_not_overlap():
    v  = np.random.default_rng(0).normal(0, 1, (60, 8)) * np.geomspace(1e-9, 1, 8)
    ax = plot_heat(make(values={('grad', 'mean'): v}), ('grad', 'mean'), log=True)
    ax.figure.canvas.draw()
    labels = ax.figure.axes[1].get_yticklabels()
    boxes  = [t.get_window_extent() for t in labels]
    assert len(labels) >= 5 and '0' in [t.get_text() for t in labels] and not any(a.overlaps(b) for a, b in zip(boxes, boxes[1:]))

# --- the colourful dimension -----------------------------------------------------------------------------------------
def test_color_dim_draws_the_shares():
    rec = make()
    ax  = plot_color_dim(rec, 1)
    h   = rec['activation', 'hist'][:, 1].astype(float)
    c   = np.ma.filled(meshes(ax)[0].get_array(), np.nan)
    zero = np.nonzero((c > .3).all(1))[0]
    np.testing.assert_allclose(c[zero[0]], h[:, 194] / h.sum(1), rtol=1e-6)
    y    = meshes(ax)[0].get_coordinates()[:, 0, 1]
    assert y[zero[0]] == pytest.approx(-y[zero[0] + 1])                        # zero is at zero
    tall = np.diff(y)[zero[0] + 2:]                                            # the rest: shares per quarter octave
    got  = (np.where(c < 1e-9, 0, c)[zero[0] + 2:] * tall[:, None]).sum(0)
    np.testing.assert_allclose(got, h[:, 195:].sum(1) / h.sum(1), rtol=1e-5)
    assert '1.act' in texts(ax) and 'share' in bars(ax.figure)

def test_color_dim_of_gradients_takes_the_last_weight():
    rec  = make()
    h    = np.full((60, 8, 390), np.nan); h[:, ::2] = rec['activation', 'hist']
    wins = {('grad', 'hist'): rec.windows['activation', 'hist']}
    rec  = Record(rec.iters, {('grad', 'hist'): h}, rec.layers, wins, None, None, BINS)
    assert 'weight gradient 3.weight' in plot_color_dim(rec, probe='grad').get_title(loc='left')
    with pytest.raises(ValueError, match='of 1.bias no histogram is kept, .* 0.weight, 1.weight'): plot_color_dim(rec, '1.bias', probe='grad')

def test_color_dim_linear_keeps_the_counts():
    rec = make()
    c = np.ma.filled(meshes(plot_color_dim(rec, -1, linear=(-5, 2. ** 17)))[0].get_array(), np.nan)
    assert c.shape == (40, 60)
    np.testing.assert_allclose(np.where(c < 1e-9, 0, c).sum(0), 1, rtol=1e-5)
    with pytest.raises(ValueError, match=r'\(0, 10\)'): plot_color_dim(rec, linear=(3, 1))

def test_color_dim_does_not_show_a_lost_layer_as_having_no_elements():
    h = np.array(make()['activation', 'hist']); h[40:] = 0; h[40:, :, 389] = 100
    ax = plot_color_dim(make(values={('activation', 'hist'): h}), 0)
    assert np.ma.getmaskarray(meshes(ax)[0].get_array())[:, 40:].all() and not np.ma.getmaskarray(meshes(ax)[0].get_array())[:, :40].any()
    assert len([p for p in ax.patches if p.get_gid() == 'lost']) == 20
    assert 'exact zeros' not in ax.get_title(loc='left')

def test_color_dim_marks_nonfinite():
    h = np.array(make()['activation', 'hist']); h[7, 0, 389] = 10; h[9, 0, 0] = 10
    ax = plot_color_dim(make(values={('activation', 'hist'): h}), 0)
    mark = [l for l in ax.lines if l.get_gid() == 'nonfinite'][0]
    assert mark.get_xdata().tolist() == [7, 9]
    assert '2 windows' in ax.get_legend().get_texts()[0].get_text()

# --- dead units, flow ------------------------------------------------------------------------------------------------
def test_dead_chart():
    rec = make()
    ax  = plot_dead_chart(rec)
    same(meshes(ax)[0].get_array(), rec['activation', 'frac_dead'].T)
    assert 'leaky unit is never dead' in texts(ax)
    last = rec.units[rec.units.window == 2]
    for state in ('born dead', 'died', 'revived'):
        shown = [int(t.get_text()) for t in ax.texts if t.get_gid() == state]
        assert shown == [int(((last.layer == f'{i}.act') & (last.state == state)).sum()) for i in range(4)]
    assert 'born' not in texts(plot_dead_chart(make(units=False)))

def nan_units():
    "Layer 0.act lost all its units in the last window, 1.act some."
    rec   = make()
    units = {n: np.zeros((3, 8), np.int8) for n in rec.layers['activation'].layer}
    units['0.act'][2], units['1.act'][2, :5] = 2, 2
    return Record(rec.iters, {('activation', 'frac_dead'): np.zeros((3, 4))}, rec.layers,
                  {('activation', 'frac_dead'): rec.windows['activation', 'frac_dead']}, units)

def test_dead_units_of_a_lost_layer_are_not_shown_as_none():
    code = np.ma.filled(meshes(plot_dead_chart(nan_units()))[1].get_array(), -1)
    assert code.tolist() == [[-1, -1, 2], *[[-1, -1, -1]] * 3]

def test_what_follows_a_lost_gradient_is_non_finite_and_not_unmeasured():
    bad = np.zeros((60, 8)); bad[30:, 2] = 1
    v   = {('grad', 'norm'): np.where(bad, np.nan, .1), ('update', 'norm'): np.where(bad, np.nan, .1), ('grad', 'frac_nonfinite'): bad}
    v['update', 'norm'][:10, 0] = np.nan                                       # a layer that was frozen at first
    rec = make(values=v)
    for key in [('update', 'norm'), ('update', 'ratio'), ('grad', 'elasticity'), ('grad', 'norm')]:
        code = np.ma.filled(meshes(plot_heat(rec, key))[1].get_array(), -1)
        assert (code[2, 30:] == 2).all() and (code == 2).sum() == 30, key
        if key[0] == 'update': assert (code[0, :10] == 0).all()
    loss = np.where(np.arange(60) < 50, 1., np.nan)
    code = np.ma.filled(meshes(plot_heat(make(loss=loss), ('grad', 'elasticity')))[1].get_array(), -1)
    assert (code[:, 50:] == 2).all() and (code == 2).sum() == 80

def test_grad_flow_of_a_short_fit_takes_moments_that_do_not_overlap():
    for n, want in (3, ['0', '1', '2']), (10, ['0 to 1', '2 to 3', '5 to 6', '8 to 9']), (24, ['0 to 5', '6 to 11', '12 to 17', '18 to 23']):
        rec = make(n)
        ax  = plot_grad_flow(rec)
        assert [t.get_text() for t in ax.get_legend().get_texts()] == want
        k = max(n // 4, 1)
        np.testing.assert_allclose(ax.lines[0].get_ydata(), np.median(rec['grad', 'norm'][:k, ::2], axis=0), rtol=1e-6)
        assert (f'median over {k} measured' if k > 1 else 'single') in ax.get_title(loc='right')

def test_grad_flow_leaves_room_for_long_names():
    rec  = make(20, 20)
    long = rec.layers['grad'].assign(layer='a.very.long.name.of.a.' + rec.layers['grad'].layer)
    rec  = Record(rec.iters, {('grad', 'norm'): rec['grad', 'norm']}, dict(grad=long))
    ax   = plot_grad_flow(rec)
    ax.figure.canvas.draw()
    assert ax.get_window_extent().height / ax.figure.dpi > 2.5

def test_grad_flow():
    rec = make()
    ax  = plot_grad_flow(rec, iters=[0, 30])
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ['0 to 9', '30 to 39']
    np.testing.assert_allclose(ax.lines[1].get_ydata(), np.median(rec['grad', 'norm'][30:40, ::2], axis=0), rtol=1e-6)
    assert [t.get_text() for t in ax.get_xticklabels()] == [f'{i}.weight' for i in range(4)]
    assert ax.get_yscale() == 'log'
    with pytest.raises(ValueError, match='0 to 59'): plot_grad_flow(rec, iters=[99])

# --- overview --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('kind', RECORDS)
def test_overview(kind, tmp_path):
    rec  = RECORDS[kind]()
    copy = pickle.loads(pickle.dumps(rec))
    axs  = plot_overview(rec, save=tmp_path / 'a.png')
    assert axs.shape == (6,) and rec == copy and (tmp_path / 'a.png').exists()
    if kind == 'plain':
        same(meshes(axs[1])[0].get_array(), rec['grad', 'norm'][:, ::2].T)
        assert len(axs[0].figure.get_suptitle()) > 20                                    # the verdict, in words
        assert plot_overview(rec, title='mine')[0].figure.get_suptitle() == 'mine'
    if kind == 'no_loss': assert 'not known' in texts(axs[0])

def test_overview_says_what_is_missing():
    rec = make()
    rec = Record(rec.iters, {k: rec[k] for k in [('grad', 'norm')]}, rec.layers)
    axs = plot_overview(rec, title='A verdict.')
    assert axs[0].figure.get_suptitle() == 'A verdict.'
    assert 'elasticity' in texts(axs[2]) and 'not recorded' in texts(axs[5])

def test_overview_names_can_be_read():
    for layers in (6, 22, 62):
        axs = plot_overview(make(40, layers), title='x')
        axs[0].figure.canvas.draw()
        for ax in axs[1:]:
            labels = ax.get_yticklabels()
            boxes  = [t.get_window_extent() for t in labels]
            assert min(t.get_fontsize() for t in labels) >= 7.5 and not any(a.overlaps(b) for a, b in zip(boxes, boxes[1:]))
            assert len(labels) >= min(layers, 20)
        assert axs[1].get_yticklabels()[-1].get_text() == f'{layers - 1}.weight'

def never_due():
    "A real run whose `every` never came."
    import torch
    from fastgradstats import watch
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    opt   = torch.optim.SGD(model.parameters(), .1)
    with warnings.catch_warnings(), watch(model, opt, every=lambda i: False) as w:
        warnings.simplefilter('ignore')
        for _ in range(6): w.loss(model(torch.randn(5, 3)).square().mean()).backward(); opt.step(); opt.zero_grad()
    return w.record

def test_a_record_in_which_nothing_was_measured_says_so_in_every_plot():
    rec  = never_due()
    says = 'nothing was measured: none of the 6 iterations was due, see `every`'
    for draw in (plot_heat, plot_lines, plot_grad_flow, plot_dead_chart, lambda r: plot_lines({'a': r, 'b': r})):
        ax = draw(rec)
        assert says in texts(ax)
        if draw is not plot_grad_flow: assert ax.get_xlim() == (-.5, 5.5)
    axs = plot_overview(rec)
    assert 'othing was measured: none of the 6' in axs[0].figure.get_suptitle() and all(says in texts(a) for a in axs[1:])
    for draw in (plot_color_dim, plot_small_gradients, lambda r: plot_heat(r, ('activation', 'std'), layers=0)):
        with pytest.raises(ValueError, match='nothing was measured: none of the 6 iterations was due, see `every`'): draw(rec)
    assert plot_lines(rec, 'loss').lines

# --- small gradients -------------------------------------------------------------------------------------------------
def shown(ax, gid): return [t for t in ax.texts if t.get_gid() == gid]

@pytest.mark.parametrize('seeds', [1, 3])
def test_small_gradients_marks_starved_and_converged(seeds):
    pairs = [starved_and_converged(s) for s in range(seeds)]
    recs  = {'slow': [a for a, _ in pairs], 'fast': [b for _, b in pairs]}
    ax    = plot_small_gradients(recs)
    assert ax.get_xlim()[0] > ax.get_xlim()[1] and ax.get_xscale() == ax.get_yscale() == 'log'
    assert 'weight gradient of 1.weight' in ax.get_ylabel().replace('\n', ' ') and '[' in ax.get_xlabel()
    assert len(shown(ax, 'starved')) == len(shown(ax, 'converged')) == 1
    (x0, y0), (x1, y1) = np.column_stack([l for l in ax.lines if l.get_gid() == 'same'][0].get_data())
    assert y0 == pytest.approx(y1, rel=.021) and x0 > 2 and x1 < .23
    assert float(shown(ax, 'starved')[0].get_text().split('=')[1]) == pytest.approx(y0 * 2 / x0, rel=.06)
    assert not shown(plot_small_gradients(recs, mark=False), 'starved')

def test_small_gradients_text_is_inside_and_apart():
    ax = plot_small_gradients(dict(zip(['default init + ReLU', 'Kaiming + GeneralReLU'], starved_and_converged())))
    ax.figure.canvas.draw()
    frame = ax.get_window_extent()
    boxes = [t.get_window_extent() for t in ax.texts if t.get_gid() not in ('note', 'E')]
    assert all(frame.x0 - 1 <= b.x0 and b.x1 <= frame.x1 + 1 for b in boxes)
    assert all(frame.y0 - 1 <= b.y0 and b.y1 <= frame.y1 + 1 for b in boxes)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert len(shown(ax, 'E')) >= 2 and len(shown(ax, 'name')) == 2

def test_small_gradients_lines_of_equal_elasticity():
    ax = plot_small_gradients(starved_and_converged()[1])
    for line, t in zip([l for l in ax.lines if l.get_gid() == 'elasticity'], shown(ax, 'E')):
        x, y = line.get_data()
        np.testing.assert_allclose(y * 2 / x, float(t.get_text().split('=')[1]))

def test_small_gradients_claims_nothing_of_a_healthy_net():
    ax = plot_small_gradients({'only': starved_and_converged()[1]})
    assert not shown(ax, 'starved') and 'against the loss' in ax.get_title(loc='left')

@pytest.mark.parametrize('n', [2, 6, 12, 30])
def test_small_gradients_of_a_short_run_can_be_read(n):
    rng = np.random.default_rng(n)
    run = lambda s: make(n, loss=1.1 + rng.normal(0, .1, n) - .01 * np.arange(n), seed=s)
    ax  = plot_small_gradients({'one': run(0), 'other': run(1)})
    ax.figure.canvas.draw()
    boxes = [t.get_window_extent() for t in ax.texts if t.get_gid() not in ('note', 'E')]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    for axis, (a, b) in ((ax.xaxis, sorted(ax.get_xlim())), (ax.yaxis, sorted(ax.get_ylim()))):
        seen = [t for v, t in zip(axis.get_majorticklocs(), axis.get_majorticklabels()) if a <= v <= b]
        assert len(seen) >= 3 and all(t.get_text() for t in seen)
    assert len(shown(ax, 'E')) >= 1
    note = shown(ax, 'note')[0].get_text()
    assert ('smoothed over' in note) == (n >= 10) and 'circles' not in note
    if n == 6: np.testing.assert_allclose([l for l in ax.lines if l.get_gid() == 'path'][1].get_ydata()[0], run(1)['grad', 'norm'][0, 2], rtol=1e-5)

def test_small_gradients_passed_axes_and_record_left_alone():
    rec  = make()
    copy = pickle.loads(pickle.dumps(rec))
    ax   = plt.subplots()[1]
    assert plot_small_gradients(rec, ax=ax) is ax and rec == copy
    assert plot_small_gradients(make(1))
    ax.set_xlim(3.1, 1.4)                                     # no power of ten in it
    ax.figure.canvas.draw()
    assert not [t for t in ax.get_xticklabels(minor=True) if '10' in t.get_text()]
    with pytest.raises(ValueError, match='loss is not known'): plot_small_gradients(make(20, loss=np.nan))
    with pytest.raises(ValueError, match='no iteration'): plot_small_gradients(RECORDS['all_nan']())

# --- errors ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('call, error, words', [
    (lambda r: plot_heat(r, layers='conv*'),            ValueError, "'conv.*0.weight, 0.bias"),
    (lambda r: plot_lines(r, layers=99),                IndexError, '-8 to 7: the layers'),
    (lambda r: plot_lines(r, layers=2.5),               TypeError,  'a name, a glob or an index'),
    (lambda r: plot_heat(r, ('grad', 'l1')),            KeyError,   'recorded there: norm, mean'),
    (lambda r: plot_heat(r, ('grads', 'norm')),         KeyError,   'recorded probes'),
    (lambda r: plot_heat(r, ('activation', 'hist')),    ValueError, 'plot_color_dim'),
    (lambda r: plot_lines(r, 'lost'),                   KeyError,   'loss_constant'),
    (lambda r: plot_lines(r, smooth=0),                 ValueError, 'smooth=0'),
    (lambda r: plot_color_dim(r, '*act'),               ValueError, 'matches 4 layers'),
    (lambda r: plot_color_dim(r, 'x'),                  ValueError, '0.act, 1.act'),
    (lambda r: plot_heat([1, 2]),                       TypeError,  'learn.layer_stats'),
    (lambda r: plot_small_gradients([r]),               TypeError,  'dict'),
    (lambda r: plot_small_gradients({}),                ValueError, 'empty'),
    (lambda r: plot_small_gradients({'a': []}),         ValueError, 'has no record'),
    (lambda r: plot_small_gradients({'a': 3}),          TypeError,  'int'),
    (lambda r: plot_small_gradients(r, layer='*ght'),   ValueError, 'matches 4 layers'),
    (lambda r: plot_overview(None),                     TypeError,  'has recorded nothing; fit it with'),
    (lambda r: plot_lines([r]),                         TypeError,  'a Record or {name: Record}, got list'),
    (lambda r: plot_lines(r, smooth=True),              ValueError, 'smooth=True'),
    (lambda r: plot_lines(r, layers=[]),                ValueError, r'layers=\[\] is empty; the layers'),
    (lambda r: plot_lines(r, 'loss', layers='0.bias'),  ValueError, "'loss' is of no layer"),
    (lambda r: plot_lines(r, ax=plt.figure()),          TypeError,  'got Figure. Give ax='),
    (lambda r: plot_heat(r, ax=plt.subplots(1, 2)[1]),  TypeError,  'got ndarray. Give ax='),
    (lambda r: plot_heat(r, 'loss'),                    ValueError, r"plot_lines\(rec, 'loss'\)"),
    (lambda r: plot_color_dim(r, linear=('0', '10')),   ValueError, 'lo < hi'),
    (lambda r: plot_color_dim(r, linear=(0, np.nan)),   ValueError, 'lo < hi'),
    (lambda r: plot_grad_flow(r, iters='first'),        ValueError, "iters='first'; .* whole numbers"),
    (lambda r: plot_grad_flow(r, iters=1.5),            ValueError, 'iters=1.5; .* whole numbers'),
    (lambda r: plot_grad_flow(r, iters=[]),             ValueError, r'iters=\[\]; .* whole numbers'),
    (lambda r: plot_grad_flow(r, stat='nrom'),          KeyError,   r"Did you mean rec\['grad', 'norm'\]"),
])
def test_errors_say_what_is_allowed(call, error, words):
    with pytest.raises(error, match=words): call(make())
