"""Speed as ratios against a peer in the same run (make bench).

    python tools/bench.py [boxes pixels birds training allocator cams ablation scorecam crf copies loaders
                           ledger]

Peers: for boxes the published procedure step by step (one contour search for each of the 1000 thresholds),
OpenCV and numba on one thread; for PxAP NumPy's histogram; for training the same model in torch's default
memory format, and without `keep_memory`; for CAMs a plain no_grad forward pass, pytorch-grad-cam and
torchcam; for the CRF loss a training step and its own approximation (written to nbs/results/crf_times.csv);
for loaders torchvision's and fastai's (loader_times.py); for the ledger of wsol_eval a plain evaluate
(ledger_times.py). `copies` counts what would wait for a GPU, see
tools/copies.py. All take some forty minutes.
"""
import contextlib
import csv
import io
import itertools
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

from wsol_nb.core import env_folder # first: lets timm be imported beside a CUDA torchvision
from wsol_nb.images import read_image
from wsol_nb.cam.gradient import localize_all
from wsol_nb.cam.score import AblationCAM, ScoreCAM
from wsol_nb.data.metadata import read_metadata
from wsol_nb.data.stores import Truth
from wsol_nb.localize.maps import reference_score_map
from wsol_nb.localize.target import Target
from wsol_nb.losses.crf import DenseCRFLoss
from wsol_nb.metrics.contours import TAUS, level_boxes, map_boxes, plain_boxes
from wsol_nb.metrics.pixels import PxAP
from wsol_nb.nets.model import wsol_model
from wsol_nb.registry import entries
from wsol_nb.results import hardware
from wsol_nb.scoring.loop import make_report
from wsol_nb.scoring.scorer import Scorer
from gpu_kit import peak_mb
from ledger_times import ledger
from loader_times import loaders


def took(f):
    "Seconds of a call; what peers print on stderr is dropped."
    start = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()): f()
    return time.perf_counter() - start


def in_turns(calls, repeat):
    "Median seconds of each call, made in turns to meet the same machine; the first round is not counted."
    times = {k: [] for k in calls}
    for r in range(repeat + 1):
        for k, f in calls.items():
            seconds = took(f)
            if r: times[k].append(seconds)
    return {k: statistics.median(v) for k, v in times.items()}


def some_map(kind, rng, size):
    "A (size,size) map of a kind, in [0,1]."
    if kind == 'constant': return np.full((size, size), round(rng.random(), 2))
    if kind == 'empty': return np.zeros((size, size))
    if kind == 'noisy': return rng.random((size, size))
    s = reference_score_map(rng.normal(size=(rng.integers(4, 15),)*2), size)
    if kind == 'binary': return (s > rng.random()).astype(float)
    return np.floor(5*s)/5 if kind == 'plateau' else s


def ordered(boxes): return boxes[np.lexsort(boxes.T)]


def same_boxes(s, multi):
    "Whether both ways find the same boxes at every threshold."
    pairs = zip(map_boxes(s, multi_contour=multi), plain_boxes(s, multi_contour=multi), strict=True)
    return all(np.array_equal(ordered(a), ordered(b)) for a, b in pairs)


def time_boxes(maps, multi):
    "Median seconds a map, ours and the published procedure."
    level_boxes(maps[0], multi_contour=multi)
    ways = (level_boxes, plain_boxes)
    times = [[took(lambda: way(s, multi_contour=multi)) for way in ways] for s in maps] # in turns
    return map(statistics.median, zip(*times))


def boxes(n=20, n_same=500):
    "Time at 224x224 on maps upsampled from several grids; identity on 500 maps of each kind, 32 to 48 wide."
    rng = np.random.default_rng(0)
    aims = {False: (12, 18, 30, 60), True: (6, 10, 20, 50)}
    for multi, grid, aim in ((m, *pair) for m in aims for pair in zip((7, 14, 28, 56), aims[m])):
        maps = [reference_score_map(rng.normal(size=(grid, grid)), 224) for _ in range(n)]
        ours, plain = time_boxes(maps, multi)
        same = all(same_boxes(s, multi) for s in maps[:5])
        kind = 'multi' if multi else 'single'
        print(f'boxes, {kind}-contour, maps from {grid}x{grid}: {1e3*ours:.2f} ms a map, '
              f'plain {1e3*plain:.0f} ms, {plain/ours:.0f} times as fast (aim {aim}), same boxes: {same}')
    for kind in ('smooth', 'noisy', 'binary', 'constant', 'plateau', 'empty'):
        drawn = (some_map(kind, rng, int(rng.integers(32, 49))) for _ in range(n_same))
        wrong = sum(not (same_boxes(s, False) and same_boxes(s, True)) for s in drawn)
        print(f'boxes of {n_same} {kind} maps at 1000 thresholds, single and multi: {wrong} differ')


