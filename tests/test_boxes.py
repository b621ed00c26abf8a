"Boxes that nobody drew: DDT in shards and against scikit-learn, a folder, PSOL by the command line."
import json
import resource

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import TINY, images, raises, same, wsol
from PIL import Image
from torch import nn

from wsol_nb.cam.gradient import GradCAM
from wsol_nb.localize.base import Dots, HeadMaps, find_localizer, two_dots
from wsol_nb.localize.mirrored import Mirrored
from wsol_nb.methods.colocalize import DDT, Moments, descriptors, first_axis, largest_box
from wsol_nb.methods.refined import Refined
from wsol_nb.methods.unlabelled import ddt
from wsol_nb.nets.model import wsol_model
from fastai.callback.core import Callback # after wsol_nb


def net(name='resnet10t', **kw):
    torch.manual_seed(1)
    return wsol_model(name, 5, stride=16, verbose=False, **kw).eval()


# DDT

@pytest.mark.parametrize('arch', ['resnet10t', 'mobilenetv2_035', 'vgg11', 'convnext_atto', 'regnetx_002'])
def test_ddt_is_pca_on_any_body(arch):
    "The axis of all images is scikit-learn's first component of the layer's descriptors, up to its sign."
    from sklearn.decomposition import PCA
    model, x = net(arch), images(n=6)
    loc = DDT(model, positive=False).fit(x.split(2), by_class=False)
    A = loc.features.raw(x)
    X = A.flatten(2).mT.flatten(0, 1).double().numpy()
    peer = PCA(1, svd_solver='full').fit(X)
    ours = loc.axes.axis[0].double().numpy()
    assert abs(abs(peer.components_[0]@ours) - 1) < 1e-5
    P = torch.from_numpy(peer.transform(X)).float().reshape(6, *A.shape[2:])
    sign = float(np.sign(peer.components_[0]@ours))
    same(loc.raw(x), sign*P, 1e-3*P.abs().max())
    assert loc.layers == loc.features.layers


def test_the_sign_is_the_rules_and_not_the_solvers():
    "Descriptors turned round keep the object's end, since the witness says which it is."
    A = torch.randn(4, 6, 5, 5, generator=torch.Generator().manual_seed(0))
    A[:, :, 1:3, 1:3] += 3
    for sign in ('energy', 'centre'):
        a = first_axis(Moments.of(descriptors(A, sign)))
        P = torch.einsum('k,bkhw->bhw', a.axis.float(), A - a.mean.float().view(1, -1, 1, 1))
        assert P[:, 1:3, 1:3].mean() > 0 > P[:, 4].mean() and a.sure > .1
    turned = first_axis(Moments.of(descriptors(-A, 'centre')))
    centre = first_axis(Moments.of(descriptors(A, 'centre')))
    same(turned.axis, -centre.axis, 1e-6)


def test_shards_in_any_order_and_in_constant_memory():
    "10⁴ images' worth of descriptors: the same moments as merged parts have, and no memory that grows."
    def shard(i): return torch.randn(32, 24, 14, 14, generator=torch.Generator().manual_seed(i)) + 5
    def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss # KiB
    whole, halves = Moments(), [Moments(), Moments()]
    for i in range(8):
        one = Moments.of(descriptors(shard(i)))
        whole, halves[i % 2] = whole + one, halves[i % 2] + one
    both = halves[1] + halves[0]
    assert both.n == whole.n == 8*32*196
    same(both.scatter, whole.scatter, 1e-9*whole.scatter.abs().max())
    before = peak()
    for i in range(8, 40): whole = whole + Moments.of(descriptors(shard(i)))
    assert peak() - before < 16*1024


