"""What goes into a localizer and what a model answers: every localizer on the forms that people have.

A small classifier is dressed as other libraries answer; what a localizer makes of it must be what it makes of
the classifier itself. Values that come from a peer are compared with pytorch-grad-cam.
"""
import sys
import warnings
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import images, raises, run, same
from test_conformance import CLASSES, SETTINGS, TOP_DOWN, VARIANTS, net
from torch import nn

from wsol_nb.cam.gradient import CAM, GradCAM, HiResCAM, LayerCAM, XGradCAM, localize_all
from wsol_nb.cam.score import ScoreCAM
from wsol_nb.localize.base import BoxLocalizer, HeadMaps
from wsol_nb.localize.mirrored import Mirrored
from wsol_nb.localize.outputs import Hint, NotFinite
from wsol_nb.localize.target import SegmentationTarget, Target
from wsol_nb.nets.model import wsol_model

every = pytest.mark.parametrize('name', TOP_DOWN)


def made(name, model, **kwargs):
    "A localizer of that name with small budgets, and these options of the contract."
    settings = SETTINGS.get(name, {}) | (VARIANTS[name][1] if name in VARIANTS else {})
    return CLASSES[name](model, **settings, **kwargs)


class Dressed(nn.Module):
    "The small classifier, whose answer is dressed by a function."
    def __init__(self, dress):
        super().__init__()
        self.net, self.dress = net('Sequential'), dress

    def forward(self, x): return self.dress(self.net(x))


class Answer(NamedTuple):
    logits: torch.Tensor
    aux_logits: torch.Tensor


DRESSES = dict( # what the model makes of its logits; the options that it takes
    object=(lambda z: SimpleNamespace(logits=z, loss=None), {}),
    named_tuple=(lambda z: Answer(z, z.flip(1)), {}),
    dictionary=(lambda z: dict(logits=z, hidden=z.flip(1)), {}),
    alone=(lambda z: dict(scores=z, maps=torch.zeros(len(z), 5, 4, 4)), {}),
    tuple=(lambda z: (z, torch.zeros(len(z), 5, 4, 4)), {}),
    by_key=(lambda z: dict(a=z.flip(1), b=z), dict(output='b')),
    by_attribute=(lambda z: SimpleNamespace(a=z.flip(1), b=z), dict(output='b')),
    by_index=(lambda z: (z.flip(1), z), dict(output=1)),
    from_the_end=(lambda z: [z.flip(1), z], dict(output=-1)),
    by_callable=(lambda z: [dict(row=r) for r in z],
                 dict(output=lambda out: torch.stack([o['row'] for o in out]))))


# what a model answers

@every
@pytest.mark.parametrize('dress', DRESSES)
def test_answers(name, dress):
    how, options = DRESSES[dress]
    x = images(n=2)
    if dress == 'by_callable' and name in ('ExcitationBackprop', 'Contrastive'):
        return raises("'unbind' has no excitation rule", made(name, Dressed(how), **options), x, 1)
    plain = made(name, net('Sequential'))
    loc = made(name, Dressed(how), **options)
    same(loc(x, [3, 1]), plain(x, [3, 1]), 1e-6)
    same(loc.logits, plain.logits, 1e-6)
    assert type(loc.logits) is torch.Tensor


UNCLEAR = dict(
    two=(lambda z: (z, z), 'tuple of 0: a tensor (1, 5), 1: a tensor (1, 5)'),
    two_names=(lambda z: dict(a=z, b=z), "dict of 'a': a tensor (1, 5), 'b': a tensor (1, 5)"),
    boxes=(lambda z: [dict(boxes=z[0], scores=z[0])], "list of 0: dict of 'boxes': a tensor (5,)"),
    nothing=(lambda z: None, 'NoneType'),
    other_batch=(lambda z: torch.cat([z, z]), 'a tensor (2, 5)'),
    whole_numbers=(lambda z: z.argmax(1), 'a tensor (1,)'))


