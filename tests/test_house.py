"What notebooks cannot see: imports in fresh processes, the order of modules, the form of the notebooks."
import ast
import configparser
import json
import re
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import root, run

sys.path.insert(0, str(root/'tools'))
import house


def cells(nb): return json.loads(nb.read_text(encoding='utf-8'))['cells']


def settings():
    "The default section of settings.ini."
    config = configparser.ConfigParser(delimiters=['='])
    config.read(root/'settings.ini')
    return config['DEFAULT']


NOTEBOOKS = house.notebooks()
MODULES = list(house.homes()) # in the order of chapters and numbers
# training and what stands on it; core maths (metrics, localizers, nets, losses, seeds) is usable without it
FASTAI = (r'wsol_nb\.(data\.(dataset|idioms|loaders|shards)|train|methods|cli|'
          r'dense\.(seeded|fcam|negev)|vit\.(distil|tscam|fusion))\b')
WITH_FASTAI = {m for m in MODULES if re.match(FASTAI, m)}
LONGEST = 300 # lines of a module


# Other people's libraries are loaded once; each module is imported in a fork, where nothing of ours is yet.
ALONE = """
import importlib, os, sys, warnings
import cv2, matplotlib.pyplot, numba, numpy, pandas, scipy, torch
assert not {'fastai', 'wsol_nb'} & set(sys.modules)
warnings.filterwarnings('error', category=DeprecationWarning, module='wsol_nb')
for name in sys.argv[1:]:
    if not os.fork():
        importlib.import_module(name)
        print(name, 'fastai' in sys.modules, flush=True)
        os._exit(0)
    os.wait()
"""


def test_every_module_imports_alone():
    def alone(names): return run(sys.executable, '-c', ALONE, *names, cwd=root)
    with ThreadPoolExecutor(2) as pool: done = [*pool.map(alone, (MODULES[::2], MODULES[1::2]))]
    said = dict(line.split() for r in done for line in r.stdout.splitlines())
    missing = set(MODULES) - set(said)
    assert not missing, f'{sorted(missing)}: {[r.stderr[-1500:] for r in done]}'
    for m in MODULES:
        if m not in WITH_FASTAI: assert said[m] == 'False', f'{m} imports fastai, but core maths must not'


def roots(node):
    "The packages that an import names; ours is '', but for the registry, which loads nothing."
    if isinstance(node, ast.Import): return {a.name.split('.')[0] for a in node.names}
    if not node.level: return {node.module.split('.')[0]}
    return set() if node.module in ('registry', '_index') else {''}


def first(module, names):
    "Place of a module's first top-level import from these packages, or None."
    imports = [n for n in house.tree(module).body if isinstance(n, (ast.Import, ast.ImportFrom))]
    return next((i for i, n in enumerate(imports) if roots(n) & names), None)


@pytest.mark.parametrize('module', MODULES)
def test_core_comes_first(module):
    "It lets torchvision be imported beside another build of torch: above all that imports torchvision."
    late = first(module, {'fastai', 'timm', 'torchvision'})
    assert late is None or (ours := first(module, {''})) is not None and ours < late


def test_modules_are_those_of_the_notebooks():
    files = (p for p in (root/'wsol_nb').rglob('*.py') if not p.name.startswith('_'))
    made = {'.'.join(p.relative_to(root).with_suffix('').parts) for p in files}
    stale, missing = made - set(MODULES), set(MODULES) - made
    assert not stale, f'{stale}: modules without a notebook'
    assert not missing, f'{missing}: notebooks were not exported'


def test_imports_go_down():
    "From a module to those before it: in its chapter, or in chapters before; never a private name."
    ours = lambda m: {(o, name) for o, name in house.imported(m) if o.startswith('wsol_nb.')}
    arrows = {m: ours(m) for m in MODULES}
    assert sum(map(len, arrows.values())) > 100, 'hardly an import was seen; does this test still look?'
    for m, seen in arrows.items():
        for o, name in seen:
            assert name != '*', f'{m}: star import of {o}'
            if o == 'wsol_nb._index': continue
            assert o in MODULES, f'{m} imports {o}, which no notebook exports'
            assert MODULES.index(o) < MODULES.index(m), f'{m} imports {o}, which comes later'
            assert not name.startswith('_'), f'{m} imports the private name {name} of {o}'


@pytest.mark.parametrize('module', MODULES)
def test_modules_are_short(module):
    n = house.length(module)
    assert n <= LONGEST, f'{module} has {n} lines'


def test_index_is_that_of_the_source():
    import index
    file = root/'wsol_nb/_index.py'
    assert file.read_text(encoding='utf-8') == index.render(), 'run python tools/sync.py'


def test_tools_bear_no_library_s_name():
    "They stand on the path of their scripts: fastai asks for PyTables, and would get a tools/tables.py."
    taken = {*sys.stdlib_module_names, 'tables'}
    assert not {p.stem for p in (root/'tools').glob('*.py')} & taken


