"""Measure the peak memory of one training step: plain, with gradient checkpointing, and beside nanoGPT's.

    python bench/memory.py --nanogpt=PATH
    python bench/memory.py --nanogpt=PATH --shape=gpt2 --batch_size=2 --compile=1
    python bench/memory.py --nanogpt=PATH --shape=gpt2 --batch_size=16           (a GPU)

Each case is a process of its own: forward, loss and backward of one micro-batch, without the optimizer, both in
bfloat16 (autocast), both eagerly or both compiled; on a GPU always compiled. On a GPU the figure is the peak of
allocated memory, on a CPU (of Linux) how far the peak of resident memory in a step lies above what is resident
before it, weights and the gradients of an earlier step, to which its own are added; what that one freed is given back
to the system first.
"""

import ctypes
import re
import sys
from pathlib import Path

import torch
from common import flags, in_turn, ratios, record, serve
from train_speed import SHAPES, peer_model


def peer(case, device):
    model = peer_model(case, device)
    return lambda x, y: model(x, y)[1], model


def ours(case, device):
    import gpt

    for name, value in (case["sizes"] | case["more"]).items():
        setattr(gpt, name, value)
    gpt.gradient_checkpointing = case["checkpointing"]
    gpt.set_up_machine()
    model = gpt.GPT(gpt.model_config(case["sizes"]["vocab_size"])).to(device)
    return lambda x, y: model(x, y, weights=torch.ones_like(x, dtype=torch.float32))[1], model


def resident(name):
    """Return this process's VmRSS, resident memory, or VmHWM, its peak, in MiB."""
    return (
        int(
            re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))[1]
        )
        / 1024
    )


def prepare(case):
    """Return a function that returns the peak in MiB of one step."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loss_of, model = (peer if case["nanogpt"] else ours)(case, device)
    if case["compile"]:
        model.compile(dynamic=False)

    def step(rows, length):
        x = torch.randint(case["sizes"]["vocab_size"], (rows, length + 1), device=device)
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of(x[:, :-1].contiguous(), x[:, 1:].contiguous())
        loss.backward()

    def measure():
        if device.type == "cuda":
            model.zero_grad(set_to_none=True)
            torch.cuda.reset_peak_memory_stats()
            step(case["batch_size"], case["sizes"]["block_size"])
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() / 2**20
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text(
            "5", encoding="utf-8"
        )  # the peak is now what is resident
        before = resident("VmRSS")
        step(case["batch_size"], case["sizes"]["block_size"])
        return resident("VmHWM") - before

    measure()  # what libraries and compiling take once does not count, nor do weights and gradients
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return measure


def cases(f):
    sizes, more = SHAPES[f["shape"]]
    base = {
        "sizes": sizes,
        "more": more,
        "batch_size": f["batch_size"],
        "nanogpt": "",
        "checkpointing": False,
    }
    base["compile"] = bool(f["compile"]) or torch.cuda.is_available()
    found = {"ours": base, "ours, gradient_checkpointing": base | {"checkpointing": True}}
    if f["nanogpt"]:
        found["nanoGPT"] = base | {"nanogpt": f["nanogpt"]}
    return {name: (__file__, case) for name, case in found.items()}


def report(f, found):
    record(
        "memory",
        shape=f["shape"],
        batch_size=f["batch_size"],
        compile=bool(f["compile"]) or torch.cuda.is_available(),
        mib={name: round(sorted(peaks)[len(peaks) // 2]) for name, peaks in found.items()},
        ratios={name: ratios(found["ours"], found[name]) for name in found if name != "ours"},
    )


DEFAULTS = {"nanogpt": "", "shape": "shakespeare", "batch_size": 16, "runs": 3, "compile": 0}


def main():
    f = flags(**DEFAULTS)
    report(f, in_turn(cases(f), f["runs"]))


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        serve(prepare)
    else:
        main()
