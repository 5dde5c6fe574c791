"""Convert Hugging Face's tokenizer.json to the state of a gpt.Tokenizer, and back.

A byte-level BPE, such as GPT-2's, Llama 3's or SmolLM2's, becomes a tokenizer of tiktoken with the
same ids. Others are run by the tokenizers library (pip install tokenizers), which nothing
else here needs. hub.py reads and writes the files; this module only turns dicts into dicts:

    state = read_state(data) | read_roles(data, settings, CHAT)    for gpt.Tokenizer(**state)
    data = write_data(state, special, ranks, pattern)              for tokenizer.json
    settings = write_settings(state, special, data, block_size)    for tokenizer_config.json
"""

import base64
import json
import math
import re
import time
from itertools import pairwise

import numpy as np

# ---- Bytes are spelled in printable characters ----
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that spell themselves
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]

SPELLING = {byte: chr(byte) for byte in PRINTABLE}
SPELLING |= {byte: chr(256 + i) for i, byte in enumerate(OTHERS)}
BYTES = {character: byte for byte, character in SPELLING.items()}
ALL_BYTES = {bytes([byte]) for byte in range(256)}


def spell(token):
    """Return bytes in the spelling of tokenizer.json: b" the" becomes "Ġthe"."""
    return "".join(SPELLING[byte] for byte in token)


def is_spelled(text):
    """Tell whether `spell` can return this text."""
    return set(text) <= BYTES.keys()


def unspell(text):
    """Return the bytes that `spell` turns into text."""
    return bytes(BYTES[character] for character in text)


# ---- Patterns cut a text into words, inside which bytes are merged ----
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# tiktoken's own spelling of the same pattern
TIKTOKENS_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# SmolLM2 cuts out digits first, so to \s+(?!\S) each digit looks like the end of the text.
SMOLLM2_PATTERN = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"

# Llama 3's, which means the same as that of tiktoken's cl100k_base, and Qwen2's
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")

PATTERNS = (GPT2_PATTERN, TIKTOKENS_GPT2, SMOLLM2_PATTERN, LLAMA3_PATTERN, QWEN2_PATTERN)

BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
DIGITS = {"type": "Digits", "individual_digits": True}

# What the library's regular expressions (Oniguruma's) read differently from tiktoken's, or may.
FOREIGN = re.compile(
    r"""
    (?<!\[)\^ | \$                  # ends of lines there, of the text here
    | \d\}[+?] | \{,                # {n}+ repeats a group there; {,n} is plain text here
    | \[: | && | -- | ~~            # named classes, and operations on sets
    | \\(?![pPsSdDrntz\W])          # \w and the like match other characters
    | \\[pP](?!\{[A-Z][a-z]?\})     # names such as \p{Alnum}
    | \(\?(?!:|=|!|<=|<!|>|i:)      # flags
    """,
    re.VERBOSE,
)


def read_pattern(pre_tokenizer):
    """Return the pattern that splits texts as pre_tokenizer does, or "" if tiktoken has none."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    match steps:
        case [{"type": "ByteLevel", "add_prefix_space": False, **rest}]:
            return GPT2_PATTERN if rest.get("use_regex", True) else ""
        case [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, **rest},
        ]:
            return SMOLLM2_PATTERN if rest.get("use_regex", True) else ""
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


def portable(pattern):
    """Return a pattern of tiktoken in a form that means the same to the library, if it has one."""
    if pattern == TIKTOKENS_GPT2:
        return GPT2_PATTERN
    # At the end of an alternative a possessive + changes nothing, since nothing follows it.
    pattern = re.sub(r"(\{\d+,\d+\})\+(?=\||$)", r"\1", pattern)
    return pattern.replace(r"\s++$", r"\s++\z")


def write_pattern(pattern):
    """Return the pre_tokenizer that splits texts as pattern does. Raises ValueError."""
    pattern = portable(pattern)
    if pattern == GPT2_PATTERN:
        return BYTE_LEVEL
    if pattern == SMOLLM2_PATTERN:
        return {"type": "Sequence", "pretokenizers": [DIGITS, BYTE_LEVEL]}

    found = FOREIGN.search(pattern)
    if found:
        raise ValueError(
            f"{found[0]!r} in the pattern {pattern!r} means something else in a tokenizer.json: "
            r"use a pattern of \p{...} classes, such as GPT-2's"
        )
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    return {"type": "Sequence", "pretokenizers": [split, BYTE_LEVEL | {"use_regex": False}]}


# ---- Merges: tiktoken knows only ranks, tokenizer.json lists pairs ----
def last_merge(token, ranks):
    """Return the two parts whose merging makes token, or () if merging by rank never makes it.

    With ranks {b"ab": 256, b"abc": 257}, b"abc" is made of b"ab" and b"c". The text around a
    token changes nothing before this merge, so no other two parts ever make the token.
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        candidates = [ranks.get(a + b, math.inf) for a, b in pairwise(parts)]
        lowest = min(candidates)
        if lowest == math.inf:
            return ()
        i = candidates.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return tuple(parts)


