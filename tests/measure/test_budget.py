"What recording costs, and `budget=`, which measures as many rows as a share of the training time pays for."
import time
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from fastgradstats import LayerStatsCallback, statistic, watch
from fastgradstats.measure.clock import ROWS, Budget
from reference import learner


class Times:
    "A clock that is told what rows take."
    def __init__(self): self.spent = self.training = 0.
    def now(self): return self.spent, self.training

def run(share, costs, bare=1., idle=0.):
    "Which rows a Budget measures where measuring row `i` costs costs[i].  # (row,), and the clock"
    clock    = Times()
    budget   = Budget(share, clock)
    measured = []
    for row, cost in enumerate(costs):
        measured.append(budget.due(row))
        assert budget.due(row) == measured[-1]                          # asked again, the same answer
        clock.spent    += cost if measured[-1] else idle
        clock.training += bare
    budget.due(len(costs))
    return np.flatnonzero(measured), budget

def test_a_budget_is_held_from_the_second_row_on():
    for cost in (.02, .04, .3, 1.7):
        rows, budget = run(.05, [30., *[cost] * 599])                   # the first row has compiled something
        assert rows[0] == 0 and rows[1] == 1
        assert budget.taken() <= .05 + 2 * cost / 600
        assert len(rows) >= min(600, .05 / cost * 598)                  # and it is made use of
        assert len(rows) == 600 if cost < .05 else np.ptp(np.diff(rows[1:])) <= 2

def test_a_budget_saves_up_no_more_than_one_row():
    rows, _ = run(.05, [1., *[.001] * 200, *[.5] * 200])                # cheap rows that become dear
    assert (rows > 200).sum() <= 2 + 200 * .05 / .5

def test_where_even_unmeasured_rows_are_too_dear_some_are_measured_all_the_same():
    rows, budget = run(.05, [.5] * 400, idle=.1)
    assert (np.diff(rows[1:]) == ROWS + 1).all() and budget.taken() > .05

@statistic(unit='1')
def slow(x):
    "Takes its time."
    time.sleep(.004)
    return x.abs().max()

class Slow(nn.Linear):
    "Two milliseconds of work, and what autograd and the optimizer take."
    def forward(self, x):
        time.sleep(.002)
        return super().forward(x)

def loop(**settings):
    torch.manual_seed(0)
    model, n = Slow(4, 3), 150
    opt = torch.optim.SGD(model.parameters(), .1)
    with watch(model, opt, grad=['norm', slow], activation=None, **settings) as w:
        for _ in range(n):
            w.loss(model(torch.randn(8, 4)).pow(2).mean()).backward()
            opt.step()
            opt.zero_grad()
    return w.record

def test_a_loop_under_a_budget_names_the_rows_that_were_measured():
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*recording has taken.*')
        rec = loop(budget=.5)
    m = rec.iters.measured.to_numpy()
    assert len(rec) == 150 and 5 < m.sum() < 75                         # bare about 3 ms, a measured row 8 ms more
    assert np.isfinite(rec['grad', 'norm'][m]).all() and np.isnan(rec['grad', 'norm'][~m]).all()
    assert np.isfinite(rec.iters.loss).all() and rec.meta['config']['budget'] == .5

def test_a_dear_run_without_a_budget_is_told_once_what_helps():
    with pytest.warns(UserWarning, match=r'recording has taken \d+ % of the training time: with budget=.05'): loop()

def test_a_callback_takes_a_budget():
    learn = learner('mlp', [LayerStatsCallback(verbose=False, budget=.001)], n=80, bs=8)
    learn.fit(3)
    m = learn.layer_stats.iters.measured
    assert m.iloc[0] and not m.all() and len(m) == 30

@pytest.mark.parametrize('wrong', [0, -.1, 1.5, 5, True, '5%'])
def test_a_wrong_budget_is_named(wrong):
    with pytest.raises(ValueError, match='budget is a share of the training time, above 0 and up to 1'):
        LayerStatsCallback(budget=wrong)
