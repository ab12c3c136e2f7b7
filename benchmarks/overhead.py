"""What the callbacks cost: the time of a training batch with them over the time of the bare batch.

    python benchmarks/overhead.py [--pairs 60] [--threads 1] [--net lesson10|resnet18|both] [--parts]

All variants train in one process, batch by batch in turn, each on its own copy of the model, the order rotating; the
table gives the median of the pairwise ratios with its quartiles. `bare again` is a second bare variant: its distance
from 1 is the noise of the machine. fastai's ActivationStats(with_hist=True) stands beside ours.
"""
import argparse
import time
import warnings
from copy import deepcopy
from functools import partial

import numpy as np
import torch
from fastai.callback.hook import ActivationStats
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import SGD
from torch import nn

import fastgradstats as fgs
from fastgradstats.lesson10.nets import default_relu


def lesson10():
    x = torch.randn(512, 1, 28, 28)
    return default_relu(), (x, torch.randint(0, 10, (512,))), 'Lesson 10 net, batch 512'

def resnet18():
    from torchvision.models import resnet18
    batch = torch.randn(32, 3, 64, 64), torch.randint(0, 10, (32,))
    return resnet18(num_classes=10), batch, 'resnet18, 64 px, batch 32'

VARIANTS = {
    'bare again':                       lambda: [],
    'LayerStatsCallback()':             lambda: [fgs.LayerStatsCallback(verbose=False)],
    'ActivationStats(with_hist=True)':  lambda: [ActivationStats(with_hist=True)],
}
PARTS = {
    'GradStatsCallback()':              lambda: [fgs.GradStatsCallback()],
    'ActivationHistCallback()':         lambda: [fgs.ActivationHistCallback()],
    'DeadUnitCallback()':               lambda: [fgs.DeadUnitCallback()],
    'LayerStatsCallback(every=10)':     lambda: [fgs.LayerStatsCallback(every=10, verbose=False)],
}

def started(model, batch, cbs):
    "A Learner in the middle of a fit, ready for `one_batch`."
    dl    = [batch] * 10_000
    learn = Learner(DataLoaders(dl, dl), deepcopy(model), loss_func=nn.CrossEntropyLoss(),
                    opt_func=partial(SGD, mom=0.9), lr=1e-3, cbs=cbs)
    learn.create_opt()
    learn.opt.set_hypers(lr=1e-3)
    learn.n_epoch, learn.epoch, learn.dl, learn.n_iter = 1, 0, dl, len(dl)
    for name in ('progress', 'recorder'):
        if hasattr(learn, name): learn.remove_cb(getattr(learn, name))
    learn(['before_fit', 'before_epoch', 'before_train'])
    return learn

def measure(make, variants, pairs, warmup=5):
    "Seconds of each batch.  # {variant: (pair,)}"
    torch.manual_seed(0)
    model, batch, title = make()
    learners = {name: started(model, batch, cbs()) for name, cbs in {'bare': lambda: [], **variants}.items()}
    times    = {name: [] for name in learners}
    names    = list(learners)
    for i in range(warmup + pairs):
        for name in names[i % len(names):] + names[:i % len(names)]:
            start = time.perf_counter()
            learners[name].one_batch(i, batch)
            if i >= warmup: times[name].append(time.perf_counter() - start)
    for learn in learners.values():
        if hasattr(learn, 'layer_stats_callback'): learn.layer_stats_callback._leave()
    return {k: np.array(v) for k, v in times.items()}, title

def table(times, title):
    lines = [f"{title}: bare batch {1000 * np.median(times['bare']):.1f} ms (median of {len(times['bare'])})",
             f"  {'variant':<34}{'ratio':>8}{'quartiles':>18}"]
    for name, t in times.items():
        if name == 'bare': continue
        q = np.percentile(t / times['bare'], [25, 50, 75])
        lines.append(f"  {name:<34}{q[1]:>8.3f}{f'{q[0]:.3f} - {q[2]:.3f}':>18}")
    return '\n'.join(lines)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--pairs',   type=int, default=60)
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('--net',     choices=['lesson10', 'resnet18', 'both'], default='both')
    p.add_argument('--parts',   action='store_true', help='the parts of LayerStatsCallback too')
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    warnings.simplefilter('ignore')
    print(f"torch {torch.__version__}, {a.threads} thread{'s' * (a.threads > 1)}, {a.pairs} pairs, "
          f"every iteration measured")
    for make in (lesson10, resnet18):
        if a.net in (make.__name__, 'both'):
            print(table(*measure(make, {**VARIANTS, **(PARTS if a.parts else {})}, a.pairs)))
