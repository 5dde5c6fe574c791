"""plots.py: pictures and logs of a run, and a look inside a model.

    python extras/plots.py out/shakespeare              draw loss.png again from a run's log.jsonl
    python gpt.py --tensorboard=True                    log to TensorBoard: pip install tensorboard
    python gpt.py --wandb_log=True                      log to Weights & Biases: pip install wandb
    python sample.py --show --prompt="ROMEO:"           the likeliest next tokens as bars
    python sample.py --show=attention --prompt="ROMEO:" what each head looks at: attention.png

loss.png and attention.png need matplotlib: pip install matplotlib.
"""

import importlib
import importlib.util
import json
import math
import sys
from pathlib import Path

import torch


def needed(library, purpose):
    """Import and return a library. Raises ValueError, which names the remedy, if it is missing."""
    try:
        return importlib.import_module(library)
    except ImportError as e:
        name = "tensorboard" if library == "torch.utils.tensorboard" else library
        raise ValueError(f"{purpose} needs {name}, which is missing: pip install {name}") from e


# ---- The log of a run ----
def is_number(value):
    """Return whether a logged value can be drawn. Losses that are not finite are logged as null."""
    return isinstance(value, int | float) and math.isfinite(value)


def read_log(path):
    """Return {name: ([step, ...], [value, ...])} of the numbers in a log.jsonl, each step once.

    The last line holds the loss over the full validation split, here named "full_val_loss". A line
    that a killed process left unfinished is skipped.
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
            if is_number(value):
                # A resumed run repeats steps, and its later values count.
                found.setdefault(name, {})[values["step"]] = value
    log = {}
    for name, by_step in found.items():
        steps = sorted(by_step)
        log[name] = (steps, [by_step[step] for step in steps])
    return log


# ---- loss.png ----
def loss_limits(losses, val_losses):
    """Return the lowest and highest loss to draw, or None if all of them can be drawn.

    losses, val_losses: the values in the order of their steps. The first steps' losses are far
    above the others and would flatten the curve, so the highest twentieth is cut off. Validation
    losses after the first one are always in the picture.
    """
    if len(losses) < 20:
        return None
    almost_highest = sorted(losses)[int(0.95 * len(losses))]
    shown = [*losses, *val_losses[1:]]
    return min(shown) - 0.05, max([almost_highest, *val_losses[1:]]) + 0.1


def draw_losses(axes, log):
    """Draw training and validation losses, with the lowest and the final one marked."""
    curves = (("loss", "training, by batch", "-"), ("val_loss", "validation", "o-"))
    for name, label, style in curves:
        steps, values = log.get(name, ([], []))
        if len(steps) < 3:
            style = "o-"  # one point makes no line
        axes.plot(steps, values, style, label=label, linewidth=1.5, markersize=4)
    if "val_loss" in log:
        lowest = min(log["val_loss"][1])
        label = f"lowest validation {lowest:.4f}"
        axes.axhline(lowest, color="gray", linewidth=0.8, linestyle=":", label=label)
    if "full_val_loss" in log:
        steps, values = log["full_val_loss"]
        label = f"full validation split {values[-1]:.4f}"
        axes.plot(steps[-1:], values[-1:], "k*", label=label)
    limits = loss_limits(log.get("loss", ([], []))[1], log.get("val_loss", ([], []))[1])
    if limits:
        axes.set_ylim(*limits)
    axes.set_ylabel("loss, nats per token")
    axes.legend(frameon=False)


def draw_learning_rate(axes, log):
    axes.plot(*log.get("lr", ([], [])), color="tab:green")
    axes.set_ylabel("learning rate\n(AdamW)")
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))


def draw_speed(axes, log):
    steps, speeds = log.get("tokens_per_s", ([], []))
    axes.plot(steps, speeds, color="tab:red")
    axes.set_ylabel("tokens/s")
    axes.set_ylim(0, 1.1 * max(speeds, default=1))
    axes.yaxis.set_major_formatter("{x:,.0f}")


def loss_figure(log, title=""):
    """Return a matplotlib figure of read_log's result: losses, learning rate and speed by step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), dpi=100, layout="constrained", facecolor="white")
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 1))
    top.set_title(title, fontsize=10, parse_math=False)
    draw_losses(top, log)
    draw_learning_rate(middle, log)
    draw_speed(bottom, log)
    bottom.xaxis.set_major_formatter("{x:,.0f}")
    bottom.set_xlabel("step")
    for axes in (top, middle, bottom):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.align_ylabels()
    return figure


class Picture:
    """Draws loss.png from log.jsonl whenever a validation loss is logged, from the second one on.

    In a notebook the picture is shown as well, and later ones take its place.
    """

    def __init__(self, out):
        self.out = out
        self.path = out / "loss.png"
        self.shown = None  # the notebook's handle to the picture

    def __call__(self, values):
        if "val_loss" not in values:
            return
        log = read_log(self.out / "log.jsonl")
        steps, _ = log.get("val_loss", ([], []))
        if len(steps) < 2:
            return
        loss_figure(log, self.out.name).savefig(self.path)
        if "ipykernel" in sys.modules:
            self.show()

    def show(self):
        """Show the picture below the notebook cell that is running."""
        from IPython.display import Image, display

        picture = Image(data=self.path.read_bytes())
        if self.shown:
            self.shown.update(picture)
        else:
            self.shown = display(picture, display_id=True)


