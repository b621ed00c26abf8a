"What the loss notebooks cannot see: random and bad input, half precision, devices, an independent solver."
import pickle
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import raises, run
from scipy import ndimage as ndi
from scipy.optimize import minimize
from torch.autograd import gradcheck

from wsol_nb.losses.constraints import (
    STATISTICS, AbsoluteSizeBarrier, Constraint, SizeBarrier, SizeLagrangian, SizePenalty, centroid,
    dual_ascent, length, log_barrier, size, spread)
from wsol_nb.losses.partial import (
    IGNORE, WEAK_FORMS, PartialCELoss, box_labels, class_boxes, partial_cross_entropy, weak_points,
    weak_scribbles, weak_tags)

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
DEVICES = ['cpu', pytest.param('cuda', marks=needs_cuda)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
MARKING = [name for name in WEAK_FORMS if name != 'boxes'] # the box has no foreground label


def test_losses_do_not_import_fastai():
    probe = """
import sys, wsol_nb.losses.partial, wsol_nb.losses.constraints
print([m for m in ('fastai', 'timm') if m in sys.modules])"""
    assert run(sys.executable, '-c', probe).stdout.strip() == '[]'


# partial cross-entropy

def some_labels(B=3, K=4, H=6, W=5, share=.3):
    labels = torch.randint(K, (B, H, W))
    return torch.where(torch.rand(B, H, W) < share, labels, IGNORE)


def test_mean_is_over_the_pixels_of_the_batch():
    z, y = torch.randn(3, 4, 6, 5, dtype=torch.float64), some_labels()
    y[0], y[1, 0, 0] = IGNORE, 2
    kept = y != IGNORE
    expected = -z.log_softmax(1).permute(0, 2, 3, 1)[kept].gather(1, y[kept][:, None]).mean()
    assert torch.allclose(partial_cross_entropy(z, y), expected, rtol=1e-12)
    assert torch.allclose(partial_cross_entropy(z, torch.where(kept, y, -7), ignore=-7), expected, rtol=1e-12)
    parts = [partial_cross_entropy(z[i:i + 1], y[i:i + 1], reduction='sum') for i in range(3)]
    assert torch.allclose(sum(parts)/kept.sum(), expected, rtol=1e-12) and parts[0] == 0


def test_ce_invariances():
    z, y, order = torch.randn(2, 4, 6, 5, dtype=torch.float64), some_labels(2), torch.tensor([2, 0, 3, 1])
    loss = partial_cross_entropy(z, y)
    assert torch.allclose(partial_cross_entropy(z + torch.randn(2, 1, 6, 5), y), loss)
    reordered = torch.where(y == IGNORE, y, order.argsort()[y.clamp(max=3)])
    assert torch.allclose(partial_cross_entropy(z[:, order], reordered), loss)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('device', DEVICES)
def test_ce_in_half_precision(dtype, device):
    z = (1e4*torch.randn(2, 4, 6, 5)).clamp(-6e4, 6e4).to(device, dtype).requires_grad_()
    for y in (some_labels(2).to(device), torch.full((2, 6, 5), IGNORE, device=device)):
        with torch.autocast(device, torch.bfloat16): loss = PartialCELoss()(z, y)
        g, = torch.autograd.grad(loss, z)
        assert loss.dtype == torch.float32 and loss.isfinite() and g.dtype == dtype and g.isfinite().all()
    assert loss == 0 and not g.any()


@pytest.mark.parametrize('y, message, error', [
    (torch.zeros(2, 6, 5), "labels='(2, 6, 5) torch.float32': expected an int64 tensor", TypeError),
    (np.zeros((2, 6, 5), int), "labels='ndarray': expected an int64 tensor", TypeError),
    (torch.zeros(2, 5, 6).long(), 'labels.shape=(2, 5, 6): expected (2, 6, 5)', ValueError),
    (torch.full((2, 6, 5), 4), 'labels: got 4 (60 such pixels), expected a class 0 to 3 or 255', ValueError),
    (torch.full((2, 6, 5), -1), 'labels: got -1', ValueError),
])
def test_ce_bad_labels(y, message, error):
    raises(message, partial_cross_entropy, torch.randn(2, 4, 6, 5), y, error=error)


def test_ce_bad_arguments():
    z, y = torch.randn(2, 4, 6, 5), torch.zeros(2, 6, 5).long()
    message = "logits='(2, 4, 6) torch.float32': expected a (B,K,H,W) float tensor"
    raises(message, partial_cross_entropy, z[..., 0], y)
    raises("reduction='none'", partial_cross_entropy, z, y, reduction='none')
    raises('ignore=3: expected a number that is none of the 4 classes', partial_cross_entropy, z, y, ignore=3)


# weak labels

def some_masks(n=40):
    "Blobs of several classes, specks, unknown areas; then the extremes."
    rng = np.random.default_rng(0)
    for _ in range(n):
        h, w, k = *rng.integers(1, 40, 2), rng.integers(1, 5)
        mask = (ndi.gaussian_filter(rng.random((h, w)), rng.uniform(0, 4))*1e3 % k).astype(np.uint8)
        mask[rng.random((h, w)) < .03] = rng.choice([3, 9, 254])
        if rng.random() < .5: mask[:, w//2:w//2 + 3] = IGNORE
        yield mask
    yield from (np.full((5, 7), v, np.uint8) for v in (0, 1, 254, IGNORE))
    yield np.ones((1, 1), np.uint8)


def labels_in(mask): return set(np.unique(mask)) - {IGNORE}


@pytest.mark.parametrize('form', WEAK_FORMS)
def test_weak_labels_are_never_wrong(form):
    make = WEAK_FORMS[form]
    for i, mask in enumerate(some_masks()):
        kept = mask.copy()
        labels = make(mask, generator=i)
        assert np.array_equal(mask, kept) and labels.shape == mask.shape and labels.dtype == np.uint8
        assert ((labels == mask) | (labels == IGNORE)).all()
        if form in MARKING:
            foreground = make(mask, background=False, generator=i)
            assert labels_in(labels) == labels_in(mask) and labels_in(foreground) == labels_in(mask) - {0}
        for again in (i, np.random.default_rng(i)): assert np.array_equal(labels, make(mask, generator=again))
        assert set(np.flatnonzero(weak_tags(mask, 255))) == labels_in(mask)


def test_points_and_scribbles_are_drawn():
    mask = np.zeros((40, 50), np.uint8)
    mask[5:35, 10:40] = 1
    for form in (weak_points, weak_scribbles):
        assert len({form(mask, generator=i).tobytes() for i in range(5)}) == 5
    # uniform over the object: its quarters get alike
    hits = sum((weak_points(mask, generator=i) == 1).astype(int) for i in range(900))
    quarters = [hits[a:a + 15, b:b + 15].sum() for a in (5, 20) for b in (10, 25)]
    assert sum(quarters) == 900 and min(quarters) > 170
    two = mask.copy()
    two[:, 24:27] = 0
    assert ndi.label(weak_scribbles(two, background=False) == 1, np.ones((3, 3)))[1] == 1
    assert ndi.label(weak_scribbles(two, n=2, background=False) == 1, np.ones((3, 3)))[1] == 2


def test_boxes():
    mask = np.zeros((9, 12), np.uint8)
    mask[2:4, 3:6], mask[6, 10] = 1, 7
    found = class_boxes(mask, margin=2)
    assert {k: b.tolist() for k, b in found.items()} == {1: [1, 0, 7, 5], 7: [8, 4, 11, 8]}
    labels = box_labels(list(class_boxes(mask).values()), (12, 9))
    assert (labels == IGNORE).sum() == 2*3 + 1 and labels[6, 10] == labels[2, 3] == IGNORE
    raises('is reversed', box_labels, [[4, 4, 3, 5]], (12, 9))
    raises('margin=-1', class_boxes, mask, margin=-1)


@pytest.mark.parametrize('mask', [np.zeros((4, 4), int), np.zeros((4, 4, 1), np.uint8),
                                  np.zeros((4, 4), bool), np.zeros((0, 4), np.uint8)], ids=str)
def test_bad_masks(mask):
    for make in (*WEAK_FORMS.values(), class_boxes, lambda m: weak_tags(m, 3)):
        raises(': expected (H,W) uint8', make, mask)


def test_bad_weak_arguments():
    mask = np.ones((4, 4), np.uint8)
    raises('radius=-1', weak_points, mask, radius=-1)
    raises('n=1.5', weak_points, mask, n=1.5)
    raises('width=0', weak_scribbles, mask, width=0)
    raises('times=-1', WEAK_FORMS['eroded'], mask, times=-1)


# constraints

@pytest.mark.parametrize('statistic', STATISTICS)
@pytest.mark.parametrize('penalty', ['quadratic', 'barrier'])
def test_constraint_gradient(statistic, penalty):
    p = torch.rand(2, 3, 5, 6, dtype=torch.float64).requires_grad_()
    v = STATISTICS[statistic][0](p.detach())
    presence = torch.tensor([[True, False, True], [True, True, True]])
    for shift in (-2., 0., 2.): # both bounds below, around and above the value; bounds and values never touch
        bounds = torch.stack([v + shift - 1.1, v + shift + .9], -1)
        for reduction in ('mean', 'sum', 'batch'):
            loss = Constraint(statistic, penalty=penalty, norm='area', reduction=reduction, t0=2.)
            assert gradcheck(lambda p: loss(p, bounds, presence), p)


def test_reductions_and_presence():
    p, bounds = torch.rand(2, 3, 5, 6), torch.tensor([2., 3.]).expand(2, 3, 1, 2)
    presence = torch.tensor([[True, False, True], [True, False, False]])
    reductions = ('none', 'sum', 'batch', 'mean')
    each, total, batch, mean = (Constraint(reduction=r)(p, bounds, presence) for r in reductions)
    assert each.shape == (2, 3) and not each[~presence].any()
    for value, n in ((total, 1), (batch, 2), (mean, 3)): assert torch.allclose(value, each.sum()/n)
    some = Constraint(upper=(None, 3, None))(p) # a class without a bound does not count
    assert torch.allclose(some, F.relu(p[:, 1].sum((1, 2)) - 3).square().mean())


def test_statistics_against_scipy():
    mask = np.zeros((30, 40))
    mask[4:19, 8:31] = ndi.gaussian_filter(np.random.default_rng(0).random((15, 23)), 2) > .5
    p = torch.from_numpy(mask)[None, None]
    y, x = ndi.center_of_mass(mask)
    assert torch.allclose(centroid(p)[0, 0], torch.tensor([x, y], dtype=torch.float64))
    ys, xs = np.nonzero(mask)
    assert torch.allclose(spread(p, eps=0)[0, 0], torch.tensor([xs.std(), ys.std()]))
    assert size(p).item() == mask.sum()
    right, below = mask[:, :-1] != mask[:, 1:], mask[:-1] != mask[1:]
    diagonals = mask[:-1, :-1] != mask[1:, 1:], mask[:-1, 1:] != mask[1:, :-1]
    assert length(p).item() == sum(pairs.sum() for pairs in (right, below, *diagonals))


def test_absolute_size_is_its_formula():
    p = torch.randn(3, 2, 9, 7).softmax(1)
    for t in (.5, 1., 7.):
        asc = AbsoluteSizeBarrier(t0=t)
        expected = sum(log_barrier(-p[:, r].sum((1, 2)), t).mean() for r in range(2))/2
        assert torch.allclose(asc(p), expected)
    asc = AbsoluteSizeBarrier()
    for epoch in (3, 40, 1000, 3):
        asc.step(epoch)
        assert asc.t == min(1.01**epoch, 10)
    assert pickle.loads(pickle.dumps(asc)).t == asc.t


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('device', DEVICES)
def test_constraints_in_half_precision(dtype, device):
    z = (30*torch.randn(2, 2, 300, 300)).to(device, dtype).requires_grad_() # sums beyond the range of float16
    z.data[1, 0] = 400 # class 1 is absent: its probability is exactly 0
    # without it the gradient of an empty map's centroid and spread is beyond float16
    present = torch.tensor([[True, True], [True, False]], device=device)
    losses = [(SizePenalty(0, 0), None), (SizeBarrier(0, 0), None), (AbsoluteSizeBarrier(), None)]
    for statistic in STATISTICS:
        for penalty in ('quadratic', 'barrier'):
            losses.append((Constraint(statistic, 0, 0, penalty=penalty, norm='area', t0=10.), present))
    for loss, presence in losses:
        with torch.autocast(device, torch.bfloat16): value = loss(z.softmax(1).to(dtype), presence=presence)
        g, = torch.autograd.grad(value, z)
        assert value.dtype == torch.float32 and value.isfinite() and g.isfinite().all(), loss


def test_nothing_counts():
    p = torch.rand(2, 3, 4, 4, requires_grad=True)
    for penalty in ('quadratic', 'barrier'):
        loss = Constraint(penalty=penalty)(p, torch.tensor([-torch.inf, torch.inf]).expand(2, 3, 1, 2))
        assert loss == 0 and not torch.autograd.grad(loss, p)[0].any()


P = torch.full((2, 2, 4, 4), .5)


@pytest.mark.parametrize('make, call, message', [
    (dict(lower=3, upper=2), (), 'lower=3: expected at most upper=2'),
    (dict(lower=(0, 5), upper=(1, 2)), (P,), 'got lower 5 and upper 2 at (0, 1, 0)'),
    (dict(), (P,), 'bounds=None: expected (B,K,m,2), since neither'),
    (dict(lower=(1, 2, 3)), (P,), 'lower=(1, 2, 3): expected a number, or 2 of them'),
    (dict(), (P, torch.zeros(2, 2, 2)), 'expected a tensor of shape (2, 2, 1, 2)'),
    (dict(statistic='centroid'), (P, torch.zeros(2, 2, 1, 2)), 'expected a tensor of shape (2, 2, 2, 2)'),
    (dict(), (P, torch.full((2, 2, 1, 2), torch.nan)), 'got lower nan'),
    (dict(), (P, torch.full((2, 2, 1, 2), torch.inf)), 'got lower inf'),
    (dict(), (P, [1, 2]), "bounds='list'"),
    (dict(lower=1), (4*P,), 'probs: got 2 (64 values outside [0,1])'),
    (dict(lower=1), (P[0],), "probs='(2, 4, 4) torch.float32': expected a (B,K,H,W) float tensor"),
    (dict(lower=1), (P > 0,), "torch.bool': expected a (B,K,H,W) float tensor"),
    (dict(lower=1), (P, None, torch.ones(2, 3).bool()),
     "presence='(2, 3) torch.bool': expected a (2, 2) bool tensor"),
    (dict(lower=1), (P, None, torch.ones(2, 2)), "presence='(2, 2) torch.float32': expected"),
    (dict(statistic='volume'), (), "statistic='volume'"),
    (dict(penalty='hard'), (), "penalty='hard'"),
    (dict(reduction='max'), (), "reduction='max'"),
    (dict(units='mm'), (), "units='mm'"),
    (dict(units='fraction', norm='area'), (), "norm='area': expected 'none' with units='fraction'"),
    (dict(statistic=size, units='fraction'), (),
     "units='fraction': expected 'pixels', a function has its own units"),
    (dict(t0=-1), (), 't0=-1'),
    (dict(mu=.5), (), 'mu=0.5'),
    (dict(t_max=.5), (), 't_max=0.5: expected at least t0=1.0'),
])
def test_bad_constraints(make, call, message):
    def run():
        loss = Constraint(**make)
        if call: loss(*call)
    raises(message, run)


# dual ascent

def solve(s, a, b):
    "The maps at the optimum of the dual, by SciPy's L-BFGS-B on both multipliers."
    log_s = np.log(s)

    def softmax(beta):
        "Probabilities, and the logarithms of what they were divided by."
        lower, upper = beta.reshape(2, -1)
        z = log_s + (lower - upper)[:, None]
        top = z.max(0)
        q = np.exp(z - top)
        total = q.sum(0)
        return q/total, np.log(total) + top

    def dual(beta):
        "Its value and its gradient."
        lower, upper = beta.reshape(2, -1)
        q, log_total = softmax(beta)
        V = q.sum(1)
        return log_total.sum() - lower @ a + upper @ b, np.concatenate([V - a, b - V])

    options = dict(maxiter=5000, ftol=1e-15, gtol=1e-7)
    r = minimize(dual, np.zeros(2*len(a)), jac=True, method='L-BFGS-B', bounds=[(0, None)]*2*len(a),
                 options=options)
    return softmax(r.x)[0]


def test_dual_ascent_against_scipy():
    rng = np.random.default_rng(1)
    for case in range(12):
        K, scale = int(rng.integers(2, 5)), rng.choice([1., 4.])
        s = torch.from_numpy(scale*rng.normal(size=(1, K, 12, 15)) + rng.normal(size=(1, K, 1, 1))).softmax(1)
        share = rng.dirichlet(np.ones(K))
        a, b = 180*share*rng.uniform(.5, 1, K), 180*share*rng.uniform(1, 1.5, K)
        bounds = torch.tensor(np.stack([a, b], -1))[None, :, None]
        p = dual_ascent(s, bounds=bounds, tol=1e-4, steps=5000)
        assert p.gap.item() <= 1e-4, (case, p.gap)
        flat = lambda maps: maps[0].reshape(K, -1).numpy()
        assert abs(flat(p.q) - solve(flat(s), a, b)).max() < 1e-3
        assert (p.lower >= 0).all() and (p.upper >= 0).all()
        assert torch.allclose(p.q.sum(1), torch.ones(1, dtype=torch.float64))


def test_dual_ascent_equal_bounds_confident_and_batch():
    z = torch.randn(3, 2, 20, 20)
    z[1] *= 40
    z[2, 0] += 30
    s = z.softmax(1)
    p = dual_ascent(s, (None, 120), (None, 120))
    assert (p.gap <= .5).all(), (p.gap, p.steps)
    assert torch.allclose(size(p.q)[:, 1], torch.tensor([[120.]]), atol=.6), (p.gap, p.steps)
    for i in range(3): # an image does not depend on its batch
        alone, together = dual_ascent(s[i:i + 1], (None, 120), (None, 120)).q, p.q[i:i + 1]
        assert alone.shape == together.shape and torch.allclose(alone, together, atol=1e-5) # sums are rounded
    short = dual_ascent(s, (None, 120), steps=2)
    assert short.steps == 2 and short.gap.max() > .5 # said, not hidden


def test_dual_ascent_bad_input():
    raises('expected sums of 1', dual_ascent, torch.full((1, 2, 4, 4), .2), 1)
    raises('no map of 16 pixels keeps', dual_ascent, torch.full((1, 2, 4, 4), .5), None, 3)
    raises('no map of 16 pixels keeps', dual_ascent, torch.full((1, 2, 4, 4), .5), (None, 17))


def test_lagrangian_loss():
    z = torch.randn(2, 2, 20, 20, requires_grad=True)
    for hard in (False, True):
        with torch.autocast('cpu', torch.bfloat16): loss = SizeLagrangian((None, 300), hard=hard)(z)
        g, = torch.autograd.grad(loss, z)
        assert loss.dtype == torch.float32 and g.isfinite().all()
        assert g[:, 1].sum() < 0 # the foreground is asked to grow
