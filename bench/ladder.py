"""Train a ladder of models on several texts, fit a law to their losses, and draw it.

    python bench/ladder.py --data_dir=FOLDER [--only=TEXT] [--lanes=2]
    python bench/ladder.py --draw=1           only fit and draw what bench/ladder.jsonl holds

The first form runs each line of bench/ladder.txt that bench/ladder.jsonl does not hold yet: a data
set's name, the FLOPs to spend, and flags of gpt.py. The number of steps follows from the FLOPs, so
the time that a run takes does not matter. `lanes` runs go on at once, each with one thread.

The law is that of Hoffmann et al. (arXiv:2203.15556) for a text that is seen several times
(Muennighoff et al., arXiv:2305.16264), with a term for the size of a batch:

    loss = E + s * (A / N**a + B / D**b)
    D = U * R * (1 - exp(-epochs / R)) / (1 + c * tokens_per_step / 2048)

N: FLOPs per token / 6, in millions; U: tokens of the text, in millions. E and s belong to a text,
the others to all. The second form prints them, and the fit's error, and draws docs/fitting.svg.
"""

import datetime
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from common import COMMIT, ROOT, flags, hardware, read_log

import gpt

RUNS = ROOT / "bench" / "ladder.txt"
FOUND = ROOT / "bench" / "ladder.jsonl"
NAMES = ("A", "B", "a", "b", "R", "c")  # of the law's shared numbers


# ---- Training ----
def plan(flops, arguments, meta):
    """Return (steps, FLOPs per token, tokens per step) of a run of gpt.py."""
    changes = {}
    for argument in arguments:
        name, _, value = argument.removeprefix("--").partition("=")
        kind = gpt.SETTINGS[name].type
        changes[name] = value == "True" if kind is bool else kind(value)
    settings = gpt.checked_settings(**changes)
    flops_per_token = gpt.flops_of_token(settings, meta["vocab_size"])
    tokens_per_step = settings.batch_size * settings.block_size
    return round(flops / flops_per_token / tokens_per_step), flops_per_token, tokens_per_step


def train(line, data_dir):
    """Run a line of ladder.txt, and append its figures to ladder.jsonl."""
    text, flops, *arguments = shlex.split(line)
    meta, _ = gpt.read_meta(Path(data_dir) / text)
    steps, flops_per_token, tokens_per_step = plan(float(flops), arguments, meta)
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, ROOT / "gpt.py", f"--dataset={text}", f"--data_dir={data_dir}"]
        command += [f"--out_dir={out}", f"--max_iters={steps}", "--eval_interval=100000000"]
        command += ["--sample_tokens=0", "--compile=True", *arguments]
        threads = {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | threads)
        loss = read_log(out)[-1]["val_loss"]
    figures = {
        "run": line,
        "loss": round(loss, 4),
        "params": round(flops_per_token / 6),
        "tokens": steps * tokens_per_step,
        "tokens_per_step": tokens_per_step,
        "unique": meta["train_tokens"],
        "vocab_size": meta["vocab_size"],
        "hardware": "1 thread, " + hardware(),
        "torch": torch.__version__,
        "commit": COMMIT,
        "date": str(datetime.date.today()),
    }
    print(json.dumps(figures), flush=True)
    with open(FOUND, "a", encoding="utf-8") as file:
        file.write(json.dumps(figures) + "\n")


# ---- The law ----
def columns(found):
    """Return {name: float64 tensor} of the ladder's numbers, in millions, and its texts."""
    texts = sorted({figures["run"].split()[0] for figures in found})
    numbers = {
        "text": [texts.index(figures["run"].split()[0]) for figures in found],
        "N": [figures["params"] / 1e6 for figures in found],
        "D": [figures["tokens"] / 1e6 for figures in found],
        "U": [figures["unique"] / 1e6 for figures in found],
        "batch": [figures["tokens_per_step"] / 2048 for figures in found],
        "loss": [figures["loss"] for figures in found],
    }
    numbers = {name: torch.tensor(values).double() for name, values in numbers.items()}
    numbers["text"] = numbers["text"].long()
    return numbers, texts


def predict(shared, lowest, scale, numbers):
    """Return the law's losses; shared: its numbers in the order of NAMES."""
    A, B, a, b, R, c = shared
    epochs = numbers["D"] / numbers["U"]
    D = numbers["U"] * R * (1 - torch.exp(-epochs / R)) / (1 + c * numbers["batch"])
    falling = A * numbers["N"] ** -a + B * D**-b
    return lowest[numbers["text"]] + scale[numbers["text"]] * falling


