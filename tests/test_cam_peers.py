"""Gradient localizers against pytorch-grad-cam and torchcam: oracles here, never imported by the library.

Where a peer follows the paper, normalised maps agree to 1e-4 on three architectures; where it does not, the
test shows by how much and that the formula is ours. Layers with an MLP or a normalisation behind them (VGG,
ConvNeXt) have gradients that vary over positions.
"""
from functools import partial

import helpers
import numpy as np
import pytest
import torch

from wsol_nb.cam.gradient import (
    CAM, EigenCAM, GradCAM, GradCAMPlusPlus, HiResCAM, LayerCAM, SmoothGradCAMPlusPlus, XGradCAM,
    weighted_sum)
from wsol_nb.cam.choice import feature_layer
from wsol_nb.core import minmax
from wsol_nb.localize.maps import to_score_maps
import timm

pgc = pytest.importorskip('pytorch_grad_cam')
tc = pytest.importorskip('torchcam.methods')
# random nets have tiny gradients, which the peers' ε of 1e-6 to 1e-8 would drown; CAMs are compared at this
# multiple of the score
SCALE = 1e3
_nets = {}


@pytest.fixture(params=['resnet18', 'vgg11_bn', 'densenet121'])
def net(request):
    if request.param not in _nets:
        torch.manual_seed(3)
        model = timm.create_model(request.param, num_classes=6).eval()
        if 'vgg' in request.param: # a narrow MLP head is enough
            model.pre_logits = timm.models.vgg.ConvMlp(512, 64, 3).eval()
            model.head.fc = torch.nn.Linear(64, 6)
        _nets[request.param] = model
    return _nets[request.param]


images = partial(helpers.images, 128, 160, 2, seed=1, draw=torch.randn)
close = partial(helpers.same, tol=1e-4)


def layer_of(net):
    if isinstance(net, Scaled): net = net.net
    return net.get_submodule(feature_layer(net, images()))


class Scaled(torch.nn.Module):
    "The net with logits times SCALE."
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x): return SCALE*self.net(x)


def of_pgc(peer, net, c):
    "pytorch-grad-cam's map at image size."
    targets = [pgc.utils.model_targets.ClassifierOutputTarget(i) for i in c]
    with getattr(pgc, peer)(model=net, target_layers=[layer_of(net)]) as cam:
        return torch.from_numpy(cam(images(), targets=targets))


def of_torchcam(peer, net, c, **kw):
    "torchcam's normalised map at layer size."
    x = images()
    with getattr(tc, peer)(net, target_layer=layer_of(net), **kw) as cam:
        scores = net(x.requires_grad_())
        return cam(c, scores)[0].detach()


def as_pgc(raw): return minmax(to_score_maps(raw, (128, 160), 'early')) # bilinear, then min-max once more


def filled(raw):
    assert raw.flatten(1).std(1).min() > 0, 'an empty map would agree with anything'
    return raw


def classes(net, cls):
    "A class an image for which the map is not empty."
    return cls(net).raw(images(), [list(range(6))]*2).flatten(2).std(2).argmax(1).tolist()


@pytest.mark.parametrize('peer, ours', [('GradCAM', GradCAM), ('GradCAMPlusPlus', GradCAMPlusPlus),
                                        ('XGradCAM', XGradCAM), ('LayerCAM', LayerCAM)])
def test_same_as_pytorch_grad_cam(net, peer, ours):
    big, c = Scaled(net), classes(net, ours)
    close(as_pgc(filled(ours(big).raw(images(), c))), of_pgc(peer, big, c))


@pytest.mark.parametrize('peer, ours', [('GradCAM', GradCAM), ('XGradCAM', XGradCAM), ('LayerCAM', LayerCAM)])
def test_same_as_torchcam(net, peer, ours):
    big, c = Scaled(net), classes(net, ours)
    close(minmax(filled(ours(big).raw(images(), c))), of_torchcam(peer, big, c))


def test_cam_as_torchcam(net):
    if 'VGG' in type(net).__name__: pytest.skip('CAM does not apply to a net with an MLP head')
    raw = filled(CAM(net).raw(images(), [1, 2]))
    with tc.CAM(net, target_layer=layer_of(net), fc_layer=net.get_classifier()) as cam:
        with torch.no_grad(): theirs = cam([1, 2], net(images()))[0]
    close(minmax(raw), theirs)


