"""Models of every kind: what is recorded while they train equals a reading of the same training in hooks of the test's own.

`both` trains a model twice from the same seeds, once with the callback and once with `Reading`, which knows nothing of the
package, and compares layer by layer; the trained weights must be bit-identical too.
"""
import random
from collections import namedtuple
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import SGD, OptimWrapper
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastgradstats import GeneralRelu, LayerStatsCallback, watch
from fastgradstats.measure import module_hooks
from reference import REFERENCE, hooks_on, loaders, seed

SCALARS = ['mean', 'std', 'norm', 'min', 'max', 'abs_mean', 'frac_zero', 'frac_nonfinite']
EXACT   = dict(activation=[*SCALARS, 'frac_dead'], grad_output=SCALARS, grad=['mean', 'std', 'norm', 'abs_max', 'frac_zero'],
               grad_used=None, weight=['norm'], update=['norm', 'mean'], input=['mean'], output=['mean', 'std'], sample=None)


# --- the reading -----------------------------------------------------------------------------------------------------
def flatten(o, path=''):
    "Every floating tensor in an output, by where it is."
    if isinstance(o, torch.Tensor): return {path: o} if o.is_floating_point() else {}
    if isinstance(o, dict):         items = [(f'[{k}]', v) for k, v in o.items()]
    elif isinstance(o, (list, tuple)): items = [(f'[{k}]', v) for k, v in enumerate(o)]
    elif hasattr(o, '__dataclass_fields__'): items = [(f'.{k}', v) for k, v in vars(o).items()]
    else: return {}
    return {k: t for p, v in items for k, t in flatten(v, path + p).items()}

def array(t):
    t = t.detach()
    if t.is_sparse: t = t.to_dense()
    return t.as_subclass(torch.Tensor).double().cpu().numpy().copy()

class Reading(Callback):
    "Clones what the named modules give, the gradients that come back, and the parameters around every step."
    order, run_valid = 12, False
    def __init__(self, sites, prefix=''):
        super().__init__()
        self.rd_sites, self.rd_prefix, self.rd_rows, self.rd_on = sites, prefix, [], False

    def before_fit(self):
        self.rd_handles = []
        modules = dict(self.learn.model.named_modules())
        for label, names in self.rd_sites.items():
            for name in names if isinstance(names, list) else [names]:
                self.rd_handles.append(modules[self.rd_prefix + name].register_forward_hook(partial(self._saw, label)))
    def _saw(self, label, m, args, out):
        if not self.rd_on: return
        row = self.rd_rows[-1]
        for path, t in flatten(out).items():
            row['activation'].setdefault(label + path, []).append(array(t))
            got = row['grad_output'].setdefault(label + path, [])
            if t.requires_grad: t.register_hook(lambda g, got=got: got.append(array(g)))
    def before_batch(self):
        self.rd_rows.append(dict(activation={}, grad_output={}, grad={}, weight={}, update={}, loss=np.nan))
        self.rd_on = True
    def after_pred(self):
        self.rd_on = False
        self.rd_rows[-1]['output'] = {f'output{k}': [array(t)] for k, t in flatten(self.learn.pred).items()}
    def after_loss(self): self.rd_rows[-1]['loss'] = float(self.learn.loss.detach().double())
    def before_step(self):
        row = self.rd_rows[-1]
        for n, p in self.learn.model.named_parameters():
            if p.grad is not None: row['grad'][n], row['weight'][n] = [array(p.grad)], [array(p)]
    def after_step(self):
        row = self.rd_rows[-1]
        for n, p in self.learn.model.named_parameters():
            if n in row['weight']: row['update'][n] = [array(p) - row['weight'][n][0]]
    def after_fit(self):
        for h in self.rd_handles: h.remove()
        self.rd_handles = []


def fit(make, dls, cbs, epochs=1, extra=None, **kwargs):
    "A Learner that was trained from fixed seeds. `make`: -> model, or dls -> Learner. `extra`: -> more callbacks"
    seed(0)
    dls   = dls()
    made  = make(dls) if kwargs.pop('learner', False) else make()
    learn = made if isinstance(made, Learner) else Learner(
        dls, made, loss_func=kwargs.pop('loss_func', None) or nn.CrossEntropyLoss(), lr=.05, **kwargs)
    learn.remove_cbs([cb for cb in learn.cbs if type(cb).__name__ == 'ProgressCallback'])
    learn.logger = lambda o: None
    learn.add_cbs([*(extra() if extra else []), *([cbs] if cbs else [])])
    seed(1)
    learn.fit(epochs)
    return learn

def compare(rec, rows, rtol=1e-4, probes=('activation', 'grad_output', 'grad', 'weight', 'update', 'output')):
    "Every recorded scalar against the reading; returns the layers compared, by probe."
    assert len(rec.iters) == len(rows)
    np.testing.assert_allclose(rec.iters.loss, [r['loss'] for r in rows], rtol=max(rtol, 1e-5))
    seen = {}
    for probe, stat in rec.keys():
        if probe not in probes or stat not in REFERENCE or (probe, stat) in rec.windows: continue
        for j, layer in enumerate(rec.layers[probe].layer):
            for k, row in enumerate(rows):
                xs, got, where = row[probe].get(layer), rec[probe, stat][k, j], (probe, stat, layer, k)
                if not xs or not sum(x.size for x in xs):
                    assert np.isnan(got), where
                    continue
                x    = np.concatenate([x.ravel() for x in xs])
                with np.errstate(all='ignore'): want = REFERENCE[stat](x)
                room = rtol * max(abs(want), np.abs(x).mean() if stat in ('mean', 'std') else 0) + 1e-12
                assert (np.isnan(want) and np.isnan(got)) or got == want or abs(got - want) <= room, (where, got, want)
                seen.setdefault(probe, set()).add(layer)
    return seen

