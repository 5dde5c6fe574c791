# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9,<2.14", "numpy", "tiktoken"]
# ///
"""gpt.py: a modern GPT and its whole training loop in one file.

    python gpt.py config/train_shakespeare.py           train; each setting below is also a flag, --key=value
    torchrun --standalone --nproc_per_node=8 gpt.py     train on 8 GPUs, with the same global batches
    python sample.py --prompt "ROMEO:"                  let the newest run continue a text
Or paste this file into a notebook cell and run it."""

import time

__started__ = time.time()  # before torch, whose import takes seconds: max_minutes counts from here
import base64, ctypes, hashlib, json, math, os, shutil, signal, sys, threading, urllib.request, zipfile
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# ---- Settings: each comment is its help text (python gpt.py --help); the sizes suit two CPU cores ----------
dataset = "shakespeare"  # folder under data_dir; shakespeare and pydoc are prepared when missing
data_dir = ""  # folder of the data sets; empty: data/ beside gpt.py
out_dir = ""  # folder of this run's checkpoints and log; empty: out/<dataset> beside gpt.py
init_from = (
    "scratch"  # scratch | resume | auto: resume, if there is a run | model to finetune: path or id
)
seed = 1337  # of weights, batches, dropout and samples
eval_only = False  # only evaluate init_from, or else out_dir/best.pt, on the full validation split
eval_text = ""  # a text file to evaluate on instead
eval_stride = (
    0  # then tokens from window to window; few let each see more of them; 0: block_size, the most
)
eval_interval = 250  # steps between evaluations, each preceded by a checkpoint
early_stop = 0  # end after so many evaluations in a row without a new best; 0: never
eval_iters = 20  # batches per evaluation; the run ends with one over the full validation split
log_interval = 50  # steps between progress lines
tensorboard = False  # log to TensorBoard, too, in out_dir/tensorboard
wandb_log = (
    False  # log to Weights & Biases, too; WANDB_PROJECT, WANDB_MODE=offline and so on are its own
)
sample_at_eval = False  # print a sample at each evaluation, not only at the end
sample_tokens = 300  # length of these samples in tokens; 0: none
keep_checkpoints = 2  # the newest, and those before it, from which to resume should it be damaged
max_bad_steps = (
    10  # steps in a row may have no finite gradient, and are skipped; one more ends the run
)
dry_run = False  # only print the plan, with the speed of three steps, and write nothing
# model
block_size = 256  # context length in tokens
n_layer = 4  # blocks
n_head = 4  # query heads per block
n_kv_head = (
    1  # key/value heads per block, shared by groups of query heads (GQA; 1: MQA; n_head: MHA)
)
n_embd = 128  # width of the residual stream
mlp_ratio = (
    4.0  # MLP width over n_embd; SwiGLU, with a third matrix, takes 2/3 of it, in steps of 32
)
dropout = 0.0  # share of channels dropped in training: of the embedding and of what each block adds
train_temperature = (
    1.0  # logits are divided by it in training alone: below 1 the model in use is less sure
)
bias = False  # biases in linear layers and LayerNorm
use_rope = True  # rotary positions; False: learned positions
use_rms_norm = True  # RMSNorm; False: LayerNorm
use_swiglu = True  # SwiGLU; False: GELU
qk_norm = True  # RMSNorm on queries and keys
tie_weights = False  # one matrix for token embedding and output head
lora_rank = (
    0  # above 0: finetune small matrices of this rank beside the frozen ones of init_from (LoRA)
)
gradient_checkpointing = (
    False  # recompute blocks in the backward pass: less memory, a third more work
)
# batches and optimizer
batch_size = 8  # sequences per micro-batch
gradient_accumulation_steps = 1  # micro-batches per step over all processes, which share them
optimizer = "muon"  # muon: Muon for the blocks' matrices, AdamW for the rest | adamw: AdamW for all
learning_rate = 6e-3  # peak rate of AdamW
muon_lr = 0.03  # peak rate of Muon
muon_momentum = 0.9  # Muon's decay of the gradient's mean
weight_decay = 0.0  # decoupled decay of matrices and embeddings, per unit of learning rate
beta1 = 0.9  # AdamW's decay of the gradient's mean
beta2 = 0.95  # AdamW's decay of the gradient's mean square
grad_clip = 1.0  # largest gradient norm; 0: no clipping
# schedule
max_iters = 2000  # steps, each one update
max_minutes = (
    0.0  # above 0: minutes the whole process may take, instead of max_iters; the schedule follows
)
warmup_iters = 20  # steps of linear warm-up
lr_schedule = "linear"  # then cosine | linear | wsd: constant, the last fifth linear | constant
lr_decay_iters = 0  # step at which min_lr is reached; 0: the last
min_lr = 0.0  # final learning_rate; muon_lr falls in proportion
# machine
device = "auto"  # auto: cuda, else mps, else cpu | any torch device, as cuda:1
dtype = "auto"  # auto: by hardware | float32 | bfloat16 | float16 with loss scaling, on CUDA only
fsdp = False  # under torchrun each GPU holds its share of weights, gradients and averages, not all of them
cuda_graphs = True  # record a step on one GPU, and replay it: no kernel waits for Python
compile: bool | None = (
    None  # torch.compile; None: in runs so long that it pays, about 2 minutes and more
)

SETTINGS = [
    k
    for k, v in globals().items()
    if k[0] != "_" and isinstance(v, bool | int | float | str | None)
]
HERE = Path(__file__).resolve().parent if "__file__" in globals() else Path.cwd()

# ---- Tokenizer ---------------------------------------------------------------------------------------------
CHAT = "%s||<|user|>%s<|assistant|>||%s"  # what stands around a system text, a question, an answer


class Tokenizer:
    """Text to ids and back by a tiktoken.Encoding; data sets and checkpoints hold `state`, strings only.
    kind "char": one id per character of `chars`; "bpe": `ranks` are the tokens' bytes in base64, `pattern`
    cuts words; `json`: the tokenizers library's; other kinds are tiktoken's. special: names of tokens that no
    text gives, behind the others or at `special_ids`; `begin` begins texts, `end` ends documents, answers."""

    def __init__(
        self,
        kind,
        chars="",
        ranks="",
        pattern="(?s:.)",
        special="",
        special_ids="",
        json="",
        begin="",
        end="<|endoftext|>",
        chat=CHAT,
    ):
        self.state = {k: v for k, v in locals().items() if k != "self"}
        tokens = [c.encode() for c in chars] or [base64.b64decode(token) for token in ranks.split()]
        names, n = special.split(), len(tokens)
        special = dict(zip(names, map(int, special_ids.split() or range(n, n + len(names)))))
        free = sorted({*range(n + len(names))} - {*special.values()})  # the other tokens' ids
        if tokens:
            self.encoding = tiktoken.Encoding(
                kind,
                pat_str=pattern,
                special_tokens=special,
                mergeable_ranks=dict(zip(tokens, free)),
            )
        else:
            from tokenizer_json import other_encoding

            self.encoding = other_encoding(kind, json)
        self.vocab_size, self.chat = self.encoding.n_vocab, chat.split("||")
        self.special = {
            s: self.encoding.encode_single_token(s) for s in self.encoding.special_tokens_set
        }
        self.begin, self.end = self.special.get(begin), self.special.get(end)

    def encode(self, text):
        """Return text's ids, a list: [2, 0, 1] of "cab" with chars "abc". Raises ValueError for others."""
        chars = self.state["chars"]
        if chars and (unknown := set(text) - set(chars)):
            i, known = (
                min(map(text.index, unknown)),
                "".join(c for c in chars if c.isprintable())[:100],
            )
            raise ValueError(
                f"the vocabulary, {known!r}, lacks {text[i]!r}, character {i} of the text"
            )
        return self.encoding.encode_ordinary(text)

    def decode_bytes(self, ids):
        return self.encoding.decode_bytes(ids)  # a BPE token may end in a character

    def decode(self, ids):
        return self.decode_bytes(ids).decode(errors="replace")


