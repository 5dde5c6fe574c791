"""Compare what gpt.py fits to a text and some minutes with another checkout's settings, or a grid.

    python bench/fitting.py --data_dir=FOLDER --texts=A,B --minutes=1,2,5 --old=PATH
    python bench/fitting.py --data_dir=FOLDER --texts=A --minutes=2 --grid=1

A row is one text and one number of minutes. With --old, the other checkout runs too, in turn, by
--old_flags, such as config/train_shakespeare.py. With --grid, the choice is compared with its
neighbours: half and twice the batch, dropout and learning rates, other sizes, no temperature. A run
is the whole command, with an empty compiler cache; the loss is that of the whole validation split.
"""

import subprocess
import tempfile
from pathlib import Path

from common import ROOT, flags, record, train

import gpt


def run(checkout, text, minutes, f, *arguments):
    """Return (loss, tokens, settings) of a run of a checkout's gpt.py."""
    common = [f"--dataset={text}", f"--data_dir={f['data_dir']}", f"--max_minutes={minutes}"]
    with tempfile.TemporaryDirectory() as cache:
        log = train(
            *arguments,
            *common,
            "--sample_tokens=0",
            f"--seed={f['seed']}",
            checkout=checkout,
            TORCHINDUCTOR_CACHE_DIR=cache,
        )
    settings = log[0]["config"]
    tokens = log[-1]["step"] * settings["batch_size"] * settings["block_size"]
    return round(log[-1]["val_loss"], 4), tokens, settings


def neighbours(settings):
    """Return {name: flags} of the runs around a choice."""
    found = {}
    for name in ("batch_size", "learning_rate", "muon_lr", "dropout"):
        for factor in (0.5, 2):
            value = type(settings[name])(settings[name] * factor)
            if value:
                found[f"{name} x {factor}"] = [f"--{name}={value:g}"]
    shape = {"n_head": settings["n_head"], "n_kv_head": settings["n_kv_head"]}
    for step in (-1, 1):
        width = settings["n_embd"] + 32 * step
        heads = max(n for n in range(1, shape["n_head"] + 1) if width % (2 * n) == 0)
        found[f"width {width}"] = [f"--n_embd={width}", f"--n_head={heads}", "--n_kv_head=1"]
    found["one layer more"] = [f"--n_layer={settings['n_layer'] + 1}"]
    found["no temperature"] = ["--train_temperature=1.0"]
    return found


def main():
    f = flags(
        data_dir=str(ROOT / "data"),
        texts="shakespeare",
        minutes="2",
        old="",
        old_flags="",
        grid=0,
        seed=1337,
    )
    for text in f["texts"].split(","):
        for minutes in f["minutes"].split(","):
            loss, tokens, settings = run(ROOT, text, minutes, f)
            figures = {"loss": loss, "tokens": tokens}
            if f["old"]:
                # A config file is the old checkout's own.
                words = [
                    word if word.startswith("--") else str(Path(f["old"]) / word)
                    for word in f["old_flags"].split()
                ]
                figures["old_loss"], figures["old_tokens"], _ = run(
                    f["old"], text, minutes, f, *words
                )
                figures["old"] = subprocess.run(
                    ["git", "-C", f["old"], "rev-parse", "--short", "HEAD"],
                    check=True,
                    capture_output=True,
                    text=True,
                ).stdout.strip()
                figures["old_flags"] = f["old_flags"]
            if f["grid"]:
                chosen = {name: settings[name] for name in gpt.UNFITTED}
                base = [f"--{name}={value}" for name, value in chosen.items()]
                for name, changes in neighbours(settings).items():
                    figures[name] = run(ROOT, text, minutes, f, *base, *changes)[0]
            fitted = {name: settings[name] for name in gpt.UNFITTED}
            record(
                "fitting",
                text=text,
                minutes=float(minutes),
                seed=f["seed"],
                **figures,
                fitted=fitted,
            )


if __name__ == "__main__":
    main()
