"The nets and data of the zoo's fourth part."
from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from fastai.layers import AdaptiveConcatPool2d, LinBnDrop
from torch import nn


# --- data ------------------------------------------------------------------------------------------------------------
def split(x, y): return (x[:2000], y[:2000]), (x[2000:], y[2000:])

@cache
def tasks(n=12, noise=.1):
    "A task's number beside six features: each task has a plane of its own, the answer is how far above it one is."
    g = torch.Generator().manual_seed(20)
    k = torch.randint(0, n, (2400,), generator=g)
    x, w = torch.randn(2400, 6, generator=g), torch.randn(n, 6, generator=g)
    y = (x * w[k]).sum(1).relu() - 1 + noise * torch.randn(2400, generator=g)
    return split(torch.cat([k[:, None].float(), x], 1), y[:, None])

@cache
def first(n=60):
    "Two noisy channels over time; the class of four is said in the first three steps alone."
    g = torch.Generator().manual_seed(21)
    y = torch.randint(0, 4, (2400,), generator=g)
    x = .3 * torch.randn(2400, 2, n, generator=g)
    x[:, :, :3] += torch.tensor([[-1., -1.], [-1., 1.], [1., -1.], [1., 1.]])[y][..., None]
    return split(x, y)

@cache
def played(noise=.3, outliers=0.):
    "A state of eight numbers; the action played and what it returned."
    g = torch.Generator().manual_seed(22)
    x, a = torch.randn(2400, 8, generator=g), torch.randint(0, 4, (2400,), generator=g)
    v, w = torch.randn(8, generator=g) / 2, torch.randn(4, 8, generator=g) / 2
    q = (x @ v).abs() + ((x @ w.T).tanh())[torch.arange(2400), a] + noise * torch.randn(2400, generator=g)
    q = torch.where(torch.rand(2400, generator=g) < outliers, 30 * torch.randn(2400, generator=g), q)
    return split(x, torch.stack([a.float(), q], 1))

@cache
def levels(noise=.2, rare=False):
    "Ten features and which of four thresholds the answer is above."
    g = torch.Generator().manual_seed(23)
    x = torch.randn(2400, 10, generator=g)
    s = x[:, 0] + x[:, 1].abs() + x[:, 2] * x[:, 3] + .5 * x[:, 4:7].sum(1) + noise * torch.randn(2400, generator=g)
    cuts = s.quantile(torch.tensor([.5, .8, .95, .98] if rare else [.2, .4, .6, .8]))
    return split(x, (s[:, None] > cuts).float())

@cache
def audio(n=512):
    "Half a second of sound: a tone, one that rises, falls or trembles, or clicks, somewhere and under noise."
    g = torch.Generator().manual_seed(24)
    y = torch.randint(0, 5, (2400,), generator=g)
    t = torch.arange(n) / n
    f, p = 40 + 120 * torch.rand(2400, 1, generator=g), torch.rand(2400, 1, generator=g)
    turns = torch.stack([f * t, f * t + 35 * t ** 2, (f + 70) * t - 35 * t ** 2,
                         f * t + 2 * torch.sin(2 * torch.pi * (6 * t + p)), f * t], 1)[torch.arange(2400), y]
    x = torch.sin(2 * torch.pi * (turns + p))
    x = torch.where((y == 4)[:, None], x * (((t + p) * 8 % 1) < .15) * 2, x)
    return split(x + .5 * torch.randn(2400, n, generator=g), y)

@cache
def spectrograms(decibels=True):
    "The sounds' spectrograms, 33 frequencies at 17 times: in decibels, normalised, or the energy of 8-bit samples."
    (x, y), (xv, yv) = audio()
    power = lambda x: torch.stft(x, 64, 32, window=torch.hann_window(64), return_complex=True).abs()[:, None] ** 2
    a, b = power(50 * x), power(50 * xv)
    if decibels:
        a, b = (a + 25).log(), (b + 25).log()
        a, b = (a - a.mean()) / a.std(), (b - a.mean()) / a.std()
    return (a, y), (b, yv)

