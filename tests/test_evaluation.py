"The evaluator: the published procedure on many maps; in several processes, after a kill, from files."
import json
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import BIN, ordered, root, run, start, wait_until
from scipy import ndimage as ndi

from wsol_nb.core import minmax, resize_boxes
from wsol_nb.data.loaders import WSOLDataLoaders
from wsol_nb.data.metadata import read_metadata
from wsol_nb.data.stores import MapStore, Truth
from wsol_nb.localize.maps import reference_score_map
from wsol_nb.scoring.loop import evaluate
from wsol_nb.scoring.report import Report
from wsol_nb.scoring.scorer import Scorer
from wsol_nb.metrics.boxes import BoxAcc, box_overlaps, centre_map
from wsol_nb.metrics.contours import TAUS, BoxRules, level_boxes, map_boxes, plain_boxes
from wsol_nb.metrics.pixels import PxAP
from wsol_nb.scoring.stored import score_maps

sys.path.insert(0, str(root/'tools'))


def assert_published(score_map, taus, name):
    "Both modes give the boxes of the published procedure, in some order."
    for multi in (False, True):
        ours, plain = (f(score_map, taus, multi) for f in (map_boxes, plain_boxes))
        assert [*map(ordered, ours)] == [*map(ordered, plain)], f'{name}, multi={multi}'


@pytest.mark.parametrize('kind', ['smooth', 'noisy', 'binary', 'constant', 'plateau', 'empty'])
def test_boxes_of_many_maps(kind):
    "At every seventh τ; make bench does 500 maps of each kind at all thousand."
    from bench import some_map
    rng, taus = np.random.default_rng(1), TAUS[::7]
    for i in range(100):
        s = some_map(kind, rng, int(rng.integers(8, 33)))
        assert_published(s, taus, f'{kind} map {i}')


def test_equal_contours_and_nested_ones():
    "Ties go to the contour that OpenCV lists first; bounds cannot settle islands in holes and thin lines."
    rng = np.random.default_rng(2)
    for i in range(400):
        shape = rng.random((12, 13)) < (.6 if i % 2 else .3)
        levels = rng.integers(1, 4, (12, 13))
        assert_published(shape*levels/4, TAUS[::50], f'map {i}')


def test_threads_give_the_same_boxes():
    from concurrent.futures import ThreadPoolExecutor
    rng = np.random.default_rng(3)
    maps = [rng.random((40, 40)) for _ in range(16)]
    with ThreadPoolExecutor(4) as pool: found = list(pool.map(level_boxes, maps))
    for s, boxes in zip(maps, found): assert all(map(np.array_equal, boxes, level_boxes(s)))


def test_fact_sheet_cases():
    "Resize of boxes, an empty map, one τ for all images, the first three birds of the CUB test split."
    assert resize_boxes([[1, 2, 4, 3]], (10, 20), (35, 10)).tolist() == [[3, 1, 14, 1]]
    o = box_overlaps(level_boxes(np.zeros((10, 10))), [[0, 0, 9, 9]])
    assert set(o.single) == {.01}
    perfect = np.zeros((5, 5))
    perfect[1:4, 1:4] = 1
    assert box_overlaps(level_boxes(perfect, [.5]), [[1, 1, 3, 3]]).single[0] == .5625
    assert box_overlaps(level_boxes(perfect, [.5], rules=BoxRules(tight=True)), [[1, 1, 3, 3]]).single[0] == 1


