"""The experiment of Lesson 10 in one command. Imports everything but cli."""
from .experiment import GeneralRelu                                                              # noqa: F401
