"Every answer that is not 200 has the same body, and never echoes what was sent."
from fastapi import FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from serving.schema import Error, ErrorBody, FieldError

CODES = {400: 'bad_request', 401: 'unauthorized', 404: 'not_found', 405: 'method_not_allowed', 413: 'too_large', 422: 'invalid_request',
         500: 'internal_error', 503: 'unavailable', 504: 'timeout'}


def unprocessable(
    code:str, # e.g. `invalid_image`
    field:str, # Field of the request
    message:str,
)->HTTPException:
    "A 422 that a worker can raise."
    return HTTPException(422, dict(code=code, message=message, fields=[dict(field=field, message=message)]))


def install(app:FastAPI):
    "Give `app` the one error body."
    @app.exception_handler(RequestValidationError)
    async def invalid(request, exc:RequestValidationError):
        fields = [FieldError(field='.'.join(p for p in e['loc'][1:] if isinstance(p, str)) or 'body',
                             message=e['msg'].removeprefix('Value error, ')) for e in exc.errors()]
        message = '; '.join(f'{f.field}: {f.message}' for f in fields[:5])
        return JSONResponse(ErrorBody(error=Error(code='invalid_request', message=message, fields=fields)).model_dump(), 422)

    @app.exception_handler(StarletteHTTPException)
    async def http(request, exc:StarletteHTTPException):
        detail = exc.detail if isinstance(exc.detail, dict) else dict(code=CODES.get(exc.status_code, 'error'), message=str(exc.detail))
        return JSONResponse(ErrorBody(error=Error(**detail)).model_dump(), exc.status_code, exc.headers)
