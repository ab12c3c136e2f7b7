"""An independent reading of a training run: what the callbacks should have recorded, in float64 NumPy.

`Spy` is a fastai callback that knows nothing of the package. It clones outputs in its own hooks, gradients right after each
backward pass (divided by the loss scale), and what the optimizer is given by wrapping `opt.step`. `check` compares a Record
with it, value by value.
"""
import random

import numpy as np
import torch
from torch import nn
import fastai.callback.schedule                    # noqa: F401  (gives Learner its fit_one_cycle)
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.torch_core import set_seed
from fastcore.basics import noop


# --- small Learners --------------------------------------------------------------------------------------------------
def seed(n=0):
    "torch, NumPy and Python's random, which fastai's DataLoader draws its shuffles from."
    set_seed(n)
    random.seed(n)

def states(): return torch.get_rng_state(), np.random.get_state(), random.getstate()

def same_states(a, b):
    return (torch.equal(a[0], b[0]) and a[1][0] == b[1][0] and np.array_equal(a[1][1], b[1][1]) and a[1][2:] == b[1][2:]
            and a[2] == b[2])

class Items(list):
    def new_empty(self): return Items()

def loaders(n=40, shape=(6,), bs=8, classes=3, n_valid=8, shuffle=True, x=None):
    g = torch.Generator().manual_seed(7)
    x = torch.randn(n + n_valid, *shape, generator=g) if x is None else x
    y = torch.randint(classes, (len(x),), generator=g)
    items = Items(zip(x, y))
    return DataLoaders(DataLoader(Items(items[:n]), bs=bs, shuffle=shuffle, num_workers=0),
                       DataLoader(Items(items[n:]), bs=bs, num_workers=0), device='cpu')

def mlp(): return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 3))

def cnn():
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(.2),
                         nn.Conv2d(4, 6, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(54, 3))

class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.drop, self.act, self.head = nn.LSTM(3, 8, batch_first=True), nn.Dropout(.3), nn.ReLU(), nn.Linear(8, 3)
    def forward(self, x): return self.head(self.act(self.drop(self.rnn(x)[0][:, -1])))

class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.up   = nn.Linear(3, 8)
        self.body = nn.TransformerEncoderLayer(8, 2, 16, dropout=.1, batch_first=True)
        self.head = nn.Linear(8, 3)
    def forward(self, x): return self.head(self.body(self.up(x)).mean(1))

MODELS = dict(mlp=(mlp, (6,)), cnn=(cnn, (1, 8, 8)), lstm=(Recurrent, (5, 3)), transformer=(Attending, (5, 3)))

def learner(kind='mlp', cbs=None, *, n=40, bs=8, lr=.05, model=None, dls=None, start=0, quiet=True, **kwargs):
    "A Learner on random tensors; the same `start`, the same weights and data."
    make, shape = MODELS[kind] if isinstance(kind, str) else kind
    seed(start)
    model = make() if model is None else model
    learn = Learner(dls or loaders(n, shape, bs), model, loss_func=kwargs.pop('loss_func', None) or nn.CrossEntropyLoss(),
                    cbs=cbs, lr=lr, **kwargs)
    if quiet: learn.logger = noop
    for name in ('ProgressCallback',):
        if quiet: learn.remove_cbs([cb for cb in learn.cbs if type(cb).__name__ == name])
    seed(start + 1)
    return learn

def hooks_on(model):
    "Every hook that is registered on a model: forward, backward, and of parameters."
    found = []
    for name, m in model.named_modules():
        for kind in ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks'):
            found += [(name, kind, h) for h in getattr(m, kind).values()]
    for name, p in model.named_parameters():
        for kind in ('_backward_hooks', '_post_accumulate_grad_hooks'):
            found += [(name, kind, h) for h in (getattr(p, kind, None) or {}).values()]
    return found


# --- the reading -----------------------------------------------------------------------------------------------------
def _np(t):
    t = t.detach()
    if t.is_sparse: t = t.coalesce().to_dense()
    return t.double().numpy().copy()

