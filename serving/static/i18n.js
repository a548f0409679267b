// Every string of the page, French and English, and the language that is on.
const LANGS = ['fr', 'en'];

const STRINGS = {
  skip: ['Aller au contenu', 'Skip to content'],
  nav: ['Pages', 'Pages'],
  language: ['Langue', 'Language'],
  footer: ['Classement d’annonces par titre, description et photo.', 'Files listings by title, description and photo.'],
  docs: ['Documentation de l’API', 'API documentation'],
  retryWait: ['Le serveur est occupé. Nouvel essai dans {s} s ({n} sur {of}).', 'The server is busy. Trying again in {s} s ({n} of {of}).'],
  retryNow: ['Essayer maintenant', 'Try now'],
  retry: ['Réessayer', 'Try again'],

  signIn: ['Se connecter', 'Sign in'],
  signInWhy: ['Avec le compte que vous a donné votre administrateur.', 'With the account that your administrator gave you.'],
  signOut: ['Se déconnecter', 'Sign out'],
  user: ['Identifiant', 'User name'],
  password: ['Mot de passe', 'Password'],
  wrongPassword: ['Identifiant ou mot de passe incorrect.', 'Wrong user name or password.'],
  expired: ['Votre session est terminée. Reconnectez-vous pour continuer.', 'Your session has ended. Sign in again to go on.'],
  signedOut: ['Vous êtes déconnecté.', 'You are signed out.'],

  predict: ['Classer', 'Classify'],
  predictTitle: ['Classer une annonce', 'Classify a listing'],
  designation: ['Titre', 'Title'],
  description: ['Description', 'Description'],
  photo: ['Photo', 'Photo'],
  photoHint: ['Choisissez une photo, déposez-la ici ou collez-la', 'Choose a photo, drop it here or paste it'],
  photoAlt: ['Photo de l’annonce', 'Photo of the listing'],
  photoRemove: ['Retirer la photo', 'Remove photo'],
  photoKind: ['Ce fichier n’est pas une photo JPEG, PNG, WEBP, GIF ou BMP.', 'This file is not a JPEG, PNG, WEBP, GIF or BMP picture.'],
  photoSize: ['Cette photo est trop lourde : 10 Mo au plus.', 'This photo is too large: 10 MB at most.'],
  photoEmpty: ['Ce fichier est vide.', 'This file is empty.'],
  zoom: ['Agrandir la photo', 'Enlarge the photo'],
  closeZoom: ['Fermer', 'Close'],
  examples: ['Essayer :', 'Try:'],
  examplePool: ['une piscine', 'a pool'],
  exampleBooks: ['des romans', 'novels'],
  exampleCushion: ['un coussin', 'a cushion'],
  predictButton: ['Trouver la catégorie', 'Find the category'],
  clear: ['Effacer', 'Clear'],
  reading: ['Lecture de l’annonce…', 'Reading the listing…'],
  nothingGiven: ['Donnez un titre, une description ou une photo.', 'Give a title, a description or a photo.'],
  result: ['Résultat', 'Result'],
  resultEmpty: ['La catégorie proposée s’affichera ici.', 'The suggested category will appear here.'],
  ranked: ['Catégories probables', 'Likely categories'],
  auto: ['Classement automatique', 'Filed automatically'],
  autoWhy: ['Assez sûr pour être classé sans vérification.', 'Sure enough to be filed without anybody looking.'],
  reviewLane: ['À vérifier', 'Needs a person'],
  reviewLaneWhy: ['Pas assez sûr : quelqu’un doit choisir parmi ces catégories.', 'Not sure enough: someone should choose among these categories.'],
  reject: ['À renvoyer au vendeur', 'Back to the seller'],
  nothingAuto: ['Rien n’est encore classé automatiquement : il faut environ {n} annonces vérifiées de plus.', 'Nothing is filed automatically yet: about {n} more checked listings are needed.'],
  nothingAutoYet: ['Ce modèle ne classe rien automatiquement.', 'This model files nothing automatically.'],
  close: ['« {a} » et « {b} » sont proches.', '“{a}” and “{b}” are close.'],
  noPhotoSeen: ['Une photo aiderait.', 'A photo would help.'],
  rejectWhy: ['Aucune catégorie ne se détache : demandez un meilleur titre ou une meilleure photo.', 'No category stands out: ask for a better title or photo.'],
  candidates: ['À choisir parmi', 'To choose from'],
  read: ['Lu : {what} · Modèle', 'Read: {what} · Model'],
  text: ['texte', 'text'],
  image: ['photo', 'photo'],
  version: ['Modèle', 'Model'],

  why: ['Pourquoi ?', 'Why?'],
  confirm: ['Confirmer', 'Confirm'],
  whyHint: ['pour la catégorie cochée', 'for the category that is ticked'],
  whyBusy: ['Analyse en cours, quelques secondes…', 'Working it out, a few seconds…'],
  whyTitle: ['Pourquoi « {name} » ({p}) ?', 'Why “{name}” ({p})?'],
  share: ['Part de chaque élément', 'Share of each part'],
  words: ['Mots', 'Words'],
  noWords: ['Aucun texte n’a été lu.', 'No text was read.'],
  speaksFor: ['pour', 'for'],
  speaksAgainst: ['contre', 'against'],
  for: ['Pour :', 'For:'],
  against: ['Contre :', 'Against:'],
  none: ['rien de net', 'nothing clear'],
  regions: ['Zones de la photo', 'Regions of the photo'],
  regionsAlt: ['Photo vue par le modèle ; la zone qui compte le plus est à la ligne {r}, colonne {c} sur 7.',
               'Photo as the model sees it; the region that matters most is in row {r}, column {c} of 7.'],
  overlay: ['Afficher les zones', 'Show regions'],

  review: ['Vérifier', 'Review'],
  reviewTitle: ['Annonces à vérifier', 'Listings to review'],
  done: ['Vérifiées', 'Done'],
  of: ['sur', 'of'],
  pace: ['· {n} par heure', '· {n} per hour'],
  filter: ['Catégorie proposée', 'Proposed category'],
  all: ['Toutes ({n})', 'All ({n})'],
  loading: ['Chargement…', 'Loading…'],
  empty: ['Rien à vérifier', 'Nothing to review'],
  emptySkipped: ['Plus que des annonces passées', 'Only skipped listings are left'],
  emptyWhy: ['Aucune annonce n’attend. Il en viendra dès que le modèle hésitera.', 'No listing is waiting. More will come when the model hesitates.'],
  skippedWhy: ['À revoir : {n}.', 'To look at again: {n}.'],
  again: ['Regarder à nouveau', 'Look again'],
  showSkipped: ['Revoir les annonces passées', 'Show the skipped ones'],
  noTitle: ['(sans titre)', '(no title)'],
  noPhoto: ['Pas de photo', 'No photo'],
  photoFailed: ['La photo ne peut pas être affichée.', 'The photo cannot be shown.'],
  guaranteed: ['La bonne est presque toujours parmi celles-ci', 'The right one is nearly always among these'],
  lessLikely: ['Moins probables', 'Less likely'],
  unusable: ['Inutilisable', 'Unusable'],
  unusableWhy: ['Inutilisable : pourquoi ?', 'Unusable: why?'],
  unreadable: ['On ne voit pas ce que c’est', 'Text and photo cannot be made out'],
  contradictory: ['Texte et photo se contredisent', 'Text and photo show different products'],
  several: ['Plusieurs produits en une annonce', 'Several products in one listing'],
  no_category: ['Aucune catégorie ne convient', 'No category fits'],
  not_a_product: ['Ce n’est pas un produit (test, publicité)', 'Not a product (a test, an advertisement)'],
  keyUnusable: ['inutilisable', 'unusable'],
  keyWhy: ['pourquoi', 'why'],
  keyZoom: ['agrandir', 'enlarge'],
  whyModel: ['Pourquoi cette proposition ?', 'Why does the model propose it?'],
  choose: ['Quelle est la bonne catégorie ?', 'Which category is right?'],
  search: ['Autre catégorie', 'Another category'],
  searchHint: ['Nom ou code', 'Name or code'],
  noMatch: ['Aucune catégorie ne correspond.', 'No category matches.'],
  skipItem: ['Passer', 'Skip'],
  back: ['Précédente', 'Back'],
  others: ['Avis différents', 'Opinions differ'],
  otherSaid: ['{who} : {name}', '{who}: {name}'],
  yours: ['Vous avez choisi : {name}', 'You chose: {name}'],
  saving: ['Enregistrement…', 'Saving…'],
  saved: ['Enregistré : {name}.', 'Saved: {name}.'],
  savedConflict: ['Enregistré : {name}. Les avis diffèrent : l’annonce reste à trancher.', 'Saved: {name}. Reviewers disagree: the listing stays open.'],
  savedSettled: ['Enregistré : {name}. Les avis diffèrent ; la majorité dit {most}.', 'Saved: {name}. Reviewers disagree; most say {most}.'],
  notSaved: ['Non enregistré.', 'Not saved.'],
  shortcuts: ['Raccourcis clavier', 'Keyboard shortcuts'],
  keyChoose: ['choisir', 'choose'],
  keyFirst: ['accepter la première', 'accept the first'],
  keySearch: ['chercher', 'search'],
  keySkip: ['passer', 'skip'],
  keyBack: ['précédente', 'back'],

  // Errors by code of the error body; the server's own words are for codes that are not here.
  network: ['Le serveur ne répond pas. Vérifiez la connexion et réessayez.', 'The server cannot be reached. Check the connection and try again.'],
  overloaded: ['Le serveur est occupé. Réessayez dans un moment.', 'The server is busy. Try again in a moment.'],
  no_database: ['La base de données ne répond pas ; rien n’a été enregistré.', 'The database cannot be reached; nothing was stored.'],
  worker_crashed: ['Le modèle ne peut pas lire cette annonce.', 'The model cannot read this listing.'],
  body_timeout: ['L’envoi a pris trop de temps. Réessayez.', 'Sending took too long. Try again.'],
  unavailable: ['Le serveur est occupé. Réessayez dans un moment.', 'The server is busy. Try again in a moment.'],
  timeout: ['Le serveur a mis trop de temps. Réessayez.', 'The server took too long. Try again.'],
  internal_error: ['Une erreur s’est produite sur le serveur.', 'Something went wrong on the server.'],
  forbidden: ['Votre compte n’a pas le droit de faire cela.', 'Your account may not do this.'],
  not_found: ['Introuvable.', 'Not found.'],
  too_large: ['L’annonce est trop lourde.', 'The listing is too large.'],
  too_many_requests: ['Trop de demandes. Réessayez dans {s} s.', 'Too many requests. Try again in {s} s.'],
  invalid_image: ['Cette photo ne peut pas être lue.', 'This photo cannot be read.'],
  nothing_to_classify: ['Il n’y a rien à lire dans cette annonce.', 'There is nothing to read in this listing.'],
  invalid_request: ['La demande n’est pas valable.', 'The request is not valid.'],
};

