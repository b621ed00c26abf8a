"""README.md from nbs/index.ipynb, as `nbdev_readme` does, but without needing quarto.

Markdown cells are taken as they are, code cells become fenced blocks with their stored text output; cells
marked `#| hide` are left out, and images are named relative to the root.
"""
import json
import re
from pathlib import Path

root = Path(__file__).resolve().parent.parent
INDEX = root/'nbs/index.ipynb'


LINK = re.compile(r'\]\((?!https?:|#|/)([^)]+\.(?:jpg|png|svg|ipynb))\)') # to a file beside the index


def as_text(output):
    "What README shows of an output: a table of markdown as it is, text as a block."
    data = output.get('data', {})
    if 'text/markdown' in data: return ''.join(data['text/markdown'])
    if 'text/html' in data: return ''
    text = ''.join(output.get('text', data.get('text/plain', ''))).strip()
    return text and '    ' + text.replace('\n', '\n    ')


def cell_to_md(cell):
    "One cell as markdown, or ''."
    src = ''.join(cell['source']).strip()
    if cell['cell_type'] == 'markdown': return LINK.sub(r'](nbs/\1)', src)
    if cell['cell_type'] != 'code' or re.search(r'^#\|\s*hide', src, flags=re.M): return ''
    code = '\n'.join(l for l in src.splitlines() if not l.startswith('#|'))
    shown = '' if re.search(r'^#\|\s*echo: false', src, flags=re.M) else f'``` python\n{code}\n```'
    return '\n\n'.join(filter(None, [shown, *map(as_text, cell.get('outputs', []))]))


def fill_tables():
    "Store today's tables of the registry in the index: a new method is no edit there."
    from wsol_nb.registry import as_table
    nb = json.loads(INDEX.read_text(encoding='utf-8'))
    for cell in nb['cells']:
        asked = re.search(r"^Markdown\(as_table\((.*)\)\)$", ''.join(cell['source']), flags=re.M)
        if not asked: continue
        table = as_table(*re.findall(r"'(\w+)'", asked[1]))
        shown = '<IPython.core.display.Markdown object>'
        data = {'text/markdown': table.splitlines(True), 'text/plain': [shown]}
        cell['outputs'] = [dict(data=data, execution_count=None, metadata={}, output_type='execute_result')]
    INDEX.write_text(json.dumps(nb, ensure_ascii=False, indent=1, sort_keys=True) + '\n', encoding='utf-8')


def render():
    cells = json.loads(INDEX.read_text(encoding='utf-8'))['cells']
    head = '<!-- made from nbs/index.ipynb by tools/readme.py: edit the notebook -->'
    text = '\n\n'.join([head, *filter(None, map(cell_to_md, cells))]) + '\n'
    return text.replace('\n```\n\n``` python\n', '\n\n') # code cells in a row are one block


def write():
    fill_tables()
    (root/'README.md').write_text(render(), encoding='utf-8')


if __name__ == '__main__': write()
