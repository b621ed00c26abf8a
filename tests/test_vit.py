"""The contract of localizers that read tokens, on small transformers; attention against timm's own, torch-
cam.

Every registered localizer that needs tokens is asked, so that a new one is asked without an edit here; the
tables hold what is special. The nets have random weights; test_conformance.py asks the same of CNNs.
"""
import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import images, raises, root, same
from test_conformance import Broken, equal, needs, state_of
from torch import nn

from wsol_nb.registry import entries
from wsol_nb.vit.attention import ClassAttention, mass_mask
from wsol_nb.vit.layout import learn_attention
from wsol_nb.vit.reading import AllRows, ClassRows, KeptCalls, PatchMean, Projected, read_attention
from wsol_nb.vit.relevance import AttentionGradient, LeGrad
from wsol_nb.vit.rollout import Rollout
import timm # after wsol_nb.core, see its end

sys.path.insert(0, str(root/'tools'))


def vit(name, **kw): return lambda: timm.create_model(name, num_classes=5, **kw)


WIDE = dict(img_size=(64, 96), embed_dim=48, num_heads=3) # images of tests/helpers
NETS = dict(ViT=vit('vit_tiny_patch16_224', depth=3, **WIDE),
            DeiT=vit('deit_tiny_distilled_patch16_224', depth=2, **WIDE),
            DINOv3=vit('vit_small_patch16_dinov3', depth=2, embed_dim=96, num_heads=3),
            BEiT=vit('beit_base_patch16_224', depth=2, **WIDE))
ASKED = {n: e for n, e in entries('localizer').items() if 'tokens' in needs(e)}
CLASSES = {n: e.load() for n, e in ASKED.items()}
GRADIENTS = {n for n, e in ASKED.items() if 'gradients' in needs(e)} # the map of a class
# small budgets; in a random net attention is nearly even: a map handed along twice is mostly rounding
SETTINGS = dict(AffinityMaps=dict(power=1), LOST=dict(centre=True), TokenCut=dict(centre=True))
PAIRS = [(l, n) for l in CLASSES for n in NETS]
one_net = pytest.mark.parametrize('name', CLASSES)
_nets = {}


def shared(name):
    "A net with random weights whose classes and rows differ, in eval mode but for one part."
    if name not in _nets:
        torch.manual_seed(1)
        net = NETS[name]().eval()
        for m in net.modules():
            if isinstance(m, nn.Linear): nn.init.normal_(m.weight, std=.15)
        for n, p in net.named_parameters(): # of 1e-5, by which gradients are no half numbers
            if 'gamma' in n: nn.init.ones_(p)
        next(net.children()).train()
        _nets[name] = net
    return _nets[name]


def made(name, net): return CLASSES[name](net, **SETTINGS.get(name, {}))


@pytest.fixture(params=PAIRS, ids='-'.join)
def loc(request):
    l, n = request.param
    return made(l, copy.deepcopy(shared(n)))


def test_shape_range_dtype(loc):
    x = images()
    maps, raw = loc(x), loc.raw(x)
    assert maps.shape == (3, 64, 96) and maps.dtype == torch.float32 and not maps.requires_grad
    assert raw.shape == (3, 4, 6), 'the map keeps the proportions of a non-square image'
    assert maps.min() >= 0 and maps.max() <= 1 and maps.isfinite().all()
    assert all(m.max() > .9 for m in maps), 'an empty map shows nothing'
    assert loc.logits.shape == (3, 5) and loc.logits.dtype == torch.float32
    same(loc.logits, loc.model.eval()(x), 1e-4)
    assert type(loc).__name__ in repr(loc)


def test_batch_independence(loc):
    x = images()
    maps, logits = loc(x, [0, 3, 1]), loc.logits
    for i, c in enumerate([0, 3, 1]):
        same(loc(x[i:i + 1], c)[0], maps[i], 2e-3)
        same(loc.logits[0], logits[i], 1e-4)


