"The parts of LayerStatsCallback for those who want one thing, and the pictures they draw of it."
from __future__ import annotations

import numpy as np
import torch

from ..measure.plan import DEFAULTS
from ..plots import plot_color_dim, plot_dead_chart, plot_grad_flow, plot_heat, plot_lines
from ..record.bins import linear_bins
from ..record.select import pick_layers
from .layer_stats import LayerStatsCallback


class GradStatsCallback(LayerStatsCallback):
    """Record the gradients of every parameter, and how large the step is.

    Example:
        learn.add_cb(GradStatsCallback())
        learn.fit(1)
        learn.grad_stats.plot('median')
    """
    _default_probes = {p: DEFAULTS[p] for p in ('grad', 'weight', 'update')}
    def plot(self, stat='norm', **kwargs):
        "A statistic of the parameters' gradients over the iterations, a line a layer."
        return plot_lines(self.record, ('grad', stat), **kwargs)
    def plot_flow(self, **kwargs):
        "The gradients' norm from the first layer to the last, early and late in training."
        return plot_grad_flow(self.record, **kwargs)


class ActivationHistCallback(LayerStatsCallback):
    """Record histograms and moments of every activation; answers fastbook's calls to `learn.activation_stats`.

    Example:
        learn.add_cb(ActivationHistCallback())
        learn.fit(1)
        learn.activation_hist.color_dim(-2)
    """
    _default_probes = {'activation': [s for s in DEFAULTS['activation'] if s not in ('frac_dead', 'frac_dormant')]}

    def _column(self, idx):
        return pick_layers(self.record, 'activation', idx)[0]
    def layer_stats(self, idx):
        "Mean, std and share near zero of activation `idx` over the measured iterations.  # three (iter,)"
        k = self._column(idx)
        return [v[~np.isnan(v)]
                for v in (self.record['activation', s][:, k] for s in ('mean', 'std', 'frac_near_zero'))]
    def hist(self, idx, bins=40, low=0., high=10.):
        """log1p counts of activation `idx` in equal bins, in time, as fastai's ActivationStats gives them.  # (bin,
        window)"""
        rec    = self.record
        counts = np.nan_to_num(rec['activation', 'hist'][:, self._column(idx)])
        return torch.from_numpy(np.log1p(linear_bins(counts, rec.bins.edges, low, high, bins)[0]).T.astype(np.float32))
    def plot_layer_stats(self, idx):
        "Mean, std and share near zero of activation `idx`, side by side."
        import matplotlib.pyplot as plt
        name   = self.record.layers['activation'].layer[self._column(idx)]
        _, axs = plt.subplots(1, 3, figsize=(12, 3), layout='constrained')
        for ax, stat in zip(axs, ('mean', 'std', 'frac_near_zero')):
            plot_lines(self.record, ('activation', stat), layers=[name], ax=ax)
        return axs
    def color_dim(self, idx=-1, **kwargs):
        "The colorful dimension: the histogram of activation `idx` in time."
        return plot_color_dim(self.record, idx, **kwargs)
    def dead_chart(self, **kwargs):
        "The share of each activation that is near zero in time (dead units are DeadUnitCallback's)."
        return plot_heat(self.record, ('activation', 'frac_near_zero'), **kwargs)
    def plot(self, idx=-1, **kwargs): return self.color_dim(idx, **kwargs)


class DeadUnitCallback(LayerStatsCallback):
    """Record which units are dead: those whose output did not vary at all over a window.

    Example:
        learn.fit(1, cbs=DeadUnitCallback(window=20))
        learn.layer_stats.units
    """
    _default_probes = {'activation': ['frac_dead', 'frac_dormant']}
    def plot(self, **kwargs):
        "The share of dead units of every activation over the windows."
        return plot_dead_chart(self.record, **kwargs)
