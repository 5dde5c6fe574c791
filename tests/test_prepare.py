"""prepare.py: text from files, folders, Python itself and two mirrors, and what it refuses."""

import hashlib
import http.server
import json
import threading
from pathlib import Path

import pytest

import gpt
import prepare

PLAY = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n"
PLAY_SHA256 = hashlib.sha256(PLAY.encode()).hexdigest()


@pytest.fixture
def prepared(monkeypatch, tmp_path):
    """Return a function that runs prepare.main() with some settings and gives (folder's name, meta, text)."""
    root = tmp_path / "data"

    def run(**values):
        for name, value in ({"data_dir": str(root)} | values).items():
            assert isinstance(getattr(prepare, name), str | float), name
            monkeypatch.setattr(prepare, name, value)
        prepare.main()
        (folder,) = root.iterdir()
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        tokenizer = gpt.Tokenizer(**meta["tokenizer"])
        train, val = ((folder / f"{split}.bin").read_bytes() for split in ("train", "val"))
        content = train + val
        ids = [int.from_bytes(content[i : i + 2], "little") for i in range(0, len(content), 2)]
        return folder.name, meta, tokenizer.decode(ids)

    return run


@pytest.fixture
def refused(prepared, tmp_path):
    """Return a function that expects prepare.main() to refuse, on one line and with nothing written."""

    def run(error, *fragments, **values):
        with pytest.raises(error) as e:
            prepared(**values)
        assert type(e.value) is error
        assert "\n" not in str(e.value)
        for fragment in fragments:
            assert fragment in str(e.value)
        assert not (tmp_path / "data").exists()

    return run


@pytest.fixture
def mirror(monkeypatch):
    """Return (pages, asked, root) of a server; pages are {path: (status, body, declared length)}."""
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
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield pages, asked, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def urls(monkeypatch):
    """Return a function that replaces the mirrors of tiny Shakespeare, and its sha256 by that of PLAY."""
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
    assert len(out.splitlines()) == 1
    assert "99 training and 11 validation tokens" in out
    assert out.endswith("python gpt.py --dataset=mine\n")


def test_name_and_val_fraction(prepared, tmp_path):
    """--name names the folder, --val_fraction moves the split."""
    name, meta, _ = prepared(input=write(tmp_path / "mine.txt", "abcd" * 10), name="other", val_fraction=0.5)
    assert (name, meta["train_tokens"], meta["val_tokens"]) == ("other", 20, 20)


def test_a_folder_gives_its_txt_and_md_files_in_order(prepared, tmp_path):
    """Paths are sorted, subfolders included; other files are ignored, binary ones too."""
    folder = tmp_path / "notes"
    for path, content in (
        ("b.txt", "second"),
        ("a.md", "first"),
        ("c/d.txt", "third"),
        ("z.py", "no"),
        ("y.txt.gz", b"\0\xff"),
        ("README", "no"),
    ):
        write(folder / path, content)
    (folder / "dir.txt").mkdir()
    assert prepared(input=str(folder))[::2] == ("notes", "first\nsecond\nthird")


def test_crlf_is_kept(prepared, tmp_path):
    """No line end is translated."""
    assert prepared(input=write(tmp_path / "dos.txt", "one\r\ntwo\r\n\rthree"))[2] == "one\r\ntwo\r\n\rthree"


def test_a_byte_order_mark_is_dropped_with_a_notice(prepared, tmp_path, capsys):
    """The mark is no character of the text, neither of a file nor of a folder's files."""
    path = write(tmp_path / "bom" / "a.txt", b"\xef\xbb\xbfhello hello")
    write(tmp_path / "bom" / "b.txt", b"\xef\xbb\xbfworld")
    assert prepared(input=str(tmp_path / "bom"))[2] == "hello hello\nworld"
    assert f"{path}: dropped the byte order mark" in capsys.readouterr().out


