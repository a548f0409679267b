#!/usr/bin/env bash
# ZenML's dashboard: runs, their steps and reports, in the browser. It only reads what the pipelines have written.
# zenml[server] wants another FastAPI than ours, so it has an environment of its own (.venv-dashboard, made at the first start).
# `zenml login --local` is not used: it would send every later pipeline run to this server, and fail them when it is gone.
set -euo pipefail

usage() { cat <<'TXT'
usage: scripts/dashboard.sh [--port PORT]

  --port PORT    8237

It answers this machine alone, without a password, until Ctrl+C. Pipelines need it neither running nor installed.
TXT
}

port=8237
while [ $# -gt 0 ]; do case $1 in
    --port) port=${2:?--port wants a number}; shift 2;;
    -h|--help) usage; exit 0;;
    *) usage >&2; exit 2;;
esac; done

. "$(dirname "$0")/setup.sh"
home=.venv-dashboard
lock=scripts/dashboard.txt
if ! cmp --silent $lock $home/.installed; then
    say "installing the dashboard into $home"
    uv venv --quiet --allow-existing --python .venv/bin/python $home
    uv pip install --quiet --python $home/bin/python --only-binary :all: --require-hashes --requirement $lock >&2
    cp $lock $home/.installed
fi
# Where the pipelines keep their runs; the server's own settings go elsewhere.
store=$(python -c 'from zenml.config.global_config import GlobalConfiguration as G; print(G().store_configuration.url)')
stores=$(python -c 'from zenml.config.global_config import GlobalConfiguration as G; print(G().local_stores_path)')
case $store in sqlite:*) ;; *) echo "the runs are on a server already: $store" >&2; exit 1;; esac
export ZENML_CONFIG_PATH=$PWD/$home/config ZENML_LOCAL_STORES_PATH=$stores ZENML_STORE_TYPE=sql ZENML_STORE_URL=$store
export ZENML_LOGGING_VERBOSITY=WARN ZENML_SERVER_AUTH_SCHEME=NO_AUTH ZENML_SERVER_DEPLOYMENT_TYPE=local ZENML_SERVER_ALLOW_LOCAL_FILE_ACCESS=true
export ZENML_SERVER_DISPLAY_ANNOUNCEMENTS=false ZENML_SERVER_DISPLAY_UPDATES=false
mkdir -p "$ZENML_CONFIG_PATH"
say "the dashboard: http://127.0.0.1:$port (Ctrl+C ends it)"
exec $home/bin/python -m uvicorn zenml.zen_server.zen_server_api:app --host 127.0.0.1 --port "$port" --no-access-log --log-level warning
