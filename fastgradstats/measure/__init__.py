"""The torch side: what is read of a model while it trains, where, how, and by whom. Imports record; no fastai."""