@cache
def arm(noise=.02):
    "The inverse of a curve that is not to be inverted: up to three answers to a question."
    g = torch.Generator().manual_seed(25)
    y = torch.rand(2400, 1, generator=g)
    x = y + .3 * torch.sin(2 * torch.pi * y) + noise * torch.randn(2400, 1, generator=g)
    return split((x - .5) * 3.5, y)

@cache
def clicks(users=150, items=80, flip=0.):
    "Whether a user clicked on an item."
    g = torch.Generator().manual_seed(26)
    u, i = torch.randint(0, users, (3400,), generator=g), torch.randint(0, items, (3400,), generator=g)
    a, b = torch.randn(users, 2, generator=g), torch.randn(items, 2, generator=g)
    s = 2 * (a[u] * b[i]).sum(1) + torch.randn(items, generator=g)[i]
    y = (s > .5) ^ (torch.rand(3400, generator=g) < flip)
    x, y = torch.stack([u * 7919 + 13, i * 104729 + 7], 1), y[:, None].float()
    return (x[:3000], y[:3000]), (x[3000:], y[3000:])


# --- nets for images -------------------------------------------------------------------------------------------------
def bn(c, norm=True): return nn.BatchNorm2d(c) if norm else nn.Identity()
def ends(c, n=10):    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, n)]

class MBConv(nn.Module):
    "Up, depthwise, weigh each channel, down."
    def __init__(self, a, b, stride=1, grow=3, norm=True):
        super().__init__()
        c = a * grow
        self.up, self.norm1, self.act1   = nn.Conv2d(a, c, 1), bn(c, norm), nn.SiLU()
        self.deep, self.norm2, self.act2 = nn.Conv2d(c, c, 3, stride, 1, groups=c), bn(c, norm), nn.SiLU()
        self.less, self.act3, self.more, self.gate = nn.Linear(c, c // 4), nn.SiLU(), nn.Linear(c // 4, c), nn.Sigmoid()
        self.down, self.norm3, self.short = nn.Conv2d(c, b, 1), bn(b, norm), a == b and stride == 1
    def forward(self, x):
        y = self.act2(self.norm2(self.deep(self.act1(self.norm1(self.up(x))))))
        y = y * self.gate(self.more(self.act3(self.less(y.mean((2, 3))))))[..., None, None]
        y = self.norm3(self.down(y))
        return x + y if self.short else y

def effnet(c=8, norm=True, drop=0.):
    "Like EfficientNet; 0 is the stem, 3 to 5 the blocks, 6 to 8 the top."
    stem = [nn.Conv2d(1, c, 3, 2, 1), bn(c, norm), nn.SiLU()]
    body = [MBConv(c, c, norm=norm), MBConv(c, 2 * c, 2, norm=norm), MBConv(2 * c, 2 * c, norm=norm)]
    top  = [nn.Conv2d(2 * c, 4 * c, 1), bn(4 * c, norm), nn.SiLU(), *([nn.Dropout(drop)] if drop else [])]
    return nn.Sequential(*stem, *body, *top, *ends(4 * c))

class Shuffle(nn.Module):
    "Grouped pointwise convolutions; in between the groups' channels are mixed."
    def __init__(self, c, groups=4):
        super().__init__()
        self.groups = groups
        self.conv1, self.norm1, self.act1 = nn.Conv2d(c, c, 1, groups=groups), bn(c), nn.ReLU()
        self.deep, self.norm2 = nn.Conv2d(c, c, 3, 1, 1, groups=c), bn(c)
        self.conv2, self.norm3, self.act2 = nn.Conv2d(c, c, 1, groups=groups), bn(c), nn.ReLU()
    def forward(self, x):
        y = self.act1(self.norm1(self.conv1(x)))
        y = y.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)
        return self.act2(x + self.norm3(self.conv2(self.norm2(self.deep(y)))))

