"""How fast, in how much memory: training by batch, localizers beside their peers, losses over pixel pairs"""
import importlib.util
import inspect
import io
import itertools
import tempfile
import time
from contextlib import ExitStack, redirect_stderr

import torch
from gpu_kit import FEW, OUT_OF_MEMORY, ask, few, fitting, matmul_tflops, nets, peak_mb, seconds
from gpu_same import arguments, public
from torch.utils.flop_counter import FlopCounterMode

from wsol_nb.nets.model import wsol_model
from wsol_nb.registry import entries
import timm

CLASSES = 1000


# training

def trained_nets(part):
    "name -> (how it is made, side of the images)"
    if part.quick: return dict(resnet10t=64, test_vit=160)
    return dict(resnet50=224, vit_small_patch16_224=224)


def make(arch):
    "A net of this library, or timm's own where there is none yet; and which of them it is."
    try: return wsol_model(arch, CLASSES, verbose=False), 'wsol_model'
    except (ValueError, TypeError, RuntimeError): return timm.create_model(arch, num_classes=CLASSES), 'timm'


class Steps:
    "Training steps of a net on a batch that lies on the device."
    def __init__(self, part, arch, half=True):
        self.part, self.half, self.side = part, half, trained_nets(part)[arch]
        torch.manual_seed(0)
        net, self.by = make(arch)
        self.net = net.to(part.device).train()
        kw = dict(momentum=.9, nesterov=True, weight_decay=1e-4)
        self.opt = torch.optim.SGD(self.net.parameters(), lr=1e-3, **kw)

    def batch(self, bs):
        x = torch.rand(bs, 3, self.side, self.side, device=self.part.device)
        self.x = x.to(memory_format=torch.channels_last)
        self.y = torch.randint(CLASSES, (bs,), device=self.part.device)

    def forward(self, net=None):
        "The loss of the net, or of its compiled form."
        kind, net = torch.device(self.part.device).type, self.net if net is None else net
        with torch.autocast(kind, torch.bfloat16, enabled=self.half): logits = net(self.x)
        return torch.nn.functional.cross_entropy(logits.float(), self.y)

    def __call__(self, net=None):
        self.forward(net).backward()
        self.opt.step()
        self.opt.zero_grad()

    def flops(self):
        "Floating-point operations of a training step, an image."
        self.batch(2)
        with FlopCounterMode(display=False) as counter: self.forward().backward()
        self.opt.zero_grad()
        return counter.get_total_flops()/2


def training(part):
    "Images/s of training steps, by batch; in bfloat16, float32 with TF32, compiled; and of a whole learner."
    torch.set_float32_matmul_precision('high')
    peaks = {half: matmul_tflops(part, torch.bfloat16 if half else torch.float32) for half in (True, False)}
    sizes = (2,) if part.quick else (32, 64, 128, 256, 512)
    archs, step = trained_nets(part), None
    jobs = [(arch, how, sizes) for arch in archs for how in ('bf16', 'tf32')]
    jobs += [(arch, 'bf16, compiled', sizes[:1] if part.quick else (256,)) for arch in archs]
    with part.guard('learner'): learner(part, sizes[:2][-1])
    for arch, how, batches in jobs:
        with part.guard(f'{arch}, {how}'):
            step = None # its memory is free for the next
            step = Steps(part, arch, how != 'tf32')
            flops = step.flops()
            what = lambda bs: f'{arch}, {how}, batch {bs}'
            for bs in part.each(batches, name=what, least=3 if part.cuda else 0):
                with part.guard(what(bs)): speed_of(part, step, arch, how, bs, flops, peaks)


def speed_of(part, step, arch, how, bs, flops, peaks):
    "A row: images/s and what share of a matrix product's speed that is."
    step.batch(bs)
    backend = 'eager' if part.quick else 'inductor' # quick: traced only
    net = torch.compile(step.net, backend=backend) if 'compiled' in how else step.net
    once = seconds(lambda: step(net), part.device, least=0 if part.quick else .5)
    reached, peak = flops*bs/once/1e12, peaks[step.half]
    part.add(net=arch, made_by=step.by, loop='step', how=how, side=step.side, batch=bs,
             images_s=round(bs/once, 1), ms_step=round(1e3*once, 2), gflop_image=round(flops/1e9, 2),
             tflops=round(reached, 3), matmul_tflops=round(peak, 2), share_of_matmul=round(reached/peak, 3),
             peak_mb=round(peak_mb(lambda: step(net), part.device)))


