"""See inside a network while it trains: fastai Callbacks that record every layer, plots of the record, and what they
mean."""
import ast
import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path

__version__ = '0.1.0'

def _public(stub):
    "{public name: the module it lives in}, from the imports of the stub: one list, for type checkers too."
    imports = (n for n in ast.parse(stub.read_text(encoding='utf-8')).body if isinstance(n, ast.ImportFrom))
    return {a.name: n.module for n in imports for a in n.names}

# loaded on first use, so that reading a record imports neither torch nor fastai
_where  = _public(Path(__file__).with_suffix('.pyi'))
__all__ = list(_where)

def __getattr__(name):
    if name not in _where: raise AttributeError(f"module 'fastgradstats' has no attribute {name!r}")
    value = getattr(import_module(f'fastgradstats.{_where[name]}'), name)
    globals()[name] = value
    return value

def __dir__(): return sorted([*globals(), *__all__])

class _Moved:
    "Modules under the names they had when files were pickled that are still about."
    names = dict(planning='measure.plan', stats='measure.statistics', watchdog='callbacks.monitor',
                 data='lesson10.data')
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        package, _, old = name.rpartition('.')
        if package == __name__ and old in cls.names: return ModuleSpec(name, cls)
    @staticmethod
    def create_module(spec): return None
    @classmethod
    def exec_module(cls, module):
        sys.modules[module.__name__] = import_module(f"{__name__}.{cls.names[module.__name__.rpartition('.')[2]]}")

sys.meta_path.append(_Moved)
