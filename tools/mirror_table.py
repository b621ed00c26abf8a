"""How far off a map is drawn

    python tools/mirror_table.py RUN [RUN ...] [--localizers headmaps layercam]

The map of an image and that of its mirror image, turned back, should agree. For each run they are moved
against each other by whole pixels, on training images and without any box; the table names the move at which
they agree best (median correlation away from the border), and how well they agree there and unmoved. Beside
it, MaxBoxAcc of the map and of the mean of both (`Mirrored`), on val and test. Rows are appended to
nbs/results/mirror.csv; a run that is there already is left out.
"""
import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from plans import has_row

from wsol_nb.data.dataset import WSOLDataset
from wsol_nb.localize.base import find_localizer
from wsol_nb.localize.mirrored import Mirrored
from wsol_nb.results import Rows, origin, results_folder
from wsol_nb.scoring.loop import evaluate
from wsol_nb.train.run import load_run


def agreement(maps, mirrored, move, border):
    "Median correlation of maps (B,H,W), each moved to the left by `move` pixels in its own image."
    h, w = maps.shape[1:]
    a = maps[:, border:h - border, border + move:w - border + move].flatten(1)
    b = mirrored[:, border:h - border, border - move:w - border - move].flatten(1)
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return float(F.cosine_similarity(a, b).median())


def displacement(localizer, dataset, n, border=32):
    "The move at which maps of `n` images and their mirror images agree best; how well, there and unmoved."
    maps, mirrored = [], []
    for i in np.linspace(0, len(dataset) - 1, n).astype(int):
        x, y = dataset[int(i)]
        maps.append(localizer(x[None], [int(y)]))
        mirrored.append(localizer(x.flip(-1)[None], [int(y)]))
    maps, mirrored = torch.cat(maps), torch.cat(mirrored).flip(-1)
    found = {d: agreement(maps, mirrored, d, border) for d in range(-border, border + 1)}
    best = max(found, key=found.get)
    return {'px too far right': best, 'agreement there': round(found[best], 3),
            'agreement unmoved': round(found[0], 3), 'images': n}


def scores(localizer, dls, name):
    "MaxBoxAcc at 0.5 and V2, on val and test."
    row = {}
    for split in ('val', 'test'):
        boxes = evaluate(localizer, dls, split, tau_from=None, bootstrap=0, progress=False).boxes
        row[f'{name}, {split}: MaxBoxAcc(.5)'] = round(boxes['max_box_acc']['0.5']['value'], 1)
        row[f'{name}, {split}: V2'] = round(boxes['max_box_acc_v2'], 1)
    return row


def row_of_run(run, dls, name, n):
    "The figures of a localizer on a run."
    train = WSOLDataset(dls.train.dataset.df, dls.info) # neither cropped nor flipped
    plain = find_localizer(name)(run.model)
    found = displacement(plain, train, n) | scores(plain, dls, 'map')
    return found | scores(Mirrored(run.model, name), dls, 'mean')


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('runs', type=Path, nargs='+')
    p.add_argument('--localizers', nargs='+', default=['headmaps'])
    p.add_argument('--n', type=int, default=100, help='training images')
    p.add_argument('--out', type=Path, metavar='CSV', default=results_folder()/'mirror.csv')
    a = p.parse_args()
    rows = Rows(a.out)
    for path in a.runs:
        run = load_run(path)
        dls = run.dls()
        common = dict(data=dls.info.source['dataset'], run=path.name, arch=run.config['arch'],
                      stride=run.config['stride'])
        for name in a.localizers:
            key = common | dict(localizer=name)
            if has_row(rows.read(), key): continue
            typed = f'python tools/mirror_table.py {path.name} --localizers {name}'
            row = key | row_of_run(run, dls, name, a.n) | origin(typed)
            rows.add([row])
            print(row, flush=True)
    df = pd.DataFrame(rows.read())
    print(df.drop(columns=['hardware', 'command', 'commit'], errors='ignore').to_string(index=False))


if __name__ == '__main__': main()
