"Rules about the outcome: whether anything was learned."
from __future__ import annotations

import numpy as np

from ..._text import num
from ..evidence import WINDOW, run, rolling_median
from ..finding import LOSS, factors, need, rule
from ..fixes import found

ADVICE = {
    'elasticity':   "another initialisation, normalisation between the layers",
    'update ratio': "a larger learning rate; or a check that the optimizer is given all weights",
    'direction':    "a check of what the steps follow, as they are large enough and do not add up: that labels belong "
                    "to the inputs, gradients are zeroed, momentum and learning rate are not too large",
    '':             "a check of the labels, the data, the learning rate"}


@rule(cause='nothing is learned',
      explains=(),
      needs=[LOSS],
      source="SM LossNotDecreasing: .1 % over 10 steps. Here: not a twentieth of the constant answer's loss after 40 "
             "rows, thresholds.py")
def not_learning(rec, few=40):
    "Nothing has been learned from the input at the end."
    r = run(rec)
    need(r, few)
    if not np.isfinite(r.loss[-1]): return
    b = r.not_learned
    if not b[-WINDOW:].all() or r.falling[-1] or r.rising()[0][-1]: return
    a   = len(b) - int(np.argmin(b[::-1])) if not b.all() else 0
    g   = r.gain_over_constant[-1]
    was = (f"gain over the best constant answer {num(max(g, 0))} at the end" if np.isfinite(g) else
           "gain was not measured")
    yield found('not_learning', iters=(int(r.iter[a]), int(r.iter[-1])), value=float(g),
                limit=.05 * abs(r.best_constant), severity='critical', also=[ADVICE[r.failing()]],
                evidence=f"loss {num(r.first_loss)} at the start, {num(rolling_median(r.loss)[-1])} at the end; "
                         f"{was}"
                         + factors(r))
