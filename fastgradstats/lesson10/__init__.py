"""The experiment of Lesson 10 in one command. Imports everything but cli."""
from .experiment import (GeneralRelu, conv_net, default_relu, init_kaiming, kaiming_generalrelu, learner,   # noqa: F401
                         report, run)
