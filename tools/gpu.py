"""What wsol_nb does on a GPU: right, fast, in how much memory. For a machine with a CUDA device, without a
network, in eight minutes:

    make gpu PY=python3 WHEELS=wheels               what python3 lacks is installed apart, from wheels
    python tools/gpu.py                             the same, where all is installed
    python tools/gpu.py --parts training pairwise   some parts
    python tools/gpu.py --device cpu --quick        the whole path on a CPU, small: the figures mean nothing

Each part is a process of its own with its share of the time: what fails in one stops no other. Tables go to
nbs/results/gpu-<part>.csv, from where the page *On a GPU* reads them; those of a CPU or of --quick go to
gpu-quick/. The exit status is 1 where a part failed, 2 where nothing could begin.
"""
import argparse
import csv
import ctypes
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

START = time.time()
root = Path(__file__).resolve().parent.parent
# name -> (module, function, share of the time, the same of --quick, what it does)
PARTS = dict(
    cells=('gpu_cells', 'cells', 7, 12, "the notebooks' cells for a GPU"),
    conformance=('gpu_same', 'conformance', 16, 22, 'whether all computes what it does on the CPU'),
    training=('gpu_speed', 'training', 18, 12, 'images/s of training, by batch'),
    localizers=('gpu_speed', 'localizers', 16, 12, 'ms an image of each localizer, and of its peers'),
    pairwise=('gpu_speed', 'pairwise', 7, 9, 'losses over all pairs of pixels, by size'),
    memory=('gpu_speed', 'memory', 5, 8, 'what a training step holds'),
    methods=('gpu_methods', 'methods', 32, 33, 'steps of every method in half precision and compiled'))
SECONDS = {False: 450, True: 215} # for all parts, by --quick
TRIAL = root/'gpu-quick' # tables of what counts for nothing
GRACE = 20 # seconds after its time at which a part is stopped


# before anything heavy is imported

def cuda_devices():
    "How many CUDA devices the driver shows; nothing is imported for that."
    try: lib = ctypes.CDLL('libcuda.so.1')
    except OSError: return 0
    n = ctypes.c_int(0)
    return n.value if lib.cuInit(0) == 0 and lib.cuDeviceGetCount(ctypes.byref(n)) == 0 else 0


def refuse(why):
    print(f'make gpu: {why}', file=sys.stderr)
    raise SystemExit(2)


# wheels

def canonical(name): return name.lower().replace('_', '-').replace('.', '-')


def lacking(wheels):
    "Of the packages in a folder of wheels, those that this Python does not have."
    from importlib.metadata import distributions
    have = {canonical(d.metadata['Name']) for d in distributions() if d.metadata['Name']}
    names = {canonical(w.name.split('-')[0]) for w in wheels.glob('*.whl')}
    if not names: refuse(f'WHEELS={wheels}: there is no wheel in it; `make wheels` makes the folder')
    return sorted(names - have)


def install(wheels, place):
    "Install what is lacking into a folder; what this Python has stays as it is and comes first nowhere."
    names = lacking(wheels)
    if not names: return
    print(f'installing {len(names)} packages that this Python lacks: {", ".join(names)}', flush=True)
    pip = [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-index', '--no-deps', '--no-compile',
           '--disable-pip-version-check', '--find-links', str(wheels), '--target', str(place)]
    r = subprocess.run(pip + names, capture_output=True, text=True)
    if r.returncode: refuse(f'pip could not install from {wheels}:\n{r.stderr.strip()[-2000:]}')


CHECK = """
import importlib.util, sys
missing = [name for name in sys.argv[2:] if importlib.util.find_spec(name) is None]
if missing: sys.exit(f'{sys.executable} lacks {", ".join(missing)}; what is compiled must be there, '
                     'WHEELS=DIR brings the rest (make wheels)')
if sys.argv[1] == 'cpu': sys.exit()
import torch
if not torch.cuda.is_available():
    sys.exit(f'there is a CUDA device, but torch {torch.__version__} of {sys.executable} does not see it')
print(f'torch {torch.__version__}, {torch.cuda.get_device_name()}', flush=True)
"""
NEEDED = ['torch', 'torchvision', 'timm', 'fastai', 'fastcore', 'cv2', 'numba', 'numpy', 'pandas', 'scipy',
          'sklearn', 'matplotlib', 'PIL', 'safetensors', 'filelock']


def check(device, env):
    "End with a sentence where something is missing that all parts need."
    r = subprocess.run([sys.executable, '-c', CHECK, device, *NEEDED], env=env, cwd=root,
                       capture_output=True, text=True)
    if r.returncode: refuse(r.stderr.strip()[-1500:])
    print(r.stdout, end='', flush=True)


# parts

def run_part(name, a):
    "In its own process: the part; what became of it goes to a file."
    from gpu_kit import Part, measured_on
    module, function, *_ = PARTS[name]
    part = Part(name, a.device, a.quick, a.out, a.until,
                measured_on(a.device, a.quick, a.commit, a.command))
    try:
        with part.guard(name): getattr(__import__(module), function)(part)
    finally:
        cut = [f'{len(what)}, {why}: {", ".join(what)}' for why, what in part.cut.items()]
        note = dict(rows=len(part.rows), failed=part.failed, cut=cut)
        Path(a.note).write_text(json.dumps(note))
    sys.exit(bool(part.failed))


