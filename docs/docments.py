"""Comments beside parameters, as fastai writes them, for the site.

def f(
    x,      # what it is
):          # what comes back
"""
import inspect
import io
import re
import tokenize
from textwrap import dedent

import griffe


def comments(source, names):
    "{parameter: the comment beside it} of the source of a function; what is returned under 'return'."
    out, depth, now = {}, 0, None
    tokens = tokenize.generate_tokens(io.StringIO(dedent(source)).readline)
    for kind, text, *_ in tokens:
        if kind == tokenize.OP and text in '([{': depth += 1
        if kind == tokenize.OP and text in ')]}':
            depth -= 1
            if depth == 0: now = 'return'
        if kind == tokenize.NAME and depth == 1 and text in names and text not in out: now = text
        if kind == tokenize.COMMENT and now: out[now] = f"{out.get(now, '')} {text.lstrip('# ')}".strip()
        if kind == tokenize.NEWLINE and depth == 0 and now: return out
    return out

def of(f):
    "The same of a function."
    return comments(inspect.getsource(f), inspect.signature(f).parameters)


EXAMPLE = re.compile(r'^Example:\n((?: {4}.*\n?|\n)+)', re.M)

def fenced(text):
    "The section Example of a docstring as a block of code."
    return EXAMPLE.sub(lambda m: f'**Example:**\n\n```python\n{dedent(m[1]).strip()}\n```\n\n', text)


class Docments(griffe.Extension):
    "Adds them to a docstring, as its sections Args and Returns."
    def on_class(self, *, cls, **kwargs):
        if cls.docstring: cls.docstring.value = fenced(cls.docstring.value)

    def on_function(self, *, func, loader, **kwargs):
        if not (func.docstring or func.name == '__init__'): return
        names = {p.name.lstrip('*') for p in func.parameters} - {'self'}
        said  = comments('\n'.join(func.lines), names)
        back  = said.pop('return', '')
        text  = func.docstring.value if func.docstring else 'Make one.'            # a section cannot stand first
        head, *rest = re.split(r'\n\n(?=(?:Raises|Example):\n)', text, maxsplit=1)
        if said: head += '\n\nArgs:' + ''.join(f'\n    {n}: {d}' for n, d in said.items())
        if back: head += f'\n\nReturns:\n    {back}'
        whole = fenced('\n\n'.join([head, *rest]).strip())
        func.docstring = griffe.Docstring(whole, parent=func, parser=loader.docstring_parser,
                                          parser_options=loader.docstring_options)
