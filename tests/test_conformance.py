"""Every registered localizer keeps the contract on every net of the support matrix; heads and methods too.

The registry says who is asked, so that a new class is asked without an edit here; NETS says on what (name,
how to make it). The whole contract is asked on small nets; TEN are the architectures that people use, each
asked once. The tables by name hold what is special: cheap settings, nets to which a localizer does not apply
(there the test is the clear error), maps that are empty or rough.
"""
import copy
import difflib
import gc
import json
import resource
import sys

import pytest
import torch
from helpers import images, root, same
from small import small_arch, two_stages
from torch import nn

from wsol_nb.cam.gradient import GradCAM, LayerCAM, XGradCAM, localize_all
from wsol_nb.cam.layers import LayerLocalizer
from wsol_nb.nets.decoder import FullModel
from wsol_nb.localize.base import BoxLocalizer, HeadMaps, Localizer
from wsol_nb.localize.maps import to_score_maps
from wsol_nb.nets.model import wsol_model
from wsol_nb.registry import entries
from wsol_nb.results import read_results
from wsol_nb.train.method import GAP, method_from_dict, method_to_dict
import timm # after wsol_nb.core, see its end
import torchvision

sys.path.insert(0, str(root/'tools'))
import token_support


class Plain(nn.Sequential):
    "A classifier without `forward_maps`."
    def __init__(self):
        body = nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU()
        super().__init__(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(.5), nn.Linear(6, 5))


class Broken(nn.Module):
    "Raises in the middle of a forward pass."
    def __init__(self):
        super().__init__()
        self.conv, self.drop = nn.Conv2d(3, 5, 1), nn.Dropout(.5)

    def forward_maps(self, x):
        self.drop(self.conv(x))
        torch.rand(3)
        raise RuntimeError('broken on purpose')

    def forward(self, x): return self.forward_maps(x)[0]


class Frozen(nn.Module):
    "A net whose logits carry no gradient."
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 6, 3, 2, 1), nn.Linear(6, 5)

    def forward(self, x): return self.fc(self.conv(x).mean((2, 3)).detach())


def timm_net(name): return lambda: timm.create_model(name, num_classes=5)


def torchvision_net(name, **kw):
    return lambda: getattr(torchvision.models, name)(num_classes=5, weights=None, **kw)


def wsol_net(arch): return lambda: wsol_model(arch, 5, stride=ARCHS[arch], verbose=False)


ARCHS = dict(resnet10t=16, mobilenetv2_035=16, vgg11=16, convnext_atto=16, regnetx_002=16, ghostnet_050=16)
TEN = dict(
    resnet18=timm_net('resnet18'),
    resnet50=torchvision_net('resnet50'),
    vgg16=torchvision_net('vgg16'),
    inception_v3=torchvision_net('inception_v3', init_weights=False),
    mobilenetv2_100=timm_net('mobilenetv2_100'),
    efficientnet_b0=timm_net('efficientnet_b0'),
    densenet121=torchvision_net('densenet121'),
    convnext_tiny=timm_net('convnext_tiny'),
    regnety_002=timm_net('regnety_002'),
    ghostnet_100=timm_net('ghostnet_100'))
NETS = {a: wsol_net(a) for a in ARCHS} | dict(Sequential=Plain) | TEN

# who is asked
# what these nets have
GIVEN = {'class maps', 'gradients', 'features', 'a linear head', 'ReLU', 'another localizer'}
# registered, and asked by other tests
ELSEWHERE = dict(QuietMaps='HeadMaps, but for negative classes: tests/test_negev.py')
# small budgets
SETTINGS = dict(ScoreCAM=dict(channels=8, bs=6), SSCAM=dict(channels=4, n=2, std=.5, bs=6),
                ISCAM=dict(channels=4, n=2, bs=6), AblationCAM=dict(channels=8, bs=6),
                FeedbackCAM=dict(steps=2), SmoothGradCAMPlusPlus=dict(n=2), Mirrored=dict(of=GradCAM),
                Refined=dict(by=['flip', 'scales'], of=GradCAM))
