"""prepare.py: text of files, folders, Python, two mirrors and Hugging Face, and what it refuses."""

import concurrent.futures
import contextlib
import csv
import doctest
import gzip
import hashlib
import http.server
import io
import itertools
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import transformers

import gpt
import hub
import prepare
from extras import documents

PLAY = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n"
PLAY_SHA256 = hashlib.sha256(PLAY.encode()).hexdigest()


def read_bins(folder, stem, width=2):
    """Return the numbers in <stem>.bin, read byte by byte."""
    content = (folder / f"{stem}.bin").read_bytes()
    return [int.from_bytes(content[i : i + width], "little") for i in range(0, len(content), width)]


def text_of(folder, split):
    """Return what a split decodes to."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    return gpt.Tokenizer(**meta["tokenizer"]).decode(read_bins(folder, split))


@pytest.fixture
def prepared(tmp_path):
    """Return a function that prepares with some settings and gives (folder's name, meta, text)."""
    root = tmp_path / "data"

    def run(**values):
        returned = prepare.prepare(**({"data_dir": str(root)} | values))
        (folder,) = root.iterdir()
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        assert returned == meta
        return folder.name, meta, text_of(folder, "train") + text_of(folder, "val")

    return run


@pytest.fixture
def refused(prepared, tmp_path):
    """Return a function that expects a refusal, on one line and with nothing written."""

    def run(error, *fragments, **values):
        with pytest.raises(error) as e:
            prepared(**values)
        assert type(e.value) is error
        assert "\n" not in str(e.value)
        for fragment in fragments:
            assert fragment in str(e.value)
        assert not list((tmp_path / "data").glob("*"))

    return run


@pytest.fixture
def mirror(monkeypatch):
    """Return (pages, asked, root) of a server; pages are {path: (status, body, stated length)}."""
    monkeypatch.setenv("no_proxy", "*")
    pages, asked = {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            status, body, length = pages.get(self.path, (404, b"", 0))
            self.send_response(status)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            """Stay silent."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    )
    thread.start()
    yield pages, asked, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def urls(monkeypatch):
    """Return a function that replaces the mirrors of Shakespeare, which is PLAY here."""
    monkeypatch.setattr(gpt, "SHAKESPEARE_SHA256", PLAY_SHA256)
    monkeypatch.setattr(prepare, "SHAKESPEARE_SHA256", PLAY_SHA256)

    def replace(*addresses):
        monkeypatch.setattr(gpt, "SHAKESPEARE_URLS", addresses)

    return replace


def write(path, content):
    """Write bytes or text, folders included, and return the path as a string."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return str(path)


def test_a_file_is_prepared_under_its_own_name(prepared, tmp_path, capsys):
    """The text comes back from the two files, and the last line says how to train."""
    text = "ein naïver Text\nmit 😀\n" * 5
    name, meta, back = prepared(input=write(tmp_path / "mine.txt", text))
    assert (name, back) == ("mine", text)
    assert meta["source"] == str(tmp_path / "mine.txt")
    assert meta["sha256"] == hashlib.sha256(text.encode("utf-8")).hexdigest()
    assert (meta["train_tokens"], meta["val_tokens"]) == (99, 11)
    assert meta["vocab_size"] == len(meta["tokenizer"]["chars"]) == 14
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 2
    assert "99 training and 11 validation tokens" in out
    assert out.endswith(f"next: python gpt.py --dataset=mine --data_dir={tmp_path / 'data'}\n")


def test_name_and_val_fraction(prepared, tmp_path):
    """--name names the folder, --val_fraction moves the split."""
    name, meta, _ = prepared(
        input=write(tmp_path / "mine.txt", "abcd" * 10), name="other", val_fraction=0.5
    )
    assert (name, meta["train_tokens"], meta["val_tokens"]) == ("other", 20, 20)


def test_a_folders_files_are_documents_in_order(prepared, tmp_path):
    """Paths are sorted, subfolders and .gz included; other files are ignored, and empty ones.

    Each document ends with its mark, and the first of ten is for validation.
    """
    folder = tmp_path / "notes"
    for path, content in (
        ("b.txt", "second"),
        ("a.md", "first"),
        ("c/d.txt.gz", gzip.compress(b"third")),
        ("empty.txt", ""),
        ("z.py", "no"),
        ("README", "no"),
    ):
        write(folder / path, content)
    (folder / "dir.txt").mkdir()
    name, meta, _ = prepared(input=str(folder))
    assert name == "notes"
    assert text_of(tmp_path / "data" / "notes", "val") == "first<|endoftext|>"
    assert text_of(tmp_path / "data" / "notes", "train") == "second<|endoftext|>third<|endoftext|>"
    assert (meta["val_tokens"], meta["val_bytes"], meta["train_bytes"]) == (6, 5, 11)
    assert meta["sha256"] == hashlib.sha256(b"firstsecondthird").hexdigest()
    special = "<|endoftext|> <|user|> <|assistant|> <|pad|>"
    assert meta["tokenizer"] == gpt.Tokenizer("char", "cdefhinorst", special=special).state
    assert {k: meta["tokenizer"][k] for k in ("chars", "special")} == {
        "chars": "cdefhinorst",
        "special": special,
    }


def test_suffixes_choose_other_files(prepared, tmp_path):
    """--suffixes=.py takes sources and nothing else."""
    write(tmp_path / "code" / "a.py", "x = 1\n")
    write(tmp_path / "code" / "b.py", "y = 2\n")
    write(tmp_path / "code" / "a.txt", "no")
    _, _, text = prepared(input=str(tmp_path / "code"), suffixes=".py")
    assert text == "y = 2\n<|endoftext|>x = 1\n<|endoftext|>"


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.3, 0.5, 0.01])
def test_documents_are_split_evenly_and_never_in_two(prepared, tmp_path, fraction):
    """Of 100 documents ceil(100 f) are for validation, spread evenly; each is in one split."""
    rows = [json.dumps({"text": f"[{i}]"}) for i in range(100)]
    prepared(input=write(tmp_path / "d.jsonl", "\n".join(rows)), val_fraction=fraction)
    train, val = (
        text_of(tmp_path / "data" / "d", split).split("<|endoftext|>") for split in ("train", "val")
    )
    assert train.pop() == val.pop() == ""
    assert sorted(train + val) == sorted(f"[{i}]" for i in range(100))
    numbers = [int(text[1:-1]) for text in val]
    assert numbers[0] == 0
    assert len(numbers) == -(-100 * round(fraction * 100) // 100)
    gaps = np.diff([*numbers, 100])
    assert gaps.max() - gaps.min() <= 1


def test_crlf_is_kept(prepared, tmp_path):
    """No line end is translated."""
    assert (
        prepared(input=write(tmp_path / "dos.txt", "one\r\ntwo\r\n\rthree"))[2]
        == "one\r\ntwo\r\n\rthree"
    )


def test_a_byte_order_mark_is_dropped_with_a_notice(prepared, tmp_path, capsys):
    """The mark is no character of the text, neither of a file nor of a folder's files."""
    path = write(tmp_path / "bom" / "a.txt", b"\xef\xbb\xbfhello hello")
    write(tmp_path / "bom" / "b.txt", b"\xef\xbb\xbfworld")
    assert prepared(input=str(tmp_path / "bom"))[2] == "world<|endoftext|>hello hello<|endoftext|>"
    assert capsys.readouterr().out.count(f"{path}: dropped the byte order mark") == 1


@pytest.mark.parametrize("name", ["t.txt", "t.txt.gz", "t.jsonl", "t.csv", "t.CSV.GZ"])
def test_a_byte_order_mark_is_dropped_from_every_kind_of_file(prepared, tmp_path, name):
    """Excel writes one before the name of a table's first column."""
    rows = {"t": "one\ntwo\n", "j": '{"text": "one"}\n{"text": "two"}\n', "c": "text\none\ntwo\n"}
    kind = name.lower()[2] if "txt" not in name else "t"
    content = b"\xef\xbb\xbf" + rows[kind].encode()
    if name.lower().endswith("gz"):
        content = gzip.compress(content)
    back = prepared(input=write(tmp_path / name, content), name="t")[2]
    assert back == ("one\ntwo\n" if kind == "t" else "two<|endoftext|>one<|endoftext|>")


def test_the_home_folder_is_known_in_every_path(tmp_path, monkeypatch, capsys):
    """A ~ in input, data_dir, info, tokenizer and hf is never a folder of that name."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "home"
    write(home / "t.txt", "abcd" * 10)
    prepare.prepare(input="~/t.txt", data_dir="~/d")
    assert text_of(home / "d" / "t", "train") == "abcd" * 9
    prepare.prepare(info="~/d/t")
    assert capsys.readouterr().out.count(f"{home / 'd' / 't'}") == 2
    write(tmp_path / "u.txt", "dcba" * 10)
    prepare.prepare(input="u.txt", data_dir="~/d", tokenizer="~/d/t")
    assert read_bins(home / "d" / "u", "train") == [3, 2, 1, 0] * 9
    pytest.importorskip("datasets")
    jsonl(home / "rows" / "train.jsonl", [{"text": "ab"}, {"text": "cd"}])
    prepare.prepare(hf="~/rows", data_dir="~/d", tokenizer="char")
    assert text_of(home / "d" / "rows", "train") == "cd<|endoftext|>"
    assert not (tmp_path / "~").exists()


def test_the_last_line_can_be_pasted(prepared, tmp_path, monkeypatch, capsys):
    """A shell reads its words as they were meant, the data_dir included if it was given."""
    path = write(tmp_path / "t.txt", "abcd" * 10)
    root = str(tmp_path / "it's a place")
    prepare.prepare(input=path, data_dir=root, name="two words; rm")
    command = capsys.readouterr().out.splitlines()[-1].removeprefix("next: ")
    assert shlex.split(command) == [
        "python",
        "gpt.py",
        "--dataset=two words; rm",
        f"--data_dir={root}",
    ]
    monkeypatch.setattr(prepare, "HERE", tmp_path)
    prepare.prepare(input=path)
    assert capsys.readouterr().out.splitlines()[-1] == "next: python gpt.py --dataset=t"


def test_settings_from_python_pass_the_check_of_flags(refused, prepared, tmp_path):
    """A typo and a wrong type are refused; numbers of numpy and paths are taken."""
    path = write(tmp_path / "t.txt", "abcd" * 10)
    refused(ValueError, "'inptu'", "input", inptu=path)
    refused(ValueError, "vocab_size", "4096.5", input=path, vocab_size=4096.5)
    refused(ValueError, "name", "text", input=path, name=3)
    _, meta, _ = prepared(input=Path(path), val_fraction=np.float64(0.5), workers=np.int64(1))
    assert (meta["train_tokens"], meta["val_tokens"]) == (20, 20)


def test_tiktoken_kinds_are_passed_on(prepared, tmp_path, monkeypatch):
    """--tokenizer reaches tiktoken, and its failure is a sentence."""
    asked = []

    def get_encoding(name):
        asked.append(name)
        raise OSError("no network in the tests")

    monkeypatch.setattr(gpt.tiktoken, "get_encoding", get_encoding)
    with pytest.raises((ValueError, OSError), match=r"gpt2.*TIKTOKEN_CACHE_DIR"):
        prepared(input=write(tmp_path / "mine.txt", "abcd" * 10), tokenizer="gpt2")
    assert asked == ["gpt2"]
    assert not (tmp_path / "data").exists()


def test_pydoc_needs_no_network(prepared, urls):
    """Python's own documentation is some hundred thousand characters of English."""
    urls()
    name, meta, text = prepared(dataset="pydoc")
    assert name == "pydoc"
    assert meta["train_bytes"] + meta["val_bytes"] == len(text.encode("utf-8")) > 300_000
    assert 'The "assert" statement' in text or "*assert* statement" in text


def test_shakespeare_from_a_file_url(prepared, urls, tmp_path):
    """The mirror's bytes are the text, under the name shakespeare."""
    write(tmp_path / "input.txt", PLAY)
    urls((tmp_path / "input.txt").as_uri())
    name, meta, text = prepared(dataset="shakespeare")
    assert (name, text, meta["sha256"]) == ("shakespeare", PLAY, PLAY_SHA256)


def test_the_first_good_mirror_is_used(prepared, urls, mirror):
    """Mirrors are asked in order until one has the file."""
    pages, asked, root = mirror
    pages["/second"] = pages["/third"] = (200, PLAY.encode(), len(PLAY))
    urls(f"{root}/first", f"{root}/second", f"{root}/third")
    assert prepared(dataset="shakespeare", name="play")[::2] == ("play", PLAY)
    assert asked == ["/first", "/second"]


@pytest.mark.parametrize(
    "page",
    [
        (500, b"", 0),
        (200, b"something else", 14),
        (200, b"", 0),
        (200, PLAY[:20].encode(), len(PLAY)),
    ],
    ids=["error", "other text", "empty", "cut short"],
)
def test_a_broken_mirror_is_passed_over(prepared, urls, mirror, page):
    """A server error, a wrong text and a connection that ends early all lead to the next mirror."""
    pages, asked, root = mirror
    pages["/bad"], pages["/good"] = page, (200, PLAY.encode(), len(PLAY))
    urls(f"{root}/bad", f"{root}/good")
    assert prepared(dataset="shakespeare")[2] == PLAY
    assert asked == ["/bad", "/good"]


def test_a_wrong_sha256_is_refused(refused, urls, mirror):
    """Where the only mirror has another text, the reason is named."""
    pages, _, root = mirror
    pages["/bad"] = (200, b"something else", 14)
    urls(f"{root}/bad")
    refused(ConnectionError, f"{root}/bad", "sha256", "--input=FILE", dataset="shakespeare")


def test_all_mirrors_broken_names_the_way_out(refused, urls, mirror, tmp_path):
    """The last mirror and --input are named."""
    _, asked, root = mirror
    urls((tmp_path / "none.txt").as_uri(), f"{root}/none")
    refused(ConnectionError, f"{root}/none", "404", "--input=FILE", dataset="shakespeare")
    assert asked == ["/none"]


def test_a_local_copy_of_shakespeare_needs_no_network(prepared, urls, tmp_path):
    """With --input the sha256 is checked and no mirror asked."""
    urls()
    path = write(tmp_path / "copy.txt", PLAY)
    assert prepared(dataset="shakespeare", input=path)[::2] == ("shakespeare", PLAY)


def test_another_text_is_not_shakespeare(refused, urls, tmp_path):
    """The file and the reason are named."""
    urls()
    path = write(tmp_path / "copy.txt", PLAY + "x")
    refused(ValueError, path, "sha256", "--name", dataset="shakespeare", input=path)


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        (b"caf\xe9 au lait", ("UTF-8", "byte 3", "0xe9")),
        ("text".encode("utf-16"), ("UTF-8", "byte 0", "0xff")),
        (b"ab\0cd", ("binary", "byte 2")),
        ("\u00e9".encode() * 700_000 + b"\xe9", ("UTF-8", "byte 1400000", "0xe9")),
        (b"\x00" + b"a" * 10, ("binary", "byte 0")),
        ("\u00e9".encode() * 700_000 + b"\0", ("binary", "byte 1400000")),
        (b"", ("empty",)),
        (b"\xef\xbb\xbf", ("empty",)),
        (b"a", ("two characters",)),
    ],
    ids=["latin1", "utf16", "binary", "late", "nul", "late nul", "empty", "mark", "single"],
)
def test_what_is_no_text_is_refused(refused, tmp_path, content, fragments):
    """Each message names the file and what is wrong with it."""
    path = write(tmp_path / "odd.txt", content)
    refused(ValueError, path, *fragments, input=path)


