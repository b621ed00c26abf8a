"""Real pictures in the formats of others: imported, checked, trained on, scored, exported and read back.

    python tools/imported.py [FOLDER] [--n N]       N pictures of each source, default 32

Four sources are written from the real sets (WSOL_DATA) with nothing of ours: photographs in a folder a class
(CUB), Pascal VOC (its own pictures and palette masks, a box around each part), COCO (frames of DAVIS, the
polygons of OpenCV, packed runs where pycocotools is there) and YOLO (CUB, boxes as shares). Each goes through
the command line: `wsol_data import` and `check`, an epoch of `wsol_train`, `wsol_eval`, `wsol_data export` of
what was imported and of what the run sees, to VOC, COCO and YOLO. torchvision, pycocotools and a reader of
YOLO's lines read that back. Exit status 1 where a step fails or a number is another. Nothing is kept unless a
FOLDER is named.
"""
import argparse
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import yaml
from PIL import Image

BIN = Path(sys.executable).parent
DATA = Path(os.environ.get('WSOL_DATA', ''))
HAS_COCO = find_spec('pycocotools') is not None
FORMATS = 'voc', 'coco', 'yolo'


# Sources: each writes n pictures below a folder and returns {file name: [(class, x0, y0, x1, y1), …]}

def split_of(k): return 'val' if k % 4 == 3 else 'train'


def cub(n):
    "(class, file, original size, box) of CUB's pictures, of four classes."
    meta, rows = DATA/'metadata/CUB/train', {}
    for name, key in (('image_sizes', 'size'), ('localization', 'box')):
        for line in (meta/f'{name}.txt').read_text().splitlines():
            image, *numbers = line.split(',')
            rows.setdefault(image, {})[key] = [float(v) for v in numbers]
    groups = {}
    for image, r in sorted(rows.items()):
        groups.setdefault(image.split('/')[-2], []).append((image, r))
    for name in list(groups)[:4]:
        for image, r in groups[name][:n//4]: yield name, DATA/'CUB'/image, r['size'], r['box']


def folder(root, n):
    for name, file, *_ in cub(n):
        (root/name).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, root/name/file.name)
    return {f.name: [] for f in root.rglob('*.jpg')}


def yolo(root, n):
    truth, names = {}, []
    for k, (name, file, (w, h), (x0, y0, x1, y1)) in enumerate(cub(n)):
        if name not in names: names.append(name)
        for kind in ('images', 'labels'): (root/kind/split_of(k)).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, root/'images'/split_of(k)/file.name)
        width, height = Image.open(file).size
        shares = (x0 + x1 + 1)/2/w, (y0 + y1 + 1)/2/h, (x1 + 1 - x0)/w, (y1 + 1 - y0)/h
        label = root/'labels'/split_of(k)/file.with_suffix('.txt').name
        label.write_text(' '.join([str(names.index(name)), *(f'{s:.6f}' for s in shares)]) + '\n')
        edges = np.array([x0/w*width, y0/h*height, (x1 + 1)/w*width - 1, (y1 + 1)/h*height - 1])
        truth[file.name] = [(name, *edges)]
    data = dict(path='.', train='images/train', val='images/val', names=dict(enumerate(names)))
    (root/'data.yaml').write_text(yaml.safe_dump(data))
    return truth


def parts(mask, least=40):
    "The connected parts of a mask, with the box around each."
    count, labels = cv2.connectedComponents(mask.astype(np.uint8))
    for k in range(1, count):
        ys, xs = np.nonzero(labels == k)
        if len(ys) >= least: yield labels == k, (xs.min(), ys.min(), xs.max(), ys.max())