def test_front_door():
    "Everything at the door is there, costs nothing until it is asked for, and bears the name of no module."
    probe = """
import sys, time
start = time.time()
import wsol_nb
print(time.time() - start, 'torch' in sys.modules, *dir(wsol_nb))"""
    seconds, torch, *names = run(sys.executable, '-c', probe, cwd=root).stdout.split()
    assert float(seconds) < .1 and torch == 'False' and {'GradCAM', 'FCAM', 'wsol_learner'} <= set(names)
    import wsol_nb
    from wsol_nb.registry import at_the_door
    for name in at_the_door(): assert getattr(getattr(wsol_nb, name), '__name__', name) == name
    assert not {m.split('.')[1] for m in MODULES} & set(at_the_door())
    with pytest.raises(AttributeError, match='no attribute'): wsol_nb.GradKAM


@pytest.mark.parametrize('nb', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_form(nb):
    text, cs = nb.read_text(encoding='utf-8'), cells(nb)
    assert nb.stat().st_size <= 400*1024, f'{nb.stat().st_size/1024:.0f} KB'
    first = ''.join(cs[0]['source'])
    head = re.match(r'# \S', first) and re.search(r'^> \S', first, flags=re.M)
    assert head, 'the first cell is a title and a > line'
    for i, c in enumerate(cs):
        src = ''.join(c['source'])
        if c['cell_type'] != 'code': continue
        hidden = re.match(r'#(?!\|)[^\n]*\n+#\|', src)
        assert not hidden, f'cell {i}: a comment above a directive un-exports the cell'
        for o in c.get('outputs', []):
            assert o.get('name') != 'stderr', f'cell {i}: stderr is stored'
            assert o.get('output_type') != 'error', f'cell {i}: an error is stored'
            of_machine = re.search(r'/home/|/root/|/tmp/|/work/|model_id', json.dumps(o))
            assert not of_machine, f'cell {i}: a machine path or model_id in the output'
    assert not re.search(r'files\.pythonhosted|pypi\.org|/work/', text)


@pytest.mark.parametrize('nb', NOTEBOOKS, ids=lambda p: p.stem)
def test_page_reads_well(nb):
    "Widths, lengths of cells, lessons: the rules of tools/pages.py."
    import pages
    assert [*pages.faults(nb)] == []


def test_cells_are_short():
    import pages
    cells = [c for nb in NOTEBOOKS for c in pages.code_cells(nb) if c.exported]
    assert statistics.median(c.length for c in cells) <= pages.MEDIAN


@pytest.mark.parametrize('folder', ['tests', 'tools'])
def test_lines_of_scripts(folder):
    lines = ((p.name, i, l) for p in (root/folder).glob('*.py')
             for i, l in enumerate(p.read_text(encoding='utf-8').splitlines(), 1))
    assert [(name, i) for name, i, l in lines if len(l) > 110] == []


def test_running_a_notebook_writes_no_module():
    assert not [nb.stem for nb in NOTEBOOKS if 'nbdev_export()' in nb.read_text(encoding='utf-8')]


def test_readme_is_that_of_the_index():
    import readme
    assert (root/'README.md').read_text(encoding='utf-8') == readme.render(), 'run python tools/readme.py'


def test_sidebar_and_links():
    import docs
    assert [*docs.check_sidebar(), *docs.check_links()] == []


def test_quarto_yml_is_a_link():
    link = root/'nbs/_quarto.yml'
    assert link.is_symlink() and link.resolve() == root/'_quarto.yml'


def test_scripts_answer_help_without_torch():
    names = [s.split('=')[0] for s in settings()['console_scripts'].split()]
    probe = """
import sys
from wsol_nb.cli.command import parse
for n in sys.argv[1:]:
    try: parse(n, ['--help'])
    except SystemExit: pass
print([m for m in ('torch', 'fastai', 'numpy', 'pandas') if m in sys.modules])"""
    out = run(sys.executable, '-c', probe, *names, cwd=root).stdout
    assert out.strip().endswith('[]') and all(f'usage: {n}' in out for n in names) and len(names) == 7


def test_version():
    import wsol_nb
    assert wsol_nb.__version__ == settings()['version']
    assert wsol_nb.__version__ in (root/'CHANGELOG.md').read_text()


@pytest.mark.parametrize('name', ['oldest', 'newest'])
def test_frozen_releases_are_allowed(name):
    "The frozen sets fit settings.ini; the oldest one is its lower bounds. `make lock` renews them."
    from packaging.requirements import Requirement
    lines, pinned = (root/f'constraints-{name}.txt').read_text().splitlines(), {}
    for r in (Requirement(l) for l in lines if not l.startswith('#')):
        pinned.setdefault(r.name, set()).update(s.version for s in r.specifier)
    asked = f"{settings()['requirements']} {settings()['shards_requirements']}"
    for r in map(Requirement, asked.split()):
        assert r.name in pinned, f'{r.name}: not in constraints-{name}.txt'
        met = all(r.specifier.contains(v) for v in pinned[r.name])
        assert met, f'{r} is not met by {pinned[r.name]}; run make lock'


def test_no_patch_hides_a_name():
    "Before fastcore 1.9 a function under @patch leaves None where it stands: nothing else may have its name."
    for module in house.homes():
        names, patched = set(), set()
        for node in house.tree(module).body:
            under_patch = any('patch' in ast.unparse(d) for d in getattr(node, 'decorator_list', []))
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names |= {a.asname or a.name for a in node.names}
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)): continue
            (patched if under_patch else names).add(node.name)
        assert not names & patched, f'{module}: {names & patched}'
