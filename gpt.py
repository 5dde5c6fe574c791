# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9.1,<2.14", "numpy", "tiktoken"]
# ///
"""gpt.py: a modern GPT and its whole training loop in one file.

    python gpt.py config/train_shakespeare.py           train; each setting below is also a flag
    torchrun --standalone --nproc_per_node=8 gpt.py     train on 8 GPUs, with the same global batch
    python gpt.py --init_from=resume                    resume an interrupted run
    python sample.py --prompt "ROMEO:"                  let the newest run continue a text

With --max_minutes, settings that are None are fitted to the text, the minutes and the machine.
Without it, or when finetuning, they take the values in [] below. A resumed run keeps its values.

You can also paste this file into a notebook cell and run it. It reads from top to bottom: settings,
tokenizer, model, loss, generation, optimizers, data, checkpoints, machine, evaluation, progress,
fitting, resuming, trainer, folder of a run, what it prints, the training loop, main.
"""

import time

# The import of torch below takes seconds that count toward max_minutes.
STARTED = time.monotonic()

import ast
import base64
import contextlib
import ctypes
import difflib
import errno
import functools
import hashlib
import json
import linecache
import math
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import textwrap
import threading
import urllib.request
import zipfile
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

# ---- Settings: each comment is the help text (python gpt.py --help) -----------------------------
# A flag or a config file assigns to one of these names before main() reads them all, once. With
# max_minutes, a setting that is None is fitted to the text; otherwise it takes the value in [].
dataset = "shakespeare"  # folder under data_dir; shakespeare and pydoc are prepared when missing
data_dir = ""  # folder of all data sets; empty: data/ beside gpt.py
out_dir = ""  # folder for this run's checkpoints and log; empty: out/<dataset> beside gpt.py
init_from = "scratch"  # scratch | resume | auto: resume if there is a run | checkpoint to finetune
seed = 1337  # random seed for weights, batches, dropout and samples
eval_only = False  # only evaluate init_from, or out_dir/best.pt, on the whole validation split
eval_interval = 250  # steps between evaluations, each of which begins by saving a checkpoint
early_stop = 0  # end after this many evaluations in a row without a new best loss; 0: never
eval_iters = 20  # batches per evaluation; the last evaluation covers the whole validation split
log_interval = 50  # steps between progress lines
tensorboard = False  # also log to TensorBoard, in out_dir/tensorboard
wandb_log = False  # also log to Weights & Biases (environment: WANDB_PROJECT, WANDB_MODE, ...)
sample_at_eval = False  # print a sample at each evaluation, not only at the end
sample_tokens = 300  # length of each sample in tokens; 0: no samples
max_bad_steps = 10  # how many steps in a row may have non-finite gradients; one more ends the run
dry_run = False  # only print the run's plan, based on three timed steps, and write nothing
# model
block_size: int | None = None  # context length in tokens [256]
n_layer: int | None = None  # number of blocks [4]
n_head: int | None = None  # query heads per block [4]
n_kv_head: int | None = None  # key/value heads, each shared by a group of query heads (GQA) [1]
n_embd: int | None = None  # width of the residual stream [128]
mlp_ratio = 4.0  # MLP width divided by n_embd; SwiGLU, which has a third matrix, uses 2/3 of that
dropout: float | None = None  # fraction of channels dropped after embedding, attention and MLP [0]
train_temperature: float | None = None  # divides training logits; below 1 curbs overconfidence [1]
bias = False  # biases in the linear layers and in LayerNorm
use_rope = True  # rotary positions; False: learned positions
use_rms_norm = True  # RMSNorm; False: LayerNorm
use_swiglu = True  # SwiGLU; False: GELU
qk_norm = True  # RMSNorm on queries and keys
tie_weights = False  # use one matrix for the token embedding and the output head
lora_rank = 0  # above 0: finetune small matrices of this rank beside init_from's frozen ones (LoRA)
gradient_checkpointing = False  # recompute blocks in the backward pass: less memory, 1/3 more work
# batches and optimizer
batch_size: int | None = None  # sequences per micro-batch [8]
gradient_accumulation_steps = 1  # micro-batches per step, divided among all processes
optimizer = "muon"  # muon: Muon for the blocks' matrices, AdamW for the rest | adamw: AdamW only
learning_rate: float | None = None  # peak learning rate of AdamW [6e-3]
muon_lr: float | None = None  # peak learning rate of Muon [0.03]
muon_momentum = 0.9  # decay of Muon's running mean of the gradient
weight_decay: float | None = None  # decay of matrices and embeddings per unit of learning rate [0]
beta1 = 0.9  # decay of AdamW's running mean of the gradient
beta2 = 0.95  # decay of AdamW's running mean of the squared gradient
grad_clip = 1.0  # maximum norm of the gradient; 0: no clipping
# schedule
max_iters = 2000  # number of optimizer steps
max_minutes = 0.0  # above 0: time limit in minutes for the whole process, in place of max_iters
max_epochs: float | None = None  # above 0: maximum number of passes over the text [0]
warmup_iters = 20  # steps of linear warm-up
lr_schedule = "linear"  # after warm-up: cosine | linear | constant | wsd (linear in the last fifth)
lr_decay_iters = 0  # step at which min_lr is reached; 0: the last step
min_lr = 0.0  # final learning rate of AdamW; muon_lr falls in the same proportion
# machine
device = "auto"  # auto: the GPU that torch finds, else cpu | any torch device, such as cuda:1
dtype = "auto"  # auto: by hardware | float32 | bfloat16 | float16 with loss scaling, on CUDA only
fsdp = False  # under torchrun: shard weights, gradients and optimizer state over the GPUs (FSDP2)
cuda_graphs = True  # on one GPU, record a step and replay it, so that no kernel waits for Python
compile: bool | None = None  # use torch.compile; None: only if the run is long enough

# ---- Reading and checking settings --------------------------------------------------------------
__version__ = "2.0.0"
HERE = Path(__file__).resolve().parent if "__file__" in globals() else Path.cwd()


# What the settings that are None mean where nothing is fitted: the values in brackets above.
UNFITTED = {
    "block_size": 256,
    "n_layer": 4,
    "n_head": 4,
    "n_kv_head": 1,
    "n_embd": 128,
    "dropout": 0.0,
    "train_temperature": 1.0,
    "batch_size": 8,
    "learning_rate": 6e-3,
    "muon_lr": 0.03,
    "weight_decay": 0.0,
    "max_epochs": 0.0,
}


class Setting(NamedTuple):
    type: type
    optional: bool  # whether it may be None
    help: str
    default: bool | int | float | str | None


def read_settings(source):
    """Return {name: Setting} of the lines `name = value  # help` above a script's definitions.

    source: the script's text. A setting has the type of its annotation or else of its value.
    """
    declared = {}
    head = re.split(r"(?m)^(?:@|class |def )", source, maxsplit=1)[0]
    lines = head.splitlines()
    for node in ast.parse(head).body:
        pattern = r"([a-z]\w*)(?:: (\w+)( \| None)?)? = .+?  # (.+)$"
        line = lines[node.lineno - 1]
        found = re.match(pattern, line)
        if re.match(r"[a-z]\w*(: .+)? = \($", line):  # a formatter has wrapped it
            raise ValueError(f"{line!r}: write a setting on one line: name = value  # help")
        if found and isinstance(node, ast.Assign | ast.AnnAssign):
            name, annotation, optional, help_text = found.groups()
            default = ast.literal_eval(node.value)
            known_types = {"bool": bool, "int": int, "float": float, "str": str}
            type_ = known_types.get(annotation, type(default))
            declared[name] = Setting(type_, bool(optional), help_text, default)
    return declared


def own_source():
    """Return the text of this file or, where it is pasted into a notebook, of its cell."""
    return "".join(linecache.getlines(own_source.__code__.co_filename, globals()))


SETTINGS = read_settings(own_source())  # with the defaults; the names above hold the current values


def check_setting(name, value, declared):
    """Return the value as the setting `name` stores it.

    Flags, config files and keywords all pass through here. NumPy numbers, paths, devices and dtypes
    become plain numbers and strings, so that a checkpoint can hold them. declared: what
    read_settings returned. Raises ValueError for an unknown name and a value of the wrong type.
    """
    if name not in declared:
        close = difflib.get_close_matches(name, declared, 1)
        remedy = f"did you mean {close[0]}?" if close else "--help lists all settings"
        raise ValueError(f"unknown setting {name!r}: {remedy}")
    expected, optional, _, _ = declared[name]
    value = as_plain(value, expected)
    if type(value) is float and not math.isfinite(value):
        raise ValueError(f"{name} is {value}: expected a finite number")
    if type(value) is expected or (value is None and optional):
        return value
    words = {bool: "True or False", int: "an integer", float: "a number", str: "text"}[expected]
    words += ", or None" if optional else ""
    raise ValueError(f"{name} is {value!r}: expected {words}")


def as_plain(value, expected):
    """Convert a value to the expected plain type if nothing is lost, or else return it as it is."""
    if isinstance(value, np.generic):
        value = value.item()
    if expected is str and isinstance(value, Path | torch.device | torch.dtype):
        return str(value).removeprefix("torch.")
    if expected is float and type(value) is int:
        return float(value)
    if expected is bool and type(value) is int and value in (0, 1):
        return bool(value)
    return value


