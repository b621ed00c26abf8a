"What notebooks cannot see: imports in fresh processes, the order of modules, the form of the notebooks."
import configparser
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root/'tools'))
import house

NOTEBOOKS = sorted(p for p in (root/'nbs').rglob('*.ipynb') if not any(s.startswith(('.', '_')) for s in p.relative_to(root).parts[1:]))


def cells(nb): return json.loads(nb.read_text(encoding='utf-8'))['cells']


MODULES = list(house.homes()) # in the order of chapters and numbers
# training and what stands on it; core maths (metrics, localizers, nets, losses, seeds) is usable without fastai
WITH_FASTAI = {m for m in MODULES if re.match(r'wsol_nb\.(data\.(dataset|loaders)|train|methods|cli|dense\.(seeded|fcam|negev))\b', m)}
LONGEST = 300 # lines of a module


# Other people's libraries are loaded once, and each module is imported in a fork, where nothing of ours is there yet.
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
    def run(names): return subprocess.run([sys.executable, '-c', ALONE, *names], capture_output=True, text=True, cwd=root)
    with ThreadPoolExecutor(2) as pool: done = [*pool.map(run, (MODULES[::2], MODULES[1::2]))]
    said = dict(line.split() for r in done for line in r.stdout.splitlines())
    missing = set(MODULES) - set(said)
    assert not missing, f'{sorted(missing)}: {[r.stderr[-1500:] for r in done]}'
    for m in MODULES:
        if m not in WITH_FASTAI: assert said[m] == 'False', f'{m} imports fastai, but core maths must not'


def test_modules_are_those_of_the_notebooks():
    made = {'wsol_nb.' + '.'.join(p.relative_to(root/'wsol_nb').with_suffix('').parts) for p in (root/'wsol_nb').rglob('*.py') if not p.name.startswith('_')}
    assert made == set(MODULES), 'a module without its notebook is stale; a notebook without its module was not exported'


def test_imports_go_down():
    "From a module to those before it: in its chapter, or in chapters before; never a private name."
    arrows = {m: {(o, name) for o, name in house.imported(m) if o.startswith('wsol_nb.')} for m in MODULES}
    assert sum(map(len, arrows.values())) > 100, 'hardly an import of the library was seen; does this test still look?'
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
    assert (root/'wsol_nb/_index.py').read_text(encoding='utf-8') == index.render(), 'run python tools/sync.py'


def test_tools_bear_no_library_s_name():
    "They stand on the path of their scripts: fastai asks for PyTables, and would get a tools/tables.py."
    assert not [p.stem for p in (root/'tools').glob('*.py') if p.stem in sys.stdlib_module_names or p.stem == 'tables']


def test_front_door():
    "Everything at the door is there, costs nothing until it is asked for, and bears the name of no module."
    probe = "import time; t = time.time(); import wsol_nb, sys; print(time.time() - t, 'torch' in sys.modules, *dir(wsol_nb))"
    seconds, torch, *names = subprocess.run([sys.executable, '-c', probe], capture_output=True, text=True, cwd=root, check=True).stdout.split()
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
    assert re.match(r'# \S', first) and re.search(r'^> \S', first, flags=re.M), 'the first cell is a title and a > line'
    for i, c in enumerate(cs):
        src = ''.join(c['source'])
        if c['cell_type'] != 'code': continue
        assert not re.match(r'#(?!\|)[^\n]*\n+#\|', src), f'cell {i}: a comment above a directive un-exports the cell'
        code = [l for l in src.splitlines() if l.strip() and not l.lstrip().startswith('#')]
        code = [l for l in code if not re.match(r'    \w+:?[^#()]*, # ', l)] # a documented signature is no code
        if re.match(r'#\|\s*export', src): assert len(code) <= 40, f'cell {i}: {len(code)} exported lines'
        for o in c.get('outputs', []):
            assert o.get('name') != 'stderr', f'cell {i}: stderr is stored'
            assert o.get('output_type') != 'error', f'cell {i}: an error is stored'
            assert not re.search(r'/home/|/root/|/tmp/|/work/|model_id', json.dumps(o)), f'cell {i}: a machine path or model_id in the output'
    assert not re.search(r'files\.pythonhosted|pypi\.org|/work/', text)


def test_readme_is_that_of_the_index():
    import readme
    assert (root/'README.md').read_text(encoding='utf-8') == readme.render(), 'run python tools/readme.py'


def test_sidebar_and_links():
    import docs
    assert [*docs.check_sidebar(), *docs.check_links()] == []


def test_quarto_yml_is_a_link(): assert (root/'nbs/_quarto.yml').is_symlink() and (root/'nbs/_quarto.yml').resolve() == root/'_quarto.yml'


def test_scripts_answer_help_without_torch():
    cfg = configparser.ConfigParser(delimiters=['='])
    cfg.read(root/'settings.ini')
    names = [s.split('=')[0] for s in cfg['DEFAULT']['console_scripts'].split()]
    probe = "import sys; from wsol_nb.cli.command import parse\nfor n in sys.argv[1:]:\n  try: parse(n, ['--help'])\n  except SystemExit: pass\nprint([m for m in ('torch', 'fastai', 'numpy', 'pandas') if m in sys.modules])"
    out = subprocess.run([sys.executable, '-c', probe, *names], capture_output=True, text=True, cwd=root, check=True).stdout
    assert out.strip().endswith('[]') and all(f'usage: {n}' in out for n in names) and len(names) == 5


def test_version():
    import wsol_nb
    cfg = configparser.ConfigParser(delimiters=['='])
    cfg.read(root/'settings.ini')
    assert wsol_nb.__version__ == cfg['DEFAULT']['version'] and wsol_nb.__version__ in (root/'CHANGELOG.md').read_text()


@pytest.mark.parametrize('name', ['oldest', 'newest'])
def test_frozen_releases_are_allowed(name):
    "The frozen sets fit settings.ini; the oldest one is its lower bounds. `make lock` renews them."
    from packaging.requirements import Requirement
    cfg = configparser.ConfigParser(delimiters=['='])
    cfg.read(root/'settings.ini')
    lines = [Requirement(l) for l in (root/f'constraints-{name}.txt').read_text().splitlines() if not l.startswith('#')]
    pinned = {}
    for r in lines: pinned.setdefault(r.name, set()).update(s.version for s in r.specifier)
    for r in map(Requirement, cfg['DEFAULT']['requirements'].split()):
        assert r.name in pinned, f'{r.name}: not in constraints-{name}.txt'
        assert all(r.specifier.contains(v) for v in pinned[r.name]), f'{r} is not met by {pinned[r.name]}; run make lock'
