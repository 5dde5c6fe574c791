"""prepare.py: turn text into a data set, data/<name>/, that gpt.py trains on.

    python prepare.py shakespeare               tiny Shakespeare; --input=FILE takes a local copy
    python prepare.py pydoc                     Python's documentation; needs no network
    python prepare.py stdlib                    source of Python's standard library, also offline
    python prepare.py tinystories               or wikitext-2, wikitext-103, openwebtext,
                                                fineweb-edu
    python prepare.py --hf=ID_OR_FOLDER         any data set that the datasets library reads
    python prepare.py --input=PATH --name=NAME  your text or examples: file, folder, or - for stdin
    python prepare.py --info=NAME               what a data set holds

Then: python gpt.py --dataset=NAME. After an interruption the same command resumes the work.
From Python: from prepare import prepare; prepare(input="novel.txt", tokenizer="bpe").
"""

import atexit
import base64
import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import tiktoken

from extras.bpe import count_words, train_bpe
from extras.chat import encode_example
from extras.documents import (
    EOT,
    FULL_WEIGHT,
    SPECIALS,
    TABLES,
    Continuation,
    Conversation,
    Special,
    file_documents,
    find_files,
    hub_documents,
    suffix_of,
)
from extras.hf_tokenizer import GPT2_PATTERN, PATTERNS
from gpt import (
    HERE,
    SHAKESPEARE_SHA256,
    Data,
    Tokenizer,
    as_path,
    check_setting,
    load_corpus,
    read_checkpoint,
    read_settings,
    read_text,
)

# tiktoken's own encodings, whose patterns allow encoding a text in pieces
TIKTOKENS_OWN = ("gpt2", "r50k_base", "p50k_base", "p50k_edit", "cl100k_base", "o200k_base")

# ---- Settings: each comment is its help text (python prepare.py --help) ------------------------
dataset = ""  # a data set known by name, as above; the first word on the command line
input = ""  # a .txt, .md, .jsonl, .json, .csv or .tsv, gzipped or not; a folder of them; -: stdin
name = ""  # the new folder under data_dir; empty: the input's name
data_dir = ""  # folder of all data sets; empty: data/ beside prepare.py
suffixes = ".txt .md .jsonl .ndjson .csv .tsv"  # which files in a folder to take
text_column = ""  # column of the text; empty: columns of conversations or examples, or else text
clean = ""  # wikitext: undo that data set's markup and spacing; empty: take the text as it is
tokenizer = ""  # char | bpe | a tiktoken name like gpt2 | path or Hugging Face id; empty: by source
vocab_size = 8192  # size of bpe's vocabulary, including 256 bytes and 4 special tokens
bpe_sample_mb = 100.0  # megabytes of text, sampled evenly, to train bpe on
val_fraction = 0.1  # fraction held out: some of the documents, or the end of a single text
max_tokens = 0  # stop after this many tokens, val_fraction of them for validation; 0: take all
hf = ""  # a data set on the Hugging Face hub, or a local folder of .parquet or .jsonl files
hf_config = ""  # configuration of that data set, if it has several
hf_split = "train"  # the split to take; a split named validation, if there is one, becomes val
workers = 0  # processes that tokenize; 0: one per core
shard_tokens = 100_000_000  # training tokens between the points where an interrupted run can resume
info = ""  # only print what this data set holds

SETTINGS = read_settings(read_text(__file__))
# These settings do not change what the files hold.
WITHOUT_EFFECT = ("name", "data_dir", "workers", "shard_tokens", "info")

HUB_DATASETS = {  # name -> path and configuration on the Hugging Face hub
    "wikitext-2": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "wikitext-103": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
    "openwebtext": ("Skylion007/openwebtext", ""),
    "tinystories": ("roneneldan/TinyStories", ""),
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT"),
}

# ---- Sources -----------------------------------------------------------------------------------


@dataclass
class Source:
    """Where the documents come from."""

    name: str  # the data set's name, if the settings give none
    label: str  # what meta.json calls the source
    kind: str  # the tokenizer's kind, if the settings give none
    documents: Callable  # () -> iterator of (split, document); split None: still to be drawn
    streamed: bool = False  # there are several documents, perhaps too many to read twice
    n_bytes: int | None = None  # size of all texts, if it is known without reading them


def find_source(settings):
    """Return the Source that the settings ask for. Raises ValueError or FileNotFoundError."""
    given = [key for key in ("dataset", "input", "hf") if getattr(settings, key)]
    if not given:
        raise ValueError(
            "nothing to prepare: name a data set, for example shakespeare or pydoc, "
            "or give --input=FILE --name=NAME"
        )
    is_local_copy = settings.dataset == "shakespeare" and given == ["dataset", "input"]
    if len(given) > 1 and not is_local_copy:
        values = [f"{key}={getattr(settings, key)}" for key in given]
        raise ValueError(
            f"{' and '.join(values)} are too many sources: give only one, and name your text "
            "with --name"
        )
    if settings.hf:
        return hub_source(settings)
    if settings.input:
        return input_source(settings)
    return known_source(settings)


