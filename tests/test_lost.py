"""Nothing of a run is lost: two trainings in one folder, other data or settings on the way, damaged files,
a full disk, a narrow terminal, a loss that is no number, a kill at any moment."""
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import BIN, ENV, TINY, digest, refused, root, run, start, wait_until, wsol


@pytest.fixture(scope='module')
def cut(world, tmp_path_factory):
    "A run whose training was killed after its first epoch, and its data, a plain folder of classes."
    folder = tmp_path_factory.mktemp('cut')
    data = shutil.copytree(world/'SYNTH/train', folder/'data')
    p = start(BIN/'wsol_train', '--data', data, '--out', folder/'run', '--epochs', 50, *TINY)
    wait_until((folder/'run/checkpoint-previous.pt').is_file, p)
    p.kill()
    p.communicate()
    config = json.loads((folder/'run/config.json').read_text())
    epochs = len((folder/'run/history.csv').read_text().splitlines())
    config['train']['epochs'] = epochs # at least one is left
    (folder/'run/config.json').write_text(json.dumps(config))
    return folder


@pytest.fixture
def folder(cut, tmp_path):
    "A copy of it, to be spoilt."
    copy = shutil.copytree(cut, tmp_path/'copy', ignore=shutil.ignore_patterns('.holder.json', '.lock'))
    config = json.loads((copy/'run/config.json').read_text())
    config['data']['root'] = str(copy/'data')
    (copy/'run/config.json').write_text(json.dumps(config))
    return copy


def test_two_trainings_into_one_folder(world, tmp_path):
    "The second says who is there; when the first is killed the folder is free."
    train = ['--data', world, '--out', tmp_path/'run', *TINY]
    p = start(BIN/'wsol_train', *train, '--epochs', 50)
    wait_until((tmp_path/'run/history.csv').is_file, p)
    said = wsol('train', *train, '--epochs', 1, code=1)
    assert f'process {p.pid} on' in said and 'is training there' in said
    p.kill()
    p.communicate()
    assert 'a run is there already; --resume' in wsol('train', *train, '--epochs', 1, code=1)
    keep = tmp_path/'run/mine.txt'
    keep.write_text('mine')
    wsol('train', *train, '--epochs', 1, '--overwrite')
    assert (tmp_path/'run/model.safetensors').is_file() and keep.read_text() == 'mine'


def test_other_settings_and_classes(folder):
    "What is typed beside --resume, and the classes on the disk, must be those of the run."
    run, data = folder/'run', folder/'data'
    before = digest(run)
    assert 'lr is 0.005 there, 0.5 was typed' in wsol('train', '--out', run, '--resume', '--lr', .5, code=1)
    first = sorted(p for p in data.iterdir())[0]
    first.rename(data/'zebra')
    assert f'class 0 was {first.name!r}' in wsol('train', '--out', run, '--resume', code=1)
    assert {f: h for f, h in digest(run).items() if f != '.lock'} == before
    (data/'zebra').rename(first)
    next(first.iterdir()).unlink()
    assert 'there were' in wsol('train', '--out', run, '--resume')


def test_damaged_files(folder):
    run = folder/'run'
    (run/'checkpoint.pt').write_bytes((run/'checkpoint.pt').read_bytes()[:2000])
    said = wsol('train', '--out', run, '--resume')
    assert 'checkpoint.pt: is damaged' in said and 'going on from the checkpoint before' in said
    weights = run/'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:-100])
    assert 'model.safetensors: is damaged' in wsol('localize', run, folder/'data', code=1)
    (run/'config.json').write_text('{"schema": 1, ')
    assert 'config.json: is damaged' in wsol('eval', run, code=1)
    (run/'model.safetensors').unlink()


def test_a_full_disk(folder):
    "No file may grow past 100 kB: the training ends in a sentence and what was there is there."
    run = folder/'run'
    before = digest(run)
    def small_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    r = subprocess.run([BIN/'wsol_train', '--out', run, '--resume'], env=ENV, capture_output=True, text=True,
                       preexec_fn=small_files)
    assert r.returncode == 1 and 'could not be written' in r.stderr and 'Traceback' not in r.stderr, r.stderr
    after = digest(run)
    assert {f for f in before if after.get(f) != before[f]} <= {'history.csv', 'config.json'}
    wsol('train', '--out', run, '--resume')
    assert (run/'model.safetensors').is_file()


