"Healthy families. Each argument is a place where sick.py breaks the run; what its default does is right."
from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.optimizer import SGD
from fastai.torch_core import Module
from torch import nn

from fastgradstats import watch

from .material import Embedded, auc, characters, convs, corr, digits, lines, nearest, pole, right, unknown
from .training import Run, by_hand, dense, family, fit, loop, some

Adam, Momentum = torch.optim.Adam, partial(torch.optim.SGD, momentum=.9)


# --- tables ----------------------------------------------------------------------------------------------------------
@family
def fraud(shift=0):
    "One row of a hundred is a fraud."
    x = torch.randn(8000, 20)
    s = unknown(x)
    y = (s > s.quantile(.99)).float()
    return fit(x, y.roll(shift)[:, None], dense(20, 64, 64, 1), nn.BCEWithLogitsLoss(), 12, .003, bs=256,
               metrics=[auc])

def drawn(net, std):
    "The weights drawn anew, if there is a `std`."
    for m in net[::2] if std else (): nn.init.normal_(m.weight, std=std)
    return net

@family
def counts(reduction='mean', std=None):
    "How often something happens: a rate, and its log likelihood."
    x    = torch.randn(4000, 10)
    y    = torch.poisson((1 + .8 * unknown(x)).exp())
    net  = drawn(dense(10, 64, 64, 64, 1), std)
    rec  = by_hand(net, x, y[:, None], nn.PoissonNLLLoss(reduction=reduction), Momentum, .01)
    return Run(rec, dict(r=corr(net(x)[:, 0], y.log1p())))

def cox(p, y):
    "The partial likelihood of the order in which events came (Cox 1972); y: time, whether it was seen."
    o = y[:, 0].argsort(descending=True)
    r = p[o, 0]
    return -((r - r.logcumsumexp(0)) * y[o, 1]).sum() / y[:, 1].sum()

@family
def survival(mixed=False):
    "Who lives longer, where three of ten are lost from sight."
    x = torch.randn(4000, 12)
    h = unknown(x)
    y = torch.stack([-torch.rand(4000).log() * (-1.5 * h).exp(), (torch.rand(4000) < .7).float()], 1)
    if mixed: y = y[torch.randperm(len(y))]
    net = dense(12, 64, 64, 1)
    return Run(by_hand(net, x, y, cox, Adam, 2e-3), dict(r=corr(net(x)[:, 0], h)))

def pinball(p, y, q=(.1, .5, .9)):
    d = y - p
    return torch.maximum(d * d.new_tensor(q), d * (d.new_tensor(q) - 1)).mean()

@family
def quantiles(units=None):
    "The lower, middle and upper answer, where the noise depends on the input."
    x = torch.randn(4000, 8)
    y = unknown(x) + .5 * x[:, 0].abs() * torch.randn(4000)
    if units: x = units(x)
    return fit(x, y[:, None], dense(8, 64, 64, 3), pinball, 6, .005)

@family
def prices(scale=12., lr=.02, flat=False):
    "The targets are as they are, about fifty and far apart."
    x   = torch.randn(4000, 10)
    y   = scale * (4 + unknown(x))
    net = dense(10, 64, 64, 1)
    rec = by_hand(net, x, y if flat else y[:, None], nn.MSELoss(), Adam, lr, 400)
    return Run(rec, dict(r=corr(net(x)[:, 0], y)))

@family
def multilabel(squash=None):
    "Twelve labels, each its own question."
    x = torch.randn(3000, 16)
    y = torch.stack([(unknown(x) > .7).float() for _ in range(12)], 1)
    net = dense(16, 96, 96, 12)
    if squash: net.append(squash())
    return fit(x, y, net, nn.BCEWithLogitsLoss(), 8, .005, metrics=[auc])

@family
def memory(n=3000, epochs=4, random=0.):
    "A large net, and examples enough."
    x = torch.randn(n, 20)
    y = torch.stack([unknown(x) for _ in range(4)], 1).argmax(1)
    y = torch.where(torch.rand(n) < random, y[torch.randperm(n)], y)
    return fit(x, y, dense(20, 256, 256, 4), nn.CrossEntropyLoss(), epochs, .002, metrics=[right])


