"""hub.py: turn models in Hugging Face's format into checkpoints of gpt.py, and back.

    python hub.py get gpt2                  download or read a model; write models/gpt2/best.pt
    python hub.py get nanoGPT/out/ckpt.pt   read a run of nanoGPT, or a model.bin of llama2.c
    python hub.py export out/mine FOLDER    write a run for transformers, vLLM and others
    python hub.py gguf out/mine FILE.gguf   write a run for llama.cpp and what builds on it
    python hub.py merge CHECKPOINT          convert a LoRA checkpoint from before 2.0.0

It knows the families of GPT-2 and Llama (with Mistral, Qwen2 and Qwen3), which differ from gpt.py's
GPT only in the names and the layout of their weights. From Python:

    path = hub.get("gpt2")                        the checkpoint's path, for gpt.load_checkpoint
    model = hub.load_model("gpt2", dropout=0.1)   the GPT itself

It needs safetensors, and huggingface_hub for downloads: pip install safetensors huggingface_hub
"""

import contextlib
import importlib.util
import json
import math
import re
import shlex
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from extras import foreign, gguf, hf_tokenizer
from gpt import (
    CHAT,
    GPT,
    HERE,
    TRAINING_ONLY,
    GPTConfig,
    Tokenizer,
    __version__,
    as_path,
    check_setting,
    load_checkpoint,
    read_checkpoint,
    read_settings,
    read_text,
    save_checkpoint,
    say_once,
    slow_down,
)

# ---- Settings: each comment is the help text (python hub.py --help) ----
verb = ""  # the first word: get | export | gguf | merge
source = ""  # the second word: id, folder or file to get, run to export, or checkpoint to merge
target = ""  # the third word: the new folder that export writes, or the file that gguf writes
name = ""  # get: the model's folder in models/; empty: the model's own name
out = ""  # get and merge: the folder for best.pt; empty: in models/, or beside the run
dtype = "float32"  # type of the weights: float32 | bfloat16 | float16; gguf: f32 | f16 | q8_0
base = ""  # merge: new path of the base model that LoRA was trained on; empty: it has not moved

