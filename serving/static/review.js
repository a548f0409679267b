// The queue: one listing at a time, by keyboard if you like.
import {call, mostSay, nameOf, outcome} from './api.js';
import {$, bar, h, say, sayError, zoom} from './dom.js';
import {number, onLanguage, percent, t, when} from './i18n.js';
import {categorySearch} from './search.js';
import {explanation} from './why.js';

const PAGE = 20, LIMIT = 100; // listings asked for at once: at first, and when many were skipped
const UNUSABLE = ['unreadable', 'contradictory', 'several', 'no_category', 'not_a_product'];
let items, at;        // listings seen so far, each with `said` (a category or a reason for none) or `skipped` once dealt with, and the one on show
let times, wanted, categories = []; // when listings were dealt with; the category that is looked at, of those that wait
let waiting, busy, picture, round = 0; // `picture` is the listing whose picture is on show
const pictures = new Map(); // prediction_id -> promise of its picture's address in this page
let keys = localStorage.getItem('keys') !== 'off';

export function setup() {
  addEventListener('keydown', onKey);
  $('filter').addEventListener('change', e => { wanted = e.target.value; items = []; at = 0; waiting = null; say($('review-status')); load(); });
  onLanguage(() => { if (!$('review').hidden) render(false); });
}

export function reset() {
  round++; items = []; at = 0; waiting = null; busy = false; times = []; wanted = ''; categories = [];
  say($('review-status')); say($('review-error'));
  showPicture(null);
  $('queue').replaceChildren();
}

/** Called when the page is shown. */
export const show = () => items[at] ? render() : load();

const ids = () => new Set(items.map(i => i.prediction_id));
const skipped = () => items.filter(i => i.skipped && !i.said);

/** Fetch what was not seen yet. */
async function load() {
  if (busy) return;
  const mine = round;
  busy = true; say($('review-error'));
  $('queue').replaceChildren(h('p', {class: 'muted card', role: 'status'}, t('loading')));
  try {
    const limit = Math.min(PAGE + skipped().length, LIMIT), answer = await call(`/review?limit=${limit}${wanted && `&prdtypecode=${wanted}`}`);
    if (mine !== round) return;
    const seen = ids();
    items.push(...answer.items.filter(i => !seen.has(i.prediction_id)));
    waiting = answer.waiting; categories = answer.categories; busy = false;
    render();
  } catch (e) {
    if (mine !== round) return;
    busy = false;
    sayError($('review-error'), e);
    $('queue').replaceChildren(h('button', {type: 'button', id: 'review-retry', onclick: load}, t('retry')));
  }
}

/** What a seller's HTML says; it is parsed apart from the page and only its text is used. */
function readable(text) {
  if (!/[<&]/.test(text)) return text;
  const {body} = new DOMParser().parseFromString(text.replace(/<(br|\/?p|\/?div|\/?li)\b[^>]*>/gi, '\n').replace(/\sstyle\s*=/gi, ' data-s='), 'text/html');
  for (const n of body.querySelectorAll('script, style')) n.remove();
  return body.textContent.replace(/\s*\n\s*/g, '\n').trim() || text;
}

/** Numbered choices: the short list that is guaranteed, then the other likely ones. */
function choices(item) {
  const sure = item.candidates ?? [], codes = [...new Set([...sure, ...item.top_k.map(c => c.prdtypecode)])].slice(0, Math.max(9, sure.length));
  return codes.map(code => ({code, sure: sure.includes(code), ...item.top_k.find(c => c.prdtypecode === code)}));
}

const inWords = ({prdtypecode, unusable}, label) => unusable ? `${t('unusable')} (${t(unusable)})` : nameOf(prdtypecode, label);

/** Store what somebody `said` of the listing on show, {prdtypecode} or {unusable}, and go on. */
async function save(said, label) {
  const item = items[at], mine = round;
  if (busy || !item) return;
  busy = true; $('queue').setAttribute('aria-busy', true);
  say($('review-error')); say($('review-status'), () => t('saving'));
  try {
    const answer = await call('/feedback', {json: {prediction_id: item.prediction_id, ...said}});
    if (mine !== round) return;
    if (!item.said) { waiting = Math.max(0, waiting-1); times.push(Date.now()); }
    item.said = said; item.skipped = false;
    say($('review-status'), () => t(outcome(answer), {name: inWords(said, label), most: mostSay(answer)}));
    move(1);
  } catch (e) { // the listing stays where it is
    if (mine !== round) return;
    say($('review-status')); sayError($('review-error'), e, 'notSaved');
  } finally {
    if (mine === round) { busy = false; $('queue').setAttribute('aria-busy', false); if (!items[at]) load(); }
  }
}

/** To the next listing or to the one before; past the last one more are loaded. */
function move(by) {
  if (at+by < 0) return;
  at += by;
  if (items[at]) render(); else if (!busy) load();
}

function skip() {
  if (busy || !items[at]) return;
  items[at].skipped = true;
  say($('review-status')); say($('review-error'));
  move(1);
}

