"The scheduler and its records. Most runs are a line of Python instead of a pipeline."
import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import yaml
from click.testing import CliRunner
from conftest import ROOT
from filelock import FileLock

from rakuten_mm.cli.main import cli
from rakuten_mm.core.environment import artifacts_dir
from rakuten_mm.core.process import ended, identity_of
from rakuten_mm.core.tracking import mlflow_client, tracked_run
from rakuten_mm.sources.fetch import STATE, WHOLE
from rakuten_mm.synthetic.catalogue import synthesize
from zenml_pipelines.history import BY_HAND, History, Run, scheduler_dir
from zenml_pipelines.runner import Runner, lock_path
from zenml_pipelines.schedule import native_schedules, read_schedule
from zenml_pipelines.scheduler import KILLS, Scheduler, health, request_path

DAY = 86_400
MONDAY = datetime(2026, 3, 2, tzinfo=UTC).timestamp()


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    "Records of the test's own."
    monkeypatch.setenv('RAKUTEN_MM_ARTIFACTS', str(tmp_path/'artifacts'))
    return tmp_path


def schedule(home, *jobs, **top):
    "A schedule, read from a file; every job has a configuration and daily times unless it says otherwise."
    (home/'c.yaml').write_text(yaml.safe_dump(dict(parameters=dict(raw_dir=str(home/'raw')))))
    base = dict(name='check', pipeline='api_check', config=str(home/'c.yaml'), cron='0 2 * * *', timeout_s=60)
    (home/'schedule.yaml').write_text(yaml.safe_dump(dict(jobs=[base | j for j in jobs or ({},)]) | top))
    return read_schedule(home/'schedule.yaml')


def runner(s, code='', say=lambda line: None, clean_up=lambda: None):
    "Runs `code` in place of a pipeline; it may be a function of the job."
    return Runner(s, lambda job: [sys.executable, '-c', code(job) if callable(code) else code], say, clean_up)


def until(true, timeout_s=20):
    "Wait for something."
    end = time.monotonic()+timeout_s
    while not (got := true()):
        assert time.monotonic() < end, 'it did not happen'
        time.sleep(.02)
    return got


def gone(pid):
    "Whether a process has ended."
    try: return ended(psutil.Process(pid))
    except psutil.NoSuchProcess: return True


def outcomes(): return [r.outcome for r in reversed(History().runs(100))]


def at_work(timeout_s=20):
    "The run that is."
    return until(lambda: next(iter(History().runs(outcome='running')), None), timeout_s)


class Clock:
    "A scheduler whose time is set by hand."
    def __init__(self, s, code='', has_champion=lambda: True, at=MONDAY):
        self.time = at
        self.it = Scheduler(s, runner(s, code), has_champion, lambda: self.time)

    def tick(self, seconds=0):
        "Let time pass, and what is due run to its end."
        self.time += seconds
        self.it.tick()
        until(lambda: not self.it.active)


# The schedule

@pytest.mark.parametrize(('job', 'why'), [
    (dict(crn='* * * * *'), 'jobs.0.crn: unknown key'), (dict(cron='61 * * * *'), "61"), (dict(cron='0 2 * *'),
                                                                                          'got 4, expected 5'),
    (dict(cron='0 2 * * 1'), 'days of the week as names'), (dict(cron='0 2 1 * mon'),
                                                            'schedulers disagree'), (dict(timezone='Mars/Base'),
                                                                                     'Mars/Base'),
    (dict(pipeline='fly'), "no pipeline 'fly'; there are ingestion"), (dict(config='nowhere.yaml'),
                                                                       'nowhere.yaml: no such file'),
    (dict(timeout_s=0), 'timeout_s'), (dict(at_start='always'), 'at_start'), (dict(name='a b'), 'jobs.0.name')])
def test_schedule_is_checked_before_anything_starts(home, job, why):
    with pytest.raises(ValueError, match=r'schedule.yaml: jobs.0') as e: schedule(home, job)
    assert why in str(e.value)


def test_schedule_names_are_distinct(home):
    with pytest.raises(ValueError, match='two jobs have the same name'): schedule(home, {}, {})
    with pytest.raises(ValueError, match='stak: unknown key'): schedule(home, stak='x')


def test_time_zone(home):
    "Two in the morning is another moment in Paris, and moves with summer time."
    job = schedule(home, dict(timezone='Europe/Paris')).jobs[0]
    winter,summer = (datetime(2026, m, 1, 12, tzinfo=UTC).timestamp() for m in (3, 4))
    assert [datetime.fromtimestamp(job.next_time(t), UTC).hour for t in (winter, summer)] == [1, 0]


