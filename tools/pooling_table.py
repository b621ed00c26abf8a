"""All pooling heads trained and scored in one table: python tools/pooling_table.py {synth,parts,tissue,cub,glas} [--seeds 0 1 2] [--methods GAP LSE]

synth is the default objects world, parts that world with parts of four sizes, tissue the tissue world with and without normal
images and with 320 images to train on, all written here and learnt from scratch; cub and glas need WSOL_DATA and WSOL_WEIGHTS (mobilenetv2_100).
Runs are saved below --runs and rows appended to nbs/pooling_<data>.csv, so an interrupted table goes on where it stopped.
`--again` scores saved runs anew, e.g. when reports have gained columns. Hyper-parameters are each method's defaults; the last
epoch is scored; nothing is chosen on the test split.
"""
import argparse
import itertools
import os
import re
import time
from pathlib import Path

import pandas as pd

from wsol_nb.methods.pooling import BOTTOM_UP
from wsol_nb.data.loaders import WSOLDataLoaders
from wsol_nb.data.worlds.objects import ObjectsWorld
from wsol_nb.data.worlds.tissue import TissueWorld
from wsol_nb.train.checkpoint import Checkpoint, KeepBest, keep, resume
from wsol_nb.train.learner import wsol_learner
from wsol_nb.train.method import OPTIMIZERS
from wsol_nb.results import hardware
from wsol_nb.train.run import load_run, save_run
from wsol_nb.scoring.loop import evaluate

root = Path(__file__).resolve().parent.parent
SYNTH = dict(arch='test_resnet', stride=8, opt='adamw', wd=.05, epochs=10, lr=(5e-3, 5e-3), data=dict(size=112, bs=32))
RECIPES = dict(
    synth=SYNTH, parts=SYNTH | dict(worlds=[dict(part_ratio=p) for p in (.3, .4, .5, .6)]),
    tissue=SYNTH | dict(kind=TissueWorld, worlds=[dict(normal=n) for n in (True, False)], counts=dict(n_train=320)),
    cub=dict(arch='mobilenetv2_100', stride=16, opt='sgd', wd=1e-4, epochs=8, lr=(.005, .05), pretrained=True, data=dict(dataset='CUB', size=224, bs=25)),
    glas=dict(arch='mobilenetv2_100', stride=16, opt='sgd', wd=1e-4, epochs=40, lr=(.005, .05), pretrained=True,
              data=dict(dataset='GLAS/fold-0', size=224, bs=16, valid='valcl', recipe='histology')))


def loaders(recipe, world, runs, seed):
    if 'dataset' in recipe['data']: return WSOLDataLoaders.from_metadata(seed=seed, **recipe['data'])
    folder, kind = '-'.join(['world', *(f'{k}={v}' for k, v in world.items())]), recipe.get('kind', ObjectsWorld)
    return WSOLDataLoaders.from_synth(runs/folder, kind(**world), seed=seed, world_kw=recipe.get('counts', {}) | dict(progress=False), **recipe['data'])


def train(method, recipe, dls, path, select=None):
    "Train what is left, and save the run with its recipe and the time it took: the last epoch, or a selected one of those that are kept."
    learn = wsol_learner(dls, recipe['arch'], method, pretrained=recipe.get('pretrained', False), stride=recipe['stride'], opt_func=OPTIMIZERS[recipe['opt']], wd=recipe['wd'],
                         localization=bool(select), cbs=[Checkpoint(path)] + [KeepBest(path)]*bool(select), path=path, verbose=False)
    done, cpu, wall = resume(learn, path), time.process_time(), time.time()
    with learn.no_bar(), learn.no_logging():
        if done < recipe['epochs']: learn.fit_one_cycle(recipe['epochs'], slice(*recipe['lr']))
    left = recipe['epochs'] - done
    took = dict(cpu_seconds=time.process_time() - cpu, wall_seconds=time.time() - wall)
    took = {k: round(v*recipe['epochs']/left, 1) if left else None for k, v in took.items()} # of all epochs, by those of this process
    if select: keep(learn, path, select)
    save_run(learn, path, train={k: v for k, v in recipe.items() if k not in ('data', 'kind', 'counts')} | took | dict(threads=int(os.environ.get('OMP_NUM_THREADS', 0))))


