"""Hugging Face's tokenizer.json in and out, against tokenizers, transformers and tiktoken."""

import base64
import copy
import datetime
import itertools
import json
import random
import sys
import sysconfig
import unicodedata
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import tiktoken
import tiktoken_ext.openai_public
import tokenizers
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer

import gpt
import hub
from extras.bpe import count_words, train_bpe
from extras.chat import encode_conversation
from extras.hf_tokenizer import GPT2_PATTERN, LibraryEncoding
from hub import read_tokenizer, write_tokenizer

SPECIALS = "<|endoftext|> <|user|> <|assistant|> <|pad|>"  # of prepare.py
TOPICS = "\n\n".join(map(topics.get, sorted(topics)))
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "<|im_start|>system\n%s<|im_end|>\n||<|im_start|>user\n%s<|im_end|>\n"
    "<|im_start|>assistant\n||%s<|im_end|>\n"
)
LLAMA3_CHAT = (
    "<|start_header_id|>system<|end_header_id|>\n\n%s<|eot_id|>"
    "||<|start_header_id|>user<|end_header_id|>\n\n%s"
    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n||%s<|eot_id|>"
)
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
LLAMA3_SPLIT = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTE_LEVEL])
SMOLLM2_SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(f"<extra_{i}>" for i in range(14)),
]
LLAMA3_SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]


@cache
def real_text(n_bytes=10**6):
    """Return Python's documentation and so much of its sources that it is a megabyte."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return (TOPICS + "\n".join(path.read_text(encoding="utf-8") for path in paths[:60]))[:n_bytes]


@cache
def kinds_of_characters():
    """Return characters by kinds: ASCII, digits, white space, emoji, marks, any script."""
    known = unicodedata.ucd_3_2_0  # what any version of Unicode has
    assigned = [c for c in map(chr, range(0x30000)) if known.category(c) not in ("Cn", "Cs")]
    return [
        "abcdefghijklmnopqrstuvwxyzABCST",
        "0123456789\u0663\u0967\u2167\u00b2\u00bd\u3007",
        " \t\n\r   \n  \x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u1680\u180e\u2003\u200b\u2028\u2029",
        "\u202f\u205f\u3000\ufeff",
        ".,;:!?'\"()[]{}<>|/\\@#$%^&*-_=+~`",
        ["'s", "'LL", "'re", "'\u017f", " the", "return ", "  ", "\n\n", "<|endoftext|>"],
        "\u0301\u0308\u20e3\ufe0f\u200d\U0001f600\U0001f468\U0001f469\U0001f1e6\U0001f3fd",
        [c for c in assigned if known.category(c)[0] in "MC"],
        assigned,
    ]


@cache
def random_strings(n, seed=0):
    """Return strings of 1 to 40 characters or words, each string of some kinds."""
    rng, strings = random.Random(seed), []
    for _ in range(n):
        chosen = rng.sample(kinds_of_characters(), rng.randint(1, 4))
        strings.append("".join(rng.choice(rng.choice(chosen)) for _ in range(rng.randint(1, 40))))
    return strings


def trained(pre_tokenizer, special=(), n_tokens=1200, text=TOPICS[:200_000]):
    """Return the library's byte-level BPE of some text, its special tokens first."""
    theirs = tokenizers.Tokenizer(models.BPE())
    theirs.pre_tokenizer, theirs.decoder = pre_tokenizer, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=n_tokens,
        initial_alphabet=alphabet,
        special_tokens=list(special),
        show_progress=False,
    )
    theirs.train_from_iterator([text], trainer)
    return theirs


def sentencepiece(metaspace):
    """Return the tokenizer.json of one as Llama 2's, with Metaspace or, as there, normalizers."""
    return copy.deepcopy(trained_sentencepiece(metaspace))


@cache
def trained_sentencepiece(metaspace):
    theirs = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if metaspace:
        theirs.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        theirs.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    strip = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    theirs.decoder = decoders.Sequence(strip)
    special = ["<unk>", "<s>", "</s>"]
    fallback = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special + fallback, show_progress=False
    )
    theirs.train_from_iterator(TOPICS[:100_000].split("\n"), trainer)
    data = json.loads(theirs.to_str())
    data["added_tokens"] = data["added_tokens"][:3]
    return data


MODELS = {
    "gpt2": (BYTE_LEVEL, (), False, GPT2_PATTERN),
    "llama3": (LLAMA3_SPLIT, (), False, LLAMA3_PATTERN),
    "llama3-ignore_merges": (LLAMA3_SPLIT, (), True, LLAMA3_PATTERN),
    "smollm2": (DIGITS, SMOLLM2_SPECIAL, False, None),
}


@pytest.fixture(scope="module")
def library_tokenizers():
    """The library's tokenizers of MODELS, as dicts; the special tokens of two come last."""
    made = {}
    for name, (pre_tokenizer, special, ignore_merges, _) in MODELS.items():
        theirs = trained(pre_tokenizer, special)
        theirs.add_special_tokens(
            ["<|endoftext|>"] if name == "gpt2" else [] if special else LLAMA3_SPECIAL
        )
        data = made[name] = json.loads(theirs.to_str())
        data["model"]["ignore_merges"] = ignore_merges
    return made


