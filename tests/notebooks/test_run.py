"Notebooks executed for real, in a kernel: what was trained is found, what they print is not changed."
import json
import re
import signal
import subprocess
import sys
import time

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from fastgradstats import Record
from fastgradstats.notebooks import source
from fastgradstats.notebooks.execute import Options, execute

def notebook(*cells): return new_notebook(cells=[c if not isinstance(c, str) else new_code_cell(c) for c in cells])

def put(nb, path):
    nbformat.write(nb, path)
    return path

def ours(nb): return [c for c in nb.cells if source.OURS in c.metadata.get('tags', [])]
def theirs(nb): return [c for c in nb.cells if source.OURS not in c.metadata.get('tags', [])]

def shown(cell):
    "What a cell shows, without what no two executions have in common."
    out = []
    for o in cell.get('outputs', []):
        data = o.get('data', {})
        text = o.get('text') or data.get('text/plain') or f"{o.get('ename')}: {o.get('evalue')}"
        out.append((o.output_type, o.get('name'), re.sub(r'0x[0-9a-f]+|\d+:\d\d', '', text), data.get('image/png')))
    return out

def html(cell): return ''.join(o.data.get('text/html', '') for o in cell.outputs)

# --- every loop in one notebook ----------------------------------------------------------------------------------------
MEANT = new_code_cell("raise ValueError('on purpose')", outputs=[new_output('error', ename='ValueError', evalue='', traceback=[])])
SETUP = '''
import torch, random, os, signal, numpy as np
from torch import nn, tensor
import torch.nn.functional as F
torch.set_num_threads(1); torch.manual_seed(0); random.seed(0); np.random.seed(0)
x = torch.randn(320, 8); y = x[:, :3].argmax(1)
batches = list(zip(x.split(16), y.split(16)))
def net(act=nn.ReLU): return nn.Sequential(nn.Linear(8, 16), act(), nn.Linear(16, 3))'''
LOOPS = dict(
    setup = SETUP,
    plain = '''
model = net(); opt = torch.optim.SGD(model.parameters(), .1); losses = []
for xb, yb in batches:
    loss = F.cross_entropy(model(xb), yb)
    loss.backward(); opt.step(); opt.zero_grad()
    losses.append(loss.item())
print(losses)''',
    function = '''
def train(act, lr):
    inner = net(act); opt = torch.optim.Adam(inner.parameters(), lr)
    for xb, yb in batches:
        F.cross_entropy(inner(xb), yb).backward(); opt.step(); opt.zero_grad()
    return inner[0].weight.sum().item()
train(nn.Tanh, .01)''',
    own = '''
class BasicOptim:
    def __init__(self, params, lr): self.params, self.lr = list(params), lr
    def step(self):
        for p in self.params: p.data -= p.grad.data * self.lr
    def zero_grad(self):
        for p in self.params: p.grad = None
net2 = net(); opt = BasicOptim(net2.parameters(), .1)
for xb, yb in batches:
    F.cross_entropy(net2(xb), yb).backward(); opt.step(); opt.zero_grad()
net2[0].weight.sum().item()''',
    miniai = '''
class CancelFit(Exception): pass
class MiniLearner:
    def __init__(self, model, dl, loss_func, lr, opt_func=torch.optim.SGD, mom=None):
        self.model, self.dl, self.loss_func, self.lr, self.opt_func, self.mom = model, dl, loss_func, lr, opt_func, mom
    def one_batch(self, b):
        self.preds = self.model(b[0]); self.loss = self.loss_func(self.preds, b[1])
        self.loss.backward(); self.opt.step()
        if self.mom is None: self.opt.zero_grad()
        else:
            with torch.no_grad():
                for p in self.model.parameters(): p.grad *= self.mom
    def fit(self, n):
        self.opt = self.opt_func(self.model.parameters(), self.lr)
        for _ in range(n):
            self.model.train()
            for b in self.dl: self.one_batch(b)
            self.model.eval()
            with torch.no_grad(): self.valid = self.loss_func(self.model(x), y).item()
mini = MiniLearner(net(), batches, F.cross_entropy, .1); mini.fit(2)
mini.valid''',
    momentum = 'kept = MiniLearner(net(), batches, F.cross_entropy, .02, mom=.85); kept.fit(2); kept.valid',
    search = '''
def lr_find(model):
    opt, lr, out = torch.optim.SGD(model.parameters(), 1e-5), 1e-5, []
    for xb, yb in batches * 2:
        loss = F.cross_entropy(model(xb), yb); loss.backward(); opt.step(); opt.zero_grad()
        out.append(loss.item()); lr *= 1.4
        opt.param_groups[0]['lr'] = lr
    return out
len(lr_find(net()))''',
    own_call = '''
class SequentialModel(nn.Module):
    def __init__(self, *layers):
        super().__init__(); self.layers = nn.ModuleList(layers); self.stds = []
    def __call__(self, x):
        for l in self.layers: x = l(x); self.stds.append(x.std().item())
        return x
seq = SequentialModel(*net()); opt = torch.optim.SGD(seq.parameters(), .1)
for xb, yb in batches:
    F.cross_entropy(seq(xb), yb).backward(); opt.step(); opt.zero_grad()
len(seq.stds)''',
    two = '''
a, b = net(), net(nn.Tanh)
oa, ob = torch.optim.SGD(a.parameters(), .1), torch.optim.SGD(b.parameters(), 1.)
for m, o in ((a, oa), (b, ob)):
    for xb, yb in batches:
        F.cross_entropy(m(xb), yb).backward(); o.step(); o.zero_grad()
print(a[0].weight.sum().item(), b[0].weight.sum().item())''',
    again = '''
torch.manual_seed(1); twice = net(); opt = torch.optim.SGD(twice.parameters(), .1)
for xb, yb in batches:
    F.cross_entropy(twice(xb), yb).backward(); opt.step(); opt.zero_grad()''',
    meant = MEANT,
    fails = 'lost = not_there + 1',
    lacks = 'lost + 1',
    lacks2 = 'lost + 2',
    ctrl_c = '''
stopped = net(); opt = torch.optim.SGD(stopped.parameters(), .1)
for k, (xb, yb) in enumerate(batches):
    if k == 12: os.kill(os.getpid(), signal.SIGINT)
    F.cross_entropy(stopped(xb), yb).backward(); opt.step(); opt.zero_grad()''',
    states = 'random.random(), np.random.rand(), torch.rand(1).item()')
