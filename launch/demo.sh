#!/usr/bin/env bash
# Installs what is needed, then trains and samples everything on handwritten digits (CPU).
#
#   bash launch/demo.sh                 picks up where it stopped
#   bash launch/demo.sh --fresh         starts over
#   bash launch/demo.sh --config.tokenizer.train.steps=2000 --workdir=runs/longer
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
make_environment requirements.txt
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
exec .venv/bin/python -m gae_jax demo --config=configs/demo.py "$@"
