"""Users, their credentials and their roles.

HTTP Basic and OAuth 2 bearer tokens name a user of the database, or the one of the environment. Passwords of the
database are hashed with Argon2, which is slow on purpose, so a pair that was right is remembered for five minutes,
under a key that no other process knows.
"""
import asyncio
import base64
import binascii
import hmac
import os
import re
import secrets
import time
from dataclasses import dataclass
from typing import Any, NoReturn

import jwt
from argon2 import PasswordHasher
from argon2.exceptions import Argon2Error, InvalidHashError
from limits import RateLimitItem, parse
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter

from rakuten_mm.api import ROLES, role_allows
from serving.config import ServeConfig
from serving.errors import Refused
from serving.store import Store, User

CHALLENGE = {'WWW-Authenticate': 'Basic realm="rakuten-mm", charset="UTF-8", Bearer'}
NAME = re.compile(r'[A-Za-z0-9_.@-]{1,64}')
hasher = PasswordHasher()


class MissingPassword(RuntimeError):
    "Nobody could use the server."


@dataclass(frozen=True)
class Principal:
    "A user who has shown credentials."
    name:str
    role:str

    def may(self, role:str)->bool: return role_allows(self.role, role)


def add_user(
    store:Store,
    name:str, # Letters, digits and _ . @ -
    password:str, # At least 12 characters
    role:str, # One of `ROLES`
):
    "Add a user, or change one; raises `ValueError`."
    if not NAME.fullmatch(name): raise ValueError(f'{name!r} is no user name: up to 64 letters, digits and _ . @ -')
    if len(password) < 12: raise ValueError('a password has at least 12 characters')
    if role not in ROLES: raise ValueError(f"there is no role {role!r}; choose {', '.join(ROLES)}")
    store.put_user(name, hasher.hash(password), role)


def verify_password(stored:str, password:bytes)->bool:
    "Compare a password with its hash."
    try: return hasher.verify(stored, password)
    except (Argon2Error, InvalidHashError): return False


class Authenticator:
    "Tells users from strangers."
    def __init__(self,
        store:Store,
        cfg:ServeConfig,
        user:str = '', # From the environment; is an admin
        password:str = '',
    ):
        if bool(user) != bool(password): raise MissingPassword('set API_USERNAME and API_PASSWORD, both or neither')
        if ':' in user: raise MissingPassword('API_USERNAME must not contain a colon: it ends the name in HTTP Basic')
        self.store,self.cfg,self.user,self.own = store,cfg,user,f'{user}:{password}'.encode()
        self.key,self.secret = secrets.token_bytes(32), cfg.secret or secrets.token_hex(32)
        self.nobody = hasher.hash(secrets.token_hex(16))  # checking a stranger's password against it takes as long
        self.limiter = FixedWindowRateLimiter(MemoryStorage())
        self.rate,self.failed = parse(cfg.rate), parse(cfg.failed_logins)
        self.right:dict[bytes, tuple[float, str, Principal]] = {}  # until when, the hash it was checked with, and who
        self.asked:dict[bytes, asyncio.Future[bool]] = {}
        self.known:dict[str, User] = {}
        self.read = -1e9
        if not user and not self.users():
            raise MissingPassword('set API_USERNAME and API_PASSWORD in the environment or in .env, or add a user with '
                                  '`rakuten-mm users add`; the API does not start without')

    @classmethod
    def from_environment(cls, store:Store, cfg:ServeConfig)->'Authenticator':
        "The user of the environment, and those of the database; raises `MissingPassword` if there are none."
        return cls(store, cfg, os.environ.get('API_USERNAME', ''), os.environ.get('API_PASSWORD', ''))

    def users(self)->dict[str, User]:
        "Users of the database, read again every few seconds; the last known while it cannot be read."
        if time.monotonic()-self.read > 5:
            try: self.known = self.store.users()
            except Exception:
                if self.read < 0: raise
            self.read = time.monotonic()
        return self.known

    def limit(self, item:RateLimitItem, *who:str, message:str, test:bool=False):
        "Raises 429 if `who` has done this too often; `test` does not count."
        if (self.limiter.test if test else self.limiter.hit)(item, *who): return
        wait = max(1, int(self.limiter.get_window_stats(item, *who).reset_time-time.time()+.999))
        raise Refused(429, message, headers={'Retry-After': str(wait)})

    async def identify(self, header:str, client:str)->Principal:
        "The user that an `Authorization` header names; raises 401, or 429 after too many tries."
        if not header: raise Refused(401, 'no credentials', headers=CHALLENGE)
        scheme,_,given = header.partition(' ')
        match scheme.lower():
            case 'basic': who = await self.basic(given.strip(), client)
            case 'bearer': who = self.bearer(given.strip())
            case _: who = None
        if who is None: self.refuse(client)
        self.limit(self.rate, 'rate', who.name, message=f'more than {self.cfg.rate} requests')
        return who

    def refuse(self, client:str)->NoReturn:
        "Count a failure, and raise 401 or 429."
        self.limit(self.failed, 'failed', client, message='too many wrong credentials')
        raise Refused(401, 'wrong credentials', headers=CHALLENGE)

    async def basic(self, given:str, client:str)->Principal|None:
        "The user of an HTTP Basic pair."
        try: pair = base64.b64decode(given, validate=True)
        except (binascii.Error, ValueError): return None
        return await self.check(pair, client)

    async def check(self, pair:bytes, client:str)->Principal|None:
        "The user of `name:password`."
        name,_,password = pair.partition(b':')
        seen,known = hmac.digest(self.key, pair, 'sha256'), self.users().get(name.decode('utf-8', 'replace'))
        stored = known.password_hash if known else self.nobody
        if (found := self.right.get(seen)) and found[0] > time.monotonic() and found[1] == stored: return found[2]
        self.limit(self.failed, 'failed', client, message='too many wrong credentials', test=True)
        if self.user and hmac.compare_digest(pair, self.own): who = Principal(self.user, 'admin')
        elif await self.verified(seen, stored, password) and known: who = Principal(known.name, known.role)
        else: return None
        if len(self.right) > 1000: self.right.clear()
        self.right[seen] = time.monotonic()+300, stored, who
        return who

    async def verified(self, seen:bytes, stored:str, password:bytes)->bool:
        "Verify a password; requests that ask the same at one time wait for one answer."
        if len(password) > 1024: return False
        if seen not in self.asked:
            self.asked[seen] = asyncio.ensure_future(asyncio.to_thread(verify_password, stored, password))
            self.asked[seen].add_done_callback(lambda _: self.asked.pop(seen, None))
        return await asyncio.shield(self.asked[seen])

    def bearer(self, token:str)->Principal|None:
        "The user of a token, if there still is one."
        try: claims = jwt.decode(token, self.secret, algorithms=['HS256'], options={'require': ['exp', 'sub']})
        except jwt.InvalidTokenError: return None
        name = claims['sub']
        if self.user and name == self.user: return Principal(name, 'admin')
        user = self.users().get(name)
        return Principal(user.name, user.role) if user else None

    def token(self, who:Principal)->dict[str, Any]:
        "A bearer token, as OAuth 2 wants it."
        now = int(time.time())
        signed = jwt.encode(dict(sub=who.name, iat=now, exp=now+self.cfg.token_s), self.secret, algorithm='HS256')
        return dict(access_token=signed, token_type='bearer', expires_in=self.cfg.token_s, role=who.role)