def pixels(n=100):
    "PxAP's counts of an image, beside two histograms of NumPy."
    rng, edges = np.random.default_rng(0), np.append(TAUS, [1., 2., 3.])
    total = np.zeros((2, len(edges) - 1), int)
    draw = lambda: (reference_score_map(rng.normal(size=(14, 14)), 224), rng.random((224, 224)) < .3)
    maps = [draw() for _ in range(n)]
    acc = PxAP()

    def plain(s, m): total[:] += [np.histogram(s[m == k], bins=edges)[0] for k in (0, 1)]
    acc.update(maps[0][0], maps[0][1].astype(np.uint8)) # compiles
    acc.reset()
    times = []
    for s, m in maps:
        m = m.astype(np.uint8)
        times.append((took(lambda: acc.update(s, m)), took(lambda: plain(s, m))))
    ours, peer = map(statistics.median, zip(*times))
    print(f'PxAP, 224x224: {1e3*ours:.2f} ms an image, two NumPy histograms {1e3*peer:.2f} ms, '
          f'{peer/ours:.1f} times as fast (aim 5), same counts: {np.array_equal(acc.hist, total)}')


def birds():
    "The 585 CUB test maps of the oracle: all τ, three δ, 200 bootstrap replicates, centre baseline."
    oracles, data = (os.environ.get(k) for k in ('WSOL_ORACLES', 'WSOL_DATA'))
    if not (oracles and data): return print('585 birds: skipped, WSOL_ORACLES and WSOL_DATA are not set')
    z, df = np.load(f'{oracles}/cub20_cams.npz'), read_metadata(data, 'CUB')
    truth = Truth(df[df.split == 'test'].set_index('image_id').loc[z['image_id']].reset_index(), 224)
    cams = z['cams']

    def score(threads):
        scorer = Scorer(224, bootstrap=200)
        look = lambda i: scorer.look(reference_score_map(cams[i], 224), truth.boxes[i])
        with ThreadPoolExecutor(threads) as pool:
            for i, seen in zip(truth.df.image_id, pool.map(look, range(len(truth)))): scorer.count(seen, i)
        return make_report(scorer, dict(split='test', dataset='CUB', localizer='stored CAMs'))
    for threads in (1, 2):
        start = time.perf_counter()
        found = score(threads).boxes['max_box_acc'].values()
        seconds = time.perf_counter() - start
        print(f"scoring {len(truth)} CUB maps, {threads} thread{'s'*(threads > 1)}: {seconds:.1f} s; "
              f"MaxBoxAcc {', '.join(format(m['value'], '.1f') for m in found)}")


def training():
    "A training step in our memory format and in torch's default."
    x, y = torch.rand(16, 3, 224, 224), torch.randint(20, (16,))
    ours, default = (wsol_model('mobilenetv2_100', 20, stride=16).train() for _ in range(2))
    default.to(memory_format=torch.contiguous_format)

    def step(model): torch.nn.functional.cross_entropy(model(x), y).backward()
    t = in_turns(dict(ours=lambda: step(ours), default=lambda: step(default)), 5)
    print(f'training step, mobilenetv2_100 at stride 16, 224x224: {1e3*t["ours"]/16:.0f} ms an image, '
          f'{t["default"]/t["ours"]:.2f} times as fast as in the default memory format')


STEPS = """
import resource, sys, torch
from wsol_nb.core import keep_memory
from wsol_nb.nets.model import wsol_model
if sys.argv[1] == 'kept': keep_memory()
torch.manual_seed(0)
model = wsol_model('mobilenetv2_100', 20, stride=16)
x = torch.rand(16, 3, 224, 224).to(memory_format=torch.channels_last)
def step(): model(x).square().mean().backward()
step()
a = resource.getrusage(0)
for _ in range(8): step()
b = resource.getrusage(0)
print((b.ru_utime - a.ru_utime)/8, (b.ru_stime - a.ru_stime)/8)
"""


def allocator():
    "A training step with and without `keep_memory`, each in a process of its own: what is set once stays."
    total = {}
    for how in ('default', 'kept'):
        said = subprocess.check_output([sys.executable, '-c', STEPS, how], text=True)
        user, system = map(float, said.split())
        total[how] = user + system
        print(f'allocator, {how}: {user:.2f} s user, {system:.2f} s system a step')
    ratio = total['default']/total['kept']
    print(f'keep_memory: {ratio:.2f} × as fast (processor time of MobileNetV2, batch 16)')


