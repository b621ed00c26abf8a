"""Speed as ratios against a peer in the same run: python tools/bench.py [boxes pixels birds training] (make bench).

Peers: for boxes the published procedure step by step (one contour search for each of the 1000 thresholds), OpenCV and numba
on one thread; for PxAP NumPy's histogram; for training the same model in torch's default memory format. All take some
ten minutes, nearly all of it the plain procedure on 3000 maps.
"""
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import cv2
import numba
import numpy as np
import torch

from wsol_nb.learner import hardware # first: it imports wsol_nb.core
from wsol_nb.data.manifest import Truth, read_metadata
from wsol_nb.localize import Scorer, make_report, reference_score_map
from wsol_nb.metrics.boxes import TAUS, level_boxes, map_boxes, plain_boxes
from wsol_nb.metrics.pixels import PxAP
from wsol_nb.models import wsol_model


def seconds(f, repeat=5):
    "Median time of a call, after one that is not counted."
    f(); times = []
    for _ in range(repeat): t = time.perf_counter(); f(); times.append(time.perf_counter() - t)
    return statistics.median(times)


def some_map(kind, rng, size):
    "A (size,size) map of a kind, in [0,1]."
    if kind == 'constant': return np.full((size, size), round(rng.random(), 2))
    if kind == 'empty': return np.zeros((size, size))
    if kind == 'noisy': return rng.random((size, size))
    s = reference_score_map(rng.normal(size=(rng.integers(4, 15),)*2), size)
    if kind == 'binary': return (s > rng.random()).astype(float)
    return np.floor(5*s)/5 if kind == 'plateau' else s


def same(a, b): return all(len(x) == len(y) and np.array_equal(x[np.lexsort(x.T)], y[np.lexsort(y.T)]) for x, y in zip(a, b, strict=True))


def boxes(n=20, n_same=500):
    "Time at 224x224 on maps upsampled from several grids; identity on 500 maps of each kind, 32 to 48 pixels wide."
    rng = np.random.default_rng(0)
    for multi, aims in ((False, (12, 18, 30, 60)), (True, (6, 10, 20, 50))):
        for grid, aim in zip((7, 14, 28, 56), aims):
            maps = [reference_score_map(rng.normal(size=(grid, grid)), 224) for _ in range(n)]
            level_boxes(maps[0], multi_contour=multi)
            times = [[], []]
            for s in maps: # in turns, so that both meet the same machine
                for t, f in zip(times, (level_boxes, plain_boxes)): start = time.perf_counter(); f(s, multi_contour=multi); t.append(time.perf_counter() - start)
            ours, plain = map(statistics.median, times)
            ok = all(same(map_boxes(s, multi_contour=multi), plain_boxes(s, multi_contour=multi)) for s in maps[:5])
            print(f'boxes, {"multi" if multi else "single"}-contour, maps from {grid}x{grid}: {1e3*ours:.2f} ms a map, plain {1e3*plain:.0f} ms, {plain/ours:.0f} times as fast (aim {aim}), same boxes: {ok}')
    for kind in ('smooth', 'noisy', 'binary', 'constant', 'plateau', 'empty'):
        wrong = 0
        for _ in range(n_same):
            s = some_map(kind, rng, int(rng.integers(32, 49)))
            wrong += not all(same(map_boxes(s, multi_contour=m), plain_boxes(s, multi_contour=m)) for m in (False, True))
        print(f'boxes of {n_same} {kind} maps at 1000 thresholds, single and multi: {wrong} differ')


def pixels(n=100):
    rng, edges = np.random.default_rng(0), np.append(TAUS, [1., 2., 3.])
    images = [(reference_score_map(rng.normal(size=(14, 14)), 224), (rng.random((224, 224)) < .3).astype(np.uint8)) for _ in range(n)]
    acc = PxAP()
    acc.update(*images[0]); acc.reset()
    times, total = [[], []], 0
    for s, m in images:
        start = time.perf_counter(); acc.update(s, m); times[0].append(time.perf_counter() - start)
        start = time.perf_counter(); total = total + np.stack([np.histogram(s[m == k], bins=edges)[0] for k in (0, 1)]); times[1].append(time.perf_counter() - start)
    ours, plain = map(statistics.median, times)
    print(f'PxAP, 224x224: {1e3*ours:.2f} ms an image, two NumPy histograms {1e3*plain:.2f} ms, {plain/ours:.1f} times as fast (aim 5), same counts: {np.array_equal(acc.hist, total)}')


def birds():
    "The 585 CUB test maps of the oracle: resize, normalise, all τ, three δ, both contour modes, 200 bootstrap replicates, centre baseline."
    oracles, data = (os.environ.get(k) for k in ('WSOL_ORACLES', 'WSOL_DATA'))
    if not (oracles and data): print('scoring 585 birds: skipped, WSOL_ORACLES and WSOL_DATA are not set'); return
    z, df = np.load(f'{oracles}/cub20_cams.npz'), read_metadata(data, 'CUB')
    truth = Truth(df[df.split == 'test'].set_index('image_id').loc[z['image_id']].reset_index(), 224)
    def score(threads):
        scorer, start = Scorer(224, bootstrap=200), time.perf_counter()
        look = lambda i: scorer.look(reference_score_map(z_cams[i], 224), truth.boxes[i])
        with ThreadPoolExecutor(threads) as pool:
            for i, seen in enumerate(pool.map(look, range(len(truth)))): scorer.count(seen, truth.df.image_id[i])
        report = make_report(scorer, dict(split='test', dataset='CUB', localizer='stored CAMs'))
        return time.perf_counter() - start, report
    z_cams = z['cams']
    for threads in (1, 2):
        took, report = score(threads)
        print(f"scoring {len(truth)} CUB maps, {threads} thread{'s'*(threads > 1)}: {took:.1f} s; MaxBoxAcc {', '.join(format(m['value'], '.1f') for m in report.boxes['max_box_acc'].values())}")


def training():
    x, y = torch.rand(16, 3, 224, 224), torch.randint(20, (16,))
    def step(model): return lambda: torch.nn.functional.cross_entropy(model(x), y).backward()
    models = [wsol_model('mobilenetv2_100', 20, stride=16).train() for _ in range(2)]
    models[1].to(memory_format=torch.contiguous_format)
    times = [[seconds(step(m), 1) for m in models] for _ in range(5)] # in turns, so that both meet the same machine
    ours, peer = map(statistics.median, zip(*times))
    print(f'training step, mobilenetv2_100 at stride 16, 224x224: {1e3*ours/16:.0f} ms an image, {peer/ours:.2f} times as fast as in the default memory format')


if __name__ == '__main__':
    print({**hardware(), 'threads': torch.get_num_threads()})
    cv2.setNumThreads(1); numba.set_num_threads(1)
    for f in sys.argv[1:] or ('boxes', 'pixels', 'birds', 'training'):
        torch.set_num_threads((os.cpu_count() or 1) if f == 'training' else 1)
        globals()[f]()
