"The loss of one answer for all: the cross-entropy in one pass against torch's own over all the rows."
import pytest
import torch
from fastai.losses import CrossEntropyLossFlat, LabelSmoothingCrossEntropyFlat
from torch import nn

from fastgradstats.measure.baseline_loss import BaselineLoss, _class_axis, _cross_entropy
from fastgradstats.measure.record_builder import RecordBuilder
from fastgradstats.measure.plan import Plan

CE = nn.CrossEntropyLoss

def answered(loss_func, pred, y):
    "The loss where every example is given the mean answer, in float64."
    return float(loss_func(pred.double().mean(0, keepdim=True).expand_as(pred).contiguous(), y))

@pytest.mark.parametrize('loss_func,shape,target', [
    (CE(), (64, 10), (64,)), (nn.functional.cross_entropy, (64, 2), (64,)), (CrossEntropyLossFlat(), (64, 10), (64,)),
    (CE(), (8, 5, 7), (8, 7)), (CE(), (4, 3, 6, 6), (4, 6, 6)), (CrossEntropyLossFlat(), (8, 7, 50), (8, 7)),
    (CrossEntropyLossFlat(axis=1), (4, 3, 6, 6), (4, 6, 6))])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
def test_cross_entropy_of_the_mean_answer(loss_func, shape, target, dtype):
    torch.manual_seed(0)
    pred, axis = (4 * torch.randn(shape)).to(dtype).requires_grad_(), _class_axis(loss_func)
    y   = torch.randint(shape[axis], target)
    got = _cross_entropy(pred, (y,), axis)
    assert float(got) == pytest.approx(answered(loss_func, pred, y), rel=1e-6) and not got.requires_grad
    y.view(-1)[::3] = -100                                          # padding, which torch leaves out
    assert float(_cross_entropy(pred, (y,), axis)) == pytest.approx(answered(loss_func, pred, y), rel=1e-6)
    assert BaselineLoss(None)(loss_func, pred, (y,)) == _cross_entropy(pred, (y,), axis)

def test_the_rows_are_not_computed_one_by_one(monkeypatch):
    "The model of a language answers thousands of positions: equal rows are read once, whatever the loss would do."
    real, sizes = torch.log_softmax, []
    monkeypatch.setattr(torch, 'log_softmax', lambda x, *a, **k: (sizes.append(x.numel()), real(x, *a, **k))[1])
    pred = torch.randn(1120, 200)
    BaselineLoss(None)(CrossEntropyLossFlat(), pred, (torch.randint(200, (1120,)),))
    assert sizes == [200]

def test_another_loss_is_asked_itself():
    for f in (CE(label_smoothing=.1), CE(weight=torch.ones(10)), CE(reduction='sum'), CE(ignore_index=1), CrossEntropyLossFlat(weight=torch.ones(10)),
              LabelSmoothingCrossEntropyFlat(), nn.MSELoss()): assert _class_axis(f) is None
    pred, y = torch.randn(64, 10), torch.randint(10, (64,))
    for ys in ((y, y), (y.float(),), (y[:, None],), (torch.rand(64, 10),)): assert _cross_entropy(pred, ys, 1) is None
    smooth = CE(label_smoothing=.1)
    for _ in range(2): assert float(BaselineLoss(None)(smooth, pred, (y,))) == pytest.approx(answered(smooth, pred, y), rel=1e-5)

def test_a_loss_that_refuses_is_named():
    builder = RecordBuilder(Plan(grad='norm'))
    assert BaselineLoss(builder)(CE(), torch.randn(8, 3), (torch.full((8,), 7),)) != 0
    assert 'refused' in builder.ignored['loss_constant']