def hub_source(settings):
    """Return the Source that the setting `hf` names."""
    path = as_path(settings.hf)
    documents = partial(
        hub_documents,
        str(path) if path.is_dir() else settings.hf,
        settings.hf_config,
        settings.hf_split,
        settings.text_column,
        settings.clean,
    )
    return Source(path.resolve().name, settings.hf, "gpt2", documents, streamed=True)


def known_source(settings):
    """Return the Source that the setting `dataset` names."""
    dataset = settings.dataset
    if dataset in HUB_DATASETS:
        path, config = HUB_DATASETS[dataset]
        documents = partial(
            hub_documents,
            path,
            config,
            settings.hf_split,
            settings.text_column,
            settings.clean,
            by_lines=dataset.startswith("wikitext"),
        )
        return Source(dataset, f"{path} {config}".strip(), "gpt2", documents, streamed=True)
    if dataset == "stdlib":
        label = f"the sources of Python {sys.version.split()[0]}"
        return files_source(dataset, label, "bpe", library_files(), settings)
    if dataset in ("shakespeare", "pydoc"):
        text, label = load_corpus(dataset)
        document = [(text, FULL_WEIGHT)]
        return Source(dataset, label, "char", lambda: iter([(None, document)]))
    raise ValueError(
        f"data set {dataset!r} is not one of shakespeare, pydoc, stdlib, {', '.join(HUB_DATASETS)}"
        f": for your own text, give --input=FILE --name={dataset}"
    )


def library_files():
    """Return the .py files of Python's standard library, without its tests."""
    others = {"site-packages", "dist-packages", "test", "tests"}
    folder = Path(sysconfig.get_path("stdlib"))
    files = find_files(folder, (".py",))
    return [path for path in files if others.isdisjoint(path.relative_to(folder).parts)]


def input_source(settings):
    """Return the Source of the setting `input`: standard input, a file, or a folder's files."""
    if settings.input == "-":
        path = copy_of_stdin()
        own_name = "stdin"
        label = "standard input"
    else:
        path = as_path(settings.input)
        own_name = path.resolve().name
        label = settings.input
    if not path.exists():
        raise FileNotFoundError(f"input {path} does not exist: check the path")

    if settings.dataset:  # a copy of shakespeare
        if path.is_dir() or hashlib.sha256(path.read_bytes()).hexdigest() != SHAKESPEARE_SHA256:
            raise ValueError(
                f"{path} is not tiny Shakespeare, as its sha256 shows: drop the word shakespeare "
                "and give your text a --name"
            )
        own_name = settings.dataset
    if path.is_dir():
        files = find_files(path, settings.suffixes.split())
    else:
        files = [path]
        own_name = Path(re.sub(r"(?i)\.gz$", "", own_name)).stem
    if settings.text_column and not any(suffix_of(file) in TABLES for file in files):
        raise ValueError(
            f"text_column is {settings.text_column!r}, but {label} is not a table: its suffix must "
            f"be one of {', '.join(TABLES)}"
        )
    return files_source(own_name, label, "char", files, settings)


def copy_of_stdin():
    """Copy standard input to a file, because a text is read twice; return the file's path.

    If the first line is a JSON object, the input is treated as a .jsonl file.
    """
    if sys.stdin is None:
        raise ValueError("input is -, but standard input is closed: give --input=FILE")
    first = sys.stdin.buffer.readline()
    is_table = False
    with contextlib.suppress(ValueError):
        is_table = isinstance(json.loads(first), dict)
    if is_table:
        print("standard input holds JSON, one row per line")
    handle, path = tempfile.mkstemp(suffix=".jsonl" if is_table else ".txt")
    atexit.register(os.unlink, path)
    with os.fdopen(handle, "wb") as file:
        file.write(first)
        shutil.copyfileobj(sys.stdin.buffer, file)
    return Path(path)


def files_source(name, label, kind, files, settings):
    """Return the Source of files. If there are several, each gives one document or more."""
    is_packed = any(path.suffix.lower() == ".gz" for path in files)
    n_bytes = None if is_packed else sum(path.stat().st_size for path in files)

    def documents():
        for document in file_documents(files, settings.text_column, settings.clean):
            yield None, document

    return Source(name, label, kind, documents, len(files) > 1, n_bytes)


# ---- Splits: documents become segments, (split, text, weight), and batches of segments ---------


@dataclass
class Facts:
    """What must be known about the documents before they are tokenized."""

    n_documents: int | None = 0  # None: several
    n_chars: int = 0
    n_bytes: int | None = 0  # None: unknown
    chars: set = field(default_factory=set)  # only for a char tokenizer
    special: bool = False  # special tokens occur
    chats: bool = False  # conversations occur
    weighted: bool = False  # weights below 255 occur