def test_invariants_on_random_maps():
    "V1 <= multi, Top-1 <= Top-5 <= MaxBoxAcc, δ in order, unchanged by a factor that keeps the levels."
    rng, acc, scaled = np.random.default_rng(4), BoxAcc(), BoxAcc()
    for i in range(40):
        s = reference_score_map(rng.normal(size=(7, 7)), 64)
        x, y = rng.integers(0, 30, 2)
        box = [[x, y, x + 20, y + 25]]
        acc.update(box_overlaps(level_boxes(s), box), i % 3 == 0, i % 3 < 2)
        scaled.update(box_overlaps(level_boxes(np.floor(255*s)/255*.5), box))
    r = acc.compute()
    for d in r['max_box_acc']:
        names = ('top1_loc', 'top5_loc', 'max_box_acc', 'max_box_acc_multi')
        top1, top5, single, multi = (r[name][d]['value'] for name in names)
        assert top1 <= top5 <= single <= multi
    v = [m['value'] for m in r['max_box_acc'].values()]
    assert v == sorted(v, reverse=True)


def test_centre_of_twenty_cub_classes(real_data):
    """The centre baseline on the 585 test birds, as the reference gives it; the rows of all CUB and ILSVRC
    need metadata that is not at hand."""
    df = read_metadata(real_data, 'CUB', 'test')
    truth, acc = Truth(df, 224), BoxAcc()
    for b in truth.boxes: acc.update(box_overlaps(level_boxes(centre_map()), b))
    assert [round(m['value'], 1) for m in acc.compute()['max_box_acc'].values()] == [94.5, 55.6, 15.6]


SCRIPT = '''
import json, sys
if sys.argv[3] == 'accelerate':
    import wsol_nb.core
    from accelerate import Accelerator
    Accelerator(cpu=True)
elif sys.argv[3] == 'torchrun':
    import torch.distributed as dist
    dist.init_process_group('gloo')
import wsol_nb.core, torch
from wsol_nb.data.loaders import WSOLDataLoaders
from wsol_nb import HeadMaps, evaluate, wsol_model
torch.manual_seed(0)
dls = WSOLDataLoaders.from_metadata(sys.argv[1], 'SYNTH', size=64, bs=4, device='cpu')
r = evaluate(HeadMaps(wsol_model('resnet10t', dls.c, verbose=False)), dls, 'test', progress=False)
from torch.distributed import get_rank, is_initialized, get_world_size
rank = get_rank() if is_initialized() else 0
assert sys.argv[3] == 'alone' or get_world_size() == 2
with open(f'{sys.argv[2]}-{rank}.json', 'w') as f:
    json.dump({**r.to_dict(), 'images': r.images.round(4).to_dict('list')}, f)
'''
HERE = dict(PYTHONPATH=str(root), ACCELERATE_USE_CPU='true') # a script elsewhere uses this checkout


def content(report):
    "What a report says, without the time and the number of processes that it took."
    protocol = {k: v for k, v in report['protocol'].items() if k != 'processes'}
    return {k: v for k, v in report.items() if k != 'seconds'} | dict(protocol=protocol)


def test_two_processes_score_as_one(world, tmp_path):
    """Two gloo processes on a CPU, set up by torch.distributed and by accelerate: on both ranks the report of
    one process, every image counted once."""
    odd = shutil.copytree(world, tmp_path/'world')
    for name in ('image_ids', 'class_labels', 'image_sizes', 'localization', 'masks'):
        f = odd/f'metadata/SYNTH/test/{name}.txt' # 15 images: a sampler that pads would count one twice
        if f.is_file(): f.write_text('\n'.join(f.read_text().splitlines()[:15]))
    script = tmp_path/'score.py'
    script.write_text(SCRIPT)
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--master_port=0',
                '--rdzv_backend=c10d', '--rdzv_endpoint=localhost:0']

    def score(command, name, n):
        "The reports of all ranks."
        run(*command, script, odd, tmp_path/name, name, env=HERE, cwd=tmp_path)
        return [json.loads((tmp_path/f'{name}-{rank}.json').read_text()) for rank in range(n)]

    expected = content(*score([sys.executable], 'alone', 1))
    assert expected['n'] == 15
    for name in ('torchrun', 'accelerate'):
        for report in score(torchrun, name, 2):
            assert report['protocol']['processes'] == 2 and content(report) == expected, name


