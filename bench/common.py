"""What the bench scripts share: a description of this machine, and the file of results."""

import datetime
import json
import platform
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def hardware():
    """Return the processor's, or else the GPU's, name, with the number of threads or GPUs."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    name = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    bf16 = ", AVX512-BF16" if torch.cpu._is_avx512_bf16_supported() else ""
    return f"{torch.get_num_threads()} cores of {name}{bf16}"


def record(bench, **figures):
    """Print a result and append it to bench/results.jsonl."""
    line = {
        "bench": bench,
        "date": str(datetime.datetime.now(datetime.timezone.utc).date()),
        "hardware": hardware(),
        "torch": torch.__version__,
        **figures,
    }
    print(json.dumps(line))
    with open(ROOT / "bench" / "results.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
