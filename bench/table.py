"""Write README's table of speed from the last line of each measurement in bench/results.jsonl.

python bench/table.py
"""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- begin: python bench/table.py -->\n", "<!-- end -->\n"


def latest(bench, **wanted):
    """Return the last result of a bench whose figures are as wanted, or None."""
    lines = (ROOT / "bench" / "results.jsonl").read_text(encoding="utf-8").splitlines()
    found = [line for line in map(json.loads, lines) if line["bench"] == bench]
    return next((line for line in reversed(found) if wanted.items() <= line.items()), None)


def spread(ratio):
    return "{:g} ({:g} to {:g})".format(*ratio)


def rows():
    """Yield (what, ours, nanoGPT's, ratio with its lowest and highest, line)."""
    command = "config/train_shakespeare.py --max_minutes=0.11"
    if (r := latest("time_to_loss", command=command)) and "time_ratio" in r:
        what = "whole command to the loss at which nanoGPT's recipe for a CPU ends, by its estimator"
        ours = f"{r['wall_s']} s ({r['estimates']['64']})"
        yield what, ours, f"{r['nanogpt_wall_s']} s ({r['nanogpt_estimate_64']})", spread(r["time_ratio"]), r
    for bench, unit, mine in (("train_speed", "training", "ours"), ("decode_speed", "generating", "ours float32")):
        r = latest(bench, shape="shakespeare", batch_size=16 if bench == "train_speed" else 1)
        for name in (name for name in (r or {"ratios": ()})["ratios"] if "ours" not in name):
            figures = r["tokens_per_s"]
            what = f"{unit}, tokens/s, beside {name}"
            yield what, f"{figures[mine]:,.0f}", f"{figures[name]:,.0f}", spread(r["ratios"][name]), r
    if (r := latest("memory", shape="gpt2")) and "nanoGPT" in r["mib"]:
        what = f"memory of a step, 124M parameters, {r['batch_size']} x 1,024 tokens, beside nanoGPT"
        yield what, f"{r['mib']['ours']:,} MiB", f"{r['mib']['nanoGPT']:,} MiB", spread(r["ratios"]["nanoGPT"]), r


def table():
    """Return the table as Markdown."""
    lines = ["| | gpt.py | the other | ratio, median (lowest to highest) |", "|---|---|---|---|"]
    found = list(rows())
    lines += [f"| {' | '.join(row[:4])} |" for row in found]
    days, machines = ({row[4][key] for row in found} for key in ("date", "hardware"))
    lines += ["", f"Measured on {', '.join(sorted(days))} on {'; '.join(sorted(machines))}."]
    return "\n".join(lines) + "\n"


def main():
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    readme.write_text(before + BEGIN + "\n" + table() + "\n" + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
