"What a finding says in numbers, against a computation of its own from what was planted: for every rule."
import numpy as np
import pytest
from planted import FAULTS, N

from fastgradstats import diagnose
from fastgradstats._text import num, pct
from fastgradstats.rules import ALL

med = lambda v: float(np.median(v))

def said(p):
    "{rule: what its finding must say}, each from the planted arrays alone."
    v, loss = p.v, np.asarray(p.iters['loss'], float)
    g, w, u = v['grad', 'norm'], v['weight', 'norm'], v['update', 'norm']
    saved   = np.asarray(p.iters['loss_constant']) - loss
    e       = g * w / loss[:, None]
    norm    = np.sqrt((g ** 2).sum(1))
    tail    = saved[-20:]
    first   = med(loss[:5])
    return dict(
        non_finite     = lambda: ['activation of 1.act', 'at iteration 50', f'the loss before it was {num(loss[49])}'],
        exploding      = lambda: [f'at iteration 40 is {num(norm[40] / med(norm[:3]))} times', f'the loss {num(loss[40])} against {num(first)}',
                                  f"most in 2.weight ({num(g[40, 2] / med(g[:3, 2]))} times)"],
        starved        = lambda: [f'moves the loss by {num(med(np.median(e[-20:], 1)))} %', f'gain over the best constant answer {num(tail.mean())}',
                                  f'lowest in 0.weight ({num(med(e[-20:, 0]))})', f'update ratio {num(med(np.median((u / w)[-20:], 1)))}'],
        vanishing      = lambda: [f'is {num(med(g[-20:, 0]) / med(g[-20:, 3]))} times the largest', f'a factor {num((med(g[-20:, 0]) / med(g[-20:, 3])) ** (1 / 3))} a layer'],
        vanishing_through_time = lambda: ['through the 20 calls of cell', f'after {int(np.ceil(np.log(1e-3) / np.log(.3)))} (a factor {num(.3)} a step)', num(.3 ** 19)],
        fp16_underflow = lambda: [f"{pct(v['grad', 'frac_zero'][:, 0].mean())} of the gradient of 0.weight is exactly zero"],
        dead_units     = lambda: [f"{pct(v['activation', 'frac_dead'][-1, 1])} of the units of 1.act", 'iterations 40 to 59', f'iteration 45 changed 1.weight by {num(u[45, 1] / w[45, 1])} times'],
        saturated      = lambda: [f"{pct(med(v['activation', 'frac_saturated'][-20:, 2]))} of 2.act (Tanh)"],
        step_too_large = lambda: [f'at iteration 30 changed 3.weight by {num(u[30, 3] / w[30, 3])} times', f'loss {num(loss[25:31].mean())} before, {num(med(loss[31:41]))} after'],
        step_too_small = lambda: [f'by {num(med(np.median((u / w)[5:], 1)))} of its norm', f'from {num(first)} to {num(med(loss[-20:]))}', f'elasticity ({num(med(np.median(e[5:], 1)))})'],
        not_zeroed     = lambda: [f'in {N - 1} of {N - 1} steps'],
        no_gradient    = lambda: [f'0.weight, 1.weight ({pct(2 / 4)} of what is to be trained)', f'in any of {N} iterations'],
        eval_mode      = lambda: ['since iteration 0'],
        memorising     = lambda: [f"was {num(min(p.epochs['valid_loss']))} after epoch 0 and is {num(p.epochs['valid_loss'][-1])}", f'batches is {num(loss[-20:].mean())}'],
        not_stepped    = lambda: [f'0.weight, 1.weight: a gradient in {N} steps'],
        bad_init       = lambda: [f"from {num(v['activation', 'std'][0, 0])} in 0.act (ReLU) to {num(v['activation', 'std'][0, 4])} in 4.act (ReLU)",
                                  f"a factor {num(np.exp(-np.polyfit(np.arange(5), np.log(v['activation', 'std'][0]), 1)[0]))} a layer"],
        input_scale    = lambda: [f"mean {num(33.)} and standard deviation {num(80.)}"],
        double_softmax = lambda: ['over 10 classes', f'cannot fall below {num(-np.log(np.e / (np.e + 9)))}'],
        not_learning   = lambda: [f'loss {num(first)} at the start, {num(loss[-20:].mean())} at the end', f'answer {num(tail.mean())} (standard error {num(tail.std(ddof=1) / 20 ** .5)})',
                                  f"of a loss of {num(np.asarray(p.iters['loss_constant'])[-N // 3:].mean())}"],
        unstable       = lambda: [f'began at {num(first)}, reached {num(loss.max())}', f'in {pct((loss[5:] > 2 * max(first, 2.3)).mean())} of the iterations'])

@pytest.mark.parametrize('name', [f.__name__ for f in ALL])
def test_the_evidence_says_what_was_planted(name):
    p = FAULTS[name]()[0]
    f = next(f for f in diagnose(p.record()).findings if f.rule == name)
    for part in said(p)[name](): assert part in f.evidence, (part, f.evidence)
