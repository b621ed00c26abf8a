"""Any folder of pictures: pixels of every depth and form, flags that turn them, folders at the wrong level,
files that no reader takes. Each is understood, or refused with a sentence."""
import os
import struct
import sys

import numpy as np
import pandas as pd
import pytest
from helpers import raises
from helpers import root as root_of_house
from PIL import Image

from wsol_nb.cli.command import parse
from wsol_nb.cli.data import wsol_data
from wsol_nb.data.check import check_manifest
from wsol_nb.data.doubts import doubts
from wsol_nb.data.formats import folder_manifest
from wsol_nb.data.loaders import WSOLDataLoaders
from wsol_nb.data.metadata import read_metadata, write_example
from wsol_nb.images import BadImage, read_image
from wsol_nb.train.run import loaders_from_config

# pixels

RAMP = np.linspace(0, 1, 16).reshape(4, 4)
LEVELS = (RAMP*255).round()


def grey(top, kind):
    "The ramp with a white of `top`."
    return Image.fromarray((RAMP*top if top == 1 else (RAMP*top).round()).astype(kind))


def of(mode, **how): return Image.fromarray(LEVELS.astype(np.uint8)).convert(mode, **how)


def clear(mode):
    "Half of the picture cannot be seen."
    img = of('RGBA')
    img.putalpha(Image.fromarray(np.repeat([[0], [0], [255], [255]], 4, 1).astype(np.uint8)))
    return img.convert(mode)


FORMATS = {
    'grey.png': of('L'), 'rgb.png': of('RGB'), 'palette.png': of('P'), 'bits.gif': of('P'),
    'rgb.bmp': of('RGB'), 'rgb.webp': of('RGB'), 'rgb.jp2': of('RGB'), 'grey.pgm': of('L'),
    'rgb.ppm': of('RGB'), 'cmyk.jpg': of('RGB').convert('CMYK'), 'cmyk.tif': of('RGB').convert('CMYK'),
    'grey.jfif': of('L'), 'rgb.avif': of('RGB'),
    'twelve.png': grey(4095, np.uint16), 'sixteen.png': grey(65535, np.uint16),
    'twelve.tif': grey(4095, np.uint16), 'sixteen.tif': grey(65535, np.uint16),
    'whole.tif': grey(65535, np.int32), 'unit.tif': grey(1, np.float32),
    'bytes.tif': grey(255, np.float32), 'deep.tif': grey(4095, np.float32),
}
EXACT = ('.png', '.gif', '.bmp', '.ppm', '.pgm', '.tif')


@pytest.mark.parametrize('name', FORMATS)
def test_formats(name, tmp_path):
    "A ramp from black to white is one, whatever holds it."
    file, how = tmp_path/name, dict(lossless=True) if name.endswith('webp') else {}
    FORMATS[name].save(file, **({'format': 'JPEG'} if name.endswith('jfif') else how))
    pixels = np.asarray(read_image(file)).astype(int)
    off = np.abs(pixels - LEVELS[..., None]).max()
    assert pixels.shape == (4, 4, 3) and off <= (1 if name.endswith(EXACT) else 12), (off, pixels[..., 0])


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'P'])
def test_what_is_clear_is_white(mode, tmp_path):
    img = clear('RGBA') if mode == 'P' else clear(mode)
    if mode == 'P':
        img = of('P')
        img.info['transparency'] = bytes(0 if i < 128 else 255 for i in range(256))
        img.save(tmp_path/'a.png', transparency=img.info['transparency'])
    else: img.save(tmp_path/'a.png')
    pixels = np.asarray(read_image(tmp_path/'a.png'))[..., 0]
    assert (pixels[0] == 255).all() and np.abs(pixels[3] - LEVELS[3]).max() <= 1


def tiff(file, numbers, bits):
    "A grey TIFF whose tag says how many bits of its 16 count."
    h, w = numbers.shape
    pixels = ''.join(f'{n:0{bits}b}' for row in numbers for n in row)
    data = bytes(int(pixels[i:i + 8].ljust(8, '0'), 2) for i in range(0, len(pixels), 8))
    tags = [(256, w), (257, h), (258, bits), (259, 1), (262, 1), (273, 8), (277, 1), (278, h)]
    tags.append((279, len(data)))
    entries = b''.join(struct.pack('<HHII', tag, 4, 1, value) for tag, value in tags)
    end = 8 + len(data)
    table = struct.pack('<H', len(tags)) + entries + bytes(4)
    file.write_bytes(b'II*\0' + struct.pack('<I', end) + data + table)