CHOICES = {
    "optimizer": ("muon", "adamw"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "lr_schedule": ("cosine", "linear", "wsd", "constant"),
}
POSITIVE = ("batch_size", "gradient_accumulation_steps", "learning_rate")
POSITIVE += ("eval_interval", "eval_iters", "log_interval")
BELOW_ONE = ("beta1", "beta2", "muon_momentum")
NAMES_OF_THIS_FILE = set()  # filled at the end of the file


def checked_settings(**changes):
    """Return a namespace of the settings at the top of this file, overridden by `changes`.

    Raises ValueError for the first setting that is unknown, of the wrong type or out of range.
    """
    values = {name: globals()[name] for name in SETTINGS} | changes
    if __name__ == "gpt":  # imported: a name added from outside is taken for a misspelled setting
        for name in set(globals()) - NAMES_OF_THIS_FILE:
            if isinstance(globals()[name], bool | int | float | str | np.generic | Path):
                values[name] = globals()[name]
    for name in values:
        values[name] = check_setting(name, values[name], SETTINGS)
        check_meaning(name, values[name])
    settings = SimpleNamespace(**values)
    if not decided_later(settings):
        fill_settings(settings, UNFITTED)
    check_together(settings)
    return settings


def decided_later(settings):
    """Return whether settings may be None until a text or an earlier run determines them."""
    if settings.eval_only:
        return False
    return settings.max_minutes > 0 or settings.init_from != "scratch"


def fill_settings(settings, values):
    """Set each setting that is None to its value in `values`, if it is one of UNFITTED."""
    for name in UNFITTED.keys() & values.keys():
        if getattr(settings, name) is None:
            setattr(settings, name, check_setting(name, values[name], SETTINGS))
            check_meaning(name, getattr(settings, name))


def default_of(name):
    """Return the value of a setting that nobody sets, if nothing is fitted."""
    default = SETTINGS[name].default
    return UNFITTED.get(name) if default is None else default


def check_together(settings):
    """Raise ValueError for settings that do not fit together; those that are None are ignored."""
    if settings.learning_rate is not None and settings.min_lr > settings.learning_rate:
        raise ValueError(
            f"min_lr is {settings.min_lr}: it must be at most learning_rate, which is "
            f"{settings.learning_rate}"
        )
    if settings.n_embd is not None and settings.n_head is not None:
        n_kv_head = settings.n_kv_head or 1
        model_config(SimpleNamespace(**vars(settings) | {"n_kv_head": n_kv_head}), vocab_size=1)


def check_meaning(name, value):
    """Raise ValueError for a value of the right type that is not valid."""
    if name in CHOICES and value not in CHOICES[name]:
        raise ValueError(f"{name} is {value!r}: it must be one of {', '.join(CHOICES[name])}")
    if name in POSITIVE and value is not None and not 0 < value < 2**31:
        raise ValueError(f"{name} is {value!r}: it must be a number above 0 and below 2**31")
    if type(value) in (int, float) and not 0 <= value < 2**31:
        raise ValueError(f"{name} is {value}: it must be at least 0 and below 2**31")
    if name in BELOW_ONE and value >= 1:
        raise ValueError(f"{name} is {value}: it must be below 1")


def as_path(text):
    """Return text as a Path with a leading ~ expanded; all paths from users come through here."""
    return Path(text).expanduser()


def read_text(path):
    """Return a UTF-8 file's text without any byte order mark; line endings stay as they are.

    Raises ValueError if the file is not UTF-8, and OSError if it cannot be read.
    """
    try:
        return as_path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text (byte {e.start}): convert it to UTF-8") from e


# ---- Tokenizer ----------------------------------------------------------------------------------
# The templates for a system prompt, a question and an answer, separated by ||. A fourth part, if
# there is one, precedes a question that follows no system prompt.
CHAT = "%s||<|user|>%s<|assistant|>||%s"


@dataclass
class Tokenizer:
    """Converts text to ids and back, with a tiktoken.Encoding.

    The fields are strings. Data sets and checkpoints store them to rebuild the tokenizer.

    kind: "char" gives each character of `chars` one id; "bpe" merges bytes by `ranks`, the tokens'
        bytes in base64, within the words that `pattern` matches; "tokenizers" passes `json`, the
        text of a tokenizer.json, to Hugging Face's library; any other kind is the name of a
        tiktoken encoding.
    special: names of special tokens; encode never returns their ids, which follow those of the
        other tokens or are given as `special_ids`.
    begin: the name of the special token that begins a text.
    end: the names of the special tokens at which a generated text ends. The first one ends
        documents and answers in training.
    chat: the templates of a conversation; see CHAT.
    """

    kind: str
    chars: str = ""
    ranks: str = ""
    pattern: str = "(?s:.)"
    special: str = ""
    special_ids: str = ""
    json: str = ""
    begin: str = ""
    end: str = "<|endoftext|>"
    chat: str = CHAT

    def __post_init__(self):
        self.state = asdict(self)
        for name, value in self.state.items():
            if type(value) is not str:
                raise ValueError(f"the tokenizer's {name} is {value!r}: it must be text")
        self.encoding = self.make_encoding()
        names = self.encoding.special_tokens_set
        self.special_tokens = {name: self.encoding.encode_single_token(name) for name in names}
        self.vocab_size = self.encoding.n_vocab
        self.begin_id = self.special_tokens.get(self.begin)  # None: there is no such token
        ends = [self.end] if self.end in names else self.end.split()
        self.end_id = self.special_tokens.get(ends[0]) if ends else None
        self.end_ids = [self.special_tokens[name] for name in ends if name in names]
        self.chat_parts = self.chat.split("||")
        # In ChatML, for one, the token that ends an answer also stands within a conversation.
        self.ends_turns = any(name in self.chat for name in ends[:1])

    def make_encoding(self):
        """Return the encoding that the fields describe: a tiktoken.Encoding or LibraryEncoding."""
        if self.chars:
            tokens = [c.encode() for c in self.chars]
        elif self.ranks:
            tokens = [base64.b64decode(token) for token in self.ranks.split()]
        elif self.json:
            from extras.hf_tokenizer import LibraryEncoding

            return LibraryEncoding(self.json)
        else:
            return load_encoding(self.kind)
        names = self.special.split()
        count = len(tokens) + len(names)
        ids = [int(i) for i in self.special_ids.split()] or range(len(tokens), count)
        special_tokens = dict(zip(names, ids))
        free_ids = sorted(set(range(count)) - set(special_tokens.values()))
        ranks = dict(zip(tokens, free_ids))
        return tiktoken.Encoding(
            self.kind, pat_str=self.pattern, mergeable_ranks=ranks, special_tokens=special_tokens
        )

    def encode(self, text):
        """Return the ids of a text as a list: [2, 0, 1] for "cab" with the characters "abc".

        Raises ValueError for a character that is not in the vocabulary.
        """
        unknown = set(text) - set(self.chars) if self.chars else set()
        if unknown:
            i = min(text.index(c) for c in unknown)
            known = "".join(c for c in self.chars if c.isprintable())[:100]
            raise ValueError(
                f"character {i} of the text, {text[i]!r}, is not in the vocabulary ({known!r})"
            )
        return self.encoding.encode_ordinary(text)

    def decode_bytes(self, ids):
        """Return the bytes of ids; with BPE the last token may end in the middle of a character.

        A model may have more ids than its tokenizer, as padding; the extra ids stand for nothing.
        """
        return self.encoding.decode_bytes([i for i in ids if i < self.vocab_size])

    def decode(self, ids):
        """Return the text of ids, with U+FFFD for bytes that are not UTF-8."""
        return self.decode_bytes(ids).decode(errors="replace")


def load_encoding(name):
    """Return tiktoken's encoding of this name, such as gpt2. Raises ValueError if that fails."""
    try:
        return tiktoken.get_encoding(name)
    except Exception as e:  # tiktoken documents no exceptions
        raise ValueError(
            f"tiktoken could not load {name!r} ({type(e).__name__}): connect to the network, set "
            "TIKTOKEN_CACHE_DIR to a folder that holds it, or prepare the text with --tokenizer=bpe"
        ) from e


# ---- Model --------------------------------------------------------------------------------------
def training_only(default):
    """Declare a field of GPTConfig that affects training only, not the resulting model."""
    return field(default=default, metadata={"training_only": True})


@dataclass
class GPTConfig:
    """The shape of a model. GPT-2 has bias=True, n_kv_head=n_head and every use_ field False."""

    # A field that shares its name with a setting defaults to what the setting is in a run without
    # flags and without max_minutes.
    block_size: int = UNFITTED["block_size"]
    vocab_size: int = 8192
    n_layer: int = UNFITTED["n_layer"]
    n_head: int = UNFITTED["n_head"]
    n_kv_head: int = UNFITTED["n_kv_head"]
    n_embd: int = UNFITTED["n_embd"]
    mlp_ratio: float = mlp_ratio
    dropout: float = training_only(UNFITTED["dropout"])
    train_temperature: float = training_only(UNFITTED["train_temperature"])
    bias: bool = bias
    use_rope: bool = use_rope
    use_rms_norm: bool = use_rms_norm
    use_swiglu: bool = use_swiglu
    qk_norm: bool = qk_norm
    tie_weights: bool = tie_weights
    gradient_checkpointing: bool = training_only(gradient_checkpointing)
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # keyword arguments of slow_down, for Llama 3.1 and later
    norm_eps: float = 1e-5
    head_dim: int | None = None  # None: n_embd / n_head
    mlp_hidden: int | None = None  # None: from mlp_ratio; for SwiGLU, a multiple of 32
    qk_norm_weights: bool = False  # with qk_norm: its norms have weights, as Qwen3's do

    def __post_init__(self):
        for name, declared in self.__dataclass_fields__.items():
            kinds = (int, float) if declared.type is float else declared.type
            if not isinstance(getattr(self, name), kinds):
                raise ValueError(f"{name} is {getattr(self, name)!r}, which has the wrong type")
        for name in ("n_layer", "n_head", "n_kv_head", "n_embd", "block_size", "vocab_size"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value < 2**31:
                raise ValueError(f"{name} is {value!r}: it must be an integer from 1 to 2**31 - 1")
        if self.n_head % self.n_kv_head:
            n_head, n_kv_head = self.n_head, self.n_kv_head
            raise ValueError(f"n_head ({n_head}) must be a multiple of n_kv_head ({n_kv_head})")
        if self.head_dim is None:
            if self.n_embd % self.n_head:
                n_embd, n_head = self.n_embd, self.n_head
                raise ValueError(f"n_embd ({n_embd}) must be a multiple of n_head ({n_head})")
            self.head_dim = self.n_embd // self.n_head
        if self.mlp_hidden is None:
            width = self.mlp_ratio * self.n_embd
            self.mlp_hidden = 32 * round(width * 2 / 3 / 32) if self.use_swiglu else round(width)
        self.check_ranges()

    def check_ranges(self):
        if self.head_dim < 1 or (self.use_rope and self.head_dim % 2):
            raise ValueError(
                f"head_dim (n_embd / n_head) is {self.head_dim}: it must be above 0 and, for "
                "rotary positions, even"
            )
        if not 1 <= self.mlp_hidden < 2**31:
            raise ValueError(
                f"mlp_hidden is {self.mlp_hidden} (mlp_ratio {self.mlp_ratio}): it must be at "
                "least 1 and below 2**31"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}: it must be at least 0 and below 1")
        if not 0 < self.train_temperature < math.inf:
            raise ValueError(f"train_temperature is {self.train_temperature}: it must be above 0")

    def flops_per_token(self):
        """Return the FLOPs of a training step per token (arXiv:2204.02311, appendix B).

        Each weight of a matrix product takes 6, and attention takes 12 per layer, channel and
        position. Norms, biases and the lookup of embeddings are not counted.
        """
        channels = self.n_head * self.head_dim
        attention = self.n_embd * 2 * (channels + self.n_kv_head * self.head_dim)
        mlp = self.n_embd * self.mlp_hidden * (3 if self.use_swiglu else 2)
        weights = self.n_layer * (attention + mlp) + self.vocab_size * self.n_embd
        return 6 * weights + 12 * self.n_layer * channels * self.block_size


TRAINING_ONLY = tuple(f.name for f in fields(GPTConfig) if "training_only" in f.metadata)


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm (arXiv:1910.07467) with its weight in x's dtype, as the fused kernel needs it."""

    def forward(self, x):
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps).to(x.dtype)


def make_norm(config):
    if config.use_rms_norm:
        return RMSNorm(config.n_embd, config.norm_eps)
    return nn.LayerNorm(config.n_embd, config.norm_eps, bias=config.bias)


class ChannelDropout(nn.Dropout1d):
    """Drop whole channels of x (B, T, C), the same ones at each position (arXiv:1512.05287)."""

    def forward(self, x):
        return super().forward(x.mT).mT


def rotary_table(config):
    """Return the cos and sin of every position's angles, (2, block_size, head_dim / 2) float32.

    Components i and i + head_dim / 2 of a head turn together, by position * rope_theta ** (-2 i /
    head_dim) radians (arXiv:2104.09864, in Hugging Face's layout).
    """
    exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    speeds = config.rope_theta**-exponents  # radians per position
    if config.rope_scaling:
        speeds = slow_down(speeds, **config.rope_scaling)
    angles = torch.outer(torch.arange(config.block_size), speeds)
    return torch.stack((angles.cos(), angles.sin()))


def slow_down(speeds, factor, low_freq_factor, high_freq_factor, original_max_position_embeddings):
    """Return the rotary speeds that suit a context longer than the original (arXiv:2407.21783).

    Components that turn rarely within the original context are slowed down by `factor`, those that
    turn often keep their speed, and those in between are interpolated.
    """
    turns = original_max_position_embeddings * speeds / (2 * math.pi)
    kept = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
    return torch.lerp(speeds / factor, speeds, kept.clamp(0, 1))


def rotate(x, rotary):
    """Turn x (B, T, heads, d) by the angles of its positions: rotary (2, B or 1, T, 1, d / 2)."""
    cos, sin = rotary
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def attend(q, k, v, mask=None):
    """Return softmax(q @ k.mT / sqrt(d) + mask) @ v, using the fastest kernel for the hardware.

    q: (B, n_head, T, d). k, v: (B, n_kv_head, S, d), of which each head serves n_head / n_kv_head
        neighboring query heads (arXiv:2305.13245).
    mask: (B or 1, n_head or 1, T or 1, S); bool, True where a query may look, or float, added to
        the scores. None means causal, with S = T.
    Returns (B, n_head, T, d).
    """
    B, n_head, T, d = q.shape
    n_kv_head = k.size(1)
    groups = n_head // n_kv_head
    if mask is None and q.dtype == torch.bfloat16 and q.device.type in ("cpu", "mps"):
        return attend_by_chunks(q, k, v)
    if mask is not None and mask.is_floating_point():
        mask = mask.to(q.dtype)
    if groups > 1 and kernels_know_groups(q, mask):
        causal = mask is None
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True)
    if groups > 1 and mask is None:
        k = k.repeat_interleave(groups, dim=1)
        v = v.repeat_interleave(groups, dim=1)
    elif groups > 1:  # the heads of a group become rows, so that keys and values need no copy
        q = q.reshape(B, n_kv_head, groups * T, d)
        # A mask that all heads share is expanded to one group's heads.
        heads = max(groups, mask.size(1))
        mask = mask.expand(-1, heads, T, -1).reshape(len(mask), -1, groups * T, k.size(2))
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
    return y.reshape(B, n_head, T, d)


def kernels_know_groups(q, mask):
    """Return whether a fast CUDA kernel lets a group of query heads share a key/value head.

    Without a mask, flash attention does so from Ampere on. With a mask and a single query, cuDNN
    does so on Hopper from CUDA 13 on.
    """
    if not q.is_cuda or q.dtype == torch.float32:
        return False
    major, _ = torch.cuda.get_device_capability(q.device)
    if mask is None:
        return major >= 8
    return q.size(2) == 1 and major == 9 and (torch.version.cuda or "") >= "13"


def attend_by_chunks(q, k, v, size=128):
    """Return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).

    In bfloat16, torch's kernel is slower than this on a CPU, and on MPS it attends to later tokens
    (pytorch issue 195910). Each chunk of `size` queries uses only the keys up to its last query.
    """
    B, n_head, T, d = q.shape
    groups = n_head // k.size(1)
    k = k.reshape(-1, T, d)
    v = v.reshape(-1, T, d)
    chunks = []
    for start in range(0, T, size):
        end = min(start + size, T)
        future = q.new_full((end - start, end), -torch.inf).triu(1 + start).repeat(groups, 1)
        rows = q[:, :, start:end].reshape(len(k), -1, d)  # the heads of a group become rows
        scores = torch.baddbmm(future, rows, k[:, :end].mT, alpha=d**-0.5)
        chunks.append((scores.softmax(-1) @ v[:, :end]).view(B, n_head, end - start, d))
    return torch.cat(chunks, dim=2)


class KVCache:
    """The keys and values of every layer, allocated once.

    pos (B,) counts the tokens in each row. GPT.forward appends T tokens to every row and advances
    pos; lowering pos[b] forgets the last tokens of row b.
    """

    def __init__(self, config, batch_size, device="cpu", dtype=torch.float32):
        shape = (batch_size, config.n_kv_head, config.block_size, config.head_dim)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.v = [torch.zeros_like(k) for k in self.k]
        self.pos = torch.zeros(batch_size, device=device, dtype=torch.long)

    def update(self, layer, k, v, positions):
        """Store k, v (B, n_kv_head, T, head_dim) at positions (B, T); return the layer's k, v."""
        where = positions[:, None, :, None].expand(k.shape)
        self.k[layer].scatter_(2, where, k.to(self.k[layer].dtype))
        self.v[layer].scatter_(2, where, v.to(self.v[layer].dtype))
        return self.k[layer], self.v[layer]


class WeightedQKNorm(nn.Module):
    """RMSNorm of queries and keys, with one weight for all queries and one for all keys."""

    def __init__(self, config):
        super().__init__()
        self.n_heads = (config.n_head, config.n_kv_head)
        self.q = RMSNorm(config.head_dim, config.norm_eps)
        self.k = RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, qk):
        q, k = qk.split(self.n_heads, dim=2)
        return torch.cat((self.q(q), self.k(k)), dim=2)


class CausalSelfAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.n_kv_head = config.n_kv_head
        self.head_dim = config.head_dim
        heads = (config.n_head, config.n_kv_head, config.n_kv_head)
        # How many of c_attn's rows belong to q, k and v.
        self.parts = [n * config.head_dim for n in heads]
        self.c_attn = nn.Linear(config.n_embd, sum(self.parts), bias=config.bias)
        self.c_proj = nn.Linear(config.n_head * config.head_dim, config.n_embd, bias=config.bias)
        self.qk_norm = nn.Identity()
        if config.qk_norm and config.qk_norm_weights:
            self.qk_norm = WeightedQKNorm(config)
        elif config.qk_norm:
            self.qk_norm = RMSNorm(config.head_dim, config.norm_eps, elementwise_affine=False)

    def project(self, x, rotary):
        """Return q, k, v (B, heads, T, head_dim) of x; q and k are normalized and rotated."""
        B, T, _ = x.shape
        heads = self.c_attn(x).view(B, T, -1, self.head_dim)
        qk, v = heads.split((self.n_head + self.n_kv_head, self.n_kv_head), dim=2)
        qk = self.qk_norm(qk)
        if rotary is not None:
            qk = rotate(qk, rotary)
        q, k = qk.split((self.n_head, self.n_kv_head), dim=2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x, positions, rotary, mask, cache):
        q, k, v = self.project(x, rotary)
        if cache is not None:
            k, v = cache.update(self.layer, k, v, positions)  # (B, n_kv_head, block_size, head_dim)
        y = attend(q.to(k.dtype), k, v, mask)
        y = y.transpose(1, 2).flatten(2)  # (B, T, n_head * head_dim)
        return self.c_proj(y.to(x.dtype))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.use_swiglu = config.use_swiglu
        self.parts = [config.mlp_hidden]  # how many of c_fc's rows belong to its one matrix
        if config.use_swiglu:  # or to gate and up
            self.parts = [config.mlp_hidden, config.mlp_hidden]
        self.c_fc = nn.Linear(config.n_embd, sum(self.parts), bias=config.bias)
        self.c_proj = nn.Linear(config.mlp_hidden, config.n_embd, bias=config.bias)

    def forward(self, x):
        hidden = self.c_fc(x)
        if self.use_swiglu:  # arXiv:2002.05202
            gate, up = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * up
        else:
            hidden = F.gelu(hidden, approximate="tanh")
        return self.c_proj(hidden)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)
        self.drop = ChannelDropout(config.dropout)

    def forward(self, x, positions, rotary, mask, cache):
        x = x + self.drop(self.attn(self.ln_1(x), positions, rotary, mask, cache))
        x = x + self.drop(self.mlp(self.ln_2(x)))
        return x


