#!/usr/bin/env bash
# JupyterLab on this checkout: `scripts/lab.sh --help`.
set -euo pipefail

usage() { cat <<'TXT'
usage: scripts/lab.sh [--port PORT] [--no-browser] [NOTEBOOK]

  --port PORT    8888, or the next one that is free
  --no-browser   only print the address
  NOTEBOOK       what is opened first (nbs/tour.ipynb)

It answers this machine alone, asks for the token in the address, and needs no network. Saving a notebook stores what
you have edited: a cell that you only ran keeps the output that is in git, and run notebooks (nbs/runs) keep none. The
output of a cell that you edited is stored with it; scripts/lab.sh --outputs stores all of them, to bring a chapter up
to date.
TXT
}

port=8888 browser='' first=nbs/tour.ipynb
while [ $# -gt 0 ]; do case $1 in
    --port) port=${2:?--port wants a number}; shift 2;;
    --no-browser) browser=--no-browser; shift;;
    --outputs) export RAKUTEN_MM_STORE_OUTPUTS=1; shift;;
    -h|--help) usage; exit 0;;
    -*) usage >&2; exit 2;;
    *) first=$(realpath "$1"); shift;;
esac; done

. "$(dirname "$0")/setup.sh"
first=${first#"$PWD"/}
[ -f "$first" ] || { echo "there is no notebook $first in $PWD" >&2; exit 2; }
command -v jupyter-lab >/dev/null || { echo "JupyterLab is not in .venv: remove .venv/.installed and try again" >&2; exit 1; }
[ -f .venv/share/jupyter/kernels/python3/kernel.json ] ||
    python -m ipykernel install --sys-prefix --name python3 >/dev/null # the kernel is that of .venv
nbdev_trust >/dev/null # what git brought is shown with its outputs
export JUPYTER_CONFIG_PATH=$PWD/scripts/lab JUPYTER_PREFER_ENV_PATH=1
[ "$(id -u)" != 0 ] || browser="$browser --allow-root" # a container's only user; nobody else is answered
exec jupyter lab --ip 127.0.0.1 --port "$port" $browser --ServerApp.root_dir="$PWD" --LabApp.default_url="/lab/tree/$first"
