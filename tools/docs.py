"""The documentation site: with quarto `nbdev_docs`; without it everything that can be checked without it.

The check processes every notebook as nbdev does for the site, and fails where a notebook is missing from the sidebar, the
sidebar names one that does not exist, or a link between notebooks, or to a file, leads nowhere.
"""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

root = Path(__file__).resolve().parent.parent


def sidebar(contents):
    "The notebooks that the sidebar names."
    for c in contents:
        if isinstance(c, str): yield c
        elif isinstance(c, dict): yield from sidebar(c.get('contents', []))


def check_sidebar():
    "What is wrong with the sidebar."
    named = list(sidebar(yaml.safe_load((root/'_quarto.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']))
    there = {p.relative_to(root/'nbs').as_posix() for p in (root/'nbs').rglob('*.ipynb')
             if not any(part.startswith(('.', '_')) for part in p.relative_to(root/'nbs').parts)}
    yield from (f'{n} is not in the sidebar of _quarto.yml' for n in sorted(there - set(named)))
    yield from (f'the sidebar names {n}, which does not exist' for n in sorted(set(named) - there))
    yield from (f'the sidebar names {n} twice' for n in sorted({n for n in named if named.count(n) > 1}))


def check_links():
    "Links in markdown cells that lead nowhere."
    for nb in sorted((root/'nbs').rglob('[!._]*.ipynb')):
        for i, c in enumerate(json.loads(nb.read_text(encoding='utf-8'))['cells']):
            if c['cell_type'] != 'markdown': continue
            for link in re.findall(r'\]\(([^)#\s]+)[^)]*\)', ''.join(c['source'])):
                if not re.match(r'[a-z]+:', link) and not (nb.parent/link).exists(): yield f'{nb.name} cell {i}: {link} leads nowhere'


def main():
    faults = [*check_sidebar(), *check_links()]
    if faults: sys.exit('\n'.join(faults))
    if shutil.which('quarto'):
        run = subprocess.run([str(Path(sys.executable).parent/'nbdev_docs')], cwd=root, capture_output=True, text=True)
        print(run.stdout + run.stderr)
        if run.returncode or re.search(r'WARN.*(resolve|link)', run.stdout + run.stderr, flags=re.I): sys.exit('the site has unresolved links, or was not built')
        return
    from nbdev.quarto import nbdev_proc_nbs
    os.chdir(root)
    nbdev_proc_nbs()
    made = sorted(p.name for p in (root/'_proc').rglob('*.ipynb'))
    print(f'quarto is not installed, so no HTML was made; {len(made)} notebooks processed into _proc, every one in the sidebar, no link leads nowhere')


if __name__ == '__main__': main()
