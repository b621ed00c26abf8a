"""Every localizer keeps the contract of DESIGN §3 on every net of the support matrix.

A row of LOCALIZERS is (name, how to make it); of NETS (name, how to make it). SUPPORTED says which localizer applies to which net;
elsewhere the test is the clear error. New localizers and nets add a row. Every pooling head is held to the same contract, on two nets.
"""
import copy

import pytest
import torch
from torch import nn

from wsol_nb.localize import HeadMaps, Localizer
from wsol_nb.models import wsol_model
from wsol_nb.pooling import HEADS


class Plain(nn.Sequential):
    "A classifier without `forward_maps`."
    def __init__(self): super().__init__(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(.5), nn.Linear(6, 5))


class Broken(nn.Module):
    "Raises in the middle of a forward pass."
    def __init__(self): super().__init__(); self.conv, self.drop = nn.Conv2d(3, 5, 1), nn.Dropout(.5)
    def forward_maps(self, x): self.drop(self.conv(x)); torch.rand(3); raise RuntimeError('broken on purpose')
    def forward(self, x): return self.forward_maps(x)[0]


ARCHS = dict(resnet10t=16, mobilenetv2_035=16, vgg11=16, convnext_atto=16, regnetx_002=16, ghostnet_050=16)
LOCALIZERS = dict(HeadMaps=HeadMaps)
NETS = {a: (lambda a=a, s=s: wsol_model(a, 5, stride=s, verbose=False)) for a, s in ARCHS.items()} | {'Sequential': Plain}
HEAD_NETS = {f'{h}-{a}': (lambda h=h, a=a: wsol_model(a, 5, stride=16, head=HEADS[h], verbose=False)) for h in HEADS if h != 'GAP' for a in ('resnet10t', 'mobilenetv2_035')}
UNSUPPORTED = {('HeadMaps', 'Sequential'): (TypeError, 'no forward_maps')}
PAIRS = [(l, n) for l in LOCALIZERS for n in NETS if (l, n) not in UNSUPPORTED] + [('HeadMaps', n) for n in HEAD_NETS] # a head's maps do not depend on who else reads the net
one_net = pytest.mark.parametrize('pair', [(l, 'resnet10t') for l in LOCALIZERS], ids=lambda p: p[0])
_nets = {}


def net(name):
    "A fresh copy of a net; building it once is enough."
    if name not in _nets: torch.manual_seed(1); _nets[name] = (NETS | HEAD_NETS)[name]().train()
    return copy.deepcopy(_nets[name])


def images(h=64, w=96, n=3): return torch.rand(n, 3, h, w, generator=torch.Generator().manual_seed(2))


def same(a, b, tol): assert a.shape == b.shape and (a - b).abs().max() <= tol, (a - b).abs().max()


@pytest.fixture(params=PAIRS, ids='-'.join)
def loc(request):
    l, n = request.param
    return LOCALIZERS[l](net(n))


@pytest.mark.parametrize('pair', UNSUPPORTED, ids='-'.join)
def test_unsupported_is_said(pair):
    error, message = UNSUPPORTED[pair]
    with pytest.raises(error, match=message): LOCALIZERS[pair[0]](net(pair[1]))


def test_shape_range_dtype(loc):
    x = images()
    maps, raw = loc(x), loc.raw(x)
    assert maps.shape == (3, 64, 96) and maps.dtype == torch.float32 and maps.device == x.device and not maps.requires_grad
    assert raw.ndim == 3 and raw.shape[0] == 3 and min(raw.shape[1:]) >= 4, f'maps of at least 4x4, got {tuple(raw.shape)}'
    assert raw.shape[1]/raw.shape[2] == 64/96, 'the map keeps the proportions of a non-square image'
    assert maps.min() >= 0 and maps.max() <= 1 and torch.isfinite(maps).all()
    assert loc.logits.shape == (3, 5) and loc.logits.dtype == torch.float32
    assert type(loc).__name__ in repr(loc)


