"""What LOST and TokenCut find, and why their own boxes fail, layer by layer

    python tools/discovery_table.py keys [--data SYNTH|CUB] [--out CSV]
    python tools/discovery_table.py rules [--out CSV]
    python tools/discovery_table.py times [--out CSV]
    python tools/discovery_table.py head --head FOLDER --trained-on NAME [--out CSV]

`keys`: for each layer of the shared ViT-Tiny, keys as they are and centred, what LOST's degrees and
TokenCut's peaks are like, how often the methods' own boxes hit (IoU .5), and MaxBoxAcc(.5) of the maps:
on 200 pictures of the synthetic world, or on CUB's val split. `rules`: from map to box on CUB's val and
test splits, VOC pictures and DAVIS frames with masks (WSOL_DATA), Otsu against the methods' own rules.
`times`: processor time of an image of 14×14 patches on one thread, what comes on top of the forward pass
and as a share of it, in turns. `head`: TokenCut and a head of `wsol_learn_objects` on the same data;
nothing is chosen on test. A row that is there is not computed again.
"""
import argparse
import math
import statistics
import time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from PIL import Image

from wsol_nb.core import env_folder
from wsol_nb.data.geometry import apply_geometry, to_tensor
from wsol_nb.data.loaders import WSOLDataLoaders
from wsol_nb.data.worlds.base import nth_scene
from wsol_nb.data.worlds.objects import ObjectsWorld
from wsol_nb.images import read_image
from wsol_nb.localize.maps import reference_score_map
from wsol_nb.metrics.contours import box_iou
from wsol_nb.results import Rows, origin, results_folder
from wsol_nb.scoring.scorer import Scorer
from wsol_nb.vit.discovery import find_object, ready_net
from wsol_nb.vit.layout import learn_attention
from wsol_nb.vit.lost import boxes_at, largest_piece, lost, piece_at
from wsol_nb.vit.patchhead import foreground, load_patch_head, read_patch_head
from wsol_nb.vit.reading import Projected, read_attention
from wsol_nb.vit.tokencut import patch_graph, token_cut

NET, SIZE = 'vit_tiny_patch16_224', 224


def synthetic(n=200):
    "Pictures (n,3,224,224) of the synthetic world and their boxes."
    world = ObjectsWorld(image_size=(SIZE, SIZE))
    scenes = [nth_scene(world, 'test', i) for i in range(n)]
    return torch.stack([to_tensor(Image.fromarray(s.image)) for s in scenes]), [s.box[None] for s in scenes]


def birds(split='val'):
    part = WSOLDataLoaders.from_metadata(env_folder('WSOL_DATA'), 'CUB', size=SIZE, bs=20).localizable(split)
    batches = [(b.x, b.boxes) for b in part]
    return torch.cat([x for x, _ in batches]), [b for _, bs in batches for b in bs]


@torch.no_grad()
def keys_of(x):
    "Keys (12,n,196,192) of all layers."
    net = ready_net(NET)
    layout = learn_attention(net, x[:1])
    kept = [torch.stack(read_attention(net, b, Projected(), layout=layout).taken[0]) for b in x.split(20)]
    return torch.cat(kept, 1)[:, :, -math.prod(layout.grid):], layout.grid


def max_box_acc(maps, boxes):
    "MaxBoxAcc at δ .5 of maps (n,h,w)."
    scorer = Scorer(SIZE)
    for m, b in zip(maps, boxes): scorer.count(scorer.look(reference_score_map(m.numpy(), SIZE), b), 'x')
    return round(scorer.accs['boxes'].compute()['max_box_acc']['0.5']['value'], 1)


def hits(found, boxes):
    "Share of boxes that a found one meets with IoU .5, percent."
    return round(100*np.mean([box_iou([f], t).max() >= .5 for f, t in zip(found, boxes)]), 1)