VARIANTS = dict(Contrastive=('ExcitationBackprop', dict(contrastive=True))) # name -> (localizer, settings)


def needs(entry): return set(filter(None, entry.facts.get('needs', '').split(', ')))


ALL = {n: e for n, e in entries('localizer').items() if n not in ELSEWHERE}
ASKED = {n: e for n, e in ALL.items() if needs(e) <= GIVEN}
CLASSES = {n: e.load() for n, e in ASKED.items()} | {v: ASKED[of].load() for v, (of, _) in VARIANTS.items()}
NEEDS = {n: needs(ASKED[VARIANTS[n][0] if n in VARIANTS else n]) for n in CLASSES}
HEADS = {n: e.load() for n, e in entries('head').items()}
METHODS = {n: e for n, e in entries('method').items()}


def made_by(name):
    "How a localizer is made: callable of a model and, where it takes one, a layer."
    settings = SETTINGS.get(name, {}) | (VARIANTS[name][1] if name in VARIANTS else {})
    return lambda model, *layer, **more: CLASSES[name](model, *layer, **settings, **more)


LOCALIZERS = {n: made_by(n) for n in CLASSES}
CLASS_MAPS = [l for l in LOCALIZERS if 'class maps' in NEEDS[l]] # only of nets with `forward_maps`
TOP_DOWN = [l for l in LOCALIZERS if l not in CLASS_MAPS] # apply to other people's nets
LAYERED = [l for l in TOP_DOWN if issubclass(CLASSES[l], LayerLocalizer)] # and take a layer of their own

# what is special
CLASS_FREE = {'EigenCAM', 'DeepMILHead', 'FullModel'} # the same map whatever the class
MASKING = {'ScoreCAM', 'SSCAM', 'ISCAM'} # masks of features, whatever the head
UNSUPPORTED = {(l, a): (TypeError, 'no forward_maps') for l in CLASS_MAPS for a in ('Sequential', *TEN)}
UNSUPPORTED |= {('CAM', a): (ValueError, 'are no linear layer of the average of')
                for a in ('vgg16', 'convnext_tiny', 'ghostnet_100')}
UNSUPPORTED |= {(l, a): (ValueError, 'is defined behind a ReLU')
                for a in ('efficientnet_b0', 'convnext_tiny') for l in ('ExcitationBackprop', 'Contrastive')}
UNSUPPORTED |= {('FeedbackCAM', a): (ValueError, 'no ReLU ran in')
                for a in ('efficientnet_b0', 'convnext_tiny')}
# positive weights on features that are mostly negative: ReLU leaves nothing
EMPTY = {(l, 'convnext_tiny') for l in ('GradCAMPlusPlus', 'SmoothGradCAMPlusPlus')}
EMPTY |= {('AblationCAM', 'ghostnet_100')} # eight of 160 channels, which are negative
# the image's own gradient: rounding turns ReLUs and maxima over, all through a random net
ROUGH = {'FeedbackCAM'}

# on what
SMALL = {l: ['resnet10t', 'mobilenetv2_035', 'Sequential'] for l in TOP_DOWN}
SMALL |= {l: list(ARCHS) for l in CLASS_MAPS}
SMALL |= dict(SSCAM=['resnet10t'], ISCAM=['resnet10t'])
LABELS = {n: dict(MaxHead='MaxPool').get(n, n.removesuffix('Head')) for n in HEADS} # in the names of tests


def with_head(head, arch): return lambda: wsol_model(arch, 5, stride=16, head=head, verbose=False)
def with_decoder(arch): return lambda: FullModel(wsol_model(arch, 5, stride=16, verbose=False), frozen=False)


TWO = ('resnet10t', 'mobilenetv2_035')
HEAD_NETS = {f'{LABELS[n]}-{a}': with_head(h, a) for n, h in HEADS.items() if n != 'GAPHead' for a in TWO}
HEAD_NETS |= {f'FullModel-{a}': with_decoder(a) for a in TWO}
PAIRS = [(l, n) for l in LOCALIZERS for n in SMALL[l] if (l, n) not in UNSUPPORTED]
PAIRS += [('HeadMaps', n) for n in HEAD_NETS] # a head's maps do not depend on who else reads the net
one_net = pytest.mark.parametrize('pair', [(l, 'resnet10t') for l in LOCALIZERS], ids=lambda p: p[0])
layered = pytest.mark.parametrize('name', LAYERED)
_nets = {}


