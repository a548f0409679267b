"Errors of the API: every answer that is not 200 has the same body, and never echoes what was sent."
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from rakuten_mm.api import STATUSES
from serving.budgets import MAX_ERRORS
from serving.schema import Error, ErrorBody, FieldError


def code_of(status:int)->str: return STATUSES[status].code if status in STATUSES else 'error'


class Refused(HTTPException):
    "An answer that is not 200."
    def __init__(self,
        status:int,
        message:str,
        code:str = '', # e.g. `invalid_image`; the status's own if empty
        field:str = '', # Field of the request that is wrong
        headers:dict[str, str]|None = None,
    ):
        fields = [FieldError(field=field, message=message)] if field else []
        self.error = Error(code=code or code_of(status), message=message, fields=fields)
        super().__init__(status, message, headers)


def invalid(
    errors:Sequence[Any], # Of pydantic, without inputs
    skip:int = 0, # Leading parts of a location that are no field, e.g. `body`
)->Error:
    "The error for a request that pydantic refused."
    fields = [FieldError(field='.'.join(p for p in e['loc'][skip:] if isinstance(p, str)) or 'body',
                         message=e['msg'].removeprefix('Value error, ')) for e in errors[:MAX_ERRORS]]
    message = '; '.join(f'{f.field}: {f.message}' for f in fields[:5])
    return Error(code='invalid_request', message=message, fields=fields)


def of_validation(e:ValidationError)->Error:
    "The error for one listing of several."
    return invalid(e.errors(include_url=False, include_context=False, include_input=False))


def respond(status:int, error:Error, headers:Mapping[str, str]|None=None)->JSONResponse:
    "The one error body."
    return JSONResponse(ErrorBody(error=error).model_dump(), status, headers)


def install(app:FastAPI):
    "Give `app` the one error body."
    @app.exception_handler(RequestValidationError)
    async def validation(request, exc:RequestValidationError): return respond(422, invalid(exc.errors(), 1))

    @app.exception_handler(HTTPException)
    async def http(request, exc:HTTPException):
        plain = Error(code=code_of(exc.status_code), message=str(exc.detail))
        return respond(exc.status_code, exc.error if isinstance(exc, Refused) else plain, exc.headers)
