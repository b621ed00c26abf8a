"""How the house is laid out: the chapters, their modules with lines and imports, and every arrow between
chapters.

    python tools/house.py          exit status 1 where an arrow leads up

A module is the notebook that exports it: the folder is its chapter, the number its place. Imports are read
from the source.
"""
import ast
import json
import re
import sys
from collections import Counter
from pathlib import Path

root = Path(__file__).resolve().parent.parent


def exported(nb):
    "The module that a notebook exports, with the package's name, or None."
    cells = json.loads(nb.read_text(encoding='utf-8'))['cells'][:3]
    found = (re.match(r'#\|\s*default_exp\s+(\S+)', ''.join(c['source'])) for c in cells)
    return next((f'wsol_nb.{m[1]}' for m in found if m), None)


def notebooks(folder=root/'nbs'):
    "The notebooks of the site below a folder; what begins with . or _ is none."
    seen = lambda p: not any(part.startswith(('.', '_')) for part in p.relative_to(root/'nbs').parts)
    return sorted(filter(seen, folder.rglob('*.ipynb')))


def homes():
    "Module -> its notebook, in reading order."
    made = {exported(nb): nb for nb in sorted((root/'nbs').glob('[0-9]_*/[0-9]*.ipynb'))}
    return {m: nb for m, nb in made.items() if m}


def imported(module):
    "(module, name) of everything that a module imports, also inside functions."
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import): yield from ((a.name, '') for a in node.names)
        if not isinstance(node, ast.ImportFrom): continue
        base = module.rsplit('.', node.level)[0] if node.level else '' # nbdev writes relative imports
        yield from (('.'.join(filter(None, (base, node.module))), a.name) for a in node.names)


def tree(module): return ast.parse(source(module).read_text(encoding='utf-8'))


def source(module): return root/(module.replace('.', '/') + '.py')


def length(module):
    "Lines of a module that somebody wrote; nbdev adds a mark and a blank line for each cell."
    lines = source(module).read_text(encoding='utf-8').splitlines()
    return sum(bool(l.strip()) and not l.startswith('# %%') for l in lines)


def main():
    chapter = {m: nb.parent.name for m, nb in homes().items()}
    place, arrows, up, last = {m: i for i, m in enumerate(chapter)}, Counter(), [], None
    for m, c in chapter.items():
        if c != last: print(f'\n{c}')
        last = c
        seen = sorted({o for o, _ in imported(m) if o in place}, key=place.get)
        short = lambda name: name.removeprefix('wsol_nb.')
        print(f'  {short(m):24}{length(m):4} lines   {", ".join(map(short, seen))}')
        arrows.update((c, chapter[o]) for o in seen)
        up += [f'{m} imports {o}, which comes later' for o in seen if place[o] >= place[m]]
    print('\nimports from chapter to chapter:')
    for (a, b), n in sorted(arrows.items()): print(f'  {a:14} → {b:14}{n:4}')
    print('\n'.join(up) or f'\n{len(chapter)} modules, {sum(arrows.values())} imports, no arrow upwards')
    sys.exit(bool(up))


if __name__ == '__main__': main()