def build(name):
    "A net with random weights whose classes find evidence for and against them, so that no map is empty."
    torch.manual_seed(1)
    if name in HEAD_NETS: return HEAD_NETS[name]().train()
    model = NETS[name]().train()
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    last = [m for m in layers if m.weight.shape[0] == 5][-1]
    nn.init.uniform_(last.weight, -.25, .5)
    return model


def net(name):
    "A fresh copy of a net; building it once is enough."
    return copy.deepcopy(shared(name))


def shared(name):
    "The net itself: a large one is not copied for each test, since no test may change it."
    if name not in _nets: _nets[name] = build(name)
    return _nets[name]


def wide(name):
    if name in TEN and name != 'inception_v3': return images(128, 160, 2)
    return images(192, 224, 2)


@pytest.fixture(params=PAIRS, ids='-'.join)
def loc(request):
    l, n = request.param
    return LOCALIZERS[l](net(n))


@pytest.mark.parametrize('pair', UNSUPPORTED, ids='-'.join)
def test_unsupported_is_said(pair):
    error, message = UNSUPPORTED[pair]
    with pytest.raises(error, match=message): LOCALIZERS[pair[0]](shared(pair[1]))(wide(pair[1]), 1)


def test_shape_range_dtype(loc):
    x = images()
    maps, raw = loc(x), loc.raw(x)
    assert maps.shape == (3, 64, 96) and maps.dtype == torch.float32
    assert maps.device == x.device and not maps.requires_grad
    assert raw.ndim == 3 and raw.shape[0] == 3
    assert min(raw.shape[1:]) >= 4, f'maps of at least 4x4, got {tuple(raw.shape)}'
    assert raw.shape[1]/raw.shape[2] == 64/96, 'the map keeps the proportions of a non-square image'
    assert maps.min() >= 0 and maps.max() <= 1 and torch.isfinite(maps).all()
    assert loc.logits.shape == (3, 5) and loc.logits.dtype == torch.float32
    assert type(loc).__name__ in repr(loc)
    assert all(m.max() > .9 for m in maps), 'an empty map shows nothing'


@pytest.mark.parametrize('size', [(65, 97), (111, 75)], ids=lambda s: f'{s[0]}x{s[1]}')
def test_odd_sizes(loc, size):
    x = images(*size, n=2)
    maps = loc(x, 1)
    assert maps.shape == (2, *size) and torch.isfinite(maps).all()
    if type(loc).__name__ != 'AblationCAM': # its eight channels may all speak against the class
        assert maps.flatten(1).any(1).all()
    same(loc(x[1:], 1)[0], maps[1], 2e-3)


def test_batch_independence(loc):
    x = images()
    maps, logits = loc(x, [0, 3, 1]), loc.logits
    for i, c in enumerate([0, 3, 1]):
        same(loc(x[i:i + 1], c)[0], maps[i], 2e-3)
        same(loc.logits[0], logits[i], 1e-4)


def test_targets(loc):
    x = images()
    none = loc.raw(x)
    same(none, loc.raw(x, loc.logits.argmax(1)), 0)
    same(loc.raw(x, 2), loc.raw(x, [2, 2, 2]), 0)
    same(loc.raw(x, torch.tensor([2, 0, 1])), loc.raw(x, (2, 0, 1)), 0)
    asked = {type(o).__name__ for o in (loc, loc.model, getattr(loc.model, 'head', None))}
    if asked.isdisjoint(CLASS_FREE):
        assert not torch.equal(loc.raw(x, 0), loc.raw(x, 1)), 'another class, the same map'
    several = loc.raw(x, [[0, 1], [2, 3], [4, 0]])
    assert several.shape[:2] == (3, 2)
    two = loc.raw(x, 2)
    size = two.abs().max().clamp(min=1)
    same(several[:, 1], loc.raw(x, [1, 3, 0]), 1e-6*size)
    for score in (lambda z: z[:, 2], [lambda z: z[2]]*3): same(loc.raw(x, score), two, 1e-5*size)
    for bad, error, message in (([0, 1], ValueError, r'got shape \(2,\) for a batch of 3'),
                                (5, ValueError, 'model has 5'),
                                (-1, ValueError, 'model has 5'),
                                ([.1, .2, .3], TypeError, 'positions'),
                                (lambda z: z, ValueError, 'the callable must turn')):
        with pytest.raises(error, match=message): loc(x, bad)


