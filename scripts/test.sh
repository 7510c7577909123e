#!/usr/bin/env bash
# Runs the whole test suite in the environment of scripts/env.sh, which it makes when needed.
#
#   scripts/test.sh [pytest arguments]
#
# Tests of the real model run when scripts/smollm2.py can fetch it, and say so when they are left out.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=1

bash scripts/env.sh .venv
.venv/bin/python scripts/smollm2.py .models/SmolLM2-135M-Instruct ||
    echo "test.sh: the real model could not be fetched; its tests are skipped" >&2
exec .venv/bin/pytest -n "$(env -u OMP_NUM_THREADS nproc)" "$@"
