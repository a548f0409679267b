"Training: fine-tuning, several processes, going on after a crash, and refusing data that cannot be learnt from."
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock
from safetensors.torch import save_file

from rakuten_mm.core.config import FitConfig, preset, single_modality
from rakuten_mm.data.dataset import Dataset
from rakuten_mm.models.inputs import ProductDataset
from rakuten_mm.models.manifest import read_golden
from rakuten_mm.models.predictor import Predictor
from rakuten_mm.training import fit as fitting
from rakuten_mm.training.checkpoints import discard, resume_from, run_key
from rakuten_mm.training.export import export
from rakuten_mm.training.fit import fit, out_of_fold_probs
from rakuten_mm.training.lightning_module import encoder_groups

SMOKE = preset('smoke')


def script(code, *args, timeout=120, **env):
    "A fresh interpreter, with the names that the scripts below use."
    head = ('import json, os, signal, sys, torch\nfrom dataclasses import replace\n'
            'from rakuten_mm.core.config import TrainConfig, from_dict, preset\n'
            'from rakuten_mm.core.environment import load_environment\nload_environment("no.env")\n'
            'from rakuten_mm.training import fit as fitting\nfrom rakuten_mm.data.dataset import Dataset\n')
    return subprocess.run([sys.executable, '-c', head+code, *map(str, args)], env=os.environ | env, capture_output=True,
                          text=True, timeout=timeout)


def shrunk(data, n=None, **columns):
    "The dataset with other columns, or fewer rows of each split."
    out = Dataset(data.manifest, data.folder, data.images_dir, data.split)
    df = data.products.copy()
    if n: df = df.groupby('split', group_keys=False).head(n)
    out.products = df.assign(**columns).reset_index(drop=True)
    return out


@pytest.fixture(scope='module')
def data(data_dir):
    return Dataset.open(data_dir)


# Fine-tuning

@pytest.fixture(scope='module')
def weights(data, tmp_path_factory):
    "Folders that stand in for CamemBERT and ConvNeXt-Large: the same kinds of network, tiny and random."
    import timm
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import CamembertConfig, CamembertModel, PreTrainedTokenizerFast
    text,image = tmp_path_factory.mktemp('camembert'), tmp_path_factory.mktemp('convnext')
    torch.manual_seed(0)
    tok = Tokenizer(models.WordLevel(unk_token='<unk>'))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ['<s>', '<pad>', '</s>', '<unk>']
    trainer = trainers.WordLevelTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    tok.train_from_iterator(data.products.title, trainer)
    tok.post_processor = processors.TemplateProcessing(single='<s> $A </s>', special_tokens=[('<s>', 0), ('</s>', 2)])
    PreTrainedTokenizerFast(tokenizer_object=tok, bos_token='<s>', pad_token='<pad>', eos_token='</s>',
                            unk_token='<unk>').save_pretrained(text)
    size = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    CamembertModel(CamembertConfig(vocab_size=tok.get_vocab_size(), max_position_embeddings=300, pad_token_id=1,
                                   bos_token_id=0, eos_token_id=2, **size)).save_pretrained(text)
    net = timm.create_model('test_convnext', num_classes=0)
    save_file(net.state_dict(), image/'model.safetensors')
    config = dict(architecture='test_convnext', pretrained_cfg=dict(mean=[.485, .456, .406], std=[.229, .224, .225]))
    (image/'config.json').write_text(json.dumps(config))
    return text, image


def gpu_preset(weights, **changes):
    "`gpu-camembert-convnext`, but for its size."
    cfg = preset('gpu-camembert-convnext')
    e = replace(cfg.encoders, text=f'hf:{weights[0]}', image=f'timm:{weights[1]}', image_size=48, ngram_features=2_000,
                ngram_dim=16)
    f = dict(max_epochs=1, batch_size=16, lr=1e-2, encoder_lr=1e-3, ema=.5, accelerator='cpu', devices=1, num_workers=0)
    return replace(cfg, encoders=e, network=replace(cfg.network, dim=32), fit=replace(cfg.fit, **f | changes))