@pytest.fixture
def folder(tmp_path):
    """Return a function that writes tokenizer.json and other files, and returns their folder."""

    def write(data, **files):
        path = tmp_path / "model"
        path.mkdir(exist_ok=True)
        for name, content in {"tokenizer": data, **files}.items():
            (path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
        return path

    return write


def ids_of(theirs, text):
    """Return the library's ids of text, with the names of special tokens as text."""
    theirs.encode_special_tokens = True
    return theirs.encode(text, add_special_tokens=False).ids


def assert_like(tokenizer, theirs, texts):
    """Assert that tokenizer gives texts the library's ids, and decodes them again."""
    theirs.encode_special_tokens = True
    texts = list(texts)
    expected = [
        encoding.ids for encoding in theirs.encode_batch_fast(texts, add_special_tokens=False)
    ]
    for text, ids in zip(texts, expected, strict=True):
        assert tokenizer.encode(text) == ids, repr(text)
        assert tokenizer.decode(ids) == text


def own_bpe(tokens, pattern=GPT2_PATTERN, **more):
    ranks = " ".join(base64.b64encode(token).decode() for token in tokens)
    return gpt.Tokenizer("bpe", ranks=ranks, pattern=pattern, **more)


@cache
def own_tokens():
    return train_bpe(count_words([TOPICS[:50_000]], GPT2_PATTERN), 600)


ALL_BYTES = [bytes([i]) for i in range(256)]

# ---- Reading ----


@pytest.mark.parametrize("name", MODELS)
def test_a_byte_level_tokenizer_becomes_tiktokens(library_tokenizers, folder, name):
    """Equal ids on 10,000 random strings and a megabyte of text, whatever they hold."""
    data = library_tokenizers[name]
    theirs, tokenizer = (
        tokenizers.Tokenizer.from_str(json.dumps(data)),
        read_tokenizer(folder(data)),
    )
    assert tokenizer.state["kind"] == "bpe"
    assert tokenizer.vocab_size == theirs.get_vocab_size()
    assert tokenizer.special_tokens == {
        token["content"]: token["id"] for token in data["added_tokens"]
    }
    assert tokenizer.state["pattern"] == MODELS[name][3] or name == "smollm2"
    assert tokenizer.state["special_ids"] == (
        "" if name != "smollm2" else " ".join(map(str, range(17)))
    )
    n_strings, n_bytes = (10_000, 10**6) if name != "llama3-ignore_merges" else (2000, 10**5)
    assert_like(tokenizer, theirs, [*random_strings(n_strings), real_text(n_bytes)])


def test_both_spellings_of_merges_are_read(library_tokenizers, folder):
    """Pairs, or older files' texts with a space; the type and use_regex may be missing."""
    data = copy.deepcopy(library_tokenizers["gpt2"])
    expected = read_tokenizer(folder(data)).state
    data["model"]["merges"] = [" ".join(pair) for pair in data["model"]["merges"]]
    data["model"] |= {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    del data["model"]["type"], data["pre_tokenizer"]["use_regex"]
    assert read_tokenizer(folder(data)).state == expected


def test_more_merges_than_tokens_change_nothing(library_tokenizers, folder):
    """Llama 3's file lists all pairs that make a token, of which only one ever meets."""
    data = copy.deepcopy(library_tokenizers["llama3-ignore_merges"])
    vocab, state = data["model"]["vocab"], read_tokenizer(folder(data)).state
    pairs = [
        (t[:i], t[i:]) for t in sorted(vocab, key=vocab.get) for i in range(1, len(t)) if t in vocab
    ]
    data["model"]["merges"] = [[a, b] for a, b in pairs if a in vocab and b in vocab]
    assert len(data["model"]["merges"]) > len(vocab)
    tokenizer = read_tokenizer(folder(data))
    assert tokenizer.state == state
    assert_like(
        tokenizer,
        tokenizers.Tokenizer.from_str(json.dumps(data)),
        [*random_strings(2000), real_text(10**5)],
    )


def reorder(data):
    merges = data["model"]["merges"]
    merges[10], merges[-1] = merges[-1], merges[10]


def renumber(data):
    vocab = data["model"]["vocab"]
    last = max(vocab, key=vocab.get)
    vocab[last] += 50


def no_byte(data):
    vocab = data["model"]["vocab"]
    del vocab["ÿ"]
    for i, token in enumerate(sorted(vocab, key=vocab.get)):
        vocab[token] = i
    data["added_tokens"][0]["id"] = len(vocab)


def drop_merges(data):
    used = data["model"]["merges"]
    del used[200]
    parts = {part for pair in used for part in pair}
    data["model"]["merges"] = [pair for pair in used if set(pair) <= parts]


def special_merge(data):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    token = {"id": data["model"]["vocab"]["the"], "content": "the", **flags, "special": True}
    data["added_tokens"].insert(0, token)


SPLIT = {
    "type": "Split",
    "pattern": {"Regex": r"\s?\S+|\s+"},
    "behavior": "Isolated",
    "invert": False,
}
BYTES_ONLY = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}


def split(**changes):
    steps = [SPLIT | changes, BYTES_ONLY]
    return lambda data: data.update(pre_tokenizer={"type": "Sequence", "pretokenizers": steps})


def added(**changes):
    flags = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }

    def change(data):
        data["added_tokens"].append(
            {"id": len(data["model"]["vocab"]) + 1, "content": "<new>", **flags} | changes
        )

    return change


