"""Data sets: the files on disk, and batches that depend on (seed, step) alone."""

import hashlib
import itertools
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

import gpt

BLOCK = 8


def write_tokens(folder, n_train, n_val, vocab_size=None, dtype="uint16"):
    """Write a data set whose token i of a split is i, so that a batch shows its positions."""
    folder.mkdir(parents=True)
    letter = "H" if dtype == "uint16" else "I"
    for split, n in (("train", n_train), ("val", n_val)):
        (folder / f"{split}.bin").write_bytes(struct.pack(f"<{n}{letter}", *range(n)))
    meta = {
        "source": "tests",
        "sha256": "",
        "dtype": dtype,
        "vocab_size": vocab_size or max(n_train, n_val),
        "tokenizer": {"kind": "char", "chars": "ab"},
        "train_tokens": n_train,
        "val_tokens": n_val,
        "train_bytes": n_train,
        "val_bytes": n_val,
    }
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return folder


@pytest.fixture
def counted(tmp_path):
    """A data set of 203 training and 51 validation tokens, each token its own position."""
    return gpt.Data(write_tokens(tmp_path / "counted", 203, 51), BLOCK)


class WideTokenizer:
    """A tokenizer with more ids than two bytes can hold."""

    def __init__(self, vocab_size):
        self.vocab_size, self.state = vocab_size, {"kind": "wide", "chars": ""}

    def encode(self, text):
        """Return the last ids of the vocabulary."""
        return [self.vocab_size - 1 - i for i in range(len(text))]


def test_files_and_meta_of_a_small_text(tmp_path):
    """Twenty characters become 18 and 2 little-endian uint16, and the meta counts tokens and bytes."""
    text = "abcabcabcabcabcabcé\n"
    meta = gpt.write_dataset(tmp_path / "new" / "toy", text, gpt.Tokenizer("char", "\nabcé"), "hand")
    folder = tmp_path / "new" / "toy"
    assert sorted(p.name for p in folder.iterdir()) == ["meta.json", "train.bin", "val.bin"]
    assert (folder / "train.bin").read_bytes() == b"\1\0\2\0\3\0" * 6
    assert (folder / "val.bin").read_bytes() == b"\4\0\0\0"
    assert meta == json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    assert meta == {
        "source": "hand",
        "sha256": hashlib.sha256(text.encode("utf-8")).hexdigest(),
        "dtype": "uint16",
        "vocab_size": 5,
        "tokenizer": {"kind": "char", "chars": "\nabcé"},
        "train_tokens": 18,
        "val_tokens": 2,
        "train_bytes": 18,
        "val_bytes": 3,
    }


@pytest.mark.parametrize(("vocab_size", "dtype", "letter"), [(65536, "uint16", "H"), (65537, "uint32", "I")])
def test_a_large_vocabulary_takes_four_bytes(tmp_path, vocab_size, dtype, letter):
    """Up to 65,536 ids fit two bytes; one more takes four."""
    meta = gpt.write_dataset(tmp_path, "x" * 10, WideTokenizer(vocab_size), "tests")
    assert (meta["dtype"], meta["train_tokens"], meta["val_tokens"]) == (dtype, 9, 1)
    last = vocab_size - 1
    train, val = ((tmp_path / f"{split}.bin").read_bytes() for split in ("train", "val"))
    assert struct.unpack(f"<9{letter}", train) == tuple(range(last, last - 9, -1))
    assert struct.unpack(f"<{letter}", val) == (last,)