def test_targets(loc):
    x = images()
    none = loc.raw(x)
    same(none, loc.raw(x, loc.logits.argmax(1)), 0)
    same(loc.raw(x, 2), loc.raw(x, [2, 2, 2]), 0)
    differs = not torch.equal(loc.raw(x, 0), loc.raw(x, 1))
    assert differs == (type(loc).__name__ in GRADIENTS), 'what needs gradients is of a class'
    several, two = loc.raw(x, [[0, 1], [2, 3], [4, 0]]), loc.raw(x, 2)
    assert several.shape[:2] == (3, 2)
    size = two.abs().max()
    same(several[:, 1], loc.raw(x, [1, 3, 0]), 1e-5*size)
    same(loc.raw(x, lambda z: z[:, 2]), two, 1e-5*size)
    for bad, error, message in (([0, 1], ValueError, r'got shape \(2,\) for a batch of 3'),
                                (5, ValueError, 'model has 5'), (-1, ValueError, 'model has 5')):
        with pytest.raises(error, match=message): loc(x, bad)


def test_state_untouched(loc):
    mixed = loc.model
    next(mixed.parameters()).requires_grad_(False)
    last = list(mixed.parameters())[-1]
    last.grad = torch.full_like(last, 7)
    before = state_of(mixed), [getattr(m, 'fused_attn', None) for m in mixed.modules()]
    loc(images())
    loc.raw(images(), 1)
    equal(before[0], state_of(mixed))
    assert before[1] == [getattr(m, 'fused_attn', None) for m in mixed.modules()]
    assert (last.grad == 7).all()


@one_net
def test_state_untouched_when_it_raises(name):
    "In the middle of a layer that was read before, by a target that does not exist, by another net."
    net = copy.deepcopy(shared('ViT'))
    loc = made(name, net)
    loc(images())
    before = state_of(net)
    def fail(*a): raise RuntimeError('broken on purpose')
    handle = net.blocks[-1].mlp.register_forward_hook(fail)
    with pytest.raises((RuntimeError, ValueError), match='broken on purpose'): loc(images())
    handle.remove()
    equal(before, state_of(net))
    with pytest.raises(ValueError): loc(images(), [0, 1])
    equal(before, state_of(net))
    other = Broken().train()
    before = state_of(other)
    with pytest.raises((RuntimeError, ValueError), match='broken on purpose'): made(name, other)(images())
    equal(before, state_of(other))
    assert not torch.overrides._get_current_function_mode_stack(), 'a mode is still on'


def test_frozen_no_grad_and_again(loc):
    x, free = images(), loc(images(), 1)
    with torch.no_grad(): same(loc(x, 1), free, 1e-6)
    with torch.inference_mode(): same(loc(x, 1).clone(), free, 1e-6)
    loc.model.requires_grad_(False)
    same(loc(x, 1), free, 1e-6)
    torch.rand(5)
    same(loc(x, 1), free, 1e-6)


def test_create_graph(loc):
    x = images()
    if type(loc).__name__ == 'TokenCut':
        with pytest.raises(ValueError, match='nothing of its maps is differentiable'):
            loc(x, 1, create_graph=True)
        return
    with torch.no_grad(): maps = loc(x, 1, create_graph=True)
    assert maps.requires_grad
    same(maps.detach(), loc(x, 1), 1e-4)
    weight = next(p for p in loc.model.parameters() if p.ndim == 4)
    (maps*torch.linspace(0, 1, 96)).sum().backward()
    assert weight.grad is not None and weight.grad.isfinite().all() and weight.grad.abs().sum() > 0


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_half(loc, dtype):
    x, full = images(), loc(images(), 1)
    def alike(low):
        assert low.dtype == torch.float32 and low.isfinite().all()
        alike = torch.cosine_similarity(low.flatten(1), full.flatten(1))
        # keys are compared, and a comparison that turns over may change a map as a whole
        assert (alike.median() if type(loc).__name__ in ('LOST', 'TokenCut') else alike.min()) > .95
    with torch.autocast('cpu', dtype): alike(loc(x, 1))
    loc.model.to(dtype)
    alike(loc(x, 1))


@one_net
def test_wrapped_and_compiled(name):
    "Data-parallel, compiled as a whole or in part, before or after the localizer was made."
    net, x = copy.deepcopy(shared('ViT')).eval(), images(n=2)
    expected = made(name, net)(x, 1)
    for wrapped in (nn.DataParallel(net), torch.compile(net, backend='eager')):
        same(made(name, wrapped)(x, 1), expected, 1e-6)
    loc, part = made(name, net), net.blocks[1].attn
    part.compile(backend='eager')
    net(x)
    if hasattr(torch.compiler, 'set_stance'): same(loc(x, 1), expected, 1e-6)
    else: raises('is compiled', loc, x, 1)