SETTINGS = read_settings(Path(__file__).read_text(encoding="utf-8-sig"))
USAGE = {
    "get": "get ID_FOLDER_OR_FILE",
    "export": "export RUN FOLDER",
    "gguf": "gguf RUN FILE",
    "merge": "merge CHECKPOINT",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GGUF_DTYPES = {"float32": "f32", "float16": "f16", "f32": "f32", "f16": "f16", "q8_0": "q8_0"}


# ---- Names: what our parameters are called in Hugging Face's files ----
LLAMA_OUTSIDE = {"wte": "model.embed_tokens", "ln_f": "model.norm", "lm_head": "lm_head"}
LLAMA_INSIDE = {  # within the blocks; one fused matrix of ours is several matrices there
    "ln_1": ["input_layernorm"],
    "attn.c_attn": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.qk_norm.q": ["self_attn.q_norm"],
    "attn.qk_norm.k": ["self_attn.k_norm"],
    "attn.c_proj": ["self_attn.o_proj"],
    "ln_2": ["post_attention_layernorm"],
    "mlp.c_fc": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.c_proj": ["mlp.down_proj"],
}
CONSTANTS = re.compile(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias|.*rotary_emb\.inv_freq")
QK_NORMS = re.compile(r"model\.layers\.\d+\.self_attn\.[qk]_norm\.weight")


def hf_tensors(model):
    """Return {name in Hugging Face's files: tensor} for a GPT's weights; a tied one appears once.

    The tensors are views, so that reading may copy into them and writing may copy from them.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        if model.config.use_rope:
            tensors |= llama_tensors(model, name, parameter.data)
        else:
            tensors |= gpt2_tensor(name, parameter.data)
    return tensors


def gpt2_tensor(name, tensor):
    """Return {GPT-2's name: view} of one parameter; GPT-2 stores projections transposed."""
    if name == "lm_head.weight":
        return {name: tensor}
    is_projection = re.fullmatch(r"h\.\d+\.(attn|mlp)\.c_\w+\.weight", name)
    return {f"transformer.{name}": tensor.T if is_projection else tensor}


def llama_tensors(model, name, tensor):
    """Return {Llama's name: view} of one parameter, or of the parts of a fused one."""
    module, _, kind = name.rpartition(".")  # kind: weight or bias
    if module in LLAMA_OUTSIDE:
        return {f"{LLAMA_OUTSIDE[module]}.{kind}": tensor}
    _, layer, part = module.split(".", 2)  # "h.0.attn.c_attn"
    rows = [len(tensor)]
    if part in ("attn.c_attn", "mlp.c_fc"):
        rows = model.get_submodule(module.rpartition(".")[0]).parts
    names = [f"model.layers.{layer}.{there}.{kind}" for there in LLAMA_INSIDE[part]]
    return dict(zip(names, tensor.split(rows), strict=True))


# ---- Config: GPTConfig <-> config.json ----
REQUIRED = object()


class Key(NamedTuple):
    """The key of config.json that holds what one field of GPTConfig holds."""

    name: str
    type: type
    # transformers' default if config.json lacks the key; None: GPTConfig's
    default: object = REQUIRED


GPT2_KEYS = {
    "block_size": Key("n_positions", int),
    "vocab_size": Key("vocab_size", int),
    "n_layer": Key("n_layer", int),
    "n_head": Key("n_head", int),
    "n_embd": Key("n_embd", int),
    "mlp_hidden": Key("n_inner", int, None),
    "norm_eps": Key("layer_norm_epsilon", float, 1e-5),
    "tie_weights": Key("tie_word_embeddings", bool, True),
}
LLAMA_KEYS = {
    "block_size": Key("max_position_embeddings", int, 2048),
    "vocab_size": Key("vocab_size", int),
    "n_layer": Key("num_hidden_layers", int),
    "n_head": Key("num_attention_heads", int),
    "n_kv_head": Key("num_key_value_heads", int, None),
    "n_embd": Key("hidden_size", int),
    "head_dim": Key("head_dim", int, None),
    "mlp_hidden": Key("intermediate_size", int),
    "norm_eps": Key("rms_norm_eps", float, 1e-6),
    "tie_weights": Key("tie_word_embeddings", bool, False),
}
ROPE_KEYS = {"rope_theta": Key("rope_theta", float, 10000.0)}
LLAMA3_ROPE_KEYS = {
    "factor": Key("factor", float),
    "low_freq_factor": Key("low_freq_factor", float),
    "high_freq_factor": Key("high_freq_factor", float),
    "original_max_position_embeddings": Key("original_max_position_embeddings", int),
}
OTHER_ROPE_KEYS = {"rope_type", "type", "partial_rotary_factor"}
KINDS = {bool: "True or False", int: "a whole number above 0", float: "a number above 0"}

# The parts that each family always has
GPT2_PARTS = {"use_rope": False, "use_rms_norm": False, "use_swiglu": False, "qk_norm": False}
LLAMA_PARTS = {"use_rope": True, "use_rms_norm": True, "use_swiglu": True}


def read_json(path):
    """Return the dict that a JSON file holds, empty if there is no file. Raises ValueError."""
    if not path.exists():
        return {}
    try:
        return {**json.loads(read_text(path))}
    except (ValueError, TypeError) as e:
        raise ValueError(f"{path} is damaged ({e}): fetch it again") from e


def read_fields(values, keys):
    """Return {field: value} for each field of `keys`, read from config.json. Raises ValueError."""
    found = {}
    for field, key in keys.items():
        value = values.get(key.name)
        if value is None and key.default is REQUIRED:
            raise ValueError(f"config.json has no {key.name}: fetch it again")
        if value is None:
            found[field] = key.default
            continue
        if key.type is float and type(value) is int:
            value = float(value)
        if type(value) is not key.type or (key.type is not bool and not 0 < value < math.inf):
            raise ValueError(f"config.json's {key.name} is {value!r}: expected {KINDS[key.type]}")
        found[field] = value
    return found


def require(values, **allowed):
    """Raise ValueError for the first key of config.json whose value a GPT cannot represent.

    allowed: for each key, the values that it may have; a missing key means the first of them.
    """
    for key, known in allowed.items():
        value = values.get(key, known[0])
        if value not in known:
            choices = " or ".join(repr(choice) for choice in known)
            raise ValueError(
                f"config.json's {key} is {value!r}: gpt.py's GPT supports only {choices}"
            )


def read_gpt2(values):
    """Return (GPTConfig, names of the modules that have a bias) of a GPT-2's config.json."""
    require(
        values,
        activation_function=["gelu_new", "gelu_pytorch_tanh"],
        scale_attn_weights=[True],
        scale_attn_by_inverse_layer_idx=[False],
        add_cross_attention=[False],
    )
    shape = read_fields(values, GPT2_KEYS)
    config = GPTConfig(**shape, **GPT2_PARTS, n_kv_head=shape["n_head"], bias=True, dropout=0.0)
    return config, {"c_attn", "c_proj", "c_fc", "ln_1", "ln_2", "ln_f"}


def read_llama(values):
    """Return (GPTConfig, names of the modules that have a bias) of a Llama or a similar model."""
    family = values["architectures"][0].removesuffix("ForCausalLM")
    shape = read_fields(values, LLAMA_KEYS)
    shape["n_kv_head"] = shape["n_kv_head"] or shape["n_head"]
    check_window(values, family, shape["block_size"])
    all_full = ["full_attention"] * shape["n_layer"]
    require(values, hidden_act=["silu"], layer_types=[None, all_full])

    attention = values.get("attention_bias", family == "Qwen2")
    biased = set()
    if attention:
        biased |= {"q_proj", "k_proj", "v_proj"}
    if attention and family != "Qwen2":
        biased |= {"o_proj"}
    if values.get("mlp_bias", False):
        biased |= {"gate_proj", "up_proj", "down_proj"}
    config = GPTConfig(
        **shape,
        **LLAMA_PARTS,
        **read_rope(values, shape["block_size"]),
        qk_norm=family == "Qwen3",
        bias=bool(biased),
        dropout=0.0,
    )
    return config, biased


def check_window(values, family, block_size):
    """Raise ValueError if the attention window is shorter than the context."""
    if not values.get("use_sliding_window", family == "Mistral"):
        return
    window = values.get("sliding_window", 4096)  # Mistral's, where the file does not name it
    if window and window < block_size:
        raise ValueError(
            f"config.json's sliding_window is {window}: gpt.py's GPT attends to the whole "
            f"context of {block_size} tokens"
        )


def read_rope(values, block_size):
    """Return rope_theta and rope_scaling of GPTConfig, from any form that config.json has had."""
    rope = {
        "rope_theta": values.get("rope_theta"),
        "partial_rotary_factor": values.get("partial_rotary_factor"),
        "original_max_position_embeddings": block_size,
        **(values.get("rope_parameters") or {}),
        **(values.get("rope_scaling") or {}),
    }
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    require({"rope_type": rope_type}, rope_type=["default", "llama3"])
    unknown = rope.keys() - ROPE_KEYS.keys() - LLAMA3_ROPE_KEYS.keys() - OTHER_ROPE_KEYS
    if unknown:
        raise ValueError(
            f"config.json's rope_parameters have {min(unknown)}, which gpt.py's GPT lacks"
        )
    require(rope, partial_rotary_factor=[None, 1.0])
    found = read_fields(rope, ROPE_KEYS)
    if rope_type == "llama3":
        found["rope_scaling"] = read_fields(rope, LLAMA3_ROPE_KEYS)
    return found


FAMILIES = {
    "GPT2LMHeadModel": read_gpt2,
    "LlamaForCausalLM": read_llama,
    "MistralForCausalLM": read_llama,
    "Qwen2ForCausalLM": read_llama,
    "Qwen3ForCausalLM": read_llama,
}


def read_config(folder):
    """Return (GPTConfig, names of the modules that have a bias) of a Hugging Face folder.

    Raises FileNotFoundError, and ValueError naming the key that a GPT cannot represent.
    """
    values = read_json(folder / "config.json")
    if not values:
        raise FileNotFoundError(
            f"{folder} has no config.json: it is not the folder of a Hugging Face model"
        )
    architectures = values.get("architectures")
    kind = f"not named (its model_type is {values.get('model_type')!r})"
    if isinstance(architectures, list) and architectures:
        kind = str(architectures[0])
    if kind not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"{folder}'s architecture is {kind}: gpt.py supports {known}")

    try:
        require(values, quantization_config=[None])
        config, biased = FAMILIES[kind](values)
    except ValueError as e:
        raise ValueError(f"{folder}: {e}") from e
    except (AttributeError, TypeError) as e:  # a list, say, where a dict should be
        raise ValueError(f"{folder}'s config.json is damaged ({e}): fetch it again") from e
    return config, biased


def check_exportable(config, translated, implied):
    """Raise ValueError for the first field of a GPTConfig that transformers' family would not keep.

    translated: fields that config.json holds, and those that matter only in training. implied: the
    values that the family gives to other fields. A field that is in neither is unknown here and
    must be off: False, 0 or None.
    """
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in translated:
            continue
        if field.name not in implied and value:
            raise ValueError(
                f"{field.name} is {value!r}: hub.py does not know this field of GPTConfig, so "
                "write its translation for transformers first"
            )
        if field.name in implied and value != implied[field.name]:
            raise ValueError(
                f"{field.name} is {value!r}: with use_rope {config.use_rope}, transformers has "
                f"only models where it is {implied[field.name]!r}"
            )


def write_keys(config, keys):
    """Return {key of config.json: value} for the fields of a GPTConfig."""
    return {key.name: getattr(config, field) for field, key in keys.items()}


# Fields that change nothing once a model is trained, and mlp_ratio, which mlp_hidden replaces
NOT_EXPORTED = {*TRAINING_ONLY, "mlp_ratio"}


def write_gpt2(config):
    """Return config.json's content for a GPT-2. Raises ValueError for a value it cannot have."""
    implied = GPT2_PARTS | {
        "bias": True,
        "n_kv_head": config.n_head,
        "head_dim": config.n_embd // config.n_head,
    }
    without_meaning = {"rope_theta", "rope_scaling"}  # as there are no rotary positions
    check_exportable(config, GPT2_KEYS.keys() | NOT_EXPORTED | without_meaning, implied)
    return write_keys(config, GPT2_KEYS) | {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


def write_llama(config):
    """Return config.json's content for a Llama or, with qk_norm, a Qwen3. Raises ValueError."""
    translated = LLAMA_KEYS.keys() | {"bias", "qk_norm", "qk_norm_weights"}
    translated |= {"rope_theta", "rope_scaling"}
    check_exportable(config, translated | NOT_EXPORTED, LLAMA_PARTS)
    if config.qk_norm and config.bias:
        raise ValueError("qk_norm and bias are True: transformers has no model with both")
    family = "Qwen3" if config.qk_norm else "Llama"
    scaling = None
    if config.rope_scaling:
        scaling = config.rope_scaling | {"rope_type": "llama3"}
    return write_keys(config, LLAMA_KEYS) | {
        "architectures": [f"{family}ForCausalLM"],
        "model_type": family.lower(),
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "attention_dropout": 0.0,
    }


def end_ids(tokenizer):
    """Return the id of the token that ends a text, a list of several ids, or None."""
    return tokenizer.end_ids if len(tokenizer.end_ids) > 1 else tokenizer.end_id


def write_config(config, tokenizer, dtype):
    """Return a model's config.json as a dict. Raises ValueError for a config that no family has."""
    family = write_llama(config) if config.use_rope else write_gpt2(config)
    return family | {
        "initializer_range": 0.02,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": tokenizer.begin_id,
        "eos_token_id": end_ids(tokenizer),
        "use_cache": True,
    }


# ---- Tokenizer: tokenizer.json and the settings beside it ----
# Text that tokenizers treat differently: contractions, digits, line endings, spaces and scripts
PROBE = (
    "The fox's 3 dogs don't; WE'LL, I've, 'tis 12345 6,789.01\n"
    "def f(x):\n\tif x != 'y':\r\n        2e-3\n\n\n   \t \n x\xa0 \u3000y \u2028 7"
    "na\xefve e\u0301 'S'\u017f \u0394\u03ba \u041c\u043e \u05e9 \u0628\u0627 "
    "\u0938\u094d\u0924\u0947 \u0e44\u0e17 \u65e5\u672c\u3002\uac00 \u0663\u2167\xb2 "
    "\U0001f468\u200d\U0001f469\U0001f600 "
    "\u201cq\u201d\x00\x1c\x85\u180e\u200b\ufeff <|end|> ~~   42  "
)


def gives_same_ids(state, library_state):
    """Return whether tiktoken, with `state`, encodes PROBE as the tokenizers library does.

    Without the library, tell whether tiktoken at least decodes PROBE's ids to PROBE.
    """
    try:
        tokenizer = Tokenizer(**state)
    except ValueError:  # tiktoken cannot compile the pattern
        return False
    ids = tokenizer.encode(PROBE)
    if tokenizer.decode(ids) != PROBE:
        return False
    if importlib.util.find_spec("tokenizers") is None:
        return True
    library = Tokenizer(**library_state)
    return ids == library.encode(PROBE) and tokenizer.special_tokens == library.special_tokens


def settings_beside(folder):
    """Return what the files beside tokenizer.json say; later files override earlier ones."""
    settings = {}
    for stem in ("config", "generation_config", "special_tokens_map", "tokenizer_config"):
        values = read_json(folder / f"{stem}.json")
        settings |= {key: value for key, value in values.items() if value is not None}
    template = folder / "chat_template.jinja"
    if template.exists():
        settings["chat_template"] = read_text(template)
    return settings


def read_tokenizer(folder):
    """Return the Tokenizer that a folder's tokenizer.json and the settings beside it describe.

    Raises FileNotFoundError, and ValueError for a damaged file or if the library is needed but not
    installed.
    """
    folder = as_path(folder)
    path = folder / "tokenizer.json"
    if not path.exists():
        there = ", ".join(sorted(file.name for file in folder.glob("*"))) or "nothing"
        raise FileNotFoundError(
            f"{folder} lacks tokenizer.json and holds {there}: fetch the missing file, or let "
            "transformers make it: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    data = read_json(path)
    settings = settings_beside(folder)
    try:
        state = hf_tokenizer.read_state(data)
        roles = hf_tokenizer.read_roles(data, settings, CHAT)
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise ValueError(
            f"{path} holds no tokenizer ({type(e).__name__}: {e}): fetch it again"
        ) from e
    note = hf_tokenizer.template_note(settings, roles["begin"], roles["chat"])
    if note:
        say_once(f"note: {note}")
    library_state = hf_tokenizer.library_state(data)
    if state["kind"] == "bpe" and not gives_same_ids(state, library_state):
        state = library_state
    return Tokenizer(**state, **roles)


def tokenizer_files(tokenizer, block_size):
    """Return {file name: text} of tokenizer.json and of its settings. Raises ValueError."""
    state = tokenizer.state
    if state["kind"] == "tokenizers":
        data = json.loads(state["json"])
    else:
        # tiktoken has no public names for its ranks and its pattern.
        ranks = tokenizer.encoding._mergeable_ranks
        pattern = tokenizer.encoding._pat_str
        data = hf_tokenizer.write_data(state, tokenizer.special_tokens, ranks, pattern)
    settings = hf_tokenizer.write_settings(state, tokenizer.special_tokens, data, block_size)
    return {
        "tokenizer.json": json.dumps(data, ensure_ascii=False) + "\n",
        "tokenizer_config.json": json.dumps(settings, ensure_ascii=False, indent=1) + "\n",
    }


def write_texts(folder, texts):
    for file_name, text in texts.items():
        (folder / file_name).write_text(text, encoding="utf-8")


def write_tokenizer(tokenizer, folder, block_size):
    """Write tokenizer.json and tokenizer_config.json, for transformers' AutoTokenizer and others.

    Raises ValueError for a pattern that tokenizer.json cannot hold.
    """
    texts = tokenizer_files(tokenizer, block_size)
    folder = as_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_texts(folder, texts)


# ---- Reading a model ----
SHORT_NAMES = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
}
WANTED_FILES = [  # no pickles
    "config.json",
    "generation_config.json",
    "model*.safetensors*",
    "*token*.json",
    "*.jinja",
]


def missing_library(library):
    return ValueError(f"this needs {library}, which is not installed: pip install {library}")


def full_name(name):
    """Return the absolute path of a file or folder that exists, or else the full id on the hub."""
    path = as_path(name)
    if path.exists():
        return str(path.resolve())
    return SHORT_NAMES.get(str(name), str(name))


def find_folder(name):
    """Return the folder of a Hugging Face model: as given, or downloaded by its id, once.

    Raises FileNotFoundError, and ValueError if huggingface_hub is needed and not installed.
    """
    path = as_path(name)
    if (path / "best.pt").exists() and not (path / "config.json").exists():
        raise FileNotFoundError(f"{path} is already a run of gpt.py: use it as it is")
    if str(name) and path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name)):
        raise FileNotFoundError(f"{name} is neither a folder here nor an id on the hub")

    try:
        from huggingface_hub import snapshot_download
    except ImportError as e:
        raise missing_library("huggingface_hub") from e
    try:
        return Path(snapshot_download(full_name(name), allow_patterns=WANTED_FILES))
    except Exception as e:  # errors of the library and of its network layer have no common type
        raise FileNotFoundError(
            f"{name} is not a folder here, and the Hugging Face hub did not provide it "
            f"({type(e).__name__}): check the name and the network"
        ) from e


def weight_files(folder):
    """Return the paths of a folder's safetensors files.

    Raises FileNotFoundError if one is missing. A pickle is never read, since it can run any code.
    """
    names = ["model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index} is damaged (no weight_map): fetch it again")
        names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if not (folder / name).is_file() or Path(name).name != name:
            pickles = [
                path for suffix in ("bin", "pt", "pth") for path in folder.glob(f"*.{suffix}")
            ]
            if index.exists():
                raise FileNotFoundError(f"{folder} has no {name}, a part of the model: fetch it")
            why = ""
            if pickles:
                why = f": {min(pickles).name} is a pickle and is not read, as it can run any code"
            raise FileNotFoundError(f"{folder} has no {name}{why}; save the weights as safetensors")
    return [folder / name for name in names]


@contextlib.contextmanager
def opened(path):
    """Open a safetensors file to read. Raises ValueError if it is damaged."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as e:
        raise missing_library("safetensors") from e
    try:
        with safe_open(path, "pt") as shard:
            yield shard
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path} is damaged ({e}): fetch it again") from e


def read_shard(path, targets, config):
    """Copy the tensors of one safetensors file into `targets`, {name there: tensor}.

    A tensor that has been filled is removed from targets. Raises ValueError for a tensor that has
    no target.
    """
    with opened(path) as shard:
        for key in shard.keys():  # noqa: SIM118  # it is not a dict
            prefixed = f"transformer.{key}"  # older GPT-2 files leave out this prefix
            name = prefixed if prefixed in targets else key
            if name in targets:
                fill(targets.pop(name), shard.get_tensor(key), f"{path}'s tensor {key}")
            elif not is_redundant(key, shard, config):
                raise ValueError(f"{path}'s tensor {key} has no place in gpt.py's GPT")


def fill(target, tensor, described):
    if tensor.shape != target.shape:
        raise ValueError(
            f"{described} has shape {tuple(tensor.shape)}, but config.json implies "
            f"{tuple(target.shape)}: they do not belong together"
        )
    target.copy_(tensor)


def is_redundant(key, shard, config):
    """Return whether a GPT does not need a tensor: a constant, a tied head, or a norm of ones."""
    if config.qk_norm and QK_NORMS.fullmatch(key):
        return bool((shard.get_tensor(key) == 1).all())
    is_tied_head = key == "lm_head.weight" and config.tie_weights
    return is_tied_head or CONSTANTS.fullmatch(key) is not None


def has_qk_norm_weights(folder):
    """Return whether the norms of queries and keys in a folder's files do more than divide."""
    for path in weight_files(folder):
        with opened(path) as shard:
            names = [key for key in shard.keys() if QK_NORMS.fullmatch(key)]  # noqa: SIM118
            if any((shard.get_tensor(key) != 1).any() for key in names):
                return True
    return False


def tensor_of(files, key):
    """Return the tensor of this name from safetensors files, or None."""
    for path in files:
        with opened(path) as shard:
            if key in shard.keys():  # noqa: SIM118
                return shard.get_tensor(key)
    return None


def has_own_head(folder):
    """Return whether a folder's files hold a head that differs from the embedding."""
    files = weight_files(folder)
    head = tensor_of(files, "lm_head.weight")
    if head is None:
        return False
    names = ("model.embed_tokens.weight", "transformer.wte.weight", "wte.weight")
    found = [tensor for name in names if (tensor := tensor_of(files, name)) is not None]
    return bool(found) and not torch.equal(head, found[0])


class UnsetWeights(TorchFunctionMode):
    """A context in which torch.nn.init draws no weights, for modules whose weights are then read.

    Otherwise, drawing GPT-2's 124M weights would waste two seconds.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"]
        return function(*args, **kwargs)


@torch.no_grad()
def load_file(path, dtype=torch.float32, **changes):
    """Return (model, tokenizer) of a checkpoint of nanoGPT (.pt) or of llama2.c (.bin).

    dtype, changes: as for load_model. Raises FileNotFoundError for a file of another kind, and
    ValueError for a damaged one.
    """
    if path.suffix == ".pt":
        sizes, tensors, state = foreign.read_nanogpt(path)
    elif path.suffix == ".bin":
        sizes, tensors, state = foreign.read_llama2c(path)
    else:
        raise FileNotFoundError(f"{path} is a file: name the folder that holds config.json")
    try:
        config = GPTConfig(**sizes)
        with UnsetWeights():
            model = GPT(replace(config, **changes)).to(dtype).eval()
        if config.tie_weights:
            tensors["lm_head.weight"] = tensors["wte.weight"]
        model.load_state_dict(tensors)
    except (KeyError, RuntimeError, TypeError, ValueError) as e:
        reason = " ".join(str(e).split())
        raise ValueError(
            f"{path} does not fit gpt.py's GPT ({reason[:200]}): copy the file again"
        ) from e
    if path.suffix == ".pt":
        say_once("note: nanoGPT's exact GELU is replaced by GPT-2's approximation of it")
    return model, Tokenizer(**state)


@torch.no_grad()
def load_model(name, dtype=torch.float32, **changes):
    """Return the GPT of a Hugging Face folder or hub id, or of a file that load_file reads.

    It is on the CPU, in evaluation mode. dtype: that of the weights. changes: fields of GPTConfig
    that affect no weight's shape. The files are read one by one, so that memory holds at most one
    of them besides the model. Raises FileNotFoundError, and ValueError for a model that gpt.py's
    GPT cannot represent.
    """
    if as_path(name).is_file():
        return load_file(as_path(name), dtype, **changes)[0]
    folder = find_folder(name)
    config, biased = read_config(folder)
    if config.qk_norm and has_qk_norm_weights(folder):
        config = replace(config, qk_norm_weights=True)
    if config.tie_weights and has_own_head(folder):  # the file decides, as in transformers
        config = replace(config, tie_weights=False)
    with UnsetWeights():
        model = GPT(replace(config, **changes))
    model = model.to(dtype).eval()

    targets = hf_tensors(model)
    for tensor_name in list(targets):
        module, kind = tensor_name.split(".")[-2:]
        if kind == "bias" and module not in biased:  # a GPT has them in all projections or in none
            targets.pop(tensor_name).zero_()
    for file in weight_files(folder):
        read_shard(file, targets, config)
    if config.tie_weights and targets.keys() & {"model.embed_tokens.weight"}:
        head = tensor_of(weight_files(folder), "lm_head.weight")  # the same matrix
        if head is not None:
            fill(targets.pop("model.embed_tokens.weight"), head, f"{folder}'s lm_head.weight")
    if targets:
        remedy = ""
        if min(targets) == "lm_head.weight":
            remedy = "; if the head is tied to the embedding, set tie_word_embeddings to true there"
        raise ValueError(
            f"{folder} lacks the tensor {min(targets)}, which its config.json asks for{remedy}"
        )
    return model


def load_pretrained(name, dtype=torch.float32, **changes):
    """Return (model, tokenizer, state) of what load_model reads.

    state: what a checkpoint of the model would hold besides the weights.
    """
    if as_path(name).is_file():
        model, tokenizer = load_file(as_path(name), dtype, **changes)
    else:
        folder = find_folder(name)
        tokenizer = read_tokenizer(folder)
        config, _ = read_config(folder)
        if tokenizer.vocab_size > config.vocab_size:  # fewer tokens are usual: weights are padded
            raise ValueError(
                f"{folder}'s tokenizer has {tokenizer.vocab_size} tokens, but its weights have "
                f"{config.vocab_size}: remove the tokens that were added, or resize the weights"
            )
        model = load_model(folder, dtype, **changes)
    state = {
        "version": __version__,
        "model_args": asdict(model.config),
        "tokenizer": tokenizer.state,
        "base": full_name(name),
        "base_changed": changed_at(name),
        "lora_rank": 0,
    }
    return model, tokenizer, state


def changed_at(name):
    """Return when a file was last changed, as text; "" for a folder or an id."""
    path = as_path(name)
    return str(path.stat().st_mtime_ns) if path.is_file() else ""


# ---- get ----
def short_name(name):
    """Return the name of a model's folder in models/: the model's, or that of a run of nanoGPT."""
    path = as_path(name).resolve()
    if path.suffix == ".pt" and path.is_file():
        return path.parent.name
    return path.stem if path.is_file() else path.name


def get(name, out=None, dtype=torch.float32):
    """Return the path of the checkpoint for a model of another project, making it if needed.

    name: what load_model reads. out: the folder for best.pt; None: one in models/. dtype: that of
    the weights. A checkpoint appears whole or not at all, so several processes may ask for one
    at the same time.
    Raises FileNotFoundError, and ValueError for a model that gpt.py's GPT cannot represent.
    """
    folder = as_path(out) if out else HERE / "models" / short_name(name)
    path = folder / "best.pt"
    if path.exists():
        check_same_model(path, name)
        return path
    model, _, state = load_pretrained(name, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, state | {"model": model.state_dict()})
    return path


def check_same_model(path, name):
    """Raise ValueError if a checkpoint is damaged or does not hold the model of this name."""
    try:
        held = read_checkpoint(path)
    except ValueError as e:
        raise ValueError(f"{path} is damaged: delete it, and hub.py will make it again") from e
    if held.get("base_changed", "") != changed_at(name) and held["base"] == full_name(name):
        raise ValueError(f"{name} has changed since {path} was made from it: delete {path}")
    if "step" in held or held["base"] != full_name(name):  # only a run's checkpoint has a step
        raise ValueError(
            f"{path} does not hold {name}: it holds a run or {held['base'] or 'another model'}; "
            "choose another folder, with --name or --out"
        )


# ---- export ----
def card_figures(model, state):
    """Return {name: figure} of a model and its run, for the model card."""
    config = state.get("config", {})
    figures = {"parameters": f"{model.n_params():,}"}
    for key in ("dataset", "optimizer", "learning_rate", "batch_size"):
        figures[key] = config.get(key)
    base = Path(state["base"])
    figures["finetuned from"] = base.parent.name if base.suffix == ".pt" else base.name
    figures["LoRA rank"] = config.get("lora_rank") or None
    figures["steps"] = state.get("step")
    loss = state.get("best_val_loss", math.inf)
    if loss < math.inf:
        figures["best validation loss"] = f"{loss:.4f}"
        figures["perplexity"] = f"{math.exp(min(loss, 700)):.2f}"  # exp(710) overflows
    figures |= asdict(model.config)
    return {key: value for key, value in figures.items() if value not in (None, "")}


def model_card(model, state, title):
    """Return README.md's text: what the model is, and the figures of its run."""
    figures = card_figures(model, state)
    rows = "\n".join(f"| {key} | {value} |" for key, value in figures.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {title}

A language model made with gpt.py.

| | |
|---|---|
{rows}

    from transformers import pipeline
    generate = pipeline("text-generation", "{title}")
    written = generate("Once upon a time", max_new_tokens={new_tokens(model.config)})
    print(written[0]["generated_text"])
"""


def new_tokens(config):
    """Return how many tokens the model card's example generates; they must fit in the context."""
    return min(100, max(1, config.block_size // 2))


def export_tensors(model, dtype):
    """Return {name in Hugging Face's files: tensor} of a model, each contiguous in memory."""
    tensors = {}
    for tensor_name, tensor in hf_tensors(model).items():
        tensors[tensor_name] = tensor.to(dtype).contiguous()
    if model.config.qk_norm and not model.config.qk_norm_weights:  # Qwen3's norms have weights
        for layer in range(model.config.n_layer):
            for part in ("q_norm", "k_norm"):
                ones = torch.ones(model.config.head_dim, dtype=dtype)
                tensors[f"model.layers.{layer}.self_attn.{part}.weight"] = ones
    return tensors


@torch.no_grad()
def reference_logits(config, weights, ids):
    """Return the logits (T, vocab_size) float32 that transformers computes from a GPT's weights.

    This is the plain form of GPT-2, Llama and Qwen3, independent of gpt.py's GPT. weights: the
    state_dict of a GPT. ids: (T,) int64.
    """
    weights = {name: weight.float() for name, weight in weights.items()}
    T = len(ids)
    d = config.head_dim
    heads = (config.n_head, config.n_kv_head, config.n_kv_head)
    causal = torch.ones(T, T, dtype=torch.bool).tril()

    def scaled(x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.norm_eps)

    def norm(x, name):
        weight = weights[f"{name}.weight"]
        if config.use_rms_norm:
            return scaled(x) * weight
        bias = weights.get(f"{name}.bias")
        return F.layer_norm(x, weight.shape, weight, bias, config.norm_eps)

    def linear(x, name):
        y = x @ weights[f"{name}.weight"].mT
        bias = weights.get(f"{name}.bias")
        return y if bias is None else y + bias

    def turned(x):  # each pair of components (i, i + d / 2) as a complex number
        angles = torch.polar(torch.ones(T, d // 2), torch.outer(torch.arange(T), speeds))
        pairs = torch.complex(x[..., : d // 2], x[..., d // 2 :]) * angles
        return torch.cat((pairs.real, pairs.imag), dim=-1)

    speeds = config.rope_theta ** (-torch.arange(0, d, 2) / d)
    if config.rope_scaling:
        speeds = slow_down(speeds, **config.rope_scaling)
    x = weights["wte.weight"][ids]
    if not config.use_rope:
        x = x + weights["wpe.weight"][:T]
    for layer in range(config.n_layer):
        name = f"h.{layer}"
        qkv = linear(norm(x, f"{name}.ln_1"), f"{name}.attn.c_attn")
        q, k, v = qkv.view(T, sum(heads), d).transpose(0, 1).split(heads)  # (heads, T, d)
        if config.qk_norm:
            q = scaled(q) * weights.get(f"{name}.attn.qk_norm.q.weight", 1.0)
            k = scaled(k) * weights.get(f"{name}.attn.qk_norm.k.weight", 1.0)
        if config.use_rope:
            q, k = turned(q), turned(k)
        k, v = (t.repeat_interleave(config.n_head // config.n_kv_head, dim=0) for t in (k, v))
        scores = (q @ k.mT / d**0.5).masked_fill(~causal, -torch.inf)
        y = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + linear(y, f"{name}.attn.c_proj")
        hidden = linear(norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc")
        if config.use_swiglu:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * up
        else:
            hidden = F.gelu(hidden, approximate="tanh")
        x = x + linear(hidden, f"{name}.mlp.c_proj")
    return linear(norm(x, "ln_f"), "lm_head")


def check_logits(model):
    """Raise ValueError if a GPT's logits differ from what transformers computes from its weights.

    This detects a change to the model's code that no field of GPTConfig reveals.
    """
    length = min(64, model.config.block_size)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (length,), generator=generator)
    expected = reference_logits(model.config, model.state_dict(), ids)
    with torch.no_grad():
        logits, _ = model(ids[None])
    largest = (logits[0] - expected).abs().max()
    if not largest <= 1e-3 * (1 + expected.abs().max()):  # also if it is not a number
        raise ValueError(
            f"gpt.py's GPT computes logits that differ by {largest:.2g} from those that "
            "transformers computes from the same weights: undo the change to the model's code, or "
            "export the model with your own code"
        )


def export(checkpoint, folder, dtype=torch.float32):
    """Write a checkpoint as a Hugging Face folder.

    checkpoint: the path of a .pt file or of a run's folder. folder: a new or an empty one. dtype:
    that of the weights. Raises FileNotFoundError, OSError and, before anything is written,
    ValueError for a model that fits no family of transformers or computes different logits.
    """
    try:
        from safetensors.torch import save_file
    except ImportError as e:
        raise missing_library("safetensors") from e
    folder = as_path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty: name a new folder")
    model, tokenizer, state = load_checkpoint(checkpoint)
    sampling = {
        "bos_token_id": tokenizer.begin_id,
        "eos_token_id": end_ids(tokenizer),
        "do_sample": True,
        "temperature": 0.8,
        "max_length": model.config.block_size,  # the pipelines of transformers 4 heed no other key
    }
    texts = {
        "config.json": json.dumps(write_config(model.config, tokenizer, dtype), indent=1) + "\n",
        "generation_config.json": json.dumps(sampling, indent=1) + "\n",
        "README.md": model_card(model, state, folder.resolve().name),
    }
    texts |= tokenizer_files(tokenizer, model.config.block_size)

    check_logits(model)

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.safetensors"
    save_file(export_tensors(model, dtype), path, {"format": "pt"})
    path.chmod(0o644)  # the library lets only the file's owner read it
    write_texts(folder, texts)


# ---- gguf ----
GGUF_OUTSIDE = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}
GGUF_OUTSIDE |= {"lm_head": "output"}
GGUF_INSIDE = {  # within the blocks, as in LLAMA_INSIDE
    "ln_1": ["attn_norm"],
    "attn.c_attn": ["attn_q", "attn_k", "attn_v"],
    "attn.qk_norm.q": ["attn_q_norm"],
    "attn.qk_norm.k": ["attn_k_norm"],
    "attn.c_proj": ["attn_output"],
    "ln_2": ["ffn_norm"],
    "mlp.c_fc": ["ffn_gate", "ffn_up"],
    "mlp.c_proj": ["ffn_down"],
}
# llama.cpp splits texts by patterns that it knows by name.
PATTERN_NAMES = {
    hf_tokenizer.GPT2_PATTERN: "gpt-2",
    hf_tokenizer.SMOLLM2_PATTERN: "smollm",
    hf_tokenizer.LLAMA3_PATTERN: "llama-bpe",
    hf_tokenizer.QWEN2_PATTERN: "qwen2",
}
END = "<|endoftext|>"
PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def gguf_family(config):
    """Return llama.cpp's name of a model's architecture. Raises ValueError if it knows none."""
    if not config.use_rope:
        return "gpt2"
    if config.qk_norm and config.rope_scaling:
        raise ValueError("qk_norm is True and rope_scaling is set: llama.cpp has no such model")
    return "qwen3" if config.qk_norm else "llama"


def in_turns(tensor, n_heads):
    """Return the rows of q or k with the two components of each rotated pair beside each other.

    llama.cpp rotates components 2i and 2i + 1 of a Llama's heads; here they are i and i + d / 2.
    """
    halves = tensor.view(n_heads, 2, -1, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def gguf_tensors(model):
    """Return {name in a GGUF file: tensor} of a model."""
    tensors = {}
    for name, parameter in model.named_parameters():
        module, _, kind = name.rpartition(".")
        if module in GGUF_OUTSIDE:
            tensors[f"{GGUF_OUTSIDE[module]}.{kind}"] = parameter.data
            continue
        _, layer, part = module.split(".", 2)  # "h.0.attn.c_attn"
        for there, tensor in gguf_parts(model, layer, part, parameter.data).items():
            tensors[f"blk.{layer}.{there}.{kind}"] = tensor
    return tensors | gguf_constants(model.config)


def gguf_parts(model, layer, part, tensor):
    """Return {name within a block of a GGUF file: tensor} of one parameter, which may be fused."""
    config = model.config
    family = gguf_family(config)
    if family == "gpt2":
        names = {"attn.c_attn": ["attn_qkv"], "mlp.c_fc": ["ffn_up"]}.get(part, GGUF_INSIDE[part])
        return {names[0]: tensor}
    names = GGUF_INSIDE[part]
    if len(names) == 1:
        return {names[0]: tensor}
    fused = model.h[int(layer)].get_submodule(part.partition(".")[0])
    tensors = dict(zip(names, tensor.split(fused.parts), strict=True))
    if family == "llama" and "attn_q" in tensors:
        tensors["attn_q"] = in_turns(tensors["attn_q"], config.n_head)
        tensors["attn_k"] = in_turns(tensors["attn_k"], config.n_kv_head)
    return tensors


def gguf_constants(config):
    """Return {name in a GGUF file: tensor} of what llama.cpp stores and a GPT computes."""
    tensors = {}
    if config.qk_norm and not config.qk_norm_weights:  # llama.cpp's norms have weights
        for layer in range(config.n_layer):
            for there in ("attn_q_norm", "attn_k_norm"):
                tensors[f"blk.{layer}.{there}.weight"] = torch.ones(config.head_dim)
    if config.rope_scaling:
        speeds = config.rope_theta ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
        tensors["rope_freqs.weight"] = speeds / slow_down(speeds, **config.rope_scaling)
    return tensors


def merges_of_characters(characters):
    """Return the pairs that build each character from its bytes, one byte after the other."""
    spelled = [hf_tokenizer.spell(c.encode()) for c in characters]
    pairs = [(c[:n], c[n]) for n in range(1, 4) for c in spelled if n < len(c)]
    return list(dict.fromkeys(pairs))


def known_pattern(data):
    """Return the pattern by which a tokenizer.json splits texts. Raises ValueError if unknown."""
    pattern = hf_tokenizer.read_pattern(data.get("pre_tokenizer"))
    normalizer = data.get("normalizer")
    if pattern not in PATTERN_NAMES:
        known = ", ".join(PATTERN_NAMES.values())
        raise ValueError(
            "llama.cpp does not split texts as this tokenizer does: choose one whose pattern "
            f"is one of {known}"
        )
    if normalizer == {"type": "NFC"}:  # as Qwen2 has it
        say_once("note: unlike this tokenizer, llama.cpp does not normalize texts (NFC)")
    elif normalizer:
        raise ValueError("this tokenizer normalizes texts, but llama.cpp does not")
    return pattern


def gguf_vocabulary(tokenizer, vocab_size):
    """Return (tokens, types, merges, name of the pattern) for a GGUF file. Raises ValueError.

    tokens: the names of vocab_size tokens. types: 1 for plain tokens, 3 for special ones, 4 for
    those that are found in any text, and 5 for those that the model has but its tokenizer lacks.
    merges: pairs of tokens, as "a b".
    """
    data = json.loads(tokenizer_files(tokenizer, 0)["tokenizer.json"])
    vocab, special = data["model"]["vocab"], tokenizer.special_tokens
    if tokenizer.state["kind"] == "char":
        pattern = hf_tokenizer.GPT2_PATTERN
        characters = vocab.keys() - special.keys()
        merges = merges_of_characters(sorted(characters, key=vocab.get))
        vocab = {hf_tokenizer.spell(c.encode()): vocab[c] for c in characters}
    else:
        pattern = known_pattern(data)
        merges = data["model"].get("merges")
    added = {token["content"]: token["id"] for token in data["added_tokens"]}
    names = {i: name for name, i in (vocab | added | special).items()}
    tokens = [names.get(i, f"<unused {i}>") for i in range(vocab_size)]
    kinds = dict.fromkeys(names.values(), 1)
    kinds |= {token["content"]: 4 for token in data["added_tokens"]} | dict.fromkeys(special, 3)
    types = [kinds.get(token, 5) for token in tokens]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
    return tokens, types, merges, PATTERN_NAMES[pattern]


def with_end_token(tokens, types, tensors):
    """Add the token END to a vocabulary and its weights, since llama.cpp uses id 11 otherwise.

    Its embedding is the mean of the others.
    """
    for name in tensors.keys() & {"token_embd.weight", "output.weight"}:
        rows = tensors[name].float()
        tensors[name] = torch.cat((rows, rows.mean(0, keepdim=True)))
    return [*tokens, END], [*types, 3]


def gguf_fields(config, family):
    """Return the fields of a GGUF file that describe the shape of a model."""
    norm = "layer_norm_epsilon" if family == "gpt2" else "layer_norm_rms_epsilon"
    shape = {
        "context_length": config.block_size,
        "embedding_length": config.n_embd,
        "block_count": config.n_layer,
        "feed_forward_length": config.mlp_hidden,
        "attention.head_count": config.n_head,
        "attention.head_count_kv": config.n_kv_head,
        f"attention.{norm}": config.norm_eps,
    }
    if family != "gpt2":
        shape |= {
            "rope.freq_base": config.rope_theta,
            "rope.dimension_count": config.head_dim,
            "attention.key_length": config.head_dim,
            "attention.value_length": config.head_dim,
        }
    return {f"{family}.{key}": value for key, value in shape.items()}


def write_gguf(checkpoint, path, dtype="f32"):
    """Write a checkpoint as a GGUF file, for llama.cpp and what builds on it.

    checkpoint: the path of a .pt file or of a run's folder. dtype: f32, f16 or q8_0, that of the
    matrices; norms and biases stay f32, and so do learned positions. A row that q8_0 cannot divide
    into blocks of 32 becomes f16. Raises FileNotFoundError, OSError and, before anything is
    written, ValueError for a model or a tokenizer that llama.cpp does not support.
    """
    path = as_path(path)
    if path.exists():
        raise ValueError(f"{path} exists: name a new file")
    model, tokenizer, _ = load_checkpoint(checkpoint)
    config = model.config
    write_config(config, tokenizer, torch.float32)  # raises ValueError for an unknown family
    check_logits(model)
    family = gguf_family(config)
    tensors = gguf_tensors(model)
    tokens, types, merges, pattern = gguf_vocabulary(tokenizer, config.vocab_size)
    end, suppressed = tokenizer.end_id, {}
    if end is None:
        end = len(tokens)
        tokens, types = with_end_token(tokens, types, tensors)
        suppressed = {"tokenizer.ggml.suppress_tokens": [end]}
    settings = json.loads(tokenizer_files(tokenizer, 0)["tokenizer_config.json"])
    begin = tokenizer.begin_id

    described = {
        "general.architecture": family,
        "general.name": as_path(checkpoint).resolve().name,
        "general.file_type": {"f32": 0, "f16": 1, "q8_0": 7}[dtype],
        "general.quantization_version": 2,
        "general.sampling.temp": 0.8,
        "general.sampling.top_k": 200,
        "general.sampling.top_p": 0.9,
        **gguf_fields(config, family),
        "tokenizer.ggml.model": "gpt2",  # llama.cpp's name for a BPE of bytes
        "tokenizer.ggml.pre": pattern,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": end if begin is None else begin,
        "tokenizer.ggml.eos_token_id": end,
        "tokenizer.ggml.add_bos_token": begin is not None,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
        **suppressed,
        "tokenizer.chat_template": settings.get("chat_template", PLAIN_TEMPLATE),
    }
    chosen = {}
    for name, tensor in tensors.items():
        kind = dtype
        if tensor.ndim < 2 or name == "position_embd.weight":
            kind = "f32"
        elif dtype == "q8_0" and tensor.size(1) % 32:
            kind = "f16"
        largest = float(tensor.abs().max())
        if kind != "f32" and not largest < 65504:
            raise ValueError(f"a weight of {name} is {largest:.3g}, too large for {dtype}: use f32")
        chosen[name] = tensor, kind
    path.parent.mkdir(parents=True, exist_ok=True)
    gguf.write(path, described, chosen)


# ---- merge ----
# What a checkpoint for use holds besides its weights
FOR_USE = ["model_args", "tokenizer", "config", "step", "best_val_loss", "dataset_sha256"]


def merge(checkpoint, base="", out=None):
    """Convert a checkpoint of LoRA matrices into one with all weights; return the new path.

    checkpoint: a file or run of a version before 2.0.0. base: the present path of the model that
    LoRA began from; "": the old one. out: the folder for best.pt; None: the run's, with -merged
    after its name. Raises FileNotFoundError, and ValueError if the base's weights have changed.
    """
    path = checkpoint_file(checkpoint)
    run = path.resolve().parent
    folder = as_path(out) if out else run.with_name(f"{run.name}-merged")
    merged = folder / "best.pt"
    if merged.exists():
        raise ValueError(f"{merged} exists: choose another folder with --out")
    state = read_tensors(path)
    if not holds_adapters_alone(state):
        raise ValueError(f"{path} already holds all weights: use it as it is")
    state = merged_state(state, base)
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(merged, state)
    return merged


def checkpoint_file(path):
    """Return the path of a checkpoint, given as a file or as a run's folder."""
    path = as_path(path)
    return path / "best.pt" if (path / "best.pt").exists() else path


def read_tensors(path):
    """Return what a checkpoint file holds, unchecked. Raises FileNotFoundError and ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: name a checkpoint")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises half a dozen types of error
        raise ValueError(f"{path} is damaged or not a checkpoint ({type(e).__name__})") from e


def holds_adapters_alone(state):
    """Return whether a checkpoint holds only LoRA's matrices, as those before 2.0.0 did."""
    weights = state.get("model", {})
    return "wte.weight" not in weights and any(key.endswith(".lora.A") for key in weights)


@torch.no_grad()
def merged_state(state, base=""):
    """Return a LoRA checkpoint's state with its matrices added to the base's weights."""
    if not base and not as_path(state["base"]).exists():  # a file must not start a download
        raise FileNotFoundError(
            f"{state['base']}, the base model of LoRA, is not on this machine: name its new path "
            f"with --base=PATH, or have it downloaded with --base={state['base']}"
        )
    base = full_name(base or state["base"])
    weights = base_weights(base)
    for key, A in state["model"].items():  # A: (rank, columns)
        module, is_A, _ = key.partition(".lora.A")
        if not is_A:
            continue
        weight = weights.get(f"{module}.weight")
        # The norm of the base's weight when LoRA began.
        norm = state["model"][f"{module}.lora.base"]
        if weight is None or not torch.isclose(weight.float().norm(), norm, rtol=1e-5):
            raise ValueError(
                f"{base} no longer holds the weights that LoRA was trained on: name the original "
                "model with --base"
            )
        B = state["model"][f"{module}.lora.B"]  # (rows, rank)
        weight += 2 * B @ A  # alpha is twice the rank (arXiv:2106.09685)
    kept = {key: state[key] for key in FOR_USE if key in state}
    return kept | {"version": __version__, "model": weights, "base": base, "lora_rank": 0}


def base_weights(base):
    """Return the state_dict of the model that LoRA began from: a checkpoint, folder or hub id."""
    path = checkpoint_file(base)
    try:
        if path.suffix != ".pt":
            return load_model(base).state_dict()
        state = read_tensors(path)
    except FileNotFoundError as e:
        raise FileNotFoundError(
            f"{base}, the base model of LoRA, was not found: name its new path with --base ({e})"
        ) from e
    if holds_adapters_alone(state):
        return merged_state(state)["model"]
    return load_checkpoint(path)[0].state_dict()


# ---- Main ----
def check_words():
    """Raise ValueError unless the words and the dtype are what the verb needs."""
    if verb not in USAGE:
        raise ValueError(f"the first word is {verb!r}: it must be one of {', '.join(USAGE)}")
    given = [word for word in (verb, source, target) if word]
    if len(given) != len(USAGE[verb].split()):
        raise ValueError(
            f"{' '.join(given)!r} has too few or too many words: write python hub.py {USAGE[verb]}"
        )
    known = GGUF_DTYPES if verb == "gguf" else DTYPES
    if dtype not in known:
        raise ValueError(f"dtype is {dtype!r}: it must be one of {', '.join(known)}")


def next_commands(path):
    """Return the commands that use a checkpoint, as text."""
    folder = path.parent.resolve()
    if folder.is_relative_to(Path.cwd()):
        folder = folder.relative_to(Path.cwd())
    folder = shlex.quote(str(folder))
    return (
        f"sample:    python sample.py --checkpoint={folder}\n"
        f"prepare:   python prepare.py --input=FILE --name=mine --tokenizer={folder}\n"
        f"finetune:  python gpt.py --init_from={folder} --dataset=mine"
    )


def main():
    check_words()
    if verb == "export":
        export(source, target, DTYPES[dtype])
        print(f"wrote {target}, in Hugging Face's format")
        return
    if verb == "gguf":
        write_gguf(source, target, GGUF_DTYPES[dtype])
        print(f"wrote {target}, for llama.cpp: llama-cli -m {shlex.quote(target)}")
        return
    if verb == "merge":
        path = merge(source, base, out)
        print(f"wrote {path}")
    else:
        folder = out or (name and HERE / "models" / name)
        path = get(source, folder, DTYPES[dtype])
        print(f"{path} holds {source}")
    print(next_commands(path))


if __name__ == "__main__":
    from configurator import run_script

    words = ("verb", "source", "target")
    run_script(globals(), main, SETTINGS, check_setting, word_settings=words)
