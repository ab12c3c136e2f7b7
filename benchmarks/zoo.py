"""A zoo of training runs: twins that differ by one line, one sick and one healthy, and healthy runs that fool naive rules.

    python benchmarks/zoo.py --out /tmp/zoo [--seeds 5] [--half tuned|unseen|both] [--only mlp_*]    # record
    python benchmarks/zoo.py --out /tmp/zoo --report                                                # judge what was recorded

`tuned`: MLP, plain CNN, tabular; the rules' thresholds were set on these. `unseen`: ResNet, RNN, LSTM, transformer; reported,
not looked at while thresholds were set. A pair is named after what differs; `truth` are the rules that name it rightly.
"""
from __future__ import annotations

import argparse
import math
import os
import sys
import time
import warnings
from fnmatch import fnmatchcase
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault('OMP_NUM_THREADS', '1')
warnings.filterwarnings('ignore')

import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback  # noqa: F401  (gives Learner its no_bar)
from fastai.callback.schedule import ParamScheduler, SchedCos, combine_scheds
from fastai.callback.training import GradientClip
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import SGD, Adam
from fastai.torch_core import set_seed
from torch import nn
from torch.utils.data import TensorDataset

from fastgradstats import LayerStatsCallback
from fastgradstats.data import TensorDL, digits
from fastgradstats.planning import DEFAULTS

ITERS  = 120
PROBES = dict(weight=['norm', 'std'], activation=[*DEFAULTS['activation'], 'frac_saturated'])


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
    hidden: object = None         # parameters that the optimizer does not get

class Case(NamedTuple):
    name:   str
    make:   object                # f(sick) -> Kit
    truth:  tuple                 # rules that name the fault rightly; () for a healthy run
    half:   str
    arch:   str
    layers: str                   # glob of the guilty layers, '*' where all are

CASES = {}
TUNED, UNSEEN = ('mlp', 'cnn', 'tab'), ('resnet', 'rnn', 'lstm', 'tf')

def case(*truth, layers='*'):
    def add(f):
        arch = f.__name__.split('_')[0]
        CASES[f.__name__] = Case(f.__name__, f, truth, 'tuned' if arch in TUNED else 'unseen', arch, layers)
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
def rows(data):      return tuple((x.squeeze(1), y) for x, y in data)                     # an image as a sequence of its rows

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


# --- nets ------------------------------------------------------------------------------------------------------------
class InHalf(nn.Module):
    "A model in half precision, its answer in float32."
    def __init__(self, model): super().__init__(); self.model = model.half()
    def forward(self, x): return self.model(x.half() if x.is_floating_point() else x).float()

class Tiny(nn.Module):
    "A loss that is a mean over very many: small, with a learning rate to match."
    def forward(self, p, y): return F.cross_entropy(p, y) * 2. ** -18

def kaiming(model, gain=1.):
    for m in model.modules():
        if isinstance(m, (nn.Linear, nn.Conv2d)):
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

def mlp(depth=4, act=nn.ReLU, n_in=196, n_out=10, width=64, drop=0.):
    layers = []
    for i in range(depth - 1):
        layers += [nn.Linear(n_in if i == 0 else width, width), act()]
        if drop:  layers.append(nn.Dropout(drop))
    return nn.Sequential(*layers, nn.Linear(width, n_out))

def cnn(widths=(8, 16, 16), act=nn.ReLU, norm=False, stride=2):
    layers, c = [], 1
    for i, w in enumerate(widths):
        layers += [nn.Conv2d(c, w, 3, stride=stride if i < 3 else 1, padding=1), *([nn.BatchNorm2d(w)] if norm else []), act()]
        c = w
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 10))

class Block(nn.Module):
    def __init__(self, c, norm=True):
        super().__init__()
        n = (lambda: nn.BatchNorm2d(c)) if norm else nn.Identity
        self.conv1, self.norm1, self.act1 = nn.Conv2d(c, c, 3, padding=1), n(), nn.ReLU()
        self.conv2, self.norm2, self.act2 = nn.Conv2d(c, c, 3, padding=1), n(), nn.ReLU()
    def forward(self, x): return self.act2(x + self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x))))))

def resnet(blocks=4, c=12, norm=True):
    return nn.Sequential(nn.Conv2d(1, c, 3, stride=2, padding=1), nn.BatchNorm2d(c) if norm else nn.Identity(), nn.ReLU(),
                         *[Block(c, norm) for _ in range(blocks)], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 10))

