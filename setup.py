"Everything is read from settings.ini; nothing but setuptools is needed to build."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(here/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
words = lambda key: cfg.get(key, '').split()
pythons = ['3.11', '3.12', '3.13'] # those that `make test-newest` tries
statuses = ['1 - Planning', '2 - Pre-Alpha', '3 - Alpha', '4 - Beta', '5 - Production/Stable', '6 - Mature', '7 - Inactive']

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=(here/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    url=cfg['git_url'],
    author=cfg['author'],
    author_email=cfg['author_email'],
    keywords=cfg['keywords'],
    license='Apache-2.0',
    classifiers=[f'Development Status :: {statuses[int(cfg["status"]) - 1]}', 'Intended Audience :: Science/Research',
                 f'Natural Language :: {cfg["language"]}',
                 *[f'Programming Language :: Python :: {v}' for v in pythons]],
    packages=find_packages(include=['wsol_nb', 'wsol_nb.*']),
    include_package_data=True,
    python_requires=f'>={cfg["min_python"]}',
    install_requires=words('requirements'),
    extras_require={extra: words(f'{extra}_requirements') for extra in ('dev', 'shards', 'coco')},
    entry_points={'console_scripts': words('console_scripts'), 'nbdev': [f'{cfg["lib_name"]}={cfg["lib_name"]}._modidx:d']},
    zip_safe=False,
)
