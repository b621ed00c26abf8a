"""What a GPU would be asked, without one: nothing waits in a training step, nor an image in a localizer.

tools/elsewhere.py pretends a device: numbers stay in main memory, all else is as if they were on a GPU, and
each wait of the host is written down with the line that asked. MANY says which localizers wait for more than
NaN, and why. torch's own `meta` device has no numbers at all: what runs on it cannot have
asked for one. NUMBERS says what does not.
"""
import sys

import pytest
import torch
from helpers import fit_quietly, images, root, same
from torch import nn

sys.path.insert(0, str(root/'tools'))
import copies
from elsewhere import Elsewhere, WAITS
from wsol_nb.core import set_seed
from wsol_nb.data.loaders import WSOLDataLoaders
from wsol_nb.dense.seeds import sample_seeds, seed_weights
from wsol_nb.devices import without_waiting
from wsol_nb.localize.base import HeadMaps
from wsol_nb.localize.maps import PRESETS, to_score_maps
from wsol_nb.losses.partial import partial_cross_entropy
from wsol_nb.nets.decoder import FullModel
from wsol_nb.registry import entries
from wsol_nb.scoring.loop import evaluate
from fastai.callback.core import Callback

METHODS, HEADS, LOCALIZERS = list(entries('method')), list(entries('head')), copies.LOCALIZERS
# waits of a call beside that for NaN, however many images there are
MANY = dict(
    CAM=1, # are the logits a linear layer of the mean?
    EigenCAM=1, TokenCut=1, # CUDA says on the host whether an eigenproblem converged
    ExcitationBackprop=1, # are there negative features?
    ScoreCAM=2, SSCAM=2, ISCAM=2, # is the copy without BatchNorm the same net, how many channels vary?
    AblationCAM=1, # how many channels live?
    FullMaps=1, PatchHeadMaps=1, # are the maps probabilities?
    Refined=2) # are the images in [0,1], the maps probabilities?
A_LOOK_AN_IMAGE = {'AblationCAM'} # each image's net runs from a layer on: does it give the same logits?
NUMBERS = dict( # do not run on meta
    CAM='compares logits with those of each linear layer',
    ExcitationBackprop='refuses negative features', ScoreCAM='asks only about channels that vary',
    ClassAttention='learns from numbers where tokens stand', Rollout='as ClassAttention',
    AttentionGradient='as ClassAttention', LeGrad='as ClassAttention', AffinityMaps='as ClassAttention',
    LOST='as ClassAttention', TokenCut='as ClassAttention', PatchHeadMaps='as ClassAttention',
    SSCAM='as ScoreCAM', ISCAM='as ScoreCAM', AblationCAM='asks only about channels that live')


def waits(crossings): return [c for c in crossings if c.kind in WAITS]
def ours(crossings): return [c for c in crossings if c.ours]
def said(crossings): return [f'{c.kind} by {c.where}, line {c.line}' for c in crossings]


@pytest.fixture(scope='module')
def dls(tmp_path_factory): return copies.small_world(tmp_path_factory.mktemp('device'))


# the pretend device

ASKS = dict(
    item=(lambda t: t.sum().item(), 'read'),
    bool=(lambda t: bool((t > 0).any()), 'read'),
    format=(lambda t: f'{t.sum():.2f}', 'read'),
    mask=(lambda t: t[t > .5], 'size'),
    nonzero=(lambda t: t.nonzero(), 'size'),
    equal=(lambda t: torch.equal(t, t), 'read'),
    eigh=(lambda t: torch.linalg.eigh(t@t.mT), 'check'),
    cpu=(lambda t: t.cpu(), 'to host'),
    tolist=(lambda t: t.tolist(), 'to host'),
    list=(lambda t: t[[0, 1]], 'to device'),
    tensor=(lambda t: torch.tensor([1., 2.], device=t.device), 'to device'),
    new_tensor=(lambda t: t.new_tensor([1., 2.]), 'to device'),
    to=(lambda t: torch.ones(3).to(t.device), 'to device'),
    copy_=(lambda t: t.copy_(torch.zeros(3, 3)), 'to device'),
    sent=(lambda t: torch.ones(3).to(t.device, non_blocking=True), 'sent'))


@pytest.mark.parametrize('name', ASKS)
def test_the_pretend_device_sees(name):
    ask, kind = ASKS[name]
    with Elsewhere() as d:
        t = d.put(torch.rand(3, 3))
        ask(t)
        assert [c.kind for c in d.crossings] == [kind]
        assert d.crossings[0].where.startswith('test_device.py')


