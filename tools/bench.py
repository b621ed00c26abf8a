"""Speed as ratios against a peer in the same run: python tools/bench.py (make bench). Takes about two minutes.

Peers: for boxes the published procedure step by step (one contour search for each of the 1000 thresholds); for training the
same model in torch's default memory format.
"""
import statistics
import time

import cv2
import numpy as np
import torch

from wsol_nb.learner import hardware
from wsol_nb.localize import reference_score_map
from wsol_nb.metrics.boxes import TAUS, map_boxes
from wsol_nb.models import wsol_model


def published_boxes(s):
    "The reference procedure as its paper and code describe it, single contour."
    u, out = (255*s).astype(np.uint8), []
    for tau in TAUS:
        fg = (u > int(tau*u.max())).astype(np.uint8)*255
        contours, _ = cv2.findContours(fg, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
        if not contours: out.append([0, 0, 0, 0]); continue
        x, y, w, h = cv2.boundingRect(max(contours, key=cv2.contourArea))
        out.append([x, y, min(x + w, s.shape[1] - 1), min(y + h, s.shape[0] - 1)])
    return np.array(out)


def seconds(f, repeat=5):
    "Median time of a call, after one that is not counted."
    f(); times = []
    for _ in range(repeat): t = time.perf_counter(); f(); times.append(time.perf_counter() - t)
    return statistics.median(times)


def boxes():
    rng = np.random.default_rng(0)
    maps = [reference_score_map(rng.normal(size=(14, 14)) + 4*np.outer(np.hanning(14), np.hanning(14)), 224) for _ in range(10)]
    for s in maps: assert np.array_equal(np.concatenate(map_boxes(s)), published_boxes(s))
    ours, peer = seconds(lambda: [map_boxes(s) for s in maps]), seconds(lambda: [published_boxes(s) for s in maps], 3)
    print(f'boxes of 1000 thresholds, 224x224: {1e3*ours/10:.1f} ms a map, {peer/ours:.1f} times as fast as the published procedure, same boxes')


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
    boxes(); training()
