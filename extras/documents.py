"""Read files, tables and Hugging Face data sets of any size as documents.

A document is an iterable of (text, weight). The weight, from 0 to 255, is that of the text's
tokens in the loss. A special token is a text with a class of its own. The reading functions are
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
SPECIALS = f"{EOT} <|user|> <|assistant|> <|pad|>"  # for the tokenizers that prepare.py makes
FULL_WEIGHT = 255  # each weight is stored in one byte


class Continuation(str):
    """A text that goes on where the one before it ends, such as the response to a prompt."""


class Unlearned(str):
    """An answer that a conversation holds, but that is not to be learned."""


class Conversation(str):
    """All texts of a conversation, the last of which is an answer to learn.

    turns: (role, text) pairs. The tokenizer puts its marks between them.
    """

    def __new__(cls, turns):
        self = super().__new__(cls, "".join(text for _, text in turns))
        self.turns = turns
        return self

    def __reduce__(self):  # how it gets to the processes that encode
        return Conversation, (self.turns,)


# ---- Files -------------------------------------------------------------------------------------


@cache
def say_once(message):
    """Print a message only once, because a file is read more than once."""
    print(message)


# The first bytes of files that are often taken for texts
SIGNATURES = {
    b"PK\x03\x04": "a zip archive, as .docx and .xlsx are too: unpack it, or save it as text",
    b"PAR1": "a Parquet file: give the folder that holds it to --hf",
    b"%PDF": "a PDF: save its text first, for example with pdftotext",
    b"BZh": "compressed with bzip2: unpack it",
    b"\xfd7zXZ": "compressed with xz: unpack it",
    b"7z\xbc\xaf": "a 7-Zip archive: unpack it",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it",
    b"ARROW1": "an Arrow file: give the folder that holds it to --hf",
}


def suffix_of(path):
    """Return the suffix that tells a file's kind: .txt for notes.txt and for NOTES.TXT.gz."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def find_files(folder, suffixes):
    """Return the non-empty files in a folder and its subfolders that have one of the suffixes.

    They are sorted by path. Hidden ones, and those in hidden folders, are left out. Raises
    FileNotFoundError if there are none.
    """
    files, hidden = [], []
    for path in folder.rglob("*"):
        if path.is_symlink() and path.is_dir():
            say_once(f"{path} is a link to a folder and is left out")
        if suffix_of(path) in suffixes and path.is_file() and path.stat().st_size:
            is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
            (hidden if is_hidden else files).append(path)
    if hidden:
        say_once(f"left out {len(hidden)} hidden file(s), such as {min(hidden, key=str)}")
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no {' or '.join(suffixes)} file that contains text: "
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
            for begins, kind in SIGNATURES.items():
                if offset == 0 and block.startswith(begins):
                    raise ValueError(f"{path} is {kind}")
            at_end = len(block) < size
            start = offset - len(decoder.getstate()[0])  # the last block may have cut a character

            try:
                text = decoder.decode(block, final=at_end)
            except UnicodeDecodeError as e:
                raise ValueError(
                    f"{path} is not UTF-8 text (byte {start + e.start} is "
                    f"0x{e.object[e.start]:02x}): convert it first, for example with iconv"
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
    """Yield the lines of a text that comes in blocks, each with its line ending."""
    rest = ""
    for block in blocks:
        *lines, rest = (rest + block).split("\n")
        for line in lines:
            yield line + "\n"
    if rest:
        yield rest


# Where every pattern of PATTERNS ends a word: before the space that follows a word, after the line
# end between two words, and before punctuation that follows a Chinese, Japanese or Korean letter.
LETTER = r"[\u3041-\u3096\u30a1-\u30fa\u3400-\u4db5\u4e00-\u9fef\uac00-\ud7a3]"
LAST_CUT = re.compile(rf"(?s).*(?:\S(?= )|\S\n(?=[^\s/])|{LETTER}(?=[、。，！？；：]))")
LONGEST_PIECE = 2**24


def read_pieces(blocks):
    """Yield pieces of a text that comes in blocks. Each piece can be tokenized on its own.

    This holds for the patterns of hf_tokenizer.PATTERNS. If there is no safe place to cut within
    16 million characters, the text is cut elsewhere.
    """
    rest = ""
    for block in blocks:
        searched = max(0, len(rest) - 2)  # what precedes holds no cut
        rest += block
        cut = LAST_CUT.match(rest, searched)
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


TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")  # the suffixes of tables


def read_rows(path):
    """Yield (where, row) for each row of a table; `where` names the file and the row's place."""
    readers = {".json": read_json, ".csv": read_csv, ".tsv": read_csv}
    return readers.get(suffix_of(path), read_jsonl)(path)


def read_json(path):
    """Yield (where, value) for each record of a .json file.

    The file is a list of records, or a dict with one such list. Many files with this suffix hold a
    record on each line instead, as .jsonl files do.
    """
    try:
        records = json.loads("".join(read_blocks(path)))
    except json.JSONDecodeError as e:
        if e.msg == "Extra data" and e.lineno > 1:
            yield from read_jsonl(path)
            return
        raise ValueError(
            f"{path}, line {e.lineno} is not valid JSON ({e.msg} at column {e.colno}): correct it"
        ) from e
    if isinstance(records, dict):
        lists = [value for value in records.values() if isinstance(value, list)]
        records = lists[0] if len(lists) == 1 and "messages" not in records else [records]
    if not isinstance(records, list):
        raise ValueError(f"{path} holds no list of records: rename it to .txt if it is plain text")
    for i, record in enumerate(records, 1):
        yield f"{path}, record {i}", record


def read_jsonl(path):
    """Yield (where, value) for each nonblank line of a .jsonl file."""
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
    """Yield (where, row) for each row of a .csv or .tsv file. The first line names the row's keys.

    A comma, a semicolon or a tab separates the fields, whichever the first line has most of.
    """
    csv.field_size_limit(2**31 - 1)  # Python's own limit, 128 KB, is too low for a text
    lines = read_lines(read_blocks(path))
    first = next(lines, "")
    separator = "\t" if suffix_of(path) == ".tsv" else max(",;\t", key=first.count)
    if separator != "," and suffix_of(path) == ".csv":
        say_once(f"{path}: fields are separated by {separator!r}")
    reader = csv.DictReader(chain([first], lines), strict=True, delimiter=separator)
    try:
        for row in reader:
            if None in row:
                raise csv.Error("more fields than columns: put quotes around texts with commas")
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
    columns = row if isinstance(row, dict) and not text_column else {}
    turns = conversation_turns(where, columns)
    if turns:
        return chat_document(where, turns, rating_weight(where, row))
    for answer in ("response", "completion"):
        if {"prompt", answer} <= columns.keys():
            if row.get("system"):
                raise ValueError(
                    f"{where} has a system text, which needs a conversation: "
                    f"rename the columns prompt and {answer} to question and answer"
                )
            prompt = checked_text(where, row, "prompt")
            response = checked_text(where, row, answer)
            weight = rating_weight(where, row)
            return [(prompt, 0), (Continuation(response), weight), (EOT, weight)]
    text = checked_text(where, row, text_column or "text")
    if clean:
        text = "\n".join(map(clean_line, text.split("\n")))
    return text_document(text)


# What data sets call the roles of a conversation
ROLE_NAMES = {"system": "system", "user": "user", "human": "user", "prompter": "user"}
ROLE_NAMES |= dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant")


def conversation_turns(where, row):
    """Return the (role, text) pairs of a row that holds a conversation, or else [].

    It knows the columns of OpenAI (messages), ShareGPT (conversations), Alpaca (instruction, input,
    output), TRL (prompt and completion, as messages), and those of questions and answers. A column
    named system holds a text that comes first.
    """
    turns = [("system", checked_text(where, row, "system"))] if row.get("system") else []
    used = {"system", "rating"}
    if isinstance(row.get("prompt"), list) and "completion" in row:
        used |= {"prompt", "completion"}
        turns += message_turns(where, row["prompt"]) + message_turns(where, row["completion"])
    elif {"messages", "conversations", "conversation"} & row.keys():
        column = next(c for c in ("messages", "conversations", "conversation") if c in row)
        used.add(column)
        turns += message_turns(where, row[column])
    elif {"instruction", "output"} <= row.keys():
        used |= {"instruction", "input", "output", "history"}
        turns += instruction_turns(where, row)
    elif {"question", "answer"} <= row.keys():
        used |= {"question", "answer"}
        say_once("rows with question and answer are read as conversations")
        turns.append(("user", checked_text(where, row, "question")))
        turns.append(("assistant", checked_text(where, row, "answer")))
    else:
        return []
    if row.get("tools"):
        raise ValueError(f"{where} has tools, which gpt.py does not support: remove the row")
    unused = sorted(str(column) for column in row.keys() - used - {"tools"})
    if unused:
        say_once(f"conversations are read without the columns {', '.join(unused)}")
    if turns[:1] == turns[1:2]:  # the column repeats what the messages begin with
        turns = turns[1:]
    return alternating(where, turns)


def instruction_turns(where, row):
    """Return the (role, text) pairs of a row in Alpaca's form, with the turns of its history."""
    say_once("rows with instruction and output are read as conversations")
    turns = []
    for earlier in row.get("history") or []:
        turns += zip(("user", "assistant"), map(str, earlier), strict=False)
    question = checked_text(where, row, "instruction")
    if row.get("input"):
        question += "\n" + checked_text(where, row, "input")
    return [*turns, ("user", question), ("assistant", checked_text(where, row, "output"))]


def message_turns(where, messages):
    """Return the (role, text) pairs of messages. Raises ValueError for one that is not a message.

    An answer with "weight": 0 or "train": false becomes an Unlearned text.
    """
    turns = []
    for message in messages if isinstance(messages, list) else [messages]:
        fields = message if isinstance(message, dict) else {}
        role = ROLE_NAMES.get(str(fields.get("role", fields.get("from"))).lower())
        if role is None:
            raise ValueError(
                f"{where}: {str(message)[:60]!r} is not a message: it needs a role (system, "
                "user or assistant) and content"
            )
        for key in ("tool_calls", "function_call"):
            if fields.get(key):
                raise ValueError(
                    f"{where} has {key}, which gpt.py does not support: remove the row"
                )
        text = checked_text(where, message, "value" if "value" in fields else "content")
        weight = fields.get("weight")
        if weight not in (None, 0, 1):
            raise ValueError(f"{where}: a message's weight is {weight!r}: it must be 0 or 1")
        if weight == 0 or fields.get("train") is False:
            text = Unlearned(text)
        turns.append((role, text))
    return turns


def alternating(where, turns):
    """Return turns of alternating roles: consecutive texts of the same role are joined.

    Templates write a question and an answer in turn. Raises ValueError if an answer comes first.
    """
    merged = []
    for role, text in turns:
        if merged and merged[-1][0] == role:
            say_once("consecutive messages of the same role are joined by an empty line")
            before = merged[-1][1]
            kind = (
                Unlearned if isinstance(before, Unlearned) or isinstance(text, Unlearned) else str
            )
            merged[-1] = (role, kind(f"{before}\n\n{text}"))
        else:
            merged.append((role, text))
    first = [role for role, _ in merged if role != "system"][:1]
    if first == ["assistant"]:
        raise ValueError(
            f"{where} begins with an assistant message: put the user message that it answers "
            "before it, or remove it"
        )
    return merged


def chat_document(where, turns, weight):
    """Return the document of a conversation: one example for each answer.

    The example's prompt is everything before the answer. A system prompt, a question and an answer
    become, in this project's own marks,
    text <|user|> text <|assistant|> text <|endoftext|>
    """
    turns = [
        turn for turn in turns if turn != ("system", "")
    ]  # as in a chat without a system prompt
    roles = [role for role, _ in turns]
    if "system" in roles[1:]:
        raise ValueError(
            f"{where} has a system message after other messages: make it the first, or remove it"
        )
    if "assistant" not in roles:
        raise ValueError(
            f"{where} has no assistant message for a model to learn from: "
            "add one, or remove the chat"
        )
    ends = [
        i + 1
        for i, (role, text) in enumerate(turns)
        if role == "assistant" and not isinstance(text, Unlearned)
    ]
    return [(Conversation(turns[:end]), weight) for end in ends]


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
        if suffix_of(path) in TABLES:
            for where, row in read_rows(path):
                document = row_document(where, row, text_column, clean)
                if document:  # a conversation may hold nothing to learn
                    yield document
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
    """Yield (split, document) of a data set on the Hugging Face hub or in a local folder.

    The split is None if it is still to be drawn. A validation split comes first, because max_tokens
    may end the work within the other split.
    by_lines: whether the rows are the lines of wikitext's articles.
    """
    for ours, theirs, rows in open_streams(path, config, split):
        numbered = numbered_rows(f"{path}, {theirs}", rows)
        if by_lines:
            column = text_column or "text"
            lines = read_lines(checked_text(where, row, column) for where, row in numbered)
            for article in read_articles(lines, clean):
                yield ours, text_document(article)
        else:
            for where, row in numbered:
                document = row_document(where, row, text_column, clean)
                if document:
                    yield ours, document


def numbered_rows(where, rows):
    """Yield (where with the row's number, row). Raises ValueError where they cannot be read."""
    n = 0
    try:
        for row in rows:
            yield f"{where} row {n}", row
            n += 1
    except Exception as e:  # the library and the network raise errors of many kinds
        raise ValueError(
            f"{where} cannot be read after {n} rows ({type(e).__name__}: {e}): "
            "download the file again, or check the network"
        ) from e


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
        saved = saved_splits(datasets, Path(path), split)
        names = saved or datasets.get_dataset_split_names(path, config or None)
        splits = {None: split}
        if split == "train" and "validation" in names:
            splits = {"val": "validation", "train": "train"}
        streams = []
        for ours, theirs in splits.items():
            if saved:
                rows = saved[theirs]
            else:
                rows = datasets.load_dataset(path, config or None, split=theirs, streaming=True)
            streams.append((ours, theirs, rows))
    except Exception as e:  # the library and the network raise errors of many kinds
        raise ValueError(
            f"{path} cannot be opened ({type(e).__name__}: {e}): check its name, --hf_config, "
            "--hf_split and the network"
        ) from e
    return streams


def saved_splits(datasets, folder, split):
    """Return {split's name: rows} of a folder that save_to_disk wrote, and {} for any other."""
    if (folder / "dataset_dict.json").exists():
        return dict(datasets.load_from_disk(folder))
    if (folder / "state.json").exists() and (folder / "dataset_info.json").exists():
        return {split: datasets.load_from_disk(folder)}
    return {}
