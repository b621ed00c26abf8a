"The commands, as a user runs them: in their own process."
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

BIN = Path(sys.executable).parent
TINY = ['--arch', 'resnet10t', '--pretrained', 'false', '--size', '64', '--bs', '8']


def wsol(name, *args, code=0, **kw):
    "Run a command; its output."
    r = subprocess.run([BIN/f'wsol_{name}', *map(str, args)], capture_output=True, text=True, **kw)
    assert r.returncode == code, f'exit {r.returncode}\n{r.stdout[-1500:]}\n{r.stderr[-3000:]}'
    return r.stdout + r.stderr


@pytest.fixture(scope='module')
def run(world, tmp_path_factory):
    "A trained and evaluated run."
    out = tmp_path_factory.mktemp('runs')/'run'
    text = wsol('train', '--data', world, '--out', out, '--epochs', 2, *TINY)
    assert 'max_box_acc' in text and 'MaxBoxAccV2' in text
    return out


def test_train_and_eval(run):
    config = json.loads((run/'config.json').read_text())
    assert config['arch'] == 'resnet10t' and config['method']['name'] == 'GAP' and config['train']['epochs'] == 2
    assert set(config['versions']) >= {'torch', 'wsol_nb', 'commit'} and set(config['hardware']) == {'cpu', 'cores', 'gpu'}
    assert list(pd.read_csv(run/'history.csv').epoch) == [0, 1]
    text = wsol('eval', run, '--split', 'test')
    report = json.loads((run/'report-test.json').read_text())
    assert f"{report['boxes']['max_box_acc_v2']:.1f}" in text and report['n'] == 16 and report['boxes']['tau_source'] == 'oracle'
    page = (run/'report-test.html').read_text()
    assert page.count('data:image/jpeg;base64,') == 3 and 'src="http' not in page
    assert len(pd.read_csv(run/'images-test.csv')) == 16


def test_eval_is_what_training_said(run):
    wsol('eval', run, '--split', 'val', '--out', run/'again')
    a, b = (json.loads((run/f).read_text())['boxes'] for f in ('report-val.json', 'again/report-val.json'))
    assert a == b
    assert pd.read_csv(run/'history.csv').max_box_acc.iloc[-1] == a['max_box_acc']['0.5']['value']


@pytest.mark.parametrize('mode, suffix', [('RGB', 'jpg'), ('L', 'png'), ('RGBA', 'png'), ('P', 'png'), ('CMYK', 'jpg'), ('I;16', 'png'), ('1', 'png')])
def test_localize_modes(run, tmp_path, mode, suffix):
    from wsol_nb.cli.localize import wsol_localize
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 200, 3), dtype=np.uint8))
    img = Image.fromarray(np.arange(90*200, dtype=np.uint16).reshape(90, 200)) if mode == 'I;16' else noise.convert(mode)
    img.save(tmp_path/f'photo.{suffix}')
    found, = wsol_localize(run, tmp_path/f'photo.{suffix}', out=tmp_path)
    x0, y0, x1, y1 = found['box']
    assert 0 <= x0 <= x1 < 200 and 0 <= y0 <= y1 < 90 and 0 <= found['prob'] <= 1
    assert Image.open(tmp_path/'photo-overlay.jpg').size == (200, 90)


def test_localize_size_and_rotation(run, world, tmp_path):
    "A photo enlarged fivefold has a box about five times as large; one turned by EXIF has the box of the picture as it is seen."
    from wsol_nb.cli.localize import wsol_localize
    path = next((world/'SYNTH/test').rglob('*.jpg'))
    img = Image.open(path).convert('RGB')
    img.save(tmp_path/'a.png'); img.resize((img.width*5, img.height*5), Image.BICUBIC).save(tmp_path/'b.png')
    turned = img.transpose(Image.ROTATE_90) # 6 says: turn clockwise to see it
    exif = turned.getexif(); exif[0x0112] = 6
    turned.save(tmp_path/'c.jpg', exif=exif, quality=98, subsampling=0)
    a, b, c = wsol_localize(run, [tmp_path/'a.png', tmp_path/'b.png', tmp_path/'c.jpg'], out=tmp_path)
    assert np.abs(b['box']/5 - a['box']).max() <= 3
    assert np.abs(c['box'] - a['box']).max() <= 6 and Image.open(tmp_path/'c-overlay.jpg').size == img.size
    Image.new('RGB', (1, 1)).save(tmp_path/'dot.png')
    dot, = wsol_localize(run, tmp_path/'dot.png', out=tmp_path)
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
    assert 'probability' in text and 'box x' in text and 'val boxes' in text and (tmp_path/f'{photo.stem}-overlay.jpg').exists()
    assert 'nowhere.jpg: no such image file' in wsol('localize', run, 'nowhere.jpg', '--out', tmp_path, code=1)


