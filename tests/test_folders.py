"""Any folder of pictures: pixels of every depth and form, flags that turn them, folders at the wrong level,
files that no reader takes. Each is understood, or refused with a sentence."""
import struct

import numpy as np
import pytest
from helpers import raises
from PIL import Image

from wsol_nb.data.check import check_manifest
from wsol_nb.data.loaders import WSOLDataLoaders
from wsol_nb.data.metadata import read_metadata, write_example
from wsol_nb.images import BadImage, read_image

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
    head, table = b'II*\0' + struct.pack('<I', end), struct.pack('<H', len(tags)) + entries + bytes(4)
    file.write_bytes(head + data + table)


def test_depth_that_a_tiff_says(tmp_path):
    "A dark picture of 12 bits stays dark: its depth stands in the file."
    tiff(tmp_path/'dark.tif', np.full((4, 4), 200), 12)
    assert np.asarray(read_image(tmp_path/'dark.tif')).max() == 200*255//4095


@pytest.mark.parametrize('numbers, said', [
    ([[.5, np.nan]], '1 of 2 NaN'), ([[.5, np.inf]], 'infinite'), ([[-1., 1]], '-1 to 1'), ([[0, 1e6]], '1e+06')])
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
