"The tissue world on disk: reproducible bytes, metadata that anyone can read, negatives known by their label."
import json

import numpy as np
import pytest
import torch
from helpers import digest

from wsol_nb.core import set_seed  # first: lets timm be imported beside a CUDA torchvision
from wsol_nb.data.loaders import WSOLDataLoaders
from wsol_nb.data.check import check_manifest
from wsol_nb.data.metadata import read_metadata
from wsol_nb.data.worlds.base import World
from wsol_nb.data.worlds.disk import write_world
from wsol_nb.data.worlds.objects import ObjectsWorld
from wsol_nb.data.worlds.tissue import TissueWorld
from wsol_nb.train.learner import wsol_learner
from wsol_nb.train.run import loaders_from_config, run_config
from wsol_nb.scoring.loop import evaluate

COUNTS = dict(n_train=12, n_val=6, n_test=9, progress=False)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp('tissue')
    write_world(path, TissueWorld(), **COUNTS)
    return path


@pytest.fixture(scope='module')
def dls(root):
    return WSOLDataLoaders.from_synth(root, TissueWorld(), world_kw=COUNTS, size=64, bs=4, device='cpu')


def test_same_seed_same_bytes(root, tmp_path):
    write_world(tmp_path/'again', TissueWorld(), **COUNTS)
    write_world(tmp_path/'other', TissueWorld(), seed=1, **COUNTS)
    mine, again, other = map(digest, (root, tmp_path/'again', tmp_path/'other'))
    assert len(mine) > 20 and mine == again and mine.keys() == other.keys()
    assert all(mine[f] != other[f] for f in mine if f.endswith('.jpg'))


def test_metadata_of_the_field(root):
    df = read_metadata(root, 'TISSUE')
    assert df.groupby('split').size().to_dict() == dict(train=12, val=6, test=9)
    assert not len(check_manifest(df))
    assert df.attrs['negative'] == [0] and df.boxes.map(len).eq(0).all()
    empty = df['mask'].map(lambda m: m == ('',))
    assert (empty == (df.class_name == 'normal')).all() and empty.sum() == 9
    lines = (root/'metadata/TISSUE/test/localization.txt').read_text().split('\n')
    assert lines[:2] == ['test/normal/0000.jpg,,', 'test/benign/0001.jpg,masks/test/benign/0001.png,']
    assert json.loads((root/'metadata/TISSUE/world.json').read_text())['kind'] == 'tissue'


def test_negatives_are_known_by_their_label(dls, root):
    assert dls.vocab == ['normal', 'benign', 'malignant'] and dls.info.negative == [0]
    x, y = dls.one_batch() # image and label: nothing else reaches training
    assert torch.equal(dls.info.is_negative(y), y == 0)
    df = dls.info.manifest
    known = dls.info.is_negative(torch.as_tensor(dls.info.targets(df))).numpy()
    part = dls.localizable('test')
    assert [not part.mask(i).any() for i in range(len(part))] == known[df.split == 'test'].tolist()
    with pytest.raises(ValueError, match='negative: no image has class 7'):
        WSOLDataLoaders.from_metadata(root, 'TISSUE', size=64, negative=7)
    other = WSOLDataLoaders.from_metadata(root, 'TISSUE', size=64, negative=[])
    assert not other.info.is_negative(y).any()


def test_a_dataset_that_lists_nonsense_says_so(tmp_path):
    write_world(tmp_path, TissueWorld(), **COUNTS)
    file = tmp_path/'metadata/TISSUE/negative_classes.txt'
    file.write_text('normal')
    with pytest.raises(ValueError, match="negative_classes.txt: expected a class id per line, got 'normal'"):
        read_metadata(tmp_path, 'TISSUE')
    file.write_text('1')
    with pytest.raises(ValueError, match='is of a negative class, but has a mask'):
        read_metadata(tmp_path, 'TISSUE')


def test_a_run_remembers_its_negatives(dls):
    learn = wsol_learner(dls, 'test_resnet', stride=8, localization=False, verbose=False)
    data = json.loads(json.dumps(run_config(learn)))['data']
    assert data['negative'] == [0] and loaders_from_config(data).info.negative == [0]


def test_skipped_images_do_not_lose_the_negatives(tmp_path):
    images = write_world(tmp_path, TissueWorld(), **COUNTS)
    (images/'train/benign/0001.jpg').unlink()
    dls = WSOLDataLoaders.from_metadata(tmp_path, 'TISSUE', size=64, bs=4, skip_bad=True)
    assert len(dls.skipped) == 1 and dls.info.negative == [0]


def test_pixel_metrics_by_hand(dls):
    "A random model's maps, scored by the evaluator and here, over all test images, negative ones included."
    set_seed(1)
    learn = wsol_learner(dls, 'test_resnet', stride=8, localization=False, verbose=False)
    loc = learn.localizer()
    report = evaluate(loc, dls, 'test', tau_from=None, bootstrap=0, progress=False)
    part = dls.localizable('test')
    maps = np.concatenate([loc(b.x, b.y).detach().numpy() for b in part])
    masks = np.stack([part.mask(i) for i in range(len(part))])
    assert report.n == 9 and report.boxes is None and masks[0].sum() == 0
    tau = np.arange(0, 1.0005, .001)
    hit = np.array([[(maps[masks == m] >= t).sum() for t in tau] for m in (1, 0)], float)
    precision, recall = hit[0]/np.maximum(hit.sum(0), 1), hit[0]/masks.sum()
    steps = -np.diff(np.r_[recall, 0])
    assert abs(report.pixels['pxap']['value'] - 100*(precision*steps).sum()) < .01
    assert abs(report.pixels['all_ones']['pxap'] - 100*masks.mean()) < 1e-6


def test_worlds_share_their_folder_layout(root, tmp_path):
    "Two worlds and two names below one root; what is no world is refused."
    write_world(tmp_path, ObjectsWorld(), **COUNTS)
    assert write_world(tmp_path, TissueWorld(normal=False), **COUNTS).name == 'TISSUE'
    df = read_metadata(tmp_path, 'TISSUE')
    assert df.attrs['negative'] == [] and df['mask'].map(any).all()
    assert sorted(df.class_name.unique()) == ['benign', 'malignant']
    assert not (tmp_path/'metadata/TISSUE/negative_classes.txt').exists()
    assert read_metadata(tmp_path, 'SYNTH').attrs['negative'] == []
    other = 'TISSUE holds another world .*world.normal: False there, True asked'
    with pytest.raises(ValueError, match=other): write_world(tmp_path, TissueWorld(), **COUNTS)
    with pytest.raises(TypeError, match='world=3: expected a World'): write_world(tmp_path, 3)


@pytest.mark.parametrize('world', [ObjectsWorld(), TissueWorld(), TissueWorld(normal=False)], ids=repr)
def test_every_world_keeps_the_contract(world):
    classes = range(len(world.class_names))
    assert isinstance(world, World) and world.kind and set(world.negative) < set(classes)
    for k in classes:
        s = world.draw(k, np.random.default_rng(0))
        assert s.label == k and s.mask.any() == (k not in world.negative)
        assert s.image.dtype == s.mask.dtype == np.uint8 and s.image.shape == (*s.mask.shape, 3)
        assert len(world.records(s, 'm.png')) == len(world.files)
