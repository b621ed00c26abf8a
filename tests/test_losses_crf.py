"The dense CRF loss: hand cases, gradients, invariances, memory, precision, bad input."
import math

import pytest
import torch
from helpers import raises, same
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from wsol_nb.losses.crf import (
    DenseCRFLoss, _Energy, crf_features, dense_crf_energy, grid_product, kernel_product, lattice_weight,
    mean_affinity, mean_field)

MODES = [(f, n) for f in ('assoc', 'potts') for n in ('none', 'pixels', 'kernel')]


def scene(B=2, K=3, size=(6, 7), dtype=torch.float64, at=None):
    return torch.rand(B, 3, *size, dtype=dtype), torch.randn(B, K, *(at or size), dtype=dtype).softmax(1)


def dense_kernel(images, sigma_rgb=15, sigma_xy=100):
    "W (B,N,N) from the definition, pixel by pixel."
    H, W = images.shape[-2:]
    feature = lambda image, y, x: [y/sigma_xy, x/sigma_xy, *(255*image[:, y, x]/sigma_rgb).tolist()]
    features = lambda image: [feature(image, y, x) for y in range(H) for x in range(W)]
    f = torch.tensor([features(image) for image in images], dtype=torch.float64)
    return (-(f[:, :, None] - f[:, None]).pow(2).sum(-1)/2).exp()


def from_definition(images, probs, form, normalise, r=None, **sigmas):
    W, S = dense_kernel(images, **sigmas), probs.flatten(2)
    r = torch.ones_like(S[:, :1]) if r is None else r.flatten(1)[:, None]
    S = S*r
    WS = lambda V: torch.einsum('bpq,bkq->bkp', W, V)
    E = (S*WS(r - S)).sum((1, 2)) if form == 'potts' else -(S*WS(S)).sum((1, 2))
    return E/dict(none=1, pixels=r.sum((1, 2)), kernel=(r*WS(r)).sum((1, 2)))[normalise]


@pytest.mark.parametrize('form, normalise', MODES)
@pytest.mark.parametrize('chunk', (1, 4, 1000, None))
def test_value_and_gradient_are_those_of_autograd(form, normalise, chunk):
    images, probs = scene()
    r = torch.rand(2, 6, 7, dtype=torch.float64)
    for roi in (None, r):
        kw = dict(sigma_rgb=60., sigma_xy=3., form=form, normalise=normalise)
        ours, theirs = probs.clone().requires_grad_(), probs.clone().requires_grad_()
        E = dense_crf_energy(images, ours, roi, chunk=chunk, **kw)
        E2 = from_definition(images, theirs, r=roi, **kw)
        same(E, E2, tol=1e-12*E2.abs().max())
        weight = torch.tensor([.3, 2.], dtype=torch.float64)
        g, = torch.autograd.grad((weight*E).sum(), ours)
        g2, = torch.autograd.grad((weight*E2).sum(), theirs)
        same(g, g2, tol=1e-9*g2.abs().max() + 1e-12)


@pytest.mark.parametrize('form, normalise', MODES)
def test_gradcheck(form, normalise):
    images, probs = scene(size=(4, 5), at=(8, 5)) # no simplex is needed: gradcheck moves each value alone
    probs = .05 + .9*probs.requires_grad_().detach()
    loss = DenseCRFLoss(sigma_rgb=60., sigma_xy=3., form=form, normalise=normalise, chunk=7)
    roi = (torch.rand(2, 4, 5) > .3)
    assert gradcheck(lambda s: loss(images, s), probs.requires_grad_())
    assert gradcheck(lambda s: loss(images, s, roi), probs)
    logits = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda z: loss(images, z.softmax(1)), logits)


def test_hand_cases():
    images, probs = torch.zeros(1, 3, 1, 2), torch.tensor([[.2, .4], [.8, .6]]).view(1, 2, 1, 2)
    images[0, 1, 0, 1] = 15/255
    probs.requires_grad_()
    E = DenseCRFLoss()(images, probs)
    same(E, -1.87928, tol=1e-5)
    same(torch.autograd.grad(E, probs)[0][0, 1, 0], [-2.32780, -2.17040], tol=1e-5)
    # three points in a plane, at the distances that make these weights
    a, b, c = (math.sqrt(-2*math.log(w)) for w in (.5, .1, .2))
    x = (a*a + b*b - c*c)/(2*a)
    f = torch.tensor([[0, a, x], [0, 0, math.sqrt(b*b - x*x)]], dtype=torch.float64)[None]
    W = kernel_product(f, torch.eye(3, dtype=torch.float64)[None])[0]
    same(W, [[1, .5, .1], [.5, 1, .2], [.1, .2, 1]], tol=1e-12)
    S = torch.tensor([[[1., .6, 0], [0, .4, 1]]], dtype=torch.float64)
    one = torch.ones(1, 1, 3, dtype=torch.float64)
    values = [_Energy.apply(S, f, one, form, 'none', kernel_product).item() for form in ('potts', 'assoc')]
    same(values, [1.32, -3.28], tol=1e-12)
    same(values[0] - values[1], kernel_product(f, one).sum(), tol=1e-12) # 4.6 = 1ᵀW1


