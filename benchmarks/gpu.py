"""Is training on a card right, how fast is it, and how far from the card's limits?

    python -m benchmarks.gpu --json benchmarks/results/gpu-CARD.json [--data DATASET] [--quick] [--only PART]

`gpu-camembert-convnext` in its true shapes, with random weights, on 500 px pictures; about eight minutes on one card.
Each part is a process of its own: one forks before CUDA is touched, one kills itself. DATASET is an ingested dataset,
whose listings are used; without it they are synthetic. With --quick, or where there is no card, the same code runs on
tiny networks: that proves the benchmark, and says nothing of a card.

limits    bf16 multiplications and copies a second
steps     a training step of both encoders, at several batches: a second, share of the peak, memory
encode    pictures a second without gradients, as the store is filled (TF32), and in bf16
loader    pictures a second that worker processes deliver
fit       the preset, killed in its last epoch, and going on; speed in Lightning's loop, memory, a checkpoint's size
bundle    what follows training: seconds of calibration and export; how far the bundle's answers are from those of the
          network on the card, in float32 and bf16; answers a second of the bundle on the card
fork      two forked processes, or one for each card
compile   the image encoder's step, compiled
"""
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageOps

from benchmarks.harness import call, finish, main, option, say, start
from rakuten_mm.core.config import EncoderConfig, TrainConfig, preset
from rakuten_mm.data.dataset import Dataset
from rakuten_mm.models.encoders import ImageEncoder, hf_encoder
from rakuten_mm.models.inputs import ProductDataset
from rakuten_mm.models.network import build_network
from rakuten_mm.models.predictor import Predictor
from rakuten_mm.models.runtime import TorchRuntime
from rakuten_mm.training import fit as fitting
from rakuten_mm.training.datamodule import ProductDataModule
from rakuten_mm.training.export import export

PARTS = 'limits', 'steps', 'encode', 'loader', 'fit', 'bundle', 'fork', 'compile'
BARS = dict(resumed_at='= 2', loss_falls='= 1', bundle_difference='<= 0.01', bundle_same='>= 0.999')
EPOCHS = 3


# What is worked on

def device()->str: return 'cuda' if torch.cuda.device_count() else 'cpu'


def rows_of(tiny:bool)->dict[str, int]: # By split
    return dict(train=96, val=24, test=40) if tiny else dict(train=640, val=64, test=64)


def enlarged(source:Path, dest:Path, size:int):
    "A picture as the challenge has them: square, its content on white, about 27 kB at 500 px."
    im = Image.open(source).convert('RGB')
    k = size/max(im.size)
    im = im.resize([max(1, round(s*k)) for s in im.size], Image.Resampling.BICUBIC)
    noise = np.random.default_rng(0).normal(0, 6, (im.height, im.width, 1))
    noisy = Image.fromarray((np.asarray(im)+noise).clip(0, 255).astype('uint8'))
    page = ImageOps.pad(noisy, (size, size), color='white')
    dest.parent.mkdir(parents=True, exist_ok=True); page.save(dest, 'JPEG', quality=82)


def text_folder(folder:Path, titles:pd.Series, tiny:bool):
    "CamemBERT-base in its true shape, with random weights and a vocabulary of words."
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import CamembertConfig, CamembertModel, PreTrainedTokenizerFast
    tok,special = Tokenizer(models.WordLevel(unk_token='<unk>')), ['<s>', '<pad>', '</s>', '<unk>']
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=8_000, special_tokens=special, show_progress=False)
    tok.train_from_iterator(titles, trainer)
    tok.post_processor = processors.TemplateProcessing(single='<s> $A </s>', special_tokens=[('<s>', 0), ('</s>', 2)])
    PreTrainedTokenizerFast(tokenizer_object=tok, bos_token='<s>', pad_token='<pad>', eos_token='</s>',
                            unk_token='<unk>').save_pretrained(folder)
    base = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3_072)
    small = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    CamembertModel(CamembertConfig(vocab_size=32_005, max_position_embeddings=514, type_vocab_size=1, pad_token_id=1,
                                   bos_token_id=0, eos_token_id=2, **small if tiny else base)).save_pretrained(folder)


