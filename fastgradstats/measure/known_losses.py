"Loss functions that can be told by what they leave in autograd's graph, with the answers and targets they were given."
from __future__ import annotations

from torch.nn import functional as F

MEAN = 1                          # autograd's number for reduction='mean'


def known_loss(node):
    """(loss function, answers, targets, factor on it) of the autograd node that a loss comes from, before its backward
    pass has run; None for other losses, and those with weights, smoothing or another reduction than the mean. Of a
    cross-entropy the answers are its log-softmax: other numbers than the scores, with the same softmax, as has their
    mean."""
    factor = 1.
    while (by := _factor(node)) is not None: node, factor = node.next_functions[0][0], factor * by
    found = _of_node(node)
    return found and (*found, factor)

def _factor(node):
    "By what number a node multiplies; None if it does something else."
    name, other = type(node).__name__, getattr(node, '_saved_other', None)
    if name not in ('MulBackward0', 'DivBackward0') or other is None or other.numel() != 1: return None
    if len(node.next_functions) > 1 and node.next_functions[1][0] is not None: return None
    return other if name == 'MulBackward0' else 1 / other

def _of_node(node):
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
