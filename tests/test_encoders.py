"""Families of encoders, small or with random weights: each is built from a folder, learns, exports, agrees and serves.

Real weights are a matter of the folder's name only."""
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rakuten_mm.core.config import EncoderConfig, NetworkConfig, TrainConfig, preset
from rakuten_mm.models.bundle import load_bundle, save_bundle
from rakuten_mm.models.encoders import encoder_fingerprint, hf_encoder, image_encoder
from rakuten_mm.models.network import build_network
from rakuten_mm.models.onnx_export import export_onnx
from rakuten_mm.models.predictor import Predictor
from rakuten_mm.models.runtime import OnnxRuntime, TorchRuntime, differences, encode

TITLES = ['Piscine ronde', 'Livre de poche', 'Jeu pour enfant', 'Livre rare']*2
TEXTS = ['', 'un livre de poche', '', 'rare neuf']*2
SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
POOLING = {'camembert': 'mean', 'deberta': 'mean', 'modernbert': 'mean', 'qwen3': 'last', 'clip': 'tower',
           'siglip': 'tower', 'siglip2': 'tower'}


def save_tokenizer(folder):
    "Words as tokens, with the special ones that every family knows."
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    words = ['<s>', '<pad>', '<unk>', '</s>', *sorted({w for t in TITLES+TEXTS for w in t.split()})]
    tok = Tokenizer(models.WordLevel({w: i for i,w in enumerate(words)}, unk_token='<unk>'))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    tok.post_processor = processors.TemplateProcessing(single='<s> $A </s>', special_tokens=[('<s>', 0), ('</s>', 3)])
    PreTrainedTokenizerFast(tokenizer_object=tok, bos_token='<s>', pad_token='<pad>', eos_token='</s>',
                            unk_token='<unk>').save_pretrained(folder)
    return dict(vocab_size=len(words), pad_token_id=1, bos_token_id=0, eos_token_id=3)


def text_folder(kind, folder):
    "A folder as the hub has it, of a small network with random weights."
    import transformers as hf
    ids = save_tokenizer(folder)
    torch.manual_seed(0)
    match kind:
        case 'camembert': cfg = hf.CamembertConfig(**SMALL, **ids, max_position_embeddings=40)
        case 'deberta': cfg = hf.DebertaV2Config(**SMALL, **ids, relative_attention=True, pos_att_type=['p2c', 'c2p'],
                                                 norm_rel_ebd='layer_norm', share_att_key=True, position_buckets=16)
        case 'modernbert': cfg = hf.ModernBertConfig(**SMALL, **ids, cls_token_id=0, sep_token_id=3)
        case 'qwen3': cfg = hf.Qwen3Config(**SMALL, **ids, num_key_value_heads=1, head_dim=16)
        case _:
            name = dict(clip='CLIP', siglip='Siglip', siglip2='Siglip2')[kind]
            long = dict(max_position_embeddings=12)
            cfg = getattr(hf, f'{name}Config')(text_config=dict(**SMALL, **ids, **long, projection_size=32),
                                               vision_config=dict(SMALL, image_size=32, patch_size=16))
    hf.AutoModel.from_config(cfg).save_pretrained(folder)
    if kind == 'qwen3':  # as sentence-transformers writes it
        (folder/'1_Pooling').mkdir()
        (folder/'1_Pooling'/'config.json').write_text(json.dumps(dict(pooling_mode_lasttoken=True)))


def fine_tuning(**encoders):
    network = NetworkConfig(members=1, dim=16, dropout=0., input_dropout=0., modality_dropout=0.)
    return TrainConfig(EncoderConfig(ngram_features=100, ngram_dim=8, **encoders), network)


def learn(net, batch, part):
    "A step of training; gives the share of the encoder's parameters that moved."
    encoder = getattr(net, part)
    before = [p.detach().clone() for p in encoder.parameters()]
    opt = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 1.)
    net.train()
    torch.nn.functional.cross_entropy(net(batch)[0, -1], batch['target']).backward()
    opt.step(); net.eval().requires_grad_(False)
    return np.mean([not torch.equal(a, b) for a,b in zip(before, encoder.parameters(), strict=True)])


def batch_of(net, **parts):
    n = len(TITLES)
    both = dict(has_text=torch.ones(n, dtype=bool), has_image=torch.full((n,), 'pixels' in parts))
    dense = net.ngrams(net.ngrams.tokenize(TITLES, TEXTS)) if net.ngrams else torch.zeros(n, 0)
    return dict(text=dense, target=torch.tensor([0, 1, 2, 1]*2), **both, **parts)


