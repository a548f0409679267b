#!/usr/bin/env bash
# Set everything up and run the tests. Arguments go to pytest: scripts/test.sh -k serving
set -euo pipefail
. "$(dirname "$0")/setup.sh"
# A run of its own: neither the user's stacks nor a previous run may matter.
scratch=$(mktemp -d); trap 'rm -rf "$scratch"' EXIT
export ZENML_CONFIG_PATH=$scratch/zenml RAKUTEN_MM_ARTIFACTS=$scratch/artifacts IPYTHONDIR=$scratch/ipython MPLCONFIGDIR=$scratch/matplotlib
unset MLFLOW_TRACKING_URI API_USERNAME API_PASSWORD
say "lint"
ruff check .
say "tests"
python -m pytest "$@"
