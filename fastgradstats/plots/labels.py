"What plots say: names and units of statistics, whose they are."
from __future__ import annotations

from ..record.schema import PARAMETERS
from ..record.select import names_at, pick_layers

NEAR_ZERO = .05

PROBES = dict(activation='activation', grad_output='output gradient', grad='gradient', grad_used='used gradient',
              weight='parameter', update='update', input='model input', output='model output')
STATS  = dict(norm='L2 norm', std='standard deviation', frac_zero='share of exact zeros',
              frac_near_zero=f'share with |x| < {NEAR_ZERO}', frac_nonfinite='share of non-finite values',
              frac_dead='share of dead units', frac_dormant='share of dormant units',
              frac_saturated='share of saturated elements', abs_mean='mean magnitude', abs_median='median magnitude',
              abs_max='largest magnitude', rms='root mean square', elasticity='elasticity E = |g||w|/loss',
              per_loss='L2 norm / |loss|', ratio='update ratio |update|/|weight|', hist='share', lr='learning rate')
LOSS, PER_WEIGHT = 'as the loss function', 'loss per unit of weight'
UNITS  = dict(elasticity='% of loss per % of weight', ratio='ratio', per_loss='per unit of weight', loss=LOSS,
              loss_constant=LOSS, gain=LOSS, lr='per step', elapsed='s', bs='examples', hist='share of elements')
OF     = dict(grad=PER_WEIGHT, grad_used=PER_WEIGHT, grad_output='loss per unit of output',
              activation='as the activation', weight='as the weight', update='as the weight',
              input='as the input', output='as the output')


def unit(rec, key):
    stat = key if isinstance(key, str) else key[1]
    got  = rec.meta.get('units', {}).get(stat)
    if got: return got
    if stat in UNITS:            return UNITS[stat]
    if stat.startswith('frac_'): return 'share, 0 to 1'
    return 'value' if isinstance(key, str) else OF.get(key[0], 'value')

def subject(rec, probe, idx=None):
    "Whose number it is; which gradient is always said."
    if probe not in PARAMETERS: return PROBES.get(probe, probe)
    names = names_at(rec, probe, pick_layers(rec, probe) if idx is None else idx)
    kind  = ('weight' if names and all(n.endswith('weight') for n in names) else
             'bias'   if names and all(n.endswith('bias') for n in names)   else 'parameter')
    after = dict(grad=' gradient', grad_used=' gradient as used', weight='', update=' update')
    return kind + after[probe]

def label(rec, key, idx=None):
    "What is drawn, and its unit."
    if isinstance(key, str): name = key.replace('_', ' ')
    else:
        name = STATS.get(key[1], key[1].replace('_', ' '))
        whose = subject(rec, key[0], idx)
        if key[1] == 'elasticity': name += f' ({whose})'
        elif key[1] == 'lr': name += f' of the {whose.split()[0]}'
        elif key[1] not in ('ratio', 'frac_dead', 'frac_dormant'): name += f' of the {whose}'
    return f"{name} [{unit(rec, key)}]"

def heading(rec, key, idx=None):
    "What is drawn, as a title."
    text = label(rec, key, idx).split(' [')[0]
    return text[:1].upper() + text[1:]
