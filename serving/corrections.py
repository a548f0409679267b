"What reviewers said, for those who learn from it."
from rakuten_mm.data.feedback import Correction
from serving.config import ServeConfig, kept_images
from serving.store import Store


def read_corrections(
    url:str='', # Of the database; default: the server's, from the environment
)->list[Correction]: # Oldest answer first
    "All answers on which reviewers agree."
    store = Store(url or ServeConfig.from_environment().url, kept_images())
    try:
        return [Correction(r.text_sha256, r.image_sha256, r.created_at, said_at, r.prdtypecode, code,
                           r.designation if r.has_inputs else None, (r.description or '') if r.has_inputs else None,
                           store.image_path(r.image_sha256) if r.has_inputs and r.image_sha256 else None)
                for r,code,said_at in store.verdicts()]
    finally: store.close()