@pytest.mark.parametrize('cron', ['0 0 30 2 *', '0 0 31 4,6 *', '0 0 31 feb *'])
def test_f77_a_day_that_never_comes_is_refused(home, cron):
    with pytest.raises(ValueError, match='is never due: there is no such day'): schedule(home, dict(cron=cron))
    assert schedule(home, dict(cron='0 0 29 2 *')).jobs[0].next_time(MONDAY) > MONDAY


@pytest.mark.parametrize(('cron', 'day', 'due'), [
    ('30 2 * * *', (2026, 10, 25), ['00:30']),  # the hour from two to three comes twice, and counts once
    ('30 2 * * *', (2026, 3, 29), ['01:30']),  # it is left out
    ('0,30 2 * * sun', (2026, 10, 25), ['00:00', '00:30']), ('0 2,3 * * *', (2026, 3, 29), ['01:00']),
    ('0 3 * * *', (2026, 10, 25), ['02:00']), ('0 4 * * *', (2026, 3, 29), ['02:00'])])
def test_f77_once_a_day_in_summer_time_too(home, cron, day, due):
    job,start = schedule(home, dict(cron=cron, timezone='Europe/Paris')).jobs[0], datetime(*day, tzinfo=UTC).timestamp()
    times,t = [], start-1
    while (t := job.next_time(t)) < start+20*3_600: times.append(f'{datetime.fromtimestamp(t, UTC):%H:%M}')
    assert times == due
    for s in range(0, 20*3_600, 600):  # whenever it is asked
        after = [x for x in due if start+int(x[:2])*3_600+int(x[3:])*60 > start+s]
        assert not after or f'{datetime.fromtimestamp(job.next_time(start+s), UTC):%H:%M}' == after[0]


def test_f77_through_every_hour_of_the_day_that_has_25(home):
    job = schedule(home, dict(cron='*/30 * * * *', timezone='Europe/Paris')).jobs[0]
    t = start = datetime(2026, 10, 24, 22, tzinfo=UTC).timestamp()
    for n in range(1, 51):
        t = job.next_time(t)
        assert t == start+n*1_800


def test_shipped_schedule(monkeypatch):
    monkeypatch.chdir(ROOT)
    s = read_schedule()
    assert {j.pipeline for j in s.jobs} == {'retraining', 'drift', 'api_check'}
    assert s.job('retraining').at_start == 'until_champion'
    assert s.command(s.job('drift'))[1:] == ['pipeline', 'run', 'zenml_pipelines.drift', '-c',
                                             'zenml_pipelines/configs/drift.yaml', '-s', 'rakuten_local']


# One run

def test_run_is_recorded(home):
    "Exit code, duration, log and process; its lines come to the scheduler's log too, of a progress bar the last state."
    s,said,cleaned = schedule(home), [], []
    code = ('import time; print("got one", end="\\rgot two\\n", flush=True); time.sleep(.5); '
            'print("end", end=""); raise SystemExit(3)')
    run = runner(s, code, said.append, lambda: cleaned.append(1)).run(s.jobs[0], 'by hand')
    assert (run.outcome, run.exit_code, run.why) == ('failed', 3, 'by hand') and .5 < run.ended-run.started < 20
    assert Path(run.log).read_bytes() == b'got one\rgot two\nend' and '[check] got two' in said
    assert '[check] end' in said and not cleaned
    kept = History().runs()[0]
    assert kept == run
    assert runner(s, '').run(s.jobs[0], 'by hand').outcome == 'ok'
    shown = CliRunner().invoke(cli, ['runs']).output.splitlines()
    assert shown[0].split() == ['STARTED', 'JOB', 'OUTCOME', 'TOOK', 'EXIT', 'WHY']
    assert len(shown) == 3 and 'ok' in shown[1] and shown[2].split()[-3:] == ['3', 'by', 'hand']
    told = json.loads(CliRunner().invoke(cli, ['runs', '--json', '--limit', '1']).output)
    assert [r['exit_code'] for r in told] == [0]
    assert 'nothing was run' in CliRunner().invoke(cli, ['runs', '--pipeline', 'drift']).output


def test_killed_run_is_cleaned_up_after(home):
    s,cleaned = schedule(home), []
    run = runner(s, 'import os; os.kill(os.getpid(), 9)', clean_up=lambda: cleaned.append(1)).run(s.jobs[0], 'x')
    assert (run.outcome, run.exit_code, run.note) == ('failed', 137, 'ended by signal 9') and cleaned