class GPT(nn.Module):
    """A decoder-only transformer: embedding, blocks on one residual stream, norm, output head."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = None if config.use_rope else nn.Embedding(config.block_size, config.n_embd)
        self.drop = ChannelDropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = make_norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.wte.weight
        rotary = rotary_table(config) if config.use_rope else None
        self.register_buffer("rotary", rotary, persistent=False)
        self.base = ""  # the checkpoint that this model was finetuned from
        self.init_weights()

    def init_weights(self):
        """Draw weights from normal distributions with these standard deviations; set biases to 0:

                                  untied head                  tied head, as in GPT-2
        linear layers             1 / sqrt(columns)            0.02
        attn.c_proj, mlp.c_proj   0                            0.02 / sqrt(2 n_layer)
        embeddings                0.3                          0.01
        output head               0                            is the embedding
        """
        tied = self.config.tie_weights
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02 if tied else module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        proj_std = 0.02 / math.sqrt(2 * self.config.n_layer) if tied else 0.0
        for block in self.h:
            nn.init.normal_(block.attn.c_proj.weight, std=proj_std)
            nn.init.normal_(block.mlp.c_proj.weight, std=proj_std)
        # The head precedes the embedding, because they may share a matrix.
        nn.init.zeros_(self.lm_head.weight)
        for embedding in (self.wte, self.wpe):
            if embedding is not None:
                nn.init.normal_(embedding.weight, std=0.01 if tied else 0.3)

    def forward(
        self,
        idx,
        targets=None,
        cache=None,
        weights=None,
        loss_only=False,
        at=None,
        blocks=None,
    ):
        """Return (logits, loss): logits (B, T, vocab_size), and the mean loss in nats or None.

        idx: (B, T) int64 ids. targets: (B, T) int64, the next ids; -1 is ignored.
        cache: a KVCache that holds the tokens before idx; idx is appended to it.
        weights: (B, T) float, how much each target counts; None: 1.
        loss_only: return None instead of the logits. This saves memory and, with targets, avoids
            computing them twice; see summed_loss.
        at: (B,) positions in idx; only their logits are computed, (B, 1, vocab_size).
        blocks: what to call instead of self.h, such as the compiled blocks.
        """
        T, block_size = idx.size(1), self.config.block_size
        assert T <= block_size, f"{T} tokens do not fit in block_size {block_size}"
        positions = torch.arange(T, device=idx.device)[None]
        if cache is not None:
            positions = positions + cache.pos[:, None]  # (B, T)
        x = self.wte(idx)  # (B, T, n_embd)
        if self.wpe is not None:
            x = x + self.wpe(positions)
        dtype = matmul_dtype(x)
        if dtype == torch.bfloat16:  # the residual stream too, for speed; float16 would overflow
            x = x.to(dtype)
        x = self.drop(x)
        rotary = None
        if self.rotary is not None:
            rotary = self.rotary[:, positions].unsqueeze(3).to(dtype)
        mask = self.attention_mask(positions, cache)
        for block in blocks or self.h:
            if self.config.gradient_checkpointing and self.training:
                x = torch.utils.checkpoint.checkpoint(
                    block, x, positions, rotary, mask, cache, use_reentrant=False
                )
            else:
                x = block(x, positions, rotary, mask, cache)
        if cache is not None:
            cache.pos += T

        if at is not None:
            x = x[torch.arange(len(x), device=x.device), at][:, None]
        x = self.ln_f(x).to(dtype)
        logits = None if loss_only else final_logits(self.lm_head(x), self.config)
        if targets is None:
            return logits, None
        weights = (targets >= 0) * (1.0 if weights is None else weights)
        x, targets, weights = x.flatten(0, 1), targets.flatten(), weights.flatten()
        head = self.lm_head.weight  # not lm_head itself, whose logits would exist all at once
        loss = summed_loss(x, head, targets, weights, self.config, self.training)
        return logits, loss / weights.sum().clamp(min=1e-6)

    def attention_mask(self, positions, cache):
        """Return what each query may look at, as attend's mask; None for plain causal attention.

        positions: (B or 1, T), those of the queries. The keys are at positions 0 to T - 1 or, with
        a cache, at 0 to block_size - 1; those after the query are later tokens or unused.
        """
        # The distances are computed even where no mask is needed, so that one can be added here.
        n_keys = positions.size(1) if cache is None else self.config.block_size
        keys = torch.arange(n_keys, device=positions.device)
        distances = positions[:, None, :, None] - keys  # (B or 1, 1, T, n_keys), from key to query
        if cache is None:
            return None  # the kernels know plain causal attention
        return distances >= 0

    def crop_block_size(self, block_size):
        """Shorten the context to block_size; learned positions beyond it are dropped."""
        assert block_size <= self.config.block_size
        self.config.block_size = block_size
        if self.rotary is not None:
            self.rotary = self.rotary[:, :block_size]
        if self.wpe is not None:
            self.wpe = nn.Embedding.from_pretrained(self.wpe.weight[:block_size], freeze=False)

    def n_params(self):
        """Return the number of parameters, counting a tied matrix once."""
        return sum(p.numel() for p in self.parameters())

    @torch.inference_mode()
    def generate(
        self,
        prompts,
        max_tokens,
        pick=None,
        forward=None,
        cuda_graphs=True,
        generator=None,
        **sampling,
    ):
        """Yield the next ids of all prompts, (B,) int64, max_tokens times.

        prompts: (B, T) int64 ids, or a list of B lists of ids of any lengths.
        pick: a function of logits (B, vocab_size), `generator` and `sampling` that replaces
            sample_next; it is never recorded, so it may run any code.
        forward: a compiled forward, used in the steps that take one id per row.
        cuda_graphs: whether these steps are recorded on a GPU; see Replay.
        generator: a torch.Generator on the model's device, from which the draws come.
        sampling: the other keywords of sample_next.
        Raises ValueError for an empty prompt. For texts longer than a block, see context_length.
        """
        if not all(len(prompt) for prompt in prompts):
            raise ValueError("a prompt is empty: give at least one token")
        device = self.ln_f.weight.device
        block_size = self.config.block_size
        dtype = torch.float32 if device.type == "cpu" else self.ln_f.weight.dtype
        cache = KVCache(self.config, len(prompts), device, dtype)
        texts = [torch.as_tensor(prompt, dtype=torch.long, device=device) for prompt in prompts]
        drawn = []  # the ids of each step, (B,)

        def next_logits(ids):
            logits, _ = (forward or self)(ids[:, None], cache=cache)
            return logits[:, -1]

        def next_ids(ids):
            return sample_next(next_logits(ids), generator=generator, **sampling)

        recorded_logits = Replay(next_logits, device, cuda_graphs)
        recorded_ids = Replay(next_ids, device, cuda_graphs, generator)
        for step in range(max_tokens):
            kept = [context_length(len(text) + step, block_size) for text in texts]
            kept_before = [context_length(len(text) + step - 1, block_size) for text in texts]
            # In the first step, and when a text has just lost its older half, the cache is filled.
            if step == 0 or any(now <= then for now, then in zip(kept, kept_before)):
                logits = self.prefill(last_tokens(texts, drawn[-block_size:], kept), cache)
                ids = (pick or sample_next)(logits, generator=generator, **sampling)
            elif pick:
                ids = pick(recorded_logits(drawn[-1]), generator=generator, **sampling)
            else:
                ids = recorded_ids(drawn[-1]).clone()  # the next call overwrites its result
            drawn.append(ids)
            yield ids

    def prefill(self, texts, cache):
        """Empty the cache and fill it with B texts; return the logits of their next tokens.

        The texts are padded on the right, where causal attention hides the padding from them.
        """
        lengths = torch.tensor([len(text) for text in texts], device=cache.pos.device)
        padded = nn.utils.rnn.pad_sequence(texts, batch_first=True)
        cache.pos.zero_()
        logits, _ = self(padded, cache=cache, at=lengths - 1)
        cache.pos.copy_(lengths)  # forgets the padding
        return logits[:, 0]


def matmul_dtype(x):
    """Return the dtype of matrix products with x: autocast's if it is on, else x's own."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


# ---- Loss ---------------------------------------------------------------------------------------
LOGITS_AT_ONCE = {"cpu": 2**25, "cuda": 2**27}  # 128 and 512 MiB in float32


def final_logits(logits, config):
    """Return the logits that the loss and sampling use, given the output of the head.

    They are the head's output in float32. Any change to the logits, such as a cap, belongs here.
    """
    return logits.float()


def loss_of_logits(logits, targets, weights, config, training):
    """Return the weighted sum of the targets' losses in nats, a float32 tensor.

    This is the only definition of the loss; training and evaluation both use it.

    logits: (N, vocab_size), the head's output. targets: (N,) int64, which may be -1 where the
    weight is 0. weights: (N,) float.
    """
    logits = final_logits(logits, config)
    if training and config.train_temperature != 1:
        logits = logits / config.train_temperature
    losses = F.cross_entropy(logits, targets.clamp(min=0), reduction="none")
    return (losses * weights).sum()


def summed_loss(x, head, targets, weights, config, training):
    """Return loss_of_logits for the logits of x, but compute many logits in parts to save memory.

    x: (N, n_embd), the normalized residual stream. head: (vocab_size, n_embd).
    """
    most = LOGITS_AT_ONCE.get(x.device.type, LOGITS_AT_ONCE["cpu"])
    n_parts = math.ceil(len(x) * len(head) / most)
    if torch.compiler.is_compiling():
        n_parts = min(n_parts, 8)  # each part is compiled by itself, which takes a second or two
    if n_parts > 1 and torch.is_grad_enabled():
        return LossByParts.apply(x, head, targets, weights, config, training, n_parts)
    matrix = matrix_for(x, head)
    loss = 0.0
    for x_part, y, w in zip(x.chunk(n_parts), targets.chunk(n_parts), weights.chunk(n_parts)):
        logits = F.linear(x_part, matrix)[:, : len(head)]
        loss = loss + loss_of_logits(logits, y, w, config, training)
    return loss


def matrix_for(x, head):
    """Return the head in x's dtype and, on a GPU, padded with rows of zeros to a multiple of 64.

    Tensor cores are fast for such multiples.
    """
    head = head.to(x.dtype)
    return F.pad(head, (0, 0, 0, -len(head) % 64)) if x.is_cuda else head


class LossByParts(torch.autograd.Function):
    """summed_loss in parts, whose gradients are already computed in the forward pass.

    The backward pass then only scales the gradients, so no logits need to be kept.
    """

    @staticmethod
    def forward(ctx, x, head, targets, weights, config, training, n_parts):
        gradient_and_loss = torch.func.grad_and_value(loss_of_logits)
        matrix = matrix_for(x, head)
        learns_head = ctx.needs_input_grad[1]
        grads_x = []
        # A long sum in bfloat16 would lose small terms, and one in float16 could overflow.
        exact = n_parts > 64 or x.dtype == torch.float16
        dtype = torch.float32 if exact else x.dtype
        grad_head = torch.zeros_like(matrix if learns_head else matrix[:0], dtype=dtype)
        loss = torch.zeros((), device=x.device)
        for x_part, y, w in zip(x.chunk(n_parts), targets.chunk(n_parts), weights.chunk(n_parts)):
            logits = F.linear(x_part, matrix)[:, : len(head)]
            grad, part_loss = gradient_and_loss(logits, y, w, config, training)
            loss = loss + part_loss
            grad = F.pad(grad, (0, len(matrix) - len(head)))
            grads_x.append(grad @ matrix)
            if learns_head and dtype == x.dtype:
                grad_head = torch.addmm(grad_head, grad.mT, x_part)
            elif learns_head:
                grad_head += grad.mT @ x_part
        ctx.save_for_backward(torch.cat(grads_x), grad_head[: len(head)].to(head.dtype))
        return loss

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError("a loss computed in parts has no second derivative: use one part")
        grad_x, grad_head = ctx.saved_tensors
        return grad_x * grad, grad_head * grad, None, None, None, None, None


# ---- Generation ---------------------------------------------------------------------------------
def sample_next(logits, temperature=0.8, top_k=200, top_p=0.9, min_p=0.0, generator=None):
    """Draw one id for each row of logits (B, vocab_size); return (B,) int64.

    top_k: draw from the k likeliest; 0: all. top_p: draw from the smallest set whose
    probabilities add up to at least this (arXiv:1904.09751). min_p: drop those below this share of
    the highest probability (arXiv:2407.01082). temperature: at 0, the likeliest is taken.
    """
    if temperature < 1e-6:
        return logits.argmax(-1)
    k = min(top_k or logits.size(-1), logits.size(-1))
    logits, ids = logits.topk(k)  # in descending order
    probs = (logits.float() / temperature).softmax(-1)
    before = probs.cumsum(-1) - probs
    probs = probs * (before < top_p) * (probs >= min_p * probs[:, :1])
    # The argmax of probs / noise is drawn from probs. Unlike multinomial, it never waits for a GPU.
    noise = torch.empty_like(probs).exponential_(generator=generator)
    return ids.gather(-1, (probs / noise).argmax(-1, keepdim=True))[:, 0]


def context_length(n, block_size):
    """Return how many of n tokens the model sees: all that fit, or the last half block or more.

    When the block is full, its older half is forgotten at once, so that the cache is refilled only
    once every half block.
    """
    if n <= block_size:
        return n
    return block_size // 2 + 1 + (n - block_size - 1) % math.ceil(block_size / 2)


def last_tokens(texts, drawn, kept):
    """Return the last kept[b] tokens of each text b, continued by the ids in `drawn`."""
    tails = []
    for b, (text, n) in enumerate(zip(texts, kept)):
        new = [step[b : b + 1] for step in drawn]
        tails.append(torch.cat([text, *new])[-n:])
    return tails


def to_device(tensor, device):
    """Return the tensor on a device, copied from pinned memory so that Python need not wait."""
    if device.type == "cuda" and tensor.is_cpu:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Replay:
    """A function of tensors that is recorded as a CUDA graph on its third call, and then replayed.

    A replay launches all kernels at once, so that none waits for Python. A call with other shapes
    starts over. The result is valid until the next call. Without a GPU the function is just called.
    """

    def __init__(self, function, device, enabled=True, generator=None):
        self.function = function
        self.device = device
        self.enabled = enabled and device.type == "cuda"
        self.generator = generator
        self.inputs = None  # the tensors from which the graph reads
        self.result = None  # the tensors to which it writes
        self.graph = None
        self.calls = 0

    def __call__(self, *inputs):
        if not self.enabled:
            return self.function(*inputs)
        inputs = [to_device(torch.as_tensor(t), self.device) for t in inputs]
        if self.inputs is None or [t.shape for t in inputs] != [t.shape for t in self.inputs]:
            self.inputs = [t.clone() for t in inputs]
            self.graph = torch.cuda.CUDAGraph()
            self.calls = 0
        for kept, new in zip(self.inputs, inputs):
            kept.copy_(new)
        self.calls += 1
        if self.calls < 3:  # the first calls set up and compile what cannot be recorded
            return self.function(*self.inputs)
        if self.calls == 3:
            if self.generator is not None:
                self.graph.register_generator_state(self.generator)
            # Calling .item() or printing a tensor in the function would break the recording.
            with torch.cuda.graph(self.graph, stream=torch.cuda.Stream(self.device)):
                self.result = self.function(*self.inputs)
        self.graph.replay()
        return self.result


# ---- Optimizers ---------------------------------------------------------------------------------
def orthogonalize(G, dtype=torch.float32):
    """Return, for each matrix of a batch, the nearest one whose singular values are all about 1.

    It takes five Newton-Schulz steps with a quintic whose coefficients favor speed over accuracy
    (kellerjordan.github.io/posts/muon): the singular values end between 0.7 and 1.2, which is
    enough for training.

    G: (n, rows, cols). dtype: that of the steps. Returns the same shape.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G.mT if G.size(1) > G.size(2) else G  # the products below are cheaper for wide matrices
    X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)
    X = X.to(dtype)
    for _ in range(5):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # b * A + c * A @ A
        X = torch.baddbmm(X, B, X, beta=a)  # a * X + B @ X
    return X.mT if G.size(1) > G.size(2) else X


def is_sharded(tensor):
    return hasattr(tensor, "full_tensor")  # FSDP's DTensors have it


def whole(tensor):
    """Return the whole of a tensor that FSDP has sharded, and any other tensor as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def share_of(tensor, like):
    """Return this process's share of a tensor if FSDP has sharded `like`, else the whole tensor."""
    if not is_sharded(like):
        return tensor
    from extras.fsdp import shard_like

    return shard_like(tensor, like)


def momentum_buffer(optimizer, p):
    """Return the tensor in which an optimizer keeps the running mean of p's gradient.

    It begins as zeros; the optimizer changes it in place.
    """
    state = optimizer.state[p]
    if "momentum_buffer" not in state:
        state["momentum_buffer"] = torch.zeros_like(p)
    return state["momentum_buffer"]


MUON_AT_ONCE = 2**26  # weights; an update takes some 16 bytes for each


class Muon(torch.optim.Optimizer):
    """Momentum whose updates are orthogonalized, for the weight matrices inside the blocks.

    A gradient matrix is dominated by a few strong directions. Muon replaces it by the nearest
    matrix that treats all directions alike, so weak but useful ones learn just as fast. Do not use
    it for the embedding or the head, whose rows belong to single tokens, or for norms and biases.
    Source: kellerjordan.github.io/posts/muon.

    param_groups: dicts with "params", matrices of one shape, which are orthogonalized as one batch,
        and "parts", the row counts of the matrices fused in each of them.
    lr: the spectral norm of an update, before the factor for tall matrices.
    momentum: decay of the gradient's running mean (Nesterov's form).
    weight_decay: decoupled, per unit of lr. dtype: that of the Newton-Schulz steps.
    """

    def __init__(self, param_groups, lr, momentum, weight_decay=0.0, dtype=torch.float32):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(param_groups, defaults)
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = group["params"]
            n = max(1, MUON_AT_ONCE // params[0].numel())
            for start in range(0, len(params), n):
                self.update(params[start : start + n], group)

    def update(self, params, group):
        """Update matrices of one shape together."""
        grads = [p.grad for p in params]
        means = [momentum_buffer(self, p) for p in params]
        torch._foreach_lerp_(means, grads, 1 - group["momentum"])
        nesterov = [grad.lerp(mean, group["momentum"]) for grad, mean in zip(grads, means)]
        updates = torch.stack([whole(update) for update in nesterov])  # (n, rows, cols)

        parts = []
        for part in updates.split(group["parts"], dim=1):
            rows, cols = part.shape[-2:]
            scale = max(1, rows / cols) ** 0.5  # a tall matrix needs larger steps
            parts.append(orthogonalize(part, self.dtype) * scale)
        updates = torch.cat(parts, dim=1).float().unbind()
        updates = [share_of(update, p) for update, p in zip(updates, params)]
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_mul_(updates, -group["lr"])
        torch._foreach_add_(params, updates)


def make_optimizers(model, settings, machine):
    """Return the optimizers, which together hold every trainable parameter once.

    Each of their groups holds its peak learning rate as "initial_lr"; see set_learning_rates. On a
    GPU the learning rate is a tensor, which an optimizer must not turn into a number.
    """
    decay = settings.weight_decay
    optimizers = []
    if settings.optimizer == "muon":
        groups = block_matrices(model, settings.muon_lr)
        slow = machine.dtype == torch.bfloat16 and not native_bfloat16(machine.device)
        dtype = torch.float32 if slow else machine.dtype
        rate = as_rate(settings.muon_lr, machine)
        optimizers.append(Muon(groups, rate, settings.muon_momentum, decay, dtype))

    # AdamW takes all parameters that are not taken yet.
    taken = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    lr = settings.learning_rate
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": decay, "initial_lr": lr},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0, "initial_lr": lr},
    ]
    betas = (settings.beta1, settings.beta2)
    on_gpu = machine.device.type == "cuda"
    adamw = torch.optim.AdamW(groups, as_rate(lr, machine), betas, capturable=on_gpu, fused=True)
    return [adamw, *optimizers]  # in the order in which checkpoints hold their states