FOR_THE_LIBRARY = {
    "merges in another order than the ids": reorder,
    "a gap between ids": renumber,
    "a byte missing": no_byte,
    "a token that no merge makes": drop_merges,
    "a special token that merges make": special_merge,
    "a normalizer": lambda data: data.update(normalizer={"type": "NFKC"}),
    "a space before each text": lambda data: data["pre_tokenizer"].update(add_prefix_space=True),
    "no pattern": lambda data: data["pre_tokenizer"].update(use_regex=False),
    "another pre-tokenizer": lambda data: data.update(
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [{"type": "Punctuation", "behavior": "Isolated"}, BYTES_ONLY],
        }
    ),
    "digits in groups": lambda data: data.update(
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": False},
                {**BYTES_ONLY, "use_regex": True},
            ],
        }
    ),
    "words that are removed": split(behavior="Removed"),
    "words merged with the next": split(behavior="MergedWithNext"),
    r"\w, which holds other characters": split(pattern={"Regex": r"\w+|[^\w\s]+|\s+"}),
    "$, which ends lines there": split(pattern={"Regex": r"\S+|\s+$|\s"}),
    "letters that are ASCII's here": split(pattern={"Regex": r"[[:alpha:]]+|[^[:alpha:]]"}),
    "a class that only one of them names": split(pattern={"Regex": r"\p{Alnum}+|\P{Alnum}"}),
    "{,n}, which is plain text here": split(pattern={"Regex": r"\p{L}{,3}|\P{L}|\p{L}"}),
    "{n}?, which may be empty there": split(pattern={"Regex": r"\p{L}{2}?|\P{L}|\p{L}"}),
    "a set that means one of two": split(pattern={"Regex": r"[a-z--Z]+|\s+|\S"}),
    "nothing repeated, an error here": split(pattern={"Regex": r"\s|\S|(?:)*"}),
    "a repeated group there": split(pattern={"Regex": r"\p{L}{1,3}+|\P{L}"}),
    "text that no word holds": split(pattern={"Regex": r"\p{L}+"}),
    "a plain string to split at": split(pattern={"String": " "}),
    "an added token in texts": added(special=False),
    "a special name with a space": added(content="<a b>"),
    "subwords marked": lambda data: data["model"].update(end_of_word_suffix="</w>"),
}
UNCHANGED = {r"\s?\S+|\s+": split(), "an added special token": added()}


@pytest.mark.parametrize("case", FOR_THE_LIBRARY | UNCHANGED)
def test_what_tiktoken_would_merge_otherwise_is_left_to_the_library(
    library_tokenizers, folder, case
):
    """Each difference makes kind "tokenizers", with the library's ids; harmless ones do not."""
    data = copy.deepcopy(library_tokenizers["gpt2"])
    (FOR_THE_LIBRARY | UNCHANGED)[case](data)
    tokenizer = read_tokenizer(folder(data))
    assert tokenizer.state["kind"] == ("tokenizers" if case in FOR_THE_LIBRARY else "bpe")
    theirs = tokenizers.Tokenizer.from_str(json.dumps(data))
    for text in [*random_strings(300), TOPICS[:5000], "a <new> b"]:
        assert tokenizer.encode(text) == ids_of(theirs, text)


def test_an_added_id_that_does_not_hold_is_left_to_the_library(library_tokenizers, folder):
    """It gives a token that is not in the vocabulary the next id, whatever the file says."""
    data = copy.deepcopy(library_tokenizers["gpt2"])
    data["added_tokens"][0]["id"] = 1300
    tokenizer = read_tokenizer(folder(data))
    assert tokenizer.special_tokens == {"<|endoftext|>": 1200}


def test_dropout_is_left_to_the_library(library_tokenizers, folder):
    """Its ids are drawn, so that there is nothing to compare."""
    data = copy.deepcopy(library_tokenizers["gpt2"])
    data["model"]["dropout"] = 0.5
    assert read_tokenizer(folder(data)).state["kind"] == "tokenizers"


def test_a_token_that_no_merge_makes_is_taken_as_a_word_with_ignore_merges(
    library_tokenizers, folder
):
    """As tiktoken does; merges that make its bytes into other tokens stay."""
    data = copy.deepcopy(library_tokenizers["gpt2"])
    end = data["added_tokens"][0]
    data["model"]["vocab"]["Ġqzqz"] = end["id"]
    end["id"] += 1
    assert read_tokenizer(folder(data)).state["kind"] == "tokenizers"
    data["model"]["ignore_merges"] = True
    tokenizer = read_tokenizer(folder(data))
    assert tokenizer.state["kind"] == "bpe"
    assert tokenizer.encode("a qzqz") == [tokenizer.encode("a")[0], end["id"] - 1]
    assert_like(
        tokenizer,
        tokenizers.Tokenizer.from_str(json.dumps(data)),
        ["a qzqz qzqz", "qzqz", " qzqzq"],
    )


def test_names_in_texts_are_no_special_tokens(library_tokenizers, folder):
    """Of both kinds: spelled out they are ordinary tokens."""
    for data in (library_tokenizers["smollm2"], sentencepiece(True)):
        tokenizer = read_tokenizer(folder(data))
        for name, i in tokenizer.special_tokens.items():
            assert tokenizer.encoding.encode_single_token(name) == i
            assert not set(tokenizer.encode(f"a{name}b")) & set(tokenizer.special_tokens.values())
            assert tokenizer.decode([i]) == name


