"""Several processes (DistributedDataParallel): what each has captured of an epoch joins the record of process 0.

The parameters' gradients are averaged before they are read and equal everywhere; activations, output gradients, inputs,
outputs, losses, histograms and units differ. Every process keeps its rows until the epoch's training has ended
normally; then there is one gather, and the other processes' share of a row is taken like further micro-batches of it.
Nothing is waited for in a hook, nor after an exception: then process 0 has its own rows, and `meta['processes']` names
their epochs.
"""
from __future__ import annotations

import sys

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from .rows import TOLD, Part, pad
from .probes import PARAMETERS


def shared_out(model):
    "Whether a process holds but a part of some parameters of a model: sharded (FSDP of both kinds), tensor parallel."
    sharded = getattr(sys.modules.get('torch.distributed.fsdp'), 'FullyShardedDataParallel', ())
    return any(isinstance(m, sharded) for m in model.modules()) or any(hasattr(p, 'placements')
                                                                       for p in model.parameters())


class Processes:
    """The processes that train a model together. Each leaves a note where all can read it while it records, so that
    none waits for one that does not."""
    recording = {}                                # name of a group -> how many watchers of this process record in it
    def __init__(self, group):
        self.group = group
        self.rank, self.n = dist.get_rank(group), dist.get_world_size(group)

    def _note(self, rank): return f'fastgradstats/{self.group.group_name}/{rank}'

    def begin(self):
        self.recording[self.group.group_name] = self.recording.get(self.group.group_name, 0) + 1
        dist.distributed_c10d._get_default_store().set(self._note(self.rank), 'records')

    def end(self):
        self.recording[self.group.group_name] -= 1
        if self.recording[self.group.group_name] or not dist.is_initialized(): return
        dist.distributed_c10d._get_default_store().delete_key(self._note(self.rank))

    def all_record(self):
        return dist.distributed_c10d._get_default_store().check([self._note(rank) for rank in range(self.n)])

    @classmethod
    def of(cls, model):
        "Those of a model that averages its gradients over several; otherwise None."
        while not isinstance(model, DistributedDataParallel):
            model = getattr(model, '_orig_mod', None)                        # torch.compile around it
            if model is None: return None
        found = cls(model.process_group)
        return found if found.n > 1 else None

    def merge(self, builder, fired):
        """Bring the rows of the epoch together at process 0, which adds them to its record. `builder`: this process'
        RecordBuilder, `fired`: the names of the modules that ran; those of all are returned."""
        builder.flush()
        if not self.all_record():
            builder.settle('the other processes do not record')
            return fired
        got = [None] * self.n if self.rank == 0 else None
        try: dist.gather_object(_share(builder, fired), got, dist.get_global_rank(self.group, 0), self.group)
        except Exception as e:
            builder.settle(f"the other processes' share did not come ({type(e).__name__}: {e})")
            return fired
        if self.rank:
            builder.settle()
            return fired
        why = next((w for w in (_differs(builder, other) for other in got[1:]) if w), None)
        if why: builder.settle(f"{why}. The processes must measure the same rows: `every` may depend on nothing but "
                               f"the iteration")
        else:
            for other in got[1:]: _take(builder, other)
            builder.settle(merged=True)
        return set.union(*[other['fired'] for other in got])


def _share(builder, fired):
    "What process 0 needs of this one's epoch; of itself only the shape, to compare."
    share = dict(shape=_structure(builder), measured=[(r.measured, len(r.parts)) for r in builder.held], fired=fired)
    if not builder.processes.rank: return share
    sigs, rows = {}, []
    for r in builder.held:
        m, at, parts = len(r.parts), 2 + len(TOLD) * len(r.parts), []
        for k, p in enumerate(r.parts):
            numbers = np.array(r.flat[at:at + p.n], float)
            parts.append((p.bs, r.flat[2 + k:2 + len(TOLD) * m:m], sigs.setdefault(tuple(p.sig), len(sigs)), numbers))
            at += p.n
        rows.append(parts)
    windows = {key: {k: s for k, s in enumerate(w.sums) if len(s)} for key, w in builder.windows.items()
               if key[0] not in PARAMETERS}
    numpy   = lambda t: t.detach().cpu().numpy() if isinstance(t, torch.Tensor) else t
    units   = [{key: [numpy(t) for t in p] for key, p in by.items()}
               for by in [*[c[3] for c in builder.closed], builder.now]]
    sites   = [(key, builder.site_list[i]) for key, i in builder.sites.items()]
    return dict(share, rows=rows, sigs=list(sigs), sites=sites, ends=builder.ends, windows=windows, units=units)

def _structure(builder):
    "What must be alike in all processes: the windows of the histograms and of the life table."
    hists = [(key, len(w.sums), w.width, w.open) for key, w in builder.windows.items()]
    return hists, len(builder.closed), builder.now_rows

def _differs(builder, other):
    "Why another process' epoch cannot be merged with this one's; None if it can."
    mine = [(r.measured, len(r.parts)) for r in builder.held]
    n, m = len(mine), len(other['measured'])
    if n != m: return f"process 0 has {n} rows and another has {m}"
    if mine != other['measured']: return 'the processes measured different rows'
    if _structure(builder) != other['shape']: return 'the processes have been interrupted at different rows before'

def _take(builder, other):
    "Add another process' share of the epoch to the rows held here."
    site = []                                                                # theirs -> ours
    for key, about in other['sites']:
        if key not in builder.sites:
            builder.sites[key] = len(builder.site_list)
            builder.site_list.append(about)
        site.append(builder.sites[key])
    end = {p: {} for p in builder.ends}
    for p, names in other['ends'].items():
        for i, (path, dtype) in enumerate(names):
            paths = [n for n, _ in builder.ends[p]]
            if path not in paths: builder.ends[p].append((path, dtype)); paths.append(path)
            end[p][i] = paths.index(path)
    here = lambda p, k: end[p][k] if p in end else site[k]
    sigs = [[(p, here(p, k)) for p, k in sig] for sig in other['sigs']]
    for row, parts in zip(builder.held, other['rows']):
        for bs, told, s, flat in parts:
            m    = len(row.parts)
            part = Part(bs, row.parts[-1].last)
            row.parts.append(part)
            row.told = [*row.told, m]
            row.sig  = (*row.sig, *sigs[s])
            each = [row.flat[2 + k * m:2 + (k + 1) * m] for k in range(len(TOLD))]
            row.flat = [*row.flat[:2], *[x for old, new in zip(each, told) for x in (*old, new)],
                        *row.flat[2 + len(TOLD) * m:], *flat]
    for key, sums in other['windows'].items():
        w = builder.windows[key]
        for k, theirs in sums.items():
            out = np.full((builder.n_layers(key[0]), theirs.shape[1]), np.nan, np.float32)
            for i, counts in enumerate(theirs): out[here(key[0], i)] = counts
            a, b = pad(w.sums[k], out)
            w.sums[k] = np.where(np.isnan(a), b, np.where(np.isnan(b), a, a + b))
    merge = {s.name: s.merge for s in builder.plan.units}
    for mine, theirs in zip([*[by for *_, by in builder.closed], builder.now], other['units']):
        for (stat, i), p in theirs.items():
            key = stat, site[i]
            if key in mine and isinstance(mine[key][0], torch.Tensor):
                p = [torch.as_tensor(t, device=mine[key][0].device) for t in p]
            mine[key] = merge[stat](mine[key], tuple(p)) if key in mine else tuple(p)
