"Less training: every pass over a data loader of torch or fastai ends after so many batches."
from __future__ import annotations

from functools import wraps
from itertools import islice

from .._on_import import after


def shorten(most):
    "No loader gives more than `most` batches, and its length says so (a schedule reads it)."
    for module in ('torch.utils.data.dataloader', 'fastai.data.load'): after(module, lambda m: _cut(m.DataLoader, most))

def _cut(cls, most):
    batches, length = cls.__iter__, cls.__len__
    @wraps(batches)
    def __iter__(self): return islice(batches(self), most)
    @wraps(length)
    def __len__(self): return min(length(self), most)
    cls.__iter__, cls.__len__ = __iter__, __len__
