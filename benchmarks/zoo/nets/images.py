"Nets for images."
from __future__ import annotations

import torch
import torch.nn.functional as F
from fastai.layers import AdaptiveConcatPool2d, LinBnDrop
from fastai.torch_core import Module
from fastai.vision.models.xresnet import ResBlock, XResNet
from torch import nn

from ..init import kaiming


def bn(c, norm=True):        return nn.BatchNorm2d(c) if norm else nn.Identity()
def maybe_bn(c, norm):       return [nn.BatchNorm2d(c)] if norm else []
def ends(c, n=10):           return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, n)]
def conv(a, b, k, stride=1): return [nn.Conv2d(a, b, k, stride, k // 2), nn.ReLU()]

def cnn(widths=(8, 16, 16), act=nn.ReLU, norm=False):
    layers, c = [], 1
    for i, w in enumerate(widths):
        layers += [nn.Conv2d(c, w, 3, 2 if i < 3 else 1, 1), *maybe_bn(w, norm), act()]
        c = w
    return nn.Sequential(*layers, *ends(c))

class Block(Module):
    def __init__(self, c, norm=True):
        self.conv1, self.norm1, self.act1 = nn.Conv2d(c, c, 3, padding=1), bn(c, norm), nn.ReLU()
        self.conv2, self.norm2, self.act2 = nn.Conv2d(c, c, 3, padding=1), bn(c, norm), nn.ReLU()
    def forward(self, x): return self.act2(x + self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x))))))

def resnet(blocks=4, c=12, norm=True):
    last = ends(c)
    stem = [nn.Conv2d(1, c, 3, 2, 1), bn(c, norm), nn.ReLU()]
    return nn.Sequential(*stem, *[Block(c, norm) for _ in range(blocks)], *last)

def vgg(groups=((8, 2), (16, 2)), norm=True, drop=0.):
    "Groups of 3 x 3 convolutions, each ends with max pooling."
    layers, c = [], 1
    for w, n in groups:
        for _ in range(n):
            layers += [nn.Conv2d(c, w, 3, padding=1), *maybe_bn(w, norm), nn.ReLU()]
            c = w
        layers.append(nn.MaxPool2d(2))
    if drop: layers.append(nn.Dropout(drop))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(c * 9, 10))

