"""Write README's tables of speed from the last line of each measurement in bench/results.jsonl.

python bench/table.py
"""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- begin: python bench/table.py -->\n", "<!-- end -->\n"
BEGIN_FRONT = "<!-- begin: front, python bench/table.py -->\n"
CONFIG_SINCE = "2026-11-26"  # results before are of config/train_shakespeare.py's earlier sizes


def latest(bench, isa="", **wanted):
    """Return the last result of a bench, on hardware with isa in its name, whose figures are as wanted, or None."""
    found = [
        line
        for line in results(bench)
        if isa in line["hardware"] and wanted.items() <= line.items()
    ]
    return found[-1] if found else None


def spread(ratio):
    return "{:g} ({:g} to {:g})".format(*ratio)


def rows():
    """Yield (what, ours, the other's, ratio with its lowest and highest, line) of what was measured on CPUs."""
    command = "config/train_shakespeare.py --max_minutes=0.1"
    if (r := latest("time_to_loss", command=command)) and "time_ratio" in r:
        what = "whole command to the loss at which nanoGPT's recipe for a CPU (0.8M parameters) ends, by its "
        what += f"estimator; ours has {r['params'] / 1e6:.1f}M"
        ours = f"{r['wall_s']} s ({r['estimates']['64']})"
        yield (
            what,
            ours,
            f"{r['nanogpt_wall_s']} s ({r['nanogpt_estimate_64']})",
            spread(r["time_ratio"]),
            r,
        )
    for isa in ("AVX512-BF16", "AVX2"):
        r = latest("train_speed", isa, shape="shakespeare", batch_size=64) or {"ratios": {}}
        for name in (name for name in r["ratios"] if "ours" not in name):
            ours, theirs = r["tokens_per_s"]["ours"], r["tokens_per_s"][name]
            what = f"training, compiled, tokens/s, 10.7M parameters, {isa}, beside {name}"
            yield what, f"{ours:,.0f}", f"{theirs:,.0f}", spread(r["ratios"][name]), r
    r = latest("decode_speed", "cores", shape="shakespeare", batch_size=1) or {"ratios": {}}
    for pair, ratio in r["ratios"].items():
        mine, name = pair.split(" / ")
        ours, theirs = r["tokens_per_s"][mine], r["tokens_per_s"][name]
        what = (
            f"generating, {mine.removeprefix('ours ')}, tokens/s, 10.7M parameters, beside {name}"
        )
        yield what, f"{ours:,.0f}", f"{theirs:,.0f}", spread(ratio), r
    for compiled in (False, True):
        if (r := latest("memory", "cores", shape="gpt2", compile=compiled)) and "nanoGPT" in r[
            "mib"
        ]:
            what = f"memory of a step, {'compiled' if compiled else 'eager'}, 124M parameters, "
            what += f"{r['batch_size']} x 1,024 tokens, beside nanoGPT (less is better)"
            ours, theirs = r["mib"]["ours"], r["mib"]["nanoGPT"]
            yield what, f"{ours:,} MiB", f"{theirs:,} MiB", spread(r["ratios"]["nanoGPT"]), r


def gpu_rows():
    """Yield the same of a GPU, in bfloat16 and, but for the first two, compiled."""
    command = "config/train_shakespeare.py --max_iters=350"
    if (r := latest("time_to_loss", "NVIDIA", command=command)) and "time_ratio" in r:
        what = "whole command beside nanoGPT's with its recipe for a GPU (10.7M parameters, compiled, one run, ended "
        what += "once it had printed a validation loss of 1.475 or less), and the loss by its estimator; ours has "
        what += f"{r['params'] / 1e6:.1f}M and is not compiled"
        ours = f"{r['wall_s']} s ({r['estimates']['256']})"
        theirs = f"{r['nanogpt_wall_s']} s ({r['nanogpt_estimate_256']})"
        yield what, ours, theirs, spread(r["time_ratio"]), r
        what = "from the first evaluation to the last of it, nanoGPT's compiling included"
        yield what, f"{r['train_s']} s", f"{r['nanogpt_train_s']} s", spread(r["train_ratio"]), r
    for shape, size in (
        ("gpt2", "124M"),
        ("medium", "81M, nanoGPT's 87M"),
        ("large", "350M, nanoGPT's 380M"),
    ):
        if (r := latest("train_speed", "NVIDIA", shape=shape)) and "nanoGPT" in r["ratios"]:
            what = f"training, compiled, tokens/s, {size} parameters, {r['batch_size']} rows (mfu {r['mfu']:.0%})"
            ours, theirs = r["tokens_per_s"]["ours"], r["tokens_per_s"]["nanoGPT"]
            yield (
                f"{what}, beside nanoGPT",
                f"{ours:,}",
                f"{theirs:,}",
                spread(r["ratios"]["nanoGPT"]),
                r,
            )
    if (r := latest("memory", "NVIDIA", shape="gpt2")) and "nanoGPT" in r["ratios"]:
        what = f"memory of a step, compiled, 124M parameters, {r['batch_size']} x 1,024 tokens, beside nanoGPT (less is better)"
        ours, theirs = r["mib"]["ours"], r["mib"]["nanoGPT"]
        yield what, f"{ours:,} MiB", f"{theirs:,} MiB", spread(r["ratios"]["nanoGPT"]), r
    for shape, size in (("gpt2", "124M"), ("1b", "1.1B")):
        r = latest("decode_speed", "NVIDIA", shape=shape, batch_size=1) or {"ratios": {}}
        for pair, ratio in r["ratios"].items():
            mine, name = pair.split(" / ")
            ours, theirs = r["tokens_per_s"][mine], r["tokens_per_s"][name]
            what = f"generating, {mine.removeprefix('ours ')}, tokens/s, {size} parameters, beside {name}"
            yield what, f"{ours:,.0f}", f"{theirs:,.0f}", spread(ratio), r


