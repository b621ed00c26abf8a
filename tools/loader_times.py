"""How many training images a second the loaders give, beside torchvision's and fastai's, and where time goes.

    python tools/bench.py loaders          writes nbs/results/loaders.csv and nbs/results/loader_stages.csv

The pictures are scenes of `ObjectsWorld` at 1000×750, with their grass and fur, and the same made smaller,
as JPEGs of quality 92 in a temporary folder. All loaders do the same to them: squeezed to 256×256, a random
crop of 224, a flip, floats in [0,1], batches of 32. They run in turns, so that they meet the same machine,
in a process that keeps its memory (`keep_memory`, as in training on a CPU). What counts is the processor's
time, that of workers and of their start with it, on one thread a process: images a second of a core.
"""
import itertools
import math
import os
import resource
import statistics
import tempfile
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from wsol_nb.core import keep_memory  # first: torchvision may be of another build than torch
from wsol_nb.images import read_image
from wsol_nb.data.batches import ByteBatch, Item
from wsol_nb.data.geometry import apply_geometry, draw_geometry, to_bytes, to_float
from wsol_nb.data.loaders import WSOLDataLoaders
from wsol_nb.data.pixels import crop_pixels, decode_small
from wsol_nb.data.worlds.base import nth_scene
from wsol_nb.data.worlds.objects import ObjectsWorld
from wsol_nb.results import origin, results_folder
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

SIZE, RESIZE, BATCH, QUALITY = 224, 256, 32, 92
SIZES = (256, 256), (500, 375), (1000, 750)
COMMAND = 'python tools/bench.py loaders'


def scenes(n):
    "Pictures of 1000×750 pixels."
    world = ObjectsWorld(image_size=(1000, 1000))
    for i in range(n):
        yield Image.fromarray(nth_scene(world, 'train', i, seed=0).image).crop((0, 125, 1000, 875))


def write_photos(root, pictures, times):
    "Each picture in each size, under `times` names, one folder a class; the mean KB of a size's files."
    kb = {}
    for w, h in SIZES:
        folder, files = root/f'{w}x{h}', []
        for i, picture in enumerate(pictures):
            place = folder/'train'/f'class{i % 4}'
            place.mkdir(parents=True, exist_ok=True)
            first = place/f'{i:04d}-0.jpg'
            picture.resize((w, h), Image.LANCZOS).save(first, quality=QUALITY)
            for k in range(1, times): os.link(first, place/f'{i:04d}-{k}.jpg')
            files.append(first.stat().st_size)
        val = folder/'val'/'class0'
        val.mkdir(parents=True)
        os.link(first, val/'0.jpg')
        kb[w, h] = round(statistics.mean(files)/1e3, 1)
    return kb


# loaders: (folder, workers) -> something to iterate

def ours(folder, workers, fast):
    df = pd.concat([table_of(folder, split) for split in ('train', 'val')])
    options = dict(size=SIZE, resize=RESIZE, bs=BATCH, num_workers=workers, device='cpu', fast=fast)
    return WSOLDataLoaders.from_manifest(df, **options).train


def table_of(folder, split):
    files = sorted((folder/split).glob('*/*.jpg'))
    names = [f.parent.name for f in files]
    rows = dict(image_id=[str(f.relative_to(folder)) for f in files], path=[*map(str, files)], split=split,
                label=[int(name[-1]) for name in names], class_name=names)
    return pd.DataFrame(rows).assign(width=0, height=0, boxes=None, mask=None, ignore='')


class Before(torch.utils.data.Dataset):
    "Items as they were before bytes travelled: PIL does everything, each image is a float tensor at once."
    def __init__(self, folder): self.df = table_of(folder, 'train')
    def __len__(self): return len(self.df)

    def __getitem__(self, i):
        g = draw_geometry(0, 0, i, RESIZE - SIZE)
        img = apply_geometry(read_image(self.df.path[i]), SIZE, RESIZE, g)
        return torch.from_numpy(np.array(img)).permute(2, 0, 1).float().div_(255), self.df.label[i]


def torch_loader(ds, workers):
    return torch.utils.data.DataLoader(ds, BATCH, shuffle=True, num_workers=workers, drop_last=True)


def before(folder, workers): return torch_loader(Before(folder), workers)


def torchvision(folder, workers, first):
    "PIL's resize, as in torchvision's own recipes, or that of tensors, which is said to be faster."
    steps = [v2.Resize((RESIZE, RESIZE), antialias=True), v2.RandomCrop(SIZE), v2.RandomHorizontalFlip()]
    steps.insert(0 if first == 'tensor' else 3, v2.PILToTensor())
    steps.append(v2.ToDtype(torch.float32, scale=True))
    return torch_loader(ImageFolder(folder/'train', v2.Compose(steps)), workers)


def fastai(folder, workers, flip):
    "Its flip of an image, or of a batch."
    from fastai.vision.augment import Flip, FlipItem, RandomCrop, Resize, ResizeMethod
    from fastai.vision.data import ImageDataLoaders
    item = [Resize((RESIZE, RESIZE), method=ResizeMethod.Squish), RandomCrop(SIZE)]
    tfms = dict(item_tfms=item + ([FlipItem()] if flip == 'item' else []),
                batch_tfms=[Flip()] if flip == 'batch' else [])
    return ImageDataLoaders.from_folder(folder, train='train', valid='val', bs=BATCH, num_workers=workers,
                                        device=torch.device('cpu'), **tfms).train


