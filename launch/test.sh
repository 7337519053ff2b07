#!/usr/bin/env bash
# Run the tests: bash launch/test.sh [pytest arguments]. Live comparisons with transformers and torch need the extra `parity`:
# EXTRAS=test,parity bash launch/test.sh
EXTRAS="${EXTRAS:-test}"
# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
exec "$PYTHON" -m pytest "$@"
