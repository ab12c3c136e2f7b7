"Nets of linear layers: for vectors, tables, places, pairs, sets and graphs."
from __future__ import annotations

import torch
from fastai.collab import EmbeddingDotBias
from fastai.tabular.model import TabularModel
from fastai.torch_core import Module
from torch import nn

from ..data import CARDS, FIELDS
from ..init import kaiming


def mlp(depth=4, act=nn.ReLU, n_in=196, n_out=10, width=64, drop=0.):
    layers = []
    for i in range(depth - 1):
        layers += [nn.Linear(n_in if i == 0 else width, width), act()]
        if drop:  layers.append(nn.Dropout(drop))
    return nn.Sequential(*layers, nn.Linear(width, n_out))

def neck(width=3):
    "An MLP behind a narrow layer."
    return nn.Sequential(nn.Linear(196, width), *kaiming(mlp(3, n_in=width)))

def auto(act=nn.ReLU, widths=(196, 64, 16, 64, 196)):
    "An autoencoder."
    layers = []
    for a, b in zip(widths, widths[1:]): layers += [nn.Linear(a, b), act()]
    return nn.Sequential(*layers[:-1])

DEEP = (196, 64, 48, 32, 16, 32, 48, 64, 196)

class Rows(Module):
    "An embedding of the category beside the numbers, then an MLP."
    def __init__(self, card=40, d=4, width=48):
        self.emb = nn.Embedding(card, d)
        ends      = nn.Linear(d + 6, width), nn.Linear(width, width), nn.Linear(width, 4)
        self.body = nn.Sequential(ends[0], nn.ReLU(), ends[1], nn.ReLU(), ends[2])
    def forward(self, x): return self.body(torch.cat([self.emb(x[:, 0].long()), x[:, 1:]], 1))

class VAE(Module):
    "Answers with the pixels' logits, the code's mean and its log variance side by side."
    def __init__(self, code=6, width=64):
        self.enc1, self.act1, self.enc2 = nn.Linear(196, width), nn.ReLU(), nn.Linear(width, 2 * code)
        self.dec1, self.act2, self.dec2 = nn.Linear(code, width), nn.ReLU(), nn.Linear(width, 196)
    def forward(self, x):
        mu, logvar = (q := self.enc2(self.act1(self.enc1(x)))).chunk(2, 1)
        z = mu + torch.randn_like(mu) * (logvar / 2).exp()
        return torch.cat([self.dec2(self.act2(self.dec1(z))), q], 1)

def collab(users=80, items=50, k=8): return EmbeddingDotBias(k, users, items, y_range=(.5, 5.5))

