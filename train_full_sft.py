"""Supervised fine-tuning: a pretrained model learns to answer in conversations.

python train_full_sft.py                                         # starter corpus, from out/pretrain_*.pth
python train_full_sft.py --data_path FILE.jsonl --epochs 2       # {"conversations": [...]} lines
"""

import cli
from dataset.chat import load_tokenizer
from dataset.lm_dataset import sft_dataset
from trainer import trainer
from trainer.arguments import arguments


def loss_fn(model, batch):
    """Mean of -log p(next token) over the assistant's tokens (its end marker included); all other labels are -100.

    A row packs several conversations; segment_ids keep each from attending to the others.
    """
    out = model(batch["input_ids"], labels=batch["labels"], segment_ids=batch["segment_ids"])
    return trainer.with_balance(out, out.loss, {})


def main():
    args = arguments("full_sft", __doc__, from_weight="pretrain", val_tokens=8192).parse_args()
    run = trainer.setup("full_sft", args, minutes=5.75)
    tokenizer = load_tokenizer()
    train_rows, val_rows = trainer.datasets(args, "sft", sft_dataset, tokenizer)

    trainer.train(run, loss_fn, train_rows, val_rows, tokenizer)


if __name__ == "__main__":
    cli.run(main)
