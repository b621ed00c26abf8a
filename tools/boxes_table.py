"""Boxes that nobody drew, on twenty classes of birds: DDT, PSOL on its boxes, maps refined

    python tools/boxes_table.py cub [--seeds 0 1 2] [--variants 'PSOL on DDT' 'DDT, a class']

Needs WSOL_DATA and WSOL_WEIGHTS (mobilenetv2_100). DDT reads the ImageNet net at stride 16, is fitted on
train and scored on val and test (seed 0: nothing is drawn). A GAP classifier is trained first (seed 0); PSOL
stands on it, frozen, for each seed, and learns the boxes that DDT (an axis a class, mirrored) finds in the
training images; the other rows are maps of the classifier refined. Runs are saved below --runs and rows
appended to the table, so an interrupted table goes on where it stopped. The last epoch is scored; nothing is
chosen on the test split. CorLoc is at τ = 0, DDT's own threshold.
"""
import time

from plans import CUB, ONE_EPOCH, check_names, command, end, has_row, mean_std, on_test, parsed, parser, \
    row_of, \
    second_stage, trained

from wsol_nb.localize.base import find_localizer
from wsol_nb.methods.boxes import PSOL
from wsol_nb.methods.colocalize import DDT, viewed
from wsol_nb.methods.pseudoboxes import WholeImages, localized_boxes
from wsol_nb.methods.refined import Refined
from wsol_nb.nets.model import wsol_model
from wsol_nb.results import Rows, origin
from wsol_nb.scoring.loop import evaluate
from wsol_nb.train.grid import merged, run_folder, run_grid
from wsol_nb.train.method import GAP, method_to_dict
from wsol_nb.train.run import load_run, loaders_from_config, write_json

DDTS = {'DDT, a class': (True, 1), 'DDT, a class, mirrored': (True, 2), 'DDT, all': (False, 1),
        'DDT, all, mirrored': (False, 2)} # by_class, views
PSOLS = ['PSOL on DDT']
STEPS = {'': [], ', flip': ['flip'], ', GrabCut': ['grabcut'], ', CRF': ['crf'], ', scales': ['scales'],
         ', flip, GrabCut': ['flip', 'grabcut'], ', flip, CRF': ['flip', 'crf']}
REFINED = {f'{cam}{name}': (cam, by) for cam in ('CAM', 'LayerCAM') for name, by in STEPS.items()}
VARIANTS = dict(cub=[*DDTS, *PSOLS, *REFINED])
COLUMNS = ('MaxBoxAcc δ=0.3', 'MaxBoxAcc δ=0.5', 'MaxBoxAcc δ=0.7', 'MaxBoxAccV2', 'CorLoc δ=0.5')


def scored(localizer, dls, **more)->list:
    "A row for val and one for test, there also at the τs of val; CPU seconds an image, boxes read included."
    rows, val = [], None
    for split in ('valid', 'test'):
        cpu = time.process_time()
        report = evaluate(localizer, dls, split, tau_from=val, bootstrap=0, progress=False, fixed_tau=0.)
        each = round((time.process_time() - cpu)/report.n, 3)
        carried = {}
        for entry in report.ledger:
            if entry['tau'] != 'val': continue
            carried |= {f'τ from val: {k}': round(v, 3) for k, v in entry['scores'].items()}
        split, val = report.protocol['split'], report
        rows.append(dict(split=split, n=report.n, seconds_an_image=each) | row_of(report) | carried | more)
    return rows


def first_job(tiny)->tuple:
    "(key, config) of the classifier."
    config = merged(CUB, dict(method=method_to_dict(GAP()), data=dict(seed=0)))
    return dict(variant='CAM', seed=0), merged(config, ONE_EPOCH if tiny else {})


def fitted(config, by_class, positive=True):
    "DDT of the ImageNet net, fitted on train; the loaders; CPU seconds of the fit."
    dls = loaders_from_config(config['data'])
    net = wsol_model(config['arch'], dls.c, pretrained=True, stride=config['stride'], verbose=False)
    start = time.process_time()
    loc = DDT(net, positive=positive).fit(WholeImages(dls.train.dataset, 'cpu'), by_class)
    return loc, dls, round(time.process_time() - start, 1)


def ddt_rows(name, config):
    by_class, views = DDTS[name]
    loc, dls, seconds = fitted(config, by_class)
    return scored(viewed(loc, views), dls, cpu_seconds=seconds)


def pseudo_boxes(config, file):
    "The boxes of DDT in the training images, an axis a class, mirrored; found once."
    if file.is_file(): return file
    start = time.process_time()
    loc, dls, _ = fitted(config, True, positive=False)
    batches = WholeImages(dls.train.dataset, 'cpu')
    boxes = dict(zip(batches.ds.df.image_id, localized_boxes(viewed(loc, 2), batches)))
    seconds = round(time.process_time() - start, 1)
    write_json(file, dict(made='DDT, a class, mirrored', cpu_seconds=seconds, boxes=boxes))
    return file


def psol_job(name, seed, first, folder, boxes, tiny)->tuple:
    "(key, config) of PSOL on the frozen classifier in `folder`."
    method = PSOL(stage1=str(folder), classifier=first['method'], boxes=str(boxes))
    own = {k: method.defaults[k] for k in ('opt', 'wd', 'epochs', 'lr', 'lr_head')}
    config = second_stage(first, method, own, seed=seed)
    return dict(variant=name, seed=seed), merged(config, ONE_EPOCH if tiny else {})


def psol_rows(run):
    "Rows of a run with the CPU seconds of its training."
    return scored(run.localizer(), run.dls(), cpu_seconds=run.config['train'].get('cpu_seconds'))


def refined_rows(name, run):
    "Rows of maps of the classifier, refined."
    of, by = REFINED[name]
    loc = find_localizer('headmaps' if of == 'CAM' else of)(run.model)
    return scored(Refined(loc, by) if by else loc, run.dls())


def show(rows):
    "Mean and standard deviation on test, by variant."
    df = on_test(rows)
    table = mean_std(df, 'variant', [c for c in COLUMNS if c in df])
    table.insert(0, ('runs', ''), df.groupby('variant', sort=False).size())
    print(table.to_string())


def main():
    p = parser(__doc__, 'boxes', VARIANTS)
    p.add_argument('--variants', nargs='+', help='default: all')
    a = parsed(p)
    names, rows, failed = a.variants or VARIANTS[a.data], Rows(a.out), []
    check_names(p, 'variants', names, VARIANTS[a.data])
    runs, (key, first) = a.runs/a.data, first_job(a.tiny)
    folder = run_folder(runs, key, first)
    def left(name, seed): return not has_row(rows.read(), dict(variant=name, seed=seed))
    def add(name, found): rows.add([dict(variant=name, seed=0) | r | origin(command(a, 0, variants=[name]))
                                    for r in found], variant=name, seed=0)
    for name in [n for n in names if n in DDTS and left(n, 0)]: add(name, ddt_rows(name, first))
    for name in [n for n in names if n in PSOLS]:
        seeds = [s for s in a.seeds if left(name, s)]
        if not seeds: continue
        boxes = pseudo_boxes(first, runs/'ddt-boxes.json')
        trained(first, folder)
        for seed in seeds:
            job = psol_job(name, seed, first, folder, boxes, a.tiny)
            failed += run_grid([job], runs, a.out, psol_rows, command(a, seed, variants=[name]))
    for name in [n for n in names if n in REFINED and left(n, 0)]:
        add(name, refined_rows(name, load_run(trained(first, folder))))
    if rows.read(): show(rows.read())
    end(failed)


if __name__ == '__main__': main()
