#!/usr/bin/env bash
# Lint, format and all tests: bash scripts/test.sh [pytest arguments, such as -m "not slow"]
set -euo pipefail
. "$(dirname "$0")/environment.sh" dev
ruff check .
ruff format --check .
# Two processes, a file each at a time; what they start has one thread, so that results do not depend on the cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python -m pytest -q -n "${TEST_PROCESSES:-2}" --dist loadfile "$@"
