"""prepare.py: turn text into a data set, data/<name>/, that gpt.py trains on.

    python prepare.py shakespeare                 tiny Shakespeare; --input=FILE takes a local copy
    python prepare.py pydoc                       Python's documentation; also stdlib, its sources: no network
    python prepare.py tinystories                 also wikitext-2, wikitext-103, openwebtext, fineweb-edu
    python prepare.py --hf=ID_OR_FOLDER           any other data set that the datasets library reads
    python prepare.py --input=PATH --name=NAME    your text or examples: a file, a folder, - for stdin
    python prepare.py --info=NAME                 what a data set holds

Then: python gpt.py --dataset=NAME. Interrupted, the same command goes on where its last whole shard ended.
"""

import atexit
import base64
import codecs
import contextlib
import csv
import gzip
import hashlib
import heapq
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import sysconfig
import tempfile
import threading
import time
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from functools import cache
from itertools import chain, islice, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import regex  # tiktoken brings it
import tiktoken

from gpt import CHAT, SHAKESPEARE_SHA256, Data, Tokenizer, corpus, read_checkpoint
from tokenizer_json import GPT2_PATTERN, OTHERS, PRINTABLE, read_tokenizer

dataset = ""  # a data set known by name, as above; the first word on the command line
input = ""  # your text: .txt, .md, .jsonl or .csv, each also .gz; a folder of such files; -: standard input
name = ""  # the new folder under data_dir; empty: the input's name
data_dir = ""  # folder of the data sets; empty: data/ beside this script
suffixes = ".txt .md .jsonl .csv"  # which files of a folder to take
text_column = (
    ""  # column of .csv, .jsonl and hf; empty: messages, or prompt and response, or else text
)
clean = ""  # wikitext: undo that data set's markup and spacing; empty: take the text as it is
tokenizer = ""  # char | bpe | tiktoken's, as gpt2 | a data set, checkpoint, Hugging Face id; empty: by source
vocab_size = 8192  # of bpe, its 256 bytes and 4 special tokens included
bpe_sample_mb = 100.0  # megabytes of text, taken evenly, that bpe is trained on
val_fraction = (
    0.1  # share for validation: of documents, beginning with the first, or else of a text's end
)
max_tokens = 0  # stop after so many tokens, val_fraction of them for validation; 0: take all
hf = ""  # a data set on the Hugging Face hub, or a local folder of .parquet or .jsonl files, read as a stream
hf_config = ""  # its configuration, where it has several
hf_split = "train"  # its split to take; a split named validation, if there is one, becomes val
workers = 0  # processes that tokenize; 0: one per core
shard_tokens = 100_000_000  # training tokens per file
info = ""  # only tell what this data set holds

INDECISIVE = ("name", "data_dir", "workers", "info")  # settings on which the files do not depend
SETTINGS = [k for k, v in globals().items() if k[0] != "_" and isinstance(v, str | int | float)]
HF = {
    "wikitext-2": ("Salesforce/wikitext", "wikitext-2-raw-v1", True),  # True: the rows are lines
    "wikitext-103": ("Salesforce/wikitext", "wikitext-103-raw-v1", True),
    "openwebtext": ("Skylion007/openwebtext",),
    "tinystories": ("roneneldan/TinyStories",),
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT"),
}


class Special(str):
    """The name of a special token, which as a text would be spelled out."""


EOT, USER, ASSISTANT = Special("<|endoftext|>"), Special("<|user|>"), Special("<|assistant|>")
SPECIALS = f"{EOT} {USER} {ASSISTANT} <|pad|>"


# ---- Reading: a document is an iterable of (text, weight), the weight 0 to 255 of its tokens in the loss ---
@cache
def notice(message):
    """Print a message once, however often its cause is met."""
    print(message)


def read_blocks(path, size=2**18):
    """Yield a UTF-8 file's text, unpacked if .gz, in blocks. Raises ValueError for what is no such text."""
    decoder, offset, block = codecs.getincrementaldecoder("utf-8")(), 0, bytes(size)
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        while len(block) == size:
            pending = len(decoder.getstate()[0])  # bytes of a character that the last block cut
            try:
                block = file.read(size)
                text = decoder.decode(block, final=len(block) < size)
            except (EOFError, zlib.error, gzip.BadGzipFile) as e:
                raise ValueError(
                    f"{path} is no whole gzip file ({e}): make or fetch it again"
                ) from e
            except UnicodeDecodeError as e:
                raise ValueError(
                    f"{path} is not UTF-8 text (byte {offset - pending + e.start} is "
                    f"0x{e.object[e.start]:02x}): convert it first, as with iconv"
                ) from e
            if "\0" in text:
                at = offset - pending + len(text[: text.index("\0")].encode())
                raise ValueError(f"{path} is binary (byte {at} is 0): give a text file")
            if offset == 0 and text.startswith("\ufeff"):
                notice(f"{path}: dropped the byte order mark")
                text = text[1:]
            offset += len(block)
            yield text


