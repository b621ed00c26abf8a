"""Export, write the index, the sidebar and README.md, clean, then say which files that changed: the checkout
must already be in sync.

    python tools/sync.py    exit status 1 and the names where something changed; all is in sync afterwards
"""
import hashlib
import subprocess
import sys
from pathlib import Path

import index
import readme
import sidebar

root = Path(__file__).resolve().parent.parent


def state():
    "Hash of every file that export, clean and README may write."
    files = [*root.glob('nbs/**/*.ipynb'), *root.glob('wsol_nb/**/*.py')]
    files = [f for f in files if '.ipynb_checkpoints' not in f.parts]
    files += [root/f for f in ('README.md', 'pyproject.toml', '_quarto.yml')]
    return {f.relative_to(root).as_posix(): hashlib.sha1(f.read_bytes()).hexdigest() for f in files}


def main():
    before = state()
    subprocess.run([str(Path(sys.executable).parent/'nbdev_export')], cwd=root, check=True)
    index.write()
    sidebar.write()
    subprocess.run([str(Path(sys.executable).parent/'nbdev_clean')], cwd=root, check=True)
    readme.write()
    after = state()
    changed = sorted(f for f in before.keys() | after.keys() if before.get(f) != after.get(f))
    if changed: sys.exit('not in sync (they are now; look and commit):\n  ' + '\n  '.join(changed))
    print('notebooks, modules and README are in sync')


if __name__ == '__main__': main()
