"Affinity refinement: the balance, one pass for map and attention, what is left of a model, real pictures."
import copy

import pytest
import torch
from helpers import images, same

from wsol_nb.core import set_seed
from wsol_nb.localize.base import Localizer
from wsol_nb.localize.mirrored import Mirrored
from wsol_nb.registry import entries
from wsol_nb.vit.affinity import AffinityMaps, refine, sinkhorn
from wsol_nb.vit.attention import ClassAttention
from wsol_nb.vit.reading import PatchMean, read_attention
import timm # after wsol_nb.core, see its end


def vit(arch='vit_tiny_patch16_224', **kw):
    set_seed(0)
    return timm.create_model(arch, num_classes=5, depth=6, dynamic_img_size=True, **kw)


@pytest.fixture(scope='module')
def net(): return vit()


def affinities(n=12, b=2, hubs=50.):
    A = torch.rand(b, n, n, generator=torch.Generator().manual_seed(0)) + .01
    A[:, :, 3] *= hubs
    return A/A.sum(-1, keepdim=True)


class Colour(Localizer):
    "The logit of each class times a channel."
    def compute(self, x, target, create_graph):
        logits = self.ask(x)
        scores = target.scores(logits)
        return logits, scores[..., None, None]*(x[:, 0] if scores.ndim == 1 else x[:, :1])


@pytest.mark.parametrize('hubs', [1., 50., 1e4])
@pytest.mark.parametrize('symmetric', [False, True])
def test_balance_is_doubly_stochastic(hubs, symmetric):
    S = sinkhorn(affinities(hubs=hubs), 60, symmetric)
    ones = torch.ones(2, 12)
    same(S.sum(-1), ones, 1e-4)
    same(S.sum(-2), ones, 1e-4)
    assert S.dtype == torch.float32 and (S >= 0).all()
    if symmetric: same(S, S.mT, 0)


def test_balance_forgets_scales():
    "Whatever rows and columns were multiplied with: the balance is the same."
    A = affinities()
    rows, columns = (torch.rand(2, 12, generator=torch.Generator().manual_seed(s)) + .1 for s in (1, 2))
    same(sinkhorn(rows[..., None]*A*columns[:, None], 60), sinkhorn(A, 60), 1e-4)
    same(sinkhorn(7*A), sinkhorn(A), 1e-6)


def test_balance_has_a_gradient():
    A = affinities(4, 1).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda A: refine(torch.arange(4.).double().view(1, 2, 2), sinkhorn(A)), A)


def test_half_precision_and_autocast():
    A, m = affinities(), torch.rand(2, 3, 4)
    full = refine(m, sinkhorn(A))
    with torch.autocast('cpu', torch.bfloat16): same(refine(m, sinkhorn(A)), full, 1e-6)
    same(refine(m.bfloat16(), sinkhorn(A)), full, 5e-3)


def test_on_no_device():
    A = torch.empty(2, 12, 12, device='meta')
    assert refine(torch.empty(2, 3, 4, device='meta'), sinkhorn(A)).shape == (2, 3, 4)


@pytest.mark.parametrize('m, S, message', [
    (torch.rand(2, 3, 4), torch.rand(2, 11, 11), r'affinity.shape=\(2, 11, 11\): expected \(2, 12, 12\)'),
    (torch.rand(2, 3, 4), torch.rand(12, 12), r'affinity.shape=\(12, 12\)')])
def test_what_does_not_fit(m, S, message):
    with pytest.raises(ValueError, match=message): refine(m, S)


def test_what_is_no_number_of_times():
    for bad in (-1, 1.5, True):
        with pytest.raises(ValueError, match='a whole number, 0 or more'): sinkhorn(affinities(), bad)
        with pytest.raises(ValueError, match='a whole number, 0 or more'):
            refine(torch.rand(2, 3, 4), affinities(), bad)


def counted(net):
    "A list that grows with every pass of a net."
    passes = []
    handle = net.blocks[0].register_forward_hook(lambda *_: passes.append(1))
    return passes, handle