def test_the_pretend_device_is_a_device():
    "The same numbers and gradients as here, without a wait; and tensors of both sides do not mix."
    torch.manual_seed(0)
    net, x, y = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 5)), \
        torch.rand(2, 3, 6, 6), torch.tensor([1, 4])
    with Elsewhere() as d:
        far, X, Y = d.move(net), d.put(x), d.put(y)
        loss = nn.functional.cross_entropy(far(X), Y)
        loss.backward()
        nn.functional.cross_entropy(net(x), y).backward()
        for p, q in zip(net.parameters(), far.parameters()): same(d.look(q.grad), p.grad)
        X[X > .5] = 0.
        X.masked_fill_(X > .2, 1.)
        with pytest.raises(RuntimeError, match='same device'): X + torch.rand(2, 3, 6, 6)
        with pytest.raises(RuntimeError, match='same device'): torch.cat([X, x])
        with pytest.raises(TypeError, match='numpy'): X.numpy()
        assert not waits([c for c in d.crossings if c.op != 'index_put_'])


# training

@pytest.mark.parametrize('name', METHODS)
def test_a_training_step_waits_for_nothing(name, dls, tmp_path):
    "The library's own part of a step; seeds are sent once, and fastai reads the loss."
    each, losses = copies.training(name, dls, tmp_path)
    assert len(each) == 3
    for step in each:
        assert said(ours(waits(step))) == []
        assert len(ours(step)) <= (entries('method')[name].facts['stages'] == 2)
        assert len([c for c in waits(step) if not c.ours]) <= 1, said(step) # fastai's Recorder
    # fused attention is another kernel there
    attends = 'class token' in entries('method')[name].facts.get('needs', '')
    same(losses, here(name, dls, tmp_path), 1e-5*attends)


class LossOfSteps(Callback):
    "The loss of each training step, and whether its gradients are finite."
    def before_fit(self): self.of_steps, self.finite = [], []

    def after_backward(self):
        if self.training: self.finite += [p.grad.isfinite().all() for p in self.model.parameters()
                                          if p.grad is not None]

    def after_batch(self):
        if self.training: self.of_steps.append(self.learn.loss.detach())


def here(name, dls, path, cbs=(), **fields):
    copies.made_once(name, dls, path, **fields)
    seen = LossOfSteps()
    fit_quietly(copies.small_learner(name, dls, path, [seen, *cbs], **fields))
    assert seen.finite and all(seen.finite)
    return torch.stack(seen.of_steps)


class Half(Callback):
    "bfloat16 autocast around the forward pass and the loss."
    def before_batch(self):
        self.cast = torch.autocast('cpu', torch.bfloat16)
        self.cast.__enter__()

    def after_loss(self): self.cast.__exit__(None, None, None)


@pytest.mark.parametrize('name', METHODS)
def test_bfloat16(name, dls, tmp_path):
    "Under autocast the first loss is that of float32 to 2 %, and training goes on with finite gradients."
    full, half = here(name, dls, tmp_path), here(name, dls, tmp_path, [Half()])
    assert half.isfinite().all() and half.dtype == torch.float32
    same(half[0], full[0], .02*full[0].abs())
    assert not torch.equal(half, full), 'nothing was cast'


# localizers

@pytest.mark.parametrize('name', LOCALIZERS)
def test_a_call_waits_no_more_for_more_images(name):
    "Once for what is said of NaN, see `check=`, and for what MANY says; the maps are those of the CPU."
    needs = entries('localizer')[name].facts['needs']
    tol = 1e-3 if 'tokens' in needs or needs == 'a patch head' else 0 # attention rounds in another order
    for n in (2, 4):
        crossings, there, here = copies.calling(name, n)
        same(there, here, tol)
        looks = n*(name in A_LOOK_AN_IMAGE)
        assert len(waits(crossings)) == 1 + MANY.get(name, 0) + looks, said(crossings)


@pytest.mark.parametrize('name', ['HeadMaps', 'GradCAM', 'LayerCAM', 'FeedbackCAM', 'Mirrored'])
@pytest.mark.parametrize('target', [None, 1, (1, 0)], ids=str)
def test_without_that_check_nothing_waits(name, target):
    crossings, there, here = copies.calling(name, 2, target, check=None)
    same(there, here, 0)
    assert said(waits(crossings)) == []


def test_classes_on_the_device_are_read_once():
    y = torch.tensor([1, 0, 2, 4])
    crossings, there, here = copies.calling('HeadMaps', 4, y, check=None)
    same(there, here, 0)
    assert len(waits(crossings)) == 1, said(crossings)
    with pytest.raises(ValueError, match='model has 5'): copies.calling('HeadMaps', 4, y + 1)


def test_scoring_waits_a_batch_not_an_image(dls):
    counts = {}
    for bs in (2, 4):
        with Elsewhere() as d:
            there = WSOLDataLoaders(*dls.loaders, device=d.device, info=dls.info)
            there.valid.bs = bs
            loc = HeadMaps(d.move(copies.small_net(n_classes=dls.c)))
            evaluate(loc, there, 'test', tau_from=None, progress=False)
            counts[bs] = len(ours(waits(d.crossings)))*bs/4 # of four images
    assert counts[2] == counts[4] > 0


