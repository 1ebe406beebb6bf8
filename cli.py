"""What all command lines here share: the parser, flags of 0 and 1, and how a script ends when something is wrong.

parser = cli.ArgumentParser(description=__doc__)
if __name__ == "__main__": cli.run(main)
"""

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parent
MAX_SEED = 2**63 - 1  # torch and numpy take it, and a few more for the numbers of processes
MEMORY_REMEDIES = {  # by the flag that a script must have
    "--batch_size": "lower --batch_size",
    "--accumulation_steps": "raise --accumulation_steps by as much",
    "--activation_checkpointing": "give --activation_checkpointing 1",
    "--quantize": "give --quantize int8",
    "--slots": "lower --slots",
    "--max_seq_len": "lower --max_seq_len",
    "--from_resume": "with another batch too, --from_resume 1 goes on from the last state, if there is one",
}
at_exit = contextlib.ExitStack()  # what run() puts in order, however the script ends
known_flags: set[str] = set()  # of the script that runs


def _stop_while_importing(number: int, frame: object) -> NoReturn:
    """No exception: the package that is being imported might take it for a fault of its own."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"error: stopped\n")
    os._exit(130)


def _take_ctrl_c() -> None:
    """From the import of this module to run(), if a script of ours is what runs."""
    script = sys.modules["__main__"]
    folder = Path(getattr(script, "__file__", None) or "/").resolve().parent
    ours = script.__name__ == "__main__" and folder in (ROOT, ROOT / "scripts")
    if ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGINT, _stop_while_importing)


_take_ctrl_c()
# Threads that wait for others do so asleep rather than spinning for milliseconds: with another busy process on the
# machine a training step would take several times as long. OpenMP reads it when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


class UsageError(Exception):
    """Arguments that do not fit together; run() prints it and exits with 2."""


class ArgumentParser(argparse.ArgumentParser):
    """Descriptions as they are written, no abbreviations, one line for a mistake."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def parse_args(self, *arguments, **options) -> argparse.Namespace:
        known_flags.update(self._option_string_actions)
        return super().parse_args(*arguments, **options)

    def error(self, message: str) -> NoReturn:
        import difflib  # here, so that Ctrl-C is taken a little sooner

        _, _, unknown = message.partition("unrecognized arguments: ")
        name = unknown.partition(" ")[0].partition("=")[0].strip("-")
        near = difflib.get_close_matches(name, [flag.strip("-") for flag in self._option_string_actions], 1, cutoff=0.7)
        meant = f" (did you mean --{near[0]}?)" if near else ""
        self.exit(2, f"error: {message}{meant}; --help lists what there is\n")


def flag(text: str) -> bool:
    """The type of a flag that is 0 or 1; MiniMind's True and False are taken too."""
    if text.lower() in ("0", "false", "1", "true"):
        return text.lower() in ("1", "true")
    raise argparse.ArgumentTypeError(f"{text} is neither 0 nor 1")


def seed(text: str) -> int:
    """The type of --seed."""
    try:
        if 0 <= int(text) <= MAX_SEED:
            return int(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text} is no whole number from 0 to {MAX_SEED}")


def is_loopback(host: str) -> bool:
    """Whether what goes to this host stays on this machine."""
    import ipaddress

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


class ModelMode(NamedTuple):
    """What --model_mode stands for."""

    title: str
    stages: tuple[str, ...]  # whose weights are meant
    script: str  # which makes them


MODEL_MODES = {
    0: ModelMode("pretrained", ("pretrain",), "train_pretrain.py"),
    1: ModelMode("SFT", ("full_sft",), "train_full_sft.py"),
    2: ModelMode("RLHF", ("rlhf", "dpo"), "train_dpo.py"),
    3: ModelMode("reasoning", ("reason",), "train_reason.py"),
}


def add_model_flags(parser: argparse.ArgumentParser, out_dir: Path) -> None:
    """--model PATH, and the short way of MiniMind's flags. model_path() makes one path of them."""
    add = parser.add_argument_group("which model").add_argument
    add("--model", metavar="PATH", help="a .pth file, of ours or MiniMind's, or a Hugging Face folder; --model_mode 0 "
        "then still means: continue texts, and 3: think")  # fmt: skip
    add = parser.add_argument_group("or the short way: a stage whose weights are in --out_dir").add_argument
    modes = ", ".join(f"{n} = {mode.title}" for n, mode in MODEL_MODES.items())
    add("--model_mode", type=int, choices=tuple(MODEL_MODES), default=1, help=f"{modes} (default: 1)")
    add("--weight", metavar="NAME", help="this stage instead, such as full_sft; or the path of a file")
    add("--out_dir", default=str(out_dir), help="where the weights and adapters are")
    add("--hidden_size", type=int, help="if weights of several sizes are there (default: the newest)")
    add("--use_moe", type=flag, metavar="{0,1}", help="if both kinds are there (default: the newest)")
    add("--load", type=int, choices=(0, 1), default=0, help="1 = the Hugging Face folder --model_path (default: 0)")
    add("--model_path", metavar="FOLDER", help="the folder of --load 1 (default: the one that lies here or in out_dir)")
    add = parser.add_argument_group("its tokenizer").add_argument
    add("--tokenizer", metavar="FOLDER", help="of weights that do not say theirs (default: the one they carry)")


