"""Measure how much more memory a training takes on a data set of 4 GB than on one of 4 MB.

    python bench/data_memory.py [--steps=1000]

The 4 GB are a sparse file: reading it costs what reading a full one does, but no disk. Peak resident memory of
the whole process; each case runs three times, alternately.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import ROOT, record

SETTINGS = "--device=cpu --eval_interval=100000 --eval_iters=5 --sample_tokens=0 --log_interval=1000 --n_layer=1"


def write_data(folder, n_bytes):
    """Write a data set of n_bytes of zeros, as uint16, for training."""
    folder.mkdir()
    for split, size in (("train", n_bytes), ("val", 10_000)):
        with open(folder / f"{split}.bin", "wb") as file:
            file.truncate(size)
    meta = {"source": "zeros", "sha256": "", "dtype": "uint16", "vocab_size": 64, "val_bytes": 5000}
    meta |= {"train_tokens": n_bytes // 2, "val_tokens": 5000, "train_bytes": n_bytes // 2}
    meta["tokenizer"] = {"kind": "char", "chars": "".join(map(chr, range(32, 96)))}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def main():
    if "--child" in sys.argv:  # so that RUSAGE_CHILDREN is of one training only
        subprocess.run(
            [sys.executable, ROOT / "gpt.py", *sys.argv[2:]], check=True, stdout=sys.stderr
        )
        print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=1000)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as data:
        sizes = {"small": 4_000_000, "large": 4_000_000_000}
        peaks = {name: [] for name in sizes}
        for name, n_bytes in sizes.items():
            write_data(Path(data) / name, n_bytes)
        for _ in range(3):
            for name, found in peaks.items():
                flags = [
                    *SETTINGS.split(),
                    f"--data_dir={data}",
                    f"--dataset={name}",
                    f"--out_dir={data}/out",
                ]
                command = [sys.executable, __file__, "--child", *flags, f"--max_iters={steps}"]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found.append(float(done.stdout))
    small, large = (statistics.median(peaks[name]) for name in sizes)
    record(
        "data_memory",
        steps=steps,
        small_mib=round(small),
        large_mib=round(large),
        more_mib=round(large - small),
    )


if __name__ == "__main__":
    main()
