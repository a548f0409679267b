"Explanations of models whose reasons are known, and of a real bundle."
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from rakuten_mm.data.dataset import Dataset
from rakuten_mm.data.image import load_square
from rakuten_mm.models.explanation import FIELDS, N_CHUNKS, cut, explain, explanation_figure, words_html
from rakuten_mm.models.predictor import Predictor, Prepared


class Tfidf:
    "A text model without gradients."
    codes,names,modalities,size = [10, 40, 2583], {10: 'Livres', 40: 'Jeux', 2583: 'Piscine'}, ['text'], 32
    titles = ('livre poche roman', 'roman livre broché', 'jeu vidéo console', 'console jeu manette',
              'piscine ronde pompe', 'pompe bâche piscine')

    def __init__(self):
        self.pipe = make_pipeline(TfidfVectorizer(), LogisticRegression(C=100)).fit(self.titles, [0, 0, 1, 1, 2, 2])
        self.calls,self.longest = 0, 0

    def probs(self, items):
        self.calls += 1; self.longest = max(self.longest, len(items))
        assert all(p.title or p.text for p in items), 'asked about nothing'
        return self.pipe.predict_proba([f'{p.title} {p.text}' for p in items])


class Corner:
    "An image model that looks at the redness of the lower right quarter, and certain beyond single precision."
    codes,names,modalities,size = [1, 2], {1: 'red', 2: 'other'}, ['image'], 40

    def probs(self, items):
        assert all(p.pixels is not None for p in items)
        red = np.array([(p.pixels[20:, 20:, 0].astype(float)-p.pixels[20:, 20:, 1]).mean()/255 for p in items])
        p = (1/(1+np.exp(-60*(red-.2)))).astype('float32')
        return np.stack([p, 1-p], 1)


@pytest.fixture(scope='module')
def model(bundle): return Predictor.load(bundle)


@pytest.fixture(scope='module')
def listings(model, data_dir):
    data = Dataset.open(data_dir)
    rows = data.products[:6].itertuples()
    return [Prepared(r.title, r.text, load_square(data.images_dir/r.image, model.size)) for r in rows]


def test_a_model_without_gradients():
    model = Tfidf()
    e = explain(model, Prepared('Pompe de Piscine, neuve', 'pas un livre'))
    weight = {w.word: w.weight for w in e.words}
    assert e.prdtypecode == 2583 and e.label == 'Piscine' and e.regions is None and e.modalities == {'text': 1}
    assert min(weight['Pompe'], weight['Piscine,']) > .5 > 0 > weight['livre'] and abs(weight['neuve']) < 1e-9
    assert e.probability == pytest.approx(model.probs([Prepared('Pompe de Piscine, neuve', 'pas un livre')]).max())
    assert explain(model, Prepared('Pompe', 'livre'), 10).words[0].weight < 0


def test_removing_what_weighs_most_hurts_most():
    "Deletion test: the heaviest words matter more than the lightest."
    model,p = Tfidf(), Prepared('vends piscine ronde avec pompe et notice', 'visible chez moi')
    words = sorted(explain(model, p).words, key=lambda w: w.weight)
    left = [model.probs([cut(p, [(w.field, w.start, w.end) for w in some])])[0, 2] for some in (words[-2:], words[:2])]
    assert left[0] < left[1]


def test_a_repeated_word_cannot_hide():
    e = explain(Tfidf(), Prepared('piscine', 'Piscine et encore PISCINE !'))
    weights = [w.weight for w in e.words if w.word.lower() == 'piscine']
    assert len(weights) == 3 and len(set(weights)) == 1 and weights[0] > .5