def test_invariances():
    images, probs = scene()
    W = dense_kernel(images)
    f = crf_features(images)
    ours = kernel_product(f, torch.eye(42, dtype=torch.float64).expand(2, -1, -1), chunk=5)
    same(ours, W, tol=1e-12)
    same(ours, ours.mT, tol=1e-15)
    assert torch.linalg.eigvalsh(ours).min() > -1e-10
    z = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    energy = lambda z, **kw: dense_crf_energy(images, z.softmax(1), **kw)
    for form, normalise in MODES:
        mode = dict(form=form, normalise=normalise)
        E = energy(z, **mode)
        assert (E <= 0).all() if form == 'assoc' else (E >= 0).all()
        one_constant, one_a_pixel, other_order = z + 5, z + torch.randn(2, 1, 6, 7), z.flip(1)
        for alike in (one_constant, one_a_pixel, other_order):
            same(energy(alike, **mode), E, tol=1e-12*E.abs().max())
    one, half = torch.zeros_like(z), torch.zeros_like(z)
    one[:, 0] = 50
    assert (energy(one) < energy(z)).all() and (energy(one) < energy(half)).all()
    same(energy(one, form='potts'), [0, 0], tol=1e-9) # a single class costs nothing


def test_batch_independent_and_deterministic():
    images, probs = scene(B=4, dtype=torch.float32, size=(16, 20))
    E = dense_crf_energy(images, probs)
    assert torch.equal(E, dense_crf_energy(images, probs))
    alone = [dense_crf_energy(images[i:i + 1], probs[i:i + 1]) for i in range(4)]
    same(torch.cat(alone), E, tol=1e-5*E.abs().max())
    same(DenseCRFLoss()(images, probs), E.mean(), tol=1e-3)


def test_scale_is_an_average_of_areas():
    small, probs = scene(dtype=torch.float64)
    big, wide = (t.repeat_interleave(2, -1).repeat_interleave(2, -2) for t in (small, probs))
    E = dense_crf_energy(small, probs, sigma_xy=5.).mean()
    wide.requires_grad_()
    for maps in (wide, probs): # σ_xy is in pixels of the large image
        same(DenseCRFLoss(sigma_xy=10., scale=.5)(big, maps), E, tol=1e-9)
    g, = torch.autograd.grad(DenseCRFLoss(scale=.5)(big, wide), wide)
    assert (g != 0).all()
    images, maps = torch.rand(2, 3, 31, 46), torch.rand(2, 2, 9, 50)/2 # any pair of sizes
    assert DenseCRFLoss(scale=.37)(images, maps).isfinite()


def test_nothing_outside_the_roi_counts():
    images, probs = scene(size=(8, 12))
    roi = torch.zeros(2, 8, 12, dtype=torch.bool)
    roi[:, :, :8] = True
    images2, probs2 = scene(size=(8, 12))
    other, maps = torch.where(roi[:, None], images, images2), torch.where(roi[:, None], probs, probs2)
    for form, normalise in MODES:
        for scale in (1, .5, .3):
            loss = DenseCRFLoss(form=form, normalise=normalise, scale=scale)
            same(loss(images, probs, roi), loss(other, maps, roi), tol=1e-9)
        loss = DenseCRFLoss(form=form, normalise=normalise, sigma_xy=9.)
        cut_off = loss(images[..., :8], probs[..., :8])
        same(loss(images, probs, roi), cut_off, tol=1e-9)
        empty = probs.clone().requires_grad_()
        E = loss(images, empty, torch.zeros(2, 8, 12))
        assert E == 0 and torch.equal(torch.autograd.grad(E, empty)[0], torch.zeros_like(empty))


@pytest.mark.parametrize('dtype', (torch.bfloat16, torch.float16))
def test_low_precision(dtype):
    images, probs = scene(dtype=torch.float32, size=(48, 48))
    images[0] = 1 # a flat image: the largest sums
    want = [DenseCRFLoss(form=f, normalise=n)(images, probs.to(dtype).float()) for f, n in MODES]
    with torch.autocast('cpu', dtype=torch.bfloat16):
        for (form, normalise), E in zip(MODES, want):
            maps = probs.to(dtype).requires_grad_()
            L = DenseCRFLoss(form=form, normalise=normalise)(images, maps)
            assert L.dtype == torch.float32 and torch.equal(L, E)
            g, = torch.autograd.grad(L, maps)
            assert g.dtype == dtype and g.isfinite().all()