def image_folder(folder:Path, tiny:bool):
    "ConvNeXt-Large with random weights."
    import timm
    from safetensors.torch import save_file
    name = 'test_convnext' if tiny else 'convnext_large'
    folder.mkdir(parents=True, exist_ok=True)
    save_file(timm.create_model(name, num_classes=0).state_dict(), folder/'model.safetensors')
    about = dict(mean=[.485, .456, .406], std=[.229, .224, .225], num_classes=0)
    (folder/'config.json').write_text(json.dumps(dict(architecture=name, pretrained_cfg=about)))


def make_dataset(work:Path)->Path:
    "Synthetic listings, ingested."
    from rakuten_mm.data.ingestion import ingest
    from rakuten_mm.synthetic.catalogue import synthesize
    ingest(synthesize(work/'raw', 1_200, 0, progress=False), work/'data', progress=False)
    return work/'data'


def prepare(work:Path, data:Path, tiny:bool):
    "Weights and pictures."
    torch.manual_seed(0)
    found = listings(work, data, tiny, own=True)
    text_folder(work/'camembert', found.products.title, tiny); image_folder(work/'convnext', tiny)
    for n in found.products.image.unique():
        if n: enlarged(found.images_dir/n, work/'images'/n, 48 if tiny else 500)


def listings(work:Path, data:Path, tiny:bool, own:bool = False)->Dataset:
    "Some listings of each split; their pictures are the enlarged ones, or those of the dataset."
    out = Dataset.open(data)
    if not own: out.images_dir = work/'images'
    df = out.products
    out.products = pd.concat([df[df.split == s].head(n) for s,n in rows_of(tiny).items()]).reset_index(drop=True)
    return out


def config(work:Path, tiny:bool, **fit)->TrainConfig:
    "The preset, with the folders of this machine."
    cfg = preset('gpu-camembert-convnext')
    e = replace(cfg.encoders, text=f"hf:{work/'camembert'}", image=f"timm:{work/'convnext'}", runtimes='onnx',
                image_size=48 if tiny else 500)
    if tiny: e,cfg = replace(e, ngram_features=2_000, ngram_dim=16), replace(cfg, network=replace(cfg.network, dim=32))
    own = dict(devices=1, max_epochs=EPOCHS, num_workers=0 if tiny else 8, ema=.9)
    return replace(cfg, encoders=e, fit=replace(cfg.fit, **own | fit))


# How fast

def seconds(step:Callable[[], object], n:int)->float:
    "Of one call: the median of three rounds."
    sync = torch.cuda.synchronize if device() == 'cuda' else (lambda: None)
    step(); step(); took = []
    for _ in range(3):
        sync(); begin = time.perf_counter()
        for _ in range(n): step()
        sync(); took.append((time.perf_counter()-begin)/n)
    return sorted(took)[1]


def memory_gib()->float:
    "Peak since the last call."
    if device() != 'cuda': return 0.
    peak = torch.cuda.max_memory_allocated()/2**30; torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()
    return peak


def limits(tiny:bool, **_)->dict:
    "Multiplications in bf16 and copied bytes a second."
    d,n = device(), 256 if tiny else 8_192
    a,b = (torch.randn(n, n, device=d, dtype=torch.bfloat16) for _ in range(2))
    x = torch.empty(2**22 if tiny else 2**30, dtype=torch.uint8, device=d); y = torch.empty_like(x)
    name = torch.cuda.get_device_name() if d == 'cuda' else 'none'
    return dict(card=name, cuda=torch.version.cuda, matmul_tflops=2*n**3/seconds(lambda: a@b, 10)/1e12,
                copy_tb_s=2*x.numel()/seconds(lambda: y.copy_(x), 10)/1e12)


