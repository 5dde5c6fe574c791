"""Measure how much more memory training takes on a data set of 4 GB than on one of 4 MB.

    python bench/data_memory.py [--steps=1000] [--runs=3]

The 4 GB are a sparse file. Reading it costs what reading a full one does, but it takes no disk
space. The figure is the peak of the whole process's resident memory, as the median of `runs` runs
in turn.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import ROOT, flags, record

SETTINGS = "--device=cpu --n_layer=1 --eval_interval=100000 --eval_iters=5 --sample_tokens=0"
SIZES = {"small": 4_000_000, "large": 4_000_000_000}  # bytes


def write_data(folder, n_bytes):
    """Write a data set whose training split is n_bytes of zeros, as uint16."""
    folder.mkdir()
    for split, size in (("train", n_bytes), ("val", 10_000)):
        with open(folder / f"{split}.bin", "wb") as file:
            file.truncate(size)
    meta = {"source": "zeros", "sha256": "", "dtype": "uint16", "vocab_size": 64, "val_bytes": 5000}
    meta |= {"train_tokens": n_bytes // 2, "val_tokens": 5000, "train_bytes": n_bytes // 2}
    meta["tokenizer"] = {"kind": "char", "chars": "".join(map(chr, range(32, 96)))}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def be_the_parent(arguments):
    """Train in this process's only child, and print the child's peak resident memory in MiB."""
    command = [sys.executable, ROOT / "gpt.py", *arguments]
    subprocess.run(command, check=True, stdout=sys.stderr)
    print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)


def peak(data, name, steps):
    """Return the peak memory, in MiB, of training on a data set in the folder data."""
    arguments = [*SETTINGS.split(), f"--data_dir={data}", f"--dataset={name}"]
    arguments += [f"--out_dir={data}/out", f"--max_iters={steps}", "--log_interval=1000"]
    command = [sys.executable, __file__, "parent", *arguments]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main():
    if sys.argv[1:2] == ["parent"]:
        return be_the_parent(sys.argv[2:])
    f = flags(steps=1000, runs=3)
    peaks = {name: [] for name in SIZES}
    with tempfile.TemporaryDirectory() as data:
        for name, n_bytes in SIZES.items():
            write_data(Path(data) / name, n_bytes)
        for _ in range(f["runs"]):
            for name, found in peaks.items():
                found.append(peak(data, name, f["steps"]))
    small, large = (statistics.median(peaks[name]) for name in SIZES)
    record(
        "data_memory",
        steps=f["steps"],
        small_mib=round(small),
        large_mib=round(large),
        more_mib=round(large - small),
    )


if __name__ == "__main__":
    main()
