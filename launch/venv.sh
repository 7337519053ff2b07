# shellcheck shell=bash
# Sourced by the other scripts: goes to the repository root, makes .venv with the extras named in EXTRAS, leaves $PYTHON set.
# A stamp holds what was installed, so that a second run starts at once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
  local candidate
  for candidate in "${VLM_JAX_PYTHON:-}" python3 python3.13 python3.12 python3.11 python; do
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 &&
      "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "vlm_jax needs Python 3.11 or newer and found none: install it, or set VLM_JAX_PYTHON to it" >&2
  return 1
}

want="${EXTRAS:-} $(cksum setup.py)"
if [ ! -x .venv/bin/python ]; then
  python="$(find_python)"
  echo "making .venv with $("$python" --version)"
  "$python" -m venv .venv
fi
PYTHON=.venv/bin/python
if [ "$(cat .venv/vlm_jax_installed 2>/dev/null)" != "$want" ]; then
  echo "installing vlm_jax${EXTRAS:+[$EXTRAS]} into .venv (about a minute)"
  "$PYTHON" -m pip install --quiet --disable-pip-version-check --config-settings editable_mode=compat -e ".${EXTRAS:+[$EXTRAS]}" 2> >(grep -v '^WARNING' >&2)
  echo "$want" >.venv/vlm_jax_installed
fi
