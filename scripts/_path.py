"""Lets `python scripts/NAME.py` import the rooms beside scripts/: the first of ours that each script here imports."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cli  # noqa: E402, F401  it takes Ctrl-C while the rest is imported
