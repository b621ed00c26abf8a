"""wsol_nb on the oldest and on the newest releases that it promises to work with, each in an environment of
its own.

    python tools/releases.py lock              both constraint files, from settings.ini
    python tools/releases.py oldest            build the wheel, install it beside them, use everything
    python tools/releases.py newest            the same; other installed Pythons in a short form

`lock` asks a resolver: the lowest versions that settings.ini allows by name, and today's newest of
everything. The trials run on the frozen files, so that tomorrow's release of a dependency stops nobody;
`lock` renews them.
"""
import argparse
import configparser
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

root = Path(__file__).resolve().parent.parent
# The first that is installed is tried in full, the others in short.
PYTHONS = dict(oldest=['3.11', '3.12'], newest=['3.13', '3.12', '3.11'])
SHOWN = ['torch', 'torchvision', 'fastai', 'fastcore', 'timm', 'numpy', 'pandas', 'scipy', 'numba',
         'matplotlib', 'opencv-python-headless', 'pillow']
QUICK = 'resnet10t and not memory' # the conformance suite on one net
ENV = os.environ | dict(MPLBACKEND='agg', OMP_NUM_THREADS='1')


def uv(*args, **kw):
    "Run uv, which stands among the development tools."
    return subprocess.run([sys.executable, '-m', 'uv', *map(str, args)], check=True, cwd=root, **kw)


def lock():
    "Write both constraint files."
    config = configparser.ConfigParser(delimiters=['='])
    config.read(root/'settings.ini', encoding='utf-8')
    lists = (config['DEFAULT'][k].split() for k in ('requirements', 'shards_requirements'))
    asked = '\n'.join(name for names in lists for name in names)
    for name, resolution in dict(oldest='lowest-direct', newest='highest').items():
        file = root/f'constraints-{name}.txt'
        uv('pip', 'compile', '--quiet', '--universal', '--python-version', config['DEFAULT']['min_python'],
           '--resolution', resolution, '--upgrade', '--no-header', '--no-annotate', '--no-emit-index-url',
           '--output-file', file, '-', input=asked, text=True, stdout=subprocess.DEVNULL)
        today = time.strftime('%Y-%m-%d')
        said = f'# Made by `make lock` on {today}: the {name} releases that wsol_nb is tried with.\n'
        file.write_text(said + file.read_text(encoding='utf-8'), encoding='utf-8')
        print(f'{file.name}: {len(file.read_text().splitlines()) - 1} packages')


def interpreter(version):
    "A Python of this version that runs, or None."
    pyenv = Path(os.environ.get('PYENV_ROOT', Path.home()/'.pyenv'))/'versions'
    named = [sys.executable, shutil.which(f'python{version}'), *sorted(pyenv.glob(f'{version}.*/bin/python'))]
    probe = 'import sys; print("{}.{}".format(*sys.version_info))'
    for path in filter(None, named):
        said = subprocess.run([path, '-c', probe], capture_output=True, text=True)
        if said.returncode == 0 and said.stdout.strip() == version: return path


def build_wheel(place):
    "The wheel of what git tracks, made outside of the checkout; nothing stale can get into it."
    listed = subprocess.check_output(['git', 'ls-files', '-z'], cwd=root, text=True)
    for name in filter(None, listed.split('\0')):
        if not (root/name).is_file(): continue
        (place/'source'/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root/name, place/'source'/name)
    uv('build', '--quiet', '--wheel', '--out-dir', place/'dist', place/'source')
    return next((place/'dist').glob('*.whl'))


def make_environment(name, python, place):
    "An environment with the built wheel and the frozen releases; its Python."
    wheel, own = build_wheel(place), place/'env/bin/python'
    uv('venv', '--quiet', '--python', python, place/'env')
    uv('pip', 'install', '--quiet', '--python', own, '-c', f'constraints-{name}.txt',
       f'wsol_nb[shards] @ {wheel.as_uri()}', 'pytest')
    listed = uv('pip', 'list', '--python', own, '--format', 'freeze', capture_output=True, text=True).stdout
    versions = dict(line.split('==') for line in listed.splitlines() if '==' in line)
    print('  ' + ', '.join(f'{k} {versions[k]}' for k in SHOWN), flush=True)
    return own


def import_everything(own, place):
    "Each module in one process that must not say a word."
    code = ('import importlib, pkgutil, wsol_nb\n'
            'names = [m.name for m in pkgutil.walk_packages(wsol_nb.__path__, "wsol_nb.")]\n'
            'for n in names: importlib.import_module(n)\n'
            'print(len(names), wsol_nb.__file__)')
    strict = ['-W', 'error::DeprecationWarning:wsol_nb', '-W', 'error::FutureWarning']
    r = subprocess.run([own, *strict, '-c', code], capture_output=True, text=True, cwd=place)
    if r.returncode or r.stderr: sys.exit(f'imports are not silent:\n{r.stderr[-3000:]}')
    number, file = r.stdout.split()
    assert str(place) in file, f'{file} is not the wheel'
    print(f'  {number} modules imported without a warning', flush=True)