def test_gpu_preset_fine_tunes(data, weights, tmp_path, monkeypatch):
    "Both encoders move, the average of weights is what is kept, and the bundle says what the network said."
    monkeypatch.setattr(fitting, 'check_learnt', lambda *a: None)  # a few steps are too few
    few,cfg = shrunk(data, 96), gpu_preset(weights, max_epochs=2, augment='rand-m5-n1')
    assert cfg.fit.precision == 'auto' and cfg.fit.accumulate == 2 and cfg.network.members == 1
    steps = []
    counted = lambda self, opt: steps.append(len(opt.param_groups))
    monkeypatch.setattr(fitting.ProductClassifier, 'on_before_zero_grad', counted)
    fitted = fit(few, cfg, tmp_path/'run', progress=False)
    assert steps[0] > 8 and len(steps) == 2*3
    fresh = fitting.build_network(cfg, few.products.title.tolist()[:5]*2, ['']*10, len(fitted.codes))
    for kind in ('text', 'image'):
        old,new = getattr(fresh, kind).state_dict(), getattr(fitted.net, kind).state_dict()
        moved = [k for k in old if old[k].is_floating_point() and not torch.equal(old[k], new[k])]
        assert len(moved) > .8*len(old), kind
        assert all(torch.isfinite(v).all() for v in new.values())
    assert fitted.oof.empty and np.isfinite(fitted.history['val/loss']).all()
    bundle = export(fitted, few, tmp_path/'run')
    model,rows = Predictor.load(bundle), few.products[few.products.split == 'test'].head(20)
    ds = ProductDataset(rows, fitted.net, fitted.codes, few.images_dir, tmp_path/'store', progress=False, training=True)
    assert 'pixels' in ds[[0]] and 'tokens' in ds[[0]]
    plain = out_of_fold_probs(fitted.net, ds)
    encoded,encode = [], model.encode
    model.encode = replace(encode, run=lambda pixels: (encoded.append(len(pixels)), encode.run(pixels=pixels))[1])
    read = model.probs_of(rows, few.images_dir, tmp_path/'store', progress=False)
    for use in (['text'], ['image']): model.probs_of(rows, few.images_dir, tmp_path/'store', use, progress=False)
    assert sum(encoded) == rows.image.nunique()  # once, whatever is asked
    assert np.abs(plain-read).max() < .02
    image = lambda r: (few.images_dir/r.image).read_bytes()
    sent = model.probs([model.prepare(r.designation, r.description, image(r)) for r in rows.itertuples()])
    assert np.abs(plain-sent).max() < .02 and read_golden(bundle)


def test_average_leaves_buffers_alone(data, weights, tmp_path, monkeypatch):
    "The vocabulary is integers and a constant number's deviation is infinite: neither survives being averaged."
    monkeypatch.setattr(fitting, 'check_learnt', lambda *a: None)
    cfg = gpu_preset(weights, max_epochs=1)
    cfg = replace(cfg, encoders=replace(cfg.encoders, train_image=False))
    few = shrunk(data, 64)
    fitted = fit(few, cfg, tmp_path, progress=False)
    train = few.products[few.products.split == 'train']
    fresh = fitting.build_network(cfg, train.title.tolist(), train.text.tolist(), len(fitted.codes))
    assert torch.equal(fitted.net.ngrams.buckets, fresh.ngrams.buckets)
    assert not torch.isnan(fitted.net.scale['image'].std).any()
    old,new = (list(net.image.state_dict().values()) for net in (fresh, fitted.net))
    assert all(torch.equal(a, b) for a,b in zip(old, new, strict=True))  # frozen


LAYERS = { # Parts of networks, from the stem up
    'camembert': ['embeddings', 'encoder.layer.0.', 'encoder.layer.1.', 'encoder.layer.2.'],
    'deberta': ['encoder.rel_embeddings', 'encoder.layer.0.', 'encoder.layer.1.', 'encoder.LayerNorm'],
    'modernbert': ['embeddings', 'layers.0.', 'layers.1.', 'layers.2.', 'final_norm'],
    'test_convnext': ['stem', 'stages.1.blocks.0.', 'stages.2.blocks.0.', 'stages.2.blocks.1.', 'head'],
    'test_efficientnet': ['conv_stem', 'blocks.0.0', 'blocks.1.0', 'blocks.2.0', 'conv_head'],
    'test_vit': ['patch_embed', 'blocks.0.', 'blocks.1.', 'blocks.5.', 'norm'],
    'vit_base_patch16_siglip_224': ['patch_embed', 'blocks.0.', 'blocks.11.', 'attn_pool'],
}


