"""The model to serve, and the next one when its alias moves.

It comes from the registry, or from this machine while the registry cannot be asked.
"""
import asyncio
import json
import logging
import math
import time
from pathlib import Path

from rakuten_mm.core.environment import artifacts_dir, limit_mlflow
from rakuten_mm.core.files import write_atomic
from rakuten_mm.models.manifest import BundleError, open_bundle, verify_manifest
from serving import metrics
from serving.config import ServeConfig
from serving.errors import Refused
from serving.worker import ProductAPI, settle
from serving.worker_client import WorkerClient

log = logging.getLogger('rakuten_mm.registry_watcher')


def note_of(model:str)->Path:
    "The file that names the last model that was served for `model`."
    return artifacts_dir()/'models'/f"{model.removeprefix('models:/').replace('/', '-').replace('@', '-')}.json"


def remember(model:str, bundle:str, version:str):
    "Write down what a server that starts without a registry should take; if that fails, go on without."
    if not model.startswith('models:/'): return
    path,home = Path(bundle).resolve(), artifacts_dir().resolve()
    if path.is_relative_to(home): path = path.relative_to(home)
    try: write_atomic(note_of(model), json.dumps(dict(bundle=str(path), version=version)).encode())
    except OSError as e: log.warning('the model could not be written down: %s', e)


def remembered(model:str)->tuple[Path, str]:
    """The bundle and version that were served last, where the artifacts folder is now.

    Raises `OSError`, `ValueError`, `KeyError` or `BundleError`.
    """
    last = json.loads(note_of(model).read_text())
    bundle = artifacts_dir()/last['bundle']
    verify_manifest(bundle)
    return bundle, last['version']


def resolve(model:str)->tuple[Path, str]:
    "A verified bundle and its version's name; raises `FileNotFoundError`, `BundleError`, or an error of MLflow."
    limit_mlflow()
    if not model.startswith('models:/'): return open_bundle(model)
    from rakuten_mm.registry.versions import resolve_model  # MLflow takes seconds to import; a folder does without
    return resolve_model(model)


def resolve_at_start(model:str)->tuple[Path, str, str]: # Bundle, version, and why the registry was not asked
    "The model to start with; raises `FileNotFoundError` or `BundleError`."
    try: return *resolve(model), ''
    except (FileNotFoundError, BundleError): raise
    except Exception as e:
        why = f'the registry cannot be asked ({type(e).__name__})'
        if not note_of(model).exists(): raise FileNotFoundError(f'{why}, and no model was served here before') from None
        try: return *remembered(model), f'{why}; serving the model of before'
        except BundleError: raise
        except (ValueError, KeyError, TypeError):
            raise FileNotFoundError(f'{why}, and {note_of(model)} is damaged') from None


def current_version(model:str)->str:
    "The version that `model` stands for now, from the registry only; raises `LookupError` or an error of MLflow."
    name,_,alias = model.removeprefix('models:/').partition('@')
    if not alias: return name
    from rakuten_mm.registry.versions import alias_version
    version = alias_version(alias)
    if version is None: raise LookupError(f'{model} points nowhere')
    return f'{name}/{version}'