def both(make, dls, sites, *, reference=None, epochs=1, rtol=1e-4, same=True, want_probes=None, prefix='', settings=None,
         **kwargs):
    """Train with the callback and, apart, with the Reading (of `reference`, if another model is the reference). `sites`: label
    in the record -> module name in the reference. Returns the record and the rows read."""
    reading = Reading(sites, prefix)
    other   = fit(reference or make, dls, reading, epochs, **dict(kwargs))
    learn   = fit(make, dls, LayerStatsCallback(verbose=False, **{**EXACT, **(settings or {})}), epochs, **dict(kwargs))
    rec     = learn.layer_stats
    if same:
        for (n, p), (m, q) in zip(learn.model.state_dict().items(), other.model.state_dict().items()):
            assert torch.equal(p, q), f'{n} was trained to another value'
    assert not hooks_on(learn.model) or kwargs.get('learner'), 'a hook is left'
    seen = compare(rec, reading.rd_rows, rtol)
    if sites: assert set(rec.layers['activation'].layer) <= {lab for r in reading.rd_rows for lab in r['activation']}
    for probe in want_probes or ('activation', 'grad_output', 'grad', 'weight', 'update'):
        assert seen.get(probe), f'nothing was compared at {probe}'
    return rec, reading.rd_rows

def layers(rec, probe='activation'): return rec.layers[probe].layer.tolist()

def images(n=24, side=16, bs=8, classes=3): return lambda: loaders(n, (3, side, side), bs, classes)
def vectors(n=24, width=6, bs=8): return lambda: loaders(n, (width,), bs)
def sequences(n=24, steps=5, width=3, bs=8): return lambda: loaders(n, (steps, width), bs)


# --- text ------------------------------------------------------------------------------------------------------------
WORDS = 'the a cat dog bird fish sees eats likes and big small red blue runs sleeps under over house tree'.split()

def corpus(n=60):
    rng = np.random.default_rng(0)
    return pd.DataFrame(dict(text=[' '.join(rng.choice(WORDS, 24)) for _ in range(n)], label=rng.integers(0, 2, n)))

def text_dls(is_lm):
    from fastai.text.data import TextDataLoaders
    from fastai.text.core import BaseTokenizer
    extra = dict(seq_len=8) if is_lm else dict(label_col='label', seq_len=8)
    return TextDataLoaders.from_df(corpus(), text_col='text', is_lm=is_lm, tok_tfm=BaseTokenizer(), bs=8, valid_pct=.2,
                                   seed=0, **extra)

@pytest.fixture(scope='module')
def clas_dls(): return text_dls(False)

LSTMS = {f'0.rnns.{k}.module': f'0.rnns.{k}.module' for k in range(3)}

def small_config(kind):
    from fastai.text.models.awdlstm import awd_lstm_clas_config, awd_lstm_lm_config
    return {**(awd_lstm_lm_config if kind == 'lm' else awd_lstm_clas_config), 'emb_sz': 8, 'n_hid': 12}

def test_language_model_awd_lstm():
    "Weight drop, tied weights, RNNCallback and RNNRegularizer of language_model_learner."
    from fastai.text.learner import language_model_learner
    from fastai.text.models import AWD_LSTM
    make = lambda dls: language_model_learner(dls, AWD_LSTM, config=small_config('lm'), pretrained=False, drop_mult=1.)
    sites = {**LSTMS, '1.decoder': '1.decoder'}
    with pytest.warns(UserWarning, match='not observed.*0.encoder'):
        rec, rows = both(make, lambda: text_dls(True), sites, learner=True, prefix='')
    assert layers(rec)[0] == '0.rnns.0.module[0]' and layers(rec)[-1] == '1.decoder'
    assert '0.rnns.0.weight_hh_l0_raw' in layers(rec, 'grad') and '0.rnns.0.module.weight_ih_l0' in layers(rec, 'grad')
    assert sum('encoder' in n or 'decoder.weight' in n for n in layers(rec, 'grad')) == 1          # the tied weight, once
    assert '0.encoder' in rec.meta['not_hooked']

def again(dls):
    "The same batches in every fit: a text loader draws its shuffles from a generator of its own."
    def made():
        dls.train.rng = random.Random(3)
        return dls
    return made

def test_text_classifier_awd_lstm(clas_dls):
    from fastai.text.learner import text_classifier_learner
    from fastai.text.models import AWD_LSTM
    make = lambda dls: text_classifier_learner(dls, AWD_LSTM, config=small_config('clas'), pretrained=False, seq_len=8)
    first = make(clas_dls)
    relus = [n for n, m in first.model.named_modules() if isinstance(m, nn.ReLU)]
    rec, rows = both(make, again(clas_dls), {n: n for n in relus}, learner=True)
    assert layers(rec) == relus
    lstms = lambda n, m: isinstance(m, nn.LSTM)
    rec, rows = both(make, again(clas_dls), {f'0.module.rnns.{k}.module': f'0.module.rnns.{k}.module' for k in range(3)}, learner=True,
                     settings=dict(modules=lstms))
    assert '0.module.rnns.2.module[0]' in layers(rec)


