"""Layers of the models that people really have: which is read, at which call, and where its channels stand.

Every localizer meets nets with channels last, tokens, functions for modules, one block or one ReLU for all,
signals and volumes, by a declared matrix: a cell is right, or an error that is listed here. What is right is
computed by hand beside it.
"""
import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import raises, same
from test_conformance import LAYERED, LOCALIZERS, TOP_DOWN
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from wsol_nb.cam.gradient import CAM, EigenCAM, GradCAM, LayerCAM
from wsol_nb.cam.score import AblationCAM, ScoreCAM
from wsol_nb.localize.outputs import Hint
from wsol_nb.localize.target import SegmentationTarget
import timm # after wsol_nb.core, see its end
import torchvision
from torchvision.models.inception import InceptionOutputs


class Training(nn.Module):
    "Inception's answer in the form that it has in training."
    def __init__(self):
        super().__init__()
        self.net = torchvision.models.inception_v3(num_classes=5, weights=None, init_weights=False)

    def forward(self, x):
        logits = self.net(x)
        return InceptionOutputs(logits, logits.detach())


class Signal(nn.Module):
    "A classifier of signals (B,2,L)."
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(2, 6, 5, 2, 2), nn.BatchNorm1d(6), nn.ReLU(), nn.MaxPool1d(2),
                                  nn.Conv1d(6, 6, 3, 1, 1), nn.ReLU())
        self.fc = nn.Linear(6, 5)

    def forward(self, x): return self.fc(self.body(x).mean(2))


class Volume(nn.Module):
    "A residual classifier of volumes (B,1,D,H,W) in the manner of MONAI."
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(1, 6, 3, 2, 1), nn.BatchNorm3d(6), nn.ReLU(inplace=True))
        self.conv, self.norm, self.act = nn.Conv3d(6, 6, 3, 1, 1), nn.BatchNorm3d(6), nn.ReLU(inplace=True)
        self.pool, self.fc = nn.AdaptiveAvgPool3d(1), nn.Linear(6, 5)

    def features(self, x):
        x = self.stem(x)
        return self.act(self.norm(self.conv(x)) + x)

    def forward(self, x): return self.fc(self.pool(self.features(x)).flatten(1))


class Shared(nn.Module):
    "One block three times."
    def __init__(self):
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 6, 3, 2, 1), nn.Linear(6, 5)
        self.block = nn.Sequential(nn.Conv2d(6, 6, 3, 1, 1), nn.ReLU())

    def forward(self, x):
        x = self.stem(x)
        for _ in range(3): x = self.block(x)
        return self.fc(x.mean((2, 3)))


class OneReLU(nn.Module):
    "Two convolutions with a ReLU each, which may be one module."
    def __init__(self, one=True):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 6, 3, 1, 1), nn.Linear(6, 5)
        self.relu = nn.ReLU()
        self.last = self.relu if one else nn.ReLU()

    def forward(self, x): return self.fc(self.last(self.b(self.relu(self.a(x)))).mean((2, 3)))


def of_torchvision(name, **kw):
    return lambda: getattr(torchvision.models, name)(num_classes=5, weights=None, **kw)


def of_timm(name): return lambda: timm.create_model(name, num_classes=5)


def tiny_vit():
    "torchvision's ViT, which has no forward_intermediates."
    return torchvision.models.VisionTransformer(64, 16, 2, 2, 32, 64, num_classes=5)


def deeplab():
    nets = torchvision.models.segmentation
    return nets.deeplabv3_resnet50(num_classes=5, weights=None, weights_backbone=None)


