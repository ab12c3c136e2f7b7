"""Two real processes on gloo train through fastai's DistributedTrainer: `python distributed.py FOLDER SCENARIO...`.

Each process writes what it saw of each scenario to FOLDER/<scenario>.<rank>.pkl, process 0 the record. Started in a fresh interpreter, which forks: a spawned process would import
everything once more.
"""
import io
import os
import pickle
import random
import sys
import time
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

N, BS, WORLD = 56, 7, 2

def items():
    g = torch.Generator().manual_seed(0)
    return torch.randn(N, 1, 8, 8, generator=g), torch.randint(0, 4, (N,), generator=g)

class Net(nn.Module):
    "Convolutions without batch norm, a shared activation, a dead channel, a branch that few batches take."
    def __init__(self, branch=False):
        super().__init__()
        self.conv1, self.conv2, self.act = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3, 2), nn.ReLU()
        self.head, self.tanh, self.out = nn.Linear(24, 8), nn.Tanh(), nn.Linear(8, 4)
        self.side = nn.Linear(24, 8) if branch else None
        with torch.no_grad(): self.conv1.bias[2] = -100.
    def forward(self, x):
        x = self.act(self.conv2(self.act(self.conv1(x)))).flatten(1)
        y = self.head(x)
        if self.side is not None and self.wants(): y = y + self.side(x)
        return self.out(self.tanh(y))
    def wants(self): return torch.distributed.is_initialized() and torch.distributed.get_rank() == 1

def settings(scenario):
    "What the callback is given, the epochs, and the scenario's further callbacks."
    from fastai.callback.core import Callback
    from fastai.callback.training import GradientAccumulation
    from fastgradstats.measure.plan import DEFAULTS
    args = dict(sample=None, grad_output=['mean', 'std', 'norm', 'abs_max', 'frac_zero', 'hist'], grad_used=['norm'],
                activation=[*DEFAULTS['activation'], 'abs_mean', 'frac_saturated', own_mean()], output=['mean', 'hist'])
    class Fails(Callback):
        def after_backward(self):
            if self.epoch == 1 and self.iter == 1 and torch.distributed.get_rank() == 1: raise ValueError('this process fails')
    extra = []
    if scenario == 'every':      args['every']  = 2
    if scenario == 'function':   args['every']  = lambda i: i % 3 == 0
    if scenario == 'disagree':   args['every']  = lambda i: torch.distributed.get_rank() == 0 or i % 2 == 0
    if scenario == 'window':     args['window'] = 3
    if scenario == 'placebo':    args['placebo'] = 2
    if scenario == 'accumulate': extra = [GradientAccumulation(3 * BS * (1 if torch.distributed.is_initialized() else WORLD))]
    if scenario == 'fails':      extra = [Fails()]
    return args, 2, extra

def own_mean():
    from fastgradstats import statistic
    return statistic(lambda x: (x.sum(), torch.tensor(float(x.numel()))), name='own_mean',
                     merge=lambda a, b: (a[0] + b[0], a[1] + b[1]), finish=lambda s, n: s / n)

def learner(dls, scenario, cbs):
    from fastai.learner import Learner
    from fastai.optimizer import SGD
    torch.manual_seed(0); np.random.seed(0); random.seed(0)
    learn = Learner(dls, Net(branch=scenario == 'branch'), loss_func=F.cross_entropy, opt_func=SGD, lr=.1, cbs=cbs)
    learn.remove_cbs([cb for cb in learn.cbs if type(cb).__name__ == 'ProgressCallback'])
    learn.logger = lambda o: None
    return learn

def loaders(x, y, bs):
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    make = lambda: DataLoader(list(zip(x, y)), bs=bs, num_workers=0)
    return DataLoaders(make(), make(), device='cpu')

def single(scenario):
    "One process on the same batches: those of both processes together."
    from fastgradstats import LayerStatsCallback
    x, y  = items()
    order = torch.arange(N).view(WORLD, -1, BS).transpose(0, 1).reshape(-1)
    args, epochs, extra = settings(scenario)
    learn = learner(loaders(x[order], y[order], BS * WORLD), scenario, [*extra, LayerStatsCallback(verbose=False, **args)])
    learn.fit(epochs)
    return learn.layer_stats, {k: v.numpy() for k, v in learn.model.state_dict().items()}

def process(rank, folder, scenarios):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR='127.0.0.1', MASTER_PORT='0')
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=WORLD)
    import fastai.distributed as fd
    def broadcast(self, t, rank):                                           # fastai's needs a GPU
        t = torch.as_tensor(t)
        torch.distributed.broadcast(t, rank)
        return t.tolist()
    fd.DistributedDL._broadcast = broadcast
    for scenario in scenarios: run(rank, Path(folder), scenario)
    torch.distributed.destroy_process_group()

def run(rank, folder, scenario):
    import fastai.distributed as fd
    from fastgradstats import LayerStatsCallback
    args, epochs, extra = settings(scenario)
    cb    = LayerStatsCallback(**args)
    learn = learner(loaders(*items(), BS), scenario, [*extra, cb])
    kw    = dict(sync_bn=False, cpu=True)
    if scenario == 'branch':
        from accelerate import DistributedDataParallelKwargs
        kw['kwargs_handlers'] = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    learn.add_cb(fd.DistributedTrainer(**kw))
    saw, out, middle = dict(error=None), io.StringIO(), []
    if scenario == 'middle':
        from fastai.callback.core import Callback
        class Looks(Callback):
            order = 100
            def after_batch(self):
                if self.training: middle.append(None if self.learn.layer_stats is None else
                                                (len(self.learn.layer_stats.iters), self.learn.layer_stats.meta['processes']))
        learn.add_cb(Looks())
    with warnings.catch_warnings(record=True) as told, redirect_stdout(out), redirect_stderr(io.StringIO()):
        warnings.simplefilter('always')
        t = time.perf_counter()
        try: learn.fit(epochs)
        except Exception as e: saw['error'] = f'{type(e).__name__}: {e}'
        saw['seconds'] = time.perf_counter() - t
    rec = learn.layer_stats
    if rec is not None: rec.save(folder/f'{scenario}.parquet')
    try: cb.record; saw['refused'] = None
    except ValueError as e: saw['refused'] = str(e)
    model = learn.model.module if hasattr(learn.model, 'module') else learn.model
    saw.update(none=rec is None, printed=out.getvalue(), told=[str(w.message) for w in told if 'fastgradstats' in str(w.message)],
               middle=middle, weights={k: v.numpy() for k, v in model.state_dict().items()},
               hooks=sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()))
    with open(folder/f'{scenario}.{rank}.pkl', 'wb') as f: pickle.dump(saw, f)
    if saw['error']: os._exit(1)                                            # as a script that fails would

if __name__ == '__main__':
    torch.set_num_threads(1)
    import torch.multiprocessing as mp
    import accelerate, fastai.distributed, torch._dynamo, torch.distributed.fsdp        # noqa: F401 before the fork, once
    from fastgradstats.measure.readers.cpu import warm_up
    warm_up()
    context = mp.start_processes(process, args=(sys.argv[1], sys.argv[2:]), nprocs=WORLD, start_method='fork', join=False)
    for p in context.processes: p.join()
