"""Draw the pictures of README.md and docs/: the model, two attention heads, and losses.

    python bench/pictures.py [--data_dir=data]

- docs/architecture.svg: the parts of a GPT, with the shapes of a small one that is built here
- docs/attention.svg: where two heads of the model that comes along look
- docs/loss_parts.svg: that model's loss curve, with its parts named
- docs/loss_by_time.svg: losses by wall time, from bench/results.jsonl

--data_dir holds the data set "shakespeare", from which the losses of two simple models are counted.
It needs matplotlib. Every picture has a white ground, so it is legible on a dark page, too.
"""

import itertools
import json
import math

import matplotlib
import torch
from common import ROOT, flags
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

import gpt
from extras import plots

matplotlib.rcParams["svg.hashsalt"] = "gpt.py"  # or each drawing would have other names inside
MODEL = ROOT / "models" / "shakespeare"
BLUE, GREEN, ORANGE, GRAY = "#1f5fa8", "#2a7d3f", "#b35900", "#57606a"


def save(figure, name):
    path = ROOT / "docs" / name
    figure.savefig(path, metadata={"Date": None})
    print(f"wrote {path.relative_to(ROOT)}, {path.stat().st_size / 1000:.0f} kB")


def new_figure(width, height):
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


# ---- The model ----
def architecture():
    """Return a picture of the model's parts, with output shapes that a small model really has."""
    config = gpt.GPTConfig(
        block_size=256, vocab_size=65, n_layer=4, n_head=4, n_kv_head=2, n_embd=128
    )
    model = gpt.GPT(config)
    shapes = output_shapes(model, rows=1, length=256)
    figure = Figure(figsize=(10.4, 9), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 104), ylim=(-6, 84))
    axes.axis("off")

    c, head = config, config.head_dim
    heads = f"q (B, {c.n_head}, T, {head})\nk (B, {c.n_kv_head}, T, {head})"
    rows = [  # y, text, color, shape of the output, what GPT-2 has instead
        (79, "ids", GRAY, "(B, T)", ""),
        (73, "wte: a vector for each token", BLUE, shapes["wte"], "wpe, a vector for each position, is added:\nuse_rope=False"),
        (64, "ln_1: RMSNorm", GRAY, shapes["h.0.ln_1"], "LayerNorm: use_rms_norm=False, bias=True"),
        (58, "attn.c_attn: queries, keys, values", BLUE, shapes["h.0.attn.c_attn"], f"as many k and v heads as q heads:\nn_kv_head=n_head (here {c.n_kv_head} and {c.n_head})"),
        (52, "norm of q and k, then RoPE", GRAY, heads, "neither: qk_norm=False, use_rope=False"),
        (46, "attend: softmax(q k / √d) v", GREEN, f"(B, {c.n_head}, T, {head})", ""),
        (40, "attn.c_proj", BLUE, shapes["h.0.attn.c_proj"], ""),
        (29, "ln_2: RMSNorm", GRAY, shapes["h.0.ln_2"], "LayerNorm"),
        (23, "mlp.c_fc: gate and up", BLUE, shapes["h.0.mlp.c_fc"], "one part, no gate: use_swiglu=False"),
        (17, "SiLU(gate) × up", GREEN, f"(B, T, {c.mlp_hidden})", "GELU"),
        (11, "mlp.c_proj", BLUE, shapes["h.0.mlp.c_proj"], ""),
        (1, "ln_f, then lm_head: logits", BLUE, shapes["lm_head"], "LayerNorm; lm_head is wte: tie_weights=True"),
        (-4, "softmax: chances of the next token", GREEN, shapes["lm_head"], ""),
    ]  # fmt: skip
    axes.add_patch(box(6, 4.6, 95, 63.6, "#f3f6fa", "#c4ccd6"))
    axes.text(
        100, 66.6, f"one block; there are n_layer = {c.n_layer}", size=9.5, ha="right", va="center"
    )
    for y, text, color, shape, other in rows:
        axes.add_patch(box(14, y - 1.9, 32, 3.8, "white", color))
        axes.text(30, y, text, ha="center", va="center", size=9.5, color=color)
        axes.text(48.5, y, shape, va="center", size=8.5, color="black", family="monospace")
        axes.text(68, y, other, va="center", size=8.5, color=ORANGE)
    for (y, *_), (lower, *_) in itertools.pairwise(rows):
        arrow(axes, (30, y - 1.9), (30, lower + 1.9))
    # The residual stream: past a norm and its part, to the sum.
    for begin, end in ((69.4, 36), (33, 7)):
        axes.plot([30, 10, 10], [begin, begin, end], color="black", linewidth=1.2)
        arrow(axes, (10, end), (28.8, end))
        axes.text(30, end, "+", ha="center", va="center", size=13, weight="bold",
                  bbox={"boxstyle": "circle,pad=0.05", "fc": "white", "ec": "black"})  # fmt: skip
        axes.text(
            8.4,
            (begin + end) / 2,
            "residual stream",
            rotation=90,
            ha="center",
            va="center",
            size=9.5,
        )
    axes.text(48.5, 82.4, "shape of the output", size=9, weight="bold", va="center")
    axes.text(68, 82.4, "GPT-2 has instead", size=9, weight="bold", va="center", color=ORANGE)
    return figure