def all_merges(ranks):
    """Return the last_merge of each token of several bytes, in order of rank."""
    tokens = sorted(ranks, key=ranks.get)
    return [last_merge(token, ranks) for token in tokens if len(token) > 1]


def same_merges(model, ranks):
    """Tell whether merging by rank, as tiktoken does, gives the same ids as the merges."""
    theirs = []
    for pair in model["merges"]:
        left, right = pair.split(" ") if isinstance(pair, str) else pair  # older files: "a b"
        if not is_spelled(left + right) or unspell(left + right) not in ranks:
            return False
        theirs.append((unspell(left), unspell(right)))

    ours = all_merges(ranks)
    if () in ours and not model.get("ignore_merges"):
        return False  # tiktoken merges nothing in a word that is a token, like ignore_merges
    needed = set(ours)
    theirs = [pair for pair in theirs if pair in needed]  # Llama 3 lists pairs that never meet
    return theirs == [pair for pair in ours if pair]


# ---- Encoding by the library ----
def import_library():
    """Return the module tokenizers. Raises ValueError if it is not installed."""
    try:
        import tokenizers
    except ImportError as e:
        raise ValueError(
            "this tokenizer needs the tokenizers library: pip install tokenizers"
        ) from e
    return tokenizers


def token_bytes(token, byte_level):
    """Return the bytes that a token of the library stands for."""
    if byte_level and is_spelled(token):
        return unspell(token)
    single_byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
    if single_byte:
        return bytes.fromhex(single_byte[1])
    return token.replace("\u2581", " ").encode()  # sentencepiece's sign for a space


class LibraryEncoding:
    """A tokenizer.json that is run by its library.

    It has the part of tiktoken.Encoding's interface that is used here. Decoding joins the bytes of
    the tokens, so ids may be decoded one by one. Sentencepiece puts a space before a text and holds
    it in the first token, so a decoded text begins with it.

    json_text: the content of tokenizer.json. Raises ValueError.
    """

    def __init__(self, json_text):
        library = import_library()
        try:
            self.tokenizer = library.Tokenizer.from_str(json_text)
        except Exception as e:  # the library raises nothing more specific
            raise ValueError(
                f"tokenizers {library.__version__} cannot read this tokenizer.json ({e}): "
                "fetch it again, or pip install -U tokenizers"
            ) from e

        data = json.loads(json_text)
        kind = data["model"].get("type", "BPE")
        if kind not in ("BPE", "Unigram"):
            raise ValueError(
                f"tokenizer.json's model is {kind}, whose tokens do not spell out a text: "
                "choose a tokenizer with BPE or Unigram"
            )
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True  # their names in a text are plain text

        vocab = self.tokenizer.get_vocab(with_added_tokens=True)
        added = self.tokenizer.get_added_tokens_decoder().values()
        self.n_vocab = max(vocab.values()) + 1
        self.special = {token.content: vocab[token.content] for token in added if token.special}
        self.special_tokens_set = set(self.special)

        byte_level = '"ByteLevel"' in json.dumps([data.get("pre_tokenizer"), data.get("decoder")])
        verbatim = {token.content for token in added if token.special or byte_level}
        self.tokens = {}
        for token, i in vocab.items():
            is_verbatim = token in verbatim
            self.tokens[i] = token.encode() if is_verbatim else token_bytes(token, byte_level)

    def encode_single_token(self, name):
        return self.special[name]

    def encode_ordinary(self, text):
        text = text.encode(errors="replace").decode()  # the library accepts no lone surrogates
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_to_numpy(self, text, disallowed_special=()):
        return np.array(self.encode_ordinary(text), dtype=np.uint32)

    def decode_bytes(self, ids):
        return b"".join(self.tokens[i] for i in ids)