@every
@pytest.mark.parametrize('dress', UNCLEAR)
def test_what_is_not_obvious_is_listed(name, dress):
    how, listed = UNCLEAR[dress]
    loc = made(name, Dressed(how))
    raises(listed, loc, images(n=1), 1, error=TypeError)
    raises('output= chooses: a key, an index or a callable', loc, images(n=1), 1, error=TypeError)


@every
def test_a_part_that_is_not_there(name):
    loc = made(name, Dressed(lambda z: dict(a=z)), output='b')
    raises("output='b': the model answers dict of 'a': a tensor (1, 5)", loc, images(n=1), 1)


@pytest.mark.parametrize('form', [lambda z: z[:, 0], lambda z: z[:, :1].squeeze()])
def test_one_number_an_image(form):
    for n in (1, 3):
        loc = GradCAM(Dressed(form))
        same(loc(images(n=n)), GradCAM(Dressed(lambda z: z[:, :1]))(images(n=n)), 0)
        assert loc.logits.shape == (n, 1)


def test_what_no_option_is():
    raises("output=[1]: expected a key, an index or a callable", GradCAM, net('Sequential'), output=[1],
           error=TypeError)
    raises("check='loud': expected 'warn', 'raise' or None", GradCAM, net('Sequential'), check='loud')


class Scaled(nn.Module):
    "Needs more than images."
    def __init__(self):
        super().__init__()
        self.net = net('Sequential')

    def forward(self, x, scale, *, shift): return self.net(x)*scale + shift


NOT_SCALED = dict(CAM='are no linear layer of the average of',
                  ExcitationBackprop="'mul' has no excitation rule",
                  Contrastive="'mul' has no excitation rule")


@every
def test_forward_kwargs(name):
    x, more = images(n=2), dict(scale=2., shift=torch.tensor(1.))
    plain, loc = made(name, net('Sequential')), made(name, Scaled(), forward_kwargs=more)
    raises('scale', made(name, Scaled()), x, 1, error=TypeError)
    if name in NOT_SCALED: return raises(NOT_SCALED[name], loc, x, 1)
    plain(x, 1)
    maps = loc(x, 1)
    same(loc.logits, 2*plain.logits + 1, 1e-5)
    assert maps.shape == (2, 64, 96) and maps.isfinite().all()


def test_forward_kwargs_reach_class_maps():
    class Biased(type(net('resnet10t'))):
        def forward_maps(self, x, shift=0.):
            logits, maps = super().forward_maps(x)
            return logits + shift, maps
    model = net('resnet10t')
    model.__class__ = Biased
    plain, shifted = HeadMaps(model), HeadMaps(model, forward_kwargs=dict(shift=3.))
    same(shifted(images()), plain(images()), 0)
    same(shifted.logits, plain.logits + 3, 1e-5)


# nets that score each place

class Segmenter(nn.Module):
    "A small segmentation net in torchvision's form."
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, 1, 1), nn.ReLU())
        self.classifier = nn.Conv2d(8, 5, 1)
        nn.init.uniform_(self.classifier.weight, -.25, .5)

    def forward(self, x):
        z = self.classifier(self.body(x))
        out = F.interpolate(z, x.shape[2:], mode='bilinear', align_corners=False)
        return dict(out=out, aux=out.flip(1))


def segmenter():
    torch.manual_seed(3)
    return Segmenter()


def a_region():
    region = torch.zeros(64, 96)
    region[10:30, 20:60] = 1
    return region


NO_PLACES = dict(CAM='are no linear layer of the average of',
                 ExcitationBackprop="'interpolate' has no excitation rule",
                 Contrastive="'interpolate' has no excitation rule",
                 Refined='expected the rows and columns of the scores') # of a smaller picture