# how a net is made, the size of its images, the layer that is read and its grid
NETS = dict(
    resnet18=(of_torchvision('resnet18'), (3, 64, 96), 'layer4', (2, 3)),
    densenet121=(of_torchvision('densenet121'), (3, 64, 96), 'relu(features)', (2, 3)),
    inception_v3=(Training, (3, 128, 139), 'net.Mixed_7c', (2, 3)),
    deeplabv3=(deeplab, (3, 33, 41), 'classifier.3', (5, 6)),
    swin_t=(of_torchvision('swin_t'), (3, 64, 96), 'permute', (2, 3)),
    convnext_tiny=(of_torchvision('convnext_tiny'), (3, 64, 96), 'features', (2, 3)),
    mambaout_femto=(of_timm('mambaout_femto'), (3, 64, 96), 'stages', (2, 3)),
    hiera_tiny=(of_timm('hiera_tiny_224'), (3, 224, 224), 'blocks.11', (7, 7)),
    xcit_nano=(of_timm('xcit_nano_12_p16_224'), (3, 64, 96), 'cls_attn_blocks.1.norm1', (4, 6)),
    twins_svt_small=(of_timm('twins_svt_small'), (3, 64, 96), 'norm', (2, 3)),
    pit_ti=(of_timm('pit_ti_224'), (3, 224, 224), 'transformers.2.blocks.3.norm1', (7, 7)),
    vit_b_16=(tiny_vit, (3, 64, 64),
              'encoder.layers.encoder_layer_1.ln_1', (4, 4)),
    signal=(Signal, (2, 64), 'body', (16,)),
    volume=(Volume, (1, 12, 14, 16), 'act', (6, 7, 8)),
    shared=(Shared, (3, 24, 32), 'block[-1]', (12, 16)),
    one_relu=(OneReLU, (3, 24, 32), 'relu(b)', (12, 16)))
TOKENS = ['hiera_tiny', 'xcit_nano', 'twins_svt_small', 'pit_ti', 'vit_b_16']
MAPPED = [n for n in NETS if n not in TOKENS]

# what does not apply, and what is said; the localizer inside of `Mirrored` is Grad-CAM
AT_LAYERS = [*LAYERED, 'Mirrored']
# positive weights on features that are mostly negative: ReLU leaves nothing
NOTHING = {(l, n) for l in ('GradCAMPlusPlus', 'SmoothGradCAMPlusPlus', 'ScoreCAM', 'ISCAM', 'SSCAM')
           for n in ('swin_t', 'convnext_tiny', 'mambaout_femto', 'twins_svt_small')}
EXCITATION = ('ExcitationBackprop', 'Contrastive')
NOT_RELU = ('swin_t', 'convnext_tiny', 'mambaout_femto')
WRONG = {(l, n): (ValueError, 'is defined behind a ReLU|has no excitation rule')
         for n in (*NOT_RELU, *TOKENS) for l in EXCITATION}
WRONG |= {('FeedbackCAM', n): (ValueError, 'no ReLU ran in') for n in (*NOT_RELU, *TOKENS)}
WRONG |= {(l, 'deeplabv3'): (ValueError, 'has no excitation rule') for l in EXCITATION}
WRONG |= {('CAM', n): (ValueError, 'are no linear layer of the average of')
          for n in ('deeplabv3', 'convnext_tiny', 'mambaout_femto', *TOKENS) if n != 'twins_svt_small'}
_nets = {}


def net(name):
    "A net with random weights that is built once, in eval mode; classes have evidence for and against them."
    if name not in _nets:
        torch.manual_seed(1)
        model = NETS[name][0]().eval()
        last = [m for m in model.modules() if getattr(m, 'weight', torch.empty(0)).shape[:1] == (5,)]
        for m in last: nn.init.uniform_(m.weight, -.25, .5)
        for m in model.modules(): # a stack that is not trained dies out
            if isinstance(m, (nn.BatchNorm2d, nn.BatchNorm3d)): nn.init.uniform_(m.bias, -1, .5)
        _nets[name] = model
    return _nets[name]


def draw(name): return torch.rand(2, *NETS[name][1], generator=torch.Generator().manual_seed(2))


# a class for which some patches speak; elsewhere it is 1
CLASS = dict(xcit_nano=4, twins_svt_small=0, vit_b_16=4)


def target(name, x):
    if name != 'deeplabv3': return CLASS.get(name, 1)
    region = torch.zeros(x.shape[-2:])
    region[8:20, 10:30] = 1
    return SegmentationTarget(1, region)