CELLS = {**{k: v for k, v in LOOPS.items() if k != 'again'}, 'again1': LOOPS['again'], 'again2': LOOPS['again']}
TRAIN = dict(plain=20, function=20, own=20, miniai=40, momentum=40, own_call=20, two=20, again1=20, again2=20, ctrl_c=12)


@pytest.fixture(scope='module')
def loops(tmp_path_factory):
    "(bare notebook, executed by us, what it returned, what it said, position of each cell)"
    folder = tmp_path_factory.mktemp('loops')
    path   = put(notebook(*CELLS.values()), folder / 'loops.ipynb')
    before = path.read_bytes()
    bare   = nbformat.read(path, 4)
    NotebookClient(bare, allow_errors=True, kernel_name='python3').execute()
    said = []
    done = execute(path, Options(out=folder / 'out'), said.append)
    assert path.read_bytes() == before
    return bare, nbformat.read(done.path, 4), done, said, {name: f'In [{k}]' for k, name in enumerate(CELLS, 1)}

def test_every_loop_is_recorded_and_named(loops):
    bare, nb, done, said, at = loops
    found = {}
    for r in done.runs: found.setdefault(r.cell, []).append(r)
    for name, n in TRAIN.items():
        runs = [r for r in found[at[name]] if not r.search]
        assert [len(r.record) for r in runs] == [n] * (2 if name == 'two' else 1), name
    assert [r.search for r in found[at['search']]] in ([True], [])
    assert set(found) - {at['search']} == {at[n] for n in TRAIN}
    names = {n: [r.name for r in found[at[n]]] for n in TRAIN}
    assert names['plain'] == ['model'] and names['own'] == ['net2'] and names['two'] == ['a', 'b']
    assert names['miniai'] == ['mini.model'] and names['function'] == ['inner']
    assert all(r.record.iters.loss.notna().all() for r in done.runs)

