"""Transformers: layouts, the layer that is read, bodies that train; what the notebooks cannot see.

Nets are timm's with one or two blocks and random weights; the table of all families is made by
tools/token_support.py, and tests/test_conformance.py asks a part of it again.
"""
import copy

import pytest
import torch
from helpers import fit_quietly, images, raises, same, wsol
from torch import nn

from wsol_nb.cam.gradient import CAM, EigenCAM, GradCAM, HiResCAM
from wsol_nb.cam.score import AblationCAM, ScoreCAM
from wsol_nb.data.loaders import WSOLDataLoaders
from wsol_nb.dense.fcam import FCAM
from wsol_nb.localize.base import HeadMaps
from wsol_nb.nets.decoder import FullMaps, FullModel
from wsol_nb.nets.model import export_model, wsol_model
from wsol_nb.nets.tokens import learn_tokens, token_maps
from wsol_nb.registry import entries
from wsol_nb.train.learner import wsol_learner
from wsol_nb.train.method import GAP, adam
from wsol_nb.train.run import load_run, save_run
import timm # after wsol_nb.core, see its end


def vit(**kw):
    torch.manual_seed(0)
    kw = dict(num_classes=5, depth=3, dynamic_img_size=True) | kw
    return timm.create_model('vit_tiny_patch16_224', **kw).eval()


# layouts

def test_permuting_patches_permutes_maps():
    "Without position embeddings patches know no place: maps of rearranged patches are rearranged."
    net = vit()
    nn.init.zeros_(net.pos_embed)
    x = images(64, 64, 1)
    cells = x.unfold(2, 16, 16).unfold(3, 16, 16).flatten(2, 3) # 1,3,n,16,16
    order = torch.randperm(16)
    y = cells[:, :, order].unflatten(2, (4, 4)).permute(0, 1, 2, 4, 3, 5).reshape(1, 3, 64, 64)
    for loc in (GradCAM, HiResCAM, EigenCAM):
        a, b = (loc(net).raw(i, 1).flatten() for i in (x, y))
        same(a[order], b, 1e-5*max(1e-3, a.abs().max()))


def test_registers_and_class_token_are_no_patches():
    for reg in (0, 4):
        net = vit(reg_tokens=reg, class_token=True)
        layout = learn_tokens(net, images(64, 96))
        assert layout.prefix == 1 + reg and layout.cls and layout.grid == (4, 6)
        t = net.forward_features(images(64, 96))
        same(token_maps(t, layout).flatten(2).transpose(1, 2), t[:, 1 + reg:])


def test_learnt_once_and_the_net_is_left_as_it_was():
    net, calls = vit().train(), []
    net.blocks[0].eval()
    net.blocks[0].register_forward_hook(lambda *a: calls.append(1))
    modes = [m.training for m in net.modules()]
    first = learn_tokens(net, images(64, 96))
    n = len(calls)
    assert learn_tokens(nn.Sequential(net), images(64, 96)) is first and len(calls) == n == 1
    assert modes == [m.training for m in net.modules()]
    assert learn_tokens(net, images(96, 64)).grid == (6, 4) and len(calls) == 2
    assert sum(len(m._forward_hooks) for m in net.modules()) == 1 # that of this test


@pytest.mark.parametrize('arch, size, said', [
    ('vit_tiny_patch16_224', (64, 96), 'VisionTransformer is made for images of 224×224'),
    ('cait_xxs24_224', (64, 96), 'Cait is made for images of 224×224'),
    ('pit_ti_224', (64, 96), 'PoolingVisionTransformer is made for images of 224×224')])
def test_a_size_that_is_refused_is_named(arch, size, said):
    net = timm.create_model(arch, num_classes=5)
    raises(said, learn_tokens, net, images(*size))
    assert not any(m._forward_hooks for m in net.modules()) and net.training


# the layer that is read

def test_warm_is_one_pass():
    "What is found for a size is kept: then a call is one pass, as for a CNN."
    net, passes = vit(), []
    net.register_forward_hook(lambda *a: passes.append(1))
    loc = GradCAM(net)
    first = loc.raw(images(64, 96), 1)
    passes.clear()
    same(loc.raw(images(64, 96), 1), first)
    assert len(passes) == 1


def test_a_head_of_zeros_has_the_same_layer():
    "The layer follows from what is read, not from weights that are not there yet."
    net = vit()
    nn.init.zeros_(net.head.weight)
    loc = GradCAM(net)
    assert not loc.raw(images(64, 96), 1).any() and loc.layers == ['blocks.2.norm1']


@pytest.mark.parametrize('loc', [GradCAM, ScoreCAM, AblationCAM, EigenCAM])
def test_wrapped_half_and_grad_modes(loc):
    net, x = vit(), images(64, 96, 2)
    kw = dict(channels=4) if loc in (ScoreCAM, AblationCAM) else {}
    expected = loc(net, **kw).raw(x, 1)
    same(loc(nn.DataParallel(net), **kw).raw(x, 1), expected, 1e-6)
    with torch.no_grad(): same(loc(net, **kw).raw(x, 1), expected, 1e-6)
    with torch.inference_mode(): same(loc(net, **kw).raw(x, 1).clone(), expected, 1e-6)
    low = loc(copy.deepcopy(net).bfloat16(), **kw).raw(x, 1)
    assert torch.cosine_similarity(low.flatten(1), expected.flatten(1)).min() > .9 or not expected.any()
    assert not any(m._forward_hooks for m in net.modules())


def test_gradients_flow_through_maps():
    net = vit()
    maps = HiResCAM(net).raw(images(64, 96), 1, create_graph=True)
    maps.square().sum().backward()
    assert net.blocks[0].attn.qkv.weight.grad.abs().sum() > 0


