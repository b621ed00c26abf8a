"make gpu: says so where there is no GPU, goes on after a failure, asks all of the registry, marks its rows."
import csv
import json
import os
import sys
import time

import pytest
import torch
from helpers import root, run

sys.path.insert(0, str(root/'tools'))
import gpu
import gpu_cells
import gpu_kit
import gpu_same
import gpu_speed

from wsol_nb.registry import entries

TOOL = root/'tools/gpu.py'


def part(tmp_path, name='trial', **kw):
    source = dict(device='cpu', quick=True, card=None, commit='abc')
    return gpu_kit.Part(name, 'cpu', True, tmp_path, time.time() + 600, source, **kw)


def rows(file):
    with open(file, newline='') as f: return list(csv.DictReader(f))


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_without_a_gpu_it_says_so_at_once():
    "Without torch even: the interpreter sees no installed package."
    r = run(sys.executable, '-S', TOOL, code=2)
    assert r.stderr.startswith('make gpu: this machine shows no CUDA device') and not r.stdout
    assert '--device cpu --quick' in r.stderr


def test_figures_that_do_not_count_go_elsewhere(capsys):
    assert gpu.options(['--device', 'cpu']).out == root/'gpu-quick' == gpu.options(['--quick']).out
    assert gpu.options([]).out == root/'nbs/results'
    with pytest.raises(SystemExit) as e: gpu.options(['--device', 'cpu', '--out', str(root/'nbs/results')])
    assert e.value.code == 2 and 'do not belong there' in capsys.readouterr().err
    assert 'gpu-quick/' in (root/'.gitignore').read_text()


def test_no_figure_of_a_cpu_is_among_the_results():
    for file in (root/'nbs/results').glob('gpu-*.csv'):
        assert all(r['device'] == 'cuda' and r['quick'] == 'False' for r in rows(file)), file.name


BROKEN = """
import os, sys, time
sys.path.insert(0, {tools!r})
import gpu
def raises(part):
    part.add(name='before', value=1.5)
    raise ValueError('broken on purpose')
def dies(part): os._exit(7)
def hangs(part): time.sleep(60)
def works(part): part.add(name='works', value=2.)
sys.modules['broken'] = sys.modules['__main__']
gpu.__file__ = __file__
gpu.GRACE, gpu.SECONDS = 0, {{True: 120}}
names = 'raises', 'dies', 'hangs', 'works'
shares = dict(raises=20, dies=20, hangs=1, works=20)
gpu.PARTS = {{n: ('broken', n, shares[n], shares[n], n) for n in names}}
gpu.NEEDED = ['torch']
gpu.main()
"""


def test_a_failing_part_stops_no_other(tmp_path):
    "An exception, a process that dies, one that hangs: the last part runs, the table says what happened."
    script, out = tmp_path/'broken.py', tmp_path/'out'
    script.write_text(BROKEN.format(tools=str(root/'tools')))
    r = run(sys.executable, script, '--device', 'cpu', '--quick', '--out', out, '--commit', 'abc', code=1)
    found = {d['part']: d for d in rows(out/'gpu-parts.csv')}
    assert 'ValueError: broken on purpose' in found['raises']['failed'] and found['raises']['rows'] == '1'
    assert 'exit 7' in found['dies']['failed'] and 'stopped after' in found['hangs']['failed']
    assert not found['works']['failed'] and found['works']['rows'] == '1'
    assert 'raises failed: ' in r.stdout and 'works' in r.stdout.split('outcome')[1]
    row, = rows(out/'gpu-works.csv')
    assert row['device'] == 'cpu' and row['quick'] == 'True' and row['card'] == '' and row['commit'] == 'abc'


def test_time_that_is_gone_is_said(tmp_path):
    p = part(tmp_path)
    done = []
    for name in p.each(['a', 'b', 'c']):
        done.append(name)
        if name == 'b': p.until = time.time()
    assert done == ['a', 'b'] and p.cut == {'no time': ['c']}
    with p.guard('full'): raise gpu_kit.OUT_OF_MEMORY('no memory')
    with p.guard('wrong'): raise KeyError('x')
    assert p.cut['out of memory'] == ['full'] and p.failed == ["wrong: KeyError: 'x'"]


def test_shares_of_the_time():
    "What a part leaves is there for those after it."
    names = list(gpu.PARTS)
    assert gpu.share(names[-1:], 100, False) == 100
    assert sum(gpu.share([n, *names], 1, True) < 1 for n in names) == len(names)


def test_conformance_asks_all_of_the_registry(tmp_path, monkeypatch):
    "Every registered localizer and head has a row, and every loss; all answer in float64 too."
    answers = {}

    def compare(part, kind, name, answer, *tolerances): answers[kind, name] = answer('cpu', torch.float64)
    monkeypatch.setattr(gpu_same, 'compare', compare)
    p = part(tmp_path)
    gpu_same.localizers(p)
    gpu_same.heads(p)
    gpu_same.losses(p)
    said = {(r['kind'], r['name']) for r in p.rows}
    for kind in ('localizer', 'head'):
        for name in entries(kind): assert (kind, name) in answers or (kind, name) in said, name
    names = {name for _, name in answers}
    assert {'DenseCRFLoss', 'SizePenalty', 'partial_cross_entropy', 'sample_seeds', 'otsu_threshold'} <= names
    assert not p.failed and all(gpu_same.difference(a, a) == 0 for a in answers.values())


def test_scores_are_compared(tmp_path):
    "All figures of a report, on a world that is written for it."
    p = part(tmp_path)
    gpu_same.scores(p)
    assert not p.failed and not p.cut, (p.failed, p.cut)
    row, = rows(tmp_path/'gpu-trial.csv')
    assert row['kind'] == 'scores' and row['same'] == 'True' and 'evaluate: ' in row['name']


