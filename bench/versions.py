"""Compare this version with another checkout of this project, in turn on the same machine.

    python bench/versions.py --old=PATH [--pairs=3] [--only=PART] [--data_dir=FOLDER]

It measures these parts, which --only selects by their names:

    train_shakespeare   config/train_shakespeare.py, on a CPU 2 minutes: tokens/s, steps, loss
    train_10M           10.65M parameters, compiled: tokens/s of the loop, and the process's memory
    decode              10.65M parameters, compiled and not: tokens/s
    memory              the peak of one step at that shape, in MiB
    startup             seconds to what a user waits for

Both checkouts run by their own commands, or by calls that both know. The data set is the one in
data_dir, by default in this checkout's data/. Each line of JSON holds the medians of both,
and the ratios new / old: the median, the lowest and the highest of the pairs. --small=1 takes a few
steps of each, to try the script, and records nothing.
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import decode_speed
import memory
import startup
from common import (
    ROOT,
    commit,
    flags,
    in_turn,
    median_speed,
    ratios,
    read_log,
    record,
    show,
)

import gpt

SHAPE_10M = "--n_layer=6 --n_head=6 --n_kv_head=6 --n_embd=384 --batch_size=16 --compile=True"


# ---- Whole runs ----
def run(checkout, arguments):
    """Run a checkout's gpt.py; return {figure: number} of its log and of its process's memory."""
    with tempfile.TemporaryDirectory() as out:
        gpt_py = Path(checkout) / "gpt.py"
        command = [sys.executable, __file__, "parent", gpt_py, *arguments, f"--out_dir={out}"]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=checkout)
        log = read_log(out)
    return {
        "tokens_per_s": median_speed(log),
        "steps": log[-1]["step"],
        "val_loss": log[-1]["val_loss"],
        "peak_rss_mib": float(done.stdout),
    }


def be_the_parent(command):
    """Run a command as this process's only child; print its peak resident memory in MiB."""
    subprocess.run([sys.executable, *command], check=True, stdout=sys.stderr)
    print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)


def compare_runs(f, part, arguments, figures):
    """Run both checkouts in turn, and report the given figures of their runs."""
    found = {"new": [], "old": []}
    for pair in range(f["pairs"]):
        for name, checkout in (("new", ROOT), ("old", f["old"])):
            found[name].append(run(checkout, arguments))
            print(f"{part}, pair {pair + 1}, {name}: {found[name][-1]}", flush=True)
    for figure in figures:
        numbers = {}
        for name, results in found.items():
            numbers[name] = [result[figure] for result in results]
        report(f, part, figure, numbers["new"], numbers["old"])


def train_shakespeare(f):
    config = str(ROOT / "config" / "train_shakespeare.py")
    arguments = [config, f"--data_dir={f['data_dir']}", "--sample_tokens=0"]
    if f["small"]:
        arguments.append("--max_minutes=0.1")
    figures = ("tokens_per_s", "steps", "val_loss", "peak_rss_mib")
    compare_runs(f, "train_shakespeare", arguments, figures)


def train_10M(f):
    steps = 3 if f["small"] else 60
    arguments = [*SHAPE_10M.split(), "--log_interval=2", "--eval_iters=1", "--sample_tokens=0"]
    arguments += [f"--max_iters={steps}", f"--eval_interval={steps}"]
    arguments.append(f"--data_dir={f['data_dir']}")
    if f["small"]:
        arguments += ["--compile=False", "--batch_size=1"]
    compare_runs(f, "train_10M", arguments, ("tokens_per_s", "peak_rss_mib"))


# ---- Parts of them ----
def compare_cases(f, part, cases):
    """Measure cases in turn, and report each of this version that the other also has."""
    found = in_turn(cases, f["pairs"])
    for name, numbers in found.items():
        twin = name.replace("ours", "old")
        if name.startswith("ours") and twin in found:
            figure = name.removeprefix("ours").strip() or "one step"
            report(f, part, figure, numbers, found[twin])


def decode(f):
    tokens = 10 if f["small"] else 1000
    options = {"old": f["old"], "transformers": 0, "tokens": tokens}
    compare_cases(f, "decode", decode_speed.cases(decode_speed.DEFAULTS | options))


def step_memory(f):
    options = {"old": f["old"], "batch_size": 1 if f["small"] else 16}
    compare_cases(f, "memory", memory.cases(memory.DEFAULTS | options))


def start(f):
    only = "import gpt" if f["small"] else ""
    found = startup.measure({"new": ROOT, "old": f["old"]}, f["pairs"], only)
    for what, seconds in found.items():
        report(f, "startup", what, seconds["new"], seconds["old"])


# ---- Report ----
def report(f, part, figure, new, old):
    """Print and keep the medians of a figure for both versions, and their ratios."""
    keep = show if f["small"] else record
    keep(
        "versions",
        part=part,
        figure=figure,
        version=gpt.__version__,
        old=commit(f["old"]),
        medians={
            "new": round(statistics.median(new), 4),
            "old": round(statistics.median(old), 4),
        },
        ratios=ratios(new, old),
    )


PARTS = {
    "train_shakespeare": train_shakespeare,
    "train_10M": train_10M,
    "decode": decode,
    "memory": step_memory,
    "startup": start,
}


def main():
    if sys.argv[1:2] == ["parent"]:
        return be_the_parent(sys.argv[2:])
    f = flags(old="", pairs=3, only="", data_dir=str(ROOT / "data"), small=0)
    if not f["old"] or not (Path(f["old"]) / "gpt.py").exists():
        raise SystemExit("name the other checkout of this project with --old=PATH")
    f |= {name: os.path.abspath(f[name]) for name in ("old", "data_dir")}
    for part, measure in PARTS.items():
        if f["only"] in part:
            measure(f)


if __name__ == "__main__":
    main()
