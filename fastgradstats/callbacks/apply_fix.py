"Applying a finding's `fix` to a Learner that has not trained yet."
from __future__ import annotations

import torch
from fastai.callback.core import Callback
from fastai.callback.training import GradientClip
from torch import nn

NORMS     = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
WEIGHTED  = (nn.Linear, nn.modules.conv._ConvNd)
BATCHNORM = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}       # by the dimensions of the output


class _Standardise(Callback):
    """Shift and scale every input by the mean and std of the first batch. Of a table each column by its own; columns of
    whole numbers among others may be categories and stay."""
    order = 5
    def before_batch(self):
        x = self.xb[0]
        if not x.is_floating_point(): return                                       # indices have no scale
        if not hasattr(self, 'stats'):
            dims = [0] if x.dim() == 2 else [0, *range(2, x.dim())] if x.dim() > 3 else list(range(x.dim()))
            mean, std = x.mean(dims, keepdim=True), x.std(dims, keepdim=True).clamp_min(1e-6)
            whole = (x == x.round()).all(0, keepdim=True)
            if x.dim() == 2 and not whole.all(): mean, std = mean.masked_fill(whole, 0), std.masked_fill(whole, 1)
            self.stats = mean, std
        self.learn.xb = ((x - self.stats[0]) / self.stats[1], *self.xb[1:])

class _Zero(Callback):
    "Zero the gradients before every backward pass."
    order = -50
    def before_backward(self):
        for p in self.learn.model.parameters(): p.grad = None

class _Cap(Callback):
    "Hold the learning rate at or below `most`."
    order = 80
    def __init__(self, most): self.most = most
    def before_step(self):
        for i, h in enumerate(self.opt.hypers): h['lr'] = min(h['lr'], self.most)

class _ScaleLoss(Callback):
    "Scale the loss before the backward pass; the learning rate was divided by it, so gradients need no unscaling."
    def __init__(self, by): self.by = by
    def before_backward(self): self.learn.loss_grad = self.learn.loss_grad * self.by


def apply_fix(learn, fix):
    """Change a Learner that has not trained yet as `fix` says; returns the keys that were applied. Keys are applied
    together: new weights (of `layers`, or all) after the change of activation functions, norms last."""
    done = ['layers'] if 'init' in fix else []
    for key in sorted({*fix} - {'layers'}, key=lambda k: (k == 'norm', k == 'init')):
        args = (fix['layers'],) if key == 'init' and 'layers' in fix else ()
        if APPLY[key](learn, fix[key], *args) is not False: done.append(key)
    return [k for k in fix if k in done]

def _lr(learn, f):
    lr = learn.lr
    learn.lr = slice(lr.start and lr.start * f, lr.stop * f) if isinstance(lr, slice) else lr * f
def _lr_cap(learn, v):    learn.add_cb(_Cap(v))
def _clip(learn, v):      learn.add_cb(GradientClip(v))
def _input(learn, v):     learn.add_cb(_Standardise())
def _zero_grad(learn, v): learn.add_cb(_Zero())

def _optimizer(learn, v):
    learn.splitter, learn.opt = (lambda m: [[p for p in m.parameters() if p.requires_grad]]), None

def _loss_scale(learn, by):
    "Adam and its kin divide by the gradient's size: the others' learning rate is divided here."
    learn.add_cb(_ScaleLoss(by))
    if not any(n in str(learn.opt_func).lower() for n in ('adam', 'rmsprop', 'lamb', 'lars')): _lr(learn, 1 / by)

def _remove(learn, what):
    return what == 'softmax' and _swap(learn.model, nn.Softmax, nn.Identity)

def _activation(learn, what):
    return _swap(learn.model, *((nn.Sigmoid, nn.Tanh) if what == 'tanh' else (nn.ReLU, lambda: nn.LeakyReLU(.1))))

