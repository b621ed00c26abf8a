"""Which timm families work with the feature adapter and with each localizer: right, or refused by name.

    python tools/token_support.py [--families ViT Swin …] [--what adapter GradCAM …]

Nets have random weights and few blocks. A cell is `right` where what it gives was checked against hooks and
formulas of its own, `refused` where a ValueError or TypeError names what is in the way, else `wrong`. Rows
go to nbs/results/token_support.csv (family, arch, what, verdict, reason); a family that is there already is
left out, and replaced where it is named.
"""
import argparse
import warnings
from pathlib import Path

import torch
from torch import nn

from wsol_nb.cam.gradient import GradCAM
from wsol_nb.cam.layers import LayerLocalizer
from wsol_nb.cam.peaks import peak_responses
from wsol_nb.nets.decoder import FullMaps, FullModel
from wsol_nb.nets.model import wsol_model
from wsol_nb.nets.tokens import learn_tokens, token_maps
from wsol_nb.registry import entries
from wsol_nb.results import Rows, origin, results_folder
import timm # after wsol_nb.core, see its end

FREE, WIDE, OWN = dict(dynamic_img_size=True), (96, 128), None
# family: (arch, how it is made smaller, size of images; OWN: that of the net)
FAMILIES = {
    'ViT': ('vit_tiny_patch16_224', dict(depth=3, **FREE), WIDE),
    'ViT, mean of patches': ('vit_wee_patch16_reg1_gap_256', dict(depth=2, **FREE), WIDE),
    'ViT, relative positions': ('vit_relpos_small_patch16_224', dict(depth=2), OWN),
    'ViT on a ResNet': ('vit_tiny_r_s16_p8_224', dict(depth=2, **FREE), WIDE),
    'DeiT': ('deit_tiny_patch16_224', dict(depth=2, **FREE), WIDE),
    'DeiT, distilled': ('deit_tiny_distilled_patch16_224', dict(depth=2), OWN),
    'DeiT III': ('deit3_small_patch16_224', dict(depth=2, **FREE), WIDE),
    'DINOv2, registers': ('vit_small_patch14_reg4_dinov2', dict(depth=2, **FREE), (98, 126)),
    'DINOv3': ('vit_small_patch16_dinov3', dict(depth=2, **FREE), WIDE),
    'EVA-02': ('eva02_tiny_patch14_224', dict(depth=2, **FREE), (98, 126)),
    'Perception Encoder': ('vit_pe_core_tiny_patch16_384', dict(depth=2, **FREE), WIDE),
    'BEiT': ('beit_base_patch16_224', dict(depth=2, embed_dim=192, num_heads=3), OWN),
    'SigLIP': ('vit_base_patch16_siglip_224', dict(depth=2, embed_dim=192, num_heads=3, **FREE), WIDE),
    'NaFlex': ('naflexvit_base_patch16_gap', dict(depth=2, embed_dim=192, num_heads=3), WIDE),
    'SAM': ('samvit_base_patch16_224', dict(depth=2, embed_dim=192, num_heads=3), OWN),
    'Swin': ('swin_tiny_patch4_window7_224', dict(depths=(1, 1, 1, 1), **FREE), WIDE),
    'Swin v2': ('swinv2_tiny_window8_256', dict(depths=(1, 1, 1, 1), **FREE), WIDE),
    'Swin v2 CR': ('swinv2_cr_tiny_ns_224', dict(depths=(1, 1, 1, 1), **FREE), WIDE),
    'PiT': ('pit_ti_224', {}, OWN),
    'PiT, distilled': ('pit_ti_distilled_224', {}, OWN),
    'CaiT': ('cait_xxs24_224', dict(depth=2), OWN),
    'XCiT': ('xcit_nano_12_p16_224', dict(depth=2), WIDE),
    'TNT': ('tnt_s_patch16_224', dict(depth=2), OWN),
    'ConViT': ('convit_tiny', dict(depth=3, local_up_to_layer=2), OWN),
    'PVT v2': ('pvt_v2_b0', {}, WIDE),
    'Twins': ('twins_svt_small', dict(depths=(1, 1, 2, 1)), WIDE),
    'Hiera': ('hiera_tiny_224', {}, OWN),
    'MViT v2': ('mvitv2_tiny', {}, WIDE),
    'MaxViT': ('maxvit_rmlp_pico_rw_256', {}, OWN),
    'CoAtNet': ('coatnet_nano_rw_224', {}, OWN),
    'LeViT': ('levit_128s', {}, OWN),
    'CrossViT': ('crossvit_tiny_240', {}, OWN),
    'MLP-Mixer': ('mixer_s32_224', {}, OWN),
    'DaViT': ('davit_tiny', dict(depths=(1, 1, 1, 1)), WIDE),
    'MobileViT': ('mobilevit_xxs', {}, WIDE)}