def end_all(child):
    "End a process that is not done, and those that it began, such as compilers."
    if child.poll() is None: os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def start_part(name, a, seconds, env, note):
    "Run a part in a process of its own; what became of it."
    start = time.time()
    words = [sys.executable, str(Path(__file__).resolve()), '--part', name, '--device', a.device,
             '--out', str(a.out), '--until', str(start + seconds), '--note', str(note),
             '--commit', a.commit or '', '--command', a.command, *['--quick']*a.quick]
    print(f'{name}: {PARTS[name][-1]} ({seconds:.0f} s)', flush=True)
    child, late = subprocess.Popen(words, env=env, cwd=root, start_new_session=True), None
    try: child.wait(seconds + GRACE)
    except subprocess.TimeoutExpired: late = f'stopped after {time.time() - start:.0f} s'
    finally: end_all(child)
    try: found = json.loads(note.read_text())
    except (OSError, ValueError): found = dict(rows=None, failed=[], cut=[])
    if late: found['failed'].append(late)
    elif child.returncode and not found['failed']: found['failed'].append(f'exit {child.returncode}')
    took = dict(seconds=round(time.time() - start, 1), allowed=round(seconds))
    return dict(part=name) | took | found | dict(quick=a.quick, device=a.device)


def share(names, left, quick):
    "Seconds of the first of the parts: its share of what is left."
    weights = [PARTS[n][3 if quick else 2] for n in names]
    return left*weights[0]/sum(weights)


def table(done):
    "What became of each part, as text."
    lines = [f'{"part":14}{"seconds":>9}{"allowed":>9}{"rows":>6}  outcome']
    for d in done:
        said = 'failed' if d['failed'] else 'done'
        if d['cut']: said += ', not all of it'
        lines.append(f'{d["part"]:14}{d["seconds"]:9.1f}{d["allowed"]:9}{str(d["rows"] or 0):>6}  {said}')
    for d in done:
        lines += [f'{d["part"]} failed: {f}' for f in d['failed']]
        lines += [f'{d["part"]} left out {c}' for c in d['cut']]
    return '\n'.join(lines)


def write_summary(done, out):
    "The same as a table of its own."
    rows = [{k: '; '.join(v) if isinstance(v, list) else v for k, v in d.items()} for d in done]
    with open(out/'gpu-parts.csv', 'w', newline='') as f:
        summary = csv.DictWriter(f, rows[0])
        summary.writeheader()
        summary.writerows(rows)


def options(args=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--device', default='cuda', choices=['cuda', 'cpu'])
    p.add_argument('--quick', action='store_true', help='small nets and sizes, to see that all works')
    p.add_argument('--wheels', default=None, metavar='DIR', help='from which missing packages are installed')
    p.add_argument('--out', type=Path, metavar='DIR', help='folder of the tables')
    p.add_argument('--parts', nargs='+', choices=PARTS, default=list(PARTS), metavar='PART',
                   help=', '.join(PARTS))
    p.add_argument('--seconds', type=float, help='for all parts together')
    p.add_argument('--commit', help='for the rows, where the tree came without .git')
    for name in ('part', 'note', 'command'): p.add_argument(f'--{name}', help=argparse.SUPPRESS)
    p.add_argument('--until', type=float, help=argparse.SUPPRESS)
    a = p.parse_args(args)
    counts = a.device == 'cuda' and not a.quick
    a.out = (a.out or (root/'nbs/results' if counts else TRIAL)).resolve()
    if not counts and a.out == root/'nbs/results':
        refuse(f'--out {a.out}: figures of a CPU or of --quick do not belong there')
    a.seconds = a.seconds or SECONDS[a.quick]
    return a


def commit():
    "The commit of this checkout, with a + where files differ from it; None without .git."
    def git(*words):
        if not shutil.which('git'): return ''
        return subprocess.run(['git', '-C', str(root), *words], capture_output=True, text=True).stdout.strip()
    name = git('rev-parse', '--short', 'HEAD')
    return name + '+'*bool(git('status', '--porcelain')) if name else None


def main():
    a = options()
    if a.part: return run_part(a.part, a)
    if a.device == 'cuda' and not cuda_devices():
        refuse('this machine shows no CUDA device, and nothing was measured; `--device cpu --quick` '
               '(make gpu GPU="--device cpu --quick") tries the whole path on the CPU')
    a.command = shlex.join(['python', 'tools/gpu.py', *sys.argv[1:]])
    a.commit = a.commit or commit()
    with tempfile.TemporaryDirectory() as place:
        paths = [str(root), place, os.environ.get('PYTHONPATH', '')]
        env = os.environ | dict(PYTHONPATH=os.pathsep.join(filter(None, paths)), MPLBACKEND='agg')
        env |= dict(KINETO_LOG_LEVEL='99') # the profiler, which counts a CPU's memory, says nothing
        if a.wheels: install(Path(a.wheels), place)
        check(a.device, env)
        a.out.mkdir(parents=True, exist_ok=True)
        for old in a.out.glob('gpu-*.csv') if a.out == TRIAL else []: old.unlink()
        done, end = [], START + a.seconds
        for i, name in enumerate(a.parts):
            seconds = share(a.parts[i:], max(1., end - time.time()), a.quick)
            done.append(start_part(name, a, seconds, env, Path(place)/f'{name}.json'))
    write_summary(done, a.out)
    print(f'\n{table(done)}\n{time.time() - START:.0f} s in all; the tables are in {a.out}')
    sys.exit(any(d['failed'] for d in done))


if __name__ == '__main__': main()
