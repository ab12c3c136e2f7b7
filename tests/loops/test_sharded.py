"""Plain loops whose model is shared out over two real processes: they train as without us, and what a process holds but a part of is
named. `helpers/sharded.py` is what the processes run."""
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import sharded

@pytest.fixture(scope='module')
def saw(tmp_path_factory):
    folder = tmp_path_factory.mktemp('sharded')
    env    = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore', 'CUDA_VISIBLE_DEVICES': ''}
    done   = subprocess.run([sys.executable, sharded.__file__, str(folder)], env=env, timeout=200, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [pickle.loads((Path(folder)/f'{rank}.pkl').read_bytes()) for rank in (0, 1)]

@pytest.mark.parametrize('kind', sharded.KINDS)
def test_training_is_the_same(saw, kind):
    for rank in (0, 1):
        assert all(torch.equal(a, b) for a, b in zip(saw[rank][kind, True]['weights'], saw[rank][kind, False]['weights']))

@pytest.mark.parametrize('rank', [0, 1])
@pytest.mark.parametrize('kind', sharded.KINDS[:3])
def test_of_sharded_parameters_nothing_is_said_and_of_activations_the_processes_own(saw, kind, rank):
    one = saw[rank][kind, True]
    rec = one['record']
    assert rec['iters'].stepped.tolist() == [True] * 3 and rec['iters'].bs.tolist() == [16] * 3
    np.testing.assert_allclose(rec['iters'].loss, np.reshape(one['loss'], (3, 2)).mean(1), rtol=1e-6)
    want = [float(torch.cat([a, b]).norm()) for a, b in zip(one['act'][::2], one['act'][1::2])]
    np.testing.assert_allclose(rec['act'][:, 0], want, rtol=1e-5)
    assert rec['grad'].size == 0 and rec['iters'].grad_norm.isna().all() and np.isfinite(rec['back']).all()
    assert 'shared out over processes' in rec['missing']['grad, weight, update']

def test_ddp_in_a_plain_loop(saw):
    "The record is process 0's, of both processes' batches; gradients are the averaged ones."
    both = [s['ddp', True] for s in saw]
    rec  = both[0]['record']
    assert both[1]['record'] is None and rec['iters'].bs.tolist() == rec['second'].bs.tolist() == [32] * 3
    np.testing.assert_allclose(rec['grad'], both[0]['grad'], rtol=1e-5)
    np.testing.assert_allclose(rec['iters'].loss, np.reshape([b['loss'] for b in both], (2, 3, 2)).mean((0, 2)), rtol=1e-6)
    want = [float(torch.cat([t for b in both for t in b['act'][2 * k:2 * k + 2]]).norm()) for k in range(3)]
    np.testing.assert_allclose(rec['act'][:, 0], want, rtol=1e-5)

def test_a_process_that_records_alone_waits_for_no_other(saw):
    "`if rank == 0: with watch(...)`: its rows are its own, and it is said."
    one = saw[0]['ddp, one records', True]
    rec = one['record']
    assert rec['iters'].bs.tolist() == [16] * 3
    np.testing.assert_allclose(rec['iters'].loss, np.reshape(one['loss'], (3, 2)).mean(1), rtol=1e-6)
    np.testing.assert_allclose(rec['grad'], one['grad'], rtol=1e-5)
    assert rec['alone'] == [[0, 0]]
