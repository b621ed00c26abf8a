"A grid of trainings that is killed ends in the table of one that is left alone."
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd

PLAN = '''
import sys
from wsol_nb import LSE, GAP, evaluate
from wsol_nb.train.grid import combinations, run_grid
from wsol_nb.train.method import method_to_dict

data, runs, csv = sys.argv[1:]
base = dict(schema=1, arch='test_resnet', stride=8, pretrained=False,
            data=dict(kind='metadata', root=data, dataset='SYNTH', size=48, bs=8, roles={}),
            train=dict(epochs=3, opt='adamw', lr=5e-3, lr_head=5e-3, wd=.05))

def score(run):
    report = evaluate(run.localizer(), run.dls(), 'test', tau_from=None, bootstrap=0, progress=False)
    return [dict(accuracy=report.accuracy['top1'], V2=report.boxes['max_box_acc_v2'], PxAP=report.pixels['pxap']['value'])]

jobs = combinations(base, method={m.__name__: dict(method=method_to_dict(m())) for m in (GAP, LSE)},
                    seed={s: dict(data=dict(seed=s)) for s in (0, 1, 2)})
sys.exit(len(run_grid(jobs, runs, csv, score, 'a test', say=lambda s: print(s, flush=True))))
'''


def start(world, folder):
    args = [sys.executable, folder.parent/'plan.py', world, folder/'runs', folder/'table.csv']
    env = os.environ | dict(OMP_NUM_THREADS='1')
    return subprocess.Popen([*map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def test_killed_three_times(world, tmp_path):
    (tmp_path/'plan.py').write_text(PLAN)
    alone, killed = tmp_path/'alone', tmp_path/'killed'
    assert start(world, alone).wait() == 0
    draw, begun = random.Random(0), lambda: len(list(killed.glob('runs/*/checkpoint.pt')))
    for stop in (1, 3, 5): # in the first, the third and the fifth run
        p = start(world, killed)
        while begun() < stop and p.poll() is None: time.sleep(.02)
        time.sleep(draw.random()*.3)
        p.send_signal(signal.SIGKILL)
        p.communicate()
    p = start(world, killed)
    text = p.communicate()[0]
    assert p.returncode == 0, text
    read = lambda d: pd.read_csv(d/'table.csv').drop(columns=['hardware', 'commit', 'command'])
    pd.testing.assert_frame_equal(read(killed), read(alone))
    assert len(read(alone)) == 6
