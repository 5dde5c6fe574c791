"""Texts that are encoded in pieces have the ids of the whole, and come back from their ids."""

import base64
import json
import random
import re

import numpy as np
import pytest
import regex
import tiktoken_ext.openai_public
from test_hf_tokenizer import sentencepiece

import gpt
import prepare
from extras import documents, hf_tokenizer

CHINESE = "子曰：「學而時習之，不亦說乎？\n\u3000\u3000有朋自遠方來，不亦樂乎！」一二三、四五。カナー、한국어，끝。\n"


def strange_text(seed, n=3000):
    """Return a text of words, spaces, line ends, digits, punctuation and letters of many scripts."""
    draw = random.Random(seed)
    parts = [
        "word",
        "It's",
        "x",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\r\n",
        "\t",
        "/",
        "//",
        ",",
        "...",
        "'s",
    ]
    parts += [
        "12",
        "3456",
        "_",
        "é",
        "e\u0301",
        "\u3000",
        "\xa0",
        "ไทย",
        "हि",
        "😀",
        "〇",
        "䷀",
        "𠮷",
    ]
    parts += re.findall(".", CHINESE)
    return "".join(draw.choice(parts) for _ in range(n))


@pytest.mark.parametrize("pattern", hf_tokenizer.PATTERNS, ids=range(len(hf_tokenizer.PATTERNS)))
def test_words_end_where_a_text_is_cut(pattern):
    """Each pattern cuts the pieces of a text into the words of the whole."""
    n_pieces = 0
    for seed in range(60):
        text = strange_text(seed)
        blocks = [text[i : i + 50] for i in range(0, len(text), 50)]
        pieces = list(documents.read_pieces(blocks))
        n_pieces += len(pieces)
        assert "".join(pieces) == text
        words = [word for piece in pieces for word in regex.findall(pattern, piece)]
        assert words == regex.findall(pattern, text)
    assert n_pieces > 60 * 20


@pytest.mark.parametrize("name", ["cl100k_base", "o200k_base", "gpt2", "r50k_base"])
def test_tiktokens_patterns_end_words_there_too(name, monkeypatch):
    """Only the pattern is asked for: the ranks would be downloaded."""
    module = tiktoken_ext.openai_public
    for loader in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
        monkeypatch.setattr(module, loader, lambda *_, **__: {bytes([b]): b for b in range(256)})
    pattern = module.ENCODING_CONSTRUCTORS[name]()["pat_str"]
    for seed in range(60):
        text = strange_text(seed)
        pieces = list(documents.read_pieces(text[i : i + 50] for i in range(0, len(text), 50)))
        words = [word for piece in pieces for word in regex.findall(pattern, piece)]
        assert words == regex.findall(pattern, text)


def test_a_text_without_spaces_is_read_in_pieces_of_a_block():
    text = CHINESE.replace("\n", "\n\u3000") * 4000
    pieces = list(documents.read_pieces(text[i : i + 2**15] for i in range(0, len(text), 2**15)))
    assert max(map(len, pieces)) < 2**16


def prepared(tmp_path, **settings):
    """Prepare a data set; return ({split: its ids without those that end a document}, tokenizer)."""
    meta = prepare.prepare(data_dir=str(tmp_path / "data"), name="x", vocab_size=400, **settings)
    tokenizer = gpt.Tokenizer(**meta["tokenizer"])
    ids = {}
    for split in ("train", "val"):
        stored = np.fromfile(tmp_path / "data" / "x" / f"{split}.bin", meta["dtype"]).tolist()
        ids[split] = [i for i in stored if i != tokenizer.end_id]
    return ids, tokenizer


def byte_level(pattern):
    """Return the tokenizer.json of a few byte pairs within the words of a pattern."""
    ranks = {bytes([b]): b for b in range(256)}
    ranks |= {b"in": 256, b"ing": 257, b" p": 258, b"a ": 259}
    spelled = " ".join(base64.b64encode(token).decode() for token in ranks)
    tokenizer = gpt.Tokenizer("bpe", ranks=spelled, pattern=pattern, special="<|endoftext|>")
    return hf_tokenizer.write_data(tokenizer.state, tokenizer.special_tokens, ranks, pattern)


FOREIGN = {
    "byte-level": lambda: byte_level(hf_tokenizer.GPT2_PATTERN),
    "own pattern": lambda: byte_level(r"[\s\S]{1,7}"),
    "metaspace": lambda: sentencepiece(True),
    "prepend": lambda: sentencepiece(False),
}


@pytest.fixture(params=["char", "bpe", *FOREIGN])
def any_tokenizer(request, tmp_path):
    """Return (--tokenizer, what this tokenizer puts before every text)."""
    if request.param not in FOREIGN:
        return request.param, ""
    data = FOREIGN[request.param]()
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    is_sentencepiece = request.param in ("metaspace", "prepend")
    settings = {"eos_token": "</s>"} if is_sentencepiece else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder, " " if is_sentencepiece else ""


def test_a_data_set_holds_its_text_whatever_the_tokenizer(any_tokenizer, tmp_path):
    """A text of several pieces: the ids of each split are those of its text as a whole."""
    kind, before = any_tokenizer
    text = "".join(f"{i} pails in a pond, a ping a day.\n" for i in range(25_000)) + CHINESE * 50
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    ids, tokenizer = prepared(tmp_path, input=tmp_path / "text.txt", tokenizer=kind)
    n_train = int(len(text) * 0.9)
    assert ids["train"] == tokenizer.encode(text[:n_train])
    assert ids["val"] == tokenizer.encode(text[n_train:])
    assert tokenizer.decode(ids["train"]) == before + text[:n_train]


def test_prompts_and_responses_keep_their_texts(any_tokenizer, tmp_path):
    """A response goes on where its prompt ended: no space comes between them."""
    kind, before = any_tokenizer
    rows = [{"prompt": f"pin {i}: ", "response": f"ping{i}, in a pond"} for i in range(40)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    ids, tokenizer = prepared(tmp_path, input=path, tokenizer=kind)
    texts = [before + row["prompt"] + row["response"] for row in rows]
    val = range(0, 40, 10)
    assert tokenizer.decode(ids["val"]) == "".join(texts[i] for i in val)
    assert tokenizer.decode(ids["train"]) == "".join(texts[i] for i in range(40) if i not in val)
