"Data: digits and small tasks, as a rule 2,000 examples to train and 400 to validate, the same in every run."
from __future__ import annotations

from functools import cache, wraps

import torch
import torch.nn.functional as F

from fastgradstats.lesson10.data import digits


def gen(seed): return torch.Generator().manual_seed(seed)

def drawn(seed):
    "Data that are made once, with random numbers of their own: `g`, a function's first argument."
    return lambda make: cache(wraps(make)(lambda *args, **kwargs: make(gen(seed), *args, **kwargs)))

def split(x, y, n=2000): return (x[:n], y[:n]), (x[n:], y[n:])

def mislabelled(y, share, classes, g):
    "A share of the labels is any of the classes."
    return torch.where(torch.rand(y.shape, generator=g) < share, torch.randint(0, classes, y.shape, generator=g), y)

def off(y, share, by, g):
    "A share of the answers is far off."
    return torch.where(torch.rand(y.shape, generator=g) < share, by * torch.randn(y.shape, generator=g), y)


# --- images ----------------------------------------------------------------------------------------------------------
@drawn(0)
def images(g, flat=False):
    "2,000 digits of 14 x 14 to train, 400 to validate."
    d = digits()
    k, v = torch.randperm(len(d.x_train), generator=g)[:2000], torch.randperm(1000, generator=g)[:400]
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
    return tuple((x, x + noise * torch.randn(x.shape, generator=g)) for x, _ in images(True))

@cache
def grey():
    "Digits with pixels from 0 to 1 that are their own target."
    return tuple(((x - x.min()) / (x.max() - x.min()),) * 2 for x, _ in images(True))

@drawn(8)
def masks(g, level=.8):
    "Digits under noise, 16 x 16; which of the pixels are ink, or above `level` the thickest of it?"
    pad = lambda x: F.pad(x, (1, 1, 1, 1), value=float(x.min()))
    return tuple((pad(x) + .7 * torch.randn(len(x), 1, 16, 16, generator=g), (pad(x)[:, 0] > level).long())
                 for x, _ in images())

@cache
def upside_down():
    "What a body was pretrained on: the digits turned by half a circle."
    return tuple((x.flip(2, 3), y) for x, y in images())

@drawn(21)
def couples(g, same=.5, n=4000):
    "Two digits, and whether they are the same number."
    def put(x, y, n):
        a   = torch.randint(0, len(x), (n,), generator=g)
        yes = torch.rand(n, generator=g) < same
        w   = torch.rand(n, len(x), generator=g) * (y[a][:, None] == y).eq(yes[:, None])
        b   = w.argmax(1)
        return torch.stack([x[a], x[b]], 1), yes[:, None].float()
    return tuple(put(x, y, k) for (x, y), k in zip(images(True), (n, 400)))

@cache
def both():
    "Digits with two answers: which, and how much ink."
    return tuple((x, torch.stack([y.float(), x.mean((1, 2, 3)) / .2], 1)) for x, y in images())

def rare_digits(kept=.08):
    "Digits below 5 are many, the others rare."
    return tuple((x[k], y[k]) for x, y in images() for k in [(y < 5) | (torch.rand(len(y), generator=gen(30)) < kept)])

@drawn(22)
def picture(g, outliers=0.):
    "Places in a picture, from -1 to 1, and how bright it is there; of some the brightness is wrong."
    x = 2 * torch.rand(2400, 2, generator=g) - 1
    r = x.norm(dim=1)
    y = torch.sin(7 * r) + torch.cos(4 * x[:, 0] + 2 * x[:, 1]) + (x[:, 1] > .3 * torch.sin(5 * x[:, 0])).float()
    return split(x, off((y - y.mean()) / y.std(), outliers, 20, g)[:, None])

@drawn(24)
def audio(g, n=512):
    "Half a second of sound: a tone, one that rises, falls or trembles, or clicks, somewhere and under noise."
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
    p = torch.softmax(1.5 * torch.randn(vocab, vocab, generator=g), 1)
    s = [0]
    draws = torch.rand(2400 * n + 1, generator=g)
    c = p.cumsum(1)
    for u in draws: s.append(min(int(torch.searchsorted(c[s[-1]], u)), vocab - 1))
    t = torch.tensor(s)
    return split(t[:-1].unfold(0, n, n)[:2400], t[1:].unfold(0, n, n)[:2400])

