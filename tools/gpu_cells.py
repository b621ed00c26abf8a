"""The cells of the notebooks that are for a GPU (`#| cuda`), each after those that it needs"""
import ast
import contextlib
import importlib.util
import io
import json
import os
import re
import time

import house
from wsol_nb import core


def flag(source, name): return re.search(rf'^#\|\s*{name}\b', source, flags=re.M)


def sources(nb):
    "The code cells of a notebook."
    cells = json.loads(nb.read_text(encoding='utf-8'))['cells']
    return [''.join(c['source']) for c in cells if c['cell_type'] == 'code']


def notebooks():
    "Those that have a cell for a GPU, with their code cells."
    read = ((nb, sources(nb)) for nb in house.notebooks())
    return [(nb, cells) for nb, cells in read if any(flag(c, 'cuda') for c in cells)]


def names(source):
    "(what a cell binds at its top level, what it reads)."
    try: tree = ast.parse(source)
    except SyntaxError: return set(), set() # for the shell
    bound, read = set(), {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    for n in ast.walk(ast.Module([s for s in tree.body if not hasattr(s, 'decorator_list')], [])):
        if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store): bound.add(n.id)
        if isinstance(n, ast.alias): bound.add((n.asname or n.name).split('.')[0])
    return bound | {s.name for s in tree.body if hasattr(s, 'decorator_list')}, read


def needed(cells, i):
    "The places of the cells before `i` that it needs: imports, exports, and what binds a name that is read."
    wanted, places = names(cells[i])[1], []
    for k in range(i - 1, -1, -1):
        bound, read = names(cells[k])
        always = flag(cells[k], 'export') or re.match(r'(#[^\n]*\n)*(import|from) ', cells[k])
        if not (always or bound & wanted) or flag(cells[k], 'slow'): continue
        places.append(k)
        wanted |= read
    return places[::-1]


def cells(part):
    "Run every one, in the order of the notebooks; a row says what it printed. IPython is not needed."
    if importlib.util.find_spec('IPython') is None:
        core.notebook_defaults = lambda seed=42: core.set_seed(seed)
    for nb, code in part.each(notebooks(), name=lambda pair: pair[0].name):
        shown = nb.relative_to(house.root/'nbs').as_posix()
        os.chdir(nb.parent)
        for i in [i for i, c in enumerate(code) if flag(c, 'cuda')]:
            with part.guard(f'{shown}, code cell {i}'): run_cell(part, shown, code, i)


def run_cell(part, shown, code, i):
    "Run one cell in names of its own."
    space, said, before = dict(__name__='__main__'), io.StringIO(), needed(code, i)
    with contextlib.redirect_stdout(io.StringIO()):
        for k in before: exec(compile(code[k], f'{shown}:{k}', 'exec'), space)
    start = time.time()
    with contextlib.redirect_stdout(said): exec(compile(code[i], f'{shown}:{i}', 'exec'), space)
    part.add(notebook=shown, cell=i, cells_before=len(before), seconds=round(time.time() - start, 2),
             printed=said.getvalue().strip())
