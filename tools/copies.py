"""What waits for a GPU, counted without one (tools/elsewhere.py): training steps, localizers, losses.

    python tools/bench.py copies

Writes nbs/results/host_copies.csv: for each registered method what a training step asks of the device, for
each localizer what batches of two and of four images ask, for each loss what a call by hand asks. Its rows of
`before` are those of commit 79a17b1, with the autocast of a device that has none left out.
"""
import collections
import inspect
import tempfile
from pathlib import Path
from unittest.mock import patch

import pandas as pd
import torch
from elsewhere import WAITS, Elsewhere
from small import small_arch, small_fields, two_stages

from wsol_nb.core import set_seed
from wsol_nb.cam.gradient import GradCAM
from wsol_nb.data.loaders import WSOLDataLoaders
from wsol_nb.data.worlds.tissue import TissueWorld
from wsol_nb.losses.constraints import Constraint, SizeLagrangian
from wsol_nb.losses.crf import DenseCRFLoss, mean_field
from wsol_nb.losses.partial import PartialCELoss
from wsol_nb.nets.decoder import FullModel
from wsol_nb.nets.model import wsol_model
from wsol_nb.registry import entries
from wsol_nb.results import Rows, origin
from wsol_nb.train.learner import wsol_learner
from wsol_nb.train.method import GAP, adam
from wsol_nb.vit.patchhead import PatchHead, PatchNet
from fastai.callback.core import Callback
from fastai.learner import CastToTensor
import timm # after wsol_nb.core, see its end

OUT = Path(__file__).resolve().parent.parent/'nbs/results/host_copies.csv'
# cheap settings of a localizer, where it has them; power: in a random net two products are mostly rounding
CALLS = dict(n=2, steps=2, of=GradCAM, channels=8, bs=4, power=1)
EVERYTHING = dict(size=.1, crf_start=0) # of a method, where it has such a field: all terms from the start


def small_world(folder):
    "Loaders of 32 images of tissue, of which one class is without a lesion."
    world, few = TissueWorld(normal=True, image_size=(64, 64)), dict(n_train=24, n_val=4, n_test=4)
    few['progress'] = False
    return WSOLDataLoaders.from_synth(Path(folder)/'world', world, few, size=64, resize=64, bs=8)


# methods

def small_learner(name, dls, path, cbs=(), **fields):
    "A learner of the method on a tiny net; a second stage stands on an untrained classifier."
    kind, options = entries('method')[name].load(), dict(opt_func=adam, localization=False, path=path)
    fields = small_fields(name) | fields
    if two_stages(name):
        first = wsol_learner(dls, 'resnet10t', GAP(), stride=16, verbose=False, **options)
        fields |= dict(stage1=first)
    fields |= {k: v for k, v in EVERYTHING.items() if k in kind.__dataclass_fields__}
    arch = {} if 'stage1' in fields else small_arch(name) | dict(verbose=False)
    return wsol_learner(dls, method=kind(**fields), cbs=cbs, **arch, **options)


def made_once(name, dls, path, **fields):
    "What a method makes of each image before its training, on this device."
    set_seed(0)
    if name == 'DiPS':
        learn = small_learner(name, dls, path, **fields)
        learn.method.keep(learn, None)
    set_seed(0)


class CrossingsOfSteps(Callback):
    "What each training step asked of the device, from a batch that is there to weights that have learnt."
    order = 1000
    def __init__(self, device): self.device, self.each, self.values = device, [], []
    def before_epoch(self): self.device.crossings.clear()

    def after_batch(self):
        if not self.training: return
        self.each.append(list(self.device.crossings))
        with torch.no_grad(): self.values.append(self.device.look(self.learn.loss))
        self.device.crossings.clear()


class BatchIsThere(Callback):
    "The batch has arrived: that is the loader's."
    order = -1000
    def __init__(self, device): self.device = device
    def before_batch(self): self.device.crossings.clear()


def _to_host(b, cpu=True, gather=True):
    "fastai's `to_detach`, without giving what has come to the host the type that it had there."
    return b.detach().cpu() if cpu else b.detach()


def training(name, dls, path, **fields):
    "What each step of a method's training asked of the device: lists of `Crossing`s; and the losses."
    made_once(name, dls, path, **fields)
    with Elsewhere() as d:
        seen = CrossingsOfSteps(d)
        learn = small_learner(name, dls.new().to(d.device), path, [seen, BatchIsThere(d)], **fields)
        learn.model = d.move(learn.model)
        learn.remove_cb(CastToTensor) # fastai's check that a tensor is of no class of its own
        fastai = patch('fastai.learner.to_detach', _to_host)
        with fastai, learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    return seen.each, torch.stack(seen.values)


# localizers

# what must be fitted first, or answers with a box: tests/test_boxes.py asks those
APART = {'a fit on images', 'a box regressor'}
LOCALIZERS = [n for n, e in entries('localizer').items() if e.facts['needs'] not in APART]


def small_vit(n_classes=5):
    return timm.create_model('vit_tiny_patch16_224', num_classes=n_classes, depth=2, dynamic_img_size=True)