# --- words and text --------------------------------------------------------------------------------------------------
@family
def topics(squash=lambda p: p, tell=True):
    "Of which module are these lines?"
    x, y = lines()
    net  = dense(256, 64, 8)
    loss = nn.CrossEntropyLoss()
    def batch(i):
        a, b = some(64, x, y)
        p    = squash(net(a))
        return loss(p, b), p, b
    rec = loop(net, Momentum(net.parameters(), .1), 300, batch, loss_func=loss, tell=tell)
    return Run(rec, dict(accuracy=right(net(x), y)))

@family
def dropout(p=.5):
    "Half of all units are away."
    x, y = lines()
    net  = nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Dropout(p), nn.Linear(128, 128), nn.ReLU(), nn.Dropout(p),
                         nn.Linear(128, 8))
    return fit(x, y, net, nn.CrossEntropyLoss(), 8, .003, metrics=[right])

@family
def in_order(shuffle=True):
    "The rows lie sorted by class, and are shuffled."
    x, y = lines()
    n    = len(y) * 4 // 5
    k    = torch.cat([y[:n].argsort(), torch.arange(n, len(y))])
    return fit(x[k], y[k], dense(256, 64, 8), nn.CrossEntropyLoss(), 6, .1, opt=SGD, shuffle=shuffle, metrics=[right])

@family
def restarts(schedule=partial(torch.optim.lr_scheduler.CosineAnnealingWarmRestarts, T_0=60, T_mult=2)):
    "The rate falls and begins anew, batch by batch."
    x, y = lines()
    net  = dense(256, 64, 64, 8)
    opt  = Momentum(net.parameters(), .05)
    rate = schedule(opt)
    def batch(i):
        a, b = some(64, x, y)
        return F.cross_entropy(net(a), b)
    rec = loop(net, opt, 420, batch, after=lambda i: rate.step())
    return Run(rec, dict(accuracy=right(net(x), y)))

@family
def sparse_codes(first=1.):
    "Words from few units, most of them still."
    x, _ = lines()
    net  = nn.Sequential(nn.Linear(256, 96), nn.ReLU(), nn.Linear(96, 256))
    opt  = Adam(net.parameters(), .003)
    def batch(i):
        for g in opt.param_groups: g['lr'] = .003 * (first if i == 3 else 1.)
        a, = some(64, x)
        return F.binary_cross_entropy_with_logits(net(a), a)
    rec = loop(net, opt, 300, batch)
    return Run(rec, dict(bce=F.binary_cross_entropy_with_logits(net(x), x)))

@family
def one_epoch(lr=.003, seen=0):
    "The next character of Python source from the twelve before it, each seen once."
    t, n = characters()
    x, y = t[:-1].unfold(0, 12, 1), t[12:]
    if seen: x, y = x[1:], y[:-1]
    return fit(x, y, Embedded(n, 12, n), nn.CrossEntropyLoss(), 1, lr, bs=128, how='fit_one_cycle', metrics=[right])

@family
def skipgram(only=('word', 'near')):
    "Which characters stand side by side (Mikolov 2013), with sparse gradients; the loss is not told."
    t, n = characters(20_000)
    net  = nn.ModuleDict(dict(word=nn.Embedding(n, 24, sparse=True), near=nn.Embedding(n, 24, sparse=True)))
    class Pair(Module):
        def __init__(self): self.net = net
        def forward(self, a, b): return (self.net['word'](a) * self.net['near'](b)).sum(-1)
    model = Pair()
    nn.init.zeros_(net['near'].weight)
    opt   = torch.optim.SparseAdam([p for k in only for p in net[k].parameters()], .01)
    def batch(i):
        k = torch.randint(len(t) - 1, (128,))
        near, far = t[k + 1], t[torch.randint(len(t), (128, 5))]
        p = model(t[k][:, None].expand(-1, 6), torch.cat([near[:, None], far], 1))
        return F.binary_cross_entropy_with_logits(p, F.one_hot(torch.zeros(128).long(), 6).float())
    rec = loop(model, opt, 250, batch, tell=False)
    return Run(rec, dict(last=batch(0)))

