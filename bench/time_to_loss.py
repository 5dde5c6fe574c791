"""Run a training command as a user does: its whole wall time, and its loss.

    python bench/time_to_loss.py config/train_shakespeare.py [--key=value ...] [--runs=3]
    python bench/time_to_loss.py --nanogpt=PATH --runs=3 config/train_shakespeare.py --max_minutes=0.1

Runs differ in their seed. The loss over the full validation split is the one that the command prints at its end; that
of best.pt is also taken by nanoGPT's estimator, the mean loss of random windows of validation text, of 64 and of 256
tokens (here 2,400 windows, so that chance moves it less). With --nanogpt its README's recipe for a CPU, or for a GPU,
is run before each, with its own code, in which the seed is fixed, whole command against whole command; the loss of
the model that it leaves, on a CPU its last, on a GPU its best, is by the same estimator, with its own windows of 64
or 256 tokens. With --until=LOSS its run is ended once a validation loss that it prints is as low; --peer_runs=N
repeats it for the first N runs alone. Compilation begins with an empty cache. The training time is that from the
evaluation before the first step to the last one.
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
from common import ROOT, nanogpt, ratios, record

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# nanoGPT's README: "I have a GPU", where its checkpoint is its best, and "I only have a macbook"
RECIPE, WINDOW = "config/train_shakespeare_char.py", 256
if DEVICE == "cpu":
    RECIPE += (
        " --device=cpu --compile=False --eval_iters=20 --log_interval=100 --block_size=64 --batch_size=12 --n_layer=4"
        " --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0 --always_save_checkpoint=True"
    )
    WINDOW = 64


@torch.no_grad()
def estimate(loss, tokens, window, n=2400):
    """Return the mean of loss(x, y) over n random windows of tokens (int64), the same for every model."""
    generator = torch.Generator().manual_seed(1337)
    starts = torch.randint(len(tokens) - window - 1, (n, 1), generator=generator).to(tokens.device)
    parts = tokens[starts + torch.arange(window + 1, device=tokens.device)].split(60)
    return statistics.mean(
        float(loss(part[:, :-1].contiguous(), part[:, 1:].contiguous())) for part in parts
    )


def run_ours(command, seed):
    """Run gpt.py; return (wall_s, train_s, its final figures, {window: estimate})."""
    import gpt

    with tempfile.TemporaryDirectory() as out:
        began = time.time()
        command = [sys.executable, ROOT / "gpt.py", *command, f"--seed={seed}", f"--out_dir={out}"]
        cache = str(
            Path(out) / "cache"
        )  # or else a second run would find what the first has compiled
        subprocess.run(command, check=True, env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache})
        wall_s = time.time() - began
        log = (Path(out) / "log.jsonl").read_text(encoding="utf-8")
        lines = [json.loads(line) for line in log.splitlines()]
        model = gpt.load_checkpoint(Path(out) / "best.pt")[0]
    evaluations = [
        line["elapsed_s"] for line in lines if "val_loss" in line and "perplexity" not in line
    ]
    settings = lines[0]["config"]
    data = gpt.Data(
        Path(gpt.data_dir or ROOT / "data") / settings["dataset"], settings["block_size"]
    )
    tokens = torch.from_numpy(
        data.tokens["val"][np.arange(len(data.tokens["val"]))].astype(np.int64)
    )
    machine = gpt.set_up_machine()
    model.to(machine.device)

    def loss(x, y):
        return machine.loss(model, [x, y, torch.ones(y.shape)])

    windows = [n for n in (64, 256) if n <= model.config.block_size]
    estimates = {n: estimate(loss, tokens, n) for n in windows}
    return (
        wall_s,
        evaluations[-1] - evaluations[0],
        lines[-1] | {"params": model.n_params()},
        estimates,
    )


def run_nanogpt(path, until):
    """Run nanoGPT's recipe in a copy of its checkout, on our tokens; return (wall_s, train_s, its model's estimate)."""
    with tempfile.TemporaryDirectory() as folder:
        copy, data = Path(folder) / "nanoGPT", ROOT / "data" / "shakespeare"
        shutil.copytree(path, copy, ignore=shutil.ignore_patterns(".git"))
        for name in ("train.bin", "val.bin"):  # the same ids: both sort the characters
            shutil.copy(data / name, copy / "data" / "shakespeare_char")
        chars = json.loads((data / "meta.json").read_text(encoding="utf-8"))["tokenizer"]["chars"]
        meta = {
            "vocab_size": len(chars),
            "itos": dict(enumerate(chars)),
            "stoi": {c: i for i, c in enumerate(chars)},
        }
        (copy / "data" / "shakespeare_char" / "meta.pkl").write_bytes(pickle.dumps(meta))
        began, evaluations, reached = time.time(), [], False
        environment = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / "cache"),
            "PYTHONUNBUFFERED": "1",
        }
        command = [sys.executable, "train.py", *RECIPE.split()]
        with subprocess.Popen(
            command, cwd=copy, stdout=subprocess.PIPE, text=True, env=environment
        ) as run:
            for line in run.stdout:
                if found := re.match(r"step (\d+): train loss .*, val loss (.*)", line):
                    evaluations.append(time.time())
                    reached = reached or float(found[2]) <= until
                    print(f"nanoGPT: {evaluations[-1] - began:.1f} s, {line.strip()}", flush=True)
                elif reached and line.startswith("iter"):  # its checkpoint is saved
                    run.terminate()
        wall_s = (evaluations[-1] if reached else time.time()) - began
        state = torch.load(copy / "out-shakespeare-char" / "ckpt.pt", DEVICE, weights_only=True)
        model_py = nanogpt(copy)
        model = model_py.GPT(model_py.GPTConfig(**state["model_args"]))
        model.load_state_dict({k.removeprefix("_orig_mod."): v for k, v in state["model"].items()})
        model.to(DEVICE).eval()
        tokens = torch.from_numpy(np.fromfile(data / "val.bin", np.uint16).astype(np.int64)).to(
            DEVICE
        )
        own = estimate(lambda x, y: model(x, y)[1], tokens, WINDOW)
        return wall_s, evaluations[-1] - evaluations[0], own


def main():
    options = {"runs": "1", "nanogpt": "", "until": "0", "peer_runs": ""}
    command = []
    for argument in sys.argv[1:]:
        name, _, value = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and name in options:
            options[name] = value
        else:
            command.append(argument)
    found, runs, peer = [], int(options["runs"]), (0, 0, 0)
    for run in range(runs):
        if options["nanogpt"] and run < int(options["peer_runs"] or runs):
            peer = run_nanogpt(options["nanogpt"], float(options["until"]))
        found.append((*run_ours(command, 1337 + run), *peer))
        wall_s, train_s, figures, estimates, *theirs = found[-1]
        print(
            f"run {run + 1}: {wall_s:.1f} s, {train_s:.1f} s, {figures}, {estimates}, nanoGPT {theirs}",
            flush=True,
        )
    walls, trains, finals, estimates, peer_walls, peer_trains, peer_losses = zip(
        *found, strict=True
    )
    more = {}
    if options["nanogpt"]:
        more = {
            "nanogpt_runs": int(options["peer_runs"] or runs),
            "nanogpt_until": float(options["until"]),
            "nanogpt_wall_s": round(statistics.median(peer_walls), 1),
            "nanogpt_train_s": round(statistics.median(peer_trains), 1),
            f"nanogpt_estimate_{WINDOW}": round(statistics.mean(peer_losses), 4),
            "time_ratio": ratios(peer_walls, walls),
            "train_ratio": ratios(peer_trains, trains),
        }
    record(
        "time_to_loss",
        command=" ".join(command),
        runs=len(found),
        wall_s=round(statistics.median(walls), 1),
        train_s=round(statistics.median(trains), 2),
        params=finals[0]["params"],
        steps=round(statistics.median(final["step"] for final in finals)),
        val_loss=round(statistics.mean(final["val_loss"] for final in finals), 4),
        val_losses=[round(final["val_loss"], 4) for final in finals],
        bits_per_byte=round(statistics.mean(final["bits_per_byte"] for final in finals), 4),
        estimates={n: round(statistics.mean(e[n] for e in estimates), 4) for n in estimates[0]},
        each_estimate={n: [round(e[n], 4) for e in estimates] for n in estimates[0]},
        **more,
    )


if __name__ == "__main__":
    main()
