// A combobox over all categories, in both languages and by code.
import {allNames, nameOf} from './api.js';
import {h} from './dom.js';
import {t} from './i18n.js';

const plain = s => s.normalize('NFD').replace(/\p{M}/gu, '').toLowerCase();

/** Label and box; `pick(code)` is called with what is chosen, `leave()` at Escape. */
export function categorySearch(id, pick, leave) {
  const list = h('ul', {id: `${id}-matches`, class: 'matches', role: 'listbox', 'aria-label': t('search'), hidden: true});
  const input = h('input', {id, type: 'text', role: 'combobox', autocomplete: 'off', spellcheck: 'false', placeholder: t('searchHint'), 'aria-autocomplete': 'list',
    'aria-expanded': 'false', 'aria-controls': list.id, oninput: filter, onkeydown: onKey, onblur: close});
  const options = () => [...list.querySelectorAll('[data-code]')];

  function filter() {
    const wanted = plain(input.value.trim());
    if (!wanted) return close();
    const rank = c => [c.fr, c.en, String(c.prdtypecode)].map(s => plain(s).indexOf(wanted)).reduce((best, i) => i < 0 ? best : Math.min(best, i), Infinity);
    const found = allNames().map(c => [rank(c), c]).filter(([r]) => r < Infinity)
      .sort(([r, a], [s, b]) => Math.sign(r)-Math.sign(s) || nameOf(a.prdtypecode).localeCompare(nameOf(b.prdtypecode))).map(([, c]) => c);
    list.replaceChildren(...found.map((c, i) => h('li', {role: 'option', id: `${id}-match-${i}`, 'data-code': c.prdtypecode,
      onmousedown: e => { e.preventDefault(); choose(c.prdtypecode); }}, nameOf(c.prdtypecode), h('small', {class: 'muted'}, ` ${c.prdtypecode}`))));
    if (!found.length) list.append(h('li', {class: 'muted', role: 'option', 'aria-disabled': 'true', 'aria-selected': 'false'}, t('noMatch')));
    list.hidden = false; input.setAttribute('aria-expanded', 'true');
    mark(0);
  }

  function choose(code) { input.value = ''; close(); pick(code); }

  function close() {
    list.hidden = true;
    input.setAttribute('aria-expanded', 'false'); input.removeAttribute('aria-activedescendant');
  }

  /** Make option `i` the active one. */
  function mark(i) {
    const all = options();
    all.forEach((o, n) => o.setAttribute('aria-selected', n === i));
    all[i]?.scrollIntoView({block: 'nearest'});
    all[i] ? input.setAttribute('aria-activedescendant', all[i].id) : input.removeAttribute('aria-activedescendant');
  }

  function onKey(e) {
    if (e.key === 'Escape') { input.value = ''; close(); leave(); return; }
    if (list.hidden || e.isComposing) return;
    const all = options(), i = all.findIndex(o => o.getAttribute('aria-selected') === 'true'), by = {ArrowDown: 1, ArrowUp: -1}[e.key];
    if (by && all.length) { e.preventDefault(); mark((i+by+all.length) % all.length); }
    else if (e.key === 'Enter' && all[i] && !e.repeat) { e.preventDefault(); choose(+all[i].dataset.code); }
  }

  return [h('label', {for: id}, t('search')), h('div', {class: 'combo'}, input, list)];
}
