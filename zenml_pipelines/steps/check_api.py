"Ask a running server what it must be able to answer."
from typing import Annotated

from zenml import step

from zenml_pipelines.context import step_run


@step(experiment_tracker=True, enable_cache=False)
def check_api(
    url:str, # Base address of the server
)->Annotated[dict, 'checks']:
    "Authentication cases and the champion's golden products; raises if any check fails."
    from rakuten_mm.api_check import check_api as check
    step_run()
    return check(url)
