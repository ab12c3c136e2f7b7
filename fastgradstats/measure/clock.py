"What the recording itself costs, and which rows a budget for that leaves to be measured."
from __future__ import annotations

import time
from functools import wraps

DEAR = 25                         # per cent of the training time that are worth a word
ROWS = 100                        # of a run that is long enough for one; and between two that are measured at most


class Clock:
    "The time spent in what is `timed`, and the time since recording began."
    def __init__(self, failed):
        self.failed = failed                      # called where a timed method raises
        self.spent = self.of = 0.
        self.busy = self.guarded = False
        self.since = None

    def start(self): self.since = time.perf_counter()
    def stop(self):
        if self.since is not None: self.of += time.perf_counter() - self.since
        self.since = None

    def run(self, f, *args, **kwargs):
        "Call a function and add its time."
        if self.busy: return f(*args, **kwargs)
        t = time.perf_counter()
        self.busy = True
        try: return f(*args, **kwargs)
        finally:
            self.busy   = False
            self.spent += time.perf_counter() - t

    def now(self):
        "Seconds spent, seconds of training without them."
        of = self.of + (time.perf_counter() - self.since if self.since is not None else 0.)
        return self.spent, of - self.spent

    def cost(self):
        spent, training = self.now()
        return dict(seconds=round(spent, 4), of=round(spent + training, 4),
                    percent=round(100 * spent / training, 2) if training > 0 else None)


def timed(f):
    "Add the time that a method of something with a `clock` takes; take all hooks off if it fails."
    @wraps(f)
    def call(self, *args, **kwargs):
        clock = self.clock
        if clock.guarded: return f(self, *args, **kwargs)
        clock.guarded = True
        try: return clock.run(f, self, *args, **kwargs)
        except Exception:
            clock.failed()
            raise
        finally: clock.guarded = False
    return call


class Budget:
    """Measures a row when those before it have been paid for: each row of training earns `share` of its time, and what
    recording takes is paid from that. No more is saved up than one row costs; the first, which loads what the others
    need, is free."""
    def __init__(self, share, clock):
        self.share, self.clock = share, clock
        self.row, self.measured = -1, True        # the one that was asked about, whether it is measured
        self.start = self.last = None             # the clock at the second row, and at this one
        self.credit = self.price = 0.
        self.since  = 0                           # rows since the last one measured

    def due(self, row):
        if row == self.row: return self.measured
        if self.row >= 0: self._settle()
        self.row   = row
        self.since = 0 if self.measured else self.since + 1
        return self.measured

    def _settle(self):
        "The row before has ended."
        now, was  = self.clock.now(), self.last
        self.last = now
        if was is None: self.start = now; return
        paid, earned = now[0] - was[0], self.share * (now[1] - was[1])
        if self.measured: self.price = paid
        self.credit   = min(self.credit + earned - paid, self.price)
        self.measured = self.credit >= 0 or self.since >= ROWS

    def taken(self):
        "What recording has taken of the training time, without the first row."
        spent, training = (a - b for a, b in zip(self.last, self.start)) if self.last else (0., 0.)
        return spent / training if training > 0 else 0.