# ---- Model -------------------------------------------------------------------------------------------------
@dataclass
class GPTConfig:
    """What rebuilds a model (defaults: not the settings'). GPT-2: bias, n_kv_head = n_head, no use_ part."""

    block_size: int = 256
    vocab_size: int = 8192
    n_layer: int = 6
    n_head: int = 6
    n_kv_head: int = 3
    n_embd: int = 384
    mlp_ratio: float = 4.0
    dropout: float = 0.1
    train_temperature: float = 1.0
    bias: bool = False
    use_rope: bool = True
    use_rms_norm: bool = True
    use_swiglu: bool = True
    qk_norm: bool = False
    tie_weights: bool = True
    gradient_checkpointing: bool = False
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # Llama 3.1's four numbers, see pretrained.py
    norm_eps: float = 1e-5

    def __post_init__(self):
        for name in (
            "block_size",
            "vocab_size",
            "n_layer",
            "n_head",
            "n_kv_head",
            "n_embd",
            "mlp_hidden",
        ):
            value, most = getattr(self, name), 2**16 if name == "n_layer" else 2**31
            if not 1 <= value <= most:
                raise ValueError(f"{name} is {value}: it must be from 1 to {most}")
        for name, part in (("n_embd", "n_head"), ("n_head", "n_kv_head")):
            if (n := getattr(self, name)) % (of := getattr(self, part)):
                raise ValueError(f"{name} ({n}) must be a multiple of {part} ({of})")
        if self.use_rope and self.head_dim % 2:
            raise ValueError(
                f"n_embd / n_head is {self.head_dim}: rotary positions need an even number"
            )
        if not (0 < (t := self.train_temperature) < math.inf and 0 <= self.dropout < 1):
            raise ValueError(
                f"dropout is {self.dropout}: from 0 to below 1; train_temperature {t}: above 0"
            )

    head_dim = property(lambda self: self.n_embd // self.n_head)
    mlp_hidden = property(
        lambda self: (
            32 * round(self.mlp_ratio * self.n_embd * 2 / 3 / 32)
            if self.use_swiglu
            else round(self.mlp_ratio * self.n_embd)
        )
    )


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm (arXiv:1910.07467), weight and result in x's dtype: its fused kernel needs them so."""

    def forward(self, x):
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps).to(x.dtype)


def make_norm(config):
    size = config.n_embd, config.norm_eps
    return RMSNorm(*size) if config.use_rms_norm else nn.LayerNorm(*size, bias=config.bias)


def rotary_table(config):
    """Return cos and sin of all positions' angles, (2, block_size, d/2) float32: components i and i + d/2 of
    a head turn by position * rope_theta^(-2i / d) radians (arXiv:2104.09864; Hugging Face's layout)."""
    speeds = config.rope_theta ** -(torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    if config.rope_scaling:
        from pretrained import slow_down

        speeds = slow_down(speeds, **config.rope_scaling)
    angles = torch.outer(torch.arange(config.block_size), speeds)
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x, rotary):
    """Turn x (B, T, heads, d) by its positions' rows of the table (2, B or 1, T, 1, d/2)."""
    (a, b), (cos, sin) = x.chunk(2, -1), rotary
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def attention(q, k, v, mask=None):
    """Attend from q (B, n_head, T, d) to k, v (B, n_kv_head, S, d); the one place that knows backends.
    mask: (B, 1, T, S) bool, True where a query may look; None: causal, S = T. Returns (B, n_head, T, d)."""
    B, n_head, T, d = size = q.shape
    groups = n_head // (n_kv_head := k.size(1))  # query heads per key/value head (arXiv:2305.13245)
    if mask is None and q.dtype == torch.bfloat16 and q.device.type in ("cpu", "mps"):
        # SDPA is slower on a CPU, and on MPS it looks ahead (pytorch issue 195910)
        k, v, parts = k.reshape(-1, T, d), v.reshape(-1, T, d), []
        for i, n in zip(
            range(0, T, 128), [*range(128, T, 128), T]
        ):  # queries i to n, with the keys they see
            future = q.new_full((n - i, n), -torch.inf).triu(1 + i).repeat(groups, 1)
            rows = q[:, :, i:n].reshape(len(k), -1, d)
            scores = torch.baddbmm(future, rows, k[:, :n].mT, alpha=d**-0.5)
            parts.append((scores.softmax(-1) @ v[:, :n]).view(B, n_head, n - i, d))
        return torch.cat(parts, 2)
    major = (
        torch.cuda.get_device_capability(q.device)[0]
        if q.is_cuda and q.dtype != torch.float32
        else 0
    )
    one_query = (
        T == 1 and major == 9 and (torch.version.cuda or "") >= "13"
    )  # for which cuDNN knows groups
    gqa = groups > 1 and (
        major >= 8 if mask is None else one_query
    )  # without a mask flash attention does
    if groups > 1 and mask is None and not gqa:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    elif groups > 1 and not gqa:  # the heads of a group serve as rows
        q, mask = q.reshape(B, n_kv_head, groups * T, d), mask.repeat(1, 1, groups, 1)
    return F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=mask is None, enable_gqa=gqa
    ).reshape(size)


def to_device(t, device):  # from pinned memory, so that Python need not wait for the copy
    return (t.pin_memory() if t.is_cpu and device.type == "cuda" else t).to(
        device, non_blocking=True
    )


class Replay:
    """A function of tensors and numbers whose third call, on a GPU, is recorded as a CUDA graph, which calls
    of the same shapes replay: no kernel waits for Python. A result holds until the next call."""

    def __init__(self, function, device, generator=None):
        self.function, self.device, self.generator, self.inputs = function, device, generator, []

    def __call__(self, *inputs):
        if self.device.type != "cuda" or not cuda_graphs:
            return self.function(*inputs)
        inputs = [to_device(torch.as_tensor(t), self.device) for t in inputs]
        if [t.shape for t in inputs] != [t.shape for t in self.inputs]:
            self.inputs, self.calls, self.graph = (
                [t.clone() for t in inputs],
                0,
                torch.cuda.CUDAGraph(),
            )
        torch._foreach_copy_(self.inputs, inputs)
        self.calls += 1
        if self.calls < 3:  # in which is set up, or compiled, what cannot be recorded
            return self.function(*self.inputs)
        if self.calls == 3:
            if self.generator is not None:
                self.graph.register_generator_state(self.generator)
            with torch.cuda.graph(
                self.graph, stream=torch.cuda.Stream(self.device)
            ):  # no .item() in here
                self.result = self.function(*self.inputs)
        self.graph.replay()
        return self.result


class KVCache:
    """Keys and values of every layer, allocated once; pos (B,) counts the tokens in each row. GPT.forward
    appends T tokens to every row and advances pos; lowering pos[b] forgets row b's last ones."""

    def __init__(self, config, batch_size, device="cpu", dtype=torch.float32):
        shape = (batch_size, config.n_kv_head, config.block_size, config.head_dim)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.v = [torch.zeros_like(k) for k in self.k]
        self.pos = torch.zeros(batch_size, device=device, dtype=torch.long)

    def update(self, layer, k, v, positions):
        """Write k, v (B, n_kv_head, T, head_dim) at positions (B, T); return all of the layer's."""
        rows = torch.arange(len(positions), device=k.device)[:, None]
        for store, new in ((self.k[layer], k), (self.v[layer], v)):
            store[rows, :, positions] = new.transpose(1, 2).to(store.dtype)
        return self.k[layer], self.v[layer]


class CausalSelfAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.heads = [config.n_head, config.n_kv_head, config.n_kv_head]  # of q, k, v
        self.parts = [n * config.head_dim for n in self.heads]  # their rows in c_attn
        self.c_attn = nn.Linear(config.n_embd, sum(self.parts), bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.qk_norm = (
            RMSNorm(self.head_dim, config.norm_eps, False) if config.qk_norm else nn.Identity()
        )

    def forward(self, x, positions, rotary, mask, cache):
        B, T, C = x.shape
        qk, v = (
            self.c_attn(x)
            .view(B, T, -1, self.head_dim)
            .split((sum(self.heads[:2]), self.heads[2]), 2)
        )
        qk = self.qk_norm(qk) if rotary is None else rotate(self.qk_norm(qk), rotary)
        q, k, v = (
            t.transpose(1, 2) for t in (*qk.split(self.heads[:2], 2), v)
        )  # (B, heads, T, head_dim)
        if cache is not None:
            k, v = cache.update(self.layer, k, v, positions)  # (B, n_kv_head, block_size, head_dim)
        y = attention(q.to(k.dtype), k, v, mask)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C).to(x.dtype))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.parts = [config.mlp_hidden] * (
            2 if config.use_swiglu else 1
        )  # rows of gate, up in c_fc
        self.c_fc = nn.Linear(config.n_embd, sum(self.parts), bias=config.bias)
        self.c_proj = nn.Linear(config.mlp_hidden, config.n_embd, bias=config.bias)

    def forward(self, x):
        hidden = self.c_fc(x)
        if len(self.parts) == 1:
            return self.c_proj(F.gelu(hidden, approximate="tanh"))
        gate, up = hidden.chunk(2, dim=-1)  # SwiGLU (arXiv:2002.05202)
        return self.c_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1, self.attn = make_norm(config), CausalSelfAttention(config, layer)
        self.ln_2, self.mlp = make_norm(config), MLP(config)
        self.drop = nn.Dropout1d(config.dropout)  # of channels, alike for all T (arXiv:1512.05287)

    def forward(self, x, positions, rotary, mask, cache):
        x = x + self.drop(self.attn(self.ln_1(x), positions, rotary, mask, cache).mT).mT
        return x + self.drop(self.mlp(self.ln_2(x)).mT).mT


class HeadLoss(torch.autograd.Function):
    """The sum of w (N,) times the loss in nats of y (N,), for x (N, n_embd) and the head's weight. Gradients
    come along, for about `most` logits at a time, the head's summed in x's dtype. y may be -1 if w is 0."""

    @staticmethod
    def forward(ctx, x, weight, y, w, learn=True, most=0):
        pad, cap = (
            (-len(weight) % 64, 2**27) if x.is_cuda else (0, 2**25)
        )  # tensor cores want multiples
        head = F.pad(weight.to(x.dtype), (0, 0, 0, pad))
        bias = F.pad(head.new_zeros(len(weight)), (0, pad), value=-torch.inf)
        ids, n_parts = (
            torch.arange(len(head), device=x.device),
            math.ceil(len(x) * len(head) / (most or cap)),
        )
        loss, grad_x, grad_head = (
            0,
            [],
            torch.zeros_like(head if weight.requires_grad else head[:0]),
        )
        for rows, targets, factor in zip(
            *(t.chunk(n_parts) for t in (x, y.clamp(0)[:, None], w[:, None]))
        ):
            log_probs = F.linear(rows, head, bias).log_softmax(-1, dtype=torch.float32)
            loss = loss - (log_probs.gather(1, targets) * factor).sum()
            if learn:
                grad = log_probs.exp_().sub_((ids == targets).float()).mul_(factor).to(x.dtype)
                grad_x.append(grad @ head)
                grad_head = (
                    torch.addmm(grad_head, grad.mT, rows) if weight.requires_grad else grad_head
                )
        if learn:
            ctx.save_for_backward(torch.cat(grad_x), grad_head[: len(weight)].to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx, grad):
        return *(g * grad for g in ctx.saved_tensors), None, None, None, None


class GPT(nn.Module):
    """A decoder-only transformer: token embedding, blocks on one residual stream, norm, output head."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = None if config.use_rope else nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout1d(config.dropout)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = make_norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.wte.weight
        self.register_buffer(
            "rotary", rotary_table(config) if config.use_rope else None, persistent=False
        )
        self.base = ""  # the checkpoint, folder or id that it was finetuned from
        self.init_weights()

    def init_weights(self):
        """Draw the weights anew, normal: matrices by 1 / sqrt(columns), embeddings by 0.3, c_proj and head 0;
        if tied, as GPT-2's, by 0.02, embeddings by 0.01, c_proj by 0.02 / sqrt(2 n_layer)."""
        tied = self.config.tie_weights
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02 if tied else module.in_features**-0.5)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        for proj in (proj for block in self.h for proj in (block.attn.c_proj, block.mlp.c_proj)):
            nn.init.normal_(
                proj.weight, std=0.02 / math.sqrt(2 * self.config.n_layer) if tied else 0.0
            )
        nn.init.zeros_(self.lm_head.weight)
        for table in (self.wte, self.wpe or self.wte):  # after lm_head, whose weight wte's may be
            nn.init.normal_(table.weight, std=0.01 if tied else 0.3)

    def forward(self, idx, targets=None, cache=None, weights=None, at=None):
        """Return logits (B, T, vocab_size), None with weights, and the targets' mean loss in nats, or None.
        idx, targets: (B, T) int64; -1 does not count, others by weights (B, T). cache: what idx continues.
        at (B,): positions whose logits alone are made, (B, 1, vocab_size). The loss has its own: HeadLoss."""
        T, block_size, kind = idx.size(1), self.config.block_size, idx.device.type
        assert T <= block_size, f"{T} tokens do not fit block_size {block_size}"
        positions = torch.arange(T, device=idx.device)[None] + (
            0 if cache is None else cache.pos[:, None]
        )
        x = (
            self.wte(idx) if self.wpe is None else self.wte(idx) + self.wpe(positions)
        )  # (B, T, n_embd)
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        x = self.drop(
            (x.to(dtype) if dtype == torch.bfloat16 else x).mT
        ).mT  # faster; float16 lacks range
        rotary = None if self.rotary is None else self.rotary[:, positions].unsqueeze(3).to(dtype)
        rows = positions[
            :, None, :, None
        ]  # with a cache a query sees what came before, not the unused rest
        mask = None if cache is None else torch.arange(block_size, device=idx.device) <= rows
        save_memory = self.config.gradient_checkpointing and self.training
        for block in (
            self.h if self.training else [b._call_impl for b in self.h]
        ):  # only training is compiled
            run = partial(checkpoint, block, use_reentrant=False) if save_memory else block
            x = run(x, positions, rotary, mask, cache)
        if cache is not None:
            cache.pos += T
        x = self.ln_f(x if at is None else x[torch.arange(len(x)), at][:, None]).to(dtype)
        x = x / self.config.train_temperature if self.training else x  # as if the logits were
        logits = self.lm_head(x) if weights is None else None
        if targets is None:
            return logits, None
        y, learn = targets.flatten(), torch.is_grad_enabled()
        w = (y >= 0) * (1.0 if weights is None else weights.flatten())
        loss = HeadLoss.apply(x.flatten(0, 1), self.lm_head.weight, y, w, learn)
        return logits, loss / w.sum().clamp(min=1e-6)

    @staticmethod
    def from_pretrained(path, **options):  # of a Hugging Face folder or hub id
        from pretrained import load_model

        return load_model(path, **options)

    def n_params(self):
        return sum(p.numel() for p in self.parameters())  # a tied matrix counts once

    def flops_per_token(
        self,
    ):  # training's: 6 a multiplying weight, and attention's (arXiv:2204.02311)
        c = self.config
        lookups = c.n_embd * (c.vocab_size * (not c.tie_weights) + c.block_size * (not c.use_rope))
        return 6 * (self.n_params() - lookups) + 12 * c.n_layer * c.n_embd * c.block_size

    @torch.inference_mode()
    def generate(self, idx, max_tokens, pick=None, forward=None, **sampling):
        """Yield max_tokens tensors (B,) of next ids for idx: (B, T) int64, or B lists of ids of any lengths.
        context_length says what is seen. pick: if not sample_next; forward: compiled, for single ids only."""
        device, block_size, lengths = (
            self.ln_f.weight.device,
            self.config.block_size,
            [len(p) for p in idx],
        )
        if not all(lengths):
            raise ValueError("a prompt is empty: give at least one token")
        texts = [torch.as_tensor(prompt, dtype=torch.long, device=device) for prompt in idx]
        dtype = torch.float32 if device.type == "cpu" else self.ln_f.weight.dtype
        cache, drawn = KVCache(self.config, len(lengths), device, dtype), []
        choose = partial(sample_next, **sampling) if pick is None else lambda logits: logits
        run, draws = forward or self._call_impl, sampling.get("generator")
        advance = Replay(
            lambda last: choose(run(last[:, None], cache=cache)[0][:, -1]), device, draws
        )
        for step in range(max_tokens):
            kept = [context_length(n + step, block_size) for n in lengths]
            if step == 0 or any(
                k <= context_length(n + step - 1, block_size) for n, k in zip(lengths, kept)
            ):
                cache.pos.zero_()  # read the texts anew, padded on the right, where causality hides it
                new = [
                    list(ids.split(1)) for ids in drawn[-block_size:]
                ]  # of each step: one of each row
                tails = [torch.cat(row)[-k:] for k, row in zip(kept, zip(texts, *new))]
                padded, ends = (
                    nn.utils.rnn.pad_sequence(tails, batch_first=True),
                    torch.tensor(kept) - 1,
                )
                chosen = choose(self._call_impl(padded, cache=cache, at=ends.to(device))[0][:, 0])
                cache.pos.copy_(ends + 1)  # forget the padding
            else:
                chosen = advance(drawn[-1])
            drawn.append(chosen.clone() if pick is None else pick(chosen, **sampling))
            yield drawn[-1]


