# shellcheck shell=bash
# Sourced by the launch scripts. Reads `--name value` flags up to `--` into variables of the names in FLAGS, the command of
# `python -m vlm_jax` behind it into COMMAND, and --dry-run into DRY. `run CMD ...` runs, or with --dry-run prints what it would run.
set -euo pipefail

read_flags() {
  DRY=0 COMMAND=()
  while [ $# -gt 0 ]; do
    case "$1" in
      --dry-run) DRY=1 && shift ;;
      --) shift && COMMAND=("$@") && return ;;
      --*)
        local flag="${1#--}"
        case " $FLAGS " in
          *" $flag "*) ;;
          *) fail "unknown flag $1: there are --${FLAGS// / --} --dry-run, then -- and the command, e.g. -- train --config ..." ;;
        esac
        [ $# -ge 2 ] || fail "$1 needs a value"
        printf -v "$flag" '%s' "$2"
        shift 2
        ;;
      *) fail "unexpected argument $1: the command of vlm_jax stands behind --" ;;
    esac
  done
}

fail() {
  echo "$(basename "$0"): $1" >&2
  exit 2
}

need() {
  local flag
  for flag in "$@"; do
    [ -n "${!flag:-}" ] || fail "give --$flag"
  done
}

need_command() {
  [ "${#COMMAND[@]}" -gt 0 ] || fail "give the command behind --, e.g. -- train --config configs/llava15.py:7b,stage1"
}

quoted() {
  local words
  printf -v words '%q ' "$@"
  echo "${words% }"
}

run() {
  if [ "$DRY" = 1 ]; then
    quoted "$@"
  else
    "$@"
  fi
}
