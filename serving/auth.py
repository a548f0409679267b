"""Users, their credentials and their roles.

HTTP Basic and OAuth 2 bearer tokens name a user of the database, or the one of the environment. Passwords of the
database are hashed with Argon2, which is slow on purpose, so a pair that was right is remembered for five minutes,
under a key that no other process knows.
"""
import asyncio
import base64
import binascii
import hmac
import math
import os
import re
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import jwt
from argon2 import PasswordHasher
from argon2.exceptions import Argon2Error, InvalidHashError
from cachetools import TTLCache
from limits import parse
from sqlalchemy.exc import SQLAlchemyError

from rakuten_mm.api import ROLES, role_allows
from serving.budgets import CHECKS, MIN_PASSWORD, NEIGHBOURS
from serving.config import ServeConfig
from serving.errors import Refused
from serving.store import Store, User

CHALLENGE = {'WWW-Authenticate': 'Basic realm="rakuten-mm", charset="UTF-8", Bearer'}
NAME = re.compile(r'[A-Za-z0-9_.@-]{1,64}')
LEEWAY_S = 30 # Between the clocks of two servers that share a secret
READ_S = 5 # Between two looks at the users of the database
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
    if name == os.environ.get('API_USERNAME'): raise ValueError(f'{name} is the user of API_USERNAME; choose another')
    if len(password) < MIN_PASSWORD: raise ValueError(f'a password has at least {MIN_PASSWORD} characters')
    if role not in ROLES: raise ValueError(f"there is no role {role!r}; choose {', '.join(ROLES)}")
    store.put_user(name, hasher.hash(password), role)


def verify_password(stored:str, password:bytes)->bool:
    "Compare a password with its hash."
    try: return hasher.verify(stored, password)
    except (Argon2Error, InvalidHashError): return False


