"Annotations of other formats: read back by other readers, exact there and back, named where they are wrong."
import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import BIN, ENV, raises, refused, wsol
from PIL import Image

from wsol_nb.cli.exchange import export_data, import_data
from wsol_nb.core import assert_same
from wsol_nb.data.check import check_manifest
from wsol_nb.data.coco import segmentation_of
from wsol_nb.data.conventions import from_edges, to_edges
from wsol_nb.data.exchange import FORMATS, read_any, without_masks, write_any
from wsol_nb.data.interchange import Found, Picture, Thing
from wsol_nb.data.layout import write_layout
from wsol_nb.data.metadata import read_metadata
from wsol_nb.data.outline import fill
from wsol_nb.data.stores import MapStore
from wsol_nb.scoring.annotate import annotate

CLASSES = 'jay', 'owl', 'wren'


def blob(rng, h, w):
    "A mask of some parts, which may touch or have holes, and the box around it."
    mask = np.zeros((h, w), bool)
    for _ in range(rng.integers(1, 4)):
        y, x = rng.integers(0, h - 4), rng.integers(0, w - 4)
        mask[y:y + rng.integers(1, 20), x:x + rng.integers(1, 20)] ^= True
    mask[rng.integers(0, h), rng.integers(0, w)] = True
    ys, xs = np.nonzero(mask)
    return mask, tuple(map(int, (xs.min(), ys.min(), xs.max(), ys.max())))


