#!/usr/bin/env bash
# From nothing to a model that chats, in about ten minutes on two CPU cores: bash scripts/quickstart.sh
# Interrupted and run again, it goes on where it was. OUT=DIR puts the weights elsewhere than out/.
set -euo pipefail
. "$(dirname "$0")/environment.sh" core
OUT=${OUT:-out}
began=$SECONDS
stage() { printf '\n== %s  (%d:%02d)\n' "$1" $(((SECONDS - began) / 60)) $(((SECONDS - began) % 60)); }

stage "1/5 starter corpus: a small bilingual world, written by a program"
python -m dataset.starter
stage "2/5 pretraining: from random weights to a model of text"
python train_pretrain.py --out_dir "$OUT" --from_resume 1
stage "3/5 supervised fine-tuning: the model learns to answer"
python train_full_sft.py --out_dir "$OUT" --from_resume 1
stage "4/5 scoreboard: held-out questions, exact answers"
python eval_model.py --model_mode 1 --out_dir "$OUT" --score dataset/starter_data/heldout.jsonl
stage "5/5 a short conversation"
echo 0 | python eval_model.py --model_mode 1 --out_dir "$OUT"
stage "done"
echo "Chat with it:  ${VIRTUAL_ENV:+. ${VIRTUAL_ENV#"$PWD"/}/bin/activate; }python eval_model.py --model_mode 1 --out_dir $OUT"
