"""Affinity refinement: chosen on validation pictures, tested once, timed

    python tools/affinity_table.py study [--work FOLDER]
    python tools/affinity_table.py scores [CUB VOC DAVIS GlaS HEGlaS world]
    python tools/affinity_table.py hubs
    python tools/affinity_table.py grids
    python tools/affinity_table.py pairs
    python tools/affinity_table.py times

The ViT-Tiny of WSOL_WEIGHTS, trained on ImageNet with labels and on nothing else; no picture is trained on.
`study` tries layers, powers, steps, symmetry, keys instead of attention, and base maps on the val splits of
birds (CUB), photographs (VOC-SCRIBBLE) and video (DAVIS); the best mean MaxBoxAccV2 of the three is the
default of `AffinityMaps`. `scores` has the test splits, whole maps class-agnostic, beside the base map, the
product without a balance, the centre and the whole picture; τ both oracle and carried over from val.
`hubs` says who looks at whom. `grids` has larger pictures on the val splits. `pairs` puts two photographs
side by side and asks for the class that the net sees in one of them alone. `times` measures one picture on
one core. Rows that are there are left out.
"""
import argparse
import statistics
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from wsol_nb.core import env_folder
from wsol_nb.cam.gradient import GradCAM
from wsol_nb.localize.maps import reference_score_map
from wsol_nb.metrics.pixels import PxAP
from wsol_nb.nets.bodies import local_weights, read_state
from wsol_nb.results import Rows, origin, results_folder
from wsol_nb.scoring.scorer import Scorer
from wsol_nb.vit.affinity import AffinityMaps, refine, sinkhorn
from wsol_nb.vit.attention import ClassAttention, TokenLocalizer
from wsol_nb.vit.layout import learn_attention
from wsol_nb.vit.reading import AllRows, ClassRows, PatchMean, Projected, read_attention
from affinity_data import ROLES, drawn_by, loaders
import timm

ARCH, LAST4 = 'vit_tiny_patch16_224', (8, 9, 10, 11)
CHOICE = dict(layers=(2, 12), steps=5, power=2, symmetric=False) # what `study` found
CHOSEN_ON = 'CUB', 'VOC', 'DAVIS'


class Normalized(nn.Module):
    "A net of timm on pictures in [0,1]."
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x): return self.net((x - .5)/.5)


def vit()->nn.Module:
    "The net with its ImageNet weights."
    file = local_weights(ARCH)
    if file is None: raise SystemExit(f'WSOL_WEIGHTS={env_folder("WSOL_WEIGHTS")}: has no {ARCH}')
    net = timm.create_model(ARCH, dynamic_img_size=True)
    net.load_state_dict({k: v.float() for k, v in read_state(file).items()})
    return Normalized(net).eval()


class Pictures:
    "A split with what was read of it: attention of each layer (n,L,1+N,1+N), its mean over heads, and keys."
    def __init__(self, name, split, work, keys=False, size=224):
        self.name, self.part = name, loaders(name, work, size).localizable(split)
        self.net, self.size, A, K = vit(), size, [], []
        for b in self.part:
            if not A: layout = learn_attention(self.net, b.x[:1])
            takers = [AllRows(), *([Projected('all', 'k')] if keys else [])]
            with torch.no_grad(): found = read_attention(self.net, b.x, *takers, layout=layout).taken
            A.append(torch.stack([a.mean(1) for a in found[0]], 1).half()) # b,l,n,n
            if keys: K.append(torch.stack(found[1], 1)[:, :, 1:].half())
        self.A, self.K, self.grid = torch.cat(A), torch.cat(K) if keys else None, layout.grid

    def rows(self, layers): return self.A[:, list(layers), 0, 1:].float().mean(1).unflatten(1, self.grid)

    def patches(self, layers): return self.A[:, list(layers), 1:, 1:].float().mean(1)

    def alike(self, layers, heat):
        "exp(cosine of keys over heat), its mean over layers."
        unit = nn.functional.normalize(self.K[:, list(layers)].float(), dim=-1)
        return (unit@unit.mT/heat).exp().mean(1)

    def scored(self, maps, bootstrap=0)->Scorer:
        "What maps (n,h,w), or boxes (n,4), count."
        part = self.part
        scorer = Scorer(part.size, part.n_boxed > 0, part.n_masked > 0, bootstrap=bootstrap)
        for i, found in enumerate(np.asarray(maps)):
            if found.ndim > 1: found = reference_score_map(found, part.size, 'wsoleval')
            mask, one = part.mask(i) if part.n_masked else None, drawn_by(self.name, part.df.image_id[i])
            scorer.count(scorer.look(found, part.boxes[i], mask, one), one)
        return scorer


