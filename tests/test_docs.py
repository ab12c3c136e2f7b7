"README.md, CONTRIBUTING.md and docs/: built as a site, their code run, what they say of names, columns and tests."
import inspect
import re
import subprocess
import sys
import warnings
from functools import partial
from importlib import import_module
from pathlib import Path
from textwrap import dedent

import fastai.vision.all
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner
from fastai.vision.learner import vision_learner
from torch import nn
from torchvision.models import resnet18

import fastgradstats
from fastgradstats import (ActivationHistCallback, DeadUnitCallback, DiagnosisCallback, GradStatsCallback,
                           LayerStatsCallback, diagnose)
from fastgradstats.diagnosis.evidence import run
from fastgradstats.measure.probes import PROBES
from fastgradstats.measure.statistics import STATISTICS
from fastgradstats.record.schema import DERIVED, ITER_COLS
from fastgradstats.rules import ALL
from reference import learner, loaders, mlp

ROOT  = Path(__file__).parent.parent
PAGES = {p.relative_to(ROOT).as_posix(): p.read_text(encoding='utf-8')
         for p in (ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md')))}
README, PUBLIC = PAGES['README.md'], fastgradstats.__all__


# --- the code in them ------------------------------------------------------------------------------------------------
def images():
    dls   = loaders(8, (3, 32, 32), bs=4, n_valid=4)
    dls.c = 3
    return dls

VISION = dict(pretrained=False, normalize=False, n_out=3, loss_func=nn.CrossEntropyLoss())

@pytest.fixture
def world(tmp_path, monkeypatch):
    "The names that the examples take for granted, in an empty folder, with nothing to download."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fastai.vision.all, 'vision_learner', partial(vision_learner, **VISION))
    learn = learner('cnn', n=64)
    learn.fit(3, cbs=LayerStatsCallback(verbose=False))
    model = mlp()
    names = {n: getattr(fastgradstats, n) for n in PUBLIC}
    recs  = {f'rec{k}': learn.layer_stats for k in range(4)}
    yield dict(names, **recs, torch=torch, learn=learn, rec=learn.layer_stats, dls=images(), model=model,
               loss_func=nn.CrossEntropyLoss(), opt=torch.optim.SGD(model.parameters(), .1),
               batches=[(torch.randn(8, 6), torch.arange(8) % 3)] * 6)
    plt.close('all')

def blocks(page): return re.findall(r'^```python\n(.*?)^```', PAGES[page], re.M | re.S)

def play(sources, names, where):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for i, source in enumerate(sources): exec(compile(source, f'{where}, example {i + 1}', 'exec'), names)
    return names

@pytest.mark.parametrize('page', [p for p in PAGES if blocks(p)])
def test_examples_run(page, world): play(blocks(page), world, page)

def test_the_recipes_of_contributing_add_what_they_say(world):
    w   = play(blocks('CONTRIBUTING.md'), world, 'CONTRIBUTING.md')
    rec = w['learn'].layer_stats
    peaks = rec['grad', 'peak'][-1]
    assert np.isfinite(peaks).all() and (peaks >= 1).all() and rec.meta['units']['peak'] == 'ratio'
    report = diagnose(rec, rules=[*ALL, w['heavy']])
    found  = [f for f in report.findings if f.rule == 'heavy']
    norms  = rec['weight', 'norm'][-1]
    assert len(found) == 1 and found[0].layer == rec.layers['weight'].layer[norms.argmax()]
    assert found[0].value == pytest.approx(norms.max())
    assert 'heavy' in report.checked and 'heavy' in repr(report)
    lines = w['ax'].get_lines()
    assert [l.get_label() for l in lines] == rec.layers['weight'].layer.tolist()
    drawn = np.array([l.get_ydata() for l in lines]).T
    np.testing.assert_allclose(drawn, rec['weight', 'norm'] - rec['weight', 'norm'][0])


# --- the site --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "{page: HTML} of the built site: any broken link or anchor, page left out, or name that is not found fails."
    out   = tmp_path_factory.mktemp('site')
    build = subprocess.run([sys.executable, '-W', 'ignore', '-m', 'mkdocs', 'build', '--quiet', '--site-dir', str(out)],
                           cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert build.returncode == 0, build.stdout + build.stderr
    return {str(p.relative_to(out).parent): p.read_text(encoding='utf-8') for p in out.rglob('index.html')}

def cells(html): return re.findall(r'<tr>\s*<td>(?:<a[^>]*>)?<code>(.*?)</code>', html)

def test_the_site_has_every_page(site):
    assert set(site) == {'.', 'CONTRIBUTING', 'benchmarks/families', 'benchmarks/zoo'} | {p[5:-3] for p in PAGES if p.startswith('docs/')}
    assert not [p for p, html in site.items() if '[table:' in html]

@pytest.mark.parametrize('page, names', [
    ('statistics',  lambda: [*STATISTICS, *(f"rec['{p}', '{s}']".replace("'", '&#39;') for p, s in DERIVED)]),
    ('plots',       lambda: [n for n in PUBLIC if n.startswith('plot_')]),
    ('diagnosis',   lambda: [f.__name__ for f in ALL]),
    ('callbacks',   lambda: [n for n in PUBLIC if n.endswith('Callback')]),
    ('callbacks',   lambda: set(inspect.signature(LayerStatsCallback).parameters) - {*PROBES, 'unknown'}),
    ('callbacks',   lambda: set(inspect.signature(DiagnosisCallback).parameters) - {'settings'})])
def test_tables_made_from_the_code_are_complete(site, page, names):
    there = [c.replace('&#39;', "'") for c in cells(site[page])]
    want  = [n.replace('&#39;', "'") for n in names()]
    assert want and not [n for n in want if n not in there]

def test_no_cell_of_a_table_made_from_the_code_is_empty(site):
    for page in ('statistics', 'plots', 'diagnosis', 'callbacks'):
        rows = re.findall(r'<tr>\s*<td>(?:<a[^>]*>)?<code>.*?</tr>', site[page], re.S)
        assert rows and all('<td>None</td>' not in r for r in rows)
        if page != 'diagnosis': assert not [r for r in rows if '<td></td>' in r]

def test_every_public_name_is_in_the_api_with_what_its_arguments_are(site):
    for name in PUBLIC: assert f'id="fastgradstats.{fastgradstats._where[name]}.{name}"' in site['api'], name
    assert 'Args:' not in site['api'] and site['api'].count('Example:') >= len(PUBLIC)
    for said in ('rows of a window of the life table', 'a fastai Learner that has not trained yet',
                 'keep the calls of one module apart', 'names of rules that end the fit'): assert said in site['api']

def test_a_broken_link_or_anchor_fails(tmp_path):
    from mkdocs.commands.build import build
    from mkdocs.config import load_config
    from mkdocs.exceptions import Abort
    def made(text):
        (tmp_path / 'docs').mkdir(exist_ok=True)
        (tmp_path / 'docs' / 'index.md').write_text(text)
        build(load_config(str(ROOT / 'mkdocs.yml'), docs_dir=str(tmp_path / 'docs'), site_dir=str(tmp_path / 'site'),
                          hooks=[], plugins=[], nav=['index.md']))
    made('# A heading\n\n[here](#a-heading)')
    for text in ('[x](nowhere.md)', '[x](#nowhere)', '[x](/index.md)', '[x](nowhere)', '![x](no.png)'):
        with pytest.raises(Abort): made(text)


# --- what they say ---------------------------------------------------------------------------------------------------
def rows(page, heading):
    "The rows of the table under a heading: the names in code of the first cell, the last cell."
    part = PAGES[page].split(f'# {heading}\n')[1].split('\n#')[0]
    for cells in (l.strip('| ').split(' | ') for l in part.splitlines() if l.startswith('| `')):
        yield re.findall(r'`(\w+)`', cells[0]), cells[-1]

def test_the_readme_is_short(): assert len(README.splitlines()) <= 150

def test_links_of_readme_and_contributing_lead_to_files():
    for page in ('README.md', 'CONTRIBUTING.md'):
        for target in re.findall(r'\]\((?!https?:)([^)#]+)', PAGES[page]):
            assert (ROOT / target).exists(), (page, target)
    for page in PAGES:
        for target in re.findall(r'^\[table: \w+\]\((.*)\)$', PAGES[page], re.M):
            assert (ROOT / page).parent.joinpath(target).exists(), (page, target)

def test_tests_that_are_named_exist():
    tests = lambda f: set(re.findall(r'^ *def (test_\w+)', f.read_text(encoding='utf-8'), re.M))
    there = {f.name: tests(f) for f in (ROOT / 'tests').rglob('test_*.py')}
    pairs = [pair for text in PAGES.values() for pair in re.findall(r'\b(test_\w+\.py)::(test_\w+)', text)]
    assert len(pairs) > 30
    for file, name in pairs: assert name in there.get(file, ()), f"there is no {file}::{name}"
    for text in PAGES.values():
        for file in re.findall(r'\btest_\w+\.py\b', text): assert file in there, f"there is no {file}"

def test_ci_runs_the_readmes_test_command_and_what_trains_once_more_with_another_rounding():
    install, pytest_ = re.search(r'pip install ("?\.\[test\]"?) && (pytest .*)', README).groups()
    ci = (ROOT / '.ci' / 'run').read_text(encoding='utf-8').splitlines()
    assert any(f'pip install --quiet {install}' in l for l in ci)
    assert ci[-2] == pytest_.strip()
    assert re.fullmatch(r'ATEN_CPU_CAPABILITY=default .*pytest .*-m "trains and not slow"', ci[-1])

def test_probes_are_all_there_are():
    assert [n for names, _ in rows('docs/statistics.md', 'Probes') for n in names] == list(PROBES)

def test_columns_of_iters_are_all_there_are():
    assert [n for names, _ in rows('docs/record.md', 'Columns of rec.iters') for n in names] == [
        c for c in ITER_COLS for c in ([c, 'gain'] if c == 'loss_constant' else [c])]

NETS = {
    'resnet18()':                    lambda: Learner(images(), resnet18(num_classes=3), loss_func=VISION['loss_func']),
    'vision_learner(dls, resnet18)': lambda: vision_learner(images(), resnet18, **VISION)}

def test_the_globs_that_are_shown_match_the_same_layers():
    said  = next(l for l in PAGES['docs/callbacks.md'].splitlines() if l.startswith('`modules` chooses'))
    globs = dict(zip(NETS, re.findall(r"`'([^']+)'`", said)))
    assert list(globs.values()) == ['layer4.*', '0.7.*'] and all(f'`{net}`' in said for net in NETS)
    got = {}
    for net, make in NETS.items():
        learn = make()
        learn.remove_cb(ProgressCallback)
        for glob in globs.values():
            try:
                with learn.no_logging(): learn.fit(1, cbs=LayerStatsCallback(modules=glob, verbose=False))
            except ValueError as e:
                assert f"modules={glob!r} matches no layer" in str(e) and list(learn.model._modules)[0] in str(e)
            else: got[net] = glob, learn.layer_stats.layers['activation'].layer.tolist()
    assert {net: glob for net, (glob, _) in got.items()} == globs
    plain, fine = (layers for _, layers in got.values())
    ends = [[l.split('.', 1)[1] for l in layers] for layers in (plain, [l.split('.', 1)[1] for l in fine])]
    assert ends[0] == ends[1] and len(ends[0]) == 4

def test_the_two_gains_are_what_is_said_of_them():
    learn = learner('mlp', LayerStatsCallback(verbose=False), n=80, lr=.5)
    learn.fit(4)
    it, r = learn.layer_stats.iters, run(learn.layer_stats)
    np.testing.assert_allclose(it.gain, it.loss_constant - it.loss)
    saved = (it.loss_prior - it.loss).iloc[-20:]
    assert r.gain_over_constant[-1] == pytest.approx(saved.mean()) and r.gain_error[-1] == pytest.approx(saved.std() / 20 ** .5)
    assert abs(r.gain_over_constant[-1] - it.gain.iloc[-20:].mean()) > .02                      # not one number by two names

def test_the_learning_rate_of_every_parameter_is_recorded_with_update():
    from fastai.torch_core import params
    split = lambda m: [params(m[0]), params(m[1:])]
    learn = learner('mlp', GradStatsCallback(), splitter=split)
    learn.fit(1, lr=slice(.01, .1))
    assert "`rec['update', 'lr']`" in dict((n[0], t) for n, t in rows('docs/statistics.md', 'Probes'))['update']
    np.testing.assert_allclose(learn.layer_stats['update', 'lr'][0], [.01] * 2 + [.1] * 4, rtol=1e-6)
    np.testing.assert_allclose(learn.layer_stats.iters.lr, .1)

@pytest.mark.parametrize('cb', [LayerStatsCallback, GradStatsCallback, ActivationHistCallback, DeadUnitCallback,
                                DiagnosisCallback])
def test_only_layer_stats_callback_prints(cb, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learner('mlp', cb(verbose=True)).fit(1)
    assert (len(capsys.readouterr().out.splitlines()) == 4) == (cb is LayerStatsCallback)


# --- public names ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('name', PUBLIC)
def test_public_names_are_typed(name):
    f   = getattr(fastgradstats, name)
    sig = inspect.signature(f.__init__ if inspect.isclass(f) and not issubclass(f, tuple) else f)
    assert not [p.name for p in sig.parameters.values() if p.name != 'self' and p.annotation is p.empty]
    if not inspect.isclass(f): assert sig.return_annotation is not sig.empty

@pytest.mark.parametrize('name', PUBLIC)
def test_public_names_say_what_they_raise_and_show_an_example_that_runs(name, world):
    f   = getattr(fastgradstats, name)
    doc = inspect.getdoc(f)
    if not inspect.isclass(f): assert '\nRaises:\n' in doc
    example = re.search(r'^Example:\n((?: {4}.*\n?|\n)+)', doc, re.M)[1]
    assert name in example
    play([dedent(example)], world, name)

def test_type_checkers_see_what_python_sees():
    package = Path(fastgradstats.__file__).parent
    assert (package / 'py.typed').exists()
    assert re.search(r'^\[options\.package_data\]\nfastgradstats = py\.typed, __init__\.pyi$',
                     (ROOT / 'setup.cfg').read_text(), re.M)
    said = re.findall(r'^from \.(\S+) import (\w+) as (\w+)$', (package / '__init__.pyi').read_text(), re.M)
    assert [n for _, n, _ in said] == PUBLIC and all(a == b for _, a, b in said)
    for module, name, _ in said:
        assert getattr(import_module(f'fastgradstats.{module}'), name) is getattr(fastgradstats, name)