def block_matrices(model, lr):
    """Return the blocks' weight matrices as groups for an optimizer, one group for each kind.

    "parts" are the row counts of the matrices fused in each one, such as q, k and v.
    """
    attn, mlp = model.h[0].attn, model.h[0].mlp
    n_embd = model.config.n_embd
    parts_of = {
        "attn.c_attn": attn.parts,
        "attn.c_proj": [n_embd],
        "mlp.c_fc": mlp.parts,
        "mlp.c_proj": [n_embd],
    }
    groups = []
    for name, parts in parts_of.items():
        params = [block.get_parameter(f"{name}.weight") for block in model.h]
        groups.append({"params": params, "parts": parts, "initial_lr": lr})
    return groups


def as_rate(lr, machine):
    """Return lr as a number or, on a GPU, as a tensor, which a recorded step reads at each replay.

    set_learning_rates overwrites it before each step.
    """
    return torch.tensor(lr, device=machine.device) if machine.device.type == "cuda" else lr


def set_learning_rates(optimizers, scale):
    """Set every group's learning rate to `scale` times its peak."""
    for o in optimizers:
        for group in o.param_groups:
            lr = group["initial_lr"] * scale
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr


def lr_scale(step, share_done, settings):
    """Return the factor for the peak learning rates in the update after the first `step` updates.

    share_done: the share of the schedule that is done, from 0 to 1.
    """
    warm = min(1, (step + 1) / (settings.warmup_iters + 1))
    shapes = {
        "cosine": 0.5 + 0.5 * math.cos(math.pi * share_done),
        "linear": 1 - share_done,
        "wsd": min(1, 5 * (1 - share_done)),
        "constant": 1,
    }
    lowest = settings.min_lr / settings.learning_rate
    return warm * (lowest + (1 - lowest) * shapes[settings.lr_schedule])


# ---- Data: data/<name>/{train.bin, val.bin, meta.json} ------------------------------------------
MADE_HERE = ("shakespeare", "pydoc")  # the data sets that this file can prepare itself
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_URLS = [
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "https://cdn.jsdelivr.net/gh/karpathy/char-rnn@master/data/tinyshakespeare/input.txt",
]


def load_corpus(name):
    """Return (text, source) of one of MADE_HERE. Raises ConnectionError without a network."""
    if name == "pydoc":  # half a megabyte of English documentation that comes with CPython
        from pydoc_data.topics import topics

        paragraphs = [topics[key].strip() for key in sorted(topics)]
        return "\n\n".join(paragraphs) + "\n", "Python's pydoc_data.topics"
    for url in SHAKESPEARE_URLS:
        try:
            content = urllib.request.urlopen(url, timeout=15).read()
        except Exception as e:  # networks fail in many ways
            problem = e
            continue
        if hashlib.sha256(content).hexdigest() == SHAKESPEARE_SHA256:
            return content.decode(), "tiny Shakespeare"
        problem = "its sha256 is wrong"
    raise ConnectionError(
        f"{url} could not be downloaded ({problem}): to use a copy of your own, run python "
        "prepare.py shakespeare --input=FILE"
    )


def write_dataset(folder, text, tokenizer, source, val_fraction=0.1):
    """Write a text as a data set, its last val_fraction held out; return its meta, a dict.

    folder: receives train.bin and val.bin, which hold little-endian ids, and meta.json. source:
    says where the text comes from.
    """
    folder = as_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for old in (folder / "meta.json", *folder.glob("*.bin")):
        old.unlink(missing_ok=True)  # a run that has them open keeps the old ones
    cut = int(len(text) * (1 - val_fraction))
    meta = {
        "source": source,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "dtype": "uint16" if tokenizer.vocab_size <= 2**16 else "uint32",
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": tokenizer.state,
    }
    for split, part in (("train", text[:cut]), ("val", text[cut:])):
        ids = np.array(tokenizer.encode(part), np.dtype(meta["dtype"]).newbyteorder("<"))
        ids.tofile(folder / f"{split}.bin")
        meta[f"{split}_tokens"] = len(ids)
        meta[f"{split}_bytes"] = len(part.encode())
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
    return meta


def prepare_if_missing(name, root):
    """Return the data set's folder, first preparing it if it is missing and in MADE_HERE.

    Without a network, pydoc takes the place of shakespeare, and a message says so.
    """
    folder = root / name
    if name not in MADE_HERE or (folder / "meta.json").exists():
        return folder
    try:
        text, source = load_corpus(name)
    except ConnectionError as e:
        print(f"{e}; training on pydoc, Python's own documentation, instead")
        return prepare_if_missing("pydoc", root)
    try:
        write_dataset(folder, text, Tokenizer("char", "".join(sorted(set(text)))), source)
    except OSError as e:
        raise OSError(f"cannot write to {folder} ({e.strerror}): choose another --data_dir") from e
    return folder


class TokenFile:
    """The numbers in a file, indexed like an array; only those that are read take up memory."""

    def __init__(self, path, dtype):
        try:
            self.file = open(path, "rb")  # stays readable if the data set is prepared again
        except FileNotFoundError as e:
            raise ValueError(f"{path} is missing: prepare the data set again") from e
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.length = os.fstat(self.file.fileno()).st_size // self.dtype.itemsize

    def __len__(self):
        return self.length

    def __getitem__(self, where):
        """Return the numbers at positions or in a slice. Raises OSError if the file has shrunk."""
        try:  # mapped again each time, because the pages that a mapping has read would add up
            return np.array(np.memmap(self.file, self.dtype, "r")[where])
        except (IndexError, ValueError) as e:
            raise OSError(f"{self.file.name} has shrunk: prepare the data set again") from e


def read_meta(folder):
    """Return (meta, tokenizer) of a data set. Raises FileNotFoundError and ValueError."""
    path = folder / "meta.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{folder} holds no data set: make one from your text with python prepare.py "
            f"--input=FILE --name={folder.name}"
        )
    try:
        meta = json.loads(path.read_bytes())
        counts = [meta[key] for key in ("vocab_size", "train_tokens", "val_tokens", "val_bytes")]
        if not all(type(n) is int and n >= 0 for n in counts):
            raise ValueError(f"the counts are {counts}")
        if meta["dtype"] not in ("uint16", "uint32"):
            raise ValueError(f"dtype is {meta['dtype']}")
        state = {"kind": meta["tokenizer"]["kind"]} | meta["tokenizer"]
        meta["sha256"] = str(meta["sha256"])
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{path} is damaged ({shortened(e)}): prepare the data set again") from e
    try:
        return meta, Tokenizer(**state)
    except TypeError as e:  # a name that Tokenizer does not know
        raise ValueError(f"{path} is damaged ({e}): prepare the data set again") from e


class Data:
    """A data set whose batches depend only on the seed and on how many rows came before.

    A row is block_size tokens and the one that follows them. Without weights, rows follow each
    other through the text. With weights, as in data sets of prompts and responses, each row holds
    one example or part of one, and rows that hold no target are left out.

    Any row may be asked for at any time. Training takes each row once, in order, but reads the next
    step's rows ahead, and uses row 0 for a trial before the first step.

    Raises FileNotFoundError if there is no data set, and ValueError if it is damaged or too short.
    """

    def __init__(self, folder, block_size, seed=1337, splits=("train", "val")):
        self.folder = as_path(folder)
        self.block_size = block_size
        self.seed = seed
        self.meta, self.tokenizer = read_meta(self.folder)
        self.weighted = any(self.folder.glob("*.weight.bin"))
        self.tokens = {}
        self.weights = {}
        self.starts = {}  # where the rows of a split begin
        self.n_empty = 0  # rows left out
        self.orders = {}  # offset and order of the rows, in this epoch and the one before
        for split in splits:
            self.open_split(split)

    def open_split(self, split):
        n = self.meta[f"{split}_tokens"]
        for name in (split, f"{split}.weight"):
            if (self.folder / f"{name}_0000.bin").exists():
                raise ValueError(
                    f"{self.folder} holds shards, written by a version before 2.0.0: join them "
                    f"with cd {shlex.quote(str(self.folder))} && cat {name}_*.bin > {name}.bin "
                    f"&& rm {name}_*.bin"
                )
        files = {split: TokenFile(self.folder / f"{split}.bin", self.meta["dtype"])}
        if self.weighted:
            files["weight"] = TokenFile(self.folder / f"{split}.weight.bin", "uint8")
        for file in files.values():
            if len(file) != n:
                raise ValueError(
                    f"{self.folder} holds {len(file)} tokens for {split}, not {n}: prepare it again"
                )
        self.tokens[split] = files[split]
        self.weights[split] = files.get("weight")
        if self.weighted:
            starts = self.example_rows(split)
        elif split == "val":
            starts = range(0, n - 1, self.block_size)
        else:  # the room left at the end lets each epoch begin at a different offset
            end = n - 2 * self.block_size
            if end < 1 and n > self.block_size:
                end = 1  # the only row
            starts = range(0, end, self.block_size)
        if not starts:
            raise ValueError(
                f"{self.folder} holds {n} tokens for {split}, {self.why_no_row(split)}"
            )
        self.starts[split] = starts

    def why_no_row(self, split):
        """Return why a split has no row, and the remedy."""
        if self.weighted:
            return "but no example whose answer counts: prepare it from other examples"
        if split == "val":
            return "too few for a loss: prepare it with a larger --val_fraction or from more text"
        return f"too few for block_size {self.block_size}: add text or lower block_size"

    def example_rows(self, split):
        """Return the starts of the rows that hold a target; count the others in n_empty.

        A row may reach beyond its example; get_batch gives the tokens there weight 0.
        """
        weights = self.weights[split][:]
        sums = np.concatenate(([0], np.cumsum(weights, dtype=np.int64)))
        starts = []
        begin = 0
        for end in np.flatnonzero(self.ends_example(self.tokens[split][:], weights)) + 1:
            for start in range(begin, end - 1, self.block_size):
                last = min(start + self.block_size, end - 1)  # position of the row's last target
                if sums[last + 1] > sums[start + 1]:
                    starts.append(start)
                else:
                    self.n_empty += 1
            begin = end
        return starts

    def ends_example(self, ids, weights):
        """Return whether each id ends an example; a turn's end within a prompt has weight 0."""
        ends = ids == self.tokenizer.end_id
        return ends & (weights > 0) if self.tokenizer.ends_turns else ends

    def row_start(self, split, row):
        """Return where a row begins.

        "train" is shuffled anew in each epoch. "val" is read in order, and a row past its last one
        is empty, because it begins at the end of the tokens.
        """
        starts = self.starts[split]
        n_tokens = len(self.tokens[split])
        if split == "val":
            return starts[row] if row < len(starts) else n_tokens
        epoch, i = divmod(row, len(starts))
        if epoch not in self.orders:
            rng = np.random.default_rng((self.seed, epoch))
            n_offsets = 1 if self.weighted else n_tokens - len(starts) * self.block_size
            offset = int(rng.integers(n_offsets))
            order = rng.permutation(np.arange(len(starts), dtype=np.uint32))
            before = {e: known for e, known in self.orders.items() if e == epoch - 1}
            self.orders = before | {epoch: (offset, order)}
        offset, order = self.orders[epoch]
        return starts[order[i]] + offset

    def get_batch(self, split, first_row, n_rows):
        """Return inputs and targets (n_rows, block_size) int64, and the targets' weights, float32.

        Targets past the end of the split or of an example have weight 0.
        """
        tokens = self.tokens[split]
        starts = [self.row_start(split, row) for row in range(first_row, first_row + n_rows)]
        positions = np.array(starts)[:, None] + np.arange(self.block_size + 1)
        inside = positions < len(tokens)
        positions = np.minimum(positions, len(tokens) - 1)
        ids = np.where(inside, tokens[positions], np.int64(-1))
        if ids.max() >= self.meta["vocab_size"]:
            raise ValueError(
                f"{self.folder} holds id {ids.max()}, but its vocabulary has only "
                f"{self.meta['vocab_size']} ids: prepare it again"
            )
        x = ids[:, :-1].clip(min=0)
        y = ids[:, 1:].copy()
        w = inside[:, 1:].astype(np.float32)
        if self.weighted:
            weights = self.weights[split][positions]
            example_ended = self.ends_example(x, weights[:, :-1]).cumsum(1) > 0
            w *= ~example_ended * weights[:, 1:] / np.float32(255)
        return torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(w)

    def n_rows(self, split):
        """Return how many rows a split has; for "train", per epoch."""
        return len(self.starts[split])

    def n_val_batches(self, batch_size):
        return math.ceil(self.n_rows("val") / batch_size)


# ---- Checkpoints: ckpt.pt resumes a run, best.pt is for inference -------------------------------
def save_checkpoint(path, state):
    """Write a dict to path atomically. Raises OSError, leaving the previous file as it was."""
    path = as_path(path)
    part = path.with_suffix(f".{os.getpid()}.tmp")  # claim_folder removes those of killed runs
    try:
        torch.save(state, part)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        for _ in range(50):  # on Windows, a file that is being read cannot be replaced
            with contextlib.suppress(PermissionError):
                part.replace(path)
                return
            time.sleep(0.1)
        part.replace(path)
    except (OSError, RuntimeError) as e:  # torch turns a failed write into a RuntimeError
        part.unlink(missing_ok=True)
        if not path.parent.is_dir():
            raise OSError(f"{path} could not be saved: its folder has been removed") from e
        free = shutil.disk_usage(path.parent).free / 2**20
        raise OSError(
            f"{path} could not be saved ({shortened(e)}; {free:,.0f} MiB free there); the "
            "previous file is untouched"
        ) from e


def read_checkpoint(path):
    """Return the dict that save_checkpoint wrote. path: the file, or a folder that holds best.pt.

    Raises FileNotFoundError, and ValueError for a file that is damaged or not a checkpoint.
    """
    path = as_path(path)
    if path.is_dir():
        path = path / "best.pt"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: name a checkpoint, or train a model first")
    try:
        archive = zipfile.ZipFile(path)
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise zipfile.BadZipFile("it is compressed")  # a small file could fill the memory
        broken = archive.testzip()  # torch itself does not verify the checksums
        if broken:
            raise zipfile.BadZipFile(f"checksum of {broken}")
        # With mmap, the processes of one computer share the memory that the file takes; on Windows
        # it would keep the file from being replaced.
        mmap = sys.platform != "win32"
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as e:  # torch raises half a dozen types of error
        if out_of_memory(e):
            raise
        raise ValueError(
            f"{path} is damaged or not a checkpoint ({type(e).__name__}): use another one"
        ) from e
    check_state(path, state)
    return {"base": "", "lora_rank": 0} | state


