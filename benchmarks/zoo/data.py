"Data: digits and small tasks, as a rule 2,000 examples to train and 400 to validate, the same in every run."
from __future__ import annotations

from functools import cache, wraps

import torch
import torch.nn.functional as F

from fastgradstats.lesson10.data import digits


class Dice:
    "Random numbers of their own."
    def __init__(self, seed):   self.g = torch.Generator().manual_seed(seed)
    def rand(self, *shape):     return torch.rand(*shape, generator=self.g)
    def randn(self, *shape):    return torch.randn(*shape, generator=self.g)
    def below(self, n, *shape): return torch.randint(0, n, shape, generator=self.g)
    def order(self, n):         return torch.randperm(n, generator=self.g)

def drawn(seed):
    "Data that are made once, with dice of their own: `g`, a function's first argument."
    return lambda make: cache(wraps(make)(lambda *args, **kwargs: make(Dice(seed), *args, **kwargs)))

def split(x, y, n=2000): return (x[:n], y[:n]), (x[n:], y[n:])

def mislabelled(y, share, classes, g):
    "A share of the labels is any of the classes."
    return torch.where(g.rand(y.shape) < share, g.below(classes, *y.shape), y)

def off(y, share, by, g):
    "A share of the answers is far off."
    return torch.where(g.rand(y.shape) < share, by * g.randn(y.shape), y)


# --- images ----------------------------------------------------------------------------------------------------------
@drawn(0)
def images(g, flat=False):
    "2,000 digits of 14 x 14 to train, 400 to validate."
    d = digits()
    k, v = g.order(len(d.x_train))[:2000], g.order(1000)[:400]
    def put(x, y):
        x = F.avg_pool2d(x, 2)
        return (x.flatten(1) if flat else x), y
    return put(d.x_train[k], d.y_train[k]), put(d.x_valid[v], d.y_valid[v])

@cache
def rows():
    "An image as a sequence of its rows."
    return tuple((x.squeeze(1), y) for x, y in images())

@drawn(3)
def noisy_digits(g):
    "Four of ten training labels are any."
    (x, y), valid = images(True)
    return (x, mislabelled(y, .4, 10, g)), valid

@drawn(7)
def pixels(g, noise=0.):
    "The digit is the target, with noise."
    return tuple((x, x + noise * g.randn(x.shape)) for x, _ in images(True))

@cache
def grey():
    "Digits with pixels from 0 to 1 that are their own target."
    return tuple(((x - x.min()) / (x.max() - x.min()),) * 2 for x, _ in images(True))

@drawn(8)
def masks(g, level=.8):
    "Digits under noise, 16 x 16; which of the pixels are ink, or above `level` the thickest of it?"
    pad = lambda x: F.pad(x, (1, 1, 1, 1), value=float(x.min()))
    return tuple((pad(x) + .7 * g.randn(len(x), 1, 16, 16), (pad(x)[:, 0] > level).long())
                 for x, _ in images())

@cache
def upside_down():
    "What a body was pretrained on: the digits turned by half a circle."
    return tuple((x.flip(2, 3), y) for x, y in images())

@drawn(21)
def couples(g, same=.5, n=4000):
    "Two digits, and whether they are the same number."
    def put(x, y, n):
        a   = g.below(len(x), n)
        yes = g.rand(n) < same
        w   = g.rand(n, len(x)) * (y[a][:, None] == y).eq(yes[:, None])
        b   = w.argmax(1)
        return torch.stack([x[a], x[b]], 1), yes[:, None].float()
    return tuple(put(x, y, k) for (x, y), k in zip(images(True), (n, 400)))

@cache
def both():
    "Digits with two answers: which, and how much ink."
    return tuple((x, torch.stack([y.float(), x.mean((1, 2, 3)) / .2], 1)) for x, y in images())

def rare_digits(kept=.08):
    "Digits below 5 are many, the others rare."
    return tuple((x[k], y[k]) for x, y in images() for k in [(y < 5) | (Dice(30).rand(len(y)) < kept)])

@drawn(22)
def picture(g, outliers=0.):
    "Places in a picture, from -1 to 1, and how bright it is there; of some the brightness is wrong."
    x = 2 * g.rand(2400, 2) - 1
    r = x.norm(dim=1)
    y = torch.sin(7 * r) + torch.cos(4 * x[:, 0] + 2 * x[:, 1]) + (x[:, 1] > .3 * torch.sin(5 * x[:, 0])).float()
    return split(x, off((y - y.mean()) / y.std(), outliers, 20, g)[:, None])