const stored = localStorage.getItem('lang');
export let lang = LANGS.includes(stored) ? stored : navigator.language?.startsWith('fr') ? 'fr' : 'en';
const listeners = [];

export const known = key => Object.hasOwn(STRINGS, key);

/** The string `key` with `{name}` filled in. */
export function t(key, values = {}) {
  const text = STRINGS[key][LANGS.indexOf(lang)].replace(/ (?=[?:!»])|(?<=«) /g, '\u00a0'); // French marks do not begin a line
  return text.replace(/\{(\w+)\}/g, (_, name) => values[name] ?? '');
}

const share = p => new Intl.NumberFormat(lang, {style: 'percent', maximumFractionDigits: p < .1 || p > .99 ? 1 : 0}).format(p);
export const number = n => n.toLocaleString(lang);
export const percent = p => p > 0 && p < .0005 ? `< ${share(.001)}` : share(p);
export const signed = x => new Intl.NumberFormat(lang, {signDisplay: 'exceptZero', minimumFractionDigits: 2, maximumFractionDigits: 2}).format(x);
export const when = iso => new Intl.DateTimeFormat(lang, {dateStyle: 'medium', timeStyle: 'short'}).format(new Date(iso));

/** Call `f` when the language changes. */
export const onLanguage = f => listeners.push(f);

/** Switch the language, remember it, and say everything anew. */
export function setLanguage(to, remember = true) {
  lang = to;
  if (remember) localStorage.setItem('lang', to);
  document.documentElement.lang = to;
  for (const n of document.querySelectorAll('[data-t]')) n.textContent = t(n.dataset.t);
  for (const n of document.querySelectorAll('[data-label]')) n.setAttribute('aria-label', t(n.dataset.label));
  for (const n of document.querySelectorAll('[data-alt]')) n.alt = t(n.dataset.alt);
  for (const l of LANGS) document.getElementById(`lang-${l}`).setAttribute('aria-pressed', l === to);
  for (const f of listeners) f();
}