def test_conformance_sees_a_difference(tmp_path):
    p = part(tmp_path)
    calls = iter(range(99))
    gpu_same.compare(p, 'loss', 'near', lambda _, dtype: torch.ones(3, dtype=dtype) + 1e-9*next(calls))
    gpu_same.compare(p, 'loss', 'far', lambda _, dtype: torch.ones(3, dtype=dtype)*next(calls))
    nan = torch.full((3,), float('nan'))
    gpu_same.compare(p, 'loss', 'nan', lambda *_: (torch.ones(3), nan))
    assert [r['same'] for r in p.rows] == [True, False, False]
    assert len(p.failed) == 4 and 'far: float64 differs by' in p.failed[0]


def test_cells_for_a_gpu_run_with_what_they_need(tmp_path, monkeypatch):
    "Imports, exports and what binds their names come before them, and no other cell."
    cells = ['#| hide\nimport math', '#| export\ndef double(x): return 2*x', 'raise ValueError', 'a = 4',
             'b = double(a)', '#| slow\nb = 0', '#| cuda\nprint(math.sqrt(b + 1))']
    assert gpu_cells.needed(cells, 6) == [0, 1, 3, 4]
    nb = tmp_path/'nbs/some.ipynb'
    nb.parent.mkdir()
    nb.write_text(json.dumps(dict(cells=[dict(cell_type='code', source=[c]) for c in cells])))
    monkeypatch.setattr(gpu_cells.house, 'notebooks', lambda: [nb])
    monkeypatch.setattr(gpu_cells.house, 'root', tmp_path)
    monkeypatch.chdir(tmp_path)
    p = part(tmp_path)
    gpu_cells.cells(p)
    found = [(r['notebook'], r['cell'], r['printed']) for r in p.rows]
    assert found == [('some.ipynb', 6, '3.0')] and not p.failed
    monkeypatch.undo()
    assert any(nb.name == '02_crf.ipynb' for nb, _ in gpu_cells.notebooks())


def test_what_wheels_bring(tmp_path, monkeypatch, capsys):
    "Only what this Python lacks; a folder without wheels, and one that pip cannot use, are errors."
    for name in ('torch-9.9-py3-none-any.whl', 'Not_There.x-1.0-py3-none-any.whl'): (tmp_path/name).touch()
    assert gpu.lacking(tmp_path) == ['not-there-x']
    with pytest.raises(SystemExit): gpu.install(tmp_path, tmp_path/'place')
    assert 'pip could not install' in capsys.readouterr().err
    with pytest.raises(SystemExit): gpu.lacking(tmp_path/'nowhere')
    assert 'there is no wheel in it' in capsys.readouterr().err


def test_the_page_shows_every_part():
    "Its tables are made anew where the site is made (`exec_doc`), from whatever was measured."
    page = json.loads((root/'nbs/tutorials/gpu.ipynb').read_text(encoding='utf-8'))['cells']
    shown = [''.join(c['source']) for c in page if c['cell_type'] == 'code']
    for name in [*gpu.PARTS, 'parts']:
        assert any(s.startswith(f"#| exec_doc\nshow('{name}',") for s in shown), name


def test_a_package_that_is_missing_is_named(capsys, monkeypatch):
    monkeypatch.setattr(gpu, 'NEEDED', ['torch', 'surely_not_there'])
    with pytest.raises(SystemExit): gpu.check('cpu', None)
    assert 'lacks surely_not_there' in capsys.readouterr().err


def test_what_only_a_card_can_say(tmp_path, monkeypatch):
    "With a card that is made up: its driver, the peak of its memory, the largest batch that fits."
    smi = tmp_path/'nvidia-smi'
    smi.write_text('#!/bin/sh\necho 580.1')
    smi.chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path), prepend=os.pathsep)
    held, asked = iter([2**20, 5*2**20]), []
    fakes = dict(synchronize=lambda: asked.append('wait'), memory_allocated=lambda: next(held),
                 reset_peak_memory_stats=lambda: asked.append('reset'), empty_cache=lambda: None,
                 max_memory_allocated=lambda: next(held), is_available=lambda: True,
                 get_device_name=lambda: 'A card')
    for name, f in fakes.items(): monkeypatch.setattr(torch.cuda, name, f)
    said = gpu_kit.measured_on('cuda', False, 'abc', 'x')
    assert (said['card'], said['driver'], said['device'], said['quick']) == ('A card', '580.1', 'cuda', False)
    assert gpu_kit.peak_mb(lambda: asked.append('call'), 'cuda') == 4
    assert asked == ['wait', 'reset', 'call', 'wait']

    class Step:
        by, side = 'timm', 224
        def batch(self, bs): self.bs = bs
        def __call__(self):
            if self.bs > 600: raise gpu_kit.OUT_OF_MEMORY('full')
    p = part(tmp_path)
    gpu_speed.largest(p, Step(), 'net', 'bf16')
    assert p.rows[0]['largest_batch'] == 512


def test_one_part_to_its_table(tmp_path):
    "The memory of a training step on a small net, as a command."
    r = run(sys.executable, TOOL, '--device', 'cpu', '--quick', '--parts', 'memory', '--out', tmp_path)
    found = rows(tmp_path/'gpu-memory.csv')
    assert found and {r['net'] for r in found} == {'resnet10t', 'test_vit'} and 'memory' in r.stdout
    for row in found:
        assert row['quick'] == 'True' and row['device'] == 'cpu' and not row['card'] and row['hardware']
        assert float(row['weights_mb']) > 0 and float(row['step_mb']) > 0