NEST = '''
import subprocess, sys, time, pathlib, signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True)
pathlib.Path(%r).write_text(str(p.pid)); time.sleep(60)'''


def test_time_limit(home):
    "A run that hangs and does not listen is killed, with what it has started."
    s = schedule(home, dict(timeout_s=1.5), grace_s=.5)
    run = runner(s, NEST % str(home/'pid')).run(s.jobs[0], 'x')
    assert run.outcome == 'timed out' and run.exit_code > 128 and run.ended-run.started < 20
    assert gone(int((home/'pid').read_text()))


def test_run_that_cannot_start(home):
    s = schedule(home)
    assert Runner(s, lambda job: ['/nowhere/zenml'], print, lambda: None).run(s.jobs[0], 'x').exit_code == 127
    (scheduler_dir()/'logs').rename(home/'logs'); (scheduler_dir()/'logs').write_text('in the way')
    assert runner(s).run(s.jobs[0], 'x').outcome == 'failed'


# Several at once

def test_overlapping_runs_are_refused(home):
    "By this scheduler, by another, and by hand; another pipeline is not."
    s = schedule(home, dict(alone=False), dict(name='other', pipeline='ingestion', alone=False))
    one = runner(s, f'import time, pathlib\nwhile not pathlib.Path({str(home/"go")!r}).exists(): time.sleep(.02)')
    first = threading.Thread(target=one.run, args=(s.jobs[0], 'first')); first.start()
    until(lambda: outcomes() == ['running'])
    assert runner(s).run(s.jobs[0], 'second').outcome == 'refused'
    by_hand = CliRunner().invoke(cli, ['scheduler', 'trigger', 'check', '--schedule', str(home/'schedule.yaml')])
    assert by_hand.exit_code == 75 and 'another run of api_check is at work' in by_hand.output
    assert runner(s).run(s.jobs[1], 'other').outcome == 'ok'
    waiting = []
    patient = threading.Thread(target=lambda: waiting.append(runner(s).run(s.jobs[0], 'patient',
                                                                           wait=True))); patient.start()
    (home/'go').touch(); first.join(20); patient.join(20)
    assert waiting[0].outcome == 'ok' and outcomes() == ['ok', 'refused', 'refused', 'ok', 'ok']


def test_trainings_wait_for_each_other(home):
    "Not refused, and never two at once, whoever starts them."
    s = schedule(home, *[dict(name=p, pipeline=p) for p in ('ingestion', 'training', 'api_check')])
    threads = [threading.Thread(target=runner(s, 'import time; time.sleep(.4)').run, args=(j, 'x')) for j in s.jobs]
    for t in threads: t.start()
    for t in threads: t.join(30)
    runs = sorted(History().runs(), key=lambda r: r.started)
    assert [r.outcome for r in runs] == ['ok']*3 and all(a.ended <= b.started+.05 for a,b in pairwise(runs))


def test_two_schedulers_run_what_is_due_once(home):
    s = schedule(home)
    clocks = [Clock(s, 'import time; time.sleep(.3)') for _ in range(2)]
    for c in clocks: c.tick()
    threads = [threading.Thread(target=c.tick, args=(DAY,)) for c in clocks]
    for t in threads: t.start()
    for t in threads: t.join(20)
    for c in clocks: c.tick(10)
    assert outcomes().count('ok') == 1 and len(outcomes()) <= 2  # the other one came too late, or was refused


def test_time_is_not_lost_to_one_that_never_starts(home):
    "Whoever holds the lock may still step back; the job stays due until somebody has started it."
    c = Clock(schedule(home)); c.tick()
    with FileLock(lock_path('api_check')):
        c.tick(DAY)
        assert outcomes() == []
    c.tick(1)
    assert outcomes() == ['ok']


# When

def test_due(home):
    "A new job waits for its time; then it runs once each time."
    c = Clock(schedule(home))
    c.tick(); c.tick(3600)
    assert outcomes() == []
    c.tick(3600)
    assert outcomes() == ['ok'] and History().runs()[0].scheduled == MONDAY+7200
    c.tick(1); c.tick(3600)
    assert outcomes() == ['ok']
    c.tick(DAY)
    assert outcomes() == ['ok', 'ok']