def start(world, out, epochs):
    return subprocess.Popen([BIN/'wsol_train', '--data', str(world), '--out', str(out), '--epochs', str(epochs), *TINY],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) # a job in the background may have been told to ignore it


@pytest.mark.parametrize('how', [signal.SIGINT, signal.SIGKILL], ids=lambda s: s.name)
def test_interrupted_and_resumed(world, tmp_path, how):
    out, epochs = tmp_path/'run', 6
    p = start(world, out, epochs)
    while not (out/'checkpoint.pt').exists() and p.poll() is None: time.sleep(.05)
    p.send_signal(how)
    text = p.communicate()[0]
    assert p.returncode != 0 and not (out/'model.safetensors').exists()
    if how == signal.SIGINT: assert 'interrupted' in text and '--resume continues' in text
    done = torch.load(out/'checkpoint.pt', weights_only=True)['epoch'] + 1
    assert 1 <= done < epochs
    assert 'a run is there already' in wsol('train', '--data', world, '--out', out, *TINY, code=1)
    text = wsol('train', '--out', out, '--resume')
    assert f'{done} of {epochs} epochs are done' in text
    assert list(pd.read_csv(out/'history.csv').epoch) == list(range(epochs)) and (out/'model.safetensors').exists()
    if how == signal.SIGINT: return
    for f in ('model.safetensors', 'report-val.json'): (out/f).unlink() # killed after the last epoch, before the end
    text = wsol('train', '--out', out, '--resume')
    assert f'{epochs} of {epochs} epochs are done' in text and (out/'report-val.json').exists()
    assert list(pd.read_csv(out/'history.csv').epoch) == list(range(epochs)) and (out/'model.safetensors').exists()


@pytest.mark.parametrize('select, column', [('loc', 'max_box_acc'), ('cl', 'accuracy')])
def test_selection(world, tmp_path, select, column):
    "B-LOC and B-CL keep the epoch that is best by their column."
    from wsol_nb.train.run import load_run
    wsol('train', '--data', world, '--out', tmp_path/'run', '--epochs', 3, '--select', select, '--lr', .02, '--lr-head', .2, *TINY)
    history = pd.read_csv(tmp_path/'run/history.csv')
    report = json.loads((tmp_path/'run/report-val.json').read_text())
    kept = report['boxes']['max_box_acc']['0.5']['value'] if select == 'loc' else report['accuracy']['top1']/100
    assert kept == pytest.approx(history[column].max(), abs=1e-6)
    best, run = json.loads((tmp_path/'run/selection.json').read_text()), tmp_path/'run'
    assert best[select] == dict(epoch=int(history[column].idxmax()), column=column, value=pytest.approx(history[column].max())) and best['last'] == dict(epoch=2)
    assert all(torch.equal(v, load_run(run, select=select).model.state_dict()[k]) for k, v in load_run(run).model.state_dict().items())
    last = torch.load(run/'checkpoint.pt', weights_only=True)['model']
    assert all(torch.equal(v, last[k]) for k, v in load_run(run, select='last').model.state_dict().items())
    text = wsol('eval', run, '--bootstrap', 0)
    assert all(f'{n} ({best[k]["epoch"] + 1})' in text for n, k in (('last', 'last'), ('B-LOC', 'loc'), ('B-CL', 'cl')))
    report = json.loads((run/'report-test.json').read_text())
    assert [r['selection'].split()[0] for r in report['ledger']][::3][0] == {'loc': 'B-LOC', 'cl': 'B-CL'}[select] and len(report['ledger']) == 9


