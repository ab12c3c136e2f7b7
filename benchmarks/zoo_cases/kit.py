"What the zoo's cases are made of: kits, data, initialisations, what a loop can get wrong."
from __future__ import annotations

import os
import warnings
from functools import cache, partial
from typing import NamedTuple

os.environ.setdefault('OMP_NUM_THREADS', '1')
warnings.filterwarnings('ignore')

import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.schedule import ParamScheduler, SchedCos, combine_scheds
from fastai.optimizer import SGD
from torch import nn

from fastgradstats.lesson10.data import digits

ITERS  = 120
TUNED  = ('mlp', 'cnn', 'tab', 'resnet', 'rnn', 'lstm', 'tf', 'gru', 'vit', 'mixer', 'tcn', 'auto', 'mobile', 'vgg',
          'emb', 'dense', 'unet', 'next', 'se', 'text', 'tagger', 'seq', 'glu', 'collab', 'fastab', 'high', 'graph',
          'sets', 'vae', 'effnet', 'shuffle', 'bilinear', 'nfnet', 'pooler', 'concat', 'spectro', 'ssm', 'retnet',
          'attend', 'ode', 'hyper', 'kan', 'dueling', 'ordinal', 'mdn', 'hashed')
UNSEEN = ('incep', 'fire', 'wrn', 'xres', 'perc', 'maxout', 'siam', 'two', 'coord', 'dcn', 'moe', 'awd', 'wave', 'film',
          'point', 'series')


class Kit(NamedTuple):
    "What a run is made of."
    model: object
    data:  tuple                  # (x, y), (x valid, y valid)
    lr:    float = .1
    opt:   object = SGD
    loss:  object = None          # cross-entropy
    cbs:   tuple = ()
    bs:    int   = 100
    iters: int   = ITERS
    wd:    float = 0.
    hidden: object = None         # a module whose parameters the optimizer does not get

class Case(NamedTuple):
    name:   str
    make:   object                # f(sick) -> Kit
    truth:  tuple                 # rules that name the fault rightly, the best name first; () for a healthy run
    half:   str
    arch:   str
    guilty: str                   # the one module in which the fault sits, '' where it is in more
    site:   str                   # the activation right behind it

CASES = {}

def case(*truth, guilty='', site=''):
    def add(f):
        arch = f.__name__.split('_')[0]
        assert arch in TUNED + UNSEEN, arch
        CASES[f.__name__] = Case(f.__name__, f, truth, 'tuned' if arch in TUNED else 'unseen', arch, guilty, site)
        return f
    return add


# --- data ------------------------------------------------------------------------------------------------------------
@cache
def images(flat=False):
    "2,000 digits of 14 x 14 to train, 400 to validate."
    d = digits()
    g = torch.Generator().manual_seed(0)
    k, v = torch.randperm(len(d.x_train), generator=g)[:2000], torch.randperm(1000, generator=g)[:400]
    def put(x, y):
        x = F.avg_pool2d(x, 2)
        return (x.flatten(1) if flat else x), y
    return put(d.x_train[k], d.y_train[k]), put(d.x_valid[v], d.y_valid[v])

def scaled(data, f): return tuple((f(x), y) for x, y in data)
def raw(x):          return (x - x.min()) / (x.max() - x.min()) * 255
def rows(data):      return tuple((x.squeeze(1), y) for x, y in data)      # an image as a sequence of its rows

@cache
def table():
    "2,000 rows of 12 features, a smooth nonlinear target."
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2400, 12, generator=g)
    y = (torch.sin(2 * x[:, 0]) + x[:, 1] * x[:, 2] + x[:, 3:6].abs().sum(1) - 2.4)[:, None]
    return (x[:2000], y[:2000]), (x[2000:], y[2000:])

@cache
def text(n=16):
    "Characters of Python's own documentation topics, as sequences and their successors."
    from pydoc_data.topics import topics
    s     = ''.join(topics[k] for k in sorted(topics))[:60000]
    chars = sorted(set(s))
    t     = torch.tensor([chars.index(c) for c in s])
    x     = t[:-1].unfold(0, n, n)[:2400]
    y     = t[1:].unfold(0, n, n)[:2400]
    return (x[:2000], y[:2000]), (x[2000:], y[2000:])

