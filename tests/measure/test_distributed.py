"""Two real processes train through fastai's DistributedTrainer; the record of process 0 equals that of one process on the same
batches. `distributed.py` is what the processes run."""
import os
import pickle
import subprocess
import sys
from pathlib import Path

import distributed
import numpy as np
import pytest

from distributed import single
from fastgradstats import Record

TOGETHER = ['plain', 'every', 'function', 'window', 'accumulate', 'branch', 'middle', 'disagree', 'fails']

def seen(folder, scenario, rank): return pickle.loads((folder/f'{scenario}.{rank}.pkl').read_bytes())

@pytest.fixture(scope='module')
def together(tmp_path_factory):
    "All scenarios, in one pair of processes; in the last one a process fails and both end."
    folder = tmp_path_factory.mktemp('together')
    env    = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore', 'CUDA_VISIBLE_DEVICES': ''}
    subprocess.run([sys.executable, str(Path(distributed.__file__)), str(folder), *TOGETHER], env=env,
                   timeout=200, check=True, capture_output=True)
    return folder

def equal(rec, want, rtol=1e-6, but=()):
    "Every value, window and unit of two records."
    assert rec.keys() == want.keys()
    for c in ('iter', 'fit', 'epoch', 'bs', 'measured', 'stepped', 'n_accum'):
        assert rec.iters[c].tolist() == want.iters[c].tolist(), c
    for c in ('loss', 'grad_norm', 'clip_factor', 'lr'):
        np.testing.assert_allclose(rec.iters[c], want.iters[c], rtol=rtol, err_msg=c)
    for p in want.layers: assert rec.layers[p].layer.tolist() == want.layers[p].layer.tolist()
    for key in want.keys():
        if key in but: continue
        a, b = rec[key], want[key]
        if key in want.windows: assert rec.windows[key].to_numpy().tolist() == want.windows[key].to_numpy().tolist(), key
        if key[1] == 'hist':                                     # a value on the edge of a bin may be rounded to its other side
            assert np.array_equal(np.isnan(a), np.isnan(b)) and np.allclose(np.nansum(a, -1), np.nansum(b, -1)), key
            assert np.nansum(np.abs(a - b)) <= 2e-3 * np.nansum(b), key
            continue
        layers = np.nanmax(np.abs(b), axis=0, initial=0)         # of sums that cancel the error is that of their terms
        size   = want[key[0], 'std'] if key[1] in ('mean', 'own_mean') and (key[0], 'std') in want.keys() else layers
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b), err_msg=str(key))
        assert (np.abs(a - b) <= rtol * np.maximum(np.abs(b), np.nan_to_num(size)) + 1e-9)[~np.isnan(b)].all(), \
            (key, np.nanmax(np.abs(a - b) / np.maximum(np.abs(b), 1e-12)))
    assert rec.units.equals(want.units)


@pytest.mark.parametrize('scenario', ['plain', 'every', 'function', 'window', 'accumulate'])
def test_two_processes_record_what_one_does(together, scenario):
    "Statistics, histograms and units of every probe, over two epochs, all rows or some, with windows or accumulated batches."
    want, weights = single(scenario)
    rec, saw      = Record.load(together/f'{scenario}.parquet'), seen(together, scenario, 0)
    for k, v in weights.items(): np.testing.assert_allclose(saw['weights'][k], v, rtol=1e-4, atol=1e-6)     # the same training
    equal(rec, want, rtol=5e-6)
    assert rec.meta['processes'] == dict(n=2, alone=[])
    assert want.units.state.str.contains('dead').any()

def test_process_0_owns_the_record(together):
    for scenario in TOGETHER[:-1]:
        for rank in (0, 1):
            saw = seen(together, scenario, rank)
            assert saw['error'] is None and not saw['hooks']
            if rank: assert saw['none'] and 'process 0' in saw['refused'] and not saw['printed'] and not saw['told']
            else:    assert not saw['none'] and saw['refused'] is None and 'recorded' in saw['printed']

def test_names_are_without_prefix_under_ddp(together):
    rec = Record.load(together/'plain.parquet')
    assert rec.layers['activation'].layer.tolist() == ['act:0', 'act:1', 'tanh']
    assert rec.layers['grad'].layer.tolist()[:2] == ['conv1.weight', 'conv1.bias'] and rec.meta['model'] == 'Net'

def test_what_only_another_process_used_has_its_gradient(together):
    rec = Record.load(together/'branch.parquet')
    j   = rec.layers['grad'].layer.tolist().index('side.weight')
    assert np.isfinite(rec['grad', 'norm'][:, j]).all() and (rec['grad', 'norm'][:, j] > 0).all()

def test_a_record_read_in_the_middle_of_an_epoch(together):
    "Process 0 sees its own rows of the epoch under way, marked so, and all processes' of those before."
    at = seen(together, 'middle', 0)['middle']
    assert [n for n, _ in at] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [m['alone'] for _, m in at] == 4 * [[[0, 0]]] + 4 * [[[0, 1]]]
    assert seen(together, 'middle', 1)['middle'] == 8 * [None]
    equal(Record.load(together/'middle.parquet'), single('middle')[0], rtol=5e-6)

def test_processes_that_measure_different_rows_are_told(together):
    rec, saw = Record.load(together/'disagree.parquet'), seen(together, 'disagree', 0)
    assert rec.meta['processes']['alone'] == [[0, 0], [0, 1]] and rec.iters.bs.eq(7).all() and rec.iters.measured.all()
    assert len(saw['told']) == 2 and 'process 0 alone' in saw['told'][0] and '`every`' in saw['told'][0]

def test_a_process_that_fails_takes_no_other_into_a_hang(together):
    "It dies in the second epoch: process 0 ends within seconds and has the first epoch of both, the second of its own."
    zero, one = seen(together, 'fails', 0), seen(together, 'fails', 1)
    assert 'this process fails' in one['error'] and zero['error'] and zero['seconds'] - one['seconds'] < 15
    rec = Record.load(together/'fails.parquet')
    assert rec.iters.bs.tolist()[:4] == 4 * [14] and set(rec.iters.bs.tolist()[4:]) <= {7}
    assert rec.meta['processes'] == dict(n=2, alone=[[0, 1]]) and not zero['hooks'] and not one['hooks']
    both = Record.load(together/'plain.parquet')
    for key in (('activation', 'std'), ('grad_output', 'norm'), ('grad', 'norm')): assert np.array_equal(rec[key][:4], both[key][:4])
