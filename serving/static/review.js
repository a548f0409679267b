// The queue: one listing at a time, by keyboard if you like.
import {allNames, call, nameOf} from './api.js';
import {$, h, say, sayError} from './dom.js';
import {onLanguage, percent, t, when} from './i18n.js';

const PAGE = 20, LIMIT = 100; // listings asked for at once: at first, and when many were skipped
let items, at;        // listings seen so far, each with `chosen` or `skipped` once dealt with, and the one on show
let waiting, busy, picture, round = 0; // `picture` is the listing whose picture is on show
const pictures = new Map(); // prediction_id -> promise of its picture's address in this page
let keys = localStorage.getItem('keys') !== 'off';

export function setup() {
  addEventListener('keydown', onKey);
  onLanguage(() => { if (!$('review').hidden) render(false); });
}

export function reset() {
  round++; items = []; at = 0; waiting = null; busy = false;
  say($('review-status')); say($('review-error'));
  showPicture(null);
  $('queue').replaceChildren();
}

/** Called when the page is shown. */
export const show = () => items[at] ? render() : load();

const ids = () => new Set(items.map(i => i.prediction_id));
const skipped = () => items.filter(i => i.skipped && i.chosen == null);

/** Fetch what was not seen yet. */
async function load() {
  if (busy) return;
  const mine = round;
  busy = true; say($('review-error'));
  $('queue').replaceChildren(h('p', {class: 'muted card', role: 'status'}, t('loading')));
  try {
    const limit = Math.min(PAGE + skipped().length, LIMIT), answer = await call(`/review?limit=${limit}`);
    if (mine !== round) return;
    const seen = ids();
    items.push(...answer.items.filter(i => !seen.has(i.prediction_id)));
    waiting = answer.waiting; busy = false;
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

/** Numbered choices: the candidates, then the other likely ones. */
function choices(item) {
  const codes = [...new Set([...(item.candidates ?? []), ...item.top_k.map(c => c.prdtypecode)])].slice(0, 9);
  return codes.map(code => ({code, ...item.top_k.find(c => c.prdtypecode === code)}));
}

async function save(code, label) {
  const item = items[at], mine = round;
  if (busy || !item) return;
  busy = true; $('queue').setAttribute('aria-busy', true);
  say($('review-error')); say($('review-status'), () => t('saving'));
  try {
    const answer = await call('/feedback', {json: {prediction_id: item.prediction_id, prdtypecode: code}});
    if (mine !== round) return;
    if (item.chosen == null) waiting = Math.max(0, waiting-1);
    item.chosen = code; item.skipped = false;
    const message = !answer.conflict ? 'saved' : answer.verdict == null ? 'savedConflict' : 'savedSettled';
    say($('review-status'), () => t(message, {name: nameOf(code, label), most: nameOf(answer.verdict)}));
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
  const done = items.filter(i => i.chosen != null).length, item = items[at];
  $('count-done').textContent = done; $('count-waiting').textContent = waiting ?? '…';
  $('queue').replaceChildren(item ? panel(item) : waiting == null ? '' : emptiness());
  showPicture(item);
  if (!focus) return;
  $('item-title')?.focus({preventScroll: true});
  if ($('queue').getBoundingClientRect().top < 0) $('review').scrollIntoView(); // the photo is above the title
}

function emptiness() {
  const left = skipped().length;
  return h('div', {class: 'card empty', id: 'empty'}, h('h2', {id: 'item-title', tabindex: -1}, t(left ? 'emptySkipped' : 'empty')),
    h('p', {class: 'muted'}, left ? t('skippedWhy', {n: left}) : t('emptyWhy')),
    h('div', {class: 'actions'}, h('button', {type: 'button', id: 'again', class: left ? 'primary' : '', onclick: again}, t(left ? 'showSkipped' : 'again')),
      at > 0 ? h('button', {type: 'button', class: 'plain', onclick: back}, t('back')) : null));
}

function panel(item) {
  const list = choices(item), button = (c, i) => h('li', {}, h('button', {type: 'button', class: 'choice', 'data-code': c.code, onclick: () => save(c.code, c.label)},
    h('kbd', {}, i+1), h('span', {class: 'name'}, nameOf(c.code, c.label)), c.probability == null ? null : h('span', {class: 'percent'}, percent(c.probability))));
  return h('article', {id: 'item', class: 'columns', 'data-prediction': item.prediction_id, 'aria-labelledby': 'item-title'},
    h('div', {class: 'card'},
      item.has_image ? h('div', {class: 'picture', id: 'picture'}) : h('p', {class: 'muted'}, t('noPhoto')),
      h('h2', {id: 'item-title', tabindex: -1, lang: item.designation ? 'fr' : null}, readable(item.designation) || t('noTitle')),
      item.description ? h('p', {id: 'item-description', class: 'text scroll', lang: 'fr', tabindex: 0, role: 'group', 'aria-label': t('description')}, readable(item.description)) : null,
      h('p', {class: 'muted small'}, `${when(item.created_at)} · ${t('version')} ${item.model_version}`)),
    h('div', {class: 'card'},
      item.chosen == null ? null : h('p', {id: 'yours', class: 'message good'}, t('yours', {name: nameOf(item.chosen)})),
      item.corrections.length ? h('div', {id: 'others', class: 'message warn'}, h('b', {}, t('others')),
        h('ul', {}, item.corrections.map(c => h('li', {}, t('otherSaid', {who: c.reviewer, name: nameOf(c.prdtypecode)}))))) : null,
      h('p', {class: 'label', id: 'choices-label'}, t('choose')),
      h('ol', {id: 'choices', 'aria-labelledby': 'choices-label'}, list.map(button)),
      h('label', {for: 'search'}, t('search')),
      h('div', {class: 'combo'},
        h('input', {id: 'search', type: 'text', role: 'combobox', autocomplete: 'off', spellcheck: 'false', placeholder: t('searchHint'), 'aria-autocomplete': 'list',
                    'aria-expanded': 'false', 'aria-controls': 'matches', oninput: filter, onkeydown: onSearchKey, onblur: closeSearch}),
        h('ul', {id: 'matches', role: 'listbox', 'aria-label': t('search'), hidden: true})),
      h('div', {class: 'actions'}, h('button', {type: 'button', id: 'back', onclick: back, disabled: at === 0}, t('back')),
        h('button', {type: 'button', id: 'skip-item', onclick: skip}, t('skipItem'))),
      help()));
}

function help() {
  const toggle = h('input', {type: 'checkbox', id: 'keys', checked: keys, onchange: e => { keys = e.target.checked; localStorage.setItem('keys', keys ? 'on' : 'off'); }});
  const line = (k, what) => h('li', {}, h('kbd', {}, k), ` ${t(what)}`);
  return h('div', {class: 'help'}, h('label', {class: 'check'}, toggle, t('shortcuts')),
    h('ul', {class: 'keys'}, line('1–9', 'keyChoose'), line('⏎', 'keyFirst'), line('/', 'keySearch'), line('S →', 'keySkip'), line('U ←', 'keyBack')));
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

// The search box: a combobox over all categories, in both languages and by code.
const plain = s => s.normalize('NFD').replace(/\p{M}/gu, '').toLowerCase();

function filter() {
  const wanted = plain($('search').value.trim()), box = $('matches');
  if (!wanted) return closeSearch();
  const rank = c => [c.fr, c.en, String(c.prdtypecode)].map(s => plain(s).indexOf(wanted)).reduce((best, i) => i < 0 ? best : Math.min(best, i), Infinity);
  const found = allNames().map(c => [rank(c), c]).filter(([r]) => r < Infinity)
    .sort(([r, a], [s, b]) => Math.sign(r)-Math.sign(s) || nameOf(a.prdtypecode).localeCompare(nameOf(b.prdtypecode))).map(([, c]) => c);
  box.replaceChildren(...found.map((c, i) => h('li', {role: 'option', id: `match-${i}`, 'data-code': c.prdtypecode,
    onmousedown: e => { e.preventDefault(); save(c.prdtypecode); }}, nameOf(c.prdtypecode), h('small', {class: 'muted'}, ` ${c.prdtypecode}`))));
  if (!found.length) box.append(h('li', {class: 'muted', role: 'option', 'aria-disabled': 'true'}, t('noMatch')));
  box.hidden = false; $('search').setAttribute('aria-expanded', 'true');
  mark(0);
}

function closeSearch() {
  $('matches').hidden = true;
  $('search').setAttribute('aria-expanded', 'false'); $('search').removeAttribute('aria-activedescendant');
}

/** Make option `i` the active one. */
function mark(i) {
  const options = [...$('matches').querySelectorAll('[data-code]')];
  options.forEach((o, n) => o.setAttribute('aria-selected', n === i));
  options[i]?.scrollIntoView({block: 'nearest'});
  options[i] ? $('search').setAttribute('aria-activedescendant', options[i].id) : $('search').removeAttribute('aria-activedescendant');
}

function onSearchKey(e) {
  if (e.key === 'Escape') { $('search').value = ''; closeSearch(); $('item-title').focus(); return; }
  if ($('matches').hidden || e.isComposing) return;
  const options = [...$('matches').querySelectorAll('[data-code]')], i = options.findIndex(o => o.getAttribute('aria-selected') === 'true');
  const by = {ArrowDown: 1, ArrowUp: -1}[e.key];
  if (by && options.length) { e.preventDefault(); mark((i+by+options.length) % options.length); }
  else if (e.key === 'Enter' && options[i] && !e.repeat) { e.preventDefault(); save(+options[i].dataset.code); }
}

/** Shortcuts of the page; what is typed into a field or pressed on a control is left alone. */
function onKey(e) {
  const on = e.target.closest?.('input, textarea, select, button, a');
  if (!keys || $('review').hidden || e.defaultPrevented || e.repeat || e.ctrlKey || e.metaKey || e.altKey || !items[at] || e.target.closest?.('input:not([type=checkbox]), textarea')) return;
  const key = e.key.toLowerCase(), list = choices(items[at]);
  const digit = e.code.startsWith('Digit') ? +e.code.slice(5) : +e.key; // by place on the top row: French keyboards have digits under Shift
  if (key === '/') { e.preventDefault(); $('search').focus(); }
  else if (key === 'enter' && !on) { e.preventDefault(); if (list[0]) save(list[0].code, list[0].label); }
  else if (key === 's' || key === 'arrowright') { e.preventDefault(); skip(); }
  else if (key === 'u' || key === 'arrowleft') { e.preventDefault(); back(); }
  else if (list[digit-1]) { e.preventDefault(); save(list[digit-1].code, list[digit-1].label); }
}
