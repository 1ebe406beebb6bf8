"""Low-rank adaptation: the model learns something new in a small file of its own, its weights stay as they are.

python train_lora.py                                             # starter corpus: who it is, on out/full_sft_*.pth
python train_lora.py --lora_name lora_medical                    # another adapter for the same weights
python train_lora.py --lora_name mine --data_path FILE.jsonl     # {"conversations": [...]} lines
python eval_model.py --lora_name mine

W x becomes W x + alpha / rank * B A x in each linear layer; A and B alone are trained.
"""

import re
import sys

import torch

import cli
from cli import UsageError
from dataset.chat import load_tokenizer
from dataset.lm_dataset import sft_dataset
from dataset.starter import corpus as starter
from model.adapters import save_adapter
from model.model import LoRAConfig, add_lora
from trainer import trainer
from trainer.arguments import arguments as train_arguments
from trainer.optimizer import build_optimizers, state_bytes


def arguments():
    parser = train_arguments(
        "lora", __doc__, from_weight="full_sft", optimizer="adamw", weight_decay=0.0, val_tokens=4096, batch_size=2
    )
    config = LoRAConfig(rank=32, alpha=32)
    add = parser.add_argument_group("adapter").add_argument
    add("--lora_name", default="lora_identity", help="of the file, and of the starter corpus's data")
    add("--lora_rank", type=int, default=config.rank, help="columns of B and rows of A")
    add("--lora_alpha", type=float, default=config.alpha, help="the update is scaled by alpha / rank")
    add("--lora_dropout", type=float, default=config.dropout, help="share of its input that is dropped in training")
    add("--lora_targets", nargs="+", default=list(config.targets), metavar="LAYER", help="default: all projections")
    return parser.parse_args()


def loss_fn(model, batch):
    """Mean of -log p(next token) over the assistant's tokens, as in SFT; the gradient reaches the adapter alone."""
    out = model(batch["input_ids"], labels=batch["labels"], segment_ids=batch["segment_ids"])
    return trainer.with_balance(out, out.loss, {})


def adapt(run: trainer.Run) -> None:
    """Freeze the model and give it a new adapter; say what that saves."""
    args, model = run.args, run.model
    torch.manual_seed(args.seed)  # the same adapter on all processes: each keeps a share of its own under FSDP2
    before = state_bytes(build_optimizers(model, args.optimizer)), model.num_parameters()
    try:
        config = LoRAConfig(args.lora_rank, args.lora_alpha, args.lora_dropout, tuple(args.lora_targets))
        add_lora(model, args.lora_name, config)
    except ValueError as error:
        raise UsageError(f"--lora_{error}") from None
    torch.manual_seed(args.seed + run.rank)  # else all processes would drop the same inputs
    after = state_bytes(build_optimizers(model, args.optimizer)), model.num_parameters() - before[1]
    if run.is_main:
        print(
            f"{args.lora_name}: training {after[1]:,} parameters, {after[1] / before[1]:.1%} of the model's; optimizer "
            f"state {after[0] / 1e6:.2f} MB instead of the {before[0] / 1e6:.2f} MB of full fine-tuning",
            file=sys.stderr,
        )


def main():
    args = arguments()
    if not re.fullmatch(r"[\w-]+", args.lora_name):
        raise UsageError(f"--lora_name {args.lora_name}: it names a file; use letters, digits, _ and -")
    if args.data_path is None and args.lora_name not in starter.STAGES:
        known = ", ".join(name for name in starter.STAGES if name.startswith("lora_"))
        raise UsageError(
            f"--lora_name {args.lora_name}: the starter corpus has data for {known}; give your own with --data_path"
        )
    if args.from_weight == "none":
        raise UsageError("--from_weight none: an adapter needs trained weights to work on")
    run = trainer.setup(f"lora/{args.lora_name}", args, minutes=1.0)
    adapt(run)
    tokenizer = load_tokenizer()
    train_rows, val_rows = trainer.datasets(args, args.lora_name, sft_dataset, tokenizer)

    def save(path, model, meta):
        save_adapter(path, model, args.lora_name, meta)

    trainer.train(run, loss_fn, train_rows, val_rows, tokenizer, save)


if __name__ == "__main__":
    cli.run(main)
