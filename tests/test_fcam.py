"""F-CAM and its pipeline: what notebook 61 cannot see."""
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers import TINY, fit_quietly, raises, same_state, wsol
from torch import nn

from wsol_nb.methods.pooling import WILDCAT
from wsol_nb.cam.gradient import GradCAM
from wsol_nb.data.loaders import WSOLDataLoaders
from wsol_nb.data.stores import MapStore
from wsol_nb.dense.fcam import FCAM
from wsol_nb.dense.seeded import DrawSeeds
from wsol_nb.dense.terms import SumOfTerms, seed_term
from wsol_nb.nets.decoder import FullMaps, FullModel, Prediction
from wsol_nb.train.checkpoint import Checkpoint, resume
from wsol_nb.train.learner import wsol_learner
from wsol_nb.train.method import GAP, adam
from wsol_nb.train.run import load_run, save_run
from wsol_nb.localize.base import HeadMaps, find_localizer
from wsol_nb.localize.mirrored import Mirrored
from wsol_nb.nets.model import wsol_model


@pytest.fixture(scope='module')
def dls(world): return WSOLDataLoaders.from_metadata(world, 'SYNTH', size=64, resize=64, bs=16)


@pytest.fixture(scope='module')
def stage1(dls, tmp_path_factory):
    "A trained classifier with dropout, as a run folder."
    path = tmp_path_factory.mktemp('stage1')
    learn = wsol_learner(dls, 'resnet10t', WILDCAT(), stride=16, opt_func=adam, localization=False, path=path)
    return save_run(fit_quietly(learn), path/'run')


def fit(dls, path, epochs=1, cbs=(), **kw):
    learn = wsol_learner(dls, method=FCAM(**kw), opt_func=adam, wd=0., localization=False,
                         cbs=[Checkpoint(path), *cbs], path=path)
    resume(learn, path)
    return fit_quietly(learn, epochs)


def drawing(method, dls):
    "A drawer of seeds in the middle of a training step, the model and the batch."
    model, draw = method.model('resnet10t', dls.c, stride=16).train(), DrawSeeds(method)
    x, y = dls.one_batch()
    draw.seeder, draw.learn = method.seeder(model.classifier), SimpleNamespace(pred=model(x), x=x)
    return draw, model, x, y


def test_frozen_classifier_is_bit_identical(dls, stage1, tmp_path):
    first = load_run(stage1)
    first.model.head.insert = nn.Dropout(.5) # a module whose mode would show
    learn = fit(dls, tmp_path, 2, stage1=stage1)
    frozen = learn.model.classifier
    del first.model.head.insert
    assert same_state(frozen, first.model) and not any(p.requires_grad for p in frozen.parameters())
    learn.model.train()
    assert learn.model.decoder.training and not any(m.training for m in frozen.modules())
    norms = [m for m in learn.model.decoder.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(m.num_batches_tracked == 6 for m in norms) # the decoder did learn: 2 epochs of 3 batches


def test_joint_classifier_learns(dls, stage1, tmp_path):
    learn = fit(dls, tmp_path, stage1=stage1, freeze=False)
    assert not same_state(learn.model.classifier, load_run(stage1).model) and 'classes' in learn.rows[-1]


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_mixed_precision_gives_no_nan(dls, stage1, dtype):
    "The loss and its gradients in autocast, on real seeds; fp16 needs its scale, as under a GradScaler."
    method = FCAM(stage1=stage1, size=.1)
    model = method.model('resnet10t', dls.c, stride=16).train()
    x, y = dls.one_batch()
    with torch.autocast('cpu', dtype=dtype):
        pred = model(x)
        seeds = method.draw(method.seeder(model.classifier).raw(x, y), pred.full.shape[-2:], y)
        loss = method.loss()(pred, y, x, seeds)
    assert loss.dtype == torch.float32 and loss.isfinite()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.decoder.parameters())