@pytest.mark.parametrize('architecture', LAYERS)
def test_layers_learn_at_their_own_rate(architecture):
    "From the stem up, whatever the network; what stands on its last layer is the top of it."
    import transformers as hf
    from torch import nn

    from rakuten_mm.models.encoders import ImageEncoder
    size = dict(hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8, vocab_size=20,
                pad_token_id=0)
    of_text = dict(camembert=('Camembert', {}), modernbert=('ModernBert', {}),
                   deberta=('DebertaV2', dict(relative_attention=True, norm_rel_ebd='layer_norm')))
    with torch.device('meta'):
        if architecture in of_text:
            name,more = of_text[architecture]
            net = nn.Module(); net.model = getattr(hf, f'{name}Model')(getattr(hf, f'{name}Config')(**size, **more))
            net.model.pooler = None  # as in `HFEncoder`
        else: net = ImageEncoder(architecture)
    groups = encoder_groups(net, FitConfig(encoder_lr=1e-3, layer_decay=.5, weight_decay=.1))
    lr = {id(p): g['lr'] for g in groups for p in g['params']}
    assert len(lr) == len(list(net.parameters()))
    assert all((g['weight_decay'] > 0) == (g['params'][0].ndim > 1) for g in groups)
    of = lambda start: {lr[id(p)] for n,p in net.named_parameters() if n.startswith(f'model.{start}')}
    rates = [of(p) for p in LAYERS[architecture]]
    assert all(len(r) == 1 for r in rates), rates
    rates = [r.pop() for r in rates]
    assert rates == sorted(rates) and len(set(rates)) >= len(rates)-1
    assert max(lr.values()) == 1e-3 == rates[-1] and min(lr.values()) == rates[0]


# Several processes

@pytest.mark.system
def test_two_processes(data_dir, weights, tmp_path):
    "`ddp_notebook` forks a process that has computed already, returns, and the parent has the trained weights."
    done = script('''
data,out = Dataset.open(sys.argv[1]), sys.argv[2]
cfg = preset('smoke')
cfg = replace(cfg, fit=replace(cfg.fit, strategy='ddp_notebook', devices=2, accelerator='cpu', ema=.5, n_threads=2))
fitted = fitting.fit(data, cfg, out, progress=False)
encode = fitting.frozen_runtime(fitted.net.image, 64, fitting.graphs_dir())
val = fitting.ProductDataset(data.products[data.products.split == 'val'], fitted.net, fitted.codes, data.images_dir,
                             fitting.artifacts_dir()/'embeddings', encode, False)
with torch.inference_mode(): fused = torch.cat([fitted.net.out_of_fold_logits(b)[-1] for b in val.batches()])
f1 = fitting.scores(fused.softmax(1).numpy(), val.targets)['f1_weighted']
h = fitted.history
print(json.dumps(dict(f1=f1, last=h['val/f1_weighted'].iloc[-1], epochs=len(h), val=fitted.val['f1_weighted'],
                      threads=torch.get_num_threads())))
# encoders too, in the same process: the first run computed no gradients here
cfg = from_dict(TrainConfig, json.loads(sys.argv[3]))
fitting.check_learnt = lambda *a: None
few = Dataset(data.manifest, data.folder, data.images_dir)
few.products = data.products.groupby('split', group_keys=False).head(70)
fitted = fitting.fit(few, cfg, out+'-tuned', progress=False)
old = dict(fitting.build_network(cfg, ['livre livre']*4, ['']*4, 2).named_parameters())
print(json.dumps({k: not torch.equal(v, old[k]) for k,v in fitted.net.named_parameters()
                  if k.startswith(('text.', 'image.')) and 'pooler' not in k}))
''', data_dir, tmp_path/'run', json.dumps(asdict(gpu_preset(weights, strategy='ddp_notebook', devices=2))),
                  OMP_NUM_THREADS='2')  # Lightning would choose one thread for each process here, not everywhere
    assert done.returncode == 0, done.stderr[-3000:]
    got,moved = map(json.loads, done.stdout.splitlines()[-2:])
    assert len(moved) > 30 and sum(moved.values()) > .9*len(moved), moved
    assert got['epochs'] == 6 and got['val'] > .3 and got['threads'] == 2
    assert abs(got['f1']-got['last']) < .02  # bf16 in training


# Fault 46: a run that was killed

