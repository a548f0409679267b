"Package metadata comes from settings.ini, the one place to edit it."
import shlex
from configparser import ConfigParser
from pathlib import Path

import setuptools

cfg = ConfigParser(delimiters=['='])
cfg.read('settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']

setuptools.setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], license='Apache-2.0', url=cfg['git_url'],
    classifiers=['Programming Language :: Python :: 3'], python_requires=f">={cfg['min_python']}",
    packages=setuptools.find_packages(include=['rakuten_mm*', 'serving*', 'zenml_pipelines*']),
    package_data={'serving': ['static/*', 'migrations/*', 'migrations/versions/*']},
    install_requires=shlex.split(cfg['requirements']), extras_require={'dev': shlex.split(cfg['dev_requirements'])},
    entry_points={'nbdev': ['rakuten_mm=rakuten_mm._modidx:d'], 'console_scripts': shlex.split(cfg['console_scripts'])},
    long_description=Path('README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown')
