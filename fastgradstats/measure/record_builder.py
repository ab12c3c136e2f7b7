"""The record builder: the rows of a run, from captured numbers to the columns of a Record.

What was captured stays where it is until `flush` brings 50 rows to the host in one copy; there the statistics are
merged and finished, histograms and the life table of the units are kept by windows.
"""
from __future__ import annotations

import math
import platform
import warnings

import numpy as np
import pandas as pd
import torch

from .. import __version__
from .probes import ENDS, OUTPUTS, PARAMETERS
from ..record.bins import BIN_EDGES, BIN_LABELS, N_BINS, Bins
from ..record.record import Record
from ..record.schema import ITER_COLS, UNSEEN
from .rows import TOLD, Windows, grow
from .statistics import unit_states

FLUSH      = 50                   # rows between two copies from the device to the host
MIN_WINDOW = 20                 # rows a window of the life table has at least: single batches overstate death 3-5 times


def _mean(values, sizes):
    "The mean of micro-batches, each by its size where sizes are known."
    if len(values) == 1: return values[0]
    n = sum(sizes)
    return sum(s / n * v if n else v / len(values) for v, s in zip(values, sizes))

def _on_device(numbers): return not set(map(type, numbers)) <= {float, int}

def _epochs(rows, more=()):
    "The [fit, epoch] of rows, after those in `more`."
    return [*more, *[list(e) for e in dict.fromkeys(tuple(r.about[:2]) for r in rows) if list(e) not in more]]


