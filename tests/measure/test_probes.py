"""Where in a model something is read: names, sites, unwrapping, units, and the tensors inside what a module gives."""
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from fastgradstats import GeneralRelu
from fastgradstats.measure.probes import (NONLINEAR, bounds_of, check_modules, chosen, is_compiled, is_leaf, is_nonlinear, named,
                                  named_params, only_reshapes, sites_of, tensors, unit_axis, unwrap)


def net(): return nn.Sequential(OrderedDict(conv=nn.Conv2d(1, 2, 3), act=nn.ReLU(), body=nn.Sequential(nn.Linear(4, 4), nn.Tanh())))
def names(pairs): return [n for n, _ in pairs]


# --- names -----------------------------------------------------------------------------------------------------------
def test_names_are_torchs():
    m = net()
    assert named(m) == [(n, c) for n, c in m.named_modules() if n]
    assert [q[0] for q in named_params(m)] == [n for n, _ in m.named_parameters()]

@pytest.mark.parametrize('wrap', [nn.DataParallel, torch.compile, lambda m: torch.compile(nn.DataParallel(m)),
                                  lambda m: nn.DataParallel(torch.compile(m))])
def test_unwrapped_whatever_is_around(wrap):
    m = net()
    assert unwrap(wrap(m)) is m

def test_a_module_called_module_keeps_its_name():
    "Prefixes are never cut from strings: AWD_LSTM has modules of that name."
    m = nn.Sequential(OrderedDict(module=nn.Sequential(OrderedDict(_orig_mod=nn.Linear(2, 2)))))
    assert unwrap(m) is m and names(named(m)) == ['module', 'module._orig_mod']

def test_inner_compiled_modules_have_no_prefix():
    m = net()
    m.body = torch.compile(m.body)
    assert names(named(m)) == ['conv', 'act', 'body', 'body.0', 'body.1'] and is_compiled(m)
    assert [q[0] for q in named_params(m)] == ['conv.weight', 'conv.bias', 'body.0.weight', 'body.0.bias']

def test_compiled_by_method_is_seen():
    m = net()
    assert not is_compiled(m)
    m.compile(backend='eager')
    assert is_compiled(m)

def test_shared_modules_and_tied_parameters_come_once():
    lin = nn.Linear(3, 3)
    m   = nn.ModuleDict(dict(a=lin, b=lin, c=nn.Linear(3, 3)))
    m.c.weight = lin.weight
    assert names(named(m)) == ['a', 'c'] and [q[0] for q in named_params(m)] == ['a.weight', 'a.bias', 'c.bias']

def test_parameters_of_the_root_and_their_owners():
    m = net()
    m.scale = nn.Parameter(torch.ones(1))
    assert [q[:2] for q in named_params(m)][:2] == [('scale', ''), ('conv.weight', 'conv')]

def test_many_modules_are_named_quickly():
    m = nn.Sequential(*[nn.ReLU() for _ in range(20_000)])
    assert len(named(m)) == 20_000


# --- which are nonlinearities ----------------------------------------------------------------------------------------
class Leaf(nn.Module):
    def forward(self, x): return x.clamp(0)
def leaf(name, **attrs):
    m = type(name, (Leaf,), {})()
    for k, v in attrs.items(): setattr(m, k, v)
    return m

@pytest.mark.parametrize('m', [nn.ReLU(), nn.GELU(), nn.PReLU(), nn.Softmax(-1), nn.GLU(), nn.Sigmoid(), GeneralRelu(.1), leaf('GeneralRelu'),
                               leaf('MySwish')], ids=lambda m: type(m).__name__)
def test_nonlinearities(m): assert is_nonlinear(m)

@pytest.mark.parametrize('m', [nn.Linear(2, 2), nn.MultiheadAttention(2, 1), nn.MultiheadAttention(2, 1).out_proj, nn.Dropout(), nn.Flatten(),
                               nn.MaxPool2d(2), nn.Identity(), nn.Sequential(nn.ReLU()), nn.Upsample(2)], ids=lambda m: type(m).__name__)
def test_not_nonlinearities_of_torch(m): assert not is_nonlinear(m)

@pytest.mark.parametrize('name', ['Flatten', 'MyDropout', 'DropPath', 'StochasticDepth', 'View', 'Reshape', 'Permute', 'MergeLayer', 'ResizeToOrig',
                                  'ResizeBatch', 'ToTensorBase', 'Identity', 'AvgPool', 'RotaryEmbedding', 'PixelNorm', 'Concat'])
def test_not_nonlinearities_by_name(name): assert not is_nonlinear(leaf(name))

def test_what_keeps_something_is_no_nonlinearity():
    m = leaf('Standardize')
    m.register_buffer('mean', torch.zeros(1))
    assert not is_nonlinear(m) and not is_nonlinear(leaf('Gate', weight=nn.Parameter(torch.ones(1))))

def test_nonlinear_holds_activations_alone():
    assert nn.MultiheadAttention not in NONLINEAR and not any(issubclass(c, nn.Linear) for c in NONLINEAR)

