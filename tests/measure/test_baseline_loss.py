"The loss of one answer for all: the cross-entropy in one pass against torch's own over all the rows; the best answer of the batches before."
import math

import numpy as np
import pytest
import torch
from fastai.losses import CrossEntropyLossFlat, LabelSmoothingCrossEntropyFlat
from torch import nn

from fastgradstats.measure.baseline_loss import BaselineLoss, _class_axis
from fastgradstats.measure.plan import Plan
from fastgradstats.measure.readers import Reference
from fastgradstats.measure.readers.cpu import Cpu
from fastgradstats.measure.watcher import Watcher

CE = nn.CrossEntropyLoss
READERS = pytest.mark.parametrize('reader', [Cpu, Reference])

def baseline(reader=Cpu):
    w = Watcher(Plan(grad='norm'))
    w.reader = reader()
    return BaselineLoss(w)

def answered(loss_func, pred, y):
    "The loss where every example is given the mean answer, in float64."
    return float(loss_func(pred.double().mean(0, keepdim=True).expand_as(pred).contiguous(), y))

@pytest.mark.parametrize('loss_func,shape,target', [
    (CE(), (64, 10), (64,)), (nn.functional.cross_entropy, (64, 2), (64,)), (CrossEntropyLossFlat(), (64, 10), (64,)),
    (CE(), (8, 5, 7), (8, 7)), (CE(), (4, 3, 6, 6), (4, 6, 6)), (CrossEntropyLossFlat(), (8, 7, 50), (8, 7)),
    (CrossEntropyLossFlat(axis=1), (4, 3, 6, 6), (4, 6, 6))])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
@READERS
def test_cross_entropy_of_the_mean_answer(reader, loss_func, shape, target, dtype):
    torch.manual_seed(0)
    pred = (4 * torch.randn(shape)).to(dtype).requires_grad_()
    y    = torch.randint(shape[_class_axis(loss_func)], target)
    for layout in (pred, pred.to(memory_format=torch.channels_last) if pred.dim() == 4 else pred.transpose(0, 1).contiguous().transpose(0, 1),
                   pred.transpose(-1, -2).contiguous().transpose(-1, -2), 3 * pred + 30):
        got = baseline(reader)(loss_func, layout, (y,))
        assert float(got) == pytest.approx(answered(loss_func, layout, y), rel=1e-6) and not getattr(got, 'requires_grad', False)
    y.view(-1)[::3] = -100                                          # padding, which torch leaves out
    assert float(baseline(reader)(loss_func, pred, (y,))) == pytest.approx(answered(loss_func, pred, y), rel=1e-6)

@READERS
def test_what_the_loss_itself_says_of_odd_answers(reader):
    pred, y = torch.randn(8, 3), torch.randint(3, (8,))
    pred[2, 1] = math.nan
    assert math.isnan(baseline(reader)(CE(), pred, (y,)))
    assert math.isnan(baseline(reader)(CE(), torch.randn(8, 3), (torch.full((8,), -100),)))
    pred[2, 1] = math.inf
    assert math.isnan(baseline(reader)(CE(), pred, (y,))) == math.isnan(answered(CE(), pred, y))

def test_plain_answers_are_read_in_one_call(monkeypatch):
    monkeypatch.setattr(Reference, 'cross_entropy', lambda *a: pytest.fail('read in torch'))
    words = torch.randn(4, 6, 50).transpose(1, 2)                   # (example, word, place), as a language model's
    for pred, y in ((torch.randn(64, 10), torch.randint(10, (64,))), (words, torch.randint(50, (4, 6)))): baseline()(CE(), pred, (y,))

def test_the_rows_are_not_computed_one_by_one(monkeypatch):
    "The model of a language answers thousands of positions: equal rows are read once, whatever the loss would do."
    real, sizes = torch.log_softmax, []
    monkeypatch.setattr(torch, 'log_softmax', lambda x, *a, **k: (sizes.append(x.numel()), real(x, *a, **k))[1])
    pred = torch.randn(1120, 200)
    baseline(Reference)(CrossEntropyLossFlat(), pred, (torch.randint(200, (1120,)),))
    assert sizes == [200]

