// Calls of the API: the token, the one error body, and patience with a busy server.
import {$, h, say} from './dom.js';
import {lang, t} from './i18n.js';

const TRIES = 3, LONGEST = 30; // attempts at a call, and seconds that are worth waiting between them

export let session = JSON.parse(sessionStorage.getItem('session') ?? 'null'); // {token, role, user, until}
if (session?.until < Date.now()) setSession(null);
export const mayReview = () => ['review', 'admin'].includes(session?.role);
let names = new Map(); // prdtypecode -> {fr, en}
let model = {}; // what /version says
let expired = () => {};

export class ApiError extends Error {
  constructor(status, {code = 'internal_error', message = '', fields = []} = {}, wait = 0) {
    super(message);
    Object.assign(this, {status, code, fields, wait});
  }
}

export const onExpired = f => { expired = f; };

export function setSession(to) {
  session = to;
  to ? sessionStorage.setItem('session', JSON.stringify(to)) : sessionStorage.removeItem('session');
}

/** The answer to a GET, or to a POST if there is `json` or a `form`; raises `ApiError`. */
export async function call(path, {json, form, as = 'json', tries = TRIES} = {}) {
  const mine = session, headers = mine ? {Authorization: `Bearer ${mine.token}`} : {};
  if (json) headers['Content-Type'] = 'application/json';
  const body = json ? JSON.stringify(json) : form;
  for (let n = 1; ; n++) {
    let r, answer;
    try { // `omit` keeps the browser from asking for a password itself at a 401
      r = await fetch(path, {method: body ? 'POST' : 'GET', headers, body, cache: 'no-store', credentials: 'omit'});
      answer = r.ok ? await r[as]() : await r.json().catch(() => ({}));
    } catch { throw new ApiError(0, {code: 'network'}); }
    if (mine !== session) throw new ApiError(0, {code: 'cancelled'}); // signed out meanwhile
    if (r.ok) return answer;
    const wait = seconds(r.headers.get('Retry-After'));
    if (r.status === 401 && mine) { expired(); throw new ApiError(401, {code: 'cancelled'}); }
    if (r.status !== 503 || n >= tries || wait > LONGEST) throw new ApiError(r.status, answer.error, wait);
    await pause(wait, n+1);
  }
}

/** Seconds in a Retry-After header, which may be a date. */
function seconds(header) {
  const s = /^\d+$/.test(header ?? '') ? +header : (Date.parse(header) - Date.now())/1000;
  return Math.max(1, Math.ceil(Number.isFinite(s) ? s : 2));
}

/** Wait, and say so, with a button for those who will not. */
function pause(s, n) {
  return new Promise(done => {
    const go = () => { clearTimeout(timer); say($('notice')); done(); }, timer = setTimeout(go, s*1000);
    say($('notice'), () => [h('p', {}, t('retryWait', {s, n, of: TRIES})), h('button', {type: 'button', id: 'retry-now', onclick: go}, t('retryNow'))]);
  });
}

/** Ask for the names of all categories; without them the labels of answers do. */
export async function loadNames() {
  names = new Map((await call('/categories').catch(() => [])).map(c => [c.prdtypecode, c]));
}

/** Ask what the model that answers is. */
export async function loadModel() { model = await call('/version').catch(() => ({})); }

export const modelNow = () => model;
export const nameOf = (code, label = String(code)) => names.get(code)?.[lang] || label;
/** Message about stored feedback, and what most reviewers say. */
export const outcome = a => !a.conflict ? 'saved' : a.verdict == null && !a.is_unusable ? 'savedConflict' : 'savedSettled';
export const mostSay = a => a.is_unusable ? t('unusable') : nameOf(a.verdict);
export const allNames = () => [...names.values()];
