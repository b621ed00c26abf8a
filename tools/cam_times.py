"""Milliseconds of one 224x224 map, method by net

    python tools/cam_times.py [--out nbs/results/topdown_times.csv]

The tutorial's timing table, measured here; random weights, one image, 200 classes, the median of 3 turns with
a plain pass between. Score-CAM and its kin ask the net about every channel, up to 35 times: they are measured
at 8 and 24 channels, and what all would take is extrapolated along that line and said to be so. All is
measured anew; a row takes the place of the one that is there.
"""
import argparse
import statistics
import time
from pathlib import Path

from wsol_nb.cam.excitation import ExcitationBackprop, FeedbackCAM
from wsol_nb.cam.gradient import (
    CAM, EigenCAM, GradCAM, GradCAMPlusPlus, HiResCAM, LayerCAM, SmoothGradCAMPlusPlus, XGradCAM)
from wsol_nb.cam.choice import feature_layer
from wsol_nb.cam.score import ISCAM, SSCAM, AblationCAM, ScoreCAM
from wsol_nb.results import Rows, origin, results_folder
import torch
import torchvision # after wsol_nb, which lets a CUDA build of it be imported beside a CPU torch

MODELS = torchvision.models
NETS = dict(VGG16=lambda: MODELS.vgg16(num_classes=200, weights=None),
            InceptionV3=lambda: MODELS.inception_v3(num_classes=200, weights=None, init_weights=False),
            ResNet50=lambda: MODELS.resnet50(num_classes=200, weights=None))
WHOLE = (CAM, GradCAM, HiResCAM, GradCAMPlusPlus, SmoothGradCAMPlusPlus, XGradCAM, LayerCAM, EigenCAM,
         ExcitationBackprop, FeedbackCAM, AblationCAM)
SLOW = (AblationCAM, FeedbackCAM) # one turn
BY_CHANNEL = {ScoreCAM: 1, ISCAM: 10, SSCAM: 35} # and the passes for each channel
FEW, MORE = 8, 24 # channels at which they are measured


def milliseconds(f, cuda)->float:
    "What one call takes."
    start = time.perf_counter()
    f()
    if cuda: torch.cuda.synchronize()
    return 1e3*(time.perf_counter() - start)


def clock(f, plain, cuda, repeat=3)->tuple:
    "Median ms, and median ratio to a plain pass just before: the machine may be shared."
    f()
    pairs = [(milliseconds(plain, cuda), milliseconds(f, cuda)) for _ in range(repeat)]
    return statistics.median(b for _, b in pairs), statistics.median(b/a for a, b in pairs)


def times(name, device):
    "(method, ms, plain passes, how it was found) of each method on a net."
    torch.manual_seed(0)
    net, x = NETS[name]().eval().to(device), torch.randn(1, 3, 224, 224, device=device)

    def plain():
        with torch.no_grad(): net(x)

    def timed(f, repeat=3): return clock(f, plain, x.is_cuda, repeat)

    layer = feature_layer(net, x)
    with torch.no_grad(): channels = ScoreCAM(net, layer).watch(x).acts[0].shape[1]
    yield 'plain forward pass', *timed(plain), 'measured'
    for c in WHOLE:
        loc = c(net) if c is FeedbackCAM else c(net, layer)
        try: yield c.__name__, *timed(lambda: loc.raw(x, 1), 1 if c in SLOW else 3), 'measured'
        except ValueError as e: yield c.__name__, None, None, f'does not apply: {str(e).split(";")[0]}'
    few, more = (timed(lambda: ScoreCAM(net, layer, channels=k, bs=8).raw(x, 1), 1) for k in (FEW, MORE))
    for c, n in BY_CHANNEL.items():
        line = [a + (b - a)/(MORE - FEW)*(n*channels - FEW) for a, b in zip(few, more)]
        yield c.__name__, *line, f'extrapolated to {n}x{channels} passes from {FEW} and {MORE}'


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', type=Path, metavar='CSV', default=results_folder()/'topdown_times.csv')
    a = p.parse_args()
    rows, device = Rows(a.out), 'cuda' if torch.cuda.is_available() else 'cpu'
    source = origin('python tools/cam_times.py')
    source['hardware'] += f', {torch.get_num_threads()} thread'
    for net in NETS:
        for method, ms, ratio, how in times(net, device):
            found = {} if ms is None else dict(ms=round(ms, 1), plain_passes=round(ratio, 2))
            key, row = dict(net=net, method=method), dict(ms=None, plain_passes=None) | found | dict(how=how)
            rows.add([key | row | source], **key)
            print(net, method, f'{ms:.0f} ms = {ratio:.2f} passes' if found else '', how, flush=True)


if __name__ == '__main__': main()
