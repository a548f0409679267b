#!/usr/bin/env bash
# Lock every dependency: requirements.txt (with the hashes of all files), constraints.txt (the same versions alone), and
# scripts/dashboard.txt for the environment of ZenML's dashboard.
# A version stays as long as settings.ini allows it. Arguments go to uv: --upgrade moves all, --upgrade-package NAME moves one.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
touch setup.py # uv keeps what it once read, and looks only at the time of this file, while the lists stand in settings.ini
# What installs and builds is locked like the rest. soupsieve wants 3.11.5; of a universal lock, any platform takes what is its own.
printf 'pip\nsetuptools>=77\n' | uv pip compile --quiet --no-config --universal --python-version 3.11.5 --generate-hashes --no-annotate \
    --custom-compile-command scripts/lock.sh --extra dev setup.py - --output-file requirements.txt "$@"
{
    echo "# The exact set that the tests last passed with (Python 3.11, Linux), for whoever installs an extra alone; scripts/lock.sh writes it."
    sed -nE 's/^([a-z0-9].*[^ ]) *\\$/\1/p' requirements.txt
} > constraints.txt
zenml=$(sed -n 's/^zenml==/zenml[server,local]==/p' constraints.txt)
uv pip compile --quiet --no-config --python-version 3.11.5 --generate-hashes --no-annotate --custom-compile-command scripts/lock.sh - \
    --output-file scripts/dashboard.txt "$@" <<< "$zenml"