def results(bench):
    lines = (ROOT / "bench" / "results.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if line["bench"] == bench]


def measured(found):
    """Return the sentence that says when and where results were measured, with which torch."""
    keys = ("date", "hardware", "torch")
    days, machines, versions = (" and ".join(sorted({line[key] for line in found})) for key in keys)
    return f"Measured on {days} on {machines}, with torch {versions}."


def table(found, short=False):
    """Return the lines of a table of rows; short: with the median ratios alone."""
    found = list(found)
    last = "ratio" if short else "ratio, median (lowest to highest)"
    lines = [f"| | gpt.py | the other | {last} |", "|---|---|---|---|"]
    for what, ours, theirs, ratio, _ in found:
        lines.append(f"| {what} | {ours} | {theirs} | {ratio.split()[0] if short else ratio} |")
    return [*lines, "", measured([row[4] for row in found])]


def curve():
    """Return the lines of the table of time and loss."""
    lines = [
        line
        for line in results("time_to_loss")
        if line["date"] >= CONFIG_SINCE and line["runs"] > 2
    ]
    found = {(line["hardware"], line["command"]): line for line in lines}
    lines = [
        "| command | processor | wall time | loss, full validation split: mean (each seed) | windows of 256 |",
        "|---|---|---|---|---|",
    ]
    for line in sorted(found.values(), key=lambda line: line["wall_s"]):
        each = ", ".join(f"{loss:.4f}" for loss in line["val_losses"])
        window, processor = line["estimates"].get("256", ""), line["hardware"].split(", ")[-1]
        lines.append(
            f"| `{line['command']}` | {processor} | {line['wall_s']} s | {line['val_loss']:.4f} ({each}) | {window} |"
        )
    return [*lines, "", measured(found.values())]


def ablation():
    """Return the lines of the table of what each choice is worth."""
    found = {(line["steps"], line["variant"]): line for line in results("ablation")}
    if not found:
        return []
    lines = ["| changed | steps | loss: mean (lowest to highest) | tokens/s |", "|---|---|---|---|"]
    for (steps, name), line in found.items():
        low, high = min(line["val_losses"]), max(line["val_losses"])
        lines.append(
            f"| {name} | {steps:,} | {line['val_loss']:.4f} ({low:.4f} to {high:.4f}) | {line['tokens_per_s']:,} |"
        )
    return [*lines, "", measured(found.values())]


def sweep():
    """Return the lines of the table of rates, widths and depths."""
    found = {(line["rate"], line["n_layer"], line["n_embd"]): line for line in results("sweep")}
    if not found:
        return []
    lines = [
        "| rate | layers x width | half the default | default | twice |",
        "|---|---|---|---|---|",
    ]
    for rate, n_layer, n_embd in sorted(found, reverse=True):
        losses = found[rate, n_layer, n_embd]["losses"].items()
        cells = " | ".join(f"{value}: {loss:.4f}" for value, loss in losses)
        lines.append(f"| {rate} | {n_layer} x {n_embd} | {cells} |")
    return [*lines, "", measured(found.values())]


def tables():
    """Return the tables as Markdown."""
    parts = table(rows()), table(gpu_rows()), curve(), ablation(), sweep()
    return "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"


def front():
    """Return the short table as Markdown: whole commands, and single parts beside the other's defaults or best."""
    chosen = [
        row
        for row in rows()
        if row[0].startswith(("whole", "memory"))
        or row[0].endswith(("beside nanoGPT", "beside nanoGPT, autocast"))
        or ("compiled, tokens/s" in row[0] and "generating, bfloat16" in row[0])
    ]
    return "\n".join([*table(chosen, short=True), "", *table(gpu_rows(), short=True)]) + "\n"


def fill(text, begin, content):
    """Return text with content between a marker and the next END."""
    before, rest = text.split(begin)
    return before + begin + "\n" + content + "\n" + END + rest.split(END, 1)[1]


def main():
    readme = ROOT / "README.md"
    text = fill(readme.read_text(encoding="utf-8"), BEGIN_FRONT, front())
    readme.write_text(fill(text, BEGIN, tables()), encoding="utf-8")


if __name__ == "__main__":
    main()
