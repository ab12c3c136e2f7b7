"`watch`: the way to record a loop of one's own."
from __future__ import annotations

from typing import Any

import torch

from .loop import Watch
from .plan import DEFAULTS, SETTINGS, Plan, check_names
from .probes import PROBES


def watch(
    model: torch.nn.Module,            # the model, as the loop calls it
    opt: Any,                          # the optimizer whose steps are the rows, torch's or any that has a `step`; None:
                                       # the one of torch's that steps the model, or else what changes its weights
    *,
    window: int | None = 50,           # rows of a window of the life table: a plain loop has no epochs
    scaler: Any = None,                # a GradScaler that is not made of torch's, whose own are found
    loss_func: Any = None,             # the loss function: with `w.loss(loss, pred, target)` the gain is measured
    **settings: Any,                   # the probes and settings of LayerStatsCallback, but for `verbose`
) -> Watch:
    """Record a plain PyTorch loop: `with watch(model, opt) as w: ...`, then `w.record`. A row is one call of the
    optimizer's step; with `opt=None` and no optimizer of torch's, weights that have changed by the next pass.

    Raises:
        TypeError: the model is no Module, the optimizer has no `step`, or a setting is not known.
        ValueError: a setting is out of its range.

    Example:
        with watch(model, opt, every=2) as w:
            for x, y in batches:
                w.loss(loss_func(model(x), y)).backward()
                opt.step()
                opt.zero_grad()
        w.record['grad', 'norm']
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"watch takes the model, an nn.Module, then the optimizer; got {type(model).__name__} first")
    if opt is not None and not callable(getattr(opt, 'step', None)):
        raise TypeError(f"watch needs an optimizer, an object with a `step`, or None where the loop changes the "
                        f"weights itself; got {type(opt).__name__}. In fastai use LayerStatsCallback()")
    if scaler is not None and (isinstance(scaler, type) or not hasattr(scaler, 'get_scale')):
        raise TypeError(f"scaler is the loop's torch.amp.GradScaler; got {scaler!r}")
    check_names('watch', settings, (*PROBES, *SETTINGS, 'scaler', 'loss_func'))
    return Watch(model, opt, Plan(window=window, **{**DEFAULTS, **settings}), scaler, loss_func)
