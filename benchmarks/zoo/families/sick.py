"""Broken twins of the healthy families: each changes one argument. Declared before any rule had seen a run: the rule
that names the fault, '' where none covers it, and further names that are right."""
from __future__ import annotations

from functools import partial

import torch
from fastai.optimizer import SGD
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR

from . import healthy as h
from .training import add

LARGE  = 'unstable', 'exploding', 'non_finite', 'dead_units'              # what comes of large steps
SILENT = 'not_learning', 'starved'                                        # what may be said where nothing is learned

def sick(family, fault, best, *also, **changes):
    add(f'{family.__name__}-{fault}', partial(family, **changes), best, also)

# labels and losses
sick(h.fraud,        'labels_by_one',     'not_learning', shift=1)
sick(h.survival,     'labels_mixed',      'not_learning', mixed=True)
sick(h.prices,       'broadcast',         'not_learning', flat=True)
sick(h.prices,       'not_standardised',  'step_too_small', 'not_learning', scale=5e4, lr=1e-3)
sick(h.ranking,      'labels_mixed',      'not_learning', 'memorising', sort=False)
sick(h.memory,       'random_labels',     'memorising', n=300, epochs=60, random=1.)
sick(h.memory,       'noise_learned',     'memorising', n=600, epochs=40, random=.5)
sick(h.topics,       'softmax_twice',     'double_softmax', squash=lambda p: p.softmax(1))
sick(h.topics,       'softmax_untold',    'double_softmax', squash=lambda p: p.softmax(1), tell=False)
sick(h.multilabel,   'sigmoid_twice',     '', 'double_softmax', 'saturated', squash=nn.Sigmoid)
sick(h.one_epoch,    'sees_the_answer',   '', seen=1)
sick(h.reinforce,    'wrong_sign',        '', 'not_learning', sign=-1.)
# what is trained
sick(h.towers,       'one_not_given',     'not_stepped', 'not_zeroed', both=False)
sick(h.skipgram,     'one_not_given',     'not_stepped', 'not_zeroed', only=['near'])
sick(h.views,        'body_cut_off',      'no_gradient', cut=True)
sick(h.gan,          'generator_cut_off', 'no_gradient', cut=True)
sick(h.boxes,        'head_left_out',     'no_gradient', weight=0.)
sick(h.towers,       'one_frozen',        '', 'not_stepped', frozen=True)
sick(h.deep,         'eval_mode',         'eval_mode', 'starved', 'vanishing', cbs=[h.Evaluating()])
sick(h.adversary,    'eval_mode',         'eval_mode', back=False)
# steps
sick(h.q_learning,   'zero_forgotten',    'not_zeroed', zero=False)
sick(h.q_learning,   'zero_untold',       'not_zeroed', zero=False, tell=False)
sick(h.counts,       'summed',            'step_too_large', *LARGE, reduction='sum')
sick(h.triplet,      'lr_300x',           'step_too_large', *LARGE, lr=.3)
sick(h.denoiser,     'lr_30x',            'step_too_large', *LARGE, lr=.03)
sick(h.adapted,      'lr_100x',           'step_too_large', *LARGE, lr=.2)
sick(h.sparse_codes, 'first_step',        'step_too_large', *LARGE, first=100.)
sick(h.critic,       'lr_1000th',         'step_too_small', lr=1e-6)
sick(h.cloze,        'lr_1000th',         'step_too_small', lr=3e-6)
sick(h.one_epoch,    'lr_1000th',         'step_too_small', lr=3e-6)
sick(h.restarts,     'zero_at_once',      'step_too_small', schedule=partial(ExponentialLR, gamma=.6))
# nets
sick(h.twos,         'batch_norm',        '', 'unstable', 'not_learning', norm=nn.BatchNorm1d)
sick(h.deep,         'no_norm',           'starved', 'vanishing', 'bad_init', norm=False)
sick(h.dropout,      'nearly_all',        '', *SILENT, p=.98)
sick(h.decayed,      'too_strong',        '', *SILENT, 'vanishing', wd=3., opt=SGD)
sick(h.annealed,     'collapsed',         '', *SILENT, beta=lambda i: 30.)
sick(h.counts,       'small_weights',     'bad_init', 'starved', 'vanishing', std=1e-4)
sick(h.physics,      'large_weights',     'saturated', 'bad_init', std=1., depth=6)
sick(h.adding,       'forgets',           'vanishing_through_time', 'bad_init', 'vanishing', cell=nn.RNN, std=.02)
# data
sick(h.quantiles,    'units',             'input_scale', units=lambda x: x * torch.logspace(0, 3, 8) + 2000)
sick(h.in_order,     'unshuffled',        '', 'unstable', 'not_learning', shuffle=False)
sick(h.series,       'one_nan',           'non_finite', cbs=[h.Broken()])
