"The nets and data of the zoo's unseen half."
from __future__ import annotations

from functools import cache

import torch
from torch import nn


# --- data ------------------------------------------------------------------------------------------------------------
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


# --- nets ------------------------------------------------------------------------------------------------------------
class GRU(nn.Module):
    "Characters in, characters out."
    def __init__(self, vocab=100, d=16, hidden=32, softmax=False):
        super().__init__()
        self.tok, self.rnn = nn.Embedding(vocab, d), nn.GRU(d, hidden, batch_first=True)
        self.head, self.softmax = nn.Linear(hidden, vocab), softmax
    def forward(self, x):
        x = self.head(self.rnn(self.tok(x))[0])
        return (x.softmax(-1) if self.softmax else x).transpose(1, 2)

class ViT(nn.Module):
    "16 patches of a digit, two encoder layers, the mean."
    def __init__(self, d=32, depth=2):
        super().__init__()
        self.patch, self.pos = nn.Conv2d(1, d, 3, stride=3), nn.Parameter(.02 * torch.randn(16, d))
        make = lambda: nn.TransformerEncoderLayer(d, 2, 2 * d, 0., 'gelu', batch_first=True, norm_first=True)
        self.blocks = nn.Sequential(*[make() for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 10)
    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2) + self.pos
        return self.head(self.norm(self.blocks(x)).mean(1))

class Mix(nn.Module):
    def __init__(self, n, d):
        super().__init__()
        self.norm1, self.up1, self.act1 = nn.LayerNorm(d), nn.Linear(n, 2 * n), nn.GELU()
        self.down1 = nn.Linear(2 * n, n)
        self.norm2, self.up2, self.act2 = nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.GELU()
        self.down2 = nn.Linear(2 * d, d)
    def forward(self, x):
        x = x + self.down1(self.act1(self.up1(self.norm1(x).transpose(1, 2)))).transpose(1, 2)
        return x + self.down2(self.act2(self.up2(self.norm2(x))))

class Mixer(nn.Module):
    "An MLP over the patches and one over the channels, in turns."
    def __init__(self, d=24, depth=3):
        super().__init__()
        self.patch, self.blocks = nn.Conv2d(1, d, 3, stride=3), nn.Sequential(*[Mix(16, d) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 10)
    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(1))

def tcn(depth=4, c=16):
    "Dilated convolutions over time."
    layers, n = [], 2
    for i in range(depth):
        layers += [nn.Conv1d(n, c, 3, padding=2 ** (i % 4), dilation=2 ** (i % 4)), nn.ReLU()]
        n = c
    return nn.Sequential(*layers, nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(c, 5))

def auto(act=nn.ReLU, widths=(196, 64, 16, 64, 196)):
    "An autoencoder."
    layers = []
    for a, b in zip(widths, widths[1:]): layers += [nn.Linear(a, b), act()]
    return nn.Sequential(*layers[:-1])
DEEP = (196, 64, 48, 32, 16, 32, 48, 64, 196)

class Separable(nn.Module):
    "Depthwise, then pointwise; a shortcut where nothing changes its size."
    def __init__(self, a, b, stride=1):
        super().__init__()
        self.deep = nn.Conv2d(a, a, 3, stride, 1, groups=a, bias=False)
        self.norm1, self.act1 = nn.BatchNorm2d(a), nn.ReLU6()
        self.point, self.norm2, self.act2 = nn.Conv2d(a, b, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU6()
        self.short = a == b and stride == 1
    def forward(self, x):
        y = self.norm2(self.point(self.act1(self.norm1(self.deep(x)))))
        return self.act2(x + y if self.short else y)

def mobile(c=12):
    stem = [nn.Conv2d(1, c, 3, 2, 1, bias=False), nn.BatchNorm2d(c), nn.ReLU6()]
    ends = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * c, 10)]
    return nn.Sequential(*stem, Separable(c, c), Separable(c, 2 * c, 2), Separable(2 * c, 2 * c), *ends)

def vgg(groups=((8, 2), (16, 2)), norm=True, drop=0.):
    "Groups of 3 x 3 convolutions, each ends with max pooling."
    layers, c = [], 1
    for w, n in groups:
        for _ in range(n):
            layers += [nn.Conv2d(c, w, 3, padding=1), *([nn.BatchNorm2d(w)] if norm else []), nn.ReLU()]
            c = w
        layers.append(nn.MaxPool2d(2))
    if drop: layers.append(nn.Dropout(drop))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(c * 9, 10))

class Rows(nn.Module):
    "An embedding of the category beside the numbers, then an MLP."
    def __init__(self, card=40, d=4, width=48):
        super().__init__()
        self.emb = nn.Embedding(card, d)
        ends      = nn.Linear(d + 6, width), nn.Linear(width, width), nn.Linear(width, 4)
        self.body = nn.Sequential(ends[0], nn.ReLU(), ends[1], nn.ReLU(), ends[2])
    def forward(self, x): return self.body(torch.cat([self.emb(x[:, 0].long()), x[:, 1:]], 1))
