"""Listeners: functions of ours around a method of an object or of a class, for as long as they are wanted; and what is
being executed now."""
from __future__ import annotations

import sys
from functools import partial, update_wrapper
from types import MethodType

import torch

STEP = torch.optim.Optimizer.profile_hook_step(min).__code__      # what torch runs around a step


class Listeners:
    "Calls functions around a method of an object or of a class, until the last of them is removed; in any order."
    @classmethod
    def add(cls, owner, name, around):
        "Have `around(original, *arguments)` called in place of a method. Returns what `remove`s it."
        mine = vars(owner).get(name)
        if not isinstance(mine, cls): mine = cls(owner, name)
        mine.around.append(around)
        return _Removal(mine, around)

    def __init__(self, owner, name):
        update_wrapper(self, getattr(owner, name))                        # who asks for its signature gets the method's
        self.had, self.old = vars(owner).get(name), getattr(owner, name)
        self.owner, self.name, self.around = owner, name, []
        setattr(owner, name, self)

    def __get__(self, obj, owner=None): return self if obj is None else partial(self, obj)

    def __call__(self, *args, **kwargs):
        call = partial(self.old, *args, **kwargs)
        for f in self.around: call = partial(f, call, *args, **kwargs)
        return call()

    def __reduce__(self):
        "A copy of the object has the method that it would have without us."
        return (_same, (self.had,)) if self.had is not None else (_bound, (self.old.__func__, self.owner))

    def remove(self, around):
        self.around = [f for f in self.around if f is not around]
        if self.around or vars(self.owner).get(self.name) is not self: return
        if self.had is None: delattr(self.owner, self.name)
        else:                setattr(self.owner, self.name, self.had)

class _Removal:
    def __init__(self, listeners, around): self.listeners, self.around = listeners, around
    def remove(self): self.listeners.remove(self.around)

def _same(x): return x

def _bound(f, obj): return MethodType(f, obj)


def stepping():
    "The optimizer of torch's that is taking a step in this thread, the innermost; None if none is."
    f = sys._getframe(1)
    while f is not None and f.f_code is not STEP: f = f.f_back
    return f and f.f_locals.get('self')

def running():
    "The frames that are executed now, in all threads."
    now = set()
    for f in sys._current_frames().values():
        while f is not None and f not in now: now.add(f); f = f.f_back
    return now