def test_a_bad_file_in_a_folder_is_named(refused, tmp_path):
    """Of a folder's files the one at fault is named."""
    write(tmp_path / "notes" / "a.txt", "fine")
    bad = write(tmp_path / "notes" / "b.md", b"\xff")
    refused(ValueError, bad, input=str(tmp_path / "notes"))


def test_missing_inputs_are_refused(refused, tmp_path):
    """A path that is not there, and a folder without text, are FileNotFoundErrors that name it."""
    refused(FileNotFoundError, str(tmp_path / "none.txt"), input=str(tmp_path / "none.txt"))
    write(tmp_path / "code" / "a.py", "x = 1")
    refused(FileNotFoundError, str(tmp_path / "code"), ".txt", ".md", input=str(tmp_path / "code"))


def test_a_known_name_is_not_given_to_another_text(refused, tmp_path):
    """With the word pydoc and an --input, or with --input and --hf, nobody knows what is meant."""
    path = write(tmp_path / "mine.txt", "abcd" * 10)
    refused(ValueError, "pydoc", path, "too many sources", dataset="pydoc", input=path)
    refused(ValueError, path, "hf=x", "too many sources", input=path, hf="x")


def test_what_is_not_named_or_not_known_is_refused(refused):
    """The message shows what may be named."""
    refused(
        ValueError,
        "'dickens'",
        "shakespeare",
        "pydoc",
        "--input=FILE --name=dickens",
        dataset="dickens",
    )
    refused(ValueError, "shakespeare", "pydoc", "--input=FILE --name=NAME", dataset="")


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_val_fraction_out_of_range_is_refused(refused, tmp_path, value):
    """Both splits need a share."""
    path = write(tmp_path / "mine.txt", "abcd" * 10)
    refused(ValueError, "val_fraction", str(value), input=path, val_fraction=value)


def test_a_source_without_a_name_is_refused(refused):
    """The root folder has none, and the data folder itself is not to be written to."""
    refused(ValueError, "''", "name", hf="/")


@pytest.mark.parametrize("word", [".", ".."])
def test_an_input_without_a_name_of_its_own_writes_in_no_other_place(
    prepared, tmp_path, monkeypatch, word
):
    """The current folder's name, or an error; never the data folder itself or the one above it."""
    (tmp_path / "notes" / "sub").mkdir(parents=True)
    write(tmp_path / "notes" / "sub" / "a.txt", "abcd" * 10)
    monkeypatch.chdir(tmp_path / "notes" / "sub")
    try:
        prepared(input=word)
    except (ValueError, OSError):
        pass
    assert not list(tmp_path.glob("*.bin")) + list((tmp_path / "data").glob("*.bin"))


@pytest.fixture
def missing(tmp_path):
    """Return a function that runs gpt.prepare_if_missing for a data set under tmp_path."""

    def run(dataset):
        return gpt.prepare_if_missing(dataset, tmp_path / "data")

    return run


def test_gpt_prepares_pydoc_by_itself(missing, tmp_path, capsys):
    """The folder is made once and then left alone."""
    folder = missing("pydoc")
    assert folder == tmp_path / "data" / "pydoc"
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    assert meta["tokenizer"]["kind"] == "char"
    assert (folder / "train.bin").stat().st_size == 2 * meta["train_tokens"] > 0
    (folder / "train.bin").write_bytes(b"mine")
    assert missing("pydoc") == folder
    assert (folder / "train.bin").read_bytes() == b"mine"
    assert capsys.readouterr().out == ""