def small_net(needs='class maps', n_classes=5):
    torch.manual_seed(1)
    if 'tokens' in needs: return small_vit(n_classes)
    if needs == 'a patch head': return PatchNet(small_vit(n_classes), head=PatchHead(3*192, 16))
    model = wsol_model('resnet10t', n_classes, stride=16, verbose=False)
    torch.nn.init.uniform_(model.head.classifier.weight, -.25, .5)
    return FullModel(model, frozen=False) if needs == 'a decoder' else model


def settings(kind):
    "The cheap settings that a localizer takes."
    return {k: v for k, v in CALLS.items() if k in inspect.signature(kind.__init__).parameters}


def calling(name, n=2, target=(1, 0, 2, 4), **kw):
    "What a call on `n` images asked of the device; and its maps, there and here."
    entry, net = entries('localizer')[name], small_net(entries('localizer')[name].facts['needs'])
    kind, x = entry.load(), torch.rand(4, 3, 64, 96, generator=torch.Generator().manual_seed(2))[:n]
    target = target[:n] if isinstance(target, tuple) else target
    here = kind(net, **settings(kind))(x, target)
    with Elsewhere() as d:
        loc, x = kind(d.move(net), **settings(kind), **kw), d.put(x)
        loc(x, target) # the first call finds the layer
        d.crossings.clear()
        there = loc(x, d.put(target) if isinstance(target, torch.Tensor) else target)
        return list(d.crossings), d.look(there), here


# losses

def _some(draw, *shape, seed=4): return draw(*shape, generator=torch.Generator().manual_seed(seed))
def _probs(): return _some(torch.randn, 2, 2, 12, 14).softmax(1)


def _labels():
    seen = _some(torch.rand, 2, 12, 14)
    return torch.where(seen < .1, 0, torch.where(seen < .2, 1, 255))


def _constraint(**kw): return lambda: (Constraint(**kw), [_probs()])
def _crf(**kw): return lambda: (DenseCRFLoss(**kw), [_some(torch.rand, 2, 3, 24, 28), _probs()])


LOSSES = {
    'partial': lambda: (PartialCELoss(), [_some(torch.randn, 2, 2, 12, 14), _labels()]),
    'crf': _crf(), 'crf kernel': _crf(form='potts', normalise='kernel', scale=.5), 'crf grid': _crf(cell=.75),
    'mean field': lambda: (mean_field, [_some(torch.rand, 2, 3, 24, 28), _probs()]),
    'size': _constraint(lower=20, upper=[100, 120]), 'barrier': _constraint(lower=20, penalty='barrier'),
    'ratio': _constraint(statistic='ratio', lower=.2), 'length': _constraint(statistic='length', upper=30),
    'centroid': _constraint(statistic='centroid', upper=.5, units='fraction'),
    'spread': _constraint(statistic='spread', upper=.3, units='fraction'),
    'bounds': lambda: (Constraint(), [_probs(), torch.tensor([20., 100]).expand(2, 2, 1, 2).contiguous()]),
    'lagrangian': lambda: (SizeLagrangian(lower=20, upper=150), [_some(torch.randn, 2, 2, 12, 14)])}
# more waits than one, and those of a training step too: how large is the grid, is the ascent done?
BY_HAND = {'crf grid': 3, 'bounds': 2, 'lagrangian': 60}
BUSY = {'crf grid': 2, 'lagrangian': 60}


# the table

def row(what, name, of, crossings):
    waits = [c for c in crossings if c.kind in WAITS]
    ours = [c for c in waits if c.ours]
    by = sorted(collections.Counter(c.where for c in ours).items())
    return dict(what=what, name=name, of=of, waits=len(ours), sent=sum(c.kind == 'sent' for c in crossings),
                waits_of_fastai=len(waits) - len(ours), by='; '.join(f'{n} {where}' for where, n in by))


def asked(loss, args):
    "What a call of a loss asked of the device."
    with Elsewhere() as d:
        far = [d.put(a) if isinstance(a, torch.Tensor) else a for a in args]
        loss(*far)
        return list(d.crossings)


def rows():
    "What each of them asks."
    with tempfile.TemporaryDirectory() as folder:
        dls = small_world(folder)
        for name in entries('method'):
            yield row('method', name, 'a training step', training(name, dls, folder)[0][-1])
    for name in LOCALIZERS:
        for n in (2, 4): yield row('localizer', name, f'a call on {n} images', calling(name, n)[0])
    for name, make in LOSSES.items(): yield row('loss', name, 'a call by hand', asked(*make()))


def table(when='after'):
    "Renew the rows of `when` in the CSV, and print them beside the others."
    found = Rows(OUT)
    new = [dict(when=when, **r, **origin('python tools/bench.py copies')) for r in rows()]
    found.add(new, when=when)
    df = pd.read_csv(OUT)
    wide = df.pivot_table(index=['what', 'name', 'of'], columns='when', values=['waits', 'sent'], sort=False)
    print(wide.to_string())