class RecordBuilder:
    "The rows of one model, the names of the places they were read at, and the Record they make."
    def __init__(self, plan):
        self.plan     = plan
        self.pending  = []
        self.chunks   = []                        # [({column of iters: [number of a row]}, {key: (row, layer)})]
        self.windows  = {(p, s.name): Windows() for p, w in plan.wanted.items() for s in w.hists}
        self.sites, self.site_list = {}, []       # key -> number; [dict about the site]
        self.ends     = {p: [] for p in ENDS}     # [(path, dtype)] of the model's inputs and outputs
        self.param_at, self.param_list = {}, []   # qualified name -> number; [dict about the parameter]
        self.order    = {}                        # module name -> number, in order of first use
        self.now, self.now_rows, self.now_iters = {}, 0, None      # the open window of the life table
        self.closed   = []                        # [(first, last, rows, {(statistic, site): partial})]
        self.rows = self.measured = 0             # how many: all, those measured
        self.epochs   = []
        self.meta     = {}
        self.ignored  = {}                        # name -> why it is not observed
        self.told     = set()
        self.spare_won = None             # whether the sites are those for models without nonlinearities; not known yet
        self.others     = set()                   # numbers of the parameters that another optimizer steps
        self.trained, self.optimized, self.received = set(), set(), set()  # that ever were, or ever had a gradient
        self.magnitudes = set()                   # numbers of the parameters whose values are complex
        self._cache   = None
        self.processes = None                     # those that train together, or None
        self.elsewhere = False                    # the record is another process'
        self.held      = []                       # rows on the host that wait for the other processes' share
        self.alone     = []                       # [[fit, epoch]] of rows that are this process' own

    # --- rows --------------------------------------------------------------------------------------------------------
    def add(self, row):
        "A finished row."
        for part in row.parts:
            if part.modes: self.note_modes(*part.modes)
        self.rows     += 1
        self.measured += row.measured
        i = row.parts[-1].last
        if row.measured and self.plan.units: self._add_units(row, i)
        self._pack(row)
        self.pending.append(row)
        if len(self.pending) >= FLUSH: self.flush()

    def end_epoch(self):
        "The epoch's training has ended: the life table may close a window."
        if self.plan.window is None and self.now_rows >= MIN_WINDOW: self._close()

    def _add_units(self, row, i):
        for part in row.parts:
            for key, s, p in part.units:
                self.now[key] = p if key not in self.now else s.merge(self.now[key], p)
            part.units = []
        self.now_rows += 1
        self.now_iters = (self.now_iters[0] if self.now_iters else i, i)
        if self.plan.window and self.now_rows >= self.plan.window: self._close()

    def _close(self):
        self.closed.append((*self.now_iters, self.now_rows, self.now))
        self.now, self.now_rows, self.now_iters = {}, 0, None

    def _pack(self, row):
        "All the 0-dim tensors of a row become one vector; their places are remembered."
        row.sig  = tuple(k for part in [*row.parts, row.own] for k in part.sig)
        told     = lambda v: math.nan if v is None else v
        row.told = [k for k, p in enumerate(row.parts) if p.loss is not None] or range(len(row.parts))
        row.flat = [row.grad_norm, row.clip,
                    *[told(getattr(p, k)) for k in TOLD for p in row.parts]]
        row.n_accum = row.n_accum or len(row.parts)
        for part in [*row.parts, row.own]:
            row.flat += part.flat
            part.n, part.flat = len(part.flat), None
        row.at   = [k for k, v in enumerate(row.flat) if isinstance(v, torch.Tensor)] if _on_device(row.flat) else []
        if row.at:
            dev     = row.flat[row.at[0]].device
            row.vec = torch.stack([row.flat[k].to(dev, torch.float64 if dev.type != 'mps' else torch.float32)
                                   for k in row.at])
            for k in row.at: row.flat[k] = math.nan

    def flush(self):
        "Bring what is pending to the host and reduce it: the only place that waits for a device."
        rows, self.pending = self.pending, []
        if not rows: return
        on_dev = [r for r in rows if r.at]
        if on_dev:
            for n in {len(r.at) for r in on_dev}:
                same = [r for r in on_dev if len(r.at) == n]
                for r, vals in zip(same, torch.stack([r.vec for r in same]).cpu().numpy()):
                    r.vec = None
                    for k, v in zip(r.at, vals): r.flat[k] = float(v)
        self._reduce_hists(rows)
        if self.processes is not None: self.held += rows
        else:                          self.chunks.append(self._reduce(rows))

    def share_with(self, processes):
        "The processes that the rows to come are captured by, or None; what still waits for others has waited in vain."
        self.settle()
        self.processes = processes
        if processes is not None: self.elsewhere = self.elsewhere or processes.rank > 0

    def settle(self, why='', merged=False):
        "The rows held back are final: merged, or this process' own. Another process than 0 forgets them."
        rows, self.held = self.held, []
        if self.processes is None or not rows and not self.processes.rank: return
        if self.processes.rank:
            for w in self.windows.values(): w.sums = [s[:0] for s in w.sums]
            self.closed, self.now = [(*c[:3], {}) for c in self.closed], {}
            return
        self.chunks.append(self._reduce(rows))
        if merged: return
        self.alone = _epochs(rows, self.alone)
        if why: self.tell(f'alone {self.alone[-1]}', f"the rows of epoch {self.alone[-1][1]} are those of process 0 "
                                                     f"alone: {why}")

    def _reduce(self, rows):
        "({column of iters: [number of a row]}, {key: (row, layer)}) of rows on the host."
        n      = len(rows)
        sizes  = {p: self.n_layers(p) for p in self.plan.stats}
        values = {(p, s.name): np.full((n, sizes[p]), np.nan, np.float32)
                  for p, w in self.plan.wanted.items() for s in w.scalars}
        iters  = {c: [] for c in ITER_COLS}
        groups = {}
        for k, r in enumerate(rows):
            groups.setdefault((r.sig, len(r.parts)), []).append(k)
            m    = len(r.parts)
            mean = lambda v: _mean([v[k] for k in r.told], [r.parts[k].bs for k in r.told])
            fit, epoch, t = r.about
            line = (r.parts[-1].last, fit, epoch, sum(p.bs for p in r.parts),
                    *[mean(r.flat[2 + k * m:2 + (k + 1) * m]) for k in range(len(TOLD))],
                    r.lrs[-1] if r.lrs else math.nan, r.mom, r.flat[0],
                    r.flat[1] if r.stepped else math.nan, r.kept,
                    r.stepped, r.measured, r.n_accum, t)
            for c, v in zip(iters, line): iters[c].append(v)
        for (sig, m), which in groups.items():
            table = np.array([rows[k].flat[2 + len(TOLD) * m:] for k in which], dtype=float)            # (row, number)
            self._reduce_group(sig, table, np.array(which), values)
        for p in {*self.plan.wanted} & {*PARAMETERS} if self.magnitudes else ():
            for s in self.plan.wanted[p].scalars:
                if s.signed: values[p, s.name][:, sorted(self.magnitudes)] = np.nan
        lrs = np.full((n, sizes.get('update', 0)), np.nan, np.float32)
        for k, r in enumerate(rows):
            for i, lr in (r.layer_lrs or {}).items(): lrs[k, i] = lr
        if 'update' in self.plan.stats: values['update', 'lr'] = lrs
        if self.plan.placebo:
            found = values['grad', 'placebo'] = np.full((n, sizes['grad']), np.nan, np.float32)
            for k, r in enumerate(rows):
                if r.placebo: found[k, r.placebo[0]] = r.placebo[1].cpu()
        return {c: np.array(v) for c, v in iters.items()}, values

    def _reduce_group(self, sig, table, which, values):
        "Merge and finish every statistic of rows that captured the same places in the same order."
        at, captures = 0, {}                                     # (probe, layer) -> offsets of its captures
        where      = {p: self.plan.wanted[p].offsets() for p in dict(sig)}
        for p, layer in sig:
            captures.setdefault(p, {}).setdefault(layer, []).append(at)
            at += self.plan.wanted[p].size
        for p, layers in captures.items():
            cols = list(layers)
            for s in self.plan.wanted[p].scalars:
                most = max(len(v) for v in layers.values())
                cur  = None
                for o in range(most):
                    sub = [j for j, c in enumerate(cols) if len(layers[c]) > o]
                    off = np.array([layers[cols[j]][o] for j in sub])
                    new = [table[:, off + k] for k in where[p][s.name]]                           # each (row, layer)
                    if cur is None: cur = [v.copy() for v in new]
                    elif s.merge is None:
                        for c in cur: c[:, sub] = np.nan
                        self.tell(f'merge {s.name}', f"{s.name!r} ({p}) has no merge and is NaN where several tensors "
                                        f"make one row: {', '.join(self.layer_name(p, cols[j]) for j in sub[:6])}")
                    else:
                        for c, v in zip(cur, s.merge(tuple(c[:, sub] for c in cur), tuple(new))): c[:, sub] = v
                with np.errstate(all='ignore'):
                    values[p, s.name][which[:, None], cols] = np.asarray(s.finish(*cur), float)

    def _reduce_hists(self, rows):
        if not self.windows: return
        for r in rows:
            sums = {}
            for part in [*r.parts, r.own]:
                for p, s, layer, counts in part.hists:
                    if isinstance(counts, torch.Tensor): counts = counts.cpu().numpy()
                    k = sums.setdefault((p, s), {})
                    k[layer] = counts if layer not in k else k[layer] + counts
            for key, by in sums.items():
                out = np.full((self.n_layers(key[0]), N_BINS), np.nan, np.float32)
                for layer, c in by.items(): out[layer] = c
                self.windows[key].add(r.parts[-1].last, out)
            for part in [*r.parts, r.own]: part.hists = []

    # --- places ------------------------------------------------------------------------------------------------------
    def add_site(self, key, kind, shape):
        "The number of a new site (name, path, after)."
        name, path, after = key
        self.sites[key] = len(self.site_list)
        self.site_list.append(dict(name=name, path=path, type=kind, after=after, shape='x'.join(map(str, shape)),
                                   numel=math.prod(shape)))
        return self.sites[key]

    def same_units(self, site, n):
        "Whether a site has as many units as ever; once it has not, it never has."
        about = self.site_list[site]
        if about.setdefault('units', n) != n and about['units']:
            about['units'] = 0
            self.now = {k: p for k, p in self.now.items() if k[1] != site}
            self.closed = [(*c[:3], {k: p for k, p in c[3].items() if k[1] != site}) for c in self.closed]
        return about['units'] == n

    def add_parameter(self, name, owner, kind, p):
        "The number of a parameter; one of another shape than that name had is another layer, `name:1`."
        shape, k = 'x'.join(map(str, p.shape)), 0
        as_named = lambda: f'{name}:{k}' if k else name
        while as_named() in self.param_at and self.param_list[self.param_at[as_named()]]['shape'] != shape: k += 1
        if as_named() not in self.param_at:
            self.param_at[as_named()] = len(self.param_list)
            self.param_list.append(dict(layer=as_named(), module=owner, type=kind, numel=p.numel(), shape=shape,
                                        ndim=p.dim()))
        return self.param_at[as_named()]

    # --- names -------------------------------------------------------------------------------------------------------
    def n_layers(self, probe):
        if probe in OUTPUTS: return len(self.site_list)
        return len(self.param_list) if probe in PARAMETERS else len(self.ends[probe])

    def site_names(self):
        many  = {}
        for s in self.site_list: many.setdefault(s['name'] + s['path'], []).append(s)
        names = []
        for s in self.site_list:
            same = many[s['name'] + s['path']]
            names.append((s['name'] or 'model') + s['path'] + (f':{same.index(s)}' if len(same) > 1 else ''))
        return names

    def layer_name(self, probe, i):
        if probe in OUTPUTS: return self.site_names()[i]
        return self.param_list[i]['layer'] if probe in PARAMETERS else probe + self.ends[probe][i][0]

    def tell(self, key, text):
        if key in self.told or self.elsewhere: return
        self.told.add(key)
        warnings.warn(f"fastgradstats: {text}", stacklevel=2)

    def note_modes(self, evaluating, dropout):
        "Which modules are in evaluation mode while the model is trained, since which row; the shares dropped."
        for n in evaluating: self.meta.setdefault('eval_mode', {}).setdefault(n, self.rows)
        if dropout: self.meta['dropout'] = dropout

    def _parameters(self):
        "What the record says of parameters of which nothing is trained, by name."
        every = {k: p['layer'] for k, p in enumerate(self.param_list)}
        names = lambda some: [every[k] for k in sorted(some)]
        return dict(frozen=names({*every} - self.trained),
                    not_in_optimizer=names(self.trained - self.optimized - self.others if self.optimized else ()),
                    without_gradient=names(self.trained - self.received if self.measured else ()))

    def take_magnitudes(self, i, p):
        "A parameter is complex: what has a sign is not measured."
        if i in self.magnitudes: return
        self.magnitudes.add(i)
        self.ignore(f"{self.param_list[i]['layer']} (what has a sign)", f'its values are {p.dtype}, of which the '
                    f'magnitudes are read'.replace('torch.', ''))

    def stepped_elsewhere(self, i):
        "A parameter that the optimizer does not have moves all the same: its update is not known here."
        if i in self.others: return
        self.others.add(i)
        self.ignore(f"{self.param_list[i]['layer']} (update)", 'another optimizer steps it')

    def no_gradient(self, i):
        "A parameter holds a zero that no backward pass has brought: it was zeroed in place, and that is no gradient."
        self.ignore(f"{self.param_list[i]['layer']} (grad)", 'in some rows no gradient came to it, only the zeros of '
                                                             'zero_grad were there')

    def failure(self, e, probe, layer, x):
        "What is raised where reading failed."
        what = f'the statistic {e.name!r}' if getattr(e, 'name', None) else 'a built-in statistic'
        why  = e.__cause__ or e
        return RuntimeError(f"{what} failed on {self.layer_name(probe, layer)!r} ({probe}, shape {tuple(x.shape)}): "
                            f"{type(why).__name__}: {why}. Training was stopped and all hooks removed")

    def ignore(self, name, why): self.ignored.setdefault(name, why)

    def tell_ignored(self):
        "Name, once, what cannot be observed, and why."
        by = {}
        for n, why in self.ignored.items():
            if n not in self.told: by.setdefault(why, []).append(n)
        self.told |= set(self.ignored)
        if by: self.tell(f'not observed {sorted(by)}', 'not observed: ' + '; '.join(
            f"{', '.join(ns[:8])}{', ...' if len(ns) > 8 else ''} ({why})" for why, ns in by.items()))

    # --- the record --------------------------------------------------------------------------------------------------
    def record(self, cost=None):
        "All rows up to now, as a Record."
        self.flush()
        stamp = (self.rows, len(self.chunks), len(self.epochs), len(self.closed), len(self.ignored))
        if self._cache is None or self._cache[0] != stamp: self._cache = stamp, self._build(cost)
        return self._cache[1]

    def _build(self, cost):
        chunks = [*self.chunks, self._reduce(self.held)] if self.held else self.chunks
        iters  = pd.DataFrame({c: np.concatenate([by[c] for by, _ in chunks]) if chunks else [] for c in ITER_COLS})
        orders = {p: self._order(p) for p in self.plan.stats}
        values, windows, units = {}, {}, {}
        for p, ss in self.plan.stats.items():
            for s in ss:
                if s.kind != 'scalar': continue
                values[p, s.name] = self._stack([v[p, s.name] for _, v in chunks], orders[p])
                if p == 'update': values[p, s.name][:, np.isin(orders[p], list(self.others))] = np.nan
            if p == 'update': values['update', 'lr'] = self._stack([v['update', 'lr'] for _, v in chunks], orders[p])
        if self.plan.placebo:
            values['grad', 'placebo'] = self._stack([v['grad', 'placebo'] for _, v in chunks], orders['grad'])
        for key, w in self.windows.items():
            n = self.n_layers(key[0])
            h = np.stack([grow(s, n) for s in w.sums]) if w.sums else np.zeros((0, n, N_BINS), np.float32)
            values[key]  = h[:, orders[key[0]]]
            windows[key] = pd.DataFrame(dict(first_iter=w.first, last_iter=w.last), dtype='int64')
        if self.plan.units: self._build_units(values, windows, units, orders['activation'])
        epochs = pd.DataFrame(self.epochs)
        return Record(iters, values,
                      {p: self._table(p).iloc[orders[p]].reset_index(drop=True) for p in self.plan.stats},
                      windows, units, epochs, Bins(BIN_EDGES, BIN_LABELS), self._meta(cost))

    def _stack(self, arrays, order):
        if not arrays: return np.zeros((0, len(order)), np.float32)
        n   = len(order)
        out = np.full((sum(len(a) for a in arrays), n), np.nan, np.float32)
        at  = 0
        for a in arrays:
            out[at:at + len(a), :a.shape[1]] = a
            at += len(a)
        return out[:, order]

    def _build_units(self, values, windows, units, order):
        wins = list(self.closed)
        if self.now_rows:
            if self.now_rows >= MIN_WINDOW or not wins: wins.append((*self.now_iters, self.now_rows, self.now))
            else:                                              # a short tail overstates death: it joins the last window
                first, _, n, by = wins[-1]
                merged = dict(by)
                for s in self.plan.units:
                    for k, p in self.now.items():
                        if k[0] == s.name: merged[k] = s.merge(merged[k], p) if k in merged else p
                wins[-1] = (first, self.now_iters[1], n + self.now_rows, merged)
        names = self.site_names()
        table = pd.DataFrame(dict(first_iter=[w[0] for w in wins], last_iter=[w[1] for w in wins]), dtype='int64')
        for s in self.plan.units:
            out = np.full((len(wins), len(order)), np.nan, np.float32)
            for k, (*_, by) in enumerate(wins):
                for j, site in enumerate(order):
                    p = by.get((s.name, site))
                    if p is None: continue
                    p = [np.asarray(t.detach().cpu() if isinstance(t, torch.Tensor) else t, float) for t in p]
                    out[k, j] = s.finish(*p)
                    if s.name != 'frac_dead': continue
                    state = unit_states(*p)
                    have  = units.setdefault(names[site], np.full((len(wins), len(state)), UNSEEN, np.int8))
                    if have.shape[1] == len(state): have[k] = state
            values['activation', s.name]  = out
            windows['activation', s.name] = table

    def _order(self, probe):
        if probe not in PARAMETERS: return list(range(self.n_layers(probe)))
        place, last = [], -1.
        for i, p in enumerate(self.param_list):
            last = self.order.get(p['module'], last)             # what never ran as a module stays by its neighbour
            place.append((last, i))
        return [i for _, i in sorted(place)]

    def _table(self, probe):
        if probe in PARAMETERS:
            return pd.DataFrame([{k: p[k] for k in ('layer', 'module', 'type', 'shape', 'numel')}
                                 for p in self.param_list],
                                columns=['layer', 'module', 'type', 'shape', 'numel'])
        if probe in OUTPUTS:
            return pd.DataFrame([dict(layer=n, module=s['name'], type=s['type'], shape=s['shape'], numel=s['numel'])
                                 for n, s in zip(self.site_names(), self.site_list)],
                                columns=['layer', 'module', 'type', 'shape', 'numel'])
        return pd.DataFrame([dict(layer=probe + path, module='', type=dtype) for path, dtype in self.ends[probe]],
                            columns=['layer', 'module', 'type'])

    def _meta(self, cost):
        if self.processes: self.meta['processes'] = dict(n=self.processes.n, alone=_epochs(self.held, self.alone))
        return {'eval_mode': {}, 'dropout': {}, **self.meta, 'parameters': self._parameters(),
                'config': self.plan.describe(), 'cost': cost,
                'not_hooked': dict(self.ignored), 'not_observed': dict(self.ignored),
                'units': {**{s.name: s.unit for ss in self.plan.stats.values() for s in ss},
                          **({'placebo': "|J'u| |w| / |u|"} if self.plan.placebo else {})},
                'versions': dict(fastgradstats=__version__, torch=torch.__version__, python=platform.python_version())}

