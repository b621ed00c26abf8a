"""What the plans of tables share: setups, worlds, second stages, rows from reports, and how they are shown"""
import argparse
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from filelock import FileLock

from wsol_nb.data.worlds.base import World
from wsol_nb.data.worlds.disk import write_world
from wsol_nb.results import has_values, results_folder
from wsol_nb.train.fit import fit_run
from wsol_nb.train.grid import merged
from wsol_nb.train.method import method_to_dict

root = Path(__file__).resolve().parent.parent

# Setups: configs of `fit_run` without method, seed and, for worlds, the place of the data.

ROLES = dict(train='train', valid=None, tune=None, test='test')
DATA = dict(kind='metadata', root=None, resize=None, roles=ROLES) # root=None is WSOL_DATA
TRAIN = dict(select='last', check=False)
SYNTH = dict(schema=1, arch='test_resnet', stride=8, pretrained=False, data=DATA | dict(size=112, bs=32),
             train=TRAIN | dict(opt='adamw', wd=.05, epochs=10, lr=5e-3, lr_head=5e-3))
MOBILENET = dict(schema=1, arch='mobilenetv2_100', stride=16, pretrained=True, data=DATA | dict(size=224),
                 train=TRAIN | dict(opt='sgd', wd=1e-4, lr=.005, lr_head=.05))
CUB = merged(MOBILENET, dict(data=dict(dataset='CUB', bs=25), train=dict(epochs=8)))
GLAS = merged(MOBILENET, dict(data=dict(dataset='GLAS/fold-0', bs=16, recipe='histology',
                                        roles=dict(valid='valcl')), train=dict(epochs=40)))
ONE_EPOCH = dict(train=dict(epochs=1)) # of --tiny
FEW = dict(n_train=32, n_val=16, n_test=16) # images of a tiny world


@dataclass
class Drawing:
    "A synthetic world and the folder that it is drawn into when it is needed."
    world: World
    folder: Path
    counts: dict = field(default_factory=dict) # for `write_world`

    def data(self)->dict:
        "What the `data` entry of a config says of it."
        return dict(kind='metadata', root=str(self.folder), dataset=self.world.dataset)

    def write(self):
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f'{self.folder}.lock'):
            write_world(self.folder, self.world, progress=False, **self.counts)


def drawing(kind, runs, tiny=False, counts=None, **fields)->Drawing:
    "The world of a kind with these fields, in a folder named after them."
    name = '-'.join(['tiny-world' if tiny else 'world', *(f'{k}={v}' for k, v in fields.items())])
    return Drawing(kind(**fields), runs/name, FEW if tiny else counts or {})


# Stages

def second_stage(first, method, train, **data)->dict:
    "The config of a method on a frozen classifier, whose config is `first`."
    train = dict(opt='adam', wd=0.) | train
    own = dict(arch=None, stride=None, pretrained=False, method=method_to_dict(method))
    return merged(first, own | dict(data=data, train=train))


def trained(config, folder)->Path:
    "The run folder, trained as far as it is not; a process that is at it already is waited for."
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f'{folder}.lock'):
        if not (folder/'model.safetensors').is_file(): fit_run(config, folder, progress=False)
    return folder


# Command lines

def parser(doc, name, data)->argparse.ArgumentParser:
    "The options that all tables of trained runs have; `data` are the choices."
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.set_defaults(name=name)
    p.add_argument('data', choices=data)
    p.add_argument('--seeds', type=int, nargs='+', default=[0])
    p.add_argument('--runs', type=Path, default=root/'runs'/name, help='folder of the runs')
    p.add_argument('--out', type=Path, metavar='CSV', help=f'table; default: nbs/results/{name}_<data>.csv')
    p.add_argument('--tiny', action='store_true',
                   help='worlds of 64 images and one epoch, to see that all works; needs --out')
    return p


def parsed(p)->argparse.Namespace:
    "The options as they were given, with the paths that follow from them."
    a = p.parse_args()
    if a.tiny and a.out is None: p.error('--tiny: expected --out CSV, nbs/results has no such rows')
    a.out = a.out or results_folder()/f'{a.name}_{a.data}.csv'
    a.runs = a.runs.resolve()
    return a


def command(a, seed, **names)->str:
    "What must be typed to get the rows of a seed; options without a value are left out."
    words = ['python', f'tools/{a.name}_table.py', a.data, '--seeds', str(seed)]
    for option, values in names.items():
        if values: words += [f'--{option}', *map(str, values)]
    return shlex.join(words + ['--tiny']*a.tiny)


def check_names(p, option, names, known):
    "End with an error where a name is not known."
    for n in names or []:
        if n not in known: p.error(f'--{option} {n}: there are {", ".join(known)}')


def end(failed):
    "End with an error where jobs failed; `run_grid` has said why."
    if failed: raise SystemExit(f'failed: {", ".join(str(key) for key, _ in failed)}')


# Rows

def has_row(rows, key)->bool:
    "Whether one of `rows` has all values of `key`."
    return any(has_values(r, key) for r in rows)


def row_of(report)->dict:
    "Every figure of a report by name, with its τ and the centre baseline's; on masks also a map of ones."
    row = {}
    for r in report.rows():
        name = re.sub(r' \(mean of \d+ images\)', '', r.name) # the same on every split
        row |= {name: r.value, f'τ of {name}': r.tau, f'centre: {name}': r.centre}
    if report.pixels:
        ones = report.pixels['all_ones']
        names = {'PxAP': 'pxap', 'F1+': 'f1_pos', 'F1−': 'f1_neg'}
        row |= {f'all ones: {k}': ones[v] for k, v in names.items()}
    return {k: round(v, 3) for k, v in row.items() if v is not None}


def cost(run)->dict:
    "Processor time of training, and until validation accuracy first reached 90 %, where a run knows it."
    seconds = run.config['train'].get('cpu_seconds')
    accuracy = pd.read_csv(run.path/'history.csv').accuracy
    reached = accuracy.ge(.9).to_numpy().nonzero()[0]
    to_90 = round(seconds*(reached[0] + 1)/len(accuracy), 1) if seconds and len(reached) else None
    return dict(cpu_seconds=seconds, cpu_seconds_to_90=to_90)


def on_test(rows)->pd.DataFrame:
    "The rows of the test split."
    df = pd.DataFrame(rows)
    return df[df.split == 'test']


def mean_std(df, keys, columns)->pd.DataFrame:
    "Mean and standard deviation of columns, by keys in the order in which they come."
    return df.groupby(keys, sort=False)[columns].agg(['mean', 'std']).round(1)