@drawn(24)
def audio(g, n=512):
    "Half a second of sound: a tone, one that rises, falls or trembles, or clicks, somewhere and under noise."
    y = g.below(5, 2400)
    t = torch.arange(n) / n
    f, p = 40 + 120 * g.rand(2400, 1), g.rand(2400, 1)
    turns = torch.stack([f * t, f * t + 35 * t ** 2, (f + 70) * t - 35 * t ** 2,
                         f * t + 2 * torch.sin(2 * torch.pi * (6 * t + p)), f * t], 1)[torch.arange(2400), y]
    x = torch.sin(2 * torch.pi * (turns + p))
    x = torch.where((y == 4)[:, None], x * (((t + p) * 8 % 1) < .15) * 2, x)
    return split(x + .5 * g.randn(2400, n), y)

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


# --- sequences -------------------------------------------------------------------------------------------------------
@cache
def text(n=16):
    "Characters of Python's own documentation topics, as sequences and their successors."
    from pydoc_data.topics import topics
    s     = ''.join(topics[k] for k in sorted(topics))[:60000]
    chars = sorted(set(s))
    t     = torch.tensor([chars.index(c) for c in s])
    return split(t[:-1].unfold(0, n, n)[:2400], t[1:].unfold(0, n, n)[:2400])

@drawn(2)
def bigrams(g, n=16, vocab=20):
    "A Markov chain: the best loss is its entropy, far from 0."
    p = torch.softmax(1.5 * g.randn(vocab, vocab), 1)
    s = [0]
    draws = g.rand(2400 * n + 1)
    c = p.cumsum(1)
    for u in draws: s.append(min(int(torch.searchsorted(c[s[-1]], u)), vocab - 1))
    t = torch.tensor(s)
    return split(t[:-1].unfold(0, n, n)[:2400], t[1:].unfold(0, n, n)[:2400])

@drawn(5)
def waves(g, n=48):
    "2,000 noisy waves of two channels: five classes are five frequencies, the phase is anyone's."
    y = g.below(5, 2400)
    t = torch.arange(n) / n
    p = g.rand(2400, 2, 1)
    x = torch.sin(2 * torch.pi * ((2 + y)[:, None, None] * t + p)) + .4 * g.randn(2400, 2, n)
    return split(x, y)

@drawn(9)
def sentences(g, n=24, vocab=300):
    "Words of which the common are common: each of four topics has 10 words of its own, a sentence has some of one."
    y = g.below(4, 2400)
    x = 40 + torch.multinomial(1 / torch.arange(1., vocab - 39), 2400 * n, True, generator=g.g).view(2400, n)
    own = y[:, None] * 10 + g.below(10, 2400, n)
    return split(torch.where(g.rand(2400, n) < .12, own, x), y)

