"""Damage metadata files and folders of pictures at random, and let `wsol_data check` look at each.

    python tools/fuzz.py [N] [--seed S]      N cases, default 10000; exit status 1 where one is not right

Right is a sentence each time: never another error than the two that the commands turn into one, and never
"no problem found" without a warning where the damage broke the structure.
"""
import argparse
import io
import random
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path

from PIL import Image

SPLITS, CLASSES, N = ('train', 'val', 'test'), ('owl', 'jay'), 6 # images of a split


def sound_metadata(root):
    "A small dataset in the layout of the field, with nothing wrong."
    for k, split in enumerate(SPLITS):
        ids = [f'{CLASSES[i % 2]}/{split}{i}.png' for i in range(N)]
        for i, name in enumerate(ids): picture(root/'SET'/name, 10*k + i)
        meta = root/'metadata/SET'/split
        meta.mkdir(parents=True)
        lines = dict(image_ids='{0}', class_labels='{0},{1}', image_sizes='{0},50,34',
                     localization='{0},3,4,20,30')
        for file, form in lines.items():
            text = [form.format(n, i % 2) + '\n' for i, n in enumerate(ids)]
            (meta/f'{file}.txt').write_text(''.join(text))


def sound_folder(root):
    "The same as folders of splits and classes."
    for k, split in enumerate(SPLITS):
        for i in range(N): picture(root/split/CLASSES[i % 2]/f'{i}.png', 10*k + i)


def picture(file, grey):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new('L', (50, 34), grey).save(file)


# damages: each takes the root and a Random, and says whether the structure is broken by it

def a_file(root, rng, names=('image_ids', 'class_labels', 'image_sizes', 'localization')):
    return root/'metadata/SET'/rng.choice(SPLITS)/f'{rng.choice(names)}.txt'


def edit(file, change):
    lines = file.read_text().splitlines()
    file.write_text('\n'.join(change(lines)) + '\n')


def on_a_line(change, names=('class_labels', 'image_sizes', 'localization'), broken=True):
    "A damage of one line's fields."
    def damage(root, rng):
        file = a_file(root, rng, names)
        def changed(lines):
            i = rng.randrange(len(lines))
            lines[i] = ','.join(change(lines[i].split(','), rng))
            return lines
        edit(file, changed)
        return broken
    return damage


def junk(fields, rng):
    i = rng.randrange(1, len(fields))
    fields[i] = rng.choice(['x', '', 'nan', '1e999', '--3', '0x1f', '½', '3 4', 'None', '\0'])
    return fields


def other_path(fields, rng): return [rng.choice(['who.png', '../x.png', '/etc/x.png', '']), *fields[1:]]
def short(fields, rng): return fields[:-1]
def long(fields, rng): return [*fields, '7', '7', '7'][:len(fields) + rng.randint(1, 3)]
def outside(fields, rng): return [fields[0], *rng.choice([('3', '4', '50', '30'), ('-1', '4', '9', '9'),
                                                           ('20', '4', '3', '30'), ('3', '4', '9', '9999')])]


def lost_line(root, rng):
    def changed(lines):
        del lines[rng.randrange(len(lines))]
        return lines
    edit(a_file(root, rng), changed)
    return True


def twice(root, rng):
    def changed(lines): return [*lines, rng.choice(lines)]
    edit(a_file(root, rng, ('image_ids', 'class_labels', 'image_sizes')), changed)
    return True


def lost_file(root, rng):
    a_file(root, rng, ('image_ids', 'class_labels', 'image_sizes')).unlink()
    return True


def bytes_of_chance(root, rng):
    file = a_file(root, rng)
    data = bytearray(file.read_bytes())
    for _ in range(rng.randint(1, 20)): data[rng.randrange(len(data))] = rng.randrange(256)
    file.write_bytes(data)
    return False # a digit may have become another


def not_utf8(root, rng):
    file = a_file(root, rng)
    file.write_bytes(file.read_bytes()[:30] + b'\xff\xfe\x80' + file.read_bytes()[30:])
    return True


def cut_file(root, rng):
    file = a_file(root, rng, ('image_ids', 'class_labels', 'image_sizes'))
    file.write_bytes(file.read_bytes()[:rng.randrange(40)])
    return True


def harmless(root, rng):
    file = a_file(root, rng)
    text = file.read_bytes()
    mark, dos = b'\xef\xbb\xbf' + text, text.replace(b'\n', b'\r\n')
    file.write_bytes(rng.choice([mark, dos, text + b'\n\n', text[:-1]]))
    return False


def a_picture(root, rng): return rng.choice(sorted(root.rglob('*.png')))


def lost_picture(root, rng):
    a_picture(root, rng).unlink()
    return (root/'metadata').is_dir()


