#!/usr/bin/env bash
# Submit one command of vlm_jax to a GKE cluster of TPU slices with xpk (https://github.com/AI-Hypercomputer/xpk).
#   bash launch/xpk.sh --cluster C --workload NAME --type v5litepod-256 --image IMAGE [--slices 2] [--restarts 3] [--dry-run] -- train --config ...
# IMAGE holds this repository in /vlm_jax. Several slices: the mesh axis `data` crosses them. A preempted run is started again and goes on
# from its last checkpoint, so config.output must be on storage that outlives a pod.
# shellcheck source=launch/dry_run.sh
source "$(dirname "${BASH_SOURCE[0]}")/dry_run.sh"
FLAGS="cluster workload type image slices restarts"
cluster="" workload="" type="" image="" slices=1 restarts=3
read_flags "$@"
need cluster workload type image
need_command
run xpk workload create --cluster="$cluster" --workload="$workload" --tpu-type="$type" --num-slices="$slices" \
  --docker-image="$image" --max-restarts="$restarts" \
  --command="EXTRAS=tpu bash /vlm_jax/launch/run.sh $(quoted "${COMMAND[@]}")"