def row_of(report):
    "Every figure of a report by its name there, with its τ and the centre baseline's; on masks also that of a map of ones."
    row = {}
    for r in report.rows():
        name = re.sub(r' \(mean of \d+ images\)', '', r.name) # the same on every split
        row |= {name: r.value, f'τ of {name}': r.tau, f'centre: {name}': r.centre}
    if report.pixels: row |= {f'all ones: {k}': report.pixels['all_ones'][v] for k, v in (('PxAP', 'pxap'), ('F1+', 'f1_pos'), ('F1−', 'f1_neg'))}
    return {k: round(v, 3) for k, v in row.items() if v is not None}


def origin(command):
    "Where a row comes from."
    h = hardware()
    return dict(hardware=f"{h['cpu']}, {h['cores']} cores", command=command)


def cost(run):
    "Processor time of the training, and of its part until the validation accuracy first reached 90 %."
    seconds, accuracy = run.config['train']['cpu_seconds'], pd.read_csv(run.path/'history.csv').accuracy
    reached = accuracy.ge(.9).to_numpy().nonzero()[0]
    return dict(cpu_seconds=seconds, cpu_seconds_to_90=round(seconds*(reached[0] + 1)/len(accuracy), 1) if len(reached) and seconds else None)


class Table:
    "Rows of a CSV, written whole as soon as there are new ones; another process may add its own."
    def __init__(self, csv): self.csv, self.rows = csv, self.read(csv)

    @staticmethod
    def read(csv): return pd.read_csv(csv).to_dict('records') if csv.is_file() else []

    def has(self, **key): return any(all(r[k] == v for k, v in key.items()) for r in self.rows)

    def add(self, new, **instead):
        "Append rows, in place of those with the values `instead`."
        self.rows = [r for r in self.read(self.csv) if not (instead and all(r[k] == v for k, v in instead.items()))] + new
        part = self.csv.with_suffix('.part')
        pd.DataFrame(self.rows).to_csv(part, index=False)
        os.replace(part, self.csv)


def show(rows):
    "The table on test, mean over seeds, the centre baseline last."
    df = pd.DataFrame(rows)
    df = df[df.split == 'test']
    named = [c for c in df.columns if f'centre: {c}' in df.columns]
    keys = ['method', *(c for c in ('part_ratio', 'normal') if c in df)]
    table = df.groupby(keys, sort=False)[[c for c in ('accuracy', *named) if c in df]].mean()
    if named and len(keys) == 1: table.loc['centre'] = df[[f'centre: {c}' for c in named]].mean().set_axis(named)
    print(table.round(1).to_string())


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('data', choices=RECIPES)
    p.add_argument('--seeds', type=int, nargs='+', default=[0])
    p.add_argument('--methods', nargs='+', default=[m.__name__ for m in BOTTOM_UP])
    p.add_argument('--runs', type=Path, default=root/'runs/pooling')
    p.add_argument('--again', action='store_true', help='score saved runs anew')
    a = p.parse_args()
    recipe, table, methods = RECIPES[a.data], Table(root/f'nbs/results/pooling_{a.data}.csv'), {m.__name__: m for m in BOTTOM_UP}
    for seed, world in itertools.product(a.seeds, recipe.get('worlds', [{}])):
        dls = loaders(recipe, world, a.runs, seed)
        for name in a.methods:
            key = dict(method=name, seed=seed) | world
            if table.has(**key) and not a.again: continue
            path = a.runs/a.data/'-'.join([name, str(seed), *map(str, world.values())])
            if not (path/'model.safetensors').is_file(): train(methods[name](), recipe, dls, path)
            run, new = load_run(path), []
            for split in ('valid', 'test'):
                report = evaluate(run.localizer(), dls, split, tau_from=None, progress=False)
                new.append(key | dict(split=report.protocol['split'], n=report.n) | row_of(report) | cost(run)
                           | origin(f'python tools/pooling_table.py {a.data} --seeds {seed}'))
            table.add(new, **key)
            print(f'{a.data} {key}: accuracy {new[-1]["accuracy"]:.1f} on test, {new[-1]["cpu_seconds"]} s of CPU to train', flush=True)
    show(table.rows)


if __name__ == '__main__': main()
