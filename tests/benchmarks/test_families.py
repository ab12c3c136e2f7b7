"The families: what they declare, that a seed makes a run, that warnings while one trains are heard, what is counted."
import json
from argparse import Namespace

import pandas as pd
import pytest
import torch
from torch import nn
from zoo.families import command, judge
from zoo.families.training import CASES, dense, fit

from fastgradstats import Record
from fastgradstats.rules import ALL

COMING = {'memorising', 'no_gradient', 'eval_mode'}          # rules that were declared before they were written

def test_there_are_enough_families_and_their_names_are_rules():
    sick = [c for c in CASES.values() if c.sick]
    assert len(sick) >= 14 and len(CASES) - len(sick) >= 14
    assert {c.name.partition('-')[0] for c in sick} <= {c.name for c in CASES.values() if not c.sick}
    assert {n for c in sick for n in c.truth} <= {r.__name__ for r in ALL} | COMING
    assert all(len(set(c.truth)) == len(c.truth) for c in sick)

@pytest.mark.trains
@pytest.mark.parametrize('name', ['finished', 'polished'])          # a loop and a Learner
def test_a_seed_makes_a_run(name, tmp_path):
    for out, seed in ('a', 0), ('b', 0), ('c', 1):
        (tmp_path / out).mkdir()
        command.write(Namespace(out=tmp_path / out, first=seed, seeds=1, only=name))
    a, b, c = (Record.load(tmp_path / out / f'{name}-{s}.parquet').iters.loss.to_numpy()
               for out, s in ('a0', 'b0', 'c1'))
    assert (a == b).all() and not (a == c).any()
    assert command.report([(CASES[name], 0, tmp_path / 'a' / f'{name}-0.parquet')]).count('\n| ' + name) == 1
    said = json.loads((tmp_path / 'a' / f'{name}-0.json').read_text())['said']
    assert isinstance(said, list) == (name == 'polished')

@pytest.mark.trains
def test_what_is_said_while_a_net_trains_is_heard():
    torch.manual_seed(0)
    x = torch.randn(200, 4)
    x[7] = torch.nan
    run  = fit(x, torch.zeros(200, 1), dense(4, 8, 1), nn.MSELoss(), 2, .01, bs=1)
    last = run.said[-1]                                             # it ends the fit
    assert (last['iter'], last['rule']) == (len(run.record) - 1, 'non_finite')
    assert len(run.record) < 160

def test_what_is_counted():
    row  = lambda sick, best, *also, first='', live=(), kept=(), verdict='': dict(
        sick=sick, covered=bool(best), first=first, alarm=bool(first), best=sick and first == best,
        right=sick and bool(first) and first in (best, *also), unsure=verdict == 'cannot tell', live=list(live),
        kept=list(kept), asked=True)
    d = pd.DataFrame([row(False, ''), row(False, '', first='starved', live=['starved', 'unstable'], kept=[True, False]),
                      row(True, 'starved', first='starved'), row(True, 'starved', 'bad_init', first='bad_init'),
                      row(True, 'starved'), row(True, '', verdict='cannot tell'), row(True, '', first='unstable')])
    said = [v.split(' ')[0] for _, v in judge.figures(d)]
    assert said == ['1/2', '1/2', '1/2', '1/2', '1/3', '2/3', '1/3', '1/2', '1/1']
