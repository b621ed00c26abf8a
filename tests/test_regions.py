"""Dice, mIoU and distances of surfaces against MONAI and torchmetrics, where those are installed."""
import numpy as np
import pytest
import torch
from scipy import ndimage as ndi

from wsol_nb.metrics.regions import EMPTY, Regions, dice_volumes
from wsol_nb.metrics.surfaces import assd, hd95


def blobs(seed, shape):
    "Two smooth random masks."
    draw = np.random.default_rng(seed)
    return [ndi.gaussian_filter(draw.random(shape), 2) > .5 for _ in range(2)]


def classes(seed=0, n_classes=4, ignored=0.):
    "Predicted and true classes of five pictures."
    draw = np.random.default_rng(seed)
    pred, true = draw.integers(0, n_classes, (2, 5, 30, 30))
    true[draw.random(true.shape) < ignored] = 255
    return pred, true


@pytest.mark.filterwarnings('ignore::FutureWarning')
@pytest.mark.parametrize('shape,spacing', [((20, 24), (1.5, .7)), ((10, 16, 18), (5., 1.5, 1.2))])
def test_distances_are_monais(shape, spacing):
    metrics = pytest.importorskip('monai.metrics', reason='MONAI is not installed')
    a, b = blobs(1, shape)
    x, y = (torch.tensor(m)[None, None].float() for m in (a, b))
    options = dict(include_background=True, spacing=spacing)
    other = metrics.compute_hausdorff_distance(x, y, percentile=95, **options).item()
    assert hd95(a, b, spacing) == pytest.approx(other, abs=1e-5)
    other = metrics.compute_average_surface_distance(x, y, symmetric=True, **options).item()
    assert assd(a, b, spacing) == pytest.approx(other, abs=1e-5)


def test_dice_is_monais():
    metrics = pytest.importorskip('monai.metrics', reason='MONAI is not installed')
    pred, true = classes()
    theirs = metrics.DiceMetric(include_background=False, num_classes=4)
    theirs(torch.tensor(pred)[:, None], torch.tensor(true)[:, None])
    assert dice_volumes(pred, true, n_classes=4)['mean_dice'] == pytest.approx(100*theirs.aggregate().item())


def test_miou_is_torchmetrics():
    kind = pytest.importorskip('torchmetrics.classification', reason='torchmetrics is not installed')
    pred, true = classes(ignored=.1)
    theirs = kind.MulticlassJaccardIndex(4, ignore_index=255)(torch.tensor(pred), torch.tensor(true)).item()
    assert dice_volumes(pred, true, n_classes=4)['miou'] == pytest.approx(100*theirs, abs=1e-4)


@pytest.mark.parametrize('empty', EMPTY)
def test_any_order_of_slices_is_one_result(empty):
    pred, true = classes(ignored=.2)
    names = ['a', 'b', 'a', 'b', 'a']
    one, other = Regions(4, empty=empty), Regions(4, empty=empty)
    for i in range(5): one.update(pred[i], true[i], names[i])
    for i in (4, 1, 0, 3, 2): other.update(pred[i], true[i], names[i])
    assert one.compute() == other.compute()


def test_a_class_that_is_called_another_name_gives_the_same():
    pred, true = classes()
    other = np.array([0, 3, 1, 2])
    plain, moved = dice_volumes(pred, true, n_classes=4), dice_volumes(other[pred], other[true], n_classes=4)
    assert plain['miou'] == pytest.approx(moved['miou'])
    assert plain['dice']['1'] == moved['dice']['3']
