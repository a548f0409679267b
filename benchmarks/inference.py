"""Speed of inference on the CPU: images, texts, and whole listings from bytes to answers.

    python -m benchmarks.inference --json [--quick] [--image timm:SPEC] [--text hf:FOLDER] [--cores 2]

`image_speedup` and `text_speedup` compare the runtime that `fastest` chooses with the same weights in PyTorch as it
comes: float32, default memory format, no autocast, texts padded in the order they arrive. Vectors must agree.
`predictor_ratio` compares the products per second of a `Predictor`, from encoded images and raw texts to answers,
with what is left if nothing but decoding, reading texts, encoding images and the head cost time, one after the other.
Everything compared is measured in this one run, in turns, and medians count. Without --text, texts are read by a
randomly initialised BERT of the shape of multilingual-e5-small: speed does not depend on the weights, but whether
8-bit integers agree does, so these are then left out.
"""
import os
import random
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import timm
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from benchmarks.harness import main, option, say
from rakuten_mm.core.config import EncoderConfig, preset
from rakuten_mm.core.process import n_threads
from rakuten_mm.data.dataset import Dataset
from rakuten_mm.data.image import decode_image, to_square
from rakuten_mm.data.ingestion import ingest
from rakuten_mm.data.schema import image_name, read_products
from rakuten_mm.data.text import clean_text
from rakuten_mm.models.embeddings import ahead
from rakuten_mm.models.encoders import HFEncoder, ImageEncoder, hf_encoder, image_encoder
from rakuten_mm.models.predictor import Predictor
from rakuten_mm.models.runtime import NAMES, OnnxRuntime, differences, encode, fastest, runtime, timed
from rakuten_mm.synthetic.catalogue import synthesize
from rakuten_mm.synthetic.images import make_image
from rakuten_mm.synthetic.lexicon import CLASSES
from rakuten_mm.synthetic.texts import write_text
from rakuten_mm.training.export import export
from rakuten_mm.training.fit import fit

BATCH,SIZE,TOLERANCE = 32, 224, .02


def cut(rows)->list: return [rows[i:i+BATCH] for i in range(0, len(rows), BATCH)]


