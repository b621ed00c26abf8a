"""Speed as ratios against a peer in the same run: python tools/bench.py [boxes training cams ablation scorecam] (make bench). About eight minutes.

Peers: for boxes the published procedure step by step (one contour search for each of the 1000 thresholds); for training the
same model in torch's default memory format; for CAMs a plain no_grad forward pass, pytorch-grad-cam and torchcam.
"""
import contextlib
import io
import statistics
import sys
import time

import cv2
import numpy as np
import torch

from wsol_nb.cam.gradient import CAM, EigenCAM, GradCAM, GradCAMPlusPlus, HiResCAM, LayerCAM, XGradCAM, localize_all
from wsol_nb.cam.score import AblationCAM, ScoreCAM
from wsol_nb.learner import hardware
from wsol_nb.localize import Target, reference_score_map
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


def in_turns(calls, repeat):
    "Median seconds of each call, made in turns so that all meet the same machine; the first round is not counted."
    times = {k: [] for k in calls}
    for r in range(repeat + 1):
        for k, f in calls.items():
            t = time.perf_counter()
            with contextlib.redirect_stderr(io.StringIO()): f() # the peers' bars
            if r: times[k].append(time.perf_counter() - t)
    return {k: statistics.median(v) for k, v in times.items()}


def resnet50():
    "An ImageNet-sized ResNet50 with random weights in eval mode, its last layer, and four images."
    import timm
    torch.manual_seed(0)
    net = timm.create_model('resnet50').eval()
    return net, net.layer4, torch.randn(4, 3, 224, 224)


def cams(repeat=20):
    import pytorch_grad_cam as pgc
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    from torchcam import methods as tc
    net, layer, x = resnet50()
    ours = {c.__name__: c(net, 'layer4') for c in (CAM, GradCAM, HiResCAM, GradCAMPlusPlus, XGradCAM, LayerCAM, EigenCAM)}

    def plain():
        with torch.no_grad(): net(x)

    def torchcam():
        with tc.GradCAM(net, target_layer=layer) as cam: cam([1, 2, 3, 4], net(x))
    five = ['gradcam', 'hirescam', 'gradcamplusplus', 'xgradcam', 'layercam']
    theirs = {f'pytorch-grad-cam {c.__name__}': (lambda c=c: c(model=net, target_layers=[layer])(x, targets=[ClassifierOutputTarget(i) for i in range(1, 5)])) for c in (pgc.GradCAM, pgc.LayerCAM)}
    calls = dict(plain=plain) | {n: (lambda l=l: l(x, [1, 2, 3, 4])) for n, l in ours.items()} | dict(five=lambda: localize_all(net, x, five, [1, 2, 3, 4], 'layer4'))
    t = in_turns(calls, repeat) # the peers allocate a graph of the whole net, so they come apart
    t |= {k: v*t['plain']/p for peers in [in_turns(dict(plain=plain, torchcam=torchcam) | theirs, 5)] for p in [peers.pop('plain')] for k, v in peers.items()}
    print(f'CAMs of 4 images, ResNet50, 224x224, median of {repeat} in turns; a plain no_grad forward pass takes {1e3*t["plain"]:.0f} ms; times of it:')
    for k, v in t.items(): print(f'  {k:<28}{v/t["plain"]:.2f}')


def quiet(f):
    "The call without a peer's bar on stderr."
    with contextlib.redirect_stderr(io.StringIO()): return f()


def ablation(share=16, repeat=3):
    "One image, all 2048 channels; the peer on a share of them, its time extrapolated."
    import pytorch_grad_cam as pgc
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    net, layer, x = resnet50()
    x, target = x[:1], [ClassifierOutputTarget(1)]
    peer = pgc.AblationCAM(model=net, target_layers=[layer])

    def first(activations, ratio): peer.ablation_layer.indices = np.arange(2048//share); return peer.ablation_layer.indices
    peer.ablation_layer.activations_to_be_ablated = first
    with torch.no_grad(): A = net.forward_features(x).numpy()
    t = in_turns(dict(ours=lambda: AblationCAM(net, 'layer4').raw(x, 1), peer=lambda: peer.get_cam_weights(x, layer, target, A, None)), repeat)
    print(f'Ablation-CAM of an image, ResNet50 layer4, 224x224: {t["ours"]:.2f} s, {share*t["peer"]/t["ours"]:.0f} times as fast as pytorch-grad-cam ({share*t["peer"]:.0f} s, extrapolated from {2048//share} of 2048 channels)')


def scorecam(k=64, repeat=5):
    "One image, k channels: the time to weigh them, and the maps that the weights make."
    import pytorch_grad_cam as pgc
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    net, layer, x = resnet50()
    x, target = x[:1], [ClassifierOutputTarget(1)]
    with torch.no_grad(): A, logits = net.forward_features(x)[:, :k], net(x)

    def weights(loc):
        with torch.no_grad(): return loc.channel_weights(x, A, Target(1, 1), logits)[0, 0]
    peer = pgc.ScoreCAM(model=net, target_layers=[layer])
    peer.batch_size = 32
    calls = {n: (lambda l=ScoreCAM(net, 'layer4', dtype=d): weights(l)) for n, d in (('float32', None), ('bfloat16', torch.bfloat16))}
    calls |= dict(peer=lambda: peer.get_cam_weights(x, layer, target, A.numpy(), None))
    t = in_turns(calls, repeat)
    maps = {n: torch.einsum('k,khw->hw', torch.as_tensor(quiet(f)).flatten().float(), A[0]).relu().flatten() for n, f in calls.items()}
    def corr(a, b): return torch.corrcoef(torch.stack([maps[a], maps[b]]))[0, 1]
    print(f'Score-CAM weights of {k} channels, ResNet50 layer4, 224x224: {t["float32"]:.2f} s, {t["peer"]/t["float32"]:.2f} times as fast as pytorch-grad-cam (maps correlate {corr("float32", "peer"):.5f}); '
          f'in bfloat16 {t["peer"]/t["bfloat16"]:.2f} times (with float32 {corr("bfloat16", "float32"):.5f})')


BENCHES = dict(boxes=boxes, training=training, cams=cams, ablation=ablation, scorecam=scorecam)

if __name__ == '__main__':
    print({**hardware(), 'threads': torch.get_num_threads()})
    for name in sys.argv[1:] or BENCHES: BENCHES[name]()
