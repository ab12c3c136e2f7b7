"""How a tensor is reduced to numbers: `reference` is the definition, others give the same in another way. Imports what
measure may."""
from __future__ import annotations

from .cpu import Cpu, warm_up
from .reference import Failed, Reference      # noqa: F401


def choose(model, host=None):
    "The reader of a model, by where its parameters are. `host=False`: as on a device, also on the CPU."
    places = {p.device.type for p in model.parameters()} or {'cpu'}
    if host is False or 'cpu' not in places: return Reference()
    warm_up()
    return Cpu()
