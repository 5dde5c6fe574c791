"""Read files, tables and Hugging Face data sets of any size as documents.

A document is an iterable of (text, weight). The weight, from 0 to 255, is that of the text's
tokens in the loss. A special token is a text with a class of its own. The functions that read are
generators, which hold one block of a file at a time. Their ValueErrors name the file and the place
in it.
"""

import codecs
import csv
import gzip
import json
import math
import re
import zlib
from functools import cache
from itertools import chain
from pathlib import Path

# ---- Special tokens ----------------------------------------------------------------------------


class Special(str):
    """The name of a special token. The same letters in a plain str are text like any other."""


EOT = Special("<|endoftext|>")
USER = Special("<|user|>")
ASSISTANT = Special("<|assistant|>")
SPECIALS = f"{EOT} {USER} {ASSISTANT} <|pad|>"  # for the tokenizers that prepare.py makes
ROLE_MARKS = {"system": [], "user": [(USER, 0)], "assistant": [(ASSISTANT, 0)]}
FULL_WEIGHT = 255  # each weight is stored in one byte


# ---- Files -------------------------------------------------------------------------------------


@cache
def say_once(message):
    """Print a message only once, because a file is read more than once."""
    print(message)


def suffix_of(path):
    """Return the suffix that tells a file's kind: .txt for notes.txt and for NOTES.TXT.gz."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def find_files(folder, suffixes):
    """Return the non-empty files in a folder and its subfolders that have one of the suffixes.

    They are sorted by path. Raises FileNotFoundError if there are none.
    """
    files = []
    for path in folder.rglob("*"):
        if suffix_of(path) in suffixes and path.is_file() and path.stat().st_size:
            files.append(path)
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no {' or '.join(suffixes)} file with a text: "
            "choose other files with --suffixes"
        )
    return sorted(files, key=str)


def read_blocks(path, size=2**18):
    """Yield the text of a UTF-8 file, which may be a .gz, in blocks of `size` bytes.

    A byte order mark is dropped. Raises ValueError if the file is not such a text.
    """
    open_file = gzip.open if path.suffix.lower() == ".gz" else open
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0  # where the block begins in the file
    at_end = False
    with open_file(path, "rb") as file:
        while not at_end:
            try:
                block = file.read(size)
            except (EOFError, zlib.error, gzip.BadGzipFile) as e:
                raise ValueError(
                    f"{path} is not a complete gzip file ({e}): create or download it again"
                ) from e
            at_end = len(block) < size
            start = offset - len(decoder.getstate()[0])  # the last block may have cut a character

            try:
                text = decoder.decode(block, final=at_end)
            except UnicodeDecodeError as e:
                raise ValueError(
                    f"{path} is not UTF-8 text (byte {start + e.start} is "
                    f"0x{e.object[e.start]:02x}): convert it first, for example by iconv"
                ) from e
            if "\0" in text:
                n_before = len(text[: text.index("\0")].encode())
                raise ValueError(
                    f"{path} is binary (byte {start + n_before} is 0): give a text file"
                )
            if offset == 0 and text.startswith("\ufeff"):
                say_once(f"{path}: dropped the byte order mark")
                text = text[1:]
            yield text
            offset += len(block)


def read_lines(blocks):
    """Yield the lines of a text that comes in blocks, each with its line end."""
    rest = ""
    for block in blocks:
        *lines, rest = (rest + block).split("\n")
        for line in lines:
            yield line + "\n"
    if rest:
        yield rest


LAST_CUT = re.compile(r"(?s).*(?:\S(?= )|\S\n(?=[^\s/]))")
LONGEST_PIECE = 2**24


def read_pieces(blocks):
    """Yield the pieces of a text that comes in blocks. Each can be tokenized on its own.

    A piece ends where every tokenizer ends a word anyway: before the space that follows a word,
    or after the line end between two words. Only a text of 16 million characters without such a
    place is cut elsewhere.
    """
    rest = ""
    for block in blocks:
        rest += block
        cut = LAST_CUT.match(rest)
        if cut:
            end = cut.end()
        elif len(rest) > LONGEST_PIECE:
            end = len(rest)
        else:
            continue
        yield rest[:end]
        rest = rest[end:]
    yield rest


# ---- Tables ------------------------------------------------------------------------------------


def read_rows(path):
    """Yield (where, row) for each row of a table; `where` names the file and the row's line.

    path: a .jsonl or .csv file.
    """
    if suffix_of(path) == ".jsonl":
        return read_jsonl(path)
    return read_csv(path)


def read_jsonl(path):
    """Yield (where, value) for each line of a .jsonl file that is not blank."""
    for number, line in enumerate(read_lines(read_blocks(path)), 1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as e:
            raise ValueError(
                f"{where} is not valid JSON ({e.msg} at column {e.colno}): correct it"
            ) from e
        yield where, value


def read_csv(path):
    """Yield (where, row) for each row of a .csv file. The first line names the row's keys."""
    csv.field_size_limit(2**31 - 1)  # Python's own limit, 128 KB, is too low for a text
    reader = csv.DictReader(read_lines(read_blocks(path)), strict=True)
    try:
        for row in reader:
            if None in row:
                raise csv.Error("more fields than columns: put texts with commas in quotes")
            yield f"{path}, line {reader.line_num}", row
    except csv.Error as e:
        raise ValueError(
            f"{path}, line {reader.line_num} is not valid CSV ({e}): correct it"
        ) from e