def run(what, command, place):
    "Run a command in a folder of its own; it must succeed and say nothing on stderr. What it printed."
    start = time.time()
    r = subprocess.run([*map(str, command)], cwd=place, env=ENV, capture_output=True, text=True)
    if r.returncode or r.stderr:
        sys.exit(f'{what}: exit {r.returncode}\n{r.stdout[-3000:]}\n{r.stderr[-4000:]}')
    print(f'  {what}: {time.time() - start:.0f} s', flush=True)
    return r.stdout


def interrupt(command, place):
    "Start a training and stop it after its first checkpoint, as Ctrl-C does."
    # a job in the background may have been told to ignore it
    heard = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    p = subprocess.Popen([*map(str, command)], cwd=place, env=ENV, text=True, preexec_fn=heard,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not (place/'cam/checkpoint.pt').exists() and p.poll() is None: time.sleep(.05)
    p.send_signal(signal.SIGINT)
    said = p.communicate()[0]
    if '--resume continues' not in said:
        sys.exit(f'the training was not stopped (exit {p.returncode}):\n{said}')


def walk(own, place):
    "Every command on a small synthetic world, as a user runs them."
    script = lambda name: own.parent/f'wsol_{name}'
    counts = ['--n-train', 48, '--n-val', 16, '--n-test', 16]
    run('wsol_data synth', [script('data'), 'synth', 'world', *counts], place)
    net = ['--arch', 'resnet10t', '--pretrained', 'false', '--size', 64, '--bs', 8]
    interrupt([script('train'), '--data', 'world', '--out', 'cam', '--epochs', 20, *net], place)
    said = run('wsol_train, stopped and resumed', [script('train'), '--out', 'cam', '--resume'], place)
    assert 'of 20 epochs are done' in said and 'MaxBoxAcc' in said
    second = ['--method', 'fcam', '--stage1', 'cam', '--out', 'fcam', '--epochs', 1]
    run('wsol_train of F-CAM', [script('train'), *second], place)
    assert 'MaxBoxAccV2' in run('wsol_eval', [script('eval'), 'fcam', '--bootstrap', 20], place)
    photo = next((place/'world/SYNTH/test').rglob('*.jpg'))
    said = run('wsol_localize', [script('localize'), 'fcam', photo, '--out', 'pictures'], place)
    assert 'probability' in said and next((place/'pictures').glob('*.jpg'))
    assert 'no problem found' in run('wsol_data check', [script('data'), 'check', 'world'], place)


def conformance(own, place):
    "The contract of all localizers, on one net."
    for folder in ('tests', 'tools'):
        shutil.copytree(root/folder, place/folder, ignore=shutil.ignore_patterns('__pycache__'))
    command = [own, '-m', 'pytest', '-q', '-W', 'error::DeprecationWarning:wsol_nb']
    said = run('conformance', [*command, 'tests/test_conformance.py', '-k', QUICK], place)
    print(f'    {said.strip().splitlines()[-1]}')


def loaders(own, place):
    "That pixels are the same to the bit, and that training from shards goes."
    said = run('loaders', [own, '-m', 'pytest', '-q', 'tests/test_loaders.py'], place)
    print(f'    {said.strip().splitlines()[-1]}')


def demo(own, place):
    "To its end, with the lines of its table that matter."
    said = run('wsol_demo', [own.parent/'wsol_demo'], place)
    shown = [l for l in said.splitlines() if l.startswith(('    ', 'accuracy', 'MaxBoxAcc'))]
    print('\n'.join(f'    {l.rstrip()}' for l in shown[:6]), flush=True)


def trial(name):
    "All that a set of releases must do, on each Python that is installed."
    done = 0
    for version in PYTHONS[name]:
        python, start = interpreter(version), time.time()
        if python is None:
            print(f'{name} releases on Python {version}: skipped, no such Python is installed')
            continue
        print(f'{name} releases on Python {version}{" in short" if done else ""}', flush=True)
        with tempfile.TemporaryDirectory() as place:
            own = make_environment(name, python, Path(place))
            import_everything(own, Path(place))
            parts = [walk] if done else [walk, conformance, loaders, demo]
            for part in parts: part(own, Path(place))
        print(f'  {time.time() - start:.0f} s', flush=True)
        done += 1
    if not done: sys.exit(f'none of Python {", ".join(PYTHONS[name])} is installed')


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('what', choices=['lock', 'oldest', 'newest'])
    what = p.parse_args().what
    lock() if what == 'lock' else trial(what)


if __name__ == '__main__': main()