# ---- Generation --------------------------------------------------------------------------------------------
def sample_next(logits, temperature=0.8, top_k=200, top_p=0.9, min_p=0.0, generator=None):
    """Draw one id (B,) int64 per row of logits (B, vocab_size): of the top_k likeliest, of the fewest of them
    that reach top_p (arXiv:1904.09751), of none below min_p times the first's share (arXiv:2407.01082)."""
    if temperature < 1e-6:
        return logits.argmax(-1)
    logits, ids = logits.topk(min(top_k or 2**31, logits.size(-1)))  # best first
    probs = (logits.float() / temperature).softmax(-1)
    probs = probs * (probs.cumsum(-1) - probs < top_p) * (probs >= min_p * probs[:, :1])
    noise = torch.empty_like(probs).exponential_(generator=generator)
    return ids.gather(-1, (probs / noise).argmax(-1, keepdim=True))[
        :, 0
    ]  # by probs, with no wait for a GPU


def context_length(n, block_size):
    """Return how many of the last of n tokens the model sees: all that fit, else half a block to a block.
    When the block is full its older half is forgotten at once, so that the cache is refilled only then."""
    return (
        n
        if n <= block_size
        else block_size // 2 + 1 + (n - block_size - 1) % math.ceil(block_size / 2)
    )


# ---- Optimizer ---------------------------------------------------------------------------------------------
def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # FSDP's shards


def orthogonalize(G, dtype=torch.float32):
    """Return nearly UV^T, singular values of about 0.7 to 1.2, for each G = USV^T of a batch (n, rows, cols):
    five Newton-Schulz steps of the quintic in kellerjordan.github.io/posts/muon, in `dtype`."""
    X = G.mT if G.size(1) > G.size(2) else G
    X = (X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(5):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315), X, beta=3.4445)
    return X.mT if G.size(1) > G.size(2) else X


class Muon(torch.optim.Optimizer):
    """Momentum whose updates turn all directions of a hidden matrix alike, not mostly the few strong ones.
    Not for embeddings and head, whose rows are tokens, nor norms, biases. A group's matrices, of one shape,
    are a batch; parts: rows of those fused. lr: updates' spectral norm, times sqrt(rows / cols) if tall."""

    def __init__(self, param_groups, lr, momentum=0.95, weight_decay=0.0, dtype=torch.float32):
        super().__init__(
            param_groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        )
        self.dtype, self.found_inf = dtype, None  # of the Newton-Schulz steps; see step

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params, lr, momentum = group["params"], group["lr"], group["momentum"]
            for p in (p for p in params if p not in self.state):
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            averages, grads = (
                [self.state[p]["momentum_buffer"] for p in params],
                [p.grad for p in params],
            )
            if self.found_inf is not None:  # 1: change nothing, as torch's fused AdamW does
                finite = self.found_inf == 0
                grads = [grad.where(finite, average) for grad, average in zip(grads, averages)]
                lr = lr * (1 - self.found_inf)
            torch._foreach_lerp_(averages, grads, 1 - momentum)
            updates = torch.stack([*map(whole, torch._foreach_lerp(grads, averages, momentum))])
            parts = [
                orthogonalize(part, self.dtype) * (-lr * max(1, part.size(1) / part.size(2)) ** 0.5)
                for part in updates.split(group["parts"], dim=1)
            ]  # updates: (n, rows, cols)
            updates = list(torch.cat(parts, dim=1).float())
            if hasattr(params[0], "full_tensor"):
                from scaling import shard

                updates = [*map(shard, updates, params)]
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            torch._foreach_add_(params, updates)


def make_optimizers(model, machine):
    """Return [AdamW] or [AdamW, Muon], as the setting says; together they hold every parameter once."""
    width, first, blocks = [model.config.n_embd], model.h[0], model.h if optimizer == "muon" else []
    kinds = zip(*((b.attn.c_attn, b.attn.c_proj, b.mlp.c_fc, b.mlp.c_proj) for b in blocks))
    parts = (first.attn.parts, width, first.mlp.parts, width)
    hidden = [
        {"params": [m.weight for m in kind], "parts": rows} for kind, rows in zip(kinds, parts)
    ]
    taken = {id(p) for group in hidden for p in group["params"]}
    rest = [p for p in model.parameters() if id(p) not in taken and p.requires_grad]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]  # norms, biases
    fast = machine.dtype != torch.bfloat16 or native_bfloat16(machine.device)
    ns_dtype = machine.dtype if fast else torch.float32  # of the Newton-Schulz steps
    muon = [Muon(hidden, muon_lr, muon_momentum, weight_decay, ns_dtype)] if hidden else []
    return [torch.optim.AdamW(groups, learning_rate, (beta1, beta2), fused=True), *muon]


# ---- Data: data/<name>/{train.bin, val.bin, meta.json} -----------------------------------------------------
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_URLS = [
    f"https://{mirror}/data/tinyshakespeare/input.txt"
    for mirror in (
        "raw.githubusercontent.com/karpathy/char-rnn/master",
        "cdn.jsdelivr.net/gh/karpathy/char-rnn@master",
    )
]


def corpus(name):
    """Return (text, source) of shakespeare or pydoc. Raises ConnectionError where no mirror has the one."""
    if name == "pydoc":  # English documentation, half a megabyte, ships with every CPython
        from pydoc_data.topics import topics

        return "\n\n".join(
            topics[k].strip() for k in sorted(topics)
        ) + "\n", "Python's pydoc_data.topics"
    for url in SHAKESPEARE_URLS:
        try:
            content, problem = urllib.request.urlopen(url, timeout=15).read(), "its sha256 is wrong"
            if hashlib.sha256(content).hexdigest() == SHAKESPEARE_SHA256:
                return content.decode(), "tiny Shakespeare"
        except Exception as e:  # noqa: BLE001  # networks fail in many ways
            problem = e
    raise ConnectionError(
        f"{url}: no download ({problem}); prepare.py shakespeare --input=FILE takes a copy"
    )


