"Detection nets: a list of images and targets in, a dict of losses out, anchors and proposals within. Against a plain reading."
import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign

from fastgradstats import diagnose, watch
from fastgradstats.measure.probes import batch_size
from plain import Plain, hooks, same

def backbone():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
    net.out_channels = 8
    return net

ANCHORS = dict(sizes=((8, 16),), aspect_ratios=((1.,),))

def rcnn(): return detection.FasterRCNN(backbone(), rpn_anchor_generator=AnchorGenerator(**ANCHORS), min_size=32, max_size=48,
    box_roi_pool=MultiScaleRoIAlign(['0'], 3, 1), box_head=TwoMLPHead(72, 16), box_predictor=FastRCNNPredictor(16, 3),
    rpn_post_nms_top_n_train=20, box_batch_size_per_image=16)

def retina(): return detection.RetinaNet(backbone(), num_classes=3, anchor_generator=AnchorGenerator(**ANCHORS), min_size=32, max_size=48)

def example():
    boxes = torch.tensor([[2., 2, 18, 18], [10, 10, 30, 28]])
    return [torch.rand(3, 32, 40), torch.rand(3, 30, 30)], [dict(boxes=boxes, labels=torch.tensor([1, 2])), dict(boxes=boxes[:1], labels=torch.tensor([1]))]

@pytest.mark.parametrize('make', [rcnn, retina])
def test_detection_nets(make):
    ends = []
    for ours in (False, True):
        torch.manual_seed(0)
        m = make(); o = torch.optim.SGD(m.parameters(), .01); p = Plain(m); std = []
        h = m.backbone[1].register_forward_hook(lambda mod, a, out: std.append(float(out.detach().double().std(correction=0))) and None)
        w = watch(m, o, grad_output=['norm'])
        if ours: w.__enter__()
        for _ in range(22):
            loss = sum(m(*example()).values())
            (w.loss(loss) if ours else loss).backward()
            p.step(o); o.zero_grad()
        if ours: w.__exit__(None, None, None)
        h.remove()
        ends.append([*(q.detach().clone() for q in m.parameters()), torch.get_rng_state()])
    rec = w.record
    same(rec, p)
    assert all(torch.equal(a, b) for a, b in zip(*ends)) and not hooks(m, o)
    assert {*rec.layers['activation'].type} == {'ReLU'} and (rec.iters.bs == 2).all()
    np.testing.assert_allclose(rec['activation', 'std'][:, list(rec.layers['activation'].layer).index('backbone.1')], std, rtol=1e-4)
    assert np.isfinite(rec['grad_output', 'norm']).all() and (rec['activation', 'frac_dead'][-1] < 1).all()
    assert not [f for f in diagnose(rec).findings if 'anchor' in str(f.layers) or 'transform' in str(f.layers) or 'dead' in f.rule]

def test_what_is_no_activation_and_what_is():
    "What prepares the input and what has lost its graph are none; an activation of one's own within a frozen body is one."
    class Scale(nn.Module):
        def forward(self, x): return x * 3 + 1
    class Anchors(nn.Module):
        def forward(self, x): return torch.ones(len(x), 4) * 9
    class Leaky(nn.Module):
        def forward(self, x): return torch.where(x > 0, x, .1 * x)
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.cls, self.scale, self.body, self.act = nn.Parameter(torch.zeros(1)), Scale(), nn.Linear(6, 8), Leaky()
            self.anchors, self.top, self.act2, self.head = Anchors(), nn.Linear(8, 8), Leaky(), nn.Linear(8, 3)
            self.body.requires_grad_(False)
        def forward(self, x):
            h = self.act(self.body(self.scale(x)))
            return self.head(self.act2(self.top(h))) + self.anchors(self.top(h)).mean() + self.cls
    m = Net(); o = torch.optim.SGD(m.parameters(), .1)
    with watch(m, o) as w:
        for _ in range(3): m(torch.randn(8, 6)).square().mean().backward(); o.step(); o.zero_grad()
    assert w.record.layers['activation'].layer.tolist() == ['act', 'act2']

def test_batch_sizes():
    a, b = torch.zeros(8, 6), torch.zeros(8, 5)
    for args, n in [((a,), 8), ((a, b), 8), (([a, b],), 8), (((a, b),), 8), ((dict(x=a),), 8), (([a, torch.zeros(7, 6)],), 2),
                    (([dict(x=a)] * 3,), 3), (([torch.zeros(3, 9, 9)] * 2, [dict(boxes=torch.zeros(5, 4))] * 2), 2), ((), 0), ((torch.tensor(1.),), 0)]:
        assert batch_size(*args) == n, (args, n)