class Recurrent(nn.Module):
    "Reads an image row by row, answers after the last; `repeat` reads it several times, so that time is longer."
    def __init__(self, cell='RNN', hidden=32, repeat=1, last='last', **kwargs):
        super().__init__()
        self.rnn, self.head = getattr(nn, cell)(14, hidden, batch_first=True, **kwargs), nn.Linear(hidden, 10)
        self.repeat = repeat
    def forward(self, x): return self.head(self.rnn(x.repeat(1, self.repeat, 1))[0][:, -1])

class SigmoidRNN(nn.Module):
    def __init__(self, hidden=32, act=nn.Sigmoid):
        super().__init__()
        self.inp, self.rec, self.act, self.head = nn.Linear(14, hidden), nn.Linear(hidden, hidden), act(), nn.Linear(hidden, 10)
    def forward(self, x):
        h = x.new_zeros(len(x), self.rec.in_features)
        for t in range(x.shape[1]): h = self.act(self.inp(x[:, t]) + self.rec(h))
        return self.head(h)

class Layer(nn.Module):
    def __init__(self, d, heads=2):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(d), nn.MultiheadAttention(d, heads, batch_first=True)
        self.norm2, self.up, self.act, self.down = nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.ReLU(), nn.Linear(2 * d, d)
    def forward(self, x):
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        h = self.norm1(x)
        x = x + self.attn(h, h, h, attn_mask=mask, need_weights=False)[0]
        return x + self.down(self.act(self.up(self.norm2(x))))

class Transformer(nn.Module):
    def __init__(self, vocab=100, d=32, depth=2, n=16, softmax=False):
        super().__init__()
        self.tok, self.pos = nn.Embedding(vocab, d), nn.Parameter(.02 * torch.randn(n, d))
        self.blocks = nn.Sequential(*[Layer(d) for _ in range(depth)])
        self.norm, self.head, self.softmax = nn.LayerNorm(d), nn.Linear(d, vocab), softmax
        nn.init.normal_(self.tok.weight, std=.1)
    def forward(self, x):
        x = self.head(self.norm(self.blocks(self.tok(x) + self.pos)))
        return (x.softmax(-1) if self.softmax else x).transpose(1, 2)

class Lora(nn.Module):
    "A frozen linear layer beside a low-rank branch that starts at zero."
    def __init__(self, lin, r=4):
        super().__init__()
        self.lin, self.a, self.b = lin.requires_grad_(False), nn.Linear(lin.in_features, r, bias=False), nn.Linear(r, lin.out_features, bias=False)
        nn.init.zeros_(self.b.weight)
    def forward(self, x): return self.lin(x) + self.b(self.a(x))


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
        if self.learn.train_iter == self.at:     self.was = self.opt.hypers[-1]['lr']; self.opt.set_hyper('lr', self.was * self.times)
        if self.learn.train_iter == self.at + 1: self.opt.set_hyper('lr', self.was)

def warm_up(lr):  return ParamScheduler({'lr': combine_scheds([.4, .6], [SchedCos(lr / 100, lr), SchedCos(lr, lr)])})
def cosine(lr):   return ParamScheduler({'lr': SchedCos(lr, 1e-6)})
Smooth = partial(nn.CrossEntropyLoss, label_smoothing=.1)


# --- twins: sick and healthy differ by one line; tuned half ----------------------------------------------------------
@case('bad_init', 'starved', 'vanishing')
def mlp_small_init(sick):     return Kit(normal(mlp(6), .01) if sick else kaiming(mlp(6)), images(True))
@case('bad_init', 'exploding', 'step_too_large', 'non_finite')
def mlp_big_init(sick):       return Kit(kaiming(mlp(8), 3. if sick else 1.), images(True), lr=.05)
@case('vanishing', 'starved', 'bad_init')
def mlp_deep_sigmoid(sick):   return Kit(mlp(6, nn.Sigmoid) if sick else kaiming(mlp(6)), images(True))
@case('saturated', 'bad_init')
def mlp_tanh_saturated(sick): return Kit(xavier(mlp(5, nn.Tanh), 12. if sick else 1.), images(True))
@case('bad_init')
def mlp_zero_init(sick):      return Kit(normal(mlp(4), 0.) if sick else kaiming(mlp(4)), images(True))
@case('not_zeroed')
def mlp_no_zero_grad(sick):   return Kit(kaiming(mlp(4)), images(True), cbs=(KeepGrads(),) if sick else ())
@case('double_softmax')
def mlp_softmax_twice(sick):  return Kit(nn.Sequential(kaiming(mlp(4)), *([nn.Softmax(1)] if sick else [])), images(True))
@case('fp16_underflow')
def mlp_fp16_underflow(sick):
    m = kaiming(mlp(4))
    return Kit(InHalf(m) if sick else m, images(True), lr=.1 * 2 ** 18, loss=Tiny())
