"""Pretraining: from random weights to a model of text, by predicting each next token.

python train_pretrain.py                                                   # starter corpus, nano, minutes on a laptop
python train_pretrain.py --preset small --data_path FILE.jsonl --epochs 2 --max_seq_len 512   # {"text": ...} lines
torchrun --nproc_per_node 2 train_pretrain.py ...                          # several devices
"""

import cli
from dataset.chat import load_tokenizer
from dataset.lm_dataset import pretrain_dataset
from trainer import trainer
from trainer.arguments import arguments


def loss_fn(model, batch):
    """Mean of -log p(next token) over all tokens; a MoE adds its load-balancing loss."""
    out = model(batch["input_ids"], labels=batch["labels"])
    return trainer.with_balance(out, out.loss, {})


def main():
    args = arguments("pretrain", __doc__, val_tokens=8192).parse_args()
    run = trainer.setup("pretrain", args, minutes=2.75)
    tokenizer = load_tokenizer()
    train_rows, val_rows = trainer.datasets(args, "pretrain", pretrain_dataset, tokenizer)

    trainer.train(run, loss_fn, train_rows, val_rows, tokenizer)


if __name__ == "__main__":
    cli.run(main)
