// Three listings to try the page with: made up, their photos drawn here.
const SIZE = 320;

const shape = (c, colour, draw) => { c.fillStyle = colour; c.beginPath(); draw(c); c.fill(); };
const box = (c, colour, ...where) => shape(c, colour, c => c.rect(...where));
const oval = (c, colour, x, y, rx, ry) => shape(c, colour, c => c.ellipse(x, y, rx, ry, 0, 0, 2*Math.PI));

function pool(c) {
  box(c, '#7fae62', 0, 0, SIZE, SIZE);
  box(c, '#c9d7e2', 30, 150, 260, 80); oval(c, '#c9d7e2', 160, 230, 130, 46);
  oval(c, '#e9eff4', 160, 150, 130, 46); oval(c, '#2f8fd0', 160, 152, 118, 38); oval(c, '#7cc3ee', 130, 144, 46, 10);
  for (const x of [60, 120, 200, 260]) box(c, '#8fa3b3', x, 165, 8, 92);
}

function books(c) {
  box(c, '#efe7da', 0, 0, SIZE, SIZE); box(c, '#b58b5e', 0, 262, SIZE, 58);
  [['#8c2f39', 70, 52], ['#2f4a6d', 130, 60], ['#3f6b4a', 196, 50]].forEach(([colour, x, w], i) => {
    box(c, colour, x, 60+12*i, w, 202-12*i); box(c, '#f3e9cf', x+8, 90+12*i, w-16, 40);
    box(c, '#d9b45b', x, 240, w, 6);
  });
}

function cushion(c) {
  box(c, '#f1f1ee', 0, 0, SIZE, SIZE); oval(c, '#d9d9d4', 160, 278, 120, 16);
  shape(c, '#27548a', c => { c.moveTo(52, 60); c.quadraticCurveTo(160, 92, 268, 60); c.quadraticCurveTo(238, 160, 268, 268); c.quadraticCurveTo(160, 240, 52, 268); c.quadraticCurveTo(82, 160, 52, 60); });
  for (let i = 0; i < 4; i++) oval(c, '#3c6ea8', 115+30*i, 110+30*i, 12, 12);
}

export const EXAMPLES = [
  {name: 'examplePool', draw: pool, designation: 'Piscine tubulaire ronde hors sol 3,66 m', description: '<p>Piscine de jardin avec filtre &agrave; cartouche, &eacute;chelle et liner bleu.</p>'},
  {name: 'exampleBooks', draw: books, designation: 'Lot de 3 romans policiers', description: 'Trois livres de poche, très bon état.'},
  {name: 'exampleCushion', draw: cushion, designation: 'Coussin velours bleu 45 x 45 cm', description: ''},
];

/** The photo of an example, as a file. */
export async function drawn({name, draw}) {
  const canvas = document.createElement('canvas');
  canvas.width = canvas.height = SIZE;
  draw(canvas.getContext('2d'));
  const blob = await new Promise(done => { canvas.toBlob(done, 'image/jpeg', .9); });
  return new File([blob], `${name}.jpg`, {type: 'image/jpeg'});
}
