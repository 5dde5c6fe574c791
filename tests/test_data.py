"""Data sets: the files on disk, weights, and batches that depend on (seed, first row) alone."""

import hashlib
import itertools
import json
import random
import struct
import subprocess
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
        self.vocab_size = vocab_size
        self.state = {"kind": "wide", "chars": ""}
        self.begin_id = None

    def encode(self, text):
        """Return the last ids of the vocabulary."""
        return [self.vocab_size - 1 - i for i in range(len(text))]


def test_files_and_meta_of_a_small_text(tmp_path):
    """Twenty characters become 18 and 2 little-endian uint16; the meta counts tokens and bytes."""
    text = "abcabcabcabcabcabcé\n"
    meta = gpt.write_dataset(
        tmp_path / "new" / "toy", text, gpt.Tokenizer("char", "\nabcé"), "hand"
    )
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
        "tokenizer": gpt.Tokenizer("char", "\nabcé").state,
        "train_tokens": 18,
        "val_tokens": 2,
        "train_bytes": 18,
        "val_bytes": 3,
    }


@pytest.mark.parametrize(
    ("vocab_size", "dtype", "letter"), [(65536, "uint16", "H"), (65537, "uint32", "I")]
)
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
    meta = gpt.write_dataset(
        tmp_path, "ab" * (1_115_394 // 2), gpt.Tokenizer("char", "ab"), "tests"
    )
    assert (meta["train_tokens"], meta["val_tokens"]) == (1_003_854, 111_540)
    assert (tmp_path / "train.bin").stat().st_size == 2 * 1_003_854


def test_val_fraction_moves_the_split(tmp_path):
    """A quarter of eight characters is two."""
    meta = gpt.write_dataset(
        tmp_path, "abababab", gpt.Tokenizer("char", "ab"), "tests", val_fraction=0.25
    )
    assert (meta["train_tokens"], meta["val_tokens"]) == (6, 2)


def test_older_token_files_are_removed(tmp_path):
    """Token files of an earlier data set do not get mixed with the new one; other files stay."""
    old = ("train_0000", "train_0001", "val", "val_0000", "train.weight", "val.weight_0000", "test")
    for name in old:
        (tmp_path / f"{name}.bin").write_bytes(b"\1\0" * 50)
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    gpt.write_dataset(tmp_path, "ab" * 50, gpt.Tokenizer("char", "ab"), "tests")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "meta.json",
        "notes.txt",
        "train.bin",
        "val.bin",
    ]
    x, _, w = gpt.Data(tmp_path, BLOCK).get_batch("val", 0, 1)
    assert (x.tolist(), w.tolist()) == ([[0, 1] * 4], [[1.0] * 8])


def test_a_data_set_half_written_is_none(tmp_path):
    """Where writing fails, no meta.json says that the folder is whole, even if an older one did."""
    gpt.write_dataset(tmp_path, "ab" * 20, gpt.Tokenizer("char", "ab"), "tests")
    with pytest.raises(ValueError, match="'z'"):
        gpt.write_dataset(tmp_path, "ab" * 20 + "z", gpt.Tokenizer("char", "ab"), "tests")
    assert not (tmp_path / "meta.json").exists()


def test_a_batch_past_the_end(tmp_path):
    """Inputs past the end are 0, targets -1, weights 0; targets are the tokens after the inputs."""
    data = gpt.Data(write_tokens(tmp_path / "d", 100, 12), BLOCK)
    x, y, w = data.get_batch("val", 0, 3)
    assert x.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 0, 0, 0, 0], [0] * 8]
    assert y.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 11, -1, -1, -1, -1, -1], [-1] * 8]
    assert w.tolist() == [[1.0] * 8, [1.0] * 3 + [0.0] * 5, [0.0] * 8]
    assert (x.dtype, y.dtype, w.dtype) == (torch.int64, torch.int64, torch.float32)


def test_ids_of_four_bytes_arrive_unchanged(tmp_path):
    """Ids above 65,535, and above 2^31, are what the file holds."""
    ids = [70_000, 199_997, 4_000_000_000]
    folder = write_tokens(tmp_path / "d", 3, 3, vocab_size=2**32, dtype="uint32")
    for split in ("train", "val"):
        (folder / f"{split}.bin").write_bytes(struct.pack("<3I", *ids))
        x, y, _ = gpt.Data(folder, 2).get_batch(split, 0, 1)
        assert (x.tolist(), y.tolist()) == ([ids[:2]], [ids[1:]])


