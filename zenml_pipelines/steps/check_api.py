"Run api_check.ipynb."
from typing import Annotated

from zenml import step
from zenml.types import HTMLString

from zenml_pipelines.context import step_run


@step(experiment_tracker=True, enable_cache=False)
def check_api(
    url:str, # Base address of the server
    max_p95_ms:float, # Longest that a client may wait, 95th percentile; 0: any time
    wait_s:float, # How long the server may take to follow the registry
    open_pages:str, # As API_OPEN_PAGES of the server; empty: as here
)->tuple[Annotated[dict, 'checks'], Annotated[HTMLString, 'check_report']]:
    "Check a running server; raises `APICheckError` if anything is wrong, after the report is written."
    from rakuten_mm.monitoring.access_check import APICheckError
    run = step_run()
    result,page = run.notebook('api_check', url=url, max_p95_ms=max_p95_ms, wait_s=wait_s, open_pages=open_pages)
    if wrong := result['failures']:
        said = f"{url} failed {len(wrong)} of {result['checks']} checks (its page: {run.out_dir/'api_check.html'}):"
        raise APICheckError('\n- '.join([said, *wrong]))
    return result, page
