#!/usr/bin/env bash
# The whole system on this machine, without Docker: MLflow, fetch, scheduler and API, as in deploy/compose.yaml.
# From nothing to a promoted model and an answered prediction; then it goes on until Ctrl+C. `scripts/up.sh --help` tells the rest.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
exec python -m deploy.up "$@"
