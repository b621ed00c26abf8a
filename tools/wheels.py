"""A folder of wheels for `make gpu` on a machine without a network (make wheels).

    python tools/wheels.py [wheels] [--pythons 3.11 3.12 3.13] [--also scipy pandas]

In it is what importing wsol_nb, its tools and the peers of the localizers loads in this environment, at the
releases that are installed here, but for the packages of BESIDE, which a machine with torch has, and what
only those need. A package with compiled parts comes once for each Python. More than 40 MB is an error, unless
`--also` asks for some of BESIDE.
"""
import argparse
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from gpu import canonical

root = Path(__file__).resolve().parent.parent
# there already: the named ones of `make gpu`, and the compiled packages that fastai imports
BESIDE = ['torch', 'torchvision', 'timm', 'numpy', 'opencv-python-headless', 'numba', 'pandas', 'scipy',
          'scikit-learn', 'matplotlib', 'pillow']
LIMIT = 40e6 # bytes
PLATFORMS = [f'manylinux{v}_x86_64' for v in ('_2_28', '_2_27', '_2_24', '_2_17', '2014', '_2_5', '1')]
LOADED = """
import importlib, pkgutil, sys
from importlib.metadata import packages_distributions
import wsol_nb.core
for m in pkgutil.walk_packages(wsol_nb.__path__, 'wsol_nb.'): importlib.import_module(m.name)
later = ('IPython.core.pylabtools', 'matplotlib_inline.backend_inline', 'fastai.callback.fp16',
         'pytorch_grad_cam', 'torchcam.methods')
for name in later: importlib.import_module(name)
owners = packages_distributions()
print(*{d for m in list(sys.modules) for d in owners.get(m.split('.')[0], [])})
"""


def loaded():
    "Distributions that are imported, by name."
    said = subprocess.check_output([sys.executable, '-c', LOADED], cwd=root, text=True)
    return {canonical(name) for name in said.splitlines()[-1].split()}


def with_needs(names, beside=()):
    "Distributions and all that they need here, extras left out; nothing `beside`, nor what only that needs."
    found, left = set(), list(names)
    while left:
        name = canonical(left.pop())
        if name in found or name in beside: continue
        try: asked = distribution(name).requires or []
        except PackageNotFoundError: continue # another Python's, or another system's
        found.add(name)
        left += [re.match(r'[\w.-]+', r)[0] for r in asked if 'extra ==' not in r]
    return found


def wanted():
    "What is imported here and is not beside; what `BESIDE` needs comes only where ours needs it too."
    used = loaded() - {'wsol-nb', 'setuptools', 'pip'}
    return used & with_needs(used - with_needs(BESIDE), BESIDE)


def pinned(name): return f'{name}=={distribution(name).version.split("+")[0]}'


def pip(command, to, names, *how):
    "Run pip, without what the packages need."
    words = [sys.executable, '-m', 'pip', command, '--quiet', '--no-deps', *how]
    folder = '--wheel-dir' if command == 'wheel' else '--dest'
    r = subprocess.run([*words, folder, str(to), *map(pinned, names)], capture_output=True, text=True)
    errors = '\n'.join(l for l in r.stderr.splitlines() if 'is ignored' not in l)
    if r.returncode: sys.exit(f'wheels: pip {command} failed:\n{errors[-2000:]}')


def compiled(to):
    "Names of the wheels in a folder that are not for every Python."
    files = (w.name for w in to.glob('*.whl') if not w.name.endswith('-any.whl'))
    return sorted({canonical(name.split('-')[0]) for name in files})


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('to', nargs='?', type=Path, default=root/'wheels')
    p.add_argument('--pythons', nargs='+', default=['3.11', '3.12', '3.13'])
    p.add_argument('--also', nargs='*', default=[], help='packages of BESIDE that the other Python lacks')
    a = p.parse_args()
    names = sorted(wanted() | set(map(canonical, a.also)))
    a.to.mkdir(parents=True, exist_ok=True)
    for old in a.to.glob('*.whl'): old.unlink()
    pip('wheel', a.to, names) # which also makes one where only the source is published
    tags, own = [word for tag in PLATFORMS for word in ('--platform', tag)], compiled(a.to)
    for python in a.pythons if own else []:
        other = ['--only-binary=:all:', '--python-version', python, '--implementation', 'cp']
        pip('download', a.to, own, *other, *tags)
    size = sum(w.stat().st_size for w in a.to.glob('*.whl'))
    print(f'{a.to}: {len(list(a.to.glob("*.whl")))} wheels of {len(names)} packages, {size/1e6:.1f} MB\n'
          f'  {", ".join(map(pinned, names))}')
    if size > LIMIT and not a.also: sys.exit(f'wheels: that is more than {LIMIT/1e6:.0f} MB')


if __name__ == '__main__': main()
