#!/bin/sh
# Install a wheel into an environment of its own, outside the checkout, and run a short demo there:
#   sh tests/try_wheel.sh PYTHON WHEEL CONSTRAINTS
set -eu
python=$1
wheel=$(realpath "$2")
constraints=$(realpath "$3")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --constraint "$constraints" "$wheel[demo]"
cd "$work"
unset PYTHONPATH
"$work/venv/bin/drum-hf" --help > help.txt
grep -q demo help.txt
HF_HUB_OFFLINE=1 "$work/venv/bin/drum-hf" --quiet demo \
    --world easy --rounds 1 --epochs 1 --candidates 4 --by-shots 1 --out report
test -s report/report.html
"$work/venv/bin/drum-hf" index report/retriever
