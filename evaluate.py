"""evaluate.py: measure how well a model predicts a text, or a data set's validation split.

    python evaluate.py --text=FILE --out_dir=out/shakespeare         the run's best.pt on any text
    python evaluate.py --text=FILE --init_from=gpt2 --stride=512     in overlapping windows
    python evaluate.py --dataset=NAME --checkpoint=FILE              the whole validation split
    python evaluate.py --choices=FILE.jsonl --init_from=gpt2         multiple choice, like HellaSwag

A text is read in windows of block_size tokens. Each token counts once. The first tokens of a window
are predicted from little context, so overlapping windows give a lower, and fairer, loss.
"""

import json
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from gpt import (
    Data,
    as_path,
    check_setting,
    check_tokenizer,
    in_words,
    load_checkpoint,
    loss_figures,
    native_bfloat16,
    pick_device,
    read_settings,
    read_text,
)

# ---- Settings: each comment is the help text (python evaluate.py --help) ----
text = ""  # text file to evaluate on
dataset = ""  # instead of a text: a data set, whose validation split is used
choices = ""  # instead of a text: a .jsonl of multiple-choice questions (ctx, endings, label)
data_dir = ""  # folder of all data sets; empty: data/ beside evaluate.py
out_dir = ""  # folder of the run whose best.pt is evaluated; empty: out/<dataset>
checkpoint = ""  # instead of a run: a checkpoint file
init_from = ""  # instead of a run: a Hugging Face folder or id, such as gpt2, or a checkpoint
stride = 0  # tokens from the start of one window to that of the next; 0: block_size, no overlap
block_size = 2048  # longest window in tokens; a model with a shorter context uses its own length
batch_size = 8  # number of windows computed together
device = "auto"  # auto: the GPU that torch finds, else cpu | any torch device
dtype = "auto"  # of matrix products; auto: bfloat16 where the hardware has it | float32 | bfloat16

SETTINGS = read_settings(Path(__file__).read_text(encoding="utf-8-sig"))
HERE = Path(__file__).resolve().parent


# ---- Windows ----
def window_batches(tokens, block_size, stride, batch_size):
    """Yield the batches of all windows: inputs, targets (rows, block_size) and their weights.

    A target has weight 1 in the first window that holds it, and 0 in later ones. Past the end of
    the tokens, the weights are also 0.

    tokens: the ids, in an array or in something that can be indexed with one.
    stride: tokens from the start of one window to that of the next; 0: block_size.
    """
    n = len(tokens)
    block_size = min(block_size, n - 1)
    stride = min(stride or block_size, block_size)
    n_seen = block_size - stride  # targets that the previous window already had
    starts = np.arange(0, n - 1 - n_seen, stride)
    for i in range(0, len(starts), batch_size):
        rows = starts[i : i + batch_size]
        positions = rows[:, None] + np.arange(block_size + 1)
        inside = positions < n
        ids = tokens[np.minimum(positions, n - 1)].astype(np.int64)
        weights = inside[:, 1:].astype(np.float32)
        weights[rows > 0, :n_seen] = 0
        yield tuple(map(torch.from_numpy, (ids[:, :-1], ids[:, 1:], weights)))


def example_batches(data, batch_size):
    """Yield the batches of a validation split whose rows are examples, which cannot overlap."""
    for first_row in range(0, len(data.starts["val"]), batch_size):
        yield data.get_batch("val", first_row, batch_size)


# ---- Figures ----
@torch.no_grad()
def mean_loss(model, batches, dtype=torch.float32):
    """Return the weighted mean of all targets' losses, in nats."""
    device = model.ln_f.weight.device
    nats = 0.0
    total = 0.0
    model.eval()
    for batch in batches:
        x, y, w = (tensor.to(device) for tensor in batch)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            _, loss = model(x, y, weights=w, loss_only=True)
        weight = float(w.sum())
        nats += float(loss) * weight
        total += weight
    return nats / total


