"""What is changed of fastai's Learner, and why; `undo()` takes all of it back.

    _do_fit          a fit begins and ends, also by Ctrl-C or an exception, of which no event tells
    _step            the gradient as the optimizer consumes it is there after every `before_step`, whatever its order
    _do_epoch_train  the hooks come off though an epoch was broken off
    layer_stats      the record outlives the callbacks, and is not exported with the Learner
    diagnose         what the record means

They are changed on the class, once: nothing is set on a Learner, so nothing is left behind or exported.
"""
from __future__ import annotations

import math
import weakref

from fastai.callback.training import GradientClip
from fastai.learner import Learner

from ..diagnosis.report import diagnose
from ..diagnosis.rules import ALL
from ..measure.optimizer_info import runs_hooks

LIVES = weakref.WeakKeyDictionary()                       # Learner -> Life
_old  = {}                                                # name -> what Learner had; None: nothing


class Life:
    """What was recorded of one Learner, over all its fits and callbacks. Not kept on the Learner: it would be exported
    with it."""
    def __init__(self):
        self.iter, self.fit, self.fit_start = 0, -1, 0
        self.watchers = []                                # in order of appearance
        self.of       = weakref.WeakKeyDictionary()       # callback -> its Watcher
        self.cache    = None
    def new_fit(self):
        "The number of the fit that begins; the first callback to ask counts it."
        if self.fit < 0 or self.iter > self.fit_start: self.fit, self.fit_start = self.fit + 1, self.iter
        return self.fit
    def record(self):
        recs = [w.record() for w in self.watchers
                if (w.builder.rows or w.row is not None) and not w.builder.elsewhere]
        if not recs: return None
        if self.cache and len(self.cache[0]) == len(recs) and all(a is b for a, b in zip(self.cache[0], recs)):
            return self.cache[1]
        rec = recs[0].join(*recs[1:]) if len(recs) > 1 else recs[0]
        self.cache = recs, rec
        return rec


def _ours(learn): return [cb for cb in learn.cbs if hasattr(cb, 'layer_plan')]

def rates(opt):
    "The learning rate of every parameter group, and the last one's momentum."
    hypers = opt.hypers
    return [h['lr'] for h in hypers], hypers[-1].get('mom', math.nan)

def _do_fit(self):
    for cb in _ours(self): cb._fit_begins(self)
    try: return _old['_do_fit'](self)
    finally:
        for cb in _ours(self): cb._fit_ends()             # also after Ctrl-C, an exception, a cancel

def _step(self):
    ours = _ours(self)
    live = [cb.__dict__['_live'].watcher for cb in ours if cb.__dict__['_live'].watcher]
    if live:
        order = max(cb.order for cb in ours)
        sure  = not any(cb.order > order and hasattr(type(cb), 'before_step') and type(cb) is not GradientClip
                        for cb in self.cbs)
        if runs_hooks(self.opt): sure = None
    for w in live: w.clock.run(_before_update, w, self.opt, sure)
    out = _old['_step'](self)
    for w in live: w.after_update()
    return out

def _before_update(w, opt, sure):
    w.rates(*rates(opt))
    w.before_update(sure)

def _do_epoch_train(self):
    try: return _old['_do_epoch_train'](self)
    finally:
        for cb in _ours(self): cb._leave(keep=True)       # also after Ctrl-C, an exception, a cancel

def _layer_stats(self):
    "What the callbacks of fastgradstats recorded of this Learner, in all its fits; None if nothing."
    return LIVES[self].record() if self in LIVES else None

def _diagnose(self, rules=ALL, *, verify=False):
    """The Report of this Learner's record; `verify`: try the advice on a copy, for 50 iterations, and show before and
    after."""
    report = diagnose(self.layer_stats, rules)
    if not verify: return report
    from .trial import verify as try_out
    return try_out(self, report)


def do():
    "Make the changes, unless they are made."
    if _old: return
    new = dict(_do_fit=_do_fit, _step=_step, _do_epoch_train=_do_epoch_train, layer_stats=property(_layer_stats),
               diagnose=_diagnose)
    for name, f in new.items():
        _old[name] = Learner.__dict__.get(name)
        if _old[name] is not None: f.__doc__ = _old[name].__doc__
        setattr(Learner, name, f)

def undo():
    "Give Learner back what it had. Callbacks record nothing from then on, until `do()`."
    for name, f in _old.items(): delattr(Learner, name) if f is None else setattr(Learner, name, f)
    _old.clear()