def blurred_maps(df, store, size, split):
    rng, truth = np.random.default_rng(5), Truth(df[df.split == split], size)
    for i, image_id in enumerate(truth.df.image_id):
        blurred = ndi.gaussian_filter((truth.mask(i) == 1) + rng.random((size, size)), 4)
        store.save(image_id, minmax(torch.from_numpy(blurred)))


SLOW = '''
import sys, time
import wsol_nb.core
from wsol_nb import MapStore, read_metadata, score_maps
class Slow(MapStore):
    def load(self, image_id):
        time.sleep(.1)
        return super().load(image_id)
maps, world, journal = sys.argv[1:]
score_maps(Slow(maps), read_metadata(world, 'SYNTH'), journal=journal, every=0, **{options})
'''


def test_killed_and_restarted_from_files(world, tmp_path):
    """wsol_eval --maps, killed with SIGKILL in the middle, ends with the same report; temporary files do no
    harm."""
    df, store = read_metadata(world, 'SYNTH'), MapStore(tmp_path/'maps')
    blurred_maps(df, store, 112, 'train') # 48 images: three blocks
    options = dict(split='train', size=112, progress=False, name='maps in maps', dataset='SYNTH',
                   fixed_tau=.2, mask_tau=.5, first_box=False)
    slow, journal = tmp_path/'slow.py', tmp_path/'out/journal-train.npz'
    slow.write_text(SLOW.format(options=options))
    p = start(sys.executable, slow, store.root, world, journal, env=HERE)
    wait_until(journal.is_file, p)
    p.kill()
    p.communicate()
    assert 16 <= int(np.load(journal)['tally'][0]) < 48
    resumed = score_maps(store, df, journal=journal, **options)
    fresh = score_maps(store, df, **options)
    assert {**resumed.to_dict(), 'seconds': 0} == {**fresh.to_dict(), 'seconds': 0} and not journal.exists()


def test_maps_from_the_command_line(world, tmp_path):
    df, store = read_metadata(world, 'SYNTH'), MapStore(tmp_path/'maps')
    for s in ('val', 'test'): blurred_maps(df, store, 112, s)
    score = [BIN/'wsol_eval', '--maps', store.root, '--size', 112]
    r = run(*score, '--metadata', world/'metadata', '--out', 'report', env=HERE, cwd=tmp_path)
    report = Report.load(tmp_path/'report/report-test.json')
    assert [row['tau'] for row in report.ledger] == ['oracle', 'val', 'fixed']
    assert 'val truth for τ' in r.stdout and report.accuracy is None and report.n == 16
    store.find(df.image_id[df.split == 'test'].iloc[2]).unlink()
    r = run(*score, '--metadata', world, env=HERE, cwd=tmp_path, code=1)
    assert "1 of 16 images of 'test' have no map" in r.stderr and 'Traceback' not in r.stderr


def test_state_has_the_size_of_the_protocol_not_of_the_data():
    "What a scorer keeps does not grow with the number of images."
    rng, sizes = np.random.default_rng(6), []
    scorer, mask = Scorer(32, True, True, bootstrap=20), np.eye(32, dtype=np.uint8)
    for i in range(300):
        seen = scorer.look(rng.random((32, 32)), [[3, 3, 20, 20]], mask, f'{i}')
        scorer.count(seen, f'{i}', label=i % 5, right=(True, True))
        if i in (20, 299): sizes.append(sum(v.nbytes for v in scorer.state().values()))
    assert sizes[0] == sizes[1] and len(scorer.accs['boxes']._waiting) < 128


