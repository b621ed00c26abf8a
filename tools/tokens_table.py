"""Methods of transformers: TS-CAM and its parts, DiPS and its ablation

    python tools/tokens_table.py {tscam,dips} [--seeds 0 1] [--variants NAME ...]

Both need WSOL_DATA and WSOL_WEIGHTS. tscam trains the shared ViT-Tiny/16 on CUB-20 (five epochs) and scores
each of its maps; dips trains a GAP classifier (MobileNetV2) first and, on it, a decoder from proposals of the
ViT-Tiny's heads, which was trained on ImageNet with labels: no self-supervised ViT is at hand. Rows of val
and test are appended as runs finish, so an interrupted table goes on; the last epoch is scored, and nothing
is chosen on test.
"""
from plans import (CUB, MOBILENET, ONE_EPOCH, check_names, command, cost, end, has_row, mean_std, on_test,
                    parsed, parser, row_of, second_stage, trained)

from wsol_nb.results import Rows
from wsol_nb.scoring.loop import evaluate
from wsol_nb.train.grid import merged, run_folder, run_grid
from wsol_nb.train.method import GAP, method_to_dict
from wsol_nb.vit.fusion import DiPS
from wsol_nb.vit.tscam import TSCAM

VIT = 'vit_tiny_patch16_224'
TOKENS = merged(MOBILENET, dict(arch=VIT, stride=None, data=dict(dataset='CUB', bs=25),
                                train=dict(opt='adamw', wd=.05, epochs=5, lr=5e-5, lr_head=1e-3)))
PARTS = {'A* × S': 'signed', 'A* × relu S': 'relu', 'A* × minmax S': 'minmax', 'S': 'semantic',
         'A*': 'attention'}
NUMBERS = {f'n={n}': dict(n=n) for n in (1, 2, 5, 100)}
AREAS = {f'min_area={a:g}': dict(min_area=a) for a in (.05, .3, .5, .75)}
LOSSES = {'no gate': dict(cls=0.), 'no CRF': dict(crf=0.), 'seeds alone': dict(cls=0., crf=0.)}
LAYERS = {'last layer': dict(layers=-1)}
VARIANTS = dict(tscam={'TS-CAM': TSCAM(), 'GAP on tokens': GAP()}, dips=NUMBERS | AREAS | LOSSES | LAYERS)
HEADS = dict(vit=VIT, layers='last 4') # late layers: a net trained on labels, see `03_attention`
COLUMNS = ('MaxBoxAcc δ=0.3', 'MaxBoxAcc δ=0.5', 'MaxBoxAcc δ=0.7', 'MaxBoxAccV2', 'Top-1 localization δ=0.5')


def maps_of(run):
    "(name, localizer) of the parts of TS-CAM, one after the other, or of the method's own map."
    if not isinstance(run.method, TSCAM): return iter([('own', run.localizer())])
    def parts():
        for name, how in PARTS.items():
            run.model.coupling = how
            yield name, run.localizer()
    return parts()


def score(run)->list:
    "Rows of val and test for each map, on test also at the τs that val chose."
    rows, dls = [], run.dls()
    for name, localizer in maps_of(run):
        for split, tau_from in (('valid', None), ('test', 'tune')):
            report = evaluate(localizer, dls, split, tau_from=tau_from, bootstrap=0, progress=False)
            carried = {}
            for entry in report.ledger:
                if entry['tau'] != 'val': continue
                carried |= {f'τ from val: {k}': round(v, 3) for k, v in entry['scores'].items()}
            key = dict(map=name, split=report.protocol['split'], n=report.n)
            rows.append(key | row_of(report) | carried | cost(run))
    return rows


def jobs_of(a, seed):
    "(key, config) of a classifier, or None, and of the variants."
    names = a.variants or VARIANTS[a.data]
    if a.data == 'tscam':
        seeded = dict(data=dict(seed=seed))
        return None, [(dict(variant=n, seed=seed), merged(TOKENS, seeded | dict(
            method=method_to_dict(VARIANTS['tscam'][n])))) for n in names]
    config = merged(CUB | dict(method=method_to_dict(GAP())), dict(data=dict(seed=seed)))
    key = dict(variant='CAM', seed=seed)
    folder, jobs = run_folder(a.runs/a.data, key, config), []
    for n in names:
        method = DiPS(stage1=str(folder), classifier=config['method'], **HEADS | VARIANTS['dips'][n])
        train = {k: DiPS.defaults[k] for k in ('epochs', 'lr', 'lr_head')}
        jobs.append((dict(variant=n, seed=seed), second_stage(config, method, train, resize=224)))
    return (key, config, folder), jobs


def show(rows):
    "Mean and standard deviation on test."
    df = on_test(rows)
    print(mean_std(df, ['variant', 'map'], [c for c in COLUMNS if c in df]).to_string())


def main():
    p = parser(__doc__, 'tokens', VARIANTS)
    p.add_argument('--variants', nargs='+', help='default: all')
    a = parsed(p)
    check_names(p, 'variants', a.variants, VARIANTS[a.data])
    rows, runs, failed = Rows(a.out), a.runs/a.data, []
    for seed in a.seeds:
        first, jobs = jobs_of(a, seed)
        if a.tiny: jobs = [(k, merged(c, ONE_EPOCH)) for k, c in jobs]
        typed, there = command(a, seed, variants=a.variants), rows.read()
        left = [k for k, _ in jobs if not has_row(there, k)]
        if first and left:
            failed += run_grid([first[:2]], runs, a.out, score, typed)
            trained(*first[1:]) # its rows may be there without it
        failed += run_grid(jobs, runs, a.out, score, typed)
    if rows.read(): show(rows.read())
    end(failed)


if __name__ == '__main__': main()
