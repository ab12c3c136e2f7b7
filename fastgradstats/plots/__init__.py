"""Pictures of records. Imports record and diagnosis; no torch, no fastai."""
from .dead_units import plot_dead_chart
from .flow import plot_grad_flow
from .heat import plot_heat
from .histogram import plot_color_dim
from .lines import plot_lines
from .overview import plot_overview
from .small_gradients import plot_small_gradients

__all__ = ['plot_overview', 'plot_heat', 'plot_lines', 'plot_color_dim', 'plot_dead_chart', 'plot_grad_flow',
           'plot_small_gradients']
