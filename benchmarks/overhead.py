"""What the callbacks cost: the time of a training batch with them over the time of the bare batch.

    python benchmarks/overhead.py [--pairs 60] [--threads 1] [--net lesson10 resnet18 transformer lstm mlp] [--parts]

All variants train in one process, batch by batch in turn, each on its own copy of the model, the order rotating; the
table gives the median of the pairwise ratios with its quartiles, and the median of the milliseconds that a variant
takes more. `bare again` is a second bare variant: its distance from 1 is the noise of the machine. fastai's
ActivationStats(with_hist=True) stands beside ours.
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

class Words(nn.Module):
    "A language model: `body` of embedded words, then a score for each word that may come next."
    def __init__(self, words, width, body):
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(words, width), body, nn.Linear(width, words)
    def forward(self, x):
        h = self.body(self.embed(x))
        return self.head(h[0] if isinstance(h, tuple) else h).transpose(1, 2)          # (example, word, place)

def text(words, *shape): return torch.randint(0, words, shape), torch.randint(0, words, shape)

def transformer():
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0., batch_first=True)
    return (Words(2000, 256, nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)), text(2000, 8, 128),
            'transformer, 6 layers of 256, 2,000 words, batch 8 x 128')

def lstm():
    return (Words(2000, 200, nn.LSTM(200, 200, 2, batch_first=True)), text(2000, 32, 35),
            'LSTM, 2 x 200, 2,000 words, batch 32 x 35')

def mlp():
    model = nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    return model, (torch.randn(64, 30), torch.randint(0, 2, (64,))), 'MLP 30-64-64-2, batch 64'

NETS = {f.__name__: f for f in (lesson10, resnet18, transformer, lstm, mlp)}

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
             f"  {'variant':<34}{'ratio':>8}{'quartiles':>18}{'ms more':>10}"]
    for name, t in times.items():
        if name == 'bare': continue
        q, more = np.percentile(t / times['bare'], [25, 50, 75]), 1000 * np.median(t - times['bare'])
        lines.append(f"  {name:<34}{q[1]:>8.3f}{f'{q[0]:.3f} - {q[2]:.3f}':>18}{more:>10.2f}")
    return '\n'.join(lines)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--pairs',   type=int, default=60)
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('--net',     choices=list(NETS), nargs='+', default=list(NETS))
    p.add_argument('--parts',   action='store_true', help='the parts of LayerStatsCallback too')
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    warnings.simplefilter('ignore')
    print(f"torch {torch.__version__}, {a.threads} thread{'s' * (a.threads > 1)}, {a.pairs} pairs, "
          f"every iteration measured")
    for net in a.net: print(table(*measure(NETS[net], {**VARIANTS, **(PARTS if a.parts else {})}, a.pairs)))