def read_lines(blocks):
    rest = ""
    for block in blocks:
        *lines, rest = (rest + block).split("\n")
        yield from (line + "\n" for line in lines)
    if rest:
        yield rest


LAST_CUT = re.compile(r"(?s).*(?:\S(?= )|\S\n(?=[^\s/]))")


def pieces(blocks):
    """Yield a text of any length in pieces, cut where each tokenizer would: before a space that ends a word,
    after a newline between two; without such a place, every 16 MB."""
    rest = ""
    for block in blocks:
        rest += block
        end = cut.end() if (cut := LAST_CUT.match(rest)) else len(rest) if len(rest) > 2**24 else 0
        yield rest[:end]
        rest = rest[end:]
    yield rest


def suffix_of(path):
    return Path(path.name.lower().removesuffix(".gz")).suffix


def read_rows(path):
    """Yield (where, row), the row a dict, of a .jsonl or .csv file. Raises ValueError naming the line."""
    lines = read_lines(read_blocks(path))
    if suffix_of(path) == ".jsonl":
        for i, line in enumerate(lines, 1):
            try:
                row = json.loads(line) if line.strip() else None
            except json.JSONDecodeError as e:
                raise ValueError(
                    f"{path}, line {i} is no JSON ({e.msg} at column {e.colno}): mend it"
                ) from e
            if row is not None:
                yield f"{path}, line {i}", row
        return
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(lines, strict=True)
    try:
        for row in reader:
            if None in row:
                raise csv.Error("more fields than columns: put texts with commas in quotes")
            yield f"{path}, line {reader.line_num}", row
    except csv.Error as e:
        raise ValueError(f"{path}, line {reader.line_num} is no CSV ({e}): mend it") from e


def checked_text(where, row, column):
    if not isinstance(row, dict) or column not in row:
        has = f"only {', '.join(map(str, row))}" if isinstance(row, dict) else "no columns"
        raise ValueError(f"{where} has no {column!r}, {has}: name the text's by --text_column")
    if isinstance(row[column], str) and not re.search("[\ud800-\udfff]", row[column]):
        return row[column]
    raise ValueError(f"{where}: {column} is {str(row[column])[:60]!r}: it must be a whole text")


def rating_weight(where, row):
    """Return the weight of a response: 255 unrated or rated 5, 0 rated 1. Raises ValueError."""
    try:
        rating = float(row.get("rating", 5))
    except (TypeError, ValueError):
        rating = math.nan
    if not 1 <= rating <= 5:
        raise ValueError(f"{where}: rating is {row['rating']!r}: it must be a number from 1 to 5")
    return round(255 * (rating - 1) / 4)


def row_document(where, row):
    """Return a row's document: its text, or examples whose prompts weigh 0 and responses by their rating.

    Of chat messages each answer makes an example, all before it being the prompt, as when it was given:
    text of system <|user|> text <|assistant|> text <|user|> text <|assistant|> answer <|endoftext|>
    """
    columns = set() if text_column or not isinstance(row, dict) else row.keys()
    if "messages" in columns:
        return chat_document(where, row["messages"], rating_weight(where, row))
    if {"prompt", "response"} <= columns:
        prompt, response = checked_text(where, row, "prompt"), checked_text(where, row, "response")
        return [(prompt, 0), (response, weight := rating_weight(where, row)), (EOT, weight)]
    text = checked_text(where, row, text_column or "text")
    return [("\n".join(map(clean_line, text.split("\n"))) if clean else text, 255), (EOT, 255)]


def chat_document(where, messages, weight):
    prompt, document, marks = (
        [],
        [],
        {"system": [], "user": [(USER, 0)], "assistant": [(ASSISTANT, 0)]},
    )
    for message in messages if isinstance(messages, list) else [messages]:
        role = message.get("role") if isinstance(message, dict) else None
        if role not in marks:
            raise ValueError(
                f"{where}: {str(message)[:60]!r} is no message: it takes a role, one of "
                f"{', '.join(marks)}, and a content"
            )
        content = checked_text(where, message, "content")
        prompt += marks[role]
        if role == "assistant":
            document += [*prompt, (content, weight), (EOT, weight)]
        prompt.append((content, 0))
    if not document:
        raise ValueError(
            f"{where} has no message of the assistant: there is nothing to learn from it"
        )
    return document


def file_documents(path, end=()):
    """Return a file's documents, an iterable: a .csv's or .jsonl's rows, or one that ends with `end`."""
    if suffix_of(path) in (".csv", ".jsonl"):
        return (row_document(where, row) for where, row in read_rows(path))
    if clean:
        return articles(read_lines(read_blocks(path)))
    return [chain(((piece, 255) for piece in pieces(read_blocks(path))), end)]