def shuffle(c=16, n=3, groups=4):
    return nn.Sequential(nn.Conv2d(1, c, 3, 2, 1), bn(c), nn.ReLU(), *[Shuffle(c, groups) for _ in range(n)], *ends(c))

class Outer(nn.Module):
    "Which channels are on together: their products' mean over the image, its signed root, at length one."
    def forward(self, x):
        x = x.flatten(2)
        x = (x @ x.transpose(1, 2) / x.shape[2]).flatten(1)
        return F.normalize(x.sign() * ((x.abs() + 1e-4).sqrt() - .01), dim=1) * x.shape[1] ** .5

def bilinear(widths=(8, 16, 12), act=nn.ReLU, drop=0.):
    "Convolutions at 0, 2, 4, their activations behind them, at 6 the products."
    layers, c = [], 1
    for i, w in enumerate(widths):
        layers += [nn.Conv2d(c, w, 3, 2 if i < 2 else 1, 1), act()]
        c = w
    return nn.Sequential(*layers, Outer(), *([nn.Dropout(drop)] if drop else []), nn.Linear(c * c, 10))

class Standard(nn.Conv2d):
    "A convolution whose weights are standardised as they are used, with a gain of its own."
    def __init__(self, *args, gain=1.7, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.full((self.out_channels, 1, 1, 1), float(gain)))
    def forward(self, x):
        w   = self.weight
        std = (w.var((1, 2, 3), keepdim=True) * w[0].numel() + 1e-4).sqrt()
        return self._conv_forward(x, self.gain * (w - w.mean((1, 2, 3), keepdim=True)) / std, self.bias)

class NFBlock(nn.Module):
    def __init__(self, c, beta, alpha=.3, skip=1., gain=1.7, act=nn.ReLU):
        super().__init__()
        self.act1, self.conv1 = act(), Standard(c, c, 3, padding=1, gain=gain)
        self.act2, self.conv2 = act(), Standard(c, c, 3, padding=1, gain=gain)
        self.alpha, self.beta, self.skip = alpha, beta, nn.Parameter(torch.tensor(skip))
    def forward(self, x):
        return x + self.alpha * self.skip * self.conv2(self.act2(self.conv1(self.act1(x / self.beta))))

class NFNet(nn.Module):
    "A residual net without norms: weights are standardised, each branch is scaled."
    def __init__(self, c=12, depth=3, **kwargs):
        super().__init__()
        self.stem   = Standard(1, c, 3, 2, 1, gain=1.)
        self.blocks = nn.Sequential(*[NFBlock(c, (1 + .09 * i) ** .5, **kwargs) for i in range(depth)])
        self.last, self.act, self.head = Standard(c, 2 * c, 1, gain=1.7), nn.ReLU(), nn.Linear(2 * c, 10)
    def forward(self, x): return self.head(self.act(self.last(self.blocks(self.stem(x)))).mean((2, 3)))

class PoolBlock(nn.Module):
    "The neighbours' mean instead of attention."
    def __init__(self, d, scale):
        super().__init__()
        self.norm1, self.pool, self.norm2 = nn.GroupNorm(1, d), nn.AvgPool2d(3, 1, 1, False, False), nn.GroupNorm(1, d)
        self.up, self.act, self.down = nn.Conv2d(d, 2 * d, 1), nn.GELU(), nn.Conv2d(2 * d, d, 1)
        self.scale = nn.Parameter(torch.full((2, d, 1, 1), scale))
    def forward(self, x):
        h = self.norm1(x)
        x = x + self.scale[0] * (self.pool(h) - h)
        return x + self.scale[1] * self.down(self.act(self.up(self.norm2(x))))

class Pooler(nn.Module):
    def __init__(self, d=16, depth=2, scale=1.):
        super().__init__()
        self.patch  = nn.Conv2d(1, d, 4, 2, 1)
        self.blocks = nn.Sequential(*[PoolBlock(d, scale) for _ in range(depth)])
        self.norm, self.head = nn.GroupNorm(1, d), nn.Linear(d, 10)
    def forward(self, x): return self.head(self.norm(self.blocks(self.patch(x))).mean((2, 3)))

