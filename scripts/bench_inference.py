"""Speed of inference on the CPU: pictures, texts, and whole listings from bytes to answers.

    python scripts/bench_inference.py --json out.json [--quick] [--image timm:SPEC] [--text hf:FOLDER] [--threads 2]

`image_speedup` and `text_speedup` compare the runtime that `fastest` chooses with the same weights in PyTorch as it comes: float32,
default memory format, no channels-last, no autocast, texts padded in the order they arrive. Vectors must agree. `predictor_ratio`
compares the products per second of a `Predictor`, from encoded pictures and raw texts to answers, with what is left if nothing but
decoding, reading texts, encoding pictures and the head cost time, one after the other. Everything compared is measured in this one
run, in turns, and medians count. The process keeps to `--threads` cores. Without --text, texts are read by a randomly initialised
BERT of the shape of multilingual-e5-small: speed does not depend on the weights, but whether 8-bit integers agree does, so these are then
left out.
"""
import argparse
import json
import os
import random
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from rakuten_mm.core.config import EncoderConfig, load_environment, n_threads, preset
from rakuten_mm.data.dataset import Dataset
from rakuten_mm.data.image import decode_image, to_square
from rakuten_mm.data.ingestion import ingest
from rakuten_mm.data.schema import image_name, read_listings
from rakuten_mm.data.text import clean_text
from rakuten_mm.models.embeddings import ahead
from rakuten_mm.models.encoders import HFEncoder, ImageEncoder, hf_encoder, image_encoder
from rakuten_mm.models.predictor import Predictor
from rakuten_mm.models.runtime import NAMES, OnnxRuntime, differences, encode, fastest, runtime, timed
from rakuten_mm.synthetic.catalogue import synthesize
from rakuten_mm.synthetic.images import make_picture
from rakuten_mm.synthetic.lexicon import CLASSES
from rakuten_mm.synthetic.texts import write_text

BATCH,SIZE,TOLERANCE = 32, 224, .02


def say(*args): print(*args, file=sys.stderr, flush=True)


def agreement(name:str, reference:np.ndarray, vectors:np.ndarray)->dict:
    "Differences of vectors; ends the run if they are too large."
    relative,cosine = differences(reference, vectors)
    if relative > TOLERANCE: raise SystemExit(f'{name}: vectors differ by {100*relative:.1f} %, so speeds cannot be compared')
    return {f'{name}_cosine': cosine, f'{name}_relative_diff': relative, f'{name}_max_diff': float(np.abs(reference-vectors).max())}


def choose(name:str, encoder, samples, batch_size:int, rounds:int, names:tuple=NAMES)->tuple:
    "The fastest runtime and its name, and what was measured on the way."
    c = fastest(encoder, samples, TOLERANCE, batch_size, rounds, names)
    say(f"  {', '.join(f'{k} {1e3*s:.1f} ms' for k,s in c.seconds.items())}; chosen: {c.name}")
    for k,why in c.rejected.items(): say(f'  {k}: {why}')
    return runtime(c.name, encoder, c.graph), c, {f'{name}_runtime': c.name, f'{name}_rejected': c.rejected}


