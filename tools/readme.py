"""README.md from nbs/index.ipynb, as `nbdev_readme` does, but without needing quarto.

Markdown cells are taken as they are, code cells become fenced blocks with their stored text output; cells marked `#| hide`
are left out, and images are named relative to the root.
"""
import json
import re
from pathlib import Path

root = Path(__file__).resolve().parent.parent


def cell_to_md(cell):
    "One cell as markdown, or ''."
    src = ''.join(cell['source']).strip()
    if cell['cell_type'] == 'markdown': return re.sub(r'\]\((?!https?:|#|/)([^)]+\.(?:jpg|png|svg|ipynb))\)', r'](nbs/\1)', src)
    if cell['cell_type'] != 'code' or re.search(r'^#\|\s*hide', src, flags=re.M): return ''
    code = '\n'.join(l for l in src.splitlines() if not l.startswith('#|'))
    plain = lambda o: '' if 'text/html' in o.get('data', {}) else o.get('text', o.get('data', {}).get('text/plain', ''))
    text = ''.join(''.join(plain(o)) for o in cell.get('outputs', [])).strip()
    return f'``` python\n{code}\n```' + (f'\n\n    ' + text.replace('\n', '\n    ') if text else '')


def render():
    cells = json.loads((root/'nbs/index.ipynb').read_text(encoding='utf-8'))['cells']
    head = '<!-- made from nbs/index.ipynb by tools/readme.py: edit the notebook -->'
    text = '\n\n'.join([head, *filter(None, map(cell_to_md, cells))]) + '\n'
    return text.replace('\n```\n\n``` python\n', '\n\n') # code cells in a row are one block


def write(): (root/'README.md').write_text(render(), encoding='utf-8')


if __name__ == '__main__': write()