def add_inference_flags(parser: argparse.ArgumentParser) -> None:
    """How the model computes."""
    add = parser.add_argument_group("how it computes").add_argument
    add("--device", help="cuda, mps or cpu (default: the best one found)")
    add("--dtype", choices=("bf16", "fp16", "fp32"), help="default: bf16 where the hardware computes in it, and "
        "for the weights of the compiled step; else fp32")  # fmt: skip
    add("--quantize", choices=("int8", "int4"), help="weights of 8 or 4 bits")
    add("--compile", type=flag, metavar="{0,1}", help="several times as fast: the decoding step in C++ for the "
        "CPU, compiled in seconds the first time, or as a recorded graph on a CUDA card: 0 = never, 1 = or an error "
        "(default: wherever it works)")  # fmt: skip
    add("--inference_rope_scaling", type=flag, metavar="{0,1}", default=False, help="1 = 4 times the context that it "
        "was trained with, by YaRN (default: 0)")  # fmt: skip


def check_model_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.model_path and not args.load:
        parser.error("--model_path FOLDER is for --load 1; --model takes any path")
    given = [name for name in ("weight", "hidden_size", "use_moe") if getattr(args, name) is not None]
    chosen = [name for name in (*given, "load") if getattr(args, name)]
    if args.model and chosen:
        parser.error(f"--model names the model: leave out --{chosen[0]}")
    if args.load and given:
        parser.error(f"--load 1 takes a folder: leave out --{given[0]}")


def model_path(args: argparse.Namespace) -> Path:
    """The path that the flags of add_model_flags() stand for. CheckpointError if there is none."""
    from model import checkpoint  # here, so that --help does not wait for torch

    if args.model or args.model_path:
        return Path(args.model or args.model_path)
    if args.load:
        return checkpoint.find_folder(dict.fromkeys([Path.cwd(), ROOT, Path(args.out_dir)]))
    mode = MODEL_MODES[args.model_mode]
    try:
        return checkpoint.find_weights(args.out_dir, args.weight or mode.stages, args.hidden_size, args.use_moe)
    except checkpoint.CheckpointError as error:
        if args.weight:
            raise
        text = f"no {mode.title} weights: {error}; run python {mode.script} first, or give --model"
        raise checkpoint.CheckpointError(text) from None


def find_device(name: str | None = None) -> "torch.device":
    """The device asked for, or cuda, then mps, then cpu. UsageError if it is not there."""
    import torch  # here, so that --help does not wait for it

    available = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if name is None:
        name = available[0]
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: no such device; here there is {', '.join(available)}") from None
    if device.type not in available:
        raise UsageError(f"--device {name}: not available here; use {' or '.join(available)}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: there are {torch.cuda.device_count()} such devices, counted from 0")
    return device


def prepare_terminal() -> None:
    """Print what its encoding lacks, or what is no Unicode, as an escape, as stderr does; and Windows' console shows
    colours once a program has asked."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    if os.name == "nt":
        os.system("")


def run(main: Callable[[], None]) -> None:
    """Call a script's main: an expected error becomes one line, and processes are left cleanly."""
    if signal.getsignal(signal.SIGINT) is _stop_while_importing:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    prepare_terminal()
    try:
        with at_exit:
            main()
    except KeyboardInterrupt:  # once the training has begun, Interrupt takes it
        code = _fail("stopped", 130)
    except Exception as error:
        known = _expected(error)
        if known is None:
            raise
        code = _fail(*known)
    else:
        if _in_a_group():
            import torch.distributed as dist

            dist.destroy_process_group()
        return
    sys.stdout.flush()
    if _in_a_group():
        os._exit(code)  # leaving the group in order would wait for the others, which may be waiting for this one
    sys.exit(code)


def _expected(error: Exception) -> tuple[str, int] | None:
    """(what to print, exit status) of an error that is the user's or the machine's; None: it is the program's."""
    if isinstance(error, UsageError):
        return str(error), 2
    # Imported here, so that --help waits for none of it.
    from model.device import is_out_of_memory

    if is_out_of_memory(error):
        remedies = [text for flag, text in MEMORY_REMEDIES.items() if flag in known_flags]
        return f"out of memory: {'; '.join(remedies) or 'end other programs, or take a smaller model or file'}", 1
    if isinstance(error, OSError):  # a full disk, no permission
        return str(error), 1
    import torch

    from dataset.jsonl import DataError
    from dataset.tokenizer import TokenizerError
    from model.export.optional import MissingPackage
    from model.formats import CheckpointError

    if isinstance(error, DataError | CheckpointError | TokenizerError | MissingPackage):
        return str(error), 1
    # The connection to another process broke. Gloo raises plain RuntimeErrors.
    if _in_a_group() and (isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()):
        return "another process of this run has ended; its own message says why. --from_resume 1 goes on", 1
    return None


def _in_a_group() -> bool:
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized()


def _fail(text: str, code: int) -> int:
    if os.environ.get("RANK", "0") != "0":
        # Most faults are found by all processes: the launcher ends the others once the first has told of it.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(2)
    print(f"error: {text}", file=sys.stderr)
    return code
