"""The Record: reading, derived quantities, frames, the life table of units, joining, files. No torch needed."""
import copy
import json
import os
import pickle
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastgradstats.record.bins import Bins
from fastgradstats.record.join import coarsen
from fastgradstats.record.record import Record
from fastgradstats.record.schema import ALIVE, DEAD, ITER_COLS, NONFINITE, UNSEEN

BINS = Bins(np.concatenate([-np.arange(3., 0, -1), np.arange(1., 4)]), {0: '-inf', 6: '+inf', 7: 'nan'})
PAR  = pd.DataFrame(dict(layer=['a.weight', 'a.bias', 'b.weight'], module=['a', 'a', 'b'], type='Linear', shape=['4x3', '4', '2x4'], numel=[12, 4, 8]))
ACT  = pd.DataFrame(dict(layer=['r', 's'], module=['r', 's'], type='ReLU', shape='4', numel=4))
nan  = float('nan')

def iters(its, **over):
    n = len(its)
    return pd.DataFrame({**dict(iter=its, fit=0, epoch=0, bs=8, loss=np.linspace(2, 1, n) if n else [], loss_constant=2.3, lr=.1, mom=.9,
                                grad_norm=1., clip_factor=1., stepped=True, measured=True, n_accum=1,
                                elapsed=np.arange(n) * .5), **over}, index=range(n))

def wins(*pairs): return pd.DataFrame(pairs, columns=['first_iter', 'last_iter'], dtype='int64')

def make(its=range(6), seed=0, hist=True, units=True, scale=1., epochs=True, **over):
    rng = np.random.default_rng(seed)
    its = list(its)
    n   = len(its)
    val = lambda k: (scale * rng.random((n, k))).astype(np.float32)
    vs  = {('grad', 'norm'): val(3), ('grad', 'mean'): val(3), ('weight', 'norm'): val(3) + 1, ('update', 'norm'): val(3),
           ('update', 'lr'): np.tile(np.float32([.1, .1, .01]), (n, 1)), ('activation', 'mean'): val(2)}
    w, u = {}, None
    if hist:
        vs['grad', 'hist'] = rng.integers(0, 9, (n, 3, 8)).astype(float)
        vs['grad', 'hist'][:, 1] = nan                                     # a bias has none
        w['grad', 'hist']  = wins(*zip(its, its))
    if units and n >= 2:
        half = n // 2
        w['activation', 'frac_dead'] = wins((its[0], its[half - 1]), (its[half], its[-1]))
        u = dict(r=np.array([[0, 1, 1, 0], [0, 1, 0, 2]]), s=np.array([[1, 1], [-1, -1]]))
        vs['activation', 'frac_dead'] = np.float32([[.5, 1], [.25, nan]])
    return Record(over.pop('iters', iters(its)), over.pop('values', vs), dict(grad=PAR, weight=PAR, update=PAR, activation=ACT), w, u,
                  pd.DataFrame(dict(fit=[0], epoch=[0], valid_loss=[.5], accuracy=[.9])) if epochs else None, BINS,
                  over.pop('meta', dict(model='net', versions=dict(torch='2'))))

def same(a, b):
    assert a == b
    pd.testing.assert_frame_equal(a.iters, b.iters)
    pd.testing.assert_frame_equal(a.epochs, b.epochs, check_dtype=False)
    for p, d in a.layers.items(): pd.testing.assert_frame_equal(d, b.layers[p], check_dtype=False)
    assert a.meta == b.meta and a.keys() == b.keys() and repr(a) == repr(b)
    for k in a.keys():
        np.testing.assert_array_equal(a[k], b[k])
        assert a[k].dtype == b[k].dtype == np.float32
    if a.bins:
        np.testing.assert_array_equal(a.bins.edges, b.bins.edges)
        assert a.bins.labels == b.bins.labels
    pd.testing.assert_frame_equal(a.units, b.units)


# --- reading ---------------------------------------------------------------------------------------------------------
def test_indexing():
    r = make()
    assert r['grad', 'norm'].shape == (6, 3) and r['grad', 'hist'].shape == (6, 3, 8) and len(r) == 6
    assert r['activation', 'frac_dead'].shape == (2, 2) and r.windows['activation', 'frac_dead'].last_iter.tolist() == [2, 5]
    assert ('grad', 'norm') in r and ('grad', 'rms') in r and ('grad', 'l1') not in r and 'grad' not in r and [1] not in r
    assert ('grad', 'rms') not in r.keys()
    np.testing.assert_array_equal(r[['grad', 'norm']], r['grad', 'norm'])

