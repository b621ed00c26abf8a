"""What a coarse grid costs a perfect map

    python tools/downscale_table.py GLAS/fold-0 [--split test] [--size 224]

True masks on the evaluation grid are made z times smaller and blown up again, by each pair of interpolation
modes, and scored as maps by PxAP. Needs WSOL_DATA and a data set with masks; its rows in
nbs/results/downscale.csv are replaced.
"""
import argparse
import itertools
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F

from wsol_nb.data.loaders import WSOLDataLoaders
from wsol_nb.metrics.pixels import PxAP
from wsol_nb.results import Rows, origin, results_folder

ZS = (2, 4, 8, 16, 32)
DOWN = ('area', 'nearest', 'nearest-exact', 'bilinear')
UP = ('nearest', 'bilinear', 'bicubic')


def resize(x, size, mode):
    "Maps (n,1,H,W) on another grid."
    return F.interpolate(x, size, mode=mode, align_corners=False if mode in ('bilinear', 'bicubic') else None)


def pxap(masks, z, down, up):
    "PxAP of masks (n,side,side), z times smaller and back."
    truth, acc = (masks == 1).float()[:, None], PxAP()
    side = masks.shape[-1]
    maps = resize(resize(truth, side//z, down), side, up).clamp(0, 1) # bicubic overshoots
    for m, t in zip(maps[:, 0].numpy(), masks.numpy()): acc.update(m, t)
    return acc.compute()['pxap']['value']


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('dataset')
    p.add_argument('--split', default='test')
    p.add_argument('--size', type=int, default=224)
    p.add_argument('--out', type=Path, metavar='CSV', default=results_folder()/'downscale.csv')
    a = p.parse_args()
    part = WSOLDataLoaders.from_metadata(dataset=a.dataset, size=a.size).localizable(a.split)
    if not part.n_masked: p.error(f'{a.dataset} has no masks in split {a.split}')
    masks = torch.stack([torch.as_tensor(part.mask(i)) for i in range(len(part))])
    common = dict(data=a.dataset.split('/')[0], n=len(part), size=a.size)
    source = origin(f'python tools/downscale_table.py {a.dataset} --split {a.split} --size {a.size}')
    rows = []
    for z, down, up in itertools.product(ZS, DOWN, UP):
        found = dict(z=z, down=down, up=up, PxAP=round(pxap(masks, z, down, up), 3))
        rows.append(common | found | source)
    Rows(a.out).add(rows, data=common['data'])
    print(pd.DataFrame(rows).pivot(index=['down', 'up'], columns='z', values='PxAP').round(1).to_string())


if __name__ == '__main__': main()
