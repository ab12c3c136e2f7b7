"The nets and data of the zoo's unseen half."
from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from fastai.text.models.awdlstm import AWD_LSTM
from fastai.text.models.core import LinearDecoder
from fastai.vision.models.xresnet import ResBlock, XResNet
from torch import nn
from zoo_cases.kit import images


def gen(seed): return torch.Generator().manual_seed(seed)
def split(x, y, n=2000): return (x[:n], y[:n]), (x[n:], y[n:])

# --- data ------------------------------------------------------------------------------------------------------------
@cache
def couples(same=.5, n=4000):
    "Two digits, and whether they are the same number."
    def put(x, y, n, g):
        a   = torch.randint(0, len(x), (n,), generator=g)
        yes = torch.rand(n, generator=g) < same
        w   = torch.rand(n, len(x), generator=g) * (y[a][:, None] == y).eq(yes[:, None])
        b   = w.argmax(1)
        return torch.stack([x[a], x[b]], 1), yes[:, None].float()
    g = gen(21)
    return tuple(put(x, y, k, g) for (x, y), k in zip(images(True), (n, 400)))

@cache
def picture(outliers=0.):
    "Places in a picture, from -1 to 1, and how bright it is there; of some the brightness is wrong."
    g = gen(22)
    x = 2 * torch.rand(2400, 2, generator=g) - 1
    r = x.norm(dim=1)
    y = torch.sin(7 * r) + torch.cos(4 * x[:, 0] + 2 * x[:, 1]) + (x[:, 1] > .3 * torch.sin(5 * x[:, 0])).float()
    y = (y - y.mean()) / y.std()
    y = torch.where(torch.rand(2400, generator=g) < outliers, 20 * torch.randn(2400, generator=g), y)
    return split(x, y[:, None])

FIELDS = (60, 30, 20, 8)

@cache
def clicks(fields=FIELDS, common=0., sharp=3.):
    "Four categories and four numbers of a visit, and whether it ended in a click."
    g = gen(23)
    k = torch.stack([torch.randint(0, c, (2400,), generator=g) for c in fields], 1)
    e = [torch.randn(c, 3, generator=g)[k[:, i]] for i, c in enumerate(fields)]
    x = torch.randn(2400, 4, generator=g)
    s = (e[0] * e[1]).sum(1) + e[2][:, 0] + e[3][:, 0] * x[:, 0] + x[:, 1] * x[:, 2]
    s = sharp * (s / s.std() + common)
    y = (torch.rand(2400, generator=g) < s.sigmoid()).float()
    return split(torch.cat([k.float(), x], 1), y[:, None])

@cache
def sound(n=32, levels=16):
    "Two tones and noise in `levels` steps of loudness, as sequences and their successors."
    g = gen(24)
    t = torch.arange(n + 1.)
    f, p = .1 + .5 * torch.rand(2400, 2, 1, generator=g), 6.28 * torch.rand(2400, 2, 1, generator=g)
    s = torch.sin(f * t + p).sum(1) / 2 + .02 * torch.randn(2400, n + 1, generator=g)
    k = ((s + 1) / 2 * levels).long().clamp(0, levels - 1)
    return split(k[:, :-1], k[:, 1:])

@cache
def films(n=6, size=8, noise=.2):
    "A spot that wanders in one of four directions, in noise."
    g = gen(25)
    y = torch.randint(0, 4, (2400,), generator=g)
    way = torch.tensor([[0, 1], [1, 0], [0, -1], [-1, 0]])[y]
    at  = torch.randint(0, size, (2400, 1, 2), generator=g) + way[:, None] * torch.arange(n)[:, None]
    at  = at % size
    x   = torch.zeros(2400, n, size, size)
    i, t = torch.arange(2400)[:, None], torch.arange(n)
    x[i, t, at[..., 0], at[..., 1]] = 3.
    return split(x + noise * torch.randn(x.shape, generator=g), y)

