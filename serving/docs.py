"`/docs` and `/openapi.json`: complete, and without a network."
from importlib.resources import files

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.staticfiles import StaticFiles

from serving.schema import ErrorBody

REF = '#/components/schemas/{model}'
OPEN = ('/health', '/ready', '/token')
MEANING = {
    400: 'Not HTTP as it should be', 401: 'Wrong or missing credentials', 403: 'Another role is needed', 404: 'No such thing', 405: 'Another method is needed',
    408: 'The body did not arrive in time', 413: 'Larger than the limit', 415: 'Another content type is needed', 422: 'What was sent cannot be used',
    429: 'Too many requests; see Retry-After', 500: 'Our mistake; the header X-Request-ID finds it in the log', 503: 'No room; see Retry-After',
    504: 'No answer in time'}


def install(app:FastAPI):
    "Replace the pages of `app` that load scripts from another host, and document its errors and credentials."
    app.router.routes[:] = [r for r in app.router.routes if getattr(r, 'path', '') not in ('/docs', '/redoc', '/docs/oauth2-redirect')]
    app.mount('/static-docs', StaticFiles(directory=str(files('fastapi_offline')/'static')), name='static-docs')

    @app.get('/docs', include_in_schema=False)
    async def docs():
        return get_swagger_ui_html(openapi_url=app.openapi_url, title=app.title, swagger_js_url='/static-docs/swagger-ui-bundle.js',
                                   swagger_css_url='/static-docs/swagger-ui.css', swagger_favicon_url='/static-docs/favicon.png')

    plain = app.openapi
    app.openapi = lambda: app.openapi_schema or describe(plain())


def describe(
    schema:dict # OpenAPI description, changed in place
)->dict:
    "Say how to sign in, and which body every answer has that is no success."
    error = ErrorBody.model_json_schema(ref_template=REF)
    parts = schema['components']
    parts['schemas'] |= error.pop('$defs') | {'ErrorBody': error}
    for replaced in ('HTTPValidationError', 'ValidationError'): parts['schemas'].pop(replaced, None)
    parts['securitySchemes'] = {'basic': {'type': 'http', 'scheme': 'basic'},
                                'token': {'type': 'oauth2', 'flows': {'password': {'tokenUrl': '/token', 'scopes': {}}}}}
    body = {'content': {'application/json': {'schema': {'$ref': REF.format(model='ErrorBody')}}}}
    for path,operations in schema['paths'].items():
        for operation in operations.values():
            kept = {k: v for k,v in operation['responses'].items() if k.startswith('2') or path == '/ready'}
            operation['responses'] = {str(k): {'description': v, **body} for k,v in MEANING.items()} | kept
            if path not in OPEN: operation['security'] = [{'basic': []}, {'token': []}]
    return schema
