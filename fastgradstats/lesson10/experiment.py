"""The experiment of the Lesson 10 thread: "Are vanishing gradients a sign of good training?"

The net of fastai's course v3 (2019), lesson 10, trained twice on the same batches: as PyTorch initialises it, with
ReLU, and Kaiming-initialised with GeneralReLU. Everything is recorded; table, figures and answer come from the records
alone.
"""
from __future__ import annotations

import time
from pathlib import Path
from textwrap import wrap
from typing import NamedTuple

from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback                     # noqa: F401  (gives Learner its no_bar)
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from torch import nn

from . import data as datasets
from .nets import NETS
from ..callbacks.layer_stats import LayerStatsCallback
from ..comparison.comparison import compare
from ..plots import plot_overview, plot_small_gradients


# --- training --------------------------------------------------------------------------------------------------------
class Lesson10(NamedTuple):
    "What `run` returns."
    comparison: object            # Comparison of the records, None if there were none
    records: dict                 # net -> list of Records, one a seed
    files: list                   # what was written
    interrupted: bool


def learner(net, data, seed=0, bs=512, lr=.9):
    "Learner of one of `NETS`: plain SGD, batches and initial weights from the seed alone."
    set_seed(seed)
    model = NETS[net]()
    return Learner(datasets.dataloaders(data, bs, seed), model, loss_func=nn.CrossEntropyLoss(), opt_func=SGD, lr=lr,
                   wd=0., moms=(0., 0., 0.), metrics=accuracy)

def run(
    data='digits',                # 'digits', 'mnist' or a folder of IDX files
    seeds=3,                      # so many runs of each net
    iters=400,                    # iterations of a run: the first whole epoch at or past them
    lr=.9,                        # learning rate
    bs=512,                       # batch size
    every=1,                      # record every so many iterations
    out='lesson10-out',           # folder for records, figures and the CSV
    console=None,                 # rich Console to print on
):
    "Train both nets, record everything, print the table and the answer, write records and figures to `out`."
    check_numbers(seeds, iters, lr, bs, every)
    out, console = writable(out), console or Console(highlight=False)
    data   = datasets.load(data)
    its    = len(datasets.dataloaders(data, bs).train)
    epochs = -(-iters // its)
    console.print(f"{data.name}: {len(data.x_train):,} images to train, {len(data.x_valid):,} to validate. {len(NETS)} "
                  f"nets x {seeds} seed{'s' * (seeds != 1)} x {epochs * its} iterations ({epochs} epochs of {its} "
                  f"batches of {bs}), plain SGD, learning rate {lr:g}.")
    records, partial, files = {n: [] for n in NETS}, None, []
    with _Lines(console, seeds, epochs * its) as lines:
        for seed, net in ((s, n) for s in range(seeds) for n in NETS):
            learn = learner(net, data, seed, bs, lr)
            lines.start(net, seed)
            stop  = False
            try:
                with learn.no_bar(), learn.no_logging():
                    learn.fit(epochs, cbs=[LayerStatsCallback(every=every, verbose=False), _Line(lines)])
            except KeyboardInterrupt: stop = True
            rec = learn.layer_stats
            if rec is not None and len(rec):
                files.append(rec.save(out / f'{net}-seed{seed}.parquet'))
                if stop: partial = net, seed, rec
                else:    records[net].append(rec)
            if stop: break
            lines.end(net, seed)
    return report(records, partial, files, out, console, stop)


def check_numbers(seeds, iters, lr, bs, every):
    for name, v in dict(seeds=seeds, iters=iters, bs=bs, every=every).items():
        if v < 1: raise ValueError(f"--{name} must be at least 1, got {v}")
    if not 0 < lr < float('inf'): raise ValueError(f"--lr must be a positive number, got {lr:g}")

def writable(out):
    "The folder `out`, made if it is missing; an OSError in one sentence if nothing can be written there."
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / '.fastgradstats-write-test'
        probe.touch()
        probe.unlink()
    except OSError as e:
        raise OSError(f"cannot write to --out {str(out)!r} ({e.strerror}); choose a folder that may be written") from e
    return out


class _Lines:
    "A progress line per net on a terminal; elsewhere a printed line per finished run."
    def __init__(self, console, seeds, its):
        self.console, self.seeds, self.its = console, seeds, its
        self.bar  = Progress(TextColumn('{task.description}'), BarColumn(bar_width=20),
                             TextColumn('{task.fields[text]}'), console=console)
        self.task = {n: self.bar.add_task(f'{n:<{max(map(len, NETS))}}', total=seeds * its, text='') for n in NETS}
        self.spent, self.done = dict.fromkeys(NETS, 0.), dict.fromkeys(NETS, 0)
        self.live = console.is_terminal

    def __enter__(self):
        if self.live: self.bar.start()
        return self
    def __exit__(self, *_):
        if self.live: self.bar.stop()

    def start(self, net, seed):
        self.net, self.seed, self.loss, self.acc, self.t0 = net, seed, float('nan'), None, time.perf_counter()

    def step(self, loss):
        now = time.perf_counter()
        self.spent[self.net] += now - self.t0
        self.t0, self.loss = now, loss
        self.done[self.net] += 1
        self.show(advance=1)

    def show(self, advance=0):
        n    = self.net
        left = (self.seeds * self.its - self.done[n]) * self.spent[n] / max(self.done[n], 1)
        acc  = '' if self.acc is None else f'  accuracy {self.acc:.3f}'
        self.bar.update(self.task[n], advance=advance,
                        text=f'seed {self.seed + 1}/{self.seeds}  {left // 60:.0f}:{left % 60:02.0f} left  loss '
                             f'{self.loss:.4f}{acc}')

    def end(self, net, seed):
        if not self.live: self.console.print(f"  {net} seed {seed}: loss {self.loss:.4f}" +
                                             ('' if self.acc is None else f", accuracy {self.acc:.3f}"))


class _Line(Callback):
    "Tells the progress line where training is."
    order, run_valid = 80, False
    def __init__(self, lines): self.lines = lines
    def after_batch(self):     self.lines.step(self.learn.loss.item())
    def after_epoch(self):
        self.lines.acc = self.learn.recorder.values[-1][-1]
        self.lines.show()


# --- what is told ----------------------------------------------------------------------------------------------------
def report(records, partial, files, out, console, interrupted=False):
    "Compare what there is, print it, draw it. `partial`: (net, seed, Record) of the run that was stopped."
    console.print()
    whole = {n: list(r) for n, r in records.items()}
    upto  = None
    if interrupted:
        where = (f"{partial[0]} seed {partial[1]}, after {len(partial[2])} iterations" if partial else
                 "the first iteration of a run")
        console.print(f"Stopped in {where}; what was recorded is kept." if files else
                      f"Stopped in {where}; nothing was recorded yet.")
        if partial and not whole[partial[0]]:                        # this net's only record: compare as far as it goes
            whole[partial[0]] = [partial[2]]
            if all(whole.values()):
                upto = len(partial[2])
                console.print(f"Both nets are compared over these {upto} iterations.")
        elif partial: console.print("That run is saved, but not in the table and figures below.")
        console.print()
    whole = {n: r for n, r in whole.items() if r}
    if not whole: return Lesson10(None, records, files, interrupted)
    result = compare(whole, upto=upto)
    print_table(result, console)
    say(console, f"[b]Are vanishing gradients a sign of good training?[/b] {escape(result.verdict)}")
    if len(whole) > 1: say(console, f"[b]What this does not show.[/b] {escape(limits(result))}")
    files += draw(result, out)
    say(console, f"[b]Where to look.[/b] {escape(str(out / 'small_gradients.png'))}: both nets' paths through loss and "
                 f"gradient, small at the start on the left, small at the end on the right. comparison.png: all seeds "
                 f"side by side; overview-*.png: every layer of seed 0; comparison.csv: all layers, all statistics; "
                 f"*.parquet: the records, read by Record.load or pandas.")
    return Lesson10(result, records, files, interrupted)

def escape(text): return text.replace('[', r'\[')

def say(console, text): console.print(Padding(text, (0, 0, 1, 0)), width=min(console.width, 100))

def print_table(result, console):
    names = list(result.runs)
    seeds = max(len(r) for r in result.runs.values())
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), title_justify='left', title_style='bold',
                  title=f"Iterations {result.span('first')} against {result.span('last')}" +
                        (f", median \\[min, max] over {seeds} seeds" if seeds > 1 else ''))
    for head in ('', 'iters', *names): table.add_column(head, overflow='fold')
    rows, second = result.summary(), ''
    for i, (what, when, cells) in enumerate(rows):
        if what and i + 1 < len(rows) and not rows[i + 1][0]:           # a long name goes on beside the second row
            what, second = (wrap(what, 22) + [''])[:2] if console.width < 120 else (what, '')
        elif not what: what = second
        elif console.width < 120: what = '\n'.join(wrap(what, 22))
        table.add_row(escape(what), when, *(escape(cells[n]) for n in names))
    console.print(table)
    console.print()

