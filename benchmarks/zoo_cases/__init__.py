"The zoo's cases; each file of cases adds its own to CASES."
from . import tuned, tuned_more, tuned_third, tuned_fourth, unseen  # noqa: F401
from .kit import CASES  # noqa: F401
