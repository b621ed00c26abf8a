"Every dataset of the tutorial, read from files in just their published layout; the pictures are made here."
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wsol_nb.cli.command import main
from wsol_nb.data.loaders import WSOLDataLoaders
from wsol_nb.data.check import check_manifest
from wsol_nb.data.manifest import labels_of
from wsol_nb.data.metadata import datasets_in, read_metadata
from wsol_nb.data.stores import read_mask

rng = np.random.default_rng(0)


def split(root, dataset, name, end='', **files):
    """The metadata files of a split: no header; the WSOL releases end without a newline, the histology and
    video ones with one."""
    folder = root/'metadata'/dataset/name
    folder.mkdir(parents=True)
    for file, rows in files.items():
        lines = [','.join(map(str, row)) if isinstance(row, tuple) else row for row in rows]
        (folder/f'{file}.txt').write_text('\n'.join(lines) + end)


def picture(path, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(path)


def mask(path, *objects, size=(40, 30), values=None):
    "A grey mask with a rectangle x0,y0,x1,y1 an object; its value is 255, or that of `values`."
    arr = np.zeros(size[::-1], np.uint8)
    for (x0, y0, x1, y1), v in zip(objects, values or [255]*len(objects)): arr[y0:y1 + 1, x0:x1 + 1] = v
    Image.fromarray(arr).save(path)


def cub(root):
    "CUB-200-2011 and, as val, CUBV2: stored here at a tenth of their size."
    birds = ['001.Black_footed_Albatross', '004.Groove_billed_Ani']
    names = dict(train=['Black_Footed_Albatross_0009_34.jpg', 'Groove_Billed_Ani_0002_1670.jpg'],
                 val=['3218016430.jpg', '7106481.jpg'],
                 test=['Black_Footed_Albatross_0046_18.jpg', 'Groove_Billed_Ani_0005_1750.jpg'])
    for s, files in names.items():
        a, b = (f'{bird}/{file}' for bird, file in zip(birds, files))
        split(root, 'CUB', s, image_ids=[a, b], class_labels=[(a, 0), (b, 3)],
              image_sizes=[(a, 500, 335), (b, 375, 500)],
              localization=[(a, 60, 27, 385, 331), (b, 94, 22, 374, 499)])
        picture(root/'CUB'/a, (50, 34))
        picture(root/'CUB'/b, (38, 50))


def ilsvrc(root):
    """ImageNet: train without sizes and boxes, val is ImageNetV2 in `val2/<class>`, test is ImageNet's val;
    several boxes an image."""
    ids = dict(train=['train/n01440764/n01440764_10026.JPEG', 'train/n01443537/n01443537_10007.JPEG'],
               val=['val2/0/0.jpeg', 'val2/1/0.jpeg'],
               test=['val/ILSVRC2012_val_00000293.JPEG', 'val/ILSVRC2012_val_00000236.JPEG'])
    for s, (a, b) in ids.items():
        sizes = [(a, 40, 30), (b, 40, 30)]
        boxes = [(a, 1, 2, 30, 20), (b, 0, 0, 9, 9), (b, 20, 5, 39, 29)]
        boxed = s != 'train'
        split(root, 'ILSVRC', s, image_ids=[a, b], class_labels=[(a, 0), (b, 1)],
              image_sizes=sizes if boxed else [], localization=boxes if boxed else [])
        for i in (a, b): picture(root/'ILSVRC'/i)
    (root/'metadata/ILSVRC/train/image_ids_proxy.txt').write_text(ids['train'][0])
    mapping = '0/0.jpeg, 0/a31041fd31109279f69ba5827fe508eee00abd75.jpeg'
    (root/'metadata/ILSVRC/val/mapping.txt').write_text(mapping)


def openimages(root):
    "OpenImages30k: a mask file an instance, the ignore file on an image's first row only, no sizes at all."
    for s in ('train', 'val', 'test'):
        a, b = f'{s}/0138tl/d6fc94e452045cd7', f'{s}/014j1m/2fe4f21e409f0a56'
        ids, rows = [f'{a}.jpg', f'{b}.jpg'], []
        for i in ids: picture(root/'OpenImages'/i)
        if s != 'train':
            a0, a1 = f'{a}_m0138tl_685f8420.png', f'{a}_m0138tl_5e9f8cb2.png'
            b0 = f'{b}_m014j1m_a6981698.png'
            objects = {a0: [(0, 0, 9, 9)], a1: [(20, 10, 29, 19)], b0: [(5, 5, 24, 24)],
                       f'{a}_ignore.png': [(5, 0, 14, 9)], f'{b}_ignore.png': []}
            for name, boxes in objects.items(): mask(root/'OpenImages'/name, *boxes)
            rows = [(ids[0], a0, f'{a}_ignore.png'), (ids[0], a1, ''), (ids[1], b0, f'{b}_ignore.png')]
        labels = [(ids[0], 1), (ids[1], 2)]
        split(root, 'OpenImages', s, image_ids=ids, class_labels=labels, image_sizes=[], localization=rows)


def glas(root):
    "GlaS, two folds: bitmaps whose mask holds gland ids 1, 2, …; valpx is a part of valcl; no ignore files."
    folder = 'Warwick_QU_Dataset_(Released_2016_07_08)'
    glands = (0, 0, 19, 51), (40, 10, 69, 29)
    for n in range(1, 11):
        picture(root/f'GLAS/{folder}/train_{n}.bmp', (77, 52))
        mask(root/f'GLAS/{folder}/train_{n}_anno.bmp', *glands, size=(77, 52), values=[1, 17])
    for fold, order in enumerate([(1, 2, 3, 4, 5, 6), (5, 6, 1, 2, 3, 4)]):
        parts = dict(train=order[:2], valcl=order[2:], valpx=order[2:4], test=(7, 8, 9, 10))
        for s, numbers in parts.items():
            ids = [f'{folder}/train_{n}.bmp' for n in numbers]
            split(root, f'GLAS/fold-{fold}', s, end='\n', image_ids=ids,
                  class_labels=[(i, k % 2) for k, i in enumerate(ids)],
                  image_sizes=[(i, 77, 52) for i in ids],
                  localization=[(i, i.replace('.bmp', '_anno.bmp'), '') for i in ids])


def camelyon(root):
    "CAMELYON16's patches of 512 pixels, five folds: tumour with a mask, normal tissue with an empty field."
    base = 'camelyon16/w-512xh-512'
    of_tumour = (base + '/metastatic-patches/training/tumor/tumor_0{0}/Patch_file_training-tumor-tumor_0{0}'
                 '.tif_reg_0_row_0_patch_0_x_13692_y_156099_tissue_0.32_metastatic_0.2_w_512_h_512.png')
    of_normal = (base + '/normal-patches/split_0/fold_0/train/Patch_file_training-normal-normal_0{0}'
                 '.tif_patch_86_x_30208_y_53248_tissue_0.55_w_512_h_512.png')
    tumour = [of_tumour.format(n) for n in range(10, 30)]
    normal = [of_normal.format(n) for n in range(10, 30)]
    mask_of = {i: i.replace('/Patch_', '/mask_') for i in tumour} | {i: '' for i in normal}
    for i, its_mask in mask_of.items():
        picture(root/'CAMELYON512'/i, (64, 64))
        if its_mask: mask(root/'CAMELYON512'/its_mask, (10, 20, 40, 60), size=(64, 64))
    for fold in range(5):
        parts = dict(train=slice(fold, fold + 3), valcl=slice(8, 12), valpx=slice(8, 10), test=slice(14, 18))
        for s, part in parts.items():
            ids = tumour[part] + normal[part]
            split(root, f'CAMELYON512/fold-{fold}', s, end='\n', image_ids=ids,
                  class_labels=[(i, int(mask_of[i] != '')) for i in ids],
                  image_sizes=[(i, 512, 512) for i in ids], localization=[(i, mask_of[i], '') for i in ids])
    (root/'metadata/CAMELYON512/encoding.yaml').write_text('{normal: 0, tumor: 1}\n')


V1, V2 = 'YouTube-Objects-v1.0', 'YouTube-Objects-v2.2'
BAD_HORSE, BAD_BOAT = 'horse/data/0004/shots/055/frame0020.jpg', 'boat/data/0006/shots/026/frame0001.jpg'


def youtube1(root):
    """YouTube-Objects v1.0: shots to train on; frames with hand-drawn boxes, in fractions of a pixel, a
    little over the border."""
    shots = {'aeroplane/data/0013/shots/330': 0, 'train/data/0014/shots/010': 9,
             'boat/data/0015/shots/046': 2, 'boat/data/0015/shots/047': 2, 'horse/data/0026/shots/016': 7}
    for shot in shots:
        for n in (1, 2, 21): picture(root/V1/shot/f'frame{n:04d}.jpg', (64, 36))
    # the originals' boxes lie among the frames
    (root/V1/'boat/data/0015/shots/046/frame0001.jpg_sticks.mat').write_bytes(b'')
    split(root, V1, 'train', end='\n', image_ids=list(shots), class_labels=list(shots.items()))
    videos(root, V1, 'val', [
        (BAD_BOAT, 2, (0.0, 8.057603686635957, 1279, 468.14976958525347)),
        (BAD_BOAT, 2, (574.1405529953918, 482.89631336405535, 839.578341013825, 571.3755760368664)),
        ('boat/data/0003/shots/034/frame0001.jpg', 2,
         (323.4493087557604, 0.0, 1281.9746543778801, 715.8917050691244))])
    videos(root, V1, 'test', [
        (BAD_HORSE, 7, (4.923963133640626, 87.68894009216592, 907.4124423963134, 715.8917050691244)),
        ('boat/data/0002/shots/056/frame0001.jpg', 2,
         (34.4170506912443, 276.4447004608295, 948.7027649769585, 527.1359447004609)),
        ('train/data/0002/shots/051/frame0001.jpg', 9,
         (1.974654377880256, 0.0, 1279.0253456221199, 718.8410138248847))])


def youtube2(root):
    "YouTube-Objects v2.2: shots and frames under other names; whole boxes that count from 1."
    shots = {'horse/video-0014/shot-000139': 7, 'cow/video-0006/shot-000034': 5}
    for shot in shots:
        for n in (1139, 1140): picture(root/V2/shot/f'{n:08d}.jpg', (64, 36))
    split(root, V2, 'train', end='\n', image_ids=list(shots), class_labels=list(shots.items()),
          image_sizes=[], localization=[])
    videos(root, V2, 'val', [
        ('cow/video-0001/shot-000003/00004183.jpg', 5, (727, 110, 1120, 418)),
        ('cow/video-0001/shot-000003/00004188.jpg', 5, (1, 1, 1280, 720))])
    videos(root, V2, 'test', [
        ('horse/video-0001/shot-000000/00000007.jpg', 7, (7, 65, 442, 359)),
        ('horse/video-0001/shot-000000/00000007.jpg', 7, (700, 65, 1280, 720))])
    classes = ('{aeroplane: 0, bird: 1, boat: 2, car: 3, cat: 4, cow: 5, dog: 6, horse: 7, motorbike: 8,\n'
               '  train: 9}\n')
    (root/'metadata'/V2/'class_id.yaml').write_text(classes)


def videos(root, dataset, name, rows):
    "A split of annotated frames of 1280x720, stored at a twentieth."
    labels = {i: c for i, c, _ in rows}
    split(root, dataset, name, end='\n', image_ids=list(labels), class_labels=list(labels.items()),
          image_sizes=[(i, 1280, 720) for i in labels], localization=[(i, *b) for i, _, b in rows])
    for i in labels: picture(root/dataset/i, (64, 36))


MAKERS = [cub, ilsvrc, openimages, glas, camelyon, youtube1, youtube2]
DATASETS = ['CUB', 'ILSVRC', 'OpenImages', 'GLAS/fold-1', 'CAMELYON512/fold-4', V1, V2]


@pytest.fixture(scope='module')
def published(tmp_path_factory):
    "All datasets under one root, as a user would have them."
    root = tmp_path_factory.mktemp('published')
    for make in MAKERS: make(root)
    return root


@pytest.fixture
def mine(published, tmp_path):
    "A private root with one dataset, and a way to edit its metadata."
    def copy(dataset):
        top = dataset.split('/')[0]
        shutil.copytree(published/top, tmp_path/top)
        shutil.copytree(published/'metadata'/top, tmp_path/'metadata'/top)
        def edit(where, change):
            f = tmp_path/'metadata'/dataset/where
            f.write_text('\n'.join(change(f.read_text().splitlines())))
        return tmp_path, edit
    return copy


@pytest.fixture
def check(monkeypatch, capsys):
    "What `wsol_data check` prints, through its own entry point."
    def said(root, dataset, *options, code=0):
        monkeypatch.setattr(sys, 'argv', ['wsol_data', 'check', str(root), '--dataset', dataset, *options])
        if not code:
            main()
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as e: main()
        return capsys.readouterr().out + ('' if e.value.code == 1 else str(e.value.code))
    return said


def loaders(root, dataset, **kw): return WSOLDataLoaders.from_metadata(root, dataset, num_workers=0, **kw)


def test_all_are_found(published):
    found = datasets_in(published)
    assert found['ILSVRC'] == found[V2] == ['train', 'val', 'test']
    assert found['GLAS/fold-1'] == ['train', 'valcl', 'valpx', 'test']
    assert [d for d in found if d.startswith('CAMELYON')] == [f'CAMELYON512/fold-{i}' for i in range(5)]


SAID = {'CUB': 'test: 2 images, 2 classes, 2 boxes, 0 masks',
        'ILSVRC': 'test: 2 images, 2 classes, 3 boxes, 0 masks',
        'OpenImages': 'test: 2 images, 2 classes, 0 boxes, 3 masks',
        'GLAS/fold-1': 'valpx: 2 images, 2 classes, 0 boxes, 2 masks',
        'CAMELYON512/fold-4': 'test: 8 images, 2 classes, 0 boxes, 4 masks, 4 images without foreground',
        V1: 'train: 15 images, 4 classes, 0 boxes, 0 masks, 5 shots, 4 videos',
        V2: 'test: 1 images, 1 classes, 2 boxes, 0 masks, 1 shots, 1 videos'}


@pytest.mark.parametrize('dataset', DATASETS)
def test_check_finds_nothing(published, dataset, check):
    out = check(published, dataset)
    assert SAID[dataset] in out and out.endswith('no problem found\n')
    assert ('note: ' in out) == dataset.startswith('YouTube')


@pytest.mark.parametrize('dataset', DATASETS)
def test_loaders_and_the_door_to_annotations(published, dataset):
    splits = datasets_in(published)[dataset]
    dls = loaders(published, dataset, size=32, bs=2, valid='valcl' if 'valcl' in splits else 'val')
    assert not {'boxes', 'mask'} & set(dls.train_ds.df) and len(dls.one_batch()) == 2
    for s in splits[1:]:
        part = dls.localizable(s)
        batch = next(iter(part))
        assert batch.x.shape[1:] == (3, 32, 32)
        for row, boxes in zip(batch.rows, batch.boxes):
            masked = part.df['mask'][row] != ()
            assert (len(boxes) > 0) != masked
            assert ((0 <= boxes) & (boxes < 32)).all() and (boxes[:, :2] <= boxes[:, 2:]).all()
            if not masked: continue
            found = part.mask(row)
            assert set(np.unique(found)) <= {0, 1, 255} and found.shape == (32, 32)


def test_cub(published):
    df = read_metadata(published, 'CUB')
    assert list(df.label.unique()) == [0, 3]
    assert list(df.class_name.unique()) == ['001.Black_footed_Albatross', '004.Groove_billed_Ani']
    dls = loaders(published, 'CUB', size=224)
    assert dls.class_ids.tolist() == [0, 3]
    box = [60*224//500, 27*224//335, 385*224//500, 331*224//335]
    assert dls.localizable('test').boxes[0].tolist() == [box]


def test_ilsvrc(published):
    df = read_metadata(published, 'ILSVRC')
    train, val = df[df.split == 'train'], df[df.split == 'val']
    assert (train.width == 0).all() and train.boxes.map(len).eq(0).all()
    assert list(val.boxes.map(len)) == [1, 2] and Path(df.path[2]).parts[-3:] == ('val2', '0', '0.jpeg')
    names = ['n01440764', 'n01443537']
    assert list(df.class_name[:2]) == names and list(df.class_name[-2:]) == names


def test_openimages(published):
    df = read_metadata(published, 'OpenImages').set_index('image_id')
    r = df.loc['val/0138tl/d6fc94e452045cd7.jpg']
    assert len(r['mask']) == 2 and r.ignore.endswith('_ignore.png') and r.width == 0
    assert df['mask'].iloc[0] == ()
    m = read_mask(r['mask'], r.ignore)
    # two objects of 100; half of the ignored hundred is foreground
    assert [(m == v).sum() for v in (1, 255)] == [200, 50]


def test_glas(published):
    a, b = (read_metadata(published, f'GLAS/fold-{k}') for k in (0, 1))
    ids = lambda df, split: set(df.image_id[df.split == split])
    assert ids(a, 'valpx') < ids(a, 'valcl') and ids(a, 'train') != ids(b, 'train')
    assert read_mask(a['mask'][0]).sum() == 20*52 + 30*20 # gland ids 1 and 17 are both foreground
    assert (a.path.map(lambda p: Path(p).relative_to(published).parts[0]) == 'GLAS').all()


def test_camelyon(published):
    folds = [read_metadata(published, f'CAMELYON512/fold-{k}') for k in range(5)]
    assert len({tuple(f.image_id[f.split == 'train']) for f in folds}) == 5
    df = folds[0]
    assert list(df.class_name.unique()) == ['tumor', 'normal']
    normal, tumor = (df['mask'][df.label == k] for k in (0, 1))
    assert (normal == ('',)).all() and tumor.map(lambda m: m[0].endswith('.png')).all()
    assert read_mask(normal.iloc[0], size=(224, 224)).sum() == 0


def test_negatives_by_class(mine):
    "The same patches where normal tissue has no row at all."
    dataset = 'CAMELYON512/fold-0'
    root, edit = mine(dataset)
    for s in ('train', 'valcl', 'valpx', 'test'):
        edit(f'{s}/localization.txt', lambda ls: [l for l in ls if not l.endswith(',,')])
    unknown, known = read_metadata(root, dataset), read_metadata(root, dataset, negative=0)
    assert (unknown['mask'][unknown.label == 0] == ()).all()
    assert (known['mask'][known.label == 0] == ('',)).all()
    dls = loaders(root, dataset, size=32, valid='valcl', negative=[0])
    assert dls.localizable('test').mask(7).sum() == 0 and dls.info.source['negative'] == [0]
    assert loaders(root, dataset, size=32, valid='valcl').localizable('test').mask(7) is None


def test_youtube_v1(published, capsys):
    df = read_metadata(published, V1)
    train, test = df[df.split == 'train'], df[df.split == 'test']
    assert train['shot'].nunique() == 5 and list(train.frame[:3]) == [1, 2, 21]
    assert list(train.video[6:12].unique()) == ['boat/data/0015']
    assert train.class_name[6] == 'boat' and list(train.label.unique()) == [0, 9, 2, 7]
    first = test.iloc[0]
    assert first.boxes.dtype == np.float64 and first.boxes[0, 0] == 4.923963133640626
    assert first['shot'] == 'horse/data/0004/shots/055'
    note = ('val: boxes reach over the border by up to 3 pixels in 1 of 2 images and are cut there, '
            "'boat/data/0003/shots/034/frame0001.jpg' first")
    assert df.attrs['notes'] == [note]
    dls = loaders(published, V1, size=224)
    assert 'YouTube-Objects-v1.0 val: boxes reach over the border' in capsys.readouterr().out
    # as the field scores them: scaled with their fractions, then truncated; whole pixels give 5, 85, 165, 163
    boxes = dls.localizable('test').boxes[1]
    assert boxes.tolist() == [[6, 86, 166, 163]] and boxes.dtype == np.int64


def swapped(start):
    "An edit: the first and the third number of a box change places, in lines that begin so."
    swap = lambda l: ','.join(np.array(l.split(','))[[0, 3, 2, 1, 4]])
    return lambda ls: [swap(l) if l.startswith(start) else l for l in ls]


def replaced(a, b, only=''): return lambda ls: [l.replace(a, b) if only in l else l for l in ls]


def dropped(text): return lambda ls: [l for l in ls if text not in l]


def added(*rows): return lambda ls: ls + list(rows)


def test_youtube_v1_bad_records(mine):
    """The two bad records of the original ground truth are put right by name; the same faults elsewhere are
    faults."""
    root, edit = mine(V1)
    before = read_metadata(root, V1)
    edit('test/localization.txt', swapped(BAD_HORSE))
    edit('val/localization.txt', replaced(',1279,', ',1391.5,'))
    df = read_metadata(root, V1)
    assert all(map(np.array_equal, df.boxes, before.boxes)) and not len(check_manifest(df, images=False))
    horse, boat = (next(n for n in df.attrs['notes'] if i in n) for i in (BAD_HORSE, BAD_BOAT))
    assert 'test: horse' in horse and 'known bad record' in horse and '[907.4' in horse and '1391.5' in boat
    edit('test/localization.txt', swapped('train/'))
    edit('val/localization.txt', replaced('1281.97', '1391.97'))
    faults = check_manifest(read_metadata(root, V1), images=False)
    assert list(faults.image_id) == ['boat/data/0003/shots/034/frame0001.jpg',
                                     'train/data/0002/shots/051/frame0001.jpg']
    assert 'lies outside its image of 1280x720' in faults.problem[0] and 'is reversed' in faults.problem[1]


def test_youtube_v2(published):
    df = read_metadata(published, V2)
    test, last = df[df.split == 'test'], df.iloc[-1]
    assert test.boxes.iloc[0].tolist() == [[7, 65, 442, 359], [700, 65, 1279, 719]]
    assert df.boxes.map(lambda b: b.dtype == np.int64).all()
    assert list(df.class_name[df.split == 'val'].unique()) == ['cow']
    assert last.video == 'horse/video-0001' and last.frame == 7
    note = df.attrs['notes'][0]
    assert note.startswith('val: boxes reach over the border by up to 1 pixels in 1 of 2 images')
    strict = check_manifest(read_metadata(published, V2, reach=0), images=False)
    assert len(strict) == 2 and strict.problem.str.contains('lies outside').all()


def again(text, fields):
    "An edit: one more row of the image of the line that holds this text."
    return lambda ls: [*ls, next(l.split(',')[0] + fields for l in ls if text in l)]


TUMOUR, NORMAL = 'tumor_024', 'normal_024' # of the test split
FAULTS = [
    ('CUB', 'test/localization.txt', replaced('385', '500', '_0046'),
     'test 001.Black_footed_Albatross/Black_Footed_Albatross_0046_18.jpg: box [60, 27, 500, 331] lies '
     'outside its image of 500x335'),
    ('CUB', 'val/localization.txt', replaced('60,27,385', '60,x,385'),
     "val/localization.txt line 1: expected numbers, got '60,x,385,331'"),
    ('CUB', 'val/localization.txt', replaced('60,27,385', '60,nan,385'),
     "val/localization.txt line 1: expected numbers, got '60,nan,385,331'"),
    ('CUB', 'val/image_sizes.txt', replaced('335', '33.5'),
     "val/image_sizes.txt line 1: expected whole numbers, got '500,33.5'"),
    ('ILSVRC', 'val/class_labels.txt', dropped('val2/1/'),
     "val/class_labels.txt: no label for 'val2/1/0.jpeg'"),
    ('ILSVRC', 'test/image_sizes.txt', lambda ls: [],
     'test val/ILSVRC2012_val_00000293.JPEG: has boxes, but the size of the original image is not known'),
    ('ILSVRC', 'val/localization.txt', added('val2/2/0.jpeg,1,2,3,4'),
     "val/localization.txt line 4: 'val2/2/0.jpeg' is not in image_ids.txt"),
    ('OpenImages', 'val/localization.txt', replaced('_ignore', '_lost', 'val/014j1m'),
     'val/014j1m/2fe4f21e409f0a56_lost.png: no such file'),
    ('OpenImages', 'val/localization.txt', replaced('5e9f8cb2.png,', '5e9f8cb2.png,other.png'),
     "val/localization.txt line 1: 'val/0138tl/d6fc94e452045cd7.jpg' has several ignore files"),
    ('OpenImages', 'val/localization.txt', replaced(',val/0138tl/d6fc94e452045cd7_ignore.png', ''),
     'val/localization.txt line 1: expected 5 or 3 fields, got 2'),
    ('GLAS/fold-1', 'valpx/localization.txt', replaced('_anno', '_mask'), '_mask.bmp: no such file'),
    ('GLAS/fold-1', 'test/image_ids.txt', added('Warwick_QU_Dataset_(Released_2016_07_08)/train_1.bmp'),
     "is in 'valcl' too: the test would not be honest"),
    ('CAMELYON512/fold-4', 'test/localization.txt', again(TUMOUR, ',,'),
     'has a row without a mask beside 1 other'),
    ('CAMELYON512/fold-4', 'test/localization.txt', again(NORMAL, ',1,1,9,9'),
     'has boxes, but an empty mask says that it has no foreground'),
    (V1, 'train/image_ids.txt', replaced('/010', '/011'),
     "train/image_ids.txt line 2: 'train/data/0014/shots/011' has no suffix, so it is a shot, but"),
    (V1, 'val/localization.txt', replaced('1281.97', '1288.97'),
     'val boat/data/0003/shots/034/frame0001.jpg: box [323.'),
    (V2, 'val/localization.txt', replaced('1280', '1282'),
     'val cow/video-0001/shot-000003/00004188.jpg: box [1, 1, 1282, 719] lies outside its image of 1280x720'),
    (V2, 'train/class_labels.txt', dropped('cow'),
     "train/class_labels.txt: no label for 'cow/video-0006/shot-000034'"),
]
NAMES = [f'{dataset.split("/")[0]}-{i}' for i, (dataset, *_) in enumerate(FAULTS)]


@pytest.mark.parametrize('dataset, where, change, message', FAULTS, ids=NAMES)
def test_faults_are_named(mine, dataset, where, change, message, check):
    root, edit = mine(dataset)
    edit(where, change)
    assert message in check(root, dataset, code=1)


def test_masks_are_judged_against_the_stored_image(mine, check):
    dataset = 'CAMELYON512/fold-4'
    root, _ = mine(dataset) # 64x64 copies of 512x512 patches: sound
    f = next((root/'CAMELYON512').rglob(f'mask_*{TUMOUR}*.png'))
    mask(f, (10, 10, 20, 20), size=(512, 512))
    assert f'mask {f} has 512x512 pixels, the stored image 64x64' in check(root, dataset, code=1)
    f.write_bytes(f.read_bytes()[:60])
    assert f'{f}: cannot be read as an image' in check(root, dataset, code=1)


def test_options_of_check(published, check):
    for negative, code, message in (('0,1', 1, 'is of a negative class, but has a mask'),
                                    ('0', 0, 'no problem found'),
                                    ('5', 1, 'negative: no image has class 5'),
                                    ('normal', 1, "negative='normal': expected class ids")):
        assert message in check(published, 'CAMELYON512/fold-4', '--negative', negative, code=code)
    assert check(published, V2, '--reach', '0', code=1).endswith('2 problems\n')


def test_unannotated_images_are_counted(mine, check):
    root, edit = mine('CAMELYON512/fold-0')
    edit('test/localization.txt', dropped(NORMAL))
    counts = '8 images, 2 classes, 0 boxes, 4 masks, 3 images without foreground, 1 not annotated'
    assert f'test: {counts}' in check(root, 'CAMELYON512/fold-0')


def test_real_cub(real_data):
    df = read_metadata(real_data, 'CUB')
    assert df.groupby('split').size().to_dict() == dict(train=500, val=100, test=585)
    assert df.label.nunique() == 20 and df.label.max() > 19
    assert df.boxes.map(len).eq(1).all() and not df.attrs['notes']
    assert not len(check_manifest(df, images=False))
    batch = next(iter(loaders(real_data, 'CUB', bs=4).localizable('test')))
    assert all(((0 <= b) & (b < 224)).all() for b in batch.boxes)


def test_real_glas(real_data):
    df = read_metadata(real_data, 'GLAS/fold-0')
    assert df.groupby('split').size().to_dict() == dict(train=67, valcl=18, valpx=6, test=80)
    assert set(df.image_id[df.split == 'valpx']) < set(df.image_id[df.split == 'valcl'])
    assert labels_of(df).map(len).eq(1).all() and not len(check_manifest(df[df.split == 'valpx']))
    part = loaders(real_data, 'GLAS/fold-0', bs=4, valid='valcl').localizable('valpx')
    assert len(part) == 6 and all(.1 < part.mask(i).mean() < .9 for i in range(6))