@cache
def reminders(n=16):
    "What is shown in the first two frames must be remembered through noise."
    g = gen(26)
    y = torch.randint(0, 4, (2400,), generator=g)
    x = .3 * torch.randn(2400, n, 8, 8, generator=g)
    for q in range(4): x[y == q, :2, 4 * (q // 2):4 * (q // 2) + 4, 4 * (q % 2):4 * (q % 2) + 4] += 1.5
    return split(x, y)

@cache
def regimes(outliers=0.):
    "Eight numbers; what follows from them is another thing in each of four regimes, which the first two tell."
    g = gen(27)
    x = torch.randn(2400, 8, generator=g)
    k = 2 * (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    y = (x[:, 2:] * torch.randn(4, 6, generator=g)[k]).sum(1) / 2
    y = torch.where(torch.rand(2400, generator=g) < outliers, 15 * torch.randn(2400, generator=g), y)
    return split(x, y[:, None])

@cache
def lookups(n=10, vocab=20, asked=4):
    "Ten different words, then some of them again: at which place were they?"
    g = gen(28)
    s = torch.rand(4400, vocab, generator=g).argsort(1)[:, :n]
    y = torch.rand(4400, n, generator=g).argsort(1)[:, :asked]
    return split(torch.cat([s, s.gather(1, y)], 1), y, 4000)

@cache
def pulses(n=64, noise=0.):
    "One channel of a heart-like signal of four kinds of beat, at any time, with drift; some labels are wrong."
    g = gen(29)
    y = torch.randint(0, 4, (2400,), generator=g)
    t = torch.arange(n)[None] - 16 - 32 * torch.rand(2400, 1, generator=g)
    one  = torch.exp(-t ** 2 / 4)
    kind = torch.stack([one, one - torch.exp(-(t - 4) ** 2 / 4), one + .8 * torch.exp(-(t - 9) ** 2 / 8),
                        torch.exp(-t ** 2 / 30)], 1)[torch.arange(2400), y]
    x = 2 * kind + .25 * torch.randn(2400, n, generator=g) + torch.randn(2400, 1, generator=g) * .3
    y = torch.where(torch.rand(2400, generator=g) < noise, torch.randint(0, 4, (2400,), generator=g), y)
    return split(x[:, None], y)

@cache
def both():
    "Digits with two answers: which, and how much ink."
    return tuple((x, torch.stack([y.float(), x.mean((1, 2, 3)) / .2], 1)) for x, y in images())

def few(data, kept=.08):
    "Digits below 5 are many, the others rare."
    return tuple((x[k], y[k]) for x, y in data for k in [(y < 5) | (torch.rand(len(y), generator=gen(30)) < kept)])

class Little(nn.Module):
    "A squared error in a unit so large that it is small, with a learning rate to match."
    def forward(self, p, y): return F.mse_loss(p, y) * 2. ** -20


# --- nets for images -------------------------------------------------------------------------------------------------
def conv(a, b, k, stride=1): return [nn.Conv2d(a, b, k, stride, k // 2), nn.ReLU()]

class Inception(nn.Module):
    "Four ways side by side: 1 x 1, 3 x 3, 5 x 5, pooled."
    def __init__(self, a, b):
        super().__init__()
        q = b // 4
        self.one   = nn.Sequential(*conv(a, q, 1))
        self.three = nn.Sequential(*conv(a, q, 1), *conv(q, q, 3))
        self.five  = nn.Sequential(*conv(a, q, 1), *conv(q, q, 5))
        self.pool  = nn.Sequential(nn.MaxPool2d(3, 1, 1), *conv(a, q, 1))
    def forward(self, x): return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1)

class GoogLeNet(nn.Module):
    "Three inceptions; while it trains a second head may answer from the middle."
    def __init__(self, c=16, aux=False):
        super().__init__()
        self.stem = nn.Sequential(*conv(1, c, 3, 2))
        self.mix1, self.mix2 = Inception(c, c), Inception(c, 2 * c)
        self.mix3 = Inception(2 * c, 2 * c)
        self.head, self.aux = nn.Linear(2 * c, 10), nn.Linear(c, 10) if aux else None
    def forward(self, x):
        a = self.mix1(self.stem(x))
        x = self.head(self.mix3(F.max_pool2d(self.mix2(a), 2)).mean((2, 3)))
        return torch.stack([x, self.aux(a.mean((2, 3)))], 2) if self.aux and self.training else x

class Supervised(nn.Module):
    "The loss of the answer and a third of that from the middle."
    def forward(self, p, y):
        if p.dim() == 2: return F.cross_entropy(p, y)
        return F.cross_entropy(p[..., 0], y) + .3 * F.cross_entropy(p[..., 1], y)

class Fire(nn.Module):
    "Few channels, then 1 x 1 and 3 x 3 side by side."
    def __init__(self, a, s, e):
        super().__init__()
        self.squeeze, self.act1 = nn.Conv2d(a, s, 1), nn.ReLU()
        self.one, self.three, self.act2 = nn.Conv2d(s, e, 1), nn.Conv2d(s, e, 3, padding=1), nn.ReLU()
    def forward(self, x):
        x = self.act1(self.squeeze(x))
        return self.act2(torch.cat([self.one(x), self.three(x)], 1))

def squeezenet(c=16, s=8, drop=0.):
    return nn.Sequential(*conv(1, c, 3, 2), Fire(c, s, c), Fire(2 * c, s, c), nn.MaxPool2d(2), Fire(2 * c, s, c),
                         nn.Dropout(drop), nn.Conv2d(2 * c, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())

class PreAct(nn.Module):
    "Norm, activation and convolution two times beside the identity or a projection."
    def __init__(self, a, b, stride=1):
        super().__init__()
        self.norm1, self.act1, self.conv1 = nn.BatchNorm2d(a), nn.ReLU(), nn.Conv2d(a, b, 3, stride, 1, bias=False)
        self.norm2, self.act2, self.conv2 = nn.BatchNorm2d(b), nn.ReLU(), nn.Conv2d(b, b, 3, 1, 1, bias=False)
        self.short = nn.Identity() if a == b and stride == 1 else nn.Conv2d(a, b, 1, stride, bias=False)
    def forward(self, x):
        h = self.act1(self.norm1(x))
        return self.short(x) + self.conv2(self.act2(self.norm2(self.conv1(h))))

def wide(c=24):
    ends = [nn.BatchNorm2d(2 * c), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * c, 10)]
    return nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1, bias=False), PreAct(8, c), PreAct(c, 2 * c, 2), *ends)

def xres(): return XResNet(ResBlock, 1, [1, 1, 1, 1], 0., 1, 10, (8, 8, 64), .125)

class Latents(nn.Module):
    "A Perceiver: a few learnt vectors look at all patches, then at each other; the second time with the same weights."
    def __init__(self, d=24, n=8, depth=2, softmax=False):
        super().__init__()
        self.patch, self.pos   = nn.Conv2d(1, d, 2, 2), nn.Parameter(.1 * torch.randn(49, d))
        self.latents           = nn.Parameter(.5 * torch.randn(n, d))
        self.depth, self.look  = depth, Look(d)
        self.norm, self.head, self.softmax = nn.LayerNorm(d), nn.Linear(d, 10), softmax
    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2) + self.pos
        z = self.latents.expand(len(x), -1, -1)
        for _ in range(self.depth): z = self.look(z, x)
        x = self.head(self.norm(z.mean(1)))
        return x.softmax(1) if self.softmax else x

class Look(nn.Module):
    def __init__(self, d, heads=2):
        super().__init__()
        self.norm1, self.normx = nn.LayerNorm(d), nn.LayerNorm(d)
        self.cross = nn.MultiheadAttention(d, heads, batch_first=True)
        self.norm2, self.up, self.act, self.down = nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d)
        self.norm3, self.own = nn.LayerNorm(d), nn.MultiheadAttention(d, heads, batch_first=True)
    def forward(self, z, x):
        x = self.normx(x)
        z = z + self.cross(self.norm1(z), x, x, need_weights=False)[0]
        h = self.norm3(z)
        z = z + self.own(h, h, h, need_weights=False)[0]
        return z + self.down(self.act(self.up(self.norm2(z))))