@pytest.fixture
def birds(tmp_path):
    "Twelve pictures of any size with several objects; every object has a mask."
    rng, pictures = np.random.default_rng(0), []
    for k in range(12):
        w, h = map(int, rng.integers(30, 120, 2))
        file = tmp_path/f'src/{k % 3}/{k:02d}.jpg'
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (h, w, 3), np.uint8)).save(file)
        marks = [blob(rng, h, w) for _ in range(rng.integers(1, 4))]
        names = [CLASSES[k//3 % 3], *map(str, rng.choice(CLASSES, len(marks) - 1))]
        things = [Thing(c, box, lambda mask=mask: mask) for c, (mask, box) in zip(names, marks)]
        split = ('train', 'val', 'test')[k % 3]
        pictures.append(Picture(f'{k % 3}/{k:02d}.jpg', file, (w, h), split, things))
    found = Found(pictures)
    found.name_classes()
    return found


def boxes(found):
    "Split, class and box of all objects, without the names of pictures, which formats change."
    rows = [(Path(p.image_id).name, p.split, t.label, t.box) for p in found.pictures for t in p.things]
    return sorted(rows)


def quiet(f, *args, **kwargs):
    with contextlib.redirect_stdout(io.StringIO()): return f(*args, **kwargs)


@pytest.mark.parametrize('format', FORMATS)
def test_there_and_back(birds, format, tmp_path):
    "Into the layout, out in a format, in again: the same boxes, splits and classes; masks to the pixel."
    write_layout(birds, tmp_path/'data', 'BIRDS')
    df = read_metadata(tmp_path/'data', 'BIRDS')
    assert len(df) == 12 and check_manifest(df).empty
    assert len(quiet(export_data, tmp_path/'data', tmp_path/'out', format)) == 0
    if format == 'coco': # polygons need pycocotools
        again = read_any(tmp_path/'out', masks=False)
    else: again = read_any(tmp_path/'out')
    assert boxes(again) == boxes(birds) and not again.problems
    if format not in ('yolo', 'labelstudio'): return
    want = {Path(p.image_id).name: p for p in birds.pictures}
    for p in again.pictures:
        for a, b in zip(p.things, want[Path(p.image_id).name].things, strict=True):
            assert_same(a.mask(), b.mask())


@pytest.mark.parametrize('format', ['voc', 'coco', 'yolo', 'csv'])
def test_linked_hidden_and_closed_folders(birds, format, tmp_path):
    "Annotations and pictures behind links are read, hidden ones are not; what leads nowhere is a problem."
    write_any(without_masks(birds), tmp_path/'there', format)
    (tmp_path/'in').mkdir()
    for f in (tmp_path/'there').iterdir():
        if f.is_dir(): (tmp_path/'in'/f.name).symlink_to(f)
        else: shutil.copy(f, tmp_path/'in'/f.name)
    before = read_any(tmp_path/'in', format)
    assert boxes(before) == boxes(birds) and not before.problems
    shutil.copytree(tmp_path/'there', tmp_path/'in/.cache')
    (tmp_path/'in/gone').symlink_to('nowhere')
    after = read_any(tmp_path/'in', format)
    assert boxes(after) == boxes(birds) and after.tally == before.tally
    assert after.problems == [(str(tmp_path/'in/gone'), 'is one of the links to nothing')]


def test_yolo_by_its_documentation(birds, tmp_path):
    "`class cx cy w h`, shares of the sides, in labels/<split>/<name>.txt."
    write_any(without_masks(birds), tmp_path/'out', 'yolo')
    import yaml
    data = yaml.safe_load((tmp_path/'out/data.yaml').read_text())
    seen = []
    for split in ('train', 'val', 'test'):
        for image in sorted((tmp_path/'out'/data[split]).iterdir()):
            label = Path(str(image).replace('/images/', '/labels/')).with_suffix('.txt')
            w, h = Image.open(image).size
            for line in label.read_text().splitlines():
                kind, cx, cy, bw, bh = map(float, line.split())
                box = (cx - bw/2)*w, (cy - bh/2)*h, (cx + bw/2)*w - 1, (cy + bh/2)*h - 1
                box = [*map(round, box)] if np.allclose(box, np.round(box), atol=1e-6) else box
                seen.append((image.name, split, data['names'][int(kind)], tuple(box)))
    assert sorted(seen) == boxes(birds)


def test_voc_by_torchvision(birds, tmp_path):
    "torchvision reads boxes, counted from 1, and the palette images."
    from torchvision.datasets import VOCDetection, VOCSegmentation
    write_any(birds, tmp_path/'VOCdevkit/VOC2012', 'voc')
    seen = []
    for split in ('train', 'val'):
        for _, target in VOCDetection(tmp_path, image_set=split):
            a = target['annotation']
            for o in a['object']:
                box = tuple(int(o['bndbox'][c]) - 1 for c in ('xmin', 'ymin', 'xmax', 'ymax'))
                seen.append((a['filename'], split, o['name'], box))
        for image, mask in VOCSegmentation(tmp_path, image_set=split):
            assert mask.size == image.size and set(np.unique(mask)) <= {0, 1, 2, 3}
    assert sorted(seen) == [r for r in boxes(birds) if r[1] != 'test']


def test_coco_by_pycocotools(birds, tmp_path):
    "pycocotools reads boxes and fills polygons to the very masks."
    coco = pytest.importorskip('pycocotools.coco', reason='pycocotools is not installed')
    write_any(birds, tmp_path/'out', 'coco')
    want = {Path(p.image_id).name: p for p in birds.pictures}
    kinds = set()
    for file in sorted((tmp_path/'out/annotations').glob('*.json')):
        api = quiet(coco.COCO, str(file))
        for i in api.getImgIds():
            p = want[api.imgs[i]['file_name']]
            for a, t in zip(api.imgToAnns[i], p.things, strict=True):
                x, y, w, h = a['bbox']
                assert (x, y, x + w - 1, y + h - 1) == t.box
                assert api.cats[a['category_id']]['name'] == t.label
                assert_same(api.annToMask(a), t.mask().astype(np.uint8))
                assert a['area'] == t.mask().sum()
                kinds.add(type(a['segmentation']))
    assert kinds == {list, dict}, 'polygons and runs should both occur'
    again = read_any(tmp_path/'out')
    for p in again.pictures:
        for a, b in zip(p.things, want[Path(p.image_id).name].things, strict=True):
            assert_same(a.mask(), b.mask())


def test_coco_packed_runs(tmp_path):
    "Runs as text, which only pycocotools writes."
    tools = pytest.importorskip('pycocotools.mask', reason='pycocotools is not installed')
    mask, box = blob(np.random.default_rng(3), 40, 60)
    packed = tools.encode(np.asfortranarray(mask.astype(np.uint8)))
    packed['counts'] = packed['counts'].decode()
    x0, y0, x1, y1 = box
    mark = dict(id=1, image_id=1, category_id=1, bbox=[x0, y0, x1 - x0 + 1, y1 - y0 + 1],
                segmentation=packed)
    Image.new('RGB', (60, 40)).save(tmp_path/'a.jpg')
    data = dict(images=[dict(id=1, file_name='a.jpg', width=60, height=40)], annotations=[mark],
                categories=[dict(id=1, name='owl')])
    (tmp_path/'a.json').write_text(json.dumps(data))
    (thing,) = read_any(tmp_path).pictures[0].things
    assert thing.box == box
    assert_same(thing.mask(), mask)


def test_polygons_without_pycocotools(birds):
    "What is written as polygons fills to the mask."
    for p in birds.pictures:
        for t in p.things:
            s = segmentation_of(t.mask())
            if isinstance(s, list):
                rings = [np.reshape(r, (-1, 2)) for r in s]
                assert_same(fill(rings, t.mask().shape), t.mask())


def test_maps_become_annotations(birds, tmp_path):
    "The box that is written is the evaluator's, in pixels of the picture."
    store = MapStore(tmp_path/'maps')
    for p in birds.pictures:
        score_map = np.zeros((8, 8))
        score_map[2:6, 1:5] = 1
        store.save(p.image_id, score_map)
    drawn = annotate(birds, store, .5)
    for p in drawn.pictures:
        (w, h), (t,) = p.size, p.things
        low, high = np.floor([w/8, h/4]).astype(int), np.ceil([5*w/8, 6*h/8]).astype(int)
        assert t.box == (*low, *(high - 1)) # all pixels that the map's touch
        assert t.mask().shape == (h, w) and t.mask().any()
    write_layout(drawn, tmp_path/'data', 'DRAWN')
    assert check_manifest(read_metadata(tmp_path/'data', 'DRAWN')).empty


def test_what_a_run_sees(world, tmp_path):
    "A plain folder is trained on, and the run draws a box and a mask in each picture, turned ones too."
    folder = shutil.copytree(world/'SYNTH/train', tmp_path/'photos')
    file, exif = sorted(folder.rglob('*.jpg'))[0], Image.Exif()
    exif[0x0112] = 6
    with Image.open(file) as img: img.save(file, exif=exif)
    net = '--arch', 'test_resnet', '--pretrained', 'false', '--size', 64, '--bs', 8, '--epochs', 1
    wsol('train', '--data', folder, '--out', tmp_path/'run', *net)
    for source in (folder, tmp_path/'data'):
        if source != folder: assert 'is folder: 48 pictures' in wsol('data', 'import', folder, source)
        out = tmp_path/f'{source.name}-voc'
        how = '--format', 'voc', '--run', tmp_path/'run'
        assert '48 boxes, 48 masks' in wsol('data', 'export', source, out, *how)
    seen = [boxes(read_any(tmp_path/f'{name}-voc')) for name in ('photos', 'data')]
    by_folder, by_data = ([(name, *rest) for name, _, *rest in rows] for rows in seen) # splits are others
    assert by_folder == by_data and len(by_folder) == 48
    config = json.loads((tmp_path/'run/config.json').read_text())
    config['tau'] = dict(value=0., source='val boxes') # as the boxes of a net that has learnt little choose
    (tmp_path/'run/config.json').write_text(json.dumps(config))
    said = wsol('data', 'export', folder, tmp_path/'no', '--format', 'voc', '--run', tmp_path/'run', code=1)
    assert 'is all of a picture; name one with --tau' in said
    both = '--run', 'run', '--maps', 'maps', '--tau', .5
    assert 'one of them' in wsol('data', 'export', folder, tmp_path/'no', '--format', 'voc', *both, code=1)


def test_a_mask_of_a_class_is_no_object(tmp_path):
    "VOC's mask of a class belongs to its only object, and is none of several: nothing is added to them."
    folder = tmp_path/'source'
    for sub in ('Annotations', 'JPEGImages', 'SegmentationClass'): (folder/sub).mkdir(parents=True)
    mask = np.zeros((20, 30), np.uint8)
    mask[2:9, 3:12] = mask[12:15, 20:25] = 4
    for name, marks in (('one', [(4, 3, 12, 9)]), ('two', [(4, 3, 12, 9), (21, 13, 25, 15)])):
        Image.fromarray(mask*9).save(folder/f'JPEGImages/{name}.jpg')
        Image.fromarray(mask).save(folder/f'SegmentationClass/{name}.png')
        objects = ''.join('<object><name>owl</name><bndbox>' + ''.join(
            f'<{c}>{v}</{c}>' for c, v in zip(('xmin', 'ymin', 'xmax', 'ymax'), box)) + '</bndbox></object>'
            for box in marks)
        (folder/f'Annotations/{name}.xml').write_text(f'<annotation>{objects}</annotation>')
    quiet(import_data, folder, tmp_path/'data')
    for format in FORMATS:
        quiet(export_data, tmp_path/'data', tmp_path/format, format, masks=format == 'voc')
        again = {Path(p.image_id).stem: p for p in read_any(tmp_path/format).pictures}
        assert [len([t for t in again[n].things if t.box]) for n in ('one', 'two')] == [1, 2], format
    again = {Path(p.image_id).stem: p for p in read_any(tmp_path/'voc').pictures}
    assert again['one'].things[0].mask().sum() == (mask > 0).sum() and len(again['two'].regions) == 1


def test_everything_wrong_is_named(birds, tmp_path, monkeypatch):
    "One bad line of each kind in each format: named with its place, the rest is imported."
    for format in FORMATS: write_any(birds, tmp_path/format, format)
    xml = sorted((tmp_path/'voc/Annotations').iterdir())[0]
    xml.write_text(xml.read_text().replace('<xmin>', '<xmin>x', 1))
    csv = tmp_path/'csv/annotations.csv'
    csv.write_text(csv.read_text() + 'images/lost.jpg,owl,train,1,1,2,2\n')
    label = next(f for f in sorted((tmp_path/'yolo/labels').rglob('*.txt')))
    label.write_text(label.read_text() + '\n9 .5 .5 .1 .1')
    file = tmp_path/'coco/annotations/instances_val.json'
    data = json.loads(file.read_text())
    data['annotations'][0]['bbox'][2] = 9999
    file.write_text(json.dumps(data))
    tasks = tmp_path/'labelstudio/tasks.json'
    tasks.write_text(json.dumps(json.loads(tasks.read_text()) + [dict(data=dict(image='lost.jpg'))]))
    wheres = dict(voc=f'{xml} object 1', csv=f'annotations.csv line {1 + len(boxes(birds)) + 1}',
                  yolo=f'{label.relative_to(tmp_path/"yolo")} line {len(label.read_text().splitlines())}',
                  coco='instances_val.json annotations[0]', labelstudio='tasks.json task 12')
    for format, where in wheres.items():
        problems = quiet(import_data, tmp_path/format, tmp_path/f'{format}-in', masks=format != 'coco')
        assert problems['where'].tolist() == [where], format
        df = read_metadata(tmp_path/f'{format}-in', format)
        assert check_manifest(df).empty and len(df) >= 11
        left = (tmp_path/f'{format}-in/metadata/{format}/left_out.csv').read_text()
        assert where in left


BROKEN = {'a.json': ('{"images": [', '{"images": 3}', '[]', '[1]', ''), 'a.xml': ('<annotation>', '<a/>'),
          'a.csv': ('', 'image\na', '\0'), 'data.yaml': ('names: [', 'names: 3\ntrain: x', 'a: 1'),
          'classes.txt': ('owl',), 'a.txt': ('x',)}


def test_what_is_no_annotation_is_refused(tmp_path, monkeypatch):
    "A sentence and no folder, for what is no annotation at all."
    k = 0
    for name, texts in BROKEN.items():
        for text in texts:
            folder = tmp_path/f'{(k := k + 1)}'
            folder.mkdir()
            (folder/name).write_text(text)
            with contextlib.redirect_stdout(io.StringIO()):
                said = refused(monkeypatch, 'data', 'import', folder, tmp_path/'out')
            assert said.startswith('wsol_data: '), (name, text, said)
            assert not (tmp_path/'out').exists()
    assert refused(monkeypatch, 'data', 'import', tmp_path/'lost', tmp_path/'out').endswith('is there')


def damage(text, rng):
    "A text with a few characters, or a piece, lost, doubled or changed."
    for _ in range(rng.randint(1, 4)):
        a = rng.randrange(len(text) + 1)
        b = min(len(text), a + rng.choice((1, 1, 3, 40)))
        piece = rng.choice(('', text[a:b]*2, '9', '-', '"', 'x', ',', '\n', '1e400', 'nan'))
        text = text[:a] + piece + text[b:]
    return text


@pytest.mark.parametrize('format', FORMATS)
def test_damage_ends_in_a_sentence(birds, format, tmp_path):
    "Damaged at random, a source is read with problems, or refused; never with another error."
    birds.pictures = birds.pictures[:3]
    write_any(birds, tmp_path/'made', format)
    texts = {f: f.read_text() for f in (tmp_path/'made').rglob('*')
             if f.suffix in ('.json', '.xml', '.csv', '.txt', '.yaml')}
    rng, outcomes = random.Random(0), set()
    for _ in range(60):
        file = rng.choice(sorted(texts))
        file.write_text(damage(texts[file], rng))
        try: outcomes.add(bool(read_any(tmp_path/'made', format, masks=format != 'coco').problems))
        except ValueError: outcomes.add('refused')
        file.write_text(texts[file])
    assert True in outcomes


def test_killed_at_any_moment(birds, tmp_path):
    "After a kill the folder is not there, or whole; the next call goes through."
    write_any(birds, tmp_path/'voc', 'voc')
    out = tmp_path/'data'
    import_ = [str(BIN/'wsol_data'), 'import', str(tmp_path/'voc'), str(out), '--overwrite']
    for delay in (.8, 1.6, 2.2):
        p = subprocess.Popen(import_, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(delay)
        p.send_signal(signal.SIGKILL)
        p.wait()
        if out.exists(): assert len(read_metadata(out, 'voc')) == 12
    wsol('data', *import_[1:])
    assert check_manifest(read_metadata(out, 'voc')).empty
    assert [f.name for f in tmp_path.glob('.data*')] == []


def test_nothing_of_the_user_is_replaced(birds, tmp_path, monkeypatch):
    write_any(birds, tmp_path/'voc', 'voc')
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine/photo.jpg').write_text('mine')
    for extra in ((), ('--overwrite',)):
        with contextlib.redirect_stdout(io.StringIO()):
            said = refused(monkeypatch, 'data', 'import', tmp_path/'voc', tmp_path/'mine', *extra)
        assert 'no import or export made this one' in said
    assert (tmp_path/'mine/photo.jpg').read_text() == 'mine'


@pytest.mark.parametrize('convention', ['fractions', 'xywh', 'centre', 'one-based'])
def test_check_names_the_convention(birds, convention, tmp_path):
    "A dataset with boxes of another convention is not sound, check says which, and import mends it."
    for p in birds.pictures: p.things[0].box = (0, 0, p.size[0] - 1, p.size[1] - 1)
    birds = without_masks(birds)
    write_layout(birds, tmp_path/'data', 'BIRDS')
    for p in birds.pictures:
        for t in p.things:
            t.box = tuple(from_edges(to_edges(t.box, p.size, 'pixels'), p.size, convention)[0].tolist())
    wrong = tmp_path/'wrong'
    shutil.copytree(tmp_path/'data', wrong)
    for split in ('train', 'val', 'test'):
        rows = [[p.image_id, *t.box] for p in birds.pictures if p.split == split for t in p.things]
        meta = wrong/f'metadata/BIRDS/{split}'
        (meta/'localization.txt').write_text('\n'.join(','.join(map(str, r)) for r in rows))
        os.remove(meta/'objects.csv')
    problems = check_manifest(read_metadata(wrong, 'BIRDS', strict=False)).problem
    assert problems.str.contains(f'--boxes {convention}').sum() in (1, 2, 3)
    assert len(quiet(import_data, wrong, tmp_path/'mended', 'wsol', boxes=convention)) == 0
    a, b = (read_metadata(tmp_path/d, 'BIRDS') for d in ('data', 'mended'))
    for x, y in zip(a.boxes, b.boxes, strict=True): assert_same(x, y)


def test_refusals(tmp_path):
    raises("boxes='yx': expected pixels", read_any, tmp_path, 'csv', 'yx')
    raises("format='pdf': expected voc", read_any, tmp_path, 'pdf')
    raises('nothing for coco, which has one form', read_any, tmp_path, 'coco', 'xywh')


def test_boxes_go_out_in_stored_pixels(tmp_path):
    "A picture that is stored at half its size: box, mask and picture that are exported agree."
    Image.new('RGB', (60, 40)).save(tmp_path/'a.jpg')
    mask = np.zeros((40, 60), bool)
    mask[5:20, 10:30] = True
    p = Picture('a.jpg', tmp_path/'a.jpg', (120, 80), 'train', [Thing('owl', (20, 10, 59, 39), lambda: mask)])
    found = Found([p], {0: 'owl'})
    for format in FORMATS:
        write_any(found, tmp_path/format, format)
        (again,) = read_any(tmp_path/format, masks=format != 'coco').pictures
        assert (again.size, again.things[0].box) == ((60, 40), (10, 5, 29, 19)), format
    assert any('boxes were scaled' in note for note in found.notes)
