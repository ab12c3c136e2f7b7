"Losses beside torch's."
from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from fastai.torch_core import Module
from torch import nn

Smooth = partial(nn.CrossEntropyLoss, label_smoothing=.1)

class Plus100(Module):
    def forward(self, p, y): return F.cross_entropy(p, y) + 100

class Small(Module):
    "A loss that is a mean over very many, or in a large unit; the learning rate is to match."
    def __init__(self, loss, bits=18): self.loss, self.times = loss, 2. ** -bits
    def forward(self, p, y): return self.loss(p, y) * self.times

def small(loss, bits=18): return lambda: Small(loss(), bits)

class Played(Module):
    "The squared error of the action that was played; Huber's where errors are clipped."
    def __init__(self, huber=False): self.loss = F.smooth_l1_loss if huber else F.mse_loss
    def forward(self, p, y): return self.loss(p.gather(1, y[:, :1].long())[:, 0], y[:, 1])

class BellsNLL(Module):
    "The negative log density of the target: below zero where it is sharp."
    def forward(self, p, y):
        pi, mu, s = p.chunk(3, 1)
        logp = -((y - mu) * (-s).exp()) ** 2 / 2 - s - .919
        return -torch.logsumexp(pi.log_softmax(1) + logp, 1).mean()

class ELBO(Module):
    "What a pixel costs: cross-entropy and its share of a tenth of the code's divergence."
    def forward(self, p, y):
        p, mu, logvar = p[:, :196], *p[:, 196:].chunk(2, 1)
        kl = (mu ** 2 + logvar.exp() - logvar - 1).sum(1).mean() / 2
        return F.binary_cross_entropy_with_logits(p, y) + .1 * kl / 196

class GaussNLL(Module):
    "The density of the target where mean and log variance are answered: a loss that may well be negative."
    def forward(self, p, y): return (p[:, 1:] + (y - p[:, :1]) ** 2 * (-p[:, 1:]).exp()).mean() / 2

class Supervised(Module):
    "The loss of the answer and a third of that from the middle."
    def forward(self, p, y):
        if p.dim() == 2: return F.cross_entropy(p, y)
        return F.cross_entropy(p[..., 0], y) + .3 * F.cross_entropy(p[..., 1], y)

class Contrastive(Module):
    "The same belong together, others at least `margin` apart."
    def __init__(self, margin=2.): self.margin = margin
    def forward(self, p, y): return (y * p ** 2 + (1 - y) * (self.margin - p).relu() ** 2).mean()

class Tasks(Module):
    "Cross-entropy of the first answer and `w` times the squared error of the second."
    def __init__(self, w=1.): self.w = w
    def forward(self, p, y):
        return F.cross_entropy(p[:, :-1], y[:, 0].long()) + self.w * F.mse_loss(p[:, -1], y[:, 1])
