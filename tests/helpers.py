"What several test files need: commands in processes of their own, refusals, comparisons, a short training."
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

root = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
TINY = ['--arch', 'resnet10t', '--pretrained', 'false', '--size', '64', '--bs', '8']
ENV = os.environ | dict(OMP_NUM_THREADS='1')


# processes

def run(*command, code=0, env=None, **kw):
    "Run a command, which must end with this code; what subprocess.run returns."
    r = subprocess.run([*map(str, command)], env=ENV | (env or {}), capture_output=True, text=True, **kw)
    said = f'exit {r.returncode} of {command[:3]}\n{r.stdout[-2000:]}\n{r.stderr[-3000:]}'
    assert r.returncode == code, said
    return r


def wsol(name, *args, **kw):
    "Run a command of the library; all that it prints."
    r = run(BIN/f'wsol_{name}', *args, **kw)
    return r.stdout + r.stderr


def refused(monkeypatch, name, *args):
    "The line with which a command ends, without the seconds of a process of its own."
    from wsol_nb.cli.command import main
    monkeypatch.setattr(sys, 'argv', [f'/bin/wsol_{name}', *map(str, args)])
    with pytest.raises(SystemExit) as e: main()
    return str(e.value)


def start(*command, env=None):
    "A process that was begun; `communicate` gives all that it printed."
    # a job in the background may have been told to ignore Ctrl-C
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen([*map(str, command)], env=ENV | (env or {}), text=True, preexec_fn=heard,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_until(there, process):
    "Until it is there, or the process has ended."
    while not there() and process.poll() is None: time.sleep(.02)


# refusals and comparisons

def raises(message, f, *args, error=ValueError, **kwargs):
    "The call raises this error, and its message holds these words."
    with pytest.raises(error) as e: f(*args, **kwargs)
    assert message in str(e.value), f'{message!r} is not in: {e.value}'


def same(a, b, tol=0):
    "Two tensors, or numbers, have one shape and lie no further apart than `tol`, in the precision they have."
    a = torch.as_tensor(a).detach()
    b = torch.as_tensor(b, dtype=a.dtype).detach()
    assert a.shape == b.shape, f'shapes differ: {tuple(a.shape)} and {tuple(b.shape)}'
    off = (a - b).abs().max()
    assert off <= tol, f'values differ by up to {float(off):.3g}, more than {float(tol):.3g}'


def same_state(a, b):
    "Whether two modules, or state dicts, hold the same values under the same names."
    a, b = (m.state_dict() if isinstance(m, nn.Module) else m for m in (a, b))
    assert a.keys() == b.keys(), 'modules of another form'
    return all(torch.equal(a[name], b[name]) for name in a)


def ordered(boxes):
    "Boxes as a list whose order says nothing."
    return boxes[np.lexsort(boxes.T)].tolist()


def digest(folder):
    "{file: hash} of all that lies in a folder."
    files = (p for p in folder.rglob('*') if p.is_file() and '__pycache__' not in p.parts)
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


# images and trainings

def images(h=64, w=96, n=3, seed=2, draw=torch.rand):
    "The same images each time, whatever else is drawn."
    return draw(n, 3, h, w, generator=torch.Generator().manual_seed(seed))


def fit_quietly(learn, epochs=1, lr=1e-3):
    "The learner, trained without a word."
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, lr)
    return learn
