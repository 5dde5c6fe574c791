"""Seconds from a process's start to what a user waits for, or to its end, beside `import torch` alone.

    python bench/startup.py

`sample.py` needs a checkpoint: train once before. Each figure is the median of five runs, in turn.
"""

import statistics
import subprocess
import sys
import tempfile
import time

from common import ROOT, record


def seconds(command, until=None):
    """Return the seconds until a process ends, or until its output holds more than `until`; then it is stopped."""
    began = time.perf_counter()
    command = [sys.executable, *command]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        seen = b""
        while until is None or not seen.partition(until)[2]:
            byte = process.stdout.read1(1)
            if not byte:
                break
            seen += byte
        took = time.perf_counter() - began
        if until is None and process.wait():
            raise SystemExit(f"{command} failed with exit code {process.returncode}")
        process.kill()
    if until is not None and until not in seen:
        raise SystemExit(f"{command} did not print {until}")
    return took


def main():
    with tempfile.TemporaryDirectory() as out:
        waits = {
            "import torch": (["-c", "import torch"], None),
            "import gpt": (["-c", "import gpt"], None),
            "gpt.py --help": (["gpt.py", "--help"], None),
            "gpt.py: first step": (
                ["gpt.py", "config/train_shakespeare.py", f"--out_dir={out}"],
                b"step      1",
            ),
            "sample.py: first character": (["sample.py", "--prompt=ROMEO:"], b"ROMEO:"),
            "config/debug.py, to its end": (
                ["gpt.py", "config/debug.py", f"--out_dir={out}/debug"],
                None,
            ),
            "20 characters, to the end": (
                ["sample.py", "--prompt=ROMEO:", "--max_tokens=20"],
                None,
            ),
        }
        found = {name: [] for name in waits}
        for _ in range(5):
            for name, wait in waits.items():
                found[name].append(seconds(*wait))
    medians = {name: round(statistics.median(times), 2) for name, times in found.items()}
    for name, median in medians.items():
        print(f"{name:28s} {median:6.2f} s")
    record("startup", seconds=medians)


if __name__ == "__main__":
    main()