# ---- Reading: tokenizer.json -> the state of gpt.Tokenizer ----
# Features of a BPE that tiktoken lacks
LACKING = ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix")


def special_tokens(data):
    """Return {name: id} of the special tokens in tokenizer.json, in order of the ids."""
    added = sorted(data.get("added_tokens") or [], key=lambda token: token["id"])
    return {token["content"]: token["id"] for token in added if token["special"]}


def library_state(data):
    """Return the state of a Tokenizer that leaves its work to the tokenizers library."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return {"kind": "tokenizers", "json": text}


def is_plain_bpe(data):
    """Tell whether tokenizer.json is a BPE of words, merges and special tokens, and no more."""
    model = data["model"]
    if model.get("type", "BPE") != "BPE" or data.get("normalizer"):
        return False
    if any(model.get(feature) for feature in LACKING):
        return False
    special = special_tokens(data)
    if len(special) < len(data.get("added_tokens") or []):
        return False  # an added token that is not special is found in texts
    return all(name.split() == [name] for name in special)  # a state separates names by spaces


def is_characters(data, tokens):
    """Tell whether tokenizer.json gives each character an id, and merges nothing."""
    model = data["model"]
    if data.get("pre_tokenizer") or model["merges"] or model.get("unk_token"):
        return False
    return {len(token) for token in tokens} == {1}


def special_state(special, n_tokens):
    """Return the part of a state that names the special tokens, given n_tokens others."""
    behind = list(range(n_tokens, n_tokens + len(special)))  # where gpt.Tokenizer puts them itself
    ids = [] if list(special.values()) == behind else special.values()
    return {"special": " ".join(special), "special_ids": " ".join(str(i) for i in ids)}


def read_state(data):
    """Return the state, without its roles, of a gpt.Tokenizer that gives tokenizer.json's ids.

    Its kind is "char" or "bpe" if tiktoken can give these ids. Otherwise it is "tokenizers", for
    the library. Raises AttributeError, KeyError, TypeError or ValueError for data that is not a
    tokenizer.
    """
    if not is_plain_bpe(data):
        return library_state(data)
    special = special_tokens(data)
    vocab = data["model"]["vocab"]
    tokens = sorted(vocab.keys() - special.keys(), key=vocab.get)

    # gpt.Tokenizer gives the other tokens, in order, the ids that the special ones leave free.
    free_ids = sorted(set(range(len(tokens) + len(special))) - set(special.values()))
    if [vocab[token] for token in tokens] != free_ids[: len(tokens)]:
        return library_state(data)
    state = special_state(special, len(tokens))
    if is_characters(data, tokens):
        return state | {"kind": "char", "chars": "".join(tokens)}

    pattern = read_pattern(data.get("pre_tokenizer"))
    if not pattern or not all(is_spelled(token) for token in tokens):
        return library_state(data)
    ranks = {unspell(token): vocab[token] for token in tokens}
    if not ranks.keys() >= ALL_BYTES or not same_merges(data["model"], ranks):
        return library_state(data)
    encoded = " ".join(base64.b64encode(token).decode() for token in ranks)
    return state | {"kind": "bpe", "ranks": encoded, "pattern": pattern}


# ---- Reading: which tokens begin and end a text, and the template of a chat ----
# A mark in a model's chat template gives the token that ends an answer, and the template in the
# form of gpt.CHAT.
CHATS = {
    "<|im_start|>": (
        "<|im_end|>",
        (
            "<|im_start|>system\n%s<|im_end|>\n"
            "||<|im_start|>user\n%s<|im_end|>\n<|im_start|>assistant\n"
            "||%s<|im_end|>\n"
        ),
    ),
    "<|start_header_id|>": (
        "<|eot_id|>",
        (
            "<|start_header_id|>system<|end_header_id|>\n\n%s<|eot_id|>"
            "||<|start_header_id|>user<|end_header_id|>\n\n%s<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
            "||%s<|eot_id|>"
        ),
    ),
}


def render(template, messages, begin):
    """Return what a model's template makes of messages and the start of an answer, without begin.

    Returns None without the library jinja2, and for a template that cannot be rendered.
    """
    try:
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        return None

    def raise_exception(message):
        raise ValueError(message)

    def tojson(value, **options):
        return json.dumps(value, ensure_ascii=False, **options)

    # What transformers gives to all templates
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = time.strftime
    plain = re.sub(r"({%[-+]?\s*)generation\b", r"\1if true", template)  # around an answer
    plain = re.sub(r"({%[-+]?\s*)endgeneration\b", r"\1endif", plain)
    asked = {"messages": messages, "add_generation_prompt": True, "bos_token": "", "eos_token": ""}
    try:
        return environment.from_string(plain).render(**asked).removeprefix(begin)
    except Exception:  # a template may raise any error
        return None


def default_system(template, chat, begin):
    """Return what a model's template puts before a question without a system prompt, or "".

    template: the one that comes with the model, for Jinja.
    chat: the same in the form of gpt.CHAT.
    begin: the name of the token that begins every text, which is left out here.
    """
    question = chat.split("||")[1].partition("%s")[0] + "Q"
    text = render(template, [{"role": "user", "content": "Q"}], begin) or ""
    before, is_there, _ = text.partition(question)
    return before if is_there and "||" not in before else ""


def template_note(settings, begin, chat):
    """Return a sentence if conversations in the form of chat differ from the model's template."""
    template = template_text(settings)
    if not template:
        return ""
    said = [("system", "S"), ("user", "Q"), ("assistant", "A"), ("user", "R")]
    messages = [{"role": role, "content": text} for role, text in said]
    theirs = render(template, messages, begin)
    parts = dict(zip(("system", "user", "assistant"), chat.split("||")))
    ours = "".join(parts[role].replace("%s", text) for role, text in said)
    if theirs is None:
        return "the model's chat template cannot be read here: conversations may differ from it"
    if theirs != ours:
        return (
            f"the model's chat template writes conversations differently from gpt.py: {theirs!r} "
            f"there, {ours!r} here; finetune the model on conversations before you use --chat"
        )
    return ""


