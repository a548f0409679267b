"""Write the schedule that RAKUTEN_MM_SCHEDULE names, and its configurations, with this system's folders and addresses.

They are those of zenml_pipelines/configs, or of the schedule that RAKUTEN_MM_JOBS names. Deliveries are fetched by a
service of its own.
"""
import os
from pathlib import Path

import yaml

env,target = os.environ, Path(os.environ['RAKUTEN_MM_SCHEDULE'])
own = dict(raw_dir=env['RAKUTEN_MM_RAW'], data_dir=env['RAKUTEN_MM_DATA'], artifacts_dir=env['RAKUTEN_MM_ARTIFACTS'],
           remote='', preset=env.get('RAKUTEN_MM_PRESET') or 'cpu', url=env['API_URL'])
schedule = yaml.safe_load(Path(env.get('RAKUTEN_MM_JOBS') or 'zenml_pipelines/configs/schedule.yaml').read_text())
target.parent.mkdir(parents=True, exist_ok=True)
for job in schedule['jobs']:
    config = yaml.safe_load(Path(job['config']).read_text())
    config['parameters'] |= {k: v for k,v in own.items() if k in config['parameters']}
    job['config'] = str(target.with_name(f"{job['name']}.yaml"))
    Path(job['config']).write_text(yaml.safe_dump(config))
target.write_text(yaml.safe_dump(schedule, sort_keys=False))
