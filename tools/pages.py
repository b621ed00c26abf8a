"""How the notebooks read: cell lengths, line widths, lessons, and every place that breaks the house style.

    python tools/pages.py                  the figures of all notebooks, and what breaks a rule
    python tools/pages.py nbs/3_cam        the same of a chapter, or of single notebooks

Exported code is at most 100 columns wide, a lesson cell 90; an exported cell has at most 25 lines, with the
lines of a documented signature left out, and half of them have at most 12; after at most 60 exported lines
comes a cell that shows something; statements are joined by `;` only where something is drawn. The exit status
is 1 where a rule is broken.
"""
import ast
import io
import json
import re
import statistics
import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path

import house

root = Path(__file__).resolve().parent.parent
EXPORTED, LESSON = 100, 90 # columns
CELL, MEDIAN, UNTAUGHT = 25, 12, 60 # lines of exported code
ASSERTS = r'\bassert\b|\btest_\w+\(|\bassert_\w+\(|expect_fail'
SHOWS = re.compile(ASSERTS + r'|show|plot|print|^[\w.]+[\w.\[\]\'"(),= ]*$', re.M)


@dataclass
class Cell:
    "A code cell: where it stands, its source, and whether it is exported."
    place: int
    source: str

    @property
    def exported(self): return bool(re.match(r'#\|\s*export', self.source))

    @property
    def lines(self):
        "Lines that hold code."
        return [l for l in self.source.splitlines() if l.strip() and not l.lstrip().startswith('#')]

    @property
    def length(self):
        "Lines of code, where a documented signature counts as one."
        return len(self.lines) - sum(map(signature_lines, self.defined))

    @property
    def defined(self):
        return [n for n in ast.walk(tree(self.source)) if isinstance(n, ast.FunctionDef)]

    @property
    def mixed(self):
        "Whether it has imports and other code: nbdev runs import cells for the site, and only those."
        kinds = {type(n) for n in ast.walk(tree(self.source))}
        return bool(kinds & {ast.Import, ast.ImportFrom}) and bool(kinds & {ast.Expr, ast.Assign})

    @property
    def semicolons(self):
        "Statements joined by `;`; one at the very end of a cell hides its value."
        made = tokenize.generate_tokens(io.StringIO(self.source.rstrip().rstrip(';')).readline)
        try: return sum(t.type == tokenize.OP and t.string == ';' for t in made)
        except (tokenize.TokenError, SyntaxError): return 0 # a cell for the shell


def tree(source):
    try: return ast.parse(source)
    except SyntaxError: return ast.Module([], []) # a cell for the shell


def signature_lines(f):
    "Lines of a signature after its first one."
    return max(0, f.body[0].lineno - f.lineno - 1)


def code_cells(nb):
    cells = json.loads(nb.read_text(encoding='utf-8'))['cells']
    return [Cell(i, ''.join(c['source'])) for i, c in enumerate(cells) if c['cell_type'] == 'code']


def faults(nb):
    "What breaks a rule in a notebook, a line each."
    untaught = 0
    for c in code_cells(nb):
        limit = EXPORTED if c.exported else LESSON
        wide = [len(l) for l in c.source.splitlines() if len(l) > limit and not l.startswith('#|')]
        if wide: yield f'cell {c.place}: {len(wide)} lines over {limit} columns, the widest {max(wide)}'
        if c.semicolons and not re.search(r'plt\.|\bax', c.source):
            yield f'cell {c.place}: statements joined by ;'
        if not c.exported and c.mixed:
            yield f'cell {c.place}: imports and other code, which the site needs apart'
        if c.exported:
            untaught += c.length
            if c.length > CELL: yield f'cell {c.place}: {c.length} exported lines, at most {CELL}'
            if untaught > UNTAUGHT >= untaught - c.length:
                yield f'cell {c.place}: {untaught} exported lines since a cell that shows something'
        elif SHOWS.search(c.source): untaught = 0


def notebooks(places):
    "The notebooks that are named, and those of the folders that are."
    return [p for place in places for p in ([place] if place.suffix else house.notebooks(place))]


def figures(nbs):
    "The table of issue 15: medians, widths, lessons."
    cells = [c for nb in nbs for c in code_cells(nb)]
    ours, lessons = [c for c in cells if c.exported], [c for c in cells if not c.exported]
    lengths = sorted(len(c.lines) for c in ours) or [0]
    share = lambda cs, n: 100*statistics.mean([len(l) > n for c in cs for l in c.lines] or [0])
    top = [n for c in ours for n in tree(c.source).body]
    definitions = sum(isinstance(n, (ast.ClassDef, ast.FunctionDef)) for n in top)
    asserting = sum(bool(re.search(ASSERTS, c.source)) for c in lessons)
    median, ninth = statistics.median(lengths), lengths[int(.9*(len(lengths) - 1))]
    yield f'exported cell, lines: median {median:g}, 90th percentile {ninth}'
    bare = statistics.median([c.length for c in ours] or [0])
    yield f'the same without documented signatures: median {bare:g}'
    yield f'code lines over 100 columns: {share(cells, 100):.1f} %'
    yield f'lesson-cell lines over 110: {share(lessons, 110):.1f} %'
    run = statistics.median(map(longest_run, nbs))
    yield f'longest exported run without a lesson, median of the notebooks: {run:g} lines'
    yield f'asserting cells a definition: {asserting/max(1, definitions):.2f}'


def longest_run(nb):
    "Exported lines in a row without a lesson, the most."
    run, most = 0, 0
    for c in code_cells(nb):
        if c.exported: run += c.length
        elif SHOWS.search(c.source): run = 0
        most = max(most, run)
    return most


def main():
    nbs = notebooks([Path(p).resolve() for p in sys.argv[1:]] or [root/'nbs'])
    print('\n'.join(figures(nbs)))
    broken = [f'{nb.relative_to(root)}: {f}' for nb in nbs for f in faults(nb)]
    print('\n'.join(['', *broken, f'{len(broken)} places break a rule']))
    sys.exit(bool(broken))


if __name__ == '__main__': main()