def first_special(data):
    """Return the name of the special token that post_processor puts before a text, or ""."""
    post_processor = data.get("post_processor") or {}
    for step in post_processor.get("processors", [post_processor]):
        if step.get("type") == "TemplateProcessing":
            first = next(iter(step["single"]), {})
            return first.get("SpecialToken", {}).get("id", "")
    return ""


def token_name(value):
    """Return the name of a token, which the settings hold as a string or as a dict."""
    return value["content"] if isinstance(value, dict) else value


def end_tokens(data, settings):
    """Return the names of the tokens that end a text. Settings give a name, or the ids."""
    name = token_name(settings.get("eos_token", ""))
    ids = settings.get("eos_token_id")
    ids = ids if isinstance(ids, list) else [ids]
    named = [name for name, i in special_tokens(data).items() if i in ids]
    names = list(dict.fromkeys([name, *named] if name else named))
    return names or ["<|endoftext|>"]


def template_text(settings):
    """Return the chat template that the settings hold; of several, the one named default."""
    template = settings.get("chat_template") or ""
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default", "")
    return template


def read_roles(data, settings, chat):
    """Return `begin`, `end` and `chat` of a gpt.Tokenizer's state.

    data: the content of tokenizer.json.
    settings: the content of the other files in its folder.
    chat: the template to use if none is known.
    """
    begin = first_special(data)
    if not begin and settings.get("add_bos_token"):  # a bos_token alone is only a name
        begin = token_name(settings.get("bos_token", ""))
    ends = end_tokens(data, settings)

    template = template_text(settings)
    for mark, (answer_end, known_chat) in CHATS.items():
        if mark in template:
            default = default_system(template, known_chat, begin)
            chat = f"{known_chat}||{default}" if default else known_chat
            special = special_tokens(data)
            if answer_end in special:
                others = [name for name in ends if name in special and name != answer_end]
                ends = [answer_end, *others]
    return {"begin": begin, "end": " ".join(ends), "chat": chat}


