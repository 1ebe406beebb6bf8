#!/usr/bin/env bash
# The stages after the quickstart, each with the number that it moves: bash scripts/lifecycle.sh [flags of lifecycle.py]
# LoRA, distillation, reasoning, reinforcement learning, an agent, DPO; some twenty minutes on two CPU cores. Interrupted and run again, it goes on.
scripts=$(dirname "$0")
exec "${PYTHON:-python3}" "$scripts/environment.py" core scripts/lifecycle.py --out_dir "${OUT:-out}" "$@"
