"The pooling methods: labels of three kinds, saved and loaded, exported, refused."
import json

import onnxruntime
import pytest
import torch
from helpers import fit_quietly, raises, same

from wsol_nb.methods.pooling import BOTTOM_UP, LSE, SPN, WILDCAT, DeepMIL, TopK
from wsol_nb.data.loaders import WSOLDataLoaders
from wsol_nb.train.learner import wsol_learner
from wsol_nb.train.method import GAP, find_method, method_from_dict, method_to_dict
from wsol_nb.train.run import load_run, save_run
from wsol_nb.localize.base import HeadMaps
from wsol_nb.nets.model import export_model, wsol_model
from wsol_nb.nets.heads import HEADS, PRMHead
from fastai.data.block import CategoryBlock, DataBlock, MultiCategoryBlock
from fastai.data.transforms import ColReader
from fastai.learner import Learner
from fastai.vision.augment import Resize
from fastai.vision.data import ImageBlock

METHODS = {m.__name__: m for m in BOTTOM_UP}
each = pytest.mark.parametrize('name', METHODS)


def small(name, **kw):
    "The method, with a narrow head where its own is wide."
    return METHODS[name](**(dict(width=16) if name == 'SPN' else {}), **kw)


def test_methods_and_heads_are_the_same_family():
    assert {n: m.Head for n, m in METHODS.items()} == HEADS


@each
def test_name_and_fields_come_back(name):
    method = METHODS[name](targets='multi')
    assert find_method(name.lower()) is METHODS[name]
    again = method_from_dict(json.loads(json.dumps(method_to_dict(method))))
    assert again == method and repr(again) == repr(method), 'a count must not come back as a share'


def test_fields_reach_the_head():
    head = WILDCAT(modalities=3, kmax=2, kmin=1, alpha=.5, halve=True).head()(4, 5)
    assert (head.modalities, head.kmax, head.kmin, head.alpha, head.halve) == (3, 2, 1, .5, True)
    assert LSE(r=3.).head()(4, 5).r == 3 and DeepMIL(gated=True).head()(4, 5).U is not None
    assert SPN(width=6).head()(4, 5).conv.out_channels == 6


LABELS = [('single', [0, 1, 1, 0]), ('multi', [[1., 0], [1, 1], [0, 0], [0, 1]]), ('bag', [0, 1, 1, 0])]


@each
@pytest.mark.parametrize('targets, y', LABELS, ids=lambda v: v if isinstance(v, str) else '')
def test_training_reaches_every_weight(name, targets, y):
    method = small(name, targets=targets)
    model = method.model('test_resnet', 2, stride=16, verbose=False).train()
    loss = method.loss()(model(torch.rand(4, 3, 64, 64)), torch.tensor(y))
    loss.backward()
    for n, p in model.named_parameters(): assert p.grad is not None and p.grad.isfinite().all(), n
    silent = [n for n, p in model.head.named_parameters() if not p.grad.any()]
    shift = [n for n in silent if name == 'DeepMIL' and n.endswith('w.bias')] # softmax does not see a shift
    assert silent == shift, f'no gradient reaches {silent}'


@each
@pytest.mark.parametrize('several', [False, True])
def test_with_plain_fastai_loaders(world, tmp_path, name, several):
    "The model and loss of a method also serve a DataBlock, with CategoryBlock or MultiCategoryBlock."
    from wsol_nb.data.metadata import read_metadata
    df = read_metadata(world, 'SYNTH', 'train').iloc[:16]
    df = df.assign(names=df.class_name + ('|thing' if several else ''))
    labels = MultiCategoryBlock if several else CategoryBlock
    block = DataBlock((ImageBlock, labels), item_tfms=Resize(64), get_x=ColReader('path'),
                      get_y=ColReader('names', label_delim='|' if several else None),
                      splitter=lambda d: (list(range(12)), list(range(12, 16))))
    dls = block.dataloaders(df, bs=4, num_workers=0)
    method = small(name, targets='multi' if several else 'single')
    model = method.model('test_resnet', dls.c, stride=16, verbose=False)
    learn = Learner(dls, model, loss_func=method.loss(), splitter=method.param_groups, path=tmp_path)
    fit_quietly(learn)
    assert torch.isfinite(torch.tensor(learn.recorder.values[0])).all()
    x = dls.valid.one_batch()[0]
    assert HeadMaps(learn.model)(torch.Tensor(x)).shape == (4, 64, 64)


@each
def test_saved_and_loaded(world, tmp_path, name):
    dls = WSOLDataLoaders.from_metadata(world, 'SYNTH', size=64, bs=8)
    learn = wsol_learner(dls, 'test_resnet', small(name), stride=16, localization=False, path=tmp_path,
                         verbose=False)
    run, x = load_run(save_run(learn, tmp_path/'run')), torch.rand(2, 3, 64, 64)
    assert run.method == learn.method
    assert torch.equal(run.localizer()(x), learn.localizer()(x))


