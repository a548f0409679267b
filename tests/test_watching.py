"Alerts and the dashboard: every figure and label that they name is one that a server has."
import json
import re
import shutil
import subprocess
import time

import pytest
import yaml
from conftest import ROOT
from prometheus_client.parser import text_string_to_metric_families

from serving import metrics

HOME = ROOT/'deploy'/'prometheus'
RULES = yaml.safe_load((HOME/'rules.yaml').read_text())['groups'][0]['rules']
BOARD = json.loads((HOME/'grafana.json').read_text())
QUERIES = [r['expr'] for r in RULES]+[t['expr'] for p in BOARD['panels'] for t in p['targets']]
TESTED = (HOME/'rules.test.yaml').read_text()


def named(query:str)->set[str]:
    "Figures that a query reads: words before a selector."
    return {*re.findall(r'([a-z_]\w*)\{', query)}-{'up'}


def selected(query:str)->set[str]:
    "Labels that a query selects or groups by; those of Prometheus itself left out."
    by = [l.strip() for group in re.findall(r'by \(([^)]*)\)', query) for l in group.split(',')]
    inside = [l for s in re.findall(r'\{([^}]*)\}', query) for l in re.findall(r'(\w+) ?=', s)]
    return {*by, *inside}-{'job', 'instance', 'le'}


@pytest.fixture(scope='module')
def families(server):
    "Figures of a server that has answered once, by name."
    assert server.ask().status_code == 200
    page = lambda: list(text_string_to_metric_families(server.client.get('/metrics').text))
    disk = lambda: next(f.samples[0].value for f in page() if f.name == 'rakuten_disk_free_bytes')
    for _ in range(600):
        if disk(): break
        time.sleep(.1)
    return {f.name: f for f in page()}


def test_queries_read_what_a_server_has(families):
    ends = dict(counter=['_total'], histogram=['_bucket', '_sum', '_count'], gauge=[''])
    there = {f.name+end for f in families.values() for end in ends.get(f.type, [])}
    read = set.union(*map(named, QUERIES))
    assert len(read) > 20 and read <= there, read-there
    assert set(re.findall(r'\brakuten_\w+', ' '.join(QUERIES))) <= there, 'one that is read without a selector'
    own = {m for m in there if re.match('rakuten_(?!worker_process)', m) and not m.endswith('_created')}
    shown = {re.sub('_(bucket|sum|count)$', '', m) for m in read}
    assert {re.sub('_(bucket|sum|count)$', '', m) for m in own} <= shown, 'a figure that nobody looks at'


def test_queries_select_by_labels_that_a_server_has():
    has = {l for m in vars(metrics).values() for l in getattr(m, '_labelnames', ())}
    assert set.union(*map(selected, QUERIES)) <= has
    assert all('job="rakuten-mm"' in s for q in QUERIES for s in re.findall(r'\{([^}]*)\}', q))


def test_the_disk_is_measured(families, tmp_path):
    free,size = (families[f'rakuten_disk{k}_bytes'].samples[0].value for k in ('_free', ''))
    assert size == shutil.disk_usage(tmp_path).total or size > 1e9
    assert 0 < free < size


def test_alerts_say_what_to_do_and_are_tried():
    assert len({r['alert'] for r in RULES}) == len(RULES)
    for r in RULES:
        assert r['labels']['severity'] in ('page', 'ticket') and len(r['annotations']['do']) > 20
        assert f'alertname="{r["alert"]}"' in TESTED, r['alert']
    assert {p['id'] for p in BOARD['panels']} == {*range(1, len(BOARD['panels'])+1)}


@pytest.mark.skipif(not shutil.which('promtool'), reason='promtool is not installed (Debian: prometheus)')
@pytest.mark.parametrize('command', ['check rules rules.yaml', 'check config --syntax-only prometheus.yaml',
                                     'test rules rules.test.yaml'])
def test_prometheus_says_so_too(command):
    r = subprocess.run(['promtool', *command.split()], cwd=HOME, capture_output=True, text=True)
    assert r.returncode == 0, r.stdout+r.stderr