def state_of(model):
    "What a localizer must leave as it is: of the model, and of the random numbers."
    hooks = lambda m: len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
    return dict(modes=[m.training for m in model.modules()],
                hooks=[hooks(m) for m in model.modules()],
                gradients=[(p.requires_grad, p.grad is None) for p in model.parameters()],
                values=[v.clone() for v in model.state_dict().values()],
                random=torch.get_rng_state())


def equal(a, b):
    for name in ('modes', 'hooks', 'gradients'): assert a[name] == b[name], f'{name} changed'
    assert all(map(torch.equal, a['values'], b['values'])), 'weights or buffers changed'
    assert torch.equal(a['random'], b['random']), 'the random state moved'


def test_state_untouched(loc):
    mixed = loc.model
    next(iter(mixed.children())).eval() # one part in eval mode, the rest training
    next(mixed.parameters()).requires_grad_(False)
    last = list(mixed.parameters())[-1]
    last.grad = torch.full_like(last, 7)
    before = state_of(mixed)
    loc(images())
    loc.raw(images(), 1)
    equal(before, state_of(mixed))
    assert (last.grad == 7).all()


@pytest.mark.parametrize('name', LOCALIZERS)
def test_state_untouched_when_it_raises(name):
    model = Broken().train()
    model.drop.eval()
    l = LOCALIZERS[name](model)
    before = state_of(model)
    with pytest.raises(RuntimeError, match='broken on purpose'): l(images())
    equal(before, state_of(model))
    good = LOCALIZERS[name](net('resnet10t'))
    before = state_of(good.model)
    with pytest.raises(ValueError): good(images(), [0, 1])
    equal(before, state_of(good.model))


def test_frozen_and_no_grad(loc):
    x, free = images(), loc(images(), 1)
    with torch.no_grad(): same(loc(x, 1), free, 0)
    with torch.inference_mode(): same(loc(x, 1).clone(), free, 1e-6)
    loc.model.requires_grad_(False)
    same(loc(x, 1), free, 0)


def test_deterministic(loc):
    x = images()
    first = loc(x, 2)
    torch.rand(5)
    same(loc(x, 2), first, 0)


def test_create_graph(loc):
    x = images()
    with torch.no_grad(): maps = loc(x, 1, create_graph=True)
    assert maps.requires_grad
    same(maps.detach(), loc(x, 1), 1e-5)
    weight = next(p for p in loc.model.parameters() if p.ndim == 4)
    (maps*torch.linspace(0, 1, 96)).sum().backward()
    assert weight.grad is not None and torch.isfinite(weight.grad).all() and weight.grad.abs().sum() > 0
    with torch.inference_mode(), pytest.raises(ValueError, match='inference_mode'):
        loc(x, 1, create_graph=True)


def close_in_half(low, full, loc):
    "Of nearly the same direction; where rounding goes all through the net, of roughly the same."
    alike = torch.cosine_similarity(low.flatten(1), full.flatten(1))
    assert alike.min() > (.7 if type(loc).__name__ in ROUGH else .97)


def test_bf16(loc):
    x, full = images(), loc(images(), 1)
    with torch.autocast('cpu', torch.bfloat16): low = loc(x, 1)
    assert low.dtype == torch.float32
    close_in_half(low, full, loc)
    half = LOCALIZERS[type(loc).__name__](loc.model.bfloat16())
    low = half(x, 1)
    assert low.dtype == half.logits.dtype == torch.float32
    close_in_half(low, full, loc)