@pytest.mark.filterwarnings('ignore::wsol_nb.localize.outputs.Hint')
@pytest.mark.parametrize('name', NETS)
@pytest.mark.parametrize('loc', [l for l in TOP_DOWN if l != 'Refined']) # shows a net pictures of other sizes
def test_every_localizer(loc, name):
    make, size, layer, grid = NETS[name]
    x = draw(name)
    l = LOCALIZERS[loc](net(name))
    if (loc, name) in WRONG:
        error, message = WRONG[loc, name]
        with pytest.raises(error, match=message): l.raw(x[:1], target(name, x))
        return
    raw = l.raw(x, target(name, x))
    assert raw.isfinite().all() and raw.shape == (2, *(grid if loc in AT_LAYERS else x.shape[2:]))
    if loc in AT_LAYERS: assert f'layer={layer}: ' in repr(l)
    says = loc != 'AblationCAM' and (loc, name) not in NOTHING # eight channels may say nothing
    assert not says or raw.flatten(1).std(1).min() > 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in l.model.modules())


# Grad-CAM by hand: features (B,K,…) of images, and logits of features
BY_HAND = dict(
    resnet18=(lambda m, x: nn.Sequential(*list(m.children())[:-2])(x), lambda m, A: m.fc(A.mean((2, 3)))),
    densenet121=(lambda m, x: F.relu(m.features(x)), lambda m, A: m.classifier(A.mean((2, 3)))),
    swin_t=(lambda m, x: m.norm(m.features(x)).permute(0, 3, 1, 2), lambda m, A: m.head(A.mean((2, 3)))),
    convnext_tiny=(lambda m, x: m.features(x), lambda m, A: m.classifier(A.mean((2, 3), keepdim=True))),
    mambaout_femto=(lambda m, x: m.forward_features(x).permute(0, 3, 1, 2),
                    lambda m, A: m.forward_head(A.permute(0, 2, 3, 1))),
    deeplabv3=(lambda m, x: nn.Sequential(*list(m.classifier)[:4])(m.backbone(x)['out']),
               lambda m, A: F.interpolate(m.classifier[4](A), (33, 41), mode='bilinear')),
    signal=(lambda m, x: m.body(x), lambda m, A: m.fc(A.mean(2))),
    volume=(lambda m, x: m.features(x), lambda m, A: m.fc(A.mean((2, 3, 4)))),
    shared=(lambda m, x: m.block(m.block(m.block(m.stem(x)))), lambda m, A: m.fc(A.mean((2, 3)))),
    one_relu=(lambda m, x: m.b(m.a(x).relu()).relu(), lambda m, A: m.fc(A.mean((2, 3)))))


def gradcam(A, G): return torch.einsum('bkn,bk->bn', A.flatten(2), G.flatten(2).mean(2)).relu().reshape(
    len(A), *A.shape[2:])


def by_hand(name, x, c):
    "Grad-CAM as the paper writes it."
    features, head = BY_HAND[name]
    with torch.no_grad(): A = features(net(name), x).clone()
    A.requires_grad_()
    logits = head(net(name), A)
    score = c(logits) if callable(c) else logits[:, c]
    G, = torch.autograd.grad(score.sum(), A)
    return gradcam(A.detach(), G)


@pytest.mark.filterwarnings('ignore::wsol_nb.localize.outputs.Hint')
@pytest.mark.parametrize('name', BY_HAND)
def test_gradcam_by_hand(name):
    x = draw(name)
    expected = by_hand(name, x, target(name, x))
    assert expected.flatten(1).std(1).min() > 0
    same(GradCAM(net(name)).raw(x, target(name, x)), expected, 1e-5*max(1, expected.max().item()))


@pytest.mark.parametrize('name', [n for n in MAPPED if n not in ('shared', 'one_relu')]) # no guess there
def test_one_pass_finds_and_reads(name):
    "A fresh localizer runs the net once, as a warm one does."
    model, x, passes = net(name), draw(name), []
    h = model.register_forward_hook(lambda *a: passes.append(1))
    try: GradCAM(model).raw(x, target(name, x))
    finally: h.remove()
    assert len(passes) == 1


# a layer that runs several times