def test_a_loss_that_is_no_number(world, tmp_path):
    train = ['--data', world, '--out', tmp_path/'run', '--epochs', 3, *TINY]
    said = wsol('train', *train, '--lr', 1e12, '--lr-head', 1e12, code=1)
    assert 'of epoch 1; what was kept' in said and 'loss: ' in said and 'Traceback' not in said
    assert not (tmp_path/'run/model.safetensors').exists()


@pytest.mark.parametrize('encoding', ['ascii', 'cp1252'])
def test_a_narrow_terminal(world, tmp_path, encoding):
    train = ['--data', world, '--out', tmp_path/'run', '--epochs', 1, *TINY]
    wsol('train', *train, env=dict(PYTHONIOENCODING=encoding), errors='replace')
    assert (tmp_path/'run/model.safetensors').is_file()


def test_a_reader_that_leaves(world):
    "`| head -1` ends the reader, not the command, and nothing is said of it."
    piped = f'{BIN}/wsol_data check {world} | head -1; exit ${{PIPESTATUS[0]}}'
    r = subprocess.run(piped, shell=True, executable='/bin/bash', env=ENV, capture_output=True, text=True)
    assert r.returncode == 0 and not r.stderr, r.stderr


HALF = """
import os, signal, sys
from wsol_nb.core import whole_file
with whole_file(sys.argv[1]) as part:
    part.write_text('half')
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_parts_of_a_killed_writer(tmp_path):
    "What a killed process has half written goes when the next one writes into the folder, whatever the file."
    from wsol_nb.core import part_beside, whole_file
    run(sys.executable, '-c', HALF, tmp_path/'old.txt', code=-signal.SIGKILL)
    (left,) = tmp_path.iterdir()
    at_work, mine = part_beside(tmp_path/'b.txt'), tmp_path/'film.part'
    for file in (at_work, mine): file.touch()
    with whole_file(tmp_path/'a.txt') as part: part.write_text('whole')
    assert set(tmp_path.iterdir()) == {tmp_path/'a.txt', at_work, mine}


def test_a_checkpoint_is_always_there(world, tmp_path, monkeypatch):
    "At no change of names is the run without its last checkpoint."
    from wsol_nb.data.loaders import WSOLDataLoaders
    from wsol_nb.train.checkpoint import Checkpoint
    from wsol_nb.train.learner import wsol_learner
    replace, seen = os.replace, []

    def watched(part, path):
        there = (tmp_path/'checkpoint.pt').is_file()
        replace(part, path)
        if Path(path).parent != tmp_path: return # numba writes its own
        seen.append((Path(path).name, there, (tmp_path/'checkpoint.pt').is_file()))
    monkeypatch.setattr(os, 'replace', watched)
    dls = WSOLDataLoaders.from_metadata(world, 'SYNTH', size=64, bs=8, num_workers=0)
    learn = wsol_learner(dls, 'test_resnet', cbs=Checkpoint(tmp_path), path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-3)
    names = [name for name, *_ in seen]
    first = names.index('checkpoint.pt')
    assert names[first + 1:] == ['history.csv', 'checkpoint-previous.pt', 'checkpoint.pt']
    assert all(there and stays for _, there, stays in seen[first + 1:])


def test_nothing_to_resume(tmp_path, monkeypatch):
    "A training that was killed before it wrote anything: the message says what to do."
    said = refused(monkeypatch, 'train', '--out', tmp_path, '--resume')
    assert 'no run has begun' in said and 'the same command without --resume begins one' in said


def test_kills():
    "A small part of `python tools/kills.py --at writes`: killed before a change of a file, and called again."
    said = run(sys.executable, root/'tools/kills.py', 4, '--at', 'writes', '--seed', 3).stdout
    assert said.splitlines()[5].split()[:2] == ['all', '4'] and said.splitlines()[5].endswith(' 0'), said
