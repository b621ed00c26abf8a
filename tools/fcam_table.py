"""F-CAM beside the maps it learns from: python tools/fcam_table.py {world,cub} [--seeds 0 1 2] [--variants cam layercam]

world is the demo's world, a classifier from scratch and the ablations of the paper; cub needs WSOL_DATA and WSOL_WEIGHTS
(mobilenetv2_100). For each seed a GAP classifier is trained first, then each variant on top of it, frozen; CAM itself is the row
`CAM`. Runs are saved below --runs (a classifier that is there already is taken), rows appended to nbs/fcam_<data>.csv, so an
interrupted table goes on where it stopped. The last epoch is scored; nothing is chosen on the test split.
"""
import argparse
import itertools
import time
from pathlib import Path

import pandas as pd
from pooling_table import row_of, write

from wsol_nb.data.loaders import WSOLDataLoaders
from wsol_nb.fcam import FCAM
from wsol_nb.learner import GAP, Checkpoint, adam, adamw, hardware, load_run, resume, save_run, sgd, wsol_learner
from wsol_nb.localize import evaluate

root = Path(__file__).resolve().parent.parent
WORLD = dict(crf=.5, sigma_xy=30., erode=1, min_p=.2, crf_start=0) # chosen on val; as published, the CRF counts from the first step
ABLATION = {'SR': dict(crf=0.), 'SR + ASC': dict(crf=0., size=.1), 'SR + CRF': {}, 'SR + CRF + ASC': dict(size=.1)}
SWEEPS = ABLATION | {'CRF from epoch 1': dict(crf_start=1)} | {f'n={n}': dict(n_fg=n, n_bg=n) for n in (1, 3, 30, 100)} | {f'static, n={n}': dict(n_fg=n, n_bg=n, static=True) for n in (1, 10, 100)} | \
    {f'λ={c:g}': dict(crf=c) for c in (.05, .15, 1.5, 5., 50.)} | {f'seeds: {s}': dict(seeds=s) for s in ('gradcamplusplus', 'layercam')}
DATA = dict(
    world=dict(data=dict(size=112, bs=32), stage1=dict(arch='test_resnet', stride=8, opt_func=adamw, wd=.05), epochs1=15, lr1=(5e-3, 5e-3),
               epochs=5, lr=3e-3, base=WORLD, variants=SWEEPS, resize=112),
    cub=dict(data=dict(dataset='CUB', size=224, bs=25), stage1=dict(arch='mobilenetv2_100', stride=16, opt_func=sgd, wd=1e-4, pretrained=True), epochs1=8, lr1=(.005, .05),
             epochs=FCAM.recipe['epochs'], lr=FCAM.recipe['lr'], base={}, variants={s: dict(seeds=s) for s in ('cam', 'gradcamplusplus', 'layercam')}, resize=224))


def loaders(d, runs, seed, **kw):
    data = d['data'] | dict(seed=seed) | kw
    return WSOLDataLoaders.from_metadata(**data) if 'dataset' in data else WSOLDataLoaders.from_synth(runs/'world', world_kw=dict(progress=False), **data)


def train(path, dls, epochs, lr, **kw):
    "Train what is left of a run and save it, with the seconds it took."
    learn = wsol_learner(dls, localization=False, cbs=[Checkpoint(path)], path=path, verbose=False, **kw)
    done, cpu, wall = resume(learn, path), time.process_time(), time.time()
    with learn.no_bar(), learn.no_logging():
        if done < epochs: learn.fit_one_cycle(epochs, lr)
    share = epochs/(epochs - done) if done < epochs else None
    took = {k: round(share*v, 1) if share else None for k, v in dict(cpu_seconds=time.process_time() - cpu, wall_seconds=time.time() - wall).items()}
    return save_run(learn, path, train=dict(epochs=epochs) | took)


def score(run, dls, key, command):
    "A row for val and one for test."
    h = hardware()
    for split in ('valid', 'test'):
        report = evaluate(run.localizer(), dls, split, tau_from='tune' if split == 'test' else None, bootstrap=0, progress=False)
        carried = {f'τ from val: {k}': round(v, 3) for row in report.ledger if row['tau'] == 'val' for k, v in row['scores'].items()}
        yield key | dict(split=report.protocol['split'], n=report.n) | row_of(report) | carried | {k: run.config.get('train', {}).get(k) for k in ('cpu_seconds', 'wall_seconds')} | \
            dict(hardware=f"{h['cpu']}, {h['cores']} cores", command=command)


def show(rows):
    df = pd.DataFrame(rows)
    df = df[df.split == 'test']
    cols = [c for c in ('MaxBoxAcc δ=0.3', 'MaxBoxAcc δ=0.5', 'MaxBoxAcc δ=0.7', 'MaxBoxAccV2', 'Top-1 localization δ=0.5', 'PxAP') if c in df and df[c].notna().any()]
    table = df.groupby('variant', sort=False)[cols].agg(['mean', 'std']).round(1)
    table.insert(0, 'runs', df.groupby('variant').size())
    print(table.to_string())


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('data', choices=DATA)
    p.add_argument('--seeds', type=int, nargs='+', default=[0])
    p.add_argument('--variants', nargs='+', help='default: all')
    p.add_argument('--runs', type=Path, default=root/'runs/fcam')
    a = p.parse_args()
    d, csv = DATA[a.data], root/f'nbs/fcam_{a.data}.csv'
    for v in a.variants or []:
        if v not in d['variants']: p.error(f'--variants {v}: there are {", ".join(d["variants"])}')
    rows = pd.read_csv(csv).to_dict('records') if csv.is_file() else []
    for seed, name in itertools.product(a.seeds, ['CAM', *(a.variants or d['variants'])]):
        key, first = dict(variant=name, seed=seed), a.runs/a.data/f'CAM-{seed}'
        if any(all(r[k] == v for k, v in key.items()) for r in rows): continue
        path = a.runs/a.data/f'{name}-{seed}'.replace(' ', '').replace(':', '')
        if not (first/'model.safetensors').is_file(): train(first, loaders(d, a.runs, seed), d['epochs1'], slice(*d['lr1']), method=GAP(), **d['stage1'])
        dls = loaders(d, a.runs, seed, resize=d['resize'])
        if not (path/'model.safetensors').is_file():
            train(path, dls, d['epochs'], d['lr'], method=FCAM(stage1=str(first), **d['base'] | d['variants'][name]), opt_func=adam, wd=0.)
        new = list(score(load_run(path), dls, key, f'python tools/fcam_table.py {a.data} --seeds {seed} --variants {name!r}'))
        rows = (pd.read_csv(csv).to_dict('records') if csv.is_file() else []) + new # another process may have added some
        write(rows, csv)
        print(f'{a.data} {key}: MaxBoxAcc(.5) {new[0]["MaxBoxAcc δ=0.5"]:.1f} on val, {new[1]["MaxBoxAcc δ=0.5"]:.1f} on test, {new[1]["cpu_seconds"]} s of CPU', flush=True)
    show(rows)


if __name__ == '__main__': main()
