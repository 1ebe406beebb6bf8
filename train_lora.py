"""Low-rank adaptation: the model learns something new in a small file of its own, its weights stay as they are.

python train_lora.py                                             # starter corpus: who it is, on out/full_sft_*.pth
python train_lora.py --lora_name lora_medical                    # another adapter for the same weights
python train_lora.py --lora_name mine --data_path FILE.jsonl     # {"conversations": [...]} lines
python eval_model.py --lora_name mine

W x becomes W x + alpha / rank * B A x in each linear layer; A and B alone are trained.
"""

import re
import sys

import cli  # first: it takes Ctrl-C while the rest is imported

# isort: split
import torch

from dataset.lm_dataset import IGNORE, sft_dataset
from model.adapters import save_adapter
from model.model import LoRAConfig, add_lora
from trainer.arguments import arguments
from trainer.run import Run
from trainer.speed import cross_entropy


def lora_loss(model, batch):
    """Mean of -log p(next token) over the assistant's tokens, as in SFT; the gradient reaches the adapter alone."""
    labels = batch["labels"]  # (B, T), -100 for all that the assistant did not write
    has_label = labels != IGNORE
    out = model(batch["input_ids"], segment_ids=batch["segment_ids"], logits_at=has_label)  # logits (N, vocab)
    loss = cross_entropy(out.logits, labels[has_label])
    return loss + out.aux_loss, out.metrics


def adapt(run: Run) -> None:
    """Freeze the model and give it a new adapter; say how small that is."""
    args, model = run.args, run.model
    before = model.num_parameters()
    torch.manual_seed(args.seed)  # the same adapter on all processes: each keeps a share of its own under FSDP2
    try:
        config = LoRAConfig(args.lora_rank, args.lora_alpha, args.lora_dropout, tuple(args.lora_targets))
        add_lora(model, args.lora_name, config)
    except ValueError as error:
        raise cli.UsageError(f"--lora_{error}") from None
    torch.manual_seed(args.seed + run.processes.rank)  # else all processes would drop the same inputs
    if run.processes.is_main:
        added = model.num_parameters() - before
        print(f"{args.lora_name}: training {added:,} parameters, {added / before:.1%} of the model's", file=sys.stderr)


def parse_arguments():
    parser = arguments(
        "lora", __doc__, from_weight="full_sft", optimizer="adamw", weight_decay=0.0, val_tokens=4096, batch_size=2
    )
    config = LoRAConfig(rank=32, alpha=32)
    add = parser.add_argument_group("adapter").add_argument
    add("--lora_name", default="lora_identity", help="of the file, and of the starter corpus's data")
    add("--lora_rank", type=int, default=config.rank, help="columns of B and rows of A")
    add("--lora_alpha", type=float, default=config.alpha, help="the update is scaled by alpha / rank")
    add("--lora_dropout", type=float, default=config.dropout, help="share of its input that is dropped in training")
    add("--lora_targets", nargs="+", default=list(config.targets), metavar="LAYER", help="default: all projections")
    args = parser.parse_args()
    if not re.fullmatch(r"[\w-]+", args.lora_name):
        raise cli.UsageError(f"--lora_name {args.lora_name}: it names a file; use letters, digits, _ and -")
    if args.from_weight == "none":
        raise cli.UsageError("--from_weight none: an adapter needs trained weights to work on")
    return args


def main():
    args = parse_arguments()
    run = Run(f"lora/{args.lora_name}", args, minutes=1.0)
    adapt(run)
    train_rows, val_rows = run.rows(sft_dataset, args.lora_name)

    for micro_batches in run.steps(train_rows):
        if run.validation_due:
            run.validate(lora_loss, val_rows)
        for batch in micro_batches:
            loss, metrics = lora_loss(run.model, batch)
            run.backward(loss, batch)
        run.update(metrics)
    run.validate(lora_loss, val_rows)

    def save(path, model, meta, tokenizer):
        save_adapter(path, model, args.lora_name, meta, tokenizer)

    run.finish(save)


if __name__ == "__main__":
    cli.run(main)
