"The commands, as a user runs them: in their own process."
import json
import shutil
import signal
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import BIN, TINY, digest, refused, same_state, start, wait_until, wsol
from PIL import Image


@pytest.fixture(scope='module')
def run(world, tmp_path_factory):
    "A trained and evaluated run."
    out = tmp_path_factory.mktemp('runs')/'run'
    text = wsol('train', '--data', world, '--out', out, '--epochs', 2, *TINY)
    assert 'max_box_acc' in text and 'MaxBoxAccV2' in text
    return out


def test_train_and_eval(run):
    config = json.loads((run/'config.json').read_text())
    assert config['arch'] == 'resnet10t' and config['method']['name'] == 'GAP'
    assert config['train']['epochs'] == 2 and set(config['versions']) >= {'torch', 'wsol_nb', 'commit'}
    assert set(config['hardware']) == {'cpu', 'cores', 'gpu'}
    assert list(pd.read_csv(run/'history.csv').epoch) == [0, 1]
    text = wsol('eval', run, '--split', 'test')
    report = json.loads((run/'report-test.json').read_text())
    boxes = report['boxes']
    assert f"{boxes['max_box_acc_v2']:.1f}" in text
    assert report['n'] == 16 and boxes['tau_source'] == 'oracle'
    page = (run/'report-test.html').read_text()
    assert page.count('data:image/jpeg;base64,') == 3 and 'src="http' not in page
    assert len(pd.read_csv(run/'images-test.csv')) == 16


def test_eval_is_what_training_said(run):
    wsol('eval', run, '--split', 'val', '--out', run/'again')
    files = (run/'report-val.json', run/'again/report-val.json')
    a, b = (json.loads(f.read_text())['boxes'] for f in files)
    assert a == b
    assert pd.read_csv(run/'history.csv').max_box_acc.iloc[-1] == a['max_box_acc']['0.5']['value']


MODES = [('RGB', 'jpg'), ('L', 'png'), ('RGBA', 'png'), ('P', 'png'), ('CMYK', 'jpg'), ('I;16', 'png'),
         ('1', 'png')]


@pytest.mark.parametrize('mode, suffix', MODES)
def test_localize_modes(run, tmp_path, mode, suffix):
    from wsol_nb.cli.localize import wsol_localize
    if mode == 'I;16': # to which no other picture can be converted
        img = Image.fromarray(np.arange(90*200, dtype=np.uint16).reshape(90, 200))
    else:
        noise = np.random.default_rng(0).integers(0, 255, (90, 200, 3), dtype=np.uint8)
        img = Image.fromarray(noise).convert(mode)
    img.save(tmp_path/f'photo.{suffix}')
    found, = wsol_localize(run, tmp_path/f'photo.{suffix}', out=tmp_path)
    x0, y0, x1, y1 = found['box']
    assert 0 <= x0 <= x1 < 200 and 0 <= y0 <= y1 < 90 and 0 <= found['prob'] <= 1
    assert Image.open(tmp_path/'photo-overlay.jpg').size == (200, 90)


def test_localize_size_and_rotation(run, world, tmp_path):
    """A photo enlarged fivefold has a box about five times as large; one turned by EXIF has the box of
    the picture as it is seen."""
    from wsol_nb.cli.localize import wsol_localize
    path = next((world/'SYNTH/test').rglob('*.jpg'))
    img = Image.open(path).convert('RGB')
    img.save(tmp_path/'a.png')
    img.resize((img.width*5, img.height*5), Image.BICUBIC).save(tmp_path/'b.png')
    turned = img.transpose(Image.ROTATE_90)
    exif = turned.getexif()
    exif[0x0112] = 6 # turn clockwise to see it
    turned.save(tmp_path/'c.jpg', exif=exif, quality=98, subsampling=0)
    a, b, c = wsol_localize(run, [tmp_path/'a.png', tmp_path/'b.png', tmp_path/'c.jpg'], out=tmp_path)
    assert np.abs(b['box']/5 - a['box']).max() <= 3
    assert np.abs(c['box'] - a['box']).max() <= 6
    assert Image.open(tmp_path/'c-overlay.jpg').size == img.size
    Image.new('RGB', (1, 1)).save(tmp_path/'dot.png')
    (tmp_path/'dots').mkdir()
    (tmp_path/'dots/linked').symlink_to('nowhere')
    (tmp_path/'dots/dot.png').symlink_to(tmp_path/'dot.png')
    lost, dot = wsol_localize(run, tmp_path/'dots', out=tmp_path/'dot')
    assert lost['problem'] == f'{tmp_path}/dots/linked: is one of the links to nothing'
    assert dot['box'] is None # a single pixel says nothing about where