class Largest(TorchDispatchMode):
    "The most elements that any operation returned."
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for o in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(o, torch.Tensor): self.numel = max(self.numel, o.numel())
        return out


def test_memory_is_that_of_a_chunk():
    images, probs = scene(B=1, K=2, dtype=torch.float32, size=(40, 40))
    probs.requires_grad_()
    for chunk in (3, 50):
        loss = DenseCRFLoss(form='potts', normalise='kernel', chunk=chunk)
        with Largest() as seen: loss(images, probs).backward()
        assert chunk*1600 <= seen.numel < chunk*1600 + 7*1600 # of 1600² = 2 560 000
    with Largest() as seen: DenseCRFLoss()(torch.rand(8, 3, 56, 56), torch.rand(8, 2, 56, 56)/2)
    assert seen.numel <= 2**20 # of 78 million


def test_matmul_precision_is_given_back():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision('medium')
        dense_crf_energy(*scene(size=(3, 3)))
        assert torch.get_float32_matmul_precision() == 'medium'
    finally: torch.set_float32_matmul_precision(before)


def test_second_derivative_is_refused():
    images, probs = scene()
    E = dense_crf_energy(images, probs.requires_grad_()).sum()
    with pytest.raises(RuntimeError, match='no second derivative'):
        torch.autograd.grad(E, probs, create_graph=True)


def test_grid_is_symmetric_positive_and_close():
    images = torch.rand(2, 3, 9, 10, dtype=torch.float64)
    images[1] = .3*images[1] + torch.linspace(0, .7, 10, dtype=torch.float64)
    f = crf_features(images, 40., 100., (224, 224))
    unit = torch.eye(90, dtype=torch.float64).expand(2, -1, -1)
    W = kernel_product(f, unit)
    for cell in (1., .75, .5):
        W2 = grid_product(f, unit, cell=cell)
        same(W2, W2.mT, tol=1e-12)
        # everyone's own weight is 1, wherever it lies in its cell
        same(W2.diagonal(dim1=1, dim2=2), torch.ones(2, 90), tol=1e-12)
        assert W2.min() >= 0 and W2.max() <= 1 + 1e-12 and torch.linalg.eigvalsh(W2).min() > -1e-10
        assert (W - W2).abs().max() < .25*cell**2
    alone = [grid_product(f[i:i + 1], W[i:i + 1]) for i in range(2)]
    assert torch.equal(grid_product(f, W), torch.cat(alone))
    with pytest.raises(ValueError, match='the exact kernel'): grid_product(1e4*f, W)


@pytest.mark.parametrize('form, normalise', MODES)
def test_grid_gradient_is_that_of_its_energy(form, normalise):
    images, probs = scene(size=(4, 5))
    loss = DenseCRFLoss(60., 3., form=form, normalise=normalise, cell=.75)
    roi = torch.rand(2, 4, 5, dtype=torch.float64)
    assert gradcheck(lambda s: loss(images, s, roi), (.05 + .9*probs).requires_grad_())


def test_mean_field():
    images, probs = scene(B=2, K=3, size=(12, 14), dtype=torch.float32)
    for idle in (dict(n_iter=0), dict(w_bilateral=0, w_gauss=0)):
        same(mean_field(images, probs, scale=1., **idle), probs, tol=1e-6)
    for dtype in (torch.float32, torch.float16, torch.float64):
        Q = mean_field(images, probs.to(dtype))
        assert Q.dtype == dtype and Q.shape == probs.shape
        same(Q.sum(1), torch.ones(2, 12, 14), tol=3e-3 if dtype == torch.float16 else 1e-5)
    flat, two = torch.zeros(1, 3, 8, 8), torch.full((1, 2, 8, 8), .5)
    flat[..., 4:] = 1 # two halves of different colours, one pixel of each labelled
    two[:, :, 0, 0], two[:, :, 0, 7] = torch.tensor([.9, .1]), torch.tensor([.1, .9])
    Q = mean_field(flat, two, scale=1., w_gauss=0.)
    assert (Q[0, 0, :, :4] > .5).all() and (Q[0, 1, :, 4:] > .5).all()
    lone = torch.arange(27).view(1, 3, 3, 3)/27 # nine colours, nobody like another
    S = torch.rand(1, 2, 3, 3).softmax(1)
    same(mean_field(lone, S, sigma_rgb=1., scale=1., w_gauss=0), S, tol=1e-6)
    for name, value in dict(n_iter=-1, w_gauss=-1, scale=2).items():
        raises(f'{name}={value}', mean_field, images, probs, **{name: value})


