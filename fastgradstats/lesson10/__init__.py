"""The experiment of Lesson 10 in one command. Imports everything but cli.

`nets`, `data`, `experiment`: what is trained, on what, and what is found.
"""
from .nets import NETS, GeneralRelu, conv_net, default_relu, init_kaiming, kaiming_generalrelu    # noqa: F401

def __getattr__(name):
    "`run`, `learner` and the rest of the experiment, loaded when asked for: it needs rich, GeneralRelu does not."
    from importlib import import_module
    if name.startswith('__') or not hasattr(experiment := import_module('.experiment', __name__), name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(experiment, name)