def limits(result):
    "What the experiment leaves open, as far as it depends on what was run."
    seeds = min(len(r) for r in result.runs.values())
    few   = (f"{seeds} seed{'s' * (seeds != 1)} {'are' if seeds != 1 else 'is'} few: the spread of the default net "
             f"over seeds is wide. ") if seeds < 5 else ''
    return (f"{few}Initialisation and activation function were changed together, so it does not say which of them "
            f"helps. These are gradients of weights: gradients of biases and of layer outputs can answer differently, "
            f"the median above all. A leaky unit is never dead by construction, so no dead units in "
            f"kaiming-generalrelu is no finding. One small net, one learning rate at the edge of stability, one data "
            f"set; elasticity misleads where a loss has a floor or an offset.")

def draw(result, out):
    "Write the figures and the CSV; their paths."
    import matplotlib
    matplotlib.use('Agg') if matplotlib.get_backend().lower() != 'agg' and not _in_notebook() else None
    import matplotlib.pyplot as plt
    def keep(fig, name):
        fig.savefig(out / name, dpi=120, bbox_inches=None if fig.get_layout_engine() else 'tight')
        plt.close(fig)
        return out / name
    files = [keep(plot_small_gradients(result.runs, layer=result.layer).figure, 'small_gradients.png'),
             keep(result.plot(), 'comparison.png')]
    for net, recs in result.runs.items():
        files.append(keep(plot_overview(recs[0]).flat[0].figure, f'overview-{net}.png'))
    return [*files, result.to_csv(out / 'comparison.csv')]

def _in_notebook():
    import sys
    return 'ipykernel' in sys.modules
