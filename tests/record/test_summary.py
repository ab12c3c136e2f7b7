"The lines that are printed when a fit ends: which iterations they are of, and what they may not claim."
import re

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from fastgradstats import LayerStatsCallback, watch
from fastgradstats.record.record import Record
from fastgradstats.record.schema import ITER_COLS
from fastgradstats.record.summary import facts
from reference import learner, loaders


def lines(fit=1, n=40, **kw):
    "The facts of a real fit, and its record; `n` / 8 iterations an epoch."
    settings = {k: kw.pop(k) for k in ('every',) if k in kw}
    learn    = learner('mlp', LayerStatsCallback(verbose=False, **settings), n=n, **kw)
    learn.fit(fit)
    return facts(learn.layer_stats).split('\n'), learn.layer_stats

def losses(line): return [float(v) for v in re.match(r'loss ([\d.e+-]+) -> ([\d.e+-]+);', line).groups()]


@pytest.mark.parametrize('fit, first, last, which', [
    (1, 1, 4, 'first 1 and the last 4 of 5 iterations'), (2, 3, 7, 'first 3 and the last 7 of 10 iterations'),
    (5, 8, 17, 'first 8 and the last 17 of 25 iterations'), (8, 10, 20, 'first 10 and the last 20 iterations')])
def test_the_windows_compared_have_no_iteration_in_common(fit, first, last, which):
    (_, text, _), rec = lines(fit)
    assert which in text
    loss = rec.iters.loss.to_numpy()
    assert losses(text) == pytest.approx([np.median(loss[:first]), np.median(loss[-last:])], rel=5e-3)

def test_sparse_records_say_measured_iterations():
    (_, text, _), rec = lines(8, every=4)
    assert 'first 3 and the last 7 of 10 measured iterations' in text
    loss = rec.iters.loss[rec.iters.measured].to_numpy()
    assert losses(text) == pytest.approx([np.median(loss[:3]), np.median(loss[3:])], rel=5e-3)

def test_one_iteration_is_not_compared_with_itself():
    (_, text, _), rec = lines(n=8)
    assert text.startswith(f'loss {rec.iters.loss[0]:.3g};') and '->' not in text and text.endswith('(iteration 0)')

def test_a_loss_that_is_lost_is_said_since_when():
    (_, text, damage), rec = lines(4, lr=1e18)
    lost = int(np.flatnonzero(np.isfinite(rec.iters.loss))[-1]) + 1
    assert 0 < lost < len(rec)
    assert f'-> not finite since iteration {lost}; gain' in text and text.count('not finite') == 3
    assert f'medians of the first {lost} iterations' in text and 'and the last' not in text
    assert f'first at iteration {lost}' in damage

def test_dead_units_of_non_finite_activations_cannot_be_told():
    (*_, damage), rec = lines(4, lr=1e18)
    assert set(rec.units.state) == {'non-finite'}
    assert 'dead units: cannot be told' in damage and 'no dead units' not in damage
    (*_, damage), _ = lines()
    assert damage == 'no dead units; no non-finite values'

class Half(nn.Module):
    "The second of two activations is NaN from the third batch on; the loss does not see it."
    def __init__(self):
        super().__init__()
        self.a, self.act1, self.b, self.act2, self.n = nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3), nn.Tanh(), 0
    def forward(self, x):
        self.n += self.training
        x = self.b(self.act1(self.a(x)))
        self.act2(x * (float('nan') if self.n >= 3 else 1))
        return x

def test_dead_units_of_the_finite_rest_are_told_apart():
    learn = learner('mlp', LayerStatsCallback(verbose=False), model=Half())
    learn.fit(1)
    assert '(of 3 of 13 units it cannot be told: non-finite)' in facts(learn.layer_stats)

def test_a_loss_that_was_never_finite():
    nans  = loaders(x=torch.full((48, 6), torch.nan))
    learn = learner('mlp', LayerStatsCallback(verbose=False), dls=nans)
    learn.fit(1)
    _, text, damage = facts(learn.layer_stats).split('\n')
    assert text.startswith('loss not finite since iteration 0; gain not finite') and 'first at iteration 0' in damage

def test_a_loop_that_never_told_its_loss():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    opt   = torch.optim.SGD(model.parameters(), .1)
    with watch(model, opt, grad=['norm'], activation=None) as w:
        for _ in range(5): model(torch.randn(8, 4)).sum().backward(); opt.step(); opt.zero_grad()
    _, text, damage = facts(w.record).split('\n')
    assert text == 'loss not measured; gain not measured; lowest elasticity not measured'
    assert damage == 'dead units not measured; non-finite values not measured'

def test_a_loss_that_recovers_is_left_out_of_the_medians_and_counted():
    _, rec = lines(8)
    loss   = rec.iters.loss.to_numpy().copy(); loss[[25, 30]] = np.inf
    rec    = Record(rec.iters.assign(loss=loss), {}, {})
    text   = facts(rec).split('\n')[1]
    assert 'not finite since' not in text and text.endswith('iterations, without 2 whose loss was not finite)')
    assert losses(text)[1] == pytest.approx(np.median(loss[-20:][np.isfinite(loss[-20:])]), rel=5e-3)

def test_no_row_at_all():
    assert 'loss not measured' in facts(Record(pd.DataFrame(columns=list(ITER_COLS)), {}, {}))
