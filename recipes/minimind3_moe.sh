#!/usr/bin/env bash
# MiniMind-3's mixture of experts (198 M parameters, 64 M active), from download to chat:
#   bash recipes/minimind3_moe.sh
#   TOY=1 bash recipes/minimind3_moe.sh: a minute or two on a CPU
#
# 2.8 GB are downloaded, and about as much again is kept as tokens. About 0.8 billion tokens in all, in rows of 768.
# Hours on one card for both stages, computed by scripts/plan.py at 35 % of the peak, not measured:
#   3090 3.8    4090 1.6    A100-80 0.9    H100 0.3      (memory about 17 GB; lower --batch_size where it is less)
# The curve: the loss begins at ln(6400) = 8.8, the log of the vocabulary, falls steeply in the first few hundred steps,
# slowly after that, and once more at the end, when the learning rate falls to zero. It has not been run at this size.
NAME=minimind3_moe
SHAPE="--preset v3-moe"
TOY_SHAPE="--hidden_size 64 --num_hidden_layers 2 --use_moe 1"
PRETRAIN="--epochs 1 --max_seq_len 768 --batch_size 32 --num_workers 2"
SFT="--epochs 1 --max_seq_len 768 --batch_size 32 --num_workers 2"
. "$(dirname "$0")/stages.sh"