# ---- TensorBoard and Weights & Biases ----
def tensorboard_writer(out, config, step):
    """Return a function that writes the numbers of a dict to a folder in out/tensorboard.

    Each run has a folder of its own. A run that is resumed at `step` continues in the newest
    folder. TensorBoard then drops what was written there after that step.
    """
    tensorboard = needed("torch.utils.tensorboard", "tensorboard=True")
    folders = [path for path in (out / "tensorboard").glob("*") if path.is_dir()]
    if step > 0 and folders:
        folder = max(folders, key=lambda path: path.stat().st_mtime)
        writer = tensorboard.SummaryWriter(str(folder), purge_step=step + 1)
    else:
        folder = out / "tensorboard" / f"run-{len(folders) + 1}"
        writer = tensorboard.SummaryWriter(str(folder))
    writer.add_text("config", json.dumps(config), step)

    def write(values):
        for name, value in values.items():
            if isinstance(value, int | float) and name != "step":
                writer.add_scalar(name, value, values["step"])
        writer.flush()

    return write


def wandb_writer(out, config, step):
    """Return a function that writes the numbers of a dict to a run of Weights & Biases.

    The run's id is kept in out/wandb_id.txt, so that a resumed run can continue it. Steps
    after the checkpoint, which the run already has, keep their first values.
    """
    wandb = needed("wandb", "wandb_log=True")
    id_file = out / "wandb_id.txt"
    out.mkdir(parents=True, exist_ok=True)  # otherwise wandb writes elsewhere
    choices = {"reinit": "finish_previous", "settings": wandb.Settings(console="off")}
    if step > 0 and id_file.exists():
        choices["id"] = id_file.read_text(encoding="utf-8").strip()
        choices["resume"] = "allow"
    try:
        run = wandb.init(dir=out, config=dict(config), **choices)
    except wandb.errors.Error as e:
        raise ValueError(
            f"wandb_log: {e}: log in with wandb login, or set WANDB_MODE=offline"
        ) from e
    id_file.write_text(run.id, encoding="utf-8")

    def write(values):
        numbers = {name: v for name, v in values.items() if isinstance(v, int | float)}
        # The last line of a run is sent immediately, because no later step would send it.
        run.log(numbers, step=values["step"], commit="perplexity" in values or None)

    return write


def harmless(name, write):
    """Return a function that calls `write` until a call fails, and then prints why and stops.

    A full disk or a lost connection thus costs the log or the picture, but not the run.
    """
    failed = False

    def attempt(values):
        nonlocal failed
        if failed:
            return
        try:
            write(values)
        except Exception as e:  # libraries fail in many ways
            failed = True
            reason = " ".join(str(e).split())
            print(f"{name} is no longer written ({type(e).__name__}: {reason})", flush=True)

    return attempt


def open_writers(out, config, tensorboard=False, wandb_log=False, step=0):
    """Return the functions to call with each dict that a run logs. The dict holds its "step".

    out: Path of the run's folder.
    config: the settings, as a dict, for TensorBoard and Weights & Biases to show.
    step: the step at which the run is resumed. 0: the run begins.
    Raises ValueError if a library is missing or refuses to start.
    """
    writers = []
    if tensorboard:
        writers.append(harmless("tensorboard", tensorboard_writer(out, config, step)))
    if wandb_log:
        writers.append(harmless("wandb", wandb_writer(out, config, step)))
    if importlib.util.find_spec("matplotlib"):
        writers.append(harmless("loss.png", Picture(out)))
    return writers


# ---- A look inside a model ----
@torch.no_grad()
def next_probabilities(model, ids):
    """Return the probabilities of the token after ids, (vocab_size,) float32.

    ids: a list that fits the model's block_size.
    """
    model.eval()
    logits, _ = model(torch.tensor([ids], device=model.ln_f.weight.device))
    return logits[0, -1].float().softmax(-1).cpu()


def token_text(tokenizer, token):
    """Return a token as text, in which bytes that are only part of a character are escaped."""
    return tokenizer.decode_bytes([token]).decode(errors="backslashreplace")


def bars(probabilities, tokenizer, n=20):
    """Return a text with a line for each of the n likeliest tokens: name, probability and bar."""
    top, ids = probabilities.topk(min(n, len(probabilities)))
    names = [repr(token_text(tokenizer, token)) for token in ids.tolist()]
    width = max(map(len, [*names, "others"]))
    lines = []
    for name, p in zip(names, top.tolist()):
        bar = "#" * round(50 * p / float(top[0]))
        lines.append(f"{name:>{width}} {p:7.2%} {bar}")
    if len(ids) < len(probabilities):
        rest = max(0.0, 1 - float(top.sum()))
        lines.append(f"{'others':>{width}} {rest:7.2%}")
    return "\n".join(lines)


