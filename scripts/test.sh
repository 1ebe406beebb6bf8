#!/usr/bin/env bash
# Lint, format and all tests: bash scripts/test.sh [pytest arguments, such as -m "not slow"]
set -euo pipefail
. "$(dirname "$0")/environment.sh" dev
ruff check .
ruff format --check .
python -m pytest -q "$@"
