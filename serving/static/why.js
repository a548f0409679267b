// Why: the words, regions and parts of a listing behind a category.
import {nameOf} from './api.js';
import {bar, h} from './dom.js';
import {percent, signed, t} from './i18n.js';

/** A section about the answer of /explain; `view` is {id, url, overlay}: a prefix of ids, the picture and whether regions are shown. */
export function explanation(why, view) {
  const name = nameOf(why.prdtypecode, why.label), id = name => view.id+name;
  return h('section', {id: id('explanation'), class: 'explanation', 'aria-labelledby': id('why-title')},
    h('h3', {id: id('why-title'), tabindex: -1}, t('whyTitle', {name, p: percent(why.probability)})),
    h('h4', {}, t('share')),
    h('ul', {id: id('shares'), class: 'shares'}, Object.entries(why.modalities).map(([m, s]) => h('li', {}, h('span', {}, t(m)), bar(s), h('span', {class: 'percent'}, percent(s))))),
    h('h4', {}, t('words')),
    ...(why.words.length ? words(why, id('words')) : [h('p', {class: 'muted'}, t('noWords'))]),
    ...(why.regions ? [h('h4', {}, t('regions')), heat(why.regions, view)] : []));
}

/** Both texts with the words marked that count, and the most telling ones in a list. */
function words(why, id) {
  const most = Math.max(...why.words.map(w => Math.abs(w.weight)), .05);
  const counts = w => Math.abs(w.weight) > most*.1;
  const text = field => {
    const chars = Array.from(why[field]), out = []; // offsets count characters, not UTF-16 units
    let at = 0;
    for (const w of why.words.filter(w => w.field === field)) {
      out.push(chars.slice(at, w.start).join(''), word(chars.slice(w.start, w.end).join(''), w.weight, counts(w), most));
      at = w.end;
    }
    return h('p', {class: `text ${field}`, lang: 'fr'}, ...out, chars.slice(at).join(''));
  };
  const top = sign => {
    const unique = new Map(why.words.filter(w => counts(w) && Math.sign(w.weight) === sign).map(w => [short(w.word).toLowerCase(), w]));
    const list = [...unique.values()].sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight)).slice(0, 5);
    return list.map(w => `${short(w.word)} (${signed(w.weight)})`).join(', ') || t('none');
  };
  return [h('div', {id, class: 'words', tabindex: 0, role: 'group', 'aria-label': t('words')}, why.title ? text('title') : null, why.description ? text('description') : null),
    h('p', {class: 'small'}, h('span', {class: 'word for key'}, t('for')), ' ', top(1)), h('p', {class: 'small'}, h('span', {class: 'word against key'}, t('against')), ' ', top(-1))];
}

/** A word without the punctuation around it, a long stretch without its end. */
function short(text) {
  const word = text.replace(/^[\p{P}\s]+|[\p{P}\s]+$/gu, '') || text;
  return word.length > 40 ? `${word.slice(0, 40)}…` : word;
}

function word(text, weight, counts, most) {
  if (!counts) return h('span', {title: signed(weight)}, text);
  const side = weight > 0 ? 'for' : 'against';
  const node = h('mark', {class: `word ${side}`, title: `${signed(weight)} (${t(weight > 0 ? 'speaksFor' : 'speaksAgainst')})`}, text);
  node.style.setProperty('--strength', Math.abs(weight)/most);
  return node;
}

/** The photo in a white square, as the model sees it, under a grid of coloured cells. */
function heat(regions, view) {
  const cells = regions.flat(), size = regions.length, most = Math.max(...cells.map(Math.abs), .05);
  const at = cells.indexOf(Math.max(...cells));
  const grid = h('div', {class: 'cells', hidden: !view.overlay}, cells.map(v => {
    const cell = h('span', {class: `cell ${v < 0 ? 'against' : 'for'}`, title: signed(v)});
    cell.style.setProperty('--strength', Math.abs(v)/most);
    return cell;
  }));
  grid.style.setProperty('--size', size);
  const toggle = h('input', {type: 'checkbox', id: `${view.id}overlay`, checked: view.overlay, onchange: e => { view.overlay = e.target.checked; grid.hidden = !view.overlay; }});
  return h('div', {}, h('div', {id: `${view.id}heat`, class: 'heat', role: 'img', 'aria-label': t('regionsAlt', {r: Math.floor(at/size)+1, c: at%size+1})},
    view.url ? h('img', {src: view.url, alt: ''}) : null, grid),
    h('p', {class: 'legend'}, h('label', {class: 'check'}, toggle, t('overlay')), h('span', {}, h('i', {class: 'cell for'}), t('speaksFor')), h('span', {}, h('i', {class: 'cell against'}), t('speaksAgainst'))));
}