CHEAP = 'ViT', 'DeiT, distilled', 'Swin', 'XCiT', 'PVT v2', 'CrossViT' # asked again by the tests

SETTINGS = dict(ScoreCAM=dict(channels=4, bs=4), SSCAM=dict(channels=2, n=2, bs=4),
                ISCAM=dict(channels=2, n=2, bs=4), AblationCAM=dict(channels=4, bs=4),
                FeedbackCAM=dict(steps=1), SmoothGradCAMPlusPlus=dict(n=2), Mirrored=dict(of=GradCAM))
NEEDS = {'gradients', 'features', 'a linear head', 'ReLU', 'another localizer'}


def localizers():
    "Registered localizers that apply to other people's nets: {name: class}."
    given = lambda e: set(filter(None, e.facts.get('needs', '').split(', '))) <= NEEDS
    return {n: e.load() for n, e in entries('localizer').items() if given(e)}


class Wrong(AssertionError):
    "A cell that is neither right nor refused."


def check(ok, said):
    if not ok: raise Wrong(said)


def made(family):
    "The family's net with random weights, in eval mode, and two images."
    arch, smaller, size = FAMILIES[family]
    torch.manual_seed(0)
    net = timm.create_model(arch, num_classes=5, **smaller).eval()
    for m in net.modules(): # a head or branch of zeros would say nothing
        if isinstance(m, nn.Linear) and m.out_features == 5: nn.init.uniform_(m.weight, -.25, .5)
        if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d) and not m.weight.any(): nn.init.ones_(m.weight)
    size = size or net.pretrained_cfg['input_size'][1:]
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    return net, x


def features(net, name, x, logit=None):
    "A layer's output as hooks of our own see it, and the gradient of a logit there."
    kept = []
    def note(m, args, out):
        kept.append((out[0] if isinstance(out, tuple) else out).detach().requires_grad_())
        return (kept[-1], *out[1:]) if isinstance(out, tuple) else kept[-1]
    handle = net.get_submodule(name).register_forward_hook(note)
    try: logits = net(x)
    finally: handle.remove()
    A = kept[-1]
    G = None if logit is None else torch.autograd.grad(logits[:, logit].sum(), A)[0]
    return A.detach(), G


def as_rows(t, grid):
    "Maps of an output without the adapter: the last h·w tokens; channels last told by the grid."
    if t.ndim == 3: return t[:, t.shape[1] - grid[0]*grid[1]:].transpose(1, 2).unflatten(2, grid)
    return t if tuple(t.shape[2:]) == grid else t.movedim(-1, 1)


