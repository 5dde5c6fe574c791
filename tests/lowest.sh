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
    # PyTorch's own index has a build without CUDA, which is a tenth as large.
    "$folder/bin/pip" install -q --retries 0 --timeout 10 "torch==$version" \
        --index-url https://download.pytorch.org/whl/cpu 2> /dev/null ||
        "$folder/bin/pip" install -q "torch==$version"
    "$folder/bin/pip" install -q numpy tiktoken pytest pytest-xdist matplotlib transformers
    touch "$folder/ready"
fi
"$folder/bin/python" -m pytest -q tests/test_model.py tests/test_optimizer.py \
    tests/test_training.py tests/test_generation.py tests/test_distributed.py tests/test_sample.py