def train_step(encoder, example)->Callable[[], None]:
    "A step as training makes it: bf16 forward and backward, and AdamW."
    opt = torch.optim.AdamW(encoder.parameters(), 1e-5, fused=True)
    def step():
        with torch.autocast(device(), torch.bfloat16): loss = encoder(example).float().square().mean()
        loss.backward(); opt.step(); opt.zero_grad(set_to_none=True)
    return step


def pixels_of(batch:int, size:int)->torch.Tensor:
    return torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, device=device())


def steps(work:str, tiny:bool, peak_tflops:float, **_)->dict:
    "Training steps of both encoders."
    from torch.utils.flop_counter import FlopCounterMode
    d,size,k,out = device(), 48 if tiny else 500, 1 if tiny else 5, []
    for batch,checkpointing in ((16, False), (32, False), (64, False), (16, True)):
        enc = ImageEncoder('test_convnext' if tiny else 'convnext_large').to(d).train()
        if checkpointing: enc.model.set_grad_checkpointing()
        px = pixels_of(batch, size); memory_gib()
        with FlopCounterMode(display=False) as counter, torch.no_grad(): enc(px[:1])
        try: s = seconds(train_step(enc, px), k)
        except torch.OutOfMemoryError: out.append(dict(encoder='image', batch=batch, memory_gib=None)); continue
        tflops = 3*counter.get_total_flops()*batch/s/1e12
        out.append(dict(encoder='image', batch=batch, checkpointing=checkpointing, per_s=batch/s, ms=1e3*s,
                        share_of_peak=tflops/peak_tflops, memory_gib=memory_gib()))
        enc = None
    for batch,length in ((16, 128), (16, 256), (64, 256)):
        enc = hf_encoder(str(Path(work, 'camembert')), EncoderConfig()).to(d).train().requires_grad_(True); memory_gib()
        ids = torch.randint(4, 500, (batch, length), device=d)
        s = seconds(train_step(enc, dict(input_ids=ids, attention_mask=torch.ones_like(ids))), k)
        out.append(dict(encoder='text', batch=batch, tokens=length, per_s=batch*length/s, ms=1e3*s,
                        memory_gib=memory_gib()))
    return dict(rows=out)


def encode(tiny:bool, **_)->dict:
    "Pictures a second without gradients."
    large = [('convnext_large', 500), ('vit_so400m_patch16_siglip_384', 384), ('vit_large_patch16_dinov3', 512)]
    out = []
    for name,size in [('test_convnext', 48), ('test_vit', 48)] if tiny else large:
        enc,px = ImageEncoder(name, size=size).eval(), pixels_of(32, size).cpu().numpy()
        for how,bf16 in (('tf32', False), ('bf16', True)):
            s = seconds(partial(TorchRuntime(enc, bf16, device()), pixels=px), 1 if tiny else 5)
            out.append(dict(encoder=f'{name}@{size}', how=how, per_s=32/s, memory_gib=memory_gib()))
    return dict(rows=out)


def compiled(tiny:bool, **_)->dict:
    "The image encoder's step, compiled."
    enc = ImageEncoder('test_convnext' if tiny else 'convnext_large').to(device()).train()
    px = pixels_of(16, 48 if tiny else 500)
    plain = seconds(train_step(enc, px), 1 if tiny else 5)
    enc.model.compile(backend='eager' if tiny else 'inductor'); step,begin = train_step(enc, px), time.perf_counter()
    step(); first = time.perf_counter()-begin
    return dict(first_step_s=first, speedup=plain/seconds(step, 1 if tiny else 5))


