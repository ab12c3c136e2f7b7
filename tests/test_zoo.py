"Rules on real training runs: a quick part of the zoo by default, the tuned half whole under -m slow."
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / 'benchmarks'))
import zoo

from fastgradstats import diagnose

QUICK = ['mlp_deep_sigmoid', 'mlp_zero_init', 'mlp_softmax_twice', 'mlp_no_zero_grad', 'tab_lr_100x', 'tab_unscaled', 'mlp_fp16_underflow']
FOOLERS = ['mlp_clipped', 'cnn_plus_100']

def check(name, sick, seed=0):
    rep = diagnose(zoo.record(name, sick, seed))
    bad = [f for f in rep.findings if f.severity != 'info']
    if sick: assert bad and bad[0].rule in zoo.CASES[name].truth, rep
    else:    assert not bad, rep

@pytest.mark.parametrize('name', QUICK)
def test_the_fault_is_named_first(name): check(name, True)

@pytest.mark.parametrize('name', [QUICK[0], *FOOLERS])
def test_healthy_runs_raise_no_alarm(name): check(name, False)

def test_the_zoo_is_large_enough():
    pairs = [c for c in zoo.CASES.values() if c.truth]
    assert len(pairs) >= 20 and len(zoo.CASES) - len(pairs) >= 16 

@pytest.mark.slow
@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('name,sick', list(zoo.runs(half='tuned')))
def test_the_tuned_half(name, sick, seed): check(name, sick, seed)
