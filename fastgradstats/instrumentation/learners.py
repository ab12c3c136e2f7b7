"""fastai's Learners: for the duration of each fit one of our callbacks is added, unless there is one already. fastai is
imported only when the program does: the import draws random numbers."""
from __future__ import annotations

import weakref

from .._on_import import after
from ..measure.listeners import Listeners
from ..measure.rng import unchanged_random_state
from .names import variable
from .runs import Run

MODULE = 'fastai.learner'


class Learners:
    "`begin(run)` is called for a Learner's first fit, `end(run)` after each; `failed(e)` if something of ours fails."
    def __init__(self, settings, begin, end, failed):
        self.settings, self.begin, self.end, self.failed = settings, begin, end, failed
        self.fitting = 0                          # fits under way
        self.known   = weakref.WeakKeyDictionary()        # Learner -> (its Run, our callback)
        self.handles = []
        self.on = True
        after(MODULE, self._wrap)

    def remove(self):
        self.on = False
        for h in self.handles: h.remove()
        self.handles = []

    def _wrap(self, module):
        if self.on: self.handles.append(Listeners.add(module.Learner, 'fit', self._fit))

    def _fit(self, fit, learn, *args, **kwargs):
        from fastcore.basics import listify
        cbs = [*learn.cbs, *listify(kwargs.get('cbs', args[3] if len(args) > 3 else None))]
        if self.fitting or any(type(c).__name__ == 'LRFinder' for c in cbs): return self._within(fit)
        try: run, ours = self._prepare(learn, cbs)
        except Exception as e:
            self.failed(e)
            return self._within(fit)
        try: return self._within(fit)
        finally:
            if ours is not None: learn.remove_cb(ours)
            self.end(run)

    def _within(self, fit):
        self.fitting += 1
        try: return fit()
        finally: self.fitting -= 1

    def _prepare(self, learn, cbs):
        "The Run of a Learner whose fit begins, and the callback that was added for it, if any."
        with unchanged_random_state():
            from ..callbacks.layer_stats import LayerStatsCallback
            from ..callbacks.learner_patches import LIVES, Life
        if learn not in self.known:
            life, ref = LIVES.setdefault(learn, Life()), weakref.ref(learn)
            opt  = lambda: ref() and ref().opt
            name = variable(learn, learn.model) or type(learn.model).__name__
            run  = Run(name, learn.model, lambda: ('fastai', opt()), life.record)
            self.known[learn] = run, LayerStatsCallback(verbose=False, **self.settings)
            self.begin(run)
        run, ours = self.known[learn]
        run.seen()
        if any(hasattr(c, 'layer_plan') for c in cbs): return run, None
        learn.add_cb(ours)
        return run, ours
