"""What the processes of tests/loops/test_sharded.py run: a plain loop whose model is shared out over two processes, with `watch`
and without. `python sharded.py FOLDER` writes what each has seen: {(kind, watched): dict}, in one file a process."""
import pickle
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from fastgradstats import watch

KINDS = ['fsdp2', 'root only', 'fsdp1', 'ddp', 'ddp, one records']

def shared(kind, m):
    mesh = init_device_mesh('cpu', (2,))
    if 'ddp' in kind:   return DistributedDataParallel(m)
    if kind == 'fsdp1': return FullyShardedDataParallel(m, device_id=torch.device('cpu'), use_orig_params=True)
    for layer in (m[0], m[2]) if kind == 'fsdp2' else (): fully_shard(layer, mesh=mesh)
    return fully_shard(m, mesh=mesh)

def whole(t): return t.full_tensor() if hasattr(t, 'full_tensor') else t

def train(kind, rank, watched):
    torch.manual_seed(0)
    m   = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    net = shared(kind, m)
    o   = torch.optim.SGD(net.parameters(), .1, momentum=.9)
    g   = torch.Generator().manual_seed(1 + rank)
    saw = dict(act=[], loss=[], grad=[])
    h   = m[1].register_forward_hook(lambda mod, a, out: saw['act'].append(out.detach().clone()) and None if net.training else None)
    w   = watch(net, o, grad_output=['norm'], activation=['norm'])
    watched = watched and not ('one' in kind and rank)
    two = watch(net, o)                                                     # closed after the other, in all processes
    if watched: w.__enter__()
    if watched and kind == 'ddp': two.__enter__()
    for k in range(6):
        out  = net(torch.randn(8, 6, generator=g))
        loss = nn.functional.cross_entropy(out, torch.arange(8) % 3)
        saw['loss'].append(float(loss.detach()))
        (w.loss(loss) if watched else loss).backward()
        if k % 2 == 0: continue                                            # two passes a step
        if kind != 'fsdp1': saw['grad'].append([float(whole(p.grad).norm()) for p in m.parameters()])
        o.step(); o.zero_grad()
    if watched: w.__exit__(None, None, None)
    if watched and kind == 'ddp': two.__exit__(None, None, None)
    h.remove()
    saw['weights'] = [whole(p.detach()).clone() for p in m.parameters()]
    if watched:
        b = w.builder
        saw['record'] = None if b.elsewhere else dict(
            iters=w.record.iters, act=w.record['activation', 'norm'], grad=w.record['grad', 'norm'], missing=w.record.meta['not_observed'],
            second=two.record.iters if kind == 'ddp' else None, back=w.record['grad_output', 'norm'], alone=(w.record.meta.get('processes') or {}).get('alone'))
    return saw

def main(rank, folder):
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
    saw = {(kind, watched): train(kind, rank, watched) for kind in KINDS for watched in (False, True)}
    (Path(folder)/f'{rank}.pkl').write_bytes(pickle.dumps(saw))
    dist.barrier()
    dist.destroy_process_group()

if __name__ == '__main__': mp.start_processes(main, (sys.argv[1],), nprocs=2, start_method='fork')
