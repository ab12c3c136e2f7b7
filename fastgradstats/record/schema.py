"What a record is made of: its columns, the names of the probes, the states of a unit, what is derived from what."
from __future__ import annotations

from typing import Callable, NamedTuple

import numpy as np

OUTPUTS    = ('activation', 'grad_output')                    # read at a site: a module's output
PARAMETERS = ('grad', 'grad_used', 'weight', 'update')        # read at a parameter
ENDS       = ('input', 'output')                              # read at the model
PROBES     = OUTPUTS + PARAMETERS + ENDS

ITER_COLS  = dict(iter='int64', fit='int64', epoch='int64', bs='int64', loss='float64', loss_constant='float64',
                  loss_prior='float64', lr='float64', mom='float64', grad_norm='float64', clip_factor='float64',
                  grad_kept='float64', stepped='bool', measured='bool', n_accum='int64', elapsed='float64')
ADDED_COLS = ('loss_prior', 'grad_kept')                      # that earlier records lack: there they are NaN
RESERVED   = {*ITER_COLS, 'gain', 'row', 'probe', 'layer', 'unit_state'}    # not free as a statistic's name
LAYER_LR   = ('update', 'lr')                                 # each parameter's own rate, kept under a reserved name
NOT_ASKED  = {LAYER_LR, ('grad', 'placebo')}                  # recorded, but not by their names
DEAD_UNITS = ('activation', 'frac_dead')                      # the key whose windows are those of the units

# state of one unit over one window, as stored; what the life table makes of a sequence of them is `Record.units`
ALIVE, DEAD, NONFINITE, UNSEEN = 0, 1, 2, -1


class Derived(NamedTuple):
    "A quantity that is not stored: computed from recorded ones when it is read."
    words: str
    needs: list                       # recorded (probe, statistic) pairs
    of: Callable                      # (iters, layers of the probe, *arrays of `needs`) -> array (row, layer)

def _loss(it): return np.abs(it.loss.to_numpy())[:, None]

DERIVED = {
    ('grad', 'rms'):        Derived("norm / sqrt(numel)", [('grad', 'norm')],
                                    lambda it, d, g: g / np.sqrt(d.numel.to_numpy(float)).astype(np.float32)),
    ('grad', 'per_loss'):   Derived("norm / |loss|", [('grad', 'norm')],
                                    lambda it, d, g: g.astype(float) / _loss(it)),
    ('grad', 'elasticity'): Derived("|g| |w| / |loss|", [('grad', 'norm'), ('weight', 'norm')],
                                    lambda it, d, g, w: g.astype(float) * w / _loss(it)),
    ('update', 'ratio'):    Derived("|update| / |weight|", [('update', 'norm'), ('weight', 'norm')],
                                    lambda it, d, u, w: np.where(w == 0, np.nan, u / w)),
}
