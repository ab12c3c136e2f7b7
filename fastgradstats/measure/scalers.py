"""Scalers: by what a GradScaler, whoever made it, has multiplied the loss of the backward pass under way, and by what
the gradients of parameters are still multiplied."""
from __future__ import annotations

import torch
from torch.utils.weak import WeakIdKeyDictionary

from .listeners import Listeners
from .module_hooks import Hook
from .probes import tensors


class Scalers:
    """Listens to all GradScalers and tells the Watcher. `told`: one of another class than torch's; `step` is called
    around their step."""
    mode, forgive = True, None                    # its hooks are always awake
    def __init__(self, told, watcher, step):
        self.watcher    = watcher
        self.multiplied = WeakIdKeyDictionary()   # what has been multiplied -> by what
        ours = dict(scale=self._scaled, unscale_=self._unscaled, step=step)
        self.handles = [Listeners.add(c, name, f) for name, f in ours.items() for c in _classes(told, name)]

    def _scaled(self, scale, scaler, *args, **kwargs):
        out = scale()
        by  = scaler._scale.clone() if scaler.is_enabled() and hasattr(scaler, '_scale') else scaler.get_scale()
        for _, t in tensors(out) if scaler.is_enabled() else ():
            self.multiplied[t] = by
            if t.requires_grad: t.register_hook(Hook(self, '_begins', by))
        return out

    def _begins(self, by, g):
        "A backward pass begins at a loss that was multiplied."
        self.watcher.begin_backward(by)
        self.watcher.parameters.scale = by
        torch.autograd.Variable._execution_engine.queue_callback(self.ended)

    def ended(self):
        self.watcher.begin_backward()
        self.watcher.parameters.scale = None

    def _unscaled(self, unscale, scaler, opt, *args, **kwargs):
        out = unscale()
        for g in opt.param_groups:
            for p in g['params']: self.watcher.parameters.scaled.pop(p, None)
        return out


def _classes(told, name):
    "The classes of scalers that have a method of their own: torch's, those made of it, that of the one told."
    found = [torch.amp.GradScaler]
    for c in found: found += c.__subclasses__()
    return [c for c in dict.fromkeys([*found, *type(told).__mro__]) if name in vars(c)]
