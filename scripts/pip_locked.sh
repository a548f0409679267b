#!/usr/bin/env bash
# `pip install` by the lock: what is named here and what it needs, in the versions and only from files with the hashes of requirements.txt.
# pip itself comes first, because an old one knows no hashes of constraints; no build script of a package runs.
set -euo pipefail
lock=$(dirname "$0")/../requirements.txt
sed -n '/^pip==/,/[^\\]$/p' "$lock" | python -m pip install --quiet --no-deps --require-hashes --requirement /dev/stdin
python -m pip install --only-binary :all: --require-hashes --constraint "$lock" "$@"
