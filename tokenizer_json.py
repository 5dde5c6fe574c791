"""tokenizer_json.py: tokenizers in Hugging Face's form, tokenizer.json, in and out of gpt.py's Tokenizer.

    tokenizer = read_tokenizer(Path("models/SmolLM2-135M"))      a folder with a tokenizer.json
    write_tokenizer(tokenizer, Path("export"), block_size=1024)  for transformers, vLLM, llama.cpp

A byte-level BPE, as GPT-2's, Llama 3's and SmolLM2's, becomes one of tiktoken's with the same ids; any other
is left to the tokenizers library (pip install tokenizers), which nothing else here needs.
"""

import base64
import importlib.util
import json
import math
import re
from functools import partial
from itertools import pairwise

import numpy as np
import tiktoken

# ---- Words: what cuts a text before bytes are merged: a regex here, a pre_tokenizer there ------------------
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TIKTOKENS_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# there digits are cut out first, so that a text ends before each, as \s+(?!\S) sees it
SMOLLM2_PATTERN = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
DIGITS = {"type": "Digits", "individual_digits": True}
# what the library's regexes (Oniguruma) take otherwise than tiktoken's, or may: ^ $ {n}+ {,n} [:alpha:], sets
# of sets, classes such as \w, names such as \p{Alnum}, flags
FOREIGN = re.compile(
    r"(?<!\[)\^|\$|\d\}[+?]|\{,|\[:|&&|--|~~|\\(?![pPsSdDrntz\W])|\\[pP](?!\{[A-Z][a-z]?\})"
    r"|\(\?(?!:|=|!|<=|<!|>|i:)"
)


def portable(pattern):
    """Return pattern in words that both kinds of regexes know, if there are such; GPT-2's as ours."""
    if pattern == TIKTOKENS_GPT2:
        return GPT2_PATTERN
    pattern = re.sub(
        r"(\{\d+,\d+\})\+(?=\||$)", r"\1", pattern
    )  # at an alternative's end + changes nothing
    return pattern.replace(r"\s++$", r"\s++\z")


def read_words(pre_tokenizer):
    """Return the pattern that cuts as pre_tokenizer does, or "" if there is none."""
    match (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer]):
        case [{"type": "ByteLevel", "add_prefix_space": False, **more}] if more.get(
            "use_regex", True
        ):
            return GPT2_PATTERN
        case [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, **more},
        ] if more.get("use_regex", True):
            return SMOLLM2_PATTERN
        case [
            {
                "type": "Split",
                "pattern": {"Regex": pattern},
                "behavior": "Isolated",
                "invert": False,
            },
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            return "" if FOREIGN.search(pattern) else pattern
    return ""


def write_words(pattern):
    """Return the pre_tokenizer that cuts as pattern does. Raises ValueError."""
    pattern = portable(pattern)
    if pattern == GPT2_PATTERN:
        return BYTE_LEVEL
    if pattern == SMOLLM2_PATTERN:
        return {"type": "Sequence", "pretokenizers": [DIGITS, BYTE_LEVEL]}
    if found := FOREIGN.search(pattern):
        raise ValueError(
            f"{found[0]!r} in the pattern {pattern!r} means something else in a tokenizer.json: "
            r"use a pattern of \p{...} classes, as GPT-2's"
        )
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    return {"type": "Sequence", "pretokenizers": [split, BYTE_LEVEL | {"use_regex": False}]}


# ---- Tokens: bytes here, printable characters there --------------------------------------------------------
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]  # these are spelled as they are
OTHERS = [b for b in range(256) if b not in PRINTABLE]
SPELLING = {b: chr(b) for b in PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(OTHERS)}
BYTES = {c: b for b, c in SPELLING.items()}


def spell(token):
    return "".join(SPELLING[b] for b in token)


def as_bytes(token):
    """Return the bytes that spell gave as token, or None for another text."""
    return bytes(BYTES[c] for c in token) if BYTES.keys() >= set(token) else None


def last_merge(token, ranks):
    """Return the two parts whose merging makes token, or None if merging by rank takes another way.

    No other two parts of it ever meet in a text: what stands around a token changes nothing up to this merge.
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        rank, i = min((ranks.get(a + b, math.inf), i) for i, (a, b) in enumerate(pairwise(parts)))
        if rank == math.inf:
            return None
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return tuple(parts)


def all_merges(ranks):
    """Return the last_merge of each token of several bytes, in order of rank."""
    return [last_merge(token, ranks) for token in sorted(ranks, key=ranks.get) if len(token) > 1]


# ---- Encoding by the library -------------------------------------------------------------------------------
def import_library():
    try:
        import tokenizers
    except ImportError as e:
        raise ValueError("this tokenizer needs a library: pip install tokenizers") from e
    return tokenizers


def token_bytes(token, spelled):
    """Return the bytes that a token of the library stands for: spelled as here, or in sentencepiece's way."""
    if spelled and (content := as_bytes(token)) is not None:
        return content
    byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
    return bytes.fromhex(byte[1]) if byte else token.replace("\u2581", " ").encode()