@pytest.fixture(scope='module')
def killed(data_dir, tmp_path_factory):
    "What a run leaves that was killed in its fourth epoch; and its configuration."
    out = tmp_path_factory.mktemp('killed')
    cfg = replace(SMOKE, fit=replace(SMOKE.fit, ema=.8, accumulate=2))
    done = script('''
def die(self, *a):
    if self.current_epoch == 3: os.kill(os.getpid(), signal.SIGKILL)
fitting.ProductClassifier.on_train_batch_end = die
cfg = preset('smoke')
cfg = replace(cfg, fit=replace(cfg.fit, ema=.8, accumulate=2))
fitting.fit(Dataset.open(sys.argv[1]), cfg, sys.argv[2], progress=False)
''', data_dir, out)
    assert done.returncode == -9, done.stderr[-3000:]
    assert sorted(p.name for p in (out/'checkpoints').glob('*.ckpt')) == ['epoch=0001.ckpt', 'epoch=0002.ckpt']
    return out, cfg


@pytest.fixture(scope='module')
def uninterrupted(data, killed, tmp_path_factory):
    return fit(data, killed[1], tmp_path_factory.mktemp('whole'), progress=False)


def same(a, b):
    "Two runs ended alike: scores, history and every weight."
    assert len(a.history) == len(b.history) and list(a.history.epoch) == list(b.history.epoch)
    for c in ('train/loss', 'val/loss', 'val/f1_weighted'): assert np.allclose(a.history[c], b.history[c], atol=1e-3), c
    assert all(abs(a.val[k]-b.val[k]) < 1e-3 for k in a.val)
    for (k,x),y in zip(a.net.experts.state_dict().items(), b.net.experts.state_dict().values(), strict=True):
        assert torch.allclose(x, y, atol=1e-3), k


def watch_epochs(monkeypatch):
    "The epochs that begin from now on."
    seen,start = [], fitting.ProductClassifier.on_train_epoch_start
    noted = lambda self: (seen.append(self.current_epoch), start(self))
    monkeypatch.setattr(fitting.ProductClassifier, 'on_train_epoch_start', noted)
    return seen


@pytest.mark.parametrize('torn', [False, True], ids=['whole', 'torn'])
def test_f46_killed_run_goes_on(data, killed, uninterrupted, tmp_path, torn, monkeypatch):
    "A torn checkpoint is passed over; average and schedule go on too."
    out = tmp_path/'run'
    shutil.copytree(killed[0], out)
    state = torch.load(out/'checkpoints'/'epoch=0002.ckpt', weights_only=True)
    assert state['averaging_state']['n_averaged'] > 0
    assert state['lr_schedulers'][0]['last_epoch'] == state['global_step']
    last = out/'checkpoints'/'epoch=0002.ckpt'
    if torn: last.write_bytes(last.read_bytes()[:-1000])
    seen = watch_epochs(monkeypatch)
    if torn:
        with pytest.warns(UserWarning, match='going back to the one before'):
            again = fit(data, killed[1], out, progress=False)
    else: again = fit(data, killed[1], out, progress=False)
    assert seen == list(range(2 if torn else 3, 6))
    same(again, uninterrupted)
    assert not list(out.rglob('*.ckpt')) and (out/'checkpoints'/'trained.safetensors').exists()


def test_f46_killed_twice(data, killed, uninterrupted, tmp_path, monkeypatch):
    "The history of all three lives is one."
    out = tmp_path/'run'
    shutil.copytree(killed[0], out)
    class Killed(BaseException): pass
    def die(self, *a):
        if self.current_epoch == 5: raise Killed
    with monkeypatch.context() as m:
        m.setattr(fitting.ProductClassifier, 'on_train_batch_end', die)
        with pytest.raises(Killed): fit(data, killed[1], out, progress=False)
    same(fit(data, killed[1], out, progress=False), uninterrupted)


def test_f46_killed_after_the_last_epoch(data, killed, uninterrupted, tmp_path, monkeypatch):
    "Nothing is left to train; the result is there all the same."
    out = tmp_path/'run'
    class Killed(BaseException): pass
    def die(*a): raise Killed
    with monkeypatch.context() as m:
        m.setattr(fitting, 'keep_weights', die)
        with pytest.raises(Killed): fit(data, killed[1], out, progress=False)
    assert resume_from(out, run_key(killed[1], 42, f"{data.manifest['version']} grouped")).name == 'epoch=0005.ckpt'
    same(fit(data, killed[1], out, progress=False), uninterrupted)


