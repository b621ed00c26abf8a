"""F-CAM beside the maps it learns from: python tools/fcam_table.py {world,cub} [--seeds 0 1 2] [--variants cam layercam]

world is the demo's world, a classifier from scratch and the ablations of the paper; cub needs WSOL_DATA and WSOL_WEIGHTS
(mobilenetv2_100). For each seed a GAP classifier is trained first, then each variant on top of it, frozen; CAM itself is the row
`CAM`. Runs are saved below --runs (a classifier that is there already is taken), rows appended to nbs/fcam_<data>.csv, so an
interrupted table goes on where it stopped. The last epoch is scored; nothing is chosen on the test split.
"""
import argparse
import itertools
from pathlib import Path

import pandas as pd
from pooling_table import RECIPES, SYNTH, Table, loaders, origin, root, row_of, train

from wsol_nb.dense.fcam import FCAM
from wsol_nb.train.method import GAP
from wsol_nb.train.run import load_run
from wsol_nb.scoring.loop import evaluate

WORLD = dict(crf=.5, sigma_xy=30., erode=1, min_p=.2, crf_start=0, views=1) # chosen on val; as published, the CRF counts from the first step
ABLATION = {'SR': dict(crf=0.), 'SR + ASC': dict(crf=0., size=.1), 'SR + CRF': {}, 'SR + CRF + ASC': dict(size=.1)}
SWEEPS = ABLATION | {'CRF from epoch 1': dict(crf_start=1), 'mirrored': dict(views=2)} | {f'n={n}': dict(n_fg=n, n_bg=n) for n in (1, 3, 30, 100)} | {f'static, n={n}': dict(n_fg=n, n_bg=n, static=True) for n in (1, 10, 100)} | \
    {f'λ={c:g}': dict(crf=c) for c in (.05, .15, 1.5, 5., 50.)} | {f'seeds: {s}': dict(seeds=s) for s in ('gradcamplusplus', 'layercam')}
SEEDS = ('cam', 'gradcamplusplus', 'layercam')
CAM = dict(world=SYNTH | dict(epochs=15), cub=RECIPES['cub']) # the first stage
DATA = dict(
    world=dict(variants=SWEEPS, base=WORLD, epochs=5, lr=3e-3),
    cub=dict(variants={s: dict(seeds=s) for s in SEEDS} | {f'{s}, not mirrored': dict(seeds=s, views=1) for s in SEEDS}, base={}, epochs=FCAM.recipe['epochs'], lr=FCAM.recipe['lr']))


def score(run, dls, key, command):
    "A row for val and one for test."
    for split in ('valid', 'test'):
        report = evaluate(run.localizer(), dls, split, tau_from='tune' if split == 'test' else None, bootstrap=0, progress=False)
        carried = {f'τ from val: {k}': round(v, 3) for row in report.ledger if row['tau'] == 'val' for k, v in row['scores'].items()}
        yield key | dict(split=report.protocol['split'], n=report.n) | row_of(report) | carried | {k: run.config.get('train', {}).get(k) for k in ('cpu_seconds', 'wall_seconds')} | origin(command)


def show(rows):
    df = pd.DataFrame(rows)
    df = df[df.split == 'test']
    cols = [c for c in ('MaxBoxAcc δ=0.3', 'MaxBoxAcc δ=0.5', 'MaxBoxAcc δ=0.7', 'MaxBoxAccV2', 'Top-1 localization δ=0.5', 'PxAP') if c in df and df[c].notna().any()]
    table = df.groupby('variant', sort=False)[cols].agg(['mean', 'std']).round(1)
    table.insert(0, ('runs', ''), df.groupby('variant').size())
    print(table.to_string())


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('data', choices=DATA)
    p.add_argument('--seeds', type=int, nargs='+', default=[0])
    p.add_argument('--variants', nargs='+', help='default: all')
    p.add_argument('--runs', type=Path, default=root/'runs/fcam')
    a = p.parse_args()
    d, cam, table = DATA[a.data], CAM[a.data], Table(root/f'nbs/results/fcam_{a.data}.csv')
    second = dict(arch=None, stride=None, opt='adam', wd=0., epochs=d['epochs'], lr=(d['lr'], d['lr']), data=cam['data'] | dict(resize=cam['data']['size'])) # flips only
    for v in a.variants or []:
        if v not in d['variants']: p.error(f'--variants {v}: there are {", ".join(d["variants"])}')
    for seed, name in itertools.product(a.seeds, ['CAM', *(a.variants or d['variants'])]):
        key, first = dict(variant=name, seed=seed), a.runs/a.data/f'CAM-{seed}'
        if table.has(**key): continue
        path = a.runs/a.data/f'{name}-{seed}'.translate(str.maketrans('', '', ' :,'))
        if not (first/'model.safetensors').is_file(): train(GAP(), cam, loaders(cam, {}, a.runs, seed), first)
        dls = loaders(second, {}, a.runs, seed)
        if not (path/'model.safetensors').is_file(): train(FCAM(stage1=first, **d['base'] | d['variants'][name]), second, dls, path)
        new = list(score(load_run(path), dls, key, f'python tools/fcam_table.py {a.data} --seeds {seed} --variants {name!r}'))
        table.add(new)
        print(f'{a.data} {key}: MaxBoxAcc(.5) {new[0]["MaxBoxAcc δ=0.5"]:.1f} on val, {new[1]["MaxBoxAcc δ=0.5"]:.1f} on test, {new[1]["cpu_seconds"]} s of CPU', flush=True)
    show(table.rows)


if __name__ == '__main__': main()
