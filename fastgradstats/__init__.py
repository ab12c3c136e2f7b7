"""See inside a network while it trains: fastai Callbacks that record every layer, plots of the record, and what they
mean."""
import sys
from importlib import import_module
from importlib.machinery import ModuleSpec

__version__ = '0.1.0'

# public name -> the module it lives in; loaded on first use, so that reading a record imports neither torch nor fastai
_home = {
    'record.record':           ['Record'],
    'measure.statistics':      ['Statistic', 'statistic'],
    'measure.watcher':         ['watch'],
    'callbacks.layer_stats':   ['LayerStatsCallback', 'GradStatsCallback', 'ActivationHistCallback',
                                'DeadUnitCallback'],
    'callbacks.monitor':       ['DiagnosisCallback'],
    'callbacks.init_check':    ['check_init'],
    'lesson10.nets':           ['GeneralRelu'],
    'comparison.comparison':   ['compare', 'Comparison'],
    'diagnosis.report':        ['diagnose', 'Report'],
    'diagnosis.finding':       ['Finding'],
    'plots.overview':          ['plot_overview', 'plot_heat', 'plot_lines', 'plot_color_dim', 'plot_dead_chart',
                                'plot_grad_flow', 'plot_small_gradients'],
}
_where  = {name: module for module, names in _home.items() for name in names}
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
