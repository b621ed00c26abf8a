"""Localization of every top-down method on a trained run: python tools/cam_table.py RUN [--split test] [--every 30] [--out table.csv]

A method a row: MaxBoxAcc at δ .3, .5, .7, V2, ms an image. Cheap methods see the whole split; all see each `every`-th image, and the costly ones only
those, on the channel budget that the row states. A row is written when it is done and is not computed again: after an interruption, the same
command goes on.
"""
import argparse
import csv
import time
from pathlib import Path
from types import SimpleNamespace

from wsol_nb.cam.excitation import ExcitationBackprop, FeedbackCAM
from wsol_nb.cam.gradient import CAM, EigenCAM, GradCAM, GradCAMPlusPlus, HiResCAM, LayerCAM, SmoothGradCAMPlusPlus, XGradCAM
from wsol_nb.cam.score import ISCAM, SSCAM, AblationCAM, ScoreCAM
from wsol_nb.data.dataset import LocalizableSplit
from wsol_nb.results import hardware
from wsol_nb.train.run import load_run
from wsol_nb.localize.base import HeadMaps
from wsol_nb.scoring.loop import evaluate
import torch

CHEAP = {c.__name__: c for c in (HeadMaps, CAM, GradCAM, HiResCAM, GradCAMPlusPlus, XGradCAM, LayerCAM, EigenCAM, ExcitationBackprop)}
CHEAP |= {'GradCAMPlusPlus channel_norm': lambda m: GradCAMPlusPlus(m, channel_norm=True), 'ExcitationBackprop contrastive': lambda m: ExcitationBackprop(m, contrastive=True)}
COSTLY = {'SmoothGradCAMPlusPlus': SmoothGradCAMPlusPlus, 'FeedbackCAM': FeedbackCAM, 'AblationCAM': AblationCAM, 'AblationCAM channels=64': lambda m: AblationCAM(m, channels=64), 'ScoreCAM channels=64': lambda m: ScoreCAM(m, channels=64),
          'ScoreCAM channels=256': lambda m: ScoreCAM(m, channels=256), 'ISCAM channels=32 n=4': lambda m: ISCAM(m, channels=32, n=4), 'SSCAM channels=32 n=4': lambda m: SSCAM(m, channels=32, n=4)}
FIELDS = ('method', 'split', 'images', 'layer', 'max_box_acc_0.3', 'max_box_acc_0.5', 'max_box_acc_0.7', 'max_box_acc_v2', 'centre_0.5', 'variance_kept', 'ms_image', 'hardware', 'command')


def thinned(dls, every):
    "The loaders, with only each `every`-th image of a split to score."
    def localizable(split):
        part = dls.localizable(split)
        return LocalizableSplit(part.df[::every], dls.info, part.split, part.bs, 0, part.device)
    return SimpleNamespace(localizable=localizable, info=dls.info, vocab=dls.vocab, c=dls.c, skipped=dls.skipped)


def row(name, make, model, dls, split):
    "The scores of one method, and its time without that of the boxes."
    loc, seconds, kept = make(model), [0.], []
    raw = loc.raw

    def timed(*args, **kw):
        t = time.perf_counter()
        out = raw(*args, **kw)
        seconds[0] += time.perf_counter() - t
        if getattr(loc, 'kept', None) is not None: kept.extend(loc.kept.tolist())
        return out
    loc.raw = timed
    r = evaluate(loc, dls, split, tau_from=None, progress=False)
    scores = {f'max_box_acc_{d}': f"{r.boxes['max_box_acc'][d]['value']:.2f}" for d in ('0.3', '0.5', '0.7')}
    return dict(method=name, split=r.protocol['split'], images=r.n, layer=', '.join(getattr(loc, 'layers', None) or []), **scores, max_box_acc_v2=f"{r.boxes['max_box_acc_v2']:.2f}",
                **{'centre_0.5': f"{r.centre['max_box_acc']['0.5']['value']:.2f}"}, variance_kept=f'{sum(kept)/len(kept):.3f}' if kept else '', ms_image=f'{1e3*seconds[0]/r.n:.1f}')


def main(run, split, every, out):
    r = load_run(run)
    dls = r.dls(check=False, bs=16)
    few, out = thinned(dls, every), Path(out)
    rows = list(csv.DictReader(out.open())) if out.is_file() else []
    done = {(d['method'], d['split'], d['images']) for d in rows}
    more = dict(hardware=', '.join(str(v) for v in hardware().values() if v is not None) + f' cores, {torch.get_num_threads()} thread', command=f"python tools/cam_table.py RUN --split {split} --every {every}; RUN: {r.config['arch']}, {r.config['data'].get('dataset')}")
    for images, methods in ((dls, CHEAP), (few, CHEAP | COSTLY)):
        n = str(len(images.localizable(split)))
        for name, make in methods.items():
            if (name, images.localizable(split).split, n) in done: continue
            new = row(name, make, r.model, images, split) | more
            with out.open('a', newline='') as f:
                w = csv.DictWriter(f, FIELDS)
                if not f.tell(): w.writeheader()
                w.writerow(new)
            print(*(f'{k}={new[k]}' for k in FIELDS[:-2] if new[k]), flush=True)


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('run', help='run folder of wsol_train')
    p.add_argument('--split', default='test', help="a split's name or role")
    p.add_argument('--every', type=int, default=30, help='the costly methods see each such image')
    p.add_argument('--out', default='nbs/results/cub20_topdown.csv', help='table; rows that are in it are not computed again')
    a = p.parse_args()
    main(a.run, a.split, a.every, a.out)
