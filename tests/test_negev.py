"NEGEV: its two terms, which images give which, a frozen classifier, seeds that stay, training that goes on."
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import fit_quietly, same_state

from wsol_nb.data.loaders import WSOLDataLoaders
from wsol_nb.data.stores import LabelStore
from wsol_nb.data.worlds.tissue import TissueWorld
from wsol_nb.dense.seeded import SeededMaps
from wsol_nb.nets.decoder import FullMaps
from wsol_nb.train.checkpoint import Checkpoint, resume
from wsol_nb.train.learner import wsol_learner
from wsol_nb.train.method import adam, find_method, method_from_dict, method_to_dict
from wsol_nb.train.run import load_run, save_run
from wsol_nb.localize.base import HeadMaps
from wsol_nb.scoring.loop import evaluate
from wsol_nb.losses.partial import partial_cross_entropy
from wsol_nb.dense.negev import NEGEV, NegativeImages, PositiveSeeds, QuietMaps, positives


def loaders(folder, normal=True, **kw):
    world, counts = TissueWorld(normal=normal, image_size=(64, 64)), dict(n_train=12, n_val=6, n_test=6)
    return WSOLDataLoaders.from_synth(folder/f'world{normal}', world, size=64, resize=64, bs=6,
                                      world_kw=counts | dict(progress=False), **kw)


@pytest.fixture(scope='module')
def here(tmp_path_factory): return tmp_path_factory.mktemp('negev')


@pytest.fixture(scope='module')
def stages(here):
    "Loaders and the run of a classifier, with normal images and without."
    out = {}
    for normal in (True, False):
        dls = loaders(here, normal)
        cam = wsol_learner(dls, 'test_resnet', stride=8, localization=False, path=here)
        out[normal] = dls, save_run(fit_quietly(cam), here/f'cam{normal}')
    return out


def learner(stages, path, normal=True, cbs=(), data=None, **kw):
    dls, stage1 = stages[normal]
    return wsol_learner(data or dls, method=NEGEV(stage1=stage1, **kw), opt_func=adam, wd=0.,
                        localization=False, cbs=[Checkpoint(path), *cbs], path=path)


def step(y, seeds, full):
    "What a term looks at, and may replace."
    replaced = lambda seeds: SimpleNamespace(seeds=seeds, full=full)
    return SimpleNamespace(y=torch.tensor(y), seeds=seeds, full=full, _replace=replaced)


def test_terms_by_hand_and_apart():
    "Each image gives one of the terms, whatever else is in the batch, in double precision too."
    normal, g = lambda y: y == 1, torch.Generator().manual_seed(0)
    full = torch.randn(4, 2, 5, 7, generator=g, dtype=torch.float64, requires_grad=True)
    seeds, y, own = torch.randint(0, 2, (4, 5, 7), generator=g), [0, 1, 2, 1], ([0, 2], [1, 3])
    pos, neg = (term(normal)(step(y, seeds, full)) for term in (PositiveSeeds, NegativeImages))
    torch.testing.assert_close(pos, partial_cross_entropy(full[own[0]], seeds[own[0]]))
    torch.testing.assert_close(neg, -full.log_softmax(1)[own[1], 0].mean())
    for term, (mine, other) in ((pos, own), (neg, own[::-1])):
        grad, = torch.autograd.grad(term, full, retain_graph=True)
        assert grad[mine].abs().amin((1, 2, 3)).gt(0).all() and not grad[other].any()


@pytest.mark.parametrize('y', [[0, 0], [1, 1]], ids=['only negative', 'none negative'])
def test_a_batch_of_one_kind(y):
    full, nowhere = torch.zeros(2, 2, 4, 4, requires_grad=True), torch.full((2, 4, 4), 255)
    normal, batch = lambda y: y == 0, step(y, nowhere, full)
    total = PositiveSeeds(normal)(batch) + NegativeImages(normal)(batch)
    total.backward()
    assert torch.isfinite(total) and torch.isfinite(full.grad).all()
    assert bool(full.grad.any()) == (y == [0, 0])


def test_half_precision_is_finite():
    full = torch.full((2, 2, 4, 4), 6e4, dtype=torch.float16, requires_grad=True)
    with torch.autocast('cpu', torch.bfloat16):
        loss = NegativeImages(lambda y: y == 0)(step([0, 1], None, full))
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss) and torch.isfinite(full.grad).all()


