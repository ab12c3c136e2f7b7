"""A watch that nobody tells anything: its loss is the scalar on which `backward` is called, its optimizer the one that
steps, and a model that is not called as a module runs from its first layer to the backward pass."""
from __future__ import annotations

import weakref
from functools import partial

import torch

from .known_losses import known_loss
from .listeners import Listeners
from .loop import Watch


class Listening(Watch):
    "Records a model whose loop says nothing to it."
    def __init__(self, model, plan, called=True):
        super().__init__(model, None, plan)
        self.called = called                      # False: it only holds tensors, and a backward pass is all there is
        self.first  = None                        # the layer that began a pass of a model that is not called itself
        self.inside = False                       # a call of `backward`: tensors of a subclass come twice

    def _enter(self):
        super()._enter()
        self.handles.append(Listeners.add(torch.Tensor, 'backward', self._around_backward))

    def _before_any_step(self, place, opt, args, kwargs):
        "Another optimizer with the same parameters begins another fit."
        ps     = self.watcher.parameters
        theirs = {id(p) for g in opt.param_groups for p in g['params']}
        if self.opt is not None and id(opt) not in self.opts and not self.stepping and \
                any(id(p) in theirs for i, p in ps.all if i in ps.group):
            self._add()
            self.fit += 1
            self._adopt(opt)
        else: super()._before_any_step(place, opt, args, kwargs)

    def adopts(self, opt):
        "Take an optimizer for the one that steps the model, if it does."
        ours = {id(p) for _, p in self.watcher.parameters.trained}
        if not any(id(p) in ours for g in opt.param_groups for p in g['params']): return False
        self._adopt(opt)
        return True

    # --- a model that is not called as a module ----------------------------------------------------------------------

    def layer_begins(self, module, args):
        "A layer is called by none of the model's modules. The first one again is another pass."
        if self.first is not None and self.first() is not module: return
        self._pass_ends()
        last = self.passes[-1] if self.passes else None
        self._before(None, self.model, args, {})
        if self.passes and self.passes[-1] is not last: self.first = weakref.ref(module)

    def _pass_ends(self):
        if self.first is None: return
        self.first, self.depth = None, 0
        if self.called: self.builder.ignore('output', 'the model is not called as a module, only its layers are')
        if self.watcher.hooks.part is not None: self._answered(None)

    # --- the loss ----------------------------------------------------------------------------------------------------

    def _around_backward(self, backward, loss, *args, **kwargs):
        if self.inside: return backward()
        about = self.safely(self._backward_begins, loss)
        self.inside = True
        try: out = backward()
        except Exception as e:
            self.builder.ignore('some gradients', f'a backward pass has failed: {type(e).__name__}: {e}')
            raise
        finally: self.inside = False
        if about is not None and loss.numel() == 1: self.safely(self._tell, loss, *about)
        return out

    def _backward_begins(self, loss):
        "By what the loss is multiplied, its known loss function, the number of the last backward pass."
        if not self.called and self._reached(loss): self.layer_begins(self.model, ())
        self._pass_ends()
        last = max((t for p in self._parts() for t in p.tasks or ()), default=-1)
        return self.scalers.multiplied.get(loss, 1), known_loss(loss.grad_fn), last

    def _baseline(self, by, loss_func, answers, targets, factor):
        return [v * factor / by for v in self.baseline.both(loss_func, answers, (targets,))]

    def _reached(self, loss):
        ours = {id(p) for p in self.model.parameters()}
        return any(id(t) in ours for t in leaves_of(loss))

    def _parts(self): return [*self.passes, *self.dropped, *(self.last.parts if self.last is not None else ())]

    def _tell(self, loss, by, known, before):
        "The loss of the passes that the backward pass which has just run came back to."
        loss = loss.detach() / by
        for part in self._parts():
            back = part in self.passes if part.tasks is None else any(t > before for t in part.tasks)
            if part.loss is not None or not back: continue
            baseline = partial(self._baseline, by, *known) if known else None
            self.watcher.tell_loss(part, loss, baseline if self.watcher.due(self.i) else None)
            known = None                          # once a loss


def leaves_of(loss):
    "The tensors that a backward pass from here brings gradients to, in the order of the forward pass."
    todo, seen, found = [loss.grad_fn], set(), []
    while todo:
        node = todo.pop()
        if node is None or node in seen: continue
        seen.add(node)
        if hasattr(node, 'variable'): found.append(node.variable)
        todo += [n for n, _ in node.next_functions]
    return found[::-1]