# ---- Writing ----
def quote(text):
    """Return text as a string for Jinja, with the message's content in place of %s."""
    return json.dumps(text, ensure_ascii=False).replace("%s", "\" + message['content'] + \"")


def chat_template(chat, begin, end):
    """Return the Jinja template that renders messages as `chat` does, after the token `begin`.

    An answer that is the last message ends with the token `end`, as in a data set.
    """
    cases = []
    for role, text in zip(("system", "user", "assistant"), chat.split("||")):
        cases.append(f"if message['role'] == '{role}' %}}{{{{ {quote(text)} }}}}")
    ending = ""
    if end not in chat:
        ending = "{% if loop.last %}{{ " + quote(end) + " }}{% endif %}"

    start = "{{ " + quote(begin) + " }}"
    for default in chat.split("||")[3:]:
        start += "{% if messages[0]['role'] != 'system' %}{{ " + quote(default) + " }}{% endif %}"
    start += "{% for message in messages %}{% "
    return start + "{% el".join(cases) + ending + "{% endif %}{% endfor %}"


def begin_with(name, i):
    """Return the post_processor that puts the special token `name`, of id i, before a text."""
    single = [
        {"SpecialToken": {"id": name, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {name: {"id": name, "ids": [i], "tokens": [name]}},
    }


def write_data(state, special, ranks, pattern):
    """Return the content of tokenizer.json for a gpt.Tokenizer that tiktoken backs.

    state: the Tokenizer's state.
    special: its special tokens, {name: id}.
    ranks, pattern: those of its encoding.
    Raises ValueError for a pattern that means something else to the library.
    """
    by_character = state["kind"] == "char"  # the library drops a character that it does not know
    if by_character:
        merges = []
        vocab = {token.decode(): i for token, i in ranks.items()}
    else:
        merges = all_merges(ranks)
        vocab = {spell(token): i for token, i in ranks.items()}
    vocab |= special

    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added_tokens = []
    for name in sorted(special, key=special.get):
        added_tokens.append({"id": special[name], "content": name, **flags, "special": True})
    begin = state["begin"]

    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens,
        "normalizer": None,
        "pre_tokenizer": None if by_character else write_pattern(pattern),
        "post_processor": begin_with(begin, special[begin]) if begin in special else None,
        "decoder": {"type": "Fuse"} if by_character else BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": () in merges,
            "vocab": {token: vocab[token] for token in sorted(vocab, key=vocab.get)},
            "merges": [[spell(part) for part in pair] for pair in merges if pair],
        },
    }


def write_settings(state, special, data, block_size):
    """Return the content of the tokenizer_config.json that goes with tokenizer.json's data."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
        # transformers 4 would otherwise return token_type_ids, which GPT-2 adds to its embeddings.
        "model_input_names": ["input_ids", "attention_mask"],
    }
    end = state["end"] if state["end"] in special else state["end"].partition(" ")[0]
    roles = {"bos_token": state["begin"], "eos_token": end, "pad_token": "<|pad|>"}
    settings |= {role: name for role, name in roles.items() if name in special}
    if state["begin"] and not first_special(data):
        settings["add_bos_token"] = True

    # A chat whose marks are not all special tokens would spell them out.
    marks = re.findall(r"<\|\w+\|>", state["chat"])
    if state["kind"] == "tokenizers" or special.keys() >= set(marks):
        begin = settings.get("bos_token", "")
        end = settings.get("eos_token", "")
        settings["chat_template"] = chat_template(state["chat"], begin, end)
    return settings
