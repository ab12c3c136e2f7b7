"Rules about the outcome: whether anything was learned, and whether it holds on the validation set."
from __future__ import annotations

import numpy as np

from ..._text import num
from ..evidence import run
from ..series import rolling_mean
from ..finding import LOSS, Unreadable, factors, need, rule, severity
from ..fixes import found

ADVICE = {
    'elasticity':   "another initialisation, normalisation between the layers",
    'update ratio': "a larger learning rate; or a check that the optimizer is given all weights",
    'direction':    "a look at the data: gradients, steps and their directions are in order, so the net moves and "
                    "nothing it tries helps; that labels belong to their inputs, that the loss has the right sign, "
                    "that the inputs tell anything about the targets",
    '':             "a check of the labels, the data, the learning rate"}


@rule(cause='nothing is learned',
      explains=(),
      needs=[LOSS],
      source="SM LossNotDecreasing: .1 % over 10 steps. Here: certainly not a twentieth of the constant answer's loss "
             "saved, the loss not falling any more, after 40 rows, thresholds.py")
def not_learning(rec, few=40):
    "Nothing has been learned from the input at the end, and the loss does not fall."
    r = run(rec)
    need(r, few)
    if not np.isfinite(r.best_constant):
        raise Unreadable("whether anything is learned was not measured: watch(model, opt, loss_func=f) and "
                         "w.loss(loss, pred, target) do")
    if not np.isfinite(r.loss[-1]) or r.harm != 'measured' or r.rising()[0][-1]: return
    b = r.not_learned[:r.end + 1]
    a = len(b) - int(np.argmin(b[::-1])) if not b.all() else 0
    g, error = r.gain_over_constant[-1], r.gain_error[-1]
    yield found(r, 'not_learning', iters=(r.began(a), int(r.iter[-1])), value=float(g), limit=float(r.worth[-1]),
                severity=severity(r), also=[ADVICE[r.failing()]],
                evidence=f"loss {num(r.first_loss)} at the start, {num(rolling_mean(r.loss)[-1])} at the end; gain "
                         f"over the best constant answer {num(g)} (standard error {num(error)}) of a loss of "
                         f"{num(r.best_constant)}{factors(r)}")


@rule(cause='what is learned does not hold on the validation set',
      explains=(),
      ended='the validation loss has risen from its lowest',
      needs=[LOSS], where=lambda rec: 'valid_loss' in rec.epochs and rec.epochs.valid_loss.notna().sum() > 1,
      source='validation loss against that of the best constant answer: never below it, nothing is known of other '
             'examples; where it once was, the rise is overfitting, which need not be')
def memorising(rec, more=.1):
    "The loss of the batches falls while that of the validation set rises."
    r = run(rec)
    if not np.isfinite(r.best_constant) or not r.floored: return       # of a loss below zero a share says nothing
    v, low = r.valid, float(np.min(r.valid))
    train  = rolling_mean(r.loss)[r.end]
    if not (v[-1] > (1 + more) * low and train < (1 - more) * low and r.learned[r.end]): return
    none = r.best_constant - low < r.worth[r.end]
    yield found(r, 'memorising', iters=(int(r.iter[0]), int(r.iter[-1])), value=float(v[-1]), limit=low,
                severity='warning' if none else 'info',
                also=["more data or augmentation, weight decay, dropout, fewer epochs; and a look at the labels if the "
                      "validation loss never falls"],
                evidence=f"the validation loss was {num(low)} after epoch {int(np.argmin(v))} and is {num(v[-1])} at "
                         f"the end, where that of the batches is {num(train)}"
                         + f"; a constant answer has {num(r.best_constant)}")