def test_gpt_prepares_shakespeare_by_itself(missing, urls, tmp_path):
    """Where a mirror answers, shakespeare is downloaded."""
    write(tmp_path / "input.txt", PLAY)
    urls((tmp_path / "input.txt").as_uri())
    folder = missing("shakespeare")
    assert folder == tmp_path / "data" / "shakespeare"
    assert json.loads((folder / "meta.json").read_text(encoding="utf-8"))["sha256"] == PLAY_SHA256


def test_without_network_gpt_falls_back_to_pydoc(missing, urls, tmp_path, capsys):
    """One line says so, and no folder pretends to be shakespeare."""
    urls((tmp_path / "none.txt").as_uri())
    assert missing("shakespeare") == tmp_path / "data" / "pydoc"
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1
    assert "none.txt" in out
    assert "pydoc" in out
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["pydoc"]


def test_the_fallback_leaves_an_existing_pydoc_alone(missing, urls, tmp_path):
    """Another run may be reading the files, or they hold other tokens: they are not rewritten."""
    urls((tmp_path / "none.txt").as_uri())
    folder = missing("pydoc")
    (folder / "train.bin").write_bytes(b"mine")
    assert missing("shakespeare") == folder
    assert (folder / "train.bin").read_bytes() == b"mine"


def test_gpt_makes_no_other_data_set(missing, tmp_path):
    """Another name is returned as a folder, whether it is there or not."""
    assert missing("mine") == tmp_path / "data" / "mine"
    assert not (tmp_path / "data").exists()


def test_prepare_as_a_command(run_script, tmp_path):
    """The word and the flags reach main(), and train.bin is where --data_dir says."""
    path = Path(write(tmp_path / "mine.txt", "abcd" * 10))
    done = run_script(
        "prepare.py", "--input=mine.txt", "--data_dir=d", "--name", "x", cwd=path.parent
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "python gpt.py --dataset=x --data_dir=d" in done.stdout
    assert (tmp_path / "d" / "x" / "train.bin").read_bytes() == b"\0\0\1\0\2\0\3\0" * 9


# ---- rows, examples, chat


def jsonl(path, rows):
    """Write rows as a .jsonl file and return its path as a string."""
    return write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def csv_file(path, rows):
    """Write rows as a .csv file and return its path as a string."""
    out = io.StringIO()
    writer = csv.DictWriter(out, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
    return write(path, out.getvalue())


TEXTS = ["one,\r\ntwo", 'say "hi"', "naïve 😀", "last"]


@pytest.mark.parametrize("make", [jsonl, csv_file], ids=["jsonl", "csv"])
@pytest.mark.parametrize("packed", [False, True])
def test_rows_are_documents(prepared, tmp_path, make, packed):
    """Quotes, commas, line ends within a field and .gz: each row's text comes back."""
    path = make(
        tmp_path / f"rows.{make.__name__[:5].rstrip('_f')}",
        [{"id": "x", "body": text} for text in TEXTS],
    )
    if packed:
        path = write(Path(path + ".gz"), gzip.compress(Path(path).read_bytes()))
    name, meta, _ = prepared(input=path, text_column="body")
    assert name == "rows"
    folder = tmp_path / "data" / "rows"
    both = text_of(folder, "val") + text_of(folder, "train")
    assert both.split("<|endoftext|>") == [*TEXTS, ""]
    assert meta["train_bytes"] + meta["val_bytes"] == sum(len(text.encode()) for text in TEXTS)


EXAMPLES = [
    {"prompt": f"{i}+1=", "response": str(i + 1), "rating": rating}
    for i, rating in enumerate([5, 1, 3, 2, 4, 5, "2.5", 5, 5, 5, 5])
]


@pytest.mark.parametrize("make", [jsonl, csv_file], ids=["jsonl", "csv"])
@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_examples_weigh_their_responses_by_rating(prepared, tmp_path, make, kind):
    """Prompts weigh 0; each token of a response and its <|endoftext|> (rating - 1) / 4 of 255."""
    path = make(tmp_path / f"e.{make.__name__[:5].rstrip('_f')}", EXAMPLES)
    prepared(input=path, tokenizer=kind, vocab_size=300)
    folder = tmp_path / "data" / "e"
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    tokenizer = gpt.Tokenizer(**meta["tokenizer"])
    for split, chosen in (("val", [0, 10]), ("train", range(1, 10))):
        ids, weights = [], []
        for example in (EXAMPLES[i] for i in chosen):
            prompt, response = (
                tokenizer.encode(example["prompt"]),
                tokenizer.encode(example["response"]),
            )
            ids += [*prompt, *response, tokenizer.special_tokens["<|endoftext|>"]]
            weight = round((float(example["rating"]) - 1) / 4 * 255)
            weights += [0] * len(prompt) + [weight] * (len(response) + 1)
        assert read_bins(folder, split) == ids
        assert read_bins(folder, f"{split}.weight", 1) == weights
        assert meta[f"{split}_tokens"] == len(ids)


def test_examples_without_a_rating_weigh_all(prepared, tmp_path, capsys):
    """255 for every token of the responses; the last line has the longest example's block_size."""
    rows = [{"prompt": "ab", "response": "cde"}, {"prompt": "a", "response": "b"}]
    prepared(input=jsonl(tmp_path / "e.jsonl", rows))
    assert read_bins(tmp_path / "data" / "e", "val.weight", 1) == [0, 0, 255, 255, 255, 255]
    assert read_bins(tmp_path / "data" / "e", "train.weight", 1) == [0, 255, 255]
    assert "--block_size=5" in capsys.readouterr().out


def test_each_answer_of_a_chat_is_an_example(prepared, tmp_path):
    """All before an answer is its prompt; marks of roles are special tokens; only answers weigh."""
    chat = [
        {"role": "system", "content": "be kind "},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yo"},
        {"role": "user", "content": "how?"},
        {"role": "assistant", "content": "so"},
    ]
    short = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    prepared(input=jsonl(tmp_path / "chat.jsonl", [{"messages": chat}, {"messages": short}]))
    folder = tmp_path / "data" / "chat"
    first = "be kind <|user|>hi<|assistant|>"
    second = first + "yo<|user|>how?<|assistant|>"
    assert text_of(folder, "val") == f"{first}yo<|endoftext|>{second}so<|endoftext|>"
    assert text_of(folder, "train") == "<|user|>q<|assistant|>a<|endoftext|>"
    zeros = len("be kind hi") + 2, len("be kind hiyohow?") + 4
    expected = [0] * zeros[0] + [255] * 3 + [0] * zeros[1] + [255] * 3
    assert read_bins(folder, "val.weight", 1) == expected
    assert read_bins(folder, "train.weight", 1) == [0, 0, 0, 255, 255]
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    special = gpt.Tokenizer(**meta["tokenizer"]).special_tokens
    assert read_bins(folder, "train")[::2][:2] == [special["<|user|>"], special["<|assistant|>"]]


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        ("prompt,response,rating\na,b,5\na,b,6\n", ("line 3", "'6'", "1 to 5")),
        ("prompt,response,rating\na,b,0.5\n", ("line 2", "'0.5'", "1 to 5")),
        ("prompt,response,rating\na,b,good\n", ("line 2", "'good'", "1 to 5")),
        ("prompt,response,rating\na,b,nan\n", ("line 2", "'nan'", "1 to 5")),
        ("prompt,response,rating\na,b,\n", ("line 2", "''", "1 to 5")),
        ("a,b\n1,2\n", ("line 2", "'text'", "a, b", "--text_column")),
        ("text,b\n1,2\n3\n", None),
        ("text,b\n,2\n", ("empty",)),
        ("b,text\n1\n", ("line 2", "text is 'None'")),
        ("prompt,response\nhi,Hello, world\n", ("line 2", "more fields", "quotes")),
        ('text\n"a\nb\n', ("not valid CSV",)),
        ("prompt,response,rating\na,b,1\na,b,5\n", ("nothing to learn for val", "rated above 1")),
        ("", ("empty",)),
        ("prompt,response\na,b\n", ("two examples",)),
    ],
)
def test_faulty_csv(refused, prepared, tmp_path, content, fragments):
    """The line and the value are named."""
    path = write(tmp_path / "faulty.csv", content)
    if fragments is None:
        prepared(input=path)
    else:
        refused(ValueError, path, *fragments, input=path)


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        ('{"text": "a"}\n{"text": \n', ("line 2", "JSON", "column")),
        ('{"text": "a"}\n\n{"text": 3}\n', ("line 3", "text is '3'")),
        ('["a"]\n', ("line 1", "no columns")),
        ("null\n", ("line 1", "no columns")),
        ('{"text": "\\ud800"}\n', ("line 1", "text is")),
        ('{"body": "a"}\n', ("line 1", "'text'", "body", "--text_column")),
        (
            '{"messages": [{"role": "robot", "content": "a"}]}\n',
            ("line 1", "robot", "system, user or assistant"),
        ),
        ('{"messages": "a"}\n', ("line 1", "'a'", "role")),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', ("line 1", "assistant")),
        ('{"messages": [{"role": "assistant", "content": 5}]}\n', ("line 1", "content is '5'")),
        ('{"prompt": "a", "response": null}\n', ("line 1", "response is 'None'")),
        ('{"prompt": "a", "response": "b", "rating": [1]}\n', ("line 1", "[1]", "1 to 5")),
    ],
)
def test_faulty_jsonl(refused, tmp_path, content, fragments):
    """The line and what is wrong with it are named."""
    path = write(tmp_path / "faulty.jsonl", content)
    refused(ValueError, path, *fragments, input=path)


