"""What may happen to a Learner in the middle of a fit: its model and layers replaced, another fit within. Each row's gradients
are those that a callback reads just before the step."""
import numpy as np
import pytest
from torch import nn
from fastai.callback.core import Callback

from fastgradstats import LayerStatsCallback
from modes import Hooked
from plain import norm
from reference import hooks_on, learner

class Reads(Callback):
    "The norms of all gradients of the model that is stepped, by shape too, as names may stay."
    order, run_valid = 10.6, False
    def __init__(self): self.rd = []
    def before_step(self): self.rd.append({n: norm(p.grad) for n, p in self.learn.model.named_parameters() if p.grad is not None})

def check(learn, reads):
    rec = learn.layer_stats
    assert len(rec) == len(reads.rd) and rec.iters.stepped.all() and rec.iters.iter.tolist() == list(range(len(rec)))
    np.testing.assert_allclose(rec.iters.grad_norm, [np.sqrt(sum(v ** 2 for v in r.values())) for r in reads.rd], rtol=1e-5)
    got, names = rec['grad', 'norm'], list(rec.layers['grad'].layer)
    for k, row in enumerate(reads.rd):
        have = {n.split(':')[0]: got[k, j] for j, n in enumerate(names) if np.isfinite(got[k, j])}
        assert have.keys() == row.keys()
        for n in row: np.testing.assert_allclose(have[n], row[n], rtol=1e-5)
    assert not hooks_on(learn.model)
    return rec

def widened(learn):
    learn.model[2] = nn.Linear(learn.model[2].in_features, 11)
    learn.model[4] = nn.Linear(11, 3)
    learn.create_opt()

def other_model(learn):
    learn.model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))
    learn.create_opt()

@pytest.mark.parametrize('change', [widened, other_model])
@pytest.mark.parametrize('when', ['between fits', 'within a fit'])
def test_layers_and_models_replaced(change, when):
    reads = Reads()
    cbs   = [Hooked('before_batch', change, at=2, order=-5)] if when == 'within a fit' else []
    learn = learner('mlp', [reads, LayerStatsCallback(verbose=False), *cbs])
    learn.fit(1)
    if when == 'between fits': change(learn)
    learn.fit(1)
    rec = check(learn, reads)
    assert any(':1' in n for n in rec.layers['grad'].layer) and np.isfinite(rec['update', 'norm'][-1]).sum() == len(reads.rd[-1])

@pytest.mark.parametrize('event', ['after_batch', 'after_epoch'])
def test_a_fit_within_a_fit(event):
    reads, done = Reads(), []
    class Nested(Callback):
        order = 90
        def _now(self):
            if not done and (event == 'after_epoch' or self.learn.training and self.learn.train_iter == 2):
                done.append(1)
                kept = {n: getattr(self.learn, n) for n in ('epoch', 'n_epoch', 'iter', 'n_iter', 'train_iter', 'dl', 'opt')}
                self.learn.fit(1, reset_opt=False)
                for n, v in kept.items(): setattr(self.learn, n, v)
                self.learn.model.train()
    setattr(Nested, event, Nested._now)
    learn = learner('mlp', [reads, LayerStatsCallback(verbose=False), Nested()])
    learn.fit(2)
    rec = check(learn, reads)
    fits = rec.iters.fit.tolist()
    n = fits.index(1)
    assert set(fits) == {0, 1} and fits[n:n + 5] == [1] * 5 and set(fits[n + 5:]) == {0}
    assert rec.iters.epoch.tolist()[-5:] == [1] * 5
