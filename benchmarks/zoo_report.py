"""The zoo judged: our rules beside those of other tools, by their published thresholds, on the same recordings.

Others' thresholds, as their documentation or source gives them; where their statistic was not recorded, the nearest one, marked ~:
  SageMaker Debugger  mean|g| < 1e-7 (VanishingGradient), any NaN or Inf (ExplodingTensor), ~ over half of a layer's units dead (DeadRelu),
                      ~ over half saturated, variances of weights 10 times apart (PoorWeightInitialization), update ratio > 10 or < 1e-8,
                      loss not lower by .1 % over 10 steps (LossNotDecreasing, in half of the checks)
  AutoTrainer         |g first| / |g last| < 1e-3 and |g first| < 1e-4; NaN, Inf or loss >= 1e3, ratio > 70; exact zeros >= .7 of a gradient;
                      no epoch gains .01 accuracy; all but NaN only where accuracy is below .6
  DeepDiagnosis       ~ 70 % of outputs <= 0, ~ over half saturated, mean|g| < 1e-7, update ratio outside 1e-5 to .1
  torchmortem         |g last| / |g first| >= 100 over the second half, any ratio > 1000, norm < 1e-8 for 30 % of steps, update ratio
                      outside 1e-5 to .1 (median), over half saturated
"""
import warnings

import numpy as np
from zoo import CASES, path, runs

from fastgradstats import Record, diagnose
from fastgradstats.evidence import run

warnings.filterwarnings('ignore')
SLICES = (20, 30, 40, 60, 80, 120)


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


def upto(rec, n):
    "The first n rows of a record."
    it   = rec.iters
    last = it.iter.iloc[min(n, len(it)) - 1]
    wins = {k: w[w.last_iter <= last] for k, w in rec.windows.items()}
    vals = {k: rec[k][:len(wins[k])] if k in wins else rec[k][:n] for k in rec.keys()}
    return Record(it.iloc[:n], vals, rec.layers, wins, None, rec.epochs, rec.bins, rec.meta)

def judge(name, sick, rec):
    "Our verdict on one run: (alarm, rightly named first, rule named first, network verdict, first detection)."
    rep = diagnose(rec)
    bad = [f for f in rep.findings if f.severity != 'info']
    first, when = bad[0].rule if bad else '', None
    if sick and first in CASES[name].truth:
        for n in SLICES:
            if n >= len(rec): break
            early = [f for f in diagnose(upto(rec, n)).findings if f.severity != 'info']
            if early and early[0].rule in CASES[name].truth: when = n; break
    return bool(bad), first in CASES[name].truth, first, rep, when

def report(a):
    out, seeds, half, only = a.out, a.seeds, a.half, a.only
    for h in ('tuned', 'unseen') if half == 'both' else (half,):
        tally, misses, alarms, others, when = dict(sick=0, found=0, named=0, healthy=0, false=0), [], [], {t: [0, 0] for t in OTHERS}, []
        starved = dict(right=0, wrong=0)
        for name, sick in runs(only, h):
            for seed in range(seeds):
                p = path(out, name, sick, seed)
                if not p.exists(): continue
                rec = Record.load(p)
                alarm, right, first, rep, n = judge(name, sick, rec)
                conv  = rep.verdict.startswith('Converged')
                star  = any(f.rule == 'starved' and f.severity != 'info' for f in rep.findings)
                stuck = any(f.rule in ('not_learning', 'non_finite') for f in rep.findings)
                if conv: starved['wrong' if sick and stuck else 'right'] += 1
                if star: starved['right' if sick else 'wrong'] += 1
                for t, f in OTHERS.items(): others[t][0 if sick else 1] += bool(f(run(rec)))
                if sick:
                    tally['sick'] += 1; tally['found'] += alarm; tally['named'] += right
                    if not right: misses.append(f"{name} seed {seed}: {first or 'nothing'}")
                    elif n: when.append(n)
                else:
                    tally['healthy'] += 1; tally['false'] += alarm
                    if alarm: alarms.append(f"{name} seed {seed}: {first}")
        t = tally
        pc = lambda a, b: f"{a}/{b}" + (f" ({100 * a / b:.0f} %)" if b else '')
        print(f"\n## {h} half\n\n| rules | sick runs: alarm | rightly named first | healthy runs: false alarm |\n|---|---|---|---|")
        print(f"| fastgradstats | {pc(t['found'], t['sick'])} | {pc(t['named'], t['sick'])} | {pc(t['false'], t['healthy'])} |")
        for k, (a, b) in others.items(): print(f"| {k} | {pc(a, t['sick'])} | - | {pc(b, t['healthy'])} |")
        print(f"\nstarved or converged named: right {pc(starved['right'], sum(starved.values()))}. First detection (rows {SLICES}): median "
              f"{np.median(when) if when else '-'}, within 40 rows {pc(sum(w <= 40 for w in when), len(when))} of those found early.")
        print('Misses: ' + ('; '.join(misses) or 'none') + '\nFalse alarms: ' + ('; '.join(alarms) or 'none'), flush=True)
