"""Whether everything that computes on a device says there what it says on the CPU.

Localizers and heads are those of the registry. Losses, seed samplers and score functions are found in their
packages: every public function or module whose arguments have names of INPUTS. Scores are all figures of the
report of `evaluate`. In float64 hardly anything is left of rounding, so that it shows whether the same thing
is computed; float32 (without TF32) shows what rounding does to it.
"""
import copy
import importlib
import inspect
import math
import pkgutil
import tempfile

import torch
from gpu_kit import FEW, ask, few, fitting, nets
from torch import nn

from wsol_nb.localize.base import HeadMaps
from wsol_nb.registry import entries
from wsol_nb.scoring.loop import evaluate

# largest difference, in units of the largest value or of 1; localizers make float32 maps of a float64 net
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}
OF_MAPS = {torch.float64: 1e-4, torch.float32: 1e-2}
PACKAGES = 'losses', 'dense', 'metrics', 'localize'


def exact_products(device):
    "No TF32 from here on."
    if torch.device(device).type != 'cuda': return
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    if hasattr(matmul, 'fp32_precision'): matmul.fp32_precision = conv.fp32_precision = 'ieee' # torch 2.9
    else: matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def tensors(answer):
    "All tensors of an answer, one after the other."
    if isinstance(answer, torch.Tensor): yield answer
    elif isinstance(answer, dict): yield from tensors(list(answer.values()))
    elif isinstance(answer, (tuple, list)):
        for a in answer: yield from tensors(a)


def difference(a, b):
    "The largest between two answers, over the largest value or 1; infinite where one is not finite."
    a, b = [[t.detach().cpu().double() for t in tensors(answer)] for answer in (a, b)]
    if [t.shape for t in a] != [t.shape for t in b] or not a: return math.inf
    off = [((p - q).abs()/q.abs().max().clamp(min=1)).max() for p, q in zip(a, b) if p.numel()]
    return torch.stack(off).max().nan_to_num(math.inf).item() if off else 0.


def compare(part, kind, name, answer, tolerances=TOLERANCE):
    "A row: how far `answer(device, dtype)` here is from the one on the CPU, in both precisions."
    row = dict(kind=kind, name=name, same=True)
    with part.guard(f'{kind} {name}'):
        for dtype, tolerance in tolerances.items():
            off, short = difference(answer(part.device, dtype), answer('cpu', dtype)), str(dtype)[6:]
            row |= {short: off, f'{short} tolerance': tolerance}
            if off <= tolerance: continue
            row['same'] = False
            part.failed.append(f'{kind} {name}: {short} differs by {off:.2g}, more than {tolerance:g}')
        part.add(**row)


def not_asked(part, kind, name, why):
    "What could not be asked is said, and is no failure."
    part.miss(f'{kind} {name}', why)
    part.add(kind=kind, name=name, said=why)


# localizers and heads

def images(n=2, h=64, w=96): return torch.rand(n, 3, h, w, generator=torch.Generator().manual_seed(2))


def localizers(part):
    "Every registered one, with few questions where it has a budget."
    made = nets('resnet10t', 5, 16, 'cpu')
    for entry in part.each(entries('localizer').values(), name=lambda e: e.name):
        net, loc = fitting(entry, images(1), made, **FEW)
        if net is None:
            not_asked(part, 'localizer', entry.name, loc)
            continue

        def answer(device, dtype, net=net, kind=entry.load()):
            own = kind(copy.deepcopy(net).to(device, dtype), **few(kind, **FEW))
            return ask(own, images().to(device), [0, 3])
        compare(part, 'localizer', entry.name, answer, OF_MAPS)


def heads(part):
    "Logits, class maps and the gradient of features."
    for entry in part.each(entries('head').values(), name=lambda e: e.name):
        torch.manual_seed(0)
        head = entry.load()(12, 5).eval()

        def answer(device, dtype, head=head):
            own = copy.deepcopy(head).to(device, dtype)
            features = torch.randn(3, 12, 6, 7, generator=torch.Generator().manual_seed(1)).to(device, dtype)
            logits, maps = own(features.requires_grad_())
            return logits, maps, *torch.autograd.grad(logits.square().sum(), features)
        compare(part, 'head', entry.name, answer)


# losses, seeds, scores

def inputs(dtype):
    "What functions are given, by the name of the argument."
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.rand(*shape, generator=g, dtype=torch.float64).to(dtype)
    logits, maps, bright = 4*rand(3, 2, 20, 24) - 2, rand(3, 20, 24), rand(3, 20, 24)
    f = 3*rand(3, 5, 60)
    return dict(
        logits=logits, probs=logits.softmax(1), images=rand(3, 3, 20, 24), maps=maps, weights=rand(3, 20, 24),
        labels=torch.where(maps < .3, 0, torch.where(maps > .7, 1, 255)), f=f, V=rand(3, 2, 60), t=2., x=maps,
        n=10, fg=maps > .7, bg=bright > .6, q=(255*maps).long(), noise=rand(3, 20, 24), size=(40, 48),
        raw=maps, epoch=1)


