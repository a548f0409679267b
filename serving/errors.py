"Every answer that is not 200 has the same body, and never echoes what was sent."
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from serving.schema import Error, ErrorBody, FieldError

CODES = {400: 'bad_request', 401: 'unauthorized', 403: 'forbidden', 404: 'not_found', 405: 'method_not_allowed', 408: 'body_timeout', 413: 'too_large',
         415: 'unsupported_media_type', 422: 'invalid_request', 429: 'too_many_requests', 500: 'internal_error', 503: 'overloaded', 504: 'timeout'}


class Refused(HTTPException):
    "An answer that is not 200."
    def __init__(self,
        status:int,
        message:str,
        code:str = '', # e.g. `invalid_image`; the status's own if empty
        field:str = '', # Field of the request that is wrong
        headers:dict|None = None,
    ):
        fields = [FieldError(field=field, message=message)] if field else []
        self.error = Error(code=code or CODES.get(status, 'error'), message=message, fields=fields)
        super().__init__(status, message, headers)


def invalid(
    errors:list[dict], # Of pydantic, without inputs
    skip:int = 0, # Leading parts of a location that are no field, e.g. `body`
)->Error:
    "What is wrong with a request."
    fields = [FieldError(field='.'.join(p for p in e['loc'][skip:] if isinstance(p, str)) or 'body',
                         message=e['msg'].removeprefix('Value error, ')) for e in errors]
    return Error(code='invalid_request', message='; '.join(f'{f.field}: {f.message}' for f in fields[:5]), fields=fields)


def of_validation(e:ValidationError)->Error:
    "What is wrong with one listing of several."
    return invalid(e.errors(include_url=False, include_context=False, include_input=False))


def respond(status:int, error:Error, headers:dict|None=None)->JSONResponse:
    "The one error body."
    return JSONResponse(ErrorBody(error=error).model_dump(), status, headers)


def install(app:FastAPI):
    "Give `app` the one error body."
    @app.exception_handler(RequestValidationError)
    async def validation(request, exc:RequestValidationError): return respond(422, invalid(exc.errors(), 1))

    @app.exception_handler(HTTPException)
    async def http(request, exc:HTTPException):
        error = exc.error if isinstance(exc, Refused) else Error(code=CODES.get(exc.status_code, 'error'), message=str(exc.detail))
        return respond(exc.status_code, error, exc.headers)