def image_part(spec:str, n:int, rounds:int)->dict:
    "Pictures per second, chosen runtime and PyTorch, batches of 32 at 224 px. PyTorch gets its pictures normalised beforehand, for free."
    encoder = image_encoder(spec)
    pixels = np.stack([np.asarray(make_picture(np.random.default_rng(i), i%27, SIZE)) for i in range(n)])
    plain = timm.create_model(encoder.architecture, num_classes=0).eval()
    plain.load_state_dict(encoder.model.state_dict())
    x = ((torch.from_numpy(pixels).permute(0, 3, 1, 2)-encoder.mean)/encoder.std).contiguous()

    @torch.inference_mode()
    def eager(): return torch.cat([plain(x[i:i+BATCH]) for i in range(0, n, BATCH)]).numpy()
    run,choice,out = choose('image', encoder, pixels, BATCH, rounds//2)
    chosen = partial(encode, run, encoder, pixels, BATCH)
    out |= agreement('image', eager(), chosen())
    s = timed(dict(eager=eager, chosen=chosen), rounds)
    out = dict(image_speedup=s['eager']/s['chosen'], image_per_s=n/s['chosen'], image_eager_per_s=n/s['eager']) | out
    return out | (spinning(choice.graph, encoder, pixels, rounds) if choice.graph else {})


def spinning(graph:bytes, encoder:ImageEncoder, pixels:np.ndarray, rounds:int)->dict:
    "Speed of an ONNX graph whose idle threads spin, over that of one whose threads sleep, for batches and for single pictures."
    one,few = {spin: OnnxRuntime.from_bytes(graph, spin=spin) for spin in (False, True)}, pixels[:8]
    s = timed({(b, spin): partial(encode, run, encoder, pixels if b > 1 else few, b) for b in (BATCH, 1) for spin,run in one.items()}, rounds, .2)
    return dict(spin_gain=s[BATCH, False]/s[BATCH, True], spin_gain_single=s[1, False]/s[1, True], image_single_ms=1e3*s[1, False]/len(few))


def listings(n:int, seed:int=1)->tuple[list[str], list[str]]:
    "Titles and descriptions of synthetic listings."
    rng = random.Random(seed)
    rows = [write_text(seed, i, rng.choice(list(CLASSES))) for i in range(n)]
    return [t for t,_,_ in rows], [d for _,d,_ in rows]


def random_bert(folder:Path)->HFEncoder:
    "A transformer of the shape of multilingual-e5-small with a vocabulary of 32,000, and word pieces learnt from synthetic listings."
    tok = Tokenizer(models.WordPiece(unk_token='[UNK]'))
    tok.normalizer,tok.pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    special = ['[PAD]', '[UNK]', '[CLS]', '[SEP]']
    tok.train_from_iterator((' '.join(t) for t in zip(*listings(2000, 2), strict=True)),
                            trainers.WordPieceTrainer(vocab_size=32_000, special_tokens=special, show_progress=False))
    tok.post_processor = processors.TemplateProcessing(single='[CLS] $A [SEP]', special_tokens=[('[CLS]', 2), ('[SEP]', 3)])
    PreTrainedTokenizerFast(tokenizer_object=tok, pad_token='[PAD]', unk_token='[UNK]', cls_token='[CLS]', sep_token='[SEP]').save_pretrained(folder)
    BertModel(BertConfig(vocab_size=32_000, hidden_size=384, num_hidden_layers=12, num_attention_heads=12, intermediate_size=1536)).save_pretrained(folder)
    return hf_encoder(str(folder))


def text_part(spec:str|None, work:Path, n:int, rounds:int)->dict:
    "Texts per second from token ids to vectors, chosen runtime in buckets and PyTorch in the order of arrival."
    encoder = hf_encoder(spec.removeprefix('hf:'), EncoderConfig()) if spec else random_bert(work/'bert')
    tokens = encoder.tokenize(*listings(n))
    lengths = np.array([len(t) for t in tokens])
    padded = sum(lengths[i:i+BATCH].max()*len(lengths[i:i+BATCH]) for i in range(0, n, BATCH))

    @torch.inference_mode()
    def eager(): return torch.cat([encoder(encoder.collate(tokens[i:i+BATCH])) for i in range(0, n, BATCH)]).numpy()
    run,_,out = choose('text', encoder, tokens[:n//3], 16, rounds//2, NAMES if spec else ('eager-bf16', 'onnx'))
    chosen = partial(encode, run, encoder, tokens, 16)
    out |= agreement('text', eager(), chosen())
    s = timed(dict(eager=eager, chosen=chosen), rounds)
    return dict(text_speedup=s['eager']/s['chosen'], text_per_s=n/s['chosen'], text_eager_per_s=n/s['eager'],
                text_mean_tokens=float(lengths.mean()), text_padding_in_order_of_arrival=float(1-lengths.sum()/padded)) | out


def make_bundle(work:Path, rows:int, name:str, image_size:int)->tuple[Path, list[tuple]]:
    "A model trained on synthetic listings, and the designation, description and encoded picture of others."
    from rakuten_mm.training.export import export, fit
    os.environ['RAKUTEN_MM_ARTIFACTS'] = str(work/'artifacts')
    ingest(synthesize(work/'raw', rows, 0, image_size=image_size, progress=False), work/'data', progress=False)
    data = Dataset.open(work/'data')
    bundle = export(fit(data, preset(name), work/'run', progress=False), data, work/'run')
    df,images = read_listings(work/'raw'/'X_train_update.csv'), work/'raw'/'images'/'image_train'
    files = [images/image_name(r.imageid, r.productid) for r in df.itertuples()]
    return bundle, [(r.designation, r.description, f.read_bytes()) for r,f in zip(df.itertuples(), files, strict=True) if f.exists()]


def pipeline(model:Predictor, rows:list[tuple])->list:
    "Answers to raw listings; while a batch is answered, the next one is prepared."
    answers,parts = [], [rows[i:i+BATCH] for i in range(0, len(rows), BATCH)]
    for _,ready in ahead(lambda part: [model.prepare(*r) for r in part], parts): answers += model.predict(ready)
    return answers


@torch.inference_mode()
def bare_costs(model:Predictor, rows:list[tuple])->dict:
    "What cannot be done without, as functions that do it for all listings. This is all that knows what a network is made of."
    net,size = model.net, model.size
    cut = lambda x: [x[i:i+BATCH] for i in range(0, len(x), BATCH)]
    texts = cut([(clean_text(t or ''), clean_text(d or '')) for t,d,_ in rows])
    decode = lambda: [to_square(decode_image(b, size), size) for _,_,b in rows]
    pixels = [np.stack(p) for p in cut(decode())]

    @torch.inference_mode()
    def read(part):
        titles,descriptions = map(list, zip(*part, strict=True))
        tokens = net.ngrams.tokenize(titles, descriptions)
        vectors = [net.ngrams(tokens)]+([torch.from_numpy(net.text.encode(titles, descriptions))] if net.text is not None else [])
        return dict(text=torch.cat(vectors, 1), linear=net.linear(tokens))

    @torch.inference_mode()
    def head(batch): return net.ensemble_logits(batch).softmax(1).numpy()
    batches = [read(t) | dict(image=torch.from_numpy(model.encode(p)), has_description=torch.tensor([d != '' for _,d in t])) |
               {k: torch.ones(len(t), dtype=torch.bool) for k in ('has_text', 'has_image')} for t,p in zip(texts, pixels, strict=True)]
    return dict(decode=decode, text=lambda: [read(t) for t in texts], image=lambda: [model.encode(p) for p in pixels],
                head=lambda: [head(b) for b in batches])


def predictor_part(work:Path, quick:bool, rounds:int)->dict:
    "Products per second of a `Predictor` over what the bare costs would allow."
    bundle,rows = make_bundle(work, *((240, 'smoke', 250) if quick else (1_200, 'cpu', 500)))
    model,rows = Predictor.load(bundle), rows[:64 if quick else 256]
    n,bare = len(rows), bare_costs(model, rows)
    assert len(pipeline(model, rows)) == n
    s = timed(bare | dict(predictor=partial(pipeline, model, rows)), rounds)
    total = sum(s[k] for k in bare)
    return dict(predictor_ratio=total/s['predictor'], predictor_per_s=n/s['predictor'], bare_per_s=n/total) | {f'bare_{k}_ms': 1e3*s[k]/n for k in bare}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--image', default='timm:tf_efficientnet_lite0', help='image encoder, timm:<name or folder>')
    parser.add_argument('--text', help='text encoder, hf:<folder>')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--json', type=Path)
    parser.add_argument('--quick', action='store_true', help='less than two minutes, to see that it works (figures mean less)')
    args = parser.parse_args()
    load_environment('no.env')
    if hasattr(os, 'sched_setaffinity'): os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:args.threads])
    torch.set_num_threads(args.threads); torch.manual_seed(0)
    rounds,out = 3 if args.quick else 7, dict(threads=args.threads, cores=n_threads(), quick=args.quick)
    with tempfile.TemporaryDirectory(prefix='bench-inference-') as d:
        say('pictures'); out |= image_part(args.image, 32 if args.quick else 64, rounds)
        say('texts'); out |= text_part(args.text, Path(d), 48 if args.quick else 192, rounds)
        say('whole listings'); out |= predictor_part(Path(d), args.quick, rounds)
    width = max(map(len, out))
    for k,v in out.items(): print(f'{k:{width}}  {v:,.3f}' if isinstance(v, float) else f'{k:{width}}  {v}')
    if args.json: args.json.write_text(json.dumps(out, indent=1))


if __name__ == '__main__': main()
