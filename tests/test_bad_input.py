"Bad input gets an error that names the argument, what came and what was expected."
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import raises
from PIL import Image

from wsol_nb.images import BadImage, read_image
from wsol_nb.data.loaders import WSOLDataLoaders
from wsol_nb.data.stores import MapStore
from wsol_nb.data.check import check_manifest
from wsol_nb.data.formats import folder_manifest
from wsol_nb.data.metadata import read_metadata
from wsol_nb.data.worlds.disk import write_world
from wsol_nb.data.worlds.objects import ObjectsWorld
from wsol_nb.train.learner import wsol_learner
from wsol_nb.train.run import load_run
from wsol_nb.localize.base import HeadMaps
from wsol_nb.scoring.loop import evaluate
from wsol_nb.metrics.boxes import BoxAcc
from wsol_nb.metrics.contours import box_iou, map_boxes
from wsol_nb.nets.model import wsol_model


@pytest.fixture
def copy(world, tmp_path):
    "A private copy of the world, and a way to edit its metadata."
    shutil.copytree(world, tmp_path/'w')
    def edit(split, file, change):
        f = tmp_path/'w/metadata/SYNTH'/split/f'{file}.txt'
        f.write_text('\n'.join(change(f.read_text().splitlines())))
    return tmp_path/'w', edit


def load(root, **kw):
    "Loaders of the world, which must refuse what is wrong with it."
    return WSOLDataLoaders.from_metadata(root, 'SYNTH', **dict(size=64) | kw)


def test_short_row(copy):
    root, edit = copy
    edit('train', 'image_sizes', lambda ls: [ls[0], ls[1].rsplit(',', 1)[0], *ls[2:]])
    raises('train/image_sizes.txt line 2: expected 3 fields, got 2', read_metadata, root, 'SYNTH')


def test_label_missing(copy):
    root, edit = copy
    lost = read_metadata(root, 'SYNTH', 'val').image_id[3]
    edit('val', 'class_labels', lambda ls: [l for l in ls if not l.startswith(lost)])
    raises(f'no label for {lost!r}', read_metadata, root, 'SYNTH')


def test_label_is_no_number(copy):
    root, edit = copy
    edit('val', 'class_labels', lambda ls: [ls[0].rsplit(',', 1)[0] + ',owl', *ls[1:]])
    raises("val/class_labels.txt line 1: expected whole numbers, got 'owl'", read_metadata, root, 'SYNTH')


@pytest.mark.parametrize('box, message', [('5,5,900,20', 'lies outside its image of'),
                                          ('-1,5,9,20', 'lies outside its image of'),
                                          ('50,5,9,20', 'is reversed')])
def test_boxes(copy, box, message):
    root, edit = copy
    edit('test', 'localization', lambda ls: [ls[0].split(',')[0] + ',' + box, *ls[1:]])
    df = read_metadata(root, 'SYNTH')
    found = check_manifest(df, images=False)
    assert len(found) == 1 and message in found.problem[0] and found.image_id[0] in found['where'][0]
    raises(message, WSOLDataLoaders.from_manifest, df, size=64, check=True)


def test_missing_and_truncated_images_are_named_counted_and_skipped(copy, capsys):
    root, _ = copy
    df = read_metadata(root, 'SYNTH')
    train = df[df.split == 'train']
    gone, cut = Path(train.path.iloc[0]), Path(train.path.iloc[5])
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:400])
    raises('2 problems', load, root, check=True)
    raises(cut.name, load, root, check=True)
    dls = load(root, skip_bad=True)
    assert len(dls.train_ds) == len(train) - 2 and set(dls.skipped.path) == {str(gone), str(cut)}
    assert 'skipped 2 of' in capsys.readouterr().out
    unchecked = load(root)
    with pytest.raises(BadImage, match=gone.name): [unchecked.train_ds[i] for i in range(len(train))]


