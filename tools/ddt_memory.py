"""DDT's axis from the descriptors of many images, in constant memory

    python tools/ddt_memory.py [--images 1000 10000 100000] [--channels 64] [--cells 196]

Descriptors of as many images are drawn a shard at a time (a common thing in a tenth of the cells, which are
known) and added up as `DDT.fit` does. For each number of images a row: seconds, by how much the peak of
memory grew from the first shard on, and the share of cells that the axis puts on the right side. Rows go to
nbs/results/ddt_memory.csv.
"""
import argparse
import resource
import time
from pathlib import Path

import torch

from wsol_nb.methods.colocalize import Moments, descriptors, first_axis
from wsol_nb.results import Rows, origin, results_folder

SHARD = 32 # images


def shard(i, K, side, towards):
    "Features (SHARD,K,side,side) of shard `i`, and which cells are the thing's."
    generator = torch.Generator().manual_seed(i)
    A = torch.randn(SHARD, K, side, side, generator=generator)
    thing = torch.rand(SHARD, side, side, generator=generator) < .1
    return A + 8*thing[:, None]*towards.view(1, K, 1, 1), thing


def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024 # MiB


def measured(n, K, side):
    "The row of `n` images."
    towards, moments, start = torch.nn.functional.normalize(torch.ones(K), dim=0), Moments(), time.time()
    for i in range(n//SHARD):
        moments = moments + Moments.of(descriptors(shard(i, K, side, towards)[0]))
        if i == 2: first = peak()
    axis = first_axis(moments)
    A, thing = shard(n, K, side, towards)
    P = torch.einsum('k,bkhw->bhw', axis.axis.float(), A - axis.mean.float().view(1, K, 1, 1))
    right = ((P > 0) == thing).float().mean().item()
    return dict(images=n//SHARD*SHARD, channels=K, cells=side*side, seconds=round(time.time() - start, 1),
                grown_mib=round(peak() - first, 1), right_cells=round(100*right, 1))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--images', type=int, nargs='+', default=[1000, 10_000, 100_000])
    p.add_argument('--channels', type=int, default=64)
    p.add_argument('--cells', type=int, default=196)
    p.add_argument('--out', type=Path, metavar='CSV', default=results_folder()/'ddt_memory.csv')
    a = p.parse_args()
    rows = Rows(a.out)
    for n in a.images:
        row = measured(n, a.channels, round(a.cells**.5))
        typed = f'python tools/ddt_memory.py --images {n} --channels {a.channels} --cells {a.cells}'
        rows.add([row | origin(typed)], images=row['images'], channels=a.channels)
        print(row, flush=True)


if __name__ == '__main__': main()