def survey(source, kind):
    """Read the documents, or only the first one of a stream, and return the Facts.

    kind: the tokenizer's kind. A char tokenizer must know the characters of all documents before it
        encodes the first one.
    """
    streamed = source.streamed and kind != "char"
    facts = Facts()
    for _, document in islice(source.documents(), 1 if streamed else None):
        facts.n_documents += 1
        for text, weight in document:
            if weight < FULL_WEIGHT:
                facts.weighted = True
            if isinstance(text, Special):
                facts.special = True
                continue
            if isinstance(text, Conversation):
                facts.special = facts.chats = facts.weighted = True
            facts.n_chars += len(text)
            facts.n_bytes += len(text.encode())
            if kind == "char":
                facts.chars.update(text)

    if streamed:
        facts.n_documents = None
        facts.n_bytes = source.n_bytes
    elif facts.n_chars < 2 or (facts.weighted and facts.n_documents < 2):
        fault = "too short" if facts.n_chars else "empty"
        raise ValueError(
            f"{source.label} is {fault}: give at least two characters of text, or two examples"
        )
    return facts


def read_segments(source, facts, val_fraction):
    """Yield all segments of the source, as (split, text, weight)."""
    if facts.n_documents == 1:
        ((_, document),) = source.documents()
        yield from cut_in_two(document, int(facts.n_chars * (1 - val_fraction)))
        return
    for i, (given_split, document) in enumerate(source.documents()):
        split = given_split or split_of(i, val_fraction)
        for text, weight in document:
            yield split, text, weight


def cut_in_two(document, n_train):
    """Yield the segments of a document, (split, text, weight), without its special tokens.

    The first n_train characters are for training, and the rest is for validation.
    """
    n_before = 0
    for text, weight in document:
        if isinstance(text, Special):
            continue
        begin = text[: max(0, n_train - n_before)]
        yield "train", begin, weight
        yield "val", text[len(begin) :], weight
        n_before += len(text)


def split_of(i, val_fraction):
    """Return the split of document i.

    Of n documents, ceil(n * val_fraction) are in "val". They are spread evenly, and document 0 is
    one of them.
    """
    n_val_before = math.ceil(i * val_fraction - 1e-9)  # rounding errors must not add a document
    n_val = math.ceil((i + 1) * val_fraction - 1e-9)
    return "val" if n_val > n_val_before else "train"


def encodes_piecewise(tokenizer):
    """Return whether the ids of a text are those of its pieces, as read_pieces cuts it."""
    kind = tokenizer.state["kind"]
    return (
        kind == "char"
        or kind in TIKTOKENS_OWN
        or (kind == "bpe" and tokenizer.state["pattern"] in PATTERNS)
    )


def joined(segments):
    """Yield segments in which the pieces of each text are joined."""
    segments = (segment for segment in segments if segment[1])
    for (split, weight, kind), group in groupby(segments, lambda s: (s[0], s[2], type(s[1]))):
        texts = [text for _, text, _ in group]
        for text in ["".join(texts)] if kind is str else texts:
            yield split, text, weight


def worth_learning(segments):
    """Yield the segments of all examples but those of weight 0, whose answers teach nothing."""
    example = []
    for segment in segments:
        example.append(segment)
        _, text, weight = segment
        if isinstance(text, (Special, Conversation)):  # the example's last part
            if weight > 0:
                yield from example
            example = []


def batches_for(tokenizer, segments, weighted):
    """Return batches of segments that this tokenizer may encode one by one."""
    if weighted and tokenizer.ends_turns:  # only an answer's weight tells its end from a turn's
        segments = worth_learning(segments)
    return batched(segments if encodes_piecewise(tokenizer) else joined(segments))


def batched(segments, size=2**18):
    """Yield lists of segments, each with about `size` characters in total."""
    batch = []
    n_chars = 0
    for segment in segments:
        batch.append(segment)
        n_chars += len(segment[1])
        if n_chars >= size:
            yield batch
            batch = []
            n_chars = 0
    if batch:
        yield batch


def text_bytes(batch):
    """Return the UTF-8 bytes of a batch's texts, without its special tokens."""
    return "".join(text for _, text, _ in batch if not isinstance(text, Special)).encode()


# ---- Tokenizers --------------------------------------------------------------------------------


