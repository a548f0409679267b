"""What a student of the CPU preset gains from a stronger teacher.

    python -m benchmarks.distillation --data DIR --json [--text hf:FOLDER] [--image timm:FOLDER] [--seeds 3]

DIR is a delivery in the challenge's format. Each seed deals its listings into five folds, near-duplicates together,
and takes the first as test split. The teacher is the CPU preset with five times the members and, where they are
given, another text and another image encoder beside its own; the student is the CPU preset. The student is trained
three times on the same labelled listings: alone; with what the teacher says of the listings of DIR that have no
label; and of those and of the test split's, without their labels. Figures are weighted F1 on the test split, which
decides nothing; gains are over the student alone.
"""
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import f1_score

from benchmarks.harness import main, option, say
from benchmarks.quality import as_seen, deal
from rakuten_mm.core.config import TrainConfig, preset
from rakuten_mm.core.process import n_threads
from rakuten_mm.data.dataset import Dataset
from rakuten_mm.data.ingestion import ingest
from rakuten_mm.training.distillation import read_unlabelled
from rakuten_mm.training.fit import fit, out_of_fold_probs

BARS = dict(gain_with_test='>= 0.005')


def teacher_config(student:TrainConfig, text:str, image:str, members:int)->TrainConfig:
    "The student's, larger."
    e = student.encoders
    if text: e = replace(e, text=f'{e.text} + {text}', text_prefix='query: ')
    if image: e = replace(e, image=f'{e.image} + {image}', image_size=260, runtimes='onnx')
    return replace(student, encoders=e, network=replace(student.network, members=members*student.network.members))


class Trained:
    "A training, and its weighted F1 on the test listings."
    def __init__(self, data:Dataset, test:pd.DataFrame, cfg:TrainConfig, seed:int, folder:Path,
                 taught:pd.DataFrame|None = None):
        shutil.rmtree(folder, ignore_errors=True)
        self.data,self.fitted = data, fit(data, cfg, folder, seed, progress=False, taught=taught)
        codes = np.array(self.fitted.codes)[self.answers(test).argmax(1)]
        self.score = f1_score(test.prdtypecode, codes, average='weighted')

    def answers(self, rows:pd.DataFrame)->np.ndarray: # (N, K)
        "Probabilities of listings that were not trained on with their labels."
        return out_of_fold_probs(self.fitted.net, as_seen(self.fitted, self.data, rows))

    def says(self, rows:pd.DataFrame)->pd.DataFrame:
        "What it says of listings, for a student."
        rows = rows[['title', 'text', 'image']].reset_index(drop=True)
        return rows.join(pd.DataFrame(self.answers(rows), columns=[f'p_{c}' for c in self.fitted.codes]))


def bench(args, work:Path)->dict:
    warnings.filterwarnings('ignore'); torch.set_num_threads(n_threads())
    data = ingest(args.data, work/args.data.name, progress=False)
    table = next(iter(sorted(args.data.glob('X_test*.csv'))), None)
    others = read_unlabelled(table, args.data/'images', data) if table else pd.DataFrame()
    student,rows = preset('cpu'), []
    teacher = teacher_config(student, args.text, args.image, 2 if args.quick else 5)
    for seed in range(args.seeds):
        d = deal(data, seed, 0)
        test = d.products[d.products.split == 'test'].reset_index(drop=True)
        large = Trained(d, test, teacher, seed, work/'run')
        alone = Trained(d, test, student, seed, work/'run')
        r = dict(teacher=large.score, alone=alone.score)
        if len(others): r['taught'] = Trained(d, test, student, seed, work/'run', large.says(others)).score
        both = pd.concat([others, test], ignore_index=True)
        r['taught_with_test'] = Trained(d, test, student, seed, work/'run', large.says(both)).score
        rows.append(r); say(f'seed {seed}: '+', '.join(f'{k} {v:.4f}' for k,v in r.items()))
    table = pd.DataFrame(rows); mean = table.mean()
    out = dict(data=args.data.name, unlabelled=len(others), **{f'{k}_weighted_f1': v for k,v in mean.items()})
    if len(others): out['gain'] = mean.taught-mean.alone
    return out | dict(gain_with_test=mean.taught_with_test-mean.alone, by_seed=rows)


if __name__ == '__main__':
    main(bench, __doc__, option('--data', type=Path, required=True),
         option('--text', default='', help="another text encoder of the teacher, as in a preset's `text`"),
         option('--image', default='', help="another image encoder of the teacher"), seeds=3, bars=BARS)