def figures(scorer, kind='', taus=None)->dict:
    "MaxBoxAcc, V2 and PxAP with intervals; and BoxAcc at the τs of another split."
    accs, row = scorer.accs, {}
    boxes, pixels = accs.get(f'{kind or "boxes"}'), accs.get(f'{kind or "boxes"}_px')
    if boxes is not None and boxes.n:
        found = boxes.compute()
        for d, v in found['max_box_acc'].items():
            row |= {f'box{d}': v['value'], f'τ{d}': v['tau']}
            row |= {f'box{d} {end}': v[end] for end in ('low', 'high') if end in v}
        row['v2'] = found['max_box_acc_v2']
    if boxes is not None and boxes.n and taus:
        row |= {f'box{d}, τ of val': v['value'] for d, v in boxes.summary(taus['boxes'])['single'].items()}
    if pixels is not None and pixels.n:
        row['pxap of ones'] = pixels.compute()['all_ones']['pxap']
        found = pixels.compute()['pxap']
        row |= {'pxap' if k == 'value' else f'pxap {k}': v for k, v in found.items()
                if k in ('value', 'low', 'high')}
    return {k: round(v, 2 if k[0] != 'τ' else 3) for k, v in row.items()}


# what is tried on val

def balanced(p, c)->torch.Tensor: # (n,h,w)
    "The base map of a picture set, refined as a choice says."
    base = p.rows(c['base'])
    if c['of'] == 'keys': A = p.alike(range(*c['layers']), c['heat'])
    else: A = p.patches(range(*c['layers']))
    return refine(base, sinkhorn(A, c['steps'], c['symmetric']), c['power'])


def tries():
    "(what is asked, choice) of each row of the study."
    base = CHOICE | dict(of='attention', heat=None, base=LAST4)
    for start in (0, 2, 3, 4, 5, 6, 7, 8):
        for end in (8, 10, 11, 12):
            if end - start > 1: yield 'layers', base | dict(layers=(start, end))
    for symmetric in (False, True):
        for start in (2, 3, 5): yield 'symmetric', base | dict(layers=(start, 12), symmetric=symmetric)
    for layers in ((2, 12), (5, 12)):
        for power in (0, 1, 2, 3, 4, 8, 16): yield 'power', base | dict(layers=layers, power=power)
    for layers in ((2, 8), (8, 12), (2, 12)):
        for steps in (0, 1, 2, 3, 5, 20): yield 'steps', base | dict(layers=layers, steps=steps)
    for first in (6, 7, 8, 9, 10, 11):
        for last in (10, 11):
            if first < last + 1:
                for power in (0, 2):
                    yield 'base', base | dict(base=tuple(range(first, last + 1)), power=power)
    for layers in ((5, 6), (7, 8), (8, 9), (9, 10), (5, 12), (7, 10)):
        for heat in (.1, .2): yield 'keys', base | dict(of='keys', layers=layers, heat=heat)


def said(c)->dict: return {k: str(list(v)) if isinstance(v, tuple) else v for k, v in c.items()}


