"""Pretraining: from random weights to a model of text, by predicting each next token.

python train_pretrain.py                                                   # starter corpus, nano, minutes on a laptop
python train_pretrain.py --preset small --data_path FILE.jsonl --epochs 2 --max_seq_len 512   # {"text": ...} lines
torchrun --nproc_per_node 2 train_pretrain.py ...                          # several devices
"""

import cli
from dataset.lm_dataset import IGNORE, pretrain_dataset
from trainer.arguments import arguments
from trainer.run import Run
from trainer.speed import cross_entropy


def pretrain_loss(model, batch):
    """Mean of -log p(next token | all tokens before it in the row); a MoE adds its load-balancing loss.

    A row is full of text: documents stand in it one after the other, each after an <|endoftext|>."""
    labels = batch["labels"]  # (B, T): labels[b, t] follows input_ids[b, t]
    has_label = labels != IGNORE
    out = model(batch["input_ids"], logits_at=has_label)  # logits (N, vocab)
    loss = cross_entropy(out.logits, labels[has_label])
    return loss + out.aux_loss, out.metrics


def main():
    args = arguments("pretrain", __doc__, val_tokens=8192).parse_args()
    run = Run("pretrain", args, minutes=2.75)
    train_rows, val_rows = run.rows(pretrain_dataset, "pretrain")

    for micro_batches in run.steps(train_rows):  # until the budget is used up, from where a killed run stood
        if run.validation_due:
            run.validate(pretrain_loss, val_rows)
        for batch in micro_batches:  # on the device, in the precision of the run
            loss, metrics = pretrain_loss(run.model, batch)
            run.backward(loss, batch)  # every token counts the same
        run.update(metrics)  # clip, step, schedule; log and save when due
    run.validate(pretrain_loss, val_rows)
    run.finish()  # weights and loss curve


if __name__ == "__main__":
    cli.run(main)