class Cloze(Module):
    "A small transformer that fills gaps."
    def __init__(self, n, width=48):
        self.emb, self.place = nn.Embedding(n, width), nn.Parameter(.1 * torch.randn(16, width))
        self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(width, 4, 96, 0., batch_first=True), 1)
        self.head = nn.Linear(width, n)
    def forward(self, x): return self.head(self.body(self.emb(x) + self.place))

@family
def cloze(lr=3e-3):
    "Gaps in Python source; all that is no gap is ignored by the loss."
    t, n = characters(40_000)
    x    = t.unfold(0, 16, 12)[:3200]
    gap  = torch.rand(x.shape) < .15
    y    = torch.where(gap, x, -100)
    loss = nn.CrossEntropyLoss(ignore_index=-100)
    return fit(torch.where(gap, n, x), y, Cloze(n + 1), lambda p, y: loss(p.flatten(0, 1), y.flatten()), 6, lr, bs=64)


# --- likeness --------------------------------------------------------------------------------------------------------
def triples(x, y, n):
    "Anchors, others of the same class, and any of another one."
    k    = torch.randint(len(y), (3, 8 * n))
    keep = (y[k[0]] == y[k[1]]) & (y[k[0]] != y[k[2]])
    return x[k[:, keep][:, :n].flatten()]

@family
def triplet(lr=1e-3):
    "The same digit is nearer than another one, by a margin."
    x, y = digits()
    net  = convs(16, nn.Identity)
    def batch(i):
        return F.triplet_margin_loss(*net(triples(x, y, 48)).chunk(3), margin=1.)
    rec = loop(net, Adam(net.parameters(), lr), 200, batch)
    return Run(rec, dict(nearest=nearest(net, x, y)))

class Views(Module):
    "A body and a head that is thrown away afterwards (Chen 2020)."
    def __init__(self, cut): self.body, self.head, self.cut = convs(32), dense(32, 32, 16), cut
    def forward(self, x):
        h = self.body(x)
        return self.head(h.detach() if self.cut else h)

@family
def views(cut=False):
    "Two noisy, shifted views of an image know each other among all; no labels."
    x, y = digits()
    net  = Views(cut)
    look = lambda a: a.roll(torch.randint(-1, 2, (2,)).tolist(), (2, 3)) + .3 * torch.randn(a.shape)
    def batch(i):
        a, = some(48, x)
        z  = F.normalize(net(torch.cat([look(a), look(a)])), dim=1)
        s  = (z @ z.T / .2).fill_diagonal_(-1e4)
        return F.cross_entropy(s, torch.arange(96).roll(48))
    rec = loop(net, Adam(net.parameters(), 2e-3), 240, batch)
    return Run(rec, dict(nearest=nearest(net.body, x, y)))

class Towers(Module):
    def __init__(self): self.asked, self.answer = dense(256, 64, 32), dense(196, 64, 32)
    def forward(self, a, b): return self.asked(a) @ self.answer(b).T

@family
def towers(both=True, frozen=False):
    "Search: a question's tower and an answer's, every other answer of the batch is wrong."
    x, _ = lines()
    y    = torch.tanh(x @ torch.randn(256, 196) / 4) + .1 * torch.randn(len(x), 196)
    net  = Towers()
    net.answer.requires_grad_(not frozen)
    opt  = Adam((net if both else net.asked).parameters(), 1e-3)
    def batch(i):
        p = net(*some(64, x, y))
        return F.cross_entropy(p, torch.arange(64))
    return Run(loop(net, opt, 250, batch), dict(last=batch(0)))

@family
def ranking(sort=True):
    "Ten documents a question, in order of how well they fit (Cao 2007)."
    x = torch.randn(1500, 10, 12)
    s = unknown(x.flatten(0, 1)).view(1500, 10)
    y = (2 * (s if sort else s[torch.randperm(1500)])).softmax(1)
    def loss(p, y): return -(y * p.squeeze(-1).log_softmax(1)).sum(1).mean()
    return fit(x, y, dense(12, 64, 64, 1), loss, 10, .003, bs=40)