@drawn(10)
def tags(g, n=16, vocab=60, noise=0.):
    "Words and their parts of speech, four; of every second word the part is that of the word behind it."
    x = g.below(vocab, 2400, n + 1)
    y = torch.where(x[:, :-1] % 2 == 0, x[:, :-1] // 2 % 4, x[:, 1:] // 2 % 4)
    return split(x[:, :-1], mislabelled(y, noise, 4, g))

@drawn(11)
def reversals(g, n=6, vocab=10):
    "A sequence of numbers, then the target's numbers so far (a start token is 0); the target is its reversal."
    s = 1 + g.below(vocab - 1, 2400, n)
    y = s.flip(1)
    return split(torch.cat([s, torch.zeros(2400, 1, dtype=torch.long), y[:, :-1]], 1), y)

@drawn(24)
def sound(g, n=32, levels=16):
    "Two tones and noise in `levels` steps of loudness, as sequences and their successors."
    t = torch.arange(n + 1.)
    f, p = .1 + .5 * g.rand(2400, 2, 1), 6.28 * g.rand(2400, 2, 1)
    s = torch.sin(f * t + p).sum(1) / 2 + .02 * g.randn(2400, n + 1)
    k = ((s + 1) / 2 * levels).long().clamp(0, levels - 1)
    return split(k[:, :-1], k[:, 1:])

@drawn(28)
def lookups(g, n=10, vocab=20, asked=4):
    "Ten different words, then some of them again: at which place were they?"
    s = g.rand(4400, vocab).argsort(1)[:, :n]
    y = g.rand(4400, n).argsort(1)[:, :asked]
    return split(torch.cat([s, s.gather(1, y)], 1), y, 4000)

@drawn(29)
def pulses(g, n=64, noise=0.):
    "One channel of a heart-like signal of four kinds of beat, at any time, with drift; some labels are wrong."
    y = g.below(4, 2400)
    t = torch.arange(n)[None] - 16 - 32 * g.rand(2400, 1)
    one  = torch.exp(-t ** 2 / 4)
    kind = torch.stack([one, one - torch.exp(-(t - 4) ** 2 / 4), one + .8 * torch.exp(-(t - 9) ** 2 / 8),
                        torch.exp(-t ** 2 / 30)], 1)[torch.arange(2400), y]
    x = 2 * kind + .25 * g.randn(2400, n) + g.randn(2400, 1) * .3
    return split(x[:, None], mislabelled(y, noise, 4, g))

@drawn(25)
def films(g, n=6, size=8, noise=.2):
    "A spot that wanders in one of four directions, in noise."
    y = g.below(4, 2400)
    way = torch.tensor([[0, 1], [1, 0], [0, -1], [-1, 0]])[y]
    at  = (g.below(size, 2400, 1, 2) + way[:, None] * torch.arange(n)[:, None]) % size
    x   = torch.zeros(2400, n, size, size)
    i, t = torch.arange(2400)[:, None], torch.arange(n)
    x[i, t, at[..., 0], at[..., 1]] = 3.
    return split(x + noise * g.randn(x.shape), y)

@drawn(26)
def reminders(g, n=16):
    "What is shown in the first two frames must be remembered through noise."
    y = g.below(4, 2400)
    x = .3 * g.randn(2400, n, 8, 8)
    for q in range(4): x[y == q, :2, 4 * (q // 2):4 * (q // 2) + 4, 4 * (q % 2):4 * (q % 2) + 4] += 1.5
    return split(x, y)

@drawn(21)
def first(g, n=60):
    "Two noisy channels over time; the class of four is said in the first three steps alone."
    y = g.below(4, 2400)
    x = .3 * g.randn(2400, 2, n)
    x[:, :, :3] += torch.tensor([[-1., -1.], [-1., 1.], [1., -1.], [1., 1.]])[y][..., None]
    return split(x, y)


# --- tables, graphs, sets --------------------------------------------------------------------------------------------
@drawn(1)
def table(g):
    "2,000 rows of 12 features, a smooth nonlinear target."
    x = g.randn(2400, 12)
    return split(x, (torch.sin(2 * x[:, 0]) + x[:, 1] * x[:, 2] + x[:, 3:6].abs().sum(1) - 2.4)[:, None])

def noisy_table():
    "The same, the targets under noise."
    return tuple((x, y + 3 * Dice(4).randn(y.shape)) for x, y in table())

@drawn(6)
def categories(g, card=40, noise=0.):
    "2,000 rows of one category and six numbers: each category has its own answer among four, the numbers shift it."
    k = g.below(card, 2400)
    x = g.randn(2400, 6)
    w = g.randn(card, 4) * 2, g.randn(6, 4) * .7
    y = (w[0][k] + x @ w[1]).argmax(1)
    return split(torch.cat([k[:, None].float(), x], 1), mislabelled(y, noise, 4, g))

@drawn(12)
def ratings(g, users=80, items=50, noise=.2):
    "3,000 ratings from 1 to 5 of items by users."
    k = g.order(users * items)[:3400]
    u, i = k // items, k % items
    a, b = g.randn(users, 3), g.randn(items, 3)
    y = 3 + .5 * (g.randn(users)[u] + g.randn(items)[i]) + .6 * (a[u] * b[i]).sum(1)
    y = (y + noise * g.randn(3400)).clamp(1, 5)
    return split(torch.stack([u, i], 1), y, 3000)

CARDS = (30, 12, 6)

@drawn(13)
def adult(g, cards=CARDS, number=False):
    "Three categories and five numbers: which third of the incomes, or the income itself in a large unit."
    k = torch.stack([g.below(c, 2400) for c in cards], 1)
    x = g.randn(2400, 5)
    s = sum(g.randn(c)[k[:, i]] for i, c in enumerate(cards)) + x[:, 0] * x[:, 1] + x[:, 2].abs() - .8
    third = torch.bucketize(s, s.quantile(torch.tensor([.33, .67])))
    y = .1 * s[:, None] + .01 * g.randn(2400, 1) if number else third
    return split(torch.cat([k.float(), x], 1), y)

@drawn(14)
def graphs(g, n=12, noise=0.):
    "Adjacency beside four features of each node: a ring, a star, two cliques or two parties, with some wrong edges?"
    i = torch.arange(n)
    ring    = ((i[:, None] - i).abs() % (n - 2)).eq(1)
    star    = (i[:, None] == 0) ^ (i == 0)
    cliques = ((i[:, None] < n // 2) == (i < n // 2)) & (i[:, None] != i)
    parties = (i[:, None] < n // 3) ^ (i < n // 3)
    y = g.below(4, 2400)
    a = torch.stack([ring, star, cliques, parties])[y]
    a = a ^ (g.rand(2400, n, n) < .05).triu(1)
    a = a.triu(1).float()
    a = a + a.transpose(1, 2)
    deg = a.sum(2, keepdim=True)
    f = torch.cat([deg / 4 - 1, g.randn(2400, n, 3)], 2)
    return split(torch.cat([a, f], 2), mislabelled(y, noise, 4, g))

@drawn(15)
def points(g, n=32):
    "Points in the plane, turned by any angle: on a ring, a square's edge, a cross, or in a disc."
    y = g.below(4, 2400)
    t, u = g.rand(2400, n) * 2 * torch.pi, 2 * g.rand(2400, n) - 1
    ring  = torch.stack([t.cos(), t.sin()], 2)
    sides = torch.where((t < torch.pi)[..., None], torch.stack([u, (t * 2).sin().sign()], 2),
                        torch.stack([(t * 2).sin().sign(), u], 2))
    cross = torch.where((t < torch.pi)[..., None], torch.stack([u, 0 * u], 2), torch.stack([0 * u, u], 2)) * 1.4
    disc  = ring * u.abs().sqrt()[..., None] * 1.4
    x = torch.stack([ring, sides, cross, disc], 1)[torch.arange(2400), y]
    w = g.rand(2400) * 2 * torch.pi
    turn = torch.stack([torch.stack([w.cos(), -w.sin()], 1), torch.stack([w.sin(), w.cos()], 1)], 1)
    return split(x @ turn + .05 * g.randn(2400, n, 2), y)

@drawn(20)
def tasks(g, n=12, noise=.1):
    "A task's number beside six features: each task has a plane of its own, the answer is how far above it one is."
    k = g.below(n, 2400)
    x, w = g.randn(2400, 6), g.randn(n, 6)
    y = (x * w[k]).sum(1).relu() - 1 + noise * g.randn(2400)
    return split(torch.cat([k[:, None].float(), x], 1), y[:, None])

@drawn(22)
def played(g, noise=.3, outliers=0.):
    "A state of eight numbers; the action played and what it returned."
    x, a = g.randn(2400, 8), g.below(4, 2400)
    v, w = g.randn(8) / 2, g.randn(4, 8) / 2
    q = (x @ v).abs() + ((x @ w.T).tanh())[torch.arange(2400), a] + noise * g.randn(2400)
    return split(x, torch.stack([a.float(), off(q, outliers, 30, g)], 1))

@drawn(23)
def levels(g, noise=.2, rare=False):
    "Ten features and which of four thresholds the answer is above."
    x = g.randn(2400, 10)
    s = x[:, 0] + x[:, 1].abs() + x[:, 2] * x[:, 3] + .5 * x[:, 4:7].sum(1) + noise * g.randn(2400)
    cuts = s.quantile(torch.tensor([.5, .8, .95, .98] if rare else [.2, .4, .6, .8]))
    return split(x, (s[:, None] > cuts).float())

@drawn(25)
def arm(g, noise=.02):
    "The inverse of a curve that is not to be inverted: up to three answers to a question."
    y = g.rand(2400, 1)
    x = y + .3 * torch.sin(2 * torch.pi * y) + noise * g.randn(2400, 1)
    return split((x - .5) * 3.5, y)

@drawn(26)
def clicks(g, users=150, items=80, flip=0.):
    "Whether a user clicked on an item."
    u, i = g.below(users, 3400), g.below(items, 3400)
    a, b = g.randn(users, 2), g.randn(items, 2)
    s = 2 * (a[u] * b[i]).sum(1) + g.randn(items)[i]
    y = (s > .5) ^ (g.rand(3400) < flip)
    return split(torch.stack([u * 7919 + 13, i * 104729 + 7], 1), y[:, None].float(), 3000)

FIELDS = (60, 30, 20, 8)

@drawn(23)
def visits(g, fields=FIELDS, common=0., sharp=3.):
    "Four categories and four numbers of a visit, and whether it ended in a click."
    k = torch.stack([g.below(c, 2400) for c in fields], 1)
    e = [g.randn(c, 3)[k[:, i]] for i, c in enumerate(fields)]
    x = g.randn(2400, 4)
    s = (e[0] * e[1]).sum(1) + e[2][:, 0] + e[3][:, 0] * x[:, 0] + x[:, 1] * x[:, 2]
    s = sharp * (s / s.std() + common)
    y = (g.rand(2400) < s.sigmoid()).float()
    return split(torch.cat([k.float(), x], 1), y[:, None])

@drawn(27)
def regimes(g, outliers=0.):
    "Eight numbers; what follows from them is another thing in each of four regimes, which the first two tell."
    x = g.randn(2400, 8)
    k = 2 * (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    y = (x[:, 2:] * g.randn(4, 6)[k]).sum(1) / 2
    return split(x, off(y, outliers, 15, g)[:, None])
