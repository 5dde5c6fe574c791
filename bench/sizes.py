"""Train models in half a minute to eight minutes, and keep what each one came to.

    python bench/sizes.py [--minutes=0.5,2,8] [--data_dir=data] [--small=1]

Each run is the command of the quick start with another --max_minutes. Its result holds the size that
gpt.py fitted, the tokens that it read, its loss, and the text that sample.py writes from the model.
bench/table.py writes them into docs/sizes.md. --small=1 records nothing.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, flags, read_log, record, show

import gpt

PROMPT = "ROMEO:"


def run_script(*words):
    """Run a script of the project; return what it prints on stdout."""
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def figures_of(minutes, data_dir):
    """Train for some minutes; return the figures and the text of the model."""
    with tempfile.TemporaryDirectory() as out:
        began = time.monotonic()
        command = ["gpt.py", "config/train_shakespeare.py", f"--max_minutes={minutes}"]
        run_script(*command, f"--out_dir={out}", f"--data_dir={data_dir}")
        wall_s = time.monotonic() - began
        final = read_log(out)[-1]
        model, _, state = gpt.load_checkpoint(Path(out) / "best.pt")
        words = [
            "sample.py",
            f"--out_dir={out}",
            "--prompt",
            PROMPT,
            "--max_tokens=240",
            "--seed=1",
        ]
        text = run_script(*words, "--device=cpu")
    config = state["config"]
    tokens_per_step = config["batch_size"] * config["block_size"]
    tokens_per_step *= config["gradient_accumulation_steps"]
    return {
        "minutes": minutes,
        "dataset": config["dataset"],
        "params": model.n_params(),
        "n_layer": config["n_layer"],
        "n_embd": config["n_embd"],
        "steps": final["step"],
        "tokens": final["step"] * tokens_per_step,
        "wall_s": round(wall_s, 1),
        "val_loss": round(final["val_loss"], 4),
        "text": text.rstrip(),
    }


def main():
    chosen = flags(minutes="0.5,2,8", data_dir=str(ROOT / "data"), small=0)
    for minutes in map(float, chosen["minutes"].split(",")):
        figures = figures_of(minutes, chosen["data_dir"])
        if chosen["small"]:
            show("sizes", **figures)
        else:
            record("sizes", **figures)


if __name__ == "__main__":
    main()