def make_tokenizer(kind, facts, segments, settings):
    """Return the Tokenizer that `kind` names. Raises ValueError if it does not fit the text."""
    if kind == "char":
        special = SPECIALS if facts.special else ""
        return Tokenizer("char", "".join(sorted(facts.chars)), special=special)
    if kind == "bpe":
        limit = settings.bpe_sample_mb * 1e6
        return bpe_tokenizer(bpe_sample(segments, facts.n_bytes, limit), settings.vocab_size)
    chosen = Tokenizer(kind) if kind in tiktoken.list_encoding_names() else load_tokenizer(kind)
    if facts.special and chosen.end_id is None:
        raise ValueError(
            f"tokenizer {kind} lacks {EOT}, which ends documents and examples: choose "
            "another tokenizer, or give a single text"
        )
    check_characters(chosen, segments)
    if facts.chats:  # they are encoded as the model knows them
        return chosen
    return Tokenizer(**chosen.state | {"begin": ""})  # no token begins a text


def bpe_tokenizer(texts, vocab_size):
    """Train a BPE vocabulary on texts and return its Tokenizer."""
    started = time.monotonic()
    n_special = len(SPECIALS.split())
    tokens = train_bpe(count_words(texts, GPT2_PATTERN), vocab_size - n_special)
    seconds = time.monotonic() - started
    print(f"trained a vocabulary of {len(tokens) + n_special:,} tokens in {seconds:.0f} s")
    ranks = " ".join(base64.b64encode(token).decode() for token in tokens)
    return Tokenizer("bpe", ranks=ranks, pattern=GPT2_PATTERN, special=SPECIALS)


def bpe_sample(segments, n_bytes, limit):
    """Yield training texts of `limit` bytes in total, sampled evenly from all of them.

    n_bytes: the size of all texts. If it is None, the beginning is the sample.
    """
    share = min(1.0, limit / (n_bytes or limit))
    n_seen = 0
    n_taken = 0
    for split, text, _ in segments:
        if split == "val" or not text or isinstance(text, Special):
            continue
        size = len(text.encode())
        if n_taken <= n_seen * share:
            yield from (
                (said for _, said in text.turns) if isinstance(text, Conversation) else [text]
            )
            n_taken += size
        n_seen += size
        if n_taken >= limit:
            return


def load_tokenizer(kind):
    """Return the Tokenizer of a data set, a checkpoint or a Hugging Face model."""
    path = as_path(kind)
    if path.is_file() or (path / "best.pt").exists():
        return Tokenizer(**read_checkpoint(path)["tokenizer"])
    if (path / "meta.json").exists():
        return Data(path, block_size=1).tokenizer
    if path.is_dir() or re.fullmatch(r"[\w.-]+/[\w.-]+|gpt2-(medium|large|xl)", kind):
        import hub

        return hub.read_tokenizer(hub.find_folder(str(path) if path.is_dir() else kind))
    known = ", ".join(["char", "bpe", *tiktoken.list_encoding_names()])
    raise ValueError(
        f"tokenizer {kind!r} is unknown: it must be one of {known}, the path of a data set, "
        "checkpoint or Hugging Face model, or a Hugging Face id"
    )


def check_characters(tokenizer, segments):
    """Raise ValueError for a character that a char tokenizer from elsewhere does not know."""
    known = set(tokenizer.state["chars"])
    if not known:
        return
    n_before = 0
    for _, text, _ in segments:
        if isinstance(text, Special):
            continue
        unknown = set(text) - known
        if unknown:
            i = min(map(text.index, unknown))
            raise ValueError(
                f"the tokenizer's vocabulary lacks {text[i]!r}, character {n_before + i} of the "
                "text: choose another tokenizer"
            )
        n_before += len(text)


# ---- Encoding, in several processes ------------------------------------------------------------


class Encoder:
    """Turns batches of segments into arrays.

    state: Tokenizer.state. dtype: the name of the type of the ids, which are stored little-endian.
    """

    def __init__(self, state, dtype):
        self.tokenizer = Tokenizer(**state)
        self.dtype = np.dtype(dtype).newbyteorder("<")

    def encode(self, text, weight):
        """Return [(ids, as uint32, and their weight), ...] of a segment."""
        if isinstance(text, Conversation):
            prompt, answer = encode_example(self.tokenizer, text.turns)
            return [(np.uint32(prompt), 0), (np.uint32(answer), weight)]
        if isinstance(text, Special):  # the end, which may have a name other than EOT
            return [(np.uint32([self.tokenizer.end_id]), weight)]
        if self.tokenizer.state["kind"] == "char":
            return [(np.uint32(self.tokenizer.encode(text)), weight)]
        if isinstance(text, Continuation) and self.tokenizer.state["kind"] == "tokenizers":
            return [(self.encode_continuation(text), weight)]
        encode = self.tokenizer.encoding.encode_to_numpy  # the fastest
        return [(encode(text, disallowed_special=()), weight)]

    def encode_continuation(self, text):
        """Return the ids of a text without the space that sentencepiece puts before every text."""
        before = self.tokenizer.encode("\n")
        ids = self.tokenizer.encode("\n" + text)
        if ids[: len(before)] == before:
            return np.uint32(ids[len(before) :])
        return np.uint32(self.tokenizer.encode(text))

    def encode_batch(self, batch):
        """Return {split: (ids, weights, number of text bytes)}. Weights are None if all are 255."""
        arrays = {}
        for split in {split for split, _, _ in batch}:
            own = [segment for segment in batch if segment[0] == split]
            parts = [part for _, text, weight in own for part in self.encode(text, weight)]
            weights = [weight for _, weight in parts]
            each = None
            if min(weights) < FULL_WEIGHT:
                each = np.repeat(np.uint8(weights), [len(ids) for ids, _ in parts])
            ids = np.concatenate([ids for ids, _ in parts]).astype(self.dtype)
            arrays[split] = ids, each, len(text_bytes(own))
        return arrays


