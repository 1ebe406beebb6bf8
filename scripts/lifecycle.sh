#!/usr/bin/env bash
# The stages after the quickstart, each with the number that it moves: bash scripts/lifecycle.sh
# LoRA, DPO, distillation, reasoning, tool calls; ten to fifteen minutes on two CPU cores. Interrupted and run again, it goes on.
set -euo pipefail
. "$(dirname "$0")/environment.sh" core
python scripts/lifecycle.py --out_dir "${OUT:-out}"