@pytest.mark.parametrize('key,says', [
    (('grad', 'l1'), r"'l1' was not recorded at 'grad'; recorded there: norm, mean, hist. Add it with LayerStatsCallback\(grad=\['norm', 'mean', 'hist', 'l1'\]\)"),
    (('gradd', 'norm'), r"'gradd' is no probe; recorded probes: grad, .*Did you mean rec\['grad', 'norm'\]\?"),
    (('xyz', 'norm'), "'xyz' is no probe; recorded probes: grad, [a-z, ]+.$"), ('loss', r"Read that as rec.iters\['loss'\]"),
    (('grad', 'nrom'), r"Did you mean rec\['grad', 'norm'\]\?"), (('grad', 'elastic'), r"Did you mean rec\['grad', 'elasticity'\]"),
    (('input', 'std'), r"'input' was not recorded; recorded probes: grad, weight, .*LayerStatsCallback\(input=\['std'\]\)"),
    ('norm', r"rec\[probe, statistic\].*got 'norm'"), (3, 'got 3'), (('grad', 'norm', 0), r"rec\['grad', 'norm'\]"),
    (('weight', 'elasticity'), "not recorded at 'weight'"), ('grad', r"Read that as rec\['grad', statistic\]; recorded there: norm"),
    (('norm', 'grad'), r"Did you mean rec\['grad', 'norm'\]"), (('loss', 'norm'), 'is no probe'), (('grad', ['norm', 'mean']), 'got'),
    (('grad', 0), r"rec\['grad', 'norm'\]; got"), (('grad', 'norm', '0.weight'), r"rec.layers\['grad'\]; rec.frame\(\)"),
    (('a.weight', 'norm'), r"'a.weight' is a layer, not a probe; .*column of rec\['grad', 'norm'\]")])
def test_what_is_missing_is_named_with_its_remedy(key, says):
    with pytest.raises(KeyError, match=says): make()[key]

def test_a_derived_quantity_names_what_it_needs():
    r = Record(iters(range(2)), {('grad', 'norm'): np.ones((2, 3))}, dict(grad=PAR))
    with pytest.raises(KeyError, match=r"'elasticity' of 'grad' is .* needs 'norm' at 'weight'.*LayerStatsCallback\(weight=\['norm'\]\)"):
        r['grad', 'elasticity']
    with pytest.raises(KeyError, match="'update'"): r['update', 'ratio']
    assert ('grad', 'elasticity') not in r and ('grad', 'per_loss') in r
    with pytest.raises(KeyError, match='recorded probes: none'): Record(iters([]), {}, {})['grad', 'norm']

def test_what_is_no_attribute_is_answered_with_where_it_is():
    import copy
    r = make()
    with pytest.raises(AttributeError, match=r"read rec.iters\['loss'\]"):              r.loss
    with pytest.raises(AttributeError, match=r"read rec\['grad', statistic\]; .*norm"): r.grad
    with pytest.raises(AttributeError, match="no attribute 'nope'$"):                   r.nope
    with pytest.raises(KeyError, match=r"rec.frame\(\('grad', 'norm'\)\)"):             r.frame('grad', 'norm')
    with pytest.raises(KeyError, match='is no probe'):                                  r.frame('loss')
    for call in (lambda: r.save(None), lambda: Record.load(r)):
        with pytest.raises(TypeError, match="a path, for example 'run.parquet'; got"): call()
    assert copy.deepcopy(r) == r and not hasattr(r, 'layer_stats')

def test_the_advice_can_be_pasted_and_helps():
    import re
    import torch
    from fastgradstats import LayerStatsCallback, watch
    def run(**settings):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        opt   = torch.optim.SGD(model.parameters(), .1)
        with watch(model, opt, **settings) as w:
            for _ in range(3): w.loss(model(torch.randn(5, 3)).square().mean()).backward(); opt.step(); opt.zero_grad()
        return w.record
    for settings, key in [(dict(update=['norm']), ('update', 'std')), (dict(grad=['norm'], placebo=1), ('grad', 'std')),
                          (dict(weight=None), ('grad', 'elasticity')), ({}, ('grad_used', 'norm'))]:
        with pytest.raises(KeyError) as e: run(**settings)[key]
        advice = re.search(r'LayerStatsCallback\((.*)\)', e.value.args[0])
        assert '...' not in advice[0] and LayerStatsCallback(**eval(f'dict({advice[1]})'))
        assert run(**{**settings, **eval(f'dict({advice[1]})')})[key].size

def test_derived_quantities_by_hand():
    g = np.array([[3., 4., nan], [1., 0., 2.]])
    w = np.array([[2., 0., 5.], [10., 0., 0.]])
    u = np.array([[.1, .2, .3], [.5, 0., .7]])
    r = Record(iters([0, 1], loss=[-2., .5]), {('grad', 'norm'): g, ('weight', 'norm'): w, ('update', 'norm'): u},
               dict(grad=PAR, weight=PAR, update=PAR))
    np.testing.assert_allclose(r['grad', 'rms'], [[3 / 12 ** .5, 2., nan], [1 / 12 ** .5, 0, 2 / 8 ** .5]], rtol=1e-6)
    np.testing.assert_allclose(r['grad', 'per_loss'], [[1.5, 2., nan], [2., 0., 4.]], rtol=1e-6)
    np.testing.assert_allclose(r['grad', 'elasticity'], [[3., 0., nan], [20., 0., 0.]], rtol=1e-6)
    np.testing.assert_allclose(r['update', 'ratio'], [[.05, nan, .06], [.05, nan, nan]], rtol=1e-6)
    assert r.iters.gain.tolist() == pytest.approx([4.3, 1.8])

