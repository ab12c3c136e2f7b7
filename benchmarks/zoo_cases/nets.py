"The nets of the zoo's tuned half: those of tuned.py, then those of tuned_more.py."
from __future__ import annotations

import torch
from torch import nn


def mlp(depth=4, act=nn.ReLU, n_in=196, n_out=10, width=64, drop=0.):
    layers = []
    for i in range(depth - 1):
        layers += [nn.Linear(n_in if i == 0 else width, width), act()]
        if drop:  layers.append(nn.Dropout(drop))
    return nn.Sequential(*layers, nn.Linear(width, n_out))

def cnn(widths=(8, 16, 16), act=nn.ReLU, norm=False, stride=2):
    layers, c = [], 1
    for i, w in enumerate(widths):
        layers += [nn.Conv2d(c, w, 3, stride=stride if i < 3 else 1, padding=1)]
        if norm: layers.append(nn.BatchNorm2d(w))
        layers.append(act())
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
    ends = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 10)]
    stem = [nn.Conv2d(1, c, 3, stride=2, padding=1), nn.BatchNorm2d(c) if norm else nn.Identity(), nn.ReLU()]
    return nn.Sequential(*stem, *[Block(c, norm) for _ in range(blocks)], *ends)

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
        self.inp, self.rec, self.act = nn.Linear(14, hidden), nn.Linear(hidden, hidden), act()
        self.head = nn.Linear(hidden, 10)
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
        self.lin = lin.requires_grad_(False)
        self.a, self.b = nn.Linear(lin.in_features, r, bias=False), nn.Linear(r, lin.out_features, bias=False)
        nn.init.zeros_(self.b.weight)
    def forward(self, x): return self.lin(x) + self.b(self.a(x))


# --- the nets of tuned_more.py ---------------------------------------------------------------------------------------
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
