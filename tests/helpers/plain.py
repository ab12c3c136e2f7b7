"""A plain reading of a PyTorch loop: what stands in `p.grad` before a step, and how far the weights have moved after it. Knows
nothing of the package."""
import math

import numpy as np
import torch
from torch import nn


def norm(t): return float(torch.linalg.vector_norm(t.detach().to_dense().reshape(-1).to(torch.complex128 if t.is_complex() else torch.float64)))

class Plain:
    "Call `before` and `after` around each step of the loop's optimizer; `rows` are {probe: {parameter: 2-norm}}."
    def __init__(self, model): self.model, self.rows = model, []
    def params(self): return list(self.model.named_parameters())
    def gradients(self):
        "May be called again before `after`: the last reading counts."
        self.grad = {n: math.nan if p.grad is None else norm(p.grad) for n, p in self.params()}
    def before(self):
        self.gradients()
        self.old = {n: p.detach().clone() for n, p in self.params()}
    def after(self):
        now = dict(self.params())
        self.rows.append(dict(grad=self.grad, weight={n: norm(p) for n, p in self.old.items()},
                              update={n: norm(now[n].detach() - p) for n, p in self.old.items()}))

    def step(self, opt):
        self.before(); opt.step(); self.after()

def same(rec, plain, but=(), rtol=1e-5):
    "The record has the plain reading's rows, all stepped; where no gradient was, nothing is said."
    assert len(rec) == len(plain.rows) and rec.iters.stepped.all()
    for probe in ('grad', 'weight', 'update'):
        names = list(rec.layers[probe].layer)
        for k, row in enumerate(plain.rows):
            for n, want in row[probe].items():
                if n in but: continue
                got = rec[probe, 'norm'][k, names.index(n)]
                if math.isnan(row['grad'][n]): assert math.isnan(got), (probe, n, k)
                else: np.testing.assert_allclose(got, want, rtol=rtol, atol=1e-12, err_msg=f'{probe} of {n} in row {k}')
    total = [math.sqrt(sum(g ** 2 for g in r['grad'].values() if not math.isnan(g))) for r in plain.rows]
    if not but: np.testing.assert_allclose(rec.iters.grad_norm, total, rtol=rtol)

def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

def batches(n=4, bs=8):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(bs, 6, generator=g), torch.randint(3, (bs,), generator=g)) for _ in range(n)]

def batch(n=8): return torch.randn(n, 6), torch.arange(n) % 3

def hooks(model, *others):
    "How many hooks are left on a model and its optimizers."
    on = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    on += sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())
    return on + sum(len(o._optimizer_step_pre_hooks) + len(o._optimizer_step_post_hooks) + ('zero_grad' in vars(o)) for o in others)