def test_skipped_images_stand_in_the_report(copy):
    root, _ = copy
    df = read_metadata(root, 'SYNTH')
    Path(df[df.split == 'test'].path.iloc[2]).unlink()
    dls = load(root, bs=8, skip_bad=True)
    r = evaluate(HeadMaps(wsol_model('resnet10t', dls.c, stride=16)), dls, 'test', progress=False)
    assert r.n == 15 and r.counts['skipped_images'] == 1 and 'skipped images: 1' in str(r)


def test_empty_split(copy):
    root, edit = copy
    for file in ('image_ids', 'class_labels', 'image_sizes', 'localization', 'masks', 'parts'):
        edit('val', file, lambda ls: [])
    raises("split 'val' of SYNTH is empty", read_metadata, root, 'SYNTH')


def test_split_with_unseen_classes(copy):
    root, edit = copy
    edit('test', 'class_labels', lambda ls: [ls[0].rsplit(',', 1)[0] + ',77', *ls[1:]])
    raises("split 'test' has classes that are not in 'train'", load, root)


def test_duplicate_and_unknown_ids(copy):
    root, edit = copy
    edit('val', 'image_ids', lambda ls: [*ls, ls[0]])
    edit('val', 'localization', lambda ls: [*ls, 'who.jpg,1,2,3,4'])
    raises('stands there 2 times', read_metadata, root, 'SYNTH')
    raises("'who.jpg' is not in image_ids.txt", read_metadata, root, 'SYNTH')


def test_test_images_in_train(world):
    df = read_metadata(world, 'SYNTH')
    leak = df[df.split == 'train'].head(1).assign(split='test')
    problems = check_manifest(pd.concat([df, leak], ignore_index=True), images=False).problem
    assert 'the test would not be honest' in problems.iloc[-1]


def test_boxes_without_sizes(copy):
    root, edit = copy
    edit('test', 'image_sizes', lambda ls: [])
    dls = load(root)
    raises('the size of its original image is not known', dls.localizable, 'test')
    raises('the size of the original image is not known', load, root, check=True)


def test_swapped_sizes(copy):
    root, edit = copy
    edit('test', 'image_sizes', lambda ls: [l.split(',')[0] + ',5000,900' for l in ls])
    assert check_manifest(read_metadata(root, 'SYNTH')).problem.str.contains('has another shape').sum() == 16


def test_folder_with_odd_splits(tmp_path):
    for d in ('Train/a', 'Test/a', 'extra/a'):
        (tmp_path/d).mkdir(parents=True)
        Image.new('RGB', (4, 4)).save(tmp_path/d/'1.jpg')
    raises('Test, Train look like splits, but what is extra beside them?', folder_manifest, tmp_path)
    shutil.rmtree(tmp_path/'extra')
    assert sorted(folder_manifest(tmp_path).split) == ['test', 'train']


def test_a_new_image_moves_no_other(tmp_path):
    (tmp_path/'owl').mkdir()
    for i in range(40): Image.new('RGB', (4, 4)).save(tmp_path/f'owl/{i}.png')
    before = folder_manifest(tmp_path).set_index('image_id').split
    Image.new('RGB', (4, 4)).save(tmp_path/'owl/new.png')
    assert (folder_manifest(tmp_path).set_index('image_id').split[before.index] == before).all()


def test_manifest_columns():
    columns = ['image_id', 'path', 'label', 'class_name', 'split', 'width', 'height', 'boxes']
    raises('mask, ignore missing', check_manifest, pd.DataFrame(columns=columns))


def test_loaders(world):
    raises("dataset='SINTH': not in", WSOLDataLoaders.from_metadata, world, 'SINTH')
    raises("valid='dev': there is no such split", load, world, valid='dev')
    raises('expected 0 < size <= resize', load, world, resize=32)
    raises("split='tests'", load(world).localizable, 'tests')


def test_folder(tmp_path):
    raises('no image', folder_manifest, tmp_path)
    Image.new('RGB', (4, 4)).save(tmp_path/'a.jpg')
    raises('1 images in no class folder, a.jpg first', folder_manifest, tmp_path)
    raises('expected shares with a sum below 1', folder_manifest, tmp_path, valid_pct=.7, test_pct=.4)