# ---- BOS, EOS, chat ----


def template(name, i):
    return json.loads(
        processors.TemplateProcessing(
            single=f"{name} $A", special_tokens=[(name, i)]
        ).__getstate__()
    )


def roles(folder, data, **files):
    tokenizer = read_tokenizer(folder(data, **files))
    return tokenizer.state["begin"], tokenizer.state["end"], tokenizer.state["chat"]


def test_begin_is_what_is_really_put_before_a_text(library_tokenizers, folder):
    """The template, also in a Sequence, or add_bos_token; a bos_token alone is only a name."""
    data = dict(library_tokenizers["llama3"])
    bos, config = "<|begin_of_text|>", {"bos_token": {"content": "<|begin_of_text|>"}}
    post = template(bos, 1200)
    assert roles(folder, data)[0] == roles(folder, data, tokenizer_config=config)[0] == ""
    assert roles(folder, data, tokenizer_config=config | {"add_bos_token": True})[0] == bos
    assert roles(folder, data | {"post_processor": post}, tokenizer_config={})[0] == bos
    sequence = {"type": "Sequence", "processors": [BYTES_ONLY, post]}
    assert roles(folder, data | {"post_processor": sequence})[0] == bos
    off = {"bos_token": bos, "add_bos_token": False, "tokenizer_class": "PreTrainedTokenizerFast"}
    path = folder(data | {"post_processor": post}, tokenizer_config=off)  # a no is not heard there
    assert read_tokenizer(path).begin_id == 1200
    assert AutoTokenizer.from_pretrained(path)("a")["input_ids"] == [
        1200,
        *read_tokenizer(path).encode("a"),
    ]


def test_end_comes_from_the_first_file_that_names_it(library_tokenizers, folder):
    """The name, a string or a dict; else an id, or a list of them; else <|endoftext|>."""
    data, end = library_tokenizers["llama3"], "<|end_of_text|>"
    assert roles(folder, data)[1] == "<|endoftext|>"
    assert roles(folder, data, config={"eos_token_id": 1201})[1] == end
    assert (
        roles(
            folder,
            data,
            config={"eos_token_id": 1200},
            generation_config={"eos_token_id": [1201, 1204]},
        )[1]
        == f"{end} <|eot_id|>"  # the model stops at both
    )
    assert (
        roles(folder, data, special_tokens_map={"eos_token": {"content": "<|eot_id|>"}})[1]
        == f"<|eot_id|> {end}"
    )
    named = roles(folder, data, tokenizer_config={"eos_token": end})
    assert named[1] == f"{end} <|eot_id|>"
    assert read_tokenizer(folder(data)).end_id == 1201
    first = {"eos_token_id": 0}  # the token that is 0 is one as any other
    files = {"config": first, "tokenizer_config": {}, "special_tokens_map": {}}
    found = roles(folder, library_tokenizers["smollm2"], generation_config={}, **files)
    assert found[1] == "<|endoftext|>"


def test_known_chat_templates_are_recognized(library_tokenizers, folder):
    """ChatML's and Llama 3's, from the settings or a file; what ends an answer is `end`."""
    data, config = library_tokenizers["smollm2"], {"eos_token": "<|endoftext|>"}
    known = {"chat_template": "{{ '<|im_start|>' + message['role'] }}"}
    assert roles(folder, data, tokenizer_config=config) == ("", "<|endoftext|>", gpt.CHAT)
    assert roles(folder, data, tokenizer_config=config | known) == (
        "",
        "<|im_end|> <|endoftext|>",
        CHATML,
    )
    llama = {"chat_template": [{"name": "default", "template": "<|start_header_id|>"}]}
    assert roles(folder, library_tokenizers["llama3"], tokenizer_config=llama)[1:] == (
        "<|eot_id|>",
        LLAMA3_CHAT,
    )
    assert roles(folder, data, tokenizer_config=config | llama) == (
        "",
        "<|endoftext|>",
        LLAMA3_CHAT,
    )
    path = folder(data, tokenizer_config=config)
    (path / "chat_template.jinja").write_text(known["chat_template"], encoding="utf-8")
    assert read_tokenizer(path).state["chat"] == CHATML


MESSAGES = [
    {"role": "system", "content": "Be {{ brief }}.\n"},
    {"role": "user", "content": 'say "hi" \\n 100%s'},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "again é 😀"},
]


@pytest.mark.parametrize(
    ("chat", "special", "end", "begin"),
    [
        (gpt.CHAT, SPECIALS, "<|endoftext|>", ""),
        (CHATML, " ".join(SMOLLM2_SPECIAL), "<|im_end|>", ""),
        (LLAMA3_CHAT, " ".join(LLAMA3_SPECIAL), "<|eot_id|>", "<|begin_of_text|>"),
        ('\n{{"%s"}}\n||\tQ\\: %s é😀\nA: ||%s\n', "<|endoftext|>", "<|endoftext|>", ""),
    ],
)
def test_apply_chat_template_renders_our_text(tmp_path, chat, special, end, begin):
    """Character by character, escapes and all; an answer that is the last message has its end."""
    tokenizer = own_bpe(ALL_BYTES, special=special, end=end, begin=begin, chat=chat)
    write_tokenizer(tokenizer, tmp_path, 64)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    marks = dict(zip(("system", "user", "assistant"), tokenizer.chat_parts, strict=True))
    for messages in (MESSAGES, MESSAGES[1:2], MESSAGES[:3]):
        parts = [marks[m["role"]].replace("%s", m["content"], 1) for m in messages]
        last = end if messages[-1]["role"] == "assistant" and end not in chat else ""
        rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert rendered == begin + "".join(parts) + last
    ids = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    known = {i for name, i in tokenizer.special_tokens.items() if name in chat}
    assert known <= set(ids)


