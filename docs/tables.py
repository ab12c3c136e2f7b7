"""What the site's pages take from the package when it is built: a hook of MkDocs.

A line `[table: NAME](where the definitions are)` of a page becomes the table NAME, one of the functions of `TABLES`.
README.md is the home page; files of the repository that pages link to are in the site too.
"""
import inspect
import re
import sys
from pathlib import Path

from mkdocs.structure.files import File

ROOT  = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
TABLE = re.compile(r'^\[table: (\w+)\]\((\S+)\)$', re.M)
LINK  = re.compile(r'\]\((?!https?:|#)([^)#\s]+)')                # to a file

import fastgradstats                                              # noqa: E402
from docments import of                                           # noqa: E402


# --- the tables ------------------------------------------------------------------------------------------------------
def table(heads, rows):
    line = lambda cells: '| ' + ' | '.join(re.sub(r'\s+', ' ', str(c)).replace('|', r'\|') for c in cells) + ' |'
    return '\n'.join([line(heads), '|' + '---|' * len(heads), *map(line, rows)])

def code(s): return f'`{s}`'

def names(kind): return [n for n in fastgradstats.__all__ if kind(n)]

def first(f):
    "The first sentences of a docstring: its first paragraph."
    return inspect.getdoc(f).split('\n\n')[0]

def callbacks():
    rows = []
    for name in names(lambda n: n.endswith('Callback')):
        cls = getattr(fastgradstats, name)
        by  = cls._default_probes
        rows.append((code(name), first(cls), '; '.join(f"{code(p)}: {', '.join(ss)}" for p, ss in by.items() if ss)))
    return table(['callback', 'what it does', 'records by default'], rows)

def settings(cls=None, skip=()):
    "The arguments of a callback that are no probe."
    from fastgradstats.measure.probes import PROBES
    cls  = cls or fastgradstats.LayerStatsCallback
    said = of(cls.__init__)
    pars = inspect.signature(cls.__init__).parameters.values()
    shown = lambda v: 'ALL' if isinstance(v, tuple) and callable(v[0]) else repr(v)
    return table(['setting', 'default', 'meaning'],
                 [(code(p.name), code(shown(p.default)), said[p.name]) for p in pars
                  if p.name != 'self' and p.name not in PROBES and p.kind is not p.VAR_KEYWORD])

def diagnosis_settings(): return settings(fastgradstats.DiagnosisCallback)

def statistics():
    from fastgradstats.measure.statistics import STATISTICS
    return table(['statistic', 'unit', 'meaning', 'read of'],
                 [(code(n), s.unit or 'as the tensor', s.doc.replace(' (sampled)', ''),
                   'a sample' if s.sampled else 'everything') for n, s in STATISTICS.items()])

def derived():
    from fastgradstats.record.schema import DERIVED
    return table(['read as', 'what it is'], [(code(f"rec['{p}', '{s}']"), f) for (p, s), f in DERIVED.items()])

def plots():
    return table(['plot', 'shows'], [(f'[`{n}`](api.md#{anchor(n)})', first(getattr(fastgradstats, n)))
                                     for n in names(lambda n: n.startswith('plot_'))])

def shims():
    from fastgradstats.notebooks.shims import SHIMS
    return table(['shim', 'needed by', 'why'], [(code(s.name), s.notebook, s.reason) for s in SHIMS])

def rules():
    from fastgradstats.rules import ALL
    return table(['rule', 'finds'], [(code(f.__name__), first(f)) for f in ALL])

def limits():
    from fastgradstats.rules import ALL
    named  = lambda k: code(k[1] if k[0] == 'iters' else ' '.join(k))
    need   = lambda k: ' or '.join(map(named, k)) if isinstance(k, list) else named(k)
    limits = lambda f: ', '.join(code(f'{p.name}={p.default:g}') for p in inspect.signature(f).parameters.values()
                                 if isinstance(p.default, (int, float)))
    return table(['rule', 'needs', 'limits', 'where they come from'],
                 [(code(f.__name__), ', '.join(map(need, f.needs)), limits(f), f.source) for f in ALL])

def anchor(name): return f'fastgradstats.{fastgradstats._where[name]}.{name}'

def api(): return '\n\n'.join(f'::: {anchor(n)}' for n in fastgradstats.__all__)

TABLES = {f.__name__: f for f in (callbacks, settings, diagnosis_settings, statistics, derived, plots, shims, rules, limits,
                                  api)}


# --- MkDocs' events --------------------------------------------------------------------------------------------------
def outside():
    "Files of the repository that pages link to, README.md and CONTRIBUTING.md first."
    found = ['README.md', 'CONTRIBUTING.md']
    for page in [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *(ROOT / 'docs').glob('*.md')]:
        text  = TABLE.sub('', page.read_text(encoding='utf-8'))
        found += [str((page.parent / to).resolve().relative_to(ROOT)) for to in LINK.findall(text)]
    return [f for f in dict.fromkeys(found) if not f.startswith('docs/') and (ROOT / f).is_file()]

def on_files(files, config):
    for name in outside():
        uri = 'index.md' if name == 'README.md' else name
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / name)))
    return files

def on_page_markdown(markdown, page, **kwargs):
    markdown = TABLE.sub(lambda m: TABLES[m[1]](), markdown)
    return re.sub(r'\]\((\.\./|docs/)', '](', markdown)          # README.md and docs/ lie side by side in the site
