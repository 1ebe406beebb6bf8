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
    """Mean of -log p(next token | all tokens before it); a MoE adds its load-balancing loss."""
    labels = batch["labels"]  # (B, T): labels[b, t] follows input_ids[b, t]
    trained = labels != IGNORE
    out = model(batch["input_ids"], logits_at=trained)  # logits (N, vocab)
    loss = cross_entropy(out.logits, labels[trained])
    return loss + out.aux_loss, out.metrics


def main():
    args = arguments("pretrain", __doc__, val_tokens=8192).parse_args()
    run = Run("pretrain", args, minutes=2.75)
    train_rows, val_rows = run.rows(pretrain_dataset, "pretrain")

    for micro_batches in run.steps(train_rows):
        if run.validation_due:
            run.validate(pretrain_loss, val_rows)
        for batch in micro_batches:
            loss, metrics = pretrain_loss(run.model, batch)
            run.backward(loss, batch)
        run.update(metrics)
    run.validate(pretrain_loss, val_rows)
    run.finish()


if __name__ == "__main__":
    cli.run(main)