def spoilt_picture(root, rng):
    file = a_picture(root, rng)
    data = file.read_bytes()
    file.write_bytes(rng.choice([b'', b'no picture', data[:rng.randrange(8, 45)], data[8:]]))
    return True


def renamed(places, names, broken=True):
    "A damage of a folder's name."
    def damage(root, rng):
        place = root/rng.choice(places)
        place.rename(place.with_name(rng.choice(names)))
        return broken
    return damage


def loose(root, rng):
    split = root/rng.choice(['train', 'val'])
    for file in sorted(split.rglob('*.png')): file.rename(split/f'{file.parent.name}{file.name}')
    return True


def a_stranger(root, rng):
    file = root/rng.choice(['extra/owl/1.png', 'extra/1.png', '1.png', 'train/1.png'])
    picture(file, 99)
    return True


def new_class(root, rng):
    picture(root/rng.choice(['val', 'test'])/'tit/1.png', 98)
    return True


def a_copy(root, rng):
    file = a_picture(root, rng)
    other = rng.choice([f for f in sorted(root.rglob('*.png')) if f.parent != file.parent])
    other.write_bytes(file.read_bytes())
    return True


def a_level_more(root, rng):
    inner = root/'mine'
    inner.mkdir()
    for split in SPLITS: (root/split).rename(inner/split)
    return False


def links(root, rng):
    where = a_picture(root, rng).parent
    kind = rng.choice(['loop', 'gone'])
    (where/('up' if kind == 'loop' else 'gone.png')).symlink_to('..' if kind == 'loop' else 'nowhere.png')
    return kind == 'gone'


IN_METADATA = dict(
    junk=on_a_line(junk), other_path=on_a_line(other_path), short=on_a_line(short), long=on_a_line(long),
    outside=on_a_line(outside, ('localization',)), lost_line=lost_line, twice=twice, lost_file=lost_file,
    bytes_of_chance=bytes_of_chance, not_utf8=not_utf8, cut_file=cut_file, harmless=harmless,
    lost_picture=lost_picture, spoilt_picture=spoilt_picture,
    meta=renamed(['metadata'], ['metadat', 'Metadata', 'meta', 'annotations']),
    split=renamed(['metadata/SET/train'], ['trian', 'Train', 'training']),
    images=renamed(['SET', 'SET/owl'], ['sets', 'Owl']))
IN_FOLDERS = dict(
    lost_picture=lost_picture, spoilt_picture=spoilt_picture, loose=loose, a_stranger=a_stranger,
    new_class=new_class, a_copy=a_copy, a_level_more=a_level_more, links=links,
    split=renamed(['train', 'val'], ['trian', 'stuff']),
    named=renamed(['train'], ['train2017', 'Training', 'seg_train', 'training_set'], broken=False))


def outcome(root):
    "'refused', 'problems', 'warned' or 'nothing' of what check says; all else it raises comes out."
    from wsol_nb.cli.data import wsol_data
    said = io.StringIO()
    try:
        with redirect_stdout(said): problems = wsol_data('check', root)
    except (ValueError, OSError) as e: return 'refused' if str(e) else 'without a word'
    if len(problems): return 'problems'
    return 'warned' if 'warning' in said.getvalue().splitlines()[-1] else 'nothing'


def cases(n, seed=0):
    "(name of the damage, what came of it, whether that is right, what was raised) of `n` cases."
    with tempfile.TemporaryDirectory() as tmp:
        sound = {}
        for make, damages in ((sound_metadata, IN_METADATA), (sound_folder, IN_FOLDERS)):
            make(Path(tmp)/make.__name__)
            sound[make.__name__] = damages
            assert outcome(Path(tmp)/make.__name__) == 'nothing'
        for i in range(n):
            rng = random.Random(f'{seed}/{i}')
            kind = rng.choice(list(sound))
            name = rng.choice(list(sound[kind]))
            root = shutil.copytree(Path(tmp)/kind, Path(tmp)/'case', symlinks=True)
            broken = sound[kind][name](root, rng)
            try: came, error = outcome(root), ''
            except Exception: came, error = 'traceback', traceback.format_exc()
            shutil.rmtree(root)
            right = came not in ('traceback', 'without a word') and not (broken and came == 'nothing')
            yield f'{kind[6:]} {name}', f'{i}', came, right, error


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('n', nargs='?', type=int, default=10_000)
    parser.add_argument('--seed', type=int, default=0)
    given, came, wrong = parser.parse_args(), Counter(), []
    for name, i, what, right, error in cases(given.n, given.seed):
        came[name, what] += 1
        if not right: wrong.append(f'case {i}, {name}: {what}\n{error}')
    for (name, what), n in sorted(came.items()): print(f'{name:28} {what:12} {n}')
    print(f'{given.n} cases, {len(wrong)} wrong')
    for said in wrong[:5]: print(said)
    sys.exit(bool(wrong))


if __name__ == '__main__': main()
