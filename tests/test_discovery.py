"""LOST and TokenCut on transformers of many families, or a sentence that says why not; discover and the
patch head.

The registry says who is asked: every localizer that stands on `KeyLocalizer`. Random weights make keys
that are much alike, so they are centred.
"""
import sys

import numpy as np
import pytest
import torch
from helpers import images, root, run, same
from torch import nn

from wsol_nb.localize.base import Localizer
from wsol_nb.registry import entries
from wsol_nb.vit.discovery import discover, find_object
from wsol_nb.vit.lost import KeyLocalizer, OwnBoxes, lost
from wsol_nb.vit.patchhead import PatchHeadMaps, PatchNet
from wsol_nb.vit.tokencut import token_cut
import timm # after wsol_nb.core, see its end

# family -> (H,W) of images, settings of the net
NETS = dict(
    vit_tiny_patch16_224=(64, 96, dict(depth=3, dynamic_img_size=True)),
    deit_tiny_distilled_patch16_224=(64, 96, dict(depth=3, dynamic_img_size=True)),
    vit_small_patch14_reg4_dinov2=(70, 98, dict(depth=3, dynamic_img_size=True)),
    vit_small_patch16_dinov3=(64, 96, dict(depth=3)),
    eva02_tiny_patch14_224=(224, 224, dict(depth=3)),
    beit_base_patch16_224=(224, 224, dict(depth=2)),
    vit_base_patch16_siglip_224=(64, 96, dict(depth=2, dynamic_img_size=True)))
REFUSED = dict( # no attention, or none among all the patches of an image
    resnet10t=(64, 96), convnext_atto=(64, 96), swin_tiny_patch4_window7_224=(224, 224),
    xcit_nano_12_p16_224=(64, 96),
    pvt_v2_b0=(64, 96))
ASKED = {n: c for n, e in entries('localizer').items() if 'tokens' in e.facts.get('needs', '')
         and issubclass(c := e.load(), KeyLocalizer)}
_nets = {}


def net(name):
    if name not in _nets:
        torch.manual_seed(1)
        more = NETS[name][2] if name in NETS else {}
        _nets[name] = timm.create_model(name, num_classes=5, **more).train()
    return _nets[name]


def of(name, **how): return ASKED[name](net('vit_tiny_patch16_224'), centre=True, **how)


def test_who_is_asked(): assert {'LOST', 'TokenCut'} <= set(ASKED)


