"""A ready classifier is scored as it is: on a set that is only tested, with another head than the data's."""
import json
import shutil
import warnings

import pytest
import torch
from helpers import raises, same, wsol
from torch import nn

from wsol_nb.cam.gradient import GradCAM
from wsol_nb.data.loaders import WSOLDataLoaders
from wsol_nb.localize.base import HeadMaps
from wsol_nb.localize.outputs import Hint
from wsol_nb.nets.model import wsol_model
from wsol_nb.scoring.loop import evaluate
from wsol_nb.scoring.report import Report
from wsol_nb.show import examples
from wsol_nb.train.learner import wsol_learner
import timm

QUIET = dict(progress=False, bootstrap=0, tau_from=None)


@pytest.fixture(scope='module')
def tested(world, tmp_path_factory):
    "A world that has a test split and nothing else."
    root = tmp_path_factory.mktemp('tested')
    shutil.copytree(world/'metadata/SYNTH/test', root/'metadata/SYNTH/test')
    for f in (world/'metadata/SYNTH').glob('*.*'): shutil.copy(f, root/'metadata/SYNTH')
    (root/'SYNTH').symlink_to(world/'SYNTH')
    return root


@pytest.fixture(scope='module')
def dls(tested): return WSOLDataLoaders.from_metadata(tested, 'SYNTH', size=64, bs=8, device='cpu')


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    "A classifier of twenty classes, with the random weights that it has."
    torch.manual_seed(3)
    file = tmp_path_factory.mktemp('weights')/'resnet10t-mine.pth'
    torch.save(timm.create_model('resnet10t', num_classes=20).state_dict(), file)
    return file


def ready(weights, **kw): return wsol_model('resnet10t', None, weights, head='keep', verbose=False, **kw)


def test_a_set_that_is_only_tested(dls, weights, world):
    "Its loaders work, but nobody trains on them; the maps' scores are those of the whole world."
    assert (len(dls.train_ds), len(dls.valid_ds), dls.c) == (0, 16, 8)
    assert dls.info.roles == dict(train=None, valid=None, tune=None, test='test')
    raises("dls.splits=['test']: expected a split to train on", wsol_learner, dls, 'resnet10t')
    loc, places = HeadMaps(ready(weights)), list(range(8))
    report = evaluate(loc, dls, progress=False, bootstrap=0, classes=places) # τ from 'tune': there is none
    assert [row['tau'] for row in report.ledger] == ['oracle', 'fixed']
    whole = WSOLDataLoaders.from_metadata(world, 'SYNTH', size=64, bs=8, device='cpu')
    assert report.boxes == evaluate(loc, whole, classes=places, **QUIET).boxes


def test_a_missing_split_stays_an_error(tested, world):
    raises("train='fit': there is no such split", WSOLDataLoaders.from_metadata, tested, 'SYNTH', train='fit')
    raises("valid='dev': there is no such split", WSOLDataLoaders.from_metadata, tested, 'SYNTH', valid='dev')


def test_a_kept_head_is_timms(weights, capsys):
    theirs = timm.create_model('resnet10t', num_classes=20).eval()
    theirs.load_state_dict(torch.load(weights, weights_only=True))
    model = wsol_model('resnet10t', 20, weights, head='keep').eval()
    assert 'body and head of 20 classes from resnet10t-mine.pth' in capsys.readouterr().out
    x = torch.rand(2, 3, 64, 96)
    same(model(x), theirs((x - model.mean)/model.std), 1e-4)
    same(model(x), model.forward_maps(x)[1].mean((2, 3)), 1e-4)
    assert ready(weights, stride=16).forward_maps(x)[1].shape == (2, 20, 4, 6)
    raises('n_classes=5: expected 20', wsol_model, 'resnet10t', 5, weights, head='keep')
    wsol_model('resnet10t', 5, weights)
    assert 'new head for 5 classes' in capsys.readouterr().out


def test_no_head_to_keep(tmp_path):
    raises("weights whose classifier head='keep' can keep", wsol_model, 'resnet10t', 5, head='keep')
    file = tmp_path/'mobilenetv3_small_050.pth'
    torch.save(timm.create_model('mobilenetv3_small_050').state_dict(), file)
    raises('is not one linear layer on averaged features', wsol_model, 'mobilenetv3_small_050', None, file,
           head='keep')


class Counting(HeadMaps):
    "Counts the images that are localized."
    seen = 0

    def raw(self, x, *args, **kw):
        Counting.seen += len(x)
        return super().raw(x, *args, **kw)


@pytest.mark.parametrize('classes, error', [
    (None, 'the model has 20 classes and the data 8, and which is which is not known'),
    ([0, 1], 'len(classes)=2: expected 8, one a class'),
    (range(13, 21), 'classes=20: expected 0 to 19'),
    ([3]*8, "classes=[3]: expected another of the model's classes"),
    ({'red_star': 0}, 'an entry for each class of the data; 7 lack one'),
    (['ant']*8, "classes='ant': expected a position: the model's names are not known")])
def test_another_head_is_refused_before_the_first_image(dls, weights, classes, error):
    Counting.seen = 0
    raises(error, evaluate, Counting(ready(weights)), dls, classes=classes, **QUIET)
    assert Counting.seen == 0


