"""Training tokens per second, beside nanoGPT's on the same machine and the same batches' shape.

    python bench/train_speed.py --nanogpt=PATH
    python bench/train_speed.py --nanogpt=PATH --shape=gpt2 --batch_size=32 --data=data/NAME      (a GPU)

Both train a model of the shape's layers, heads and width: nanoGPT's with its own code and AdamW, in float32, its
default on a CPU, and, where the CPU has bfloat16, with autocast, eagerly and compiled (on a GPU: autocast and
torch.compile, its defaults); ours compiled, as gpt.py does in longer runs, and eagerly; both with the loop's own
steps, `accumulate` micro-batches each. The figure is the median of `runs` measurements, in turn; mfu is ours, the
share of the GPU's peak. The best micro-batch of each is found by several calls. The tokens are random or those of a
prepared data set; nanoGPT's vocabulary is rounded up to a multiple of 64, as it advises.
"""

import sys
import time
from pathlib import Path

import torch
from common import flags, in_turn, nanogpt, ratios, record, serve

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


def peer_model(case, device):
    model_py, size = nanogpt(case["nanogpt"]), case["sizes"]["vocab_size"]
    sizes = case["sizes"] | {"vocab_size": size if size < 1000 else size + -size % 64}
    return model_py.GPT(model_py.GPTConfig(**sizes, dropout=0.0, bias=False)).to(device)


def peer(case, device):
    """Return nanoGPT's training step, a function of a list of batches."""
    model = peer_model(case, device)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), device.type)
    forward = torch.compile(model) if case["compile"] else model

    def step(batches):
        for x, y, _ in batches:
            if device.type == "cuda":
                x, y = (t.pin_memory().to(device, non_blocking=True) for t in (x, y))
            with torch.autocast(device.type, torch.bfloat16, enabled=case["autocast"]):
                loss = forward(x, y)[1] / len(batches)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def ours(case, device):
    """Return gpt.py's training step, a function of a list of batches."""
    for name, value in (case["sizes"] | case["more"]).items():
        if name != "vocab_size":
            setattr(gpt, name, value)
    gpt.compile, gpt.optimizer = case["compile"], case["optimizer"]
    machine = gpt.set_up_machine()
    model = gpt.GPT(gpt.model_config(case["sizes"]["vocab_size"])).to(device)
    optimizers, scaler = (
        gpt.make_optimizers(model, machine),
        torch.amp.GradScaler("cuda", enabled=False),
    )
    backward, update = gpt.make_step(model, model, optimizers, scaler, machine, case["accumulate"])

    def step(batches):
        if machine.compile and not step.compiled:
            gpt.compile_model(model, machine, batches[0])
            step.compiled = True
        weight = sum(batch[2].sum() for batch in batches)
        gpt.accumulate(backward, model, batches, 0, weight, machine)
        update(1e-3, 1e-2)

    step.compiled = False
    return step


def make_batches(case):
    """Return a step's batches: random, or those of a data set."""
    if case["data"]:
        data = gpt.Data(Path(case["data"]), case["sizes"]["block_size"])
        return [data.get_batch("train", i, case["batch_size"]) for i in range(case["accumulate"])]
    shape = (case["batch_size"], case["sizes"]["block_size"] + 1)
    batches = torch.randint(case["sizes"]["vocab_size"], (case["accumulate"], *shape))
    return [
        (b[:, :-1].contiguous(), b[:, 1:].contiguous(), torch.ones(b[:, 1:].shape)) for b in batches
    ]


def prepare(case):
    """Return a function that returns tokens per second over case["steps"] steps."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step, batches = (peer if case["nanogpt"] else ours)(case, device), make_batches(case)
    wait, leave_memory = lambda: None, lambda: None
    if device.type == "cuda":
        wait, leave_memory = (
            torch.cuda.synchronize,
            torch.cuda.empty_cache,
        )  # to the other processes

    def measure():
        for _ in range(2 if device.type == "cuda" else 1):
            step(batches)  # does not count
        wait()
        began = time.perf_counter()
        for _ in range(case["steps"]):
            step(batches)
        wait()
        tokens = case["steps"] * sum(x.numel() for x, _, _ in batches)
        speed = tokens / (time.perf_counter() - began)
        leave_memory()
        return speed

    for _ in range(3):
        step(batches)
    wait()
    leave_memory()
    return measure


def cases(f):
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


def report(f, found):
    sizes, more = SHAPES[f["shape"]]
    with torch.device("meta"):
        model = gpt.GPT(gpt.GPTConfig(**sizes | more))
    medians = {name: sorted(speeds)[len(speeds) // 2] for name, speeds in found.items()}
    for name, speed in medians.items():
        print(f"{name:32s} {speed:10,.0f} tokens/s")
    record(
        "train_speed",
        shape=f["shape"],
        batch_size=f["batch_size"],
        accumulate=f["accumulate"],
        data=Path(f["data"]).name,
        mfu=gpt.set_up_machine().mfu(medians["ours"] * model.flops_per_token()),
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
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        serve(prepare)
    else:
        main()
