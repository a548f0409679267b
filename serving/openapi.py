"The description of the API at `/docs` and `/openapi.json`: complete, and without a network."
from importlib.resources import files

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.staticfiles import StaticFiles

from rakuten_mm.api import STATUSES, page_of
from serving.schema import ErrorBody

REF = '#/components/schemas/{model}'
REPLACED = ('/docs', '/redoc', '/docs/oauth2-redirect')


def install(app:FastAPI):
    "Replace the pages of `app` that load scripts from another host, and document its errors and credentials."
    app.router.routes[:] = [r for r in app.router.routes if getattr(r, 'path', '') not in REPLACED]
    app.mount('/static-docs', StaticFiles(directory=str(files('fastapi_offline')/'static')), name='static-docs')

    @app.get('/docs', include_in_schema=False)
    async def docs():
        return get_swagger_ui_html(openapi_url=app.openapi_url or '/openapi.json', title=app.title,
                                   swagger_js_url='/static-docs/swagger-ui-bundle.js',
                                   swagger_css_url='/static-docs/swagger-ui.css',
                                   swagger_favicon_url='/static-docs/favicon.png')

    plain = app.openapi
    app.openapi = lambda: app.openapi_schema or describe(plain())  # type: ignore[method-assign]


def describe(
    schema:dict # OpenAPI description, changed in place
)->dict:
    "Add how to sign in, and the body of every answer that is no success."
    error = ErrorBody.model_json_schema(ref_template=REF)
    parts = schema['components']
    parts['schemas'] |= error.pop('$defs') | {'ErrorBody': error}
    for replaced in ('HTTPValidationError', 'ValidationError'): parts['schemas'].pop(replaced, None)
    oauth = {'type': 'oauth2', 'flows': {'password': {'tokenUrl': '/token', 'scopes': {}}}}
    parts['securitySchemes'] = {'basic': {'type': 'http', 'scheme': 'basic'}, 'token': oauth}
    body = {'content': {'application/json': {'schema': {'$ref': REF.format(model='ErrorBody')}}}}
    errors = {str(k): {'description': s.meaning, **body} for k,s in STATUSES.items()}
    for path,operations in schema['paths'].items():
        page = page_of(path)
        for operation in operations.values():
            kept = {k: v for k,v in operation['responses'].items() if k.startswith('2') or path == '/ready'}
            operation['responses'] = errors | kept
            if not page or page.role: operation['security'] = [{'basic': []}, {'token': []}]
    return schema
