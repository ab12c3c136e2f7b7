"Loss functions that can be told by what they leave in autograd's graph, with the answers and targets they were given."
from __future__ import annotations

from torch.nn import functional as F

MEAN = 1                          # autograd's number for reduction='mean'


def known_loss(node):
    """(loss function, answers, targets) of the autograd node that a loss comes from, before its backward pass has run;
    None for other losses, and those with weights, smoothing or another reduction than the mean. Of a cross-entropy the
    answers are its log-softmax: other numbers than the scores, with the same softmax, as has their mean."""
    name = type(node).__name__.rstrip('0123456789')
    get  = lambda what, default=None: getattr(node, f'_saved_{what}', default)
    if get('reduction', MEAN) != MEAN or get('weight') is not None or get('pos_weight') is not None: return None
    if name in ('NllLossBackward', 'NllLoss2DBackward'):
        if get('ignore_index') not in (-100, 2 ** 64 - 100): return None
        before = node.next_functions[0][0]
        if type(before).__name__ == 'LogSoftmaxBackward0': return F.cross_entropy, before._saved_result, get('target')
        return F.nll_loss, get('self'), get('target')
    f = dict(MseLossBackward=F.mse_loss, BinaryCrossEntropyBackward=F.binary_cross_entropy,
             BinaryCrossEntropyWithLogitsBackward=F.binary_cross_entropy_with_logits).get(name)
    return None if f is None else (f, get('self'), get('target'))