def output_shapes(model, rows, length):
    """Return {module's name: text of its output's shape}, with B and T for the first two sizes."""
    shapes = {}

    def note(name):
        def hook(module, inputs, output):
            if isinstance(output, torch.Tensor):
                shapes[name] = f"(B, T, {', '.join(str(n) for n in output.shape[2:])})"

        return hook

    hooks = [part.register_forward_hook(note(name)) for name, part in model.named_modules()]
    model(torch.zeros(rows, length, dtype=torch.long))
    for hook in hooks:
        hook.remove()
    return shapes


def box(x, y, width, height, face, edge):
    style = "round,pad=0,rounding_size=0.8"
    return FancyBboxPatch((x, y), width, height, boxstyle=style, fc=face, ec=edge, lw=1.2)


def arrow(axes, start, end):
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "black", "lw": 1.1})


# ---- Two heads of attention ----
HEADS_TEXT = "JULIET:\nO Romeo!"
NEAR, MARKS = (1, 0), (3, 2)  # layer and head, chosen by eye from sample.py --show=attention


def attention():
    """Return a picture of two heads' attention, with the text at rows and columns."""
    model, tokenizer, _ = gpt.load_checkpoint(MODEL / "best.pt")
    weights = plots.attention_weights(model, tokenizer.encode(HEADS_TEXT))
    letters = [{" ": "space", "\n": "line end"}.get(c, c) for c in HEADS_TEXT]
    before = weights[NEAR].diagonal(-1).mean()
    marks = [i for i, c in enumerate(HEADS_TEXT) if not c.isalpha()]
    after = slice(marks[0] + 1, None)  # the rows that have a mark before them
    at_marks = weights[MARKS][after, marks].sum(1).mean()
    titles = {
        NEAR: f"{before:.0%} at the character just before",
        MARKS: f"{at_marks:.0%} at what is no letter, from the first colon on",
    }
    figure = new_figure(9.2, 4.8)
    for axes, (layer, head) in zip(figure.subplots(1, 2), titles):
        image = axes.imshow(weights[layer, head], cmap="Blues", vmin=0, vmax=1)
        axes.set_xticks(range(len(letters)), letters, size=8, rotation=90)
        axes.set_yticks(range(len(letters)), letters, size=8)
        axes.set_title(f"layer {layer + 1}, head {head + 1}:\n{titles[layer, head]}", size=9.5)
        axes.set(xlabel="looks at", ylabel="character")
    figure.colorbar(image, ax=figure.axes, label="weight; each row sums to 1", shrink=0.8)
    return figure