def test_tiktoken_kinds_are_passed_on(prepared, tmp_path, monkeypatch):
    """--tokenizer reaches tiktoken, and its failure is a sentence."""
    asked = []

    def get_encoding(name):
        asked.append(name)
        raise OSError("no network in the tests")

    monkeypatch.setattr(gpt.tiktoken, "get_encoding", get_encoding)
    with pytest.raises(ValueError, match="'gpt2'.*TIKTOKEN_CACHE_DIR"):
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
    [(500, b"", 0), (200, b"something else", 14), (200, b"", 0), (200, PLAY[:20].encode(), len(PLAY))],
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
        (b"", ("empty",)),
        (b"\xef\xbb\xbf", ("empty",)),
        (b"a", ("two characters",)),
    ],
    ids=["latin1", "utf16", "binary", "empty", "mark", "single"],
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


def test_a_known_name_is_not_given_to_another_text(prepared, tmp_path):
    """With the word pydoc and an --input, the input is refused or named otherwise, never called pydoc."""
    path = write(tmp_path / "mine.txt", "abcd" * 10)
    try:
        name, _, _ = prepared(dataset="pydoc", input=path)
    except ValueError as e:
        name = ""
        assert "pydoc" in str(e)
    assert name != "pydoc"


def test_what_is_not_named_or_not_known_is_refused(refused):
    """The message shows what may be named."""
    refused(ValueError, "'dickens'", "shakespeare", "pydoc", "--input=FILE --name=dickens", dataset="dickens")
    refused(ValueError, "shakespeare", "pydoc", "--input=FILE --name=NAME", dataset="")


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_val_fraction_out_of_range_is_refused(refused, tmp_path, value):
    """Both splits need a share."""
    path = write(tmp_path / "mine.txt", "abcd" * 10)
    refused(ValueError, "val_fraction", str(value), input=path, val_fraction=value)


@pytest.mark.parametrize("word", [".", ".."])
def test_an_input_without_a_name_of_its_own_writes_in_no_other_place(prepared, tmp_path, monkeypatch, word):
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
def missing(monkeypatch, tmp_path):
    """Return a function that runs gpt.prepare_if_missing for a data set under tmp_path."""

    def run(dataset, offline_fallback=True):
        monkeypatch.setattr(gpt, "data_dir", str(tmp_path / "data"))
        monkeypatch.setattr(gpt, "offline_fallback", offline_fallback)
        return gpt.prepare_if_missing(dataset)

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
    """Another run may be reading the files, or they may hold other tokens: they are not written again."""
    urls((tmp_path / "none.txt").as_uri())
    folder = missing("pydoc")
    (folder / "train.bin").write_bytes(b"mine")
    assert missing("shakespeare") == folder
    assert (folder / "train.bin").read_bytes() == b"mine"


def test_without_fallback_the_download_error_is_raised(missing, urls, tmp_path):
    """offline_fallback=False stops, with nothing written."""
    urls((tmp_path / "none.txt").as_uri())
    with pytest.raises(ConnectionError, match=r"none\.txt"):
        missing("shakespeare", offline_fallback=False)
    assert not (tmp_path / "data").exists()


def test_gpt_makes_no_other_data_set(missing, tmp_path):
    """Another name is returned as a folder, whether it is there or not."""
    assert missing("mine") == tmp_path / "data" / "mine"
    assert not (tmp_path / "data").exists()


def test_prepare_as_a_command(run_script, tmp_path):
    """The word and the flags reach main(), and train.bin is where --data_dir says."""
    path = Path(write(tmp_path / "mine.txt", "abcd" * 10))
    done = run_script("prepare.py", "--input=mine.txt", "--data_dir=d", "--name", "x", cwd=path.parent)
    assert (done.returncode, done.stderr) == (0, "")
    assert "python gpt.py --dataset=x" in done.stdout
    assert (tmp_path / "d" / "x" / "train.bin").read_bytes() == b"\0\0\1\0\2\0\3\0" * 9