# --- what has no fixed target ----------------------------------------------------------------------------------------
def ring(n):
    a = torch.randint(8, (n,)) * math.pi / 4
    return torch.stack([a.cos(), a.sin()], 1) + .05 * torch.randn(n, 2)

@family
def gan(cut=False):
    "A generator against a critic that learns beside it; the loss has no way to go."
    g, d   = dense(8, 64, 64, 2), dense(2, 64, 64, 1, act=partial(nn.LeakyReLU, .2))
    og, od = (Adam(m.parameters(), lr, betas=(.5, .999)) for m, lr in ((g, 2e-3), (d, 4e-3)))
    score  = lambda x, y: F.binary_cross_entropy_with_logits(d(x), torch.full((64, 1), y))
    with watch(g, og) as w:
        for _ in range(600):
            fake = g(torch.randn(64, 8))
            od.zero_grad()
            (score(ring(64), 1.) + score(fake.detach(), 0.)).backward()
            od.step()
            og.zero_grad()
            w.loss(score(fake.detach() if cut else fake, 1.)).backward()
            og.step()
    return Run(w.record, dict(off_ring=(g(torch.randn(500, 8)).norm(dim=1) - 1).abs().mean()))

@family
def critic(lr=1e-3):
    "A critic of Lipschitz constant one by a penalty on its gradient (Gulrajani 2017): a second backward pass."
    net = dense(2, 64, 64, 1)
    def batch(i):
        a, b = ring(64), .5 * torch.randn(64, 2)
        m    = torch.lerp(a, b, torch.rand(64, 1)).requires_grad_()
        g,   = torch.autograd.grad(net(m).sum(), m, create_graph=True)
        return net(b).mean() - net(a).mean() + 10 * ((g.norm(dim=1) - 1) ** 2).mean()
    rec = loop(net, Adam(net.parameters(), lr, betas=(.5, .9)), 300, batch)
    return Run(rec, dict(distance=net(ring(900)).mean() - net(.5 * torch.randn(900, 2)).mean()))

@family
def energy():
    "An energy whose slope points back from noise (Vincent 2011)."
    net = dense(2, 96, 96, 1, act=nn.Softplus)
    def batch(i):
        z = torch.randn(128, 2)
        x = (ring(128) + .3 * z).requires_grad_()
        g, = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        return ((g - z) ** 2).mean()
    return Run(loop(net, Adam(net.parameters(), .005), 400, batch), dict(last=batch(0)))

class Fast(Module):
    "A net that can be asked with other weights than its own."
    def __init__(self): self.net = dense(1, 40, 40, 1)
    def forward(self, x, p=None):
        p = list(self.parameters()) if p is None else p
        for w, b in zip(p[:-2:2], p[1:-2:2]): x = F.linear(x, w, b).relu()
        return F.linear(x, *p[-2:])

@family
def adapted(inner=.02, lr=2e-3):
    "Few-shot regression of sines: the loss after one step of the fast weights (Finn 2017)."
    net = Fast()
    def batch(i):
        total = 0.
        for _ in range(4):
            size, at = .5 + 2 * torch.rand(()), math.pi * torch.rand(())
            x, z = 10 * torch.rand(2, 15, 1) - 5
            own  = list(net.parameters())
            g    = torch.autograd.grad(F.mse_loss(net(x), size * (x + at).sin()), own, create_graph=True)
            p    = net(z, [w - inner * d for w, d in zip(own, g)])
            total = total + F.mse_loss(p, size * (z + at).sin()) / 4
        return total
    rec = loop(net, Adam(net.parameters(), lr), 250, batch)
    return Run(rec, dict(last=torch.stack([batch(0).detach() for _ in range(30)]).mean()))