DEFAULTED = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nbe \"kind\"<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_the_system_text_that_a_template_has_by_default(tmp_path):
    """Without a system text of one's own, what is asked begins with it, also after an export."""
    tokenizer = own_bpe(own_tokens(), special=" ".join(SMOLLM2_SPECIAL), end="<|im_end|>")
    write_tokenizer(tokenizer, tmp_path / "theirs", 64)
    path = tmp_path / "theirs" / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(settings | {"chat_template": DEFAULTED}), encoding="utf-8")
    ours = read_tokenizer(tmp_path / "theirs")
    write_tokenizer(ours, tmp_path / "again", 64)
    for messages in (MESSAGES, MESSAGES[1:2], MESSAGES[1:4]):
        turns = [(message["role"], message["content"]) for message in messages]
        ids = encode_conversation(ours, turns)
        for name in ("theirs", "again"):
            theirs = AutoTokenizer.from_pretrained(tmp_path / name)
            generate = messages[-1]["role"] == "user"
            options = {"add_generation_prompt": generate, "return_dict": False}
            assert theirs.apply_chat_template(messages, **options) == ids
    assert read_tokenizer(tmp_path / "again").state == ours.state


def test_no_chat_template_of_tokens_that_are_not_there(tmp_path):
    """Without <|user|>, as a plain tokenizer is, <|user|> would be spelled out."""
    write_tokenizer(own_bpe(ALL_BYTES, special="<|endoftext|>"), tmp_path, 64)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert "chat_template" not in config
    assert config["eos_token"] == "<|endoftext|>"
    assert config["model_max_length"] == 64
    assert not config.keys() & {"bos_token", "pad_token", "add_bos_token"}


# ---- Writing ----


def assert_comes_back(tokenizer, path):
    """Assert that reading what was written gives an equal state, and writing it the same bytes."""
    write_tokenizer(tokenizer, path, 256)
    again = read_tokenizer(path)
    # Further tokens that end a text stand in the model's config.json.
    first_end = tokenizer.state["end"].partition(" ")[0]
    assert again.state == tokenizer.state | {"end": first_end}
    assert again.special_tokens == tokenizer.special_tokens
    write_tokenizer(again, path / "again", 256)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (path / name).read_bytes() == (path / "again" / name).read_bytes()


@pytest.mark.parametrize("name", MODELS)
def test_what_was_read_is_written_for_transformers(library_tokenizers, folder, tmp_path, name):
    """AutoTokenizer gives equal ids, BOS first where it belongs, whichever model lies beside."""
    data, config = dict(library_tokenizers[name]), {"eos_token": "<|endoftext|>"}
    if name == "llama3":
        config = {"eos_token": "<|end_of_text|>", "chat_template": "<|start_header_id|>"}
        data["post_processor"] = template("<|begin_of_text|>", 1200)
    tokenizer = read_tokenizer(folder(data, tokenizer_config=config))
    out = tmp_path / "out"
    assert_comes_back(tokenizer, out)
    first = [] if tokenizer.begin_id is None else [tokenizer.begin_id]
    texts = [
        text.replace("<|endoftext|>", "")
        for text in [TOPICS[:20_000], *random_strings(200, seed=1)]
    ]
    for model_type in ("", "llama", "gpt2", "qwen3"):
        if model_type:
            (out / "config.json").write_text(
                json.dumps({"model_type": model_type}), encoding="utf-8"
            )
        theirs = AutoTokenizer.from_pretrained(out)
        assert (theirs.eos_token_id, theirs.bos_token_id) == (tokenizer.end_id, tokenizer.begin_id)
        for text in texts[:50] if model_type else texts:
            assert theirs(text)["input_ids"] == first + tokenizer.encode(text)
            assert theirs.decode(tokenizer.encode(text)) == text
    for special, i in tokenizer.special_tokens.items():
        assert theirs(f"a{special}")["input_ids"] == [*first, *tokenizer.encode("a"), i]


def test_pre_tokenizers_are_written_as_the_models_have_them(library_tokenizers, folder, tmp_path):
    """Not only the same words, but the same settings, as other programs know them by these."""
    for name in MODELS:
        write_tokenizer(read_tokenizer(folder(library_tokenizers[name])), tmp_path / name, 1)
        data = json.loads((tmp_path / name / "tokenizer.json").read_text(encoding="utf-8"))
        assert data["pre_tokenizer"] == library_tokenizers[name]["pre_tokenizer"]
        assert data["model"]["merges"] == library_tokenizers[name]["model"]["merges"]
        for ids in (
            list(data["model"]["vocab"].values()),
            [token["id"] for token in data["added_tokens"]],
        ):
            assert ids == sorted(ids)


