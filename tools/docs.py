"""The documentation site: with quarto `nbdev_docs`; without it everything that can be checked without it.

The check processes every notebook as nbdev does for the site, and fails where a notebook is missing from the
sidebar, the sidebar names one that does not exist, or a link between notebooks, or to a file, leads nowhere.
"""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import yaml

import house

root = Path(__file__).resolve().parent.parent


def sidebar(contents):
    "The notebooks that the sidebar names."
    for c in contents:
        if isinstance(c, str): yield c
        elif isinstance(c, dict): yield from sidebar(c.get('contents', []))


def notebooks():
    "The notebooks of the site, relative to nbs/."
    return {p.relative_to(root/'nbs').as_posix() for p in house.notebooks()}


def check_sidebar():
    "What is wrong with the sidebar."
    said = yaml.safe_load((root/'_quarto.yml').read_text(encoding='utf-8'))
    named = list(sidebar(said['website']['sidebar']['contents']))
    there = notebooks()
    yield from (f'{n} is not in the sidebar of _quarto.yml' for n in sorted(there - set(named)))
    yield from (f'the sidebar names {n}, which does not exist' for n in sorted(set(named) - there))
    yield from (f'the sidebar names {n} twice' for n in sorted({n for n in named if named.count(n) > 1}))


def dead(folder, link): return not re.match(r'[a-z]+:', link) and not (folder/link).exists()


def check_links():
    "Links in markdown cells that lead nowhere."
    for nb in sorted((root/'nbs').rglob('[!._]*.ipynb')):
        for i, c in enumerate(json.loads(nb.read_text(encoding='utf-8'))['cells']):
            if c['cell_type'] != 'markdown': continue
            for link in re.findall(r'\]\(([^)#\s]+)[^)]*\)', ''.join(c['source'])):
                if dead(nb.parent, link): yield f'{nb.name} cell {i}: {link} leads nowhere'
    for link in re.findall(r'\]\(([^)#\s]+)\)', (root/'README.md').read_text(encoding='utf-8')):
        if dead(root, link): yield f'README.md: {link} leads nowhere'


def process():
    "What nbdev does to the notebooks before quarto, into _proc. (Its own command would install quarto.)"
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs
    os.chdir(root)
    refresh_quarto_yml()
    proc_nbs(force=True)


def processed():
    "Process all notebooks in a process of its own; the names of those that came through."
    run = subprocess.run([sys.executable, __file__, '--process'], cwd=root, capture_output=True, text=True)
    said = run.stdout + run.stderr
    mixed = re.search(r'Found cells? containing imports and other code[^\n]*\n[^\n]*', said)
    failed = re.search(r'Error in notebook|Traceback', said)
    if run.returncode or mixed or failed: sys.exit(said[-3000:])
    return {p.relative_to(root/'_proc').as_posix() for p in (root/'_proc').rglob('*.ipynb')}


LINK = re.compile(r'\[(`[^`]+`)\]\((https?://[^)]*)\)') # what nbdev makes of a name in backticks
NOTHING = re.compile(r'def \w+\(\s*\*args, \*\*kwargs\s*\):') # a signature that says nothing
FIT = 98 # columns of a signature
WORDS = {'size'} # names that are words too: linked on the page that defines them, and nowhere else


def fields(cls, file):
    "A NamedTuple's fields as a signature, or the line that a class begins with."
    text = (root/file).read_text(encoding='utf-8')
    node = next(n for n in ast.parse(text).body if isinstance(n, ast.ClassDef) and n.name == cls)
    if not any(isinstance(b, ast.Name) and b.id == 'NamedTuple' for b in node.bases):
        return f'class {cls}({", ".join(map(ast.unparse, node.bases))})'
    lines = [f'class {cls}(NamedTuple):']
    for n in node.body:
        if not isinstance(n, ast.AnnAssign): continue
        comment = text.splitlines()[n.lineno - 1].partition('#')[2].strip()
        default = f'={ast.unparse(n.value)}' if n.value else ''
        line = f'    {n.target.id}:{ast.unparse(n.annotation)}{default}'
        lines.append(f'{line} # {comment}' if comment else line)
    return '\n'.join(lines)


def fitted(line):
    "A line of a signature in lines that fit: its comment goes above it, its parameters into several lines."
    if len(line) <= FIT: return [line]
    code, _, comment = line.partition(' # ')
    above = [f'    # {part}' for part in textwrap.wrap(comment, FIT - 6)]
    return above + textwrap.wrap(code.strip(), FIT, initial_indent='    ', subsequent_indent='    ',
                                 break_long_words=False, break_on_hyphens=False)