def write_dataset(folder, text, tokenizer, source, val_fraction=0.1):
    """Write text, its last val_fraction for validation, as train.bin, val.bin, meta.json; return the meta."""
    dtype, cut = (
        "uint16" if tokenizer.vocab_size <= 2**16 else "uint32",
        int(len(text) * (1 - val_fraction)),
    )
    meta = {
        "source": source,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "dtype": dtype,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": tokenizer.state,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for old in (folder / "meta.json", *folder.glob("*.bin")):
        old.unlink(missing_ok=True)  # a run that has them open keeps the old ones
    for split, part in (("train", text[:cut]), ("val", text[cut:])):
        ids = np.array(tokenizer.encode(part), np.dtype(dtype).newbyteorder("<"))
        ids.tofile(folder / f"{split}.bin")
        meta |= {f"{split}_tokens": len(ids), f"{split}_bytes": len(part.encode())}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
    return meta


def prepare_if_missing(name):
    """Return the folder of a data set, made first, if need be, where gpt.py knows how; or else pydoc's."""
    folder = Path(data_dir or HERE / "data") / name
    if name in ("shakespeare", "pydoc") and not (folder / "meta.json").exists():
        try:
            text, source = corpus(name)
        except ConnectionError as e:
            print(f"{e}; training on pydoc, Python's own documentation, instead")
            return prepare_if_missing("pydoc")
        write_dataset(folder, text, Tokenizer("char", "".join(sorted(set(text)))), source)
    return folder


class Tokens:
    """The numbers in <name>.bin, or in <name>_0000.bin, <name>_0001.bin and so on, taken as one array."""

    def __init__(self, folder, name, dtype):
        paths = sorted(folder.glob(f"{name}_*.bin")) or folder.glob(f"{name}.bin")
        self.files, self.dtype = [open(path, "rb") for path in paths], dtype  # noqa: SIM115
        self.bounds = np.cumsum(
            [0, *(os.fstat(f.fileno()).st_size // dtype.itemsize for f in self.files)]
        )

    def __len__(self):
        return int(self.bounds[-1])

    def __getitem__(self, positions):
        """Return the numbers at positions (int64). Files stay mapped no longer: pages read would add up."""
        found, file = (
            np.empty(positions.shape, self.dtype),
            self.bounds.searchsorted(positions, "right") - 1,
        )
        for i in np.unique(file):
            here = file == i
            try:
                found[here] = np.memmap(self.files[i], self.dtype, "r")[
                    positions[here] - self.bounds[i]
                ]
            except (IndexError, ValueError) as e:
                raise OSError(
                    f"{self.files[i].name} has become shorter: prepare the data set again"
                ) from e
        return found


@lru_cache(maxsize=2)
def epoch_order(
    n_rows, n_offsets, seed, epoch
):  # an offset below n_offsets and an order of the rows
    rng = np.random.default_rng((seed, epoch))
    return int(rng.integers(n_offsets)), rng.permutation(np.arange(n_rows, dtype=np.uint32))


class Data:
    """A data set whose batches depend on seed and step alone; with weights, no row reaches from one example,
    which ends with tokenizer.end, into the next. Raises FileNotFoundError, ValueError."""

    def __init__(self, folder, block_size, splits=("train", "val")):
        self.folder, self.block_size, self.tokens, self.weights, self.starts = (
            folder,
            block_size,
            {},
            {},
            {},
        )
        if not (folder / "meta.json").exists():
            raise FileNotFoundError(
                f"{folder} holds no data set: python prepare.py --input=FILE "
                f"--name={folder.name} makes one; prepare.py --help tells of others"
            )
        try:
            self.meta = json.loads((folder / "meta.json").read_bytes())
            keys = "sha256", "dtype", "vocab_size", "train_tokens", "val_tokens", "val_bytes"
            _, dtype, *numbers = (self.meta[key] for key in keys)
            if (
                {*map(type, numbers)} != {int}
                or min(numbers) < 0
                or dtype not in ("uint16", "uint32")
            ):
                raise TypeError(f"{dtype}, {numbers}")
            dtype, self.tokenizer = (
                np.dtype(dtype).newbyteorder("<"),
                Tokenizer(**self.meta["tokenizer"]),
            )
        except Exception as e:  # tiktoken documents none
            raise ValueError(
                f"{folder / 'meta.json'} is damaged ({e!r}): prepare the data set again"
            ) from e
        self.weighted = any(folder.glob("*.weight*.bin"))
        for split in splits:
            n, tokens = self.meta[f"{split}_tokens"], Tokens(folder, split, dtype)
            weights = Tokens(folder, f"{split}.weight", np.dtype("uint8"))
            if len(tokens) != n or len(weights) != n * self.weighted:
                raise ValueError(
                    f"{folder} holds {len(tokens)} of {n} tokens for {split}: prepare it again"
                )
            last = n - 1 if split == "val" else max(n > block_size, n - 2 * block_size)
            starts = range(0, last, block_size)
            if self.weighted:
                ends = np.flatnonzero(tokens[np.arange(n)] == self.tokenizer.end) + 1
                starts = [i for a, b in zip([0, *ends], ends) for i in range(a, b - 1, block_size)]
            if not starts:
                raise ValueError(
                    f"{split} holds {n} tokens: lower block_size {block_size} or add text"
                )
            self.tokens[split], self.weights[split], self.starts[split] = tokens, weights, starts

    def start(self, split, row):
        """Return where a row begins: of "val" in order, of "train" each once an epoch, shuffled by `seed`."""
        starts, n_tokens = self.starts[split], len(self.tokens[split])
        if split == "val":
            return starts[row] if row < len(starts) else n_tokens
        n_offsets = 1 if self.weighted else n_tokens - len(starts) * self.block_size
        offset, order = epoch_order(len(starts), n_offsets, seed, row // len(starts))
        return starts[order[row % len(starts)]] + offset

    def get_batch(self, split, step, batch_size):
        """Return inputs, targets (batch_size, block_size) int64, weights float32; past the end 0, -1, 0."""
        tokens, rows = self.tokens[split], range(step * batch_size, (step + 1) * batch_size)
        positions = np.array([[self.start(split, row)] for row in rows]) + np.arange(
            self.block_size + 1
        )
        inside, positions = positions < len(tokens), np.minimum(positions, len(tokens) - 1)
        ids = np.where(inside, tokens[positions], np.int64(-1))
        if ids.max() >= (n := self.meta["vocab_size"]):
            raise ValueError(
                f"{self.folder} holds id {ids.max()} of {n}: prepare the data set again"
            )
        x, y, w = ids[:, :-1].clip(min=0), ids[:, 1:].copy(), inside[:, 1:].astype(np.float32)
        if self.weighted:
            ended = (x == self.tokenizer.end).cumsum(1) > 0  # another example follows
            w *= ~ended * self.weights[split][positions[:, 1:]] / np.float32(255)
        return [torch.from_numpy(array) for array in (x, y, w)]

    def n_val_batches(self):
        return math.ceil(len(self.starts["val"]) / batch_size)


# ---- Schedule and evaluation -------------------------------------------------------------------------------
def lr_scale(step, progress):
    """Return the factor on the peak rates of the update after `step` others; progress: share done, 0 to 1."""
    warm = min(1, (step + 1) / (warmup_iters + 1))
    falls = {
        "cosine": 0.5 + 0.5 * math.cos(math.pi * min(progress, 1)),
        "linear": 1 - progress,
        "wsd": min(1, 5 * (1 - progress)),
        "constant": 1,
    }
    return warm * (
        min_lr / learning_rate + (1 - min_lr / learning_rate) * max(0, falls[lr_schedule])
    )


@torch.no_grad()
def evaluate(model, data, machine, n_batches):
    """Return the mean loss in nats per token of n_batches spread over validation; None if a signal comes."""
    nats, weight, end = 0.0, 0.0, data.n_val_batches()
    chosen = np.linspace(0, end - 1, min(n_batches, end)).round().astype(int).tolist()
    model.eval()
    chosen += [end] * (
        -len(chosen) % machine.world_size
    )  # empty ones, for processes to have equally many
    for i in chosen[machine.rank :: machine.world_size]:
        w = (batch := data.get_batch("val", i, batch_size))[2].sum().item()
        nats, weight = nats + machine.loss(model._call_impl, batch).item() * w, weight + w
        if machine.stopping():
            return None
    model.train()
    nats, weight = machine.reduce([nats, weight], "SUM")
    return nats / max(weight, 1e-6)


def final_figures(loss, data, machine, title):
    """Return a full split's loss, perplexity, tokens and bits per byte; print them after title."""
    n_tokens, figures = (
        data.meta["val_tokens"],
        {"val_loss": loss, "perplexity": math.exp(min(loss, 700))},
    )
    if not data.weighted:  # else bytes count that are no targets
        figures["bits_per_byte"] = loss / math.log(2) * n_tokens / max(1, data.meta["val_bytes"])
    machine.say(
        f"{title}, {n_tokens:,} tokens: " + ", ".join(f"{k} {v:.4f}" for k, v in figures.items())
    )
    return figures | {"tokens": n_tokens}


# ---- Checkpoints: ckpt.pt resumes, best.pt is weights for use ----------------------------------------------
def save_checkpoint(path, state, keep=1):
    """Write state to path, all or nothing; of `keep` files the others are <stem>-1.pt, ... Raises OSError."""
    part, older = (
        path.with_suffix(".tmp"),
        [path.with_stem(f"{path.stem}-{i}") for i in range(1, keep)],
    )
    try:
        torch.save(state, part)
        with open(part, "rb+") as f:
            os.fsync(f.fileno())
        for old, new in reversed([*zip([path, *older], older)]):
            if old.exists():
                old.replace(new)
        part.replace(path)
    except (OSError, RuntimeError) as e:  # torch makes a RuntimeError of a failed write
        part.unlink(missing_ok=True)
        raise OSError(
            f"{path} could not be saved ({e}); the one saved before it is untouched"
        ) from e


def read_checkpoint(path):
    """Return what save_checkpoint wrote. Raises FileNotFoundError; ValueError if it is damaged."""
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{path} does not exist: train first, or name another checkpoint or out_dir"
        )
    try:
        if part := zipfile.ZipFile(path).testzip():  # torch itself compares no checksums
            raise zipfile.BadZipFile(f"checksum of {part}")
        state = {"base": "", "lora_rank": 0} | torch.load(
            path, map_location="cpu", weights_only=True
        )
        kinds = {
            "model": dict,
            "model_args": dict,
            "tokenizer": dict,
            "base": str,
            "lora_rank": int,
        }
        return state | {name: kind(state[name]) for name, kind in kinds.items()}
    except Exception as e:  # torch raises half a dozen types
        raise ValueError(
            f"{path} is damaged or no checkpoint ({type(e).__name__}): use another"
        ) from e


def load_checkpoint(path, device="cpu", **changes):
    """Return (model, tokenizer, checkpoint) of a path or Hugging Face id; changes: of the model's config."""
    state = read_checkpoint(path) if Path(path).is_file() or Path(path).suffix == ".pt" else None
    if state is None or state["lora_rank"]:
        from pretrained import load_other

        return load_other(path, state, device, **changes)
    try:
        model, tokenizer = (
            GPT(GPTConfig(**state["model_args"] | changes)),
            Tokenizer(**state["tokenizer"]),
        )
        model.load_state_dict(state["model"])
    except Exception as e:  # as many as there are ways to be damaged
        raise ValueError(
            f"{path} does not fit this gpt.py's GPT: use the version it was made with"
        ) from e
    return model.eval().to(device), tokenizer, state


# ---- The machine: what is chosen by hardware is chosen here ------------------------------------------------
# dense bfloat16 or float16 by the makers' data sheets; the first name found in the GPU's counts
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
    device: torch.device
    dtype: torch.dtype  # of matrix products; the weights stay float32
    compile: bool
    rank: int
    world_size: int
    caught: list = field(default_factory=list)  # signals that ask the run to save and end
    sharded = property(lambda self: fsdp and self.world_size > 1)  # by FSDP, else DDP

    def name(self):
        kind = (
            torch.cuda.get_device_name(self.device)
            if self.device.type == "cuda"
            else self.device.type
        )
        return f"{self.world_size} x {kind}"

    def loss(self, forward, batch):
        x, y, w = (to_device(t, self.device) for t in batch)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return forward(x, y, weights=w)[1]

    def say(self, text):
        print(text, flush=True) if self.rank == 0 else None

    def stopping(self):
        return self.reduce([bool(self.caught)], "MAX")[0] > 0  # a signal, to any process?

    # for one process; scaling.py puts others in their place where there are several
    def reduce(self, values, op):
        return [float(v) for v in values]  # op: SUM or MAX over processes

    def first(self, function, *arguments):
        return function(*arguments)  # called in the first, returned in all

    def divide(self, n_micro, rows):
        return n_micro, rows  # number of micro-batches a step, and their size

    def prepare(self, model):
        return model.to(self.device)  # returned: what is called to train it

    def gather(self, state):
        return state  # a checkpoint's, of whole tensors

    def leave(self):
        pass

    def mfu(
        self, flops
    ):  # the share that flops per second are of the GPUs' peak, None where not known
        peak = next((tflops for gpu, tflops in PEAK_TFLOPS.items() if gpu in self.name()), None)
        return (
            flops / (peak * 1e12 * self.world_size)
            if peak and self.dtype != torch.float32
            else None
        )


def pick_device(name):
    """Return the torch.device that the setting `device` names. Raises ValueError if it is not there."""
    if name == "auto":
        name = (
            torch.accelerator.current_accelerator().type
            if torch.accelerator.is_available()
            else "cpu"
        )
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun's processes take one GPU each
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        return torch.zeros(1, device=name).device
    except Exception as e:  # torch raises half a dozen types
        raise ValueError(f"device {name!r} is not there: use --device=auto or cpu") from e


def native_bfloat16(device):  # does the hardware itself multiply it? A T4, say, emulates it
    if device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def set_up_machine():
    """Choose device and dtype, and whether one can compile; under torchrun, join the other processes."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    found = pick_device(device)
    if found.type == "cuda":
        torch.cuda.set_device(found)
    elif sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 2**30) or libc.mallopt(
            -3, 2**25
        )  # M_MMAP_THRESHOLD, where 2**30 is too much: keep
        libc.mallopt(
            -1, 2**31 - 1
        )  # M_TRIM_THRESHOLD; freed memory, or else each step asks for new pages
    capability = torch.cuda.get_device_capability(found) if found.type == "cuda" else (0, 0)
    best = (
        "bfloat16" if native_bfloat16(found) else "float16" if capability >= (7, 0) else "float32"
    )
    chosen = getattr(torch, best if dtype == "auto" else dtype)
    if chosen == torch.float16 and found.type != "cuda":
        raise ValueError(
            f"dtype float16 needs a CUDA GPU, not {found.type}: use bfloat16 or float32"
        )
    torch.set_float32_matmul_precision("high")  # TF32 for what stays float32 on CUDA
    able = capability >= (7, 0) or bool(
        found.type == "cpu" and shutil.which("g++")
    )  # to compile; see build
    machine = Machine(found, chosen, able if compile is None else compile, rank, world_size)
    if world_size > 1:
        from scaling import join_processes

        join_processes(machine)
    return machine


def compile_model(model, machine, batch):
    """Compile the model, or several processes' blocks, in place, if that works on a batch; return seconds."""
    os.environ.setdefault(
        "TORCHINDUCTOR_VEC_ISA_OK", "1"
    )  # spares seconds of trying the C++ compiler
    began, outcome, parts = time.time(), "compiled", model.h if machine.world_size > 1 else [model]
    for (
        part
    ) in parts:  # so processes exchange a block's gradients while they compute the next one's
        part.compile(
            dynamic=False
        )  # part(...) is compiled from now on, part._call_impl(...) is not
    try:
        machine.loss(model, batch).backward()
    except torch.OutOfMemoryError:
        pass  # the step will meet it, too
    except Exception as e:  # noqa: BLE001  # compilers' errors have no common type
        outcome = f"not compiled: torch.compile failed ({type(e).__name__})"
        for part in parts:
            part._compiled_call_impl = None
    model.zero_grad(set_to_none=True)
    machine.say(f"{outcome} in {time.time() - began:.0f} s")
    return time.time() - began


# ---- Training ----------------------------------------------------------------------------------------------
def model_config(vocab_size):
    return GPTConfig(
        vocab_size=vocab_size, **{k: globals()[k] for k in SETTINGS if hasattr(GPTConfig, k)}
    )


def check_settings():
    """Raise ValueError for the first setting whose value has no meaning."""
    choices = {
        "optimizer": "muon adamw",
        "dtype": "auto float32 bfloat16 float16",
        "lr_schedule": "cosine linear wsd constant",
    }
    positive = (
        "batch_size gradient_accumulation_steps eval_interval eval_iters log_interval learning_rate"
    )
    for name in SETTINGS:
        value, least = globals()[name], 1e-12 if name in positive.split() else 0
        if name in choices and value not in choices[name].split():
            raise ValueError(
                f"{name} is {value!r}: it must be one of {choices[name].replace(' ', ', ')}"
            )
        if type(value) in (int, float) and not least <= value < 2**31:
            raise ValueError(
                f"{name} is {value}: it must be {'above' if least else 'from'} 0, below 2**31"
            )
    model_config(vocab_size=1)


def build(data, machine, state, out=Path()):
    """Return (model, what is called to train it, optimizers, scaler); decide whether machine.compile pays."""
    torch.manual_seed(seed)
    if state or lora_rank or init_from not in ("scratch", "resume", "auto"):
        from resume import go_on, trained_model

        model = trained_model(sys.modules[__name__], data, state, out)
    else:
        model = GPT(model_config(data.meta["vocab_size"]))
    flops = (
        model.flops_per_token() * max_iters * batch_size * gradient_accumulation_steps * block_size
    )
    enough = 5e15 if machine.device.type == "cuda" else 5e13
    long = (
        max_minutes >= (5 if machine.dtype == torch.float32 else 2)
        if max_minutes
        else flops >= enough
    )
    machine.compile = machine.compile and (compile or long)
    forward, optimizers = machine.prepare(model), make_optimizers(model, machine)
    scaler = torch.amp.GradScaler("cuda", enabled=machine.dtype == torch.float16)
    if state:
        go_on(optimizers, scaler, state, machine)
    return model, forward, optimizers, scaler


def open_run(out, resumed):
    """Make the run's folder, renaming an earlier run's files; return the functions that log a dict there."""
    others = []
    try:
        if tensorboard or wandb_log or ("__file__" in globals() and (HERE / "plots.py").exists()):
            from plots import writers

            others = writers(sys.modules[__name__], out)
        out.mkdir(parents=True, exist_ok=True)
        old = (
            []
            if resumed
            else filter(Path.exists, [*out.glob("*.pt"), out / "log.jsonl", out / "loss.png"])
        )
        kept = [path.rename(f"{path}.{time.strftime('%Y-%m-%d-%H%M%S')}").name for path in old]
        if kept:
            print(f"{out}: the earlier run's files are now {', '.join(kept)}")
        log_file = open(out / "log.jsonl", "a", encoding="utf-8", buffering=1)  # noqa: SIM115  # by lines
    except OSError as e:
        raise OSError(
            f"{out} cannot be written ({e.strerror}): choose another folder with --out_dir"
        ) from e
    return [lambda values: print(json.dumps(values), file=log_file), *others]


def describe(machine, data, model, out, step):
    n, trained = model.n_params(), sum(p.numel() for p in model.parameters() if p.requires_grad)
    way = (
        ", FSDP"
        if machine.sharded
        else ", DDP"
        if machine.world_size > 1
        else ", fsdp: alone" * fsdp
    )
    meta, tokens = data.meta, batch_size * gradient_accumulation_steps * block_size
    origin = f", from {model.base}" * bool(model.base) + f", on from step {step:,}" * (step > 0)
    return f"""machine  {machine.name()}, {torch.get_num_threads()} threads, torch {torch.__version__}
         {str(machine.dtype)[6:]}, {"compiled" if machine.compile else "eager"}{way}
data     {data.folder}: {meta["train_tokens"]:,} training and {meta["val_tokens"]:,} validation tokens
         {meta["tokenizer"]["kind"]} vocabulary of {meta["vocab_size"]:,}
model    {n / 1e6:,.2f}M parameters{f", {trained:,} trained" * (trained < n)}; up to \
{(n + 3 * trained) / 2**18:,.0f} MiB with gradients and averages, plus activations
run      {f"{max_minutes:g} minutes" if max_minutes else f"{max_iters:,} steps"} of {tokens:,} tokens
         {len(data.starts["train"]) * block_size / tokens:,.0f} steps an epoch, in {out}{origin}"""


def print_sample(model, data, machine):
    """Print up to sample_tokens that continue a newline or, if weighted, validation's first prompt."""
    if sample_tokens == 0 or (
        machine.rank > 0 and not machine.sharded
    ):  # whose weights are everywhere
        return
    x, _, w = data.get_batch("val", 0, 1)  # w: 0 up to the first token of an answer
    plain = not data.weighted and "\n" in (data.tokenizer.state["chars"] or "\n")
    ids = data.tokenizer.encode("\n") if plain else x[0, : 1 + int(w[0].argmax())].tolist()
    model.eval()
    draws = torch.Generator(machine.device).manual_seed(seed)
    ids += [int(i) for i in model.generate([ids], sample_tokens, generator=draws)] + [
        data.tokenizer.end
    ]
    model.train()
    if machine.rank == 0:
        text = data.tokenizer.decode(ids[: ids.index(data.tokenizer.end)])
        print("-" * 80, text.strip(), "-" * 80, sep="\n")


def snapshot(model, data, machine, step, best_val_loss, **more):
    """Return what a checkpoint for use holds, and more: tensors, numbers, strings, lists and dicts only."""
    weights = {k: v for k, v in model.state_dict().items() if not lora_rank or ".lora." in k}
    return machine.gather(
        {
            "model": weights,
            "model_args": asdict(model.config),
            "tokenizer": data.tokenizer.state,
            "config": {name: globals()[name] for name in SETTINGS} | {"dataset": data.folder.name},
            "optimizer": optimizer,
            "base": model.base,
            "lora_rank": lora_rank,
            "step": step,
            "dataset_sha256": data.meta["sha256"],
            "best_val_loss": best_val_loss,
            **more,
        }
    )


def accumulate(backward, forward, batches, step, weight, machine):
    """Add up a process's gradients, averaged over processes; return the loss, or None if memory ran out."""
    loss, first = torch.zeros((), device=machine.device), step * machine.world_size + machine.rank
    try:
        for micro, batch in enumerate(
            batches, first * len(batches)
        ):  # its number among all of the run's
            torch.manual_seed((seed << 32) + micro)  # dropout, too, depends on (seed, step) alone
            forward.require_backward_grad_sync = last = batch is batches[-1]  # DDP's switch
            if machine.sharded:
                forward.set_requires_gradient_sync(last)
            loss += backward(*batch, float(batch[2].sum() / max(weight, 1e-6)))
    except RuntimeError as e:  # torch.OutOfMemoryError or, on MPS, this itself
        if "out of memory" not in str(e):
            raise
        return None
    return loss


def make_step(model, forward, optimizers, scaler, machine, n_micro):
    """Return a step's two halves. On one GPU, where n_micro is 1, they are Replays, which belong together."""

    def backward(x, y, w, factor):
        loss = machine.loss(forward, (x, y, w)) * factor
        scaler.scale(loss).backward()
        return loss.detach()

    def update(*rates):
        """Clip, take each optimizer's step, none if a gradient is not finite; return the norm before."""
        for o in optimizers:
            scaler.unscale_(o)
        norm = whole(nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf))
        for o, rate in zip(optimizers, rates):
            for group in o.param_groups:
                group |= {"lr": rate, "capturable": norm.is_cuda}
            o.found_inf = (
                ~norm.isfinite()
            ).float()  # 1: step() changes nothing, and nobody waits to know
            o.step() if machine.device.type != "mps" or not o.found_inf else None  # whose AdamW ignores it
            o.zero_grad(set_to_none=True)
        scaler.update()
        return norm

    alone = (
        machine.world_size * n_micro == 1 and not gradient_checkpointing
    )  # whose random state it reads
    return (
        (Replay(backward, machine.device), Replay(update, machine.device))
        if alone
        else (backward, update)
    )


def train(started=None):
    """Train as the settings say; return the final figures as a dict. SIGINT, SIGTERM, SIGUSR1 save, end a run
    and are its "stopped_by"; max_minutes counts from `started`, or now. Raises ValueError, OSError."""
    check_settings()
    machine, actions = set_up_machine(), {}

    def note(signum, frame):
        machine.caught.append(signum)
        signal.signal(signum, actions[signum])  # a second one acts as ever

    if threading.current_thread() is threading.main_thread():  # elsewhere Python forbids handlers
        actions = {
            n: signal.signal(n, note) for n in {2, 15, getattr(signal, "SIGUSR1", 2)}
        }  # INT, TERM
    try:
        if eval_only or eval_text or dry_run:
            from evaluation import without_training

            figures = without_training(sys.modules[__name__], machine)
        else:
            figures = training_run(started or time.time(), machine)
    finally:
        for signum, action in actions.items():
            signal.signal(signum, action)
    machine.leave()
    return figures


def training_run(started, machine):
    """Set up; then, step by step: how far? | save, evaluate | set lr | accumulate | update | log."""
    n_micro, rows = machine.divide(gradient_accumulation_steps, batch_size)
    data, state = Data(machine.first(prepare_if_missing, dataset), block_size), None
    out = Path(out_dir or HERE / "out" / data.folder.name)
    # stale: evaluations since the best; paused: seconds not spent on steps; reserve: those that the end takes
    new = {
        "step": 0,
        "best_val_loss": math.inf,
        "stale": 0,
        "reserve": 0.0,
        "paused": 0.0,
        "elapsed_s": 0.0,
    }
    if init_from in ("resume", "auto"):
        from resume import read_run

        state = read_run(sys.modules[__name__], out, machine, new)
    step, best_val_loss, stale, reserve, paused, elapsed = ((state or new)[name] for name in new)
    started, paused, progress = started - elapsed, paused - elapsed, 0.0
    model, forward, optimizers, scaler = build(data, machine, state, out)
    writers = open_run(out, resumed=state is not None) if machine.rank == 0 else []

    def log(**values):
        values = {"step": step, "elapsed_s": round(time.time() - started, 3)} | values
        for write in writers:
            write(values)

    def save(name, keep=1, **more):
        state = snapshot(model, data, machine, step, best_val_loss, **more)
        if machine.rank == 0:
            save_checkpoint(out / name, state, keep)

    log(
        config={name: globals()[name] for name in SETTINGS} | {"dataset": data.folder.name},
        dataset_sha256=data.meta["sha256"],
        torch=torch.__version__,
        machine=machine.name(),
    )
    machine.say(describe(machine, data, model, out, step))
    remedy = (
        f"are not finite: go on from {out} by --init_from=resume with lower learning_rate, muon_lr"
    )
    tokens_per_step, n_val = (
        batch_size * gradient_accumulation_steps * block_size,
        data.n_val_batches(),
    )
    backward, update = make_step(model, forward, optimizers, scaler, machine, n_micro)
    bad_steps = skipped = torch.zeros(
        (), device=machine.device
    )  # gradients not finite: in a row, all
    paused += time.time() - started
    mark, mark_step, to_compile = (
        time.time() - paused,
        step,
        machine.compile,
    )  # since when speed is measured
    while True:  # how far?
        elapsed = time.time() - started
        budget = max(
            59.4 * max_minutes - paused - reserve, 1
        )  # the hundredth part is for the process's end
        done = (elapsed - paused) / budget if max_minutes else step / max_iters if max_iters else 1
        progress, stop = machine.reduce([max(progress, done), bool(machine.caught)], "MAX")
        last = progress >= 1
        # save, evaluate
        if step % eval_interval == 0 or last or stop:
            pause = time.time()
            if (
                bad_steps > max_bad_steps
                or not whole(nn.utils.get_total_norm(model.parameters())).isfinite()
            ):
                raise ValueError(
                    f"step {step}: weights or {max_bad_steps + 1} gradients in a row {remedy}"
                )
            save(
                "ckpt.pt",
                keep_checkpoints,
                elapsed_s=elapsed,
                paused=paused,
                reserve=reserve,
                stale=stale,
                scaler=scaler.state_dict(),
                optimizers=[o.state_dict() for o in optimizers],
            )
            saved, val_loss = (
                time.time(),
                None if stop else evaluate(model, data, machine, eval_iters),
            )
            if not (stop := val_loss is None):
                took = time.time() - saved
                log(val_loss=val_loss)
                machine.say(f"step {step:6,} | val loss {val_loss:.4f}")
                reserve = 2 * (time.time() - pause) + took * (max(1, n_val / eval_iters) - 1)
                stale += step > 0
                if val_loss < best_val_loss and (step or last):
                    best_val_loss, stale = val_loss, 0
                    save("best.pt")
                last = last or stale >= early_stop > 0
                if sample_at_eval and not last:
                    print_sample(model, data, machine)
            paused += time.time() - pause
        if last or stop:
            break
        # set lr
        scale = lr_scale(
            step, step / lr_decay_iters if lr_decay_iters and not max_minutes else progress
        )
        # accumulate
        first = (
            step * machine.world_size + machine.rank
        ) * n_micro  # among all of the run's micro-batches
        batches = [data.get_batch("train", i, rows) for i in range(first, first + n_micro)]
        weight = (
            machine.reduce([sum(batch[2].sum() for batch in batches)], "SUM")[0]
            / machine.world_size
        )
        if to_compile and (
            step or machine.device.type == "cuda"
        ):  # on CPU the first step shows at once
            paused, to_compile = paused + compile_model(model, machine, batches[0]), False
        while (loss := accumulate(backward, forward, batches, step, weight, machine)) is None:
            from scaling import cut

            batches = cut(batches, model, forward, machine, optimizer)
            n_micro, rows = len(batches), len(batches[0][0])
            backward, update = make_step(model, forward, optimizers, scaler, machine, n_micro)
        # update
        norm = update(learning_rate * scale, muon_lr * scale)
        bad = ~norm.isfinite()
        bad_steps, skipped = (bad_steps + 1) * (bad | (bad_steps > max_bad_steps)), skipped + bad
        step += 1
        # log
        if step % log_interval == 0 or step == 1:
            mean, now = machine.reduce([loss], "SUM")[0] / machine.world_size, time.time() - paused
            speed = (step - mark_step) * tokens_per_step / (now - mark)
            mfu, lr = machine.mfu(speed * model.flops_per_token()), learning_rate * scale
            log(
                loss=mean,
                lr=lr,
                grad_norm=float(norm),
                tokens_per_s=speed,
                mfu=mfu,
                skipped=int(skipped),
            )
            left = (
                60 * max_minutes - elapsed
                if max_minutes
                else (max_iters - step) * tokens_per_step / speed
            )
            machine.say(
                f"step {step:6,} | loss {mean:.4f} | lr {lr:.1e} | {speed:,.0f} tokens/s | "
                f"mfu {'n/a' if mfu is None else f'{mfu:.0%}'} | {timedelta(seconds=int(left))} left"
                + f" | {int(skipped)} skipped: gradient not finite"
                * (skipped > 0)
            )
            if bad_steps > max_bad_steps:
                raise ValueError(f"step {step}: {max_bad_steps + 1} gradients in a row {remedy}")
            mark, mark_step = now, step
    result = {"step": step, "best_val_loss": best_val_loss, "out_dir": str(out), "stopped_by": None}
    loss = None if stop else evaluate(model, data, machine, n_val)
    if loss is None:
        machine.say(
            f"stopped at step {step:,}: {out / 'ckpt.pt'} is saved: --init_from=resume goes on"
        )
        return result | {"stopped_by": (machine.caught or [signal.SIGTERM])[0]}
    figures = final_figures(
        loss, data, machine, f"{step:,} steps, {elapsed:.0f} s, full validation split"
    )
    log(**figures)
    print_sample(model, data, machine)
    return result | figures


if __name__ == "__main__" and "__file__" in globals():  # a script
    from configurator import run_script

    run_script(
        globals(),
        lambda: train(__started__),
        lambda: {
            "device_type": (found := pick_device(device)).type,
            "native_bfloat16": native_bfloat16(found),
        },
    )
elif __name__ == "__main__":  # pasted into a notebook cell
    train(__started__)
