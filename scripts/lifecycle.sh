#!/usr/bin/env bash
# The stages after the quickstart, each with the number that it moves: bash scripts/lifecycle.sh [flags of lifecycle.py]
# LoRA, DPO, distillation, reasoning, tool calls; ten to fifteen minutes on two CPU cores. Interrupted and run again, it goes on.
scripts=$(dirname "$0")
exec "${PYTHON:-python3}" "$scripts/environment.py" core scripts/lifecycle.py --out_dir "${OUT:-out}" "$@"
