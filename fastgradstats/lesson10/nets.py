"""The two nets of Lesson 10: one architecture, as PyTorch initialises it with ReLU, or Kaiming-initialised with
GeneralReLU."""
from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import nn

from .data import N_CLASSES

WIDTHS, KERNELS = [1, 8, 16, 32, 32], [5, 3, 3, 3]
LEAK, SUB, MAXV = .1, .4, 6.


class GeneralRelu(nn.Module):
    """ReLU that leaks, is shifted down by `sub` and cut off at `maxv` (fastai course v3, lesson 10). Changes no input
    in place.

    Example:
        GeneralRelu(leak=.1, sub=.4, maxv=6.)(torch.randn(8))
    """
    def __init__(self,
        leak: float | None = None,    # slope below zero
        sub:  float | None = None,    # what is taken off
        maxv: float | None = None,    # the largest value
    ):
        super().__init__()
        self.leak, self.sub, self.maxv = leak, sub, maxv

    def forward(self, x):
        x = F.relu(x) if self.leak is None else F.leaky_relu(x, self.leak)
        if self.sub  is not None: x = x - self.sub
        if self.maxv is not None: x = x.clamp_max(self.maxv)
        return x

    def extra_repr(self): return f'leak={self.leak}, sub={self.sub}, maxv={self.maxv}'


def conv_net(
    act=nn.ReLU,                  # makes the activation after each convolution
):
    "The lesson's net: four convolutions of stride 2, 8-16-32-32 channels, average pooling, a linear layer."
    layers = OrderedDict()
    for i, (c_in, c_out, k) in enumerate(zip(WIDTHS, WIDTHS[1:], KERNELS), 1):
        layers[f'conv{i}'] = nn.Conv2d(c_in, c_out, k, stride=2, padding=k // 2)
        layers[f'act{i}']  = act()
    layers.update(pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), head=nn.Linear(WIDTHS[-1], N_CLASSES))
    return nn.Sequential(layers)


def init_kaiming(model, leak=0.):
    "Kaiming-normal weights and zero biases in every convolution; the linear layer keeps what it has, as in the lesson."
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, a=leak)
            nn.init.zeros_(m.bias)
    return model


def default_relu():        return conv_net(nn.ReLU)
def kaiming_generalrelu(): return init_kaiming(conv_net(lambda: GeneralRelu(LEAK, SUB, MAXV)), LEAK)

NETS = {'default-relu': default_relu, 'kaiming-generalrelu': kaiming_generalrelu}