# ---- Cleaning ----------------------------------------------------------------------------------------------
def clean_line(line):
    """Return a line of wikitext as people write it; indented lines, as of code, keep their form.

    >>> clean_line(" It weighs 3 @.@ 5 kg ( 8 lb ) , and it 's \\" cheap \\" . ")
    'It weighs 3.5 kg (8 lb), and it\\'s "cheap".'
    """
    line = line.rstrip("\r\n")
    if heading := re.fullmatch(r" ?((?:= )+)(.+?)((?: =)+) *", line):
        return "#" * (len(heading[1]) // 2) + " " + heading[2]
    if line.startswith(("  ", "\t")) and line.strip():
        return line
    line = re.sub(r" @([-,.])@ ", r"\1", line.strip(" "))
    line = re.sub(r'(?<!\S)" ([^"]+) "(?!\w)', r'"\1"', line)
    line = re.sub(r"(?<=\S) +([.,;:!?)\]](?![^\s.,;:!?)\]'\"]))", r"\1", line)
    return re.sub(r"(?<=[(\[]) +| +(?='(?:s|t|d|m|re|ve|ll)\b)", "", line)


def articles(lines):
    """Yield wikitext's articles as documents, cleaned if asked for; each begins with a line " = Title = "."""
    article = []
    for line in chain(lines, [" = end = \n"]):
        if re.match(r" ?= (?!= ).*(?<! =) =\s*$", line) and any(part.strip() for part in article):
            yield [("\n".join(article).strip("\n") + "\n", 255), (EOT, 255)]
            article = []
        article.append(clean_line(line) if clean else line.rstrip("\n"))


# ---- Sources -----------------------------------------------------------------------------------------------
class Source(NamedTuple):
    name: str
    label: str
    kind: str  # of its tokenizer, if none is asked for
    documents: (
        Callable  # () -> iterator of (split, document), the split None where it is to be drawn
    )
    streamed: bool = False  # several documents, and too many, perhaps, to be read once before
    n_bytes: int | None = None  # where known without reading


def hf_documents(path, config="", are_lines=False):
    """Yield (split, document) of a data set of the Hugging Face hub or a local folder, whose rows are
    documents, or lines of articles."""
    try:
        import datasets
    except ImportError as e:
        raise ValueError("data sets of Hugging Face need a library: pip install datasets") from e
    try:
        datasets.disable_progress_bars()
        names = datasets.get_dataset_split_names(path, config or None)
        own = {None: hf_split}
        if hf_split == "train" and "validation" in names:
            own = {
                "val": "validation",
                "train": "train",
            }  # val first: train may be cut by max_tokens
        streams = {
            split: datasets.load_dataset(path, config or None, split=theirs, streaming=True)
            for split, theirs in own.items()
        }
    except Exception as e:
        raise ValueError(
            f"{path} cannot be opened ({type(e).__name__}: {e}): check its name, --hf_config, "
            "--hf_split and the network"
        ) from e
    for split, rows in streams.items():
        numbered = ((f"{path}, {split or hf_split} row {i}", row) for i, row in enumerate(rows))
        lines = read_lines(
            checked_text(where, row, text_column or "text") for where, row in numbered
        )
        documents = (
            articles(lines) if are_lines else (row_document(where, row) for where, row in numbered)
        )
        yield from ((split, document) for document in documents)


def find_files(folder, endings):
    """Return a folder's files in order of their paths. Raises FileNotFoundError if there are none."""
    files = [p for p in folder.rglob("*") if suffix_of(p) in endings and p.is_file()]
    files = sorted((path for path in files if path.stat().st_size), key=str)
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no {' or '.join(endings)} file with a text: --suffixes chooses others"
        )
    return files


def known_source():
    """Return the Source that the setting `dataset` names."""
    if dataset in HF:
        return Source(
            dataset, " ".join(HF[dataset][:2]), "gpt2", lambda: hf_documents(*HF[dataset]), True
        )
    if dataset == "stdlib":
        files = find_files(Path(sysconfig.get_path("stdlib")), (".py",))
        files = [
            p
            for p in files
            if not {"site-packages", "dist-packages", "test", "tests"} & set(p.parts)
        ]
        return file_source(dataset, f"the sources of Python {sys.version.split()[0]}", "bpe", files)
    if dataset in ("shakespeare", "pydoc"):
        text, label = corpus(dataset)
        return Source(dataset, label, "char", lambda: [(None, [(text, 255)])])
    raise ValueError(
        f"data set {dataset!r} is none of shakespeare, pydoc, stdlib, {', '.join(HF)}: your own "
        f"takes --input=FILE --name={dataset}"
    )


def file_source(name, label, kind, files):
    """Return the Source of files; if they are several, each is a document or more."""
    end = [(EOT, 255)] if len(files) > 1 else []
    packed = any(path.suffix == ".gz" for path in files)
    n_bytes = None if packed else sum(path.stat().st_size for path in files)

    def documents():
        yield from ((None, document) for path in files for document in file_documents(path, end))

    return Source(name, label, kind, documents, len(files) > 1, n_bytes)