def learner(part, bs):
    "The same of a whole epoch: loader, augmentation, fastai's loop, bfloat16."
    from gpu_methods import Mixed, fit # with fastai, which nothing else here needs
    from wsol_nb.data.loaders import WSOLDataLoaders
    from wsol_nb.train.learner import wsol_learner
    arch, side = next(iter(trained_nets(part).items()))
    n = bs*(2 if part.quick else 8)
    with tempfile.TemporaryDirectory() as place:
        counts = dict(n_train=n, n_val=2, n_test=2, progress=False)
        how = dict(size=side, bs=bs, device=part.device)
        dls = WSOLDataLoaders.from_synth(f'{place}/world', world_kw=counts, **how)
        learn = wsol_learner(dls, arch, localization=False, path=place, verbose=False, cbs=Mixed('bf16'))
        learn.to(part.device)
        fit(learn, 1) # workers start, kernels are chosen
        start = time.perf_counter()
        fit(learn, 1)
        took = time.perf_counter() - start
    part.add(net=arch, made_by='wsol_learner', loop='learner, images of 112 px from disk', how='bf16',
             side=side, batch=bs, images_s=round(n/took, 1))


# localizers

def peer_name(name): return name.lower().replace('plusplus', 'pp')


def peers(name, net, layer, x, classes, stack):
    "{library: call} of what other libraries have under this name; the stack takes their hooks away."
    found = {}
    if importlib.util.find_spec('pytorch_grad_cam'):
        import pytorch_grad_cam as pgc
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
        if hasattr(pgc, name):
            cam, targets = getattr(pgc, name)(net, [layer]), [ClassifierOutputTarget(c) for c in classes]
            stack.callback(cam.activations_and_grads.release)
            found['pytorch-grad-cam'] = lambda: cam(x, targets=targets)
    if importlib.util.find_spec('torchcam'):
        from torchcam import methods as tc
        known = {peer_name(n): n for n in dir(tc)}
        if peer_name(name) in known:
            def ask_torchcam(kind=getattr(tc, known[peer_name(name)])):
                with kind(net, target_layer=layer) as cam: cam(list(classes), net(x))
            found['torchcam'] = ask_torchcam
    return found


def budget_of(entry, quick):
    "A budget of questions where all would take too long, and whether the peers, which have none, are asked."
    passes = entry.facts.get('passes', '')
    if quick: return FEW, 'channels' not in passes
    return (dict(channels=64, n=2, bs=64), False) if 'n channels' in passes else ({}, True)


def localizers(part):
    "Milliseconds an image, by batch, beside a plain forward pass and the peers of the same name."
    arch, side, sizes = ('resnet10t', 64, (2,)) if part.quick else ('resnet50', 224, (1, 16, 64))
    known = entries('localizer').values()
    one_pass = [(e, bs) for bs in sizes for e in known if 'channels' not in e.facts.get('passes', '')]
    many = [(e, sizes[0]) for e in known if 'channels' in e.facts.get('passes', '')]
    made = nets(arch, CLASSES, None, part.device)
    for job in part.each(one_pass + many, name=lambda j: f'{j[0].name}, batch {j[1]}'):
        with part.guard(f'{job[0].name}, batch {job[1]}'): times_of(part, *job, arch, side, made)


def times_of(part, entry, bs, arch, side, made):
    "A row for the localizer and one for each peer."
    budget, with_peers = budget_of(entry, part.quick)
    x, classes = torch.rand(bs, 3, side, side, device=part.device), list(range(bs))
    net, loc = fitting(entry, x[:1], made, **budget)
    if net is None:
        return part.miss(entry.name, loc)

    def plain():
        with torch.no_grad(): net(x)
    least = 0 if part.quick else .1
    base, layers = seconds(plain, part.device, least), getattr(loc, 'layers', None)
    row = dict(localizer=entry.name, net=arch, side=side, batch=bs, plain_ms_image=round(1e3*base/bs, 3))
    ours = row | dict(library='wsol_nb', budget=str(few(entry.load(), **budget) or ''))
    add_time(part, ours, lambda: ask(loc, x, classes), base)
    if not (with_peers and layers): return
    with ExitStack() as stack:
        calls = peers(entry.name, net, net.get_submodule(layers[0]), x, classes, stack)
        stack.enter_context(redirect_stderr(io.StringIO())) # bars of progress
        for library, call in calls.items():
            try: add_time(part, row | dict(library=library), call, base)
            except Exception as e: part.miss(f'{library} {entry.name}', f'{type(e).__name__}: {e}')


