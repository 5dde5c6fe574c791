"""Run a training command as a user does, and measure its whole wall time and its loss.

    python bench/time_to_loss.py config/train_shakespeare.py [--key=value ...] [--runs=3]
    python bench/time_to_loss.py --nanogpt=PATH --runs=3 config/train_shakespeare.py ...
    python bench/time_to_loss.py --nanogpt=PATH --data=data/novel --max_minutes=1.5

--data is the folder of another data set than tiny Shakespeare, for both.
Runs differ in their seed. The loss over the whole validation split is the one that the command
prints at its end. The loss of best.pt is also measured by nanoGPT's estimator. This is the mean
loss of random windows of validation text, which have 64 or 256 tokens. Here there are 2,400
windows, so chance moves the mean less. The training time is that from the evaluation before the
first step to the last evaluation. Compilation begins with an empty cache.

With --nanogpt, nanoGPT runs before each of our runs, whole command versus whole command. It runs by
its own code, in which the seed is fixed, with its README's recipe for a CPU or for a GPU. The same
estimator measures the loss of the model that it leaves, with its own windows of 64 or 256 tokens.
On a CPU this is its last model, and on a GPU its best. With --until=LOSS its run is ended once a
validation loss that it prints is as low. --peer_runs=N repeats it for the first N runs alone.
"""

import json
import os
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import ROOT, best_device, nanogpt, ratios, read_log, record

import gpt

DEVICE = best_device()
# nanoGPT's README: "I have a GPU", where its checkpoint is its best, and "I only have a macbook"
RECIPE = "config/train_shakespeare_char.py"
WINDOW = 256
if DEVICE.type == "cpu":
    RECIPE += (
        " --device=cpu --compile=False --eval_iters=20 --log_interval=100 --block_size=64"
        " --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000"
        " --lr_decay_iters=2000 --dropout=0.0 --always_save_checkpoint=True"
    )
    WINDOW = 64


@torch.no_grad()
def estimate(loss_of, tokens, window, n=2400):
    """Return the mean of loss_of(x, y) over n random windows of tokens, the same for every model.

    tokens: int64, on the device of the model.
    """
    generator = torch.Generator().manual_seed(1337)
    starts = torch.randint(len(tokens) - window - 1, (n, 1), generator=generator).to(tokens.device)
    windows = tokens[starts + torch.arange(window + 1, device=tokens.device)]
    losses = []
    for part in windows.split(60):
        losses.append(float(loss_of(part[:, :-1].contiguous(), part[:, 1:].contiguous())))
    return statistics.mean(losses)


# ---- Ours ----
def run_ours(command, seed):
    """Run gpt.py; return (wall_s, curve, its final figures, {window: estimate}).

    curve: a list of (seconds since the command began, validation loss), one for each evaluation.
    """
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, ROOT / "gpt.py", *command, f"--seed={seed}", f"--out_dir={out}"]
        cache = {"TORCHINDUCTOR_CACHE_DIR": str(Path(out) / "cache")}  # empty for each run
        began = time.monotonic()
        subprocess.run(command, check=True, env=os.environ | cache)
        wall_s = time.monotonic() - began
        lines = read_log(out)
        model, _, state = gpt.load_checkpoint(Path(out) / "best.pt", DEVICE)
    curve = []
    for line in lines[:-1]:  # the last one holds the final figures
        if "val_loss" in line:
            curve.append((round(line["elapsed_s"], 2), round(line["val_loss"], 4)))
    figures = lines[-1] | {"params": model.n_params()}
    return wall_s, curve, figures, estimates_of(model, state["config"])


def estimates_of(model, config):
    """Return {window: estimate} of a trained model, on the data set of its config."""
    folder = Path(config["data_dir"] or ROOT / "data") / config["dataset"]
    data = gpt.Data(folder, config["block_size"], splits=["val"])
    tokens = torch.from_numpy(data.tokens["val"][:].astype(np.int64)).to(DEVICE)
    machine = gpt.set_up_machine(gpt.checked_settings(dtype=config["dtype"]))

    def loss_of(x, y):
        with machine.autocast():
            return model(x, y, loss_only=True)[1]

    windows = [window for window in (64, 256, 1024) if window <= model.config.block_size]
    return {window: estimate(loss_of, tokens, window) for window in windows}


# ---- nanoGPT's ----
def copy_nanogpt(path, copy, data, dataset):
    """Copy a checkout of nanoGPT, with the tokens of our folder `data` as its `dataset`."""
    shutil.copytree(path, copy, ignore=shutil.ignore_patterns(".git"))
    folder = copy / "data" / dataset
    folder.mkdir(exist_ok=True)
    for name in ("train.bin", "val.bin"):  # both sort the characters, so the ids are the same
        shutil.copy(data / name, folder)
    vocab_size = json.loads((data / "meta.json").read_text(encoding="utf-8"))["vocab_size"]
    if vocab_size != 50257:  # without meta.pkl nanoGPT rounds GPT-2's vocabulary up, for speed
        meta = {"vocab_size": vocab_size, "itos": {}, "stoi": {}}
        (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


def train_nanogpt(copy, recipe, until):
    """Run nanoGPT's train.py; return (wall_s, curve), as run_ours does.

    recipe: the words behind train.py. until: the validation loss at which the run is ended.
    """
    curve = []
    reached = False
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(copy / "cache"), "PYTHONUNBUFFERED": "1"}
    began = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "train.py", *recipe.split()],
        cwd=copy,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | cache,
    ) as run:
        for line in run.stdout:
            if found := re.match(r"step (\d+): train loss .*, val loss (.*)", line):
                curve.append((round(time.monotonic() - began, 2), float(found[2])))
                reached = reached or curve[-1][1] <= until
                print(f"nanoGPT: {curve[-1][0]:.1f} s, {line.strip()}", flush=True)
            elif reached and line.startswith("iter"):  # its checkpoint has been saved
                run.terminate()
    return curve[-1][0] if reached else time.monotonic() - began, curve


