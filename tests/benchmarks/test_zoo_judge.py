"How the zoo counts: one truth a fault, the best name, records of the defaults alone, figures that agree with tables."
import ast
import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import zoo
from torch import nn
from zoo import advice, faults, judge, report, training

from fastgradstats import Record
from fastgradstats.record.parquet import ITER_COLS
from fastgradstats.rules import ALL

ZOO_MD   = Path(zoo.__file__).parents[1] / 'zoo.md'
DECLARED = {'lstm_small_init', 'tagger_small_init'}          # cases that declare a best name of their own
PAIRS    = [c for c in zoo.CASES.values() if c.fault]

def test_the_best_name_is_the_faults_own_and_a_rules():
    assert {c.name for c in PAIRS if c.best != c.fault.truth} == DECLARED
    assert {n for c in PAIRS for n in c.truth} <= {r.__name__ for r in ALL}
    assert all(len(set(c.truth)) == len(c.truth) for c in PAIRS)

def test_an_injector_has_one_truth():
    calls = [n for n in ast.walk(ast.parse(inspect.getsource(faults))) if isinstance(n, ast.Call)]
    made  = [n for n in calls if getattr(n.func, 'id', '') == 'Fault']
    assert len(made) > 20 and all(isinstance(n.args[0], ast.Constant) for n in made)

def test_only_the_best_name_counts_as_best():
    named = 'bad_init', 'starved', 'dead_units', ''
    d = pd.DataFrame([dict(case='mlp_small_init', sick=True, first=f) for f in named])
    c = zoo.CASES['mlp_small_init']
    d['best'], d['right'], d['alarm'] = d['first'] == c.best, d['first'].isin(c.truth), d['first'] != ''
    for t in report.OTHERS: d[t] = False
    assert report.beside(d)[2].startswith('| fastgradstats | 1/4 (25 %) | 2/4 (50 %) | 3/4 (75 %) | 0/0 |')

def test_a_run_is_recorded_with_the_defaults(monkeypatch):
    monkeypatch.setattr(training, 'LayerStatsCallback', lambda **settings: settings)
    monkeypatch.setattr(training, 'train', lambda k, seed, cb: SimpleNamespace(layer_stats=cb))
    assert zoo.record('mlp_zero_init', True, 0) == dict(verbose=False)

def test_an_earlier_record_is_judged_by_the_defaults():
    iters  = pd.DataFrame({**dict.fromkeys(ITER_COLS, 1), 'iter': range(3)})
    values = {k: np.ones((3, 1)) for k in [('activation', 'std'), *judge.EXTRA]}
    layers = {p: pd.DataFrame(dict(layer=['0'])) for p, _ in values}
    rec    = judge.by_default(Record(iters, values, layers))
    assert [*rec.keys()] == [('activation', 'std')] and len(rec) == 3

def test_a_softmax_within_a_net_is_taken_out():
    learn = SimpleNamespace(model=zoo.kit('tf_softmax_twice', True, 0).model)
    assert learn.model.softmax
    advice.follow(learn, {'remove': 'softmax'})
    assert not learn.model.softmax
    learn = SimpleNamespace(model=zoo.kit('mlp_softmax_twice', True, 0).model)
    advice.follow(learn, {'remove': 'softmax'})
    assert not any(isinstance(m, nn.Softmax) for m in learn.model.modules())

def diagonal(half):
    "Runs whose fault's own name came first, and all sick runs, read from a half's table of faults in zoo.md."
    text = re.search(f'<!-- {half} -->(.*?)<!-- end of {half} -->', ZOO_MD.read_text(), re.S)[1]
    rows = [[c.strip() for c in l.strip('|').split('|')] for l in text.splitlines() if l.startswith('|')]
    at   = next(i for i, r in enumerate(rows) if r[0] == 'fault')
    good = of = 0
    for r in rows[at + 2:]:
        if len(r) != len(rows[at]): break
        n = {h: int(re.search(r'\d+', v)[0]) for h, v in zip(rows[at][1:], r[1:]) if re.search(r'\d', v)}
        if r[0] != 'healthy': good, of = good + n.get(r[0], 0), of + sum(n.values())
    return good, of

@pytest.mark.parametrize('half', zoo.HALVES)
def test_the_published_best_names_are_those_of_the_table(half):
    good, of = diagonal(half)
    told = f"| fastgradstats | {good}/{of} ({100 * good / of:.0f} %) |"
    assert told in ZOO_MD.read_text()
