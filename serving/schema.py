"Requests and responses of the API, as they go over the wire."
import base64
import binascii
import json
import re
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from rakuten_mm.api import MAX_BATCH
from rakuten_mm.data.image import MAX_BYTES
from serving.budgets import MAX_ESCAPES, MAX_STRINGS, MAX_STRUCTURE, MAX_TEXT

STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.S) # One without an end too: it is looked for once
UNREADABLE = re.compile('[\0\ud800-\udfff]') # What databases refuse, and nobody reads


def structure_of(body:bytes)->tuple[int, int]:
    "Count the strings of a JSON body, and the bytes outside of them, but no further than the limits."
    if b'\\' not in body:
        parts = body.split(b'"', 2*MAX_STRINGS+2)
        return len(parts)//2, sum(map(len, parts[::2]))
    strings = end = outside = 0
    for m in STRING.finditer(body):
        strings += 1; outside += m.start()-end; end = m.end()
        if strings > MAX_STRINGS or outside > MAX_STRUCTURE: break
    return strings, outside+len(body)-end


def parse_json(
    body:bytes
)->Any:
    "A JSON value; raises `ValueError` before work is done for more parts than any request of ours has."
    if body.count(b'\\') > MAX_ESCAPES: raise ValueError('JSON with more escapes than any request has')
    strings,outside = structure_of(body)
    if strings > MAX_STRINGS: raise ValueError(f'JSON with more than {MAX_STRINGS:,} strings')
    if outside > MAX_STRUCTURE: raise ValueError('JSON with more structure than any request has')
    return json.loads(body)


def without_unreadable(v):
    "A text without zero bytes, halves of characters, and returns at its end; other values as they are."
    return UNREADABLE.sub('', v).rstrip('\r') if isinstance(v, str) else v


def decode_base64(
    v, # A JSON value
)->bytes|None:
    "Bytes of a base64 string; raises `ValueError`, which becomes a 422."
    if v is None or isinstance(v, bytes): return v or None  # bytes come from a form
    if not isinstance(v, str): raise ValueError('must be a base64 string')
    if v.startswith('data:'): v = v.partition(',')[2]  # as browsers write files
    v = ''.join(v.split())  # mail and some tools break lines
    if len(v) > MAX_BYTES*4//3+4: raise ValueError(f'the image is larger than {MAX_BYTES:,} bytes')
    try: return base64.b64decode(v, validate=True) or None
    except (binascii.Error, ValueError):
        raise ValueError('is not base64; send the bytes of the file, encoded') from None


def strict(*examples:dict)->ConfigDict:
    "Refuse unknown fields and numbers that are none, and document `examples`."
    more:dict[str, Any] = {'examples': [*examples]} if examples else {}
    return ConfigDict(extra='forbid', allow_inf_nan=False, json_schema_extra=more)


BASE64 = {'type': 'string', 'contentEncoding': 'base64', 'contentMediaType': 'image/*'}
ENCODED = WithJsonSchema({'anyOf': [BASE64, {'type': 'null'}]})
Base64Image = Annotated[bytes|None, BeforeValidator(decode_base64), ENCODED]
TITLE = WithJsonSchema({'anyOf': [{'type': 'string', 'maxLength': MAX_TEXT}, {'type': 'null'}]})
Readable = BeforeValidator(without_unreadable)
Code = Annotated[int, Field(ge=0, lt=2**53, strict=True)] # Up to what JavaScript's numbers keep exactly, as ingestion
Reason = Literal['unreadable', 'contradictory', 'several', 'no_category', 'not_a_product'] # `rakuten_mm.api.UNUSABLE`
ROBOT = {'designation': 'Robot de piscine électrique sans fil'}


class Listing(BaseModel):
    "A title, a description, an image, or any of them."
    model_config = strict()
    designation:Annotated[str, Readable, BeforeValidator(lambda v: '' if v is None else v), TITLE] = Field(
        '', max_length=MAX_TEXT, description='Title')
    description:Annotated[str|None, Readable] = Field(
        None, max_length=MAX_TEXT, description='Description, if there is one')
    image:Base64Image = Field(None, description='JPEG, PNG, WEBP, GIF or BMP file in base64')

    @model_validator(mode='after')
    def something_to_read(self):
        "Refuse an empty listing: it cannot be classified."
        if not self.designation.strip() and not (self.description or '').strip() and not self.image:
            raise ValueError('give a designation, a description or an image')
        return self


class PredictRequest(Listing):
    "A listing to file under a category."
    model_config = strict(ROBOT | {'description': 'Nettoie fond et parois.', 'top_k': 3})
    top_k:int = Field(3, ge=1, le=100, strict=True, description='Number of categories to return')


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
    lane:Literal['auto', 'review', 'reject'] = Field(
        description='File it, have a person look, or ask the seller for a better title or photo')
    candidates:list[int]|None = Field(None, description='In the review lane: codes to choose from, best first')
    model_version:str = Field(description='Registered version that answered')


class FieldError(BaseModel):
    "An error in one field."
    field:str
    message:str


class Error(BaseModel):
    "An error, for a program and for a person."
    code:str
    message:str
    fields:list[FieldError] = []