def study(a, rows, source):
    "A row for each choice."
    todo = [(w, c) for w, c in tries() if not rows.having(asked=w, **said(c))]
    sets = [Pictures(n, ROLES[n][0], a.work, keys=True) for n in CHOSEN_ON] if todo else []
    for asked, c in todo:
        row = dict(asked=asked) | said(c)
        with torch.no_grad(): found = {p.name: figures(p.scored(balanced(p, c).numpy())) for p in sets}
        row['mean v2'] = round(sum(f['v2'] for f in found.values())/len(found), 2)
        for n, f in found.items():
            row |= {f'{n} {k}': f[k] for k in ('box0.5', 'box0.7', 'v2', 'pxap') if k in f}
        rows.add([row | source])
        print(row, flush=True)


# what is tested

def variants(p):
    "(name, settings, maps or boxes) of what is compared."
    base, A, whole = p.rows(LAST4), p.patches(range(*CHOICE['layers'])), p.size - 1
    own = sinkhorn(A, CHOICE['steps'], CHOICE['symmetric'])
    yield 'whole picture', {}, np.tile([0, 0, whole, whole], (len(base), 1))
    yield 'class attention, last layer', {}, p.rows([11])
    yield 'class attention, last 4 layers', {}, base
    yield 'divided by attention received', {}, base/A.sum(1).unflatten(1, p.grid)
    yield 'product without balance', CHOICE | dict(steps=0), refine(base, A, CHOICE['power'])
    yield 'AffinityMaps', CHOICE, refine(base, own, CHOICE['power'])
    tried = sinkhorn(p.patches(range(5, 12)), 5, True)
    yield 'as first tried', dict(layers=(5, 12), steps=5, power=2, symmetric=True), refine(base, tried, 2)


def scores(a, rows, source):
    "A row for each set and map."
    for name in a.sets:
        split, size = ROLES[name][1], a.size
        key = dict(data=name, split=split, size=size)
        if rows.having(**key, map='as first tried'): continue
        chosen, tested = (Pictures(name, s, a.work, size=size) for s in ROLES[name])
        for (what, how, of_val), (_, _, of_test) in zip(variants(chosen), variants(tested)):
            taus = chosen.scored(of_val).summary() # the same calls on val, for τ only
            scorer = tested.scored(of_test, bootstrap=200)
            row = key | dict(map=what, images=len(tested.part)) | said(how) | figures(scorer, '', taus)
            rows.add([row | source], **key, map=what)
            print(row, flush=True)
        row = key | dict(map='centre', images=len(tested.part)) | figures(scorer, 'centre')
        rows.add([row | source], **key, map='centre')


# who looks at whom

def on_and_off(values, inside)->tuple:
    "Means of values (n,N) over the patches of objects, and over the others."
    return float((values*inside).sum()/inside.sum()), float((values*(1 - inside)).sum()/(1 - inside).sum())


def insides(p)->torch.Tensor: # (n,N)
    "The share of each patch that is the object's."
    masks = torch.stack([torch.from_numpy(p.part.mask(i) == 1) for i in range(len(p.part))])
    return nn.functional.adaptive_avg_pool2d(masks.float()[:, None], p.grid).flatten(1)


def top(received, share=.05)->torch.Tensor: # (n,N) of 0 and 1
    "The patches that are looked at most."
    k = round(share*received.shape[1])
    return torch.zeros_like(received).scatter_(1, received.topk(k, 1).indices, 1)