@one_net
def test_bad_images(pair):
    l = LOCALIZERS[pair[0]](net(pair[1]))
    for bad, message in ((torch.rand(3, 64, 64), r'expected a float tensor \(B,3,H,W\)'),
                         (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), 'expected a float tensor'),
                         (torch.rand(0, 3, 64, 64), 'empty batch'),
                         ('x', 'expected a float tensor'),
                         (torch.rand(1, 3, 64, 64, device='meta'), 'x is on meta, the model on cpu')):
        with pytest.raises(ValueError, match=message): l(bad)


@one_net
def test_nan_map_becomes_zeros(pair):
    l = LOCALIZERS[pair[0]](net(pair[1]))
    x = images(n=2)
    x[0] = float('nan')
    maps = l(x, 1)
    assert not maps[0].any() and maps[1].any() and torch.isfinite(maps).all()


BY_CLASS = [(l, 'resnet10t') for l in LOCALIZERS if l not in CLASS_FREE | MASKING]


@pytest.mark.parametrize('pair', BY_CLASS, ids=lambda p: p[0])
def test_constant_map_becomes_zeros(pair):
    "A head that says the same everywhere finds nothing, whatever rounding the resize adds."
    model = net(pair[1])
    with torch.no_grad():
        for p in model.head.parameters(): p.fill_(0)
        model.head.classifier.bias.fill_(.1)
    l = LOCALIZERS[pair[0]](model)
    assert l.raw(images(), 1).unique().numel() == 1 and not l(images(), 1).any()


@one_net
def test_wrapped_models(pair):
    "DataParallel and compiled models are looked through."
    plain = net(pair[1])
    expected = LOCALIZERS[pair[0]](plain)(images(), 1)
    for wrapped in (nn.DataParallel(plain), torch.compile(plain, backend='eager')):
        l = LOCALIZERS[pair[0]](wrapped)
        assert l.model is plain
        same(l(images(), 1), expected, 0)


@one_net
def test_many_in_a_loop_leave_nothing(pair):
    model = net(pair[1])
    before = state_of(model)['hooks']
    for _ in range(5): LOCALIZERS[pair[0]](model)(images(n=1))
    assert state_of(model)['hooks'] == before


@pytest.mark.parametrize('arch', TEN)
@pytest.mark.parametrize('name', TOP_DOWN)
def test_ten_architectures(name, arch):
    if (name, arch) in UNSUPPORTED: pytest.skip(f'{name} does not apply: see test_unsupported_is_said')
    model, x = shared(arch), wide(arch)
    before = state_of(model)
    l = LOCALIZERS[name](model)
    raw = l.raw(x, [1, 4])
    maps = to_score_maps(raw, x.shape[-2:])
    assert maps.shape == (2, *x.shape[-2:]) and maps.dtype == torch.float32
    assert maps.isfinite().all() and maps.min() >= 0 and maps.max() <= 1
    assert min(raw.shape[1:]) >= 4 and raw.isfinite().all()
    assert raw[0].std() > 0 or (name, arch) in EMPTY
    assert name not in LAYERED or l.layers[0] in repr(l)
    same(l(x[1:], 4)[0], maps[1], .1 if name in ROUGH else 5e-3) # batch independence
    equal(before, state_of(model))


@layered
def test_layers(name):
    "By name, by module, the nearest names; what is no map is said to be none."
    model, x = net('mobilenetv2_035'), images()
    make = LOCALIZERS[name]
    same(make(model, 'body.bn2')(x, 1), make(model, model.body.bn2)(x, 1), 0)
    assert make(model, 'body.bn2').layers == ['body.bn2']
    with pytest.raises(ValueError, match='did you mean body.bn2'): make(model, 'body.bn9')
    with pytest.raises(ValueError, match='is no part of WSOLModel'): make(model, nn.ReLU())
    with pytest.raises(TypeError, match='a dotted name, a module or None'): make(model, 3)
    plain = net('Sequential')
    for layer in ('6', '3'):
        with pytest.raises(ValueError, match='not maps'): make(plain, layer)(x)
    used = nn.Sequential(*plain)
    plain.spare = nn.Conv2d(3, 3, 1)
    plain.forward = lambda x: used(x)
    with pytest.raises(ValueError, match='did not run'): make(plain, 'spare')(x)
    one = make(model, [model.body.bn2])
    same(one(x, 1), make(model, 'body.bn2')(x, 1), 0)
    assert one.layers == make(model, target_layers=['body.bn2']).layers == ['body.bn2']
    with pytest.raises(ValueError, match='layer: .* takes one layer, got 0'): make(model, [])
    if not CLASSES[name].several_layers:
        two = ['body.bn2', 'body.conv_stem']
        with pytest.raises(ValueError, match='takes one layer, got 2'): make(model, two)


