"""All pooling heads trained and scored in one table

    python tools/pooling_table.py {synth,parts,tissue,cub,glas} [--seeds 0 1 2] [--methods GAP LSE]

synth is the default objects world, parts that world with parts of four sizes, tissue the tissue world with
and without normal images and with 320 images to train on, all drawn here and learnt from scratch; cub and
glas need WSOL_DATA and WSOL_WEIGHTS (mobilenetv2_100). Runs are saved below --runs and rows appended to the
table, so an interrupted table goes on where it stopped. `--again` scores saved runs anew, e.g. when reports
have gained columns. Hyper-parameters are each method's defaults; the last epoch is scored; nothing is chosen
on the test split.
"""
from plans import (CUB, GLAS, ONE_EPOCH, SYNTH, check_names, command, cost, drawing, end, has_row, on_test,
                    parsed, parser, row_of)

from wsol_nb.data.worlds.objects import ObjectsWorld
from wsol_nb.data.worlds.tissue import TissueWorld
from wsol_nb.methods.pooling import BOTTOM_UP
from wsol_nb.results import Rows, origin
from wsol_nb.scoring.loop import evaluate
from wsol_nb.train.grid import combinations, merged, run_folder, run_grid
from wsol_nb.train.method import method_to_dict
from wsol_nb.train.run import load_run

RECIPES = dict(synth=SYNTH, parts=SYNTH, tissue=SYNTH, cub=CUB, glas=GLAS)
WORLDS = dict(synth=ObjectsWorld, parts=ObjectsWorld, tissue=TissueWorld)
# The field of the world that varies, and its values.
AXES = dict(parts=('part_ratio', (.3, .4, .5, .6)), tissue=('normal', (True, False)))
COUNTS = dict(tissue=dict(n_train=320))
METHODS = {m.__name__: m for m in BOTTOM_UP}


def drawings(data, runs, tiny)->dict:
    "The worlds of a table by the value of the field that varies; None where there is one only."
    if data not in WORLDS: return {}
    kind, more = WORLDS[data], dict(tiny=tiny, counts=COUNTS.get(data))
    if data not in AXES: return {None: drawing(kind, runs, **more)}
    name, values = AXES[data]
    return {v: drawing(kind, runs, **more, **{name: v}) for v in values}


def jobs_of(data, seed, methods, worlds, tiny)->list:
    "(key, config) of each method on each world."
    base = merged(RECIPES[data], ONE_EPOCH if tiny else {})
    axes = dict(method={n: dict(method=method_to_dict(METHODS[n]())) for n in methods},
                seed={seed: dict(data=dict(seed=seed))})
    places = {value: dict(data=world.data()) for value, world in worlds.items()}
    if data in AXES: axes[AXES[data][0]] = places
    elif places: base = merged(base, places[None])
    return combinations(base, **axes)


def score(run)->list:
    "A row for the validation split and one for test."
    rows, dls = [], run.dls()
    for split in ('valid', 'test'):
        report = evaluate(run.localizer(), dls, split, tau_from=None, bootstrap=0, progress=False)
        rows.append(dict(split=report.protocol['split'], n=report.n) | row_of(report) | cost(run))
    return rows


def score_again(jobs, runs, rows, typed):
    "Rows of the runs that are saved, in place of those that are there."
    for key, config in jobs:
        folder = run_folder(runs, key, config)
        if not (folder/'model.safetensors').is_file(): continue
        rows.add([key | row | origin(typed) for row in score(load_run(folder))], **key)
        print(f'{key} is scored anew', flush=True)


def show(rows):
    "The table on test, mean over seeds, the centre baseline last."
    df = on_test(rows)
    named = [c for c in df.columns if f'centre: {c}' in df.columns]
    keys = ['method', *(c for c in ('part_ratio', 'normal') if c in df)]
    table = df.groupby(keys, sort=False)[[c for c in ('accuracy', *named) if c in df]].mean()
    if named and len(keys) == 1:
        table.loc['centre'] = df[[f'centre: {c}' for c in named]].mean().set_axis(named)
    print(table.round(1).to_string())


def main():
    p = parser(__doc__, 'pooling', RECIPES)
    p.add_argument('--methods', nargs='+', help='default: all')
    p.add_argument('--again', action='store_true', help='score saved runs anew')
    a = parsed(p)
    check_names(p, 'methods', a.methods, METHODS)
    rows, runs, worlds, failed = Rows(a.out), a.runs/a.data, drawings(a.data, a.runs, a.tiny), []
    for seed in a.seeds:
        jobs = jobs_of(a.data, seed, a.methods or METHODS, worlds, a.tiny)
        there, typed = rows.read(), command(a, seed, methods=a.methods)
        if not a.again and all(has_row(there, key) for key, _ in jobs): continue
        for w in worlds.values(): w.write()
        if a.again: score_again(jobs, runs, rows, typed)
        failed += run_grid(jobs, runs, a.out, score, typed)
    if rows.read(): show(rows.read())
    end(failed)


if __name__ == '__main__': main()
