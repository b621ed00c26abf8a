"""The sidebar of the site, in _quarto.yml, from the folders of notebooks.

A chapter is a folder `N_name`, its notebooks stand in the order of their numbers; tutorials come before the
tools. Only what lies between the two marks of _quarto.yml is written.
"""
from pathlib import Path

root = Path(__file__).resolve().parent.parent
BEGIN, END = '      # made by tools/sidebar.py', '      # end'
# where the folder's name says less
TITLES = {'3_cam': 'Class maps', '4_losses': 'Weak losses', '6_dense': 'Full-resolution maps'}
FIRST = ['evaluation', 'top_down', 'full_resolution', 'datasets', 'troubleshooting', 'gpu',
         'house'] # of the tutorials


def title(folder):
    number, _, name = folder.partition('_')
    return f'{number} · {TITLES.get(folder, name.replace("_", " ").capitalize())}'


def sections():
    "(title, notebooks) in the order of the sidebar."
    nbs = root/'nbs'
    chapters = {p.name: sorted(p.glob('[0-9]*.ipynb')) for p in sorted(nbs.glob('[0-8]_*'))}
    tools = {p.name: sorted(p.glob('[0-9]*.ipynb')) for p in sorted(nbs.glob('9_*'))}
    place = {name: i for i, name in enumerate(FIRST)}
    order = lambda p: (place.get(p.stem, len(FIRST)), p.stem)
    taught = sorted((nbs/'tutorials').glob('[!._]*.ipynb'), key=order)
    yield from ((title(name), found) for name, found in chapters.items())
    yield 'Tutorials', taught
    yield from ((title(name), found) for name, found in tools.items())


def render(text):
    "The text of _quarto.yml with today's sidebar."
    before, _, rest = text.partition(BEGIN + '\n')
    lines = [BEGIN]
    for name, found in sections():
        lines += [f'      - section: "{name}"', '        contents:']
        lines += [f'          - {p.relative_to(root/"nbs").as_posix()}' for p in found]
    return '\n'.join([before + lines[0], *lines[1:], END]) + rest.partition(END)[2]


def write():
    file = root/'_quarto.yml'
    file.write_text(render(file.read_text(encoding='utf-8')), encoding='utf-8')


if __name__ == '__main__': write()
