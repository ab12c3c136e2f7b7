"The shape of the package: who may import whom, what the star import brings, how long files are."
import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fastgradstats

ROOT    = Path(__file__).parent.parent
PACKAGE = Path(fastgradstats.__file__).parent
FILES   = sorted(PACKAGE.rglob('*.py'))

# --- the law of the rooms -------------------------------------------------------------------------------------------
# room -> the rooms that it may import, anywhere in a file (also inside a function)
LAW = dict(_text='', _images='', _on_import='', record='_text', measure='record _text', diagnosis='record _text',
           plots='record diagnosis _text',
           comparison='record diagnosis plots _text', callbacks='measure record diagnosis plots comparison _text',
           instrumentation='callbacks measure _on_import',
           lesson10='callbacks measure record diagnosis plots comparison _text _images', rules='diagnosis',
           notebooks='record diagnosis plots comparison _text _images _on_import',
           cli='notebooks lesson10 callbacks measure record diagnosis plots comparison _text')
HEAVY = {'torch', 'torchvision', 'fastai', 'fastcore', 'numba', 'accelerate'}
LIGHT = {'_text', '_images', '_on_import', 'record', 'diagnosis', 'plots', 'comparison', 'rules', 'notebooks', 'cli'}   # a record is read where torch is not

def room(path): return path.relative_to(PACKAGE).with_suffix('').parts[0]

def imports(path):
    "(modules of ours, in full, and top-level packages of others) that a file imports, also inside its functions."
    ours, others = set(), set()
    here = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*here[:len(here) - node.level + 1], *(node.module or '').split('.')]
            ours |= {'.'.join(filter(None, [*base, a.name])) for a in node.names}
        elif isinstance(node, ast.ImportFrom): others.add(node.module.split('.')[0])
        elif isinstance(node, ast.Import):     others |= {a.name.split('.')[0] for a in node.names}
    modules = {m for m in MODULES if m}
    full    = {next((c for c in (o, o.rpartition('.')[0]) if c in modules), o) for o in ours - {'__version__'}}
    return full, others

def module(path):
    parts = path.relative_to(PACKAGE).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)

MODULES = {module(f): f for f in FILES}
IMPORTS = {m: imports(f) for m, f in MODULES.items() if m}


@pytest.mark.parametrize('name', IMPORTS)
def test_a_room_imports_only_what_its_law_allows(name):
    mine = name.split('.')[0]
    assert mine in LAW, f"{mine} is no room: give it a line in the law"
    ours, others = IMPORTS[name]
    rooms = {o.split('.')[0] for o in ours} - {mine}
    assert rooms <= set(LAW[mine].split()), f"{name} imports {rooms - set(LAW[mine].split())}; {mine} may import {LAW[mine] or 'nothing of ours'}"
    assert 'fastgradstats' not in others, 'imports of the package are relative, so that this test sees them'
    if mine in LIGHT:     assert not others & HEAVY
    if mine == 'measure': assert not others & {'fastai', 'fastcore'}            # any PyTorch loop

def test_the_law_names_no_room_that_is_not_there():
    assert set(LAW) == {m.split('.')[0] for m in IMPORTS}

def test_every_folder_says_what_is_in_it_and_what_it_may_import():
    for init in PACKAGE.rglob('__init__.py'):
        doc = ast.get_docstring(ast.parse(init.read_text(encoding='utf-8')))
        assert doc and (init.parent == PACKAGE or 'mports' in doc), init

def test_there_is_no_circle_and_at_most_seven_floors_between_rooms():
    floor = {}
    def height(r, path=()):
        assert r not in path, f"a circle of imports: {' -> '.join([*path, r])}"
        if r not in floor:
            below = {o.split('.')[0] for m, (ours, _) in IMPORTS.items() if m.split('.')[0] == r for o in ours} - {r}
            floor[r] = 1 + max((height(b, (*path, r)) for b in below), default=0)
        return floor[r]
    assert max(map(height, LAW)) <= 7, floor

def test_there_is_no_circle_of_modules():
    done = set()
    def visit(m, path=()):
        assert m not in path, f"a circle of imports: {' -> '.join([*path, m])}"
        if m in done: return
        for n in IMPORTS.get(m, ((),))[0]: visit(n, (*path, m))
        done.add(m)
    for m in IMPORTS: visit(m)
    assert done >= set(IMPORTS)

def test_the_package_itself_imports_nothing_when_it_is_imported():
    ours, others = imports(PACKAGE / '__init__.py')
    assert not ours and others <= {'ast', 'importlib', 'pathlib', 'sys'}

@pytest.mark.parametrize('old,new,name', [
    ('planning', 'measure.plan', 'Plan'), ('stats', 'measure.statistics', 'Statistic'), ('callbacks', 'callbacks.presets', 'GradStatsCallback'),
    ('watchdog', 'callbacks.monitor', 'DiagnosisCallback'), ('lesson10', 'lesson10.nets', 'GeneralRelu'), ('data', 'lesson10.data', 'digits'),
    ('rules', 'diagnosis.rules', 'ALL'), ('record', 'record.record', 'Record')])