def voc(root, n):
    names = dict(line.split()[:2] for line in (DATA/'VOC-SCRIBBLE/classes.txt').read_text().splitlines())
    index, truth, lists, k = pd.read_csv(DATA/'VOC-SCRIBBLE/index.csv', dtype=str), {}, {}, 0
    common = index.classes.value_counts().index[:4]
    for sub in ('JPEGImages', 'Annotations', 'SegmentationClass', 'ImageSets/Main'):
        (root/sub).mkdir(parents=True)
    for r in pd.concat([index[index.classes == c][:n//4] for c in common]).itertuples():
        mask_file = DATA/f'VOC-SCRIBBLE/masks/{r.id}.png'
        mask, name = np.asarray(Image.open(mask_file)), names[r.classes]
        boxes = [box for _, box in parts((mask > 0) & (mask < 255))]
        if not boxes: continue
        shutil.copyfile(DATA/f'VOC-SCRIBBLE/images/{r.id}.jpg', root/f'JPEGImages/{r.id}.jpg')
        shutil.copyfile(mask_file, root/f'SegmentationClass/{r.id}.png')
        objects = ''.join(
            f'<object><name>{name}</name><pose>Left</pose><truncated>0</truncated><difficult>0</difficult>'
            f'<bndbox><xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin><xmax>{x1 + 1}</xmax><ymax>{y1 + 1}</ymax>'
            '</bndbox></object>' for x0, y0, x1, y1 in boxes)
        h, w = mask.shape
        (root/f'Annotations/{r.id}.xml').write_text(
            f'<annotation><folder>VOC2012</folder><filename>{r.id}.jpg</filename><size><width>{w}</width>'
            f'<height>{h}</height><depth>3</depth></size><segmented>1</segmented>{objects}</annotation>')
        lists.setdefault(split_of(k), []).append(r.id)
        truth[f'{r.id}.jpg'], k = [(name, *box) for box in boxes], k + 1
    for split, ids in lists.items(): (root/f'ImageSets/Main/{split}.txt').write_text('\n'.join(ids) + '\n')
    return truth


def segmentation(mask, packed):
    "A mask as pycocotools packs it, or as the polygons that OpenCV traces."
    if packed:
        from pycocotools import mask as tools
        runs = tools.encode(np.asfortranarray(mask.astype(np.uint8)))
        return runs | dict(counts=runs['counts'].decode())
    rings, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return [r.ravel().tolist() for r in rings if len(r) > 2]


def coco(root, n):
    table = pd.read_csv(DATA/'DAVIS/sequences.csv').drop_duplicates('tag')[:4]
    tags, truth, data = dict(zip(table.sequence, table.tag)), {}, {}
    frames = [(tags[s], s, f) for s in tags
              for f in sorted((DATA/'DAVIS/Annotations'/s).rglob('*.png'))[:n//4]]
    categories = {name: 10*i + 3 for i, name in enumerate(tags.values())} # with gaps, as COCO's own
    for k, (tag, sequence, file) in enumerate(frames):
        split, name = split_of(k), f'{sequence}_{file.stem}.jpg'
        d = data.setdefault(split, dict(images=[], annotations=[], categories=[
            dict(id=i, name=c, supercategory='') for c, i in categories.items()]))
        mask = np.asarray(Image.open(file).convert('L')) > 0
        picture = next((DATA/'DAVIS/JPEGImages'/sequence).rglob(f'{file.stem}.jpg'))
        (root/f'{split}2017').mkdir(parents=True, exist_ok=True)
        shutil.copyfile(picture, root/f'{split}2017'/name)
        h, w = mask.shape
        d['images'].append(dict(id=1000 + k, file_name=name, width=w, height=h))
        truth[name] = []
        for part, (x0, y0, x1, y1) in parts(mask):
            said = segmentation(part, packed=HAS_COCO and k % 2) if HAS_COCO else []
            xywh = [int(v) for v in (x0, y0, x1 + 1 - x0, y1 + 1 - y0)]
            d['annotations'].append(dict(
                id=100*k + len(truth[name]) + 1, image_id=1000 + k, category_id=categories[tag], iscrowd=0,
                bbox=xywh, area=int(part.sum()), segmentation=said))
            truth[name].append((tag, x0, y0, x1, y1))
    (root/'annotations').mkdir()
    for split, d in data.items():
        (root/f'annotations/instances_{split}2017.json').write_text(json.dumps(d))
    return truth


SOURCES = dict(folder=folder, voc=voc, coco=coco, yolo=yolo)


# Readers of others: {bare file name: [(class, x0, y0, x1, y1), …]}, and the masks where they have some

def read_voc(root):
    "By torchvision."
    import wsol_nb.core # lets torchvision be imported beside another build of torch
    from torchvision.datasets import VOCDetection
    boxes, masks = {}, {}
    with tempfile.TemporaryDirectory() as d:
        (Path(d)/'VOCdevkit').mkdir()
        (Path(d)/'VOCdevkit/VOC2012').symlink_to(root)
        for split in (f.stem for f in (root/'ImageSets/Main').glob('*.txt')):
            for img, said in VOCDetection(d, '2012', split):
                said = said['annotation']
                own = [(o['name'], *(float(o['bndbox'][c]) - 1 for c in ('xmin', 'ymin', 'xmax', 'ymax')))
                       for o in said['object']]
                assert img.size == tuple(int(said['size'][s]) for s in ('width', 'height'))
                boxes[said['filename']] = own
                file = root/f'SegmentationObject/{Path(said["filename"]).stem}.png'
                objects = np.asarray(Image.open(file)) if file.is_file() else np.zeros((1, 1))
                each = [objects == k for k in range(1, len(own) + 1)]
                masks[said['filename']] = [m for m in each if m.any()]
    return boxes, masks


def read_coco(root):
    "By pycocotools, or without it from the JSON."
    boxes, masks = {}, {}
    for file in (root/'annotations').glob('instances_*.json'):
        data, api = json.loads(file.read_text()), None
        if HAS_COCO:
            from pycocotools.coco import COCO
            with contextlib.redirect_stdout(io.StringIO()): api = COCO(str(file))
            assert len(api.getAnnIds()) == len(data['annotations'])
        images = {i['id']: i['file_name'] for i in data['images']}
        names = {c['id']: c['name'] for c in data['categories']}
        for name in images.values(): boxes[name], masks[name] = [], []
        for a in api.loadAnns(api.getAnnIds()) if api else data['annotations']:
            x, y, w, h = a['bbox']
            boxes[images[a['image_id']]].append((names[a['category_id']], x, y, x + w - 1, y + h - 1))
            if api and a['segmentation']: masks[images[a['image_id']]].append(api.annToMask(a) > 0)
    return boxes, masks


def read_yolo(root):
    "By the documentation: a line an object, its class and centre, width and height, or corners, as shares."
    data, boxes = yaml.safe_load((root/'data.yaml').read_text()), {}
    for split in ('train', 'val', 'test'):
        if split not in data: continue
        for file in sorted((root/data[split]).rglob('*.*')):
            size = np.array(Image.open(file).size)
            label = Path(str(file).replace('/images/', '/labels/')).with_suffix('.txt')
            boxes[file.name] = []
            for line in label.read_text().splitlines():
                kind, *numbers = line.split()
                numbers = np.array(numbers, float)
                if len(numbers) == 4: low, high = numbers[:2] - numbers[2:]/2, numbers[:2] + numbers[2:]/2
                else: low, high = numbers.reshape(-1, 2).min(0), numbers.reshape(-1, 2).max(0)
                box = *(low*size).tolist(), *(high*size - 1).tolist()
                boxes[file.name].append((data['names'][int(kind)], *box))
    return boxes, {}


READERS = dict(voc=read_voc, coco=read_coco, yolo=read_yolo)


def same_boxes(a, b, tol):
    "How many boxes of two tables of one form differ by more than some pixels, or are of other classes."
    if a.keys() != b.keys(): return f'{len(a.keys() ^ b.keys())} pictures'
    wrong = 0
    for name in a:
        own, other = sorted(a[name]), sorted(b[name])
        if len(own) != len(other): wrong += abs(len(own) - len(other))
        for x, y in zip(own, other):
            wrong += x[0] != y[0] or bool(np.abs(np.subtract(x[1:], y[1:])).max() > tol)
    return wrong


# Steps

def call(*args):
    "A command of ours; what it printed. A status other than 0 ends this source."
    r = subprocess.run([*map(str, [BIN/args[0], *args[1:]])], capture_output=True, text=True)
    if r.returncode: raise AssertionError(f'{" ".join(map(str, args[:3]))} …: {(r.stdout + r.stderr)[-800:]}')
    return r.stdout


def exported(data, out, truth, tol, **how):
    "What each format says of a dataset, read back by others, beside the truth; {format: what differs}."
    found, said = {}, {}
    for format in FORMATS:
        flags = [f for k, v in how.items() for f in (f'--{k}', v)]
        plain = ['--no-masks']*(format == 'yolo')
        call('wsol_data', 'export', data, out/format, '--format', format, *flags, *plain)
        found[format] = READERS[format](out/format)
        truth = truth or found[format][0] # of a run: VOC's, which others must agree with
        said[format] = same_boxes(found[format][0], truth, tol)
    (_, a), (_, b) = found['voc'], found['coco']
    pairs = [(x, y) for name in a for x, y in zip(a[name], b.get(name, []))]
    said['masks'] = sum(not np.array_equal(x, y) for x, y in pairs)
    return said | dict(n_boxes=sum(map(len, found['voc'][0].values())), n_masks=len(pairs))


def counts_of(e):
    "What differs in an export, in words."
    boxes = ', '.join(f'{f} {e[f]}' for f in FORMATS)
    return f'boxes {boxes} of {e["n_boxes"]}; masks {e["masks"]} of {e["n_masks"]}'


def figures(said, *names):
    "Numbers of a report's table, by the start of their line."
    lines = said.splitlines()
    found = {n: [l[len(n):] for l in lines if l.startswith(n)] for n in names}
    return {n: re.search(r'[\d.]+', rest[0])[0] for n, rest in found.items() if rest}


def one(kind, base, n):
    "A row of the table."
    root, data, run = base/'source', base/'data', base/'run'
    truth = SOURCES[kind](root, n)
    row = dict(source=kind, pictures=len(truth), boxes=sum(map(len, truth.values())))
    said = call('wsol_data', 'import', root, data, *['--name', 'SET'])
    counts = re.search(r'(\d+) pictures, (\d+) classes, (\d+) boxes, (\d+) masks', said)
    assert int(counts[1]) == len(truth) and int(counts[3]) == row['boxes'], said
    row['masks'] = int(counts[4])
    row['check'] = call('wsol_data', 'check', data).splitlines()[-1]
    net = '--arch', 'mobilenetv2_100', '--size', 128, '--bs', 8, '--epochs', 1
    call('wsol_train', '--data', data, '--out', run, *net)
    said = call('wsol_eval', run, '--split', 'val', '--bootstrap', 0)
    row |= figures(said, 'accuracy', 'MaxBoxAcc δ=0.5', 'PxAP')
    if row['boxes']:
        own = exported(data, base/'own', truth, .02 if kind == 'yolo' else 1e-6)
        row['exported, wrong'] = counts_of(own)
        row['wrong'] = sum(bool(own[f]) for f in (*FORMATS, 'masks'))
    # after an epoch a run's own τ may be 0, and that is refused
    seen = exported(data, base/'seen', None, 1e-6, run=run, tau=.2)
    row['seen, wrong'] = counts_of(seen)
    row['wrong'] = row.get('wrong', 0) + sum(bool(seen[f]) for f in (*FORMATS, 'masks'))
    few = [] if HAS_COCO else ['--no-masks']
    call('wsol_data', 'import', base/'seen/coco', base/'again', '--name', 'SEEN', *few)
    row['again'] = call('wsol_data', 'check', base/'again').splitlines()[-1]
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('folder', nargs='?', type=Path)
    parser.add_argument('--n', type=int, default=32)
    parser.add_argument('--sources', nargs='+', default=[*SOURCES])
    given = parser.parse_args()
    if not (DATA/'metadata/CUB').is_dir(): sys.exit('WSOL_DATA does not name the real sets')
    wrong = 0
    with tempfile.TemporaryDirectory() as tmp:
        for kind in given.sources:
            base = (given.folder or Path(tmp))/kind
            base.mkdir(parents=True)
            try: row = one(kind, base.resolve(), given.n)
            except AssertionError as e: row = dict(source=kind, wrong=1, failed=str(e))
            wrong += row['wrong']
            for k, v in row.items(): print(f'{k:>16}: {v}', flush=True)
            print()
    print(f'{len(given.sources)} sources, {wrong} wrong; pycocotools {"is" if HAS_COCO else "is not"} there')
    sys.exit(bool(wrong))


if __name__ == '__main__': main()