def check_state(path, state):
    """Raise ValueError unless a checkpoint is one of this program and holds the right types."""
    for key in ("model", "model_args", "tokenizer"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            continue
        remedy = "name another one"
        if isinstance(state, dict) and {"iter_num", "model_args"} <= state.keys():
            remedy = f"it is from nanoGPT; python hub.py get {path} reads it"
        raise ValueError(f"{path} is not a checkpoint of gpt.py (no {key}): {remedy}")
    types = {"base": str, "lora_rank": int, "step": int, "best_val_loss": float, "config": dict}
    for key in types.keys() & state.keys():
        if type(state[key]) is not types[key]:
            raise ValueError(f"{path} is damaged ({key} is {str(state[key])[:60]!r}): use another")
    if state.get("lora_rank") and "wte.weight" not in state["model"]:
        raise ValueError(
            f"{path} holds only LoRA matrices, written by a version before 2.0.0: add the other "
            f"weights with python hub.py merge {path}"
        )


# What torch, CUDA and C++ say when a GPU or the computer has no memory left
NO_MEMORY = ("out of memory", "allocate memory", "not enough memory", "ALLOC_FAILED", "bad_alloc")


def out_of_memory(error):
    """Return whether an error means that a GPU or the computer has no memory left."""
    if isinstance(error, RuntimeError | OSError):
        return any(words in str(error) for words in NO_MEMORY)
    return isinstance(error, MemoryError)


def load_checkpoint(path, device="cpu", **changes):
    """Return (model, tokenizer, checkpoint); the model is in evaluation mode, on the device.

    changes: fields of GPTConfig that affect no weight's shape, such as dropout. LoRA is merged.
    Raises as read_checkpoint does, and ValueError if the checkpoint does not fit this GPT.
    """
    state = read_checkpoint(path)
    try:
        model = GPT(GPTConfig(**state["model_args"] | changes))
        tokenizer = Tokenizer(**state["tokenizer"])
        load_weights(model, state)
    except (ArithmeticError, AttributeError, KeyError, RuntimeError, TypeError) as e:
        if out_of_memory(e):
            raise
        made_by = state.get("version", "before 2.0.0")
        raise ValueError(
            f"{path} does not fit this GPT ({shortened(e)}): it was made by gpt.py {made_by}, and "
            f"this is gpt.py {__version__}"
        ) from e
    if state["lora_rank"]:
        from extras.lora import merge_lora

        merge_lora(model)
    return model.eval().to(device), tokenizer, state


def load_weights(model, state):
    """Copy a checkpoint's weights, and LoRA's matrices if it has any, into a model."""
    if state["lora_rank"]:
        from extras.lora import add_lora

        add_lora(model, state["lora_rank"])
    model.load_state_dict(state["model"])


def shortened(error):
    """Return the first 200 characters of an error's message, as one line."""
    return " ".join(str(error).split())[:200]


# ---- Machine: what depends on the hardware or on the number of processes ------------------------
# Peak dense bfloat16 or float16 teraflops, from the makers' data sheets. The first name that occurs
# in the GPU's own name counts, so the longer names of a family come first.
PEAK_TFLOPS = {
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "A10G": 70,
    "V100": 125,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "T4": 65,
    "RTX 4090": 165,
    "RTX 3090": 71,
    "A6000": 155,
}


@dataclass
class Machine:
    """Where a run computes: its device, and its place among the processes of torchrun."""

    device: torch.device
    dtype: torch.dtype  # of matrix products; the weights stay float32
    rank: int = 0
    world_size: int = 1
    fsdp: bool = False  # whether the processes shard the model instead of each holding a copy
    threads: object = None  # a ThreadCount, if one process on a CPU trains for max_minutes
    stop_signals: list = field(default_factory=list)  # those received so far
    # What is closed or restored at the end of the run.
    at_end: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def name(self):
        kind = self.device.type
        if kind == "cuda":
            kind = torch.cuda.get_device_name(self.device)
        return f"{self.world_size} x {kind}"

    def say(self, text):
        """Print a text in the first process."""
        if self.rank > 0:
            return
        try:
            print(text, flush=True)
        except OSError as e:
            if e.errno != errno.EIO:  # EIO: the terminal was closed, and SIGHUP will end the run
                raise

    def autocast(self):
        """Return the context in which matrix products take the machine's dtype."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def mfu(self, flops_per_second):
        """Return the model FLOPs utilization, a share of the GPUs' peak; None if it is unknown."""
        for gpu, tflops in PEAK_TFLOPS.items():
            if re.search(rf"\b{gpu}\b", self.name()) and self.dtype != torch.float32:
                return flops_per_second / (tflops * 1e12 * self.world_size)
        return None

    def combine(self, values, how):
        """Return the "sum" or "max" of each number over all processes, as a list of floats."""
        values = [float(value) for value in values]
        if self.world_size == 1:
            return values
        together = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(together, dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX)
        return together.tolist()

    def mean(self, value):
        """Return the mean of a number over all processes."""
        return self.combine([value], "sum")[0] / self.world_size

    def from_first(self, function, *arguments):
        """Call a function in the first process; return its result in all of them."""
        if self.world_size == 1:
            return function(*arguments)
        result = [function(*arguments) if self.rank == 0 else None]
        dist.broadcast_object_list(result)
        return result[0]

    def must_stop(self):
        """Return whether a signal has asked any of the processes to stop."""
        return self.combine([bool(self.stop_signals)], "max")[0] > 0

    def leave(self):
        """Leave the process group at the end of the run."""
        if self.world_size > 1:
            import gc

            gc.collect()  # DDP's reference cycles hold threads that would abort the process
            dist.destroy_process_group()


def pick_device(name):
    """Return the torch.device named by the setting `device`. Raises ValueError if there is none."""
    device = name
    if name == "auto":
        found = torch.accelerator.is_available()
        device = torch.accelerator.current_accelerator().type if found else "cpu"
        if not found and torch.version.cuda is None and shutil.which("nvidia-smi"):
            say_once("this build of torch cannot use the NVIDIA GPU; pytorch.org has other builds")
    if device == "cuda" and launched_by_torchrun():
        device = f"cuda:{os.environ['LOCAL_RANK']}"  # one GPU for each process
    try:
        return torch.ones(1, device=device).add(1).device  # the sum shows that kernels exist
    except Exception as e:  # torch raises half a dozen types of error
        if name == "auto":  # a GPU may be too old for this build of torch
            say_once(f"{device} does not work here ({shortened(e)}): using the CPU")
            return torch.device("cpu")
        raise ValueError(
            f"device {name!r} is not available: use --device=auto or --device=cpu"
        ) from e


@functools.cache
def say_once(text):
    """Print a note to stderr, once per process, and only in the first of several processes."""
    if not launched_by_torchrun() or os.environ["RANK"] == "0":
        print(text, file=sys.stderr, flush=True)


def native_bfloat16(device):
    """Return whether the hardware itself multiplies bfloat16; a T4, for example, emulates it."""
    if device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def launched_by_torchrun():
    """Return whether torchrun started this process, which then has all of these variables."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return all(os.environ.get(name) for name in names)


def set_up_machine(settings):
    """Return the Machine for the settings and the hardware, connected to torchrun's processes.

    Raises ValueError for a device or dtype that is not available.
    """
    found = pick_device(settings.device)
    capability = (0, 0)
    if found.type == "cuda":
        torch.cuda.set_device(found)
        capability = torch.cuda.get_device_capability(found)
    best = "float16" if capability >= (7, 0) else "float32"
    if native_bfloat16(found):
        best = "bfloat16"
    dtype = getattr(torch, best if settings.dtype == "auto" else settings.dtype)
    if dtype == torch.float16 and found.type != "cuda":
        raise ValueError(f"dtype float16 needs a CUDA GPU: on {found.type} use bfloat16 or float32")
    torch.set_float32_matmul_precision("high")  # TF32 for what stays float32 on CUDA
    if found.type == "cpu":
        keep_freed_memory()
    if launched_by_torchrun():
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    else:
        rank, world_size = 0, 1
        for name in ("RANK", "WORLD_SIZE"):
            if os.environ.get(name, "") not in ("", "0", "1"):
                print(f"{name} is set, but not by torchrun: this process trains alone")
    machine = Machine(found, dtype, rank, world_size, settings.fsdp and world_size > 1)
    if world_size > 1:
        join_processes(machine)
    elif found.type == "cpu" and settings.max_minutes:
        # A run of a fixed number of steps keeps its threads, on which the last bits may depend.
        machine.threads = ThreadCount(machine.say)
        machine.at_end.callback(torch.set_num_threads, machine.threads.most)
    return machine


def keep_freed_memory():
    """Let glibc keep freed memory; otherwise each step would ask the system for new pages."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
        if not libc.mallopt(M_MMAP_THRESHOLD, 2**30):
            libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # the most that some versions accept
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def join_processes(machine):
    """Join torchrun's other processes, even after torchrun has restarted them all."""
    store = next(dist.rendezvous("env://"))[0]
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # The store outlives a restart and still holds the addresses of the ended processes.
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    backend = "cpu:gloo,cuda:nccl" if machine.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=machine.rank, world_size=machine.world_size)


class ThreadCount:
    """Finds how many threads are fastest on a CPU whose cores other processes may use as well.

    The threads of an operation wait for the slowest one. When another process takes a core,
    fewer threads are faster. With float32, the thread count may change a result's last bits.

    say: a function that prints a text. trial_s: for how many seconds each number is tried.
    """

    def __init__(self, say, trial_s=0.1):
        self.say = say
        self.trial_s = trial_s
        self.most = torch.get_num_threads()
        self.count = self.most
        self.began = time.monotonic()
        self.next_trial = self.began
        self.wait_s = 30.0

    def adapt(self, work, least_gain=1.1):
        """Choose anew if other processes seem to have become busy, or idle, since the last choice.

        work: a function whose speed decides. least_gain: how many times as fast it must run for
            fewer threads than before to be chosen.
        """
        if self.most == 1 or time.monotonic() < self.next_trial:
            return
        if self.suggested() != self.count:
            before = self.count
            began = time.monotonic()
            self.choose(work, least_gain)
            # A trial costs time; after one that changed nothing, the next can wait longer.
            self.wait_s = 30.0 if self.count != before else 2 * self.wait_s
            self.wait_s = max(self.wait_s, 20 * (time.monotonic() - began))
        self.next_trial = time.monotonic() + self.wait_s

    def suggested(self):
        """Return how many threads the load of other processes leaves room for, at least 1."""
        load = self.load_of_others()
        return max(1, self.most - max(round(load), load > 0.3))

    def choose(self, work, least_gain=1.1):
        """Set the number of threads with which the function `work` takes the least time."""
        fewer = min(self.suggested(), self.most - 1)
        seconds = {count: self.seconds_of(work, count) for count in (self.most, fewer)}
        gain = seconds[self.most] / seconds[fewer]
        count = fewer if gain > (1.1 if self.count < self.most else least_gain) else self.most
        torch.set_num_threads(count)
        if count < self.most and count != self.count:
            plural = "" if count == 1 else "s"
            self.say(
                f"{count} thread{plural} from here on: other processes are busy, and this is "
                f"{gain:.1f} times as fast as {self.most} threads"
            )
        elif count != self.count:  # all of them
            self.say(f"{count} threads from here on: other processes are no longer busy")
        self.count = count

    def seconds_of(self, work, count):
        """Return the mean seconds of work() with this number of threads."""
        torch.set_num_threads(count)
        work()  # the first call sets up what the others use
        began = time.monotonic()
        calls = 0
        while calls == 0 or (time.monotonic() - began < self.trial_s and calls < 100):
            work()
            calls += 1
        return max(1e-9, time.monotonic() - began) / calls

    def load_of_others(self):
        """Estimate how many threads of other processes were running in the last minute."""
        if not hasattr(os, "getloadavg"):  # Windows
            return 0.0
        # The load average is a mean whose weights fall exponentially within a minute.
        share = 1 - math.exp((self.began - time.monotonic()) / 60)
        return max(0.0, os.getloadavg()[0] - share * self.count)


@contextlib.contextmanager
def catch_stop_signals(machine):
    """Append the first stop signal to machine.stop_signals; let the next one act as usual.

    Under torchrun, later ones do nothing. Slurm signals all processes, and torchrun passes its own
    signal on, so each process receives two. torchrun itself ends processes that take too long.
    """
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    hangup = getattr(signal, "SIGHUP", None)
    actions = {}

    def on_signal(number, frame):
        message = b"stopping after this step; another signal ends the run at once\n"
        machine.stop_signals.append(number)
        for each, action in actions.items():
            # A closed terminal sends SIGHUP more than once.
            ignored = each == hangup or launched_by_torchrun()
            signal.signal(each, signal.SIG_IGN if ignored else action)
        if launched_by_torchrun():
            message = b"stopping after this step\n"
        if machine.rank == 0:
            with contextlib.suppress(OSError):  # print() may itself have been interrupted
                os.write(2, message)

    if threading.current_thread() is threading.main_thread():  # elsewhere Python forbids handlers
        for number in numbers:
            if number != hangup or signal.getsignal(number) is not signal.SIG_IGN:  # set by nohup
                actions[number] = signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number, action in actions.items():
            signal.signal(number, action)


class StopRequested(Exception):
    """A signal has asked the run to end."""


# ---- Evaluation ---------------------------------------------------------------------------------
@torch.no_grad()
def evaluate(model, data, machine, n_batches, batch_size):
    """Return the mean loss, in nats per target, of n_batches spread over the validation split.

    Several processes share the batches. Raises StopRequested if a signal arrives.
    """
    end = data.n_val_batches(batch_size)
    chosen = np.linspace(0, end - 1, min(n_batches, end)).round().astype(int).tolist()
    chosen += [end] * (-len(chosen) % machine.world_size)  # empty batches make the shares equal
    nats = 0.0
    weight = 0.0
    was_training = model.training
    model.eval()
    try:
        for i in chosen[machine.rank :: machine.world_size]:
            x, y, w = data.get_batch("val", i * batch_size, batch_size)
            batch_weight = w.sum().item()
            x, y, w = (to_device(t, machine.device) for t in (x, y, w))
            with machine.autocast():
                _, loss = model(x, y, weights=w, loss_only=True)
            nats += loss.item() * batch_weight
            weight += batch_weight
            if machine.must_stop():
                raise StopRequested("stopped during an evaluation")
    finally:
        model.train(was_training)
    nats, weight = machine.combine([nats, weight], "sum")
    return nats / weight


def loss_figures(loss, n_tokens, n_bytes=None):
    """Return loss, perplexity, bits per byte and number of tokens as a dict.

    n_bytes: the length of the text; None: there is no text whose bytes all count.
    """
    figures = {"loss": loss, "perplexity": math.exp(min(loss, 700))}  # exp(710) overflows
    if n_bytes is not None:
        figures["bits_per_byte"] = loss / math.log(2) * n_tokens / max(1, n_bytes)
    figures["tokens"] = n_tokens
    return figures


def in_words(figures):
    """Return figures as text, such as "loss 1.2345, perplexity 3.4367"."""
    words = [f"{name} {n:.4f}" for name, n in figures.items() if name != "tokens"]
    return ", ".join(words).replace("_", " ")


def final_figures(loss, data, machine, title):
    """Print the figures of the loss over the whole validation split; return them as a dict."""
    n_tokens = data.meta["val_tokens"]
    n_bytes = None if data.weighted else data.meta["val_bytes"]  # prompts do not count
    figures = loss_figures(loss, n_tokens, n_bytes)
    machine.say(f"{title}, {n_tokens:,} tokens: {in_words(figures)}")
    return {"val_loss": figures.pop("loss")} | figures


def evaluate_checkpoint(settings, machine, folder):
    """Return the figures of a checkpoint on the whole validation split.

    The checkpoint is init_from or, if that names none, out_dir/best.pt.
    """
    path = run_folder(settings, folder) / "best.pt"
    if names_checkpoint(settings):
        path = settings.init_from
    model, tokenizer, state = load_checkpoint(path, machine.device)
    trained_block = state.get("config", {}).get("block_size")
    check_meaning("block_size", check_setting("block_size", trained_block, SETTINGS))
    block_size = min(trained_block or settings.block_size, model.config.block_size)
    data = Data(folder, block_size, settings.seed, ["val"])
    check_tokenizer(data, tokenizer)
    n_batches = data.n_val_batches(settings.batch_size)
    loss = evaluate(model, data, machine, n_batches, settings.batch_size)
    title = f"{path}, step {state.get('step', 0):,}, whole validation split"
    return final_figures(loss, data, machine, title)


def check_tokenizer(data, tokenizer):
    """Raise ValueError if an id does not mean the same to the data set and to the model."""
    theirs = data.tokenizer
    same = theirs.json == tokenizer.json and theirs.special_tokens == tokenizer.special_tokens
    if same and not tokenizer.json:
        same = theirs.encoding._mergeable_ranks == tokenizer.encoding._mergeable_ranks
    if not same:
        raise ValueError(
            f"{data.folder} has a different tokenizer from the model's: prepare it with "
            "prepare.py --tokenizer=CHECKPOINT"
        )


# ---- Progress and time --------------------------------------------------------------------------
EXIT_SHARE = 0.01  # of max_minutes, reserved for ending the process
LONGEST_EXIT_S = 2.0


@dataclass
class Progress:
    """Where a run stands. A checkpoint holds all of it, as of the moment of saving."""

    step: int = 0
    next_row: int = 0  # the training rows taken so far, over all epochs
    best_val_loss: float = math.inf
    stale: int = 0  # evaluations since the best one
    skipped: int = 0  # steps whose gradient was not finite
    trained_s: float = 0.0  # seconds in the loop
    spent_s: float = 0.0  # seconds of the run's processes, from their start to their end
    reserve_s: float = 0.0  # seconds that max_minutes sets aside for the last evaluation