ASKED = [("hi", "yo"), ("what?", "that"), ("how", "so")]
# What other projects call their columns
SHAPES = {
    "OpenAI": lambda q, a: {
        "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
    },
    "ShareGPT": lambda q, a: {
        "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]
    },
    "Alpaca": lambda q, a: {"instruction": q, "input": "", "output": a},
    "TRL": lambda q, a: {
        "prompt": [{"role": "user", "content": q}],
        "completion": [{"role": "assistant", "content": a}],
    },
    "questions": lambda q, a: {"question": q, "answer": a, "id": 3},
}


TURNED = ("user", "system", "assistant")  # in an order that is refused


def json_list(path, rows):
    return write(path, json.dumps(rows, indent=2))


def json_dict(path, rows):
    return write(path, json.dumps({"version": "1.0", "data": rows}))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (json_list, "e.json"),
        (json_dict, "e.json"),
        (jsonl, "e.json"),
        (jsonl, "e.jsonl"),
        (jsonl, "e.ndjson"),
    ],
)
def test_conversations_as_other_projects_write_them(prepared, tmp_path, make, name, shape):
    path = make(tmp_path / name, [SHAPES[shape](q, a) for q, a in ASKED])
    prepared(input=path)
    folder = tmp_path / "data" / "e"
    texts = [f"<|user|>{q}<|assistant|>{a}<|endoftext|>" for q, a in ASKED]
    assert text_of(folder, "val") + text_of(folder, "train") == "".join(texts)
    assert read_bins(folder, "val.weight", 1) == [0, 0, 0, 0, 255, 255, 255]


def test_alpacas_inputs_systems_and_history_are_part_of_the_prompt(prepared, tmp_path):
    row = {"instruction": "add", "input": "1 2", "output": "3", "system": "be brief"}
    row["history"] = [["hi", "yo"]]
    prepared(input=json_list(tmp_path / "e.json", [row, row]))
    text = "be brief<|user|>hi<|assistant|>yo"
    expected = f"{text}<|endoftext|>{text}<|user|>add\n1 2<|assistant|>3<|endoftext|>"
    assert text_of(tmp_path / "data" / "e", "val") == expected


@pytest.mark.parametrize("answer", ["response", "completion"])
def test_prompts_and_completions_are_joined_as_they_are(prepared, tmp_path, answer):
    rows = [{"prompt": "1+1=", answer: "2"}] * 2
    prepared(input=json_list(tmp_path / "e.json", rows))
    assert text_of(tmp_path / "data" / "e", "val") == "1+1=2<|endoftext|>"


@pytest.mark.parametrize(
    ("name", "separator"), [("e.csv", ";"), ("e.csv", "\t"), ("e.tsv", "\t"), ("e.TSV", "\t")]
)
def test_other_separators(prepared, tmp_path, capsys, name, separator):
    lines = [("question", "answer"), ("a, b?", "c,d"), ("e", "f")]
    prepared(input=write(tmp_path / name, "\n".join(map(separator.join, lines))))
    expected = "<|user|>a, b?<|assistant|>c,d<|endoftext|>"
    assert text_of(tmp_path / "data" / "e", "val") == expected
    assert (f"separated by {separator!r}" in capsys.readouterr().out) == (name == "e.csv")


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        ("[1, 2", ("line 1", "JSON", "column")),
        ('{"a": 1, "b": 2}', ("record 1", "'text'", "a, b")),
        ("3", ("no list of records",)),
        ('{"text": "a"}\n{"text":\n', ("line 2", "JSON")),
        ('[{"text": "a"}, 5]', ("record 2", "no columns")),
        (
            json.dumps([{"messages": [{"role": r, "content": r} for r in TURNED]}]),
            ("record 1", "system message", "first"),
        ),
        ('[{"conversations": [{"from": "tool", "value": "a"}]}]', ("record 1", "tool", "role")),
    ],
)
def test_faulty_json(refused, tmp_path, content, fragments):
    path = write(tmp_path / "faulty.json", content)
    refused(ValueError, path, *fragments, input=path)


def test_rows_on_standard_input(run_script, tmp_path):
    rows = "".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in ASKED)
    done = run_script("prepare.py", "--input=-", f"--data_dir={tmp_path}", stdin=rows)
    assert done.returncode == 0, done.stderr
    assert "one row per line" in done.stdout
    assert text_of(tmp_path / "stdin", "val") == "<|user|>hi<|assistant|>yo<|endoftext|>"


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"PK\x03\x04rest", "zip"),
        (b"PAR1rest", "--hf"),
        (b"%PDF-1.7\nrest", "PDF"),
        (b"BZh91AY", "bzip2"),
        (b"\xfd7zXZ\0rest", "xz"),
    ],
)
def test_files_that_are_no_text_are_named(refused, tmp_path, content, kind):
    path = write(tmp_path / "t.txt", content)
    refused(ValueError, path, kind, input=path)


def test_hidden_files_are_left_out(prepared, tmp_path, capsys):
    """Git's, macOS's and Jupyter's; linked folders are named, too."""
    folder = tmp_path / "texts"
    for name in (".git/a.txt", ".ipynb_checkpoints/b.txt", "._c.txt"):
        write(folder / name, "hidden")
    write(folder / "d.txt", "seen" * 9)
    write(folder / "sub" / "e.txt", "there" * 9)
    (folder / "link").symlink_to(tmp_path)
    _, _, text = prepared(input=str(folder))
    assert "hidden" not in text and "seen" in text and "there" in text
    out = capsys.readouterr().out
    assert "left out 3 hidden file(s)" in out and f"{folder / 'link'} is a link" in out


def test_a_column_of_a_text_is_refused(refused, tmp_path):
    path = write(tmp_path / "t.txt", "hello")
    refused(ValueError, "text_column", "not a table", input=path, text_column="body")


@pytest.mark.parametrize("content", [b"no gzip", gzip.compress(b"text " * 10**5)[:-200], b""])
def test_a_broken_gzip_file_is_named(refused, tmp_path, content):
    """Not a traceback of zlib's."""
    path = write(tmp_path / "odd.txt.gz", content)
    refused(ValueError, path, "empty" if not content else "gzip", input=path)


def test_standard_input(run_script, tmp_path):
    """--input=- reads a text from a pipe; the name is stdin unless one is given."""
    done = run_script("prepare.py", "--input=-", f"--data_dir={tmp_path}", stdin="hello\n" * 10)
    assert (done.returncode, done.stderr) == (0, "")
    assert (
        text_of(tmp_path / "stdin", "train") + text_of(tmp_path / "stdin", "val") == "hello\n" * 10
    )


# ---- tokenizers


def test_bpe_is_trained_on_training_text_only_and_saved(prepared, tmp_path, capsys):
    """The words of the last tenth do not enter; 260 ids at least, each id below vocab_size."""
    text = "the cat and the dog. " * 90 + "zyx zyx zyx zyx zyx. " * 10
    _, meta, back = prepared(input=write(tmp_path / "t.txt", text), tokenizer="bpe", vocab_size=270)
    assert back == text
    assert meta["vocab_size"] == 270
    tokenizer = gpt.Tokenizer(**meta["tokenizer"])
    assert len(tokenizer.encode(" cat and")) <= 3
    assert len(tokenizer.encode(" zyx")) == 4
    assert "vocabulary of 270 tokens" in capsys.readouterr().out


def test_a_text_too_small_for_vocab_size_gets_fewer(prepared, tmp_path):
    """No token is made up: abab has two merges to give."""
    _, meta, _ = prepared(
        input=write(tmp_path / "t.txt", "abab" * 5), tokenizer="bpe", vocab_size=4096
    )
    assert 260 < meta["vocab_size"] < 280


def test_the_bpe_sample_is_bounded_and_even():
    """A tenth of the bytes is every tenth piece; unknown size: the first; special tokens never."""
    segments = [("val" if i % 7 == 0 else "train", f"{i:09d},", 255) for i in range(700)]
    segments.insert(5, ("train", prepare.EOT, 255))
    taken = [int(text[:-1]) for text in prepare.bpe_sample(segments, 6000, 600)]
    train = [i for i in range(700) if i % 7]
    places = [train.index(i) for i in taken]
    assert len(taken) == 60
    assert (places[0], min(np.diff(places)), max(np.diff(places))) == (0, 10, 10)
    assert [int(text[:-1]) for text in prepare.bpe_sample(segments, None, 600)] == train[:60]
    assert len(list(prepare.bpe_sample(segments, 6000, 1))) == 1


def test_a_tokenizer_is_taken_from_a_data_set_or_checkpoint(prepared, tmp_path):
    """--tokenizer=PATH: the ids are those of the other data set; a run's folder serves as well."""
    path = write(tmp_path / "a.txt", "hello world " * 50)
    _, first, _ = prepared(input=path, tokenizer="bpe", vocab_size=270)
    state = {"model": {}, "model_args": {}, "tokenizer": first["tokenizer"]}
    (tmp_path / "run").mkdir()
    gpt.save_checkpoint(tmp_path / "run" / "best.pt", state)
    for source in (tmp_path / "data" / "a", tmp_path / "run", tmp_path / "run" / "best.pt"):
        prepare.prepare(
            data_dir=tmp_path / "more",
            tokenizer=source,
            input=write(tmp_path / "b.txt", "world of hello " * 20),
        )
        meta = json.loads((tmp_path / "more" / "b" / "meta.json").read_text(encoding="utf-8"))
        assert meta["tokenizer"] == first["tokenizer"]
        assert text_of(tmp_path / "more" / "b", "train") == ("world of hello " * 20)[:270]