def test_missed_runs_are_made_up_for_once(home):
    "After the machine slept, and after the scheduler was down; not for an expression that is new."
    s = schedule(home)
    c = Clock(s); c.tick(); c.tick(5*DAY); c.tick(60); c.tick(60)
    assert outcomes() == ['ok'] and History().runs()[0].scheduled == MONDAY+7200
    later = Clock(s, at=c.time+3*DAY); later.tick(); later.tick(60)
    assert outcomes() == ['ok', 'ok']
    again = Clock(s, at=later.time+60); again.tick(); again.tick(60)
    assert outcomes() == ['ok', 'ok']
    other = Clock(schedule(home, dict(cron='0 3 * * *')), at=again.time+DAY); other.tick(); other.tick(60)
    assert outcomes() == ['ok', 'ok']
    other.tick(DAY)
    assert outcomes() == ['ok', 'ok', 'ok']


def test_clock_that_was_wrong(home):
    "Set back by a month, jobs go on at their times."
    s = schedule(home)
    c = Clock(s); c.tick(); c.tick(30*DAY); c.tick(-29*DAY); c.tick(DAY)
    assert outcomes() == ['ok', 'ok']


def test_f77_clock_set_back_by_an_hour(home):
    "What was run is not run again; what is due more often than that does not wait for the hour to pass."
    c = Clock(schedule(home, {}, dict(name='often', pipeline='drift', cron='*/15 * * * *')), at=MONDAY+3_500)
    ran = lambda job: sum(r.job == job for r in History().runs(100))
    c.tick(); c.tick(3_705)
    assert ran('check') == ran('often') == 1
    c.tick(-3_600)  # 1:00:05
    for _ in range(8): c.tick(900)
    assert ran('check') == 1
    assert ran('often') == 9
    c.tick(DAY)
    assert ran('check') == 2


def test_f77_first_model_after_the_clock_was_set_back(home):
    c = Clock(schedule(home, dict(at_start='until_champion')), 'raise SystemExit(1)', lambda: False, MONDAY+30*DAY)
    (home/'raw').mkdir(); (home/'raw'/'X_train_update.csv').touch()
    c.tick(); c.tick(-29*DAY)
    assert outcomes() == ['failed', 'failed']


def test_f77_interrupted_before_the_clock_was_set_back(home):
    "The run that was made up for it is the latest, though its clock says otherwise."
    h = History()
    h.save(Run('check', 'api_check', 'schedule', started=5_000.).end('stopped'))
    again = Run('check', 'api_check', 'schedule', started=1_400.)
    h.save(again); h.save(again.end('ok', ended=1_390.))
    assert not h.interrupted('check')
    assert [r.outcome for r in h.runs()] == ['ok', 'stopped']
    assert again.seconds == 0


def test_f77_a_live_process_is_known_whatever_the_clock(home, monkeypatch):
    h = History(); h.save(Run('check', 'api_check', 'schedule'))
    monkeypatch.setattr(psutil.Process, 'create_time', lambda self: time.time()-7_200)
    assert h.end_orphans() == ([], [])


def test_due_while_running_is_refused_and_while_waiting_is_not(home):
    go = home/'go'
    s = schedule(home, dict(cron='* * * * *'), dict(name='other', pipeline='ingestion', cron='* * * * *'))
    c = Clock(s, f'import time, pathlib\nwhile not pathlib.Path({str(go)!r}).exists(): time.sleep(.02)')
    c.tick()
    c.time += 60; c.it.tick()
    at_work(); assert sorted(c.it.active.values()) == ['running', 'waiting']  # whichever asked first
    first,second = sorted(c.it.active, key=c.it.active.get)
    for _ in range(3): c.time += 60; c.it.tick()
    assert [(r.job, r.outcome) for r in reversed(History().runs())] == [(first, 'running'), *[(first, 'refused')]*3]
    go.touch(); until(lambda: not c.it.active)
    want = sorted([(first, 'ok'), *[(first, 'refused')]*3, (second, 'ok')])
    assert sorted((r.job, r.outcome) for r in History().runs()) == want
    c.tick(60)
    assert [r.outcome for r in History().runs(2)] == ['ok', 'ok']


# An empty system, and requests