# --- recurrent -------------------------------------------------------------------------------------------------------
class Recurrent(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.rnn, self.head = cell(3, 8, num_layers=2, batch_first=True), nn.Linear(8, 3)
    def forward(self, x): return self.head(self.rnn(x)[0][:, -1])

@pytest.mark.parametrize('cell', [nn.LSTM, nn.GRU, nn.RNN])
def test_lstm_and_gru(cell):
    rec, _ = both(lambda: Recurrent(cell), sequences(), dict(rnn='rnn', head='head'), epochs=2)
    assert layers(rec)[0] == 'rnn[0]' and layers(rec)[-1] == 'head'
    assert layers(rec, 'grad')[:2] == ['rnn.weight_ih_l0', 'rnn.weight_hh_l0']

class CellLoop(nn.Module):
    def __init__(self, cell=nn.RNNCell):
        super().__init__()
        self.cell, self.head = cell(3, 8), nn.Linear(8, 3)
    def states(self, x):
        h, hs = None, []
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
            hs.append(h)
        return hs
    def forward(self, x): return self.head(self.states(x)[-1])

def test_rnn_cell_per_call_is_the_gradient_through_time():
    "With per_call the gradient of the loss with respect to each hidden state, as autograd.grad gives it."
    model, xs, ys = CellLoop(), torch.randn(3, 8, 5, 3), torch.randint(3, (3, 8))
    opt = torch.optim.SGD(model.parameters(), .1)
    want = []
    with watch(model, opt, per_call=True, sample=None, activation=['mean'], grad_output=['norm', 'mean'], weight=None) as w:
        for x, y in zip(xs, ys):
            ref  = deepcopy(model)
            hs   = ref.states(x)
            want.append(torch.autograd.grad(F.cross_entropy(ref.head(hs[-1]), y), hs))
            w.loss(F.cross_entropy(model(x), y)).backward()
            opt.step(); opt.zero_grad()
    rec = w.record
    assert layers(rec)[:5] == [f'cell:{t}' for t in range(5)] and layers(rec)[5] == 'head'
    for k, gs in enumerate(want):
        for t, g in enumerate(gs):
            assert np.isclose(rec['grad_output', 'norm'][k, t], g.norm(), rtol=1e-5)
            assert np.isclose(rec['grad_output', 'mean'][k, t], g.mean(), rtol=1e-4, atol=1e-9)

def test_rnn_cell_without_per_call_is_one_layer():
    rec, rows = both(CellLoop, sequences(), dict(cell='cell', head='head'))
    assert layers(rec) == ['cell', 'head'] and len(rows[0]['activation']['cell']) == 5


# --- attention -------------------------------------------------------------------------------------------------------
class Encoder(nn.Module):
    def __init__(self, activation='relu'):
        super().__init__()
        self.up, self.head = nn.Linear(3, 8), nn.Linear(8, 3)
        self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, .1, activation, batch_first=True), 2,
                                          enable_nested_tensor=False)
    def forward(self, x): return self.head(self.body(self.up(x)).mean(1))

def test_transformer_encoder():
    leaves = ['up', *[f'body.layers.{k}.{n}' for k in range(2) for n in ('norm1', 'linear1', 'linear2', 'norm2')], 'head']
    with pytest.warns(UserWarning, match='out_proj'):
        rec, _ = both(Encoder, sequences(), {n: n for n in leaves})
    assert layers(rec) == leaves                                          # in forward order, although norm1 is defined later
    assert set(rec.meta['not_hooked']) == {*(f'body.layers.{k}.self_attn.out_proj' for k in range(2)), 'relu (a function)'}
    names = layers(rec, 'grad')
    assert names[0] == 'up.weight' and names[-1] == 'head.bias'
    assert names.index('body.layers.0.self_attn.in_proj_weight') < names.index('body.layers.0.norm1.weight')
    assert names.index('body.layers.0.norm1.weight') < names.index('body.layers.0.linear1.weight')

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.act, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.GELU(), nn.Linear(6, 3)
    def forward(self, x): return self.head(self.act(self.attn(x, x, x, need_weights=True)[0]).mean(1))

def test_multihead_attention():
    rec, _ = both(Attention, sequences(width=6), dict(act='act'))
    assert layers(rec) == ['act']
    rec, _ = both(Attention, sequences(width=6), dict(attn='attn'), settings=dict(modules=[nn.MultiheadAttention]))
    assert layers(rec) == ['attn[0]', 'attn[1]']
    assert np.isfinite(rec['activation', 'mean']).all() and {'attn.in_proj_weight', 'attn.in_proj_bias'} <= {*layers(rec, 'grad')}


# --- vision ----------------------------------------------------------------------------------------------------------
def image_dls(classes=3, n=24, side=32):
    dls = loaders(n, (3, side, side), 8, classes)
    dls.c = classes
    return dls

class BlockApart(nn.Module):
    "A BasicBlock with a ReLU of its own at each place, nothing in place."
    def __init__(self, b):
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2, self.downsample = b.conv1, b.bn1, b.conv2, b.bn2, b.downsample
        self.relu_0, self.relu_1 = nn.ReLU(), nn.ReLU()
    def forward(self, x):
        y = self.bn2(self.conv2(self.relu_0(self.bn1(self.conv1(x)))))
        return self.relu_1(y + (x if self.downsample is None else self.downsample(x)))

def out_of_place(model):
    "The same net with every in-place or reused module apart and out of place."
    from torchvision.models.resnet import BasicBlock
    for n, m in list(model.named_children()):
        if isinstance(m, BasicBlock): setattr(model, n, BlockApart(m))
        elif isinstance(m, nn.ReLU):  setattr(model, n, nn.ReLU())
        else: out_of_place(m)
    return model

def test_vision_learner_resnet18():
    "In-place and reused ReLUs: each use a layer of its own, values and gradients equal those of an out-of-place net."
    from fastai.vision.learner import vision_learner
    from torchvision.models import resnet18
    make = lambda dls: vision_learner(dls, resnet18, pretrained=False, n_out=3, loss_func=nn.CrossEntropyLoss(), normalize=False)
    def reference(dls):
        learn = make(dls)
        out_of_place(learn.model)
        return learn
    names = [n for n, m in out_of_place(make(image_dls()).model).named_modules() if isinstance(m, nn.ReLU)]
    sites = {n.replace('_', ':') if 'relu_' in n else n: n for n in names}
    rec, _ = both(make, image_dls, sites, reference=reference, learner=True, rtol=2e-3, same=False,
                  want_probes=('activation', 'grad_output'))
    assert layers(rec) == list(sites) and '0.4.0.relu:0' in layers(rec) and '0.7.1.relu:1' in layers(rec)
    assert np.isfinite(rec['grad_output', 'norm']).all()

