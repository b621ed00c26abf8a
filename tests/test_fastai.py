"""A `WSOLLearner` is a fastai Learner: each idiom of fastai's documentation, as its users write it, on one.

An idiom is a function of a learner that says whether what came is right; the learner is a fresh copy.
"""
import contextlib
import copy
import io
import math
import warnings

import matplotlib.pyplot as plt
import pytest
import torch
from helpers import same, same_state

import wsol_nb.core # first, see its end
from wsol_nb.data.loaders import WSOLDataLoaders
from wsol_nb.train.learner import wsol_learner
from wsol_nb.train.method import GAP
from wsol_nb.train.run import load_run, save_run
from fastai.callback.all import (
    CSVLogger, CutMix, EarlyStoppingCallback, GradientAccumulation, GradientClip, MixUp, ParamScheduler,
    ReduceLROnPlateau, SaveModelCallback, ShowGraphCallback, TerminateOnNaNCallback, minimum,
    steep)
from fastai.callback.progress import ProgressCallback
from fastai.data.transforms import CategoryMap
from fastai.interpret import ClassificationInterpretation, Interpretation
from fastai.learner import load_learner
from fastai.losses import LabelSmoothingCrossEntropyFlat
from fastai.metrics import F1Score, error_rate, top_k_accuracy
from fastai.optimizer import Adam, ranger


@pytest.fixture(scope='module')
def original(world):
    dls = WSOLDataLoaders.from_metadata(world, 'SYNTH', size=64, bs=8, device='cpu')
    learn = wsol_learner(dls, 'resnet10t', verbose=False, localization=False)
    return learn


@pytest.fixture
def learn(original, tmp_path):
    new = copy.deepcopy(original)
    new.path = tmp_path
    with new.no_bar(), new.no_logging(): yield new
    plt.close('all')


def trained(learn): return len(learn.recorder.values) >= 1 and math.isfinite(learn.recorder.values[-1][0])


def suggests_a_rate(learn):
    with plt.ioff(): found = learn.lr_find(num_it=8, suggest_funcs=(minimum, steep))
    return 0 < found.minimum < 10 and 0 < found.steep < 10


def trains(*args, how='fit', **kwargs):
    def idiom(learn):
        getattr(learn, how)(*args, **kwargs)
        return trained(learn)
    return idiom


def trains_with(*cbs, epochs=1):
    def idiom(learn):
        learn.fit(epochs, 1e-3, cbs=[make(learn) for make in cbs])
        return trained(learn)
    return idiom


def keeps_the_best(learn):
    learn.fit(2, 1e-3, cbs=SaveModelCallback(monitor='accuracy', fname='best'))
    return (learn.path/learn.model_dir/'best.pth').is_file() and trained(learn)


def writes_a_table(learn):
    learn.fit(1, 1e-3, cbs=CSVLogger())
    return 'valid_loss' in (learn.path/'history.csv').read_text()


def saves_and_loads(learn):
    learn.save('here')
    before = copy.deepcopy(learn.model.state_dict())
    for p in learn.model.parameters(): p.data.zero_()
    learn.load('here')
    return same_state(before, learn.model)


def in_half_precision(learn):
    learn = learn.to_fp16()
    learn.fit(1, 1e-3)
    return trained(learn.to_fp32())


def freezes(learn):
    learn.freeze()
    frozen = [p.requires_grad for p in learn.model.body.parameters() if p.ndim == 4] # norms go on
    learn.unfreeze()
    return not any(frozen) and all(p.requires_grad for p in learn.model.parameters())


def predicts(learn):
    name, position, probs = learn.predict(learn.dls.valid_ds.paths[0])
    ours = learn.dls.vocab[int(position)] == name and probs.argmax() == position
    return ours and abs(float(probs.sum()) - 1) < 1e-4


def predicts_many(learn):
    probs, targets = learn.get_preds()
    decoded = learn.get_preds(with_decoded=True)[2]
    return probs.shape == (16, 8) and targets.shape == (16,) and (decoded == probs.argmax(1)).all()