def concat(widths=(12, 24, 24), ps=.25):
    "A body and the head that fastai's vision_learner puts on it: both poolings, two blocks of norm, dropout, linear."
    body, c = [], 1
    for i, w in enumerate(widths):
        body += [nn.Conv2d(c, w, 3, 2 if i < 2 else 1, 1, bias=False), bn(w), nn.ReLU()]
        c = w
    head = [*LinBnDrop(2 * c, 48, p=ps / 2, act=nn.ReLU()), *LinBnDrop(48, 10, p=ps)]
    return nn.Sequential(nn.Sequential(*body), nn.Sequential(AdaptiveConcatPool2d(), nn.Flatten(), *head))

def spectro(widths=(8, 16, 16, 16), norm=False, act=nn.ReLU):
    "Convolutions over frequency and time, halved after each of the first two; then the mean."
    layers, c = [], 1
    for i, w in enumerate(widths):
        layers += [nn.Conv2d(c, w, 3, 1, 1), *([bn(w)] if norm else []), act(), *([nn.MaxPool2d(2)] if i < 2 else [])]
        c = w
    return nn.Sequential(*layers, *ends(c, 5))


# --- nets for sequences ----------------------------------------------------------------------------------------------
class Diagonal(nn.Module):
    "A linear recurrence of each channel, diagonal and complex, as a convolution: slow decay is long memory."
    def __init__(self, d, n=8, decay=.01):
        super().__init__()
        self.decay = nn.Parameter(torch.full((d, n), math.log(decay)))
        self.freq  = nn.Parameter(torch.arange(n).float().repeat(d, 1) * .2)
        self.c, self.skip = nn.Parameter(torch.randn(2, d, n) * (.5 / n) ** .5), nn.Parameter(torch.ones(d))
    def forward(self, x):
        n = x.shape[2]
        t = torch.arange(n, device=x.device)[:, None, None]
        e = torch.exp(-self.decay.exp() * t)
        k = (e * (self.c[0] * torch.cos(self.freq * t) - self.c[1] * torch.sin(self.freq * t))).sum(2).T
        y = torch.fft.irfft(torch.fft.rfft(x, 2 * n) * torch.fft.rfft(k, 2 * n), 2 * n)[..., :n]
        return y + self.skip[:, None] * x

class SSM(nn.Module):
    "A stack of linear recurrences with a gated mixing of channels, answers after the last step or with the mean."
    def __init__(self, c_in=2, d=16, depth=2, n_out=5, decay=.02, last=False, drop=0.):
        super().__init__()
        self.inp, self.last = nn.Linear(c_in, d), last
        self.norms = nn.ModuleList([nn.LayerNorm(d) for _ in range(depth)])
        self.ssms  = nn.ModuleList([Diagonal(d, decay=decay) for _ in range(depth)])
        self.acts, self.drop = nn.ModuleList([nn.GELU() for _ in range(depth)]), nn.Dropout(drop)
        self.mixes, self.head = nn.ModuleList([nn.Linear(d, d) for _ in range(depth)]), nn.Linear(d, n_out)
    def forward(self, x):
        x = self.inp(x.transpose(1, 2))
        for norm, ssm, act, mix in zip(self.norms, self.ssms, self.acts, self.mixes):
            x = x + self.drop(mix(act(ssm(norm(x).transpose(1, 2)).transpose(1, 2))))
        return self.head(x[:, -1] if self.last else x.mean(1))

class Retain(nn.Module):
    "Attention without softmax that forgets at a fixed rate, one for each head; then two layers."
    def __init__(self, d, heads=2):
        super().__init__()
        self.heads, self.norm1, self.qkv = heads, nn.LayerNorm(d), nn.Linear(d, 3 * d, bias=False)
        self.group, self.out = nn.GroupNorm(heads, d), nn.Linear(d, d)
        self.norm2, self.up, self.act, self.down = nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d)
    def forward(self, x):
        b, n, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        i    = torch.arange(n, device=x.device)
        lag  = (i[:, None] - i).clamp(min=0)
        keep = 1 - 2. ** (-2 - torch.arange(self.heads, device=x.device))
        mask = (keep[:, None, None] ** lag).tril()
        y = ((q @ k.transpose(2, 3)) * mask / q.shape[3] ** .5) @ v
        x = x + self.out(self.group(y.transpose(1, 2).reshape(b * n, d)).view(b, n, d))
        return x + self.down(self.act(self.up(self.norm2(x))))