def test_hirescam_of_pytorch_grad_cam_drops_negative_evidence(net):
    c = classes(net, HiResCAM)
    raw = filled(HiResCAM(net).raw(images(), c))
    assert torch.stack([HiResCAM(net).raw(images(), k) for k in range(6)]).min() < 0, 'ours keeps it'
    close(as_pgc(raw.relu()), of_pgc('HiResCAM', net, c))


def test_torchcam_has_another_gradcam_plus_plus(net):
    "Its α is divided on a copy and stays G²: the weight becomes the sum of relu(G)³."
    big, c = Scaled(net), classes(net, GradCAMPlusPlus)
    seen = GradCAM(big)
    with torch.enable_grad():
        watched = seen.watch(images())
        A, scores = watched.acts[0], watched.logits[range(2), c]
        G, A = torch.autograd.grad(scores.sum(), A)[0], A.detach()
    theirs = of_torchcam('GradCAMpp', big, c)
    close(minmax(weighted_sum(G.relu().pow(3).sum((2, 3)), A).relu()), theirs)
    assert (minmax(filled(GradCAMPlusPlus(big).raw(images(), c))) - theirs).abs().max() > .02


def test_small_gradients_drown_in_the_epsilon_of_pytorch_grad_cam(net):
    "Unscaled, its Grad-CAM++ divides by 2G² + SG³ + 1e-6, and G² is smaller than that."
    c = classes(net, GradCAMPlusPlus)
    ours, theirs = as_pgc(filled(GradCAMPlusPlus(net).raw(images(), c))), of_pgc('GradCAMPlusPlus', net, c)
    assert (ours - theirs).abs().max() > 1e-4


def leading(P):
    "Rows of `P` along the first right singular vector."
    return P@torch.linalg.svd(P, full_matrices=False)[2][0]


def test_eigencam_of_pytorch_grad_cam_is_centred(net):
    "It subtracts the mean feature vector first, which the paper does not, and leaves the sign to chance."
    watched = EigenCAM(net).watch(images())
    A = watched.acts[0].detach().flatten(2).double()
    theirs, ours = of_pgc('EigenCAM', net, [0, 0]), EigenCAM(net).raw(images())
    shape = watched.acts[0].shape[2:]
    for i in range(2):
        P = A[i].T
        centred = leading(P - P.mean(0)).reshape(1, *shape).float()
        either = [as_pgc(m.relu())[0] for m in (centred, -centred)]
        assert min((m - theirs[i]).abs().max() for m in either) < 1e-3
        full = leading(P).abs().reshape(shape).float()
        close(minmax(ours[i]), minmax(full))


def test_one_target_for_a_batch_is_not_silently_wrong(net):
    "pytorch-grad-cam answers one target for two images with an empty second map; here it is an error."
    one = pgc.utils.model_targets.ClassifierOutputTarget(classes(net, GradCAM)[0])
    with pytest.raises(ValueError, match=r'len\(target\)=1: expected one callable an image of 2'):
        GradCAM(net)(images(), targets=[one])
    by_targets = GradCAM(net)(input_tensor=images(), targets=[one, one])
    assert np.array_equal(by_targets, GradCAM(net)(images(), one.category))


@pytest.mark.parametrize('name', ['GradCAM', 'XGradCAM', 'HiResCAM'])
def test_several_layers_are_those_of_pytorch_grad_cam(name):
    "The mean of the layers' maps, each positive, scaled and resized; `target_layers=` is understood."
    torch.manual_seed(3)
    big = Scaled(timm.create_model('resnet18', num_classes=6).eval())
    ours = dict(GradCAM=GradCAM, XGradCAM=XGradCAM, HiResCAM=HiResCAM)[name]
    two = [big.net.layer3, big.net.layer4]
    every = ours(big, target_layers=two).raw(images(), [list(range(6))]*2)
    c = every.flatten(2).std(2).argmax(1).tolist() # for which no map is empty
    one = [pgc.utils.model_targets.ClassifierOutputTarget(i) for i in c]
    with getattr(pgc, name)(model=big, target_layers=two) as cam: theirs = cam(images(), targets=one)
    mine = ours(model=big, target_layers=two)
    close(minmax(filled(mine.raw(images(), c))), torch.from_numpy(theirs))
    same_way = ours(big, target_layers=[big.net.layer4])
    assert torch.equal(same_way(images(), c), ours(big, 'net.layer4')(images(), c))