def test_one_pass_and_the_same_by_hand(net):
    x, loc = images(n=2), AffinityMaps(net)
    loc.raw(x)
    passes, handle = counted(net)
    maps = loc.raw(x)
    handle.remove()
    assert len(passes) == 1
    A, = read_attention(net.eval(), x, PatchMean(range(1, 6))).taken # all but the first sixth
    same(maps, refine(ClassAttention(net).raw(x), sinkhorn(A)), 1e-6)


def test_distilled_and_other_images():
    net = vit('deit_tiny_distilled_patch16_224')
    loc = AffinityMaps(net, steps=40)
    for size in ((64, 96), (96, 64)):
        x = images(*size, n=3)
        raw = loc.raw(x)
        assert raw.shape[1:] == (size[0]//16, size[1]//16)
        same(raw.sum((1, 2)), ClassAttention(net).raw(x).sum((1, 2)), 1e-4)
        for i in range(3): same(loc.raw(x[i:i + 1])[0], raw[i], 1e-5)


def test_of_class_maps(net):
    x = images(n=2)
    loc = AffinityMaps(net, Colour)
    one = loc.raw(x, [1, 3])
    two = loc.raw(x, [[1, 0], [3, 2]])
    same(two[:, 0], one, 1e-6)
    assert two.shape == (2, 2, 4, 6) and not torch.equal(two[:, 1], one)
    assert 'AffinityMaps(Colour(VisionTransformer' in repr(loc)
    turned = Mirrored(net, AffinityMaps)
    same(turned.raw(x.flip(-1)), turned.raw(x).flip(-1), 1e-6)


def test_power_and_steps_0_are_the_localizer(net):
    x = images(n=2)
    same(AffinityMaps(net, power=0).raw(x), ClassAttention(net).raw(x), 0)
    A, = read_attention(net.eval(), x, PatchMean(range(1, 6))).taken
    same(AffinityMaps(net, steps=0).raw(x), refine(ClassAttention(net).raw(x), A), 1e-6)


def test_create_graph(net):
    net = copy.deepcopy(net)
    maps = AffinityMaps(net).raw(images(n=2), 1, create_graph=True)
    (maps*torch.linspace(0, 1, 6)).sum().backward()
    assert net.blocks[2].attn.qkv.weight.grad.abs().sum() > 0


def test_cnn_is_refused():
    cnn = timm.create_model('resnet10t', num_classes=5)
    with pytest.raises(ValueError, match='ResNet has no'): AffinityMaps(cnn, Colour)(images())


def test_registered():
    entry = entries('localizer')['AffinityMaps']
    assert entry.facts['needs'] == 'tokens'
    from wsol_nb import AffinityMaps as at_the_door
    assert at_the_door is AffinityMaps


def test_on_birds(real_data, real_weights):
    "A few pictures of nbs/results/affinity_scores.csv: refined maps find more."
    import sys
    from helpers import root
    sys.path.insert(0, str(root/'tools'))
    from affinity_table import vit as trained
    from wsol_nb.data.dataset import LocalizableSplit
    from wsol_nb.data.loaders import WSOLDataLoaders
    from wsol_nb.localize.maps import reference_score_map
    from wsol_nb.scoring.scorer import Scorer
    dls = WSOLDataLoaders.from_metadata(real_data, 'CUB', size=224, resize=224, device='cpu', num_workers=0)
    part, model = dls.localizable('test'), trained()
    part = LocalizableSplit(part.df[::12], dls.info, 'test', 8, 0, 'cpu')
    found = {}
    for name, kw in dict(balanced={}, map=dict(power=0)).items():
        scorer, loc = Scorer(224), AffinityMaps(model, **kw)
        for b in part:
            for i, m in enumerate(loc.raw(b.x).numpy()):
                scorer.count(scorer.look(reference_score_map(m, 224), b.boxes[i]), None)
        found[name] = scorer.accs['boxes'].compute()['max_box_acc_v2']
    assert found['balanced'] > 86 and found['balanced'] > found['map'] + 2, found