@pytest.mark.parametrize('size', [(65, 97), (111, 75)], ids=lambda s: f'{s[0]}x{s[1]}')
def test_odd_sizes(loc, size):
    x = images(*size, n=2)
    maps = loc(x, 1)
    assert maps.shape == (2, *size) and torch.isfinite(maps).all() and maps.flatten(1).any(1).all()
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
    several = loc.raw(x, [[0, 1], [2, 3], [4, 0]])
    assert several.shape[:2] == (3, 2)
    same(several[:, 1], loc.raw(x, [1, 3, 0]), 1e-6)
    same(loc.raw(x, lambda z: z[:, 2]), loc.raw(x, 2), 1e-5)
    for bad, error, message in (([0, 1], ValueError, r'got shape \(2,\) for a batch of 3'), (5, ValueError, 'model has 5'), (-1, ValueError, 'model has 5'), ([.1, .2, .3], TypeError, 'positions'),
                                (lambda z: z, ValueError, 'the callable must turn')):
        with pytest.raises(error, match=message): loc(x, bad)


def state_of(model):
    return ([m.training for m in model.modules()], [(p.requires_grad, p.grad is None) for p in model.parameters()], [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
            [v.clone() for v in model.state_dict().values()], torch.get_rng_state())


def equal(a, b):
    assert a[:3] == b[:3]
    assert all(map(torch.equal, a[3], b[3])), 'weights or buffers changed'
    assert torch.equal(a[4], b[4]), 'the random state moved'


def test_state_untouched(loc):
    mixed = loc.model
    next(iter(mixed.children())).eval() # one part in eval mode, the rest training
    next(mixed.parameters()).requires_grad_(False)
    last = list(mixed.parameters())[-1]
    last.grad = torch.full_like(last, 7)
    before = state_of(mixed)
    loc(images()); loc.raw(images(), 1)
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
    same(maps.detach(), loc(x, 1), 1e-6)
    weight = next(p for p in loc.model.parameters() if p.ndim == 4)
    (maps*torch.linspace(0, 1, 96)).sum().backward()
    assert weight.grad is not None and torch.isfinite(weight.grad).all() and weight.grad.abs().sum() > 0
    with torch.inference_mode(), pytest.raises(ValueError, match='inference_mode'): loc(x, 1, create_graph=True)


def close_in_half(low, full): assert (low.flatten(1)*full.flatten(1)).sum(1).div(low.flatten(1).norm(dim=1)*full.flatten(1).norm(dim=1)).min() > .97


def test_bf16(loc):
    x, full = images(), loc(images(), 1)
    with torch.autocast('cpu', torch.bfloat16): low = loc(x, 1)
    assert low.dtype == torch.float32
    close_in_half(low, full)
    half = type(loc)(loc.model.bfloat16())
    low = half(x, 1)
    assert low.dtype == half.logits.dtype == torch.float32
    close_in_half(low, full)


@one_net
def test_bad_images(pair):
    l = LOCALIZERS[pair[0]](net(pair[1]))
    for bad, message in ((torch.rand(3, 64, 64), r'expected a float tensor \(B,3,H,W\)'), (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), 'expected a float tensor'), (torch.rand(0, 3, 64, 64), 'empty batch'), ('x', 'expected a float tensor')):
        with pytest.raises(ValueError, match=message): l(bad)
    with pytest.raises(ValueError, match='x is on meta, the model on cpu'): l(torch.rand(1, 3, 64, 64, device='meta'))


@one_net
def test_nan_map_becomes_zeros(pair):
    l = LOCALIZERS[pair[0]](net(pair[1]))
    x = images(n=2)
    x[0] = float('nan')
    maps = l(x, 1)
    assert not maps[0].any() and maps[1].any() and torch.isfinite(maps).all()


@one_net
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
    before = state_of(model)[2]
    for _ in range(5): LOCALIZERS[pair[0]](model)(images(n=1))
    assert state_of(model)[2] == before


@pytest.mark.parametrize('arch', ['hrnet_w18_small', 'inception_v3', 'densenet121'])
def test_nets_with_containers_and_valid_padding(arch):
    "Nets whose parts are iterated instead of called, or shrink by more than their stride."
    model = net_of(arch)
    maps = HeadMaps(model)(images(160, 128, 1), 1)
    assert model.stride == 32 and maps.shape == (1, 160, 128) and maps.any()


def net_of(arch): torch.manual_seed(1); return wsol_model(arch, 5, verbose=False)


def test_base_says_what_to_override():
    with pytest.raises(NotImplementedError): Localizer(net('resnet10t'))(images())
