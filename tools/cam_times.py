"""Milliseconds of one 224x224 map, method by net: python tools/cam_times.py [--out nbs/results/topdown_times.csv]

The tutorial's timing table, measured here; random weights, one image, 200 classes, the median of 3 turns with a plain pass between. Score-CAM and its kin ask the net about every channel,
up to 35 times: they are measured at 8 and 24 channels, and what all would take is extrapolated along that line and said to be so.
"""
import argparse
import csv
import statistics
import time

from wsol_nb.cam.excitation import ExcitationBackprop, FeedbackCAM
from wsol_nb.cam.gradient import (
    CAM, EigenCAM, GradCAM, GradCAMPlusPlus, HiResCAM, LayerCAM, SmoothGradCAMPlusPlus, XGradCAM)
from wsol_nb.cam.layers import feature_layer
from wsol_nb.cam.score import ISCAM, SSCAM, AblationCAM, ScoreCAM
from wsol_nb.train.run import hardware
import torch
import torchvision

NETS = dict(VGG16=lambda: torchvision.models.vgg16(num_classes=200, weights=None), InceptionV3=lambda: torchvision.models.inception_v3(num_classes=200, weights=None, init_weights=False), ResNet50=lambda: torchvision.models.resnet50(num_classes=200, weights=None))
WHOLE = (CAM, GradCAM, HiResCAM, GradCAMPlusPlus, SmoothGradCAMPlusPlus, XGradCAM, LayerCAM, EigenCAM, ExcitationBackprop, FeedbackCAM, AblationCAM)
SLOW = (AblationCAM, FeedbackCAM)
BY_CHANNEL = {ScoreCAM: 1, ISCAM: 10, SSCAM: 35} # and the passes for each channel


def rows(name, device):
    torch.manual_seed(0)
    net, x = NETS[name]().eval().to(device), torch.randn(1, 3, 224, 224, device=device)

    def once(f):
        t = time.perf_counter()
        f()
        if x.is_cuda: torch.cuda.synchronize()
        return 1e3*(time.perf_counter() - t)

    def plain():
        with torch.no_grad(): net(x)

    def clock(f, repeat=3):
        "Median ms, and median ratio to a plain pass just before: the machine may be shared."
        f()
        pairs = [(once(plain), once(f)) for _ in range(repeat)]
        return statistics.median(b for _, b in pairs), statistics.median(b/a for a, b in pairs)
    layer = feature_layer(net, x)
    with torch.no_grad(): K = ScoreCAM(net, layer).watch(x).acts[0].shape[1]
    yield name, 'plain forward pass', *clock(plain), 'measured'
    for c in WHOLE:
        loc = c(net) if c is FeedbackCAM else c(net, layer)
        try: yield name, c.__name__, *clock(lambda: loc.raw(x, 1), 1 if c in SLOW else 3), 'measured'
        except ValueError as e: yield name, c.__name__, None, None, f'does not apply: {str(e).split(";")[0]}'
    few, more = (clock(lambda: ScoreCAM(net, layer, channels=k, bs=8).raw(x, 1), 1) for k in (8, 24))
    for c, n in BY_CHANNEL.items(): yield name, c.__name__, *(a + (b - a)/16*(n*K - 8) for a, b in zip(few, more)), f'extrapolated to {n}x{K} passes from 8 and 24'


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--out', default='nbs/results/topdown_times.csv')
    a = p.parse_args()
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    where = ', '.join(str(v) for v in hardware().values() if v is not None) + f' cores, {torch.get_num_threads()} thread'
    with open(a.out, 'w', newline='') as f:
        w = csv.writer(f)
        w.writerow(('net', 'method', 'ms', 'plain_passes', 'how', 'hardware'))
        for name in NETS:
            for net, method, ms, ratio, how in rows(name, device):
                w.writerow((net, method, '' if ms is None else f'{ms:.1f}', '' if ratio is None else f'{ratio:.2f}', how, where))
                print(net, method, '' if ms is None else f'{ms:.0f} ms = {ratio:.2f} passes', how, flush=True)
