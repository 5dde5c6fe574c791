"""Measure the peak memory of one training step: plain, with gradient checkpointing, and beside nanoGPT's.

    python bench/memory.py --nanogpt=PATH
    python bench/memory.py --nanogpt=PATH --shape=gpt2 --batch_size=16           (a GPU)

Each case is a process of its own: forward, loss and backward of one micro-batch, without the optimizer, both in
bfloat16 (autocast) and eagerly; on a GPU both compiled. On a GPU the figure is the peak of allocated memory, on a
CPU how far the peak of resident memory in the step lies above what is resident before it, weights and gradients.
"""

import json
import resource
import sys
from pathlib import Path

import torch
from common import flags, in_turn, nanogpt, ratios, record
from train_speed import SHAPES


def peer(case, device):
    model_py = nanogpt(case["nanogpt"])
    return model_py.GPT(model_py.GPTConfig(**case["sizes"], dropout=0.0, bias=False)).to(device)


def ours(case, device):
    import gpt

    for name, value in (case["sizes"] | case["more"]).items():
        setattr(gpt, name, value)
    gpt.gradient_checkpointing = case["checkpointing"]
    gpt.set_up_machine()
    return gpt.GPT(gpt.model_config(case["sizes"]["vocab_size"])).to(device)


def measure(case):
    """Return the peak in MiB of one step."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = (peer if case["nanogpt"] else ours)(case, device)
    if device.type == "cuda":
        model.compile(dynamic=False)

    def step(rows, length):
        x = torch.randint(case["sizes"]["vocab_size"], (rows, length + 1), device=device)
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(x[:, :-1].contiguous(), x[:, 1:].contiguous())[1]
        loss.backward()

    if device.type == "cuda":
        step(case["batch_size"], case["sizes"]["block_size"])
        return torch.cuda.max_memory_allocated() / 2**20
    step(1, 8)  # what libraries take once does not count, nor do weights and gradients
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    before = pages * resource.getpagesize() / 2**20
    step(case["batch_size"], case["sizes"]["block_size"])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before


def main():
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        print(measure(json.loads(sys.argv[1])))
        return
    f = flags(nanogpt="", shape="shakespeare", batch_size=16, runs=3)
    sizes, more = SHAPES[f["shape"]]
    base = {
        "sizes": sizes,
        "more": more,
        "batch_size": f["batch_size"],
        "nanogpt": "",
        "checkpointing": False,
    }
    cases = {"ours": base, "ours, gradient_checkpointing": base | {"checkpointing": True}}
    if f["nanogpt"]:
        cases["nanoGPT"] = base | {"nanogpt": f["nanogpt"]}
    found = in_turn(__file__, cases, f["runs"])
    record(
        "memory",
        shape=f["shape"],
        batch_size=f["batch_size"],
        mib={name: round(sorted(peaks)[len(peaks) // 2]) for name, peaks in found.items()},
        ratios={name: ratios(found["ours"], found[name]) for name in found if name != "ours"},
    )


if __name__ == "__main__":
    main()
