"HTTP Basic, for one pair of credentials."
import base64
import binascii
import hmac
import os

from fastapi import HTTPException
from fastapi.security import HTTPBasic
from starlette.requests import Request


class MissingPassword(RuntimeError):
    "No API_PASSWORD is set."


class BasicAuth(HTTPBasic):
    """Lets one user in.

    FastAPI's own reader takes ASCII only, and `compare_digest` raises on other text; both are done on bytes here,
    so that a password may hold any character and a wrong one never makes a 500.
    """
    def __init__(self,
        username:str,
        password:str,
    ):
        super().__init__(realm='rakuten-mm', auto_error=False)
        self.expected = f'{username}:{password}'.encode()

    @classmethod
    def from_environment(cls)->'BasicAuth':
        "Credentials from API_USERNAME and API_PASSWORD; raises `MissingPassword` unless both are set."
        user,password = os.environ.get('API_USERNAME', ''), os.environ.get('API_PASSWORD', '')
        if not user or not password:
            raise MissingPassword('set API_USERNAME and API_PASSWORD in the environment or in .env; the API does not start without them')
        if ':' in user: raise MissingPassword('API_USERNAME must not contain a colon: HTTP Basic could not tell it from the password')
        return cls(user, password)

    async def __call__(self, request:Request):
        "Raises 401 unless the request carries the expected credentials."
        scheme,_,given = request.headers.get('Authorization', '').partition(' ')
        try: got = base64.b64decode(given.strip(), validate=True)
        except (binascii.Error, ValueError): got = b''
        if not (hmac.compare_digest(got, self.expected) and scheme.lower() == 'basic'):
            raise HTTPException(401, 'wrong or missing credentials', headers={'WWW-Authenticate': 'Basic realm="rakuten-mm", charset="UTF-8"'})
