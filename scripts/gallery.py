"""Run the notebooks of nbs/runs/ on a synthetic catalogue and keep them, executed, in nbs/gallery/ for the site.

    python scripts/gallery.py [--rows N] [--preset NAME]

Two deliveries, a champion and its challenger, and a week of listings that lost their photos: minutes on two cores,
which the documentation must not wait for. So the pages are kept in git (with fewer colours, without folders of this
machine), and made again when a run notebook says something else.
"""
import argparse
import base64
import io
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat
from PIL import Image

ROOT = Path(__file__).parents[1]
BAR = re.compile(r'\d+/(?:\d+|\?) \[[^]]*\]') # A progress bar
PAGES = { # Run notebook: title of its page, and what to look at
    'ingest': ('Ingestion report', 'The second of two deliveries: what came in, and what the dataset holds now.'),
    'train': ('Training', 'Curves, the weight of each expert, and what more listings would bring.'),
    'evaluate': ('Model card', 'How good the new model is, on whom, and what each shortcut costs it.'),
    'triage': ('Triage', 'What may be filed without a look, and with which guarantee.'),
    'promote': ('Promotion', 'The new model against the champion: every check, and every answer that would change.'),
    'drift': ('Drift', 'Half of the listings have lost their photo: what moved, and what to do.'),
}


def deliver(work:Path, rows:int):
    "Two deliveries of one catalogue; the second is the first and a quarter more."
    from rakuten_mm.synthetic.catalogue import synthesize
    first = rows*4//5
    for name,start,n in (('october', 0, first), ('november', first, rows-first)):
        synthesize(work/name, n, 0, start=start, total=rows, progress=False)


def train(out:Path, data:Path, preset:str, curve:bool)->int: # Version in the registry
    "Train, evaluate, set the lanes, and let the gate decide."
    from rakuten_mm.core.tracking import tracked_run
    from zenml_pipelines.run_notebook import run_notebook
    with tracked_run(name=out.name) as run:
        run_one = lambda name, **kw: run_notebook(name, out/name, run, progress=False, data_dir=str(data), **kw)
        version = run_one('train', preset=preset, curve=curve)['version']
        if curve: # The pages that are kept
            for name in ('evaluate', 'triage'): run_one(name, train_dir=str(out/'train'))
        run_one('promote', version=version, train_dir=str(out/'train'))
    return version


def serve(data:Path, n:int):
    "Ask a server of the champion about test listings, every second one without its photo."
    from serving.testing import running_server, some_listings
    with running_server(API_DATABASE_URL=os.environ['API_DATABASE_URL'], exit_code=None) as server:
        listings = some_listings(data, n)
        served = [x if i%2 else x | dict(image=None) for i,x in enumerate(listings)]
        for x in served: server.ask(timeout=60, **x).raise_for_status()


def fewer_colours(png:str)->str: # Base64
    "A picture with at most 64 colours."
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert('RGB')
    image.quantize(64).save(out := io.BytesIO(), 'PNG', optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def readable(html:str)->str:
    "The HTML of a table whose coloured cells have text in black or white, whichever stands out more."
    light = lambda v: v/12.92 if v <= .04045 else ((v+.055)/1.055)**2.4
    def text_on(m):
        r,g,b = (light(int(m[1][i:i+2], 16)/255) for i in (0, 2, 4))
        return f"background-color: #{m[1]};\n  color: #{'000000' if .2126*r+.7152*g+.0722*b > .179 else 'ffffff'};"
    return re.sub(r'background-color: #([0-9a-f]{6});\s+color: #[0-9a-f]{6};', text_on, html)


def page(nb, name:str, work:Path):
    "An executed run as a page: its title, no code but the settings, nothing of this machine."
    title,text = PAGES[name]
    head = f'# {title}\n\n> {text}'
    told = (f'A run of [`{name}.ipynb`](../runs/{name}.ipynb), as a pipeline keeps it, on synthetic listings: its '
            'scores say that the machinery works, and nothing about real ones. The code is in the notebook.')
    nb.cells[:1] = [nbformat.v4.new_markdown_cell(head, id='title'), nbformat.v4.new_markdown_cell(told, id='told')]
    here = lambda s: s.replace(f'{work.resolve()}/', '').replace(f'{work}/', '').replace(f'{ROOT}/', '')
    for c in nb.cells:
        c.metadata = {'tags': tags} if (tags := c.metadata.get('tags')) else {}
        c.source = here(c.source)
        if c.cell_type != 'code': continue
        set_for_it = 'injected-parameters' in c.metadata.get('tags', [])
        shown = 'code-fold: true\n#| code-summary: settings of this run' if set_for_it else 'echo: false'
        c.source = f'#| {shown}\n{c.source}'
        c.execution_count = None
        c.outputs = [o for o in c.outputs if o.get('name') != 'stderr']
        for o in c.outputs:
            if 'text' in o: o.text = '\n'.join(l for l in here(o.text).splitlines() if l.strip() and not BAR.search(l))
            for kind,value in o.get('data', {}).items():
                if kind == 'image/png': o.data[kind] = fewer_colours(value)
                elif isinstance(value, str): o.data[kind] = readable(here(value))
            if 'execution_count' in o: o.execution_count = None
            if 'metadata' in o: o.metadata = {}
        c.outputs = [o for o in c.outputs if o.output_type != 'stream' or o.text]
    nb.metadata = {'kernelspec': dict(display_name='python3', language='python', name='python3')}
    return nb


def main():
    "Run, and keep the pages."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', type=int, default=4_500)
    parser.add_argument('--preset', default='cpu')
    args = parser.parse_args()
    os.chdir(ROOT); sys.path.insert(0, str(ROOT))
    work = Path(tempfile.mkdtemp(prefix='gallery-'))
    os.environ |= dict(RAKUTEN_MM_ARTIFACTS=str(work/'artifacts'), API_DATABASE_URL=f"sqlite:///{work/'answers.db'}")
    os.environ.pop('MLFLOW_TRACKING_URI', None)
    from rakuten_mm.core.environment import load_environment
    load_environment(work/'no.env')
    from zenml_pipelines.run_notebook import run_notebook
    data,runs = work/'data', work/'runs'
    deliver(work, args.rows)
    run_notebook('ingest', runs/'october'/'ingest', progress=False, raw_dir=str(work/'october'), data_dir=str(data))
    train(runs/'october', data, args.preset, curve=False)
    run_notebook('ingest', runs/'november'/'ingest', progress=False, raw_dir=str(work/'november'), data_dir=str(data))
    train(runs/'november', data, args.preset, curve=True)
    serve(data, 400)
    run_notebook('drift', runs/'november'/'drift', progress=False, data_dir=str(data))
    gallery = ROOT/'nbs'/'gallery'
    gallery.mkdir(exist_ok=True)
    for i,name in enumerate(PAGES):
        nb = page(nbformat.read(runs/'november'/name/f'{name}.ipynb', as_version=4), name, work)
        nbformat.write(nb, gallery/f'{i:02}_{name}.ipynb')
        print(gallery/f'{i:02}_{name}.ipynb')
    shutil.rmtree(work)


if __name__ == '__main__': main()