def test_derived_quantities_align_layers_by_name():
    other = PAR.iloc[[2, 0]].reset_index(drop=True)                        # b.weight, a.weight; no a.bias
    r = Record(iters([0], loss=[1.]), {('grad', 'norm'): [[1., 2., 3.]], ('weight', 'norm'): [[10., 100.]], ('update', 'norm'): [[1., 2., 3.]]},
               dict(grad=PAR, weight=other, update=PAR))
    np.testing.assert_allclose(r['grad', 'elasticity'], [[100., nan, 30.]])
    np.testing.assert_allclose(r['update', 'ratio'], [[.01, nan, .3]], rtol=1e-6)

def test_derived_quantities_at_extreme_losses():
    r = Record(iters(range(4), loss=[0., nan, np.inf, 1e-38]), {('grad', 'norm'): np.ones((4, 3)), ('weight', 'norm'): np.ones((4, 3)),
               ('update', 'norm'): np.full((4, 3), np.inf)}, dict(grad=PAR, weight=PAR, update=PAR))
    np.testing.assert_array_equal(r['grad', 'per_loss'][:3, 0], [np.inf, nan, 0])
    assert np.isinf(r['update', 'ratio']).all(), 'an update that diverged is not hidden'

def test_it_is_frozen():
    r = make()
    keep = copy.deepcopy(r)
    for f in (lambda: setattr(r, 'meta', {}), lambda: setattr(r, 'new', 1), lambda: setattr(r, '_values', {}), lambda: r.__setitem__(('a', 'b'), 1)):
        with pytest.raises((AttributeError, TypeError)): f()
    with pytest.raises(ValueError, match='read-only'): r['grad', 'norm'][0, 0] = 7
    for d in (r.iters, r.epochs, r.layers['grad'], r.windows['grad', 'hist'], r.units): d.iloc[0, 0] = 7 if d.iloc[0, 0] != 'a.weight' else 'x'
    r.meta['model'] = 'x'; r.meta['versions']['torch'] = 'x'; r.keys().clear(); r.layers.clear()
    r['grad', 'rms'][:] = 7
    same(r, keep)
    it, v, u = iters(range(2)), np.ones((2, 3)), np.zeros((1, 4), np.int8)
    r = Record(it, {('grad', 'norm'): v, ('activation', 'frac_dead'): [[0., 0.]]}, dict(grad=PAR, activation=ACT), {('activation', 'frac_dead'): wins((0, 1))}, dict(r=u))
    v[:] = 7; u[:] = 1; it.loc[0, 'loss'] = 9
    assert (r['grad', 'norm'] == 1).all() and (r.units.state == 'alive').all() and r.iters.loss[0] == 2

def test_what_cannot_be_a_record():
    for args, says in [((pd.DataFrame(dict(iter=[0])), {}, {}), 'need the columns fit, epoch'),
                       ((iters([0]), {('grad', 'norm'): np.ones((2, 3))}, dict(grad=PAR)), r'shape \(2, 3\); expected \(1, 3'),
                       ((iters([0]), {('grad', 'norm'): np.ones((1, 3))}, {}), "'grad', which has no table"),
                       ((iters([0]), {('grad', 'loss'): np.ones((1, 3))}, dict(grad=PAR)), "cannot be called 'loss'"),
                       ((iters([0]), {('grad', 'hist'): np.ones((1, 3, 8))}, dict(grad=PAR), {('grad', 'hist'): wins((0, 5))}), 'no row'),
                       ((iters([0]), {}, dict(activation=ACT), {}, dict(r=np.zeros((1, 4)))), r'expected \(window, unit\)')]:
        with pytest.raises(ValueError, match=says): Record(*args)

def test_pickle_and_deepcopy():
    r = make()
    for c in (pickle.loads(pickle.dumps(r)), copy.deepcopy(r), copy.copy(r)):
        same(r, c)
        with pytest.raises(ValueError): c['grad', 'norm'][0, 0] = 7

def test_meta_of_numpy_numbers():
    r = make(meta=dict(a=np.float32(2), b=np.int64(3), c=[np.float64('nan')], d=np.arange(2), e=(1, 2), f={3: None}))
    assert r.meta == dict(a=2., b=3, c=[None], d=[0, 1], e=[1, 2], f={'3': None})

def test_equality_sees_every_part():
    r = make()
    assert r == make() and r != make(seed=1) and r != make(epochs=False) and r != make(hist=False) and r != make(range(1, 7)) and r != 3
    assert make(units=False) != r
    with pytest.raises(TypeError): hash(r)

def test_repr():
    text = repr(make(meta=dict(model='Net', not_hooked={'x': 'frozen', 'y': 'frozen'}, cost=dict(percent=3.2, seconds=1., of=30.))))
    for word in ('6 rows (6 measured) in 1 fit, Net', 'grad', 'norm, mean, hist', 'loss 2 at iteration 0, 1 at iteration 5', 'x, y (frozen)', 'cost: 3.2 %'): assert word in text
    assert '0 rows' in repr(make([]))