class Separable(Module):
    "Depthwise, then pointwise; a shortcut where nothing changes its size."
    def __init__(self, a, b, stride=1):
        self.deep = nn.Conv2d(a, a, 3, stride, 1, groups=a, bias=False)
        self.norm1, self.act1 = nn.BatchNorm2d(a), nn.ReLU6()
        self.point, self.norm2, self.act2 = nn.Conv2d(a, b, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU6()
        self.short = a == b and stride == 1
    def forward(self, x):
        y = self.norm2(self.point(self.act1(self.norm1(self.deep(x)))))
        return self.act2(x + y if self.short else y)

def mobile(c=12):
    stem = [nn.Conv2d(1, c, 3, 2, 1, bias=False), nn.BatchNorm2d(c), nn.ReLU6()]
    last = ends(2 * c)
    return nn.Sequential(*stem, Separable(c, c), Separable(c, 2 * c, 2), Separable(2 * c, 2 * c), *last)

class ViT(Module):
    "16 patches of a digit, two encoder layers, the mean."
    def __init__(self, d=32, depth=2):
        self.patch, self.pos = nn.Conv2d(1, d, 3, stride=3), nn.Parameter(.02 * torch.randn(16, d))
        make = lambda: nn.TransformerEncoderLayer(d, 2, 2 * d, 0., 'gelu', batch_first=True, norm_first=True)
        self.blocks = nn.Sequential(*[make() for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 10)
    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2) + self.pos
        return self.head(self.norm(self.blocks(x)).mean(1))

class Mix(Module):
    def __init__(self, n, d):
        self.norm1, self.up1, self.act1 = nn.LayerNorm(d), nn.Linear(n, 2 * n), nn.GELU()
        self.down1 = nn.Linear(2 * n, n)
        self.norm2, self.up2, self.act2 = nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.GELU()
        self.down2 = nn.Linear(2 * d, d)
    def forward(self, x):
        x = x + self.down1(self.act1(self.up1(self.norm1(x).transpose(1, 2)))).transpose(1, 2)
        return x + self.down2(self.act2(self.up2(self.norm2(x))))

class Mixer(Module):
    "An MLP over the patches and one over the channels, in turns."
    def __init__(self, d=24, depth=3):
        self.patch, self.blocks = nn.Conv2d(1, d, 3, stride=3), nn.Sequential(*[Mix(16, d) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 10)
    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(1))

class Grow(Module):
    "A dense layer: what came in, and `k` more channels."
    def __init__(self, c, k, norm):
        self.norm = bn(c, norm)
        self.act, self.conv = nn.ReLU(), nn.Conv2d(c, k, 3, padding=1)
    def forward(self, x): return torch.cat([x, self.conv(self.act(self.norm(x)))], 1)

def densenet(c=8, k=6, n=2, norm=True):
    d    = c + n * k
    e    = d // 2 + n * k
    grow = lambda c: [Grow(c + i * k, k, norm) for i in range(n)]
    stem = [nn.Conv2d(1, c, 3, 2, 1), bn(c, norm), nn.ReLU()]
    half = [bn(d, norm), nn.ReLU(), nn.Conv2d(d, d // 2, 1), nn.AvgPool2d(2, ceil_mode=True)]
    last = [bn(e, norm), nn.ReLU(), *ends(e)]
    return nn.Sequential(*stem, *grow(c), *half, *grow(d // 2), *last)

def twice(a, b, norm):
    layers = []
    for c in (a, b): layers += [nn.Conv2d(c, b, 3, padding=1), *maybe_bn(b, norm), nn.ReLU()]
    return nn.Sequential(*layers)

class UNet(Module):
    "Down two times, up two times, with what was seen on the way down."
    def __init__(self, c=4, norm=True):
        self.down1, self.down2, self.deep = twice(1, c, norm), twice(c, 2 * c, norm), twice(2 * c, 4 * c, norm)
        self.wide2, self.up2 = nn.ConvTranspose2d(4 * c, 2 * c, 2, 2), twice(4 * c, 2 * c, norm)
        self.wide1, self.up1 = nn.ConvTranspose2d(2 * c, c, 2, 2), twice(2 * c, c, norm)
        self.head, self.softmax = nn.Conv2d(c, 2, 1), False
    def forward(self, x):
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        x = self.up2(torch.cat([self.wide2(self.deep(F.max_pool2d(b, 2))), b], 1))
        x = self.head(self.up1(torch.cat([self.wide1(x), a], 1)))
        return x.softmax(1) if self.softmax else x

class NextBlock(Module):
    "Depthwise, norm, up, GELU, down, a learnt scale."
    def __init__(self, d, gamma):
        self.deep, self.norm = nn.Conv2d(d, d, 3, padding=1, groups=d), nn.LayerNorm(d)
        self.up, self.act, self.down = nn.Linear(d, 3 * d), nn.GELU(), nn.Linear(3 * d, d)
        self.gamma = nn.Parameter(torch.full((d,), gamma))
    def forward(self, x):
        y = self.norm(self.deep(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.down(self.act(self.up(y)))).permute(0, 3, 1, 2)

class ConvNext(Module):
    def __init__(self, d=16, depth=2, gamma=.1):
        self.stem = nn.Conv2d(1, d, 2, 2)
        self.blocks = nn.Sequential(*[NextBlock(d, gamma) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 10)
    def forward(self, x): return self.head(self.norm(self.blocks(self.stem(x)).mean((2, 3))))

class Squeeze(Module):
    "Each channel weighed by what all of them say on average."
    def __init__(self, c, r=4):
        self.fc1, self.act, self.fc2, self.gate = nn.Linear(c, c // r), nn.ReLU(), nn.Linear(c // r, c), nn.Sigmoid()
    def forward(self, x): return x * self.gate(self.fc2(self.act(self.fc1(x.mean((2, 3))))))[..., None, None]

def senet(widths=(12, 24, 24), act=nn.ReLU, drop=0.):
    layers, c = [], 1
    for i, w in enumerate(widths):
        layers += [nn.Conv2d(c, w, 3, 2 if i < 2 else 1, 1), nn.BatchNorm2d(w), act(), Squeeze(w)]
        c = w
    if drop: layers.append(nn.Dropout(drop))
    return nn.Sequential(*layers, *ends(c))

class MBConv(Module):
    "Up, depthwise, weigh each channel, down."
    def __init__(self, a, b, stride=1, grow=3, norm=True):
        c = a * grow
        self.up, self.norm1, self.act1   = nn.Conv2d(a, c, 1), bn(c, norm), nn.SiLU()
        self.deep, self.norm2, self.act2 = nn.Conv2d(c, c, 3, stride, 1, groups=c), bn(c, norm), nn.SiLU()
        self.less, self.act3, self.more, self.gate = nn.Linear(c, c // 4), nn.SiLU(), nn.Linear(c // 4, c), nn.Sigmoid()
        self.down, self.norm3, self.short = nn.Conv2d(c, b, 1), bn(b, norm), a == b and stride == 1
    def forward(self, x):
        y = self.act2(self.norm2(self.deep(self.act1(self.norm1(self.up(x))))))
        y = y * self.gate(self.more(self.act3(self.less(y.mean((2, 3))))))[..., None, None]
        y = self.norm3(self.down(y))
        return x + y if self.short else y

def effnet(c=8, norm=True, drop=0.):
    "Like EfficientNet; 0 is the stem, 3 to 5 the blocks, 6 to 8 the top."
    stem = [nn.Conv2d(1, c, 3, 2, 1), bn(c, norm), nn.SiLU()]
    body = [MBConv(c, c, norm=norm), MBConv(c, 2 * c, 2, norm=norm), MBConv(2 * c, 2 * c, norm=norm)]
    top  = [nn.Conv2d(2 * c, 4 * c, 1), bn(4 * c, norm), nn.SiLU(), *([nn.Dropout(drop)] if drop else [])]
    return nn.Sequential(*stem, *body, *top, *ends(4 * c))

class Shuffle(Module):
    "Grouped pointwise convolutions; in between the groups' channels are mixed."
    def __init__(self, c, groups=4):
        self.groups = groups
        self.conv1, self.norm1, self.act1 = nn.Conv2d(c, c, 1, groups=groups), bn(c), nn.ReLU()
        self.deep, self.norm2 = nn.Conv2d(c, c, 3, 1, 1, groups=c), bn(c)
        self.conv2, self.norm3, self.act2 = nn.Conv2d(c, c, 1, groups=groups), bn(c), nn.ReLU()
    def forward(self, x):
        y = self.act1(self.norm1(self.conv1(x)))
        y = y.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)
        return self.act2(x + self.norm3(self.conv2(self.norm2(self.deep(y)))))

def shuffle(c=16, n=3, groups=4):
    return nn.Sequential(nn.Conv2d(1, c, 3, 2, 1), bn(c), nn.ReLU(), *[Shuffle(c, groups) for _ in range(n)], *ends(c))

class Outer(Module):
    "Which channels are on together: their products' mean over the image, its signed root, at length one."
    def forward(self, x):
        x = x.flatten(2)
        x = (x @ x.transpose(1, 2) / x.shape[2]).flatten(1)
        return F.normalize(x.sign() * ((x.abs() + 1e-4).sqrt() - .01), dim=1) * x.shape[1] ** .5

def bilinear(widths=(8, 16, 12), act=nn.ReLU, drop=0.):
    "Convolutions at 0, 2, 4, their activations behind them, at 6 the products."
    layers, c = [], 1
    for i, w in enumerate(widths):
        layers += [nn.Conv2d(c, w, 3, 2 if i < 2 else 1, 1), act()]
        c = w
    return nn.Sequential(*layers, Outer(), *([nn.Dropout(drop)] if drop else []), nn.Linear(c * c, 10))

class Standard(nn.Conv2d):
    "A convolution whose weights are standardised as they are used, with a gain of its own."
    def __init__(self, *args, gain=1.7, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.full((self.out_channels, 1, 1, 1), float(gain)))
    def forward(self, x):
        w   = self.weight
        std = (w.var((1, 2, 3), keepdim=True) * w[0].numel() + 1e-4).sqrt()
        return self._conv_forward(x, self.gain * (w - w.mean((1, 2, 3), keepdim=True)) / std, self.bias)

class NFBlock(Module):
    def __init__(self, c, beta, alpha=.3, skip=1., gain=1.7, act=nn.ReLU):
        self.act1, self.conv1 = act(), Standard(c, c, 3, padding=1, gain=gain)
        self.act2, self.conv2 = act(), Standard(c, c, 3, padding=1, gain=gain)
        self.alpha, self.beta, self.skip = alpha, beta, nn.Parameter(torch.tensor(skip))
    def forward(self, x):
        return x + self.alpha * self.skip * self.conv2(self.act2(self.conv1(self.act1(x / self.beta))))

class NFNet(Module):
    "A residual net without norms: weights are standardised, each branch is scaled."
    def __init__(self, c=12, depth=3, **kwargs):
        self.stem   = Standard(1, c, 3, 2, 1, gain=1.)
        self.blocks = nn.Sequential(*[NFBlock(c, (1 + .09 * i) ** .5, **kwargs) for i in range(depth)])
        self.last, self.act, self.head = Standard(c, 2 * c, 1, gain=1.7), nn.ReLU(), nn.Linear(2 * c, 10)
    def forward(self, x): return self.head(self.act(self.last(self.blocks(self.stem(x)))).mean((2, 3)))

class PoolBlock(Module):
    "The neighbours' mean instead of attention."
    def __init__(self, d, scale):
        self.norm1, self.pool, self.norm2 = nn.GroupNorm(1, d), nn.AvgPool2d(3, 1, 1, False, False), nn.GroupNorm(1, d)
        self.up, self.act, self.down = nn.Conv2d(d, 2 * d, 1), nn.GELU(), nn.Conv2d(2 * d, d, 1)
        self.scale = nn.Parameter(torch.full((2, d, 1, 1), scale))
    def forward(self, x):
        h = self.norm1(x)
        x = x + self.scale[0] * (self.pool(h) - h)
        return x + self.scale[1] * self.down(self.act(self.up(self.norm2(x))))

class Pooler(Module):
    def __init__(self, d=16, depth=2, scale=1.):
        self.patch  = nn.Conv2d(1, d, 4, 2, 1)
        self.blocks = nn.Sequential(*[PoolBlock(d, scale) for _ in range(depth)])
        self.norm, self.head = nn.GroupNorm(1, d), nn.Linear(d, 10)
    def forward(self, x): return self.head(self.norm(self.blocks(self.patch(x))).mean((2, 3)))

def concat(widths=(12, 24, 24), ps=.25):
    "A body and the head that fastai's vision_learner puts on it: both poolings, two blocks of norm, dropout, linear."
    body, c = [], 1
    for i, w in enumerate(widths):
        body += [nn.Conv2d(c, w, 3, 2 if i < 2 else 1, 1, bias=False), bn(w), nn.ReLU()]
        c = w
    head = [*LinBnDrop(2 * c, 48, p=ps / 2, act=nn.ReLU()), *LinBnDrop(48, 10, p=ps)]
    return nn.Sequential(nn.Sequential(*body), nn.Sequential(AdaptiveConcatPool2d(), nn.Flatten(), *head))

def spectro(widths=(8, 16, 16, 16), norm=False, act=nn.ReLU):
    "Convolutions over frequency and time, halved after each of the first two; then the mean."
    layers, c = [], 1
    for i, w in enumerate(widths):
        layers += [nn.Conv2d(c, w, 3, 1, 1), *maybe_bn(w, norm), act(), *([nn.MaxPool2d(2)] if i < 2 else [])]
        c = w
    return nn.Sequential(*layers, *ends(c, 5))

class Inception(Module):
    "Four ways side by side: 1 x 1, 3 x 3, 5 x 5, pooled."
    def __init__(self, a, b):
        q = b // 4
        self.one   = nn.Sequential(*conv(a, q, 1))
        self.three = nn.Sequential(*conv(a, q, 1), *conv(q, q, 3))
        self.five  = nn.Sequential(*conv(a, q, 1), *conv(q, q, 5))
        self.pool  = nn.Sequential(nn.MaxPool2d(3, 1, 1), *conv(a, q, 1))
    def forward(self, x): return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1)

class GoogLeNet(Module):
    "Three inceptions; while it trains a second head may answer from the middle."
    def __init__(self, c=16, aux=False):
        self.stem = nn.Sequential(*conv(1, c, 3, 2))
        self.mix1, self.mix2 = Inception(c, c), Inception(c, 2 * c)
        self.mix3 = Inception(2 * c, 2 * c)
        self.head, self.aux = nn.Linear(2 * c, 10), nn.Linear(c, 10) if aux else None
    def forward(self, x):
        a = self.mix1(self.stem(x))
        x = self.head(self.mix3(F.max_pool2d(self.mix2(a), 2)).mean((2, 3)))
        return torch.stack([x, self.aux(a.mean((2, 3)))], 2) if self.aux and self.training else x

class Fire(Module):
    "Few channels, then 1 x 1 and 3 x 3 side by side."
    def __init__(self, a, s, e):
        self.squeeze, self.act1 = nn.Conv2d(a, s, 1), nn.ReLU()
        self.one, self.three, self.act2 = nn.Conv2d(s, e, 1), nn.Conv2d(s, e, 3, padding=1), nn.ReLU()
    def forward(self, x):
        x = self.act1(self.squeeze(x))
        return self.act2(torch.cat([self.one(x), self.three(x)], 1))

def squeezenet(c=16, s=8, drop=0.):
    return nn.Sequential(*conv(1, c, 3, 2), Fire(c, s, c), Fire(2 * c, s, c), nn.MaxPool2d(2), Fire(2 * c, s, c),
                         nn.Dropout(drop), nn.Conv2d(2 * c, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def fire(drop=0.):
    "SqueezeNet as torchvision initialises it: the last convolution is small."
    m = kaiming(squeezenet(drop=drop))
    nn.init.normal_(m[7].weight, std=.01)
    return m

def google(**kwargs):
    m = kaiming(GoogLeNet(**kwargs))
    nn.init.xavier_normal_(m.head.weight, .5)
    return m

class PreAct(Module):
    "Norm, activation and convolution two times beside the identity or a projection."
    def __init__(self, a, b, stride=1):
        self.norm1, self.act1, self.conv1 = nn.BatchNorm2d(a), nn.ReLU(), nn.Conv2d(a, b, 3, stride, 1, bias=False)
        self.norm2, self.act2, self.conv2 = nn.BatchNorm2d(b), nn.ReLU(), nn.Conv2d(b, b, 3, 1, 1, bias=False)
        self.short = nn.Identity() if a == b and stride == 1 else nn.Conv2d(a, b, 1, stride, bias=False)
    def forward(self, x):
        h = self.act1(self.norm1(x))
        return self.short(x) + self.conv2(self.act2(self.norm2(self.conv1(h))))

def wide(c=24):
    last = [bn(2 * c), nn.ReLU(), *ends(2 * c)]
    return nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1, bias=False), PreAct(8, c), PreAct(c, 2 * c, 2), *last)

def xres(): return XResNet(ResBlock, 1, [1, 1, 1, 1], 0., 1, 10, (8, 8, 64), .125)

class Look(Module):
    def __init__(self, d, heads=2):
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

class Latents(Module):
    "A Perceiver: a few learnt vectors look at all patches, then at each other; the second time with the same weights."
    def __init__(self, d=24, n=8, depth=2):
        self.patch, self.pos   = nn.Conv2d(1, d, 2, 2), nn.Parameter(.1 * torch.randn(49, d))
        self.latents           = nn.Parameter(.5 * torch.randn(n, d))
        self.depth, self.look  = depth, Look(d)
        self.norm, self.head, self.softmax = nn.LayerNorm(d), nn.Linear(d, 10), False
    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2) + self.pos
        z = self.latents.expand(len(x), -1, -1)
        for _ in range(self.depth): z = self.look(z, x)
        x = self.head(self.norm(z.mean(1)))
        return x.softmax(1) if self.softmax else x

class TwoHeads(Module):
    "One body; one head says which digit, another how much ink."
    def __init__(self, c=12):
        self.body = nn.Sequential(*conv(1, c, 3, 2), *conv(c, 2 * c, 3, 2), *conv(2 * c, 2 * c, 3),
                                  nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8 * c, 32), nn.ReLU())
        self.which, self.ink = nn.Linear(32, 10), nn.Linear(32, 1)
    def forward(self, x):
        x = self.body(x)
        return torch.cat([self.which(x), self.ink(x)], 1)