class Max(nn.Module):
    "The largest of every `k` features."
    def __init__(self, k): super().__init__(); self.k = k
    def forward(self, x): return x.unflatten(1, (-1, self.k)).amax(2)

def maxout(width=48, k=3, depth=3, drop=0.):
    layers, n = [], 196
    for _ in range(depth):
        layers += [nn.Linear(n, k * width), Max(k), *([nn.Dropout(drop)] if drop else [])]
        n = width
    return nn.Sequential(*layers, nn.Linear(n, 10))

class Siamese(nn.Module):
    "The distance of what the same net says of both."
    def __init__(self, act=nn.ReLU, width=64, code=16):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(196, width), act(), nn.Linear(width, width), act(), nn.Linear(width, code))
    def forward(self, x):
        a, b = self.net(x[:, 0]), self.net(x[:, 1])
        return ((a - b).pow(2).sum(1, keepdim=True) + 1e-6).sqrt()

class Contrastive(nn.Module):
    "The same belong together, others at least `margin` apart."
    def __init__(self, margin=2.): super().__init__(); self.margin = margin
    def forward(self, p, y): return (y * p ** 2 + (1 - y) * (self.margin - p).relu() ** 2).mean()

class Sine(nn.Module):
    def __init__(self, w=1.): super().__init__(); self.w = w
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

