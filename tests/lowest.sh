#!/usr/bin/env bash
# Run the tests that depend most on torch with the oldest version that requirements.txt allows.
#
#     tests/lowest.sh [VERSION]
#
# The virtual environment in .venv-lowest is made once for each version, and kept.
set -euo pipefail
cd "$(dirname "$0")/.."
version=${1:-2.9.1}
folder=.venv-lowest/$version
if [ ! -e "$folder/ready" ]; then
    rm -rf "$folder"
    python3 -m venv "$folder"
    "$folder/bin/pip" install -q "torch==$version" numpy tiktoken pytest pytest-xdist
    touch "$folder/ready"
fi
"$folder/bin/python" -m pytest -q tests/test_model.py tests/test_optimizer.py \
    tests/test_training.py tests/test_generation.py tests/test_distributed.py