def test_depth_that_a_tiff_says(tmp_path):
    "A dark picture of 12 bits stays dark: its depth stands in the file."
    tiff(tmp_path/'dark.tif', np.full((4, 4), 200), 12)
    assert np.asarray(read_image(tmp_path/'dark.tif')).max() == 200*255//4095


@pytest.mark.parametrize('numbers, said', [
    ([[.5, np.nan]], '1 of 2 NaN'), ([[.5, np.inf]], 'infinite'), ([[-1., 1]], '-1 to 1'),
    ([[0, 1e6]], '1e+06')])
def test_numbers_that_are_no_colours(numbers, said, tmp_path):
    "They are refused where they are read, and `check` names them."
    write_example(tmp_path)
    file = tmp_path/'TINY/owl/1.jpg'
    Image.fromarray(np.array(numbers, np.float32)).save(file, format='TIFF')
    raises(said, read_image, file, error=BadImage)
    found = check_manifest(read_metadata(tmp_path, 'TINY')).problem
    assert found.str.contains(said, regex=False).sum() == 1


def test_heic(tmp_path):
    "By the library that is there, or a sentence which to install."
    try: import pillow_heif
    except ImportError: pillow_heif = None
    file = tmp_path/'a.heic'
    if pillow_heif:
        pillow_heif.from_pillow(of('RGB').resize((64, 64))).save(file)
        assert read_image(file).size == (64, 64)
        return
    file.write_bytes(b'\0\0\0\x18ftypheic')
    raises('pip install pillow-heif reads such files', read_image, file, error=BadImage)


# flags

def turned(root, flag, upright):
    "A dataset whose first image is a white box on black, stored so that a flag makes it upright."
    w, h, box = (60, 40, (10, 5, 29, 24))
    write_example(root)
    img = np.zeros((h, w), np.uint8)
    img[box[1]:box[3] + 1, box[0]:box[2] + 1] = 255
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4} # what undoes each turn, as PIL numbers its own
    stored = Image.fromarray(img)
    if flag in back: stored = stored.transpose(back[flag])
    rows, columns = np.nonzero(np.asarray(stored))
    exif = Image.Exif()
    exif[0x0112] = flag
    for image_id in ('owl/1.jpg', 'jay/2.jpg'): stored.save(root/'TINY'/image_id, exif=exif, quality=100)
    size = (w, h) if upright else stored.size
    given = box if upright else (columns.min(), rows.min(), columns.max(), rows.max())
    meta = root/'metadata/TINY/train'
    for file, numbers in (('image_sizes', size), ('localization', given)):
        lines = [f'{i},' + ','.join(map(str, numbers)) for i in ('owl/1.jpg', 'jay/2.jpg')]
        (meta/f'{file}.txt').write_text('\n'.join(lines))
    return root


def box_of(x):
    "The box of what is white in an image (3,H,W)."
    rows, columns = np.nonzero(x[0].numpy() > .5)
    return [columns.min(), rows.min(), columns.max(), rows.max()]


@pytest.mark.parametrize('upright', [False, True])
@pytest.mark.parametrize('exif', [False, True])
@pytest.mark.parametrize('flag', range(1, 9))
def test_flags_turn_pictures_and_boxes_together(flag, exif, upright, tmp_path):
    turned(tmp_path, flag, upright)
    if upright and flag in (2, 3, 4): pytest.skip('a size does not say so')
    problems = check_manifest(read_metadata(tmp_path, 'TINY'), exif=exif).problem
    if flag > 1 and not exif: assert problems.str.contains('EXIF').all() and len(problems) == 2
    else: assert not len(problems), problems.tolist()
    if upright and flag > 4 and not exif: return # `check` refused it
    how = dict(size=120, resize=120, bs=2, valid='train', exif=exif)
    dls = WSOLDataLoaders.from_metadata(tmp_path, 'TINY', **how)
    batch = next(iter(dls.localizable('train')))
    for x, boxes in zip(batch.x, batch.boxes):
        assert np.abs(np.subtract(box_of(x), boxes[0])).max() <= 3


