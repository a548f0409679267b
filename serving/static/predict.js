// The form for one listing, its answer, and why.
import {call, loadModel, mayReview, modelNow, mostSay, nameOf, outcome} from './api.js';
import {$, bar, h, say, sayError, zoom} from './dom.js';
import {EXAMPLES, drawn} from './examples.js';
import {number, onLanguage, percent, t} from './i18n.js';
import {categorySearch} from './search.js';
import {explanation} from './why.js';

const LANES = {auto: ['✓', 'auto', 'autoWhy'], review: ['?', 'reviewLane', 'reviewLaneWhy'], reject: ['✕', 'reject', 'rejectWhy']};
const KINDS = ['image/jpeg', 'image/png', 'image/webp', 'image/gif', 'image/bmp'], MOST = 10_000_000, SHOWN = 5; // bytes of a photo, categories of an answer
let photo = null;  // {file, url} in the form
let answer = null; // {listing, response, chosen, extra, why, view, stored} on show; `extra` is a category that was searched for, `listing` is the form as it was sent, `stored` what became of a confirmation
let busy = false, round = 0; // what belongs to an earlier round than the form was cleared in is dropped

export function setup() {
  const drop = $('drop');
  $('photo').addEventListener('change', e => { take(e.target.files[0]); e.target.value = ''; });
  $('photo-remove').addEventListener('click', () => { setPhoto(null); $('photo').focus(); });
  for (const kind of ['dragover', 'drop', 'dragleave']) {
    addEventListener(kind, e => e.preventDefault()); // a file that misses must not replace the page
    drop.addEventListener(kind, () => drop.classList.toggle('over', kind === 'dragover'));
  }
  drop.addEventListener('drop', e => take(e.dataTransfer.files[0]));
  addEventListener('paste', e => {
    const file = [...e.clipboardData.files].find(f => f.type.startsWith('image/'));
    if (file && !$('predict').hidden) { e.preventDefault(); take(file); }
  });
  $('predict-form').addEventListener('submit', e => { e.preventDefault(); predict(); });
  $('predict-clear').addEventListener('click', () => { reset(); $('designation').focus(); });
  $('preview-zoom').addEventListener('click', () => zoom(photo.url));
  $('examples').append(...EXAMPLES.map(e => h('button', {type: 'button', class: 'plain', 'data-t': e.name, onclick: () => tryOut(e)})));
  onLanguage(render);
}

export function reset() {
  $('predict-form').reset();
  round++; setPhoto(null); setAnswer(null); setBusy(false);
  say($('predict-error')); say($('predict-status'));
  render();
}

/** Fill the form with an example, and ask. */
async function tryOut(example) {
  if (busy) return;
  reset();
  const mine = round, file = await drawn(example);
  if (mine !== round) return;
  $('designation').value = example.designation; $('description').value = example.description; take(file);
  predict();
}

/** Use `file` as the photo if it can be one. */
function take(file) {
  if (!file) return;
  const wrong = !KINDS.includes(file.type) ? 'photoKind' : file.size > MOST ? 'photoSize' : !file.size ? 'photoEmpty' : null;
  say($('predict-error'), wrong && (() => h('p', {}, t(wrong))));
  if (!wrong) setPhoto(file);
}

function setPhoto(file) {
  const before = photo?.url;
  photo = file && {file, url: URL.createObjectURL(file)};
  release(before);
  $('preview').hidden = !photo;
  if (photo) $('preview-image').src = photo.url; else $('preview-image').removeAttribute('src');
  $('preview-name').textContent = file ? file.name : '';
}

function setAnswer(to) {
  const before = answer?.listing.url;
  answer = to;
  release(before);
}

/** Let go of a picture that neither the form nor the answer shows. */
function release(url) {
  if (url && url !== photo?.url && url !== answer?.listing.url) URL.revokeObjectURL(url);
}

function setBusy(on) {
  busy = on;
  $('result').setAttribute('aria-busy', on);
  for (const b of [$('predict-button'), $('why'), $('confirm')]) b?.setAttribute('aria-disabled', on); // `disabled` would lose the focus
}

/** Run `job` with the form busy; its error goes to `box`. */
async function working(message, status, box, job) {
  if (busy) return;
  const mine = round;
  setBusy(true); say(box); say($(status), () => t(message));
  try { await job(() => mine === round); } catch (e) { if (mine === round) sayError(box, e); }
  if (mine === round) { setBusy(false); say($(status)); }
}

function predict() {
  const listing = {designation: $('designation').value, description: $('description').value, file: photo?.file, url: photo?.url};
  if (!listing.designation.trim() && !listing.description.trim() && !listing.file) {
    say($('predict-error'), () => h('p', {}, t('nothingGiven')));
    return $('designation').focus();
  }
  return working('reading', 'predict-status', $('predict-error'), async current => {
    const form = new FormData();
    form.set('designation', listing.designation); form.set('description', listing.description); form.set('top_k', '100');
    if (listing.file) form.set('image', listing.file);
    const response = await call('/predict/upload', {form}).catch(e => {
      if (current() && e.code !== 'cancelled') { setAnswer(null); render(); } // an answer to another listing would mislead
      throw e;
    });
    if (response.model_version !== modelNow().model_version) await loadModel(); // another one has taken over
    if (!current()) return;
    setAnswer({listing, response, chosen: response.prdtypecode, extra: null, why: null, view: {id: '', url: listing.url, overlay: true}});
    render();
    $('result-title').focus({preventScroll: true});
    const {top} = $('result').getBoundingClientRect();
    if (top < 0 || top > innerHeight/2) $('result').scrollIntoView(); // on a phone it is below the form
  });
}

