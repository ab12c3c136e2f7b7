"What the families learn from: drawn tables, digits, the source text of Python's own library; and small nets."
from __future__ import annotations

import os
import re
import zlib
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from fastai.torch_core import Module
from torch import nn

from ..data import images
from .training import dense

MODULES = 'argparse', 'inspect', 'typing', 'tarfile', 'subprocess', 'mailbox', 'pdb', 'doctest'


def unknown(x, units=8):
    "A smooth function of the rows of x, drawn anew, of mean 0 and deviation 1."
    y = torch.tanh(x @ torch.randn(x.shape[1], units) / x.shape[1] ** .5 * 1.5) @ torch.randn(units)
    return (y - y.mean()) / y.std()

@cache
def digits(flat=False):
    "2,400 images of 14 x 14 and their classes."
    (x, y), (xv, yv) = images(flat)
    return torch.cat([x, xv]), torch.cat([y, yv])

@cache
def sources(): return [(Path(os.__file__).parent / f'{m}.py').read_text(encoding='utf-8') for m in MODULES]

@cache
def lines(n=256):
    "Which of n hashed words the lines of eight modules have (three lines in a row), and of which module they are."
    x, y = [], []
    for k, text in enumerate(sources()):
        rows = [r for r in text.split('\n') if len(r) > 25][:1500]
        for a, b, c in zip(rows[::3], rows[1::3], rows[2::3]):
            bag = torch.zeros(n)
            bag[[zlib.crc32(w.encode()) % n for w in re.findall(r'\w+', a + ' ' + b + ' ' + c)]] = 1
            x.append(bag); y.append(k)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return torch.stack(x)[order], torch.tensor(y)[order]

@cache
def characters(n=60_000):
    "Characters of Python source as numbers, and how many kinds there are."
    text  = ''.join(sources())[:n]
    known = sorted(set(text))
    return torch.tensor([known.index(c) for c in text]), len(known)

def pole(s, a):
    "The next states of carts with poles when pushed left (0) or right (1), and which still stand: Barto et al. 1983."
    x, v, t, u = s.T
    push = (20. * a - 10. + .05 * u ** 2 * t.sin()) / 1.1
    fall = (9.8 * t.sin() - t.cos() * push) / (.5 * (4 / 3 - .1 * t.cos() ** 2 / 1.1))
    s    = s + .02 * torch.stack([v, push - .05 * fall * t.cos() / 1.1, u, fall], 1)
    return s, (s[:, 0].abs() < 2.4) & (s[:, 2].abs() < .21)

def nearest(model, x, y):
    "The share of rows whose nearest other row, as the model sees them, is of the same class."
    with torch.no_grad(): z = F.normalize(model(x), dim=1)
    return (y[(z @ z.T).fill_diagonal_(-9).argmax(1)] == y).float().mean()

def right(p, y): return (p.argmax(1) == y).float().mean()

def corr(a, b): return torch.corrcoef(torch.stack([a.detach(), b]))[0, 1]

def auc(p, y):
    "The share of pairs of a positive and a negative that are in order."
    return (p[y > .5][:, None] > p[y < .5]).float().mean()

def convs(out, norm=nn.BatchNorm2d, width=16):
    "A small net for digits."
    f = lambda a, b: (nn.Conv2d(a, b, 3, 2, 1), norm(b), nn.ReLU())
    return nn.Sequential(*f(1, width), *f(width, 2 * width), nn.Flatten(), nn.Linear(32 * width, out))

class Embedded(Module):
    "A net of a few embedded things in a row."
    def __init__(self, vocab, n, out, width=16, hidden=128):
        self.emb, self.net = nn.Embedding(vocab, width), dense(n * width, hidden, out, act=nn.Tanh)
    def forward(self, x): return self.net(self.emb(x).flatten(1))