def test_our_own_bpe_is_written(tmp_path):
    """As prepare.py trains it, with its four special tokens."""
    tokenizer = own_bpe(own_tokens(), special=SPECIALS)
    assert_comes_back(tokenizer, tmp_path)
    assert_like(
        tokenizer,
        tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")),
        random_strings(2000),
    )
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.pad_token_id == tokenizer.special_tokens["<|pad|>"]
    assert theirs("a<|user|>b<|endoftext|>")["input_ids"] == [
        *tokenizer.encode("a"),
        tokenizer.special_tokens["<|user|>"],
        *tokenizer.encode("b"),
        tokenizer.end_id,
    ]


@pytest.mark.parametrize("special", ["", SPECIALS])
def test_characters_are_written(tmp_path, special):
    """Any of them is a token, also white space and one of four bytes; an unknown one is dropped."""
    chars = '\n !aeé▁Ġ日😀\t\x00\u2028"\\'
    tokenizer = gpt.Tokenizer("char", chars, special=special)
    assert_comes_back(tokenizer, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choices(chars, k=30))
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text)) == text
    assert theirs("a?é")["input_ids"] == tokenizer.encode("aé")
    assert len(theirs) == tokenizer.vocab_size


def test_characters_of_others_are_read(folder):
    """Single characters behind special tokens; merges or an unknown token need the library."""
    model = {"type": "BPE", "vocab": {"<s>": 0, "b": 1, "é": 2}, "merges": [], "unk_token": None}
    data = {"added_tokens": [{"id": 0, "content": "<s>", "special": True}], "model": model}
    data["added_tokens"][0] |= dict.fromkeys(
        ("single_word", "lstrip", "rstrip", "normalized"), False
    )
    tokenizer = read_tokenizer(folder(data))
    assert (tokenizer.state["kind"], tokenizer.state["special_ids"]) == ("char", "0")
    assert tokenizer.encode("éb") == [2, 1]
    assert (
        read_tokenizer(folder(data | {"model": model | {"unk_token": "<s>"}})).state["kind"]
        == "tokenizers"
    )
    longer = model | {"vocab": model["vocab"] | {"bé": 3}}
    assert read_tokenizer(folder(data | {"model": longer})).state["kind"] == "tokenizers"


@pytest.mark.parametrize("name", tiktoken_ext.openai_public.ENCODING_CONSTRUCTORS)
def test_tiktokens_patterns_and_special_tokens_are_written(monkeypatch, tmp_path, name):
    """Of all its encodings, with a small vocabulary: gaps between ids, possessive words."""
    ranks = {token: i for i, token in enumerate(own_tokens())}
    for loader in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
        monkeypatch.setattr(tiktoken_ext.openai_public, loader, lambda *_, **__: ranks)
    given = tiktoken_ext.openai_public.ENCODING_CONSTRUCTORS[name]()
    special = {
        key: 610 + i for i, key in enumerate(given["special_tokens"])
    }  # behind a gap, as in cl100k_base
    encoding = tiktoken.Encoding(
        name, pat_str=given["pat_str"], mergeable_ranks=ranks, special_tokens=special
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda _: encoding)
    tokenizer = gpt.Tokenizer(name)
    write_tokenizer(tokenizer, tmp_path, 1024)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert_like(tokenizer, theirs, [*random_strings(2000), TOPICS[:50_000]])
    monkeypatch.undo()
    again = read_tokenizer(tmp_path)
    assert (again.special_tokens, again.vocab_size) == (
        tokenizer.special_tokens,
        tokenizer.vocab_size,
    )
    data = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    if name in ("gpt2", "r50k_base", "p50k_base", "p50k_edit"):
        assert data["pre_tokenizer"]["type"] == "ByteLevel"
    if len(special) < 10:  # else the gap is filled
        assert again.state["kind"] == "bpe"
        for i in [*ranks.values(), *special.values()]:
            assert again.decode_bytes([i]) == tokenizer.decode_bytes([i])
    assert_like(again, theirs, random_strings(500, seed=3))


def random_vocabulary(rng):
    """Return tokens over a, b and c: some no merging makes, some are made in odd ways."""
    words, grown = (
        ["".join(w) for n in (2, 3, 4, 5) for w in itertools.product("abc", repeat=n)],
        ["a", "b", "c"],
    )
    for _ in range(rng.randint(3, 40)):
        grown.append("".join(rng.choices(grown, k=2)))
    chosen = (
        list(dict.fromkeys(grown[3:]))
        if rng.random() < 0.6
        else rng.sample(words, rng.randint(3, 40))
    )
    if rng.random() < 0.3:
        rng.shuffle(chosen)
    return ALL_BYTES + [word.encode() for word in chosen]


def test_any_ranks_become_merges_that_do_the_same(tmp_path):
    """For 100 random vocabularies, merging by rank gives the ids of the merges that are written."""
    rng, n_ignored, texts = random.Random(0), 0, []
    for i in range(100):
        tokenizer = own_bpe(random_vocabulary(rng))
        write_tokenizer(tokenizer, tmp_path, 8)
        data = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
        n_ignored += data["model"]["ignore_merges"]
        texts = ["".join(rng.choices("abc", k=rng.randint(1, 30))) for _ in range(40)]
        assert_like(tokenizer, tokenizers.Tokenizer.from_str(json.dumps(data)), texts)
        if i % 20 == 0:
            assert read_tokenizer(tmp_path).state == tokenizer.state
    assert 0 < n_ignored < 100


