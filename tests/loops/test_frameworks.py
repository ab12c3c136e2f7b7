"""Other frameworks' training loops, by the recipes of docs/loops.md: what is recorded equals a plain reading of the same training."""
import numpy as np
import pytest
import torch
from torch import nn

from fastgradstats import watch


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

def data(n=48):
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 6, generator=g), torch.randint(3, (n,), generator=g)

class Plain:
    "The same training in plain torch: per step the gradients before clipping, what moved, the loss."
    def __init__(self, model, lr=.1, clip=None, accum=1):
        self.model, self.clip, self.accum = model, clip, accum
        self.opt = torch.optim.SGD(model.parameters(), lr)
        self.grads, self.updates, self.losses = [], [], []
    def run(self, batches):
        batches = list(batches)
        for k in range(0, len(batches), self.accum):
            losses = []
            for x, y in batches[k:k + self.accum]:
                loss = nn.functional.cross_entropy(self.model(x), y)
                (loss / self.accum).backward()
                losses.append(float(loss.detach()))
            self.losses.append(np.mean(losses))
            self.grads.append({n: float(p.grad.double().norm()) for n, p in self.model.named_parameters()})
            if self.clip: nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            was = {n: p.detach().clone() for n, p in self.model.named_parameters()}
            self.opt.step()
            self.updates.append({n: float((p.detach() - was[n]).double().norm()) for n, p in self.model.named_parameters()})
            self.opt.zero_grad()
        return self

def same(rec, plain, prefix=''):
    assert len(rec) == len(plain.grads) and rec.iters.stepped.all()
    np.testing.assert_allclose(rec.iters.loss, plain.losses, rtol=1e-5)
    for probe, rows in (('grad', plain.grads), ('update', plain.updates)):
        layers = list(rec.layers[probe].layer)
        assert layers == [prefix + n for n in rows[0]]
        np.testing.assert_allclose(rec[probe, 'norm'], [list(r.values()) for r in rows], rtol=2e-4)
    assert np.isfinite(rec['activation', 'std']).all() and (rec.iters.bs == 8 * plain.accum).all()


def test_accelerate():
    from accelerate import Accelerator
    a = Accelerator(cpu=True)
    m, o = a.prepare(model := net(), torch.optim.SGD(model.parameters(), .1))
    x, y = data()
    batches = [(x[k:k + 8], y[k:k + 8]) for k in range(0, 48, 8)]
    with watch(m, o) as w:
        for x, y in batches:
            a.backward(w.loss(nn.functional.cross_entropy(m(x), y)))
            w.grads()
            a.clip_grad_norm_(m.parameters(), .05)
            o.step(); o.zero_grad()
    same(w.record, Plain(net(), clip=.05).run(batches))

def test_accelerate_with_a_scaler():
    "Its optimizer steps through a GradScaler of its own, which clips only what it has unscaled, and may skip the step."
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    Accelerator(cpu=True)
    m = net(); s = torch.amp.GradScaler('cpu', init_scale=1024.); o = torch.optim.SGD(m.parameters(), .1); a = AcceleratedOptimizer(o, scaler=s)
    x, y = data(); want = []
    with watch(m, a) as w:
        for k in range(6):
            loss = nn.functional.cross_entropy(m(x[8 * k:8 * k + 8]), y[8 * k:8 * k + 8]) * (np.inf if k == 2 else 1)
            s.scale(w.loss(loss)).backward()
            want.append(float(m[0].weight.grad.norm()) / s.get_scale())
            w.grads()
            s.unscale_(o)
            nn.utils.clip_grad_norm_(m.parameters(), .1)
            a.step()
            a.zero_grad(set_to_none=k % 2 == 0)                            # it looks at the signature of the real one
    it, ok = w.record.iters, np.arange(6) != 2
    assert it.stepped.tolist() == ok.tolist()
    np.testing.assert_allclose(w.record['grad', 'norm'][ok, 0], np.array(want)[ok], rtol=1e-5)
    np.testing.assert_allclose((it.grad_norm * it.clip_factor)[ok], .1, rtol=1e-4)
    assert (w.record['update', 'norm'][2] == 0).all() and (w.record['update', 'norm'][ok] > 0).all()