def test_fields_come_back():
    assert find_method('negev') is NEGEV and issubclass(NEGEV, SeededMaps)
    method = NEGEV(lam=.5, negatives=False, bg='complement', classifier=method_to_dict(find_method('gap')()))
    assert method_from_dict(method_to_dict(method)) == method


def test_which_evidence(stages, here):
    "The terms follow the data and the switch; asking for what the data lack is an error."
    terms = lambda normal=True, **kw: set(learner(stages, here/'terms', normal, **kw).loss_func.terms)
    assert terms() == {'seeds', 'negatives'} and terms(negatives=False) == {'seeds'}
    assert terms(False) == terms(False, negatives=False) == {'seeds'}
    assert learner(stages, here/'terms', lam=.25).loss_func.weights == dict(seeds=.25, negatives=1.)
    message = ('negatives=True: expected None, or loaders with negative=, since these data have no negative '
               'class')
    with pytest.raises(ValueError, match=message): terms(False, negatives=True)
    for bad in (-1, float('nan'), float('inf')):
        with pytest.raises(ValueError, match='lam='): NEGEV(lam=bad)


def test_one_method_serves_two_datasets(stages, here):
    "Nothing of the data stays with the method."
    dls, stage1 = stages[True]
    method = NEGEV(stage1=stage1)
    first = wsol_learner(dls, method=method, opt_func=adam, localization=False, path=here)
    none = WSOLDataLoaders.from_manifest(dls.info.manifest, size=64, resize=64, bs=6, negative=[])
    second = wsol_learner(none, method=method, opt_func=adam, localization=False, path=here)
    assert set(first.loss_func.terms) == {'seeds', 'negatives'}
    assert set(second.loss_func.terms) == {'seeds'}


@pytest.mark.parametrize('normal', [True, False])
def test_trains_frozen_and_is_saved(stages, here, normal):
    before = load_run(stages[normal][1]).model
    learn = fit_quietly(learner(stages, here/f'run{normal}', normal))
    assert same_state(learn.model.classifier, before)
    assert all(np.isfinite(v) for v in learn.rows[-1].values()) and ('negatives' in learn.rows[-1]) == normal
    again = load_run(save_run(learn, here/f'run{normal}'))
    x = learn.dls.valid.one_batch()[0]
    assert isinstance(again.localizer(), FullMaps) and torch.equal(again.localizer()(x), learn.localizer()(x))


def test_resumed_is_the_same(stages, here):
    whole = fit_quietly(learner(stages, here/'whole'), 2)
    fit_quietly(learner(stages, here/'cut'))
    second = learner(stages, here/'cut')
    assert resume(second, here/'cut') == 1
    assert same_state(whole.model, fit_quietly(second, 2).model)


def test_static_seeds_stay(stages, here):
    "Seeds are drawn once, in full number, and later epochs leave them as they are."
    folder, data = here/'static', loaders(here)
    method = dict(static=True, fg='top', n_fg=2, n_bg=3, dilate=1)
    learn = fit_quietly(learner(stages, folder, data=data, **method))
    store, ids = LabelStore(folder/'seeds'), data.train.dataset.df.image_id
    first = [store.load(i).copy() for i in ids]
    assert all([int((s == k).sum()) for k in (0, 1)] == [3, 2] for s in first)
    fit_quietly(learn, 2)
    assert all((store.load(i) == s).all() for i, s in zip(ids, first))


def test_negative_images_are_left_out_and_quiet(stages):
    dls, run = stages[True][0], load_run(stages[True][1])
    some = positives(dls)
    kept = some.localizable('test')
    assert (kept.df.class_name != 'normal').all() and len(kept) == 4 and len(dls.localizable('test')) == 6
    report = evaluate(run.localizer(), some, 'test', tau_from=None, bootstrap=0, progress=False)
    assert report.n == 4 and some.train is dls.train
    x = dls.valid.one_batch()[0]
    top = run.model(x).argmax(1)
    for negative in ([], [0], [0, 1, 2]):
        maps, plain = QuietMaps(run.model, negative)(x, 1), HeadMaps(run.model)(x, 1)
        quiet = torch.isin(top, torch.tensor(negative, dtype=torch.int64))
        assert not maps[quiet].any() and torch.equal(maps[~quiet], plain[~quiet])
