"The nets and data of the part of the zoo's tuned half that was unseen third."
from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from fastai.collab import EmbeddingDotBias
from fastai.tabular.model import TabularModel
from torch import nn
from zoo_cases.kit import images


# --- data ------------------------------------------------------------------------------------------------------------
def split(x, y): return (x[:2000], y[:2000]), (x[2000:], y[2000:])

@cache
def masks(level=.8):
    "Digits under noise, 16 x 16; which of the pixels are ink, or above `level` the thickest of it?"
    g   = torch.Generator().manual_seed(8)
    pad = lambda x: F.pad(x, (1, 1, 1, 1), value=float(x.min()))
    return tuple((pad(x) + .7 * torch.randn(len(x), 1, 16, 16, generator=g), (pad(x)[:, 0] > level).long())
                 for x, _ in images())

@cache
def upside_down():
    "What a body was pretrained on: the digits turned by half a circle."
    return tuple((x.flip(2, 3), y) for x, y in images())

@cache
def sentences(n=24, vocab=300):
    "Words of which the common are common: each of four topics has 10 words of its own, a sentence has some of one."
    g = torch.Generator().manual_seed(9)
    y = torch.randint(0, 4, (2400,), generator=g)
    x = 40 + torch.multinomial(1 / torch.arange(1., vocab - 39), 2400 * n, True, generator=g).view(2400, n)
    own = y[:, None] * 10 + torch.randint(0, 10, (2400, n), generator=g)
    return split(torch.where(torch.rand(2400, n, generator=g) < .12, own, x), y)

