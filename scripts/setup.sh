# Sourced by quickstart.sh and test.sh: makes .venv from requirements.txt and activates it.
# Nothing is installed when nothing changed, so a second run needs no network.
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export ZENML_ANALYTICS_OPT_IN=false MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=1 HF_HUB_DISABLE_TELEMETRY=1
export PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUTF8=1 ZENML_LOGGING_COLORS_DISABLED=true
[ "${RAKUTEN_MM_USE_HUB:-}" = 1 ] || export HF_HUB_OFFLINE=1

say() { printf '\n== %s\n' "$*" >&2; }

PYTHON=${PYTHON:-python3.11}
# 3.11.5, because of soupsieve: Debian 12 has 3.11.2.
"$PYTHON" -c 'import sys; sys.exit(not (3, 11, 5) <= sys.version_info < (3, 12))' 2>/dev/null ||
    { echo "Python 3.11.5 or a later 3.11 is needed (looked for $PYTHON; set PYTHON to another name)" >&2; exit 1; }
stamp=$(cat settings.ini setup.py pyproject.toml requirements.txt | "$PYTHON" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
if [ "$(cat .venv/.installed 2>/dev/null)" != "$stamp" ]; then
    say "installing into .venv (minutes, about 6 GB)"
    [ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
    (
        PATH="$PWD/.venv/bin:$PATH"
        # uv takes half of pip's time; where it finds no index (it reads no pip.conf), pip does it.
        scripts/pip_locked.sh --quiet --no-deps uv
        uv pip install --quiet --python .venv/bin/python --compile-bytecode --only-binary :all: --require-hashes --requirement requirements.txt ||
            scripts/pip_locked.sh --quiet --requirement requirements.txt
        python -m pip install --quiet --no-deps --no-build-isolation --editable .
    ) >&2
    echo "$stamp" > .venv/.installed
fi
export PATH="$PWD/.venv/bin:$PATH"
scripts/hooks.sh || say "the hooks for notebooks could not be installed; nothing else needs them"
