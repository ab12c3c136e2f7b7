"""What was measured: the Record, its columns, files and summary. Imports `_text`; neither torch nor fastai."""
from .record import Record                                                                       # noqa: F401
