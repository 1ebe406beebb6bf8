# The stages that the recipes share; each sets NAME, SHAPE, TOY_SHAPE, PRETRAIN, SFT and sources this file.
# TOY=1: small files of the repository and a tiny model, a minute or two. OUT: the folder of the weights.
# Interrupted and run again, it goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-out}/$NAME${TOY:+_toy}
title() { printf '\n== %s: %s\n' "$NAME" "$1"; }

# FILE -> FILE.val, its first lines, and FILE.train, the others.
hold_out() {
    [ -s "$1.train" ] && [ "$1.train" -nt "$1" ] && return
    head -n 1000 "$1" > "$1.val"
    tail -n +1001 "$1" > "$1.part"
    mv "$1.part" "$1.train"
}

if [ -n "${TOY:-}" ]; then
    title "1/5 the starter corpus, in place of a download"
    "$python" -c 'from dataset.starter.corpus import ensure_starter; ensure_starter()'
    starter=dataset/starter_data
    pretrain_data=(--data_path "$starter/pretrain.jsonl:3" tests/fixtures/real_text/texts.jsonl:1
        --val_path "$starter/pretrain_val.jsonl")
    sft_data=(--data_path "$starter/sft.jsonl:2" "$starter/reason.jsonl:1" --val_path "$starter/sft_val.jsonl")
    SHAPE=$TOY_SHAPE
    PRETRAIN="--steps ${TOY_STEPS:-60} --max_seq_len 128 --batch_size 8 --compile 0"
    SFT=$PRETRAIN
else
    title "1/5 download"
    "$python" scripts/download_data.py pretrain_mini sft_mini
    title "2/5 a thousand rows apart, to validate on"
    hold_out data/pretrain_t2t_mini.jsonl
    hold_out data/sft_t2t_mini.jsonl
    pretrain_data=(--data_path data/pretrain_t2t_mini.jsonl.train --val_path data/pretrain_t2t_mini.jsonl.val)
    sft_data=(--data_path data/sft_t2t_mini.jsonl.train --val_path data/sft_t2t_mini.jsonl.val)
fi

# The flags in SHAPE, PRETRAIN and SFT are words, to be split.
title "3/5 pretraining"
"$python" train_pretrain.py $SHAPE $PRETRAIN "${pretrain_data[@]}" --out_dir "$out" --from_resume 1
title "4/5 supervised fine-tuning"
"$python" train_full_sft.py $SFT "${sft_data[@]}" --out_dir "$out" --from_resume 1 \
    --from_weight "$(ls -t "$out"/pretrain_*.pth | head -n 1)"
title "5/5 chat"
model=$(ls -t "$out"/full_sft_*.pth | head -n 1)
if [ -n "${TOY:-}" ]; then
    "$python" eval_model.py --model "$model" --ask "你好，你是谁？" --max_new_tokens 30 --temperature 0
else
    "$python" eval_model.py --model "$model"
fi
