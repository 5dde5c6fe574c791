"""evaluation.py: a model's loss on a data set's whole validation split, or on any text.

python gpt.py --eval_only=True --out_dir=out/shakespeare             the run's best.pt
python gpt.py --eval_only=True --init_from=gpt2 --dataset=NAME       another model, on data in its tokens
python gpt.py --eval_text=FILE --init_from=gpt2 --eval_stride=512    a text, in overlapping windows
"""

import copy
import signal
import tempfile
from pathlib import Path

from resume import check_tokenizer


def overlap(data, stride):
    """Let data's validation windows, of block_size, begin every `stride` tokens; each target counts once."""
    if not stride or stride >= data.block_size:
        return
    if data.weighted:
        raise ValueError(f"eval_stride is {stride}: examples cannot overlap, leave it 0")
    n, get_batch = data.meta["val_tokens"], data.get_batch
    data.starts["val"] = range(0, max(1, n - 1 - data.block_size + stride), stride)

    def overlapping(split, step, batch_size):
        x, y, w = get_batch(split, step, batch_size)
        seen = data.block_size - stride  # targets that the window before had
        w[int(step == 0) :, :seen] = 0
        return x, y, w

    data.get_batch = overlapping


def text_data(gpt, tokenizer, block_size, folder):
    """Return the Data, written to folder, that has a text file for validation. Raises ValueError."""
    begin = [] if tokenizer.begin is None else [tokenizer.begin]  # is seen, but no target
    begun = copy.copy(tokenizer)
    begun.encode = lambda text: begin + tokenizer.encode(text)
    try:
        text = Path(gpt.eval_text).read_bytes().decode()
        gpt.write_dataset(folder, text, begun, gpt.eval_text, val_fraction=1)
        data = gpt.Data(folder, block_size, ["val"])
    except (OSError, ValueError) as e:
        raise ValueError(
            f"eval_text {gpt.eval_text} is unfit ({e}): take UTF-8 of 2 tokens or more"
        ) from e
    overlap(data, gpt.eval_stride)
    data.meta["val_tokens"] -= len(begin)
    return data


def evaluate_only(gpt, machine):
    """Return the figures of init_from, or else out_dir/best.pt, on eval_text or the full validation split."""
    folder = (
        Path(gpt.dataset) if gpt.eval_text else machine.first(gpt.prepare_if_missing, gpt.dataset)
    )
    best = Path(gpt.out_dir or gpt.HERE / "out" / folder.name) / "best.pt"
    given = gpt.init_from not in ("scratch", "resume", "auto")
    path = gpt.init_from if given else best
    model, tokenizer, state = gpt.load_checkpoint(path, machine.device)
    block_size = gpt.block_size if given else state["config"]["block_size"]  # as it was trained
    block_size = min(block_size, model.config.block_size)
    with tempfile.TemporaryDirectory() as made:
        if gpt.eval_text:
            data = text_data(gpt, tokenizer, block_size, Path(made))
        else:
            data = gpt.Data(folder, block_size, ["val"])
            overlap(data, gpt.eval_stride)
            check_tokenizer(data, tokenizer)
        loss = gpt.evaluate(model, data, machine, data.n_val_batches())
    if loss is None:
        return {"stopped_by": (machine.caught or [signal.SIGTERM])[0]}
    title = f"{path}, step {state.get('step', 0):,}, {gpt.eval_text or 'full validation split'}"
    return gpt.final_figures(loss, data, machine, title)


def without_training(gpt, machine):
    """Evaluate, or plan a run, as the settings say; return the figures.

    gpt: the module that asks, gpt.py imported or run, by its settings.
    """
    if gpt.eval_only or gpt.eval_text:
        return evaluate_only(gpt, machine)
    from scaling import dry_run

    return dry_run(gpt, machine)