def adapter(family, net, x):
    "The layout: timm's own map is found among the outputs, and a changed quarter is seen in its place."
    layout = learn_tokens(net, x)
    last, stages = net.forward_intermediates(x) # maps by timm
    check(tuple(stages[-1].shape[2:]) == layout.grid, f'grid {layout.grid}')
    outs = []
    def note(m, args, out): outs.extend(t for t in (out if isinstance(out, (tuple, list)) else [out])
                                        if isinstance(t, torch.Tensor) and t.ndim in (3, 4))
    hooks = [m.register_forward_hook(note) for m in net.modules() if m is not net]
    try:
        with torch.no_grad(): net(x)
    finally:
        for h in hooks: h.remove()
    equal, refused = 0, 0
    for t in outs:
        try: A = token_maps(t, layout, len(x))
        except ValueError: refused += 1
        else: equal += any(A.shape == s.shape and torch.allclose(A, s, atol=1e-5) for s in stages)
    check(equal, 'no output is a map of timm')
    said = seen_in_place(net, x)
    before = 'none' if not layout.prefix else f'{layout.prefix}{", class token first" if layout.cls else ""}'
    return f'{layout.kind}; {layout.grid[0]}×{layout.grid[1]}; before the patches: {before}{said}'


def quarters(x):
    "The four quarters of the sides of images: (rows, columns), from the upper left."
    h, w = x.shape[-2:]
    return [(slice(i*h//2, (i + 1)*h//2), slice(j*w//2, (j + 1)*w//2)) for i in (0, 1) for j in (0, 1)]


def seen_in_place(net, x):
    "A changed quarter of the image changes the last features there more than other quarters do."
    def last(images):
        with torch.no_grad(): return net.forward_intermediates(images, indices=1, intermediates_only=True)[0]
    plain = torch.full_like(x[:1], .5)
    base, changes = last(plain), []
    for q in quarters(x):
        changed = plain.clone()
        changed[(..., *q)] = x[(slice(0, 1), slice(None), *q)]
        changes.append((last(changed) - base).norm(dim=1)[0])
    own = torch.stack(changes)
    own = own/own.mean((1, 2), keepdim=True) # how much a quarter changes in all does not matter
    own = own - own.mean(0)
    if own.abs().max() < 1e-4: \
        return '; with random weights all positions are alike: the order is as timm says'
    for d, q in zip(own, quarters(own)):
        check(d[q].mean() > d.mean() + 1e-6, 'a change is not seen in its place')
    return ''


def localizer(family, net, x, name):
    "A localizer's raw maps: of the grid, the same in another batch, what the formula says of our own hooks."
    cls = localizers()[name]
    loc = cls(net, **SETTINGS.get(name, {}))
    every = loc.raw(x, [list(range(5))]*2)
    check(every.isfinite().all(), 'not finite')
    c = int(every.flatten(2).std(2).min(0).values.argmax())
    raw = loc.raw(x, c)
    scale = raw.abs().max().clamp(min=1e-9)
    check((raw - every[:, c]).abs().max() <= 1e-3*scale, 'another map among several targets')
    check((loc.raw(x[1:], c)[0] - raw[1]).abs().max() <= .02*scale, 'another map in another batch')
    if not isinstance(loc, LayerLocalizer):
        check(raw.shape[0] == 2, f'shape {tuple(raw.shape)}')
        return f'maps of {raw.shape[1]}×{raw.shape[2]}'
    layer, grid = loc.read[0], tuple(raw.shape[1:])
    check(grid == tuple(learn_tokens(net, x).grid) or grid in learn_tokens(net, x).maps, f'a map of {grid}')
    if type(loc).weigh is not LayerLocalizer.weigh: # it follows from A and G
        A, G = (as_rows(t, grid).float() for t in features(net, layer.name, x, c))
        check((loc.weigh(A, G) - raw).abs().max() <= 1e-3*scale, 'not what the formula says')
        check(name in ('GradCAM', 'XGradCAM', 'LayerCAM', 'GradCAMPlusPlus') or raw.any(), 'zeros')
    return f'{layer}; {grid[0]}×{grid[1]}' + ('' if raw.any() else '; nothing positive with random weights')


def trunk(family, net, x):
    "A `wsol_model` of the family: class maps, a gradient everywhere, and Grad-CAM that equals CAM."
    arch = FAMILIES[family][0]
    torch.manual_seed(0)
    model = wsol_model(arch, 5, verbose=False)
    x = x if FAMILIES[family][2] else torch.rand(2, 3, *net.pretrained_cfg['input_size'][1:])
    logits, maps = model.eval().forward_maps(x)
    mean = torch.allclose(maps.mean((2, 3)), logits, atol=1e-4)
    check(logits.shape == (2, 5) and mean, 'no mean of its maps')
    logits.sum().backward()
    check(all(p.grad is not None for p in model.parameters()), 'a weight without a gradient')
    off = GradCAM(model).raw(x, 1)*maps[0, 0].numel() - (maps[:, 1] - model.head.classifier.bias[1]).relu()
    check(off.abs().max() < 1e-3, 'Grad-CAM is not relu(CAM)/n')
    return f'stride {model.stride}; {maps.shape[2]}×{maps.shape[3]}'


def decoder(family, net, x):
    "F-CAM's decoder on a trunk: full maps, and a gradient in each of its weights."
    x = x if FAMILIES[family][2] else torch.rand(2, 3, *net.pretrained_cfg['input_size'][1:])
    model = FullModel(wsol_model(FAMILIES[family][0], 5, verbose=False)).train()
    full = model(x).full
    check(tuple(full.shape) == (2, 2, x.shape[2]//2, x.shape[3]//2), f'maps of {tuple(full.shape)}')
    full.square().mean().backward()
    check(all(p.grad is not None for p in model.decoder.parameters()), 'a weight without a gradient')
    check(FullMaps(model)(x).shape == (2, *x.shape[2:]), 'maps of another size')
    return 'from a pyramid' if not model.kept else f'from {len(model.kept)} scales'


def peaks(family, net, x):
    "Peak responses, which walk back through convolutions; the peaks alone ask for class maps only."
    model = wsol_model(FAMILIES[family][0], 5, verbose=False).eval()
    peak_responses(model, x[:1], 1)
    return 'walks back through convolutions'


def cell(what, family, net, x):
    "Verdict and reason of one cell."
    run = dict(adapter=adapter, GAP=trunk, FCAM=decoder, peaks=peaks).get(what)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            return 'right', run(family, net, x) if run else localizer(family, net, x, what)
    except Wrong as e: return 'wrong', str(e)
    except (ValueError, TypeError) as e: return 'refused', str(e).replace('\n', ' ')[:300]
    except Exception as e: return 'wrong', f'{type(e).__name__}: {e}'.replace('\n', ' ')[:300]


def whats(): return ['adapter', *sorted(localizers()), 'GAP', 'FCAM', 'peaks']


def rows_of(family, what=None):
    "The rows of a family: (family, arch, what, verdict, reason)."
    net, x = made(family)
    for w in what or whats():
        verdict, reason = cell(w, family, net, x)
        yield dict(family=family, arch=FAMILIES[family][0], what=w, verdict=verdict, reason=reason)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--families', nargs='+', choices=list(FAMILIES), metavar='NAME')
    p.add_argument('--what', nargs='+', choices=whats(), metavar='NAME')
    p.add_argument('--out', type=Path, metavar='CSV', default=results_folder()/'token_support.csv')
    a = p.parse_args()
    rows = Rows(a.out)
    done = {(r['family'], r['what']) for r in rows.read()}
    for family in a.families or FAMILIES:
        todo = [w for w in a.what or whats() if a.families or (family, w) not in done]
        if not todo: continue
        new = list(rows_of(family, todo))
        for r in new:
            rows.add([r | origin('python tools/token_support.py')], family=family, what=r['what'])
            print(*(r[k] for k in ('family', 'what', 'verdict', 'reason')), sep=' · ', flush=True)


if __name__ == '__main__': main()