class Waves(nn.Module):
    "Fixed random sines and cosines of a place."
    def __init__(self, n=24, scale=4.):
        super().__init__()
        self.register_buffer('b', torch.randn(2, n) * scale)
    def forward(self, x): return torch.cat([torch.sin(x @ self.b), torch.cos(x @ self.b)], 1)

def fourier(width=48, depth=3, act=nn.ReLU, n_out=1):
    layers = [Waves()]
    for _ in range(depth): layers += [nn.Linear(width, width), act()]
    return nn.Sequential(*layers, nn.Linear(width, n_out))


# --- nets for tables -------------------------------------------------------------------------------------------------
class DeepCross(nn.Module):
    "Embeddings and numbers through two cross layers and, beside them, two deep ones."
    def __init__(self, fields=FIELDS, d=6, width=48, drop=0.):
        super().__init__()
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

class Experts(nn.Module):
    "A gate weighs what some small nets say, or asks only the best `top`."
    def __init__(self, k=4, width=24, n_in=8, top=0):
        super().__init__()
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

class GaussNLL(nn.Module):
    "The density of the target where mean and log variance are answered: a loss that may well be negative."
    def forward(self, p, y): return (p[:, 1:] + (y - p[:, :1]) ** 2 * (-p[:, 1:]).exp()).mean() / 2


# --- nets for sequences ----------------------------------------------------------------------------------------------
class AWD(nn.Module):
    "fastai's AWD_LSTM with its decoder; every sequence starts anew."
    def __init__(self, vocab=20, d=32, hidden=48, layers=2, drop=.1, tied=True):
        super().__init__()
        self.rnn = AWD_LSTM(vocab, d, hidden, layers, 0, drop, drop, drop / 5, max(drop, .01))
        self.out = LinearDecoder(vocab, d, drop, self.rnn.encoder if tied else None)
    def forward(self, x):
        self.rnn.bs = len(x)
        self.rnn.reset()
        return self.out(self.rnn(x))[0].transpose(1, 2)

class Dilated(nn.Module):
    "WaveNet's layer: a tanh of what was, times a gate, onto what goes on and beside it to the end."
    def __init__(self, d, dilation):
        super().__init__()
        self.pad = dilation
        self.new, self.tanh = nn.Conv1d(d, d, 2, dilation=dilation), nn.Tanh()
        self.let, self.gate = nn.Conv1d(d, d, 2, dilation=dilation), nn.Sigmoid()
        self.on = nn.Conv1d(d, d, 1)
    def forward(self, x):
        p = F.pad(x, (self.pad, 0))
        y = self.on(self.tanh(self.new(p)) * self.gate(self.let(p)))
        return x + y, y