def test_targets_of_a_training_batch_are_the_next_tokens(counted):
    """In a data set whose tokens are their positions, y is x + 1; all targets weigh 1."""
    x, y, w = counted.get_batch("train", 0, 6)
    assert x.shape == y.shape == w.shape == (6, BLOCK)
    assert torch.equal(y, x + 1)
    assert torch.equal(x - x[:, :1], torch.arange(BLOCK).expand(6, BLOCK))
    assert torch.equal(w, torch.ones(6, BLOCK))


def window_starts(data, n_tokens, epoch):
    """Return an epoch's window starts: one for each whole window but the last, and at least one."""
    n = max(1, (n_tokens - 1) // BLOCK - 1)
    return [data.row_start("train", row) for row in range(epoch * n, (epoch + 1) * n)]


@pytest.mark.parametrize("n_tokens", [9, 10, 16, 17, 24, 25, 203, 1000, 1001])
def test_the_windows_of_an_epoch(tmp_path, n_tokens):
    """Windows lie side by side inside the file, each once, and leave out less than two blocks."""
    data = gpt.Data(write_tokens(tmp_path / "d", n_tokens, 50), BLOCK)
    for epoch in range(30):
        starts = window_starts(data, n_tokens, epoch)
        assert len(set(starts)) == len(starts) >= max(1, n_tokens // BLOCK - 2)
        ordered = sorted(starts)
        assert all(b - a == BLOCK for a, b in itertools.pairwise(ordered))
        assert ordered[0] >= 0
        assert ordered[-1] + BLOCK <= n_tokens - 1
        assert n_tokens - BLOCK * len(starts) <= 2 * BLOCK


def test_every_offset_occurs(tmp_path):
    """Over the epochs the windows take every place there is room for, the file's ends too."""
    data = gpt.Data(write_tokens(tmp_path / "d", 33, 50), BLOCK)
    ordered = [sorted(window_starts(data, 33, epoch)) for epoch in range(300)]
    assert {starts[0] for starts in ordered} == set(range(33 - 3 * BLOCK))
    assert max(starts[-1] for starts in ordered) + BLOCK == 32


def test_epochs_and_seeds_differ(tmp_path):
    """Another epoch or seed has another order; the same ones have the same, in any sequence."""
    folder = write_tokens(tmp_path / "d", 1000, 50)
    drawn = {}
    for seed in range(3):
        data = gpt.Data(folder, BLOCK, seed)
        for epoch in range(3):
            drawn[seed, epoch] = tuple(window_starts(data, 1000, epoch))
    orders = [tuple(start - min(starts) for start in starts) for starts in drawn.values()]
    assert len(set(orders)) == 9 and len({frozenset(order) for order in orders}) == 1
    assert len({min(starts) for starts in drawn.values()}) > 3  # the offsets
    data = gpt.Data(folder, BLOCK, 1)
    for epoch in (2, 0, 1, 0, 2):
        assert tuple(window_starts(data, 1000, epoch)) == drawn[1, epoch]
    assert len(data.orders) <= 2


@pytest.mark.parametrize("sizes", [[2] * 12, [1, 2, 3, 4, 5, 6, 3], [5, 5, 4, 4, 3, 2, 1]], ids=str)
def test_an_epoch_of_batches_repeats_no_token(counted, sizes):
    """The 24 windows of 203 tokens are all different, and the next epoch begins anew.

    The sizes of the batches may change within the epoch, as they do when a run is resumed with
    another batch_size.
    """
    sizes = [*sizes, *sizes]
    first_rows = itertools.accumulate([0, *sizes[:-1]])
    batches = [counted.get_batch("train", row, n)[0] for row, n in zip(first_rows, sizes)]
    epochs = torch.cat(batches).split(24)
    for epoch in epochs:
        assert len(set(epoch.flatten().tolist())) == 24 * BLOCK
    assert not torch.equal(*epochs)


def test_batches_depend_on_seed_and_row_alone(counted):
    """The order of calls, the epoch drawn before and another Data object change nothing."""
    forward = [counted.get_batch("train", row, 5)[0] for row in range(0, 100, 5)]
    torch.manual_seed(99)
    np.random.seed(99)
    again = gpt.Data(counted.folder, BLOCK, 1337)
    backward = [again.get_batch("train", row, 5)[0] for row in range(95, -1, -5)]
    assert all(torch.equal(a, b) for a, b in zip(forward, reversed(backward)))
    other = gpt.Data(counted.folder, BLOCK, 4)
    assert not torch.equal(other.get_batch("train", 0, 5)[0], forward[0])


def test_a_large_batch_is_the_small_ones_in_a_row(counted):
    """A batch of 16 rows is four of 4 rows, and so on, over the end of an epoch."""
    for first in (0, 16, 32):
        whole = counted.get_batch("train", first, 16)
        parts = [counted.get_batch("train", first + row, 4) for row in (0, 4, 8, 12)]
        for i in range(3):
            assert torch.equal(whole[i], torch.cat([part[i] for part in parts]))


@pytest.mark.parametrize("n_val", [9, 16, 17, 25, 51, 64, 65, 66])
@pytest.mark.parametrize("rows", [1, 3])
def test_validation_batches_hold_every_target_once(tmp_path, n_val, rows):
    """In order, the targets are tokens 1 to the last, each after its input; the rest weighs 0."""
    data = gpt.Data(write_tokens(tmp_path / "v", 100, n_val), BLOCK)
    batches = [data.get_batch("val", i * rows, rows) for i in range(data.n_val_batches(rows))]
    x, y, w = (torch.cat([batch[i] for batch in batches]).flatten() for i in range(3))
    assert y[y >= 0].tolist() == list(range(1, n_val))
    assert x[y >= 0].tolist() == list(range(n_val - 1))
    assert (batches[-1][1] >= 0).any()
    assert set(y[n_val - 1 :].tolist()) <= {-1}
    assert torch.equal(w, (y >= 0).float())


def test_data_reads_either_width(tmp_path):
    """uint32 files give the same batches as uint16 files."""
    narrow = gpt.Data(write_tokens(tmp_path / "n", 100, 50), BLOCK)
    wide = gpt.Data(write_tokens(tmp_path / "w", 100, 50, dtype="uint32"), BLOCK)
    assert (tmp_path / "w" / "train.bin").stat().st_size == 400
    assert torch.equal(narrow.get_batch("train", 6, 3)[1], wide.get_batch("train", 6, 3)[1])


def test_a_missing_data_set_names_the_command(tmp_path):
    """Neither an absent folder nor one without meta.json is a data set."""
    with pytest.raises(FileNotFoundError, match="nothing.*prepare.py --input=FILE --name=nothing"):
        gpt.Data(tmp_path / "nothing", BLOCK)
    folder = write_tokens(tmp_path / "half", 100, 50)
    (folder / "meta.json").unlink()
    with pytest.raises(FileNotFoundError, match="half"):
        gpt.Data(folder, BLOCK)


@pytest.mark.parametrize("n", [0, 1, BLOCK])
def test_a_training_split_without_a_window_is_refused(tmp_path, n):
    folder = write_tokens(tmp_path / "short", n, 50)
    with pytest.raises(ValueError, match=f"short holds {n} tokens for train.*block_size {BLOCK}"):
        gpt.Data(folder, BLOCK)


@pytest.mark.parametrize("n", [0, 1])
def test_a_validation_split_without_a_target_is_refused(tmp_path, n):
    """Another block_size would not help, so that the remedy names the data set's own setting."""
    folder = write_tokens(tmp_path / "short", 100, n)
    with pytest.raises(ValueError, match=f"short holds {n} tokens for val.*--val_fraction") as e:
        gpt.Data(folder, BLOCK)
    assert "block_size" not in str(e.value)


def test_one_token_more_than_a_block_is_enough(tmp_path):
    """Nine tokens hold one window of eight."""
    data = gpt.Data(write_tokens(tmp_path / "least", BLOCK + 1, BLOCK + 1), BLOCK)
    for split in ("train", "val"):
        x, y, w = data.get_batch(split, 0, 1)
        assert (x.tolist(), y.tolist()) == ([list(range(8))], [list(range(1, 9))])
        assert w.tolist() == [[1.0] * 8]


def test_a_missing_file_is_refused(tmp_path):
    """meta.json without val.bin is no data set."""
    folder = write_tokens(tmp_path / "gone", 100, 50)
    (folder / "val.bin").unlink()
    with pytest.raises(ValueError, match="gone.val.bin is missing: prepare the data set again"):
        gpt.Data(folder, BLOCK)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("n_bytes", [-2, -1, 2, 20])
def test_a_file_of_another_length_than_meta_says_is_refused(tmp_path, split, n_bytes):
    """A copy that was cut short, or a file that grew, is noticed before anything is read."""
    folder = write_tokens(tmp_path / "cut", 100, 50)
    content = (folder / f"{split}.bin").read_bytes()
    (folder / f"{split}.bin").write_bytes(
        content[:n_bytes] if n_bytes < 0 else content + b"\0" * n_bytes
    )
    with pytest.raises(
        ValueError, match=rf"cut holds .* tokens for {split}, not .*: prepare it again"
    ):
        gpt.Data(folder, BLOCK)


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_id_beyond_the_vocabulary_is_refused(tmp_path, split):
    """The batches that hold one, if only as a target, are refused by its name."""
    folder = write_tokens(tmp_path / "wild", 203, 51, vocab_size=40)
    content = {"train": [0] * 100 + list(range(103)), "val": list(range(51))}[split]
    (folder / f"{split}.bin").write_bytes(struct.pack(f"<{len(content)}H", *content))
    data = gpt.Data(folder, BLOCK)
    refused = 0
    for row in range(24 if split == "train" else 7):
        start = data.row_start(split, row)
        largest = max(content[start : start + BLOCK + 1])
        if largest < 40:
            data.get_batch(split, row, 1)
            continue
        with pytest.raises(
            ValueError,
            match=f"wild holds id {largest}, but its vocabulary has only 40 ids: prepare",
        ):
            data.get_batch(split, row, 1)
        refused += 1
    assert refused == 3 if split == "val" else 0 < refused < 10


@pytest.mark.parametrize("content", ["", '{"dtype": "uint16", ', '{"dtype": "uint16"}'])
def test_a_damaged_meta_json_is_named(tmp_path, content):
    """A meta.json that was cut short or made by something else is a sentence with its path."""
    folder = write_tokens(tmp_path / "odd", 100, 50)
    (folder / "meta.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="odd.meta.json is damaged"):
        gpt.Data(folder, BLOCK)


def test_preparing_again_does_not_disturb_a_run_that_has_the_data_mapped(settings):
    """The tokens of an open Data stay what they were."""
    folder = Path(gpt.data_dir) / "toy"
    data = gpt.Data(folder, 16)
    everything = np.arange(len(data.tokens["train"]))
    before = data.tokens["train"][everything].copy()
    gpt.write_dataset(folder, "ab" * 200, gpt.Tokenizer("char", "ab"), "another text")
    assert np.array_equal(data.tokens["train"][everything], before)
    assert len(set(before.tolist())) > 2
    again = gpt.Data(folder, 16).tokens["train"]
    assert set(again[np.arange(len(again))].tolist()) == {0, 1}


# ---- Paths ----
def test_a_folder_may_be_a_text(tmp_path, monkeypatch):
    """write_dataset and Data take a str, in which ~ is the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    gpt.write_dataset("~/texts/toy", "ab" * 50, gpt.Tokenizer("char", "ab"), "tests")
    assert (tmp_path / "texts" / "toy" / "meta.json").exists()
    assert not (tmp_path / "~").exists()
    for folder in ("~/texts/toy", "texts/toy"):
        assert gpt.Data(folder, BLOCK).meta["train_tokens"] == 90


def test_a_text_file_is_read_in_one_way(tmp_path, monkeypatch):
    """A byte order mark is dropped, line ends stay, ~ is the home folder, other bytes are named."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    path = tmp_path / "text.txt"
    for content, text in (
        (b"\xef\xbb\xbfcaf\xc3\xa9\r\nb\rc\n", "caf\xe9\r\nb\rc\n"),
        (b"a\xef\xbb\xbfb", "a\ufeffb"),
        (b"", ""),
    ):
        path.write_bytes(content)
        assert (
            gpt.read_text(path) == gpt.read_text(str(path)) == gpt.read_text("~/text.txt") == text
        )
    path.write_bytes(b"caf\xe9 au lait")
    with pytest.raises(ValueError, match=r"text.txt is not UTF-8 text \(byte 3\)"):
        gpt.read_text(path)


# ---- Shards of earlier versions ----
def cut_into_shards(folder, name, sizes):
    """Cut NAME.bin into NAME_0000.bin and so on, of as many bytes as sizes say."""
    content = (folder / f"{name}.bin").read_bytes()
    assert sum(sizes) == len(content)
    (folder / f"{name}.bin").unlink()
    for i, (a, b) in enumerate(itertools.pairwise(itertools.accumulate([0, *sizes]))):
        (folder / f"{name}_{i:04d}.bin").write_bytes(content[a:b])


def test_the_command_that_joins_shards_does_so(tmp_path, write_examples):
    """Tokens and weights, one file after the other, as often as a file is named."""
    folder = write_examples(tmp_path / "cut", LETTERS, train=BY_HAND, val=BY_HAND)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    cut_into_shards(folder, "train", [20, 2, 36])
    cut_into_shards(folder, "train.weight", [10, 19])
    cut_into_shards(folder, "val.weight", [29])
    for _ in range(3):
        with pytest.raises(ValueError, match="holds shards.*: join them with cd ") as e:
            gpt.Data(folder, 4)
        command = str(e.value).partition("join them with ")[2]
        subprocess.run(command, shell=True, check=True)
    gpt.Data(folder, 4)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# ---- Weights ----
LETTERS = "abcdefghijklmnopqrstuvwxyz"
END = 26
BY_HAND = [
    [("ab", 0), ("cd", 255)],
    [("efg", 0), ("hijkl", 51)],
    [("m", 255)],
    [("n", 0), ("o", 0)],
    [("p", 0), ("qrs", 102)],
    [("uv", 0), ("wx", 204)],
]
# tokens: a b c d END | e f g h i j k l END | m END | n o END | p q r s END | u v w x END


def test_rows_of_weighted_examples_by_hand(tmp_path, write_examples):
    """Each example begins a row, a long one several; what follows its end in the row weighs 0.

    The example "no", which holds no target, has no row.
    """
    folder = write_examples(tmp_path / "w", LETTERS, train=BY_HAND, val=BY_HAND)
    data = gpt.Data(folder, 4)
    x, y, w = data.get_batch("val", 0, 7)
    spelled = ["".join((LETTERS + ".")[i] for i in row) for row in x.tolist()]
    assert spelled == ["abcd", "efgh", "ijkl", "m.no", "pqrs", "uvwx", "aaaa"]
    assert data.n_empty == 2  # one in each split
    assert y.tolist() == [
        [1, 2, 3, END],
        [5, 6, 7, 8],
        [9, 10, 11, END],
        [END, 13, 14, END],
        [16, 17, 18, END],
        [21, 22, 23, END],
        [-1, -1, -1, -1],
    ]
    expected = [
        [0, 1, 1, 1],
        [0, 0, 0.2, 0.2],
        [0.2] * 4,
        [1, 0, 0, 0],
        [0.4] * 4,
        [0, 0.8, 0.8, 0.8],
    ]
    assert torch.allclose(w, torch.tensor([*expected, [0.0] * 4]), rtol=1e-6, atol=0)
    assert (x.dtype, y.dtype, w.dtype) == (torch.int64, torch.int64, torch.float32)


def test_a_row_that_weighs_its_first_token_alone_holds_no_target(tmp_path, write_examples):
    """The first token of a row is never predicted, so "efgh" is left out."""
    examples = [[("abcd", 0), ("e", 255), ("fgh", 0)], [("m", 255)]]
    folder = write_examples(tmp_path / "w", LETTERS, train=examples, val=examples)
    data = gpt.Data(folder, 4)
    x, _, _ = data.get_batch("val", 0, 2)
    spelled = ["".join((LETTERS + ".")[i] for i in row) for row in x.tolist()]
    assert spelled == ["abcd", "m.aa"]
    assert (data.n_rows("val"), data.n_empty) == (2, 2)


def random_examples(seed, n):
    """Return n examples whose letters, of a large alphabet, occur once each, and that alphabet."""
    draw, alphabet = random.Random(seed), [chr(0x4E00 + i) for i in range(30 * n)]
    left, examples = iter(alphabet), []
    for _ in range(n):
        lengths = (draw.randint(0, 12), draw.randint(1, draw.choice([2, 9, 17])))
        prompt, response = ("".join(itertools.islice(left, length)) for length in lengths)
        examples.append([(prompt, 0), (response, draw.choice([0, 64, 255, 255]))])
    return examples, "".join(alphabet)


def row_starts(examples, block):
    """Return where the rows that hold a target begin, by hand from texts and weights."""
    position = 0
    starts = []
    for example in examples:
        weights = [weight for text, weight in example for _ in text] + [example[-1][1]]
        for start in range(0, len(weights) - 1, block):
            if any(weights[start + 1 : start + 1 + block]):
                starts.append(position + start)
        position += len(weights)
    return starts


def weighted_targets(examples, alphabet):
    """Return {(input, target): weight} of the examples' targets that weigh something, in order."""
    expected = {}
    for example in examples:
        weights = [weight for text, weight in example for _ in text] + [example[-1][1]]
        ids = [alphabet.index(c) for text, _ in example for c in text] + [len(alphabet)]
        for a, b, weight in zip(ids, ids[1:], weights[1:]):
            if weight:
                expected[a, b] = weight / 255
    return expected


@pytest.mark.parametrize("block", [1, 3, 8, 40])
@pytest.mark.parametrize("split", ["train", "val"])
def test_every_weighted_target_counts_once_and_sees_its_own_example_only(
    tmp_path, write_examples, split, block
):
    """Over an epoch the targets that weigh are those of the examples.

    No input before them is of another example, and each row holds at least one of them.
    """
    examples, alphabet = random_examples(3, 60)
    splits = {"train": examples[:40], "val": examples[40:]}
    data = gpt.Data(write_examples(tmp_path / "w", alphabet, **splits), block)
    n_rows = len(row_starts(splits[split], block))
    assert data.n_val_batches(5) == -(-len(row_starts(splits["val"], block)) // 5)
    home = {c: i for i, example in enumerate(splits[split]) for text, _ in example for c in text}
    for epoch in range(2 if split == "train" else 1):
        found = {}
        for row in range(epoch * n_rows, (epoch + 1) * n_rows):
            x, y, w = data.get_batch(split, row, 1)
            assert w.any()
            inputs = x[0].tolist()
            for i in w[0].nonzero().flatten().tolist():
                pair = (inputs[i], int(y[0, i]))
                assert pair not in found
                found[pair] = float(w[0, i])
                assert len({home[alphabet[j]] for j in inputs[: i + 1]}) == 1
        expected = weighted_targets(splits[split], alphabet)
        assert found == pytest.approx(expected)
        assert (list(found) == list(expected)) == (split == "val")


def test_weighted_epochs_have_the_same_rows_in_another_order(tmp_path, write_examples):
    """The rows of all epochs begin at the same places, which seed and epoch order."""
    examples, alphabet = random_examples(3, 60)
    folder = write_examples(tmp_path / "w", alphabet, train=examples, val=examples[:9])
    expected = row_starts(examples, 8)
    n = len(expected)
    orders = []
    for seed, epoch in ((1, 0), (1, 1), (2, 0)):
        data = gpt.Data(folder, 8, seed)
        orders.append([data.row_start("train", epoch * n + row) for row in range(n)])
    assert all(sorted(order) == expected for order in orders)
    assert len(set(map(tuple, orders))) == 3


def test_a_large_weighted_batch_is_the_small_ones_in_a_row(tmp_path, write_examples):
    """Accumulation and processes cut a step's batch without a change, over the end of an epoch."""
    data = gpt.Data(write_examples(tmp_path / "w", LETTERS, train=BY_HAND, val=BY_HAND), 4)
    for first in (0, 6, 12):
        whole = data.get_batch("train", first, 6)
        parts = [data.get_batch("train", first + row, 2) for row in (0, 2, 4)]
        for i in range(3):
            assert torch.equal(whole[i], torch.cat([part[i] for part in parts]))


def test_without_weights_the_end_of_a_document_is_a_token_like_others(tmp_path, write_examples):
    """In plain data windows reach over <|endoftext|>, and every target weighs 1."""
    folder = write_examples(tmp_path / "w", LETTERS, train=BY_HAND, val=BY_HAND)
    for split in ("train", "val"):
        (folder / f"{split}.weight.bin").unlink()
    data = gpt.Data(folder, 8)
    x, _, w = data.get_batch("val", 0, 2)
    assert x[0].tolist() == [0, 1, 2, 3, END, 4, 5, 6]
    assert w.tolist() == [[1.0] * 8] * 2
    assert data.get_batch("train", 0, 2)[2].tolist() == [[1.0] * 8] * 2


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("n", [1, 28, 30])
def test_weights_of_another_length_are_refused(tmp_path, write_examples, split, n):
    """Weights belong to tokens one by one: 29 of them here."""
    folder = write_examples(tmp_path / "w", LETTERS, train=BY_HAND, val=BY_HAND)
    assert (folder / f"{split}.weight.bin").stat().st_size == 29
    (folder / f"{split}.weight.bin").write_bytes(b"\xff" * n)
    with pytest.raises(ValueError, match=f"w holds .* tokens for {split}"):
        gpt.Data(folder, 4)


def test_a_split_of_few_weighted_tokens_is_enough(tmp_path, write_examples):
    """Examples need not fill a block, unlike plain text."""
    folder = write_examples(tmp_path / "w", LETTERS, train=[[("ab", 255)]], val=[[("c", 255)]])
    data = gpt.Data(folder, 8)
    for split, rows in (("train", [0, 1]), ("val", [2])):
        x, y, w = data.get_batch(split, 0, 1)
        assert x[0, : len(rows)].tolist() == rows
        assert y[0].tolist() == [*rows[1:], END] + [-1] * (8 - len(rows))
        assert w[0].tolist() == [1.0] * len(rows) + [0.0] * (8 - len(rows))


@pytest.mark.parametrize("split", ["train", "val"])
def test_weights_for_one_split_only_are_refused(write_examples, tmp_path, split):
    """Or else one split would be read by examples and the other not."""
    folder = write_examples(tmp_path / "w", LETTERS, train=BY_HAND, val=BY_HAND)
    (folder / f"{split}.weight.bin").unlink()
    with pytest.raises(ValueError, match=split):
        gpt.Data(folder, 4)


def test_weighted_data_without_a_target_are_refused(write_examples, tmp_path):
    """Without <|endoftext|> there is no example, and without a weight nothing to learn."""
    folder = write_examples(tmp_path / "w", LETTERS, train=BY_HAND, val=BY_HAND)
    whole = (folder / "val.bin").read_bytes()
    (folder / "val.bin").write_bytes(bytes(len(whole)))
    with pytest.raises(ValueError, match="for val, but no example whose answer counts: ") as e:
        gpt.Data(folder, 4)
    assert "block_size" not in str(e.value)
    (folder / "val.bin").write_bytes(whole)
    (folder / "train.weight.bin").write_bytes(bytes(len(whole) // 2))
    with pytest.raises(ValueError, match="for train, but no example whose answer counts: "):
        gpt.Data(folder, 4)


def test_rows_of_long_prompts_are_left_out(write_examples, tmp_path):
    """Prompts of 3,000 characters and answers of 40: every row of an epoch holds a target."""
    example = [("q" * 3000, 0), ("a" * 40, 255)]
    folder = write_examples(tmp_path / "w", LETTERS, train=[example] * 6, val=[example])
    data = gpt.Data(folder, 256)
    # Token 3,000 is the answer's first one, token 3,040 the end. Rows of 256 begin at 0, 256 ...
    # 2,816, whose targets are tokens 2,817 to 3,040: one row of 12 holds the whole answer.
    assert len(data.starts["train"]) == 6
    assert data.n_empty == 7 * 11
    x, _, w = data.get_batch("train", 0, 12)
    assert w.sum(1).tolist() == [41.0] * 12
    assert x[0].tolist() == [16] * 184 + [0] * 40 + [END] + x[0, 225:].tolist()
