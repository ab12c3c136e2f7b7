"""Runs of families that the zoo does not have, for one judgement of frozen rules: no threshold is set on them.

healthy.py has the families, each a function that trains a net; its arguments are the places where sick.py breaks it.
Losses and scores alone were looked at while they were made, and names declared before any rule had seen a run."""
