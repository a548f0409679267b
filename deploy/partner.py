"""Where no partner is configured, play one: write a synthetic delivery to the folder that is fetched from.

RAKUTEN_MM_SYNTHETIC says how many listings; without it, or if the folder is there, nothing happens.
"""
import os
import shutil
from pathlib import Path

rows,remote = int(os.environ.get('RAKUTEN_MM_SYNTHETIC') or 0), Path(os.environ['RAKUTEN_MM_REMOTE'])
if rows and not remote.exists():
    from rakuten_mm.synthetic import synthesize
    print(f'no partner is configured: writing {rows} synthetic listings to {remote}', flush=True)
    stage = remote.with_name(f'.{remote.name}.tmp')
    shutil.rmtree(stage, ignore_errors=True)
    synthesize(stage, rows, max(rows//10, 10), progress=False)
    stage.rename(remote)  # one that was killed leaves no half a delivery
