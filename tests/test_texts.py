"Cleaning keeps words: what sellers and exports write, and what a reader of the page would see of it."
import html
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rakuten_mm.data.text import clean_text, is_blank

KEPT = [

    # nothing of these is markup
    'Roman <<Les Misérables>> de Victor Hugo', '<Robot de piscine>', 'Câble longueur 2<x et y>3 pour vélo',
    'Prix <20€, taille > 36', "J'ai <3 les chats", 'a < b > c', 'contact <nom@exemple.fr>',
    'notice <http://exemple.fr/a?b=1>', 'notice <https://exemple.fr>', '<Table basse> en bois', '<Data center>',
    '<Robot>', '</Robot>', '<!Promo!>', 'Lot <b', '<<3>>', '<>', '<...>', '->neuf<-', '<Robot taille="XL">', '2<3',
    '<- retour', 'S/M < L', 'vis <M8 x 20> inox', '<b-fit>', '<a@b.fr>', '<?>', '<!>', 'R&DVD', 'AT&Tcopy',
    'pull&parasol', 'Rock&notice', 'VW Golf&gti', 'jeu&region', 'vol&centre', 'lot&ampoules', 'R&LTDA', 'a&quotidien',
    'A&B;C', 'H&M', 'a & b', 'Tom&Jerry', 'n&#1', 'prix&times2', 'piles&micro2', 'x&lt3', '&&', '&', '&;', '&#;',
    '&#x;', '1000 &degustations', 'Blu-ray&regards', 'a=1&copy=2', 'Vélo 26" – NEUF', '¿tui', 'ÉTÉ',
    '👩\u200d🚒 pompier', '🏳\u200d🌈', '👍🏽 Lot de 3']

CLEANED = [
    ('Figurine &lt;Naruto Shippuden&gt; 15 cm', 'Figurine <Naruto Shippuden> 15 cm'),
    ('&amp;lt;Naruto&amp;gt;', '<Naruto>'),
    # tags inside of words, and around them
    ('pis<b>cine</b>', 'piscine'), ('elec<wbr>trique', 'electrique'), ('elec<wbr/>trique', 'electrique'),
    ('T<SUP>2</SUP>', 'T2'), ('<span class="a">Ro</span><span>bot</span>', 'Robot'),
    ('un<br>deux<br/>trois<BR />quatre', 'un deux trois quatre'), ('<ul><li>un</li><li>deux</li></ul>', 'un deux'),
    ('<p>un</p><p>deux</p>', 'un deux'), ('<td>un</td><td>deux</td>', 'un deux'),
    ('<div\nclass="a">un</div>deux', 'un deux'), ('&amp;lt;b&amp;gt;Lot', 'Lot'), ('<b>Lot', 'Lot'),
    ('Lot</b>', 'Lot'),
    # attributes
    ('<img alt="a > b" src=x>Lot', 'Lot'), ("<a href='x>y' title=\"z\">Lot</a>", 'Lot'),
    ('<p style="color:red>Lot</p>', 'Lot'), ('<font face="Arial" size=2"">Lot</font>', 'Lot'),
    ('<a href="x"class="y">Lot</a>', 'Lot'), ('<input disabled>Lot', 'Lot'), ('<td nowrap>Lot</td>', 'Lot'),
    ('<p title="&lt;b&gt; x">Lot</p>', 'Lot'), ('<o:p></o:p>Lot', 'Lot'),
    # what is no text at all
    ('a<!-- b > c -->d', 'a d'), ('<!DOCTYPE html>Lot', 'Lot'), ('<?xml version="1.0"?>Lot', 'Lot'),
    ('<![CDATA[Lot de 3]]>', 'Lot de 3'), ('<!--[if gte mso 9]><xml>x</xml><![endif]-->Lot', 'Lot'),
    ('a<script>if (x<y) z()</script>b', 'a b'), ('a<style type="text/css">b {color: red}</style>b', 'a b'),
    ('a<script>b', 'a b'),
    # entities
    ('&Eacute;tag&egrave;re &amp; table', 'Étagère & table'), ('&Eacutetag&egravere', 'Étagère'),
    ('th&eacute &agrave la menthe', 'thé à la menthe'), ('l&#39eau', "l'eau"), ('th&#233', 'thé'),
    ('&#xe9;t&#xE9', 'été'), ('P&EACUTE;REZ', 'PÉREZ'), ('&copy 2020', '© 2020'), ('Lego&reg', 'Lego®'),
    ('&laquoLes Mis&eacuterables&raquo', '«Les Misérables»'), ('a&#11;b', 'a b'), ('a&nbsp;b', 'a b'),
    ('&lt &gt', '< >'), ('&#'+'9'*5_000+';', '&#'+'9'*5_000+';'),
    # characters that nobody sees
    ('Ro\xadbot de pis\xadcine', 'Robot de piscine'), ('Ro&shy;bot', 'Robot'),
    ('\u2066Robot\u2069 de \u2067piscine\u2069', 'Robot de piscine'), ('Ro\u200bbot', 'Robot'),
    ('\u061cRobot\u202e', 'Robot'), ('Ro\u034fbot', 'Robot'), ('Ro\u180ebot', 'Robot'), ('e\u034f\u0301', 'é'),
    ('❤\ufe0f', '❤'), ('pis\u200dcine', 'piscine'), ('🏴\U000e0067\U000e0062\U000e007f', '🏴'),
    ('\ufeffRobot', 'Robot'), ('Ro\ufff9bot', 'Robot'),
    ('Robot\u3164de\u2800piscine\uffa0bleu', 'Robot de piscine bleu'), ('Robot\u115f', 'Robot'),
    ('un\x0bdeux\x0ctrois\u2028quatre\u2029cinq\x1csix', 'un deux trois quatre cinq six'),
    ('un\xa0deux\u2009trois\u202fquatre', 'un deux trois quatre'), ('un\x85deux', 'un…deux'),
    # accents and mojibake
    ('e\u0301te\u0301', 'été'), ('Â·', '·'), ('grÃ¢ce', 'grâce'), ('MarÃ\xada', 'María'),
    ('À bulles'.encode().decode('latin-1'), 'À bulles')]