def test_localize_box_is_tight(run, world, tmp_path):
    "The box is the extent of the largest blob of the map above τ, in the photo's own pixels."
    import cv2
    from wsol_nb.cli.localize import localize_photo
    from wsol_nb.train.run import load_run
    f = localize_photo(load_run(run), next((world/'SYNTH/test').rglob('*.jpg')), tau=.6)
    u = (255*f['score_map'].astype(np.float64)).astype(np.uint8)
    _, _, stats, _ = cv2.connectedComponentsWithStats((u > int(.6*u.max())).astype(np.uint8), connectivity=8)
    x, y, w, h, _ = stats[1:][stats[1:, 4].argmax()]
    assert f['box'].tolist() == [x, y, x + w - 1, y + h - 1]


def test_localize_shell(run, world, tmp_path):
    photo = next((world/'SYNTH/test').rglob('*.jpg'))
    text = wsol('localize', run, photo, photo, '--out', tmp_path)
    assert (tmp_path/f'{photo.stem}-overlay-2.jpg').exists()
    assert 'probability' in text and 'box x' in text and 'val boxes' in text
    assert (tmp_path/f'{photo.stem}-overlay.jpg').exists()
    boxes = pd.read_csv(tmp_path/'boxes.csv')
    assert list(boxes.image) == [str(photo)]*2 and boxes.x1.notna().all()
    said = wsol('localize', run, photo, '--out', tmp_path, code=1)
    assert 'is there already (and 1 more); --overwrite' in said


def test_localize_a_folder_with_bad_photographs(run, world, tmp_path):
    "Every picture below it is done, a bad one is named and counted; what had that name stays as it was."
    album = shutil.copytree(world/'SYNTH/test', tmp_path/'album')
    (album/'torn.jpg').write_bytes(b'not a picture')
    (tmp_path/'mine-overlay.jpg').write_text('mine')
    said = wsol('localize', run, album, tmp_path/'nowhere.jpg', '--out', tmp_path/'out', code=1)
    assert 'torn.jpg: cannot be read as an image' in said and 'nowhere.jpg: no such file' in said
    assert '2 of 18 photos were skipped' in said
    assert len(pd.read_csv(tmp_path/'out/boxes.csv')) == len([*(tmp_path/'out').glob('*.jpg')]) == 16
    Image.new('RGB', (9, 9)).save(tmp_path/'mine.png')
    assert '--overwrite' in wsol('localize', run, tmp_path/'mine.png', '--out', tmp_path, code=1)
    assert (tmp_path/'mine-overlay.jpg').read_text() == 'mine'


@pytest.mark.parametrize('how', [signal.SIGINT, signal.SIGKILL], ids=lambda s: s.name)
def test_interrupted_and_resumed(world, tmp_path, how):
    out, epochs = tmp_path/'run', 6
    p = start(BIN/'wsol_train', '--data', world, '--out', out, '--epochs', epochs, *TINY)
    wait_until((out/'checkpoint.pt').exists, p)
    p.send_signal(how)
    text = p.communicate()[0]
    assert p.returncode != 0 and not (out/'model.safetensors').exists()
    if how == signal.SIGINT: assert 'interrupted' in text and '--resume continues' in text
    done = torch.load(out/'checkpoint.pt', weights_only=True)['epoch'] + 1
    assert 1 <= done < epochs
    said = wsol('train', '--data', world, '--out', out, *TINY, code=1)
    assert 'a run is there already' in said
    text = wsol('train', '--out', out, '--resume')
    assert f'{done} of {epochs} epochs are done' in text
    whole = list(range(epochs))
    assert list(pd.read_csv(out/'history.csv').epoch) == whole and (out/'model.safetensors').exists()
    if how == signal.SIGINT: return
    for f in ('model.safetensors', 'report-val.json'): # killed after the last epoch, before the end
        (out/f).unlink()
    text = wsol('train', '--out', out, '--resume')
    assert f'{epochs} of {epochs} epochs are done' in text and (out/'report-val.json').exists()
    assert list(pd.read_csv(out/'history.csv').epoch) == whole and (out/'model.safetensors').exists()


