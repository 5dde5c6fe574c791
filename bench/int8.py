"""Measure the size, loss and speed of int8 weights, as by sample.py --quantize=int8.

    python bench/int8.py                           trains a small model first, about a minute
    python bench/int8.py --checkpoint=out/pydoc/best.pt [--data=FOLDER] [--batches=40] [--rounds=3]

The loss is that of the checkpoint on up to `batches` batches, which are spread evenly over its data
set's validation split. It is measured with weights and activations in float32, with both in
bfloat16, and with int8 weights and either kind of activations. Its change is relative to float32.
The size is that of all weights, relative to bfloat16. The tokens per second are those of generating
greedily from a prompt of 8 tokens. They are measured for the checkpoint's shape and for GPT-2's
shape with random weights. They are medians of `rounds` rounds, and in each round all take turns.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import ROOT, flags, ratios, record

import gpt
import sample

GPT2 = {
    "n_layer": 12,
    "n_head": 12,
    "n_kv_head": 12,
    "n_embd": 768,
    "block_size": 1024,
    "vocab_size": 50304,
    "dropout": 0.0,
    "bias": True,
    "use_rope": False,
    "use_rms_norm": False,
    "use_swiglu": False,
    "qk_norm": False,
    "tie_weights": True,
}
VARIANTS = {
    "float32": (torch.float32, False),
    "bfloat16": (torch.bfloat16, False),
    "int8, float32": (torch.float32, True),
    "int8, bfloat16": (torch.bfloat16, True),
}
BATCH_SIZE = 8


def variants(model, device):
    """Yield (name, a copy of the model in that variant)."""
    for name, (dtype, int8) in VARIANTS.items():
        copy = gpt.GPT(model.config)
        copy.load_state_dict(model.state_dict())
        copy = sample.speed_up_rows(copy.eval().to(device, dtype))
        if int8:
            sample.quantize_weights(copy)
        yield name, copy


def losses(model, folder, device, batches):
    """Return {variant: mean loss in nats per token}."""
    data = gpt.Data(folder, model.config.block_size, splits=["val"])
    machine = gpt.Machine(device, torch.float32)  # no autocast
    found = {}
    for name, copy in variants(model, device):
        found[name] = gpt.evaluate(copy, data, machine, batches, BATCH_SIZE)
    return found


def generate(model, n):
    """Generate n tokens greedily from a prompt of 8; return the seconds that it takes."""
    began = time.perf_counter()
    for ids in model.generate([list(range(8))], n, temperature=0.0):
        ids.tolist()
    return time.perf_counter() - began


def speeds(copies, rounds, n_tokens):
    """Return {variant: [tokens per second of each round]}. copies: {variant: model}."""
    found = {name: [] for name in copies}
    for copy in copies.values():
        generate(copy, 2)  # warms up
    for _ in range(rounds):
        for name, copy in copies.items():
            found[name].append(n_tokens / generate(copy, n_tokens))
    return found


def report(shape, model, device, rounds, **figures):
    """Measure size and speed of a model's variants, and record them with the other figures."""
    copies = dict(variants(model, device))
    n_tokens = 30 if shape == "gpt2" else 100
    found = speeds(copies, rounds, min(model.config.block_size - 8, n_tokens))
    size = {name: sample.weight_bytes(copy) for name, copy in copies.items()}
    pairs = {}
    for name in VARIANTS:
        if "int8" in name:
            for plain in ("float32", "bfloat16"):
                pairs[f"{name} / {plain}"] = ratios(found[name], found[plain])
    record(
        "int8",
        shape=shape,
        mib={name: round(n / 2**20, 2) for name, n in size.items()},
        size_ratio=round(size["int8, bfloat16"] / size["bfloat16"], 4),
        tokens_per_s={name: round(statistics.median(values), 1) for name, values in found.items()},
        ratios=pairs,
        **figures,
    )


def trained(folder):
    """Train 400 steps of gpt.py's default recipe, about a minute, and return the checkpoint."""
    command = [sys.executable, ROOT / "gpt.py", "--max_iters=400", "--sample_tokens=0"]
    subprocess.run([*command, f"--out_dir={folder}"], check=True)
    return folder / "best.pt"


def main():
    f = flags(checkpoint="", data="", batches=40, rounds=3)
    device = gpt.pick_device("auto")
    with tempfile.TemporaryDirectory() as folder:
        path = f["checkpoint"] or trained(Path(folder))
        model, _, state = gpt.load_checkpoint(path)
    data = f["data"] or ROOT / "data" / state["config"]["dataset"]
    found = losses(model, data, device, f["batches"])
    change = {name: round(loss / found["float32"] - 1, 6) for name, loss in found.items()}
    found = {name: round(loss, 5) for name, loss in found.items()}
    print(json.dumps({"val_loss": found, "change": change}))
    report("checkpoint", model, device, f["rounds"], val_loss=found, loss_change=change)
    torch.manual_seed(0)
    report("gpt2", gpt.GPT(gpt.GPTConfig(**GPT2)), device, f["rounds"])


if __name__ == "__main__":
    main()
