"The public names, and where they live: read by type checkers, and by __init__.py when one of them is first used."
from .record.record import Record as Record
from .measure.statistics import Statistic as Statistic
from .measure.statistics import statistic as statistic
from .measure.plain_loop import watch as watch
from .instrumentation.process import instrument as instrument
from .callbacks.layer_stats import LayerStatsCallback as LayerStatsCallback
from .callbacks.presets import GradStatsCallback as GradStatsCallback
from .callbacks.presets import ActivationHistCallback as ActivationHistCallback
from .callbacks.presets import DeadUnitCallback as DeadUnitCallback
from .callbacks.monitor import DiagnosisCallback as DiagnosisCallback
from .callbacks.init_check import check_init as check_init
from .lesson10.nets import GeneralRelu as GeneralRelu
from .comparison.comparison import compare as compare
from .comparison.comparison import Comparison as Comparison
from .diagnosis.report import diagnose as diagnose
from .diagnosis.report import Report as Report
from .diagnosis.finding import Finding as Finding
from .plots import plot_overview as plot_overview
from .plots import plot_heat as plot_heat
from .plots import plot_lines as plot_lines
from .plots import plot_color_dim as plot_color_dim
from .plots import plot_dead_chart as plot_dead_chart
from .plots import plot_grad_flow as plot_grad_flow
from .plots import plot_small_gradients as plot_small_gradients

__version__: str
__all__: list[str]