def draw_mask(root, upright):
    "A mask of the white box for the first image of `turned`, in one form or the other."
    from wsol_nb.images import read_image
    box = np.asarray(read_image(root/'TINY/owl/1.jpg', exif=upright).convert('L')) > 128
    Image.fromarray((box*255).astype(np.uint8)).save(root/'TINY/mask.png')
    (root/'metadata/TINY/train/localization.txt').write_text('owl/1.jpg,mask.png,')


@pytest.mark.parametrize('drawn_upright', [False, True])
@pytest.mark.parametrize('flag', range(1, 9))
def test_flags_turn_masks_too(flag, drawn_upright, tmp_path):
    "A mask lies on its object whichever form it was drawn for; where no size tells, it is refused."
    turned(tmp_path, flag, upright=False)
    draw_mask(tmp_path, drawn_upright)
    how = dict(size=120, resize=120, bs=2, valid='train', exif=True)
    if flag in (2, 3, 4):
        raises('does not tell whether', WSOLDataLoaders.from_metadata, tmp_path, 'TINY', **how)
        raises('does not tell whether', WSOLDataLoaders.from_metadata, tmp_path, 'TINY', check=False, **how)
        return
    part = WSOLDataLoaders.from_metadata(tmp_path, 'TINY', **how).localizable('train')
    i = part.df.image_id.tolist().index('owl/1.jpg')
    white = next(iter(part)).x[i][0].numpy() > .5
    assert (white & (part.mask(i) == 1)).sum() > .9*(white | (part.mask(i) == 1)).sum()


def test_exports_without_a_flag(tmp_path):
    "Other programs turn by the flag, away from the boxes: pictures are written anew and counted."
    from wsol_nb.data.exchange import read_any, write_any
    turned(tmp_path/'in', 6, upright=False)
    found = read_any(tmp_path/'in', 'wsol')
    write_any(found, tmp_path/'out', 'voc')
    assert [n for n in found.notes if 'were written anew' in n] == [
        '2 pictures were written anew, without the EXIF flag by which programs would turn them']
    for p in read_any(tmp_path/'out').pictures:
        with Image.open(p.file) as img: pixels, flag = np.asarray(img.convert('L')), img.getexif().get(0x0112)
        assert flag == 1 and p.size == pixels.shape[::-1]
        rows, columns = np.nonzero(pixels > 128)
        seen = columns.min(), rows.min(), columns.max(), rows.max()
        assert np.abs(np.subtract(p.things[0].box, seen)).max() <= 1


# folders

def pictures(root, *names):
    "Small pictures, each another, at these paths."
    for n, name in enumerate(names):
        file = root/name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (8, 8), (n, 2*n, 90)).save(file, format='PNG')
    return root


def some(*folders, n=2): return [f'{folder}/{i}.png' for folder in folders for i in range(n)]


TWO = {'owl', 'jay'}
UNDERSTOOD = {
    'classes': (some('owl', 'jay', n=6), {'train', 'val'}),
    'wrapped': (some('mine/owl', 'mine/jay', n=6), {'train', 'val'}),
    'splits': (some('train/owl', 'train/jay', 'valid/owl', 'test/jay'), {'train', 'val', 'test'}),
    'years': (some('train2017/owl', 'train2017/jay', 'val2017/owl'), {'train', 'val'}),
    'twice': (some('seg_train/seg_train/owl', 'seg_train/seg_train/jay', 'seg_test/seg_test/owl', n=6),
              {'train', 'val', 'test'}),
    'images': (some('train/images/owl', 'train/images/jay', 'val/images/owl'), {'train', 'val'}),
    'class first': (some('owl/train', 'owl/val', 'jay/train', 'jay/val'), {'train', 'val'}),
    'unlabelled': (some('train/owl', 'train/jay', 'val/owl', 'test'), {'train', 'val'}),
    'no val': (some('train/owl', 'train/jay', n=6), {'train', 'val'}),
}


