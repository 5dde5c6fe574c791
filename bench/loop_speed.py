"""Training speed of the whole loop, as log.jsonl tells it, beside another checkout of this project.

    python bench/loop_speed.py --other=PATH [--block_size=128 --batch_size=16 --threads=2]

Both versions are imported into one process and train the same small model for a few seconds, in turn. One thread is
timed on the clock of the processor's time, so that what else the machine does counts little; several on the wall's.
A run's figure is the median of its progress lines' speeds, without the first two; evaluations, checkpoints and the
start do not count.
"""

import contextlib
import importlib.util
import io
import json
import statistics
import sys
import tempfile
import time
import types
from pathlib import Path

import torch
from common import ROOT, flags, ratios, record

SIZES = {
    "n_embd": 128,
    "dataset": "short",
    "compile": False,
    "device": "cpu",
}
TEXT = "".join(f"{i} times {j} is {i * j}.\n" for i in range(60) for j in range(30))


def load(path, name, settings, clock):
    """Return the gpt.py of a checkout, imported under a name of its own, with the settings of a short run."""
    spec = importlib.util.spec_from_file_location(name, Path(path) / "gpt.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for key, value in (SIZES | settings).items():
        setattr(module, key, value)
    module.time = types.SimpleNamespace(time=clock, strftime=time.strftime)
    module.eval_interval, module.eval_iters, module.sample_tokens, module.log_interval = (
        10**6,
        1,
        0,
        2,
    )
    return module


def speed(gpt, steps):
    """Return the tokens per second of one run."""
    with tempfile.TemporaryDirectory() as made, contextlib.redirect_stdout(io.StringIO()):
        gpt.out_dir, gpt.data_dir, gpt.max_iters = made, made, steps
        gpt.write_dataset(
            Path(made) / "short", TEXT, gpt.Tokenizer("char", "".join(sorted(set(TEXT)))), "made"
        )
        gpt.train()
        lines = (Path(made) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    speeds = [line["tokens_per_s"] for line in map(json.loads, lines) if "tokens_per_s" in line]
    return statistics.median(speeds[2:])


def main():
    f = flags(other="", steps=40, runs=30, block_size=64, batch_size=8, threads=1)
    sizes = {name: f[name] for name in ("block_size", "batch_size")}
    clock = time.process_time if f["threads"] == 1 else time.perf_counter
    torch.set_num_threads(f["threads"])
    paths = {"this": ROOT, "other": f["other"]}
    versions = {name: load(path, f"{name}_gpt", sizes, clock) for name, path in paths.items()}
    found = {name: [] for name in versions}
    for run in range(f["runs"] + 1):
        for name in sorted(versions, reverse=run % 2 == 0):
            found[name].append(speed(versions[name], f["steps"]))
        print(
            f"pair {run}: this is {found['this'][-1] / found['other'][-1]:.3f} of the other",
            flush=True,
        )
    found = {name: speeds[1:] for name, speeds in found.items()}  # the first pair warms up
    record(
        "loop_speed",
        steps=f["steps"],
        runs=f["runs"],
        **sizes,
        threads=f["threads"],
        tokens_per_s={name: round(statistics.median(speeds)) for name, speeds in found.items()},
        ratios=ratios(found["this"], found["other"]),
        ratio=round(statistics.median(a / b for a, b in zip(*found.values(), strict=True)), 4),
    )


if __name__ == "__main__":
    main()
