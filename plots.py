"""plots.py: a run and a model made visible; gpt.py and sample.py load it when they need it.

    python plots.py out/shakespeare                     draw loss.png of a run's log.jsonl once more
    python gpt.py --tensorboard=True                    also to out/<run>/tensorboard: pip install tensorboard
    python gpt.py --wandb_log=True                      also to Weights & Biases: pip install wandb
    python sample.py --show --prompt="ROMEO:"           the likeliest next tokens as bars
    python sample.py --show=attention --prompt="ROMEO:" what each head looks at: attention.png

loss.png and attention.png need matplotlib: pip install matplotlib.
"""

import contextlib
import importlib
import importlib.util
import json
import math
import sys
import time
from pathlib import Path

import torch

# ---- Settings: each comment is its help text (python plots.py --help) --------------------------------------
run = ""  # a run's folder, which holds log.jsonl


def needed(library, purpose):
    """Return a library. Raises ValueError, with the remedy, if it is missing."""
    try:
        return importlib.import_module(library)
    except ImportError as e:
        name = library.partition(".")[0]
        name = "tensorboard" if name == "torch" else name
        raise ValueError(f"{purpose} needs {name}, which is missing: pip install {name}") from e


# ---- A run: loss.png, TensorBoard, Weights & Biases --------------------------------------------------------
def read_log(path):
    """Return {name: ([step, ...], [value, ...])} of the numbers in a log.jsonl, each step once.

    The loss over the full validation split, in the last line, is "full_val_loss". A line that a killed
    process left unfinished is passed over.
    """
    found = {}
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if not isinstance(values, dict) or "step" not in values:
            continue
        if "perplexity" in values:
            values["full_val_loss"] = values.pop("val_loss")
        for name, value in values.items():
            if isinstance(value, int | float):
                found.setdefault(name, {})[values["step"]] = value  # a resumed run repeats steps
    return {
        name: (sorted(by_step), [by_step[k] for k in sorted(by_step)])
        for name, by_step in found.items()
    }