def on_new_images(learn):
    dl = learn.dls.test_dl(learn.dls.valid_ds.paths[:3])
    probs = learn.get_preds(dl=dl)[0]
    same(probs, learn.get_preds()[0][:3], 1e-5)
    return True


def with_augmentation(learn):
    torch.manual_seed(0)
    mean, targets = learn.tta(n=2)
    plain = learn.get_preds()[0]
    alone = learn.tta(n=2, beta=1)[0] # the plain image alone
    same(alone, plain, 1e-5)
    assert not learn.dls.valid_ds.train and learn.dls.valid_ds.geometry(0) is None
    return mean.shape == plain.shape and not torch.equal(mean, plain) and targets.shape == (16,)


def with_names(learn):
    found = ClassificationInterpretation.from_learner(learn)
    names = set(learn.dls.vocab)
    confused = found.most_confused()
    assert confused and {n for a, b, _ in confused for n in (a, b)} <= names, confused
    return found.confusion_matrix().sum() == 16 and list(found.vocab) == list(learn.dls.vocab)


def reports(learn):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), warnings.catch_warnings():
        warnings.simplefilter('ignore') # of sklearn, about classes that nobody predicted
        ClassificationInterpretation.from_learner(learn).print_classification_report()
    return all(name in said.getvalue() for name in learn.dls.vocab)


def plots_confusion(learn):
    ClassificationInterpretation.from_learner(learn).plot_confusion_matrix()
    return [t.get_text() for t in plt.gca().get_xticklabels()] == list(learn.dls.vocab)


def plots_top_losses(learn):
    found = Interpretation.from_learner(learn)
    found.plot_top_losses(4)
    titles = [ax.get_title() for ax in plt.gcf().axes]
    losses, _, rows = found.top_losses(4, items=True)
    assert not {'boxes', 'mask'} & set(rows), 'no door to annotations'
    true = [titles[i].split('/')[1].strip() for i in range(4)]
    assert losses.tolist() == sorted(losses.tolist(), reverse=True)
    return true == rows.class_name.tolist()


def shows_some(learn):
    Interpretation.from_learner(learn).show_results([0, 3])
    return len([ax for ax in plt.gcf().axes if ax.get_title()]) == 2


def shows_a_batch(learn):
    learn.dls.show_batch(max_n=4)
    return {ax.get_title() for ax in plt.gcf().axes} <= set(learn.dls.vocab)


def shows_results(learn):
    learn.show_results(max_n=4)
    return all('→' in ax.get_title() for ax in plt.gcf().axes if ax.get_title())