def test_what_was_pickled_or_imported_under_an_old_name_is_found(old, new, name):
    from importlib import import_module
    assert getattr(import_module(f'fastgradstats.{old}'), name) is getattr(import_module(f'fastgradstats.{new}'), name)


def python(code):
    "What a fresh interpreter prints."
    run = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()

def test_a_record_is_read_without_torch_fastai_and_numba(tmp_path):
    path = tmp_path / 'run.parquet'
    python(f'''
import pandas as pd
from fastgradstats import Record
iters = pd.DataFrame(dict(iter=range(3), fit=0, epoch=0, bs=1, loss=[3., 2., 1.], loss_constant=3., lr=.1, mom=0., grad_norm=1.,
                          clip_factor=1., stepped=True, measured=True, n_accum=1, elapsed=0.))
layers = dict(grad=pd.DataFrame(dict(layer=['0.weight'], module=['0'], type=['Linear'], shape=['2x2'], numel=[4])))
Record(iters, {{('grad', 'norm'): [[1.], [2.], [3.]]}}, layers).save({str(path)!r})
''')
    heavy = python(f'''
import sys
import fastgradstats
from fastgradstats import Record, plot_lines
rec = Record.load({str(path)!r})
repr(rec), rec.frame(), rec.join(rec)
import fastgradstats.comparison.comparison, fastgradstats.record.summary, fastgradstats.rules
print(sorted({HEAVY!r} & set(sys.modules)), rec['grad', 'norm'][:, 0].tolist())
''')
    assert heavy == '[] [1.0, 2.0, 3.0]'


# --- names -----------------------------------------------------------------------------------------------------------
COMMON = {'mean', 'std', 'min', 'max', 'norm', 'median', 'hist', 'grad', 'stats', 'data', 'load', 'save', 'run', 'plot', 'diff',
          'show', 'record', 'update', 'weight', 'input', 'output', 'layers', 'units', 'test', 'random', 'time', 'copy'}

def test_the_star_import_brings_exactly_what_is_promised():
    brought = set(python("from fastgradstats import *; print(*[n for n in dir() if not n.startswith('__')])").split())
    assert brought == set(fastgradstats.__all__)
    assert len(fastgradstats.__all__) == len(set(fastgradstats.__all__))
    assert set(fastgradstats.__all__) <= set(dir(fastgradstats))

def test_the_star_import_has_no_common_words():
    lower = {n for n in fastgradstats.__all__ if n == n.lower() and not n.startswith('plot_')}
    assert not lower & COMMON
    assert lower <= {'watch', 'compare', 'statistic', 'diagnose', 'check_init', 'instrument'}

def test_the_star_import_shadows_nothing_of_fastais():
    assert python('''
import fastgradstats
from fastai.vision.all import *
print(*sorted(set(fastgradstats.__all__) & set(dir())))''') == ''

def test_no_folder_or_file_bears_the_name_of_a_public_function():
    assert not {p for m in MODULES for p in m.split('.')} & set(fastgradstats.__all__)

def test_public_names_stay_callable_after_any_module_was_imported():
    assert python(f'''
import importlib, fastgradstats
for module in {[m for m in MODULES if m]}:
    importlib.import_module("fastgradstats." + module)
    assert all(callable(getattr(fastgradstats, name)) for name in fastgradstats.__all__), module
from fastgradstats import *
print(callable(watch))''') == 'True'

def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'fastgradstats' has no attribute 'plot_nothing'"): fastgradstats.plot_nothing


# --- files -----------------------------------------------------------------------------------------------------------
MOST_LINES, WIDTH = 450, 120

def test_no_file_of_the_package_is_too_long():
    long = {f.name: n for f in FILES if (n := len(f.read_text(encoding='utf-8').splitlines())) > MOST_LINES}
    assert not long, f"over {MOST_LINES} lines, to be split by subject: {long}"

def test_the_linter_finds_nothing():
    ruff = subprocess.run([sys.executable, '-m', 'ruff', 'check', '--no-cache', '--isolated', '--select', 'F,E501',
                           '--line-length', str(WIDTH), '--output-format', 'concise', *map(str, FILES)],
                          capture_output=True, text=True, timeout=120)
    assert ruff.returncode == 0, ruff.stdout + ruff.stderr

def test_the_linter_finds_no_error_in_tests_and_benchmarks():
    ruff = subprocess.run([sys.executable, '-m', 'ruff', 'check', '--no-cache', '--isolated', '--select', 'F', '--ignore', 'F403,F405',
                           '--output-format', 'concise', str(ROOT / 'tests'), str(ROOT / 'benchmarks')],
                          capture_output=True, text=True, timeout=120)
    assert ruff.returncode == 0, ruff.stdout + ruff.stderr
