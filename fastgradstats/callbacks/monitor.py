"""`DiagnosisCallback`: diagnoses while it trains, warns once per finding, can end the fit, keeps a flight recorder."""
from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch
from fastai.callback.core import CancelFitException

from .layer_stats import LayerStatsCallback
from ..diagnosis.report import diagnose
from ..diagnosis.series import WINDOW
from ..measure.plan import whole
from ..diagnosis.rules import ALL

SPIKE = 10.                       # a gradient norm of so many times the median of those kept is a sign of trouble


class _Due:
    "Measure every n-th iteration, and all of them up to `until`."
    def __init__(self, every): self.every, self.until = every, -1
    def __call__(self, i):     return i % self.every == 0 or i < self.until
    @property
    def __name__(self): return f'every {self.every}, each one after trouble'


class DiagnosisCallback(LayerStatsCallback):
    """Diagnose while training; warn once a finding; end the fit on those in `stop_on`; keep the last losses and norms.

    Raises:
        TypeError: `rules` is no list of functions, or as LayerStatsCallback.
        ValueError: `stop_on` has a name that no rule has, or as LayerStatsCallback.

    Example:
        learn.fit(2, cbs=DiagnosisCallback(stop_on='non_finite', check=50))
    """
    def __init__(self,
        stop_on: str | Sequence[str] | None = ('non_finite', 'exploding'),
                                          # names of rules that end the fit when they find a warning or worse
        every:   int = 1,                 # measure every n-th iteration; from the first sign of trouble all of the
                                          # next `keep`
        keep:    int = 200,               # iterations that the flight recorder holds
        check:   int = WINDOW,            # iterations between two diagnoses
        rules:   Sequence[Callable] = ALL,    # as `diagnose`
        **settings: Any,                  # the probes and settings of LayerStatsCallback
    ):
        if not isinstance(rules, (list, tuple)) or not all(map(callable, rules)):
            raise TypeError(f"rules is a list of rules, as of `diagnose`; got {rules!r}")
        names   = [f.__name__ for f in rules]
        stop_on = tuple(stop_on or ()) if isinstance(stop_on or (), (list, tuple, set)) else (stop_on,)
        wrong = [s for s in stop_on if s not in names]
        if wrong: raise ValueError(f"stop_on={wrong[0]!r} is not a rule; there are {', '.join(names)}")
        every, keep, check = whole('every', every, 1), whole('keep', keep, 1), whole('check', check, 1)
        self.watch_due = _Due(every)
        super().__init__(every=self.watch_due if every > 1 else 1, **{'verbose': False, **settings})
        self.stop_on, self.keep, self.check, self.watch_rules = stop_on, keep, check, tuple(rules)
        self.watch_log, self.watch_said, self.watch_report = deque(maxlen=keep), set(), None
        self.watch_seen = set()                                        # rules that found harm at the last look
        self.watch_next, self.watch_read = check, 0                    # the next diagnosis; what is not yet looked at

    @property
    def flight(self):
        "DataFrame iter, loss, grad_norm, n_nonfinite of the last `keep` iterations."
        rows = [[float(v) for v in row] for row in self.watch_log]
        return pd.DataFrame(rows, columns=['iter', 'loss', 'grad_norm', 'n_nonfinite']).astype({'iter': int})

    @property
    def report(self):
        "The last diagnosis; None before the first."
        return self.watch_report

    def before_step(self):
        super().before_step()
        w = self._live.watcher
        if w is None: return
        norms, total = (w.row.norms, w.row.grad_norm) if w.row and w.row.read else (None, None)
        if norms is None:                                              # an iteration that is not measured
            norms = torch._foreach_norm([p.grad for p in self.learn.model.parameters()
                                         if p.grad is not None and not p.grad.is_sparse])
            total = torch.linalg.vector_norm(torch.stack([n.float() for n in norms])) if norms else None
        if not norms: return
        self.watch_log.append((self._live.i - 1, self.learn.loss.detach().float().mean(), total, _broken(norms)))

    def after_batch(self):
        live = self._live
        if live.watcher is None or not self.watch_log or self.watch_log[-1][0] != live.i - 1: return
        due = live.i >= self.watch_next
        if self._waits() and not due and live.i - self.watch_read < self.check: return
        new = [r for r in self.watch_log if r[0] >= self.watch_read]
        self.watch_read = live.i
        sick = not all(math.isfinite(float(v)) for r in new for v in r[1:3])
        if sick or self._spike(): self.watch_due.until = max(self.watch_due.until, live.i + self.keep)
        if sick and 'non_finite' not in self.watch_said or due: self._look(sick)

    def _waits(self):
        "Whether reading a number would wait for a device: then it is done every `check` iterations only."
        return self.learn.loss.device.type != 'cpu'

    def _spike(self):
        if len(self.watch_log) < WINDOW or len(self.watch_log) % 5: return False
        *past, norm = [float(r[2]) for r in list(self.watch_log)[-WINDOW:]]
        return norm > SPIKE * sorted(past)[len(past) // 2]

    def _look(self, sick):
        "Diagnose. What is found is said when it is found again at the next look; at once where values are not finite."
        i = self._live.i
        self.watch_next   = i + max(self.check, i // 10)                 # the cost stays a fixed share of a long run
        self.watch_report = diagnose(self.record, self.watch_rules)
        harm = [f for f in self.watch_report.findings if f.severity != 'info']
        seen, self.watch_seen = self.watch_seen, {f.rule for f in harm}
        for f in harm:
            if f.rule in self.watch_said or not (sick or f.rule in seen): continue
            self.watch_said.add(f.rule)
            self.watch_due.until = max(self.watch_due.until, i + self.keep)
            stops = f.rule in self.stop_on
            where = f' in {f.layer}' if f.layer else ''
            warnings.warn(f"iteration {i - 1}: {f.rule} ({f.severity}){where}: {f.evidence}. Try: {f.advice}."
                          + (" The fit is ended." if stops else ''))
            if stops: raise CancelFitException


def _broken(norms):
    "How many of them are not finite: numbers, or 0-dim tensors, which stay on their device."
    if all(isinstance(n, float) for n in norms): return sum(not math.isfinite(n) for n in norms)
    dev = next(n.device for n in norms if isinstance(n, torch.Tensor))
    return (~torch.stack([torch.as_tensor(n, dtype=torch.float32, device=dev) for n in norms]).isfinite()).sum()