function back() {
  if (busy) return;
  say($('review-status')); say($('review-error'));
  move(-1);
}

/** Go through the skipped ones once more. */
function again() {
  const left = skipped();
  items = [...items.filter(i => !left.includes(i)), ...left.map(i => ({...i, skipped: false}))];
  at = items.length - left.length;
  left.length ? render() : load();
}

function render(focus = true) {
  const item = items[at];
  progress();
  $('queue').replaceChildren(item ? panel(item) : waiting == null ? '' : emptiness());
  showPicture(item);
  if (!focus) return;
  $('item-title')?.focus({preventScroll: true});
  if ($('queue').getBoundingClientRect().top < 0) $('review').scrollIntoView(); // the photo is above the title
}

/** How many are done, of how many, and how fast; and what may be looked at alone. */
function progress() {
  const done = times.length, all = done+(waiting ?? 0), hours = (times.at(-1)-times[0])/3.6e6;
  $('count-done').textContent = number(done); $('count-all').textContent = waiting == null ? '…' : number(all);
  $('progress').max = Math.max(all, 1); $('progress').value = done;
  $('pace').textContent = done > 2 && hours > 0 ? t('pace', {n: number(Math.round((done-1)/hours))}) : '';
  const n = categories.reduce((sum, c) => sum+c.waiting, 0), option = (code, text) => h('option', {value: code}, text);
  $('filter').replaceChildren(option('', t('all', {n: number(n)})), ...categories.map(c => option(c.prdtypecode, `${nameOf(c.prdtypecode)} (${number(c.waiting)})`)));
  if (wanted && !categories.some(c => String(c.prdtypecode) === wanted)) $('filter').append(option(wanted, `${nameOf(+wanted)} (0)`));
  $('filter').value = wanted;
}

function emptiness() {
  const left = skipped().length;
  return h('div', {class: 'card empty', id: 'empty'}, h('h2', {id: 'item-title', tabindex: -1}, t(left ? 'emptySkipped' : 'empty')),
    h('p', {class: 'muted'}, left ? t('skippedWhy', {n: left}) : t('emptyWhy')),
    h('div', {class: 'actions'}, h('button', {type: 'button', id: 'again', class: left ? 'primary' : '', onclick: again}, t(left ? 'showSkipped' : 'again')),
      at > 0 ? h('button', {type: 'button', class: 'plain', onclick: back}, t('back')) : null));
}

function panel(item) {
  const list = choices(item), button = (c, i) => h('li', {}, h('button', {type: 'button', class: 'choice', 'data-code': c.code, onclick: () => save({prdtypecode: c.code}, c.label)},
    h('kbd', {}, i < 9 ? i+1 : '·'), h('span', {class: 'name'}, nameOf(c.code, c.label)), ...(c.probability == null ? [] : [h('span', {class: 'percent'}, percent(c.probability)), bar(c.probability)])));
  const sure = list.filter(c => c.sure), others = list.filter(c => !c.sure), why = item.why;
  return h('article', {id: 'item', class: 'columns', 'data-prediction': item.prediction_id, 'aria-labelledby': 'item-title'},
    h('div', {class: 'card'},
      item.has_image ? h('button', {type: 'button', class: 'picture', id: 'picture', 'aria-label': t('zoom'), onclick: enlarge}) : h('p', {class: 'muted'}, t('noPhoto')),
      h('h2', {id: 'item-title', tabindex: -1, lang: item.designation ? 'fr' : null}, readable(item.designation) || t('noTitle')),
      item.description ? h('p', {id: 'item-description', class: 'text scroll', lang: 'fr', tabindex: 0, role: 'group', 'aria-label': t('description')}, readable(item.description)) : null,
      h('p', {class: 'muted small'}, `${when(item.created_at)} · ${t('version')} ${item.model_version}`),
      h('div', {class: 'actions'}, h('button', {type: 'button', id: 'item-why', onclick: explain}, t('whyModel')), h('span', {id: 'item-why-status', class: 'muted working', role: 'status'})),
      h('div', {id: 'item-why-error', class: 'message error', role: 'alert'}),
      ...(why ? [explanation(why, item.view)] : [])),
    h('div', {class: 'card'},
      item.said ? h('p', {id: 'yours', class: 'message good'}, t('yours', {name: inWords(item.said)})) : null,
      item.corrections.length ? h('div', {id: 'others', class: 'message warn'}, h('b', {}, t('others')),
        h('ul', {}, item.corrections.map(c => h('li', {}, t('otherSaid', {who: c.reviewer, name: inWords(c)}))))) : null,
      h('p', {class: 'label', id: 'choices-label'}, t('choose')),
      sure.length ? h('div', {id: 'sure'}, h('p', {class: 'small', id: 'sure-label'}, t('guaranteed')), h('ol', {'aria-labelledby': 'sure-label'}, sure.map(button))) : null,
      sure.length && others.length ? h('p', {class: 'small muted', id: 'others-label'}, t('lessLikely')) : null,
      others.length ? h('ol', {id: 'choices', 'aria-labelledby': sure.length ? 'others-label' : 'choices-label', start: sure.length+1}, others.map((c, i) => button(c, i+sure.length))) : null,
      ...categorySearch('search', code => save({prdtypecode: code}), () => $('item-title').focus()),
      h('details', {id: 'unusable'}, h('summary', {}, t('unusableWhy')),
        h('ul', {}, UNUSABLE.map(reason => h('li', {}, h('button', {type: 'button', class: 'choice', 'data-reason': reason, onclick: () => save({unusable: reason})}, t(reason)))))),
      h('div', {class: 'actions'}, h('button', {type: 'button', id: 'back', onclick: back, disabled: at === 0}, t('back')),
        h('button', {type: 'button', id: 'skip-item', onclick: skip}, t('skipItem'))),
      help()));
}