def with_two_classes(world):
    "The world with a second label on some images."
    df = WSOLDataLoaders.from_metadata(world, 'SYNTH', size=64).info.manifest.copy()
    df['labels'] = [[l, (l + 1) % 8] if i % 2 else [l] for i, l in enumerate(df.label)]
    return WSOLDataLoaders.from_manifest(df, size=64, bs=8)


def test_labels_that_do_not_fit_the_method(world):
    one = WSOLDataLoaders.from_metadata(world, 'SYNTH', size=64, bs=8)
    several = with_two_classes(world)
    message = "method=WILDCAT: trains on one class an image (targets='single'), but these data have several"
    raises(message, wsol_learner, several, 'test_resnet', WILDCAT())
    message = "method=WILDCAT: trains on several classes an image (targets='multi'), but these data have one"
    raises(message, wsol_learner, one, 'test_resnet', WILDCAT(targets='multi'))
    message = 'n_classes=8: a bag is negative (class 0) or positive (class 1)'
    raises(message, wsol_learner, one, 'test_resnet', DeepMIL(targets='bag'))
    learn = wsol_learner(several, 'test_resnet', WILDCAT(targets='multi'), stride=16, verbose=False)
    fit_quietly(learn)
    assert learn.recorder.values[0][0] > 0


@pytest.mark.parametrize('method, message', [
    (LSE(r=0), 'r=0'),
    (LSE(r=-1.), 'r=-1.0'),
    (WILDCAT(kmin=0), 'there is no minimum term to weigh'),
    (WILDCAT(modalities=0), 'modalities=0'),
    (TopK(k=0), 'k=0'),
    (TopK(k=1.5), 'k=1.5'),
    (DeepMIL(maps='both'), "maps='both'"),
    (SPN(dropout=1.), 'dropout=1.0'),
], ids=lambda v: v if isinstance(v, str) else '')
def test_bad_hyper_parameters(method, message): raises(message, method.model, 'test_resnet', 3)


def test_more_cells_than_the_map_has():
    model = TopK(k=17).model('test_resnet', 3, stride=16, verbose=False)
    assert model(torch.rand(1, 3, 96, 96)).shape == (1, 3)
    raises('k=17: the map has 16 cells only', model, torch.rand(1, 3, 64, 64))


@pytest.mark.parametrize('name', HEADS)
def test_tokens_are_refused(name):
    raises('needs (B,K,h,w), got (2, 197, 192)', HEADS[name](192, 3), torch.rand(2, 197, 192))


def test_peaks_of_nan_maps_do_not_crash():
    maps = torch.zeros(1, 2, 4, 4)
    maps[0, 0, 1, 1] = float('nan')
    y = PRMHead(1, 1).pool(maps)
    assert y[0, 0].isnan() and y[0, 1] == 0


@pytest.mark.parametrize('name', HEADS)
def test_exported_model_gives_the_same_maps(tmp_path, name):
    torch.manual_seed(0)
    model = wsol_model('test_resnet', 5, stride=16, head=HEADS[name], verbose=False).eval()
    program = export_model(model, tmp_path/'m.onnx', size=(64, 96))
    session = onnxruntime.InferenceSession(tmp_path/'m.onnx')
    for n in (1, 3):
        x = torch.rand(n, 3, 64, 96)
        with torch.no_grad(): expected = model.forward_maps(x)
        exported = program.module()(x)
        run = map(torch.from_numpy, session.run(['logits', 'maps'], {'images': x.numpy()}))
        for found in (exported, run):
            for got, want in zip(found, expected, strict=True): same(got, want, 1e-4)


@pytest.mark.parametrize('arch', ['wsol_vgg16', 'wsol_resnet50', 'wsol_inception_v3'])
def test_reference_learning_rates(world, tmp_path, arch):
    "Neck, head and the reference ResNet's layer4 learn at ten times the rate of the rest."
    dls = WSOLDataLoaders.from_metadata(world, 'SYNTH', size=64, bs=8)
    learn = wsol_learner(dls, arch, GAP(), localization=False, path=tmp_path, verbose=False)
    learn.create_opt()
    learn.opt.set_hyper('lr', slice(.001, .01))
    assert [round(h['lr'], 9) for h in learn.opt.hypers] == [.001, .01]
    names = {id(p): n for n, p in learn.model.named_parameters()}
    body, late = ({names[id(p)] for p in g} for g in learn.opt.param_lists)
    assert body | late == set(names.values()) and not body & late
    heads, layer4 = ('head.', 'neck.'), 'body.layer4.'
    assert all(n.startswith((*heads, layer4)) for n in late)
    assert not any(n.startswith(heads) for n in body)
    assert any(n.startswith(layer4) for n in late) == (arch == 'wsol_resnet50')
    assert any(n.startswith('neck.') for n in late) == (arch != 'wsol_resnet50')
