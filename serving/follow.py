"The model to serve: from the registry, or from this machine while the registry cannot be asked; and the next one when the alias moves."
import asyncio
import json
import logging
import os
import time
from pathlib import Path

from rakuten_mm.core.config import artifacts_dir
from rakuten_mm.core.files import BundleError, open_bundle, verify_manifest, write_atomic
from serving import metrics
from serving.config import ServeConfig
from serving.engine import Engine
from serving.errors import Refused
from serving.worker import settle

log = logging.getLogger('rakuten_mm.follow')


def kept(model:str)->Path:
    "Where the last model that was served under this name is written down."
    return artifacts_dir()/'models'/f"{model.removeprefix('models:/').replace('/', '-').replace('@', '-')}.json"


def remember(model:str, bundle:str, version:str):
    "A server that starts without a registry takes this one; it is only not written down if that fails."
    if not model.startswith('models:/'): return
    try: write_atomic(kept(model), json.dumps(dict(bundle=bundle, version=version)).encode())
    except OSError as e: log.warning('the model could not be written down: %s', e)


def resolve(model:str)->tuple[Path, str]:
    "A verified bundle and its version's name; raises `FileNotFoundError` or `BundleError`, or whatever MLflow does."
    for k,v in dict(MLFLOW_HTTP_REQUEST_MAX_RETRIES='1', MLFLOW_HTTP_REQUEST_TIMEOUT='10').items(): os.environ.setdefault(k, v)
    if not model.startswith('models:/'): return open_bundle(model)
    from rakuten_mm.core.tracking import resolve_model  # MLflow takes seconds to import; a folder does without
    return resolve_model(model)


def first(model:str)->tuple[Path, str, str]: # Bundle, version, and why the registry was not asked
    "What to serve at the start; raises `FileNotFoundError` or `BundleError`."
    try: return *resolve(model), ''
    except (FileNotFoundError, BundleError): raise
    except Exception as e:
        if not kept(model).exists():
            raise FileNotFoundError(f'the registry cannot be asked ({type(e).__name__}), and no model was served here before') from None
        last = json.loads(kept(model).read_text())
        verify_manifest(last['bundle'])
        return Path(last['bundle']), last['version'], f'the registry cannot be asked ({type(e).__name__}); serving the model of before'


def named(model:str)->str:
    "What a name stands for now, by a look at the registry only; raises `LookupError`, or whatever MLflow does."
    name,_,alias = model.removeprefix('models:/').partition('@')
    if not alias: return name
    from rakuten_mm.core.tracking import alias_version
    version = alias_version(alias)
    if version is None: raise LookupError(f'{model} points nowhere')
    return f'{name}/{version}'


class Follower:
    "Changes the engine's model when its alias moves. What cannot be served is left alone, and said."
    def __init__(self, engine:Engine, api, model:str, cfg:ServeConfig, problem:str=''):
        self.engine,self.api,self.model,self.cfg,self.problem = engine,api,model,cfg,problem
        self.refused,self.shadow = ('', 0.), ('', 0)  # the shadow's version, and the worker that has it
        self.say(problem)

    @property
    def follows(self)->bool: return '@' in self.model and self.model.startswith('models:/')

    async def run(self):
        "Look at the registry for ever."
        remember(self.model, self.api.bundle, self.api.version)
        first = self.follows
        while True:
            if self.follows: await self.look()
            if self.cfg.shadow: await self.look_at_shadow()
            if first: first = settle()  # MLflow has been imported by now
            await asyncio.sleep(self.cfg.poll_s)

    def say(self, problem:str):
        if problem and problem != self.problem: log.warning(problem)
        self.problem = problem
        metrics.DEGRADED.set(bool(problem))

    async def look(self):
        "Serve what the alias points at, if it can be."
        try: wanted = await asyncio.to_thread(named, self.model)
        except Exception as e: self.say(f'the registry cannot be asked ({type(e).__name__}); {self.api.version} keeps answering'); return
        if wanted == self.api.version: self.say(''); return
        if wanted == self.refused[0] and time.monotonic() < self.refused[1]: return
        try:
            bundle,version = await asyncio.to_thread(resolve, self.model)
            await self.change('load', bundle, version)
        except (Exception, TimeoutError) as e:
            why = e.error.message if isinstance(e, Refused) else str(e) or type(e).__name__
            self.refused = wanted, time.monotonic()+60
            metrics.REFUSED_MODELS.inc(); self.say(f'{wanted} is not served: {why}; {self.api.version} keeps answering')
            return
        log.info('%s answers now, in the place of %s', version, self.api.version)
        self.api.bundle,self.api.version = str(bundle), version  # what a worker that is started again will load
        remember(self.model, str(bundle), version)
        self.say('')

    async def change(self, op:str, bundle:Path, version:str):
        "Have the worker load a bundle; raises `Refused` or `TimeoutError`."
        until = time.time()+self.cfg.load_timeout_s
        await asyncio.wait_for(self.engine.ask(op, dict(bundle=str(bundle), version=version, until=until)), self.cfg.load_timeout_s+1)

    async def look_at_shadow(self):
        "Let the shadow be what its name points at."
        try:
            wanted = await asyncio.to_thread(named, self.cfg.shadow), self.engine.epoch
            if wanted == self.shadow or wanted[0] == self.api.version: return
            await self.change('shadow', *await asyncio.to_thread(resolve, self.cfg.shadow)); self.shadow = wanted
        except Exception as e: log.warning('no shadow: %s', e)