def evaluate_text(
    model, tokenizer, text, block_size=None, stride=0, batch_size=8, dtype=torch.float32
):
    """Return the figures of a model on a text: loss, perplexity, bits_per_byte, tokens.

    A tokenizer's begin token is the first input but not a target. Without one, the text's first
    token is not a target, since nothing precedes it.

    block_size: the length of a window in tokens; None: the model's own.
    stride: tokens from the start of one window to that of the next; 0: block_size.
    dtype: of matrix products.
    Raises ValueError for a text without a token to predict, or with an unknown character.
    """
    ids = tokenizer.encode(text)
    begin = [] if tokenizer.begin_id is None else [tokenizer.begin_id]
    tokens = np.array([*begin, *ids], dtype=np.int64)
    if len(tokens) < 2:
        raise ValueError("the text has fewer than 2 tokens, so none can be predicted")
    block_size = block_size or model.config.block_size
    batches = window_batches(tokens, block_size, stride, batch_size)
    return loss_figures(mean_loss(model, batches, dtype), len(ids), len(text.encode()))


def evaluate_dataset(
    model, tokenizer, folder, block_size=None, stride=0, batch_size=8, dtype=torch.float32
):
    """Return the figures of a model on a data set's whole validation split, as evaluate_text does.

    If the targets have weights, as with prompts and responses, there is no bits_per_byte.
    Raises ValueError if the data set has a different tokenizer, or if a stride would cut examples.
    """
    data = Data(folder, block_size or model.config.block_size, splits=("val",))
    check_tokenizer(data, tokenizer)
    n_tokens = data.meta["val_tokens"]
    if not data.weighted:
        tokens = data.tokens["val"]
        batches = window_batches(tokens, data.block_size, stride, batch_size)
        return loss_figures(mean_loss(model, batches, dtype), n_tokens, data.meta["val_bytes"])
    if stride:
        raise ValueError(f"stride is {stride}: {folder} holds examples, which need stride 0")
    return loss_figures(mean_loss(model, example_batches(data, batch_size), dtype), n_tokens)


# ---- Multiple choice ----
def read_choices(path):
    """Yield (context, endings, number of the right ending) for each line of a .jsonl file.

    The keys are ctx, endings and label. Where HellaSwag's keys activity_label, ctx_a and ctx_b
    exist, the text is put together as in lm-evaluation-harness. Raises ValueError for a bad line.
    """
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            context, endings, label = row.get("ctx", ""), row["endings"], int(row["label"])
            if {"activity_label", "ctx_a", "ctx_b"} <= row.keys():
                context = f"{row['ctx_a']} {row['ctx_b'].capitalize()}"
                context = without_marks(f"{row['activity_label']}: {context}")
                endings = [without_marks(ending) for ending in endings]
            if not context.strip() or not all(endings) or not 0 <= label < len(endings):
                raise ValueError("a part is empty, or label is not the number of an ending")
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise ValueError(
                f"{path}, line {number} is not a question ({type(e).__name__}: {e}): it needs "
                "ctx (a text), endings (a list) and label (the number of the right ending)"
            ) from e
        yield context, endings, label