def run_nanogpt(path, data, recipe=RECIPE, dataset="shakespeare_char", until=0.0, window=WINDOW):
    """Run nanoGPT's recipe in a copy of its checkout; return (wall_s, curve, its estimate).

    data: the folder of the data set. dataset: nanoGPT's name for it. window: of the estimate.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "nanoGPT"
        copy_nanogpt(path, copy, data, dataset)
        wall_s, curve = train_nanogpt(copy, recipe, until)
        (checkpoint,) = copy.glob("out*/ckpt.pt")
        state = torch.load(checkpoint, DEVICE, weights_only=True)
        model_py = nanogpt(copy)
    model = model_py.GPT(model_py.GPTConfig(**state["model_args"]))
    weights = {name.removeprefix("_orig_mod."): w for name, w in state["model"].items()}
    model.load_state_dict(weights)
    model.to(DEVICE).eval()
    ids = np.fromfile(data / "val.bin", np.uint16).astype(np.int64)
    loss = estimate(lambda x, y: model(x, y)[1], torch.from_numpy(ids).to(DEVICE), window)
    return wall_s, curve, loss


# ---- Both ----
def read_arguments():
    """Return (this script's own flags, the words of the training command)."""
    options = {"runs": "1", "nanogpt": "", "until": "0", "peer_runs": "", "data": ""}
    command = []
    for argument in sys.argv[1:]:
        name, _, value = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and name in options:
            options[name] = value
        else:
            command.append(argument)
    return options, command


def train_seconds(curve):
    """Return the seconds from the first evaluation to the last one."""
    return curve[-1][0] - curve[0][0]


def rounded_mean(values, digits=4):
    return round(statistics.mean(values), digits)


def peer_figures(options, peers, walls, trains):
    """Return the figures of nanoGPT's runs, with the ratios of their times to ours."""
    peer_walls, peer_curves, losses = zip(*peers)
    peer_trains = [train_seconds(curve) for curve in peer_curves]
    return {
        "nanogpt_runs": int(options["peer_runs"] or options["runs"]),
        "nanogpt_until": float(options["until"]),
        "nanogpt_wall_s": round(statistics.median(peer_walls), 1),
        "nanogpt_train_s": round(statistics.median(peer_trains), 1),
        f"nanogpt_estimate_{WINDOW}": rounded_mean(losses),
        "time_ratio": ratios(peer_walls, walls),
        "train_ratio": ratios(peer_trains, trains),
        "nanogpt_curve": peer_curves[0],
    }


def main():
    options, command = read_arguments()
    n_runs = int(options["runs"])
    data = Path(options["data"] or ROOT / "data" / "shakespeare").resolve()
    if options["data"]:
        command += [f"--dataset={data.name}", f"--data_dir={data.parent}"]
    found = []
    peers = []
    for run in range(n_runs):
        if options["nanogpt"] and run < int(options["peer_runs"] or n_runs):
            peer = run_nanogpt(options["nanogpt"], data, until=float(options["until"]))
        if options["nanogpt"]:
            peers.append(peer)
            print(f"run {run + 1}: nanoGPT {peer}", flush=True)
        found.append(run_ours(command, 1337 + run))
        print(f"run {run + 1}: {found[-1]}", flush=True)
    walls, curves, finals, estimates = zip(*found)
    trains = [train_seconds(curve) for curve in curves]
    more = peer_figures(options, peers, walls, trains) if peers else {}
    losses = [final["val_loss"] for final in finals]
    each_estimate = {}
    for window in estimates[0]:
        each_estimate[window] = [round(of_run[window], 4) for of_run in estimates]
    record(
        "time_to_loss",
        command=" ".join(word for word in command if not word.startswith("--data_dir=")),
        runs=len(found),
        wall_s=round(statistics.median(walls), 1),
        train_s=round(statistics.median(trains), 2),
        params=finals[0]["params"],
        steps=round(statistics.median(final["step"] for final in finals)),
        val_loss=rounded_mean(losses),
        val_losses=[round(loss, 4) for loss in losses],
        bits_per_byte=rounded_mean([final["bits_per_byte"] for final in finals]),
        estimates={window: rounded_mean(each) for window, each in each_estimate.items()},
        each_estimate=each_estimate,
        curve=curves[0],
        **more,
    )


if __name__ == "__main__":
    main()
