"""Maps of a vision transformer on CUB-20, beside the centre box and the whole image

    python tools/vit_table.py [ROW ...] [--split val|test] [--out CSV]

The net is the supervised ViT-Tiny of WSOL_WEIGHTS, which has seen ImageNet and no bird of CUB. A row is a
map: MaxBoxAcc at δ .3, .5, .7 and V2, each at the threshold that is best on the scored split ("oracle")
and at the one that is best on val; milliseconds an image. Without names all ROWS are measured; rows that
are in the table are left out, so that an interrupted command goes on where it was. Where something is
chosen (a head), it is chosen on val.
"""
import argparse
import time
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from wsol_nb.cam.gradient import GradCAM
from wsol_nb.core import set_seed
from wsol_nb.data.loaders import WSOLDataLoaders
from wsol_nb.localize.base import BoxLocalizer, Localizer
from wsol_nb.metrics.boxes import centre_map
from wsol_nb.metrics.contours import TAUS, box_iou
from wsol_nb.nets.bodies import local_weights, read_state
from wsol_nb.results import Rows, origin, results_folder
from wsol_nb.vit.affinity import AffinityMaps
from wsol_nb.vit.attention import ClassAttention
from wsol_nb.vit.heads import best_head, map_overlaps, oracle_head
from wsol_nb.vit.lost import LOST, OwnBoxes
from wsol_nb.vit.relevance import AttentionGradient, LeGrad
from wsol_nb.vit.rollout import Rollout
from wsol_nb.vit.tokencut import TokenCut
import timm # after wsol_nb.core, see its end

ARCH, DELTAS = 'vit_tiny_patch16_224', (.3, .5, .7)


class Normalised(nn.Module):
    "A net of timm that takes images in [0,1]."
    def __init__(self, net):
        super().__init__()
        self.net, cfg = net, timm.data.resolve_model_data_config(net)
        for name in ('mean', 'std'): self.register_buffer(name, torch.tensor(cfg[name]).view(1, 3, 1, 1))

    def forward(self, x): return self.net((x - self.mean)/self.std)


@cache
def imagenet_vit():
    "The ViT-Tiny of WSOL_WEIGHTS with its ImageNet classifier."
    net, file = timm.create_model(ARCH), local_weights(ARCH)
    if file is None: raise SystemExit(f'WSOL_WEIGHTS: expected a folder with {ARCH}*.pth')
    net.load_state_dict({k: v.float() for k, v in read_state(file).items()})
    return Normalised(net.eval())


class Fixed(Localizer):
    "The same map for every image."
    def __init__(self, model, score_map):
        super().__init__(model)
        self.map = torch.as_tensor(score_map).float()

    def compute(self, x, target, create_graph):
        return x.new_zeros(len(x), 1000), self.map.expand(len(x), *self.map.shape)


def whole_image(): return np.ones((224, 224)) - 1e-3*(np.indices((224, 224)).sum(0) == 0)


_SEEN = {} # (layer, numbers of a batch) -> what a pass gave: rows that read the same keys share it


def kept(kind):
    "A localizer of keys that lets a batch through the net once for all rows."
    class Kept(kind):
        def keys(self, x):
            key = self.layer, len(x), x.double().sum().item()
            if key not in _SEEN:
                logits, keys, grid = super().keys(x)
                _SEEN[key] = logits, keys.half(), grid
            logits, keys, grid = _SEEN[key]
            return logits, keys.float(), grid
    return Kept


def own_box(kind, **how): return lambda model: OwnBoxes(kind(model, **how))


# Rows: name -> how the localizer is made of a model on images in [0,1]. Others add theirs.
A, R, L, T = ClassAttention, Rollout, kept(LOST), kept(TokenCut)
ROWS = {
    'centre box': partial(Fixed, score_map=centre_map()),
    'whole image': partial(Fixed, score_map=whole_image()),
    'attention, last layer': partial(A, layers=-1),
    'attention, all layers': partial(A, layers='all'),
    'attention, last 4 layers': A,
    'attention, layer 8': partial(A, layers=8),
    'rollout': R,
    'rollout, layers 6-11': partial(R, layers=range(6, 12)),
    'rollout, no residual': partial(R, residual=False),
    'rollout, discard .9, mean': partial(R, discard=.9),
    'rollout, discard .9, max': partial(R, discard=.9, heads='max'),
    'rollout, discard .9, min': partial(R, discard=.9, heads='min'),
    'LOST, keys 7': partial(L, layer=7),
    'LOST, keys 11': partial(L, layer=11),
    'LOST, keys 10 centred': partial(L, layer=10, centre=True),
    'LOST, keys 7, own box': own_box(L, layer=7),
    'LOST, keys 11, own box': own_box(L, layer=11),
    'LOST, keys 10 centred, own box': own_box(L, layer=10, centre=True),
    'TokenCut, keys 8': partial(T, layer=8),
    'TokenCut, keys 8, v': partial(T, layer=8, weigh=True),
    'TokenCut, keys 11': partial(T, layer=11),
    'TokenCut, keys 8, own box': own_box(T, layer=8),
    'TokenCut, keys 8, largest piece': own_box(T, layer=8, piece='largest'),
    'TokenCut, keys 11, own box': own_box(T, layer=11),
    'affinity, last 4 layers': AffinityMaps,
    'affinity without balance': partial(AffinityMaps, steps=0),
    'affinity, rollout': partial(AffinityMaps, of=R),
    # of the ImageNet class that the net thinks is there
    'attention × gradient': AttentionGradient,
    'LeGrad': LeGrad,
    'Grad-CAM at the last norm1': partial(GradCAM, layer='net.blocks.11.norm1'),
}
# Rows of several maps an image, of which one is chosen: name -> (localizer, how)
HEADS = partial(A, layers=-1, heads='all')
CHOSEN = {
    'last layer, best fixed head (val)': (HEADS, 'fixed'),
    'last layer, oracle head, most thresholds': (HEADS, 'most'),
    'last layer, oracle head, any': (HEADS, 'any'),
}


