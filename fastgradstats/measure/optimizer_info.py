"What the record says of an optimizer, fastai's or torch's."
from __future__ import annotations

from collections.abc import Mapping
from numbers import Real

import torch

from .module_hooks import Hook

NAMES = dict(sgd_step='SGD', momentum_step='SGD', rms_prop_step='RMSProp', adam_step='Adam', radam_step='RAdam',
             qhadam_step='QHAdam', larc_step='Larc', lamb_step='Lamb')                # fastai's steps
TRUE_DECAY = ('AdamW', 'Muon', 'Adafactor')           # torch's that shrink the weights themselves and have no choice


def layers(opt):
    "An optimizer and those that it wraps, one within the other."
    while opt is not None:
        yield opt
        opt = next((vars(opt)[k] for k in ('opt', 'optimizer') if k in getattr(opt, '__dict__', ())), None)

def stepping(opt):
    "The optimizer and those that it wraps and steps (accelerate's, Lightning's, SAM's); the last one does the step."
    found = [opt]
    while True:
        inner = next((v for v in vars(found[-1]).values() if isinstance(v, torch.optim.Optimizer) and
                      not any(v is o for o in found)), None)
        if inner is None: break
        found.append(inner)
    return [o for o in found if hasattr(o, '_optimizer_step_pre_hooks')]

def runs_hooks(opt):
    "Whether hooks of others run before the step of a torch optimizer, or of one within: they may change gradients."
    return any(not isinstance(f, Hook) for o in layers(opt)
               for f in getattr(o, '_optimizer_step_pre_hooks', {}).values())

def describe(
    opt,                          # a fastai or torch optimizer, or what wraps one
):                                # dict name, wd, decoupled, eps
    """Its name, weight decay, whether that shrinks the weights themselves (None: not known), and eps (None: has none).
    A list where parameter groups differ."""
    wraps = [type(opt).__name__] if hasattr(opt, 'slow_weights') else []              # fastai's Lookahead
    opt  = [*layers(opt)][-1]
    name = type(opt).__name__
    groups = hypers(opt)
    if hasattr(opt, 'hypers'):                                                        # fastai's
        key   = 'wd'
        steps = [getattr(getattr(f, 'func', f), '__name__', '') for f in getattr(opt, 'cbs', [])]
        name  = next((NAMES[s] for s in steps if s in NAMES), name)
        flags = [True if 'weight_decay' in steps else False if 'l2_reg' in steps else None]
    else:
        key   = 'weight_decay'
        known = name in TRUE_DECAY if type(opt).__module__.startswith('torch.optim') else None
        flags = [g.get('decoupled_weight_decay', known) for g in groups]
    return dict(name='('.join([*wraps, name]) + ')' * len(wraps),
                wd=_one([g.get(key, 0. if g else None) for g in groups]), decoupled=_one(flags),
                eps=_one([g.get('eps') for g in groups]))

def hypers(opt):
    "The hyperparameters of each of its groups: fastai's, torch's, or its own rate; [{}] where it does not tell."
    for name in ('hypers', 'param_groups'):
        found = list(getattr(opt, name, None) or ())
        if found and all(isinstance(g, Mapping) for g in found): return found
    rate = getattr(opt, 'lr', None)
    return [dict(lr=rate)] if isinstance(rate, Real) else [{}]

def parameters(opt):
    "The parameters of each of its groups; [] where it does not tell."
    groups = getattr(opt, 'param_lists', None) or getattr(opt, 'param_groups', None)
    if groups is None: groups = [opt.params] if isinstance(getattr(opt, 'params', None), (list, tuple)) else []
    return [list(g['params'] if isinstance(g, Mapping) else g) for g in groups]

def _one(values):
    "The value of all groups, or a list of each one's."
    values = [float(v) if isinstance(v, (int, float, torch.Tensor)) and not isinstance(v, bool) else
              v if isinstance(v, bool) else None for v in values]
    return (values[0] if values.count(values[0]) == len(values) else values) if values else None
