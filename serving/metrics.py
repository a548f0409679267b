"Figures for Prometheus. The worker reports to the front, so one process counts for all."
from prometheus_client import REGISTRY, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

TIMES = (.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10)
REQUESTS = Counter('rakuten_requests_total', 'Requests by path and status', ['path', 'status'])
LATENCY = Histogram('rakuten_request_seconds', 'Time from the first byte of a request to the last of its answer',
                    ['path'], buckets=TIMES)
QUEUE = Histogram('rakuten_queue_seconds', 'Time that a listing waited for the model', buckets=TIMES)
BATCH = Histogram('rakuten_batch_listings', 'Listings that the model saw at once', buckets=(1, 2, 4, 8, 16, 32))
MODEL = Histogram('rakuten_batch_seconds', 'Time that the model took for a batch, decoding included', buckets=TIMES)
IN_FLIGHT = Gauge('rakuten_in_flight_listings', 'Listings that are worked on or wait')
BYTES = Gauge('rakuten_in_flight_bytes', 'Bytes of the bodies that are held')
LANES = Counter('rakuten_lanes_total', 'Answers by lane and model version', ['lane', 'model_version'])
UNUSABLE = Counter('rakuten_unusable_total', 'Times that a reviewer called a listing unusable, by reason', ['reason'])
RESTARTS = Counter('rakuten_worker_restarts_total', 'Workers that died or hung')
REFUSED_MODELS = Counter('rakuten_refused_models_total', 'New models that could not be served')
DEGRADED = Gauge('rakuten_degraded', '1 while the registry cannot be asked, or a newer model cannot be served')
DROPPED = Gauge('rakuten_unrecorded_answers', 'Answers that could not be written to the database since the start')
DATABASE_DOWN = Gauge('rakuten_database_down', '1 while answers cannot be recorded')
ERASED = Counter('rakuten_erased_answers_total', 'Answers whose texts and images were removed, as API_KEEP_DAYS says')
SHADOW = Counter('rakuten_shadow_total', 'Answers of the shadow model that are the same as those given, or other',
                 ['model_version', 'agreement'])
MODEL_INFO = Gauge('rakuten_model_info', '1 for the version that answers', ['model_version'])
DISK = Gauge('rakuten_disk_bytes', 'Size of the disk that the server writes to')
DISK_FREE = Gauge('rakuten_disk_free_bytes', 'Bytes of it that are free')
CACHED = Counter('rakuten_cached_answers_total', 'Answers that were remembered')
_worker:dict[str, int|None] = dict(pid=0)
WORKER = ProcessCollector(namespace='rakuten_worker', pid=lambda: _worker['pid'] or 0)


def watch_process(pid:int|None):
    "Report CPU and memory of this worker from now on."
    _worker['pid'] = pid


def page()->bytes:
    "All figures in Prometheus' text format."
    return generate_latest(REGISTRY)