def loader(work:str, data:str, tiny:bool)->dict:
    "Do workers keep up?"
    found,cfg,out = listings(Path(work), Path(data), tiny), config(Path(work), tiny), []
    train = found.products[found.products.split == 'train']
    codes = sorted(int(c) for c in found.products.prdtypecode.unique())
    net = build_network(cfg, train.title.tolist(), train.text.tolist(), len(codes))
    for n in (0, 2) if tiny else (0, 4, 8, 14):
        net.cfg = replace(cfg, fit=replace(cfg.fit, num_workers=n))
        dm = ProductDataModule(found, net, codes, Path(work)/'store', progress=False); dm.setup()
        batches = iter(dm.train_dataloader()); next(batches); begin,seen = time.perf_counter(), 0
        for b in batches:
            seen += len(b['target'])
            if time.perf_counter()-begin > 6: break
        out.append(dict(workers=n, per_s=seen/(time.perf_counter()-begin)))
    return dict(rows=out)


# Is it right

def watched(log:list[dict])->None:
    "Let a training tell its speed and the memory it takes, epoch by epoch."
    import pytorch_lightning as pl
    class Watch(pl.Callback):
        def on_train_epoch_start(self, trainer, module): memory_gib(); self.begin,self.n = None, 0

        def on_train_batch_end(self, trainer, module, outputs, batch, i):
            if i == 3: self.begin,self.n = time.perf_counter(), 0  # the first ones choose kernels
            self.n += len(batch['target'])

        def on_train_epoch_end(self, trainer, module):
            if device() == 'cuda': torch.cuda.synchronize()
            s = time.perf_counter()-self.begin if self.begin else float('nan')
            log.append(dict(epoch=trainer.current_epoch, per_s=self.n/s, precision=trainer.precision,
                            memory_gib=memory_gib(), device=str(module.device),
                            loss=float(trainer.callback_metrics['train/loss'])))
    make = fitting.make_trainer
    def make_trainer(*args):
        trainer = make(*args); trainer.callbacks.append(Watch())
        return trainer
    fitting.make_trainer = make_trainer
    fitting.check_learnt = lambda *a: None  # random weights


def train(work:str, data:str, tiny:bool, die_in:int)->dict:
    "The preset; killed in an epoch, or to the end, the bundle included."
    folder,log,when = Path(work), [], {}
    watched(log)
    begin_epoch,calibrate = fitting.ProductClassifier.on_train_epoch_start, fitting.calibrate
    def on_train_epoch_start(self):
        begin_epoch(self)
        if self.current_epoch == die_in:
            (folder/'first_life.json').write_text(json.dumps(log)); os.kill(os.getpid(), signal.SIGKILL)
    def timed(*args):
        when['begin'] = time.perf_counter(); out = calibrate(*args); when['end'] = time.perf_counter()
        return out
    fitting.ProductClassifier.on_train_epoch_start,fitting.calibrate = on_train_epoch_start, timed
    found = listings(folder, Path(data), tiny)
    fitted = fitting.fit(found, config(folder, tiny), folder/'run', progress=False, shared=folder/'shared')
    net,probs = fitted.net, {}
    test = found.products[found.products.split == 'test']
    ds = ProductDataset(test, net, fitted.codes, found.images_dir, folder/'store', progress=False, training=True)
    move = lambda b: {k: move(v) if isinstance(v, dict) else v.to(device()) for k,v in b.items()}
    answer = lambda b: net.stacked(net.out_of_fold_logits(b), b).float().softmax(1).cpu()
    net.to(device())
    for name,bf16 in (('float32', False), ('bf16', True)):
        with torch.inference_mode(), torch.autocast(device(), torch.bfloat16, enabled=bf16):
            probs[name] = torch.cat([answer(move(b)) for b in ds.batches(size=32)]).numpy()
    net.cpu()
    begin = time.perf_counter()
    bundle = export(fitted, found, folder/'run', n_check=8)
    exported = time.perf_counter()-begin
    return dict(epochs=log, history=fitted.history.epoch.tolist(), losses=fitted.history['train/loss'].tolist(),
                calibrate_s=when['end']-when['begin'], export_s=exported) | answers(bundle, found, test, probs)