def test_what_the_cells_show_is_what_they_show_without_us(loops):
    bare, nb, *_ = loops
    assert len(theirs(nb)) == len(bare.cells)
    for a, b in zip(bare.cells, theirs(nb)):
        assert a.source == b.source and a.execution_count == b.execution_count
        assert shown(a) == shown(b)

def test_the_record_holds_what_the_loop_printed(loops):
    bare, nb, done, said, at = loops
    printed = json.loads(bare.cells[1].outputs[0].text)
    run     = next(r for r in done.runs if r.cell == at['plain'])
    np.testing.assert_allclose(run.record.iters.loss, printed, rtol=1e-6)
    again   = Record.load(done.path.parent / run.file)
    assert again == run.record

def test_a_section_stands_below_its_cell_and_its_line_loads_the_record(loops, monkeypatch):
    bare, nb, done, said, at = loops
    monkeypatch.chdir(done.path.parent)
    below = {}
    for cell in nb.cells:
        if source.OURS not in cell.metadata.get('tags', []): last = f'In [{cell.execution_count}]'
        elif cell is not nb.cells[0] and cell is not nb.cells[-1]: below.setdefault(last, []).append(cell)
    assert set(below) == {r.cell for r in done.runs}
    assert len(below[at['two']]) == 2
    section = below[at['plain']][0]
    assert 'trained <code>model</code>' in html(section) and 'Sequential: 2 Linear, 1 ReLU, 195 weights' in html(section)
    assert 'SGD, lr 0.1' in html(section) and '20 steps of 16' in html(section) and 'every step recorded' in html(section)
    assert any('image/png' in o.data for o in section.outputs)
    names = {}
    exec(section.source, names)
    assert len(names['rec']) == 20

def test_what_changed_against_the_run_before_is_said(loops):
    bare, nb, done, said, at = loops
    text = {c.source.split('what ')[1].split(' trained')[0]: html(c) for c in ours(nb)[1:-1]}
    assert f'Against {at["plain"]}' in text[at['function']] and '1 ReLU → 1 Tanh' in text[at['function']]
    assert 'the same first weights' in text[at['again2']]

def test_cells_that_fail_are_named_once_and_the_rest_is_executed(loops):
    bare, nb, done, said, at = loops
    assert [(f.cell, f.says) for f in done.failures] == [
        (at['fails'], "NameError: name 'not_there' is not defined"), (at['ctrl_c'], 'KeyboardInterrupt: ')]
    index = html(ours(nb)[-1])
    assert 'not_there' in index and '2 more lacked a name' in index and 'on purpose' not in index
    assert any('not_there' in line for line in said)

def test_the_index_has_a_row_a_run_and_compares_those_of_the_same_layers(loops):
    bare, nb, done, said, at = loops
    index = html(ours(nb)[-1])
    assert index.count('<tr') - 1 == len(done.runs)
    for r in done.runs: assert f'<td>{r.cell}</td>' in index
    assert 'compared' in index and 'Comparison of' in index

def test_run_again_on_its_own_copy_nothing_is_added_twice(loops, tmp_path):
    bare, nb, done, *_ = loops
    again = source.read(done.path)
    assert [c.source for c in again.cells] == [c.source for c in bare.cells]


# --- fastai ------------------------------------------------------------------------------------------------------------
FASTAI = ['%matplotlib inline\nfrom fastai.vision.all import *\nset_seed(0)',
          new_markdown_cell('# A Learner'), '''
x = torch.randn(256, 8); y = x[:, :3].argmax(1)
bs, lr = 16, .2
dls = DataLoaders.from_dsets(list(zip(x, y)), list(zip(x[:64], y[:64])), bs=bs)
def learner(): return Learner(dls, nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), loss_func=F.cross_entropy)''',
          'learn = learner()\nwith learn.no_bar(): learn.fit(2, lr)',
          'learn.lr_find(show_plot=False, num_it=10)\nplt.plot(learn.recorder.losses);',
          'with learn.no_bar(): learn.fit_one_cycle(1, lr)',
          'w = learn.model[0].weight.sum().item(); w, random.random(), torch.rand(1).item(), learn.summary()']