# ---- Wikitext ----------------------------------------------------------------------------------

TITLE = re.compile(r" ?= (?!= ).*(?<! =) =\s*$")  # " = Robert Boulter = "


def read_articles(lines, clean):
    """Yield the articles of wikitext as texts. Each of them begins with a title.

    clean: whether to undo the data set's markup and spacing.
    """
    article = []
    end = " = end = \n"  # a title, which ends the last article
    for line in chain(lines, [end]):
        if TITLE.match(line) and "".join(article).strip():
            yield "\n".join(article).strip("\n") + "\n"
            article = []
        article.append(clean_line(line) if clean else line.rstrip("\n"))


def clean_line(line):
    r"""Return a line of wikitext as people write it.

    Indented lines, for example of code, keep their form.

    >>> clean_line(' It weighs 3 @.@ 5 kg ( 8 lb ) , and it \'s " cheap " . ')
    'It weighs 3.5 kg (8 lb), and it\'s "cheap".'
    """
    line = line.rstrip("\r\n")
    heading = re.fullmatch(r" ?((?:= )+)(.+?)((?: =)+) *", line)
    if heading:
        level = len(heading[1]) // 2
        return "#" * level + " " + heading[2]
    if line.startswith(("  ", "\t")) and line.strip():
        return line
    line = line.strip(" ")
    line = re.sub(r" @([-,.])@ ", r"\1", line)  # 3 @.@ 14
    line = re.sub(r'(?<!\S)" ([^"]+) "(?!\w)', r'"\1"', line)  # said " no "
    line = re.sub(r"(?<=\S) +([.,;:!?)\]](?![^\s.,;:!?)\]'\"]))", r"\1", line)  # yes , please !
    line = re.sub(r"(?<=[(\[]) +", "", line)  # ( or so
    return re.sub(r" +(?='(?:s|t|d|m|re|ve|ll)\b)", "", line)  # John 's


# ---- Rows of tables ---------------------------------------------------------------------------


def text_document(text):
    """Return the document of a whole text."""
    return [(text, FULL_WEIGHT), (EOT, FULL_WEIGHT)]


def row_document(where, row, text_column="", clean=""):
    """Return the document of a table's row: its text, or examples to finetune on.

    Prompts have no weight in the loss. A response's weight follows from its rating.
    where: the row's place. The ValueError for a faulty row begins with it.
    """
    columns = row.keys() if isinstance(row, dict) and not text_column else set()
    if "messages" in columns:
        return chat_document(where, row["messages"], rating_weight(where, row))
    if {"prompt", "response"} <= columns:
        prompt = checked_text(where, row, "prompt")
        response = checked_text(where, row, "response")
        weight = rating_weight(where, row)
        return [(prompt, 0), (response, weight), (EOT, weight)]
    text = checked_text(where, row, text_column or "text")
    if clean:
        text = "\n".join(map(clean_line, text.split("\n")))
    return text_document(text)