def test_calls_of_a_layer():
    "Each call has a gradient of its own; without `call=` there is no answer."
    model, x = net('shared'), draw('shared')
    raises("layer='block': it ran 3 times in the forward pass; call=0 to call=2 chooses one",
           GradCAM(model, 'block').raw, x)
    with torch.no_grad():
        a = model.block(model.stem(x))
        outs = [a, model.block(a), model.block(model.block(a))]
    maps = []
    for i, out in enumerate(outs):
        A = b = out.clone().requires_grad_()
        for _ in range(2 - i): b = model.block(b)
        maps.append(gradcam(A.detach(), torch.autograd.grad(model.fc(b.mean((2, 3)))[:, 1].sum(), A)[0]))
    for call in (0, 1, 2, -1, -3): same(GradCAM(model, 'block', call=call).raw(x, 1), maps[call], 1e-6)
    every = GradCAM(model, model.block, call='all')
    same(every.raw(x, 1), torch.stack(maps, 1), 1e-6)
    assert every.raw(x, [[1, 2], [0, 1]]).shape == (2, 2, 3, 12, 16) and every(x, 1).shape == (2, 3, 24, 32)
    raises("call=3: 'block' ran 3 times", GradCAM(model, 'block', call=3).raw, x)
    raises('call=0.5: expected the number of a call', GradCAM, model, 'block', call=.5)
    with pytest.warns(Hint, match="reads 'block': it runs 3 times"): GradCAM(model)(x)


@pytest.mark.parametrize('loc', [l for l in LAYERED if l not in ('CAM', 'SmoothGradCAMPlusPlus')])
def test_a_call_of_every_localizer(loc):
    "The middle call of a block is the same as the middle one of three blocks with the same weights."
    model, x = net('shared'), draw('shared')

    class Apart(Shared):
        def __init__(self):
            super().__init__()
            self.load_state_dict(model.state_dict())
            self.blocks = nn.Sequential(*(copy.deepcopy(self.block) for _ in range(3)))

        def forward(self, x): return self.fc(self.blocks(self.stem(x)).mean((2, 3)))

    apart = LOCALIZERS[loc](Apart().eval(), 'blocks.1').raw(x, 1)
    same(LOCALIZERS[loc](model, 'block', call=1).raw(x, 1), apart, 1e-5)


@pytest.mark.parametrize('loc', TOP_DOWN)
def test_one_relu_is_as_good_as_two(loc):
    model, x = net('one_relu'), draw('one_relu')
    apart = OneReLU(one=False).eval()
    apart.load_state_dict(model.state_dict())
    same(LOCALIZERS[loc](model).raw(x, 1), LOCALIZERS[loc](apart).raw(x, 1), 1e-5)


# channels last

def test_channels_last():
    "Swin's last norm has the grid of the image, found or said, and the values of pytorch-grad-cam."
    swin, x = net('swin_t'), torch.rand(1, 3, 96, 96)
    raw = GradCAM(swin, 'norm').raw(x, 1)
    assert raw.shape == (1, 3, 3) # not (1,3,768)
    same(GradCAM(swin, 'norm', layout='bhwc').raw(x, 1), raw)
    same(GradCAM(swin, 'norm', layout=lambda t: t.permute(0, 3, 1, 2)).raw(x, 1), raw, 1e-6)
    same(GradCAM(swin).raw(x, 1), raw, 1e-6) # its default is the permutation behind
    raises("layer='norm': its output is", GradCAM(swin, 'norm', layout=lambda t: t.flatten(1)).raw, x)
    convnext = net('convnext_tiny') # a norm inside a block
    assert GradCAM(convnext, 'features.7.2.block.2').raw(draw('convnext_tiny'), 1).shape == (2, 2, 3)
    pgc = pytest.importorskip('pytorch_grad_cam')
    one = pgc.utils.model_targets.ClassifierOutputTarget(1)
    with pgc.GradCAM(swin, [swin.norm], reshape_transform=lambda t: t.permute(0, 3, 1, 2)) as peer:
        theirs = torch.from_numpy(peer(x, targets=[one]))
    close = torch.corrcoef(torch.stack([GradCAM(swin, 'norm')(x, 1).flatten(), theirs.flatten()]))[0, 1]
    assert close > .98 # their resize is bilinear