def loss_figure(log, title=""):
    """Return a matplotlib figure of what read_log gives: losses, learning rate and speed by step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), dpi=100, layout="constrained", facecolor="white")
    top, rate, speed = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 1))
    top.set_title(title, fontsize=10, parse_math=False)
    for name, label, style in (
        ("loss", "training, by batch", "-"),
        ("val_loss", "validation", "o-"),
    ):
        steps, values = log.get(name, ([], []))
        marker = "o-" if len(steps) < 3 else style
        top.plot(steps, values, marker, label=label, linewidth=1.5, markersize=4)
    if "val_loss" in log:
        best = min(log["val_loss"][1])
        top.axhline(
            best, color="gray", linewidth=0.8, linestyle=":", label=f"lowest validation {best:.4f}"
        )
    if "full_val_loss" in log:
        steps, (loss,) = log["full_val_loss"][0][-1:], log["full_val_loss"][1][-1:]
        top.plot(steps, [loss], "k*", label=f"full validation split {loss:.4f}")
    losses, later = (
        sorted(filter(math.isfinite, values))
        for values in (log.get("loss", ([], []))[1], log.get("val_loss", ([], []))[1][1:])
    )
    if len(losses) >= 20:  # the first steps' losses would flatten the rest
        high = max([losses[int(0.95 * len(losses))], *later])
        top.set_ylim(min([*losses, *later]) - 0.05, high + 0.1)
    top.set_ylabel("loss, nats per token")
    top.legend(frameon=False)
    rate.plot(*log.get("lr", ([], [])), color="tab:green")
    rate.set_ylabel("learning rate\n(AdamW)")
    rate.set_ylim(bottom=0)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    speed.plot(*log.get("tokens_per_s", ([], [])), color="tab:red")
    speed.set_ylabel("tokens/s")
    speed.set_ylim(0, 1.1 * max(log.get("tokens_per_s", ([], [1]))[1]))
    speed.yaxis.set_major_formatter("{x:,.0f}")
    speed.xaxis.set_major_formatter("{x:,.0f}")
    speed.set_xlabel("step")
    for axes in (top, rate, speed):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.align_ylabels()
    return figure


class Picture:
    """Draws loss.png anew from log.jsonl whenever a validation loss is logged, as soon as there are two.

    In a notebook the picture is shown, too, and changes in its place.
    """

    def __init__(self, out):
        self.out, self.drawn, self.shown = out, out / "loss.png", None

    def __call__(self, values):
        log = read_log(self.out / "log.jsonl") if "val_loss" in values else {}
        if len(log.get("val_loss", ([],))[0]) < 2:
            return
        loss_figure(log, self.out.name).savefig(self.drawn)
        if "ipykernel" in sys.modules:
            from IPython.display import Image, display

            picture = Image(data=self.drawn.read_bytes())
            if self.shown:
                self.shown.update(picture)
            else:
                self.shown = display(picture, display_id=True)


def tensorboard_writer(out, config):
    """Return a function that writes the numbers of a dict to a new folder in out/tensorboard."""
    module = needed("torch.utils.tensorboard", "tensorboard=True")
    writer = module.SummaryWriter(str(out / "tensorboard" / time.strftime("%Y-%m-%d-%H%M%S")))
    writer.add_text("config", json.dumps(config))

    def write(values):
        for name, value in values.items():
            if isinstance(value, int | float) and name != "step":
                writer.add_scalar(name, value, values["step"])
        writer.flush()

    return write


def wandb_writer(out, config):
    """Return a function that writes the numbers of a dict to a new run of Weights & Biases."""
    wandb = needed("wandb", "wandb_log=True")
    out.mkdir(parents=True, exist_ok=True)  # or else wandb writes elsewhere
    try:
        settings = wandb.Settings(console="off")
        run = wandb.init(dir=out, config=config, settings=settings, reinit="finish_previous")
    except wandb.errors.Error as e:
        raise ValueError(f"wandb_log: {e}: log in by wandb login, or set WANDB_MODE=offline") from e

    def write(values):
        numbers = {name: v for name, v in values.items() if isinstance(v, int | float)}
        run.log(numbers, step=values["step"], commit="perplexity" in values or None)

    return write


def unharmful(name, write):
    """Return write as a function that, should it fail, says so and then does nothing: the run goes on."""
    failed = False

    def attempt(values):
        nonlocal failed
        if failed:
            return
        try:
            write(values)
        except Exception as e:  # noqa: BLE001  # libraries fail in many ways, a disk is full
            failed = True
            print(
                f"{name}: no longer written ({type(e).__name__}: {' '.join(str(e).split())})",
                flush=True,
            )

    return attempt


def writers(gpt, out):
    """Return the functions that take each dict that a run logs, by the settings and what is installed.

    gpt: the module that asks, gpt.py imported or run, by its settings. Raises ValueError.
    """
    config, found = {name: getattr(gpt, name) for name in gpt.SETTINGS}, []
    if gpt.tensorboard:
        found.append(unharmful("tensorboard", tensorboard_writer(out, config)))
    if gpt.wandb_log:
        found.append(unharmful("wandb", wandb_writer(out, config)))
    if importlib.util.find_spec("matplotlib"):
        found.append(unharmful("loss.png", Picture(out)))
    return found


# ---- A model: next tokens, attention -----------------------------------------------------------------------
@torch.no_grad()
def next_probabilities(model, ids):
    """Return the probabilities (vocab_size,) float32 of the token after ids, a list that fits block_size."""
    model.eval()
    logits = model(torch.tensor([ids], device=model.ln_f.weight.device))[0]
    return logits[0, -1].float().softmax(-1).cpu()


def bars(probabilities, tokenizer, n=20):
    """Return a text: a line with token, probability and bar for each of the n likeliest tokens."""
    found, ids = probabilities.topk(min(n, len(probabilities)))
    names = [
        repr(tokenizer.decode_bytes([i]).decode(errors="backslashreplace")) for i in ids.tolist()
    ]
    width, rest = max(map(len, [*names, "others"])), 1 - float(found.sum())
    lines = [
        f"{name:>{width}} {p:7.2%} {'#' * round(50 * p / float(found[0]))}"
        for name, p in zip(names, found.tolist())
    ]
    if len(ids) < len(probabilities):
        lines.append(f"{'others':>{width}} {max(0, rest):7.2%}")
    return "\n".join(lines)


@contextlib.contextmanager
def noting_attention():
    """While open, gpt.attention is written out, and its weights go into the list that this gives.

    One tensor for each layer's call: (B, n_head, T, S) float32, rows that sum to 1.
    """
    import gpt

    noted, fast = [], gpt.attention

    def attention(q, k, v, mask=None):
        groups = q.size(1) // k.size(1)
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = (q @ k.mT).float() / math.sqrt(q.size(-1))
        if mask is None:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        noted.append(scores.masked_fill(~mask, -torch.inf).softmax(-1))
        return noted[-1].to(v.dtype) @ v

    gpt.attention = attention
    try:
        yield noted
    finally:
        gpt.attention = fast


@torch.no_grad()
def attention_weights(model, ids):
    """Return how much each token of ids looks at each other, (n_layer, n_head, T, T) float32."""
    model.eval()
    with noting_attention() as noted:
        model(torch.tensor([ids], device=model.ln_f.weight.device))
    return torch.cat(noted).cpu()


def attention_figure(weights, tokens, most=8):
    """Return a matplotlib figure of weights (n_layer, n_head, T, T): a row of maps for each layer.

    tokens: T texts. Of more than `most` layers or heads evenly spread ones are shown.
    """
    from matplotlib.figure import Figure

    layers, heads = (
        sorted({round(i * (n - 1) / max(1, min(n, most) - 1)) for i in range(min(n, most))})
        for n in weights.shape[:2]
    )
    labels = [repr(t)[1:-1].replace(" ", "\N{OPEN BOX}") for t in tokens]  # a visible space
    size = 2.2 if len(tokens) <= 24 else 3.2
    figure = Figure((1.6 + size * len(heads), 1.2 + size * len(layers)), 100, layout="constrained")
    grid = figure.subplots(len(layers), len(heads), squeeze=False, sharex=True, sharey=True)
    for layer, row in zip(layers, grid):
        for head, axes in zip(heads, row):
            image = axes.imshow(weights[layer, head].numpy(), cmap="Blues", vmin=0, vmax=1)
            axes.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=8)
            axes.tick_params(length=0)
            axes.grid(visible=False)
            if len(tokens) <= 40:
                axes.set_xticks(
                    range(len(tokens)), labels, fontsize=6, family="monospace", parse_math=False
                )
                axes.set_yticks(
                    range(len(tokens)), labels, fontsize=6, family="monospace", parse_math=False
                )
                if max(map(len, labels)) > 2:
                    axes.tick_params(axis="x", rotation=90)
    figure.supxlabel("token that is looked at", fontsize=9)
    figure.supylabel("token that looks", fontsize=9)
    figure.colorbar(
        image, ax=grid, label="attention weight", shrink=min(1, 3 / len(layers)), aspect=30
    )
    return figure


def show(model, tokenizer, ids, kind, path):
    """Print the likeliest tokens after ids or, for kind "attention", save a picture at path.

    Raises ValueError.
    """
    from gpt import context_length

    if kind not in ("", "attention"):
        raise ValueError(
            f"show is {kind!r}: it must be attention or, for the next token, empty; the prompt "
            "goes to --prompt"
        )
    ids = ids[-context_length(len(ids), model.config.block_size) :]
    if kind == "":
        print(f"next token after {tokenizer.decode(ids[-60:])!r}, at temperature 1:")
        print(bars(next_probabilities(model, ids), tokenizer))
        return
    needed("matplotlib", "--show=attention")
    tokens = [tokenizer.decode_bytes([i]).decode(errors="backslashreplace") for i in ids]
    attention_figure(attention_weights(model, ids), tokens).savefig(path)
    print(f"wrote {path}")


def main():
    needed("matplotlib", "loss.png")
    log = Path(run) / "log.jsonl"
    if not log.is_file():
        raise FileNotFoundError(f"{log} does not exist: name a run's folder, as out/shakespeare")
    loss_figure(read_log(log), Path(run).resolve().name).savefig(log.with_name("loss.png"))
    print(f"wrote {log.with_name('loss.png')}")


if __name__ == "__main__":
    from configurator import run_script

    run_script(globals(), main, word_setting="run")