def of_lost(keys, grid, boxes, centre):
    found = lost(keys, centre=centre)
    n = keys.shape[1]
    own = boxes_at(found.mask, found.seed, grid, (SIZE, SIZE)).numpy()
    return dict(lost_degree=found.degree.float().mean().item()/n,
                lost_least_degree=found.degree.amin(1).float().mean().item()/n,
                lost_mask=found.mask.float().mean().item(), lost_own_box=hits(own, boxes),
                lost_soft=max_box_acc(found.soft.unflatten(1, grid), boxes))


def of_cut(keys, grid, boxes, centre):
    cut = token_cut(keys, centre=centre)
    at = cut.peak.tolist()
    pieces = [piece_at(m.view(grid).numpy(), p) for m, p in zip(cut.mask, at)]
    rim = np.ones(grid, bool)
    rim[1:-1, 1:-1] = False
    own, big = (boxes_at(cut.mask, p, grid, (SIZE, SIZE)).numpy() for p in (cut.peak, None))
    shown = keys - keys.mean(1, keepdim=True)*centre
    joined = [(patch_graph(k) > .5).double().mean().item() for k in shown.split(20)]
    return dict(cut_edges=np.mean(joined), cut_peak_on_rim=rim.ravel()[at].mean(),
                cut_piece_of_peak=np.mean([p.mean() for p in pieces]),
                cut_mask=cut.mask.float().mean().item(),
                cut_own_box=hits(own, boxes), cut_largest_piece=hits(big, boxes),
                cut_soft=max_box_acc(cut.y.float().unflatten(1, grid), boxes),
                cut_soft_v=max_box_acc(cut.v.float().unflatten(1, grid), boxes))


def common_part(keys):
    "Length of the mean key over the mean length of keys: 1 where all point one way."
    return (keys.mean(1).norm(dim=-1)/keys.norm(dim=-1).mean(1)).mean().item()


def keys_table(rows, data):
    x, boxes = birds() if data == 'CUB' else synthetic()
    source = origin(f'python tools/discovery_table.py keys --data {data}')
    all_keys, grid = keys_of(x)
    for layer in range(len(all_keys)):
        for centre in (False, True):
            key = dict(data=data, images=len(x), layer=layer, centred=centre)
            if rows.having(**key): continue
            keys = all_keys[layer]
            row = key | dict(common=common_part(keys - keys.mean(1, keepdim=True)*centre))
            row |= of_lost(keys, grid, boxes, centre) | of_cut(keys, grid, boxes, centre)
            rows.add([{k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()} | source])
            print(row, flush=True)


def pieces_boxes(mask, share=.05):
    "Boxes of the pieces of a mask with at least a share of it."
    n, _, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    big = [s for s in stats[1:] if s[4] >= share*mask.sum()]
    return np.array([(x, y, x + w - 1, y + h - 1) for x, y, w, h, _ in big])


def masked(name):
    "(file, mask 0/1/255, group) of VOC pictures or DAVIS frames."
    root = env_folder('WSOL_DATA')
    if name == 'VOC':
        for m in sorted((root/'VOC-SCRIBBLE/masks').glob('*.png')):
            a = np.array(Image.open(m))
            yield root/f'VOC-SCRIBBLE/images/{m.stem}.jpg', np.where(a == 255, 255, a > 0).astype(np.uint8)
    else:
        for m in sorted((root/'DAVIS/Annotations').rglob('*.png'))[::3]:
            a = (np.array(Image.open(m)) > 0).astype(np.uint8)
            if a.any(): yield root/'DAVIS/JPEGImages'/m.parent.name/f'{m.stem}.jpg', a


def pictures(name):
    "(x (n,3,224,224), boxes, masks or None), all at 224×224."
    if name.startswith('CUB'):
        x, boxes = birds(name.split()[1])
        return x, boxes, None
    x, boxes, masks = [], [], []
    for file, mask in masked(name):
        mask = cv2.resize(mask, (SIZE, SIZE), interpolation=cv2.INTER_NEAREST)
        if not (mask == 1).any(): continue
        x.append(to_tensor(apply_geometry(read_image(file), SIZE)))
        boxes.append(pieces_boxes(mask == 1))
        masks.append(mask)
    return torch.stack(x), boxes, masks