def test_images(tmp_path):
    (tmp_path/'text.jpg').write_text('no picture')
    raises('text.jpg: cannot be read as an image', read_image, tmp_path/'text.jpg', error=BadImage)
    raises('no such file', read_image, tmp_path/'none.jpg', error=BadImage)


def test_world():
    raises('part_ratio', ObjectsWorld, part_ratio=2)
    raises('n_classes', ObjectsWorld, n_classes=0)
    raises('object_size', ObjectsWorld, object_size=(.9, .2))


def test_world_is_not_overwritten(world):
    raises('overwrite', write_world, world, n_train=8, n_val=8, n_test=8, progress=False)


def test_models(tmp_path):
    raises("arch='resnet5O': timm has no such model; did you mean resnet50", wsol_model, 'resnet5O', 3)
    torch.save(wsol_model('resnet10t', 3).body.state_dict(), tmp_path/'w.pth')
    raises('the weights do not fit', wsol_model, 'resnet18', 3, pretrained=tmp_path/'w.pth')
    raises('no such file', wsol_model, 'resnet10t', 3, pretrained='nowhere.pth')
    raises('n_classes=0', wsol_model, 'resnet10t', 0)
    class Evil:
        def __reduce__(self): return (Path.touch, (tmp_path/'ran',))
    torch.save({'a': Evil()}, tmp_path/'evil.pth')
    raises('cannot be read as a state dict', wsol_model, 'resnet10t', 3, pretrained=tmp_path/'evil.pth')
    assert not (tmp_path/'ran').exists()


def test_weights_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('WSOL_WEIGHTS', str(tmp_path/'none'))
    raises('expected a folder', wsol_model, 'resnet10t', 3, pretrained=True)
    monkeypatch.setenv('WSOL_WEIGHTS', str(tmp_path))
    for n in 'ab': torch.save(wsol_model('resnet10t', 3).body.state_dict(), tmp_path/f'resnet10t-{n}.pth')
    raises('several files for resnet10t', wsol_model, 'resnet10t', 3, pretrained=True)
    (tmp_path/'resnet10t-b.pth').unlink()
    body = torch.load(tmp_path/'resnet10t-a.pth', weights_only=True)
    model = wsol_model('resnet10t', 3, pretrained=True, verbose=False)
    assert torch.equal(model.body.state_dict()['conv1.0.weight'], body['conv1.0.weight'])


def test_targets(world):
    loc = HeadMaps(wsol_model('resnet10t', 3))
    raises('target: got shape (3,) for a batch of 2 images', loc, torch.rand(2, 3, 64, 64), [0, 1, 2])


def test_maps_and_boxes(tmp_path):
    raises('score_map: 1 of its 4 values are NaN or infinite', map_boxes, [[0, 1], [np.nan, 0]])
    raises('expected shape (H,W), got (1, 2, 2)', map_boxes, np.zeros((1, 2, 2)))
    raises('expected values in [0,1]', map_boxes, [[0, 255]])
    raises('boxes: box 0 is reversed', box_iou, [[3, 3, 1, 4]], [[0, 0, 1, 1]])
    raises('expected shape (n,4)', box_iou, [[3, 3, 1]], [[0, 0, 1, 1]])
    raises('no image was counted', BoxAcc().compute)
    raises('other: counted with deltas=', BoxAcc().merge, BoxAcc(deltas=[.5]))
    (tmp_path/'a.jpg.npy').write_bytes(b'x')
    raises('no stored map', MapStore(tmp_path).load, 'b.jpg')


def test_learner(world, tmp_path):
    dls = load(world)
    raises("expected an instance of Method", wsol_learner, dls, 'resnet10t', method='gap', error=TypeError)
    raises('no run is saved there', load_run, tmp_path)
    many = dls.info.manifest.assign(labels=[(0, 1)]*len(dls.info.manifest))
    several = WSOLDataLoaders.from_manifest(many, size=64)
    assert several.train_ds[0][1].tolist() == [1, 1]
    message = "trains on one class an image (targets='single'), but these data have several"
    raises(message, wsol_learner, several, 'resnet10t')