def test_another_loss_is_asked_itself():
    for f in (CE(label_smoothing=.1), CE(weight=torch.ones(10)), CE(reduction='sum'), CE(ignore_index=1), CrossEntropyLossFlat(weight=torch.ones(10)),
              LabelSmoothingCrossEntropyFlat(), nn.MSELoss()): assert _class_axis(f) is None
    pred, y = torch.randn(64, 10), torch.randint(10, (64,))
    for ys in ((y, y), (y.float(),), (y[:, None],), (torch.rand(64, 10),)): assert baseline()._cross_entropy(pred, ys, 1) is None
    smooth = CE(label_smoothing=.1)
    for _ in range(2): assert float(baseline()(smooth, pred, (y,))) == pytest.approx(answered(smooth, pred, y), rel=1e-5)

def test_a_loss_that_refuses_is_named():
    b = baseline()
    assert b(CE(), torch.randn(8, 3), (torch.full((8,), 7),)) != 0
    assert 'refused' in b.watcher.builder.ignored['loss_constant']

# --- the best answer of the batches before ---------------------------------------------------------------------------
def batches(n, bs, make):
    torch.manual_seed(0)
    for _ in range(n):
        x = torch.randn(bs, 4)
        yield x, make(x)

def costs_before(data, loss, fit):
    "By hand, in float64: the loss of each batch when all are given what `fit` makes of the targets before."
    seen, out = [], []
    for _, y in data:
        y = y.double() if y.is_floating_point() else y
        if seen: out.append(float(loss(fit(torch.cat(seen), y), y)))
        seen.append(y)
    return np.array(out)

KINDS = dict(
    mse     = (nn.functional.mse_loss, 1, lambda x: 100 + x[:, :1], lambda s, y: s.mean(0).expand_as(y)),
    counts  = (nn.functional.poisson_nll_loss, 1, lambda x: torch.poisson(torch.exp(2 + x[:, :1])), lambda s, y: s.mean(0).log().expand_as(y)),
    rare    = (nn.functional.binary_cross_entropy_with_logits, 1, lambda x: (x[:, :1] > 1.6).float(), lambda s, y: s.mean(0).clamp(1e-6).logit().expand_as(y)),
    classes = (nn.functional.cross_entropy, 3, lambda x: (x[:, 0] > 1).long() + (x[:, 1] > 1).long(),
               lambda s, y: torch.log((torch.bincount(s, minlength=3) + 1) / (len(s) + 3.)).expand(len(y), 3)),
    smooth  = (CE(label_smoothing=.1), 3, lambda x: (x[:, 0] > 1).long() + (x[:, 1] > 1).long(),
               lambda s, y: torch.log((torch.bincount(s, minlength=3) + 1) / (len(s) + 3.)).expand(len(y), 3)))

@pytest.mark.parametrize('bs', [2, 32])
@pytest.mark.parametrize('kind', KINDS)
@READERS
def test_the_prior_is_the_best_answer_of_the_batches_before(reader, kind, bs):
    "Whatever the net answers, which here is far off: once its kind has been found, the prior costs what it costs by hand."
    loss, width, make, fit = KINDS[kind]
    data = list(batches(120, bs, make))
    read = baseline(reader)
    got  = [float(read.both(loss, 5 + 3 * torch.randn(bs, width), (y,))[1]) for _, y in data]
    np.testing.assert_allclose(got[51:], costs_before(data, loss, fit)[50:], rtol=.1 if kind == 'rare' else 2e-4, atol=1e-5)  # a rare class: log and logit are alike

def test_the_prior_of_a_single_example_is_known():
    read = baseline()
    for k in range(5): one, prior = read.both(nn.functional.mse_loss, torch.zeros(1, 1), (torch.full((1, 1), 7.),))
    assert math.isnan(one) and prior == 0

def test_a_prior_does_not_touch_what_trains():
    "A loss with a buffer and noise of its own: random numbers and buffers stay as they are without it."
    class Noisy(nn.Module):
        def __init__(self): super().__init__(); self.register_buffer('seen', torch.zeros(()))
        def forward(self, p, y): return ((p - y + .1 * torch.randn_like(p)) ** 2).mean()
    f, read = Noisy(), baseline()
    torch.manual_seed(1)
    p, y  = torch.randn(8, 1), torch.randn(8, 1)
    state = torch.get_rng_state()
    for _ in range(3): assert all(map(math.isfinite, map(float, read.both(f, p, (y,)))))
    assert torch.equal(state, torch.get_rng_state())
