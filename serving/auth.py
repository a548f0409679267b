"""Who asks, and what they may do.

HTTP Basic and OAuth 2 bearer tokens name a user of the database, or the one of the environment. Passwords of the database are hashed
with Argon2, which is slow on purpose, so a pair that was right is remembered for five minutes, under a key that no other process knows.
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

import jwt
from argon2 import PasswordHasher
from argon2.exceptions import Argon2Error, InvalidHashError
from limits import RateLimitItem, parse
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter

from serving.config import ROLES, ServeConfig
from serving.errors import Refused
from serving.store import Store

CHALLENGE = {'WWW-Authenticate': 'Basic realm="rakuten-mm", charset="UTF-8", Bearer'}
NAME = re.compile(r'[A-Za-z0-9_.@-]{1,64}')
hasher = PasswordHasher()


class MissingPassword(RuntimeError):
    "Nobody could use the server."


@dataclass(frozen=True)
class Who:
    "A user."
    name:str
    role:str

    def may(self, role:str)->bool: return ROLES.index(self.role) >= ROLES.index(role)


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


class Access:
    "Tells users from strangers."
    def __init__(self,
        store:Store,
        cfg:ServeConfig,
        user:str = '', # From the environment; is an admin
        password:str = '',
    ):
        if bool(user) != bool(password): raise MissingPassword('set API_USERNAME and API_PASSWORD, both or neither')
        if ':' in user: raise MissingPassword('API_USERNAME must not contain a colon: HTTP Basic could not tell it from the password')
        self.store,self.cfg,self.user,self.own = store,cfg,user,f'{user}:{password}'.encode()
        self.key,self.secret = secrets.token_bytes(32), cfg.secret or secrets.token_hex(32)
        self.nobody = hasher.hash(secrets.token_hex(16))  # a stranger's password is checked against it, which takes as long
        self.limiter = FixedWindowRateLimiter(MemoryStorage())
        self.rate,self.failed = parse(cfg.rate), parse(cfg.failed_logins)
        self.right,self.asked,self.known,self.read = {}, {}, {}, -1e9
        if not user and not self.users():
            raise MissingPassword('set API_USERNAME and API_PASSWORD in the environment or in .env, or add a user with `rakuten-mm users add`; '
                                  'the API does not start without')

    @classmethod
    def from_environment(cls, store:Store, cfg:ServeConfig)->'Access':
        "The user of the environment, and those of the database; raises `MissingPassword` if there are none."
        return cls(store, cfg, os.environ.get('API_USERNAME', ''), os.environ.get('API_PASSWORD', ''))

    def users(self)->dict:
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

    async def identify(self, header:str, client:str)->Who:
        "The user that an `Authorization` header names; raises 401, or 429 after too many tries."
        if not header: raise Refused(401, 'no credentials', headers=CHALLENGE)
        scheme,_,given = header.partition(' ')
        who = await self.basic(given.strip(), client) if scheme.lower() == 'basic' else self.bearer(given.strip()) if scheme.lower() == 'bearer' else None
        if who is None: self.wrong(client)
        self.limit(self.rate, 'rate', who.name, message=f'more than {self.cfg.rate} requests')
        return who

    def wrong(self, client:str):
        "Count a failure; always raises."
        self.limit(self.failed, 'failed', client, message='too many wrong credentials')
        raise Refused(401, 'wrong credentials', headers=CHALLENGE)

    async def basic(self, given:str, client:str)->Who|None:
        "The user of an HTTP Basic pair."
        try: pair = base64.b64decode(given, validate=True)
        except (binascii.Error, ValueError): return None
        return await self.check(pair, client)

    async def check(self, pair:bytes, client:str)->Who|None:
        "The user of `name:password`."
        name,_,password = pair.partition(b':')
        seen,known = hmac.digest(self.key, pair, 'sha256'), self.users().get(name.decode('utf-8', 'replace'))
        stored = known.password_hash if known else self.nobody
        until,was,who = self.right.get(seen, (0, '', None))
        if until > time.monotonic() and was == stored: return who
        self.limit(self.failed, 'failed', client, message='too many wrong credentials', test=True)
        if self.user and hmac.compare_digest(pair, self.own): who = Who(self.user, 'admin')
        elif await self.verified(seen, stored, password) and known: who = Who(known.name, known.role)
        else: return None
        if len(self.right) > 1000: self.right.clear()
        self.right[seen] = (time.monotonic()+300, stored, who)
        return who

    async def verified(self, seen:bytes, stored:str, password:bytes)->bool:
        "Whether the password is right; requests that ask the same at one time wait for one answer."
        if len(password) > 1024: return False
        if seen not in self.asked:
            self.asked[seen] = asyncio.ensure_future(asyncio.to_thread(self.verify, stored, password))
            self.asked[seen].add_done_callback(lambda _: self.asked.pop(seen, None))
        return await asyncio.shield(self.asked[seen])

    @staticmethod
    def verify(stored:str, password:bytes)->bool:
        try: return hasher.verify(stored, password)
        except (Argon2Error, InvalidHashError): return False

    def bearer(self, token:str)->Who|None:
        "The user of a token, if there still is one."
        try: claims = jwt.decode(token, self.secret, algorithms=['HS256'], options={'require': ['exp', 'sub']})
        except jwt.InvalidTokenError: return None
        name = claims['sub']
        if self.user and name == self.user: return Who(name, 'admin')
        user = self.users().get(name)
        return Who(user.name, user.role) if user else None

    def token(self, who:Who)->dict:
        "A bearer token, as OAuth 2 wants it."
        now = int(time.time())
        signed = jwt.encode(dict(sub=who.name, iat=now, exp=now+self.cfg.token_s), self.secret, algorithm='HS256')
        return dict(access_token=signed, token_type='bearer', expires_in=self.cfg.token_s, role=who.role)