def test_a_pattern_without_a_like_is_refused(tmp_path):
    """\\w holds other characters there: the message says what to do, and nothing is written."""
    tokenizer = own_bpe(ALL_BYTES, pattern=r" ?\w+|\s+|[^\w\s]+")
    with pytest.raises(ValueError, match=r"(?s)^'.*w.*pattern.*classes, such as GPT-2's$"):
        write_tokenizer(tokenizer, tmp_path / "new", 8)
    assert not (tmp_path / "new").exists()


# ---- The library ----


@pytest.mark.parametrize("metaspace", [True, False])
def test_sentencepiece_is_left_to_the_library(folder, tmp_path, metaspace):
    """Equal ids; what is decoded, also id by id, is the text after its space."""
    data = sentencepiece(metaspace)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(data))
    data["post_processor"] = template("<s>", 1)
    tokenizer = read_tokenizer(
        folder(data, tokenizer_config={"eos_token": "</s>", "chat_template": "<|im_start|>"})
    )
    assert (tokenizer.state["kind"], tokenizer.begin_id, tokenizer.end_id) == ("tokenizers", 1, 2)
    assert (tokenizer.vocab_size, tokenizer.state["special"]) == (600, "")
    for text in [*random_strings(500), TOPICS[:20_000], "a\n  b", "<0x41> </s>", ""]:
        ids = tokenizer.encode(text)
        assert (
            ids
            == ids_of(theirs, text)
            == tokenizer.encoding.encode_to_numpy(text, disallowed_special=()).tolist()
        )
        streamed = b"".join(tokenizer.decode_bytes([i]) for i in ids)
        text = text.replace("▁", " ")  # which is how these spell a space
        assert streamed.decode() == tokenizer.decode(ids)
        assert tokenizer.decode(ids) in (" " + text, text if text[:1] in ("", " ") else None)
    assert tokenizer.encoding.encode_to_numpy("a").dtype == "uint32"
    assert_comes_back(tokenizer, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text(encoding="utf-8")) == data
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded("Hello  you")["input_ids"] == [1, *tokenizer.encode("Hello  you")]
    assert loaded.eos_token_id == 2


def test_a_begin_by_add_bos_token_is_kept(library_tokenizers, folder, tmp_path):
    """In the settings, beside the library's tokenizer; an own one says it in its tokenizer.json."""
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    tokenizer = read_tokenizer(folder(sentencepiece(True), tokenizer_config=config))
    assert tokenizer.begin_id == 1
    assert_comes_back(tokenizer, tmp_path / "spm")
    config = {"bos_token": "<|endoftext|>", "add_bos_token": True}
    tokenizer = read_tokenizer(folder(library_tokenizers["gpt2"], tokenizer_config=config))
    assert tokenizer.begin_id == tokenizer.end_id == 1200
    assert_comes_back(tokenizer, tmp_path / "gpt2")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "gpt2")
    assert theirs("a")["input_ids"] == [1200, *tokenizer.encode("a")]
    assert theirs("a", "b")["input_ids"] == [1200, *tokenizer.encode("a"), *tokenizer.encode("b")]


def test_a_byte_level_tokenizer_of_the_library_streams_bytes(library_tokenizers):
    """Its spelling is undone, but for added tokens, which are not spelled so; ids may have gaps."""
    theirs = tokenizers.Tokenizer.from_str(json.dumps(library_tokenizers["gpt2"]))
    added = [AddedToken(name, normalized=False) for name in ("né  x", "<é>")]
    theirs.add_tokens(added)
    theirs.enable_truncation(5)
    theirs.enable_padding(length=50)
    encoding = LibraryEncoding(theirs.to_str())
    theirs.no_truncation()
    theirs.no_padding()
    for text in [*random_strings(300), "né  x né x<é>", TOPICS[:3000], ""]:
        ids = encoding.encode_ordinary(text)
        assert ids == ids_of(theirs, text)
        assert (
            b"".join(encoding.decode_bytes([i]) for i in ids)
            == encoding.decode_bytes(ids)
            == text.encode()
        )
    assert encoding.encode_ordinary("né  x") == [encoding.n_vocab - 2]
    assert (encoding.special_tokens_set, encoding.special) == (
        {"<|endoftext|>"},
        {"<|endoftext|>": 1200},
    )
    assert encoding.decode_bytes([1200, 1201]) == "<|endoftext|>né  x".encode()
    data = json.loads(theirs.to_str())
    data["model"]["vocab"]["zzz"] = 3000
    assert LibraryEncoding(json.dumps(data)).n_vocab == 3001


def test_a_lone_surrogate_is_no_error(library_tokenizers):
    """As a terminal gives for bytes that are no UTF-8."""
    encoding = LibraryEncoding(json.dumps(library_tokenizers["gpt2"]))
    assert encoding.decode_bytes(encoding.encode_ordinary("a\udcffb")) == b"a?b"


# ---- Which tokenizers give the same ids ----


def test_without_the_library(library_tokenizers, folder, monkeypatch, tmp_path):
    """Byte-level tokenizers are read and written; for others one sentence names what to install."""
    tokenizer = read_tokenizer(folder(library_tokenizers["smollm2"]))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert read_tokenizer(folder(library_tokenizers["smollm2"])).state == tokenizer.state
    assert_comes_back(tokenizer, tmp_path / "out")
    for change in FOR_THE_LIBRARY.values():  # each is noticed without asking the library
        data = copy.deepcopy(library_tokenizers["gpt2"])
        change(data)
        with pytest.raises(
            ValueError,
            match=r"^this tokenizer needs the tokenizers library: pip install tokenizers$",
        ):
            read_tokenizer(folder(data))