@layered
def test_in_place_relu_and_late_compilation(name):
    "The layer before a ReLU that works in place; a part or the whole compiled after the localizer was made."
    inplace, plain = net('Sequential'), net('Sequential')
    inplace[2].inplace = True
    x, layer = images(), '1'
    if name == 'CAM': layer = '2' # its layer ends the net
    expected = LOCALIZERS[name](plain, layer)(x, 1)
    same(LOCALIZERS[name](inplace, layer)(x, 1), expected, 1e-6)
    l = LOCALIZERS[name](plain, layer)
    plain.compile(backend='eager')
    plain.eval()(x) # compiled without hooks
    same(l(x, 1), expected, 1e-6)
    part = net('Sequential')
    part[0] = torch.compile(part[0], backend='eager')
    same(LOCALIZERS[name](part, layer)(x, 1), expected, 1e-6)


@one_net
def test_two_on_one_model_and_the_users_own_gradients(pair):
    "Localizers do not disturb one another, nor a training step that surrounds them."
    model, x = net(pair[1]), images()
    first, second = LOCALIZERS[pair[0]](model), LOCALIZERS[pair[0]](model)
    expected = first(x, 1)
    loss = model.eval()(x).sum()
    second(x, 2)
    same(first(x, 1), expected, 0)
    loss.backward()
    assert all(p.grad is not None for p in model.head.parameters())
    with pytest.raises(IndexError), second: [][0] # the caller's error is not swallowed


@pytest.mark.parametrize('name', [l for l in LAYERED if NEEDS[l] == {'gradients'}])
def test_logits_without_a_gradient(name):
    with pytest.raises(ValueError, match='no gradient of the scores reaches'):
        LOCALIZERS[name](Frozen())(images())


@pytest.mark.parametrize('name', TOP_DOWN)
def test_memory_does_not_grow(name):
    "200 localizers on one model leave no tensor behind, and memory peaks where the first fifty put the peak."
    model, x = shared('Sequential'), images(32, 32, 1)

    def call(times):
        for i in range(times): LOCALIZERS[name](model)(x, i % 5)

    def tensors():
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss # KiB

    call(50)
    count, highest = tensors(), peak()
    call(200)
    assert tensors() <= count and peak() - highest < 16*1024


def test_layercam_fuses_layers():
    "Each layer's map over its maximum, the shallower ones through tanh(2·), the largest at each place."
    model, x = shared('resnet10t'), images(n=2)
    modules = [n for n, _ in model.named_modules()]
    names = [next(n for n in modules if n.endswith(layer)) for layer in ('layer2', 'layer3')]
    shallow, deep = (LayerCAM(model, n).raw(x, 1) for n in names)
    assert shallow.shape[-1] > deep.shape[-1]
    top = lambda m: m/m.amax((1, 2), keepdim=True).clamp(min=1e-30)
    up = torch.nn.functional.interpolate(top(deep)[:, None], shallow.shape[-2:], mode='bilinear',
                                         align_corners=False)[:, 0]
    same(LayerCAM(model, names).raw(x, 1), torch.maximum(torch.tanh(2*top(shallow)), up), 1e-5)


def test_all_from_one_pass():
    model, x = net('resnet10t'), images()
    passes = []
    model.body.register_forward_hook(lambda *a: None)
    model.head.register_forward_hook(lambda *a: passes.append(1))
    maps = localize_all(model, x, ['gradcam', 'layercam', 'xgradcam'], 2, layer='body.layer4')
    assert len(passes) == 1
    for name, localizer in (('gradcam', GradCAM), ('layercam', LayerCAM), ('xgradcam', XGradCAM)):
        same(maps[name], localizer(model)(x, 2), 1e-6)


