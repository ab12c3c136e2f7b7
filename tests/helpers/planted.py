"Records made by hand, healthy or with one planted fault; no training, no torch."
import numpy as np
import pandas as pd

from fastgradstats.record.bins import Bins
from fastgradstats.record.record import Record

_POS  = np.array([2. ** e * (1 + m / 4) for e in range(-32, 16) for m in range(4)] + [2. ** 16])
BINS  = Bins(np.concatenate([[-3.4e38], -_POS[::-1], _POS, [3.4e38]]), {0: '-inf', 194: 'zero', 388: '+inf', 389: 'nan'})
N, LAYERS = 100, 4


class Planted:
    "The arrays of a healthy record, to be changed before `record()`."
    def __init__(self, n=N, layers=LAYERS, seed=0):
        rng, t     = np.random.default_rng(seed), np.arange(n)
        self.n, self.layers = n, layers
        noise      = lambda *shape: np.exp(rng.normal(0, .05, shape))
        self.iters = dict(iter=t, fit=0, epoch=t // 20, bs=64, loss=(.3 + 2. * np.exp(-t / 25)) * noise(n), loss_constant=2.3 * noise(n) ** .2,
                          lr=.1, mom=0., grad_norm=1., clip_factor=1., grad_kept=np.where(t, 0., np.nan), stepped=True, measured=True, n_accum=1, elapsed=t * .1)
        g = .2 * np.exp(-t / 60)[:, None] * noise(n, layers)
        self.v = {('grad', 'norm'): g, ('weight', 'norm'): np.full((n, layers), 5.), ('update', 'norm'): .1 * g,
                  ('grad', 'frac_zero'): np.zeros((n, layers)), ('grad', 'mean'): rng.normal(0, 1e-3, (n, layers)), ('grad', 'frac_nonfinite'): np.zeros((n, layers)),
                  ('activation', 'std'): noise(n, layers - 1), ('activation', 'frac_nonfinite'): np.zeros((n, layers - 1)),
                  ('activation', 'frac_saturated'): np.full((n, layers - 1), .02), ('activation', 'frac_dead'): np.zeros((n // 20, layers - 1)),
                  ('input', 'mean'): np.zeros((n, 1)), ('input', 'std'): np.ones((n, 1)), ('output', 'mean'): .1 * noise(n, 1),
                  ('output', 'min'): -2 * noise(n, 1), ('output', 'max'): 2 * noise(n, 1)}
        h = np.zeros((n // 20, layers, 390))
        h[:, :, 194 + 60:194 + 110] = 10.
        self.v['grad', 'hist'] = h
        self.act, self.without = 'ReLU', ()
        names       = [f'{i}.weight' for i in range(layers)]
        self.names  = names
        self.meta   = dict(parameters=dict(frozen=[], not_in_optimizer=[], without_gradient=[]), eval_mode={}, dropout={})
        self.epochs = None

    def stay(self, since=0):
        "Nothing is learned, or what was is lost."
        self.iters['loss'] = np.where(np.arange(self.n) < since, self.iters['loss'], 2.3 + .02 * np.sin(np.arange(self.n) * 1.7))
        return self

    def validate(self, loss):
        "A validation after each 20 rows."
        self.epochs = dict(epoch=np.arange(self.n // 20), valid_loss=loss)
        return self

    def starve(self, rows=slice(None), by=1e-3):
        k = self.iters
        k['loss'] = np.array(k['loss']); k['loss'][rows] = 2.3 + .005 * np.sin(np.arange(self.n))[rows]
        self.v['grad', 'norm'][rows] *= by
        self.v['update', 'norm'][rows] *= by
        return self

    def record(self):
        names = self.names
        par   = pd.DataFrame(dict(layer=names, module=[str(i) for i in range(self.layers)], type='Linear', shape='64x64', numel=4096))
        acts  = pd.DataFrame(dict(layer=[f'{i}.act' for i in range(self.layers - 1)], module='', type=self.act, shape='64', numel=64))
        end   = lambda p: pd.DataFrame(dict(layer=[p], module='', type='float32'))
        wins  = pd.DataFrame(dict(first_iter=np.arange(0, self.n, 20), last_iter=np.arange(19, self.n, 20)))
        vals  = {k: v for k, v in self.v.items() if k not in self.without and k[0] != 'grad_output'}
        iters = {'loss_prior': self.iters['loss_constant'], **self.iters}
        iters['grad_norm'] = np.where(np.isnan(iters['loss']), np.nan, iters['grad_norm'])
        return Record(iters, vals, dict(grad=par, weight=par, update=par, activation=acts, input=end('input'), output=end('output')),
                      {k: wins for k in (('activation', 'frac_dead'), ('grad', 'hist')) if k in vals}, None, self.epochs, BINS, self.meta)


class PerCall(Planted):
    "Beside it a cell that ran 20 times, its calls kept apart."
    def __init__(self, **kw):
        super().__init__(**kw)
        self.v['grad_output', 'norm'] = np.ones((self.n, 20))
    def record(self):
        r    = super().record()
        outs = pd.DataFrame(dict(layer=[f'cell:{t}' for t in range(20)], module='cell', type='RNNCell', shape='32', numel=32))
        vals = {('grad_output', 'norm'): self.v['grad_output', 'norm']} if ('grad_output', 'norm') not in self.without else {}
        return Record(r.iters, {**{k: r[k] for k in r.keys()}, **vals}, {**r.layers, 'grad_output': outs}, r.windows, None, r.epochs, BINS,
                      {**r.meta, 'config': {'per_call': True}})


def non_finite():
    p = Planted(); p.iters['loss'][50:] = np.nan; p.v['activation', 'frac_nonfinite'][50:, 1:] = 1
    return p, '1.act', 50
def exploding():
    p = Planted(); p.iters['loss'][40:] = 50.; p.v['grad', 'norm'][40:] *= 100; p.v['grad', 'norm'][40:, 2] *= 10
    return p, '2.weight', 40
def starved():
    p = Planted().starve(); p.v['grad', 'norm'][:, 0] *= .5; return p, '0.weight', 0
def vanishing():
    p = Planted().starve(); p.v['grad', 'norm'] *= np.array([1e-6, 1e-4, 1e-2, 1.]); return p, '0.weight', 0
def fp16_underflow():
    p = Planted().starve(); p.v['grad', 'frac_zero'][:] = .8
    h = p.v['grad', 'hist']; h[:] = 0; h[:, :, 194] = 800; h[:, :, 194 + 34:194 + 50] = 20
    return p, '0.weight', 0
def vanishing_through_time():
    p = PerCall().stay()
    p.v['grad_output', 'norm'] *= .3 ** np.arange(20)[::-1]
    return p, 'cell:0', 0
def dead_units():
    p = Planted().stay(45); p.v['activation', 'frac_dead'][2:, 1] = .98; p.v['update', 'norm'][45, 1] = 2.; return p, '1.act', 45
def saturated():
    p = Planted().stay(); p.iters['loss'] = np.linspace(2.3, 2., N); p.act = 'Tanh'; p.v['activation', 'frac_saturated'][:, 2] = .8; return p, '2.act', 0
def step_too_large():
    p = Planted().stay(31); p.v['update', 'norm'][30, 3] = 20.; p.iters['loss'][31:41] = 30.; return p, '3.weight', 30
def step_too_small():
    p = Planted().stay(); p.v['update', 'norm'][:] = 5e-6; p.iters['loss'][:] = 2.3 + .004 * np.sin(np.arange(N)); return p, '', 5
def not_stepped():
    p = Planted().stay(); p.v['update', 'norm'][:, :2] = 0; return p, '0.weight', 0
def not_zeroed():
    p = Planted().stay(); p.iters['grad_kept'] = np.where(np.arange(N), 1., np.nan); return p, '', 1
def no_gradient():
    p = Planted().stay(); p.v['grad', 'norm'][:, :2] = np.nan; p.meta['parameters']['without_gradient'] = p.names[:2]; return p, '0.weight', 0
def eval_mode():
    p = Planted().stay(); p.meta['eval_mode'] = {'0': 0}; return p, '0', 0
def memorising():
    return Planted().validate(np.linspace(2.2, 4., N // 20)), '', 0
def bad_init():
    p = Planted(layers=6).starve(by=.05); p.v['activation', 'std'] *= .3 ** np.arange(5); return p, '4.act', 0
def input_scale():
    p = Planted().stay(); p.v['input', 'std'][:] = 80.; p.v['input', 'mean'][:] = 33.; return p, 'input', 0
def double_softmax():
    p = Planted().stay(); p.iters['loss'] = np.linspace(2.303, 1.7, N)
    p.v['output', 'mean'][:], p.v['output', 'min'][:], p.v['output', 'max'][:] = .1, .01, .9
    return p, '', 0
def not_learning():
    p = Planted().stay(); return p, '', None
def unstable():
    p = Planted().stay(30); p.iters['loss'][30::10] = 40.; return p, '', 30

FAULTS = {f.__name__: f for f in (non_finite, exploding, starved, vanishing, vanishing_through_time, fp16_underflow, dead_units, saturated, step_too_large, step_too_small, not_zeroed, no_gradient, eval_mode, memorising,
                                  not_stepped, bad_init, input_scale, double_softmax, not_learning, unstable)}
