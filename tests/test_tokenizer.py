"""Tokenizers: text to ids and back, by character or by byte pairs, and special tokens."""

import base64
import json

import pytest
import tiktoken

import gpt

SPECIAL = "<|endoftext|> <|user|> <|assistant|> <|pad|>"
# a vocabulary by hand: the bytes, not in their order, then merges
BYTES = [bytes([i]) for i in reversed(range(256))]
MERGES = [b"th", b"the", b" the", b"\xe6\x97", b"in", b"ing"]
PATTERN = r" ?\w+|\s+|[^\w\s]+"


def own_bpe(special=SPECIAL):
    """Return the Tokenizer of that vocabulary."""
    ranks = " ".join(base64.b64encode(token).decode("ascii") for token in BYTES + MERGES)
    return gpt.Tokenizer("bpe", ranks=ranks, pattern=PATTERN, special=special)


@pytest.fixture
def tiny_bpe(monkeypatch):
    """Let tiktoken know one encoding, `tiny`: bytes, the merges th and the, and a special token."""
    ranks = {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257}

    def get_encoding(name):
        if name != "tiny":
            raise OSError("no network in the tests")
        return tiktoken.Encoding(
            "tiny",
            pat_str=r"\w+|\s+|[^\w\s]+",
            mergeable_ranks=ranks,
            special_tokens={"<|endoftext|>": 258},
        )

    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)


def test_char_ids_are_the_order_of_the_characters():
    """The id of a character is its place in chars, sorted or not."""
    tokenizer = gpt.Tokenizer("char", "zay\n")
    assert tokenizer.encode("\nazy") == [3, 1, 0, 2]
    assert tokenizer.vocab_size == 4
    assert tokenizer.encode("") == []


@pytest.mark.parametrize(
    "text", ["hello\n", "a\tb\r\nc", "naïve café", "日本語 😀", " ", "\r\n\x85\u2028\x00\x0b"]
)
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
    assert [tokenizer.decode_bytes([i]) for i in range(3)] == [
        b"a",
        b"\xc3\xa9",
        b"\xf0\x9f\x98\x80",
    ]
    assert tokenizer.decode_bytes([]) == b""


@pytest.mark.parametrize(
    ("text", "named", "place"), [("ab~c", "~", 2), ("~", "~", 0), ("abé!~!", "é", 2)]
)
def test_an_unknown_character_is_named(text, named, place):
    """The message names the first one with its place, and those that are known, on one line."""
    tokenizer = gpt.Tokenizer("char", "\nabc")
    with pytest.raises(ValueError) as e:
        tokenizer.encode(text)
    assert f"character {place} of the text, {named!r}, is" in str(e.value)
    assert "'abc'" in str(e.value)
    assert "\n" not in str(e.value)


def test_special_tokens_follow_the_characters():
    """Their ids come after the others in the order of their names; decoding shows the names."""
    tokenizer = gpt.Tokenizer("char", "abc", special=SPECIAL)
    assert tokenizer.special_tokens == {
        "<|endoftext|>": 3,
        "<|user|>": 4,
        "<|assistant|>": 5,
        "<|pad|>": 6,
    }
    assert tokenizer.vocab_size == 7
    assert tokenizer.encode("cab") == [2, 0, 1]
    assert tokenizer.decode([4, 0, 5, 1, 3]) == "<|user|>a<|assistant|>b<|endoftext|>"
    plain = gpt.Tokenizer("char", "abc")
    assert (plain.special_tokens, plain.vocab_size) == ({}, 3)


def test_no_text_gives_a_special_token():
    """Text that spells a name is its characters, or refused where these are not known."""
    spelled = gpt.Tokenizer("char", "<|>userndoftxpa", special=SPECIAL)
    assert spelled.encode("<|user|>") == [0, 1, 3, 4, 5, 6, 1, 2]
    with pytest.raises(ValueError, match="character 1 of the text, '<', is"):
        gpt.Tokenizer("char", "abc", special=SPECIAL).encode("a<|user|>")


def test_bpe_merges_and_counts(tiny_bpe):
    """Ids are those that the merges give by hand: th is 256, the is 257, bytes are themselves."""
    tokenizer = gpt.Tokenizer("tiny")
    assert tokenizer.vocab_size == 259
    assert tokenizer.special_tokens == {"<|endoftext|>": 258}
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
    """What tiktoken raises becomes a ValueError that names the encoding and TIKTOKEN_CACHE_DIR."""
    with pytest.raises(ValueError, match="'gpt2'.*OSError.*TIKTOKEN_CACHE_DIR"):
        gpt.Tokenizer("gpt2")