def exports(learn):
    learn.export('model.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # fastai's, that pickles are not safe
        again = load_learner(learn.path/'model.pkl')
    photo = learn.dls.valid_ds.paths[0]
    assert isinstance(again.dls.vocab, CategoryMap) and list(again.dls.vocab) == list(learn.dls.vocab)
    with again.no_bar(): return again.predict(photo)[0] == learn.predict(photo)[0]


def a_run_has_a_vocabulary(learn):
    run = load_run(save_run(learn, learn.path/'run'))
    dls = run.dls(device='cpu')
    return isinstance(dls.vocab, CategoryMap) and dls.vocab.o2i == learn.dls.vocab.o2i


def validates(learn): return len(learn.validate()) == 2 and all(map(math.isfinite, learn.validate()))


def summary(learn): return 'Trainable' in str(learn.summary())


def plots_losses(learn):
    learn.fit(2, 1e-3)
    learn.recorder.plot_loss()
    return bool(plt.gca().lines)


def plots_the_schedule(learn):
    learn.fit_one_cycle(1, 1e-3)
    learn.recorder.plot_sched()
    return bool(plt.gca().lines)


def other_batches(learn):
    x, y = learn.dls.new(bs=3).train.one_batch()
    return len(x) == len(y) == 3 and len(learn.dls.one_batch()[0]) == 8


def with_other_metrics(learn):
    learn.metrics = [error_rate, F1Score(average='macro'), top_k_accuracy]
    learn.fit(1, 1e-3)
    return len(learn.recorder.values[-1]) == 5


def another_optimizer(learn):
    for opt in (Adam, ranger):
        learn.opt_func, learn.opt = opt, None
        learn.fit(1, 1e-3)
    return trained(learn)


def another_loss(learn):
    learn.loss_func = LabelSmoothingCrossEntropyFlat()
    learn.fit(1, 1e-3)
    return trained(learn) and abs(float(learn.get_preds()[0].sum(1)[0]) - 1) < 1e-4


def decodes(learn):
    names = [name for _, name in learn.dls.valid.decode_batch(learn.dls.valid.one_batch(), max_n=8)]
    return names == [learn.dls.vocab[int(y)] for y in learn.dls.valid.one_batch()[1]]


IDIOMS = dict(
    lr_find=suggests_a_rate,
    fit=trains(1), fit_one_cycle=trains(1, slice(1e-4, 1e-3), how='fit_one_cycle'),
    fit_flat_cos=trains(1, how='fit_flat_cos'), fit_sgdr=trains(1, 1, how='fit_sgdr'),
    fine_tune=trains(1, how='fine_tune'),
    save_model=keeps_the_best, csv_logger=writes_a_table, save_and_load=saves_and_loads,
    to_fp16=in_half_precision, freeze=freezes,
    mix_up=trains_with(lambda l: MixUp()), cut_mix=trains_with(lambda l: CutMix()),
    early_stopping=trains_with(lambda l: EarlyStoppingCallback(patience=1), epochs=2),
    plateau=trains_with(lambda l: ReduceLROnPlateau(patience=1), epochs=2),
    clip=trains_with(lambda l: GradientClip(.1)),
    accumulation=trains_with(lambda l: GradientAccumulation(16)),
    stops_on_nan=trains_with(lambda l: TerminateOnNaNCallback()),
    graph=trains_with(lambda l: ProgressCallback(), lambda l: ShowGraphCallback()),
    scheduler=trains_with(lambda l: ParamScheduler({'lr': lambda pos: 1e-3*(1 - pos)})),
    predict=predicts, get_preds=predicts_many, test_dl=on_new_images, tta=with_augmentation,
    most_confused=with_names, report=reports, confusion=plots_confusion, top_losses=plots_top_losses,
    show_some=shows_some, show_batch=shows_a_batch, show_results=shows_results, decode=decodes,
    export=exports, run=a_run_has_a_vocabulary, validate=validates, summary=summary,
    plot_loss=plots_losses, plot_sched=plots_the_schedule, new_bs=other_batches,
    metrics=with_other_metrics, optimizer=another_optimizer, loss=another_loss)


@pytest.mark.parametrize('idiom', IDIOMS)
def test_idiom(idiom, learn): assert IDIOMS[idiom](learn)


def test_several_labels_an_image(world):
    "Names of several classes stand over the pictures of the highest losses, too."
    import pandas as pd
    dls = WSOLDataLoaders.from_metadata(world, 'SYNTH', size=64, bs=8, device='cpu')
    df = dls.info.manifest.copy()
    df['labels'] = [[a, b] for a, b in zip(df.label, (df.label + 1) % 8)]
    multi = WSOLDataLoaders.from_manifest(df, size=64, bs=8, device='cpu')
    learn = wsol_learner(multi, 'resnet10t', method=GAP(targets='multi'), verbose=False)
    with learn.no_bar(), learn.no_logging():
        found = Interpretation.from_learner(learn)
        assert found.losses.shape == (16,)
        found.show_results([0, 1])
    assert isinstance(multi.vocab, CategoryMap) and pd.api.types.is_list_like(multi.vocab)
    plt.close('all')
