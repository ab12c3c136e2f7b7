"Callbacks that put a small Learner into a mode of training, and what makes the host wait for a device."
from collections import Counter

import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import AMPMode, MixedPrecision
from torch.utils._python_dispatch import TorchDispatchMode

from fastgradstats.measure.watcher import Watcher
from reference import learner

EVERY = dict(grad=['norm', 'std', 'median', 'hist'], activation=['mean', 'hist', 'frac_dead'], grad_output=['norm', 'hist'],
             grad_used=['norm'], weight=['norm'], update=['norm', 'mean'])

class Hooked(Callback):
    "Runs a function at one event, once, at the `at`-th batch."
    run_valid = False
    def __init__(self, event, f, at=3, order=0):
        super().__init__()
        self.hk_f, self.hk_at, self.hk_n, self.order = f, at, -1, order
        setattr(self, event, self._fire)
    def _fire(self):
        if not self.learn.model.training and self.hk_at: return
        self.hk_n += 1
        if self.hk_n == self.hk_at: self.hk_f(self.learn)

class CpuPrecision(MixedPrecision):
    "fastai's mixed precision on a CPU."
    def before_fit(self):
        half = self.amp_mode == AMPMode.FP16
        self.autocast = torch.autocast('cpu', dtype=torch.float16 if half else torch.bfloat16)
        self.learn.scaler, self.scales = torch.amp.GradScaler('cpu', **{**self.kwargs, 'enabled': half}), []

class Blow(Callback):
    "Makes the loss infinite at some batches."
    run_valid = False
    def __init__(self, *at): super().__init__(); self.bl_at, self.bl_i = at, -1
    def after_loss(self):
        self.bl_i += 1
        if self.bl_i in self.bl_at: self.learn.loss_grad = self.learn.loss_grad * np.inf


class Counted(TorchDispatchMode):
    "Counts what would make the host wait for a device, and the kernels that do so inside (bincount, nonzero, unique)."
    WAITS = ('_local_scalar_dense', 'equal', 'bincount', 'nonzero', 'unique', '_unique2', 'masked_select', 'is_nonzero',
             'unique_consecutive', 'unique_dim', 'item')
    def __init__(self): super().__init__(); self.seen = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.WAITS: self.seen.append(name)
        if name == 'index' and any(isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            self.seen.append('boolean index')
        return func(*args, **(kwargs or {}))

def waits(monkeypatch, cbs):
    """What makes the host wait in a fit that is read in the device's way, on the CPU: `.item()`, `.cpu()` and the like, and
    operations that are `Counted`. And the Learner."""
    monkeypatch.setattr('fastgradstats.callbacks.layer_stats.Watcher', lambda plan: Watcher(plan, host=False))
    learn = learner('cnn', cbs, n=80)
    found, counted = Counter(), Counted()
    for name in ('cpu', 'numpy', 'tolist', 'item', '__float__', '__bool__', '__int__'):
        old = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda t, *a, _o=old, _n=name: (found.update([_n]), _o(t, *a))[1])
    def begin(learn): found.clear(); counted.__enter__()
    learn.add_cb(Hooked('before_batch', begin, at=1, order=-50))       # the first batch of a fit may look at the loss
    learn.fit(2)
    counted.__exit__(None, None, None)
    monkeypatch.undo()
    return found + Counter(counted.seen), learn