def test_unet_learner():
    from torchvision.models import resnet18
    g    = torch.Generator().manual_seed(3)
    x, y = torch.randn(12, 3, 32, 32, generator=g), torch.randint(2, (12, 32, 32), generator=g)
    def dls():
        from fastai.data.load import DataLoader
        items = list(zip(x, y))
        made  = DataLoaders(DataLoader(items[:8], bs=4, num_workers=0), DataLoader(items[8:], bs=4, num_workers=0), device='cpu')
        made.c, made.vocab = 2, [0, 1]
        made.one_batch_shape = x.shape
        return made
    def make(dls):
        from fastai.vision.models.unet import DynamicUnet
        from fastai.vision.learner import create_body
        net = DynamicUnet(create_body(resnet18(), pretrained=False, cut=-2), 2, (32, 32))
        return Learner(dls, net, loss_func=nn.CrossEntropyLoss(), lr=.01)
    net   = make(dls()).model
    relus = [n for n, m in net.named_modules() if isinstance(m, nn.ReLU)]
    n_own = len(hooks_on(net))
    assert n_own                                                           # the U-Net's own hooks
    rec, rows = both(make, dls, {n: n for n in relus if 'relu' not in n}, learner=True, rtol=5e-4, want_probes=('activation', 'grad_output'),
                     settings=dict(modules=lambda n, m: isinstance(m, nn.ReLU) and 'relu' not in n))
    assert len(layers(rec)) > 5
    learn = fit(make, dls, LayerStatsCallback(verbose=False), learner=True)
    assert len(hooks_on(learn.model)) == n_own
    found = set(learn.layer_stats.layers['activation'].type)
    assert found == {'ReLU'}, found                                        # no MergeLayer, no ResizeToOrig

def test_tabular_learner():
    from fastai.tabular.learner import tabular_learner
    from fastai.tabular.data import TabularDataLoaders
    from fastai.tabular.core import Categorify, Normalize
    rng = np.random.default_rng(0)
    df  = pd.DataFrame(dict(a=rng.choice(list('xyz'), 40), b=rng.choice(list('pq'), 40), u=rng.normal(size=40), v=rng.normal(size=40),
                            y=rng.choice(['n', 'm'], 40)))
    made = TabularDataLoaders.from_df(df, procs=[Categorify, Normalize], cat_names=['a', 'b'], cont_names=['u', 'v'], y_names='y',
                                      valid_idx=list(range(32, 40)), bs=8, num_workers=0, device='cpu')
    make = lambda dls: tabular_learner(dls, layers=[12, 8])
    def apart(dls):
        learn = make(dls)
        for k in range(2): learn.model.layers[k][1] = nn.ReLU()           # fastai gives both the same, in place
        return learn
    assert make(made).model.layers[0][1] is make(made).model.layers[1][1]
    rec, _ = both(make, again(made), {f'layers.0.1:{k}': f'layers.{k}.1' for k in range(2)}, reference=apart, learner=True)
    assert layers(rec) == ['layers.0.1:0', 'layers.0.1:1']
    assert layers(rec, 'grad')[:2] == ['embeds.0.weight', 'embeds.1.weight']
    assert 'input[0]' in rec.meta['not_hooked'] and layers(rec, 'input') == ['input[1]']           # the categories are integers

class Bag(nn.Module):
    def __init__(self, sparse):
        super().__init__()
        self.emb, self.act, self.head = nn.Embedding(20, 6, sparse=sparse), nn.ReLU(), nn.Linear(6, 3)
    def forward(self, x): return self.head(self.act(self.emb(x).sum(1)))

@pytest.mark.parametrize('opt', ['fastai', 'torch'])
def test_sparse_embedding_gradient_is_the_dense_one(opt):
    g    = torch.Generator().manual_seed(0)
    x    = torch.randint(0, 20, (24 + 8, 7), generator=g)                   # words come more than once: not coalesced
    dls  = lambda: loaders(24, x=x)
    opts = dict(opt_func=SGD if opt == 'fastai' else partial(OptimWrapper, opt=torch.optim.SGD))
    if opt == 'fastai': opts['opt_func'] = partial(SGD, decouple_wd=True, wd=0.)
    recs = [both(partial(Bag, s), dls, dict(act='act'), reference=partial(Bag, False), same=False, **dict(opts))[0]
            for s in (True, False)]
    for key in recs[0].keys():
        np.testing.assert_allclose(recs[0][key], recs[1][key], rtol=1e-5, atol=1e-7, err_msg=str(key))


# --- how modules are used --------------------------------------------------------------------------------------------
class Shared(nn.Module):
    "One linear layer and one activation, each used three times."
    def __init__(self):
        super().__init__()
        self.up, self.mid, self.act, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
        self.same = self.mid                                              # under a second name too
    def forward(self, x):
        x = self.act(self.up(x))
        for m in (self.mid, self.same): x = self.act(m(x))
        return self.head(x)

class Apart(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.mid, self.act, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
        self.a, self.b, self.c, self.d, self.e = [nn.Identity() for _ in range(5)]
    def forward(self, x):
        x = self.a(self.act(self.up(x)))
        x = self.d(self.mid(x)); x = self.b(self.act(x))
        x = self.e(self.mid(x)); x = self.c(self.act(x))
        return self.head(x)

def test_shared_modules_are_merged():
    rec, _ = both(Shared, vectors(), {'act:0': 'a', 'act:1': ['b', 'c']}, reference=Apart, same=False)
    assert layers(rec) == ['act:0', 'act:1']                              # after `up`, and after `mid`, twice
    rec, _ = both(Shared, vectors(), {'mid': ['d', 'e']}, reference=Apart, same=False, settings=dict(modules=lambda n, m: n == 'mid'))
    assert layers(rec) == ['mid'] and layers(rec, 'grad').count('mid.weight') == 1

def test_shared_modules_apart_with_per_call():
    rec, _ = both(Shared, vectors(), {'act:0': 'a', 'act:1': 'b', 'act:2': 'c'}, reference=Apart, same=False,
                  settings=dict(per_call=True))
    assert layers(rec) == ['act:0', 'act:1', 'act:2']

class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)
    def forward(self, x): return self.fc(F.relu(self.bn(self.conv(x)), inplace=True).mean((2, 3)))