# --- frames ----------------------------------------------------------------------------------------------------------
def test_frame_is_tidy():
    r = make()
    f = r.frame()
    assert list(f.columns) == [*r.iters.columns, 'probe', 'layer', 'norm', 'mean', 'frac_dead'] and f.index.equals(pd.RangeIndex(len(f)))
    assert not f.duplicated(['iter', 'probe', 'layer']).any() and len(f) == 6 * (3 + 3 + 3 + 2)
    for (p, s), v in ((k, r[k]) for k in [('grad', 'norm'), ('weight', 'norm'), ('activation', 'mean')]):
        t = f[f.probe == p].pivot(index='iter', columns='layer', values=s)[r.layers[p].layer]
        np.testing.assert_array_equal(t.to_numpy(), v)
    assert f[f.probe == 'grad'].frac_dead.isna().all() and f.groupby('iter').loss.nunique().eq(1).all()
    assert f.groupby(['probe', 'layer'], sort=False)['norm'].mean().loc['grad', 'a.bias'] == pytest.approx(r['grad', 'norm'][:, 1].mean())

def test_frame_puts_windows_on_their_last_row():
    f = make().frame(('activation', 'frac_dead'))
    assert f[['iter', 'layer', 'frac_dead']].values.tolist() == [[2, 'r', .5], [2, 's', 1.], [5, 'r', .25]]

def test_frame_has_the_learning_rate_of_the_layer_on_lines_of_updates():
    f = make().frame()
    assert f[(f.probe == 'update') & (f.layer == 'b.weight')].lr.to_numpy() == pytest.approx(.01)
    assert (f[f.probe != 'update'].lr == .1).all() and list(f.columns).count('lr') == 1

def test_frame_of_keys():
    r = make()
    f = r.frame(('grad', 'elasticity'), ('update', 'ratio'))
    assert set(f.probe) == {'grad', 'update'} and len(f) == 36
    np.testing.assert_array_equal(f[f.probe == 'grad'].elasticity.to_numpy(), r['grad', 'elasticity'].ravel())
    assert set(r.frame('grad').probe) == {'grad'} and list(r.frame('grad').columns[-2:]) == ['norm', 'mean']
    assert r.frame('grad', ('grad', 'norm')).equals(r.frame('grad'))
    with pytest.raises(ValueError, match=r"rec\['grad', 'hist'\]"): r.frame(('grad', 'hist'))
    with pytest.raises(KeyError, match='recorded probes'): r.frame('nope')
    with pytest.raises(KeyError, match='was not recorded'): r.frame(('grad', 'l1'))

def test_frame_leaves_out_what_was_not_measured():
    r = make(range(3), hist=False, units=False, values={('grad', 'norm'): [[1, nan, 2], [nan, nan, nan], [3, 4, nan]], ('grad', 'mean'): [[1, nan, nan], [nan] * 3, [nan] * 3]})
    f = r.frame()
    assert f[['iter', 'layer']].values.tolist() == [[0, 'a.weight'], [0, 'b.weight'], [2, 'a.weight'], [2, 'a.bias']]
    assert f['mean'].isna().tolist() == [False, True, True, True]

def test_frame_without_rows_has_the_columns():
    f, g = make([]).frame(), make().frame()
    assert len(f) == 0 and set(f.columns) == set(g.columns) - {'frac_dead'}
    assert pd.concat([f, g]).dtypes.equals(pd.concat([g, f]).dtypes[pd.concat([f, g]).columns])


# --- the life table ----------------------------------------------------------------------------------------------------
def test_life_table():
    A, D, N, U = ALIVE, DEAD, NONFINITE, UNSEEN
    s = np.array([[A, D, D, A, A, U], [A, D, D, D, N, D], [A, D, A, D, N, A], [A, D, A, A, A, U], [D, D, D, A, D, D]])
    w = wins(*((10 * k, 10 * k + 9) for k in range(5)))
    r = Record(iters(range(50)), {('activation', 'frac_dead'): np.full((5, 1), .5)}, dict(activation=ACT[:1]), {('activation', 'frac_dead'): w}, dict(r=s))
    t = r.units
    assert list(t.columns) == ['window', 'layer', 'unit', 'state', 'since'] and len(t) == 28
    life = lambda u: [(w, st, si) for w, st, si in t[t.unit == u][['window', 'state', 'since']].itertuples(index=False)]
    assert life(0) == [(0, 'alive', 0), (1, 'alive', 0), (2, 'alive', 0), (3, 'alive', 0), (4, 'died', 40)]
    assert life(1) == [(k, 'born dead', 0) for k in range(5)]
    assert life(2) == [(0, 'born dead', 0), (1, 'born dead', 0), (2, 'revived', 20), (3, 'revived', 20), (4, 'died', 40)]
    assert life(3) == [(0, 'alive', 0), (1, 'died', 10), (2, 'died', 10), (3, 'revived', 30), (4, 'revived', 30)]
    assert life(4) == [(0, 'alive', 0), (1, 'non-finite', 10), (2, 'non-finite', 10), (3, 'alive', 30), (4, 'died', 40)]
    assert life(5) == [(1, 'born dead', 10), (2, 'revived', 20), (4, 'died', 40)]
    assert list(make(units=False).units.columns) == list(t.columns) and make(units=False).units.empty
    assert make(units=False).units.dtypes.equals(t.dtypes)