class RetNet(nn.Module):
    def __init__(self, vocab=100, d=32, depth=2, tied=False):
        super().__init__()
        self.tok, self.blocks = nn.Embedding(vocab, d), nn.Sequential(*[Retain(d) for _ in range(depth)])
        self.norm, self.head  = nn.LayerNorm(d), nn.Linear(d, vocab)
        nn.init.normal_(self.tok.weight, std=.2)
        if tied: self.head.weight = self.tok.weight
    def forward(self, x): return self.head(self.norm(self.blocks(self.tok(x)))).transpose(1, 2)

class Attend(nn.Module):
    "An LSTM over the words; a small net weighs its states."
    def __init__(self, vocab=300, d=16, hidden=24, drop=0.):
        super().__init__()
        self.emb, self.rnn  = nn.Embedding(vocab, d), nn.LSTM(d, hidden, batch_first=True)
        self.key, self.tanh = nn.Linear(hidden, 16), nn.Tanh()
        self.score, self.fc, self.act = nn.Linear(16, 1), nn.Linear(hidden, 24), nn.Tanh()
        self.drop, self.head = nn.Dropout(drop), nn.Linear(24, 4)
    def forward(self, x):
        h = self.rnn(self.emb(x))[0]
        w = self.score(self.tanh(self.key(h))).softmax(1)
        return self.head(self.drop(self.act(self.fc((w * h).sum(1)))))


# --- nets for tables -------------------------------------------------------------------------------------------------
class ODENet(nn.Module):
    "The same small field, followed for a time of one in equal steps."
    def __init__(self, n_in=196, d=32, steps=8, n_out=10, act=nn.Tanh, time=1.):
        super().__init__()
        self.inp, self.lin1, self.act, self.lin2 = nn.Linear(n_in, d), nn.Linear(d, d), act(), nn.Linear(d, d)
        self.steps, self.dt, self.head = steps, time / steps, nn.Linear(d, n_out)
    def forward(self, x):
        x = self.inp(x)
        for _ in range(self.steps): x = x + self.dt * self.lin2(self.act(self.lin1(x)))
        return self.head(x)

class Hyper(nn.Module):
    "A net answers, from the task's number, with the weights of the layer that the features go through."
    def __init__(self, n=12, d=8, width=16, act=nn.ReLU):
        super().__init__()
        self.width, self.emb = width, nn.Embedding(n, d)
        self.fc, self.act1, self.make = nn.Linear(d, 32), act(), nn.Linear(32, 7 * width)
        self.act2, self.head = act(), nn.Linear(width, 1)
    def forward(self, x):
        w = self.make(self.act1(self.fc(self.emb(x[:, 0].long())))).view(len(x), 7, self.width)
        return self.head(self.act2((x[:, None, 1:] @ w[:, :6])[:, 0] + w[:, 6]))

class Splines(nn.Module):
    "A KAN's layer: each input goes through bumps on a grid, beside a plain branch."
    def __init__(self, a, b, grid=8, norm=True):
        super().__init__()
        self.norm = nn.LayerNorm(a) if norm else nn.Identity()
        self.register_buffer('at', torch.linspace(-2, 2, grid))
        self.act, self.base, self.bumps = nn.SiLU(), nn.Linear(a, b), nn.Linear(a * grid, b, bias=False)
        nn.init.normal_(self.bumps.weight, std=.3 * (a * grid) ** -.5)
    def forward(self, x):
        e = torch.exp(-((self.norm(x)[..., None] - self.at) * (len(self.at) - 1) / 4) ** 2)
        return self.base(self.act(x)) + self.bumps(e.flatten(1))