class Tabular(Module):
    "fastai's TabularModel: categories and numbers come in one tensor."
    def __init__(self, cards=CARDS, n_out=3, layers=(64, 32), **kwargs):
        self.model = TabularModel([(c, min(8, c // 2)) for c in cards], 5, n_out, list(layers), **kwargs)
    def forward(self, x): return self.model(x[:, :-5].long(), x[:, -5:])

class Carry(Module):
    "A highway layer: the gate says how much is new; without one all of it is."
    def __init__(self, d, act=nn.ReLU, bias=-2., gated=True):
        self.new, self.act = nn.Linear(d, d), act()
        self.t, self.gate  = (nn.Linear(d, d), nn.Sigmoid()) if gated else (None, None)
        if gated: nn.init.constant_(self.t.bias, bias)
    def forward(self, x):
        h = self.act(self.new(x))
        if self.t is None: return h
        t = self.gate(self.t(x))
        return t * h + (1 - t) * x

def highway(depth=6, d=32, n_in=196, n_out=10, **kwargs):
    deep = [Carry(d, **kwargs) for _ in range(depth)]
    return nn.Sequential(nn.Linear(n_in, d), nn.ReLU(), *deep, nn.Linear(d, n_out))

class GraphNet(Module):
    "Graph convolutions (Kipf and Welling), then the mean of the nodes."
    def __init__(self, d=32, depth=3, act=nn.ReLU):
        self.convs = nn.ModuleList([nn.Linear(4 if i == 0 else d, d) for i in range(depth)])
        self.acts  = nn.ModuleList([act() for _ in range(depth)])
        self.head, self.softmax = nn.Linear(d, 4), False
    def forward(self, x):
        n = x.shape[1]
        a = x[..., :n] + torch.eye(n).to(x)
        r = a.sum(2).rsqrt()
        a, x = r[:, :, None] * a * r[:, None], x[..., n:]
        for conv, act in zip(self.convs, self.acts): x = act(conv(a @ x))
        x = self.head(x.mean(1))
        return x.softmax(1) if self.softmax else x

class Pool(Module):
    "A set's largest answers."
    def forward(self, x): return x.amax(1)

def sets(act=nn.ReLU, width=32, deep=2):
    "The same small net for every point, the largest answers, another small net."
    phi = [nn.Linear(2, width), act()]
    for _ in range(deep): phi += [nn.Linear(width, width), act()]
    return nn.Sequential(*phi, Pool(), nn.Linear(width, width), act(), nn.Linear(width, 4))

class ODENet(Module):
    "The same small field, followed for a time of one in equal steps."
    def __init__(self, n_in=196, d=32, steps=8, n_out=10, act=nn.Tanh, time=1.):
        self.inp, self.lin1, self.act, self.lin2 = nn.Linear(n_in, d), nn.Linear(d, d), act(), nn.Linear(d, d)
        self.steps, self.dt, self.head = steps, time / steps, nn.Linear(d, n_out)
    def forward(self, x):
        x = self.inp(x)
        for _ in range(self.steps): x = x + self.dt * self.lin2(self.act(self.lin1(x)))
        return self.head(x)

class Hyper(Module):
    "A net answers, from the task's number, with the weights of the layer that the features go through."
    def __init__(self, n=12, d=8, width=16, act=nn.ReLU):
        self.width, self.emb = width, nn.Embedding(n, d)
        self.fc, self.act1, self.make = nn.Linear(d, 32), act(), nn.Linear(32, 7 * width)
        self.act2, self.head = act(), nn.Linear(width, 1)
    def forward(self, x):
        w = self.make(self.act1(self.fc(self.emb(x[:, 0].long())))).view(len(x), 7, self.width)
        return self.head(self.act2((x[:, None, 1:] @ w[:, :6])[:, 0] + w[:, 6]))

class Splines(Module):
    "A KAN's layer: each input goes through bumps on a grid, beside a plain branch."
    def __init__(self, a, b, grid=8, norm=True):
        self.norm = nn.LayerNorm(a) if norm else nn.Identity()
        self.register_buffer('at', torch.linspace(-2, 2, grid))
        self.act, self.base, self.bumps = nn.SiLU(), nn.Linear(a, b), nn.Linear(a * grid, b, bias=False)
        nn.init.normal_(self.bumps.weight, std=.3 * (a * grid) ** -.5)
    def forward(self, x):
        e = torch.exp(-((self.norm(x)[..., None] - self.at) * (len(self.at) - 1) / 4) ** 2)
        return self.base(self.act(x)) + self.bumps(e.flatten(1))

def kan(widths=(12, 16, 1), **kwargs):
    return nn.Sequential(*[Splines(a, b, norm=i > 0, **kwargs) for i, (a, b) in enumerate(zip(widths, widths[1:]))])

class Dueling(Module):
    "The state's value and the actions' advantages."
    def __init__(self, width=48, act=nn.ReLU):
        self.body = nn.Sequential(nn.Linear(8, width), act(), nn.Linear(width, width), act())
        self.fc1, self.act1, self.value = nn.Linear(width, 24), act(), nn.Linear(24, 1)
        self.fc2, self.act2, self.adv   = nn.Linear(width, 24), act(), nn.Linear(24, 4)
    def forward(self, x):
        x = self.body(x)
        a = self.adv(self.act2(self.fc2(x)))
        return self.value(self.act1(self.fc1(x))) + a - a.mean(1, keepdim=True)

class Above(Module):
    "One score; each level has its own threshold."
    def __init__(self, a, levels=4):
        self.score, self.cuts = nn.Linear(a, 1, bias=False), nn.Parameter(torch.linspace(1, -1, levels))
    def forward(self, x): return self.score(x) + self.cuts

def ordinal(depth=3, act=nn.ReLU, width=48, norm=False):
    layers = []
    for i in range(depth):
        layers += [nn.Linear(10 if i == 0 else width, width), *([nn.BatchNorm1d(width)] if norm else []), act()]
    return nn.Sequential(*layers, Above(width))

class Mixture(Module):
    "Weights, means and log widths of several bells."
    def __init__(self, width=32, k=5, act=nn.Tanh, depth=2):
        self.body = nn.Sequential(*[m for i in range(depth) for m in (nn.Linear(width if i else 1, width), act())])
        self.pi, self.mu, self.wide = nn.Linear(width, k), nn.Linear(width, k), nn.Linear(width, k)
        nn.init.uniform_(self.mu.bias, 0, 1)
    def forward(self, x):
        x = self.body(x)
        return torch.cat([self.pi(x), self.mu(x), self.wide(x) - 1], 1)

class Hashed(Module):
    "Ids without a vocabulary: two hashes of each, the sum of two rows; the dot product and a small net."
    def __init__(self, buckets=200, d=8, width=32, std=.3):
        self.buckets, self.users, self.items = buckets, nn.Embedding(buckets, d), nn.Embedding(buckets, d)
        self.fc, self.act, self.head = nn.Linear(2 * d, width), nn.ReLU(), nn.Linear(width, 1)
        for e in (self.users, self.items): nn.init.normal_(e.weight, std=std)
    def forward(self, x):
        h = torch.stack([x * 31 % 10007 % self.buckets, x * 17 % 9973 % self.buckets])
        u, i = self.users(h[..., 0]).sum(0), self.items(h[..., 1]).sum(0)
        return (u * i).sum(1, keepdim=True) + self.head(self.act(self.fc(torch.cat([u, i], 1))))

class Max(Module):
    "The largest of every `k` features."
    def __init__(self, k): self.k = k
    def forward(self, x): return x.unflatten(1, (-1, self.k)).amax(2)

def maxout(width=48, k=3, depth=3, drop=0.):
    layers, n = [], 196
    for _ in range(depth):
        layers += [nn.Linear(n, k * width), Max(k), *([nn.Dropout(drop)] if drop else [])]
        n = width
    return nn.Sequential(*layers, nn.Linear(n, 10))

class Siamese(Module):
    "The distance of what the same net says of both."
    def __init__(self, act=nn.ReLU, width=64, code=16):
        self.net = nn.Sequential(nn.Linear(196, width), act(), nn.Linear(width, width), act(), nn.Linear(width, code))
    def forward(self, x):
        a, b = self.net(x[:, 0]), self.net(x[:, 1])
        return ((a - b).pow(2).sum(1, keepdim=True) + 1e-6).sqrt()

class Sine(Module):
    def __init__(self, w=1.): self.w = w
    def forward(self, x): return torch.sin(self.w * x)

def siren(width=48, depth=3, w=5.):
    "Sines of sines (Sitzmann et al.), initialised as they do."
    layers, n = [], 2
    for i in range(depth):
        layers += [nn.Linear(n, width), Sine(w)]
        bound = 1 / n if i == 0 else (6 / n) ** .5 / w
        nn.init.uniform_(layers[-2].weight, -bound, bound)
        n = width
    layers.append(nn.Linear(n, 1))
    nn.init.uniform_(layers[-1].weight, -(6 / n) ** .5 / w, (6 / n) ** .5 / w)
    return nn.Sequential(*layers)

class Waves(Module):
    "Fixed random sines and cosines of a place."
    def __init__(self, n=24, scale=4.):
        self.register_buffer('b', torch.randn(2, n) * scale)
    def forward(self, x): return torch.cat([torch.sin(x @ self.b), torch.cos(x @ self.b)], 1)

def fourier(width=48, depth=3, act=nn.ReLU, n_out=1):
    layers = [Waves()]
    for _ in range(depth): layers += [nn.Linear(width, width), act()]
    return nn.Sequential(*layers, nn.Linear(width, n_out))

class DeepCross(Module):
    "Embeddings and numbers through two cross layers and, beside them, two deep ones."
    def __init__(self, fields=FIELDS, d=6, width=48, drop=0.):
        self.register_buffer('first', torch.tensor([0, *fields[:-1]]).cumsum(0))
        n = len(fields) * d + 4
        self.emb   = nn.Embedding(sum(fields), d)
        self.cross = nn.ModuleList([nn.Linear(n, n) for _ in range(2)])
        self.deep  = nn.Sequential(nn.Linear(n, width), nn.ReLU(), nn.Dropout(drop), nn.Linear(width, width), nn.ReLU())
        self.head  = nn.Linear(n + width, 1)
        nn.init.normal_(self.emb.weight, std=.3)
    def forward(self, x):
        x = torch.cat([self.emb(x[:, :-4].long() + self.first).flatten(1), x[:, -4:]], 1)
        c = x
        for lin in self.cross: c = x * lin(c) + c
        return self.head(torch.cat([c, self.deep(x)], 1))

class Experts(Module):
    "A gate weighs what some small nets say, or asks only the best `top`."
    def __init__(self, k=4, width=24, n_in=8, top=0):
        self.k, self.top = k, top
        self.gate = nn.Sequential(nn.Linear(n_in, 16), nn.Tanh(), nn.Linear(16, k))
        self.up, self.act = nn.Linear(n_in, k * width), nn.ReLU()
        self.down = nn.ModuleList([nn.Linear(width, 1) for _ in range(k)])
    def forward(self, x):
        w = self.gate(x)
        if self.top: w = w.masked_fill(w < w.topk(self.top, 1)[0][:, -1:], float('-inf'))
        h = self.act(self.up(x)).unflatten(1, (self.k, -1))
        y = torch.cat([lin(h[:, i]) for i, lin in enumerate(self.down)], 1)
        return (w.softmax(1) * y).sum(1, keepdim=True)
