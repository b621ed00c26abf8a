"""F-CAM beside the maps it learns from

    python tools/fcam_table.py {world,cub} [--seeds 0 1 2] [--variants cam layercam]

world is the demo's world, a classifier from scratch and the ablations of the paper; cub needs WSOL_DATA and
WSOL_WEIGHTS (mobilenetv2_100). For each seed a GAP classifier is trained first, then each variant on top of
it, frozen; CAM itself is the row `CAM`. Runs are saved below --runs and rows appended to the table, so an
interrupted table goes on where it stopped. The last epoch is scored; nothing is chosen on the test split.
"""
from plans import (CUB, ONE_EPOCH, SYNTH, check_names, command, drawing, end, has_row, mean_std, on_test,
                    parsed, parser, row_of, second_stage, trained)

from wsol_nb.data.worlds.objects import ObjectsWorld
from wsol_nb.dense.fcam import FCAM
from wsol_nb.results import Rows
from wsol_nb.scoring.loop import evaluate
from wsol_nb.train.grid import merged, run_folder, run_grid
from wsol_nb.train.method import GAP, method_to_dict

# Chosen on val; as published, the CRF counts from the first step.
WORLD = dict(crf=.5, sigma_xy=30., erode=1, min_p=.2, crf_start=0, views=1)
ABLATION = {'SR': dict(crf=0.), 'SR + ASC': dict(crf=0., size=.1), 'SR + CRF': {},
            'SR + CRF + ASC': dict(size=.1)}
OTHERS = {'CRF from epoch 1': dict(crf_start=1), 'mirrored': dict(views=2)}
NUMBERS = {f'n={n}': dict(n_fg=n, n_bg=n) for n in (1, 3, 30, 100)}
STATIC = {f'static, n={n}': dict(n_fg=n, n_bg=n, static=True) for n in (1, 10, 100)}
WEIGHTS = {f'λ={c:g}': dict(crf=c) for c in (.05, .15, 1.5, 5., 50.)}
SEEDS = {f'seeds: {s}': dict(seeds=s) for s in ('gradcamplusplus', 'layercam')}
LOCALIZERS = ('cam', 'gradcamplusplus', 'layercam')
MIRRORED = {s: dict(seeds=s) for s in LOCALIZERS}
PLAIN = {f'{s}, not mirrored': dict(seeds=s, views=1) for s in LOCALIZERS}
VARIANTS = dict(world=ABLATION | OTHERS | NUMBERS | STATIC | WEIGHTS | SEEDS, cub=MIRRORED | PLAIN)
COMMON = dict(world=WORLD, cub={}) # what all variants share
FIRST = dict(world=merged(SYNTH, dict(train=dict(epochs=15))), cub=CUB) # how the classifier is trained
SECOND = dict(world=dict(epochs=5, lr=3e-3, lr_head=3e-3),
              cub={k: FCAM.defaults[k] for k in ('epochs', 'lr', 'lr_head')})
COLUMNS = ('MaxBoxAcc δ=0.3', 'MaxBoxAcc δ=0.5', 'MaxBoxAcc δ=0.7', 'MaxBoxAccV2', 'Top-1 localization δ=0.5',
           'PxAP')


def first_job(data, seed, world)->tuple:
    "(key, config) of the classifier."
    place = world.data() if world else {}
    config = FIRST[data] | dict(method=method_to_dict(GAP()))
    return dict(variant='CAM', seed=seed), merged(config, dict(data=place | dict(seed=seed)))


def second_job(data, seed, name, first, folder)->tuple:
    "(key, config) of a variant on the classifier of config `first` in `folder`; images are flipped only."
    on_it = dict(stage1=str(folder), classifier=first['method']) # named, so that it need not be trained yet
    method = FCAM(**on_it, **COMMON[data] | VARIANTS[data][name])
    config = second_stage(first, method, SECOND[data], resize=first['data']['size'])
    return dict(variant=name, seed=seed), config


def score(run)->list:
    "A row for val and one for test, there also at the τs that val chose."
    rows, dls, train = [], run.dls(), run.config['train']
    took = {k: train.get(k) for k in ('cpu_seconds', 'wall_seconds')}
    for split, tau_from in (('valid', None), ('test', 'tune')):
        report = evaluate(run.localizer(), dls, split, tau_from=tau_from, bootstrap=0, progress=False)
        carried = {}
        for entry in report.ledger:
            if entry['tau'] != 'val': continue
            carried |= {f'τ from val: {k}': round(v, 3) for k, v in entry['scores'].items()}
        rows.append(dict(split=report.protocol['split'], n=report.n) | row_of(report) | carried | took)
    return rows


def show(rows):
    "Mean and standard deviation on test, by variant."
    df = on_test(rows)
    columns = [c for c in COLUMNS if c in df and df[c].notna().any()]
    table = mean_std(df, 'variant', columns)
    table.insert(0, ('runs', ''), df.groupby('variant').size())
    print(table.to_string())


def main():
    p = parser(__doc__, 'fcam', VARIANTS)
    p.add_argument('--variants', nargs='+', help='default: all')
    a = parsed(p)
    check_names(p, 'variants', a.variants, VARIANTS[a.data])
    world = drawing(ObjectsWorld, a.runs, a.tiny) if a.data == 'world' else None
    rows, runs, failed = Rows(a.out), a.runs/a.data, []
    for seed in a.seeds:
        key, config = first_job(a.data, seed, world)
        if a.tiny: config = merged(config, ONE_EPOCH)
        folder, typed = run_folder(runs, key, config), command(a, seed, variants=a.variants)
        jobs = [second_job(a.data, seed, name, config, folder) for name in a.variants or VARIANTS[a.data]]
        if a.tiny: jobs = [(k, merged(c, ONE_EPOCH)) for k, c in jobs]
        there = rows.read()
        left = [k for k, _ in jobs if not has_row(there, k)]
        if not left and has_row(there, key): continue
        if world: world.write()
        failed += run_grid([(key, config)], runs, a.out, score, typed)
        if left: trained(config, folder) # its rows may be there without it
        failed += run_grid(jobs, runs, a.out, score, typed)
    if rows.read(): show(rows.read())
    end(failed)


if __name__ == '__main__': main()
