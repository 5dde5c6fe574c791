"""Train a model of GPT-2's size on real text: nanoGPT for some minutes, then gpt.py for fewer.

    python bench/time_to_loss_124m.py --nanogpt=PATH --data=data/NAME [--minutes=8] [--pairs=3]
        [--peer_flags="--batch_size=32 --gradient_accumulation_steps=8"] [--fractions=0.4,0.6,0.8,1]
        [--flags="--key=value ..."]
    python bench/time_to_loss_124m.py --nanogpt=PATH --data=data/NAME --small=1    (does it run?)

The data set holds GPT-2's tokens: python prepare.py --input=FOLDER --name=NAME --tokenizer=gpt2.
nanoGPT runs compiled with its recipe for GPT-2, the micro-batch of --peer_flags, and a schedule that
ends after --minutes: a first run of 30 steps says how many steps these are. gpt.py then runs
config/train_fineweb_edu.py with --flags, for the --fractions of these minutes in turn, until its
loss is as low. The same estimator measures both losses: the mean over the same random windows of
validation text. The result is the ratio of the two commands' whole wall times, for each pair, or
null where no fraction sufficed. The time of fractions that did not suffice is not counted.
"""

import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import ROOT, flags, ratios, record, show
from time_to_loss import DEVICE, copy_nanogpt, run_nanogpt, run_ours

PILOT_STEPS = 30
SMALL_PEER = "--n_layer=2 --n_head=2 --n_embd=64 --block_size=64 --batch_size=4"
SMALL_PEER += " --gradient_accumulation_steps=1 --eval_iters=2"
SMALL_OURS = "--n_layer=2 --n_head=2 --n_kv_head=1 --n_embd=64 --block_size=64 --batch_size=4"
SMALL_OURS += " --gradient_accumulation_steps=1 --eval_iters=2 --warmup_iters=5"


def recipe_for(steps, peer_flags):
    """Return the words behind nanoGPT's train.py for a run of some steps."""
    words = f"config/train_gpt2.py --wandb_log=False --dataset=own --device={DEVICE.type}"
    words += f" --max_iters={steps} --lr_decay_iters={steps} --warmup_iters={max(1, steps // 10)}"
    words += f" --eval_interval={max(1, steps // 4)} --eval_iters=40 --log_interval=1"
    if DEVICE.type == "cpu":
        words += " --compile=False"
    return f"{words} --always_save_checkpoint=True {peer_flags}"


def seconds_of_a_step(path, data, peer_flags):
    """Return the median seconds of nanoGPT's steps, by a short run."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "nanoGPT"
        copy_nanogpt(path, copy, data, "own")
        command = [sys.executable, "train.py", *recipe_for(PILOT_STEPS, peer_flags).split()]
        done = subprocess.run(command, cwd=copy, check=True, capture_output=True, text=True)
    times = [float(ms) for ms in re.findall(r"time ([\d.]+)ms", done.stdout)]
    return statistics.median(times[PILOT_STEPS // 3 :]) / 1000


def sooner(data, target, budgets, window, own_flags, seed):
    """Run gpt.py for each budget in minutes until its estimate is at most target.

    Return (wall_s, estimate, minutes, whether it was reached).
    """
    for minutes in budgets:
        command = [str(ROOT / "config" / "train_fineweb_edu.py"), f"--max_minutes={minutes:.4g}"]
        command += [f"--dataset={data.name}", f"--data_dir={data.parent}", "--max_iters=1000000"]
        wall_s, _, _, estimates = run_ours([*command, *own_flags], seed)
        reached = estimates[window] <= target
        print(f"gpt.py: {wall_s:.1f} s, {estimates[window]:.4f}, as low: {reached}", flush=True)
        if reached:
            break
    return wall_s, estimates[window], minutes, reached


def main():
    chosen = flags(
        nanogpt="", data="", minutes=8.0, pairs=3, fractions="0.4,0.6,0.8,1", peer_flags="", flags="", small=0
    )  # fmt: skip
    minutes, own_flags, peer_flags = chosen["minutes"], chosen["flags"], chosen["peer_flags"]
    window = 1024
    if chosen["small"]:
        minutes, window = 0.2, 64
        peer_flags, own_flags = f"{SMALL_PEER} {peer_flags}", f"{SMALL_OURS} {own_flags}"
        chosen["pairs"] = 1
    data = Path(chosen["data"]).resolve()
    steps = round(60 * minutes / seconds_of_a_step(chosen["nanogpt"], data, peer_flags))
    recipe = recipe_for(steps, peer_flags)
    budgets = [minutes * float(fraction) for fraction in chosen["fractions"].split(",")]
    peers, ours = [], []
    for pair in range(chosen["pairs"]):
        peers.append(run_nanogpt(chosen["nanogpt"], data, recipe, "own", window=window))
        wall_s, _, target = peers[-1]
        print(f"pair {pair + 1}: nanoGPT {wall_s:.1f} s, {target:.4f}", flush=True)
        ours.append(sooner(data, target, budgets, window, shlex.split(own_flags), 1337 + pair))
    result = {
        "minutes": minutes,
        "data": data.name,
        "nanogpt_steps": steps,
        "nanogpt_wall_s": [round(wall_s, 1) for wall_s, _, _ in peers],
        "nanogpt_loss": [round(loss, 4) for _, _, loss in peers],
        "wall_s": [round(wall_s, 1) for wall_s, *_ in ours],
        "loss": [round(loss, 4) for _, loss, *_ in ours],
        "reached": [reached for *_, reached in ours],
        "time_ratio": None,
    }
    if all(reached for *_, reached in ours):
        walls = [wall_s for wall_s, *_ in ours]
        result["time_ratio"] = ratios([wall_s for wall_s, _, _ in peers], walls)
    if chosen["small"]:
        show("time_to_loss_124m", **result)
    else:
        record("time_to_loss_124m", **result)


if __name__ == "__main__":
    main()
