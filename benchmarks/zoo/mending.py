"Is the guilty layer guilty? The sick run again with one module as the healthy twin has it."
from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from fastai.callback.core import Callback

from fastgradstats import Record

from .cases import CASES
from .judge import evidence
from .training import kit, path, runs, train

SICK, MENDED = .6, .9             # of the healthy twin's gain: a sick run has less, a mended one so much


class Losses(Callback):
    def before_fit(self): self.losses = []
    def after_loss(self):
        if self.training: self.losses.append(float(self.learn.loss.detach()))

def gain(losses, constant):
    "Best constant answer's loss minus the loss at the end."
    end = np.median(losses[-20:])
    return constant - end if np.isfinite(end) else -np.inf

def mended(name, seed, module):
    """The losses of the sick run in which one module is as the healthy twin's, all else as it was. Twins differ in the
    guilty module alone, so any other one is taken from the healthy twin of another seed: a healthy draw."""
    sick, healthy = kit(name, True, seed), kit(name, False, seed if module == CASES[name].guilty else seed + 1000)
    sick.model.set_submodule(module, healthy.model.get_submodule(module))
    log = Losses()
    train(sick, seed, log)
    return log.losses

def modules(model): return [n for n, m in model.named_modules() if n and any(True for _ in m.parameters(recurse=False))]

def mend(out, name, seed, others):
    "Shares of the healthy twin's gain: the sick run's, and with one module mended; `others` too."
    twin, was = (evidence(Record.load(path(out, name, s, seed))) for s in (False, True))
    c    = twin.best_constant
    full = gain(twin.loss, c)
    mine = CASES[name].guilty
    todo = modules(kit(name, True, seed).model) if others else []
    yield dict(case=name, seed=seed, mended='', share=gain(was.loss, c) / full)
    for m in [mine, *(m for m in todo if m != mine)]:
        yield dict(case=name, seed=seed, mended=m, share=gain(mended(name, seed, m), c) / full)

def known(out):
    "What was mended before."
    f = Path(out) / 'mend.csv'
    return pd.read_csv(f, keep_default_na=False, dtype={'mended': str}) if f.exists() else None

def guilt(out):
    "Per case: the shares of the sick run, of the mended one, the best of the other layers; and if the layer is guilty."
    v, rows = known(out), {}
    if v is None: return pd.DataFrame(columns=['guilty', 'sick', 'mended', 'other', 'proven'])
    for name, d in v.groupby('case', sort=False):
        if name not in CASES: continue
        g     = CASES[name].guilty
        sick, mine = (d[d.mended == m].share.median() for m in ('', g))
        best  = d[~d.mended.isin(['', g])].share.max()
        rows[name] = dict(guilty=g, sick=sick, mended=mine, other=best,
                          proven=bool(sick < SICK and mine >= MENDED and not best >= MENDED))
    return pd.DataFrame.from_dict(rows, orient='index')

def intervene(a):
    "Mend every guilty layer that was not mended yet; with the first seed every other one too."
    v    = known(a.out)
    v    = [] if v is None else v.to_dict('records')
    done = {(r['case'], r['seed']) for r in v}
    for seed in range(a.first, a.first + a.seeds):
        for name in dict.fromkeys(n for n, _ in runs(a.only, a.half) if CASES[n].guilty):
            if (name, seed) in done: continue
            v += mend(a.out, name, seed, others=seed == a.first)
            pd.DataFrame(v).to_csv(Path(a.out) / 'mend.csv', index=False)
    with pd.option_context('display.width', 200): print(guilt(a.out).round(2).to_string())