def test_ignored_batch_is_zero(dls, stage1):
    full = torch.randn(2, 2, 8, 8, requires_grad=True)
    total = SumOfTerms({'seeds': (1., seed_term)})
    nowhere = torch.full((2, 8, 8), 255)
    loss = total(Prediction(None, None, full), torch.tensor([0, 1]), torch.rand(2, 3, 16, 16), nowhere)
    loss.backward()
    assert loss == 0 and full.grad.abs().sum() == 0


def test_interrupted_run_is_the_same_run(dls, stage1, tmp_path):
    whole = fit(dls, tmp_path/'whole', 3, stage1=stage1, seeds='gradcam')
    fit(dls, tmp_path/'parts', 1, stage1=stage1, seeds='gradcam')
    parts = fit(dls, tmp_path/'parts', 3, stage1=stage1, seeds='gradcam')
    assert same_state(whole.model, parts.model) and whole.rows == parts.rows


def test_loads_without_the_first_stage(dls, stage1, tmp_path):
    copy = shutil.copytree(stage1, tmp_path/'stage1')
    learn = fit(dls, tmp_path/'fcam', stage1=copy, seeds=GradCAM)
    run = save_run(learn, tmp_path/'fcam')
    shutil.rmtree(copy)
    again = load_run(run)
    x, _ = dls.valid.one_batch()
    assert torch.equal(again.localizer()(x), learn.localizer()(x))
    assert again.method.seeds == 'gradcam' and again.method.classifier['name'] == 'WILDCAT'


def test_own_maps_cost_no_second_pass(dls, tmp_path):
    "Seeds of a GAP head's CAM come from the training pass; of any other localizer, from its own."
    options = dict(opt_func=adam, localization=False, path=tmp_path)
    stage = wsol_learner(dls, 'resnet10t', GAP(), stride=16, **options)

    def passes(seeds):
        learn, seen = wsol_learner(dls, method=FCAM(stage1=stage, seeds=seeds), **options), []
        learn.model.classifier.head.register_forward_hook(lambda *a: seen.append(1))
        fit_quietly(learn)
        return len(seen)

    own = passes('cam')
    assert passes('gradcam') >= own + 3 # one more for each of three batches


