"Package metadata comes from settings.ini, the one place to edit it."
import shlex
from configparser import ConfigParser
from pathlib import Path

import setuptools

cfg = ConfigParser(delimiters=['='])
cfg.read('settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']
extras = {k.removesuffix('_requirements'): shlex.split(v) for k,v in cfg.items() if k.endswith('_requirements')}
extras['dev'] = sorted({r for requirements in extras.values() for r in requirements})

# The wheel is the library alone; an editable install puts the whole checkout on the path (`package_dir`).
setuptools.setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], license='Apache-2.0', url=cfg['git_url'],
    classifiers=['Programming Language :: Python :: 3', 'Typing :: Typed'], python_requires=f">={cfg['min_python']}",
    packages=setuptools.find_packages(include=['rakuten_mm*']), package_dir={'': '.'},
    package_data={'rakuten_mm': ['py.typed', '*/*.json', '*/*.toml']},
    install_requires=shlex.split(cfg['requirements']), extras_require=extras,
    entry_points={'nbdev': ['rakuten_mm=rakuten_mm._modidx:d'], 'console_scripts': shlex.split(cfg['console_scripts'])},
    long_description=Path('README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown')
