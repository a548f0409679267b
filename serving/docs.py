"`/docs` and `/openapi.json`: complete, and without a network."
from importlib.resources import files

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.staticfiles import StaticFiles

from serving.schema import ErrorBody

REF = '#/components/schemas/{model}'


def install(app:FastAPI):
    "Replace the pages of `app` that load scripts from another host, and document its error body."
    app.router.routes[:] = [r for r in app.router.routes if getattr(r, 'path', '') not in ('/docs', '/redoc', '/docs/oauth2-redirect')]
    app.mount('/static-docs', StaticFiles(directory=str(files('fastapi_offline')/'static')), name='static-docs')

    @app.get('/docs', include_in_schema=False)
    async def docs():
        return get_swagger_ui_html(openapi_url=app.openapi_url, title=app.title, swagger_js_url='/static-docs/swagger-ui-bundle.js',
                                   swagger_css_url='/static-docs/swagger-ui.css', swagger_favicon_url='/static-docs/favicon.png')

    plain = app.openapi
    app.openapi = lambda: describe_errors(plain())


def describe_errors(
    schema:dict # OpenAPI description, changed in place
)->dict:
    "Name `/predict`, and the error body under every answer of it that may carry one."
    error = ErrorBody.model_json_schema(ref_template=REF)
    schemas = schema['components']['schemas']
    schemas |= error.pop('$defs') | {'ErrorBody': error}
    for replaced in ('HTTPValidationError', 'ValidationError'): schemas.pop(replaced, None)
    body = {'content': {'application/json': {'schema': {'$ref': REF.format(model='ErrorBody')}}}}
    post = schema['paths']['/predict']['post']
    post |= dict(summary='File a listing under a category', tags=['prediction'])
    what = {'401': 'Wrong or missing credentials', '413': 'Larger than the limit', '422': 'A listing that cannot be classified'}
    post['responses'] |= {k: {'description': v, **body} for k,v in what.items()}
    return schema