class Clock:
    """Tells how much of a run is done, from 0 to 1: by steps or, with max_minutes, by time.

    Setup and compilation use up minutes but are not progress, so the schedule begins with the loop.
    The schedule includes evaluations.
    """

    def __init__(self, settings, progress, started):
        self.settings = settings
        self.progress = progress
        self.started = started - progress.spent_s  # as if one process had done it all
        self.loop_began = None  # until begin_loop

    def begin_loop(self):
        self.loop_began = time.monotonic() - self.progress.trained_s

    def exclude(self, seconds):
        """Count these seconds of the loop as spent, but not as trained."""
        self.loop_began += seconds

    def spent_s(self):
        return time.monotonic() - self.started

    def trained_s(self):
        return time.monotonic() - self.loop_began

    def left_s(self):
        """Return the seconds that training may still take under max_minutes."""
        limit_s = 60 * self.settings.max_minutes
        budget = limit_s - min(EXIT_SHARE * limit_s, LONGEST_EXIT_S)
        return max(0.0, budget - self.spent_s() - self.progress.reserve_s)

    def share_done(self, step, epochs):
        """Return the share of the run that is done after `step` steps and `epochs` epochs."""
        if self.settings.max_minutes:
            trained = self.trained_s()
            share = trained / max(1.0, trained + self.left_s())  # at least a second of training
        else:
            share = step / self.settings.max_iters if self.settings.max_iters else 1.0
        if self.settings.max_epochs:
            share = max(share, epochs / self.settings.max_epochs)
        return share


# ---- Fitting a run to the text, the minutes and the machine -------------------------------------
def complete_settings(settings, folder, out, state, machine, clock):
    """Give a value to every setting that is still None.

    state: the checkpoint of the run to resume, whose values stay; None: a new run, which is fitted
        to the data set in folder, to max_minutes and to the machine.
    """
    if state is not None:
        with naming_damage(f"the checkpoint in {out}"):
            fill_settings(settings, state["config"])
    elif names_checkpoint(settings):
        if settings.block_size is None:
            settings.block_size = block_size_of_base(settings)
    elif settings.max_minutes:
        n_tokens, vocab_size = tokens_of_an_epoch(settings, folder)
        if any(getattr(settings, name) is None for name in UNFITTED):
            # The first process decides, because the others may measure something else.
            flops_per_s = machine.world_size * machine.from_first(flops_per_second, machine)
            seconds = max(1.0, machine.from_first(clock.left_s))
            fit_settings(settings, n_tokens, vocab_size, flops_per_s, seconds, machine)
    fill_settings(settings, UNFITTED)
    check_together(settings)


def tokens_of_an_epoch(settings, folder):
    """Return (how many tokens the rows of an epoch hold, vocab_size) of a data set.

    Examples keep the usual block_size, since a shorter one would cut them. Most of their rows hold
    less than that, but take as much time.
    """
    meta, _ = read_meta(folder)
    n_tokens = meta["train_tokens"]
    if (folder / "train.weight.bin").exists():
        fill_settings(settings, {"block_size": UNFITTED["block_size"]})
        data = Data(folder, settings.block_size, splits=["train"])
        n_tokens = data.n_rows("train") * settings.block_size
    return max(1, n_tokens), meta["vocab_size"]


def flops_per_second(machine):
    """Return the FLOPs per second of a process's training steps, measured in a few of them.

    The steps are not compiled, because in a short run compiling costs as much time as it saves. The
    model is widened until a step takes a while, because on a GPU small models wait for Python.
    """
    rows = 64 if machine.device.type == "cuda" else 8
    for n_embd in (128, 256, 512, 1024):
        model = GPT(GPTConfig(vocab_size=256, n_embd=n_embd)).to(machine.device)
        shape = (rows, model.config.block_size)
        idx = torch.zeros(shape, dtype=torch.long, device=machine.device)
        step = functools.partial(timed_step, model, idx, machine)
        if machine.threads is not None:
            machine.threads.adapt(step)
        seconds = []
        while len(seconds) < 5 and sum(seconds) < 1:
            seconds.append(step())
        last = seconds[2:] or seconds[-1:]  # the first two include setup
        step_s = max(1e-9, sum(last) / len(last))
        if step_s > 0.03:
            break
    if machine.device.type == "cuda":  # this memory is not the run's
        torch.cuda.reset_peak_memory_stats(machine.device)
    return model.config.flops_per_token() * idx.numel() / step_s


def timed_step(model, idx, machine):
    """Compute the gradients of one batch; return the seconds that this took."""
    began = time.monotonic()
    with machine.autocast():
        _, loss = model(idx, idx, loss_only=True)
    loss.backward()
    float(model.ln_f.weight.grad[0])  # waits for a GPU
    return time.monotonic() - began


def fit_settings(settings, n_tokens, vocab_size, flops_per_s, seconds, machine):
    """Choose values for the settings that are None, for a text and a training time; print them.

    n_tokens: those of an epoch. The constants come from the runs of bench/ladder.py and from
    published scaling laws, and some are guesses; see docs/fitting.md.
    """
    flops = flops_per_s * seconds
    missing = [name for name in UNFITTED if getattr(settings, name) is None]
    fill_settings(settings, fitted_shape(settings, n_tokens, vocab_size, flops))
    fill_settings(settings, {"max_epochs": 40.0})  # further epochs only overfit
    epochs = flops / flops_of_token(settings, vocab_size) / n_tokens
    if settings.max_epochs:
        epochs = min(epochs, settings.max_epochs)
    # A text that is seen more often needs more regularization.
    repeats = math.log2(max(1.5, epochs) / 1.5)
    curb = 0.1 * min(1, epochs**2) + 0.03 * math.log2(max(2, epochs) / 2)
    width = settings.n_embd / 192
    values = {
        "batch_size": fitted_batch_size(settings, epochs * n_tokens, machine.world_size),
        "learning_rate": two_digits(8e-3 * width**-0.7),
        "muon_lr": two_digits(0.03 * width**-0.5),
        "dropout": two_digits(min(0.25, 0.04 * repeats)),
        "weight_decay": two_digits(min(0.1, 0.04 * repeats)),
        "train_temperature": two_digits(max(0.83, 1 - curb)),
    }
    fill_settings(settings, values)
    chosen = " ".join(f"{name}={getattr(settings, name):g}" for name in missing)
    why = (
        f"for {settings.max_minutes:g} minutes at {two_digits(flops_per_s / 1e12):g} TFLOP/s: up "
        f"to {two_digits(epochs):g} epochs of {n_tokens:,} tokens"
    )
    lines = [*textwrap.wrap(chosen, 90), why]
    machine.say("\n         ".join(["fitted   " + lines[0], *lines[1:]]))


def two_digits(value):
    """Return a number rounded to two significant digits."""
    return float(f"{value:.2g}")


def fitted_batch_size(settings, tokens, world_size):
    """Return a batch_size that all processes can share, for a run over this many tokens.

    The best batch size grows roughly with the square root of the tokens (arXiv:2505.13738).
    """
    accumulation = settings.gradient_accumulation_steps
    rows_per_step = 2048 * (tokens / 2e6) ** 0.5 / settings.block_size
    micro_batches = world_size * math.ceil(accumulation / world_size)
    # Trainer shares batch_size * accumulation evenly among this many micro-batches.
    multiple = math.lcm(micro_batches, accumulation) // accumulation
    doublings = math.log2(rows_per_step / accumulation / multiple)
    return multiple * 2 ** max(0, round(doublings))


def best_size(flops):
    """Return the best model size for a run of `flops` FLOPs.

    The size is FLOPs per token / 6, so that attention counts too.
    """
    return 1.05e6 * (flops / 2e13) ** 0.47


def fitted_shape(settings, n_tokens, vocab_size, flops):
    """Return the sizes, as a dict, of the best model for `flops` and n_tokens.

    Sizes that the settings already hold are taken into account.
    """
    wanted = 6 * min(best_size(flops), 3 * n_tokens)  # FLOPs per token
    longest = 2 ** math.floor(math.log2(max(2, n_tokens / 2)))
    best = UNFITTED
    best_distance = math.inf
    for width in (*range(64, 256, 32), *range(256, 8192, 64)):
        shape = shape_of_width(settings, width)
        shape["block_size"] = min(longest, shape["block_size"])
        candidate = SimpleNamespace(**vars(settings))
        fill_settings(candidate, shape)
        distance = abs(math.log(flops_of_token(candidate, vocab_size) / wanted))
        if distance > best_distance:
            break  # larger models are further away still
        if distance < best_distance:
            best = shape
            best_distance = distance
        if settings.n_embd and settings.n_layer:
            break  # there is only this one
    return best


