"""Kill a training run at random, go on, and compare: it must end with the weights of a run that nothing stopped.

    python bench/kill.py --kills=200                     one process, SIGKILL, then the same command again
    python bench/kill.py --kills=30 --processes=2        one of two gloo processes; torchrun starts them again

The run saves every 10 steps, so that many kills come while it saves; how many did is counted by the unfinished
file that they leave. All kills happen before the run ends: it takes as many steps as it needs for that, and the
uninterrupted run is then made with as many. Any difference, in a single bit, is an error.
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

SIZES = "--n_layer=2 --n_embd=64 --n_head=4 --block_size=32 --batch_size=4 --dropout=0.1 --dtype=float32"
RUN = "--dataset=pydoc --device=cpu --compile=False --eval_interval=10 --eval_iters=1 --log_interval=100000"
SCHEDULE = "--lr_schedule=constant --sample_tokens=0 --init_from=auto"  # which does not depend on the last step


def command(out, steps, processes):
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    torchrun += ["--max-restarts=1000", "--monitor-interval=0.1"]
    words = [
        *SIZES.split(),
        *RUN.split(),
        *SCHEDULE.split(),
        f"--out_dir={out}",
        f"--max_iters={steps}",
    ]
    more = ["--gradient_accumulation_steps=2"] if processes > 1 else []
    return [
        sys.executable,
        *(torchrun if processes > 1 else []),
        str(ROOT / "gpt.py"),
        *words,
        *more,
    ]


def start(out, steps, processes):
    return subprocess.Popen(
        command(out, steps, processes),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def step_of(out):
    """Return the step of the newest checkpoint, -1 if there is none or it is just being replaced."""
    try:
        return torch.load(out / "ckpt.pt", weights_only=True)["step"]
    except OSError:
        return -1


def trains(process):
    """Wait until a run, under torchrun the next one, has begun and printed its first evaluation."""
    for begins in (r"machine ", r"step .* val loss"):
        for line in process.stdout:
            if re.match(begins, line):
                break
        else:
            raise SystemExit(f"the run ended, exit code {process.wait()}")


def wait(out, draw):
    """Wait for up to 0.8 s, in every other case then for a checkpoint that is being written."""
    time.sleep(draw.uniform(0, 0.8))
    until = time.time() + draw.choice([0, 2])
    while time.time() < until and not (out / "ckpt.tmp").exists():
        pass


def workers(process):
    """Return the process ids of torchrun's children that run gpt.py."""
    found = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False
    )
    return [int(word) for word in found.stdout.split()]


def kill_one(out, draw):
    """Kill a run at a random moment; return whether it was saving."""
    process = start(out, 10**9, 1)
    trains(process)
    wait(out, draw)
    process.kill()
    process.wait()
    process.stdout.close()
    return (out / "ckpt.tmp").exists() or (out / "best.tmp").exists()


def kill_ranks(out, kills, draw):
    """Kill one of torchrun's processes again and again, then all; return in how many cases it was saving."""
    process, saving = start(out, 10**9, 2), 0
    for kill in range(kills):
        trains(process)
        wait(out, draw)
        victims = workers(process)
        os.kill(draw.choice(victims), signal.SIGKILL)
        saving += (out / "ckpt.tmp").exists() or (out / "best.tmp").exists()
        print(f"kill {kill + 1}, newest checkpoint of step {step_of(out)}", flush=True)
    trains(process)  # it has come back from the last one, too
    process.terminate()
    process.wait()
    return saving


def main():
    f = flags(kills=200, processes=1, seed=1)
    draw, folder, began = random.Random(f["seed"]), Path(tempfile.mkdtemp()), time.time()
    killed, whole = folder / "killed", folder / "whole"
    if f["processes"] > 1:
        saving = kill_ranks(killed, f["kills"], draw)
    else:
        saving = 0
        for kill in range(f["kills"]):
            saving += kill_one(killed, draw)
            if kill % 10 == 9:
                print(f"kill {kill + 1}, newest checkpoint of step {step_of(killed)}", flush=True)
    end = max(step_of(killed), 0) // 10 * 10 + 20
    for out in (killed, whole):
        process = start(out, end, f["processes"])
        process.communicate()
        assert process.returncode == 0
    a, b = (torch.load(out / "ckpt.pt", weights_only=True) for out in (killed, whole))
    different = [name for name in a["model"] if not torch.equal(a["model"][name], b["model"][name])]
    for x, y in zip(a["optimizers"], b["optimizers"], strict=True):
        for i, averages in x["state"].items():
            different += [
                f"{i} {k}" for k, v in averages.items() if not torch.equal(v, y["state"][i][k])
            ]
    assert a["step"] == b["step"] == end
    shutil.rmtree(folder)
    record(
        "kill",
        kills=f["kills"],
        processes=f["processes"],
        while_saving=int(saving),
        steps=end,
        different_tensors=len(different),
        seconds=round(time.time() - began),
    )
    if different:
        raise SystemExit(f"not the same: {', '.join(different)}")


if __name__ == "__main__":
    main()