@pytest.mark.parametrize('clip', [None, .05])
def test_lightning(tmp_path, clip):
    L = pytest.importorskip('lightning')
    class Module(L.LightningModule):
        def __init__(self): super().__init__(); self.net = net()
        def forward(self, x): return self.net(x)
        def training_step(self, batch, _): return nn.functional.cross_entropy(self(batch[0]), batch[1])
        def configure_optimizers(self): return torch.optim.SGD(self.parameters(), .1)
    class LayerStats(L.Callback):
        def on_train_start(self, trainer, module):
            self.watch = watch(module, trainer.optimizers[0])
            self.watch.__enter__()
        def on_before_backward(self, trainer, module, loss): self.watch.loss(loss)
        def on_before_optimizer_step(self, trainer, module, optimizer): self.watch.grads()
        def on_train_end(self, trainer, module): self.watch.__exit__(None, None, None)
        def on_exception(self, trainer, module, error): self.watch.__exit__(type(error), error, None)
    x, y  = data()
    dl    = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
    stats = LayerStats()
    L.Trainer(max_epochs=2, accelerator='cpu', callbacks=[stats], gradient_clip_val=clip, logger=False, enable_checkpointing=False,
              enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path).fit(Module(), dl)
    same(stats.watch.record, Plain(net(), clip=clip).run([*dl, *dl]), 'net.')


@pytest.mark.parametrize('clip,accum', [(0., 1), (.05, 1), (.05, 2)])
def test_hugging_face_trainer(tmp_path, clip, accum):
    T = pytest.importorskip('transformers')
    class Model(nn.Module):
        def __init__(self): super().__init__(); self.net = net()
        def forward(self, x, labels):
            logits = self.net(x)
            return dict(loss=nn.functional.cross_entropy(logits, labels), logits=logits)
    class LayerStats(T.TrainerCallback):
        def __init__(self, trainer): self.trainer = trainer
        def on_train_begin(self, args, state, control, model=None, optimizer=None, **kw):
            self.watch = watch(model, optimizer)
            self.watch.__enter__()
            self.clip  = self.trainer.accelerator.clip_grad_norm_
            self.trainer.accelerator.clip_grad_norm_ = lambda *a, **k: (self.watch.grads(), self.clip(*a, **k))[1]
            self.hook  = model.register_forward_hook(lambda m, args, out: self.watch.loss(out['loss']) and None if m.training else None)
        def on_train_end(self, args, state, control, **kw):
            self.hook.remove()
            del self.trainer.accelerator.clip_grad_norm_
            self.watch.__exit__(None, None, None)
    x, y  = data()
    items = [dict(x=a, labels=b) for a, b in zip(x, y)]
    args  = T.TrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=8, num_train_epochs=2, learning_rate=.1, optim='sgd',
                                lr_scheduler_type='constant', max_grad_norm=clip, gradient_accumulation_steps=accum, report_to=[], use_cpu=True,
                                save_strategy='no', disable_tqdm=True, logging_strategy='no', seed=0, remove_unused_columns=False)
    class Trainer(T.Trainer):
        def _get_train_sampler(self, *a, **k): return torch.utils.data.SequentialSampler(items)
    trainer = Trainer(model=Model(), args=args, train_dataset=items)
    stats   = LayerStats(trainer)
    trainer.add_callback(stats)
    trainer.train()
    batches = [(x[k:k + 8], y[k:k + 8]) for k in range(0, 48, 8)]
    rec = stats.watch.record
    plain = Plain(net(), clip=clip, accum=accum).run(batches * 2)
    same(rec, plain, 'net.')
