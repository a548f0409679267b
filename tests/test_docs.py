"The site: links, references made from code, and what it looks like in a browser."
import functools
import http.server
import json
import shutil
import subprocess
import sys
import threading

import click
import pytest
from architecture import ALLOWED
from build_docs import arcs, broken_links, flow, foreign, told
from conftest import ROOT
from references import cli_page, commands, http_page, openapi, read_variables, settings_page
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from test_page import CHROMIUM, DRIVER, MISSING

from rakuten_mm.cli.main import cli
from serving.config import ServeConfig

# Texts whose contrast is too low (WCAG 2.1, AA): 4.5, or 3 where they are large
CONTRAST = '''
const parse = c => { const m = c.match(/[\\d.]+/g).map(Number); return c.startsWith('color(') ?
    [m[0]*255, m[1]*255, m[2]*255, m[3] ?? 1] : [m[0], m[1], m[2], m[3] ?? 1]; };
const over = (a, b) => [0, 1, 2].map(i => a[i]*a[3] + b[i]*(1-a[3])).concat(1);
const light = c => { const [r, g, b] = c.map(v => (v /= 255) <= .04045 ? v/12.92 : ((v+.055)/1.055)**2.4);
    return .2126*r + .7152*g + .0722*b; };
const found = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walk.nextNode()) {
  const e = walk.currentNode.parentElement, s = getComputedStyle(e);
  if (!walk.currentNode.data.trim() || !e.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
  if (['SCRIPT', 'STYLE', 'TITLE'].includes(e.tagName) || e.closest('svg')) continue;
  const chain = []; let opacity = 1;
  for (let x = e; x; x = x.parentElement) { chain.unshift(x); opacity *= getComputedStyle(x).opacity; }
  const back = chain.reduce((under, x) => over(parse(getComputedStyle(x).backgroundColor), under), [255, 255, 255, 1]);
  const colour = parse(s.color); colour[3] *= opacity;
  const [a, b] = [light(over(colour, back)), light(back)], ratio = (Math.max(a, b)+.05)/(Math.min(a, b)+.05);
  const size = parseFloat(s.fontSize), large = size >= 24 || (size >= 18.66 && s.fontWeight >= 700);
  const where = `<${e.tagName.toLowerCase()} class="${e.className}">: ${walk.currentNode.data.trim().slice(0, 40)}`;
  if (ratio < (large ? 3 : 4.5)) found.push(`${ratio.toFixed(2)} ${s.color} on ${back} ${where}`);
}
return [...new Set(found)];
'''
# What is cut off, or makes the page scroll sideways: it ends right of the text, and in no box that scrolls
WIDE = '''
const main = document.querySelector('main'), edge = Math.min(main.getBoundingClientRect().right, innerWidth)+1;
const boxed = e => { for (let x = e.parentElement; x !== main; x = x.parentElement)
    if (['auto', 'scroll'].includes(getComputedStyle(x).overflowX)) return true; return false; };
const wide = [...main.querySelectorAll('*')].filter(e => e.getBoundingClientRect().right > edge && !boxed(e));
const page = document.documentElement.scrollWidth > document.documentElement.clientWidth ? ['the page'] : [];
return page.concat(wide.slice(0, 5).map(e => `<${e.tagName.toLowerCase()} class="${e.className}">`));
'''
DARK = 'return document.documentElement.classList.contains("quarto-dark")'
WINGS = [w for w in ALLOWED if (ROOT/'nbs'/'lib'/w).is_dir()]
PAGES = ['index.html', 'tour.html', 'tutorials/first_model.html', 'howto/operate.html', 'gallery/evaluate.html',
         'gallery/ingest.html', 'explanation/architecture.html', 'decisions/index.html', 'reference/cli.html',
         'reference/settings.html', 'lib/data/index.html', 'lib/data/schema.html', 'lib/training/fit.html',
         'research/members.html', 'runs/train.html']


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The whole site as it is published, built from a copy."
    repo = tmp_path_factory.mktemp('site')/'repo'
    skip = shutil.ignore_patterns('.git', '.venv', '_proc', '_docs', '__pycache__', '.ipynb_checkpoints', 'artifacts')
    shutil.copytree(ROOT, repo, ignore=skip)
    built = subprocess.run([sys.executable, 'scripts/build_docs.py'], cwd=repo, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout+built.stderr
    assert built.stdout == f'documentation in {repo}/_docs\n' and not built.stderr, 'it prints problems only'
    return repo/'_docs'


@pytest.fixture(scope='module')
def address(site):
    "A server of the site."
    quiet = type('Quiet', (http.server.SimpleHTTPRequestHandler,), {'log_message': lambda *_: None})
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for a in ('--headless=new', '--no-sandbox', '--disable-dev-shm-usage', '--disable-gpu', '--no-first-run',
              '--disable-background-networking', f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(a)
    options.set_capability('goog:loggingPrefs', {'performance': 'ALL'})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def look(driver, width:int, scheme:str):
    "A window of another width, and of a reader who likes it light or dark."
    shape = dict(width=width, height=900, deviceScaleFactor=1, mobile=width < 700)
    driver.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', shape)
    liked = dict(name='prefers-color-scheme', value=scheme)
    driver.execute_cdp_cmd('Emulation.setEmulatedMedia', dict(features=[liked]))


def requests(driver)->set[str]:
    "Addresses that were asked for since the last call."
    events = (json.loads(e['message'])['message'] for e in driver.get_log('performance'))
    urls = (e['params']['request']['url'] for e in events if e['method'] == 'Network.requestWillBeSent')
    return {u for u in urls if u.startswith(('http', 'ws'))}


@pytest.mark.system
@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason=MISSING)
@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('width', [1280, 390])
def test_looks(browser, address, site, width, scheme):
    "Enough contrast, in search too; the page never scrolls sideways; nothing comes from another host."
    look(browser, width, scheme)
    for path in PAGES:
        browser.get(f'{address}/{path}')
        assert browser.execute_script(DARK) == (scheme == 'dark')
        assert browser.execute_script(CONTRAST) == [], path
        assert browser.execute_script(WIDE) == [], path
        assert browser.find_elements(By.CSS_SELECTOR, 'nav a[href="https://github.com/rakuten-mm/rakuten-mm"]')
    if width < 992: browser.find_element(By.CSS_SELECTOR, '.navbar-toggler').click()
    box = browser.find_element(By.CSS_SELECTOR, '#quarto-search input')
    wait = WebDriverWait(browser, 20)
    wait.until(lambda _: box.is_displayed())
    box.send_keys('quarantine')
    wait.until(lambda d: d.find_elements(By.CSS_SELECTOR, '.search-result mark'))
    assert browser.execute_script(CONTRAST) == [] and browser.execute_script(WIDE) == []
    asked = requests(browser)
    assert asked and all(u.startswith(address) for u in asked)
    browser.execute_script('document.querySelector("main p").style.color = "#777"')
    browser.execute_script('document.querySelector("h1").style.width = "2000px"')
    assert browser.execute_script(CONTRAST) and browser.execute_script(WIDE), 'they find what they look for'


@pytest.mark.system
def test_site_is_whole(site):
    "Chapters, documents and references are there, and each wing opens with its page."
    for path in PAGES: assert (site/path).is_file(), path
    for wing in WINGS: assert 'class="flow"' in (site/'lib'/wing/'index.html').read_text(encoding='utf-8')


def test_references_leave_nothing_out():
    told = cli_page()
    found = [ctx.command_path for _,ctx in commands(cli, click.Context(cli, info_name='rakuten-mm'))]
    assert len(found) > 25 and all(f'{path} ' in told for path in found)
    told = http_page()
    for path,operations in openapi()['paths'].items():
        for method in operations: assert f'## {method.upper()} {path}\n' in told
    told = settings_page()
    for name in [*(f'API_{n.upper()}' for n in ServeConfig.model_fields), *read_variables()]: assert f'`{name}`' in told


def test_every_wing_opens_with_a_page():
    "It names all modules of the wing, in the order of their notebooks."
    for wing in WINGS:
        folder = ROOT/'nbs'/'lib'/wing
        html = flow((folder/'index.md').read_text(encoding='utf-8').split('```flow\n')[1].split('```')[0])
        named = [m.split('.html"')[0] for m in html.split('<a href="')[1:]]
        assert named == [p.stem.partition('_')[2] for p in sorted(folder.glob('*.ipynb'))], wing


def test_drawings():
    assert arcs([('a', 'b'), ('b', 'c')]).count('<circle') == 3
    chart = 'flowchart LR\n    p[("a b")] --> q\n    q -- raw --> r[run]\n    r <-- two --> q\n'
    rows = ['| a b | → | q |  |', '| q | → | run | raw |', '| run | ↔ | q | two |']
    assert told(chart).splitlines()[2:] == rows
    drawn = flow('in: a | b\nthrough: m\nout: <c>\n')
    assert drawn.count('<li>') == 4 and '<a href="m.html">m</a>' in drawn and '&lt;c&gt;' in drawn


def test_problems_are_found(tmp_path):
    "A link that leads nowhere, to a missing heading, and what a browser would load from elsewhere."
    (tmp_path/'styles.css').write_text('')
    (tmp_path/'a.html').write_text('<h2 id="x"></h2><a href="a.html#x"></a><a href="https://example.org"></a>')
    assert not [*broken_links(tmp_path, 'https://s', True), *foreign(tmp_path)]
    (tmp_path/'b.html').write_text('<a href="c.html"></a><a href="a.html#y"></a><a href="https://s/d.html"></a>'
                                   '<script defer src="https://cdn.example.org/x.js"></script>')
    assert [*broken_links(tmp_path, 'https://s', True)] == ['b.html: c.html', 'b.html: a.html#y', 'b.html: https://s/d.html']
    assert len([*foreign(tmp_path)]) == 1