@pytest.mark.parametrize('select, column', [('loc', 'max_box_acc'), ('cl', 'accuracy')])
def test_selection(world, tmp_path, select, column):
    "B-LOC and B-CL keep the epoch that is best by their column."
    from wsol_nb.train.run import load_run
    run = tmp_path/'run'
    rates = ['--lr', .02, '--lr-head', .2]
    wsol('train', '--data', world, '--out', run, '--epochs', 3, '--select', select, *rates, *TINY)
    history = pd.read_csv(run/'history.csv')
    report = json.loads((run/'report-val.json').read_text())
    v1, top1 = report['boxes']['max_box_acc']['0.5']['value'], report['accuracy']['top1']/100
    assert dict(loc=v1, cl=top1)[select] == pytest.approx(history[column].max(), abs=1e-6)
    best = json.loads((run/'selection.json').read_text())
    value = pytest.approx(history[column].max())
    assert best[select] == dict(epoch=int(history[column].idxmax()), column=column, value=value)
    assert best['last'] == dict(epoch=2)
    assert same_state(load_run(run).model, load_run(run, select=select).model)
    last = load_run(run, select='last').model
    assert same_state(last, torch.load(run/'checkpoint.pt', weights_only=True)['model'])
    text = wsol('eval', run, '--bootstrap', 0)
    for name, key in (('last', 'last'), ('B-LOC', 'loc'), ('B-CL', 'cl')):
        assert f'{name} ({best[key]["epoch"] + 1})' in text
    ledger = json.loads((run/'report-test.json').read_text())['ledger']
    assert ledger[0]['selection'].split()[0] == dict(loc='B-LOC', cl='B-CL')[select] and len(ledger) == 9


def test_folder_without_boxes(world, tmp_path):
    "One's own folder: it trains, it is told that there is nothing to localize against, and it localizes."
    mine, run = tmp_path/'mine', tmp_path/'run'
    for split in ('train', 'val'):
        for d in list((world/'SYNTH'/split).iterdir())[:3]:
            shutil.copytree(d, mine/d.name, dirs_exist_ok=True)
    text = wsol('train', '--data', mine, '--out', run, '--epochs', 1, *TINY)
    assert 'nothing to localize against' in text and 'without localization columns' in text
    text = wsol('eval', run, '--split', 'val')
    assert 'nothing to localize against' in text and 'accuracy' in text and 'MaxBoxAcc' not in text
    assert 'data:image/jpeg' in (run/'report-val.html').read_text()
    assert '0.200, default' in wsol('localize', run, next(mine.rglob('*.jpg')), '--out', tmp_path)
    text = wsol('train', '--data', mine, '--out', tmp_path/'r2', '--select', 'loc', *TINY, code=1)
    assert "split 'val' has no boxes or masks to select by" in text


def test_corrupt_image(world, tmp_path):
    root = tmp_path/'w'
    shutil.copytree(world, root)
    bad = sorted((root/'SYNTH/train').rglob('*.jpg'))[4]
    bad.write_bytes(bad.read_bytes()[:300])
    text = wsol('data', 'check', root, code=1)
    assert bad.name in text and '1 problem' in text
    train = ['train', '--data', root, '--out', tmp_path/'run', '--epochs', 1, *TINY]
    text = wsol(*train, code=1)
    assert bad.name in text and '--skip-bad' in text and 'Traceback' not in text
    text = wsol(*train, '--skip-bad')
    assert 'skipped 1 of 80 images' in text and bad.name in text
    assert json.loads((tmp_path/'run/config.json').read_text())['train']['skipped_images'] == 1


