#!/usr/bin/env bash
# scripts/quickstart.py by PYTHON, or python3: bash scripts/quickstart.sh [its flags]
exec "${PYTHON:-python3}" "$(dirname "$0")/quickstart.py" "$@"