def test_functional_activations_fall_back_to_leaves():
    rec, _ = both(Functional, images(), {n: n for n in ('conv', 'bn', 'fc')})
    assert layers(rec) == ['conv', 'bn', 'fc']

class Lambda(nn.Module):                                                   # of the course's notebooks
    def __init__(self, func): super().__init__(); self.func = func
    def forward(self, x): return self.func(x)
class Flat(nn.Module):
    def forward(self, x): return x.view(x.size(0), -1)
class Functionals(Functional):
    def __init__(self):
        super().__init__()
        self.flat, self.same = Lambda(lambda x: x.view(x.size(0), -1)), Lambda(lambda x: x.view(x.shape))
    def forward(self, x): return self.fc(self.flat(F.adaptive_avg_pool2d(F.relu(self.bn(self.conv(self.same(x)))), 1)))

def test_course_lambda_is_no_nonlinearity():
    "A model whose only parameterless modules reshape falls back to its leaves, from the first row on."
    rec, _ = both(Functionals, images(), {n: n for n in ('conv', 'bn', 'fc')}, epochs=2)
    assert layers(rec) == ['conv', 'bn', 'fc']

def test_course_lambda_beside_relu():
    def make(): return nn.Sequential(Lambda(lambda x: x.view(-1, 3, 16, 16)), nn.Conv2d(3, 4, 3, 2), nn.ReLU(),
                                     nn.AdaptiveAvgPool2d(1), Flat(), nn.Linear(4, 3))
    rec, _ = both(make, lambda: loaders(24, (768,), 8), {'2': '2'})
    assert layers(rec) == ['2']

class CourseRelu(nn.Module):                                               # course v3: in place on its own fresh tensor
    def __init__(self, leak=None, sub=None, maxv=None): super().__init__(); self.leak, self.sub, self.maxv = leak, sub, maxv
    def forward(self, x):
        x = F.leaky_relu(x, self.leak) if self.leak is not None else F.relu(x)
        if self.sub is not None: x.sub_(self.sub)
        if self.maxv is not None: x.clamp_max_(self.maxv)
        return x

@pytest.mark.parametrize('act', [CourseRelu, GeneralRelu])
def test_general_relu(act):
    "The course's and ours: nonlinearities by default, with the values that leave them."
    def make(): return nn.Sequential(nn.Conv2d(3, 4, 3, 2), act(.1, .4, 1.), nn.Conv2d(4, 6, 3), act(.1, .4), Flat(), nn.Linear(150, 3))
    rec, rows = both(make, images(), {'1': '1', '3': '3'}, epochs=2)
    assert layers(rec) == ['1', '3'] and rec['activation', 'max'][:, 0].max() <= 1 and rec['activation', 'min'].min() < -.4


# --- what modules give -----------------------------------------------------------------------------------------------
Pair = namedtuple('Pair', 'left right')
@dataclass
class Answer:
    logits: torch.Tensor
    extra:  torch.Tensor = None

class Gives(nn.Module):
    def __init__(self, what): super().__init__(); self.what, self.lin = what, nn.Linear(6, 6)
    def forward(self, x):
        y, z = self.lin(x), torch.tanh(x)
        return dict(tuple=lambda: (y, None, (z, 3)), list=lambda: [y, z], dict=lambda: {'a': y, 'b': {'c': z}},
                    none=lambda: None, number=lambda: 1.5, named=lambda: Pair(y, z), data=lambda: Answer(y, z))[self.what]()

class GivesMany(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.part, self.lin, self.head = Gives(what), nn.Linear(6, 6), nn.Linear(6, 3)
    def forward(self, x):
        parts = list(flatten(self.part(x)).values())
        return self.head(sum(parts, self.lin(x)))

@pytest.mark.parametrize('what,paths', [('tuple', ['[0]', '[2][0]']), ('list', ['[0]', '[1]']), ('dict', ['[a]', '[b][c]']),
                                        ('none', []), ('number', []), ('named', ['[0]', '[1]']), ('data', ['.logits', '.extra'])])
def test_outputs_of_every_kind(what, paths):
    rec, _ = both(partial(GivesMany, what), vectors(), dict(part='part', lin='lin'),
                  settings=dict(modules=lambda n, m: n in ('part', 'lin')))
    assert layers(rec) == [*[f'part{p}' for p in paths], 'lin']

class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.act, self.head, self.out = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3), nn.Tanh()
        for p in self.body.parameters(): p.requires_grad_(False)
    def forward(self, x): return self.out(self.head(self.act(self.body(x))))

def test_outputs_that_need_no_gradient():
    rec, _ = both(Frozen, vectors(), dict(act='act', out='out'))
    assert np.isnan(rec['grad_output', 'norm'][:, 0]).all() and np.isfinite(rec['grad_output', 'norm'][:, 1]).all()
    assert np.isnan(rec['grad', 'norm'][:, :2]).all() and np.isfinite(rec['activation', 'mean']).all()

class ViewInPlace(nn.Module):
    "The linear layer's output is changed in place through a view: its own gradient never comes."
    def __init__(self): super().__init__(); self.lin, self.flat, self.act, self.head = nn.Linear(6, 8), Flat(), nn.ReLU(True), nn.Linear(8, 3)
    def forward(self, x): return self.head(self.act(self.flat(self.lin(x))))

