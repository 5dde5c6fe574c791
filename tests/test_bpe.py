"""Byte-level BPE: the trainer against the tokenizers library, the encoder against a plain one."""

import base64
import doctest
import random
import sysconfig
from collections import Counter
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import gpt
from extras import bpe
from extras.hf_tokenizer import GPT2_PATTERN
from prepare import SPECIALS


def python_sources(n_bytes):
    """Return so much of the standard library's sources, in order of their paths."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)[:n_bytes]


CORPORA = {
    "english": lambda: "\n\n".join(map(topics.get, sorted(topics))),
    "python": lambda: python_sources(1_000_000),
}


def count_words(texts):
    """Return the counts of the words as GPT-2 cuts them."""
    return bpe.count_words(texts, GPT2_PATTERN)


def library_bpe(text, n_tokens):
    """Train the tokenizers library's byte-level BPE; return its Tokenizer."""
    theirs = Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=n_tokens, initial_alphabet=alphabet, show_progress=False
    )
    theirs.train_from_iterator([text], trainer)
    return theirs


def as_bytes(token):
    """Return the bytes of one of the library's tokens, spelled in printable characters."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    table = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    return bytes(table[c] for c in token)


def own_tokenizer(tokens):
    """Return a gpt.Tokenizer of a trained vocabulary."""
    ranks = " ".join(base64.b64encode(token).decode() for token in tokens)
    return gpt.Tokenizer("bpe", ranks=ranks, pattern=GPT2_PATTERN, special=SPECIALS)


def plain_encode(ranks, word):
    """Encode a word as BPE is defined: merge the lowest-ranked neighbours until none has a rank."""
    parts = [bytes([b]) for b in word]
    while len(parts) > 1:
        rank, i = min((ranks.get(a + b, 1 << 30), i) for i, (a, b) in enumerate(pairwise(parts)))
        if rank == 1 << 30:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [ranks[part] for part in parts]


@pytest.fixture(scope="module")
def trained():
    """A vocabulary of 1,000 tokens of the English corpus, and its tokenizer."""
    tokens = bpe.train_bpe(count_words([CORPORA["english"]()]), 1000)
    return tokens, own_tokenizer(tokens)


@pytest.mark.parametrize("corpus", CORPORA)
def test_the_library_learns_the_same_vocabulary(corpus):
    """Token by token, 4,096 of them: ties are broken as there, by the lower ids of the pair."""
    text = CORPORA[corpus]()
    ours, theirs = bpe.train_bpe(count_words([text]), 4096), library_bpe(text, 4096)
    vocabulary = sorted(theirs.get_vocab(), key=theirs.get_vocab().get)
    assert ours == [as_bytes(token) for token in vocabulary]
    part = text[: 10**6]
    n_ours, n_theirs = len(own_tokenizer(ours).encode(part)), len(theirs.encode(part).ids)
    assert n_ours == pytest.approx(n_theirs, rel=0.001)


def test_a_small_vocabulary_is_the_beginning_of_a_large_one(trained):
    """Training is greedy, so 500 tokens are the first of 1,000."""
    tokens, _ = trained
    assert bpe.train_bpe(count_words([CORPORA["english"]()]), 500) == tokens[:500]


def test_merges_by_hand():
    """aab twice, ab once: ab occurs 3 times, then a+ab twice; b"" and single bytes add nothing."""
    tokens = bpe.train_bpe({b"aab": 2, b"ab": 1, b"z": 9, b"": 5}, 300)
    assert tokens[256:] == [b"ab", b"aab"]
    assert sorted(tokens[:256]) == [bytes([b]) for b in range(256)]


def test_overlapping_pairs_are_merged_from_the_left():
    """aaa is aa and a; five of them leave one over."""
    assert bpe.merge([7, 7, 7], (7, 7), 9) == [9, 7]
    assert bpe.merge([7, 7, 7, 7, 1, 7], (7, 7), 9) == [9, 9, 1, 7]
    assert bpe.merge([1, 2, 1, 2, 3], (1, 2), 9) == [9, 9, 3]
    assert bpe.train_bpe({b"aaaaaa": 1}, 300)[256:] == [b"aa", b"aaaa", b"aaaaaa"]


def test_ties_go_to_the_lower_ids():
    """All pairs occur once: in GPT-2's order of bytes printable ones come before the space."""
    assert bpe.train_bpe({b" a": 1, b"xy": 1}, 257)[256:] == [b"xy"]
    assert bpe.train_bpe({b"ac": 1, b"ab": 1}, 257)[256:] == [b"ab"]