class LibraryEncoding:
    """The part of tiktoken.Encoding's interface that this project uses, for a tokenizer.json, by its library.

    Decoding joins the tokens' bytes, so that ids may come one by one. Sentencepiece's tokens hold the space
    before a word, also the one that encoding puts before a text: a decoded text begins with that space.
    """

    def __init__(self, text):
        library = import_library()
        try:
            self.tokenizer = library.Tokenizer.from_str(text)
        except Exception as e:  # the library has no type of its own
            raise ValueError(
                f"tokenizers {library.__version__} cannot read this tokenizer.json ({e}): fetch "
                "it again, or pip install -U tokenizers"
            ) from e
        data, vocab = json.loads(text), self.tokenizer.get_vocab(with_added_tokens=True)
        if (model := data["model"].get("type", "BPE")) not in ("BPE", "Unigram"):
            raise ValueError(
                f"tokenizer.json's model is {model}, whose tokens do not spell a text: choose "
                "one with BPE or Unigram"
            )
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True  # as text, where a text spells their names
        added = self.tokenizer.get_added_tokens_decoder().values()
        self.special = {token.content: vocab[token.content] for token in added if token.special}
        self.special_tokens_set, self.n_vocab = set(self.special), max(vocab.values()) + 1
        spelled = '"ByteLevel"' in json.dumps([data.get("pre_tokenizer"), data.get("decoder")])
        plain = {token.content for token in added if token.special or spelled}
        self.tokens = {
            i: token.encode() if token in plain else token_bytes(token, spelled)
            for token, i in vocab.items()
        }

    def encode_single_token(self, name):
        return self.special[name]

    def encode_ordinary(self, text):
        text = text.encode(errors="replace").decode()  # the library has no lone surrogates
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_to_numpy(self, text, disallowed_special=()):
        return np.array(self.encode_ordinary(text), dtype=np.uint32)

    def decode_bytes(self, ids):
        return b"".join(map(self.tokens.__getitem__, ids))


# ---- Reading -----------------------------------------------------------------------------------------------
# mark in a chat template: the token that ends an answer, and the template as gpt.py's CHAT
CHATS = {
    "<|im_start|>": [
        "<|im_end|>",
        "<|im_start|>system\n%s<|im_end|>\n||<|im_start|>user\n%s<|im_end|>\n"
        + "<|im_start|>assistant\n||%s<|im_end|>\n",
    ],
    "<|start_header_id|>": [
        "<|eot_id|>",
        "<|start_header_id|>system<|end_header_id|>\n\n%s<|eot_id|>||"
        + "<|start_header_id|>user<|end_header_id|>\n\n%s<|eot_id|>"
        + "<|start_header_id|>assistant<|end_header_id|>\n\n||%s<|eot_id|>",
    ],
}
PROBE = (
    "The fox's 3 dogs don't; WE'LL, I've, 'tis 12345 6,789.01\ndef f(x):\n\tif x != 'y':\r\n        2e-3"
    "\n\n\n   \t \n x\xa0 \u3000y \u2028 7na\xefve e\u0301 'S'\u017f \u0394\u03ba \u041c\u043e \u05e9 "
    "\u0628\u0627 \u0938\u094d\u0924\u0947 \u0e44\u0e17 \u65e5\u672c\u3002\uac00 \u0663\u2167\xb2 "
    "\U0001f468\u200d\U0001f469\U0001f600 \u201cq\u201d\x00\x1c\x85\u180e\u200b\ufeff <|end|> ~~   42  "
)


def other_encoding(kind, json):
    """Return tiktoken's encoding of that name or, given a tokenizer.json, the tokenizers library's."""
    if json:
        return LibraryEncoding(json)
    try:
        return tiktoken.get_encoding(kind)
    except Exception as e:  # tiktoken documents none
        raise ValueError(
            f"tokenizer {kind!r} is not to be had ({type(e).__name__}): name its file's folder "
            "in TIKTOKEN_CACHE_DIR, or use --tokenizer=bpe"
        ) from e