class WaveNet(nn.Module):
    def __init__(self, levels=16, d=16, depth=4, softmax=False):
        super().__init__()
        self.emb    = nn.Embedding(levels, d)
        self.layers = nn.ModuleList([Dilated(d, 2 ** i) for i in range(depth)])
        self.act1, self.mix, self.act2, self.head = nn.ReLU(), nn.Conv1d(d, d, 1), nn.ReLU(), nn.Conv1d(d, levels, 1)
        self.softmax = softmax
    def forward(self, x):
        x, s = self.emb(x).transpose(1, 2), 0
        for layer in self.layers:
            x, y = layer(x)
            s = s + y
        x = self.head(self.act2(self.mix(self.act1(s))))
        return x.softmax(1) if self.softmax else x

class Film(nn.Module):
    "Every frame through convolutions, all of them through an LSTM."
    def __init__(self, c=8, hidden=32, cell='LSTM'):
        super().__init__()
        self.eye = nn.Sequential(*conv(1, c, 3), *conv(c, c, 3, 2), nn.Flatten(),
                                 nn.Linear(16 * c, 24), nn.ReLU())
        self.rnn, self.head = getattr(nn, cell)(24, hidden, batch_first=True), nn.Linear(hidden, 4)
    def forward(self, x):
        seen = self.eye(x.flatten(0, 1)[:, None]).unflatten(0, x.shape[:2])
        return self.head(self.rnn(seen)[0][:, -1])

class Pointer(nn.Module):
    "A transformer decoder whose answers are places in what was read."
    def __init__(self, vocab=20, n=10, d=32, depth=1):
        super().__init__()
        self.n, self.emb, self.pos = n, nn.Embedding(vocab, d), nn.Parameter(.1 * torch.randn(n, d))
        enc = nn.TransformerEncoderLayer(d, 2, 2 * d, 0., batch_first=True, norm_first=True)
        dec = nn.TransformerDecoderLayer(d, 2, 2 * d, 0., batch_first=True, norm_first=True)
        self.enc = nn.TransformerEncoder(enc, depth, enable_nested_tensor=False)
        self.dec = nn.TransformerDecoder(dec, depth)
        self.query, self.key = nn.Linear(d, d), nn.Linear(d, d)
    def forward(self, x):
        x    = self.emb(x)
        read = self.enc(x[:, :self.n] + self.pos)
        said = self.dec(x[:, self.n:], read)
        return self.key(read) @ self.query(said).transpose(1, 2) / read.shape[2] ** .5

class Beat(nn.Module):
    "Two convolutions over time beside the identity."
    def __init__(self, c, norm=True, skip=True):
        super().__init__()
        make = nn.BatchNorm1d if norm else (lambda c: nn.Identity())
        self.conv1, self.norm1, self.act1 = nn.Conv1d(c, c, 5, padding=2), make(c), nn.ReLU()
        self.conv2, self.norm2, self.act2 = nn.Conv1d(c, c, 5, padding=2), make(c), nn.ReLU()
        self.skip = skip
    def forward(self, x):
        y = self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x)))))
        return self.act2(x + y if self.skip else y)

def series(c=12, blocks=3, norm=True, skip=True):
    stem = [nn.Conv1d(1, c, 7, 2, 3), nn.BatchNorm1d(c) if norm else nn.Identity(), nn.ReLU()]
    return nn.Sequential(*stem, *[Beat(c, norm, skip) for _ in range(blocks)], nn.AdaptiveMaxPool1d(1), nn.Flatten(),
                         nn.Linear(c, 4))

class TwoHeads(nn.Module):
    "One body; one head says which digit, another how much ink."
    def __init__(self, c=12):
        super().__init__()
        self.body = nn.Sequential(*conv(1, c, 3, 2), *conv(c, 2 * c, 3, 2), *conv(2 * c, 2 * c, 3),
                                  nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8 * c, 32), nn.ReLU())
        self.which, self.ink = nn.Linear(32, 10), nn.Linear(32, 1)
    def forward(self, x):
        x = self.body(x)
        return torch.cat([self.which(x), self.ink(x)], 1)

class Tasks(nn.Module):
    "Cross-entropy of the first answer and `w` times the squared error of the second."
    def __init__(self, w=1.): super().__init__(); self.w = w
    def forward(self, p, y):
        return F.cross_entropy(p[:, :-1], y[:, 0].long()) + self.w * F.mse_loss(p[:, -1], y[:, 1])