def test_named_layers():
    "Any block by name; what is no map of positions is refused, and says what it is."
    net, x = vit(), images(64, 96, 2)
    for name in ('blocks.0', 'blocks.1.norm2', 'blocks.1.mlp', 'patch_embed.proj', 'norm_pre'):
        assert GradCAM(net, name).raw(x, 1).shape == (2, 4, 6), name
    net.blocks[1].attn.fused_attn = False
    raises('(2, 3, 25, 25) of VisionTransformer are no maps', GradCAM(net, 'blocks.1.attn.attn_drop').raw, x)
    pit = timm.create_model('pit_ti_224', num_classes=5).eval()
    assert GradCAM(pit, 'transformers.1').raw(images(224, 224, 1), 1).shape == (1, 14, 14) # of a pair
    swin = timm.create_model('swin_tiny_patch4_window7_224', num_classes=5, depths=(1, 1, 1, 1)).eval()
    raises("layer='layers.1.blocks.0.attn'", GradCAM(swin, 'layers.1.blocks.0.attn').raw, images(224, 224, 2))


def test_ablation_silences_patches_and_keeps_the_prefix():
    "By hand: a hook that zeroes one channel of the patches, not of the class token."
    net, x = vit(), images(64, 96, 1)
    def logits(k=None):
        def silence(m, args, out):
            out = out.clone()
            if k is not None: out[:, 1:, k] = 0
            return out
        h = net.blocks[2].norm1.register_forward_hook(silence)
        try: return net(x)[0, 1]
        finally: h.remove()
    with torch.no_grad():
        A = token_maps(net.blocks[2].norm1(net.blocks[1](net.blocks[0](net._pos_embed(net.patch_embed(x))))),
                       learn_tokens(net, x))
        whole = logits()
        w = torch.stack([(whole - logits(k))/whole.abs() for k in range(192)])
    expected = torch.einsum('k,kn->n', w, A[0].flatten(1)).relu().view(1, 4, 6)
    same(AblationCAM(net).raw(x, 1), expected, 1e-3*expected.max())


# bodies

@pytest.mark.parametrize('head', [n for n in entries('head')])
def test_every_head_learns_on_patches(head):
    cls = entries('head')[head].load()
    model = wsol_model('test_vit', 5, head=cls, verbose=False)
    x, y = images(64, 96, 4), torch.tensor([0, 1, 2, 3])
    logits, maps = model.train().forward_maps(x)
    assert logits.shape == (4, 5) and maps.shape == (4, 5, 4, 6)
    nn.functional.cross_entropy(logits, y).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert HeadMaps(model)(x, 1).shape == (4, 64, 96)


def test_cam_of_a_trunk_is_its_class_map():
    model, x = wsol_model('test_vit', 5, verbose=False), images(64, 96)
    maps = HeadMaps(model).raw(x, 1)
    same(CAM(model).raw(x, 1) + model.head.classifier.bias[1], maps, 1e-5)
    same(GradCAM(model).raw(x, 1)*24, CAM(model).raw(x, 1).relu(), 1e-5)


def test_a_trunk_is_exported():
    model = wsol_model('test_vit', 5, verbose=False).eval()
    logits, maps = export_model(model, size=(64, 96)).module()(images(64, 96, 3))
    same(logits, model(images(64, 96, 3)), 1e-5)
    assert maps.shape == (3, 5, 4, 6)


def test_gap_and_fcam_train_on_a_vit(world, tmp_path):
    "A classifier, its run, and F-CAM on it: the frozen ViT keeps every bit, the pyramid learns."
    dls = WSOLDataLoaders.from_metadata(world, 'SYNTH', size=64, resize=64, bs=16)
    options = dict(opt_func=adam, localization=False)
    learn = wsol_learner(dls, 'test_vit', GAP(), stride=16, path=tmp_path/'cam', **options)
    fit_quietly(learn)
    run = save_run(learn, tmp_path/'cam')
    first = load_run(run).model
    second = wsol_learner(dls, method=FCAM(stage1=run), wd=0., path=tmp_path/'fcam', **options)
    before = copy.deepcopy(second.model.decoder.pyramid.state_dict())
    fit_quietly(second)
    after = second.model.decoder.pyramid.state_dict()
    assert all(not torch.equal(before[k], after[k]) for k in before)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(),
                                                 second.model.classifier.state_dict().values()))
    again = load_run(save_run(second, tmp_path/'fcam'))
    x, _ = dls.valid.one_batch()
    assert torch.equal(again.localizer()(x), second.localizer()(x))


@pytest.mark.parametrize('arch, scales', [('test_vit', 0), ('pit_ti_224', 3),
                                          ('swin_tiny_patch4_window7_224', 4)])
def test_decoder_on_transformers(arch, scales):
    model = FullModel(wsol_model(arch, 5, verbose=False), frozen=False).train()
    x = images(224, 224, 2)
    full = model(x).full
    assert full.shape == (2, 2, 112, 112) and len(model.kept) == scales
    full.square().mean().backward()
    assert all(p.grad is not None for p in model.decoder.parameters())
    assert FullMaps(model)(x).shape == (2, 224, 224)


def test_the_command_trains_a_vit(world, tmp_path):
    said = wsol('train', '--data', world, '--dataset', 'SYNTH', '--method', 'gap', '--arch', 'test_vit',
                '--pretrained', 'false', '--size', '64', '--bs', '8', '--epochs', '1', '--out', tmp_path/'r')
    assert load_run(tmp_path/'r').model.stride == 16, said


def test_the_shared_weights_fit(real_weights):
    model = wsol_model('vit_tiny_patch16_224', 20, pretrained=True, stride=16, verbose=False)
    assert model.mean.unique().item() == .5 # this net's own
    assert model(images(96, 128)).shape == (3, 20)
