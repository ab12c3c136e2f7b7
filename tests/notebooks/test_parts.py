"What is done to notebooks and for them, without a kernel."
import subprocess
import sys

import numpy as np
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image

from fastgradstats import _images
from fastgradstats.notebooks import changes, data_dir, source

def cells(*sources): return new_notebook(cells=[new_code_cell(s) for s in sources])


# --- values that are set ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('before, after', [
    ('bs = 64', 'bs = 8'), ('nh,bs = 50,64', 'nh,bs = 50,8'), ('%time bs = 3\nbs=64 # images', '%time bs = 3\nbs=8 # images'),
    ('bs = (\n  64)\nx = 1', 'bs = (\n  8)\nx = 1'), ("é = 'ü'; bs = 64; bs2 = bs", "é = 'ü'; bs = 8; bs2 = bs"),
    ('bs = 1\nbs = 2', 'bs = 8\nbs = 8'), ('def f(): \n    bs = 3', 'def f(): \n    bs = 8'), ('!pip x\nbs = 1', '!pip x\nbs = 8')])
def test_assignments_are_set(before, after):
    nb = cells('x == 1', before)
    source.assign(nb, {'bs': '8'})
    assert nb.cells[1].source == after and nb.cells[0].source == 'x == 1'

@pytest.mark.parametrize('text', ['bs == 1', 'f(bs=1)', 'a.bs = 1', '!bs = 1', 'if :', '# bs = 1'])
def test_what_is_no_assignment_is_not_set(text):
    nb = cells(text)
    with pytest.raises(ValueError, match='no cell assigns bs'): source.assign(nb, {'bs': '8'})
    assert nb.cells[0].source == text

@pytest.mark.parametrize('text, is_one', [('import nbdev; nbdev.nbdev_export()', True), ('!python notebook2script.py a.ipynb', True),
                                          ('!./notebook2script.py a', True), ('nb_auto_export()', False), ('print(1)', False)])
def test_cells_that_write_sources_are_known(text, is_one): assert source.exports(new_code_cell(text)) == is_one


# --- data ---------------------------------------------------------------------------------------------------------------
@pytest.fixture
def installed(tmp_path, monkeypatch):
    monkeypatch.setattr(data_dir, '_where', {})
    monkeypatch.setattr(data_dir, 'after', lambda *a: None)
    def go(given):
        data_dir.install(given, tmp_path / 'made')
        return data_dir.found
    return go

def test_digits_are_what_each_kind_of_notebook_looks_for(installed):
    import gzip, pickle
    found = installed('digits')
    (x, y), (xv, yv) = _images.shipped()
    sample = found('mnist_sample')
    assert {p.name for p in sample.iterdir()} == {'train', 'valid'} and {p.name for p in (sample / 'train').iterdir()} == {'3', '7'}
    assert len(list((sample / 'valid' / '7').iterdir())) == (yv == 7).sum()
    assert (np.asarray(Image.open(sample / 'train' / '3' / '12.png')) == x[y == 3][12]).all()
    whole = found('mnist_png')
    assert len(list(whole.glob('training/*/*.png'))) == 4000 and len(list(whole.glob('testing/*/*.png'))) == 1000
    with gzip.open(found('mnist.pkl.gz')) as f: (a, b), (c, d), _ = pickle.load(f, encoding='latin-1')
    assert a.shape == (4000, 784) and a.max() == 1 and (b == y).all() and (c * 255 == xv.reshape(1000, -1)).all() and (d == yv).all()
    assert found('mnist_sample') == sample

def test_a_folder_is_found_by_the_name_that_the_notebook_has_for_it(installed, tmp_path):
    for name in ('human_numbers', 'Imagenette2-160'): (tmp_path / 'given' / name).mkdir(parents=True)
    found = installed(tmp_path / 'given')
    assert found('human_numbers') == tmp_path / 'given' / 'human_numbers' and found('imagenette2-160').name == 'Imagenette2-160'
    with pytest.raises(FileNotFoundError, match='mnist_sample is not in --data-dir .*, which has Imagenette2-160, human_numbers'):
        found('mnist_sample')

def test_a_folder_that_is_not_there_is_said(installed):
    with pytest.raises(ValueError, match="'nowhere' is neither a folder nor 'digits'"): installed('nowhere')


# --- in a fresh interpreter ---------------------------------------------------------------------------------------------
def python(code):
    run = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()

SHIMS = 'from fastgradstats.notebooks import shims, data_dir, shorten\nshims.install()\n'

