"""Run a training command as a user does; print its whole wall time and its loss on the full validation split.

python bench/time_to_loss.py config/train_shakespeare.py [--key=value ...]
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, record


def main():
    with tempfile.TemporaryDirectory() as out:
        began = time.time()
        subprocess.run([sys.executable, ROOT / "gpt.py", *sys.argv[1:], f"--out_dir={out}"], check=True)
        wall_s = time.time() - began
        lines = [
            json.loads(line) for line in (Path(out) / "log.jsonl").read_text(encoding="utf-8").splitlines()
        ]
    record(
        "time_to_loss",
        command=" ".join(sys.argv[1:]),
        dataset=lines[0]["config"]["dataset"],
        wall_s=round(wall_s, 1),
        steps=lines[-1]["step"],
        val_loss=round(lines[-1]["val_loss"], 4),
        bits_per_byte=round(lines[-1]["bits_per_byte"], 4),
    )


if __name__ == "__main__":
    main()
