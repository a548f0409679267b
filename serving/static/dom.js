// Elements and messages. Text only ever goes in as text.
import {known, onLanguage, t} from './i18n.js';

export const $ = id => document.getElementById(id);

/** An element: `h('p', {class: 'x', onclick: f}, 'text', node, null)`. */
export function h(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [k, v] of Object.entries(attributes)) {
    if (k.startsWith('on')) node.addEventListener(k.slice(2), v);
    else if (v === true) node.setAttribute(k, '');
    else if (v !== false && v != null) node.setAttribute(k, v);
  }
  node.append(...children.flat().filter(c => c != null));
  return node;
}

/** A bar for a share from 0 to 1. */
export function bar(share) {
  const fill = h('span');
  fill.style.width = `${Math.min(share, 1)*100}%`;
  return h('span', {class: 'meter', 'aria-hidden': 'true'}, fill);
}

/** Show a picture as large as the window. */
export function zoom(url) {
  $('zoom-image').src = url;
  $('zoom').showModal();
}

const said = new Map(); // message box -> what makes its content, to say it again in the other language

/** Put what `make()` returns into a message box; without `make` empty it. */
export function say(box, make) {
  if (!box) return;
  make ? said.set(box, make) : said.delete(box);
  box.replaceChildren(...(make ? [make()].flat() : []));
}
onLanguage(() => { for (const [box, make] of said) box.replaceChildren(...[make()].flat()); });

/** Say what went wrong: in the reader's language, then the server's own words about each field. */
export function sayError(box, error, before = '') {
  if (error.code === 'cancelled') return;
  if (!error.code) console.error(error); // a bug of this page
  const code = error.code ?? 'internal_error';
  say(box, () => {
    const text = known(code) ? t(code, {s: error.wait}) : error.message || t('internal_error');
    const details = (error.fields ?? []).map(f => h('li', {lang: 'en'}, `${known(f.field) ? t(f.field) : f.field}: ${f.message}`));
    return [h('p', {}, [before && t(before), text].filter(Boolean).join(' ')), ...(details.length ? [h('ul', {}, details)] : [])];
  });
}
