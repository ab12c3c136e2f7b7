"""What is read of a tensor, whoever reads it: the bins of every histogram, how a large tensor is sampled, and what the
statistics of a probe want. A reader (readers/) gives it."""
from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from ..record.bins import N_MAG, NAN, NEG_BIG, NEG_INF, OCTAVES, POS_BIG, POS_INF, ZERO

SAMPLE    = 65536        # tensors with more elements are sampled for what is not a moment; see `stride_of`
NEAR_ZERO = 0.05         # |x| below this is near zero: fastai's ActivationStats takes x <= 0.05, without the | |

# --- histogram bins: the top bits of a float32 ----------------------------------------------------------------------
def _bin_of_pattern():
    "The bin of each of the 2,048 raw patterns `(x.view(int32) >> 21) + 1024`, in value order.  # (2048,)"
    raw  = np.arange(2048)
    neg  = raw < 1024                                       # an arithmetic shift: negative floats are negative ints
    mag  = np.where(neg, raw, raw - 1024)                   # exponent and two mantissa bits, 0..1023
    low  = (OCTAVES[0] + 127) * 4
    k    = mag - low                                        # 0..191 within the range
    out  = np.where(neg, NEG_BIG + N_MAG - k, ZERO + 1 + k)
    out  = np.where(k < 0, ZERO, out)
    out  = np.where(k >= N_MAG, np.where(neg, NEG_BIG, POS_BIG), out)
    out  = np.where(mag == 1020, np.where(neg, NEG_INF, POS_INF), out)
    return np.where(mag > 1020, NAN, out)

BIN_OF_PATTERN = _bin_of_pattern()

# --- tensors --------------------------------------------------------------------------------------------------------
@lru_cache(maxsize=None)
def stride_of(shape, sample):
    """The fixed stride at which a tensor of this shape is sampled: at least n / sample and coprime to every dimension,
    so that it visits every position of a kernel, every channel and every example alike. 1 means everything is read."""
    n = math.prod(shape)
    if sample is None or n <= sample: return 1
    s = -(-n // sample)
    while any(math.gcd(s, d) > 1 for d in shape if d > 1): s += 1
    return s

@lru_cache(maxsize=256)
def least_from(t, dtype):
    "The least number of the type that is not below t: with it x < t is exact, though t is not a number of the type."
    if dtype == torch.float64: return float(t)
    with np.errstate(over='ignore'): r = np.float32(t)
    return float(r if float(r) >= t else np.nextafter(r, np.float32(np.inf)))

def base(t):
    "A tensor of any subclass as a plain one; its own operations take twenty times as long."
    if type(t) is torch.Tensor: return t
    with torch._C.DisableTorchFunctionSubclass(): return t.as_subclass(torch.Tensor)

def plain(x):
    "`x` as a detached plain real tensor of at least float32; complex numbers by their magnitude."
    x = base(x).detach()
    if x.layout != torch.strided: x = x.to_dense()
    if x.is_complex(): x = x.resolve_conj().abs()
    if x.is_neg():     x = x.resolve_neg()                  # the imaginary part of a conjugate
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


# --- what is wanted and what was found --------------------------------------------------------------------------------
class Wanted:
    "What the statistics of one probe need of a tensor: reductions by name, each once, and functions of it."
    def __init__(self, stats):
        self.scalars   = [s for s in stats if s.kind == 'scalar']
        self.hists     = [s for s in stats if s.kind == 'hist']
        self.functions = [s for s in self.scalars if not s.reads]
        self.names     = tuple(dict.fromkeys(('n', *(a for s in self.scalars for a in s.reads))))
        self.sampled   = any(s.sampled or s.own for s in stats)
        self.only_norm = [s.name for s in stats] == ['norm'] and self.names == ('n', 'norm')
        self.widths    = {}                       # of what the functions give: how many numbers, once it is known

    @property
    def size(self): return len(self.names) + sum(self.widths[s.name] for s in self.functions)

    def offsets(self):
        "Where in the numbers of one tensor those of each statistic stand."
        found = {s.name: [self.names.index(a) for a in s.reads] for s in self.scalars if s.reads}
        at    = len(self.names)
        for s in self.functions:
            found[s.name] = list(range(at, at + self.widths[s.name]))
            at += self.widths[s.name]
        return found


class Found(NamedTuple):
    "What was wanted of one tensor: floats where they can be had at once, else 0-dim tensors on its device."
    numbers: tuple | list                         # of `Wanted.names`, then of its functions
    hist:    object = None                        # (bin,)
    units:   tuple | list = ()                    # [(statistic, its partial result)]
