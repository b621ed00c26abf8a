"The recipes of CONTRIBUTING.md do what it says: a notebook, and the class is there for everyone."
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from helpers import BIN, digest, root, run

TEMPLATE = root/'nbs/_templates/template.ipynb'
# what each recipe registers, kind and name
MAKES = {'nbs/5_methods/02_mixed.ipynb': [('head', 'MixedHead'), ('method', 'Mixed')],
         'nbs/3_cam/08_positive.ipynb': [('localizer', 'PositiveCAM')],
         'nbs/6_dense/06_sure.ipynb': [('method', 'SureMaps')]}


def recipes():
    "{notebook: listing} of CONTRIBUTING.md."
    text = (root/'CONTRIBUTING.md').read_text(encoding='utf-8')
    one = r'^### [^\n]*`(nbs/\S+\.ipynb)`\n.*?^```python\n(.*?)^```'
    return dict(re.findall(one, text, flags=re.M | re.S))


def notebook(listing):
    "A listing whose cells begin with `# %%` as a notebook."
    cells = []
    parts = re.findall(r'^# %%( \[markdown\])?\n(.*?)(?=^# %%|\Z)', listing, flags=re.M | re.S)
    for i, (kind, source) in enumerate(parts):
        source = source.strip('\n')
        if kind: cell = dict(cell_type='markdown', source=re.sub(r'^# ?', '', source, flags=re.M))
        else: cell = dict(cell_type='code', source=source, execution_count=None, outputs=[])
        cells.append(cell | dict(id=f'cell{i}', metadata={}))
    spec = dict(display_name='python3', language='python', name='python3')
    return dict(cells=cells, metadata=dict(kernelspec=spec), nbformat=4, nbformat_minor=5)


def code(nb): return '\n'.join(''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'code')


class Copy:
    "The tracked files of this checkout, elsewhere, and commands that see only them."
    def __init__(self, path):
        self.path = path
        listed = run('git', 'ls-files', '-z', cwd=root).stdout
        for name in filter(None, listed.split('\0')):
            (path/name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root/name, path/name, follow_symlinks=False)

    def run(self, *args):
        "What a command prints."
        return run(*args, env=dict(PYTHONPATH=str(self.path), MPLBACKEND='agg'), cwd=self.path).stdout

    def python(self, *args): return self.run(sys.executable, *args)

    def pytest(self, *args): return self.python('-m', 'pytest', '-p', 'no:cacheprovider', *args)

    def sync(self):
        self.run(BIN/'nbdev_export')
        for tool in ('index', 'sidebar', 'readme'): self.python(f'tools/{tool}.py')


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "A copy in which every recipe was followed; `touched` is what each changed."
    if not (root/'.git').exists(): pytest.skip('no git checkout: the tracked files are not known')
    copy = Copy(tmp_path_factory.mktemp('recipes')/'wsol_nb')
    copy.touched, before = {}, digest(copy.path)
    for name, listing in recipes().items():
        assert not (copy.path/name).exists(), f'{name} is taken'
        (copy.path/name).write_text(json.dumps(notebook(listing), indent=1), encoding='utf-8')
        copy.sync()
        after = digest(copy.path)
        copy.touched[name] = {f for f in before.keys() | after.keys() if before.get(f) != after.get(f)}
        before = after
    return copy


def test_every_recipe_is_read(): assert list(recipes()) == list(MAKES)


@pytest.mark.parametrize('name', MAKES)
def test_listing_has_the_form_of_a_notebook(name):
    "That of the house, and of the template."
    import test_house
    cells = notebook(recipes()[name])['cells']
    assert re.match(r'# \S.*\n\n> \S', cells[0]['source']) and cells[0]['cell_type'] == 'markdown'
    assert re.match(r'#\| default_exp \S+$', cells[1]['source'])
    assert 'assert' in cells[-1]['source'] and not cells[-1]['source'].startswith('#|')
    test_house.test_notebook_form(TEMPLATE)


MADE = {'wsol_nb/_modidx.py', 'wsol_nb/_index.py', 'README.md', 'nbs/index.ipynb',
        '_quarto.yml', 'nbs/_quarto.yml'} # the latter is a link


def test_a_recipe_is_one_notebook_and_what_is_made_from_it(copy):
    for name, touched in copy.touched.items():
        module = re.search(r'^#\| default_exp (\S+)', recipes()[name], flags=re.M)[1].replace('.', '/')
        assert touched == {name, f'wsol_nb/{module}.py'} | MADE


LOOK = """
import sys
sys.path.insert(0, 'tools')
import docs
for line in (*docs.check_sidebar(), *docs.check_links()): print(line)"""


def test_the_house_wants_nothing_else(copy):
    assert copy.python('-c', LOOK) == ''
    form = 'imports_go_down or test_modules or test_index or notebook_form and (mixed or positive or sure)'
    copy.pytest('-q', 'tests/test_house.py', '-k', form)


def test_the_class_is_known(copy):
    "By name, and at the front door, without its module being imported before."
    made = [m for names in MAKES.values() for m in names]
    probe = 'import wsol_nb\nfrom wsol_nb.registry import find\nprint(wsol_nb.__file__)\n'
    for kind, name in made:
        probe += f'assert find({kind!r}, {name.lower()!r}).__name__ == {name!r}\nfrom wsol_nb import {name}\n'
    assert Path(copy.python('-c', probe).strip()) == copy.path/'wsol_nb/__init__.py'


def test_lessons_pass(copy, tmp_path):
    "All cells in their order, for each recipe and for the template, as which a notebook runs: __main__."
    notebooks = [*map(notebook, recipes().values()), json.loads(TEMPLATE.read_text(encoding='utf-8'))]
    scripts = list(map(code, notebooks))
    for i, script in enumerate(scripts): (tmp_path/f'{i}.py').write_text(script, encoding='utf-8')
    probe = 'import runpy, sys\nfor file in sys.argv[1:]: runpy.run_path(file, run_name="__main__")'
    copy.python('-c', probe, *(tmp_path/f'{i}.py' for i in range(len(scripts))))


def test_conformance_asks_the_new_classes(copy):
    listed = copy.pytest('--collect-only', '-q', 'tests/test_conformance.py')
    for test in ('test_shape_range_dtype[PositiveCAM-resnet10t]', 'test_layers[PositiveCAM]',
                 'test_ten_architectures[PositiveCAM-resnet50]', 'test_methods[Mixed]',
                 'test_shape_range_dtype[HeadMaps-Mixed-resnet10t]', 'test_methods[SureMaps]'):
        assert f'tests/test_conformance.py::{test}' in listed.splitlines(), test


def test_the_command_line_trains_them(copy, world, tmp_path):
    "The head's method is the first stage of the other, whose seeds come from the new localizer."
    train = [BIN/'wsol_train', '--data', world, '--size', 64, '--bs', 8, '--epochs', 1]
    copy.run(*train, '--out', tmp_path/'one', '--method', 'mixed', '--params', 'share=0.25',
             '--arch', 'resnet10t', '--pretrained', 'false')
    copy.run(*train, '--out', tmp_path/'two', '--method', 'suremaps', '--stage1', tmp_path/'one',
             '--seeds', 'positivecam')
    one, two = (json.loads((tmp_path/run/'config.json').read_text())['method'] for run in ('one', 'two'))
    assert one == dict(name='Mixed', module='wsol_nb.methods.mixed', params=dict(targets='single', share=.25))
    assert (tmp_path/'two/model.safetensors').is_file()
    assert two['module'] == 'wsol_nb.dense.sure' and two['params']['classifier'] == one
    assert two['params']['seeds'] == 'positivecam'