@pytest.fixture(scope='module')
def fastai(tmp_path_factory):
    folder = tmp_path_factory.mktemp('fastai')
    path   = put(notebook(*FASTAI), folder / 'learner.ipynb')
    bare   = nbformat.read(path, 4)
    NotebookClient(bare, kernel_name='python3').execute()
    return bare, execute(path, Options(out=folder / 'out', html=True), lambda s: None)

def test_fits_of_a_learner_are_recorded_and_its_outputs_are_the_same(fastai):
    bare, done = fastai
    nb = nbformat.read(done.path.with_suffix('.ipynb'), 4)
    assert not done.failures and 'In [5]' in {r.cell for r in done.runs}
    assert [len(r.record) for r in done.runs][-1] in (16, 48) and not any(r.search for r in done.runs)
    clean = lambda c: [(t, n, re.sub(r'\d+\.\d+ seconds', '', s), p) for t, n, s, p in shown(c)]
    for a, b in zip(bare.cells, theirs(nb)): assert clean(a) == clean(b)

def test_the_report_as_html_holds_the_sections_and_the_pictures(fastai):
    text = fastai[1].path.read_text(encoding='utf-8')
    assert fastai[1].path.suffix == '.html' and 'fastgradstats · In [3] trained' in text
    assert text.count('data:image/png;base64') >= 3 and 'every run of this notebook' in text

def test_values_are_set_and_passes_shortened(tmp_path):
    loop = '''
bs, lr = 16, .2
model = net(); opt = torch.optim.SGD(model.parameters(), lr)
dl = torch.utils.data.DataLoader(list(zip(x, y)), batch_size=bs)
for epoch in range(2):
    for xb, yb in dl: F.cross_entropy(model(xb), yb).backward(); opt.step(); opt.zero_grad()'''
    path = put(notebook(SETUP, loop), tmp_path / 'short.ipynb')
    done = execute(path, Options(out=tmp_path / 'out', sets={'bs': '8', 'lr': '.05'}, max_batches=5), lambda s: None)
    it   = done.runs[0].record.iters
    assert len(it) == 10 and set(it.bs) == {8} and np.allclose(it.lr, .05) and not done.failures


# --- what may go wrong -------------------------------------------------------------------------------------------------
def test_a_kernel_that_dies_leaves_what_was_before(tmp_path):
    path = put(notebook('print(1)', 'import os; os._exit(3)', 'print(2)'), tmp_path / 'dies.ipynb')
    done = execute(path, Options(out=tmp_path / 'out'), lambda s: None)
    nb   = nbformat.read(done.path, 4)
    assert [f.says for f in done.failures] == ['the kernel died: the cell was not finished']
    assert theirs(nb)[0].outputs[0].text == '1\n' and not theirs(nb)[2].outputs

def test_a_cell_that_takes_too_long_is_interrupted_and_the_next_one_runs(tmp_path):
    path = put(notebook('import time; time.sleep(60)', 'print(2)'), tmp_path / 'slow.ipynb')
    done = execute(path, Options(out=tmp_path / 'out', timeout=2), lambda s: None)
    nb   = nbformat.read(done.path, 4)
    assert len(done.failures) == 1 and done.failures[0].cell == 'In [1]' and theirs(nb)[1].outputs[0].text == '2\n'

def test_cells_that_write_sources_are_not_run(tmp_path):
    path = put(notebook("open('there', 'w').close() # nbdev_export()", '1'), tmp_path / 'exports.ipynb')
    nb   = nbformat.read(execute(path, Options(out=tmp_path / 'out'), lambda s: None).path, 4)
    assert not (tmp_path / 'there').exists() and 'writes source files' in ours(nb)[1].source