def test_f46_killed_training_goes_on_in_another_folder(data, killed, uninterrupted, tmp_path, monkeypatch):
    "As that of a pipeline, with its new folder for each run. Equal ones keep apart, a failed one starts afresh."
    shared,seen = tmp_path/'shared', watch_epochs(monkeypatch)
    class Killed(BaseException): pass
    def end(why, out):
        def die(self, *a):
            if self.current_epoch == 4: raise why
        with monkeypatch.context() as m:
            m.setattr(fitting.ProductClassifier, 'on_train_batch_end', die)
            with pytest.raises(why): fit(data, killed[1], out, progress=False, shared=shared)
    end(Killed, tmp_path/'a')
    folder = next(p for p in shared.iterdir() if p.is_dir())
    with FileLock(folder.with_suffix('.lock')):
        end(Killed, tmp_path/'b')
        assert seen == [0, 1, 2, 3, 4]*2 and (tmp_path/'b'/'checkpoints').exists()
    seen.clear()
    same(fit(data, killed[1], tmp_path/'c', progress=False, shared=shared), uninterrupted)
    assert seen == [4, 5] and len(pd.read_csv(tmp_path/'c'/'history'/'metrics.csv')) == 6
    discard(folder, tmp_path/'c')  # as after its export
    end(ValueError, tmp_path/'d')
    assert not folder.exists()
    end(MemoryError, tmp_path/'e')
    assert list(folder.rglob('*.ckpt'))


def test_what_follows_training_may_fail(data, killed, uninterrupted, tmp_path, monkeypatch):
    "For want of memory, for instance: the next life has nothing to train, and a bundle is what ends it."
    def fail(*a): raise MemoryError
    with monkeypatch.context() as m:
        m.setattr(fitting, 'fit_stack', fail)
        with pytest.raises(MemoryError): fit(data, killed[1], tmp_path/'a', progress=False, shared=tmp_path/'shared')
    seen = watch_epochs(monkeypatch)
    again = fit(data, killed[1], tmp_path/'b', progress=False, shared=tmp_path/'shared')
    assert seen == [] and again.folder.parent == tmp_path/'shared'
    same(again, uninterrupted)
    export(again, data, tmp_path/'b')
    assert not again.folder.exists()


# Fault 47: what cannot be learnt from

def test_f47_exploding_loss(data, tmp_path):
    cfg = replace(SMOKE, fit=replace(SMOKE.fit, lr=1e30))
    with pytest.raises(FloatingPointError, match='lower the learning rate'): fit(data, cfg, tmp_path, progress=False)
    assert not list(tmp_path.rglob('manifest.json')) and not list(tmp_path.rglob('*.safetensors'))


@pytest.mark.parametrize(('split', 'poison'), [('train', np.inf), ('train', np.nan), ('val', np.nan)])
def test_f47_poisoned_vectors(data, tmp_path, monkeypatch, split, poison):
    "One listing's vector that is no number is enough to end the run."
    names = set(data.products[data.products.split == split].image.iloc[5:6])
    take = fitting.ProductDataset.__dict__['open_images']
    def open_images(self, *a):
        store = take(self, *a)
        honest = store.take
        def poisoned(keys):
            v = honest(keys); v[[k in names for k in keys]] = poison
            return v
        store.take = poisoned
        return store
    monkeypatch.setattr(ProductDataset, 'open_images', open_images)
    with pytest.raises(FloatingPointError, match='stored vectors'): fit(data, SMOKE, tmp_path, progress=False)
    assert not list(tmp_path.rglob('*.safetensors'))


def test_f47_class_missing_in_a_fold(data, tmp_path):
    "A class with a single training listing is unknown to the member whose fold that is."
    df = data.products
    rare = df.prdtypecode.iloc[0]
    train = df[df.split == 'train']
    first = train.index[~train.duplicated('prdtypecode')]
    drop = df[(df.prdtypecode == rare) & ~df.index.isin(first)]
    few = shrunk(data)
    few.products = df.drop(drop.index).reset_index(drop=True)
    assert (few.products.prdtypecode == rare).sum() == 1
    fitted = fit(few, SMOKE, tmp_path, progress=False)
    assert rare in fitted.codes and np.isfinite(fitted.oof.drop(columns=['productid', 'fold'])).all().all()
    assert np.isfinite(fitted.history['val/loss']).all()


