"""What a rule is and what it yields, and what several rules ask of a run."""
from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .._text import num
from .evidence import FAIR
from .series import WINDOW, rolling_median

SEVERITIES = ('info', 'warning', 'critical')

# what rules need, by the names that a record has for it
LOSS           = ('iters', 'loss')
ELASTICITY     = ('grad', 'elasticity')
RATIO          = ('update', 'ratio')


class Finding(NamedTuple):
    """What is wrong, where, since when, on what evidence, what to try.

    Example:
        Finding(rule='too_quiet', layer='0.weight', iters=(0, 9), value=1e-10, limit=1e-9, severity='warning',
                evidence='no gradient norm is above 1e-10', advice='look at the loss')
    """
    rule:     str
    layer:    str                 # the guilty layer, or the first concerned; '' for the whole network
    iters:    tuple               # first and last iteration at which it was seen
    value:    float               # what was measured ...
    limit:    float               # ... against this
    severity: str                 # 'info': a fact; 'warning': harm is likely; 'critical': harm was measured
    evidence: str                 # in numbers
    advice:   str                 # what to try
    fix:      dict = {}           # the same for a machine: {'lr': .1} multiplies, {'init': 'kaiming'}, {'clip': 1.}
    layers:   tuple = ()          # all layers concerned, in forward order
    first:    str = ''            # the first of what to try; '': all of `advice`

class Unreadable(Exception):
    "A rule cannot judge a record though it has what it needs; the message says why. It is listed as skipped."

def rule(*, needs, source, where=None, cause='', explains=None, ended='', place=None):
    """Make a function of a record a rule: `needs` are (probe, statistic) pairs, or lists of pairs of which one will do;
    `where`: f(rec) -> whether the record is of the kind that the rule is about; it is neither checked nor skipped where
    not. `cause`: how it is called as a cause in the verdict; `explains`: the rules whose findings it accounts for, ()
    of one that is an outcome only; `ended`: how it is told where it ended by itself, {} the last iteration; `place`:
    f(evidence, finding, {rule: findings}) -> ('before' or 'after', rule) of a finding that has another place among the
    causes than its rule, or None."""
    def mark(f):
        f.needs, f.source, f.where = tuple(needs), source, where
        f.cause, f.explains, f.ended, f.place = cause, explains, ended, place
        return f
    return mark


def need(r, rows):
    "Give up on a record that is too short to judge."
    if len(r) >= rows: return
    raise Unreadable(f"{len(r)} measured iteration{' is' if len(r) == 1 else 's are'} too few: {rows} are needed")

def severity(r, *, ended=False, sign=False, row=0, least='info'):
    """'info': a fact; 'warning': harm is likely; 'critical': harm to the outcome was measured. `ended`: it is over, and
    what it did is not seen any more; `sign`: it is one only where nothing is learned; `row`: since when: what began
    just before the loss was not finite any more has done that; `least`: of what nobody wants, whatever comes of it."""
    if r.lost[-1] and row > r.end - WINDOW: return 'critical'
    if r.harm == 'measured' and not ended: return 'critical'
    return least if ended or sign or r.harm == 'none' or r.progress < FAIR else 'warning'

def stuck(r):
    "Whether harm was measured: nothing has been learned."
    return r.harm == 'measured'

def past(r, row, share=.5):
    "Whether what was last seen at `row` ended well before the end, and much has been learned in spite of it."
    return row < .8 * len(r) and r.learned_much(share)

def medians(v):
    "Median of the finite values of every column.  # (row, layer) -> (layer,)"
    return np.array([np.median(c[np.isfinite(c)]) if np.isfinite(c).any() else np.nan for c in v.T])

def root_numel(r):
    "Square root of the size of every weight.  # (layer,)"
    return np.sqrt(r.rec.layers['grad'].numel.to_numpy(float)[r.cols])

def spike(r, row, back=10, limit=.3):
    "The largest relative step of a layer in the rows up to `row`: (iteration, layer, ratio), if it is above `limit`."
    if RATIO not in r.rec or not r.layers: return None
    start = max(row - back, 0)
    v     = np.nan_to_num(r.get('update', 'ratio', r.layers)[start:row + 1], posinf=np.finfo(float).max)
    if not v.size or v.max() < limit: return None
    i, k  = np.unravel_index(v.argmax(), v.shape)
    return int(r.iter[start + i]), r.layers[k], float(v[i, k])

def factors(r, row=None):
    """The three factors of what a step does, and which of them fails, as a clause: the share of the loss that a step
    removes = elasticity x update ratio x direction (the cosine between the update and the way down)."""
    row       = r.full if row is None else row
    e, u, way = rolling_median(r.median_elasticity)[row], rolling_median(r.median_ratio)[row], r.direction[row]
    fails     = r.failing(row)
    if not r.positive or not fails: return ''
    way = num(way) if np.isfinite(way) else 'hidden by the noise of the loss'
    return (f"; of the three factors of a step - elasticity {num(e)}, update ratio {num(u)}, direction {way} - "
            f"{'the ' * (fails != 'elasticity')}{fails} fails")

def told(s): return f"the step at iteration {s[0]} changed {s[1]} by {num(s[2])} times its own norm"
