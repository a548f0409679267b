"""Kill each process of a running system with SIGKILL and measure how long until everything is healthy again.

    scripts/up.sh run python -m benchmarks.recovery --json

Beside the services themselves it kills MLflow's server process below its command, the API's worker, and supervisord.
"""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from benchmarks.harness import ROOT, main, option, say
from deploy.health import problem

SERVICES = 'mlflow', 'fetch', 'scheduler', 'api'
CTL = [sys.executable, '-m', 'supervisor.supervisorctl', '-c', str(ROOT/'deploy'/'supervisord.conf')]


def pid_of(name:str)->int:
    "A service's process, or supervisord's; 0 if it has none."
    command = [*CTL, 'pid', *([] if name == 'supervisord' else [name])]
    try: return int(subprocess.run(command, capture_output=True, text=True).stdout)
    except ValueError: return 0


def child_of(name:str)->int:
    "The process below a service that does its work."
    below = psutil.Process(pid_of(name)).children()
    return next((p.pid for p in below if 'spawn_main' in ' '.join(p.cmdline())), below[0].pid)


def wrong()->list[str]: return [p for p in map(problem, SERVICES) if p]


def beaten()->float:
    "When the scheduler gave its last sign of life; the sign of a killed one is good for two minutes."
    path = Path(os.environ['RAKUTEN_MM_ARTIFACTS'])/'scheduler'/'heartbeat.json'
    return path.stat().st_mtime if path.exists() else 0


def recover(pid:int, timeout_s:float)->float: # Seconds
    "Kill a process and wait until it is gone, every service has a process, and all are healthy, twice in a row."
    t0,killed,well = time.monotonic(), time.time(), 0
    os.kill(pid, signal.SIGKILL)
    while time.monotonic()-t0 < timeout_s:
        there = all(psutil.pid_exists(p) and p != pid for p in map(pid_of, SERVICES))
        well = well+1 if there and beaten() > killed and not wrong() else 0
        if well == 1: healthy = time.monotonic()-t0
        if well == 2: return round(healthy, 1)
        time.sleep(.5)
    raise TimeoutError(f'not healthy {timeout_s:.0f} s after: {wrong()}')


def bench(args, work:Path)->dict:
    "Kill one after another."
    if w := wrong(): sys.exit(f'not healthy before the first kill: {w}')
    targets = {n: (pid_of, n) for n in SERVICES}
    targets |= {"mlflow's server process": (child_of, 'mlflow'), "the API's worker": (child_of, 'api'),
                'supervisord': (pid_of, 'supervisord')}
    found = {}
    for name,(find,service) in targets.items():
        found[name] = recover(find(service), args.timeout)
        say(f'{name:24} {found[name]:6.1f} s')
    return dict(recovery_s=found, slowest_recovery_s=max(found.values()))


if __name__ == '__main__':
    timeout = option('--timeout', type=float, default=300, help='seconds to wait after each (300)')
    main(bench, __doc__, timeout, isolated=False)