@one_net
def test_a_net_that_has_changed_is_learned_again(name):
    "Layouts are kept by the model; a block that is gone is not looked for."
    net, x = copy.deepcopy(shared('ViT')), images(n=1)
    made(name, net)(x)
    net.blocks = net.blocks[:2]
    same(made(name, net)(x, 1), made(name, copy.deepcopy(net))(x, 1), 1e-6)


# attention

def test_no_attention_is_said():
    for arch, size, why in (('swin_tiny_patch4_window7_224', 224, 'within windows'),
                            ('xcit_nano_12_p16_224', 64, 'channels attend to channels'),
                            ('pvt_v2_b0', 64, 'reduced'), ('mixer_s32_224', 224, 'has no attention'),
                            ('crossvit_tiny_240', 240, 'two grids'),
                            ('coat_lite_tiny', 224, 'linear attention')):
        net = timm.create_model(arch, num_classes=5)
        with pytest.raises(ValueError, match=why): Rollout(net)(torch.rand(1, 3, size, size))
    wee = timm.create_model('vit_wee_patch16_reg1_gap_256', num_classes=5, depth=1, img_size=64)
    raises('1 prefix tokens are registers', ClassAttention(wee), images(64, 64, 1))


def test_multihead_attention_module_is_said():
    from torchvision.models import VisionTransformer
    net = VisionTransformer(image_size=32, patch_size=8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=16,
                            num_classes=5)
    raises('nn.MultiheadAttention works out of sight', ClassAttention(net), images(32, 32, 1))


def test_scripted_is_said():
    net = shared('ViT')
    part = copy.deepcopy(net)
    part.blocks[0].mlp = torch.jit.trace(part.blocks[0].mlp, torch.rand(1, 25, 48))
    raises("'blocks.0.mlp' is compiled", ClassAttention(part), images())


@pytest.mark.parametrize('name', NETS)
def test_rows(name):
    "Rows sum to 1, the class row is the first; several takers of one pass; keys are the projection's."
    net, x = shared(name), images(n=2)
    reading = read_attention(net, x, ClassRows(), AllRows(), PatchMean(), Projected('all', 'k'))
    rows, whole, mean, keys = reading.taken
    n = 24 + reading.layout.layers[0].prefix
    for r, A, k in zip(rows, whole, keys):
        assert A.shape == (2, A.shape[1], n, n) and k.shape[:2] == (2, n)
        same(A.sum(-1), torch.ones(A.shape[:-1]), 1e-5)
        same(A[:, :, 0], r, 1e-6)
    same(mean, torch.stack(whole).mean((0, 2))[:, -24:, -24:], 1e-6)


def test_memory_of_class_rows():
    "What is kept of a pass is B·heads·N numbers a layer, and a row is all that is made."
    net, x, made_rows = shared('ViT'), images(n=2), []
    from wsol_nb.vit.rows import Attended
    plain = Attended.rows
    def count(self, at=slice(None)):
        made_rows.append(plain(self, at))
        return made_rows[-1]
    try:
        Attended.rows = count
        read_attention(net, x, ClassRows('last 2'))
    finally: Attended.rows = plain
    assert [tuple(r.shape) for r in made_rows] == [(2, 3, 1, 25)]*2


def test_as_timm_extracts_it():
    "AttentionExtract of timm rewrites the net with fx."
    from timm.utils import AttentionExtract
    for name in ('ViT', 'DeiT'):
        net, x = copy.deepcopy(shared(name)).eval(), images(n=2)
        _, _, (ours,) = read_attention(net, x, AllRows())
        for block in net.blocks: block.attn.fused_attn = False # without which it finds none
        theirs = AttentionExtract(net, method='fx')(x)
        assert len(theirs) == len(ours)
        for a, b in zip(ours, theirs.values()): same(a, b, 1e-6)


