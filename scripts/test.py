"""Lint, format and all tests: python scripts/test.py [pytest arguments, such as -m "not slow"]"""

import os
import sys

import environment


def main() -> None:
    python = environment.ready("dev")
    # Two processes, a file each at a time; what they start has one thread: results do not depend on the cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    processes = os.environ.get("TEST_PROCESSES", "2")
    tests = ["pytest", "-q", "-n", processes, "--dist", "loadfile", *sys.argv[1:]]
    for tool in (["ruff", "check", "."], ["ruff", "format", "--check", "."], tests):
        if code := environment.run([python, "-m", *tool]):
            sys.exit(code)


if __name__ == "__main__":
    main()