def overlap(found, mask):
    inside, counts = mask == 1, mask != 255
    return (found & inside & counts).sum()/((found | inside) & counts).sum()


def scaled(m):
    "A map from 0 to 1; zeros where it is constant."
    span = (m.max() - m.min()).clamp_min(1e-12)
    return ((m - m.min())/span).float().numpy()


def row_of_rule(objects, boxes, masks):
    "Hits at three IoUs, mean IoU of masks, and how the score goes with the IoU."
    iou = np.array([0. if o.box is None else box_iou([o.box], t).max() for o, t in zip(objects, boxes)])
    row = {f'box_{d}': round(100*float((iou >= d).mean()), 1) for d in (.3, .5, .7)}
    if masks:
        each = [overlap(o.mask, m) for o, m in zip(objects, masks)]
        row['mask_iou'] = round(100*float(np.mean(each)), 1)
    scores = pd.Series([o.score for o in objects])
    return row | dict(score_to_iou=round(float(scores.corr(pd.Series(iou), method='spearman')), 2))


def from_piece(piece, grid):
    "An own box's piece as the object of a picture."
    mask = cv2.resize(piece.astype(np.uint8), (SIZE, SIZE), interpolation=cv2.INTER_NEAREST) > 0
    ys, xs = np.nonzero(mask)
    return argparse.Namespace(mask=mask, box=[xs.min(), ys.min(), xs.max(), ys.max()], score=0.)


def rules_of(keys, grid):
    "{rule: objects} of TokenCut with the keys of layer 8, and LOST with those of layer 7."
    cut, own = token_cut(keys[8]), lost(keys[7])
    maps = dict(v=cut.v, y=cut.y, lost=own.soft)
    found = {f'{n}, Otsu': [find_object(scaled(m), (SIZE, SIZE)) for m in t.unflatten(1, grid)]
             for n, t in maps.items()}
    masks = [m.view(grid).numpy() for m in cut.mask]
    found['tokencut, own box'] = [from_piece(piece_at(m, p), grid) for m, p in zip(masks, cut.peak)]
    found['tokencut, largest piece'] = [from_piece(largest_piece(m), grid) for m in masks]
    lost_masks = zip(own.mask, own.seed)
    found['lost, own box'] = [from_piece(piece_at(m.view(grid).numpy(), p), grid) for m, p in lost_masks]
    return found


def rules_table(rows):
    for name in ('CUB val', 'CUB test', 'VOC', 'DAVIS'):
        if rows.having(data=name): continue
        x, boxes, masks = pictures(name)
        keys, grid = keys_of(x)
        source = origin('python tools/discovery_table.py rules')
        new = [dict(data=name, images=len(x), rule=rule) | row_of_rule(found, boxes, masks) | source
               for rule, found in rules_of(keys, grid).items()]
        rows.add(new)
        for row in new: print(*(f'{k}={v}' for k, v in row.items() if k not in source), flush=True)


def median_ms(calls, repeat=15):
    "Median processor time of each call, made in turns."
    taken = {name: [] for name in calls}
    for _ in range(repeat + 2):
        for name, call in calls.items():
            start = time.process_time()
            call()
            taken[name].append(1e3*(time.process_time() - start))
    return {name: statistics.median(t[2:]) for name, t in taken.items()}