def test_the_working_directory_is_the_notebooks(tmp_path):
    (tmp_path / 'beside.py').write_text('there = 7')
    path = put(notebook('from beside import there\nprint(there)'), tmp_path / 'imports.ipynb')
    nb   = nbformat.read(execute(path, Options(out=tmp_path / 'elsewhere'), lambda s: None).path, 4)
    assert theirs(nb)[0].outputs[0].text == '7\n'

@pytest.mark.parametrize('name, options, says', [
    ('gone.ipynb', {}, 'there is no notebook'), ('x.txt', {}, 'neither a notebook'), ('broken.ipynb', {}, 'is no notebook'),
    ('good.ipynb', dict(sets={'nothing': '1'}), 'no cell assigns nothing'),
    ('good.ipynb', dict(kernel='nope'), 'there is no such kernel; installed are: '),
    ('good.ipynb', dict(out='.'), 'would be overwritten'), ('good.ipynb', dict(data_dir='gone'), 'the recording did not start')])
def test_what_cannot_be_run_is_said(name, options, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(notebook('1'), tmp_path / 'good.ipynb')
    (tmp_path / 'broken.ipynb').write_text('{"cells": 3')
    (tmp_path / 'x.txt').write_text('')
    with pytest.raises((ValueError, OSError), match=re.escape(says)): execute(name, Options(**options), lambda s: None)
    assert nbformat.read(tmp_path / 'good.ipynb', 4).cells[0].source == '1'


# --- from the command line ---------------------------------------------------------------------------------------------
CLI = [sys.executable, '-W', 'ignore', '-m', 'fastgradstats.cli', 'run']

def test_a_script_gives_its_report_as_html(tmp_path):
    last = '\nimport sys; print(sys.argv, __file__[-8:], __name__)'
    (tmp_path / 'train.py').write_text(f"{SETUP}\n# %% training\n{LOOPS['plain']}{last}")
    run = subprocess.run([*CLI, 'train.py', '-o', 'report'], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stdout + run.stderr
    text = (tmp_path / 'report' / 'train.html').read_text()
    assert 'trained <code>model</code>' in text and "train.py __main__" in text and '1 run recorded' in run.stdout
    assert len(Record.load(next((tmp_path / 'report' / 'train').glob('*.parquet')))) == 20

def test_ctrl_c_stops_the_cell_and_keeps_what_there_is(tmp_path):
    put(notebook('print(1)', "open('now', 'w').close()\nimport time; time.sleep(100)", 'print(3)'), tmp_path / 'long.ipynb')
    run = subprocess.Popen([*CLI, 'long.ipynb'], cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    end = time.time() + 120
    while not (tmp_path / 'now').exists() and time.time() < end and run.poll() is None: time.sleep(.1)
    time.sleep(.5)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 130, (out, err)
    nb = nbformat.read(tmp_path / 'run-out' / 'long.ipynb', 4)
    assert theirs(nb)[0].outputs[0].text == '1\n' and source.errors(theirs(nb)[1]) == ['KeyboardInterrupt']
    assert not theirs(nb)[2].outputs and 'Traceback' not in err

def test_a_failed_cell_is_exit_status_1(tmp_path):
    put(notebook('1/0'), tmp_path / 'fails.ipynb')
    run = subprocess.run([*CLI, 'fails.ipynb'], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert run.returncode == 1 and 'In [1]' in run.stdout and 'ZeroDivisionError' in run.stdout and run.stderr == ''
    assert (tmp_path / 'run-out' / 'fails.ipynb').exists()

def test_the_shims_are_listed_with_notebook_and_reason():
    run = subprocess.run([*CLI, '--shims'], capture_output=True, text=True, timeout=60)
    from fastgradstats.notebooks.shims import SHIMS
    assert run.returncode == 0 and len(run.stdout.splitlines()) == len(SHIMS) >= 3
    for s in SHIMS: assert s.name in run.stdout and s.reason in run.stdout and s.notebook
