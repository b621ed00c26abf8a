"""Speed as ratios against a peer in the same run: python tools/bench.py [boxes pixels birds training allocator cams ablation scorecam crf] (make bench).

Peers: for boxes the published procedure step by step (one contour search for each of the 1000 thresholds), OpenCV and numba
on one thread; for PxAP NumPy's histogram; for training the same model in torch's default memory format, and without `keep_memory`; for CAMs a plain
no_grad forward pass, pytorch-grad-cam and torchcam; for the CRF loss a training step and its own approximation (written to
nbs/results/crf_times.csv). All take some twenty minutes.
"""
import contextlib
import csv
import io
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import cv2
import numba
import numpy as np
import torch

from wsol_nb.cam.gradient import CAM, EigenCAM, GradCAM, GradCAMPlusPlus, HiResCAM, LayerCAM, XGradCAM, localize_all # first: it imports wsol_nb.core
from wsol_nb.cam.score import AblationCAM, ScoreCAM
from wsol_nb.data.metadata import read_metadata
from wsol_nb.data.stores import Truth
from wsol_nb.train.run import hardware
from wsol_nb.core import env_folder, read_image
from wsol_nb.localize.maps import reference_score_map
from wsol_nb.localize.target import Target
from wsol_nb.scoring.loop import make_report
from wsol_nb.scoring.scorer import Scorer
from wsol_nb.losses.crf import DenseCRFLoss
from wsol_nb.metrics.contours import TAUS, level_boxes, map_boxes, plain_boxes
from wsol_nb.metrics.pixels import PxAP
from wsol_nb.nets.model import wsol_model


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


def in_turns(calls, repeat):
    "Median seconds of each call, made in turns so that all meet the same machine; the first round is not counted."
    times = {k: [] for k in calls}
    for r in range(repeat + 1):
        for k, f in calls.items():
            t = time.perf_counter()
            with contextlib.redirect_stderr(io.StringIO()): f() # the peers' bars
            if r: times[k].append(time.perf_counter() - t)
    return {k: statistics.median(v) for k, v in times.items()}


def allocator(steps=8):
    "A training step with and without `keep_memory`, each in a process of its own: what is set once stays."
    code = ('import resource, sys, torch; from wsol_nb.core import keep_memory; from wsol_nb.models import wsol_model\n'
            'if sys.argv[1] == "kept": keep_memory()\n'
            'torch.manual_seed(0); model, x = wsol_model("mobilenetv2_100", 20, stride=16), torch.rand(16, 3, 224, 224).to(memory_format=torch.channels_last)\n'
            'step = lambda: model(x).square().mean().backward(); step(); a = resource.getrusage(0)\n'
            f'for _ in range({steps}): step()\n'
            f'b = resource.getrusage(0); print((b.ru_utime - a.ru_utime)/{steps}, (b.ru_stime - a.ru_stime)/{steps})')
    cpu = {how: list(map(float, subprocess.run([sys.executable, '-c', code, how], capture_output=True, text=True, check=True).stdout.split())) for how in ('default', 'kept')}
    for how, (user, system) in cpu.items(): print(f'allocator, {how}: {user:.2f} s user, {system:.2f} s system a step')
    print(f'keep_memory: {sum(cpu["default"])/sum(cpu["kept"]):.2f} × as fast (processor time of MobileNetV2, batch 16)')


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


def peak_mb(f, cuda):
    "Most memory that tensors made by a call hold at a time, in MB."
    if cuda:
        before = torch.cuda.memory_allocated(); torch.cuda.reset_peak_memory_stats(); f()
        return (torch.cuda.max_memory_allocated() - before)/2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as p: f()
    now = most = 0
    for e in sorted((e for e in p.profiler.kineto_results.events() if e.name() == '[memory]'), key=lambda e: e.start_ns()): now += e.nbytes(); most = max(most, now)
    return most/2**20


def crf(n=8, out='nbs/results/crf_times.csv'):
    "The CRF loss of 8 images of 224x224 with its gradient, at several scales; a training step of MobileNetV2 on the same images beside it."
    device, data, torch_rng = 'cuda' if torch.cuda.is_available() else 'cpu', env_folder('WSOL_DATA'), torch.Generator().manual_seed(0)
    images = dict(noise=torch.rand(n, 3, 224, 224, generator=torch_rng))
    if data:
        df = read_metadata(data, 'CUB', 'test')
        images['CUB'] = torch.stack([torch.from_numpy(np.asarray(read_image(p).resize((224, 224)), np.float32)/255).permute(2, 0, 1) for p in df.path.iloc[::len(df)//n][:n]])
    else: print('crf: no CUB images, WSOL_DATA is not set')
    S = torch.nn.functional.interpolate(torch.randn(n, 2, 7, 7, generator=torch_rng)*2, size=224, mode='bilinear').softmax(1).to(device).requires_grad_()

    def waited(f): return lambda: (f(), device == 'cuda' and torch.cuda.synchronize())
    model, y = wsol_model('mobilenetv2_100', 20, stride=16).train().to(device), torch.randint(20, (n,), device=device)
    x = next(iter(images.values())).to(device)
    step = waited(lambda: torch.nn.functional.cross_entropy(model(x), y).backward())
    where = ', '.join(str(v) for v in hardware().values() if v is not None) + f' cores, {torch.get_num_threads()} thread{"s"*(torch.get_num_threads() > 1)}'
    rows = []
    for (kind, I), size, cell in ((i, s, c) for i in images.items() for s in (28, 56, 112, 224) for c in (None, .75)):
        loss, I = DenseCRFLoss(scale=size/224, form='potts', normalise='kernel', cell=cell), I.to(device)
        once = lambda: torch.autograd.grad(loss(I, S), S)
        t = in_turns(dict(crf=waited(once), step=step), 1 if size == 224 and cell is None else 3)
        rows.append(dict(images=kind, batch=n, size=size, way='exact' if cell is None else f'grid {cell}', ms=round(1e3*t['crf'], 1), peak_mb=round(peak_mb(once, device == 'cuda'), 1), full_w_mb=round(n*size**4*4/2**20),
                         step_ms=round(1e3*t['step']), share_of_step=round(t['crf']/(t['crf'] + t['step']), 3), hardware=where, command='python tools/bench.py crf'))
        print('  '.join(f'{k} {v}' for k, v in rows[-1].items() if k not in ('hardware', 'command')), flush=True)
    with open(out, 'w', newline='') as f: w = csv.DictWriter(f, rows[0]); w.writeheader(); w.writerows(rows)


BENCHES = dict(boxes=boxes, pixels=pixels, birds=birds, training=training, allocator=allocator, cams=cams, ablation=ablation, scorecam=scorecam, crf=crf)

if __name__ == '__main__':
    print({**hardware(), 'threads': torch.get_num_threads()})
    cv2.setNumThreads(1); numba.set_num_threads(1)
    for name in sys.argv[1:] or BENCHES:
        torch.set_num_threads((os.cpu_count() or 1) if name == 'training' else 1)
        BENCHES[name]()