# transformers: pytorch-grad-cam must be told layer and layout, here both are found

def _rows(h, w): return lambda t: t[:, 1:].transpose(1, 2).unflatten(2, (h, w))
def _last(t): return t.permute(0, 3, 1, 2)


TOKEN_NETS = dict( # how it is made, the layer by the peer's own tutorial, and how its output is laid out
    vit=(lambda: timm.create_model('vit_tiny_patch16_224', num_classes=6, depth=4, dynamic_img_size=True),
         lambda m: m.blocks[-1].norm1, _rows(8, 10)),
    gap=(lambda: timm.create_model('vit_tiny_patch16_224', num_classes=6, depth=4, dynamic_img_size=True,
                                   global_pool='avg'), lambda m: m.blocks, _rows(8, 10)),
    swin=(lambda: timm.create_model('swin_tiny_patch4_window7_224', num_classes=6, depths=(1, 1, 1, 1),
                                    dynamic_img_size=True), lambda m: m.norm, _last))


def token_net(name):
    if name not in _nets:
        torch.manual_seed(3)
        _nets[name] = TOKEN_NETS[name][0]().eval()
    return _nets[name]


def of_pgc_tokens(peer, net, name, c):
    "pytorch-grad-cam's map with its `reshape_transform`."
    _, layer, reshape = TOKEN_NETS[name]
    targets = [pgc.utils.model_targets.ClassifierOutputTarget(i) for i in c]
    with getattr(pgc, peer)(net, target_layers=[layer(token_net(name))], reshape_transform=reshape) as cam:
        return torch.from_numpy(cam(images(), targets=targets))


def best_classes(loc):
    "A class an image for which the map is not empty."
    every = loc.raw(images(), [list(range(6))]*2).relu()
    return every.flatten(2).std(2).argmax(1).tolist()


@pytest.mark.parametrize('peer, ours', [('GradCAM', GradCAM), ('XGradCAM', XGradCAM), ('LayerCAM', LayerCAM),
                                        ('HiResCAM', HiResCAM)])
@pytest.mark.parametrize('name', TOKEN_NETS)
def test_tokens_as_with_reshape_transform(name, peer, ours):
    net = token_net(name)
    big = Scaled(net)
    loc = ours(big)
    c = best_classes(loc)
    raw = loc.raw(images(), c)
    if peer == 'HiResCAM': raw = raw.relu() # see above
    assert big.get_submodule(loc.layers[0]) is TOKEN_NETS[name][1](net) # found, not named
    close(as_pgc(filled(raw)), of_pgc_tokens(peer, big, name, c))


def test_gradcam_plus_plus_behind_a_layer_norm():
    "α = G²/(2G² + SG³) is a share for S ≥ 0; behind a norm it is not, and the peer keeps what is none."
    big = Scaled(token_net('vit'))
    loc = GradCAMPlusPlus(big)
    c = best_classes(loc)
    with torch.enable_grad():
        watched = GradCAM(big).watch(images())
        out, scores = watched.outs[0], watched.logits[range(2), c]
        (A, G), = zip(*(watched.first([t.detach()]) for t in (out, *torch.autograd.grad(scores.sum(), out))))
    S = A.sum((2, 3), keepdim=True)
    den = 2*G**2 + S*G**3
    theirs = weighted_sum((G**2/(den + 1e-6)*G.relu()).sum((2, 3)), A).relu() # 1e-6 is theirs
    # where the denominator passes through zero, rounding is enlarged
    helpers.same(as_pgc(theirs), of_pgc_tokens('GradCAMPlusPlus', big, 'vit', c), 5e-3)
    share = torch.where(den > 0, G**2/torch.where(den > 0, den, 1.), 0.)
    close(minmax(loc.raw(images(), c)), minmax(weighted_sum((share*G.relu()).sum((2, 3)), A).relu()))
    assert (den < 0).any() and (as_pgc(loc.raw(images(), c)) - as_pgc(theirs)).abs().max() > .1
