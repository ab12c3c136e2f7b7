"`instrument()`: one line, and every training run of the process from then on is recorded."
from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from ..measure.plan import DEFAULTS, SETTINGS, Plan, check_names
from ..measure.probes import PROBES
from .learners import Learners
from .loops import Loops
from .names import shell
from .runs import LEAST, Run

_now = None                       # the Instrument that is on


class Instrument:
    "What `instrument` gives: `runs`, a Run for every training run until now; `off()`."
    def __init__(self, settings, out):
        self.settings, self.out = settings, out
        self._runs    = []
        self._told    = False
        self.learners = Learners(settings, self._runs.append, self._ended, self._failed)
        self.loops    = Loops(settings, self._runs.append, self._ended, self._failed, lambda: self.learners.fitting)
        self._shell   = shell()
        if self._shell is not None: self._shell.events.register('post_run_cell', self._cell_ended)

    @property
    def runs(self) -> list[Run]:
        "Those of two rows or more, in the order in which they began."
        return [r for r in self._runs if r.record is not None and len(r.record) >= LEAST]

    def off(self):
        "Take everything out; what was recorded stays."
        global _now
        self.learners.remove()
        self.loops.remove()
        if self._shell is not None: self._shell.events.unregister('post_run_cell', self._cell_ended)
        self._shell = None
        if _now is self: _now = None

    def _cell_ended(self, *args): self.loops.close_all()

    def _ended(self, run, was_one=True):
        if not was_one: self._runs.remove(run); return
        try: run.save(self.out, self._runs.index(run))
        except Exception as e: self._failed(e, 'saved')

    def _failed(self, e, what='recorded'):
        "Nothing of ours is raised in the program that is recorded."
        if not self._told: warnings.warn(f"fastgradstats: a run is not {what}: {type(e).__name__}: {e}", stacklevel=2)
        self._told = True

    def __repr__(self):
        return '\n'.join([f"Instrument: {len(self.runs)} runs", *(f'  {r}' for r in self.runs)])


def instrument(
    every: int | Callable = 1,    # measure every n-th row, or where f(iteration) is true
    out: str | None = None,       # a folder: the record of each run is saved there as it ends
    **settings: Any,              # the probes and settings of LayerStatsCallback, but for `verbose`
) -> Instrument:                  # the one that is on, if there is one
    """Record every training run of this process from now on: fastai Learners, loops over PyTorch's optimizers and over
    others, and steps that a loop takes itself. A model in a notebook makes a run for each cell that it trains in.

    Raises:
        TypeError: a setting is not known.
        ValueError: a setting is out of its range.

    Example:
        instrument()                              # at the top of a notebook or a script, which stays as it is
        learn.fit(1)
        instrument().runs[0].record['grad', 'norm']
        instrument().off()
    """
    global _now
    check_names('instrument', settings, (*PROBES, *SETTINGS))
    settings = dict(settings, every=every)
    Plan(**{**DEFAULTS, **settings})              # raises for what is out of range
    if _now is None: _now = Instrument(settings, out)
    return _now