def find_source():
    """Return the Source that the settings ask for. Raises ValueError, FileNotFoundError."""
    given = [f"{key}={globals()[key]}" for key in ("dataset", "input", "hf") if globals()[key]]
    if not given:
        raise ValueError(
            "nothing to prepare: name a data set, as shakespeare or pydoc, or give --input=FILE "
            "--name=NAME"
        )
    if len(given) > 1 and not (dataset == "shakespeare" and input and not hf):
        raise ValueError(
            f"{' and '.join(given)} are too many sources: name one, and your text by --name"
        )
    if hf:
        return Source(
            Path(hf).resolve().name, hf, "gpt2", lambda: hf_documents(hf, hf_config), True
        )
    if not input:
        return known_source()
    path = Path(input)
    if input == "-":
        handle, path = tempfile.mkstemp(suffix=".txt")
        atexit.register(os.unlink, path)
        with os.fdopen(handle, "wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"input {path} does not exist")
    files = find_files(path, tuple(suffixes.split())) if path.is_dir() else [path]
    if dataset and hashlib.sha256(path.read_bytes()).hexdigest() != SHAKESPEARE_SHA256:
        raise ValueError(
            f"{input} is not tiny Shakespeare (its sha256 differs): drop the word shakespeare "
            "and give your text a --name"
        )
    own, label = path.resolve().name, input
    if not path.is_dir():
        own = Path(own.removesuffix(".gz")).stem
    if input == "-":
        own, label = "stdin", "standard input"
    return file_source(dataset or own, label, "char", files)


# ---- Tokenizers --------------------------------------------------------------------------------------------
BYTES = [bytes([b]) for b in (*PRINTABLE, *OTHERS)]  # in GPT-2's order


def count_words(texts, longest=1000):
    """Return how often each word, bytes, occurs; words of more characters are cut, to be bearable."""
    found, counts = Counter(), Counter()
    for text in texts:
        found.update(regex.findall(GPT2_PATTERN, text))
    for word, n in found.items():
        for i in range(0, len(word), longest):
            counts[word[i : i + longest].encode()] += n
    return counts


def merge(word, pair, new):
    """Return the list of ids with `new` for each occurrence of the pair, from the left."""
    merged, i = [], 0
    while i < len(word):
        if word[i] == pair[0] and i + 1 < len(word) and word[i + 1] == pair[1]:
            merged.append(new)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return merged


def train_bpe(word_counts, n_tokens):
    """Return a byte-level BPE vocabulary (arXiv:1508.07909, GPT-2): bytes objects whose places are their ids.

    The first are the 256 bytes in GPT-2's order. Then the pair of neighbours most frequent within words
    becomes a token, again and again; of equally frequent ones that with the lower left id, then right id.
    Only words that hold the pair are counted anew. When no pair is left there are fewer than n_tokens.
    >>> train_bpe({b"hug": 3, b"pug": 2, b"hugs": 1}, 259)[256:]
    [b'ug', b'hug', b'pug']
    """
    tokens, ids = list(BYTES), {token: i for i, token in enumerate(BYTES)}
    words = [[ids[bytes([b])] for b in word] for word in word_counts]
    counts, pair_counts, where = list(word_counts.values()), Counter(), defaultdict(set)
    for w, word in enumerate(words):
        for pair in pairwise(word):
            pair_counts[pair] += counts[w]
            where[pair].add(w)
    queue = [(-n, pair) for pair, n in pair_counts.items()]
    heapq.heapify(queue)
    while queue and len(tokens) < n_tokens:
        n, pair = heapq.heappop(queue)
        if -n != pair_counts[pair]:  # it has changed since: back into the queue
            if pair_counts[pair] > 0:
                heapq.heappush(queue, (-pair_counts[pair], pair))
            continue
        token = tokens[pair[0]] + tokens[pair[1]]
        new = ids.setdefault(token, len(tokens))  # other pairs may have made the same bytes before
        tokens += [token] * (new == len(tokens))
        grown = set()
        for w in where.pop(pair):
            for old in pairwise(words[w]):
                pair_counts[old] -= counts[w]
            words[w] = merge(words[w], pair, new)
            for now in pairwise(words[w]):
                pair_counts[now] += counts[w]
                if new in now:
                    where[now].add(w)
                    grown.add(now)
        for now in grown:
            heapq.heappush(queue, (-pair_counts[now], now))
    return tokens


def bpe_sample(segments, n_bytes):
    """Yield training texts, evenly taken, of bpe_sample_mb together; n_bytes: of all, or None if unknown."""
    limit, seen, taken = bpe_sample_mb * 1e6, 0, 0
    for split, text, _ in segments:
        if split == "train" and text and not isinstance(text, Special):
            if taken <= seen * min(1.0, limit / (n_bytes or limit)):
                yield text
                taken += len(text.encode())
            seen += len(text.encode())
            if taken >= limit:
                return


def check_characters(chosen, segments):
    """Raise ValueError for a character that a char tokenizer from elsewhere does not know."""
    n, known = 0, set(chosen.state["chars"])
    for text in (text for _, text, _ in segments if known and not isinstance(text, Special)):
        if unknown := set(text) - known:
            i = min(map(text.index, unknown))
            raise ValueError(
                f"the tokenizer's vocabulary lacks {text[i]!r}, character {n + i} of the text"
            )
        n += len(text)


def make_tokenizer(kind, facts, segments):
    """Return the Tokenizer that is asked for. Raises ValueError."""
    if kind == "char":
        return Tokenizer(
            "char", "".join(sorted(facts.chars)), special=SPECIALS if facts.special else ""
        )
    if kind == "bpe":
        n_special, began = len(SPECIALS.split()), time.time()
        tokens = train_bpe(count_words(bpe_sample(segments, facts.n_bytes)), vocab_size - n_special)
        print(
            f"trained a vocabulary of {len(tokens) + n_special:,} tokens in {time.time() - began:.0f} s"
        )
        ranks = " ".join(base64.b64encode(token).decode() for token in tokens)
        return Tokenizer("bpe", ranks=ranks, pattern=GPT2_PATTERN, special=SPECIALS)
    if kind in tiktoken.list_encoding_names():
        return Tokenizer(kind)
    path = Path(kind)
    if path.is_file():
        chosen = Tokenizer(**read_checkpoint(path)["tokenizer"])
    elif (path / "meta.json").exists():
        chosen = Data(path, 1).tokenizer
    elif path.is_dir() or re.fullmatch(r"[\w.-]+/[\w.-]+|gpt2-(medium|large|xl)", kind):
        from pretrained import find_folder

        chosen = read_tokenizer(find_folder(kind))
    else:
        known = ", ".join(("char", "bpe", *tiktoken.list_encoding_names()))
        raise ValueError(
            f"tokenizer {kind!r} is none of {known}, nor the path of a data set, checkpoint or "
            "Hugging Face model, nor the latter's id"
        )
    check_characters(chosen, segments)
    return Tokenizer(**chosen.state | {"begin": "", "chat": CHAT})  # as documents are written here


# ---- Writing -----------------------------------------------------------------------------------------------
def survey(documents, want_chars):
    """Read documents once; return what is to be known of them before they are tokenized."""
    facts = SimpleNamespace(
        n_documents=0, n_chars=0, n_bytes=0, chars=set(), special=False, weighted=False
    )
    for _, document in documents:
        facts.n_documents += 1
        for text, weight in document:
            facts.weighted |= weight < 255
            if isinstance(text, Special):
                facts.special = True
            else:
                facts.n_chars, facts.n_bytes = (
                    facts.n_chars + len(text),
                    facts.n_bytes + len(text.encode()),
                )
                facts.chars |= set(text) if want_chars else set()
    return facts


def segments(source, facts):
    """Yield (split, text, weight) of all that the source holds: of one document the end is for validation."""
    cut, n_chars = int(facts.n_chars * (1 - val_fraction)), 0
    for i, (split, document) in enumerate(source.documents()):
        n_val, n_val_then = (math.ceil(n * val_fraction - 1e-9) for n in (i, i + 1))
        for text, weight in document:
            if facts.n_documents != 1:
                yield split or ("val" if n_val_then > n_val else "train"), text, weight
            elif not isinstance(text, Special):
                begin = text[: max(0, cut - n_chars)]
                yield "train", begin, weight
                yield "val", text[len(begin) :], weight
                n_chars += len(text)


def batched(items, size=2**18):
    """Yield lists of segments of about `size` characters together."""
    batch, n_chars = [], 0
    for item in items:
        batch.append(item)
        n_chars += len(item[1])
        if n_chars >= size:
            yield batch
            batch, n_chars = [], 0
    if batch:
        yield batch


def text_bytes(batch, split=None):
    """Return the bytes of a batch's texts, or of those for one split."""
    texts = (text for s, text, _ in batch if split in (None, s) and not isinstance(text, Special))
    return "".join(texts).encode()


def start_worker(state, dtype):
    """Make encode_batch ready in this process; a worker leaves Ctrl-C to its parent and ends with it."""
    global chosen, chosen_dtype
    chosen, chosen_dtype = Tokenizer(**state), np.dtype(dtype).newbyteorder("<")
    if parent := multiprocessing.parent_process():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def encode(text):
    """Return text's ids, uint32, or a special token's."""
    if isinstance(text, Special) and (
        text == EOT or text in chosen.special
    ):  # others are spelled out
        return np.uint32([chosen.end if text == EOT else chosen.special[text]])
    if chosen.state["kind"] == "char":
        return np.uint32(chosen.encode(text))
    return chosen.encoding.encode_to_numpy(text, disallowed_special=())  # faster than by a list


def encode_batch(batch):
    """Return {split: (ids, weights, bytes of text)} of a batch; weights: uint8, or None if all are 255."""
    arrays = {}
    for split in {split for split, _, _ in batch}:
        parts = [(encode(text), weight) for s, text, weight in batch if s == split]
        ids, weights = np.concatenate([ids for ids, _ in parts]).astype(chosen_dtype), None
        if any(weight < 255 for _, weight in parts):
            weights = np.repeat(
                np.uint8([weight for _, weight in parts]), [len(ids) for ids, _ in parts]
            )
        arrays[split] = ids, weights, len(text_bytes(batch, split))
    return arrays


@contextlib.contextmanager
def uninterrupted():
    """Put Ctrl-C off until the end of the block: amid a pool's calls it can leave a queue locked for ever."""
    caught, action = [], signal.getsignal(signal.SIGINT)
    in_reach = callable(action) and threading.current_thread() is threading.main_thread()
    if in_reach:  # else Ctrl-C is ignored, or comes to another thread
        signal.signal(signal.SIGINT, lambda *args: caught.append(args))
    try:
        yield
    finally:
        if in_reach:
            signal.signal(signal.SIGINT, action)
        if caught:
            action(*caught[0])


def encoded(batches, start, n_workers):
    """Yield (batch, encode_batch(batch)) in order; the processes that encode are some batches ahead."""
    if n_workers == 1:
        start_worker(*start)
        yield from ((batch, encode_batch(batch)) for batch in batches)
        return

    def oldest():
        batch, future = waiting.popleft()
        with uninterrupted():
            return batch, future.result()

    with ProcessPoolExecutor(n_workers, initializer=start_worker, initargs=start) as pool:
        waiting = deque()
        for batch in batches:
            with uninterrupted():
                waiting.append((batch, pool.submit(encode_batch, batch)))
            if len(waiting) > 4 * n_workers:
                yield oldest()
        while waiting:
            yield oldest()


def make_progress(n_bytes_all, n_tokens_before):
    """Return a function that shows how far the work is: by tqdm in a terminal, if installed, or by lines."""
    began = last = time.time()
    bar = None
    if sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            bar = tqdm(total=n_bytes_all, unit="B", unit_scale=True, leave=False)

    def show(n_bytes, n_tokens):
        nonlocal last
        now = time.time()
        speed = f"{n_tokens:,} tokens, {(n_tokens - n_tokens_before) / (now - began):,.0f}/s"
        if bar is not None:
            bar.set_postfix_str(speed, refresh=False)
            bar.update(n_bytes - bar.n)
        elif now - last > 5:
            share = max(
                n_bytes / (n_bytes_all or math.inf), n_tokens / (max_tokens or math.inf), 1e-9
            )
            left = (
                f", {timedelta(seconds=int((now - began) * (1 / share - 1)))} left"
                if share > 1e-3
                else ""
            )
            print(f"{n_bytes / 1e6:,.0f} MB, {speed}{left}", flush=True)
            last = now

    return show


def save_json(path, content):
    """Write content to path, all or nothing."""
    path.with_suffix(".tmp").write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(path.with_suffix(".tmp"), path)


class Shards:
    """The shards in the folder `part`; `done`, saved with each whole one, tells how far they go."""

    def __init__(self, part, done, weighted):
        self.part, self.done, self.weighted = part, done, weighted
        self.digest, self.started_at = hashlib.sha256(), done["train_tokens"]
        self.tokenizer, n_val = Tokenizer(**done["tokenizer"]), int(max_tokens * val_fraction)
        self.limits = {
            "train": max_tokens - n_val or math.inf,
            "val": n_val if max_tokens else math.inf,
        }
        for path in part.glob("*.bin"):
            if int(path.stem[-4:]) >= done["shards"]:
                path.unlink()  # begun, but not whole

    def pass_over(self, batches):
        """Pass over the batches that are done; return whether all is there and the text that was begun."""
        for batch in islice(batches, self.done["batches"]):
            self.digest.update(text_bytes(batch))
        there = sum(
            path.stat().st_size for path in self.part.glob("*_*.bin") if ".weight" not in path.name
        )
        n_tokens = self.done["train_tokens"] + self.done["val_tokens"]
        whole = there == n_tokens * np.dtype(self.done["dtype"]).itemsize
        return whole and self.digest.hexdigest() == self.done["sha256"]

    def append(self, stem, array):
        with open(self.part / f"{stem}_{self.done['shards']:04d}.bin", "ab") as file:
            file.write(array.tobytes())

    def add(self, batch, arrays):
        """Append a batch, encoded, as far as there is room."""
        for split, (ids, weights, n_bytes) in arrays.items():
            room = self.limits[split] - self.done[f"{split}_tokens"]
            if len(ids) > room:
                ids = ids[:room]
                plain = ids[np.isin(ids, list(self.tokenizer.special.values()), invert=True)]
                n_bytes = len(self.tokenizer.decode_bytes(plain.tolist()))
            if len(ids):
                self.append(split, ids)
            if weights is not None and not self.weighted:
                raise ValueError(
                    "the first document is text, another has prompts: prepare examples apart"
                )
            if len(ids) and self.weighted:
                weights = (
                    np.full(len(ids), 255, np.uint8) if weights is None else weights[: len(ids)]
                )
                self.append(f"{split}.weight", weights)
            self.done[f"{split}_tokens"] += len(ids)
            self.done[f"{split}_bytes"] += n_bytes
        self.digest.update(text_bytes(batch))
        self.done["batches"] += 1
        if self.done["train_tokens"] - self.started_at >= shard_tokens:
            self.end_shard()

    def has_room(self):
        return any(self.done[f"{split}_tokens"] < limit for split, limit in self.limits.items())

    def end_shard(self):
        for path in self.part.glob(f"*_{self.done['shards']:04d}.bin"):
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        self.started_at = self.done["train_tokens"]
        self.done.update(shards=self.done["shards"] + 1, sha256=self.digest.hexdigest())
        save_json(self.part / "progress.json", self.done)


def write_shards(part, source, facts, done):
    """Write the source's shards, going on from `done`; return False if the text is not the one begun."""
    batches, shards = batched(segments(source, facts)), Shards(part, done, facts.weighted)
    if not shards.pass_over(batches):
        return False
    n_workers = 1 if facts.n_bytes and facts.n_bytes < 2**22 else workers or os.cpu_count()
    show = make_progress(facts.n_bytes, done["train_tokens"] + done["val_tokens"])
    batches = batches if shards.has_room() else ()
    for batch, arrays in encoded(batches, (done["tokenizer"], done["dtype"]), n_workers):
        shards.add(batch, arrays)
        show(done["train_bytes"] + done["val_bytes"], done["train_tokens"] + done["val_tokens"])
        if not shards.has_room():
            break
    shards.end_shard()
    return True


# ---- What a data set holds ---------------------------------------------------------------------------------
def read_ids(tokens, size=2**23):
    """Yield a split's ids, some millions at a time."""
    for start in range(0, len(tokens), size):
        yield tokens[np.arange(start, min(start + size, len(tokens)))]


def document_lengths(data):
    """Return the documents' lengths in tokens, not counting the <|endoftext|> that ends each."""
    lengths = []
    for tokens in data.tokens.values():
        ends, n = [-1], 0
        for ids in read_ids(tokens):
            ends += (np.flatnonzero(ids == data.tokenizer.end) + n).tolist()
            n += len(ids)
        lengths += (np.diff([*ends, n] if ends[-1] < n - 1 else ends) - 1).tolist()
    return np.array(lengths)


def describe(folder):
    """Print what a data set holds."""
    data = Data(folder, 1)
    meta, chosen = data.meta, data.tokenizer
    blocks = (ids for tokens in data.tokens.values() for ids in read_ids(tokens))
    counts = sum(np.bincount(ids, minlength=meta["vocab_size"]) for ids in blocks)
    order, shown = (
        np.argsort(-counts, kind="stable"),
        lambda i: f"{chosen.decode([int(i)])!r} {counts[i]:,}",
    )
    occurring, lengths = order[: np.count_nonzero(counts)], document_lengths(data)
    quantiles = {"min": 0, "median": 0.5, "p90": 0.9, "p95": 0.95, "max": 1}
    spread = ", ".join(f"{key} {np.quantile(lengths, q):,.0f}" for key, q in quantiles.items())
    print(f"data set    {folder}\nsource      {meta['source']}, sha256 {meta['sha256'][:16]}...")
    print(
        f"tokenizer   {chosen.state['kind']}, vocabulary of {meta['vocab_size']:,} as {meta['dtype']}"
    )
    for split in ("train", "val"):
        n, n_bytes = meta[f"{split}_tokens"], meta[f"{split}_bytes"]
        print(f"{split:11} {n:,} tokens, {n_bytes:,} bytes, {n_bytes / n:.2f} bytes per token")
    print(f"documents   {len(lengths):,}, their tokens: {spread}, mean {lengths.mean():,.1f}")
    print(f"most        {', '.join(map(shown, occurring[:10]))}")
    print(
        f"least       {', '.join(map(shown, occurring[:-11:-1]))}; {len(order) - len(occurring):,} never"
    )
    print(f"begins      {chosen.decode(next(read_ids(data.tokens['train']))[:100].tolist())!r}")


# ---- The command -------------------------------------------------------------------------------------------
def check_settings():
    least = {
        "val_fraction": 1e-9,
        "bpe_sample_mb": 1e-9,
        "shard_tokens": 1,
        "max_tokens": 0,
        "workers": 0,
    }
    for setting, bound in least.items():
        if not globals()[setting] >= bound:
            raise ValueError(
                f"{setting} is {globals()[setting]}: it must be above {'' if bound else 'or '}0"
            )
    if not val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}: it must be above 0 and below 1")
    if tokenizer == "bpe" and vocab_size < 256 + len(SPECIALS.split()):
        raise ValueError(
            f"vocab_size is {vocab_size}: bpe needs 260, for 256 bytes and 4 special tokens"
        )
    if clean not in ("", "wikitext"):
        raise ValueError(f"clean is {clean!r}: it must be wikitext, or empty")


