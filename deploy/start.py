"""Start a service when what it needs is well.

    python -m deploy.start [NEED ...] -- COMMAND ... [-- COMMAND ...]

NEEDs are those of health.py. Each command but the last runs to its end; the last one takes the place of this process.
"""
import ctypes
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil

from deploy.health import CHECKS, problem


def say(text:str): print(text, flush=True)


def wait_for(need:str):
    "Return when one of `CHECKS` is well; say what is wrong when that changes, and every five minutes."
    said,when = '', 0.
    while now := problem(need):
        if now != said or time.monotonic()-when > 300: say(f'waiting: {now}'); said,when = now, time.monotonic()
        time.sleep(1)


def end_leftovers(grace_s:float=10):
    "End processes of an earlier life of this service, known by their environment: they may hold its port."
    mark = {(n, os.environ.get(n)) for n in ('RAKUTEN_MM_SERVICE', 'RAKUTEN_MM_UP')}
    for end in (psutil.Process.terminate, psutil.Process.kill):
        left = [p for p in psutil.process_iter(['environ'])
                if p.pid != os.getpid() and mark <= (p.info['environ'] or {}).items()]
        if left: say(f'ending {len(left)} processes of an earlier start')
        for p in left:
            with suppress(psutil.NoSuchProcess): end(p)
        psutil.wait_procs(left, grace_s)


def end_with_parent():
    "Where the system can: the service is asked to end if what supervises it is killed."
    if sys.platform == 'linux': ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG, which outlives exec


def split(args:list[str])->tuple[list[str], list[list[str]]]:
    "Needs and commands of a command line; raises `ValueError`."
    parts:list[list[str]] = [[]]
    for a in args: parts.append([]) if a == '--' else parts[-1].append(a)
    needs,*commands = parts
    if not commands or not all(commands): raise ValueError('no command')
    if unknown := set(needs)-CHECKS.keys(): raise ValueError(f'cannot wait for {", ".join(sorted(unknown))}')
    return needs, commands


def main():
    "Wait, prepare, become the service."
    try: needs,commands = split(sys.argv[1:])
    except ValueError as e: sys.exit(f'{e}\n{__doc__}')
    end_with_parent()
    end_leftovers()
    for need in needs: wait_for(need)
    for command in commands[:-1]:
        if code := subprocess.run(command).returncode: sys.exit(f'{command[0]} ended with {code}')
    os.execvp(commands[-1][0], commands[-1])


if __name__ == '__main__': main()