def chat_document(where, messages, weight):
    """Return the document of a chat: one example for each answer.

    The example's prompt is everything before the answer. A system text, a question and an answer
    become
    text <|user|> text <|assistant|> text <|endoftext|>
    """
    prompt = []
    document = []
    for message in messages if isinstance(messages, list) else [messages]:
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLE_MARKS:
            raise ValueError(
                f"{where}: {str(message)[:60]!r} is not a message: it needs a role, one of "
                f"{', '.join(ROLE_MARKS)}, and a content"
            )
        content = checked_text(where, message, "content")
        prompt += ROLE_MARKS[role]
        if role == "assistant":
            document += [*prompt, (content, weight), (EOT, weight)]
        prompt.append((content, 0))
    if not document:
        raise ValueError(
            f"{where} has no assistant message for a model to learn from: "
            "add one, or remove the chat"
        )
    return document


def checked_text(where, row, column):
    """Return the text in a row's column. Raises ValueError if there is none."""
    columns = [str(key) for key in row] if isinstance(row, dict) else []
    if column not in columns:
        those = f"only {', '.join(columns)}" if columns else "no columns at all"
        raise ValueError(
            f"{where} has no {column!r}, {those}: name the text's column with --text_column"
        )
    text = row[column]
    if not isinstance(text, str) or re.search("[\ud800-\udfff]", text):  # or a lone surrogate
        raise ValueError(
            f"{where}: {column} is {str(text)[:60]!r}: it must be text without broken characters"
        )
    return text


def rating_weight(where, row):
    """Return the weight of a response: 255 if it is unrated or rated 5, and 0 if it is rated 1."""
    try:
        rating = float(row.get("rating", 5))
    except (TypeError, ValueError):
        rating = math.nan
    if not 1 <= rating <= 5:
        raise ValueError(f"{where}: rating is {row['rating']!r}: it must be a number from 1 to 5")
    return round(FULL_WEIGHT * (rating - 1) / 4)


# ---- Documents of files and of Hugging Face's data sets ----------------------------------------


def file_documents(files, text_column="", clean=""):
    """Yield the documents of files: a table's rows, wikitext's articles, or a file's whole text.

    A whole text ends with a mark if there are several files.
    """
    for path in files:
        if suffix_of(path) in (".csv", ".jsonl"):
            for where, row in read_rows(path):
                yield row_document(where, row, text_column, clean)
        elif clean:
            for article in read_articles(read_lines(read_blocks(path)), clean):
                yield text_document(article)
        else:
            yield long_document(path, ends_with_mark=len(files) > 1)


def long_document(path, ends_with_mark):
    """Yield the (text, weight) of a text file, which may be of any size, piece by piece."""
    for piece in read_pieces(read_blocks(path)):
        yield piece, FULL_WEIGHT
    if ends_with_mark:
        yield EOT, FULL_WEIGHT


def hub_documents(path, config="", split="train", text_column="", clean="", by_lines=False):
    """Yield (split, document) of a data set of the Hugging Face hub, or of a local folder.

    The split is None if it is still to be drawn. A validation split comes first, because max_tokens
    may end the work within the other split.
    by_lines: whether the rows are the lines of wikitext's articles.
    """
    for ours, theirs, rows in open_streams(path, config, split):
        numbered = ((f"{path}, {theirs} row {i}", row) for i, row in enumerate(rows))
        if by_lines:
            column = text_column or "text"
            lines = read_lines(checked_text(where, row, column) for where, row in numbered)
            for article in read_articles(lines, clean):
                yield ours, text_document(article)
        else:
            for where, row in numbered:
                yield ours, row_document(where, row, text_column, clean)


def open_streams(path, config, split):
    """Return [(our split or None, their split, rows)] of what the datasets library reads."""
    try:
        import datasets
    except ImportError as e:
        raise ValueError(
            "Hugging Face data sets need the datasets library: pip install datasets"
        ) from e
    try:
        datasets.disable_progress_bars()
        has_validation = "validation" in datasets.get_dataset_split_names(path, config or None)
        splits = {None: split}
        if split == "train" and has_validation:
            splits = {"val": "validation", "train": "train"}
        streams = []
        for ours, theirs in splits.items():
            rows = datasets.load_dataset(path, config or None, split=theirs, streaming=True)
            streams.append((ours, theirs, rows))
    except Exception as e:  # the library and the network raise errors of many kinds
        raise ValueError(
            f"{path} cannot be opened ({type(e).__name__}: {e}): check its name, --hf_config, "
            "--hf_split and the network"
        ) from e
    return streams