def compare(name:str, encoder, samples, tried, eager, batch_size:int, rounds:int, names:tuple = NAMES)->tuple:
    "Figures of the runtime that is fastest on `tried`, beside `eager`, and its ONNX graph, if it has one."
    c = fastest(encoder, tried, TOLERANCE, batch_size, rounds//2, names)
    say(f"  {', '.join(f'{k} {1e3*s:.1f} ms' for k,s in c.seconds.items())}; chosen: {c.name}")
    for k,why in c.rejected.items(): say(f'  {k}: {why}')
    chosen = partial(encode, runtime(c.name, encoder, c.graph), encoder, samples, batch_size)
    want,got = eager(), chosen()
    relative,cosine = differences(want, got)
    if relative > TOLERANCE: raise SystemExit(f'{name}: vectors differ by {relative:.1%}, so speeds cannot be compared')
    s,n = timed(dict(eager=eager, chosen=chosen), rounds), len(samples)
    figures = dict(speedup=s['eager']/s['chosen'], per_s=n/s['chosen'], eager_per_s=n/s['eager'], runtime=c.name,
                   rejected=c.rejected, cosine=cosine, relative_diff=relative, max_diff=np.abs(want-got).max())
    return {f'{name}_{k}': v for k,v in figures.items()}, c.graph


def image_part(spec:str, n:int, rounds:int)->dict:
    "Images per second in batches at 224 px. PyTorch gets its images normalised beforehand, for free."
    encoder = image_encoder(spec)
    pixels = np.stack([np.asarray(make_image(np.random.default_rng(i), i%27, SIZE)) for i in range(n)])
    plain = timm.create_model(encoder.architecture, num_classes=0).eval()
    plain.load_state_dict(encoder.model.state_dict())
    x = ((torch.from_numpy(pixels).permute(0, 3, 1, 2)-encoder.mean)/encoder.std).contiguous()

    @torch.inference_mode()
    def eager(): return torch.cat([plain(b) for b in cut(x)]).numpy()
    out,graph = compare('image', encoder, pixels, pixels, eager, BATCH, rounds)
    return out | (spinning(graph, encoder, pixels, rounds) if graph else {})


def spinning(graph:bytes, encoder:ImageEncoder, pixels:np.ndarray, rounds:int)->dict:
    "Speed of an ONNX graph whose idle threads spin over that of one whose threads sleep, in batches and singly."
    few,runs = pixels[:8], {}
    for spin in (False, True):
        run = OnnxRuntime.from_bytes(graph, spin=spin)
        runs |= {(len(x), spin): partial(encode, run, encoder, x, b) for x,b in ((pixels, BATCH), (few, 1))}
    s = timed(runs, rounds, .2)
    gain = lambda x: s[len(x), False]/s[len(x), True]
    return dict(spin_gain=gain(pixels), spin_gain_single=gain(few), image_single_ms=1e3*s[len(few), False]/len(few))


def listings(n:int, seed:int = 1)->tuple[list[str], list[str]]:
    "Titles and descriptions of synthetic listings."
    rng = random.Random(seed)
    rows = [write_text(seed, i, rng.choice(list(CLASSES))) for i in range(n)]
    return [t for t,_,_ in rows], [d for _,d,_ in rows]


def random_bert(folder:Path)->HFEncoder:
    "A transformer of the shape of multilingual-e5-small, with 32,000 word pieces learnt from synthetic listings."
    tok,special = Tokenizer(models.WordPiece(unk_token='[UNK]')), ['[PAD]', '[UNK]', '[CLS]', '[SEP]']
    ends = [('[CLS]', 2), ('[SEP]', 3)]
    tok.normalizer,tok.pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=32_000, special_tokens=special, show_progress=False)
    tok.train_from_iterator(map(' '.join, zip(*listings(2000, 2), strict=True)), trainer)
    tok.post_processor = processors.TemplateProcessing(single='[CLS] $A [SEP]', special_tokens=ends)
    names = dict(zip(('pad_token', 'unk_token', 'cls_token', 'sep_token'), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tok, **names).save_pretrained(folder)
    shape = dict(hidden_size=384, num_hidden_layers=12, num_attention_heads=12, intermediate_size=1536)
    BertModel(BertConfig(vocab_size=32_000, **shape)).save_pretrained(folder)
    return hf_encoder(str(folder))


def text_part(spec:str|None, work:Path, n:int, rounds:int)->dict:
    "Texts per second from token ids to vectors, chosen runtime in length buckets and PyTorch in the order of arrival."
    encoder = hf_encoder(spec.removeprefix('hf:'), EncoderConfig()) if spec else random_bert(work/'bert')
    tokens = encoder.tokenize(*listings(n))
    lengths = np.array([len(t) for t in tokens])
    padded = sum(b.max()*len(b) for b in cut(lengths))

    @torch.inference_mode()
    def eager(): return torch.cat([encoder(encoder.collate(b)) for b in cut(tokens)]).numpy()
    names = NAMES if spec else ('eager-bf16', 'onnx')
    out,_ = compare('text', encoder, tokens, tokens[:n//3], eager, 16, rounds, names)
    return out | dict(text_mean_tokens=lengths.mean(), text_padding_in_order_of_arrival=1-lengths.sum()/padded)


def rows_of(raw:Path)->list[tuple]:
    "Designation, description and encoded image of a delivery's listings."
    rows,images = pd.concat(read_products(raw/'X_train_update.csv')), raw/'images'/'image_train'
    files = [(r, images/image_name(r.imageid, r.productid)) for r in rows.itertuples()]
    return [(r.designation, r.description, f.read_bytes()) for r,f in files if f.exists()]


def make_bundle(work:Path, quick:bool)->tuple[Path, list[tuple]]:
    "A model trained on synthetic listings, and those listings."
    rows,name,size = (240, 'smoke', 250) if quick else (1_200, 'cpu', 500)
    os.environ['RAKUTEN_MM_ARTIFACTS'] = str(work/'artifacts')
    ingest(synthesize(work/'raw', rows, 0, image_size=size, progress=False), work/'data', progress=False)
    data = Dataset.open(work/'data')
    return export(fit(data, preset(name), work/'run', progress=False), data, work/'run'), rows_of(work/'raw')


def pipeline(model:Predictor, rows:list[tuple])->list:
    "Answers to raw listings; while a batch is answered, the next one is prepared."
    prepared = ahead(lambda part: [model.prepare(*r) for r in part], cut(rows))
    return [answer for _,ready in prepared for answer in model.predict(ready)]


@torch.inference_mode()
def bare_costs(model:Predictor, rows:list[tuple])->dict:
    "The unavoidable work, as functions that do it for all listings. This is all that knows what a network is made of."
    net,size = model.net, model.size
    texts = cut([(clean_text(t or ''), clean_text(d or '')) for t,d,_ in rows])
    decode = lambda: [to_square(decode_image(b, size), size) for *_,b in rows]
    pixels = [np.stack(p) for p in cut(decode())]

    @torch.inference_mode()
    def read(part):
        titles,descriptions = map(list, zip(*part, strict=True))
        tokens = net.ngrams.tokenize(titles, descriptions)
        vectors = [net.ngrams(tokens)]
        if net.text is not None: vectors.append(torch.from_numpy(net.text.encode(titles, descriptions)))
        return dict(text=torch.cat(vectors, 1), linear=net.linear(tokens))

    @torch.inference_mode()
    def head(batch): return net.ensemble_logits(batch).softmax(1).numpy()

    def batch(part, p):
        there = {k: torch.ones(len(part), dtype=torch.bool) for k in ('has_text', 'has_image')}
        described = torch.tensor([d != '' for _,d in part])
        return read(part) | there | dict(image=torch.from_numpy(model.encode(p)), has_description=described)
    batches = list(map(batch, texts, pixels))
    return dict(decode=decode, text=lambda: list(map(read, texts)), image=lambda: list(map(model.encode, pixels)),
                head=lambda: list(map(head, batches)))


def predictor_part(work:Path, quick:bool, rounds:int)->dict:
    "Products per second of a `Predictor` over what the bare costs would allow."
    bundle,rows = make_bundle(work, quick)
    model,rows = Predictor.load(bundle), rows[:64 if quick else 256]
    n,bare = len(rows), bare_costs(model, rows)
    assert len(pipeline(model, rows)) == n
    s = timed(bare | dict(predictor=partial(pipeline, model, rows)), rounds)
    total = sum(s[k] for k in bare)
    return dict(predictor_ratio=total/s['predictor'], predictor_per_s=n/s['predictor'], bare_per_s=n/total) | {
        f'bare_{k}_ms': 1e3*s[k]/n for k in bare}


def bench(args, work:Path)->dict:
    torch.set_num_threads(n_threads()); torch.manual_seed(0)
    q,rounds = args.quick, 3 if args.quick else 7
    out = dict(threads=args.cores, cores=n_threads(), quick=q)
    say('images'); out |= image_part(args.image, 32 if q else 64, rounds)
    say('texts'); out |= text_part(args.text, work, 48 if q else 192, rounds)
    say('whole listings'); return out | predictor_part(work, q, rounds)


if __name__ == '__main__':
    main(bench, __doc__,
         option('--image', default='timm:tf_efficientnet_lite0', help='image encoder, timm:<name or folder>'),
         option('--text', help='text encoder, hf:<folder>'), cores=2)
