"""Score maps of other projects: formats, depths, shapes and names are understood and said, or refused in a
sentence; never understood wrongly."""
import json
import pickle
import time
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import raises, wsol
from PIL import Image
from scipy import ndimage as ndi

from wsol_nb.core import minmax
from wsol_nb.data.mapfiles import MAP_SUFFIXES, read_map_file
from wsol_nb.data.metadata import read_metadata
from wsol_nb.data.stores import LabelStore, MapStore, Truth
from wsol_nb.scoring.report import Report
from wsol_nb.scoring.stored import score_maps

SIZE = 64
QUIET = dict(size=SIZE, bootstrap=0, progress=False)


@pytest.fixture(scope='module')
def known(world):
    "The manifest of the small world, and a map for each image of val and test: its blurred mask."
    df, maps, rng = read_metadata(world, 'SYNTH'), {}, np.random.default_rng(3)
    for split in ('val', 'test'):
        truth = Truth(df[df.split == split], SIZE)
        for i, image_id in enumerate(truth.df.image_id):
            noisy = (truth.mask(i) == 1) + rng.random((SIZE, SIZE))
            maps[image_id] = minmax(torch.from_numpy(ndi.gaussian_filter(noisy, 2))).numpy()
    return df, maps


def grey(most, kind): return lambda m: Image.fromarray((m*most).round().astype(kind))


EIGHT, SIXTEEN = grey(255, np.uint8), grey(65535, np.uint16)


def floats(m): return Image.fromarray(m.astype('f4'))


def channels(m): return Image.merge('RGB', [EIGHT(m)]*3)


def img(form, kind=None): return lambda m, file: form(m).save(file, kind)


def npy(change=lambda m: m): return lambda m, file: np.save(file, change(m))


def npz(save=np.savez, **named):
    return lambda m, file: save(file, **{k: m if v is None else v for k, v in named.items()})


def torch_(kind=torch.float32, wrap=lambda t: t):
    return lambda m, file: torch.save(wrap(torch.tensor(m, dtype=kind)), file)


# what writes a map -> (suffix, how, largest error)
WRITERS = {
    'float64': ('.npy', npy(), 0), 'half': ('.npy', npy(lambda m: m.astype('f2')), 5e-4),
    'batch': ('.npy', npy(lambda m: m[None]), 0), 'last': ('.npy', npy(lambda m: m[..., None]), 0),
    'npz': ('.npz', npz(anything=None), 0), 'npz cam': ('.npz', npz(cam=None, label=np.array(3)), 0),
    'savez': ('.npz', npz(arr_0=None), 0), 'packed': ('.npz', npz(np.savez_compressed, arr_0=None), 0),
    'tensor': ('.pt', torch_(), 1e-7), 'pth': ('.pth', torch_(wrap=lambda t: t[None, None]), 1e-7),
    'torch half': ('.pt', torch_(torch.float16), 5e-4), 'bf16': ('.pt', torch_(torch.bfloat16), 4e-3),
    'dict': ('.pt', torch_(wrap=lambda t: dict(cam=t, label=torch.tensor(1))), 1e-7),
    'gradient': ('.pt', torch_(wrap=lambda t: t.requires_grad_()), 1e-7),
    'png': ('.png', img(EIGHT), .002), 'png 16': ('.png', img(SIXTEEN), 1e-5),
    'png grey rgb': ('.png', img(channels), .002), 'tif': ('.tif', img(EIGHT), .002),
    'tif 16': ('.tiff', img(SIXTEEN), 1e-5), 'tif float': ('.tif', img(floats), 1e-7),
    'upper': ('.PNG', img(EIGHT, 'png'), .002)}


