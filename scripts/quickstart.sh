#!/usr/bin/env bash
# From nothing to a served prediction: install, listings, ingestion, training, promotion, server, one request.
# The last line on standard output is the server's answer (JSON); everything else goes to standard error.
set -euo pipefail

usage() { cat <<'TXT'
usage: scripts/quickstart.sh [--raw DIR] [--rows N] [--preset NAME] [--port PORT]

  --raw DIR      a delivery in the challenge's format; default: synthetic listings
  --rows N       number of synthetic listings (2000)
  --preset NAME  configuration to train (cpu)
  --port PORT    of the server (8080, or a free one if that is taken)
TXT
}

raw='' rows=2000 preset=cpu port=''
while [ $# -gt 0 ]; do case $1 in
    --raw) raw=$(cd "$2" && pwd) || exit 2; shift 2;;
    --rows) rows=$2; shift 2;;
    --preset) preset=$2; shift 2;;
    --port) port=$2; shift 2;;
    -h|--help) usage; exit 0;;
    *) usage >&2; exit 2;;
esac; done

. "$(dirname "$0")/setup.sh"
work=artifacts/quickstart
if [ -z "$raw" ]; then
    suffix=''; [ "$rows" = 2000 ] || suffix=-$rows
    raw=$work/raw$suffix data=$work/data$suffix
    if [ ! -f "$raw/X_train_update.csv" ]; then say "$rows synthetic listings"; rakuten-mm synthesize "$raw" --rows "$rows" >&2; fi
else data=$work/data-$(basename "$raw"); fi

say "ZenML stack and MLflow"
python scripts/setup_stack.py >&2
config=$(mktemp -d); trap 'rm -rf "$config"' EXIT
printf 'parameters:\n  raw_dir: "%s"\n  data_dir: "%s"\n' "$raw" "$data" > "$config/ingestion.yaml"
printf 'parameters:\n  data_dir: "%s"\n  artifacts_dir: artifacts\n  preset: "%s"\n  seed: 42\n' "$data" "$preset" > "$config/training.yaml"
say "ingestion pipeline"
zenml pipeline run zenml_pipelines.ingestion -c "$config/ingestion.yaml" -s rakuten_local >&2
say "training pipeline"
zenml pipeline run zenml_pipelines.training -c "$config/training.yaml" -s rakuten_local >&2

python - >&2 <<'PY'
import json
from pathlib import Path
path = max(Path('artifacts/runs').glob('training-*/promote/decision.json'), key=lambda p: p.stat().st_mtime)
decision,scores = json.loads(path.read_text()), json.loads((path.parents[1]/'evaluate'/'result.json').read_text())['table']
print(f"\nweighted F1 on the test split of data {decision['data_version']} (grouped: no duplicate of a training listing)")
for name,f1 in scores.items(): print(f'  {name:32} {f1:.4f}')
print(f"version {decision['challenger']} {'promoted' if decision['promoted'] else 'not promoted'}: {decision['reason']}")
print(f"the whole decision is in {path.with_name('report.md')}")
PY

say "server and one prediction"
python -m serving.testing --data "$data" ${port:+--port "$port"}
