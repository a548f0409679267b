"Benchmarks: the harness, the client that loads servers, and the figures of the front page."
import json
import pickle
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from benchmarks import figures, harness, load


def test_front_page_has_the_figures_of_the_results():
    nb = json.loads(figures.INDEX.read_text(encoding='utf-8'))
    text = '\n'.join(''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'markdown')
    assert figures.filled(text) == text, 'run python -m benchmarks.figures'
    marked = [m[2] for m in figures.MARK.finditer(text)]
    assert {'retraining', 'serving', 'quality'} <= {*marked} <= {*figures.TABLES}
    readme = (harness.ROOT/'README.md').read_text(encoding='utf-8')
    for name in marked: assert figures.table(name) in readme, 'run python scripts/build_docs.py --readme'


@pytest.mark.parametrize('path', sorted(harness.RESULTS.glob('*.json')), ids=lambda p: p.stem)
def test_a_result_says_where_it_was_measured(path):
    text = path.read_text(encoding='utf-8')
    r = json.loads(text)
    assert path.stem.split('-')[0] == r['benchmark']
    assert re.fullmatch('[0-9a-f]{7,40}', r['commit'])
    assert re.fullmatch(r'\d{4}-\d\d-\d\d', r['date'])
    assert r['seconds'] > 0
    assert not r['arguments']['quick']
    assert {'cpu', 'instructions', 'cores'} <= {*r['machine']}
    assert not re.search(r'"(/|[A-Z]:\\)|/(home|root|tmp|work)/', text)
    assert any(key in r for key,*_ in figures.TABLES[r['benchmark']])


def bench(args, work):
    (work/'here').write_text('')
    return dict(speed=2., empty=float('nan'), table={1: args.file})


def test_main_writes_a_result(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('API_PASSWORD', 'secret')
    monkeypatch.setenv('RAKUTEN_MM_ARTIFACTS', '')
    out = tmp_path/'out.json'
    own = ['--file', '/some/where.csv']
    monkeypatch.setattr(sys, 'argv', ['x', '--json', str(out), '--quick', '--work', str(tmp_path), *own])
    file = harness.option('--file', type=harness.Path)
    harness.main(bench, 'Doc.', file, seeds=3, parts=('a', 'b'), bars=dict(speed='>= 3', empty='< 1'))
    printed = capsys.readouterr().out
    assert re.search(r'speed +2.0000 +>= 3 MISSED', printed)
    assert re.search('empty +nan +< 1 MISSED', printed)
    r = json.loads(out.read_text())
    assert r['arguments'] == dict(file='where.csv', seeds=1, only=['a', 'b'], quick=True, cores=0)
    assert r['empty'] is None
    assert r['table'] == {'1': 'where.csv'}
    assert r['machine']['libraries']['torch']
    assert str(tmp_path) not in out.read_text()


def test_turns_and_children():
    calls = []
    seen = harness.in_turns(dict(a=lambda: calls.append('a') or 2, b=lambda: calls.append('b') or 4), 3)
    assert calls == ['a', 'b']*3
    assert harness.median_ratio(seen['b'], seen['a']) == 2
    r = harness.call(harness.plain, dict(x=dict(one=1)))
    assert r['one'] == 1
    assert r['wall_s'] > 0
    assert r['peak_mb'] > 5
    with pytest.raises(SystemExit): harness.call(harness.plain, dict(wrong=1))


class Answer(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def do_POST(self):
        n = int(self.rfile.read(int(self.headers['Content-Length'])))
        if n == 2: self.close_connection = True; return  # without an answer
        status,body = (503, b'{}') if n == 1 else (200, b'{"model_version":"m/1"}')
        self.send_response(status); self.send_header('Content-Length', str(len(body))); self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args): pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(('127.0.0.1', 0), Answer) as s:
        threading.Thread(target=s.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{s.server_port}'
        s.shutdown()


def test_the_client_records_every_request(server, tmp_path):
    bodies = tmp_path/'bodies.pickle'
    bodies.write_bytes(pickle.dumps([b'0', b'1', b'2']))
    job = dict(url=server, bodies=str(bodies), auth={}, versions=True)
    seen = harness.finish(harness.start(load.run, job | dict(how='closed', load=dict(clients=2, count=9))))['records']
    assert sorted(r[3] for r in seen) == [0]*3+[200]*3+[503]*3
    assert {r[4] for r in seen if r[3] == 200} == {'m/1'}
    assert all(due <= sent <= ended for due,sent,ended,*_ in seen)
    r = harness.finish(harness.start(load.run, job | dict(how='open', load=dict(rate=100, seconds=1, seed=0))))
    assert 60 < len(r['records']) == r['arrived'] < 140
