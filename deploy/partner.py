"""Where no partner is configured, play one: write a synthetic delivery to the folder that is fetched from.

That folder is `synthetic` beside RAKUTEN_MM_RAW; if deliveries come from elsewhere, or it is there already, nothing happens.
"""
import os
import shutil
from pathlib import Path

ours = Path(os.environ['RAKUTEN_MM_RAW']).with_name('synthetic')
if os.environ['RAKUTEN_MM_REMOTE'] == str(ours) and not ours.exists():
    from rakuten_mm.synthetic.catalogue import synthesize
    rows = int(os.environ.get('RAKUTEN_MM_SYNTHETIC') or 2000)
    print(f'no partner is configured: writing {rows} synthetic listings to {ours}', flush=True)
    stage = ours.with_name('.synthetic.tmp')
    shutil.rmtree(stage, ignore_errors=True)
    synthesize(stage, rows, max(rows//10, 10), progress=False)
    stage.rename(ours)  # one that was killed leaves no half a delivery
