"""How far off a map is drawn: python tools/mirror_table.py RUN [RUN ...] [--localizers headmaps layercam]

The map of an image and that of its mirror image, turned back, should agree. For each run they are moved against each other by whole
pixels, on training images and without any box; the table names the move at which they agree best (median correlation away from the
border), and how well they agree there and unmoved. Beside it, MaxBoxAcc of the map and of the mean of both (`Mirrored`), on val and
test. Rows are appended to nbs/results/mirror.csv; a run that is there already is left out.
"""
import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from pooling_table import Table, origin, root

from wsol_nb.data.dataset import WSOLDataset
from wsol_nb.train.run import load_run
from wsol_nb.localize.base import find_localizer
from wsol_nb.localize.mirrored import Mirrored
from wsol_nb.scoring.loop import evaluate


def agreement(maps, mirrored, move, border):
    "Median correlation of maps (B,H,W), each moved to the left by `move` pixels in its own image."
    h, w = maps.shape[1:]
    cut = lambda m, d: m[:, border:h - border, border + d:w - border + d].flatten(1)
    a, b = cut(maps, move), cut(mirrored, -move)
    return float(F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)).median())


def displacement(localizer, dataset, n, border=32):
    "The move at which maps of `n` images and their mirror images agree best, and how well they agree there and unmoved."
    both = [[], []]
    for i in np.linspace(0, len(dataset) - 1, n).astype(int):
        x, y = dataset[int(i)]
        for maps, img in zip(both, (x, x.flip(-1))): maps.append(localizer(img[None], [int(y)]))
    maps, mirrored = torch.cat(both[0]), torch.cat(both[1]).flip(-1)
    found = {d: agreement(maps, mirrored, d, border) for d in range(-border, border + 1)}
    best = max(found, key=found.get)
    return {'px too far right': best, 'agreement there': round(found[best], 3), 'agreement unmoved': round(found[0], 3), 'images': n}


def scores(localizer, dls, name):
    "MaxBoxAcc at 0.5 and V2, on val and test."
    boxes = {s: evaluate(localizer, dls, s, tau_from=None, bootstrap=0, progress=False).boxes for s in ('val', 'test')}
    return {f'{name}, {s}: {k}': round(v, 1) for s, b in boxes.items() for k, v in (('MaxBoxAcc(.5)', b['max_box_acc']['0.5']['value']), ('V2', b['max_box_acc_v2']))}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('runs', type=Path, nargs='+')
    p.add_argument('--localizers', nargs='+', default=['headmaps'])
    p.add_argument('--n', type=int, default=100, help='training images')
    a = p.parse_args()
    table = Table(root/'nbs/results/mirror.csv')
    for path in a.runs:
        run = load_run(path)
        dls = run.dls()
        train = WSOLDataset(dls.train.dataset.df, dls.info) # neither cropped nor flipped
        for name in a.localizers:
            key = dict(data=dls.info.source['dataset'], run=path.name, arch=run.config['arch'], stride=run.config['stride'], localizer=name)
            if table.has(**key): continue
            plain = find_localizer(name)(run.model)
            table.add([key | displacement(plain, train, a.n) | scores(plain, dls, 'map') | scores(Mirrored(run.model, name), dls, 'mean') | origin(f'python tools/mirror_table.py {path.name} --localizers {name}')])
            print(table.rows[-1], flush=True)
    print(pd.DataFrame(table.rows).drop(columns=['hardware', 'command']).to_string(index=False))


if __name__ == '__main__': main()
