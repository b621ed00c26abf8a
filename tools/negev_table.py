"""NEGEV beside the CAM that it is trained on

    python tools/negev_table.py {tissue,glas} [--seeds 0 1 2] [--variants NEGEV C+] [--stage1 RUN]

The first stage is the CAM classifier of tools/pooling_table.py, trained as it says there; it is
trained here, once a seed, or given. tissue is the tissue world with its class of normal images: each variant
of the loss and of the sampler, the last epoch of both stages. glas needs WSOL_DATA and WSOL_WEIGHTS
(mobilenetv2_100): train 67 images, valcl to choose an epoch by class (cl), valpx, three images a class, to
choose one by masks (loc), test 80. Both stages are scored at these epochs and at the last. NEGEV stands on
the classifier's last epoch: valcl knows none that is better, and six masks are too few to choose a
classifier. Runs are saved below --runs and rows appended to the table, so an interrupted table goes on where
it stopped. Nothing is chosen on the test split.
"""
import json
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from plans import (GLAS, ONE_EPOCH, SYNTH, command, drawing, end, has_row, mean_std, on_test, parsed, parser,
                    row_of, second_stage, trained)

from wsol_nb.data.worlds.tissue import TissueWorld
from wsol_nb.dense.negev import NEGEV, QuietMaps, positives
from wsol_nb.localize.mirrored import Mirrored
from wsol_nb.results import Rows, origin
from wsol_nb.scoring.loop import evaluate
from wsol_nb.train.grid import merged, run_folder, run_grid
from wsol_nb.train.method import GAP, method_to_dict
from wsol_nb.train.run import load_run

FIRST = dict(tissue=SYNTH, glas=GLAS)
SECOND = dict(tissue=dict(epochs=10, lr=1e-3, lr_head=1e-3, select='last'),
              glas=dict(epochs=20, lr=1e-3, lr_head=1e-3, select='loc'))
VARIANTS = {'NEGEV': {}, 'C+': dict(n_bg=0, negatives=False), 'C+C-': dict(negatives=False),
            'C+D-': dict(n_bg=0), 'static': dict(static=True), 'bg=published': dict(bg='published'),
            'fg=otsu': dict(fg='otsu'), 'one view': dict(views=1)}
DEFAULT = dict(tissue=list(VARIANTS), glas=['NEGEV', 'one view'])
# The epochs that are scored, of each stage; a frozen classifier is the same in all of the second.
EPOCHS = dict(tissue=(('last',), ('last',)), glas=(('cl', 'loc', 'last'), ('loc', 'last')))
KEEP = ('PxAP', 'F1+', 'F1−', 'best Dice of all pixels', 'all ones: PxAP', 'centre: PxAP')
SHOWN = ('PxAP', 'PxAP (positives)', 'F1+', 'F1−', 'best Dice of all pixels', 'all ones: PxAP')


# Rows

def scores(localizer, dls, split)->dict:
    "The figures of a split, over all images and, where some are negative, over the others alone."
    report = evaluate(localizer, dls, split, tau_from=None, bootstrap=0, progress=False)
    row = {k: v for k, v in row_of(report).items() if k in KEEP}
    if dls.info.negative:
        own = evaluate(localizer, positives(dls), split, tau_from=None, bootstrap=0, progress=False)
        others = row_of(own)
        row |= {f'{k} (positives)': others[k] for k in ('PxAP', 'all ones: PxAP')}
    return dict(split=report.protocol['split'], n=report.n) | row


def valid_accuracy(path, select)->float:
    "Accuracy on the split that selects by class, in percent, at an epoch of a run."
    history, file = pd.read_csv(path/'history.csv'), path/'selection.json'
    epoch = json.loads(file.read_text())[select]['epoch'] if file.is_file() else len(history) - 1
    return round(100*history.accuracy[epoch], 1)


def rows_of(path, dls, epochs, localizer)->list:
    "Rows of a run at those of `epochs` that it keeps, on the split that tunes and on test."
    kept = [e for e in epochs if (path/f'select-{e}.safetensors').is_file()]
    rows = []
    for select in kept or ['last']:
        found = localizer(load_run(path, select=select if kept else None))
        common = dict(select=select, valid_accuracy=valid_accuracy(path, select))
        rows += [common | scores(found, dls, split) for split in ('tune', 'test')]
    return rows


