"""Budgets: what a request may cost before anybody knows whether it is worth it. Each is kept before the work.

| what | budget | kept by | beyond it |
|---|---|---|---|
| connections | `MAX_CONNECTIONS`, or what descriptors allow | `connections` | the oldest idle one is closed |
| header, trailers | `MAX_HEADER` bytes, `MAX_FIELDS` fields, `HEADER_S` | `connections` | 431, or closed |
| idle connection | `IDLE_S` | uvicorn | closed |
| wrong credentials | API_FAILED_LOGINS a name and address, `NEIGHBOURS` times that an address | `auth` | 429 |
| passwords checked at one time | `CHECKS` | `auth` | they wait |
| body | `MAX_BODY` bytes for listings, `SMALL_BODY` for others | `middleware` | 413 |
| bodies held at one time | API_MAX_BYTES | `admission` | 503 |
| listings at one time | API_MAX_IN_FLIGHT | `admission`, asked by `connections` | 503, before anything else |
| listings of batches at one time | half of it, or one batch | `admission` | 503 |
| JSON | `MAX_STRINGS`, `MAX_STRUCTURE`, `MAX_ESCAPES` | `schema` | 422 |
| text | `MAX_TEXT` characters a field | `schema` | 422 |
| picture | bytes and pixels by kind, from its header | `rakuten_mm.data.image` | 422 |
| time of a request | API_TIMEOUT_S | `middleware` | 408 or 504 |
| batch | API_BATCH_SIZE listings, about `BATCH_S` | `worker` | the rest waits |
| batch request | the n-th listing is due n times `BEHIND_S` later | `worker` | others overtake it |
| explanation | two at a time, until its deadline | `admission`, `worker` | 503, 504 |
| silence of the worker | API_HANG_S | `worker_client` | another worker |
| no worker | API_GIVE_UP_S | `worker_client` | the server ends |
| statement of the database | `DATABASE_S` | `store` | 503, or a record is lost and counted |
"""
from rakuten_mm.data.image import MAX_BYTES

MAX_CONNECTIONS = 4_096
KEPT_FILES = 96 # Descriptors that are no connections: files, the database, the pipes of the next worker
MAX_HEADER = 32_768 # Bytes of a request line and its header, of a chunk's head, of trailers
MAX_FIELDS = 100 # In a header
HEADER_S = 10. # From the connection, or a header's first byte, to its end
IDLE_S = 30 # Between two requests of a connection

MAX_TEXT = 20_000 # Characters of a title or a description; models read far less
MAX_BODY = MAX_BYTES*4//3 + 500_000 # Bytes of a request: one image in base64, two texts
SMALL_BODY = 100_000 # Bytes of a body that holds no listing
MAX_STRINGS = 1_000 # In a JSON body; a full batch has some 300, keys included
MAX_STRUCTURE = 100_000 # Bytes of a JSON body outside of its strings
MAX_ESCAPES = 400_000 # In a JSON body; a slash in base64 is one for some clients
MAX_ERRORS = 20 # That are told of one request

MIN_PASSWORD = 12 # Characters
CHECKS = 2 # Passwords that are checked at one time: each takes a core and 64 MB
NEIGHBOURS = 10 # An address may send so many times as many wrong credentials as one of its users

BEHIND_S = .1 # Each listing of a batch request may be overtaken by what comes so much later than the one before it
BATCH_S = 2. # A batch that takes longer keeps those behind it waiting, and looks like a worker that hangs
PROGRESS_S = .25 # A worker that is at work says so no more often
DATABASE_S = 5. # For a statement, and for a connection
