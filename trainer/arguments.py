"""The command line that all train_*.py share, and what it says: the budget, the model to begin with.

args = arguments("pretrain", __doc__).parse_args()
"""

import argparse
import math
from pathlib import Path

from cli import ArgumentParser, UsageError, seed
from dataset.lm_dataset import training_data
from dataset.sources import Source
from dataset.tokenizer import TOKENIZER_DIR, ChatTokenizer, load_tokenizer
from model import checkpoint
from model.device import DTYPES
from model.model import PRESETS, MiniMindConfig, MiniMindLM
from trainer.optimizer import LEARNING_RATES
from trainer.progress import Budget
from trainer.trackers import TRACKERS

ROOT = Path(__file__).resolve().parent.parent


def arguments(stage: str, description: str, **defaults) -> argparse.ArgumentParser:
    """The flags that all train scripts have; `defaults` replaces the values that differ from stage to stage."""
    parser = ArgumentParser(description=description)
    add = parser.add_argument_group("model").add_argument
    add("--preset", choices=list(PRESETS), help="shape of a new model (default: nano)")
    add("--hidden_size", type=int, help="instead of the preset's")
    add("--num_hidden_layers", type=int, help="instead of the preset's")
    add("--use_moe", type=int, choices=(0, 1), default=0, help="1 = 4 experts in place of each feed-forward")
    add("--from_weight", default="none", help="weights to start from: a stage such as pretrain, a path, or none")
    add("--tokenizer", metavar="FOLDER", help="of a new model, or of weights that do not say theirs (default: the one "
        "that the weights carry, else model/tokenizer)")  # fmt: skip

    add = parser.add_argument_group("data").add_argument
    add("--data_path", nargs="+", metavar="SOURCE", help="JSONL or Parquet file, 'PATTERN' or folder; several with "
        "weights: a.jsonl:2 b.jsonl:1 (default: the starter corpus)")  # fmt: skip
    add("--val_path", help="held-out JSONL file (default: the starter corpus's, or none with your own --data_path)")
    add("--eval_tasks", metavar="FILE", help="JSONL of multiple-choice questions, such as "
        "evaluation/questions/everyday.jsonl: at each validation, bits per byte of the right answers, and a few "
        "answers")  # fmt: skip
    add("--max_seq_len", type=int, default=256, help="tokens in a row")
    add("--num_workers", type=int, default=0, help="processes that prepare batches")
    add("--val_tokens", type=int, default=32_768, help="validate on at most this many tokens, 0 = all")

    add = parser.add_argument_group(
        "budget (the first that is used up ends the run; default: a few minutes, or one epoch of your own --data_path)"
    ).add_argument
    add("--epochs", type=float, help="passes over the data")
    add("--steps", type=int, help="optimizer steps")
    add("--minutes", type=float, help="wall-clock minutes of training, compilation included")

    add = parser.add_argument_group("optimization").add_argument
    add("--batch_size", type=int, default=16, help="rows per step, process and accumulation")
    add("--accumulation_steps", type=int, default=1, help="batches whose gradients make one step")
    add("--optimizer", choices=list(LEARNING_RATES), default="muon")
    rates = ", ".join(f"{rate:g} for {name}" for name, rate in LEARNING_RATES.items())
    add(
        "--learning_rate",
        type=float,
        help=f"default: 256 / hidden_size times {rates}; less for DPO, reasoning and unlikelihood",
    )
    add("--weight_decay", type=float, default=0.1)
    add("--warmup", type=float, default=0.02, help="share of the budget in which the learning rate rises")
    add("--decay", type=float, default=0.8, help="share of the budget, at its end, in which it falls to zero")
    add("--grad_clip", type=float, default=1.0, help="largest norm of the gradient")
    add("--seed", type=seed, default=42)

    add = parser.add_argument_group("machine").add_argument
    add("--device", help="cuda, mps or cpu (default: the best one found)")
    add("--dtype", choices=list(DTYPES), help="precision of the arithmetic (default: bf16 where the hardware does it)")
    add("--activation_checkpointing", type=int, choices=(0, 1), default=0, help="1 = less memory, a third more time")
    add("--fsdp", action="store_true", help="under torchrun: share out weights and optimizer (FSDP2)")
    add("--deepspeed", metavar="FILE", help="under torchrun or deepspeed: ZeRO, e.g. configs/zero2.json")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher gives it; LOCAL_RANK is what counts
    add("--compile", choices=("auto", "0", "1"), default="auto", help="torch.compile; auto = if the run is long enough")

    add = parser.add_argument_group("output").add_argument
    add("--out_dir", default=str(ROOT / "out"))
    add("--cache_dir", metavar="FOLDER", help="for tokens and compiled code, which can be made again (default: "
        "MINIMIND_CACHE, else out/cache, or the user's cache folder where that cannot be written to)")  # fmt: skip
    add("--save_weight", metavar="NAME", help=f"write out_dir/NAME_HIDDEN.pth (default: {stage})")
    add("--from_resume", type=int, choices=(0, 1), default=0, help="1 = go on where an interrupted run was")
    add("--save_interval", type=int, default=0, help="steps between resume states (default: every two minutes)")
    add("--keep", type=int, default=1, help="resume states to keep")
    add("--val_interval", type=int, default=0, help="steps between validations (default: ten in a run)")
    add("--log_interval", type=int, default=10, help="steps between lines of the metrics log")
    add("--tracker", choices=list(TRACKERS), help="log there too; all but wandb keep it in out_dir, without an account")
    add("--use_wandb", action="store_true", help="as --tracker wandb (WANDB_MODE=offline works)")
    add("--wandb_project", default="MiniMind", help="project of any tracker (default: MiniMind)")
    parser.set_defaults(**defaults)
    return parser


