#!/usr/bin/env bash
# From nothing to a served prediction: install, listings, ingestion, training, promotion, server, one request.
# Standard output has one line, the server's answer (JSON); what happens is told on standard error, a line a step, and
# all that the steps print is in artifacts/quickstart/quickstart.log.
set -euo pipefail

usage() { cat <<'TXT'
usage: scripts/quickstart.sh [--raw DIR] [--rows N] [--preset NAME] [--port PORT] [--stay]

  --raw DIR      a delivery in the challenge's format; default: synthetic listings
  --rows N       number of synthetic listings (3600, enough for some to be filed automatically)
  --preset NAME  configuration to train (cpu)
  --port PORT    of the server (8080, or a free one if that is taken)
  --stay         leave the server running, until Ctrl+C
TXT
}

raw='' rows=3600 preset=cpu port='' stay=''
while [ $# -gt 0 ]; do case $1 in
    --raw) raw=$(cd "$2" && pwd) || exit 2; shift 2;;
    --rows) rows=$2; shift 2;;
    --preset) preset=$2; shift 2;;
    --port) port=$2; shift 2;;
    --stay) stay=--stay; shift;;
    -h|--help) usage; exit 0;;
    *) usage >&2; exit 2;;
esac; done

. "$(dirname "$0")/setup.sh"
work=artifacts/quickstart log=artifacts/quickstart/quickstart.log
mkdir -p "$work"; : > "$log"

step() { # What it is called, and the command: a line, and on failure the end of what it printed
    local name=$1 begin=$SECONDS code; shift
    printf '%-34s' "$name" >&2
    "$@" >> "$log" 2>&1 && { printf '%4d s\n' $((SECONDS-begin)) >&2; return; } || code=$?
    printf 'failed (exit code %d)\n\n' "$code" >&2; tail -n 15 "$log" >&2; printf '\nAll of it: %s\n' "$log" >&2
    exit "$code"
}

if [ -z "$raw" ]; then
    suffix=''; [ "$rows" = 3600 ] || suffix=-$rows
    raw=$work/raw$suffix data=$work/data$suffix
    [ -f "$raw/X_train_update.csv" ] || step "$rows synthetic listings" rakuten-mm synthesize "$raw" --rows "$rows"
else data=$work/data-$(basename "$raw"); fi

step "ZenML stack and MLflow" python scripts/setup_stack.py
config=$(mktemp -d); trap 'rm -rf "$config"' EXIT
printf 'parameters:\n  raw_dir: "%s"\n  data_dir: "%s"\n' "$raw" "$data" > "$config/ingestion.yaml"
printf 'parameters:\n  data_dir: "%s"\n  artifacts_dir: artifacts\n  preset: "%s"\n  seed: 42\n' "$data" "$preset" > "$config/training.yaml"
step "ingestion pipeline" zenml pipeline run zenml_pipelines.ingestion -c "$config/ingestion.yaml" -s rakuten_local
step "training pipeline" zenml pipeline run zenml_pipelines.training -c "$config/training.yaml" -s rakuten_local

python - >&2 <<'PY'
import json
from pathlib import Path
import pandas as pd
path = max(Path('artifacts/runs').glob('training-*/promote/decision.json'), key=lambda p: p.stat().st_mtime)
decision,scores = json.loads(path.read_text()), json.loads((path.parents[1]/'evaluate'/'result.json').read_text())['table']
history = path.parents[1]/'train'/'history'/'metrics.csv'
for epoch,r in pd.read_csv(history).groupby('epoch').last().iterrows():
    print(f"  epoch {epoch+1}: training loss {r['train/loss']:.3f}, weighted F1 on validation {r['val/f1_weighted']:.3f}")
print(f"\nweighted F1 on the test split of data {decision['data_version']} (grouped: no duplicate of a training listing)")
for name,f1 in scores.items(): print(f'  {name:32} {f1:.4f}')
print(f"version {decision['challenger']} {'promoted' if decision['promoted'] else 'not promoted'}: {decision['reason']}")
print(f"model card   {path.parents[1]/'evaluate'/'evaluate.html'}\ndecision     {path.with_name('report.md')}")
PY
cat >&2 <<'TXT'
MLflow       mlflow ui --backend-store-uri sqlite:///artifacts/mlflow.db
notebooks    scripts/lab.sh
the page     rakuten-mm serve, or this script with --stay
TXT

python -m serving.testing --data "$data" ${port:+--port "$port"} $stay
