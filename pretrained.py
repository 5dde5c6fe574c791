"""pretrained.py: weights in Hugging Face's format, in and out; finetuning few of them (LoRA).

    model = GPT.from_pretrained("gpt2")               from Python: a hub id, or a folder with a config.json
    python gpt.py config/finetune_shakespeare.py      finetune; --init_from=FOLDER_OR_ID names another model
    python sample.py --init_from=FOLDER_OR_ID         let it continue a text
    python sample.py --export=FOLDER                  write the newest run for transformers, vLLM, llama.cpp

It knows the families of GPT-2 and Llama (also Mistral, Qwen2), which gpt.py's GPT equals but for the names of
the weights. It needs safetensors, and for hub ids huggingface_hub: pip install safetensors huggingface_hub.
"""

import contextlib
import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from gpt import GPT, GPTConfig, Tokenizer, load_checkpoint, rotary_table
from tokenizer_json import read_json, read_tokenizer, write_tokenizer

# ---- Names: a model's parameters here and there ------------------------------------------------------------
OUTSIDE = {"wte": "model.embed_tokens", "ln_f": "model.norm", "lm_head": "lm_head"}
INSIDE = {
    "ln_1": ["input_layernorm"],
    "ln_2": ["post_attention_layernorm"],
    "attn.c_attn": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.c_proj": ["self_attn.o_proj"],
    "mlp.c_fc": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.c_proj": ["mlp.down_proj"],
}
IGNORED = re.compile(
    r"(h\.\d+\.attn\.(masked_)?bias|.*rotary_emb\.inv_freq)"
)  # constants, not weights


def pieces(model, layout):
    """Yield (name there, rows of a parameter here) for all of a model's weights; a tied one once.

    layout "gpt2": the names are ours and projections lie transposed (Conv1D); "llama": fused ones lie apart.
    """
    for name, param in model.named_parameters():
        module, _, kind = name.rpartition(".")
        if layout == "gpt2":
            turned = kind == "weight" and re.fullmatch(r"h\.\d+\.(attn|mlp)\.c_\w+", module)
            yield name, param.data.T if turned else param.data
        elif module in OUTSIDE:
            yield f"{OUTSIDE[module]}.{kind}", param.data
        else:
            _, layer, part = module.split(".", 2)
            owner = model.h[int(layer)].get_submodule(part.partition(".")[0])
            rows = owner.parts if part in ("attn.c_attn", "mlp.c_fc") else [len(param)]
            for there, piece in zip(INSIDE[part], param.data.split(rows), strict=True):
                yield f"model.layers.{layer}.{there}.{kind}", piece


# ---- Reading -----------------------------------------------------------------------------------------------
SHORT_NAMES = {
    name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
}


def needed(library):
    return ValueError(f"this needs {library}, which is not installed: pip install {library}")


