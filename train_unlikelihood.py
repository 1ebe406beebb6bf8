"""Unlikelihood training: the model unlearns to say the same thing again (Welleck et al. 2019, arXiv:1908.04319).

python train_unlikelihood.py                                     # starter corpus, from out/pretrain_*.pth
python train_unlikelihood.py --data_path FILE.jsonl --epochs 1 --ngram 4 --alpha 1.0       # {"text": ...} lines

An example of a stage of your own: its loss, its data and the loop are in this file, the rest comes with the run.
"""

from functools import partial

import torch

import cli
from dataset.lm_dataset import IGNORE, pretrain_dataset
from trainer.arguments import arguments
from trainer.run import Run
from trainer.speed import cross_entropy


def repeated_ngrams(tokens, n):
    """Which tokens (B, T) end an n-gram that stood in the same row before: (B, T) bool."""
    B, T = tokens.shape
    if T < n:
        return torch.zeros_like(tokens, dtype=torch.bool)
    grams = tokens.unfold(1, n, 1)  # (B, T - n + 1, n)
    same = (grams[:, :, None] == grams[:, None]).all(-1)  # (B, later, earlier)
    again = same.tril(-1).any(-1)  # (B, T - n + 1)
    return torch.cat([again.new_zeros(B, n - 1), again], dim=1)


def unlikelihood_loss(model, batch, n, alpha):
    """Cross-entropy of the text - alpha * mean log(1 - p(y)) over the tokens y that the model itself would say, where
    y would end an n-gram for the second time. In the paper y is sampled; here it is the likeliest token after the true
    text, which needs no decoding."""
    labels = batch["labels"]  # (B, T)
    trained = labels != IGNORE
    out = model(batch["input_ids"])  # logits (B, T, vocab)
    likelihood = cross_entropy(out.logits[trained], labels[trained])
    log_p, said = out.logits.float().log_softmax(-1).max(-1)  # (B, T) both
    repeats = repeated_ngrams(said, n) & trained
    unlikelihood = -(log_p[repeats].exp().clamp(max=1 - 1e-5).neg().log1p()).sum() / max(int(trained.sum()), 1)
    metrics = {"cross_entropy": likelihood.detach(), "repeats": repeats.sum() / trained.sum().clamp(min=1)}
    return likelihood + alpha * unlikelihood + out.aux_loss, out.metrics | metrics


def main():
    parser = arguments("unlikelihood", __doc__, from_weight="pretrain", val_tokens=8192)
    parser.add_argument("--ngram", type=int, default=4, help="tokens that count as a repetition")
    parser.add_argument("--alpha", type=float, default=1.0, help="weight of the unlikelihood")
    args = parser.parse_args()
    if args.ngram < 1 or args.alpha < 0:
        raise cli.UsageError("--ngram must be at least 1, --alpha at least 0")
    run = Run("unlikelihood", args, minutes=1.0, rate=0.1)
    train_rows, val_rows = run.rows(pretrain_dataset, "pretrain")
    loss_fn = partial(unlikelihood_loss, n=args.ngram, alpha=args.alpha)

    for micro_batches in run.steps(train_rows):
        if run.validation_due:
            run.validate(loss_fn, val_rows)
        for batch in micro_batches:
            loss, metrics = loss_fn(run.model, batch)
            run.backward(loss, batch)
        run.update(metrics)
    run.validate(loss_fn, val_rows)
    run.finish()


if __name__ == "__main__":
    cli.run(main)
