"""What the parts of `make gpu` share: rows that say where they were measured, time that is left, clocks"""
import csv
import inspect
import platform
import shutil
import statistics
import subprocess
import time
import traceback
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

from wsol_nb.core import whole_file # first: lets timm be imported beside a CUDA torchvision
from wsol_nb.localize.base import Localizer
from wsol_nb.nets.decoder import FullModel
from wsol_nb.nets.model import wsol_model
from wsol_nb.results import hardware

# of localizers that ask a net again and again, by the name of the parameter: few questions
FEW = dict(channels=8, n=2, steps=2, bs=16)
REQUIRED = dict(of='gradcam') # arguments without a default
OUT_OF_MEMORY = getattr(torch, 'OutOfMemoryError', torch.cuda.OutOfMemoryError)


# where it was measured

def driver():
    "Version of the NVIDIA driver, or None."
    if not shutil.which('nvidia-smi'): return None
    ask = ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader']
    said = subprocess.run(ask, capture_output=True, text=True).stdout.split()
    return said[0] if said else None


def measured_on(device, quick, commit, command):
    "The columns with which every row ends."
    h, cuda = hardware(), torch.device(device).type == 'cuda'
    return dict(device=torch.device(device).type, quick=quick, card=h['gpu'] if cuda else None,
                driver=driver() if cuda else None, cuda=torch.version.cuda if cuda else None,
                torch=torch.__version__, python=platform.python_version(),
                hardware=f"{h['cpu']}, {h['cores']} cores", commit=commit, command=command)


# a part

@dataclass
class Part:
    "What a part is told, where its rows go, what went wrong in it and what time did not allow."
    name: str
    device: str
    quick: bool
    out: Path # folder of the tables
    until: float # time.time() by which it should be done
    source: dict # the columns with which each row ends
    rows: list = field(default_factory=list)
    failed: list = field(default_factory=list)
    cut: dict = field(default_factory=dict) # why -> what

    @property
    def cuda(self): return torch.device(self.device).type == 'cuda'

    def left(self): return self.until - time.time()

    def add(self, **row):
        "A row more; the table is written anew, so that a part that is stopped leaves what it has."
        shown = '  '.join(f'{k} {short(v)}' for k, v in row.items() if v is not None)
        print(f'  {shown}', flush=True)
        self.rows.append(row)
        columns = list(dict.fromkeys(k for r in self.rows for k in r))
        with whole_file(self.out/f'gpu-{self.name}.csv') as part, open(part, 'w', newline='') as f:
            table = csv.DictWriter(f, [*columns, *self.source])
            table.writeheader()
            table.writerows(r | self.source for r in self.rows)

    def miss(self, what, why):
        "Note what was left out, and why; that is no failure."
        self.cut.setdefault(why, []).append(what)
        print(f'  {what} is left out: {why}', flush=True)

    @contextmanager
    def guard(self, what):
        "An error inside is noted, and what comes after goes on; a card without memory left is no error."
        try: yield
        except OUT_OF_MEMORY:
            self.miss(what, 'out of memory')
        except Exception as e:
            why = ' '.join(''.join(traceback.format_exception_only(e)).split())
            known = any(why in f for f in self.failed)
            self.failed.append(f'{what}: {why}')
            print(f'  {what} FAILED: {why[:300]}', flush=True)
            if not known: traceback.print_exc(limit=-3)

    def each(self, items, name=str, least=0.):
        "The items, as long as there is time: what a round took longest, and `least` seconds, must be left."
        longest = least
        for item in items:
            if self.left() < longest:
                self.miss(name(item), 'no time')
                continue
            start = time.time()
            yield item
            longest = max(longest, time.time() - start)


def short(value): return f'{value:.4g}' if isinstance(value, float) else value


# nets and localizers

def classifier(arch='resnet10t', n_classes=5, stride=16):
    "A net with random weights whose classes find evidence for and against them, so that no map is empty."
    torch.manual_seed(1)
    model = wsol_model(arch, n_classes, stride=stride, verbose=False)
    torch.nn.init.uniform_(model.head.classifier.weight, -.25, .5)
    return model


def few(kind, **budget):
    "Arguments for a localizer's class: those it must have, and of a budget those it knows."
    known = inspect.signature(kind).parameters
    must = {k: v for k, v in REQUIRED.items() if k in known and known[k].default is inspect.Parameter.empty}
    return must | {k: v for k, v in budget.items() if k in known}


def nets(arch, n_classes, stride, device, dtype=torch.float32):
    "{name: how it is made} of the nets on which localizers are asked; each is made once."
    made = {}

    def once(name, make):
        if name not in made: made[name] = make().to(device, dtype).eval()
        return made[name]
    plain = partial(once, 'classifier', lambda: classifier(arch, n_classes, stride))
    return dict(classifier=plain, decoder=partial(once, 'decoder', lambda: FullModel(plain(), frozen=False)))


def fitting(entry, x, made, **budget):
    "(net, localizer) of a registered localizer on the first of the nets that it fits, or what each said."
    kind, said = entry.load(), []
    if not issubclass(kind, Localizer): return None, f'{kind.__name__} is no Localizer'
    order = list(made.items())
    if entry.facts.get('needs') == 'a decoder': order.reverse() # it would read any net's maps
    for name, make in order:
        try:
            net = make()
            loc = kind(net, **few(kind, **budget))
            ask(loc, x)
            return net, loc
        except Exception as e: said.append(f'{name}: {type(e).__name__}: {str(e).splitlines()[0]}')
    return None, '; '.join(said)


def ask(loc, x, target=None):
    "What a localizer answers: maps, or boxes where it has no map."
    return torch.as_tensor(loc.boxes(x, target)) if hasattr(loc, 'boxes') else loc(x, target)


# clocks and memory

def wait(device):
    if torch.device(device).type == 'cuda': torch.cuda.synchronize()


def seconds(f, device, least=.2, rounds=3):
    "Median seconds of a call, after one that is not counted; short ones are called until `least` is over."
    def round_of(n):
        wait(device)
        start = time.perf_counter()
        for _ in range(n): f()
        wait(device)
        return (time.perf_counter() - start)/n
    f()
    once = round_of(1)
    if once >= least: return once
    n = max(1, min(200, int(least/once)))
    return statistics.median(round_of(n) for _ in range(rounds))


def peak_mb(f, device):
    "Most memory that tensors made by a call hold at a time, in MB."
    if torch.device(device).type == 'cuda':
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        f()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before)/2**20
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with torch.profiler.profile(activities=cpu, profile_memory=True) as p: f()
    events = [e for e in p.profiler.kineto_results.events() if e.name() == '[memory]']
    held = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())] or [0])
    return held.max(initial=0)/2**20


def matmul_tflops(part, dtype):
    "What a large product of random matrices reaches here and now, in TFLOP/s."
    n = 8192 if part.cuda else 512
    a, b = (torch.randn(n, n, device=part.device).to(dtype) for _ in range(2))
    return 2*n**3/seconds(lambda: a @ b, part.device)/1e12