def attention_shares(q, k, mask=None):
    """Return softmax(q k^T / sqrt(d) + mask), (B, n_head, T, S) float32: each query's shares.

    q: (B, n_head, T, d).
    k: (B, n_kv_head, S, d). Each key head serves a group of query heads.
    mask: bool, True where a query may look; or float, which is added; None: causal.
    """
    k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)
    scores = (q @ k.mT).float() / math.sqrt(q.size(-1))
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    else:
        scores = scores + mask
    return scores.softmax(-1)


@torch.no_grad()
def attention_weights(model, ids):
    """Return how much each token of ids attends to every other, (n_layer, n_head, T, T) float32.

    Fast attention never computes this matrix, so it is computed here from the inputs of each
    layer's attention.
    """
    model.eval()
    weights = []

    def note(attention, args, kwargs):
        inputs = dict(zip(("x", "positions", "rotary", "mask"), args)) | kwargs
        q, k, _ = attention.project(inputs["x"], inputs["rotary"])
        weights.append(attention_shares(q, k, inputs["mask"]))

    hooks = [block.attn.register_forward_pre_hook(note, with_kwargs=True) for block in model.h]
    try:
        model(torch.tensor([ids], device=model.ln_f.weight.device))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(weights).cpu()


def spread(n, most):
    """Return at most `most` of the numbers below n, evenly spread and including both ends."""
    count = min(n, most)
    return sorted({round(i * (n - 1) / max(1, count - 1)) for i in range(count)})


def attention_figure(weights, tokens, most=8):
    """Return a matplotlib figure with a row of maps for each layer and a column for each head.

    weights: (n_layer, n_head, T, T).
    tokens: T strings.
    most: the largest number of layers and of heads to show. If there are more, an evenly
        spaced selection is shown.
    """
    from matplotlib.figure import Figure

    layers = spread(weights.size(0), most)
    heads = spread(weights.size(1), most)
    size = 2.2 if len(tokens) <= 24 else 3.2  # inches per map
    shape = (1.6 + size * len(heads), 1.2 + size * len(layers))
    figure = Figure(shape, dpi=100, layout="constrained")
    grid = figure.subplots(len(layers), len(heads), squeeze=False, sharex=True, sharey=True)
    for layer, row in zip(layers, grid):
        for head, axes in zip(heads, row):
            image = axes.imshow(weights[layer, head].numpy(), cmap="Blues", vmin=0, vmax=1)
            axes.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=8)
            axes.tick_params(length=0)
            axes.grid(visible=False)
            label_tokens(axes, tokens)
    figure.supxlabel("token attended to", fontsize=9)
    figure.supylabel("token that attends", fontsize=9)
    height = min(1, 3 / len(layers))
    figure.colorbar(image, ax=grid, label="attention weight", shrink=height, aspect=30)
    return figure


def label_tokens(axes, tokens):
    """Write the tokens along both axes of a map, unless there are too many to read."""
    if len(tokens) > 40:
        return
    labels = [repr(token)[1:-1].replace(" ", "\N{OPEN BOX}") for token in tokens]
    style = {"fontsize": 6, "family": "monospace", "parse_math": False}
    axes.set_xticks(range(len(tokens)), labels, **style)
    axes.set_yticks(range(len(tokens)), labels, **style)
    if max(map(len, labels)) > 2:
        axes.tick_params(axis="x", rotation=90)


def show(model, tokenizer, ids, kind, path):
    """Print the likeliest tokens after ids or, for kind "attention", save a picture at path.

    ids: a list that fits the model's block_size. Raises ValueError for another kind.
    """
    if kind == "":
        print(f"next token after {tokenizer.decode(ids[-60:])!r}, at temperature 1:")
        print(bars(next_probabilities(model, ids), tokenizer))
    elif kind == "attention":
        needed("matplotlib", "--show=attention")
        tokens = [token_text(tokenizer, token) for token in ids]
        attention_figure(attention_weights(model, ids), tokens).savefig(path)
        print(f"wrote {path}")
    else:
        raise ValueError(
            f"show is {kind!r}: it must be attention, or empty for the next token; give the prompt "
            "with --prompt"
        )


# ---- As a script ----
def draw_run(folder):
    """Draw loss.png from the log.jsonl of a run's folder. Raises ValueError, FileNotFoundError."""
    needed("matplotlib", "loss.png")
    out = Path(folder).expanduser()
    log = out / "log.jsonl"
    if not log.is_file():
        raise FileNotFoundError(
            f"{log} does not exist: name a run's folder, such as out/shakespeare"
        )
    picture = out / "loss.png"
    loss_figure(read_log(log), out.resolve().name).savefig(picture)
    print(f"wrote {picture}")


def main():
    words = sys.argv[1:]
    if words in (["-h"], ["--help"]):
        print(__doc__.strip())
        return
    try:
        if len(words) != 1:
            raise ValueError(f"got {len(words)} arguments: name exactly one run's folder")
        draw_run(words[0])
    except (ValueError, OSError) as e:
        print("error:", e, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