@family
def reinforce(sign=1.):
    "A policy that balances poles, by the returns of what it tried (Williams 1992)."
    net, lasted = dense(4, 32, 2), []
    def batch(i):
        s, alive, seen = .1 * torch.rand(32, 4) - .05, torch.ones(32).bool(), []
        for _ in range(80):
            with torch.no_grad(): a = (torch.rand(32) < net(s).softmax(1)[:, 1]).float()
            seen.append((s, a, alive))
            s, up = pole(s, a)
            alive = alive & up
            if not alive.any(): break
        s, a, m = map(torch.stack, zip(*seen))                                  # (time, cart)
        ret     = m.float().flip(0).cumsum(0).flip(0)
        lasted.append(float(m.sum(0).float().mean()))
        adv     = ((ret - ret[m].mean()) / ret[m].std())[m]
        logp    = net(s[m]).log_softmax(1).gather(1, a[m].long()[:, None])[:, 0]
        return -sign * (logp * adv).mean()
    rec = loop(net, Adam(net.parameters(), .01), 80, batch)
    return Run(rec, dict(lasted_first=sum(lasted[:5]) / 5, lasted=sum(lasted[-5:]) / 5))

@family
def q_learning(zero=True, tell=True):
    "The worth of moves on a line of cells, from replayed moves and a target net that lags behind (Mnih 2015)."
    net, old = dense(20, 64, 64, 2), dense(20, 64, 64, 2)
    def batch(i):
        if i % 20 == 0: old.load_state_dict(net.state_dict())
        s = torch.randint(20, (64,))
        a = torch.randint(2, (64,))
        t = (s + 2 * a - 1).clamp(0, 19)
        with torch.no_grad(): y = torch.where(t == 19, 1., .9 * old(F.one_hot(t, 20).float()).amax(1))
        q = net(F.one_hot(s, 20).float()).gather(1, a[:, None])[:, 0]
        return F.smooth_l1_loss(q, y)
    rec   = loop(net, Adam(net.parameters(), 1e-3), 400, batch, zero=zero, tell=tell)
    truth = .9 ** torch.arange(18, -1, -1.)
    return Run(rec, dict(error=(net(torch.eye(20)[:19]).amax(1) - truth).abs().mean()))


# --- pictures --------------------------------------------------------------------------------------------------------
@family
def adversary(back=True):
    "Digits pushed against the net before each step (Goodfellow 2015), made in eval mode."
    x, y = digits()
    net  = convs(10)
    def batch(i):
        a, b = some(64, x, y)
        net.eval()
        g, = torch.autograd.grad(F.cross_entropy(net(a.requires_grad_()), b), a)
        if back: net.train()
        p  = net((a + .1 * g.sign()).detach())
        return F.cross_entropy(p, b), p, b
    rec = loop(net, Momentum(net.parameters(), .02), 160, batch, loss_func=nn.CrossEntropyLoss())
    return Run(rec, dict(accuracy=right(net.eval()(x), y)))

def taught(net, x, y, n=150):
    "A net that has learned something before."
    opt = Adam(net.parameters(), 3e-3)
    for _ in range(n):
        a, b = some(64, x, y)
        opt.zero_grad()
        F.cross_entropy(net(a), b).backward()
        opt.step()
    return net

@family
def fine_tuned():
    "A net that knows five digits learns the five others: its head first, then all of it."
    x, y = digits()
    net  = taught(convs(5), x[y < 5], y[y < 5])
    net  = nn.Sequential(net[:-1], nn.Linear(512, 5))
    split = lambda m: [[*m[0].parameters()], [*m[1].parameters()]]
    return fit(x[y > 4], y[y > 4] - 5, net, nn.CrossEntropyLoss(), 4, .005, bs=32, how='fine_tune', splitter=split,
               metrics=[right])

class Evaluating(Callback):
    "A net that stays in eval mode."
    order = 90
    def before_batch(self): self.learn.model.eval()

@family
def deep(norm=True, cbs=()):
    "Ten layers with a norm each."
    x, y  = digits(True)
    block = lambda a, b: (nn.Linear(a, b), *([nn.BatchNorm1d(b)] if norm else []), nn.ReLU())
    net   = nn.Sequential(*block(196, 48), *[m for _ in range(8) for m in block(48, 48)], nn.Linear(48, 10))
    return fit(x, y, net, nn.CrossEntropyLoss(), 5, .05, opt=SGD, cbs=cbs, metrics=[right])