def start_worker(state, dtype):
    """Prepare a worker process. It leaves Ctrl-C to its parent and ends when its parent ends."""
    global process_encoder  # encode_in_worker uses it, in this process only
    process_encoder = Encoder(state, dtype)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()


def end_with(parent):
    parent.join()
    os._exit(1)


def encode_in_worker(batch):
    return process_encoder.encode_batch(batch)


def encoded(batches, state, dtype, n_workers):
    """Yield (batch, Encoder.encode_batch(batch)) in order.

    If there are several processes, each is at most four batches ahead, so memory stays constant.
    """
    if n_workers == 1:
        encoder = Encoder(state, dtype)
        for batch in batches:
            yield batch, encoder.encode_batch(batch)
        return

    waiting = deque()
    with ProcessPoolExecutor(n_workers, initializer=start_worker, initargs=(state, dtype)) as pool:
        for batch in batches:
            with uninterrupted():
                waiting.append((batch, pool.submit(encode_in_worker, batch)))
            if len(waiting) > 4 * n_workers:
                yield oldest_result(waiting)
        while waiting:
            yield oldest_result(waiting)


def oldest_result(waiting):
    batch, future = waiting.popleft()
    with uninterrupted():
        return batch, future.result()


@contextlib.contextmanager
def uninterrupted():
    """Delay Ctrl-C until the end of the block.

    In the middle of a pool's call, Ctrl-C could leave a queue locked forever.
    """
    caught = []
    action = signal.getsignal(signal.SIGINT)
    in_main_thread = threading.current_thread() is threading.main_thread()
    in_reach = callable(action) and in_main_thread  # else Ctrl-C does not interrupt this block
    if in_reach:
        signal.signal(signal.SIGINT, lambda *args: caught.append(args))
    try:
        yield
    finally:
        if in_reach:
            signal.signal(signal.SIGINT, action)
        if caught:
            action(*caught[0])


class Progress:
    """Shows how far the work has come.

    In a terminal this is a tqdm bar, if tqdm is installed. Otherwise lines are printed.

    all_bytes, all_tokens: where the work ends. 0 or None: unknown.
    n_bytes, n_tokens: where it begins.
    """

    def __init__(self, all_bytes, all_tokens, n_bytes, n_tokens):
        self.all_bytes = all_bytes or math.inf
        self.all_tokens = all_tokens or math.inf
        self.first_share = self.share(n_bytes, n_tokens)
        self.first_tokens = n_tokens
        self.started = time.monotonic()
        self.last_line = self.started
        self.bar = None
        if sys.stderr is not None and sys.stderr.isatty():
            with contextlib.suppress(ImportError):
                from tqdm import tqdm

                options = {"unit": "B", "unit_scale": True, "leave": False}
                self.bar = tqdm(total=all_bytes, initial=n_bytes, **options)

    def share(self, n_bytes, n_tokens):
        return max(n_bytes / self.all_bytes, n_tokens / self.all_tokens)

    def show(self, n_bytes, n_tokens):
        """Show that n_bytes of text and n_tokens are written, at most one line every 5 seconds."""
        now = time.monotonic()
        elapsed = max(now - self.started, 1e-9)
        speed = (n_tokens - self.first_tokens) / elapsed
        text = f"{n_tokens:,} tokens, {speed:,.0f}/s"
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(n_bytes - self.bar.n)
        elif now - self.last_line > 5:
            self.last_line = now
            share = self.share(n_bytes, n_tokens)
            share_of_run = share - self.first_share
            if share_of_run > 1e-3:
                seconds_left = int(elapsed * max(0.0, 1 - share) / share_of_run)
                text += f", {timedelta(seconds=seconds_left)} left"
            print(f"{n_bytes / 1e6:,.0f} MB, {text}", flush=True)


# ---- Writing -----------------------------------------------------------------------------------


