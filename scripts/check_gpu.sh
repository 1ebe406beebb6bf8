#!/usr/bin/env bash
# Ten minutes with one CUDA card: parity with the CPU, training in bf16 and fp16, kill and resume, speed, the quickstart.
#   bash scripts/check_gpu.sh [DIR]           # the report: out/gpu_report.md
#   bash scripts/check_gpu.sh wheels DIR      # beforehand, for a machine without a network: what it may lack, for its Python
# Needs torch >= 2.11 and what a machine with transformers has; missing packages come from DIR (default: wheels/) if it is there.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}

# pyarrow 21: later wheels are a third larger.
packages=(datasets 'pyarrow==21.*' pandas dill multiprocess xxhash pytest pluggy iniconfig)

if [ "${1:-}" = wheels ]; then
    # --no-deps: torch and numpy, which are gigabytes, are there already.
    exec "$PYTHON" -m pip download --no-deps --only-binary=:all: --python-version "${PYTHON_VERSION:-3.12}" --dest "${2:-wheels}" "${packages[@]}"
fi

report=out/gpu_report.md
wheels=${1:-wheels}
mkdir -p out
if ! "$PYTHON" -c "import datasets, pytest" 2>/dev/null; then
    if [ -d "$wheels" ]; then
        "$PYTHON" -m pip install --quiet --no-index --no-deps --find-links "$wheels" "${packages[@]}"
    else
        "$PYTHON" -m pip install --quiet datasets pytest
    fi
fi

began=$SECONDS
failed=0
part() { # title, command...: the last lines of what it prints, in the report
    local title=$1 start=$SECONDS status
    shift
    echo "== $title"
    timeout "${PART_SECONDS:-300}" "$@" >out/gpu_part.log 2>&1
    status=$?
    [ $status = 0 ] || failed=$((failed + 1))
    printf '\n## %s\n\n`%s`: exit status %s, %s s\n\n```text\n' "$title" "$*" $status $((SECONDS - start)) >>"$report"
    tail -n 25 out/gpu_part.log | cut -c -400 >>"$report"
    printf '```\n' >>"$report"
}

"$PYTHON" - >"$report" <<'END'
import platform, subprocess, torch
commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip() or "unknown"
card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA card"
print(f"# GPU report\n\n{card}; torch {torch.__version__}, CUDA {torch.version.cuda}, Python {platform.python_version()}; commit {commit}")
END
part "Parity, training, resume, generation" "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider tests/test_gpu.py
for preset in small v3 base; do
    for optimizer in adamw muon; do
        part "Training speed, $preset, $optimizer" "$PYTHON" scripts/benchmark.py train --preset $preset --seconds 8 --batch_size 32 --optimizer $optimizer
    done
    part "Decoding speed, $preset" "$PYTHON" scripts/benchmark.py decode --preset $preset --compile 0 --batch 8 --repeat 2 --device cuda
done
export OUT=out/gpu_quickstart
part "Quickstart: corpus" "$PYTHON" -m dataset.starter
part "Quickstart: pretraining" "$PYTHON" train_pretrain.py --out_dir $OUT --minutes 0.5
part "Quickstart: fine-tuning" "$PYTHON" train_full_sft.py --out_dir $OUT --minutes 1
part "Quickstart: scoreboard" "$PYTHON" eval_model.py --out_dir $OUT --score dataset/starter_data/heldout.jsonl
part "Quickstart: one question" "$PYTHON" eval_model.py --out_dir $OUT --ask "What is the capital of France?"
printf '\n%s parts failed; %s s in all.\n' $failed $((SECONDS - began)) >>"$report"
cat "$report"
exit $((failed > 0))