def resnet50():
    "An ImageNet-sized ResNet50 with random weights in eval mode, its last layer, and four images."
    import timm
    torch.manual_seed(0)
    net = timm.create_model('resnet50').eval()
    return net, net.layer4, torch.randn(4, 3, 224, 224)


def pgc_targets(classes):
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    return [ClassifierOutputTarget(i) for i in classes]


def peers(net, layer, x):
    "Grad-CAM of two libraries, and LayerCAM of one."
    import pytorch_grad_cam as pgc
    from torchcam import methods as tc

    def torchcam():
        with tc.GradCAM(net, target_layer=layer) as cam: cam([1, 2, 3, 4], net(x))

    def grad_cam(c): return lambda: c(model=net, target_layers=[layer])(x, targets=pgc_targets(range(1, 5)))
    theirs = {f'pytorch-grad-cam {c.__name__}': grad_cam(c) for c in (pgc.GradCAM, pgc.LayerCAM)}
    return dict(torchcam=torchcam) | theirs


def cams(repeat=20):
    "Every localizer of one pass, as multiples of a plain forward pass."
    net, layer, x = resnet50()
    one_pass = [e for e in entries('localizer').values() if e.facts['passes'] in ('1', '1 + gradient')]
    known = [e.load()(net, 'layer4') for e in one_pass if e.module == 'wsol_nb.cam.gradient']
    five = ['gradcam', 'hirescam', 'gradcamplusplus', 'xgradcam', 'layercam']

    def plain():
        with torch.no_grad(): net(x)
    calls = dict(plain=plain) | {type(l).__name__: (lambda l=l: l(x, [1, 2, 3, 4])) for l in known}
    calls['five'] = lambda: localize_all(net, x, five, [1, 2, 3, 4], 'layer4')
    t = in_turns(calls, repeat)
    theirs = in_turns(dict(plain=plain) | peers(net, layer, x), 5) # apart: they hold a graph of the whole net
    print(f'CAMs of 4 images, ResNet50, 224x224, median of {repeat} in turns; '
          f'a plain no_grad forward pass takes {1e3*t["plain"]:.0f} ms; times of it:')
    for times in (t, theirs):
        for k, v in times.items():
            if times is t or k != 'plain': print(f'  {k:<28}{v/times["plain"]:.2f}')


def ablation(share=16, repeat=3):
    "One image, all 2048 channels; the peer on a share of them, its time extrapolated."
    import pytorch_grad_cam as pgc
    net, layer, x = resnet50()
    x, n = x[:1], 2048//share
    peer = pgc.AblationCAM(model=net, target_layers=[layer])

    def first(activations, ratio):
        peer.ablation_layer.indices = np.arange(n)
        return peer.ablation_layer.indices
    peer.ablation_layer.activations_to_be_ablated = first
    with torch.no_grad(): A = net.forward_features(x).numpy()
    t = in_turns(dict(ours=lambda: AblationCAM(net, 'layer4').raw(x, 1),
                      peer=lambda: peer.get_cam_weights(x, layer, pgc_targets([1]), A, None)), repeat)
    theirs = share*t['peer']
    print(f'Ablation-CAM of an image, ResNet50 layer4, 224x224: {t["ours"]:.2f} s, '
          f'{theirs/t["ours"]:.0f} times as fast as pytorch-grad-cam '
          f'({theirs:.0f} s, extrapolated from {n} of 2048 channels)')