def save_json(path, content):
    """Write content to path, whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(temporary, path)


class TokenFiles:
    """The files of a data set while they are being written in the folder `part`.

    These are train.bin and val.bin, and train.weight.bin and val.weight.bin if `weighted`.

    state: what progress.json holds: the settings asked for, the tokenizer, and how much of the
        files is safely on the disk. When an interrupted run resumes, it cuts the files to that
        length and skips the batches that are in them.
    """

    def __init__(self, part, state, weighted, settings):
        self.part = part
        self.state = state
        self.weighted = weighted
        self.shard_tokens = settings.shard_tokens
        self.saved_tokens = state["train_tokens"]
        self.digest = hashlib.sha256()  # of the texts
        self.tokenizer = Tokenizer(**state["tokenizer"])
        self.limits = {"train": math.inf, "val": math.inf}
        if settings.max_tokens:
            n_val = int(settings.max_tokens * settings.val_fraction)
            self.limits = {"train": settings.max_tokens - n_val, "val": n_val}

    def sizes(self):
        """Return {file name: size in bytes} according to the state."""
        itemsize = np.dtype(self.state["dtype"]).itemsize
        sizes = {}
        for split in ("train", "val"):
            n_tokens = self.state[f"{split}_tokens"]
            sizes[f"{split}.bin"] = n_tokens * itemsize
            if self.weighted:
                sizes[f"{split}.weight.bin"] = n_tokens
        return sizes

    def written(self):
        """Return how many bytes of text and how many tokens are written."""
        n_bytes = self.state["train_bytes"] + self.state["val_bytes"]
        return n_bytes, self.state["train_tokens"] + self.state["val_tokens"]

    def resume(self, batches):
        """Skip the batches already written, and cut off what was written after the last save.

        Returns whether that is possible. It is not if the text has changed or a file is too short.
        """
        for batch in islice(batches, self.state["batches"]):
            self.digest.update(text_bytes(batch))
        if self.digest.hexdigest() != self.state["sha256"]:
            return False
        for name, size in self.sizes().items():
            path = self.part / name
            path.touch()  # a split that has no token yet may have no file
            if path.stat().st_size < size:
                return False
            os.truncate(path, size)
        return True

    def add(self, batch, arrays):
        """Append a batch and its arrays, as Encoder.encode_batch returns them, if there is room."""
        for split, (ids, weights, n_bytes) in arrays.items():
            if weights is None:
                weights = np.full(len(ids), FULL_WEIGHT, np.uint8)
            elif not self.weighted:
                raise ValueError(
                    "the first document is a text, but another has a prompt: prepare texts and "
                    "examples as separate data sets"
                )
            room = self.limits[split] - self.state[f"{split}_tokens"]
            if len(ids) > room:
                ids = ids[:room]
                weights = weights[:room]
                n_bytes = self.count_bytes(ids)
            self.append(f"{split}.bin", ids)
            if self.weighted:
                self.append(f"{split}.weight.bin", weights)
            self.state[f"{split}_tokens"] += len(ids)
            self.state[f"{split}_bytes"] += n_bytes
        self.digest.update(text_bytes(batch))
        self.state["batches"] += 1
        if self.state["train_tokens"] - self.saved_tokens >= self.shard_tokens:
            self.save()

    def count_bytes(self, ids):
        """Return the number of bytes of text that ids stand for."""
        special_ids = list(self.tokenizer.special_tokens.values())
        plain = ids[~np.isin(ids, special_ids)]
        return len(self.tokenizer.decode_bytes(plain.tolist()))

    def append(self, name, array):
        with open(self.part / name, "ab") as file:
            file.write(array.tobytes())

    def has_room(self):
        return any(self.state[f"{split}_tokens"] < limit for split, limit in self.limits.items())

    def save(self):
        """Wait until the files are on the disk, then record how far they go."""
        for name in self.sizes():
            with open(self.part / name, "ab") as file:
                os.fsync(file.fileno())
        self.saved_tokens = self.state["train_tokens"]
        self.state["sha256"] = self.digest.hexdigest()
        save_json(self.part / "progress.json", self.state)

    def is_worth_learning(self, split):
        """Return whether a split holds a token whose weight is above 0."""
        if self.state[f"{split}_tokens"] == 0:
            return False
        return not self.weighted or np.memmap(self.part / f"{split}.weight.bin", np.uint8).any()


def make_dataset(source, kind, folder, part, settings):
    """Write a data set into the folder `part`, then move it to `folder`; return its meta.

    If an interrupted run with the same settings and text left files in `part`, it is resumed.
    """
    facts = survey(source, kind)
    segments = partial(read_segments, source, facts, settings.val_fraction)
    asked = {name: value for name, value in vars(settings).items() if name not in WITHOUT_EFFECT}

    files = None
    if (part / "progress.json").exists():
        take_back(folder, part)
        files, batches = resumed_files(part, asked, facts.weighted, settings, segments())
    if files is None:
        tokenizer = make_tokenizer(kind, facts, segments(), settings)
        files = new_files(part, asked, facts.weighted, settings, tokenizer)
        batches = batches_for(tokenizer, segments(), facts.weighted)
    write_tokens(files, batches, facts.n_bytes, settings)

    for split in ("train", "val"):
        if not files.is_worth_learning(split):
            shutil.rmtree(part)
            raise ValueError(
                f"{source.label} leaves nothing to learn for {split}: add more text or more "
                "examples rated above 1, or change val_fraction"
            )
    return publish(files, folder, source.label)


def resumed_files(part, asked, weighted, settings, segments):
    """Return (the TokenFiles of an interrupted run, the batches that they do not hold yet).

    Both are None if this run cannot use the files.
    """
    state = json.loads((part / "progress.json").read_text(encoding="utf-8"))
    if state["asked"] == asked:
        files = TokenFiles(part, state, weighted, settings)
        print(f"{part}: resuming after {files.written()[1]:,} tokens")
        batches = batches_for(files.tokenizer, segments, weighted)
        if files.resume(batches):
            return files, batches
    print(f"{part}: starting over, because the text or the settings have changed")
    return None, None


def new_files(part, asked, weighted, settings, tokenizer):
    """Return the TokenFiles of a new run."""
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    counts = ("batches", "train_tokens", "val_tokens", "train_bytes", "val_bytes")
    state = {
        "asked": asked,
        "tokenizer": tokenizer.state,
        "vocab_size": tokenizer.vocab_size,
        "dtype": "uint16" if tokenizer.vocab_size <= 2**16 else "uint32",
        "sha256": "",
        **dict.fromkeys(counts, 0),
    }
    return TokenFiles(part, state, weighted, settings)


def write_tokens(files, batches, all_bytes, settings):
    """Encode batches and append them to the files, until the text ends or max_tokens is reached."""
    n_workers = settings.workers or os.cpu_count() or 1
    if all_bytes and all_bytes < 2**22:
        n_workers = 1  # more workers would take longer to start than to work
    progress = Progress(all_bytes, settings.max_tokens, *files.written())
    state = files.state
    if files.has_room():
        for batch, arrays in encoded(batches, state["tokenizer"], state["dtype"], n_workers):
            files.add(batch, arrays)
            progress.show(*files.written())
            if not files.has_room():
                break
    files.save()


def publish(files, folder, label):
    """Move the files to `folder`, where they replace an older data set, and return the meta.

    meta.json is moved last, so a folder never holds half a data set. If the move is interrupted,
    take_back undoes it.
    """
    meta = {"source": label} | files.state
    del meta["asked"], meta["batches"]
    save_json(files.part / "meta.json", meta)
    folder.mkdir(exist_ok=True)
    for old in (folder / "meta.json", *folder.glob("*.bin")):
        old.unlink(missing_ok=True)
    for name in (*files.sizes(), "meta.json"):
        os.replace(files.part / name, folder / name)
    shutil.rmtree(files.part)
    return meta


def take_back(folder, part):
    """Move the files that an interrupted run already moved to `folder` back to `part`."""
    if (folder / "meta.json").exists() or not (part / "meta.json").exists():
        return  # no move was begun, or it was completed
    for path in folder.glob("*.bin"):
        if not (part / path.name).exists():
            os.replace(path, part / path.name)


# ---- What a data set holds ---------------------------------------------------------------------


def read_ids(tokens, size=2**23):
    """Yield a split's ids, a few million at a time."""
    for start in range(0, len(tokens), size):
        yield tokens[start : start + size]


