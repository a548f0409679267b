"HTML forms for listings and logins, and images for the page: what comes and goes in another form than JSON."
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import Request
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile

from rakuten_mm.data.image import decode_image
from serving.budgets import MAX_TEXT
from serving.errors import Refused, of_validation
from serving.schema import PredictRequest

FIELDS = {'designation', 'description', 'image', 'top_k'}


def expect_type(request:Request, wanted:str):
    "Raises 415 for another content type."
    if not request.headers.get('content-type', '').lower().startswith(wanted): raise Refused(415, f'send {wanted}')


@asynccontextmanager
async def read_form(request:Request, **limits:int)->AsyncIterator[FormData]:
    "The fields of a form; raises 422 for text in an encoding that there is not."
    try: form = await request.form(**limits)
    except (LookupError, UnicodeError): raise Refused(422, 'unknown charset; send UTF-8') from None
    try: yield form
    finally: await form.close()


async def listing_of_form(request:Request)->PredictRequest:
    "A listing from `multipart/form-data`; raises 422 for fields that are unknown, given twice, or of the wrong kind."
    expect_type(request, 'multipart/form-data')
    values:dict[str, Any] = {}
    async with read_form(request, max_files=4, max_fields=16, max_part_size=200_000) as form:
        for name,v in form.multi_items():
            file = isinstance(v, UploadFile)
            if name not in FIELDS: raise Refused(422, 'unknown field', field=name[:64])
            if name in values: raise Refused(422, 'given twice', field=name)
            if name == 'image' and v == '': continue  # a file field that was left empty
            if file != (name == 'image'): raise Refused(422, f"must be {'text' if file else 'a file'}", field=name)
            values[name] = await v.read() if isinstance(v, UploadFile) else v
    top_k = values.get('top_k', '3')
    if not (top_k.isascii() and top_k.isdigit() and len(top_k) < 5):
        raise Refused(422, 'must be a whole number', field='top_k')
    try: return PredictRequest(**values | dict(top_k=int(top_k)))
    except ValidationError as e:
        error = of_validation(e)
        raise Refused(422, error.message, field=error.fields[0].field) from None


async def login_of_form(request:Request)->bytes:
    "`user:password` from the form of OAuth 2; raises 415 or 422."
    expect_type(request, 'application/x-www-form-urlencoded')
    async with read_form(request, max_fields=8) as form: sent = form.multi_items()
    values = {k: v for k,v in sent if isinstance(v, str)}
    if values.get('grant_type', 'password') != 'password': raise Refused(422, 'must be password', field='grant_type')
    for k in ('username', 'password'):
        if not values.get(k): raise Refused(422, 'is missing', field=k)
    return f"{values['username']}:{values['password']}".encode('utf-8', 'surrogatepass')


def body(kind:str, **schema)->dict[str, Any]:
    "OpenAPI's description of a form."
    return {'requestBody': {'required': True, 'content': {kind: {'schema': {'type': 'object', **schema}}}}}


TEXT = {'type': 'string', 'maxLength': MAX_TEXT}
FORM = body('multipart/form-data', additionalProperties=False, properties={
    'designation': TEXT, 'description': TEXT,
    'image': {'type': 'string', 'format': 'binary', 'description': 'JPEG, PNG, WEBP, GIF or BMP file'},
    'top_k': {'type': 'integer', 'minimum': 1, 'maximum': 100, 'default': 3}})
LOGIN = body('application/x-www-form-urlencoded', required=['username', 'password'], properties={
    'grant_type': {'type': 'string', 'const': 'password'}, 'username': {'type': 'string', 'minLength': 1},
    'password': {'type': 'string', 'format': 'password', 'minLength': 1}})


def small_jpeg(path:Path, size:int=640)->bytes:
    "An image for the page, encoded here: what was uploaded is not sent back as it came."
    im = decode_image(path.read_bytes(), size)
    im.thumbnail((size, size))
    im.save(buf := io.BytesIO(), 'JPEG', quality=85)
    return buf.getvalue()
