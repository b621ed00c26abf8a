"What notebooks cannot see: imports in fresh processes, the order of modules, the form of the notebooks."
import ast
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
NOTEBOOKS = sorted(p for p in (root/'nbs').rglob('*.ipynb') if not any(s.startswith(('.', '_')) for s in p.relative_to(root).parts[1:]))
NUMBERED = {p: p.stem.split('_', 1) for p in NOTEBOOKS if re.match(r'\d\d_', p.name)}
MODULES = {f'wsol_nb.{name}': int(n) for n, name in NUMBERED.values()}
CORE = [m for m, n in MODULES.items() if (n < 22 or 30 <= n < 40) and m not in ('wsol_nb.data.loaders',)] # usable without fastai


def source(module): return root/(module.replace('.', '/') + '.py')


def cells(nb): return json.loads(nb.read_text(encoding='utf-8'))['cells']


def test_every_module_imports_in_a_fresh_process():
    def run(m):
        probe = f"import sys, {m}; print([k for k in ('fastai',) if k in sys.modules])"
        return m, subprocess.run([sys.executable, '-W', 'error::DeprecationWarning:wsol_nb', '-c', probe], capture_output=True, text=True, cwd=root)
    with ThreadPoolExecutor(2) as pool:
        for m, r in pool.map(run, MODULES):
            assert r.returncode == 0, f'{m}: {r.stderr[-800:]}'
            if m in CORE: assert r.stdout.strip() == '[]', f'{m} imports fastai, but metrics, localizers and models must not'


def test_modules_are_those_of_the_notebooks():
    made = {'wsol_nb.' + '.'.join(p.relative_to(root/'wsol_nb').with_suffix('').parts) for p in (root/'wsol_nb').rglob('*.py') if not p.name.startswith('_')}
    assert made == set(MODULES), 'a module without its notebook is stale; a notebook without its module was not exported'


def test_imports_go_down_the_numbers():
    for m, n in MODULES.items():
        seen = set()
        for node in ast.walk(ast.parse(source(m).read_text(encoding='utf-8'))):
            if isinstance(node, ast.Import): seen |= {a.name for a in node.names}
            if not isinstance(node, ast.ImportFrom): continue
            base = m.rsplit('.', node.level)[0] if node.level else '' # nbdev writes relative imports
            name = '.'.join(filter(None, (base, node.module)))
            seen |= {name} | {f'{name}.{a.name}' for a in node.names}
            assert all(a.name != '*' for a in node.names), f'{m}: star import of {node.module}'
        own = seen & set(MODULES)
        assert own or n == 0 or m in ('wsol_nb.data.synth', 'wsol_nb.seeds'), f'{m}: no import of the library was seen; does this test still look?'
        for o in own: assert MODULES[o] < n, f'{m} ({n}) imports {o} ({MODULES[o]})'


@pytest.mark.parametrize('nb', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_form(nb):
    text, cs = nb.read_text(encoding='utf-8'), cells(nb)
    assert nb.stat().st_size <= 150*1024, f'{nb.stat().st_size/1024:.0f} KB'
    first = ''.join(cs[0]['source'])
    assert re.match(r'# \S', first) and re.search(r'^> \S', first, flags=re.M), 'the first cell is a title and a > line'
    for i, c in enumerate(cs):
        src = ''.join(c['source'])
        if c['cell_type'] != 'code': continue
        assert not re.match(r'#(?!\|)[^\n]*\n+#\|', src), f'cell {i}: a comment above a directive un-exports the cell'
        code = [l for l in src.splitlines() if l.strip() and not l.lstrip().startswith('#')]
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
