"""How the house is laid out: the chapters, their modules with lines and imports, and every arrow between chapters.

    python tools/house.py          exit status 1 where an arrow leads up

A module is the notebook that exports it: the folder is its chapter, the number its place. Imports are read from the source.
"""
import ast
import json
import re
import sys
from collections import Counter
from pathlib import Path

root = Path(__file__).resolve().parent.parent


def homes():
    "Module -> chapter, in reading order."
    for nb in sorted((root/'nbs').glob('[0-9]_*/[0-9]*.ipynb')):
        cells = json.loads(nb.read_text(encoding='utf-8'))['cells'][:3]
        found = (re.match(r'#\|\s*default_exp\s+(\S+)', ''.join(c['source'])) for c in cells)
        for m in filter(None, found): yield m[1], nb.parent.name


def imports(module):
    "The modules of the package that a module imports, also inside functions."
    tree, name = ast.parse(source(module).read_text(encoding='utf-8')), f'wsol_nb.{module}'
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom): continue
        base = name.rsplit('.', node.level)[0] if node.level else ''
        full = '.'.join(filter(None, (base, node.module)))
        if full.startswith('wsol_nb.') and not full.endswith('._index'): yield full.removeprefix('wsol_nb.')


def source(module): return root/f'wsol_nb/{module.replace(".", "/")}.py'


def main():
    chapter, arrows, up = dict(homes()), Counter(), []
    place = {m: i for i, m in enumerate(chapter)}
    for i, (m, c) in enumerate(chapter.items()):
        if i == 0 or c != list(chapter.values())[i - 1]: print(f'\n{c}')
        seen = sorted(set(imports(m)), key=place.get)
        print(f'  {m:24}{len(source(m).read_text().splitlines()):4} lines   {", ".join(seen)}')
        arrows.update((c, chapter[o]) for o in seen)
        up += [f'{m} imports {o}, which comes later' for o in seen if place[o] >= place[m]]
    print('\nimports from chapter to chapter:')
    for (a, b), n in sorted(arrows.items()): print(f'  {a:14} → {b:14}{n:4}')
    print('\n'.join(up) or f'\n{len(chapter)} modules, {sum(arrows.values())} imports, no arrow upwards')
    sys.exit(bool(up))


if __name__ == '__main__': main()