class RegistryWatcher:
    "Changes the worker's model when its alias moves. What cannot be served is left alone, and reported."
    def __init__(self, worker:WorkerClient, api:ProductAPI, model:str, cfg:ServeConfig, problem:str=''):
        self.worker,self.api,self.model,self.cfg,self.problem = worker,api,model,cfg,problem
        self.refused,self.why = ('', 0.), '' # A version and when to try it again; why it is refused
        self.before:tuple[str, str]|None = None # Bundle and version of the model before this one
        self.shadow,self.refused_shadow = ('', 0), '' # Its version and the worker that has it; one that is left alone
        self.deadly = '' # A version that ended a worker as its shadow
        worker.on_guilty = self.on_guilty
        self.report(problem)

    @property
    def follows(self)->bool: return '@' in self.model and self.model.startswith('models:/')

    async def run(self):
        "Look at the registry for ever."
        remember(self.model, self.api.bundle, self.api.version)
        first = self.follows
        while True:
            if self.follows: await self.look()
            if self.cfg.shadow: await self.look_at_shadow()
            if first: settle(); first = False  # MLflow has been imported by now
            await asyncio.sleep(self.cfg.poll_s)

    def report(self, problem:str):
        "Log and show why the server is degraded; empty if it is not."
        if problem and problem != self.problem: log.warning(problem)
        self.problem = problem
        metrics.DEGRADED.set(bool(problem))

    def refuse(self, version:str, why:str, again_s:float):
        "Leave a version alone, for some seconds or until the alias moves."
        self.refused = version, time.monotonic()+again_s
        metrics.REFUSED_MODELS.inc()
        self.why = f'{version} is not served: {why}; {self.api.version} keeps answering'
        self.report(self.why)

    def on_guilty(self, who:str):
        "Give up the model that has just ended its worker: the next worker starts without it."
        if who == 'shadow':
            self.refused_shadow = self.deadly = self.shadow[0]
            log.error('the shadow %s ended the worker', self.deadly)
        elif self.before:
            bad = self.api.version
            (self.api.bundle,self.api.version),self.before = self.before,None
            remember(self.model, self.api.bundle, self.api.version)
            self.refuse(bad, 'it ended the worker', math.inf)

    def fall_back(self, why:str)->bool:
        "At the start, take the model that was served last in the place of one that cannot be; False if there is none."
        try: bundle,version = remembered(self.model)
        except (OSError, ValueError, KeyError, BundleError): return False
        if version == self.api.version or not self.follows: return False
        bad,self.api.bundle,self.api.version = self.api.version,str(bundle),version
        self.refuse(bad, why, math.inf)
        return True

    async def look(self):
        "Serve the version that the alias points at, if possible."
        stays = f'{self.api.version} keeps answering'
        try: wanted = await asyncio.to_thread(current_version, self.model)
        except Exception as e: self.report(f'the registry cannot be asked ({type(e).__name__}); {stays}'); return
        if wanted == self.api.version: self.report(''); return
        if wanted == self.refused[0] and time.monotonic() < self.refused[1]: self.report(self.why); return
        if wanted == self.deadly: self.refuse(wanted, 'it ended the worker as its shadow', math.inf); return
        try:
            bundle,version = await asyncio.to_thread(resolve, self.model)
            await self.change('load', bundle, version)
        except TimeoutError: self.refuse(wanted, 'it did not load in time', math.inf); return
        except Exception as e:
            why = e.error.message if isinstance(e, Refused) else str(e) or type(e).__name__
            ended = isinstance(e, Refused) and e.error.code == 'worker_crashed'
            self.refuse(wanted, why, math.inf if ended else 60)
            return
        log.info('%s answers now, in the place of %s', version, self.api.version)
        self.before = self.api.bundle,self.api.version
        self.api.bundle,self.api.version = str(bundle), version  # for a worker that is started again
        remember(self.model, str(bundle), version)
        self.report('')

    async def change(self, op:str, bundle:Path, version:str):
        "Have the worker load a bundle; raises `Refused` or `TimeoutError`."
        limit = self.cfg.load_timeout_s
        job = dict(bundle=str(bundle), version=version, until=time.time()+limit)
        await asyncio.wait_for(self.worker.ask(op, job), limit+1)

    async def look_at_shadow(self):
        "Have the worker load the shadow's version, if it is another one now."
        try:
            wanted = await asyncio.to_thread(current_version, self.cfg.shadow), self.worker.epoch
            left_alone = self.api.version, self.refused_shadow, self.refused[0]
            if wanted == self.shadow or wanted[0] in left_alone: return
            await self.change('shadow', *await asyncio.to_thread(resolve, self.cfg.shadow)); self.shadow = wanted
        except TimeoutError: self.refused_shadow = wanted[0]; log.warning('no shadow: it did not load in time')
        except Refused as e:
            if e.error.code == 'worker_crashed': self.refused_shadow = self.deadly = wanted[0]
            log.warning('no shadow: %s', e.error.message)
        except Exception as e: log.warning('no shadow: %s', e)
