#!/usr/bin/env bash
# Train a small CLIP-FlanT5 from nothing in two stages on generated smart-watch images, rank captions by its VQAScore, report:
# runs/watch_score/ (or the folder given as first argument).
# bash launch/watch_score.sh [folder]
VLM_JAX_STARTED="$(date +%s)"  # so that the seconds in summary.json include stage 1 and the installation
export VLM_JAX_STARTED
# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
out="${1:-runs/watch_score}"
"$PYTHON" -m vlm_jax train --config configs/watch_score.py:stage1 --config.output="$out/stage1"
exec "$PYTHON" -m vlm_jax quickstart --config configs/watch_score.py:stage2 --config.init.checkpoint="$out/stage1/export" \
  --out "$out/stage2"