def document_lengths(data):
    """Return the lengths of all documents in tokens, without the mark that ends each."""
    lengths = []
    for split, tokens in data.tokens.items():
        if data.weighted:
            ends = np.flatnonzero(data.ends_example(tokens[:], data.weights[split][:]))
            lengths += (np.diff(ends, prepend=-1) - 1).tolist()
            continue
        ends = [-1]
        n_before = 0
        for ids in read_ids(tokens):
            if data.tokenizer.end_id is not None:
                ends += (np.flatnonzero(ids == data.tokenizer.end_id) + n_before).tolist()
            n_before += len(ids)
        if ends[-1] < n_before - 1:  # a single text has no mark
            ends.append(n_before)
        lengths += (np.diff(ends) - 1).tolist()
    return np.array(lengths)


def describe(folder):
    """Print what a data set holds, and return its meta."""
    data = Data(folder, block_size=1)
    meta = data.meta
    print(f"data set    {folder}")
    print(f"source      {meta['source']}, sha256 {meta['sha256'][:16]}...")
    print(
        f"tokenizer   {data.tokenizer.state['kind']}, vocabulary of {meta['vocab_size']:,} "
        f"as {meta['dtype']}"
    )
    for split in ("train", "val"):
        n_tokens = meta[f"{split}_tokens"]
        n_bytes = meta[f"{split}_bytes"]
        ratio = n_bytes / n_tokens
        print(f"{split:11} {n_tokens:,} tokens, {n_bytes:,} bytes, {ratio:.2f} bytes per token")

    lengths = document_lengths(data)
    quantiles = {"min": 0, "median": 0.5, "p90": 0.9, "p95": 0.95, "max": 1}
    spread = ", ".join(f"{key} {np.quantile(lengths, q):,.0f}" for key, q in quantiles.items())
    print(f"documents   {len(lengths):,}, tokens in each: {spread}, mean {lengths.mean():,.1f}")

    counts = np.zeros(meta["vocab_size"], np.int64)
    for tokens in data.tokens.values():
        for ids in read_ids(tokens):
            counts += np.bincount(ids, minlength=len(counts))
    order = np.argsort(-counts, kind="stable")
    occurring = order[: np.count_nonzero(counts)]

    def counted(ids):
        return ", ".join(f"{data.tokenizer.decode([i])!r} {counts[i]:,}" for i in ids.tolist())

    print(f"commonest   {counted(occurring[:10])}")
    print(f"rarest      {counted(occurring[:-11:-1])}; {len(order) - len(occurring):,} never occur")
    print(f"begins      {data.tokenizer.decode(data.tokens['train'][:100].tolist())!r}")
    return meta