def shape_of_width(settings, width):
    """Return the sizes, as a dict, of a model about this wide; if n_embd is set, depth varies."""
    # Heads have an even number of channels, and share keys and values in equal groups.
    unit = 2 * (settings.n_head or settings.n_kv_head or 1)
    groups = settings.n_kv_head or 1
    n_embd = settings.n_embd or unit * max(1, round(width / unit))
    most_heads = max(4, groups, n_embd // 64)
    heads = [n for n in range(groups, most_heads + 1, groups) if n_embd % (2 * n) == 0]
    heads = [n for n in heads if n <= 4 or n % 4 == 0]
    n_head = settings.n_head or max(heads, default=groups)
    return {
        "n_embd": n_embd,
        "n_layer": round(0.08 * width**0.75),
        "n_head": n_head,
        "n_kv_head": max(n for n in range(1, max(1, n_head // 4) + 1) if n_head % n == 0),
        "block_size": 2 ** math.ceil(math.log2(n_embd)),
    }


def flops_of_token(settings, vocab_size):
    """Return the FLOPs per token of the model that the settings describe."""
    return model_config(settings, vocab_size).flops_per_token()


def block_size_of_base(settings):
    """Return the context length for finetuning init_from: the default or, if less, its own."""
    path = as_path(settings.init_from)
    path = path if path.is_file() else path / "best.pt"
    if not path.exists():  # model_to_finetune will say so
        return UNFITTED["block_size"]
    state = read_checkpoint(path)
    with naming_damage(path):
        return min(UNFITTED["block_size"], state["model_args"]["block_size"])


# ---- Folders, resuming, finetuning --------------------------------------------------------------
@contextlib.contextmanager
def data_folder(settings, machine):
    """Yield the data set's folder, prepared if it is missing; a dry run uses a temporary folder."""
    root = as_path(settings.data_dir or HERE / "data")
    with contextlib.ExitStack() as stack:
        missing = not (root / settings.dataset / "meta.json").exists()
        if settings.dry_run and missing and settings.dataset in MADE_HERE:
            root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        yield machine.from_first(prepare_if_missing, settings.dataset, root)


def run_folder(settings, folder):
    return as_path(settings.out_dir or HERE / "out" / folder.name)


def model_config(settings, vocab_size):
    """Return the GPTConfig of the settings. Raises ValueError if the sizes do not fit together."""
    known = GPTConfig.__dataclass_fields__
    values = {n: v for n, v in vars(settings).items() if n in known and v is not None}
    return GPTConfig(vocab_size=vocab_size, **values)


def names_checkpoint(settings):
    """Return whether init_from names a checkpoint to finetune or to evaluate."""
    return settings.init_from not in ("scratch", "resume", "auto")


def read_run(settings, out, machine):
    """Return the checkpoint of the run to resume, or None for a new run.

    Raises FileNotFoundError if there is none to resume, and ValueError if it is damaged.
    """
    path = out / "ckpt.pt"
    resume = settings.init_from == "resume"
    if settings.init_from == "auto":
        resume = machine.from_first(path.exists)
    if not resume:
        return None
    if not machine.from_first(path.exists):
        raise FileNotFoundError(f"{out} holds no run to resume: --init_from=auto begins one")
    state = read_checkpoint(path)
    if "optimizers" not in state:
        raise ValueError(
            f"{path} holds no run to resume: a best.pt, for example, is only for inference"
        )
    return state


def read_progress(state):
    """Return the Progress that a run's checkpoint holds. Raises TypeError if it makes no sense."""
    if "progress" in state:
        progress = Progress(**state["progress"])
    else:  # before version 2.0.0, when setting the system clock could make the seconds negative
        rows = state["config"]["batch_size"] * state["config"]["gradient_accumulation_steps"]
        progress = Progress(
            step=state["step"],
            next_row=state["step"] * rows,
            best_val_loss=state["best_val_loss"],
            trained_s=max(0.0, state["elapsed_s"] - state["paused"]),
            spent_s=max(0.0, state["elapsed_s"]),
        )
    for name, value in vars(progress).items():
        if type(value) is not type(getattr(Progress, name)) or not value >= 0:
            raise TypeError(f"{name} is {value!r}")
    return progress


@contextlib.contextmanager
def naming_damage(what):
    """Turn any error in reading a damaged or foreign file into a ValueError that names the file."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as e:
        if out_of_memory(e):
            raise
        raise ValueError(f"{what} is damaged or from another program ({shortened(e)!r})") from e


def build_model(settings, data, state, out):
    """Return the model to train: a new one, init_from's to finetune, or the resumed run's."""
    torch.manual_seed(settings.seed)
    if state is not None:
        with naming_damage(f"the checkpoint in {out}"):
            return resumed_model(settings, data, state)
    if names_checkpoint(settings):
        return model_to_finetune(settings, data, out)
    if settings.lora_rank:
        raise ValueError(
            f"lora_rank is {settings.lora_rank}, but there is no model to finetune: name one with "
            "--init_from"
        )
    return GPT(model_config(settings, data.meta["vocab_size"]))


def resumed_model(settings, data, state):
    """Return the model of a run's state. Raises ValueError if the settings ask for another."""
    check_tokenizer(data, Tokenizer(**state["tokenizer"]))
    shape = GPTConfig(**state["model_args"] | training_only_values(settings))
    saved = state["config"] | asdict(shape)
    # Before version 2.0.0, a model's table of positions could be longer.
    saved["block_size"] = state["config"]["block_size"]
    names = ["block_size", "lora_rank", "optimizer"]
    if not state["base"]:  # else the model has the shape of what it was finetuned from
        names += sorted(SETTINGS.keys() & asdict(shape).keys() - {"block_size"})
    wanted = {name: getattr(settings, name) for name in names}
    differing = [name for name in names if wanted[name] != saved[name]]
    if differing:
        found = [f"{name} is {wanted[name]}, but {saved[name]} in the run" for name in differing]
        flags = [f"--{name}={saved[name]}" for name in differing]
        raise ValueError(f"{'; '.join(found)}: resume with {' '.join(flags)}")
    model = GPT(shape)
    load_weights(model, state)
    model.base = state["base"]
    return model


def training_only_values(settings):
    return {name: getattr(settings, name) for name in TRAINING_ONLY}


def model_to_finetune(settings, data, out):
    """Return the model of init_from's checkpoint, with LoRA's matrices if lora_rank is above 0."""
    path = as_path(settings.init_from)
    if not path.is_file() and not (path / "best.pt").exists():
        raise FileNotFoundError(
            f"init_from is {settings.init_from!r}, but there is no such checkpoint; if it is a "
            f"Hugging Face model, make one with python hub.py get {settings.init_from}"
        )
    if (path if path.is_dir() else path.parent).resolve() == out.resolve():
        raise ValueError(f"{path} is in out_dir, whose files a new run renames: change out_dir")
    if settings.lora_rank and settings.optimizer != "adamw":
        raise ValueError(
            f"lora_rank is {settings.lora_rank}: it needs --optimizer=adamw, not "
            f"{settings.optimizer}"
        )
    model, tokenizer, _ = load_checkpoint(path, **training_only_values(settings))
    check_tokenizer(data, tokenizer)
    if model.config.block_size < settings.block_size:
        most = model.config.block_size
        raise ValueError(f"block_size is {settings.block_size}: {path} takes at most {most}")
    model.crop_block_size(settings.block_size)
    if settings.lora_rank:
        from extras.lora import add_lora

        add_lora(model, settings.lora_rank)
    model.base = settings.init_from
    return model.train()


def say_what_has_no_effect(settings, model, machine):
    """Print which settings have no effect, because a finetuned model has the shape of its base."""
    for name, value in asdict(model.config).items():
        if name in SETTINGS and name != "block_size":
            asked = getattr(settings, name)
            if asked not in (value, default_of(name)):
                machine.say(f"{name}={asked} has no effect: {model.base} has {name}={value}")


def load_optimizers(optimizers, saved_states):
    """Give the optimizers the state that a checkpoint holds; learning rates keep their values.

    Raises TypeError if it is the state of other parameters.
    """
    if len(saved_states) != len(optimizers):
        raise TypeError(
            f"it holds the state of {len(saved_states)} optimizers, not {len(optimizers)}"
        )
    for o, saved in zip(optimizers, saved_states):
        params = [p for group in o.param_groups for p in group["params"]]
        if len(saved["state"]) not in (0, len(params)):  # 0: before the first step
            raise TypeError(
                f"the optimizer state does not belong to these {len(params)} parameters"
            )
        for i, tensors in saved["state"].items():
            if tensors.keys() != saved["state"][0].keys():
                raise TypeError(f"parameter {i} has a different optimizer state from the first")
            for name, tensor in tensors.items():
                if tensor.shape != (() if name == "step" else params[i].shape):
                    raise TypeError(f"{name} of parameter {i} has a different shape")
                tensors[name] = share_of(tensor, params[i])
        groups = o.state_dict()["param_groups"]
        o.load_state_dict({"state": saved["state"], "param_groups": groups})


def compare_with_run(settings, state, progress, val_conditions, machine):
    """Print which settings differ from the resumed run's; forget a best loss that they affect."""
    before = state["config"]
    for name, value in vars(settings).items():
        then = before.get(name, default_of(name))
        if then != value and name not in ("init_from", "out_dir", "data_dir"):
            machine.say(f"resuming with {name}={value} instead of {then}")
    earlier = before | {"dataset_sha256": state["dataset_sha256"]} | state.get("val_conditions", {})
    changed = [n for n, value in val_conditions.items() if earlier.get(n, value) != value]
    if changed and progress.best_val_loss < math.inf:
        names = ["the data set" if name == "dataset_sha256" else name for name in changed]
        machine.say(
            f"{' and '.join(names)} changed: earlier validation losses cannot be compared with "
            "later ones, so best.pt and early_stop start over"
        )
        progress.best_val_loss = math.inf


# ---- Trainer ------------------------------------------------------------------------------------
class Trainer:
    """A model in training: it turns batches into gradients, and gradients into updates.

    A step takes batch_size * gradient_accumulation_steps rows. Each process gets an equal share of
    them, in micro-batches of micro_rows.
    """

    def __init__(self, settings, model, data, machine):
        self.settings = settings
        self.data = data
        self.machine = machine
        self.rows_per_step = settings.batch_size * settings.gradient_accumulation_steps
        self.tokens_per_step = self.rows_per_step * settings.block_size
        n_micro_batches = math.ceil(settings.gradient_accumulation_steps / machine.world_size)
        multiple = n_micro_batches * machine.world_size
        if self.rows_per_step % multiple:
            raise ValueError(
                f"batch_size * gradient_accumulation_steps is {self.rows_per_step}: for "
                f"{machine.world_size} processes it must be a multiple of {multiple}"
            )
        self.rows_per_process = self.rows_per_step // machine.world_size
        self.micro_rows = self.rows_per_process // n_micro_batches
        self.read_ahead = {}  # the next step's rows, by the number of the first one

        self.model = model  # holds the weights that are trained
        self.wrapped_model = model  # is called in training; DDP and torch.compile wrap it
        # What is evaluated, generates the samples and is saved as best.pt. It may be another model
        # of the same shape, such as a running mean of the weights.
        self.eval_model = model
        self.ddp_model = None
        self.place(model)
        if machine.world_size > 1 and not machine.fsdp:
            self.ddp_model = nn.parallel.DistributedDataParallel(
                model, gradient_as_bucket_view=True
            )
            self.ddp_model.broadcast_buffers = False  # none changes; passed to DDP, this would warn
            self.wrapped_model = self.ddp_model
        self.to_compile = what_to_compile(settings, model, data, machine)
        self.optimizers = make_optimizers(model, settings, machine)
        self.scaler = torch.amp.GradScaler("cuda", enabled=machine.dtype == torch.float16)
        # On one GPU, a step of one micro-batch is recorded as two CUDA graphs; see Replay.
        recorded = settings.cuda_graphs and machine.world_size == n_micro_batches == 1
        recorded = recorded and not settings.gradient_checkpointing  # which reads the random state
        first_backward = functools.partial(self.backward, is_first=True)
        self.first_backward = Replay(first_backward, machine.device, recorded)
        self.take_steps = Replay(self.optimizer_steps, machine.device, recorded)

    def place(self, model):
        """Move a model to the device or, with FSDP, shard it over the processes, in place."""
        if not self.machine.fsdp:
            model.to(self.machine.device)
            return
        from extras.fsdp import shard_model

        # This moves one block's share at a time, because the whole may not fit on one GPU.
        shard_model(model, self.machine.device, self.machine.dtype, self.machine.world_size)

    def gradients(self, first_row):
        """Compute the gradients of the step whose rows begin at first_row.

        Return a loss whose mean over the processes is the step's. While a GPU is still at work, the
        next step's rows are read.
        """
        first = first_row + self.machine.rank * self.rows_per_process
        batch = self.read_ahead.get(first) or self.read_rows(first)
        weight = self.machine.mean(batch[2].sum())
        loss = 0.0
        micro_batches = list(zip(*(tensor.split(self.micro_rows) for tensor in batch)))
        for i, (x, y, w) in enumerate(micro_batches):
            row = first + i * self.micro_rows
            torch.manual_seed(dropout_seed(self.settings.seed, row))
            self.set_gradient_exchange(i == len(micro_batches) - 1)
            run_backward = self.first_backward if i == 0 else self.backward
            # The sum is a new tensor; the next call may overwrite the one returned here.
            loss = loss + run_backward(x, y, w, float(w.sum()) / weight)
        following = first + self.rows_per_step
        self.read_ahead = {following: self.read_rows(following)}
        return loss

    def read_rows(self, first):
        """Return this process's rows of a step, which begin at `first`."""
        return self.data.get_batch("train", first, self.rows_per_process)

    def backward(self, x, y, w, share, is_first=False, model=None):
        """Add a micro-batch's gradients to the accumulated ones; return its loss times its share.

        share: the weight of its targets divided by that of the whole step's targets, because the
            model returns the mean of the micro-batch alone.
        is_first: whether to drop the previous step's gradients first. A recording includes this.
        model: what to call instead of wrapped_model.
        """
        if is_first:
            for o in self.optimizers:
                o.zero_grad()
        x, y, w = (to_device(t, self.machine.device) for t in (x, y, w))
        with self.machine.autocast():
            _, loss = (model or self.wrapped_model)(x, y, weights=w, loss_only=True)
        loss = loss * share
        self.scaler.scale(loss).backward()
        return loss.detach()

    def set_gradient_exchange(self, now):
        """Set whether the processes average their gradients in the next backward pass."""
        if self.ddp_model is not None:
            self.ddp_model.require_backward_grad_sync = now  # as no_sync() does
        elif self.machine.fsdp:
            self.model.set_requires_gradient_sync(now)

    def update(self):
        """Clip the gradients and, if they are finite, update the weights.

        Return figures for the log, as a dict: the norm of the whole gradient before clipping.
        """
        for o in self.optimizers:
            self.scaler.unscale_(o)
        most = self.settings.grad_clip or math.inf
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), most)
        norm = float(whole(norm))
        if math.isfinite(norm):  # the gradients are unscaled, so no scaler.step is needed
            self.take_steps()
        self.scaler.update()  # after a float16 overflow the scale must fall
        return {"grad_norm": norm}

    def optimizer_steps(self):
        """Update the weights, and anything that tracks them.

        On a GPU this is recorded. It is skipped in a step whose gradient is not finite.
        """
        for o in self.optimizers:
            o.step()

    def state_dict(self):
        """Return what resuming needs besides the model."""
        return {
            "optimizers": [o.state_dict() for o in self.optimizers],
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state):
        """Restore what state_dict returned; learning rates keep their values."""
        load_optimizers(self.optimizers, state["optimizers"])
        if state["scaler"]:  # it is empty without loss scaling
            self.scaler.load_state_dict(state["scaler"])

    def get_ready(self):
        """Find the number of threads, compile, and find a micro-batch that fits in GPU memory."""
        self.adapt_to_other_processes()
        if self.to_compile:
            self.compile()
        while not self.micro_batch_fits():
            if self.micro_rows == 1 or self.machine.world_size > 1:
                raise ValueError(memory_is_full(self.settings))
            smaller = range(self.micro_rows // 2, 0, -1)
            self.micro_rows = next(n for n in smaller if self.micro_rows % n == 0)
            self.machine.say(f"out of memory: trying micro-batches of {self.micro_rows} rows")

    def adapt_to_other_processes(self, left_s=math.inf):
        """On a CPU, choose the number of threads anew if other processes have come or gone.

        The plain model decides, because a compiled one would have to be compiled for each number.
        left_s: the seconds of training left, in which another number must pay for compiling again.
        """
        if self.machine.threads is None or left_s < 60:
            return
        compile_s = 20.0 if self.to_compile else 0.0
        least_gain = 1.1 if left_s == math.inf else max(1.1, left_s / (left_s - compile_s))
        try_it = functools.partial(self.try_micro_batch, self.model)
        self.machine.threads.adapt(try_it, least_gain)

    def micro_batch_fits(self):
        """Return whether memory suffices for a micro-batch; on a CPU, assume that it does."""
        if self.machine.device.type == "cpu":
            return True
        try:
            self.try_micro_batch()
        except RuntimeError as e:
            if out_of_memory(e):
                return False
            raise
        return True

    def compile(self):
        """Compile the model and try it; if that fails, say so and train the plain model."""
        self.machine.say("compiling, which takes up to half a minute")
        began = time.monotonic()
        os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")  # skips testing the C++ compiler
        plain_model = self.wrapped_model
        if self.to_compile == "blocks":
            blocks = [torch.compile(block, dynamic=False) for block in self.model.h]
            self.wrapped_model = functools.partial(self.model, blocks=blocks)
        else:
            self.wrapped_model = torch.compile(plain_model, dynamic=False)
        try:
            self.try_micro_batch()
        except Exception as e:  # compilers' errors have no common type
            if out_of_memory(e):
                return  # get_ready will find out what fits
            self.wrapped_model = plain_model
            self.machine.say(f"torch.compile failed ({type(e).__name__}): training without it")
            return
        self.machine.say(f"compiled in {time.monotonic() - began:.0f} s")

    def try_micro_batch(self, model=None):
        """Compute a micro-batch's gradients while holding the memory of the optimizers' state.

        model: what to call instead of wrapped_model.
        """
        groups = [(o, group) for o in self.optimizers for group in o.param_groups]
        without_state = [p for o, group in groups for p in group["params"] if p not in o.state]
        optimizer_state = [torch.empty_like(p) for p in without_state for _ in range(2)]
        try:
            batch = self.data.get_batch("train", 0, self.micro_rows)
            self.backward(*batch, 0.0, model=model)
        finally:
            del optimizer_state
            for o in self.optimizers:
                o.zero_grad()


def dropout_seed(seed, row):
    """Return a 32-bit number, because a CPU's generator uses no more bits."""
    return int(np.random.SeedSequence((seed, row)).generate_state(1)[0])


def memory_is_full(settings):
    """Return the error message for memory that is too small for a run."""
    rows = settings.batch_size or UNFITTED["batch_size"]
    block_size = settings.block_size or UNFITTED["block_size"]
    return (
        f"out of memory: lower batch_size ({rows}) and raise gradient_accumulation_steps "
        f"({settings.gradient_accumulation_steps}), set --gradient_checkpointing=True, lower "
        f"block_size ({block_size}), or use several GPUs with --fsdp=True under torchrun"
    )


def what_to_compile(settings, model, data, machine):
    """Return what to compile: "model", its "blocks", or "" for nothing.

    The setting `compile` decides whether to compile or, if it is None, the length of the run. All
    blocks share the code of one, which a CPU compiles in 14 s. The whole model takes 22 s,
    but it is 3 to 5% faster, which pays off from about five minutes on.
    """
    on_gpu = machine.device.type == "cuda"
    able = machine.device.type == "cpu" and shutil.which("g++") is not None
    if on_gpu:
        able = torch.cuda.get_device_capability(machine.device) >= (7, 0)
    flops_per_minute = 2.5e15 if on_gpu else 2.5e13  # of a small GPU, and of two cores: a guess
    minutes_per_row = model.config.flops_per_token() * settings.block_size / flops_per_minute
    rows = settings.max_iters * settings.batch_size * settings.gradient_accumulation_steps
    minutes = settings.max_minutes or rows * minutes_per_row
    if settings.max_epochs:
        minutes = min(minutes, settings.max_epochs * data.n_rows("train") * minutes_per_row)
    enough = 5 if machine.dtype == torch.float32 and settings.max_minutes else 2
    wanted = settings.compile
    if wanted is None:
        wanted = able and minutes >= enough
    if not wanted:
        return ""
    short = machine.device.type == "cpu" and machine.world_size == 1 and minutes < 5
    return "blocks" if short else "model"


# ---- The folder of a run ------------------------------------------------------------------------
def checkpoint_state(model, data, settings, progress):
    """Return what a checkpoint for inference holds: tensors, numbers, strings, lists and dicts.

    As in nanoGPT, "config" holds the settings, and "model_args" the fields of GPTConfig.
    """
    return {
        "version": __version__,
        "model": model.state_dict(),
        "model_args": asdict(model.config),
        "tokenizer": data.tokenizer.state,
        "config": vars(settings),
        "lora_rank": settings.lora_rank,
        "base": model.base,
        "dataset_sha256": data.meta["sha256"],
        "step": progress.step,
        "best_val_loss": progress.best_val_loss,
    }


def open_run(settings, out, machine, resumed, step):
    """Make the run's folder and return the function that logs a dict there, as a line of JSON.

    Files of an earlier run get new names, unless this run resumes it at `step`. Raises OSError,
    and ValueError if another run writes there or a library is missing.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        claim_folder(out, machine.at_end)
        writers = open_writers(settings, out, step)
        if not resumed:
            keep_earlier_files(out)
        log_file = machine.at_end.enter_context(open_log(out))
    except OSError as e:
        raise OSError(f"cannot write to {out} ({e.strerror}): choose another --out_dir") from e

    def write_line(values):
        line = dict(values)
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                line[name] = None  # JSON has no NaN
        log_file.write(json.dumps(line).encode() + b"\n")
        for write in writers:
            write(line)

    return write_line


def open_writers(settings, out, step):
    """Return the functions that plot or log a run's values in addition to log.jsonl."""
    if "__file__" in globals() and (HERE / "extras" / "plots.py").exists():
        from extras import plots

        config = vars(settings)
        return plots.open_writers(out, config, settings.tensorboard, settings.wandb_log, step)
    if settings.tensorboard or settings.wandb_log:
        raise ValueError("tensorboard and wandb_log need extras/plots.py beside gpt.py")
    return []


def claim_folder(out, files):
    """Keep other runs out of a folder until `files` are closed. Raises ValueError if one is there.

    Half-written files that a killed run has left are removed.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    folder = os.open(out, os.O_RDONLY)
    files.callback(os.close, folder)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise ValueError(f"another run is writing to {out}: choose another --out_dir") from e
    except OSError:
        return  # some network file systems have no such locks
    for part in (*out.glob("ckpt.*.tmp"), *out.glob("best.*.tmp")):
        part.unlink()


def open_log(out):
    """Open log.jsonl to append whole lines."""
    file = open(out / "log.jsonl", "a+b", buffering=0)  # closed when the run ends
    file.seek(max(0, file.tell() - 1))
    if file.read(1) not in (b"", b"\n"):  # a killed run has left half a line
        file.write(b"\n")
    return file


def keep_earlier_files(out):
    """Rename the files of an earlier run to names that no file has yet, and say so."""
    names = [path.name for path in out.glob("*.pt")] + ["log.jsonl", "loss.png"]
    names = [name for name in names if (out / name).exists() and (out / name).stat().st_size]
    date = time.strftime("%Y-%m-%d-%H%M%S")
    count = 1
    while any((out / f"{name}.{date}-{count}").exists() for name in names):
        count += 1
    for name in names:
        (out / name).rename(out / f"{name}.{date}-{count}")
    if names:
        print(f"{out}: renamed {', '.join(names)} of the earlier run, adding .{date}-{count}")


# ---- What a run prints --------------------------------------------------------------------------
def describe(settings, trainer, out, progress):
    """Print what was chosen for a run, in a few lines."""
    machine, data, model = trainer.machine, trainer.data, trainer.model
    mode = f"{trainer.to_compile} to be compiled" if trainer.to_compile else "eager"
    if machine.world_size > 1:
        mode += ", FSDP" if machine.fsdp else ", DDP"
    elif settings.fsdp:
        mode += "; fsdp has no effect with one process"
    n = model.n_params()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = f"{n / 1e6:,.2f}M parameters"
    if trained < n:
        size += f", {trained:,} of them trained"
    if model.base:
        size += f", from {model.base}"
    memory = (n + 3 * trained) * 4 / 2**20
    epoch = data.n_rows("train") / trainer.rows_per_step
    length = f"{settings.max_iters:,} steps"
    if settings.max_minutes:
        length = f"{settings.max_minutes:g} minutes"
    if settings.max_epochs:
        length += f", at most {settings.max_epochs:g} epochs"
    if progress.step:
        length += f", resumed after step {progress.step:,}"
    machine.say(
        f"machine  {machine.name()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n"
        f"         {str(machine.dtype).removeprefix('torch.')}, {mode}\n"
        f"data     {data.folder}: {data.meta['train_tokens']:,} training and "
        f"{data.meta['val_tokens']:,} validation tokens\n"
        f"         {data.meta['tokenizer']['kind']} vocabulary of {data.meta['vocab_size']:,}\n"
        f"model    {size}, at most {memory:,.1f} MiB with gradients and optimizer state\n"
        f"run      {length}, {trainer.tokens_per_step:,} tokens per step, {epoch:,.0f} steps per "
        f"epoch, in {out}"
    )
    if settings.lr_decay_iters and settings.max_minutes:
        machine.say("         lr_decay_iters has no effect, because max_minutes sets the schedule")
    if data.n_empty:
        machine.say(f"         {data.n_empty:,} rows hold no target and are left out")
    if model.base:
        say_what_has_no_effect(settings, model, machine)


def print_sample(trainer, settings):
    """Print a sample of sample_tokens tokens.

    It continues a newline or, if targets have weights, the prompt of the first validation row.
    """
    machine, data, model = trainer.machine, trainer.data, trainer.eval_model
    if settings.sample_tokens == 0 or (machine.rank > 0 and not machine.fsdp):
        return  # with FSDP each process holds a share of the weights, and must take part
    tokenizer = data.tokenizer
    if data.weighted or (tokenizer.chars and "\n" not in tokenizer.chars):
        x, _, w = data.get_batch("val", 0, 1)
        ids = x[0, : 1 + int(w[0].argmax())].tolist()  # up to the first token that counts
    else:
        ids = tokenizer.encode("\n")
    generator = torch.Generator(machine.device).manual_seed(settings.seed)
    record = settings.cuda_graphs and not machine.fsdp
    model.eval()
    drawn = model.generate([ids], settings.sample_tokens, cuda_graphs=record, generator=generator)
    drawn = [int(next_id) for next_id in drawn]
    model.train()
    if tokenizer.end_id in drawn:
        drawn = drawn[: drawn.index(tokenizer.end_id)]
    text = tokenizer.decode(ids + drawn)
    machine.say(f"{'-' * 80}\n{text.strip()}\n{'-' * 80}")


def plan(settings, trainer):
    """Print what the run will take, measured on three steps; return the figures as a dict."""
    machine = trainer.machine
    trainer.get_ready()
    set_learning_rates(trainer.optimizers, 0.0)
    seconds = []
    for step in range(7):  # the first ones set up what the last three use
        began = time.monotonic()
        row = step * trainer.rows_per_step
        trainer.gradients(row)
        trainer.update()
        seconds.append(time.monotonic() - began)
        if machine.must_stop():
            raise StopRequested("stopped")
    step_s = max(1e-9, sum(seconds[-3:]) / 3)
    steps = settings.max_iters
    if settings.max_minutes:
        steps = int(60 * settings.max_minutes / step_s)
    if settings.max_epochs:
        rows = settings.max_epochs * trainer.data.n_rows("train")
        steps = min(steps, math.ceil(rows / trainer.rows_per_step))
    tokens = trainer.tokens_per_step
    epochs = steps * trainer.rows_per_step / trainer.data.n_rows("train")
    flops = steps * tokens * trainer.model.config.flops_per_token()
    machine.say(
        f"step     {step_s:.3g} s, {tokens / step_s:,.0f} tokens/s, {peak_memory(machine.device)}\n"
        f"in all   {steps:,} steps in {steps * step_s / 60:,.1f} minutes, {epochs:,.1f} epochs, "
        f"{flops:.1e} FLOPs\n         a dry run: nothing was written"
    )
    figures = {"steps": steps, "tokens_per_step": tokens, "seconds_per_step": step_s}
    return {"step": 0, "flops": flops} | figures


def peak_memory(device):
    """Return this process's peak memory, in words."""
    if device.type == "cuda":
        return (
            f"{torch.cuda.max_memory_allocated(device) / 2**20:,.0f} MiB of GPU memory at the peak"
        )
    try:
        import resource
    except ImportError:  # Windows
        return "memory not measured"
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":  # where ru_maxrss is in bytes
        kib /= 1024
    return f"{kib / 1024:,.0f} MiB at the peak, including Python and torch"


# ---- The training loop --------------------------------------------------------------------------
def training_loop(settings, machine, folder, progress, started):  # noqa: C901
    """Train on a data set's folder, and return the final figures as a dict.

    progress is kept up to date, so that the caller has it even if the run is stopped.

    Each pass of the loop takes a step: save and evaluate, if it is time | compute the gradients of
    one global batch | update | log. A signal ends the run once its checkpoint is saved.
    """
    out = run_folder(settings, folder)
    state = read_run(settings, out, machine)
    if state is not None:
        with naming_damage(f"the checkpoint in {out}"):
            vars(progress).update(vars(read_progress(state)))
    clock = Clock(settings, progress, started)
    complete_settings(settings, folder, out, state, machine, clock)
    data = Data(folder, settings.block_size, settings.seed)
    model = build_model(settings, data, state, out)
    trainer = Trainer(settings, model, data, machine)
    # A validation loss can be compared with another one only if all of this is the same.
    val_conditions = {"dataset_sha256": data.meta["sha256"], "val_tokens": data.meta["val_tokens"]}
    val_conditions |= {n: getattr(settings, n) for n in ("eval_iters", "batch_size", "block_size")}
    if state is not None:
        with naming_damage(f"the checkpoint in {out}"):
            trainer.load_state_dict(state)
            compare_with_run(settings, state, progress, val_conditions, machine)
    describe(settings, trainer, out, progress)
    if settings.dry_run:
        return plan(settings, trainer)
    writes = machine.rank == 0
    resumed = state is not None
    write_log = None
    if writes:
        write_log = open_run(settings, out, machine, resumed, progress.step)
    del state  # it holds the old file open or, on Windows, a copy of all weights

    def log(**values):
        step_and_time = {"step": progress.step, "elapsed_s": round(clock.spent_s(), 3)}
        if writes:
            write_log(step_and_time | values)

    def save(name, model, **more):
        contents = checkpoint_state(model, data, settings, progress) | more
        if machine.fsdp:
            from extras.fsdp import gather

            contents = gather(contents)
        if writes:
            save_checkpoint(out / name, contents)

    versions = {"version": __version__, "torch": torch.__version__}
    sha256 = data.meta["sha256"]
    log(config=vars(settings), dataset_sha256=sha256, machine=machine.name(), **versions)
    n_val_batches = data.n_val_batches(settings.batch_size)
    bad_steps = 0  # in a row
    get_ready_at = progress.step
    if machine.device.type == "cpu" and progress.step == 0:
        get_ready_at = 1  # the first step precedes compiling, to show at once that all is well
    seconds = []  # those of each step since the last progress line
    clock.begin_loop()
    while True:
        # How much is done? The processes must agree, although their clocks may differ.
        epochs = progress.next_row / data.n_rows("train")
        share_done, stopping = machine.combine(
            [clock.share_done(progress.step, epochs), bool(machine.stop_signals)], "max"
        )
        finished = share_done >= 1
        failing = bad_steps > settings.max_bad_steps

        # Save and evaluate. The checkpoint comes first: what follows it may fail.
        if progress.step % settings.eval_interval == 0 or finished or stopping or failing:
            pause_began = time.monotonic()
            check_finite(model, bad_steps, settings, out, progress)
            progress.trained_s = clock.trained_s()
            progress.spent_s = clock.spent_s()
            more = trainer.state_dict() | {"val_conditions": val_conditions}
            save("ckpt.pt", model, progress=vars(progress), **more)
            if stopping:
                raise StopRequested(
                    f"stopped at step {progress.step:,}: {out / 'ckpt.pt'} is saved"
                )
            eval_began = time.monotonic()
            n_batches = settings.eval_iters
            val_loss = evaluate(trainer.eval_model, data, machine, n_batches, settings.batch_size)
            eval_s = time.monotonic() - eval_began
            log(val_loss=val_loss)
            machine.say(f"step {progress.step:6,} | val loss {val_loss:.4f}")
            if progress.step > 0:
                progress.stale += 1
            if val_loss < progress.best_val_loss and (progress.step > 0 or finished):
                progress.best_val_loss = val_loss
                progress.stale = 0
                save("best.pt", trainer.eval_model)
            if 0 < settings.early_stop <= progress.stale:
                finished = True
                machine.say(f"early stop: {progress.stale} evaluations without a new best")
            if settings.sample_at_eval and not finished:
                print_sample(trainer, settings)
            pause_s = time.monotonic() - pause_began
            # The last evaluation takes more batches than this one.
            more_batches = max(0, n_val_batches / settings.eval_iters - 1)
            progress.reserve_s = 2 * pause_s + eval_s * more_batches
        if finished:
            break

        # Compile, and find the micro-batch that fits, once.
        if progress.step == get_ready_at:
            pause_began = time.monotonic()
            trainer.get_ready()
            clock.exclude(time.monotonic() - pause_began)

        # Gradients of the global batch.
        step_began = time.monotonic()
        schedule_done = share_done
        if settings.lr_decay_iters and not settings.max_minutes:
            schedule_done = min(1, progress.step / settings.lr_decay_iters)
        scale = lr_scale(progress.step, schedule_done, settings)
        set_learning_rates(trainer.optimizers, scale)
        loss = trainer.gradients(progress.next_row)
        progress.next_row += trainer.rows_per_step

        # Update. A step whose gradient is not finite is skipped and counted.
        measured = trainer.update()
        if math.isfinite(measured["grad_norm"]):
            bad_steps = 0
        else:
            bad_steps += 1
            progress.skipped += 1
        progress.step += 1
        seconds.append(time.monotonic() - step_began)

        # Log.
        if progress.step % settings.log_interval == 0 or progress.step == 1:
            loss = machine.mean(loss)
            lr = settings.learning_rate * scale
            step_s = max(1e-9, sum(seconds) / len(seconds))
            seconds = []
            speed = trainer.tokens_per_step / step_s
            mfu = machine.mfu(speed * model.config.flops_per_token())
            log(
                loss=loss,
                lr=lr,
                tokens_per_s=speed,
                mfu=mfu,
                skipped=progress.skipped,
                **measured,
            )
            left_s = seconds_left(settings, clock, progress, trainer, step_s)
            machine.say(progress_line(progress, loss, lr, speed, mfu, left_s))
            trainer.adapt_to_other_processes(left_s)

    if 0 < settings.max_epochs <= progress.next_row / data.n_rows("train"):
        machine.say(f"the run ends here, because max_epochs is {settings.max_epochs:g}")
    title = f"{progress.step:,} steps, {clock.spent_s():.0f} s, whole validation split"
    loss = evaluate(trainer.eval_model, data, machine, n_val_batches, settings.batch_size)
    figures = final_figures(loss, data, machine, title)
    log(**figures)
    print_sample(trainer, settings)
    return figures


def seconds_left(settings, clock, progress, trainer, step_s):
    """Estimate how many seconds a run has left; step_s: those of a step."""
    left_s = (settings.max_iters - progress.step) * step_s
    if settings.max_minutes:
        left_s = clock.left_s() + progress.reserve_s
    if settings.max_epochs:
        rows_left = settings.max_epochs * trainer.data.n_rows("train") - progress.next_row
        left_s = min(left_s, rows_left / trainer.rows_per_step * step_s)
    return left_s


def check_finite(model, bad_steps, settings, out, progress):
    """Raise ValueError if the weights, or too many gradients in a row, are not finite."""
    found = ""
    if bad_steps > settings.max_bad_steps:
        found = f"{bad_steps} gradients in a row"
    elif not whole(nn.utils.get_total_norm(model.parameters())).isfinite():
        found = "weights"
    if found:
        rates = ["learning_rate", f"{settings.optimizer}_lr"]
        lower = [f"--{name}={getattr(settings, name) / 2:g}" for name in rates if name in SETTINGS]
        raise ValueError(
            f"step {progress.step}: {found} are not finite; resume {out} with --init_from=resume "
            f"and lower learning rates, such as {' '.join(lower)}"
        )


def progress_line(progress, loss, lr, speed, mfu, left_s):
    share = "n/a" if mfu is None else f"{mfu:.0%}"
    line = (
        f"step {progress.step:6,} | loss {loss:.4f} | lr {lr:.1e} | {speed:,.0f} tokens/s | "
        f"mfu {share} | {timedelta(seconds=int(max(0, left_s)))} left"
    )
    if progress.skipped:
        line += f" | {progress.skipped} skipped: gradient not finite"
    return line


# ---- Main ---------------------------------------------------------------------------------------
def run(settings, started):
    """Train, or evaluate, as the settings say; return the figures as a dict."""
    machine = set_up_machine(settings)
    progress = Progress()
    figures = {"stopped_by": None}
    try:
        with (
            machine.at_end,
            catch_stop_signals(machine),
            data_folder(settings, machine) as folder,
        ):
            settings.dataset = folder.name  # pydoc, if shakespeare could not be downloaded
            if settings.eval_only:
                figures |= evaluate_checkpoint(settings, machine, folder)
            else:
                figures["out_dir"] = str(run_folder(settings, folder))
                figures |= training_loop(settings, machine, folder, progress, started)
    except StopRequested as e:
        remedy = "; to resume the run, use python gpt.py ... --init_from=resume"
        if settings.eval_only or settings.dry_run:
            remedy = ""
        machine.say(f"{e}{remedy}")
        figures["stopped_by"] = (machine.stop_signals or [signal.SIGTERM])[0]
    except (MemoryError, OSError, RuntimeError) as e:
        if not out_of_memory(e):
            raise
        raise ValueError(memory_is_full(settings)) from e
    except ModuleNotFoundError as e:
        if not str(e.name).startswith("extras"):
            raise
        raise ValueError(f"{e.name} is missing: put the folder extras/ beside gpt.py") from e
    machine.leave()
    if not settings.eval_only:
        figures = {"step": progress.step, "best_val_loss": progress.best_val_loss} | figures
    return figures


def train(**settings):
    """Train with the settings at the top of this file, overridden by keywords; return the figures.

    SIGINT, SIGTERM, SIGHUP and SIGUSR1 save the run and end it; the figures then hold the signal
    as "stopped_by". Raises ValueError and OSError, with a sentence that says what to do.
    """
    return run(checked_settings(**settings), time.monotonic())


def names_for_configs():
    """Return what config files may read besides the settings."""
    found = pick_device(check_setting("device", device, SETTINGS))
    return {"device_type": found.type, "native_bfloat16": native_bfloat16(found)}


def main():
    return run(checked_settings(), STARTED)


def run_as_script():
    """Run with the command line's flags and config files; report a mistake in one sentence."""
    sys.modules["gpt"] = sys.modules["__main__"]  # for hub.py, which a config file may import
    if (HERE / "configurator.py").exists():
        from configurator import run_script

        return run_script(globals(), main, SETTINGS, check_setting, names_for_configs)
    if len(sys.argv) > 1:
        print("error: flags and config files need configurator.py beside gpt.py", file=sys.stderr)
        sys.exit(2)
    try:
        figures = main()
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    if figures["stopped_by"]:
        sys.exit(128 + figures["stopped_by"])


NAMES_OF_THIS_FILE.update(globals())

if __name__ == "__main__" and "__file__" in globals():
    run_as_script()
elif __name__ == "__main__":  # pasted into a notebook cell
    main()