@every
def test_a_region_of_a_segmentation_net(name):
    x, loc = images(n=2), made(name, segmenter())
    asked = SegmentationTarget(2, a_region())
    if name in NO_PLACES: return raises(NO_PLACES[name], loc, x, asked)
    maps = loc(x, asked)
    assert loc.logits.shape == (2, 5, 64, 96) and maps.shape == (2, 64, 96)
    assert maps.flatten(1).any(1).all(), 'an empty map shows nothing'
    same(loc(x[1:], asked)[0], maps[1], 2e-3)
    same(loc(x, [asked, asked]), maps, 1e-4)
    each = SegmentationTarget(2, a_region().expand(2, -1, -1))
    same(loc(x, each), maps, 1e-4)
    raises('the model scores each place, (2, 5, 64, 96): expected SegmentationTarget', loc, x, 1)
    pooled = made(name, segmenter(), output=lambda out: out['out'].mean((2, 3)))
    assert pooled(x, 1).shape == (2, 64, 96) and pooled.logits.shape == (2, 5)


@pytest.mark.parametrize('peer, ours', [('GradCAM', GradCAM), ('XGradCAM', XGradCAM), ('LayerCAM', LayerCAM)])
def test_a_region_as_in_pytorch_grad_cam(peer, ours):
    pgc = pytest.importorskip('pytorch_grad_cam')
    from pytorch_grad_cam.utils.model_targets import SemanticSegmentationTarget
    model, x = segmenter().eval(), images(n=2)
    region = a_region().numpy().astype(np.float32)
    alone = Dressed(lambda out: out['out'])
    alone.net = model
    with getattr(pgc, peer)(model=alone, target_layers=[model.body]) as cam:
        theirs = torch.from_numpy(cam(x, targets=[SemanticSegmentationTarget(2, region)]*2))
    same(early(ours(model, 'body').raw(x, SegmentationTarget(2, region))), theirs, 1e-4)
    theirs_as_target = [SemanticSegmentationTarget(2, region)]*2
    same(early(ours(model, 'body').raw(x, theirs_as_target)), theirs, 1e-4)


def test_a_mirrored_image_has_its_region_elsewhere():
    model, x = segmenter(), images(n=1)
    asked = SegmentationTarget(2, a_region())
    there = SegmentationTarget(2, a_region().flip(-1))
    both = LayerCAM(model).raw(x, asked), LayerCAM(model).raw(x.flip(-1), there).flip(-1)
    same(Mirrored(model, of=LayerCAM).raw(x, asked), (both[0] + both[1])/2, 1e-6)


# nets that end in a softmax

SQUASHED = dict(
    module=lambda f: nn.Softmax(1), function=lambda f: lambda z: F.softmax(z, 1),
    method=lambda f: lambda z: z.softmax(-1), log=lambda f: lambda z: torch.log_softmax(z, 1),
    sigmoid=lambda f: nn.Sigmoid(), tensor_sigmoid=lambda f: torch.sigmoid,
    in_a_dictionary=lambda f: lambda z: dict(logits=z.softmax(1)))


@every
def test_a_net_that_ends_in_softmax(name):
    "Its maps are those of the scores before, and it is said once."
    x, plain = images(n=2), made(name, net('Sequential'))
    for kind, squash in SQUASHED.items():
        if name not in ('GradCAM', 'ScoreCAM', 'AblationCAM') and kind not in ('module', 'sigmoid'): continue
        loc = made(name, Dressed(squash(None)))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            same(loc(x, 1), plain(x, 1), 1e-6)
            loc(x, 1)
        same(loc.logits, plain.logits, 1e-6)
        hints = [str(w.message) for w in said if issubclass(w.category, Hint)]
        assert len(hints) == 1 and 'what goes into it is explained' in hints[0], (kind, hints)


def test_probabilities_of_a_net_that_is_sure():
    "The fault: a gradient of nothing. The right map does not depend on how sure the net is."
    def certain(z): return F.softmax(1e6*z, 1)
    x, plain = images(n=2), GradCAM(net('Sequential'))
    asked = GradCAM(Dressed(certain), output=lambda p: p)
    assert not asked(x).any(), 'maps of probabilities vanish; else this test shows nothing'
    with pytest.warns(Hint): same(GradCAM(Dressed(certain))(x), plain(x), 1e-3)


