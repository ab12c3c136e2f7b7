"""The coat over measure for fastai, and what needs a Learner: check_init, trials of advice. Imports all the above."""
from .layer_stats import LayerStatsCallback                                                      # noqa: F401
from .presets import ActivationHistCallback, DeadUnitCallback, GradStatsCallback                 # noqa: F401
