#!/usr/bin/env bash
# scripts/test.py by PYTHON, or python3: bash scripts/test.sh [pytest arguments, such as -m "not slow"]
exec "${PYTHON:-python3}" "$(dirname "$0")/test.py" "$@"
