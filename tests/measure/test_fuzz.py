"""A random small model, trained in a random set of modes with random settings of the callbacks, against the float64 reading of
the same run: every recorded number of every row. 50 examples; 300 with `-m slow`."""
import numpy as np
import pytest
import torch
from torch import nn
from hypothesis import HealthCheck, given, settings, strategies as st
from fastai.callback.fp16 import AMPMode
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.optimizer import Adam, OptimWrapper, SGD

from fastgradstats import DeadUnitCallback, GradStatsCallback, LayerStatsCallback
from modes import Blow, CpuPrecision
from reference import REFERENCE, Spy, check, hooks_on, learner


NAMES = list(REFERENCE)
WHOLE = [s for s in NAMES if 'median' not in s]
ACTS  = dict(relu=nn.ReLU, inplace=lambda: nn.ReLU(inplace=True), leaky=nn.LeakyReLU, tanh=nn.Tanh, gelu=nn.GELU,
             relu6=nn.ReLU6, sigmoid=nn.Sigmoid)
OPTS  = dict(sgd=SGD, adam=Adam, torch=lambda ps, lr: OptimWrapper(ps, torch.optim.AdamW))

@st.composite
def runs(draw):
    "What is trained, and how."
    pick  = lambda *xs: draw(st.sampled_from(xs))
    depth = draw(st.integers(1, 3))
    return dict(conv=draw(st.booleans()), width=draw(st.integers(2, 9)), acts=[pick(*ACTS) for _ in range(depth)],
                norm=draw(st.booleans()), bs=draw(st.integers(2, 9)), n=draw(st.integers(9, 30)), seed=draw(st.integers(0, 999)),
                amp=pick(None, None, 'fp16', 'bf16'), acc=draw(st.one_of(st.none(), st.integers(2, 30))),
                clip=draw(st.one_of(st.none(), st.floats(.01, 2))), overflow=draw(st.booleans()), opt=pick(*OPTS),
                every=draw(st.integers(1, 3)), freeze=draw(st.booleans()), fits=draw(st.integers(1, 2)),
                one_cycle=draw(st.booleans()), scale=2. ** draw(st.integers(-12, 12)), parts=draw(st.booleans()),
                probes=draw(st.sets(st.sampled_from(['grad_used', 'grad_output', 'weight', 'update', 'activation']))))

def _model(r):
    layers, sites, at = [], [], []
    for k, act in enumerate(r['acts']):
        inp = (1 if r['conv'] else 6) if k == 0 else r['width']
        layers += [nn.Conv2d(inp, r['width'], 3, padding=1) if r['conv'] else nn.Linear(inp, r['width'])]
        at.append(len(layers) - 1)
        if r['norm'] and r['conv']: layers += [nn.GroupNorm(1, r['width'])]
        layers += [ACTS[act]()]
        sites.append(str(len(layers) - 1))
    if r['conv']: layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    layers += [nn.Linear(r['width'], 3)]
    return nn.Sequential(*layers), sites, len(layers) - 1

def _check(r):
    torch.manual_seed(r['seed'])
    model, sites, head = _model(r)
    spy = Spy(sites)
    cbs = [spy]
    if r['amp']:  cbs += [CpuPrecision(AMPMode.FP16, init_scale=2. ** 8, growth_interval=4) if r['amp'] == 'fp16'
                          else CpuPrecision(AMPMode.BF16)]
    if r['acc']:  cbs += [GradientAccumulation(r['acc'])]
    if r['clip']: cbs += [GradientClip(r['clip'])]
    if r['overflow'] and r['amp'] == 'fp16': cbs += [Blow(2, 5)]
    probes = {p: (NAMES if p not in ('activation', 'grad_output') else WHOLE) if p in r['probes'] else None
              for p in ('grad_used', 'grad_output', 'weight', 'update', 'activation')}
    cbs += [LayerStatsCallback(grad=NAMES + ['hist'], **probes, every=r['every'], verbose=False)]
    if r['parts']: cbs += [GradStatsCallback(every=r['every']), DeadUnitCallback(every=r['every'])]
    learn = learner(model=model, kind=(None, (1, 5, 5) if r['conv'] else (6,)), cbs=cbs, n=r['n'], bs=r['bs'],
                    loss_func=lambda p, y: nn.functional.cross_entropy(p, y) * r['scale'], start=r['seed'], opt_func=OPTS[r['opt']],
                    lr=1e-2, splitter=lambda m: [[p for l in m[:head] for p in l.parameters()], list(m[head].parameters())])
    for k in range(r['fits']):
        if r['freeze']: learn.freeze() if k == 0 else learn.unfreeze()
        learn.fit_one_cycle(1, 1e-2) if r['one_cycle'] else learn.fit(2)
    rec = learn.layer_stats
    check(rec, spy.spy_rows, rtol=2e-4, some=False)
    sizes = rec.layers['grad'].numel.to_numpy()
    hist  = rec['grad', 'hist'].sum(-1)
    seen  = ~np.isnan(hist)
    assert (hist[seen] == np.broadcast_to(sizes, hist.shape)[seen]).all()
    if not r['clip']: assert rec.iters.clip_factor.dropna().eq(1).all()
    assert not hooks_on(learn.model)

COMMON = dict(deadline=None, suppress_health_check=list(HealthCheck), print_blob=True, database=None)

@settings(max_examples=50, derandomize=True, **COMMON)
@given(runs())
def test_random_models_in_random_modes(r): _check(r)

@pytest.mark.slow
@settings(max_examples=300, **COMMON)
@given(runs())
def test_random_models_in_random_modes_at_length(r): _check(r)