class Spy(Callback):
    "Reads what happens to a Learner, at the front of every event."
    order, run_valid = -95, False
    def __init__(self, sites=None):
        super().__init__()
        self.spy_sites, self.spy_rows, self.spy_i, self.spy_handles = sites, [], -1, []
        self.spy_micro, self.spy_window, self.spy_own = None, [], None

    def before_fit(self):
        self.after_fit()
        params = dict(self.learn.model.named_parameters())
        step   = self.learn.opt.step
        def stepping(*args, **kwargs):
            got = self._touched()
            used, old = {n: _np(params[n].grad) for n in got}, {n: _np(p) for n, p in params.items() if p.grad is not None}
            out = step(*args, **kwargs)
            self._row(True, used=used, weight=old, update={n: _np(params[n]) - old[n] for n in old}, lr=self._lrs(params))
            return out
        self.spy_own = self.learn.opt.__dict__.get('step')
        self.learn.opt.step = stepping
        for name, m in self.learn.model.named_modules():
            if self.spy_sites is not None and name in self.spy_sites:
                self.spy_handles.append(m.register_forward_hook(self._saw(name)))
        for n, p in params.items():
            if p.requires_grad: self._touch(n, p)

    def _lrs(self, params):
        opt = self.learn.opt
        return {n: h['lr'] for ps, h in zip(opt.param_lists, opt.hypers) for n, p in params.items() if any(p is q for q in ps)}
    def _touch(self, n, p):
        def touched(g):
            if self.spy_micro is not None: self.spy_micro['touched'].add(n)
        self.spy_handles.append(p.register_hook(touched))
    def _touched(self): return sorted(set().union(*[m['touched'] for m in self.spy_window]))
    def _saw(self, name):
        def saw(m, args, out):
            micro = self.spy_micro
            if micro is None or micro['ran']: return
            micro['activation'].setdefault(name, []).append(_np(out))
            if out.requires_grad: out.register_hook(lambda g: micro['grad_output'].setdefault(name, []).append(_np(g)))
        return saw

    def before_backward(self):
        for n, p in self.learn.model.named_parameters():              # unfrozen in the middle
            if p.requires_grad and not p._backward_hooks: self._touch(n, p)

    def before_batch(self):
        self.spy_i += 1
        self.spy_micro = dict(activation={}, grad_output={}, touched=set(), bs=len(self.learn.yb[0]), iter=self.spy_i,
                              epoch=self.learn.epoch, loss=np.nan, ran=False)
    def after_pred(self): self.spy_micro['ran'] = True
    def after_loss(self): self.spy_micro['loss'] = float(self.learn.loss.detach().double())
    def after_backward(self):
        m     = self.spy_micro
        scale = self.learn.scaler.get_scale() if getattr(self.learn, 'scaler', None) is not None else 1.
        for k, gs in m['grad_output'].items(): m['grad_output'][k] = [g / scale for g in gs]
        self.spy_window.append(m)
        params   = dict(self.learn.model.named_parameters())
        m['sum'] = {n: _np(params[n].grad) / scale for n in self._touched() if params[n].grad is not None}
    def after_cancel_step(self): self._row(False)
    def after_fit(self):
        if self.spy_window: self.spy_window[-1]['sum'] = {}; self._row(False)     # an unfinished window: not read
        for h in self.spy_handles: h.remove()
        self.spy_handles.clear()
        opt = self.learn.opt if self.learn is not None else None
        if opt is not None and opt.__dict__.pop('step', None) is not None and self.spy_own is not None: opt.step = self.spy_own

    def _row(self, stepped, used=None, weight=None, update=None, lr=None):
        w, self.spy_window, self.spy_micro = self.spy_window, [], None
        join = lambda probe: {k: np.concatenate([a.ravel() for m in w for a in m[probe].get(k, [])])
                              for k in dict.fromkeys(k for m in w for k in m[probe])}
        bs = np.array([m['bs'] for m in w], float)
        self.spy_rows.append(dict(
            iter=w[-1]['iter'], epoch=w[-1]['epoch'], bs=int(bs.sum()), n_accum=len(w), stepped=stepped,
            loss=float((bs * [m['loss'] for m in w]).sum() / bs.sum()), activation=join('activation'),
            grad_output=join('grad_output'), grad=w[-1]['sum'], grad_used=used, weight=weight, update=update, lr=lr))