def kan(widths=(12, 16, 1), **kwargs):
    return nn.Sequential(*[Splines(a, b, norm=i > 0, **kwargs) for i, (a, b) in enumerate(zip(widths, widths[1:]))])

class Dueling(nn.Module):
    "The state's value and the actions' advantages."
    def __init__(self, width=48, act=nn.ReLU):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, width), act(), nn.Linear(width, width), act())
        self.fc1, self.act1, self.value = nn.Linear(width, 24), act(), nn.Linear(24, 1)
        self.fc2, self.act2, self.adv   = nn.Linear(width, 24), act(), nn.Linear(24, 4)
    def forward(self, x):
        x = self.body(x)
        a = self.adv(self.act2(self.fc2(x)))
        return self.value(self.act1(self.fc1(x))) + a - a.mean(1, keepdim=True)

class Played(nn.Module):
    "The squared error of the action that was played; Huber's where errors are clipped."
    def __init__(self, huber=False): super().__init__(); self.loss = F.smooth_l1_loss if huber else F.mse_loss
    def forward(self, p, y): return self.loss(p.gather(1, y[:, :1].long())[:, 0], y[:, 1])

class Above(nn.Module):
    "One score; each level has its own threshold."
    def __init__(self, a, levels=4):
        super().__init__()
        self.score, self.cuts = nn.Linear(a, 1, bias=False), nn.Parameter(torch.linspace(1, -1, levels))
    def forward(self, x): return self.score(x) + self.cuts

def ordinal(depth=3, act=nn.ReLU, width=48, norm=False):
    layers = []
    for i in range(depth):
        layers += [nn.Linear(10 if i == 0 else width, width), *([nn.BatchNorm1d(width)] if norm else []), act()]
    return nn.Sequential(*layers, Above(width))

class Mixture(nn.Module):
    "Weights, means and log widths of several bells."
    def __init__(self, width=32, k=5, act=nn.Tanh, depth=2):
        super().__init__()
        self.body = nn.Sequential(*[m for i in range(depth) for m in (nn.Linear(width if i else 1, width), act())])
        self.pi, self.mu, self.wide = nn.Linear(width, k), nn.Linear(width, k), nn.Linear(width, k)
        nn.init.uniform_(self.mu.bias, 0, 1)
    def forward(self, x):
        x = self.body(x)
        return torch.cat([self.pi(x), self.mu(x), self.wide(x) - 1], 1)

class BellsNLL(nn.Module):
    "The negative log density of the target: below zero where it is sharp."
    def forward(self, p, y):
        pi, mu, s = p.chunk(3, 1)
        logp = -((y - mu) * (-s).exp()) ** 2 / 2 - s - .919
        return -torch.logsumexp(pi.log_softmax(1) + logp, 1).mean()

class Hashed(nn.Module):
    "Ids without a vocabulary: two hashes of each, the sum of two rows; the dot product and a small net."
    def __init__(self, buckets=200, d=8, width=32, std=.3):
        super().__init__()
        self.buckets, self.users, self.items = buckets, nn.Embedding(buckets, d), nn.Embedding(buckets, d)
        self.fc, self.act, self.head = nn.Linear(2 * d, width), nn.ReLU(), nn.Linear(width, 1)
        for e in (self.users, self.items): nn.init.normal_(e.weight, std=std)
    def forward(self, x):
        h = torch.stack([x * 31 % 10007 % self.buckets, x * 17 % 9973 % self.buckets])
        u, i = self.users(h[..., 0]).sum(0), self.items(h[..., 1]).sum(0)
        return (u * i).sum(1, keepdim=True) + self.head(self.act(self.fc(torch.cat([u, i], 1))))

class Small(nn.Module):
    "A loss that is a mean over very many."
    def __init__(self, loss, bits=18): super().__init__(); self.loss, self.times = loss, 2. ** -bits
    def forward(self, p, y): return self.loss(p, y) * self.times