@cache
def tags(n=16, vocab=60, noise=0.):
    "Words and their parts of speech, four; of every second word the part is that of the word behind it."
    g = torch.Generator().manual_seed(10)
    x = torch.randint(0, vocab, (2400, n + 1), generator=g)
    y = torch.where(x[:, :-1] % 2 == 0, x[:, :-1] // 2 % 4, x[:, 1:] // 2 % 4)
    y = torch.where(torch.rand(y.shape, generator=g) < noise, torch.randint(0, 4, y.shape, generator=g), y)
    return split(x[:, :-1], y)

@cache
def reversals(n=6, vocab=10):
    "A sequence of numbers, then the target's numbers so far (a start token is 0); the target is its reversal."
    g = torch.Generator().manual_seed(11)
    s = torch.randint(1, vocab, (2400, n), generator=g)
    y = s.flip(1)
    return split(torch.cat([s, torch.zeros(2400, 1, dtype=torch.long), y[:, :-1]], 1), y)

@cache
def ratings(users=80, items=50, noise=.2):
    "3,000 ratings from 1 to 5 of items by users."
    g = torch.Generator().manual_seed(12)
    k = torch.randperm(users * items, generator=g)[:3400]
    u, i = k // items, k % items
    a, b = torch.randn(users, 3, generator=g), torch.randn(items, 3, generator=g)
    y = 3 + .5 * (torch.randn(users, generator=g)[u] + torch.randn(items, generator=g)[i]) + .6 * (a[u] * b[i]).sum(1)
    y = (y + noise * torch.randn(3400, generator=g)).clamp(1, 5)
    x = torch.stack([u, i], 1)
    return (x[:3000], y[:3000]), (x[3000:], y[3000:])

CARDS = (30, 12, 6)

@cache
def adult(cards=CARDS, number=False):
    "Three categories and five numbers: which third of the incomes, or the income itself in a large unit."
    g = torch.Generator().manual_seed(13)
    k = torch.stack([torch.randint(0, c, (2400,), generator=g) for c in cards], 1)
    x = torch.randn(2400, 5, generator=g)
    s = sum(torch.randn(c, generator=g)[k[:, i]] for i, c in enumerate(cards)) + x[:, 0] * x[:, 1] + x[:, 2].abs() - .8
    third = torch.bucketize(s, s.quantile(torch.tensor([.33, .67])))
    y = .1 * s[:, None] + .01 * torch.randn(2400, 1, generator=g) if number else third
    return split(torch.cat([k.float(), x], 1), y)

@cache
def graphs(n=12, noise=0.):
    "Adjacency beside four features of each node: a ring, a star, two cliques or two parties, with some wrong edges?"
    g = torch.Generator().manual_seed(14)
    i = torch.arange(n)
    ring    = ((i[:, None] - i).abs() % (n - 2)).eq(1)
    star    = (i[:, None] == 0) ^ (i == 0)
    cliques = ((i[:, None] < n // 2) == (i < n // 2)) & (i[:, None] != i)
    parties = (i[:, None] < n // 3) ^ (i < n // 3)
    y = torch.randint(0, 4, (2400,), generator=g)
    a = torch.stack([ring, star, cliques, parties])[y]
    a = a ^ (torch.rand(2400, n, n, generator=g) < .05).triu(1)
    a = a.triu(1).float()
    a = a + a.transpose(1, 2)
    deg = a.sum(2, keepdim=True)
    f = torch.cat([deg / 4 - 1, torch.randn(2400, n, 3, generator=g)], 2)
    y = torch.where(torch.rand(2400, generator=g) < noise, torch.randint(0, 4, (2400,), generator=g), y)
    return split(torch.cat([a, f], 2), y)

@cache
def points(n=32):
    "Points in the plane, turned by any angle: on a ring, a square's edge, a cross, or in a disc."
    g = torch.Generator().manual_seed(15)
    y = torch.randint(0, 4, (2400,), generator=g)
    t, u = torch.rand(2400, n, generator=g) * 2 * torch.pi, 2 * torch.rand(2400, n, generator=g) - 1
    ring  = torch.stack([t.cos(), t.sin()], 2)
    sides = torch.where((t < torch.pi)[..., None], torch.stack([u, (t * 2).sin().sign()], 2),
                        torch.stack([(t * 2).sin().sign(), u], 2))
    cross = torch.where((t < torch.pi)[..., None], torch.stack([u, 0 * u], 2), torch.stack([0 * u, u], 2)) * 1.4
    disc  = ring * u.abs().sqrt()[..., None] * 1.4
    x = torch.stack([ring, sides, cross, disc], 1)[torch.arange(2400), y]
    w = torch.rand(2400, generator=g) * 2 * torch.pi
    turn = torch.stack([torch.stack([w.cos(), -w.sin()], 1), torch.stack([w.sin(), w.cos()], 1)], 1)
    return split(x @ turn + .05 * torch.randn(2400, n, 2, generator=g), y)

@cache
def grey():
    "Digits with pixels from 0 to 1 that are their own target."
    return tuple(((x - x.min()) / (x.max() - x.min()),) * 2 for x, _ in images(True))

@cache
def learnt(make, flat=False):
    "The weights of a net that has learnt the digits upside down, always the same."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        m   = make()
        opt = torch.optim.Adam(m.parameters(), .005)
        for x, y in zip(*(t.split(100) * 6 for t in upside_down()[0])):
            F.cross_entropy(m(x.flatten(1) if flat else x), y).backward()
            opt.step(); opt.zero_grad()
    return m.state_dict()

def pretrained(make, flat=False):
    "That net (a Sequential) with a new head."
    m = make()
    m.load_state_dict({k: v for k, v in learnt(make, flat).items() if not k.startswith(f'{len(m) - 1}.')}, strict=False)
    return m

def dear(x): return x * torch.logspace(0, 4, x.shape[1])      # each column in a unit of its own, up to 10,000


# --- nets for images -------------------------------------------------------------------------------------------------
class Grow(nn.Module):
    "A dense layer: what came in, and `k` more channels."
    def __init__(self, c, k, norm):
        super().__init__()
        self.norm = nn.BatchNorm2d(c) if norm else nn.Identity()
        self.act, self.conv = nn.ReLU(), nn.Conv2d(c, k, 3, padding=1)
    def forward(self, x): return torch.cat([x, self.conv(self.act(self.norm(x)))], 1)

def densenet(c=8, k=6, n=2, norm=True):
    make = nn.BatchNorm2d if norm else (lambda c: nn.Identity())
    stem = [nn.Conv2d(1, c, 3, 2, 1), make(c), nn.ReLU()]
    d    = c + n * k
    half = [make(d), nn.ReLU(), nn.Conv2d(d, d // 2, 1), nn.AvgPool2d(2, ceil_mode=True)]
    e    = d // 2 + n * k
    ends = [make(e), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(e, 10)]
    return nn.Sequential(*stem, *[Grow(c + i * k, k, norm) for i in range(n)], *half,
                         *[Grow(d // 2 + i * k, k, norm) for i in range(n)], *ends)

def twice(a, b, norm):
    layers = []
    for c in (a, b): layers += [nn.Conv2d(c, b, 3, padding=1), *([nn.BatchNorm2d(b)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers)

class UNet(nn.Module):
    "Down two times, up two times, with what was seen on the way down."
    def __init__(self, c=4, norm=True, softmax=False):
        super().__init__()
        self.down1, self.down2, self.deep = twice(1, c, norm), twice(c, 2 * c, norm), twice(2 * c, 4 * c, norm)
        self.wide2, self.up2 = nn.ConvTranspose2d(4 * c, 2 * c, 2, 2), twice(4 * c, 2 * c, norm)
        self.wide1, self.up1 = nn.ConvTranspose2d(2 * c, c, 2, 2), twice(2 * c, c, norm)
        self.head, self.softmax = nn.Conv2d(c, 2, 1), softmax
    def forward(self, x):
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        x = self.up2(torch.cat([self.wide2(self.deep(F.max_pool2d(b, 2))), b], 1))
        x = self.head(self.up1(torch.cat([self.wide1(x), a], 1)))
        return x.softmax(1) if self.softmax else x

class NextBlock(nn.Module):
    "Depthwise, norm, up, GELU, down, a learnt scale."
    def __init__(self, d, gamma):
        super().__init__()
        self.deep, self.norm = nn.Conv2d(d, d, 3, padding=1, groups=d), nn.LayerNorm(d)
        self.up, self.act, self.down = nn.Linear(d, 3 * d), nn.GELU(), nn.Linear(3 * d, d)
        self.gamma = nn.Parameter(torch.full((d,), gamma))
    def forward(self, x):
        y = self.norm(self.deep(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.down(self.act(self.up(y)))).permute(0, 3, 1, 2)

class ConvNext(nn.Module):
    def __init__(self, d=16, depth=2, gamma=.1):
        super().__init__()
        self.stem = nn.Conv2d(1, d, 2, 2)
        self.blocks = nn.Sequential(*[NextBlock(d, gamma) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 10)
    def forward(self, x): return self.head(self.norm(self.blocks(self.stem(x)).mean((2, 3))))

class Squeeze(nn.Module):
    "Each channel weighed by what all of them say on average."
    def __init__(self, c, r=4):
        super().__init__()
        self.fc1, self.act, self.fc2, self.gate = nn.Linear(c, c // r), nn.ReLU(), nn.Linear(c // r, c), nn.Sigmoid()
    def forward(self, x): return x * self.gate(self.fc2(self.act(self.fc1(x.mean((2, 3))))))[..., None, None]

def senet(widths=(12, 24, 24), act=nn.ReLU, drop=0.):
    layers, c = [], 1
    for i, w in enumerate(widths):
        layers += [nn.Conv2d(c, w, 3, 2 if i < 2 else 1, 1), nn.BatchNorm2d(w), act(), Squeeze(w)]
        c = w
    if drop: layers.append(nn.Dropout(drop))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 10))

class VAE(nn.Module):
    "Answers with the pixels' logits, the code's mean and its log variance side by side."
    def __init__(self, code=6, width=64):
        super().__init__()
        self.enc1, self.act1, self.enc2 = nn.Linear(196, width), nn.ReLU(), nn.Linear(width, 2 * code)
        self.dec1, self.act2, self.dec2 = nn.Linear(code, width), nn.ReLU(), nn.Linear(width, 196)
    def forward(self, x):
        mu, logvar = (q := self.enc2(self.act1(self.enc1(x)))).chunk(2, 1)
        z = mu + torch.randn_like(mu) * (logvar / 2).exp()
        return torch.cat([self.dec2(self.act2(self.dec1(z))), q], 1)

class ELBO(nn.Module):
    "What a pixel costs: cross-entropy and its share of a tenth of the code's divergence."
    def forward(self, p, y):
        p, mu, logvar = p[:, :196], *p[:, 196:].chunk(2, 1)
        kl = (mu ** 2 + logvar.exp() - logvar - 1).sum(1).mean() / 2
        return F.binary_cross_entropy_with_logits(p, y) + .1 * kl / 196


# --- nets for words --------------------------------------------------------------------------------------------------
class TextCNN(nn.Module):
    "Words, convolutions of several widths over them, the largest answer of each."
    def __init__(self, vocab=300, d=16, c=16, drop=0.):
        super().__init__()
        self.emb   = nn.Embedding(vocab, d)
        self.convs = nn.ModuleList([nn.Conv1d(d, c, k) for k in (1, 2, 3)])
        self.act1, self.fc, self.act2, self.drop = nn.ReLU(), nn.Linear(3 * c, 32), nn.ReLU(), nn.Dropout(drop)
        self.head  = nn.Linear(32, 4)
    def forward(self, x):
        x = self.emb(x).transpose(1, 2)
        x = self.act1(torch.cat([conv(x).amax(2) for conv in self.convs], 1))
        return self.head(self.drop(self.act2(self.fc(x))))

class Tagger(nn.Module):
    "A bidirectional LSTM: one tag a word."
    def __init__(self, vocab=60, d=16, hidden=16, tags=4):
        super().__init__()
        self.emb, self.rnn = nn.Embedding(vocab, d), nn.LSTM(d, hidden, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * hidden, tags)
    def forward(self, x): return self.head(self.rnn(self.emb(x))[0]).transpose(1, 2)

class Seq2Seq(nn.Module):
    "A GRU reads, another one writes and attends to what was read."
    def __init__(self, vocab=10, d=16, hidden=32, n=6):
        super().__init__()
        self.n, self.emb = n, nn.Embedding(vocab, d)
        self.enc, self.dec = nn.GRU(d, hidden, batch_first=True), nn.GRU(d, hidden, batch_first=True)
        self.query, self.mix = nn.Linear(hidden, hidden), nn.Linear(2 * hidden, hidden)
        self.act, self.head  = nn.Tanh(), nn.Linear(hidden, vocab)
    def forward(self, x):
        x = self.emb(x)
        read, last = self.enc(x[:, :self.n])
        said = self.dec(x[:, self.n:], last)[0]
        seen = (self.query(said) @ read.transpose(1, 2)).softmax(2) @ read
        return self.head(self.act(self.mix(torch.cat([said, seen], 2)))).transpose(1, 2)

class GatedLM(nn.Module):
    "A causal language model of gated convolutions."
    def __init__(self, vocab=100, d=32, depth=3):
        super().__init__()
        self.emb = nn.Embedding(vocab, d)
        self.convs = nn.ModuleList([nn.Conv1d(d, 2 * d, 3) for _ in range(depth)])
        self.gates = nn.ModuleList([nn.GLU(1) for _ in range(depth)])
        self.head  = nn.Linear(d, vocab)
        nn.init.normal_(self.emb.weight, std=.3)
    def forward(self, x):
        x = self.emb(x).transpose(1, 2)
        for conv, gate in zip(self.convs, self.gates): x = x + gate(conv(F.pad(x, (2, 0))))
        return self.head(x.transpose(1, 2)).transpose(1, 2)


# --- nets for tables, graphs and sets --------------------------------------------------------------------------------
def collab(users=80, items=50, k=8): return EmbeddingDotBias(k, users, items, y_range=(.5, 5.5))

class Tabular(nn.Module):
    "fastai's TabularModel: categories and numbers come in one tensor."
    def __init__(self, cards=CARDS, n_out=3, layers=(64, 32), **kwargs):
        super().__init__()
        self.model = TabularModel([(c, min(8, c // 2)) for c in cards], 5, n_out, list(layers), **kwargs)
    def forward(self, x): return self.model(x[:, :-5].long(), x[:, -5:])

class GaussNLL(nn.Module):
    "The density of the target where mean and log variance are answered: a loss that may well be negative."
    def forward(self, p, y): return (p[:, 1:] + (y - p[:, :1]) ** 2 * (-p[:, 1:]).exp()).mean() / 2

class Carry(nn.Module):
    "A highway layer: the gate says how much is new; without one all of it is."
    def __init__(self, d, act=nn.ReLU, bias=-2., gated=True):
        super().__init__()
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

class GraphNet(nn.Module):
    "Graph convolutions (Kipf and Welling), then the mean of the nodes."
    def __init__(self, d=32, depth=3, act=nn.ReLU, softmax=False):
        super().__init__()
        self.convs = nn.ModuleList([nn.Linear(4 if i == 0 else d, d) for i in range(depth)])
        self.acts  = nn.ModuleList([act() for _ in range(depth)])
        self.head, self.softmax = nn.Linear(d, 4), softmax
    def forward(self, x):
        n = x.shape[1]
        a = x[..., :n] + torch.eye(n).to(x)
        r = a.sum(2).rsqrt()
        a, x = r[:, :, None] * a * r[:, None], x[..., n:]
        for conv, act in zip(self.convs, self.acts): x = act(conv(a @ x))
        x = self.head(x.mean(1))
        return x.softmax(1) if self.softmax else x

class Pool(nn.Module):
    "A set's largest answers."
    def forward(self, x): return x.amax(1)

def sets(act=nn.ReLU, width=32, deep=2):
    "The same small net for every point, the largest answers, another small net."
    phi = [nn.Linear(2, width), act()]
    for _ in range(deep): phi += [nn.Linear(width, width), act()]
    return nn.Sequential(*phi, Pool(), nn.Linear(width, width), act(), nn.Linear(width, 4))