def mended(text, page):
    "The markdown of a cell: no links inside of code, no links of words, fields in place of *args."
    def unlinked(m):
        word, (where, _, anchor) = m[1].strip('`'), m[2].partition('#')
        return m[0] if word not in WORDS or where.endswith(page) else m[1]
    text = LINK.sub(unlinked, text)
    found = re.search(r'```python\n(def (\w+)\(.*?)\n```', text, flags=re.S)
    source = re.search(r'blob/main/(wsol_nb/[\w/]+\.py)', text)
    if not found or not source: return text
    signature = LINK.sub(lambda m: m[1].strip('`'), found[1])
    if NOTHING.fullmatch(signature): signature = fields(found[2], source[1])
    signature = '\n'.join(l for line in signature.splitlines() for l in fitted(line))
    return text[:found.start(1)] + signature + text[found.end(1):]


def constants(module):
    "The lines of a module that give its public constants; nbdev has no entry for them."
    text = house.source(module).read_text(encoding='utf-8')
    tree, lines = ast.parse(text), text.splitlines()
    assigned = [n for n in tree.body if isinstance(n, ast.Assign)]
    public = next((ast.literal_eval(n.value) for n in assigned if ast.unparse(n.targets[0]) == '__all__'), [])
    for n in assigned:
        names = {t.id for t in ast.walk(n.targets[0]) if isinstance(t, ast.Name)}
        if names & set(public): yield from lines[n.lineno - 1:n.end_lineno]


def add_constants(cells, module):
    "A last section with the public constants of the page's module."
    if said := '\n'.join(constants(module)):
        text = f'## Constants\n\n```python\n{said}\n```'
        cells.append(dict(cell_type='markdown', id='constants', metadata={}, source=text.splitlines(True)))


def mend_pages():
    "What nbdev writes into _proc, as a reader wants it."
    modules = {nb.relative_to(root/'nbs'): module for module, nb in house.homes().items()}
    for nb in (root/'_proc').rglob('*.ipynb'):
        page = re.sub(r'^\d+_', '', nb.stem) + '.html'
        cells = json.loads(nb.read_text(encoding='utf-8'))
        for c in cells['cells']:
            if c['cell_type'] == 'markdown': c['source'] = mended(''.join(c['source']), page).splitlines(True)
            for o in c.get('outputs', []):
                if text := ''.join(o.get('data', {}).get('text/markdown', '')):
                    o['data']['text/markdown'] = mended(text, page).splitlines(True)
        module = modules.get(nb.relative_to(root/'_proc'))
        if module: add_constants(cells['cells'], module)
        nb.write_text(json.dumps(cells, ensure_ascii=False, indent=1), encoding='utf-8')


def render(quarto):
    "The site into _docs. README.md is ours (tools/readme.py); `nbdev_docs` would write it too."
    run = subprocess.run([quarto, 'render', '--no-cache'], cwd=root/'_proc', capture_output=True, text=True)
    said = run.stdout + run.stderr
    warned = re.findall(r'^.*\bWARN.*$', said, flags=re.M)
    if run.returncode or warned: sys.exit('\n'.join([said[-3000:], *warned]))
    shutil.rmtree(root/'_docs', ignore_errors=True)
    shutil.move(root/'_proc/_docs', root/'_docs')
    return sorted((root/'_docs').rglob('*.html'))


def check_pages(pages):
    "What went wrong on a page although quarto was content."
    for page in pages:
        text = page.read_text(encoding='utf-8')
        if 'Traceback (most recent call last)' in text: yield f'{page.name}: a traceback'
        if NOTHING.search(re.sub(r'<[^>]+>', '', text)): yield f'{page.name}: *args, **kwargs as a signature'
        for link in re.findall(r'(?:href|src)="([^"#?]+)', text):
            if not re.match(r'[a-z+]+:|//', link) and not (page.parent/link).exists():
                yield f'{page.relative_to(root/"_docs")}: {link} leads nowhere'


def main():
    faults = [*check_sidebar(), *check_links()]
    if faults: sys.exit('\n'.join(faults))
    made, quarto = processed(), shutil.which('quarto')
    mend_pages()
    missing = notebooks() - made
    if missing: sys.exit(f'not processed: {", ".join(sorted(missing))}')
    if not quarto:
        print(f'quarto is not installed, so no HTML was made; {len(made)} notebooks processed into _proc, '
              'every one in the sidebar, no link leads nowhere')
        return
    pages = render(quarto)
    faults = [*check_pages(pages)]
    if faults: sys.exit('\n'.join(faults))
    print(f'{len(pages)} pages in _docs, no warning, no traceback, no link leads nowhere')


if __name__ == '__main__': process() if '--process' in sys.argv else main()
