#!/usr/bin/env bash
# Installs the wheel in dist/ with the extra `hyperopt` into a fresh environment and searches there over adapter types
# with both of Ludwig's executors, Optuna and Ray.
# Usage: prove_hyperopt.sh PYTHON
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
uv=uv
uv --version >/dev/null 2>&1 || uv=$PWD/.tools/bin/uv

"$uv" venv --quiet --python "$python" "$work/venv"
for wheel in dist/*.whl; do
    "$uv" pip install --quiet --python "$work/venv/bin/python" "$wheel[hyperopt]"
done
"$work/venv/bin/python" scripts/prove_hyperopt.py "$work/results"
