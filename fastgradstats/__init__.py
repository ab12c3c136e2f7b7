"""See inside a network while it trains: fastai Callbacks that record every layer, plots of the record, and what they
mean."""
from importlib import import_module

__version__ = '0.1.0'

# public name -> the module it lives in; loaded on first use, so that reading a record imports neither torch nor fastai
_home = {
    'record':    ['Record'],
    'stats':     ['Statistic', 'statistic'],
    'watching':  ['watch'],
    'callbacks': ['LayerStatsCallback', 'GradStatsCallback', 'ActivationHistCallback', 'DeadUnitCallback'],
    'lesson10':  ['GeneralRelu'],
    'comparing': ['compare', 'Comparison'],
    'diagnosing': ['diagnose', 'Report'],
    'rules':     ['Finding'],
    'checking':  ['check_init'],
    'watchdog':  ['DiagnosisCallback'],
    'plots':     ['plot_overview', 'plot_heat', 'plot_lines', 'plot_color_dim', 'plot_dead_chart', 'plot_grad_flow',
                  'plot_small_gradients'],
}
_where  = {name: module for module, names in _home.items() for name in names}
__all__ = list(_where)

def __getattr__(name):
    if name not in _where: raise AttributeError(f"module 'fastgradstats' has no attribute {name!r}")
    value = getattr(import_module(f'fastgradstats.{_where[name]}'), name)
    globals()[name] = value
    return value

def __dir__(): return sorted([*globals(), *__all__])
