"""Measure the peak memory of one training step with and without gradient checkpointing.

    python bench/memory.py

Each case runs in a process of its own. On a GPU it is the peak of allocated memory, on a CPU the growth of
the peak of resident memory from before the step.
"""

import json
import resource
import subprocess
import sys

from common import record

SIZES = {
    "block_size": 512,
    "vocab_size": 65,
    "n_layer": 12,
    "n_head": 6,
    "n_kv_head": 6,
    "n_embd": 384,
    "dropout": 0.0,
}


def measure(gradient_checkpointing):
    """Return the peak in MiB of one float32 step of 8 sequences."""
    import torch

    import gpt

    device = gpt.pick_device("auto")
    model = gpt.GPT(gpt.GPTConfig(**SIZES, gradient_checkpointing=gradient_checkpointing)).to(device)
    x = torch.randint(65, (8, 513), device=device)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    model(x[:, :-1], x[:, 1:])[1].backward()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before


def main():
    if len(sys.argv) > 1:
        print(measure(sys.argv[1] == "True"))
        return
    peaks = {}
    for on in (False, True):
        command = [sys.executable, __file__, str(on)]
        peaks[on] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    record(
        "memory",
        sizes=SIZES,
        plain_mib=round(peaks[False]),
        checkpointing_mib=round(peaks[True]),
        ratio=round(peaks[True] / peaks[False], 3),
    )


if __name__ == "__main__":
    main()
