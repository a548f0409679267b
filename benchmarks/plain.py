"""A plain prediction API, FastAPI and PyTorch in one file: what the server is compared with."""
import base64
import json
import os
import secrets
from pathlib import Path
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException
from fastapi.security import HTTPBasic, HTTPBasicCredentials
from pydantic import BaseModel

from rakuten_mm.models.bundle import load_bundle
from rakuten_mm.models.predictor import Predictor
from rakuten_mm.stats.triage import Triage

bundle = Path(os.environ['BUNDLE'])
net,config = load_bundle(bundle)
triage = bundle/'triage.json'
model = Predictor(net, config, Triage.from_dict(json.loads(triage.read_text())) if triage.exists() else None)
app = FastAPI()


class Product(BaseModel):
    designation:str
    description:str = ''
    image:str|None = None


class Answer(BaseModel):
    prdtypecode:int
    label:str
    probability:float
    top_k:list[dict]
    lane:str


def user(given:Annotated[HTTPBasicCredentials, Depends(HTTPBasic())]):
    for a,b in ((given.username, 'API_USERNAME'), (given.password, 'API_PASSWORD')):
        if not secrets.compare_digest(a.encode(), os.environ[b].encode()): raise HTTPException(401, 'wrong credentials')


@app.post('/predict', dependencies=[Depends(user)])
def predict(p:Product)->Answer:
    try: listing = model.prepare(p.designation, p.description, base64.b64decode(p.image) if p.image else None)
    except ValueError as e: raise HTTPException(422, str(e)) from e
    return Answer(**vars(model.predict([listing])[0]))


@app.get('/ready')
def ready(): return 'ok'
