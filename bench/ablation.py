"""Measure what each choice of the default recipe is worth: change one setting, keep the steps.

    python bench/ablation.py [--seeds=3] [--steps=600] [--only=TEXT]

The loss is that of the whole validation split of tiny Shakespeare, as the mean and range over the
seeds. A difference that is smaller than the range says nothing. Variants with other batch sizes
take as many tokens as the default. --only selects the variants whose names contain the text.
"""

import statistics

from common import flags, median_speed, record, train

VARIANTS = {
    "default": "",
    "muon_momentum 0.95": "--muon_momentum=0.95",
    "AdamW alone, 3e-3": "--optimizer=adamw --learning_rate=3e-3",
    "tied head, GPT-2's initialization": "--tie_weights=True",
    "4 key/value heads": "--n_kv_head=4",
    "no qk_norm": "--qk_norm=False",
    "batch 16, rates times 1.4": "--batch_size=16 --muon_lr=0.035 --learning_rate=8e-3",
    "block 128": "--block_size=128 --batch_size=16",
    "train_temperature 0.87": "--train_temperature=0.87",
    "float32": "--dtype=float32",
}
HALF_THE_STEPS = ("batch 16, rates times 1.4",)  # so that they take as many tokens


def run(variant, seed, steps):
    """Train with the flags of a variant; return (validation loss, tokens per second)."""
    flags = [f"--max_iters={steps}", f"--eval_interval={steps}", "--eval_iters=1"]
    flags += ["--sample_tokens=0", f"--seed={seed}", *variant.split()]
    log = train(*flags)
    return log[-1]["val_loss"], median_speed(log)


def measure(name, seeds, steps):
    """Train a variant once for each seed and record what it reached."""
    losses = []
    speeds = []
    for seed in range(1337, 1337 + seeds):
        loss, speed = run(VARIANTS[name], seed, steps)
        losses.append(loss)
        speeds.append(speed)
    record(
        "ablation",
        variant=name,
        steps=steps,
        val_loss=round(statistics.mean(losses), 4),
        val_losses=[round(loss, 4) for loss in losses],
        tokens_per_s=round(statistics.median(speeds)),
    )


def main():
    f = flags(seeds=3, steps=600, only="")
    for name in VARIANTS:
        if f["only"] in name:
            steps = f["steps"] // 2 if name in HALF_THE_STEPS else f["steps"]
            measure(name, f["seeds"], steps)


if __name__ == "__main__":
    main()
