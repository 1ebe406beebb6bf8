#!/usr/bin/env bash
# Some minutes with one CUDA card: parity with the CPU, training in bf16 and fp16, kill and resume, speed, a whole life.
#   bash scripts/check_gpu.sh [DIR]           # the report: out/gpu_report.md, and all that was printed in out/gpu_*.log
#   bash scripts/check_gpu.sh wheels DIR      # beforehand, for a machine without a network: what it may lack, for its Python
# Needs torch >= 2.11, transformers, pandas and pyarrow; missing packages come from DIR (default: wheels/) if it is there.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export PYTHONUNBUFFERED=1

# --no-deps: torch, numpy, pandas and pyarrow, which are gigabytes, are there already.
if [ "${1:-}" = wheels ]; then
    exec "$PYTHON" -m pip download --no-deps --only-binary=:all: --python-version "${PYTHON_VERSION:-3.12}" --dest "${2:-wheels}" \
        datasets dill multiprocess xxhash pytest pytest-xdist execnet pluggy iniconfig
fi

report=out/gpu_report.md
wheels=${1:-wheels}
mkdir -p out
if ! "$PYTHON" -c "import datasets, pytest, xdist" 2>/dev/null; then
    if [ -d "$wheels" ]; then
        "$PYTHON" -m pip install --quiet --no-index --no-deps "$wheels"/*.whl
    else
        "$PYTHON" -m pip install --quiet datasets pytest pytest-xdist
    fi
fi

began=$SECONDS
failed=0
part() { # name, title, command...: the last lines of what it prints, in the report
    local log=out/gpu_$1.log title=$2 start=$SECONDS status
    shift 2
    echo "== $title"
    timeout "${PART_SECONDS:-120}" "$@" >"$log" 2>&1
    status=$?
    [ $status = 0 ] || failed=$((failed + 1))
    printf '\n## %s\n\n`%s`: exit status %s, %s s\n\n```text\n' "$title" "$*" $status $((SECONDS - start)) >>"$report"
    tr '\r' '\n' <"$log" | tail -n 20 | cut -c -600 >>"$report"
    printf '```\n' >>"$report"
}

"$PYTHON" - >"$report" <<'END'
import platform, subprocess, torch
commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip() or "unknown"
card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA card"
print(f"# GPU report\n\n{card}; torch {torch.__version__}, CUDA {torch.version.cuda}, Python {platform.python_version()}; commit {commit}")
END
"$PYTHON" -m dataset.starter >out/gpu_corpus.log 2>&1 &
part tests "Parity, training, resume, generation" "$PYTHON" -m pytest -q -m gpu -n 6 -p no:cacheprovider tests/test_gpu.py
wait
for preset in small v3; do
    part train_$preset "Training speed, $preset" "$PYTHON" scripts/benchmark.py train --preset $preset --seconds 5 --batch_size 64
done
for batch in 1 32; do
    part decode_$batch "Decoding speed, small, $batch at once" "$PYTHON" scripts/benchmark.py decode --preset small --quantize bf16 --batch $batch --repeat 2 --device cuda
    part plain_$batch "The same without recorded graphs" "$PYTHON" scripts/benchmark.py decode --preset small --quantize bf16 --batch $batch --repeat 1 --new_tokens 64 --device cuda --compile 0
done
life=(--out_dir out/gpu_life --batch_size 64)
part pretrain "A life: pretraining" "$PYTHON" train_pretrain.py --preset micro --minutes 0.5 "${life[@]}"
part sft "A life: fine-tuning" "$PYTHON" train_full_sft.py --minutes 0.75 "${life[@]}"
part score "A life: scoreboard" "$PYTHON" eval_model.py --out_dir out/gpu_life --model_mode 1 --score dataset/starter_data/heldout.jsonl
part typed "A life: what people type" "$PYTHON" eval_model.py --out_dir out/gpu_life --model_mode 1 --score evaluation/typed_unseen.jsonl
part ask "A life: one question" "$PYTHON" eval_model.py --out_dir out/gpu_life --model_mode 1 --ask "What is the capital of France?"
part grpo "A life: GRPO" "$PYTHON" train_grpo.py --from_weight full_sft --steps 6 "${life[@]}" --batch_size 16
printf '\n%s parts failed; %s s in all.\n' $failed $((SECONDS - began)) >>"$report"
cat "$report"
exit $((failed > 0))