@case('step_too_large', 'dead_units')
def mlp_lr_spike(sick):       return Kit(kaiming(mlp(4)), images(True), cbs=(Spike(40, 300.),) if sick else ())
@case('dead_units')
def mlp_dead_layer(sick):
    m = kaiming(mlp(4))
    if sick: m[2].bias.data.fill_(-20.)
    return Kit(m, images(True))
@case('dead_units')
def cnn_bias_minus10(sick):
    m = kaiming(cnn())
    if sick: [nn.init.constant_(c.bias, -10.) for c in m if isinstance(c, nn.Conv2d)]
    return Kit(m, images(), lr=.2)
@case('step_too_large', 'non_finite', 'exploding')
def cnn_lr_100x(sick):        return Kit(kaiming(cnn()), images(), lr=20. if sick else .2)
@case('step_too_small')
def cnn_lr_1000th(sick):      return Kit(kaiming(cnn()), images(), lr=.0002 if sick else .2)
@case('input_scale')
def cnn_input_255(sick):      return Kit(kaiming(cnn()), scaled(images(), raw) if sick else images(), lr=.2)
@case('vanishing', 'starved', 'bad_init')
def cnn_deep_plain(sick):     return Kit(cnn((8,) * 14, norm=not sick), images(), lr=.1)
@case('starved', 'vanishing', 'bad_init')
def cnn_default_init(sick):   return Kit(cnn((8, 16, 32, 32)) if sick else kaiming(cnn((8, 16, 32, 32))), images(), lr=.2, iters=80)
@case('step_too_small', 'not_stepped')
def cnn_body_not_stepped(sick):
    m = kaiming(cnn())
    return Kit(m, images(), lr=.2, hidden=m[:6] if sick else None)
@case('input_scale')
def tab_unscaled(sick):       return Kit(kaiming(mlp(4, n_in=12, n_out=1)), scaled(table(), lambda x: 300 + 100 * x) if sick else table(), lr=.02, loss=nn.MSELoss())
@case('step_too_large', 'exploding', 'non_finite')
def tab_lr_100x(sick):        return Kit(kaiming(mlp(4, n_in=12, n_out=1)), table(), lr=2. if sick else .02, loss=nn.MSELoss())
@case('step_too_small')
def tab_lr_1000th(sick):      return Kit(kaiming(mlp(4, n_in=12, n_out=1)), table(), lr=2e-5 if sick else .02, loss=nn.MSELoss())

# --- twins, unseen half ----------------------------------------------------------------------------------------------
@case('step_too_large', 'exploding', 'non_finite', 'unstable')
def resnet_lr_100x(sick):     return Kit(resnet(), images(), lr=20. if sick else .2)
@case('step_too_small')
def resnet_lr_1000th(sick):   return Kit(resnet(), images(), lr=.0001 if sick else .1)
@case('not_zeroed')
def resnet_no_zero_grad(sick):return Kit(resnet(), images(), lr=.3, cbs=(KeepGrads(),) if sick else ())
@case('step_too_small', 'not_stepped')
def resnet_body_not_stepped(sick):
    m = resnet()
    return Kit(m, images(), lr=.1, hidden=m[:7] if sick else None)
@case('bad_init', 'exploding', 'non_finite', 'step_too_large')
def resnet_big_init(sick):    return Kit(kaiming(resnet(6, norm=False), 3. if sick else .7), images(), lr=.05)
@case('input_scale')
def resnet_input_255(sick):   return Kit(kaiming(resnet(norm=False), .8), scaled(images(), raw) if sick else images(), lr=.05)
@case('vanishing', 'starved')
def rnn_sigmoid(sick):        return Kit(SigmoidRNN(act=nn.Sigmoid if sick else nn.Tanh), rows(images()), lr=.2)
@case('bad_init', 'exploding', 'non_finite', 'step_too_large')
def rnn_explode(sick):
    m = Recurrent('RNN', nonlinearity='relu', repeat=3)
    nn.init.orthogonal_(m.rnn.weight_hh_l0, 2. if sick else .9)
    return Kit(m, rows(images()), lr=.1)