@cache
def bigrams(n=16, vocab=20):
    "A Markov chain: the best loss is its entropy, far from 0."
    g = torch.Generator().manual_seed(2)
    p = torch.softmax(1.5 * torch.randn(vocab, vocab, generator=g), 1)
    s = [0]
    draws = torch.rand(2400 * n + 1, generator=g)
    c = p.cumsum(1)
    for u in draws: s.append(min(int(torch.searchsorted(c[s[-1]], u)), vocab - 1))
    t = torch.tensor(s)
    x, y = t[:-1].unfold(0, n, n)[:2400], t[1:].unfold(0, n, n)[:2400]
    return (x[:2000], y[:2000]), (x[2000:], y[2000:])


@cache
def waves(n=48):
    "2,000 noisy waves of two channels: five classes are five frequencies, the phase is anyone's."
    g = torch.Generator().manual_seed(5)
    y = torch.randint(0, 5, (2400,), generator=g)
    t = torch.arange(n) / n
    p = torch.rand(2400, 2, 1, generator=g)
    x = torch.sin(2 * torch.pi * ((2 + y)[:, None, None] * t + p)) + .4 * torch.randn(2400, 2, n, generator=g)
    return (x[:2000], y[:2000]), (x[2000:], y[2000:])

@cache
def categories(card=40, noise=0.):
    "2,000 rows of one category and six numbers: each category has its own answer among four, the numbers shift it."
    g = torch.Generator().manual_seed(6)
    k = torch.randint(0, card, (2400,), generator=g)
    x = torch.randn(2400, 6, generator=g)
    w = torch.randn(card, 4, generator=g) * 2, torch.randn(6, 4, generator=g) * .7
    y = (w[0][k] + x @ w[1]).argmax(1)
    y = torch.where(torch.rand(2400, generator=g) < noise, torch.randint(0, 4, (2400,), generator=g), y)
    x = torch.cat([k[:, None].float(), x], 1)
    return (x[:2000], y[:2000]), (x[2000:], y[2000:])

def itself(data, noise=0.):
    "The input is the target, with noise."
    g = torch.Generator().manual_seed(7)
    return tuple((x, x + noise * torch.randn(x.shape, generator=g)) for x, _ in data)


# --- wrappers and initialisations ------------------------------------------------------------------------------------
class InHalf(nn.Module):
    "A model in half precision, its answer in float32."
    def __init__(self, model): super().__init__(); self.model = model.half()
    def forward(self, x): return self.model(x.half() if x.is_floating_point() else x).float()

class Tiny(nn.Module):
    "A loss that is a mean over very many: small, with a learning rate to match."
    def forward(self, p, y): return F.cross_entropy(p, y) * 2. ** -18

def kaiming(model, gain=1.):
    for m in model.modules():
        if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            nn.init.kaiming_normal_(m.weight, nonlinearity='relu'); m.weight.data.mul_(gain)
            if m.bias is not None: nn.init.zeros_(m.bias)
    return model

def normal(model, std):
    for p in model.parameters():
        if p.dim() > 1: nn.init.normal_(p, std=std) if std else nn.init.zeros_(p)
    return model

def xavier(model, gain=1.):
    for p in model.parameters():
        if p.dim() > 1: nn.init.xavier_normal_(p, gain)
    return model


# --- what a loop can get wrong ---------------------------------------------------------------------------------------
class KeepGrads(Callback):
    "The forgotten zero_grad."
    def before_fit(self): self.learn.opt.zero_grad = lambda: None

class Spike(Callback):
    "One step with a learning rate `times` as large."
    order = 70
    def __init__(self, at, times): self.at, self.times = at, times
    def before_batch(self):
        if not self.training: return
        if self.learn.train_iter == self.at:
            self.was = self.opt.hypers[-1]['lr']
            self.opt.set_hyper('lr', self.was * self.times)
        if self.learn.train_iter == self.at + 1: self.opt.set_hyper('lr', self.was)

def warm_up(lr):  return ParamScheduler({'lr': combine_scheds([.4, .6], [SchedCos(lr / 100, lr), SchedCos(lr, lr)])})
def cosine(lr):   return ParamScheduler({'lr': SchedCos(lr, 1e-6)})
Smooth = partial(nn.CrossEntropyLoss, label_smoothing=.1)

class Plus100(nn.Module):
    def forward(self, p, y): return F.cross_entropy(p, y) + 100
