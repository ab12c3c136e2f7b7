"""What the added first cell starts in the kernel: after each cell the runs that it trained are written to a folder,
from which the host reads them. Nothing is displayed, no random number drawn, no name bound in the notebook."""
from __future__ import annotations

import json
import os
import warnings
from pathlib import Path


def start(
    instrument,                   # what instrument() gave
    folder,                       # where records and runs.json are written
    data_dir=None,                # where the data of old notebooks lie
    max_batches=None,             # of a pass over a loader
):
    from IPython import get_ipython
    from . import data_dir as data, shims, shorten
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings('ignore', message='fastgradstats: (?!a run is not)')      # the section says it
    shims.install()
    if data_dir:    data.install(data_dir, folder)
    if max_batches: shorten.shorten(max_batches)
    get_ipython().events.register('post_run_cell', Keeper(instrument, folder).after_cell)


class Keeper:
    "Writes what is new of `instrument.runs`."
    def __init__(self, instrument, folder):
        self.instrument, self.folder = instrument, folder
        self.kept, self.told = [], {}                       # runs in order of appearance; what runs.json says of them

    def after_cell(self, result=None):
        "Never raises: IPython would print it under the user's cell."
        note = dict(runs=[], problem=None)
        try: self.write()
        except Exception as e: note['problem'] = f"{type(e).__name__}: {e}"
        try:
            from .shims import used
            note.update(runs=list(self.told.values()), shims=sorted(used))
            _replace(self.folder / 'runs.json', json.dumps(note))
        except Exception: pass

    def write(self):
        self.kept += [r for r in self.instrument.runs if not any(r is k for k in self.kept)]
        for k, run in enumerate(self.kept):
            rec = run.record
            if k in self.told and len(rec) == self.told[k]['rows']: continue
            path = self.folder / f'run-{k:02}.parquet'
            rec.save(path)
            self.told[k] = dict(number=k, file=path.name, rows=len(rec), name=run.name, kind=run.kind,
                                optimizer=run.optimizer)

def _replace(path, text):
    part = path.with_suffix('.part')
    part.write_text(text, encoding='utf-8')
    os.replace(part, path)
