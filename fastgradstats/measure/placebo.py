"""The placebo: a signal that means nothing, sent back through the same graph. Does it reach the weights?

Of the first micro-batch of a row, after its forward pass and before its backward pass:

    v_i = dL / d pred_i                             the gradient of the loss with respect to the answer to example i
    u_i = v_p(i) - mean_j v_j                       shuffled over the examples, centred per class
    rec['grad', 'placebo'] = |J'u| |w| / |u|        J = d pred / dw, of the whole batch; |.| are 2-norms of all elements

It is how far the batch's answers move along u / |u|, to first order, if the weights of one layer are changed by as much
as they are long. It is linear in u above and below, so that neither the loss's value nor its scale matters, and both
grow as the square root of the batch size: it is the same for a small batch and a large one. What the net has learned,
or has still to learn, is shuffled away: a converged net has a high one, a net that nothing gets through a low one.
It is in the unit of the answers: logits that are all doubled double it.

Training is not changed: `torch.autograd.grad` leaves every `.grad` and every AccumulateGrad hook (DDP's reducer) alone;
random states, the buffers of what a checkpoint runs again, and hooks of parameters are kept. Where code of others
would run in the second backward pass, it is not done and the record says why. Only a hook on a tensor within the model
(`t.register_hook`, `t.retain_grad`) cannot be seen from here: it gets the placebo's gradient too.
"""
from __future__ import annotations

from contextlib import contextmanager

import torch
from torch.nn.modules import module as hooks_of_all
from torch.nn.modules._functions import SyncBatchNorm
from torch.nn.parallel import DistributedDataParallel

from .probes import is_compiled
from .rng import unchanged_random_state

EVERY   = 25                      # measured rows from one to the next
SIZE    = 64.                     # |u|: in half precision neither too small nor too large
TRUSTED = ('torch', 'torchvision', 'fastai', 'timm')      # whose autograd functions change nothing in a backward pass


class Placebo:
    "Reads it where it is due. The order of the examples comes from a generator of its own."
    def __init__(self, every):
        self.every, self.rows = every, 0
        self.rng = torch.Generator().manual_seed(0)
        self.off = None                           # the (fit, epoch) in which it could not be done

    def __call__(self, w, model, pred, loss):
        "Of the Watcher `w`: fills the open row's `placebo`, once for all of its micro-batches."
        row = w.row
        if w.part is None or not row.measured or row.parts: return
        self.rows += 1
        if (self.rows - 1) % self.every or self.off == row.about[:2]: return
        params = [(i, p) for i, p in w.parameters.all if p.requires_grad and p.dim() > 1]
        mode   = w.suspend()
        try:
            why = _why_not(model, pred, loss, params)
            if not why and len(pred) > 1: row.placebo = self._read(params, pred, loss, w.hooks.scale)
        except Exception as e: why = f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"
        finally: w.resume(mode)
        if why:                self.off = row.about[:2]
        elif row.placebo:      w.builder.ignored.pop('placebo', None)
        else:                  why = 'a batch of one example cannot be shuffled'
        if why: w.builder.ignore('placebo', why)

    def _read(self, params, pred, loss, scale):
        "The numbers of the parameters, and the values: (parameter,), where the model is."
        ps = [p for _, p in params]
        with _untouched([pred, loss, *ps], pred.device):
            one = torch.ones_like(loss) * (scale if scale is not None and pred.dtype == torch.float16 else 1)
            v, = torch.autograd.grad(loss, pred, one, retain_graph=True, allow_unused=True)
            if v is None: raise ValueError("the loss does not depend on the model's answer")
            u  = shuffled(v, torch.randperm(len(v), generator=self.rng)).to(pred.dtype)
            gs = torch.autograd.grad(pred, ps, u, retain_graph=True, allow_unused=True)
        with torch.no_grad():
            got   = [k for k, g in enumerate(gs) if g is not None]
            found = [_norm(gs[k]) * _norm(ps[k]) for k in got]
            return ([params[k][0] for k in got], torch.stack(found) / _norm(u)) if got else None