def find_folder(name):
    """Return the folder of a pretrained model: as given, or downloaded by its id, once, from the hub."""
    if (Path(name) / "best.pt").exists():
        raise FileNotFoundError(
            f"{name} is a run's folder: name the checkpoint, {Path(name) / 'best.pt'}"
        )
    if name and Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name)):
        raise FileNotFoundError(
            f"{name} is no checkpoint (.pt), no folder and no Hugging Face hub id"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as e:
        raise needed("huggingface_hub") from e
    wanted = [
        "config.json",
        "generation_config.json",
        "model*.safetensors*",
        "*token*.json",
        "*.jinja",
    ]
    try:
        return Path(snapshot_download(SHORT_NAMES.get(str(name), str(name)), allow_patterns=wanted))
    except Exception as e:  # the library's errors, and httpx's, have no common type
        raise FileNotFoundError(
            f"{name} is no folder here, nor to be had from the Hugging Face hub "
            f"({type(e).__name__}): check the name and the network"
        ) from e


def require(theirs, **allowed):
    """Raise ValueError for the first of the config's keys whose value gpt.py's GPT cannot represent."""
    for key, values in (allowed | {"quantization_config": [None]}).items():
        if (value := theirs.get(key, values[0])) not in values:
            raise ValueError(
                f"config.json's {key} is {value!r}: gpt.py's GPT has only "
                f"{' or '.join(map(repr, values))}"
            )


def gpt2_config(theirs):
    """Return (GPTConfig, {projections that have a bias}) of a GPT-2's config.json."""
    require(
        theirs,
        activation_function=["gelu_new", "gelu_pytorch_tanh"],
        scale_attn_weights=[True],
        scale_attn_by_inverse_layer_idx=[False],
        add_cross_attention=[False],
    )
    n_embd, n_head = theirs["n_embd"], theirs["n_head"]
    return GPTConfig(
        block_size=theirs["n_positions"],
        vocab_size=theirs["vocab_size"],
        n_layer=theirs["n_layer"],
        n_head=n_head,
        n_kv_head=n_head,
        n_embd=n_embd,
        dropout=0.0,
        mlp_ratio=(theirs.get("n_inner") or 4 * n_embd) / n_embd,
        bias=True,
        use_rope=False,
        use_rms_norm=False,
        use_swiglu=False,
        tie_weights=theirs.get("tie_word_embeddings", True),
        norm_eps=theirs.get("layer_norm_epsilon", 1e-5),
    ), {"c_attn", "c_proj", "c_fc", "ln_1", "ln_2", "ln_f"}


def slow_down(speeds, factor, low_freq_factor, high_freq_factor, original_max_position_embeddings):
    """Return rotary speeds, in radians a position, for a longer context than the original (arXiv:2407.21783):
    those of few turns within that are divided by factor, those of many kept."""
    turns = original_max_position_embeddings * speeds / (2 * math.pi)
    kept = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
    return torch.lerp(speeds / factor, speeds, kept.clamp(0, 1))


LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def rope_settings(theirs):
    """Return what a config says of rotary positions, in the form of newer files."""
    older = {"rope_theta": theirs.get("rope_theta", 10000.0)} | (theirs.get("rope_scaling") or {})
    rope = theirs.get("rope_parameters") or older
    return rope | {"rope_type": rope.get("rope_type") or rope.get("type") or "default"}


def llama_config(theirs):
    """Return (GPTConfig, {projections that have a bias}) of a Llama's, Mistral's or Qwen's config.json."""
    kind, rope = theirs["architectures"][0], rope_settings(theirs)
    n_head, hidden, width = (
        theirs[k] for k in ("num_attention_heads", "hidden_size", "intermediate_size")
    )
    slides = theirs.get("use_sliding_window", kind.startswith("Mistral"))
    window = (
        theirs.get("sliding_window", 4096) if slides else None
    )  # 4,096: Mistral's, where it is not named
    window = None if window and window >= theirs.get("max_position_embeddings", 2048) else window
    require(
        theirs | {"rope_type": rope["rope_type"], "sliding_window": window},
        sliding_window=[None],
        hidden_act=["silu"],
        head_dim=[hidden // n_head, None],
        rope_type=["default", "llama3"],
        layer_types=[["full_attention"] * theirs["num_hidden_layers"], None],
    )
    if width % 32:
        raise ValueError(
            f"config.json's intermediate_size is {width}: gpt.py has only multiples of 32"
        )
    attention, mlp = (
        theirs.get("attention_bias", kind.startswith("Qwen2")),
        theirs.get("mlp_bias", False),
    )
    biased = {"q_proj", "k_proj", "v_proj"} if attention else set()
    biased |= {"o_proj"} if attention and not kind.startswith("Qwen2") else set()
    biased |= {"gate_proj", "up_proj", "down_proj"} if mlp else set()
    return GPTConfig(
        block_size=theirs.get("max_position_embeddings", 2048),
        vocab_size=theirs["vocab_size"],
        n_layer=theirs["num_hidden_layers"],
        n_head=n_head,
        n_embd=hidden,
        mlp_ratio=width * 1.5 / hidden,
        n_kv_head=theirs.get("num_key_value_heads") or n_head,
        dropout=0.0,
        bias=bool(biased),
        qk_norm=kind.startswith("Qwen3"),
        tie_weights=theirs.get("tie_word_embeddings", False),
        rope_theta=float(rope["rope_theta"]),
        norm_eps=theirs.get("rms_norm_eps", 1e-6),
        rope_scaling={k: rope[k] for k in LLAMA3_KEYS} if rope["rope_type"] == "llama3" else None,
    ), biased


FAMILIES = {"GPT2LMHeadModel": ("gpt2", gpt2_config)} | {
    f"{name}ForCausalLM": ("llama", llama_config) for name in ("Llama", "Mistral", "Qwen2", "Qwen3")
}


def read_config(folder):
    """Return (GPTConfig, {projections that have a bias}, layout of the weights). Raises ValueError."""
    if not (theirs := read_json(folder / "config.json")):
        raise FileNotFoundError(
            f"{folder} has no config.json: it is no Hugging Face model's folder"
        )
    kinds = theirs.get("architectures") or f"not named, its model_type {theirs.get('model_type')!r}"
    kind = kinds[0] if isinstance(kinds, list) else kinds
    if kind not in FAMILIES or not isinstance(kinds, list):
        raise ValueError(
            f"{folder}'s architecture is {kind}: gpt.py's GPT can be {', '.join(FAMILIES)}"
        )
    layout, convert = FAMILIES[kind]
    try:
        config, biased = convert(theirs)
        for name, value in (asdict(config) | (config.rope_scaling or {})).items():
            if type(value) in (int, float) and not (0 <= value < 2**31) or isinstance(value, str):
                raise TypeError(f"{name} {value!r}")
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd"):
            if type(getattr(config, name)) is not int:
                raise TypeError(f"{name} {getattr(config, name)!r}")
        rotary_table(replace(config, block_size=1))  # do the numbers serve?
        return config, biased, layout
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as e:
        raise ValueError(f"{folder}'s config.json is damaged ({type(e).__name__} {e})") from e


def weight_files(folder):
    """Return the paths of a folder's safetensors files. Raises FileNotFoundError; never touches a pickle."""
    files, index = ["model.safetensors"], folder / "model.safetensors.index.json"
    if index.exists():
        if not isinstance(names := read_json(index).get("weight_map"), dict):
            raise ValueError(f"{index} is damaged (no weight_map): download it again")
        files = sorted({str(file) for file in names.values()})
    for file in files:
        if not (folder / file).is_file() or Path(file).name != file:
            pickled = sorted(
                path.name for end in ("*.bin", "*.pt", "*.pth") for path in folder.glob(end)
            )
            why = (
                f": {pickled[0]} is a pickle, which could run any code, and is not read"
                if pickled
                else ""
            )
            raise FileNotFoundError(
                f"{folder} has no {file}{why}; have the weights saved as safetensors"
            )
    return [folder / file for file in files]


def read_shard(path, targets, config):
    """Copy one file's tensors into `targets`, {name there: tensor here}, and take these out of it."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as e:
        raise needed("safetensors") from e
    try:
        with safe_open(path, "pt") as shard:
            for key in shard.keys():  # noqa: SIM118  # it is no dict
                name = key.removeprefix("transformer.")
                if name in targets:
                    place(shard.get_tensor(key), targets.pop(name), name, path)
                elif not redundant(name, shard, key, config):
                    raise ValueError(f"{path}'s tensor {name} has no place in gpt.py's GPT")
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path} is damaged ({e}): download it again") from e


def place(tensor, target, name, path):
    if tensor.shape != target.shape:
        raise ValueError(
            f"{path}'s tensor {name} is {tuple(tensor.shape)}, by config.json "
            f"{tuple(target.shape)}: they do not belong together"
        )
    target.copy_(tensor)


def redundant(name, shard, key, config):
    """Tell whether gpt.py's GPT has no need of a tensor: a constant, the tied head, a norm of ones."""
    if config.qk_norm and re.fullmatch(r"model\.layers\.\d+\.self_attn\.[qk]_norm\.weight", name):
        return bool((shard.get_tensor(key) == 1).all())
    return bool(IGNORED.fullmatch(name)) or (name == "lm_head.weight" and config.tie_weights)


@contextlib.contextmanager
def unset_weights(dtype):
    """Leave new modules' weights, in `dtype`, unset: reading will set them. Device "meta" takes seconds."""
    functions, default = dict(vars(nn.init)), torch.get_default_dtype()
    for name in (name for name in nn.init.__all__ if name.endswith("_")):
        setattr(nn.init, name, lambda tensor, *_, **__: tensor)
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        vars(nn.init).update(functions)
        torch.set_default_dtype(default)


@torch.no_grad()
def load_model(path, dtype=torch.float32, **changes):
    """Return the GPT of a Hugging Face folder or hub id, on the CPU, its weights in `dtype`.

    changes: fields of GPTConfig that shape no weight. Files are read one by one: beside the model at most one
    is held. Raises FileNotFoundError, and ValueError with config.json's key for what gpt.py's GPT cannot be.
    """
    folder = find_folder(path)
    config, biased, layout = read_config(folder)
    with unset_weights(dtype):
        model = GPT(replace(config, **changes)).eval()
    targets = dict(pieces(model, layout))
    for name in [
        name for name in targets if name.endswith(".bias") and name.split(".")[-2] not in biased
    ]:
        targets.pop(name).zero_()  # gpt.py has biases in all projections or in none
    for file in weight_files(folder):
        read_shard(file, targets, config)
    if targets:
        raise ValueError(
            f"{folder} lacks the tensor {min(targets)}, which its config.json asks for"
        )
    return model


def load_pretrained(path, **changes):
    """Return (model, checkpoint) of a Hugging Face folder or hub id; the checkpoint holds what one would."""
    folder = find_folder(path)
    tokenizer, vocab_size = read_tokenizer(folder), read_config(folder)[0].vocab_size
    if tokenizer.vocab_size != vocab_size:
        raise ValueError(
            f"{folder}'s tokenizer has {tokenizer.vocab_size} tokens, its weights {vocab_size}: "
            "they do not belong together"
        )
    model = load_model(folder, **changes)
    return model, {"model_args": asdict(model.config), "tokenizer": tokenizer.state}


# ---- Writing -----------------------------------------------------------------------------------------------
def their_config(model, tokenizer):
    """Return config.json's content for a model. Raises ValueError for a setting that no family has."""
    c = model.config
    wanted = {"use_rope": c.use_rope, "use_rms_norm": c.use_rope, "use_swiglu": c.use_rope}
    wanted |= {} if c.use_rope else {"qk_norm": False, "n_kv_head": c.n_head, "bias": True}
    for name, value in wanted.items():
        if (found := getattr(c, name)) != value:
            raise ValueError(
                f"{name} is {found}: with use_rope {c.use_rope}, transformers knows only "
                f"models where it is {value}"
            )
    if c.use_rope and c.qk_norm and c.bias:
        raise ValueError("qk_norm and bias are True: transformers knows no model that has both")
    common = {
        "vocab_size": c.vocab_size,
        "tie_word_embeddings": c.tie_weights,
        "initializer_range": 0.02,
        "torch_dtype": str(model.wte.weight.dtype)[6:],
        "bos_token_id": tokenizer.begin,
        "eos_token_id": tokenizer.end,
        "use_cache": True,
    }
    if not c.use_rope:
        return common | {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "n_positions": c.block_size,
            "n_embd": c.n_embd,
            "n_layer": c.n_layer,
            "n_head": c.n_head,
            "n_inner": c.mlp_hidden,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": c.norm_eps,
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
        }
    kind = "Qwen3" if c.qk_norm else "Llama"
    scaling = None if c.rope_scaling is None else c.rope_scaling | {"rope_type": "llama3"}
    return common | {
        "architectures": [f"{kind}ForCausalLM"],
        "model_type": kind.lower(),
        "hidden_size": c.n_embd,
        "max_position_embeddings": c.block_size,
        "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head,
        "num_key_value_heads": c.n_kv_head,
        "head_dim": c.head_dim,
        "intermediate_size": c.mlp_hidden,
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": scaling,
        "attention_bias": c.bias,
        "mlp_bias": c.bias,
        "attention_dropout": 0.0,
    }


def model_card(model, state, name):
    """Return README.md's text: what the model is and the figures of its run."""
    config, figures = state.get("config", {}), {"parameters": f"{model.n_params():,}"}
    figures |= {
        key: config.get(key) for key in ("dataset", "optimizer", "learning_rate", "batch_size")
    }
    figures |= {
        "finetuned from": Path(state.get("base", "")).name,
        "LoRA rank": state.get("lora_rank"),
    }
    figures |= {"steps": state.get("step")}
    if (loss := state.get("best_val_loss", math.inf)) < math.inf:
        figures |= {
            "best evaluation's loss": f"{loss:.4f}",
            "perplexity": f"{math.exp(min(loss, 700)):.2f}",
        }
    figures |= asdict(model.config)
    rows = "\n".join(
        f"| {key} | {value} |" for key, value in figures.items() if value not in (None, "")
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {name}

A language model made with gpt.py.

| | |
|---|---|
{rows}

    from transformers import pipeline
    print(pipeline("text-generation", "{name}")("Once upon a time")[0]["generated_text"])
"""


def export(model, tokenizer, state, folder):
    """Write a model, in its weights' dtype, as a Hugging Face folder. Raises ValueError, OSError."""
    try:
        from safetensors.torch import save_file
    except ImportError as e:
        raise needed("safetensors") from e
    folder, theirs = Path(folder), their_config(model, tokenizer)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty: name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    layout = "llama" if model.config.use_rope else "gpt2"
    prefix = "transformer." if layout == "gpt2" else ""
    tensors = {
        name if name == "lm_head.weight" else prefix + name: tensor.contiguous()
        for name, tensor in pieces(model, layout)
    }
    if model.config.qk_norm:
        ones = torch.ones(model.config.head_dim, dtype=model.wte.weight.dtype)
        tensors |= {
            f"model.layers.{i}.self_attn.{part}_norm.weight": ones.clone()
            for i in range(model.config.n_layer)
            for part in "qk"
        }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # the library lets its owner alone read it
    sampling = {"bos_token_id": tokenizer.begin, "eos_token_id": tokenizer.end, "do_sample": True}
    for name, content in (
        ("config", theirs),
        ("generation_config", sampling | {"temperature": 0.8}),
    ):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    write_tokenizer(tokenizer, folder, model.config.block_size)
    (folder / "README.md").write_text(model_card(model, state, folder.name), encoding="utf-8")


# ---- LoRA: small matrices beside frozen ones ---------------------------------------------------------------
class LoRA(nn.Module):
    """What is added to a Linear's output: 2 B A x (arXiv:2106.09685, alpha = 2 rank); B is 0 at first."""

    scale = 2.0

    def __init__(self, linear, rank):
        super().__init__()
        self.A = nn.Parameter(torch.randn(rank, linear.in_features) / math.sqrt(linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))
        self.register_buffer(
            "base", linear.weight.detach().float().norm()
        )  # by which to know it again

    def forward(self, linear, inputs, output):
        return output + F.linear(F.linear(inputs[0], self.A), self.B) * self.scale


def add_lora(model, rank):
    """Freeze model and put adapters beside all projections of its blocks."""
    model.requires_grad_(False)
    for linear in [module for module in model.h.modules() if isinstance(module, nn.Linear)]:
        linear.lora = LoRA(linear, rank)
        linear.register_forward_hook(linear.lora)


def check_base(model, state):
    """Raise ValueError if a LoRA checkpoint's adapters were trained beside other weights than model's."""
    norms = {
        name: tensor for name, tensor in model.state_dict().items() if name.endswith(".lora.base")
    }
    saved = state["model"]
    if not all(
        name in saved and torch.isclose(saved[name], norms[name], rtol=1e-5) for name in norms
    ):
        raise ValueError(f"{state['base']} holds other weights than when LoRA began from it")


@torch.no_grad()
def merge_lora(model):
    """Add the adapters to the weights they stand beside and take them away."""
    for linear in [module for module in model.h.modules() if hasattr(module, "lora")]:
        linear.weight += linear.lora.scale * linear.lora.B @ linear.lora.A
        linear._forward_hooks.clear()
        del linear.lora
    model.requires_grad_(True)


def load_lora(state, **changes):
    """Return (model, checkpoint) of a LoRA checkpoint's state, merged into the model that it began from."""
    model = load_checkpoint(state["base"], **changes)[0]
    model.config.block_size = state["model_args"]["block_size"]
    add_lora(model, state["lora_rank"])
    check_base(model, state)
    model.load_state_dict(state["model"], strict=False)  # the adapters alone
    merge_lora(model)
    return model, state


def load_other(path, state, device, **changes):
    """Return what gpt.load_checkpoint does, of a LoRA checkpoint's state; if None, of a folder or hub id."""
    model, state = load_lora(state, **changes) if state else load_pretrained(path, **changes)
    return model.to(device), Tokenizer(**state["tokenizer"]), state


def start_finetuning(base, state, out, rank, optimizer, block_size, **changes):
    """Return (model, tokenizer) to finetune: base's or, resumed, of state's shape; with LoRA if rank > 0."""
    if rank and (not base or optimizer == "muon"):
        missing = "init_from, the model to finetune" if not base else "--optimizer=adamw, not muon"
        raise ValueError(f"lora_rank is {rank}: it needs {missing}")
    if state and not rank:
        model, tokenizer = GPT(GPTConfig(**state["model_args"] | changes)), None
    else:
        if not state and Path(base).is_file() and Path(base).resolve().parent == out.resolve():
            raise ValueError(
                f"{base} lies in out_dir, whose files a new run renames: use another out_dir"
            )
        model, tokenizer, _ = load_checkpoint(base, **changes)
        if model.config.block_size < block_size:
            raise ValueError(
                f"block_size is {block_size}: {base} has {model.config.block_size} positions"
            )
        if model.config.use_rope:  # a table of learned positions stays as long as it is
            model.config.block_size = block_size
    if rank:
        add_lora(model, rank)
        if state:
            check_base(model, state)
    model.base = str(Path(base).resolve()) if Path(base).exists() else base
    return model.train(), tokenizer