def answers(bundle:Path, data:Dataset, test:pd.DataFrame, probs:dict[str, np.ndarray])->dict:
    "The bundle's answers beside those of the network on the card, and how many a second."
    out = dict(bundle_mb=sum(p.stat().st_size for p in bundle.rglob('*') if p.is_file())/1e6)
    for where in dict.fromkeys(['cpu', device()]):
        os.environ['RAKUTEN_MM_DEVICE'] = where
        model = Predictor.load(bundle)
        read = lambda r: (data.images_dir/r.image).read_bytes() if r.image else None
        items = [model.prepare(r.designation, r.description, read(r)) for r in test.itertuples()]
        model.probs(items[:1]); begin = time.perf_counter()
        got = np.concatenate([model.probs(items[i:i+16]) for i in range(0, len(items), 16)])
        out[f'answers_per_s_{where}'] = len(items)/(time.perf_counter()-begin)
        for name,p in probs.items(): out[f'difference_{where}_{name}'] = float(np.abs(got-p).max())
        out[f'same_{where}'] = float((got.argmax(1) == probs['float32'].argmax(1)).mean())
    return out


def forked(work:str, data:str, tiny:bool)->dict:
    "Forked processes: one for each card, or two processors."
    log,n = [], torch.cuda.device_count() or 2
    watched(log)
    found = listings(Path(work), Path(data), True)
    if not tiny: found.images_dir = Path(work)/'images'
    cfg = config(Path(work), tiny, max_epochs=1, strategy='ddp_fork', devices=n, num_workers=0 if tiny else 2)
    if not tiny: cfg = replace(cfg, encoders=replace(cfg.encoders, image_size=224))
    begin = time.perf_counter(); fitted = fitting.fit(found, cfg, Path(work)/'fork', progress=False)
    return dict(processes=n, s=time.perf_counter()-begin, loss=float(fitted.history['train/loss'].iloc[-1]))


def bench(args, work:Path)->dict:
    "All parts, one after the other."
    tiny,out = args.quick or device() == 'cpu', {}
    if tiny: say('tiny networks: this says nothing of a card')
    data = args.data or make_dataset(work)
    prepare(work, data, tiny)
    job = dict(work=work, data=data, tiny=tiny)
    if {'limits', 'steps'} & {*args.only}: out |= call(limits, job)
    if 'steps' in args.only:
        rows = call(steps, job | dict(peak_tflops=out['matmul_tflops']))['rows']
        out |= dict(steps=rows, train_images_per_s=rows[0]['per_s'], train_mfu=rows[0]['share_of_peak'])
    if 'encode' in args.only:
        rows = call(encode, job)['rows']
        out |= dict(encode=rows, encode_images_per_s=rows[0]['per_s'])
    if 'loader' in args.only: out['loader'] = call(loader, job)['rows']
    if {'fit', 'bundle'} & {*args.only}:
        first = start(train, job | dict(die_in=EPOCHS-1)); first.wait()
        if first.returncode != -signal.SIGKILL: finish(first)
        found = call(train, job | dict(die_in=-1))
        epochs = json.loads((work/'first_life.json').read_text())+found['epochs']
        out |= dict(fit=epochs, resumed_at=found['epochs'][0]['epoch'], bundle_same=found['same_cpu'], bundle=found,
                    loss_falls=int(found['losses'][-1] < found['losses'][0]),
                    bundle_difference=found['difference_cpu_float32'])
    if 'fork' in args.only: out['fork'] = call(forked, job)
    if 'compile' in args.only: out['compile'] = call(compiled, job)
    return {k: v for k,v in out.items() if k not in ('wall_s', 'peak_mb')}


if __name__ == '__main__':
    main(bench, __doc__, option('--data', type=Path, help='an ingested dataset instead of synthetic listings'),
         parts=PARTS, bars=BARS)