def read_json(path):
    """Return a JSON file's dict, empty if there is no file. Raises ValueError."""
    try:
        return {**json.loads(path.read_text(encoding="utf-8"))} if path.exists() else {}
    except (ValueError, TypeError) as e:
        raise ValueError(f"{path} is damaged ({e}): fetch it again") from e


def special_names(data):
    """Return the added tokens that are special, name to id, in order of the ids."""
    tokens = sorted(data.get("added_tokens") or [], key=lambda token: token["id"])
    return {token["content"]: token["id"] for token in tokens if token["special"]}


def first_special(data):
    """Return the name of the special token that post_processor puts before a text, or ""."""
    steps = data.get("post_processor") or {}
    for step in steps.get("processors", [steps]):
        if step.get("type") == "TemplateProcessing":
            return next(iter(step["single"]), {}).get("SpecialToken", {}).get("id", "")
    return ""


def merges_alike(model, ranks):
    """Tell whether merging by rank, as tiktoken does, gives what the model's merges give."""
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    theirs, ours = [tuple(map(as_bytes, pair)) for pair in pairs], all_merges(ranks)
    if None in ours and not model.get(
        "ignore_merges"
    ):  # tiktoken takes a word that is a token at once
        return False
    needed = set(ours)  # more, as Llama 3's has, never meet
    return [pair for pair in theirs if pair in needed] == [pair for pair in ours if pair] and all(
        None not in pair and b"".join(pair) in ranks for pair in theirs
    )


def own_state(data):
    """Return the state, but for its roles, of a Tokenizer with the ids that tokenizer.json gives: of bytes or
    characters; None if there is none."""
    model, names, vocab = data["model"], special_names(data), data["model"]["vocab"]
    others = ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix")
    if (
        model.get("type", "BPE") != "BPE"
        or data.get("normalizer")
        or any(map(model.get, others))
        or len(names) < len(data.get("added_tokens") or [])
        or any(n.split() != [n] for n in names)
    ):
        return None
    tokens = sorted(vocab.keys() - names.keys(), key=vocab.get)
    count = len(tokens) + len(names)
    free = sorted({*range(count)} - {*names.values()})[: len(tokens)]  # as Tokenizer gives them out
    if [vocab[token] for token in tokens] != free:
        return None
    behind = [*names.values()] == [*range(len(tokens), count)]
    state = {
        "special": " ".join(names),
        "special_ids": "" if behind else " ".join(map(str, names.values())),
    }
    if not (data.get("pre_tokenizer") or model["merges"] or model.get("unk_token")):
        return (
            state | {"kind": "char", "chars": "".join(tokens)}
            if {*map(len, tokens)} == {1}
            else None
        )
    pattern, spelled = read_words(data.get("pre_tokenizer")), [*map(as_bytes, tokens)]
    ranks = dict(zip(spelled, free))
    if not pattern or not ranks.keys() >= {bytes([b]) for b in range(256)} or None in ranks:
        return None
    encoded = " ".join(base64.b64encode(token).decode() for token in spelled)
    state |= {"kind": "bpe", "ranks": encoded, "pattern": pattern}
    return state if merges_alike(model, ranks) else None


def agrees(make, text):
    """Tell whether make() gives a Tokenizer that keeps PROBE, with the library's ids if there is one."""
    try:
        tokenizer = make()
    except ValueError:  # tiktoken does not know such a pattern
        return False
    theirs = LibraryEncoding(text) if importlib.util.find_spec("tokenizers") else None
    return tokenizer.decode(ids := tokenizer.encode(PROBE)) == PROBE and (
        not theirs or (ids == theirs.encode_ordinary(PROBE) and tokenizer.special == theirs.special)
    )


def roles(data, config, chat):
    """Return begin, end and chat of a Tokenizer, by tokenizer.json and the settings beside it."""
    names, first, ids = special_names(data), first_special(data), config.get("eos_token_id")
    bos, eos = (
        token["content"] if isinstance(token, dict) else token
        for token in (config.get("bos_token", ""), config.get("eos_token", ""))
    )
    ids = ids if isinstance(ids, list) else [ids]
    eos = eos or next((name for name, i in names.items() if i in ids), "<|endoftext|>")
    for mark, (end, known) in CHATS.items():
        if mark in str(config.get("chat_template")):
            eos, chat = end if end in names else eos, known
    return {"begin": first or bos * config.get("add_bos_token", False), "end": eos, "chat": chat}