def without_marks(text):
    """Return one of HellaSwag's texts without what is left of WikiHow's markup."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def encode_choice(tokenizer, context, ending, block_size):
    """Return (the ids of a context and its ending, how many of them belong to the ending).

    A space joins the two. If they are longer than the model's context, the beginning is cut off.
    """
    before = tokenizer.encode(context.rstrip())
    ids = tokenizer.encode(f"{context.rstrip()} {ending}")
    n_ending = len(ids) - len(before)
    begin = [] if tokenizer.begin_id is None else [tokenizer.begin_id]
    return [*begin, *ids][-(block_size + 1) :], n_ending


@torch.no_grad()
def ending_log_probs(model, encoded, batch_size, dtype=torch.float32):
    """Return the log-probability of each ending in nats. encoded: what encode_choice returns."""
    device = model.ln_f.weight.device
    model.eval()
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i][0]))  # little padding
    found = [0.0] * len(encoded)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        ids = [torch.tensor(encoded[i][0]) for i in rows]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits, _ = model(padded[:, :-1])
        losses = F.cross_entropy(logits.float().mT, padded[:, 1:], reduction="none")
        for i, row in zip(rows, losses):
            end = len(encoded[i][0]) - 1
            found[i] = -float(row[max(0, end - encoded[i][1]) : end].sum())
    return found


def evaluate_choices(model, tokenizer, path, batch_size=8, dtype=torch.float32):
    """Return the figures of a model on multiple-choice questions: acc, acc_norm, questions.

    acc: the share of questions whose right ending has the highest log-probability. acc_norm: the
    same, with each log-probability divided by the ending's number of characters. Raises ValueError
    for a file that holds no such questions.
    """
    questions = list(read_choices(path))
    if not questions:
        raise ValueError(f"{path} is empty: give a file of questions")
    block_size = model.config.block_size
    encoded = []
    for context, endings, _ in questions:
        for ending in endings:
            encoded.append(encode_choice(tokenizer, context, ending, block_size))
    log_probs = iter(ending_log_probs(model, encoded, batch_size, dtype))
    n_right = {"acc": 0, "acc_norm": 0}
    for _, endings, label in questions:
        scores = np.array([next(log_probs) for _ in endings])
        n_right["acc"] += int(scores.argmax() == label)
        n_right["acc_norm"] += int((scores / [len(text) for text in endings]).argmax() == label)
    n = len(questions)
    return {name: count / n for name, count in n_right.items()} | {"questions": n}


# ---- Main ----
def read_model(source):
    """Return (model, tokenizer, checkpoint) of a checkpoint or of a Hugging Face folder or id."""
    path = as_path(source)
    if path.is_file() or path.suffix == ".pt" or (path / "best.pt").is_file():
        return load_checkpoint(path)
    from hub import load_pretrained

    return load_pretrained(source)


def pick_dtype(name, device):
    """Return the torch.dtype that the setting `dtype` names, for matrix products."""
    if name == "bfloat16" or (name == "auto" and native_bfloat16(device)):
        return torch.bfloat16
    return torch.float32


def check_settings():
    """Raise ValueError for the first setting that is not valid."""
    if (text != "") + (dataset != "") + (choices != "") != 1:
        raise ValueError(
            "name what to evaluate on, with one of --text=FILE, --dataset=NAME or --choices=FILE"
        )
    if not dataset and not (checkpoint or init_from or out_dir):
        raise ValueError("name a model, with --out_dir=RUN, --checkpoint=FILE or --init_from=ID")
    if dtype not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"dtype is {dtype!r}: it must be auto, float32 or bfloat16")
    if stride < 0:
        raise ValueError(f"stride is {stride}: it must be at least 0")
    if choices and stride:
        raise ValueError(f"stride is {stride}, but --choices has no windows: leave out --stride")
    for name, value in (("block_size", block_size), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}: it must be at least 1")


def main():
    check_settings()
    chosen = pick_device(device)
    source = checkpoint or init_from or as_path(out_dir or HERE / "out" / dataset) / "best.pt"
    model, tokenizer, _ = read_model(source)
    model.to(chosen)
    length = min(block_size, model.config.block_size)
    windows = (length, stride, batch_size, pick_dtype(dtype, chosen))
    if choices:
        figures = evaluate_choices(model, tokenizer, as_path(choices), batch_size, windows[-1])
        shares = f"acc {figures['acc']:.4f}, acc_norm {figures['acc_norm']:.4f}"
        print(f"{source}, {choices}, {figures['questions']:,} questions: {shares}")
        return
    if text:
        figures = evaluate_text(model, tokenizer, read_text(text), *windows)
    else:
        folder = as_path(data_dir or HERE / "data") / dataset
        figures = evaluate_dataset(model, tokenizer, folder, *windows)
    print(f"{source}, {text or dataset}, {figures['tokens']:,} tokens: {in_words(figures)}")


if __name__ == "__main__":
    from configurator import run_script

    run_script(globals(), main, SETTINGS, check_setting)