def test_the_order_of_the_words_changes_nothing():
    """Sets and dictionaries may run in another order: the vocabulary is the same."""
    counts = count_words([python_sources(200_000)])
    shuffled = list(counts.items())
    random.Random(1).shuffle(shuffled)
    assert bpe.train_bpe(dict(shuffled), 800) == bpe.train_bpe(counts, 800)


def test_words_are_those_of_gpt2s_pattern_and_long_ones_are_cut():
    """Counts are of bytes; a word of 2,500 letters counts as three."""
    assert count_words(["it's é é 12", "it"]) == Counter(
        {b"it": 2, b"'s": 1, " é".encode(): 2, b" 12": 1}
    )
    assert count_words(["x" * 2500]) == Counter({b"x" * 1000: 2, b"x" * 500: 1})


def test_special_tokens_follow_and_no_text_gives_them(trained):
    """Ids 1000 to 1003, each distinct; spelled out in a text they are ordinary bytes."""
    _, tokenizer = trained
    names = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|pad|>"]
    assert tokenizer.special_tokens == {name: 1000 + i for i, name in enumerate(names)}
    assert tokenizer.vocab_size == 1004
    for name in names:
        ids = tokenizer.encode(f"a{name}b")
        assert max(ids) < 1000
        assert tokenizer.decode(ids) == f"a{name}b"
    assert tokenizer.decode([1000, 1003]) == "<|endoftext|><|pad|>"


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_encoding_is_that_of_a_plain_encoder_and_round_trips(trained, text):
    """Any string: word by word the ids of the definition, and back."""
    tokens, tokenizer = trained
    ranks = {token: i for i, token in enumerate(tokens)}
    words = regex.findall(GPT2_PATTERN, text)
    assert "".join(words) == text
    ids = tokenizer.encode(text)
    assert ids == [i for word in words for i in plain_encode(ranks, word.encode())]
    assert tokenizer.decode(ids) == text


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=300))
def test_any_bytes_round_trip(trained, content):
    """Bytes that are no UTF-8 come back too, whichever ids spell them."""
    tokens, tokenizer = trained
    assert tokenizer.decode_bytes(tokenizer.encoding._encode_bytes(content)) == content
    ranks = {token: i for i, token in enumerate(tokens)}
    assert tokenizer.decode_bytes(plain_encode(ranks, content)) == content


@settings(max_examples=100, deadline=None)
@given(text=st.text(min_size=1))
def test_char_round_trips(text):
    """Any string by its own characters."""
    tokenizer = gpt.Tokenizer("char", "".join(sorted(set(text))))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_examples_of_the_docstrings():
    """They give what they say."""
    assert doctest.testmod(bpe) == (0, 2)


def test_with_room_enough_each_word_becomes_one_token_and_none_is_twice():
    """Also words that occur once, and tokens that two pairs of others make."""
    draw = random.Random(4)
    words = ["".join(draw.choices("abc", k=draw.randint(2, 7))) for _ in range(60)]
    counts = Counter(word.encode() for word in words)
    tokens = bpe.train_bpe(counts, 5000)
    assert len(tokens) == len(set(tokens)) < 5000
    assert counts.keys() <= set(tokens)
    assert 1 in counts.values()
