"""The last line of a run that failed: its cause, and the page where one reads on."""
import logging
import sys


def in_a_line(e:BaseException)->str:
    "An error as one line, however long; that of a notebook names its page."
    return f"{type(e).__name__}: {' '.join(str(e).split())}"


def end_with_cause():
    "Let an error that ends this process be told once more, in a line, after its traceback."
    before = sys.excepthook
    if getattr(before, 'ends_with_cause', False): return
    def hook(kind, error, tb):
        before(kind, error, tb)
        print(in_a_line(error), file=sys.stderr, flush=True)
    hook.ends_with_cause = True  # type: ignore[attr-defined]
    sys.excepthook = hook


def offer_no_dashboard():
    "Drop ZenML's advice to start its dashboard: in this environment that ends in a traceback."
    log = logging.getLogger('zenml.pipelines.pipeline_definition')
    advice = lambda r: 'zenml login --local' not in str(r.msg)
    if not log.filters: log.addFilter(advice)