x = torch.randn(2, 3, 4)
@pytest.mark.parametrize('f,just', [(lambda x: x.view(2, 12), True), (lambda x: x.view(2, 3, 4), True), (lambda x: x.transpose(1, 2), True),
                                    (lambda x: x.relu(), False), (lambda x: x.clone().relu_(), False), (lambda x: x.mul_(2), False)])
def test_what_only_reshapes(f, just):
    y = x.clone()
    assert only_reshapes((y,), f(y)) is just

def test_what_joins_several_is_no_nonlinearity():
    assert only_reshapes((x, x), x + x) and not only_reshapes((), x) and not only_reshapes((x,), (x, x))

def test_parametrized_layers_are_leaves():
    from torch.nn.utils.parametrizations import weight_norm
    assert is_leaf(weight_norm(nn.Linear(2, 2))) and is_leaf(nn.ReLU()) and not is_leaf(net())


# --- which are read --------------------------------------------------------------------------------------------------
def test_sites_by_default():
    first, spare = sites_of(net(), None)
    assert names(first) == ['act', 'body.1'] and spare == []

def test_sites_of_a_model_without_nonlinearities_are_its_leaves():
    m = nn.Sequential(nn.Linear(2, 2), nn.Flatten(), nn.Sequential(nn.Linear(2, 2)))
    assert [names(s) for s in sites_of(m, None)] == [['0', '2.0'], []]

def test_leaves_are_ready_where_nonlinearities_are_not_sure():
    m = nn.Sequential(nn.Linear(2, 2), leaf('Lambda'), nn.Linear(2, 2))
    assert [names(s) for s in sites_of(m, None)] == [['1'], ['0', '2']]
    assert [names(s) for s in sites_of(nn.Sequential(*m, nn.ReLU()), None)] == [['1', '3'], []]

@pytest.mark.parametrize('modules,want', [('body*', ['body.1']), ('body.0', ['body.0']), ('conv', ['conv']), (nn.Linear, ['body.0']),
                                          ([nn.Linear, nn.Conv2d], ['conv', 'body.0']), (lambda n, m: n.endswith('t'), ['act'])],
                         ids=['glob', 'leaf', 'name', 'class', 'classes', 'function'])
def test_sites_that_were_chosen(modules, want): assert names(sites_of(net(), modules)[0]) == want

def test_sites_given_as_modules():
    m = net()
    assert names(sites_of(m, [m.body, m.act])[0]) == ['act', 'body'] and names(sites_of(m, m.conv)[0]) == ['conv']
    assert names(sites_of(m, m)[0]) == ['']

def test_a_choice_that_matches_nothing_names_the_layers():
    with pytest.raises(ValueError, match='matches no layer.*conv, act, body'): chosen(net(), 'layer4*')

@pytest.mark.parametrize('wrong', [3, [3], [], [None], 2.5])
def test_wrong_choices(wrong):
    with pytest.raises(TypeError, match='modules is a glob'): check_modules(wrong)


# --- units and bounds ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('m,axis', [(nn.Conv2d(1, 1, 1), 1), (nn.Conv1d(1, 1, 1), 1), (nn.ConvTranspose2d(1, 1, 1), 1), (nn.BatchNorm2d(1), 1),
                                    (nn.InstanceNorm2d(1), 1), (nn.GroupNorm(1, 1), 1), (nn.Linear(1, 1), -1), (nn.LayerNorm(1), -1),
                                    (nn.LSTM(1, 1), -1), (nn.Embedding(1, 1), -1), (nn.LazyConv2d(1, 1), 1)], ids=lambda v: type(v).__name__)
def test_unit_axis(m, axis): assert unit_axis(m) == axis

@pytest.mark.parametrize('m,bounds', [(nn.Tanh(), (-1, 1)), (nn.Sigmoid(), (0, 1)), (nn.ReLU6(), (-6, 6)), (nn.Hardtanh(-2, 3), (-2, 3)),
                                      (nn.Hardtanh(0, 1), (-1, 1)),
                                      (nn.Hardsigmoid(), (0, 1)), (nn.ReLU(), None), (nn.GELU(), None)], ids=lambda v: type(v).__name__)
def test_bounds(m, bounds): assert bounds_of(m) == bounds


# --- what is inside an output ----------------------------------------------------------------------------------------
Pair = namedtuple('Pair', 'a b')
@dataclass
class Data:
    a: object
    b: object = None
class Odd:
    def to_tuple(self): return x, x

@pytest.mark.parametrize('o,paths', [(x, ['']), ((x, [x, None]), ['[0]', '[1][0]']), ({'k': x, 'l': (x,)}, ['[k]', '[l][0]']), (Pair(x, 1), ['[0]']),
                                     (Data(x, Data(x)), ['.a', '.b.a']), (Odd(), ['[0]', '[1]']), (None, []), (3., []), ('text', []), (Data, []),
                                     (OrderedDict(z=x), ['[z]'])])
def test_tensors_inside(o, paths): assert [p for p, _ in tensors(o)] == paths

def test_tensors_of_packed_sequences():
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(3, 2, 4), [3, 2])
    assert [p for p, t in tensors(packed) if t.is_floating_point()] == ['[0]']
