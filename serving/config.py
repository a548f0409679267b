"Settings of the server, from `API_*` environment variables or `.env`."
import os
from dataclasses import dataclass, field, fields
from pathlib import Path

from rakuten_mm.core.config import artifacts_dir

ROLES = ('predict', 'review', 'admin') # Of users; each may do what those before it may
PAGES = {'docs': ('/docs', '/openapi.json', '/static-docs'), 'metrics': ('/metrics',), 'version': ('/version',), 'categories': ('/categories',)}


def setting(default, what:str):
    "A field that says what it is for; `rakuten-mm serve --help` and the documentation list them."
    return field(default=default, metadata={'help': what})


@dataclass(frozen=True)
class ServeConfig:
    "What `from_environment` reads: `timeout_s` from API_TIMEOUT_S, and so on."
    timeout_s:float = setting(10., 'A request that took so many seconds gets 504, or 408 if its body had not arrived')
    max_in_flight:int = setting(64, 'Listings that are worked on or wait at one time; one more gets 503')
    batch_size:int = setting(16, 'Most listings that the model sees at once')
    batch_wait_ms:float = setting(1., 'How long a listing may wait for company while the model is idle')
    threads:int = setting(0, 'Threads of the model; 0 takes every core this process may use')
    poll_s:float = setting(5., 'Seconds between two looks at the registry')
    load_timeout_s:float = setting(60., 'A new model that is not ready after so many seconds is not served')
    restart_s:float = setting(120., 'A worker that is not ready after so many seconds is started again')
    shadow:str = setting('', 'A model that sees the traffic too and does not answer, e.g. models:/rakuten-mm@challenger')
    cache:int = setting(0, 'Answers that are remembered; 0 for none')
    rate:str = setting('6000/minute', 'Requests that a user may make')
    failed_logins:str = setting('30/minute', 'Wrong credentials that an address may send')
    token_s:int = setting(3600, 'Seconds that a bearer token is good for')
    secret:str = setting('', 'Key that signs bearer tokens; random if empty, and tokens end with the process')
    open_pages:str = setting('docs', f'Pages that need no credentials, of {", ".join(PAGES)}, separated by commas; /health, /ready and / are always open')
    database_url:str = setting('', 'Where answers and corrections are kept; SQLite in artifacts/feedback.db if empty')
    keep_inputs:str = setting('review', 'Texts and pictures that are kept: `all`, those in the `review` lane, or `none`')
    forwarded:str = setting('', 'Addresses of the reverse proxies whose X-Forwarded-For is believed')

    def __post_init__(self):
        for name in ('timeout_s', 'max_in_flight', 'batch_size', 'poll_s', 'load_timeout_s', 'token_s'):
            if getattr(self, name) <= 0: raise ValueError(f'API_{name.upper()} is {getattr(self, name)}; it must be above 0')
        if self.keep_inputs not in ('all', 'review', 'none'): raise ValueError(f'API_KEEP_INPUTS is {self.keep_inputs!r}; use all, review or none')
        if self.secret and len(self.secret.encode()) < 32: raise ValueError('API_SECRET is shorter than 32 bytes; anybody could guess it')
        unknown = set(filter(None, self.open_pages.split(','))) - PAGES.keys()
        if unknown: raise ValueError(f"API_OPEN_PAGES names {', '.join(sorted(unknown))}; there are {', '.join(PAGES)}")

    @classmethod
    def from_environment(cls)->'ServeConfig':
        "Settings of this process. Raises `ValueError` for one that is wrong."
        read = {}
        for f in fields(cls):
            text = os.environ.get(f'API_{f.name.upper()}', '')
            try:
                if text: read[f.name] = type(f.default)(text)
            except ValueError: raise ValueError(f'API_{f.name.upper()} is {text!r}, which is no number') from None
        return cls(**read)

    @property
    def url(self)->str:
        "The database's URL."
        if self.database_url: return self.database_url
        artifacts_dir().mkdir(parents=True, exist_ok=True)
        return f"sqlite:///{artifacts_dir()/'feedback.db'}"

    @property
    def open_paths(self)->tuple[str, ...]:
        "Beginnings of paths that need no credentials."
        return tuple(p for name in filter(None, self.open_pages.split(',')) for p in PAGES[name])


def kept_images()->Path:
    "Folder of the pictures that were kept, by the sha256 of their bytes."
    return artifacts_dir()/'served'
