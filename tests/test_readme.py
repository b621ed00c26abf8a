"The ten lines that a newcomer copies must run: the code of nbs/index.ipynb, with one epoch, not fifteen."
import json
import re

import matplotlib
from helpers import root


def test_the_ten_lines(tmp_path, monkeypatch, capsys):
    matplotlib.use('agg')
    monkeypatch.chdir(tmp_path)
    index = json.loads((root/'nbs/index.ipynb').read_text(encoding='utf-8'))['cells']
    cells = [''.join(c['source']) for c in index if c['cell_type'] == 'code']
    code = '\n'.join(c for c in cells if not re.search(r'^#\|\s*(hide|echo: false)', c, flags=re.M))
    assert code.count('fit_one_cycle(15, ') == 1
    names = {}
    exec(code.replace('fit_one_cycle(15, ', 'fit_one_cycle(1, '), names)
    interp = names['interp']
    assert 'MaxBoxAccV2' in capsys.readouterr().out and interp.report.n == 160
    interp.plot_curve()
    interp.show_results(4)
    interp.plot_top_losses(4)
