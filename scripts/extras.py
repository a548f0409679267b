"""Requirements of extras as settings.ini has them, one a line, for pip: `python scripts/extras.py serve train`."""
import shlex
import sys
from configparser import ConfigParser
from pathlib import Path

cfg = ConfigParser(delimiters=['='])
cfg.read(Path(__file__).parents[1]/'settings.ini', encoding='utf-8')
for key in ('requirements', *(f'{extra}_requirements' for extra in sys.argv[1:])):
    print(*shlex.split(cfg['DEFAULT'][key]), sep='\n')
