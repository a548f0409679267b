"Run train.ipynb."
from typing import Annotated

from zenml import step
from zenml.logger import get_logger
from zenml.types import HTMLString

from zenml_pipelines.context import step_run

logger = get_logger(__name__)


@step(experiment_tracker=True, enable_cache=False)
def train(
    data_dir:str, # Dataset
    artifacts_dir:str, # Everything is written below
    preset:str, # Named configuration
    seed:int,
    config:str='', # JSON file with a configuration, used instead of the preset
    go_on:bool=False, # From the champion's training, if there is one that fits; in a fraction of the time
)->tuple[Annotated[str, 'train_dir'], Annotated[int, 'version'], Annotated[HTMLString, 'training_report']]:
    "A dataset becomes a registered challenger."
    from rakuten_mm.registry.versions import alias_version, resolve_training
    run = step_run(artifacts_dir)
    champion = alias_version('champion') if go_on else None
    init = resolve_training(champion) if champion else None
    logger.info('training goes on from %s', f'version {champion}' if init else 'nothing')
    result,page = run.notebook('train', data_dir=data_dir, preset=preset, config=config, seed=seed,
                               init=str(init or ''))
    return str(run.out_dir), result['version'], page