@family
def twos(norm=nn.LayerNorm):
    "Batches of two."
    x, y = digits(True)
    net  = nn.Sequential(nn.Linear(196, 64), norm(64), nn.ReLU(), nn.Linear(64, 64), norm(64), nn.ReLU(),
                         nn.Linear(64, 10))
    return fit(x[:1000], y[:1000], net, nn.CrossEntropyLoss(), 1, .001, bs=2, metrics=[right])

class Coder(Module):
    "An autoencoder of a code with noise."
    def __init__(self, k=8): self.enc, self.dec, self.k = dense(196, 128, 2 * k), dense(k, 128, 196), k
    def forward(self, x):
        mu, lv = self.enc(x).chunk(2, 1)
        return self.dec(mu + (lv / 2).exp() * torch.randn_like(mu)), (mu ** 2 + lv.exp() - lv - 1).sum(1).mean() / 2

@family
def annealed(beta=lambda i: min(1., i / 150)):
    "A VAE whose divergence counts for more and more: the loss rises while it learns."
    x, _ = digits(True)
    x    = (x - x.min()) / (x.max() - x.min())
    net  = Coder()
    def batch(i):
        a, = some(64, x)
        p, kl = net(a)
        return F.binary_cross_entropy_with_logits(p, a, reduction='sum') / 64 + beta(i) * kl
    rec = loop(net, Adam(net.parameters(), 2e-3), 350, batch)
    return Run(rec, dict(kl=net(x)[1], bce=F.binary_cross_entropy_with_logits(net(x)[0], x)))

@family
def denoiser(lr=1e-3):
    "The noise in a digit at any strength (Ho 2020)."
    x, _ = digits(True)
    net  = dense(197, 256, 256, 196, act=nn.SiLU)
    def batch(i):
        a, = some(64, x)
        t, e = torch.rand(64, 1), torch.randn(64, 196)
        p    = net(torch.cat([(1 - t).sqrt() * a + t.sqrt() * e, t], 1))
        return F.mse_loss(p, e), p, e
    return Run(loop(net, Adam(net.parameters(), lr), 400, batch, loss_func=nn.MSELoss()), dict(last=batch(0)[0]))

class Boxes(Module):
    def __init__(self): self.body, self.kind, self.box = convs(64)[:-1], nn.Linear(512, 10), nn.Linear(512, 2)
    def forward(self, x):
        h = self.body(x)
        return self.kind(h), self.box(h)

@family
def boxes(weight=1.):
    "Which digit, and where its middle is: two losses."
    x, y = digits()
    net  = Boxes()
    def batch(i):
        a, b = some(48, x, y)
        by   = torch.randint(-4, 5, (2,))
        a    = a.roll((int(by[0]), int(by[1])), (2, 3))
        p, c = net(a)
        loss = F.cross_entropy(p, b)
        return loss + weight * F.l1_loss(c, (by / 4.).expand(48, 2)) if weight else loss
    return Run(loop(net, Adam(net.parameters(), 2e-3), 200, batch), dict(last=batch(0)))

@family
def distilled():
    "A small net answers as a large one does, softened (Hinton 2015)."
    x, y = digits(True)
    big  = taught(dense(196, 256, 10), x, y)
    net  = dense(196, 24, 10)
    def batch(i):
        a, = some(64, x)
        with torch.no_grad(): q = (big(a) / 4).softmax(1)
        return F.kl_div((net(a) / 4).log_softmax(1), q, reduction='batchmean')
    rec = loop(net, Momentum(net.parameters(), .2), 300, batch)
    return Run(rec, dict(accuracy=right(net(x), y)))

@family
def decayed(wd=.03, opt=partial(SGD, decouple_wd=True)):
    "Strong weight decay, decoupled."
    x, y = digits(True)
    return fit(x, y, dense(196, 96, 96, 10), nn.CrossEntropyLoss(), 8, .1, opt=opt, wd=wd, metrics=[right])

# --- time ------------------------------------------------------------------------------------------------------------
class Broken(Callback):
    "An example of one batch is missing."
    order = 90
    def before_batch(self):
        if not self.training or self.train_iter != 150: return
        self.learn.xb = self.x.index_fill(0, torch.tensor([3]), math.nan),