@pytest.mark.parametrize('name', UNDERSTOOD)
def test_levels_of_folders(name, tmp_path, capsys):
    "Each layout has the two classes, and what was understood is printed."
    names, splits = UNDERSTOOD[name]
    df = folder_manifest(pictures(tmp_path, *names))
    assert set(df.class_name) == TWO and set(df.split) == splits
    assert not len(check_manifest(df)) and not doubts(df)
    WSOLDataLoaders.from_folder(tmp_path, size=32, bs=2)
    said = capsys.readouterr().out
    assert '2 classes: ' in said and 'owl' in said and 'jay' in said
    if name == 'unlabelled': assert 'left out: 2 pictures of test/ that have no class folder' in said


REFUSED = {
    'loose in splits': (some('train', 'val'), 'train/ holds 2 images in no class folder'),
    'loose in train': (some('train', 'val/owl'), 'train/ holds 2 images in no class folder'),
    'loose': (['1.png', 'owl/2.png'], '1 images in no class folder'),
    'one class folder': (['1.png', '2.png'], '2 images in no class folder'),
    'several datasets': (some('A/train/owl', 'A/val/owl', 'B/train/owl', 'B/val/owl'), 'several datasets?'),
    'a stranger': (some('train/owl', 'val/owl', 'extra/owl'), 'what is extra beside them?'),
    'only unlabelled': (some('test'), 'no picture lies in a class folder'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_levels_that_are_refused(name, tmp_path):
    "The sentence ends with the layouts that are expected."
    names, said = REFUSED[name]
    pictures(tmp_path, *names)
    with pytest.raises(ValueError) as e: folder_manifest(tmp_path)
    assert said in str(e.value) and '<root>/train/<class>/<image>' in str(e.value)


@pytest.mark.parametrize('folder', ['metadat', 'Metadata', 'meta-data', 'annotations'])
def test_misspelt_metadata(folder, tmp_path):
    write_example(tmp_path)
    (tmp_path/'metadata').rename(tmp_path/folder)
    raises('expected metadata/<DATASET>/<split>/image_ids.txt', folder_manifest, tmp_path)


def test_a_root_one_level_too_deep(tmp_path):
    pictures(tmp_path, *some('train/owl', 'train/jay', 'val/owl'))
    (note,) = folder_manifest(tmp_path/'train').attrs['notes']
    assert 'val beside train are not read' in note
    write_example(tmp_path/'meta')
    notes = folder_manifest(tmp_path/'meta/TINY').attrs['notes']
    assert 'for its boxes name' in notes[0]


def test_doubts(tmp_path, capsys):
    "One class, classes named like splits and equal pictures are warnings; the exit status stays 0."
    wsol_data('check', pictures(tmp_path/'a', *some('owl', n=4)))
    pictures(tmp_path/'b', *some('owl', 'test'))
    same = (tmp_path/'b/owl/0.png').read_bytes()
    for name in ('owl/0.png', 'test/7.png'): (tmp_path/'b'/name).write_bytes(same)
    assert not len(wsol_data('check', tmp_path/'b'))
    pictures(tmp_path/'c', *some('train/owl', 'train/jay', 'test/owl', 'val/jay'))
    (tmp_path/'c/test/owl/9.png').write_bytes((tmp_path/'c/train/owl/0.png').read_bytes())
    wsol_data('check', tmp_path/'c')
    said = capsys.readouterr().out
    for part in ("one class only, 'owl'", 'no problem found, 1 warning', 'classes named like splits: test',
                 '1 pictures are the same in several classes: owl/0.png = test/7.png',
                 'in several splits, so that one tells of the other: test/owl/9.png = train/owl/0.png'):
        assert part in said, said


# files

def test_no_file_is_dropped_without_a_word(tmp_path, monkeypatch):
    "Links are followed, suffixes are of any case, the rest is named and counted."
    far = pictures(tmp_path/'far', '1.png', '2.png')
    root = pictures(tmp_path/'mine', 'owl/1.PNG', 'owl/2.JPEG', 'owl/3.jfif', 'jay/4.avif', 'jay/5.heic')
    (root/'tit').symlink_to(far)
    (root/'owl/again').symlink_to(root/'owl')
    (root/'owl/gone.png').symlink_to('nowhere.png')
    for name in ('owl/._1.PNG', '.DS_Store', 'owl/raw.CR2', 'owl/notes.txt', 'owl/README'):
        (root/name).write_bytes(b'?')
    (root/'shut').mkdir()
    scandir = os.scandir
    def shut(folder):
        if str(folder).endswith('shut'): raise PermissionError(13, 'Permission denied', folder)
        return scandir(folder)
    monkeypatch.setattr(os, 'scandir', shut)
    df = folder_manifest(root)
    assert set(df.class_name) == {'owl', 'jay', 'tit'} and len(df) == 7
    said = '\n'.join(df.attrs['notes'])
    for part in ('1 .cr2, owl/raw.CR2 first', '1 .txt', '1 without a suffix, owl/README', '2 hidden',
                 '1 links that lead back to a folder above, owl/again', '1 links to nothing',
                 '1 folders that cannot be opened, shut'):
        assert f'left out: {part}' in said, said
    problems = check_manifest(df, images=False).problem.tolist()
    assert problems == ['is one of the folders that cannot be opened', 'is one of the links to nothing']


def test_copies_resized_to_one_size(tmp_path):
    "They are said once; a few of another shape stay faults."
    sizes = ''.join(f'owl/{i}.png,{w},{h}\n' for i, (w, h) in enumerate([(500, 340), (300, 400), (640, 480)]))
    names = '\n'.join(some('owl', n=3))
    labels = '\n'.join(f'{n},17' for n in some('owl', n=3))
    write_example(tmp_path, image_ids=names, image_sizes=sizes, class_labels=labels, localization='')
    pictures(tmp_path/'TINY', *some('owl', n=3))
    problems = check_manifest(read_metadata(tmp_path, 'TINY'))
    assert not len(problems) and '3 of 3 images are stored as 8x8' in problems.attrs['notes'][0]
    few = tmp_path/'metadata/TINY/train/image_sizes.txt'
    few.write_text('owl/0.png,500,340\nowl/1.png,80,80\nowl/2.png,9,9')
    problems = check_manifest(read_metadata(tmp_path, 'TINY')).problem
    assert problems.str.contains('another shape').sum() == 1


# divisions

def test_division(tmp_path, capsys):
    "Shares, a seed, a list; what the list does not name is counted."
    root = pictures(tmp_path/'a', *some('owl', 'jay', n=20))
    half = WSOLDataLoaders.from_folder(root, valid_pct=.5, split_seed=1, size=32).info.manifest
    other = WSOLDataLoaders.from_folder(root, valid_pct=.5, split_seed=2, size=32).info.manifest
    assert 10 < (half.split == 'val').sum() < 30 and (half.split != other.split).any()
    lines = [f'{n},{"val" if n.endswith(("1.png", "2.png")) else "train"}' for n in some('owl', 'jay', n=10)]
    (tmp_path/'list.csv').write_text('\n'.join(lines))
    dls = WSOLDataLoaders.from_folder(root, split_list=tmp_path/'list.csv', size=32, bs=4)
    assert dls.info.manifest.split.value_counts().to_dict() == dict(train=16, val=4)
    assert 'left out: 20 pictures that' in capsys.readouterr().out
    again = loaders_from_config(dict(dls.info.source, size=32, bs=4, roles={}))
    assert list(again.info.manifest.split) == list(dls.info.manifest.split)


def test_division_by_options(tmp_path):
    given = parse('wsol_train', ['--valid-pct', '.3', '--seed-split', '7', '--split-list', 'a.csv'])
    assert (given['valid_pct'], given['seed_split'], given['split_list']) == (.3, 7, 'a.csv')


def test_what_is_left_out_is_written(tmp_path, capsys):
    root = pictures(tmp_path/'a', *some('owl', 'jay', n=4))
    (root/'owl/1.png').write_bytes(b'no picture')
    wsol_data('check', root, left_out=tmp_path/'out.csv')
    out = pd.read_csv(tmp_path/'out.csv')
    assert out.image_id.tolist() == ['owl/1.png'] and 'cannot be read' in out.problem[0]
    assert '1 image of 8 would be left out' in capsys.readouterr().out


# damage of every kind

def test_fuzz():
    "A bounded part of `python tools/fuzz.py`: a sentence each time, and no damage that is overlooked."
    sys.path.insert(0, str(root_of_house/'tools'))
    import fuzz
    kinds = set()
    for name, i, came, right, error in fuzz.cases(250, seed=7):
        assert right, f'case {i}, {name}: {came}\n{error}'
        kinds.add((name.split()[0], came))
    assert len(kinds) == 8 # each of the four outcomes, in metadata and in folders