function explain() {
  const mine = answer, {designation, description, file} = mine.listing;
  return working('whyBusy', 'why-status', $('why-error'), async current => {
    const image = file ? await base64(file) : null;
    const why = await call('/explain', {json: {designation, description, image, prdtypecode: mine.chosen}});
    if (!current() || mine !== answer) return;
    answer.why = why;
    render();
    $('why-title').focus();
  });
}

/** Tell the server that the ticked category, which is the predicted one unless somebody ticked another, is right. */
async function confirm() {
  const mine = answer, code = mine.chosen;
  await working('saving', 'confirm-status', $('confirm-error'), async () => {
    mine.stored = {code, ...await call('/feedback', {json: {prediction_id: mine.response.prediction_id, prdtypecode: code}})};
  });
  if (mine === answer) sayStored();
}

function sayStored() {
  const {stored, response} = answer;
  if (!stored) return;
  const message = outcome(stored), label = response.top_k.find(c => c.prdtypecode === stored.code)?.label;
  say($('confirm-status'), () => t(message, {name: nameOf(stored.code, label), most: mostSay(stored)}));
}

const base64 = file => new Promise((resolve, fail) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result.split(',')[1]);
  reader.onerror = () => fail(reader.error);
  reader.readAsDataURL(file);
});

function render() {
  for (const id of ['why-error', 'why-status', 'confirm-error', 'confirm-status']) say($(id));
  if (!answer) return $('result').replaceChildren(h('p', {class: 'muted placeholder'}, t('resultEmpty')));
  const {response: r, why} = answer, [mark, lane, laneWhy] = LANES[r.lane];
  const known = code => r.top_k.find(c => c.prdtypecode === code) ?? {prdtypecode: code};
  const ranked = r.top_k.slice(0, SHOWN), extra = answer.extra == null || ranked.some(c => c.prdtypecode === answer.extra) ? [] : [known(answer.extra)];
  const row = c => h('li', {}, h('label', {class: 'row', 'data-code': c.prdtypecode},
    h('input', {type: 'radio', name: 'chosen', value: c.prdtypecode, checked: c.prdtypecode === answer.chosen, onchange: () => { answer.chosen = c.prdtypecode; }}),
    h('span', {class: 'name'}, nameOf(c.prdtypecode, c.label), h('small', {class: 'muted'}, ` ${c.prdtypecode}`)),
    ...(c.probability == null ? [] : [h('span', {class: 'percent'}, percent(c.probability)), bar(c.probability)])));
  $('result').replaceChildren(
    h('h2', {id: 'result-title', tabindex: -1}, nameOf(r.prdtypecode, r.label)),
    h('div', {id: 'lane', class: `lane ${r.lane}`, 'data-lane': r.lane}, h('b', {}, h('span', {'aria-hidden': 'true'}, `${mark} `), t(lane)), h('p', {}, t(laneWhy)), ...doubts(r).map(d => h('p', {class: 'doubt'}, d))),
    ...(r.lane === 'review' && r.candidates ? [h('p', {class: 'label', id: 'candidates-label'}, t('candidates')),
      h('ul', {id: 'candidates', class: 'chips', 'aria-labelledby': 'candidates-label'},
        r.candidates.map(c => h('li', {}, nameOf(c, r.top_k.find(k => k.prdtypecode === c)?.label))))] : []),
    h('fieldset', {}, h('legend', {class: 'label'}, t('ranked')), h('ol', {id: 'ranked'}, ranked.map(row)), h('ul', {id: 'extra'}, extra.map(row))),
    ...categorySearch('other', pick, () => $('result-title').focus()),
    h('div', {class: 'actions'}, h('button', {type: 'button', id: 'why', 'aria-disabled': busy, onclick: explain}, t('why')), h('span', {class: 'muted'}, t('whyHint')),
      h('span', {id: 'why-status', class: 'muted working', role: 'status'})),
    h('div', {id: 'why-error', class: 'message error', role: 'alert'}),
    ...(mayReview() ? [h('div', {class: 'actions'}, h('button', {type: 'button', id: 'confirm', 'aria-disabled': busy, onclick: confirm}, t('confirm')), h('span', {class: 'muted'}, t('whyHint')),
      h('span', {id: 'confirm-status', class: 'muted', role: 'status'})), h('div', {id: 'confirm-error', class: 'message error', role: 'alert'})] : []),
    ...(why ? [explanation(why, answer.view)] : []),
    h('p', {class: 'muted small', id: 'about'}, `${t('read', {what: r.modalities.map(m => t(m)).join(' + ')})} `, h('span', {id: 'version'}, r.model_version)));
  sayStored();
}

/** Tick a category that was searched for. */
function pick(code) {
  answer.extra = answer.chosen = code;
  render();
  document.querySelector(`#result input[value="${code}"]`).focus();
}

/** Why an answer is left to a person, as far as it can be told. */
function doubts(r) {
  if (r.lane === 'auto') return [];
  const [a, b] = r.top_k, {auto_share: share, auto_needs: n} = modelNow(), told = [];
  if (share === 0) told.push(n ? t('nothingAuto', {n: number(n)}) : t('nothingAutoYet'));
  if (b && b.probability > .5*a.probability) told.push(t('close', {a: nameOf(a.prdtypecode, a.label), b: nameOf(b.prdtypecode, b.label)}));
  if (!r.modalities.includes('image')) told.push(t('noPhotoSeen'));
  return told;
}
