"""Unlikelihood training: the model unlearns to say the same thing again (Welleck et al. 2019, arXiv:1908.04319).

python train_unlikelihood.py                                     # starter corpus, from out/pretrain_*.pth
python train_unlikelihood.py --data_path FILE.jsonl --epochs 1 --ngram 4 --alpha 1.0       # {"text": ...} lines

An example of a stage of your own: its loss, its data and the loop are in this file, the rest comes with the run.
"""

from functools import partial

import cli  # first: it takes Ctrl-C while the rest is imported

# isort: split
import torch

from dataset.lm_dataset import IGNORE, pretrain_dataset
from trainer.arguments import arguments
from trainer.run import Run
from trainer.speed import cross_entropy


def repeats(input_ids, said, n):
    """Where said[b, t], put after input_ids[b, : t + 1], would end an n-gram that stands there already: (B, T) bool."""
    B, T = input_ids.shape
    if T < n:
        return torch.zeros_like(input_ids, dtype=torch.bool)
    before = input_ids.unfold(1, n - 1, 1)  # (B, L, n - 1), L = T - n + 2: what the last token of an n-gram follows
    same = (before[:, :, None] == before[:, None]).all(-1)  # (B, L, L): now, earlier
    followed_by = torch.cat([input_ids[:, n - 1 :], input_ids.new_full((B, 1), -1)], dim=1)  # (B, L)
    again = same & (said[:, n - 2 :, None] == followed_by[:, None])
    return torch.cat([again.new_zeros(B, n - 2), again.tril(-1).any(-1)], dim=1)


def unlikelihood_loss(model, batch, n, alpha):
    """Cross-entropy of the text - alpha * mean log(1 - p(y)) where y, the token that the model holds likeliest, is not
    the text's and would repeat an n-gram: the paper's token-level loss, of its candidates those that greedy decoding
    would say."""
    labels = batch["labels"]  # (B, T)
    has_label = labels != IGNORE
    out = model(batch["input_ids"])  # logits (B, T, vocab)
    likelihood = cross_entropy(out.logits[has_label], labels[has_label])
    log_p, said = out.logits.float().log_softmax(-1).max(-1)  # (B, T) both
    wrong = repeats(batch["input_ids"], said, n) & has_label & (said != labels)
    count = has_label.sum().clamp(min=1)
    unlikelihood = -(-log_p[wrong].exp().clamp(max=1 - 1e-5)).log1p().sum() / count
    metrics = {"cross_entropy": likelihood.detach(), "repeats": wrong.sum() / count}
    return likelihood + alpha * unlikelihood + out.aux_loss, out.metrics | metrics


def main():
    parser = arguments("unlikelihood", __doc__, from_weight="pretrain", val_tokens=8192)
    parser.add_argument("--ngram", type=int, default=4, help="tokens that count as a repetition")
    parser.add_argument("--alpha", type=float, default=1.0, help="weight of the unlikelihood")
    args = parser.parse_args()
    if args.ngram < 2 or args.alpha < 0:
        raise cli.UsageError("--ngram must be at least 2, --alpha at least 0")
    run = Run("unlikelihood", args, minutes=1.0, learning_rate_factor=0.16)
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