def test_tau_is_carried_from_val(world):
    "The ledger's val row is the test curve at the best τ of the validation split."
    from wsol_nb.localize.base import HeadMaps
    from wsol_nb.nets.model import wsol_model
    dls = WSOLDataLoaders.from_metadata(world, 'SYNTH', size=64, bs=8, device='cpu')
    loc = HeadMaps(wsol_model('resnet10t', dls.c, verbose=False))
    val, test = (evaluate(loc, dls, split, progress=False) for split in ('valid', 'test'))
    assert [r['tau'] for r in val.ledger] == ['oracle', 'fixed']
    assert [r['tau'] for r in test.ledger] == ['oracle', 'val', 'fixed']
    for (d, m), curve in zip(val.boxes['max_box_acc'].items(), test.boxes['curve']['single'], strict=True):
        oracle, carried, fixed = (row['scores'][f'δ={d}'] for row in test.ledger)
        assert carried == curve[round(1000*m['tau'])] <= oracle
        assert fixed == curve[200]
    given = evaluate(loc, dls, 'test', tau_from=val, progress=False)
    assert given.ledger == test.ledger


def test_first_box_and_rules_reach_the_score(world):
    df = read_metadata(world, 'SYNTH', 'test')
    df['boxes'] = [np.concatenate((b, [[0, 0, 3, 3]])) for b in df.boxes]
    both, first = Scorer(64), Scorer(64, first_box=True)
    truth, corner = Truth(df, 64), np.zeros((64, 64))
    corner[:2, :2] = 1
    for s in (both, first):
        for i in range(len(truth)): s.count(s.look(corner, truth.boxes[i]), df.image_id.iloc[i])
    assert [s.summary()['boxes']['single']['0.3']['value'] for s in (both, first)] == [100, 0]


def test_glas_masks_and_all_ones(real_data):
    "GlaS masks on the grid; the all-ones map has F1+ of the mean 2p/(1+p) and F1− of 0."
    df = read_metadata(real_data, 'GLAS/fold-0')
    truth, acc = Truth(df[df.split == 'test'], 224), PxAP()
    for i in range(len(truth)): acc.update(np.ones((224, 224)), truth.mask(i), truth.df.image_id[i])
    r = acc.compute()
    assert r['fixed']['f1_pos'] == pytest.approx(r['all_ones']['f1_pos']) and r['fixed']['f1_neg'] == 0
    assert 64 < r['all_ones']['f1_pos'] < 68
    assert r['pxap']['value'] == pytest.approx(r['all_ones']['pxap'])
    assert set(df.image_id[df.split == 'valpx']) < set(df.image_id[df.split == 'valcl'])


def test_bad_maps_and_masks_are_named(world, tmp_path):
    df, store = read_metadata(world, 'SYNTH'), MapStore(tmp_path)
    blurred_maps(df, store, 32, 'test')
    one = df.image_id[df.split == 'test'].iloc[4]
    kept = store.find(one).read_bytes()

    def refused(match, df=df):
        with pytest.raises(ValueError, match=match): score_maps(store, df, 'test', size=32, progress=False)

    for bad, message in ((np.full((32, 32), 1.5), r'.*expected values in \[0,1\]'),
                         (np.full((32, 32), np.nan), '.*NaN'),
                         (np.zeros((16, 32)), r'.*expected shape \(32, 32\), got \(16, 32\)'),
                         (np.array(['a']), '')):
        np.save(store.path(one), bad)
        refused(f'map of {one}{message}')
    store.path(one).write_bytes(kept)
    np.save(tmp_path/'stranger.npy', np.zeros((32, 32)))
    refused("1 maps .* belong to no image of the dataset: 'stranger.npy'")
    (tmp_path/'stranger.npy').unlink()
    refused("image ids stand there twice", pd.concat([df, df[df.image_id == one]]))
    with pytest.raises(ValueError, match=f'mask of {one}: has shape'):
        PxAP().update(np.zeros((4, 4)), np.zeros((4, 5)), one)
    empty = PxAP()
    empty.update(np.zeros((4, 4)), np.zeros((4, 4), np.uint8), one)
    with pytest.raises(ValueError, match='none of the 1 masks has a foreground pixel'): empty.compute()