# --- joining -----------------------------------------------------------------------------------------------------------
def test_join_of_disjoint_rows():
    a, b = make(range(4)), make(range(10, 14), seed=1)
    j = a.join(b)
    assert j.iters.iter.tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
    for k in a.keys(): np.testing.assert_array_equal(j[k], np.concatenate([a[k], b[k]]))
    assert b.join(a) == j and j.windows['activation', 'frac_dead'].first_iter.tolist() == [0, 2, 10, 12]
    assert j.units.window.max() == 3 and len(j.epochs) == 1

def test_join_of_different_statistics_of_the_same_rows():
    full  = make()
    parts = [Record(full.iters, {k: full[k] for k in full.keys() if f(k)}, full.layers,
                    {k: w for k, w in full.windows.items() if f(k)}, dict(full._units) if f(('activation', 'frac_dead')) else None,
                    full.epochs, full.bins, full.meta) for f in (lambda k: k[0] == 'grad', lambda k: k[0] != 'grad')]
    j = parts[0].join(parts[1])
    assert set(j.keys()) == set(full.keys()) and len(j) == 6
    for k in full.keys(): np.testing.assert_array_equal(j[k], full[k])
    pd.testing.assert_frame_equal(j.units, full.units)
    assert full.join() == full and full.join(full) == full and full.join(full, full) == full

def test_join_where_both_measured_the_first_stands():
    a, b = make(range(6), seed=0, units=False), make(range(3, 9), seed=1, units=False)
    j = a.join(b)
    assert j.iters.iter.tolist() == list(range(9))
    for k in a.keys():
        np.testing.assert_array_equal(j[k][:6], a[k])
        np.testing.assert_array_equal(j[k][6:], b[k][3:])
    hole = a['grad', 'norm'].copy(); hole[4] = nan
    c = Record(a.iters.assign(measured=a.iters.iter != 4), {('grad', 'norm'): hole}, dict(grad=PAR))
    np.testing.assert_array_equal(c.join(b)['grad', 'norm'][4], b['grad', 'norm'][1])
    assert c.join(b).iters.measured.all()

def test_join_of_layers_in_another_order():
    a = make(range(3), hist=False, units=False, values={('grad', 'norm'): [[1, 2, 3]] * 3})
    t = PAR.iloc[[2, 0]].reset_index(drop=True)
    extra = pd.concat([t, PAR.iloc[[0]].assign(layer='c.weight', module='c')]).reset_index(drop=True)
    b = Record(iters([3]), {('grad', 'norm'): [[30, 10, 40]]}, dict(grad=extra))
    j = a.join(b)
    assert j.layers['grad'].layer.tolist() == ['a.weight', 'a.bias', 'b.weight', 'c.weight']
    np.testing.assert_array_equal(j['grad', 'norm'], [[1, 2, 3, nan]] * 3 + [[10, nan, 30, 40]])

def test_join_rows_are_the_union():
    a, b, c = make([0, 1, 5], units=False), make([1, 2, 3], seed=1, units=False), make([7], seed=2, units=False)
    for j in (a.join(b, c), a.join(b).join(c), a.join(b.join(c)), c.join(b, a)): assert j.iters.iter.tolist() == [0, 1, 2, 3, 5, 7]
    assert a.join(b).join(c) == a.join(b.join(c)) == a.join(b, c)

def hists(windows, fill=1., layers=(0,), n=1):
    v = np.full((len(windows), 3, 8), nan)
    v[:, list(layers)] = fill
    return Record(iters(range(n)), {('grad', 'hist'): v}, dict(grad=PAR), {('grad', 'hist'): windows}, bins=BINS)

def test_join_coarsens_many_windows():
    a, b = hists(wins(*((i, i) for i in range(800))), n=800), Record(iters(range(800, 1600)), *hists(wins(*((i, i) for i in range(800))), n=1600).__reduce__()[1][1:3],
                                                                     {('grad', 'hist'): wins(*((i, i) for i in range(800, 1600)))}, bins=BINS)
    j = a.join(b)
    w = j.windows['grad', 'hist']
    assert len(w) == 800 and np.nansum(j['grad', 'hist']) == 1600 * 8 and w.first_iter[0] == 0 and w.last_iter.iloc[-1] == 1599
    assert (w.first_iter.to_numpy()[1:] > w.last_iter.to_numpy()[:-1]).all()

def test_join_does_not_count_twice_where_windows_overlap():
    a = hists(wins(*((i, i) for i in range(8))), n=8)
    b = hists(wins((0, 3), (4, 7)), fill=4., n=8)
    for x, y in ((a, b), (b, a)):
        j = x.join(y)
        assert np.nansum(j['grad', 'hist'][:, 0]) == 8 * 8, 'eight iterations of eight elements'
    other = hists(wins((0, 3), (4, 7)), fill=4., layers=(2,), n=8)         # another layer, by coarser windows, loses nothing
    j = a.join(other)
    assert np.nansum(j['grad', 'hist'][:, 0]) == 64 and np.nansum(j['grad', 'hist'][:, 2]) == 64
    assert not j.windows['grad', 'hist'].last_iter.duplicated().any()

