#!/bin/sh
# Does it install and run on other Pythons? Of each that is named, in a fresh environment, with no other packages than
# the project's own files ask for: trains with every script, stops it, goes on, and compares.
#
#     tests/benchmark/pythons.sh python3.10 python3.11 python3.12 python3.13 python3.14
cd "$(dirname "$0")/../.." || exit 1
for python in "$@"; do
    venv=$(mktemp -d)
    "$python" -m venv "$venv" &&
        "$venv/bin/pip" install -q -U pip &&
        "$venv/bin/pip" install -q -r requirements.txt &&
        "$venv/bin/pip" install -q -r tests/requirements.txt &&
        "$venv/bin/python" -W error -m compileall -q -f ./*.py &&
        "$venv/bin/python" -m pytest -q -n auto tests/test_scripts.py -k "each_kind or resumed or ctrl_c" &&
        result=works || result=FAILS
    echo "$("$venv/bin/python" --version): $result"
    rm -rf "$venv"
done