def _swap(model, old, make):
    "Put new modules in the place of all of a class; whether there were any."
    found = [(m, n) for m in model.modules() for n, c in m.named_children() if isinstance(c, old)]
    for m, n in found: setattr(m, n, make())
    return bool(found)

@torch.no_grad()
def _init(learn, how, layers=('',)):
    for m in (m for l in layers for m in learn.model.get_submodule(l).modules()):
        if how == 'orthogonal':
            if isinstance(m, (nn.RNNBase, nn.RNNCellBase)): _init_recurrent(m)
            continue
        if isinstance(m, WEIGHTED):
            if not m.weight.requires_grad: continue
            if how == 'xavier': nn.init.xavier_normal_(m.weight)
            else:               nn.init.kaiming_normal_(m.weight, nonlinearity='relu')
            if m.bias is not None: nn.init.zeros_(m.bias)
        elif isinstance(m, (nn.RNNBase, nn.RNNCellBase)): _init_recurrent(m)
        elif isinstance(m, nn.Embedding): nn.init.normal_(m.weight, std=.1)
        elif isinstance(m, NORMS) and getattr(m, 'weight', None) is not None:
            nn.init.ones_(m.weight)
            if m.bias is not None: nn.init.zeros_(m.bias)
        elif isinstance(m, nn.MultiheadAttention) and m.in_proj_weight is not None:
            nn.init.xavier_uniform_(m.in_proj_weight)

def _init_recurrent(m):
    "Orthogonal from step to step, Xavier from the input, biases 0, an LSTM's forget gate 1."
    for n, p in m.named_parameters():
        if p.dim() < 2:
            nn.init.zeros_(p)
            if isinstance(m, (nn.LSTM, nn.LSTMCell)) and 'ih' in n: p[len(p) // 4:len(p) // 2] = 1.
        elif '_hh' in n:
            for c in p.chunk(p.shape[0] // p.shape[1]): nn.init.orthogonal_(c)
        else: nn.init.xavier_uniform_(p)

def _norm(learn, kind):
    """Put a norm behind every hidden linear and convolutional layer that has none: batch norm, layer norm where what is
    normalised is a sequence or the layer runs several times. It hangs on the layer, so names and forward stay."""
    calls = _calls(learn)
    order = [m for m, _ in calls]
    some  = False
    for k, (m, shape) in enumerate(calls):
        last   = not any(isinstance(n, WEIGHTED) for n in order[k + 1:] if n is not m)
        normed = k + 1 < len(order) and isinstance(order[k + 1], NORMS)
        if not isinstance(m, WEIGHTED) or m.weight.dtype != torch.float32: continue
        if last or normed or 'norm' in m._modules: continue
        if isinstance(m, nn.Linear): norm = (nn.BatchNorm1d if len(shape) == 2 and order.count(m) == 1
                                             else nn.LayerNorm)(shape[-1])
        else:                        norm = BATCHNORM[len(shape)](shape[1])
        m.add_module('norm', norm.to(m.weight.device))
        m.register_forward_hook(lambda m, args, out: m.norm(out))
        some = True
    return some

def _calls(learn):
    "(leaf module, shape of its output) in the order in which one batch runs through them."
    calls, n_inp = [], getattr(learn.dls, 'n_inp', 1)
    note = lambda m, args, out: calls.append((m, out.shape)) if isinstance(out, torch.Tensor) else None
    hooks = [m.register_forward_hook(note) for m in learn.model.modules() if not m._modules]
    was   = learn.model.training
    try:
        with torch.no_grad(): learn.model.eval()(*learn.dls.one_batch()[:n_inp])
    finally:
        learn.model.train(was)
        for h in hooks: h.remove()
    return calls

APPLY = dict(lr=_lr, lr_cap=_lr_cap, clip=_clip, input=_input, zero_grad=_zero_grad, optimizer=_optimizer,
             loss_scale=_loss_scale, remove=_remove, activation=_activation, init=_init, norm=_norm)