# ---- Losses ----
def simple_losses(folder):
    """Return the validation losses, in nats, of chances counted for single and paired tokens.

    One is added to each count, so that no pair of the validation text has a chance of 0.
    """
    data = gpt.Data(folder, block_size=8)
    train, val = (
        torch.from_numpy(data.tokens[split][:].astype("int64")) for split in ("train", "val")
    )
    size = data.meta["vocab_size"]
    counts = torch.bincount(train, minlength=size).double() + 1
    unigram = -(counts / counts.sum()).log()[val].mean()
    pairs = torch.bincount(train[:-1] * size + train[1:], minlength=size * size).view(size, size)
    chances = (pairs + 1).double() / (pairs + 1).sum(1, keepdim=True)
    bigram = -chances.log()[val[:-1], val[1:]].mean()
    return float(unigram), float(bigram)


def loss_parts(data_dir):
    """Return a picture of one run's losses, with words for their parts."""
    log = plots.read_log(MODEL / "log.jsonl")
    vocab_size = len(gpt.load_checkpoint(MODEL / "best.pt")[1].state["chars"])
    unigram, bigram = simple_losses(data_dir / "shakespeare")
    figure = new_figure(9.2, 5)
    axes = figure.subplots()
    axes.plot(*log["loss"], color=BLUE, label="training loss, one batch at a time")
    axes.plot(*log["val_loss"], "o-", color=ORANGE, label="validation loss, on text held back")
    last = log["val_loss"][0][-1]
    lines = (
        (math.log(vocab_size), f"ln({vocab_size}) = {math.log(vocab_size):.2f}: every character has the same chance"),
        (unigram, f"{unigram:.2f}: knows how often each character occurs"),
        (bigram, f"{bigram:.2f}: knows which character follows which"),
    )  # fmt: skip
    for loss, text in lines:
        axes.axhline(loss, color=GRAY, linestyle=":", linewidth=1)
        axes.text(last, loss + 0.03, text, ha="right", size=9, color=GRAY)
    for text, point, place in (
        ("a steep fall:\nletters, then short words", (60, 2.2), (330, 2.85)),
        ("a long slope: spelling, names, the form of a play", (800, 1.60), (700, 2.05)),
        ("the learning rate falls to its end,\nand the loss with it", (2250, 1.43), (1650, 1.85)),
        ("the gap: the model knows\nits training text better", (2300, 1.32), (2050, 2.12)),
    ):
        axes.annotate(text, point, place, size=9, arrowprops={"arrowstyle": "->"})
    axes.set(xlabel="step", ylabel="loss, nats per character", ylim=(1.1, 4.4))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, 0.88))
    return figure


def loss_by_time():
    """Return a picture of losses over the wall time of whole commands, ours and nanoGPT's."""
    lines = (ROOT / "bench" / "results.jsonl").read_text(encoding="utf-8").splitlines()
    found = [r for r in map(json.loads, lines) if "nanogpt_curve" in r and "cores" in r["hardware"]]
    if not found:
        raise ValueError("no curves yet: run bench/time_to_loss.py with --nanogpt on a CPU first")
    result = found[-1]
    figure = new_figure(9.2, 4.4)
    axes = figure.subplots()
    axes.plot(
        *zip(*result["nanogpt_curve"]), "o-", color=GRAY, label="nanoGPT, its recipe for a CPU"
    )
    axes.plot(*zip(*result["curve"]), "o-", color=BLUE, label=f"gpt.py {result['command']}")
    seconds = (5, 10, 20, 50, 100, 200)
    axes.set_xscale("log")
    axes.set_xticks(seconds, [f"{s} s" for s in seconds], minor=False)
    axes.set(
        xlabel="time since the command was typed", ylabel="validation loss, nats per character"
    )
    axes.set_title(f"{result['hardware']}, torch {result['torch']}, {result['date']}", size=9)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def main():
    chosen = flags(data_dir=str(ROOT / "data"))
    save(architecture(), "architecture.svg")
    save(attention(), "attention.svg")
    save(loss_parts(gpt.as_path(chosen["data_dir"])), "loss_parts.svg")
    save(loss_by_time(), "loss_by_time.svg")


if __name__ == "__main__":
    main()
