"""What the whole ledger of a run costs: `wsol_eval` beside a plain `evaluate`, in processor time.

    python tools/bench.py ledger        with WSOL_DATA and WSOL_WEIGHTS

A run with three distinct kept epochs (a MobileNetV2 with the shared weights, each time shaken a little: the
time of a pass is not in the weights) is scored on 39 test images of CUB, with τ from 100 of val, and on all
of GlaS. The plain call scores the same images once, prints nothing and draws nothing; `wsol_eval` decodes its
split first, prints, and writes report, table and page, which costs the same for few images and many. Rows go
to nbs/results/ledger_times.csv.
"""
import contextlib
import io
import sys
import tempfile
import time
from pathlib import Path

import torch

from wsol_nb.core import env_folder # first: lets timm be imported beside a CUDA torchvision
from wsol_nb.cli.evaluate import wsol_eval
from wsol_nb.data.loaders import WSOLDataLoaders
from wsol_nb.results import Rows, origin, results_folder
from wsol_nb.scoring.loop import evaluate
from wsol_nb.train import interpret
from wsol_nb.train.learner import wsol_learner
from wsol_nb.train.run import load_run, save_run, save_weights, write_json

COMMAND = 'python tools/bench.py ledger'
SETS = dict(CUB=dict(train=25, val=1, test=15), **{'GLAS/fold-0': dict(train=1, valcl=1, valpx=1, test=1)})


def some(root, data, dataset, every):
    "A root with each `every`th image of the splits of a dataset."
    (root/Path(dataset).parts[0]).symlink_to(data/Path(dataset).parts[0])
    for split, step in every.items():
        meta = root/'metadata'/dataset/split
        meta.mkdir(parents=True)
        for file in (data/'metadata'/dataset/split).iterdir():
            lines = file.read_text().splitlines()
            listed = (file.parent/'image_ids.txt').read_text().splitlines()
            ids = {line.split(',')[0] for line in listed[::step]}
            (meta/file.name).write_text('\n'.join(line for line in lines if line.split(',')[0] in ids))


def three_epochs(root, dataset, out):
    "A run folder that keeps three epochs, no two of which are one."
    dls = WSOLDataLoaders.from_metadata(root, dataset, size=224, bs=32, num_workers=0)
    learn = wsol_learner(dls, 'mobilenetv2_100', stride=16, path=out)
    torch.manual_seed(0)
    for name in ('cl', 'loc', 'last'):
        with torch.no_grad():
            for p in learn.model.parameters(): p.mul_(1 + .01*torch.rand(()))
        save_weights(learn.model, out/f'select-{name}.safetensors')
    save_run(learn, out)
    kept = {name: dict(epoch=i) for i, name in enumerate(('cl', 'loc', 'last'))}
    write_json(out/'selection.json', kept | dict(kept='last'))


def seconds(f, *args, **kwargs):
    "Processor time of a call that prints nothing, and what it returns."
    start = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()): out = f(*args, **kwargs)
    return time.process_time() - start, out


@contextlib.contextmanager
def timed_ledger():
    "A list of what `score_run` takes of the calls inside."
    whole, took = interpret.score_run, []

    def timed(*args, **kwargs):
        start = time.process_time()
        out = whole(*args, **kwargs)
        took.append(time.process_time() - start)
        return out
    interpret.score_run = timed
    try: yield took
    finally: interpret.score_run = whole


def plain(run):
    r = load_run(run)
    return evaluate(r.localizer(), r.dls(check=[], num_workers=0), 'test', progress=False)


def one(data, dataset, every):
    "The row of a dataset."
    with tempfile.TemporaryDirectory() as tmp:
        root, run = Path(tmp)/'data', Path(tmp)/'run'
        root.mkdir()
        some(root, data, dataset, every)
        three_epochs(root, dataset, run)
        with timed_ledger() as took: whole, full = seconds(wsol_eval, run, workers=0)
        once, report = seconds(plain, run) # last: what is done once a process is not its share
        assert len(full.ledger) == 3*len(report.ledger) and full.accuracy == report.accuracy
        other = load_run(run).dls(check=[]).localizable('tune')
    images = full.n + len(other)
    figures = dict(plain_s=once, ledger_s=took[0], eval_s=whole)
    figures |= dict(ledger_ratio=took[0]/(3*once), eval_ratio=whole/(3*once))
    return dict(dataset=dataset, images=images, epochs=3, rows=len(full.ledger)) | {
        k: round(v, 2) for k, v in figures.items()}


def ledger():
    "Print and keep the row of each dataset."
    data, rows = env_folder('WSOL_DATA'), Rows(results_folder()/'ledger_times.csv')
    if not data or not env_folder('WSOL_WEIGHTS'):
        return print('ledger: skipped, WSOL_DATA and WSOL_WEIGHTS are not set')
    for dataset, every in SETS.items():
        row = one(data, dataset, every)
        rows.add([row | origin(COMMAND)], dataset=dataset)
        print(f'ledger of {dataset}, {row["images"]} images, 3 epochs: {row["ledger_ratio"]:.2f} × 3 × '
              f'evaluate ({row["plain_s"]} s), wsol_eval with its page {row["eval_ratio"]:.2f} (aim 1.3)',
              flush=True)


if __name__ == '__main__':
    torch.set_num_threads(1)
    sys.exit(ledger())