def test_first_model(home):
    "As soon as a whole delivery is there, until there is a champion; what fails is tried again with growing pauses."
    there = []
    c = Clock(schedule(home, dict(at_start='until_champion')), 'raise SystemExit(1)', lambda: bool(there))
    c.tick(); assert outcomes() == []
    (home/'raw'/STATE).mkdir(parents=True); (home/'raw'/'X_train_update.csv').touch()
    c.tick(); assert outcomes() == []  # the fetch has not ended
    (home/'raw'/WHOLE).touch()
    c.tick(); assert outcomes() == ['failed'] and History().runs()[0].why == 'no champion yet'
    c.tick(50); assert len(outcomes()) == 1
    c.tick(20); assert len(outcomes()) == 2
    c.tick(70); assert len(outcomes()) == 2
    c.tick(60); assert len(outcomes()) == 3
    there.append(1); c.tick(600); c.tick(600)
    assert len(outcomes()) == 3
    there.clear(); c.tick(3600)  # a registry that was lost
    assert len(outcomes()) == 4


def test_registry_that_does_not_answer(home):
    def down(): raise ConnectionError
    (home/'raw').mkdir(); (home/'raw'/'X_train_update.csv').touch()
    c = Clock(schedule(home, dict(at_start='until_champion')), '', down)
    c.tick(); c.tick(60); assert outcomes() == []
    c.it.has_champion = lambda: False
    c.tick(60); assert outcomes() == ['ok']


def test_registry_is_asked(home):
    s = schedule(home)
    asks = Scheduler(s, runner(s))
    assert not asks.has_champion()
    with tracked_run(name='x') as run: pass
    client = mlflow_client()
    client.create_registered_model('rakuten-mm')
    client.create_model_version('rakuten-mm', 'file:///nowhere', run)
    client.set_registered_model_alias('rakuten-mm', 'champion', '1')
    assert asks.has_champion()


def test_request(home):
    "Starts the job, is gone when that has begun, and is not lost while a run is at work or the scheduler is stopped."
    go,s = home/'go', schedule(home)
    c = Clock(s, f'import time, pathlib\nwhile not pathlib.Path({str(go)!r}).exists(): time.sleep(.02)')
    path = request_path('check'); path.parent.mkdir(parents=True)
    path.write_text('{"why": "categories moved", "asked_at": 1}')
    c.it.tick()
    assert at_work().why == 'categories moved' and not path.exists()
    path.write_text('{"why": "moved again"}')
    c.it.tick(); assert path.exists()
    go.touch(); until(lambda: not c.it.active); go.unlink()
    c.it.tick(); at_work()
    assert not path.exists()
    c.it.stopping.set(); until(lambda: not c.it.active)
    assert outcomes() == ['ok', 'stopped']
    again = Clock(s); again.tick(); path.write_text('{"why": "torn'); again.tick()
    assert [(r.why, r.outcome) for r in History().runs(2)] == [('request', 'ok'), ('moved again', 'ok')]


# Its own end

SERVICE = '''
import sys, logging
from zenml_pipelines.runner import Runner
from zenml_pipelines.schedule import read_schedule
from zenml_pipelines.scheduler import Scheduler
from zenml_pipelines.cli import stop_on_signal
logging.basicConfig(stream=sys.stdout, level=logging.INFO)
s = read_schedule(sys.argv[1])
runner = Runner(s, lambda job: [sys.executable, '-c', sys.argv[2]], clean_up=lambda: None)
it = Scheduler(s, runner, lambda: True, tick_s=.1)
stop_on_signal(it.stopping)
it.run()'''


