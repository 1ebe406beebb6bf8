"""Packages that only some formats need."""

import importlib
from types import ModuleType


class MissingPackage(Exception):
    """A package that only some flags and formats need is not installed; scripts print it and exit with 1."""


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
