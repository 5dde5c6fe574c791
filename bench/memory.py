"""Measure the peak memory of a training step: plain, with gradient checkpointing, and nanoGPT's.

    python bench/memory.py --nanogpt=PATH
    python bench/memory.py --nanogpt=PATH --shape=gpt2 --batch_size=2 --compile=1
    python bench/memory.py --nanogpt=PATH --shape=gpt2 --batch_size=16           (a GPU)
    python bench/memory.py --old=PATH         another checkout of this project as the peer

Each case is a process of its own, which computes the loss and the gradients of one micro-batch,
without the optimizer. All are in bfloat16 (autocast), and either all eager or all compiled. On a
GPU they are always compiled.

On a GPU the figure is the peak of allocated memory. On a CPU (under Linux) it is how far the peak
of resident memory in a step lies above what is resident before the step. That memory holds the
weights, and the gradients of an earlier step, to which the step adds its own. What the earlier step
freed is first given back to the system.
"""

import contextlib
import ctypes
import inspect
import re
from pathlib import Path

import torch
from common import (
    best_device,
    flags,
    in_turn,
    is_worker,
    ratios,
    record,
    serve,
)
from train_speed import SHAPES, peer_model

import gpt


def peer(case, device):
    """Return nanoGPT's loss, a function of inputs and targets, and its model."""
    model = peer_model(case, device)
    return lambda x, y: model(x, y)[1], model


def ours(case, device):
    """Return gpt.py's loss, a function of inputs and targets, and its model."""
    settings = []
    with contextlib.suppress(ImportError):  # before version 2.0.0 set_up_machine took no settings
        from gpt import checked_settings

        settings.append(checked_settings())
    gpt.set_up_machine(*settings)
    defaults = {"qk_norm": True, "tie_weights": False, "dropout": 0.0}  # as in the settings
    sizes = defaults | case["sizes"] | case["more"]
    config = gpt.GPTConfig(**sizes, gradient_checkpointing=case["checkpointing"])
    model = gpt.GPT(config).to(device)
    loss_only = {}
    if "loss_only" in inspect.signature(model.forward).parameters:  # from version 2.0.0 on
        loss_only = {"loss_only": True}
    ones = torch.ones(case["batch_size"], case["sizes"]["block_size"], device=device)
    return lambda x, y: model(x, y, weights=ones, **loss_only)[1], model


def resident(name):
    """Return this process's resident memory, VmRSS, or the peak of it, VmHWM, in MiB."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(rf"{name}:\s+(\d+)", status)[1]) / 1024


def prepare(case):
    """Return a function that measures the peak memory of one step, in MiB."""
    device = best_device()
    loss_of, model = (peer if case["nanogpt"] else ours)(case, device)
    if case["compile"]:
        model.compile(dynamic=False)

    def step():
        rows, length = case["batch_size"], case["sizes"]["block_size"]
        ids = torch.randint(case["sizes"]["vocab_size"], (rows, length + 1), device=device)
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        loss.backward()

    def measure_gpu():
        model.zero_grad(set_to_none=True)
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 2**20

    def measure_cpu():
        ctypes.CDLL(None).malloc_trim(0)
        clear_refs = Path("/proc/self/clear_refs")
        clear_refs.write_text("5", encoding="utf-8")  # sets the peak to what is resident now
        before = resident("VmRSS")
        step()
        return resident("VmHWM") - before

    measure = measure_gpu if device.type == "cuda" else measure_cpu
    measure()  # what libraries and compiling take once does not count, nor do weights and gradients
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return measure


def cases(f):
    """Return {name: (this script, case)} for what the flags f ask for."""
    sizes, more = SHAPES[f["shape"]]
    base = {"sizes": sizes, "more": more, "nanogpt": "", "checkpointing": False}
    base["batch_size"] = f["batch_size"]
    base["compile"] = bool(f["compile"]) or torch.cuda.is_available()
    found = {"ours": base, "ours, gradient_checkpointing": base | {"checkpointing": True}}
    if f["old"]:
        found["old"] = base | {"checkout": f["old"]}
    if f["nanogpt"]:
        found["nanoGPT"] = base | {"nanogpt": f["nanogpt"]}
    return {name: (__file__, case) for name, case in found.items()}


def report(f, found, record=record):
    """Record the medians of what was measured for the flags f."""
    record(
        "memory",
        shape=f["shape"],
        batch_size=f["batch_size"],
        compile=bool(f["compile"]) or torch.cuda.is_available(),
        mib={name: round(sorted(peaks)[len(peaks) // 2]) for name, peaks in found.items()},
        ratios={name: ratios(found["ours"], found[name]) for name in found if name != "ours"},
    )


DEFAULTS = {
    "nanogpt": "",
    "old": "",
    "shape": "shakespeare",
    "batch_size": 16,
    "runs": 3,
    "compile": 0,
}


def main():
    f = flags(**DEFAULTS)
    report(f, in_turn(cases(f), f["runs"]))


if __name__ == "__main__":
    if is_worker():
        serve(prepare)
    else:
        main()
