"How a net starts: initialisations, a body that has learnt before, a low-rank branch."
from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from fastai.torch_core import Module
from torch import nn

from .data import upside_down


def kaiming(model, gain=1.):
    for m in model.modules():
        if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            nn.init.kaiming_normal_(m.weight, nonlinearity='relu'); m.weight.data.mul_(gain)
            if m.bias is not None: nn.init.zeros_(m.bias)
    return model

def normal(model, std):
    for p in model.parameters():
        if p.dim() > 1: nn.init.normal_(p, std=std) if std else nn.init.zeros_(p)
    return model

def xavier(model, gain=1.):
    for p in model.parameters():
        if p.dim() > 1: nn.init.xavier_normal_(p, gain)
    return model

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

class Lora(Module):
    "A frozen linear layer beside a low-rank branch that starts at zero."
    def __init__(self, lin, r=4):
        self.lin = lin.requires_grad_(False)
        self.a, self.b = nn.Linear(lin.in_features, r, bias=False), nn.Linear(r, lin.out_features, bias=False)
        nn.init.zeros_(self.b.weight)
    def forward(self, x): return self.lin(x) + self.b(self.a(x))