def test_join_of_units_of_different_layers():
    key = ('activation', 'frac_dead')
    one = lambda layer, s: Record(iters(range(4)), {key: [[.5], [.5]]}, dict(activation=ACT[ACT.layer == layer]), {key: wins((0, 1), (2, 3))}, {layer: s})
    j = one('r', [[0, 1], [1, 1]]).join(one('s', [[1], [0]]))
    t = j.units
    assert t[t.layer == 'r'].state.tolist() == ['alive', 'born dead', 'died', 'born dead'] and t[t.layer == 's'].state.tolist() == ['born dead', 'revived']
    wider = one('r', [[0, 0, 0], [0, 0, 0]])
    assert len(one('r', [[0, 1], [-1, -1]]).join(wider).units) >= 2

def test_join_takes_records_only():
    with pytest.raises(TypeError, match=r'got dict.*Record.load'): make().join({})

def test_coarsen():
    h, w = coarsen(np.arange(7.)[:, None, None] * np.ones((7, 1, 2)), wins(*((i, i) for i in range(7))), 4)
    assert h[:, 0, 0].tolist() == [1, 5, 9, 6] and w.values.tolist() == [[0, 1], [2, 3], [4, 5], [6, 6]]
    h, w = coarsen(np.full((4, 1, 1), nan), wins(*((i, i) for i in range(4))), 2)
    assert np.isnan(h).all()


# --- files -------------------------------------------------------------------------------------------------------------
SHAPES = dict(
    full        = lambda: make(),
    no_rows     = lambda: make([]),
    one_row     = lambda: make([4]),
    no_values   = lambda: Record(iters(range(3)), {}, {}),
    no_hist     = lambda: make(hist=False, units=False),
    no_epochs   = lambda: make(epochs=False),
    unmeasured  = lambda: make(range(4), hist=False, units=False, iters=iters(range(4), measured=[True, False, True, False], grad_norm=[1, nan, nan, nan]),
                               values={('grad', 'norm'): [[1, 2, nan], [nan] * 3, [nan, 4, 5], [nan] * 3]}),
    all_nan     = lambda: make(hist=False, units=False, values={('grad', 'norm'): np.full((6, 3), nan)}),
    infinite    = lambda: make(hist=False, units=False, values={('grad', 'norm'): [[np.inf, -np.inf, 1e-45]] * 6}),
    bad_loss    = lambda: make(iters=iters(range(6), loss=[2, nan, np.inf, -np.inf, 1e-300, 0], loss_constant=nan, mom=nan, lr=nan)),
    several_fits= lambda: make(iters=iters([0, 1, 2, 10, 11, 12], fit=[0, 0, 0, 1, 1, 1], epoch=[0, 0, 1, 0, 0, 0], n_accum=[1, 2, 3, 1, 1, 1], stepped=[True, False] * 3), its=[0, 1, 2, 10, 11, 12]),
    bad_epochs  = lambda: Record(iters([0]), {}, {}, epochs=pd.DataFrame(dict(fit=[0, 0], epoch=[0, 1], valid_loss=[nan, np.inf], accuracy=[nan, nan], f1=[1., 2.]))),
    no_layers   = lambda: Record(iters([0, 1]), {('grad', 'norm'): np.zeros((2, 0)), ('grad', 'hist'): np.zeros((0, 0, 8))}, dict(grad=PAR[:0]), {('grad', 'hist'): wins()}, bins=BINS),
    no_windows  = lambda: Record(iters([0]), {('grad', 'hist'): np.zeros((0, 3, 8)), ('activation', 'frac_dead'): np.zeros((0, 2))}, dict(grad=PAR, activation=ACT),
                                 {('grad', 'hist'): wins(), ('activation', 'frac_dead'): wins()}, dict(r=np.zeros((0, 4))), bins=BINS),
    unseen_units= lambda: Record(iters([0, 1]), {('activation', 'frac_dead'): [[nan, nan]]}, dict(activation=ACT), {('activation', 'frac_dead'): wins((0, 1))}, dict(r=np.full((1, 4), -1))),
    odd_names   = lambda: Record(iters([0]), {('grad', 'norm'): [[1, 2, 3]]}, dict(grad=PAR.assign(layer=['', 'ü"\n', '0'])), meta=dict(model='"x"\n')),
    joined      = lambda: make(range(6)).join(make(range(20, 26), seed=1)),
    big_iters   = lambda: make([2 ** 40, 2 ** 40 + 1]),
)
@pytest.mark.parametrize('shape', SHAPES)
def test_save_and_load(shape, tmp_path):
    r = SHAPES[shape]()
    path = tmp_path / 'r.parquet'
    assert r.save(path) == path and [p.name for p in tmp_path.iterdir()] == ['r.parquet']
    back = Record.load(str(path))
    same(r, back)
    assert back.save(str(tmp_path / 'again.parquet')).read_bytes() == path.read_bytes()

