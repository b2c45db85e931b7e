#!/usr/bin/env bash
# Installs what is needed, then checks style and types and runs the tests (CPU).
#
#   bash launch/test.sh                 everything but the slow ones
#   bash launch/test.sh -m slow         those: several processes step by step, more kills, whole stages of tokenizers
#   bash launch/test.sh tests/generators/test_flow.py -k shift
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
make_environment tests/requirements.txt
export JAX_PLATFORMS=cpu
if [ $# -eq 0 ]; then
  .venv/bin/ruff check .
  .venv/bin/ruff format --check .
  .venv/bin/mypy
fi
exec .venv/bin/python -m pytest "$@"