def prepare(folder, part, source, kind):
    """Write the data set into `folder`, by way of `part`; return its meta. What an interrupted run left in
    `part` is taken up if settings and text are the same."""
    streamed = source.streamed and kind != "char"
    facts = survey(
        islice(source.documents(), 1) if streamed else source.documents(), kind == "char"
    )
    if not streamed and (facts.n_chars < 2 or (facts.n_documents < 2 and facts.weighted)):
        raise ValueError(
            f"{source.label} is {'too short' if facts.n_chars else 'empty'}: give a text of two "
            "characters, or two examples, at least"
        )
    if streamed:
        facts.n_documents, facts.n_bytes = None, source.n_bytes
    asked = {key: globals()[key] for key in SETTINGS if key not in INDECISIVE}
    saved = part / "progress.json"
    done = json.loads(saved.read_text(encoding="utf-8")) if saved.exists() else {"asked": None}
    if done["asked"] == asked:
        print(f"{part}: going on after {done['shards']} whole shards")
    if done["asked"] != asked or not write_shards(part, source, facts, done):
        if done["asked"]:
            print(f"{part}: of other settings or another text, begun anew")
        chosen = make_tokenizer(kind, facts, segments(source, facts))
        if facts.special and chosen.end is None:
            raise ValueError(
                f"tokenizer {kind} lacks {EOT}, which ends documents and examples: take "
                "another, or a single text"
            )
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        counts = ("batches", "shards", "train_tokens", "val_tokens", "train_bytes", "val_bytes")
        done = {
            "asked": asked,
            "tokenizer": chosen.state,
            "vocab_size": chosen.vocab_size,
            "dtype": "uint16" if chosen.vocab_size <= 2**16 else "uint32",
            "sha256": hashlib.sha256().hexdigest(),
            **dict.fromkeys(counts, 0),
        }
        write_shards(part, source, facts, done)
    return publish(part, folder, source, facts, done)


