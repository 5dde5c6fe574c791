"""Measure how the best learning rates change as the model grows in width and depth.

    python bench/sweep.py [--steps=300] [--seeds=1]

Each row is one shape (heads of 32 channels) and one learning rate. This rate is half its default,
the default and twice the default, while the other rate stays the same. The loss is that of the
whole validation split of tiny Shakespeare after `steps` steps, as the mean over the seeds.
"""

import statistics

from ablation import run
from common import flags, record

import gpt

SHAPES = ((4, 64), (4, 128), (4, 256), (2, 128), (8, 128))  # layers, width
RATES = {name: gpt.UNFITTED[name] for name in ("muon_lr", "learning_rate")}


def main():
    f = flags(steps=300, seeds=1)
    found = {}
    for n_layer, n_embd in SHAPES:
        shape = f"--n_layer={n_layer} --n_embd={n_embd} --n_head={n_embd // 32}"
        for rate, default in RATES.items():
            losses = {}
            for value in (default / 2, default, default * 2):
                variant = f"{shape} --{rate}={value:g}" if value != default else shape
                if variant not in found:
                    runs = [run(variant, 1337 + i, f["steps"])[0] for i in range(f["seeds"])]
                    found[variant] = statistics.mean(runs)
                losses[f"{value:g}"] = round(found[variant], 4)
            record("sweep", rate=rate, n_layer=n_layer, n_embd=n_embd, losses=losses, **f)


if __name__ == "__main__":
    main()
