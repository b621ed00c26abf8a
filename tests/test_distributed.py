"Two gloo processes on this machine: they train, score and write what one would, and survive each other."
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import BIN, TINY, root, run, start, wait_until, wsol

TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']
HERE = dict(PYTHONPATH=str(root))

RECIPE = '''
from dataclasses import dataclass

import torch
from wsol_nb.registry import method
from wsol_nb.train.method import Method
from fastai.callback.core import Callback

class Stripe(Callback):
    "A stripe of every image is grey, another one in each batch."
    def before_batch(self):
        if not self.training: return
        at = int(torch.randint(0, self.x.shape[-1] - 8, ()))
        x = self.x.clone()
        x[..., at:at + 8] = .5
        self.learn.xb = (x,)

@method(stages=1)
@dataclass
class Striped(Method):
    def callbacks(self): return [Stripe()]
'''


def test_two_processes_learn_what_one_does(tmp_path):
    """Plain CAM, F-CAM with its random seeds, and a method from somebody's own file, with a callback on the
    batch, that knows nothing of processes: the same weights and losses, to rounding."""
    recipe = tmp_path/'recipe.py'
    recipe.write_text(RECIPE)
    tool = [sys.executable, root/'tools/distributed.py', '--import', recipe, '--out', tmp_path]
    run(*tool, '--methods', 'GAP', 'FCAM', 'Striped')
    table = pd.read_csv(tmp_path/'distributed.csv').set_index('method')
    assert list(table.index) == ['GAP', 'FCAM', 'Striped'] and table.same.all(), table
    assert np.allclose(table.loss_one, table.loss_two, atol=1e-5)


PROGRAM = '''
import json, sys
import numpy as np
from wsol_nb.core import set_seed
from wsol_nb import HeadMaps, MapStore, WSOLDataLoaders, read_metadata, score_maps, write_maps, wsol_learner
from wsol_nb.data.worlds.disk import write_world
from wsol_nb.processes import every, joined, rank, world_size

root, out = sys.argv[1:]
write_world(root, n_train=16, n_val=9, n_test=7, progress=False) # before they have met: both at once
with joined(quiet=False):
    dls = WSOLDataLoaders.from_metadata(root, 'SYNTH', size=64, bs=6, device='cpu')
    learn = wsol_learner(dls, 'resnet10t', verbose=False)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.)
    set_seed(0)
    learn = wsol_learner(dls, 'resnet10t', verbose=False)
    store = write_maps(learn.localizer(), dls, 'test', f'{out}/maps', dtype=np.float64, progress=False)
    learn.rows = []
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    report = score_maps(store, read_metadata(root, 'SYNTH'), size=64, journal=f'{out}/journal.npz', every=0,
                        progress=False).to_dict()
    rows = every([learn.rows, report['boxes'], learn.dls.train.bs])
    assert all(json.dumps(r) == json.dumps(rows[0]) for r in rows), 'the processes disagree'
    if rank() == 0: json.dump([report, learn.rows, world_size()], open(f'{out}/report.json', 'w'))
'''


def test_worlds_maps_and_metrics(tmp_path):
    "Both write one world and share the maps; the scores and the log of validation are those of one process."
    script = tmp_path/'program.py'
    script.write_text(PROGRAM)
    found = {}
    for n, launch in ((1, [sys.executable]), (2, TORCHRUN)):
        out = tmp_path/str(n)
        out.mkdir()
        run(*launch, script, out/'data', out, env=HERE)
        report, rows, size = json.loads((out/'report.json').read_text())
        assert size == n and report['n'] == 7 and not [*out.glob('journal*')]
        assert len(rows) == 1 and len([*(out/'maps').rglob('*.npy')]) == 7
        assert not [*(out/'data').rglob('*.part')]
        found[n] = report
    one, two = (found[n]['boxes']['max_box_acc_v2'] for n in (1, 2))
    assert one == two


def processes_of(launcher):
    "{rank: process id} of what a launcher started."
    found = {}
    for p in Path('/proc').glob('[0-9]*'):
        try:
            parent = (p/'stat').read_text().rsplit(')', 1)[1].split()[1]
            said = dict(v.split('=', 1) for v in (p/'environ').read_text().split('\0') if '=' in v)
        except OSError: continue # it has ended
        if int(parent) == launcher.pid and 'RANK' in said: found[int(said['RANK'])] = int(p.name)
    return found


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads /proc')
@pytest.mark.parametrize('victim', [0, 1])
def test_a_process_is_killed(world, tmp_path, victim):
    "In the second epoch: the run ends with a sentence, and one process alone goes on after the first epoch."
    out = tmp_path/'run'
    train = ['--data', world, '--out', out, '--epochs', 40, *TINY]
    p = start(*TORCHRUN, '--no_python', BIN/'wsol_train', *train, env=HERE)
    wait_until((out/'checkpoint.pt').is_file, p)
    os.kill(processes_of(p)[victim], signal.SIGKILL)
    said, _ = p.communicate()
    assert p.returncode != 0
    survivor = f'another process of this run has ended, so process {1 - victim} of 2 stops too'
    assert survivor in said and '--resume continues after the last finished epoch' in said, said
    assert not (out/'model.safetensors').exists() and not [*out.rglob('*.part')]
    epochs = torch.load(out/'checkpoint.pt')['epoch'] + 1
    before = pd.read_csv(out/'history.csv')[:epochs]
    config = json.loads((out/'config.json').read_text())
    config['train']['epochs'] = epochs + 1
    (out/'config.json').write_text(json.dumps(config))
    wsol('train', '--out', out, '--resume')
    after = pd.read_csv(out/'history.csv')
    assert len(after) == epochs + 1
    pd.testing.assert_frame_equal(after[:epochs], before)
