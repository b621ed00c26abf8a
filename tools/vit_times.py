"""Times and memory of reading attention, as ratios to a plain forward pass

    python tools/vit_times.py [--repeat 15] [--out CSV]

A ViT-Tiny/16 at 224, one image, one thread: processor time of each reader and localizer, each made in
turn with a plain pass before it, so that both meet the same machine; the median of the ratios. Then the
memory of rollout at 4096 tokens (1024×1024): what a call needs at its highest above what a plain pass
does, in a process of its own. Rows replace those of nbs/results/vit_times.csv.
"""
import argparse
import ctypes
import gc
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from wsol_nb.core import set_seed
from wsol_nb.localize.outputs import Door
from wsol_nb.results import Rows, origin, results_folder
from wsol_nb.vit.attention import ClassAttention
from wsol_nb.vit.layout import learn_attention
from wsol_nb.vit.reading import AllRows, ClassRows, KeptCalls, PatchMean, Projected, read_attention
from wsol_nb.vit.relevance import AttentionGradient, LeGrad
from wsol_nb.vit.rollout import Rollout
import timm # after wsol_nb.core, see its end


def took(f):
    start = time.process_time()
    f()
    return time.process_time() - start


def ratio(f, plain, repeat):
    "Median ratio to a plain pass, and median milliseconds; the first two rounds are not counted."
    pairs = [(took(plain), took(f)) for _ in range(repeat + 2)][2:]
    return statistics.median(b/a for a, b in pairs), 1e3*statistics.median(b for _, b in pairs)


def what(net, x):
    "What is timed, by name."
    door = Door()
    layout = learn_attention(net, x, door)
    def read(*takers): return lambda: read_attention(net, x, *takers, layout=layout, ask=door)
    made = dict(ClassAttention=ClassAttention(net), Rollout=Rollout(net),
                AttentionGradient=AttentionGradient(net),
                LeGrad=LeGrad(net))
    taken = {'class rows, last 4': read(ClassRows('last 4')), 'class rows, all': read(ClassRows()),
             'keys of a layer': read(Projected(8)), 'patch mean, layers 5-11': read(PatchMean(range(5, 12))),
             'all rows': read(AllRows())}
    return taken | {n: (lambda loc=loc: loc.raw(x, 0)) for n, loc in made.items()}


def times(repeat):
    torch.set_num_threads(1)
    set_seed(0)
    net, x = timm.create_model('vit_tiny_patch16_224').eval(), torch.rand(1, 3, 224, 224)
    def plain():
        with torch.no_grad(): net(x)
    for name, f in what(net, x).items():
        def quiet(f=f):
            with torch.no_grad(): f()
        r, ms = ratio(quiet, plain, repeat)
        yield dict(what=name, tokens=197, plain_passes=round(r, 3), ms=round(ms, 1))


def peak(name):
    "Megabytes that a call at 4096 tokens needs for a while, once the net is known."
    torch.set_num_threads(1)
    net = timm.create_model('vit_tiny_patch16_224', img_size=1024, num_classes=0).eval()
    x = torch.rand(1, 3, 1024, 1024)
    makers = dict(plain=lambda m: m, ClassAttention=ClassAttention, Rollout=Rollout,
                  discard=lambda m: Rollout(m, discard=.9))
    makers |= {'all rows': lambda m: lambda x: read_attention(m, x, AllRows())}
    with torch.no_grad():
        loc = makers[name](net)
        loc(x) # learns the net
        gc.collect()
        ctypes.CDLL('libc.so.6').malloc_trim(0) # what is free goes back to the system
        Path('/proc/self/clear_refs').write_text('5') # the highest so far is forgotten
        before = status('VmRSS')
        loc(x)
    return status('VmHWM') - before


def status(name):
    "Megabytes, as Linux has them."
    lines = Path('/proc/self/status').read_text().splitlines()
    return int(next(l for l in lines if l.startswith(name)).split()[1])/1024


def memory():
    "Peaks above that of a plain pass, each in a process of its own."
    def mb(name): return float(subprocess.run([sys.executable, __file__, '--peak', name], capture_output=True,
                                              text=True, check=True).stdout)
    plain = mb('plain')
    yield dict(what='plain pass', tokens=4097, peak_mb=round(plain))
    for name in ('ClassAttention', 'Rollout', 'discard', 'all rows'):
        label = 'Rollout, discard .9' if name == 'discard' else name
        yield dict(what=label, tokens=4097, peak_mb=round(mb(name) - plain))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--repeat', type=int, default=15)
    p.add_argument('--peak', help=argparse.SUPPRESS)
    p.add_argument('--out', type=Path, metavar='CSV', default=results_folder()/'vit_times.csv')
    a = p.parse_args()
    if a.peak: return print(peak(a.peak))
    rows, source = Rows(a.out), origin('python tools/vit_times.py')
    source['hardware'] += ', 1 thread'
    for part in (times(a.repeat), memory()):
        for row in part:
            rows.add([row | source], what=row['what'], tokens=row['tokens'])
            print(*(f'{k}={v}' for k, v in row.items()), flush=True)


if __name__ == '__main__': main()
