"""What is done once a module has been imported, and modules that are made where there is none of the name: so that
nothing is imported before the program does. Imports nothing of ours."""
from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec, PathFinder

_after = {}                       # module -> functions of it
_made  = {}                       # module -> function that fills it


def after(name, f):
    "Call f(module) when `name` has been imported; at once where it has been."
    if name in sys.modules: f(sys.modules[name])
    else:
        _after.setdefault(name, []).append(f)
        if After not in sys.meta_path: sys.meta_path.insert(0, After)

def make(name, f):
    "Where no module `name` is found, one is made that f(module) fills."
    _made[name] = f
    if Made not in sys.meta_path: sys.meta_path.append(Made)


class After:
    "Finds a module where it is, and calls what waits for it after it has run."
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name not in _after: return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None: return None
        run  = spec.loader.exec_module
        def exec_module(module):
            run(module)
            for f in _after.pop(name, ()): f(module)
        spec.loader.exec_module = exec_module
        return spec

class Made:
    "The last of all finders."
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in _made: return ModuleSpec(name, Made)
    @staticmethod
    def create_module(spec): return None
    @staticmethod
    def exec_module(module): _made[module.__name__](module)
