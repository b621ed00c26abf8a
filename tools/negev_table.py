"""NEGEV beside the CAM that it is trained on: python tools/negev_table.py {tissue,glas} [--seeds 0 1 2] [--variants NEGEV C+] [--stage1 RUN]

The first stage is the CAM classifier of tools/pooling_table.py, with the recipe that stands there; it is trained here, once a seed, or given.
tissue is the tissue world with its class of normal images: each variant of the loss and of the sampler, the last epoch of both stages.
glas needs WSOL_DATA and WSOL_WEIGHTS (mobilenetv2_100): train 67 images, valcl to choose an epoch by class (cl), valpx, three images a
class, to choose one by masks (loc), test 80. Both stages are scored at these epochs and at the last. NEGEV stands on the classifier's last
epoch: valcl knows none that is better, and six masks are too few to choose a classifier. Runs are saved below --runs and rows appended
to nbs/negev_<data>.csv, so an interrupted table goes on where it stopped. Nothing is chosen on the test split.
"""
import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
from pooling_table import RECIPES, Table, loaders, origin, root, row_of, train

from wsol_nb.train.method import GAP
from wsol_nb.train.run import load_run
from wsol_nb.localize.mirrored import Mirrored
from wsol_nb.scoring.loop import evaluate
from wsol_nb.dense.negev import NEGEV, QuietMaps, positives

CAM = {k: RECIPES[k] for k in ('tissue', 'glas')}
SECOND = dict(arch=None, stride=None, pretrained=False, opt='adam', wd=0.)
STAGE2 = dict(tissue=SECOND | dict(epochs=10, lr=(1e-3, 1e-3)), glas=SECOND | dict(epochs=20, lr=(1e-3, 1e-3)))
VARIANTS = {'NEGEV': {}, 'C+': dict(n_bg=0, negatives=False), 'C+C-': dict(negatives=False), 'C+D-': dict(n_bg=0), 'static': dict(static=True), 'bg=published': dict(bg='published'),
            'fg=otsu': dict(fg='otsu'), 'one view': dict(views=1)}
DEFAULT = dict(tissue=list(VARIANTS), glas=['NEGEV', 'one view'])
SELECT = dict(tissue=(None, None), glas=('last', 'loc')) # the epoch of either stage that is kept, of those that are; None: there is the last only
KEEP = ['PxAP', 'F1+', 'F1−', 'best Dice of all pixels', 'all ones: PxAP', 'centre: PxAP']


def scores(localizer, dls, split):
    "The figures of a split, over all images and, where some are negative, over the others alone."
    report = evaluate(localizer, dls, split, tau_from=None, bootstrap=0, progress=False)
    row = {k: v for k, v in row_of(report).items() if k in KEEP}
    if dls.info.negative:
        others = row_of(evaluate(localizer, positives(dls), split, tau_from=None, bootstrap=0, progress=False))
        row |= {f'{k} (positives)': others[k] for k in ('PxAP', 'all ones: PxAP')}
    return dict(split=report.protocol['split'], n=report.n) | row


def valid_accuracy(path, select):
    "Accuracy on the split that selects by class, in percent, at an epoch of a run."
    history, file = pd.read_csv(path/'history.csv'), path/'selection.json'
    epoch = json.loads(file.read_text())[select]['epoch'] if file.is_file() else len(history) - 1
    return round(100*history.accuracy[epoch], 1)


def at_each_epoch(path, make=lambda run: run.localizer(), names=('cl', 'loc', 'last')):
    "Localizers of the epochs that a run keeps, by what chose them."
    kept = [n for n in names if (path/f'select-{n}.safetensors').is_file()]
    return {n: make(load_run(path, select=n)) for n in kept} or {'last': make(load_run(path))}


def rows_of(dls, path, localizers, **key):
    "Score localizers, by the epoch they come from, on the split that tunes and on test."
    rows = []
    for select, localizer in localizers.items():
        new = [key | dict(select=select, valid_accuracy=valid_accuracy(path, select)) | scores(localizer, dls, split) for split in ('tune', 'test')]
        print(key, select, *(f"{r['split']} {r['PxAP']:.1f}" for r in new), flush=True)
        rows += new
    return rows


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('data', choices=CAM)
    p.add_argument('--seeds', type=int, nargs='+', default=[0])
    p.add_argument('--variants', nargs='*', choices=VARIANTS, help='default: all on tissue, NEGEV on glas')
    p.add_argument('--stage1', type=Path, help='a trained classifier, for one seed')
    p.add_argument('--runs', type=Path, default=root/'runs/negev')
    a = p.parse_args()
    if a.stage1 and len(a.seeds) > 1: p.error('--stage1 is of one seed')
    recipe, (first, second), table = CAM[a.data], SELECT[a.data], Table(root/f'nbs/results/negev_{a.data}.csv')
    for seed in a.seeds:
        common = origin(f'python tools/negev_table.py {a.data} --seeds {seed}')
        dls, stage1 = loaders(recipe, dict(normal=True) if a.data == 'tissue' else {}, a.runs, seed), a.stage1 or a.runs/a.data/f'CAM-{seed}'
        if not (stage1/'model.safetensors').is_file(): train(GAP(), recipe, dls, stage1, first)
        negative = np.flatnonzero(np.isin(dls.class_ids, dls.info.negative)).tolist()
        alone = {'CAM': lambda r: r.localizer(), 'CAM, four views': lambda r: Mirrored(r.model, views=4)}
        if negative: alone |= {'quiet CAM': lambda r: QuietMaps(r.model, negative), 'quiet CAM, four views': lambda r: Mirrored(r.model, QuietMaps, 4, negative=negative)}
        for name, make in alone.items():
            if not table.has(method=name, seed=seed): table.add([r | common for r in rows_of(dls, stage1, at_each_epoch(stage1, make), method=name, seed=seed)])
        for name in DEFAULT[a.data] if a.variants is None else a.variants:
            if table.has(method=name, seed=seed): continue
            path = a.runs/a.data/f'{name}-{seed}'
            if not (path/'model.safetensors').is_file(): train(NEGEV(stage1=stage1, **VARIANTS[name]), STAGE2[a.data], dls, path, second)
            table.add([r | common for r in rows_of(dls, path, at_each_epoch(path, names=('loc', 'last')), method=name, seed=seed)]) # the classifier is the same in all epochs
    df = pd.DataFrame(table.rows)
    shown = [c for c in ('PxAP', 'PxAP (positives)', 'F1+', 'F1−', 'best Dice of all pixels', 'all ones: PxAP') if c in df]
    print(df[df.split == 'test'].groupby(['method', 'select'], sort=False)[shown].agg(['mean', 'std']).round(1).to_string())


if __name__ == '__main__': main()