def scorecam(k=64, repeat=5):
    "One image, k channels: the time to weigh them, and the maps that the weights make."
    import pytorch_grad_cam as pgc
    net, layer, x = resnet50()
    x = x[:1]
    with torch.no_grad(): A, logits = net.forward_features(x)[:, :k], net(x)
    peer = pgc.ScoreCAM(model=net, target_layers=[layer])
    peer.batch_size = 32
    ours = dict(float32=ScoreCAM(net, 'layer4'), bfloat16=ScoreCAM(net, 'layer4', dtype=torch.bfloat16))
    weights = {} # of the last call

    def weigh(name):
        with torch.no_grad(): weights[name] = ours[name].channel_weights(x, A, Target(1, 1), logits)[0, 0]

    def weigh_peer():
        weights['peer'] = torch.as_tensor(peer.get_cam_weights(x, layer, pgc_targets([1]), A.numpy(), None))
    calls = dict(float32=lambda: weigh('float32'), bfloat16=lambda: weigh('bfloat16'), peer=weigh_peer)
    t = in_turns(calls, repeat)

    def weighted(w): return torch.einsum('k,khw->hw', w.flatten().float(), A[0]).relu().flatten()
    maps = {n: weighted(w) for n, w in weights.items()}

    def corr(a, b): return torch.corrcoef(torch.stack([maps[a], maps[b]]))[0, 1]
    print(f'Score-CAM weights of {k} channels, ResNet50 layer4, 224x224: {t["float32"]:.2f} s, '
          f'{t["peer"]/t["float32"]:.2f} times as fast as pytorch-grad-cam '
          f'(maps correlate {corr("float32", "peer"):.5f}); '
          f'in bfloat16 {t["peer"]/t["bfloat16"]:.2f} times (with float32 {corr("bfloat16", "float32"):.5f})')


def crf_images(n, generator):
    "(n,3,224,224) images by name: noise, and birds where there are some."
    images, data = dict(noise=torch.rand(n, 3, 224, 224, generator=generator)), env_folder('WSOL_DATA')
    if not data:
        print('crf: no CUB images, WSOL_DATA is not set')
        return images
    df = read_metadata(data, 'CUB', 'test')
    pictures = (read_image(p).resize((224, 224)) for p in df.path.iloc[::len(df)//n][:n])
    birds = [torch.from_numpy(np.asarray(p, np.float32)/255).permute(2, 0, 1) for p in pictures]
    return images | dict(CUB=torch.stack(birds))


def crf(n=8, out='nbs/results/crf_times.csv'):
    "The CRF loss of 8 images with its gradient, at several scales, beside a training step of MobileNetV2."
    cuda, generator = torch.cuda.is_available(), torch.Generator().manual_seed(0)
    device, images = 'cuda' if cuda else 'cpu', crf_images(n, generator)
    logits = 2*torch.randn(n, 2, 7, 7, generator=generator)
    logits = torch.nn.functional.interpolate(logits, size=224, mode='bilinear')
    S = logits.softmax(1).to(device).requires_grad_()
    model = wsol_model('mobilenetv2_100', 20, stride=16).train().to(device)
    x, y = next(iter(images.values())).to(device), torch.randint(20, (n,), device=device)

    def waited(f): return lambda: (f(), cuda and torch.cuda.synchronize())
    step = waited(lambda: torch.nn.functional.cross_entropy(model(x), y).backward())
    threads = torch.get_num_threads()
    where = ', '.join(str(v) for v in hardware().values() if v is not None)
    where, rows = f'{where} cores, {threads} thread{"s"*(threads > 1)}', []
    for (kind, I), size, cell in itertools.product(images.items(), (28, 56, 112, 224), (None, .75)):
        loss, I = DenseCRFLoss(scale=size/224, form='potts', normalise='kernel', cell=cell), I.to(device)
        once = lambda: torch.autograd.grad(loss(I, S), S)
        t = in_turns(dict(crf=waited(once), step=step), 1 if size == 224 and cell is None else 3)
        row = dict(images=kind, batch=n, size=size, way='exact' if cell is None else f'grid {cell}')
        row |= dict(ms=round(1e3*t['crf'], 1), peak_mb=round(peak_mb(once, device), 1))
        row |= dict(full_w_mb=round(n*size**4*4/2**20))
        row |= dict(step_ms=round(1e3*t['step']), share_of_step=round(t['crf']/(t['crf'] + t['step']), 3))
        print('  '.join(f'{k} {v}' for k, v in row.items()), flush=True)
        rows.append(row | dict(hardware=where, command='python tools/bench.py crf'))
    with open(out, 'w', newline='') as f:
        table = csv.DictWriter(f, rows[0])
        table.writeheader()
        table.writerows(rows)


def copies():
    "What waits for a GPU, counted: nbs/results/host_copies.csv."
    import copies
    copies.table()


BENCHES = dict(boxes=boxes, pixels=pixels, birds=birds, training=training, allocator=allocator, cams=cams,
               ablation=ablation, scorecam=scorecam, crf=crf, copies=copies, loaders=loaders, ledger=ledger)

if __name__ == '__main__':
    print({**hardware(), 'threads': torch.get_num_threads()})
    cv2.setNumThreads(1)
    numba.set_num_threads(1)
    for name in sys.argv[1:] or BENCHES:
        torch.set_num_threads((os.cpu_count() or 1) if name == 'training' else 1)
        BENCHES[name]()