def test_probabilities_that_nobody_saw_are_hinted_at():
    loc = GradCAM(Dressed(lambda z: z.exp()/z.exp().sum(1, keepdim=True)))
    with pytest.warns(Hint, match='look like probabilities'): loc(images())
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        loc(images()) # said once
        GradCAM(Dressed(lambda z: z.softmax(1)), output=lambda p: p)(images()) # asked for


# tensors of other types

class Typed(torch.Tensor):
    "Carries its type into all that is computed, as fastai's `TensorImage` does."


@pytest.mark.parametrize('name', CLASSES)
def test_subclasses_of_tensors(name):
    from fastai.torch_core import TensorBase
    from fastai.vision.core import TensorImage
    from fastai.data.all import TensorCategory
    x, y = images(), torch.tensor([2, 0, 1])
    loc = made(name, net('resnet10t'))
    maps = loc(x, y)
    for image, label in ((TensorImage, TensorCategory), (TensorBase, TensorBase), (Typed, Typed)):
        found = loc(image(x) if image is not Typed else x.as_subclass(Typed), y.as_subclass(label))
        raw = loc.raw(x.as_subclass(image), y.as_subclass(label))
        assert {type(t) for t in (found, raw, loc.logits)} == {torch.Tensor}
        same(found, maps, 0)
    if name == 'HeadMaps':
        typed = TensorImage(x).requires_grad_()
        assert type(loc(typed, y, create_graph=True)) is torch.Tensor


def test_subclasses_elsewhere():
    from wsol_nb.cam.peaks import peak_responses
    x = images(n=1).as_subclass(Typed)
    found = localize_all(net('resnet10t'), x, ['gradcam', 'layercam'], 1)
    assert {type(m) for m in found.values()} == {torch.Tensor}
    (peaks,) = peak_responses(net('resnet10t'), x, torch.tensor([1]).as_subclass(Typed), responses=False)
    assert type(peaks.scores) is torch.Tensor

    class Corner(BoxLocalizer):
        def compute_boxes(self, x, target): return self.ask(x), torch.zeros(len(x), 4)

    loc = Corner(net('Sequential'))
    assert type(loc.boxes(x)) is np.ndarray and type(loc.logits) is torch.Tensor
    masked = SegmentationTarget(1, a_region().as_subclass(Typed))
    assert type(masked(torch.rand(2, 5, 64, 96))) is torch.Tensor


# values that are no numbers

@pytest.mark.parametrize('name', CLASSES)
def test_nan_is_said_once_a_call(name):
    x = images()
    x[1, 0, 5, 5] = float('nan')
    loc = made(name, net('resnet10t'))
    for _ in range(2):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            maps = loc(x, 1)
        found = [str(w.message) for w in said if issubclass(w.category, NotFinite)]
        assert len(found) == 1 and 'the logits of 1' in found[0] and 'of 3 images, at 1' in found[0], found
    assert not maps[1].any() and maps[0].any() and maps[2].any()
    raises('of 3 images, at 1', made(name, net('resnet10t'), check='raise'), x, 1)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        made(name, net('resnet10t'), check=None)(x, 1)
        loc(images(), 1)


class Rooted(nn.Module):
    "Finite logits whose gradient is infinite where the square root is of nothing."
    def __init__(self):
        super().__init__()
        self.conv, self.relu, self.fc = nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Linear(6, 5)

    def forward(self, x): return self.fc(self.relu(self.conv(x)).sqrt().mean((2, 3)))


@pytest.mark.parametrize('cls', [GradCAM, HiResCAM, LayerCAM, XGradCAM])
def test_gradients_that_are_no_numbers(cls):
    with pytest.warns(NotFinite, match='the gradients of 3'): cls(Rooted(), 'relu')(images(), 1)
    raises('the gradients of 3', cls(Rooted(), 'relu', check='raise'), images(), 1)