def test_folder_without_boxes(world, tmp_path):
    "One's own folder: it trains, it is told that there is nothing to localize against, and it localizes."
    for split in ('train', 'val'):
        for d in list((world/'SYNTH'/split).iterdir())[:3]:
            shutil.copytree(d, tmp_path/'mine'/d.name, dirs_exist_ok=True)
    text = wsol('train', '--data', tmp_path/'mine', '--out', tmp_path/'run', '--epochs', 1, *TINY)
    assert 'nothing to localize against' in text and 'without localization columns' in text
    text = wsol('eval', tmp_path/'run', '--split', 'val')
    assert 'nothing to localize against' in text and 'accuracy' in text and 'MaxBoxAcc' not in text
    assert 'data:image/jpeg' in (tmp_path/'run/report-val.html').read_text()
    assert '0.200, default' in wsol('localize', tmp_path/'run', next((tmp_path/'mine').rglob('*.jpg')), '--out', tmp_path)
    assert "split 'val' has no boxes or masks to select by" in wsol('train', '--data', tmp_path/'mine', '--out', tmp_path/'r2', '--select', 'loc', *TINY, code=1)


def test_corrupt_image(world, tmp_path):
    root = tmp_path/'w'
    shutil.copytree(world, root)
    bad = sorted((root/'SYNTH/train').rglob('*.jpg'))[4]
    bad.write_bytes(bad.read_bytes()[:300])
    text = wsol('data', 'check', root, code=1)
    assert bad.name in text and '1 problem' in text
    text = wsol('train', '--data', root, '--out', tmp_path/'run', '--epochs', 1, *TINY, code=1)
    assert bad.name in text and '--skip-bad' in text and 'Traceback' not in text
    text = wsol('train', '--data', root, '--out', tmp_path/'run', '--epochs', 1, '--skip-bad', *TINY)
    assert 'skipped 1 of 80 images' in text and bad.name in text
    assert json.loads((tmp_path/'run/config.json').read_text())['train']['skipped_images'] == 1


def test_data_commands(tmp_path):
    text = wsol('data', 'synth', tmp_path/'w', '--n-train', 8, '--n-val', 8, '--n-test', 8)
    assert 'train: 8 images, 8 classes, 8 boxes, 8 masks' in text
    assert 'no problem found' in wsol('data', 'check', tmp_path/'w')


def test_data_check_real(real_data):
    text = wsol('data', 'check', real_data, '--dataset', 'CUB')
    assert 'train: 500 images, 20 classes, 500 boxes' in text and 'test: 585 images' in text and 'no problem found' in text
    assert 'train: 67 images, 2 classes, 0 boxes, 67 masks' in wsol('data', 'check', real_data, '--dataset', 'GLAS/fold-0', code=0)


@pytest.mark.parametrize('args, message', [
    (['train', '--data', 'nowhere'], "data='nowhere' is not a folder"),
    (['train', '--data', '.', '--method', 'gab'], "method='gab'"),
    (['eval', 'nowhere'], 'no run is saved there'),
    (['train', '--data', '{world}', '--select', 'best', '--out', '{tmp}/r'], "select='best': expected last, loc or cl"),
    (['train', '--data', '{world}', '--size', '64', '--no-check', '--arch', 'resnet5O', '--out', '{tmp}/r'], 'did you mean resnet50'),
    (['train', '--data', '{world}', '--params', 'k=3', '--out', '{tmp}/r'], "params: GAP has no 'k'"),
    (['train', '--resume', '--out', '{tmp}/none'], 'no run is saved there'),
])
def test_errors(args, message, world, tmp_path, monkeypatch):
    "What the script prints when it ends, without the seconds of a process of its own."
    from wsol_nb.cli.command import main
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', [f'/bin/wsol_{args[0]}', *(a.format(world=world, tmp=tmp_path) for a in args[1:])])
    with pytest.raises(SystemExit) as e: main()
    assert str(e.value).startswith(f'wsol_{args[0]}: ') and message in str(e.value)


def test_demo(tmp_path):
    "The demo's whole path, short; `make demo` runs it in full."
    text = wsol('demo', '--out', tmp_path/'demo', '--epochs', 1, '--n-train', 32, '--n-test', 16, env=os.environ | {'OMP_NUM_THREADS': '1'})
    for line in ('accuracy', 'MaxBoxAcc δ=0.3', 'MaxBoxAcc δ=0.7', 'MaxBoxAccV2', 'Top-1 localization', 'object inside the box', 'untrained', 'centre box'): assert line in text
    for name in ('', '-fcam', '-untrained'): assert json.loads((tmp_path/f'demo/report{name}.json').read_text())['n'] == 16
    assert (tmp_path/'demo/report.html').read_text().count('data:image/jpeg;base64,') == 5
