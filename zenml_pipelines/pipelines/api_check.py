"Is the server up, closed to strangers, and giving the champion's answers?"
from zenml import pipeline

from zenml_pipelines.steps.check_api import check_api


@pipeline(enable_cache=False)
def api_check(
    url:str='http://127.0.0.1:8080', # Base address of the server
):
    "Check a running server."
    check_api(url=url)
