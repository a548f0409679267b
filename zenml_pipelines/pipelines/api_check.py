"A check that the server is up, closed to strangers, and gives the champion's answers."
from zenml import pipeline

from zenml_pipelines.steps.check_api import check_api


@pipeline(enable_cache=False)
def api_check(
    url:str='http://127.0.0.1:8080', # Base address of the server
    max_p95_ms:float=1000., # Longest that a client may wait, 95th percentile, in milliseconds; 0: any time
    wait_s:float=30., # How long the server may take to follow the registry
    open_pages:str='', # As API_OPEN_PAGES of the server; empty: as here
):
    "Check a running server."
    check_api(url=url, max_p95_ms=max_p95_ms, wait_s=wait_s, open_pages=open_pages)
