"""Take all of a GPU's measurements at once, except time_to_loss.py's.

    python bench/gpu.py --nanogpt=PATH --gptfast=PATH --data=data/NAME
    python bench/gpu.py --nanogpt=PATH --gptfast=PATH --small=1        (does it run? on a CPU, too)

Training speed, peak memory and generating are measured as by train_speed.py, memory.py and
decode_speed.py. Each case is a process. All compile together, and once all are ready they are
measured in turn. The cases with gradient checkpointing are left out, so that all fit into memory
together. The shape large has a quarter of the rows.

--data: a data set with GPT-2's tokens. --small=1: the smallest shape alone; nothing is recorded.
"""

import decode_speed
import memory
import train_speed
from common import flags, in_turn, record, show

SCRIPTS = {"training": train_speed, "memory": memory, "generating": decode_speed}


def plans(f):
    """Return {name: (script, its flags)} of what is measured.

    f: the flags of this script.
    """
    rows = 2 if f["small"] else f["batch_size"]
    train = {"nanogpt": f["nanogpt"], "data": f["data"], "steps": 2, "accumulate": 8}
    decode = {"gptfast": f["gptfast"], "transformers": 0}
    changes = {
        "training gpt2": train | {"shape": "gpt2", "batch_size": rows},
        "training medium": train | {"shape": "medium", "batch_size": rows},
        "training large": train | {"shape": "large", "batch_size": max(1, rows // 4)},
        "memory gpt2": {"nanogpt": f["nanogpt"], "shape": "gpt2", "batch_size": rows},
        "generating gpt2": decode | {"shape": "gpt2"},
        "generating 1b": decode | {"shape": "1b", "n_kv_head": 4},
        "generating gpt2 64": {"transformers": 0, "shape": "gpt2", "batch_size": 64},
    }
    found = {}
    for name, options in changes.items():
        script = SCRIPTS[name.split()[0]]
        if f["small"]:
            options |= {"shape": "shakespeare"}
            options.pop("n_kv_head", None)
        found[name] = (script, script.DEFAULTS | options)
    return found


def main():
    f = flags(nanogpt="", gptfast="", data="", runs=3, batch_size=32, small=0)
    cases = {}
    for plan, (script, options) in plans(f).items():
        for name, case in script.cases(options).items():
            if "checkpointing" not in name:
                cases[f"{plan}: {name}"] = case
    found = in_turn(cases, f["runs"])
    for plan, (script, options) in plans(f).items():
        mine = {}
        for name, numbers in found.items():
            if name.startswith(f"{plan}: "):
                mine[name.removeprefix(f"{plan}: ")] = numbers
        if mine:
            script.report(options, mine, show if f["small"] else record)


if __name__ == "__main__":
    main()