def check(args: argparse.Namespace) -> None:
    """UsageError for a number that makes no sense, or a path that is none."""
    if isinstance(args.data_path, list) and len(args.data_path) == 1:
        [args.data_path] = args.data_path
    for name in ("data_path", "val_path", "out_dir", "from_weight"):
        value = getattr(args, name)
        if value == "" or isinstance(value, list) and "" in value:
            raise UsageError(f"--{name} is empty: give a path, or leave it out")
    if args.use_wandb and args.tracker not in (None, "wandb"):
        raise UsageError(f"--use_wandb and --tracker {args.tracker}: one tracker at a time, leave one out")
    lowest = dict.fromkeys(("batch_size", "accumulation_steps", "log_interval", "max_seq_len", "keep"), 1)
    lowest |= dict.fromkeys(("hidden_size", "num_hidden_layers", "steps"), 1)
    lowest |= dict.fromkeys(("num_workers", "val_tokens", "save_interval", "val_interval"), 0)
    lowest |= dict.fromkeys(("weight_decay", "warmup", "decay"), 0)
    for name, low in lowest.items():
        value = getattr(args, name)
        if value is not None and not value >= low:
            raise UsageError(f"--{name} {value}: must be at least {low}")
    for name, high in {"num_workers": 1024, "batch_size": 1 << 16, "accumulation_steps": 1 << 20}.items():
        if getattr(args, name) > high:  # a slip that would not end, or end the machine
            raise UsageError(f"--{name} {getattr(args, name)}: must be at most {high}")
    for name in ("epochs", "minutes", "learning_rate", "grad_clip"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise UsageError(f"--{name} {value}: must be above 0")
    for name in ("epochs", "minutes", "learning_rate", "weight_decay"):
        if getattr(args, name) == math.inf:
            raise UsageError(f"--{name} inf: must be a finite number")
    for name in ("warmup", "decay"):
        if getattr(args, name) > 1:
            raise UsageError(f"--{name} {getattr(args, name)}: it is a share of the run, at most 1")


def budget_of(args: argparse.Namespace, minutes: float) -> Budget:
    """What the flags say; without any, `minutes` on the starter corpus and one epoch of your own data."""
    if args.epochs is args.steps is args.minutes is None:
        args.minutes, args.epochs = (minutes, None) if args.data_path is None else (None, 1.0)
    return Budget(args.steps, args.epochs, args.minutes)


def zero_config_of(args: argparse.Namespace) -> dict | None:
    """The configuration of --deepspeed, None without. ZeRO 3 switches --compile off."""
    if not args.deepspeed:
        return None
    if args.fsdp:
        raise UsageError("--fsdp and --deepspeed are two ways to do the same: leave one out")
    from trainer import zero

    config = zero.zero_config(args.deepspeed, args.batch_size, args.accumulation_steps, args.grad_clip)
    zero.check_flags(config, args.deepspeed, args.optimizer, args.compile)
    if config["zero_optimization"]["stage"] == 3:
        args.compile = "0"
    return config


def data_paths(args: argparse.Namespace, starter: str) -> list[str | Path | list[Source] | None]:
    """--data_path, a file or sources, and --val_path (None without), or the starter corpus' files of that name."""
    if args.data_path is not None:
        texts = args.data_path if isinstance(args.data_path, list) else [args.data_path]
        return [training_data(list(map(str, texts))), args.val_path]
    from dataset.starter.corpus import ensure_starter

    folder = ensure_starter()
    if not (folder / f"{starter}.jsonl").exists():
        known = ", ".join(path.stem.removesuffix("_val") for path in sorted(folder.glob("*_val.jsonl")))
        raise UsageError(f"the starter corpus has no {starter} (there are {known}): give --data_path")
    return [folder / f"{starter}.jsonl", args.val_path or folder / f"{starter}_val.jsonl"]


def starting_model(args: argparse.Namespace) -> tuple[MiniMindLM, ChatTokenizer, Path | None]:
    """The weights of --from_weight, their tokenizer and their path; or a new model of the shape that the flags give."""
    if args.from_weight == "none":
        tokenizer = load_tokenizer(args.tokenizer or TOKENIZER_DIR)
        return MiniMindLM(new_config(args, tokenizer)), tokenizer, None
    path = checkpoint.find_weights(args.out_dir, args.from_weight, args.hidden_size, bool(args.use_moe))
    model, _ = checkpoint.load(path)
    tokenizer = checkpoint.tokenizer_of(path, args.tokenizer)
    checkpoint.require_fit(tokenizer, model.config, path)
    has = {name: getattr(model.config, name) for name in ("hidden_size", "num_hidden_layers", "num_experts")}
    wanted = {name: getattr(PRESETS[args.preset], name) for name in has} if args.preset else {}
    wanted |= {name: vars(args)[name] for name in ("hidden_size", "num_hidden_layers") if vars(args)[name]}
    if any(has[name] != value for name, value in wanted.items()) or (args.use_moe and not model.config.is_moe):
        sizes = ", ".join(f"{name} {value}" for name, value in has.items())
        flags = [f"--{name}" for name in ("preset", "hidden_size", "num_hidden_layers") if vars(args)[name]]
        flags = " and ".join(flags + ["--use_moe"] * args.use_moe)
        raise UsageError(f"{flags} cannot change the shape of {path}, which has {sizes}: leave out {flags}")
    return model.train(), tokenizer, path


def new_config(args: argparse.Namespace, tokenizer: ChatTokenizer) -> MiniMindConfig:
    """The preset's, with what the tokenizer and other flags change. UsageError if the sizes do not fit each other."""
    values = PRESETS[args.preset or "nano"].to_dict() | {"vocab_size": tokenizer.vocab_size}
    values |= {f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in ("bos", "eos", "pad")}
    if args.hidden_size and args.hidden_size != values["hidden_size"]:
        # Keep the proportions: the SwiGLU widths are about 8/3 of hidden_size, in multiples of 64.
        values |= {"hidden_size": args.hidden_size, "head_dim": None}
        values["intermediate_size"] = 64 * math.ceil(args.hidden_size * 8 / 3 / 64)
    if args.num_hidden_layers:
        values["num_hidden_layers"] = args.num_hidden_layers
    if args.use_moe and not values["num_experts"]:
        values |= {"num_experts": 4, "num_experts_per_tok": 1, "qk_norm": True}
    try:
        return MiniMindConfig.from_dict(values)
    except ValueError as error:
        raise UsageError(str(error)) from None