def test_gradient_of_a_view_changed_in_place_is_a_named_gap():
    rec, _ = both(ViewInPlace, vectors(), dict(lin='lin', flat='flat', act='act'), want_probes=('activation', 'grad'),
                  settings=dict(modules=lambda n, m: n in ('lin', 'flat', 'act')))
    gap = np.isnan(rec['grad_output', 'norm']).all(0)
    named = [n for n in layers(rec) if f'{n} (grad_output)' in rec.meta['not_hooked']]
    assert named == [n for n, g in zip(layers(rec), gap) if g] and gap[layers(rec).index('flat')]


# --- checkpoints, layouts, wrappers ----------------------------------------------------------------------------------
class Blocks(nn.Module):
    "Three blocks that share a ReLU; the blocks begin with it."
    def __init__(self, mode=None):
        super().__init__()
        self.mode, self.up, self.act, self.head = mode, nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)
        self.lins = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.acts = nn.ModuleList(nn.Tanh() for _ in range(3))
    def block(self, k, x): return self.acts[k](self.lins[k](x) if k != 1 else self.act(self.lins[k](x)))
    def forward(self, x):
        x = self.act(self.up(x))
        for k in range(3):
            x = self.block(k, x) if self.mode is None else checkpoint(self.block, k, x, use_reentrant=self.mode)
        return self.head(x)

class BlocksApart(Blocks):
    def __init__(self, mode=None): super().__init__(); self.first, self.second = nn.Identity(), nn.Identity()
    def block(self, k, x): return self.acts[k](self.lins[k](x) if k != 1 else self.second(self.act(self.lins[k](x))))
    def forward(self, x):
        x = self.first(self.act(self.up(x)))
        for k in range(3): x = self.block(k, x)
        return self.head(x)

@pytest.mark.parametrize('mode', [True, False], ids=['reentrant', 'not_reentrant'])
def test_checkpoint(mode):
    "Nothing counted twice, and the gradients of what runs again in the backward pass are there."
    sites = {'act:0': 'first', 'act:1': 'second', **{f'acts.{k}': f'acts.{k}' for k in range(3)}}
    rec, _ = both(partial(Blocks, mode), vectors(), sites, reference=BlocksApart, same=False, epochs=2)
    assert layers(rec) == ['act:0', 'acts.0', 'act:1', 'acts.1', 'acts.2'] and not rec.meta['not_hooked']
    assert np.isfinite(rec['grad_output', 'norm']).all()

def test_checkpoint_whose_calls_cannot_be_told_is_named():
    class Starts(Blocks):
        def block(self, k, x): return self.lins[k](self.act(x))
    with pytest.warns(UserWarning, match='does not tell which'):
        rec = fit(partial(Starts, True), vectors(), LayerStatsCallback(verbose=False, **EXACT)).layer_stats
    got = rec['grad_output', 'norm']
    assert layers(rec)[:3] == ['act:0', 'act:1', 'act:2'] and np.isnan(got[:, :3]).all()         # no part of it, no wrong one
    assert 'act (grad_output)' in rec.meta['not_hooked'] and np.isfinite(rec['activation', 'mean']).all()

def test_channels_last():
    from fastai.callback.channelslast import ChannelsLast
    def make(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU(),
                                     nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    rec, rows = both(make, images(), {'2': '2', '4': '4'}, extra=lambda: [ChannelsLast()])
    dead = np.mean([[(np.ptp(np.concatenate([r['activation'][s][0] for r in rows]), axis=(0, 2, 3)) == 0).mean() for s in '24']], 0)
    assert np.allclose(rec['activation', 'frac_dead'][0], dead)

def compiled(how, backend):
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 3))
    if how == 'whole': return torch.compile(model, backend=backend)
    if how == 'inner': model[2] = torch.compile(model[2], backend=backend)
    else:              model.compile(backend=backend)
    return model

@pytest.mark.parametrize('how', ['whole', 'inner', 'method'])
@pytest.mark.parametrize('backend', ['eager', pytest.param('inductor', marks=pytest.mark.slow)])
def test_compiled(how, backend):
    "With the callback there from the first call on, and attached after a compiled fit."
    def plain(): return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 3))
    rec, _  = both(partial(compiled, how, backend), vectors(), {'1': '1', '3': '3'}, reference=plain, same=False, epochs=2)
    assert layers(rec) == ['1', '3'] and layers(rec, 'grad') == [f'{k}.{n}' for k in (0, 2, 4) for n in ('weight', 'bias')]
    reading = Reading({'1': '1', '3': '3'})
    other   = fit(plain, vectors(), None)
    learn   = fit(partial(compiled, how, backend), vectors(), None)
    for l, cb in ((other, reading), (learn, LayerStatsCallback(verbose=False, **EXACT))):
        seed(5)
        l.fit(2, cbs=cb)
    seen = compare(learn.layer_stats, reading.rd_rows)
    assert seen['activation'] == seen['grad_output'] == {'1', '3'} and not hooks_on(learn.model)

def test_compiled_is_compiled_once_for_a_fit(monkeypatch):
    "The hooks stay on, and rest, from epoch to epoch: the first validation, of another batch size, compiles nothing without them."
    seen = []
    real = module_hooks.forget_compiled
    monkeypatch.setattr(module_hooks, 'forget_compiled', lambda model: (seen.append(1), real(model)))
    def dls(): return loaders(20, (6,), 8, n_valid=13)                     # batches of 8 and 4, in validation of 13
    def plain(): return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 3))
    both(partial(compiled, 'whole', 'eager'), dls, {'1': '1', '3': '3'}, reference=plain, same=False, epochs=3)
    assert len(seen) == 1

def test_what_else_is_compiled_stays_compiled():
    from torch._dynamo.testing import CompileCounter
    counter = CompileCounter()
    other   = torch.compile(lambda x: x.sin() + 1, backend=counter)
    other(torch.ones(3))
    model = compiled('whole', 'eager')
    with watch(model, torch.optim.SGD(model.parameters(), .1)): other(torch.ones(3))
    other(torch.ones(3))
    assert counter.frame_count == 1