def test_a_tokenizer_is_taken_from_a_hugging_face_folder(prepared, tmp_path):
    """Ids are transformers'; answers end with its end token; a conversation has its begin token."""
    special = "</s> <|user|> <|assistant|>"
    original = gpt.Tokenizer(
        "char", "\n eholrwd", special=special, end="</s>", begin="</s>", chat="%s||%s:||%s"
    )
    (tmp_path / "model").mkdir()
    hub.write_tokenizer(original, tmp_path / "model", 64)
    rows = [
        {
            "messages": [
                {"role": "user", "content": "hello"},
                {"role": "assistant", "content": "world"},
            ]
        }
    ] * 2
    name, _, _ = prepared(
        input=jsonl(tmp_path / "c.jsonl", rows), tokenizer=str(tmp_path / "model")
    )
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    text = "</s><|user|>hello<|assistant|>world</s>"
    expected = theirs(text, add_special_tokens=False).input_ids
    data = gpt.Data(tmp_path / "data" / name, 1)
    assert data.tokens["train"][np.arange(len(expected))].tolist() == expected
    assert len(data.tokens["train"]) == len(expected) == 14
    assert data.tokenizer.state == hub.read_tokenizer(tmp_path / "model").state


def test_an_unknown_character_is_named_with_its_position(prepared, refused, tmp_path):
    """A char vocabulary from elsewhere lacks the q."""
    gpt.save_checkpoint(
        tmp_path / "c.pt",
        {"model": {}, "model_args": {}, "tokenizer": gpt.Tokenizer("char", "abc").state},
    )
    path = write(tmp_path / "t.txt", "abcabqabc")
    refused(ValueError, "'q'", "character 5", input=path, tokenizer=str(tmp_path / "c.pt"))


def test_a_tokenizer_without_endoftext_is_no_good_for_documents(refused, tmp_path):
    """It could not mark where they end."""
    gpt.save_checkpoint(
        tmp_path / "c.pt",
        {"model": {}, "model_args": {}, "tokenizer": gpt.Tokenizer("char", "abc").state},
    )
    path = jsonl(tmp_path / "t.jsonl", [{"text": "abc"}] * 3)
    refused(ValueError, "<|endoftext|>", input=path, tokenizer=str(tmp_path / "c.pt"))


@pytest.mark.parametrize(
    ("values", "fragments"),
    [
        ({"tokenizer": "gpt9"}, ("'gpt9'", "char, bpe", "gpt2")),
        ({"tokenizer": "bpe", "vocab_size": 259}, ("vocab_size is 259", "260")),
        ({"clean": "html"}, ("'html'", "wikitext")),
        ({"name": "a/b"}, ("'a/b'", "--data_dir")),
        ({"name": ".."}, ("'..'", "--data_dir")),
        ({"max_tokens": -1}, ("max_tokens is -1",)),
        ({"shard_tokens": 0}, ("shard_tokens is 0",)),
        ({"bpe_sample_mb": 0.0}, ("bpe_sample_mb is 0",)),
        ({"workers": -2}, ("workers is -2",)),
    ],
)
def test_settings_without_meaning_are_refused(refused, tmp_path, values, fragments):
    """The setting and its value are named."""
    refused(ValueError, *fragments, input=write(tmp_path / "t.txt", "abcd" * 20), **values)


# ---- cleaning


@pytest.mark.parametrize(
    ("line", "cleaned"),
    [
        (" = Robert Boulter = \n", "# Robert Boulter"),
        (" = = Early life = = \n", "## Early life"),
        (" = = = 2000 – 2005 = = = \n", "### 2000 – 2005"),
        (" \n", ""),
        (
            " It cost $ 1 @,@ 000 @.@ 50 ( or so ) , in well @-@ known shops . \n",
            "It cost $ 1,000.50 (or so), in well-known shops.",
        ),
        (' He said " no " , and left ; she did n\'t . \n', 'He said "no", and left; she did n\'t.'),
        (" They 're at John 's house : it 's big ! \n", "They're at John's house: it's big!"),
        (" Really ? [ sic ] ... \n", "Really? [sic]..."),
        ("Pi is 3.14, not 1,000 or .5 or 1:30.\n", "Pi is 3.14, not 1,000 or .5 or 1:30."),
        (" rate of .5 and :) \n", "rate of .5 and:)"),
        ("    if x [ 0 ] . y : return 3.14 , 1\n", "    if x [ 0 ] . y : return 3.14 , 1"),
        ("\treturn a [ 1 ] ;\n", "\treturn a [ 1 ] ;"),
        ("print(f(1, 2.5), x[3:4])\n", "print(f(1, 2.5), x[3:4])"),
        (" a <unk> of <unk> , b \n", "a <unk> of <unk>, b"),
    ],
)
def test_clean_line(line, cleaned):
    """Each kind of markup and spacing; numbers and code keep their form."""
    assert documents.clean_line(line) == cleaned


def test_wikitext_is_cleaned_article_by_article(prepared, tmp_path):
    """Articles begin at their titles and are documents; lines stay lines."""
    text = " \n = A = \n \n First , yes . \n Second . \n = = S = = \n \n x = 3 @.@ 14 \n \n"
    text += " = B = \n \n It . \n"
    prepared(input=write(tmp_path / "w.txt", text), clean="wikitext")
    folder = tmp_path / "data" / "w"
    assert text_of(folder, "val") == "# A\n\nFirst, yes.\nSecond.\n## S\n\nx = 3.14\n<|endoftext|>"
    assert text_of(folder, "train") == "# B\n\nIt.\n<|endoftext|>"


# ---- scale: shards, processes, interruption


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A folder of texts: one of 2.3 MB, one of 1.2 MB without space or line end, 40 small ones."""
    folder = tmp_path_factory.mktemp("large") / "texts"
    rng = np.random.default_rng(0)
    words = np.array(
        ["the", "cat", "sat", "on", "mat,", "and\n", "\n\n", "é", "Tom's", "3.14", " ", "it."]
    )
    write(folder / "a.txt", "x" * 1_200_000)
    write(folder / "b.txt", " ".join(words[rng.integers(12, size=600_000)]))
    for i in range(40):
        write(folder / f"c{i:02d}.md", " ".join(words[rng.integers(12, size=1 + 400 * i)]))
    return folder


@pytest.fixture(scope="module")
def whole(large, tmp_path_factory):
    """The data set of `large` as it comes without any setting."""
    root = tmp_path_factory.mktemp("whole")
    prepare.prepare(input=large, data_dir=root)
    return root / "texts"


@contextlib.contextmanager
def interruption():
    """Ctrl-C when three batches are written."""

    def interrupted(*args):
        yield from itertools.islice(encoded(*args), 3)
        raise KeyboardInterrupt

    encoded = prepare.encoded
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "encoded", interrupted)
        yield


def run_prepare(*arguments):
    """Start prepare.py as a process and return it."""
    command = [sys.executable, Path(prepare.__file__), *arguments]
    return subprocess.Popen(
        [*map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def files_of(folder):
    """Return {name: content} of a data set."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_pieces_and_processes_change_no_token(large, prepared, tmp_path):
    """BPE over blocks, by two processes, saved often: the ids of each text encoded whole."""
    _, meta, _ = prepared(
        input=large, tokenizer="bpe", vocab_size=400, workers=2, shard_tokens=100_000
    )
    tokenizer, folder = gpt.Tokenizer(**meta["tokenizer"]), tmp_path / "data" / "texts"
    paths = sorted(large.iterdir())
    for split in ("train", "val"):
        chosen = [p for i, p in enumerate(paths) if (i % 10 == 0) == (split == "val")]
        expected = []
        for path in chosen:
            expected += tokenizer.encode(path.read_bytes().decode())
            expected.append(tokenizer.special_tokens["<|endoftext|>"])
        assert np.fromfile(folder / f"{split}.bin", "<u2").tolist() == expected
        assert meta[f"{split}_tokens"] == len(expected)
        assert meta[f"{split}_bytes"] == sum(path.stat().st_size for path in chosen)


def test_often_saved_is_never_saved(large, whole, prepared, tmp_path):
    """The same files, whatever shard_tokens is."""
    prepared(input=large, shard_tokens=1)
    assert files_of(tmp_path / "data" / "texts") == files_of(whole)