def test_the_split_of_tiny_shakespeare(tmp_path):
    """A text of 1,115,394 characters is split into 1,003,854 and 111,540."""
    meta = gpt.write_dataset(tmp_path, "ab" * (1_115_394 // 2), gpt.Tokenizer("char", "ab"), "tests")
    assert (meta["train_tokens"], meta["val_tokens"]) == (1_003_854, 111_540)
    assert (tmp_path / "train.bin").stat().st_size == 2 * 1_003_854


def test_val_fraction_moves_the_split(tmp_path):
    """A quarter of eight characters is two."""
    meta = gpt.write_dataset(tmp_path, "abababab", gpt.Tokenizer("char", "ab"), "tests", val_fraction=0.25)
    assert (meta["train_tokens"], meta["val_tokens"]) == (6, 2)


def test_a_data_set_half_written_is_none(tmp_path):
    """Where writing fails, no meta.json says that the folder is whole, even if an older one did."""
    gpt.write_dataset(tmp_path, "ab" * 20, gpt.Tokenizer("char", "ab"), "tests")
    with pytest.raises(ValueError, match="'z'"):
        gpt.write_dataset(tmp_path, "ab" * 20 + "z", gpt.Tokenizer("char", "ab"), "tests")
    assert not (tmp_path / "meta.json").exists()


def test_gather_shifts_targets_by_one_and_marks_the_end():
    """Inputs past the end are 0, targets -1."""
    x, y = gpt.gather(np.array([5, 6, 7, 8, 9], dtype=np.uint16), [0, 3, 9], 3)
    assert x.tolist() == [[5, 6, 7], [8, 9, 0], [0, 0, 0]]
    assert y.tolist() == [[6, 7, 8], [9, -1, -1], [-1, -1, -1]]
    assert x.dtype == y.dtype == torch.int64


def test_gather_keeps_ids_of_four_bytes():
    """An id above 65,535 arrives unchanged."""
    x, y = gpt.gather(np.array([70000, 199997, 4_000_000_000], dtype=np.uint32), [0], 2)
    assert (x.tolist(), y.tolist()) == ([[70000, 199997]], [[199997, 4_000_000_000]])


def test_targets_of_a_training_batch_are_the_next_tokens(counted):
    """In a data set whose tokens are their positions, y is x + 1 and rows are consecutive."""
    x, y = counted.get_batch("train", 0, 6)
    assert x.shape == y.shape == (6, BLOCK)
    assert torch.equal(y, x + 1)
    assert torch.equal(x - x[:, :1], torch.arange(BLOCK).expand(6, BLOCK))


@pytest.mark.parametrize("n_tokens", [9, 10, 16, 17, 24, 25, 203, 1000, 1001])
def test_the_windows_of_an_epoch(n_tokens):
    """Windows lie side by side inside the file, each once, and leave out less than two blocks."""
    for epoch in range(30):
        starts = gpt.epoch_starts(n_tokens, BLOCK, 7, epoch).tolist()
        assert len(set(starts)) == len(starts) >= max(1, n_tokens // BLOCK - 2)
        ordered = sorted(starts)
        assert all(b - a == BLOCK for a, b in itertools.pairwise(ordered))
        assert ordered[0] >= 0
        assert ordered[-1] + BLOCK <= n_tokens - 1
        assert n_tokens - BLOCK * len(starts) <= 2 * BLOCK


def test_every_offset_occurs():
    """Over the epochs the windows take every place there is room for, the ends of the file included."""
    ordered = [sorted(gpt.epoch_starts(33, BLOCK, 7, epoch).tolist()) for epoch in range(300)]
    assert {starts[0] for starts in ordered} == set(range(33 - 3 * BLOCK))
    assert max(starts[-1] for starts in ordered) + BLOCK == 32


def test_epochs_and_seeds_differ():
    """Another epoch or seed has another order; the same ones have the same."""
    orders = [tuple(gpt.epoch_starts(1000, BLOCK, seed, epoch)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9
    assert any(list(order) != sorted(order) for order in orders)
    gpt.epoch_starts.cache_clear()
    assert tuple(gpt.epoch_starts(1000, BLOCK, 0, 0)) == orders[0]


def test_an_epoch_of_batches_repeats_no_token(counted, monkeypatch):
    """203 tokens hold 24 windows: 12 batches of 2 are all different, and the next epoch begins anew."""
    monkeypatch.setattr(gpt, "seed", 3)
    batches = [counted.get_batch("train", step, 2)[0] for step in range(24)]
    epochs = torch.cat(batches[:12]), torch.cat(batches[12:])
    for epoch in epochs:
        assert len(set(epoch.flatten().tolist())) == 24 * BLOCK
    assert not torch.equal(*epochs)


def test_batches_depend_on_seed_and_step_alone(counted, tmp_path, monkeypatch):
    """The order of calls, the epoch drawn before and another Data object change nothing."""
    monkeypatch.setattr(gpt, "seed", 3)
    forward = [counted.get_batch("train", step, 5)[0] for step in range(20)]
    torch.manual_seed(99)
    np.random.seed(99)
    again = gpt.Data(counted.folder, BLOCK)
    backward = [again.get_batch("train", step, 5)[0] for step in reversed(range(20))]
    assert all(torch.equal(a, b) for a, b in zip(forward, reversed(backward)))
    monkeypatch.setattr(gpt, "seed", 4)
    assert not torch.equal(counted.get_batch("train", 0, 5)[0], forward[0])


def test_a_large_batch_is_the_small_ones_in_a_row(counted):
    """Batch size 16 at step 0 is batch size 4 at steps 0 to 3, and so on, over the end of an epoch."""
    for large in range(3):
        x, y = counted.get_batch("train", large, 16)
        parts = [counted.get_batch("train", 4 * large + i, 4) for i in range(4)]
        assert torch.equal(x, torch.cat([part[0] for part in parts]))
        assert torch.equal(y, torch.cat([part[1] for part in parts]))


@pytest.mark.parametrize("n_val", [9, 16, 17, 25, 51, 64, 65, 66])
@pytest.mark.parametrize("rows", [1, 3])
def test_validation_batches_hold_every_target_once(tmp_path, monkeypatch, n_val, rows):
    """In order, the targets are tokens 1 to the last, each after its own input; the rest is marked -1."""
    monkeypatch.setattr(gpt, "batch_size", rows)
    data = gpt.Data(write_tokens(tmp_path / "v", 100, n_val), BLOCK)
    batches = [data.get_batch("val", i, rows) for i in range(data.n_val_batches())]
    x, y = (torch.cat([batch[i] for batch in batches]).flatten() for i in (0, 1))
    assert y[y >= 0].tolist() == list(range(1, n_val))
    assert x[y >= 0].tolist() == list(range(n_val - 1))
    assert (batches[-1][1] >= 0).any()
    assert set(y[n_val - 1 :].tolist()) <= {-1}


def test_data_reads_either_width(tmp_path):
    """uint32 files give the same batches as uint16 files."""
    narrow = gpt.Data(write_tokens(tmp_path / "n", 100, 50), BLOCK)
    wide = gpt.Data(write_tokens(tmp_path / "w", 100, 50, dtype="uint32"), BLOCK)
    assert (tmp_path / "w" / "train.bin").stat().st_size == 400
    assert torch.equal(narrow.get_batch("train", 2, 3)[1], wide.get_batch("train", 2, 3)[1])


def test_a_missing_data_set_names_the_command(tmp_path):
    """Neither an absent folder nor one without meta.json is a data set."""
    with pytest.raises(FileNotFoundError, match="nothing.*prepare.py --input=FILE --name=nothing"):
        gpt.Data(tmp_path / "nothing", BLOCK)
    folder = write_tokens(tmp_path / "half", 100, 50)
    (folder / "meta.json").unlink()
    with pytest.raises(FileNotFoundError, match="half"):
        gpt.Data(folder, BLOCK)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("n", [0, BLOCK])
def test_too_few_tokens_are_refused(tmp_path, split, n):
    """An empty file, or one that holds no whole window, is named with its count."""
    folder = write_tokens(tmp_path / "short", **{"n_train": 100, "n_val": 50, f"n_{split}": n})
    with pytest.raises(ValueError, match=rf"{split}\.bin holds {n} tokens.*block_size {BLOCK}"):
        gpt.Data(folder, BLOCK)


def test_one_token_more_than_a_block_is_enough(tmp_path):
    """Nine tokens hold one window of eight."""
    data = gpt.Data(write_tokens(tmp_path / "least", BLOCK + 1, BLOCK + 1), BLOCK)
    for split in ("train", "val"):
        x, y = data.get_batch(split, 0, 1)
        assert (x.tolist(), y.tolist()) == ([list(range(8))], [list(range(1, 9))])


def test_a_missing_file_is_refused(tmp_path):
    """meta.json without val.bin is no data set."""
    folder = write_tokens(tmp_path / "gone", 100, 50)
    (folder / "val.bin").unlink()
    with pytest.raises(ValueError, match=r"val\.bin"):
        gpt.Data(folder, BLOCK)


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_id_beyond_the_vocabulary_is_refused(tmp_path, split):
    """The message names the file, the id and vocab_size."""
    folder = write_tokens(tmp_path / "wild", 100, 100, vocab_size=99)
    if split == "val":
        (folder / "train.bin").write_bytes(b"\0\0" * 100)
    with pytest.raises(ValueError, match=rf"{split}\.bin holds id 99, vocab_size is 99"):
        gpt.Data(folder, BLOCK)


@pytest.mark.parametrize("content", ["", '{"dtype": "uint16", ', '{"dtype": "uint16"}'])
def test_a_damaged_meta_json_is_named(tmp_path, content):
    """A meta.json that was cut short or made by something else is a sentence with its path, no KeyError."""
    folder = write_tokens(tmp_path / "odd", 100, 50)
    (folder / "meta.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="odd"):
        gpt.Data(folder, BLOCK)


def test_preparing_again_does_not_disturb_a_run_that_has_the_data_mapped(settings):
    """The tokens of an open Data stay what they were."""
    folder = Path(gpt.data_dir) / "toy"
    data = gpt.Data(folder, 16)
    before = np.array(data.tokens["train"])
    gpt.write_dataset(folder, "ab" * 200, gpt.Tokenizer("char", "ab"), "another text")
    assert np.array_equal(data.tokens["train"], before)
    assert set(gpt.Data(folder, 16).tokens["train"]) == {0, 1}