def test_a_missing_tokenizer_json(tmp_path):
    """The message tells what is there instead and how to make the file."""
    (tmp_path / "tokenizer.model").write_bytes(b"")
    (tmp_path / "config.json").write_bytes(b"{}")
    with pytest.raises(
        FileNotFoundError, match=r"holds config.json, tokenizer.model: fetch.*save_pretrained"
    ) as e:
        read_tokenizer(tmp_path)
    assert str(tmp_path) in str(e.value)
    with pytest.raises(FileNotFoundError, match="holds nothing"):
        read_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize("content", ["", '{"model": {', "[1]", '"x"', "null", "\ufffd"])
@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_config", "generation_config"])
def test_a_damaged_file_is_named(library_tokenizers, folder, name, content):
    """Cut off, no object, not even JSON."""
    path = folder(library_tokenizers["gpt2"]) / f"{name}.json"
    path.write_bytes(content.encode() if content != "\ufffd" else b"\xff\xfe{}")
    with pytest.raises(ValueError, match=r"is damaged \(.*\): fetch it again$") as e:
        read_tokenizer(path.parent)
    assert str(path) in str(e.value)


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"model": None},
        {"model": {"type": "BPE"}},
        {"model": {"vocab": [], "merges": []}},
        {"a": 1},
    ],
)
def test_json_that_is_no_tokenizer(folder, data):
    """Whole, but of something else."""
    with pytest.raises(
        ValueError, match=r"tokenizer.json holds no tokenizer \(.*\): fetch it again$"
    ):
        read_tokenizer(folder(data))


def test_what_the_library_cannot_read_or_spell(library_tokenizers):
    """A damaged vocabulary, and models whose tokens do not add up to a text."""
    data = copy.deepcopy(library_tokenizers["gpt2"])
    data["model"]["merges"].append(["Ġ", "nonsense"])
    with pytest.raises(
        ValueError, match=r"^tokenizers .* cannot read .*nonsense.*pip install -U tokenizers$"
    ):
        LibraryEncoding(json.dumps(data))
    words = tokenizers.Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}))
    with pytest.raises(
        ValueError, match=r"model is WordPiece, .*: choose a tokenizer with BPE or Unigram$"
    ):
        LibraryEncoding(words.to_str())


# ---- Chat templates as models have them ----
CHATML_JINJA = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
    "message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are Smol.<|im_end|>\\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    "template, default",
    [
        (
            [{"name": "tool_use", "template": "?"}, {"name": "default", "template": CHATML_JINJA}],
            "",
        ),
        (
            DEFAULT
            + CHATML_JINJA.replace("{% endfor", "{% if false %}{% break %}{% endif %}{% endfor"),
            "<|im_start|>system\nYou are Smol.<|im_end|>\n",
        ),
        (
            DEFAULT
            + CHATML_JINJA.replace(
                "message['content'] +",
                "'' }}{% generation -%}\n{{ message['content'] }}\n{%- endgeneration %}{{",
            ),
            "<|im_start|>system\nYou are Smol.<|im_end|>\n",
        ),
        (
            DEFAULT.replace("You are Smol.", "' + strftime_now('%Y') + '") + CHATML_JINJA,
            f"<|im_start|>system\n{datetime.date.today().year}<|im_end|>\n",
        ),
    ],
    ids=["named", "default", "generation", "strftime_now"],
)
def test_a_template_is_rendered_as_transformers_does(
    template, default, capsys, folder, library_tokenizers
):
    data = library_tokenizers["smollm2"]
    hub.say_once.cache_clear()
    settings = {"chat_template": template, "eos_token": "<|im_end|>"}
    tokenizer = read_tokenizer(folder(data, tokenizer_config=settings))
    assert capsys.readouterr().err == ""
    config = {"model_type": "llama"}  # transformers 4 looks for it
    loaded = AutoTokenizer.from_pretrained(folder(data, tokenizer_config=settings, config=config))
    for said in ([("user", "Hello")], [("system", "Be kind."), ("user", "Hello")]):
        messages = [{"role": role, "content": text} for role, text in said]
        theirs = loaded.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert encode_conversation(tokenizer, said) == list(theirs)
    assert tokenizer.chat_parts[3:] == ([default] if default else [])


@pytest.mark.parametrize(
    "template, words",
    [
        (CHATML_JINJA.replace("'\\n' + m", "'<|im_sep|>' + m"), "writes conversations differently"),
        ("{{ '<|im_start|>' + nothing.at.all }}", "cannot be read here"),
        ("{% for m in messages %}[INST]{{ m['content'] }}{% endfor %}", "differently"),
    ],
    ids=["another mark", "an error", "another family"],
)
def test_a_template_that_is_not_followed_is_named(
    template, words, capsys, folder, library_tokenizers
):
    hub.say_once.cache_clear()
    read_tokenizer(
        folder(library_tokenizers["smollm2"], tokenizer_config={"chat_template": template})
    )
    told = capsys.readouterr().err
    assert words in told and told.startswith("note: ") and told.count("\n") == 1
