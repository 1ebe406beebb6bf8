#!/usr/bin/env bash
# MiniMind2-Small's shape (26 M parameters), from download to chat:
#   bash recipes/minimind2_small.sh
#   TOY=1 bash recipes/minimind2_small.sh: a minute or two on a CPU
#
# 2.8 GB are downloaded, and about as much again is kept as tokens. About 0.8 billion tokens in all, in rows of 768.
# Hours on one card for both stages, computed by scripts/plan.py at 35 % of the peak, not measured:
#   3090 1.6    4090 0.7    A100-80 0.4    H100 0.1      (memory about 9 GB; lower --batch_size where it is less)
# The curve: the loss begins at ln(6400) = 8.8, the log of the vocabulary, falls steeply in the first few hundred steps,
# slowly after that, and once more at the end, when the learning rate falls to zero. It has not been run at this size.
NAME=minimind2_small
SHAPE="--preset small"
TOY_SHAPE="--hidden_size 64 --num_hidden_layers 2"
PRETRAIN="--epochs 1 --max_seq_len 768 --batch_size 32 --num_workers 2"
SFT="--epochs 1 --max_seq_len 768 --batch_size 32 --num_workers 2"
. "$(dirname "$0")/stages.sh"