def test_f47_single_class(data, tmp_path):
    with pytest.raises(ValueError, match='nothing to tell apart'):
        fit(shrunk(data, prdtypecode=10), SMOKE, tmp_path, progress=False)
    with pytest.raises(ValueError, match='no validation listings'):
        fit(shrunk(data, split='train'), SMOKE, tmp_path, progress=False)


@pytest.mark.parametrize('encoders', [dict(), dict(ngrams=False, text='use')], ids=['ngrams', 'use'])
def test_f47_no_text_at_all(data, tmp_path, encoders):
    cfg = replace(SMOKE, encoders=replace(SMOKE.encoders, **encoders))
    with pytest.raises(ValueError, match=r'no text to learn from|no training listing has text'):
        fit(shrunk(data, title='', text=''), cfg, tmp_path, progress=False)


def test_f47_no_image_at_all(data, tmp_path):
    with pytest.raises(ValueError, match='no training listing has image'):
        fit(shrunk(data, image=''), SMOKE, tmp_path, progress=False)
    fitted = fit(shrunk(data, image=''), single_modality(SMOKE, 'text'), tmp_path, progress=False)
    assert fitted.val['f1_weighted'] > .3


@pytest.mark.parametrize('missing', [dict(title='', text=''), dict(image='')], ids=['text', 'image'])
def test_f47_part_missing_in_validation(data, tmp_path, missing):
    "All validation listings lack a part that the training listings have."
    few = shrunk(data)
    few.products.loc[few.products.split == 'val', list(missing)] = ''
    assert np.isfinite(fit(few, SMOKE, tmp_path, progress=False).val['f1_weighted'])


def test_f47_shuffled_labels_are_refused(data, tmp_path):
    "What was learnt from chance is no better than chance, and gets no bundle."
    rng = np.random.default_rng(0)
    noise = shrunk(data, prdtypecode=rng.permutation(data.products.prdtypecode))
    with pytest.raises(ValueError, match='Nothing was learnt'): fit(noise, SMOKE, tmp_path, progress=False)


# Fault 52: threads and batches

def test_f52_batches_do_not_matter(data, bundle):
    model,rows = Predictor.load(bundle), data.products[data.products.split == 'test'].head(12)
    image = lambda r: (data.images_dir/r.image).read_bytes()
    items = [model.prepare(r.designation, r.description, image(r)) for r in rows.itertuples()]
    items.insert(3, model.prepare('Livre de poche'))
    items.insert(7, model.prepare(image=image(rows.iloc[0])))
    whole = model.probs(items)
    for size in (1, 2, 3, 5, 8):
        parts = np.concatenate([model.probs(items[i:i+size]) for i in range(0, len(items), size)])
        assert np.abs(parts-whole).max() < .02 and (parts.argmax(1) == whole.argmax(1)).all(), size


def test_f52_threads_do_not_matter(data, bundle, tmp_path):
    "Neither in answering nor in training."
    model,rows,before = Predictor.load(bundle), data.products[data.products.split == 'test'], torch.get_num_threads()
    probs,f1 = [], []
    try:
        for n in (1, 2):
            fitted = fit(data, replace(SMOKE, fit=replace(SMOKE.fit, n_threads=n)), tmp_path/f'run{n}', progress=False)
            assert torch.get_num_threads() == n
            probs.append(model.probs_of(rows, data.images_dir, tmp_path/f'store{n}', progress=False))
            f1.append(fitted.val['f1_weighted'])
    finally: torch.set_num_threads(before)
    assert np.abs(probs[0]-probs[1]).max() < .02 and abs(f1[0]-f1[1]) < .02


def test_f52_threads_are_explicit():
    "`OMP_NUM_THREADS` is not what decides; the cores that this process may use are, unless a number was asked for."
    code = ('import os\nfrom rakuten_mm.core.process import n_threads\n'
            'print(n_threads(), n_threads(3), len(os.sched_getaffinity(0)))\n'
            'os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\nprint(n_threads(), n_threads(3))')
    done = subprocess.run([sys.executable, '-c', code], env=os.environ | dict(OMP_NUM_THREADS='7'), capture_output=True,
                          text=True, check=True)
    (auto,three,cores),(one,still) = ([int(n) for n in line.split()] for line in done.stdout.splitlines())
    assert auto == cores and three == still == 3 and one == 1
