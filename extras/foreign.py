"""Read the checkpoints of nanoGPT (ckpt.pt) and of llama2.c (model.bin), for hub.py.

    sizes, tensors, tokenizer = read_nanogpt(Path("nanoGPT/out-shakespeare-char/ckpt.pt"))
    sizes, tensors, tokenizer = read_llama2c(Path("stories15M.bin"))

sizes: fields of gpt.py's GPTConfig. tensors: {name in gpt.py's GPT: tensor}. tokenizer: the state
of gpt.py's Tokenizer. github.com/karpathy/nanoGPT (model.py, train.py) and
github.com/karpathy/llama2.c (export.py, run.c) define the formats.
"""

import json
import math
import pickle
import re
import struct

import numpy as np
import torch

# What a model of nanoGPT never has
GPT2_PARTS = {"use_rope": False, "use_rms_norm": False, "use_swiglu": False, "qk_norm": False}


# ---- nanoGPT ----
class PlainUnpickler(pickle.Unpickler):
    """Reads numbers, strings, lists and dicts; a pickle that asks for more could run any code."""

    def find_class(self, module, name):
        raise ValueError(f"it asks for {module}.{name}")


def read_nanogpt(path):
    """Return (sizes, tensors, tokenizer) of a ckpt.pt. Raises ValueError for any other file."""
    try:
        state = dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as e:  # torch raises half a dozen types of error
        raise ValueError(
            f"{path} is damaged or not a checkpoint ({type(e).__name__}): copy it again"
        ) from e
    if "tokenizer" in state:
        raise ValueError(f"{path} is already a checkpoint of gpt.py: use it as it is")
    try:
        sizes = dict(state["model_args"])
        weights = dict(state["model"])
        dataset = state["config"]["dataset"]
        n_head, vocab_size = sizes["n_head"], sizes["vocab_size"]
    except (KeyError, TypeError) as e:
        raise ValueError(
            f"{path} is not a nanoGPT checkpoint ({e} is missing): name a ckpt.pt from nanoGPT"
        ) from e
    tensors = {}
    for name, tensor in weights.items():
        name = name.removeprefix("_orig_mod.").removeprefix("transformer.")
        if not re.fullmatch(r"h\.\d+\.attn\.bias", name):  # the mask, in early versions
            tensors[name] = tensor
    sizes = {"bias": True} | sizes | GPT2_PARTS
    sizes |= {"n_kv_head": n_head, "tie_weights": True, "dropout": 0.0}
    return sizes, tensors, nanogpt_tokenizer(path, dataset, vocab_size)


def nanogpt_tokenizer(path, dataset, vocab_size):
    """Return the tokenizer's state: meta.pkl's characters or GPT-2, as in nanoGPT's sample.py."""
    places = [path.parent / "meta.pkl"]
    places += [folder / "data" / dataset / "meta.pkl" for folder in path.resolve().parents[1:3]]
    found = [place for place in places if place.exists()]
    if not found and vocab_size < 50257:
        raise ValueError(
            f"{path} has {vocab_size} tokens, but no meta.pkl lists them: copy nanoGPT's "
            f"data/{dataset}/meta.pkl beside it"
        )
    if not found:
        return {"kind": "gpt2"}
    try:
        with open(found[0], "rb") as file:
            names = PlainUnpickler(file).load()["itos"]
        chars = "".join(names[i] for i in range(len(names)))
        assert len(chars) == len(names)
    except Exception as e:  # a pickle that is damaged raises errors of many kinds
        raise ValueError(
            f"{found[0]} does not hold characters in nanoGPT's form ({e}): copy it again"
        ) from e
    if len(names) != vocab_size:
        raise ValueError(
            f"{found[0]} holds {len(names)} characters, but {path} has {vocab_size}: copy the "
            "meta.pkl of its data set beside it"
        )
    return {"kind": "char", "chars": chars}


# ---- llama2.c ----
MAGIC = 0x616B3432  # "ak42", with which a file of version 1 begins
SIZES = ("n_embd", "mlp_hidden", "n_layer", "n_head", "n_kv_head", "vocab_size", "block_size")


def read_llama2c(path):
    """Return (sizes, tensors, tokenizer) of a model.bin. Raises ValueError for any other file."""
    with open(path, "rb") as file:
        head = file.read(256)
    if len(head) < 256:
        raise ValueError(f"{path} has only {len(head)} bytes: name a model.bin of llama2.c")
    pickle_of_torch = b"PK\x03\x04"
    if head.startswith(pickle_of_torch):
        raise ValueError(f"{path} is a pickle, which can run any code: save it as safetensors")
    magic, version = struct.unpack_from("<Ii", head)
    numbers = struct.unpack_from("<7i", head, 8 if magic == MAGIC else 0)
    if magic == MAGIC and version != 1:
        raise ValueError(
            f"{path} is in llama2.c's format version {version}, whose weights are rounded to "
            "integers: export the model with --version 1"
        )
    sizes = dict(zip(SIZES, numbers))
    tied = bool(head[36]) if magic == MAGIC else sizes["vocab_size"] > 0
    sizes["vocab_size"] = abs(sizes["vocab_size"])
    if min(sizes.values()) < 1 or sizes["n_embd"] % sizes["n_head"]:
        raise ValueError(
            f"{path} begins with {list(numbers)}, which are not sizes: name a model.bin of llama2.c"
        )
    shapes = layout(sizes, tied, is_first_version=magic != MAGIC)
    offset = 256 if magic == MAGIC else 28
    n_bytes = offset + 4 * sum(math.prod(shape) for _, shape in shapes)
    if path.stat().st_size != n_bytes:
        raise ValueError(
            f"{path} is not a model of llama2.c, or is incomplete ({path.stat().st_size:,} bytes "
            f"instead of {n_bytes:,}): copy it again"
        )
    parts = {}
    for name, shape in shapes:
        parts[name] = torch.from_numpy(np.fromfile(path, "<f4", math.prod(shape), offset=offset))
        parts[name] = parts[name].view(shape)
        offset += 4 * math.prod(shape)
    sizes |= {"tie_weights": tied, "bias": False, "qk_norm": False, "dropout": 0.0}
    sizes |= {"use_rope": True, "use_rms_norm": True, "use_swiglu": True}
    return sizes, llama2c_tensors(parts, sizes), llama2c_tokenizer(path, sizes["vocab_size"])