@family
def series(cbs=()):
    "Tomorrow of noisy seasons, one-cycle; the last rates are tiny."
    t = torch.arange(3000.)
    s = (t / 7 * 2 * math.pi).sin() + .5 * (t / 30 * 2 * math.pi).sin() + .3 * torch.randn(3000)
    x, y = s[:-1].unfold(0, 40, 1)[:, None], s[40:, None]
    conv = lambda a, b, d: (nn.Conv1d(a, b, 3, dilation=d), nn.ReLU())
    net  = nn.Sequential(*conv(1, 16, 1), *conv(16, 16, 2), *conv(16, 16, 4), nn.Flatten(), nn.LazyLinear(1))
    net(x[:2])
    return fit(x, y, net, nn.MSELoss(), 6, .01, how='fit_one_cycle', cbs=cbs)

class Adding(Module):
    "The sum of two marked numbers among many (Hochreiter 1997)."
    def __init__(self, cell, std):
        self.rnn, self.head = cell(2, 48, batch_first=True), nn.Linear(48, 1)
        if std: nn.init.normal_(self.rnn.weight_hh_l0, std=std)
    def forward(self, x): return self.head(self.rnn(x)[0][:, -1])

@family
def adding(cell=nn.GRU, std=None, n=16):
    x = torch.stack([torch.rand(4000, n), torch.zeros(4000, n)], 2)
    k = torch.rand(4000, n // 2).topk(2).indices                                # both in the first half
    x[:, :, 1].scatter_(1, k, 1.)
    y = x.prod(2).sum(1, keepdim=True)
    net = Adding(cell, std)
    rec = by_hand(net, x, y, nn.MSELoss(), Adam, .01, 300)
    return Run(rec, dict(mse=F.mse_loss(net(x), y)))

@family
def physics(std=None, depth=3):
    "A pendulum's equation and start, no data: the loss has second derivatives of the net (Raissi 2019)."
    net = drawn(dense(1, *[32] * depth, 1, act=nn.Tanh), std)
    def batch(i):
        t  = (4 * torch.rand(64, 1)).requires_grad_()
        u  = net(t)
        d, = torch.autograd.grad(u.sum(), t, create_graph=True)
        a, = torch.autograd.grad(d.sum(), t, create_graph=True)
        z  = torch.zeros(1, 1, requires_grad=True)
        s, = torch.autograd.grad(net(z).sum(), z, create_graph=True)
        return ((a + u) ** 2).mean() + 5 * (net(z) - 1).pow(2).mean() + 5 * s.pow(2).mean()
    rec = loop(net, Adam(net.parameters(), .01), 400, batch)
    t   = torch.linspace(0, 4, 50)[:, None]
    return Run(rec, dict(error=(net(t) - t.cos()).abs().mean()))


# --- how the rate is chosen ------------------------------------------------------------------------------------------
@family
def range_test():
    "The rate grows until the loss no longer falls, then it ends (Smith 2017)."
    x, y = digits(True)
    net  = dense(196, 64, 64, 10)
    opt, best = torch.optim.SGD(net.parameters(), 1e-4), math.inf
    with watch(net, opt) as w:
        for i in range(400):
            opt.param_groups[0]['lr'] = 1e-4 * 1.03 ** i
            a, b = some(64, x, y)
            loss = w.loss(F.cross_entropy(net(a), b))
            opt.zero_grad()
            loss.backward()
            opt.step()
            best = min(best, float(loss))
            if float(loss) > 4 * best or opt.param_groups[0]['lr'] > .5: break
    return Run(w.record, dict(accuracy=right(net(x), y)))

@family
def polished():
    "A net that is nearly as good as it gets, some more steps at a small rate."
    x, y = digits(True)
    net  = taught(dense(196, 64, 10), x, y, 120)
    return fit(x, y, net, nn.CrossEntropyLoss(), 4, 3e-5, metrics=[right])

@family
def finished():
    "Training goes on where all is learned."
    x, y = digits(True)
    net  = taught(dense(196, 96, 10), x[:1000], y[:1000], 500)
    rec  = by_hand(net, x[:1000], y[:1000], nn.CrossEntropyLoss(), Momentum, .01, 200)
    return Run(rec, dict(accuracy=right(net(x), y)))