def test_weights():
    images = torch.rand(3, 3, 16, 16)
    A = mean_affinity(images, cell=None)
    same(A, dense_kernel(images).mean((1, 2)).float(), tol=1e-5)
    same(mean_affinity(torch.full((1, 3, 8, 8), .5), sigma_xy=1e6, cell=None), [1], tol=1e-5)
    flat, half = torch.full((1, 3, 16, 16), .5), torch.full((1, 2, 16, 16), .5)

    def weighed(scale, normalise):
        loss = DenseCRFLoss(scale=scale, sigma_xy=1e6, normalise=normalise)(flat, half).item()
        return loss*lattice_weight(size=(16, 16), scale=scale, normalise=normalise, affinity=A[0].item())

    E = [weighed(scale, normalise) for scale in (1, .5) for normalise in ('none', 'pixels')]
    same(E, [E[0]]*4, tol=1e-6*abs(E[0])) # on a flat image, where nothing is lost by averaging
    same(lattice_weight(normalise='kernel', affinity=.1), .5*2e-9*224**4*.1, tol=1e-12)
    with pytest.raises(ValueError, match='affinity=None'): lattice_weight(normalise='kernel')


GOOD = dict(images=torch.rand(2, 3, 4, 4), probs=torch.rand(2, 2, 4, 4)/2)


@pytest.mark.parametrize('kw, error, message', [
    (dict(images=torch.randint(0, 255, (2, 3, 4, 4))), TypeError,
     'images.dtype=torch.int64: expected a float tensor'),
    (dict(images=torch.rand(2, 3, 4, 4).numpy()), TypeError,
     "images.dtype=dtype('float32'): expected a float tensor"),
    (dict(images=255*torch.rand(2, 3, 4, 4)), ValueError, ': expected RGB in [0,1], neither 0 to 255'),
    (dict(images=torch.full((2, 3, 4, 4), float('nan'))), ValueError,
     "images='nan to nan': expected RGB in [0,1]"),
    (dict(images=torch.randn(2, 3, 40, 40)), ValueError, ': expected RGB in [0,1]'),
    (dict(images=torch.rand(2, 1, 4, 4)), ValueError, 'images.shape=(2, 1, 4, 4): expected (B,3,H,W)'),
    (dict(images=torch.rand(3, 4, 4)), ValueError, 'images.shape=(3, 4, 4): expected (B,3,H,W)'),
    (dict(images=torch.rand(3, 3, 4, 4)), ValueError, 'len(probs)=2: expected 3, as many maps as images'),
    (dict(probs=torch.ones(2, 2, 4, 4, dtype=torch.int64)), TypeError,
     'probs.dtype=torch.int64: expected a float tensor'),
    (dict(probs=torch.rand(2, 4, 4)), ValueError, 'probs.shape=(2, 4, 4): expected (B,K,h,w)'),
    (dict(probs=torch.rand(2, 1, 4, 4)), ValueError, 'K of 2 or more'),
    (dict(probs=torch.randn(2, 2, 9, 9)), ValueError, ': expected probabilities'),
    (dict(roi=torch.ones(2, 1, 4, 4)), ValueError, 'roi.shape=(2, 1, 4, 4): expected (B,H,W) = (2, 4, 4)'),
])
def test_bad_tensors(kw, error, message):
    raises(message, DenseCRFLoss(), error=error, **GOOD | kw)


@pytest.mark.parametrize('kw, message', [
    (dict(scale=0), 'scale=0: expected a number above 0, at most 1'),
    (dict(scale=1.5), 'scale=1.5'),
    (dict(sigma_rgb=-1), 'sigma_rgb=-1'),
    (dict(sigma_xy='far'), "sigma_xy='far'"),
    (dict(normalise='kernal'), 'did you mean kernel'),
    (dict(form='pots'), 'did you mean potts'),
    (dict(cell=0), 'cell=0'),
    (dict(cell=2), 'cell=2'),
    (dict(chunk=0), 'chunk=0'),
    (dict(chunk=2.5), 'chunk=2.5'),
])
def test_bad_settings(kw, message): raises(message, DenseCRFLoss, **kw)


def test_nan_probabilities_reach_the_scaler():
    probs = GOOD['probs'].clone()
    probs[0, 0, 0, 0] = float('nan')
    assert DenseCRFLoss()(GOOD['images'], probs).isnan()