@pytest.mark.system
@pytest.mark.parametrize('kind', POOLING)
def test_texts(kind, tmp_path):
    "What a bundle says is what the trained network said, and its graph too."
    text_folder(kind, tmp_path)
    cfg = fine_tuning(text=f'hf:{tmp_path}', image=None, train_text=True, max_tokens=64, checkpointing=kind != 'clip')
    net = build_network(cfg, TITLES, TEXTS, 3)
    assert net.text.pooling == POOLING[kind] and net.text.length <= 64 and net.text.dim == 32
    tokens = net.text.collate(net.text.tokenize(TITLES, TEXTS))
    assert learn(net, batch_of(net, tokens=tokens), 'text') > .8
    vectors = net.text.encode(TITLES, TEXTS)
    assert np.allclose(vectors[:1], net.text.encode(TITLES[:1], TEXTS[:1]), atol=1e-5)  # padding changes nothing
    bundle = save_bundle(tmp_path/'bundle', net, [1, 2, 3], {1: 'a', 2: 'b', 3: 'c'})
    again,_ = load_bundle(bundle)
    assert again.text.pooling == net.text.pooling and np.allclose(again.text.encode(TITLES, TEXTS), vectors, atol=1e-5)
    model = Predictor.load(bundle)
    assert len(model.predict([model.prepare(t) for t in TITLES])) == len(TITLES)
    items = net.text.tokenize(TITLES, TEXTS)
    graph = OnnxRuntime.from_bytes(export_onnx(net.text))
    assert differences(encode(TorchRuntime(net.text), net.text, items, 3), encode(graph, net.text, items, 3))[0] < 1e-3


def image_folder(name, folder):
    "timm's local-dir layout, with random weights."
    import timm
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=0)
    save_file({k: v.contiguous() for k,v in net.state_dict().items()}, folder/'model.safetensors')
    cfg = {k: v for k,v in net.pretrained_cfg.items() if isinstance(v, str|int|float|bool|list|tuple)}
    (folder/'config.json').write_text(json.dumps(dict(architecture=name, pretrained_cfg=cfg | dict(num_classes=0))))


@pytest.mark.system
@pytest.mark.parametrize(('name', 'size'), [
    ('test_vit', 96), ('vit_tiny_patch16_224', 160), ('eva02_tiny_patch14_224', 112), ('vit_small_patch16_dinov3', 96),
    ('vit_base_patch32_clip_224', 96), ('vit_base_patch16_siglip_224', 96), ('test_convnext', 64)])
def test_images(name, size, tmp_path):
    "At another size than that of the weights; a vision transformer interpolates its positions."
    image_folder(name, tmp_path)
    cfg = fine_tuning(ngrams=False, text=None, image=f'timm:{tmp_path}', image_size=size, image_levels=False,
                      train_image=True, checkpointing=True)
    net = build_network(cfg, TITLES, TEXTS, 3)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (8, size, size, 3), 'uint8'))
    assert net.image.architecture == name and net.image(pixels[:2]).shape == (2, net.image.dim)
    assert learn(net, batch_of(net, pixels=pixels), 'image') > .8
    bundle = save_bundle(tmp_path/'bundle', net, [1, 2, 3], {1: 'a', 2: 'b', 3: 'c'})
    again,_ = load_bundle(bundle)
    want = TorchRuntime(net.image)(pixels=pixels.numpy())
    assert np.allclose(TorchRuntime(again.image)(pixels=pixels.numpy()), want, atol=1e-4)
    graph = OnnxRuntime.from_bytes(export_onnx(net.image, size))
    assert differences(want, graph(pixels=pixels.numpy()))[0] < 1e-2


def test_pooler_that_nothing_uses(tmp_path):
    "A checkpoint without one gets a random one, which would be part of every vector's name."
    text_folder('camembert', tmp_path)
    names = set()
    for seed in (1, 2):
        torch.manual_seed(seed); names.add(encoder_fingerprint(hf_encoder(str(tmp_path))))
    assert len(names) == 1


def test_weights_of_another_network(tmp_path):
    "Are refused in a sentence."
    image_folder('test_convnext', tmp_path)
    config = json.loads((tmp_path/'config.json').read_text())
    (tmp_path/'config.json').write_text(json.dumps(config | dict(architecture='test_efficientnet')))
    with pytest.raises(ValueError, match='do not fit the network'): image_encoder(f'timm:{tmp_path}')


def test_text_network_without_a_tower(tmp_path):
    import transformers as hf
    save_tokenizer(tmp_path)
    cfg = hf.ViTConfig(**SMALL, image_size=32, patch_size=16)
    hf.AutoModel.from_config(cfg).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r'reads no texts|no model'): hf_encoder(str(tmp_path))


def test_frozen_siglip2_is_a_preset():
    cfg = preset('gpu-frozen-siglip2')
    assert not cfg.fine_tunes and cfg.network.members > 1 and cfg.encoders.image_size == 384
