"""Runs side by side, and the answer in words. Imports record, diagnosis and plots; no torch, no fastai."""