def service(home, code):
    "A scheduler in a process of its own."
    return subprocess.Popen([sys.executable, '-c', SERVICE, str(home/'schedule.yaml'), code], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def missed(job='check'):
    "Let a job be due."
    History().claim(job, '0 2 * * *', time.time()-2*DAY)


def test_sigterm(home):
    "The run ends first, the scheduler with exit code 0, and what was stopped is made up for."
    schedule(home, grace_s=5); missed()
    it = service(home, 'import time; print("at work", flush=True); time.sleep(60)')
    run = at_work()
    until(lambda: 'at work' in Path(run.log).read_text())
    ok,what = health()
    assert ok and f'process {it.pid}' in what
    it.terminate()
    out,_ = it.communicate(timeout=20)
    assert it.returncode == 0 and '[check] at work' in out, out
    assert outcomes() == ['stopped'] and gone(run.pid) and not health()[0]
    it = service(home, '')
    until(lambda: outcomes() == ['stopped', 'ok'])
    it.terminate(); assert it.wait(20) == 0


def test_killed_scheduler(home):
    "Its run is killed with it, and what that had started at the latest by the next one, which starts the run again."
    s = schedule(home); missed()
    it = service(home, NEST % str(home/'pid'))
    run = at_work()
    child = int(until(lambda: (home/'pid').exists() and (home/'pid').read_text()))
    it.kill(); it.communicate()
    until(lambda: gone(run.pid))
    assert outcomes() == ['running'] and [r.id for r in History().end_orphans(dry=True)[0]] == [run.id]
    c = Clock(s, at=time.time()); c.tick()
    assert gone(child) and outcomes() == ['abandoned', 'ok']
    assert [(r.why, r.scheduled) for r in History().runs()] == [('schedule', run.scheduled)]*2
    c.tick(1); assert len(outcomes()) == 2


def test_run_that_kills_the_machine_is_not_repeated_for_ever(home):
    "Killed so often in a row, it waits for its time; what was stopped does not count, runs by hand are not repeated."
    s,h,n = schedule(home, dict(at_start='until_champion')), History(), iter(range(99))
    (home/'raw').mkdir(); (home/'raw'/'X_train_update.csv').touch()
    def past(*ended, why='no champion yet'):
        for outcome in ended: h.save(Run('check', 'api_check', why, started=1e9+next(n)).end(outcome))
    past('failed', *['abandoned', 'stopped']*(KILLS-1), 'refused')
    c = Clock(s, 'raise SystemExit(1)', lambda: False); c.tick()
    assert outcomes()[-1] == 'failed' and len(outcomes()) == 2*KILLS+1
    past('stopped', 'abandoned', why=BY_HAND)
    c.tick(1); assert outcomes()[0] == 'failed' and len(outcomes()) == 2*KILLS+3  # the latest is the one that failed
    for r in h.runs(-1): h.save(r.end('abandoned'))
    c.tick(3600); assert len(outcomes()) == 2*KILLS+3
    c.tick(3600); assert len(outcomes()) == 2*KILLS+4 and h.runs(1)[0].why == 'schedule'


def test_run_by_hand_ends_with_its_terminal(home):
    "It is not started again."
    s = schedule(home)
    h = History()
    h.save(Run('check', 'api_check', BY_HAND, watcher=1, watcher_started=1.))
    c = Clock(s); c.tick(); c.tick(60)
    assert outcomes() == ['abandoned']


def test_heartbeat(home):
    assert health() == (False, 'no scheduler is running')
    c = Clock(schedule(home), at=time.time()); c.tick()
    ok,what = health()
    assert ok and 'waiting for check' in what and CliRunner().invoke(cli, ['scheduler', 'health']).exit_code == 0
    beat = scheduler_dir()/'heartbeat.json'
    beat.write_text(json.dumps(json.loads(beat.read_text()) | dict(time=time.time()-600)))
    assert not health()[0] and CliRunner().invoke(cli, ['scheduler', 'health']).exit_code == 1


BEAT = dict(time=1., pid=1, host='h', active={}, next=dict(check=1.))


@pytest.mark.parametrize('damage', [
    '', 'null', '[]', '7', '"x"', '{', '{}', '['*100_000, b'\xff\xfe', b'\0'*100, *[{k: v} for k in BEAT for v in
    (None, 'x\ny', [], {}, {'a': 'b\x1b'}, float('nan'), float('inf'), '\ud800', [1])]], ids=lambda d: repr(d)[:40])
def test_f77_damaged_heartbeat(home, damage):
    "One line and exit code 1, whatever the file is."
    beat = scheduler_dir()/'heartbeat.json'; beat.parent.mkdir(parents=True)
    text = json.dumps(BEAT | damage) if isinstance(damage, dict) else damage
    beat.write_bytes(text if isinstance(text, bytes) else text.encode())
    res = CliRunner().invoke(cli, ['scheduler', 'health'])
    assert res.exit_code == 1 and isinstance(res.exception, SystemExit), res.exception
    assert len(res.output.splitlines()) == 1


def test_f77_heartbeat_that_is_no_file_and_from_the_future(home):
    beat = scheduler_dir()/'heartbeat.json'; beat.mkdir(parents=True)
    assert not health()[0]
    beat.rmdir(); os.mkfifo(beat)
    assert not health()[0]
    beat.unlink(); beat.write_text(json.dumps(BEAT | dict(time=time.time()+3_600)))
    assert not health()[0]
    beat.write_text(json.dumps(BEAT | dict(time=time.time())))
    assert health()[0]


@pytest.mark.parametrize('damage', ['', 'null', '['*100_000, '{"why": "\\ud800\\n\\u0000x"}', b'\xff', '{"why": {}}'],
                         ids=lambda d: repr(d)[:30])
def test_f77_damaged_request(home, damage):
    "It is a request all the same, once, and is no trouble to others."
    c = Clock(schedule(home, {}, dict(name='other', pipeline='drift')))
    path = request_path('check'); path.parent.mkdir(parents=True)
    path.write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    request_path('other').mkdir()
    c.tick(); c.tick(1)
    assert outcomes() == ['ok']
    assert History().runs()[0].why.isprintable()
    assert CliRunner().invoke(cli, ['runs']).exit_code == 0


# Its commands

def test_commands(home):
    "A schedule that is wrong and a job that is not in it are told in words; a run is a line."
    (home/'wrong.yaml').write_text('jobs: [{name: x, pipeline: fly, config: nowhere.yaml, cron: 0 2 * * 1, crn: 1}]')
    call = lambda *args: CliRunner().invoke(cli, [str(a) for a in args])
    wrong = call('scheduler', 'run', '--schedule', home/'wrong.yaml')
    assert wrong.exit_code == 1 and 'crn: unknown key' in wrong.output
    schedule(home)
    unknown = call('scheduler', 'trigger', 'fly', '--schedule', home/'schedule.yaml')
    assert unknown.exit_code == 1 and "no job 'fly'; there are check" in unknown.output
    jobs = json.loads(call('scheduler', 'list', '--schedule', home/'schedule.yaml', '--json').stdout)
    assert [j['job'] for j in jobs] == ['check'] and jobs[0]['next'].endswith('+00:00')
    assert 'nothing was run yet' in call('runs').output
    History().save(Run('check', 'api_check', 'schedule', started=1e9).end('failed', 1, ended=1e9+61))
    assert call('runs').output.splitlines()[1] == '2001-09-09 01:46:40  check  failed   61 s     1  schedule'
    assert '"exit_code": 1' in call('runs', '--json', '--pipeline', 'api_check').output


# Its records

def test_torn_history(home):
    "It is put aside, and work goes on."
    c = Clock(schedule(home)); c.tick(); c.tick(DAY)
    path = scheduler_dir()/'runs.sqlite'
    for p in path.parent.glob('runs.sqlite-*'): p.unlink()
    path.write_bytes(b'SQLite format 3\0'+os.urandom(5000))
    c.tick(60); assert outcomes() == []  # what was done today is still known
    c.tick(DAY)
    assert outcomes() == ['ok'] and list(path.parent.glob('runs.sqlite.torn-*'))


def test_locked_history(home, monkeypatch):
    "A record that cannot be written now is written later; the run takes place."
    real = sqlite3.connect
    monkeypatch.setattr(sqlite3, 'connect', lambda *a, **kw: real(*a, **kw | dict(timeout=.05)))
    s = schedule(home)
    History().runs()
    other = real(scheduler_dir()/'runs.sqlite', isolation_level=None); other.execute('begin exclusive')
    r = runner(s)
    assert r.run(s.jobs[0], 'x').outcome == 'ok' and (scheduler_dir()/'logs').exists()
    other.execute('rollback')
    assert outcomes() == [] and [x.outcome for x in r.history.runs()] == ['ok'] and outcomes() == ['ok']


def test_history_of_another_host(home):
    "Is for that host to say, or for whoever knows that it is gone."
    h = History()
    for host in ('elsewhere', identity_of().host):
        h.save(Run('x', 'x', 'x', watcher=1, watcher_started=1., host=host, log='/nowhere'))
    orphans,unknown = h.end_orphans()
    assert [r.outcome for r in orphans] == ['abandoned'] and [r.host for r in unknown] == ['elsewhere']
    assert [r.host for r in h.end_orphans(('elsewhere',), dry=True)[0]] == ['elsewhere'] and h.end_orphans()[1]
    assert [r.host for r in h.end_orphans(('elsewhere',))[0]] == ['elsewhere'] and not h.end_orphans()[1]


# ZenML

@pytest.fixture(scope='module')
def stack(stack):
    "The MLflow that the stack of the session tracks to."
    return f"sqlite:///{artifacts_dir()/'mlflow.db'}"


@pytest.mark.system
def test_f45_killed_pipeline_run(stack, home, monkeypatch):
    "A run at work is left alone; killed, it is gone with its kernel, records are told, and the next run is unaffected."
    from zenml.client import Client

    from zenml_pipelines.orphaned import abandon, running_mlflow
    monkeypatch.chdir(ROOT); monkeypatch.setenv('MLFLOW_TRACKING_URI', stack)
    raw = synthesize(home/'raw', 60, 5, progress=False)
    (raw/STATE).mkdir()
    (home/'i.yaml').write_text(yaml.safe_dump(dict(parameters=dict(raw_dir=str(raw), data_dir=str(home/'data')))))
    schedule(home, dict(name='ingestion', pipeline='ingestion', config=str(home/'i.yaml'), timeout_s=300))
    trigger = [sys.executable, '-m', 'rakuten_mm', 'scheduler', 'trigger', 'ingestion', '--schedule',
               str(home/'schedule.yaml')]
    before = len(abandon().unknown)
    # the notebook waits for the lock
    with FileLock(raw/STATE/'lock'), subprocess.Popen(trigger, stdout=subprocess.DEVNULL) as it:
        try:
            at_work(60)
            below = lambda: psutil.Process(it.pid).children(recursive=True)
            until(lambda: [p for p in below() if not ended(p) and 'ipykernel_launcher' in p.cmdline()], 180)
            name,mlflow = next((r.info.run_name, r.info.run_id) for r in running_mlflow()
                               if r.info.run_name.startswith('ingestion-'))
            found = abandon()
            assert (found.ended, found.alive, found.errors) == ([], 3, [])
            family = below()
        finally: it.kill()
        until(lambda: all(map(ended, family)))
    with tracked_run(name='at work') as live:
        tried = CliRunner().invoke(cli, ['runs', 'abandon', '--dry-run'])
        assert tried.exit_code == 0 and tried.output.count('would mark') == 3, tried.output
        assert mlflow_client().get_run(mlflow).info.status == 'RUNNING' and outcomes() == ['running']
        marked = CliRunner().invoke(cli, ['runs', 'abandon'])
        assert marked.exit_code == 0 and f'3 orphaned, 1 at work, {before} nobody' in marked.output, marked.output
        assert mlflow_client().get_run(live).info.status == 'RUNNING'
    killed = mlflow_client().get_run(mlflow)
    assert killed.info.status == 'KILLED' and killed.data.tags['abandoned'] == 'its process is gone'
    zen = Client().list_pipeline_runs(name=name, hydrate=True).items[0]
    assert zen.status == 'failed'
    assert {n: s.status for n,s in zen.steps.items()} == dict(fetch='completed', ingest='failed')
    assert outcomes() == ['abandoned']
    (raw/WHOLE).touch()
    assert subprocess.run(trigger, stdout=subprocess.DEVNULL).returncode == 0
    assert outcomes() == ['abandoned', 'ok'] and (home/'data'/'CURRENT').exists() and not abandon().ended


def test_native_schedules(stack, home, monkeypatch):
    "Where the orchestrator runs schedules itself it gets the same expressions, once; where not, it is said."
    from zenml.client import Client
    from zenml.orchestrators.local.local_orchestrator import LocalOrchestrator, LocalOrchestratorConfig
    monkeypatch.chdir(ROOT)
    s = schedule(home, dict(cron='0 2 * * mon-fri'))
    with pytest.raises(ValueError, match='the local orchestrator of stack rakuten_local runs no schedules'):
        native_schedules(s)
    monkeypatch.setattr(LocalOrchestratorConfig, 'is_schedulable', True)
    submitted = []
    monkeypatch.setattr(LocalOrchestrator, 'submit_pipeline', lambda self, snapshot,
                        **kw: submitted.append(snapshot.schedule.cron_expression))
    with pytest.raises(ValueError, match='check in another time zone'):
        native_schedules(schedule(home, dict(timezone='Europe/Paris')))
    s = schedule(home, dict(cron='0 2 * * mon-fri'), dict(name='often', pipeline='ingestion', cron='*/5 * * * *'))
    (home/'c.yaml').write_text('parameters: {}')
    assert native_schedules(s) == ['check: 0 2 * * mon-fri registered', 'often: */5 * * * * registered']
    assert submitted == ['0 2 * * mon-fri', '*/5 * * * *']
    assert {x.name: x.cron_expression for x in Client().list_schedules()} == {'check': '0 2 * * mon-fri',
                                                                              'often': '*/5 * * * *'}
    assert native_schedules(schedule(home, dict(cron='0 2 * * mon-fri')))[0].endswith('unchanged')
    assert 'still has 0 2 * * mon-fri' in native_schedules(schedule(home, dict(cron='0 4 * * *')))[0]
    assert len(submitted) == 2
