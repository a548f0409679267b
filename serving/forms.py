"What comes and goes in another form than JSON: listings and logins from HTML forms, pictures for the page."
import io
from pathlib import Path

from fastapi import Request
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from rakuten_mm.data.image import decode_image
from serving.errors import Refused, of_validation
from serving.schema import MAX_TEXT, PredictRequest


async def listing_of_form(request:Request)->PredictRequest:
    "A listing from `multipart/form-data`; raises 422 for fields that are unknown, there twice, or of the wrong kind."
    if not request.headers.get('content-type', '').lower().startswith('multipart/form-data'): raise Refused(415, 'send multipart/form-data')
    values = {}
    async with request.form(max_files=4, max_fields=16, max_part_size=200_000) as form:
        for name,v in form.multi_items():
            if name not in ('designation', 'description', 'image', 'top_k'): raise Refused(422, 'is no field of a listing', field=name[:64])
            if name in values: raise Refused(422, 'is there twice', field=name)
            if isinstance(v, UploadFile) != (name == 'image'): raise Refused(422, 'must be a file' if name == 'image' else 'must be text', field=name)
            values[name] = await v.read() if name == 'image' else v
    image,top_k = values.pop('image', None), values.get('top_k', '3')
    if not (top_k.isascii() and top_k.isdigit() and len(top_k) < 5): raise Refused(422, 'must be a whole number', field='top_k')
    try: return PredictRequest(**values | dict(top_k=int(top_k), image=image))
    except ValidationError as e: raise Refused(422, (error := of_validation(e)).message, field=error.fields[0].field) from None


async def login_of_form(request:Request)->bytes:
    "`user:password` from the form that OAuth 2 wants; raises 415 or 422."
    if not request.headers.get('content-type', '').lower().startswith('application/x-www-form-urlencoded'):
        raise Refused(415, 'send application/x-www-form-urlencoded')
    form = await request.form(max_fields=8)
    values = {k: v for k,v in form.multi_items() if isinstance(v, str)}
    if values.get('grant_type', 'password') != 'password': raise Refused(422, 'must be password', field='grant_type')
    for k in ('username', 'password'):
        if not values.get(k): raise Refused(422, 'is missing', field=k)
    return f"{values['username']}:{values['password']}".encode('utf-8', 'surrogatepass')


FORM = {'requestBody': {'required': True, 'content': {'multipart/form-data': {'schema': {'type': 'object', 'properties': {
    'designation': {'type': 'string', 'maxLength': MAX_TEXT}, 'description': {'type': 'string', 'maxLength': MAX_TEXT},
    'image': {'type': 'string', 'format': 'binary', 'description': 'JPEG, PNG, WEBP, GIF or BMP file'},
    'top_k': {'type': 'integer', 'minimum': 1, 'maximum': 100, 'default': 3}}, 'additionalProperties': False}}}}}
LOGIN = {'requestBody': {'required': True, 'content': {'application/x-www-form-urlencoded': {'schema': {
    'type': 'object', 'required': ['username', 'password'], 'properties': {
        'grant_type': {'type': 'string', 'const': 'password'}, 'username': {'type': 'string', 'minLength': 1},
        'password': {'type': 'string', 'format': 'password', 'minLength': 1}}}}}}}


def small_jpeg(path:Path, size:int=640)->bytes:
    "A picture for the page, encoded here: what was uploaded is not sent back as it came."
    im = decode_image(path.read_bytes(), size)
    im.thumbnail((size, size))
    im.save(buf := io.BytesIO(), 'JPEG', quality=85)
    return buf.getvalue()
