// Sign in, navigation and language; the two pages are in predict.js and review.js.
import {call, loadModel, loadNames, mayReview, onExpired, session, setSession} from './api.js';
import {$, h, say, sayError} from './dom.js';
import {lang, setLanguage, t} from './i18n.js';
import * as predict from './predict.js';
import * as review from './review.js';

let last = null; // who the pages were filled by; somebody else gets empty ones

/** Show the page that the address names, or the way in. */
function route() {
  const page = !session ? 'sign-in' : location.hash === '#review' && mayReview() ? 'review' : 'predict';
  for (const id of ['sign-in', 'predict', 'review']) $(id).hidden = id !== page;
  for (const id of ['nav', 'who', 'sign-out']) $(id).hidden = !session;
  $('nav-review').hidden = !mayReview();
  $('who').textContent = session?.user ?? '';
  for (const id of ['predict', 'review']) id === page ? $(`nav-${id}`).setAttribute('aria-current', 'page') : $(`nav-${id}`).removeAttribute('aria-current');
  document.title = `${t({'sign-in': 'signIn', predict: 'predictTitle', review: 'reviewTitle'}[page])} · rakuten-mm`;
  return page;
}

async function enter() {
  if (last !== session.user) { predict.reset(); review.reset(); }
  last = session.user;
  await Promise.all([loadNames(), loadModel()]);
  setLanguage(lang, false); // says the names, too
  go();
}

/** Route, and let the page begin. */
function go() {
  const page = route();
  if (page === 'review') review.show();
  else $(page === 'predict' ? 'designation' : $('user').value ? 'password' : 'user').focus({preventScroll: true});
}

function leave(message, kind) {
  setSession(null);
  say($('notice'), kind === 'good' ? () => h('p', {}, t(message)) : null);
  say($('sign-in-error'), kind === 'good' ? null : () => h('p', {}, t(message)));
  go();
}

async function signIn() {
  const button = $('sign-in-button'), user = $('user').value.trim(), password = $('password').value;
  if (button.getAttribute('aria-disabled') === 'true' || !user || !password) return;
  button.setAttribute('aria-disabled', 'true');
  say($('sign-in-error')); say($('notice'));
  try {
    const {access_token, expires_in, role} = await call('/token', {form: new URLSearchParams({grant_type: 'password', username: user, password})});
    setSession({token: access_token, role, user, until: Date.now() + expires_in*1000});
    await enter();
  } catch (e) {
    if (e.status === 401) say($('sign-in-error'), () => h('p', {}, t('wrongPassword')));
    else sayError($('sign-in-error'), e);
    $('password').focus();
  } finally {
    $('password').value = '';
    button.setAttribute('aria-disabled', 'false');
  }
}

predict.setup(); review.setup(); predict.reset(); review.reset();
onExpired(() => leave('expired'));
$('zoom').addEventListener('click', () => $('zoom').close());
$('sign-in-form').addEventListener('submit', e => { e.preventDefault(); signIn(); });
$('sign-out').addEventListener('click', () => { last = null; predict.reset(); review.reset(); leave('signedOut', 'good'); });
$('skip').addEventListener('click', e => { e.preventDefault(); $('main').focus(); });
for (const l of ['fr', 'en']) $(`lang-${l}`).addEventListener('click', () => { setLanguage(l); route(); });
addEventListener('hashchange', go);
setLanguage(lang, false);
session ? enter() : go();
