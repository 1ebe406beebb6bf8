# Sourced with `core` by quickstart.sh and lifecycle.sh, with `dev` by test.sh: go to the repository's root, and have a
# Python with the first paragraph of requirements.txt (core), or with all of it and requirements-dev.txt (dev).
# An active virtual environment is used as it is; else .venv is made (PYTHON=python3.12 chooses another interpreter).
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${VIRTUAL_ENV:-}" ]; then
    if [ ! -d .venv ]; then
        PYTHON=${PYTHON:-python3}
        if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
            echo "$("$PYTHON" --version) is too old, 3.10 or newer is needed: choose another with PYTHON=python3.12 bash $0" >&2
            exit 1
        fi
        echo "== making a virtual environment in .venv"
        "$PYTHON" -m venv .venv
    fi
    . .venv/bin/activate
fi

has_torch() {
    python - <<'END'
from importlib.metadata import PackageNotFoundError, version
try:
    raise SystemExit([int(part) for part in version("torch").split(".")[:2]] < [2, 11])
except PackageNotFoundError:
    raise SystemExit(1)
END
}

packages=$(sed '/^$/q' requirements.txt)
[ "$1" = core ] || packages=$(grep -hv '^-r ' requirements.txt requirements-dev.txt)
installed="$VIRTUAL_ENV/minimind-$1.txt"
if [ "$packages" != "$(cat "$installed" 2>/dev/null)" ]; then
    echo "== installing packages (a few minutes, once)"
    printf '%s\n' "$packages" >"$installed.new"
    # The torch of the tests comes first; where there is none for this Python, any of the range. One that is there stays.
    has_torch || python -m pip install --quiet --disable-pip-version-check torch==2.13.0 2>/dev/null ||
        python -m pip install --quiet --disable-pip-version-check 'torch>=2.11'
    # DS_BUILD_OPS=0: DeepSpeed's own CUDA operators are not built.
    DS_BUILD_OPS=0 python -m pip install --quiet --disable-pip-version-check -r "$installed.new"
    mv "$installed.new" "$installed"
fi