@pytest.mark.parametrize('kind', WRITERS)
def test_every_format_is_read(tmp_path, kind):
    suffix, write, tol = WRITERS[kind]
    m = minmax(torch.from_numpy(ndi.gaussian_filter(np.random.default_rng(1).random((20, 30)), 2))).numpy()
    write(m, tmp_path/f'owl_1{suffix}')
    store = MapStore(tmp_path)
    store.match(pd.DataFrame(dict(image_id=['owl/1.jpg'], label=[0])))
    read = store.load('owl/1.jpg')
    assert read.dtype in (np.float32, np.float64) and read.shape == m.shape and abs(read - m).max() <= tol
    if suffix.lower() != suffix: return # found only by looking through the folder
    write(m, tmp_path/f'2{suffix}')
    assert abs(MapStore(tmp_path).load('2.jpg') - m).max() <= tol # without `match`, by its own id


def hot(m): return Image.fromarray(np.stack([m*255, 255 - m*255, m*0], -1).astype(np.uint8))


def see_through(m):
    img = EIGHT(m).convert('LA')
    img.putalpha(128)
    return img


def pages(m, file): EIGHT(m).save(file, save_all=True, append_images=[EIGHT(1 - m)])


LINEAR = torch.nn.Linear(2, 2)
REFUSED = {
    'heatmap': ('.png', img(hot), 'has colours: expected a grey picture of one channel'),
    'palette': ('.png', img(lambda m: hot(m).quantize(32)), 'has colours'),
    'transparent': ('.png', img(see_through), 'is transparent'),
    'pages': ('.tif', pages, 'has 2 pages, expected one map'),
    'irn': ('.npy', npy(lambda m: {3: m}), 'holds a pickled object, such as the dictionary'),
    'irn keys': ('.npy', npy(lambda m: dict(keys=[1], cam=m)), 'np.save(file, maps[label])'),
    'pickle': ('.npy', lambda m, f: f.write_bytes(pickle.dumps({'cam': m})), 'holds a pickled object'),
    'npz object': ('.npz', npz(a=np.array({1: 2}, dtype=object)), 'holds a pickled object'),
    'npz two': ('.npz', npz(a=None, b=None), 'holds 2 arrays (a, b): expected one, or one that is'),
    'npz both': ('.npz', npz(cam=None, map=None), 'holds 2 arrays (cam, map)'),
    'npz none': ('.npz', npz(), 'holds 0 arrays (none)'),
    'object': ('.pt', lambda m, f: torch.save(LINEAR, f), 'holds more than tensors'),
    'numpy in pt': ('.pt', lambda m, f: torch.save(pd.Series(m[0]), f), 'holds more than tensors'),
    'list': ('.pt', torch_(wrap=lambda t: [t, t]), 'holds a list, expected a tensor'),
    'weights': ('.pth', lambda m, f: torch.save(LINEAR.state_dict(), f), 'holds 2 arrays (weight, bias)'),
    'text': ('.npy', npy(lambda m: np.array(['a'])), 'expected numbers, got an array of <U1'),
    'complex': ('.npy', npy(lambda m: m + 1j), 'expected numbers, got an array of complex128'),
    'volume': ('.npy', npy(lambda m: np.stack([m, m])), 'and which class'),
    'nan': ('.pt', torch_(wrap=lambda t: t/0), 'are NaN or infinite'),
    'above': ('.npy', npy(lambda m: m*255), 'expected values in [0,1], got 0 to 255'),
    'below': ('.tif', img(lambda m: floats(m - .5)), 'expected values in [0,1], got -0.5'),
    '32 bits': ('.tif', img(grey(1e6, 'i4')), 'whole numbers of 32 bits')}


@pytest.mark.parametrize('kind', REFUSED)
def test_what_could_be_understood_wrongly_is_refused(tmp_path, kind):
    suffix, write, said = REFUSED[kind]
    m = np.linspace(0, 1, 30).reshape(5, 6)
    write(m, tmp_path/f'1{suffix}')
    with pytest.raises(ValueError) as e: MapStore(tmp_path).load('1.jpg')
    assert said in str(e.value) and str(e.value).startswith('map of 1.jpg: ') and 'Error' not in str(e.value)


