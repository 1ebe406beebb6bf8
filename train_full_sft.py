"""Supervised fine-tuning: a pretrained model learns to answer in conversations.

python train_full_sft.py                                         # starter corpus, from out/pretrain_*.pth
python train_full_sft.py --data_path FILE.jsonl --epochs 2       # {"conversations": [...]} lines
"""

import cli
from dataset.lm_dataset import IGNORE, sft_dataset
from trainer.arguments import arguments
from trainer.run import Run
from trainer.speed import cross_entropy


def sft_loss(model, batch):
    """Mean of -log p(next token) over the assistant's tokens, its end marker included.

    A row packs several conversations; segment_ids keep each from attending to the others."""
    labels = batch["labels"]  # (B, T), -100 for all that the assistant did not write
    has_label = labels != IGNORE
    out = model(batch["input_ids"], segment_ids=batch["segment_ids"], logits_at=has_label)  # logits (N, vocab)
    loss = cross_entropy(out.logits, labels[has_label])
    return loss + out.aux_loss, out.metrics


def main():
    args = arguments("full_sft", __doc__, from_weight="pretrain", val_tokens=8192).parse_args()
    run = Run("full_sft", args, minutes=5.75)
    train_rows, val_rows = run.rows(sft_dataset, "sft")

    for micro_batches in run.steps(train_rows):
        if run.validation_due:
            run.validate(sft_loss, val_rows)
        for batch in micro_batches:
            loss, metrics = sft_loss(run.model, batch)
            run.backward(loss, batch)
        run.update(metrics)
    run.validate(sft_loss, val_rows)
    run.finish()


if __name__ == "__main__":
    cli.run(main)