@drawn(5)
def waves(g, n=48):
    "2,000 noisy waves of two channels: five classes are five frequencies, the phase is anyone's."
    y = torch.randint(0, 5, (2400,), generator=g)
    t = torch.arange(n) / n
    p = torch.rand(2400, 2, 1, generator=g)
    x = torch.sin(2 * torch.pi * ((2 + y)[:, None, None] * t + p)) + .4 * torch.randn(2400, 2, n, generator=g)
    return split(x, y)

@drawn(9)
def sentences(g, n=24, vocab=300):
    "Words of which the common are common: each of four topics has 10 words of its own, a sentence has some of one."
    y = torch.randint(0, 4, (2400,), generator=g)
    x = 40 + torch.multinomial(1 / torch.arange(1., vocab - 39), 2400 * n, True, generator=g).view(2400, n)
    own = y[:, None] * 10 + torch.randint(0, 10, (2400, n), generator=g)
    return split(torch.where(torch.rand(2400, n, generator=g) < .12, own, x), y)

@drawn(10)
def tags(g, n=16, vocab=60, noise=0.):
    "Words and their parts of speech, four; of every second word the part is that of the word behind it."
    x = torch.randint(0, vocab, (2400, n + 1), generator=g)
    y = torch.where(x[:, :-1] % 2 == 0, x[:, :-1] // 2 % 4, x[:, 1:] // 2 % 4)
    return split(x[:, :-1], mislabelled(y, noise, 4, g))

@drawn(11)
def reversals(g, n=6, vocab=10):
    "A sequence of numbers, then the target's numbers so far (a start token is 0); the target is its reversal."
    s = torch.randint(1, vocab, (2400, n), generator=g)
    y = s.flip(1)
    return split(torch.cat([s, torch.zeros(2400, 1, dtype=torch.long), y[:, :-1]], 1), y)

@drawn(24)
def sound(g, n=32, levels=16):
    "Two tones and noise in `levels` steps of loudness, as sequences and their successors."
    t = torch.arange(n + 1.)
    f, p = .1 + .5 * torch.rand(2400, 2, 1, generator=g), 6.28 * torch.rand(2400, 2, 1, generator=g)
    s = torch.sin(f * t + p).sum(1) / 2 + .02 * torch.randn(2400, n + 1, generator=g)
    k = ((s + 1) / 2 * levels).long().clamp(0, levels - 1)
    return split(k[:, :-1], k[:, 1:])

@drawn(28)
def lookups(g, n=10, vocab=20, asked=4):
    "Ten different words, then some of them again: at which place were they?"
    s = torch.rand(4400, vocab, generator=g).argsort(1)[:, :n]
    y = torch.rand(4400, n, generator=g).argsort(1)[:, :asked]
    return split(torch.cat([s, s.gather(1, y)], 1), y, 4000)

@drawn(29)
def pulses(g, n=64, noise=0.):
    "One channel of a heart-like signal of four kinds of beat, at any time, with drift; some labels are wrong."
    y = torch.randint(0, 4, (2400,), generator=g)
    t = torch.arange(n)[None] - 16 - 32 * torch.rand(2400, 1, generator=g)
    one  = torch.exp(-t ** 2 / 4)
    kind = torch.stack([one, one - torch.exp(-(t - 4) ** 2 / 4), one + .8 * torch.exp(-(t - 9) ** 2 / 8),
                        torch.exp(-t ** 2 / 30)], 1)[torch.arange(2400), y]
    x = 2 * kind + .25 * torch.randn(2400, n, generator=g) + torch.randn(2400, 1, generator=g) * .3
    return split(x[:, None], mislabelled(y, noise, 4, g))

@drawn(25)
def films(g, n=6, size=8, noise=.2):
    "A spot that wanders in one of four directions, in noise."
    y = torch.randint(0, 4, (2400,), generator=g)
    way = torch.tensor([[0, 1], [1, 0], [0, -1], [-1, 0]])[y]
    at  = (torch.randint(0, size, (2400, 1, 2), generator=g) + way[:, None] * torch.arange(n)[:, None]) % size
    x   = torch.zeros(2400, n, size, size)
    i, t = torch.arange(2400)[:, None], torch.arange(n)
    x[i, t, at[..., 0], at[..., 1]] = 3.
    return split(x + noise * torch.randn(x.shape, generator=g), y)

@drawn(26)
def reminders(g, n=16):
    "What is shown in the first two frames must be remembered through noise."
    y = torch.randint(0, 4, (2400,), generator=g)
    x = .3 * torch.randn(2400, n, 8, 8, generator=g)
    for q in range(4): x[y == q, :2, 4 * (q // 2):4 * (q // 2) + 4, 4 * (q % 2):4 * (q % 2) + 4] += 1.5
    return split(x, y)

@drawn(21)
def first(g, n=60):
    "Two noisy channels over time; the class of four is said in the first three steps alone."
    y = torch.randint(0, 4, (2400,), generator=g)
    x = .3 * torch.randn(2400, 2, n, generator=g)
    x[:, :, :3] += torch.tensor([[-1., -1.], [-1., 1.], [1., -1.], [1., 1.]])[y][..., None]
    return split(x, y)


# --- tables, graphs, sets --------------------------------------------------------------------------------------------
@drawn(1)
def table(g):
    "2,000 rows of 12 features, a smooth nonlinear target."
    x = torch.randn(2400, 12, generator=g)
    return split(x, (torch.sin(2 * x[:, 0]) + x[:, 1] * x[:, 2] + x[:, 3:6].abs().sum(1) - 2.4)[:, None])

def noisy_table():
    "The same, the targets under noise."
    return tuple((x, y + 3 * torch.randn(y.shape, generator=gen(4))) for x, y in table())

@drawn(6)
def categories(g, card=40, noise=0.):
    "2,000 rows of one category and six numbers: each category has its own answer among four, the numbers shift it."
    k = torch.randint(0, card, (2400,), generator=g)
    x = torch.randn(2400, 6, generator=g)
    w = torch.randn(card, 4, generator=g) * 2, torch.randn(6, 4, generator=g) * .7
    y = (w[0][k] + x @ w[1]).argmax(1)
    return split(torch.cat([k[:, None].float(), x], 1), mislabelled(y, noise, 4, g))

@drawn(12)
def ratings(g, users=80, items=50, noise=.2):
    "3,000 ratings from 1 to 5 of items by users."
    k = torch.randperm(users * items, generator=g)[:3400]
    u, i = k // items, k % items
    a, b = torch.randn(users, 3, generator=g), torch.randn(items, 3, generator=g)
    y = 3 + .5 * (torch.randn(users, generator=g)[u] + torch.randn(items, generator=g)[i]) + .6 * (a[u] * b[i]).sum(1)
    y = (y + noise * torch.randn(3400, generator=g)).clamp(1, 5)
    return split(torch.stack([u, i], 1), y, 3000)

CARDS = (30, 12, 6)

@drawn(13)
def adult(g, cards=CARDS, number=False):
    "Three categories and five numbers: which third of the incomes, or the income itself in a large unit."
    k = torch.stack([torch.randint(0, c, (2400,), generator=g) for c in cards], 1)
    x = torch.randn(2400, 5, generator=g)
    s = sum(torch.randn(c, generator=g)[k[:, i]] for i, c in enumerate(cards)) + x[:, 0] * x[:, 1] + x[:, 2].abs() - .8
    third = torch.bucketize(s, s.quantile(torch.tensor([.33, .67])))
    y = .1 * s[:, None] + .01 * torch.randn(2400, 1, generator=g) if number else third
    return split(torch.cat([k.float(), x], 1), y)

@drawn(14)
def graphs(g, n=12, noise=0.):
    "Adjacency beside four features of each node: a ring, a star, two cliques or two parties, with some wrong edges?"
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
    return split(torch.cat([a, f], 2), mislabelled(y, noise, 4, g))

@drawn(15)
def points(g, n=32):
    "Points in the plane, turned by any angle: on a ring, a square's edge, a cross, or in a disc."
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

@drawn(20)
def tasks(g, n=12, noise=.1):
    "A task's number beside six features: each task has a plane of its own, the answer is how far above it one is."
    k = torch.randint(0, n, (2400,), generator=g)
    x, w = torch.randn(2400, 6, generator=g), torch.randn(n, 6, generator=g)
    y = (x * w[k]).sum(1).relu() - 1 + noise * torch.randn(2400, generator=g)
    return split(torch.cat([k[:, None].float(), x], 1), y[:, None])

@drawn(22)
def played(g, noise=.3, outliers=0.):
    "A state of eight numbers; the action played and what it returned."
    x, a = torch.randn(2400, 8, generator=g), torch.randint(0, 4, (2400,), generator=g)
    v, w = torch.randn(8, generator=g) / 2, torch.randn(4, 8, generator=g) / 2
    q = (x @ v).abs() + ((x @ w.T).tanh())[torch.arange(2400), a] + noise * torch.randn(2400, generator=g)
    return split(x, torch.stack([a.float(), off(q, outliers, 30, g)], 1))

@drawn(23)
def levels(g, noise=.2, rare=False):
    "Ten features and which of four thresholds the answer is above."
    x = torch.randn(2400, 10, generator=g)
    s = x[:, 0] + x[:, 1].abs() + x[:, 2] * x[:, 3] + .5 * x[:, 4:7].sum(1) + noise * torch.randn(2400, generator=g)
    cuts = s.quantile(torch.tensor([.5, .8, .95, .98] if rare else [.2, .4, .6, .8]))
    return split(x, (s[:, None] > cuts).float())

@drawn(25)
def arm(g, noise=.02):
    "The inverse of a curve that is not to be inverted: up to three answers to a question."
    y = torch.rand(2400, 1, generator=g)
    x = y + .3 * torch.sin(2 * torch.pi * y) + noise * torch.randn(2400, 1, generator=g)
    return split((x - .5) * 3.5, y)

@drawn(26)
def clicks(g, users=150, items=80, flip=0.):
    "Whether a user clicked on an item."
    u, i = torch.randint(0, users, (3400,), generator=g), torch.randint(0, items, (3400,), generator=g)
    a, b = torch.randn(users, 2, generator=g), torch.randn(items, 2, generator=g)
    s = 2 * (a[u] * b[i]).sum(1) + torch.randn(items, generator=g)[i]
    y = (s > .5) ^ (torch.rand(3400, generator=g) < flip)
    return split(torch.stack([u * 7919 + 13, i * 104729 + 7], 1), y[:, None].float(), 3000)

FIELDS = (60, 30, 20, 8)

@drawn(23)
def visits(g, fields=FIELDS, common=0., sharp=3.):
    "Four categories and four numbers of a visit, and whether it ended in a click."
    k = torch.stack([torch.randint(0, c, (2400,), generator=g) for c in fields], 1)
    e = [torch.randn(c, 3, generator=g)[k[:, i]] for i, c in enumerate(fields)]
    x = torch.randn(2400, 4, generator=g)
    s = (e[0] * e[1]).sum(1) + e[2][:, 0] + e[3][:, 0] * x[:, 0] + x[:, 1] * x[:, 2]
    s = sharp * (s / s.std() + common)
    y = (torch.rand(2400, generator=g) < s.sigmoid()).float()
    return split(torch.cat([k.float(), x], 1), y[:, None])

@drawn(27)
def regimes(g, outliers=0.):
    "Eight numbers; what follows from them is another thing in each of four regimes, which the first two tell."
    x = torch.randn(2400, 8, generator=g)
    k = 2 * (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    y = (x[:, 2:] * torch.randn(4, 6, generator=g)[k]).sum(1) / 2
    return split(x, off(y, outliers, 15, g)[:, None])