def test_a_layout_that_nothing_tells():
    class Odd(nn.Module):
        def __init__(self, fixed):
            super().__init__()
            self.conv, self.mix, self.fixed = nn.Conv2d(3, 6, 3, 2, 1), nn.Identity(), fixed

        def forward(self, x):
            if self.fixed and x.shape[-1] != self.fixed: raise TypeError('only one size')
            return torch.einsum('bhwk->bk', self.mix(torch.einsum('bkhw->bhwk', self.conv(x))).square())

    x = torch.rand(1, 3, 12, 12) # the features are (1,6,6,6)
    raises("say it with layout='bchw' or layout='bhwc'", GradCAM(Odd(12), 'mix').raw, x)
    said = GradCAM(Odd(12), 'mix', layout='bhwc')
    free = GradCAM(copy.deepcopy(said.model), 'mix')
    free.model.fixed = None
    same(free.raw(x, 1), said.raw(x, 1)) # a second size of image tells



# which layer

def test_the_layer_does_not_depend_on_the_first_image():
    model, big, small = net('resnet18'), draw('resnet18'), torch.rand(1, 3, 32, 32)
    fresh = GradCAM(model).raw(big, 1)
    loc = GradCAM(model)
    with pytest.warns(Hint, match='later layers have a single position'): loc(small, 1)
    assert loc.layers == ['layer3'] and 'several positions in images of this size' in repr(loc)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        same(loc.raw(big, 1), fresh)
        loc(small, 1) # it was said
    loc(big)
    assert loc.layers == ['layer4'] and 'layer=layer4: what the classifier pools' in repr(loc)


def test_another_branch():
    "A layer that was found and does not run this time is found anew."
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc, self.left = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 3), nn.Linear(6, 5), True

        def forward(self, x): return self.fc((self.a if self.left else self.b)(x).mean((2, 3)))

    model, x = Branches(), torch.rand(1, 3, 9, 9)
    loc = GradCAM(model)
    for left, layer in ((True, 'a'), (False, 'b')):
        model.left = left
        same(loc.raw(x, 1), GradCAM(model, layer).raw(x, 1))
        assert loc.layers == [layer]


class Towers(nn.Module):
    "Two towers, and an auxiliary head that runs last."
    def __init__(self, both):
        super().__init__()
        self.a, self.b, self.aux = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3)
        self.fc, self.both = nn.Linear(12 if both else 6, 5), both

    def forward(self, x):
        maps = [self.a(x).relu(), self.b(x).relu()][:1 + self.both]
        logits = self.fc(torch.cat([m.mean((2, 3)) for m in maps], 1))
        self.loss = self.aux(maps[0]).sum()
        return logits


def test_towers_and_auxiliary_heads():
    x = torch.rand(2, 3, 9, 9)
    loc = GradCAM(Towers(both=True))
    with pytest.warns(Hint, match=r"reads 'b': the classifier pools relu\(a\) too; layer= chooses"): loc(x)
    assert 'layer=relu(b): what the classifier pools beside relu(a), ' in repr(loc)
    loc = GradCAM(Towers(both=False))
    loc(x)
    assert 'layer=relu(a): what the classifier pools, ' in repr(loc) # not what ran last


def test_features_are_rectified_as_the_net_rectifies_them():
    "DenseNet's ReLU is a function: without it the map is another one."
    model, x = net('densenet121'), draw('densenet121')
    whole, bare = GradCAM(model), GradCAM(model, 'features')
    same(whole.raw(x, 1), by_hand('densenet121', x, 1), 1e-6)
    assert (whole(x, 1) - bare(x, 1)).abs().max() > .1


def test_probes_and_switches():
    "What keeps the gradient away is named."
    class Probe(nn.Module):
        def __init__(self, switch, late):
            super().__init__()
            self.conv, self.fc, self.switch, self.late = nn.Conv2d(3, 6, 3), nn.Linear(6, 5), switch, late

        def forward(self, x):
            with self.switch():
                a = self.conv(x).relu()
                if self.late: return self.fc(a.mean((2, 3))).clone()
            return self.fc(a.mean((2, 3)))

    x = torch.rand(1, 3, 9, 9)
    model = nn.Sequential(nn.Identity(), Probe(torch.no_grad, late=False))
    raises("the forward pass of '1' runs under torch.no_grad", GradCAM(model).raw, x)
    model = nn.Sequential(nn.Identity(), Probe(torch.inference_mode, late=True))
    raises("runs under torch.inference_mode", GradCAM(model).raw, x)


