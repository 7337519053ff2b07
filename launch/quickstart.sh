#!/usr/bin/env bash
# Train a small vision-language model from nothing on generated smart-watch images, evaluate, export, report: runs/quickstart/.
# bash launch/quickstart.sh [flags of `python -m vlm_jax quickstart`]
VLM_JAX_STARTED="$(date +%s)"  # so that the seconds in summary.json include the installation
export VLM_JAX_STARTED
# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}" # large pages: a CPU's steps make and drop arrays of many MB
exec "$PYTHON" -m vlm_jax quickstart "$@"