def test_classes_have_axes_of_their_own():
    "A class answers with its own axis; several targets and the top-1 too; a file gives the same maps."
    model, x, y = net(), images(n=8), torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    with pytest.warns(UserWarning, match='no two different images of 2 classes'):
        loc = DDT(model, positive=False).fit([(x, y)])
    assert loc.axes.images.tolist() == [3, 3, 2, 0, 0]
    several = loc.raw(x, [[0, 1]]*8)
    same(several[:, 0], loc.raw(x, 0), 1e-5)
    assert not torch.equal(several[:, 0], several[:, 1])
    own = loc.raw(x)
    same(own, loc.raw(x, loc.logits.argmax(1)))
    raises('this DDT has an axis for each', loc, x, lambda z: z[:, 0])
    raises('target: classes 9 to 9', loc, x, 9)


def test_what_ddt_cannot_compare(tmp_path):
    model, x = net(), images(n=3)
    raises("images='1 image': expected at least two", DDT(model).fit, [x[:1]])
    raises('2 images that are all equal', DDT(model).fit, [x[:1], x[:1]])
    bad = x.clone()
    bad[0] = float('nan')
    with pytest.warns(UserWarning, match='1 images with features that are NaN'): DDT(model).fit([bad])
    raises('a file that DDT.save has written', DDT, model, fitted=tmp_path/'none')
    raises("sign='left'", DDT, model, sign='left')
    assert find_localizer('ddt') is DDT and largest_box(np.zeros((3, 3)), (9, 9)) is None


def test_ddt_gives_seeds_by_name(tmp_path):
    "A method names DDT and its file of numbers; nothing is pickled."
    from wsol_nb.dense.fcam import FCAM
    from wsol_nb.train.method import GAP, method_from_dict, method_to_dict
    model, x = net(), images(n=4)
    DDT(model).fit([x], by_class=False).save(tmp_path/'ddt.safetensors')
    method = FCAM(seeds='ddt', seeds_params={'fitted': str(tmp_path/'ddt.safetensors')},
                  classifier=method_to_dict(GAP()))
    again = method_from_dict(json.loads(json.dumps(method_to_dict(method))))
    assert again.seeder(model).raw(x, 1).shape == (4, 4, 6)


def test_a_folder_of_photographs(tmp_path):
    "Pictures of any size; the bad one is named and counted; masks have the size of the photograph."
    for i, (w, h) in enumerate([(90, 60), (64, 64), (50, 120)]):
        pixels = (images(h, w, 1, seed=i)[0].permute(1, 2, 0)*255).byte().numpy()
        Image.fromarray(pixels).save(tmp_path/f'{i}.png')
    (tmp_path/'3.png').write_bytes(b'nothing')
    found = ddt(tmp_path, net(), size=96, progress=False)
    assert list(found.problems) == [3] and '3.png' in found.problems[3]
    assert found.mask(0).shape == (60, 90) and found.mask(2).shape == (120, 50)
    table = pd.read_csv(found.save(tmp_path/'out')/'boxes.csv')
    assert len(table) == 4 and table.problem.notna()[3]
    for i in range(3):
        box = found.box(i)
        if box is None: continue
        (w, h), (x0, y0, x1, y1) = found.sizes[i], box
        assert 0 <= x0 <= x1 < w and 0 <= y0 <= y1 < h


# refined

@pytest.mark.parametrize('by', ['flip', 'flips', 'scales', 'grabcut', 'crf'])
def test_refined_around_any_localizer(by):
    "Around a localizer as by its name; shape, range, batch independence; several targets."
    model, x = net(), images()
    for of in (HeadMaps, GradCAM):
        loc = Refined(of(model), by)
        maps = loc(x, [0, 3, 1])
        assert maps.shape == (3, 64, 96) and maps.min() >= 0 and maps.max() <= 1 and maps.isfinite().all()
        same(loc(x[1:2], 3)[0], maps[1], 2e-3)
        same(Refined(model, by, of=of.__name__)(x, [0, 3, 1]), maps)
    assert Refined(HeadMaps(model), by)(x, [[0, 1]]*3).shape == (3, 2, 64, 96)
    two = Refined(Dots(), by)(two_dots(), [0, 2])
    assert two[0, 4:12, 8:20].mean() > 3*two[0, 16:, 24:].mean()


