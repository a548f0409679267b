"Settings of the server, from `API_*` environment variables or `.env`."
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from rakuten_mm.api import OPEN_PAGES, SWITCHES
from rakuten_mm.core.environment import artifacts_dir


class ServeConfig(BaseSettings):
    "Settings of this process: `timeout_s` from API_TIMEOUT_S, and so on. Raises `ValueError` for a wrong one."
    model_config = SettingsConfigDict(env_prefix='API_', env_ignore_empty=True, frozen=True, extra='forbid',
                                      use_attribute_docstrings=True)  # `rakuten-mm serve --help` lists them
    timeout_s:PositiveFloat = 10.
    "A request that took so many seconds gets 504, or 408 if its body had not arrived"
    max_in_flight:PositiveInt = 64
    "Listings that are worked on or wait at one time; one more gets 503"
    max_bytes:PositiveInt = 64_000_000
    "Bytes of bodies that are held at one time; what does not fit gets 503"
    batch_size:PositiveInt = 16
    "Most listings that the model sees at once"
    batch_wait_ms:float = 1.
    "How long a listing may wait for company while the model is idle"
    threads:int = 0
    "Threads of the model; 0 takes every core this process may use"
    poll_s:PositiveFloat = 5.
    "Seconds between two looks at the registry"
    load_timeout_s:PositiveFloat = 60.
    "A new model that is not ready after so many seconds is not served"
    restart_s:float = 120.
    "A worker that is not ready after so many seconds is started again"
    hang_s:PositiveFloat = 10.
    "A worker from which nothing was heard for so many seconds is started again"
    give_up_s:PositiveFloat = 300.
    "A server without a worker for so many seconds ends with exit code 1, for its supervisor to start it afresh"
    shadow:str = ''
    "A model that sees the traffic too and does not answer, e.g. models:/rakuten-mm@challenger"
    cache:int = 0
    "Answers that are remembered; 0 for none"
    rate:str = '6000/minute'
    "Requests that a user may make"
    failed_logins:str = '30/minute'
    "Wrong credentials that an address may send"
    token_s:PositiveInt = 3600
    "Seconds that a bearer token is good for"
    secret:str = Field('', repr=False)
    "Key that signs bearer tokens; random if empty, and tokens end with the process"
    open_pages:str = Field(OPEN_PAGES, description=f'Pages that need no credentials, of {", ".join(SWITCHES)}, '
                           'separated by commas; /health, /ready and / are always open')
    database_url:str = ''
    "Where answers and corrections are kept; SQLite in artifacts/feedback.db if empty"
    keep_inputs:Literal['all', 'review', 'none'] = 'review'
    "Texts and images that are kept: `all`, those in the `review` lane, or `none`"
    keep_days:float = Field(0., ge=0)
    "Answers, texts and images are removed after so many days; 0 keeps them"
    forwarded:str = ''
    "Addresses of the reverse proxies whose X-Forwarded-For is believed"

    def __init__(self, **given:Any):
        try: super().__init__(**given)
        except ValidationError as e: raise ValueError('; '.join(map(explain, e.errors(include_url=False)))) from None

    @field_validator('secret')
    @classmethod
    def hard_to_guess(cls, v:str)->str:
        if v and len(v.encode()) < 32: raise ValueError('is shorter than 32 bytes; anybody could guess it')
        return v

    @field_validator('open_pages')
    @classmethod
    def known_pages(cls, v:str)->str:
        unknown = sorted(set(filter(None, v.split(','))) - {*SWITCHES})
        if unknown: raise ValueError(f"{', '.join(unknown)} cannot be opened; there are {', '.join(SWITCHES)}")
        return v

    @property
    def url(self)->str:
        "The database's URL."
        if self.database_url: return self.database_url
        artifacts_dir().mkdir(parents=True, exist_ok=True)
        return f"sqlite:///{artifacts_dir()/'feedback.db'}"


def explain(error:Any)->str:
    "A wrong setting in one line; its value is shown unless it is secret."
    name,message = str(error['loc'][0]), error['msg'].removeprefix('Value error, ')
    return f'API_{name.upper()} '+(message if name == 'secret' else f"is {error['input']!r}: {message}")


def kept_images()->Path:
    "Folder of the images that were kept, by the sha256 of their bytes."
    return artifacts_dir()/'served'