class ErrorBody(BaseModel):
    "The body of every answer that is not 200."
    error:Error


PRODUCT = {'anyOf': [{'$ref': '#/components/schemas/PredictRequest'}, {}]}
PRODUCTS = {'type': 'array', 'minItems': 1, 'maxItems': MAX_BATCH, 'items': PRODUCT}


class BatchRequest(BaseModel):
    "Several listings. One that is wrong does not spoil the others."
    model_config = strict(
        {'products': [{'designation': 'Robot de piscine'}, {'designation': 'Lot de 3 romans policiers'}]})
    products:Annotated[list, WithJsonSchema(PRODUCTS)] = Field(min_length=1)


class BatchItem(BaseModel):
    "The answer to one listing of a batch, or why there is none."
    status:int = Field(description='Status that `/predict` would have had: 200, 422, 500, 503 or 504')
    prediction:PredictResponse|None = None
    error:Error|None = None


class BatchResponse(BaseModel):
    "One item for each listing, in the order of the request."
    results:list[BatchItem]


class ExplainRequest(Listing):
    "A listing, and the category to explain."
    model_config = strict(ROBOT | {'prdtypecode': 2583})
    prdtypecode:Code|None = Field(None, description='Category to explain; the predicted one if left out')


class Word(BaseModel):
    "A word, or a stretch of a long text, and its share in the category's score."
    field:Literal['title', 'description']
    word:str
    start:int = Field(description='First character in the cleaned field')
    end:int = Field(description='One beyond the last')
    weight:float = Field(description='Log-odds that the category loses without it')


class ExplainResponse(Category):
    "The words and the parts of the image that an answer rests on."
    title:str = Field(description='Cleaned title, that words refer to')
    description:str = Field(description='Cleaned description')
    words:list[Word]
    regions:list[list[float]]|None = Field(
        description='Log-odds that the category loses when a cell of the image is painted over, top row first')
    modalities:dict[str, float] = Field(description='Share of each part that was read')
    model_version:str


class FeedbackRequest(BaseModel):
    "The right category of a listing that was predicted, or why it has none."
    model_config = strict({'prediction_id': '2f1c6c1e-6f0b-4a3e-9a59-0c7f7c1f7f10', 'prdtypecode': 2583})
    prediction_id:str = Field(min_length=36, max_length=36, description='From the answer')
    prdtypecode:Code|None = Field(None, description='The right category, which may be the predicted one')
    unusable:Reason|None = Field(
        None, description='Instead of a category: why the listing cannot be labelled. It is no training data then.')
    reviewer:Annotated[str|None, Readable] = Field(
        None, min_length=1, max_length=64,
        description='Reviewer who says so; the user that asks if left out. Only an admin may name another.')


    @model_validator(mode='after')
    def one_of_both(self):
        "Refuse a category with a reason for none, and neither."
        if (self.prdtypecode is None) == (self.unusable is None):
            raise ValueError('give a prdtypecode, or say why the listing is unusable')
        return self


class Correction(BaseModel):
    "A reviewer's opinion on a prediction."
    reviewer:str
    prdtypecode:int|None = Field(description='null if the listing is unusable')
    unusable:Reason|None = Field(description='Why it has no category')
    created_at:datetime


class FeedbackResponse(Correction):
    "The correction as it was stored, and the outcome of all corrections of this prediction."
    feedback_id:int
    prediction_id:str
    verdict:int|None = Field(
        description='Category that most reviewers chose; null while they disagree, or if most call it unusable')
    is_unusable:bool = Field(description='True if most reviewers call it unusable')
    conflict:bool = Field(description='True if reviewers disagree')


class ReviewItem(BaseModel):
    "A listing that waits for a person."
    prediction_id:str
    created_at:datetime
    designation:str
    description:str
    has_image:bool = Field(description='True if `/review/{prediction_id}/image` has its image')
    prdtypecode:int
    probability:float
    top_k:list[Category]
    candidates:list[int]|None
    model_version:str
    corrections:list[Correction] = Field(description='Corrections by others, when they disagree')


class Waiting(BaseModel):
    "A category, and how many listings wait that the model would file there."
    prdtypecode:int
    waiting:int


class ReviewResponse(BaseModel):
    "The listings that are most useful to correct, most useful first."
    items:list[ReviewItem]
    waiting:int = Field(description='Number of all that wait (in the category that was asked for), shown or not')
    categories:list[Waiting] = Field(description='All that wait, by the category of the answer, most first')


class CategoryName(BaseModel):
    "A category in words."
    prdtypecode:int
    fr:str
    en:str


class Version(BaseModel):
    "The model that answers."
    model_version:str
    data_version:str
    categories:int
    modalities:list[str]
    following:str|None = Field(description='Registry alias that is followed')
    problem:str|None = Field(description='Why a newer model is not served, or the registry cannot be asked')
    auto_share:float = Field(description='Share of its calibration listings that it would file automatically')
    auto_needs:int|None = Field(description='Where that is none: about so many more checked listings would prove some')


class Token(BaseModel):
    "A bearer token (OAuth 2)."
    access_token:str
    token_type:Literal['bearer'] = 'bearer'
    expires_in:int = Field(description='Seconds')
    role:Literal['predict', 'review', 'admin']
