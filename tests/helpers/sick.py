"A small Learner that can be made ill."
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
import torch
from torch import nn


def make(std=None, gain=1., lr=.05, n=256, depth=6, scale=1.):
    set_seed(0)
    x = torch.randn(n, 20) * scale
    y = (x[:, :2].sum(1) > 0).long()
    layers = []
    for _ in range(depth): layers += [nn.Linear(20, 20), nn.ReLU()]
    model = nn.Sequential(*layers, nn.BatchNorm1d(20), nn.Dropout(.1), nn.Linear(20, 2))
    for m in model:
        if isinstance(m, nn.Linear):
            nn.init.normal_(m.weight, std=std) if std else nn.init.kaiming_normal_(m.weight)
            m.weight.data *= gain; nn.init.zeros_(m.bias)
    ds = list(zip(x, y))
    learn = Learner(DataLoaders(DataLoader(ds, bs=32, shuffle=True), DataLoader(ds, bs=32), device='cpu'), model, loss_func=nn.CrossEntropyLoss(), lr=lr,
                    opt_func=SGD)
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda *a: None
    return learn
