"""All of a GPU's measurements but time_to_loss.py's, in one go: what has to be compiled is compiled at the same time.

    python bench/gpu.py --nanogpt=PATH --gptfast=PATH --data=data/NAME
    python bench/gpu.py --nanogpt=PATH --gptfast=PATH --small=1                 (does it run? on a CPU, too)

Training speed, peak memory and generating, as train_speed.py, memory.py and decode_speed.py measure them;
each case is a process, and once all are ready they are measured in turn (without gradient_checkpointing, so that they
fit the memory together; large has a quarter of the rows). --data: a data set with GPT-2's tokens. --small=1 records
nothing.
"""

import decode_speed
import memory
import train_speed
from common import flags, in_turn


def main():
    f = flags(nanogpt="", gptfast="", data="", runs=3, batch_size=32, small=0)
    rows = 2 if f["small"] else f["batch_size"]
    train = {"nanogpt": f["nanogpt"], "data": f["data"], "steps": 2, "accumulate": 8}
    decode = {"gptfast": f["gptfast"], "transformers": 0}
    plans = {
        "training gpt2": (train_speed, train | {"shape": "gpt2", "batch_size": rows}),
        "training medium": (train_speed, train | {"shape": "medium", "batch_size": rows}),
        "training large": (
            train_speed,
            train | {"shape": "large", "batch_size": max(1, rows // 4)},
        ),
        "memory gpt2": (memory, {"nanogpt": f["nanogpt"], "shape": "gpt2", "batch_size": rows}),
        "generating gpt2": (decode_speed, decode | {"shape": "gpt2"}),
        "generating 1b": (decode_speed, decode | {"shape": "1b", "n_kv_head": 4}),
        "generating gpt2 64": (
            decode_speed,
            {"transformers": 0, "shape": "gpt2", "batch_size": 64},
        ),
    }
    small = {"shape": "shakespeare", "n_kv_head": 0} if f["small"] else {}
    plans = {
        name: (module, module.DEFAULTS | options | small)
        for name, (module, options) in plans.items()
    }
    cases = {
        f"{plan}: {name}": case
        for plan, (module, options) in plans.items()
        for name, case in module.cases(options).items()
        if "checkpointing" not in name
    }
    found = in_turn(cases, f["runs"])
    for plan, (module, options) in plans.items():
        mine = {
            name.removeprefix(f"{plan}: "): n
            for name, n in found.items()
            if name.startswith(f"{plan}: ")
        }
        if f["small"]:
            module.record = lambda *bench, **figures: print(*bench, figures)
        if mine:
            module.report(options, mine)


if __name__ == "__main__":
    main()