@pytest.mark.parametrize('kind', ['float64', 'npz', 'packed', 'tensor', 'png', 'png 16', 'tif', 'tif float'])
def test_cut_and_spoilt_files(tmp_path, kind):
    "A sentence that names image and file at whatever byte a file ends."
    suffix, write, tol = WRITERS[kind]
    m, file, rng = np.random.default_rng(1).random((6, 7)), tmp_path/f'1{suffix}', np.random.default_rng(2)
    write(m, file)
    sound, store = file.read_bytes(), MapStore(tmp_path)
    whole = store.load('1.jpg')
    for n in range(0, len(sound), max(1, len(sound)//60)):
        spoilt = bytearray(sound)
        for _ in range(3): spoilt[rng.integers(len(sound))] = rng.integers(256)
        for damaged in (sound[:n], bytes(spoilt)):
            file.write_bytes(damaged)
            with warnings.catch_warnings():
                warnings.simplefilter('ignore') # of a picture's tags
                try: read = store.load('1.jpg')
                except ValueError as e: assert str(e).startswith('map of 1.jpg: ')
                else: assert damaged is not sound[:n] or read.shape == whole.shape


def test_maps_of_all_classes(known, tmp_path):
    "(C,h,w): the map of the image's class, where C is the number of classes; another C is refused."
    df, maps = known
    names = sorted(df.attrs['names'])
    for r in df[df.split == 'test'].itertuples():
        several = np.stack([maps[r.image_id]*(c == r.label) for c in names])
        np.save(tmp_path/f'{r.image_id.replace("/", "-")}.npy', several)
    one = MapStore(tmp_path/'one')
    for i in df.image_id[df.split == 'test']: one.save(i, maps[i], np.float64)
    for f in (tmp_path/'one').rglob('*.npy'): assert f.is_file()
    (tmp_path/'one').rename(tmp_path.parent/'one')
    alike = [score_maps(s, df, 'test', **QUIET) for s in (tmp_path, tmp_path.parent/'one')]
    assert alike[0].boxes == alike[1].boxes and alike[0].pixels == alike[1].pixels
    np.save(next(tmp_path.glob('*.npy')), np.zeros((len(names) + 1, SIZE, SIZE)))
    raises(f'or ({len(names)},H,W) with a map for each', score_maps, tmp_path, df, 'test', **QUIET)


NAMINGS = {
    'nested, suffix': lambda i: f'{i}.npy', 'nested': lambda i: f'{i.removesuffix(".jpg")}.npy',
    'a_b_c': lambda i: i.replace('/', '_').replace('.jpg', '.npy'),
    'a-b-c': lambda i: i.replace('/', '-').replace('.jpg', '.npy'),
    'a_b_c.jpg': lambda i: i.replace('/', '_') + '.npy',
    'b/c': lambda i: i.split('/', 1)[1].replace('.jpg', '.npy'),
    'b_c': lambda i: '_'.join(i.split('/')[1:]).replace('.jpg', '.npy')}
IDS = [f'test/{c}/{n}.jpg' for c in ('owl', 'jay') for n in range(3)]


def table(ids): return pd.DataFrame(dict(image_id=list(ids), label=0))


def touch(folder, *names):
    for name in names:
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder/name, np.eye(3)) if name.endswith('.npy') else (folder/name).touch()


@pytest.mark.parametrize('naming', NAMINGS)
def test_namings(tmp_path, naming):
    named = {i: NAMINGS[naming](i) for i in IDS}
    touch(tmp_path, *named.values())
    store = MapStore(tmp_path)
    said = store.match(table(IDS))
    found = {i: store.find(i).relative_to(tmp_path).as_posix() for i in IDS}
    assert found == named and not store.matched.stray
    assert bool(said) == (naming != 'nested, suffix')
    assert not said or f'that of {IDS[0]} is {named[IDS[0]]}' in said[0]
    assert store.match(table(IDS)) == [] # it was said


def test_bare_names(tmp_path):
    "`c.npy` is found where one image only can be meant."
    ids = ['a/b/c.jpg', 'a/b/d.jpg', 'x/d.jpg']
    touch(tmp_path, 'c.npy', 'd.npy')
    store = MapStore(tmp_path)
    store.match(table(ids))
    assert store.find('a/b/c.jpg').name == 'c.npy'
    for i in ids[1:]: raises("['a/b/d.jpg', 'x/d.jpg'] have one map file, d.npy", store.find, i)


@pytest.mark.parametrize(('ids', 'files', 'said'), [
    (['a_b/c.jpg', 'a/b_c.jpg'], ['a_b_c.npy'], 'have one map file, a_b_c.npy'),
    (['c.jpg', 'c.png'], ['c.npy'], 'have one map file, c.npy'),
    (['train/1.jpg', 'test/1.jpg'], ['1.npy'], 'have one map file, 1.npy'),
    (['a/c.jpg'], ['a_c.npy', 'a-c.npy'], 'has 2 map files'),
    (['a/c.jpg'], ['a/c.npy', 'a/c.jpg.npy'], 'has 2 map files'),
    (['a/c.jpg'], ['c.npy', 'a_c.npy'], 'has 2 map files'),
    (['a/c.jpg'], ['c.npy', 'c.npz'], 'has 2 map files, c.npy, c.npz; keep one')])
def test_doubts_are_refused(tmp_path, ids, files, said):
    touch(tmp_path, *files)
    store = MapStore(tmp_path)
    store.match(table(ids))
    for i in ids: raises(said, store.find, i)
    raises(said, score_maps, tmp_path, table(ids).assign(split='test'), 'test', **QUIET)


def test_own_names_come_first(tmp_path):
    "A file with an image's own id is no other's; pictures beside arrays are no maps; strangers are named."
    ids = ['c.jpg', 'a/c.jpg']
    touch(tmp_path, 'c.jpg.npy', 'a/c.npy', 'a/c.png', 'overlay.png', '.hidden.npy', 'notes.txt', 'net.pth')
    store = MapStore(tmp_path)
    store.match(table(ids))
    assert [store.find(i).relative_to(tmp_path).as_posix() for i in ids] == ['c.jpg.npy', 'a/c.npy']
    assert store.matched.stray == []
    touch(tmp_path, 'who.npy')
    store.match(table(ids))
    assert [f.name for f in store.matched.stray] == ['who.npy']
    (tmp_path/'a/c.npy').unlink()
    assert store.find('a/c.jpg').name == 'c.png'


def test_a_folder_is_looked_through_once(tmp_path, monkeypatch):
    "Finding a map does not depend on how many there are."
    import os
    ids = [f'{k % 20}/{k}.jpg' for k in range(4000)]
    for i in ids: (tmp_path/f'{i.replace("/", "_")}.npy').touch()
    store, seen, scan = MapStore(tmp_path), [], os.scandir
    monkeypatch.setattr(os, 'scandir', lambda p: (seen.append(p), scan(p))[1])
    start = time.process_time()
    store.match(table(ids))
    assert all(store.find(i) for i in ids)
    assert len(seen) == 1 and time.process_time() - start < 60


def test_links_and_closed_folders(tmp_path):
    touch(tmp_path/'there', 'owl/1.npy')
    (tmp_path/'maps').mkdir()
    (tmp_path/'maps/owl').symlink_to(tmp_path/'there/owl')
    (tmp_path/'maps/jay').symlink_to(tmp_path/'nowhere')
    store = MapStore(tmp_path/'maps')
    said = store.match(table(['owl/1.jpg']))
    assert store.find('owl/1.jpg') and any('jay is one of the links to nothing' in s for s in said)


def test_labels_are_only_npy(tmp_path):
    "A picture of labels would be scaled; it is none of theirs."
    Image.fromarray(np.ones((3, 3), np.uint8)).save(tmp_path/'1.png')
    assert '1.jpg' in MapStore(tmp_path) and '1.jpg' not in LabelStore(tmp_path)


def test_from_the_command_line(world, known, tmp_path):
    "Flat 16-bit pictures, said once, journalled, scored as the arrays are; what is wrong is a sentence."
    df, maps = known
    for i, m in maps.items():
        MapStore(tmp_path/'arrays').save(i, m)
        file = tmp_path/'pictures'/f'{i.replace("/", "_").removesuffix(".jpg")}.png'
        file.parent.mkdir(exist_ok=True)
        SIXTEEN(m).save(file)
    score = ['eval', '--metadata', world, '--size', SIZE, '--bootstrap', 0]
    said = {}
    for k in ('arrays', 'pictures'):
        said[k] = wsol(*score, '--maps', tmp_path/k, '--out', tmp_path/f'{k}-out')
    assert said['pictures'].count('maps in .png: 16 bits, divided by 65535') == 1
    assert said['pictures'].count('32 of 32 maps bear other names than their images: that of') == 1
    assert 'maps in .' not in said['arrays'] and 'other names' not in said['arrays']
    a, b = (Report.load(tmp_path/f'{k}-out/report-test.json') for k in said)
    assert a.boxes['max_box_acc_v2'] == pytest.approx(b.boxes['max_box_acc_v2'], abs=.01)
    assert [r['tau'] for r in b.ledger] == ['oracle', 'val', 'fixed']
    assert [r['name'] for r in b.by_class] == list(df.attrs['names'].values())
    assert 'CorLoc δ=0.5 by class: ' in said['arrays']
    assert all(r['name'] in b._repr_html_() for r in b.by_class)
    older = json.loads((tmp_path/'arrays-out/report-test.json').read_text())
    del older['by_class'] # as reports were before
    (tmp_path/'older.json').write_text(json.dumps(older))
    assert Report.load(tmp_path/'older.json').rows() == a.rows()
    one = next((tmp_path/'pictures').glob('test*.png'))
    hot(np.eye(SIZE)).save(one)
    wrong = wsol(*score, '--maps', tmp_path/'pictures', '--out', tmp_path/'again', code=1)
    assert f'{one} has colours: expected a grey picture' in wrong and 'Traceback' not in wrong
    one.rename(one.with_suffix('.gif'))
    wrong = wsol(*score, '--maps', tmp_path/'pictures', '--out', tmp_path/'again', code=1)
    assert "1 of 16 images of 'test' have no map" in wrong and '1 .gif there were not read' in wrong


def test_exported_as_annotations(world, known, tmp_path):
    df, maps = known
    (tmp_path/'maps').mkdir()
    for i, m in maps.items():
        torch.save(torch.tensor(m), tmp_path/'maps'/f'{i.replace("/", "-")}.pt')
    how = ['--format', 'csv', '--maps', tmp_path/'maps', '--tau', .5]
    said = wsol('data', 'export', world, tmp_path/'out', *how, code=1) # for training images have no map
    assert '32 of 32 maps bear other names' in said and '32 pictures' in said and '48 problems' in said


def test_loaders_take_them_too(world, known, tmp_path):
    "Training items carry maps of other projects."
    from wsol_nb.data.loaders import WSOLDataLoaders
    df, _ = known
    train = df[df.split == 'train']
    for i in train.image_id: Image.new('L', (SIZE, SIZE), 51).save(tmp_path/f'{i.replace("/", "_")}.png')
    dls = WSOLDataLoaders.from_manifest(df, size=SIZE, bs=4, device='cpu', maps=MapStore(tmp_path))
    stored = dls.train.dataset[0][2]
    assert stored.shape[-2:] == (SIZE, SIZE) and stored.min() == stored.max() == np.float32(.2)


def test_the_door_takes_every_suffix(tmp_path):
    for suffix in MAP_SUFFIXES:
        (tmp_path/f'1{suffix}').write_bytes(b'')
        raises(f'owl: {tmp_path}/1{suffix} ', read_map_file, tmp_path/f'1{suffix}', 'owl')