def test_pandas_and_duckdb_read_the_file(tmp_path):
    r = make(iters=iters(range(6), loss_constant=nan, mom=nan))
    path = r.save(tmp_path / 'r.parquet')
    d = pd.read_parquet(path)
    assert list(d.columns) == [*ITER_COLS, 'probe', 'layer', 'norm', 'mean', 'hist', 'frac_dead', 'unit_state']
    assert d.loss.notna().all() and (d.probe == 'row').sum() == 6 and d.stepped.dtype == bool and d.iter.dtype == 'int64'
    f = r.frame()
    m = d[d.probe != 'row'].reset_index(drop=True)
    for c in ('iter', 'loss', 'lr', 'probe', 'layer', 'norm', 'mean', 'frac_dead'): np.testing.assert_array_equal(m[c].to_numpy(), f[c].to_numpy())
    np.testing.assert_array_equal(m['hist'][0], r['grad', 'hist'][0, 0])
    duckdb = pytest.importorskip('duckdb')
    q = lambda sql: duckdb.sql(sql.format(f"'{path}'")).fetchall()
    assert q("select count(*), avg(norm) from {} where probe = 'grad' and layer = 'a.bias'")[0] == (6, pytest.approx(r['grad', 'norm'][:, 1].mean(), rel=1e-6))
    assert q("select avg(norm) from {}")[0][0] == pytest.approx(np.mean([r[p, 'norm'] for p in ('grad', 'weight', 'update')]), rel=1e-6), 'what was not measured is NULL'
    assert q("select count(frac_dead), count(mom), count(loss_constant), count(hist) from {}")[0] == (3, 0, 0, 12)
    assert q("select list_sum(hist) from {} where hist is not null limit 1")[0][0] == r['grad', 'hist'][0, 0].sum()
    header = json.loads(pq.read_schema(path).metadata[b'fastgradstats'])
    assert header['format'] == 1 and header['meta']['model'] == 'net'

def test_a_measured_nan_is_not_null(tmp_path):
    r = make(hist=False, units=False, values={('grad', 'norm'): [[nan, 1, 1]] * 6, ('grad', 'frac_nonfinite'): [[1, 0, 0]] * 6})
    t = pq.read_table(r.save(tmp_path / 'r.parquet')).to_pandas(types_mapper=pd.ArrowDtype)
    assert t.norm[t.probe == 'row'].isna().all() if hasattr(t, 'norm') else True
    col = pq.read_table(tmp_path / 'r.parquet')['norm'].to_pylist()
    assert sum(v is None for v in col) == 6 and sum(v != v for v in col if v is not None) == 6

LOAD_ERRORS = dict(
    missing   = (FileNotFoundError, 'there is no record at', lambda p, r: None),
    truncated = (ValueError, 'damaged', lambda p, r: p.write_bytes(r.save(p).read_bytes()[:-300])),
    half      = (ValueError, 'damaged', lambda p, r: p.write_bytes(r.save(p).read_bytes()[:700])),
    garbage   = (ValueError, 'damaged', lambda p, r: p.write_bytes(os.urandom(5000))),
    empty     = (ValueError, 'damaged', lambda p, r: p.write_bytes(b'')),
    text      = (ValueError, 'damaged', lambda p, r: p.write_text('iter,loss\n1,2\n')),
    foreign   = (ValueError, 'not a record', lambda p, r: pd.DataFrame(dict(a=[1])).to_parquet(p)),
    folder    = (ValueError, 'is a folder', lambda p, r: p.mkdir()),
    newer     = (ValueError, 'format 99.*pip install -U', lambda p, r: _with_head(p, r, lambda h: {**h, 'format': 99})),
    headless  = (ValueError, 'damaged', lambda p, r: _with_head(p, r, lambda h: dict(format=1))),
    no_json   = (ValueError, 'damaged', lambda p, r: pq.write_table(pa.table(dict(a=[1])).replace_schema_metadata({b'fastgradstats': b'{'}), p)),
    no_column = (ValueError, 'damaged.*norm', lambda p, r: pq.write_table(pq.read_table(r.save(p)).drop_columns(['norm']), p)),
)
def _with_head(p, r, change):
    t = pq.read_table(r.save(p))
    pq.write_table(t.replace_schema_metadata({b'fastgradstats': json.dumps(change(json.loads(t.schema.metadata[b'fastgradstats']))).encode()}), p)

@pytest.mark.parametrize('case', LOAD_ERRORS)
def test_load_errors_are_one_clear_sentence(case, tmp_path):
    kind, says, spoil = LOAD_ERRORS[case]
    path = tmp_path / 'r.parquet'
    spoil(path, make())
    with pytest.raises(kind, match=says) as e: Record.load(path)
    assert 'r.parquet' in str(e.value) and '\n' not in str(e.value) and len(str(e.value).replace(str(path), '')) < 300

