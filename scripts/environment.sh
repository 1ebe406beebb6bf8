# Sourced by quickstart.sh and test.sh: go to the repository's root, and have a Python that has requirements.txt.
# An active virtual environment is used as it is; else .venv is made (PYTHON=python3.12 chooses another interpreter).
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${VIRTUAL_ENV:-}" ]; then
    if [ ! -d .venv ]; then
        echo "== making a virtual environment in .venv"
        "${PYTHON:-python3}" -m venv .venv
    fi
    . .venv/bin/activate
fi
if ! cmp -s requirements.txt "$VIRTUAL_ENV/minimind-requirements.txt"; then
    echo "== installing requirements.txt (a few minutes, once)"
    python -m pip install --quiet --disable-pip-version-check torch==2.13.0
    DS_BUILD_OPS=0 python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    cp requirements.txt "$VIRTUAL_ENV/minimind-requirements.txt"
fi