@torch.inference_mode()
def times_table(rows):
    torch.set_num_threads(1)
    net, x = ready_net(NET), birds()[0][:1] if env_folder('WSOL_DATA') else synthetic(1)[0]
    layout = learn_attention(net, x)
    keys = read_attention(net, x, Projected(8), layout=layout).taken[0][0][:, -math.prod(layout.grid):]
    low = read_attention(net, x, Projected(7), layout=layout).taken[0][0][:, -math.prod(layout.grid):]
    cut, seen = token_cut(keys), lost(low)

    def boxes(mask, at): return boxes_at(mask, at, layout.grid, (SIZE, SIZE))
    calls = {'forward pass': lambda: net(x), 'pass that keeps keys': lambda: read_attention(
                 net, x, Projected(8), layout=layout),
             'TokenCut': lambda: token_cut(keys), 'LOST': lambda: lost(low),
             'own box of TokenCut': lambda: boxes(cut.mask, cut.peak),
             'own box of LOST': lambda: boxes(seen.mask, seen.seed),
             'object of a map, photo of 640×480': lambda: find_object(
                 scaled(cut.v.unflatten(1, layout.grid)[0]), (640, 480))}
    found, source = median_ms(calls), origin('python tools/discovery_table.py times')
    source['hardware'] += ', 1 thread, processor time'
    rows.add([dict(what=n, ms=round(ms, 2), share_of_pass=round(ms/found['forward pass'], 3)) | source
              for n, ms in found.items()])
    for n, ms in found.items(): print(f'{n}: {ms:.2f} ms, {ms/found["forward pass"]:.3f} of the pass')


def accs(maps, boxes, preset):
    scorer = Scorer(SIZE)
    for m, b in zip(maps, boxes):
        scorer.count(scorer.look(reference_score_map(m.numpy(), SIZE, preset), b), 'x')
    found = scorer.accs['boxes'].compute()['max_box_acc']
    return {f'max_box_acc_{d}': round(found[d]['value'], 1) for d in ('0.3', '0.5', '0.7')} | {
        'tau_0.5': found['0.5']['tau']}


@torch.no_grad()
def head_table(rows, folder, trained_on):
    command = f'python tools/discovery_table.py head --head FOLDER --trained-on "{trained_on}"'
    model, source = load_patch_head(folder), origin(command)
    how = read_patch_head(folder)
    for name in ('CUB val', 'CUB test', 'SYNTH', 'VOC', 'DAVIS'):
        if rows.having(trained_on=trained_on, data=name): continue
        x, boxes, masks = (*synthetic(), None) if name == 'SYNTH' else pictures(name)
        parts = [model.look(b) for b in x.split(20)]
        grid, keys = parts[0][2], torch.cat([p[3] for p in parts])
        cut = token_cut(keys).v.float().unflatten(1, grid)
        learnt = torch.cat([foreground(model.scores(p[1], grid)) for p in parts])
        for what, maps, preset in (('TokenCut v', cut, 'wsoleval'), ('head', learnt, 'prob')):
            row = dict(trained_on=trained_on, data=name, images=len(x), map=what) | accs(maps, boxes, preset)
            objects = [find_object(scaled(m) if what != 'head' else m.numpy(), (SIZE, SIZE)) for m in maps]
            row |= {f'otsu_{k}': v for k, v in row_of_rule(objects, boxes, masks).items()}
            if what == 'head': row |= dict(epochs=len(how['losses']), last_loss=round(how['losses'][-1], 4))
            rows.add([row | source])
            print(row, flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('what', choices=('keys', 'rules', 'times', 'head'))
    p.add_argument('--data', choices=('SYNTH', 'CUB'), default='SYNTH')
    p.add_argument('--out', type=Path, metavar='CSV',
                   help='table; rows that are in it are not computed again')
    p.add_argument('--head', help='folder of a trained head')
    p.add_argument('--trained-on', help='what it was trained on, for the table')
    a = p.parse_args()
    rows = Rows(a.out or results_folder()/f'discovery_{a.what}.csv')
    if a.what == 'keys': keys_table(rows, a.data)
    elif a.what == 'rules': rules_table(rows)
    elif a.what == 'times': times_table(rows)
    else: head_table(rows, a.head, a.trained_on)


if __name__ == '__main__': main()
