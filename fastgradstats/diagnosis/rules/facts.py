"Rules about what was observed: parameters that no gradient reaches, modules that are left in evaluation mode."
from __future__ import annotations

from ..._text import pct
from ..evidence import run
from ..finding import rule, severity
from ..fixes import found


@rule(cause='no gradient reaches some parameters',
      explains=('starved', 'not_learning'),
      needs=[('grad', 'norm')], where=lambda rec: 'parameters' in rec.meta,
      source='observed: parameters that require a gradient and never received one. A spare branch is usual (a pooler, '
             'an auxiliary head: a few per cent), so it harms only with a share of all parameters')
def no_gradient(rec, large=.1, few=3):
    "Parameters are to be trained and no gradient ever arrives: a part is detached, or not used."
    r     = run(rec)
    about = rec.meta['parameters']
    names = tuple(about['without_gradient'])
    if not names or len(r) < few: return
    size  = dict(zip(rec.layers['grad'].layer, rec.layers['grad'].numel))
    total = sum(n for l, n in size.items() if l not in about['frozen'])
    share = sum(size.get(l, 0) for l in names) / max(total, 1)
    much  = share >= large
    yield found(r, 'no_gradient', layer=names[0], layers=names, iters=(int(r.iter[0]), int(r.iter[-1])), value=share,
                limit=large, severity=severity(r) if much else 'info',
                also=["a look for detach(), no_grad or .data on the way from them to the loss; requires_grad_(False) "
                      "where they are meant to stay as they are"],
                evidence=f"{r.called(names)} ({pct(share)} of what is to be trained) received no gradient in any of "
                         f"{len(r)} iterations")


@rule(cause='modules are in evaluation mode while the model is trained',
      explains=('unstable', 'not_learning'),
      needs=[], where=lambda rec: bool(rec.meta.get('eval_mode')),
      source='observed: Module.training; batch norms whose own parameters are frozen are meant to be so')
def eval_mode(rec):
    "Batch norms or dropout act as in evaluation while the model is trained."
    r       = run(rec)
    frozen  = {*rec.meta.get('parameters', {}).get('frozen', ())}
    modules = [n for n in rec.meta['eval_mode'] if n == 'model' or f'{n}.weight' not in frozen]
    if not modules: return
    since = int(r.all.iter.iloc[min(min(rec.meta['eval_mode'].values()), len(r.all) - 1)])
    yield found(r, 'eval_mode', layer=modules[0], layers=tuple(modules), iters=(since, int(r.iter[-1])),
                value=float(len(modules)), limit=0., severity=severity(r),
                also=["model.train() before training, also after each validation"],
                evidence=f"since iteration {since} {r.called(modules)} {'is' if len(modules) == 1 else 'are'} in "
                         f"evaluation mode: batch norms use their running statistics and dropout drops nothing")
