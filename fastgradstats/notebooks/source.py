"What is run: a notebook, or a script as one; its assignments set, the cells that an earlier run added taken out."
from __future__ import annotations

import ast
import re
from pathlib import Path

OURS    = 'fastgradstats'                                     # the tag of every cell that is added
EXPORTS = r'^\s*!.*notebook2script|nbdev_export\(|notebook2script\('        # cells that write source files


def read(path):
    "The notebook at `path`, all its outputs kept; of a script a cell for each `# %%`."
    import nbformat
    path = Path(path)
    if not path.is_file(): raise FileNotFoundError(f"there is no notebook {path}")
    if path.suffix == '.py': return _script(path)
    if path.suffix != '.ipynb': raise ValueError(f"{path} is neither a notebook (.ipynb) nor a script (.py)")
    try: nb = nbformat.read(path, 4)
    except (nbformat.reader.NotJSONError, nbformat.ValidationError, KeyError) as e:
        raise ValueError(f"{path} is no notebook: {str(e).splitlines()[0]}") from e
    nb.cells = [c for c in nb.cells if OURS not in c.metadata.get('tags', [])]
    return nb

def _script(path):
    from nbformat.v4 import new_code_cell, new_notebook
    parts = re.split(r'^# ?%%.*\n', path.read_text(encoding='utf-8'), flags=re.M)
    nb    = new_notebook(cells=[new_code_cell(p.strip('\n')) for p in parts if p.strip()])
    nb.metadata.language_info = dict(name='python', pygments_lexer='ipython3')
    return nb

def code(nb): return [c for c in nb.cells if c.cell_type == 'code']

def exports(cell): return re.search(EXPORTS, cell.source, re.M) is not None

def errors(cell): return [o.ename for o in cell.get('outputs', []) if o.output_type == 'error']


# --- other values ----------------------------------------------------------------------------------------------------
def assign(nb, values):
    "Every assignment in the notebook to a name of `values` is given its value (Python source)."
    for name, value in values.items():
        hits = sum(_assign(c, name, value) for c in code(nb))
        if not hits: raise ValueError(f"--set {name}: no cell assigns {name}")

def _assign(cell, name, value):
    "How many assignments of `name` in a cell were changed."
    spots = []
    for node in ast.walk(_tree(cell.source)):
        for target in node.targets if isinstance(node, ast.Assign) else ():
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = zip(target.elts, node.value.elts)
            spots += [v for t, v in pairs if isinstance(t, ast.Name) and t.id == name]
    lines = cell.source.splitlines(keepends=True)
    for v in sorted(spots, key=lambda v: (v.lineno, v.col_offset), reverse=True):          # the last one first
        head = lines[v.lineno - 1].encode()[:v.col_offset].decode()
        tail = lines[v.end_lineno - 1].encode()[v.end_col_offset:].decode()
        lines[v.lineno - 1:v.end_lineno] = [head + value + tail]
    cell.source = ''.join(lines)
    return len(spots)

def _tree(source):
    "The syntax tree of a cell, its magics and shell lines left out; of one that is no Python an empty one."
    try: return ast.parse(re.sub(r'^([ \t]*)[%!?].*$', r'\1pass', source, flags=re.M))
    except SyntaxError: return ast.Module([], [])