def add_time(part, row, call, base):
    "The row with its milliseconds, as multiples of a plain forward pass too, and its memory."
    once = seconds(call, part.device, 0 if part.quick else .1)
    part.add(**row, ms_image=round(1e3*once/row['batch'], 3), forward_passes=round(once/base, 2),
             peak_mb=round(peak_mb(call, part.device), 1))


# losses over pairs of pixels

def pairwise_losses():
    "(name, function or class) of all that compares pixels by their colours: of images and probabilities."
    given = dict(images=0, probs=0)
    for _, name, o in public('losses'):
        call = getattr(o, 'forward', o)
        if set(arguments(call, given | dict(self=0)) or {}) - {'self'} == set(given): yield name, o


def pairwise(part):
    "Time and memory of each with its gradient, by the side at which pixels are compared; exact, on a grid."
    bs, sides = (2, (14,)) if part.quick else (16, (28, 56, 112, 224))
    arch = next(iter(trained_nets(part)))
    step = Steps(part, arch)
    step.batch(bs)
    base = seconds(step, part.device)
    jobs = itertools.product(sides, pairwise_losses(), (None, .75))
    for side, (name, o), cell in part.each(list(jobs), name=lambda job: f'{job[1][0]} at {job[0]}'):
        takes = inspect.signature(o).parameters
        if cell and 'cell' not in takes: continue
        with part.guard(f'{name} at {side}, cell {cell}'):
            loss = pair_call(part, o, side, bs, dict(cell=cell) if 'cell' in takes else {})
            try: once = seconds(loss, part.device, 0 if part.quick else .2)
            except ValueError as e: # a grid of too many nodes
                part.miss(f'{name} at {side}', str(e))
                continue
            part.add(loss=name, way='exact' if cell is None else f'grid {cell}', batch=bs, side=side,
                     ms=round(1e3*once, 2), peak_mb=round(peak_mb(loss, part.device), 1),
                     full_w_mb=round(bs*side**4*4/2**20), step_of=arch, step_side=step.side,
                     step_ms=round(1e3*base, 2), share_of_step=round(once/(once + base), 3))


def pair_call(part, o, side, bs, kw):
    "A call of a loss, with its gradient where it has one, on images of this side."
    g = torch.Generator().manual_seed(0)
    small = torch.rand(bs, 3, 7, 7, generator=g)
    I = torch.nn.functional.interpolate(small, size=side, mode='bilinear').to(part.device)
    logits = torch.randn(bs, 2, 7, 7, generator=g)
    S = torch.nn.functional.interpolate(logits, size=side, mode='bilinear').softmax(1)
    S = S.to(part.device).requires_grad_()
    if not inspect.isclass(o) and 'scale' in inspect.signature(o).parameters: kw = kw | dict(scale=1.)
    call = o(**kw) if inspect.isclass(o) else lambda I, S: o(I, S, **kw)

    def once():
        value = call(I, S)
        if value.requires_grad: torch.autograd.grad(value.sum(), S)
    return once


# memory

def memory(part):
    "MB that weights, optimizer and a step's activations hold; the largest power of two of images that fits."
    sizes = (2,) if part.quick else (32, 128)
    jobs, what = list(itertools.product(trained_nets(part), ('bf16', 'float32'))), ', '.join
    for arch, how in part.each(jobs, name=what):
        with part.guard(what((arch, how))):
            step = Steps(part, arch, how == 'bf16')
            for bs in sizes:
                step.batch(bs)
                step() # the optimizer has its state
                held = sum(p.numel()*p.element_size() for p in step.net.parameters())/2**20
                state = sum(v.numel()*v.element_size() for s in step.opt.state.values() for v in s.values()
                            if isinstance(v, torch.Tensor))/2**20
                row = dict(net=arch, made_by=step.by, how=how, side=step.side)
                part.add(**row, batch=bs, weights_mb=round(held, 1), optimizer_mb=round(state, 1),
                         step_mb=round(peak_mb(step, part.device), 1),
                         mb_image=round(peak_mb(step.forward, part.device)/bs, 2))
            if part.cuda: largest(part, step, arch, how)


def largest(part, step, arch, how):
    "The largest batch, doubled until the card is full or 4096."
    fits, bs = 0, 128
    while bs <= 4096 and part.left() > 5:
        try:
            step.batch(bs)
            step()
            torch.cuda.synchronize()
        except OUT_OF_MEMORY: break
        fits, bs = bs, 2*bs
    step.x = step.y = None
    torch.cuda.empty_cache()
    part.add(net=arch, made_by=step.by, how=how, side=step.side, largest_batch=fits)
