"""What all command lines here share: the parser, flags of 0 and 1, and how a script ends when something is wrong.

parser = cli.ArgumentParser(description=__doc__)
if __name__ == "__main__": cli.run(main)
"""

import argparse
import difflib
import importlib
import os
import signal
import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import NoReturn


class UsageError(Exception):
    """Arguments that do not fit together; run() prints it and exits with 2."""


class MissingPackage(Exception):
    """A package that only some flags and formats need is not installed; run() prints it and exits with 1."""


def need(module: str, purpose: str) -> ModuleType:
    """The module of an optional package; MissingPackage says which `purpose` needs it and how to install it.

    gguf = need("gguf", "a GGUF file")"""
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        absent = (error.name or package).partition(".")[0]
        why = "" if absent == package else f", which needs {absent}"
        raise MissingPackage(f"{purpose} needs the package {package}{why}: pip install {absent}") from None


class ArgumentParser(argparse.ArgumentParser):
    """Descriptions as they are written, no abbreviations, one line for a mistake."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
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


def run(main: Callable[[], None]) -> None:
    """Call a script's main: an expected error becomes one line, and processes are left cleanly."""
    try:
        main()
    except KeyboardInterrupt:  # before the training began; from then on Interrupt takes it
        code = _fail("stopped before the training began", 130)
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
    if isinstance(error, OSError | MissingPackage):  # a full disk, no permission
        return str(error), 1
    # Imported here, so that --help waits for none of it.
    import torch

    from dataset.jsonl import DataError
    from model.formats import CheckpointError

    if isinstance(error, DataError | CheckpointError):
        return str(error), 1
    if isinstance(error, torch.OutOfMemoryError):
        remedy = "lower --batch_size (and raise --accumulation_steps) or --max_seq_len, or --activation_checkpointing 1"
        return f"out of memory: {remedy}", 1
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
