"""Two processes against one: every registered method trains on the same batches, alone and under torchrun.

    python tools/distributed.py                  all methods; the table, and nbs/results/distributed.csv
    python tools/distributed.py --methods GAP FCAM --out /tmp/two

Batches of five images, so that one process has three and the other two. Batch statistics are frozen, since
half a batch has others, and dropout is off, since its draws are a process's own; `--live` leaves both on.
`differ` is the distance between the two trainings' weights over the way that training went: rounding leaves
less than a thousandth of it. Exit status 1 where a method differs by more and is not known to (`COUPLED`).
"""
import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import torch
from small import small_arch, small_fields, two_stages
from torch import nn

import wsol_nb
from wsol_nb.data.worlds.disk import write_world
from wsol_nb.data.worlds.objects import ObjectsWorld
from wsol_nb.data.worlds.tissue import TissueWorld
from wsol_nb.localize.base import unwrap
from wsol_nb.processes import first_only, is_first, joined, world_size
from wsol_nb.registry import entries, import_file
from wsol_nb.results import Rows, origin, results_folder
from wsol_nb.train.fit import fit_run, learner_from_config
from wsol_nb.train.method import GAP, method_to_dict
from fastai.callback.core import Callback

TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node']
ROUNDING = 1e-3
COUPLED = {} # method -> why two processes learn something else


class Still(Callback):
    "Batch norms keep their statistics, and nothing is dropped."
    kinds = nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd
    def before_train(self):
        for m in self.learn.model.modules():
            if isinstance(m, self.kinds): m.eval()


def config(root, dataset, method, epochs=2):
    data = dict(kind='metadata', root=str(root), dataset=dataset, size=64, resize=72, bs=5, roles={})
    train = dict(epochs=epochs, opt='sgd', lr=.01, lr_head=.05, wd=1e-4, check=False)
    net = dict(arch='resnet10t', stride=16, pretrained=False)
    return dict(schema=1, **net, method=method_to_dict(method), data=data, train=train)


def world_of(name):
    "Tissue for what learns from negative images."
    return TissueWorld() if name == 'NEGEV' else ObjectsWorld()


def setting(name, root):
    "The config of a method, on a first stage where it has one."
    kind, dataset = entries('method')[name].load(), world_of(name).dataset
    own = small_fields(name)
    if not two_stages(name): return config(root, dataset, kind(**own)) | small_arch(name)
    first = f'{root}/first-{dataset}'
    return config(root, dataset, kind(stage1=first, **own)) | dict(arch=None, stride=None)


def prepare(root, names):
    "The worlds, and a classifier on each that needs one."
    for name in names:
        dataset = write_world(root, world_of(name), n_train=20, n_val=7, n_test=4, progress=False).name
        first = Path(root)/f'first-{dataset}'
        if two_stages(name) and not first.is_dir():
            fit_run(config(root, dataset, GAP(), epochs=1), first, progress=False)


def state(learn): return {k: v.clone() for k, v in unwrap(learn.model).state_dict().items()}


@first_only
def store(file, **what): torch.save(what, file)


def work(names, root, out, live):
    "Train each method, in as many processes as there are; the first stores what it was and became."
    with joined():
        for name in names:
            learn = learner_from_config(setting(name, root), f'{out}/{name}-{world_size()}')
            before = state(learn)
            frozen = [] if live else [Still()]
            with learn.no_bar(), learn.no_logging():
                learn.fit_one_cycle(2, slice(.01, .05), cbs=frozen)
            rows = [{k: float(v) for k, v in row.items()} for row in learn.rows]
            store(f'{out}/{name}-{world_size()}.pt', before=before, after=state(learn), rows=rows)
            if is_first(): print(f'{name}: trained by {world_size()}', flush=True)


def distance(a, b):
    "Euclidean, between all floating-point values of two states."
    parts = (a[k].double() - b[k].double() for k in a if a[k].is_floating_point())
    return sum((d**2).sum() for d in parts).sqrt().item()


def compared(name, out, live):
    "How far two processes went from where one did."
    one, two = (torch.load(f'{out}/{name}-{n}.pt') for n in (1, 2))
    assert distance(one['before'], two['before']) == 0, f'{name}: they began with different weights'
    went = distance(one['before'], one['after'])
    differ = distance(one['after'], two['after'])/went
    last = [r['rows'][-1] for r in (one, two)]
    loss = {f'loss_{n}': round(r['train_loss'], 6) for n, r in zip(('one', 'two'), last)}
    known = 'batch norm and dropout of each process' if live else COUPLED.get(name, 'not known')
    why = '' if differ < ROUNDING else known
    return dict(method=name, differ=float(f'{differ:.2g}'), same=differ < ROUNDING, **loss, why=why)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--methods', nargs='+', help='by name; all without it')
    parser.add_argument('--import', dest='file', help='a Python file that registers further methods')
    parser.add_argument('--live', action='store_true', help='batch norm takes the images of its process')
    parser.add_argument('--out', help='folder of the runs; the table is then written there too')
    parser.add_argument('--worker', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.file: import_file(args.file)
    args.methods = args.methods or [*entries('method')]
    if args.worker: return work(args.methods, args.worker, args.out, args.live)
    with tempfile.TemporaryDirectory() as tmp:
        out, csv = args.out or tmp, Path(args.out or results_folder())/'distributed.csv'
        prepare(tmp, args.methods)
        own = ['--methods', *args.methods, '--worker', tmp, '--out', out] + ['--live']*args.live
        if args.file: own += ['--import', args.file]
        env = os.environ | dict(OMP_NUM_THREADS='1', PYTHONPATH=str(Path(wsol_nb.__file__).parents[1]))
        for launch in ([sys.executable], TORCHRUN + ['2']):
            subprocess.run([*launch, __file__, *own], env=env, check=True)
        rows = [compared(name, out, args.live) for name in args.methods]
    print(pd.DataFrame(rows).to_string(index=False))
    command = f'tools/distributed.py{" --live"*args.live}'
    batch_norm = 'live' if args.live else 'frozen'
    for row in rows:
        key = dict(method=row['method'], batch_norm=batch_norm)
        Rows(csv).add([key | row | origin(command)], **key)
    print(f'written: {csv}')
    sys.exit(any(row['why'] == 'not known' for row in rows))


if __name__ == '__main__': main()
