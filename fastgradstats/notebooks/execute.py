"""A copy of a notebook is executed in a kernel of its own, cell by cell; what its networks did is added below the cells
that trained them. The original is not touched.

    done = execute('nbs/10_activations.ipynb', out='run-out')
    done.path, done.runs, done.failures
"""
from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ..record.record import Record
from . import index, section, source

LOST = 'the kernel died'


class Options(NamedTuple):
    "How notebooks are run."
    out:         str          = 'run-out'        # folder for the copies and the records
    every:       int          = 1                # record every so many iterations
    timeout:     float | None = None             # seconds that a cell may take
    sets:        dict         = {}               # name -> Python source that is assigned in place of the notebook's
    kernel:      str          = 'python3'
    data_dir:    str | None   = None
    html:        bool         = False
    max_batches: int | None   = None

class Ran(NamedTuple):
    "A training run that was recorded."
    record: Record
    cell:   str                   # that trained it last: 'In [8]'
    name:   str                   # the variable that holds what was trained
    search: bool                  # for a learning rate
    file:   str                   # where its record lies, seen from the copy

class Failure(NamedTuple):
    "A cell that raised what it did not raise when it was stored."
    cell: str
    says: str

class Done(NamedTuple):
    path:     Path
    runs:     list
    failures: list
    stopped:  bool                # by Ctrl-C


def execute(path, options=Options(), say=print):
    "Run one notebook or script."
    path = Path(path)
    nb   = source.read(path)
    source.assign(nb, options.sets)
    return Execution(path, nb, options, say).run()


def execute_all(paths, options=Options(), say=print):
    "Run them one after the other; each has its own folder of records, so no two of one name."
    stems = [Path(p).stem for p in paths]
    twice = next((s for s in stems if stems.count(s) > 1), None)
    if twice: raise ValueError(f"two notebooks are called {twice}: run them with an --out of their own")
    done = []
    for path in paths:
        say(f"{path}")
        done.append(execute(path, options, say))
        say(f"  {_count(done[-1].runs, 'run')} recorded, {_count(done[-1].failures, 'cell')} failed → {done[-1].path}")
        if done[-1].stopped: break
    return done

def _count(some, what): return f"{len(some)} {what}{'s' * (len(some) != 1)}"