def layout(sizes, tied, is_first_version):
    """Return [(name, shape), ...] of the tensors in a file, in their order."""
    dim, hidden, n_layer, n_head, n_kv_head, vocab_size, block_size = (sizes[n] for n in SIZES)
    head_dim = dim // n_head
    embeddings, last_norm = ("embeddings", (vocab_size, dim)), ("norm", (dim,))
    norms = [("attention_norm", (n_layer, dim)), ("ffn_norm", (n_layer, dim))]
    attention = [
        ("wq", (n_layer, n_head * head_dim, dim)),
        ("wk", (n_layer, n_kv_head * head_dim, dim)),
        ("wv", (n_layer, n_kv_head * head_dim, dim)),
        ("wo", (n_layer, dim, n_head * head_dim)),
    ]
    mlp = [
        ("w1", (n_layer, hidden, dim)),
        ("w2", (n_layer, dim, hidden)),
        ("w3", (n_layer, hidden, dim)),
    ]
    head = [] if tied else [("head", (vocab_size, dim))]
    if not is_first_version:
        return [*norms, last_norm, embeddings, *attention, *mlp, *head]
    angles = ("angles", (2, block_size, head_dim // 2))
    return [embeddings, norms[0], *attention, norms[1], *mlp, last_norm, angles, *head]


def in_halves(rows, n_heads):
    """Return rows of q or k for rotating components i and i + d / 2 instead of 2i and 2i + 1."""
    pairs = rows.view(n_heads, -1, 2, rows.shape[-1])
    return pairs.transpose(1, 2).reshape(rows.shape)


def llama2c_tensors(parts, sizes):
    """Return {name in gpt.py's GPT: tensor}."""
    tensors = {"wte.weight": parts["embeddings"], "ln_f.weight": parts["norm"]}
    if "head" in parts:
        tensors["lm_head.weight"] = parts["head"]
    for i in range(sizes["n_layer"]):
        q = in_halves(parts["wq"][i], sizes["n_head"])
        k = in_halves(parts["wk"][i], sizes["n_kv_head"])
        tensors |= {
            f"h.{i}.ln_1.weight": parts["attention_norm"][i],
            f"h.{i}.attn.c_attn.weight": torch.cat((q, k, parts["wv"][i])),
            f"h.{i}.attn.c_proj.weight": parts["wo"][i],
            f"h.{i}.ln_2.weight": parts["ffn_norm"][i],
            f"h.{i}.mlp.c_fc.weight": torch.cat((parts["w1"][i], parts["w3"][i])),
            f"h.{i}.mlp.c_proj.weight": parts["w2"][i],
        }
    return tensors


def read_tokens(path):
    """Return [(text, score), ...] of a tokenizer.bin. Raises ValueError for any other file."""
    content = path.read_bytes()
    tokens = []
    place = 4  # after the length of the longest token
    try:
        while place < len(content):
            score, length = struct.unpack_from("<fi", content, place)
            text = content[place + 8 : place + 8 + length].decode()
            tokens.append((text.strip() if len(tokens) < 3 else text.replace(" ", "▁"), score))
            place += 8 + length
    except (UnicodeDecodeError, struct.error) as e:
        raise ValueError(f"{path} is damaged ({e})") from e
    if place != len(content):
        raise ValueError(f"{path} is incomplete")
    return tokens


def llama2c_tokenizer(path, vocab_size):
    """Return the state of the tokenizer in a tok*.bin beside a model of vocab_size tokens."""
    tried = []
    for file in sorted(path.parent.glob("tok*.bin")):
        try:
            tokens = read_tokens(file)
        except ValueError as e:
            tried.append(str(e))
            continue
        if len(tokens) == vocab_size:
            return {
                "kind": "tokenizers",
                "json": json.dumps(sentencepiece(tokens), ensure_ascii=False),
                "begin": "<s>",
                "end": "</s>",
            }
        tried.append(f"{file.name} has {len(tokens)}")
    why = f" ({'; '.join(tried)})" if tried else ""
    raise ValueError(
        f"{path} has {vocab_size} tokens, but no tok*.bin beside it has that many{why}: copy the "
        "model's tokenizer.bin beside it"
    )


def sentencepiece(tokens):
    """Return the tokenizer.json of sentencepiece's byte pairs, given as [(token, score), ...].

    The two neighboring tokens whose concatenation scores best are merged first.
    """
    vocab = {token: i for i, (token, _) in enumerate(tokens)}
    merges = []
    for token, score in tokens[259:]:  # after three special tokens and 256 bytes
        for i in range(1, len(token)):
            if token[:i] in vocab and token[i:] in vocab:
                merges.append((-score, token[:i], token[i:]))
    merges.sort(key=lambda merge: merge[0])
    special = [
        {"id": i, "content": token, "special": True, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for i, (token, _) in enumerate(tokens[:3])
    ]
    normalizers = [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]
    decoders = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    return {
        "version": "1.0",
        "added_tokens": special,
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": [[left, right] for _, left, right in merges],
            "unk_token": tokens[0][0],
            "byte_fallback": True,
            "fuse_unk": True,
        },
    }