def test_refined_flips_are_those_of_mirrored():
    model, x = net(), images()
    same(Refined(model, 'flip').raw(x, 1), Mirrored(model).raw(x, 1))
    same(Refined(model, 'flips').raw(x, 1), Mirrored(model, views=4).raw(x, 1))
    assert isinstance(Refined(model, ['crf', 'flip']).localizer, Mirrored)


# PSOL

class Enough(Exception): "Ends a training."


class Stop(Callback):
    order = 1000 # the checkpoint is written
    def after_epoch(self): raise Enough('of it')


@pytest.fixture(scope='module')
def run(world, tmp_path_factory):
    "A run of PSOL without a first stage, by the command line."
    out = tmp_path_factory.mktemp('psol')/'run'
    return out, wsol('train', '--data', world, '--method', 'psol', '--boxes', 'ddt', *TINY, '--epochs', '2',
                     '--stride', '16', '--out', out, '--no-check')


def test_psol_by_the_command_line(run, world, tmp_path):
    "Trained, scored with an HTML page, used on a photograph: a box and no map."
    out, said = run
    assert 'MaxBoxAcc' in said and 'DDT of a net that has learnt nothing' in said
    kept = json.loads((out/'boxes.json').read_text())
    assert len(kept['boxes']) == 48 and kept['made']['boxes'] == 'ddt'
    assert 'MaxBoxAcc' in wsol('eval', out, '--split', 'test')
    assert (out/'report-test.html').is_file()
    photo = next((world/'SYNTH/test').rglob('*.jpg'))
    said = wsol('localize', out, photo, '--out', tmp_path)
    assert 'not needed for a box' in said and (tmp_path/f'{photo.stem}-overlay.jpg').exists()
    box = pd.read_csv(tmp_path/'boxes.csv').iloc[0]
    w, h = Image.open(photo).size
    assert 0 <= box.x0 <= box.x1 < w and 0 <= box.y0 <= box.y1 < h


def test_psol_goes_on_with_the_boxes_it_began_with(run, world, tmp_path):
    "Half of the epochs, then the rest: the weights of the whole; boxes are not found again."
    from safetensors.torch import load_file

    from wsol_nb.train.fit import begin_run, fit_run
    from wsol_nb.train.run import read_config
    config = {k: v for k, v in read_config(run[0]).items() if k != 'tau'}
    config['train'] = config['train'] | dict(check=False)
    half = tmp_path/'half'
    learn = begin_run(config, half)
    lrs = slice(config['train']['lr'], config['train']['lr_head'])
    with learn.no_bar(), learn.no_logging(), pytest.raises(Enough): learn.fit_one_cycle(2, lrs, cbs=Stop())
    before = (half/'boxes.json').stat().st_mtime_ns
    fit_run(config, half, progress=False)
    assert (half/'boxes.json').stat().st_mtime_ns == before
    a, b = load_file(half/'model.safetensors'), load_file(run[0]/'model.safetensors')
    assert a.keys() == b.keys()
    for k in a: same(a[k].float(), b[k].float(), 1e-5)


@pytest.mark.parametrize('args,message', [
    (['--method', 'psol', '--boxes', 'dtd'], 'did you mean DDT'),
    (['--method', 'gap', '--boxes', 'ddt'], 'GAP has no such choice; it is for methods that train on boxes')])
def test_refusals(args, message, world, tmp_path):
    said = wsol('train', '--data', world, *args, *TINY, '--out', tmp_path/'run', code=1)
    assert message in said


def test_any_input_gives_a_box_inside():
    "NaN, white, noise: a box of at least a pixel, inside the image."
    from wsol_nb.methods.boxes import PSOL
    model = PSOL().model('resnet10t', 5, stride=16, verbose=False)
    nn.init.normal_(model.regressor.head.mlp[-1].weight, std=5)
    x = images(48, 80, 5)
    x[0], x[1], x[2] = float('nan'), 1, 0
    boxes = PSOL().localizer(model).boxes(x, 1)
    assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] <= boxes[:, 2:]).all()
    assert (boxes[:, 2] < 80).all() and (boxes[:, 3] < 48).all()