class Execution:
    def __init__(self, path, nb, options, say):
        self.path, self.nb, self.options, self.say = path, nb, options, say
        self.out     = Path(options.out).absolute()
        self.folder  = self.out / path.stem                    # the records
        self.copy    = self.out / f'{path.stem}.ipynb'
        if self.copy.exists() and self.copy.samefile(path):
            raise ValueError(f"--out {options.out} is where {path} lies: it would be overwritten")
        self.known   = {id(c): set(source.errors(c)) for c in nb.cells}
        self.added   = {}                                      # position of a cell -> cells below it
        self.trained = {}                                      # number of a run -> Ran, as it is by now
        self.failures, self.lacking, self.shims, self.stopped = [], 0, [], False
        self.status  = ''

    @property
    def runs(self): return [*self.trained.values()]

    # --- running -----------------------------------------------------------------------------------------------------
    def run(self):
        self._fresh()
        first = _first_cell(self.options, self.folder, self.path)
        self.nb.cells.insert(0, first)
        client = self._client()
        try:
            with self._kernel(client), self._ctrl_c(client), self._progress():
                client.reset_execution_trackers()
                client.execute_cell(first, 0, store_history=False)
                client.timeout = self.options.timeout              # of the notebook's cells: ours imports torch
                if source.errors(first): raise ValueError(f"the recording did not start: {_says(first)}")
                for i, cell in enumerate(self.nb.cells):
                    if i and cell.cell_type == 'code' and not self._cell(client, i, cell): break
                client.set_widgets_metadata()
        finally:
            self.added[len(self.nb.cells) - 1] = [*self.added.get(len(self.nb.cells) - 1, []),
                                                  index.cell(self.runs, self.failures, self.lacking, self.shims)]
            self._write()
        return Done(self._html(), self.runs, self.failures, self.stopped)

    def _fresh(self):
        "Folders of our own to write to; what an earlier run left there is taken away."
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            if (self.folder / 'runs.json').exists(): shutil.rmtree(self.folder)
            self.folder.mkdir(exist_ok=True)
            (self.folder / 'runs.json').write_text('{"runs": []}')
        except OSError as e: raise OSError(f"cannot write to --out {str(self.options.out)!r}: {e.strerror or e}") from e

    def _client(self):
        from nbclient import NotebookClient
        return NotebookClient(self.nb, kernel_name=self.options.kernel, timeout=None, allow_errors=True,
                              interrupt_on_timeout=True, extra_arguments=['--log-level=40'],
                              resources={'metadata': {'path': str(self.path.parent)}})

    def _cell(self, client, i, cell):
        "Execute one cell; whether to go on."
        from nbclient.exceptions import DeadKernelError
        if source.exports(cell):
            self._add(i, section.note('Not run: this cell writes source files.'))
            return True
        self.status, began = f"cell {i} of {len(self.nb.cells) - 1}", time.time()
        try: client.execute_cell(cell, i)
        except DeadKernelError: cell.outputs.append(_died())
        self._read(i, cell, time.time() - began)
        lost = LOST in source.errors(cell)
        self._failed(cell)
        return not (lost or self.stopped)

    def _read(self, i, cell, seconds):
        "What the cell has trained, as a section below it."
        told = json.loads((self.folder / 'runs.json').read_text(encoding='utf-8'))
        self.shims = told.get('shims', [])
        if told.get('problem'): self.say(f"  {_label(cell)} a record could not be kept: {told['problem']}")
        known = {k: len(run.record) for k, run in self.trained.items()}
        fresh = [r for r in told['runs'] if r['rows'] != known.get(r['number'])]
        for r in fresh:
            run = Ran(Record.load(self.folder / r['file']), _label(cell), r['name'], r['kind'] == 'search',
                      f"{self.folder.name}/{r['file']}")
            before = next((b for k, b in reversed(self.trained.items()) if k < r['number'] and not b.search), None)
            self.trained[r['number']] = run
            self._add(i, section.cell(run, before))
            self._line(f"{run.cell:<8} {seconds:6.1f} s  {section.line(run)}")
        if fresh: self._write()

    def _failed(self, cell):
        "Name the cell if it raised what it did not raise when it was stored."
        names = source.errors(cell)
        meant = set(names) <= self.known[id(cell)] or 'raises-exception' in cell.metadata.get('tags', [])
        if not names or meant: return
        if self.failures and names == ['NameError']: self.lacking += 1; return
        self.failures.append(Failure(_label(cell), _says(cell)))
        self._line(f"{_label(cell):<8}           failed: {_says(cell)}")

    def _add(self, i, cell): self.added.setdefault(i, []).append(cell)

    # --- around it ---------------------------------------------------------------------------------------------------
    @contextmanager
    def _kernel(self, client):
        from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel
        try: client.km = client.create_kernel_manager(); client.km.kernel_spec
        except NoSuchKernel as e:
            there = ', '.join(sorted(KernelSpecManager().find_kernel_specs())) or 'none'
            raise ValueError(f"--kernel {self.options.kernel}: there is no such kernel; installed are: {there}") from e
        with client.setup_kernel(cleanup_kc=True): yield

    @contextmanager
    def _ctrl_c(self, client):
        "Ctrl-C interrupts the cell, as in a notebook; then what there is is written."
        def stop(*_):
            self.stopped = True
            os.kill(client.km.provisioner.pid, signal.SIGINT)
        if threading.current_thread() is not threading.main_thread(): yield; return
        old = signal.signal(signal.SIGINT, stop)
        try: yield
        finally: signal.signal(signal.SIGINT, old)

    @contextmanager
    def _progress(self):
        "On a terminal a line that says which cell runs, and since when."
        over, began = threading.Event(), time.time()
        def tell():
            while not over.wait(.5):
                print(f"\r{self.path.name}: {self.status}, {time.time() - began:.0f} s, {len(self.runs)} runs recorded",
                      end='\033[K', file=sys.stderr, flush=True)
            print('\r', end='\033[K', file=sys.stderr, flush=True)
        thread = threading.Thread(target=tell, daemon=True)
        if sys.stderr.isatty(): thread.start()
        try: yield
        finally:
            over.set()
            if thread.ident: thread.join()

    def _line(self, text):
        if sys.stderr.isatty(): print('\r', end='\033[K', file=sys.stderr, flush=True)
        self.say('  ' + text)

    # --- what is written ---------------------------------------------------------------------------------------------
    def _notebook(self):
        import nbformat
        nb = nbformat.from_dict({**self.nb, 'cells': [c for i, cell in enumerate(self.nb.cells)
                                                      for c in (cell, *self.added.get(i, ()))]})
        nb.nbformat, nb.nbformat_minor = 4, max(5, nb.nbformat_minor)
        for c in nb.cells: c.setdefault('id', nbformat.v4.new_code_cell().id)
        return nb

    def _write(self):
        import nbformat
        part = self.copy.with_suffix('.part')
        nbformat.write(self._notebook(), part)
        os.replace(part, self.copy)

    def _html(self):
        "The report, where one is wanted (of a script always)."
        if not (self.options.html or self.path.suffix == '.py'): return self.copy
        from nbconvert import HTMLExporter
        quiet = logging.getLogger(__name__)                    # it would warn of pictures without alternative text
        quiet.setLevel(logging.ERROR)
        path  = self.copy.with_suffix('.html')
        path.write_text(HTMLExporter(log=quiet).from_notebook_node(self._notebook())[0], encoding='utf-8')
        return path


def _first_cell(o, folder, path):
    "The cell that starts the recording; of a script also what Python gives it."
    from nbformat.v4 import new_code_cell
    data  = o.data_dir if o.data_dir in (None, 'digits') else str(Path(o.data_dir).absolute())
    given = [f"fastgradstats.instrument(every={o.every})", repr(str(folder)),
             *(f"{k}={v!r}" for k, v in dict(data_dir=data, max_batches=o.max_batches).items() if v)]
    lines = ["# added by `fastgradstats run`: every training run from here on is recorded",
             "import fastgradstats.notebooks.in_kernel",
             f"fastgradstats.notebooks.in_kernel.start({', '.join(given)})"]
    if path.suffix == '.py':
        lines.append(f"import sys; sys.argv = [{str(path)!r}]; __file__ = {str(path.absolute())!r}")
    return new_code_cell('\n'.join(lines), metadata=dict(tags=[source.OURS]))

def _died():
    from nbformat.v4 import new_output
    return new_output('error', ename=LOST, evalue='the cell was not finished', traceback=[LOST])

def _label(cell): return f"In [{cell.execution_count or ' '}]"

def _says(cell):
    "The error of a cell in a line."
    out = next(o for o in cell.outputs if o.output_type == 'error')
    return f"{out.ename}: {out.evalue}".split('\n')[0][:200]
