"Fault 52: threads are explicit, an answer depends on neither them nor the batch; and what a runtime choice refuses."
import os

import numpy as np
import onnx
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from rakuten_mm.core.process import n_threads
from rakuten_mm.models import runtime as rt
from rakuten_mm.models.encoders import hf_encoder, image_encoder
from rakuten_mm.models.onnx_export import OPSET, export_onnx, length_buckets
from rakuten_mm.synthetic.images import make_image

SIZE = 64
WORDS = ['piscine', 'livre', 'de', 'poche', 'ronde', 'jeu', 'pour', 'enfant', 'rare', 'neuf']


@pytest.fixture(scope='module')
def text(tmp_path_factory):
    "A tiny BERT, and the tokens of 11 texts of 3 to 60 tokens."
    d,rng = tmp_path_factory.mktemp('bert'), np.random.default_rng(0)
    tok = Tokenizer(models.WordLevel({w: i for i,w in enumerate(['[PAD]', '[UNK]', *WORDS])}, unk_token='[UNK]'))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tok, pad_token='[PAD]', unk_token='[UNK]').save_pretrained(d)
    torch.manual_seed(0)
    size = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    BertModel(BertConfig(vocab_size=12, **size)).save_pretrained(d)
    encoder = hf_encoder(str(d))
    return encoder, encoder.tokenize([' '.join(rng.choice(WORDS, n)) for n in rng.integers(3, 60, 11)], ['']*11)


@pytest.fixture(scope='module')
def image():
    "The image encoder, and 5 images."
    images = [np.asarray(make_image(np.random.default_rng(i), i, SIZE)) for i in range(5)]
    return image_encoder('timm:tf_efficientnet_lite0'), np.stack(images)


@pytest.fixture(scope='module')
def graphs(text, image): return dict(text=export_onnx(text[0]), image=export_onnx(image[0], SIZE))


@pytest.fixture(params=['text', 'image'])
def case(request, graphs):
    "Encoder, items and graph."
    return *request.getfixturevalue(request.param), graphs[request.param]


@pytest.fixture(params=['eager', 'onnx'])
def run(request, case): return rt.runtime(request.param, case[0], case[2] if request.param == 'onnx' else None)


def test_f52_same_vectors_for_every_batch_size(case, run):
    encoder,items,_ = case
    whole = rt.encode(run, encoder, items, len(items))
    for n in range(1, len(items)): assert rt.differences(whole, rt.encode(run, encoder, items, n))[0] < 1e-4, n


def test_f52_same_vectors_in_any_company(case, run):
    encoder,items,_ = case
    whole,order = rt.encode(run, encoder, items, 4), np.random.default_rng(1).permutation(len(items))
    shuffled = items[order] if isinstance(items, np.ndarray) else [items[i] for i in order]
    assert rt.differences(whole[order], rt.encode(run, encoder, shuffled, 4))[0] < 1e-4


def test_f52_same_vectors_for_one_and_two_threads(case):
    encoder,items,graph = case
    one,two = (rt.encode(rt.OnnxRuntime.from_bytes(graph, threads=n), encoder, items, 4) for n in (1, 2))
    assert rt.differences(one, two)[0] < 1e-4
    before = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            assert rt.differences(one, rt.encode(rt.TorchRuntime(encoder), encoder, items, 4))[0] < 1e-4
    finally: torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, 'sched_getaffinity'), reason='the system does not tell')
def test_f52_threads_are_counted_by_what_the_process_may_use(graphs, monkeypatch):
    monkeypatch.setattr(os, 'cpu_count', lambda: 24)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: {3})
    o = rt.OnnxRuntime.from_bytes(graphs['text']).session.get_session_options()
    assert n_threads() == 1 == o.intra_op_num_threads == o.inter_op_num_threads
    assert o.get_session_config_entry('session.intra_op.allow_spinning') == '0'
    assert rt.OnnxRuntime.from_bytes(graphs['text'], threads=5).session.get_session_options().intra_op_num_threads == 5


def test_graph_is_whole_and_open_where_it_should_be(graphs):
    for name,graph in graphs.items():
        model = onnx.load_from_string(graph)
        onnx.checker.check_model(model)
        assert model.opset_import[0].version == OPSET and not any(t.external_data for t in model.graph.initializer)
        assert not {'BatchNormalization', 'LayerNorm'} & {n.op_type for n in model.graph.node}
        shapes = {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in model.graph.input}
        text = {'input_ids': ['batch', 'length'], 'attention_mask': ['batch', 'length']}
        want = dict(pixels=['batch', SIZE, SIZE, 3]) if name == 'image' else text
        assert shapes == want and [o.name for o in model.graph.output] == ['vectors']


def test_export_leaves_the_encoder_alone(text):
    encoder,_ = text
    before,attention = {k: v.clone() for k,v in encoder.state_dict().items()}, encoder.model.config._attn_implementation
    export_onnx(encoder)
    assert all((v == before[k]).all() for k,v in encoder.state_dict().items())
    assert encoder.model.config._attn_implementation == attention


def test_choice_rejects_what_differs_and_survives_what_cannot_be_exported(text, monkeypatch):
    encoder,tokens = text
    monkeypatch.setattr(rt, 'export_onnx', lambda *a: (_ for _ in ()).throw(RuntimeError('no such operator\nand more')))
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: False)
    c = rt.fastest(encoder, tokens, rounds=1)
    assert c.name == 'eager' and c.graph is None and c.rejected['onnx'] == 'RuntimeError: no such operator'
    assert 'no bfloat16' in c.rejected['eager-bf16'] and set(c.seconds) == {'eager'}


def test_choice_rejects_a_fast_runtime_that_is_wrong(text, monkeypatch):
    encoder,tokens = text
    wrong = lambda **arrays: np.full((len(arrays['input_ids']), encoder.dim), np.nan, np.float32)
    runs = {'eager': rt.TorchRuntime(encoder), 'onnx': wrong}
    monkeypatch.setattr(rt, 'make_runtimes', lambda *a: (runs, {'onnx': b''}, {}))
    c = rt.fastest(encoder, tokens, rounds=1)
    assert c.name == 'eager' and 'differs by inf' in c.rejected['onnx'] and c.cosine['onnx'] == -1


def test_buckets_hold_each_text_once_and_waste_little():
    lengths = np.random.default_rng(0).integers(1, 128, 500)
    for kw in ({}, dict(batch_size=7), dict(batch_size=500, max_tokens=600), dict(batch_size=500, max_tokens=1)):
        out = length_buckets(lengths, **kw)
        assert sorted(np.concatenate(out)) == list(range(500))
        assert all(len(b) == 1 or len(b)*lengths[b].max() <= kw.get('max_tokens', 1e9) for b in out)
    assert sum(len(b)*lengths[b].max() for b in length_buckets(lengths)) < 1.05*lengths.sum()