def test_a_shim_acts_only_where_it_is_needed():
    assert python(SHIMS + '''
import torch
from torch import nn
import torch.nn.functional as F
class Leaky(nn.Module):
    def forward(self, x):
        x = F.relu(x)
        x.sub_(.5)
        return x
x = torch.randn(5, requires_grad=True)
F.relu(x).sum().backward(); want = x.grad.clone(); x.grad = None
print(shims.used == set())
out = Leaky()(x); out.sum().backward()
print(torch.equal(x.grad, want), torch.equal(out, torch.relu(x) - .5), *sorted(shims.used))''') == ['True', 'True', 'True', 'relu_then_in_place']

def test_without_a_gpu_cuda_is_no_error():
    if torch.cuda.is_available(): pytest.skip('there is a GPU')
    assert python(SHIMS + '''
import torch
t, m = torch.zeros(2), torch.nn.Linear(1, 1)
torch.cuda.set_device(0)
print(t.cuda() is t, m.cuda() is m, *shims.used)''') == ['True', 'True', 'no_gpu']

def test_fastais_old_datasets_give_the_data(tmp_path):
    assert python(SHIMS + f'''
data_dir.install('digits', {str(tmp_path)!r})
from fastai import datasets
print(datasets.download_data('http://deeplearning.net/data/mnist/mnist.pkl', ext='.gz').name, *shims.used)
print(datasets.untar_data(datasets.URLs.MNIST_SAMPLE).name)''') == ['mnist.pkl.gz', 'fastai_v1_datasets', 'mnist_sample']

def test_untar_data_of_a_star_import_is_the_offline_one(tmp_path):
    assert python(SHIMS + f'''
data_dir.install('digits', {str(tmp_path)!r})
from fastai.vision.all import *
print(untar_data(URLs.MNIST).name, untar_data(URLs.MNIST_TINY).name)''') == ['mnist_png', 'mnist_tiny']

def test_loaders_give_fewer_batches_and_say_so():
    assert python(SHIMS + '''
shorten.shorten(3)
import torch
from torch.utils.data import DataLoader
from fastai.data.load import DataLoader as FDL
for dl in (DataLoader(range(100), batch_size=4), FDL(range(100), bs=4), DataLoader(range(6), batch_size=4)): print(len(dl), len(list(dl)))
''') == ['3', '3', '3', '3', '2', '2']

def test_nothing_heavy_is_imported_before_the_notebook_does():
    assert python('''
import sys, random
state = random.getstate()
from fastgradstats.notebooks import in_kernel, shims, data_dir, shorten
shims.install(); data_dir.install('digits', '.'); shorten.shorten(3)
print(not {'torch', 'fastai', 'datasets', 'matplotlib'} & set(sys.modules), random.getstate() == state)''') == ['True', 'True']


# --- what changed -------------------------------------------------------------------------------------------------------
def record(model, opt=torch.optim.SGD, n=6, bs=8, scale=1., **kw):
    from fastgradstats import watch
    torch.manual_seed(0)
    o = opt(model.parameters(), **{'lr': .1, **kw})
    with watch(model, o) as w:
        for _ in range(n):
            x = torch.randn(bs, 6) * scale
            loss = torch.nn.functional.cross_entropy(model(x), x[:, :3].argmax(1))
            w.loss(loss); loss.backward(); o.step(); o.zero_grad()
    return w.record

def net(act=torch.nn.ReLU, width=8, times=1.):
    torch.manual_seed(1)
    m = torch.nn.Sequential(torch.nn.Linear(6, width), act(), torch.nn.Linear(width, 3))
    with torch.no_grad(): m[0].weight.mul_(times); m[2].weight.mul_(times)
    return m

@pytest.mark.parametrize('made, says', [
    (lambda: record(net()),                             ['the same first weights']),
    (lambda: record(net(torch.nn.Tanh)),                ['1 ReLU → 1 Tanh', 'the same first weights']),
    (lambda: record(net(width=16)),                     ['83 → 163 weights']),
    (lambda: record(net(times=2.)),                     ['first weights 2.0 times as large']),
    (lambda: record(net(), lr=.2),                      ['SGD, lr 0.1 → SGD, lr 0.2', 'the same first weights']),
    (lambda: record(net(), torch.optim.Adam),           ['SGD, lr 0.1 → Adam, lr 0.1, momentum 0.9', 'the same first weights']),
    (lambda: record(net(), bs=16, n=9),                 ['batches of 8 → 16', 'the same first weights', '6 → 9 steps']),
    (lambda: record(net(), scale=10.),                  ["the input's std 0.97 → 9.7", 'the same first weights'])])
def test_what_changed_is_read_from_the_records(made, says):
    before = record(net())
    assert changes.changed(made(), before) == says
