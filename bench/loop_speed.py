"""Training speed of the whole loop, as log.jsonl tells it, beside another checkout of this project.

    python bench/loop_speed.py --other=PATH

Both train the same model on pydoc, in turn, each run a process of its own. The figure of a run is the median of the
speeds of its progress lines, without the first two; evaluations, checkpoints and the start do not count.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import ROOT, flags, in_turn, ratios, record


def measure(case):
    """Return the tokens per second of one run of gpt.py in the folder case["path"]."""
    with tempfile.TemporaryDirectory() as made:
        words = ["--dataset=pydoc", f"--out_dir={made}", f"--max_iters={case['steps']}", "--log_interval=10"]
        words += ["--sample_tokens=0", "--compile=False", "--eval_interval=100000", "--eval_iters=1"]
        subprocess.run(
            [sys.executable, Path(case["path"]) / "gpt.py", *words], stdout=subprocess.DEVNULL, check=True
        )
        lines = (Path(made) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    speeds = [line["tokens_per_s"] for line in map(json.loads, lines) if "tokens_per_s" in line]
    return statistics.median(speeds[2:])


def main():
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        print(measure(json.loads(sys.argv[1])))
        return
    f = flags(other="", steps=100, runs=9)
    cases = {
        name: {"path": str(path), "steps": f["steps"]}
        for name, path in (("this", ROOT), ("other", f["other"]))
    }
    found = in_turn(__file__, cases, f["runs"])
    record(
        "loop_speed",
        steps=f["steps"],
        tokens_per_s={name: round(statistics.median(speeds)) for name, speeds in found.items()},
        ratios=ratios(found["this"], found["other"]),
    )


if __name__ == "__main__":
    main()