def test_data_parallel_names():
    def plain(): return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3))
    rec, _ = both(lambda: nn.DataParallel(plain()), vectors(), {'1': '1'}, reference=plain, same=False)
    assert layers(rec) == ['1'] and layers(rec, 'grad') == ['0.weight', '0.bias', '2.weight', '2.bias']

def test_lazy_modules():
    def lazy(): return nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    def make():
        torch.manual_seed(9)
        return lazy()
    rec, rows = both(make, images(), {'2': '2'})
    assert np.isfinite(rec['grad', 'norm']).all() and np.isfinite(rec['update', 'norm']).all()      # from the first row on
    assert layers(rec, 'grad') == ['0.weight', '0.bias', '1.weight', '1.bias', '4.weight', '4.bias']
    assert rec.layers['grad'].type.tolist()[0] in ('Conv2d', 'LazyConv2d') and rec.layers['grad']['shape'][0] == '4x3x3x3'

def test_weight_norm_by_parametrization():
    from torch.nn.utils.parametrizations import weight_norm
    def make(): return nn.Sequential(weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU(), nn.Flatten(), weight_norm(nn.Linear(784, 3)))
    rec, _ = both(make, images(), {'1': '1'})
    assert '0.parametrizations.weight.original1' in layers(rec, 'grad')
    leaf = both(make, images(), {'3': '3'}, settings=dict(modules='3'))[0]
    assert layers(leaf) == ['3']


# --- what cannot be hooked -------------------------------------------------------------------------------------------
class ByForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin, self.act, self.quiet, self.head = nn.Linear(6, 8), nn.ReLU(), nn.Tanh(), nn.Linear(8, 3)
    def forward(self, x): return self.head(self.quiet.forward(self.act(self.lin(x))))

def test_called_through_forward_is_named_once():
    with pytest.warns(UserWarning) as told:
        rec, _ = both(ByForward, vectors(), dict(act='act'), epochs=3)
    told = [str(w.message) for w in told if 'fastgradstats' in str(w.message)]
    assert len(told) == 1 and 'quiet' in told[0] and 'never called' in told[0]
    assert rec.meta['not_hooked']['quiet'] == 'its forward was never called as a module' and 'quiet' in repr(rec)
    assert set(rec.meta['not_hooked']) == {'quiet', 'tanh (a function)'}            # what its forward did

def test_module_list_is_named():
    with pytest.warns(UserWarning, match='lins .its forward was never called'):
        rec, _ = both(Blocks, vectors(), {f'lins.{k}': f'lins.{k}' for k in range(3)},
                      settings=dict(modules=lambda n, m: n.startswith('lins')))
    assert layers(rec) == ['lins.0', 'lins.1', 'lins.2'] and 'lins' in rec.meta['not_hooked']

class Bare(nn.Module):
    "No module inside is ever called."
    def __init__(self): super().__init__(); self.ws = nn.ParameterList([torch.randn(6, 8) / 3, torch.randn(8, 3) / 3])
    def forward(self, x): return (x @ self.ws[0]).relu() @ self.ws[1]

def test_model_on_which_nothing_can_be_hooked():
    def make(): return Bare()
    with pytest.warns(UserWarning, match='ws .its forward was never called'):
        rec, _ = both(make, vectors(), {}, want_probes=('grad', 'update', 'output'))
    assert layers(rec) == [] and layers(rec, 'grad') == ['ws.0', 'ws.1'] and 'ws' in rec.meta['not_hooked']
    repr(rec), rec.frame()

def test_root_without_modules_is_called_model():
    class Root(nn.Module):
        def __init__(self): super().__init__(); self.w = nn.Parameter(torch.randn(6, 3))
        def forward(self, x): return x @ self.w
    rec = fit(Root, vectors(), LayerStatsCallback(verbose=False)).layer_stats
    assert layers(rec) == ['model'] and layers(rec, 'grad') == ['w']


# --- units, order, names ---------------------------------------------------------------------------------------------
class Norms(nn.Module):
    "An activation after each kind of weight layer: (name, axis of its units)."
    AXES = dict(conv=1, bn=1, group=1, up=1, flat=1, lin=-1, norm=-1, seq=-1)
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.GroupNorm(1, 5), nn.ConvTranspose2d(5, 4, 2)
        self.e, self.f, self.g, self.h = nn.Linear(60, 7), nn.Linear(7, 6), nn.LayerNorm(6), nn.Linear(6, 3)
        for n in self.AXES: setattr(self, n, nn.ReLU())
    def forward(self, x):
        x = self.up(self.d(self.group(self.c(self.bn(self.b(self.conv(self.a(x))))))))
        x = self.flat(x.flatten(2))                                       # still after the convolution: (batch, channel, place)
        x = self.lin(self.e(x.reshape(len(x), -1, 60)))
        return self.h(self.seq(self.norm(self.g(self.f(x))))).mean(1)

@pytest.mark.parametrize('unit_dim', [None, 1, -1])
def test_unit_axis(unit_dim):
    rec, rows = both(Norms, images(side=16), {n: n for n in Norms.AXES}, settings=dict(unit_dim=unit_dim))
    for j, (name, axis) in enumerate(Norms.AXES.items()):
        x    = np.concatenate([r['activation'][name][0] for r in rows])
        axis = (axis if unit_dim is None else unit_dim) % x.ndim
        dead = np.ptp(np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1), axis=1) == 0
        assert layers(rec)[j] == name and rec.units[rec.units.layer == name].unit.nunique() == x.shape[axis], name
        assert np.isclose(rec['activation', 'frac_dead'][0, j], dead.mean()), name

class Backwards(nn.Module):
    "Modules defined in another order than they run."
    def __init__(self):
        super().__init__()
        self.last, self.act2, self.mid, self.act1, self.first = nn.Linear(8, 3), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(6, 8)
    def forward(self, x): return self.last(self.act2(self.mid(self.act1(self.first(x)))))

