#!/usr/bin/env bash
# Set everything up and run the tests. Arguments go to pytest: scripts/test.sh -k serving
set -euo pipefail
. "$(dirname "$0")/setup.sh"
# A run of its own: neither the user's stacks nor a previous run may matter.
scratch=$(mktemp -d); trap 'rm -rf "$scratch"' EXIT
export ZENML_CONFIG_PATH=$scratch/zenml RAKUTEN_MM_ARTIFACTS=$scratch/artifacts IPYTHONDIR=$scratch/ipython MPLCONFIGDIR=$scratch/matplotlib
unset MLFLOW_TRACKING_URI API_USERNAME API_PASSWORD
export OMP_WAIT_POLICY=passive # kernels and servers share the cores with pytest; threads that spin while they wait would starve them
# System programs that pip cannot bring. Only tests need them, and do without where they cannot be had.
missing=()
command -v rclone >/dev/null || missing+=(rclone)
command -v chromium >/dev/null && command -v chromedriver >/dev/null || missing+=(chromium chromium-driver)
ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || missing+=(postgresql)
command -v nginx >/dev/null || missing+=(nginx-light)
if [ ${#missing[@]} -gt 0 ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "installing ${missing[*]}"
        fetch() { DEBIAN_FRONTEND=noninteractive timeout 300 apt-get install -y --no-install-recommends "$1" >/dev/null 2>&1; }
        timeout 120 apt-get update >/dev/null 2>&1 || true
        for p in "${missing[@]}"; do fetch "$p" || say "apt-get could not install $p: its tests will be skipped"; done
    else
        say "not installed, and only root can install with apt-get: ${missing[*]}; their tests will be skipped"
    fi
fi
say "lint and types"
ruff check .
python -m mypy
say "tests"
# Much of a test is one core waiting for another process, so three files are tested at a time; fixtures belong to files.
python -m pytest --numprocesses 3 --dist loadscope --no-loadscope-reorder "$@"