def _lower(x): return np.sort(x)[(len(x) - 1) // 2] if not np.isnan(x).any() else np.nan

REFERENCE = dict(
    mean=lambda x: x.mean(), std=lambda x: x.std(), norm=lambda x: np.sqrt((x ** 2).sum()),
    min=lambda x: x.min(), max=lambda x: x.max(), abs_mean=lambda x: np.abs(x).mean(), abs_max=lambda x: np.abs(x).max(),
    median=lambda x: _lower(x), abs_median=lambda x: _lower(np.abs(x)), frac_zero=lambda x: (x == 0).mean(),
    frac_near_zero=lambda x: (np.abs(x) < np.float32(.05)).mean(), frac_nonfinite=lambda x: (~np.isfinite(x)).mean(),
    frac_underflow_fp16=lambda x: (((x != 0) & (np.float16(x.astype(np.float32)) == 0)) |
                                   (np.isfinite(x) & np.isinf(np.float16(x.astype(np.float32)))) | np.isinf(x)).mean())

def close(got, want, scale, rtol, where):
    "Equal, where the error may be `rtol` of the magnitude of what was summed."
    if np.isnan(want) or np.isinf(want):
        assert np.isnan(got) if np.isnan(want) else got == want, (where, got, want)
        return
    assert abs(got - want) <= rtol * max(abs(want), scale) + 1e-37, (where, got, want)

def check(rec, rows, probes=('grad', 'grad_used', 'weight', 'update', 'activation', 'grad_output'), rtol=1e-4, some=True):
    "A Record against the rows of a Spy: the same rows, the same places, the same numbers. Returns how many were compared."
    it = rec.iters
    assert it.iter.tolist() == [r['iter'] for r in rows]
    for c in ('epoch', 'bs', 'n_accum', 'stepped'): assert it[c].tolist() == [r[c] for r in rows], c
    np.testing.assert_allclose(it.loss, [r['loss'] for r in rows], rtol=1e-5, equal_nan=True)
    n = 0
    for k, r in enumerate(rows):
        if not it.measured[k]:
            assert all(np.isnan(rec[key][k]).all() for key in rec.keys() if key not in rec.windows)
            continue
        for key in rec.keys():
            probe, stat = key
            if probe not in probes or key in rec.windows: continue
            have = r[probe]
            for j, layer in enumerate(rec.layers[probe].layer):
                got, where = float(rec[key][k, j]), (k, key, layer)
                if stat == 'lr':
                    if have is not None and layer in have: assert np.isclose(got, r['lr'][layer], rtol=1e-6), where
                    else:                                  assert np.isnan(got), where
                    continue
                if stat not in REFERENCE: continue
                if have is None:                                       # no step was taken
                    if probe == 'update' and layer in (r['grad'] or {}) and stat in ('norm', 'mean', 'abs_max'):
                        assert got == 0 or np.isnan(got), where
                    continue
                x = have.get(layer, have.get(layer.split(':')[0]) if ':' not in layer else None)
                if x is None:
                    assert np.isnan(got), (*where, got)
                    continue
                x = np.asarray(x).ravel()
                with np.errstate(all='ignore'):
                    close(got, REFERENCE[stat](x), np.abs(x).mean() * (1 if stat in ('mean', 'std') else 0), rtol, where)
                n += 1
        if r['grad'] is not None and ('grad', 'norm') in rec.keys() and r['grad']:
            with np.errstate(all='ignore'):
                total = np.sqrt(sum((g ** 2).sum() for g in r['grad'].values()))
                close(float(it.grad_norm[k]), total, 0, rtol, (k, 'grad_norm'))
                if r['stepped'] and np.isfinite(total) and total > 0:
                    used = np.sqrt(sum((g ** 2).sum() for g in r['grad_used'].values()))
                    close(float(it.clip_factor[k]), used / total, 0, rtol, (k, 'clip_factor'))
                elif not r['stepped']: assert np.isnan(it.clip_factor[k])
    assert n or not some, 'nothing was compared'
    return n
