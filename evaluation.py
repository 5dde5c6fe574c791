"""evaluation.py: a model's loss on a data set's whole validation split, or on any text.

    python gpt.py --eval_only=True --out_dir=out/shakespeare             the run's best.pt
    python gpt.py --eval_only=True --init_from=gpt2 --dataset=NAME       another model, on data in its tokens
    python gpt.py --eval_text=FILE --init_from=gpt2 --eval_stride=512    a text, in overlapping windows
"""
import copy
import tempfile
from pathlib import Path


def text_data(gpt, tokenizer, block_size, folder):
    """Return the Data, written to folder, that has a text file for validation. Raises ValueError."""
    begin = [] if tokenizer.begin is None else [tokenizer.begin]  # is seen, but no target
    begun = copy.copy(tokenizer)
    begun.encode = lambda text: begin + tokenizer.encode(text)
    try:
        text = Path(gpt.eval_text).read_bytes().decode()
        gpt.write_dataset(folder, text, begun, gpt.eval_text, val_fraction=1)
        data = gpt.Data(folder, block_size, gpt.eval_stride, ["val"])
    except (OSError, ValueError) as e:
        raise ValueError(f"eval_text {gpt.eval_text} is unfit ({e}): take UTF-8 of 2 tokens or more") from e
    data.meta["val_tokens"] -= len(begin)
    return data


def evaluate_only(gpt, machine):
    """Return the figures of init_from, or else out_dir/best.pt, on eval_text or the full validation split.

    gpt: the module that asks, gpt.py imported or run, by its settings.
    """
    folder = Path(gpt.dataset) if gpt.eval_text else machine.data_folder()
    best = Path(gpt.out_dir or gpt.HERE / "out" / folder.name) / "best.pt"
    given = gpt.init_from not in ("scratch", "resume")
    path = gpt.init_from if given else best
    model, tokenizer, state = gpt.load_checkpoint(path, machine.device)
    block_size = gpt.block_size if given else state["config"]["block_size"]  # as it was trained
    block_size = min(block_size, model.config.block_size)
    with tempfile.TemporaryDirectory() as made:
        if gpt.eval_text:
            data = text_data(gpt, tokenizer, block_size, Path(made))
        else:
            data = gpt.Data(folder, block_size, gpt.eval_stride, ["val"])
            if data.weighted and gpt.eval_stride:
                raise ValueError(f"eval_stride is {gpt.eval_stride}: examples cannot overlap, leave it 0")
            gpt.check_tokenizer(data, tokenizer)
        loss = gpt.evaluate(model, data, machine, data.n_val_batches())
    title = f"{path}, step {state.get('step', 0):,}, {gpt.eval_text or 'full validation split'}"
    return gpt.final_figures(loss, data, machine, title)
