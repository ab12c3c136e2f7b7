"""Other tools' rules on our recordings, by the thresholds that their documentation or source gives.

Where their statistic is none of the defaults, the nearest one, marked ~ (saturated: beyond .875 of a bound; a weight's
variance: its mean square):
  SageMaker Debugger  mean|g| < 1e-7 (VanishingGradient), any NaN or Inf (ExplodingTensor), ~ over half of a
                      layer's units dead (DeadRelu), ~ over half saturated, ~ variances of weights 10 times apart
                      (PoorWeightInitialization), update ratio > 10 or < 1e-8, loss not lower by .1 % over 10 steps
                      (LossNotDecreasing, in half of the checks)
  AutoTrainer         |g first| / |g last| < 1e-3 and |g first| < 1e-4; NaN, Inf or loss >= 1e3, ratio > 70; exact zeros
                      >= .7 of a gradient; no epoch gains .01 accuracy; all but NaN only where accuracy is below .6
  DeepDiagnosis       ~ 70 % of outputs <= 0, ~ over half saturated, mean|g| < 1e-7, update ratio outside 1e-5 to .1
  torchmortem         |g last| / |g first| >= 100 over the second half, any ratio > 1000, norm < 1e-8 for 30 % of steps,
                      update ratio outside 1e-5 to .1 (median), ~ over half saturated
"""
import numpy as np

TANH, SIGMOID = {'Tanh', 'Softsign', 'Hardtanh'}, {'Sigmoid', 'Hardsigmoid'}


def late(v): return np.nanmedian(v[-10:], axis=0)

def saturated(r):
    "Whether over half of a bounded activation lies beyond .875 of its bounds, the nearest edges of the bins."
    h, edges = r.rec['activation', 'hist'].astype(float), r.rec.bins.edges                       # (window, layer, bin)
    high = edges[:-1] >= .875
    low  = {t: edges[1:] <= edge for types, edge in ((TANH, -.875), (SIGMOID, 2. ** -6)) for t in types}
    with np.errstate(invalid='ignore'):
        shares = [h[:, k, 1:1 + len(high)][:, high | low[t]].sum(1) / h[:, k].sum(1)
                  for k, t in enumerate(r.rec.layers['activation'].type) if t in low]
    return any(np.nanmedian(s) > .5 for s in shares)

def no_gradient(r): return bool((late(r.get('grad', 'abs_mean', r.layers)) < 1e-7).any())

def sagemaker(r):
    out, rec = set(), r.rec
    if no_gradient(r): out.add('vanishing')
    if not np.isfinite(r.loss).all() or np.nanmax(r.get('grad', 'frac_nonfinite', r.layers)) > 0: out.add('non-finite')
    if np.nanmax(rec['activation', 'frac_dead'][-1]) > .5: out.add('dead')
    if saturated(r): out.add('saturated')
    v = r.get('weight', 'norm', r.layers)[0] ** 2 / rec.layers['weight'].set_index('layer').numel[r.layers].to_numpy()
    if np.nanmin(v) == 0 or np.nanmax(v) / np.nanmin(v) > 10: out.add('init')
    u = r.get('update', 'ratio', r.layers)
    if np.nanmax(u, initial=0) > 10 or (np.nanmedian(u, axis=0) < 1e-8).any(): out.add('update')
    l = r.loss[::10]
    if len(l) > 2 and np.mean(l[1:] > l[:-1] * .999) >= .5: out.add('loss')
    return out

def autotrainer(r):
    out, g = set(), r.get('grad', 'norm', r.layers)
    acc = r.rec.epochs['accuracy'].to_numpy(float) if 'accuracy' in r.rec.epochs else np.array([])
    bad = not len(acc) or acc[-1] < .6
    with np.errstate(all='ignore'): q = np.nanmedian(g[-10:, 0]) / np.nanmedian(g[-10:, -1])
    if not np.isfinite(r.loss).all() or np.nanmax(r.loss) >= 1e3 or bad and q > 70: out.add('explode')
    if bad and q < 1e-3 and np.nanmedian(g[-10:, 0]) < 1e-4: out.add('vanish')
    if bad and (late(r.get('grad', 'frac_zero', r.layers)) >= .7).any(): out.add('dying')
    if bad and len(acc) > 1 and np.max(np.diff(acc)) < .01: out.add('slow')
    return out

def deepdiagnosis(r):
    out = set()
    if np.nanmax(late(r.get('activation', 'frac_zero')), initial=0) >= .7: out.add('dead')
    if saturated(r): out.add('saturated')
    if no_gradient(r): out.add('vanishing')
    u = np.nanmedian(r.get('update', 'ratio', r.layers), axis=0)
    if (u > .1).any() or (u < 1e-5).any(): out.add('update')
    if not np.isfinite(r.loss).all(): out.add('non-finite')
    return out

def torchmortem(r):
    out, g = set(), r.get('grad', 'norm', r.layers)
    with np.errstate(all='ignore'):
        q = np.nanmedian(g[len(g) // 2:, -1] / g[len(g) // 2:, 0])
        m = np.nanmedian(g, axis=0)
        if q >= 100: out.add('vanishing')
        if np.nanmax(m) / np.nanmin(m[m > 0], initial=np.inf) > 1000: out.add('exploding')
        if (np.nanmean(g < 1e-8, axis=0) > .3).any(): out.add('stall')
    u = np.nanmedian(r.get('update', 'ratio', r.layers), axis=0)
    if (u > .1).any() or (u < 1e-5).any(): out.add('update')
    if saturated(r): out.add('saturated')
    return out

OTHERS = dict(SageMaker=sagemaker, AutoTrainer=autotrainer, DeepDiagnosis=deepdiagnosis, torchmortem=torchmortem)