@pytest.mark.parametrize('n', [1, 60, 61, 81, 5_000])
def test_cost_is_bounded(n):
    model,p = Tfidf(), Prepared('piscine', ' '.join(f'mot{i}' for i in range(n-1)))
    e = explain(model, p, batch_size=16)
    assert e.asked <= 2+60+N_CHUNKS+2 and model.calls <= -(-e.asked//16) and model.longest <= 16
    covered = {i for w in e.words if w.field == 'description' for i in range(w.start, w.end)}
    assert covered >= {m.start() for m in re.finditer(r'\S', p.text)}, 'every character has a weight'
    assert all(getattr(p, FIELDS[w.field])[w.start:w.end] == w.word for w in e.words)


def test_regions_find_the_corner():
    pixels = np.zeros((40, 40, 3), 'uint8'); pixels[24:, 24:, 0] = 255
    e = explain(Corner(), Prepared('not read', pixels=pixels), grid=5)
    i,j = np.unravel_index(e.regions.argmax(), e.regions.shape)
    assert e.words == [] and e.modalities == {'image': 1} and min(i, j) >= 3
    assert abs(e.regions[:2, :2]).max() < 1e-6 and np.isfinite(e.regions).all()
    blank = explain(Corner(), Prepared(pixels=np.full((40, 40, 3), 255, 'uint8')))
    assert not blank.regions.any() and sum(blank.modalities.values()) == 1
    with pytest.raises(ValueError, match='finer than an image'): explain(Corner(), Prepared(pixels=pixels), grid=41)
    with pytest.raises(ValueError, match='this model reads image'): explain(Corner(), Prepared('words only'))


def test_of_a_bundle(model, listings):
    for p in listings:
        answer,e = model.predict([p])[0], explain(model, p)
        assert e.prdtypecode == answer.prdtypecode and e.label == answer.label
        assert e.probability == pytest.approx(answer.probability, abs=1e-2)
        assert e.regions.shape == (7, 7) and set(e.modalities) == {'text', 'image'}
        assert sum(e.modalities.values()) == pytest.approx(1)
        assert np.isfinite([w.weight for w in e.words]).all() and np.isfinite(e.regions).all() and e.words
        again = json.loads(json.dumps(e.to_dict(), allow_nan=False))
        assert again['words'][0]['word'] == e.words[0].word and np.allclose(again['regions'], e.regions)
        assert again['prdtypecode'] in model.codes


def test_parts_of_a_bundle(model, listings):
    p = listings[0]
    text,image = explain(model, Prepared(p.title, p.text)), explain(model, Prepared(pixels=p.pixels))
    assert text.regions is None and text.modalities == {'text': 1}
    assert image.words == [] and image.modalities == {'image': 1}
    assert explain(model, Prepared('Piscine')).words[0].word == 'Piscine'     # nothing is left without it
    code = model.codes[-1]
    assert explain(model, p, code, grid=3, max_words=5).prdtypecode == code
    with pytest.raises(ValueError, match='does not know the class -1'): explain(model, p, -1)
    with pytest.raises(ValueError, match='nothing to explain'): explain(model, Prepared())


EVIL = '<script>alert(1)</script> "><img src=x onerror=alert(1)> piscine \'onmouseover=alert(1) &lt;b&gt; $x^$'


def test_html_runs_nothing():
    class Reader(HTMLParser):
        def __init__(self): super().__init__(); self.tags,self.attrs,self.said = set(), set(), ''
        def handle_starttag(self, tag, attrs): self.tags.add(tag); self.attrs |= {k for k,_ in attrs}
        def handle_data(self, data): self.said += data
    for p in (Prepared(EVIL, EVIL), Prepared('piscine', EVIL+' '.join(f'{EVIL}{i}' for i in range(300)))):
        e,reader = explain(Tfidf(), p, max_words=8), Reader()
        reader.feed(words_html(e))
        assert reader.tags == {'p', 'span'} and reader.attrs == {'class', 'style', 'title'}
        assert reader.said.replace('\n', '') == p.title+p.text, 'every character is shown, and nothing else'


def test_figures_of_odd_texts(model, listings):
    p = Prepared(EVIL, '', listings[0].pixels)
    fig = explanation_figure(explain(model, p), p); fig.canvas.draw()
    assert len(fig.axes) == 3
