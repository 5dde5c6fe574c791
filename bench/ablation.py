"""What each choice of the default recipe is worth: the same number of steps with one setting changed at a time.

    python bench/ablation.py [--seeds=3] [--steps=600]

The loss is that of the full validation split of tiny Shakespeare, mean and range over the seeds; a difference that is
smaller than the range says nothing. Variants with other batch sizes take as many tokens as the default.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import ROOT, flags, record

VARIANTS = {
    "default": "",
    "muon_momentum 0.95": "--muon_momentum=0.95",
    "AdamW alone, 3e-3": "--optimizer=adamw --learning_rate=3e-3",
    "tied head, GPT-2's initialization": "--tie_weights=True",
    "4 key/value heads": "--n_kv_head=4",
    "no qk_norm": "--qk_norm=False",
    "batch 16, rates times 1.4": "--batch_size=16 --muon_lr=0.035 --learning_rate=8e-3",
    "block 128": "--block_size=128 --batch_size=16",
    "train_temperature 0.87": "--train_temperature=0.87",
    "float32": "--dtype=float32",
}
HALF = ("batch 16, rates times 1.4",)  # steps, for as many tokens


def run(variant, seed, steps):
    """Return (full validation loss, tokens per second)."""
    with tempfile.TemporaryDirectory() as out:
        command = [
            sys.executable,
            ROOT / "gpt.py",
            f"--max_iters={steps}",
            f"--eval_interval={steps}",
            "--eval_iters=1",
        ]
        command += ["--sample_tokens=0", f"--seed={seed}", f"--out_dir={out}", *variant.split()]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        lines = [
            json.loads(line)
            for line in (Path(out) / "log.jsonl").read_text(encoding="utf-8").splitlines()
        ]
    return lines[-1]["val_loss"], statistics.median(
        line["tokens_per_s"] for line in lines if "tokens_per_s" in line
    )


def main():
    f = flags(seeds=3, steps=600, only="")
    for name, variant in VARIANTS.items():
        if f["only"] in name:
            steps = f["steps"] // (2 if name in HALF else 1)
            losses, speeds = zip(
                *(run(variant, 1337 + i, steps) for i in range(f["seeds"])), strict=True
            )
            record(
                "ablation",
                variant=name,
                steps=steps,
                val_loss=round(statistics.mean(losses), 4),
                val_losses=[round(loss, 4) for loss in losses],
                tokens_per_s=round(statistics.median(speeds)),
            )


if __name__ == "__main__":
    main()
