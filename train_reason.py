"""Reasoning: the model learns to write its steps between <think> and </think> before it answers.

python train_reason.py                                         # starter problems, from out/full_sft_*.pth
python train_reason.py --data_path FILE.jsonl --epochs 2       # {"conversations": [...]} with "reasoning_content"
python eval_model.py --model_mode 3                            # think, then answer; --thinking 0 = at once
"""

import copy
from functools import partial

import cli  # first: it takes Ctrl-C while the rest is imported

# isort: split
import torch
import torch.nn.functional as F

from dataset.lm_dataset import IGNORE, sft_dataset
from dataset.tokenizer import END_THINK, END_TOOL_CALL, THINK, TOOL_CALL
from trainer.arguments import arguments
from trainer.run import Run

WEIGHTED = (THINK, END_THINK, TOOL_CALL, END_TOOL_CALL)


def reason_loss(model, batch, marker_ids, marker_weight):
    """Cross-entropy over the tokens of thinking and answer, in which the four markers count `marker_weight` times.

    The sum is divided by the number of tokens, not of weights: the rest is learnt as in plain SFT, and only the format
    harder. A thinking block that never closes costs the whole answer, and its marker is one token in a hundred."""
    labels = batch["labels"]  # (B, T)
    has_label = labels != IGNORE
    labels = labels[has_label]  # (N,)
    out = model(batch["input_ids"], segment_ids=batch["segment_ids"], logits_at=has_label)  # logits (N, vocab)
    losses = F.cross_entropy(out.logits.float(), labels, reduction="none")  # (N,)
    is_marker = torch.isin(labels, torch.tensor(marker_ids, device=labels.device))
    count = max(len(labels), 1)
    loss = (losses * torch.where(is_marker, marker_weight, 1.0)).sum() / count
    return loss + out.aux_loss, out.metrics | {"cross_entropy": losses.detach().sum() / count}


def parse_arguments():
    # Rows as long as the chats that keep the model's other skills alive.
    parser = arguments("reason", __doc__, from_weight="full_sft", batch_size=2, max_seq_len=1024)
    add = parser.add_argument_group("reasoning").add_argument
    add("--marker_weight", type=float, default=10.0, help="of <think>, </think> and the tool markers")
    add("--start_share", type=float, default=0.5, help="of the weights it begins with, in the mean that is written")
    args = parser.parse_args()
    if not args.marker_weight > 0:
        raise cli.UsageError(f"--marker_weight {args.marker_weight}: must be above 0")
    if not 0 <= args.start_share < 1:
        raise cli.UsageError(f"--start_share {args.start_share}: must be at least 0 and below 1")
    return args


def main():
    args = parse_arguments()
    run = Run("reason", args, minutes=2.25, learning_rate_factor=0.8)
    start = copy.deepcopy(run.model).cpu().state_dict()
    train_rows, val_rows = run.rows(sft_dataset, "reason")
    marker_ids = [run.tokenizer.marker_ids[marker] for marker in WEIGHTED if marker in run.tokenizer.marker_ids]
    loss_fn = partial(reason_loss, marker_ids=marker_ids, marker_weight=args.marker_weight)

    for micro_batches in run.steps(train_rows):
        if run.validation_due:
            run.validate(loss_fn, val_rows)
        for batch in micro_batches:
            loss, metrics = loss_fn(run.model, batch)
            run.backward(loss, batch)
        run.update(metrics)
    run.average_with(start, args.start_share)
    run.validate(loss_fn, val_rows)
    run.finish()


if __name__ == "__main__":
    cli.run(main)