def test_fastai_learner(world):
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    model = net('Sequential')
    learn = Learner(DataLoaders([], []), model, loss_func=nn.CrossEntropyLoss())
    same(GradCAM(learn)(images(), 1), GradCAM(model)(images(), 1), 0)


@pytest.mark.parametrize('arch', ['hrnet_w18_small', 'inception_v3', 'densenet121'])
def test_nets_with_containers_and_valid_padding(arch):
    "Nets whose parts are iterated instead of called, or shrink by more than their stride."
    torch.manual_seed(1)
    model = wsol_model(arch, 5, verbose=False)
    maps = HeadMaps(model)(images(160, 128, 1), 1)
    assert model.stride == 32 and maps.shape == (1, 160, 128) and maps.any()


def test_base_says_what_to_override():
    with pytest.raises(NotImplementedError): Localizer(net('resnet10t'))(images())


def test_who_is_not_asked_has_a_reason():
    "It needs what no net here has; a need that is nearly one of GIVEN is a slip of the pen."
    assert set(ELSEWHERE) <= set(entries('localizer')), 'a name that is gone'
    assert {*SETTINGS, *(of for of, _ in VARIANTS.values())} <= set(ASKED), 'settings of a name that is gone'
    for name in ALL.keys() - ASKED.keys():
        for need in needs(ALL[name]) - GIVEN:
            assert not difflib.get_close_matches(need, GIVEN, cutoff=.75), f'{name}: needs={need!r}?'


@pytest.mark.parametrize('name', METHODS)
def test_methods(name):
    "With its defaults a method comes back from JSON, and what it trains has a loss and maps."
    stage1 = dict(classifier=method_to_dict(GAP())) if two_stages(name) else {}
    method = METHODS[name].load()(**stage1)
    assert method_from_dict(json.loads(json.dumps(method_to_dict(method)))) == method
    model = method.model(n_classes=5, verbose=False, **small_arch(name))
    assert callable(method.loss())
    assert all(p.requires_grad for group in method.param_groups(model) for p in group)
    localizer = method.localizer(model)
    if isinstance(localizer, BoxLocalizer):
        boxes = localizer.boxes(images(n=2), 1)
        assert boxes.shape == (2, 4) and localizer.logits.shape == (2, 5)
        return
    maps = localizer(images(n=2), 1)
    assert maps.shape == (2, 64, 96) and maps.isfinite().all() and maps.min() >= 0 and maps.max() <= 1


# transformers: the table of families, made by tools/token_support.py

def test_the_table_of_families_is_whole():
    "Each family has a cell for each localizer that was asked, and none is wrong."
    table = read_results('token_support')
    cells, what = set(zip(table.family, table.what)), set(table.what)
    assert {'adapter', 'GradCAM', 'AblationCAM', 'GAP', 'FCAM', 'peaks'} <= what
    missing = sorted({(f, w) for f in token_support.FAMILIES for w in what} - cells)
    assert not missing, f'python tools/token_support.py has not been asked for {missing[:5]}'
    assert len(token_support.FAMILIES) >= 30 and set(table.verdict) <= {'right', 'refused'}
    assert table.reason.notna().all()


@pytest.mark.parametrize('family', token_support.CHEAP)
def test_families_are_as_the_table_says(family):
    "What is declared is what happens; the dearest cells are left to the tool."
    table = read_results('token_support').set_index(['family', 'what'])
    what = ['adapter', 'CAM', 'EigenCAM', 'GradCAM', 'HiResCAM', 'LayerCAM', 'AblationCAM', 'FeedbackCAM']
    for row in token_support.rows_of(family, what):
        declared = table.loc[(family, row['what'])]
        same_reason = row['reason'] == declared.reason or row['verdict'] == 'refused'
        assert row['verdict'] == declared.verdict and same_reason, (row, declared.reason)
