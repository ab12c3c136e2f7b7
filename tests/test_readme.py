"What the README says of settings and columns, tried."
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner
from fastai.vision.learner import vision_learner
from torch import nn
from torchvision.models import resnet18

from fastgradstats import (ActivationHistCallback, DeadUnitCallback, DiagnosisCallback, GradStatsCallback,
                           LayerStatsCallback)
from fastgradstats.diagnosis.evidence import run
from fastgradstats.record.parquet import ITER_COLS
from reference import learner, loaders

README = (Path(__file__).parent.parent / 'README.md').read_text(encoding='utf-8')

def rows(heading):
    "The rows of the table under a heading: the names in code of the first cell, the last cell."
    part = README.split(f'# {heading}\n')[1].split('\n#')[0]
    for cells in (l.strip('| ').split(' | ') for l in part.splitlines() if l.startswith('| `')):
        yield re.findall(r'`(\w+)`', cells[0]), cells[-1]


def images():
    dls   = loaders(8, (3, 32, 32), bs=4, n_valid=4)
    dls.c = 3
    return dls

LOSS = dict(loss_func=nn.CrossEntropyLoss())
NETS = {'resnet18()':                     lambda: Learner(images(), resnet18(num_classes=3), **LOSS),
        'vision_learner(dls, resnet18)':  lambda: vision_learner(images(), resnet18, n_out=3, pretrained=False, normalize=False, **LOSS)}

def test_the_globs_of_the_readme_match_the_same_layers():
    said  = next(text for names, text in rows('Settings') if names == ['modules'])
    globs = dict(zip(NETS, re.findall(r"`'([^']+)'`", said)))
    assert list(globs.values()) == ['layer4.*', '0.7.*'] and all(f'`{net}`' in said for net in NETS)
    got = {}
    for net, make in NETS.items():
        learn = make()
        learn.remove_cb(ProgressCallback)
        for glob in globs.values():
            try:
                with learn.no_logging(): learn.fit(1, cbs=LayerStatsCallback(modules=glob, verbose=False))
            except ValueError as e: assert f"modules={glob!r} matches no layer" in str(e) and list(learn.model._modules)[0] in str(e)
            else: got[net] = glob, learn.layer_stats.layers['activation'].layer.tolist()
    assert {net: glob for net, (glob, _) in got.items()} == globs
    ends = [[l.split('.', 1)[1] for l in layers] for layers in (got['resnet18()'][1], [l[2:] for l in got['vision_learner(dls, resnet18)'][1]])]
    assert ends[0] == ends[1] and len(ends[0]) == 4

def test_columns_of_iters_are_all_there_are():
    assert [n for names, _ in rows('Columns of rec.iters') for n in names] == [
        c for c in ITER_COLS for c in ([c, 'gain'] if c == 'loss_constant' else [c])]

def test_the_two_gains_are_what_the_readme_says():
    learn = learner('mlp', LayerStatsCallback(verbose=False), n=80, lr=.5)
    learn.fit(4)
    it, r = learn.layer_stats.iters, run(learn.layer_stats)
    np.testing.assert_allclose(it.gain, it.loss_constant - it.loss)
    best = min(it.loss_constant.rolling(9, min_periods=3).median().dropna())
    assert r.best_constant == pytest.approx(best)
    assert abs(r.learned[-1] - it.gain.iloc[-20:].median()) > .1                     # not one number by two names

def test_the_learning_rate_of_every_parameter_is_recorded_with_update():
    from fastai.torch_core import params
    split = lambda m: [params(m[0]), params(m[1:])]
    learn = learner('mlp', GradStatsCallback(), splitter=split)
    learn.fit(1, lr=slice(.01, .1))
    assert "`rec['update', 'lr']`" in dict((n[0], t) for n, t in rows('Probes'))['update']
    np.testing.assert_allclose(learn.layer_stats['update', 'lr'][0], [.01] * 2 + [.1] * 4, rtol=1e-6)
    np.testing.assert_allclose(learn.layer_stats.iters.lr, .1)

@pytest.mark.parametrize('cb', [LayerStatsCallback, GradStatsCallback, ActivationHistCallback, DeadUnitCallback, DiagnosisCallback])
def test_only_layer_stats_callback_prints(cb, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learner('mlp', cb(verbose=True)).fit(1)
    assert (len(capsys.readouterr().out.splitlines()) == 4) == (cb is LayerStatsCallback)
