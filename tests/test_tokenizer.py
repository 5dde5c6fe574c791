"""Tokenizers: text to ids and back, by character or by byte pairs."""

import json

import pytest
import tiktoken

import gpt


@pytest.fixture
def tiny_bpe(monkeypatch):
    """Let tiktoken know one encoding, `tiny`: 256 bytes, the merges th and the, and a special token."""
    ranks = {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257}

    def get_encoding(name):
        if name != "tiny":
            raise OSError("no network in the tests")
        return tiktoken.Encoding(
            "tiny", pat_str=r"\w+|\s+|[^\w\s]+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 258}
        )

    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)


def test_char_ids_are_the_order_of_the_characters():
    """The id of a character is its place in chars, sorted or not."""
    tokenizer = gpt.Tokenizer("char", "zay\n")
    assert tokenizer.encode("\nazy") == [3, 1, 0, 2]
    assert tokenizer.vocab_size == 4
    assert tokenizer.encode("") == []


@pytest.mark.parametrize("text", ["hello\n", "a\tb\r\nc", "naïve café", "日本語 😀", " ", ""])
def test_char_round_trip(text):
    """Every text of known characters comes back as it was."""
    tokenizer = gpt.Tokenizer("char", "".join(sorted(set(text))))
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode("utf-8")


def test_char_decode_bytes_are_utf8():
    """One id is one whole character, of one byte or more."""
    tokenizer = gpt.Tokenizer("char", "aé😀")
    assert [tokenizer.decode_bytes([i]) for i in range(3)] == [b"a", b"\xc3\xa9", b"\xf0\x9f\x98\x80"]
    assert tokenizer.decode_bytes([]) == b""


def test_an_unknown_character_is_named():
    """The message names the character and those that are known, on one line."""
    tokenizer = gpt.Tokenizer("char", "\nabc")
    with pytest.raises(ValueError) as e:
        tokenizer.encode("ab~c")
    assert "'~'" in str(e.value)
    assert "'abc'" in str(e.value)
    assert "\n" not in str(e.value)


def test_bpe_merges_and_counts(tiny_bpe):
    """Ids are those that the merges give by hand: th is 256, the is 257, other bytes are themselves."""
    tokenizer = gpt.Tokenizer("tiny")
    assert tokenizer.vocab_size == 259
    assert tokenizer.encode("the then th") == [257, 32, 257, 110, 32, 256]
    assert tokenizer.encode("é") == [0xC3, 0xA9]


def test_bpe_takes_special_tokens_as_plain_text(tiny_bpe):
    """Text that spells <|endoftext|> is thirteen bytes and never id 258."""
    tokenizer = gpt.Tokenizer("tiny")
    spelled = [60, 124, 101, 110, 100, 111, 102, 116, 101, 120, 116, 124, 62]
    assert tokenizer.encode("<|endoftext|>") == spelled
    assert tokenizer.decode([60, 258]) == "<<|endoftext|>"


def test_bpe_round_trip_and_parts_of_characters(tiny_bpe):
    """A text comes back; half a character is its byte, shown as a replacement character."""
    tokenizer = gpt.Tokenizer("tiny")
    for text in ("the theory, then.\n", "naïve 日本 😀", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode_bytes([257, 0xC3]) == b"the\xc3"
    assert tokenizer.decode([257, 0xC3]) == "the\ufffd"


def test_an_encoding_that_is_not_to_be_had_names_the_way_out(tiny_bpe):
    """Whatever tiktoken raises becomes a ValueError that names the encoding and TIKTOKEN_CACHE_DIR."""
    with pytest.raises(ValueError, match="'gpt2'.*OSError.*TIKTOKEN_CACHE_DIR"):
        gpt.Tokenizer("gpt2")


@pytest.mark.parametrize(("kind", "chars"), [("char", "\n ehnt"), ("tiny", "")])
def test_state_rebuilds_the_tokenizer(tiny_bpe, kind, chars):
    """The state is strings only, survives JSON, and gives the same ids."""
    tokenizer = gpt.Tokenizer(kind, chars)
    assert tokenizer.state == {"kind": kind, "chars": chars}
    rebuilt = gpt.Tokenizer(**json.loads(json.dumps(tokenizer.state)))
    expected = {"char": [5, 3, 2, 4, 0], "tiny": [257, 110, 10]}[kind]
    assert rebuilt.encode("then\n") == tokenizer.encode("then\n") == expected
    assert rebuilt.vocab_size == tokenizer.vocab_size