@case('saturated')
def rnn_tanh_saturated(sick):
    m = SigmoidRNN(act=nn.Tanh)
    if sick: nn.init.normal_(m.inp.weight, std=20.)
    return Kit(m, rows(images()), lr=.1)
@case('step_too_large', 'unstable', 'exploding')
def lstm_lr_1000x(sick):      return Kit(Recurrent('LSTM'), rows(images()), lr=500. if sick else .5)
@case('step_too_small')
def lstm_lr_1000th(sick):     return Kit(Recurrent('LSTM'), rows(images()), lr=1e-5 if sick else .01, opt=Adam)
@case('starved', 'bad_init', 'vanishing')
def lstm_small_init(sick):
    m = Recurrent('LSTM')
    if sick: normal(m, .001)
    return Kit(m, rows(images()), lr=.5)
@case('step_too_large', 'unstable', 'exploding')
def tf_lr_100x(sick):         return Kit(Transformer(), text(), lr=.5 if sick else .005, opt=Adam)
@case('double_softmax')
def tf_softmax_twice(sick):   return Kit(Transformer(softmax=sick), text(), lr=.005, opt=Adam)
@case('bad_init')
def tf_zero_init(sick):       return Kit(normal(Transformer(), 0.) if sick else Transformer(), text(), lr=.3)
@case('dead_units')
def tf_dead_ff(sick):
    m = Transformer()
    if sick: [nn.init.constant_(b.up.bias, -30.) for b in m.blocks]
    return Kit(m, text(), lr=.005, opt=Adam)
@case('fp16_underflow')
def tf_fp16_underflow(sick):
    m = Transformer()
    return Kit(InHalf(m) if sick else m, text(), lr=.15 * 2 ** 18, loss=Tiny())
@case('step_too_small')
def tf_lr_1000th(sick):       return Kit(Transformer(), text(), lr=5e-6 if sick else .005, opt=Adam)

# --- healthy runs that fool naive rules ------------------------------------------------------------------------------
@case()
def mlp_smoothed(sick):       return Kit(kaiming(mlp(4)), images(True), loss=Smooth(), iters=300, lr=.2)
@case()
def mlp_dropout(sick):        return Kit(kaiming(mlp(4, drop=.5)), images(True))
@case()
def mlp_tiny_batch(sick):     return Kit(kaiming(mlp(4)), images(True), bs=4, lr=.02, iters=300)
@case()
def mlp_clipped(sick):        return Kit(kaiming(mlp(4)), images(True), lr=.5, cbs=(GradientClip(.05),))
@case()
def mlp_adam_deep(sick):      return Kit(mlp(8), images(True), lr=.003, opt=Adam)
@case()
def mlp_noisy_labels(sick):
    (x, y), v = images(True)
    g = torch.Generator().manual_seed(3)
    return Kit(kaiming(mlp(4)), ((x, torch.where(torch.rand(len(y), generator=g) < .4, torch.randint(0, 10, y.shape, generator=g), y)), v))
@case()
def mlp_converged(sick):      return Kit(kaiming(mlp(4)), images(True), lr=.3, iters=400)
@case()
def cnn_plus_100(sick):       return Kit(kaiming(cnn()), images(), lr=.2, loss=Plus100())
@case()
def cnn_zero_head(sick):
    m = kaiming(cnn()); normal(m[-1], 0.)
    return Kit(m, images(), lr=.2)
@case()
def cnn_cosine(sick):         return Kit(kaiming(cnn()), images(), lr=.3, cbs=(cosine(.3),), iters=200)
@case()
def cnn_frozen_body(sick):
    m = kaiming(cnn()); m[:6].requires_grad_(False)
    return Kit(m, images(), lr=.3)
@case()
def tab_noise(sick):
    d = tuple((x, y + 3 * torch.randn(y.shape, generator=torch.Generator().manual_seed(4))) for x, y in table())
    return Kit(kaiming(mlp(3, n_in=12, n_out=1)), d, lr=.01, loss=nn.MSELoss(), iters=200)
@case()
def resnet_zero_gamma(sick):
    m = resnet()
    for b in m:
        if isinstance(b, Block): nn.init.zeros_(b.norm2.weight)
    return Kit(m, images(), lr=.2)