def fit(numbers, texts):
    """Return (shared, lowest, scale) with the least Huber loss."""
    logs = torch.tensor([0.3, 0.3, 0.3, 0.5, 8.0, 0.5]).double().log().requires_grad_()
    lowest = torch.ones(len(texts)).double().requires_grad_()
    log_scale = torch.zeros(len(texts)).double().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logs, lowest, log_scale], max_iter=3000, line_search_fn="strong_wolfe"
    )

    def loss():
        optimizer.zero_grad()
        found = predict(logs.exp(), lowest, log_scale.exp(), numbers)
        error = torch.nn.functional.huber_loss(found, numbers["loss"], delta=0.02)
        error = 1e4 * error + 0.1 * (log_scale**2).sum() + 0.01 * (logs**2).sum()
        error.backward()
        return error

    optimizer.step(loss)
    return logs.exp().detach(), lowest.detach(), log_scale.exp().detach()


def draw(numbers, texts, shared, lowest, scale):
    """Draw each text's runs, and the law's best loss for each number of FLOPs."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    rows = math.ceil(len(texts) / 4)
    figure, all_axes = pyplot.subplots(rows, 4, figsize=(12, 3.2 * rows))
    flops = 6 * numbers["N"] * numbers["D"]  # in units of 1e12
    params = torch.logspace(-1.3, 1.3, 400).double()
    for axes in all_axes.flat[len(texts) :]:
        axes.remove()
    for i, axes in enumerate(all_axes.flat[: len(texts)]):
        mine = numbers["text"] == i
        for low, high, color in ((0, 12, "C0"), (12, 30, "C1"), (30, 60, "C2"), (60, 1e9, "C3")):
            here = mine & (flops >= low) & (flops < high)
            if not here.any():
                continue
            middle = flops[here].mean()
            axes.plot(numbers["N"][here], numbers["loss"][here], "o", color=color)
            curve = {
                "text": torch.full((400,), i),
                "N": params,
                "D": middle / 6 / params,
                "U": numbers["U"][mine][:1],
                "batch": torch.ones(400).double(),
            }
            losses = predict(shared, lowest, scale, curve)
            axes.plot(params, losses, color=color, label=f"{middle:.0f} TFLOP")
        axes.set(xscale="log", title=texts[i], xlabel="FLOPs per token / 6, millions")
        axes.grid(alpha=0.3)
        axes.set_ylim(numbers["loss"][mine].min() * 0.98, numbers["loss"][mine].max() * 1.06)
        axes.legend(fontsize=7)
    for axes in all_axes[:, 0]:
        axes.set_ylabel("validation loss, nats")
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "fitting.svg", metadata={"Date": None})


def report(found):
    """Print the law of the runs found, and its error; draw it. A text needs two runs or more."""
    names = [figures["run"].split()[0] for figures in found]
    found = [figures for figures, name in zip(found, names) if names.count(name) > 1]
    numbers, texts = columns(found)
    shared, lowest, scale = fit(numbers, texts)
    errors = predict(shared, lowest, scale, numbers) - numbers["loss"]
    print({name: round(float(value), 3) for name, value in zip(NAMES, shared)})
    print(f"{len(found)} runs, root of the mean squared error {errors.square().mean().sqrt():.4f}")
    for i, text in enumerate(texts):
        mine = errors[numbers["text"] == i]
        print(f"{text}: {len(mine)} runs, largest error {mine.abs().max():.4f}")
    for tflop in (8, 30, 200):
        print(f"{tflop} TFLOP: {valley(tflop, shared)}")
    draw(numbers, texts, shared, lowest, scale)


def valley(tflop, shared):
    """Return in words the best size for a long text, and what the size of gpt.py's rule loses."""
    A, B, a, b, _, c = shared

    def loss(N):
        return float(A * N**-a + B * (tflop / 6 / N / (1 + c)) ** -b)

    best = min((10 ** (i / 200) for i in range(-300, 300)), key=loss)
    rule = gpt.best_size(tflop * 1e12) / 1e6
    return f"best {best:.2f}M, the rule's {rule:.2f}M loses {loss(rule) - loss(best):.4f} times s"


def main():
    f = flags(data_dir=str(ROOT / "data"), only="", lanes=2, draw=0)
    lines = FOUND.read_text(encoding="utf-8").splitlines() if FOUND.exists() else []
    found = [json.loads(line) for line in lines]
    if f["draw"]:
        report(found)
        return
    done = {figures["run"] for figures in found}
    wanted = RUNS.read_text(encoding="utf-8").splitlines()
    wanted = [line for line in wanted if line and not line.startswith("#") and line not in done]
    with ThreadPoolExecutor(f["lanes"]) as lanes:
        wanted = [line for line in wanted if f["only"] in ("", line.split()[0])]
        for _ in lanes.map(lambda line: train(line, f["data_dir"]), wanted):
            pass  # a run that failed raises its error here


if __name__ == "__main__":
    main()