EXTRA = dict(noise=lambda values: values['noise'], generator=lambda _: torch.Generator().manual_seed(3),
             lower=lambda _: 235., upper=lambda _: 250.) # pixels: both bind


def public(package):
    "(module, name, object) of what a package's modules export: functions, and losses that are modules."
    base = importlib.import_module(f'wsol_nb.{package}')
    for m in pkgutil.walk_packages(base.__path__, f'wsol_nb.{package}.'):
        module = importlib.import_module(m.name)
        for name in getattr(module, '__all__', []):
            o = getattr(module, name)
            loss = inspect.isclass(o) and issubclass(o, nn.Module) and o.forward is not nn.Module.forward
            own = getattr(o, '__module__', None) == m.name
            if own and (loss and package == 'losses' or inspect.isfunction(o)):
                yield m.name.removeprefix('wsol_nb.'), name, o


def arguments(call, known):
    "Those of a call, by the names of its parameters; None where one is not known."
    taken = {}
    for name, p in inspect.signature(call).parameters.items():
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD): continue
        if p.default is p.empty:
            if name not in known: return None
            taken[name] = known[name]
        elif name in EXTRA: taken[name] = EXTRA[name](known)
    return taken


def made(o, known):
    "A function as it is, a loss made with the bounds that it asks for; None where arguments are not known."
    if not inspect.isclass(o): return o
    own = arguments(o, known)
    return None if own is None else o(**own)


def functions():
    "(module, name, object, why it is not asked or None) of losses, and of functions with known arguments."
    known = inputs(torch.float32)
    for module, name, o in (found for package in PACKAGES for found in public(package)):
        call = made(o, known)
        fits = call is not None and arguments(getattr(call, 'forward', call), known) is not None
        if fits or inspect.isclass(o):
            yield module, name, o, None if fits else 'its arguments are not among those of tools/gpu_same.py'


def answered(o, device, dtype):
    "Its value, and its gradient where there is one."
    known = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs(dtype).items()}
    call = made(o, known)
    given = arguments(getattr(call, 'forward', call), known)
    learns = [k for k, v in given.items() if isinstance(v, torch.Tensor) and v.is_floating_point()]
    for k in learns: given[k] = given[k].clone().requires_grad_(k in ('logits', 'probs', 'f'))
    values = list(tensors(call(**given)))
    total = sum(v.sum() for v in values if v.requires_grad)
    if not isinstance(total, torch.Tensor): return values
    asked = [given[k] for k in learns if given[k].requires_grad]
    return values, [g for g in torch.autograd.grad(total, asked, allow_unused=True) if g is not None]


def tried(o):
    "(whether it answers with tensors on the CPU, what it said instead)."
    try: return bool(list(tensors(answered(o, 'cpu', torch.float32)))), None
    except Exception as e: return False, f'{type(e).__name__}: {e}'.splitlines()[0]


def losses(part):
    "Every loss, seed sampler and function of maps, with its gradient."
    for module, name, o, why in part.each(functions(), name=lambda found: found[1]):
        asked, said = (False, why) if why else tried(o)
        if asked: compare(part, module, name, lambda device, dtype, o=o: answered(o, device, dtype))
        elif said and inspect.isclass(o): not_asked(part, module, name, said)
        elif said: print(f'  {module} {name} takes no tensors: {said}')


# scores

def numbers(report, name=''):
    "(name, number) of all figures in nested results."
    if isinstance(report, dict):
        for k, v in report.items(): yield from numbers(v, f'{name}.{k}'.lstrip('.'))
    elif isinstance(report, (int, float)) and not isinstance(report, bool): yield name, float(report)


def scores(part):
    "The figures of `evaluate`, with boxes and masks: maps in float64, so that no threshold is missed."
    from wsol_nb.data.loaders import WSOLDataLoaders # with fastai, which nothing else here needs
    with tempfile.TemporaryDirectory() as place, part.guard('scores'):
        counts = dict(n_train=8, n_val=8, n_test=16, progress=False)
        net, reports = nets('resnet10t', 8, 16, 'cpu')['classifier'](), {} # as many classes as the world
        for device in ('cpu', part.device):
            dls = WSOLDataLoaders.from_synth(f'{place}/world', size=64, bs=8, num_workers=0, device=device,
                                             world_kw=counts)
            loc = HeadMaps(copy.deepcopy(net).to(device, torch.float64))
            report = evaluate(loc, dls, 'test', tau_from=None, bootstrap=0, progress=False)
            reports[device] = dict(numbers(dict(boxes=report.boxes, pixels=report.pixels,
                                                accuracy=report.accuracy)))
        here, there = reports[part.device], reports['cpu']
        off = {k: abs(here[k] - there[k]) for k in there if here.get(k) != there[k]}
        part.add(**{'kind': 'scores', 'name': f'evaluate: {len(there)} figures', 'same': not off,
                    'float64': max(off.values(), default=0.), 'float64 tolerance': 0.})
        if off or here.keys() != there.keys(): part.failed.append(f'scores: {sorted(off)[:5]} differ')


def conformance(part):
    "All of it."
    exact_products(part.device)
    for group in (scores, localizers, heads, losses): group(part)