function help() {
  const toggle = h('input', {type: 'checkbox', id: 'keys', checked: keys, onchange: e => { keys = e.target.checked; localStorage.setItem('keys', keys ? 'on' : 'off'); }});
  const line = (k, what) => h('li', {}, h('kbd', {}, k), ` ${t(what)}`);
  return h('div', {class: 'help'}, h('label', {class: 'check'}, toggle, t('shortcuts')),
    h('ul', {class: 'keys'}, line('1–9', 'keyChoose'), line('⏎', 'keyFirst'), line('/', 'keySearch'), line('X', 'keyUnusable'), line('W', 'keyWhy'), line('Z', 'keyZoom'), line('S →', 'keySkip'), line('U ←', 'keyBack')));
}

/** Ask what the model's answer to the listing on show rests on. */
async function explain() {
  const item = items[at], mine = round;
  if (busy || !item || item.why || item.asked) return;
  item.asked = true; say($('item-why-error')); say($('item-why-status'), () => t('whyBusy'));
  try {
    const why = await call(`/review/${encodeURIComponent(item.prediction_id)}/explanation?prdtypecode=${item.prdtypecode}`);
    const url = item.has_image ? await fetchPicture(item).catch(() => null) : null;
    if (mine !== round) return;
    Object.assign(item, {why, view: {id: 'item-', url, overlay: true}});
    if (item === items[at]) { render(false); $('item-why-title').focus(); }
  } catch (e) {
    if (mine === round && item === items[at]) { say($('item-why-status')); sayError($('item-why-error'), e); }
  } finally { item.asked = false; }
}

function enlarge() {
  const src = $('item-image')?.src;
  if (src) zoom(src);
}

/** The address of a picture (it needs the token, so it is fetched here); one that fails is asked for again when it is to be shown. */
function fetchPicture({prediction_id: id}, patient) {
  if (!pictures.has(id)) pictures.set(id, call(`/review/${encodeURIComponent(id)}/image`, {as: 'blob', ...(patient ? {} : {tries: 1})}).then(b => URL.createObjectURL(b)));
  return pictures.get(id).catch(e => { pictures.delete(id); throw e; });
}

/** Show the picture of `item`, have the next one ready, and let go of the others. */
async function showPicture(item) {
  const mine = picture = item ?? null, near = mine ? [mine, items[at+1]].filter(i => i?.has_image) : [];
  for (const [id, url] of pictures) if (!near.some(i => i.prediction_id === id)) { pictures.delete(id); url.then(u => URL.revokeObjectURL(u), () => {}); }
  for (const i of near) {
    const url = await fetchPicture(i, i === mine).catch(() => null);
    if (mine !== picture) return;
    if (i === mine) $('picture')?.replaceChildren(url ? h('img', {id: 'item-image', src: url, alt: t('photoAlt')}) : h('p', {class: 'muted'}, t('photoFailed')));
  }
}

/** Shortcuts of the page; what is typed into a field or pressed on a control is left alone. */
function onKey(e) {
  const on = e.target.closest?.('input, textarea, select, button, summary, a');
  if (!keys || $('review').hidden || e.defaultPrevented || e.repeat || e.ctrlKey || e.metaKey || e.altKey || !items[at] || $('zoom').open || e.target.closest?.('input:not([type=checkbox]), textarea, select')) return;
  const key = e.key.toLowerCase(), list = choices(items[at]);
  const digit = e.code.startsWith('Digit') ? +e.code.slice(5) : +e.key; // by place on the top row: French keyboards have digits under Shift
  if (key === '/') { e.preventDefault(); $('search').focus(); }
  else if (key === 'enter' && !on) { e.preventDefault(); if (list[0]) save({prdtypecode: list[0].code}, list[0].label); }
  else if (key === 's' || key === 'arrowright') { e.preventDefault(); skip(); }
  else if (key === 'x') { e.preventDefault(); $('unusable').open = true; $('unusable').querySelector('button').focus(); }
  else if (key === 'w') { e.preventDefault(); explain(); }
  else if (key === 'z') { e.preventDefault(); enlarge(); }
  else if (key === 'u' || key === 'arrowleft') { e.preventDefault(); back(); }
  else if (list[digit-1]) { e.preventDefault(); save({prdtypecode: list[digit-1].code}, list[digit-1].label); }
}
