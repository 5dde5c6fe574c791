"""Kill a training run at random times, resume it and compare it with an uninterrupted run.

    python bench/kill.py --kills=200                  one process, SIGKILL, then the command again
    python bench/kill.py --kills=30 --processes=2     one of two gloo processes, which torchrun
                                                      starts again

The run saves every 10 steps, so many kills happen while it saves. These leave an unfinished file,
by which they are counted. All kills happen before the run ends: it takes as many steps as it needs
for that. The uninterrupted run then takes the same number of steps. A difference in a single bit is
an error.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import ROOT, flags, record

SETTINGS = (
    "--n_layer=2 --n_embd=64 --n_head=4 --block_size=32 --batch_size=4 --dropout=0.1 "
    "--dtype=float32 --dataset=pydoc --device=cpu --compile=False --eval_interval=10 "
    "--eval_iters=1 --log_interval=100000 --sample_tokens=0 --init_from=auto "
    "--lr_schedule=constant"  # this schedule does not depend on the last step
)
FOREVER = 10**9  # steps


# ---- Runs ----
def start(out, steps, processes):
    """Start a run with this many processes, and return the process that was started."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--max-restarts=1000"]
        command += [f"--nproc_per_node={processes}", "--monitor-interval=0.1"]
    command += [str(ROOT / "gpt.py"), *SETTINGS.split(), f"--out_dir={out}", f"--max_iters={steps}"]
    if processes > 1:
        command.append(f"--gradient_accumulation_steps={processes}")
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def wait_until_it_trains(process):
    """Wait until a run has begun and printed an evaluation; under torchrun, the next run."""
    for begins in (r"machine ", r"step .* val loss"):
        if not any(re.match(begins, line) for line in process.stdout):
            raise SystemExit(f"the run ended with exit code {process.wait()}")


def step_of(out):
    """Return the step of the newest checkpoint, or -1 if there is none or it is being replaced."""
    try:
        return torch.load(out / "ckpt.pt", weights_only=True)["step"]
    except OSError:
        return -1


def is_saving(out):
    """Tell whether a checkpoint is being written, or was when its process was killed."""
    return any(out.glob("*.tmp"))


# ---- Kills ----
def wait_for_a_moment(out, draw):
    """Wait for up to 0.8 s and, in half of all cases, until a checkpoint is being written."""
    time.sleep(draw.uniform(0, 0.8))
    until = time.monotonic() + draw.choice([0, 2])
    while time.monotonic() < until and not is_saving(out):
        pass


def kill_runs(out, kills, draw):
    """Kill a run at random times, again and again; return how often it was saving."""
    n_saving = 0
    for kill in range(kills):
        process = start(out, FOREVER, 1)
        wait_until_it_trains(process)
        wait_for_a_moment(out, draw)
        process.kill()
        process.wait()
        process.stdout.close()
        n_saving += is_saving(out)
        if kill % 10 == 9:
            print(f"kill {kill + 1}, newest checkpoint of step {step_of(out)}", flush=True)
    return n_saving


def kill_ranks(out, kills, draw):
    """Kill one of torchrun's processes again and again, then all; return the same as kill_runs."""
    process = start(out, FOREVER, 2)
    n_saving = 0
    for kill in range(kills):
        wait_until_it_trains(process)
        wait_for_a_moment(out, draw)
        os.kill(draw.choice(children(process)), signal.SIGKILL)
        n_saving += is_saving(out)
        print(f"kill {kill + 1}, newest checkpoint of step {step_of(out)}", flush=True)
    wait_until_it_trains(process)  # it has recovered from the last kill, too
    process.terminate()
    process.wait()
    return n_saving


def children(process):
    """Return the process ids of torchrun's children, which run gpt.py."""
    command = ["pgrep", "-P", str(process.pid)]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return [int(word) for word in found.split()]


# ---- Comparison ----
def differences(a, b):
    """Return the names of the weights and of the optimizers' tensors that differ in two runs."""
    found = [name for name in a["model"] if not torch.equal(a["model"][name], b["model"][name])]
    for x, y in zip(a["optimizers"], b["optimizers"], strict=True):
        for i, tensors in x["state"].items():
            for name, tensor in tensors.items():
                if not torch.equal(tensor, y["state"][i][name]):
                    found.append(f"{name} of parameter {i}")
    return found


def main():
    f = flags(kills=200, processes=1, seed=1)
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp())
    kill = kill_ranks if f["processes"] > 1 else kill_runs
    n_saving = kill(folder / "killed", f["kills"], random.Random(f["seed"]))
    end = max(step_of(folder / "killed"), 0) // 10 * 10 + 20
    states = []
    for name in ("killed", "whole"):
        process = start(folder / name, end, f["processes"])
        process.communicate()
        if process.returncode:
            raise SystemExit(
                f"the run in {folder / name} ended with exit code {process.returncode}"
            )
        states.append(torch.load(folder / name / "ckpt.pt", weights_only=True))
    different = differences(*states)
    steps = [state["step"] for state in states]
    shutil.rmtree(folder)
    record(
        "kill",
        kills=f["kills"],
        processes=f["processes"],
        while_saving=n_saving,
        steps=end,
        different_tensors=len(different),
        seconds=round(time.monotonic() - began),
    )
    if different or steps != [end, end]:
        raise SystemExit(f"the runs differ: steps {steps}, {', '.join(different)}")


if __name__ == "__main__":
    main()