def test_the_check_reads_from_the_device_once(monkeypatch):
    "On a GPU each read waits; so the flags of logits, gradients and maps come together."
    from wsol_nb.localize import outputs
    reads, stack = [], torch.stack
    monkeypatch.setattr(outputs.torch, 'stack', lambda *a, **kw: reads.append(1) or stack(*a, **kw))
    GradCAM(net('Sequential'))(images(), 1)
    assert len(reads) <= 2 # the flags; what is done with them afterwards is on the host


# targets

def pgc_targets(): return pytest.importorskip('pytorch_grad_cam.utils.model_targets')


def early(raw):
    "Raw maps as pytorch-grad-cam scales them."
    from wsol_nb.core import minmax
    from wsol_nb.localize.maps import to_score_maps
    return minmax(to_score_maps(raw, (64, 96), 'early'))


class Plain(nn.Module):
    "A classifier of C classes with large scores, since the peer's gradients drown in its ε."
    def __init__(self, C):
        super().__init__()
        torch.manual_seed(5)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
        self.fc = nn.Linear(8, C)

    def forward(self, x): return 20*self.fc(self.body(x).mean((2, 3)))


PGC_TARGETS = dict( # number of classes, how one is made
    binary=(1, lambda t: t.BinaryClassifierOutputTarget(1)),
    not_binary=(1, lambda t: t.BinaryClassifierOutputTarget(0)),
    raw=(1, lambda t: t.RawScoresOutputTarget()),
    classes=(4, lambda t: t.ClassifierOutputTarget(2)),
    softmax=(4, lambda t: t.ClassifierOutputSoftmaxTarget(2)),
    both=(4, lambda t: t.ClassifierOutputReST(1)),
    finer=(4, lambda t: t.FinerWeightedTarget(1, [0, 2], .6)))


@pytest.mark.parametrize('peer, ours', [('GradCAM', GradCAM), ('LayerCAM', LayerCAM)])
@pytest.mark.parametrize('kind', PGC_TARGETS)
def test_targets_of_pytorch_grad_cam(kind, peer, ours):
    pgc, (C, make) = pytest.importorskip('pytorch_grad_cam'), PGC_TARGETS[kind]
    asked, model, x = make(pgc_targets()), Plain(C).eval(), images(n=2)
    with getattr(pgc, peer)(model=model, target_layers=[model.body]) as cam:
        theirs = torch.from_numpy(cam(x, targets=[asked, asked]))
    loc = ours(model, 'body')
    same(early(loc.raw(x, [asked, asked])), theirs, 1e-4)
    assert torch.equal(loc(input_tensor=x, targets=[asked, asked]), loc(x, [asked, asked]))
    if kind not in ('finer', 'both'): same(loc.raw(x, asked), loc.raw(x, [asked, asked]), 1e-5)
    if (kind, peer) != ('not_binary', 'LayerCAM'): assert theirs.any(), 'empty maps agree with anything'


@every
def test_one_number_an_image_of_any_shape(name):
    t, x = pgc_targets(), images(n=2)
    loc = made(name, Dressed(lambda z: z[:, 2:3]))
    if name == 'CAM': return raises('are no linear layer', loc, x, t.RawScoresOutputTarget())
    raw = loc.raw(x, [t.RawScoresOutputTarget()]*2)
    size = raw.abs().max().clamp(min=1)
    same(raw, loc.raw(x, 0), 1e-5*size)
    same(raw, loc.raw(x, t.RawScoresOutputTarget()), 1e-5*size)
    more = made(name, net('Sequential'))
    if name != 'EigenCAM':
        raises('image 0 must give one number, got (5,)', more, x, [t.RawScoresOutputTarget()]*2)