def publish(part, folder, source, facts, done):
    """Move the shards, all whole, from `part` to `folder`; write and return the meta."""
    for split in ("train", "val"):
        weights = [np.fromfile(path, np.uint8).any() for path in part.glob(f"{split}.weight_*.bin")]
        if not done[f"{split}_tokens"] or (facts.weighted and not any(weights)):
            shutil.rmtree(part)
            raise ValueError(
                f"{source.label} leaves nothing to learn for {split}: bring more text, or more "
                "examples rated above 1, or change val_fraction"
            )
    folder.mkdir(exist_ok=True)
    for old in (folder / "meta.json", *folder.glob("*.bin")):
        old.unlink(missing_ok=True)
    for stem in ("train", "val", "train.weight", "val.weight"):
        shards = list(part.glob(f"{stem}_*.bin"))
        for shard in shards:
            shard.rename(folder / (shard.name if len(shards) > 1 else f"{stem}.bin"))
    meta = {"source": source.label} | done
    del meta["asked"], meta["batches"], meta["shards"]
    save_json(folder / "meta.json", meta)
    shutil.rmtree(part)
    return meta


def main():
    root = Path(data_dir or Path(__file__).resolve().parent / "data")
    if info:
        return describe(root / info)
    check_settings()
    source = find_source()
    own_name, kind = name or source.name, tokenizer or source.kind
    if Path(own_name).name != own_name or own_name == "..":
        raise ValueError(
            f"name {own_name!r} is no plain name of a folder: other places go by --data_dir"
        )
    folder, part = root / own_name, root / f"{own_name}.part"
    try:
        meta = prepare(folder, part, source, kind)
    except BaseException as e:
        if (part / "progress.json").exists():
            print(f"what is whole stays in {part}: the same command goes on from there")
        else:
            shutil.rmtree(part, ignore_errors=True)
        if isinstance(e, OSError) and e.errno:
            raise OSError(f"{e.filename or part}: {e.strerror}") from e
        raise
    advice = ""
    if any(folder.glob("*.weight*.bin")):
        advice = f" --block_size={document_lengths(Data(folder, 1)).max()}, the longest example's"
    print(
        f"{folder}: {meta['train_tokens']:,} training and {meta['val_tokens']:,} validation tokens, "
        f"{meta['tokenizer']['kind']} vocabulary of {meta['vocab_size']:,}; now: python gpt.py "
        f"--dataset={own_name}{advice}"
    )


if __name__ == "__main__":
    from configurator import run_script

    run_script(globals(), main, word_setting="dataset")