def test_uniform_and_permuted():
    "Queries and keys of zero look everywhere alike; patches that move with their embeddings move the map."
    net, x = copy.deepcopy(shared('ViT')).eval(), images(n=2)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(3))
    tiles = x.unfold(2, 16, 16).unfold(3, 16, 16).flatten(2, 3)[:, :, order]
    moved = tiles.unflatten(2, (4, 6)).permute(0, 1, 2, 4, 3, 5).reshape(x.shape)
    localizers = [ClassAttention(net), Rollout(net), AttentionGradient(net), LeGrad(net)]
    before = [l.raw(x, 1).flatten(1) for l in localizers]
    net.pos_embed.data[:, 1:] = net.pos_embed.data[:, 1:][:, order]
    for l, m in zip(localizers, before): same(l.raw(moved, 1).flatten(1), m[:, order], 1e-4*m.abs().max())
    for block in net.blocks: block.attn.qkv.weight.data[:96] = block.attn.qkv.bias.data[:96] = 0
    same(ClassAttention(net).raw(x), torch.full((2, 4, 6), 1/25), 1e-7)


def test_rollout_at_scale_keeps_no_matrix():
    "Of 1024 tokens no more rows are made at a time than 256."
    from wsol_nb.vit.rows import Attended
    small = dict(img_size=128, patch_size=4, depth=2, embed_dim=12, num_classes=5)
    net = timm.create_model('vit_tiny_patch16_224', **small)
    plain, most = Attended.rows, []
    def count(self, at=slice(None)):
        most.append(plain(self, at).shape[2])
        return plain(self, at)
    try:
        Attended.rows = count
        Rollout(net)(images(128, 128, 1))
    finally: Attended.rows = plain
    assert max(most) == 256


def test_mass():
    a = torch.tensor([[.4, .3], [.2, .1]])
    assert mass_mask(a).tolist() == [[True, True], [False, False]]
    maps = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0))
    kept = (maps*mass_mask(maps)).sum((1, 2))/maps.sum((1, 2))
    assert (kept >= .6 - .05).all() and (kept <= .6 + .05).all()


def test_legrad_as_torch_cam_has_it():
    "torch-cam's LeGrad reads nn.MultiheadAttention: a net of such blocks with the weights of ours."
    methods = pytest.importorskip('torchcam.methods', reason='torchcam is not installed')
    if not hasattr(methods, 'LeGrad'): pytest.skip('this torchcam has no LeGrad')
    net, x = copy.deepcopy(shared('ViT')).eval(), images(n=1)

    class Block(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.norm1, self.norm2, self.mlp = block.norm1, block.norm2, block.mlp
            self.self_attention = nn.MultiheadAttention(48, 3, batch_first=True)
            own, theirs = self.self_attention, block.attn
            own.in_proj_weight.data, own.in_proj_bias.data = theirs.qkv.weight.data, theirs.qkv.bias.data
            own.out_proj.load_state_dict(theirs.proj.state_dict())

        def forward(self, x):
            y = self.norm1(x)
            x = x + self.self_attention(y, y, y)[0]
            return x + self.mlp(self.norm2(x))

    twin = copy.deepcopy(net)
    twin.blocks = nn.Sequential(*map(Block, twin.blocks))
    with methods.LeGrad(twin, list(twin.blocks), score_projection=lambda z: twin.forward_head(twin.norm(z)),
                        grid_shape=(4, 6)) as theirs:
        scores = twin(x)
        cams = theirs(2, scores, normalized=False)
    ours = LeGrad(net).raw(x, 2)
    same(scores, net(x), 1e-4)
    fused = torch.stack(cams).mean(0) if len(cams) > 1 else cams[0]
    same(fused, ours, 1e-4*ours.abs().max())


# the support table

def test_support_of_families():
    "Cheap families of the table, asked again: right, or refused by name."
    from attention_support import CHECKS, cell, lively
    from token_support import CHEAP, made
    from wsol_nb.results import read_results
    table = read_results('token_support').set_index(['family', 'what']).verdict
    for family in CHEAP:
        for what in CHECKS:
            verdict, reason = cell(what, family, *lively(*made(family)))
            said = f'{family}, {what}: {reason}'
            assert verdict == table[family, what] and verdict in ('right', 'refused'), said