def test_an_own_bpe_merges_by_rank():
    """Ids are the places in `ranks`, merged in their order within the words that `pattern` cuts."""
    tokenizer = own_bpe()
    assert tokenizer.vocab_size == 256 + 6 + 4
    assert tokenizer.encode("the the") == [257, 258]
    assert tokenizer.encode("thing") == [256, 261]
    assert tokenizer.encode("ab") == [255 - ord("a"), 255 - ord("b")]
    assert tokenizer.encode("\n the") == [255 - 10, 255 - 32, 257]  # the space is the first word's
    assert tokenizer.decode_bytes([259, 255 - 0xA5]) == "日".encode()
    assert tokenizer.special_tokens == {
        "<|endoftext|>": 262,
        "<|user|>": 263,
        "<|assistant|>": 264,
        "<|pad|>": 265,
    }
    assert tokenizer.decode([263, 257, 262]) == "<|user|>the<|endoftext|>"
    assert max(tokenizer.encode("<|user|>the<|endoftext|>")) < 262
    assert (own_bpe("").special_tokens, own_bpe("").vocab_size) == ({}, 262)


def test_an_own_bpe_is_tiktokens():
    """Any text has the ids that a tiktoken.Encoding of the same tokens gives, and comes back."""
    tokenizer, ranks = own_bpe(), {token: i for i, token in enumerate(BYTES + MERGES)}
    other = tiktoken.Encoding("other", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    for text in ("the thing, then: nothing.\n\n", "naïve 日本 😀", "<|endoftext|>", " ", ""):
        ids = tokenizer.encode(text)
        assert ids == other.encode_ordinary(text)
        assert tokenizer.decode(ids) == text


CASES = {
    "char": ({"chars": "\n ehnt"}, [5, 3, 2, 4, 0]),
    "char-special": ({"kind": "char", "chars": "\n ehnt", "special": SPECIAL}, [5, 3, 2, 4, 0]),
    "tiny": ({}, [257, 110, 10]),
    "bpe": (own_bpe().state, [257, 255 - ord("n"), 255 - 10]),
}


@pytest.mark.parametrize("name", CASES)
def test_state_rebuilds_the_tokenizer(tiny_bpe, name):
    """The state is strings only, survives JSON, and gives the same ids and special tokens."""
    given, expected = CASES[name]
    tokenizer = gpt.Tokenizer(**{"kind": name} | given)
    empty = dict.fromkeys(("chars", "ranks", "special", "special_ids", "json", "begin"), "")
    usual = {"pattern": "(?s:.)", "end": "<|endoftext|>", "chat": gpt.CHAT}
    assert tokenizer.state == {"kind": name} | usual | empty | given
    assert all(type(value) is str for value in tokenizer.state.values())
    rebuilt = gpt.Tokenizer(**json.loads(json.dumps(tokenizer.state)))
    assert rebuilt.encode("then\n") == tokenizer.encode("then\n") == expected
    assert rebuilt.vocab_size == tokenizer.vocab_size
    assert rebuilt.special_tokens == tokenizer.special_tokens
    assert rebuilt.state == tokenizer.state


def test_special_ids_leave_the_other_tokens_the_free_ones():
    """Special tokens may stand anywhere; the others take the ids that are left, in their order."""
    tokenizer = gpt.Tokenizer("char", "abc", special="<s> </s>", special_ids="0 2")
    assert tokenizer.special_tokens == {"<s>": 0, "</s>": 2}
    assert tokenizer.encode("abc") == [1, 3, 4]
    assert tokenizer.decode([0, 4, 2]) == "<s>c</s>"
    assert tokenizer.vocab_size == 5


def test_begin_and_end_are_ids_of_special_tokens_or_none():
    tokenizer = gpt.Tokenizer("char", "abc", special="<s> </s>", begin="<s>", end="</s>")
    assert (tokenizer.begin_id, tokenizer.end_id) == (3, 4)
    plain = gpt.Tokenizer("char", "abc")
    assert (plain.begin_id, plain.end_id) == (None, None)
    assert gpt.Tokenizer("char", "abc", special=SPECIAL).end_id == 3  # <|endoftext|>


def test_a_chat_template_is_split_at_its_bars():
    """Into what stands around a system text, a question and an answer."""
    assert gpt.Tokenizer("char", "a").chat_parts == ["%s", "<|user|>%s<|assistant|>", "%s"]
    assert gpt.Tokenizer("char", "a", chat="[%s]||Q%s||A%s.").chat_parts == ["[%s]", "Q%s", "A%s."]


def test_the_state_of_older_data_sets_is_enough():
    """kind and chars alone, as they were saved before there were special tokens."""
    tokenizer = gpt.Tokenizer(kind="char", chars="ab")
    assert (tokenizer.encode("ba"), tokenizer.decode([1, 0])) == ([1, 0], "ba")
