"A grid of trainings that is killed ends in the table of one that is left alone."
import random
import sys
import time

import pandas as pd
from helpers import start, wait_until

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
    return [dict(accuracy=report.accuracy['top1'], V2=report.boxes['max_box_acc_v2'],
                 PxAP=report.pixels['pxap']['value'])]

jobs = combinations(base, method={m.__name__: dict(method=method_to_dict(m())) for m in (GAP, LSE)},
                    seed={s: dict(data=dict(seed=s)) for s in (0, 1, 2)})
sys.exit(len(run_grid(jobs, runs, csv, score, 'a test', say=lambda s: print(s, flush=True))))
'''


def test_killed_three_times(world, tmp_path):
    (tmp_path/'plan.py').write_text(PLAN)
    alone, killed = tmp_path/'alone', tmp_path/'killed'

    def grid(folder):
        return start(sys.executable, tmp_path/'plan.py', world, folder/'runs', folder/'table.csv')

    def finish(process):
        text = process.communicate()[0]
        assert process.returncode == 0, text

    finish(grid(alone))
    draw, begun = random.Random(0), lambda: len(list(killed.glob('runs/*/checkpoint.pt')))
    for stop in (1, 3, 5): # in the first, the third and the fifth run
        p = grid(killed)
        wait_until(lambda: begun() >= stop, p)
        time.sleep(draw.random()*.3)
        p.kill()
        p.communicate()
    finish(grid(killed))
    read = lambda d: pd.read_csv(d/'table.csv').drop(columns=['hardware', 'commit', 'command'])
    pd.testing.assert_frame_equal(read(killed), read(alone))
    assert len(read(alone)) == 6
