"A zoo of training runs: twins that differ by one line, sick and healthy, and healthy runs that fool naive rules."
import os
import warnings

os.environ.setdefault('OMP_NUM_THREADS', '1')
warnings.filterwarnings('ignore')

from .cases import CASES  # noqa: E402, F401
from .mending import modules  # noqa: E402, F401
from .training import kit, learner, record, runs  # noqa: E402, F401

HALVES = ('tuned', 'unseen')