def test_layers_are_in_forward_order():
    rec, _ = both(Backwards, vectors(), dict(act1='act1', act2='act2'))
    assert layers(rec) == ['act1', 'act2']
    for probe in ('grad', 'weight', 'update'):
        assert layers(rec, probe) == [f'{m}.{p}' for m in ('first', 'mid', 'last') for p in ('weight', 'bias')]


# --- numbers ---------------------------------------------------------------------------------------------------------
class Cast(Callback):
    "The batch in the model's type."
    order = -50
    def __init__(self, dtype): super().__init__(); self.cast_to = dtype
    def before_batch(self): self.learn.xb = tuple(x.to(self.cast_to) for x in self.learn.xb)
    def after_pred(self): self.learn.pred = self.learn.pred.float()

def net(dtype): return nn.Sequential(nn.Linear(6, 300), nn.ReLU(), nn.Linear(300, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)

def test_float64_model():
    rec, _ = both(partial(net, torch.float64), vectors(), {'1': '1', '3': '3'}, extra=lambda: [Cast(torch.float64)], rtol=1e-6)

def test_bfloat16_model():
    "Parameters, activations, gradients and updates in bfloat16 are read in float32 from what they are."
    rec, rows = both(partial(net, torch.bfloat16), vectors(), {'1': '1', '3': '3'}, extra=lambda: [Cast(torch.bfloat16)], epochs=2)
    assert np.abs(rec['update', 'norm']).max() > 0

def test_half_activations():
    class Half(nn.Module):
        def __init__(self): super().__init__(); self.lin, self.act, self.head = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)
        def forward(self, x): return self.head(self.act((1e4 * self.lin(x)).half()).float() / 1e4)
    rec, rows = both(Half, vectors(400, 6, 200), dict(act='act'))
    assert rows[0]['activation']['act'][0].size == 1600 and np.isfinite(rec['activation', 'norm']).all()     # squares exceed float16

def test_tensor_image_without_cast_is_read_as_a_plain_tensor():
    "Its own operations take twenty times as long: it is asked for nothing that reading wants."
    from fastai.torch_core import TensorImage
    class ToImage(Callback):
        order = 9.5
        def before_batch(self): self.learn.xb = (TensorImage(self.learn.xb[0]),)
        def after_pred(self): assert type(self.learn.pred) is TensorImage
    def make(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(784, 3))
    loss = lambda p, y: F.cross_entropy(p.as_subclass(torch.Tensor), y)
    rec, _ = both(make, images(), {'1': '1'}, extra=lambda: [ToImage()], loss_func=loss)
    cb, asked = LayerStatsCallback(verbose=False), set()
    class Listening(TensorImage):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if cb._live.watcher is not None and cb._live.watcher.clock.busy: asked.add(func.__name__)
            return super().__torch_function__(func, types, args, kwargs or {})
    TensorImage = Listening
    fit(make, images(), cb, extra=lambda: [ToImage()], loss_func=loss)
    assert 'is_floating_point' in asked and not asked & {'numel', 'is_contiguous', 'is_neg', 'data_ptr', 'view', 'reshape', 'numpy', 'sum'}

class Spectral(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin, self.act, self.fft, self.top, self.head = nn.Linear(6, 8), nn.ReLU(), FFT(), Top(), nn.Linear(8, 3)
    def forward(self, x):
        h = self.act(self.lin(x))
        self.top(h)
        return self.head(torch.fft.ifft(self.fft(h)).real)
class FFT(nn.Module):
    def forward(self, x): return torch.fft.fft(x)
class Top(nn.Module):
    def forward(self, x): return x.detach().long()

def test_complex_and_integer_outputs_are_skipped_by_name():
    with pytest.warns(UserWarning, match='complex64'):
        rec, _ = both(Spectral, vectors(), dict(act='act'))
    assert layers(rec) == ['act']
    assert 'complex64' in rec.meta['not_hooked']['fft'] and 'int64' in rec.meta['not_hooked']['top']

class Poisoned(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin, self.act, self.bad, self.head, self.good = nn.Linear(6, 8), nn.ReLU(), NaNs(), nn.Linear(8, 3), nn.Tanh()
    def forward(self, x):
        h = self.act(self.lin(x))
        self.bad(h)
        return self.good(self.head(h))
class NaNs(nn.Module):
    def forward(self, x): return x * torch.tensor(float('nan'))

def test_nan_layer_is_visible():
    rec, _ = both(Poisoned, vectors(), dict(act='act', bad='bad', good='good'))
    j = layers(rec).index('bad')
    assert (rec['activation', 'frac_nonfinite'][:, j] == 1).all() and np.isnan(rec['activation', 'mean'][:, j]).all()
    assert (rec['activation', 'frac_nonfinite'][:, [0, 2]] == 0).all() and (rec.units[rec.units.layer == 'bad'].state == 'non-finite').all()

class Empties(nn.Module):
    def __init__(self): super().__init__(); self.lin, self.act, self.head, self.none = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3), nn.Sigmoid()
    def forward(self, x):
        h = self.act(self.lin(x))
        self.none(h[:0])
        return self.head(h)

def test_empty_outputs():
    rec, _ = both(Empties, vectors(), dict(act='act', none='none'))
    assert layers(rec) == ['act', 'none'] and np.isnan(rec['activation', 'mean'][:, 1]).all()

def test_batch_of_one():
    rec, rows = both(partial(net, torch.float32), lambda: loaders(5, (6,), 1), {'1': '1', '3': '3'})
    assert (rec.iters.bs == 1).all()

def test_deterministic_algorithms():
    torch.use_deterministic_algorithms(True)
    try:
        both(Functional, images(), {n: n for n in ('conv', 'bn', 'fc')})
        rec = fit(Functional, images(), LayerStatsCallback(verbose=False, sample=100, grad_output=['norm', 'hist'])).layer_stats
    finally: torch.use_deterministic_algorithms(False)
    assert np.isfinite(rec['activation', 'mean']).all()