class RateLimit:
    "So many hits in a window of time, by a clock that nobody sets back."
    def __init__(self,
        limit:str, # e.g. 30/minute
        times:int = 1, # So many times as much
    ):
        item = parse(limit)
        self.amount,self.window = times*item.amount, item.get_expiry()
        self.seen:TTLCache = TTLCache(100_000, self.window, time.monotonic)

    def hit(self, *who:str, message:str):
        "Count a hit; raises 429 if `who` has too many."
        hits = self.seen.setdefault(who, [time.monotonic(), 0])
        hits[1] += 1
        wait = max(1, math.ceil(hits[0]+self.window-time.monotonic()))
        if hits[1] > self.amount: raise Refused(429, message, headers={'Retry-After': str(wait)})

    def take_back(self, *who:str):
        "Do not count the last hit after all."
        if who in self.seen: self.seen[who][1] -= 1


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
        if user and len(password) < MIN_PASSWORD:
            raise MissingPassword(f'API_PASSWORD has fewer than {MIN_PASSWORD} characters; anybody could guess it')
        self.store,self.cfg,self.user,self.own = store,cfg,user,f'{user}:{password}'.encode()
        self.key,self.secret = secrets.token_bytes(32), cfg.secret or secrets.token_hex(32)
        self.nobody = hasher.hash(secrets.token_hex(16))  # checking a stranger's password against it takes as long
        self.rate,self.failed = RateLimit(cfg.rate), RateLimit(cfg.failed_logins)
        self.failed_together = RateLimit(cfg.failed_logins, NEIGHBOURS)
        self.right:dict[bytes, tuple[float, str, str|None]] = {} # Until when, and the hash and role of then
        self.asked:dict[bytes, asyncio.Future[bool]] = {}
        self.known:dict[str, User] = {}
        self.checks,self.read,self.reading = ThreadPoolExecutor(CHECKS, 'passwords'), -1e9, asyncio.Lock()
        if not store.problem:
            with suppress(SQLAlchemyError): self.learn(store.users())
        if not user and not self.known:
            raise MissingPassword(store.problem or 'set API_USERNAME and API_PASSWORD in the environment or in .env, '
                                  'or add a user with `rakuten-mm users add`; the API does not start without')

    @classmethod
    def from_environment(cls, store:Store, cfg:ServeConfig)->'Authenticator':
        "The user of the environment, and those of the database; raises `MissingPassword` if there are none."
        return cls(store, cfg, os.environ.get('API_USERNAME', ''), os.environ.get('API_PASSWORD', ''))

    def learn(self, users:dict[str, User]):
        "Know these users, but for one that bears the name of the environment's."
        self.known = {n: u for n,u in users.items() if n != self.user}

    async def read_users(self):
        "Read the users of the database; while it cannot be read, those known last stay."
        async with self.reading:
            if time.monotonic()-self.read < 1: return
            with suppress(SQLAlchemyError):
                self.learn(await asyncio.get_running_loop().run_in_executor(self.store.pool, self.store.users))
            self.read = time.monotonic()

    async def keep_reading(self):
        "Read the users again every few seconds, so that no request waits for the database."
        while True: await asyncio.sleep(READ_S); await self.read_users()

    async def user_called(self, name:str)->User|None:
        "A user of the database; for a name that is not known it is asked once more."
        if name not in self.known and name != self.user and not self.store.problem: await self.read_users()
        return self.known.get(name)

    def count_guess(self, name:str, client:str):
        "Count a guess before it is checked; raises 429 after too many at this name, or from this address."
        self.failed.hit(client, name, message='too many wrong credentials')
        self.failed_together.hit(client, message='too many wrong credentials')

    async def identify(self, header:str, client:str)->Principal:
        "The user that an `Authorization` header names; raises 401, or 429 after too many tries."
        if not header: raise Refused(401, 'no credentials', headers=CHALLENGE)
        scheme,_,given = header.partition(' ')
        match scheme.lower():
            case 'basic': who = await self.basic(given.strip(), client)
            case 'bearer': who = await self.bearer(given.strip(), client)
            case _: self.count_guess('', client); who = None
        if who is None: raise Refused(401, 'wrong credentials', headers=CHALLENGE)
        self.rate.hit(who.name, message=f'more than {self.cfg.rate} requests')
        return who

    async def basic(self, given:str, client:str)->Principal|None:
        "The user of an HTTP Basic pair."
        try: pair = base64.b64decode(given, validate=True)
        except (binascii.Error, ValueError): self.count_guess('', client); return None
        return await self.check(pair, client)

    async def check(self, pair:bytes, client:str)->Principal|None:
        "The user of `name:password`; raises 429 after too many tries."
        given,_,password = pair.partition(b':')
        name = given.decode('utf-8', 'replace')
        seen,known = hmac.digest(self.key, pair, 'sha256'), await self.user_called(name)
        stored,role = (known.password_hash, known.role) if known else (self.nobody, None)
        found = self.right.get(seen)
        remembered = found and found[0] > time.monotonic() and found[1:] == (stored, role)
        if remembered: return Principal(name, role or 'admin')
        if first := seen not in self.asked: self.count_guess(name, client)
        own = self.user and hmac.compare_digest(pair, self.own)
        if not (own or (await self.verified(seen, stored, password) and known)): return None
        if first: self.failed.take_back(client, name); self.failed_together.take_back(client)
        if len(self.right) > 1000: self.right.clear()
        self.right[seen] = time.monotonic()+300, stored, role
        return Principal(name, role or 'admin')

    async def verified(self, seen:bytes, stored:str, password:bytes)->bool:
        "Verify a password; requests that ask the same at one time wait for one answer."
        if len(password) > 1024: return False
        if seen not in self.asked:
            loop = asyncio.get_running_loop()
            self.asked[seen] = loop.run_in_executor(self.checks, verify_password, stored, password)
            self.asked[seen].add_done_callback(lambda _: self.asked.pop(seen, None))
        return await asyncio.shield(self.asked[seen])

    def mark(self, name:str)->str|None:
        "What a token of this user must carry: it changes with password, role and record. None: there is no such user."
        user = self.known.get(name)
        if user: record = f'{user.password_hash} {user.role} {user.created_at:%Y-%m-%dT%H:%M:%S.%f}'.encode()
        elif self.user and name == self.user: record = self.own
        else: return None
        return hmac.new(self.secret.encode(), record, 'sha256').hexdigest()[:32]

    async def bearer(self, token:str, client:str)->Principal|None:
        "The user of a token, if it still is one; a token that has expired is no guess."
        try:
            claims = jwt.decode(token, self.secret, algorithms=['HS256'], leeway=LEEWAY_S,
                                options={'require': ['exp', 'sub', 'mark']})
            if claims['exp'] < time.time(): return None  # the leeway is for tokens that another clock dated
        except jwt.ExpiredSignatureError: return None
        except jwt.InvalidTokenError: self.count_guess('', client); return None
        name = claims['sub']
        user = await self.user_called(name)
        if not hmac.compare_digest(str(claims['mark']), self.mark(name) or ''): return None
        return Principal(name, user.role if user else 'admin')

    def token(self, who:Principal)->dict[str, Any]:
        "A bearer token, as OAuth 2 wants it."
        now = int(time.time())
        claims = dict(sub=who.name, iat=now, exp=now+self.cfg.token_s, mark=self.mark(who.name))
        signed = jwt.encode(claims, self.secret, algorithm='HS256')
        return dict(access_token=signed, token_type='bearer', expires_in=self.cfg.token_s, role=who.role)
