"What goes over the wire."
import base64
import binascii
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from rakuten_mm.image import MAX_BYTES

MAX_TEXT = 20_000 # characters of a title or a description; models read far less
MAX_BODY = MAX_BYTES*4//3 + 500_000 # bytes of a request: one picture in base64, two texts


def decode_base64(
    v, # A JSON value
)->bytes|None:
    "Bytes of a base64 string; raises `ValueError`, which becomes a 422."
    if v is None: return None
    if not isinstance(v, str): raise ValueError('must be a base64 string')
    if len(v) > MAX_BYTES*4//3+4: raise ValueError(f'the picture is larger than {MAX_BYTES:,} bytes')
    try: return base64.b64decode(v, validate=True)
    except (binascii.Error, ValueError): raise ValueError('is not base64; send the bytes of the file, encoded') from None


Base64Image = Annotated[bytes|None, BeforeValidator(decode_base64), WithJsonSchema(
    {'anyOf': [{'type': 'string', 'contentEncoding': 'base64', 'contentMediaType': 'image/*'}, {'type': 'null'}]})]


class PredictRequest(BaseModel):
    "A listing: a title, a description, a picture, or any of them."
    model_config = ConfigDict(extra='forbid', allow_inf_nan=False, json_schema_extra={'examples': [
        {'designation': 'Robot de piscine électrique sans fil', 'description': 'Nettoie fond et parois.', 'top_k': 3}]})
    designation:str = Field('', max_length=MAX_TEXT, description='Title')
    description:str|None = Field(None, max_length=MAX_TEXT, description='Description, if there is one')
    image:Base64Image = Field(None, description='JPEG, PNG, WEBP, GIF or BMP file in base64')
    top_k:int = Field(3, ge=1, le=100, strict=True, description='Number of categories to return')

    @model_validator(mode='after')
    def something_to_read(self):
        "An empty listing cannot be classified."
        if not self.designation.strip() and not (self.description or '').strip() and not self.image:
            raise ValueError('give a designation, a description or an image')
        return self


class Category(BaseModel):
    "A category and how likely it is."
    prdtypecode:int
    label:str = Field(description='Display name')
    probability:float = Field(ge=0, le=1.0001)


class PredictResponse(Category):
    "The most likely category, and the runners-up."
    prediction_id:str = Field(description='Names this answer, for feedback')
    top_k:list[Category] = Field(description='Best first')
    modalities:list[Literal['text', 'image']] = Field(description='Parts of the listing that were used')
    lane:Literal['auto', 'review', 'reject'] = Field(description='File it, have a person look, or ask the seller for a better title or photo')
    candidates:list[int]|None = Field(None, description='In the review lane: codes to choose from, best first')
    model_version:str = Field(description='Registered version that answered')


class FieldError(BaseModel):
    "What is wrong with one field."
    field:str
    message:str


class Error(BaseModel):
    "What went wrong, for a program and for a person."
    code:str
    message:str
    fields:list[FieldError] = []


class ErrorBody(BaseModel):
    "The body of every answer that is not 200."
    error:Error