def test_which_class_is_which(dls, weights):
    "By a list, a table of names or ids, and by names, the maps are those of the classes that are meant."
    model, places = ready(weights), [19, 3, 5, 7, 11, 2, 17, 0]
    names = [f'class {i}' for i in range(20)]
    for name, i in zip(dls.vocab, places): names[i] = name.replace('_', ' ').title() + ', a toy'
    by_list = evaluate(HeadMaps(model), dls, classes=places, **QUIET)
    ways = [dict(zip(dls.vocab, places)), dict(zip(dls.class_ids.tolist(), places))]
    for table in ways: assert evaluate(HeadMaps(model), dls, classes=table, **QUIET).boxes == by_list.boxes
    named = evaluate(HeadMaps(model, classes=names), dls, **QUIET)
    assert named.boxes == by_list.boxes and named.protocol['classes'] == places
    assert named.accuracy == by_list.accuracy
    others = evaluate(HeadMaps(model), dls, classes=places[::-1], **QUIET)
    assert others.boxes != by_list.boxes, 'other classes, the same scores: this test shows nothing'
    pred = {int(i): n for i, n in zip(named.images.pred, named.images.pred_name)}
    assert all(n in dls.vocab or n == names[i].split(',')[0] for i, n in pred.items())
    x, y = dls.localizable('test').dataset[int(named.images.row[0])]
    (shown,) = examples(HeadMaps(model), dls, by_list, 1)
    from wsol_nb.localize.maps import reference_score_map
    expected = reference_score_map(HeadMaps(model).raw(x[None], places[int(y)])[0].numpy(), 64, 'wsoleval')
    same(shown.score_map, expected, 1e-6)


def test_wrong_number_of_names(dls, weights):
    loc = HeadMaps(ready(weights), classes=['a', 'b'])
    raises('len(classes)=2: expected 20, as the model has', evaluate, loc, dls, **QUIET)


def test_a_bare_net_gets_a_hint(dls):
    bare = timm.create_model('resnet10t', num_classes=8)
    with pytest.warns(Hint, match='does not normalise its images'): evaluate(GradCAM(bare), dls, **QUIET)
    with warnings.catch_warnings():
        warnings.simplefilter('error', Hint)
        evaluate(GradCAM(nn.Sequential(bare)), dls, **QUIET)
        evaluate(HeadMaps(wsol_model('resnet10t', 8, verbose=False)), dls, **QUIET)


def test_the_report_names_images_with_empty_maps(dls, tmp_path):
    class Some(HeadMaps):
        def compute(self, x, target, create_graph):
            logits, maps = super().compute(x, target, create_graph)
            maps[1::8] = 0
            return logits, maps

    report = evaluate(Some(wsol_model('resnet10t', 8, verbose=False)), dls, **QUIET)
    part = dls.localizable('test')
    empty = [part.df.image_id[i] for i in (1, 9)]
    assert report.counts['empty_maps'] == 2
    assert sorted(report.counts['images_with_an_empty_map']) == sorted(empty)
    assert all(name in str(report) for name in empty)
    assert sorted(report.images.image_id[report.images.empty_map]) == sorted(empty)
    again = Report.load(report.save(tmp_path/'report.json'))
    assert again.counts == report.counts


def test_command(tested, weights, tmp_path):
    table = tmp_path/'classes.json'
    table.write_text(json.dumps({i: 2*i for i in range(8)}))
    said = wsol('eval', '--arch', 'resnet10t', '--pretrained', weights, '--metadata', tested, '--size', '64',
                '--classes', table, '--out', tmp_path/'out', '--bs', '8')
    assert 'body and head of 20 classes' in said
    report = Report.load(tmp_path/'out/report-test.json')
    assert report.n == 16 and report.protocol['classes'] == list(range(0, 16, 2))
    assert (tmp_path/'out/report-test.html').is_file()


def test_imagenet_on_a_set_without_training(tested, real_weights, tmp_path):
    "The commonest case: an ImageNet network by its names; here a world whose classes it does not have."
    model = wsol_model('mobilenetv2_100', None, True, head='keep', verbose=False)
    dls = WSOLDataLoaders.from_metadata(tested, 'SYNTH', size=64, bs=8, device='cpu')
    raises("8 of the data's 8 classes have none of the names of the model's 1000", evaluate, HeadMaps(model),
           dls, **QUIET)
    x = torch.rand(1, 3, 64, 64)
    same(HeadMaps(model)(x, 'tabby cat'), HeadMaps(model)(x, 281), 0)
    same(HeadMaps(model)(x, 'n02123045'), HeadMaps(model)(x, 281), 0)
    places = {name: i for name, i in zip(dls.vocab, ('tabby', 'n01440764', 2, 3, 4, 5, 6, 7))}
    report = evaluate(HeadMaps(model), dls, classes=places, **QUIET)
    assert report.protocol['classes'] == [281, 0, 2, 3, 4, 5, 6, 7]
    df = dls.info.manifest.copy()
    fish = ['n01440764', 'goldfish', 'great_white_shark', 'tiger shark', 'hammerhead', 'n01496331',
            'stingray']
    df['class_name'] = df.label.map(dict(enumerate([*fish, 'cock'])))
    named = WSOLDataLoaders.from_manifest(df, size=64, bs=8, device='cpu')
    assert evaluate(HeadMaps(model), named, **QUIET).protocol.get('classes') == list(range(8))
