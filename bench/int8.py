"""Weights in int8, as by sample.py --quantize=int8: their size, the loss with them, and how fast they generate.

    python bench/int8.py                                                trains a small model first, about a minute
    python bench/int8.py --checkpoint=out/pydoc/best.pt [--data=FOLDER] [--batches=40] [--rounds=3]

The loss is that of the checkpoint on up to `batches` batches of its data set's validation split, spread evenly, with
weights and activations in float32, in bfloat16, and with int8 weights and either activations; change is relative to
float32. The size is of all weights, over bfloat16's. Tokens per second, greedily from a prompt of 8 tokens, for the
checkpoint's shape and for that of GPT-2 with random weights, are medians of `rounds`; in each all take their turn.
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
}
GPT2 |= {
    "bias": True,
    "use_rope": False,
    "use_rms_norm": False,
    "use_swiglu": False,
    "dropout": 0.0,
}
VARIANTS = {
    "float32": (torch.float32, False),
    "bfloat16": (torch.bfloat16, False),
    "int8, float32": (torch.float32, True),
    "int8, bfloat16": (torch.bfloat16, True),
}


def variants(model, device):
    """Yield (name, a copy of the model as that variant has it)."""
    for name, (dtype, int8) in VARIANTS.items():
        copy = gpt.GPT(model.config)
        copy.load_state_dict(model.state_dict())
        copy = sample.speed_up_rows(copy.eval().to(device, dtype))
        if int8:
            sample.quantize_weights(copy)
        yield name, copy


def losses(model, folder, device, batches):
    """Return {variant: mean loss in nats per token}."""
    data = gpt.Data(folder, model.config.block_size)
    machine = gpt.Machine(device, torch.float32, False, 0, 1)  # no autocast
    n = min(batches, data.n_val_batches())
    return {name: gpt.evaluate(copy, data, machine, n) for name, copy in variants(model, device)}


def speeds(model, device, rounds, tokens):
    """Return {variant: tokens per second, one for each round}, and {variant: bytes of the weights}."""
    copies, found = dict(variants(model, device)), {name: [] for name in VARIANTS}
    for step in range(rounds + 1):
        for name, copy in copies.items():
            began = time.perf_counter()
            for ids in copy.generate([list(range(8))], tokens if step else 2, temperature=0.0):
                ids.tolist()
            if step:  # the first only warms up
                found[name].append(tokens / (time.perf_counter() - began))
    return found, {name: sample.weight_bytes(copy) for name, copy in copies.items()}


def report(shape, model, device, rounds, **figures):
    found, size = speeds(
        model, device, rounds, min(model.config.block_size - 8, 100 if shape != "gpt2" else 30)
    )
    record(
        "int8",
        shape=shape,
        mib={name: round(n / 2**20, 2) for name, n in size.items()},
        size_ratio=round(size["int8, bfloat16"] / size["bfloat16"], 4),
        tokens_per_s={name: round(statistics.median(values), 1) for name, values in found.items()},
        ratios={
            f"{a} / {b}": ratios(found[a], found[b])
            for a in VARIANTS
            if "int8" in a
            for b in ("float32", "bfloat16")
        },
        **figures,
    )


def trained(folder):
    """Return the checkpoint of 400 steps of gpt.py's default recipe, about a minute."""
    command = [
        sys.executable,
        ROOT / "gpt.py",
        "--max_iters=400",
        "--sample_tokens=0",
        f"--out_dir={folder}",
    ]
    subprocess.run(command, check=True)
    return folder / "best.pt"


def main():
    f = flags(checkpoint="", data="", batches=40, rounds=3)
    device = gpt.pick_device("auto")
    with tempfile.TemporaryDirectory() as folder:
        path = f["checkpoint"] or trained(Path(folder))
        model, _, state = gpt.load_checkpoint(path)
    found = losses(
        model, Path(f["data"] or ROOT / "data" / state["config"]["dataset"]), device, f["batches"]
    )
    change = {name: round(loss / found["float32"] - 1, 6) for name, loss in found.items()}
    found = {name: round(loss, 5) for name, loss in found.items()}
    print(json.dumps({"val_loss": found, "change": change}))
    report("checkpoint", model, device, f["rounds"], val_loss=found, loss_change=change)
    torch.manual_seed(0)
    report("gpt2", gpt.GPT(gpt.GPTConfig(**GPT2)), device, f["rounds"])


if __name__ == "__main__":
    main()