def hub_rows(p):
    "Of each layer, and of windows of layers, how attention is shared out."
    inside, base, n = insides(p), p.rows(LAST4).flatten(1), p.grid[0]*p.grid[1]
    corners = torch.zeros(n)
    corners[[0, p.grid[1] - 1, n - p.grid[1], n - 1]] = 1
    for layers in [(i, i + 1) for i in range(p.A.shape[1])] + [(2, 8), (8, 12), (2, 12), (5, 12)]:
        A = p.patches(range(*layers))
        A = A/A.sum(-1, keepdim=True)
        received, S = A.sum(1), sinkhorn(A)
        hub = top(received)
        row = dict(layers=str(list(layers)), top5=float((received*hub).sum()/received.sum()),
                   most=float(received.amax(1).mean()), corners=float((hub@corners/4).mean()),
                   map_at_hubs=float(((base*hub).sum(1)/hub.sum(1)/base.mean(1)).mean()))
        looks = on_and_off((A*hub[:, None]).sum(2), inside)
        row['looks at hubs: object'], row['looks at hubs: others'] = looks
        for name, M in (('product', A), ('balanced', S)):
            part, whole = (M*(hub*base)[:, None]).sum(2), (M*base[:, None]).sum(2)
            for what, v in (('of hubs', part), ('of the rest', whole - part), ('whole', whole)):
                on, off = on_and_off(v, inside)
                row[f'{name} {what}: object/others'] = on/off
            row[f'{name}: share of hubs'] = float(part.sum()/whole.sum())
        yield {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}


def second(M)->float:
    "The mean modulus of the second eigenvalue."
    return float(torch.linalg.eigvals(M).abs().sort(1, descending=True).values[:, 1].mean())


def hubs(a, rows, source):
    "Rows by layer, and columns' errors by step."
    for name in ('VOC', 'DAVIS', 'CUB'):
        if rows.having(data=name): continue
        p = Pictures(name, ROLES[name][0], a.work)
        found = [dict(data=name, asked='layers') | r for r in hub_rows(p)] if p.part.n_masked else []
        A = p.patches(range(*CHOICE['layers']))
        A = A/A.sum(-1, keepdim=True)
        for steps in (0, 1, 2, 3, 5, 10, 20):
            S = sinkhorn(A, steps)
            off = (S.sum(1) - 1).abs().amax(1)
            found.append(dict(data=name, asked='steps', steps=steps, off_mean=round(float(off.mean()), 6),
                              off_max=round(float(off.max()), 6), second=round(second(S[:20]), 4)))
        rows.add([r | source for r in found])
        print(*found, sep='\n', flush=True)


# larger pictures, on val

def grids(a, rows, source):
    "The default and its base map at several sizes; position embeddings are interpolated."
    for size in (224, 320):
        for name in CHOSEN_ON:
            key = dict(data=name, split=ROLES[name][0], size=size)
            if rows.having(**key, map='AffinityMaps'): continue
            p = Pictures(name, ROLES[name][0], a.work, size=size)
            for what, _, maps in variants(p):
                if what not in ('class attention, last 4 layers', 'AffinityMaps'): continue
                row = key | dict(map=what) | figures(p.scored(maps))
                rows.add([row | source], **key, map=what)
                print(row, flush=True)


# two pictures in one

class ClassGradient(TokenLocalizer):
    "Class attention where it speaks for the class: positive gradient times row, mean of the last layers."
    shown = ()

    def compute(self, x, target, create_graph):
        with torch.enable_grad():
            logits, layout, (A,) = self.read(x, AllRows('last 4', graph=True))
            grads = torch.autograd.grad(target.scores(logits).sum(), A)
        rows = [(G*B).relu().mean(1)[:, 0] for G, B in zip(grads, A)]
        return logits, layout.on_grid(sum(rows)/len(rows)).detach()


CLASS_MAPS = {'class attention': ClassAttention, 'attention x gradient': ClassGradient, 'Grad-CAM': GradCAM}


def neighbours(part, net, n):
    "Pairs of pictures that follow each other and are of different classes to the net, with these classes."
    xs = torch.stack([part.dataset[i][0] for i in range(min(2*n, len(part)))])
    with torch.no_grad(): y = torch.cat([net(x).argmax(1) for x in xs.split(8)]).tolist()
    return [(i, i + 1, y[i], y[i + 1], torch.cat([xs[i], xs[i + 1]], -1))
            for i in range(0, len(xs) - 1, 2) if y[i] != y[i + 1]]


