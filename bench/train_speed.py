"""Training tokens per second, beside nanoGPT's on the same machine and the same batches' shape.

    python bench/train_speed.py --nanogpt=PATH
    python bench/train_speed.py --nanogpt=PATH --shape=gpt2 --batch_size=32      (a GPU)

Both train a model of the shape's layers, heads and width: nanoGPT's with its own code and AdamW, in float32, its
default on a CPU, and, where the CPU has bfloat16, with autocast, eagerly and compiled (on a GPU: autocast and
torch.compile, its defaults); ours compiled, as gpt.py does on a GPU and in longer runs on a CPU, and eagerly. The
figure is the median of `runs` processes each, in turn; mfu is ours, the share of the GPU's peak. The best micro-batch
of each is found by several calls.
"""

import json
import sys
import time

import torch
from common import flags, in_turn, nanogpt, ratios, record

import gpt

SHAPES = {  # the second set of sizes is for gpt.py alone
    "shakespeare": (
        {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 65},
        {"n_kv_head": 6},
    ),
    "gpt2": (
        {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50304},
        {"n_kv_head": 12, "tie_weights": True},
    ),
    "medium": (
        {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50304},
        {"n_kv_head": 4, "tie_weights": True},
    ),
    "large": (
        {"n_layer": 24, "n_head": 16, "n_embd": 1024, "block_size": 1024, "vocab_size": 50304},
        {"n_kv_head": 4, "tie_weights": True},
    ),
}


def peer(case, device):
    """Return nanoGPT's training step, a function of a batch."""
    model_py = nanogpt(case["nanogpt"])
    model = model_py.GPT(model_py.GPTConfig(**case["sizes"], dropout=0.0, bias=False)).to(device)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), device.type)
    forward = torch.compile(model) if case["compile"] else model

    def step(x, y):
        with torch.autocast(device.type, torch.bfloat16, enabled=case["autocast"]):
            loss = forward(x, y)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def ours(case, device):
    """Return gpt.py's training step, a function of a batch."""
    for name, value in (case["sizes"] | case["more"]).items():
        if name != "vocab_size":
            setattr(gpt, name, value)
    gpt.compile = case["compile"]
    machine = gpt.set_up_machine()
    model = gpt.GPT(gpt.model_config(case["sizes"]["vocab_size"])).to(device)
    optimizers = gpt.make_optimizers(model, machine)
    weights = torch.ones(case["batch_size"], case["sizes"]["block_size"])
    if machine.compile:
        model.compile(dynamic=False)

    def step(x, y):
        loss = machine.loss(model, [x, y, weights])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def measure(case):
    """Return tokens per second over case["steps"] steps, after three that do not count."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step = (peer if case["nanogpt"] else ours)(case, device)
    shape = (case["batch_size"], case["sizes"]["block_size"] + 1)
    batches = torch.randint(case["sizes"]["vocab_size"], (3 + case["steps"], *shape))
    loss, began = torch.zeros(()), 0.0
    for i, batch in enumerate(batches):
        if i == 3:
            float(loss.detach())  # wait for the device
            began = time.perf_counter()
        x, y = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
        if case["nanogpt"] and device.type == "cuda":
            x, y = (t.pin_memory().to(device, non_blocking=True) for t in (x, y))
        loss = step(x, y)
    float(loss.detach())
    return case["steps"] * case["batch_size"] * case["sizes"]["block_size"] / (time.perf_counter() - began)


def main():
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        print(measure(json.loads(sys.argv[1])))
        return
    f = flags(nanogpt="", shape="shakespeare", batch_size=16, steps=6, runs=3)
    sizes, more = SHAPES[f["shape"]]
    base = {"sizes": sizes, "more": more, "batch_size": f["batch_size"], "steps": f["steps"], "nanogpt": ""}
    on_gpu = torch.cuda.is_available()
    cases = {"ours": base | {"compile": True}, "ours, eager": base | {"compile": False}}
    if f["nanogpt"]:
        theirs = base | {"nanogpt": f["nanogpt"]}
        cases["nanoGPT"] = theirs | {"compile": on_gpu, "autocast": on_gpu}
        if not on_gpu and gpt.native_bfloat16(torch.device("cpu")):
            cases["nanoGPT, autocast"] = theirs | {"compile": False, "autocast": True}
            cases["nanoGPT, autocast and compile"] = theirs | {"compile": True, "autocast": True}
    found = in_turn(__file__, cases, f["runs"])
    with torch.device("meta"):
        model = gpt.GPT(gpt.GPTConfig(**sizes | more))
    mfu = gpt.set_up_machine().mfu(sorted(found["ours"])[f["runs"] // 2] * model.flops_per_token())
    for name, speeds in found.items():
        print(f"{name:32s} {sorted(speeds)[len(speeds) // 2]:10,.0f} tokens/s")
    record(
        "train_speed",
        shape=f["shape"],
        batch_size=f["batch_size"],
        mfu=mfu,
        tokens_per_s={name: round(sorted(speeds)[len(speeds) // 2]) for name, speeds in found.items()},
        ratios={name: ratios(found["ours"], found[name]) for name in found if name != "ours"},
    )


if __name__ == "__main__":
    main()
