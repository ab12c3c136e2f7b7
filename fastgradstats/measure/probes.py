"""Probes: where in a model a tensor is read, and what each place is called.

    activation   the output of a module              grad_output  gradient of the loss with respect to that output
    grad         true gradient of a parameter        grad_used    that gradient as the optimizer consumes it
    weight       a parameter before the step         update       the parameter after the step minus before
    input        what the model was given            output       what it answered
"""
from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from ..record.schema import ENDS, OUTPUTS, PARAMETERS, PROBES      # noqa: F401

# activations are read at these; MultiheadAttention lives beside them in torch and is none
NONLINEAR  = tuple(c for c in vars(nn.modules.activation).values() if isinstance(c, type) and issubclass(c, nn.Module)
                   and c.__module__ == 'torch.nn.modules.activation' and c is not nn.MultiheadAttention)
ACTS_BY_MODE = nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd         # in training or evaluation
CHANNELS   = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)   # units are on axis 1 after these
NOT_NONLINEAR = ('Drop', 'StochasticDepth', 'Flatten', 'Identity', 'Embed', 'View', 'Reshape', 'Permute', 'Pool', 'Pad',
                 'Merge', 'Concat', 'Resize', 'Upsample', 'Interpolate', 'Shuffle', 'Norm', 'Debug', 'ToTensor',
                 'Loss')                                                          # in the name of a parameterless leaf


def unwrap(model):
    "The model inside DistributedDataParallel, DataParallel and torch.compile's wrapper, as an object."
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)): model = model.module
        elif type(model).__name__ == 'OptimizedModule' and hasattr(model, '_orig_mod'): model = model._orig_mod
        else: return model

def is_compiled(model):
    return any(type(m).__name__ == 'OptimizedModule' or getattr(m, '_compiled_call_impl', None) is not None
               for m in model.modules())

def own_params(m): return [p for p in m._parameters.values() if p is not None]

def named(model):
    "(name, module) of every module below the root, each once; inner compile wrappers left out of the names."
    seen, out = set(), []
    def walk(m, prefix):
        for n, c in m.named_children():
            c = unwrap(c)
            if id(c) in seen: continue
            seen.add(id(c))
            out.append((f'{prefix}{n}', c))
            walk(c, f'{prefix}{n}.')
    walk(model, '')
    return out

def named_params(model):
    "(name, owner's name, owner, parameter) of every parameter, each once."
    seen, out = set(), []
    for name, m in [('', model), *named(model)]:
        for n, p in m._parameters.items():
            if p is None or id(p) in seen: continue
            seen.add(id(p))
            out.append((f'{name}.{n}' if name else n, name, m, p))
    return out

def is_leaf(m):
    "Whether a module has no modules inside; those that compute a parametrized weight (weight norm) do not count."
    return all(n == 'parametrizations' for n in m._modules)

def may_be_nonlinear(m):
    "A leaf without parameters and buffers that is not torch's, such as GeneralRelu: what it does shows when it runs."
    cls = type(m)
    return (is_leaf(m) and not m._parameters and not m._buffers and not cls.__module__.startswith('torch.')
            and not any(w in cls.__name__ for w in NOT_NONLINEAR))

def is_nonlinear(m): return isinstance(m, NONLINEAR) or may_be_nonlinear(m)

def only_reshapes(args, out):
    "Whether a module, by its first call, reshapes its input, joins several or hands one on: no nonlinearity."
    xs = [t for _, t in tensors(args)]
    if not xs or not isinstance(out, torch.Tensor): return False
    x = xs[0]
    return len(xs) > 1 or x.shape != out.shape or x is not out and x.numel() > 0 and x.data_ptr() == out.data_ptr()

def takes(f, n):
    "Whether `f` can be called with so many arguments, as far as that can be known."
    if not callable(f): return False
    try: inspect.signature(f).bind(*range(n))
    except TypeError:  return False
    except ValueError: pass                                       # a builtin that does not say what it takes
    return True

def check_modules(modules):
    if modules is None or isinstance(modules, (str, type)): return
    if not isinstance(modules, nn.Module) and takes(modules, 2): return
    items = [modules] if isinstance(modules, nn.Module) else modules
    if isinstance(items, (list, tuple)) and items and all(isinstance(m, (nn.Module, type, str)) for m in items): return
    raise TypeError(f"modules is a glob on layer names ('layer4.*'), a module class, a list of modules, or a function "
                    f"f(name, module) -> bool; got {modules!r}")

def chosen(model, modules):
    "The (name, module) that `modules` chooses; None chooses all."
    everything = [('', model), *named(model)]
    if modules is None: return everything
    items = list(modules) if isinstance(modules, (list, tuple)) else [modules]
    out   = []
    for name, m in everything:
        for want in items:
            if   isinstance(want, str):       ok = bool(name) and fnmatchcase(name, want)
            elif isinstance(want, type):      ok = isinstance(m, want)
            elif isinstance(want, nn.Module): ok = m is unwrap(want)
            else:                             ok = bool(want(name, m))
            if ok: out.append((name, m)); break
    if not out:
        names = [n for n, _ in everything if n]
        told  = inspect.isfunction(modules) and modules.__name__ != '<lambda>'
        what  = inspect.getsource(modules).strip() if told else modules
        if not names: raise ValueError(f"modules={what!r} matches nothing: this {type(model).__name__} has no layers "
                                       f"inside. Leave modules out, and its own output is read")
        raise ValueError(f"modules={what!r} matches no layer of this {type(model).__name__}; its layers are "
                         f"{', '.join(names[:30])}{', ...' if len(names) > 30 else ''}. Give a glob such as "
                         f"{names[-1].split('.')[0] + '*'!r}, a module class, or a function f(name, module)")
    return out