def test_data_commands(tmp_path):
    text = wsol('data', 'synth', tmp_path/'w', '--n-train', 8, '--n-val', 8, '--n-test', 8)
    assert 'train: 8 images, 8 classes, 8 boxes, 8 masks' in text
    assert 'no problem found' in wsol('data', 'check', tmp_path/'w')


def test_data_check_real(real_data):
    text = wsol('data', 'check', real_data, '--dataset', 'CUB')
    assert 'train: 500 images, 20 classes, 500 boxes' in text
    assert 'test: 585 images' in text and 'no problem found' in text
    text = wsol('data', 'check', real_data, '--dataset', 'GLAS/fold-0')
    assert 'train: 67 images, 2 classes, 0 boxes, 67 masks' in text


WORLD = ['--data', '{world}', '--out', '{tmp}/r']


@pytest.mark.parametrize('args, message', [
    (['train', '--data', 'nowhere'], "data='nowhere' is not a folder"),
    (['train', '--data', '.', '--method', 'gab'], "method='gab'"),
    (['eval', 'nowhere'], 'no run is saved there'),
    (['train', *WORLD, '--select', 'best'], "select='best': expected last, loc or cl"),
    (['train', *WORLD, '--size', '64', '--no-check', '--arch', 'resnet5O'], 'did you mean resnet50'),
    (['train', *WORLD, '--params', 'k=3'], "params: GAP has no 'k'"),
    (['train', '--resume', '--out', '{tmp}/none'], 'no run has begun in'),
])
def test_errors(args, message, world, tmp_path, monkeypatch):
    "What the script prints when it ends."
    monkeypatch.chdir(tmp_path)
    line = refused(monkeypatch, args[0], *(a.format(world=world, tmp=tmp_path) for a in args[1:]))
    assert line.startswith(f'wsol_{args[0]}: ') and message in line


def test_demo(tmp_path):
    "The demo's whole path, short; `make demo` runs it in full."
    demo = tmp_path/'demo'
    text = wsol('demo', '--out', demo, '--epochs', 1, '--n-train', 32, '--n-test', 16)
    for line in ('accuracy', 'MaxBoxAcc δ=0.3', 'MaxBoxAcc δ=0.7', 'MaxBoxAccV2', 'Top-1 localization',
                 'object inside the box', 'untrained', 'centre box'):
        assert line in text
    for name in ('', '-fcam', '-untrained'):
        assert json.loads((demo/f'report{name}.json').read_text())['n'] == 16
    assert (demo/'report.html').read_text().count('data:image/jpeg;base64,') == 5


def test_examples_of_the_help_run(tmp_path, monkeypatch, capsys):
    "Each command's help ends with examples; in this order they run in an empty folder as they stand."
    from wsol_nb.cli import data, demo, evaluate, localize, train
    from wsol_nb.cli.command import COMMANDS, main
    monkeypatch.chdir(tmp_path)
    lines = []
    for module in (data, train, evaluate, localize, demo):
        command = COMMANDS[next(k for k in vars(module) if k.startswith('wsol_') and k in COMMANDS)]
        assert len(command.examples) >= 2
        lines += [line for line in command.examples if line != 'wsol_demo'] # make demo runs it, a minute
    for line in lines:
        monkeypatch.setattr(sys, 'argv', line.split())
        main()
    assert 'examples:\n  wsol_train' in wsol('train', '--help')
    assert len(pd.read_csv('localized/boxes.csv')) and len(pd.read_csv('pictures/boxes.csv')) == 16


def test_dry_run_leaves_nothing(world, tmp_path, monkeypatch):
    "It says what was understood and how long it would take; no folder is made, no file is changed."
    monkeypatch.chdir(tmp_path)
    before = digest(world)
    said = wsol('train', '--data', world, '--dry-run', '--epochs', 3, *TINY)
    assert 'train 48, val 16, test 16' in said and '3 epochs of 6 steps of 8 images' in said
    assert 's a step' in said and 'memory' in said
    assert digest(world) == before and not [*tmp_path.iterdir()]