@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::UserWarning')
def test_scripted_and_quantised_parts():
    x = torch.rand(1, 3, 9, 9)
    stem = torch.jit.script(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU()))
    scripted = nn.Sequential(stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
    raises("'0' is scripted or quantised and cannot be watched", GradCAM(scripted).raw, x)
    raises("layer='0.0': '0' is scripted, so nothing in it can be watched", GradCAM, scripted, '0.0')
    end = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)
    more = nn.Sequential(stem, nn.Conv2d(6, 6, 1), nn.ReLU(), *end)
    assert GradCAM(more, '2').raw(x, 1).shape == (1, 7, 7)
    plain = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), *end)
    quantised = torch.ao.quantization.quantize_dynamic(plain, {nn.Linear})
    raises("'4' is quantised and has none", GradCAM(quantised, '1').raw, x)
    same(EigenCAM(quantised, '1').raw(x), EigenCAM(plain, '1').raw(x)) # asks for none


# reparametrised layers

MADE = dict(spectral_hook=spectral_norm, weight_hook=weight_norm, spectral=parametrizations.spectral_norm,
            weight=parametrizations.weight_norm, orthogonal=parametrizations.orthogonal,
            pruned=lambda m: prune.l1_unstructured(m, 'weight', .5))


@pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning')
@pytest.mark.parametrize('made', MADE)
@pytest.mark.parametrize('loc', [ScoreCAM, AblationCAM])
def test_reparametrised_layers(loc, made):
    "Such a convolution before a BatchNorm gives the map that a plain one with the same weight gives."
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3),
                          nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(6, 5))
    for at in (0, 3, 8): MADE[made](model[at])
    x = torch.rand(2, 3, 12, 12)
    model.eval()(x)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), *model[1:3], nn.Conv2d(4, 6, 3), *model[4:8],
                          nn.Linear(6, 5))
    for at in (0, 3, 8): plain[at].weight.data = model[at].weight.detach().clone()
    for at in (3, 8): plain[at].bias.data = model[at].bias.detach().clone()
    same(loc(model).raw(x, 1), loc(plain.eval()).raw(x, 1), 1e-5)
    assert parametrize.is_parametrized(model[0]) or 'weight' not in model[0]._parameters


# signals, volumes, several layers

def test_score_maps_of_signals_and_volumes():
    for name in ('signal', 'volume'):
        x = draw(name)
        maps = GradCAM(net(name))(x, 1)
        assert maps.shape == (2, *x.shape[2:]) and maps.max() == 1 and maps.min() == 0
        for loc in (LayerCAM, ScoreCAM):
            assert loc(net(name))(x, [[0, 1], [2, 3]]).shape == (2, 2, *x.shape[2:])
    raises(r'expected a float tensor (B,C,L)', GradCAM(net('signal')), torch.rand(2, 2, 8, 8))
    raises(r'expected a float tensor (B,C,D,H,W)', GradCAM(net('volume')), torch.rand(2, 1, 8, 8))
    cam, grad = (loc(net('signal')).raw(draw('signal'), 1) for loc in (CAM, GradCAM))
    same(cam.relu()/16, grad, 1e-6)


@pytest.mark.parametrize('loc', [l for l in LAYERED if l not in ('CAM', 'LayerCAM', *EXCITATION)])
def test_several_layers_are_averaged(loc):
    "As pytorch-grad-cam does it: each positive, scaled and at the image's size."
    model, x = net('resnet18'), draw('resnet18')
    each = [LOCALIZERS[loc](model, l).raw(x, 1).relu() for l in ('layer3', 'layer4')]

    def scaled(m):
        lo, hi = m.amin((1, 2), keepdim=True), m.amax((1, 2), keepdim=True)
        share = (m - lo)/(hi - lo).clamp(min=1e-30)
        return F.interpolate(share[:, None], x.shape[2:], mode='bilinear')[:, 0]

    same(LOCALIZERS[loc](model, ['layer3', 'layer4']).raw(x, 1), sum(map(scaled, each))/2, 1e-5)