def pairs(a, rows, source):
    "The object of one of two pictures side by side, by its class: PxAP, and whose half the map's mass is in."
    part, net = loaders('VOC', a.work).localizable('test'), vit()
    found = neighbours(part, net, 60)
    for name, kind in CLASS_MAPS.items():
        for how, make in (('map', kind), ('product without balance', partial(AffinityMaps, of=kind, steps=0)),
                          ('AffinityMaps', partial(AffinityMaps, of=kind))):
            if rows.having(of=name, map=how): continue
            loc, pixels, inside, n = make(net), PxAP(None, .5, 200), [], 0
            for i, j, left, right, x in found:
                maps = loc(x[None].expand(2, -1, -1, -1), [left, right])
                for k, (m, at) in enumerate(zip(maps.double().numpy(), (i, j))):
                    mask = np.zeros(m.shape, np.uint8)
                    half = slice(224*k, 224*(k + 1))
                    mask[:, half] = part.mask(at)
                    pixels.update(m.clip(0, 1), mask, part.df.image_id[at])
                    inside.append(m[:, half].sum()/m.sum() if m.any() else .5)
            ap = pixels.compute()
            row = dict(of=name, map=how, maps=len(inside), pxap=ap['pxap']['value'], low=ap['pxap']['low'],
                       high=ap['pxap']['high'], ones=ap['all_ones']['pxap'],
                       in_half=100*float(np.mean(inside)))
            row = {k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}
            rows.add([row | source], of=name, map=how)
            print(row, flush=True)


# how long it takes

def times(a, rows, source):
    "Median processor time of one picture, and ratios to a plain pass just before."
    net, x = vit(), torch.rand(1, 3, 224, 224)
    layout = learn_attention(net, x)
    patches, row4 = PatchMean(range(*CHOICE['layers'])), ClassRows('last 4')
    with torch.no_grad():
        A, = read_attention(net, x, patches, layout=layout).taken
        m = torch.rand(1, 14, 14)
        calls = {'class rows read in the pass': lambda: read_attention(net, x, row4, layout=layout),
                 'patch attention too': lambda: read_attention(net, x, row4, patches, layout=layout),
                 'balance and products': lambda: refine(m, sinkhorn(A, CHOICE['steps'])),
                 'AffinityMaps in all': lambda: refine(m, sinkhorn(
                     read_attention(net, x, row4, patches, layout=layout).taken[1]))}
        for what, call in calls.items():
            pairs = []
            for _ in range(41):
                marks = [time.process_time()]
                for f in (lambda: net(x), call):
                    f()
                    marks.append(time.process_time())
                pairs.append((marks[1] - marks[0], marks[2] - marks[1]))
            plain = statistics.median(p for p, _ in pairs[1:])
            took, ratio = (statistics.median(v) for v in zip(*((c, c/p) for p, c in pairs[1:])))
            row = dict(what=what, plain_ms=round(1e3*plain, 1), ms=round(1e3*took, 1), ratio=round(ratio, 3))
            rows.add([row | source], what=what)
            print(row, flush=True)


PARTS = dict(study=study, scores=scores, hubs=hubs, grids=grids, pairs=pairs, times=times)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('part', choices=PARTS)
    p.add_argument('sets', nargs='*', default=list(ROLES), help=f'of {", ".join(ROLES)}')
    p.add_argument('--size', type=int, default=224, help='side of the pictures, a multiple of 16')
    p.add_argument('--work', type=Path, default=Path('runs/affinity'), help='folder for converted masks')
    p.add_argument('--out', type=Path, metavar='CSV', help='default: nbs/results/affinity_<part>.csv')
    a = p.parse_args()
    typed = f'python tools/affinity_table.py {a.part}' + f' --size {a.size}'*(a.size != 224)
    source = origin(typed)
    source['hardware'] += f', {torch.get_num_threads()} thread'
    PARTS[a.part](a, Rows(a.out or results_folder()/f'affinity_{a.part}.csv'), source)


if __name__ == '__main__': main()
