"Random numbers that go on as they would have."
from __future__ import annotations

import random
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def unchanged_random_state(device=None, rngs=()):
    """torch's, NumPy's and Python's random states are afterwards what they were. `device`: where torch may draw besides
    the CPU, None for anywhere; `rngs`: generators of Python's kind besides."""
    cuda = range(torch.cuda.device_count()) if device is None and torch.cuda.is_initialized() else \
           [device] if device is not None and device.type == 'cuda' else []
    kept, numpy = [(r, r.getstate()) for r in (random, *rngs)], np.random.get_state()
    try:
        with torch.random.fork_rng(list(cuda)): yield
    finally:
        for r, state in kept: r.setstate(state)
        np.random.set_state(numpy)
