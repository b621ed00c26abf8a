"How pixels come to a model: as bytes, exactly in evaluation, decoded small in training where asked for."
import io
import pickle
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import raises, same, same_state
from PIL import Image

from wsol_nb.images import BadImage, read_image
from wsol_nb.data.batches import ByteBatch, MakeFloats, recolour
from wsol_nb.data.dataset import DataInfo, WSOLDataset
from wsol_nb.data.geometry import RECIPES, Geometry, apply_geometry, draw_colours, jitter_colours, to_tensor
from wsol_nb.data.loaders import WSOLDataLoaders
from wsol_nb.data.pixels import crop_pixels, decode_small, reduction
from wsol_nb.data.shards import shard_loaders, write_shards
from wsol_nb.data.stores import LabelStore, MapStore
from wsol_nb.train.checkpoint import Checkpoint, resume
from wsol_nb.train.learner import wsol_learner
from wsol_nb.train.method import GAP
from wsol_nb.train.run import loaders_from_config, run_config
from fastai.callback.core import Callback

LEVEL = 1/255


def smooth(w, h, seed=0):
    "A picture without anything finer than a tenth of its side."
    coarse = np.random.default_rng(seed).integers(0, 256, (10, 10, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((w, h), Image.BICUBIC)


def encoded(img, kind='JPEG', **options):
    file = io.BytesIO()
    img.save(file, kind, **options)
    return file.getvalue()


def rgb(data, need, **kw): return decode_small(data, need, **kw)[0][..., ::-1]


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "A world's layout with JPEGs large enough to be decoded at a half, a quarter and an eighth."
    folder, rows = tmp_path_factory.mktemp('photos'), []
    sides = (70, 60), (200, 150), (300, 280), (640, 520)
    for i, split in enumerate(8*['train'] + 4*['val'] + 4*['test']):
        w, h = sides[i % 4]
        smooth(w, h, i).save(folder/f'{i}.jpg', quality=95)
        file, box = f'{i}.jpg', np.array([[1, 2, 30, 40]])
        row = dict(image_id=file, path=str(folder/file), label=i % 2, class_name='ab'[i % 2], split=split)
        rows.append(row | dict(width=w, height=h, boxes=box, mask=[], ignore=''))
    return pd.DataFrame(rows)


def load(df, **kw):
    options = dict(size=56, resize=64, bs=4, device='cpu') | kw
    return WSOLDataLoaders.from_manifest(df, **options)


def batches(dl, epoch=0):
    dl.set_epoch(epoch)
    return [*dl]


# the bytes of an image

@pytest.mark.parametrize('w', [63, 64, 127, 128, 129, 255, 300, 511, 512, 1025])
@pytest.mark.parametrize('need', [(64, 64), (64, 40), (100, 128)])
def test_draft_is_never_too_small_and_never_needlessly_large(w, need):
    h = round(w*.8)
    data = encoded(smooth(w, h))
    pixels, extent = decode_small(data, need)
    got, f = pixels.shape[1::-1], reduction((w, h), need)
    assert got == tuple(-(-s//f) for s in (w, h)) and extent == (w/f, h/f)
    assert got == (w, h) or (got[0] >= need[0] and got[1] >= need[1])
    assert f == 8 or -(-w//(2*f)) < need[0] or -(-h//(2*f)) < need[1]


@pytest.mark.parametrize('wh', [(64, 64), (100, 75), (301, 200), (40, 50)])
@pytest.mark.parametrize('quality', [30, 95])
def test_in_full_is_what_pil_decodes(wh, quality):
    for sampling in (0, 1, 2):
        data = encoded(smooth(*wh), quality=quality, subsampling=sampling)
        assert np.array_equal(rgb(data, wh), np.asarray(read_image(io.BytesIO(data))))


@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_turns_as_pil_does(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(smooth(90, 60), exif=exif)
    for turn in (False, True):
        pil = np.asarray(read_image(io.BytesIO(data), exif=turn))
        assert np.array_equal(rgb(data, (60, 60), exif=turn), pil)


def test_no_file_is_too_strange(tmp_path):
    "Bytes of a JPEG changed at random are decoded as PIL would, or refused with the file's name."
    rng, data = np.random.default_rng(0), np.frombuffer(encoded(smooth(90, 60)), np.uint8)
    for k in range(60):
        changed = data.copy()
        changed[rng.integers(0, 250, 3)] = rng.integers(0, 256, 3) # in its tables
        file = tmp_path/f'{k}.jpg'
        file.write_bytes(changed.tobytes()[:rng.choice([len(data), 20, 200])])
        try: pixels, extent = decode_small(file, (64, 64))
        except BadImage as e: assert f'{k}.jpg' in str(e)
        else: assert pixels.shape[2] == 3 and pixels.dtype == np.uint8


def test_other_files_and_bad_ones(tmp_path):
    photo = smooth(300, 200)
    alpha = photo.convert('RGBA')
    alpha.putalpha(128)
    others = [encoded(photo, 'PNG'), encoded(alpha, 'PNG'), encoded(photo.convert('L')),
              encoded(photo.convert('CMYK')), encoded(photo, 'PNG')]
    for data in others:
        assert np.array_equal(rgb(data, (20, 20)), np.asarray(read_image(io.BytesIO(data))))
    whole = encoded(photo)
    assert decode_small(whole + bytes(8), (40, 40))[0].shape == (50, 75, 3) # zeros behind its end
    for name, data in {'cut.jpg': whole[:len(whole)//2], 'text.jpg': b'hello', 'empty.jpg': b''}.items():
        (tmp_path/name).write_bytes(data)
        raises(f'{name}: cannot be read', decode_small, tmp_path/name, (20, 20), error=BadImage)
    raises('gone.jpg: no such file', decode_small, tmp_path/'gone.jpg', (20, 20), error=BadImage)


@pytest.mark.parametrize('wh', [(64, 64), (100, 75), (301, 200), (40, 50)])
@pytest.mark.parametrize('resize', [64, 75, (80, 64)])
def test_crop_is_pils_to_a_level(wh, resize):
    photo = smooth(*wh)
    for flips in ((False, False), (True, False), (False, True), (True, True)):
        g = Geometry(5, 3, *flips)
        exact = to_tensor(apply_geometry(photo, 48, resize, g))
        same(crop_pixels(np.array(photo)[..., ::-1], 48, resize, g)/255, exact, 1.01*LEVEL)


@pytest.mark.parametrize('f', [2, 4, 8])
@pytest.mark.parametrize('more', [0, 1, 7])
def test_draft_is_near_and_in_its_place(f, more):
    "Also where the sides are no multiples of what they are divided by."
    data = encoded(smooth(64*f + more, 64*f + more), quality=95)
    pixels, extent = decode_small(data, (64, 64))
    assert (64, 64) <= pixels.shape[:2] <= (64 + 7, 64 + 7)
    g = Geometry(4, 4, False)
    exact = to_tensor(apply_geometry(read_image(io.BytesIO(data)), 56, 64, g))
    off = (crop_pixels(pixels, 56, 64, g, extent)/255 - exact).abs().mean()
    assert off < 2*LEVEL
    squeezed = (crop_pixels(pixels, 56, 64, g)/255 - exact).abs().mean()
    assert squeezed > off or not more % f


# batches

def as_before(ds, i):
    "An item as it was made before bytes travelled: resized, cropped and jittered by PIL, float at once."
    g, info, recipe = ds.geometry(i), ds.info, RECIPES[ds.info.recipe]
    img = recipe.place(read_image(ds.paths[i]), info.size, info.resize, g)
    if g and recipe.jitter:
        rng = np.random.default_rng([info.seed, ds.epoch, i, 1])
        img = jitter_colours(img, rng, recipe.jitter, recipe.hue)
    return torch.from_numpy(np.array(img)).permute(2, 0, 1).float().div_(255)


@pytest.mark.parametrize('recipe', ['photo', 'histology'])
@pytest.mark.parametrize('workers', [0, 2])
def test_exact_loaders_are_floats_of_the_same_pixels(photos, recipe, workers):
    dls = load(photos, recipe=recipe, resize=64, num_workers=workers, fast=False)
    dls.train.set_epoch(2)
    ds, order = dls.train.dataset, dls.train.shuffle_fn(list(range(8)))
    before = torch.stack([as_before(ds, i) for i in order])
    x = torch.cat([b[0] for b in dls.train])
    assert x.dtype == torch.float32 and torch.equal(x, before)


@pytest.mark.parametrize('recipe', ['photo', 'histology'])
def test_evaluation_is_exact_whatever_training_does(photos, recipe):
    slow, fast = (load(photos, recipe=recipe, resize=64, fast=f) for f in (False, True))
    before = torch.stack([as_before(slow.valid.dataset, i) for i in range(4)])
    for dls in (slow, fast):
        assert torch.equal(dls.valid.one_batch()[0], before)
        assert torch.equal(dls.test_dl(dls.valid.dataset.paths, bs=4).one_batch()[0], before)
        truth = dls.localizable('val')
        assert torch.equal(torch.cat([b.x for b in truth]), before)
        assert [b.y.tolist() for b in truth] == [dls.valid.one_batch()[1].tolist()]
    assert any((a[0] != b[0]).any() for a, b in zip(batches(slow.train), batches(fast.train)))


@pytest.mark.parametrize('recipe', ['photo', 'histology'])
def test_fast_is_near_with_the_same_labels_and_order(photos, recipe):
    slow, fast = (batches(load(photos, recipe=recipe, resize=64, fast=f).train, 1) for f in (False, True))
    for a, b in zip(slow, fast, strict=True):
        assert torch.equal(a[1], b[1]) and a[0].shape == b[0].shape and a[0].dtype == b[0].dtype
        assert (a[0] - b[0]).abs().mean() < 3*LEVEL
        assert 0 <= b[0].min() and b[0].max() <= 1


@pytest.mark.parametrize('fast', [False, True])
def test_workers_and_batches_change_nothing(photos, fast):
    for recipe in ('photo', 'histology'):
        options = dict(recipe=recipe, resize=64, fast=fast)
        alone = [load(photos, **options).train, load(photos, bs=2, **options).train]
        shared = load(photos, num_workers=2, **options).train
        for epoch in (0, 3): # the second is told to workers that are not yet there
            x = [torch.cat([b[0] for b in batches(dl, epoch)]) for dl in (*alone, shared)]
            assert all(torch.equal(x[0], other) for other in x[1:])
        following = torch.cat([b[0] for b in shared]) # epoch 4, by counting on
        assert torch.equal(following, torch.cat([b[0] for b in batches(alone[0], 4)]))


@pytest.mark.parametrize('fast', [False, True])
def test_maps_and_labels_go_through_the_same_geometry(photos, fast, tmp_path):
    maps, labels = MapStore(tmp_path/'maps'), LabelStore(tmp_path/'labels')
    for r in photos.itertuples():
        red = np.asarray(read_image(r.path))[..., 0]
        maps.save(r.image_id, red/255)
        labels.save(r.image_id, np.where(red > 128, 1, 255))
    with_maps, with_labels = (load(photos, maps=store, fast=fast).train for store in (maps, labels))
    for x, _, m in batches(with_maps, 1): assert (x[:, 0] - m).abs().mean() < 2.5*LEVEL
    for x, _, m in batches(with_labels, 1):
        assert m.dtype == torch.int64
        wrong = (x[:, 0] > .5) != (m == 1)
        assert wrong.float().mean() < .05 # at the borders, where labels are not mixed


def test_colours_are_pils_without_rounding():
    photo = smooth(48, 48)
    x = to_tensor(photo)[None]
    for seed in range(6):
        colours = torch.tensor([draw_colours(np.random.default_rng(seed))])
        pil = to_tensor(jitter_colours(photo, np.random.default_rng(seed)))
        assert (recolour(x, colours)[0] - pil).abs().mean() < 2.5*LEVEL
    unchanged = torch.tensor([[1., 1., 1., 0.]])
    same(recolour(x, unchanged), x, 1e-6)
    black_and_white = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])
    same(recolour(black_and_white, unchanged.expand(2, -1)), black_and_white)


def test_pinned_only_for_cuda(photos):
    dls = load(photos)
    assert not dls.train.pin_memory
    dls.train.device = 'cuda' # nothing is sent there
    dls.train.before_iter()
    assert dls.train.pin_memory and dls.train.fake_l.pin_memory
    dls.train.device = 'cpu'
    dls.train.before_iter()
    assert not (dls.train.pin_memory or dls.train.fake_l.pin_memory)
    x, *rest = ByteBatch.of([dls.train.dataset.raw(i) for i in range(3)], 'meta').floats()
    assert x.device.type == rest[0].device.type == 'meta'


# settings

def test_who_is_fast(photos, world):
    assert not load(photos).info.fast # device cpu
    assert load(photos, fast=True).info.fast
    cuda = load(photos, device='cuda') # loads nothing
    assert cuda.info.fast and not load(photos, device='cuda', fast=False).info.fast
    dls = WSOLDataLoaders.from_metadata(world, 'SYNTH', size=56, fast=True)
    data = run_config(wsol_learner(dls, 'test_resnet', verbose=False))['data']
    assert data['fast'] is True and loaders_from_config(data).info.fast
    data.pop('fast') # as it was written before there was a choice
    assert not loaders_from_config(data).info.fast


def test_fastai_goes_on(photos, tmp_path):
    from fastai.callback.mixup import CutMix, MixUp
    from fastai.learner import load_learner
    dls = load(photos, fast=True)
    seen = []
    dls.train.new(after_batch=lambda t: seen.append(t.dtype) or t).one_batch()
    assert seen == [torch.float32, torch.int64] # another transform of a batch works on floats
    assert sum(isinstance(f, MakeFloats) for f in dls.new(bs=2).train.after_batch.fs) == 1
    learn = wsol_learner(dls, 'test_resnet', GAP(), localization=False, verbose=False, path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=[MixUp()])
        learn.fit(1, cbs=[CutMix()])
        learn.lr_find(show_plot=False, num_it=12)
    files = photos.path[:2].tolist()
    with learn.no_bar(): preds = learn.get_preds(dl=dls.test_dl(files))[0]
    with learn.no_bar(): name, position, probabilities = learn.predict(files[0])
    same(probabilities, preds[0], 1e-5)
    learn.export(tmp_path/'learner.pkl')
    again = load_learner(tmp_path/'learner.pkl')
    with again.no_bar(): same(again.get_preds(dl=again.dls.test_dl(files))[0], preds, 1e-5)
    assert pickle.loads(pickle.dumps(dls.train.dataset))[0][0].dtype == torch.float32


def test_arrays_and_pictures_in_the_table(photos):
    photos = photos[photos.split == 'train']
    arrays = photos.assign(path=[np.asarray(read_image(p)) for p in photos.path])
    info = dict(size=56, resize=64, fast=True)
    from_files, from_arrays = (WSOLDataset(t, DataInfo(t, **info), train=True) for t in (photos, arrays))
    for i in (0, 4): same(from_arrays[i][0], from_files[i][0]) # 70 by 60, decoded in full


# shards

@pytest.fixture
def webdataset():
    reason = 'webdataset is not installed (wsol_nb[shards])'
    return pytest.importorskip('webdataset', reason=reason)


@pytest.fixture
def shards(webdataset, photos, tmp_path):
    dls = load(photos, fast=True)
    return dls, write_shards(dls.train.dataset.df, tmp_path/'shards', per_shard=3)


def passed_by(dl, epoch):
    "Image -> label of an epoch, each image once."
    seen = [(x.numpy().tobytes(), int(y)) for xs, ys in batches(dl, epoch) for x, y in zip(xs, ys)]
    assert len(seen) == len(set(seen))
    return dict(seen)


@pytest.mark.parametrize('fast', [False, True])
@pytest.mark.parametrize('workers', [0, 2, 5]) # five are more than there are shards
def test_shards_have_the_images_of_files(shards, photos, fast, workers):
    options = dict(fast=fast, bs=2, recipe='histology', resize=64)
    files, parts = load(photos, **options), load(photos, num_workers=workers, **options)
    dls = shard_loaders(parts, shards[1], buffer=4)
    dls.train.drop_last = False
    for epoch in (0, 2):
        assert passed_by(dls.train, epoch) == passed_by(files.train, epoch)
        dls.train.set_epoch(epoch)
        n = len(dls.train) # of this epoch; it hangs on which worker has which shards
        assert len([*dls.train]) == n
    order = [torch.cat([y for _, y in batches(dls.train, epoch)]).tolist() for epoch in (1, 1)]
    assert order[0] == order[1]


def test_shards_train_and_resume(shards, tmp_path):
    dls = shard_loaders(*shards)
    def learner(): return wsol_learner(dls, 'test_resnet', localization=False, verbose=False, path=tmp_path,
                                       cbs=Checkpoint(tmp_path))
    def fit(learn, **kw):
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 1e-2, **kw)
    at_once = learner()
    fit(at_once)
    class Stop(Exception): pass
    class Stopped(Callback):
        def before_epoch(self):
            if self.epoch == 1: raise Stop('here')
    (tmp_path/'checkpoint.pt').unlink()
    with pytest.raises(Stop): fit(learner(), cbs=Stopped())
    again = learner()
    assert resume(again, tmp_path) == 1
    fit(again)
    assert same_state(at_once.model, again.model)


def test_shards_say_what_is_wrong(shards, photos, tmp_path, monkeypatch):
    dls, folder = shards
    raises('a folder without shards', write_shards, dls.train.dataset.df, folder)
    raises('at least one image', write_shards, photos[:0], tmp_path/'none')
    raises('`write_shards` finished', shard_loaders, dls, tmp_path)
    fewer = load(photos.drop(index=0))
    raises("folder='8 images': expected 7", shard_loaders, fewer, folder)
    renamed = photos.assign(image_id=[f'x{i}' for i in range(len(photos))])
    raises('the images of the table', list, shard_loaders(load(renamed), folder).train)
    (tmp_path/'cut.jpg').write_bytes(open(photos.path[0], 'rb').read()[:300])
    broken = photos.assign(path=str(tmp_path/'cut.jpg'))
    rows = broken[broken.split == 'train']
    raises('.jpg in 000000.tar', list, shard_loaders(load(broken), write_shards(rows, tmp_path/'cut')).train,
           error=BadImage)
    monkeypatch.setitem(sys.modules, 'webdataset', None)
    raises('pip install "wsol_nb[shards]"', write_shards, rows, tmp_path/'other', error=ImportError)
