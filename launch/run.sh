#!/usr/bin/env bash
# `python -m vlm_jax "$@"` in an environment with the extras that EXTRAS names, which is made where it is missing:
# EXTRAS=tpu bash launch/run.sh train --config configs/llava15.py:7b,stage1 ...
# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
exec "$PYTHON" -m vlm_jax "$@"
