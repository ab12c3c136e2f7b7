"What is around a call: the variable that holds an object, the module in a method of which a layer is called, the cell."
from __future__ import annotations

import sys
from pathlib import Path

import torch

OURS  = str(Path(__file__).parent.parent)
THEIR = OURS, str(Path(torch.__file__).parent)


def _frames():
    "Frames of neither ours nor torch's, from the innermost."
    f = sys._getframe(1)
    while f is not None:
        if not f.f_code.co_filename.startswith(THEIR): yield f
        f = f.f_back

def variable(obj, *others):
    "The variable that holds the first of these objects that one does, or a Learner of it; the outermost best. Or None."
    frames = list(_frames())
    for o in (obj, *others):
        for name in (lambda n, v: n if v is o else None,
                     lambda n, v: f'{n}.model' if getattr(v, '__dict__', {}).get('model') is o else None):
            found = None
            for f in frames:
                names = [name(n, v) for n, v in f.f_locals.items() if n != 'self' and not n.startswith('_')]
                found = next(filter(None, names), found)
            if found: return found

def tensor_names(tensors):
    "The variables that hold these tensors, {name: tensor}; a number where none does."
    found = {}
    for k, t in enumerate(tensors):
        name = variable(t)
        found[str(k) if name is None or name in found else name] = t
    return found

def owner(module):
    "The module in one of whose methods this one, a part of it, is being called; the outermost. None: there is none."
    found = None
    for f in _frames():
        code = f.f_code
        s    = f.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if isinstance(s, torch.nn.Module) and s is not module and any(m is module for m in s.modules()): found = s
    return found

def shell():
    "IPython's shell, where the process has one."
    ipython = sys.modules.get('IPython')
    return ipython.get_ipython() if ipython is not None else None

def cell():
    "The number of the cell that runs; None outside a notebook."
    s = shell()
    return s.execution_count if s is not None else None
