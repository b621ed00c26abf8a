"""Localization of every top-down method on a trained run

    python tools/cam_table.py RUN [--split test] [--every 30] [--out CSV]

A method a row: MaxBoxAcc at δ .3, .5, .7, V2, ms an image. Cheap methods see the whole split; all see each
`every`-th image, and the costly ones only those, on the channel budget that the row states. A row is written
when it is done and is not computed again: after an interruption, the same command goes on.
"""
import argparse
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

from wsol_nb.cam.excitation import ExcitationBackprop, FeedbackCAM
from wsol_nb.cam.gradient import (
    CAM, EigenCAM, GradCAM, GradCAMPlusPlus, HiResCAM, LayerCAM, SmoothGradCAMPlusPlus, XGradCAM)
from wsol_nb.cam.score import ISCAM, SSCAM, AblationCAM, ScoreCAM
from wsol_nb.data.dataset import LocalizableSplit
from wsol_nb.localize.base import HeadMaps
from wsol_nb.results import Rows, origin, results_folder
from wsol_nb.scoring.loop import evaluate
from wsol_nb.train.run import load_run

PLAIN = (HeadMaps, CAM, GradCAM, HiResCAM, GradCAMPlusPlus, XGradCAM, LayerCAM, EigenCAM, ExcitationBackprop)
CHEAP = {c.__name__: c for c in PLAIN} | {
    'GradCAMPlusPlus channel_norm': partial(GradCAMPlusPlus, channel_norm=True),
    'ExcitationBackprop contrastive': partial(ExcitationBackprop, contrastive=True)}
COSTLY = {
    'SmoothGradCAMPlusPlus': SmoothGradCAMPlusPlus, 'FeedbackCAM': FeedbackCAM, 'AblationCAM': AblationCAM,
    'AblationCAM channels=64': partial(AblationCAM, channels=64),
    'ScoreCAM channels=64': partial(ScoreCAM, channels=64),
    'ScoreCAM channels=256': partial(ScoreCAM, channels=256),
    'ISCAM channels=32 n=4': partial(ISCAM, channels=32, n=4),
    'SSCAM channels=32 n=4': partial(SSCAM, channels=32, n=4)}


def thinned(dls, every):
    "The loaders, with only each `every`-th image of a split to score."
    def localizable(split):
        part = dls.localizable(split)
        return LocalizableSplit(part.df[::every], dls.info, part.split, part.bs, 0, part.device)
    same = dict(info=dls.info, vocab=dls.vocab, c=dls.c, skipped=dls.skipped)
    return SimpleNamespace(localizable=localizable, **same)


def watch(localizer)->SimpleNamespace:
    "Let a localizer count the seconds of its maps and the variance that its channels keep."
    seen, raw = SimpleNamespace(seconds=0., kept=[]), localizer.raw

    def timed(*args, **kw):
        start = time.perf_counter()
        out = raw(*args, **kw)
        seen.seconds += time.perf_counter() - start
        if getattr(localizer, 'kept', None) is not None: seen.kept.extend(localizer.kept.tolist())
        return out
    localizer.raw = timed
    return seen


def row_of_method(localizer, dls, split)->dict:
    "The scores of a method, and its time without that of the boxes."
    seen = watch(localizer)
    r = evaluate(localizer, dls, split, tau_from=None, progress=False)
    acc, kept = r.boxes['max_box_acc'], seen.kept
    row = dict(layer=', '.join(getattr(localizer, 'layers', None) or []))
    row |= {f'max_box_acc_{d}': round(acc[d]['value'], 2) for d in ('0.3', '0.5', '0.7')}
    row |= {'max_box_acc_v2': round(r.boxes['max_box_acc_v2'], 2),
            'centre_0.5': round(r.centre['max_box_acc']['0.5']['value'], 2)}
    return row | dict(variance_kept=round(sum(kept)/len(kept), 3) if kept else None,
                      ms_image=round(1e3*seen.seconds/r.n, 1))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('run', help='run folder of wsol_train')
    p.add_argument('--split', default='test', help="a split's name or role")
    p.add_argument('--every', type=int, default=30, help='the costly methods see each such image')
    p.add_argument('--out', type=Path, metavar='CSV', default=results_folder()/'cub20_topdown.csv',
                   help='table; rows that are in it are not computed again')
    a = p.parse_args()
    run, rows = load_run(a.run), Rows(a.out)
    dls = run.dls(check=False, bs=16)
    what = f"RUN: {run.config['arch']}, {run.config['data'].get('dataset')}"
    source = origin(f'python tools/cam_table.py RUN --split {a.split} --every {a.every}; {what}')
    source['hardware'] += f', {torch.get_num_threads()} thread' # times depend on it
    for images, methods in ((dls, CHEAP), (thinned(dls, a.every), CHEAP | COSTLY)):
        part = images.localizable(a.split)
        for name, make in methods.items():
            key = dict(method=name, split=part.split, images=len(part))
            if rows.having(**key): continue
            row = key | row_of_method(make(run.model), images, a.split)
            rows.add([row | source])
            print(*(f'{k}={v}' for k, v in row.items() if v not in ('', None)), flush=True)


if __name__ == '__main__': main()