# ---- The command -------------------------------------------------------------------------------


def chosen_settings(changes):
    """Return the settings as a namespace: those at the top of this file, overridden by `changes`.

    Raises ValueError for the first one that is unknown, of the wrong type or not valid.
    """
    values = {name: globals()[name] for name in SETTINGS} | changes
    values = {name: check_setting(name, value, SETTINGS) for name, value in values.items()}
    settings = SimpleNamespace(**values)

    n_least = 256 + len(SPECIALS.split())
    if settings.tokenizer == "bpe" and settings.vocab_size < n_least:
        raise ValueError(
            f"vocab_size is {settings.vocab_size}: bpe needs at least {n_least}, for 256 bytes "
            "and 4 special tokens"
        )
    if settings.clean not in ("", "wikitext"):
        raise ValueError(f"clean is {settings.clean!r}: it must be wikitext, or empty")
    if not 0 < settings.val_fraction < 1:
        raise ValueError(f"val_fraction is {settings.val_fraction}: it must be above 0 and below 1")
    for name in ("shard_tokens", "bpe_sample_mb"):
        if values[name] <= 0:
            raise ValueError(f"{name} is {values[name]}: it must be above 0")
    for name in ("workers", "max_tokens"):
        if values[name] < 0:
            raise ValueError(f"{name} is {values[name]}: it must be at least 0")
    return settings


def prepare(**changes):
    """Make the data set that the settings ask for, and return its meta.

    changes: settings by name, which override the values at the top of this file, for example
    prepare(input="novel.txt", tokenizer="bpe").
    Raises ValueError, and OSError where a file cannot be read or written.
    """
    settings = chosen_settings(changes)
    root = as_path(settings.data_dir) if settings.data_dir else HERE / "data"
    if settings.info:
        return describe(root / as_path(settings.info))

    source = find_source(settings)
    name = settings.name or source.name
    if not name or name == ".." or Path(name).name != name:
        raise ValueError(
            f"name {name!r} is not a plain folder name: use --data_dir to choose another place"
        )
    folder = root / name
    part = root / f"{name}.part"
    kind = settings.tokenizer or source.kind
    with keeping_unfinished(part):
        meta = make_dataset(source, kind, folder, part, settings)
    print(
        f"{folder}: {meta['train_tokens']:,} training and {meta['val_tokens']:,} validation "
        f"tokens, {meta['tokenizer']['kind']} vocabulary of {meta['vocab_size']:,}"
    )
    print(f"next: {training_command(folder, settings.data_dir)}")
    return meta


@contextlib.contextmanager
def keeping_unfinished(part):
    """If the block fails, say how to resume, or remove `part` if it holds nothing to resume."""
    try:
        yield
    except BaseException as e:
        if (part / "progress.json").exists():
            print(f"the work so far stays in {part}: the same command resumes it")
        else:
            shutil.rmtree(part, ignore_errors=True)
        if isinstance(e, OSError) and e.errno and not isinstance(e, BrokenPipeError):
            raise OSError(f"{e.filename or part}: {e.strerror}") from e
        raise


def training_command(folder, data_dir):
    """Return the command that trains on a data set, quoted for the shell."""
    words = ["python", "gpt.py", f"--dataset={folder.name}"]
    if data_dir:
        words.append(f"--data_dir={data_dir}")
    if (folder / "train.weight.bin").exists():  # longer examples would be cut
        longest = document_lengths(Data(folder, block_size=1)).max()
        words.append(f"--block_size={longest}")
    quote = subprocess.list2cmdline if os.name == "nt" else shlex.join
    return quote(words)


def main():
    prepare()


if __name__ == "__main__":
    from configurator import run_script

    run_script(globals(), main, SETTINGS, check_setting, word_settings=("dataset",))
