"""Steps that no optimizer of torch's takes: another object's `step`, or the loop's own `p.data -= lr * p.grad`.

An object's step is seen as it is called. Where there is none, gradients and weights are read as a backward pass ends,
and weights that are others when the next pass begins have been stepped: their values are compared, since what is done
through `.data` shows in no version counter.
"""
from __future__ import annotations

import torch

from .listeners import Listeners


class OwnSteps:
    "Makes rows of a Watch of such steps."
    def __init__(self, watch, opt):
        self.watch, self.ps = watch, watch.watcher.parameters
        self.before  = None                       # the weights as they were read, [(parameter, copy)]
        self.inside  = False                      # a call of `backward`: tensors of a subclass come twice
        meta         = watch.builder.meta
        if opt is None:
            self.handles    = [Listeners.add(torch.Tensor, 'backward', self._backward)]
            meta['grad_is'] = 'as the backward pass has left it: what the step consumes is not seen'
        else:
            self.handles    = [Listeners.add(opt, 'step', self._step)]
            if hasattr(opt, 'zero_grad'): self.handles.append(Listeners.add(opt, 'zero_grad', watch._zero_grad))

    def _backward(self, backward, *args, **kwargs):
        if self.inside: return backward()
        self.watch.safely(self.look)
        before      = {*self.ps.tasks}
        self.inside = True
        try: out = backward()
        finally: self.inside = False
        if self.ps.tasks - before: self.watch.safely(self._read)
        return out

    def _read(self):
        "Gradients and weights, as they are now."
        if not any(p.grad is not None for _, p in self.ps.all): return
        watch       = self.watch
        watch.row   = watch._read()
        watch._rates(watch.row)
        self.ps.weights(watch.row)
        self.before = [(p, p.detach().clone()) for _, p in self.ps.trained if p.grad is not None]

    def look(self):
        "Whether the weights have been changed since; then that was the step."
        before, self.before = self.before, None
        if before is None or self.watch.row is None: return
        with torch.no_grad(): moved = any(not _same(p, was) for p, was in before)
        if moved: self._stepped()
        else:     self.before = before

    def _step(self, step, *args, **kwargs):
        watch = self.watch
        row   = watch.row
        self._read()
        if row is not None: watch.row = row; self.ps.weights(row)        # `w.grads()` has read it
        out = step()
        if watch.row is not None: self._stepped()
        return out

    def _stepped(self):
        row, self.before = self.watch.row, None
        self.ps.updates(row)
        self.watch._finish(row)


def _same(a, b): return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
