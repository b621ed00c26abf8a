"The registry as users meet it: names, runs saved long ago, files of their own, other packages."
import json
import os
import sys
import types
from dataclasses import dataclass

import pytest
from helpers import ENV, TINY, raises, refused, run, wsol


def fresh(code, *path):
    "What a process of its own prints, with more folders to import from."
    more = os.pathsep.join([*map(str, path), *filter(None, [ENV.get('PYTHONPATH')])])
    return run(sys.executable, '-c', code, env=dict(PYTHONPATH=more)).stdout.strip()


@pytest.fixture
def my_gap(monkeypatch):
    "A user's own class of the name GAP, in a module of theirs, without a decorator."
    from wsol_nb.train.method import Method
    module = types.ModuleType('my_gap')
    monkeypatch.setitem(sys.modules, 'my_gap', module)
    module.GAP = dataclass(type('GAP', (Method,), {'__module__': 'my_gap', '__doc__': 'Mine.'}))
    return module.GAP


def test_a_run_saved_before_the_move_loads(my_gap):
    from wsol_nb.train.method import GAP, method_from_dict, method_to_dict
    old = {'name': 'GAP', 'module': 'wsol_nb.learner', 'params': {'targets': 'multi'}}
    assert type(method_from_dict(old)) is GAP and method_from_dict(old).targets == 'multi'
    assert type(method_from_dict(json.loads(json.dumps(method_to_dict(GAP()))))) is GAP
    assert type(method_from_dict(method_to_dict(my_gap()))) is my_gap, 'theirs stays theirs'


def test_an_old_run_of_a_class_that_is_gone_says_so():
    from wsol_nb.train.method import method_from_dict
    with pytest.raises(ValueError, match='wsol_nb.learner:Gone: is not there'):
        method_from_dict({'name': 'Gone', 'module': 'wsol_nb.learner', 'params': {}})


@pytest.mark.parametrize('name', ['GradCAM', 'gradcam', 'GRADCAM'])
def test_a_taken_name_is_refused_in_any_case(name):
    from wsol_nb.cam.gradient import GradCAM
    from wsol_nb.localize.base import Localizer, find_localizer
    from wsol_nb.registry import localizer
    mine = type(name, (Localizer,), {'__module__': 'my_maps', '__doc__': 'Mine.'})
    register = localizer(needs='gradients')
    raises(f'my_maps:{name}', register, mine)
    raises('wsol_nb.cam.gradient:GradCAM', register, mine)
    assert find_localizer(name) is GradCAM


def test_a_gap_of_ones_own_cannot_be_registered(my_gap):
    from wsol_nb.registry import method
    with pytest.raises(ValueError, match='my_gap:GAP has the name of wsol_nb.train.method:GAP'):
        method()(my_gap)


@pytest.mark.parametrize('name, home, fastai', [('gradcam', 'wsol_nb.cam.gradient', False),
                                                ('quietmaps', 'wsol_nb.dense.negev', True)])
def test_a_name_imports_its_own_module_and_no_more(name, home, fastai):
    "QuietMaps is at home beside NEGEV, a method, which needs fastai; GradCAM is not."
    probe = f"""
import sys
from wsol_nb.localize.base import find_localizer
assert {home!r} not in sys.modules and 'fastai' not in sys.modules
print(find_localizer({name!r}).__module__, 'fastai' in sys.modules, 'wsol_nb.cam.score' in sys.modules)"""
    assert fresh(probe) == f'{home} {fastai} False'
    itself = f"import sys, {home}; print('fastai' in sys.modules)"
    assert fresh(itself) == str(fastai), 'what its module needs'


def test_what_is_no_finished_class_is_not_found():
    import wsol_nb.cam.score
    import wsol_nb.dense.negev
    from wsol_nb.registry import entries, find
    unfinished = dict(localizer=['Localizer', 'LayerLocalizer', 'ChannelLocalizer', 'BoxLocalizer'],
                      head=['Head', 'BagHead'], method=['Method', 'SecondStage', 'SeededMaps'])
    assert hasattr(wsol_nb.cam.score, 'ChannelLocalizer') and hasattr(wsol_nb.dense.negev, 'SeededMaps')
    for kind, names in unfinished.items():
        for name in names:
            with pytest.raises(ValueError, match=f"{kind} '{name}'"): find(kind, name)
    assert not [n for kind in unfinished for n in entries(kind) if n.startswith('_')]


def test_a_field_that_no_head_takes_is_named():
    from wsol_nb.nets.heads import LSEHead
    from wsol_nb.train.method import Method

    @dataclass
    class Sharp(Method):
        Head = LSEHead
        sharpness: float = 5.

    message = 'sharpness: Sharp declares it, but LSEHead has no such parameter; it takes r'
    with pytest.raises(ValueError, match=message): Sharp().model('resnet10t', 3)


MINE = '''
from dataclasses import dataclass
from wsol_nb.nets.heads import LSEHead
from wsol_nb.registry import method
from wsol_nb.train.method import Method

@method()
@dataclass
class Mine(Method):
    "Log-sum-exp, but softer."
    Head = LSEHead
    r: float = 2.
'''


def test_a_file_of_ones_own_trains_and_is_scored(world, tmp_path, monkeypatch):
    file, out = tmp_path/'my_methods.py', tmp_path/'run'
    file.write_text(MINE)
    train = ['--data', world, '--out', out, '--method', 'mine', '--params', 'r=3', '--epochs', 1, *TINY]
    line = refused(monkeypatch, 'train', *train)
    assert "method='mine'" in line and '--import its file' in line and '\n' not in line
    wsol('train', '--import', file, *train)
    config = json.loads((out/'config.json').read_text())
    assert config['method'] == dict(name='Mine', module='my_methods', params=dict(targets='single', r=3))
    line = refused(monkeypatch, 'eval', out)
    assert 'my_methods:Mine' in line and '--import the file that defines it' in line and '\n' not in line
    assert 'MaxBoxAccV2' in wsol('eval', out, '--import', file, '--bootstrap', 0)


MORE = '''
from wsol_nb.localize.base import HeadMaps
from wsol_nb.registry import localizer

@localizer(needs='class maps')
class MoreMaps(HeadMaps): "Class maps, by another name."
'''


def test_another_package_registers_by_entry_point(tmp_path):
    "Its module is imported when a name is asked for that nobody else has, and not before."
    info = tmp_path/'wsol_more-1.0.dist-info'
    info.mkdir()
    (info/'METADATA').write_text('Metadata-Version: 2.1\nName: wsol-more\nVersion: 1.0\n')
    (info/'entry_points.txt').write_text('[wsol_nb]\nmore = wsol_more\n')
    (tmp_path/'wsol_more.py').write_text(MORE)
    probe = """
import sys
from wsol_nb.localize.base import find_localizer
from wsol_nb.registry import entries
find_localizer('headmaps')
before = 'wsol_more' in sys.modules
print(before, find_localizer('moremaps').__module__, 'MoreMaps' in entries('localizer'))"""
    assert fresh(probe, tmp_path) == 'False wsol_more True'