def read_tokenizer(folder):
    """Return the Tokenizer of a folder's tokenizer.json; files beside it name BOS, EOS and the chat template.

    Raises FileNotFoundError; ValueError for a damaged file, or if the library is needed and not there.
    """
    from gpt import CHAT, Tokenizer  # not above: gpt.py, run as a script, is another module

    path, config = folder / "tokenizer.json", {}
    if not path.exists():
        there = ", ".join(sorted(file.name for file in folder.glob("*"))) or "nothing"
        raise FileNotFoundError(
            f"{folder} lacks tokenizer.json, it holds {there}: fetch that, too, or let "
            "transformers make it: AutoTokenizer.from_pretrained(it).save_pretrained(it)"
        )
    data = read_json(path)
    for name in (
        "config",
        "generation_config",
        "special_tokens_map",
        "tokenizer_config",
    ):  # later ones win
        config |= {k: v for k, v in read_json(folder / f"{name}.json").items() if v is not None}
    if (template := folder / "chat_template.jinja").exists():
        config["chat_template"] = template.read_text(encoding="utf-8")
    try:
        state, rest = own_state(data), roles(data, config, CHAT)
    except (AttributeError, KeyError, TypeError) as e:
        raise ValueError(
            f"{path} holds no tokenizer ({type(e).__name__}: {e}): fetch it again"
        ) from e
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    if state and (state["kind"] == "char" or agrees(partial(Tokenizer, **state), text)):
        return Tokenizer(**state, **rest)
    return Tokenizer("tokenizers", json=text, **rest)


# ---- Writing -----------------------------------------------------------------------------------------------
def chat_template(chat, begin, end):
    """Return the Jinja template that renders messages as chat does, after the token `begin`; an answer that
    comes last ends with the token `end`, as in a data set."""
    first, last, *parts = (
        json.dumps(text, ensure_ascii=False).replace("%s", "\" + message['content'] + \"")
        for text in (begin, end, *chat.split("||"))
    )
    cases = [
        f"if message['role'] == '{role}' %}}{{{{ {part} }}}}"
        for role, part in zip(("system", "user", "assistant"), parts)
    ]
    last = "" if end in chat else f"{{% if loop.last %}}{{{{ {last} }}}}{{% endif %}}"
    return (
        f"{{{{ {first} }}}}{{% for message in messages %}}{{% {'{% el'.join(cases)}{last}"
        "{% endif %}{% endfor %}"
    )


def prepending(name, i):
    """Return the post_processor that puts a special token before a text."""
    single = [{"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {name: {"id": name, "ids": [i], "tokens": [name]}},
    }


def library_form(tokenizer):
    """Return the tokenizer.json of a Tokenizer that tiktoken backs."""
    state, special, ranks = tokenizer.state, tokenizer.special, tokenizer.encoding._mergeable_ranks
    by_char = state["kind"] == "char"  # the library drops a character that it does not know
    merges = [] if by_char else all_merges(ranks)
    vocab = {token.decode() if by_char else spell(token): i for token, i in ranks.items()} | special
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": special[name], "content": name, **flags, "special": True}
            for name in sorted(special, key=special.get)
        ],
        "normalizer": None,
        "pre_tokenizer": None if by_char else write_words(tokenizer.encoding._pat_str),
        "post_processor": None
        if tokenizer.begin is None
        else prepending(state["begin"], tokenizer.begin),
        "decoder": {"type": "Fuse"} if by_char else BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": None in merges,
            "vocab": {token: vocab[token] for token in sorted(vocab, key=vocab.get)},
            "merges": [[spell(a), spell(b)] for a, b in filter(None, merges)],
        },
    }


def write_tokenizer(tokenizer, folder, block_size):
    """Write tokenizer.json and tokenizer_config.json, for transformers' AutoTokenizer and others.

    Raises ValueError for a pattern that has no like there.
    """
    state, special, library = (
        tokenizer.state,
        tokenizer.special,
        tokenizer.state["kind"] == "tokenizers",
    )
    data = json.loads(state["json"]) if library else library_form(tokenizer)
    names = {"bos_token": state["begin"], "eos_token": state["end"], "pad_token": "<|pad|>"}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
    } | {k: v for k, v in names.items() if v in special}
    if state["begin"] and not first_special(data):
        config["add_bos_token"] = True
    if library or special.keys() >= set(re.findall(r"<\|\w+\|>", state["chat"])):
        known = (config.get("bos_token", ""), config.get("eos_token", ""))
        config["chat_template"] = chat_template(state["chat"], *known)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("tokenizer.json", data), ("tokenizer_config.json", config)):
        text = json.dumps(content, ensure_ascii=False, indent=1 if content is config else None)
        (folder / name).write_text(text + "\n", encoding="utf-8")
