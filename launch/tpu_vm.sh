#!/usr/bin/env bash
# Create a TPU VM slice if it is not there, copy this repository to all its hosts, and run one command of vlm_jax on all of them.
#   bash launch/tpu_vm.sh --name NAME --zone ZONE --type v5litepod-16 [--version v2-alpha-tpuv5-lite] [--dry-run] -- train --config ...
# jax.distributed finds the hosts by itself. Data, weights and config.output lie on a disk or bucket mount that all hosts see.
# The slice stays: gcloud compute tpus tpu-vm delete NAME --zone ZONE
# shellcheck source=launch/dry_run.sh
source "$(dirname "${BASH_SOURCE[0]}")/dry_run.sh"
FLAGS="name zone type version"
name="" zone="" type="" version=""
read_flags "$@"
need name zone type
need_command
case "$type" in
  v5litepod-*) default=v2-alpha-tpuv5-lite ;;
  v5p-*) default=v2-alpha-tpuv5 ;;
  v6e-*) default=v2-alpha-tpuv6e ;;
  v4-*) default='tpu-ubuntu2204-base' ;;
  *) fail "--type $type is unknown: v4-N, v5litepod-N, v5p-N or v6e-N" ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
tpu=(gcloud compute tpus tpu-vm)
if [ "$DRY" = 1 ] || ! "${tpu[@]}" describe "$name" --zone="$zone" >/dev/null 2>&1; then
  run "${tpu[@]}" create "$name" --zone="$zone" --accelerator-type="$type" --version="${version:-$default}"
fi
archive="${TMPDIR:-/tmp}/vlm_jax.$$.tar.gz"
run git archive --format=tar.gz --output="$archive" HEAD
run "${tpu[@]}" scp "$archive" "$name:vlm_jax.tar.gz" --zone="$zone" --worker=all
run "${tpu[@]}" ssh "$name" --zone="$zone" --worker=all \
  --command="mkdir -p vlm_jax && tar -xzf vlm_jax.tar.gz -C vlm_jax && EXTRAS=tpu bash vlm_jax/launch/run.sh $(quoted "${COMMAND[@]}")"
