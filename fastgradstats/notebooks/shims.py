"""What old notebooks need on today's libraries: each shim with the notebook that needs it and the reason. All wait
until a notebook reaches for what it replaces; the names of those that it did are in `used`.

One more is one function:

    @shim('numpy', notebook='...', reason='...')
    def np_int(module): ...                 # called when numpy has been imported
"""
from __future__ import annotations

import sys
from functools import wraps
from importlib import import_module
from typing import NamedTuple

from .. import _on_import


class Shim(NamedTuple):
    name:     str
    module:   str                 # when this has been imported ...
    apply:    object              # ... apply(module) is called; with `missing` it fills a module that nobody has
    missing:  bool
    notebook: str
    reason:   str

SHIMS = []
used  = set()                     # names of the shims that have acted

def shim(module, notebook, reason, missing=False):
    def keep(f):
        SHIMS.append(Shim(f.__name__, module, f, missing, notebook, reason))
        return f
    return keep

def install():
    for s in SHIMS: (_on_import.make if s.missing else _on_import.after)(s.module, s.apply)

def listed():
    "The shims in words, for `fastgradstats run --shims`."
    return '\n'.join(f"{s.name} ({s.notebook}): {s.reason}" for s in SHIMS)


@shim('fastai.datasets', missing=True, notebook='course-v3 dl2, exp/nb_01.py',
      reason="`from fastai import datasets` is fastai v1's: download_data finds the mnist.pkl.gz of --data-dir, the "
             "rest is fastai.data.external's")
def fastai_v1_datasets(module):
    def download_data(url, fname=None, data=True, ext='.tgz'):
        from .data_dir import found
        return found(url.rpartition('/')[2] + ext)
    module.download_data = download_data
    module.__getattr__   = lambda name: getattr(import_module('fastai.data.external'), name)
    used.add('fastai_v1_datasets')

@shim('torch.nn.functional', notebook='course-v3 dl2, 06 and later: GeneralRelu',
      reason="`x = F.relu(x)` then `x.sub_(...)` is an error of autograd since torch 1.5: there relu gives a copy")
def relu_then_in_place(F):
    relu = F.relu
    @wraps(relu)
    def forgiving(input, inplace=False):
        out = relu(input, inplace)
        if inplace or not {'sub_', 'clamp_max_'} & set(sys._getframe(1).f_code.co_names): return out
        used.add('relu_then_in_place')
        return out.clone()
    F.relu = forgiving

@shim('torch', notebook='course-v3 dl2, 06 and later',
      reason="`.cuda()` and `torch.cuda.set_device` do nothing where there is no GPU")
def no_gpu(torch):
    if torch.cuda.is_available(): return
    def same(self, *args, **kwargs):
        used.add('no_gpu')
        return self
    torch.Tensor.cuda = torch.nn.Module.cuda = same
    def set_device(device): used.add('no_gpu')
    torch.cuda.set_device = set_device