# losses, seeds, heads

@pytest.mark.parametrize('name', copies.LOSSES)
def test_a_loss_asks_once(name):
    "By hand one wait for the sentence that says what is wrong, in a training step none; the same numbers."
    loss, args = copies.LOSSES[name]()
    expected = loss(*args)
    with Elsewhere() as d:
        far = [d.put(a) if isinstance(a, torch.Tensor) else a for a in args]
        same(d.look(loss(*far)), expected, 0)
        assert len(waits(d.crossings)) <= copies.BY_HAND.get(name, 1), said(d.crossings)
        d.crossings.clear()
        with without_waiting(): loss(*far)
        assert len(waits(d.crossings)) <= copies.BUSY.get(name, 0), said(d.crossings)


def seeds_of(maps, **kw):
    return sample_seeds(maps, generator=torch.Generator().manual_seed(3), dilate=3, **kw)


@pytest.mark.parametrize('kw', [{}, dict(fg='top', bg='published'), dict(fg='map', bg='complement')], ids=str)
def test_the_same_seeds_on_every_device(kw):
    maps = images(24, 32)[:, 0]
    with Elsewhere() as d:
        far = seeds_of(d.put(maps), **kw)
        same(d.look(far), seeds_of(maps, **kw), 0)
        assert [c.kind for c in d.crossings] == ['sent', 'to host'], said(d.crossings)
        d.crossings.clear()
        with without_waiting(): seeds_of(d.put(maps), **kw)
        assert [c.kind for c in d.crossings] == ['sent']


# meta, where there are no numbers

# another default device than that of the tensors: what is made without saying where is in the wrong place
beside = lambda: torch.device('meta')


def on_meta(name):
    entry = entries('localizer')[name]
    net = copies.small_net(entry.facts['needs']).to('meta')
    kind, x = entry.load(), images(n=2).to('meta')
    return kind(net, **copies.settings(kind)).raw(x, 1)


@pytest.mark.parametrize('name', LOCALIZERS)
def test_localizers_on_meta(name):
    if name in NUMBERS:
        with pytest.raises((RuntimeError, NotImplementedError)): on_meta(name)
        return
    raw = on_meta(name)
    assert raw.device.type == 'meta' and raw.shape[0] == 2 and raw.ndim == 3


@pytest.mark.parametrize('name', LOCALIZERS)
def test_localizers_beside_another_default_device(name):
    entry, x = entries('localizer')[name], images(n=2)
    kind, net = entry.load(), copies.small_net(entry.facts['needs'])
    y = torch.tensor([1, 2])
    expected = kind(net, **copies.settings(kind))(x, [1, 2])
    with beside(): maps = [kind(net, **copies.settings(kind))(x, target) for target in ([1, 2], y)]
    for m in maps: same(m, expected, 0)


@pytest.mark.parametrize('name', copies.LOSSES)
def test_losses_on_meta_and_beside_another_default_device(name):
    loss, args = copies.LOSSES[name]()
    expected = loss(*args)
    with beside(): got = loss(*args)
    same(got, expected, 0)
    if name in copies.BUSY: return # needs numbers, see there
    there = loss(*[a.to('meta') if isinstance(a, torch.Tensor) else a for a in args])
    assert there.device.type == 'meta' and there.shape == expected.shape


@pytest.mark.parametrize('name', HEADS)
def test_heads_on_meta_and_beside_another_default_device(name):
    head, f = entries('head')[name].load()(6, 5).eval(), torch.rand(2, 6, 7, 9)
    expected = head(f)
    with beside(): got = head(f)
    for a, b in zip(got, expected): same(a, b, 0)
    for a, b in zip(head.to('meta')(f.to('meta')), expected): assert a.is_meta and a.shape == b.shape


@pytest.mark.parametrize('device', ['cpu', 'meta'])
def test_decoder_and_maps(device):
    model, x = FullModel(copies.small_net()).to(device), images(n=2).to(device)
    with beside():
        assert model.train()(x).full.device.type == device
        maps = model.eval().forward_maps(x)[1][:, 0]
        for preset in PRESETS: assert to_score_maps(maps, (32, 40), preset).device.type == device


@pytest.mark.parametrize('device', ['cpu', 'meta'])
def test_seeds_beside_another_default_device(device):
    maps, z = images(24, 32)[:, 0].to(device), torch.zeros(3, 2, 24, 32, device=device)
    with beside():
        seeds = seeds_of(maps)
        assert seeds.device.type == device and seeds.shape == maps.shape
        assert seed_weights(maps)[0].device.type == device
        assert partial_cross_entropy(z, seeds).device.type == device