def test_a_damaged_parquet_file_is_named(tmp_path):
    """The first rows can be read; the error comes from the middle of the stream."""
    folder = tmp_path / "rows"
    folder.mkdir()
    texts = [random.Random(i).randbytes(200).hex() for i in range(4000)]
    datasets.Dataset.from_dict({"text": texts}).to_parquet(folder / "a.parquet", batch_size=500)
    content = bytearray((folder / "a.parquet").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 50_000] = b"\xff" * 50_000
    (folder / "a.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"rows, train cannot be read after \d+ rows \(\w+: "):
        prepare.prepare(
            hf=folder, name="t", data_dir=tmp_path / "data", tokenizer="char", text_column="text"
        )


@pytest.mark.parametrize("answer", ["response", "completion"])
def test_a_system_text_beside_a_plain_prompt_is_refused(answer):
    """A prompt and its response are plain text, in which a system prompt has no place."""
    row = {"system": "Be brief.", "prompt": "2+2?", answer: "4"}
    with pytest.raises(ValueError, match=f"rename the columns prompt and {answer} to question"):
        documents.row_document("here", row)
    row |= {"system": ""}
    assert [text for text, _ in documents.row_document("here", row)][:2] == ["2+2?", "4"]


def test_the_standard_library_is_taken_without_its_tests(tmp_path, monkeypatch):
    """Also if Python itself lies below a folder that is named like these."""
    folder = tmp_path / "tests" / "lib"
    for name in ("os.py", "json/decoder.py", "test/os.py", "json/tests/a.py", "site-packages/b.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("pass\n")
    monkeypatch.setattr(prepare.sysconfig, "get_path", lambda name: str(folder))
    names = {str(path.relative_to(folder)) for path in prepare.library_files()}
    assert names == {"os.py", str(Path("json") / "decoder.py")}


def test_killed_and_started_again(large, tmp_path):
    """The files are those of a run that was let be, and no process of the killed one stays."""
    options = [
        f"--input={large}",
        "--tokenizer=bpe",
        "--vocab_size=300",
        "--shard_tokens=1",
        "--workers=2",
    ]
    whole = run_prepare(*options, f"--data_dir={tmp_path / 'whole'}")
    assert whole.wait(120) == 0, whole.stdout.read()
    progress = tmp_path / "cut" / "texts.part" / "progress.json"
    killed = run_prepare(*options, f"--data_dir={tmp_path / 'cut'}")
    while killed.poll() is None and not (
        progress.exists() and json.loads(progress.read_text())["batches"] >= 3
    ):
        time.sleep(0.001)
    killed.send_signal(signal.SIGSTOP)  # or it might end before its workers are known
    assert killed.poll() is None
    children = Path(f"/proc/{killed.pid}/task/{killed.pid}/children")
    workers = children.read_text().split() if children.exists() else []
    killed.kill()
    killed.wait()
    killed.stdout.close()
    assert not (tmp_path / "cut" / "texts").exists()
    again = run_prepare(*options, f"--data_dir={tmp_path / 'cut'}")
    out, _ = again.communicate(timeout=120)
    assert again.returncode == 0, out
    assert "resuming after" in out
    assert "trained a vocabulary" not in out
    assert files_of(tmp_path / "cut" / "texts") == files_of(tmp_path / "whole" / "texts")
    assert [p.name for p in (tmp_path / "cut").iterdir()] == ["texts"]
    assert not [
        pid
        for pid in workers
        if Path(f"/proc/{pid}/cmdline").exists()
        and b"prepare" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


def test_ctrl_c_keeps_the_work(large, tmp_path):
    """One line says how to resume, and exit code 130."""
    process = run_prepare(
        f"--input={large}", f"--data_dir={tmp_path}", "--shard_tokens=1", "--workers=2"
    )
    progress = tmp_path / "texts.part" / "progress.json"
    while process.poll() is None and not progress.exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert "Traceback" not in out
    assert "the same command resumes it" in out
    assert progress.exists()


@pytest.mark.parametrize("close", ["1>&- 2>&-", "| true"])
def test_a_closed_output_ends_in_no_traceback(tmp_path, close):
    """A shell may close the output; where nobody reads a pipe, the exit code is that of SIGPIPE."""
    path = write(tmp_path / "t.txt", "abcd" * 10)
    command = shlex.join([sys.executable, prepare.__file__, f"--input={path}"])
    line = f"set -o pipefail; {command} --data_dir={tmp_path / 'd'} {close}"
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, check=False, timeout=60
    )
    assert "Traceback" not in done.stdout + done.stderr
    assert done.returncode in ((0, 141) if "|" in close else (0,))
    assert (tmp_path / "d" / "t" / "meta.json").exists()


def test_ctrl_c_is_not_lost_where_the_pool_breaks():
    """A terminal's Ctrl-C may end a process that has just begun, too; the interrupt counts."""
    with pytest.raises(KeyboardInterrupt), prepare.uninterrupted():
        signal.raise_signal(signal.SIGINT)
        raise concurrent.futures.process.BrokenProcessPool


@pytest.mark.parametrize("place", ["submit", "result"])
def test_ctrl_c_waits_for_the_processes_queues(large, prepared, monkeypatch, place):
    """Raised within the pool it would now and then leave a queue locked, and hang the command."""
    within, finished = [], []

    class Future(concurrent.futures.Future):
        def result(self, timeout=None):
            return press(lambda: super(Future, self).result(timeout), "result")

    class Pool(concurrent.futures.ProcessPoolExecutor):
        def submit(self, *args):
            return press(lambda: super(Pool, self).submit(*args), "submit")

    def press(call, name):
        try:
            if name == place:
                signal.raise_signal(signal.SIGINT)
            returned = call()
            finished.append(name)
            return returned
        except KeyboardInterrupt:
            within.append(name)
            raise

    monkeypatch.setattr(prepare, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr("concurrent.futures._base.Future", Future)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        prepared(input=str(large), workers=2)
    assert not within
    assert finished.count(place) == 1
    assert signal.getsignal(signal.SIGINT) is before


LINES = ["word " * 60_000 + f"end {i} " for i in range(6)]  # each fills a batch


def lines_file(path, change=str):
    """Write LINES as the documents of a .jsonl file, each changed, and return its path."""
    return jsonl(path, [{"text": change(line)} for line in LINES])


@pytest.mark.parametrize("change", ["nothing", "text", "setting", "file"])
def test_another_text_or_setting_begins_anew(prepared, tmp_path, capsys, change):
    """What an interrupted run left serves only the same text and settings; the result is right."""
    path = lines_file(tmp_path / "t.jsonl")
    with pytest.raises(KeyboardInterrupt), interruption():
        prepared(input=path, shard_tokens=1, workers=1)
    part = tmp_path / "data" / "t.part"
    if change == "text":
        lines_file(tmp_path / "t.jsonl", lambda line: line.replace("end 1", "End 1"))
    if change == "file":
        os.truncate(part / "train.bin", 100_000)
    column = "text" if change == "setting" else ""
    prepared(input=path, shard_tokens=1, workers=1, text_column=column)
    out = capsys.readouterr().out
    assert ("resuming after" in out) == (change != "setting")
    assert ("starting over" in out) == (change != "nothing")
    lines = [line.replace("end 1", "End 1") if change == "text" else line for line in LINES]
    train, val = (text_of(tmp_path / "data" / "t", split) for split in ("train", "val"))
    assert val == f"{lines[0]}<|endoftext|>"
    assert train == "".join(f"{line}<|endoftext|>" for line in lines[1:])


@pytest.mark.parametrize("n_written", range(7))
def test_what_was_written_after_the_last_save_is_cut_off(tmp_path, monkeypatch, n_written):
    """Stopped after each batch, saved after each second one: the files of an uninterrupted run."""
    path = lines_file(tmp_path / "t.jsonl")
    options = {"input": path, "shard_tokens": 400_000, "workers": 1}
    prepare.prepare(data_dir=tmp_path / "whole", **options)
    add = prepare.TokenFiles.add
    n_added = 0

    def add_some(files, batch, arrays):
        nonlocal n_added
        add(files, batch, arrays)
        n_added += 1
        if n_added == n_written:
            with open(files.part / "train.bin", "ab") as file:
                file.write(b"half of a batch")
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare.TokenFiles, "add", add_some)
        with contextlib.suppress(KeyboardInterrupt):
            prepare.prepare(data_dir=tmp_path / "cut", **options)
    assert (tmp_path / "cut" / "t.part").exists() == (3 <= n_written <= 6)
    prepare.prepare(data_dir=tmp_path / "cut", **options)
    assert files_of(tmp_path / "cut" / "t") == files_of(tmp_path / "whole" / "t")


ROWS = [{"prompt": f"{i}+1=", "response": str(i + 1)} for i in range(40)]


@pytest.mark.parametrize("fatal", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("n_calls", range(14))
def test_interrupted_while_the_files_are_moved(tmp_path, monkeypatch, capsys, n_calls, fatal):
    """Before each call that changes a folder: an older data set is gone, or the new one is whole.

    The same command then moves what is there, without tokenizing anything again.
    """
    rows = jsonl(tmp_path / "t.jsonl", ROWS)
    prepare.prepare(input=rows, data_dir=tmp_path / "whole")
    expected = files_of(tmp_path / "whole" / "t")
    root = tmp_path / "data"
    old = write(tmp_path / "old" / "t.jsonl", Path(rows).read_text().replace("+", "plus"))
    prepare.prepare(input=old, data_dir=root)
    write(root / "t" / "train_0000.bin", b"of an older version")
    before = files_of(root / "t")
    n_left = None

    def counted(call):
        def wrapped(*args, **kwargs):
            nonlocal n_left
            if n_left == 0:
                raise fatal
            if n_left is not None:
                n_left -= 1
            return call(*args, **kwargs)

        return wrapped

    publish = prepare.publish

    def start_counting(*args):
        nonlocal n_left
        n_left = n_calls
        return publish(*args)

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "publish", start_counting)
        patch.setattr(os, "replace", counted(os.replace))
        patch.setattr(Path, "unlink", counted(Path.unlink))
        patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
        try:
            prepare.prepare(input=rows, data_dir=root)
            stopped = False
        except (KeyboardInterrupt, OSError):
            stopped = True
    assert stopped == (n_calls < 13)
    there = files_of(root / "t")
    if "meta.json" in there:
        assert there in (before, expected)
    capsys.readouterr()
    encoded = []
    encode_batch = prepare.Encoder.encode_batch
    monkeypatch.setattr(
        prepare.Encoder,
        "encode_batch",
        lambda *args: encoded.append(args) or encode_batch(*args),
    )
    prepare.prepare(input=rows, data_dir=root)
    assert files_of(root / "t") == expected
    assert not (root / "t.part").exists()
    if "meta.json" not in there:
        assert "resuming after" in capsys.readouterr().out
        assert not encoded


def test_a_data_set_made_elsewhere_meanwhile_is_not_taken_apart(prepared, tmp_path, monkeypatch):
    """Between an interrupted move and the same command another one filled the folder."""
    rows = jsonl(tmp_path / "t.jsonl", [{"text": text} for text in TEXTS])
    root = tmp_path / "data"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
        patch.setattr(prepare, "take_back", lambda *args: pytest.fail())
        prepare.prepare(input=rows, data_dir=root)
    expected = files_of(root / "t")
    (root / "t" / "meta.json").rename(root / "t.part" / "meta.json")
    gpt.write_dataset(root / "t", "ab" * 500, gpt.Tokenizer("char", "ab"), "another")
    prepare.prepare(input=rows, data_dir=root)
    assert files_of(root / "t") == expected


def test_max_tokens_bounds_both_splits(large, whole, prepared, tmp_path):
    """10,000 tokens of training and validation together, the first of each, and bytes to match."""
    _, meta, _ = prepared(input=str(large), name="some", max_tokens=10_000, val_fraction=0.1)
    assert (meta["train_tokens"], meta["val_tokens"]) == (9000, 1000)
    folder = tmp_path / "data" / "some"
    for split, n in (("train", 9000), ("val", 1000)):
        assert read_bins(folder, split) == read_bins(whole, split)[:n]
        text = text_of(folder, split).replace("<|endoftext|>", "")
        assert meta[f"{split}_bytes"] == len(text.encode())


def test_a_full_disk_is_a_sentence_and_leaves_no_data_set(tmp_path, prepared, monkeypatch):
    """No half of it; an older data set of that name is as it was."""
    path = write(tmp_path / "t.txt", "abcd" * 100)
    prepared(input=path)
    before = files_of(tmp_path / "data" / "t")
    real_open = open

    def full(file, mode="r", *args, **kwargs):
        if "a" in mode:
            raise OSError(28, "No space left on device")
        return real_open(file, mode, *args, **kwargs)

    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(OSError, match=r"t\.part: No space left on device"):
        prepared(input=write(tmp_path / "t.txt", "xyz" * 100))
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["t"]
    assert files_of(tmp_path / "data" / "t") == before


def test_preparing_again_replaces_shards_and_weights_but_no_other_file(prepared, tmp_path):
    """Nothing of the older data set is left to be read; a file of the user's stays."""
    folder = tmp_path / "data" / "t"
    rows = [{"prompt": "ab", "response": "cd" * 10}] * 30
    prepared(input=jsonl(tmp_path / "t.jsonl", rows))
    write(folder / "train_0000.bin", b"old")
    write(folder / "mine.txt", b"keep")
    prepared(input=write(tmp_path / "t.txt", "abcd" * 50))
    assert sorted(p.name for p in folder.iterdir()) == [
        "meta.json",
        "mine.txt",
        "train.bin",
        "val.bin",
    ]


def test_a_large_vocabulary_takes_four_bytes(prepared, tmp_path):
    """70,000 different characters do not fit two bytes."""
    text = "".join(chr(0x10000 + i) for i in range(70_000)) * 2
    prepare.prepare(input=write(tmp_path / "t.txt", text), data_dir=tmp_path / "data")
    meta = json.loads((tmp_path / "data" / "t" / "meta.json").read_text(encoding="utf-8"))
    assert (meta["dtype"], meta["vocab_size"]) == ("uint32", 70_000)
    assert read_bins(tmp_path / "data" / "t", "val", 4) == [
        i % 70_000 for i in range(126_000, 140_000)
    ]


def test_gpt_and_prepare_make_the_same_data_set(missing, prepared, tmp_path):
    """pydoc by either way: the same bytes."""
    missing("pydoc").rename(tmp_path / "by_gpt")
    prepared(dataset="pydoc")
    one, two = files_of(tmp_path / "by_gpt"), files_of(tmp_path / "data" / "pydoc")
    assert json.loads(one.pop("meta.json")) == json.loads(two.pop("meta.json"))
    assert one == two


# ---- what a data set holds


def test_info(prepared, tmp_path, capsys, monkeypatch):
    """Lengths, counts and an excerpt, computed by hand; blocks of any size give the same."""
    texts = ["a" * n + "b" for n in range(20)]
    prepared(input=jsonl(tmp_path / "t.jsonl", [{"text": text} for text in texts]))
    capsys.readouterr()
    prepare.prepare(info="t", data_dir=tmp_path / "data")
    out = capsys.readouterr().out
    assert "20, tokens in each: min 1, median 10, p90 18, p95 19, max 20, mean 10.5" in out
    assert "'a' 190, 'b' 20, '<|endoftext|>' 20" in out
    assert "3 never" in out
    assert "char, vocabulary of 6 as uint16" in out
    n_bytes = [
        sum(len(text) for i, text in enumerate(texts) if (i % 10 == 0) == val)
        for val in (False, True)
    ]
    assert (
        f"{n_bytes[0] + 18:,} tokens, {n_bytes[0]:,} bytes, {n_bytes[0] / (n_bytes[0] + 18):.2f}"
        in out
    )
    assert "ab<|endoftext|>aab" in out
    assert str(tmp_path / "t.jsonl") in out
    read = prepare.read_ids
    monkeypatch.setattr(prepare, "read_ids", lambda tokens: read(tokens, size=7))
    prepare.prepare(info="t", data_dir=tmp_path / "data")
    assert capsys.readouterr().out.split("begins")[0] == out.split("begins")[0]


def test_info_of_nothing(run_script, tmp_path):
    """One sentence."""
    done = run_script("prepare.py", "--info=none", f"--data_dir={tmp_path}")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error:")
    assert "none" in done.stderr


# ---- Hugging Face


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    """A local folder like a data set of the hub: two files for train, one for validation."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    pytest.importorskip("datasets")
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "hub" / "data"
    folder.mkdir(parents=True)
    for name, texts in (
        ("train-00000-of-00002", ["one", "two"]),
        ("train-00001-of-00002", ["three", "four"]),
        ("validation-00000-of-00001", ["five"]),
    ):
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / f"{name}.parquet")
    return folder.parent


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_parquet_is_streamed_and_its_validation_split_kept(hub_folder, prepared, tmp_path, kind):
    """Rows are documents; validation becomes val."""
    name, _, _ = prepared(hf=str(hub_folder), tokenizer=kind, vocab_size=270)
    assert name == "hub"
    folder = tmp_path / "data" / "hub"
    assert text_of(folder, "train") == "".join(
        f"{t}<|endoftext|>" for t in ("one", "two", "three", "four")
    )
    assert text_of(folder, "val") == "five<|endoftext|>"


def test_jsonl_examples_of_a_hub_folder(prepared, tmp_path, monkeypatch):
    """Without a validation split documents are drawn; prompts and ratings work as in files."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    pytest.importorskip("datasets")
    rows = [{"prompt": "a", "response": "bc", "rating": 1 + (i + 1) % 5} for i in range(20)]
    jsonl(tmp_path / "chat" / "train.jsonl", rows)
    prepared(hf=str(tmp_path / "chat"), tokenizer="bpe", vocab_size=260)
    folder = tmp_path / "data" / "chat"
    assert text_of(folder, "val") == "abc<|endoftext|>" * 2
    assert read_bins(folder, "val.weight", 1) == [0, 64, 64, 64] * 2
    expected = [round(255 * ((i + 1) % 5) / 4) for i in range(20) if i % 10]
    assert read_bins(folder, "train.weight", 1)[3::4] == expected


@pytest.mark.parametrize("clean", ["wikitext", ""])
def test_wikitexts_rows_are_lines_of_articles(prepared, tmp_path, monkeypatch, clean):
    """The hub's wikitext has a line a row, blank ones too; cleaned only if asked for."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    pytest.importorskip("datasets")
    lines = ["", " = A = \n", "", " It is , 3 @.@ 5 . \n", " = B = \n", " Yes ! \n"]
    jsonl(tmp_path / "local" / "train.jsonl", [{"text": line} for line in lines])
    jsonl(tmp_path / "local" / "validation.jsonl", [{"text": line} for line in lines[:4]])
    monkeypatch.setitem(prepare.HUB_DATASETS, "wikitext-2", (str(tmp_path / "local"), ""))
    prepared(dataset="wikitext-2", tokenizer="bpe", vocab_size=260, clean=clean)
    folder = tmp_path / "data" / "wikitext-2"
    if clean:
        a, b = "# A\nIt is, 3.5.\n", "# B\nYes!\n"
    else:
        a, b = " = A = \n It is , 3 @.@ 5 . \n", " = B = \n Yes ! \n"
    assert text_of(folder, "train") == f"{a}<|endoftext|>{b}<|endoftext|>"
    assert text_of(folder, "val") == f"{a}<|endoftext|>"


def test_a_data_set_that_hugging_face_lacks_is_a_sentence(refused, tmp_path, monkeypatch):
    """Whatever the library raises; a local folder is not a hub's name."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    pytest.importorskip("datasets")
    (tmp_path / "empty").mkdir()
    refused(ValueError, str(tmp_path / "empty"), "--hf_config", hf=str(tmp_path / "empty"))


def test_without_the_library_one_sentence_names_the_command(refused, monkeypatch):
    """pip install datasets."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    for values in ({"hf": "some/thing"}, {"dataset": "tinystories", "hf": ""}):
        refused(ValueError, "pip install datasets", **values)


@pytest.mark.parametrize("name", sorted(prepare.HUB_DATASETS))
def test_short_names_reach_the_hub(monkeypatch, name):
    """The identifier and configuration are those of the hub's pages; wikitext's rows are lines."""
    asked = []

    def hub_documents(path, config, *rest, by_lines):
        asked.append((path, config, by_lines))
        return iter(())

    monkeypatch.setattr(prepare, "hub_documents", hub_documents)
    source = prepare.find_source(prepare.chosen_settings({"dataset": name}))
    list(source.documents())
    assert source.streamed
    known = {
        "wikitext-2": ("Salesforce/wikitext", "wikitext-2-raw-v1", True),
        "wikitext-103": ("Salesforce/wikitext", "wikitext-103-raw-v1", True),
        "openwebtext": ("Skylion007/openwebtext", "", False),
        "tinystories": ("roneneldan/TinyStories", "", False),
        "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT", False),
    }
    assert asked == [known[name]]


# ---- mistakes and odd inputs


def test_rows_are_cleaned_each_for_itself(prepared, tmp_path):
    """--clean on a table keeps its documents apart."""
    rows = [
        {"text": text} for text in ("Hello well @-@ known one", "second , doc\nline .", "third .")
    ]
    prepared(input=jsonl(tmp_path / "r.jsonl", rows), clean="wikitext")
    folder = tmp_path / "data" / "r"
    assert text_of(folder, "val") == "Hello well-known one<|endoftext|>"
    assert text_of(folder, "train") == "second, doc\nline.<|endoftext|>third.<|endoftext|>"


@pytest.mark.parametrize("name", ["a.jsonl.csv", "A.CSV", "a.csv"])
def test_the_last_suffix_tells_the_kind(prepared, tmp_path, name):
    """In either case of letters, whatever comes before it."""
    prepared(input=write(tmp_path / name, "text\none\ntwo\n"), name="x")
    folder = tmp_path / "data" / "x"
    assert text_of(folder, "val") + text_of(folder, "train") == "one<|endoftext|>two<|endoftext|>"


@pytest.mark.parametrize("change", [{"tokenizer": "gtp2"}, {"input": "gone.jsonl"}, {"workers": 1}])
def test_a_mistake_on_the_way_on_costs_nothing(prepared, tmp_path, capsys, change):
    """After an interruption a wrong flag leaves the work, and --workers is not another data set."""
    path = lines_file(tmp_path / "t.jsonl")
    with pytest.raises(KeyboardInterrupt), interruption():
        prepared(input=path, shard_tokens=1, workers=2, name="t")
    if "workers" not in change:
        with pytest.raises((ValueError, OSError)):
            prepared(**({"input": path} | change))
    prepared(input=path, workers=change.get("workers", 2))
    assert "resuming after" in capsys.readouterr().out
    assert text_of(tmp_path / "data" / "t", "train") == "".join(
        f"{line}<|endoftext|>" for line in LINES[1:]
    )


def test_max_tokens_cuts_weights_with_the_tokens(prepared, tmp_path):
    """As many weights as tokens, and the right ones."""
    rows = [{"prompt": f"{i:03d}", "response": "yes"} for i in range(100)]
    prepared(input=jsonl(tmp_path / "t.jsonl", rows), max_tokens=100)
    for split, n in (("train", 90), ("val", 10)):
        weights = read_bins(tmp_path / "data" / "t", f"{split}.weight", 1)
        assert weights == ([0, 0, 0, 255, 255, 255, 255] * 15)[:n]
        assert len(read_bins(tmp_path / "data" / "t", split)) == n


def test_few_batches_are_ahead_of_the_processes(prepared, tmp_path):
    """Memory stays constant: no more than a few batches are read before the first is written."""
    taken = []

    def batches():
        for i in range(100):
            taken.append(i)
            yield [("train", "abc", 255)]

    state = gpt.Tokenizer("char", "abc").state
    next(prepare.encoded(batches(), state, "uint16", 2))
    assert len(taken) < 20


def test_info_of_a_damaged_data_set(prepared, tmp_path):
    """A sentence that names the folder, no traceback; a text's one document has all its tokens."""
    prepared(input=write(tmp_path / "t.txt", "abcd" * 25))
    assert prepare.document_lengths(gpt.Data(tmp_path / "data" / "t", 1)).tolist() == [90, 10]
    (tmp_path / "data" / "t" / "train.bin").unlink()
    with pytest.raises(ValueError, match=r"data.t.*train.*again"):
        prepare.prepare(info="t", data_dir=tmp_path / "data")


# ---- progress


class Clock:
    """Stands in for the module time: it has no wall clock, and moves only when told."""

    def __init__(self):
        self.now = 1e6

    def monotonic(self):
        """Return the seconds since some moment."""
        return self.now


@pytest.fixture
def clock(monkeypatch):
    """A Clock that prepare.py reads."""
    clock = Clock()
    monkeypatch.setattr(prepare, "time", clock)
    return clock


def test_durations_need_no_wall_clock(clock, prepared, tmp_path, capsys):
    """Time may stand still, too: nothing is divided by 0."""
    path = lines_file(tmp_path / "t.jsonl")
    prepared(input=path, tokenizer="bpe", vocab_size=270, workers=1)
    assert "in 0 s" in capsys.readouterr().out


def test_progress_lines(clock, capsys):
    """At most one in 5 s; the time left is that of the rest at the speed of this run."""
    progress = prepare.Progress(40_000_000, 0, 10_000_000, 2_000_000)
    progress.show(12_000_000, 2_400_000)
    assert capsys.readouterr().out == ""
    clock.now += 10
    progress.show(20_000_000, 4_000_000)
    assert capsys.readouterr().out == "20 MB, 4,000,000 tokens, 200,000/s, 0:00:20 left\n"
    clock.now += 4
    progress.show(21_000_000, 4_100_000)
    assert capsys.readouterr().out == ""


def test_progress_towards_max_tokens(clock, capsys):
    """Where the bytes of all are not known, the tokens tell the time left, or else nothing does."""
    progress = prepare.Progress(None, 1000, 0, 0)
    clock.now += 6
    progress.show(4_000_000, 250)
    assert capsys.readouterr().out == "4 MB, 250 tokens, 42/s, 0:00:18 left\n"
    progress = prepare.Progress(None, 0, 0, 0)
    clock.now += 6
    progress.show(4_000_000, 250)
    assert capsys.readouterr().out == "4 MB, 250 tokens, 42/s\n"


def test_the_examples_of_the_docstrings():
    """They give what they say."""
    assert doctest.testmod(documents) == (0, 1)


@pytest.mark.parametrize("splits", [None, ["train"], ["train", "validation", "test"]], ids=str)
def test_a_folder_of_save_to_disk_is_read(prepared, tmp_path, splits):
    rows = [{"text": f"row {i} of the set"} for i in range(20)]
    made = datasets.Dataset.from_list(rows)
    if splits:
        made = datasets.DatasetDict(dict.fromkeys(splits, made))
    made.save_to_disk(tmp_path / "saved")
    prepared(hf=str(tmp_path / "saved"), tokenizer="char")
    texts = [row["text"] + "<|endoftext|>" for row in rows]
    is_val = [i % 10 == 0 for i in range(20)]
    if splits and "validation" in splits:
        expected = {"train": texts, "val": texts}
    else:
        expected = {"train": [t for t, v in zip(texts, is_val) if not v]}
        expected["val"] = [t for t, v in zip(texts, is_val) if v]
    for split, parts in expected.items():
        assert text_of(tmp_path / "data" / "saved", split) == "".join(parts)


# ---- Conversations as other projects write them ----
def conversations_of(row):
    """Return the turns of each example that a row holds."""
    return [text.turns for text, _ in documents.row_document("f, line 1", row)]


def chat(*said):
    """Return messages; a role may have a key and a value for it, as in ("assistant", "x", "weight", 0)."""
    return [
        {"role": role, "content": text} | dict(zip(more[::2], more[1::2]))
        for role, text, *more in said
    ]


def test_messages_of_one_role_are_joined(capsys):
    """A template writes a question and an answer in turn, and has no form for two questions."""
    documents.say_once.cache_clear()
    messages = chat(("user", "one"), ("user", "two"), ("assistant", "a"), ("assistant", "b"))
    turns = [("user", "one\n\ntwo"), ("assistant", "a\n\nb")]
    assert conversations_of({"messages": messages}) == [turns]
    assert "joined by an empty line" in capsys.readouterr().out


def test_an_answer_without_a_question_is_refused():
    messages = chat(("system", "s"), ("assistant", "Welcome!"), ("user", "q"), ("assistant", "a"))
    with pytest.raises(ValueError, match="^f, line 1 begins with an assistant message: put"):
        conversations_of({"messages": messages})


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_a_column_system_comes_first(column, capsys):
    documents.say_once.cache_clear()
    row = {column: chat(("user", "q"), ("assistant", "a")), "system": "Be a pirate.", "id": 7}
    turns = [("system", "Be a pirate."), ("user", "q"), ("assistant", "a")]
    assert conversations_of(row | {"tools": ""}) == [turns]
    assert capsys.readouterr().out == "conversations are read without the columns id\n"


@pytest.mark.parametrize("key", ["weight", "train"])
def test_an_answer_may_be_left_out_of_the_loss(key):
    """It stays in the prompt of the next one."""
    off, on = (0, 1) if key == "weight" else (False, True)
    messages = chat(
        ("user", "q"),
        ("assistant", "BAD", key, off),
        ("user", "r"),
        ("assistant", "good", key, on),
    )
    (turns,) = conversations_of({"messages": messages})
    assert [text for _, text in turns] == ["q", "BAD", "r", "good"]
    with pytest.raises(ValueError, match="weight is 0.5: it must be 0 or 1"):
        conversations_of({"messages": chat(("user", "q"), ("assistant", "a", "weight", 0.5))})


@pytest.mark.parametrize("key", ["tool_calls", "function_call", "tools"])
def test_tools_are_named(key):
    calls = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]
    messages = chat(("user", "weather?"), ("assistant", "Let me look."))
    row = {"messages": messages}
    (row if key == "tools" else messages[1])[key] = calls
    with pytest.raises(ValueError, match=f"^f, line 1 has {key}, which gpt.py does not support"):
        conversations_of(row)
