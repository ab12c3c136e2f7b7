"What the recording itself costs."
from __future__ import annotations

import time
from functools import wraps


class Clock:
    "The time spent in methods that are `timed`, and the time since recording began."
    def __init__(self, failed):
        self.failed = failed                      # called where a timed method raises
        self.spent = self.of = 0.
        self.busy, self.since = False, None

    def start(self): self.since = time.perf_counter()
    def stop(self):
        if self.since is not None: self.of += time.perf_counter() - self.since
        self.since = None

    def cost(self):
        of = self.of + (time.perf_counter() - self.since if self.since is not None else 0.)
        return dict(seconds=round(self.spent, 4), of=round(of, 4),
                    percent=round(100 * self.spent / (of - self.spent), 2) if of > self.spent else None)


def timed(f):
    "Add the time that a method of something with a `clock` takes; take all hooks off if it fails."
    @wraps(f)
    def call(self, *args, **kwargs):
        clock = self.clock
        if clock.busy: return f(self, *args, **kwargs)
        t = time.perf_counter()
        clock.busy = True
        try: return f(self, *args, **kwargs)
        except Exception:
            clock.failed()
            raise
        finally:
            clock.busy   = False
            clock.spent += time.perf_counter() - t
    return call
