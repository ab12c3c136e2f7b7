"""Other tools' rules on our recordings, by the thresholds that their documentation or source gives.

Where their statistic was not recorded, the nearest one, marked ~:
  SageMaker Debugger  mean|g| < 1e-7 (VanishingGradient), any NaN or Inf (ExplodingTensor), ~ over half of a
                      layer's units dead (DeadRelu), ~ over half saturated, variances of weights 10 times apart
                      (PoorWeightInitialization), update ratio > 10 or < 1e-8, loss not lower by .1 % over 10 steps
                      (LossNotDecreasing, in half of the checks)
  AutoTrainer         |g first| / |g last| < 1e-3 and |g first| < 1e-4; NaN, Inf or loss >= 1e3, ratio > 70; exact zeros
                      >= .7 of a gradient; no epoch gains .01 accuracy; all but NaN only where accuracy is below .6
  DeepDiagnosis       ~ 70 % of outputs <= 0, ~ over half saturated, mean|g| < 1e-7, update ratio outside 1e-5 to .1
  torchmortem         |g last| / |g first| >= 100 over the second half, any ratio > 1000, norm < 1e-8 for 30 % of steps,
                      update ratio outside 1e-5 to .1 (median), over half saturated
"""
import numpy as np


def sagemaker(r):
    out, rec = set(), r.rec
    if (np.nanmedian(r.get('grad', 'abs_mean', r.layers)[-10:], axis=0) < 1e-7).any(): out.add('vanishing')
    if not np.isfinite(r.loss).all() or np.nanmax(r.get('grad', 'frac_nonfinite', r.layers)) > 0: out.add('non-finite')
    if np.nanmax(rec['activation', 'frac_dead'][-1]) > .5: out.add('dead')
    s = r.get('activation', 'frac_saturated')
    if np.isfinite(s).any() and np.nanmax(np.nanmedian(s, axis=0)) > .5: out.add('saturated')
    v = r.get('weight', 'std', r.layers)[0] ** 2
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
    if bad and (np.nanmedian(r.get('grad', 'frac_zero', r.layers)[-10:], axis=0) >= .7).any(): out.add('dying')
    if bad and len(acc) > 1 and np.max(np.diff(acc)) < .01: out.add('slow')
    return out

def deepdiagnosis(r):
    out = set()
    a = r.get('activation', 'frac_zero')
    if np.nanmax(np.nanmedian(a[-10:], axis=0), initial=0) >= .7: out.add('dead')
    s = r.get('activation', 'frac_saturated')
    if np.isfinite(s).any() and np.nanmax(np.nanmedian(s, axis=0)) > .5: out.add('saturated')
    if (np.nanmedian(r.get('grad', 'abs_mean', r.layers)[-10:], axis=0) < 1e-7).any(): out.add('vanishing')
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
    s = r.get('activation', 'frac_saturated')
    if np.isfinite(s).any() and np.nanmax(np.nanmedian(s, axis=0)) > .5: out.add('saturated')
    return out

OTHERS = dict(SageMaker=sagemaker, AutoTrainer=autotrainer, DeepDiagnosis=deepdiagnosis, torchmortem=torchmortem)
