"""Rules: small functions of a Record that yield Findings. Each says what it needs, where its thresholds come from.
Imports the rest of diagnosis.

One more rule is one function:

    @rule(needs=[('grad', 'norm')], source='my own nets', cause='the gradients are tiny', explains=('not_learning',))
    def too_quiet(rec, limit=1e-9):
        "The gradients of every layer are tiny."
        r = run(rec)
        ...
        yield Finding('too_quiet', 'fc1.weight', (0, 10), value, limit, 'warning', evidence, advice)

    diagnose(rec, rules=[*ALL, too_quiet])

Sources: SM, Amazon SageMaker Debugger's built-in rules; AT, AutoTrainer (ICSE 2021) with its repository; DD,
DeepDiagnosis (ICSE 2022) with its repository; torchmortem and torchdiag, their sources; UMLAUT (CHI 2021); zoo,
benchmarks/zoo.py, tuned half.
"""
from __future__ import annotations

from ..evidence import run                                                                        # noqa: F401
from ..finding import SEVERITIES, Finding, Unreadable, rule                                      # noqa: F401
from .facts import eval_mode, no_gradient
from .gradients import fp16_underflow, starved, vanishing
from .outcome import memorising, not_learning
from .start import bad_init, double_softmax, input_scale
from .steps import not_stepped, not_zeroed, step_too_large, step_too_small
from .time import vanishing_through_time
from .units import dead_units, saturated
from .values import exploding, non_finite, unstable

def by_cause(rules):
    "The rules with each one before those that it explains, else as they are."
    left, out = list(rules), []
    while left:
        first = next(f for f in left if not any(f.__name__ in (g.explains or ()) for g in left))
        left.remove(first)
        out.append(first)
    return tuple(out)

ALL = by_cause([input_scale, double_softmax, no_gradient, not_stepped, not_zeroed, eval_mode, bad_init,
                fp16_underflow, step_too_large,
                exploding, non_finite, unstable, saturated, dead_units, vanishing_through_time, vanishing, starved,
                step_too_small, memorising, not_learning])
