"""The coat over measure for fastai, and what needs a Learner: check_init, trials of advice. Imports all the above."""
from .layer_stats import (ActivationHistCallback, DeadUnitCallback, GradStatsCallback,               # noqa: F401
                          LayerStatsCallback)