# Measuring

@cache
def loaders(): return WSOLDataLoaders.from_metadata(dataset='CUB', size=224, bs=16, num_workers=0)


class Timed:
    "A localizer whose processor time is added up."
    def __init__(self, localizer): self.localizer, self.preset, self.seconds = localizer, localizer.preset, 0.

    def raw(self, *args):
        start = time.process_time()
        maps = self.localizer.raw(*args)
        self.seconds += time.process_time() - start
        return maps


def own_overlaps(loc, part):
    "The same of boxes: at each threshold that of the one box."
    ious = [box_iou([box], true).max() for b in part for box, true in zip(loc.boxes(b.x), b.boxes)]
    return np.broadcast_to(np.array(ious, np.float32)[None, :, None, None], (2, len(ious), 1, len(TAUS)))


@cache
def reached(make, split):
    "(2,n,T,τ) IoUs of a localizer's maps on a split; milliseconds an image, None where passes are shared."
    set_seed(0)
    part, loc = loaders().localizable(split), make(imagenet_vit())
    if isinstance(loc, BoxLocalizer): return own_overlaps(loc, part), None
    loc = Timed(loc)
    overlaps = map_overlaps(loc, part)
    return overlaps, None if isinstance(loc.localizer, (L, T)) else round(1e3*loc.seconds/len(part), 1)


def curves(overlaps, how, head):
    "BoxAcc at each δ and τ in percent, of single boxes and of all: (2,D,τ)."
    hits = np.stack([overlaps >= d for d in DELTAS], 1) # 2,D,n,T,τ
    if how in ('most', 'any'): return 100*np.stack([[oracle_head(h, how) for h in kind] for kind in hits])
    return 100*hits[..., head, :].mean(2)


def figures(own, from_val):
    "The columns of a row, of its curves (2,D,τ) and those of val."
    row = {}
    for name, at in (('oracle', own.argmax(-1)), ('val', from_val.argmax(-1))):
        values = np.take_along_axis(own, at[..., None], -1)[..., 0] # 2,D
        row |= {f'max_box_acc_{d} ({name})': round(float(v), 2) for d, v in zip(DELTAS, values[0])}
        row |= {f'v2 ({name})': round(float(values[1].mean()), 2),
                f'tau_.5 ({name})': round(float(TAUS[at[0, 1]]), 3)}
    return row


def row_of(name, split):
    "The figures of one map."
    make, how = CHOSEN.get(name) or (ROWS[name], None)
    (own, ms), (val, _) = reached(make, split), reached(make, 'val')
    head = best_head(val[0] >= .5) if how == 'fixed' else 0
    row = dict(head=head) if how == 'fixed' else {}
    return row | figures(curves(own, how, head), curves(val, how, head)) | dict(ms_image=ms)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*ROWS, *CHOSEN]
    p.add_argument('rows', nargs='*', metavar='ROW', help=f'one of: {"; ".join(names)}')
    p.add_argument('--split', default='test', choices=['val', 'test'])
    p.add_argument('--out', type=Path, metavar='CSV', default=results_folder()/'cub20_vit.csv')
    a = p.parse_args()
    if unknown := [n for n in a.rows if n not in names]: p.error(f'{unknown[0]!r} is none of {names}')
    rows, source = Rows(a.out), origin(f'python tools/vit_table.py --split {a.split}')
    source['hardware'] += f', {torch.get_num_threads()} thread'
    for name in a.rows or names:
        key = dict(map=name, split=a.split, arch=ARCH)
        if rows.having(**key): continue
        row = key | dict(images=len(loaders().localizable(a.split))) | row_of(name, a.split)
        rows.add([row | source])
        print(*(f'{k}={v}' for k, v in row.items()), flush=True)


if __name__ == '__main__': main()