@pytest.mark.parametrize('family', NETS)
@pytest.mark.parametrize('name', ASKED)
def test_families(name, family):
    "Maps and boxes on the grid of the patches; the net stays as it is, and a batch does not matter."
    h, w, _ = NETS[family]
    model, x = net(family), images(h, w, 2)
    loc = ASKED[name](model, centre=True)
    raw, boxes = loc.raw(x, 1), loc.boxes(x)
    patch = 14 if 'patch14' in family else 16
    assert raw.shape == (2, h//patch, w//patch) and raw.isfinite().all()
    assert boxes.shape == (2, 4) and (boxes >= 0).all() and (boxes[:, 2:] >= boxes[:, :2]).all()
    assert (boxes[:, 2] < w).all() and (boxes[:, 3] < h).all()
    same(loc.raw(x[1:], 1)[0], raw[1], 1e-2*raw.abs().max())
    assert model.training and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert name in repr(loc) and loc.logits.shape == (1, 5)


@pytest.mark.parametrize('family', REFUSED)
@pytest.mark.parametrize('name', ASKED)
def test_refused_with_the_reason(name, family):
    with pytest.raises(ValueError, match='has no attention'):
        ASKED[name](net(family)).raw(images(*REFUSED[family], 1))


@pytest.mark.parametrize('name', ASKED)
def test_contract(name):
    "What every localizer keeps: targets, dtypes, non-finite images, errors, frozen nets, wrappers."
    loc, x = of(name), images(n=3)
    maps = loc(x)
    assert maps.shape == (3, 64, 96) and maps.dtype == torch.float32 and maps.min() >= 0 and maps.max() <= 1
    assert all(m.max() > .9 for m in maps)
    same(loc(x, [0, 3, 1]), maps, 0)
    assert loc.raw(x, [[0, 1]]*3).shape[:2] == (3, 2)
    same(loc(x, lambda z: z[:, 2]), maps, 0)
    for bad, message in (([0, 1], 'batch of 3'), (5, 'model has 5')):
        for ask in (loc, loc.boxes):
            with pytest.raises(ValueError, match=message): ask(x, bad)
    holed = x.clone()
    holed[0] = float('nan')
    seen = loc(holed, 1)
    assert not seen[0].any() and seen[1].any()
    with torch.inference_mode(): same(loc(x).clone(), maps, 1e-5)
    with torch.autocast('cpu', torch.bfloat16): assert loc(x).dtype == torch.float32
    for wrapped in (nn.DataParallel(loc.model), torch.compile(loc.model, backend='eager')):
        same(ASKED[name](wrapped, centre=True)(x), maps, 1e-5)
    with pytest.raises(ValueError, match='layers=9'): of(name, layer=9).raw(x)


def test_gradients():
    "LOST's map has a gradient; TokenCut compares, and says that it has none."
    x = images(n=1)
    raw = of('LOST').raw(x, 1, create_graph=True)
    assert raw.requires_grad
    same(raw.detach(), of('LOST').raw(x, 1), 1e-5)
    with pytest.raises(ValueError, match='nothing of its maps is differentiable'):
        of('TokenCut').raw(x, create_graph=True)


@pytest.mark.parametrize('name', ASKED)
def test_own_boxes_are_scored(name, world):
    "The evaluator takes the one box at every threshold."
    from wsol_nb.scoring.loop import evaluate
    from wsol_nb.data.loaders import WSOLDataLoaders
    dls = WSOLDataLoaders.from_metadata(world, 'SYNTH', size=64, bs=8)
    torch.manual_seed(1)
    model = timm.create_model('vit_tiny_patch16_224', num_classes=dls.c, depth=2, img_size=64)
    report = evaluate(OwnBoxes(ASKED[name](model, centre=True)), dls, 'test', tau_from=None, progress=False)
    curve = np.array(report.boxes['curve']['single'])
    assert (curve == curve[:, :1]).all() and 'OwnBoxes' in report.protocol['localizer']


@pytest.mark.parametrize('n', (1, 3, 17))
@pytest.mark.parametrize('keys', [torch.zeros, torch.ones], ids=['zero', 'equal'])
def test_equal_keys(keys, n):
    "All keys equal: the whole image and a constant map, for both, whatever the number of patches."
    cut, found = token_cut(keys(2, n, 5)), lost(keys(2, n, 5))
    assert cut.mask.all() and found.mask.all() and not cut.y.any()
    assert all(t.isfinite().all() for t in (cut.y, cut.v, cut.value, found.soft))
    assert (found.soft == found.soft[:, :1]).all() and not cut.peak.any() and not found.seed.any()


def test_objects_of_odd_maps():
    for m in (np.zeros((3, 3)), np.ones((1, 1)), np.full((2, 5), .4)):
        assert find_object(m, (30, 20)).box is None
    assert find_object(np.array([[0, 1.]]), (1, 1)).score == 0
    ramp = np.tile(np.linspace(0, 1, 9), (4, 1))
    found = find_object(ramp, (90, 40))
    assert found.box[1::2] == [0, 39] and found.box[2] == 89 and 35 <= found.box[0] <= 55


def test_a_killed_discover_goes_on(tmp_path):
    "Killed between two pictures; the second call makes the rest, and the table is whole."
    from PIL import Image
    photos = tmp_path/'photos'
    photos.mkdir()
    for i, x in enumerate(images(48, 64, 5)):
        Image.fromarray((x*255).byte().permute(1, 2, 0).numpy()).save(photos/f'{i}.png')
    code = f"""
import os, torch
from wsol_nb.vit.discovery import discover
import wsol_nb.vit.discovery as d
import timm
torch.manual_seed(1)
net = timm.create_model('vit_tiny_patch16_224', num_classes=5, depth=2, img_size=64).eval()
seen, look = [], d.find_object
def find_object(*a):
    seen.append(1)
    if len(seen) == KILL: os._exit(9)
    return look(*a)
d.find_object = find_object
discover({str(photos)!r}, net=net, out={str(tmp_path/'out')!r}, bs=2, progress=False, centre=True)
print(len(seen))"""
    run(sys.executable, '-c', code.replace('KILL', '4'), cwd=root, code=9)
    second = run(sys.executable, '-c', code.replace('KILL', '99'), cwd=root)
    assert second.stdout.strip() == '2' # three were there
    lines = (tmp_path/'out/found.csv').read_text().splitlines()
    assert [l.split(',')[0] for l in lines[1:]] == [f'{i}.png' for i in range(5)]
    assert len(list((tmp_path/'out/masks').glob('*.png'))) == 5


def test_patch_head_contract():
    model, x = PatchNet(net('vit_tiny_patch16_224')), images(n=2)
    _, features, grid, _ = model.look(x)
    model.scores(features, grid)
    loc = PatchHeadMaps(model)
    assert isinstance(loc, Localizer) and loc.preset == 'prob'
    same(loc(x[1:], 1)[0], loc(x, 1)[1], 1e-5)
    with pytest.raises(ValueError, match='model has 5'): loc(x, 5)
    assert discover(list(x), loc, progress=False, size=64).table.score.notna().all()
