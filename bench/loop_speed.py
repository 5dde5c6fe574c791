"""Compare the training speed of the whole loop, by its log.jsonl, with another checkout's.

    python bench/loop_speed.py --other=PATH [--block_size=128 --batch_size=16 --threads=2]

Both checkouts of this project train the same small model for some seconds, in turn. Each run is a
process of its own. A run's figure is the median speed of its progress lines, without the first two.
Evaluations, checkpoints and the start do not count.
"""

import statistics
import tempfile
from pathlib import Path

from common import ROOT, flags, median_speed, ratios, record, train

import gpt

SETTINGS = "--dataset=short --device=cpu --compile=False --n_embd=128 --log_interval=2"
SETTINGS += " --eval_interval=1000000 --eval_iters=1 --sample_tokens=0"
TEXT = "".join(f"{i} times {j} is {i * j}.\n" for i in range(60) for j in range(30))


def main():
    f = flags(other="", steps=40, runs=30, block_size=64, batch_size=8, threads=1)
    checkouts = {"this": ROOT, "other": f["other"]}
    sizes = {name: f[name] for name in ("block_size", "batch_size")}
    settings = SETTINGS.split() + [f"--{name}={value}" for name, value in sizes.items()]
    settings += [f"--max_iters={f['steps']}"]
    found = {name: [] for name in checkouts}
    with tempfile.TemporaryDirectory() as made:
        tokenizer = gpt.Tokenizer("char", "".join(sorted(set(TEXT))))
        gpt.write_dataset(Path(made) / "short", TEXT, tokenizer, "made")
        settings.append(f"--data_dir={made}")
        for run in range(f["runs"]):
            for name in sorted(checkouts, reverse=run % 2 == 0):
                log = train(*settings, checkout=checkouts[name], OMP_NUM_THREADS=str(f["threads"]))
                found[name].append(median_speed(log))
            ratio = found["this"][-1] / found["other"][-1]
            print(
                f"pair {run + 1}: this runs at {ratio:.3f} times the speed of the other", flush=True
            )
    pairs = zip(found["this"], found["other"], strict=True)
    record(
        "loop_speed",
        steps=f["steps"],
        runs=f["runs"],
        **sizes,
        threads=f["threads"],
        tokens_per_s={name: round(statistics.median(speeds)) for name, speeds in found.items()},
        ratios=ratios(found["this"], found["other"]),
        ratio=round(statistics.median(a / b for a, b in pairs), 4),
    )


if __name__ == "__main__":
    main()