@pytest.mark.parametrize('name', CLASSES)
def test_one_hot_rows_are_refused(name):
    loc, x = made(name, net('resnet10t')), images()
    hot = F.one_hot(torch.tensor([0, 2, 1]), 5)
    for rows in (hot, hot.tolist(), hot.numpy(), hot[:, :3]):
        raises('class positions expected, such as target.argmax(1)', loc, x, rows)
    assert loc(x, [[0, 1], [1, 0], [0, 1]]).shape == (3, 2, 64, 96)


@pytest.mark.parametrize('name', CLASSES)
def test_names_are_targets(name):
    names, x = ['ant', 'bee', 'cat', 'dog', 'elk'], images()
    loc = made(name, net('resnet10t'), classes=names)
    same(loc(x, 'cat'), loc(x, 2), 0)
    same(loc(x, ['cat', 'ant', 'elk']), loc(x, [2, 0, 4]), 0)
    same(loc(x, [['cat', 'ant']]*3), loc(x, [[2, 0]]*3), 0)
    raises("target='kat': did you mean cat", loc, x, 'kat')
    raises("names of the model's classes are not known", made(name, net('resnet10t')), x, 'cat')


def test_names_that_the_model_knows():
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    x, model = images(), net('resnet10t')
    model.class_names = ['ant', 'bee', 'cat', 'dog', 'elk']
    same(GradCAM(model)(x, 'bee'), GradCAM(model)(x, 1), 0)
    dls = DataLoaders([], [])
    dls.vocab = ['v', 'w', 'x', 'y', 'z']
    learn = Learner(dls, net('Sequential'), loss_func=nn.CrossEntropyLoss())
    same(GradCAM(learn)(x, 'y'), GradCAM(learn)(x, 3), 0)


def test_targets_do_not_wait_for_the_device(monkeypatch):
    "Positions are checked on the host, before the model runs; afterwards no value is read."
    logits = torch.rand(2, 3)
    hot = Target([0, 2], 2).pinned(logits)

    def refuse(self): raise AssertionError('a value was read')
    for read in ('item', '__bool__', '__int__', 'tolist'): monkeypatch.setattr(torch.Tensor, read, refuse)
    Target(None, 2).pinned(logits).scores(logits)
    hot.scores(logits)
    Target(None, 2).scores(logits)


def test_which_form_an_image_has():
    raises('x: expected a float tensor (B,3,H,W), got', GradCAM(net('Sequential')), images()[0])
    raises('x: expected a float tensor (B,C,L), got', GradCAM(nn.Sequential(nn.Conv1d(3, 4, 3))), images())
    raises('(B,C,D,H,W), got', GradCAM(nn.Sequential(nn.Conv3d(3, 4, 3))), images())
    raises('torch.uint8', GradCAM(net('Sequential')), images().byte())


def test_score_family_keeps_options_in_its_copies():
    "Its copy of the net is asked through the same door."
    x = images(n=2)
    plain = ScoreCAM(net('Sequential'), channels=4)
    loc = ScoreCAM(Dressed(lambda z: (z.flip(1), z)), channels=4, output=1)
    same(loc(x, 3), plain(x, 3), 1e-6)


def test_cam_of_a_dressed_wsol_model():
    torch.manual_seed(1)
    model = wsol_model('resnet10t', 5, verbose=False)
    wrapped = Dressed(lambda z: dict(logits=z))
    wrapped.net = model
    same(CAM(wrapped, 'net.body.layer4')(images(), 1), CAM(model, 'body.layer4')(images(), 1), 1e-6)


# imports

AFTER = 'import wsol_nb; import timm, torchvision; from wsol_nb import GradCAM; print(timm.__name__)'
ORDERS = dict(
    wsol_nb_first=AFTER,
    core_first='import wsol_nb.core; import timm; print(timm.__name__)',
    after_it_died=f'try: import torchvision\nexcept RuntimeError as e: assert "nms" in str(e)\n{AFTER}')


@pytest.mark.parametrize('order', ORDERS)
def test_order_of_imports(order):
    "torchvision and torch of different builds: after wsol_nb all is well, also where it died before."
    assert run(sys.executable, '-c', ORDERS[order]).stdout == 'timm\n'
