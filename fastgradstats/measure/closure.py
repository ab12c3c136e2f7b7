"What is read around a step that calls a closure, as LBFGS does, once or several times."
from __future__ import annotations


class Closure:
    "A closure given to a step: the gradient is that of its last evaluation, the weights those before the first."
    def __init__(self, watch, closure):
        self.watch, self.closure, self.evaluations = watch, closure, 0
        self.row = watch._new_row()
        self.row.read = True
        watch._rates(self.row)
        ps = watch.watcher.parameters
        ps.weights(self.row, [(i, p) for i, p in ps.trained if i in ps.group])

    def __call__(self, *args, **kwargs):
        w = self.watch
        if self.evaluations: w._drop()
        w.row = None
        out   = self.closure(*args, **kwargs)
        self.evaluations += 1
        now = w.row is None                       # else `w.grads()` has read it before it was clipped
        if now: w.row = w._read()
        w.watcher.parameters.used(w.row, now, sure=False, scale=w._scale)
        return out

    def join(self, row):
        "Give the row the gradient of the last evaluation."
        last = self.watch.row
        row.own.sig   += last.own.sig
        row.own.flat  += last.own.flat
        row.own.hists += last.own.hists
        row.grad_norm, row.clip = last.grad_norm, last.clip
        if self.evaluations > 1:
            meta = self.watch.builder.meta
            meta['evaluations'] = max(self.evaluations, meta.get('evaluations', 0))
