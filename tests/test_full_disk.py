"A disk that is full indeed: what was there is there, what is missing is named, and the status is not 0."
import errno
import shutil
import subprocess

import numpy as np
import pytest
from helpers import TINY, digest, wsol
from PIL import Image

from wsol_nb.core import whole_file
from wsol_nb.data.metadata import read_metadata
from wsol_nb.data.stores import MapStore


@pytest.fixture
def disk(tmp_path):
    "Makes small disks of their own, which root may mount; they are gone after the test."
    made = []

    def make(size):
        folder = tmp_path/f'disk{len(made)}'
        folder.mkdir()
        mount = ['mount', '-t', 'tmpfs', '-o', f'size={size}', 'none', str(folder)]
        try: r = subprocess.run(mount, capture_output=True, text=True)
        except FileNotFoundError: pytest.skip('there is no mount')
        if r.returncode: pytest.skip(f'no disk can be mounted here: {r.stderr.strip()}')
        made.append(folder)
        return folder
    yield make
    for folder in made: subprocess.run(['umount', '-l', str(folder)], check=True)


def fill(disk, leave=0):
    "Take all room of a disk but some bytes; the file that takes it."
    ballast = disk/'ballast'
    with open(ballast, 'wb', buffering=0) as f:
        try:
            while True: f.write(bytes(4096))
        except OSError as e: assert e.errno == errno.ENOSPC
        f.truncate(f.tell() - leave)
    return ballast


def full(*args, **kw):
    "What a command says that meets a full disk."
    said = wsol(*args, code=1, **kw)
    assert 'No space left on device' in said and 'Traceback' not in said, said
    return said


def test_a_file_on_a_full_disk(disk):
    file = disk('256k')/'report.json'
    file.write_text('old')
    ballast = fill(file.parent)
    with pytest.raises(OSError, match='report.json: could not be written .No space.*; what was'):
        with whole_file(file) as part: part.write_bytes(bytes(100_000))
    there = {f.name for f in file.parent.iterdir()}
    assert file.read_text() == 'old' and there == {'report.json', 'ballast'}
    ballast.unlink()
    with whole_file(file) as part: part.write_text('new')
    assert file.read_text() == 'new'


def test_a_report(world, disk, tmp_path):
    "wsol_eval --maps again on a disk that has filled: the old report stays, and goes once there is room."
    df, out = read_metadata(world, 'SYNTH'), disk('2m')/'out'
    store, rng = MapStore(tmp_path/'maps'), np.random.default_rng(0)
    for i in df.image_id[df.split == 'test']: store.save(i, rng.random((64, 64)))
    score = ['eval', '--maps', tmp_path/'maps', '--metadata', world, '--size', 64, '--out', out]
    wsol(*score)
    before, ballast = digest(out), fill(out.parent)
    said = full(*score, '--mask-tau', .4)
    assert 'report-test.json: could not be written' in said and 'before is kept' in said
    assert digest(out) == before
    ballast.unlink()
    wsol(*score, '--mask-tau', .4)
    assert digest(out) != before and [f.name for f in out.iterdir()] == ['report-test.json']


def test_a_checkpoint(world, disk):
    "wsol_train on a disk that fills up: what the run had stays, and training goes on once there is room."
    out = disk('400m')/'run'
    wsol('train', '--data', world, '--out', out, '--epochs', 2, '--dry-run', *TINY)
    ballast = fill(out.parent, leave=30_000_000)
    said = full('train', '--data', world, '--out', out, '--epochs', 2, *TINY)
    assert 'could not be written' in said and f'{out}/' in said
    assert not [f for f in out.iterdir() if '.part' in f.name] and not (out/'model.safetensors').exists()
    ballast.unlink()
    there = (out/'checkpoint.pt').exists() or (out/'checkpoint-previous.pt').exists()
    wsol('train', *(['--out', out, '--resume'] if there else
                    ['--data', world, '--out', out, '--epochs', 2, '--overwrite', *TINY]))
    assert (out/'model.safetensors').is_file()


def test_an_import(disk, tmp_path):
    "Pictures that do not fit: no half dataset, and the one that was there stays, also with --overwrite."
    rng, source, out = np.random.default_rng(0), tmp_path/'in', disk('2m')/'data'
    for folder, n in (('few', 2), ('many', 30)):
        (source/folder).mkdir(parents=True)
        for k in range(n):
            Image.fromarray(rng.integers(0, 255, (150, 250, 3), np.uint8)).save(source/folder/f'{k}.png')
        lines = ''.join(f'{k}.png,owl,1,1,9,9\n' for k in range(n))
        (source/folder/'boxes.csv').write_text(f'image,label,x0,y0,x1,y1\n{lines}')
    said = full('data', 'import', source/'many', out)
    assert f'{out}: could not be written' in said and list(out.parent.iterdir()) == []
    wsol('data', 'import', source/'few', out)
    before = digest(out)
    full('data', 'import', source/'many', out, '--overwrite')
    assert digest(out) == before and list(out.parent.iterdir()) == [out]
    shutil.rmtree(out)