def sites_of(model, modules):
    """The (name, module) whose outputs are read, and those read in their place if none of the first turns out to be a
    nonlinearity. By default, and within a glob, the nonlinearities; where there is none, the leaves with parameters. A
    class, a list or a function is taken at its word."""
    pick = chosen(model, modules)
    if modules is not None and not isinstance(modules, str): return pick, []
    nonlinear = [(n, m) for n, m in pick if n and is_nonlinear(m)]
    leaves    = [(n, m) for n, m in pick if is_leaf(m) and m._parameters]
    if any(isinstance(m, NONLINEAR) for _, m in nonlinear): return nonlinear, []
    if nonlinear: return nonlinear, leaves
    return leaves or (pick if modules is not None else []), []

def unit_axis(m): return 1 if isinstance(m, CHANNELS) else -1

def bounds_of(m):
    """The (lowest, highest) value of a bounded activation function, or None. One that begins at 0, as ReLU6 does, rests
    there as any ReLU; only its highest counts, so the lowest is one that it never takes."""
    if isinstance(m, (nn.Tanh, nn.Softsign)):       return -1., 1.
    if isinstance(m, (nn.Sigmoid, nn.Hardsigmoid)): return 0., 1.
    if isinstance(m, nn.Hardtanh):                  return float(m.min_val or -m.max_val), float(m.max_val)
    return None

def in_eval_mode(model):
    """Names of the modules that act otherwise in evaluation mode and are in it; 'model' where the whole model is."""
    found = [n for n, m in named(model) if not m.training and (isinstance(m, ACTS_BY_MODE) or getattr(m, 'dropout', 0))]
    return ['model'] if found and not model.training else found

def dropouts(model):
    "{name: p} of its dropout layers."
    return {n: float(m.p) for n, m in named(model) if isinstance(m, nn.modules.dropout._DropoutNd)}

def tensors(o, path=''):
    "(path, tensor) of every tensor in nested tuples, lists, dicts and dataclasses; a lone tensor has the path ''."
    if isinstance(o, torch.Tensor): yield path, o
    elif isinstance(o, Mapping):
        for k, v in o.items(): yield from tensors(v, f'{path}[{k}]')
    elif isinstance(o, (list, tuple)):
        for i, v in enumerate(o): yield from tensors(v, f'{path}[{i}]')
    elif is_dataclass(o) and not isinstance(o, type):
        for f in fields(o): yield from tensors(getattr(o, f.name, None), f'{path}.{f.name}')
    elif hasattr(o, 'to_tuple'): yield from tensors(o.to_tuple(), path)

def batch_size(*args):
    """How many examples a model is given: the length of its first tensor, unless each example comes by itself, as
    images of several sizes do: in a list of dicts, or in a list of tensors that are not equally long."""
    length = lambda t: len(t) if isinstance(t, torch.Tensor) and t.dim() else 0
    for x in args:
        if isinstance(x, (list, tuple)) and x and all(isinstance(i, Mapping) for i in x): return len(x)
    if args and isinstance(args[0], list) and len({*map(length, args[0])}) > 1: return len(args[0])
    return next((length(t) for _, t in tensors(args)), 0)

# how autograd calls what an activation function leaves in its graph; log_softmax is mostly the loss's
ACTIVATIONS = {f'{n}Backward': n.lower() for n in (
    'Relu', 'Relu6', 'Hardtanh', 'Tanh', 'Sigmoid', 'Gelu', 'Silu', 'Elu', 'Celu', 'Selu', 'LeakyRelu', 'Softplus',
    'Mish', 'Hardswish', 'Hardsigmoid', 'Softmax', 'LogSigmoid', 'Glu', 'Threshold', 'PreluKernel')}

def nodes_within(args, out):
    "The autograd nodes that a module has left between what it was given and its output."
    ends = {t.grad_fn for _, t in tensors(args)} - {out.grad_fn}          # equal where it has worked in place
    todo, found = [out.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in found or node in ends: continue
        found.add(node)
        todo += [n for n, _ in node.next_functions]
    return found

def functions_in(outputs, seen):
    """The names of activation functions in the graph of a model's outputs that none of its modules was seen to leave.
    `seen`: the autograd nodes of the outputs of modules."""
    todo = [t.grad_fn for _, t in tensors(outputs) if t.grad_fn is not None]
    known, found = set(), set()
    while todo:
        node = todo.pop()
        if node in known: continue
        known.add(node)
        name = ACTIVATIONS.get(type(node).__name__.rstrip('0123456789'))
        if name and node not in seen: found.add(name)
        todo += [n for n, _ in node.next_functions if n is not None]
    return sorted(found)

class Layout:
    "Which modules and parameters a model consists of: what it was made of is looked through for what is not the same."
    def __init__(self, model):
        self.members = list(model.modules())
        self.modules, self.params = self.now()
    def now(self):
        "The identities of the modules within each, and of the parameters."
        return ([id(c) for m in self.members for c in m._modules.values()],
                [id(p) for m in self.members for p in m._parameters.values()])