def shuffled(
    v,                            # (example, ...), the gradient of the loss with respect to the answers
    order,                        # (example,), a permutation
):
    "v over the examples in another order, their mean zero, |v| = SIZE."
    with torch.no_grad():
        v = v.detach().as_subclass(torch.Tensor)
        v = v if v.dtype == torch.float64 else v.float()
        v = v / v.abs().max()                                 # a loss times 1e-30 is the same
        v = v.index_select(0, order.to(v.device, non_blocking=True))
        v = v - v.mean(0)
        return v * (SIZE / torch.linalg.vector_norm(v))

def _norm(x):
    "The 2-norm, in double precision: what is starved is small."
    x = x.detach()
    if x.is_sparse:    x = x.coalesce().values()
    if x.is_complex(): x = torch.view_as_real(x.resolve_conj())
    return torch.linalg.vector_norm(x.as_subclass(torch.Tensor),
                                    dtype=torch.float32 if x.device.type == 'mps' else torch.float64)


# --- where it cannot be done ------------------------------------------------------------------------------------------
def _why_not(model, pred, loss, params):
    "Why a second backward pass is out of the question; None if it is not."
    if not isinstance(pred, torch.Tensor) or not pred.is_floating_point() or not pred.dim():
        return f"the model's answer is no float tensor but {type(pred).__name__}"
    if not pred.requires_grad: return "the model's answer needs no gradient"
    if not isinstance(loss, torch.Tensor) or not loss.requires_grad: return 'the loss needs no gradient'
    if not params: return 'no weight of two or more dimensions is trained'
    if is_compiled(model): return 'the model is compiled'
    if isinstance(model, DistributedDataParallel) and model.static_graph:
        return 'DDP(static_graph=True) allows no second backward pass'
    if hooks_of_all._global_backward_hooks or hooks_of_all._global_backward_pre_hooks \
       or any(m._backward_hooks or m._backward_pre_hooks for m in model.modules()):
        return 'modules have backward hooks, which would be called a second time'
    return next(filter(None, map(_not_twice, _functions(loss.grad_fn))), None)

def _functions(node):
    "The autograd functions written in Python of a graph."
    seen, todo, found = set(), [node], {}
    while todo:
        node = todo.pop()
        if node is None or node in seen: continue
        seen.add(node)
        todo += [n for n, _ in node.next_functions]
        if isinstance(node, torch.autograd.function.BackwardCFunction): found[node._forward_cls] = None
    return found

def _not_twice(f):
    "Why an autograd function may not be run backwards twice; None if it may."
    home = f.__module__
    if home.startswith('torch.utils.checkpoint'):               return 'a reentrant checkpoint'
    if home.startswith(('torch._functorch', 'torch._dynamo')):  return 'a part of the model is compiled'
    if home.startswith('torch.distributed') or f is SyncBatchNorm:
        return f"the backward pass of {f.__name__} waits for other processes"
    if home.split('.')[0] not in TRUSTED:
        return f"{f.__qualname__} is an autograd function of one's own: whether it may run backwards twice is not known"


@contextmanager
def _untouched(ts, device):
    """Hooks of these tensors are put aside, random states kept, and so are the buffers of a module that a checkpoint
    runs again; without autocast."""
    aside  = {id(t._backward_hooks): (t._backward_hooks, dict(t._backward_hooks)) for t in ts if t._backward_hooks}
    pred   = ts[0]
    held   = pred.grad if pred.retains_grad else None
    kept   = []
    keep   = lambda m, _: kept.extend((m._buffers, n, b, b.clone()) for n, b in m._buffers.items() if b is not None)
    handle = hooks_of_all.register_module_forward_pre_hook(keep)
    for d, _ in aside.values(): d.clear()
    try:
        with unchanged_random_state(device), torch.autocast(device.type, enabled=False): yield
    finally:
        handle.remove()
        for d, old in aside.values(): d.update(old)
        for d, n, b, old in reversed(kept):
            b.data.copy_(old)                                 # `data`: not a change to those who have saved it
            d[n] = b
        if pred.retains_grad: pred.grad = held
