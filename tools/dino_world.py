"""A small ViT trained by self-distillation on the synthetic world, and what its heads find

    python tools/dino_world.py FOLDER [--epochs 60] [--out CSV]

FOLDER holds the world and the state after each epoch, from which an interrupted command goes on. Rows of
nbs/results/dino_world.csv: `epoch` with loss, entropy of the teacher's outputs and how far they differ
between images; `map` with MaxBoxAcc on the test split, thresholds (and a head) chosen on val, of the
class token's attention in the teacher, in the same net untrained, and of the centre box.
dino_world_heads.csv has the last heads of the teacher on four test images. About five minutes on two
cores.
"""
import argparse
from pathlib import Path

import fastai.callback.progress # learn.no_bar
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from vit_table import Fixed, Normalised, curves, figures

from wsol_nb.core import set_seed, whole_file
from wsol_nb.data.loaders import WSOLDataLoaders
from wsol_nb.metrics.boxes import centre_map
from wsol_nb.results import Rows, origin, results_folder
from wsol_nb.train.method import adamw
from wsol_nb.vit.attention import ClassAttention
from wsol_nb.vit.dino import DINO, DINOHead
from wsol_nb.vit.distil import SelfDistillation
from wsol_nb.vit.heads import best_head, map_overlaps
import timm # after wsol_nb.core, see its end

SIZE, VIEW, SMALL, SEED = 96, 64, 32, 0


def small_vit():
    "Six blocks of 96 numbers a patch of 8×8 pixels, three heads: .7 M weights."
    return timm.create_model('vit_tiny_patch16_224', img_size=VIEW, patch_size=8, embed_dim=96, depth=6,
                             num_heads=3, num_classes=0, dynamic_img_size=True)


def made():
    "Student and callback as they are at first."
    set_seed(SEED)
    return DINO(Normalised(small_vit()), DINOHead(96, K=512))


class Quiet(torch.utils.data.Dataset):
    "Images of the world, read once; no labels."
    def __init__(self, part): self.x = torch.cat([b.x for b in part])
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i], 0


def rate(epoch, epochs, top=2e-3):
    "Learning rate of an epoch: a tenth of the training upwards, then half a cosine down to a hundredth."
    up = max(1, epochs//10)
    if epoch < up: return top*(epoch + 1)/up
    return top*(.01 + .99*(1 + torch.tensor(torch.pi*(epoch - up)/(epochs - up)).cos().item())/2)


def save(file, learn, distil, epoch):
    "Everything that the next epoch goes on from."
    state = dict(student=learn.model.state_dict(), teacher=distil.teacher.state_dict(), center=distil.center,
                 step=distil.step, opt=learn.opt.state_dict(), epoch=epoch)
    with whole_file(file) as part: torch.save(state, part)


def resume(file, learn, distil):
    "The epoch to go on with."
    if not file.is_file(): return 0
    state = torch.load(file, weights_only=False) # our own file of this folder
    learn.create_opt()
    learn.model.load_state_dict(state['student'])
    learn.opt.load_state_dict(state['opt'])
    distil.teacher = made().requires_grad_(False)
    distil.teacher.load_state_dict(state['teacher'])
    distil.center, distil.step = state['center'], state['step']
    return state['epoch']


def spread(teacher, center, x):
    "Mean entropy of the teacher's outputs, and that of their mean: equal where all are given the same."
    with torch.no_grad(): q = ((teacher([x[:, :, 16:80, 16:80]])[0] - center)/.04).softmax(-1)
    h = lambda p: float(-(p*p.clamp(min=1e-9).log()).sum(-1).mean())
    return dict(entropy=round(h(q), 3), entropy_of_mean=round(h(q.mean(0)), 3))


def train(folder, epochs, dls, rows, source):
    "Train, or go on; the teacher."
    part = dls.localizable('train')
    data = Quiet(part)
    loader = DataLoader(data, bs=32, shuffle=True, drop_last=True, num_workers=0)
    steps = epochs*len(loader)
    distil = SelfDistillation(VIEW, SMALL, n_small=4, momentum=(.99, 1.), steps=steps)
    learn = Learner(DataLoaders(loader, []), made(), loss_func=distil.criterion, opt_func=adamw, wd=.04,
                    cbs=distil)
    file = folder/'state.pt'
    start = resume(file, learn, distil)
    for epoch in range(start, epochs):
        set_seed(SEED + 1000 + epoch)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, rate(epoch, epochs))
        row = dict(kind='epoch', epoch=epoch + 1, loss=round(float(learn.smooth_loss), 4))
        row |= spread(distil.teacher.eval(), distil.center, data.x[:256])
        rows.add([row | source], kind='epoch', epoch=epoch + 1)
        save(file, learn, distil, epoch + 1)
        print(row, flush=True)
    return distil.teacher.eval()


class Turned(ClassAttention):
    "Each head's map, and each turned around: what it looks at, and what it leaves out."
    def compute(self, x, target, create_graph):
        logits, maps = super().compute(x, target, create_graph)
        return logits, torch.cat([maps, -maps], 1)


def measured(dls, make):
    "IoUs of a localizer's maps on test and val."
    return [map_overlaps(make, dls.localizable(split)) for split in ('test', 'val')]


def rows_of_maps(dls, nets):
    "MaxBoxAcc of each net's attention, the head chosen on val, and of the mean of heads."
    yield dict(map='centre box') | of(measured(dls, Fixed(next(iter(nets.values())), centre_map(SIZE))), None)
    for name, net in nets.items():
        for layer in (-1, 'last 4'):
            own = measured(dls, ClassAttention(net, layer, heads='all'))
            head = best_head(own[1][0] >= .5)
            yield dict(map=f'{name}, {layer}, best head of val', head=head) | of(own, head)
            own = measured(dls, Turned(net, layer, heads='all'))
            head = best_head(own[1][0] >= .5)
            yield dict(map=f'{name}, {layer}, best head or its negative', head=head) | of(own, head)
            yield dict(map=f'{name}, {layer}, mean') | of(measured(dls, ClassAttention(net, layer)), None)


def rows_of_heads(dls, net, n=4):
    "The teacher's last heads on the first images of the test split, a row of a map each."
    x = next(iter(dls.localizable('test'))).x[:n]
    for i, maps in enumerate(ClassAttention(net, -1, heads='all').raw(x)):
        for head, one in enumerate(maps):
            for y, line in enumerate(one):
                values = {f'x{j}': round(float(v), 5) for j, v in enumerate(line)}
                yield dict(image=i, head=head, y=y) | values


def of(overlaps, head): return figures(*(curves(o, None, head or 0) for o in overlaps))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folder', type=Path)
    p.add_argument('--epochs', type=int, default=60)
    p.add_argument('--out', type=Path, metavar='CSV', default=results_folder()/'dino_world.csv')
    a = p.parse_args()
    dls = WSOLDataLoaders.from_synth(root=a.folder, size=SIZE, bs=32, num_workers=0)
    rows = Rows(a.out)
    source = dict(seed=SEED) | origin(f'python tools/dino_world.py FOLDER --epochs {a.epochs}')
    teacher = train(a.folder, a.epochs, dls, rows, source)
    for row in rows_of_maps(dls, dict(trained=teacher.net, untrained=made().net.eval())):
        rows.add([dict(kind='map') | row | source], kind='map', map=row['map'])
        print(row, flush=True)
    heads = Rows(a.out.with_name(f'{a.out.stem}_heads.csv'))
    if not heads.read(): heads.add(list(rows_of_heads(dls, teacher.net)))


if __name__ == '__main__': main()
