"""For those who write rules: `ALL` there are, `Finding`, the decorator `rule`, `run` (the evidence of a record)."""
from .diagnosis.evidence import run                                                              # noqa: F401
from .diagnosis.finding import SEVERITIES, Finding, Unreadable, rule                             # noqa: F401
from .diagnosis.rules import ALL                                                                 # noqa: F401