LOADERS = {'wsol_nb, fast': partial(ours, fast=True), 'wsol_nb': partial(ours, fast=False),
           'wsol_nb, before': before,
           'torchvision v2, resize of PIL': partial(torchvision, first='PIL'),
           'torchvision v2, resize of tensors': partial(torchvision, first='tensor'),
           'fastai, flip of an item': partial(fastai, flip='item'),
           'fastai, flip of a batch': partial(fastai, flip='batch')}
ALONE = 'wsol_nb, before', 'fastai, flip of a batch' # not tried with workers
OURS = [name for name in LOADERS if name.startswith('wsol_nb')]


def processor_time():
    "Seconds of this process and of its workers that have ended."
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def rate(loader, limit):
    "Images a second of a core, in a pass over a loader that ends after `limit` images."
    start, n = processor_time(), 0
    for x, *_ in loader:
        assert x.dtype == torch.float32 and x.shape[1:] == (3, SIZE, SIZE)
        assert 0 <= x[0].min() <= x[0].max() <= 1
        n += len(x)
        if n >= limit: break
    return n/(processor_time() - start)


def rates(folder, workers, repeat, limit):
    "Images a second of each loader, `repeat` times in turns; the first round is not counted."
    loaders = {name: make(folder, workers) for name, make in LOADERS.items()
               if not (workers and name in ALONE)}
    found = {name: [] for name in loaders}
    for r in range(repeat + 1):
        for name, loader in loaders.items():
            images = rate(loader, limit)
            if r: found[name].append(images)
    return found


def compared(folder, size, kb, workers, repeat, limit):
    "A row for each loader, with its rate as a multiple of the best peer's, round by round."
    found = rates(folder, workers, repeat, limit)
    medians = {name: statistics.median(v) for name, v in found.items()}
    best = max((n for n in found if n not in OURS), key=medians.get)
    for name, v in found.items():
        ratio = statistics.median(a/b for a, b in zip(v, found[best]))
        row = dict(size='{}x{}'.format(*size), kb=kb, workers=workers, loader=name)
        row |= dict(images_per_s=round(medians[name]), least=round(min(v)), most=round(max(v)))
        row |= dict(times_best_peer=round(ratio, 2), best_peer=best)
        print('  '.join(f'{k} {x}' for k, x in row.items()), flush=True)
        yield row


# stages

WHOLE = 'collate', 'batch to floats' # of a batch


def stage_calls(file):
    "Name -> (before, after): what is done to an image in turn, each a call on what the one before gave."
    g, need = draw_geometry(0, 0, 0, RESIZE - SIZE)._replace(flip=True), (RESIZE, RESIZE)
    picture, (pixels, extent) = read_image(file), decode_small(file, need)
    crop = apply_geometry(picture, SIZE, RESIZE, g)
    x = torch.from_numpy(np.array(crop)).permute(2, 0, 1).float().div_(255)
    floats, items = [x]*BATCH, [Item(crop_pixels(pixels, SIZE, RESIZE, g, extent), (torch.tensor(0),))]*BATCH
    batch, label = ByteBatch.of(items), torch.zeros(BATCH, dtype=torch.int64)
    return {'decode': (lambda: read_image(file), lambda: decode_small(file, need)),
            'resize, crop, flip': (lambda: apply_geometry(picture, SIZE, RESIZE, g),
                                   lambda: crop_pixels(pixels, SIZE, RESIZE, g, extent)),
            'to a tensor': (lambda: to_float(to_bytes(crop)), None),
            'collate': (lambda: (torch.stack(floats), label.clone()), lambda: ByteBatch.of(items)),
            'batch to floats': (None, batch.floats)}


def stages(folder, size, repeat=5):
    "Rows of milliseconds an image for each stage, median over the pictures; each time another picture."
    spent, calls = {}, [stage_calls(str(f)) for f in sorted((folder/'train').glob('*/*-0.jpg'))]
    keys = [(stage, i) for stage, pair in calls[0].items() for i in (0, 1) if pair[i]]
    for (stage, i), of_picture in itertools.product(keys, repeat*calls):
        start = time.process_time_ns()
        of_picture[stage][i]()
        ms = (time.process_time_ns() - start)/1e6
        spent.setdefault((stage, i), []).append(ms/(BATCH if stage in WHOLE else 1))
    for stage in dict.fromkeys(s for s, _ in spent):
        ms = [round(statistics.median(spent.get((stage, i), [0])), 3) for i in (0, 1)]
        row = dict(size='{}x{}'.format(*size), stage=stage, ms_before=ms[0], ms_fast=ms[1])
        print('  '.join(f'{k} {x}' for k, x in row.items()), flush=True)
        yield row


def write(rows, name):
    "A table with where it comes from."
    packages = 'torch', 'torchvision', 'fastai', 'pillow', 'opencv-python-headless'
    versions = ', '.join(f'{p} {version(p)}' for p in packages)
    table = pd.DataFrame(rows).assign(**origin(COMMAND), versions=versions)
    table.to_csv(results_folder()/f'{name}.csv', index=False)


def loaders(n=24, times=16):
    "The two tables. A pass without workers ends after 192 images, one with them goes through all."
    torch.set_num_threads(1)
    keep_memory()
    rows, parts = [], []
    with tempfile.TemporaryDirectory() as d:
        kb = write_photos(Path(d), [*scenes(n)], times)
        folders = {size: Path(d)/'{}x{}'.format(*size) for size in SIZES}
        for size, folder in folders.items(): parts += stages(folder, size)
        write(parts, 'loader_stages')
        for workers, repeat, limit in ((0, 7, 192), (2, 2, math.inf)):
            for size, folder in folders.items():
                rows += compared(folder, size, kb[size], workers, repeat, limit)
                write(rows, 'loaders')
