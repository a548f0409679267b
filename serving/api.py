"LitServe's five verbs around `Predictor`."
import uuid

import litserve as ls
import torch
from fastapi import Depends

from rakuten_mm.config import n_threads
from rakuten_mm.image import InvalidImage
from rakuten_mm.predictor import Prediction, Predictor, Prepared
from serving.auth import BasicAuth
from serving.errors import unprocessable
from serving.schema import PredictRequest, PredictResponse


class ProductAPI(ls.LitAPI):
    "Files a listing under a category."
    def __init__(self,
        bundle:str, # Sealed bundle
        version:str, # What answers call it
        auth:BasicAuth,
        threads:int = 0, # For PyTorch, in each worker; 0 takes every core
    ):
        super().__init__()
        self.bundle,self.version,self.auth,self.threads = bundle,version,auth,threads

    @property
    def authorize(self):
        "Dependency that guards the endpoint."
        async def check(_=Depends(self.auth)): pass
        return check

    def setup(self, device):
        "Load the bundle, in the worker."
        torch.set_num_threads(n_threads(self.threads))
        self.predictor = Predictor.load(self.bundle)
        self.predictor.predict([Prepared('warm up')] if 'text' in self.predictor.modalities else [])

    def decode_request(self, request:PredictRequest)->tuple[Prepared, int]:
        "A prepared listing; 422 if its picture is bad or nothing is left to read."
        try: return self.predictor.prepare(request.designation, request.description or '', request.image), request.top_k
        except InvalidImage as e: raise unprocessable('invalid_image', 'image', str(e)) from None
        except ValueError as e: raise unprocessable('nothing_to_classify', 'designation', str(e)) from None

    def predict(self, x:tuple[Prepared, int])->Prediction:
        "Ranked categories."
        return self.predictor.predict([x[0]], x[1])[0]

    def encode_response(self, output:Prediction)->PredictResponse:
        "The answer, named."
        return PredictResponse(prediction_id=str(uuid.uuid4()), model_version=self.version, **vars(output))
