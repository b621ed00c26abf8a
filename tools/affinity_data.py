"""Pictures on which affinity refinement is chosen and tested: birds, photographs, video, tissue, the world

Each set has a split to choose on and one that is tested once. Masks and boxes of VOC-SCRIBBLE and DAVIS are
brought into the form of the other sets in a folder of work. A box is drawn around each connected part of
the object of at least a twentieth of its area, and any of them may be found, as with ImageNet's boxes.
"""
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from PIL import Image

from wsol_nb.core import env_folder
from wsol_nb.data.loaders import WSOLDataLoaders
from wsol_nb.data.worlds.objects import ObjectsWorld

PART = .05 # of the object's area: smaller connected parts get no box
ROLES = dict(CUB=('val', 'test'), VOC=('val', 'test'), DAVIS=('val', 'test'), GlaS=('valcl', 'test'),
             HEGlaS=('train', 'test'), world=('val', 'test')) # chosen on, tested on


def boxes_of(mask)->np.ndarray: # (n,4) inclusive
    "A box around each large enough connected part of a mask."
    _, _, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    x, y, w, h, area = stats[1:].T
    boxes = np.stack([x, y, x + w - 1, y + h - 1], 1).astype(np.int64)
    return boxes[area >= PART*area.sum()]


def row(image_id, path, split, mask, file, ignore='')->dict:
    "A manifest's row of a picture with a mask (H,W) that is also in a file."
    h, w = mask.shape
    boxes = boxes_of(mask) if mask.any() else np.zeros((0, 4), np.int64)
    return dict(image_id=image_id, path=str(path), label=0, class_name='object', split=split, width=w,
                height=h, boxes=boxes, mask=(str(file),), ignore=str(ignore))


def saved(folder, name, mask)->Path:
    "A mask in a file."
    file = folder/f'{name}.png'
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask.astype(np.uint8)).save(file)
    return file


def voc(root, work)->list:
    "VOC-SCRIBBLE: every fifth picture in the order of its index to choose on."
    rows = []
    for i, r in enumerate(pd.read_csv(root/'VOC-SCRIBBLE/index.csv').itertuples()):
        indices = np.array(Image.open(root/f'VOC-SCRIBBLE/masks/{r.id}.png'))
        mask, void = (indices > 0) & (indices < 255), indices == 255
        files = saved(work/'voc', r.id, mask), saved(work/'voc', f'{r.id}-void', void)
        split = 'test' if i % 5 else 'val'
        rows.append(row(r.id, root/f'VOC-SCRIBBLE/images/{r.id}.jpg', split, mask, *files))
    return rows


def davis(root, work)->list:
    "DAVIS: every third video by name to choose on; frames without an object are left out."
    rows, folder = [], root/'DAVIS/Annotations'
    for i, video in enumerate(sorted(p.name for p in folder.iterdir())):
        for file in sorted((folder/video).glob('*.png')):
            mask = np.array(Image.open(file)) > 0
            image = root/f'DAVIS/JPEGImages/{video}/{file.stem}.jpg'
            split = 'test' if i % 3 else 'val'
            if mask.any(): rows.append(row(f'{video}/{file.stem}', image, split, mask, file))
    return rows


def he_glas(root, work)->list:
    "HE-GLAS: malignant tiles with something to find; no boxes, glands fill a tile."
    rows, folder = [], root/'HE-GLAS'
    for r in pd.read_csv(folder/'index.csv').itertuples():
        mask = np.array(Image.open(folder/r.mask)) > 0
        if not mask.any(): continue
        split = 'train' if r.split == 'train' else 'test'
        found = row(r.id, folder/r.image, split, mask, folder/r.mask)
        rows.append(found | dict(boxes=np.zeros((0, 4), np.int64)))
    return rows


READERS = dict(VOC=voc, DAVIS=davis, HEGlaS=he_glas)


def loaders(name, work, size=224, bs=8)->WSOLDataLoaders:
    "A set's pictures, whole, on a grid of `size`."
    root = env_folder('WSOL_DATA')
    common = dict(size=size, resize=size, bs=bs, device='cpu', num_workers=0)
    if name == 'world':
        counts = dict(n_train=8, n_val=64, n_test=160)
        return WSOLDataLoaders.from_synth(work/'world', ObjectsWorld(), world_kw=counts, **common)
    if name in READERS:
        df = pd.DataFrame(READERS[name](root, work))
        roles = dict(train='val', valid='val') if name != 'HEGlaS' else dict(train='train', valid='train')
        return WSOLDataLoaders.from_manifest(df, **roles, **common)
    dataset = dict(CUB='CUB', GlaS='GLAS/fold-0')[name]
    return WSOLDataLoaders.from_metadata(root, dataset, **common)


def drawn_by(name, image_id)->str:
    "What the bootstrap draws: pictures, or whole videos."
    return image_id.split('/')[0] if name == 'DAVIS' else image_id
