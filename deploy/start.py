"""Start a service when what it needs is well.

    python deploy/start.py [NEED ...] -- COMMAND ... [-- COMMAND ...]

NEEDs are those of health.py. Each command but the last runs to its end; the last one takes the place of this process.
"""
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from health import CHECKS, problem


def say(text:str): print(text, flush=True)


def wait_for(
    need:str, # Of `CHECKS`
    pause_s:float=1,
):
    "Return when `need` is well; say what is wrong when that changes, and every five minutes."
    said,when = '', 0.
    while now := problem(need):
        if now != said or time.monotonic()-when > 300: say(f'waiting: {now}'); said,when = now, time.monotonic()
        time.sleep(pause_s)


def marked(
    *names:str # Of environment variables
)->list[int]: # Process ids, without this one
    "Processes that have the values that this one has: by them a service's children are known, whoever their parent is by now."
    if not all(n in os.environ for n in names): return []
    mark,found = {f'{n}={os.environ[n]}'.encode() for n in names}, []
    for p in Path('/proc').glob('[0-9]*'):
        try:
            if int(p.name) != os.getpid() and mark <= set((p/'environ').read_bytes().split(b'\0')): found.append(int(p.name))
        except OSError: pass  # gone, or somebody else's
    return found


def leftovers()->list[int]: # Process ids
    "Processes of an earlier life of this service on this machine: children of one that was killed, which may hold its port."
    return marked('RAKUTEN_MM_SERVICE', 'RAKUTEN_MM_UP')


def end_leftovers(grace_s:float=10):
    "Ask them to end, then make them."
    until = time.monotonic()+grace_s
    for sig in (signal.SIGTERM, signal.SIGKILL):
        if left := leftovers(): say(f'ending {len(left)} processes of an earlier start')
        for pid in left:
            try: os.kill(pid, sig)
            except ProcessLookupError: pass
        while leftovers() and time.monotonic() < until: time.sleep(.1)


def end_with_parent():
    "Where the system can: the service is asked to end if what supervises it is killed."
    if sys.platform == 'linux': ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG, which outlives exec


def split(
    args:list[str]
)->tuple[list[str], list[list[str]]]: # Needs and commands
    "What the command line says; raises `ValueError`."
    parts = [[]]
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
