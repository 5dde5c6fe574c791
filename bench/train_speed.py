"""Measure training tokens per second versus nanoGPT, on one machine and one shape of batches.

    python bench/train_speed.py --nanogpt=PATH
    python bench/train_speed.py --nanogpt=PATH --shape=gpt2 --batch_size=32 --data=data/NAME   (GPU)

Both train a model of the shape's layers, heads and width by their own code, with `accumulate`
micro-batches a step. nanoGPT runs with its own AdamW. On a CPU it runs in float32, its default. If
the CPU has bfloat16, it also runs with autocast, eagerly and compiled. On a GPU it runs with
autocast and torch.compile, its defaults. Ours runs compiled, as gpt.py does in longer runs, and
eagerly. The figure is the median of `runs` measurements, taken in turn. mfu is our share of the
GPU's peak. Several calls find the best micro-batch of each. The tokens are random or come from a
prepared data set. nanoGPT's vocabulary is rounded up to a multiple of 64, as it advises.
"""

import time
from pathlib import Path

import torch
from common import (
    best_device,
    flags,
    in_turn,
    is_worker,
    nanogpt,
    ratios,
    record,
    serve,
    wait_for,
)

import gpt

SHAPES = {  # the second set of sizes is for gpt.py alone
    "shakespeare": (
        {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 65},
        {"n_kv_head": 6},
    ),
    "gpt2": (
        {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50257},
        {"n_kv_head": 12, "tie_weights": True},
    ),
    "medium": (  # config/train_medium.py, config/train_large.py
        {"n_layer": 11, "n_head": 10, "n_embd": 640, "block_size": 512, "vocab_size": 50257},
        {"n_kv_head": 5, "tie_weights": True},
    ),
    "large": (
        {"n_layer": 26, "n_head": 16, "n_embd": 1024, "block_size": 1024, "vocab_size": 50257},
        {"n_kv_head": 8, "tie_weights": True},
    ),
}


# ---- Batches ----
class RandomRows:
    """Stands in for a data set, as far as a Trainer needs one. Each row is random tokens."""

    def __init__(self, block_size, vocab_size):
        self.block_size = block_size
        self.vocab_size = vocab_size

    def get_batch(self, split, first_row, n_rows):
        """Return inputs and targets (n_rows, block_size) int64, and weights of 1."""
        ids = torch.randint(self.vocab_size, (n_rows, self.block_size + 1))
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.ones(ids[:, 1:].shape)


def open_data(case):
    """Return the data set of a case: the one that it names, or random rows."""
    block_size = case["sizes"]["block_size"]
    if case["data"]:
        return gpt.Data(case["data"], block_size)
    return RandomRows(block_size, case["sizes"]["vocab_size"])


# ---- Training steps ----
def peer_model(case, device):
    """Return nanoGPT's model with a case's sizes."""
    model_py = nanogpt(case["nanogpt"])
    size = case["sizes"]["vocab_size"]
    if size >= 1000:
        size += -size % 64
    config = model_py.GPTConfig(**case["sizes"] | {"vocab_size": size}, dropout=0.0, bias=False)
    return model_py.GPT(config).to(device)


def peer(case, device):
    """Return nanoGPT's training step, which takes the same batches each time."""
    model = peer_model(case, device)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), device.type)
    forward = torch.compile(model) if case["compile"] else model
    data = open_data(case)
    n_rows = case["batch_size"]
    batches = [data.get_batch("train", i * n_rows, n_rows) for i in range(case["accumulate"])]

    def step():
        for x, y, _ in batches:
            if device.type == "cuda":
                x = x.pin_memory().to(device, non_blocking=True)
                y = y.pin_memory().to(device, non_blocking=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=case["autocast"]):
                loss = forward(x, y)[1] / len(batches)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def ours(case, device):
    """Return gpt.py's training step, compiled if the case says so."""
    sizes = case["sizes"] | case["more"]
    settings = gpt.checked_settings(
        **{name: value for name, value in sizes.items() if name != "vocab_size"},
        batch_size=case["batch_size"],
        gradient_accumulation_steps=case["accumulate"],
        compile=case["compile"],
        optimizer=case["optimizer"],
        device=device.type,
    )
    machine = gpt.set_up_machine(settings)
    model = gpt.GPT(gpt.model_config(settings, sizes["vocab_size"]))
    trainer = gpt.Trainer(settings, model, open_data(case), machine)
    trainer.get_ready()

    def step():
        trainer.gradients(0)
        trainer.update()

    return step


# ---- Measuring ----
def prepare(case):
    """Return a function that returns tokens per second over case["steps"] steps."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    device = best_device()
    step = (peer if case["nanogpt"] else ours)(case, device)
    tokens = case["accumulate"] * case["batch_size"] * case["sizes"]["block_size"]  # per step

    def take_steps(n):
        for _ in range(n):
            step()
        wait_for(device)

    def leave_memory():
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the other processes need it

    def measure():
        take_steps(2 if device.type == "cuda" else 1)  # these steps do not count
        began = time.perf_counter()
        take_steps(case["steps"])
        speed = case["steps"] * tokens / (time.perf_counter() - began)
        leave_memory()
        return speed

    take_steps(3)
    leave_memory()
    return measure


def cases(f):
    """Return {name: (this script, case)} for what the flags f ask for."""
    sizes, more = SHAPES[f["shape"]]
    base = {"sizes": sizes, "more": more, "nanogpt": "", "optimizer": "muon"}
    base |= {key: f[key] for key in ("batch_size", "steps", "accumulate", "data")}
    on_gpu = torch.cuda.is_available()
    found = {"ours": base | {"compile": True}}
    if not on_gpu or f["shape"] == "shakespeare":
        found["ours, eager"] = base | {"compile": False}
        found["ours, AdamW alone"] = base | {"compile": True, "optimizer": "adamw"}
    if f["nanogpt"]:
        theirs = base | {"nanogpt": f["nanogpt"]}
        found["nanoGPT"] = theirs | {"compile": on_gpu, "autocast": on_gpu}
        if not on_gpu and gpt.native_bfloat16(torch.device("cpu")):
            found["nanoGPT, autocast"] = theirs | {"compile": False, "autocast": True}
            found["nanoGPT, autocast and compile"] = theirs | {"compile": True, "autocast": True}
    return {name: (__file__, case) for name, case in found.items()}


def report(f, found, record=record):
    """Print the medians of what was measured for the flags f, and record them."""
    sizes, more = SHAPES[f["shape"]]
    with torch.device("meta"):
        model = gpt.GPT(gpt.GPTConfig(**sizes | more))
    medians = {name: sorted(speeds)[len(speeds) // 2] for name, speeds in found.items()}
    for name, speed in medians.items():
        print(f"{name:32s} {speed:10,.0f} tokens/s")
    machine = gpt.set_up_machine(gpt.checked_settings())
    record(
        "train_speed",
        shape=f["shape"],
        batch_size=f["batch_size"],
        accumulate=f["accumulate"],
        data=Path(f["data"]).name,
        mfu=machine.mfu(medians["ours"] * model.config.flops_per_token()),
        tokens_per_s={name: round(speed) for name, speed in medians.items()},
        ratios={name: ratios(found["ours"], found[name]) for name in found if name != "ours"},
    )


DEFAULTS = {
    "nanogpt": "",
    "shape": "shakespeare",
    "batch_size": 16,
    "steps": 6,
    "runs": 3,
    "accumulate": 1,
    "data": "",
}


def main():
    f = flags(**DEFAULTS)
    report(f, in_turn(cases(f), f["runs"]))


if __name__ == "__main__":
    if is_worker():
        serve(prepare)
    else:
        main()