UNSEEN = [
    '', ' ', '\xa0', '\u3164', '\u2800', '\u115f\u1160', '\uffa0', '\u180e', '\u200b\u200b', '\ufe0f', '\u2066\u2069',
    '\xad', '&shy;', '&nbsp;', '<br>', '<p></p>', '<p>&nbsp;</p>', '\u034f', '\U000e0041', '\u061c', '\u2028', '\x0b',
    '\ud83d', '<!-- x -->']


@pytest.mark.parametrize('s', KEPT)
def test_f83_what_is_no_markup_keeps_every_word(s): assert clean_text(s) == s


@pytest.mark.parametrize(('s', 'want'), CLEANED)
def test_f83_markup_and_unseen_characters_go_and_words_stay(s, want):
    assert clean_text(s) == want
    assert clean_text(want) == want


@pytest.mark.parametrize('s', UNSEEN)
def test_f83_a_text_of_nothing_visible_is_empty(s): assert is_blank(s) and clean_text(s) == ''


def test_f83_what_can_be_read_is_not_blank():
    assert not any(map(is_blank, KEPT)) and not any(is_blank(s) for s,_ in CLEANED)


def test_f83_every_depth_of_escapes_gives_the_plain_title():
    s = plain = 'Étagère <Billy> & table à thé'
    for _ in range(9):
        s = html.escape(s)
        assert clean_text(s) == plain
        assert clean_text(s.replace('É', '&amp;Eacute;').replace('à', '&amp;agrave;')) == plain


PIECES = [
    '<', '>', '/', 'b', '<b>', '</b>', '<br>', '<p class="a">', '&', 'amp;', '&lt;', '&gt;', 'eacute', '&eacute', ';',
    '#38', '#x26', '&copy', '&shy;', 'Ã©', 'Â', '\xad', '\x85', '\u200d', '👩', '\ufe0f', 'é', 'e\u0301', '"', "'",
    '=', ' ', '\n', '\u3164', '\uffa0', '＜', '＞', '＆', '<script>', '</script>', '<!--', '-->', '<![CDATA[', ']]>',
    'Robot', 'ﬁ', '\xa0', 'Ã\xa0', 'â€™', '\x80', '\u0301', '\x0b', '&#11;', 'ß', '\ud83d']


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(st.lists(st.one_of(st.sampled_from(PIECES), st.characters()), max_size=16).map(''.join))
def test_f83_cleaning_again_changes_nothing(s):
    once = clean_text(s)
    assert clean_text(once) == once and once == ' '.join(once.split())
    assert is_blank(s) == (once == '')


def test_f60_brackets_and_quotes_take_linear_time():
    "Whatever is not closed; 20 kB take about 20 ms."
    parts = [
        '<a b="', '<a b=\'" ', '<a b="<a c" d="', '<script>', '<style a=', '<!--', '<!-- --', '<![if ', '<a  ',
        '<br /', '<a b=c"d ', '&#38', '&#x26', '&amp', '<a b="<3<3', '\u200d<', '<<<b>b>', '&l<b>t;', '<o:p ',
        '<p ">', '<?xml ']
    texts = [(p*20_000)[:20_000] for p in parts]
    texts += ['<a'+' checked'*2_500, '<'*8_000+'b>'*6_000, '<script>'+'<'*20_000, '<a b="'+'x'*20_000]
    texts += ['<a'+' '*20_000, '<a b'+' '*20_000+'=', '&#'+'9'*20_000, '&#x'+'f'*20_000+';']
    for s in texts:
        start = time.process_time(); once = clean_text(s)
        assert time.process_time()-start < .2, s[:20]
        assert clean_text(once) == once, s[:20]
