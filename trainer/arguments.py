"""argparse as all scripts here want it: descriptions as they are written, no abbreviations, one line for a mistake."""

import argparse
import difflib
from typing import NoReturn


class ArgumentParser(argparse.ArgumentParser):
    """Quick to import: --help must not wait for torch."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        _, _, unknown = message.partition("unrecognized arguments: ")
        name = unknown.partition(" ")[0].partition("=")[0].strip("-")
        near = difflib.get_close_matches(name, [flag.strip("-") for flag in self._option_string_actions], 1, cutoff=0.7)
        meant = f" (did you mean --{near[0]}?)" if near else ""
        self.exit(2, f"error: {message}{meant}; --help lists what there is\n")
