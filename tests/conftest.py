import os
import sys
from pathlib import Path

import pytest

from wsol_nb.core import set_seed  # first: lets timm be imported beside a CUDA torchvision

pytest.register_assert_rewrite('helpers')
sys.path.insert(0, str(Path(__file__).resolve().parent.parent/'tools'))


@pytest.fixture(autouse=True)
def seeded(): set_seed(0)


def folder(name):
    "The folder that an environment variable names, or a skip with the reason."
    value = os.environ.get(name)
    if not value: pytest.skip(f'{name} is not set')
    return Path(value)


@pytest.fixture(scope='session')
def real_data(): return folder('WSOL_DATA')


@pytest.fixture(scope='session')
def real_weights(): return folder('WSOL_WEIGHTS')


@pytest.fixture(scope='session')
def oracles(): return folder('WSOL_ORACLES')


@pytest.fixture(scope='session')
def world(tmp_path_factory):
    "A small synthetic world on disk, shared by the tests; they must not write to it."
    from wsol_nb.data.worlds.disk import write_world
    path = tmp_path_factory.mktemp('world')
    write_world(path, n_train=48, n_val=16, n_test=16, progress=False)
    return path