class RightHalf(HeadMaps):
    "Somebody's localizer that builds on the head's maps: its own are what seeds must come from."
    def compute(self, x, target, create_graph):
        logits, maps = super().compute(x, target, create_graph)
        right = torch.arange(maps.shape[-1]//2, maps.shape[-1])
        return logits, torch.zeros_like(maps).index_fill(-1, right, 1.)


def test_maps_of_a_derived_localizer_are_its_own(dls, stage1):
    draw, _, _, y = drawing(FCAM(stage1, seeds=RightHalf, views=1), dls)
    raw = draw.raw(y)
    assert type(draw.seeder) is RightHalf and raw.mean() == .5 and (raw[..., raw.shape[-1]//2:] == 1).all()


@pytest.mark.parametrize('seeds', ['headmaps', 'gradcam', RightHalf])
def test_mirrored_seeds(dls, stage1, seeds):
    """The mean of an image's map and its mirror image's, though the first is there already where the map is
    the head's own."""
    method = FCAM(stage1, seeds=seeds)
    draw, model, x, y = drawing(method, dls)
    one = find_localizer(method.seeds)(model.classifier)
    mean = (one.raw(x, y) + one.raw(x.flip(-1), y).flip(-1))/2
    assert type(draw.seeder) is Mirrored and torch.allclose(draw.raw(y), mean, atol=1e-5)
    draw.learn.x, mirror = x.flip(-1), draw.raw(y)
    draw.learn.pred = model(x.flip(-1))
    assert torch.allclose(draw.raw(y).flip(-1), mirror, atol=1e-5)


def test_stored_maps_are_used(dls, stage1, tmp_path):
    "Maps from files: here a bright left half, so foreground lies there only, after the image's own flip."
    store, df = MapStore(tmp_path/'maps'), dls.info.manifest
    half = torch.zeros(32, 32)
    half[:, :16] = 1
    for i in df.image_id[df.split == 'train']: store.save(i, half)
    with_maps = WSOLDataLoaders.from_manifest(df, size=64, resize=64, bs=16, maps=store)
    seen = []

    class Look(DrawSeeds):
        order = 6
        def before_fit(self): pass
        def before_epoch(self): pass
        def after_pred(self):
            if self.training: seen.append(self.yb[2])
        def after_loss(self): pass
        def after_train(self): pass

    fit(with_maps, tmp_path, stage1=stage1, erode=1, min_p=.4, cbs=[Look(None)])
    for labels in torch.cat(seen):
        fg, bg = ((labels == k).nonzero()[:, 1] for k in (1, 0))
        assert len(fg) == len(bg) == 10
        as_it_is, flipped = fg.max() < 17 and bg.min() > 14, fg.min() > 14 and bg.max() < 17
        assert as_it_is or flipped


@pytest.mark.parametrize('arch, stride', [('wsol_vgg16', 16), ('wsol_inception_v3', 16),
                                          ('convnext_atto', 16), ('densenet121', None)])
def test_decoder_on_any_net(arch, stride):
    net = FullModel(wsol_model(arch, 3, stride=stride, verbose=False))
    x = torch.rand(2, 3, 75, 99)
    pred = net(x)
    assert pred.full.shape == (2, 2, 37, 49) and FullMaps(net)(x).shape == (2, 75, 99)
    pred.full.sum().backward()
    assert all(p.grad is not None for p in net.decoder.parameters())
    assert all(p.grad is None for p in net.classifier.parameters())


def test_not_a_wsol_model():
    net = nn.Sequential(nn.Conv2d(3, 4, 1))
    with pytest.raises(TypeError, match='expected a WSOLModel on a timm net'): FullModel(net)


def test_what_does_not_fit_is_said(dls, stage1, tmp_path):
    loc, message = load_run(stage1).localizer(), 'expected the name or the class of a localizer'
    raises(f'type(seeds)={type(loc).__name__!r}: {message}', FCAM, stage1, seeds=loc, error=TypeError)
    message = 'stage1: expected a learner, a Run or a run folder, got Sequential'
    raises(message, FCAM, stage1=nn.Sequential(), error=TypeError)
    raises('no run is saved there', FCAM, stage1=tmp_path/'nowhere')
    message = 'the weights are those of the first stage'
    raises(message, wsol_learner, dls, method=FCAM(stage1=stage1), pretrained=True)
    refusal = "targets='multi': expected 'single', since FCAM needs one class"
    raises(refusal, FCAM, stage1=stage1, targets='multi')
    raises('views=3: expected 1 (the image), 2', FCAM, stage1=stage1, views=3)


def test_command_line(world, tmp_path):
    "Both stages from the shell, evaluated and applied to a photo; the first stage's data are the default."
    cam, fcam = tmp_path/'cam', tmp_path/'fcam'
    wsol('train', '--data', world, '--out', cam, '--epochs', 1, *TINY)
    second = ['--method', 'fcam', '--stage1', cam]
    text = wsol('train', *second, '--seeds', 'layercam', '--out', fcam, '--epochs', 2, '--bs', 16)
    assert 'seeds' in text and 'crf' in text and 'max_box_acc' in text
    run = load_run(fcam)
    config, data = run.config, run.config['data']
    assert (config['arch'], data['size'], data['resize']) == ('resnet10t', 64, 64)
    assert (config['train']['opt'], run.method.seeds) == ('adam', 'layercam')
    report = wsol('eval', fcam)
    assert 'B-LOC' in report and 'B-CL' not in report
    assert 'val boxes' in wsol('localize', fcam, next(world.rglob('*.jpg')), '--out', tmp_path)
    for args, message in ((('--method', 'fcam'), 'stage1: FCAM stands on a trained classifier'),
                          (('--seeds', 'cam'), 'seeds: GAP has no such choice'),
                          ((*second, '--arch', 'vgg11'), "arch='vgg11': the first stage has 'resnet10t'"),
                          ((*second, '--seeds', 'gradcan'), "localizer 'gradcan': did you mean")):
        assert message in wsol('train', *args, '--out', tmp_path/'bad', code=1)