def test_any_damage_is_a_value_error(tmp_path):
    "Bytes flipped or cut anywhere: a ValueError, or a record that still reads; never another exception."
    good = make().save(tmp_path / 'good.parquet').read_bytes()
    rng, path, bad = np.random.default_rng(0), tmp_path / 'bad.parquet', 0
    for k in range(120):
        b = bytearray(good)
        if k % 3: b[rng.integers(0, len(b))] ^= int(rng.integers(1, 256))
        else:     del b[int(rng.integers(0, len(b))):]
        path.write_bytes(bytes(b))
        try: back = Record.load(path)
        except ValueError as e:
            assert 'bad.parquet' in str(e)
            bad += 1
            continue
        for k in make().keys(): np.testing.assert_array_equal(back[k], make()[k])       # checksums: no wrong number is read
    assert bad > 80

def test_saving_where_one_cannot(tmp_path, monkeypatch):
    r = make()
    with pytest.raises(OSError, match='cannot write the record to .*r.parquet: No such file or directory. Choose a folder that exists'): r.save(tmp_path / 'no' / 'r.parquet')
    (tmp_path / 'd').mkdir()
    with pytest.raises(OSError, match='cannot write the record'): r.save(tmp_path / 'd')
    assert [p.name for p in tmp_path.iterdir()] == ['d']
    def refuse(*a, **k): raise PermissionError(13, 'Permission denied')    # the tests may run as root, who may write anywhere
    monkeypatch.setattr(pq, 'write_table', refuse)
    with pytest.raises(OSError, match='Permission denied. Choose a folder'): r.save(tmp_path / 'r.parquet')

@pytest.mark.parametrize('stop', [OSError(28, 'No space left on device'), KeyboardInterrupt()], ids=['full', 'ctrl-c'])
def test_an_interrupted_write_leaves_the_old_file(stop, tmp_path, monkeypatch):
    path = make().save(tmp_path / 'r.parquet')
    old  = path.read_bytes()
    def write(table, where, **k):
        open(where, 'wb').write(b'PAR1half')
        raise stop
    monkeypatch.setattr(pq, 'write_table', write)
    with pytest.raises(type(stop)): make(seed=1).save(path)
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ['r.parquet']
    monkeypatch.undo()
    same(Record.load(make(seed=1).save(path)), make(seed=1))

def test_reading_imports_neither_torch_nor_fastai(tmp_path):
    path = make().save(tmp_path / 'r.parquet')
    code = (f"import sys; from fastgradstats import Record; r = Record.load({str(path)!r}); r.frame(); r.units; r.join(r).save({str(tmp_path / 'b.parquet')!r}); repr(r);"
            "bad = {m.split('.')[0] for m in sys.modules} & {'torch', 'fastai', 'fastcore', 'torchvision', 'numba', 'matplotlib'}; sys.exit(', '.join(bad) or 0)")
    p = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert p.returncode == 0, p.stderr

@pytest.fixture(scope='module')
def long():
    n, k, rng = 100_000, 10, np.random.default_rng(0)
    lay = pd.DataFrame(dict(layer=[f'l{i}.weight' for i in range(k)], module='', type='Linear', shape='1', numel=1))
    val = {('grad', s): rng.random((n, k), np.float32) for s in ('norm', 'mean', 'std', 'median')}
    val['grad', 'hist'] = rng.integers(0, 99, (1000, k, 390)).astype(np.float32)
    return Record(iters(range(n)), val, dict(grad=lay), {('grad', 'hist'): wins(*((i, i + 99) for i in range(0, n, 100)))},
                  bins=Bins(np.arange(388.), {}))

def test_a_hundred_thousand_rows(long, tmp_path):
    "One million lines: seconds, and memory in proportion to the record (measured in a process of its own)."
    t = time.process_time(); path = long.save(tmp_path / 'r.parquet')
    s = time.process_time(); back = Record.load(path)
    e = time.process_time()
    assert back == long and s - t < 8 and e - s < 8
    assert path.stat().st_size < 60e6
    code = ("import resource, sys; from fastgradstats import Record; a = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
            f"r = Record.load({str(path)!r}); r.save({str(tmp_path / 'b.parquet')!r}); print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - a) // 1024)")
    mb = int(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout)
    assert mb < 1500, f'{mb} MB to load and save a file of a million lines'
    assert len(long.frame(('grad', 'norm'))) == 1_000_000

def test_two_processes_that_save_to_one_path_leave_a_whole_record(tmp_path):
    make().save(tmp_path / 'seed.parquet')
    code = """
import sys
from fastgradstats import Record
rec = Record.load(sys.argv[1])
for _ in range(60): rec.save(sys.argv[2])
"""
    args = [sys.executable, '-c', code, str(tmp_path / 'seed.parquet'), str(tmp_path / 'both.parquet')]
    runs = [subprocess.Popen(args, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [p.communicate()[1] for p in runs]
    assert [p.returncode for p in runs] == [0, 0], said
    assert Record.load(tmp_path / 'both.parquet') == make() and {p.name for p in tmp_path.iterdir()} == {'seed.parquet', 'both.parquet'}
