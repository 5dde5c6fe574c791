"""Write the tables in README.md, docs/speed.md and docs/sizes.md from bench/results.jsonl.

The last line of each measurement counts.

python bench/table.py
"""

import json
from typing import NamedTuple

import torch
from common import ROOT

import configurator
import gpt

BEGIN, END = "<!-- begin: python bench/table.py -->\n", "<!-- end -->\n"
BEGIN_FRONT = "<!-- begin: front, python bench/table.py -->\n"
BEGIN_SIZES = "<!-- begin: sizes, python bench/table.py -->\n"
BEGIN_PLANS = "<!-- begin: plans, python bench/table.py -->\n"
CONFIG_SINCE = "2026-11-26"  # older results are of config/train_shakespeare.py's earlier sizes
NO_RESULT = {"ratios": {}}


class Row(NamedTuple):
    """A row of a table of comparisons, and the result that it comes from."""

    what: str
    ours: str
    theirs: str
    ratio: str  # with its lowest and highest
    result: dict


# ---- Results ----
def results(bench):
    """Return the results of a bench as dicts, the oldest first."""
    lines = (ROOT / "bench" / "results.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if line["bench"] == bench]


def latest(bench, isa="", **wanted):
    """Return a bench's last result with the `wanted` figures, on hardware whose name contains isa.

    Returns None if there is no such result.
    """
    found = [
        line
        for line in results(bench)
        if isa in line["hardware"] and wanted.items() <= line.items()
    ]
    return found[-1] if found else None


def spread(ratio):
    return "{:g} ({:g} to {:g})".format(*ratio)


# ---- Rows of comparisons ----
def rows():
    """Yield the rows of all that was measured on CPUs."""
    yield from whole_command_on_cpu()
    for isa in ("AVX512-BF16", "AVX2"):
        r = latest("train_speed", isa, shape="shakespeare", batch_size=64) or NO_RESULT
        for name, ratio in r["ratios"].items():
            if "ours" not in name:
                what = f"training, compiled, tokens/s, 10.7M parameters, {isa}, versus {name}"
                yield speed_row(what, r, "ours", name, ratio)
    yield from generating("cores", "shakespeare", "10.7M")
    for compiled in (False, True):
        r = latest("memory", "cores", shape="gpt2", compile=compiled)
        if r and "nanoGPT" in r["mib"]:
            yield memory_row(r, "compiled" if compiled else "eager")


def gpu_rows():
    """Yield the rows of a GPU. All are in bfloat16, and all but the first two are compiled."""
    yield from whole_command_on_gpu()
    shapes = {
        "gpt2": "124M",
        "medium": "81M, nanoGPT's 87M",
        "large": "350M, nanoGPT's 380M",
    }
    for shape, size in shapes.items():
        r = latest("train_speed", "NVIDIA", shape=shape) or NO_RESULT
        if "nanoGPT" in r["ratios"]:
            what = f"training, compiled, tokens/s, {size} parameters, {r['batch_size']} rows "
            what += f"(mfu {r['mfu']:.0%}), versus nanoGPT"
            yield speed_row(what, r, "ours", "nanoGPT", r["ratios"]["nanoGPT"])
    r = latest("memory", "NVIDIA", shape="gpt2") or NO_RESULT
    if "nanoGPT" in r["ratios"]:
        yield memory_row(r, "compiled")
    yield from generating("NVIDIA", "gpt2", "124M")
    yield from generating("NVIDIA", "1b", "1.1B")


def speed_row(what, r, mine, other, ratio):
    ours, theirs = r["tokens_per_s"][mine], r["tokens_per_s"][other]
    return Row(what, f"{ours:,.0f}", f"{theirs:,.0f}", spread(ratio), r)


def memory_row(r, way):
    what = f"memory of a step, {way}, 124M parameters, {r['batch_size']} x 1,024 tokens, "
    what += "versus nanoGPT (less is better)"
    ours, theirs = r["mib"]["ours"], r["mib"]["nanoGPT"]
    return Row(what, f"{ours:,} MiB", f"{theirs:,} MiB", spread(r["ratios"]["nanoGPT"]), r)


def generating(hardware, shape, size):
    """Yield the rows of generating one text."""
    r = latest("decode_speed", hardware, shape=shape, batch_size=1) or NO_RESULT
    for pair, ratio in r["ratios"].items():
        mine, name = pair.split(" / ")
        if not name.startswith("old"):
            way = mine.removeprefix("ours ")
            what = f"generating, {way}, tokens/s, {size} parameters, versus {name}"
            yield speed_row(what, r, mine, name, ratio)


def whole_command_on_cpu():
    """Yield the row of nanoGPT's recipe for a CPU."""
    r = latest("time_to_loss", command="config/train_shakespeare.py --max_minutes=0.1")
    if r and "time_ratio" in r:
        what = "whole command to the loss at which nanoGPT's recipe for a CPU (0.8M parameters) "
        what += f"ends, by its estimator; ours has {r['params'] / 1e6:.1f}M"
        ours = f"{r['wall_s']} s ({r['estimates']['64']})"
        theirs = f"{r['nanogpt_wall_s']} s ({r['nanogpt_estimate_64']})"
        yield Row(what, ours, theirs, spread(r["time_ratio"]), r)


def whole_command_on_gpu():
    """Yield the rows of nanoGPT's recipe for a GPU: whole, and from evaluation to evaluation."""
    r = latest("time_to_loss", "NVIDIA", command="config/train_shakespeare.py --max_iters=350")
    if r and "time_ratio" in r:
        what = "whole command versus nanoGPT's with its recipe for a GPU (10.7M parameters, "
        what += "compiled, one run, ended once it had printed a validation loss of 1.475 or less), "
        what += f"and the loss by its estimator; ours has {r['params'] / 1e6:.1f}M and is not "
        what += "compiled"
        ours = f"{r['wall_s']} s ({r['estimates']['256']})"
        theirs = f"{r['nanogpt_wall_s']} s ({r['nanogpt_estimate_256']})"
        yield Row(what, ours, theirs, spread(r["time_ratio"]), r)
        what = "the same from the first evaluation to the last, nanoGPT's compiling included"
        ours, theirs = f"{r['train_s']} s", f"{r['nanogpt_train_s']} s"
        yield Row(what, ours, theirs, spread(r["train_ratio"]), r)


# ---- Tables ----
def measured(found):
    """Return the sentence that says when, where and with which torch results were measured.

    Raises ValueError if nothing was found.
    """
    if not found:
        raise ValueError("a bench has no result yet: run it first")
    keys = ("date", "hardware", "torch")
    days, machines, versions = (" and ".join(sorted({line[key] for line in found})) for key in keys)
    return f"Measured on {days} on {machines}, with torch {versions}."


def table(found):
    """Return the lines of a table of rows."""
    found = list(found)
    lines = ["| | gpt.py | the other | ratio, median (lowest to highest) |", "|---|---|---|---|"]
    lines += [f"| {row.what} | {row.ours} | {row.theirs} | {row.ratio} |" for row in found]
    return [*lines, "", measured([row.result for row in found])]


def curve():
    """Return the lines of the table of time and loss."""
    found = {}
    for line in results("time_to_loss"):
        if line["date"] >= CONFIG_SINCE and line["runs"] > 2:
            found[line["hardware"], line["command"]] = line
    loss = "loss, full validation split: mean (each seed)"
    lines = [
        f"| command | processor | wall time | {loss} | windows of 256 |",
        "|---|---|---|---|---|",
    ]
    for line in sorted(found.values(), key=lambda line: line["wall_s"]):
        each = ", ".join(f"{loss:.4f}" for loss in line["val_losses"])
        processor = line["hardware"].split(", ")[-1]
        lines.append(
            f"| `{line['command']}` | {processor} | {line['wall_s']} s "
            f"| {line['val_loss']:.4f} ({each}) | {line['estimates'].get('256', '')} |"
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
            f"| {name} | {steps:,} | {line['val_loss']:.4f} ({low:.4f} to {high:.4f}) "
            f"| {line['tokens_per_s']:,} |"
        )
    return [*lines, "", measured(found.values())]


def sweep():
    """Return the lines of the table of learning rates, widths and depths."""
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


# The rows of README's table: words for the reader, and the beginning and end of the full row's
FRONT = (
    (
        "train 0.2M parameters, on 2 cores, to the loss at which nanoGPT's CPU recipe (0.8M) ends",
        "nanoGPT, whole command",
        ("whole command to the loss", ""),
    ),
    (
        "train 10.7M parameters, on 2 cores, tokens/s",
        "nanoGPT, compiled, with autocast",
        (
            "training, compiled, tokens/s, 10.7M",
            "AVX512-BF16, versus nanoGPT, autocast and compile",
        ),
    ),
    (
        "generate with 10.7M parameters, on 2 cores, tokens/s",
        "transformers, compiled",
        ("generating, bfloat16, compiled", "versus transformers bfloat16, compiled"),
    ),
    (
        "train to a loss of 1.475 on Shakespeare, with 3.1M parameters versus 10.7M, on one H200",
        "nanoGPT, compiled, whole command",
        ("whole command versus nanoGPT's", ""),
    ),
    (
        "train 124M parameters, on one H200, tokens/s",
        "nanoGPT, compiled",
        ("training, compiled, tokens/s, 124M", "versus nanoGPT"),
    ),
)


def front():
    """Return README's short table as Markdown."""
    found = [*rows(), *gpu_rows()]
    lines = ["| | gpt.py | baseline | gpt.py is |", "|---|---|---|---|"]
    chosen = []
    for what, baseline, (begin, end) in FRONT:
        (row,) = [row for row in found if row.what.startswith(begin) and row.what.endswith(end)]
        ours, theirs = row.ours.partition(" (")[0], row.theirs.partition(" (")[0]
        ratio = float(row.ratio.split()[0])
        lines.append(f"| {what} | {ours} | {theirs} ({baseline}) | {ratio:.1f} times as fast |")
        chosen.append(row.result)
    return "\n".join([*lines, "", measured(chosen)]) + "\n"


def sizes():
    """Return the table of docs/sizes.md, and under it the text that each model wrote."""
    # Below half a minute the config file sets the size, and most of the time is spent on starting.
    found = {line["minutes"]: line for line in results("sizes") if line["minutes"] >= 0.5}
    lines = [
        "| `--max_minutes` | whole command | parameters | layers x width | tokens read | loss |",
        "|---|---|---|---|---|---|",
    ]
    texts = []
    for minutes, line in sorted(found.items()):
        lines.append(
            f"| {minutes:g} | {line['wall_s']:.0f} s | {line['params'] / 1e6:.2f}M "
            f"| {line['n_layer']} x {line['n_embd']} | {line['tokens'] / 1e6:.1f}M "
            f"| {line['val_loss']:.2f} |"
        )
        texts += [f"After {minutes:g} minutes, {line['params'] / 1e6:.2f}M parameters:", ""]
        texts += [*("    " + row for row in line["text"].splitlines()), ""]
    return "\n".join([*lines, "", measured(found.values()), "", *texts[:-1]]) + "\n"


# Config files that are made for GPUs, the vocabulary's size, and the shape that was measured on an
# H200 whose share of the peak (mfu) they are assumed to reach
PLANS = (
    (["train_tinystories"], 8192, "medium"),
    (["train_wikitext103"], 50257, "medium"),
    (["train_medium"], 50257, "medium"),
    (["train_fineweb_edu"], 50257, "gpt2"),
    (["train_gpt2"], 50257, "gpt2"),
    (["train_gpt2", "gpt2_medium"], 50257, "large"),
    (["train_gpt2", "gpt2_large"], 50257, "large"),
    (["train_gpt2", "gpt2_xl"], 50257, "large"),
    (["train_large"], 50257, "large"),
    (["train_1b"], 50257, "large"),
)
DOLLARS_PER_HOUR = 3.0  # of one H200; an assumption, since prices differ
EIGHT_GPUS = 0.9  # of eight times the speed of one; an assumption, since it was not measured


def planned(names):
    """Return the settings of config files on a GPU."""
    script = {name: setting.default for name, setting in gpt.SETTINGS.items()}
    script["__file__"] = str(ROOT / "gpt.py")
    files = [str(ROOT / "config" / f"{name}.py") for name in names]
    derived = {"device_type": "cuda", "native_bfloat16": True}
    configurator.configure(script, files, gpt.SETTINGS, gpt.check_setting, lambda: derived)
    return gpt.checked_settings(**{name: script[name] for name in gpt.SETTINGS})


def amount(value):
    """Return a number of hours, dollars or billions with at most one digit behind the point."""
    if value < 0.1:
        return "below 0.1"
    return f"{value:.1f}" if value < 10 else f"{value:,.0f}"


def plans():
    """Return the table of hours and dollars that follow from speeds measured on a GPU."""
    lines = [
        "| config files | parameters | tokens | hours on one H200 | hours on eight | dollars on eight |",
        "|---|---|---|---|---|---|",
    ]
    chosen = []
    for names, vocab_size, shape in PLANS:
        settings = planned(names)
        config = gpt.model_config(settings, vocab_size)
        with torch.device("meta"):
            n_params = gpt.GPT(config).n_params()
        tokens = settings.max_iters * settings.batch_size * settings.block_size
        tokens *= settings.gradient_accumulation_steps
        measured_speed = latest("train_speed", "NVIDIA", shape=shape)
        flops_per_second = measured_speed["mfu"] * gpt.PEAK_TFLOPS["H200"] * 1e12
        hours = tokens * config.flops_per_token() / flops_per_second / 3600
        on_eight = hours / 8 / EIGHT_GPUS
        files = ", ".join(f"`{name}.py`" for name in names)
        lines.append(
            f"| {files} | {n_params / 1e6:,.0f}M | {amount(tokens / 1e9)}B | {amount(hours)} "
            f"| {amount(on_eight)} | {amount(8 * on_eight * DOLLARS_PER_HOUR)} |"
        )
        if measured_speed not in chosen:
            chosen.append(measured_speed)
    speeds = ", ".join(f"{r['mfu']:.0%} for {r['tokens_per_s']['ours']:,} tokens/s" for r in chosen)
    assumed = (
        "All hours and dollars are estimates. They assume the share of an H200's peak that models of "
        f"81M, 124M and 350M parameters reached ({speeds}), on eight GPUs {EIGHT_GPUS:.0%} of "
        f"eight times one GPU's speed, and {DOLLARS_PER_HOUR:g} dollars an hour for each GPU."
    )
    return "\n".join([*lines, "", measured(chosen), "", assumed]) + "\n"


def fill(text, begin, content):
    """Return text with content between a marker and the next END."""
    before, rest = text.split(begin)
    return before + begin + "\n" + content + "\n" + END + rest.split(END, 1)[1]


PARTS = (
    ("README.md", BEGIN_FRONT, front),
    ("docs/speed.md", BEGIN, tables),
    ("docs/sizes.md", BEGIN_SIZES, sizes),
    ("docs/sizes.md", BEGIN_PLANS, plans),
)


def main():
    for name, begin, write in PARTS:
        page = ROOT / name
        text = fill(page.read_text(encoding="utf-8"), begin, write())
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
