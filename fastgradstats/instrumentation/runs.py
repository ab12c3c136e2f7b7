"A training run: what it is called and where its record is."
from __future__ import annotations

import weakref
from pathlib import Path

import numpy as np

from ..measure.optimizer_info import describe
from .names import cell

LEAST = 2                         # rows of a run: one step alone is a try
SEARCH = 10, 20                   # by how much the rate of a search for a learning rate grows at least, in so many rows


class Run:
    """One training run.

    name        the variable that held the model or the Learner, else the model's class
    cells       the numbers of the notebook's cells in which it trained; [] outside a notebook
    loop        'fastai', 'torch' (an optimizer of torch's), or 'own' (steps that the loop takes itself)
    optimizer   its name, or None
    model       the model, None once it is gone
    record      the Record, up to now
    kind        'training', or 'search': for a learning rate, of which nothing is to be judged
    """
    def __init__(self, name, model, about, read):
        self.name, self.cells, self.file = name, [], None             # file: where its record was saved
        self._model, self._about, self._read = weakref.ref(model), about, read
        self.seen()

    @property
    def loop(self): return self._about()[0]

    @property
    def optimizer(self):
        opt = self._about()[1]
        return opt if opt is None or isinstance(opt, str) else describe(opt)['name']

    @property
    def model(self): return self._model()

    @property
    def record(self): return self._read()

    @property
    def kind(self):
        rec = self.record
        with np.errstate(all='ignore'): lr = np.log(rec.iters.lr.to_numpy()) if rec is not None else np.zeros(0)
        up  = np.diff(lr)
        one = len(lr) >= SEARCH[1] and np.isfinite(up).all() and np.ptp(up) < .1 * up.mean()  # by one factor
        return 'search' if one and lr[-1] - lr[0] > np.log(SEARCH[0]) else 'training'

    def seen(self):
        "It trains now."
        now = cell()
        if now is not None and now not in self.cells[-1:]: self.cells.append(now)

    def keep(self):
        "It is over: what it is now it stays."
        about, rec = (self.loop, self.optimizer), self.record
        self._about, self._read = lambda: about, lambda: rec

    def save(self, folder, number):
        rec = self.record
        if folder is None or rec is None or len(rec) < LEAST: return
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.file = Path(folder) / f'{number:02d}-{self.name}.parquet'
        rec.save(self.file)

    def __repr__(self):
        where = f", cell {', '.join(map(str, self.cells))}" if self.cells else ''
        rec   = self.record
        return (f"Run({self.name}: {type(self.model).__name__ if self.model is not None else 'its model is gone'}, "
                f"{self.optimizer or 'own steps'}, {0 if rec is None else len(rec)} rows{where})")