def readings(dls)->dict:
    "Ways to read the maps of the classifier, functions of a run, by their names in the table."
    negative = np.flatnonzero(np.isin(dls.class_ids, dls.info.negative)).tolist()
    ways = {'CAM': lambda r: r.localizer(), 'CAM, four views': lambda r: Mirrored(r.model, views=4)}
    if negative:
        ways |= {'quiet CAM': lambda r: QuietMaps(r.model, negative),
                 'quiet CAM, four views': lambda r: Mirrored(r.model, QuietMaps, 4, negative=negative)}
    return ways


def add_readings(rows, seed, path, epochs, typed):
    "The rows of the classifier that are not there yet."
    dls = load_run(path).dls()
    for name, localizer in readings(dls).items():
        key = dict(method=name, seed=seed)
        if rows.having(**key): continue
        rows.add([key | row | origin(typed) for row in rows_of(path, dls, epochs, localizer)], **key)
        print(f'{key} is done', flush=True)


def score_second(run, epochs)->list:
    "The rows of a variant."
    return rows_of(run.path, run.dls(), epochs, lambda r: r.localizer())


def show(rows):
    "Mean and standard deviation on test, by method and epoch."
    df = on_test(rows)
    print(mean_std(df, ['method', 'select'], [c for c in SHOWN if c in df]).to_string())


# Jobs

def first_config(data, seed, world)->dict:
    "The config of the classifier."
    place = world.data() if world else {}
    config = FIRST[data] | dict(method=method_to_dict(GAP()))
    return merged(config, dict(data=place | dict(seed=seed)))


def second_jobs(data, seed, names, first, folder, classifier)->list:
    "(key, config) of variants on the classifier in `folder`, on the data of the config `first`."
    jobs = []
    for name in names:
        method = NEGEV(stage1=str(folder), classifier=classifier, **VARIANTS[name])
        jobs.append((dict(method=name, seed=seed), second_stage(first, method, SECOND[data])))
    return jobs


def names_of_first(data)->list:
    "The rows that a classifier has."
    both = ['CAM', 'CAM, four views']
    return both + [f'quiet {name}' for name in both] if data == 'tissue' else both


def main():
    p = parser(__doc__, 'negev', FIRST)
    p.add_argument('--variants', nargs='*', choices=VARIANTS,
                   help='default: all on tissue, NEGEV and one view on glas')
    p.add_argument('--stage1', type=Path, help='a trained classifier, for one seed')
    a = parsed(p)
    if a.stage1 and len(a.seeds) > 1: p.error('--stage1 is of one seed')
    names = DEFAULT[a.data] if a.variants is None else a.variants
    world = None
    if a.data == 'tissue': world = drawing(TissueWorld, a.runs, a.tiny, dict(n_train=320), normal=True)
    rows, runs, (of_first, of_second), failed = Rows(a.out), a.runs/a.data, EPOCHS[a.data], []
    for seed in a.seeds:
        first = first_config(a.data, seed, world)
        if a.tiny: first = merged(first, ONE_EPOCH)
        folder = a.stage1.resolve() if a.stage1 else run_folder(runs, dict(method='CAM', seed=seed), first)
        jobs = second_jobs(a.data, seed, names, first, folder, None if a.stage1 else first['method'])
        if a.tiny: jobs = [(key, merged(config, ONE_EPOCH)) for key, config in jobs]
        keys = [dict(method=n, seed=seed) for n in names_of_first(a.data)] + [key for key, _ in jobs]
        there, typed = rows.read(), command(a, seed, variants=a.variants, stage1=a.stage1 and [a.stage1])
        if all(has_row(there, key) for key in keys): continue
        if world: world.write()
        if not a.stage1: trained(first, folder)
        add_readings(rows, seed, folder, of_first, typed)
        score = partial(score_second, epochs=of_second)
        failed += run_grid(jobs, runs, a.out, score, typed)
    if rows.read(): show(rows.read())
    end(failed)


if __name__ == '__main__': main()
