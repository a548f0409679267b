"The page at `/`, in a real browser against a real server."
import io
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from sqlalchemy import MetaData, Table, create_engine, select, text

CHROMIUM,DRIVER = shutil.which('chromium'), shutil.which('chromedriver')
LANES = {'auto': ('Filed automatically', 'Classement automatique'), 'review': ('Needs a person', 'À vérifier'),
         'reject': ('Back to the seller', 'À renvoyer au vendeur')}
ROOT = Path(__file__).parents[1]
AXE = (ROOT/'tests'/'axe-core'/'axe.min.js').read_text(encoding='utf-8')
SHOTS = os.environ.get('RAKUTEN_MM_SCREENSHOTS')
MISSING = "needs Debian's packages chromium and chromium-driver"
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason=MISSING)


@pytest.fixture(scope='module')
def chromium(page_server, tmp_path_factory):
    "A French headless browser that keeps a log of its console and of its requests."
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for a in ('--headless=new', '--no-sandbox', '--disable-dev-shm-usage', '--disable-gpu', '--no-first-run',
              '--disable-background-networking', f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(a)
    options.add_experimental_option('prefs', {'intl.accept_languages': 'fr-FR', 'credentials_enable_service': False})
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL', 'performance': 'ALL'})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Page:
    "What a person sees and does."
    def __init__(self, driver, server): self.driver,self.server = driver,server

    def wait(self, found, s=60):
        return WebDriverWait(self.driver, s, .1, [StaleElementReferenceException]).until(lambda _: found())

    def all(self, css): return self.driver.find_elements(By.CSS_SELECTOR, css)
    def js(self, code, *args): return self.driver.execute_script(f'return {code}', *args)
    def see(self, css): return self.wait(lambda: next((e for e in self.all(css) if e.is_displayed()), None))
    def focused(self): return self.js('document.activeElement.id')

    def text(self, css):
        "Text of an element once it has any."
        return self.wait(lambda: self.js('document.querySelector(arguments[0])?.innerText.trim()', css))

    def size(self, width, height):
        "The viewport of another device; a window cannot be this narrow."
        shape = dict(width=width, height=height, deviceScaleFactor=1, mobile=width < 700)
        self.driver.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', shape)

    def type(self, css, text):
        (box := self.see(css)).clear(); box.send_keys(text)

    def press(self, keys): ActionChains(self.driver).send_keys(keys).perform()

    def sign_in(self, password=None):
        self.type('#user', self.server.user); self.type('#password', password or self.server.password)
        self.press(Keys.ENTER)

    def enter(self, page='predict'):
        "Sign in and open a page."
        self.sign_in(); self.see('#predict-form')
        if page != 'predict': self.see(f'#nav-{page}').click()

    def stub(self, path, *answers):
        "Have the next calls of `path` answered with a status, or not at all (0)."
        self.driver.execute_script('''const code = {401: 'unauthorized', 503: 'overloaded', 500: 'internal_error'};
            const real = window.fetch, left = [...arguments[1]];
            window.fetch = async (to, how) => {
                if (to !== arguments[0] || !left.length) return real(to, how);
                const status = left.shift(); if (!status) throw new TypeError('Failed to fetch');
                const body = JSON.stringify({error: {code: code[status], message: 'stub', fields: []}});
                return new Response(body, {status, headers: {'Retry-After': '1'}});
            };''', path, answers)

    def dark(self, on:bool):
        scheme = [{'name': 'prefers-color-scheme', 'value': 'dark' if on else 'light'}]
        self.driver.execute_cdp_cmd('Emulation.setEmulatedMedia', {'features': scheme})

    def findings(self):
        "Rules of axe-core that the page breaks now, and where."
        if not self.js('!!window.axe'): self.driver.execute_script(AXE)
        return self.driver.execute_async_script('''const done = arguments[0];
            axe.run(document, {resultTypes: ['violations']}).then(
                r => done(r.violations.flatMap(v => v.nodes.map(n => `${v.id} ${n.target}: ${n.failureSummary}`))),
                e => done([String(e)]));''')

    def fits(self): return self.js('document.documentElement.scrollWidth <= document.documentElement.clientWidth')

    def shot(self, folder, name):
        "Screenshot of the whole page, however long."
        w,h = self.js('[innerWidth, Math.max(innerHeight, document.documentElement.scrollHeight)]')
        self.size(w, h); self.driver.save_screenshot(str(folder/f'{name}.png'))


def requested(driver):
    "Addresses that were asked for since this was last called."
    events = (json.loads(e['message'])['message'] for e in driver.get_log('performance'))
    return [e['params']['request']['url'] for e in events if e['method'] == 'Network.requestWillBeSent']


@pytest.fixture
def page(chromium, page_server, tmp_path, request):
    "The page as on a first visit. Afterwards: nothing in the console, nothing asked of another host."
    p = Page(chromium, page_server)
    p.dark(False); p.size(1280, 900)
    chromium.get(page_server.url); p.js('(localStorage.clear(), sessionStorage.clear())')
    requested(chromium), chromium.get_log('browser')
    chromium.get('about:blank'); chromium.get(page_server.url+'/'); p.see('#sign-in-form')
    yield p
    folder = Path(os.environ.get('RAKUTEN_MM_SCREENSHOTS') or tmp_path); folder.mkdir(parents=True, exist_ok=True)
    p.shot(folder, re.sub(r'\W+', '_', request.node.name))
    asked,console = requested(chromium), [e['message'] for e in chromium.get_log('browser') if e['level'] == 'SEVERE']
    assert asked and {u for u in asked if not u.startswith((page_server.url+'/', 'blob:', 'data:', 'about:'))} == set()
    assert [m for m in console if not ('/token' in m and '401' in m)] == []


def photo(size=(320,200)):
    "A JPEG of a blue pool on green."
    im,(w,h) = Image.new('RGB', size, (96,150,84)), size
    ImageDraw.Draw(im).ellipse([w//6, h//5, w*5//6, h*4//5], fill=(40,130,200))
    im.save(buf := io.BytesIO(), 'JPEG')
    return buf.getvalue()


@pytest.fixture
def api(page_server):
    "A client with the same rights as the page."
    with page_server.http() as client: yield client


def to_review(api, n):
    "`n` listings that wait for review, in a seller's HTML; the model may send others back to the seller."
    ids = set()
    for i in range(60):
        data = {'designation': f'Piscine ronde hors-sol n° {i}, liner bleu',
                'description': '<p style="color:red">Filtre &agrave; sable<br>et échelle</p>'}
        answer = api.post('/predict/upload', data=data, files={'image': photo()}).json()
        if answer['lane'] == 'review': ids.add(answer['prediction_id'])
        if len(ids) == n: return ids
    raise AssertionError(f'{len(ids)} of {n} listings were put in the review lane')


def predict(page, title):
    "Ask for a listing that has no more than a title, and see its answer."
    page.type('#designation', title); page.see('#predict-button').click(); page.text('#result-title')


def test_wrong_password_then_right(page):
    page.sign_in('wrong'); assert page.text('#sign-in-error') == 'Identifiant ou mot de passe incorrect.'
    assert page.focused() == 'password' and page.js("document.getElementById('password').value") == ''
    assert not page.all('#nav:not([hidden])')
    page.sign_in(); page.see('#predict-form')
    assert page.see('#nav-predict').get_attribute('aria-current') == 'page' and page.see('#nav-review')
    assert page.focused() == 'designation'
    page.driver.refresh(); page.see('#predict-form')  # the session outlives a reload, the password is nowhere
    assert page.server.password not in page.js('JSON.stringify([{...localStorage}, {...sessionStorage}])')
    page.see('#sign-out').click(); page.see('#sign-in-form'); assert page.js('sessionStorage.length') == 0
    page.driver.refresh(); page.see('#sign-in-form')


def test_predict_and_why(page, tmp_path):
    (tmp_path/'piscine.jpg').write_bytes(photo())
    title,description = 'Piscine ronde 🏊 hors-sol 3 m', 'Liner bleu, filtre à sable et échelle.'
    page.enter(); page.type('#designation', title); page.type('#description', description)
    page.driver.find_element(By.ID, 'photo').send_keys(str(tmp_path/'piscine.jpg'))
    page.wait(lambda: page.js("document.getElementById('preview-image').naturalWidth") == 320)
    page.see('#predict-button').click()
    assert page.text('#result-title') and page.focused() == 'result-title'
    percent = lambda e: float(re.sub('[\u202f\xa0 %]', '', e.text).replace(',', '.'))
    shares = [percent(e) for e in page.all('#ranked .percent')]
    assert 2 <= len(shares) <= 5 and shares == sorted(shares, reverse=True)
    assert page.all('#ranked li')[0].text.startswith(page.text('#result-title'))
    lane = page.see('#lane').get_attribute('data-lane')
    assert LANES[lane][1] in page.text('#lane') and bool(page.all('#candidates li')) == (lane == 'review')
    assert 'texte + photo' in page.text('#about') and page.text('#version')
    page.all('#ranked input')[1].click(); page.see('#why').click()  # the runner-up
    runner_up = page.all('#ranked .name')[1].text.rsplit(' ', 1)[0]
    assert page.text('#why-title').startswith(f'Pourquoi «\xa0{runner_up}\xa0»')
    assert page.text('#words .title') == title and page.all('#words mark')
    assert {w.get_attribute('title').split(' ', 1)[1] for w in page.all('#words mark')} <= {'(pour)', '(contre)'}
    assert {w.text for w in page.all('#words mark')} <= {*f'{title} {description}'.split()}
    assert len(page.all('#heat .cell')) == 49 and len(page.all('#shares li')) == 2
    assert page.js("document.querySelector('#heat img').naturalWidth") == 320
    page.see('#overlay').click(); assert not page.see('#heat').find_element(By.CSS_SELECTOR, '.cells').is_displayed()
    page.see('#overlay').click()


def test_confirm(page):
    "One click says that the answer is right, or that the ticked one is; who may not review has no such button."
    page.enter(); predict(page, 'Piscine gonflable')
    codes = [int(e.get_attribute('value')) for e in page.all('#ranked input')]
    def stored():
        engine = create_engine(page.server.database)
        last = text('select prdtypecode, reviewer from feedback order by id desc limit 1')
        with engine.connect() as c: rows = c.execute(last).all()
        engine.dispose()
        return rows
    page.see('#confirm').click(); page.wait(lambda: page.text('#confirm-status').startswith('Enregistré'))
    assert page.text('#result-title') in page.text('#confirm-status') and stored() == [(codes[0], page.server.user)]
    page.all('#ranked input')[1].click(); page.see('#confirm').click()
    page.wait(lambda: page.all('#ranked .name')[1].text.rsplit(' ', 1)[0] in page.text('#confirm-status'))
    assert stored() == [(codes[1], page.server.user)]
    page.see('#lang-en').click(); page.wait(lambda: page.text('#confirm-status').startswith('Saved'))
    page.stub('/feedback', 500); page.see('#confirm').click()
    page.wait(lambda: 'went wrong' in page.text('#confirm-error'))
    assert stored() == [(codes[1], page.server.user)]
    demoted = "{...JSON.parse(sessionStorage.getItem('session')), role: 'predict'}"
    page.js(f"sessionStorage.setItem('session', JSON.stringify({demoted}))")
    page.driver.refresh(); predict(page, 'Vase')
    assert not page.all('#confirm')


def test_listing_that_cannot_be_read(page, tmp_path):
    (tmp_path/'page.jpg').write_bytes(b'<html>404</html>')
    page.enter(); page.see('#predict-button').click()
    assert page.text('#predict-error') == 'Donnez un titre, une description ou une photo.'  # not even asked
    page.driver.find_element(By.ID, 'photo').send_keys(str(tmp_path/'page.jpg'))
    page.type('#designation', 'Livre'); page.see('#predict-button').click()
    page.wait(lambda: 'Cette photo ne peut pas être lue.' in page.text('#predict-error'))
    page.see('#photo-remove').click(); page.see('#predict-button').click(); assert page.text('#result-title')
    assert [m for m in page.driver.get_log('browser') if m['level'] == 'SEVERE' and '422' not in m['message']] == []


def test_review_by_keyboard(page, api):
    "Number, Enter and search each file a listing; what is on show is what is stored."
    to_review(api, 5); names,chosen = api.get('/categories').json(), {}
    page.enter('review')
    def item():
        page.see('#item'); page.wait(lambda: page.focused() == 'item-title')
        return page.js("document.getElementById('item').dataset.prediction")
    def choice(i): return page.js("[...document.querySelectorAll('.choice')].map(c => +c.dataset.code)")[i]
    def after(seen): page.wait(lambda: page.all('#item[data-prediction]') and item() != seen)
    first = item(); page.wait(lambda: page.js("document.getElementById('item-image')?.naturalWidth"))
    page.press('s'); after(first); page.press('u'); page.wait(lambda: item() == first)  # on and back
    for n,key in enumerate(('2', Keys.ENTER)):
        seen = item(); chosen[seen] = choice(1-n); page.press(key); after(seen)
        assert page.text('#review-status').startswith('Enregistré') and page.text('#count-done') == str(n+1)
    seen,want = item(), names[-1]
    page.press('/'); assert page.focused() == 'search'
    page.press(want['fr'])
    active = lambda: page.js("+document.querySelector('#search-matches [aria-selected=true]')?.dataset.code")
    for _ in names:
        if active() == want['prdtypecode']: break
        page.press(Keys.ARROW_DOWN)
    chosen[seen] = active(); assert chosen[seen] == want['prdtypecode']
    page.press(Keys.ENTER); after(seen); assert page.text('#count-done') == '3'
    engine = create_engine(page.server.database)
    with engine.connect() as c:
        feedback = Table('feedback', MetaData(), autoload_with=c)
        rows = c.execute(select(feedback).where(feedback.c.prediction_id.in_(chosen))).all()
    engine.dispose()
    assert {r.prediction_id: r.prdtypecode for r in rows} == chosen and {r.reviewer for r in rows} == {page.server.user}


def test_next_image_is_there_already(page, api):
    "While a listing is looked at the image of the next is fetched, once."
    to_review(api, 3)
    names = "performance.getEntriesByType('resource').map(r => r.name)"
    asked = lambda: page.js(f"{names}.filter(n => n.endsWith('/image'))")
    page.enter('review'); page.see('#item-image')
    page.wait(lambda: len(asked()) == 2)
    shown = lambda: page.js("document.getElementById('item').dataset.prediction")
    loaded = lambda: page.js("document.getElementById('item-image')?.naturalWidth")
    page.press('s'); page.wait(lambda: loaded() and asked()[1].split('/')[-2] == shown())
    page.wait(lambda: len(asked()) == 3); assert len(set(asked())) == 3


def test_busy_server_and_save_that_fails(page, api):
    "A busy server is asked again; a correction that is not stored is not lost."
    to_review(api, 1); page.enter(); page.stub('/predict/upload', 503, 503)
    page.type('#designation', 'Vase'); page.press(Keys.ENTER)
    assert 'Nouvel essai dans 1 s (2 sur 3)' in page.text('#notice') and page.text('#result-title')
    assert page.js("document.getElementById('notice').innerText") == ''
    page.see('#nav-review').click(); page.see('#item')
    assert not page.js("/[<&]/.test(document.getElementById('item').innerText)")
    for answers,message in (((500,), 'Une erreur s’est produite'), ((0,), 'ne répond pas'), ((503,)*3, 'est occupé')):
        title = page.text('#item-title'); page.stub('/feedback', *answers); page.press('1')
        page.wait(lambda m=message: m in page.js("document.getElementById('review-error').innerText"))
        assert page.text('#item-title') == title and page.text('#count-done') == '0' and not page.all('#yours')
    page.press('1'); page.wait(lambda: page.text('#count-done') == '1')


def test_session_that_ends(page):
    "Signing in again goes on where the session ended."
    page.enter(); page.type('#designation', 'Vase'); page.stub('/predict/upload', 401); page.press(Keys.ENTER)
    assert page.text('#sign-in-error').startswith('Votre session est terminée')
    page.sign_in(); page.see('#predict-form'); assert page.js("document.getElementById('designation').value") == 'Vase'


def test_skipped_to_the_end(page, api):
    "Skipping everything is not a dead end."
    to_review(api, 2); page.enter('review'); page.see('#item')
    for _ in range(200):
        if page.wait(lambda: page.all('#empty') or page.all('#item')) and page.all('#empty'): break
        page.press(Keys.ARROW_RIGHT)
    page.see('#again').click(); page.see('#item')


def test_phone(page, api, tmp_path):
    to_review(api, 1); (tmp_path/'piscine.jpg').write_bytes(photo((200,320)))
    page.size(360, 740); assert page.fits()
    page.enter(); page.type('#designation', 'Piscine '+'x'*80)
    page.driver.find_element(By.ID, 'photo').send_keys(str(tmp_path/'piscine.jpg')); assert page.fits()
    page.see('#predict-button').click(); page.text('#result-title')
    page.see('#why').click(); page.text('#why-title'); assert page.fits()
    page.see('#nav-review').click(); page.see('#item'); assert page.fits()


def test_languages(page):
    lang = lambda: page.js('document.documentElement.lang')
    said = lambda: (lang(), page.text('label[for=password]'), page.text('#sign-in-button'))
    assert said() == ('fr', 'Mot de passe', 'Se connecter')
    page.see('#lang-en').click(); assert said() == ('en', 'Password', 'Sign in')
    assert page.see('#lang-en').get_attribute('aria-pressed') == 'true'
    page.driver.refresh(); page.see('#sign-in-form'); assert said()[0] == 'en'
    page.enter(); predict(page, 'Piscine')
    en,fr = LANES[page.see('#lane').get_attribute('data-lane')]
    assert en in page.text('#lane') and page.driver.title.startswith('Classify')
    page.see('#lang-fr').click(); assert fr in page.text('#lane') and page.text('#nav-review') == 'Vérifier'


@pytest.mark.parametrize(('width', 'dark'), [(1280, False), (390, True)], ids=['wide-light', 'phone-dark'])
def test_accessible_in_every_state(page, api, width, dark):
    "axe-core has nothing to say about the page in any state, and nothing is wider than the window."
    to_review(api, 2); page.dark(dark); page.size(width, 844); page.see('#lang-en').click()
    def look(state):
        if SHOTS: page.shot(Path(SHOTS), f'{state}-{width}-{"dark" if dark else "light"}'); page.size(width, 844)
        assert page.findings() == [] and page.fits(), state
    look('sign_in'); page.sign_in('wrong'); page.text('#sign-in-error'); look('wrong_password')
    page.enter(); look('classify'); page.see('#predict-button').click(); page.text('#predict-error'); look('error')
    page.all('#examples button')[0].click(); page.text('#result-title'); look('answered')
    page.type('#other', 'i'); page.see('#other-matches'); look('searching'); page.press(Keys.ESCAPE)
    page.see('#why').click(); page.text('#why-title'); look('why')
    page.see('#preview-zoom').click(); page.see('#zoom[open]'); look('zoom'); page.see('#zoom-close').click()
    page.see('#nav-review').click(); page.see('#item-image'); look('review')
    page.see('#unusable summary').click(); page.see('#unusable button'); look('unusable')
    page.see('#item-why').click(); page.text('#item-why-title'); look('review_why')
    page.stub('/feedback', 500); page.press('1'); page.text('#review-error'); look('not_saved')
    for _ in range(300):
        if page.wait(lambda: page.all('#empty') or page.all('#item')) and page.all('#empty'): break
        page.see('#skip-item').click()
    page.see('#again'); look('empty')


def test_examples_and_any_category(page):
    "One click fills the form, draws the photo and asks; every category can be found, ticked and confirmed."
    page.enter(); page.all('#examples button')[1].click(); page.text('#result-title')
    assert page.js("document.getElementById('designation').value") == 'Lot de 3 romans policiers'
    assert page.js("document.getElementById('preview-image').naturalWidth") == 320 and 'photo' in page.text('#about')
    shown = [e.get_attribute('value') for e in page.all('#ranked input')]
    with page.server.http() as api:
        far = next(c for c in api.get('/categories').json() if str(c['prdtypecode']) not in shown)
    page.type('#other', str(far['prdtypecode'])); page.press(Keys.ENTER)
    page.wait(lambda: page.all('#extra input:checked'))
    assert far['fr'] in page.text('#extra .name') and page.focused() != 'other'
    page.see('#confirm').click(); page.wait(lambda: far['fr'] in page.text('#confirm-status'))


def test_answer_is_in_sight_on_a_phone(page):
    page.size(390, 700); page.enter(); page.all('#examples button')[2].click(); page.text('#result-title')
    top = page.wait(lambda: page.js("document.getElementById('result-title').getBoundingClientRect().top"))
    assert 0 <= top < 350


def test_unusable_zoom_and_pace(page, api):
    "A listing without a category is told by keyboard, leaves the queue, and has a reason; the photo is enlarged."
    to_review(api, 4); page.enter('review'); page.see('#item-image')
    item = lambda: page.js("document.getElementById('item')?.dataset.prediction")
    page.press('z'); page.see('#zoom[open]'); assert page.text('#zoom-close') == 'Fermer'
    page.press(Keys.ESCAPE); page.wait(lambda: not page.all('#zoom[open]'))
    seen = []
    for n in range(3):
        seen.append(item()); page.press('x')
        page.wait(lambda: page.js('document.activeElement.dataset.reason') == 'unreadable')
        page.press(Keys.TAB); page.press(Keys.ENTER)
        page.wait(lambda n=n: page.text('#count-done') == str(n+1) and item() not in seen)
    assert 'Inutilisable (Texte et photo se contredisent)' in page.text('#review-status')
    assert re.match(r'· [\d\s]+ par heure', page.text('#pace')) and int(page.text('#count-all')) >= 4
    engine = create_engine(page.server.database)
    with engine.connect() as c:
        last = text('select prediction_id, prdtypecode, unusable from feedback order by id desc limit 3')
        rows = c.execute(last).all()
    engine.dispose()
    assert rows == [(i, None, 'contradictory') for i in reversed(seen)]
    page.press(Keys.ARROW_LEFT); page.wait(lambda: item() == seen[-1])
    assert 'Inutilisable' in page.text('#yours')


def test_short_list_and_filter(page, api):
    "What is guaranteed stands apart with a bar for each probability; one category can be looked at alone."
    to_review(api, 2); page.enter('review'); page.see('#item')
    first = api.get('/review?limit=1').json()
    sure = first['items'][0]['candidates']
    assert [int(e.get_attribute('data-code')) for e in page.all('#sure .choice')] == sure
    assert len(page.all('#item .choice .meter')) == len(page.all('#item .choice .percent')) > 1
    numbers = [e.text for e in page.all('#item .choice kbd')]
    assert numbers == [str(i+1) if i < 9 else '·' for i in range(len(numbers))]
    least = first['categories'][-1]
    page.see(f"#filter option[value='{least['prdtypecode']}']").click()
    page.wait(lambda: page.text('#count-all') == str(least['waiting']) and page.all('#item'))
    assert page.js("document.getElementById('filter').value") == str(least['prdtypecode'])
    page.see("#filter option[value='']").click()
    page.wait(lambda: page.text('#count-all') == str(first['waiting']))


def test_each_text_has_one_name():
    "A second text under the same name would silently replace the first."
    names = re.findall(r"^  (\w+): \[", (ROOT/'serving'/'static'/'i18n.js').read_text(encoding='utf-8'), re.M)
    assert len(names) == len({*names}) > 100
