#!/usr/bin/env bash
# Set everything up and run the tests. Arguments go to pytest: scripts/test.sh -k serving
set -euo pipefail
. "$(dirname "$0")/setup.sh"
# A run of its own: neither the user's stacks nor a previous run may matter.
scratch=$(mktemp -d); trap 'rm -rf "$scratch"' EXIT
export ZENML_CONFIG_PATH=$scratch/zenml RAKUTEN_MM_ARTIFACTS=$scratch/artifacts IPYTHONDIR=$scratch/ipython MPLCONFIGDIR=$scratch/matplotlib
unset MLFLOW_TRACKING_URI API_USERNAME API_PASSWORD
export OMP_WAIT_POLICY=passive # kernels and servers share the cores with pytest; threads that spin while they wait would starve them
# A system program that pip cannot bring. Nothing else needs it, so tests do without where it cannot be had.
if ! command -v rclone >/dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "installing rclone"
        apt_rclone() { DEBIAN_FRONTEND=noninteractive timeout 180 apt-get install -y --no-install-recommends rclone >/dev/null 2>&1; }
        apt_rclone || { timeout 120 apt-get update >/dev/null 2>&1 && apt_rclone; } || say "apt-get could not install rclone: tests of fetch will be skipped"
    else
        say "rclone is not installed, and only root can install it with apt-get: tests of fetch will be skipped"
    fi
fi
say "lint"
ruff check .
say "tests"
python -m pytest "$@"