@case()
def resnet_converged(sick):   return Kit(resnet(), images(), lr=.005, opt=Adam, iters=300, cbs=(cosine(.005),))
@case()
def resnet_adamw(sick):       return Kit(resnet(), images(), lr=.003, opt=partial(Adam, decouple_wd=True), wd=.1, iters=200)
@case()
def rnn_clipped(sick):        return Kit(Recurrent('RNN'), rows(images()), lr=.5, cbs=(GradientClip(.2),))
@case()
def lstm_smoothed(sick):      return Kit(Recurrent('LSTM'), rows(images()), lr=.01, opt=Adam, loss=Smooth(), iters=300)
@case()
def tf_bigram(sick):          return Kit(Transformer(vocab=20), bigrams(), lr=.005, opt=Adam, iters=200)
@case()
def tf_warm_up(sick):         return Kit(Transformer(), text(), lr=.005, opt=Adam, cbs=(warm_up(.005),))
@case()
def tf_rare_embeddings(sick): return Kit(Transformer(vocab=2000), text(), lr=.005, opt=Adam)
@case()
def tf_lora(sick):
    m = Transformer()
    for b in m.blocks: b.up, b.down = Lora(b.up), Lora(b.down)
    return Kit(m, text(), lr=.005, opt=Adam)

class Plus100(nn.Module):
    def forward(self, p, y): return F.cross_entropy(p, y) + 100


# --- running ---------------------------------------------------------------------------------------------------------
def learner(kit, seed):
    "The Learner of a kit and the epochs to train it."
    (x, y), (xv, yv) = kit.data
    dls = DataLoaders(TensorDL(TensorDataset(x, y), kit.bs, seed, shuffle=True, drop_last=True), TensorDL(TensorDataset(xv, yv), 400), device='cpu')
    out = set() if kit.hidden is None else {id(p) for p in kit.hidden.parameters()}
    split = {} if not out else dict(splitter=lambda m: [[p for p in m.parameters() if id(p) not in out]])
    learn = Learner(dls, kit.model, loss_func=kit.loss or nn.CrossEntropyLoss(), opt_func=kit.opt, lr=kit.lr, wd=kit.wd, moms=(.9,) * 3 if
                    'Adam' in str(kit.opt) else (0.,) * 3, cbs=list(kit.cbs), metrics=[] if y.is_floating_point() else [accuracy], **split)
    return learn, math.ceil(kit.iters / len(dls.train))

def accuracy(pred, y): return (pred.argmax(1) == y).float().mean()

def kit(name, sick, seed):
    set_seed(seed)
    return CASES[name].make(sick)

class Stop(Callback):
    order = 90
    def __init__(self, n): self.n = n
    def after_batch(self):
        if self.training and self.learn.train_iter >= self.n: raise CancelFitException

def record(name, sick, seed, **settings):
    "Train a case and return its Record."
    k = kit(name, sick, seed)
    learn, epochs = learner(k, seed)
    with learn.no_bar(), learn.no_logging():
        learn.fit(epochs, cbs=[LayerStatsCallback(verbose=False, **{**PROBES, **settings}), *([Stop(k.iters)] if k.bs < 20 else [])])
    return learn.layer_stats

def runs(only='*', half='both'):
    "(name, sick) of every run."
    for c in CASES.values():
        if not fnmatchcase(c.name, only) or half not in ('both', c.half): continue
        yield from ((c.name, s) for s in ((True, False) if c.truth else (False,)))

def path(out, name, sick, seed): return Path(out) / f"{name}-{'sick' if sick else 'healthy'}-{seed}.parquet"

def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--out', default='zoo-out')
    ap.add_argument('--seeds', type=int, default=5)
    ap.add_argument('--first', type=int, default=0)
    ap.add_argument('--only', default='*')
    ap.add_argument('--half', default='both', choices=['tuned', 'unseen', 'both'])
    ap.add_argument('--report', action='store_true')
    a = ap.parse_args()
    torch.set_num_threads(1)
    Path(a.out).mkdir(parents=True, exist_ok=True)
    if a.report:
        from zoo_report import report
        return report(a.out, a.seeds, a.half, a.only)
    for seed in range(a.first, a.first + a.seeds):
        for name, sick in runs(a.only, a.half):
            to = path(a.out, name, sick, seed)
            if to.exists(): continue
            t = time.time()
            rec = record(name, sick, seed)
            rec.save(to)
            it = rec.iters
            print(f"{to.name:<48} {time.time() - t:5.1f} s  loss {it.loss.iloc[0]:9.4g} -> {it.loss.iloc[-10:].median():9.4g}  constant {it.loss_constant.iloc[-10:].median():.4g}", flush=True)

from fastai.callback.core import CancelFitException

if __name__ == '__main__': sys.exit(main())
